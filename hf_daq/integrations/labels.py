"""Classes of a data set as a model numbers them."""

from __future__ import annotations

import logging
import re
from typing import Any

import timm.data

from .timm import is_timm_model

logger = logging.getLogger("hf_daq")
_COLUMNS = "label", "labels", "class"
# ImageNet's classes, and numbers: everywhere in their order
_IN_ORDER = re.compile(r"n\d{8}|[\d.]+")


def class_numbers(model: Any, rows: Any) -> list[int] | None:
    """The class of every row as the model numbers them, or None."""
    name = next((name for name in _COLUMNS if name in rows.column_names), None)
    classes = _class_count(model)
    if name is None or classes is None:
        return None
    feature = getattr(rows, "features", {}).get(name)
    given = [value.item() if getattr(value, "ndim", None) == 0 else value for value in rows[name]]  # of numpy and torch
    names = getattr(feature, "names", None)
    if missing := sum(map(_is_missing, given)):
        logger.warning("%d of %d rows have no class: accuracy is not measured", missing, len(given))
        return None
    if names is not None:
        given = [names[index] for index in given]
    given = [int(value) if isinstance(value, float) and value.is_integer() else value for value in given]
    plain = all(isinstance(value, str | int | float) for value in given)  # else several classes a row
    known = _class_names(model)
    numbers = _numbered(given, known, names, classes) if plain else None
    if numbers is None:
        logger.warning(
            "classes of the data, such as %r, are not those of the model, which has %d%s: accuracy is not measured",
            given[0],
            classes,
            f", such as {next(iter(known))!r}" if known else "",
        )
    return numbers


def _numbered(given: list[Any], known: dict[str, int], names: list[str] | None, classes: int) -> list[int] | None:
    folded = {name.casefold(): number for name, number in known.items()}
    for numbers, texts in ((known, list(map(str, given))), (folded, [str(value).casefold() for value in given])):
        if len(numbers) == len(known) and all(text in numbers for text in texts):
            return [numbers[text] for text in texts]
    chosen = any(map(_is_chosen, known))
    in_order = names is not None and len(names) == classes and not chosen  # as datasets numbers even 0, 1, 10, 11, 2
    if not in_order and all(str(value).isdecimal() and int(value) < classes for value in given):
        return [int(value) for value in given]
    if names is None and chosen and not all(map(_IN_ORDER.fullmatch, map(str, given))):
        return None  # the model's names are others
    order = {str(name): index for index, name in enumerate(names or _in_order(given))}
    return [order[str(value)] for value in given] if len(order) == classes else None


def _is_chosen(name: str) -> bool:
    """Whether a name is not one that transformers makes up."""
    return not re.fullmatch(r"LABEL_\d+", name)


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
