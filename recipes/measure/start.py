"""What it takes to open, quantize, calibrate, save, pack and train a language model: CPU seconds and memory, beside the float model.

    python recipes/measure/start.py FOLDER --bits 4 --group_size 128 --batches 256 --batch_size 4 --length 512
    python recipes/measure/start.py  # a model of the sizes of Qwen2-0.5B with random weights, in bfloat16
    python recipes/measure/start.py --layers 4 --batches 2 8 32 --steps float calibrate  # does memory grow with them?

FOLDER: a causal language model of transformers. Each step runs in a process of its own; the table has

    s         CPU time of the step alone, in all threads
    MiB       the most that was resident during the step, over what the process took before it opened the model; pages of
              files count while they are mapped
    of float  that, by the same for opening the float model and reading all its weights once

"quantize, no compiler" opens the model with `HF_DAQ_COMPILE=0`. A training step is a forward, a backward and an update of AdamW
on one batch; adapters of LoRA have rank 16 in all linear layers, and those of the quantized and the packed model are inside
the quantizer. Before anything is measured, the kernel is compiled once.
"""

import argparse
import json
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import psutil
import torch
import transformers
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

import hf_daq
from hf_daq.nn.native import library

sys.path.insert(0, str(Path(__file__).parents[1]))
from measure.decoding import row_of, write_random

TRAINING = ("float training step", "training step", "float LoRA step", "LoRA step", "packed LoRA step")
STEPS = (
    *("float", "quantize", "quantize, no compiler", "calibrate", "save", "pack and save", "open packed"),
    *TRAINING,
)
IN_FLOAT, OF_PACKED = ("float", "float training step", "float LoRA step"), ("open packed", "packed LoRA step")


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("folder", nargs="?", type=Path)
    add("--bits", type=int, default=4)
    add("--activation_bits", type=int)
    add("--group_size", type=int, default=128)
    add("--batches", type=int, nargs="+", default=[256], help="of calibration; a row for each")
    add("--batch_size", type=int, default=4)
    add("--length", type=int, default=512)
    add("--layers", type=int, default=24, help="of the model with random weights")
    add("--threads", type=int, default=1)
    add("--steps", nargs="+", choices=STEPS, default=STEPS)
    add("--one", choices=STEPS, help=argparse.SUPPRESS)  # in the process that measures it
    add("--place", type=Path, help=argparse.SUPPRESS)  # of what the steps write
    add("--output", type=Path, help="JSON file for the table")
    args = parser.parse_args(argv)
    if not args.one and not set(OF_PACKED).isdisjoint(args.steps) and "pack and save" not in args.steps:
        parser.error(f'--steps: "pack and save" writes what {OF_PACKED} open; put it before them')
    return args


class Peak:
    """The most resident memory inside, in MiB over what was there at first, and the CPU seconds."""

    def __enter__(self) -> "Peak":
        self.seconds, self.mib, self._done = 0.0, 0.0, threading.Event()
        self._memory, self._before = psutil.Process().memory_info, psutil.Process().memory_info().rss
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        self._start = time.process_time()
        return self

    def _watch(self) -> None:
        while not self._done.wait(0.002):
            self.mib = max(self.mib, (self._memory().rss - self._before) / 2**20)

    def __exit__(self, *_: Any) -> None:
        self.seconds = time.process_time() - self._start
        self._done.set()
        self._thread.join()
        self.mib = max(self.mib, (self._memory().rss - self._before) / 2**20)


