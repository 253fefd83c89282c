"""`vlp data sheet`, `stats`, `reshard` and `embed`: what they show, count, cut and embed, also of
damaged shards.
"""

from __future__ import annotations

import hashlib
import io
import json
import re
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open

from tests.data.material import encoded, picture
from tests.data_tools.tools import call, read
from tests.eval.material import tiny_open_clip
from tests.eval.page_material import Reader
from vlp.data.format import ShardWriter, index
from vlp.data_tools import embed, inspect, reshard, sheet, stats

HOSTILE = '<script>alert("x")</script> & <img src=x onerror=alert(1)>'
CAPTIONS = [
    [HOSTILE, "ein Hund auf dem Sofa"],
    ["two dogs and three cats", "two dogs on a sofa"],
    [],
    ["собака"],
]


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """30 samples in shards of 8; sample 5's picture is broken, and the second shard ends in
    mid-sample.
    """
    with ShardWriter(tmp_path / "in", 8) as writer:
        for i in range(30):
            image = b"no picture" if i == 5 else encoded(picture(i, (60 + i, 40)))
            writer.add(None, image, "png", CAPTIONS[i % 4], {"number": i}, cls=i)
    path = tmp_path / "in" / "00001.tar"
    path.write_bytes(path.read_bytes()[:-15_000])
    return tmp_path / "in"


def usable(folder: Path) -> int:
    return sum(shard.count for shard in index(sorted(folder.glob("*.tar"))))


def test_a_page_of_samples_holds_pictures_and_captions_as_text(
    source: Path, tmp_path: Path, capsys
) -> None:
    n = usable(source)
    assert 24 <= n < 30
    call(sheet, source, "--to", tmp_path / "a.html", "--samples", 100)
    got = Reader((tmp_path / "a.html").read_text())
    assert (
        got.count("img") == n - 1
        and got.count("script") == got.text.count("no readable image") == 1
    )
    assert HOSTILE in got.text and "ein Hund auf dem Sofa" in got.text and "собака" in got.text
    assert all(link.startswith(("#", "data:image/jpeg;base64,")) for link in got.resources)
    assert (
        f"{n} samples, 1 without a readable picture; 3 problems in the shards read"
        in capsys.readouterr().out
    )


def test_a_sheet_shows_negatives_under_their_caption(tmp_path: Path) -> None:
    meta = {
        "negatives": ["no lion", "no <dog>", "nothing", "masked"],
        "negatives_of": [1, 0, -1, 0],
    }
    with ShardWriter(tmp_path / "in") as writer:
        writer.add(
            "k",
            b"x",
            "jpg",
            ["a dog", "a lion"],
            meta | {"negatives_valid": [True, True, True, False]},
        )
    call(sheet, tmp_path / "in", "--to", tmp_path / "a.html")
    page = (tmp_path / "a.html").read_text()
    lines = re.findall(r"<li><(?:span|small)>(.*?)</", page)
    assert lines == [
        "a dog",
        "not: no &lt;dog&gt;",
        "not: nothing",
        "a lion",
        "not: no lion",
        "not: nothing",
    ]


