"""Rows of a data set as inputs of a model, with the preprocessing that the model was trained with.

Images go through timm's transform or the image processor of transformers, sentences and text through the tokenizer.
"""

from __future__ import annotations

import io
import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import timm.data
import torch
from torch import Tensor, nn

from ..config import did_you_mean
from ..errors import DataError, ModelError
from ..model.roles import is_transformers_model
from .timm import is_timm_model

logger = logging.getLogger("hf_daq")
_IMAGES = (".jpg", ".jpeg", ".png", ".webp", ".bmp")
_TABLES = {".parquet": "parquet", ".csv": "csv", ".tsv": "csv", ".json": "json", ".jsonl": "json"}
_IMAGE_COLUMNS, _TEXT_COLUMNS, _LABEL_COLUMNS = ("image", "img"), ("text", "sentence"), ("label", "labels", "class")
_SPLITS = "train", "training", "val", "valid", "validation", "test"
"""Names of folders around those of the classes."""
_BATCH = {"images": 32, "sentences": 32, "text": 4}
_SENTENCE, _BLOCK = 128, 512  # tokens


@dataclass(frozen=True)
class Examples:
    """Inputs of a model.

    kind: "images", "sentences", each padded to the longest of its batch, or "text", blocks of tokens of one length.
    batches: tensors for a timm model, mappings for one of transformers.
    labels: classes, shape (examples,), in the order of the batches; None where there are none that the model knows.
    shown: the files or images, the sentences, or nothing: what a person would look at.
    processor: the tokenizer or image processor of transformers.
    """

    kind: str
    batches: list[Any]
    labels: Tensor | None = None
    shown: list[Any] = field(default_factory=list)
    processor: Any = None

    def __len__(self) -> int:
        return sum(len(_first(batch)) for batch in self.batches)


def read_examples(
    model: nn.Module,
    data: Any,
    counts: Sequence[int],
    *,
    processor: Any = None,
    length: int | None = None,
    column: str | None = None,
    subset: str | None = None,
    split: str | None = None,
    seed: int = 0,
) -> list[Examples]:
    """Parts of a data set that share no row, as inputs of the model. Where there are fewer rows, every part gets less.

    Args:
        model: of timm, or of transformers: an image, sentence or language model.
        data: a folder of images, with their classes as subfolders or in `labels.tsv` (file, tab, class); a text file; a
            Parquet, CSV, TSV or JSON Lines file, a folder of them, or a data set of the Hub; or a `datasets.Dataset`.
        counts: rows of each part; blocks of tokens for language models.
        processor: tokenizer or image processor; None: the one beside the model's weights.
        length: tokens of a block, by default 512, or at most of a sentence, by default 128; less where the model takes less.
        column: of the images or texts. subset, split: of a data set of the Hub.

    Raises:
        DataError: not found, not of this kind, or fewer than two rows. ModelError: a model that takes something else.
    """
    kind = _kind(model)
    rows = _rows(data, subset, split)
    usual = _IMAGE_COLUMNS if kind == "images" else _TEXT_COLUMNS
    values = rows[_column_name(rows, column, usual, kind)]
    if kind == "text":
        return _blocks(model, values, counts, processor, length)
    if len(values) < 2:
        raise DataError(f"{_named(data)} has {len(values)} rows; two are needed at least, some hundred are good")
    order = torch.randperm(len(values), generator=torch.Generator().manual_seed(seed)).tolist()
    labels = _labels(model, rows)
    if is_timm_model(model):
        if processor is not None:
            raise DataError(
                "a model of timm has no processor: its pretrained_cfg says how images are prepared; leave out processor"
            )
    else:
        processor = processor_of(model, processor, "AutoImageProcessor" if kind == "images" else "AutoTokenizer")
    if kind == "images":
        prepare = _image_preparation(model, processor)
    else:
        prepare = _sentence_preparation(model, processor, length)
    parts, start = [], 0
    for count in shares(counts, len(values)):
        chosen = order[start : start + count]
        shown = [values[index] for index in chosen]
        size = _BATCH[kind]
        batches = [prepare(shown[at : at + size]) for at in range(0, count, size)]
        known = None if labels is None else torch.tensor([labels[index] for index in chosen])
        parts.append(Examples(kind, batches, known, shown, processor))
        start += count
    return parts


