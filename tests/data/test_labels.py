"""Numbers of a sample's JSON that terms read: relevance, a teacher's scores of negatives, weights
of concepts.
"""

import json
from dataclasses import replace

import pytest
import torch

from tests.data.material import data_of, encoded, loader_of, picture
from vlp.data.format import ShardWriter
from vlp.data.row_numbers import MOST_CONCEPTS


def write(folder, **changed):
    """Eight samples whose numbers tell which they are; `changed` replaces the JSON of the fifth."""
    with ShardWriter(folder, 3) as writer:
        for i in range(8):
            meta = {
                "score": i / 2,
                "negatives": [f"not {i}"] * (1 + i % 2),
                "negative_scores": [i, -i][: 1 + i % 2],
                "concepts": [0, i, 0.5],
            }
            writer.add(
                f"k{i}",
                encoded(picture(i)),
                "png",
                [f"text {i}"],
                meta | (changed if i == 5 else {}),
            )
    return folder


@pytest.mark.parametrize("kind", ["shards", "folder"])
def test_labels_reach_their_rows(tmp_path, kind):
    source = write(tmp_path / "s") if kind == "shards" else folder(tmp_path / "f")
    loader = loader_of(data_of(source), 4)
    assert loader.carries >= {"score", "teacher_scores", "concept_targets"}

    seen = 0
    for _ in range(2):
        batch = next(loader)
        for row, key in enumerate(batch.key):
            i = int(key.removesuffix(".png")[-1])
            assert batch.score[row] == i / 2
            assert batch.teacher_scores[row].tolist() == [i, -i if i % 2 else 0]
            assert batch.negatives_valid[row].tolist() == [True, bool(i % 2)]
            assert torch.equal(batch.concept_targets[row], torch.tensor([0, i, 0.5]))

            seen += 1
    assert seen == 8


def folder(path):
    """The same as a folder of pictures with a table."""
    path.mkdir()
    lines = []
    for i in range(8):
        (path / f"k{i}.png").write_bytes(encoded(picture(i)))
        lines.append(
            {
                "image": f"k{i}.png",
                "caption": f"text {i}",
                "score": i / 2,
                "negatives": [f"not {i}"] * (1 + i % 2),
                "negative_scores": [i, -i][: 1 + i % 2],
                "concepts": [0, i, 0.5],
            }
        )
    (path / "captions.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return {"name": "folder", "path": str(path), "captions": str(path / "captions.jsonl")}


def test_a_label_that_one_sample_lacks_is_not_carried(tmp_path):
    loader = loader_of(
        data_of(write(tmp_path / "s", score="high", concepts=None, negative_scores=[])), 4
    )
    assert not loader.carries & {"score", "teacher_scores", "concept_targets"}


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        ({"score": -0.5}, "the score is -0.5, expected a number >= 0"),
        ({"score": float("nan")}, "the score is nan"),
        ({"score": 10**400}, "the score is 1000"),
        ({"score": 1e39}, "the score is 1e+39"),
        ({"concepts": [1, 2]}, "2 numbers in 'concepts', expected 3: one for each concept"),
        ({"concepts": [1, float("inf"), 0]}, "a number in 'concepts' is inf"),
        (
            {"negative_scores": [1, 2, 3]},
            "3 numbers in 'negative_scores', expected 2: one for each of its negatives",
        ),
    ],
)
def test_a_number_that_cannot_be_used_costs_its_sample_where_it_is_read(
    tmp_path, changed, expected
):
    data = data_of(write(tmp_path / "s", **changed))
    loader = loader_of(data, 8)
    batch = next(loader)
    assert "k5" not in batch.key and loader.counters()["bad_samples"] >= 1
    assert {(key, expected in reason) for _, key, reason in loader.bad} == {("k5", True)}

    other = "concepts" if "score" in changed else "score"
    unread = loader_of(
        data, 8, reads=frozenset({{"concepts": "concept_targets"}.get(other, other)})
    )
    batch = next(unread)
    assert (
        "k5" in batch.key
        and not unread.bad
        and batch.teacher_scores is None
        and batch.negatives is None
    )


NAMED = [[], [3, 0], [1], [2, 5, 4], [], [7, 1], [0], [6]]


def write_named(folder, **changed):
    """Eight samples that name concepts, some of them none; `changed` is of the sixth."""
    with ShardWriter(folder, 3) as writer:
        for i, named in enumerate(NAMED):
            meta = {"concepts": named} | (changed if i == 5 else {})
            writer.add(f"k{i}", encoded(picture(i)), "png", [f"text {i}"], meta)
    return folder


