"""What a launcher started is what was asked for, or it is refused with the command that works."""

import os
import subprocess
import sys

import pytest

from tests.test_train import ROOT
from vlp.config import Duration, Train
from vlp.engines import LaunchError, launched_processes, start
from vlp.launch.train import arguments
from vlp.saving import check_grace

VARIABLES = (
    "WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "ACCELERATE_MIXED_PRECISION",
    "SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE",
)  # fmt: skip
WHOLE = {"RANK": "1", "LOCAL_RANK": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}


@pytest.fixture
def environment(monkeypatch):
    def make(**variables):
        for name in VARIABLES:
            monkeypatch.delenv(name, raising=False)
        for name, value in variables.items():
            monkeypatch.setenv(name, value)

    return make


@pytest.mark.parametrize(
    ("variables", "count"),
    [
        ({}, 1),
        ({"WORLD_SIZE": "1"}, 1),
        ({"WORLD_SIZE": "2", **WHOLE}, 2),
        ({"WORLD_SIZE": "2", **WHOLE, "SLURM_STEP_NUM_TASKS": "4"}, 2),
        ({"SLURM_STEP_NUM_TASKS": "1"}, 1),
        ({"ACCELERATE_MIXED_PRECISION": "no"}, 1),
        ({"MASTER_ADDR": "node1"}, 1),
    ],
)
def test_what_holds_together_is_accepted(environment, variables, count):
    environment(**variables)
    assert launched_processes() == count


@pytest.mark.parametrize(
    ("variables", "parts"),
    [
        ({"WORLD_SIZE": "2"}, ("RANK", "MASTER_ADDR", "torchrun", "unset WORLD_SIZE")),
        ({"WORLD_SIZE": "2", "RANK": "0"}, ("LOCAL_RANK", "torchrun")),
        ({"WORLD_SIZE": "two"}, ("'two'", "a number")),
        ({"WORLD_SIZE": "0"}, ("'0'", "a number")),
        ({"WORLD_SIZE": "2", **WHOLE, "RANK": "2"}, ("RANK is '2'", "below WORLD_SIZE")),
        ({"WORLD_SIZE": "1", "RANK": "-1"}, ("RANK is '-1'", "torchrun")),
        (
            {"ACCELERATE_MIXED_PRECISION": "no", "MASTER_ADDR": "127.0.0.1"},
            ("started one", "cpu2.yaml", "torchrun"),
        ),
        ({"SLURM_STEP_NUM_TASKS": "4"}, ("SLURM_STEP_NUM_TASKS is 4", "train.sbatch")),
        ({"OMPI_COMM_WORLD_SIZE": "2"}, ("OMPI_COMM_WORLD_SIZE is 2", "torchrun")),
        ({"PMI_SIZE": "2"}, ("PMI_SIZE is 2", "accelerate launch")),
    ],
)
def test_what_does_not_is_refused_with_a_way_out(environment, variables, parts):
    environment(**variables)
    with pytest.raises(LaunchError) as caught:
        launched_processes()
    assert all(part in str(caught.value) for part in parts), str(caught.value)


def test_accelerate_asked_for_two_on_a_cpu_is_refused_for_starting_one(settings, tmp_path):
    settings(out="run")
    command = [
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        "--num_processes",
        "2",
        "--cpu",
        "launch/train.py",
    ]
    done = subprocess.run(
        [*command, str(tmp_path / "run.yaml")],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode != 0
    assert "vlp: accelerate was asked for several processes and started one" in done.stderr
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("launcher", "engine"),
    [
        ("fsdp2", "ddp"),
        ("fsdp2", "zero2"),
        ("zero2", "fsdp2"),
        ("zero2", "ddp"),
        ("zero2", "zero1"),
    ],
)
def test_an_engine_that_the_launcher_was_not_configured_for_is_refused(
    environment, monkeypatch, launcher, engine
):
    environment()
    if launcher == "fsdp2":
        monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    else:
        monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
        monkeypatch.setenv(
            "ACCELERATE_DEEPSPEED_CONFIG_FILE", str(ROOT / f"launch/deepspeed/{launcher}.json")
        )
    with pytest.raises(
        LaunchError,
        match=f"train.engine is {engine}, .* configured for {launcher}; .*{engine}.yaml",
    ):
        start(Train(Duration(2, "steps"), 8, engine=engine))


