"""Every refusal leads out: what was found, what was expected, what to do, and no traceback.

A row of REFUSALS is one refusal: the command as it is typed, then parts that its message must have.
Names in braces are files of the fixture `world`. A new refusal is a new line.
"""

import gzip
import json
import shlex
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

from tests.data.material import encoded, picture, write_shards
from vlp import faults
from vlp.cli import main

CONFIG = """
out: {out}
data: {{sources: [{{name: shards, path: {shards}}}], workers: 0}}
model:
  image_tower: {{name: vit, image_size: 16, patch_size: 8, width: 32, layers: 1, head_width: 16}}
  text_tower: {{name: transformer, context_length: 24, width: 32, layers: 1, heads: 2}}
  embed_dim: 16
train: {{duration: 2, batch: 8, precision: float32}}
objective: {{infonce: {{}}}}
"""

USAGE, REFUSED = 2, 1
REFUSALS = [
    # the command line
    ("trian demo", USAGE, "'trian'", "did you mean 'train'"),
    ("data pak x", USAGE, "'pak'", "did you mean 'pack'"),
    ("eval ~nobody-here/run --task retrieval --data x", 1, "no user", "write the path in full"),
    ("train demo --out x", USAGE, "--out x", "without dashes: out=x"),
    ("train demo --out=x", USAGE, "--out=x", "without dashes: out=x"),
    ("train demo --train.batch 64", USAGE, "train.batch=64"),
    ("train demo --log-every 5", USAGE, "log_every=5"),
    ("export run --too x --to y", USAGE, "--too", "did you mean '--to'"),
    ("eval m --taks zeroshot", USAGE, "--taks", "did you mean '--task'"),
    ("eval m --precision fp16", USAGE, "'fp16'", "float32", "bf16"),
    ("eval", REFUSED, "give MODEL", "--task NAME --data PATH"),
    # configurations
    ("train dmeo", REFUSED, "no configuration file dmeo", "did you mean 'demo'"),
    ("train {good}l", REFUSED, "no configuration file", "did you mean", "good.yaml'"),
    ("train {folder}", REFUSED, "is a folder", "good.yaml"),
    ("train {latin}", REFUSED, "latin.yaml", "UTF-8"),
    ("train {broken}", REFUSED, "broken.yaml", "not valid YAML", "line"),
    ("train {good} out=[1", REFUSED, "'out=[1'", "not a YAML value", "quote"),
    ("train {good} out", REFUSED, "'out'", "section.key=value"),
    ("train {good} out.deep.er=1", REFUSED, "leads through something that is not a mapping"),
    ("train {good} train.btach=8", REFUSED, "btach", "did you mean 'batch'"),
    ("train {good} train.precision=fp8", REFUSED, "fp8", "bf16"),
    ("train {good} 'objective={{infonec: {{}}}}'", REFUSED, "infonec", "did you mean 'infonce'"),
    ("train {good} train.duration=50%", REFUSED, "train: duration is 50%", "epochs (3ep)"),
    ("train {good} train.duration=0", REFUSED, "train: duration is 0", "more than none"),
    ("train {good} checkpoint.every=soon", REFUSED, "'soon'", "expected a duration", "5%"),
    # places
    ("train {good} out=/sys/run", REFUSED, "no right to use /sys", "choose another place"),
    ("train {good} out={text}/run", REFUSED, "text.txt", "expected a folder"),
    ("train {good} out={text}", REFUSED, "text.txt", "expected a folder"),
    ("train {good} out={run}", REFUSED, "already holds a run", "resume=auto", "out="),
    (
        "train {good} data.sources.0.path={shards}x",
        REFUSED,
        "shardsx",
        "neither a folder nor a tar",
    ),
    (
        "train {good} log.trackers=[trackio] data.sources.0.path=nowhere",
        REFUSED,
        "'trackio'",
        "pip install trackio",
    ),
    ("train {good} train.batch=800", REFUSED, "800", "24 samples", "train.batch lower"),
    ("train {good} resume={text}", REFUSED, "text.txt", "manifest.json"),
    (
        "train {good} resume={run}/checkpoints/step_00000009",
        REFUSED,
        "step_00000009",
        "holds step_00000001, step_00000002",
    ),
    (
        "train {good} out={run} resume=auto train.duration=1",
        REFUSED,
        "is of step 2",
        "after 1",
        "train.duration to 2",
    ),
    ("train {good} init_from=nowhere", REFUSED, "nowhere"),
    ("export {run} --to /sys/export", REFUSED, "no right to use /sys"),
    ("export {absent} --to {absent}2", REFUSED, "absent", "What works: a run"),
    ("export {run} --to {shards}", REFUSED, "not empty", "--overwrite"),
    ("demo --out {shards_parent}", REFUSED, "not as a demo wrote them", "--out"),
    # evaluation and tools
    ("eval {run} --task zerosho --data x", REFUSED, "'zerosho'", "did you mean 'zeroshot'"),
    ("eval {run} --task zeroshot --data {absent}", REFUSED, "absent"),
    ("eval {run} --task zeroshot --data {empty}", REFUSED, "empty"),
    ("eval --compare {text} {text}", REFUSED, "text.txt"),
    ("eval --suite {broken} {run}", REFUSED, "broken.yaml", "YAML"),
    ("data validate {absent}", REFUSED, "absent"),
    ("data validate {empty}", REFUSED, "empty"),
    ("data stats {shards} --to {shards} --part 3/2", REFUSED, "3/2", "--part K/N"),
    ("report {absent}", REFUSED, "absent"),
    ("push {empty} you/x", REFUSED, "empty", "vlp export"),
    # what users bring
    (
        "data pack {photos} --captions {brought}/quote.csv --to {absent}",
        REFUSED,
        "quote.csv:3",
        "--quoting none",
    ),
    (
        "data pack {photos} --captions {brought}/odd.csv --to {absent}",
        REFUSED,
        "'where', 'what'",
        "--image-column",
    ),
    (
        "data pack {photos} --captions {brought}/latin.csv --to {absent}",
        REFUSED,
        "latin.csv:2",
        "--encoding cp1252",
    ),
    (
        "data pack {photos} --captions {brought}/instances.json --to {absent}",
        REFUSED,
        "instances",
        "captions_",
    ),
    (
        "data pack {photos} --captions {brought}/lost.csv --to {absent}",
        REFUSED,
        "lost.csv:2",
        "b.png",
        "--on-missing skip",
    ),
    ("data pack {brought}/splits --to {absent}", REFUSED, "train, val", "--split-folder train"),
    ("data pack {brought}/zero --to {absent}", REFUSED, "cat/0.png", "--on-missing skip"),
    (
        "data pack {brought}/emptied --to {absent}",
        REFUSED,
        "'dog' holds no image",
        "1 .webm",
        "convert",
    ),
    ("data validate {brought}/packed.tar.gz", REFUSED, "compressed", "vlp data reshard"),
    ("train {good} data.sources.0.path={brought}/zip.tar", REFUSED, "zip archive", "unpack"),
    ("train {good} data.sources.0.path={brought}/00001.tar", REFUSED, "00001.tar", "folder"),
    (
        "train {good} 'data.sources.0.captions=[re_caption]'",
        REFUSED,
        "re_caption",
        "there are",
        "captions",
    ),
    ("train {good} train.optimizer.warmup=1000", REFUSED, "1,000 steps", "the run has 2"),
    ("train {good} 'eval={{zeroshot: {{data: {brought}/zero}}}}'", REFUSED, "0.png", "repair"),
    (
        "data filter {shards} --to {absent} --keep 'similarty > .3'",
        REFUSED,
        "'similarty > .3'",
        "number",
    ),
    (
        "eval {run} --task zeroshot --data {classes} classes={brought}/names.txt",
        REFUSED,
        "'dog'",
        "cat, cows",
        "add or correct",
    ),
    (
        "eval {run} --task retrieval --data {brought}/odd.csv",
        REFUSED,
        "'where', 'what'",
        "image_column",
    ),
    (
        "eval {run} --task zeroshot --data {classes} classes={brought}/blank.txt",
        REFUSED,
        "blank.txt, line 2",
        "remove the line or fill it",
    ),
    (
        "eval {run} --task retrieval --data {brought}/silent.json images={photos}",
        REFUSED,
        "b.png",
        "missing=skip",
    ),
    (
        "eval ViT-B-32:openai --task zeroshot --data {classes}",
        REFUSED,
        "quick GELU",
        "use architecture ViT-B-32-quickgelu",
    ),
    (
        "eval {run} --task retrieval --data {photos} --cache none images=x",
        USAGE,
        "images=x",
        "--data PATH images=x",
    ),
    ("eval {absent} --task zeroshot --data {brought}/zero", REFUSED, "no model", "absent"),
    ("eval ViT-B-32:hf-hub:a/b --task zeroshot --data {classes}", REFUSED, "hf-hub:a/b alone"),
    ("eval hf-hub: --task zeroshot --data {classes}", REFUSED, "no name of a repository"),
    (
        "eval {run} --task zeroshot --data {classes} --cache {text}",
        REFUSED,
        "text.txt is a file",
        "none to keep nothing",
    ),
    ("export '' --to {absent}", REFUSED, "no model is named", "hf-hub:USER/NAME"),
    ("push '' you/x", REFUSED, "no folder is named", "vlp export"),
    ("push {text} you/x", REFUSED, "text.txt is a file", "vlp export"),
    ("train {brought}/alias.yaml", REFUSED, "alias.yaml", "inside of what it names"),
    ("train {good} init_from={brought}/empty.pt", REFUSED, "empty.pt is empty", "again"),
    ("data embed {shards} --to {absent} --text-model ''", REFUSED, "--text-model is empty"),
    ("data embed {shards} --to {absent} --model ''", REFUSED, "--model is empty"),
    (
        "data pack {photos} --captions {brought}/twice.json --to {absent}",
        REFUSED,
        "'a.png' stands twice",
        "as a list",
    ),
    ("data pack {brought}/lost.csv --to {absent}", REFUSED, "is a table", "--captions"),
    ("data pack {photos}/a.png --to {absent}", REFUSED, "is one picture", "--captions TABLE"),
    (
        "data pack {photos} {brought}/lost.csv --to {absent}",
        USAGE,
        "named by --captions",
        "lost.csv",
    ),
    (
        "data pack {photos} --captions {brought}/sbu.json --to {absent}",
        REFUSED,
        "'http://host/far.png' is missing",
        "fetch it (img2dataset)",
    ),
    # other processes
    (
        "train {good} out={folder}/died data.workers=1 'data.sources=[{{name: webdataset, "
        'pipeline: "tests.data.stuck:killed", samples: 24}}]\'',
        REFUSED,
        "killed by SIGKILL",
        "data.workers=0",
    ),
]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world")
    home = folder / "data"
    paths = {name: folder / name for name in ("absent", "empty", "run")}
    paths |= {
        "folder": folder,
        "shards": home / "shards",
        "shards_parent": folder,
        "text": folder / "text.txt",
    }
    paths |= {name: folder / f"{name}.yaml" for name in ("good", "broken", "latin")}
    paths["empty"].mkdir()
    paths["text"].write_text("plain text\n")
    write_shards(paths["shards"], 24, 24)
    paths["good"].write_text(CONFIG.format(out=folder / "new", shards=paths["shards"]))
    paths["broken"].write_text("out: [\n")
    paths["latin"].write_bytes("out: caf\xe9".encode("latin-1"))
    assert main(["train", str(paths["good"]), f"out={paths['run']}"]) == 0
    return paths | bring(folder)


