"""Examples on which a quantized model and its float model differ most: what they saw, and what both say."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..model.batch import examples_in
from ..model.roles import is_transformers_model
from .compare import Comparison, Difference
from .network import attended

_MOST = 8
_LOOKED_AT = 64  # examples, of which the most different are shown
_SIDE = 224  # pixels of the longer side of a picture
_BEFORE = 48  # tokens in front of the one that differs

Run = Callable[[Any], tuple[Tensor, Tensor]]  # inputs -> outputs of the model and of the float model


@dataclass(frozen=True)
class Answer:
    """What a model ranks first. probability: 0 to 1. right: None where the label is not known."""

    text: str
    probability: float
    right: bool | None


@dataclass(frozen=True)
class Example:
    """What two models answer differently.

    number: of the example, over all batches. image: a data URI of a small JPEG, or "". text: the sentence, or the words in front of
    `token`, the token that is answered. label: the right answer, or "". reference, model: the answers. divergence: of the model's
    probabilities from those of the float model, in nats. cosine: of outputs that are no answers.
    """

    number: int
    image: str = ""
    text: str = ""
    token: str = ""
    label: str = ""
    reference: Answer | None = None
    model: Answer | None = None
    divergence: float | None = None
    cosine: float | None = None


class Words:
    """Inputs and answers as pictures and words.

    Args:
        names: of classes; None: what the model knows.
        processor: tokenizer or image processor of transformers, or both in one.
        shown: for each example over all batches a picture, as a `Path` or an image of PIL, or a sentence, instead of the inputs.
    """

    def __init__(
        self,
        model: nn.Module,
        names: Sequence[str] | Mapping[int, str] | None,
        processor: Any,
        shown: Sequence[Any] | None,
    ) -> None:
        self.names = _given(class_names(model) or {} if names is None else names)
        self.tokenizer = getattr(processor, "tokenizer", processor)
        self.shown = shown
        self.tokens = getattr(getattr(model, "config", None), "vocab_size", None)
        generates: Any = getattr(model, "can_generate", None)
        self.following = is_transformers_model(model) and bool(generates())  # answers are the next tokens
        images, config = getattr(processor, "image_processor", processor), _timm_config(model)
        self.mean = _channels(getattr(images, "image_mean", None) or config.get("mean"))
        self.std = _channels(getattr(images, "image_std", None) or config.get("std"))

    def of_class(self, index: int, classes: int) -> str:
        """Where there are as many classes as tokens, they are tokens."""
        if classes == self.tokens and classes != len(self.names):
            return self.of_tokens([index]) if self._decode else f"token {index}"
        return self.names.get(index, f"class {index}")

    def of_tokens(self, ids: Sequence[int], special: bool = True) -> str:
        if self._decode is None:
            return " ".join(map(str, ids))
        return str(self._decode(list(ids), skip_special_tokens=not special))

    def of_input(self, number: int, inputs: Any, row: int) -> tuple[str, str]:
        """The picture and the text of an example; each may be empty."""
        if self.shown:
            return _shown(self.shown[number])
        values = inputs.values() if isinstance(inputs, Mapping) else inputs if isinstance(inputs, tuple) else (inputs,)
        tensors = [value for value in values if isinstance(value, Tensor) and value.ndim > 1]
        picture = next((v for v in tensors if v.ndim == 4 and v.is_floating_point() and v.shape[1] in (1, 3)), None)
        ids = next((v for v in tensors if v.ndim == 2 and not v.is_floating_point()), None)
        if ids is not None:
            mask = inputs.get("attention_mask") if isinstance(inputs, Mapping) else None
            kept = ids[row] if mask is None or mask.shape != ids.shape else ids[row][mask[row] > 0]
            return "", self.of_tokens(kept.tolist(), special=False)
        return ("", "") if picture is None else (self._picture(picture[row]), "")

    @property
    def _decode(self) -> Any:
        return getattr(self.tokenizer, "decode", None)

    def _picture(self, image: Tensor) -> str:
        """Without the mean and the standard deviation of the preprocessing, from black to white."""
        from PIL import Image

        image = image.detach().float().cpu().nan_to_num(0, 0, 0)
        if self.mean is not None and self.std is not None and len(self.mean) == len(self.std) == len(image):
            image = image * self.std + self.mean
        else:
            image = (image - image.min()) / (image.max() - image.min()).clamp(min=1e-12)
        levels = (image.clamp(0, 1) * 255).round().to(torch.uint8).movedim(0, -1)
        return _jpeg(Image.fromarray(levels.squeeze(-1).numpy()))


def examples_that_differ(run: Run, batches: Sequence[Any], comparison: Comparison, words: Words) -> list[Example]:
    """The most different of the first 64 whose answers differ, of tokens the most different one of each of the first 64
    sequences; of outputs that are no answers those with the lowest cosine. batches are without labels."""
    if comparison.cosine is not None:
        found = _distant(run, _parts(batches, range(_LOOKED_AT)), words)
    elif comparison.unit == "example":
        chosen = {difference.example: difference for difference in comparison.differences[:_LOOKED_AT]}
        found = _answered(run, _parts(batches, chosen), chosen, words)
    elif comparison.unit == "token":
        found = _tokens(run, _parts(batches, range(_LOOKED_AT)), words)
    else:
        return []
    return sorted(found, key=lambda example: -(example.divergence or 0) + (example.cosine or 0))[:_MOST]


def _answered(run: Run, parts: Any, chosen: Mapping[int, Difference], words: Words) -> Iterator[Example]:
    for numbers, inputs in parts:
        y, reference = (value.float().log_softmax(-1) for value in run(inputs))
        divergences = (reference.exp() * (reference - y)).sum(-1).tolist()
        for row, number in enumerate(numbers):
            image, text = words.of_input(number, inputs, row)
            label = chosen[number].label
            yield Example(
                number,
                image,
                text,
                label="" if label is None else words.of_class(label, y.shape[-1]),
                reference=_answer(reference[row], words, label),
                model=_answer(y[row], words, label),
                divergence=divergences[row],
            )


def _tokens(run: Run, parts: Any, words: Words) -> Iterator[Example]:
    for numbers, inputs in parts:
        ids = inputs.get("input_ids") if isinstance(inputs, Mapping) else None
        mask = inputs.get("attention_mask") if isinstance(inputs, Mapping) else None
        y, reference = (value.float().log_softmax(-1) for value in run(inputs))
        if ids is None or ids.shape != y.shape[:2]:
            return
        divergences = (reference.exp() * (reference - y)).sum(-1)
        other = y.argmax(-1) != reference.argmax(-1)
        if mask is not None and mask.shape == other.shape:
            other &= mask.to(other.device) > 0
        for row, number in enumerate(numbers):
            if not bool(other[row].any()):
                continue
            place = int(divergences[row].where(other[row], -1.0).argmax())
            follows = words.following and place + 1 < ids.shape[1] and (mask is None or int(mask[row, place + 1]) > 0)
            right = int(ids[row, place + 1]) if follows else None
            yield Example(
                number,
                text=words.of_tokens(ids[row, max(0, place - _BEFORE) : place].tolist(), special=False),
                token=words.of_tokens([int(ids[row, place])]),
                label="" if right is None else words.of_class(right, y.shape[-1]),
                reference=_answer(reference[row, place], words, right),
                model=_answer(y[row, place], words, right),
                divergence=float(divergences[row, place]),
            )


def _distant(run: Run, parts: Any, words: Words) -> Iterator[Example]:
    for numbers, inputs in parts:
        y, reference = (value.float() for value in run(inputs))
        mask = inputs.get("attention_mask") if isinstance(inputs, Mapping) else None
        for row, number in enumerate(numbers):
            own = mask[row : row + 1] if isinstance(mask, Tensor) else None
            one, other = (attended(value[row : row + 1], own) for value in (y, reference))
            image, text = words.of_input(number, inputs, row)
            yield Example(number, image, text, cosine=float(F.cosine_similarity(one, other).mean()))


def _answer(log: Tensor, words: Words, right: int | None) -> Answer:
    first = int(log.argmax())
    return Answer(words.of_class(first, len(log)), float(log[first].exp()), None if right is None else first == right)


def _parts(batches: Sequence[Any], numbers: Any) -> Iterator[tuple[list[int], Any]]:
    """Of each batch the examples with these numbers."""
    start = 0
    for batch in batches:
        count = examples_in(batch)
        own = [number for number in range(start, start + count) if number in numbers]
        if own:
            yield own, _rows(batch, [number - start for number in own], count)
        start += count


def _rows(batch: Any, rows: list[int], count: int) -> Any:
    if isinstance(batch, Tensor):
        return batch[rows] if batch.ndim and len(batch) == count else batch
    if isinstance(batch, Mapping):
        return {name: _rows(value, rows, count) for name, value in batch.items()}
    return tuple(_rows(value, rows, count) for value in batch) if isinstance(batch, tuple) else batch


def _shown(shown: Any) -> tuple[str, str]:
    from PIL import Image

    if isinstance(shown, str):
        return "", shown
    return _jpeg(Image.open(shown) if isinstance(shown, Path) else shown), ""


def _jpeg(picture: Any) -> str:
    from PIL import Image

    picture = picture.convert("RGB")
    if max(picture.size) <= _SIDE // 2:  # a few pixels are seen best as squares
        factor = _SIDE // max(picture.size)
        picture = picture.resize((picture.width * factor, picture.height * factor), Image.Resampling.NEAREST)
    picture.thumbnail((_SIDE, _SIDE))
    file = io.BytesIO()
    picture.save(file, "JPEG", quality=80, optimize=True)
    return f"data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode()}"


def _given(names: Sequence[str] | Mapping[int, str]) -> dict[int, str]:
    items = names.items() if isinstance(names, Mapping) else enumerate(names)
    return {int(index): str(name) for index, name in items}


def class_names(model: nn.Module) -> list[str] | None:
    """What the model itself says of its classes, by number: `id2label` of transformers, label names of timm, and those of
    ImageNet where timm's description of the weights names it. None where nothing does."""
    labels = getattr(getattr(model, "config", None), "id2label", None)
    if labels:
        known = _given(labels)
        return [known.get(number, f"class {number}") for number in range(max(known) + 1)]
    config = _timm_config(model)
    if config.get("label_names"):
        return [str(name) for name in config["label_names"]]
    classes = getattr(model, "num_classes", None)
    if classes is None or classes != config.get("num_classes") or "in1k" not in str(config.get("tag")):
        return None
    from timm.data.imagenet_info import ImageNetInfo

    return [text.split(",")[0] for text in ImageNetInfo().label_descriptions()]


def _timm_config(model: nn.Module) -> dict[str, Any]:
    config = getattr(model, "pretrained_cfg", None)
    return config if isinstance(config, dict) else {}


def _channels(values: Any) -> Tensor | None:
    return None if values is None else torch.tensor(values, dtype=torch.float32).view(-1, 1, 1)
