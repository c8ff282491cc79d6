"""transformers: the quantizer `from_pretrained` finds by `quant_method`, and `attach` and `detach` for models that are
already loaded. Importing this loads much of transformers.

With it, `AutoModel....from_pretrained(path)` opens our checkpoints, and `from_pretrained(path, quantization_config=DaqConfig(
weight_bits=3))` quantizes a float one.
"""

from __future__ import annotations

import copy
import dataclasses
import inspect
import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from types import MethodType
from typing import Any

import torch
from safetensors import safe_open
from torch import nn
from transformers.core_model_loading import revert_weight_conversion
from transformers.initialization import no_init_weights
from transformers.quantizers import auto
from transformers.quantizers.base import HfQuantizer

from ..config import QUANT_METHOD, DaqConfig
from ..errors import CheckpointError, DaqError, ModelError
from ..files.atomic import replace_file, temporary_folder
from ..files.card import write_card
from ..files.facts import CardFacts
from ..files.header import (
    CONFIG_NAME,
    METADATA_KEY,
    check_agreement,
    check_beside,
    parse_header,
    read_description,
    starred,
    weights_files,
)
from ..files.push import push_folder
from ..files.weights_file import check_values, header_metadata, layer_problem, weights_elsewhere
from ..model.patch import patch, start_layer, start_weights, unpatch
from ..model.roles import is_transformers_model, weight_modules
from ..model.unchanged import check_opens, check_unchanged
from ..nn.layers import QuantizedLayer, quantized_layers
from ..nn.packed import daq_layers, packed_layers
from ..nn.settle import settled
from .build import building, foreign_kernel, model_class
from .configs import copy_configs, give_configs_back

_TAGS = ["hf_daq", "quantization"]
# The name of the weights file in config.json of a packed model. transformers refuses it, with this text, where no quantizer
# takes it away; else it would skip the quantization that it does not know and answer from random weights.
_PACKED_WEIGHTS = "the weights are packed, and read after `import hf_daq` alone"
_HUB_OPTIONS = (
    "private",
    "token",
    "revision",
    "create_pr",
    "commit_message",
    "commit_description",
    "overwrite_card",
)