def bring(folder):
    """Photos, tables, trees and tars as users have them, each with one thing wrong."""
    paths = {name: folder / name for name in ("brought", "photos", "classes")}
    files = {f"photos/{name}.png": encoded(picture(i)) for i, name in enumerate("abc")}
    files |= {f"classes/{name}/1.png": encoded(picture(i)) for i, name in enumerate(("cat", "dog"))}
    files |= {
        "quote.csv": b'image,caption\na.png,one\nb.png,"two\nc.png,three\n',
        "odd.csv": b"where,what\nhere,this\n",
        "latin.csv": "image,caption\na.png,caf\xe9\n".encode("cp1252"),
        "instances.json": b'{"images": [{"id": 1, "file_name": "a.png"}], '
        b'"annotations": [{"image_id": 1, "bbox": [1]}]}',
        "lost.csv": b"image,caption\nbb.png,one\na.png,two\n",
        "names.txt": b"cat\ncows\n",
        "blank.txt": b"cat\n\ndog\n",
        "silent.json": b'{"images": [{"id": 1, "file_name": "a.png"}, {"id": 2, "file_name": '
        b'"b.png"}], "annotations": [{"image_id": 1, "caption": "one"}]}',
        "alias.yaml": b"out: &loop [*loop]\n",
        "empty.pt": b"",
        "twice.json": b'{"a.png": "one", "a.png": "two"}',
        "sbu.json": b'{"image_urls": ["http://host/a.png", "http://host/far.png"], '
        b'"captions": ["one", "two"]}',
        "splits/train/cat/1.png": encoded(picture(1)),
        "splits/val/cat/1.png": encoded(picture(2)),
        "zero/cat/0.png": b"",
        "zero/dog/1.png": encoded(picture(3)),
        "emptied/cat/1.png": encoded(picture(4)),
        "emptied/dog/1.webm": b"x",
        "packed.tar.gz": gzip.compress(bytes(1024)),
        "zip.tar": b"PK\x03\x04" + bytes(600),
    }
    for name, data in files.items():
        path = folder / name if name.startswith(("photos", "classes")) else paths["brought"] / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    (paths["brought"] / "00001.tar").mkdir()
    return paths


