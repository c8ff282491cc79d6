"""What is wrong with one layer, and what to try: each remedy was tried on networks with the fault, and helps."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator

from ..nn.sums import count_bad
from .measure import Measurement

# Chosen so that trained networks pass: those looked at used at least 30 % of their codes at 8 bits and 75 % at up to 4,
# clipped at most 82 % of their inputs (signed ones at 1 bit, else 56 %), and of their layers with an output SQNR below 2 dB
# none was more than 14 dB below the others.
_CLIPPED = 0.9
_NEGATIVE = 0.001
_LOW_SQNR, _BELOW_OTHERS = 2.0, 15.0
_OTHERS = 3
_FINE, _LOST = 7, 0.5  # bits from which on hardly a channel of the trained networks was lost
_VALUES_PER_CODE = 16
_DIFFERENT = 4.0  # times the median channel
_TOO_WIDE = 100.0  # times the median channel: beside it, others are lost even at 8 bits

_Found = Iterator[tuple[str, float, str]]
_AGAIN = (
    "calibrate again with batches like this one, and train with a smaller quantizer_lr if training moved its bounds; "
)


def findings_of(measured: list[Measurement], calibrated_now: bool) -> Iterator[tuple[str, str, float, str]]:
    """Layer, problem, value and message of each finding; right after `calibrate` nothing advises to do it again."""
    origins, medians = _origins(measured), _medians(measured)
    for found in measured:
        for finding in _findings(found, found in origins, medians, "" if calibrated_now else _AGAIN):
            yield found.name, *finding


def _findings(found: Measurement, origin: bool, medians: dict[str, float], again: str) -> _Found:
    findings = list(_without_values(found, origin))
    if found.usable and not found.bad_weights:
        findings += [*_bypassed(found), *_badly_used(found, again)]
        findings = findings or list(_noisy(found, medians, again))  # which all others explain
    yield from findings


def _origins(measured: list[Measurement]) -> set[Measurement]:
    """Layers where values that are not finite come up in this pass: before any other layer had such inputs or outputs."""
    reached = sorted(
        (found for found in measured if found.first_call is not None), key=lambda found: found.first_call or 0
    )
    for found in reached:
        if found.bad_inputs or found.bad_outputs:
            return {found}
    return set()


def _medians(measured: list[Measurement]) -> dict[str, float]:
    """Of the output SQNR of layers with the same bits, where there are enough."""
    by_bits: dict[str, list[float]] = {}
    for found in measured:
        if found.output_sqnr is not None and math.isfinite(found.output_sqnr):
            by_bits.setdefault(found.bits, []).append(found.output_sqnr)
    return {bits: statistics.median(values) for bits, values in by_bits.items() if len(values) > _OTHERS}


def _without_values(found: Measurement, origin: bool) -> _Found:
    """Bounds, weights, inputs and outputs that are not there, or not finite."""
    if not found.usable:
        yield _unusable(found)
    if found.bad_weights:
        share = found.bad_weights / found.parameters
        yield (
            "non-finite-weights",
            share,
            f"{share:.2%} of its weights are NaN or infinite: go back to an earlier checkpoint, then train with a smaller "
            "learning rate or with gradients clipped",
        )
    if found.first_call is None:
        yield (
            "not-reached",
            0.0,
            "the batch made 0 calls of this layer, so its inputs are unknown: probe with a batch that uses it, and calibrate "
            f"with such batches too, or keep it in float: modules_to_not_convert=[{found.name!r}]",
        )
    elif origin and found.bad_inputs:
        share = found.bad_inputs / found.inputs
        yield (
            "non-finite-inputs",
            share,
            f"{share:.2%} of its inputs are NaN or infinite, the first layer of the pass with such: look at the batch, and at "
            "the float layers before this one",
        )
    elif origin and not found.bad_weights:
        share = found.bad_outputs / found.outputs
        yield (
            "non-finite-outputs",
            share,
            f"{share:.2%} of its outputs are NaN or infinite, though its inputs are not: its sums leave the range of "
            f"{str(found.dtype).removeprefix('torch.')}, or its bias is not finite",
        )


def _unusable(found: Measurement) -> tuple[str, float, str]:
    quantizers = list(found.layer.quantizers.values())
    values = [value for part in quantizers for value in part.parameters()] + (
        [found.scale] if found.w_quant is None else []
    )
    bad, count = sum(count_bad(value) for value in values), sum(value.numel() for value in values)
    if any(bool(part.lower.isnan().all()) and not part.calibrated for part in quantizers):
        return (
            "not-calibrated",
            float(bad),
            f"{bad} of its {count} bounds, scales and shifts have no value yet: `with hf_daq.calibrate(model): model(batch)` on a few "
            "batches that use this layer, before the first forward",
        )
    again = "calibrate again, and train with a smaller quantizer_lr"
    if bad:
        return (
            "non-finite-bounds",
            float(bad),
            f"{bad} of its {count} bounds, scales and shifts are NaN or infinite: {again}",
        )
    crossed = sum(int((part.lower >= part.upper).sum()) for part in quantizers)
    pairs = sum(part.lower.numel() for part in quantizers)
    return (
        "crossed-bounds",
        float(crossed),
        f"{crossed} of its {pairs} lower bounds are not below the upper one: {again}",
    )


def _bypassed(found: Measurement) -> _Found:
    """What the layer computes with has more distinct values than its quantizers give: something replaced or bypassed them."""
    again = "something goes around its quantizer: a replaced forward, a hook, another library; remove_daq and apply_daq again"
    if found.distinct_weights > 2**found.weight_bits:
        yield (
            "unquantized-weights",
            float(found.distinct_weights),
            f"it computes with {found.distinct_weights} distinct weights or more under one scale, {found.weight_bits} bits have "
            f"{2**found.weight_bits}: {again}",
        )
    if found.input_bits is not None and found.distinct_inputs > 2**found.input_bits:
        yield (
            "unquantized-inputs",
            float(found.distinct_inputs),
            f"it computes with {found.distinct_inputs} distinct inputs or more, {found.input_bits} bits have "
            f"{2**found.input_bits}: {again}",
        )
    output, weight = found.output_sqnr, found.weight_sqnr
    if output is not None and weight is not None and found.bypassed and output > max(100.0, weight + 40.0):
        yield (
            "unquantized-outputs",
            output,
            f"its output is that of the float layer (SQNR {output:.0f} dB), though its quantized weight is not the float one "
            f"({weight:.0f} dB): {again}",
        )


def _badly_used(found: Measurement, again: str) -> _Found:
    """Codes that nothing takes, bounds that cut nearly everything off, and negative inputs where none were expected."""
    if _dead(found.weight_codes, found.weight_bits, found.parameters):
        yield (
            "dead-weight-codes",
            float(found.weight_codes),
            f"its weights use {found.weight_codes} of {2**found.weight_bits} codes: its bounds are too wide or far off. Try: "
            f"{again}{_by_channel(found)}{_more_bits(found, 'weight_bits')}",
        )
    if found.weights_clipped is not None and found.weights_clipped > _CLIPPED:
        yield (
            "clipped-weights",
            found.weights_clipped,
            f"{found.weights_clipped:.1%} of its weights are outside of their bounds and learn nothing. Try: "
            f"{again}{_more_bits(found, 'weight_bits')}",
        )
    if found.a_quant is None or not found.inputs or found.bad_inputs:
        return
    used, clipped = int((found.input_counts > 0).sum()), found.clipped_inputs / found.inputs
    negative = found.negative_inputs / found.inputs
    in_float = f"keep its inputs in float: {_rule(found, 'activation_bits', None)}"
    if _dead(used, found.a_quant.bits, found.inputs):
        yield (
            "dead-input-codes",
            float(used),
            f"its inputs use {used} of {2**found.a_quant.bits} codes: its bounds are too wide or far off. Try: {again}{in_float}",
        )
    yield from _crowded_out(found)
    bounds = found.layer.quantizers.get("a_quant")
    if bounds is None:
        return
    if clipped > _CLIPPED:
        yield (
            "clipped-inputs",
            clipped,
            f"{clipped:.1%} of its inputs are outside of their bounds [{bounds.lower.item():.3g}, "
            f"{bounds.upper.item():.3g}]. Try: {again}{in_float}",
        )
    if bounds.lower.item() == 0 and negative > _NEGATIVE:
        yield (
            "negative-inputs",
            negative,
            f"{negative:.1%} of its inputs are negative, but its quantizer is unsigned and makes them 0, since calibration "
            f"saw none. Try: {again}{in_float}",
        )


def _crowded_out(found: Measurement) -> _Found:
    """Input channels that vanish below half a step of bounds that a few large channels need."""
    if found.a_quant is None or found.channels is None or found.a_quant.bits < _FINE:
        return
    energy, noise = found.channels[:, found.channels[0] > 0]
    lost = int((noise > 0.5 * energy).sum())
    if lost > _LOST * len(energy):
        yield (
            "outlier-channels",
            lost / len(energy),
            f"{lost} of its {len(energy)} input channels are lost in quantization, since its bounds span a channel that is "
            f"{_spread(found):.0f} times larger than the median one. Try: {_in_float(found)}",
        )


def _noisy(found: Measurement, medians: dict[str, float], again: str) -> _Found:
    median, sqnr = medians.get(found.bits), found.output_sqnr
    key = "weight_bits" if found.a_quant is None else "bits"
    if median is None or sqnr is None or sqnr >= min(_LOW_SQNR, median - _BELOW_OTHERS):
        return
    yield (
        "low-output-sqnr",
        sqnr,
        f"its output has an SQNR of {sqnr:.1f} dB, the median of layers with as many bits is {median:.1f} dB: outliers, or bounds "
        f"or a scale that are off. Try: {again}{_in_float(found) if _spread(found) > _TOO_WIDE else _more_bits(found, key)}",
    )


def _by_channel(found: Measurement) -> str:
    """What helps a layer with one pair of bounds for output channels of different size."""
    largest = found.largest_channel
    if found.w_quant is None or found.w_quant.granularity != "tensor" or largest is None or largest < _DIFFERENT:
        return ""
    return f"weight_granularity='channel', as its largest output channel is {largest:.0f} times the median one; "


def _more_bits(found: Measurement, key: str) -> str:
    bits = [found.weight_bits] if key == "weight_bits" else [found.weight_bits, found.input_bits or 8]
    return _in_float(found) if min(bits) == 8 else f"more bits: {_rule(found, key, 8)}"


def _in_float(found: Measurement) -> str:
    return f"keep it in float: {_rule(found, 'skip', True)}"


def _spread(found: Measurement) -> float:
    """The size of the largest input channel, by that of the median one that is not zero."""
    if found.channels is None:
        return 1.0
    energy = found.channels[0][found.channels[0] > 0]
    return math.sqrt(float(energy.max() / energy.median())) if len(energy) else 1.0


def _dead(used: int, bits: int, values: int) -> bool:
    """Whether so few codes are in use that a bit, or a third of all bits, would be enough less."""
    return values >= _VALUES_PER_CODE * 2**bits and bits - math.log2(max(used, 1)) >= max(1.0, bits / 3)


def _rule(found: Measurement, key: str, value: int | None) -> str:
    return f"rules=[{{'pattern': {found.name!r}, {key!r}: {value}}}]"
