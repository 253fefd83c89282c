"""The page of several runs shows errors over samples seen, by model size, and the law of them."""

import json
import math
import re

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import save_file

from tests.eval.page_material import Reader
from vlp import cli
from vlp.eval.report import logarithms, scaling
from vlp.eval.report.scaling import Scale

ALPHA, BETA = 0.31, 0.12
SIZES, LENGTHS, BATCH = (10_000, 40_000), (1_000, 4_000, 16_000), 100


def error_of(samples, parameters):
    return 4.0 * samples**-ALPHA * parameters**-BETA


def make_run(folder, samples, parameters, objective="infonce", with_checkpoint=True):
    """A run that has ended, as far as the page reads it."""
    folder.mkdir(parents=True)
    step = samples // BATCH
    tree = {"train": {"batch": BATCH, "duration": step}, "objective": {objective: {}}}
    (folder / "config.yaml").write_text(yaml.safe_dump(tree))
    (folder / "metrics.jsonl").write_text(json.dumps({"kind": "train", "step": step}) + "\n")
    record = {
        "label": "zeroshot",
        "dataset": "scenes",
        "metrics": {"acc1": 1 - error_of(samples, parameters), "modality_gap": 0.3},
        "chance": {"acc1": 0.1},
        "protocol": {"name": "zeroshot", "version": 1, "options": {}},
        "data_sha256": "a",
    }
    (folder / "results.json").write_text(json.dumps([record]))
    if with_checkpoint:
        newest = folder / "checkpoints" / f"step_{step:08d}"
        newest.mkdir(parents=True)
        shapes = {"visual.weight": (parameters // 10, 10), "text.token_embedding.weight": (500, 7)}
        tensors = {name: torch.zeros(shape) for name, shape in shapes.items()}
        save_file(tensors, newest / "model.safetensors")
    return folder


def page_of(tmp_path, runs):
    target = tmp_path / "arms.html"
    arms = [f"{place}={run}" for place, run in enumerate(runs)]
    assert cli.main(["report", "--compare", *arms, "--to", str(target)]) == 0
    return Reader(target.read_text())


def test_runs_of_several_sizes_and_lengths_are_drawn_with_their_law(tmp_path):
    places = [(length, size) for size in SIZES for length in LENGTHS]
    runs = [make_run(tmp_path / f"{n}_{d}", d, n) for d, n in places]
    runs.append(make_run(tmp_path / "other", 4_000, 10_000, objective="siglip"))
    shown = page_of(tmp_path, runs)

    text = shown.sections["scaling"]
    assert f"samples^-{ALPHA} · parameters^-{BETA}, residuals 0.0 %" in text
    assert "0.01 M parameters, B = 100" in text and "0.04 M parameters, B = 100" in text
    assert "of another objective, of stages or unknown scale: 1 runs" in text
    # A dot a run of one objective, of the hit rate alone; a line a size.
    assert text.count("samples: ") == len(places) == 6
    hints = re.findall(r"([\d,]+) samples: ([\d.]+)%", text)
    assert {(int(d.replace(",", "")), float(e)) for d, e in hints} == {
        (d, float(f"{100 * error_of(d, n):.4g}")) for d, n in places
    }
    assert shown.count("svg", class_="plane") == 1


def test_three_runs_are_joined_and_no_law_is_claimed(tmp_path):
    runs = [make_run(tmp_path / str(d), d, 10_000, with_checkpoint=False) for d in LENGTHS]
    text = page_of(tmp_path, runs).sections["scaling"]
    assert "No law is fitted" in text and "size unknown" in text


def test_runs_of_one_length_and_results_without_a_run_have_no_section(tmp_path):
    runs = [make_run(tmp_path / str(n), 4_000, n) for n in SIZES]
    assert "scaling" not in page_of(tmp_path, runs).sections
    (tmp_path / "files").mkdir()
    for number, run in enumerate(runs):
        (run / "results.json").rename(tmp_path / "files" / f"{number}.json")
    files = [tmp_path / "files" / f"{number}.json" for number in (0, 1)]
    assert "scaling" not in page_of(tmp_path, files).sections


def test_a_law_needs_enough_runs_that_tell_its_exponents_apart():
    scales = [Scale(d, BATCH, n, None) for n in SIZES for d in LENGTHS]
    errors = [error_of(scale.samples, scale.parameters) for scale in scales]
    law = scaling.fit(scales, errors)
    assert law.exponents == pytest.approx((-ALPHA, -BETA))
    assert law(Scale(64_000, BATCH, 90_000, None)) == pytest.approx(error_of(64_000, 90_000))

    # Noise of 5 % is what the residuals say.
    noise = np.random.default_rng(0).normal(0, 0.05, len(errors))
    noisy = scaling.fit(scales, [error * math.exp(n) for error, n in zip(errors, noise)])
    assert 0.01 < noisy.spread < 0.08

    assert scaling.fit(scales[:3], errors[:3]) is None
    in_step = [Scale(10 * n, BATCH, n, None) for n in (1000, 2000, 3000, 4000, 5000)]
    assert scaling.fit(in_step, errors[:5]) is None


def change(run, file, of_file):
    """Rewrite a YAML or JSON file of a run."""
    tree = yaml.safe_load((run / file).read_text())
    of_file(tree)
    (run / file).write_text(json.dumps(tree))


@pytest.mark.parametrize(
    "what",
    [{"data_sha256": "b"}, {"dataset": "photos"}, {"protocol": {"name": "zeroshot", "version": 2}}],
    ids=["content", "name", "version"],
)
def test_results_of_other_data_or_versions_are_in_no_curve_together(tmp_path, what):
    runs = [make_run(tmp_path / str(d), d, 10_000) for d in (*LENGTHS, 64_000)]
    change(runs[-1], "results.json", lambda records: records[0].update(what))
    text = page_of(tmp_path, runs).sections["scaling"]
    assert text.count("samples: ") == len(LENGTHS) == 3
    assert "No law is fitted" in text


@pytest.mark.parametrize(
    "tree", [{"stages": [{"batch": 10, "duration": 5}]}, {"train": "x"}], ids=["stages", "damaged"]
)
def test_runs_whose_samples_are_not_known_are_left_out(tmp_path, tree):
    runs = [make_run(tmp_path / str(d), d, 10_000) for d in LENGTHS]
    change(runs[0], "config.yaml", lambda config: config.update(tree))
    text = page_of(tmp_path, runs).sections["scaling"]
    assert "unknown scale: 1 runs" in text
    assert text.count("samples: ") == 2


def test_sizes_that_are_not_known_are_in_no_law():
    scales = [Scale(d, BATCH, n, None) for n in SIZES for d in LENGTHS]
    errors = [error_of(scale.samples, scale.parameters) for scale in scales]
    unknown = Scale(LENGTHS[0], BATCH, None, None)
    assert scaling.fit(scales, errors) is not None
    assert scaling.fit([unknown, *scales[1:]], errors) is None


def test_no_two_of_eight_sizes_look_alike(tmp_path):
    places = enumerate((1_000, 2_000, 4_000, 8_000, 16_000, 32_000, 64_000, 128_000))
    runs = [make_run(tmp_path / str(d), d, 1_000 * (place + 1)) for place, d in places]
    shown = page_of(tmp_path, runs)
    drawn = [attrs["class"] for tag, attrs in shown.tags if tag == "g"]
    keys = [attrs["class"] for tag, attrs in shown.tags if tag == "i"]
    assert len(set(drawn)) == len(set(keys)) == len(drawn) == len(keys) == 8


def test_a_score_that_is_no_number_is_refused_with_its_file(tmp_path, capsys):
    runs = [make_run(tmp_path / str(d), d, 10_000) for d in LENGTHS]
    change(runs[1], "results.json", lambda records: records[0]["metrics"].update(acc1=None))
    assert cli.main(["report", "--compare", *map(str, runs)]) == 1
    told = capsys.readouterr().err
    assert str(runs[1] / "results.json") in told and "each a number" in told


def test_axes_have_round_numbers():
    assert logarithms.round_values(math.log10(900), math.log10(21_000)) == [
        1000,
        2000,
        5000,
        10_000,
        20_000,
    ]
    assert logarithms.round_values(math.log10(0.31), math.log10(0.48)) == pytest.approx([0.4])
