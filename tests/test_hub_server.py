"""The Hub of the tests answers the real client as the Hub does: what these tests show, other tests may rely on."""

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
from hub_server import LoopbackHub, connect, connected_hub  # noqa: F401
from huggingface_hub import (
    CommitOperationAdd,
    CommitOperationDelete,
    HfApi,
    ModelCard,
    get_session,
    hf_hub_download,
    model_info,
    snapshot_download,
    try_to_load_from_cache,
)
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from models import images, small_timm
from safetensors.torch import load_file, save
from text_models import logits, tiny_bert
from transformers import BertForSequenceClassification

REPO = "user/model"
WEIGHTS = save({"weight": torch.arange(6.0).reshape(2, 3), "bias": torch.zeros(2)})
CARD = b"---\nlicense: mit\nlibrary_name: timm\ntags:\n- small\n---\n# A model\n"


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "folder" / "more").mkdir(parents=True)
    files = {"README.md": CARD, "config.json": b"{}", "model.safetensors": WEIGHTS, "more/notes.txt": "größe".encode()}
    for name, content in files.items():
        (tmp_path / "folder" / name).write_bytes(content)
    return tmp_path / "folder", files


def uploaded(folder, **kwargs):
    api = HfApi()
    api.create_repo(REPO)
    return api.upload_folder(repo_id=REPO, folder_path=folder[0], **kwargs)


def in_new_process(hub, home, code, **environment):
    environment = os.environ | hub.environment(home) | environment
    return subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=60)


def status(error):
    return error.value.response.status_code


def test_upload_and_download(hub, folder):
    commit = uploaded(folder)
    files = hub.files(REPO)
    assert files.pop(".gitattributes")
    assert files == folder[1]
    assert commit.oid == HfApi().repo_info(REPO).sha
    assert Path(hf_hub_download(REPO, "model.safetensors")).read_bytes() == WEIGHTS
    assert (
        Path(hf_hub_download(REPO, "more/notes.txt", revision=commit.oid)).read_bytes() == folder[1]["more/notes.txt"]
    )
    sent = [path for method, path in hub.requests if method == "PUT"]
    assert sent == [f"/storage/{REPO}/{hashlib.sha256(WEIGHTS).hexdigest()}"], "only the weights go to LFS"
    stored = Path(hf_hub_download(REPO, "config.json")).resolve().name
    assert stored == hashlib.sha1(b"blob 2\0{}").hexdigest(), "the hash of git"


def test_same_files_again_make_no_commit(hub, folder):
    first = uploaded(folder)
    hub.requests.clear()
    again = HfApi().upload_folder(repo_id=REPO, folder_path=folder[0])
    assert again.oid == first.oid
    assert not [path for method, path in hub.requests if method == "PUT" or "/commit/" in path]


def test_info_tree_and_card(hub, folder):
    commit = uploaded(folder)
    info = model_info(REPO)
    assert (info.sha, info.private, info.library_name, info.card_data.license) == (commit.oid, False, "timm", "mit")
    assert info.tags == ["timm", "small", "license:mit"]
    assert {one.rfilename for one in info.siblings} == {".gitattributes", *folder[1]}
    sizes = {one.rfilename: one.size for one in model_info(REPO, files_metadata=True).siblings}
    assert sizes["model.safetensors"] == len(WEIGHTS)
    tree = {one.path: one for one in HfApi().list_repo_tree(REPO, recursive=True)}
    assert tree.keys() == {".gitattributes", "more", *folder[1]}
    assert tree["model.safetensors"].lfs.sha256 == hashlib.sha256(WEIGHTS).hexdigest()
    assert "more/notes.txt" not in {one.path for one in HfApi().list_repo_tree(REPO)}
    assert [one.path for one in HfApi().list_repo_tree(REPO, "more")] == ["more/notes.txt"]
    assert [one.size for one in HfApi().get_paths_info(REPO, ["config.json", "absent"])] == [2]
    assert ModelCard.load(REPO).data.tags == ["small"]


def test_snapshot_takes_only_what_is_asked_for(hub, folder):
    uploaded(folder)
    hub.requests.clear()
    path = Path(snapshot_download(REPO, allow_patterns=["*.json"]))
    assert [file.name for file in path.rglob("*") if file.is_file()] == ["config.json"]
    assert not [path for _, path in hub.requests if "safetensors" in path]


