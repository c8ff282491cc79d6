"""The study of estimators: its table, that a stopped run goes on as if it had not been, and EWGS."""

import json
import math
from pathlib import Path

import pytest
import torch
import yaml

import hf_daq
from measure import estimator_table, estimators
from measure.ewgs import use_ewgs

pytestmark = pytest.mark.usefixtures("one_thread")
RECIPES = Path(estimators.__file__).parents[1]
GRID = {"bits": ["1/1"], "optimizer": "sgd", "epochs": [2], "seeds": [0]}
TINY = {
    "network": "resnet8_cifar",
    "float_epochs": 1,
    "batch_size": 64,
    "crop_padding": 1,
    "heldout": 0.8,
    "compile": False,
    "estimators": {"daq": {}, "ste": {"rounding": "ste"}, "soft": {"rounding": "soft"}, "ewgs": {"ewgs": 1.0}},
}


def row(estimator, lr, seed, heldout, test, **more):
    settings = {"network": "n", "bits": "1/1", "settings": {}, "optimizer": "sgd", "epochs": 5}
    values = {"estimator": estimator, "lr": lr, "seed": seed, "heldout": heldout, "test": test}
    return settings | values | {"history": [{"loss": 1.0, "heldout": heldout}] * 2} | more


ROWS = [
    row("daq", 0.1, 0, 60.0, 50.0),
    row("daq", 0.1, 1, 64.0, 54.0),
    row("daq", 0.2, 0, 61.0, 90.0),  # the best on the test images, which nothing is chosen on
    row("daq", 0.2, 1, 61.0, 90.0),
    row("daq", 0.4, 0, 99.0, 99.0),  # one seed only: not comparable yet
    row("ste", 0.1, 0, 50.0, 49.0),
    row("ste", 0.1, 1, 50.0, 49.0),
    row("soft", 0.1, 0, 70.0, 60.0, gap=2.5),
]


def test_the_table_chooses_on_held_out_images_and_reports_test(tmp_path, capsys):
    results = tmp_path / "results.jsonl"
    results.write_text("".join(json.dumps(entry) + "\n" for entry in ROWS))
    estimators.main(["--table", "--results", str(results), "--report", str(tmp_path / "report")])
    printed = capsys.readouterr().out
    assert "| n | 1/1 | sgd | 5 | daq | 0.1 (3) | 62.00 ± 2.00 | 52.00 ± 2.00 | 2 | +3.00 ± 2.00 | 0 |" in printed
    assert "| n | 1/1 | sgd | 5 | ste | 0.1 (1) | 50.00 ± 0.00 | 49.00 ± 0.00 | 2 | - | 0 |" in printed
    assert "| n | 1/1 | sgd | 5 | soft | 0.1 (1) | 70.00 | 60.00 | 1 | +11.00 | +2.5 |" in printed
    assert (tmp_path / "report" / "estimators.png").read_bytes().startswith(b"\x89PNG")
    page = (tmp_path / "report" / "estimators.md").read_text()
    for line in printed.splitlines()[:5]:
        assert line in page
    assert "(estimators.png)" in page


def test_the_standard_error_is_that_of_the_mean():
    mean, error = estimator_table.mean_and_error([1.0, 2.0, 3.0, 6.0])
    assert (mean, error) == (3.0, pytest.approx(torch.tensor([1.0, 2.0, 3.0, 6.0]).std().item() / 2))
    assert math.isnan(estimator_table.mean_and_error([1.0])[1])


def test_the_study_that_is_shipped_can_be_read_and_its_settings_exist():
    study = estimators.read_study(RECIPES / "configs" / "estimators.yaml")
    first = list(estimators.runs_of(study, study.grids[0], []))
    assert len({run.file for run in first}) == len(first) == 2 * 2 * 4 * 3
    assert [run.seed for run in first] == sorted(run.seed for run in first)
    for settings in study.estimators.values():
        hf_daq.DaqConfig(bits=2, **{key: value for key, value in settings.items() if key not in ("rate", "ewgs")})
    with pytest.raises(SystemExit, match="no shorter run of daq at 1/1 with sgd"):
        list(estimators.runs_of(study, GRID | {"estimators": ["daq"], "lr": "best", "epochs": [60]}, []))


