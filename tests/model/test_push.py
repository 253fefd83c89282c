"""Pushing an export to a Hub on this machine, and loading it from there with every library."""

import hashlib
import json
import os
import subprocess
import sys

import pytest
import torch

from tests.model.loopback_hub import TOKEN, loopback_hub
from tests.model.tiny import inputs, siglip, tiny
from vlp import export
from vlp.push import PushError, push

REPO = "someone/tiny"


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    folder = tmp_path_factory.mktemp("push") / "tiny"
    export.export(tiny(), folder)
    return folder


@pytest.fixture
def hub(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setenv("HF_HUB_DISABLE_XET", "1")  # for the processes that load; here it was read at import:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)
    with loopback_hub() as running:
        yield running


def quickly(folder, hub, **keys):
    said = []
    return push(folder, REPO, endpoint=hub.url, wait_s=0.01, say=said.append, **keys), said


def test_all_files_arrive_in_one_commit_and_a_second_push_changes_nothing(exported, hub):
    address, _ = quickly(exported, hub)
    assert address == f"{hub.url}/{REPO}/commit/1"
    there = {path: data for path, data in hub.repos[REPO].items() if path != ".gitattributes"}
    assert there == {str(p.relative_to(exported)): p.read_bytes() for p in exported.rglob("*") if p.is_file()}
    _, said = quickly(exported, hub)
    assert said == [f"{REPO} holds this model already"] and len(hub.uploads) == 2


def test_a_dropped_connection_is_resumed(exported, hub, monkeypatch):
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    hub.drop = 100  # huggingface_hub itself tries each upload several times
    with pytest.raises(PushError, match="Nothing was published; run the same command again"):
        quickly(exported, hub, attempts=1)
    assert set(hub.repos[REPO]) == {".gitattributes"}
    hub.drop = 8  # more than one attempt of ours; huggingface_hub makes several of its own in each
    arrived = (exported / "open_clip_model.safetensors").read_bytes()
    hub.blobs[hashlib.sha256(arrived).hexdigest()] = arrived  # before the connection was lost
    _, said = quickly(exported, hub)
    assert len(hub.uploads) == 1 and "README.md" in hub.repos[REPO]
    assert said and all(line.startswith("upload interrupted") for line in said)


def test_without_rights(exported, hub, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_someoneelsestoken")
    with pytest.raises(PushError, match="no right to write someone/tiny") as caught:
        quickly(exported, hub)
    assert "hf_someone" not in str(caught.value) and REPO not in hub.repos


def test_other_content_is_not_replaced_unless_asked(exported, hub):
    hub.repos[REPO] = {".gitattributes": b"", "their.txt": b"precious", "README.md": b"theirs"}
    with pytest.raises(PushError, match=r"exists with other content \(README.md, their.txt"):
        quickly(exported, hub)
    assert hub.repos[REPO]["their.txt"] == b"precious"
    quickly(exported, hub, overwrite=True)
    assert "their.txt" not in hub.repos[REPO] and hub.repos[REPO]["README.md"] == (exported / "README.md").read_bytes()


@pytest.mark.parametrize("name", ["a/b/c", "with space/x", "-bad-"])
def test_a_bad_name(exported, hub, name):
    with pytest.raises(PushError, match="is no name of a repository"):
        push(exported, name, endpoint=hub.url)


def test_a_folder_that_is_no_export(tmp_path, hub):
    with pytest.raises(PushError, match="run vlp export first"):
        push(tmp_path, REPO, endpoint=hub.url)


def test_nobody_listens(exported):
    with pytest.raises(PushError, match="failed"):
        push(exported, REPO, endpoint="http://127.0.0.1:9", attempts=1)


LOADED = """
import json, sys
import torch
data = torch.load(sys.argv[1])
from vlp import config, schema
from vlp.model import build, load
import open_clip
from transformers import AutoModel, AutoProcessor
with torch.no_grad():
    found = [load("hf-hub:someone/tiny").eval()(data["pixels"], data["ids"])[:2]]
    tower = {"name": "open_clip", "architecture": "hf-hub:someone/tiny"}
    built = build(schema.parse(config.Model, {"image_tower": tower, "pretrained": "hf-hub:someone/tiny"}))
    found.append(built.eval()(data["pixels"], data["ids"])[:2])
    theirs = open_clip.create_model("hf-hub:someone/tiny").eval()
    found.append((theirs.encode_image(data["pixels"], normalize=True), theirs.encode_text(data["ids"], normalize=True)))
    network = AutoModel.from_pretrained("someone/tiny").eval()(input_ids=data["ids"], pixel_values=data["pixels"])
    found.append((network.image_embeds, network.text_embeds))
AutoProcessor.from_pretrained("someone/tiny")
tokens = open_clip.get_tokenizer("hf-hub:someone/tiny")(["two red circles"])
print(json.dumps([max((i - data["image"]).abs().max().item(), (t - data["text"]).abs().max().item()) for i, t in found]
                 + [tokens.tolist()]))
"""


@pytest.mark.parametrize("kind", ["clip", pytest.param("siglip", marks=pytest.mark.slow)])
def test_every_library_loads_it_from_the_hub(kind, exported, hub, tmp_path):
    folder, model = exported, tiny()
    prelude = ""
    if kind == "siglip":  # whose tokenizer lies in the repository, under a name that only the push knows
        model = tiny(image_tower=siglip(tmp_path), text_tower=None, embed_dim=None, bias=-10.0)
        folder = tmp_path / "out"
        export.export(model, folder)
        prelude = "from tests.model.tiny import register_small_siglip\nregister_small_siglip()\n"
    quickly(folder, hub)
    pixels, ids = inputs(model)
    with torch.no_grad():
        features = model(pixels, ids)
    torch.save({"pixels": model.pixels(pixels), "ids": ids, "image": features.image, "text": features.text}, tmp_path / "kept.pt")
    environment = os.environ | {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "cache"), "CUDA_VISIBLE_DEVICES": ""}
    ran = subprocess.run([sys.executable, "-c", prelude + LOADED, str(tmp_path / "kept.pt")], env=environment,
                         capture_output=True, text=True, timeout=200)  # fmt: skip
    assert ran.returncode == 0, ran.stderr[-3000:]
    *differences, tokens = json.loads(ran.stdout.strip().splitlines()[-1])
    assert len(differences) == 4 and max(differences) <= 1e-5
    assert len(tokens[0]) == model.text_spec.context_length and (kind == "clip" or tokens[0][:4] == [8, 6, 10, 1])
    assert TOKEN not in ran.stdout + ran.stderr
