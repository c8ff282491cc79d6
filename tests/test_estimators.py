"""The study of estimators: its table, that a stopped run goes on as if it had not been, and EWGS."""

import argparse
import copy
import json
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import yaml
from safetensors.torch import load_file
from torch import nn

import hf_daq
from hf_daq.nn.layers import quantized_layers
from measure import estimator_table, estimators, ingredients, learned_steps, side_by_side
from measure.ewgs import use_ewgs
from measure.learned_steps import use_lsq, use_paretoq
from measure.study import Run, Study, read_rows, read_study, runs_of

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
    "calibration_batches": 2,
    "dtype": "float32",
    "estimators": {
        "daq": {},
        "ste": {"rounding": "ste"},
        "soft": {"rounding": "soft"},
        "ewgs": {"ewgs": 1.0},
        "all": {
            **{"distill": 0.5, "features": 0.1, "ema": 0.9, "reestimate": 2, "dampening": 0.1},
            **{"transitions": 0.01, "kurtosis": 0.1, "cauchy_schwarz": 0.1, "freeze": 0.001, "inputs_first": 1},
            "reconstruct": True,
        },
    },
}


def row(estimator, lr, seed, heldout, test, **more):
    settings = {"network": "n", "bits": "1/1", "settings": {}, "dtype": "bfloat16", "optimizer": "sgd", "epochs": 5}
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
    assert (
        "| n | 1/1 | bfloat16 | sgd | 5 | daq | 0.1 (3) | 62.00 ± 2.00 | 52.00 ± 2.00 | 2 | +3.00 ± 2.00 | 0 |"
        in printed
    )
    assert "| n | 1/1 | bfloat16 | sgd | 5 | ste | 0.1 (1) | 50.00 ± 0.00 | 49.00 ± 0.00 | 2 | - | 0 |" in printed
    assert "| n | 1/1 | bfloat16 | sgd | 5 | soft | 0.1 (1) | 70.00 | 60.00 | 1 | +11.00 | +2.5 |" in printed
    assert (tmp_path / "report" / "estimators.png").read_bytes().startswith(b"\x89PNG")
    page = (tmp_path / "report" / "estimators.md").read_text()
    for line in printed.splitlines()[:5]:
        assert line in page
    assert estimator_table.overall(ROWS) in page
    assert "(estimators.png)" in page


def test_all_pairs_of_seeds_are_compared_at_the_best_rates():
    later = [entry | {"epochs": 60} for entry in (row("daq", 0.2, 0, 70.0, 70.0), row("ste", 0.1, 0, 60.0, 60.0))]
    assert estimator_table.overall(ROWS[4:7]) == ""  # one seed with both
    words = estimator_table.overall(ROWS + later)  # 60 and 64 beside 50 twice, of those with two seeds
    assert words.startswith("daq minus ste, seed by seed, 2 pairs")
    assert words.endswith("+12.00 ± 2.00 held out, +3.00 ± 2.00 test.")


def test_the_standard_error_is_that_of_the_mean():
    mean, error = estimator_table.mean_and_error([1.0, 2.0, 3.0, 6.0])
    assert (mean, error) == (3.0, pytest.approx(torch.tensor([1.0, 2.0, 3.0, 6.0]).std().item() / 2))
    assert math.isnan(estimator_table.mean_and_error([1.0])[1])


def test_the_study_that_is_shipped_can_be_read_and_its_settings_exist():
    study = read_study(RECIPES / "configs" / "estimators.yaml")
    first = list(runs_of(study, study.grids[0], []))
    assert len({run.file for run in first}) == len(first) == 3 * 2 * 4 * 3
    assert [run.seed for run in first] == sorted(run.seed for run in first)
    for name in sorted(path.name for path in (RECIPES / "configs").glob("estimators*.yaml")):
        parsed = read_study(RECIPES / "configs" / name)
        first_line = (RECIPES / "configs" / name).read_text().splitlines()[0]
        options = first_line.removeprefix("# python recipes/measure/estimators.py ").partition("[")[0]
        assert estimators.parse(options.split()).study.name == name
        for grid in parsed.grids:
            assert set(grid) == {"part", *GRID, "estimators", "lr"}
        for settings in parsed.estimators.values():
            hf_daq.DaqConfig(bits=2, **{key: value for key, value in settings.items() if key not in side_by_side.OTHER})
    with pytest.raises(SystemExit, match="no other run of daq at 1/1 with sgd"):
        list(runs_of(study, GRID | {"estimators": ["daq"], "lr": "best", "epochs": [60]}, []))


