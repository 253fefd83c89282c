"""The scaling curve: a point is a run of its own, and the law never sees what it predicts."""

import argparse
import json
import xml.etree.ElementTree as ET

import numpy as np
import pytest

from tests.benchmarks import law, plots, scaling
from tests.benchmarks.law import Point
from vlp.log import records as records_of

TRUE = np.array([0.05, 0.1, 0.5, 0.4, 0.6, 0.2])
PARAMETERS = {"XS": 155_217, "S": 474_913, "M": 1_070_721, "L": 2_254_849}


@pytest.fixture
def finished(tmp_path):
    """A folder where every run has finished, with errors that follow a law with a little noise."""
    rng = np.random.default_rng(0)
    runs = {}
    for place in (*scaling.GRID, *scaling.NEXT):
        size, samples, batch = place
        exact = law.errors(TRUE, [Point(PARAMETERS[size], samples, batch)])[0]
        errors = {error: exact * np.exp(rng.normal(0, 0.01)) for error in scaling.ERRORS}
        runs[scaling.name_of(place)] = part = scaling.part_of(place, seed=0)
        record = {"settings": part, "commit": "abc", "cpu_s": 1.0, "errors": errors}
        record["parameters"] = PARAMETERS[size]
        (tmp_path / f"{scaling.name_of(place)}.json").write_text(json.dumps(record))
    assert len(runs) == 14
    return tmp_path, runs


def shown(out, runs):
    """The rows of the table."""
    args = argparse.Namespace(json=str(out / "table.json"), publish=False)
    scaling.show(out, runs, args)
    return json.loads((out / "table.json").read_text())["rows"]


def test_the_table_sets_predictions_beside_what_the_law_did_not_see(finished, monkeypatch):
    monkeypatch.setattr(law, "DRAWS", 20)
    out, runs = finished
    rows = shown(out, runs)
    assert len(rows) == 14
    heading = "zero-shot error: law, %"
    assert [row["size"] for row in rows if "to" in row[heading]] == ["L", "M"]

    # Whatever the larger runs score, the fit stays as it is.
    for place in scaling.NEXT:
        path = out / f"{scaling.name_of(place)}.json"
        record = json.loads(path.read_text())
        record["errors"] = dict.fromkeys(scaling.ERRORS, 0.9)
        path.write_text(json.dumps(record))
    changed = shown(out, runs)
    assert [row[heading] for row in changed] == [row[heading] for row in rows]
    assert changed[-1]["zero-shot error, %"] == "90.0"

    svg = ET.parse(out / "scaling.svg").getroot()
    circles = svg.findall(".//{http://www.w3.org/2000/svg}circle")
    # Nine of the grid at B = 128, two larger ones measured and predicted, in two panels.
    assert len(circles) == 2 * (9 + 2 * 2)


def test_an_unfinished_grid_is_no_law(finished, capsys):
    out, runs = finished
    (out / f"{scaling.name_of(scaling.GRID[3])}.json").unlink()
    scaling.show(out, runs, argparse.Namespace(json=None, publish=False))
    assert "1 of 12 runs are still to come: S_12288_128" in capsys.readouterr().out


def test_a_point_is_a_run_of_its_length(scenes, tmp_path):
    (tmp_path / "scenes").symlink_to(scenes)
    part = {"size": "-", "samples": 96, "batch": 16, "seed": 0, "of": [32, 1, 32, 1]}
    record = scaling.run(part, tmp_path / "point")
    assert record["errors"].keys() == scaling.ERRORS.keys()
    assert all(0 <= error <= 1 for error in record["errors"].values())

    trained = [r for r in records_of(tmp_path / "point/run/metrics.jsonl") if r["kind"] == "train"]
    assert trained[-1]["step"] == 6
    # The square root of 16 / 256 is a quarter.
    assert trained[0]["lr"] == pytest.approx(0.25 * scaling.RATE)
    # Two blocks, patches and projections; the table of 49,408 tokens would be 1.6 million.
    assert 2 * 12 * 32**2 < record["parameters"] < 50_000


def test_a_logarithmic_axis_refuses_zero():
    series = plots.Series("perfect", [plots.Mark(1000, 0.0)])
    with pytest.raises(ValueError, match="no place for 0"):
        plots.drawing([plots.Panel("error", "samples", [series])], "x")