def test_branches_commits_and_deletions(hub):
    first = hub.put(REPO, {"a.txt": b"1", "b.txt": b"1"})
    api = HfApi()
    api.create_branch(REPO, branch="side/way")
    api.create_branch(REPO, branch="side/way", exist_ok=True)
    with pytest.raises(HfHubHTTPError, match="Reference already exists"):
        api.create_branch(REPO, branch="side/way")
    changes = [CommitOperationAdd("a.txt", b"2"), CommitOperationDelete("b.txt")]
    api.create_commit(REPO, changes, commit_message="change", revision="side/way", parent_commit=first)
    assert hub.files(REPO, "side/way")["a.txt"] == b"2"
    assert "b.txt" not in hub.files(REPO, "side/way")
    assert hub.files(REPO)["a.txt"] == hub.files(REPO, first)["b.txt"] == b"1"
    with pytest.raises(HfHubHTTPError, match="A commit has happened since") as error:
        changes = [CommitOperationAdd("a.txt", b"3")]
        api.create_commit(REPO, changes, commit_message="late", revision="side/way", parent_commit=first)
    assert status(error) == 412
    with pytest.raises(RemoteEntryNotFoundError, match="doesn't exist"):
        api.create_commit(REPO, [CommitOperationDelete("absent")], commit_message="nothing")
    assert [one.name for one in api.list_repo_refs(REPO).branches] == ["main", "side/way"]
    assert Path(hf_hub_download(REPO, "a.txt", revision="side/way")).read_bytes() == b"2"


def test_pull_request(hub, folder):
    hub.put(REPO, {"old.txt": b"old"})
    before = hub.files(REPO)
    commit = HfApi().upload_folder(repo_id=REPO, folder_path=folder[0], create_pr=True)
    assert (commit.pr_num, commit.pr_revision) == (1, "refs/pr/1")
    assert hub.files(REPO) == before
    assert hub.files(REPO, "refs/pr/1") == before | folder[1]
    assert Path(hf_hub_download(REPO, "model.safetensors", revision="refs/pr/1")).read_bytes() == WEIGHTS
    requests = HfApi().list_repo_refs(REPO, include_pull_requests=True).pull_requests
    assert [(one.ref, one.target_commit) for one in requests] == [("refs/pr/1", commit.oid)]


def test_foreign_namespaces_take_pull_requests_only(hub, folder):
    hub.put("other/model", {"old.txt": b"old"})
    with pytest.raises(HfHubHTTPError, match='under the namespace "other"') as error:
        HfApi().create_repo("other/new")
    assert status(error) == 403
    assert HfApi().create_repo("other/model", exist_ok=True).repo_id == "other/model"
    with pytest.raises(HfHubHTTPError, match="pass `create_pr=1`") as error:
        HfApi().upload_folder(repo_id="other/model", folder_path=folder[0])
    assert status(error) == 403
    assert HfApi().upload_folder(repo_id="other/model", folder_path=folder[0], create_pr=True).pr_num == 1
    assert "config.json" not in hub.files("other/model")


def test_tokens(hub):
    assert HfApi().whoami()["name"] == "user"
    hub.put(REPO, {"a.txt": b"1"}, private=True)
    hub.put("other/secret", {"a.txt": b"1"}, private=True)
    hub.put("other/gated", {"a.txt": b"1"}, gated=True)
    assert Path(hf_hub_download(REPO, "a.txt")).exists()
    with pytest.raises(HfHubHTTPError, match="Invalid user token"):
        HfApi(token="hf_wrong").whoami()
    with pytest.raises(HfHubHTTPError, match="Invalid credentials"):
        hf_hub_download("other/gated", "a.txt", token="hf_wrong")
    with pytest.raises(RepositoryNotFoundError, match="401"):
        model_info(REPO, token=False)
    with pytest.raises(RepositoryNotFoundError, match="404"):
        hf_hub_download("other/secret", "a.txt")
    with pytest.raises(GatedRepoError, match="403"):
        hf_hub_download("other/gated", "a.txt")
    with pytest.raises(HfHubHTTPError, match="401"):
        HfApi(token=False).create_repo("user/new")


def test_creating_twice(hub):
    url = HfApi().create_repo("model", private=True)
    assert (url.repo_id, url) == (REPO, f"{hub.endpoint}/{REPO}")
    assert model_info(REPO).private
    assert HfApi().create_repo(REPO, exist_ok=True) == url
    with pytest.raises(HfHubHTTPError, match="You already created this model repo") as error:
        HfApi().create_repo(REPO)
    assert status(error) == 409


