"""What a checkpoint says of itself: config.json, and the header of its weights file, read without a tensor and without torch.

The header's metadata has one key, "hf_daq", with a JSON string `{"hf_daq_version": ..., "quantization_config": ...}`; in
a packed file also `"shapes": {layer: shape of its weight}`, so that codes can be read without the model; `"names": {layer:
its name in the file}` where transformers renames tensors as it saves; `"tied": {layer: embedding}` of layers that have their
weight, codes and scales from an embedding; and `"card"`, the facts of the model card.
"""

from __future__ import annotations

import json
import re
import shutil
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from ..config import QUANT_METHOD, DaqConfig
from ..errors import CheckpointError, ConfigError
from .atomic import outdated, replace_file
from .facts import CardFacts

WEIGHTS_NAME = "model.safetensors"
CONFIG_NAME = "config.json"
METADATA_KEY = "hf_daq"
_VARIANT = re.compile(r"model(?:\.(.+?))?(?:-\d+-of-\d+)?\.safetensors")  # transformers' names
ARCHITECTURE = "hf_daq"  # of timm's factory
BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "F8_E5M2": 1, "C64": 8, "BOOL": 1}
BYTES |= {f"{kind}{8 * size}": size for kind in "IU" for size in (1, 2, 4, 8)}


@dataclass(frozen=True)
class Header:
    """What a weights file says of itself: quantization config, library version, name -> (dtype, shape), the shapes of packed
    weights and of experts, the facts of its card, names of layers in the file where these are others, of embeddings whose weight
    a layer shares, of the tensors that hold the weight of a layer of experts, with a * for their numbers, and the fingerprint of the
    model."""

    config: DaqConfig
    version: str
    tensors: dict[str, tuple[str, tuple[int, ...]]]
    shapes: dict[str, list[int]]
    facts: CardFacts = field(default_factory=CardFacts)
    names: dict[str, str] = field(default_factory=dict)
    tied: dict[str, str] = field(default_factory=dict)
    weights: dict[str, list[str]] = field(default_factory=dict)
    fingerprint: str | None = None

    @cached_property
    def by_form(self) -> dict[str, list[str]]:
        """The tensors of each name, and of each name with a * for its last number."""
        found: dict[str, list[str]] = {}
        for name in self.tensors:
            for form in {name, starred(name)}:
                found.setdefault(form, []).append(name)
        return found


def starred(name: str) -> str:
    """The name with a * for the last of its parts that is a number."""
    parts = name.split(".")
    last = max((place for place, part in enumerate(parts) if part.isdecimal()), default=None)
    return name if last is None else ".".join([*parts[:last], "*", *parts[last + 1 :]])


def read_description(directory: Path) -> dict[str, Any]:
    """The content of config.json."""
    path = directory / CONFIG_NAME
    try:
        description = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(
            f"{directory} has no {CONFIG_NAME}; is it a folder written by hf_daq.save_pretrained?"
        ) from None
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} cannot be read as JSON: {error}") from None
    if not isinstance(description, dict):
        raise CheckpointError(f"{path} must hold a JSON object")
    return description


def describes_transformers_model(description: Mapping[str, Any]) -> bool:
    """True for a config.json of a DAQ model that transformers saved."""
    config = description.get("quantization_config")
    return isinstance(config, dict) and config.get("quant_method") == QUANT_METHOD and "model_type" in description


def describes_timm_model(description: Mapping[str, Any]) -> bool:
    """True for a config.json of a DAQ model of timm."""
    return description.get("architecture") == ARCHITECTURE and isinstance(description.get("model_args"), dict)


def described_config(description: Mapping[str, Any], path: Any) -> DaqConfig:
    """The quantization config of a config.json."""
    values = (description["model_args"] if describes_timm_model(description) else description).get(
        "quantization_config"
    )
    if not isinstance(values, dict) or values.get("quant_method") != QUANT_METHOD:
        raise CheckpointError(f"{path} has no DAQ quantization config: it is not a checkpoint of hf_daq")
    try:
        return DaqConfig.from_dict(values)
    except ConfigError as error:
        raise CheckpointError(f"{path}: quantization config: {error}") from None