def test_every_refusal_leads_out(world, capfd):
    n_refused, wrong = 0, []
    for command, code, *parts in REFUSALS:
        capfd.readouterr()
        try:
            status = main(shlex.split(command.format(**world)))
        except SystemExit as end:  # argparse
            status = end.code
        text = capfd.readouterr().err
        missing = [part for part in parts if part not in text]
        if status != code or missing or "Traceback" in text:
            wrong.append(f"{command}\n  status {status}, without {missing}: {text.strip()[-600:]}")
        n_refused += 1
    assert not wrong, "\n".join(wrong)
    assert n_refused == len(REFUSALS) >= 78
    assert not (world["folder"] / "new").exists()  # none of them left a trace


class Foreign:
    """Errors of the system and of libraries, each provoked for real."""

    def full():
        with open("/dev/full", "wb", buffering=0) as file:
            file.write(b"x")

    def folder():
        Path("/tmp").read_bytes()

    def absent():
        Path(__file__).with_name("test_mesages.py").read_text()

    def json():
        json.loads('{"a": 1,\n]')

    def utf8():
        "caf\xe9 au lait".encode("latin-1").decode()

    def weights():
        from safetensors import safe_open

        safe_open(__file__, "pt")

    def picture():
        from PIL import Image

        Image.open(__file__)

    def parquet():
        import pyarrow.parquet

        pyarrow.parquet.read_table(__file__)

    def tar():
        tarfile.TarFile(__file__)

    def yaml():
        import yaml

        yaml.safe_load("[1")

    def pickled():
        import pickle

        pickle.loads(b"plain text")

    def package():
        import a_package_that_is_not_there  # noqa: F401

    def memory():
        import torch

        torch.empty(1 << 55)


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("full", ("no space left", "make room")),
        ("folder", ("/tmp is a folder", "name a file")),
        ("absent", ("there is no", "did you mean 'test_messages.py'")),
        ("json", ("found no JSON", "line 2", "whole JSON")),
        ("utf8", ("byte 0xe9 at position 3", "save it as UTF-8")),
        ("weights", ("safetensors", "a whole .safetensors file")),
        ("picture", ("PIL says", "leave it out or save it anew")),
        ("parquet", ("pyarrow says", "a whole parquet file")),
        ("tar", ("tarfile says", "a whole tar")),
        ("yaml", ("yaml says", "quote texts")),
        ("pickled", ("pickle", ".safetensors")),
        ("package", ("'a_package_that_is_not_there' is not installed", "pip install")),
        ("memory", ("allocate memory", "train.batch", "micro_batches")),
    ],
)
def test_errors_of_others_are_told_with_a_way_out(name, parts, capsys):
    with pytest.raises(Exception) as caught:
        getattr(Foreign, name)()
    faults.say(caught.value)
    text = capsys.readouterr().err
    assert text.startswith("vlp: ") and all(part in text for part in parts), text


