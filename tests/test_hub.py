"""Models to the Hub and back, over a real connection to a Hub on loopback."""

import json
import logging
import os
import subprocess
import sys

import huggingface_hub
import pytest
import timm
import torch
from hub_server import LoopbackHub, connect, connected_hub  # noqa: F401
from models import images, small_net, small_timm
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from text_models import tiny_bert, tokens
from transformers import AutoModelForSequenceClassification, LlamaConfig, LlamaForCausalLM

import hf_daq
from hf_daq.errors import CheckpointError, HubError, ModelError
from hf_daq.files.header import read_header
from hf_daq.nn.layers import quantized_layers
from hf_daq.nn.packed import packed_layers
from hf_daq.nn.paths import bit_for_bit

REPO = "user/model"


def trained(name):
    """A small network after a step of training, and inputs for it."""
    torch.manual_seed(0)
    if name == "bert":
        model, batch = tiny_bert(), {"input_ids": tokens()}
    elif name == "llama":
        sizes = {"hidden_size": 32, "intermediate_size": 44, "num_hidden_layers": 2, "num_attention_heads": 4}
        model, batch = LlamaForCausalLM(LlamaConfig(vocab_size=100, **sizes)), {"input_ids": tokens()}
    else:
        model, batch = small_timm(name), images(4, 96 if "resnet" in name else 160)
    hf_daq.apply_daq(model, bits=3)
    with hf_daq.calibrate(model):
        run(model, batch)
    optimizer = torch.optim.SGD(hf_daq.param_groups(model.train(), lr=0.01))
    run(model, batch).square().mean().backward()
    optimizer.step()
    return model.eval(), batch


def run(model, batch):
    output = model(**batch) if isinstance(batch, dict) else model(batch)
    return output if isinstance(output, torch.Tensor) else output.logits


@pytest.fixture(scope="module")
def small():
    return trained("test_resnet")


LOADERS = {
    "test_resnet": "timm.create_model('hf-hub:' + repo, pretrained=True)",
    "test_vit": "timm.create_model('hf-hub:' + repo, pretrained=True)",
    "bert": "transformers.AutoModelForSequenceClassification.from_pretrained(repo)",
    "llama": "transformers.AutoModelForCausalLM.from_pretrained(repo)",
}
SCRIPT = """
import sys, torch, timm, transformers, hf_daq, hf_daq.nn.paths
from safetensors.torch import load_file, save_file
folder = sys.argv[1]
for name, load in {loaders}.items():
    inputs, outputs = load_file(f"{{folder}}/{{name}}-inputs.safetensors"), {{}}
    for repo in (f"user/{{name}}", f"user/{{name}}-packed"):
        for loader, model in (("own", load(repo)), ("hf_daq", hf_daq.from_pretrained(repo))):
            with torch.no_grad(), hf_daq.nn.paths.bit_for_bit():
                output = model.eval()(inputs["x"]) if "x" in inputs else model.eval()(**inputs).logits
            outputs[repo + loader] = output
    save_file(outputs, f"{{folder}}/{{name}}-outputs.safetensors")
"""


@pytest.mark.slow
def test_a_new_process_opens_them_by_name_with_the_same_outputs(hub, tmp_path):
    pushed = {name: trained(name) for name in LOADERS}
    for name, (model, batch) in pushed.items():
        hf_daq.push_to_hub(model, f"user/{name}")
        hf_daq.push_to_hub(model, f"user/{name}-packed", packed=True)
        save_file(batch if isinstance(batch, dict) else {"x": batch}, tmp_path / f"{name}-inputs.safetensors")
    loaders = "{" + ", ".join(f"{name!r}: lambda repo: {load}" for name, load in LOADERS.items()) + "}"
    command = [sys.executable, "-c", SCRIPT.format(loaders=loaders), str(tmp_path)]
    environment = os.environ | hub.environment(tmp_path / "home")
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-2000:]
    for name, (model, batch) in pushed.items():
        outputs = load_file(tmp_path / f"{name}-outputs.safetensors")
        assert len(outputs) == 4
        with torch.no_grad():
            assert all(torch.equal(output, run(model, batch)) for output in outputs.values())


def test_push_writes_weights_config_and_card_as_one_commit(hub, small):
    model, _ = small
    facts = hf_daq.CardFacts(
        base_model="timm/small", results=(hf_daq.Result("accuracy", 91.5, 92.0, "user/data", "test"),)
    )
    commit = hf_daq.push_to_hub(model, REPO, card=facts, private=True, commit_message="First")
    assert commit.commit_message == "First"
    assert {"README.md", "config.json", "model.safetensors"} <= hub.files(REPO).keys()
    assert huggingface_hub.HfApi().model_info(REPO).private
    card = huggingface_hub.ModelCard(hub.files(REPO)["README.md"].decode())
    assert card.data.base_model == "timm/small"
    assert card.data.eval_results[0].metric_value == 91.5
    assert 'timm.create_model("hf-hub:user/model", pretrained=True)' in card.text
    assert sum(method == "POST" and "/commit/" in path for method, path in hub.requests) == 1


