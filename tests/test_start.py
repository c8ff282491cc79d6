"""recipes/measure/start.py: every step of its table runs, and says what it cost."""

import json
import re

import pytest
from text_models import tiny_llama

from measure import start

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # in peft
SIZES = "--batch_size", "1", "--length", "8", "--group_size", "16"


def test_each_step_has_a_row(tmp_path, monkeypatch, capsys):
    processes = []

    def in_this_process(script, *argv, **environment):
        processes.append(environment)
        return start.main(list(argv))[0]

    monkeypatch.setattr(start, "row_of", in_this_process)
    tiny_llama().save_pretrained(tmp_path / "model")
    output = tmp_path / "table.json"
    rows = start.main([str(tmp_path / "model"), *SIZES, "--batches", "1", "2", "--output", str(output)])
    names = [row["step"] for row in rows]
    steps = [step for step in start.STEPS if step != "calibrate"]
    steps[3:3] = ["calibrate, 1 batches", "calibrate, 2 batches"]
    assert names == steps
    assert all(row["s"] > 0 for row in rows)
    assert rows[0]["s of float"] == 1
    assert processes[2]["HF_DAQ_COMPILE"] == "0"
    assert json.loads(output.read_text())["rows"] == rows
    printed = capsys.readouterr().out
    assert len(re.findall(r"^\| .* \| .* \| .* \| .* \| .* \|$", printed, re.M)) == len(rows)


@pytest.mark.slow
def test_a_row_comes_from_a_process_of_its_own(tmp_path):
    tiny_llama().save_pretrained(tmp_path)
    (row,) = start.main([str(tmp_path), *SIZES, "--steps", "float"])
    assert row["s"] > 0
    assert row["MiB"] > 0


def test_packed_steps_need_a_packed_folder(capsys):
    with pytest.raises(SystemExit):
        start.main(["--steps", "float", "open packed"])
    assert '"pack and save" writes what' in capsys.readouterr().err
