"""The learnable quantizers of a layer: `WeightQuantizer` and `ActivationQuantizer`.

Their parameters are vectors of dtype float32. They hold NaN until calibration or a state dict
gives them values; `calibrated` says which.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import ModelError
from .formula import center, levels
from .functional import quantize_activation, quantize_weight, snap_scale

_SMALLEST_SCALE = 1e-8
_TILE = 2**20  # elements in a copy
_ON_A_BOUND = 1e-4  # codes: calibration often puts a bound on the largest value, and rounding moves it a little


def wide(tensor: Tensor) -> Tensor:
    """float32, or float64 for float64."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def is_shard(tensor: Tensor) -> bool:
    """True for a DTensor, as FSDP2 makes of parameters."""
    return hasattr(tensor, "device_mesh")


def result_dtype(x: Tensor) -> torch.dtype:
    """The dtype of what x is quantized to: its own; under autocast the one to which the layer would cast anyway."""
    cast = x.dtype == torch.float32 and not x.is_meta and torch.is_autocast_enabled(x.device.type)
    return torch.get_autocast_dtype(x.device.type) if cast else x.dtype


def processes() -> int:
    """How many take part under `torch.distributed`; 1 without it."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def _norm(rows: Tensor, dims: tuple[int, ...]) -> Tensor:
    """Euclidean norm over `dims`, kept. Over all of them it goes by rows first, for speed and accuracy."""
    wide_dtype = torch.promote_types(rows.dtype, torch.float32)
    if len(dims) == rows.ndim:
        rows = torch.linalg.vector_norm(rows, dim=dims[1:] or None, keepdim=True, dtype=wide_dtype)
    if 0 in dims or rows.dtype == wide_dtype or rows.numel() <= _TILE or not rows.is_cpu:
        norm: Tensor = torch.linalg.vector_norm(rows, dim=dims, keepdim=True, dtype=wide_dtype)
        return norm
    # torch would make a wide copy of all of them first.
    parts = torch.split(rows, max(1, _TILE * len(rows) // rows.numel()))
    return torch.cat([torch.linalg.vector_norm(part, dim=dims, keepdim=True, dtype=wide_dtype) for part in parts])


class Quantizer(nn.Module):
    """What all quantizers share. Not used by itself."""

    calibrated: bool

    def __init__(self, bits: int, rounding: str, gamma: float, sigma: float, temperature: float) -> None:
        super().__init__()
        self.bits = bits
        self.rounding = rounding
        self.gamma = gamma
        self.sigma = sigma
        self.temperature = temperature

    @property
    def levels(self) -> int:
        """`R = 2**bits - 1`, the last code."""
        return levels(self.bits)

    def result_dtype(self, x: Tensor) -> torch.dtype:
        return result_dtype(x)

    def _options(self, x: Tensor) -> dict[str, Any]:
        """What the quantizing functions take besides tensors."""
        # The soft quantizer trains one function and deploys another: rounding.
        rounding = "ste" if self.rounding == "soft" and not self.training else self.rounding
        return {
            "bits": self.bits,
            "rounding": rounding,
            "gamma": self.gamma,
            "sigma": self.sigma,
            "temperature": self.temperature,
            "dtype": self.result_dtype(x),
        }

    def extra_repr(self) -> str:
        state = "" if self.calibrated else ", not calibrated"
        return f"bits={self.bits}, rounding={self.rounding!r}{state}"


def write_meaning(state_dict: Any, prefix: str, meaning: dict[str, Any]) -> None:
    """Note in the metadata of a state dict what the values of a module are for."""
    if hasattr(state_dict, "_metadata"):
        state_dict._metadata[prefix[:-1]] |= meaning


def read_meaning(metadata: Any, own: dict[str, Any]) -> dict[str, Any]:
    """What the metadata of a module in a state dict say of it; the module's own where they say nothing."""
    return {key: metadata.get(key, value) for key, value in own.items()}


