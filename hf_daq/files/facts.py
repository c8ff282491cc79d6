"""What a model card says that no tensor tells: `CardFacts`. Standard library only."""

from __future__ import annotations

import dataclasses
import math
import platform
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from ..errors import CheckpointError
from ..version import __version__

_LIBRARIES = ("torch", "timm", "transformers", "safetensors")
_LONGEST = 2**16  # characters of text in a file from a stranger


@dataclass(frozen=True)
class Result:
    """One measured number.

    Args:
        metric: name of the metric on the Hub, e.g. "accuracy", "perplexity".
        value: result of the quantized model; shares are in percent.
        float_value: result of the float model, measured in the same way.
        dataset: Hub id of the data, or a few words.
        split: part of the data, e.g. "test".
    """

    metric: str
    value: float
    float_value: float | None = None
    dataset: str | None = None
    split: str | None = None

    @classmethod
    def from_comparison(
        cls, comparison: Any, dataset: str | None = None, split: str | None = None
    ) -> tuple[Result, ...]:
        """The figures of `compare`, for `CardFacts(results=...)`."""
        found = {name: (getattr(comparison, name), getattr(comparison, f"reference_{name}")) for name in _OF_BOTH}
        found |= {title: (getattr(comparison, name), None) for name, title in _BETWEEN.items()}
        return tuple(
            cls(name, round(value, 4), None if of_float is None else round(of_float, 4), dataset, split)
            for name, (value, of_float) in found.items()
            if value is not None
        )


_OF_BOTH = ("accuracy", "perplexity")
_BETWEEN = {"agreement": "agreement with float", "kl": "KL divergence from float", "cosine": "cosine to float"}


@dataclass(frozen=True)
class CardFacts:
    """What the model card says beside what the files tell: where the model comes from, data, results.

    The facts are written to the header of the weights file, so that a checkpoint that is packed or pushed later has the
    same card. The card does not mention what is left out.

    Args:
        base_model: Hub id of the float model.
        license: license of the weights, as the Hub names it, e.g. "apache-2.0".
        datasets: training data, Hub ids or a few words each.
        calibration: what the inputs of `calibrate` were, in a few words.
        results: measured numbers.
        command: the line that gives the results again.
        recipe: the settings of the run.
        seed: random seed.
        versions: library -> version; by default those that run when the model is saved.
    """

    base_model: str | None = None
    license: str | None = None
    datasets: tuple[str, ...] = ()
    calibration: str | None = None
    results: tuple[Result, ...] = ()
    command: str | None = None
    recipe: Mapping[str, Any] = field(default_factory=dict)
    seed: int | None = None
    versions: Mapping[str, str] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types, without what is not known."""
        values = dataclasses.asdict(self)
        values["datasets"] = list(values["datasets"])
        values["results"] = [{k: v for k, v in result.items() if v is not None} for result in values["results"]]
        return {key: value for key, value in values.items() if value not in (None, [], {})}

    def with_versions(self, versions: Mapping[str, str] | None = None) -> CardFacts:
        """Facts that name versions: these, or else the given ones, or else those of Python and the libraries that run now."""
        return self if self.versions else dataclasses.replace(self, versions=versions or _running_versions())

    @classmethod
    def from_dict(cls, values: Any) -> CardFacts:
        """Inverse of `to_dict`, for values that a stranger may have written.

        Raises:
            CheckpointError: an unknown key, or a value of another type.
        """
        if not isinstance(values, Mapping) or len(repr(values)) > _LONGEST:
            raise CheckpointError("the facts of the model card are not a small mapping")
        return cls(**{str(key): _checked(str(key), value) for key, value in values.items()})


def _checked(key: str, value: Any) -> Any:
    texts = ("base_model", "license", "calibration", "command")
    if key in texts and isinstance(value, str):
        return value
    if key == "datasets" and isinstance(value, list) and all(isinstance(name, str) for name in value):
        return tuple(value)
    if key == "seed" and isinstance(value, int):
        return value
    if key == "recipe" and isinstance(value, Mapping):
        return dict(value)
    if key == "versions" and isinstance(value, Mapping) and all(isinstance(text, str) for text in value.values()):
        return dict(value)
    if key == "results" and isinstance(value, list):
        return tuple(_result(entry) for entry in value)
    raise CheckpointError(f"the facts of the model card have an unknown or a wrong entry: {key!r}")


def _result(entry: Any) -> Result:
    kinds: dict[str, Any] = {"metric": str, "value": float, "float_value": float, "dataset": str, "split": str}
    if not isinstance(entry, Mapping) or not {"metric", "value"} <= entry.keys() <= kinds.keys():
        raise CheckpointError(f"a result of the model card has wrong keys: {str(entry)[:200]}")
    for key, value in entry.items():
        fits = isinstance(value, str)
        if kinds[key] is float:
            fits = isinstance(value, int | float) and math.isfinite(value)
        if not fits:
            raise CheckpointError(f"a result of the model card has a wrong {key}: {str(value)[:200]}")
    return Result(**entry)


def _running_versions() -> dict[str, str]:
    found = {"python": platform.python_version(), "hf_daq": __version__}
    for name in _LIBRARIES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found
