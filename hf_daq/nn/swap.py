"""A layer gets another class, also where its methods were taken as values: hooks of other libraries put a `forward` on
the instance that calls the one they found there."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from types import FunctionType, MethodType
from typing import Any

from torch import nn

_Place = tuple[Any, Callable[[Any], None]]


def change_class(layer: nn.Module, new_class: type) -> None:
    """Give the layer this class. Methods of its old class that the instance holds, in attributes or inside of functions
    there, become those of the new one."""
    old_class = type(layer)
    layer.__class__ = new_class
    for value, put in _methods(layer, old_class):
        put(MethodType(getattr(new_class, value.__name__), layer))


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Inside, Ctrl-C waits for the end: a model that is being changed is never left between two kinds."""
    handler = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or not callable(handler):
        yield
        return
    pressed: list[tuple[Any, ...]] = []
    signal.signal(signal.SIGINT, lambda *args: pressed.append(args))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)
        if pressed:
            handler(*pressed[0])


def hides_forward(layer: nn.Module) -> bool:
    """Whether the layer has a `forward` of its own that nowhere calls the one of its class: another class would change
    nothing."""
    found = (value.__name__ for value, _ in _methods(layer, type(layer)))
    return "forward" in vars(layer) and "forward" not in found


def _methods(layer: nn.Module, of_class: type) -> list[_Place]:
    """Methods of the class, bound to the layer, that its attributes hold, each with the function that replaces it."""
    found, seen, waiting = [], set(), list(_attributes(layer))
    while waiting:
        value, put = waiting.pop()
        if isinstance(value, MethodType) and value.__self__ is layer:
            if getattr(of_class, value.__name__, None) is value.__func__:
                found.append((value, put))
        elif id(value) not in seen:
            seen.add(id(value))
            waiting += _inside(value)
    return found


def _inside(value: Any) -> Iterator[_Place]:
    """What a callable value holds: a function in its closure and its defaults, a partial, a bound method, any other in its
    attributes."""
    if isinstance(value, FunctionType):
        for cell in value.__closure__ or ():
            if cell != type(cell)():  # an empty one has no contents
                yield cell.cell_contents, partial(setattr, cell, "cell_contents")
        for index, default in enumerate(value.__defaults__ or ()):
            yield default, partial(_put_default, value, index)
        for key, default in (value.__kwdefaults__ or {}).items():
            yield default, partial((value.__kwdefaults__ or {}).__setitem__, key)
    elif isinstance(value, partial):
        for index, part in enumerate((value.func, *value.args)):
            yield part, partial(_put_argument, value, index)
        for key, part in value.keywords.items():
            yield part, partial(value.keywords.__setitem__, key)
    elif isinstance(value, MethodType):
        yield from _inside(value.__func__)
        value = value.__self__
    yield from _attributes(value)


def _attributes(value: Any) -> Iterator[_Place]:
    for name, part in list(getattr(value, "__dict__", {}).items()):
        if callable(part) and not isinstance(part, nn.Module | type):
            yield part, partial(vars(value).__setitem__, name)


def _put_default(function: FunctionType, index: int, value: Any) -> None:
    defaults = list(function.__defaults__ or ())
    defaults[index] = value
    function.__defaults__ = tuple(defaults)


def _put_argument(holder: partial[Any], index: int, value: Any) -> None:
    parts = [holder.func, *holder.args]
    parts[index] = value
    state: Any = (parts[0], tuple(parts[1:]), holder.keywords, vars(holder))
    holder.__setstate__(state)  # type: ignore[attr-defined]
