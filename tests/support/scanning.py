"""What the scans share: the outcome of an architecture, and the report of all."""

import argparse
import dataclasses
import json
import time
import warnings
from collections.abc import Callable, Iterable
from typing import Any

GRIDS, SCALES, EMBEDDING_BITS = ("odd", "integer", "ternary"), ("static", "token"), (4, 8, 2, 1)


@dataclasses.dataclass
class Result:
    """What happened to one architecture. `kept` counts reasons; `problems` is empty on success."""

    name: str
    quantized: int = 0
    kept: dict[str, int] = dataclasses.field(default_factory=dict)
    unsupported: int = 0
    problems: list[str] = dataclasses.field(default_factory=list)
    seconds: float = 0.0


def checked(name: str, problems: Callable[[Result], Iterable[str]]) -> Result:
    """Take one model through everything; nothing raises, all that is wrong goes to `problems`."""
    started = time.process_time()
    result = Result(name)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            result.problems.extend(problems(result))
        except Exception as error:
            result.problems.append(f"{type(error).__name__}: {str(error)[:300]}")
    result.problems.extend(f"{w.category.__name__}: {str(w.message)[:200]}" for w in caught)
    result.seconds = round(time.process_time() - started, 1)
    return result


def parser(description: str, names: Iterable[str]) -> argparse.ArgumentParser:
    found = argparse.ArgumentParser(description=description)
    found.add_argument("--names", nargs="+", default=list(names), choices=list(names), metavar="NAME")
    found.add_argument("--weight-grid", choices=GRIDS, help="for all; otherwise they take turns")
    found.add_argument("--activation-scale", choices=SCALES, help="for all; otherwise they take turns")
    found.add_argument("--embedding-bits", type=int, help="for all; otherwise they take turns")
    found.add_argument("--output", help="write the results to this JSON file")
    return found


def options(arguments: argparse.Namespace, place: int) -> dict[str, Any]:
    """What the architecture at this place in the list is quantized with."""
    grid = arguments.weight_grid or GRIDS[place % len(GRIDS)]
    return {
        **({"weight_bits": 2} if grid == "ternary" else {}),
        "weight_grid": grid,
        "activation_scale": arguments.activation_scale or SCALES[place % len(SCALES)],
        "embedding_bits": arguments.embedding_bits or EMBEDDING_BITS[place % len(EMBEDDING_BITS)],
    }


def report(arguments: argparse.Namespace, check: Callable[[str], Result]) -> int:
    """Check and print one architecture after the other. Returns the exit code: 1 if one failed."""
    results = []
    for name in arguments.names:
        result = check(name)
        results.append(result)
        kept = ", ".join(f"{count} {reason}" for reason, count in result.kept.items())
        outcome = "FAILED" if result.problems else "ok"
        print(
            f"{name:40} {result.quantized:4d} quantized  {outcome:6} {result.seconds:6.1f} s  kept: {kept}", flush=True
        )
        for problem in result.problems:
            print(f"    {problem}", flush=True)
    if arguments.output:
        with open(arguments.output, "w") as file:
            json.dump([dataclasses.asdict(result) for result in results], file, indent=1)
    failed = [result.name for result in results if result.problems]
    print(
        f"{len(results)} architectures, {sum(result.quantized for result in results)} quantized layers, "
        f"{sum(result.seconds for result in results):.0f} s, {len(failed)} failed: {' '.join(failed) or '-'}"
    )
    return 1 if failed else 0
