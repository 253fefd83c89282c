"""`vlp data counting` on shards: which captions count, counterfactuals, balance, the detector's
say.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path

import pytest

from tests.data_tools.tools import CAPTIONS, call, read
from vlp.data.format import ShardWriter
from vlp.data.members import Picture
from vlp.data_tools import counting, scenes

PICTURE = Picture(b"y", "jpg")  # of a negative


def test_counting_pairs(shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert call(counting, shards, "--to", tmp_path / "out") == 0
    after = read(tmp_path / "out")
    assert {key: sample.meta["number"] for key, sample in after.items()} == {
        "k0": 2,
        "k1": 3,
        "k3": 10,
    }
    sample = after["k3"]
    assert (
        sample.captions == ("a man often attends to ten horses",)
        and sample.meta["all_captions"] == CAPTIONS[3]
    )
    texts = sample.meta["counterfactuals"]
    numbers = "two three four five six seven eight nine".split()
    assert sorted(texts) == sorted(f"a man often attends to {n} horses" for n in numbers)
    assert texts != [f"a man often attends to {n} horses" for n in numbers]
    out = capsys.readouterr().out
    expected = {
        "captions dropped: several numbers": 1,
        "dropped: no caption counts": 3,
        "samples written": 3,
        "number 10": 1,
    }
    for line, n in expected.items():
        assert re.search(rf"{line} +{n}\b", out), (line, out)


def test_what_belongs_to_other_captions_goes_with_them(tmp_path: Path) -> None:
    lists = {
        "negatives": ["given", "of 1", "of 0", "of 1 too"],
        "negatives_of": [-1, 1, 0, 1],
        "negative_kinds": list("abcd"),
        "negatives_valid": [True, False, True, True],
        "negative_scores": [1, 2, 3, 4],
        "clip_scores": [0.1, 0.2],
    }
    later = {"negatives": ["of 0", "of 1"], "negatives_of": [0, 1]}
    with ShardWriter(tmp_path / "in") as writer:
        for key, meta in (("a", lists), ("b", later)):
            captions = ["a dog", "two dogs"]
            writer.add(key, b"x", "jpg", captions, meta, negative_images={0: PICTURE})
    call(counting, tmp_path / "in", "--to", tmp_path / "out")
    after = read(tmp_path / "out")
    assert {name: after["a"].meta[name] for name in lists} == {
        "negatives": ["given", "of 1", "of 1 too"],
        "negatives_of": [-1, 0, 0],
        "negative_kinds": list("abd"),
        "negatives_valid": [True, False, True],
        "negative_scores": [1, 2, 4],
        "clip_scores": [0.2],
    }
    assert (after["b"].meta["negatives"], after["b"].meta["negatives_of"]) == (["of 1"], [0])
    # It shows the first negative.
    assert (after["a"].negative_images, after["b"].negative_images) == ({0: PICTURE}, {})


def test_counting_without_any_number_is_an_error(tmp_path: Path) -> None:
    with ShardWriter(tmp_path / "in") as writer:
        writer.add("a", b"x", "jpg", ["a dog", "often"])
    with pytest.raises(ValueError, match=r"no caption in .* counts anything from two to ten"):
        call(counting, tmp_path / "in", "--to", tmp_path / "out")


def test_balance() -> None:
    kept = [[(f"{n}-{i}", 0, n) for n in range(2, 11) for i in range(12 - n)], [("other", 0, 5)]]
    equal = counting.balance(kept, "equal", 0)
    assert Counter(n for shard in equal for _, n in shard.values()) == dict.fromkeys(
        range(2, 11), 2
    )
    most = counting.balance(kept, "4", 0)
    assert Counter(n for shard in most for _, n in shard.values()) == {
        n: min(4, 12 - n) for n in range(2, 11)
    }
    assert sum(map(len, counting.balance(kept, "none", 0))) == sum(map(len, kept))
    assert equal == counting.balance(kept, "equal", 0) != counting.balance(kept, "equal", 1)
    with pytest.raises(ValueError, match="no caption counts 2, 3, 4, 6, 7, 8, 9, 10"):
        counting.balance([[("a", 0, 5)]], "equal", 0)


@pytest.mark.parametrize(
    "options, message",
    [
        (["--balance", "even"], "expected none, equal, or a number"),
        (["--counterfactuals", "9"], "1 to 8"),
        (["--threshold", "1.5"], r"in \(0, 1\)"),
    ],
)
def test_senseless_counting_options_are_refused(
    shards: Path, tmp_path: Path, options: list[str], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        call(counting, shards, "--to", tmp_path / "out", *options)


def test_two_processes_count_what_one_counts(shards: Path, tmp_path: Path) -> None:
    call(counting, shards, "--to", tmp_path / "one")
    call(counting, shards, "--to", tmp_path / "two", "--processes", 2)
    one, two = (
        {p.name: p.read_bytes() for p in (tmp_path / n).glob("*.tar")} for n in ("one", "two")
    )
    assert one == two and len(one) == 2  # one shard counts nothing


def test_the_detector_must_agree_and_is_asked_once(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from vlp.data_tools.counting import detector

    asked = []

    def seen(image: bytes, model: str, threshold: float) -> tuple[str, int]:
        asked.append(image)
        return {b"image 0": ("car", 2), b"image 1": ("dog", 4)}.get(image, ("", 0))

    monkeypatch.setattr(detector, "most_frequent", seen)
    for _ in range(2):
        call(counting, shards, "--to", tmp_path / "out", "--detector", "any")
    assert list(read(tmp_path / "out")) == ["k0"] and len(asked) == 3
    notes = [
        json.loads(p.read_text())["counts"]
        for p in sorted((tmp_path / "out").glob("*_survey.json"))
    ]
    assert (
        notes[0]["dropped: the detector counts another number"]
        == notes[1]["dropped: the detector sees nothing"]
        == 1
    )


def test_counting_pairs_of_scenes_are_balanced(tmp_path: Path) -> None:
    scenes.write(
        tmp_path / "s",
        n_train=1200,
        n_val=0,
        n_test=0,
        n_zeroshot=0,
        n_retrieval=0,
        n_proofs=0,
        size=16,
        processes=1,
    )
    call(counting, tmp_path / "s" / "train", "--to", tmp_path / "out", "--balance", "equal")
    numbers = Counter(sample.meta["number"] for sample in read(tmp_path / "out").values())
    assert (
        set(numbers) == set(range(2, 11))
        and len(set(numbers.values())) == 1
        and min(numbers.values()) > 20
    )