class DaqHfQuantizer(HfQuantizer):
    """What transformers calls while it loads, saves, trains and dequantizes a DAQ model."""

    quantization_config: DaqConfig
    is_compileable = True
    float_configs: Sequence[tuple[Any, Any]] = ()

    is_trainable = True
    """Packed models too: adapters on them."""

    @property
    def is_qat_trainable(self) -> bool:
        return not self.quantization_config.packed

    def is_serializable(self) -> bool:
        return True

    def validate_environment(self, *args: Any, device_map: Any = None, **kwargs: Any) -> None:
        on_disk = (
            [name for name, place in device_map.items() if place == "disk"] if isinstance(device_map, dict) else []
        )
        if on_disk:
            first = repr(on_disk[0]) if on_disk[0] else "all of it"
            raise ModelError(
                f"a DAQ model must be in memory, and device_map puts {first} on the disk; leave 'disk' out of device_map, "
                "or give more max_memory"
            )

    def update_attn_implementation(self, config: Any) -> Any:
        """Called with the config before transformers looks for the weights file that it names."""
        if getattr(config, "transformers_weights", None) == _PACKED_WEIGHTS:
            del config.transformers_weights
        return config

    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> None:
        """Swap the classes of a model on the meta device."""
        config = self.quantization_config
        if self.pre_quantized:
            _check_headers(kwargs.get("checkpoint_files") or (), config)
            config = config.replace(layers=_resolved_layers(model, config))
        elif config.packed:
            raise ModelError(
                "packed=True is written by hf_daq.pack; quantize without it, calibrate or train, then pack"
            )
        patch(model, config.replace(dequantize=False))
        _tie_what_has_weights(model)
        for layer in packed_layers(model).values():
            if not layer._non_persistent_buffers_set:  # which no file has
                layer._is_hf_initialized = True  # transformers would read the weight of every layer to initialize it
        self.shapes = {
            f"{name}.{key}": tuple(tensor.shape)
            for name, layer in daq_layers(model).items()
            for key, tensor in layer.state_dict().items()
        }
        self.ignored = model._keys_to_ignore_on_load_missing
        if not self.pre_quantized:  # a float checkpoint has no quantizers: they start from its weights
            model._keys_to_ignore_on_load_missing = {*(self.ignored or ()), r"\.[wa]_quant\."}

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> None:
        model._keys_to_ignore_on_load_missing = self.ignored
        if any(tensor.is_meta for layer in daq_layers(model).values() for tensor in layer.state_dict().values()):
            raise ModelError("a DAQ model must be in memory; choose a device_map that offloads nothing")
        if not self.pre_quantized:
            _clear(model)
            start_weights(model)
        else:
            _check_loaded(model, self.shapes)
        if self.pre_quantized and self.quantization_config.dequantize:
            unpatch(model, quantized=True)
            _tie_what_has_weights(model)
        else:
            attach(model)

    def _dequantize(self, model: Any, dtype: torch.dtype | str | None = None) -> Any:
        unpatch(model, quantized=True)
        detach(model)
        dtype = getattr(torch, dtype) if isinstance(dtype, str) else dtype  # as config.json has it
        return model if dtype is None else model.to(dtype)

    def get_state_dict_and_metadata(self, model: Any) -> tuple[Any, dict[str, str]]:
        state_dict, facts = self.__dict__.pop("state_dict", None), self.__dict__.pop("facts", None)
        original_format, exact = self.__dict__.pop("original_format", True), self.__dict__.pop("exact", False)
        if getattr(model, "_hf_peft_config_loaded", False):  # the adapter is written alone
            return state_dict, {}
        if state_dict:  # ranks that do not write have {}
            state_dict = _with_tied(model, state_dict)
        if state_dict != {} and not exact:
            state_dict = settled(model, state_dict)
        names = _names_in_file(model) if original_format else None
        weights = _weights_in_file(model) if original_format else None
        return state_dict, header_metadata(model, facts, names, weights, state_dict)


def _names_in_file(model: Any) -> dict[str, str]:
    """Layer -> its name in the file, where transformers gives tensors other names as it saves them."""
    names = list(daq_layers(model))
    key = "weight_codes" if model.daq_config.packed else "w_quant.scale"
    numbered = {f"{name}.{key}": torch.tensor([number]) for number, name in enumerate(names)}
    renamed = {names[int(number)]: name for name, number in revert_weight_conversion(model, numbered).items()}
    return {name: other.removesuffix(f".{key}") for name, other in renamed.items() if other != f"{name}.{key}"}


def _weights_in_file(model: Any) -> dict[str, list[str]]:
    """Layer -> the tensors that hold its weight in the file, where transformers has one for each expert."""
    found = {}
    for name, own in weights_elsewhere(model).items():
        tensors = {key: torch.empty(model.get_parameter(key).shape, device="meta") for key in own}
        keys = revert_weight_conversion(model, tensors)
        forms = Counter(map(starred, keys))
        found[name] = sorted({starred(key) if forms[starred(key)] > 1 else key for key in keys})
    return found


def _check(model: Any, state_dict: Mapping[str, Any] | None) -> None:
    """Refuse what would not open as the same model, before anything is written."""
    check_unchanged(model)
    tensors = model.state_dict() if state_dict is None else _with_tied(model, state_dict)
    check_values(tensors, model)
    check_opens(tensors, lambda: _described(model))


def _described(model: Any) -> nn.Module:
    """The quantized model, without its values, that the config of a model gives."""
    config = copy.deepcopy(model.config)
    del config.quantization_config
    with no_init_weights():
        built: nn.Module = type(model)(config)
    patch(built, model.daq_config)
    return built


