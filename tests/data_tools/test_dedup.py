"""`vlp data dedup`: planted copies, naive references for neighbours and for who stays, evaluation
sets, embeddings.
"""

from __future__ import annotations

import io
import json
import re
import sys
import tarfile
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.data.material import REAL, needs_data
from tests.data_tools.tools import call, read
from tests.eval.material import tiny_open_clip
from vlp.data.format import ShardWriter
from vlp.data.members import Picture
from vlp.data_tools import dedup, embed, scenes
from vlp.data_tools.dedup.drop import Decision, DropCopies
from vlp.data_tools.dedup.near import COLORS, FINGERPRINT, Limits, decide, fingerprint, neighbours
from vlp.data_tools.scenes.draw import encode


def recoded(data: bytes, quality: int = 60, scale: float = 1.0) -> bytes:
    file = io.BytesIO()
    image = Image.open(io.BytesIO(data)).convert("RGB")
    image.resize((round(image.width * scale), round(image.height * scale))).save(
        file, "JPEG", quality=quality
    )
    return file.getvalue()


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """in/: 24 scenes, a copy of every fourth right after it, a broken picture; eval/: copies of the
    scenes 1 and 5.
    """
    folder = tmp_path_factory.mktemp("planted")
    pictures = [encode(scenes.generate(i).image) for i in range(24)]
    with ShardWriter(folder / "in", 7) as writer:
        for i, data in enumerate(pictures):
            writer.add(f"scene{i}", data, "jpg", [f"scene {i}"])
            if i % 4 == 0:
                writer.add(f"copy{i}", recoded(data), "jpg", ["copy"])
        writer.add("broken", b"no picture", "jpg", ["broken"])
    with ShardWriter(folder / "eval", 7) as writer:
        for i in (1, 5):
            writer.add(f"item{i}", recoded(pictures[i]), "jpg", ["held out"])
    return folder


COPIES = {f"copy{i}" for i in range(0, 24, 4)}


@pytest.mark.parametrize(
    "options, gone",
    [
        ([], COPIES),
        (["--against", "EVAL"], COPIES | {"scene1", "scene5"}),
        (["--against", "EVAL", "--keep-copies", "--processes", "2"], {"scene1", "scene5"}),
        (["--against", "EVAL", "--search", "buckets"], COPIES | {"scene1", "scene5"}),
    ],
)
def test_planted_copies_go_and_nothing_else(
    planted: Path, tmp_path: Path, capsys, options: list[str], gone: set[str]
) -> None:
    options = [str(planted / "eval") if option == "EVAL" else option for option in options]
    before = read(planted / "in")
    for _ in range(2):  # the second call finds everything finished
        assert call(dedup, planted / "in", "--to", tmp_path / "out", *options) == 0
        after = read(tmp_path / "out")
        assert list(after) == [key for key in before if key not in gone]
        said = capsys.readouterr().out
        for reason, n in {
            "copies of an earlier sample": len(gone & COPIES),
            "held by --against": len(gone - COPIES),
        }.items():
            assert re.search(rf"dropped: {reason} +{n}\b", said) or n == 0
        assert re.search(r"unreadable: pictures +1\b", said)
        assert not (tmp_path / "out" / "_search").exists()
    told = [
        json.loads(line) for line in (tmp_path / "out" / "copies.jsonl").read_text().splitlines()
    ]
    shards = {
        str(path): list(read_one(path))
        for path in [*(planted / "in").glob("*.tar"), *(planted / "eval").glob("*.tar")]
    }
    pairs = {
        shards[t["shard"]][t["sample"]]: shards[t["copy_of"]["shard"]][t["copy_of"]["sample"]]
        for t in told
    }
    assert pairs == {
        key: re.sub("copy", "scene", key) if key in COPIES else re.sub("scene", "item", key)
        for key in gone
    }


LISTS = (
    "negatives", "negatives_of", "negatives_valid", "negative_kinds", "negative_scores",
    "counterfactuals", "counterfactuals_of", "clip_scores",
)  # fmt: skip


