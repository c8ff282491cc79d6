"""A few mutated checkpoints of each kind; `fuzz_loader.py` makes as many as one likes."""

import warnings

from fuzz_loader import run


def test_mutated_checkpoints_load_or_end_in_a_daq_error():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        outcomes, bad = run(120, seed=10**6)
    assert bad == []
    assert sum(count for (_, outcome), count in outcomes.items() if outcome == "DaqError") > 80
    assert {"timm", "transformers"} <= {kind.split(",")[0] for kind, outcome in outcomes if outcome == "loaded"}