def test_what_is_missing(hub):
    commit = hub.put(REPO, {"a.txt": b"1"})
    with pytest.raises(RepositoryNotFoundError, match="Repository Not Found"):
        hf_hub_download("user/absent", "a.txt")
    with pytest.raises(RevisionNotFoundError, match="Revision Not Found"):
        hf_hub_download(REPO, "a.txt", revision="absent")
    with pytest.raises(RevisionNotFoundError, match="Revision Not Found"):
        snapshot_download(REPO, revision="absent")
    with pytest.raises(RemoteEntryNotFoundError, match="Entry Not Found"):
        hf_hub_download(REPO, "absent.txt")
    assert try_to_load_from_cache(REPO, "absent.txt", revision=commit) is not None, "kept as known to be absent"
    assert HfApi().file_exists(REPO, "a.txt")
    assert not HfApi().file_exists(REPO, "absent.txt")
    assert not HfApi().repo_exists("absent")


@pytest.mark.parametrize(
    ("card", "message"),
    [
        (b"---\ntags: [a\n---\n", "YAML"),
        (b"---\n- a\n---\n", "mapping"),
        (b"---\ntags: small\n---\n", "tags"),
        (b"---\nlicense: 3\n---\n", "license"),
        (b"---\nmodel-index: [{name: a}]\n---\n", "model-index"),
    ],
)
def test_metadata_of_cards_is_checked(hub, card, message):
    hub.put(REPO, {})
    with pytest.raises(ValueError, match=f"Invalid metadata(.|\n)*{message}"):
        HfApi().upload_file(path_or_fileobj=card, path_in_repo="README.md", repo_id=REPO)
    assert "README.md" not in hub.files(REPO)
    change = {"path": "README.md", "content": "LS0tCi0gYQotLS0K"}  # base64 of the second card
    lines = [{"key": "header", "value": {"summary": "direct"}}, {"key": "file", "value": change}]
    direct = get_session().post(
        f"{hub.endpoint}/api/models/{REPO}/commit/main",
        content="\n".join(json.dumps(line) for line in lines),
        headers={"Authorization": f"Bearer {hub.token}"},
    )
    assert direct.status_code == 400


def test_empty_metadata_warns(hub):
    hub.put(REPO, {})
    with pytest.warns(UserWarning, match="empty or missing yaml metadata"):
        HfApi().upload_file(path_or_fileobj=b"# A model", path_in_repo="README.md", repo_id=REPO)


def test_cut_upload_changes_nothing_and_can_be_repeated(hub, folder):
    hub.put(REPO, {"old.txt": b"old"})
    before = hub.files(REPO)
    hub.break_after(50, times=6)
    with pytest.raises(RuntimeError, match=r"Error while uploading 'model\.safetensors'"):
        HfApi().upload_folder(repo_id=REPO, folder_path=folder[0])
    assert hub.files(REPO) == before
    assert not hub.repositories[REPO].objects
    hub.break_after(50)  # the client goes on by itself after one cut
    HfApi().upload_folder(repo_id=REPO, folder_path=folder[0])
    assert hub.files(REPO) == before | folder[1]
    assert len([path for method, path in hub.requests if method == "PUT"]) == 6 + 2


def test_an_upload_in_chunks_and_wrong_objects(hub):
    hub.put(REPO, {})
    oid = hashlib.sha256(WEIGHTS).hexdigest()
    signature = hub.sign(REPO, oid, len(WEIGHTS))
    url = f"{hub.endpoint}/storage/{REPO}/{oid}?size={len(WEIGHTS)}&signature="
    assert get_session().put(url + "0" * 64, content=WEIGHTS).status_code == 403
    assert get_session().put(url + signature, content=WEIGHTS[:-1] + b"?").status_code == 400
    assert get_session().put(url + signature, content=WEIGHTS[:-1]).status_code == 400
    assert not hub.repositories[REPO].objects
    assert get_session().put(url + signature, content=iter([WEIGHTS[:9], WEIGHTS[9:]])).status_code == 200
    assert hub.repositories[REPO].objects == {oid: WEIGHTS}


def test_failures_on_demand(hub, folder):
    hub.put(REPO, {"a.txt": b"1"})
    hub.fail(503, times=2, path="preupload")
    HfApi().upload_folder(repo_id=REPO, folder_path=folder[0])
    assert len([path for _, path in hub.requests if "preupload" in path]) == 3
    hub.fail(500, path=r"/commit/main$")
    with pytest.raises(HfHubHTTPError, match="500") as error:
        HfApi().upload_file(path_or_fileobj=b"2", path_in_repo="a.txt", repo_id=REPO)
    assert status(error) == 500
    assert hub.files(REPO)["a.txt"] == b"1"


