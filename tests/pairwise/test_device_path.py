"""The path that CUDA tensors take, on the CPU: products of bfloat16, no question to the device."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.losses.loops import data
from tests.pairwise.device import Watch, imitated
from vlp import plugin
from vlp.losses import Inputs
from vlp.pairwise import Backend, Pairs, Reduction, Tile

TERMS = [
    ("infonce", {"label_smoothing": 0.1}),
    ("siglip", {}),
    ("decoupled", {"weighted": True}),
    ("hn_nce", {}),
    ("cwcl", {}),
    ("cyclip", {}),
    ("macl", {}),
    ("uniformity", {}),
    ("cross_uniformity", {}),
    ("distill", {}),
    ("hard_negatives", {"form": "negclip"}),
    ("mann_whitney", {}),
    ("multi_view", {}),
    ("slip", {}),
    ("koleo", {}),
    ("decoupled_uniformity", {}),
    ("cacr", {}),
    ("kernel_mixture", {}),
    ("mixup", {}),
    ("mv_infonce", {}),
    ("mv_dhel", {}),
    ("poly_view", {}),
    ("swap", {}),
    ("symile", {}),
    ("modality_pairs", {}),
    ("symile", {"negatives": "n_squared"}),
    ("momentum_queue", {}),
    ("infonce", {"positives": "label", "form": "decoupled", "ignore": {"margin": 0.2}}),
    ("infonce", {"ignore": {"teacher": {"above": 0.3}}, "hardest": 3}),
    ("infonce", {"targets": {"of": "cross"}}),
    ("decoupled", {"positives": "label", "within": "both"}),
    ("hn_nce", {"positives": "label"}),
    ("siglip", {"positives": "label", "hardest": 2}),
    ("momentum_queue", {"positives": "label", "ignore": {"queue": 0.1}}),
]
ROWS = ("image", "text", "negatives", "image_views", "text_views", "others")


def in_bfloat16() -> dict[str, Tensor]:
    """The family's inputs with embeddings of bfloat16; a teacher's stored rows stay float32."""
    values = {}
    for name, value in data().items():
        if value is None:
            continue
        value = value.detach()
        is_embedded = name in ROWS or name.startswith(("ema_", "queue_"))
        if value.is_floating_point():
            value = value.bfloat16() if is_embedded else value.float()
        values[name] = value
    return values


def value_and_gradients(
    name: str, options: dict, values: dict[str, Tensor], impl: str, watch: Watch | None = None
) -> dict[str, Tensor]:
    """The term itself, without the checks of its inputs around it."""
    (chosen,) = plugin.keyed("vlp.losses", {name: options})
    leaves = {
        key: value.clone().requires_grad_()
        for key, value in values.items()
        if key in (*ROWS, "scale", "bias")
    }
    inputs = Inputs(**values | leaves)
    pairs = Pairs.at(Backend(impl=impl, tile_size=5))

    def run() -> tuple[Tensor, ...]:
        term = chosen.module.term
        stateful = hasattr(chosen.module, "initial_state")
        state = [chosen.module.initial_state(chosen.options)] if stateful else []
        value = term(inputs, pairs, chosen.options, *state)
        value = value[0] if stateful else value
        return value, *torch.autograd.grad(value, list(leaves.values()), materialize_grads=True)

    if watch is None:
        value, *gradients = run()
    else:
        with watch:
            value, *gradients = run()
    return {"value": value.detach(), **dict(zip(leaves, gradients))}


def expected_of(name: str, options: dict, values: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same in float64, on the rows as a device has them."""
    wide = {k: v.double() if v.is_floating_point() else v for k, v in values.items()}
    for key in ("teacher_image", "teacher_text"):  # rounded to the student's dtype
        wide[key] = values[key].bfloat16().double()
    return value_and_gradients(name, options, wide, "dense")