def test_the_license_of_the_base_model_is_looked_up(hub, small):
    hub.put("timm/small", {"README.md": b"---\nlicense: mit\n---\n"})
    hf_daq.push_to_hub(small[0], REPO, card=hf_daq.CardFacts(base_model="timm/small"))
    assert huggingface_hub.ModelCard(hub.files(REPO)["README.md"].decode()).data.license == "mit"
    hf_daq.push_to_hub(small[0], "user/other", card=hf_daq.CardFacts(base_model="timm/unknown"))
    assert huggingface_hub.ModelCard(hub.files("user/other")["README.md"].decode()).data.license is None


def test_revision_and_pull_request(hub, small):
    model, batch = small
    hf_daq.push_to_hub(model, REPO, revision="w3")
    assert "model.safetensors" not in hub.files(REPO)
    assert "model.safetensors" in hub.files(REPO, "w3")
    for opened in (
        hf_daq.from_pretrained(REPO, revision="w3"),
        timm.create_model(f"hf-hub:{REPO}@w3", pretrained=True),
    ):
        assert torch.equal(run(opened.eval(), batch), run(model, batch))
    commit = hf_daq.push_to_hub(model, REPO, create_pr=True)
    assert commit.pr_num == 1
    assert "model.safetensors" not in hub.files(REPO)
    assert "model.safetensors" in hub.files(REPO, "refs/pr/1")


def test_packed_weights_take_the_place_of_shards(hub):
    model, _ = trained("bert")
    hf_daq.push_to_hub(model, REPO, max_shard_size="30KB")
    assert len([name for name in hub.files(REPO) if name.endswith(".safetensors")]) > 1
    assert len(hf_daq.from_pretrained(REPO).daq_config.layers) == len(quantized_layers(model))
    hf_daq.push_to_hub(model, REPO, packed=True)
    assert [name for name in hub.files(REPO) if "safetensors" in name] == ["model.safetensors"]
    assert packed_layers(AutoModelForSequenceClassification.from_pretrained(REPO))


def test_the_methods_of_transformers_push_the_same(hub, tmp_path):
    model, batch = trained("bert")
    model.push_to_hub("user/one", card=hf_daq.CardFacts(seed=3), private=True)
    model.save_pretrained(tmp_path / "two", push_to_hub=True, repo_id="user/two")
    for repo in ("user/one", "user/two"):
        assert {"README.md", "config.json", "model.safetensors"} <= hub.files(repo).keys()
        opened = AutoModelForSequenceClassification.from_pretrained(repo)
        assert torch.equal(run(opened, batch), run(model, batch))
    assert huggingface_hub.HfApi().model_info("user/one").private
    assert "| seed | 3 |" in hub.files("user/one")["README.md"].decode()
    assert "hf_daq" in model.model_tags
    model.add_model_tags("mine")
    hf_daq.remove_daq(model)
    assert model.model_tags == ["mine"]
    assert "push_to_hub" not in vars(model)


def test_save_pretrained_does_not_push(small, tmp_path):
    with pytest.raises(ModelError, match="write hf_daq.push_to_hub"):
        hf_daq.save_pretrained(small[0], tmp_path, push_to_hub=True)


def test_offline_the_cache_is_enough(hub, small, monkeypatch):
    model, batch = small
    hf_daq.push_to_hub(model, REPO)
    before = hf_daq.inspect(REPO)
    hf_daq.from_pretrained(REPO)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with bit_for_bit():
        assert torch.equal(run(hf_daq.from_pretrained(REPO), batch), run(model, batch))
    assert hf_daq.inspect(REPO).layers == before.layers
    for function in (hf_daq.from_pretrained, hf_daq.inspect):
        with pytest.raises(HubError, match="not in the cache, and the Hub was not reached"):
            function("user/another")


def test_local_files_only_and_cache_dir(hub, small, tmp_path):
    hf_daq.push_to_hub(small[0], REPO)
    with pytest.raises(HubError, match="not in the cache"):
        hf_daq.from_pretrained(REPO, local_files_only=True)
    hf_daq.from_pretrained(REPO, cache_dir=tmp_path / "cache")
    hf_daq.from_pretrained(REPO, cache_dir=tmp_path / "cache", local_files_only=True)


