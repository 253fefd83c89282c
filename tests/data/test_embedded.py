"""A teacher's embeddings beside the samples they were made of."""

from __future__ import annotations

import hashlib
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

from tests.data.material import data_of, encoded, loader_of, picture, write_shards
from tests.data.test_loader import take
from vlp.data.format import ShardWriter
from vlp.text_store import TextStore, digests


def write_embeddings(
    folder: Path, shards: Path, *, model: str = "teacher", scale: float = 50.0, width: int = 6
) -> Path:
    """As `vlp data embed` writes them: row i of a shard says of which shard and sample it is."""
    folder.mkdir()
    for s, path in enumerate(sorted(shards.glob("*.tar"))):
        with tarfile.open(path) as tar:
            keys = list(dict.fromkeys(name.split(".")[0] for name in tar.getnames()))
        rows = np.stack([np.full(width, s * 1000 + i, np.float16) for i in range(len(keys))])
        about = {
            "model": model,
            "scale": str(scale),
            "keys": hashlib.sha256("\n".join(keys).encode()).hexdigest(),
        }
        save_file({"image": rows, "text": -rows}, folder / f"{path.stem}.safetensors", about)
    return folder


@pytest.fixture(scope="module")
def embedded(tmp_path_factory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("embedded")
    with ShardWriter(folder / "shards", 7) as writer:
        for i in range(18):
            writer.add(
                f"k{i:02d}",
                encoded(picture(i)),
                "png",
                [] if i in (0, 9) else [f"one {i}", f"two {i}"],
            )
    return folder / "shards", write_embeddings(folder / "teacher", folder / "shards")


def test_a_teachers_embeddings_come_with_their_samples(embedded):
    shards, teacher = embedded
    source = {"name": "shards", "path": str(shards), "embeddings": str(teacher)}
    first = {"missing": "drop", "choose": "first"}
    for workers in (0, 1):
        loader = loader_of(data_of(source, captions=first, workers=workers), 8)
        assert loader.teacher_scale == 50.0 and loader.carries >= {"teacher_image", "teacher_text"}

        n = 0
        for batch in take(loader, 4):
            assert batch.teacher_image.dtype == batch.teacher_text.dtype == torch.float32
            for key, image, words in zip(batch.key, batch.teacher_image, batch.teacher_text):
                shard, place = divmod(int(key[1:]), 7)
                assert torch.equal(image, torch.full((6,), shard * 1000.0 + place)) and torch.equal(
                    words, -image
                )
                n += 1
        assert n == 32
    assert loader_of(data_of(shards, captions=first), 8).teacher_scale is None

    # Other captions than the embedded ones.
    loader = loader_of(data_of(source, captions={"missing": "drop"}), 8)
    assert (
        "teacher_image" in loader.carries
        and "teacher_text" not in loader.carries
        and "teacher_text is left out" in loader.problems()[-1]
    )


def test_a_picture_that_did_not_open_for_the_teacher_is_replaced_even_without_pixels(tmp_path):
    shards = write_shards(tmp_path / "shards", 24, 24)
    source = {
        "name": "shards",
        "path": str(shards),
        "embeddings": str(write_embeddings(tmp_path / "teacher", shards)),
    }
    for pixels in (False, True):  # row 0 is zero
        loader = loader_of(data_of(source), 24, pixels=pixels)
        batch = next(loader)
        assert batch.teacher_image.any(1).all() and 0 not in batch.sample_id

        [(i, _, reason)] = loader.bad
        assert i == 0 and "its picture did not open" in reason


def test_embeddings_that_do_not_fit_are_refused_by_name(embedded, tmp_path):
    shards, teacher = embedded
    captions = {"missing": "drop"}

    def opened(embeddings: Path, *others: dict):
        source = {"name": "shards", "path": str(shards), "embeddings": str(embeddings)}
        return loader_of(data_of(source, *others, captions=captions), 4)

    with pytest.raises(
        ValueError, match=r"none/00000.safetensors holds no embeddings.*vlp data embed.*00000.tar"
    ):
        opened(tmp_path / "none")

    with ShardWriter(tmp_path / "other", 7) as writer:
        for i in range(18):
            writer.add(f"other{i}", encoded(picture(i)), "png", ["x"])
    with pytest.raises(
        ValueError,
        match=r"00000.safetensors holds .* for other samples than the 7 of 00000.tar.*data embed",
    ):
        opened(write_embeddings(tmp_path / "others", tmp_path / "other"))

    mixed = write_embeddings(tmp_path / "mixed", shards, scale=20.0)
    (mixed / "00001.safetensors").write_bytes((teacher / "00001.safetensors").read_bytes())
    with pytest.raises(ValueError, match=r"are of several models.*scale=20.*scale=50"):
        opened(mixed)
    with pytest.raises(ValueError, match=r"embeddings are of different models.*None"):
        opened(teacher, {"name": "shards", "path": str(tmp_path / "other")})

    (mixed / "00000.safetensors").write_bytes(b"\x00" * 20)
    with pytest.raises(ValueError, match="holds no embeddings"):
        opened(mixed)

    with pytest.raises(ValueError, match="other_pictures is of embeddings, and there are none"):
        data_of({"name": "shards", "path": str(shards), "other_pictures": True})

    source = {"name": "shards", "path": f"{shards}::{shards}", "embeddings": str(teacher)}
    with pytest.raises(ValueError, match="several shards have one name"):
        loader_of(data_of(source, captions=captions), 4)


def test_stored_texts_come_in_place_of_tokens(embedded, tmp_path):
    """A row for each caption, wherever it stands; zeros where a sample has fewer."""
    shards, _ = embedded
    texts = [f"{word} {i}" for i in range(18) for word in ("one", "two") if i not in (0, 9)]
    rows = np.arange(len(texts) * 4, dtype=np.float16).reshape(-1, 4) + 1
    section = {"hf_model_name": "x/y", "vlp_text": {"width": 4}}
    about = {"text_cfg": json.dumps(section), "weights": "abc"}
    for part in (0, 1):  # two files, the second of which begins in mid-sample
        places = slice(15 * part, 15 + 99 * part)
        tensors = {"text": rows[places], "digest": digests(texts[places])}
        save_file(tensors, tmp_path / f"{part}.safetensors", about)

    expected = dict(zip(texts, rows))
    captions = {"missing": "drop", "choose": "all", "n": 3}
    for workers in (0, 1):
        data = data_of(shards, captions=captions, workers=workers)
        loader = loader_of(data, 8, store=TextStore(str(tmp_path)))
        n_rows = 0
        for batch in take(loader, 3):
            assert batch.text.shape == (8, 4) and batch.captions.shape[::2] == (8, 4)
            for key, row, beside in zip(batch.key, batch.text, batch.captions):
                words = [expected[f"{word} {int(key[1:])}"] for word in ("one", "two")]
                assert any(np.array_equal(row.numpy(), of_word) for of_word in words)
                np.testing.assert_array_equal(beside[:2].numpy(), np.stack(words))
                assert not beside[2:].any()
                n_rows += 1
        assert n_rows == 24

    views = {"n": 1, "text": {"deletions": 0.5}}
    with pytest.raises(ValueError, match=r"data\.views changes the words of captions"):
        loader_of(
            data_of(shards, captions=captions, views=views), 8, store=TextStore(str(tmp_path))
        )
    mixed = tmp_path / "mixed"
    mixed.mkdir()
    save_file(tensors, mixed / "0.safetensors", about | {"weights": "other"})
    with pytest.raises(ValueError, match="is of several models or prompts"):
        TextStore(f"{tmp_path}::{mixed}")
