"""Take tiny transformers models of many architectures through the whole way: plan, load, calibrate, train, save, reload,
dequantize, generate, remove.

    python tests/programs/scan_transformers.py [--names bert t5] [--checks plan load] [--output scan.json]
        [--weight-grid ternary] [--activation-scale token] [--embedding-bits 8]

Weights are random and nothing is downloaded. The exit code is 1 if a model fails.
"""

from __future__ import annotations

import copy
import json
import logging
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cached_property, partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "support"))
import scanning
import tiny
import torch
import transformers
from packed_paths import different_outputs
from safetensors.torch import load_file
from scanning import Result
from torch import Tensor, nn

import hf_daq
from hf_daq import DaqConfig
from hf_daq.model.roles import weight_modules
from hf_daq.nn.layers import LAYER_TYPES, quantized_layers
from hf_daq.nn.packed import daq_layers, packed_layers
from hf_daq.nn.paths import bit_for_bit

NEW_TOKENS = 5
HEADS = ("classifier", "qa_outputs", "lm_head", "score", "router", "gate")


class Case:
    """One architecture, with what its checks share: a float checkpoint and a calibrated one."""

    def __init__(self, name: str, folder: Path, embedding_bits: int = 4, **config: Any) -> None:
        self.config = DaqConfig(**{"weight_bits": 3, "activation_bits": 8} | config)
        self.weights_only = self.config.replace(activation_bits=None, activation_scale="static")
        self.groups = self.weights_only.replace(group_size=16)
        self.outer_too = self.config.replace(first_last_bits=8)
        self.embedding_bits = embedding_bits
        self.name, self.folder = name, folder
        self.tiny = tiny.ARCHITECTURES[name]
        self.batch = tiny.inputs(name)
        self.models: dict[str, Any] = {}
        self.float_model = tiny.build(name)
        self.model_class: Any = type(self.float_model)
        self.float_model.save_pretrained(folder / "float")

    def new(self, config: DaqConfig | None = None, **kwargs: Any) -> Any:
        """The float checkpoint, opened with a config or without."""
        return self.model_class.from_pretrained(self.folder / "float", quantization_config=config, **kwargs)

    def calibrated(self, config: DaqConfig | None = None) -> Any:
        """A copy of the calibrated model, which is made once."""
        config = config or self.config
        key = json.dumps(config.to_dict())
        if key not in self.models:
            self.models[key] = self.new(config)
            calibrate(self, self.models[key])
        return copy.deepcopy(self.models[key])

    @cached_property
    def saved(self) -> Path:
        """A folder with the calibrated model of `config`."""
        self.calibrated().save_pretrained(self.folder / "saved")
        return self.folder / "saved"

    def outputs(self, model: Any) -> Tensor:
        # The float product with a single row, as in a gate of shared experts, rounds by where in memory a file has put it.
        for parameter in model.parameters():
            if parameter.data_ptr() % 64:
                parameter.data = parameter.data.clone()
        return tiny.outputs(model, self.batch)


def calibrate(case: Case, model: Any, dtype: torch.dtype = torch.float32) -> None:
    with hf_daq.calibrate(model):
        for seed in (1, 2):
            model(**tiny.inputs(case.name, seed, dtype))


# ------------------------------------------------------------------------------------------------------- comparisons


def different(one: dict[str, Tensor], other: dict[str, Tensor], near: bool = False) -> list[str]:
    """Names that only one has, or whose tensors are not the same; NaN equals NaN. near: weights from a file, which holds
    them a little off the thresholds between codes, are the same."""
    tolerance = {"rtol": 1e-3, "atol": 1e-5} if near else {"rtol": 0.0, "atol": 0.0}
    found = sorted(one.keys() ^ other.keys())
    for name in one.keys() & other.keys():
        x, y = one[name], other[name]
        if x.dtype != y.dtype or x.shape != y.shape or not torch.allclose(x, y, equal_nan=True, **tolerance):
            found.append(name)
    return found


