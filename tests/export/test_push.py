"""Pushing an export to a Hub on this machine, and loading it from there with every library."""

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

from tests.loopback_hub import TOKEN, loopback_hub
from tests.models.tiny import inputs, language_model, siglip, tiny
from vlp.export.folder import export, export_concatenated
from vlp.export.push import PushError, push

REPO = "someone/tiny"
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    folder = tmp_path_factory.mktemp("push") / "tiny"
    export(tiny(), folder)
    return folder


@pytest.fixture
def hub(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    # For the processes that load; here it was read at import:
    monkeypatch.setenv("HF_HUB_DISABLE_XET", "1")
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
    written = {
        str(p.relative_to(exported)): p.read_bytes() for p in exported.rglob("*") if p.is_file()
    }
    card = there.pop("README.md").decode()
    local = written.pop("README.md").decode()
    assert (
        local.replace('"local-dir:tiny"', f'"hf-hub:{REPO}"').replace('("tiny")', f'("{REPO}")')
        == card
    )
    assert there == written and "local-dir" not in card
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
    assert (
        "their.txt" not in hub.repos[REPO]
        and f"hf-hub:{REPO}".encode() in hub.repos[REPO]["README.md"]
    )


def test_only_what_the_export_wrote_is_published(exported, hub, tmp_path):
    folder = shutil.copytree(exported, tmp_path / "copy")
    foreign = [
        ".env",
        ".DS_Store",
        ".ipynb_checkpoints/card-checkpoint.md",
        "notes.txt",
        "onnx/mine.onnx",
    ]
    for name in foreign:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("SECRET")
    (folder / "passwd").symlink_to("/etc/passwd")
    _, said = quickly(folder, hub)
    assert said == [
        f"left out, because no export wrote them: {', '.join(sorted([*foreign, 'passwd']))}"
    ]
    assert not set(hub.repos[REPO]) & {*foreign, "passwd"} and b"SECRET" not in b"".join(
        hub.repos[REPO].values()
    )


def test_stages_load_from_the_hub_as_their_card_says(exported, hub, tmp_path, monkeypatch):
    from tests.models.test_references import use_hub

    export_concatenated([exported, exported], tmp_path / "mcl")
    quickly(tmp_path / "mcl", hub)
    use_hub(monkeypatch, hub.url)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    [block] = re.findall("```python\n(.*?)```", hub.repos[REPO]["README.md"].decode(), re.DOTALL)
    ran = {}
    exec(block, ran)
    assert ran["model"].embed_dim == 96 and REPO in block


def test_files_that_are_lost_or_lead_out_are_refused(exported, hub, tmp_path):
    folder = shutil.copytree(exported, tmp_path / "copy")
    (folder / "tokenizer.json").unlink()
    with pytest.raises(PushError, match=r"has lost tokenizer.json, which its export wrote"):
        quickly(folder, hub)
    (folder / "tokenizer.json").symlink_to("/etc/passwd")
    with pytest.raises(PushError, match=r"tokenizer.json leads out of the folder, to /etc/passwd"):
        quickly(folder, hub)
    (folder / "vlp_export.json").write_text(
        '{"name": "tiny", "files": ["../../etc/passwd", "/etc/passwd"]}'
    )
    with pytest.raises(PushError, match=r"leads out of the folder|has lost"):
        quickly(folder, hub)
    assert REPO not in hub.repos


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
import json, re, sys
import torch
kept, subfolder = sys.argv[1:]
data = torch.load(kept)
masked = {"attention_mask": (data["ids"] != 0).long()} if subfolder else {}
from vlp import config, schema
from vlp.models.build import build
from vlp.models.load import load
from vlp.eval import models
import huggingface_hub, open_clip
from transformers import AutoModel, AutoProcessor
with torch.no_grad():
    pixels, given_ids = data["pixels"], data["ids"]
    found = [load("hf-hub:someone/tiny").eval()(pixels, given_ids)[:2]]
    tower = {"name": "open_clip", "architecture": "hf-hub:someone/tiny"}
    section = {"image_tower": tower, "pretrained": "hf-hub:someone/tiny"}
    built = build(schema.parse(config.Model, section))
    found.append(built.eval()(pixels, given_ids)[:2])

    theirs = open_clip.create_model("hf-hub:someone/tiny").eval()
    image = theirs.encode_image(pixels, normalize=True)
    found.append((image, theirs.encode_text(given_ids, normalize=True)))
    network = AutoModel.from_pretrained("someone/tiny", subfolder=subfolder).eval()
    features = network(input_ids=given_ids, pixel_values=pixels, **masked)
    found.append((features.image_embeds, features.text_embeds))

    texts = ["two red circles"]
    own = models.load("hf-hub:someone/tiny")
    ids = open_clip.get_tokenizer("hf-hub:someone/tiny")(texts)
    apart = own.encode_texts(texts) - theirs.encode_text(ids, normalize=True)
    found.append((data["image"], data["text"] + apart))

card = open(huggingface_hub.hf_hub_download("someone/tiny", "README.md")).read()
blocks = re.findall("```python\\n(.*?)```", card, re.DOTALL)
ran = [exec(block, {}) for block in blocks]
apart = [
    max((i - data["image"]).abs().max().item(), (t - data["text"]).abs().max().item())
    for i, t in found
]
print(json.dumps([*apart, ids.tolist(), len(blocks), len(ran)]))
"""


# A fast sample of the Hub is in the walk over consumers.
@pytest.mark.slow
@pytest.mark.parametrize("kind", ["clip", "huggingface", "siglip"])
def test_every_library_loads_it_from_the_hub_and_the_card_runs(kind, exported, hub, tmp_path):
    folder, model = exported, tiny()
    prelude = ""
    if (
        kind == "siglip"
    ):  # whose tokenizer lies in the repository, under a name that only the push knows
        model = tiny(image_tower=siglip(tmp_path), text_tower=None, embed_dim=None, bias=-10.0)
        prelude = "from tests.models.tiny import register_small_siglip\nregister_small_siglip()\n"
    if kind == "huggingface":  # so does its text tower
        text = {
            "name": "huggingface",
            "model": str(language_model(tmp_path / "bert")),
            "context_length": 12,
            "pretrained": False,
        }
        model = tiny(text_tower=text)
    if kind != "clip":
        folder = tmp_path / "out"
        export(model, folder)
    quickly(folder, hub)
    if kind == "huggingface":
        shutil.rmtree(tmp_path / "bert")
        shutil.rmtree(folder)
        assert str(tmp_path).encode() not in b"".join(hub.repos[REPO].values())
    pixels, ids = inputs(model)
    with torch.no_grad():
        features = model(pixels, ids)
    torch.save(
        {
            "pixels": model.pixels(pixels),
            "ids": ids,
            "image": features.image,
            "text": features.text,
        },
        tmp_path / "kept.pt",
    )
    Image.new("RGB", (40, 30), "red").save(tmp_path / "photo.jpg")
    environment = os.environ | {
        "HF_ENDPOINT": hub.url,
        "HF_HOME": str(tmp_path / "cache"),
        "CUDA_VISIBLE_DEVICES": "",
    }
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    subfolder = "transformers" if kind == "huggingface" else ""
    ran = subprocess.run(
        [sys.executable, "-c", prelude + LOADED, str(tmp_path / "kept.pt"), subfolder],
        env=environment,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert ran.returncode == 0, ran.stderr[-3000:]
    *differences, tokens, n_blocks, n_ran = json.loads(ran.stdout.strip().splitlines()[-1])
    assert len(differences) == 5 and max(differences) <= 1e-5
    assert len(tokens[0]) == model.text_spec.context_length and (
        kind == "clip" or tokens[0][:4] == [8, 6, 10, 1]
    )
    assert n_blocks == n_ran == (6 if kind == "siglip" else 5)
    assert TOKEN not in ran.stdout + ran.stderr
