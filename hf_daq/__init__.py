"""Distance-aware Quantization (Kim, Lee, Ham, ICCV 2021) for timm and transformers models.

hf_daq.apply_daq(model, bits=3)
with hf_daq.calibrate(model):
    model(images)
optimizer = torch.optim.SGD(hf_daq.param_groups(model, lr=0.01, quantizer_lr=1e-4))
hf_daq.save_pretrained(model, "out")  # packed=True: codes of a few bits
hf_daq.export_onnx(model, "model.onnx", images)
"""

from . import registration as registration
from .apply import apply_daq, remove_daq
from .calibrate import calibrate
from .checkpoint import from_pretrained, save_pretrained
from .config import DaqConfig
from .errors import DaqError
from .export_compressed import export_compressed_tensors
from .export_onnx import export_onnx
from .integers import integer_arithmetic
from .matching import plan
from .packing import pack, unpack
from .training import param_groups, trainer_optimizer
from .version import __version__

__all__ = [
    "DaqConfig",
    "DaqError",
    "__version__",
    "apply_daq",
    "calibrate",
    "export_compressed_tensors",
    "export_onnx",
    "from_pretrained",
    "integer_arithmetic",
    "pack",
    "param_groups",
    "plan",
    "remove_daq",
    "save_pretrained",
    "trainer_optimizer",
    "unpack",
]
