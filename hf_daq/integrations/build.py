"""Float models by name, with shapes but without weights: on the meta device, from a configuration alone."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import timm
import torch
import transformers
from torch import nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from ..config import did_you_mean
from ..errors import CheckpointError, DaqError, ModelError
from ..files import hub
from ..files.header import CONFIG_NAME, describes_timm_model, read_description

_ROOM = 100_000  # parameters of a model, which a configuration from a stranger may ask for


def skeleton(name: str, revision: str | None = None) -> nn.Module:
    """A float model without weights. No code of a repository is run, and of one only config.json is downloaded.

    Args:
        name: name of a timm model, e.g. "resnet18"; a folder of a float model of timm or transformers; or its repository,
            "user/name", also as "hf-hub:user/name".
        revision: branch, tag or commit of the repository.

    Raises:
        ModelError: an unknown name, or a model that its library cannot build. CheckpointError: no configuration of a float
        model. HubError: a repository that is not there or not reached.
    """
    name = name.removeprefix("local-dir:").removeprefix("hf-hub:").removeprefix("hf_hub:")
    directory = Path(name)
    if (directory / CONFIG_NAME).is_file():
        return _from_folder(directory, name)
    if hub.is_repository(name) and not directory.exists():
        return _from_folder(downloaded(name, revision), name)
    if timm.is_model(name):
        return _built(lambda: timm.create_model(name, pretrained=False), "timm", name)
    if directory.is_dir():
        raise CheckpointError(f"{name} has no {CONFIG_NAME}, so it is no folder of a model of timm or transformers")
    raise ModelError(
        f"{name!r} is neither a model of timm{did_you_mean(name, timm.list_models())}, nor a folder with {CONFIG_NAME}, nor "
        "the name of a repository such as 'user/name'"
    )


def pretrained(name: str, revision: str | None = None) -> nn.Module:
    """A float model with its weights, in evaluation mode. No code of a repository is run. Weights of folders and of transformers
    are read from safetensors; for a name of timm, timm knows where they are.

    Args:
        name, revision: as of `skeleton`.

    Raises:
        As `skeleton`; CheckpointError: no safetensors weights.
    """
    name = name.removeprefix("local-dir:").removeprefix("hf-hub:").removeprefix("hf_hub:")
    directory = Path(name)
    skeleton(name, revision)  # refuses what is not a float model that can be built
    is_folder = (directory / CONFIG_NAME).is_file()
    if is_folder and not list(directory.glob("*.safetensors")):
        raise CheckpointError(f"{name} has no weights in safetensors format, the only one that is read")
    if not is_folder and not hub.is_repository(name):
        return _loaded(name, lambda: timm.create_model(name, pretrained=True))
    description = read_description(directory if is_folder else downloaded(name, revision))
    if "model_type" not in description:
        source = f"local-dir:{directory}" if is_folder else f"hf-hub:{name}" + (f"@{revision}" if revision else "")
        return _loaded(name, lambda: timm.create_model(source, pretrained=True))
    return _of_transformers(name, description, revision)


def compressed(directory: Path) -> nn.Module | None:
    """What `export_compressed_tensors` wrote to a folder, as transformers opens it; None if it is something else."""
    description = read_description(directory)
    if _quant_method(description) != "compressed-tensors":
        return None
    return _of_transformers(str(directory), description, None)


def _of_transformers(name: str, description: Mapping[str, Any], revision: str | None) -> nn.Module:
    if kernel := foreign_kernel(description):
        raise CheckpointError(f"{name} asks for a kernel of a repository ({kernel}), whose code is not run")
    options = {"use_safetensors": True, "trust_remote_code": False} | ({"revision": revision} if revision else {})
    return _loaded(name, lambda: model_class(description, name).from_pretrained(name, **options))


def _loaded(name: str, load: Callable[[], Any]) -> nn.Module:
    try:
        with hub.explained(name):
            model: nn.Module = load()
    except (RuntimeError, OSError) as error:
        raise CheckpointError(f"the weights of {name} cannot be loaded: {error}") from error
    return model.eval()


def downloaded(repo_id: str, revision: str | None) -> Path:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import LocalEntryNotFoundError, RemoteEntryNotFoundError

    with hub.explained(repo_id):
        try:
            return Path(hf_hub_download(repo_id, CONFIG_NAME, revision=revision)).parent
        except LocalEntryNotFoundError:
            raise
        except RemoteEntryNotFoundError as error:
            raise CheckpointError(f"{repo_id} has no {CONFIG_NAME}, so its model is not known") from error


def is_quantized(description: Mapping[str, Any]) -> bool:
    """Whether a config.json is of a quantized model, by us or another."""
    return describes_timm_model(description) or description.get("quantization_config") is not None


def _quant_method(description: Mapping[str, Any]) -> Any:
    config = description.get("quantization_config")
    return config.get("quant_method") if isinstance(config, dict) else "daq"


def _from_folder(directory: Path, name: str) -> nn.Module:
    description = read_description(directory)
    if is_quantized(description):
        method = _quant_method(description)
        hint = f"; `hf-daq inspect {name}` shows what is in it" if method == "daq" else ""
        raise CheckpointError(f"{name} is quantized already ({method}); a plan is for a float model{hint}")
    if "model_type" in description:
        return _transformers_skeleton(directory, description, name)
    if "architecture" in description:
        return _built(lambda: timm.create_model(f"local-dir:{directory}", pretrained=False), "timm", name)
    raise CheckpointError(f"{CONFIG_NAME} of {name} names neither a model of timm nor one of transformers")


def _transformers_skeleton(directory: Path, description: dict[str, Any], name: str) -> nn.Module:
    import transformers

    of_class = model_class(description, name)

    def build() -> Any:
        config = transformers.AutoConfig.from_pretrained(directory, trust_remote_code=False)
        # A configuration may ask for kernels of a repository.
        return of_class._from_config(config, attn_implementation="eager", experts_implementation="eager")

    return _built(build, "transformers", name)


def _built(build: Any, library: str, name: str) -> nn.Module:
    try:
        with torch.device("meta"), building(_ROOM):
            model: nn.Module = build()
    except DaqError:
        raise
    except Exception as error:
        raise ModelError(f"{library} cannot build {name}: {error}") from error
    return model.eval()


@contextmanager
def building(room: int) -> Iterator[None]:
    """While a model is built as a file describes it: no more parameters than this, however deep a network it asks for."""
    left = room

    def count(*_: Any) -> None:
        nonlocal left
        left -= 1
        if left < 0:
            raise CheckpointError(f"the model that is described has more than {room} parameters")

    hook = register_module_parameter_registration_hook(count)
    try:
        yield
    finally:
        hook.remove()


def model_class(description: Mapping[str, Any], source: Any) -> Any:
    """The class of transformers that a config.json names.

    Raises:
        CheckpointError: none.
    """
    names = description.get("architectures")
    name = names[0] if isinstance(names, list) and names else None
    found: Any = getattr(transformers, name, None) if isinstance(name, str) else None
    if not (isinstance(found, type) and issubclass(found, transformers.PreTrainedModel)):
        raise CheckpointError(
            f"architectures={names!r} of {source} names no model of transformers ({transformers.__version__}); code of a "
            "repository is not run"
        )
    return found


def foreign_kernel(values: Any) -> str | None:
    """An implementation that a config names and that is not of transformers but of a repository."""
    entries = values.items() if isinstance(values, Mapping) else ()
    for key, value in entries:
        if str(key).endswith("_implementation") and re.search(r"[/:@]", repr(value)):
            return repr(value)
        if found := foreign_kernel(value):
            return found
    return None
