"""The loop end to end on generated scenes: resume, kill, damage, refusals, two processes by
`accelerate launch`.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from vlp import checkpoint, config
from vlp.eval.evaluation import in_training
from vlp.export.folder import export_run
from vlp.lifetime import Interrupted, Stopped, StopRequest, give_way
from vlp.step import NonFiniteError
from vlp.train import train

ROOT = Path(__file__).resolve().parent.parent


def losses(run):
    lines = [json.loads(line) for line in (Path(run) / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line["loss"] for line in lines if line["kind"] == "train"}


def test_resume_in_mid_epoch_is_bit_for_bit(settings, capsys):
    whole = train(settings(out="whole"))
    assert sorted(losses(whole)) == list(range(1, 10))
    assert [p.name for p in checkpoint.all_of(whole)] == ["step_00000006", "step_00000009"]
    shutil.copytree(whole, whole.parent / "cut")
    shutil.rmtree(whole.parent / "cut" / "checkpoints" / "step_00000009")
    again = train(settings("resume=auto", out="cut"))
    # Steps 7 to 9 were computed anew, 1 to 6 are those of before.
    assert losses(again) == losses(whole)
    one, other = (checkpoint.load(checkpoint.newest(run)) for run in (whole, again))
    assert all(one.model[k].equal(other.model[k]) for k in one.model)
    assert all(one.optimizer[k].equal(other.optimizer[k]) for k in one.optimizer)
    assert len(one.optimizer) > 30


def test_reports_say_what_passes_a_second_and_how_much_memory_it_took(settings):
    run = train(settings("train.duration=2", "data.workers=0"))
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert len(records) == 2
    for record in records:
        # Captions of scenes have 5 to 23 words, and are cut in steps of eight.
        assert 8 <= record["text_tokens_s"] / record["samples_s"] <= 24
        assert 0.1 < record["peak_resident_gib"] < 100
        # No device here whose peak is known; counts of a step are in the rates.
        assert record.keys().isdisjoint({"mfu", "peak_device_gib", "pictures", "text_tokens"})


@pytest.mark.parametrize(
    "forgotten", ["the loader's position", "the moments", "the numbers of each sample"]
)
def test_a_resume_that_forgets_something_is_noticed(settings, monkeypatch, forgotten):
    """Negative control: the same comparison fails when the data start over, or AdamW does, or the
    objective.
    """
    whole = train(settings("train.duration=6", out="whole"))
    shutil.copytree(whole, whole.parent / "cut")
    shutil.rmtree(whole.parent / "cut" / "checkpoints" / "step_00000006")
    name = {
        "the loader's position": "vlp.data.loader.Loader.load_state_dict",
        "the moments": "vlp.engines.replicated.Replicated.load_moments",
        "the numbers of each sample": "vlp.losses._table.Table.load",
    }[forgotten]
    monkeypatch.setattr(name, lambda self, state: None)
    again = losses(train(settings("train.duration=6", "resume=auto", out="cut")))
    before = losses(whole)
    assert {s: again[s] for s in (1, 2, 3)} == {s: before[s] for s in (1, 2, 3)}
    assert all(again[s] != before[s] for s in (5, 6))


def test_damaged_checkpoint_is_named_and_the_one_before_is_used(settings, capsys):
    whole = train(settings(out="whole"))
    before = losses(whole)
    weights = whole / "checkpoints" / "step_00000009" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    # What a kill in the middle of a save leaves.
    (whole / "checkpoints" / "step_00000012.tmp").mkdir()
    train(settings("resume=auto", out="whole"))
    printed = capsys.readouterr()
    assert "step_00000009/model.safetensors is damaged: found 1000 bytes" in printed.err
    assert "step_00000006" in printed.out
    assert losses(whole) == before


def test_a_run_killed_before_its_last_evaluation_gets_it_on_resume(settings, scenes):
    tasks = f"eval={{zeroshot: {{data: {scenes / 'zeroshot'}}}}}"
    run = train(settings("train.duration=2", tasks))
    # As if killed: the last checkpoint stands, nothing was evaluated.
    assert not (run / "results.json").exists()
    train(settings("train.duration=2", tasks, "resume=auto"), in_training)
    (record,) = json.loads((run / "results.json").read_text())
    assert record["label"] == "zeroshot" and 0 <= record["metrics"]["acc1"] <= 1


def test_training_starts_from_a_run_or_from_its_export(settings, tmp_path):
    first = train(settings("train.duration=3", out="first"))
    export_run(first, tmp_path / "export")
    begun = {}
    for name, source in (("run", first), ("export", tmp_path / "export"), ("random", None)):
        begun[name] = losses(
            train(settings("train.duration=1", f"init_from={source or 'null'}", out=name))
        )[1]
    assert begun["run"] == begun["export"] != begun["random"]
    with pytest.raises(checkpoint.CheckpointError, match="another architecture"):
        train(settings(f"init_from={first}", "model.embed_dim=24", out="other"))
    with pytest.raises(ValueError, match="nowhere"):
        train(settings("init_from=nowhere", out="none"))


def test_a_start_from_weights_that_compute_or_see_something_else_is_refused(
    settings, tmp_path, capsys
):
    """Shapes fit, and every number would be wrong: another activation, other normalisation, other
    resizing.
    """
    first = train(settings("train.duration=1", out="first"))
    export_run(first, tmp_path / "export")
    stated = tmp_path / "export/open_clip_config.json"
    described = json.loads(stated.read_text())
    quick = ("model.image_tower.quick_gelu=true", "model.text_tower.quick_gelu=true")
    with pytest.raises(
        ValueError,
        match=r"init_from .* trained with GELU, and this model has quick GELU; "
        r"set quick_gelu: false",
    ):
        train(settings(f"init_from={first}", *quick, out="quick"))
    with pytest.raises(
        ValueError, match=r"weights of .* were trained with GELU, and this model has quick GELU"
    ):
        train(settings(f"model.pretrained={first}", *quick, out="quick"))
    described["preprocess_cfg"]["mean"] = [0.5, 0.5, 0.5]
    stated.write_text(json.dumps(described))
    with pytest.raises(
        ValueError, match=r"reads: mean \(0.5, 0.5, 0.5\), not .*Set model.pretrained to it instead"
    ):
        train(settings(f"init_from={tmp_path / 'export'}", out="mean"))
    # As the message says.
    run = train(
        settings(f"model.pretrained={tmp_path / 'export'}", "train.duration=1", out="taken")
    )
    assert checkpoint.load_model(run).image_spec.mean == (0.5, 0.5, 0.5)


def test_refusals(settings):
    run = train(settings("train.duration=3"))
    with pytest.raises(FileExistsError, match="already holds a run; continue it"):
        train(settings())
    with pytest.raises(checkpoint.CheckpointError, match="another architecture"):
        train(settings("resume=auto", "model.embed_dim=24"))
    for path in checkpoint.all_of(run):
        (path / "state.json").unlink()
    with pytest.raises(checkpoint.CheckpointError, match=r"every checkpoint of .* is damaged"):
        train(settings("resume=auto"))
    with pytest.raises(ValueError, match=r"micro-batches do not divide; use train\.batch=48"):
        train(settings("train.batch=49", out="other"))
    with pytest.raises(ValueError, match="batch"):
        train(settings("train.batch=400", out="large"))
    with pytest.raises(ValueError, match="group"):
        train(settings("pairwise.topology={group: 3}", out="group"))
    with pytest.raises(ValueError, match=r"needs 'bias'.*a logit bias"):
        train(settings("objective={siglip: {}}", out="bias"))
    with pytest.raises(ValueError, match=r"'counting' needs 'counterfactual'.*vlp data counting"):
        train(settings("objective={infonce: {}, counting: {}}", out="count"))
    with pytest.raises(ValueError, match=r"'self_distillation' needs 'ema_image'.*teacher\.ema"):
        train(settings("objective={infonce: {}, self_distillation: {}}", out="ema"))
    with pytest.raises(ValueError, match="nowhere"):
        train(settings("data.sources.0.path=/nowhere", out="absent"))
    # A refused run leaves nothing that would be in its own way.
    assert not (run.parent / "absent").exists()


def test_fewer_shards_than_workers(settings):
    """200 scenes in one shard, three loader processes: the same batches as without any."""
    none = train(settings("data.workers=0", "train.duration=5", out="none"))
    three = train(settings("data.workers=3", "train.duration=5", out="three"))
    assert losses(none) == losses(three)


def test_sigterm_to_the_group_saves_and_the_rest_follows_bit_for_bit(settings, tmp_path):
    options = (
        "train.duration=10",
        "checkpoint.every=100%",
        # The run waits for the signal: on a busy machine it was over before that came.
        "train.optimizer.schedule=tests.data.stuck:halting_rate",
    )
    whole = train(settings(*options, out="whole"))
    settings(out="killed")
    command = [sys.executable, "-m", "vlp.cli", "train", str(tmp_path / "killed.yaml"), *options]
    # Sums are added up in another order by another number of threads; tests.ranks leaves
    # OMP_NUM_THREADS=1 to children.
    environment = os.environ | {
        "OMP_NUM_THREADS": str(torch.get_num_threads()),
        "HALT": str(tmp_path / "go on"),
    }
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
        env=environment,
        start_new_session=True,
    )
    metrics = tmp_path / "killed" / "metrics.jsonl"
    deadline = time.monotonic() + 200
    while time.monotonic() < deadline and not (
        metrics.exists() and metrics.read_text().count("\n") >= 6
    ):
        time.sleep(0.02)
    try:
        os.killpg(process.pid, signal.SIGTERM)  # as launchers do
        (tmp_path / "go on").touch()
        output, _ = process.communicate(timeout=90)
    finally:
        process.kill()
    assert process.returncode == 128 + signal.SIGTERM
    assert "stopped by SIGTERM" in output and "resume=auto" in output
    assert max(losses(tmp_path / "killed")) in (6, 7)
    train(settings(*options, "resume=auto", out="killed"))
    assert losses(tmp_path / "killed") == losses(whole)


STUCK = (  # four steps of data, and then none
    "data.sources=[{name: webdataset, pipeline: 'tests.data.stuck:samples', samples: 4000}]",
    "train.batch=64",
    "train.duration=100",
    "checkpoint.every=100%",
    "objective={infonce: {}}",
)


def send_once(signum, due):
    """Send a signal to this process once `due()`."""

    def watch():
        while not due():
            time.sleep(0.02)
        time.sleep(0.3)
        os.kill(os.getpid(), signum)

    threading.Thread(target=watch, daemon=True).start()


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1])
def test_every_signal_that_asks_to_stop_saves_also_while_the_run_waits_for_data(
    settings, tmp_path, signum
):
    before = signal.getsignal(signum)
    metrics = tmp_path / "run" / "metrics.jsonl"
    send_once(signum, lambda: metrics.exists() and metrics.read_text().count("\n") >= 4)
    start = time.monotonic()
    with pytest.raises(
        Stopped, match=rf"stopped by {signum.name} after step 4; saved. Continue with resume=auto"
    ) as caught:
        train(settings(*STUCK))
    assert caught.value.signum == signum and time.monotonic() - start < 60
    assert [path.name for path in checkpoint.all_of(tmp_path / "run")] == ["step_00000004"]
    assert signal.getsignal(signum) == before


@pytest.mark.parametrize("every", ["50%", "100%"])  # in the middle, and after the last step
def test_a_signal_during_an_evaluation_saves_at_once(settings, scenes, tmp_path, every):
    begun = []

    def evaluate(model, tasks, dtype):
        begun.append(True)
        for _ in range(600):
            give_way()
            time.sleep(0.05)

    send_once(signal.SIGINT, lambda: begun)
    tasks = f"eval={{zeroshot: {{data: {scenes / 'zeroshot'}, every: {every}}}}}"
    with pytest.raises(Stopped, match="stopped by SIGINT"):
        train(
            settings("train.duration=4", "checkpoint.every=100%", tasks, "data.workers=0"), evaluate
        )
    step = 2 if every == "50%" else 4
    assert [path.name for path in checkpoint.all_of(tmp_path / "run")] == [f"step_{step:08d}"]


def test_an_evaluation_gives_way_on_every_rank_before_its_next_batch():
    from vlp.eval import embed

    with StopRequest() as stop:
        stop.received = signal.SIGTERM
        with pytest.raises(Interrupted):
            encoder = SimpleNamespace(
                fingerprint="", encode_texts=None, n_truncated=lambda texts: 0, vocabulary=None
            )
            embed.texts(encoder, ["a", "b"], embed.Context())


def test_a_second_signal_ends_the_process_at_once_and_nohup_is_respected():
    script = (
        "import os, signal, time; from vlp.lifetime import StopRequest\n"
        "signal.signal(signal.SIGHUP, signal.SIG_IGN)\n"
        "with StopRequest() as stop:\n"
        "    os.kill(os.getpid(), signal.SIGHUP); assert not stop.received\n"
        "    os.kill(os.getpid(), signal.SIGINT)\n"
        "    os.kill(os.getpid(), signal.SIGINT)  # one act, sent twice\n"
        "    assert stop.received == signal.SIGINT; print('asked', flush=True)\n"
        "    time.sleep(.6); os.kill(os.getpid(), signal.SIGINT); time.sleep(60)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert done.stdout == "asked\n" and done.returncode == -signal.SIGINT, done.stderr
    assert "the same again ends the run at once" in done.stderr


def test_a_console_that_nobody_reads_asks_to_stop_and_stays_quiet():
    script = (
        "import signal; from vlp.lifetime import StopRequest\n"
        "with StopRequest() as stop:\n"
        "    with stop.console():\n"
        "        print('step 1' * 99999, flush=True)\n"
        "    assert stop.received == signal.SIGPIPE\n"
        "    print('saved', flush=True)\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", script], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    process.stdout.close()
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 0 and errors == b"", errors.decode()


@pytest.mark.parametrize(
    "had", ["float32", "bf16"]
)  # one of them is not what this machine would choose
def test_a_resumed_run_keeps_the_precision_that_it_began_with(settings, capsys, had):
    run = train(settings(f"train.precision={had}", "train.duration=2", "data.workers=0"))
    train(settings("train.precision=auto", "train.duration=3", "resume=auto", "data.workers=0"))
    assert config.load(run / "config.yaml").train.precision == had
    assert "another train.precision" not in capsys.readouterr().out


def test_auto_precision_is_recorded_as_what_it_came_to(settings):
    from vlp.engines import precision

    run = train(settings("train.precision=auto", "train.duration=1", "data.workers=0"))
    assert config.load(run / "config.yaml").train.precision == precision.faster("cpu")


def test_the_faster_precision_is_a_short_measurement_that_leaves_random_numbers_alone():
    from vlp.engines import precision

    torch.manual_seed(5)
    expected, threads = torch.rand(3), torch.get_num_threads()
    torch.manual_seed(5)
    chosen = precision.faster("cpu")
    assert torch.rand(3).equal(expected) and torch.get_num_threads() == threads
    seconds = precision._measured()
    if (
        not 0.7 < seconds["bf16"] / seconds["float32"] < 1.2
    ):  # clearly one or the other on this machine
        assert chosen == min(seconds, key=seconds.get)
    assert sum(seconds.values()) < 1


LAUNCH = [
    "-m",
    "accelerate.commands.launch",
    "--config_file",
    "launch/accelerate/cpu2.yaml",
    "launch/train.py",
]
# Dropout masks depend on the ranks' share of a batch.
SAME = (
    "train.duration=20",
    "model.image_tower.patch_dropout=0",
)


def test_accelerate_launch_starts_two_processes_and_gives_the_losses_of_one(
    settings, scenes, tmp_path
):
    """Losses, and the evaluation inside training, by `accelerate launch` and by one process."""
    options = (*SAME, f"eval={{zeroshot: {{data: {scenes / 'zeroshot'}, every: 50%}}}}")
    one = train(settings(*options, out="one"), in_training)
    settings(out="two")
    command = [sys.executable, *LAUNCH, str(tmp_path / "two.yaml"), *options]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "2 process(es)" in done.stdout
    two = losses(tmp_path / "two")
    assert sorted(two) == sorted(losses(one)) == list(range(1, 21))
    assert max(abs(two[s] - loss) / loss for s, loss in losses(one).items()) <= 1e-5
    results = [
        json.loads((run / "results.json").read_text())[0]["metrics"]
        for run in (one, tmp_path / "two")
    ]
    # Of 56 pictures, one may lie on an edge.
    assert results[0] == pytest.approx(results[1], abs=0.02)
    evaluated = [
        json.loads(line)["step"]
        for line in (one / "metrics.jsonl").read_text().splitlines()
        if '"eval"' in line
    ]
    assert evaluated == [10, 20]


@pytest.mark.parametrize(
    ("overrides", "advice"),
    [
        (
            (),
            "Start anew in another folder (out=…) "
            "with a lower train.optimizer.lr or train.non_finite=skip.",
        ),
        (
            (
                "train.non_finite=skip",
                "train.max_skipped=1",
                "train.precision=bf16",
                "checkpoint.every=1",
            ),
            "Go on with resume=auto and a lower train.optimizer.lr "
            "or train.max_skipped above 1 or train.precision=float32, or from ",
        ),
    ],
)
def test_a_run_that_met_nan_names_what_it_can_still_change(settings, overrides, advice):
    """Not what is set already."""
    with pytest.raises(NonFiniteError) as caught:
        train(
            settings(
                "train.optimizer.lr=1e30",
                "train.optimizer.warmup=1",
                "objective={infonce: {}}",
                *overrides,
            )
        )
    assert advice in str(caught.value), str(caught.value)
