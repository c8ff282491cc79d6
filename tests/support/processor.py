"""What this processor can do."""

import pytest

from hf_daq.nn.integers import adds_in_16_bits

CUTS_OFF = adds_in_16_bits()
needs_vnni = pytest.mark.skipif(
    CUTS_OFF, reason="this processor has no VNNI instructions: large sums of 8-bit products are cut off"
)
