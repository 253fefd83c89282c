"""Crops that a teacher embedded before training: the student sees the same ones, and the caption's
own row comes with each. Teachers that are several.
"""

from __future__ import annotations

import json
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from tests.data.material import IMAGE, TEXT, data_of, encoded, picture
from tests.data.test_embedded import write_embeddings
from tests.data.test_loader import take
from tests.data_tools.tools import call
from tests.eval.material import TINY, tiny_open_clip
from tests.eval.test_models import tiny_transformers
from vlp import stored_embeddings
from vlp.config import Captions
from vlp.data import text as tokenizers
from vlp.data.format import ShardWriter
from vlp.data.loader import Loader
from vlp.data_tools import embed
from vlp.eval.models import Encoder, load

N, VIEWS = 10, 3
AUGMENT = "{scale: [0.2, 0.6], flip: 0.5}"
SIZE = replace(IMAGE, size=(TINY["vision_cfg"]["image_size"],) * 2)


class Reinforced(NamedTuple):
    """Shards, what a teacher stored of them, and the teacher."""

    shards: Path
    stored: Path
    reference: str
    teacher: Encoder


def captions_of(i: int) -> dict[str, list[str]]:
    """A raw caption of sample i and two written ones; every third sample has one."""
    return {"raw": [f"photo {i}"], "written": [f"a dog {i}", f"a cat {i}"][: 1 + bool(i % 3)]}


@pytest.fixture(scope="module")
def reinforced(tmp_path_factory) -> Reinforced:
    """Pictures of odd sizes in PNG and JPEG, one turned, in two shards."""
    folder = tmp_path_factory.mktemp("reinforced")
    turned = Image.Exif()
    turned[274] = 6
    with ShardWriter(folder / "shards", 6) as writer:
        for i in range(N):
            kind = ("PNG", "JPEG")[i % 2]
            options: dict[str, Any] = {"exif": turned} if i == 3 else {}
            image = encoded(picture(i, (71 + 9 * i, 53 + 4 * i)), kind, **options)
            writer.add(None, image, kind.lower(), [], captions_of(i) | {"number": i})

    reference = f"local-dir:{tiny_open_clip(folder / 'model')}"
    options = ("--views", VIEWS, "--seed", 5, "--augment", AUGMENT, "--captions", "raw,written")
    to = ("--to", folder / "stored", "--batch", 4)
    call(embed, folder / "shards", "--model", reference, *options, *to)
    return Reinforced(folder / "shards", folder / "stored", reference, load(reference))


def loader(reinforced: Reinforced, **options: Any) -> Loader:
    """The shards with what is stored of them."""
    source = {
        "name": "shards",
        "path": str(reinforced.shards),
        "captions": ["raw", "written"],
        "embeddings": str(options.pop("embeddings", reinforced.stored)),
    }
    names = ("rank", "world", "stored_crops")
    of_loader = {name: options.pop(name) for name in names if name in options}
    data = data_of(source, **options)
    return Loader(data, SIZE, TEXT, batch=4, seed=3, **of_loader)


def test_a_student_sees_the_crop_that_the_stored_row_is_of(reinforced):
    tokenize = tokenizers.build(TEXT)
    by_image, by_text, rows = set(), set(), 0
    for batch in take(loader(reinforced), 12):
        assert batch.teacher_image.dtype == torch.float32
        pixels = [Image.fromarray(image.permute(1, 2, 0).numpy()) for image in batch.image]
        again = reinforced.teacher.encode_images(pixels)
        assert torch.allclose(batch.teacher_image, again, atol=2e-3)

        for number, sample_id, ids, row in zip(
            range(4), batch.sample_id, batch.text, batch.teacher_text, strict=True
        ):
            own = captions_of(int(sample_id))
            texts = own["raw"] + own["written"]
            [drawn] = [text for text in texts if (tokenize([text])[0] == ids).all()]
            assert torch.allclose(row, reinforced.teacher.encode_texts([drawn])[0], atol=2e-3)
            by_text.add(drawn)
            by_image.add((int(sample_id), batch.image[number].numpy().tobytes()))
            rows += 1

    # Several crops and captions of a sample are drawn, and no other crops than the stored.
    assert rows == 48 and N + 8 < len(by_image) <= N * VIEWS and len(by_text) > N + 5