class BoundedQuantizer(Quantizer):
    """Bounds `lower` < `upper`, each of shape (size,). Not used by itself."""

    def __init__(
        self, bits: int, size: int, rounding: str, gamma: float, sigma: float, temperature: float, device: Any
    ) -> None:
        super().__init__(bits, rounding, gamma, sigma, temperature)
        self._calibrated = False
        self.lower = nn.Parameter(torch.full((size,), torch.nan, device=device, dtype=torch.float32))
        self.upper = nn.Parameter(torch.full((size,), torch.nan, device=device, dtype=torch.float32))

    @property
    def calibrated(self) -> bool:  # type: ignore[override]
        """True once the parameters have values; looks at them anew until they do."""
        if not self._calibrated and not torch.compiler.is_exporting():
            self.finish()
        return self._calibrated

    def finish(self, loaded: bool = False) -> None:
        """Take note of values that were just written to the parameters. Those of a sharded quantizer were noted before it
        was sharded, and a look at them would wait for the other processes.

        Args:
            loaded: the values come from a state dict, where training may have turned the sign of a scale, which means
                nothing. In memory that nobody has set, as after `to_empty`, such a scale tells that it has no values.
        """
        if not self.lower.is_meta and not is_shard(self.lower):
            values = torch.cat([parameter.detach().float() for parameter in self.parameters()])
            scale = self._parameters.get("scale")
            positive = scale is None or loaded or bool((scale > 0).all())
            self._calibrated = positive and bool(values.isfinite().all() and (self.lower < self.upper).all())

    def _meaning(self) -> dict[str, Any]:
        """What the values of the parameters are for."""
        return {"bits": self.bits}

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        write_meaning(destination, prefix, self._meaning())

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, local_metadata: Any, strict: bool, *lists: list[str]
    ) -> None:
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, *lists)
        self.finish(loaded=f"{prefix}scale" in state_dict)
        given = read_meaning(local_metadata, self._meaning())
        if strict and given != self._meaning():
            lists[-1].append(
                f"{prefix[:-1]} is of a model with {given}, and here it has {self._meaning()}. Quantize with the config of that "
                "model: hf_daq.apply_daq(model, saved.daq_config); for other bits load it without the keys that have '_quant.' in "
                "them, with strict=False, and calibrate"
            )

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        """As of any module, but no cast makes bounds and scales narrower than float32: it would move every code."""

        def wide(tensor: Tensor) -> Tensor:
            result: Tensor = fn(tensor)
            narrower = result.is_floating_point() and result.itemsize < 4
            return tensor.to(result.device) if narrower and tensor.itemsize >= 4 else result

        return super()._apply(wide, recurse)  # type: ignore[no-untyped-call]

    def outside(self, positions: Tensor) -> Tensor:
        """Which values are clipped, from their `positions`; not those on a bound."""
        outside: Tensor = (positions < -_ON_A_BOUND) | (positions > self.levels + _ON_A_BOUND)
        return outside


