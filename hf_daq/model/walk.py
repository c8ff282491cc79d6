"""A forward that can stand still in the middle, so that a layer changes between what comes before it and what comes after; and two
of them, in the quantized network and in the float one."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import copy_context
from typing import Any

import torch
from torch import Tensor, nn

from ..nn.experts import Routing
from .remembered import Remembered
from .sensitivity import Weights

Rows = Iterator[tuple[int, Tensor, Tensor, Tensor | None]]
"""A half, 0 or 1, rows of inputs in the quantized and in the float network, and how much each position of the output counts, shape
(examples, positions); None where all count alike."""


class _Ended(BaseException):
    """Leaves a forward that nobody needs any more."""


class Walk(threading.Thread):
    """A forward in a thread of its own, which runs only while `advance` waits for it.

    Where it stands: layer, None before the start and after the end; x, the input of that layer; kept, which of its positions
    are no padding (of experts: which tokens), None for all; routing, of experts.
    """

    def __init__(self, forward: Callable[[], Any], in_float: bool, remembered: Remembered | None = None) -> None:
        super().__init__(daemon=True)
        self.in_float = in_float
        self._remembered = remembered
        self._state = None if remembered is None else remembered.at_start()
        self.layer: nn.Module | None = None
        self.x: Tensor | None = None
        self.kept: Tensor | None = None
        self.routing: Routing | None = None
        self.done = False
        self._forward, self._context = forward, copy_context()
        self._autocast = {
            kind: torch.get_autocast_dtype(kind) for kind in {"cpu", _accelerator()} if torch.is_autocast_enabled(kind)
        }
        self._go, self._back = threading.Semaphore(0), threading.Semaphore(0)
        self._error: BaseException | None = None
        self._ended = False

    def run(self) -> None:
        try:
            self._context.run(self._work)
        except _Ended:
            pass
        except BaseException as error:
            self._error = error
        finally:
            self.layer, self.x, self.kept, self.routing, self.done = None, None, None, None, True
            del self._forward
            self._back.release()

    def _work(self) -> None:
        with torch.no_grad():  # gradients and autocast are set for each thread
            torch.set_autocast_cache_enabled(False)  # layers change inside
            for kind, dtype in self._autocast.items():
                torch.set_autocast_enabled(kind, True)
                torch.set_autocast_dtype(kind, dtype)
            self._forward()

    def advance(self) -> None:
        """Go on to the next stop, or to the end."""
        with self._own_state():
            if self.ident is None:
                self.start()
            else:
                self._go.release()
            self._back.acquire()
        if self._error is not None:
            raise self._error

    @contextmanager
    def _own_state(self) -> Iterator[None]:
        """Inside, modules remember what they did where this forward stood."""
        if self._remembered is None or self._state is None:
            yield
            return
        outside = self._remembered.save()
        self._remembered.restore(self._state)
        try:
            yield
        finally:
            self._state = None if self.done else self._remembered.save()
            self._remembered.restore(outside)

    def stop(self, layer: nn.Module, x: Tensor, kept: Tensor | None) -> None:
        """Stand still here, in the thread of the walk, until `advance`."""
        self.layer, self.x, self.kept = layer, x, kept
        self.routing = getattr(layer, "routing", None)
        self._back.release()
        self._go.acquire()
        self.layer = self.x = self.kept = self.routing = None
        if self._ended:
            raise _Ended

    def end(self) -> None:
        """Leave the forward where it stands."""
        self._ended = True
        if self.is_alive():
            with self._own_state():
                self._go.release()
                self.join()


def _accelerator() -> str:
    found = torch.accelerator.current_accelerator()
    return "cpu" if found is None else found.type


class Chunk:
    """A batch on its way through the quantized network and through the float one. weights: how much positions count."""

    def __init__(
        self, forward: Callable[[], Any], remembered: Remembered | None = None, weights: Weights | None = None
    ) -> None:
        self.weights = weights or {}
        self.quantized, self.in_float = (Walk(forward, in_float, remembered) for in_float in (False, True))
        self.walks = self.quantized, self.in_float

    def advance(self, todo: Mapping[nn.Module, int]) -> None:
        """Up to the next layer that is not done."""
        for walk in self.walks:
            if not self.stands(walk, todo):
                walk.advance()

    def waits(self, todo: Mapping[nn.Module, int]) -> bool:
        return all(self.stands(walk, todo) for walk in self.walks)

    @staticmethod
    def stands(walk: Walk, todo: Mapping[nn.Module, int]) -> bool:
        return walk.done or walk.layer in todo

    @property
    def size(self) -> int:
        return sum(walk.x.nbytes for walk in self.walks if walk.x is not None)

    def inputs(self, odd: int, reader: nn.Module | None = None) -> Rows:
        """Which half, and the inputs in the quantized and in the float network of the layer where it stands, for it or for another one
        that reads the same: the first and the last examples, as neighbours may be of one image. Where the float network is elsewhere, in
        a mixture of experts, the inputs of the quantized one stand in."""
        x, kept, f = self.quantized.x, self.quantized.kept, self.in_float.x
        assert x is not None
        if f is None or self.in_float.layer is not self.quantized.layer or f.shape != x.shape:
            f = x
        weights = self.weights.get(reader or self.quantized.layer)  # type: ignore[arg-type]
        middle = (len(x) + odd) // 2
        for half, part in enumerate((slice(0, middle), slice(middle, None))):
            mask = slice(None) if kept is None else kept[part]
            q, exact = x[part][mask], f[part][mask]
            if q.numel() > 0:
                yield half, q, exact, None if weights is None else weights[part]

    def of_expert(self, expert: int) -> Callable[[int], Rows]:
        """As `inputs`, of the tokens that go to one expert. Where the float network sends one elsewhere, the input in the
        quantized network stands in."""

        def inputs(odd: int) -> Rows:
            x, routing, kept = self.quantized.x, self.quantized.routing, self.quantized.kept
            assert x is not None
            assert routing is not None
            pairs = routing.pairs_of(expert)
            tokens = routing.tokens[pairs]
            q = x[tokens] if routing.by_token else x[pairs]
            exact = self._in_float(expert, tokens, q)
            later = tokens >= (routing.token_count + odd) // 2
            there = torch.ones_like(later) if kept is None else kept[tokens]
            for half, part in enumerate((there & ~later, there & later)):
                if bool(part.any()):
                    yield half, q[part], exact[part], None

        return inputs

    def _in_float(self, expert: int, tokens: Tensor, stand_in: Tensor) -> Tensor:
        """The inputs of one expert in the float network, for these tokens, which are sorted."""
        f, routing = self.in_float.x, self.in_float.routing
        if f is None or routing is None or self.in_float.layer is not self.quantized.layer:
            return stand_in
        if routing.by_token:
            return f[tokens]
        own = routing.pairs_of(expert)
        place = torch.searchsorted(routing.tokens[own], tokens)
        here = torch.isin(tokens, routing.tokens[own])
        found = stand_in.clone()
        found[here] = f[own][place[here]]
        return found
