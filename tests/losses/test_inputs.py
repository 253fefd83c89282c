"""What a call may bring: wrong shapes, dtypes and rows are refused by name, at the first call and
at every later one.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests import ranks
from tests.losses.family_data import data, own_rows
from tests.losses.test_family import FAMILY
from tests.losses.test_moving import CASES
from vlp import dist
from vlp.data.wrong_captions import LISTS
from vlp.fields import CARRIED, FIELDS
from vlp.losses import build
from vlp.losses._inputs import dtype_kind

TERMS = [(name, options) for name, options, *_ in (*FAMILY, *CASES)]
# Changes that leave another call that is right: a letter that only this keyword has.
FREE = {
    ("slip", "image_views"): {(3, 8, 5), (1, 8, 5)},
    ("poly_view", "image_views"): {(3, 8, 5), (1, 8, 5)},
    ("mv_dhel", "text_views"): {(3, 8, 5), (1, 8, 5)},
    ("captioning", "caption_logits"): {(8, 4, 5), (8, 4, 7), (8, 4, 1)},
    ("counting", "counterfactual"): {(8, 5), (8, 3, 5), (8, 1, 5)},
    # One teacher is the first of one.
    **{
        ("distill", f"{whose}_{side}"): {(8, 1, 4), (11, 1, 4)}
        for whose in ("teacher", "projected", "queue_teacher")
        for side in ("image", "text")
    },
}


def given() -> dict[str, Tensor]:
    return {name: value.detach() for name, value in data().items()} | {"sample_id": torch.arange(8)}


def read_by(objective) -> list[str]:
    return [name for name in given() if name in objective.reads]


def wrong_shapes(value: Tensor) -> Iterator[Tensor]:
    """A dimension too many, too few, of one, one more, one less, and two exchanged."""
    yield from (value.unsqueeze(place) for place in range(value.dim() + 1))
    for dim, size in enumerate(value.shape):
        yield value.select(dim, 0)
        yield torch.cat([value, value.narrow(dim, 0, 1)], dim)
        yield from (
            value.narrow(dim, 0, smaller) for smaller in {1, size - 1} if 0 < smaller < size
        )
        if dim and value.shape[dim - 1] != size:
            yield value.transpose(dim - 1, dim)


def wrong_numbers(value: Tensor) -> Iterator[Tensor]:
    yield from (value.expand(shape).clone() for shape in ((2,), (8,), (8, 1), (1, 1), (1, 8)))


def test_every_wrong_shape_of_every_term_is_refused_by_name():
    n = 0
    for name, options in TERMS:
        first, later = build({name: options}), build({name: options})
        right = given()
        later(**right, step=0)
        for keyword in read_by(first):
            changes = wrong_shapes if right[keyword].dim() else wrong_numbers
            for wrong in changes(right[keyword]):
                if tuple(wrong.shape) in FREE.get((name, keyword), ()):
                    continue
                for objective in (first, later):
                    with pytest.raises(
                        ValueError, match=rf"(?s)(?=.*\b{keyword}\b).*found \[.*expected "
                    ) as refused:
                        objective(**right | {keyword: wrong}, step=0)
                    assert "the term" not in str(refused.value), "before any term runs"
                    n += 1
        assert later(**right)[0].isfinite()
    assert n == 2 * N_SHAPES


N_SHAPES = 6494


def test_every_wrong_dtype_is_refused_with_the_conversion():
    others = {
        "floats": (torch.int64, torch.bool),
        "bool": (torch.uint8, torch.int64, torch.float32),
        "int64": (torch.int32, torch.float32),
    }
    n = 0
    for name, options in TERMS:
        objective = build({name: options})
        for keyword in read_by(objective):
            kind = dtype_kind(FIELDS[keyword])
            for dtype in others[kind]:
                given_type = str(dtype).removeprefix("torch.")
                with pytest.raises(
                    ValueError,
                    match=f"{keyword}: found {given_type}, expected {kind}; convert with",
                ):
                    objective(**given() | {keyword: given()[keyword].to(dtype)})
                n += 1
    assert n == N_DTYPES


N_DTYPES = 1248


@pytest.mark.parametrize(
    "change, message",
    [
        ({"image": [[1.0]]}, r"image: found list, expected a tensor \[b, D\]"),
        ({"scale": "10"}, "scale: found str, expected a number"),
        ({"step": torch.tensor(3)}, "step: found Tensor, expected a whole number"),
        (
            {"image": torch.zeros(0, 5), "text": torch.zeros(0, 5)},
            r"image: found \[0, 5\].*each at least 1",
        ),
        (
            {"text": torch.zeros(8, 5, device="meta")},
            "text: found on meta, expected cpu, where image is",
        ),
        (
            {"image": torch.ones(3), "text": torch.ones(3)},
            r"(?s)image: found \[3\].*text: found \[3\]",
        ),
    ],
)
def test_what_is_no_such_tensor(change, message):
    with pytest.raises(ValueError, match=message):
        build({"infonce": {}})(**given() | change)


def test_a_number_may_be_a_tensor_of_one_element():
    """Models whose scale and bias are parameters of shape [1], like transformers' SigLIP."""
    right = given()
    leaves = {name: right[name].reshape(1).requires_grad_() for name in ("scale", "bias")}
    total, terms = build({"siglip": {}})(**right | leaves)
    assert total.shape == terms["siglip"].shape == ()
    torch.testing.assert_close(total, build({"siglip": {}})(**right)[0], rtol=0, atol=0)
    assert all(
        g.shape == (1,) and g.abs() > 0 for g in torch.autograd.grad(total, list(leaves.values()))
    )


