"""`compare`: the answers of a model beside those of the float model."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from rich.table import Table
from torch import Tensor, nn

from ..errors import ModelError
from ..model.batch import check_taken, examples_in, on_device_of
from ..nn.memory import memory_reused
from ..nn.sums import finite, squares
from ..text import COLUMNS, as_text, plain, progress_bar
from .measure import decibels, left_as_it_was, measure
from .network import attended, calls, float_network, prediction

_Output = tuple[Tensor, bool]  # the answer of a model, and whether it is logits
_IGNORED = -100  # label of what does not count
_AT_ONCE = 2**22  # logits


@dataclass(frozen=True)
class Difference:
    """An example that the two models answer differently. example: its number, over all batches. answer, reference_answer: classes.
    label: the right class, None where it is not known."""

    example: int
    answer: int
    reference_answer: int
    label: int | None = None


@dataclass(frozen=True)
class Comparison:
    """How near a model is to a float one. `print(comparison)` shows a table. Figures are means over examples, of language
    models over tokens.

    examples: how many. count: how many answers, `unit` each: "example", "token" or "pixel".
    kl: divergence of the model's probabilities from those of the float model, `sum p_float log(p_float / p)`, in nats.
    agreement: percent of answers that rank the same class first.
    accuracy, reference_accuracy: percent of right answers of both. None without labels.
    perplexity, reference_perplexity: of both, `exp` of the mean negative log-likelihood in nats; of language models.
    cosine: between the outputs of both, mean; where outputs are no logits, as of an embedding model. Then all above is None.
    sqnr: of the outputs, `10 log10(sum y_float^2 / sum (y - y_float)^2)` in dB, whatever they are; inf where both are equal.
        Look at it where outputs are a single number, or images, which have the shape of logits for pixels.
    differences: the examples with another answer than the float model's; only where the unit is "example".
    """

    examples: int
    count: int
    unit: Literal["example", "token", "pixel"]
    kl: float | None = None
    agreement: float | None = None
    accuracy: float | None = None
    reference_accuracy: float | None = None
    perplexity: float | None = None
    reference_perplexity: float | None = None
    cosine: float | None = None
    sqnr: float | None = None
    differences: tuple[Difference, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types, without what was not measured. `Result.from_comparison` gives the figures to a model card."""
        return {key: value for key, value in plain(dataclasses.asdict(self)).items() if value is not None}

    def __rich__(self) -> Table:
        table = Table(box=None, header_style="bold", pad_edge=False)
        table.add_column(f"{self.count:,} {self.unit}s")
        for name in ("model", "float"):
            table.add_column(name, justify="right")
        rows = {
            "accuracy %": (self.accuracy, self.reference_accuracy, 2),
            "perplexity": (self.perplexity, self.reference_perplexity, 2),
            "same first answer %": (self.agreement, None, 2),
            "KL divergence, nats": (self.kl, None, 4),
            "cosine": (self.cosine, None, 4),
            "SQNR of outputs, dB": (self.sqnr, None, 1),
        }
        for name, (value, of_float, digits) in rows.items():
            if value is not None:
                table.add_row(name, f"{value:.{digits}f}", "" if of_float is None else f"{of_float:.{digits}f}")
        return table

    def __str__(self) -> str:
        return as_text(self, COLUMNS)


@memory_reused()
def compare(
    model: nn.Module,
    reference: nn.Module | None,
    batches: Iterable[Any],
    *,
    labels: Tensor | None = None,
    progress: bool | None = None,
) -> Comparison:
    """Run both models on the same inputs and compare their answers: KL divergence, how often the first one is the same, and
    with labels the accuracy, or perplexity, of both.

        float_model = copy.deepcopy(model)  # before apply_daq
        print(hf_daq.compare(model, float_model, batches))

    A model may keep its accuracy and yet answer many examples differently; agreement and KL divergence show that. Where
    outputs are logits, of images, sentences, tokens or pixels, these figures are given, else the cosine of the outputs; their
    SQNR always.
    Both compute in evaluation mode, without gradients, and are left as they were.

    Args:
        model: quantized, packed, or any other of the same outputs.
        reference: the float model; None: the model with its own float weights, as in `health`. `reconstruct` and training move
            these. The model itself: only its own accuracy or perplexity is measured.
        batches: each a tensor, a mapping of tensors for `model(**batch)`, or a tuple for `model(*batch)`. "labels" of a mapping
            are not given to the model: classes, or tokens, of which -100 does not count. Tokens that are the inputs themselves
            are predicted from those before them. Padding, which a 2-dimensional `attention_mask` names, does not count.
        labels: classes of all examples, shape (examples,), where batches are not mappings.
        progress: show a bar with the time that is left; None: if the standard error is a terminal.

    Raises:
        ModelError: no batches, outputs of different shapes or that are not finite, labels of another number; no reference and a
        model without float weights of its own.
    """
    kept = list(batches)
    if isinstance(batches, Tensor | Mapping) or not kept:
        raise ModelError("compare needs a list of batches: hf_daq.compare(model, reference, [batch])")
    examples = sum(map(examples_in, kept))
    for batch in kept[:1]:
        check_taken(model, batch)
    if isinstance(labels, Sequence) and any(isinstance(value, Tensor) and value.ndim for value in labels):
        raise ModelError("labels is a list of tensors: write labels=torch.cat(labels)")
    labels = None if labels is None else torch.as_tensor(labels)
    if labels is not None and labels.shape != (examples,):
        raise ModelError(f"labels have the shape {tuple(labels.shape)}, and there are {examples} examples")
    sums = _Sums()
    with both(model, reference) as run, progress_bar(progress, len(kept)) as show:
        for batch in kept:
            show("comparing")
            inputs, of_batch = without_labels(batch)
            if of_batch is None and labels is not None:
                of_batch = labels[sums.examples : sums.examples + examples_in(batch)]
            sums.add(model, *run(inputs), inputs, of_batch, examples_in(batch))
    return sums.comparison(alone=reference is model)


