"""Rows of a data set as inputs of a model, with the preprocessing that the model was trained with.

Images go through timm's transform or the image processor of transformers, sentences and text through the tokenizer.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import timm.data
import torch
from torch import Tensor, nn

from ..errors import DataError, ModelError
from ..model.roles import is_transformers_model
from .labels import class_numbers
from .rows import column_name, named, rows_of
from .timm import is_timm_model

_IMAGE_COLUMNS, _TEXT_COLUMNS = ("image", "img"), ("text", "sentence")
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
        DataError: not found, not of this kind, fewer than two rows; a count or a length below 1. ModelError: a model that takes something else.
    """
    for name, value in [("examples", min(counts)), ("length", length)]:
        if value is not None and value < 1:
            raise DataError(f"{name} is {value}; it must be at least 1")
    kind = _kind(model)
    rows = rows_of(data, subset, split, column)
    usual = _IMAGE_COLUMNS if kind == "images" else _TEXT_COLUMNS
    values = rows[column_name(rows, column, usual, kind)]
    if kind == "text":
        return _blocks(model, values, counts, processor, length)
    if len(values) < 2:
        raise DataError(f"{named(data)} has {len(values)} rows; two are needed at least, some hundred are good")
    order = torch.randperm(len(values), generator=torch.Generator().manual_seed(seed)).tolist()
    labels = class_numbers(model, rows)
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
    what = f"{len(image)} bytes of the data are" if isinstance(image, bytes) else f"{image} is"
    try:
        if isinstance(image, Image.Image):
            return _converted(image, mode)
        with Image.open(io.BytesIO(image) if isinstance(image, bytes) else image) as opened:
            return _converted(opened, mode)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise DataError(f"{what} no image that can be read: {error}") from None


def _converted(image: Any, mode: str) -> Any:
    """The right side up. Pixels of 16 bits get 8, where Pillow would cut them off at 255."""
    from PIL import Image, ImageOps

    with suppress(Exception):  # what cannot be read of the camera says nothing of the image
        image = ImageOps.exif_transpose(image)
    if image.mode == "F":
        raise ValueError("its pixels are floating-point numbers; write them with 8 bits")
    if image.mode.startswith("I"):
        pixels = np.asarray(image)
        if pixels.max() > 65535 or pixels.min() < 0:
            raise ValueError("its pixels have more than 16 bits; write them with 8")
        image = Image.fromarray((pixels >> 8 if pixels.max() > 255 else pixels).astype(np.uint8))
    return image.convert(mode)


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
