"""The bounds that weights start with: native.cpp, torch, and a plain search in float64 choose the same."""

import os

import pytest
import torch

from hf_daq.nn import init, search
from hf_daq.nn.functional import dequantize_weight
from hf_daq.nn.kernels import compiler
from hf_daq.nn.quantizers import WeightQuantizer

SHAPES = [
    (3, 70, "group", 32),
    (5, 129, "group", 43),
    (4, 96, "group", 16),
    (6, 37, "channel", None),
    (2, 5000, "channel", None),
    (4, 61, "tensor", None),
]
HERE = [
    "torch",
    pytest.param(
        "native", marks=pytest.mark.skipif(compiler() is None or os.name == "nt", reason="no compiler of C++")
    ),
]


@pytest.fixture(params=HERE)
def way(request, monkeypatch):
    """Both ways, for weights of any size."""
    monkeypatch.setattr("hf_daq.nn.trust._agreed", {})
    monkeypatch.setattr(search, "_SMALL", 0 if request.param == "native" else 2**62)
    if request.param == "native":
        from hf_daq.nn import native

        monkeypatch.setattr(native, "available", lambda device: True)
        native.library.cache_clear()
        yield request.param
        native.library.cache_clear()
    else:
        yield request.param


def weight(shape, kind, dtype):
    generator = torch.Generator().manual_seed(sum(shape))
    w = torch.randn(shape, generator=generator)
    if kind == "tails":
        w = w / torch.rand(shape, generator=generator).clamp_min(0.05)
    if kind == "outlier":
        w[:, 0] *= 40
    if kind == "uneven":
        w = w.abs() - 0.3
    if kind == "zeros":
        w[0] = 0
    return (w * 0.02).to(dtype)


def plain(quantizer, w):
    """For each row, the errors of all candidates and the bounds, in float64."""
    rows = quantizer.rows(w)
    offset, unit = (value.double() for value in quantizer.statistics(rows))
    rows = rows.double().reshape(quantizer.lower.numel(), -1)
    valid = quantizer.valid(rows)
    valid = torch.ones_like(rows) if valid is None else valid.double()
    x = (rows - offset.reshape(-1, 1)) / unit.reshape(-1, 1) * valid
    center, levels = quantizer.center, quantizer.levels
    above = center / (levels - center)
    largest = torch.maximum(-x.amin(1), x.amax(1) * above).clamp_min(1e-3)[:, None]
    bounds = largest * torch.logspace(0, -1.5, 64, dtype=torch.float64)
    codes = ((x[:, None] / bounds[..., None] + 1) * center).sub(0.5).ceil().clamp(0, levels) - center
    along, energy = (codes * (x * valid)[:, None]).sum(2), (codes.square() * valid[:, None]).sum(2)
    errors = (x.square().sum(1)[:, None] - along.square() / energy.clamp_min(1e-30)).clamp_min(0)
    return bounds, errors, x.square().sum(1)[:, None]


@pytest.mark.parametrize("grid", ["odd", "integer"])
@pytest.mark.parametrize("bits", range(1, 9))
def test_bounds_are_those_of_a_plain_search(bits, grid, way):
    same = []
    for (rows, columns, granularity, group_size), kind in zip(
        SHAPES, ["normal", "tails", "outlier", "uneven", "normal", "zeros"], strict=True
    ):
        for normalization, dtype in (("scale", torch.bfloat16), ("standardize", torch.float32)):
            w = weight((rows, columns), kind, dtype)
            quantizer = WeightQuantizer(
                bits, w.shape, granularity=granularity, group_size=group_size, grid=grid, normalization=normalization
            )
            init.start_from_weight(quantizer, w, "mse")
            assert search.in_native(quantizer.rows(w), init.Grid(quantizer.levels, quantizer.center)) == (
                way == "native"
            )
            bounds, errors, energy = plain(quantizer, w)
            best = errors.amin(1, keepdim=True)
            at = (bounds / -quantizer.lower.double()[:, None] - 1).abs().argmin(1, keepdim=True)
            torch.testing.assert_close(
                bounds.gather(1, at)[:, 0], -quantizer.lower.detach().double(), rtol=1e-4, atol=0
            )
            slack = 0.1 if columns > 1024 and way == "torch" else 0.01  # it looks at a sample of long rows
            assert (errors.gather(1, at) <= best * (1 + search.TOLERANCE + slack) + 1e-6 * energy).all(), (
                kind,
                normalization,
            )
            widest = (errors <= best * (1 + search.TOLERANCE) + search._NOISE * energy).int().argmax(1, keepdim=True)
            same += (at == widest).flatten().tolist()
            check_scale(quantizer, w)
    assert sum(same) >= 0.9 * len(same)