def _classes(labels: Any, count: int) -> Tensor:
    """Whole numbers, each a class or `_IGNORED`."""
    given = torch.as_tensor(labels)
    if given.is_floating_point() or given.is_complex():
        raise ModelError(f"labels are {given.dtype}; numbers of classes are wanted, integers")
    numbers = given.long()
    wrong = numbers[(numbers != _IGNORED) & ((numbers < 0) | (numbers >= count))]
    if len(wrong):
        raise ModelError(
            f"label {int(wrong[0])} is none of the {count} classes of the model; write {_IGNORED} where there is none to count"
        )
    return numbers


@contextmanager
def both(model: nn.Module, reference: nn.Module | None) -> Iterator[Callable[[Any], tuple[_Output, _Output]]]:
    """Inside, a function from inputs to the outputs of the model and of the float one, as of `compare`."""
    layers = measure(model)[0] if reference is None else []
    if reference is None and float_network(layers) is None:
        raise ModelError(
            "compare without a reference needs a quantized, calibrated model with float weights of its own: pass the float "
            "model, hf_daq.compare(model, float_model, batches)"
        )

    def run(inputs: Any) -> tuple[_Output, _Output]:
        answer = _output(model, inputs)
        if reference is model:
            return answer, answer
        with float_network(layers) or nullcontext():
            return answer, _output(reference or model, inputs)

    with torch.no_grad(), left_as_it_was(model), left_as_it_was(reference or model):
        yield run


def without_labels(batch: Any) -> tuple[Any, Tensor | None]:
    if not isinstance(batch, Mapping):
        return batch, None
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    return inputs, batch.get("labels")


def _output(model: nn.Module, inputs: Any) -> _Output:
    ((_, args, kwargs),) = calls(model, on_device_of(model, inputs))
    output = model(*args, **kwargs)
    found = prediction(output)
    if found is None:
        raise ModelError("the model gives no tensor of real numbers to compare")
    # Named outputs are logits if they are called so, and what is inside of lists of such, as detectors give them, is none.
    if isinstance(output, Mapping):
        known = found is output.get("logits")
    else:
        parts = output if isinstance(output, tuple | list) else (output, getattr(output, "logits", None))
        known = any(found is part for part in parts)
    classes = found.shape[1] if found.ndim == 4 else found.shape[-1] if found.ndim in (2, 3) else 1
    features = getattr(model, "num_classes", None) == 0
    return found, classes > 1 and not features and known