@pytest.mark.parametrize("weights", [None, [0.25, 4], [0, 2]])
def test_named_concepts_reach_their_rows_as_numbers_and_weights(tmp_path, weights):
    changed = {} if weights is None else {"concept_weights": weights}
    loader = loader_of(data_of(write_named(tmp_path / "s", **changed)), 8)
    assert "concept_targets" in loader.carries

    batch = next(loader)
    assert batch.concept_targets.shape == (8, MOST_CONCEPTS, 2)
    for row, key in enumerate(batch.key):
        i = int(key[-1])
        of_sample = weights if weights and i == 5 else [1] * len(NAMED[i])
        expected = [[n, w] for n, w in zip(NAMED[i], of_sample) if w]
        pairs = batch.concept_targets[row].tolist()
        assert pairs == expected + [[0, 0]] * (MOST_CONCEPTS - len(expected))

    # Micro-batches cut rows.
    parts = batch.split(4)
    assert torch.equal(torch.cat([part.concept_targets for part in parts]), batch.concept_targets)


def test_two_whole_weights_do_not_pass_for_the_numbers_of_two_concepts(tmp_path):
    forms = {}
    for name, meta in {
        "either": {"concepts": [1, 0]},
        "weights": {"concepts": [1.0, 0.0]},
        "numbers": {"concepts": [1, 0], "concept_weights": [1, 0]},
    }.items():
        with ShardWriter(tmp_path / name, 3) as writer:
            writer.add("k", encoded(picture(0)), "png", ["text"], meta)
        data = replace(data_of(tmp_path / name), concepts=2)
        if name == "either":
            with pytest.raises(ValueError, match=r"\[1, 0\], which may be weights of all 2"):
                loader_of(data, 1)
        else:
            forms[name] = next(loader_of(data, 1)).concept_targets.squeeze(0)

    assert forms["weights"].tolist() == [1, 0]
    assert forms["numbers"][:2].tolist() == [[1, 1], [0, 0]]


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        ({"concepts": [1, 8]}, "8 in 'concepts' is no number of a concept, expected whole ones"),
        ({"concepts": [-1]}, "-1 in 'concepts' is no number of a concept"),
        ({"concepts": [0.5, 1]}, "0.5 in 'concepts' is no number of a concept"),
        ({"concepts": [True]}, "True in 'concepts' is no number of a concept"),
        ({"concepts": [1, 2, 1]}, "a concept stands twice in 'concepts'"),
        ({"concepts": list(range(65))}, "65 numbers in 'concepts', expected at most 64"),
        ({"concept_weights": [1]}, "'concept_weights' is [1], expected a number >= 0 for each of"),
        ({"concept_weights": [1, -1]}, "'concept_weights' is [1, -1]"),
        ({"concept_weights": [1, float("nan")]}, "'concept_weights' is [1, nan]"),
        ({"concept_weights": {"7": 1}}, "'concept_weights' is {'7': 1}"),
    ],
)
def test_a_concept_that_cannot_be_used_costs_its_sample(tmp_path, changed, expected):
    data = replace(data_of(write_named(tmp_path / "s", **changed)), concepts=8)
    loader = loader_of(data, 8)
    batch = next(loader)
    assert "k5" not in batch.key
    assert {(key, expected in reason) for _, key, reason in loader.bad} == {("k5", True)}


def test_hard_captions_are_made_only_where_a_term_reads_them(tmp_path):
    data = data_of(write(tmp_path / "s", negatives=["no"] * 255, negative_scores=[0] * 255))
    assert next(loader_of(data, 8, reads=frozenset({"score"}))).negatives is None
    for reads in ({"ema_negatives"}, {"teacher_scores"}, {"negatives_valid"}):
        assert next(loader_of(data, 8, reads=frozenset(reads))).negatives.shape[1] == 255


def test_scores_of_no_negatives_are_no_missing_label(tmp_path):
    loader = loader_of(data_of(write(tmp_path / "s", negatives=[], negative_scores=[])), 8)
    batch = next(loader)
    row = batch.key.index("k5")
    assert batch.teacher_scores[row].tolist() == [0, 0] and not batch.negatives_valid[row].any()
    assert batch.teacher_scores.any(1).sum() == 6  # not k0, whose score is 0, and not k5


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        ({"negatives_valid": [False, True]}, [False, True]),
        ({"negatives_valid": [True, 0]}, [True, False]),
        (
            {"negatives_valid": [False]},
            [True, True],
        ),  # of another length: it belongs to other negatives
        ({"negatives": ["not 5", " \n"]}, [True, False]),
    ],
)
def test_masked_and_empty_negatives_do_not_count(tmp_path, changed, expected):
    batch = next(loader_of(data_of(write(tmp_path / "s", **changed)), 8))
    assert batch.negatives_valid[batch.key.index("k5")].tolist() == expected
    assert batch.negatives_valid.sum() == 10 + sum(expected)  # of the others, none is masked
