"""`vlp data mine` on planted neighbours: found, filtered by reason, judged, ordered, resumed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.data.material import data_of, encoded, loader_of, picture
from tests.data_tools.mining import A_SHARD, D, N, counted, rows, store, write
from tests.data_tools.tools import call, read
from tests.eval.material import tiny_open_clip
from vlp.data.format import ShardWriter
from vlp.data.members import Picture
from vlp.data_tools import embed, mine
from vlp.data_tools.mine import search
from vlp.data_tools.mine.decide import Decide
from vlp.data_tools.mine.order import together
from vlp.data_tools.mine.store import Store
from vlp.data_tools.mine.write import AddMined
from vlp.eval.search.nearest import exact


@pytest.mark.parametrize(
    "sides, options",
    [
        (("image", "text"), []),
        (("text", "image"), []),
        (("image", "image"), ["--max-ratio", 1]),
        (("image", "text"), ["--choice", "softmax", "--temperature", 0.001]),
        (("image", "text"), ["--margin", 0]),
    ],
)
def test_planted_twins_are_found(
    planted: tuple[Path, Path], tmp_path: Path, sides: tuple[str, str], options: list
) -> None:
    data, embeddings = planted
    query, find = sides
    given = ["--from", query, "--find", find, "--k", 1, *options]
    call(mine, data, "--embeddings", embeddings, "--to", tmp_path / "out", *given)
    before, after = read(data), read(tmp_path / "out")
    assert list(before) == list(after)
    for i in range(N):
        meta = after[f"k{i}"].meta
        assert meta["negative_keys"] == [f"k{i ^ 1}"] and meta["extra"] == i
        assert meta["negatives"] == [f"caption {i ^ 1}"] and meta["negatives_of"] == [-1]
        assert meta["negatives_valid"] == [True] and meta["negative_kinds"] == ["mined"]
        own, [score] = meta["positive_score"], meta["negative_scores"]
        expected = 1 if query == find else 1 / np.sqrt(1 + 0.81)
        assert own == pytest.approx(expected, abs=1e-3) and score < own and "score" not in meta


def test_the_search_is_that_of_all_pairs_at_once() -> None:
    x, y = rows(1).astype(np.float32), rows(2).astype(np.float32)
    y[5] = 0  # a sample without a caption
    blocks = [(i, y[i : i + 7]) for i in range(0, N, 7)]
    scores, numbers = exact(x, iter(blocks), np.arange(N), 6)
    whole = x @ y.T
    np.fill_diagonal(whole, -np.inf)
    whole[:, 5] = -np.inf
    expected = np.argsort(-whole, axis=1)[:, :6]
    assert (numbers == expected).all() and not (numbers == 5).any()
    assert np.allclose(scores, np.take_along_axis(whole, expected, 1), atol=1e-6)
    # More are asked for than there are.
    _, numbers = exact(x[:2], iter(blocks), np.arange(2), N)
    assert ((numbers == -1).sum(1) == [2, 2]).all()


@pytest.mark.parametrize("index", ["ivf", "hnsw"])
def test_an_index_of_faiss_finds_what_the_exact_search_finds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, index: str
) -> None:
    image = rows(3)
    image[4] = 0
    opened = Store(
        list(write(tmp_path / "in").glob("*.tar")), str(store(tmp_path / "e", image, rows(4)))
    )
    opened.paths.sort()
    found = {}
    for method in ("exact", index):
        work = search.Search(opened, tmp_path, "text", "image", 5, method, cells=3)
        search.build_index(work)
        work((1, opened.paths[1]))
        found[method] = np.load(tmp_path / "00001_neighbours.npz")
        found[method] = {
            name: found[method][name] for name in ("numbers", "scores", "positive_scores")
        }
    for name, expected in found["exact"].items():
        assert np.allclose(found[index][name], expected, atol=1e-4), name


def test_faiss_is_named_where_it_is_missing(
    planted: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "faiss", None)
    data, embeddings = planted
    given = ["--embeddings", embeddings, "--to", tmp_path / "out"]
    for options in (["--index", "hnsw"], ["--cells", 3]):
        with pytest.raises(ValueError, match=r"pip install 'vlp\[mine\]'"):
            call(mine, data, *given, *options)


# In their order. Of the sample 0: 1 is of its origin, 2 says what it says, 3 scores nearly as high,
# 4 is another wording, 5 the nearest of the others.
REASONS = [
    "the same key or origin",
    "a caption of the sample",
    "at least 0.95 of its own score",
    "another wording (cosine of captions >= 0.98)",
    "among the nearest that are skipped",
]


def test_each_filter_drops_what_it_is_for_and_counts_it(tmp_path: Path, capsys) -> None:
    """One sample whose neighbours are planted, a reason each, in the order of the filters."""
    captions = {0: ["a red dog", "a hound"], 2: ["A hound!"]}
    data = write(tmp_path / "in", captions, k0={"origin": "o"}, k1={"origin": "o"})
    text = np.zeros((N, 40))
    image = np.zeros((N, 40))
    image[0, 0] = 1
    cosines = {0: 0.8, 1: 0.79, 2: 0.78, 3: 0.77, 4: 0.7, 5: 0.6, 6: 0.5, 7: 0.4}
    for i in range(N):
        cosine = cosines.get(i, 0)
        text[i, 0] = cosine
        text[i, 1 if i in (0, 4) else i + 2] = np.sqrt(1 - cosine**2)
        image[i, 39] = i > 0
    embeddings = store(tmp_path / "e", image, text)
    given = ["--embeddings", embeddings, "--to", tmp_path / "out", "--k", 2, "--skip", 1]
    call(mine, data, *given, "--top", 8)
    sample = read(tmp_path / "out")["k0"]
    assert sample.meta["negative_keys"] == ["k6", "k7"]
    assert sample.meta["negative_scores"] == pytest.approx([0.5, 0.4], abs=1e-3)

    # The other pictures fit no caption: all their neighbours score as high as their own, zero.
    out = capsys.readouterr().out
    counts = [counted(out, f"dropped: {reason}") for reason in REASONS]
    assert counts == [1, 1, 1 + 8 * (N - 1), 1, 1]


def test_choices_are_drawn_by_seed_and_key(tmp_path: Path) -> None:
    data, embeddings = write(tmp_path / "in"), store(tmp_path / "e", rows(5), rows(6))
    given = ["--embeddings", embeddings, "--k", 3, "--window", 12, "--max-ratio", "inf"]
    keys = {}
    for name, options in {
        "top": ["--choice", "top"],
        "uniform": ["--choice", "uniform"],
        "again": ["--choice", "uniform"],
        "other": ["--choice", "uniform", "--seed", 1],
        "softmax": ["--choice", "softmax", "--temperature", 0.2],
    }.items():
        call(mine, data, *given, *options, "--to", tmp_path / name)
        samples = read(tmp_path / name).values()
        keys[name] = [sample.meta["negative_keys"] for sample in samples]
        for sample in samples:
            scores = sample.meta["negative_scores"]
            assert len(set(sample.meta["negative_keys"])) == 3 and scores == sorted(scores)[::-1]
    assert keys["uniform"] == keys["again"] != keys["other"]
    assert len({str(drawn) for drawn in keys.values()}) == 4


def test_pictures_are_packed_and_reach_the_batch(
    planted: tuple[Path, Path], tmp_path: Path
) -> None:
    data, embeddings = planted
    given = ["--embeddings", embeddings, "--to", tmp_path / "out", "--k", 3, "--max-ratio", 1]
    call(mine, data, *given, "--images")
    before, after = read(data), read(tmp_path / "out")
    for sample in after.values():
        images = [Picture(before[key].image, "png") for key in sample.meta["negative_keys"]]
        assert sample.negative_images == dict(enumerate(images)) and len(images) == 3

    batch = next(loader_of(data_of(tmp_path / "out", negative_images=3), 8))
    assert batch.negative_images.shape[1] == 3 and batch.negative_images_valid.all()
    assert batch.negatives_valid.all() and batch.teacher_scores.shape == (8, 3)


class Killed(BaseException):
    """As SIGKILL: nothing of ours catches it."""


@pytest.mark.parametrize("stage", [search.Search, Decide, AddMined])
def test_a_killed_call_goes_on_and_gives_the_same_bytes(
    planted: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: Any
) -> None:
    data, embeddings = planted
    given = [data, "--embeddings", embeddings, "--choice", "uniform", "--images", "--to"]
    call(mine, *given, tmp_path / "whole")

    original, n_calls = stage.__call__, 0

    def work(self: Any, *arguments: Any) -> Any:
        nonlocal n_calls
        n_calls += 1
        if n_calls == 2:
            raise Killed
        return original(self, *arguments)

    monkeypatch.setattr(stage, "__call__", work)
    with pytest.raises(Killed):
        call(mine, *given, tmp_path / "stopped")
    monkeypatch.undo()
    call(mine, *given, tmp_path / "stopped")
    whole = {p.name: p.read_bytes() for p in (tmp_path / "whole").glob("*.tar")}
    assert len(whole) == 3
    for name, content in whole.items():
        assert (tmp_path / "stopped" / name).read_bytes() == content


# Embeddings that are none, or of others


def test_embeddings_of_other_data_or_models_are_refused_by_content(tmp_path: Path) -> None:
    data, image = write(tmp_path / "in"), rows()
    given = [data, "--to", tmp_path / "out", "--embeddings"]
    with pytest.raises(ValueError, match="holds no embeddings"):
        call(mine, *given, tmp_path / "nowhere")

    # The same names of files, other keys.
    other = store(tmp_path / "other", image, image)
    path = other / "00001.safetensors"
    path.write_bytes((other / "00002.safetensors").read_bytes())
    with pytest.raises(ValueError, match=r"for other samples than the 8 of 00001\.tar"):
        call(mine, *given, other)

    # The same name of a model, other weights.
    mixed = store(tmp_path / "mixed", image, image, weights="v")
    whole = store(tmp_path / "whole", image, image)
    (mixed / "00001.safetensors").write_bytes((whole / "00001.safetensors").read_bytes())
    with pytest.raises(ValueError, match="are of several models"):
        call(mine, *given, mixed)

    zeros = store(tmp_path / "zeros", image, np.zeros((N, D)))
    with pytest.raises(ValueError, match="holds no text embedding but zeros"):
        call(mine, *given, zeros)


def test_embeddings_are_compared_with_the_model_that_they_name(tmp_path: Path) -> None:
    """Keys, names and widths all fit; what was embedded does not."""
    data = write(tmp_path / "in")
    ref = f"local-dir:{tiny_open_clip(tmp_path / 'model')}"
    call(embed, data, "--model", ref, "--to", tmp_path / "e")
    given = ["--to", tmp_path / "out", "--embeddings"]
    call(mine, data, *given, tmp_path / "e", "--max-ratio", "inf", "--same", 2)

    # The same keys and captions, other pictures.
    with ShardWriter(tmp_path / "foreign", A_SHARD) as writer:
        for i in range(N):
            image = encoded(picture(200 + i, (12, 12)))
            writer.add(f"k{i}", image, "png", [f"caption {i}"], {})
    with pytest.raises(ValueError, match="image embeddings are not made by"):
        call(mine, tmp_path / "foreign", "--to", tmp_path / "out2", "--embeddings", tmp_path / "e")


def test_a_source_of_one_sample_has_no_neighbours(tmp_path: Path) -> None:
    with ShardWriter(tmp_path / "in") as writer:
        writer.add("k0", encoded(picture(0)), "png", ["x"])
    with pytest.raises(ValueError, match="holds 1 usable samples; expected at least 2"):
        call(mine, tmp_path / "in", "--embeddings", tmp_path, "--to", tmp_path / "out")


@pytest.mark.parametrize(
    "options, message",
    [
        (["--k", 0], "found k 0"),
        (["--window", 2], "window 2"),
        (["--top", 0], "--top 0 must be at least 1"),
        (["--order", 1], "groups of at least 2"),
        (["--judge", "blip"], "expected cross-encoder:MODEL or mllm:MODEL"),
        (["--judge", "mllm:/no/such"], "cannot be loaded as a mllm"),
    ],
)
def test_senseless_options_are_refused(
    planted: tuple[Path, Path], tmp_path: Path, options: list, message: str
) -> None:
    data, embeddings = planted
    with pytest.raises(ValueError, match=message):
        call(mine, data, "--embeddings", embeddings, "--to", tmp_path / "out", *options)


# The order


def test_the_order_is_a_permutation_of_groups_of_neighbours(
    planted: tuple[Path, Path], tmp_path: Path
) -> None:
    data, embeddings = planted
    given = ["--embeddings", embeddings, "--to", tmp_path / "out", "--order", 2]
    call(mine, data, *given)
    after = list(read(tmp_path / "out").values())
    keys = [sample.meta["source_key"] for sample in after]
    assert sorted(keys) == sorted(f"k{i}" for i in range(N)) and len(set(keys)) == N
    for first, second in zip(after[::2], after[1::2]):
        assert first.meta["origin"] == second.meta["origin"]
        numbers = {int(sample.meta["source_key"][1:]) for sample in (first, second)}
        assert len(numbers) == 2 and min(numbers) ^ 1 == max(numbers)

    # As `data.together` reads it.
    batch = next(loader_of(data_of(tmp_path / "out", together=2), 8))
    origins = {sample.key: sample.meta["origin"] for sample in after}
    drawn = [origins[key] for key in batch.key]
    assert drawn[::2] == drawn[1::2] and len(set(drawn)) == 4


@pytest.mark.parametrize("size", [2, 3, 5])
@pytest.mark.parametrize("seed", range(4))
def test_any_graph_gives_a_permutation(size: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    found = [rng.permutation(np.delete(np.arange(31), i))[: rng.integers(0, 8)] for i in range(31)]
    order, n_alone = together(found, size)
    assert sorted(order.tolist()) == list(range(31))
    for start in range(0, 31 - n_alone, size):
        first, *others = order[start : start + size].tolist()
        assert set(others) <= set(found[first].tolist())
