"""What this processor can do."""

import platform

import pytest
import torch

CUTS_OFF = platform.machine() in ("x86_64", "AMD64") and not torch.cpu._is_vnni_supported()
"""Whether oneDNN, ONNX Runtime and OpenVINO cut off large sums of 8-bit products here."""
needs_vnni = pytest.mark.skipif(
    CUTS_OFF, reason="this processor has no VNNI instructions: large sums of 8-bit products are cut off"
)
