"""What a model card says of feeding a checkpoint: the lines that run one image or one sentence through it, and through the
ONNX files beside it."""

from __future__ import annotations

import logging
import mmap
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..text import printable
from .header import read_description, read_header, weights_files
from .inspect import Inspection

logger = logging.getLogger("hf_daq")

EXACT_WITHOUT_VNNI = "session.x64quantprecision"
"""The option of ONNX Runtime with which x86 processors without VNNI add products of 8-bit inputs and weights exactly; on others it
does nothing."""
_IMAGE = """\
import torch
from PIL import Image
from timm.data import create_transform, resolve_data_config

transform = create_transform(**resolve_data_config(model=model))
image = transform(Image.open("image.jpg").convert("RGB"))
with torch.no_grad():
    probabilities = model(image[None]).softmax(1)[0]"""

_PIPELINE = """\
from transformers import {auto}, pipeline

run = pipeline("{task}", model=model, {argument}={auto}.from_pretrained("{where}"))
print(run("{example}"))"""

_ONNX_IMAGE = """\
import json
import numpy as np
import onnxruntime
from PIL import Image, ImageOps

session = onnxruntime.InferenceSession("{name}")
source, about = session.get_inputs()[0], session.get_modelmeta().custom_metadata_map
image, size = Image.open("image.jpg").convert("RGB"), source.shape[:1:-1]
image = ImageOps.fit(image, size, Image.Resampling.{filter}, (1 - float(about["crop_pct"])) / 2)
x = (np.asarray(image) / 255 - json.loads(about["mean"])) / json.loads(about["std"])
logits = session.run(None, {{source.name: x.transpose(2, 0, 1)[None].astype(np.float32)}})[0]"""

_ONNX_TEXT = """\
import onnxruntime
from transformers import AutoTokenizer

session = onnxruntime.InferenceSession("{name}")
encoded = AutoTokenizer.from_pretrained("{where}")("{example}", return_tensors="np")
logits = session.run(None, {{entry.name: encoded[entry.name] for entry in session.get_inputs()}})[0]"""

_ONNX_CACHE = """\
import numpy as np
import onnxruntime
from transformers import AutoTokenizer

session = onnxruntime.InferenceSession("{name}")
tokenizer = AutoTokenizer.from_pretrained("{where}")
takes = {{entry.name: entry.shape for entry in session.get_inputs()}}
past = {{name: np.zeros((1, size[1], 0, size[3]), np.float32) for name, size in takes.items() if len(size) == 4}}
ids = new = tokenizer("{example}", return_tensors="np")["input_ids"]
for _ in range(20):
    positions = np.arange(ids.shape[1])[None, -new.shape[1] :]
    fed = {{"input_ids": new, "attention_mask": np.ones_like(ids), "position_ids": positions}}
    logits, *present = session.run(None, {{name: fed[name] for name in fed if name in takes}} | past)
    new, past = logits[:, -1:].argmax(-1), dict(zip(past, present))
    ids = np.concatenate([ids, new], 1)
print(tokenizer.decode(ids[0]))"""

_TEXT_TASKS = {
    "text-classification": "A sentence.",
    "token-classification": "A sentence.",
    "fill-mask": "A [MASK] sentence.",
    "text-generation": "A sentence",
}
_FILTERS = {"nearest": "NEAREST", "bilinear": "BILINEAR", "bicubic": "BICUBIC", "lanczos": "LANCZOS", "box": "BOX"}


def running(inspection: Inspection, task: str | None, repo_id: str | None) -> list[str]:
    """Paragraphs in Markdown, none where it is not known how the model is fed.

    Args:
        inspection: of a folder.
        task: of the Hub's pipelines.
    """
    folder = Path(inspection.source)
    onnx = {printable(path.name): path for path in _onnx_files(folder)}
    if inspection.library == "timm":
        description = read_description(folder)
        image = image_facts(description.get("pretrained_cfg")) | _only_labels(description)
        parts = ["## Run it on an image", *_sentences(image), _python(_IMAGE)]
        fits = image.get("crop_mode", "center") == "center" and {"mean", "std", "crop_pct"} <= image.keys()
        name = _FILTERS.get(str(image.get("interpolation")))
        code = [_ONNX_IMAGE.format(name=one, filter=name) for one in onnx if fits and name]
        return [*parts, *(_onnx(lines, inspection) for lines in code)]
    where, sources = _companions(inspection, folder, repo_id)
    if task == "image-classification":
        given = {"auto": "AutoImageProcessor", "argument": "image_processor", "example": "image.jpg"}
        return ["## Run it on an image", *sources, _python(_PIPELINE.format(task=task, where=where, **given))]
    if task not in _TEXT_TASKS:
        return []
    given = {"auto": "AutoTokenizer", "argument": "tokenizer", "example": _TEXT_TASKS[task]}
    parts = ["## Run it on a sentence", *sources, _python(_PIPELINE.format(task=task, where=where, **given))]
    for name, path in onnx.items():
        lines = _ONNX_CACHE if _takes_cache(path) else _ONNX_TEXT
        parts.append(_onnx(lines.format(name=name, where=where, example=given["example"]), inspection))
    return parts