@pytest.mark.parametrize(
    ("typed", "restarts", "expected"),
    [
        ([], 0, ["resume=auto"]),
        (["resume=RUN/checkpoints/step_2"], 0, ["resume=RUN/checkpoints/step_2"]),
        (["resume=RUN/checkpoints/step_2"], 1, ["resume=RUN/checkpoints/step_2", "resume=auto"]),
    ],
)
def test_a_job_starts_where_it_is_told_and_goes_on_from_where_it_was(
    tmp_path, typed, restarts, expected
):
    """The script itself, with commands of SLURM that only write down what they are asked."""
    asked = tmp_path / "asked"
    commands(tmp_path, scontrol="echo node1", srun=f'printf "%s\\n" "$@" > {asked}')
    job = run_job(tmp_path, "clip", *typed, SLURM_RESTART_COUNT=str(restarts))
    assert job.returncode == 0, job.stderr
    arguments = asked.read_text().splitlines()
    assert [argument for argument in arguments if argument.startswith("resume=")] == expected


def commands(folder, **scripts):
    """Commands on the PATH that only do what a test says, and the python of this environment."""
    for name, does in scripts.items():
        (folder / name).write_text(f"#!/bin/bash\n{does}\n")
        (folder / name).chmod(0o755)
    # No link: the interpreter finds its environment by its own place.
    (folder / "python").write_text(f'#!/bin/bash\nexec {sys.executable} "$@"\n')
    (folder / "python").chmod(0o755)


def run_script(folder, script, *arguments, **variables):
    """A script of launch/ in another folder than the repository's."""
    ours = ("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES")
    environment = {name: value for name, value in os.environ.items() if name not in ours}
    environment |= {"PATH": f"{folder}{os.pathsep}{os.environ['PATH']}", **variables}
    return subprocess.run(
        ["bash", ROOT / "launch" / script, *arguments],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
    )


def run_job(folder, *arguments, **variables):
    slurm = {
        "SLURM_JOB_NODELIST": "node1",
        "SLURM_JOB_ID": "7",
        "SLURM_NNODES": "2",
        "SLURM_NODEID": "1",
        "SLURM_GPUS_ON_NODE": "4",
        "SLURM_CPUS_PER_TASK": "32",
    }
    return run_script(folder, "slurm/train.sbatch", *arguments, **slurm, **variables)


LAUNCHER = """printf "%s\n" "$@" > arguments
env | grep -E "^(TORCH|NCCL|OMP)" > environment"""


def started(folder):
    """The arguments that the launcher was given, and the environment that was set for it."""
    arguments = (folder / "arguments").read_text().splitlines()
    lines = (folder / "environment").read_text().splitlines()
    return arguments, dict(line.split("=", 1) for line in lines)


def test_a_job_starts_any_engine_from_any_folder(tmp_path):
    node = 'while [[ "$1" == --* ]]; do shift; done; exec "$@"'
    commands(tmp_path, scontrol="echo node1", srun=node, accelerate=LAUNCHER)
    file = ROOT / "launch" / "accelerate" / "zero2.yaml"
    job = run_job(tmp_path, "clip", "train.batch=64", ACCELERATE_FILE=str(file))
    assert job.returncode == 0, job.stderr

    arguments, environment = started(tmp_path)
    options = dict(zip(arguments[1::2], arguments[2::2]))
    assert options["--config_file"] == str(file) and options["--num_processes"] == "8"
    assert options["--machine_rank"] == "1" and options["--main_process_ip"] == "node1"
    paths = [options["--deepspeed_config_file"], arguments[-4]]
    assert [os.path.basename(path) for path in paths] == ["zero2.json", "train.py"]
    assert all(os.path.isabs(path) and os.path.exists(path) for path in paths)
    assert arguments[-3:] == ["clip", "train.batch=64", "resume=auto"]

    assert environment["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"] == "290"
    assert environment["OMP_NUM_THREADS"] == "8" and environment["NCCL_DEBUG"] == "WARN"
    assert {"TORCH_FR_BUFFER_SIZE", "TORCH_NCCL_DUMP_ON_TIMEOUT"} < environment.keys()


def test_a_job_asked_to_stop_while_it_starts_goes_back_into_the_queue(tmp_path):
    """The signal comes before there is a launcher to pass it on to."""
    asks = 'if [ "$1" = show ]; then kill -TERM $PPID; echo node1; else echo "$1" > asked; fi'
    # The command substitution of the script stands between the two.
    asks = asks.replace("$PPID", "$(ps -o ppid= -p $PPID)")
    commands(tmp_path, scontrol=asks, srun='trap "exit 9" TERM; sleep 20 & wait')
    job = run_job(tmp_path, "clip")
    assert job.returncode == 143, job.stderr
    assert (tmp_path / "asked").read_text() == "requeue\n"