@pytest.fixture(scope="module")
def images():
    """Read once: it takes longer than the runs."""
    with pytest.MonkeyPatch.context() as patch:
        found = estimators.Images(estimators.Study(**TINY, grids=[]), "digits")
        patch.setattr(estimators, "Images", lambda study, dataset: found)
        yield found


@pytest.fixture(scope="module")
def study(tmp_path_factory, images):
    """A study on the digits, its results, and where its float network is."""
    folder = tmp_path_factory.mktemp("study")
    grids = [
        GRID | {"estimators": ["daq", "ewgs"], "lr": [0.05]},
        GRID | {"estimators": ["soft"], "lr": [0.05], "epochs": [1]},
        GRID | {"estimators": ["daq"], "lr": [0.01], "optimizer": "muon", "epochs": [1]},
        GRID | {"estimators": ["daq"], "lr": "best", "epochs": [3]},
    ]
    (folder / "study.yaml").write_text(yaml.safe_dump(TINY | {"grids": grids}))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_DAQ_COMPILE", "0")
        run(folder)
    return folder


def run(folder):
    files = ["--study", folder / "study.yaml", "--results", folder / "results.jsonl", "--work", folder / "work"]
    estimators.main(["--dataset", "digits", *map(str, files)])
    return estimators.read_rows(folder / "results.jsonl")


def test_each_run_is_one_line_with_what_it_was(study):
    rows = estimators.read_rows(study / "results.jsonl")
    names = [(row["estimator"], row["optimizer"], row["epochs"]) for row in rows]
    sgd, soft = [("daq", "sgd", 2), ("ewgs", "sgd", 2)], ("soft", "sgd", 1)
    assert names == [("float", "sgd", 1), *sgd, soft, ("daq", "muon", 1), ("daq", "sgd", 3)]
    for row in rows:
        assert len(row["history"]) == row["epochs"]
        assert row["heldout"] == row["history"][-1]["heldout"]
        assert 0 < row["test"] < 100
        assert row["versions"]["hf_daq"] == hf_daq.__version__
    assert "gap" in rows[3]
    assert rows[5]["lr"] == 0.05
    assert not list((study / "work").glob("*[!t]-*.pt"))


def test_a_stopped_run_goes_on_as_if_it_had_not_been(study, monkeypatch):
    """The last run once more, stopped in its second epoch; and nothing else is run again."""
    monkeypatch.setenv("HF_DAQ_COMPILE", "0")
    path = study / "results.jsonl"
    *others, expected = path.read_text().splitlines(keepends=True)
    path.write_text("".join(others))
    whole, begun = estimators.Trainer.epoch, []

    def stopped(self, run, epoch, *args):
        begun.append((run.epochs, epoch))
        if epoch == 1:
            raise KeyboardInterrupt
        return whole(self, run, epoch, *args)

    monkeypatch.setattr(estimators.Trainer, "epoch", stopped)
    with pytest.raises(KeyboardInterrupt):
        run(study)
    assert begun == [(3, 0), (3, 1)]
    monkeypatch.setattr(estimators.Trainer, "epoch", whole)
    found, expected = run(study)[-1], json.loads(expected)
    assert {**found, "cpu_seconds": 0} == {**expected, "cpu_seconds": 0}
    assert found["cpu_seconds"] > 0


def test_muon_moves_the_weights_of_the_network(study, images):
    """Through views of the same memory, which the evaluated network must notice."""
    settings = estimators.read_study(study / "study.yaml")
    trainer = estimators.Trainer(settings, images, study / "work")
    run = estimators.Run("resnet8_cifar", "2/2", "ste", {"rounding": "ste"}, "muon", 0.02, 1, 0)
    model, _ = trainer.model(run)
    muon, adam = estimators.optimizers_of(settings, run, model)
    x, labels = next(trainer.images.epoch(0, 0))
    before, weight = model.eval()(x).detach(), model.layer1[0].conv1.weight
    was = weight.detach().clone()
    torch.nn.functional.cross_entropy(model.train()(x), labels).backward()
    muon.step()
    moved = weight.detach() - was
    # An orthogonal matrix, roughly, times the learning rate and 0.2 * sqrt(the longer side).
    size = torch.linalg.matrix_norm(moved.permute(0, 2, 3, 1).flatten(1), 2) / (0.02 * 0.2 * math.sqrt(16 * 9))
    assert 0.7 < size < 1.3
    assert not torch.equal(model.eval()(x), before)
    counted = [p for optimizer in (muon, adam) for group in optimizer.param_groups for p in group["params"]]
    assert sum(p.numel() for p in counted) == sum(p.numel() for p in model.parameters() if p.requires_grad)