def shares(counts: Sequence[int], rows: int) -> list[int]:
    """The counts, or as many in proportion as there are rows, at least one of each."""
    total = sum(counts)
    return list(counts) if total <= rows else [max(1, rows * count // total) for count in counts]


def _first(batch: Any) -> Tensor:
    found: Tensor = next(iter(batch.values())) if isinstance(batch, dict) else batch
    return found


def _named(data: Any) -> str:
    return str(data) if isinstance(data, str | Path) else type(data).__name__


# ------------------------------------------------------------------------------------------------------- the model


def _kind(model: Any) -> str:
    """What a model takes: "images", "sentences" or "text"."""
    if is_timm_model(model):
        return "images"
    if not is_transformers_model(model):
        raise ModelError(
            f"how inputs of a {type(model).__name__} are made is known to its author alone: give batches of them to "
            "hf_daq.calibrate and hf_daq.reconstruct in Python"
        )
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as DECODERS

    if model.main_input_name == "pixel_values":
        return "images"
    if model.main_input_name != "input_ids" or getattr(model.config, "is_encoder_decoder", False):
        raise ModelError(
            f"inputs of {type(model).__name__} are not images, sentences or text alone: give batches of them to "
            "hf_daq.calibrate and hf_daq.reconstruct in Python"
        )
    return "text" if type(model).__name__ in DECODERS.values() else "sentences"


def processor_of(model: Any, given: Any, of_class: str) -> Any:
    """The tokenizer or image processor: the one given, or the one beside the weights. No code of a repository is run."""
    if given is not None and not isinstance(given, str | Path):
        return given
    import transformers

    source = given or model.name_or_path
    try:
        return getattr(transformers, of_class).from_pretrained(source, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        what = "tokenizer" if of_class == "AutoTokenizer" else "image processor"
        raise DataError(
            f"there is no {what} of the model at {str(source)!r} ({str(error).partition(chr(10))[0]}); save one there, or "
            "name its folder or repository: processor=..."
        ) from None


def _image_preparation(model: Any, processor: Any) -> Callable[[list[Any]], Any]:
    if is_timm_model(model):
        settings = timm.data.resolve_data_config({}, model=model)
        transform = timm.data.create_transform(**settings, is_training=False)
        mode = "L" if settings["input_size"][0] == 1 else "RGB"
        return lambda images: torch.stack([transform(_image(image, mode)) for image in images])
    return lambda images: dict(processor([_image(image, "RGB") for image in images], return_tensors="pt"))


def _sentence_preparation(model: Any, tokenizer: Any, length: int | None) -> Callable[[list[str]], Any]:
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    longest = min(length or _SENTENCE, _room(model), tokenizer.model_max_length)
    options = {"padding": True, "truncation": True, "max_length": longest, "return_tensors": "pt"}
    return lambda sentences: dict(tokenizer(_texts(sentences), **options))


def _texts(values: Sequence[Any]) -> list[str]:
    for value in values:
        if not isinstance(value, str):
            raise DataError(
                f"the data has {value!r} where a text is wanted: drop such rows, or name another column, column=..."
            )
    return list(values)


def _room(model: Any) -> int:
    """Tokens that a model of transformers takes."""
    found = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return found if isinstance(found, int) and found > 0 else _BLOCK


def _image(image: Any, mode: str) -> Any:
    """A file, what is in one, or an image, in the mode "RGB" or "L"."""
    from PIL import Image

    if isinstance(image, dict):  # as datasets writes it to Parquet
        image = image.get("bytes") or image.get("path")
    if not isinstance(image, str | Path | bytes | Image.Image):
        raise DataError(
            f"the data has {image!r} where an image is wanted: drop such rows, or name another column, column=..."
        )
    named = f"{len(image)} bytes of the data are" if isinstance(image, bytes) else f"{image} is"
    try:
        if isinstance(image, Image.Image):
            return _converted(image, mode)
        with Image.open(io.BytesIO(image) if isinstance(image, bytes) else image) as opened:
            return _converted(opened, mode)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise DataError(f"{named} no image that can be read: {error}") from None


def _converted(image: Any, mode: str) -> Any:
    """Pixels of 16 bits get 8, where Pillow would cut them off at 255."""
    from PIL import Image

    if image.mode.startswith("I"):
        pixels = np.asarray(image)
        image = Image.fromarray((pixels >> 8 if pixels.max() > 255 else pixels).astype(np.uint8))
    return image.convert(mode)


# ------------------------------------------------------------------------------------------------------- the rows


class _Table(dict[str, Sequence[Any]]):
    """Columns by name."""

    @property
    def column_names(self) -> list[str]:
        return list(self)


def _rows(data: Any, subset: str | None, split: str | None) -> Any:
    """A table: names of its columns, and the columns by name."""
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
            return _Table({"image": files} | ({} if classes is None else {"label": classes}))
    elif path.suffix.lower() == ".txt" and path.is_file():
        lines = _text(path).splitlines()
        return _Table(text=[line for line in lines if line.strip()])
    return _opened_by_datasets(path, str(data), subset, split)


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
        raise DataError(
            f"{path} is no text in UTF-8 ({error.reason} at byte {error.start}); write it as such: iconv -f latin1 -t utf-8"
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


def _opened_by_datasets(path: Path, name: str, subset: str | None, split: str | None) -> Any:
    try:
        import datasets  # type: ignore[import-untyped]
    except ImportError:
        raise DataError(f"{name} needs the library datasets: pip install datasets") from None
    builder = _TABLES.get(path.suffix.lower())
    try:
        if path.is_file() and builder is None:
            raise DataError(f"{name} is no file of a kind that is read here: .txt, {', '.join(_TABLES)}")
        if path.is_file():
            return datasets.load_dataset(builder, data_files=str(path), split="train", **_csv_options(path))
        found = datasets.load_dataset(name, subset)
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


def _csv_options(path: Path) -> dict[str, Any]:
    """A first line with a sentence or a number in it is a row, not the names of columns."""
    suffix = path.suffix.lower()
    if suffix not in (".csv", ".tsv"):
        return {}
    delimiter = "\t" if suffix == ".tsv" else ","
    with path.open(encoding="utf-8-sig") as file:
        first = [cell.strip() for cell in file.readline().split(delimiter)]
    options: dict[str, Any] = {"delimiter": delimiter} | ({"quoting": 3} if suffix == ".tsv" else {})
    if len(first) == 2 and not all(cell.isidentifier() for cell in first):
        options["column_names"] = ["text", "label"]
    return options


def _column_name(rows: Any, asked: str | None, usual: Sequence[str], kind: str) -> str:
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


# ------------------------------------------------------------------------------------------------------- classes


def _labels(model: Any, rows: Any) -> list[int] | None:
    """The class of every row as the model numbers them, or None."""
    name = next((name for name in _LABEL_COLUMNS if name in rows.column_names), None)
    classes = _class_count(model)
    if name is None or classes is None:
        return None
    feature = getattr(rows, "features", {}).get(name)
    given = list(rows[name])
    names = getattr(feature, "names", None)
    if missing := sum(map(_is_missing, given)):
        logger.warning("%d of %d rows have no class: accuracy is not measured", missing, len(given))
        return None
    if names is not None:
        given = [names[index] for index in given]
    given = [int(value) if isinstance(value, float) and value.is_integer() else value for value in given]
    numbers = _numbered(given, _class_names(model), names, classes)
    if numbers is None:
        logger.warning(
            "classes of the data, such as %r, are not those of the model, which has %d: accuracy is not measured",
            given[0],
            classes,
        )
    return numbers


def _numbered(given: list[Any], known: dict[str, int], names: list[str] | None, classes: int) -> list[int] | None:
    if all(str(value) in known for value in given):
        return [known[str(value)] for value in given]
    if all(str(value).isdecimal() and int(value) < classes for value in given):
        return [int(value) for value in given]
    order = {str(name): index for index, name in enumerate(names or _in_order(given))}
    return [order[str(value)] for value in given] if len(order) == classes else None


def _is_missing(value: Any) -> bool:
    """Of columns with gaps, and of -1, as test splits without classes have."""
    return value is None or value == "" or value != value or (isinstance(value, int | float) and value < 0)


def _in_order(given: list[Any]) -> list[Any]:
    """Each once: numbers by size, else by their texts, as torchvision numbers folders."""
    values = list({str(value): value for value in given}.values())
    return sorted(values, key=None if all(isinstance(value, int | float) for value in values) else str)


def _class_count(model: Any) -> int | None:
    """Classes that a model tells apart, None where it is no classifier."""
    if is_timm_model(model):
        return int(model.num_classes) or None
    return model.config.num_labels if type(model).__name__.endswith("Classification") else None


def _class_names(model: Any) -> dict[str, int]:
    """Name of a class -> its number."""
    if not is_timm_model(model):
        return {str(name): int(number) for name, number in model.config.label2id.items()}
    names = model.pretrained_cfg.get("label_names")
    if names is None and (subset := timm.data.infer_imagenet_subset(model)):
        names = timm.data.ImageNetInfo(subset).label_names()
    return {name: number for number, name in enumerate(names or ())}


# ------------------------------------------------------------------------------------------------------- text


def _blocks(model: Any, texts: Any, counts: Sequence[int], processor: Any, length: int | None) -> list[Examples]:
    """Consecutive blocks of tokens, the parts one after the other."""
    tokenizer = processor_of(model, processor, "AutoTokenizer")
    length = min(length or _BLOCK, _room(model))
    tokens: list[int] = []
    for start in range(0, len(texts), 1000):
        if len(tokens) >= sum(counts) * length:
            break
        tokens += tokenizer("\n".join(_texts(texts[start : start + 1000])), verbose=False)["input_ids"]
    if len(tokens) < 2 * length:
        raise DataError(
            f"the data has {len(tokens)} tokens; two blocks of {length} are needed at least: length=... takes less"
        )
    blocks = torch.tensor(tokens[: len(tokens) // length * length]).view(-1, length)
    parts, start, size = [], 0, _BATCH["text"]
    for count in shares(counts, len(blocks)):
        part = blocks[start : start + count]
        batches = [{"input_ids": ids, "labels": ids} for ids in torch.split(part, size)]
        parts.append(Examples("text", batches, processor=tokenizer))
        start += count
    return parts
