"""Distance-aware Quantization (Kim, Lee, Ham, ICCV 2021) for timm and transformers models.

hf_daq.apply_daq(model, bits=3)
with hf_daq.calibrate(model):
    model(images)
optimizer = torch.optim.SGD(hf_daq.param_groups(model, lr=0.01, quantizer_lr=1e-4))
hf_daq.save_pretrained(model, "out")  # packed=True: codes of a few bits
hf_daq.export_onnx(model, "model.onnx", images)

`import hf_daq` loads neither torch nor timm nor transformers: what a name stands for is loaded when it is first used.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from . import registration as registration
from .version import __version__

if TYPE_CHECKING:
    from .apply import apply_daq, remove_daq
    from .calibration import calibrate
    from .card import update_card
    from .checkpoint import from_pretrained, push_to_hub, save_pretrained
    from .checkup import health
    from .config import DaqConfig
    from .errors import DaqError
    from .export_compressed import export_compressed_tensors
    from .facts import CardFacts, Result
    from .inspection import inspect
    from .integers import integer_arithmetic
    from .matching import plan
    from .monitor import Monitor
    from .monitor_callback import MonitorCallback
    from .onnx_export import export_onnx
    from .packing import pack, unpack
    from .report import summary
    from .training import param_groups, trainer_optimizer

__all__ = [
    "CardFacts",
    "DaqConfig",
    "DaqError",
    "Monitor",
    "MonitorCallback",
    "Result",
    "__version__",
    "apply_daq",
    "calibrate",
    "export_compressed_tensors",
    "export_onnx",
    "from_pretrained",
    "health",
    "inspect",
    "integer_arithmetic",
    "pack",
    "param_groups",
    "plan",
    "push_to_hub",
    "remove_daq",
    "save_pretrained",
    "summary",
    "trainer_optimizer",
    "unpack",
    "update_card",
]

_FILES = {
    "CardFacts": "facts",
    "DaqConfig": "config",
    "DaqError": "errors",
    "Monitor": "monitor",
    "MonitorCallback": "monitor_callback",
    "Result": "facts",
    "apply_daq": "apply",
    "calibrate": "calibration",
    "export_compressed_tensors": "export_compressed",
    "export_onnx": "onnx_export",
    "from_pretrained": "checkpoint",
    "health": "checkup",
    "inspect": "inspection",
    "integer_arithmetic": "integers",
    "pack": "packing",
    "param_groups": "training",
    "plan": "matching",
    "push_to_hub": "checkpoint",
    "remove_daq": "apply",
    "save_pretrained": "checkpoint",
    "summary": "report",
    "trainer_optimizer": "training",
    "unpack": "packing",
    "update_card": "card",
}


def __getattr__(name: str) -> Any:
    if name not in _FILES:
        raise AttributeError(f"module 'hf_daq' has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(f".{_FILES[name]}", __name__), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