def test_tampered_downloads(hub):
    hub.put(REPO, {"short.safetensors": WEIGHTS, "other.safetensors": WEIGHTS + b"\n"})
    hub.tamper(REPO, "short.safetensors", WEIGHTS[:-1])
    with pytest.raises(OSError, match="Consistency check failed"):
        hf_hub_download(REPO, "short.safetensors")
    hub.tamper(REPO, "other.safetensors", b"?" + WEIGHTS)
    assert Path(hf_hub_download(REPO, "other.safetensors")).read_bytes() == b"?" + WEIGHTS


def test_ranges(hub):
    hub.put(REPO, {"model.safetensors": WEIGHTS})
    metadata = HfApi().get_safetensors_metadata(REPO)
    tensors = metadata.files_metadata["model.safetensors"].tensors
    assert {name: tensor.shape for name, tensor in tensors.items()} == {"weight": [2, 3], "bias": [2]}
    url, token = f"{hub.endpoint}/{REPO}/resolve/main/model.safetensors", {"Authorization": f"Bearer {hub.token}"}
    for asked, expected in {"2-5": WEIGHTS[2:6], "90-": WEIGHTS[90:], "-7": WEIGHTS[-7:], "0-99999": WEIGHTS}.items():
        answer = get_session().get(url, headers=token | {"Range": f"bytes={asked}"})
        assert (answer.status_code, answer.content) == (206, expected)
    assert answer.headers["Content-Range"] == f"bytes 0-{len(WEIGHTS) - 1}/{len(WEIGHTS)}"
    assert get_session().get(url, headers=token | {"Range": "bytes=99999-"}).status_code == 416
    head = get_session().head(url, headers=token)
    assert (head.headers["Content-Length"], head.headers["X-Linked-Size"]) == (str(len(WEIGHTS)),) * 2


def test_offline_from_the_cache_of_another_process(hub, folder, tmp_path):
    uploaded(folder)
    load = f"import huggingface_hub; print(huggingface_hub.snapshot_download('{REPO}'))"
    online = in_new_process(hub, tmp_path / "other", load)
    assert online.returncode == 0, online.stderr
    assert (Path(online.stdout.strip()) / "model.safetensors").read_bytes() == WEIGHTS
    hub.requests.clear()
    offline = in_new_process(hub, tmp_path / "other", load, HF_HUB_OFFLINE="1")
    assert offline.stdout == online.stdout, offline.stderr
    empty = in_new_process(hub, tmp_path / "empty", load, HF_HUB_OFFLINE="1")
    assert "LocalEntryNotFoundError" in empty.stderr
    assert not hub.requests


def test_a_hub_that_cannot_be_reached(hub):
    hub.put(REPO, {"a.txt": b"1", "b.txt": b"2"})
    found = hf_hub_download(REPO, "a.txt")
    hub.stop()
    assert hf_hub_download(REPO, "a.txt") == found
    with pytest.raises(LocalEntryNotFoundError, match="check your connection"):
        hf_hub_download(REPO, "b.txt")
    with LoopbackHub() as other:
        assert other.endpoint != hub.endpoint
        assert not other.repositories


def test_timm_by_name(hub, tmp_path):
    model = small_timm()
    timm.models.save_for_hf(model, tmp_path / "timm", safe_serialization=True)
    HfApi().create_repo(REPO)
    HfApi().upload_folder(repo_id=REPO, folder_path=tmp_path / "timm")
    with torch.no_grad():
        expected = model(images(size=32))
        found = timm.create_model(f"hf-hub:{REPO}", pretrained=True).eval()(images(size=32))
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_timm_pushes(hub):
    model = small_timm()
    timm.models.push_to_hf_hub(model, REPO, safe_serialization=True, model_card={"license": "mit"})
    assert hub.files(REPO).keys() == {".gitattributes", "README.md", "config.json", "model.safetensors"}
    assert model_info(REPO).tags[:2] == ["timm", "image-classification"]


def test_transformers_by_name(hub, tmp_path, monkeypatch):
    model = tiny_bert()
    model.push_to_hub(REPO, tags=["small"])
    files = hub.files(REPO)
    assert files.keys() == {".gitattributes", "README.md", "config.json", "model.safetensors"}
    assert model_info(REPO).library_name == "transformers"
    found = BertForSequenceClassification.from_pretrained(REPO).eval()
    torch.testing.assert_close(logits(found), logits(model), rtol=0, atol=0)
    connect(hub, tmp_path / "second", monkeypatch)
    model.push_to_hub(REPO, revision="side")
    weights = hf_hub_download(REPO, "model.safetensors", revision="side")
    assert str(tmp_path / "second") in weights
    assert load_file(weights).keys() == model.state_dict().keys()
