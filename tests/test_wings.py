"""Each wing imports only from the wings named here, so that it can be read without the others; every public name is where
one looks for it; no test needs another."""

import ast
import re
from pathlib import Path

import hf_daq

GROUND, FRONT = (
    ("errors", "version", "config", "text"),
    (
        "allocation",
        "apply",
        "batch_norm",
        "calibration",
        "checkpoint",
        "plots",
        "quantization",
        "reconstruction",
        "transitions",
    ),
)
MAY_IMPORT = {
    "ground": "",
    "nn": "ground",
    "model": "ground nn",
    "files": "ground nn",
    "report": "ground nn model",
    "integrations": "ground nn model files report",
    "front": "ground nn model files report integrations",
    "export": "ground nn model files integrations",
    "cli": "ground nn model files report integrations front export package",
    "package": "ground nn model files report integrations front export",
}
FOLDER = Path(hf_daq.__file__).parent


def wing(path):
    first = path.relative_to(FOLDER).parts[0].removesuffix(".py")
    return {"__init__": "package", **dict.fromkeys(GROUND, "ground"), **dict.fromkeys(FRONT, "front")}.get(first, first)


def imported(path):
    """The files and folders that relative imports of a file name."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = path.parents[node.level - 1].joinpath(*(node.module or "").split("."))
            yield from (
                [base.with_suffix(".py")] if node.module else [base / f"{alias.name}.py" for alias in node.names]
            )


def test_every_wing_imports_only_what_it_may():
    for path in FOLDER.rglob("*.py"):
        for target in imported(path):
            own, other = wing(path), wing(target)
            assert own == other or other in MAY_IMPORT[own].split(), (
                f"{path.relative_to(FOLDER)} imports {target.relative_to(FOLDER)}"
            )


def test_the_page_of_the_house_has_the_same_table():
    text = (FOLDER / "README.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `?(\w+)`? \| (.*) \| (.*)\|$", text, re.MULTILINE)[1:]
    assert {name: wings.strip() for name, _, wings in rows} == MAY_IMPORT
    what = {name: cell for name, cell, _ in rows}
    for name, files in (("ground", GROUND), ("front", FRONT)):
        assert re.findall(r"`(\w+)\.py`", what[name]) == list(files)


HOMES = {
    "errors": "DaqError",
    "version": "__version__",
    "config": "DaqConfig",
    "allocation": "allocate",
    "apply": "apply_daq remove_daq pack unpack restart",
    "calibration": "calibrate",
    "quantization": "quantize",
    "reconstruction": "reconstruct",
    "batch_norm": "reestimate_batch_norm",
    "transitions": "TransitionScheduler dampening",
    "checkpoint": "save_pretrained from_pretrained push_to_hub",
    "nn.integers": "integer_arithmetic",
    "model.param_groups": "param_groups",
    "model.plan": "plan",
    "files.card": "update_card",
    "files.facts": "CardFacts Result",
    "files.inspect": "inspect",
    "report.compare": "compare",
    "report.health": "health",
    "report.monitor": "Monitor",
    "report.page": "report",
    "report.summary": "summary",
    "integrations.trainer": "MonitorCallback trainer_optimizer",
    "export.compressed_tensors": "export_compressed_tensors",
    "export.gguf": "export_gguf",
    "export.onnx": "export_onnx",
}


def test_every_public_name_is_written_in_the_file_that_is_named_for_it():
    assert sorted(name for names in HOMES.values() for name in names.split()) == sorted(hf_daq.__all__)
    for home, names in HOMES.items():
        tree = ast.parse((FOLDER / home.replace(".", "/")).with_suffix(".py").read_text())
        written = {node.name for node in tree.body if isinstance(node, ast.FunctionDef | ast.ClassDef)}
        assigned = [target for node in tree.body if isinstance(node, ast.Assign) for target in node.targets]
        written |= {target.id for target in assigned if isinstance(target, ast.Name)}
        assert written >= set(names.split()), home


def test_no_test_file_imports_another():
    for path in Path(__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not [name for name in names if name.startswith("test_") or ".test_" in name], path.name