def test_a_bug_keeps_its_traceback_and_says_that_it_is_one(capsys, monkeypatch):
    with pytest.raises(KeyError) as caught:
        {}["caption"]
    faults.say(caught.value)
    text = capsys.readouterr().err
    assert "Traceback" in text and "this is a bug in vlp" in text
    with pytest.raises(ValueError) as refused:
        raise ValueError("set it lower")
    faults.say(refused.value)
    assert capsys.readouterr().err == "vlp: set it lower\n"
    monkeypatch.setenv(faults.SWITCH, "1")
    faults.say(refused.value)
    assert "Traceback" in capsys.readouterr().err


def test_a_full_and_a_read_only_disk_are_named_with_their_room(world, tmp_path):
    """Real small file systems, in a mount namespace of their own."""
    place = tmp_path / "small"
    place.mkdir()
    mount = f"mount -t tmpfs -o size=200k none {place}"
    if subprocess.run(["unshare", "-rm", "sh", "-c", mount], capture_output=True).returncode:
        pytest.skip("this user may not mount a file system of its own")
    script = (
        "import subprocess; from vlp.cli import main\n"
        f"print(main(['train', {str(world['good'])!r}, 'out={place}/run']))\n"
        f"subprocess.run(['mount', '-o', 'remount,ro', {str(place)!r}], check=True)\n"
        f"print(main(['train', {str(world['good'])!r}, 'out={place}/other']))\n"
    )
    command = [
        "unshare",
        "-rm",
        "sh",
        "-c",
        f'{mount} && exec "$0" -c "$1"',
        sys.executable,
        script,
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    full, read_only = (line for line in done.stderr.splitlines() if line.startswith("vlp: "))
    for part in ("no space left for", str(place), "MB are free", "make room"):
        assert part in full, full
    for part in (str(place), "can only be read", "out="):
        assert part in read_only, read_only
    assert done.stdout.split()[-1] == "1" and "Traceback" not in done.stderr, done.stderr


@pytest.mark.parametrize("command", ["--help", "train --help", "data --help", "eval --help"])
def test_a_reader_that_goes_away_ends_a_command_quietly(command):
    process = subprocess.Popen(
        [sys.executable, "-m", "vlp.cli", *command.split()],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    process.stdout.close()
    _, errors = process.communicate(timeout=60)
    assert errors == b"", errors.decode()
