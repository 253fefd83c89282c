"""Around the scores: embeddings kept by content, any number of ranks, results files, comparison,
the command, training.
"""

import argparse
import dataclasses
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests import ranks
from tests.eval import material
from vlp import cli, plugin
from vlp.eval import embed, evaluation, models, run
from vlp.eval.embed import Context
from vlp.eval.pictures import Contents, DataError, Picture
from vlp.eval.report import comparison, records
from vlp.eval.tasks import zeroshot


@pytest.fixture(scope="module")
def room(tmp_path_factory):
    """Two tiny models and two sets of real photos: classes and captions."""
    root = tmp_path_factory.mktemp("room")
    for seed in (0, 1):
        material.tiny_open_clip(root / f"model{seed}", seed)
    rows = [
        r for r in material.read_jsonl(material.shared("caltech101.jsonl")) if r["split"] == "test"
    ][::60]
    pictures = material.members_of(material.shared("caltech101.tar"), [r["image"] for r in rows])
    classes = sorted({r["class"] for r in rows})
    samples = [(pictures[r["image"]], classes.index(r["class"])) for r in rows]
    material.clip_benchmark_set(
        root / "photos", samples, classes=classes, templates=["a photo of a {c}.", "a {c}"]
    )
    rows = material.read_jsonl(material.shared("coco_open.jsonl"))[:20]
    pictures = material.members_of(material.shared("coco_open.tar"), [r["image"] for r in rows])
    material.clip_benchmark_set(
        root / "captions", [(pictures[r["image"]], r["captions"]) for r in rows], kind="retrieval"
    )
    suite = {
        "zeroshot": {"data": str(root / "photos")},
        "retrieval": {"data": str(root / "captions")},
    }
    (root / "suite.yaml").write_text(json.dumps(suite))
    return root


def tasks(room):
    return plugin.keyed("vlp.eval.tasks", json.loads((room / "suite.yaml").read_text()))


def counted(encoder, calls):
    def image(pixels):
        calls.append(len(pixels))
        return encoder.image(pixels)

    def text(sentences):
        calls.append(len(sentences))
        return encoder.text(sentences)

    return replace(encoder, image=image, text=text)


# --- kept embeddings ------------------------------------------------------------------------------


def test_embeddings_are_computed_once_and_found_by_content(room, tmp_path):
    calls: list[int] = []
    encoder = counted(material.matrix_encoder(), calls)

    def evaluate(this=encoder):
        calls.clear()
        context = Context(
            batch=8, cache=tmp_path / "kept", contents=Contents(tmp_path / "kept/contents.json")
        )
        return evaluation.evaluate(this, tasks(room), context)[0]

    first = evaluate()
    assert calls
    assert evaluate() == first and not calls
    other = replace(encoder, fingerprint="other weights")
    # Nothing of another model is reused.
    assert evaluate(other)[0]["metrics"] == first[0]["metrics"] and calls
    training = replace(encoder, fingerprint="")
    # A model in training is never kept.
    assert evaluate(training) and calls and evaluate(training) and calls


def test_changed_pictures_are_embedded_again(tmp_path):
    files = []
    for i in range(3):
        files.append(tmp_path / f"{i}.png")
        files[-1].write_bytes(material.png(material.picture(i)))
    pictures = [Picture(str(p), str(p)) for p in files]
    encoder = material.known_encoder(
        lambda n: material.direction(n), lambda t: material.direction(t)
    )
    object.__setattr__(encoder, "fingerprint", "known")
    context = Context(cache=tmp_path / "kept", contents=Contents())
    before = embed.images(encoder, pictures, context)
    assert torch.equal(embed.images(encoder, pictures, context), before)
    files[1].write_bytes(material.png(material.picture(77)))
    after = embed.images(encoder, pictures, context)
    assert torch.allclose(after[1], material.direction(77)) and torch.equal(
        after[[0, 2]], before[[0, 2]]
    )
    half = replace(encoder, autocast=torch.bfloat16)
    assert len(list((tmp_path / "kept").glob("*.safetensors"))) == 2
    embed.images(half, pictures, context)  # another precision is another embedding
    # And so is another part of a picture.
    embed.images(encoder, [replace(p, box=(0, 0, 4, 4)) for p in pictures], context)
    assert len(list((tmp_path / "kept").glob("*.safetensors"))) == 4


