"""TRL's trainers on quantized models, and the recipe that uses them."""

import datasets
import instruction_tuning
import pytest
import torch
import transformers
from peft import LoraConfig
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
from trl import DPOConfig, DPOTrainer

import hf_daq
from hf_daq.nn.paths import bit_for_bit

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning", "ignore::UserWarning")
SMALL = "--max_steps", "4", "--save_steps", "2", "--batch_size", "2", "--max_length", "24", "--rank", "2"


@pytest.fixture(autouse=True)
def _quiet():
    transformers.logging.disable_progress_bar()
    datasets.disable_progress_bars()


def run(folder, *options):
    return instruction_tuning.main([*SMALL, "--output_dir", str(folder), *options])


@pytest.mark.slow
@pytest.mark.parametrize("train", ["adapters and bounds", "all"])
def test_a_run_that_was_stopped_ends_with_the_same_packed_model(tmp_path, train, monkeypatch):
    trainer = run(tmp_path / "whole", "--train", train)
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert trainer.state.global_step == 4
    assert len(losses) == 0 or losses[-1] > 0

    class StoppedError(Exception):
        pass

    def stop(self, args, state, control, **kwargs):
        if state.global_step == 3:
            raise StoppedError

    with monkeypatch.context() as patched:
        patched.setattr(transformers.trainer_callback.DefaultFlowCallback, "on_step_begin", stop, raising=False)
        with pytest.raises(StoppedError):
            run(tmp_path / "stopped", "--train", train)
    run(tmp_path / "stopped", "--train", train, "--resume")
    for file in (
        "packed/model.safetensors",
        f"run/checkpoint-4/{'' if train == 'all' else 'adapter_'}model.safetensors",
    ):
        whole, resumed = (load_file(tmp_path / name / file) for name in ("whole", "stopped"))
        assert whole.keys() == resumed.keys()
        assert not [name for name, value in whole.items() if not torch.equal(value, resumed[name])]
    assert hasattr(AutoModelForCausalLM.from_pretrained(tmp_path / "whole" / "packed"), "daq_config")


def test_adapters_train_on_the_packed_model_that_the_recipe_wrote(tmp_path):
    run(tmp_path / "first")
    before = load_file(tmp_path / "first" / "packed" / "model.safetensors")
    run(tmp_path / "second", "--model", str(tmp_path / "first" / "packed"), "--lr", "0.1")
    after = load_file(tmp_path / "second" / "packed" / "model.safetensors")
    assert before.keys() == after.keys()
    changed = [name for name in before if not torch.equal(before[name], after[name])]
    assert changed
    assert all(name.endswith("weight_codes") for name in changed)


def test_preference_optimization_trains_what_it_merges(tmp_path):
    args = instruction_tuning.parse([*SMALL])
    rows = instruction_tuning.read(args)
    model, tokenizer = instruction_tuning.build(args, rows)
    instruction_tuning.quantize(model, tokenizer, rows, args)
    pairs = [{"prompt": "What is it?", "chosen": text[:40], "rejected": text[40:80]} for text in rows["completion"][:8]]
    settings = {"max_steps": 2, "per_device_train_batch_size": 2, "max_length": 32, "learning_rate": 1e-2}
    config = DPOConfig(output_dir=str(tmp_path), bf16=False, report_to="none", save_strategy="no", **settings)
    lora = LoraConfig(r=2, target_modules="all-linear", init_lora_weights="daq", task_type="CAUSAL_LM")
    trainer = DPOTrainer(
        model,
        args=config,
        train_dataset=datasets.Dataset.from_list(pairs),
        processing_class=tokenizer,
        peft_config=lora,
    )
    trainer.train()
    tuned = trainer.model.eval()
    assert any(value.any() for name, value in tuned.named_parameters() if "lora_B" in name)
    tokens = tokenizer("What is it?", return_tensors="pt")["input_ids"]
    with torch.no_grad(), bit_for_bit():
        trained = tuned(tokens).logits
        merged = tuned.merge_and_unload()
        assert torch.equal(merged(tokens).logits, trained)
        hf_daq.save_pretrained(merged, tmp_path / "packed", packed=True)
        assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path / "packed")(tokens).logits, trained)