def unlike(what: str, one: Any, other: Any, near: bool = False) -> Iterator[str]:
    """All in which two models differ but their outputs."""
    names = different(one.state_dict(), other.state_dict(), near)
    if names:
        yield f"{what}: {len(names)} tensors differ: {', '.join(names[:5])}"
    if plain_config(one) != plain_config(other):
        yield f"{what}: config differs"
    if getattr(one, "daq_config", None) != getattr(other, "daq_config", None):
        yield f"{what}: daq_config differs"
    flags = [{name: p.requires_grad for name, p in model.named_parameters()} for model in (one, other)]
    if flags[0] != flags[1]:
        yield f"{what}: requires_grad differs: {sorted(dict(flags[0].items() ^ flags[1].items()))[:5]}"
    # By name: torch makes a class for every parametrised module.
    types = [[type(module).__name__ for module in model.modules()] for model in (one, other)]
    if types[0] != types[1]:
        yield f"{what}: classes of modules differ"


def plain_config(model: Any) -> dict[str, Any]:
    config = json.loads(model.config.to_json_string(use_diff=False))
    config.pop("_name_or_path", None)
    return config


def loading_problems(what: str, info: dict[str, Any]) -> Iterator[str]:
    for key, names in info.items():
        if names:
            yield f"{what}: {key} {sorted(map(str, names))[:5]}"


def wide_quantizers(what: str, model: Any) -> Iterator[str]:
    for name, parameter in model.named_parameters():
        if ("w_quant" in name or "a_quant" in name) and parameter.dtype != torch.float32:
            yield f"{what}: {name} is {parameter.dtype}"


# ------------------------------------------------------------------------------------------------------------ checks


def check_plan(case: Case) -> Iterator[str]:
    model = case.float_model
    plan = hf_daq.plan(model, case.config)
    reasons = dict(Counter(layer.reason for layer in plan.kept.values()))
    if len(plan.quantized) != case.tiny.quantized or reasons != case.tiny.kept:
        yield f"the plan quantizes {len(plan.quantized)} and keeps {reasons}"
    planned = {layer.name for layer in plan.layers}
    for name, module in model.named_modules():
        if type(module) in LAYER_TYPES and name not in planned:
            yield f"{name} is not in the plan"
    output = model.get_output_embeddings()
    owners = Counter(id(p) for _, module in model.named_modules() for p in module.parameters(recurse=False))
    modules = dict(weight_modules(model))
    for name in plan.quantized:
        if name not in modules:  # a projection of an attention
            continue
        module = modules[name]
        if module is output:
            yield f"{name} is the output embedding, and quantized"
        if owners[id(module.weight)] > 1:
            yield f"{name} shares its weight, and is quantized"
        if isinstance(module, nn.Conv2d) and module.in_channels == 3:
            yield f"{name} reads the image, and is quantized"
        if name.rpartition(".")[2] in HEADS:
            yield f"{name} is quantized"


def check_load(case: Case) -> Iterator[str]:
    """`from_pretrained` with a config does what `apply_daq` does."""
    for what, config in (("config", case.config), ("first and last too", case.outer_too)):
        loaded, info = case.new(config, output_loading_info=True)
        yield from loading_problems(what, info)
        applied = hf_daq.apply_daq(case.new(), config)
        yield from unlike(what, loaded, applied)
        if list(quantized_layers(loaded)) != list(hf_daq.plan(case.float_model, config).quantized):
            yield f"{what}: the layers are not those of the plan"
        if loaded.training or not loaded.is_quantized:
            yield f"{what}: not in evaluation mode, or not marked as quantized"
    if json.loads(case.new(case.config).config.to_json_string())["quantization_config"]["quant_method"] != "daq":
        yield "the config says nothing of the quantization"


@torch.no_grad()
def check_reach(case: Case) -> Iterator[str]:
    """Every quantized layer is called, its scale matters, and nothing reads its float weight beside it."""
    model = case.calibrated()
    layers = quantized_layers(model)
    calls: Counter[str] = Counter()
    hooks = [layer.register_forward_hook(lambda *_, name=name: calls.update([name])) for name, layer in layers.items()]
    expected = case.outputs(model)
    for hook in hooks:
        hook.remove()
    if not expected.isfinite().all() or torch.equal(expected, case.outputs(case.float_model)):
        yield "quantized outputs are those of the float model, or not finite"
    for name, layer in layers.items():
        if not calls[name]:
            yield f"{name} is not called"
        old = layer.w_quant.scale.clone()
        layer.w_quant.scale.mul_(1.5)
        parent, own = model.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2].removesuffix("_proj")
        normalized = hasattr(parent, f"{own[0]}_norm") or hasattr(parent, f"{own}_layernorm")
        if torch.equal(case.outputs(model), expected) and not normalized:  # as queries and keys of Qwen 3 are
            yield f"{name}: its scale does not matter"
        layer.w_quant.scale.copy_(old)
    # Bounds are in units of the root mean square: twice the weight has the same codes.
    for layer in layers.values():
        layer.write_weight(2 * layer.weight)
    if not torch.equal(case.outputs(model), expected):
        yield "something reads a float weight beside the quantized layer"


