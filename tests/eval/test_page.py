"""The report's page: parsed as HTML, on whole, partial and hostile runs; nothing loaded, nothing
private, nothing unescaped.
"""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.eval.material import png
from tests.eval.page_material import Reader, make_run, read
from vlp import cli
from vlp.data.format import ShardWriter
from vlp.data_tools.scenes import generate
from vlp.eval.report import page, runs

HOSTILE = '<script>alert("x")</script> & <img src=http://evil/x onerror=alert(1)>'


@pytest.fixture(scope="module")
def whole(scenes, tmp_path_factory):
    """A whole run with its page."""
    run = make_run(tmp_path_factory.mktemp("page") / "whole", scenes)
    (run / "data").mkdir()
    for name in ("counting", "order"):
        shutil.copytree(scenes / name, run / "data" / name)
    page.write(run, samples=40)
    return run


def test_whole_run_shows_everything(whole):
    got = read(whole / "report.html")
    assert "What is missing" not in got.text
    titles = [
        "loss",
        "infonce",
        "uniformity",
        "logit scale",
        "learning rate",
        "samples a second",
        "share of time waiting for data",
    ]
    for title in titles:
        assert title in got.sections["curves"]
    assert (
        "30.0%" in got.sections["summary"]
        and "2.0%" in got.sections["summary"]
        and "20.0% – 40.0%" in got.sections["summary"]
    )
    # Training (with its two terms), scores, the logged gap.
    assert got.count("svg", class_="chart") == 8 + 2 + 1
    assert got.count("svg", class_="scatter") == 1
    assert got.count("circle", class_="c0") == got.count("circle", class_="c1") == 20
    assert "taken for" in got.sections["confusion"]
    assert got.count("table", class_="matrix") == 1
    assert got.count("figure", class_="right") == 6 + 10  # every text shows its right image
    assert got.count("img") > 40
    assert "counting" in got.sections["examples"] and "chance 11.1%" in got.sections["examples"]
    assert "order" in got.sections["examples"]
    assert "9.9.9" in got.sections["environment"] and "cores" in got.sections["environment"]
    assert "train" in got.sections["configuration"]
    assert (whole / "report.html").stat().st_size < 400_000
    assert not [p for p in whole.iterdir() if p.name.endswith(".part")]


def test_score_distributions_and_the_way_of_uniformity_and_tolerance_are_drawn(whole, tmp_path):
    got = read(whole / "report.html")
    assert got.count("svg", class_="areas") == 1 and got.count("polygon") == 2
    assert "other combinations" in got.sections["space"]
    assert "pairs above others (AUC)" in got.sections["space"]
    assert got.count("svg", class_="plane") == 0  # not logged

    run = make_run(tmp_path / "logged", checkpoints=False)
    lines = [
        {"step": s, "kind": "eval", "tolerance.tolerance": s / 10, "tolerance.uniformity_image": -s}
        for s in (3, 6)
    ]
    with open(run / "metrics.jsonl", "a") as file:
        file.write("".join(json.dumps(line) + "\n" for line in lines))
    got = read(page.write(run, with_model=False))
    assert got.count("svg", class_="plane") == 1
    assert "tolerance · tolerance against uniformity" in got.sections["space"]
    assert "logged, step 6: uniformity -6, tolerance 0.6" in got.sections["space"]


def test_page_holds_no_place_beyond_the_run(whole, scenes):
    text = (whole / "report.html").read_text()
    assert (
        str(whole.parent) not in text
        and str(scenes) not in text
        and str(Path.home()) + "/" not in text
    )
    assert "…/zeroshot" in text


def test_same_run_gives_the_same_page(whole, tmp_path):
    again = page.write(whole, to=tmp_path / "again.html", samples=40)
    assert again.read_bytes() == (whole / "report.html").read_bytes()


def test_two_runs_side_by_side(whole, tmp_path, scenes):
    other = make_run(tmp_path / "other", scenes, seed=7, train={"duration": 6, "batch": 8})
    got = read(page.write(whole, other, both=True, samples=20))
    assert (whole / "report-other.html").exists()
    assert got.count("svg", class_="scatter") == 2
    assert "difference" in got.sections["summary"]
    assert re.search(r"train\.batch\s+4\s+8", got.sections["configuration"])
    assert re.search(r"\bseed\s+0\s+7", got.sections["configuration"])
    assert "out" not in got.sections["configuration"].split()[:12]
    against = read(page.write(whole, other, to=tmp_path / "against.html", samples=20))
    assert against.count("svg", class_="scatter") == 1
    assert against.count("g", class_="s1") == got.count("g", class_="s1") > 8
    with pytest.raises(ValueError, match="same run"):
        page.write(whole, whole.parent / "." / whole.name)


