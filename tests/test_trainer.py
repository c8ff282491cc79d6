"""transformers' Trainer on quantized models: training, saving, exact resume, the best model, and LoRA on top."""

import dataclasses

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file
from text_models import CONFIG, calibrated, logits, same_state, tiny_bert
from trainers import arguments, trainer_of
from transformers import AutoModelForSequenceClassification, Trainer, TrainingArguments

import hf_daq
from hf_daq.errors import CalibrationError, ConfigError, ModelError
from hf_daq.nn.layers import quantized_layers


@pytest.fixture(autouse=True)
def _quiet():
    transformers.logging.disable_progress_bar()


def test_train_save_and_reload_bit_exact(tmp_path):
    model = calibrated(tiny_bert())
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    trainer = trainer_of(model, arguments(tmp_path))
    trainer.train()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and "key.bias" not in name:  # softmax does not see it
            assert not torch.equal(parameter, before[name]), name
    trainer.save_model(tmp_path / "out")
    loaded, info = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info.values())
    same_state(loaded, model)
    assert torch.equal(logits(loaded), logits(model))
    trainer_of(loaded, arguments(tmp_path / "more")).train()
    assert not torch.equal(logits(loaded), logits(model))


def test_quantizer_parameters_have_their_own_rate_and_no_decay(tmp_path):
    model = calibrated(tiny_bert())
    args = arguments(tmp_path, optim="adamw_torch", adam_beta1=0.8)
    trainer = trainer_of(model, args)
    trainer.create_optimizer()
    groups = {group["name"]: group for group in trainer.optimizer.param_groups}
    assert type(trainer.optimizer) is torch.optim.AdamW
    assert groups["quantizer"]["lr"] == 1e-2
    assert groups["quantizer"]["weight_decay"] == groups["no_decay"]["weight_decay"] == 0
    assert groups["decay"]["lr"] == groups["no_decay"]["lr"] == 1e-3
    assert groups["decay"]["weight_decay"] == 0.1
    assert {group["betas"] for group in groups.values()} == {(0.8, 0.999)}
    learned = {id(parameter) for parameter in groups["quantizer"]["params"]}
    assert learned == {id(p) for name, p in model.named_parameters() if "_quant." in name and p.requires_grad}
    args.learning_rate = 1e-4
    trainer = Trainer(model=model, args=args, optimizer_cls_and_kwargs=hf_daq.trainer_optimizer(args))
    rates = {group["name"]: group["lr"] for group in trainer.create_optimizer().param_groups}
    assert rates == {"decay": 1e-4, "no_decay": 1e-4, "quantizer": 1e-3}


def test_optimizers_that_choose_their_parameters_are_refused(tmp_path, monkeypatch):
    trainer = trainer_of(calibrated(tiny_bert()), arguments(tmp_path))
    monkeypatch.setattr(Trainer, "get_optimizer_cls_and_kwargs", staticmethod(lambda args: (lambda: None, {})))
    with pytest.raises(ConfigError, match="take one such as 'adamw_torch'"):
        trainer.create_optimizer()


def test_training_before_calibration_is_an_error(tmp_path):
    with pytest.raises(CalibrationError, match="the order is: apply_daq, then calibrate"):
        trainer_of(hf_daq.apply_daq(tiny_bert(), CONFIG), arguments(tmp_path)).train()


def test_a_resumed_run_equals_the_uninterrupted_one(tmp_path):
    args = {"save_strategy": "steps", "save_steps": 3, "max_steps": 6}
    whole = trainer_of(calibrated(tiny_bert()), arguments(tmp_path / "whole", **args))
    whole.train()
    resumed = trainer_of(calibrated(tiny_bert()), arguments(tmp_path / "whole", **args))
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3"))
    same_state(whole.model, resumed.model)


