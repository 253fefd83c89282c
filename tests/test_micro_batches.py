"""A bound on texts cuts a step into more micro-batches."""

import pytest

from vlp import micro_batches
from vlp.config.training import Train
from vlp.schema import ConfigError, parse

WIDTHS = {"captions": 3, "captions_valid": 3, "negatives": 5, "image_views": 2}
NEEDS = frozenset({"image", "text", "scale", "captions", "captions_valid", "negative_images"})


def train(**keys) -> Train:
    return parse(Train, {"duration": 1, "batch": 24, **keys})


@pytest.mark.parametrize(
    ("keys", "parts"),
    [
        ({}, 1),
        ({"micro_batches": 3}, 3),
        ({"max_texts": 96}, 1),
        ({"max_texts": 95}, 2),
        ({"max_texts": 20}, 6),  # 4 rows of 4 texts
        ({"max_texts": 4}, 24),
        ({"max_texts": 96, "micro_batches": 3}, 3),
    ],
)
def test_texts_are_bounded_by_further_micro_batches(keys, parts, capsys):
    assert micro_batches.texts_a_row(WIDTHS, NEEDS) == 4, "its own and three captions"
    assert micro_batches.count(train(**keys), WIDTHS, NEEDS) == parts
    more = parts > train(**keys).micro_batches
    assert ("(train.max_texts)" in capsys.readouterr().out) == more


def test_a_bound_that_no_row_keeps_is_refused():
    with pytest.raises(ValueError, match="max_texts is 3, and a row alone has 4 texts"):
        micro_batches.count(train(max_texts=3), WIDTHS, NEEDS)
    with pytest.raises(ConfigError, match="max_texts is 0; expected at least 1"):
        train(max_texts=0)