def test_which_crop_is_drawn_depends_on_neither_workers_ranks_nor_where_a_run_resumes(reinforced):
    whole = take(loader(reinforced), 6)
    names = ("image", "teacher_image", "teacher_text", "sample_id")
    others = {"workers": take(loader(reinforced, workers=1), 6)}
    resumed = loader(reinforced)
    resumed.load_state_dict(loader(reinforced).state_dict(0) | {"step": 4})
    others["resumed"] = take(resumed, 2)
    first, second = (take(loader(reinforced, rank=rank, world=2), 6) for rank in range(2))

    n_compared = 0
    for name in names:
        for other in others.values():
            for one, same in zip(whole[-len(other) :], other, strict=True):
                assert torch.equal(getattr(one, name), getattr(same, name))
                n_compared += 1
        for one, upper, lower in zip(whole, first, second, strict=True):
            halves = torch.cat([getattr(upper, name), getattr(lower, name)])
            assert torch.equal(getattr(one, name), halves)
            n_compared += 1
    assert n_compared == 4 * (6 + 2 + 6)


def test_further_views_leave_the_stored_crop_alone(reinforced):
    plain, viewed = loader(reinforced), loader(reinforced, views={"n": 1})
    for one, other in zip(take(plain, 2), take(viewed, 2), strict=True):
        assert torch.equal(one.image, other.image) and "image_views" in other.carries()


def test_held_out_pictures_are_shown_whole(reinforced):
    middle = {"scale": [1, 1], "ratio": [1, 1]}
    batch = take(loader(reinforced, augment=middle, stored_crops=False), 3)[-1]
    places = batch.sample_id.tolist()
    whole = [load_file(path)["image"] for path in sorted(reinforced.stored.glob("*.safetensors"))]
    assert torch.equal(batch.teacher_image, torch.tensor(np.concatenate(whole)[places]).float())


def test_what_training_cannot_do_with_stored_crops_is_said_at_once(reinforced, tmp_path):
    with pytest.raises(ValueError, match=r"data\.augment is .*; leave data\.augment out"):
        loader(reinforced, augment={"scale": [0.5, 1]})
    loader(reinforced, augment={"scale": [0.2, 0.6], "flip": 0.5})  # as stored

    # A caption that is not stored is said before the first step.
    with ShardWriter(tmp_path / "shards", 9) as writer:
        for i in range(3):
            writer.add(None, encoded(picture(i)), "png", ["One. Two."])
    to = ("--captions", "captions", "--to", tmp_path / "stored")
    call(embed, tmp_path / "shards", "--model", reinforced.reference, *to)
    source = {
        "name": "shards",
        "path": str(tmp_path / "shards"),
        "embeddings": str(tmp_path / "stored"),
    }
    for choose, message in (("sentences", "no embedding of the caption '(One|Two).'"), ("all", "")):
        data = data_of(source, captions={"choose": choose})
        sources = Loader(data, SIZE, TEXT, batch=2, seed=3).sources
        refused = pytest.raises(ValueError, match=message) if message else nullcontext()
        with refused:
            stored_embeddings.check(sources, None, data.captions, precomputed=False)


