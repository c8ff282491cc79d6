"""Rows of a data set: of folders of images, text files, tables, and what datasets opens."""

from __future__ import annotations

import codecs
import csv
import itertools
import os
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from ..config import did_you_mean
from ..errors import DataError

_IMAGES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff")
_TABLES = {".parquet": "parquet", ".csv": "csv", ".tsv": "csv", ".json": "json", ".jsonl": "json"}
_SPLITS = "train", "training", "val", "valid", "validation", "test"
"""Names of folders around those of the classes."""


def named(data: Any) -> str:
    """What messages call it."""
    return str(data) if isinstance(data, str | Path) else type(data).__name__


class Table(dict[str, Sequence[Any]]):
    """Columns by name."""

    @property
    def column_names(self) -> list[str]:
        return list(self)


def rows_of(data: Any, subset: str | None, split: str | None, column: str | None = None) -> Any:
    """A table: names of its columns, and the columns by name. column: the name of one, if it is known."""
    if not isinstance(data, str | Path):
        if hasattr(data, "column_names") and hasattr(data, "features"):
            if not hasattr(data, "__len__"):
                raise DataError(
                    "the data set is read as a stream, and has no length: take some rows of it, datasets.Dataset.from_list(list("
                    "data.take(1000)))"
                )
            return data
        raise DataError(
            f"data is a {type(data).__name__}; a path, the name of a data set, or a datasets.Dataset is wanted"
        )
    path = Path(data)
    if path.is_dir():
        files = _images(path)
        if files:
            classes = _classes(path, files)
            return Table({"image": files} | ({} if classes is None else {"label": classes}))
    elif path.suffix.lower() == ".txt" and path.is_file():
        lines = _text(path).split("\n")
        return Table(text=[line for line in lines if line.strip()])
    return _opened_by_datasets(path, str(data), subset, split, column)


def _images(folder: Path) -> list[Path]:
    """All images below a folder, behind links too, each folder once."""
    found, seen = [], set()
    for place, folders, names in os.walk(folder, followlinks=True):
        real = os.path.realpath(place)
        if real in seen:
            folders.clear()  # a link that leads back
            continue
        seen.add(real)
        files = (Path(place) / name for name in names)
        found += [file for file in files if file.suffix.lower() in _IMAGES and file.is_file()]
    return sorted(found)


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")  # editors on Windows put a mark in front
    except UnicodeDecodeError as error:
        wide = path.read_bytes()[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
        raise DataError(
            f"{path} is no text in UTF-8 ({error.reason} at byte {error.start}); write it as such: "
            f"iconv -f {'utf-16' if wide else 'latin1'} -t utf-8"
        ) from None


def _classes(folder: Path, files: list[Path]) -> list[str] | None:
    """Class of each image: of labels.tsv, or the name of the folder it is below; inside of `train`, `test` and the like, where there
    are only such."""
    if (table := folder / "labels.tsv").is_file():
        lines = [line.split("\t") for line in _text(table).splitlines() if line.strip()]
        known = {line[0]: line[1].strip() for line in lines if len(line) > 1}
        names = [file.relative_to(folder).as_posix() for file in files]
        missing = [name for name in names if name not in known]
        if missing:
            raise DataError(f"{table} has no line for {len(missing)} of {len(names)} images, such as {missing[0]}")
        return [known[name] for name in names]
    folders = [file.relative_to(folder).parts[:-1] for file in files]
    place = int(all(len(parts) > 1 and parts[0].lower() in _SPLITS for parts in folders))
    return [parts[place] for parts in folders] if all(folders) else None


def _opened_by_datasets(path: Path, name: str, subset: str | None, split: str | None, column: str | None) -> Any:
    try:
        import datasets  # type: ignore[import-untyped]
    except ImportError:
        raise DataError(f"{name} needs the library datasets: pip install datasets") from None
    builder = _TABLES.get(path.suffix.lower())
    try:
        if path.is_file() and builder is None:
            raise DataError(f"{name} is no file of a kind that is read here: .txt, {', '.join(_TABLES)}")
        if path.is_file():
            return datasets.load_dataset(builder, data_files=str(path), split="train", **_csv_options(path, column))
        found = datasets.load_dataset(name, subset)
    except DataError:
        raise
    except StopIteration:
        raise DataError(f"{name} is empty") from None
    except (FileNotFoundError, ConnectionError, ValueError, datasets.exceptions.DatasetsError) as error:
        why = str(error.__cause__ or error).partition("\n")[0]
        raise DataError(
            f"{name} is no file or folder that is read here, and no data set that datasets opens: {why}"
        ) from None
    if split is None:
        split = "train" if "train" in found else next(iter(found))
    if split not in found:
        raise DataError(f"{name} has no split {split!r}{did_you_mean(split, list(found))}; it has {', '.join(found)}")
    return found[split]


def _csv_options(path: Path, column: str | None) -> dict[str, Any]:
    suffix = path.suffix.lower()
    if suffix not in (".csv", ".tsv"):
        return {}
    options: dict[str, Any] = {"delimiter": "\t", "quoting": csv.QUOTE_NONE} if suffix == ".tsv" else {"delimiter": ","}
    rows: list[list[str]] = []
    with (
        path.open(encoding="utf-8-sig", errors="replace", newline="") as file,
        suppress(csv.Error),
    ):  # a cell beyond its limits
        for row in itertools.islice(csv.reader(file, **options), 1000):
            rows += [row] if row else []
    for row in rows:
        if len(row) > len(rows[0]):  # the first cell would be taken for the number of the row
            raise DataError(
                f"{path} has a row of {len(row)} cells, and its first one has {len(rows[0])}: {row}; write a text with commas in quotes"
            )
    options |= {"keep_default_na": False, "na_values": [""]}  # "None" is a text
    if rows and len(rows[0]) == 2 and not _are_names(rows[0], rows[1:], column):
        options["column_names"] = ["text", "label"]
    return options


def _are_names(first: list[str], rows: list[list[str]], column: str | None) -> bool:
    """Whether the first row of a table of sentences and classes has the names of its columns."""
    if column in first:
        return True
    sentence, label = (cell.strip() for cell in first)
    classes = [row[1].strip() for row in rows if len(row) == 2]
    if _is_number(label) or label in classes:
        return False
    if sentence.isidentifier() and label.isidentifier():
        return True
    # "Review Text": the class of a row would be one of the others, which come again and again, or a number as they are.
    return bool(classes) and (all(map(_is_number, classes)) or len(set(classes)) < len(classes))


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def column_name(rows: Any, asked: str | None, usual: Sequence[str], kind: str) -> str:
    names = list(rows.column_names)
    if asked is not None:
        if asked not in names:
            raise DataError(f"the data has no column {asked!r}{did_you_mean(asked, names)}; it has {', '.join(names)}")
        return asked
    for name in usual:
        if name in names:
            return name
    raise DataError(
        f"the data has no column {' or '.join(usual)} with {kind}; name one of {', '.join(names)}: column=..."
    )
