"""Two processes (tests/programs/ranks.py) against one another, and against one process on the joined batches."""

import copy
from pathlib import Path

import pytest
import ranks
import timm
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from peft import PeftModel
from processes import Program
from ranks import (
    ADAPTERS,
    CONFIG,
    STEPS,
    WEIGHTS_ONLY,
    adapted,
    batches,
    calibrated_net,
    calibrated_vit,
    optimizer_of,
    reconstructed_vit,
    share,
    small_llama,
    targets,
    train,
    trained_adapters,
    trained_by_trainer,
    trained_experts,
    vit,
)
from text_models import logits, tiny_bert
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from transformers import AutoModelForSequenceClassification, LlamaForCausalLM

import hf_daq
from hf_daq.files.header import read_header
from hf_daq.nn.layers import quantized_layers
from hf_daq.nn.settle import settled

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # in peft


@pytest.fixture(scope="module")
def ended(tmp_path_factory):
    """folder, and what each scenario ended with: (rank 0, rank 1)."""
    folder = tmp_path_factory.mktemp("ranks")
    Program(Path(ranks.__file__), folder, ranks=2).finish(timeout=600)
    return folder, _ends(folder, ranks.SCENARIOS)


def _ends(folder, scenarios):
    names = [scenario.__name__ for scenario in scenarios]
    return {name: tuple(torch.load(folder / f"{name}-{rank}.pt") for rank in (0, 1)) for name in names}


@pytest.fixture(scope="module")
def alone():
    """State of one process on the joined batches after calibration, and after each step."""
    torch.set_num_threads(1)
    model = calibrated_vit()
    states = [{k: v.clone() for k, v in model.state_dict().items()}]
    optimizer = optimizer_of(model)
    for step in range(STEPS):
        train(model, optimizer, range(step, step + 1))
        states.append({k: v.clone() for k, v in model.state_dict().items()})
    return states


def equal(one, other):
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


