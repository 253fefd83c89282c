"""Secrets planted wherever a user can have them, and a search for them in every file and every line
that vlp writes.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.data.loopback_store import store
from tests.data.material import write_shards
from tests.test_messages import CONFIG

ROOT = Path(__file__).resolve().parent.parent
PLACES = ("user", "password", "signature", "header", "option", "hub", "cloud", "tracker")
SECRETS = {place: f"PLANTED{place}0123456789" for place in PLACES}
PROGRAM = """
import json, sys
from vlp.cli import main
def status(command):
    try:
        return main(command)
    except SystemExit as left:  # wrong usage
        return left.code
print([status(command) for command in json.loads(sys.argv[1])])
"""


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A configuration that reads shards behind an address with every kind of secret."""
    folder = tmp_path_factory.mktemp("planted")
    write_shards(folder / "root" / "train", 48, 8)
    (folder / "root" / "train" / "_index.bin").unlink()
    with store(folder / "root") as server:
        tree = yaml.safe_load(CONFIG.format(out=folder / "work" / "run", shards="unused"))
        host = server.url.replace("http://", f"http://{SECRETS['user']}:{SECRETS['password']}@")
        credential = "A/20260101/us-east-1/s3/aws4_request"
        query = f"?X-Amz-Credential={credential}&X-Amz-Signature={SECRETS['signature']}"
        tree["data"]["sources"] = [
            {
                "name": "remote",
                "path": f"{host}/train/{{00000..00005}}.tar{query}",
                "window": 2,
                "storage": {
                    "headers": {"X-Api-Key": SECRETS["header"]},
                    "encoded": False,
                    "cookies": {"sid": SECRETS["option"]},
                },
            }
        ]
        tree["data"]["workers"] = 1
        tree["log"] = {"trackers": ["tensorboard"]}
        (folder / "mine.yaml").write_text(yaml.safe_dump(tree))
        yield folder, server


def environment(folder: Path) -> dict[str, str]:
    hidden = {
        "HF_TOKEN": SECRETS["hub"],
        "AWS_SECRET_ACCESS_KEY": SECRETS["cloud"],
        "WANDB_API_KEY": SECRETS["tracker"],
    }
    return (
        os.environ
        | hidden
        | {
            "VLP_CACHE": str(folder / "work" / "cache"),
            "OMP_NUM_THREADS": "1",
            "VLP_TRACEBACK": "1",
        }
    )


def vlp(folder: Path, *commands: list[str]) -> tuple[list[int], str]:
    """Exit statuses of commands and all that they printed."""
    program = [sys.executable, "-c", PROGRAM, json.dumps(commands)]
    done = subprocess.run(
        program, cwd=ROOT, env=environment(folder), capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1]), done.stdout + done.stderr


def told(text: str) -> list[str]:
    return [secret for secret in SECRETS.values() if secret in text]


def test_no_secret_is_written_or_said(world):
    folder, server = world
    work, mine = folder / "work", str(folder / "mine.yaml")
    signed = yaml.safe_load((folder / "mine.yaml").read_text())["data"]["sources"][0]["path"]
    stored = ["--storage", f"s3:client_kwargs.endpoint_url={server.url}"]
    stored += ["--storage", "s3:key=k", "--storage", f"s3:secret={SECRETS['option']}"]
    run, storage = str(work / "run"), "data.sources.0.storage"
    commands = [
        ["train", mine, "train.duration=4", "checkpoint.every=2"],
        [
            "train",
            mine,
            "train.duration=5",
            "resume=auto",
        ],  # as scripts do: the configuration brings the secrets again
        ["export", run, "--to", str(work / "export")],
        ["report", run],
        ["data", "stats", str(folder / "root" / "train"), "--to", str(work / "stats")],
        ["data", "filter", signed, "--to", "s3://bucket/filtered", "--min-words", "1", *stored],
        [
            "data",
            "embed",
            str(folder / "root" / "train"),
            "--model",
            run,
            "--to",
            str(work / "embed"),
        ],
    ]
    refusals = [
        ["data", "stats", signed, "--to", f"https://host/x?sig={SECRETS['signature']}", *stored],
        ["data", "stats", signed.replace("/train/", "/none/"), "--to", str(work / "n"), *stored],
        ["data", "stats", signed, "--to", str(work / "n"), "--storage", SECRETS["option"]],
        ["train", mine, f"{storage}.deep.er.key={SECRETS['option']}"],
        ["train", mine, f"{storage}=Bearer {SECRETS['header']}", f"out={work}/other"],
        [
            "train",
            mine,
            f"data.sources.0.path={server.url}/none/0.tar?sig={SECRETS['signature']}",
            f"out={work}/other",
        ],
        ["train", mine, "train.batch=4000", f"out={work}/other"],
        ["train", f"{run}/config.yaml", "resume=auto"],
        ["push", str(work / "stats"), f"you/{SECRETS['hub']}"],
        ["train", mine, f"--token={SECRETS['hub']}"],
    ]
    statuses, said = vlp(folder, *commands, *refusals)
    assert statuses == [0] * len(commands) + [1] * (len(refusals) - 1) + [2], said
    assert "leaves out secrets" in said and "data.sources.0.storage.headers.X-Api-Key=…" in said
    assert "resuming with another data" not in said
    assert not told(said), said

    places = (work, folder / "root" / "filtered")
    written = [path for place in places for path in place.rglob("*") if path.is_file()]
    names = {path.name for path in written}
    assert {
        "config.yaml",
        "metrics.jsonl",
        "README.md",
        "report.html",
        "_stats.json",
        "_embed.json",
    } <= names
    assert any("tfevents" in name for name in names) and any(
        path.suffix == ".bin" for path in written
    )
    found = [
        str(path)
        for path in written
        if told(str(path)) or told(path.read_bytes().decode("latin-1"))
    ]
    assert not found
    assert len(written) > 60
    kept = yaml.safe_load((work / "run" / "config.yaml").read_text())["data"]["sources"][0]
    assert kept["path"].endswith("/train/{00000..00005}.tar?***")
    assert kept["storage"] == {
        "headers": {"X-Api-Key": "***"},
        "encoded": False,
        "cookies": {"sid": "***"},
    }


def test_the_search_finds_what_is_there(world):
    """Negative control: the configuration itself holds all secrets that one can hold."""
    folder, _ = world
    assert len(told((folder / "mine.yaml").read_text())) == 5


def test_a_lock_tells_no_secrets(world):
    folder, _ = world
    program = (
        "import sys\nfrom pathlib import Path\nfrom vlp.locks import held\n"
        "with held(Path(sys.argv[1]), advice=''): print((Path(sys.argv[1]) / '.lock').read_text())"
    )
    address = (
        f"data.sources.0.path=https://u:{SECRETS['password']}@h/0.tar?sig={SECRETS['signature']}"
    )
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            program,
            str(folder / "held"),
            address,
            f"hf_token={SECRETS['hub']}",
        ],
        cwd=ROOT,
        env=environment(folder),
        capture_output=True,
        text=True,
        check=True,
    )
    assert "https://h/0.tar?***" in done.stdout and not told(done.stdout)
