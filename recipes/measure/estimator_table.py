"""The table and the figure of estimators.py, from its rows: one run each, as read from its JSON lines."""

import math
import statistics
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt

from measure.plots import save

Rows = list[dict[str, Any]]
DRAWN = ("daq", "ste", "ewgs 0.001", "soft", "lsq", "paretoq", "brevitas")
"""Estimators in the figure, which has no place for more."""


def by(rows: Rows, *names: str) -> dict[Any, Rows]:
    """Rows with equal values of these keys, in the order of the file."""
    groups: dict[Any, Rows] = {}
    for row in rows:
        groups.setdefault(tuple(row[name] for name in names), []).append(row)
    return groups


def best(rows: Rows) -> tuple[float, Rows]:
    """The learning rate with the best mean on held-out images, of those with the most seeds, and its rows."""
    groups = by(rows, "lr")
    most = max(map(len, groups.values()))
    complete = {lr: group for (lr,), group in groups.items() if len(group) == most}
    return max(complete.items(), key=lambda item: statistics.mean(row["heldout"] for row in item[1]))


def mean_and_error(values: list[float]) -> tuple[float, float]:
    """Mean, and its standard error (NaN of one value)."""
    error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return statistics.mean(values), error


def table(rows: Rows) -> str:
    lines = [
        "| network | bits | dtype | optimizer | epochs | estimator | best rate (of) | held out | test | seeds | minus ste | gap |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for key, group in by(rows, "network", "bits", "dtype", "optimizer", "epochs").items():
        chosen = {name: (best(found), by(found, "lr")) for (name,), found in by(group, "estimator").items()}
        for name, ((lr, found), rates) in chosen.items():
            test = mean_and_error([row["test"] for row in found])
            held_out = mean_and_error([row["heldout"] for row in found])
            minus = "-"
            if name not in ("ste", "float") and "ste" in chosen:
                other = mean_and_error([row["test"] for row in chosen["ste"][0][1]])
                minus = in_words((test[0] - other[0], math.hypot(test[1], other[1])), "+")
            gap = f"{statistics.mean(row['gap'] for row in found):+.1f}" if "gap" in found[0] else "0"
            cells = f"{lr:.3g} ({len(rates)})", in_words(held_out), in_words(test), str(len(found)), minus, gap
            lines.append("| " + " | ".join([*map(str, key), name, *cells]) + " |")
    return "\n".join(lines)


def overall(rows: Rows) -> str:
    """DAQ minus the straight-through estimator, each at its best rate, where several seeds were trained with both."""
    pairs = []
    trained = [row for row in rows if row["epochs"]]
    for group in by(trained, "network", "bits", "dtype", "optimizer", "epochs").values():
        chosen = {name: best(found)[1] for (name,), found in by(group, "estimator").items() if name in ("daq", "ste")}
        found, other = ({row["seed"]: row for row in chosen.get(name, [])} for name in ("daq", "ste"))
        both = sorted(found.keys() & other.keys())
        pairs += [(found[seed], other[seed]) for seed in both if len(both) > 1]
    if not pairs:
        return ""
    heldout, test = (in_words(mean_and_error([a[key] - b[key] for a, b in pairs]), "+") for key in ("heldout", "test"))
    return (
        f"daq minus ste, seed by seed, {len(pairs)} pairs of all that was trained so: {heldout} held out, {test} test."
    )


def in_words(value: tuple[float, float], sign: str = "") -> str:
    mean, error = value
    return f"{mean:{sign}.2f}" + ("" if math.isnan(error) else f" ± {error:.2f}")


def report(rows: Rows, folder: Path) -> None:
    """Write estimators.md, and estimators.png once there is a run with quantizers."""
    folder.mkdir(parents=True, exist_ok=True)
    parts = ["# What is measured so far", "Written by `recipes/measure/estimators.py`.", table(rows), overall(rows)]
    quantized = [row for row in rows if row["optimizer"] == "sgd" and row["bits"] != "float" and row["epochs"]]
    # Estimators that were tried at several rates, of the network and dtype that most runs are of.
    most = max(by(quantized, "network", "dtype").values(), key=len, default=[])
    tried = by(most, "bits", "estimator")
    drawn = [row for found in tried.values() if len(by(found, "lr")) > 1 for row in found if row["estimator"] in DRAWN]
    if drawn:
        draw(drawn, folder / "estimators.png")
        parts.append("![accuracy against learning rate and epochs](estimators.png)")
    (folder / "estimators.md").write_text("\n\n".join(filter(None, parts)) + "\n")


def draw(rows: Rows, path: Path) -> None:
    """For the four pairs of bits with most runs: test accuracy against the learning rate (short runs), and below against epochs
    (the longest). The axes end 12 points below the best; what lies deeper is in the legend."""
    groups = by(rows, "bits")
    most = sorted(groups, key=lambda bits: -len(groups[bits]))[:4]
    groups = {bits: groups[bits] for bits in groups if bits in most}
    figure, axes = plt.subplots(2, len(groups), figsize=(4.6 * len(groups), 7), squeeze=False, layout="constrained")
    for ((bits,), group), (top, bottom) in zip(groups.items(), axes.T, strict=True):
        shortest, longest = (choose(row["epochs"] for row in group) for choose in (min, max))
        for (name,), found in by([row for row in group if row["epochs"] == shortest], "estimator").items():
            rates = sorted(by(found, "lr").items())
            points = [mean_and_error([row["test"] for row in same]) for _, same in rates]
            means = [mean for mean, _ in points]
            errors = [0 if math.isnan(error) else error for _, error in points]
            label = f"{name}, best {max(means):.1f}"
            top.errorbar([lr for (lr,), _ in rates], means, errors, marker="o", capsize=3, label=label)
        for (name,), found in by([row for row in group if row["epochs"] == longest], "estimator").items():
            curves = [[entry["heldout"] for entry in row["history"]] for row in best(found)[1]]
            means = [statistics.mean(values) for values in zip(*curves, strict=True)]
            bottom.plot(range(1, len(means) + 1), means, label=f"{name}, last {means[-1]:.1f}")
        ticks = sorted({row["lr"] for row in group if row["epochs"] == shortest})
        top.set_xscale("log")
        top.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        top.minorticks_off()
        top.set(title=f"W{bits.replace('/', 'A')}, epochs: {shortest}", xlabel="learning rate", ylabel="test, %")
        bottom.set(title=f"epochs: {longest}, each at its best rate", xlabel="epoch", ylabel="held out, %")
        for axis, values in ((top, [row["test"] for row in group]), (bottom, [row["heldout"] for row in group])):
            axis.set_ylim(max(values) - 12, max(values) + 1)
            axis.legend(fontsize=8, loc="lower right")
    save(figure, path)
    plt.close(figure)