def close(one, other, tolerance=2e-5):
    assert one.keys() == other.keys()
    for name in one:
        torch.testing.assert_close(
            one[name], other[name], rtol=tolerance, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.parametrize("scenario", ["calibration", "calibration_of_unequal_shares"])
def test_calibration_is_equal_on_all_ranks_and_as_in_one_process(ended, alone, scenario):
    first, second = ended[1][scenario]
    equal(first["state"], second["state"])
    close(first["state"], alone[0])


def test_calibration_on_shares_unlike_one_another(ended):
    first, second = (rank["states"] for rank in ended[1]["calibration_of_shares_unlike_one_another"])
    want = calibrated_net(range(4)).state_dict()
    for one, other in zip(first, second, strict=True):
        equal(one, other)
        close(one, want, 1e-5)


def test_reconstruction_is_equal_on_all_ranks_and_near_that_of_one_process(ended):
    """Sums in another order may move a code, and all that comes after it."""
    first, second = (rank["states"] for rank in ended[1]["reconstruction"])
    joined = [batches(step) for step in range(2)]
    shares = [share(batch, rank, 2) for rank in (0, 1) for batch in joined]
    for inputs, one, other in zip((shares, joined), first, second, strict=True):
        equal(one, other)
        model, want = calibrated_vit(), reconstructed_vit(inputs)
        start = torch.stack([model(batch) for batch in joined])
        wanted = torch.stack([want(batch) for batch in joined])
        model.load_state_dict(one)
        got = torch.stack([model(batch) for batch in joined])
        assert (got - wanted).norm() < 0.1 * (start - wanted).norm()


def test_every_step_leaves_the_ranks_equal_and_where_one_process_would_be(ended, alone):
    first, second = ended[1]["ddp"]
    for step in range(STEPS):
        equal(first["states"][step], second["states"][step])
        close(first["states"][step], alone[step + 1])
    moved = [name for name in alone[0] if "_quant." in name and not torch.equal(alone[0][name], alone[-1][name])]
    assert len(moved) > 40


@pytest.mark.parametrize("scenario", ["gradient_accumulation", "gradient_checkpointing", "fsdp"])
def test_other_ways_to_train_end_where_one_process_does(ended, alone, scenario):
    close(ended[1][scenario][0]["state"], alone[-1])


@pytest.mark.slow
def test_compiled_training_ends_where_one_process_does(tmp_path, alone):
    Program(Path(ranks.__file__), tmp_path, "longer", ranks=2).finish(timeout=600)
    close(_ends(tmp_path, ranks.LONGER)["ddp_compiled"][0]["state"], alone[-1])


@pytest.mark.parametrize("scenario", ["ddp_in_bf16", "fsdp_in_bf16"])
def test_training_in_bf16_stays_near(ended, alone, scenario):
    state, second = (rank["state"] for rank in ended[1][scenario])
    if scenario == "ddp_in_bf16":
        equal(state, second)
    assert all(tensor.isfinite().all() for tensor in state.values())
    assert {tensor.dtype for name, tensor in state.items() if "_quant." in name} == {torch.float32}
    names = [name for name in state if name.endswith("_quant.upper")]
    assert any(not torch.equal(state[name], alone[0][name]) for name in names)
    close({name: state[name] for name in names}, {name: alone[-1][name] for name in names}, 0.05)


def test_a_state_loads_into_a_sharded_model(ended):
    first, second = ended[1]["fsdp"]
    equal(first["state"], first["loaded"])
    twin = hf_daq.apply_daq(vit(), CONFIG)
    twin.load_state_dict(first["state"])
    for rank in (first, second):
        torch.testing.assert_close(rank["logits"], twin(batches(0)), rtol=1e-5, atol=1e-5)


def test_experts_end_where_one_process_would_also_where_their_weights_are_sharded(ended):
    first, second = ended[1]["experts"]
    want = trained_experts(0, 1, lambda model: model).state_dict()
    equal(first["state"], second["state"])
    for kind in ("state", "sharded"):  # what was gathered is on the first rank
        close(first[kind], want)


@pytest.mark.parametrize(("how", "packed"), ADAPTERS)
def test_sharded_adapters_inside_the_quantizer_end_where_one_process_would(ended, how, packed):
    first, second = (rank[how, packed] for rank in ended[1]["adapters"])
    want = trained_adapters(adapted(small_llama(packed), how))
    torch.testing.assert_close((first["losses"] + second["losses"]) / 2, want["losses"])
    for one, other, wanted in zip(first["gradients"], second["gradients"], want["gradients"], strict=True):
        equal(one, other)
        close(one, wanted)
    assert not torch.equal(logits(adapted(small_llama(packed), how)), want["logits"])
    for rank in (first, second):
        torch.testing.assert_close(rank["logits"], want["logits"], rtol=1e-4, atol=1e-4)


def test_the_file_of_sharded_adapters_opens_in_one_process(ended):
    folder, results = ended
    base = LlamaForCausalLM.from_pretrained(folder / "adapters_saved" / "base")
    model = PeftModel.from_pretrained(base, folder / "adapters_saved")
    want = results["adapters"][0][ADAPTERS[-1]]["logits"]
    assert torch.equal(logits(model), want)
    assert torch.equal(logits(model.merge_and_unload()), want)


def test_monitor_finds_in_shards_what_it_finds_in_whole_weights(ended):
    for layers, values in ((rank["layers"], rank["values"]) for rank in ended[1]["monitored"]):
        assert layers[0].keys() == layers[1].keys()
        for layer, found in layers[0].items():
            assert found.pop("inputs_clipped") is not None
            assert layers[1][layer].pop("inputs_clipped") is None  # the twin has no forward
            want = {key: value for key, value in layers[1][layer].items() if value is not None}
            assert {key: value for key, value in found.items() if value is not None} == pytest.approx(want, rel=1e-6)
        for key in ("daq/flip_rate", "daq/oscillating", "daq/weights_clipped"):
            assert values[0][key] == pytest.approx(values[1][key], rel=1e-6)
            assert values[0][key] > 0


@pytest.mark.parametrize("scenario", ["ddp", "fsdp"])
def test_the_saved_file_is_what_one_process_would_save(ended, alone, scenario, tmp_path):
    folder, results = ended
    model = timm.create_model(f"local-dir:{folder / scenario}_saved", pretrained=True)
    state = results["ddp"][0]["states"][-1] if scenario == "ddp" else results["fsdp"][0]["state"]
    twin = hf_daq.apply_daq(vit(), CONFIG)
    twin.load_state_dict(state)
    equal(model.state_dict(), settled(twin))
    assert torch.equal(model(batches(0)), twin(batches(0)))
    hf_daq.save_pretrained(twin, tmp_path)
    one, other = (path / "model.safetensors" for path in (tmp_path, folder / f"{scenario}_saved"))
    assert read_header(one) == read_header(other)  # safetensors writes its metadata in any order
    assert one.stat().st_size == other.stat().st_size
    assert (tmp_path / "config.json").read_text() == (folder / f"{scenario}_saved" / "config.json").read_text()


def test_a_sharded_transformers_model_saves_whole_tensors(ended):
    folder, results = ended
    model = AutoModelForSequenceClassification.from_pretrained(folder / "fsdp_of_a_transformers_model_saved")
    twin = hf_daq.apply_daq(tiny_bert(), model.daq_config)
    twin.load_state_dict(results["fsdp_of_a_transformers_model"][0]["state"])
    equal(model.state_dict(), settled(twin))
    assert torch.equal(logits(model), logits(twin))
    assert model.config.architectures == ["BertForSequenceClassification"]


def test_trainer_ends_where_one_process_does(ended, tmp_path):
    folder, results = ended
    first, second = (rank["state"] for rank in results["trainer"])
    equal(first, second)
    twin = hf_daq.apply_daq(tiny_bert(), WEIGHTS_ONLY)
    twin.load_state_dict(first)
    equal(AutoModelForSequenceClassification.from_pretrained(folder / "trainer_saved").state_dict(), settled(twin))
    AcceleratorState._reset_state(reset_partial_state=True)
    close(trained_by_trainer(tmp_path, 8).state_dict(), first)


def test_two_processes_continue_bit_for_bit(ended):
    for rank in ended[1]["save_and_load_state"]:
        equal(rank["ends"][0], rank["ends"][1])
    equal(ended[1]["save_and_load_state"][0]["ends"][0], ended[1]["save_and_load_state"][1]["ends"][0])


def test_one_process_continues_the_run_of_two(ended):
    folder, results = ended
    AcceleratorState._reset_state(reset_partial_state=True)
    accelerator = Accelerator(cpu=True)
    model = hf_daq.apply_daq(vit(), CONFIG)
    with hf_daq.calibrate(model):  # other values than those of the run: they are all loaded
        model(batches(50))
    model, optimizer = accelerator.prepare(model, optimizer_of(model))
    accelerator.load_state(str(folder / "save_and_load_state_saved"))
    train(model, optimizer, range(2, 4))
    close(model.state_dict(), results["save_and_load_state"][0]["ends"][0])
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.parametrize(
    ("mistake", "message"),
    [
        ("apply_wrapped", "is wrapped in DistributedDataParallel"),
        ("apply_sharded", "is a DTensor: the model is sharded"),
        ("calibrate_wrapped", "needs the model that apply_daq returned"),
        ("calibrate_inside", "a DistributedDataParallel holds this model already"),
        ("calibrate_sharded", "cannot see through a sharded model"),
    ],
)
def test_mistakes_of_order_tell_the_order(ended, mistake, message):
    for rank in ended[1]["mistakes"]:
        assert message in rank[mistake]
        assert "apply_daq, calibrate, optimizer, then prepare or wrap" in rank[mistake]


def test_processes_that_train_without_averaging_are_told(ended):
    """Once: the other scenarios wrap or shard their models."""
    for rank in ended[1]["mistakes"]:
        assert len(rank["lonely"]) == 1
        assert rank["lonely"][0].startswith("2 processes train a VisionTransformer that nothing wraps")


def test_sharded_adapters_are_not_merged(ended):
    for rank in ended[1]["adapters"]:
        assert "open model and adapter in one process and merge there" in rank["merge"]


def test_saving_shards_tells_how_to_gather_them(ended):
    for rank in ended[1]["mistakes"]:
        assert "accelerator.get_state_dict(model)" in rank["save_shards"]
        assert "call health where one process opens that folder" in rank["health_of_shards"]


# ------------------------------------------------------------------------------- what changes numbers in one process


def half_precision(model, dtype, scaler=None):
    optimizer = optimizer_of(model)
    losses = []
    for step in range(STEPS):
        with torch.autocast("cpu", dtype):
            loss = nn.functional.cross_entropy(model.train()(batches(step)), targets(step))
        (scaler.scale(loss) if scaler else loss).backward()
        if scaler:
            scaler.step(optimizer)
            scaler.update()
        else:
            optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_mixed_precision_stays_near_float32(alone, dtype):
    model = calibrated_vit()
    scaler = torch.amp.GradScaler("cpu", init_scale=256.0) if dtype == torch.float16 else None
    half_precision(model, dtype, scaler)
    names = [name for name in alone[0] if name.endswith("_quant.upper")]
    state = model.state_dict()
    assert all(state[name].dtype == torch.float32 for name in names)
    close({name: state[name] for name in names}, {name: alone[-1][name] for name in names}, 0.05)
    if scaler:
        assert scaler.get_scale() == 256.0


def test_the_scaler_sees_an_overflow_in_a_quantizer_and_skips_the_step():
    model = calibrated_vit()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    scaler = torch.amp.GradScaler("cpu", init_scale=1e38)
    half_precision(model, torch.float16, scaler)
    equal(model.state_dict(), before)
    assert scaler.get_scale() < 1e38


AVERAGES = {
    "timm": lambda model: timm.utils.ModelEmaV3(model, decay=0.5),
    "torch": lambda model: AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.5)),
}