@pytest.fixture(scope="module")
def images():
    """Read once: it takes longer than the runs."""
    with pytest.MonkeyPatch.context() as patch:
        found = side_by_side.Images(Study(**TINY, grids=[]), "digits")
        patch.setattr(estimators, "Images", lambda study, dataset: of_dtype(found, study.dtype))
        yield found


def of_dtype(images, dtype):
    found = copy.copy(images)
    found.dtype = dtype
    return found


@pytest.fixture(scope="module")
def study(tmp_path_factory, images):
    """A study on the digits, its results, and where its float network is."""
    folder = tmp_path_factory.mktemp("study")
    grids = [
        GRID | {"estimators": ["daq", "all"], "lr": [0.05], "epochs": [0]},
        GRID | {"estimators": ["daq", "ewgs"], "lr": [0.05]},
        GRID | {"estimators": ["soft"], "lr": [0.05], "epochs": [1]},
        GRID | {"estimators": ["daq"], "lr": [0.01], "optimizer": "muon", "epochs": [1]},
        GRID | {"estimators": ["all"], "lr": [0.05]},
        GRID | {"estimators": ["all"], "lr": "best", "epochs": [3]},
    ]
    (folder / "study.yaml").write_text(yaml.safe_dump(TINY | {"grids": grids}))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_DAQ_COMPILE", "0")
        run(folder)
    return folder


def run(folder, *options):
    files = ["--study", folder / "study.yaml", "--results", folder / "results.jsonl", "--work", folder / "work"]
    estimators.main(["--dataset", "digits", *map(str, files), *options])
    return read_rows(folder / "results.jsonl")


def test_each_run_is_one_line_with_what_it_was(study):
    rows = read_rows(study / "results.jsonl")
    names = [(row["estimator"], row["optimizer"], row["epochs"]) for row in rows]
    sgd, soft = [("daq", "sgd", 2), ("ewgs", "sgd", 2)], ("soft", "sgd", 1)
    start = [("daq", "sgd", 0), ("all", "sgd", 0)]
    assert names == [("float", "sgd", 1), *start, *sgd, soft, ("daq", "muon", 1), ("all", "sgd", 2), ("all", "sgd", 3)]
    for row in rows:
        assert len(row["history"]) == row["epochs"]
        assert not row["history"] or row["heldout"] == row["history"][-1]["heldout"]
        assert 0 < row["heldout"] < 100
        assert 0 < row["test"] < 100
        assert row["versions"]["hf_daq"] == hf_daq.__version__
    assert "gap" in rows[5]
    assert rows[8]["lr"] == 0.05
    assert not list((study / "work").iterdir())


def test_a_run_that_two_grids_name_is_carried_out_once(tmp_path):
    plan = read_study(RECIPES / "configs" / "estimators.yaml")
    grids = [grid for grid in plan.grids if grid["part"] in ("one epoch", "peers")]
    runs, given = [run for grid in grids for run in runs_of(plan, grid, [])], []
    assert len({run.key for run in runs}) < len(runs)
    args = argparse.Namespace(results=tmp_path / "results.jsonl", work=tmp_path, side_by_side=1)
    args.results.touch()
    estimators.finish(runs, args, lambda groups: given.extend(groups) or ())
    carried_out = [run.key for group in given for run in group]
    assert sorted(carried_out) == sorted({run.key for run in runs})


