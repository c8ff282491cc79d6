"""What a forward keeps outside of its own variables: attributes of modules and of hooks, as the skips of some U-Nets, and random
numbers. Forwards that stand still in the middle would find there what others put."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn

_OF_MODULES = set(vars(nn.Module())) - {"_buffers"}
_MISSING = object()
_PLAIN = (Tensor, nn.Module, type, FunctionType, str, bytes, int, float, complex, type(None), torch.dtype, torch.device)
_CONTAINERS = (list, dict, set, deque)
_DEPTH = 4


class Remembered:
    """Places that a forward of the model writes to. `watch` is called in the middle of one, `places` are what it found."""

    def __init__(self, model: nn.Module) -> None:
        self._spaces = list(_spaces(model))
        self._own = {id(vars(module)) for module in model.modules() if _is_own(module)}
        self._start = [self._held(space) for space in self._spaces]
        self.places: dict[tuple[int, str], None] = {}

    def watch(self) -> None:
        """Note what is not as it was at the start."""
        for number, (space, start) in enumerate(zip(self._spaces, self._start, strict=True)):
            for name, value in self._held(space).items():
                if not _same(start.get(name, _MISSING), value):
                    self.places[number, name] = None
            for name in start.keys() - space.keys():
                self.places[number, name] = None

    def _held(self, space: dict[str, Any]) -> dict[str, Any]:
        """Of layers of this library no names with an underscore: they know what they keep there."""
        names = [name for name in space if name not in _OF_MODULES]
        if id(space) in self._own:
            names = [name for name in names if not name.startswith("_")]
        return {name: _taken(space[name]) for name in names}

    def save(self) -> State:
        values = {place: _taken(self._spaces[place[0]].get(place[1], _MISSING)) for place in self.places}
        return State(values, _random_states())

    def at_start(self) -> State:
        """As it was before the forward that was watched."""
        values = {(number, name): self._start[number].get(name, _MISSING) for number, name in self.places}
        return State(values, _random_states())

    def restore(self, state: State) -> None:
        for (number, name), value in state.values.items():
            if value is _MISSING:
                self._spaces[number].pop(name, None)
            else:
                self._spaces[number][name] = _given(value)
        torch.set_rng_state(state.random[0])
        if state.random[1]:
            torch.cuda.set_rng_state_all(state.random[1])


class State:
    """values: by place. random: of the generators of the CPU and of all GPUs."""

    def __init__(self, values: dict[tuple[int, str], Any], random: tuple[Tensor, list[Tensor]]) -> None:
        self.values, self.random = values, random


@contextmanager
def left_as_before(model: nn.Module) -> Iterator[None]:
    """A forward inside leaves nothing: what it writes to attributes, hooks and buffers is undone, and so are random numbers."""
    remembered, random = Remembered(model), _random_states()
    buffers = [buffer for buffer in model.buffers() if not buffer.is_inference()]
    kept = [(buffer, buffer._version, buffer.detach().clone()) for buffer in buffers]
    try:
        yield
    finally:
        remembered.watch()
        start = remembered.at_start()
        remembered.restore(State(start.values, random))
        with torch.no_grad():
            for buffer, version, values in kept:
                if buffer._version != version:
                    buffer.copy_(values)


def _random_states() -> tuple[Tensor, list[Tensor]]:
    on_gpus = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    return torch.get_rng_state(), torch.cuda.get_rng_state_all() if on_gpus else []


class _Contents:
    """A container, and what was in it."""

    def __init__(self, container: Any, depth: int) -> None:
        self.container = container
        pairs = container.items() if isinstance(container, dict) else enumerate(container)
        self.items = [(key, _taken(value, depth + 1)) for key, value in pairs]

    def put_back(self) -> Any:
        values = [(key, _given(value)) for key, value in self.items]
        self.container.clear()
        if isinstance(self.container, dict):
            self.container.update(values)
        elif isinstance(self.container, set):
            self.container.update(value for _, value in values)
        else:
            self.container.extend(value for _, value in values)
        return self.container


def _taken(value: Any, depth: int = 0) -> Any:
    """With what is in a container, and in those inside of it; a container may be inside of itself."""
    return _Contents(value, depth) if isinstance(value, _CONTAINERS) and depth < _DEPTH else value


def _given(value: Any) -> Any:
    return value.put_back() if isinstance(value, _Contents) else value


def _same(one: Any, other: Any) -> bool:
    if not isinstance(one, _Contents) or not isinstance(other, _Contents):
        return one is other
    return (
        one.container is other.container
        and len(one.items) == len(other.items)
        and all(a[0] is b[0] and _same(a[1], b[1]) for a, b in zip(one.items, other.items, strict=True))
    )


def _spaces(model: nn.Module) -> Iterator[dict[str, Any]]:
    """Dictionaries of attributes: of modules, of what hooks belong to, and of plain objects that these have."""
    seen: set[int] = set()

    def objects(found: Any, depth: int) -> Iterator[dict[str, Any]]:
        if isinstance(found, _PLAIN + _CONTAINERS) or id(found) in seen or _is_own(found) or depth == _DEPTH:
            return
        seen.add(id(found))
        space = getattr(found, "__dict__", None)
        if isinstance(space, dict):
            yield space
            for value in list(space.values()):
                yield from objects(value, depth + 1)

    for module in model.modules():
        space = vars(module)
        yield space
        if not _is_own(module):
            yield space["_buffers"]
            for name, value in list(space.items()):
                if name not in _OF_MODULES and "config" not in name:
                    yield from objects(value, 0)
        for hook in (*module._forward_pre_hooks.values(), *module._forward_hooks.values()):
            yield from _of_hook(hook, objects)


def _of_hook(hook: Any, objects: Callable[[Any, int], Iterator[dict[str, Any]]]) -> Iterator[dict[str, Any]]:
    if _is_own(hook):
        return
    yield from objects(getattr(hook, "__self__", None), 0)
    for cell in getattr(hook, "__closure__", None) or ():
        try:
            value = cell.cell_contents
        except ValueError:  # empty
            continue
        if isinstance(value, _CONTAINERS):
            yield {"": value}
        else:
            yield from objects(value, 0)


def _is_own(found: Any) -> bool:
    place = getattr(found, "__module__", None) or type(found).__module__
    return isinstance(place, str) and place.partition(".")[0] == "hf_daq"