def check_scale(quantizer, w):
    """No other scale is closer."""
    w = w.double()
    options = {"bits": quantizer.bits, "grid": quantizer.grid, "dtype": torch.float64}
    options["group_size"] = quantizer.group_size if quantizer.groups > 1 else None
    codes = quantizer.codes(w.to(torch.float32))
    error = [
        (w - dequantize_weight(codes, quantizer.scale * factor, **options)).square().sum() for factor in (1, 1.01, 0.99)
    ]
    assert error[0] <= min(error[1:]) * (1 + 1e-6)


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
@pytest.mark.parametrize("grid", ["odd", "integer"])
def test_rows_that_are_zero_or_on_the_grid(bits, grid, way):
    quantizer = WeightQuantizer(bits, (3, 40), granularity="channel", grid=grid)
    codes = torch.arange(2**bits).repeat(40)[:40]
    codes[: 2**bits] = torch.arange(min(2**bits, 40)) if bits < 6 else codes[: 2**bits]
    w = torch.stack([torch.zeros(40), (codes - quantizer.center) * 0.125, (codes - quantizer.center) * 2.0**-20])
    init.start_from_weight(quantizer, w, "mse")
    assert quantizer.calibrated
    quantized = quantizer(w).detach()
    assert quantized[0].abs().max() <= 1e-7
    if bits < 6:
        torch.testing.assert_close(quantized[1:], w[1:], rtol=1e-5, atol=0)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, 1e30])
def test_weights_whose_squares_are_not_finite_give_bounds_that_are_not(bad, way):
    quantizer = WeightQuantizer(4, (3, 40), granularity="channel")
    w = torch.randn(3, 40, generator=torch.Generator().manual_seed(0))
    w[1, 7] = bad
    init.start_from_weight(quantizer, w, "mse")
    assert quantizer.lower.isfinite().tolist() == [True, False, True]
    assert not quantizer.calibrated


def test_the_start_of_the_paper(way):
    quantizer = WeightQuantizer(3, (8, 30), granularity="group", group_size=12)
    w = torch.randn(8, 30, generator=torch.Generator().manual_seed(0))
    init.start_from_weight(quantizer, w, "3std")
    assert torch.equal(quantizer.upper.detach(), torch.full((24,), 3.0))
    check_scale(quantizer, w)


def test_transposed_and_half_precision_weights(way):
    for dtype in (torch.float16, torch.float32, torch.float64):
        w = torch.randn(60, 12, generator=torch.Generator().manual_seed(0)).to(dtype).t()
        one, other = (WeightQuantizer(4, w.shape, granularity="channel") for _ in range(2))
        init.start_from_weight(one, w, "mse")
        init.start_from_weight(other, w.float().contiguous(), "mse")
        torch.testing.assert_close(one.lower, other.lower, rtol=1e-4, atol=0)


@pytest.mark.skipif(compiler() is None or os.name == "nt", reason="no compiler of C++")
def test_statistics_of_another_shape_are_refused():
    rows, one = torch.randn(4, 8), torch.ones(3, 1)
    with pytest.raises(ValueError, match="statistics of the shape"):
        search.native_bounds(rows, one, one, init.Grid(15, 7.5), 1, 0, None)


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
@pytest.mark.parametrize("shift", [0.0, 0.6, 9.0], ids=["around zero", "above", "positive"])
def test_input_bounds_are_those_of_a_search_bin_by_bin(bits, shift):
    """With halves of steps among the bins, empty bins, and a second histogram with other weights."""
    values = torch.randn(4096, dtype=torch.float64, generator=torch.Generator().manual_seed(bits)) + shift
    values[:3] *= 4
    edge = 2.0 ** values.abs().max().log2().ceil()
    centers = (torch.arange(512, dtype=torch.float64) + 0.5) * (2 * edge / 512) - edge
    places = ((values + edge) * (256 / edge)).long().clamp_(0, 511)
    counts = torch.stack([torch.bincount(places, part, minlength=512) for part in (values.new_ones(4096), values**2)])
    low, high = float(values.min()), float(values.max())
    levels, errors = 2**bits - 1, {}
    shares = search.shares(torch.device("cpu"), torch.float64).tolist()
    for lower in [low * share for share in shares[::2]] if low < 0 else [0.0]:
        for upper in [high * share for share in (shares[::2] if low < 0 else shares)]:
            step = (upper - lower) / levels
            zero = round(-lower / step)
            codes = (centers / step + zero - 0.5).ceil().clamp(0, levels)
            found = (counts * ((codes - zero) * step - centers).square()).sum(1)
            errors[lower, upper] = found.log().mean().exp().item()
    near = [bounds for bounds, error in errors.items() if error <= min(errors.values()) * (1 + search.TOLERANCE)]
    assert init.activation_bounds(centers, counts, low, high, bits) == pytest.approx(
        max(near, key=lambda bounds: bounds[1] - bounds[0])
    )