@pytest.mark.slow
def test_a_stopped_run_goes_on_as_if_it_had_not_been(study, monkeypatch):
    """The last run once more, stopped in its second epoch; and nothing else is run again."""
    monkeypatch.setenv("HF_DAQ_COMPILE", "0")
    path = study / "results.jsonl"
    *others, expected = path.read_text().splitlines(keepends=True)
    path.write_text("".join(others))
    whole, begun = side_by_side.Training.start_epoch, []

    def stopped(self):
        begun.append((self.run.epochs, len(self.history)))
        if self.history:
            raise KeyboardInterrupt
        return whole(self)

    monkeypatch.setattr(side_by_side.Training, "start_epoch", stopped)
    with pytest.raises(KeyboardInterrupt):
        run(study)
    assert begun == [(3, 0), (3, 1)]
    monkeypatch.setattr(side_by_side.Training, "start_epoch", whole)
    expected = json.loads(expected)
    saved = side_by_side.Training.result
    monkeypatch.setattr(side_by_side.Training, "result", stopped)
    with pytest.raises(KeyboardInterrupt):  # after the last epoch, before its line is written
        run(study)
    monkeypatch.setattr(side_by_side.Training, "result", saved)
    found = run(study)[-1]
    assert {**found, "seconds": 0} == {**expected, "seconds": 0}
    assert found["seconds"] > 0


def test_a_run_in_bfloat16_is_another_run(study, tmp_path, monkeypatch, images):
    monkeypatch.setenv("HF_DAQ_COMPILE", "0")
    grids = [GRID | {"estimators": ["daq"], "lr": [0.05]}]
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(TINY | {"grids": grids}))
    float32 = run(tmp_path)
    assert [(row["estimator"], row["dtype"]) for row in float32] == [("float", "float32"), ("daq", "float32")]
    both = run(tmp_path, "--dtype", "bfloat16")
    assert both[:2] == float32
    assert [(row["estimator"], row["dtype"]) for row in both[2:]] == [("daq", "bfloat16")]
    assert both[2]["history"] != both[1]["history"]
    model = side_by_side.new_model(read_study(study / "study.yaml"), images.classes)
    seen = set()
    model.conv1.register_forward_hook(lambda module, args, output: seen.add(output.dtype))
    for dtype in ("float32", "bfloat16"):
        of_dtype(images, dtype).accuracy(model, images.plain, images.heldout_rows)
    assert seen == {torch.float32, torch.bfloat16}


def network(study, images, run):
    state = load_file(study / "float-resnet8_cifar.safetensors")
    settings = read_study(study / "study.yaml")
    model = side_by_side.quantized_model(settings, run, images, state)
    return settings, model, side_by_side.optimizers_of(settings, run, model)


def count(optimizers):
    return sum(p.numel() for optimizer in optimizers for group in optimizer.param_groups for p in group["params"])


def test_muon_moves_the_weights_of_the_network(study, images):
    """Through views of the same memory, which the evaluated network must notice; at a rate that is a tensor."""
    run = Run("resnet8_cifar", "2/2", "ste", {"rounding": "ste"}, "muon", 0.02, 1, 0)
    _, model, (muon, adam) = network(study, images, run)
    muon.param_groups[0]["lr"] = torch.tensor(0.02)
    x, labels = images.train.__getitems__(torch.arange(64))
    before, weight = model.eval()(x).detach(), model.layer1[0].conv1.weight
    was = weight.detach().clone()
    F.cross_entropy(model.train()(x), labels).backward()
    reference = torch.nn.Parameter(was.permute(0, 2, 3, 1).flatten(1))
    reference.grad = weight.grad.permute(0, 2, 3, 1).flatten(1)
    torch.optim.Muon([reference], lr=0.02, weight_decay=1e-4, adjust_lr_fn="match_rms_adamw").step()
    muon.step()
    torch.testing.assert_close(weight.detach().permute(0, 2, 3, 1).flatten(1), reference.detach(), rtol=1e-5, atol=1e-6)
    assert not torch.equal(weight.detach(), was)
    assert not torch.equal(model.eval()(x), before)
    assert count([muon, adam]) == sum(p.numel() for p in model.parameters() if p.requires_grad)


