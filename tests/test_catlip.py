"""From captions to a classifier: `vlp data concepts`, the recipe `catlip`, `vlp export`."""

import json

import timm
import torch
from PIL import Image

from tests.data.material import encoded, picture
from tests.data_tools.nouns import write_wordnet
from tests.test_recipes import RECIPES, losses, tiny
from vlp import checkpoint
from vlp.cli import main
from vlp.data.format import ShardWriter
from vlp.train import train

WORDS = ["dog", "cat", "wolf", "bus", "box", "pony"]


def colour(i):
    """Of the pictures of word i: red, green, blue, cyan, magenta, yellow."""
    light, dark = (255, 0) if i < 3 else (0, 255)
    return tuple(light if channel == i % 3 else dark for channel in range(3))


def write(folder, n=48):
    """Pictures of six colours, each called by a word; every eighth by none."""
    with ShardWriter(folder, 20) as writer:
        for i in range(n):
            word = "nothing" if i % 8 == 7 else WORDS[i % 6]
            image = Image.new("RGB", (16, 16), colour(i % 6))
            writer.add(f"k{i}", encoded(image), "png", [f"a {word}, and again the {word}s"], {})
    return folder


def test_from_captions_to_a_classifier_of_timm(tmp_path, capsys):
    source, named = write(tmp_path / "in"), tmp_path / "named"
    wordnet = write_wordnet(tmp_path / "wordnet")
    command = ["data", "concepts", source, "--wordnet", wordnet, "--min-count", 2, "--to", named]
    assert main(list(map(str, command))) == 0
    assert "6 concepts: model.heads.concepts=6" in capsys.readouterr().out

    more = ["model.heads.concepts=6", "train.duration=30", "train.optimizer.lr=2e-2"]
    run = train(tiny(RECIPES["catlip"], named, tmp_path / "run", *more, "log.every=1"))
    values = [line["loss"] for line in losses(run) if line["kind"] == "train"]
    assert len(values) == 30 and values[-1] < values[0] / 2

    place, table = tmp_path / "out put", named / "concepts.tsv"
    command = ["export", run, "--form", "classifier", "--labels", table, "--to", place]
    assert main(list(map(str, command))) == 0
    assert "timm: vit_base_patch32_clip_224 with 6 classes" in capsys.readouterr().out
    model = timm.create_model(f"local-dir:{place}", pretrained=True).eval()
    names = json.loads((place / "config.json").read_text())["label_names"]
    assert sorted(names) == sorted(f"{word}.n.01" for word in WORDS)

    # It names what the captions of a picture name.
    colours = torch.tensor([colour(i) for i in range(6)], dtype=torch.uint8)
    pixels = colours[:, :, None, None].expand(6, 3, 16, 16)
    trained = checkpoint.load_model(run)
    with torch.no_grad():
        best = model(trained.pixels(pixels)).argmax(1)
    assert [names[place] for place in best.tolist()] == [f"{word}.n.01" for word in WORDS]


def test_the_head_and_the_data_know_as_many_concepts(tmp_path, capsys):
    """A number beyond the head's costs its sample; two numbers of them are refused at the start."""
    folder = tmp_path / "in"
    with ShardWriter(folder, 50) as writer:
        for i in range(40):
            meta = {"concepts": [6 if i == 3 else i % 6]}
            writer.add(f"k{i}", encoded(picture(i, (16, 16))), "png", ["a caption"], meta)
    more = ["model.heads.concepts=6", "train.duration=2", "train.batch=32"]
    run = train(tiny(RECIPES["catlip"], folder, tmp_path / "run", *more))
    assert any("6 in 'concepts' is no number" in line for line in bad_samples(run, capsys))

    config = tiny(RECIPES["catlip"], folder, tmp_path / "other", *more, "data.concepts=7")
    try:
        train(config)
    except ValueError as error:
        assert "data.concepts is 7 and model.heads.concepts 6" in str(error)
    else:
        raise AssertionError("two numbers of concepts were taken")
    assert not (tmp_path / "other").exists()


def bad_samples(run, capsys):
    """What the run said of samples that it could not use."""
    return [
        *capsys.readouterr().err.splitlines(),
        *(run / "metrics.jsonl").read_text().splitlines(),
    ]
