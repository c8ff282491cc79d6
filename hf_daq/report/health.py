"""`health`: whether a quantized model as a whole is fine, what is wrong with its layers, and what to try."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any

from rich.console import Group
from rich.padding import Padding
from rich.text import Text
from torch import nn

from ..config import DaqConfig
from ..model.batch import examples_in
from ..text import COLUMNS, as_text, cell, plain
from .findings import findings_of
from .measure import Measurement, check_quantized, measure, paths_taken, paths_text
from .network import network_sqnr

# Networks calibrated at 15 dB or more (EfficientNet-Lite0, MiniLM) were as accurate as in float; at 10 dB they had lost 3 to 4
# points of a hundred, at 3 dB twenty.
_FINE_NETWORK = 14.0
_NOISE = {
    *("dead-weight-codes", "dead-input-codes", "clipped-weights", "clipped-inputs"),
    *("outlier-channels", "negative-inputs", "low-output-sqnr"),
}


@dataclass(frozen=True)
class Finding:
    """One problem of one layer.

    problem: "not-calibrated", "crossed-bounds", "non-finite-bounds", "non-finite-weights", "non-finite-inputs", "non-finite-outputs",
        "not-reached", "unquantized-weights", "unquantized-inputs", "unquantized-outputs", "dead-weight-codes",
        "dead-input-codes", "clipped-weights", "clipped-inputs", "outlier-channels", "negative-inputs" or "low-output-sqnr".
    value: the figure, which the message names with its unit.
    message: what it means and what to try.
    """

    layer: str
    problem: str
    value: float
    message: str


@dataclass(frozen=True)
class Health:
    """What `health` found. `print(health)` shows it as paragraphs.

    findings: in the order of `named_modules`. layers: how many were looked at.
    network_sqnr: of the outputs of the model against those of its own float weights, in dB, without what is the same for all
        examples; None if there is nothing to compare, as in a packed model. `reconstruct` and training at few bits move
        float weights away from a good float network, so that afterwards a low figure says nothing.
    settings: arguments of `apply_daq` that bring a model that was only calibrated nearer to float, of those not in use.
    paths, path_error: of a packed model: how many layers compute this batch in "integers", from "codes", "unpacked" or with
        "bfloat16 scales", and the largest error of a layer, as in `summary`.
    """

    findings: list[Finding]
    layers: int
    network_sqnr: float | None = None
    settings: tuple[str, ...] = ()
    paths: dict[str, int] = field(default_factory=dict)
    path_error: float | None = None

    @property
    def fine(self) -> bool:
        """Whether the outputs of the model are so close to float ones that a noisy layer does no harm: 14 dB or more."""
        return self.network_sqnr is not None and self.network_sqnr >= _FINE_NETWORK

    @property
    def alarms(self) -> list[Finding]:
        """The findings without those of noise in a model that is fine as a whole."""
        return [finding for finding in self.findings if not (self.fine and finding.problem in _NOISE)]

    @property
    def ok(self) -> bool:
        """True without alarms."""
        return not self.alarms

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types; "inf", "-inf" and "nan" are strings."""
        return {"ok": self.ok, "fine": self.fine, **plain(dataclasses.asdict(self))}

    def __rich__(self) -> Group | Text:
        parts: list[Any] = [Padding(cell(f"network: {self.as_a_whole()}"), 0, expand=False)]
        if self.paths:
            parts += [Padding(cell(self.as_packed()), 0, expand=False)]
        if not self.findings:
            return Group(*parts, Text(f"no findings in {self.layers} quantized layers"))
        parts += [Text()]
        for finding in self.findings:
            parts += [Text.assemble(cell(finding.layer, "bold"), ": ", finding.problem, overflow="fold")]
            parts += [Padding(cell(finding.message), (0, 0, 1, 2), expand=False)]
        number = len(self.findings)
        more = "" if number == 1 else "; mend the first and look again, as others may come from it"
        parts += [Text(f"{number} finding{'' if number == 1 else 's'} in {self.layers} quantized layers{more}")]
        return Group(*parts)

    def as_a_whole(self) -> str:
        """What `network_sqnr` means, in words."""
        if self.network_sqnr is None:
            return (
                "not compared with float: packed, without usable bounds, with one output for all examples, or with outputs that "
                "are not finite or whose number changes, as boxes do"
            )
        text = f"SQNR of its outputs around their mean {self.network_sqnr:.1f} dB against its own float weights"
        if self.fine:
            return f"{text}, fine" + ("; findings about noise do no harm" if self.findings else "")
        tries = "; ".join([*self.settings, "hf_daq.reconstruct(model, batches)", "training"])
        judged = f"{_FINE_NETWORK:.0f} dB would be fine after calibration; reconstruct and training move these weights"
        return f"{text}, {judged}, and accuracy tells then. Try: {tries}"

    def as_packed(self) -> str:
        """What `paths` and `path_error` mean, in words; empty for a model that is not packed."""
        return paths_text(self.paths, self.path_error) if self.paths else ""

    def __str__(self) -> str:
        return as_text(self, COLUMNS)


def health(model: nn.Module, batch: Any) -> Health:
    """Compare the outputs with those of the float weights, and look for broken, bypassed and badly placed quantizers.

        print(hf_daq.health(model, images))

    `health(...).ok` is True without an alarm: where the model as a whole is fine, findings about noise in a layer are none.
    A layer without usable bounds computes in float, so that the layers behind it are examined too.
    Of values that are not finite only the layers where they first appear are named. The model computes in evaluation
    mode, without gradients, and is left as it was.

    Args:
        model: quantized or packed, calibrated or not.
        batch: a tensor, a mapping of tensors for `model(**batch)`, or a tuple for `model(*batch)`; on the device of the
            model, and as real as possible: a few dozen examples.

    Raises:
        ModelError: nothing in the model is quantized, or it is sharded; the batch is none of these.
    """
    return examine(model, batch)


def examine(model: nn.Module, batch: Any, calibrated_now: bool = False) -> Health:
    """`health`; right after `calibrate` nothing advises to do it again."""
    check_quantized(model, "health")
    examples_in(batch)
    measured, _ = measure(model, batch)
    findings = [Finding(*found) for found in findings_of(measured, calibrated_now)]
    sqnr = network_sqnr(model, batch, measured)
    config: DaqConfig | None = vars(model).get("daq_config")
    settings = _settings(config, measured) if config and sqnr is not None else ()
    return Health(findings, len(measured), sqnr, settings, *paths_taken(measured))


def _settings(config: DaqConfig, measured: list[Measurement]) -> tuple[str, ...]:
    """What brings the outputs of a calibrated model nearer to the float ones, of what is not in use yet."""
    inputs = any(found.input_bits is not None for found in measured)
    fewest = min(min(found.weight_bits, found.input_bits or 8) for found in measured)
    wanted = {
        "weight_normalization='scale'": config.weight_normalization == "standardize",
        "activation_init='mse'": inputs and config.activation_init == "3std",
        "bias_correction=True": not config.bias_correction,
        "weight_granularity='channel'": config.weight_granularity == "tensor",
        "more bits": fewest < 8,
    }
    return tuple(name for name, missing in wanted.items() if missing)
