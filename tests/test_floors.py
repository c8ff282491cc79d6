"""Imports inside the library go down only, so that each file can be read without those above it."""

import ast
from pathlib import Path

import hf_daq

FLOORS = [
    {"errors", "version", "compiling", "bitpack", "console"},
    {"config", "facts", "options"},
    {"functional", "header", "planning"},
    {"quantizers", "hub"},
    {"layers", "initial", "inspection"},
    {"special", "order", "packed", "card"},
    {"matching", "integers", "onnx_graph", "onnx_runs", "monitor", "sharing"},
    {"patch", "measuring", "training", "monitor_callback"},
    {"onnx_emission", "onnx_passes", "onnx_products", "onnx_verify", "histograms"},
    {"fileformat", "report", "plots"},
    {"hub_timm", "hub_transformers", "checkup"},
    {"apply", "calibration", "packing", "registration"},
    {"checkpoint", "export_compressed", "onnx_export", "skeleton", "opening"},
    {"cli"},
    {"__init__"},
]
FOLDER = Path(hf_daq.__file__).parent


def test_every_file_has_a_floor_and_imports_only_from_below():
    level = {name: number for number, names in enumerate(FLOORS) for name in names}
    assert set(level) == {path.stem for path in FOLDER.glob("*.py")}
    for name in level:
        for node in ast.walk(ast.parse((FOLDER / f"{name}.py").read_text())):
            if isinstance(node, ast.ImportFrom) and node.level == 1:
                for target in [node.module] if node.module else [alias.name for alias in node.names]:
                    assert level[target] < level[name], f"{name} imports {target}"
