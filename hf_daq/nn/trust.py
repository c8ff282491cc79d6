"""A faster way to compute is used after it gave, once, what the plain one gives."""

from __future__ import annotations

import logging
from collections.abc import Callable, Hashable

import torch
from torch import Tensor

logger = logging.getLogger("hf_daq")
_agreed: dict[Hashable, bool] = {}


def agrees(
    kind: Hashable, found: Callable[[], Tensor], expected: Callable[[], Tensor], tolerance: float, what: str
) -> bool:
    """Whether both give the same on a sample: compared once for each `kind`. Where they differ, or `found` raises, one
    warning says so.

    Args:
        tolerance: largest difference, as a share of the largest expected value.
        what: name of the way that `found` goes, for the warning.
    """
    if kind not in _agreed:
        difference = _difference(found, expected())
        _agreed[kind] = difference <= tolerance
        if not _agreed[kind]:
            logger.warning(
                f"{what} gives other values on this machine (error {difference:.1e}): the plain way is taken, slower and "
                f"right [{kind}]"
            )
    return _agreed[kind]


def _difference(found: Callable[[], Tensor], expected: Tensor) -> float:
    try:
        values = found()
    except Exception:  # whatever a library of this machine does not know how to do
        return float("inf")
    difference = (values.double() - expected.double()).abs().max() / expected.double().abs().max().clamp_min(1e-30)
    return float("inf") if torch.isnan(difference) else difference.item()