def test_runs_of_one_name_are_told_apart(tmp_path):
    first, second = (
        make_run(tmp_path / "a" / "run", checkpoints=False),
        make_run(tmp_path / "b" / "run", checkpoints=False),
    )
    got = read(page.write(first, second, with_model=False))
    assert "a/run" in got.text and "b/run" in got.text


def test_without_model(whole, tmp_path):
    got = read(page.write(whole, to=tmp_path / "plain.html", with_model=False))
    assert all(
        "--no-model" in got.sections[key] for key in ("space", "confusion", "retrieval", "examples")
    )
    assert got.count("img") == 0


def test_hostile_texts_are_shown_and_not_run(tmp_path, scenes):
    folder = tmp_path / "shards"
    with ShardWriter(folder, 100) as writer:
        for i in range(12):
            scene = generate(i, size=32)
            meta = {"caption": f"{HOSTILE} {i}", "negatives": [f"</article>{HOSTILE}"]}
            writer.add(None, png(scene.image), "png", [f"{HOSTILE} {i}"], meta, None)
    run = make_run(
        tmp_path / "run",
        eval={"retrieval": {"data": str(folder)}, "negatives": {"data": str(folder)}},
    )
    with (run / "metrics.jsonl").open("a") as file:
        file.write(
            json.dumps({"step": 7, "kind": "train", "loss": 1.0, "<script>term": 2.0}) + "\n"
        )
    record = {"label": "<b>x</b>", "dataset": HOSTILE, "metrics": {"<i>": 1.0}, "chance": {}}
    (run / "results.json").write_text(json.dumps([record]))
    text = page.write(run).read_text()
    got = Reader(text)
    assert got.count("script") == 1
    assert not got.count("b", class_="evil") and "<b>x</b>" in got.text
    assert HOSTILE in got.sections["retrieval"]
    assert HOSTILE in got.sections["examples"]
    assert all(r.startswith(("#", "data:")) for r in got.resources)


def test_secrets_and_places_stay_out(tmp_path):
    token = "hf_" + "A1b2C3d4" * 4
    run = make_run(tmp_path / "home" / "anna" / "run", checkpoints=False)
    tree = yaml.safe_load((run / "config.yaml").read_text())
    tree["data"]["sources"] = [
        {"name": "shards", "path": "/home/anna/secret-project/train"},
        {"name": "shards", "path": f"{run}/data/train"},
        {
            "name": "shards",
            "path": f"pipe:curl -H 'Authorization: Bearer {token}' "
            "https://anna:pw@host.example/x/a.tar?sig=zzz",
        },
        {"name": "shards", "path": "~/elsewhere/shards", "api_token": "plainsecret"},
    ]
    (run / "config.yaml").write_text(yaml.safe_dump(tree))
    got = read(page.write(run, with_model=False))
    text = (run / "report.html").read_text()
    for secret in (token, "plainsecret", "anna", "secret-project", "sig=zzz", "pw@", "elsewhere"):
        assert secret not in text, secret
    shown = got.sections["configuration"]
    assert (
        "…/train" in shown
        and "data/train" in shown
        and "…/shards" in shown
        and "…/a.tar" in shown
        and "***" in shown
    )


def partial(folder, what, scenes):
    """A run with something missing, and what its page must say."""
    if what == "going":
        run = make_run(folder, scenes, steps=4)
        with (run / "metrics.jsonl").open("a") as file:
            file.write('{"step": 5, "kind": "train", "lo')
        return run, [
            "unfinished: step 4 of 6",
            "the last line of metrics.jsonl was left out",
            "results.json",
        ]
    if what == "no checkpoint":
        return make_run(folder, scenes, checkpoints=False), [
            "no checkpoint",
            "only what the run logged is shown",
        ]
    if what == "damaged checkpoint":
        run = make_run(folder, scenes)
        next(run.glob("checkpoints/*/model.safetensors")).write_bytes(b"x")
        return run, ["all 1 checkpoints are damaged"]
    if what == "no eval section":
        return make_run(folder, evals=()), [
            "the configuration has no eval section",
            "names no zeroshot task",
            "names no retrieval",
        ]
    if what == "no data":
        gone = folder / "gone"
        return make_run(folder, gone), [
            "no evaluation data at …/retrieval",
            "no evaluation data at …/zeroshot",
        ]
    if what == "only a checkpoint":
        run = make_run(folder, scenes)
        for name in ("config.yaml", "metrics.jsonl", "results.json"):
            (run / name).unlink()
        return run, [
            "no curves: metrics.jsonl is not there",
            "the configuration is that of checkpoints/step_00000006",
        ]
    if what == "nothing but a configuration":
        run = make_run(folder, checkpoints=False)
        (run / "metrics.jsonl").write_text("")
        (run / "results.json").unlink()
        return run, ["no training record yet", "no checkpoint", "unfinished: step 0 of 6"]
    run = make_run(folder, checkpoints=False, steps=5)
    with (run / "metrics.jsonl").open("a") as file:
        file.write(
            '{"step": 6, "kind": "train", "loss": NaN}\nnonsense\n'
            '{"step": 7, "kind": "train", "loss": Infinity}\n'
        )
    (run / "config.yaml").write_text("a: [")
    (run / "results.json").write_text("{")
    said = ["not finite at step 6 and 1 more", "line 8 of metrics.jsonl was left out"]
    return run, [*said, "config.yaml cannot be read", "results.json cannot be read"]