class _Sums:
    """What batches add up to."""

    def __init__(self) -> None:
        self.examples = self.count = self.labelled = self.same = 0
        self.unit: Any = "example"
        self.kl = self.cosine = self.signal = self.noise = 0.0
        self.right, self.likelihood = [0, 0], [0.0, 0.0]  # of the model, of the reference
        self.logits = self.next_token = False
        self.differences: list[Difference] = []

    def add(
        self,
        model: nn.Module,
        answer: _Output,
        expected: _Output,
        inputs: Any,
        labels: Tensor | None,
        examples: int,
    ) -> None:
        (y, self.logits), (reference, _) = answer, expected
        reference = reference.to(y.device)
        if y.shape != reference.shape:
            raise ModelError(f"outputs of the two models have shapes {tuple(y.shape)} and {tuple(reference.shape)}")
        if not (finite(y) and finite(reference)):
            raise ModelError(
                "outputs have NaN or infinite values: hf_daq.health(model, batch) says where they come from"
            )
        mask = inputs.get("attention_mask") if isinstance(inputs, Mapping) else None
        if not self.logits:
            rows, others = (attended(value.float(), mask) for value in (y, reference))
            self.cosine += float(F.cosine_similarity(rows, others).double().sum())
            self._add_error(rows, others)
            self.count += len(rows)
            self.unit = "token" if y.ndim == 3 else "example"
        else:
            self._add_logits(y, reference, inputs, labels, mask)
        self.examples += examples

    def _add_logits(
        self, y: Tensor, reference: Tensor, inputs: Any, labels: Tensor | None, mask: Tensor | None
    ) -> None:
        self.unit = {3: "token", 4: "pixel"}.get(y.ndim, "example")
        if y.ndim == 4:  # classes are channels
            y, reference = y.movedim(1, -1), reference.movedim(1, -1)
        if labels is not None:
            labels = _classes(labels, y.shape[-1]).to(y.device)
            y, reference, labels, mask = self._shifted(y, reference, inputs, labels, mask)
        counts = torch.ones(y.shape[:-1], dtype=torch.bool, device=y.device)
        if y.ndim == 3 and isinstance(mask, Tensor) and mask.shape == counts.shape:
            counts = mask.to(y.device) > 0
        y, reference = y[counts], reference[counts]
        known = None if labels is None or labels.shape != counts.shape else labels[counts]
        if labels is not None and known is None:
            raise ModelError(f"labels have the shape {tuple(labels.shape)}, and answers {tuple(counts.shape)}")
        rows = max(1, _AT_ONCE // y.shape[-1])
        for start in range(0, len(y), rows):
            part = slice(start, start + rows)
            self._add_rows(y[part], reference[part], None if known is None else known[part])

    def _shifted(self, y: Tensor, reference: Tensor, inputs: Any, labels: Tensor, mask: Any) -> Any:
        """Labels that are the inputs are predicted one token earlier, as language models of transformers do it."""
        ids = inputs.get("input_ids") if isinstance(inputs, Mapping) else None
        if not (isinstance(ids, Tensor) and ids.shape == labels.shape and y.ndim == 3):
            return y, reference, labels, mask
        known = labels != _IGNORED
        if not bool((ids.to(labels.device) == labels)[known].all()):
            return y, reference, labels, mask
        self.next_token = True
        mask = mask[:, 1:] if isinstance(mask, Tensor) and mask.ndim == 2 else mask
        return y[:, :-1], reference[:, :-1], labels[:, 1:], mask

    def _add_rows(self, y: Tensor, reference: Tensor, labels: Tensor | None) -> None:
        """y, reference: (answers, classes); labels: (answers,)."""
        self._add_error(y, reference)
        log, target = y.double().log_softmax(-1), reference.double().log_softmax(-1)
        first, wanted = log.argmax(-1), target.argmax(-1)
        self.kl += float((target.exp() * (target - log)).sum())
        self.same += int((first == wanted).sum())
        if self.unit == "example":
            for index in (first != wanted).nonzero().flatten().tolist():
                label = None if labels is None or labels[index] == _IGNORED else int(labels[index])
                self.differences.append(Difference(self.count + index, int(first[index]), int(wanted[index]), label))
        self.count += len(y)
        if labels is None:
            return
        known = labels != _IGNORED
        labels = labels[known]
        self.labelled += len(labels)
        for place, (scores, chosen) in enumerate(((log, first), (target, wanted))):
            self.right[place] += int((chosen[known] == labels).sum())
            self.likelihood[place] += float(scores[known].gather(1, labels[:, None]).sum())

    def _add_error(self, y: Tensor, reference: Tensor) -> None:
        self.signal += squares(reference)
        self.noise += squares(y.double() - reference)

    def comparison(self, alone: bool) -> Comparison:
        values: dict[str, Any] = {"examples": self.examples, "count": self.count, "unit": self.unit}
        if not alone and self.signal:
            values["sqnr"] = decibels(self.signal, self.noise)
        if not self.logits:
            return Comparison(**values, cosine=None if alone else self.cosine / max(1, self.count))
        if not alone:
            values |= {"kl": self.kl / max(1, self.count), "agreement": 100 * self.same / max(1, self.count)}
        names = ("",) if alone else ("", "reference_")
        if self.labelled and not self.next_token:
            values |= {f"{name}accuracy": 100 * n / self.labelled for name, n in zip(names, self.right, strict=False)}
        if self.labelled and self.unit == "token" and self.next_token:
            values |= {
                f"{name}perplexity": math.exp(min(-sum_ / self.labelled, 700))
                for name, sum_ in zip(names, self.likelihood, strict=False)
            }
        return Comparison(**values, differences=tuple(self.differences))