def test_the_learning_rate_of_quantized_weights_alone_is_multiplied(study, images):
    run = Run("resnet8_cifar", "1/32", "scaled", {"rate": 2.5}, "sgd", 0.1, 1, 0)
    settings, model, (sgd, adam) = network(study, images, run)
    rates = {id(p): group["lr"] for group in sgd.param_groups for p in group["params"]}
    assert rates[id(model.layer2[0].conv1.weight)] == 0.25
    assert rates[id(model.conv1.weight)] == rates[id(model.fc.weight)] == rates[id(model.layer1[0].bn1.weight)] == 0.1
    assert adam.param_groups[0]["lr"] == settings.quantizer_lr
    daq = model.daq_config
    assert (daq.weight_bits, daq.activation_bits, daq.weight_normalization) == (1, None, "standardize")


def test_updates_with_rates_in_tensors_are_those_of_torch(study, images, monkeypatch):
    """Two epochs by hand, with torch's plain optimizers and timm's schedule, against the ones that a graph can replay."""
    monkeypatch.setenv("HF_DAQ_COMPILE", "0")
    images = of_dtype(images, "float32")  # rounding errors of bfloat16 change codes
    run = Run("resnet8_cifar", "2/2", "daq", {}, "sgd", 0.05, 2, 3, "float32")
    settings, model, _ = network(study, images, run)
    _, other, _ = network(study, images, run)
    training = side_by_side.Training(settings, run, images, model)
    for _ in range(2):
        training.start_epoch()
        for _ in range(images.batches):
            training.advance()
        training.end_epoch()
    sgd, adam = side_by_side.optimizers_of(settings, run, other)
    sgd = torch.optim.SGD(sgd.param_groups, lr=0.05, momentum=0.9, nesterov=True, foreach=False)
    for group in sgd.param_groups:
        group["fused"] = False
    adam = torch.optim.Adam(adam.param_groups, lr=1e-3)
    for group in adam.param_groups:
        group["fused"] = False
    schedules = side_by_side.cosine([sgd, adam], 2 * images.batches, images.batches)
    update = 0
    for epoch in range(2):
        images.train.augment.seed = 3
        images.train.start_epoch(epoch)
        other.train()
        for rows in images.order(3, epoch):
            update += 1
            for schedule in schedules:
                schedule.step_update(update)
            for group in sgd.param_groups + adam.param_groups:
                group["lr"] = float(torch.tensor(group["lr"]))  # one bit more grows a thousandfold with each update
            batch, labels = images.train.__getitems__(rows)
            with images.autocast():
                loss = F.cross_entropy(other(batch), labels)
            other.zero_grad()
            loss.backward()
            sgd.step()
            adam.step()
        found = images.accuracy(other, images.plain, images.heldout_rows)
        assert abs(found - training.history[epoch]["heldout"]) < 0.5
    for (name, one), two in zip(model.state_dict().items(), other.state_dict().values(), strict=True):
        difference = (one.double() - two.double()).norm() / two.double().norm().clamp_min(1e-6)
        assert difference < 1e-3, name


def test_what_is_deployed_is_the_average_with_statistics_of_its_own(study, images):
    run = Run("resnet8_cifar", "2/2", "all", {"ema": 0.5, "reestimate": 2}, "sgd", 0.05, 1, 0)
    settings, model, _ = network(study, images, run)
    training = side_by_side.Training(settings, run, images, model)
    weight = model.layer1[0].conv1.weight
    seen = [weight.detach().clone()]
    training.start_epoch()
    for _ in range(2):
        training.advance()
        seen.append(weight.detach().clone())
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with training.deployed():
        torch.testing.assert_close(weight.detach(), 0.25 * seen[0] + 0.25 * seen[1] + 0.5 * seen[2])
        assert not torch.equal(model.layer1[0].bn1.running_mean, before["layer1.0.bn1.running_mean"])
        assert model.layer1[0].bn1.num_batches_tracked == before["layer1.0.bn1.num_batches_tracked"]
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_groups_train_the_same_network_and_the_longest_go_first():
    runs = [
        Run("n", bits, "daq", {}, "sgd", lr, epochs, 0)
        for epochs in (1, 2)
        for lr in (1, 2, 3)
        for bits in ("1/1", "2/2")
    ]
    one = estimators.groups_of(runs, 1)
    assert [group[0] for group in one] == runs
    several = estimators.groups_of(runs, 2)
    assert sorted(str(run) for group in several for run in group) == sorted(map(str, runs))
    assert [group[0].epochs for group in several] == [2, 2, 2, 2, 1, 1, 1, 1]
    assert all(len({run.network_key for run in group}) == 1 and len(group) <= 2 for group in several)


