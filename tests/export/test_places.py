"""Nothing that an export writes names a place of the machine that wrote it, but where a library
knows no other way.
"""

import os
from pathlib import Path

import pytest

from tests.export.test_export_more import described
from tests.models import languages
from tests.models.tiny import tiny
from vlp.export.folder import export

CONFIG = "open_clip_config.json"
# kind → the keys that hold a place: open_clip takes the text tower's from there, and the language
# model of stored texts lies outside the folder. Kinds without any are in the walk over consumers.
HELD = {
    "siglip": (),
    "huggingface": ("hf_model_name",),
    "huggingface, mean": ("hf_model_name",),
    "resnet": (),
    "llm": (),
    "stored": ("hf_model_name", "hf_tokenizer_name"),
}


def keys_of(kind, folder):
    if kind == "llm":
        model = languages.language_model(folder / "llm")
        return {"text_tower": {"name": "llm", "model": str(model), "context_length": 12}}
    if kind == "stored":
        store = languages.text_store(folder)
        return {"text_tower": {"name": "stored", "embeddings": str(store)}}
    return described(kind, folder)


def places(folder, machine):
    """Lines of files in `folder` that name a place of this machine, by file."""
    needles = [str(machine), os.getcwd(), f"{Path.home()}/", "site-packages"]
    named = {}
    for path in folder.rglob("*"):
        lines = path.read_bytes().splitlines() if path.is_file() else []
        for line in lines:
            if any(needle.encode() in line for needle in needles):
                named.setdefault(path.relative_to(folder).as_posix(), []).append(line[:200])
    return named


@pytest.mark.parametrize("kind", HELD)
def test_no_file_names_a_place_of_this_machine(kind, tmp_path):
    (tmp_path / "source").mkdir()
    model = tiny(**keys_of(kind, tmp_path / "source"))
    notes = export(model, tmp_path / "out")
    assert not any(str(tmp_path) in note for note in notes)

    named = places(tmp_path / "out", tmp_path)
    keys = [line.split(b'"')[1].decode() for line in named.pop(CONFIG, [])]
    assert tuple(keys) == HELD[kind] and not named