def check_reload(case: Case) -> Iterator[str]:
    model = case.calibrated()  # a deep copy
    expected = case.outputs(model)
    model.save_pretrained(case.folder / "by_transformers")
    hf_daq.save_pretrained(model, case.folder / "by_hf_daq")
    model.save_pretrained(case.folder / "in_shards", max_shard_size="40KB")
    for folder in ("by_transformers", "by_hf_daq", "in_shards"):
        path = case.folder / folder
        loaded, info = case.model_class.from_pretrained(path, output_loading_info=True)
        yield from loading_problems(folder, info)
        for way, other in (("from_pretrained", loaded), ("hf_daq.from_pretrained", hf_daq.from_pretrained(path))):
            yield from unlike(f"{folder}, {way}", model, other)
            if not torch.equal(case.outputs(other), expected):
                yield f"{folder}, {way}: other outputs"
            yield from wide_quantizers(f"{folder}, {way}", other)


def check_packed(case: Case) -> Iterator[str]:
    model = case.calibrated()
    expected = case.outputs(model)
    path = case.folder / "packed"
    hf_daq.save_pretrained(model, path, packed=True)
    loaded, info = case.model_class.from_pretrained(path, output_loading_info=True)
    yield from loading_problems("packed", info)
    if list(packed_layers(loaded)) != list(quantized_layers(model)):
        yield "packed: not every quantized layer is packed"
    for way in ("reloaded", "saved by transformers", "unpacked"):
        if way == "saved by transformers":
            loaded.save_pretrained(path)
            loaded = hf_daq.from_pretrained(path)
        if way == "unpacked":
            hf_daq.unpack(loaded)
            if model.state_dict().keys() != loaded.state_dict().keys():
                yield "unpacked: other keys than those of the model"
        with bit_for_bit():
            if not torch.equal(case.outputs(loaded), expected):
                yield f"packed, {way}: other outputs"
        yield from different_outputs(loaded, partial(case.outputs, loaded))


def check_embeddings(case: Case) -> Iterator[str]:
    """Embeddings, and the layers that share their weight, come back from files as one, with the same outputs."""
    config = case.weights_only.replace(embedding_bits=case.embedding_bits)
    if not any(isinstance(module, nn.Embedding) for module in case.float_model.modules()):
        return
    model, info = case.new(config, output_loading_info=True)
    yield from loading_problems("float checkpoint", info)
    owners = {name: layer.owner.daq_name for name, layer in quantized_layers(model).items() if layer.owner is not None}
    shared = {name for name, row in hf_daq.plan(case.float_model, config).quantized.items() if row.tied_to}
    if owners.keys() != shared:
        yield f"tied are {sorted(owners)}, planned were {sorted(shared)}"
    with bit_for_bit():
        expected = case.outputs(model)
        for packed in (False, True):
            folder = case.folder / f"embeddings_{packed}"
            hf_daq.save_pretrained(model, folder, packed=packed)
            opened, info = case.model_class.from_pretrained(folder, output_loading_info=True)
            what = "packed" if packed else "trainable"
            yield from loading_problems(what, info)
            opened.tie_weights()
            if not torch.equal(case.outputs(opened), expected):
                yield f"{what}: the outputs differ"
            found = {
                name: layer.owner.daq_name for name, layer in daq_layers(opened).items() if layer.owner is not None
            }
            if found != owners:
                yield f"{what}: tied are {sorted(found)}"


