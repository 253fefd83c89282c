"""What `matryoshka` adds to its terms: their states by width, their notes, and what it refuses.

Its values and gradients: test_family.py.
"""

import pytest
import torch
import torch.nn.functional as F

from tests import ranks
from tests.losses.family_data import B, D, data, own_rows
from vlp import config, plugin
from vlp.losses import build, check_width, leaves, own_scale
from vlp.losses.matryoshka import Options, unit_prefix

WIDTHS = [2, D]
REMEMBERED = {"sogclr": {"temperature": 0.25, "gamma": 0.6}}
REFUSED = {
    "widths: [0]": "different whole numbers of at least 1",
    "widths: []": "different whole numbers of at least 1",
    "widths: [4, 4]": "different whole numbers of at least 1",
    "widths: [4], weights: [1, 1]": "found 2 for 1 widths",
    "widths: [4], weights: [-1]": "numbers >= 0",
    "widths: [4], weights: [0]": "not all of them 0",
    "weights: [1]": "belong to widths",
    "of: {slip: {}}": "does not read the embeddings",
    "of: {captioning: {}}": "does not read the embeddings",
    "of: {matryoshka: {}}": "a wrapper in a wrapper",
    "of: {distill: {form: features}}": "a teacher's rows",
    "of: {distill: {form: ranking, candidates: batch}}": "candidates are those of whole",
    "of: {sogclr: {}}": "name the widths",
    "of: {infonce: {weight: {start: 0, end: 1, steps: 9}}}": "stands at matryoshka itself",
    "of: {infonse: {}}": "did you mean 'infonce'",
}


@pytest.mark.parametrize("written", REFUSED)
def test_what_cannot_be_is_refused_as_it_is_read(written):
    with pytest.raises(config.ConfigError, match=REFUSED[written]):
        plugin.keyed("vlp.losses", {"matryoshka": config.read_yaml(f"{{{written}}}", "given")[0]})


def test_widths_beyond_the_embeddings_are_refused_with_and_without_rows():
    terms = plugin.keyed("vlp.losses", {"infonce": {}, "matryoshka": {"widths": [4, 8]}})
    check_width(terms, 8)
    with pytest.raises(ValueError, match=r"'matryoshka'.*found 8, but the embeddings have 7"):
        check_width(terms, 7)
    with pytest.raises(ValueError, match=rf"'matryoshka'.*found 8, but the embeddings have {D}"):
        build(terms)(**data())


def test_every_term_over_pairs_has_its_own_value_at_the_whole_width():
    """Of any file; those that see no pair of image and text, or a teacher's rows, are refused."""
    refused, n_compared = set(), 0
    for name in plugin.names("vlp.losses"):
        d = data() | {"sample_id": torch.arange(B)}
        try:
            wrapped = build({"matryoshka": {"widths": [D], "of": {name: {}}}}, samples=B)
        except ValueError:
            refused.add(name)
            continue
        expected = build({name: {}}, samples=B)(**d, step=0)[0].item()
        assert wrapped(**d, step=0)[0].item() == pytest.approx(expected, rel=1e-9), name
        n_compared += 1
    local = {"fsc", "filip", "mil", "prior"}
    assert {"captioning", "slip", "matryoshka"} | local <= refused and len(refused) <= 8
    assert n_compared == len(plugin.names("vlp.losses")) - len(refused) >= 22


@pytest.mark.parametrize(
    ("width", "widths"), [(512, [512, 256, 128, 64, 32, 16, 8]), (15, [15]), (33, [33, 16, 8])]
)
def test_widths_left_out_are_halvings(width, widths):
    assert Options().at(width) == [(m, 1 / len(widths)) for m in widths]


def test_zeros_stay_zeros_with_a_finite_gradient():
    rows = torch.zeros(2, 4, requires_grad=True)
    prefix = unit_prefix(rows + torch.tensor([[0.0], [3.0]]), 2)
    torch.testing.assert_close(prefix, torch.tensor([[0, 0], [0.5**0.5] * 2]))
    (gradient,) = torch.autograd.grad(prefix.sum(), rows)
    assert gradient.isfinite().all() and gradient.abs().max() <= 1


def steps_of(objective, cut=None):
    """Totals of two steps, the second of which reads what the first has kept."""
    totals = []
    for step in (0, 1):
        d = data()
        for name in ("image", "text"):
            moved = F.normalize(d[name] + 0.3 * step, dim=-1)
            d[name] = moved if cut is None else F.normalize(moved[:, :cut], dim=-1)
        fields = {name: d[name] for name in ("image", "text", "scale")}
        rows = own_rows(fields | {"sample_id": torch.arange(B)})
        totals.append(objective(**rows, step=step)[0].item())
    return totals


def states_on_rank():
    nested = build({"matryoshka": {"widths": WIDTHS, "of": REMEMBERED}}, samples=B)
    results = [steps_of(nested)]
    results += [steps_of(build(REMEMBERED, samples=B), width) for width in WIDTHS]

    # What is saved goes on as if nothing had been: the next steps are equal.
    saved = {"matryoshka": {k: v.tolist() for k, v in nested.state_dict()["matryoshka"].items()}}
    return results, saved


def test_each_width_remembers_by_itself():
    n_ranks = 2
    by_rank = ranks.run(n_ranks, states_on_rank)
    for step in (0, 1):
        whole, *of_widths = (
            sum(results[i][step] for results, _ in by_rank) / n_ranks for i in range(3)
        )
        assert whole == pytest.approx(sum(of_widths) / 2, rel=1e-6)
        assert of_widths[0] != pytest.approx(of_widths[1], rel=1e-3)  # or the widths are one

    saved = by_rank[0][1]["matryoshka"]
    assert list(saved) == [f"{width}.sogclr.samples" for width in WIDTHS]


def test_a_state_goes_on_where_it_was_saved():
    first, later = (
        build({"matryoshka": {"widths": WIDTHS, "of": REMEMBERED}}, samples=B) for _ in range(2)
    )
    steps_of(first)
    later.load_state_dict(first.state_dict())
    assert steps_of(later) == steps_of(first)


def test_every_term_of_every_width_is_logged():
    d = data() | {"label": torch.arange(B) // 2}
    of = {"infonce": {"positives": "label"}, "uniformity": {}}
    _, terms = build({"matryoshka": {"widths": [2, 4], "of": of}})(**d)
    expected = {f"matryoshka.{name}_{m}" for name in of for m in (2, 4)}
    expected |= {f"matryoshka.infonce_{m}.positives" for m in (2, 4)}
    assert expected < set(terms) and "matryoshka" in terms


def test_terms_inside_are_asked_as_those_outside():
    terms = plugin.keyed(
        "vlp.losses", {"matryoshka": {"widths": [4], "of": {**REMEMBERED, "macl": {}}}}
    )
    assert [term.label for term in leaves(terms)] == ["matryoshka.sogclr", "matryoshka.macl"]
    alone = plugin.keyed("vlp.losses", {"matryoshka": {"widths": [4], "of": REMEMBERED}})
    assert own_scale(alone) == ("matryoshka.sogclr", 4.0)

    one_row = {name: value[:1] for name, value in data().items() if name in ("image", "text")}
    with pytest.raises(ValueError, match=r"'matryoshka\.decoupled' needs at least 2 candidates"):
        build({"matryoshka": {"of": {"decoupled": {}}}})(**one_row, scale=torch.tensor(3.0))