def test_stored_crops_are_compared_with_their_teacher_by_content(reinforced, tmp_path):
    sources = loader(reinforced).sources
    stored_embeddings.check(sources, None, Captions(), precomputed=False)

    # Crops of another seed than the file names.
    for path in reinforced.stored.glob("*.safetensors"):
        with safe_open(path, "numpy") as file:
            about = file.metadata()
        about["views"] = about["views"].replace('"seed": 5', '"seed": 6')
        save_file(load_file(path), tmp_path / path.name, about)
    sources = loader(reinforced, embeddings=tmp_path).sources
    with pytest.raises(ValueError, match=r"the image embeddings are not made by.* embed --views"):
        stored_embeddings.check(sources, None, Captions(), precomputed=False)

    # Of two teachers that cut in two ways a student can see one.
    both = {"name": "shards", "path": str(reinforced.shards), "captions": ["raw"]}
    both["embeddings"] = [str(reinforced.stored), str(tmp_path)]
    with pytest.raises(ValueError, match=r"3 crops of seed 5.*3 crops of seed 6.*the same --views"):
        Loader(data_of(both), SIZE, TEXT, batch=2, seed=3)


@pytest.mark.slow
def test_a_model_that_would_not_see_the_crop_is_refused(reinforced, tmp_path):
    folder = tiny_transformers(tmp_path / "model", "clip")
    described = folder / "preprocessor_config.json"
    settings = json.loads(described.read_text())
    settings["size"] = {"shortest_edge": 24}  # and cuts 16 x 16 of them
    described.write_text(json.dumps(settings))
    with pytest.raises(ValueError, match="resizes or cuts pictures of the 16 x 16 pixels"):
        call(embed, reinforced.shards, "--model", folder, "--views", 1, "--to", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "options, message",
    [
        (["--model", "M", "--views", -1], "--views -1: expected a number of crops"),
        (["--model", "M", "--seed", 3], "say how many with --views N"),
        (["--model", "M", "--views", 2, "--augment", "{scal: [1, 1]}"], "did you mean"),
        (["--model", "M", "--views", 2, "--augment", "{scale: [0, 1]}"], "must satisfy 0 < low"),
        (["--model", "M", "--views", 2, "--augment", "[1"], "expected keys of data.augment"),
        (["--model", "M", "--negatives"], "--negatives is for --text-model"),
        (["--text-model", "M", "--views", 2], "they go with --model"),
    ],
)
def test_options_that_do_not_fit_are_refused_before_a_model_is_read(
    reinforced, tmp_path, options, message
):
    with pytest.raises(ValueError, match=message):
        call(embed, reinforced.shards, "--to", tmp_path / "out", *options)
    assert not (tmp_path / "out").exists()


def test_several_teachers_lie_beside_one_another(tmp_path):
    with ShardWriter(tmp_path / "shards", 7) as writer:
        for i in range(9):
            writer.add(None, encoded(picture(i)), "png", [f"one {i}"])
    wide = write_embeddings(tmp_path / "wide teacher", tmp_path / "shards")
    narrow = write_embeddings(tmp_path / "narrow", tmp_path / "shards", scale=20.0, width=4)

    def opened(*folders: Path) -> Loader:
        names = [str(folder) for folder in folders]
        source = {"name": "shards", "path": str(tmp_path / "shards"), "embeddings": names}
        return Loader(data_of(source), IMAGE, TEXT, batch=8, seed=3)

    both = opened(wide, narrow)
    assert both.teacher_scale == (50.0, 20.0) and both.teacher_shape == (2, 6)
    batch = next(both)
    assert batch.teacher_image.shape == batch.teacher_text.shape == (8, 2, 6)
    for name, sign in (("teacher_image", 1), ("teacher_text", -1)):
        alone = [getattr(next(opened(folder)), name) for folder in (wide, narrow)]
        rows = getattr(batch, name)
        assert torch.equal(rows[:, 0], alone[0]) and torch.equal(rows[:, 1, :4], alone[1])
        assert not rows[:, 1, 4:].any() and torch.equal(rows, sign * batch.teacher_image)

    for folders, message in (((wide, wide), "several different ones"), ((), "name a folder")):
        with pytest.raises(ValueError, match=message):
            opened(*folders)