def test_the_best_model_is_loaded_at_the_end(tmp_path):
    steps = {"eval_strategy": "steps", "save_strategy": "steps", "eval_steps": 1, "save_steps": 1, "max_steps": 5}
    args = arguments(tmp_path, load_best_model_at_end=True, learning_rate=0.3, **steps)
    trainer = trainer_of(calibrated(tiny_bert()), args)
    trainer.train()
    assert trainer.state.best_model_checkpoint
    assert not trainer.state.best_model_checkpoint.endswith("-5")
    best = load_file(f"{trainer.state.best_model_checkpoint}/model.safetensors")
    assert all(torch.equal(tensor, best[name]) for name, tensor in trainer.model.state_dict().items())
    reopened = AutoModelForSequenceClassification.from_pretrained(trainer.state.best_model_checkpoint)
    assert torch.equal(logits(reopened), logits(trainer.model))


def test_gradient_checkpointing_changes_nothing(tmp_path):
    models = []
    known = {field.name for field in dataclasses.fields(TrainingArguments)}
    name = "activation_checkpointing" if "activation_checkpointing" in known else "gradient_checkpointing"
    for number, options in enumerate(({}, {name: True})):
        model = calibrated(tiny_bert(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0))
        trainer_of(model, arguments(tmp_path / str(number), **options)).train()
        models.append(model)
    assert models[1].bert.encoder.layer[0].gradient_checkpointing
    for name, parameter in models[0].named_parameters():
        torch.testing.assert_close(parameter, models[1].get_parameter(name), rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_torch_compile(tmp_path):
    models = []
    for number, options in enumerate(({}, {"torch_compile": True})):
        model = calibrated(tiny_bert(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0))
        trainer_of(model, arguments(tmp_path / str(number), max_steps=2, **options)).train()
        models.append(model)
    for name, parameter in models[0].named_parameters():
        torch.testing.assert_close(parameter, models[1].get_parameter(name), rtol=1e-2, atol=2e-3)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # in peft
def test_lora_on_a_quantized_model(tmp_path):
    """The adapters learn, what is under them stays as it was, and adapters are saved without it."""
    peft = pytest.importorskip("peft")
    base = calibrated(tiny_bert())
    before = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    expected = logits(base)
    model = peft.get_peft_model(
        base, peft.LoraConfig(task_type="SEQ_CLS", r=2, target_modules=["query", "value"], lora_dropout=0.0)
    )
    assert torch.equal(logits(model), expected)
    assert len(quantized_layers(model)) == 13
    trainer = trainer_of(model, arguments(tmp_path, learning_rate=1e-2, max_steps=10))
    trainer.train()
    assert "quantizer" not in {group["name"] for group in trainer.optimizer.param_groups}
    trained = logits(model)
    assert not torch.equal(trained, expected)
    query = base.bert.encoder.layer[0].attention.self.query.base_layer
    assert torch.equal(query.weight, before["bert.encoder.layer.0.attention.self.query.weight"])
    assert torch.equal(query.w_quant.scale, before["bert.encoder.layer.0.attention.self.query.w_quant.scale"])
    trainer.save_model(tmp_path / "adapter")
    again = calibrated(tiny_bert())
    assert torch.equal(logits(peft.PeftModel.from_pretrained(again, tmp_path / "adapter")), trained)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # in peft
def test_a_packed_model_trains_adapters_alone(tmp_path):
    model = hf_daq.pack(calibrated(tiny_bert()))
    with pytest.raises(ValueError, match="Please attach trainable adapters on top of the quantized model"):
        trainer_of(model, arguments(tmp_path))
    with pytest.raises(ModelError, match="or takes adapters: peft.get_peft_model"):
        hf_daq.param_groups(model, lr=1e-3)
    before = logits(model)
    for how in ("daq", True):
        config = peft.LoraConfig(r=2, target_modules=["query", "dense"], init_lora_weights=how)
        adapted = peft.get_peft_model(model, config)
        trainer_of(adapted, arguments(tmp_path, learning_rate=0.3, max_steps=4)).train()  # from the middle of cells
        assert not torch.equal(logits(adapted), before)
        model = adapted.unload()
        assert torch.equal(logits(model), before)
