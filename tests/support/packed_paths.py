"""The fast ways of packed layers, held against the exact one."""

from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor, nn

from hf_daq.nn.packed import packed_layers
from hf_daq.nn.paths import bit_for_bit

_CLOSE = 1e-5


def different_outputs(model: nn.Module, forward: Callable[[], Any]) -> Iterator[str]:
    """What layers of a packed model, which gets its inputs by `forward`, do not compute as they do bit for bit."""
    errors: dict[str, float] = {}

    def compare(layer: Any, args: tuple[Any, ...], named: dict[str, Any], output: Tensor) -> None:
        with bit_for_bit():
            want = layer.forward(*args, **named)
        error = float((output - want).norm() / want.norm().clamp_min(1e-9))
        errors[layer.daq_name] = max(error, errors.get(layer.daq_name, 0.0))

    hooks = [layer.register_forward_hook(compare, with_kwargs=True) for layer in packed_layers(model).values()]
    try:
        forward()
    finally:
        for hook in hooks:
            hook.remove()
    yield from (f"{name}: packed, with an error of {error:.1g}" for name, error in errors.items() if not error < _CLOSE)