def assert_near(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Equal up to the rounding of 8 bits; and there is something to compare."""
    live = 0
    for key, gradient in expected.items():
        error = (found[key].cpu().double() - gradient).norm()
        assert error <= 1e-2 * gradient.norm() + 1e-6, f"{key}: {error} of {gradient.norm()}"
        live += bool(gradient.norm() > 1e-6)
    assert live >= 2


@pytest.mark.parametrize("name, options", TERMS)
def test_products_are_of_bfloat16_and_nobody_asks(name, options):
    values, watch = in_bfloat16(), Watch()
    with imitated():
        found = value_and_gradients(name, options, values, "tiled", watch)

    assert_near(found, expected_of(name, options, values))
    assert set(watch.products) == {torch.bfloat16}
    assert not watch.questions


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name, options", TERMS)
def test_the_same_on_a_gpu(name, options):
    values = in_bfloat16()
    on_gpu = {key: value.cuda() for key, value in values.items()}
    torch.cuda.set_sync_debug_mode("error")
    try:
        found = value_and_gradients(name, options, on_gpu, "tiled")
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert_near(found, expected_of(name, options, values))


def test_float32_rows_stay_as_exact_as_they_are():
    """The tile programs that ask nothing, at a scale where one exponential does not serve."""
    for name, spread in (("infonce", 200.0), ("infonce", 1.0), ("siglip", 200.0)):
        values = {k: v.detach() for k, v in data().items() if v is not None}
        values["scale"] = torch.tensor(spread, dtype=torch.float64)
        narrow = {k: v.float() if v.is_floating_point() else v for k, v in values.items()}

        watch = Watch()
        with imitated():
            found = value_and_gradients(name, {}, narrow, "tiled", watch)
        wide = {k: v.double() if v.is_floating_point() else v for k, v in narrow.items()}
        expected = value_and_gradients(name, {}, wide, "dense")

        for key, gradient in expected.items():
            error = (found[key].double() - gradient).norm()
            assert error <= 2e-5 * gradient.norm() + 1e-6, f"{name} {spread} {key}: {error}"
        assert set(watch.products) == {torch.float32} and not watch.questions


def test_positives_are_not_rounded():
    """A gradient of the pairs alone, whose weights bfloat16 cannot hold, is exact."""
    values = in_bfloat16()
    image = values["image"].clone().requires_grad_()
    weights = 1 + torch.arange(len(image)) / 1024

    def own(tile: Tile) -> tuple[Tensor, ...]:
        return (tile.scores[0].masked_fill(~tile.positive, 0),)

    with imitated():
        pairs = Pairs.at(Backend(impl="tiled", tile_size=3))
        (rows,) = pairs.reduce(Reduction(own, rows=("sum",)), [image], [values["text"]])
        (rows * weights).sum().backward()

    expected = weights.unsqueeze(1) * values["text"].float()
    assert torch.equal(image.grad, expected.bfloat16())
    rounded = weights.bfloat16().unsqueeze(1).float() * values["text"].float()
    assert not torch.equal(image.grad, rounded.bfloat16())


def test_stored_rows_do_not_widen_a_student():
    """Queues, teachers and keys in float32 take the student's dtype on a device only."""
    values = in_bfloat16()
    image, keys = values["image"].clone().requires_grad_(), values["text"].float()
    pairs = Pairs.at(Backend(impl="tiled"))
    on_cpu = pairs.row_logsumexp(image, keys, 3.0)

    watch = Watch()
    with imitated(), watch:
        on_device = pairs.row_logsumexp(image, keys, 3.0)
        positions = pairs.hardest(image, keys, 3, paired=False)
    assert set(watch.products) == {torch.bfloat16} and not watch.questions
    assert torch.allclose(on_cpu, on_device, atol=1e-5)  # these keys are bfloat16 numbers
    assert torch.equal(positions, pairs.hardest(image, keys, 3, paired=False))


def test_the_watch_sees_questions():
    """The control: what must not happen is counted where it does."""
    rows, watch = torch.randn(4, 4), Watch()
    with watch:
        if rows.sum() > 100:
            raise AssertionError
        rows[rows[:, 0] > 100]
        rows * torch.tensor(3.0)
        rows @ rows
    assert len(watch.questions) == 3 and watch.products == {torch.float32: 1}


def test_a_cpu_rounds_nothing():
    """Off a device half-precision rows are widened before they are multiplied."""
    watch = Watch()
    value_and_gradients("infonce", {}, in_bfloat16(), "tiled", watch)
    assert set(watch.products) == {torch.float32}