def test_weights_and_config_are_of_one_commit(hub, small):
    hf_daq.push_to_hub(small[0], REPO)
    first = huggingface_hub.HfApi().model_info(REPO).sha
    hf_daq.push_to_hub(small[0], REPO, packed=True)
    assert quantized_layers(hf_daq.from_pretrained(REPO, revision=first))
    assert packed_layers(hf_daq.from_pretrained(REPO))


# ----------------------------------------------------------------------------------------------------------- failures


def test_a_wrong_token_says_to_log_in(hub, small):
    with pytest.raises(HubError, match="does not know this token .*hf auth login"):
        hf_daq.push_to_hub(small[0], REPO, token="hf_wrong")


def test_a_foreign_namespace_says_what_to_do(hub, small):
    hub.put("somebody/model", {"README.md": b"---\nlicense: mit\n---\n"})
    with pytest.raises(HubError, match="may not write to somebody/model.*create_pr=True"):
        hf_daq.push_to_hub(small[0], "somebody/model")
    with pytest.raises(HubError, match="may not write to somebody/new"):
        hf_daq.push_to_hub(small[0], "somebody/new")


def test_a_pull_request_to_somebody_elses_repository(hub, small):
    hub.put("somebody/model", {"README.md": b"---\nlicense: mit\n---\n"})
    assert hf_daq.push_to_hub(small[0], "somebody/model", create_pr=True).pr_num == 1
    assert "model.safetensors" in hub.files("somebody/model", "refs/pr/1")


def test_an_interrupted_upload_changes_nothing(hub, small):
    model, batch = small
    hf_daq.push_to_hub(model, REPO)
    before = hub.files(REPO)
    hub.break_after(1000, times=6)  # as often as the client tries
    with pytest.raises(HubError, match="interrupted, and nothing in it has changed"):
        hf_daq.push_to_hub(model, REPO, packed=True)
    assert hub.files(REPO) == before
    hf_daq.push_to_hub(model, REPO, packed=True)
    with bit_for_bit():
        assert torch.equal(run(hf_daq.from_pretrained(REPO), batch), run(model, batch))


def test_a_hub_that_does_not_answer(hub, small):
    hub.stop()
    with pytest.raises(HubError, match="not reached"):
        hf_daq.push_to_hub(small[0], REPO)


def test_repositories_that_are_not_there_or_have_no_such_revision(hub, small):
    with pytest.raises(HubError, match="user/absent is not there, or is private"):
        hf_daq.from_pretrained("user/absent")
    hf_daq.push_to_hub(small[0], REPO)
    with pytest.raises(HubError, match="no such branch, tag or commit"):
        hf_daq.from_pretrained(REPO, revision="absent")
    with pytest.raises(HubError, match="no name of a repository"):
        hf_daq.push_to_hub(small[0], "user/two words")
    hub.put("somebody/gated", {"config.json": b"{}"}, gated=True)
    with pytest.raises(HubError, match="somebody/gated is gated: ask for access"):
        hf_daq.from_pretrained("somebody/gated")


@pytest.mark.parametrize(
    "files",
    [
        {"config.json": b'{"architecture": "resnet18"}'},
        {"config.json": b'{"model_type": "bert", "architectures": ["BertModel"]}'},
        {"config.json": b'{"model_type": "bert", "auto_map": {"AutoModel": "modeling.Evil"}}', "modeling.py": b"1 / 0"},
    ],
)
def test_a_repository_that_is_not_ours_is_refused_before_its_weights_are_fetched(hub, files):
    hub.put("somebody/float", files | {"model.safetensors": b"weights", "pytorch_model.bin": b"pickle"})
    with pytest.raises(CheckpointError, match="not a checkpoint of hf_daq"):
        hf_daq.from_pretrained("somebody/float")
    asked = {path.rsplit("/", 1)[-1] for _, path in hub.requests}
    assert not asked & {"model.safetensors", "pytorch_model.bin", "modeling.py"}


def test_a_repository_without_config(hub):
    hub.put("somebody/empty", {"README.md": b"---\nlicense: mit\n---\n"})
    with pytest.raises(CheckpointError, match="lacks a file"):
        hf_daq.from_pretrained("somebody/empty")


def test_no_code_of_a_repository_is_fetched(hub):
    model, batch = trained("bert")
    hf_daq.push_to_hub(model, REPO)
    config = json.loads(hub.files(REPO)["config.json"]) | {"auto_map": {"AutoModel": "modeling.Evil"}}
    hub.put(REPO, {"config.json": json.dumps(config).encode(), "modeling.py": b"1 / 0", "pytorch_model.bin": b"pickle"})
    opened = hf_daq.from_pretrained(REPO, trust_remote_code=True)
    assert torch.equal(run(opened, batch), run(model, batch))
    assert not {"modeling.py", "pytorch_model.bin"} & {path.rsplit("/", 1)[-1] for _, path in hub.requests}


