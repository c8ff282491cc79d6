"""`DaqConfig`: what is quantized, to how many bits, and how. Standard library only."""

from __future__ import annotations

import dataclasses
import difflib
import functools
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import InitVar, dataclass, field
from fnmatch import fnmatchcase
from typing import Any, Literal, get_args

from .errors import ConfigError

FORMAT_VERSION = 2
QUANT_METHOD = "daq"

Rounding = Literal["daq", "ste", "soft"]
Granularity = Literal["tensor", "channel", "group"]
Normalization = Literal["scale", "standardize"]
Grid = Literal["auto", "odd", "integer", "ternary"]
Init = Literal["mse", "3std"]
ActivationScale = Literal["static", "token"]
ScaleDtype = Literal["float16", "bfloat16"]

_CHOICES: dict[str, tuple[str, ...]] = {
    "rounding": get_args(Rounding),
    "weight_granularity": get_args(Granularity),
    "weight_grid": get_args(Grid),
    "weight_normalization": get_args(Normalization),
    "weight_init": get_args(Init),
    "activation_init": get_args(Init),
    "activation_scale": get_args(ActivationScale),
}
TERNARY = 1.6
"""Bits of a weight with three values in files: five in a byte."""
_MISSING = 0  # bits that were not given
_POSITIVE = ("weight_gamma", "weight_sigma", "activation_gamma", "activation_sigma", "temperature")
_RULE_KEYS = ("pattern", "skip", "bits", "weight_bits", "activation_bits")


def _known_keywords_only(cls: Any) -> Any:
    """Let a dataclass refuse an unknown keyword with the names that are close to it."""
    init = cls.__init__

    @functools.wraps(init)
    def checked(self: Any, *args: Any, **kwargs: Any) -> None:
        known = {"bits", *(entry.name for entry in dataclasses.fields(cls))}
        for key in kwargs:
            if key not in known:
                raise ConfigError(f"unknown key {key!r}{did_you_mean(key, known)}; keys: {', '.join(sorted(known))}")
        init(self, *args, **kwargs)

    cls.__init__ = checked
    return cls


