"""Distance-aware Quantization (Kim, Lee, Ham, ICCV 2021) for timm and transformers models.

hf_daq.apply_daq(model, bits=3)
with hf_daq.calibrate(model):
    model(images)
hf_daq.reconstruct(model, [images])  # optional: minutes that save training, or make it start better
optimizer = torch.optim.SGD(hf_daq.param_groups(model, lr=0.01, quantizer_lr=1e-4))
hf_daq.save_pretrained(model, "out")  # packed=True: codes of a few bits
hf_daq.export_onnx(model, "model.onnx", images)

`import hf_daq` loads neither torch nor timm nor transformers: what a name stands for is loaded when it is first used.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .integrations import registration as registration
from .version import __version__

if TYPE_CHECKING:
    from .allocation import allocate
    from .apply import apply_daq, pack, remove_daq, restart, unpack
    from .batch_norm import reestimate_batch_norm
    from .calibration import calibrate
    from .checkpoint import from_pretrained, push_to_hub, save_pretrained
    from .config import DaqConfig
    from .errors import DaqError
    from .export.compressed_tensors import export_compressed_tensors
    from .export.gguf import export_gguf
    from .export.onnx import export_onnx
    from .files.card import update_card
    from .files.facts import CardFacts, Result
    from .files.inspect import inspect
    from .integrations.trainer import MonitorCallback, trainer_optimizer
    from .model.param_groups import param_groups
    from .model.plan import plan
    from .nn.integers import integer_arithmetic
    from .quantization import quantize
    from .reconstruction import reconstruct
    from .report.compare import compare
    from .report.health import health
    from .report.monitor import Monitor
    from .report.page import report
    from .report.summary import summary
    from .transitions import TransitionScheduler, dampening

__all__ = [
    "CardFacts",
    "DaqConfig",
    "DaqError",
    "Monitor",
    "MonitorCallback",
    "Result",
    "TransitionScheduler",
    "__version__",
    "allocate",
    "apply_daq",
    "calibrate",
    "compare",
    "dampening",
    "export_compressed_tensors",
    "export_gguf",
    "export_onnx",
    "from_pretrained",
    "health",
    "inspect",
    "integer_arithmetic",
    "pack",
    "param_groups",
    "plan",
    "push_to_hub",
    "quantize",
    "reconstruct",
    "reestimate_batch_norm",
    "remove_daq",
    "report",
    "restart",
    "save_pretrained",
    "summary",
    "trainer_optimizer",
    "unpack",
    "update_card",
]

_FILES = {
    "CardFacts": "files.facts",
    "DaqConfig": "config",
    "DaqError": "errors",
    "Monitor": "report.monitor",
    "MonitorCallback": "integrations.trainer",
    "Result": "files.facts",
    "TransitionScheduler": "transitions",
    "allocate": "allocation",
    "apply_daq": "apply",
    "calibrate": "calibration",
    "compare": "report.compare",
    "dampening": "transitions",
    "export_compressed_tensors": "export.compressed_tensors",
    "export_gguf": "export.gguf",
    "export_onnx": "export.onnx",
    "from_pretrained": "checkpoint",
    "health": "report.health",
    "inspect": "files.inspect",
    "integer_arithmetic": "nn.integers",
    "pack": "apply",
    "param_groups": "model.param_groups",
    "plan": "model.plan",
    "push_to_hub": "checkpoint",
    "quantize": "quantization",
    "reconstruct": "reconstruction",
    "reestimate_batch_norm": "batch_norm",
    "remove_daq": "apply",
    "report": "report.page",
    "restart": "apply",
    "save_pretrained": "checkpoint",
    "summary": "report.summary",
    "trainer_optimizer": "integrations.trainer",
    "unpack": "apply",
    "update_card": "files.card",
}
import_module(".report", __name__)  # now, so that no later import of its files puts the folder where the function is
del globals()["report"]


def __getattr__(name: str) -> Any:
    if name not in _FILES:
        raise AttributeError(f"module 'hf_daq' has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(f".{_FILES[name]}", __name__), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
