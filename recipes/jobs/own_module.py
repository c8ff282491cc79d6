"""A module of your own, with Conv1d and Linear layers, trained in a plain loop: 4-bit weights and inputs.

python recipes/jobs/own_module.py    # the data are the handwritten digits of scikit-learn, as 8 signals of 8 values
"""

import torch
from sklearn.datasets import load_digits
from torch import nn

import hf_daq


class Signals(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Sequential(nn.Conv1d(8, 32, 3, padding=1), nn.ReLU(), nn.Conv1d(32, 32, 3, padding=1), nn.ReLU())
        self.hidden = nn.Sequential(nn.Linear(256, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU())
        self.head = nn.Linear(64, 10)

    def forward(self, x):
        return self.head(self.hidden(self.conv(x).flatten(1)))


def main(epochs=10):
    torch.manual_seed(0)
    values, labels = load_digits(return_X_y=True)
    x, labels = torch.tensor(values, dtype=torch.float32).view(-1, 8, 8) / 16, torch.tensor(labels)
    model = Signals()

    def train(optimizer):
        for rows in (rows for _ in range(epochs) for rows in torch.randperm(1400).split(64)):
            nn.functional.cross_entropy(model(x[rows]), labels[rows]).backward()
            optimizer.step()
            optimizer.zero_grad()
        print(f"{100 * (model(x[1400:]).argmax(1) == labels[1400:]).float().mean():.1f} %")

    train(torch.optim.AdamW(model.parameters(), lr=2e-3))
    hf_daq.apply_daq(model, bits=4)  # all but the first and the last layer
    with hf_daq.calibrate(model):
        model(x[:256])
    train(torch.optim.AdamW(hf_daq.param_groups(model, lr=5e-4)))
    hf_daq.save_pretrained(model, "out/own", packed=True)
    opened = hf_daq.from_pretrained("out/own", model=Signals())
    same = (opened(x).argmax(1) == model.eval()(x).argmax(1)).float().mean()
    print(hf_daq.summary(opened, x[:64]), f"{100 * same:.1f} % of the answers are those before packing", sep="\n\n")


if __name__ == "__main__":
    main()