def test_a_damaged_kept_file_is_computed_again_and_said(room, tmp_path, capsys):
    encoder = models.load(str(room / "model0"))
    context = Context(cache=tmp_path, contents=Contents())
    first = embed.texts(encoder, ["a cat", "a dog"], context)
    (file,) = tmp_path.glob("*.safetensors")
    file.write_bytes(file.read_bytes()[:40])
    assert torch.equal(embed.texts(encoder, ["a cat", "a dog"], context), first)
    assert "computing them again" in capsys.readouterr().err


def test_equal_items_are_embedded_once_and_batches_do_not_matter(room):
    calls: list[int] = []
    encoder = counted(models.load(str(room / "model0")), calls)
    captions = ["a cat", "a dog", "a cat", "two cats", "a dog"]
    rows = embed.texts(encoder, captions, Context(batch=64))
    assert calls == [3]
    assert torch.equal(rows[0], rows[2]) and torch.equal(rows[1], rows[4])
    assert torch.allclose(embed.texts(encoder, captions, Context(batch=2)), rows, atol=1e-6)


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_order_does_not_depend_on_the_threads(workers):
    encoder = material.known_encoder(
        lambda n: material.direction(n), lambda t: material.direction(t)
    )
    pictures = [Picture(str(i), data=material.png(material.picture(i))) for i in range(23)]
    rows = embed.images(encoder, pictures, Context(batch=4, workers=workers))
    assert torch.allclose(rows, torch.stack([material.direction(i) for i in range(23)]))


def test_a_diverged_model_is_refused_not_scored(room):
    encoder = material.known_encoder(
        lambda n: torch.full((8,), float("nan")), lambda t: material.direction(t, dim=8)
    )
    with pytest.raises(ValueError, match="20 of 20 image embeddings are not finite"):
        evaluation.evaluate(encoder, tasks(room)[1:], Context())


# --- ranks ----------------------------------------------------------------------------------------


def evaluate_on_a_rank(room, cache):
    from pathlib import Path

    threads = torch.get_num_threads()
    # As the ranks have it: the number of threads changes the order of sums.
    torch.set_num_threads(1)
    # Several exchanges, as of a large set.
    gathered, embed.GATHERED = embed.GATHERED, 1
    context = Context(batch=8, workers=1, contents=Contents(), cache=Path(cache) if cache else None)
    results, items = evaluation.evaluate(material.matrix_encoder(), tasks(room), context)
    torch.set_num_threads(threads)
    embed.GATHERED = gathered
    return results, {name: value.tolist() for name, value in items.items()}


