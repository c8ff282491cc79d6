"""Draw a trained timm checkpoint: every picture of hf_daq.plots as a PNG.

    python recipes/measure/plots.py output/quantized --output pictures
    python recipes/measure/plots.py output/quantized --output pictures --images FOLDER --history history.json

Written are weights.png, inputs.png, by_depth.png, transfer_curve.png with the settings of the checkpoint, and with
`--history`, a JSON file of flip rates, flip_rate.png. Inputs are the images of a folder, or the digits of scikit-learn,
which say little about a network that was trained on something else.
"""

import argparse
import io
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from timm.data import create_transform, resolve_data_config
from torch import Tensor, nn

import hf_daq
from hf_daq import plots

sys.path.insert(0, str(Path(__file__).parents[1]))
import networks  # noqa: F401  registers networks for small images with timm

ENDINGS = {".bmp", ".jpeg", ".jpg", ".png", ".webp"}


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("checkpoint", help="folder of a quantized model, a weights file in it, or a repository of the Hub")
    add("--output", type=Path, required=True, help="folder for the pictures")
    add("--images", type=Path, help="folder of images; the digits without it")
    add("--count", type=int, default=64, help="how many images")
    add("--layers", nargs="+", help="names of layers for the histograms; without it up to 12 of them")
    add("--columns", type=int, default=3, help="panels of a histogram side by side")
    add("--history", type=Path, help="JSON list of {step, layers: {name: {flip_rate, oscillating}}}")
    return parser.parse_args(argv)


def read_images(folder: Path | None, count: int) -> list[Image.Image]:
    if folder is None:
        from sklearn.datasets import load_digits

        pixels = load_digits().images[:count] * 15.9375
        return [Image.fromarray(image) for image in pixels.astype(np.uint8)]
    paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() in ENDINGS)
    if not paths:
        raise SystemExit(f"no images in {folder}; their names end in {', '.join(sorted(ENDINGS))}")
    chosen = np.linspace(0, len(paths) - 1, min(count, len(paths))).astype(int)
    images = []
    for number in chosen:
        with Image.open(paths[number]) as image:
            images.append(image.copy())
    return images


def as_batch(images: list[Image.Image], model: nn.Module) -> Tensor:
    """Resized and normalised as the model wants them."""
    settings = resolve_data_config({}, model=model)
    transform, mode = create_transform(**settings), "RGB" if settings["input_size"][0] == 3 else "L"
    return torch.stack([transform(image.convert(mode)) for image in images])


def save(figure: Any, path: Path) -> None:
    """With a palette, which takes a third of the space of full colour."""
    file = io.BytesIO()
    figure.savefig(file, format="png")
    Image.open(file).convert("RGB").quantize(128, dither=Image.Dither.NONE).save(path, optimize=True)
    print(path)


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    if args.count < 1:
        raise SystemExit(f"--count is {args.count}; at least one image is needed")
    path = Path(args.checkpoint)
    model = hf_daq.from_pretrained(path.parent if path.is_file() else args.checkpoint)
    batch = as_batch(read_images(args.images, args.count), model)
    config: hf_daq.DaqConfig = model.daq_config
    args.output.mkdir(parents=True, exist_ok=True)
    save(plots.weight_histogram(model, args.layers, args.columns), args.output / "weights.png")
    if config.activation_bits is not None:
        save(plots.input_histogram(model, batch, args.layers, args.columns), args.output / "inputs.png")
    save(plots.by_depth(hf_daq.summary(model, batch)), args.output / "by_depth.png")
    curve = plots.transfer_curve(
        config.weight_bits, config.weight_gamma, config.weight_sigma, temperature=config.temperature
    )
    save(curve, args.output / "transfer_curve.png")
    if args.history:
        save(plots.flip_rate(json.loads(args.history.read_text())), args.output / "flip_rate.png")


if __name__ == "__main__":
    main()
