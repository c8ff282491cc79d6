"""How results become text: tables, plain text, JSON, a bar of progress. rich is imported where it is used."""

from __future__ import annotations

import dataclasses
import io
import math
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console, RenderableType
    from rich.measure import Measurement
    from rich.table import Table
    from rich.text import Text


COLUMNS = 80  # of a text whose reader is not known
SMOOTH_NOTE = "*: channels of the input are divided by powers of two before it is rounded"
"""Below tables whose bits are `marked`."""


def printable(text: str) -> str:
    """Without control characters, escape sequences and signs that turn the direction of text; lines stay lines."""
    return "".join(sign for sign in text if sign.isprintable() or sign == "\n")


def plain(value: Any) -> Any:
    """Plain JSON types; "inf", "-inf" and "nan" are texts, since JSON has no such numbers."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, Path) or (isinstance(value, float) and not math.isfinite(value)):
        return str(value)
    return value


def cell(text: str, style: str = "") -> Text:
    """Text of one line, in which nothing is markup: `printable`, with a space for a new line."""
    from rich.text import Text

    return Text(printable(text).replace("\n", " "), style=style)


class Name:
    """The name of a layer, folded at its points."""

    def __init__(self, text: Text) -> None:
        self.text = text

    def __rich_console__(self, console: Console, options: Any) -> Iterator[Any]:
        from rich.cells import cell_len
        from rich.text import Text

        lines = [""]
        for part in self._parts():
            if lines[-1] and cell_len(lines[-1] + part) > options.max_width:
                lines.append("")
            lines[-1] += part
        yield Text("\n".join(lines), style=self.text.style, overflow="fold")

    def __rich_measure__(self, console: Console, options: Any) -> Measurement:
        from rich.cells import cell_len
        from rich.measure import Measurement

        return Measurement(max(map(cell_len, self._parts()), default=1), max(1, cell_len(self.text.plain)))

    def _parts(self) -> list[str]:
        return re.findall(r"[^.]*\.?", self.text.plain.replace("\n", " "))


def as_text(renderable: RenderableType, width: int = 0) -> str:
    """Plain text without color, as wide as the content, or `width` wide with sentences and names folded; wider if words
    and figures are."""
    from rich.console import Console

    console = Console(file=io.StringIO(), color_system=None, force_terminal=False, legacy_windows=False, width=10_000)
    measured = console.measure(renderable)
    console.width = max(width, measured.minimum) if width else measured.maximum
    with console.capture() as capture:
        console.print(renderable)
    return "\n".join(line.rstrip() for line in capture.get().splitlines()).strip("\n")


def plain_table(*names: str) -> Table:
    """A table without lines; columns of numbers are aligned on the right."""
    from rich.table import Table

    table = Table(box=None, header_style="bold", pad_edge=False)
    for name in names:
        table.add_column(name, justify="right" if name.endswith("MB") or name in ("number", "weights") else "left")
    return table


def add_row(table: Table, style: str, *cells: str) -> None:
    """Add a row of plain text, in which nothing is markup."""
    table.add_row(*map(cell, cells), style=style)


def shape_text(shape: tuple[int, ...]) -> str:
    """A shape such as "64x3x3x3"."""
    return "x".join(map(str, shape))


def bits_text(bits: int | None) -> str:
    """A number of bits, or "float"."""
    return "float" if bits is None else str(bits)


def marked(bits: str, smooth: bool) -> str:
    """Bits of a layer, with a star where channels of its input are divided."""
    return bits + "*" * smooth


def width_text(weight_bits: int, activation_bits: int | None) -> str:
    """ "W4A8"; "W4" where inputs stay in float."""
    return f"W{weight_bits}" + ("" if activation_bits is None else f"A{activation_bits}")


@contextmanager
def progress_bar(shown: bool | None, total: int) -> Iterator[Callable[[str], None]]:
    """A function that is told each step as it begins. shown: None: if the standard error is a terminal."""
    from rich.console import Console
    from rich.progress import Progress

    console = Console(stderr=True)
    visible = console.is_terminal if shown is None else shown
    with Progress(console=console, transient=True, disable=not visible) as bar:
        task = bar.add_task("", total=total)
        done = iter(range(total + 1))
        yield lambda name: bar.update(task, completed=next(done), description=name)
