"""`save_pretrained` and `from_pretrained`."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import timm
import torch
from huggingface_hub import hf_hub_download
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from . import fileformat, hub_timm
from .config import QUANT_METHOD, DaqConfig
from .errors import CheckpointError, ConfigError, DaqError, ModelError
from .fileformat import PROBE_NAME, temporary_folder
from .layers import evaluating
from .packed import daq_layers, packed_layers
from .packing import packed_copy
from .patch import patch
from .special import is_transformers_model


def save_pretrained(
    model: nn.Module,
    save_directory: str | Path,
    *,
    packed: bool = False,
    probe: Any = None,
    state_dict: Mapping[str, Tensor] | None = None,
    **kwargs: Any,
) -> None:
    """Write `model.safetensors` and `config.json` of a quantized model, both with its quantization config.

    A timm model is opened again by `timm.create_model("local-dir:...", pretrained=True)` after `import hf_daq`, a
    transformers model by `AutoModel....from_pretrained`, any model by `hf_daq.from_pretrained`. An interrupted save
    leaves the files that were there.

    Args:
        model: a quantized, calibrated model, not wrapped (`accelerator.unwrap_model(model)`), or a packed one.
        save_directory: created if needed.
        packed: write codes of a few bits instead of float weights, as of `pack(model)`; the model itself stays trainable.
        probe: a batch of inputs, a tensor or a mapping of tensors. The folder is opened again before it takes its place,
            and its outputs for the batch must be the model's, bit for bit; both are kept in `probe.safetensors`.
        state_dict: the tensors to write instead of `model.state_dict()`, e.g. gathered from sharded ranks.
        **kwargs: of the `save_pretrained` of a transformers model, e.g. `max_shard_size`.

    Raises:
        ModelError: not a quantized model. CalibrationError: not calibrated. CheckpointError: bounds that are not finite
        or have crossed; the outputs of the file are not the model's.
    """
    directory = Path(save_directory)
    if getattr(model, "daq_config", None) is None or not daq_layers(model):
        raise ModelError("save_pretrained needs the model that apply_daq returned, not a float or wrapped one")
    if packed and state_dict is not None:
        raise ModelError("a packed file is written from the model itself: save the state dict, open it, then pack")
    saved = packed_copy(model) if packed and not packed_layers(model) else model
    if probe is None:
        _write(saved, directory, state_dict, kwargs)
        (directory / PROBE_NAME).unlink(missing_ok=True)
        return
    outputs = _outputs(model, probe)
    with temporary_folder(directory) as temporary:
        _write(saved, temporary, state_dict, kwargs)
        _compare(outputs, _outputs(_opened(saved, temporary), probe))
        _write_probe(temporary / PROBE_NAME, probe, outputs)


def _write(model: nn.Module, directory: Path, state_dict: Mapping[str, Tensor] | None, kwargs: dict[str, Any]) -> None:
    if is_transformers_model(model):
        from . import hub_transformers

        hub_transformers.save(model, directory, state_dict, **kwargs)
        return
    if kwargs:
        raise ModelError(f"{next(iter(kwargs))!r} is an argument for transformers models only")
    tensors = model.state_dict() if state_dict is None else state_dict
    fileformat.check_values(tensors, model)
    config: Any = model.daq_config
    if hub_timm.is_timm_model(model):
        description = hub_timm.describe(model, config)
    else:
        description = {"architecture": type(model).__name__, "quantization_config": config.to_dict()}
    fileformat.write(directory, tensors, model, description)


def from_pretrained(
    path_or_repo: str | Path,
    model: nn.Module | None = None,
    *,
    revision: str | None = None,
    cache_dir: str | None = None,
    token: str | bool | None = None,
    **kwargs: Any,
) -> nn.Module:
    """Open a checkpoint of `save_pretrained`: a folder, or a repository of the Hub.

    Args:
        path_or_repo: folder, or "user/name".
        model: a float model to quantize and load in place, as the checkpoint says; None builds the timm or transformers
            model that the checkpoint names.
        revision, cache_dir, token: as in huggingface_hub.
        **kwargs: arguments of the timm model, e.g. `num_classes`, `drop_rate`; for a transformers model those of its own
            `from_pretrained`.

    Returns:
        The model in evaluation mode. It can be evaluated, or trained on.

    Raises:
        CheckpointError: damaged, unknown, or not fitting the model, which is then left as it was.
    """
    options: dict[str, Any] = {"revision": revision, "cache_dir": cache_dir, "token": token}
    directory = Path(path_or_repo)
    is_repo = not directory.is_dir()
    if is_repo:
        repo = str(path_or_repo)
        if repo.count("/") != 1 or repo.startswith((".", "/")):
            raise CheckpointError(f"{repo!r} is neither a folder nor the name of a repository such as 'user/name'")
        directory = Path(hf_hub_download(repo, fileformat.CONFIG_NAME, **options)).parent
    if model is not None and is_transformers_model(model):
        raise ModelError(
            f"a transformers model is opened by its class: {type(model).__name__}.from_pretrained({path_or_repo!r})"
        )
    description = fileformat.read_description(directory)
    if model is None and _is_of_transformers(description):
        from . import hub_transformers

        return hub_transformers.open_checkpoint(path_or_repo, description, **options, **kwargs)
    weights = directory / fileformat.WEIGHTS_NAME
    model_args = description.get("model_args")
    is_timm = description.get("architecture") == hub_timm.ARCHITECTURE and isinstance(model_args, dict)
    try:
        config = DaqConfig.from_dict((model_args if is_timm else description).get("quantization_config"))  # type: ignore
    except ConfigError as error:
        raise CheckpointError(f"{directory / fileformat.CONFIG_NAME}: quantization config: {error}") from None
    if is_repo:
        hf_hub_download(str(path_or_repo), fileformat.WEIGHTS_NAME, **options)
    if model is not None:
        return _load_into(model, config, weights)
    if not is_timm:
        raise CheckpointError(
            f"{directory} holds a {description.get('architecture')}, which is neither a timm nor a transformers model; "
            "build it and write hf_daq.from_pretrained(path, model=model)"
        )
    try:
        loaded: nn.Module = timm.create_model(f"local-dir:{directory}", pretrained=True, **kwargs)
    except DaqError:
        raise
    except Exception as error:
        raise CheckpointError(f"timm cannot build the model that {directory} describes: {error!r}") from error
    return loaded


def _is_of_transformers(description: dict[str, Any]) -> bool:
    """True for a config.json of a DAQ model that transformers saved."""
    config = description.get("quantization_config")
    return isinstance(config, dict) and config.get("quant_method") == QUANT_METHOD and "model_type" in description


def _load_into(model: nn.Module, config: DaqConfig, weights: Path) -> nn.Module:
    header = fileformat.read_agreeing_header(weights, config)
    before = [(module, type(module), _copied(vars(module))) for module in model.modules()]
    try:
        patch(model, config)
        fileformat.load(model, header, weights)
    except BaseException as error:
        for module, kind, state in before:
            module.__class__, module.__dict__ = kind, state
        if isinstance(error, ConfigError):
            raise CheckpointError(f"{weights} does not fit the model: {error}") from None
        raise
    return model.eval()


def _copied(state: dict[str, Any]) -> dict[str, Any]:
    """The attributes of a module, with the registries of its parameters and children, but not the tensors, copied."""
    return {key: value.copy() if isinstance(value, dict) else value for key, value in state.items()}


def _opened(model: nn.Module, directory: Path) -> nn.Module:
    """What is saved in a folder, as others will open it, on the device of the model."""
    device = next(model.parameters()).device
    if is_transformers_model(model) or hub_timm.is_timm_model(model):
        return from_pretrained(directory).to(device)
    opened = copy.deepcopy(model)
    with torch.no_grad():
        for tensor in opened.state_dict().values():
            tensor.zero_()
    path = directory / fileformat.WEIGHTS_NAME
    fileformat.load(opened, fileformat.read_header(path), path)
    return opened


@torch.no_grad()
def _outputs(model: nn.Module, probe: Any) -> list[Tensor]:
    """Every tensor that the model gives for these inputs, in evaluation mode."""
    with evaluating(model):
        output = model(**probe) if isinstance(probe, Mapping) else model(probe)
    return [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor)]


def _compare(outputs: list[Tensor], reopened: list[Tensor]) -> None:
    for one, other in zip(outputs, reopened, strict=True):
        if not torch.equal(one, other):
            largest = (one.double() - other.double()).abs().max().item()
            raise CheckpointError(
                f"the saved model gives other outputs than the model: they differ by up to {largest:g}"
            )


def _write_probe(path: Path, probe: Any, outputs: list[Tensor]) -> None:
    inputs = probe if isinstance(probe, Mapping) else {"x": probe}
    tensors = {f"input.{key}": value for key, value in inputs.items() if isinstance(value, Tensor)}
    tensors |= {f"output.{index}": value for index, value in enumerate(outputs)}
    save_file({key: value.detach().contiguous().clone() for key, value in tensors.items()}, path)
