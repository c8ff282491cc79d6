"""Data sets by name, and the split for evaluation."""

import difflib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
from sklearn.model_selection import train_test_split


def load_splits(cfg: Any, built_in: dict[str, Callable[[], datasets.DatasetDict]], **options: Any) -> dict[str, Any]:
    """The data set that `cfg.dataset` names: one of the recipe's own, else what datasets.load_dataset opens."""
    if cfg.dataset in built_in:
        return built_in[cfg.dataset]()
    try:
        return datasets.load_dataset(cfg.dataset, cfg.dataset_config, **options)
    except (FileNotFoundError, ConnectionError, datasets.exceptions.DatasetsError, ValueError) as error:
        why = str(error).partition("\n")[0]
        closest = closest_name(cfg.dataset, built_in)
        own = "".join(f"{name}, " for name in built_in)
        raise SystemExit(
            f"data set {cfg.dataset!r} cannot be opened{closest}. It is {own}a Hub id or a folder: {why}"
        ) from None


def closest_name(name: str, known: Any) -> str:
    """ "; the closest name is ..." of the known ones and of what lies beside a path, or nothing."""
    path = Path(name)
    beside = [str(path.parent / other.name) for other in path.parent.iterdir()] if path.parent.is_dir() else []
    found = difflib.get_close_matches(name, [*known, *(other for other in beside if other != name)], n=1)
    return f"; the closest name is {found[0]!r}" if found else ""


def split_pair(splits: dict[str, Any], cfg: Any, label: str | None = None) -> tuple[datasets.Dataset, datasets.Dataset]:
    """Training and evaluation split; with `cfg.eval_fraction` a share of the training split, of every class alike."""
    if cfg.train_split not in splits:
        raise SystemExit(f"{cfg.dataset} has no split {cfg.train_split!r}; it has {', '.join(splits)}")
    train = splits[cfg.train_split]
    if cfg.eval_fraction is None:
        if cfg.eval_split not in splits:
            raise SystemExit(
                f"{cfg.dataset} has no split {cfg.eval_split!r}; it has {', '.join(splits)}. Name another with "
                "--eval_split, take a share of the training split with --eval_fraction 0.2, or give a folder with "
                "train/ and test/"
            )
        return train, splits[cfg.eval_split]
    if cfg.eval_split in splits:
        raise SystemExit(f"{cfg.dataset} has the split {cfg.eval_split!r}; leave eval_fraction out")
    if not 0 < cfg.eval_fraction < 1:
        raise SystemExit(f"eval_fraction is {cfg.eval_fraction}; a number between 0 and 1 is wanted, such as 0.2")
    try:
        rows = train_test_split(
            range(len(train)), test_size=cfg.eval_fraction, random_state=cfg.seed, stratify=train[label][:]
        )
    except ValueError as error:
        raise SystemExit(f"eval_fraction {cfg.eval_fraction} does not split {len(train)} examples: {error}") from None
    return train.select(sorted(rows[0])), train.select(sorted(rows[1]))


def eval_name(cfg: Any) -> str:
    """The evaluation split, in words."""
    return cfg.eval_split if cfg.eval_fraction is None else f"{cfg.eval_fraction:.0%} of {cfg.train_split}"
