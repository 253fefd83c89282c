"""The contract of `vlp.losses.build`: what an objective returns, needs, keeps and refuses."""

import pytest
import torch
import torch.nn.functional as F

from tests import ranks
from vlp import dist
from vlp.losses import build


def rows(b=6, seed=0):
    torch.manual_seed(seed)
    return {name: F.normalize(torch.randn(b, 4), dim=1) for name in ("image", "text")} | {
        "scale": torch.tensor(10.0)
    }


def test_total_is_the_weighted_sum_of_unweighted_terms():
    objective = build({"infonce": {"weight": 0.5}, "siglip": {"weight": 2}})
    image = rows()["image"].requires_grad_()
    total, terms = objective(**rows() | {"image": image}, bias=-10.0)
    alone = {name: build({name: {}})(**rows(), bias=-10.0)[0] for name in ("infonce", "siglip")}

    assert list(terms) == ["infonce", "siglip"] and not any(t.requires_grad for t in terms.values())
    for name, value in terms.items():
        torch.testing.assert_close(value, alone[name])
    torch.testing.assert_close(total.detach(), 0.5 * terms["infonce"] + 2 * terms["siglip"])
    total.backward()
    assert image.grad.norm() > 0 and total.dtype == torch.float32


def test_one_term_several_times():
    objective = build({"infonce": [{"weight": 1}, {"weight": 1, "label_smoothing": 0.1}]})
    _, terms = objective(**rows())

    assert list(terms) == ["infonce", "infonce_2"] and terms["infonce"] != terms["infonce_2"]


def test_weights_follow_a_schedule():
    objective = build({"infonce": {"weight": {"start": 1, "end": 0, "steps": 10}}})
    values = {step: objective(**rows(), step=step) for step in (0, 5, 10, 99)}
    for step, weight in ((0, 1), (5, 0.5), (10, 0), (99, 0)):
        torch.testing.assert_close(values[step][0], weight * values[step][1]["infonce"])


def test_needs_and_candidates():
    assert build({"infonce": {}}).needs == frozenset()
    assert build({"infonce": {}, "siglip": {}}).needs == {"bias"}
    assert build({"infonce": {}}).candidates(7) == 7
    # Known: ignored.
    build({"infonce": {}})(**rows(), negatives_valid=torch.ones(6, 2), sample_id=torch.arange(6))


@pytest.mark.parametrize(
    "objective, message",
    [
        ({}, "objective: no term"),
        ({"infonc": {}}, r"no 'infonc' in vlp.losses, did you mean 'infonce'\?"),
        (
            {"infonce": {"label_smothing": 0.1}},
            r"infonce.label_smothing: .*did you mean 'label_smoothing'\?",
        ),
        ({"infonce": {"label_smoothing": 1.5}}, "expected 0 <= ε < 1"),
        ({"infonce": {"weight": -1}}, "expected a number >= 0"),
        ({"infonce": {"weight": {"start": 1, "end": 0, "steps": 0}}}, "steps >= 1"),
        ({"infonce": {"wieght": 1}, "siglip": {"x": 1}}, "(?s)wieght.*siglip.x"),
    ],
)
def test_bad_configurations(objective, message):
    with pytest.raises(ValueError, match=message):
        build(objective)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"imgae": 1}, r"unknown keyword 'imgae', did you mean 'image'\?"),
        ({"bias": None}, "the term 'siglip' needs 'bias'"),
        (
            {"image": torch.zeros(5, 4)},
            r"text: found \[6, 4\], expected \[b, D\], and b is 5 in image",
        ),
    ],
)
def test_bad_calls(change, message):
    with pytest.raises(ValueError, match=message):
        build({"siglip": {}})(**rows() | {"bias": 0.0} | change)


def uneven():
    messages = []
    for change in (False, True):
        objective = build({"infonce": {}})
        if change:
            objective(**rows(4))
        try:
            objective(**rows(4 + dist.rank() + change))
        except ValueError as error:
            messages.append(str(error))

    return messages


def test_ranks_with_other_sizes_are_refused():
    for first, changed in ranks.run(2, uneven):
        assert "image differs between ranks, {'rank 0': (4, 4), 'rank 1': (5, 4)}" in first
        assert "shapes changed since the first step" in changed


def part_of_the_world():
    """Objectives over a process group that is not the world: ranks 0 and 2, then groups of one
    inside it.
    """
    import torch.distributed as torch_dist

    pairs = [torch_dist.new_group([0, 2]), torch_dist.new_group([1, 3])]
    mine = pairs[dist.rank() % 2]
    own = {
        k: v[dist.rank() // 2 * 3 :][:3] if v.dim() else v
        for k, v in rows(seed=dist.rank() % 2).items()
    }
    whole = build({"infonce": {}}, group=mine)
    return (
        whole(**own)[0].item(),
        whole.candidates(3),
        build({"infonce": {}}, group=mine, topology="local")(**own)[0].item(),
    )


def test_a_given_process_group_is_the_whole_world():
    results = ranks.run(4, part_of_the_world)
    for parity in (0, 1):
        expected = build({"infonce": {}})(**rows(seed=parity))[0].item()
        whole, n, local = (sum(results[r][i] for r in (parity, parity + 2)) / 2 for i in range(3))
        assert (
            whole == pytest.approx(expected, rel=1e-5)
            and n == 6
            and local != pytest.approx(expected, rel=1e-2)
        )


def test_autocast_does_not_narrow_the_scores():
    given = rows(64)
    with torch.autocast("cpu", torch.bfloat16):
        inside, _ = build({"infonce": {}}, impl="tiled")(**given)
    torch.testing.assert_close(
        inside, build({"infonce": {}}, impl="tiled")(**given)[0], rtol=0, atol=0
    )