def _with_tied(model: Any, state_dict: Mapping[str, Any]) -> Mapping[str, Any]:
    """A state dict that was gathered from shards, in which tied weights are tensors of their own, or left out."""
    tied = model.all_tied_weights_keys.items()
    return {**state_dict, **{one: state_dict[other] for one, other in tied if other in state_dict}}


def _write(model: Any, directory: Any, facts: CardFacts | None, exact: bool, **kwargs: Any) -> None:
    """`save_pretrained` of the model's class."""
    # transformers drops the state dict that it is given where a model has a quantizer, and asks the quantizer for one.
    model.hf_quantizer.state_dict = kwargs.pop("state_dict", None)
    model.hf_quantizer.facts = _with_origin(model, facts)
    model.hf_quantizer.exact = exact
    model.hf_quantizer.original_format = kwargs.get("save_original_format", True)
    type(model).save_pretrained(model, directory, **kwargs)
    path = Path(directory) / CONFIG_NAME
    if model.daq_config.packed and kwargs.get("is_main_process", True) and path.exists():
        text = json.dumps(read_description(path.parent) | {"transformers_weights": _PACKED_WEIGHTS}, indent=2) + "\n"
        replace_file(path, lambda target: target.write_text(text, encoding="utf-8"))


def save_checkpoint(model: Any, directory: Path, facts: CardFacts | None, **kwargs: Any) -> None:
    """`save_pretrained` of the model's class into a temporary folder whose files are then renamed: a save that fails leaves
    the old ones. Ranks that do not write, and those that write together, have no such folder."""
    state_dict = kwargs.get("state_dict")
    # Trainer resumes from such a folder, bit for bit; elsewhere codes must not depend on the last bit of a weight.
    exact = re.fullmatch(r"checkpoint-\d+", directory.name) is not None
    if not kwargs.get("is_main_process", True) or state_dict == {} or kwargs.get("distributed_checkpoint"):
        _write(model, directory, facts, exact, **kwargs)
        return
    _check(model, state_dict)
    with temporary_folder(directory) as temporary:
        _write(model, temporary, facts, exact, **kwargs)
        check_beside(directory, temporary)


def _save_pretrained(self: Any, save_directory: Any, *args: Any, card: CardFacts | None = None, **kwargs: Any) -> Any:
    signature = inspect.signature(type(self).save_pretrained)
    given = signature.bind_partial(self, save_directory, *args, **kwargs).arguments
    options = {key: value for key, value in given.items() if key not in ("self", "save_directory", "kwargs")}
    options |= given.get("kwargs", {})
    if getattr(self, "_hf_peft_config_loaded", False):
        self.hf_quantizer.state_dict = options.get("state_dict")
        return type(self).save_pretrained(self, save_directory, **options)
    push = options.pop("push_to_hub", False)
    repository = options.pop("repo_id", Path(save_directory).name) if push else None
    hub_options = {key: options.pop(key) for key in _HUB_OPTIONS if repository is not None and key in options}
    directory = Path(save_directory)
    save_checkpoint(self, directory, card, **options)
    if options.get("is_main_process", True) and options.get("state_dict") != {}:
        write_card(directory)
        if repository is not None:
            push_folder(directory, repository, **hub_options)


def _push_to_hub(self: Any, repo_id: str, *, card: CardFacts | None = None, **kwargs: Any) -> Any:
    if getattr(self, "_hf_peft_config_loaded", False):
        return type(self).push_to_hub(self, repo_id, **kwargs)
    options = {key: kwargs.pop(key) for key in _HUB_OPTIONS if key in kwargs}
    kwargs.pop("tags", None)
    with TemporaryDirectory() as folder:
        self.save_pretrained(folder, card=card, **kwargs)
        return push_folder(Path(folder), repo_id, **options)


# pickling a bound method looks its function up by name
_save_pretrained.__name__, _push_to_hub.__name__ = "save_pretrained", "push_to_hub"