# Ingredients ------------------------------------------------------------------------------------------------------


def test_regularizers_are_least_where_their_papers_say():
    model, _ = layers(torch.float32)
    with torch.no_grad():
        for layer in quantized_layers(model).values():
            layer.weight.copy_(torch.linspace(-1, 1, layer.weight.numel()).view_as(layer.weight))
        assert ingredients.kurtosis(model) < 0.01
        assert ingredients.cauchy_schwarz(model) > 0.1
        for layer in quantized_layers(model).values():
            layer.weight.copy_(layer.weight.sign() * torch.rand(len(layer.weight), 1, 1, 1))
        assert ingredients.cauchy_schwarz(model) < 1e-6
        assert ingredients.kurtosis(model) > 0.1


def test_the_ranges_of_channels_are_alike_where_nothing_is_lost():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 6, 1), nn.ReLU(), nn.Conv2d(6, 6, 3, groups=6), nn.Conv2d(6, 2, 1))
    nn.init.constant_(model[0].bias, 1.0)  # a channel that is always 0 has no gradient
    hf_daq.apply_daq(model, bits=4)
    x = torch.rand(4, 3, 8, 8)
    with hf_daq.calibrate(model):
        model(x)
    ranges = ingredients.Ranges(model)
    losses = []
    for _ in range(40):
        model(x)
        loss = ranges.loss()
        (gradient,) = torch.autograd.grad(loss, model[0].weight)
        losses.append(loss.item())
        with torch.no_grad():
            model[0].weight -= 0.1 * gradient
    assert losses[-1] < 0.2 * losses[0]
    assert list(ranges.channels) == ["2"]
    channels = ranges.channels["2"].detach()
    assert losses[-1] == pytest.approx((channels.var(correction=0) / channels.mean() ** 2).item(), rel=1e-4)


def test_a_weight_that_goes_to_and_fro_is_frozen_where_it_mostly_is():
    model, _ = layers(torch.float32)
    layer = model[0]
    high, low = 0.01, -0.01  # of two codes beside one another
    freezing = ingredients.Freezing(model, threshold=0.3, momentum=0.2)
    weights = layer.weight.detach().view(-1)
    for step in range(20):
        weights[0] = low if step % 8 == 0 else high  # oscillates
        weights[1] = (step - 10) / 1000  # goes one way
        freezing.step()
    weights[:2] = low
    freezing.step()
    assert weights[0] == pytest.approx(high)
    assert weights[1] == pytest.approx(low)
    assert [int(known["frozen"].sum()) for known in freezing.state] == [1, 0]


def test_inputs_first_leaves_weights_in_float_and_then_starts_from_them(study, images):
    run = Run("resnet8_cifar", "2/2", "all", {"inputs_first": 1}, "sgd", 0.05, 2, 0)
    settings, model, _ = network(study, images, run)
    training = side_by_side.Training(settings, run, images, model)
    layer = model.layer1[0].conv1
    training.start_epoch()
    assert layer.quantized_weight() is layer.weight
    training.advance()
    training.end_epoch()
    bounds = layer.w_quant.upper.clone()
    training.start_epoch()
    assert len(layer.quantized_weight().unique()) <= 4
    assert not torch.equal(layer.w_quant.upper, bounds)
    training.advance()


# Learned steps ----------------------------------------------------------------------------------------------------


