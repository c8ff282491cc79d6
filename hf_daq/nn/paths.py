"""The ways in which a packed layer computes, and which of them an input takes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

from torch import Tensor

from . import codes, gpu, onednn


class Path(NamedTuple):
    """serves: whether this layer goes this way with this input. It is asked in every forward, so it answers at once; what it
    has to try first, it tries once (`trust.agrees`).
    forward: the output of a layer for an input that is not quantized yet."""

    serves: Callable[[Any, Tensor], bool]
    forward: Callable[[Any, Tensor], Tensor]


PATHS: dict[str, Path] = {
    "bfloat16 scales": Path(gpu.serves_int4, gpu.int4_forward),
    "integers": Path(onednn.serves, onednn.forward),
    "codes": Path(codes.serves, codes.forward),
    "unpacked": Path(lambda layer, x: True, lambda layer, x: layer.as_quantized(x)),
}
"""By name; the first that serves is taken, and the last always does. "unpacked" does what the quantized layer does, bit for bit."""


_exact = False


@contextmanager
def bit_for_bit() -> Iterator[None]:
    """Inside, packed layers give the outputs of the quantized layers they were, bit for bit, and take the time for it."""
    global _exact
    before, _exact = _exact, True
    try:
        yield
    finally:
        _exact = before


def path_of(layer: Any, x: Tensor) -> str:
    if not _exact:
        for name, path in PATHS.items():
            if path.serves(layer, x):
                return name
    return "unpacked"


def output(layer: Any, x: Tensor) -> Tensor:
    found = None if _exact else codes.at_once(layer, x)
    return PATHS[path_of(layer, x)].forward(layer, x) if found is None else found
