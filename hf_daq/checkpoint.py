"""`save_pretrained` and `from_pretrained`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import timm
from huggingface_hub import hf_hub_download
from torch import Tensor, nn

from . import fileformat, hub_timm
from .config import QUANT_METHOD, DaqConfig
from .errors import CheckpointError, ConfigError, ModelError
from .layers import quantized_layers
from .patch import patch, unpatch
from .special import is_transformers_model


def save_pretrained(
    model: nn.Module, save_directory: str | Path, *, state_dict: Mapping[str, Tensor] | None = None, **kwargs: Any
) -> None:
    """Write `model.safetensors` and `config.json` of a quantized model, both with its quantization config.

    A timm model is opened again by `timm.create_model("local-dir:...", pretrained=True)` after `import hf_daq`, a
    transformers model by `AutoModel....from_pretrained`, any model by `hf_daq.from_pretrained`. An interrupted save leaves the files that were there.

    Args:
        model: a quantized, calibrated model, not wrapped (`accelerator.unwrap_model(model)`).
        save_directory: created if needed.
        state_dict: the tensors to write instead of `model.state_dict()`, e.g. gathered from sharded ranks.
        **kwargs: of the `save_pretrained` of a transformers model, e.g. `max_shard_size`.

    Raises:
        ModelError: not a quantized model. CalibrationError: not calibrated. CheckpointError: bounds that are not finite
        or have crossed.
    """
    config: DaqConfig | None = getattr(model, "daq_config", None)
    if config is None or not quantized_layers(model):
        raise ModelError("save_pretrained needs the model that apply_daq returned, not a float or wrapped one")
    if is_transformers_model(model):
        from . import hub_transformers

        hub_transformers.save(model, Path(save_directory), state_dict, **kwargs)
        return
    if kwargs:
        raise ModelError(f"{next(iter(kwargs))!r} is an argument for transformers models only")
    tensors = model.state_dict() if state_dict is None else state_dict
    fileformat.check_values(tensors, model)
    if hub_timm.is_timm_model(model):
        description = hub_timm.describe(model, config)
    else:
        description = {"architecture": type(model).__name__, "quantization_config": config.to_dict()}
    fileformat.write(Path(save_directory), tensors, config, description)


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
    loaded: nn.Module = timm.create_model(f"local-dir:{directory}", pretrained=True, **kwargs)
    return loaded


def _is_of_transformers(description: dict[str, Any]) -> bool:
    """True for a config.json of a DAQ model that transformers saved."""
    config = description.get("quantization_config")
    return isinstance(config, dict) and config.get("quant_method") == QUANT_METHOD and "model_type" in description


def _load_into(model: nn.Module, config: DaqConfig, weights: Path) -> nn.Module:
    header = fileformat.read_agreeing_header(weights, config)
    try:
        patch(model, config)
    except ConfigError as error:
        raise CheckpointError(f"{weights} does not fit the model: {error}") from None
    try:
        fileformat.load(model, header, weights)
    except BaseException:
        unpatch(model)
        raise
    return model.eval()