@pytest.mark.parametrize(
    "change", [{"attn_implementation": "somebody/kernel"}, {"text_config": {"_attn_implementation": "a/b:c"}}]
)
def test_a_config_cannot_ask_for_code_of_a_repository(hub, change):
    model, _ = trained("bert")
    hf_daq.push_to_hub(model, REPO)
    hub.put(REPO, {"config.json": json.dumps(json.loads(hub.files(REPO)["config.json"]) | change).encode()})
    with pytest.raises(CheckpointError, match="code of a repository is not run"):
        hf_daq.from_pretrained(REPO)


@pytest.mark.parametrize("name", ["test_resnet", "bert"])
def test_a_file_that_does_not_match_its_metadata(hub, tmp_path, name):
    model, _ = trained(name)
    hf_daq.push_to_hub(model, REPO)
    text = hub.files(REPO)["config.json"].decode().replace('"weight_bits": 3', '"weight_bits": 4')
    hub.put(REPO, {"config.json": text.encode()})
    with pytest.raises(CheckpointError, match="disagree about the quantization config"):
        hf_daq.from_pretrained(REPO)


def test_a_damaged_download(hub, small, monkeypatch):
    hf_daq.push_to_hub(small[0], REPO)
    content = bytearray(hub.files(REPO)["model.safetensors"])
    content[8:40] = bytes(32)
    hub.tamper(REPO, "model.safetensors", bytes(content))
    with pytest.raises(CheckpointError, match="not a whole safetensors file"):
        hf_daq.from_pretrained(REPO)


# --------------------------------------------------------------------------------------------------------------- card


def test_a_card_that_was_edited_on_the_hub_is_kept(hub, small, caplog):
    hf_daq.push_to_hub(small[0], REPO)
    edited = hub.files(REPO)["README.md"].replace(b"# model", b"# My model")
    hub.put(REPO, {"README.md": edited})
    with caplog.at_level(logging.WARNING, "hf_daq"):
        hf_daq.push_to_hub(small[0], REPO, packed=True)
    assert "the model card of user/model was edited, so it is not replaced" in caplog.text
    assert hub.files(REPO)["README.md"] == edited
    hf_daq.push_to_hub(small[0], REPO, packed=True, overwrite_card=True)
    assert b"# My model" not in hub.files(REPO)["README.md"]


def test_a_generated_card_follows_the_model(hub, small):
    hf_daq.push_to_hub(small[0], REPO)
    first = hub.files(REPO)["README.md"].decode()
    hf_daq.push_to_hub(small[0], REPO, packed=True)
    second = hub.files(REPO)["README.md"].decode()
    assert "for inference" in second
    assert "for inference" not in first


def test_training_leftovers_stay_here(hub, small, tmp_path):
    from hf_daq.files.push import push_folder

    hf_daq.save_pretrained(small[0], tmp_path)
    for name in ("optimizer.pt", "training_args.bin", "trainer_state.json", ".secret"):
        (tmp_path / name).write_bytes(b"x")
    (tmp_path / "checkpoint-5").mkdir()
    (tmp_path / "checkpoint-5" / "model.safetensors").write_bytes(b"x")
    (tmp_path / "tokenizer.json").write_text("{}")
    push_folder(tmp_path, REPO)
    names = hub.files(REPO).keys() - {".gitattributes"}
    assert names == {"README.md", "config.json", "model.safetensors", "tokenizer.json"}


def test_facts_are_in_the_header_and_survive_the_round_trip(hub, small, tmp_path):
    facts = hf_daq.CardFacts(
        base_model="timm/small",
        license="mit",
        datasets=("user/data",),
        calibration="512 images",
        results=(hf_daq.Result("accuracy", 90.0),),
        command="python train.py",
        recipe={"lr": 0.1, "steps": [1, 2]},
        seed=0,
        versions={"torch": "2"},
    )
    hf_daq.save_pretrained(small[0], tmp_path, card=facts)
    assert read_header(tmp_path / "model.safetensors").facts == facts
    model, _ = trained("bert")
    hf_daq.save_pretrained(model, tmp_path / "bert", card=facts)
    with safe_open(tmp_path / "bert" / "model.safetensors", "pt") as file:
        assert json.loads(file.metadata()["hf_daq"])["card"] == facts.to_dict()


def test_a_module_of_neither_library_can_be_pushed(hub):
    model = small_net()
    hf_daq.apply_daq(model, bits=4)
    with hf_daq.calibrate(model):
        model(images())
    hf_daq.push_to_hub(model, REPO)
    opened = hf_daq.from_pretrained(REPO, model=small_net(seed=1))
    assert torch.equal(opened(images()), model.eval()(images()))
