"""What the command line prints: results on stdout, all else on stderr, and nothing of a file that a terminal would obey."""

from __future__ import annotations

import json
import logging
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from io import StringIO
from typing import Any

from rich.console import Console, Group
from rich.segment import Segment
from rich.table import Table
from rich.text import Text

from ..text import Name, plain, printable

_WIDEST = 100_000  # columns


class _Printable:
    """A renderable whose text is `printable`."""

    def __init__(self, renderable: Any) -> None:
        self.renderable = renderable

    def __rich_console__(self, console: Console, options: Any) -> Iterator[Segment]:
        for segment in console.render(self.renderable, options):
            yield segment if segment.control else segment._replace(text=printable(segment.text))


def show(renderable: Any) -> None:
    """Print to stdout. A terminal gets long names and reasons folded, and figures whole; else all is in full width, without
    color."""
    console = Console(highlight=False)
    if console.is_terminal:
        columns = console.width
        for part in _parts(renderable):
            console.width = _width(part, columns)
            console.print(_Printable(part))
        return
    unlimited = Console(file=StringIO(), width=_WIDEST, color_system=None, highlight=False, legacy_windows=False)
    for part in _parts(renderable):
        width = max(1, unlimited.measure(part).maximum)
        with unlimited.capture() as captured:
            unlimited.print(_Printable(part), width=width)
        print("\n".join(line.rstrip() for line in captured.get().splitlines()))


def _parts(renderable: Any) -> Iterator[Any]:
    if hasattr(renderable, "__rich__"):
        yield from _parts(renderable.__rich__())
    elif isinstance(renderable, Group):
        for part in renderable.renderables:
            yield from _parts(part)
    else:
        yield _folding(renderable) if isinstance(renderable, Table) else renderable


def _folding(table: Table) -> Table:
    """Names fold at their points, sentences between words, and nothing else."""
    names, *others = table.columns
    names._cells[:] = [Name(cell) if isinstance(cell, Text) else cell for cell in names.cells]
    for column in others:
        column.overflow = "fold"
        column.no_wrap = not any(" " in str(cell) for cell in column.cells)
    return table


def _width(part: Any, columns: int) -> int:
    """The width to print with on a terminal of so many columns. A table gets more if its figures would be cut."""
    wanted = Console(width=_WIDEST).measure(part)
    return wanted.maximum if isinstance(part, Table) and wanted.minimum > columns else columns


def show_json(values: Any) -> None:
    """Print one JSON object to stdout."""
    print(json.dumps(plain(values), indent=2, allow_nan=False))


def note(text: str) -> None:
    """A message on stderr."""
    print(printable(text), file=sys.stderr)


def show_error(error: BaseException, debug: bool) -> None:
    """The message of an error on stderr, with `debug` after its traceback."""
    if debug:
        note("".join(traceback.format_exception(error)))
    note(f"error: {error}")


class _Notes(logging.Handler):
    """Warnings of the library as messages."""

    def emit(self, record: logging.LogRecord) -> None:
        note(f"{record.levelname.lower()}: {record.getMessage()}")


def show_warnings() -> None:
    """From now on warnings of the library are printed to stderr."""
    logger = logging.getLogger("hf_daq")
    if not any(isinstance(handler, _Notes) for handler in logger.handlers):
        logger.addHandler(_Notes())


@contextmanager
def working(text: str) -> Iterator[None]:
    """While this takes its time: a spinner on stderr if that is a terminal. What libraries print goes to stderr."""
    console = Console(stderr=True, highlight=False)
    with redirect_stdout(sys.stderr):
        if not console.is_terminal:
            yield
            return
        with console.status(printable(text).replace("[", r"\[")):
            yield