def test_the_learning_rate_of_quantized_weights_alone_is_multiplied(study, images):
    settings = estimators.read_study(study / "study.yaml")
    trainer = estimators.Trainer(settings, images, study / "work")
    run = estimators.Run("resnet8_cifar", "1/32", "scaled", {"rate": 2.5}, "sgd", 0.1, 1, 0)
    model, _ = trainer.model(run)
    sgd, adam = estimators.optimizers_of(settings, run, model)
    rates = {id(p): group["lr"] for group in sgd.param_groups for p in group["params"]}
    assert rates[id(model.layer2[0].conv1.weight)] == 0.25
    assert rates[id(model.conv1.weight)] == rates[id(model.fc.weight)] == rates[id(model.layer1[0].bn1.weight)] == 0.1
    assert adam.param_groups[0]["lr"] == settings.quantizer_lr
    daq = model.daq_config
    assert (daq.weight_bits, daq.activation_bits, daq.weight_normalization) == (1, None, "standardize")


# EWGS -------------------------------------------------------------------------------------------------------------


def layers(dtype):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Conv2d(2, 6, 3), torch.nn.ReLU(), torch.nn.Conv2d(6, 4, 3))
    hf_daq.apply_daq(model, bits=2, rounding="ste", first_last_bits=2)
    x = torch.rand(3, 2, 9, 9)
    with hf_daq.calibrate(model):
        model(x)
    return model.to(dtype), x.to(dtype)


def gradients(model, x):
    model.zero_grad()
    y = model(x)
    y.square().sum().backward()
    return [y.detach(), *(p.grad.clone() for p in model.parameters() if p.requires_grad)]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_ewgs_without_its_scale_is_the_straight_through_estimator(dtype):
    model, x = layers(dtype)
    expected = gradients(model, x)
    use_ewgs(model, 0.0)
    tolerance = 1e-9 if dtype == torch.float64 else 1e-3
    for found, wanted in zip(gradients(model, x), expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=tolerance, atol=tolerance)
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(x), expected[0], rtol=tolerance, atol=tolerance)


def test_ewgs_is_its_papers_equation():
    model, _ = layers(torch.float64)
    use_ewgs(model, 0.3)
    quantizer = model[2].a_quant
    upper = quantizer.upper.detach().double()
    x = (torch.linspace(-0.2, 1.2, 141).double() * upper).requires_grad_()
    y = quantizer(x)
    grad = torch.linspace(-1, 1, 141).double()
    y.backward(grad)
    between = x.detach() / upper
    inside = (between >= 0) & (between <= 1)
    expected = grad * (1 + 0.3 * grad.sign() * (between - y.detach())) / upper * inside
    torch.testing.assert_close(x.grad, expected, rtol=1e-9, atol=1e-12)


def test_ewgs_refuses_inputs_with_a_sign():
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Tanh(), torch.nn.Linear(4, 4))
    hf_daq.apply_daq(model, bits=2, first_last_bits=2)
    with hf_daq.calibrate(model):
        model(torch.randn(8, 4))
    with pytest.raises(ValueError, match="never negative, such as those after a ReLU"):
        use_ewgs(model, 0.1)


def test_ewgs_can_be_compiled():
    model, x = layers(torch.float32)
    use_ewgs(model, 0.5)
    expected = gradients(model, x)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    model.zero_grad()
    y = compiled(x)
    y.square().sum().backward()
    torch.testing.assert_close(y.detach(), expected[0])
    for parameter, wanted in zip((p for p in model.parameters() if p.requires_grad), expected[1:], strict=True):
        torch.testing.assert_close(parameter.grad, wanted, rtol=1e-4, atol=1e-4)
