"""What the report's page is made of: curves, projections, choices of examples, private words."""

import pytest
import torch

from vlp.eval.report import charts, findings, planes, settings
from vlp.eval.report.runs import Run
from vlp.privacy import private


def test_long_curves_keep_their_spikes():
    points = [(float(i), 1.0) for i in range(100_000)]
    points[54_321] = (54_321.0, 99.0)
    points[77_777] = (77_777.0, -5.0)
    kept = charts.downsampled(points)
    assert len(kept) <= charts.MAX_POINTS
    assert kept == sorted(kept) and kept[0] == points[0] and kept[-1] == points[-1]
    assert points[54_321] in kept and points[77_777] in kept


@pytest.mark.parametrize(
    "low, high", [(0, 1), (-3.2, -1.1), (1e-7, 1e-3), (14.28, 14.29), (0, 123456)]
)
def test_ticks_are_few_round_and_inside(low, high):
    got = charts.ticks(low, high)
    assert 2 <= len(got) <= 6
    assert all(low - 1e-9 * (high - low) <= t <= high + 1e-9 * (high - low) for t in got)


def test_curves_of_one_point_and_of_none():
    assert "<circle" in charts.curve("x", [charts.Series("a", [(1.0, 2.0)])])
    assert "no finite value" in charts.curve("x", [charts.Series("a", [(1.0, float("nan"))])])


def test_trails_and_distributions_draw_what_is_finite():
    ways = [
        planes.Trail("a", [(1.0, -3.0, 0.2), (2.0, -2.0, 0.4), (3.0, float("nan"), 0.5)]),
        planes.Trail("b", [(1.0, -1.0, 0.9)], 1),
    ]
    drawn = planes.trails("t", ("uniformity", "tolerance"), ways)
    assert drawn.count("<circle") == 3 and drawn.count("<polyline") == 2
    assert "a, step 2: uniformity -2, tolerance 0.4" in drawn and ">2</text>" in drawn
    assert "no finite value" in planes.trails("t", ("x", "y"), [planes.Trail("a", [])])

    # Bins 3 and 5 of ten are filled: what is drawn reaches from bin 2 to bin 6.
    own, other = [0.0] * 10, [0.0] * 10
    own[5], other[3] = 1.0, 1.0
    drawn = planes.distributions("d", [("own", own), ("other", other)], (-1.0, 1.0))
    outline = drawn.partition('points="')[2].partition('"')[0].split()
    assert drawn.count("<polygon") == 2 and len(outline) == 2 + 2 * 5
    assert "no scores" in planes.distributions("d", [("own", [0.0] * 4)], (0.0, 1.0))


def test_projection_is_the_singular_value_decomposition():
    rows = torch.randn(14, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    plane = findings.projection(rows[:7], rows[7:])
    flat = torch.tensor([*plane.image, *plane.text], dtype=torch.float64)
    values, vectors = torch.linalg.eigh(torch.cov(rows.T))
    expected = (rows - rows.mean(0)) @ vectors[:, [-1, -2]]
    torch.testing.assert_close(flat.abs(), expected.abs())
    assert plane.shares == pytest.approx(
        [float(values[-1] / values.sum()), float(values[-2] / values.sum())]
    )


def test_failures_come_first_and_an_image_is_asked_for_once():
    image = torch.eye(4)
    text = torch.nn.functional.normalize(
        image[[0, 1, 0, 2, 3]] + torch.tensor([[0.0], [0], [0], [0], [0]]), dim=1
    )
    # The third caption belongs to image 2 but looks like image 0.
    owner = torch.tensor([0, 1, 2, 2, 3])
    right = owner[:, None] == torch.arange(4)
    ranking = findings.Ranking(text, image, right, torch.tensor([1, 1, 3, 1, 1]))
    got = findings.queries(ranking, 3)
    assert [q.place for q in got] == [2, 0, 1]
    assert got[0].rank == 3 and got[0].best[0] == (0, 1.0, False) and got[0].right == (2, 0.0)
    shown, hits = findings.examples_to_show(
        [torch.tensor([0.1, 0.9]), torch.tensor([0.9, 0.1]), torch.tensor([0.5, 0.5])], 3
    )
    assert shown == [0, 2, 1] and hits == [False, True, False]  # a tie is no hit


def test_worst_classes_and_what_they_are_taken_for():
    classes = torch.eye(3)
    image, labels = classes[[0, 0, 2, 2, 1]], torch.tensor([0, 0, 1, 1, 1])
    worst = findings.confusions((image @ classes.T).argmax(1), labels, worst=1)
    assert [(c.number, c.hits, c.n, dict(c.answers), c.wrong) for c in worst] == [
        (1, 1, 3, {2: 2, 1: 1}, 2)
    ]


def test_private_leaves_other_words_alone():
    for text in (
        "timm/vit_base",
        "hf-hub:user/name",
        "a red/blue ring",
        "R@1 / R@5",
        "1/0.07",
        "and/or",
    ):
        assert private(text) == text
    assert private("no data at /home/anna/x/y; give one") == "no data at …/y; give one"
    assert private("C:\\Users\\anna\\x failed") == "…/x failed"


def test_settings_show_places_by_their_last_part_and_names_whole(tmp_path):
    run = Run(tmp_path / "demo", "demo", config={"out": "runs/demo"})
    expected = {
        ("data", "runs/demo/data/test"): "data/test",
        ("out", "runs/demo"): "demo",
        ("data", f"{tmp_path}/demo/data"): "data",
        ("data", "/home/anna/photos/test"): "…/test",
        ("data", "elsewhere/photos"): "…/photos",
        ("captions", "/home/anna/captions.csv"): "…/captions.csv",
        ("pretrained", "timm/vit_base"): "timm/vit_base",
        ("path", "s3://anna@bucket/photos/0.tar"): "s3: …/0.tar",
        ("caption", "a red/blue ring"): "a red/blue ring",
    }
    shown = {(key, value): settings.shown(value, key, run) for key, value in expected}
    assert shown == expected
    assert settings.shown([], "captions", run) == settings.shown(None, "data", run) == "none"
    assert settings.shown(True, "partial", run) == "yes"