def test_a_batch_and_what_terms_read_are_described_in_the_same_letters():
    """A tower turns the last letters into D and changes no other; a label passes as it is, and so
    do frames, which no term reads.
    """
    pixels_or_tokens = {"3", "H", "W", "L"}
    n = 0
    for name, row in CARRIED.items():
        shape = row.shapes[-1].split()
        if not row.embedded or row.tower == "further":
            assert row.shapes[0] == row.batch_shape, name
        else:
            kept = set(row.batch_shape.split()) - pixels_or_tokens
            assert shape[-1] == "D" and set(shape[:-1]) == kept, name
        n += 1
    assert n == 24


def test_masks_and_neighbours_are_fields_of_the_table():
    n = 0
    for name, row in FIELDS.items():
        for other in filter(None, (row.valid, row.beside)):
            assert other in FIELDS, f"{name} names {other}"
            n += 1
        if row.valid:
            assert FIELDS[row.valid].dtype == "bool"
        if row.json and row.beside:
            assert row.beside in LISTS, "numbers lie beside the lists of wrong captions alone"
    assert n == 23


# Rows that are not unit

UNIT = [
    ("infonce", {}, ("image", "text")),
    ("hard_negatives", {"form": "triplet"}, ("negatives", "negative_images")),
    ("hard_negatives", {"form": "text"}, ("ema_text",)),
    ("self_distillation", {"negatives": True}, ("ema_image", "ema_negatives")),
    ("counting", {}, ("counterfactual",)),
    ("distill", {}, ("teacher_image", "teacher_text")),
    (
        "distill",
        {"form": "interactive", "queue": True},
        ("queue_teacher_image", "queue_teacher_text"),
    ),
    ("mixing", {}, ("queue_image", "queue_text")),
    ("multi_view", {}, ("image_views", "text_views")),
    ("captions", {}, ("captions",)),
    ("siam", {}, ("predicted_image", "predicted_text")),
    ("fsc", {}, ("image_tokens", "text_tokens", "negative_tokens")),
    ("prior", {}, ("attended_captions",)),
    ("gram", {}, ("others",)),
    ("translation", {}, ("translated", "cycled")),
]


def test_rows_that_are_not_unit_are_refused_with_their_norm_or_normalised():
    n = 0
    for name, options, keywords in UNIT:
        for keyword in keywords:
            raw = {keyword: given()[keyword] * 7}
            objective, lenient = build({name: options}), build({name: options}, normalize=True)
            for _ in range(2):
                with pytest.raises(
                    ValueError,
                    match=rf"{keyword}: row .* has norm 7, expected unit rows.*normalize=True",
                ):
                    objective(**given() | raw)
                objective(**given())
            torch.testing.assert_close(
                lenient(**given() | raw)[0], objective(**given())[0], rtol=1e-12, atol=0
            )
            n += 1
    assert n == sum(row.unit for row in FIELDS.values()) == 26


def test_normalised_rows_have_the_gradient_of_a_normalisation():
    raw = {
        name: (3 * value).requires_grad_()
        for name, value in given().items()
        if name in ("image", "text")
    }
    inside, _ = build({"infonce": {}}, normalize=True)(**raw, scale=5.0)
    outside, _ = build({"infonce": {}})(
        **{name: F.normalize(value, dim=1) for name, value in raw.items()}, scale=5.0
    )
    found, expected = (
        torch.autograd.grad(total, list(raw.values())) for total in (inside, outside)
    )
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("normalize", [False, True])
def test_a_row_of_zeros_has_no_direction(normalize):
    image = given()["image"]
    image[3] = 0
    with pytest.raises(ValueError, match="image: row 3 has norm 0"):
        build({"infonce": {}}, normalize=normalize)(**given() | {"image": image})


def test_rows_that_are_unit_as_far_as_it_can_be_told():
    """Normalised in bfloat16; those that take no part; an empty queue; a NaN, which shows in the
    value.
    """
    torch.manual_seed(0)
    narrow = F.normalize(torch.randn(8, 768).bfloat16(), dim=1)
    build({"infonce": {}})(image=narrow, text=narrow.flip(0), scale=10.0)

    unused = given()
    unused["negatives"][~unused["negatives_valid"]] *= 5
    unused["negative_images"][~unused["negative_images_valid"]] = 0
    build({"hard_negatives": {"form": "triplet"}})(**unused)
    build({"mixing": {}})(**given() | {"queue_text": torch.zeros(11, 5).double()})

    broken = given()["image"]
    broken[2, 1] = torch.nan
    assert build({"infonce": {}})(**given() | {"image": broken})[0].isnan()


def on_two_ranks() -> list[str]:
    """Only the second rank's call is wrong."""
    messages = []
    for keyword, change in (
        ("negatives_valid", lambda v: v[:, :2]),
        ("negatives_valid", lambda v: v.long()),
        ("negatives", lambda v: v * 3),
    ):
        rows = {name: value.detach() for name, value in own_rows(data()).items()}
        if dist.rank() == 1:
            rows[keyword] = change(rows[keyword])
        try:
            build({"hard_negatives": {"form": "own"}})(**rows)
        except ValueError as error:
            messages.append(str(error))
    return messages


def test_every_rank_raises_what_one_rank_finds_at_the_first_call():
    first, second = ranks.run(2, on_two_ranks)
    assert first == second and len(first) == 3
    for message, expected in zip(
        first, ("K is 3 in negatives", "found int64, expected bool", "has norm 3")
    ):
        assert expected in message
