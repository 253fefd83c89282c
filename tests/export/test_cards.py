"""What a card says is true of its model, and its code runs where the folder lies."""

import re

import pytest
import yaml
from PIL import Image

from tests.export.test_export_more import described
from tests.export.test_places import keys_of
from tests.models.tiny import tiny
from vlp import averaging, checkpoint
from vlp.export.folder import export, export_average, export_run, export_stages

TIMM = {"name": "timm", "model": "test_vit", "image_size": 64}
# kind → how many blocks of code its card has: vlp's and the pictures' always
BLOCKS = {
    "clip": 5,
    "mean pooling": 3,
    "siglip": 6,
    "huggingface, mean": 4,
    "a timm tower of another size": 4,
    "both towers of which only vlp knows": 2,
    "llm": 2,
}
NAME = 'a "model", v1.0 é'


def make(kind, folder):
    if kind == "a timm tower of another size":
        return tiny(image_tower=TIMM)
    if kind == "both towers of which only vlp knows":
        text = described("huggingface", folder)["text_tower"] | {"clean": "canonicalize"}
        return tiny(image_tower=TIMM, text_tower=text)
    return tiny(**keys_of(kind, folder))


def run_card(folder, monkeypatch):
    """Run every block of a card in the folder around it; how many there are."""
    Image.new("RGB", (40, 30), "red").save(folder.parent / "photo.jpg")
    monkeypatch.chdir(folder.parent)
    card = (folder / "README.md").read_text(encoding="utf-8")
    blocks = re.findall("```python\n(.*?)```", card, re.DOTALL)
    for block in blocks:
        exec(compile(block, "README.md", "exec"), {})
    return len(blocks)


# a sample; a card of each kind of the walk over consumers is run there, slowly
SLOW = {"clip", "siglip", "huggingface, mean", "llm"}


@pytest.mark.parametrize(
    "kind",
    [pytest.param(kind, marks=pytest.mark.slow if kind in SLOW else ()) for kind in BLOCKS],
)
def test_every_block_of_code_runs(kind, tmp_path, monkeypatch):
    export(make(kind, tmp_path), tmp_path / NAME)
    card = (tmp_path / NAME / "README.md").read_text(encoding="utf-8")
    metadata = yaml.safe_load(card.split("---\n")[1])
    for library in ("open_clip", "transformers", "sentence_transformers"):
        tag = library.replace("sentence_", "sentence-")
        assert (f"import {library}" in card or f"from {library} import" in card) == (
            tag in metadata["tags"]
        ), library
    assert metadata["library_name"] in [*metadata["tags"], "vlp"]
    assert run_card(tmp_path / NAME, monkeypatch) == BLOCKS[kind]


def test_a_card_says_how_its_model_came_about(tmp_path, monkeypatch):
    (tmp_path / "runs").mkdir()
    for seed, name in enumerate("ab"):
        export(tiny(seed), tmp_path / "runs" / name)
    pair = [str(tmp_path / "runs" / name) for name in "ab"]
    export_run(pair[0], tmp_path / "imported")
    export_average(averaging.blend(pair, 0.25), tmp_path / "blend")
    model = tiny()
    contents = checkpoint.Contents(
        model.state_dict(), {}, config="out: run", description=model.description()
    )
    checkpoint.save(tmp_path / "runs/c", 30, contents, keep=1)
    export_run(tmp_path / "runs/c", tmp_path / "trained")
    export_stages(pair, tmp_path / "stages")

    expected = {
        "runs/a": "An image-text dual encoder exported by vlp:",
        "imported": "An image-text dual encoder imported by vlp from `a`:",
        "blend": "An image-text dual encoder averaged by vlp:",
        "trained": "An image-text dual encoder trained with vlp, 30 steps:",
        "stages": "2 image-text dual encoders, which vlp joins as stages.",
    }
    for folder, sentence in expected.items():
        card = (tmp_path / folder / "README.md").read_text(encoding="utf-8")
        assert sentence in card and ("trained with vlp" in card) == (folder == "trained"), folder
    blend = (tmp_path / "blend/README.md").read_text(encoding="utf-8")
    assert "an average of 2 models': 0.75 · `a` + 0.25 · `b`." in blend and len(expected) == 5
    assert run_card(tmp_path / "stages", monkeypatch) == 1