@pytest.mark.parametrize("n_ranks", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_any_number_of_ranks_gives_the_same_bits(room, tmp_path, n_ranks):
    alone = evaluate_on_a_rank(room, "")
    for result in ranks.run(n_ranks, evaluate_on_a_rank, room, str(tmp_path)):
        assert result == alone


def break_one_picture(folder):
    pictures = [
        Picture(str(i), data=material.png(material.picture(i)) if i != 5 else b"no picture")
        for i in range(8)
    ]
    encoder = material.known_encoder(
        lambda n: material.direction(n), lambda t: material.direction(t)
    )
    try:
        embed.images(encoder, pictures, Context(batch=1, workers=1))
    except DataError as error:
        return str(error)


def test_a_bad_picture_on_one_rank_is_an_error_on_all(tmp_path):
    messages = ranks.run(2, break_one_picture, str(tmp_path), timeout_s=60)
    assert all("image 5 does not open" in message for message in messages)


# --- results and comparison -----------------------------------------------------------------------


RECORD = {
    "label": "zeroshot",
    "dataset": "d",
    "model": "m",
    "metrics": {"acc1": 0.5},
    "data_sha256": "x",
    "protocol": {"version": 1},
}


def command(*arguments):
    return cli.main(["eval", *map(str, arguments)])


def test_the_command_writes_results_that_others_read(room, tmp_path, capsys):
    out = tmp_path / "deep/results.json"
    quick = ("--cache", tmp_path / "kept", "--quiet", "--batch", "16")
    assert (
        command(
            room / "model0",
            "--task",
            "zeroshot",
            "--data",
            room / "photos",
            "split=test",
            "--out",
            out,
            *quick,
        )
        == 0
    )
    shown = capsys.readouterr().out
    ((record, items),) = records.open_results(str(out))
    assert set(records.CLIP_BENCHMARK) <= record.keys()
    assert (record["dataset"], record["task"], record["language"]) == (
        "photos",
        "zeroshot_classification",
        "en",
    )
    assert (
        record["protocol"]["version"] == zeroshot.VERSION
        and record["protocol"]["options"]["split"] == "test"
    )
    assert len(record["data_sha256"]) == len(record["model_sha256"]) == 64
    assert torch.__version__.startswith(record["versions"]["torch"])
    assert (
        record["intervals_95"]["acc1"][0]
        <= record["metrics"]["acc1"]
        <= record["intervals_95"]["acc1"][1]
    )
    assert "mean_per_class_recall" in shown and "chance" in shown and "NOT COMPARABLE" not in shown
    left_out = record | {"counts": {"images": 3, "skipped": 2}}
    assert "zeroshot: NOT COMPARABLE, 2 left out" in records.table([left_out])
    assert items["acc1"][:, 0].mean().item() == pytest.approx(record["metrics"]["acc1"])
    assert not list(out.parent.glob(".*"))


def rows_of_clip_benchmark(paths):
    """What `clip_benchmark build` makes of result files: one row each, scores beside fields."""
    rows = []
    for path in paths:
        content = json.loads(path.read_text())
        row = {**content["metrics"], **content}
        del row["metrics"]
        row["model_fullname"] = row["model"] + " " + row["pretrained"]
        rows.append(row)
    return rows


def test_clip_benchmark_builds_its_table_from_one_file_or_one_a_result(room, tmp_path, capsys):
    usual = (room / "model0", "--suite", room / "suite.yaml", "--cache", "none", "--quiet")
    assert command(*usual, "--out", tmp_path / "all.json") == 0
    assert command(*usual, "--out", f"{tmp_path}/each/") == 0

    (whole,) = rows_of_clip_benchmark([tmp_path / "all.json"])
    files = sorted((tmp_path / "each").glob("*.json"))
    rows = rows_of_clip_benchmark(files)
    assert [file.stem for file in files] == [row["label"] for row in rows] and len(rows) > 1
    for row in rows:
        scores = json.loads((tmp_path / "each" / f"{row['label']}.json").read_text())["metrics"]
        assert scores and all(whole[f"{row['label']}/{name}"] == scores[name] for name in scores)
        assert row["dataset"] in whole["dataset"] and row["task"] in whole["task"]

    # All forms, the list that training writes among them, hold the same for our own tools.
    (tmp_path / "list.json").write_text(json.dumps(whole["results"]))
    each = records.open_results(str(tmp_path / "each"))
    by_label = {record["label"]: (record, sorted(items)) for record, items in each}
    for form in ("all.json", "list.json"):
        opened = records.open_results(str(tmp_path / form))
        for record, items in opened:
            expected_items = [] if form == "list.json" else by_label[record["label"]][1]
            assert (record, sorted(items)) == (by_label[record["label"]][0], expected_items)
        assert len(opened) == len(by_label) == 2
    capsys.readouterr()
    assert command("--compare", tmp_path / "each", tmp_path / "all.json") == 0
    assert "no difference shown" in capsys.readouterr().out


def test_two_models_are_compared_on_the_same_photos(room, tmp_path, capsys):
    for seed in (0, 1):
        out = tmp_path / f"{seed}" / "results.json"
        command(
            room / f"model{seed}",
            "--suite",
            room / "suite.yaml",
            "--out",
            out,
            "--cache",
            "none",
            "--quiet",
        )
    capsys.readouterr()
    assert command("--compare", tmp_path / "0", tmp_path / "1" / "results.json") == 0
    shown = capsys.readouterr().out
    a, b = (
        records.open_results(str(tmp_path / s))[1][0]["metrics"]["text_retrieval_recall@5"]
        for s in "01"
    )
    line = next(line for line in shown.splitlines() if "text_retrieval_recall@5" in line)
    assert f"{a:.4f}" in line and f"{b:.4f}" in line and f"{a - b:+.4f} ±" in line


def test_a_real_difference_is_called_and_its_direction_known(tmp_path):
    generator = torch.Generator().manual_seed(0)
    luck = torch.rand(500, generator=generator)

    def result(name, share, rank):
        hits = torch.stack([(luck < share).double(), torch.ones(500, dtype=torch.float64)], 1)
        ranked = torch.stack([rank + luck.double(), torch.ones(500, dtype=torch.float64)], 1)
        items = {
            "retrieval/text_retrieval_recall@1": hits,
            "retrieval/text_retrieval_mean_rank": ranked,
        }
        metrics = {key.split("/")[1]: float(value[:, 0].mean()) for key, value in items.items()}
        records.write(
            tmp_path / f"{name}.json",
            [RECORD | {"label": "retrieval", "model": name, "metrics": metrics}],
            items,
        )
        return str(tmp_path / f"{name}.json")

    a, b, c = result("a", 0.6, 3.0), result("b", 0.5, 4.0), result("c", 0.6, 3.0)
    lines = comparison.compare(a, b).splitlines()
    assert all("A better" in line for line in lines if "retrieval" in line)
    assert all(
        "B better" in line for line in comparison.compare(b, a).splitlines() if "retrieval" in line
    )
    assert all(
        "no difference shown" in line
        for line in comparison.compare(a, c).splitlines()
        if "retrieval" in line
    )


def test_results_of_other_data_or_protocols_are_not_compared(tmp_path):
    records.write(tmp_path / "a.json", [RECORD], {})
    records.write(tmp_path / "b.json", [RECORD | {"data_sha256": "y"}], {})
    records.write(tmp_path / "c.json", [RECORD | {"protocol": {"version": 2}}], {})
    for other, reason in (("b", "the data differ"), ("c", "protocol versions differ")):
        with pytest.raises(DataError, match=reason):
            comparison.compare(str(tmp_path / "a.json"), str(tmp_path / f"{other}.json"))
    assert "no outcomes by unit" in comparison.compare(
        str(tmp_path / "a.json"), str(tmp_path / "a.json")
    )
    with pytest.raises(DataError, match="no results at"):
        comparison.compare(str(tmp_path / "a.json"), str(tmp_path / "none.json"))


def test_every_setting_of_every_task_is_compared(tmp_path):
    """Each option by itself, set to something else in one of two results."""
    n_settings = n_of_data = 0
    places = [str(tmp_path / "a.json"), str(tmp_path / "b.json")]
    for name in plugin.names("vlp.eval.tasks"):
        for key in dataclasses.fields(plugin.load("vlp.eval.tasks", name).Options):
            for value, place in enumerate(places, 1):
                protocol = {"name": name, "version": 1, "options": {key.name: value}}
                Path(place).write_text(json.dumps([RECORD | {"protocol": protocol}]))
            if key.name in comparison.OF_DATA:
                n_of_data += 1
                assert "acc1" in comparison.compare(*places)
                continue
            n_settings += 1
            with pytest.raises(DataError, match=rf"options differ: {key.name} \(1 and 2\)"):
                comparison.compare(*places)
    assert n_settings >= 24 and n_of_data >= 150


def test_settings_that_a_result_does_not_name_are_the_defaults(tmp_path):
    def place(side, options, **more):
        protocol = {"name": "knn", "version": 1, "options": options}
        records.write(tmp_path / f"{side}.json", [RECORD | {"protocol": protocol} | more], {})
        return str(tmp_path / f"{side}.json")

    assert "acc1" in comparison.compare(place("a", {"data": "x"}), place("b", {"k": 20}))
    with pytest.raises(DataError, match=r"options differ: k \(20 and 5\)$"):
        comparison.compare(place("a", {"data": "x"}), place("b", {"k": 5}))

    other_task = [RECORD | {"protocol": {"name": "linear_probe", "version": 1}}]
    (tmp_path / "c.json").write_text(json.dumps(other_task))
    with pytest.raises(DataError, match=r"the tasks differ \(knn and linear_probe\)"):
        comparison.compare(place("a", {"data": "x"}), str(tmp_path / "c.json"))

    # In training nothing is hashed: there the places must be the same.
    unhashed = {"data_sha256": ""}
    with pytest.raises(DataError, match=r"data \(x and y\), and the data were not hashed"):
        comparison.compare(place("a", {"data": "x"}, **unhashed), place("b", {"data": "y"}))
    same = place("a", {"data": "x"}, **unhashed), place("b", {"data": "x"}, **unhashed)
    assert "acc1" in comparison.compare(*same)
    with pytest.raises(DataError, match="failed in B: ValueError"):
        comparison.compare(same[0], place("b", {"data": "x"}, error="ValueError: no"))


def test_results_of_one_label_are_paired_by_their_data(tmp_path):
    """Two files of one task on other sets, in two folders: outcomes stay with their records."""
    for model, hits in (("a", (1, 1)), ("b", (1, 0))):
        for n, of_set in ((40, "x"), (60, "y")):
            outcomes = torch.ones(n, 2, dtype=torch.float64)
            outcomes[:, 0] = hits[0] if of_set == "x" else hits[1]
            record = RECORD | {"data_sha256": of_set, "metrics": {"acc1": hits[of_set == "y"]}}
            path = tmp_path / model / f"{of_set}.json"
            records.write(path, [record], {"zeroshot/acc1": outcomes})
    lines = comparison.compare(str(tmp_path / "a"), str(tmp_path / "b")).splitlines()[3:]
    assert ["no difference shown" in line for line in lines] == [True, False]

    (tmp_path / "a" / "x.items.safetensors").write_bytes(b"no tensors")
    with pytest.raises(DataError, match=r"x\.items\.safetensors is damaged"):
        comparison.compare(str(tmp_path / "a"), str(tmp_path / "b"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("MODEL", "--task", "zeroshat", "--data", "PHOTOS"), "did you mean 'zeroshot'"),
        (
            ("MODEL", "--task", "zeroshot", "--data", "PHOTOS", "templtes=x"),
            "did you mean 'templates'",
        ),
        (("MODEL", "--task", "zeroshot", "--data", "/nowhere"), "no evaluation data at /nowhere"),
        (("MODEL", "--task", "zeroshot"), "missing key 'data'"),
        (("MODEL", "--task", "zeroshot", "--data", "PHOTOS", "split"), "not of the form key=value"),
        (("no-such-model", "--task", "zeroshot", "--data", "PHOTOS"), "no model 'no-such-model'"),
        (("MODEL",), "give MODEL (or --blend A B) and --task"),
        (
            ("MODEL", "--task", "zeroshot", "--data", "PHOTOS", "--suite", "suite.yaml"),
            "--suite names the tasks itself",
        ),
        (
            ("MODEL", "--task", "zeroshot", "--data", "PHOTOS", "--out", "PHOTOS"),
            "is a folder; name a file",
        ),
    ],
)
def test_wrong_commands_say_what_to_do_and_write_nothing(
    room, tmp_path, capsys, arguments, message
):
    known = {"MODEL": room / "model0", "PHOTOS": room / "photos"}
    filled = [known.get(a, a) for a in arguments]
    quiet = ["--cache", tmp_path / "kept", "--quiet"]
    assert command("--out", tmp_path / "r.json", *quiet, *filled) == 1
    assert message in capsys.readouterr().err
    assert not list(tmp_path.glob("r*"))


