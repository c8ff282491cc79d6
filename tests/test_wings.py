"""Each wing imports only from the wings named here, so that it can be read without the others."""

import ast
import re
from pathlib import Path

import hf_daq

GROUND, FRONT = ("errors", "version", "config", "text"), ("apply", "calibration", "checkpoint", "plots")
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