def test_lsq_is_torchs_learned_fake_quantize():
    """Values and gradients, with its paper's factor of the step's gradient. Up to half a step past the last code torch passes
    gradients on; the paper (equation 3) does not, and no input lies there."""
    torch.manual_seed(0)
    for bits, lowest, highest in ((2, -2, 1), (4, -8, 7), (4, 0, 15)):
        step = torch.tensor([0.23], requires_grad=True)
        x, grad = torch.randn(50, 7), torch.randn(50, 7)
        position = x / step.detach()
        beside = (position - highest).clamp_min(0) + (lowest - position).clamp_min(0)
        x = torch.where((beside > 0) & (beside < 0.6), 0.7 * step.detach(), x).requires_grad_()
        factor = 1 / math.sqrt(x.numel() * highest)
        theirs = torch._fake_quantize_learnable_per_tensor_affine(x, step, torch.zeros(1), lowest, highest, factor)
        theirs.backward(grad)
        expected = theirs.detach(), x.grad.clone(), step.grad.clone()
        x.grad = step.grad = None
        ours = learned_steps.lsq(x, step, lowest, highest, x.numel())
        ours.backward(grad)
        for found, wanted in zip((ours.detach(), x.grad, step.grad), expected, strict=True):
            torch.testing.assert_close(found, wanted, msg=f"{bits} bits, {lowest} to {highest}")


def test_paretoq_has_its_grids():
    step = torch.tensor([[1.0], [2.0]])
    weight = torch.linspace(-1.5, 1.5, 301).expand(2, -1).clone().requires_grad_()
    two = learned_steps.stretched(weight, step, 2)
    assert two[0].unique().tolist() == [-0.75, -0.25, 0.25, 0.75]
    assert learned_steps.stretched(weight, step, 1)[1].unique().tolist() == [-2, 2]
    three = learned_steps.stretched(weight, step, 2, ternary=True)
    torch.testing.assert_close(three[1].unique(), torch.tensor([-4 / 3, 0, 4 / 3]))
    two.sum().backward()
    inside = (weight.detach()[0] > -1) & (weight.detach()[0] < 0.99)
    assert torch.equal(weight.grad[0] != 0, inside)


@pytest.mark.parametrize("use", [use_lsq, use_paretoq])
def test_learned_steps_have_three_values_on_the_ternary_grid(use):
    model = hf_daq.apply_daq(
        torch.nn.Sequential(torch.nn.Linear(16, 16)), weight_bits=2, weight_grid="ternary", first_last_bits=2
    )
    with hf_daq.calibrate(model, check=False):
        model(torch.randn(8, 16))
    use(model, torch.randn(8, 16))
    assert len((model[0].w_quant(model[0].weight) / model[0].w_quant.step.view(-1, 1)).detach().unique()) == 3


@pytest.mark.parametrize("use", [use_lsq, use_paretoq])
def test_learned_steps_start_near_the_float_network_and_learn(use):
    model, x = layers(torch.float32)
    first, _, second = model
    plain = F.conv2d(F.conv2d(x, first.weight, first.bias).relu(), second.weight, second.bias).detach()
    use(model, x)
    learned = (learned_steps.LearnedWeights, learned_steps.LearnedInputs)
    steps = [module.step for module in model.modules() if isinstance(module, learned)]
    assert len(steps) == 4
    y = model.train()(x)
    y.square().sum().backward()
    assert all(step.grad.abs().sum() > 0 for step in steps)
    assert (model.eval()(x) - plain).norm() < plain.norm()
    assert [p for p in model.parameters() if p.requires_grad and id(p) in set(map(id, steps))]


@pytest.mark.parametrize("use", [use_lsq, use_paretoq])
def test_learned_steps_round_inputs_whose_channels_are_divided(use):
    torch.manual_seed(0)
    model, x = torch.nn.Sequential(torch.nn.Linear(16, 16), torch.nn.Linear(16, 4)).eval(), torch.randn(256, 16)
    x[:, 3] *= 40
    with torch.no_grad():
        expected = model(x)
        hf_daq.apply_daq(model, bits=8, first_last_bits=8)
        with hf_daq.calibrate(model, check=False):
            model(x)
        assert model[0].smooth is not None
        use(model, x)
        assert (model.eval()(x) - expected).norm() < 0.2 * expected.norm()


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


@pytest.mark.slow
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
