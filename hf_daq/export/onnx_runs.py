"""Models and files that are run on the same inputs: in PyTorch, ONNX Runtime and OpenVINO."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ..errors import ExportError

_BATCH = 16


class Inputs:
    """The inputs of a model as a tuple or a mapping of tensors."""

    def __init__(self, inputs: Any) -> None:
        if isinstance(inputs, Tensor):
            inputs = (inputs,)
        self.named = isinstance(inputs, Mapping)
        if not isinstance(inputs, Mapping | Sequence):
            raise ExportError(f"inputs must be a tensor, a tuple or a mapping of tensors, not {type(inputs).__name__}")
        self.tensors: dict[Any, Tensor] = dict(inputs if self.named else enumerate(inputs))
        if not self.tensors or not all(isinstance(value, Tensor) and value.ndim for value in self.tensors.values()):
            raise ExportError("inputs must be a tensor, a tuple or a mapping of tensors, the first dimension rows")
        counts = {len(value) for value in self.tensors.values()}
        if len(counts) > 1 or min(counts) < 2:
            raise ExportError(f"inputs need two rows at least, the same number in each; they have {sorted(counts)}")
        self.rows = counts.pop()

    def to(self, device: torch.device) -> None:
        self.tensors = {key: value.detach().to(device) for key, value in self.tensors.items()}

    def part(self, rows: slice) -> list[Tensor]:
        return [value[rows] for value in self.tensors.values()]

    def batches(self) -> Iterator[list[Tensor]]:
        for start in range(0, self.rows, _BATCH):
            yield self.part(slice(start, start + _BATCH))

    def arguments(self, tensors: list[Tensor]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return ((), dict(zip(self.tensors, tensors, strict=True))) if self.named else (tuple(tensors), {})

    def shapes(self, sequence: bool) -> Any:
        """Free dimensions: the rows, and with `sequence` the columns of tokens."""
        rows, columns = torch.export.Dim("batch"), torch.export.Dim("sequence")
        shapes = {
            key: {0: rows, 1: columns} if sequence and _are_tokens(value) else {0: rows}
            for key, value in self.tensors.items()
        }
        return shapes if self.named else tuple(shapes.values())

    @property
    def tokens(self) -> bool:
        return any(map(_are_tokens, self.tensors.values()))


def _are_tokens(value: Tensor) -> bool:
    return value.ndim == 2 and not value.is_floating_point()


def outputs_of(model: nn.Module, batch: Inputs, tensors: list[Tensor]) -> list[Tensor]:
    args, kwargs = batch.arguments(tensors)
    return [leaf for leaf in pytree.tree_leaves(model(*args, **kwargs)) if isinstance(leaf, Tensor)]


class OnnxRuntime:
    """A model in ONNX Runtime: tensors in, arrays out."""

    def __init__(self, proto: Any, names: Sequence[str] | None = None) -> None:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        options.intra_op_num_threads = torch.get_num_threads()
        self.session = onnxruntime.InferenceSession(
            proto.SerializeToString(), options, providers=["CPUExecutionProvider"]
        )
        self.inputs = [value.name for value in self.session.get_inputs()]
        self.names = names

    def __call__(self, tensors: Iterable[Tensor]) -> list[Any]:
        values = [tensor.cpu().numpy() for tensor in tensors]
        found: list[Any] = self.session.run(self.names, dict(zip(self.inputs, values, strict=True)))
        return found


class OpenVino:
    """A model in OpenVINO: tensors in, arrays out."""

    def __init__(self, proto: Any) -> None:
        import openvino

        core = openvino.Core()
        options = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": torch.get_num_threads()}
        self.request = core.compile_model(core.read_model(proto.SerializeToString()), "CPU", options)

    def __call__(self, tensors: Iterable[Tensor]) -> list[Any]:
        found = self.request([tensor.cpu().numpy() for tensor in tensors])
        return [found[position] for position in range(len(self.request.outputs))]
