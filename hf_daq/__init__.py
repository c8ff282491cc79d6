"""Distance-aware Quantization (Kim, Lee, Ham, ICCV 2021) for timm and transformers models."""

from .apply import apply_daq, remove_daq
from .calibrate import calibrate
from .config import DaqConfig
from .errors import DaqError
from .matching import plan
from .training import param_groups

__version__ = "0.1.0"

__all__ = ["DaqConfig", "DaqError", "apply_daq", "calibrate", "param_groups", "plan", "remove_daq"]
