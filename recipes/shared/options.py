"""Options of the training recipes: a dataclass whose fields are keys of a YAML file and of the command line.

jsonargparse reads both; what stands here is its set-up, and the closest name for a key that does not exist.
"""

import dataclasses
import difflib
import re
import warnings
from argparse import RawDescriptionHelpFormatter
from dataclasses import dataclass
from typing import Any, Literal, NoReturn

import torch
import yaml
from jsonargparse import ArgumentParser, DefaultHelpFormatter, set_loader, set_parsing_settings

import hf_daq


class _Yaml(yaml.SafeLoader):
    """YAML 1.2 in two points: `no` is a word, and `1e-4` is a number."""


_OLD = ("tag:yaml.org,2002:bool", "tag:yaml.org,2002:float")
_Yaml.yaml_implicit_resolvers = {
    first: [rule for rule in rules if rule[0] not in _OLD] for first, rules in _Yaml.yaml_implicit_resolvers.items()
}
_Yaml.add_implicit_resolver(_OLD[0], re.compile("^(true|True|false|False)$"), list("tTfF"))
_Yaml.add_implicit_resolver(
    _OLD[1], re.compile(r"^[-+]?([0-9]+\.[0-9]*|\.[0-9]+|[0-9]+(?=[eE]))([eE][-+]?[0-9]+)?$"), list("-+.0123456789")
)
set_loader("yaml", lambda text: yaml.load(text, _Yaml), (yaml.YAMLError,))
set_parsing_settings(docstring_parse_attribute_docstrings=True)


@dataclass
class RunOptions:
    """What every training recipe has."""

    seed: int = 0
    """Random seed."""
    output_dir: str = "output"
    """Folder for networks, checkpoints and results.json."""
    export: str | None = None
    """Files to write after the last epoch: packed, onnx, compressed-tensors, gguf, separated by commas."""
    reconstruct: bool = False
    """Whether the calibration batches also fit the weights to the float network (hf_daq.reconstruct) before the DAQ phase trains."""
    resume: bool = False
    """Continue the stopped run in output_dir from its last checkpoint."""
    monitor_every: int = 0
    """Updates of the DAQ phase from one look of hf_daq.Monitor to the next; 0 for none."""


@dataclass
class LoopOptions(RunOptions):
    """What the recipes on Accelerate have as well."""

    warmup_epochs: float = 1.0
    """Epochs in which learning rates rise from 0; then they fall to 0 by a cosine."""
    batch_size: int = 64
    """Examples of a batch, in each process."""
    accumulation: int = 1
    """Batches per update."""
    clip_grad: float | None = None
    """Largest norm of the gradient; null for no limit."""
    mixed_precision: Literal["no", "bf16", "fp16"] = "no"
    """Type of matrix products; bounds and scales stay in float32."""
    transition_target: float = 0.0
    """Share of the weights that are to change their code in an update, at the start of the DAQ phase; then the learning rate of
    quantized weights follows it (hf_daq.TransitionScheduler). 0 for the cosine."""
    dampening: float = 0.0
    """Factor of hf_daq.dampening in the loss at the end of the DAQ phase, to which it grows by a cosine; 0 for none."""
    compile: bool = False
    """Whether torch.compile compiles the whole network."""
    max_steps: int | None = None
    """Largest number of updates of a phase, for a quick look."""
    checkpoint_every: int = 0
    """Updates from one checkpoint to the next; 0 for none."""
    tracker: Literal["none", "tensorboard", "trackio"] = "none"
    """Where losses and accuracies are sent."""
    log_every: int = 50
    """Updates from one logged loss to the next."""


class _Help(DefaultHelpFormatter, RawDescriptionHelpFormatter):
    """The first lines of a recipe as they are."""


class _Parser(ArgumentParser):
    keys: list[str]

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """One line, with the closest name where a key does not exist."""
        for pattern in (r"unrecognized arguments: --([\w.]+)", r"Group '(.+)' does not accept option '(.+)'"):
            if found := re.search(pattern, message):
                refuse_unknown(".".join(found.groups()), self.keys)
        if found := re.search(r"Option '(.+)' is not accepted", message):
            refuse_unknown(found[1], self.keys)
        if found := re.search("unrecognized arguments: (.+)", message):
            raise SystemExit(f"unexpected argument {found[1]!r}; options are written --key value")
        raise SystemExit(f"{' '.join(message.split())} (--help explains all keys)")


def parse(config_class: type, argv: list[str], doc: str) -> Any:
    """YAML file (`--config`) and options (`--key value`, `--key.sub value`, `--flag`), which win -> config."""
    parser = _Parser(
        description=doc, usage="%(prog)s [--config FILE] [--key value ...]", formatter_class=_Help, allow_abbrev=False
    )
    parser.add_argument("--config", action="config", help="YAML file of keys; options of the command line win")
    parser.add_class_arguments(config_class)
    parser.keys = key_names(config_class)
    found = parser.parse_args(arranged(config_class, argv))
    del found["config"]
    values = parser.instantiate(found)
    cfg = config_class(**{field.name: values[field.name] for field in dataclasses.fields(config_class)})
    if "bits" in cfg.daq:  # replaces both numbers of the file
        cfg.daq["weight_bits"] = cfg.daq["activation_bits"] = cfg.daq.pop("bits")
    if cfg.monitor_every != 0 and cfg.monitor_every < 3:
        raise SystemExit(f"monitor_every is {cfg.monitor_every}; allowed are 0 (never) and 3 or more")
    return cfg


def arranged(config_class: type, argv: list[str]) -> list[str]:
    """The file first, so that options win wherever they stand, and `true` after a switch without a value."""
    switches = {f"--{field.name}" for field in dataclasses.fields(config_class) if field.type is bool}
    files: list[str] = []
    others: list[str] = []
    for index, token in enumerate(argv):
        after = argv[index + 1] if index + 1 < len(argv) else "--"
        to_file = token == "--config" or token.startswith("--config=") or (index and argv[index - 1] == "--config")
        (files if to_file else others).append(f"{token}=true" if token in switches and after[:2] == "--" else token)
    return files + others


def key_names(config_class: type) -> list[str]:
    names = []
    for field in dataclasses.fields(config_class):
        names.append(field.name)
        if dataclasses.is_dataclass(field.type):
            names += [f"{field.name}.{inner.name}" for inner in dataclasses.fields(field.type)]
    return [*names, "daq.bits", "daq.preset", *(f"daq.{field.name}" for field in dataclasses.fields(hf_daq.DaqConfig))]


def refuse_unknown(key: str, known: Any, prefix: str = "") -> None:
    """End the run with the closest of the known names, unless the key is one of them."""
    if key not in known:
        in_section = f"daq.{key}"
        closest = in_section if in_section in known else difflib.get_close_matches(key, known, n=1, cutoff=0.0)[0]
        raise SystemExit(
            f"unknown key {prefix + key!r}; the closest is {prefix + closest!r} (--help explains all keys)"
        )


def daq_config(values: dict[str, Any]) -> hf_daq.DaqConfig:
    try:
        return hf_daq.DaqConfig.from_dict(values)
    except hf_daq.DaqError as error:
        raise SystemExit(f"daq: {error}") from None


def warn_of_slow_bf16(bf16: bool, device: torch.device, option: str) -> None:
    """Say so where bfloat16 takes longer than float32: on processors that have no instructions for it."""
    if bf16 and device.type == "cpu" and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        warnings.warn(
            f"this processor computes in bfloat16 some ten times as slowly as in float32: {option} is faster here",
            stacklevel=2,
        )