def _with_origin(model: Any, facts: CardFacts | None) -> CardFacts:
    """The facts with what transformers knows of where the model comes from."""
    facts = (facts or CardFacts()).with_versions()
    origin = model.config.name_or_path if getattr(model.config, "_commit_hash", None) else None  # of the Hub
    if facts.base_model is None and origin and not model.hf_quantizer.pre_quantized:
        return dataclasses.replace(facts, base_model=origin)
    return facts


def _tie_what_has_weights(model: Any) -> None:
    """Let transformers tie no weights of packed layers, which have none and are tied as they are; in a model that is not
    packed, all weights again."""
    for part in _transformers_parts(model):
        part._tied_weights_keys, part.all_tied_weights_keys = vars(part).pop("daq_tied", None) or (
            part._tied_weights_keys,
            getattr(part, "all_tied_weights_keys", {}),
        )
        every = part.all_tied_weights_keys
        packed = {f"{name}.weight" for name in packed_layers(part)}
        if packed & every.keys():
            part.daq_tied = part._tied_weights_keys, every
            part._tied_weights_keys = {target: source for target, source in every.items() if target not in packed}
            part.all_tied_weights_keys = dict(part._tied_weights_keys)


def attach(model: Any) -> None:
    """Make a patched transformers model what `from_pretrained` gives: transformers knows that it is quantized, saves its
    config, and trains it."""
    _tie_what_has_weights(model)
    config: Any = model.daq_config
    quantizer = vars(model).get("hf_quantizer")
    if quantizer is None:
        quantizer = DaqHfQuantizer(config, pre_quantized=False)
        quantizer.float_configs = copy_configs(model)
    quantizer.quantization_config = config
    model.hf_quantizer = quantizer
    model.is_quantized = True
    model.quantization_method = QUANT_METHOD
    model.config.quantization_config = config
    for part in _transformers_parts(model):
        part.config._is_quantized = True
    model.save_pretrained = MethodType(_save_pretrained, model)
    model.push_to_hub = MethodType(_push_to_hub, model)
    model.add_model_tags(_TAGS)


def detach(model: Any) -> None:
    """Inverse of `attach`."""
    _tie_what_has_weights(model)
    float_configs = getattr(vars(model).get("hf_quantizer"), "float_configs", ())
    for name in ("hf_quantizer", "quantization_method", "save_pretrained", "push_to_hub"):
        model.__dict__.pop(name, None)
    model.model_tags = [tag for tag in model.model_tags or () if tag not in _TAGS] or None
    model.is_quantized = False
    for part in _transformers_parts(model):
        for name in ("quantization_config", "_is_quantized"):
            part.config.__dict__.pop(name, None)
    give_configs_back(model, float_configs)


def open_checkpoint(directory: Path, description: Mapping[str, Any], **kwargs: Any) -> nn.Module:
    """`from_pretrained` of the class of transformers that config.json names; no other code is run."""
    loader = model_class(description, directory)
    if kernel := foreign_kernel(description):
        raise CheckpointError(f"config.json of {directory} asks for {kernel!r}, and code of a repository is not run")
    try:
        with building(_room(directory)):
            model: nn.Module = loader.from_pretrained(directory, use_safetensors=True, **kwargs)
    except DaqError:
        raise
    except Exception as error:
        raise CheckpointError(f"transformers cannot open {directory}: {error}") from error
    return model


def _room(directory: Path) -> int:
    """How many parameters the model may have: twice those of the files, and a few."""
    count = 0
    for file in weights_files(directory):
        with safe_open(file, framework="pt") as opened:
            count += len(opened.keys())
    return 2 * count + 1000


def _check_headers(files: Any, config: DaqConfig) -> None:
    """Refuse weights files whose header means another quantization than config.json."""
    for file in files:
        if not str(file).endswith(".safetensors"):
            continue
        with safe_open(file, framework="pt") as opened:
            found = opened.metadata() or {}
        if METADATA_KEY in found:
            check_agreement(parse_header(file, found, {}), config, file)