def test_help_imports_nothing_heavy():
    import subprocess
    import sys

    code = (
        "import sys, argparse; from vlp.eval import run; "
        "run.arguments(argparse.ArgumentParser()); print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
    assert isinstance(run.HELP, str) and "vlp eval" in run.EXAMPLE
    run.arguments(argparse.ArgumentParser())


# --- inside training ------------------------------------------------------------------------------


def test_the_training_loop_gets_the_same_scores_and_its_random_state_back(room):
    model = material.our_model().train()
    torch.manual_seed(3)
    before = torch.get_rng_state()
    results = evaluation.in_training(model, tasks(room))
    assert torch.equal(torch.get_rng_state(), before)
    assert model.training
    expected = evaluation.evaluate(models.from_model(model.eval()), tasks(room), Context())[0]
    assert [r["metrics"] for r in results] == [r["metrics"] for r in expected]
    assert [r["label"] for r in results] == ["zeroshot", "retrieval"]


def test_a_forward_pass_reuses_the_memory_of_the_one_before():
    import platform
    import subprocess
    import sys

    if platform.libc_ver()[0] != "glibc":
        pytest.skip("the C library is not glibc")
    code = """
import ctypes, importlib.util, resource, sys
spec = importlib.util.spec_from_file_location("memory", sys.argv[1])
memory = importlib.util.module_from_spec(spec)
spec.loader.exec_module(memory)
assert memory.keep_freed()

def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

for _ in range(3):
    before = faults()
    block = bytearray(64 << 20)
    del block
    print(faults() - before)
"""
    command = [sys.executable, "-c", code, str(run.Path(run.__file__).parent / "memory.py")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    first, *later = map(int, done.stdout.split())
    # 16,384 pages of 4 kB, or fewer that are larger, are met once.
    assert len(later) == 2 and max(later) < max(10, first // 10)