def read_header(path: Path) -> Header:
    """Names, dtypes, shapes and the quantization config of a weights file, without reading a tensor."""
    try:
        with safe_open(path, framework="np") as file:
            found = file.metadata() or {}
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
            tensors = {name: (part.get_dtype(), tuple(part.get_shape())) for name, part in slices.items()}
    except FileNotFoundError:
        raise CheckpointError(f"{path.parent} has no {path.name}") from None
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(f"{path} is not a whole safetensors file: {error}") from None
    return parse_header(path, found, tensors)


def parse_header(path: Any, metadata: Mapping[str, str], tensors: dict[str, tuple[str, tuple[int, ...]]]) -> Header:
    """The header of the file at `path` from its metadata and what it says of its tensors."""
    if METADATA_KEY not in metadata:
        raise CheckpointError(f"{path} has no {METADATA_KEY!r} metadata: it was not written by hf_daq.save_pretrained")
    try:
        content = json.loads(metadata[METADATA_KEY])
        config = DaqConfig.from_dict(content["quantization_config"])
        version, shapes = str(content["hf_daq_version"]), content.get("shapes", {})
        facts = CardFacts.from_dict(content.get("card", {}))
        names, tied = (
            {str(name): str(other) for name, other in content.get(key, {}).items()} for key in ("names", "tied")
        )
        weights = {str(name): list(map(str, keys)) for name, keys in content.get("weights", {}).items()}
        fingerprint = content.get("fingerprint")
    except ConfigError as error:
        raise CheckpointError(f"{path}: quantization config: {error}") from None
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from None
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{path}: damaged {METADATA_KEY!r} metadata: {error!r}") from None
    if config.layers is None:
        raise CheckpointError(f"{path}: the quantization config has no resolved layers")
    return Header(config, version, tensors, shapes, facts, names, tied, weights, fingerprint)


def read_agreeing_header(path: Path, config: DaqConfig) -> Header:
    """`read_header`, refused if its quantization config is not the one of config.json."""
    header = read_header(path)
    check_agreement(header, config, path)
    return header


def check_agreement(header: Header, config: DaqConfig, path: Any) -> None:
    """Refuse a weights file whose quantization config is not the one of config.json."""
    if header.config != config:
        raise CheckpointError(f"{path} and {CONFIG_NAME} disagree about the quantization config")


def joined(headers: list[Header]) -> Header:
    """One header for all shards of a checkpoint."""
    first = headers[0]
    if any(header.config != first.config for header in headers):
        raise CheckpointError("the weights files of this checkpoint disagree about the quantization config")
    tensors = {name: entry for header in headers for name, entry in header.tensors.items()}
    return replace(first, tensors=tensors)


def weights_files(directory: Path) -> list[Path]:
    """The weights file of a folder, or its shards; those of variants where there are no others."""
    files = sorted(path for path in directory.glob("model*.safetensors") if _VARIANT.fullmatch(path.name))
    return [path for path in files if _VARIANT.fullmatch(path.name)[1] is None] or files  # type: ignore[index]


def check_beside(directory: Path, written: Path) -> None:
    """Refuse to move files from the folder `written` to where a weights file stays, of another variant, that is not quantized alike:
    both have one config.json."""
    names = [path.name for path in written.iterdir()]
    config = next(read_header(written / name).config for name in sorted(names) if _VARIANT.fullmatch(name))
    replaced = {path.name for path in outdated(directory, names)} | set(names)
    for path in sorted(directory.glob("model*.safetensors")):
        if path.name in replaced or not _VARIANT.fullmatch(path.name):
            continue
        try:
            alike = read_header(path).config == config
        except CheckpointError:
            alike = False
        if not alike:
            raise CheckpointError(
                f"{path} would stay beside the saved model, and is in float or quantized in another way, while {CONFIG_NAME} "
                "serves both: save to another folder, or remove that file"
            )


def write_facts(path: Path, facts: CardFacts) -> None:
    """Put the facts of the card into the header of a weights file, in place of those it has; tensors stay as they are."""
    read_header(path)
    with open(path, "rb") as file:
        (size,) = struct.unpack("<Q", file.read(8))
        header = json.loads(file.read(size))
        content = json.loads(header["__metadata__"][METADATA_KEY]) | {"card": facts.to_dict()}
        header["__metadata__"][METADATA_KEY] = json.dumps(content, sort_keys=True)
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)  # tensors are aligned

        def write(target: Path) -> None:
            with open(target, "wb") as copy:
                copy.write(struct.pack("<Q", len(text)) + text)
                shutil.copyfileobj(file, copy, 2**20)

        replace_file(path, write)


CARD_NAME = "README.md"
