"""`--export packed,onnx,compressed-tensors` of the training recipes: other files of the quantized network that was saved."""

from pathlib import Path
from typing import Any

import hf_daq


def formats(names: str | None) -> list[str]:
    """The names that were asked for, checked before a run begins."""
    wanted = [name.strip() for name in (names or "").split(",") if name.strip()]
    for name in wanted:
        if name not in _WRITERS:
            raise SystemExit(f"export is {names!r}; allowed are {', '.join(_WRITERS)}, separated by commas")
    return wanted


def export(names: list[str], output: Path, inputs: Any) -> None:
    """Write each format beside output/quantized, compare it with the network, and print what was found.

    Args:
        inputs: real inputs to compare with, as the model takes them: a tensor, or a mapping of tensors.
    """
    for name in names:
        model = hf_daq.from_pretrained(output / "quantized")
        print(_WRITERS[name](model, output, inputs))


def _packed(model: Any, output: Path, inputs: Any) -> str:
    card = hf_daq.inspect(output / "quantized").facts
    hf_daq.save_pretrained(model, output / "packed", packed=True, probe=inputs, card=card)
    return f"{output / 'packed'}: {weights_size(output / 'packed') / 2**20:.2f} MiB, the same outputs bit for bit"


def _onnx(model: Any, output: Path, inputs: Any) -> Any:
    return hf_daq.export_onnx(model, output / "model.onnx", inputs)


def _compressed_tensors(model: Any, output: Path, inputs: Any) -> Any:
    return hf_daq.export_compressed_tensors(model, output / "compressed-tensors", inputs)


def weights_size(folder: Path) -> int:
    """Bytes of the weights in a folder."""
    return sum(path.stat().st_size for path in folder.glob("model*.safetensors"))


_WRITERS = {"packed": _packed, "onnx": _onnx, "compressed-tensors": _compressed_tensors}
