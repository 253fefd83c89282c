"""Hard negatives and counterfactuals belong to the caption that they were made from: in batches, at
all ways of choosing.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path

import pytest
import torch

from tests.data.material import TEXT, data_of, encoded, loader_of, picture, write_tar
from vlp.config import Captions
from vlp.data.format import ShardWriter
from vlp.data.members import Picture
from vlp.data.sources.shards import Options
from vlp.data.sources.shards import open as open_shards
from vlp.data.text import build
from vlp.data.wrong_captions import LISTS, problems, read

CHOICES = [
    {"choose": "random"},
    {"choose": "first"},
    {"choose": "all"},
    {"choose": "weights", "weights": [1, 2, 4]},
]
N = 6


def captions(i: int) -> list[str]:
    return [f"sample {i} caption {c}" for c in range(3)]


def negatives(i: int) -> tuple[list[str], list[int]]:
    """One is given; caption c has c of its own, mixed up with those of others. Odd samples have
    none but the given one.
    """
    numbers = [-1] if i % 2 else [-1, 2, 1, 2]
    return [f"sample {i} negative {n} place {place}" for place, n in enumerate(numbers)], numbers


def write(folder: Path, *, belonging: bool = True) -> Path:
    with ShardWriter(folder, 4) as writer:
        for i in range(N):
            texts, numbers = negatives(i)
            meta = {
                "negatives": texts,
                "negative_scores": [10 * i + place for place in range(len(texts))],
            }
            wrong = [f"sample {i} caption {c} counts {k}" for c in (0, 2) for k in range(c + 1)]
            meta |= {"counterfactuals": wrong}
            if belonging:
                meta |= {"negatives_of": numbers, "counterfactuals_of": [0, 2, 2, 2]}
            images = {0: Picture(encoded(picture(50 + i)), "png")}
            own = encoded(picture(i))
            writer.add(f"k{i}", own, "png", captions(i), meta, negative_images=images)
    return folder


def told(tokens: torch.Tensor) -> str:
    return str(tokens.tolist())


@pytest.mark.parametrize("choice", CHOICES, ids=lambda choice: choice["choose"])
@pytest.mark.parametrize("belonging", [True, False])
def test_a_row_carries_the_wrong_captions_of_its_own_caption(
    tmp_path: Path, choice: dict, belonging: bool
) -> None:
    tokenizer = build(TEXT)
    caption_of = {
        told(tokenizer([text])[0]): (i, c) for i in range(N) for c, text in enumerate(captions(i))
    }
    place_of = {
        told(tokenizer([text])[0]): (i, place)
        for i in range(N)
        for place, text in enumerate(negatives(i)[0])
    }
    loader = loader_of(data_of(write(tmp_path, belonging=belonging), captions=choice), 6)
    # Of one caption, with the given one.
    assert loader.widths["negatives"] == (3 if belonging else 4)

    seen: Counter[int] = Counter()
    for _ in range(12):
        batch = next(loader)
        for row in range(6):
            i, c = caption_of[told(batch.text[row])]
            assert batch.key[row] == f"k{i}"
            numbers = negatives(i)[1]
            expected = [place for place, n in enumerate(numbers) if not belonging or n in (-1, c)]
            valid = batch.negatives_valid[row]
            found = [place_of[told(tokens)] for tokens in batch.negatives[row][valid]]
            assert found == [(i, place) for place in expected] and valid[: len(found)].all()
            assert batch.teacher_scores[row][valid].tolist() == [
                10 * i + place for place in expected
            ]
            assert batch.negative_images[row, 0].any()
            assert batch.counterfactual_valid[row] == (c != 1 or not belonging)
            seen[c] += 1
    assert sum(seen.values()) == 72 and set(seen) == (
        {0} if choice["choose"] == "first" else {0, 1, 2}
    )


def test_the_image_of_a_negative_is_shown_beside_its_caption_alone(tmp_path: Path) -> None:
    with ShardWriter(tmp_path) as writer:
        for i in range(4):
            meta = {"negatives": [f"{i} not first", f"{i} not second"], "negatives_of": [0, 1]}
            images = {0: Picture(encoded(picture(50 + i)), "png")}
            writer.add(
                f"k{i}",
                encoded(picture(i)),
                "png",
                [f"{i} first", f"{i} second"],
                meta,
                negative_images=images,
            )
    loader, tokenizer, seen = loader_of(data_of(tmp_path), 4), build(TEXT), Counter()
    for _ in range(8):
        batch = next(loader)
        for row, key in enumerate(batch.key):
            first = torch.equal(batch.text[row], tokenizer([f"{key[1:]} first"])[0])
            assert batch.negatives_valid[row].tolist() == [True]
            assert batch.negative_images_valid[row].tolist() == [first]
            assert batch.negative_images[row].any() == first
            seen[first] += 1
    assert seen[True] > 5 and seen[False] > 5


def test_a_stand_in_brings_its_own(tmp_path: Path) -> None:
    """Under `all` the mixture says which caption stands in a row: of its sample, not of the one
    that takes its place.
    """
    with ShardWriter(tmp_path) as writer:
        for i in range(N):
            meta = {"negatives": [f"{i} not {c}" for c in range(3)], "negatives_of": [0, 1, 2]}
            image = encoded(picture(i)) if i else b"no picture"
            writer.add(f"k{i}", image, "png", captions(i) if i else captions(i)[::-1], meta)
    loader, tokenizer, n_replaced = (
        loader_of(data_of(tmp_path, captions={"choose": "all"}), 6),
        build(TEXT),
        0,
    )
    caption_of = {
        told(tokenizer([text])[0]): c for i in range(N) for c, text in enumerate(captions(i))
    }
    for _ in range(6):
        batch = next(loader)
        for row, key in enumerate(batch.key):
            c = caption_of[told(batch.text[row])]
            assert torch.equal(batch.negatives[row], tokenizer([f"{key[1:]} not {c}"]))
    n_replaced = loader.counters()["bad_samples"]
    assert n_replaced >= 5 and {key for _, key, _ in loader.bad} == {"k0"}


@pytest.mark.parametrize(
    "numbers, fault",
    [
        ([0], r"has 1 numbers for 2 texts"),
        ([0, 2], "names caption 2 of 2"),
        ([0, -2], "names caption -2 of 2"),
        ([0, "1"], r"holds \[0, '1'\]"),
        ([0, True], r"holds \[0, True\]"),
        ("01", "holds 01"),
        ({"a": 1}, "holds "),
        ([0, 1.5], r"holds \[0, 1.5\]"),
    ],
)
@pytest.mark.parametrize("kind", ["shards", "folder"])
def test_numbers_that_cannot_be_right_cost_the_texts_and_are_counted(
    tmp_path, kind, numbers, fault
) -> None:
    good = {"negatives": ["a", "b"], "negatives_of": [0, 1]}
    rows = [
        {"captions": ["x", "y"], **good},
        {"captions": ["x", "y"], "negatives": ["a", "b"], "negatives_of": numbers},
    ]
    source = _shards(tmp_path, rows) if kind == "shards" else _folder(tmp_path, rows)
    loader = loader_of(data_of(source), 2)
    problems = [problem for problem in loader.problems() if "odd or passed over" not in problem]
    assert len(problems) == 1 and loader.n_left_out == 0
    assert re.search(fault, problems[0])
    batch = next(loader)
    assert {key[0]: n for key, n in zip(batch.key, batch.negatives_valid.sum(1).tolist())} == {
        "0": 1,
        "1": 0,
    }


def _shards(folder: Path, rows: list[dict]) -> Path:
    members = [(f"{i}.json", json.dumps(row).encode()) for i, row in enumerate(rows)]
    members += [(f"{i}.png", encoded(picture(i))) for i in range(len(rows))]
    return write_tar(folder / "0.tar", sorted(members))


def _folder(folder: Path, rows: list[dict]) -> dict:
    for i in range(len(rows)):
        (folder / f"{i}.png").write_bytes(encoded(picture(i)))
    table = folder / "captions.jsonl"
    table.write_text(
        "\n".join(json.dumps({"image": f"{i}.png", **row}) for i, row in enumerate(rows))
    )
    return {"name": "folder", "path": str(folder), "captions": str(table)}


def test_numbers_count_the_captions_of_the_json(tmp_path: Path) -> None:
    """Blank captions are left out of a sample, but had a number when the negatives were made."""
    row = {
        "captions": ["", "one", " two "],
        "negatives": ["not one", "not two", "not blank"],
        "negatives_of": [1, 2, 0],
    }
    source = open_shards(Options(str(_shards(tmp_path, [row]))), Captions())
    assert (
        source[0].captions == ("one", "two") and source.n_negatives == 1 and not source.problems()
    )
    found = read(source[0].meta, "negatives", source[0].captions)
    assert [found.of(caption) for caption in ("one", "two", "three")] == [[0], [1], []]
    assert found.numbers(("two", "one")) == [1, 0, None]


def test_what_is_no_list_of_texts_is_nothing() -> None:
    odd = [None, "text", 3, {"a": 1}, []]
    for field in LISTS:
        for value in odd:
            assert (
                read({field: value, f"{field}_of": [0]}, field, ["x"]).texts == [] or value is None
            )
    assert len(odd) * len(LISTS) == 10
    mixed = read(
        {"negatives": ["a", 3, None, " "], "negatives_of": [0, 0, -1, -1]}, "negatives", ["x"]
    )
    assert mixed.texts == ["a", "", "", " "] and mixed.valid == [True, False, False, False]
    assert problems({"negatives": ["a"], "negatives_of": None}, ["x"]) == []


def test_which_counterfactual_comes_first_is_drawn_at_each_visit(tmp_path: Path) -> None:
    """The loss of one counterfactual sees the first. The order depends on seed, step and sample,
    not on rank or workers.
    """
    wrong = [f"{n} dogs" for n in range(5)]
    with ShardWriter(tmp_path) as writer:
        for i in range(4):
            writer.add(f"k{i}", encoded(picture(i)), "png", ["9 dogs"], {"counterfactuals": wrong})
    tokenizer = build(TEXT)
    number = {told(tokens): n for n, tokens in enumerate(tokenizer(wrong))}
    loader, firsts = loader_of(data_of(tmp_path), 4), {f"k{i}": Counter() for i in range(4)}
    rows: list[list[list[int]]] = []
    for _ in range(60):
        batch = next(loader)
        rows.append([[number[told(tokens)] for tokens in row] for row in batch.counterfactual])
        for key, row in zip(batch.key, rows[-1]):
            assert sorted(row) == list(range(5))
            firsts[key][row[0]] += 1
    assert all(len(counter) == 5 and max(counter.values()) < 30 for counter in firsts.values())
    half = loader_of(data_of(tmp_path), 4, rank=1, world=2)
    assert [[number[told(tokens)] for tokens in row] for row in next(half).counterfactual] == rows[
        0
    ][2:]
    other = loader_of(data_of(tmp_path), 4, seed=4)
    assert [[number[told(t)] for t in row] for row in next(other).counterfactual] != rows[0]
