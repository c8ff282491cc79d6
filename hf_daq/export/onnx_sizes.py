"""Images of any size: the dimensions that are free in the file, and the sizes at which it is compared once more."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ExportError
from ..model.batch import Inputs, are_images, outputs_of

_ROWS = 4
_REMEDY = "leave dynamic_size=True out, and export a file for each size"


def check_dynamic_size(batch: Inputs, runtime: str, exact: bool) -> None:
    if runtime != "openvino" or not exact:
        raise ExportError(
            'dynamic_size=True is for runtime="openvino" without int8_outputs; in files for ONNX Runtime convolutions are '
            "products of gathered codes, whose places depend on height and width"
        )
    if not any(map(are_images, batch.tensors.values())):
        raise ExportError("dynamic_size=True is for images, (rows, channels, height, width), and the inputs have none")


def name_sizes(proto: Any) -> None:
    """`height` and `width` for the symbols of torch in the shapes of the file; of further images with their names before."""
    names: dict[str, str] = {}
    for value in proto.graph.input:
        shape = value.type.tensor_type.shape.dim
        for size, word in zip(shape[2:], ("height", "width"), strict=False):
            if size.dim_param and size.dim_param not in names:
                names[size.dim_param] = word if word not in names.values() else f"{value.name}_{word}"
    symbols = re.compile("|".join(rf"\b{re.escape(symbol)}\b" for symbol in names))
    for value in (*proto.graph.input, *proto.graph.output, *proto.graph.value_info):
        for size in value.type.tensor_type.shape.dim:
            if size.dim_param:
                size.dim_param = symbols.sub(lambda found: names[found[0]], size.dim_param)


def check_other_sizes(model: nn.Module, batch: Inputs, check: Callable[[Inputs], Any]) -> None:
    """Refuse a file that computes something else for images of another size: what a model decided by the size when it was
    traced stays decided."""
    compared = 0
    for other, sizes in _other_sizes(batch):
        try:
            outputs_of(model, other, other.part(slice(1)))
        except Exception:  # whatever the model says of a size that it does not take
            continue
        compared += 1
        try:
            check(other)
        except Exception as error:  # of the runtime too, which says so as it likes
            first = str(error).partition("\n")[0][:300]
            raise ExportError(f"for images of {sizes} the file is not the model: {first}; {_REMEDY}") from error
    if not compared:
        raise ExportError(f"the model takes images of no other size that was tried: {_REMEDY}")


def _other_sizes(batch: Inputs) -> Iterator[tuple[Inputs, str]]:
    """A few of the inputs, with larger and smaller images, of sizes that are multiples of those and of odd ones."""

    def resized(value: Tensor, change: Callable[[int, int], tuple[int, int]]) -> Tensor:
        if not are_images(value):
            return value[:_ROWS]
        size = change(*value.shape[2:])
        sizes.append(" x ".join(map(str, size)))
        return torch.nn.functional.interpolate(value[:_ROWS], size, mode="bilinear")

    for change in (
        lambda height, width: (height + 1, width - 1),
        lambda height, width: (height * 3 // 4, width * 5 // 4),
        lambda height, width: (height * 2, width),
        lambda height, width: (height, width * 2),
    ):
        sizes: list[str] = []
        tensors = {key: resized(value, change) for key, value in batch.tensors.items()}
        yield Inputs(tensors if batch.named else tuple(tensors.values())), ", ".join(sizes)
