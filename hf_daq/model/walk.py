"""A forward that can stand still in the middle, so that a layer changes between what comes before it and what comes after."""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextvars import copy_context
from typing import Any

import torch
from torch import Tensor, nn


class _Ended(BaseException):
    """Leaves a forward that nobody needs any more."""


class Walk(threading.Thread):
    """A forward in a thread of its own, which runs only while `advance` waits for it.

    Where it stands: layer, None before the start and after the end; x, the input of that layer; kept, which of its positions
    are no padding, None for all.
    """

    def __init__(self, forward: Callable[[], Any], in_float: bool) -> None:
        super().__init__(daemon=True)
        self.in_float = in_float
        self.layer: nn.Module | None = None
        self.x: Tensor | None = None
        self.kept: Tensor | None = None
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
            self.layer, self.x, self.kept, self.done = None, None, None, True
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
        if self.ident is None:
            self.start()
        else:
            self._go.release()
        self._back.acquire()
        if self._error is not None:
            raise self._error

    def stop(self, layer: nn.Module, x: Tensor, kept: Tensor | None) -> None:
        """Stand still here, in the thread of the walk, until `advance`."""
        self.layer, self.x, self.kept = layer, x, kept
        self._back.release()
        self._go.acquire()
        self.layer = self.x = self.kept = None
        if self._ended:
            raise _Ended

    def end(self) -> None:
        """Leave the forward where it stands."""
        self._ended = True
        if self.is_alive():
            self._go.release()
            self.join()


def _accelerator() -> str:
    found = torch.accelerator.current_accelerator()
    return "cpu" if found is None else found.type
