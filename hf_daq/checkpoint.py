"""`save_pretrained`, `push_to_hub` and `from_pretrained`."""

from __future__ import annotations

import copy
import logging
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import timm
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from .apply import packed_copy
from .config import DaqConfig
from .errors import CheckpointError, ConfigError, DaqError, ModelError
from .files import hub
from .files.atomic import PROBE_NAME, temporary_folder
from .files.card import write_card
from .files.facts import CardFacts
from .files.header import (
    CONFIG_NAME,
    WEIGHTS_NAME,
    described_config,
    describes_timm_model,
    describes_transformers_model,
    read_agreeing_header,
    read_description,
    read_header,
)
from .files.push import push_folder
from .files.weights_file import check_values, load_weights, write_checkpoint
from .integrations.timm import describe, described_model, is_timm_model
from .model.batch import tensors_in
from .model.patch import patch
from .model.roles import is_transformers_model
from .model.unchanged import check_unchanged, difference, refusal_of_parts
from .nn.layers import evaluating
from .nn.packed import daq_layers, packed_layers
from .nn.paths import bit_for_bit
from .nn.settle import settled
from .nn.swap import change_class

logger = logging.getLogger("hf_daq")


def save_pretrained(
    model: nn.Module,
    save_directory: str | Path,
    *,
    packed: bool = False,
    probe: Any = None,
    state_dict: Mapping[str, Tensor] | None = None,
    card: CardFacts | None = None,
    **kwargs: Any,
) -> None:
    """Write `model.safetensors` and `config.json` of a quantized model, both with its quantization config, and its model
    card `README.md`.

        hf_daq.save_pretrained(model, "out", packed=True)
        model = hf_daq.from_pretrained("out")

    A timm model is opened again by `timm.create_model("local-dir:...", pretrained=True)` after `import hf_daq`, a
    transformers model by `AutoModel....from_pretrained`, any model by `hf_daq.from_pretrained`. An interrupted save
    leaves the files that were there. A timm model that was changed since timm built it (fused, another head) is saved as one
    of your own class, and a warning says so. Float weights within rounding error of a threshold between two codes move off it, in
    the model too, so that it equals its file.

    Args:
        model: a quantized, calibrated model, not wrapped (`accelerator.unwrap_model(model)`), or a packed one.
        save_directory: created if needed.
        packed: write codes of a few bits instead of float weights, as `pack(model)` makes them; the model itself stays trainable.
        probe: a batch of inputs, a tensor or a mapping of tensors. The folder is opened again before it takes its place,
            and its outputs for the batch must be the model's, bit for bit; both are saved in `probe.safetensors`.
        state_dict: the tensors to write instead of `model.state_dict()`, e.g. gathered from sharded ranks.
        card: what the card cannot know from the model: base model, data, results. An edited card is not replaced.
        **kwargs: arguments of a transformers model's own `save_pretrained`, e.g. `max_shard_size`.

    Raises:
        ModelError: not a quantized model. CalibrationError: not calibrated. CheckpointError: a file instead of a folder;
        bounds that are not finite or have crossed; the outputs of the file are not the model's.
    """
    directory = Path(save_directory)
    if getattr(model, "daq_config", None) is None or not daq_layers(model):
        raise ModelError(
            refusal_of_parts(model)
            or "save_pretrained needs the model that apply_daq returned, not a float or wrapped one"
        )
    check_unchanged(model)
    if "push_to_hub" in kwargs:
        raise ModelError('write hf_daq.push_to_hub(model, "user/name") to upload a model')
    if probe is not None and not isinstance(probe, Tensor | Mapping):
        raise ModelError(
            f"probe is a {type(probe).__name__}: give the tensor that the model takes, or a mapping of its arguments"
        )
    if packed and state_dict is not None:
        raise ModelError("a packed file is written from the model itself: save the state dict, open it, then pack")
    saved = packed_copy(model) if packed and not packed_layers(model) else model
    if probe is None:
        _write(saved, directory, state_dict, card, kwargs)
    else:
        outputs = _outputs(model, probe)
        with temporary_folder(directory) as temporary:
            _write(saved, temporary, state_dict, card, kwargs)
            _compare(outputs, _outputs(_opened(saved, temporary), probe))
            _write_probe(temporary / PROBE_NAME, probe, outputs)
    write_card(directory)


def push_to_hub(
    model: nn.Module,
    repo_id: str,
    *,
    packed: bool = False,
    probe: Any = None,
    card: CardFacts | None = None,
    commit_message: str | None = None,
    commit_description: str | None = None,
    private: bool | None = None,
    token: str | bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    overwrite_card: bool = False,
    **kwargs: Any,
) -> Any:
    """Save a quantized timm or transformers model to a repository of the Hub, which is created if needed, as one commit: an
    interrupted upload changes nothing in it.

    Args:
        model, packed, probe, card, **kwargs: as in `save_pretrained`.
        repo_id: "user/name", or "name" for the user whom the token names.
        commit_message, commit_description, private, token, revision, create_pr: as in huggingface_hub.
        overwrite_card: replace the repository's card even if it was edited; else an edited card stays, with a warning.

    Returns:
        `huggingface_hub.CommitInfo`, also a text: the address of the commit.

    Raises:
        HubError: not allowed, not reached, interrupted. Other errors as of `save_pretrained`, before anything is sent.
    """
    with TemporaryDirectory() as folder:
        save_pretrained(model, folder, packed=packed, probe=probe, card=card, **kwargs)
        return push_folder(
            Path(folder),
            repo_id,
            private=private,
            token=token,
            revision=revision,
            create_pr=create_pr,
            commit_message=commit_message,
            commit_description=commit_description,
            overwrite_card=overwrite_card,
        )


