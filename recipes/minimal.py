"""DAQ in one page: a small float network learns handwritten digits, then learns them again with 3-bit weights and inputs.

python recipes/minimal.py      # half a minute of one core, mostly to compile; the digits come with scikit-learn
"""

import timm
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

import hf_daq

FOLDER = "output/minimal"


def train(model, optimizer, images, labels, epochs=8):
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
    model.train()
    for _ in range(epochs):
        for rows in torch.randperm(len(images)).split(64):
            F.cross_entropy(model(images[rows]), labels[rows]).backward()
            optimizer.step()
            optimizer.zero_grad()
        schedule.step()


@torch.no_grad()
def accuracy(model, images, labels):
    return 100 * (model.eval()(images).argmax(1) == labels).float().mean().item()


def main():
    torch.manual_seed(0)

    # Data: 1797 images of 8x8 pixels, here with values from -1 to 1, a fifth of them for the test.
    pixels, digits = load_digits(return_X_y=True)
    images, labels = torch.tensor(pixels, dtype=torch.float32).view(-1, 1, 8, 8) / 8 - 1, torch.tensor(digits)
    images = images.repeat(1, 3, 1, 1)  # as if they had colors
    train_images, images, train_labels, labels = train_test_split(images, labels, test_size=0.2, random_state=0)

    # A float network: any timm model.
    model = timm.create_model("test_resnet", num_classes=10)
    train(model, torch.optim.AdamW(model.parameters(), lr=2e-3), train_images, train_labels)
    print(f"float: {accuracy(model, images, labels):.1f} %")

    # The DAQ part: 3 bits for weights and inputs, bounds that start from a few images, then the same loop again.
    hf_daq.apply_daq(model, bits=3)
    with hf_daq.calibrate(model):
        model(train_images[:256])
    train(model, torch.optim.AdamW(hf_daq.param_groups(model, lr=5e-4)), train_images, train_labels)

    # Save, and open what was saved.
    hf_daq.save_pretrained(model, FOLDER)
    model = timm.create_model(f"local-dir:{FOLDER}", pretrained=True)
    print(f"3 bits, opened from {FOLDER}: {accuracy(model, images, labels):.1f} %")


if __name__ == "__main__":
    main()
