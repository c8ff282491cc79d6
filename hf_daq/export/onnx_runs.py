"""Models and files that are run on the same inputs: in PyTorch, ONNX Runtime and OpenVINO."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor


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