@_known_keywords_only
@dataclass
class DaqConfig:
    """How a model is quantized with Distance-aware Quantization (Kim, Lee, Ham, ICCV 2021).

        config = hf_daq.DaqConfig(weight_bits=2, activation_bits=4, rules=[{"pattern": "layer1.*", "bits": 8}])
        hf_daq.apply_daq(model, config)

    Args:
        bits: number of bits for both weights and layer inputs, 1 to 8.
        weight_bits: number of bits for weights, 1 to 8.
        activation_bits: number of bits for layer inputs, 1 to 8; None quantizes weights only.
        rounding: gradient of rounding. "daq": follows the distance to the codes (paper, equation of section 3);
            "ste": straight-through, the identity; "soft": the soft assignment at a fixed `temperature` in training,
            rounding in evaluation. The forward of "daq" and "ste" is the same exact rounding.
        weight_gamma, weight_sigma, activation_gamma, activation_sigma: gamma and sigma of the gradient of "daq";
            gamma scales it, sigma gives it its shape. The defaults are the paper's.
        temperature: fixed temperature of "soft"; the other roundings do not use it.
        weight_granularity: "tensor": one pair of bounds and one scale a layer (paper); "channel": one an output channel;
            "group": one for every `group_size` input columns of an output channel.
        group_size: number of columns; implies `weight_granularity="group"`, whose default is 128. The last group of a
            channel may be shorter.
        weight_grid: the values of b bits. "odd": odd multiples of a step, as many below 0 as above it, and no 0 (paper);
            "integer": whole multiples from -2^(b-1) to 2^(b-1) - 1 with 0 among them, which integer kernels and formats
            of b bits read as they are; at 1 bit -1 and 1 too. "auto": "odd" for 1 and 2 bits, where it starts nearer to the
            float network, "integer" from 3 bits on, which is as accurate after training. "ternary", with `weight_bits=2`: -1, 0
            and 1 times a scale, 1.6 bits in packed files; layers with other bits have the grid of "auto".
        weight_normalization: "scale": the bounds are in units of the weight's root mean square, and quantization
            starts where the float weights are; "standardize": the weight's mean is removed as well (paper).
        scale_dtype: "float16" or "bfloat16": scales of weights are rounded in every forward, in training too, so that files
            whose steps have this dtype (GGUF: float16) hold the weights that were trained, bit for bit. At 4 and 5 bits of
            the grid "odd" steps have 7 and 6 significant bits, as such files have a smallest value beside the step. For
            weights only; None: scales are float32.
        weight_init, activation_init: initial bounds. "mse": the widest bounds whose squared error is close to the
            smallest for this number of bits; "3std": three standard deviations (paper).
        activation_scale: "static": layer inputs have one pair of bounds a layer, from calibration, and they learn (paper);
            "token": each row of the last dimension has a scale of its own, found as the layer computes, so that its largest
            magnitude just fits (symmetric, dynamic quantization, as `Int8DynamicActivationInt8WeightConfig` of torchao). That
            needs no calibration; rounding has the gradient of `rounding`, and scales have none. For linear layers, with
            `activation_bits` from 2 on.
        smooth: let `calibrate` divide channels of static inputs of linear layers by powers of two, and multiply the columns of their
            weights with these (SmoothQuant, Xiao et al., ICML 2023), where single channels are outliers and it lowers the error of
            the output clearly. Which layers, `layers` says. The float weights stay what they are.
        bias_correction: give every quantized convolution, and every linear layer with a bias, a learnable shift of its
            output channels, started so that their mean is that of the float layer (Nagel et al., ICCV 2019). Free at run
            time; the paper does without.
        first_last_bits: number of bits for the first convolution (or patch embedding) and the classifier; None keeps them in
            full precision.
        embedding_bits: number of bits for the tables of `nn.Embedding`, weights only; None keeps them in full precision. Each
            row has its own bounds and scale, also at `weight_granularity="tensor"`, or one for every `group_size` columns.
        rules: exceptions, e.g. `[{"pattern": "layer1.*", "weight_bits": 8}, {"pattern": "re:.*downsample.*",
            "skip": True}]`. A pattern is a glob, or a regular expression after "re:", over module names; it also
            covers every module below the ones it names. The first rule that matches decides; keys it leaves out keep
            the values of the config. A rule is stronger than the default for first and last layers. It gives bits to
            embeddings if `embedding_bits` does too, or if its pattern matches nothing else.
        modules_to_not_convert: patterns of modules that stay in full precision, before any rule.
        layers: the resolved bits, one entry a quantized layer, and `same_input_as`: the layer whose quantizer this one
            uses for its input, and `smooth`: true where that divides its channels. Written by `apply_daq` and `calibrate`; if given, it alone decides.
        low_memory: a training step does not keep quantized inputs and weights for the backward but computes them once
            more, with the same results.
        packed: weights are codes of a few bits, for inference. Written by `pack`.
        dequantize: not a part of the quantization, and not saved: `from_pretrained` of transformers gives back a plain
            model with the quantized weights in it.

    A config does not change: `config.replace(...)` gives another one.

    Raises:
        ConfigError: a value out of range, or a key that does not exist.
    """

    bits: InitVar[int | None] = None
    weight_bits: int = _MISSING
    activation_bits: int | None = None
    rounding: Rounding = "daq"
    weight_gamma: float = 2.0
    weight_sigma: float = 1.0
    activation_gamma: float = 2.0
    activation_sigma: float = 2.0
    temperature: float = 4.0
    weight_granularity: Granularity = "tensor"
    group_size: int | None = None
    weight_grid: Grid = "auto"
    scale_dtype: ScaleDtype | None = None
    weight_normalization: Normalization = "scale"
    weight_init: Init = "mse"
    activation_init: Init = "mse"
    activation_scale: ActivationScale = "static"
    smooth: bool = True
    bias_correction: bool = True
    first_last_bits: int | None = None
    embedding_bits: int | None = None
    rules: Sequence[Mapping[str, Any]] = ()
    modules_to_not_convert: Sequence[str] = ()
    layers: Mapping[str, Mapping[str, Any]] | None = None
    low_memory: bool = False
    packed: bool = False
    dequantize: bool = field(default=False, compare=False)

    quant_method = QUANT_METHOD

    def __setattr__(self, name: str, value: Any) -> None:
        if "dequantize" in self.__dict__ and name != "dequantize":  # which transformers sets on a config it has read
            raise ConfigError(f"a DaqConfig does not change; write config = config.replace({name}=...)")
        super().__setattr__(name, value)

    def __post_init__(self, bits: int | None) -> None:
        if bits is not None:
            if self.weight_bits != _MISSING or self.activation_bits is not None:
                raise ConfigError(
                    "bits sets weight_bits and activation_bits at once; pass either bits, or weight_bits and "
                    "activation_bits, e.g. DaqConfig(weight_bits=2, activation_bits=4)"
                )
            object.__setattr__(self, "weight_bits", bits)
            object.__setattr__(self, "activation_bits", bits)
        elif self.weight_bits in (_MISSING, None):
            raise ConfigError("the number of bits is missing; write DaqConfig(bits=3) or DaqConfig(weight_bits=3)")
        check_bits("weight_bits", self.weight_bits)
        if self.activation_bits is not None:
            check_bits("activation_bits", self.activation_bits)
        for name in ("first_last_bits", "embedding_bits"):
            if getattr(self, name) is not None:
                check_bits(name, getattr(self, name))
        for name, choices in _CHOICES.items():
            value = getattr(self, name)
            if value not in choices:
                raise ConfigError(f"{name}={value!r} is not one of {', '.join(map(repr, choices))}")
        for name in ("smooth", "bias_correction", "low_memory", "packed", "dequantize"):
            if not isinstance(getattr(self, name), bool):
                raise ConfigError(f"{name}={getattr(self, name)!r} must be True or False")
        if self.group_size is not None or self.weight_granularity == "group":
            self._check_groups(128 if self.group_size is None else self.group_size)
        for name in _POSITIVE:
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value <= 100:
                raise ConfigError(f"{name}={value!r} must be a number above 0 and at most 100")
            object.__setattr__(self, name, float(value))
        object.__setattr__(self, "rules", tuple(_checked_rule(rule) for rule in _sequence("rules", self.rules)))
        patterns = _sequence("modules_to_not_convert", self.modules_to_not_convert)
        object.__setattr__(self, "modules_to_not_convert", tuple(_checked_pattern(pattern) for pattern in patterns))
        if self.layers is not None:
            object.__setattr__(self, "layers", _checked_layers(self.layers))
        if self.activation_scale == "token":
            self._check_token_bits()
        if self.weight_grid == "ternary":
            self._check_ternary()
        if self.scale_dtype is not None:
            self._check_scale_dtype()

    def _check_groups(self, size: object) -> None:
        if self.weight_granularity == "channel":
            raise ConfigError(f'weight_granularity="channel" has no groups; leave out group_size={size!r}')
        if isinstance(size, bool) or not isinstance(size, int) or not 2 <= size <= 2**20:
            raise ConfigError(f"group_size={size!r} must be a whole number from 2 on, such as 64 or 128")
        object.__setattr__(self, "weight_granularity", "group")
        object.__setattr__(self, "group_size", size)

    def _input_bits(self) -> dict[str, int | None]:
        """All that is said of bits of layer inputs, and where."""
        given = {"activation_bits": self.activation_bits}
        given |= {f"rule {rule['pattern']!r}": rule.get("activation_bits", rule.get("bits")) for rule in self.rules}
        return given | {f"layers[{name!r}]": entry["activation_bits"] for name, entry in (self.layers or {}).items()}

    def _check_token_bits(self) -> None:
        for what, bits in (self._input_bits() | {"first_last_bits": self.first_last_bits}).items():
            if bits == 1 and self.activation_bits is not None:
                raise ConfigError(
                    f'activation_scale="token" is symmetric, which takes 2 bits or more, and {what} gives inputs 1 bit; write '
                    "activation_bits=8"
                )

    def _check_ternary(self) -> None:
        given = {self.weight_bits, self.first_last_bits, self.embedding_bits}
        given |= {rule.get("weight_bits", rule.get("bits")) for rule in self.rules}
        given |= {entry["weight_bits"] for entry in (self.layers or {}).values()}
        if 2 not in given:
            raise ConfigError(
                f'weight_grid="ternary" is for weights of 2 bits, and none are: weight_bits={self.weight_bits}; write '
                'DaqConfig(weight_bits=2, weight_grid="ternary")'
            )

    def _check_scale_dtype(self) -> None:
        if self.scale_dtype not in get_args(ScaleDtype):
            raise ConfigError(f"scale_dtype={self.scale_dtype!r} is not one of 'float16', 'bfloat16', None")
        if self.activation_scale == "token":  # its scales of weights have no bounds in them
            return
        for what, bits in self._input_bits().items():
            if bits is not None:
                raise ConfigError(
                    f"scale_dtype={self.scale_dtype!r} is for weights only, as the scale of a layer with quantized inputs has "
                    f"their bounds in it, and {what} quantizes inputs to {bits} bits; write weight_bits={bits}, or leave out "
                    "scale_dtype"
                )

    @classmethod
    def paper(cls, bits: int | None = None, **kwargs: Any) -> DaqConfig:
        """The settings of the paper: standardized weights with bounds at +-3, activation bounds at 3 standard
        deviations, per tensor, odd multiples of a step, no smoothing or bias correction, gamma 2, sigma 1 for weights and 2 for activations.
        Arguments as `DaqConfig`."""
        inits = {"weight_normalization": "standardize", "weight_init": "3std", "activation_init": "3std"}
        settings: dict[str, Any] = {**inits, "weight_grid": "odd", "smooth": False, "bias_correction": False, **kwargs}
        return cls(bits, **settings)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> DaqConfig:
        """Inverse of `to_dict`; with the key `preset: paper`, `DaqConfig.paper` of the other keys.

        Raises:
            ConfigError: a value out of range, an unknown key, or a newer format version.
        """
        if not isinstance(values, Mapping):
            raise ConfigError(f"a quantization config must be a mapping, got {type(values).__name__}")
        values = dict(values)
        method = values.pop("quant_method", QUANT_METHOD)
        if method != QUANT_METHOD:
            raise ConfigError(f"quant_method={method!r} is not {QUANT_METHOD!r}: these are not DAQ settings")
        version = values.pop("format_version", FORMAT_VERSION)
        if isinstance(version, bool) or not isinstance(version, int) or not 1 <= version <= FORMAT_VERSION:
            raise ConfigError(
                f"format_version={version!r} is not known here (this hf_daq reads 1 to {FORMAT_VERSION}); "
                "install a newer hf_daq: pip install -U hf_daq"
            )
        if version == 1:  # which knew no other grid
            values.setdefault("weight_grid", "odd")
        preset = values.pop("preset", None)
        if preset not in (None, "paper"):
            raise ConfigError(f"preset={preset!r} must be 'paper', or be left out")
        return cls.paper(**values) if preset else cls(**values)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types: every field, the quantization method and the format version."""
        names = [entry.name for entry in dataclasses.fields(self) if entry.name != "dequantize"]
        fields = {name: _plain(getattr(self, name)) for name in names}
        return {"quant_method": QUANT_METHOD, "format_version": FORMAT_VERSION, **fields}

    def grid(self, bits: int) -> str:
        """ "odd", "integer" or "ternary", of a layer with weights of this many bits."""
        if self.weight_grid in ("odd", "integer") or (self.weight_grid, bits) == ("ternary", 2):
            return self.weight_grid
        return "odd" if bits <= 2 else "integer"

    def get_loading_attributes(self) -> dict[str, Any]:
        """What transformers takes over from a config that is passed for an already quantized checkpoint."""
        return {"dequantize": True} if self.dequantize else {}

    def replace(self, **changes: Any) -> DaqConfig:
        """A copy with some fields changed, validated like a new one."""
        return dataclasses.replace(self, **{"bits": None, **changes})

    def per_row(self) -> DaqConfig:
        """The config for a table: with a scale for each row instead of one for all."""
        return self.replace(weight_granularity="channel") if self.weight_granularity == "tensor" else self

    def scale_count(self, shape: Sequence[int]) -> int:
        """How many scales a weight of shape (channels, ...) has."""
        if self.weight_granularity == "tensor":
            return 1
        groups = 1 if self.group_size is None else -(-math.prod(shape[1:]) // self.group_size)
        return shape[0] * groups


def stored_bits(bits: int, grid: str) -> float:
    """Bits of a code in packed files."""
    return TERNARY if grid == "ternary" else bits


def stored_bytes(count: int, bits: float) -> int:
    """Bytes that hold this many codes."""
    return -(-count // 5) if bits == TERNARY else -(-count * int(bits) // 8)


def packed_bytes(weights: int, bits: int, scales: int, grid: str) -> int:
    """Bytes of a packed weight: dense codes, and scales in float32."""
    return stored_bytes(weights, stored_bits(bits, grid)) + 4 * scales


def check_bits(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= 8:
        raise ConfigError(f"{name}={value!r} is out of range: bits are whole numbers from 1 to 8")


def did_you_mean(name: str, known: Sequence[str] | set[str]) -> str:
    close = difflib.get_close_matches(name, sorted(known), n=3, cutoff=0.4)
    return f" (did you mean {', '.join(map(repr, close))}?)" if close else ""


def pattern_matches(pattern: str, name: str) -> bool:
    """True if the glob, or the regular expression after "re:", names the module or one that contains it."""
    parts = name.split(".")
    names = [".".join(parts[:count]) for count in range(1, len(parts) + 1)]
    if pattern.startswith("re:"):
        return any(re.fullmatch(pattern[3:], candidate) for candidate in names)
    return any(fnmatchcase(candidate, pattern) for candidate in names)


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, tuple) else value


def _sequence(name: str, value: object) -> Sequence[Any]:
    if isinstance(value, str) or not isinstance(value, Sequence):
        raise ConfigError(f"{name}={value!r} must be a list")
    return value


def _checked_pattern(pattern: object) -> str:
    if not isinstance(pattern, str) or not pattern:
        raise ConfigError(f"pattern {pattern!r} must be a glob such as 'layer1.*', or 're:' and a regular expression")
    if pattern.startswith("re:"):
        try:
            re.compile(pattern[3:])
        except re.error as error:
            raise ConfigError(f"pattern {pattern!r} is not a regular expression: {error}") from None
    return pattern


def _checked_rule(rule: object) -> dict[str, Any]:
    if not isinstance(rule, Mapping) or "pattern" not in rule:
        raise ConfigError(f"rule {rule!r} must be a mapping with a pattern, e.g. {{'pattern': 'layer1.*', 'bits': 8}}")
    _checked_pattern(rule["pattern"])
    for key, value in rule.items():
        if key not in _RULE_KEYS:
            raise ConfigError(f"rule {dict(rule)!r}: unknown key {key!r}; keys: {', '.join(_RULE_KEYS)}")
        if key == "skip" and not isinstance(value, bool):
            raise ConfigError(f"rule {dict(rule)!r}: skip must be True or False")
        if key.endswith("bits") and not (key == "activation_bits" and value is None):
            check_bits(f"rule {rule['pattern']!r}: {key}", value)
    chosen = set(rule) - {"pattern"}
    if not chosen or (rule.get("skip") and len(chosen) > 1) or ("bits" in chosen and len(chosen) > 1):
        raise ConfigError(
            f"rule {dict(rule)!r} must say one thing: skip, or bits, or weight_bits and/or activation_bits"
        )
    return dict(rule)


def _check_same_input(name: str, entry: Mapping[str, Any], layers: Mapping[str, Mapping[str, Any]]) -> None:
    owner = layers.get(entry["same_input_as"]) if isinstance(entry["same_input_as"], str) else None
    bits = entry["activation_bits"]
    if owner is None or "same_input_as" in owner or bits is None or owner["activation_bits"] != bits:
        raise ConfigError(
            f"layers[{name!r}]: same_input_as={entry['same_input_as']!r} must name a layer with a quantizer of its own for inputs "
            "of as many bits"
        )


def _checked_layers(layers: object) -> dict[str, dict[str, Any]]:
    if not isinstance(layers, Mapping) or not layers:
        raise ConfigError(f"layers={layers!r} must map module names to their bits")
    for name, entry in layers.items():
        if (
            not isinstance(name, str)
            or not isinstance(entry, Mapping)
            or set(entry) - {"same_input_as", "smooth"} != {"weight_bits", "activation_bits"}
        ):
            raise ConfigError(f"layers[{name!r}]={entry!r} must be a mapping with weight_bits and activation_bits")
        check_bits(f"layers[{name!r}]: weight_bits", entry["weight_bits"])
        if entry["activation_bits"] is not None:
            check_bits(f"layers[{name!r}]: activation_bits", entry["activation_bits"])
    for name, entry in layers.items():
        if "same_input_as" in entry:
            _check_same_input(name, entry, layers)
        if "smooth" in entry and (
            entry["smooth"] is not True or entry["activation_bits"] is None or "same_input_as" in entry
        ):
            raise ConfigError(
                f"layers[{name!r}]: smooth={entry['smooth']!r} must be True, for a layer with a quantizer of its own for inputs, or "
                "be left out"
            )
    return {name: dict(entry) for name, entry in layers.items()}