def alike(
    folder: Path, samples: list[tuple[str, list[str], dict[str, Any], bool]], *options: Any
) -> dict[str, Any]:
    """Samples of one picture in shards of two, one other in between, after dedup."""
    image = encode(scenes.generate(0).image)
    with ShardWriter(folder / "in", 2) as writer:
        for i, (key, captions, meta, pictured) in enumerate(samples):
            pictures = {0: Picture(key.encode(), "jpg")} if pictured else {}
            writer.add(key, image, "jpg", captions, meta, negative_images=pictures)
            writer.add(f"other{i}", encode(scenes.generate(10 + i).image), "jpg", ["another"])
    call(dedup, folder / "in", "--to", folder / "out", *options)
    after = read(folder / "out")
    assert {key for key in after if key.startswith("other")} == {
        f"other{i}" for i in range(len(samples))
    }
    return after


def test_a_copy_leaves_its_captions_and_what_belongs_to_them(tmp_path: Path, capsys) -> None:
    first = {
        "negatives": ["a given", "no dog", "a cat"],
        "negatives_of": [-1, 0, 1],
        "negative_kinds": list("xyz"),
        "negative_scores": [1, 2, 3],
        "clip_scores": [0.1, 0.2],
        "uid": "first",
    }
    second = {
        "negatives": ["two cats", "no dog", "a cat"],
        "negatives_of": [1, 0, 0],
        "negatives_valid": [True, False, True],
        "negative_scores": [4, 5, 6],
        "counterfactuals": ["two cats", "two birds"],
        "counterfactuals_of": [1, 0],
        "clip_scores": [0.3, 0.4],
        "uid": "second",
    }
    samples = [
        ("a", ["a dog", "an animal"], first, False),
        ("b", ["a dog", "one cat"], second, False),
        ("c", ["two cats"], {"counterfactuals": ["three cats"]}, True),
    ]
    after = alike(tmp_path, samples)
    assert set(after) == {"a", "other0", "other1", "other2"}
    sample = after["a"]
    assert sample.captions == ("a dog", "an animal", "one cat", "two cats")
    assert (sample.meta["uid"], sample.meta["merged_keys"]) == ("first", ["b", "c"])
    assert {name: sample.meta[name] for name in LISTS if name in sample.meta} == {
        # "two cats" is what a copy says of the picture; "no dog" of the first caption is there
        # already, masked or not.
        "negatives": ["a given", "no dog", "a cat", "a cat"],
        "negatives_of": [-1, 0, 1, 0],
        "negatives_valid": [True] * 4,
        "negative_kinds": ["x", "y", "z", "given"],
        "negative_scores": [1, 2, 3, 6],
        "counterfactuals": ["two birds", "three cats"],
        "counterfactuals_of": [0, 3],
    }
    assert not sample.negative_images
    said = capsys.readouterr().out
    for line, n in {
        "dropped: copies of an earlier sample": 2,
        "merged: copies into an earlier sample": 2,
        "merged: captions that the earlier sample did not have": 2,
        "negatives dropped: a copy's caption says them": 1,
        "counterfactuals dropped: a copy's caption says them": 1,
        "clip_scores dropped: not all copies have them": 1,
    }.items():
        assert re.search(rf"{re.escape(line)} +{n}\b", said), (line, said)


def test_copies_may_lose_their_captions_if_told_so(tmp_path: Path) -> None:
    after = alike(
        tmp_path,
        [("a", ["a dog"], {}, False), ("b", ["one dog"], {}, False)],
        "--captions",
        "keep-first",
    )
    assert (
        after["a"].captions == ("a dog",)
        and "merged_keys" not in after["a"].meta
        and "b" not in after
    )