def measure(args: argparse.Namespace) -> dict[str, float]:
    """One step, in this process."""
    bits = {"weight_bits": args.bits, "activation_bits": args.activation_bits}
    config = hf_daq.DaqConfig(**bits, group_size=args.group_size)
    folder = args.place / "packed" if args.one in OF_PACKED else args.folder
    options = {} if args.one in (*IN_FLOAT, *OF_PACKED) else {"quantization_config": config}
    with Peak() as opening:
        model = AutoModelForCausalLM.from_pretrained(folder, **options)
        if args.one == "float":
            for parameter in model.parameters():
                parameter.sum()  # until then they are in the file alone
    if args.one not in ("calibrate", "save", "pack and save", *TRAINING):
        return {"s": opening.seconds, "MiB": opening.mib}
    with Peak() as step:
        if args.one == "calibrate":
            calibrate(model, args)
        elif args.one in TRAINING:
            train(model, args)
        else:
            packed = args.one == "pack and save"
            hf_daq.save_pretrained(model, args.place / ("packed" if packed else "saved"), packed=packed)
    return {"s": step.seconds, "MiB": step.mib + (step._before - opening._before) / 2**20}


def batch_of(model: Any, args: argparse.Namespace, generator: torch.Generator) -> torch.Tensor:
    vocabulary = model.config.get_text_config().vocab_size
    return torch.randint(vocabulary, (args.batch_size, args.length), generator=generator)


def calibrate(model: Any, args: argparse.Namespace) -> None:
    generator = torch.Generator().manual_seed(1)
    with hf_daq.calibrate(model, check=False):
        for _ in range(args.batches[0]):
            model.base_model(batch_of(model, args, generator), use_cache=False)


def train(model: Any, args: argparse.Namespace) -> None:
    tokens = batch_of(model, args, torch.Generator().manual_seed(1))
    if "LoRA" in args.one:
        inside = True if args.one in IN_FLOAT else "daq"
        options = {"target_modules": "all-linear", "init_lora_weights": inside, "task_type": "CAUSAL_LM"}
        model = get_peft_model(model, LoraConfig(r=16, **options))
    model.train()
    optimizer = torch.optim.AdamW([one for one in model.parameters() if one.requires_grad], lr=1e-5)
    model(input_ids=tokens, labels=tokens).loss.backward()
    optimizer.step()


def measured(step: str, batches: int, source: Path, place: Path, args: argparse.Namespace) -> dict[str, float]:
    """The same, in a process of its own."""
    names = ("bits", "group_size", "batch_size", "length", "threads")
    settings = [f"--{name}={getattr(args, name)}" for name in names] + [f"--batches={batches}"]
    settings += [] if args.activation_bits is None else [f"--activation_bits={args.activation_bits}"]
    environment = {"HF_DAQ_COMPILE": "0"} if step == "quantize, no compiler" else {}
    argv = str(source), "--one", step, "--place", str(place), *settings
    return row_of(__file__, *argv, OMP_NUM_THREADS=str(args.threads), **environment)


def every_row(args: argparse.Namespace) -> list[tuple[str, int]]:
    """Each step; calibration once for each number of batches."""
    counts = {step: args.batches if step == "calibrate" else args.batches[:1] for step in args.steps}
    return [(step, batches) for step in args.steps for batches in counts[step]]


def main(argv: list[str] | None = None) -> list[dict[str, Any]]:
    args = parse(argv)
    torch.set_num_threads(args.threads)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    if args.one:
        row = measure(args)
        print(json.dumps(row))
        return [row]
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as temporary:
        source, place = args.folder or Path(temporary, "source"), Path(temporary)
        if args.folder is None:
            write_random(source, 32000, args.layers)
        library()  # compiled once, and kept
        for step, batches in every_row(args):
            row = measured(step, batches, source, place, args)
            first = rows[0] if rows else row
            name = f"{step}, {batches} batches" if step == "calibrate" else step
            ratios = {"s of float": row["s"] / first["s"], "MiB of float": row["MiB"] / first["MiB"]}
            rows.append({"step": name, **row, **ratios})
            cells = (v if isinstance(v, str) else f"{v:.3g}" for v in rows[-1].values())
            print("| " + " | ".join(cells) + " |", flush=True)
    if args.output:
        args.output.write_text(json.dumps({"rows": rows, "settings": vars(args)}, indent=2, default=str) + "\n")
    return rows


if __name__ == "__main__":
    main()