class WeightQuantizer(BoundedQuantizer):
    """Weights of shape (channels, ...) to `|scale| * (q - c) / c`. On the grid "odd" `c = R / 2`: 2**bits symmetric values
    without a zero (paper). On "integer" `c = 2**(bits - 1)`, which is the code of 0. On "ternary", 2 bits, `R = 2` and
    `c = 1`: -1, 0 and 1.

    lower, upper: bounds, shape (rows,), in units of the weight's standard deviation around its mean
        (`normalization="standardize"`, the paper) or of its root mean square around zero ("scale"). These statistics
        are constants in the backward. A row is the whole tensor, an output channel, or `group_size` columns of one
        (the last group of a channel may be shorter), and rows = 1, channels, or channels * groups.
    scale: shape as the bounds; the paper's beta, the output scale of the layer, folded into the weight.
    shift: shape (channels,), added to the bias of the layer, or None.

    Args:
        shape: of the weight, (channels, ...).
        granularity: "tensor", "channel" or "group".
    """

    def __init__(
        self,
        bits: int,
        shape: Sequence[int],
        *,
        granularity: str = "tensor",
        group_size: int | None = None,
        grid: str = "odd",
        scale_dtype: str | None = None,
        shift: bool = False,
        normalization: str = "scale",
        rounding: str = "daq",
        gamma: float = 2.0,
        sigma: float = 1.0,
        temperature: float = 4.0,
        device: Any = None,
    ) -> None:
        channels, columns = shape[0], math.prod(shape[1:])
        self.granularity, self.grid, self.scale_dtype = granularity, grid, scale_dtype
        self.group_size = min(group_size or columns, columns)
        self.groups = -(-columns // self.group_size)
        self.padding = self.groups * self.group_size - columns
        rows = 1 if granularity == "tensor" else channels * self.groups
        super().__init__(bits, rows, rounding, gamma, sigma, temperature, device)
        self.normalization = normalization
        self.scale = nn.Parameter(torch.full((rows,), torch.nan, device=device, dtype=torch.float32))
        self.shift = (
            nn.Parameter(torch.full((channels,), torch.nan, device=device, dtype=torch.float32)) if shift else None
        )

    def _meaning(self) -> dict[str, Any]:
        return super()._meaning() | {"grid": self.grid, "normalization": self.normalization}

    @property
    def levels(self) -> int:
        """R, the last code."""
        return levels(self.bits, self.grid)

    def fits(self, shape: Sequence[int]) -> bool:
        """Whether the bounds, scales and shifts are for a weight of this shape."""
        rows = 1 if self.granularity == "tensor" else shape[0] * self.groups
        columns = self.groups * self.group_size - self.padding
        shifts = shape[0] if self.shift is None else len(self.shift)
        return (len(self.scale), columns, shifts) == (rows, math.prod(shape[1:]), shape[0])

    @property
    def center(self) -> float:
        """The code of a weight of 0."""
        return center(self.bits, self.grid)

    @property
    def output_scale(self) -> Tensor:
        """`scale` as the layer uses it: rounded for `scale_dtype`."""
        return self.rounded_scale(self.scale)

    def rounded_scale(self, scale: Tensor) -> Tensor:
        if self.scale_dtype is None:
            return scale
        return snap_scale(scale, bits=self.bits, grid=self.grid, dtype=self.scale_dtype)

    def _options(self, x: Tensor) -> dict[str, Any]:
        return super()._options(x) | {"grid": self.grid}

    def shifted(self, bias: Tensor | None, dtype: torch.dtype) -> Tensor | None:
        """The bias of the quantized layer, in the dtype of its weight."""
        if self.shift is None:
            return bias
        shift = self.shift.to(dtype)
        return shift if bias is None else bias + shift

    def rows(self, weight: Tensor) -> Tensor:
        """The weight with a row of bounds for each entry of its first dimension (or for the whole tensor). Groups have
        shape (rows, group_size), with zeros after the last column of a channel."""
        if self.groups == 1:
            return weight
        flat = weight.flatten(1)
        return (F.pad(flat, (0, self.padding)) if self.padding else flat).reshape(-1, self.group_size)

    def unrows(self, rows: Tensor, shape: Sequence[int]) -> Tensor:
        """Inverse of `rows`, for a weight of this shape."""
        if self.groups == 1:
            return rows
        flat = rows.view(shape[0], -1)
        return flat[:, : flat.shape[1] - self.padding].reshape(shape)

    def valid(self, rows: Tensor) -> Tensor | None:
        """1 where `rows` hold a weight and 0 where they hold padding, shape (rows, group_size); None without padding."""
        if self.padding == 0:
            return None
        count = self.groups * self.group_size
        flat = torch.arange(count, device=rows.device) < count - self.padding
        return flat.float().view(self.groups, -1).repeat(rows.shape[0] // self.groups, 1)

    def statistics(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Offset and unit of the bounds for this weight, from `rows`, each broadcastable to it. No gradient."""
        rows = rows.detach()
        whole = self.granularity == "tensor"
        dims = tuple(range(0 if whole else 1, rows.ndim))
        count: Tensor | int = rows.numel() if whole else math.prod(rows.shape[1:])
        if self.padding:
            sizes = torch.full((self.groups, 1), float(self.group_size), device=rows.device, dtype=torch.float32)
            sizes[-1] -= self.padding
            count = sizes.repeat(rows.shape[0] // self.groups, 1)
        wide_dtype = torch.promote_types(rows.dtype, torch.float32)
        offset = torch.zeros(
            (1 if whole else rows.shape[0], *(1,) * (rows.ndim - 1)), device=rows.device, dtype=wide_dtype
        )
        if self.normalization == "standardize":
            offset = rows.sum(dims, keepdim=True, dtype=wide_dtype) / count
            valid = self.valid(rows)
            rows = rows - offset if valid is None else (rows - offset) * valid
            count = torch.clamp(count - 1, min=1) if isinstance(count, Tensor) else max(count - 1, 1)
        return offset, _norm(rows, dims).div_(count**0.5).clamp_min_(_SMALLEST_SCALE)

    @torch.no_grad()
    def bounds(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Lower and upper bounds in units of the weight, broadcastable to `rows(weight)`."""
        offset, unit = self.statistics(self.rows(weight))
        return offset + unit * self.lower.view_as(offset), offset + unit * self.upper.view_as(offset)

    @torch.no_grad()
    def set_bounds(self, parts: Iterable[Tensor], outermost: Tensor) -> None:
        """Put the bounds where the code 0 of this weight, given in parts of some channels, stands for `-outermost`, shape
        (rows,), and zero is at `center`. With the granularity "tensor" there is one part."""
        statistics = zip(*(self.statistics(self.rows(part)) for part in parts), strict=True)
        offset, unit = (torch.cat(values).flatten() for values in statistics)
        self.lower.copy_((-outermost - offset) / unit)
        self.upper.copy_((outermost * (self.levels / self.center - 1) - offset) / unit)

    @torch.no_grad()
    def positions(self, weight: Tensor) -> Tensor:
        """Where weights lie between the codes, before rounding: the bounds are at 0 and `2**bits - 1`."""
        start, end = self.bounds(weight)
        rows = wide(self.rows(weight))
        return self.unrows((rows - start) / (end - start) * self.levels, weight.shape)

    def forward(self, weight: Tensor) -> Tensor:
        return self._quantized(weight, self.lower, self.upper, self.output_scale, self._options(weight))

    def looked_up(self, table: Tensor, indices: Tensor, padding_idx: int | None) -> Tensor:
        """Rows of a quantized table, of which only these are quantized: `F.embedding(indices, self(table), padding_idx)`,
        with its gradients, and under autocast too in the dtype of the table. The granularity is not "tensor".

        Args:
            table: shape (rows, columns).
            indices: integers of any shape.
            padding_idx: row that learns nothing; None without one.
        """
        if not self.fits(table.shape):
            raise ModelError(
                f"the quantized embedding has {len(table)} rows now, and bounds for {len(self.scale) // self.groups}: before its size "
                "changes write hf_daq.remove_daq(model), after it apply_daq and calibrate anew"
            )
        flat = indices.flatten()
        weight = F.embedding(flat, table, padding_idx)
        if flat.numel() > 0:
            values = (value.view(len(table), -1) for value in (self.lower, self.upper, self.output_scale))
            lower, upper, scale = (F.embedding(flat, value, padding_idx).flatten() for value in values)
            weight = self._quantized(weight, lower, upper, scale, self._options(weight) | {"dtype": weight.dtype})
        return weight.view(*indices.shape, table.shape[1])

    @torch.no_grad()
    def codes(self, weight: Tensor) -> Tensor:
        """The codes q of a weight, uint8 of its shape."""
        options = self._options(weight) | {"rounding": "ste", "dtype": None}
        scale = torch.full_like(self.scale, self.center)
        centered = self._quantized(wide(weight), self.lower, self.upper, scale, options)
        codes: Tensor = (centered + self.center).round_().to(torch.uint8)
        return codes

    def _quantized(
        self, weight: Tensor, lower: Tensor, upper: Tensor, scale: Tensor, options: dict[str, Any]
    ) -> Tensor:
        rows = self.rows(weight)
        offset, unit = (value.view(-1) for value in self.statistics(rows))
        quantized = quantize_weight(rows, lower, upper, scale, offset, unit, **options)
        return self.unrows(quantized, weight.shape)


class ActivationQuantizer(BoundedQuantizer):
    """Layer inputs of any shape to `(q - zero_point) / R`.

    smooth: what each channel of the input is divided by before it is rounded, shape (columns,), float32, powers of two, so that
        this is exact; the weight is multiplied with it. None: nothing is divided.
    lower, upper: bounds of the divided input, shape (1,). `lower` is exactly 0 and frozen where calibration saw no negative value (the
        paper); else `signed` is True, both learn, and the bounds are moved so that the real zero is a code:
        `zero_point = round(-lower / (upper - lower) * R)`, with the identity as its gradient.
    """

    def __init__(
        self,
        bits: int,
        *,
        rounding: str = "daq",
        gamma: float = 2.0,
        sigma: float = 2.0,
        temperature: float = 4.0,
        device: Any = None,
    ) -> None:
        super().__init__(bits, 1, rounding, gamma, sigma, temperature, device)
        self.smooth: Tensor | None
        self.register_buffer("smooth", None)
        self.signed = True

    def smoothed(self, x: Tensor) -> Tensor:
        """The input as it is rounded."""
        smooth = self.smooth
        if smooth is None:
            return x
        if x.shape[-1] != len(smooth):  # a single column would be taken for all
            raise RuntimeError(
                f"an input of shape {tuple(x.shape)} and a weight of {len(smooth)} columns: their shapes cannot be multiplied"
            )
        return x / smooth.to(x.device, x.dtype)

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, local_metadata: Any, strict: bool, *lists: list[str]
    ) -> None:
        """`smooth` is there afterwards, or not, as in the state dict: like bounds it is found by calibration. Without metadata, as of
        a dict of parameters alone, what is not there is a missing key."""
        found = state_dict.get(f"{prefix}smooth")
        if found is not None or "bits" in local_metadata:
            self.divide_by(None if found is None else found.shape)
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, *lists)

    def divide_by(self, shape: Sequence[int] | None) -> None:
        """Make room for factors of this shape, or for none; those that are there stay."""
        if shape is None:
            self.smooth = None
        elif self.smooth is None:
            self.smooth = torch.ones(tuple(shape), device=self.lower.device, dtype=torch.float32)

    def finish(self, loaded: bool = False) -> None:
        super().finish(loaded)
        if self.smooth is not None:
            self.smooth = self.smooth.float()  # transformers gives buffers the dtype of the model
        if self._calibrated and not is_shard(self.lower):
            was_fixed, self.signed = not self.signed, bool(self.lower != 0)
            if not self.signed:
                self.lower.requires_grad_(False)
            elif (
                was_fixed
            ):  # a bound that was fixed at zero learns again if the other one does; what a user froze stays so
                self.lower.requires_grad_(self.upper.requires_grad)

    @property
    def span(self) -> Tensor:
        """Width of the quantized range, shape (1,): one unit of the output in units of the input."""
        return wide(self.upper) - wide(self.lower)

    @property
    def zero_point(self) -> int:
        """The code of the real zero."""
        step = self.span.detach().clamp_min(1e-12) / self.levels
        return int((-self.lower.detach() / step).round().clamp(0, self.levels).nan_to_num())  # NaN: not calibrated

    @torch.no_grad()
    def codes(self, x: Tensor) -> Tensor:
        """The codes of inputs, uint8 of their shape; `forward` gives `(codes - zero_point) / R`."""
        options = self._options(x) | {"rounding": "ste", "dtype": None}
        values = quantize_activation(wide(self.smoothed(x)), self.lower, self.upper, **options)
        codes: Tensor = (values * self.levels + self.zero_point).round_().to(torch.uint8)
        return codes

    @torch.no_grad()
    def positions(self, x: Tensor) -> Tensor:
        """Where inputs lie between the codes, before rounding: the bounds, moved so that zero is a code, are at 0 and
        `2**bits - 1`."""
        positions: Tensor = wide(self.smoothed(x)) / (self.span / self.levels) + self.zero_point
        return positions

    def forward(self, x: Tensor) -> Tensor:
        return self.rounded(self.smoothed(x))

    def rounded(self, x: Tensor) -> Tensor:
        """The output for an input that is `smoothed`."""
        # A replica of DataParallel may share the quantizer of a layer on the first device.
        lower, upper = self.lower.to(x.device), self.upper.to(x.device)
        return quantize_activation(x, lower, upper, **self._options(x))