def _transformers_parts(model: nn.Module) -> list[Any]:
    return [module for module in model.modules() if is_transformers_model(module)]


def _resolved_layers(model: Any, config: DaqConfig) -> dict[str, Any]:
    """The resolved layers under their names in this model, which may be the base model of the one that was saved, or
    have another head."""
    if config.layers is None:
        raise CheckpointError("the quantization config of this checkpoint has no resolved layers")
    base = model.base_model_prefix
    modules = dict(model.named_modules()) | dict(weight_modules(model))
    inner = modules.get(base)
    parts = [name for name, _ in model.named_children() if name != base]
    parts += [f"{base}.{name}" for name, _ in inner.named_children()] if inner else []
    found: dict[str, dict[str, Any]] = {}
    names = {}
    for name, bits in config.layers.items():
        other = name.removeprefix(base + ".") if name.startswith(base + ".") else f"{base}.{name}"
        if isinstance(modules.get(name), nn.Identity):  # a head of timm, which the base model has not
            continue
        if name not in modules and other in modules:
            found[other] = dict(bits)
            names[name] = other
        elif any(one == part or one.startswith(part + ".") for one in (name, other) for part in parts):
            found[name] = dict(bits)  # is there, or is an error; a head or a decoder that this model lacks is neither
    for bits in found.values():
        if "same_input_as" in bits:
            bits["same_input_as"] = names.get(bits["same_input_as"], bits["same_input_as"])
    return found


@torch.no_grad()
def _clear(model: nn.Module) -> None:
    """Quantizers that no checkpoint has set hold whatever was in memory."""
    for layer in quantized_layers(model).values():
        for quantizer in layer.quantizers.values():
            for parameter in quantizer.parameters():
                parameter.fill_(torch.nan)


@torch.no_grad()
def _check_loaded(model: nn.Module, shapes: dict[str, tuple[int, ...]]) -> None:
    """Refuse a quantized checkpoint without all its codes or quantizers, or with values that no quantizer can have."""
    kinds = model.named_parameters, model.named_buffers
    tensors = {name: tensor for named in kinds for name, tensor in named(remove_duplicate=False)}
    for name, layer in daq_layers(model).items():
        fresh = isinstance(layer, QuantizedLayer) and layer.owner is None
        if fresh and not getattr(layer.first_parameter, "_is_hf_initialized", False):  # type: ignore[attr-defined]
            _start_new(layer, model.daq_config)  # type: ignore[arg-type]
        for key in layer.state_dict():
            if "_quant." not in key and layer.w_quant is not None:
                continue
            full = f"{name}.{key}"
            shape = tuple(tensors[full].shape)
            if not getattr(tensors[full], "_is_hf_initialized", False):
                raise CheckpointError(f"the checkpoint has no {full}, but its config quantizes {name!r}")
            if shape != shapes[full]:
                raise CheckpointError(f"mismatch: {full} has shape {shape}, its config means {shapes[full]}")
        problem = layer_problem(name, layer, tensors)
        if problem:
            raise CheckpointError(problem)
        for quantizer in layer.quantizers.values():
            quantizer.finish(loaded=True)


def _start_new(layer: QuantizedLayer, config: DaqConfig) -> None:
    """Start the quantizers of a layer whose weight the checkpoint lacks, such as a head for other labels, from the weight it
    was given; those of its inputs are loaded."""
    start_layer(layer, config)
    for parameter in layer.w_quant.parameters():
        parameter._is_hf_initialized = True  # type: ignore[attr-defined]


if QUANT_METHOD not in auto.AUTO_QUANTIZER_MAPPING:
    auto.AUTO_QUANTIZER_MAPPING[QUANT_METHOD] = DaqHfQuantizer
    auto.AUTO_QUANTIZATION_CONFIG_MAPPING[QUANT_METHOD] = DaqConfig
    auto.LOADING_ATTRIBUTES_CONFIG_TYPES = (*auto.LOADING_ATTRIBUTES_CONFIG_TYPES, DaqConfig)