@pytest.mark.parametrize("kind", AVERAGES)
def test_an_average_of_weights_averages_the_quantizers_too(kind, tmp_path):
    model = calibrated_vit()
    average = AVERAGES[kind](model)
    update = average.update if kind == "timm" else average.update_parameters
    update(model)
    wanted = {name: parameter.clone() for name, parameter in model.named_parameters()}
    with torch.no_grad():
        average.module.eval()(batches(0))  # keeps its weights
    train(model, optimizer_of(model), range(1))
    update(model)
    wanted = {name: (value + model.get_parameter(name).detach()) / 2 for name, value in wanted.items()}
    for name, parameter in average.module.named_parameters():
        torch.testing.assert_close(parameter.detach(), wanted[name])
    other = copy.deepcopy(model).eval()
    other.load_state_dict(average.module.state_dict())
    with torch.no_grad():
        output = average.module.eval()(batches(0))
        assert torch.equal(output, other(batches(0)))
        assert not torch.equal(output, model.eval()(batches(0)))
        hf_daq.save_pretrained(average.module, tmp_path)
        assert torch.equal(output, hf_daq.from_pretrained(tmp_path)(batches(0)))
    hf_daq.remove_daq(average.module)
    assert quantized_layers(model)


def test_batch_normalization_is_synchronized_in_quantized_models_too():
    model = hf_daq.apply_daq(timm.create_model("test_resnet", num_classes=3), bits=3)
    synchronized = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    assert any(isinstance(module, nn.SyncBatchNorm) for module in synchronized.modules())
    assert len(quantized_layers(synchronized)) == len(synchronized.daq_config.layers)
    with hf_daq.calibrate(synchronized):
        synchronized(batches(0))
    assert synchronized.eval()(batches(0)).isfinite().all()


def test_channels_last_gives_the_same_gradients():
    results = []
    for memory_format in (torch.contiguous_format, torch.channels_last):
        torch.manual_seed(0)
        # In float64, where sums in another order move no value across a threshold.
        model = hf_daq.apply_daq(timm.create_model("test_resnet", num_classes=3).double(), bits=3)
        with hf_daq.calibrate(model.eval()):
            model(batches(0).double())
        model.to(memory_format=memory_format)
        model(batches(1).double().contiguous(memory_format=memory_format)).square().sum().backward()
        results.append({name: p.grad for name, p in model.named_parameters() if p.requires_grad})
    close(*results, 1e-3)


@pytest.mark.parametrize("backend", ["eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_the_whole_model_compiles_without_a_graph_break(alone, backend):
    torch._dynamo.reset()
    model = calibrated_vit()
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    optimizer = optimizer_of(model)
    train(compiled, optimizer)
    close(model.state_dict(), alone[-1], 1e-3)
