"""LiT: a locked image tower, run on pixels or read from embeddings that `vlp data embed` stored."""

import json

import pytest
import torch

from tests.data_tools.tools import call
from vlp import checkpoint
from vlp.data_tools import embed
from vlp.train import train

LOCKED = (
    "model.image_tower.locked=true",
    "model.image_tower.patch_dropout=0",
    "data.augment={scale: [1, 1], ratio: [1, 1]}",
    "train.duration=4",
    "data.captions.choose=first",
    "data.workers=0",
)


def curve(run):
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if line["kind"] == "train"]


def test_stored_embeddings_train_as_the_locked_tower_does(settings, scenes, tmp_path):
    tower = train(
        settings("train.duration=9", "train.optimizer.lr=3e-3", "data.workers=0", out="tower")
    )
    call(embed, scenes / "train", "--model", tower, "--to", tmp_path / "embedded")
    start = f"init_from={tower}"
    on_pixels = train(settings(*LOCKED, start, out="pixels"))
    stored = (
        *LOCKED,
        start,
        "model.image_tower.precomputed=true",
        f"data.sources.0.embeddings={tmp_path / 'embedded'}",
    )
    from_store = train(settings(*stored, out="stored"))
    # float16, and an evaluation's resizing.
    assert curve(from_store) == pytest.approx(curve(on_pixels), rel=2e-3)
    other = train(settings("data.shuffle=false", *stored, out="other"))
    # Other rows would not do.
    assert curve(other)[1:] != pytest.approx(curve(on_pixels)[1:], rel=2e-3)
    trained = checkpoint.load_model(from_store)
    before = checkpoint.load_model(tower)
    assert all(
        torch.equal(v, before.visual.state_dict()[k])
        for k, v in trained.visual.state_dict().items()
    )
    assert not torch.equal(trained.text.token_embedding.weight, before.text.token_embedding.weight)


def test_what_cannot_be_precomputed_is_refused(settings, scenes, tmp_path):
    tower = train(settings("train.duration=1", out="tower"))
    call(embed, scenes / "train", "--model", tower, "--to", tmp_path / "embedded")
    stored = (
        *LOCKED,
        "model.image_tower.precomputed=true",
        f"data.sources.0.embeddings={tmp_path / 'embedded'}",
    )
    for changes, message in (
        (("model.image_tower.locked=false",), "set locked: true"),
        (("model.embed_dim=24",), "found width 16, expected 24"),
        (("data.sources.0.embeddings=null",), "no source names any: set data.sources.0.embeddings"),
        (
            ("teacher.ema=0.9", "objective={infonce: {}, self_distillation: {}}"),
            "'ema_image'.*which come from pixels",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            train(settings(*stored, *changes, out="refused"))


def test_embeddings_of_another_model_or_order_are_refused(settings, scenes, tmp_path):
    """Of the right width and for the same samples, but other weights, other pixels, or exchanged
    rows.
    """
    from safetensors import safe_open
    from safetensors.torch import load_file, save_file

    longer = ("train.duration=9", "train.optimizer.lr=3e-3", "data.workers=0")
    tower, other = (
        train(settings(*longer, out="tower")),
        train(settings(*longer, "seed=5", out="other")),
    )
    for name, model in (("right", tower), ("foreign", other)):
        call(embed, scenes / "train", "--model", model, "--to", tmp_path / name)
    (tmp_path / "rolled").mkdir()
    for path in (tmp_path / "right").glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            about = file.metadata()
        rows = {key: value.roll(1, dims=0).contiguous() for key, value in load_file(path).items()}
        save_file(rows, tmp_path / "rolled" / path.name, about)
    start = (
        *LOCKED,
        "train.duration=1",
        f"init_from={tower}",
        "model.image_tower.precomputed=true",
    )
    distilled = (
        "train.duration=1",
        "data.workers=0",
        "objective={infonce: {}, distill: {}}",
        "data.captions.choose=first",
    )
    n_refused = 0
    for changes, whose in ((start, "this run's image tower"), (distilled, str(tower))):
        train(
            settings(
                *changes, f"data.sources.0.embeddings={tmp_path / 'right'}", out=f"right{n_refused}"
            )
        )
        for wrong in ("foreign", "rolled"):
            if wrong == "foreign" and whose == str(
                tower
            ):  # by its own account made by the other model, and so it is
                continue
            with pytest.raises(
                ValueError,
                match=f"image embeddings are not made by {whose}: 8 samples .* cosines .*0.99",
            ):
                train(
                    settings(
                        *changes, f"data.sources.0.embeddings={tmp_path / wrong}", out="refused"
                    )
                )
            n_refused += 1
    assert n_refused == 3 and not (tmp_path / "refused").exists()


def test_a_teacher_that_is_not_here_is_said(settings, scenes, tmp_path, capsys):
    tower = train(settings("train.duration=1", out="tower"))
    call(embed, scenes / "train", "--model", tower, "--to", tmp_path / "embedded")
    tower.rename(tmp_path / "moved")
    train(
        settings(
            "train.duration=1",
            "data.workers=0",
            "objective={infonce: {}, distill: {}}",
            "data.captions.choose=first",
            f"data.sources.0.embeddings={tmp_path / 'embedded'}",
            out="distilled",
        )
    )
    assert (
        f"embedded: not compared with {tower}, which is not on this machine"
        in capsys.readouterr().out
    )


def test_two_sources_of_a_teachers_embeddings_are_refused(settings, scenes, tmp_path):
    tower = train(settings("train.duration=1", out="tower"))
    call(embed, scenes / "train", "--model", tower, "--to", tmp_path / "embedded")
    with pytest.raises(ValueError, match="leave out one of them"):
        train(
            settings(
                "objective={infonce: {}, distill: {}}",
                f"teacher.model={tower}",
                "data.captions.choose=first",
                f"data.sources.0.embeddings={tmp_path / 'embedded'}",
                out="twice",
            )
        )