KINDS = [
    "going",
    "no checkpoint",
    "damaged checkpoint",
    "no eval section",
    "no data",
    "only a checkpoint",
    "nothing but a configuration",
    "diverged and broken",
]


@pytest.mark.parametrize("what", KINDS)
def test_partial_run_says_what_is_missing(what, tmp_path, scenes):
    run, said = partial(tmp_path / "run", what, scenes)
    got = read(page.write(run, samples=10))
    for sentence in said:
        assert sentence in got.text, (sentence, got.text[:3000])
    assert str(tmp_path) not in (run / "report.html").read_text()


DEEP = "[" * 100_000
LINES = [DEEP, "[1]", '{"kind": ["train"], "step": 1}', '{"kind": "train", "step": Infinity}']


def test_damaged_files_of_a_run_cost_themselves(tmp_path):
    run = make_run(tmp_path / "run", checkpoints=False)
    n_before = len(runs.read(run).train)
    with (run / "metrics.jsonl").open("a") as file:
        file.write("".join(f"{line}\n" for line in LINES))
    state = run / "checkpoints" / "step_00000006" / "state.json"
    state.parent.mkdir(parents=True)

    n_read = 0
    for content in (DEEP, "[1]", '"x"', "5"):
        for path in (state, run / "config.yaml", run / "results.json"):
            path.write_text(content)
        damaged = runs.read(run)
        notes = " ".join(damaged.notes)
        assert (damaged.state, damaged.config, damaged.results) == ({}, {}, [])
        assert len(damaged.train) == n_before and "metrics.jsonl was left out" in notes
        assert "has no readable state.json" in notes and "results.json cannot be read" in notes
        n_read += 1
    assert n_read == 4


def test_no_run_is_a_message(tmp_path, capsys):
    (tmp_path / "something").write_text("x")
    for folder in (tmp_path, tmp_path / "absent"):
        assert cli.main(["report", str(folder)]) == 1
        assert re.search(
            r"is no (run|folder).*config\.yaml, metrics\.jsonl", capsys.readouterr().err
        )
    run = make_run(tmp_path / "run", checkpoints=False)
    assert cli.main(["report", str(run), "--to", str(tmp_path)]) == 1
    assert "is a folder; name a file" in capsys.readouterr().err
    assert cli.main(["report", str(run), str(run), "--against", str(run)]) == 1
    assert cli.main(["report", str(run), "--samples", "1"]) == 1


def test_command_and_its_help(tmp_path, capsys):
    run = make_run(tmp_path / "run", checkpoints=False)
    assert (
        cli.main(["report", str(run), "--no-model", "--to", str(tmp_path / "new" / "page.html")])
        == 0
    )
    assert "page.html" in capsys.readouterr().out
    read(tmp_path / "new" / "page.html")
    program = (
        "import sys; from vlp.cli import main\n"
        "try: main(['report', '--help'])\n"
        "except SystemExit: print(sorted(sys.modules))"
    )
    output = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    ).stdout
    assert "vlp report runs/demo" in output
    assert not any(f"'{heavy}'" in output for heavy in ("torch", "numpy", "PIL", "yaml"))


def test_steps_in_epochs_need_the_checkpoint(tmp_path):
    run = make_run(tmp_path / "run", train={"duration": "2ep", "batch": 4})
    assert runs.read(run).planned_steps == 20
    shutil.rmtree(run / "checkpoints")
    assert runs.read(run).planned_steps is None