def test_a_save_that_a_launcher_would_cut_off_is_warned_of(environment, monkeypatch, capsys):
    environment()
    for name in ("TORCHELASTIC_RUN_ID", "TORCH_ELASTIC_SHUTDOWN_TIMEOUT"):
        monkeypatch.delenv(name, raising=False)
    check_grace(600)  # nobody kills

    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "1")
    check_grace(14)
    assert not capsys.readouterr().err
    check_grace(40)
    said = capsys.readouterr().err
    assert "saving took 40 s" in said and "killed by its launcher after 30 s" in said
    assert "export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=160" in said
    monkeypatch.setenv("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "160")
    check_grace(40)
    assert not capsys.readouterr().err


@pytest.mark.parametrize(
    ("gpus", "variables", "file", "n_ranks"),
    [
        ("echo a; echo b; echo c; echo d", {}, "ddp.yaml", "4"),
        ("echo a; echo b", {"CUDA_VISIBLE_DEVICES": "0,3,5"}, "ddp.yaml", "3"),
        ("exit 9", {}, "cpu2.yaml", "2"),
        ("exit 9", {"LOCAL_RANKS": "3"}, "cpu2.yaml", "3"),
    ],
)
def test_one_machine_starts_a_rank_for_each_gpu_with_the_grace_set(
    tmp_path, gpus, variables, file, n_ranks
):
    commands(tmp_path, **{"nvidia-smi": gpus}, nproc="echo 12", accelerate=LAUNCHER)
    done = run_script(tmp_path, "local.sh", "clip", "seed=1", **variables)
    assert done.returncode == 0, done.stderr

    arguments, environment = started(tmp_path)
    assert arguments[:2] == ["launch", "--config_file"] and os.path.basename(arguments[2]) == file
    assert arguments[3:5] == ["--num_processes", n_ranks] and arguments[-2:] == ["clip", "seed=1"]
    assert environment["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"] == "110"
    assert environment["OMP_NUM_THREADS"] == str(12 // int(n_ranks))


@pytest.mark.parametrize(
    ("restarts", "typed", "expected"),
    [
        ({}, ["clip"], ["train", "clip"]),
        ({"TORCHELASTIC_RESTART_COUNT": "0"}, ["clip", "resume=X"], ["train", "clip", "resume=X"]),
        (
            {"TORCHELASTIC_RESTART_COUNT": "2"},
            ["clip", "resume=X"],
            ["train", "clip", "resume=X", "resume=auto"],
        ),
    ],
)
def test_ranks_that_are_started_anew_go_on_from_the_newest_checkpoint(restarts, typed, expected):
    assert arguments(typed, restarts) == expected


@pytest.mark.parametrize(
    ("variables", "options"),
    [
        ({}, {"--nnodes": "1", "--nproc-per-node": "2", "--max-restarts": "3"}),
        ({"LOCAL_RANKS": "4", "MAX_RESTARTS": "0"}, {"--nproc-per-node": "4"}),
        (
            {"N_NODES": "2:4", "HEAD": "node1:29400", "RUN_ID": "a b"},
            {"--nnodes": "2:4", "--rdzv-endpoint": "node1:29400", "--rdzv-id": "a b"},
        ),
        (
            {"N_NODES": "4", "HEAD": "n:1", "RUN_ID": "a", "NODE_RANK": "0"},
            {"--rdzv-backend": "c10d", "--rdzv-conf": "read_timeout=600,is_host=true"},
        ),
        (
            {"N_NODES": "4", "HEAD": "n:1", "RUN_ID": "a", "NODE_RANK": "3"},
            {"--rdzv-conf": "read_timeout=600,is_host=false"},
        ),
    ],
)
def test_torchrun_is_given_options_that_it_knows(tmp_path, variables, options):
    from torch.distributed.run import get_args_parser

    commands(tmp_path, **{"nvidia-smi": "exit 9"}, nproc="echo 12", torchrun=LAUNCHER)
    done = run_script(tmp_path, "torchrun.sh", "my clip.yaml", "seed=1", **variables)
    assert done.returncode == 0, done.stderr

    passed, environment = started(tmp_path)
    parsed = get_args_parser().parse_args(passed)
    for name, value in options.items():
        assert str(getattr(parsed, name.lstrip("-").replace("-", "_"))) == value, name
    assert parsed.standalone == ("N_NODES" not in variables)
    assert os.path.basename(parsed.training_script) == "train.py"
    assert parsed.training_script_args == ["my clip.yaml", "seed=1", "resume=auto"]
    assert environment["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"] == "110"
    assert "TORCH_NCCL_DUMP_ON_TIMEOUT" in environment


def test_torchrun_on_several_nodes_is_refused_without_a_place_to_meet(tmp_path):
    commands(tmp_path, torchrun=LAUNCHER)
    done = run_script(tmp_path, "torchrun.sh", "clip", N_NODES="2", HEAD="node1:29400")
    assert done.returncode == 2 and "set HEAD=HOST:PORT and RUN_ID=NAME" in done.stderr
    assert not (tmp_path / "arguments").exists()