def _onnx_files(folder: Path) -> list[Path]:
    """Those of the model in the folder. Of one that was saved there before they may be left."""
    found = []
    for path in sorted(folder.glob("*.onnx")):
        known = _last_in(path, b"fingerprint", 64)
        named = known and re.search(rb"daq-[0-9a-f]{32}", known)
        if named and read_header(weights_files(folder)[0]).fingerprint not in (None, named[0].decode()):
            logger.warning("%s is of another model than the weights beside it: export it again, or delete it", path)
        else:
            found.append(path)
    return found


def _takes_cache(path: Path) -> bool:
    """Whether an ONNX file is that of a decoder with its cache: the names of inputs are behind the weights."""
    return _last_in(path, b"past_key_values.0.key", 0) is not None


def _last_in(path: Path, what: bytes, length: int) -> bytes | None:
    """So many bytes of the file behind the last place of these, None where they are not in it."""
    with path.open("rb") as file:
        if path.stat().st_size == 0:
            return None
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            place = content.rfind(what)
            return None if place < 0 else content[place + len(what) : place + len(what) + length]


def image_facts(config: Any) -> dict[str, Any]:
    """What timm's `pretrained_cfg` says of images, of the types that it should have: input_size (3, height, width), mean and
    std of the channels, interpolation, crop_pct, crop_mode, and label_names, where they are known."""
    if not isinstance(config, Mapping):
        return {}
    found: dict[str, Any] = {}
    for key, kind, count in (("input_size", int, 3), ("mean", float, 3), ("std", float, 3), ("label_names", str, None)):
        value = config.get(key)
        if isinstance(value, list | tuple) and len(value) == (count or len(value)):
            found |= {key: list(value)} if all(type(entry) in (kind, int) for entry in value) else {}
    for key in ("interpolation", "crop_mode"):
        if isinstance(config.get(key), str) and config[key]:
            found[key] = config[key]
    if isinstance(config.get("crop_pct"), int | float):
        found["crop_pct"] = config["crop_pct"]
    return found


def _only_labels(description: Mapping[str, Any]) -> dict[str, Any]:
    """timm writes them beside `pretrained_cfg`."""
    return {key: value for key, value in image_facts(description).items() if key == "label_names"}


def _sentences(image: Mapping[str, Any]) -> list[str]:
    parts = []
    if "input_size" in image:
        parts.append("RGB, {} x {} x {} (channels, height, width)".format(*image["input_size"]))
    if "interpolation" in image and "crop_pct" in image:
        mode = _plain(image.get("crop_mode", "center"))
        parts.append(
            f"resized with `{_plain(image['interpolation'])}`, `crop_pct={image['crop_pct']:g}`, crop `{mode}`"
        )
    if "mean" in image and "std" in image:
        parts.append(f"scaled to 0 to 1, minus the mean {tuple(image['mean'])}, over the std {tuple(image['std'])}")
    sentences = [f"Images are {'; '.join(parts)}."] if parts else []
    labels = image.get("label_names") or []
    if labels:
        more = f" and so on, {len(labels)} in all: `label_names` in config.json" if len(labels) > 10 else ""
        sentences.append(f"Classes, in order: {', '.join(f'`{_plain(label)}`' for label in labels[:10])}{more}.")
    return sentences


def _companions(inspection: Inspection, folder: Path, repo_id: str | None) -> tuple[str, list[str]]:
    """Where tokenizer or image processor are, and a sentence where they are not known to be."""
    names = (
        "tokenizer_config.json",
        "tokenizer.json",
        "vocab.txt",
        "preprocessor_config.json",
        "processor_config.json",
    )
    base = inspection.facts.base_model
    if any((folder / name).exists() for name in names):
        return repo_id or "PATH", []
    if base:
        return _plain(base), []
    rest = (
        "The tokenizer or image processor of the float model belongs into the folder: its `save_pretrained` writes it."
    )
    return repo_id or "PATH", [rest]


def _plain(value: Any) -> str:
    """Words of somebody else inside of code."""
    return " ".join(printable(str(value)).replace("`", "'").replace('"', "'").replace("\\", "/").split())


def _python(code: str) -> str:
    return f"```python\n{code}\n```"


def _onnx(code: str, inspection: Inspection) -> str:
    text = f"In ONNX Runtime, without hf_daq and PyTorch:\n\n{_python(code)}"
    if any(layer.weight_bits == layer.activation_bits == 8 for layer in inspection.layers):
        text += (
            "\n\nx86 processors without VNNI cut off sums of 8-bit products, unless the session is opened with `options`, where "
            f'`options = onnxruntime.SessionOptions()` and `options.add_session_config_entry("{EXACT_WITHOUT_VNNI}", "1")`.'
        )
    return text
