"""Mutated checkpoints: each must end in a `DaqError`, or load. No other exception, no hang, no memory taken.

    python tests/programs/fuzz_loader.py --files 10000

Three checkpoints (a timm network, a module of no library, a transformers network), packed and trainable, are changed
one to three times each: bytes, lengths, the JSON of the safetensors header, its metadata, config.json. Prints a table, and every
case that ended badly with the seed that gives it again.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import io
import json
import logging
import os
import random
import resource
import shutil
import signal
import struct
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "support"))
import torch
from models import images, small_net, small_timm
from text_models import tiny_bert, tokens

import hf_daq
from hf_daq.errors import DaqError
from hf_daq.files.card import render
from hf_daq.files.inspect import inspect

SECONDS = 20
MEMORY = 2**30
ODD_VALUES: list[Any] = [
    None, True, -1, 0, 1, 2, 3, 7, 9, 2**20, 2**31, 2**63, 10**30, -(2**40), 0.5, 1e308, float("nan"), float("inf"), "",
    "daq", "hf_daq", "resnet18", "F32", "U8", "BF16", "F8_E4M3", "../../x", "a" * 5000, [], {}, [0], [[1]], {"a": 1},
    [2**40, 2**40], [1] * 200,
]  # fmt: skip


def checkpoints(folder: Path) -> dict[str, Path]:
    """Small checkpoints of every kind."""
    paths = {}
    for packed in (False, True):
        model = hf_daq.apply_daq(small_timm("test_resnet"), weight_bits=3, activation_bits=4)
        with hf_daq.calibrate(model):
            model(images(2, 64))
        bert = hf_daq.apply_daq(tiny_bert(), weight_bits=2, activation_bits=8)
        with hf_daq.calibrate(bert):
            bert(tokens())
        module = hf_daq.apply_daq(small_net(), weight_bits=5, group_size=4)
        for name, one in {"timm": model, "transformers": bert, "module": module}.items():
            path = paths[f"{name}{', packed' if packed else ''}"] = folder / f"{name}-{packed}"
            hf_daq.save_pretrained(one, path, packed=packed)
    return paths


def open_checkpoint(kind: str, folder: Path) -> None:
    with contextlib.suppress(DaqError):
        inspection = inspect(folder)
        print(inspection, json.dumps(inspection.to_dict()), render(inspection), file=io.StringIO())
    if kind.startswith("module"):
        hf_daq.from_pretrained(folder, model=small_net())
    else:
        hf_daq.from_pretrained(folder)


def mutate(folder: Path, rng: random.Random) -> str:
    """Change a checkpoint in place; says how."""
    weights, config = folder / "model.safetensors", folder / "config.json"
    kinds = {"bytes": 1, "header bytes": 1, "length": 1, "header": 2, "metadata": 2, "config": 3, "both configs": 3}
    (kind,) = rng.choices(list(kinds), list(kinds.values()))
    data = bytearray(weights.read_bytes())
    if len(data) < 16:
        return "nothing"
    (size,) = struct.unpack("<Q", data[:8])
    if kind == "bytes":
        for _ in range(rng.randint(1, 20)):
            data[rng.randrange(len(data))] = rng.randrange(256)
    elif kind == "header bytes":
        for _ in range(rng.randint(1, 4)):
            data[rng.randrange(8 + min(size, len(data) - 8))] = rng.randrange(256)
    elif kind == "length":
        data = data[: rng.randrange(len(data))] if rng.random() < 0.7 else data + bytes(rng.randrange(1, 5000))
    else:
        try:
            header = json.loads(data[8 : 8 + size])
            content = json.loads(header["__metadata__"]["hf_daq"])
            description = json.loads(config.read_text())
        except (ValueError, KeyError, TypeError):
            return "nothing"
        if kind == "header":
            change(header, rng)
        elif kind == "metadata":
            change(content, rng)
        elif kind == "config":
            change(description, rng)
        else:  # the same change of the quantization config in both places, which must agree
            holder = description.get("model_args", description)
            state = rng.getstate()
            for place in (content, holder):
                rng.setstate(state)
                change(place.get("quantization_config") if isinstance(place, dict) else None, rng)
        with contextlib.suppress(TypeError, KeyError):
            header["__metadata__"]["hf_daq"] = json.dumps(content)
        text = json.dumps(header).encode()
        data = bytearray(struct.pack("<Q", len(text)) + text + data[8 + size :])
        config.write_text(json.dumps(description))
    weights.write_bytes(data)
    return kind


def change(value: Any, rng: random.Random) -> None:
    """Replace, remove, add or copy one entry somewhere in a JSON value."""
    places = list(walk(value))
    if not places:
        return
    holder, key = rng.choice(places)
    action = rng.choice(["replace", "replace", "number", "remove", "copy", "rename"])
    if action == "replace":
        holder[key] = rng.choice(ODD_VALUES)
    elif action == "number" and isinstance(holder[key], int):
        holder[key] += rng.choice([-1, 1, 8, 2**33])
    elif action == "remove":
        del holder[key]
    elif action == "copy":
        other, name = rng.choice(places)
        holder[key] = json.loads(json.dumps(other.get(name) if isinstance(other, dict) else None))
    elif isinstance(holder, dict):
        holder[rng.choice([*holder, "unknown", ""])] = holder.pop(key)


def walk(value: Any) -> Any:
    """Every (container, key) in it."""
    pairs = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in list(pairs):
        yield value, key
        yield from walk(item)


class Hang(BaseException):
    """Nobody else catches it."""


def _stop(*_: Any) -> None:
    raise Hang


def run(files: int, seed: int = 0) -> tuple[collections.Counter[tuple[str, str]], list[str]]:
    """Outcomes by kind of checkpoint, and what ended badly."""
    outcomes: collections.Counter[tuple[str, str]] = collections.Counter()
    bad = []
    signal.signal(signal.SIGALRM, _stop)
    with tempfile.TemporaryDirectory() as name:
        paths = checkpoints(Path(name))
        for kind, path in paths.items():
            open_checkpoint(kind, path)
        for case in range(seed, seed + files):
            rng = random.Random(case)
            kind = rng.choice(list(paths))
            folder = Path(name) / "case"
            shutil.copytree(paths[kind], folder)
            how = [mutate(folder, rng) for _ in range(rng.randint(1, 3))]
            before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.perf_counter()
            signal.alarm(SECONDS)
            try:
                open_checkpoint(kind, folder)
                outcome = "loaded"
            except DaqError:
                outcome = "DaqError"
            except (Exception, Hang) as error:
                outcome = f"{type(error).__name__}: {error}"[:200]
            finally:
                signal.alarm(0)
            grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
            if grown > MEMORY:
                outcome = f"took {grown / 2**30:.1f} GiB ({outcome})"
            if outcome not in ("loaded", "DaqError"):
                bad.append(f"seed {case}, {kind}, {how}, {time.perf_counter() - start:.1f} s: {outcome}")
            outcomes[kind, outcome if outcome in ("loaded", "DaqError") else "bad"] += 1
            shutil.rmtree(folder)
    return outcomes, bad


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--files", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0, help="of the first file; the others follow")
    args = parser.parse_args()
    quiet()
    resource.setrlimit(resource.RLIMIT_AS, (2**36, 2**36))
    start = time.perf_counter()
    outcomes, bad = run(args.files, args.seed)
    print(*bad, sep="\n")
    for kind in sorted({kind for kind, _ in outcomes}):
        counts = {outcome: outcomes[kind, outcome] for outcome in ("loaded", "DaqError", "bad")}
        print(f"{kind:24}", *(f"{outcome} {count:6}" for outcome, count in counts.items()))
    print(f"{args.files} files in {time.perf_counter() - start:.0f} s, {len(bad)} ended badly")
    sys.exit(bool(bad))


def quiet() -> None:
    os.environ["HF_HUB_OFFLINE"] = "1"
    warnings.simplefilter("ignore")
    logging.disable()
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
