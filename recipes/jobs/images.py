"""A folder of JPEGs, with a folder for each class -> ResNet-18 with 4-bit weights and inputs -> an ONNX file -> one image.

python recipes/jobs/images.py FOLDER    # pip install -e ".[recipes,export]"
"""

import sys

import onnxruntime
import timm
import torch
from timm.data import ImageDataset, create_transform, resolve_data_config
from torch.utils.data import DataLoader

import hf_daq


def main(folder, name="resnet18.a1_in1k", epochs=3, image_size=224):
    names = list(ImageDataset(folder).reader.class_to_idx)
    model = timm.create_model(name, pretrained=True, num_classes=len(names))
    data = resolve_data_config({"input_size": (3, image_size, image_size)}, model=model)
    loader = DataLoader(ImageDataset(folder, transform=create_transform(**data)), batch_size=32, shuffle=True)

    def train(optimizer):
        for epoch in range(epochs):
            for images, labels in loader:
                loss = torch.nn.functional.cross_entropy(model.train()(images), labels)
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
            print(f"epoch {epoch}: loss {loss.item():.3f}")

    train(torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9))  # the float network first
    hf_daq.apply_daq(model, bits=4)
    with hf_daq.calibrate(model):
        model(next(iter(loader))[0])
    train(torch.optim.SGD(hf_daq.param_groups(model, lr=0.005), momentum=0.9))

    hf_daq.save_pretrained(model, "out/images")
    images, labels = next(iter(loader))
    print(hf_daq.export_onnx(model, "out/images/model.onnx", images))
    session = onnxruntime.InferenceSession("out/images/model.onnx")
    (logits,) = session.run(None, {session.get_inputs()[0].name: images[:1].numpy()})
    print(f"one image: {names[logits.argmax()]}, really {names[labels[0]]}")


if __name__ == "__main__":
    main(*sys.argv[1:])