def test_a_sheet_without_a_readable_picture_says_so_in_each_place(
    shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    call(sheet, shards, "--to", tmp_path / "a.png", "--columns", 3)
    assert "6 samples, 6 without a readable picture" in capsys.readouterr().out
    with Image.open(tmp_path / "a.png") as picture:
        assert picture.width == 3 * (96 + 8) + 8  # the least width of a place


def test_a_sheet_s_samples_are_its_seed_s(source: Path, tmp_path: Path) -> None:
    drawn = {}
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        call(
            sheet,
            source,
            "--to",
            tmp_path / f"{name}.png",
            "--samples",
            6,
            "--columns",
            3,
            "--seed",
            seed,
            "--size",
            64,
        )
        drawn[name] = (tmp_path / f"{name}.png").read_bytes()
    assert drawn["a"] == drawn["b"] != drawn["c"]
    image = np.asarray(Image.open(io.BytesIO(drawn["a"])))
    assert image.shape[2] == 3 and image.shape[1] == 3 * (64 + 8) + 8 and (image < 128).any()
    # Fewer samples than shards: no more shards are read.
    few = sheet.draw(sorted(source.glob("*.tar")), 2, 3, Counter())
    assert len(few) == 2
    with pytest.raises(ValueError, match=r"neither \.html nor \.png"):
        call(sheet, source, "--to", tmp_path / "a.pdf")


@pytest.mark.parametrize("tool", [sheet, pytest.param(inspect, marks=pytest.mark.slow)])
def test_a_look_by_processes_is_that_of_one(source: Path, tmp_path: Path, capsys, tool) -> None:
    seen = []
    for processes in (1, 2):
        if tool is sheet:
            call(tool, source, "--to", tmp_path / "a.html", "--processes", processes)
            seen.append((tmp_path / "a.html").read_text())
        else:
            call(tool, source, "--json", tmp_path / "a.json", "--processes", processes)
            told = json.loads((tmp_path / "a.json").read_text())
            seen.append({name: told[name] for name in told if not name.endswith("_a_s")})
    assert seen[0] == seen[1] and len(seen[0]) > 15


def test_stats_count_what_a_loop_counts(source: Path, tmp_path: Path, capsys) -> None:
    call(stats, source, "--to", tmp_path / "out")
    told = json.loads((tmp_path / "out" / "stats.json").read_text())
    kept = list(read(source).values())
    captions = [caption for sample in kept for caption in sample.captions]
    found = {name: entry["values"] for name, entry in told["distributions"].items()}
    assert (
        told["counts"]["samples read"] == len(kept) and told["counts"]["unreadable: pictures"] == 1
    )
    assert told["counts"]["unreadable: problems of the input shards"] == 3
    assert found["words"] == {
        str(k): n for k, n in Counter(len(c.split()) for c in captions).items()
    }
    assert found["width"] == {str(60 + s.meta["number"]): 1 for s in kept if s.meta["number"] != 5}
    assert found["height"] == {"40": len(kept) - 1}
    n_cats, n_dogs = captions.count("two dogs and three cats"), captions.count("two dogs on a sofa")
    assert found["numbers"] == {"2": n_cats + n_dogs, "3": n_cats}
    languages = {"de": "ein Hund auf dem Sofa", "ru": "собака"}
    assert all(
        found["language"][code] == captions.count(caption) for code, caption in languages.items()
    )
    widths = sorted(60 + s.meta["number"] for s in kept if s.meta["number"] != 5)
    quantiles = told["distributions"]["width"]["quantiles"]
    assert [quantiles[name] for name in ("min", "median", "max")] == [
        widths[0],
        widths[(len(widths) - 1) // 2],
        widths[-1],
    ]
    got = Reader((tmp_path / "out" / "stats.html").read_text())
    assert set(got.sections) == {"counts", "pictures", "captions"} and got.count("svg") == 10
    bars = [attrs for tag, attrs in got.tags if tag == "rect"]
    assert len(bars) > 40 and all(
        float(bar["y"]) >= 0 and float(bar["y"]) + float(bar["height"]) <= 190 for bar in bars
    )


def test_bins_hold_every_value_once() -> None:
    rng, n = np.random.default_rng(0), 0
    for values in (
        rng.integers(0, 5, 100),
        rng.integers(10, 4000, 500),
        rng.normal(1, 0.3, 300).round(2),
        np.array([7]),
    ):
        counter = Counter(values.tolist())
        bars = stats.binned(counter)
        assert sum(times for _, times in bars) == len(values) and len(bars) <= 24
        n += 1
    assert n == 4 and stats.binned(Counter()) == []


def order(folder: Path) -> list[int]:
    return [sample.meta["number"] for sample in read(folder).values()]


def test_resharding_keeps_every_sample_and_the_order(source: Path, tmp_path: Path) -> None:
    call(reshard, source, "--to", tmp_path / "out", "--samples-per-shard", 7)
    before, after = read(source), read(tmp_path / "out")
    assert list(before.values()) == list(after.values())
    counts = [shard.count for shard in index(sorted((tmp_path / "out").glob("*.tar")))]
    assert counts == [7] * (len(before) // 7) + [len(before) % 7] * (len(before) % 7 > 0)


def test_a_shuffle_is_its_seed_s_for_any_processes_and_parts(source: Path, tmp_path: Path) -> None:
    runs = {"a": (5,), "b": (5, "--processes", 2), "c": (6,)}
    for name, (seed, *options) in runs.items():
        call(
            reshard,
            source,
            "--to",
            tmp_path / name,
            "--samples-per-shard",
            10,
            "--shuffle",
            seed,
            *options,
        )
    for part in ("2/2", "1/2"):
        call(
            reshard,
            source,
            "--to",
            tmp_path / "d",
            "--samples-per-shard",
            10,
            "--shuffle",
            5,
            "--part",
            part,
        )
    assert (
        order(tmp_path / "a")
        == order(tmp_path / "b")
        == order(tmp_path / "d")
        != order(tmp_path / "c")
    )
    assert sorted(order(tmp_path / "a")) == order(source) != order(tmp_path / "a")
    for path in (tmp_path / "a").glob("*.tar"):
        assert (
            path.read_bytes()
            == (tmp_path / "b" / path.name).read_bytes()
            == (tmp_path / "d" / path.name).read_bytes()
        )


def test_shards_end_before_the_sample_that_exceeds_their_bytes() -> None:
    rng, n = np.random.default_rng(0), 0
    for _ in range(50):
        lengths = rng.integers(1, 100, rng.integers(1, 40))
        n_samples, n_bytes = int(rng.integers(0, 8)), int(rng.choice([0, 50, 150]))
        cuts = reshard._cuts(lengths, np.arange(len(lengths)), n_samples, n_bytes)
        expected, start = [], 0
        for i in range(1, len(lengths) + 1):
            if (
                i == len(lengths)
                or (n_samples and i - start == n_samples)
                or (n_bytes and lengths[start : i + 1].sum() > n_bytes)
            ):
                expected.append((start, i))
                start = i
        assert cuts == expected
        n += 1
    assert n == 50


def test_equal_keys_meet_in_a_new_shard(source: Path, tmp_path: Path) -> None:
    twice = f"{source}::{source}"
    with pytest.raises(ValueError, match="appears twice in shard 0; --renumber gives new keys"):
        call(reshard, twice, "--to", tmp_path / "a")
    call(reshard, twice, "--to", tmp_path / "b", "--renumber")
    assert len(read(tmp_path / "b")) == 2 * len(read(source))
    assert [s.meta["source_key"] for s in read(tmp_path / "b").values()] == 2 * list(read(source))


def test_embeddings_lie_beside_the_samples_they_are_of(
    source: Path, tmp_path: Path, capsys
) -> None:
    from vlp.eval.models import load

    ref = f"local-dir:{tiny_open_clip(tmp_path / 'model')}"
    call(embed, source, "--to", tmp_path / "out", "--model", ref, "--batch", 3)
    encoder, n = load(ref), 0
    for path in sorted(source.glob("*.tar")):
        with safe_open(tmp_path / "out" / f"{path.stem}.safetensors", "pt") as file:
            image, text, about = file.get_tensor("image"), file.get_tensor("text"), file.metadata()
        [shard] = index([path])
        kept = [s for s in read(source).values() if s.key.startswith(path.stem)]
        assert (
            image.dtype == text.dtype == torch.float16
            and len(image) == len(text) == len(kept) == shard.count
        )
        keys = hashlib.sha256("\n".join(s.key for s in kept).encode()).hexdigest()
        model = {"model": ref, "weights": encoder.fingerprint[:16], "scale": str(encoder.scale)}
        assert about == model | {"keys": keys}
        for sample, x, t in zip(kept, image.float(), text.float()):
            number = sample.meta["number"]
            expected = (
                torch.zeros_like(x)
                if number == 5
                else encoder.encode_images([picture(number, (60 + number, 40))])[0]
            )
            assert torch.allclose(x, expected, atol=1e-3)
            caption = (
                encoder.encode_texts([sample.captions[0]])[0]
                if sample.captions
                else torch.zeros_like(t)
            )
            assert torch.allclose(t, caption, atol=1e-3)
            n += 1
    assert n == usable(source)
    said = capsys.readouterr().out
    assert "unreadable: pictures" in said and "samples without a caption" in said
    with pytest.raises(ValueError, match="several shards are called 00000"):
        call(embed, f"{source}::{source}", "--to", tmp_path / "b", "--model", ref)