def test_scores_and_the_image_of_a_negative_follow(tmp_path: Path) -> None:
    """An image goes where its negative goes."""
    first = {"negatives": ["a cat"], "clip_scores": [0.1], "license": None}
    second = {"negatives": ["two", "three"], "negatives_of": [0, -1], "clip_scores": [0.3, 0.1]}
    samples = [("a", ["a dog"], first, False), ("b", ["one dog", "a dog"], second, True)]
    sample = alike(tmp_path, samples)["a"]
    assert sample.captions == ("a dog", "one dog") and sample.meta["clip_scores"] == [0.1, 0.3]
    assert sample.meta["negatives"] == ["a cat", "two", "three"]
    assert sample.meta["negatives_of"] == [0, 1, -1]
    assert sample.negative_images == {1: Picture(b"b", "jpg")}
    assert sample.meta["license"] is None and "negatives_valid" not in sample.meta


def test_a_sample_takes_no_more_captions_than_the_index_counts(tmp_path: Path, capsys) -> None:
    samples = [
        (key, [f"{key} {i}" for i in range(n)], {}, False)
        for key, n in (("a", 200), ("b", 56), ("c", 55))
    ]
    sample = alike(tmp_path, samples)["a"]
    assert len(sample.captions) == 255 and sample.meta["merged_keys"] == ["c"]
    assert re.search(
        r"not merged: more captions than a sample may hold +1\b", capsys.readouterr().out
    )


def test_a_copy_that_changed_after_indexing_costs_its_captions_only(tmp_path: Path, capsys) -> None:
    alike(tmp_path, [("a", ["a dog"], {}, False), ("b", ["one dog"], {}, False)])
    path = tmp_path / "in" / "00001.tar"
    decision = Decision(tmp_path / "out", sorted((tmp_path / "in").glob("*.tar")), [2, 2], 0)
    change = DropCopies(decision, True, [None, None])
    decision.check_unchanged()  # reads the index
    path.write_bytes(path.read_bytes().replace(b"one dog", b"two dog"))

    counts: Counter[str] = Counter()
    kept = read(tmp_path / "in")
    after = list(change([kept["a"], kept["other0"]], 0, counts))
    assert [changed.captions for changed in after] == [["a dog"], ["another"]]
    assert counts == {"not merged: copies that changed after they were indexed": 1}
    assert f"{path}: the members of 'b' are not those" in capsys.readouterr().err


@pytest.mark.parametrize("n_now", [3, 4, 5])
def test_shards_that_change_between_comparing_and_writing_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, n_now: int
) -> None:
    def write(first: int, n: int) -> None:
        with ShardWriter(tmp_path / "in", 9, overwrite=True) as writer:
            for i in range(first, first + n):
                writer.add(f"k{i}", encode(scenes.generate(i).image), "jpg", ["a"])

    write(0, 4)
    size = (tmp_path / "in" / "00000.tar").stat().st_size
    call(dedup, tmp_path / "in", "--to", tmp_path / "out")
    # As a call that was killed after comparing left the folder.
    for name in ("00000.tar", "00000_stats.json", "00000_dedup.json", "_index.bin"):
        (tmp_path / "out" / name).unlink()
    write(10, n_now)

    note = tmp_path / "out" / "_dedup.json"
    now = (tmp_path / "in" / "00000.tar").stat().st_size
    note.write_text(note.read_text().replace(str(size), str(now)))
    with pytest.raises(ValueError, match=rf"other samples \({n_now}\) than those \(4\)"):
        call(dedup, tmp_path / "in", "--to", tmp_path / "out")
    assert not list((tmp_path / "out").glob("*.tar*"))