def _write(
    model: nn.Module,
    directory: Path,
    state_dict: Mapping[str, Tensor] | None,
    card: CardFacts | None,
    kwargs: dict[str, Any],
) -> None:
    if is_transformers_model(model):
        from .integrations.transformers import save_checkpoint

        save_checkpoint(model, directory, card, state_dict=state_dict, **kwargs)
        return
    if kwargs:
        raise ModelError(f"{next(iter(kwargs))!r} is an argument for transformers models only")
    tensors = model.state_dict() if state_dict is None else state_dict
    check_values(tensors, model)
    tensors = settled(model, state_dict)
    config: Any = model.daq_config
    description = {"architecture": type(model).__name__, "quantization_config": config.to_dict()}
    if is_timm_model(model):
        of_timm = describe(model, config)
        problem = difference(tensors, lambda: described_model(of_timm))
        if problem:
            logger.warning(
                "timm would build another model than this one (%s), so the file is that of a class of your own: open it with "
                "hf_daq.from_pretrained(directory, model=model), for a float model that was changed in the same way",
                problem,
            )
        else:
            description = of_timm
    with temporary_folder(directory) as temporary:
        write_checkpoint(temporary, tensors, model, description, (card or CardFacts()).with_versions())


def from_pretrained(
    path_or_repo: str | Path,
    model: nn.Module | None = None,
    *,
    revision: str | None = None,
    cache_dir: str | None = None,
    token: str | bool | None = None,
    local_files_only: bool = False,
    **kwargs: Any,
) -> nn.Module:
    """Open a checkpoint of `save_pretrained`: a folder, or a repository of the Hub.

        model = hf_daq.from_pretrained("out")
        logits = model(images)

    Args:
        path_or_repo: folder, or "user/name".
        model: a float model to quantize and load in place, as the checkpoint says; None builds the timm or transformers
            model that the checkpoint names.
        revision, cache_dir, token, local_files_only: as in huggingface_hub, whose offline mode holds too.
        **kwargs: arguments of the timm model, e.g. `num_classes`, `drop_rate`; for a transformers model those of its own
            `from_pretrained`.

    Returns:
        The model in evaluation mode. It can be evaluated, or trained on.

    Raises:
        CheckpointError: damaged, unknown, or not fitting the model, which is then left as it was.
        HubError: the repository is not there, may not be read, or is not reached.
    """
    if model is not None and is_transformers_model(model):
        raise ModelError(
            f"a transformers model is opened by its class: {type(model).__name__}.from_pretrained({path_or_repo!r})"
        )
    directory = Path(path_or_repo)
    if not directory.is_dir():
        if not hub.is_repository(path_or_repo):
            raise CheckpointError(
                f"{str(path_or_repo)!r} is neither a folder nor the name of a repository such as 'user/name'"
            )
        options = {"revision": revision, "cache_dir": cache_dir, "token": token, "local_files_only": local_files_only}
        directory = hub.download(str(path_or_repo), **options)
    description = read_description(directory)
    if model is None and describes_transformers_model(description):
        from .integrations.transformers import open_checkpoint

        return open_checkpoint(directory, description, **kwargs)
    config = described_config(description, directory / CONFIG_NAME)
    weights = directory / WEIGHTS_NAME
    if model is not None:
        return _load_into(model, config, weights)
    if not describes_timm_model(description):
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


def _load_into(model: nn.Module, config: DaqConfig, weights: Path) -> nn.Module:
    header = read_agreeing_header(weights, config)
    before = [(module, type(module), _copied(vars(module))) for module in model.modules()]
    try:
        patch(model, config)
        load_weights(model, header, weights)
    except BaseException as error:
        for module, kind, state in before:
            change_class(module, kind)
            module.__dict__ = state
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
    if is_transformers_model(model) or describes_timm_model(read_description(directory)):
        return from_pretrained(directory).to(device)
    opened = copy.deepcopy(model)
    with torch.no_grad():
        for tensor in opened.state_dict().values():
            tensor.zero_()
    path = directory / WEIGHTS_NAME
    load_weights(opened, read_header(path), path)
    return opened


@torch.no_grad()
def _outputs(model: nn.Module, probe: Any) -> list[Tensor]:
    """Every tensor that the model gives for these inputs, in evaluation mode."""
    with evaluating(model), bit_for_bit():
        output = model(**probe) if isinstance(probe, Mapping) else model(probe)
    return tensors_in(output)


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
