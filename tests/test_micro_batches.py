"""A bound on texts cuts a step into more micro-batches."""

import pytest

from tests.models.tiny import tiny
from vlp import micro_batches
from vlp.config.training import Train
from vlp.losses import build
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


@pytest.mark.parametrize(
    ("objective", "views", "n_texts"),
    [
        ({"mv_infonce": {}}, {}, 3),
        ({"mv_infonce": {}}, {"text": False}, 1),
        ({"mv_infonce": {}}, None, 1),
        ({"mv_infonce": {"views": "text"}}, {}, 3),
        ({"infonce": {}}, {}, 1),
        ({"matryoshka": {"of": {"poly_view": {}}}}, {}, 3),
    ],
)
def test_views_that_a_term_takes_where_they_are_there_count(objective, views, n_texts):
    widths = WIDTHS | {"text_views": 2}
    heads = {} if views is None else {"views": {"width": 8, **views}}
    reads = micro_batches.embedded(build(objective), tiny(heads=heads))
    assert micro_batches.texts_a_row(widths, reads) == n_texts


def test_a_bound_that_no_row_keeps_is_refused():
    with pytest.raises(ValueError, match="max_texts is 3, and a row alone has 4 texts"):
        micro_batches.count(train(max_texts=3), WIDTHS, NEEDS)
    with pytest.raises(ConfigError, match="max_texts is 0; expected at least 1"):
        train(max_texts=0)