def train(case: Case, model: Any) -> Any:
    """One step. Returns the model, with its gradients. What transformers does not save stays (Marian's sinusoids, which are
    trainable in a model that was opened)."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(parameter.requires_grad and name not in (model._keys_to_ignore_on_save or ()))
    torch.manual_seed(0)
    model.train()
    optimizer = torch.optim.AdamW(hf_daq.param_groups(model, lr=1e-2, quantizer_lr=1e-3), weight_decay=0.0)
    predicted = tiny.prediction(model(**case.batch))
    (predicted * torch.randn_like(predicted)).sum().backward()
    optimizer.step()
    return model


def check_train(case: Case) -> Iterator[str]:
    model = case.model_class.from_pretrained(case.saved)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    train(case, model)
    zero = []
    for name, parameter in model.named_parameters():
        gradient = parameter.grad
        if gradient is not None and not gradient.isfinite().all():
            yield f"the gradient of {name} is not finite"
    for layer_name, layer in quantized_layers(model).items():
        for kind, parameter in layer.named_parameters():
            name = f"{layer_name}.{kind}"
            if not parameter.requires_grad:
                continue
            # A bias of keys changes nothing, and normalization undoes what it can.
            if kind not in ("bias", "w_quant.shift") and torch.equal(parameter, before[name]):
                zero.append(name)
    if zero:
        yield f"{len(zero)} did not learn: {', '.join(zero[:8])}"
    model.zero_grad()
    expected = case.outputs(model)
    path = case.folder / "trained"
    model.save_pretrained(path)
    loaded = case.model_class.from_pretrained(path)
    if not torch.equal(case.outputs(loaded), expected):
        yield "after a step, reloaded: other outputs"
    names = different(train(case, model).state_dict(), train(case, loaded).state_dict())
    if names:
        yield f"a step after reloading differs: {names[:5]}"
    fresh = hf_daq.apply_daq(tiny.build(case.name), model.daq_config)  # which names the layers that share a quantizer
    _, unknown = fresh.load_state_dict(load_file(path / "model.safetensors"), strict=False)
    _, float_unknown = case.new().load_state_dict(load_file(case.folder / "float" / "model.safetensors"), strict=False)
    if float_unknown:  # transformers renames these when it saves
        if not unknown:
            yield "the float file has other names than the model, the quantized one has not"
    elif unknown:
        yield f"the file has names that the model does not know: {unknown[:5]}"
    elif not torch.equal(case.outputs(fresh), expected):
        yield "load_state_dict: other outputs"


def check_dequantize(case: Case) -> Iterator[str]:
    """Both ways to a plain model. The shift of a convolution without a bias becomes one, and a model that is built from
    config.json does not read it: without `bias_correction` it is the same model."""
    for what, config in (
        ("weights only", case.weights_only),
        ("activations too", case.config),
        ("no shift", case.weights_only.replace(bias_correction=False)),
    ):
        model = case.calibrated(config)
        expected = case.outputs(model)
        path = case.folder / f"dequantize {what}"
        model.save_pretrained(path)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "You passed `quantization_config`")
            opened = case.model_class.from_pretrained(path, quantization_config=config.replace(dequantize=True))
        yield from dequantized_problems(f"{what}, opened", opened)
        yield from dequantized_problems(f"{what}, dequantize()", model.dequantize())
        yield from unlike(what, model, opened)
        outputs = case.outputs(model)
        if not torch.equal(outputs, case.outputs(opened)):
            yield f"{what}: the two ways give other outputs"
        if config.activation_bits is None and (outputs - expected).norm() > 1e-4 * expected.norm():
            yield f"{what}: outputs are off by {(outputs - expected).norm() / expected.norm():.1e}"
        opened.save_pretrained(path)
        if "quantization_config" in json.loads((path / "config.json").read_text()):
            yield f"{what}: config.json has a quantization_config"
        plain, info = case.model_class.from_pretrained(path, output_loading_info=True)
        new_biases = model.state_dict().keys() - case.float_model.state_dict().keys()
        convolutions = {f"{name}.bias" for name, m in model.named_modules() if isinstance(m, nn.modules.conv._ConvNd)}
        if new_biases - (convolutions if config.bias_correction else set()):
            yield f"{what}: dequantizing adds {sorted(new_biases)[:5]}"
        unread = set(info.pop("unexpected_keys"))
        if len(unread) != len(new_biases):  # transformers may have other names in the file
            yield f"{what}: unexpected_keys {sorted(unread)[:5]}"
        yield from loading_problems(f"{what}, dequantized, saved and opened", info)
        if not new_biases and not torch.equal(case.outputs(plain), outputs):
            yield f"{what}: saved and opened, the dequantized model gives other outputs"


def dequantized_problems(what: str, model: Any) -> Iterator[str]:
    if quantized_layers(model) or any("_quant" in name for name in model.state_dict()):
        yield f"{what}: still has quantizers"
    if model.is_quantized or hasattr(model, "daq_config") or getattr(model, "hf_quantizer", None) is not None:
        yield f"{what}: still known as quantized"
    if "quantization_config" in plain_config(model):
        yield f"{what}: its config has a quantization_config"


def check_groups(case: Case) -> Iterator[str]:
    """Weights only need no calibration."""
    model = case.new(case.groups)
    expected = case.outputs(model)
    if not expected.isfinite().all():
        yield "groups: outputs are not finite"
    ragged = [name for name, layer in quantized_layers(model).items() if layer.w_quant.padding]
    if not ragged and case.name not in NEVER_RAGGED:
        yield "groups: no layer has a shorter last group"
    model.save_pretrained(case.folder / "groups")
    loaded = case.model_class.from_pretrained(case.folder / "groups")
    if not torch.equal(case.outputs(loaded), expected):
        yield "groups: reloaded, other outputs"
    yield from unlike("groups", model, loaded)


NEVER_RAGGED = ("bloom", "mamba", "falcon_mamba", "swin", "mixtral", "dinov2", "timm", "gpt_oss", "qwen3_moe")


def check_bfloat16(case: Case) -> Iterator[str]:
    path = case.folder / "bfloat16"
    case.new(dtype=torch.bfloat16).save_pretrained(path)
    batch = tiny.inputs(case.name, dtype=torch.bfloat16)
    plain = case.model_class.from_pretrained(path, dtype="auto")
    tiny.outputs(plain, batch)  # some change their types in the forward
    models = [
        case.new(case.config, dtype=torch.bfloat16),
        case.model_class.from_pretrained(path, dtype="auto", quantization_config=case.config),
        hf_daq.apply_daq(case.model_class.from_pretrained(path, dtype="auto"), case.config),
    ]
    for model in models[1:]:
        yield from unlike("bfloat16", models[0], model)
    calibrate(case, models[0], torch.bfloat16)
    yield from wide_quantizers("bfloat16", models[0])
    dtypes = {name: parameter.dtype for name, parameter in models[0].named_parameters() if "_quant." not in name}
    if dtypes != {name: parameter.dtype for name, parameter in plain.named_parameters()}:
        yield "bfloat16: parameters have other types than in the float model"
    expected = tiny.outputs(models[0], batch)
    if not expected.isfinite().all():
        yield "bfloat16: outputs are not finite"
    models[0].save_pretrained(path)
    for dtype in ("auto", torch.bfloat16):
        loaded = case.model_class.from_pretrained(path, dtype=dtype)
        if not torch.equal(tiny.outputs(loaded, batch), expected):
            yield "bfloat16: reloaded, other outputs"
        yield from wide_quantizers("bfloat16, reloaded", loaded)
        yield from unlike("bfloat16, reloaded", models[0], loaded)
    wide = case.model_class.from_pretrained(path, dtype=torch.float32)
    if not case.outputs(wide).isfinite().all():
        yield "bfloat16, reloaded as float32: outputs are not finite"


def check_generate(case: Case) -> Iterator[str]:
    if case.tiny.inputs not in ("decoder", "seq2seq", "speech"):
        return
    model = case.model_class.from_pretrained(case.saved)
    generated = generate(model, case.batch)
    if not torch.equal(generated, one_by_one(model, case.batch)):
        reason = (
            "" if torch.equal(generate(case.new(), case.batch), one_by_one(case.new(), case.batch)) else " (float too)"
        )
        yield f"generate gives other tokens than forward after forward{reason}"
    if case.tiny.inputs == "decoder" and padding_is_harmless(case.new()) and not padding_is_harmless(model):
        yield "a prompt padded on the left gives other tokens than alone"


def generate(model: Any, batch: dict[str, Tensor]) -> Tensor:
    """Greedy, with the key-value cache; only the new tokens."""
    length = batch["input_ids"].shape[1] if not model.config.is_encoder_decoder else 1
    prompt = {key: value for key, value in batch.items() if not key.startswith("decoder")}
    if model.config.is_encoder_decoder:
        first = next(iter(prompt.values()))
        prompt["decoder_input_ids"] = torch.full((len(first), 1), model.config.decoder_start_token_id)
    settings = transformers.GenerationConfig(
        max_new_tokens=NEW_TOKENS,
        do_sample=False,
        pad_token_id=0,
        decoder_start_token_id=getattr(model.config, "decoder_start_token_id", None),
    )
    model.generation_config = settings
    tokens = transformers.GenerationMixin.generate(model, **prompt, generation_config=settings)
    return tokens[:, length:]


@torch.no_grad()
def one_by_one(model: Any, batch: dict[str, Tensor]) -> Tensor:
    """The same without a cache: a whole forward for each token."""
    batch = dict(batch)
    key = "decoder_input_ids" if model.config.is_encoder_decoder else "input_ids"
    if model.config.is_encoder_decoder:
        batch[key] = torch.full((len(batch[key]), 1), model.config.decoder_start_token_id)
    for _ in range(NEW_TOKENS):
        following = model(**batch, use_cache=False).logits[:, -1].argmax(-1, keepdim=True)
        batch[key] = torch.cat([batch[key], following], 1)
        if key == "input_ids":
            batch["attention_mask"] = torch.ones_like(batch[key])
    return batch[key][:, -NEW_TOKENS:]


def padding_is_harmless(model: Any) -> bool:
    torch.manual_seed(3)
    prompts = [torch.randint(3, tiny.VOCABULARY, (1, length)) for length in (9, 5)]
    alone = [generate(model, {"input_ids": p, "attention_mask": torch.ones_like(p)}) for p in prompts]
    padded = nn.functional.pad(prompts[1], (4, 0))
    mask = nn.functional.pad(torch.ones_like(prompts[1]), (4, 0))
    batch = {
        "input_ids": torch.cat([prompts[0], padded]),
        "attention_mask": torch.cat([torch.ones_like(prompts[0]), mask]),
    }
    return torch.equal(generate(model, batch), torch.cat(alone))


def check_remove(case: Case) -> Iterator[str]:
    model = case.model_class.from_pretrained(case.saved)
    hf_daq.remove_daq(model)
    yield from dequantized_problems("removed", model)
    yield from unlike("removed", model, case.new(), near=True)
    outputs, wanted = case.outputs(model), case.outputs(case.float_model)
    if (outputs - wanted).norm() > 1e-3 * wanted.norm():
        yield "removed: other outputs than the float model"
    model.save_pretrained(case.folder / "removed")
    if "quantization_config" in json.loads((case.folder / "removed" / "config.json").read_text()):
        yield "removed: config.json has a quantization_config"
    again = hf_daq.apply_daq(model, case.config)
    yield from unlike("removed and applied again", again, case.new(case.config), near=True)


def check_base(case: Case) -> Iterator[str]:
    """The base model out of the folder of the model, and the model out of the folder of the base model."""
    base_class = case.tiny.base
    if base_class is None:
        return
    for what, config in (("base", case.config), ("base, first and last too", case.outer_too)):
        model = case.calibrated(config)
        path, base_path = case.folder / what / "head", case.folder / what / "base"
        model.save_pretrained(path)
        base, info = base_class.from_pretrained(path, output_loading_info=True)
        _, float_info = base_class.from_pretrained(case.folder / "float", output_loading_info=True)
        yield from other_info(what, info, float_info)
        prefix = model.base_model_prefix + "."
        found = quantized_layers(base)
        modules = dict(base.named_modules())
        wanted = {}
        for name, layer in quantized_layers(model).items():
            name = name if name in modules else name.removeprefix(prefix)
            if not isinstance(modules.get(name, nn.Identity()), nn.Identity):  # timm leaves one where a head was
                wanted[name] = layer
        if found.keys() != wanted.keys():
            yield f"{what}: layers {sorted(found.keys() ^ wanted.keys())[:5]}"
        for name in found.keys() & wanted.keys():
            if different(found[name].state_dict(), wanted[name].state_dict()):
                yield f"{what}: {name} differs"
        if set(base.daq_config.layers) != set(found):
            yield f"{what}: daq_config names other layers"
        part = getattr(model, model.base_model_prefix, None)
        if isinstance(part, base_class):
            with torch.no_grad():
                hidden = [m.eval()(**tiny.base_inputs(case.name)).last_hidden_state for m in (base, part)]
            if not torch.equal(*hidden):
                yield f"{what}: other hidden states"
        base.save_pretrained(base_path)
        base_class.from_pretrained(case.folder / "float").save_pretrained(case.folder / "float base")
        back, info = case.model_class.from_pretrained(base_path, output_loading_info=True)
        _, float_info = case.model_class.from_pretrained(case.folder / "float base", output_loading_info=True)
        yield from other_info(f"{what}, back", info, float_info)
        names = {name if name in found else name.removeprefix(prefix) for name in quantized_layers(back)}
        if names != set(found):
            yield f"{what}, back: layers {sorted(names ^ set(found))[:5]}"
        if not case.outputs(back).isfinite().all():
            yield f"{what}, back: outputs are not finite"


def other_info(what: str, info: dict[str, Any], float_info: dict[str, Any]) -> Iterator[str]:
    for key in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        extra = {
            name for name in set(info[key]) ^ set(float_info[key]) if key == "missing_keys" or "_quant" not in name
        }
        if extra:
            yield f"{what}: {key} other than those of the float model: {sorted(map(str, extra))[:5]}"


CHECKS: dict[str, Callable[[Case], Iterator[str]]] = {
    "plan": check_plan,
    "load": check_load,
    "reach": check_reach,
    "reload": check_reload,
    "packed": check_packed,
    "train": check_train,
    "embeddings": check_embeddings,
    "dequantize": check_dequantize,
    "groups": check_groups,
    "bfloat16": check_bfloat16,
    "generate": check_generate,
    "remove": check_remove,
    "base": check_base,
}


def check_architecture(name: str, checks: Any = CHECKS, trace: bool = False, **config: Any) -> Result:
    """Take one architecture through the checks; nothing raises, all that is wrong goes to `problems`."""
    started = time.process_time()
    result = Result(name)
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        case = Case(name, Path(folder), **config)
        plan = hf_daq.plan(case.float_model, case.config)
        result.quantized, result.unsupported = len(plan.quantized), len(plan.unsupported)
        result.kept = dict(Counter(layer.reason for layer in plan.kept.values()))
        for check in checks:
            try:
                result.problems.extend(f"{check}: {problem}" for problem in CHECKS[check](case))
            except Exception as error:
                if trace:
                    traceback.print_exc()
                result.problems.append(f"{check}: {type(error).__name__}: {str(error)[:400]}")
    messages = dict.fromkeys(f"{w.category.__name__}: {str(w.message)[:200]}" for w in caught)
    result.problems.extend(messages)
    result.seconds = round(time.process_time() - started, 1)
    return result


def main() -> int:
    parser = scanning.parser("Take tiny transformers models of many architectures the whole way.", tiny.ARCHITECTURES)
    parser.add_argument("--checks", nargs="+", default=list(CHECKS), choices=CHECKS, metavar="CHECK")
    parser.add_argument("--trace", action="store_true", help="print the traceback of an error")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with quiet():
        return scanning.report(arguments, lambda name: check_one(name, arguments))


def check_one(name: str, arguments: Any) -> Result:
    config = scanning.options(arguments, list(tiny.ARCHITECTURES).index(name))
    convolutions = any(isinstance(module, nn.modules.conv._ConvNd) for module in tiny.build(name).modules())
    if convolutions and arguments.activation_scale is None:  # which have no tokens
        config.pop("activation_scale", None)
    return check_architecture(name, arguments.checks, arguments.trace, **config)


@contextmanager
def quiet() -> Iterator[None]:
    """No reports of what transformers loads, no bars, and no list of what is unsupported."""
    logger, bars = logging.getLogger("hf_daq"), transformers.logging.is_progress_bar_enabled()
    levels = transformers.logging.get_verbosity(), logger.level
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        transformers.logging.set_verbosity(levels[0])
        logger.setLevel(levels[1])
        if bars:
            transformers.logging.enable_progress_bar()


if __name__ == "__main__":
    sys.exit(main())