def test_a_decision_of_an_earlier_version_is_taken_over(planted: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    call(dedup, planted / "in", "--to", out)
    # As a call of then left the folder, killed after it had decided that one sample goes.
    for path in [*out.glob("_dropped*"), *out.glob("*.tar"), *out.glob("*_dedup.json")]:
        if path.name != "_dedup.json":
            path.unlink()
    copy_of = np.full(31, -1)
    copy_of[2] = 0
    # One about other samples would let all copies stay, or end in words of numpy.
    for other in (copy_of[:30], copy_of[:, None], copy_of.astype(float)):
        np.save(out / "_copies.npy", other)
        with pytest.raises(ValueError, match="no decision about these 31 samples"):
            call(dedup, planted / "in", "--to", out)
    np.save(out / "_copies.npy", copy_of)

    call(dedup, planted / "in", "--to", out)
    before = list(read(planted / "in"))
    assert list(read(out)) == [*before[:2], *before[3:]]


def read_one(path: Path) -> list[str]:
    from vlp.data_tools._run.shards import samples

    return [sample.key for sample in samples(path, Counter())]


def test_neighbours_are_those_of_a_loop_over_all_pairs() -> None:
    rng, n_found, n_color = np.random.default_rng(0), 0, 0
    prints = np.zeros(160, FINGERPRINT)
    prints["hash"][:80] = rng.integers(0, 2**64, 80, np.uint64)
    for i in range(80, 160):  # near one of the first, by 0 to 9 bits
        flips = sum(1 << int(bit) for bit in rng.choice(64, rng.integers(0, 10), False))
        prints["hash"][i] = prints["hash"][i - 80] ^ np.uint64(flips)
    prints["grid"] = rng.integers(0, 30, (160, 1), np.uint8) + rng.integers(
        0, 3, (160, 48), np.uint8
    )
    for distance in (0, 1, 4, 8):
        expected: dict[int, list[int]] = {}
        for i in range(160):
            for j in range(160):
                near = int(prints["hash"][i] ^ prints["hash"][j]).bit_count() <= distance
                alike = np.abs(prints["grid"][i].astype(int) - prints["grid"][j]).mean() <= COLORS
                n_color += near and not alike
                if i != j and near and alike:
                    expected.setdefault(i, []).append(j)
        assert neighbours(prints, distance) == expected
        n_found += sum(map(len, expected.values()))
    assert n_found > 100 and n_color > 50


@pytest.mark.parametrize("keep_copies", [False, True])
@pytest.mark.parametrize("block", [4, 1000])
def test_who_stays_is_decided_as_by_a_loop(
    monkeypatch: pytest.MonkeyPatch, keep_copies: bool, block: int
) -> None:
    monkeypatch.setattr("vlp.data_tools.dedup.near.BLOCK", block)
    n_dropped = n_by_cosine = 0
    for seed in range(12):
        rng = np.random.default_rng(seed)
        prints = np.zeros(40, FINGERPRINT)
        base = rng.integers(0, 2**64, 12, np.uint64)
        # A chain of flips: near is not transitive, so the order decides.
        prints["hash"] = base[rng.integers(0, 12, 40)] ^ (
            (np.uint64(1) << rng.integers(0, 6, 40, np.uint64)) - np.uint64(1)
        )
        prints["seen"] = rng.random(40) < 0.9
        rows = rng.normal(size=(10, 8))[rng.integers(0, 10, 40)] + 0.35 * rng.normal(size=(40, 8))
        rows = (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float16)
        limits, n_fixed = Limits(2, 0.97, keep_copies), 8
        copy_of, cosines = decide(prints, [rows[:8], rows[8:21], rows[21:]], n_fixed, limits)
        stays = list(range(n_fixed))
        for j in range(n_fixed, 40):
            near = [
                i
                for i in stays
                if prints["seen"][i]
                and prints["seen"][j]
                and int(prints["hash"][i] ^ prints["hash"][j]).bit_count() <= 2
            ]
            similar = [
                i for i in stays if rows[i].astype(np.float32) @ rows[j].astype(np.float32) >= 0.97
            ]
            if near or similar:
                assert copy_of[j] in (near or similar) and np.isnan(cosines[j]) == bool(near)
                n_dropped, n_by_cosine = n_dropped + 1, n_by_cosine + (not near)
            else:
                assert copy_of[j] == -1
                stays += [] if keep_copies else [j]
        assert (copy_of[:n_fixed] == -1).all()
    assert n_dropped > 60 and n_by_cosine > 10


def test_color_tells_shapes_apart_that_a_gray_hash_takes_for_one() -> None:
    colors = ((180, 60, 60), (60, 112, 60), (60, 60, 60))
    red, green, dark = (Image.new("RGB", (64, 64), color) for color in colors)
    (hash_red, grid_red), (hash_green, grid_green) = fingerprint(red), fingerprint(green)
    assert hash_red == hash_green == fingerprint(dark)[0]
    assert np.abs(grid_red.astype(int) - grid_green).mean() > COLORS


def test_embeddings_find_copies_that_hashes_miss(planted: Path, tmp_path: Path) -> None:
    ref = f"local-dir:{tiny_open_clip(tmp_path / 'model')}"
    with ShardWriter(tmp_path / "in") as writer:
        for key, sample in read(planted / "in").items():
            writer.add(key, sample.image, "jpg", ["x"])
            if key == "scene0":
                writer.add("same", sample.image, "jpg", ["x"])
    call(embed, tmp_path / "in", "--to", tmp_path / "e", "--model", ref)
    options = ("--distance", -1, "--embeddings", tmp_path / "e", "--cosine", 0.999999)
    call(dedup, tmp_path / "in", "--to", tmp_path / "out", *options)
    assert set(read(tmp_path / "in")) - set(read(tmp_path / "out")) == {"same"}
    assert json.loads((tmp_path / "out" / "copies.jsonl").read_text())["by"] == "cosine 1.000"
    with pytest.raises(
        ValueError,
        match=r"for other samples than the 7 of 00000\.tar; make it with `vlp data embed`",
    ):
        call(dedup, planted / "in", "--to", tmp_path / "other", *options)
    call(embed, planted / "eval", "--to", tmp_path / "held", "--model", ref)
    options = (
        "--against",
        planted / "eval",
        *options[:4],
        "--embeddings",
        tmp_path / "held",
        "--cosine",
        0.99,
        "--search",
        "buckets",
    )
    call(dedup, tmp_path / "in", "--to", tmp_path / "both", *options)
    assert {"same", "scene1", "scene5"} <= set(read(tmp_path / "in")) - set(read(tmp_path / "both"))


@needs_data
def test_photos_recoded_and_halved_are_found_and_distinct_ones_are_not() -> None:
    from vlp.data.picture import rgb

    with tarfile.open(REAL / "caltech101.tar") as tar:
        photos = [
            tar.extractfile(member).read()
            for member in [m for m in tar.getmembers() if m.isfile()][::80]
        ]
    versions = [photos, [recoded(p, 40) for p in photos], [recoded(p, 90, 0.5) for p in photos]]
    prints = np.array(
        [(*fingerprint(rgb(data, side=64)), True) for version in versions for data in version],
        FINGERPRINT,
    )
    copy_of, _ = decide(prints, [], 0, Limits(4, 1.0, False))
    n = len(photos)
    assert n > 100 and (copy_of[:n] == -1).mean() > 0.98
    for k in (1, 2):
        assert (copy_of[k * n : (k + 1) * n] == np.arange(n)).mean() > 0.95


@pytest.mark.parametrize(
    "options, message",
    [
        (["--distance", 20], "no number of bits from 0 to 8"),
        (["--distance", -1], "nothing to compare"),
        (
            ["--embeddings", "e", "--against", "IN"],
            "--embeddings is given 1 times; expected once for the source",
        ),
        (["--cosine", 0], r"must lie in \(0, 1\]"),
        (["--probes", 0], "must be at least 1"),
        (["--memory", "nan"], r"must lie in \[0.05, 10000\] \(GB\)"),
        (["--keep-copies"], "drops only what --against SHARDS holds"),
    ],
)
def test_senseless_options_are_refused(
    planted: Path, tmp_path: Path, options: list, message: str
) -> None:
    options = [planted / "in" if option == "IN" else option for option in options]
    with pytest.raises(ValueError, match=message):
        call(dedup, planted / "in", "--to", tmp_path / "out", *options)


def test_a_missing_faiss_is_told_before_anything_begins(
    planted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "faiss", None)
    options = ["--embeddings", tmp_path, "--search", "buckets"]
    with pytest.raises(ValueError, match=r"pip install 'vlp\[mine\]'"):
        call(dedup, planted / "in", "--to", tmp_path / "out", *options)
    assert not list((tmp_path / "out").glob("*"))
