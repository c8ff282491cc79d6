"""The model card, README.md of a checkpoint: what its files say, the facts that were given, and nothing else.

A card has a line with its own digest. It tells an edited card from one that is as it was generated.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ..text import printable, width_text
from .facts import CardFacts
from .feeding import running
from .header import CARD_NAME, weights_files, write_facts
from .inspect import Inspection, grouped, inspect

logger = logging.getLogger("hf_daq")
_MARK = re.compile(r"^<!-- Written by hf_daq, digest ([0-9a-f]{16})\..*-->$", re.MULTILINE)
_TASKS = {
    "ForSequenceClassification": "text-classification",
    "ForTokenClassification": "token-classification",
    "ForQuestionAnswering": "question-answering",
    "ForMaskedLM": "fill-mask",
    "ForCausalLM": "text-generation",
    "ForImageClassification": "image-classification",
}


def write_card(directory: Path, repo_id: str | None = None, overwrite: bool = False) -> None:
    """Write the card of the checkpoint in a folder. An edited card stays as it is, with a warning, unless `overwrite`."""
    path = directory / CARD_NAME
    if not overwrite and has_edited_card(directory):
        logger.warning(
            "%s was edited, so it is not replaced; `hf-daq card %s --overwrite` replaces it", path, directory
        )
        return
    path.write_text(render(inspect(directory), repo_id), encoding="utf-8")


def update_card(directory: str | Path, facts: CardFacts, overwrite: bool = False) -> None:
    """Give the facts of its card to a checkpoint that is already saved, since results are mostly measured after saving.

    They replace earlier facts in the header of the weights files, and README.md is written again. An edited README.md
    stays as it is, with a warning, unless `overwrite`.

    Raises:
        CheckpointError: the folder holds no checkpoint of hf_daq.
    """
    directory = Path(directory)
    before = inspect(directory).facts
    for path in weights_files(directory):
        write_facts(path, facts.with_versions(before.versions))
    write_card(directory, overwrite=overwrite)


def has_edited_card(directory: Path) -> bool:
    """Whether a folder has a card that a person edited, or wrote."""
    card = read_card(directory)
    return card is not None and is_edited(card)


def read_card(directory: Path) -> str | None:
    """README.md of a folder, None without one."""
    path = directory / CARD_NAME
    return path.read_text(encoding="utf-8", errors="surrogateescape") if path.exists() else None


def is_edited(text: str) -> bool:
    """Whether a card is another text than was generated."""
    found = _MARK.search(text)
    return found is None or found[1] != _digest(text)


def _digest(text: str) -> str:
    return hashlib.sha256(_MARK.sub("", text).strip().encode(errors="surrogateescape")).hexdigest()[:16]


def render(inspection: Inspection, repo_id: str | None = None, license: str | None = None) -> str:
    """The text of the card.

    Args:
        inspection: of a folder.
        repo_id: repository of the card, which shows how to load from there.
        license: license of the base model, used where the facts name none.
    """
    facts, config = inspection.facts, inspection.config
    widths = sorted({width_text(layer.weight_bits, layer.activation_bits) for layer in inspection.layers})
    name = repo_id.split("/")[-1] if repo_id else f"{inspection.architecture} {' '.join(widths)}"
    origin = f"`{facts.base_model}`" if facts.base_model else f"A {inspection.architecture} of {inspection.library}"
    inputs = any(layer.activation_bits is not None for layer in inspection.layers)
    what = "weights and layer inputs" if inputs else "weights"
    meaning = "bits of weights (W) and of inputs (A)" if inputs else "bits of weights (W); inputs stay in float"
    intro = (
        f"{origin} with {what} of a few bits ({', '.join(widths)}: {meaning}), "
        "trained or calibrated with Distance-aware Quantization (DAQ: Kim, Lee, Ham, ICCV 2021) in hf_daq."
    )
    parts = [
        "<!-- MARK -->",
        f"# {_text(name)}",
        intro,
        "## Load it",
        *_loading(inspection, repo_id),
        *running(inspection, _task(inspection), repo_id),
        "## Quantized layers",
        _table(("layers", "bits of weights", "bits of inputs", "number", "weights"), _quantized_rows(inspection)),
        *_smooth(inspection),
        f"`{config.weight_granularity}` granularity, `weight_grid={config.weight_grid!r}`, `rounding={config.rounding!r}`, "
        f"`weight_normalization={config.weight_normalization!r}`.",
        "## In full precision",
        *_kept(inspection),
        "## Size",
        _table(("", "MB (10^6 bytes of tensors)"), _size_rows(inspection)),
        *_results(inspection),
        *_training(inspection),
        "## Versions",
        _table(("", "version"), list(_versions(inspection).items())),
    ]
    body = "\n\n".join(parts) + "\n"
    text = f"---\n{_front_matter(inspection, name, license)}\n---\n\n{body}"
    mark = "<!-- Written by hf_daq, digest %s. A card that is edited is not overwritten. -->"
    text = text.replace("<!-- MARK -->", mark % ("0" * 16), 1)
    return text.replace(mark % ("0" * 16), mark % _digest(text), 1)


def _front_matter(inspection: Inspection, name: str, license: str | None) -> str:
    from huggingface_hub import EvalResult, ModelCardData

    facts = inspection.facts
    task = _task(inspection)
    results = [
        EvalResult(
            task_type=task or "other",
            dataset_type=result.dataset or "unknown",
            dataset_name=result.dataset or "unknown",
            dataset_split=result.split,
            metric_type=result.metric,
            metric_name=result.metric,
            metric_value=result.value,
        )
        for result in facts.results
    ]
    data = ModelCardData(
        base_model=facts.base_model,
        base_model_relation="quantized" if facts.base_model else None,
        license=facts.license or license,
        library_name=inspection.library if inspection.library != "torch" else None,
        pipeline_tag=task,
        tags=["hf_daq", "quantization", "daq", inspection.architecture],
        datasets=[dataset for dataset in facts.datasets if re.fullmatch(r"[\w.-]+/[\w.-]+", dataset)] or None,
        metrics=sorted({result.metric for result in facts.results}) or None,
        model_name=name,
        eval_results=results or None,
    )
    if not results:
        data.model_name = None
    text: str = data.to_yaml()
    return text.strip()


def _task(inspection: Inspection) -> str | None:
    if inspection.library == "timm":
        return "image-classification"
    return next((task for suffix, task in _TASKS.items() if inspection.architecture.endswith(suffix)), None)


def _loading(inspection: Inspection, repo_id: str | None) -> list[str]:
    where = repo_id or "PATH"
    if inspection.library == "timm":
        lines = f'import hf_daq\nimport timm\n\nmodel = timm.create_model("{"hf-hub" if repo_id else "local-dir"}:{where}", pretrained=True)'
        without = "timm says `Unknown model (hf_daq)`"
    elif inspection.library == "transformers":
        cls = inspection.architecture
        lines = f'import hf_daq\nfrom transformers import {cls}\n\nmodel = {cls}.from_pretrained("{where}")'
        without = (
            "transformers refuses the folder"
            if inspection.packed
            else "transformers prints `Unknown quantization type` and loads the float weights, which are not quantized"
        )
    else:
        lines = f'import hf_daq\n\nmodel = hf_daq.from_pretrained("{where}", model=model)  # the float model'
        without = "there is nothing that reads the file"
    kind = (
        f"Weights are codes of a few bits, for inference; `hf_daq.unpack(model)` makes them trainable. {_running_packed(inspection)}"
        if inspection.packed
        else "The model can be evaluated, or trained on; its float weights are quantized in every forward."
    )
    install = "pip install -e .  # in a clone of the repository of hf_daq"
    return [f"```bash\n{install}\n```\n\n```python\n{lines}\n```", f"Without `import hf_daq` {without}.", kind]


def _running_packed(inspection: Inspection) -> str:
    with_inputs = {layer.activation_bits is not None for layer in inspection.layers}
    ways = {
        "layers with quantized inputs compute in integers": True in with_inputs,
        "linear layers with inputs in float compute from the codes": False in with_inputs,
    }
    ways_text = " and ".join(way for way, found in ways.items() if found)
    return (
        f"On a CPU, {ways_text} where processor, shape and granularity allow it; otherwise weights are unpacked in every "
        "forward. `print(hf_daq.summary(model, batch))` counts the layers that go each way, and tells their largest error."
    )


def _quantized_rows(inspection: Inspection) -> list[tuple[Any, ...]]:
    groups = grouped(inspection.layers, lambda layer: (layer.weight_bits, layer.activation_bits))
    return [
        (
            f"`{name.strip()}`",
            layers[0].weight_bits,
            "float" if layers[0].activation_bits is None else layers[0].activation_bits,
            len(layers),
            f"{sum(layer.parameters for layer in layers):,}",
        )
        for name, layers in groups.items()
    ]


def _smooth(inspection: Inspection) -> list[str]:
    names = grouped([layer for layer in inspection.layers if layer.smooth], lambda layer: ())
    layers = ", ".join(f"`{name.strip()}`" for name in names)
    return [f"Channels of the inputs are divided by powers of two before they are rounded in {layers}."] * bool(names)


def _kept(inspection: Inspection) -> list[str]:
    rows = [
        (f"`{name.strip()}`", tensors[0].dtype.lower(), len(tensors), f"{sum(math.prod(t.shape) for t in tensors):,}")
        for name, tensors in grouped(inspection.matrices, lambda tensor: (tensor.dtype,)).items()
    ]
    vectors = [tensor for tensor in inspection.kept if len(tensor.shape) < 2]
    count = sum(math.prod(tensor.shape) for tensor in vectors)
    rest = f"Biases, normalization and other vectors: {len(vectors)} tensors, {count:,} numbers."
    return [_table(("weights", "dtype", "number", "numbers"), rows), rest] if rows else [rest]


def _size_rows(inspection: Inspection) -> list[tuple[str, str]]:
    rows = [("float", inspection.float_bytes), ("this file", inspection.tensor_bytes)]
    if not inspection.packed:
        rows.append(("packed (`save_pretrained(..., packed=True)`)", inspection.packed_bytes))
    return [(name, f"{size / 1e6:.2f}") for name, size in rows]


def _results(inspection: Inspection) -> list[str]:
    facts = inspection.facts
    if not facts.results:
        return []
    rows = [
        (
            _text(result.metric),
            "" if result.float_value is None else f"{result.float_value:g}",
            f"{result.value:g}",
            _text(result.dataset or ""),
            _text(result.split or ""),
        )
        for result in facts.results
    ]
    parts = ["## Results", _table(("metric", "float", "quantized", "data", "split"), rows)]
    return [*parts, _code("bash", facts.command)] if facts.command else parts


def _training(inspection: Inspection) -> list[str]:
    facts = inspection.facts
    known = {
        "training data": ", ".join(map(_text, facts.datasets)),
        "calibration": _text(facts.calibration or ""),
        "seed": "" if facts.seed is None else str(facts.seed),
    }
    rows = [(key, value) for key, value in known.items() if value]
    parts = ["## Training"] if rows or facts.recipe else []
    if rows:
        parts.append(_table(("", ""), rows))
    if facts.recipe:
        parts += ["Settings of the run:", _code("json", json.dumps(facts.recipe, indent=2))]
    return parts


def _versions(inspection: Inspection) -> dict[str, str]:
    if inspection.facts.versions:
        return {_text(name): _text(text) for name, text in inspection.facts.versions.items()}
    return {"hf_daq": inspection.version}


def _table(header: Iterable[str], rows: Iterable[Iterable[Any]]) -> str:
    header = list(header)
    lines = [header, ["---"] * len(header), *([str(cell) for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _text(value: str) -> str:
    """Words of somebody else, on one line and without Markdown tables or HTML."""
    return " ".join(printable(value).split()).replace("|", "\\|").replace("<", "&lt;").replace("`", "'")


def _code(language: str, text: str) -> str:
    fence = "```"
    while fence in text:
        fence += "`"
    return f"{fence}{language}\n{text.strip()}\n{fence}"
