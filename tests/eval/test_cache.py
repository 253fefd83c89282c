"""`vlp cache`: one folder for all that is kept, listed, bounded and cleared."""

import errno
import fcntl
import os
import re
import subprocess
import sys
import time

import pytest
import torch

from tests.eval import material
from vlp import caches, cli
from vlp.eval import embed
from vlp.eval.embed import Context
from vlp.eval.pictures import Contents

DAY_S = 86400
EMBEDDED = f"embeddings/{'1' * 64}.safetensors"
LIBRARY, INDEX, BUCKET = f"search/{'2' * 24}", f"index/{'3' * 24}.bin", f"shards/{'4' * 16}"


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """A cache with one thing of every kind, and something foreign; all of 40 days ago."""
    folder = tmp_path / "a cache"
    monkeypatch.setenv("VLP_CACHE", str(folder))
    for name in (
        EMBEDDED,
        "embeddings/contents.json",
        f"{LIBRARY}/library.json",
        f"{LIBRARY}/parts/a.safetensors",
        INDEX,
        f"{BUCKET}/00.tar",
        f"{BUCKET}/.00.tar.json",
        "benchmarks/notes.txt",
    ):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(bytes(1000))
        age(path, 40)
    return folder


def age(path, days):
    then = time.time() - days * DAY_S
    os.utime(path, (then, then))


def files_in(folder):
    names = (str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
    return sorted(names)


def ask(capsys, *arguments):
    status = cli.main(["cache", *arguments])
    captured = capsys.readouterr()
    return status, captured.out + captured.err


@pytest.mark.parametrize(
    ("environment", "place"),
    [
        ({}, "home/.cache/vlp"),
        ({"XDG_CACHE_HOME": "{}/xdg"}, "xdg/vlp"),
        ({"XDG_CACHE_HOME": "relative"}, "home/.cache/vlp"),
        ({"XDG_CACHE_HOME": ""}, "home/.cache/vlp"),
        ({"XDG_CACHE_HOME": "{}/xdg", "VLP_CACHE": "{}/chosen"}, "chosen"),
    ],
)
def test_one_place_for_all(tmp_path, monkeypatch, environment, place):
    for name in ("VLP_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    for name, value in environment.items():
        monkeypatch.setenv(name, value.format(tmp_path))

    from vlp.data.fetch import Cache
    from vlp.eval import run

    options = cli.build_parser(["eval"]).parse_args(["eval", "MODEL"])
    assert caches.cache_folder() == tmp_path / place
    assert Cache(1).folder == tmp_path / place / "shards"
    assert run._context(options).cache == tmp_path / place / "embeddings"


def test_the_list_has_every_kind_with_size_and_last_use(cache, capsys):
    age(cache / f"{LIBRARY}/parts/a.safetensors", 2)
    status, shown = ask(capsys)
    assert status == 0 and str(cache) in shown

    rows = re.findall(r"^(\w+) +([\d,]+) +([\d.]+ k?B)(?:  (.*))?$", shown, re.MULTILINE)
    assert rows == [
        ("embeddings", "2", "2.0 kB", "40 d ago"),
        ("search", "1", "2.0 kB", "2 d ago"),
        ("indices", "1", "1.0 kB", "40 d ago"),
        ("downloads", "1", "2.0 kB", "40 d ago"),
        ("scratch", "0", "0 B", "-"),
        ("packs", "0", "0 B", "-"),
        ("other", "1", "1.0 kB", "40 d ago"),
        ("together", "6", "8.0 kB", ""),
    ]
    assert ask(capsys, "--kind", "indices")[1].count("ago") == 1


def test_an_absent_or_empty_cache_is_no_error(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("VLP_CACHE", str(tmp_path / "none"))
    assert ask(capsys)[0] == 0
    assert ask(capsys, "clear") == (0, "removed: 0 items, 0 B\n")
    assert not (tmp_path / "none").exists()


def test_clear_removes_what_was_asked_for_and_nothing_foreign(cache, capsys):
    age(cache / INDEX, 1)
    assert ask(capsys, "clear", "--older", "30d", "--kind", "indices", "search")[0] == 0
    left = files_in(cache)
    assert INDEX in left and not any("search" in name for name in left)
    assert EMBEDDED in left

    assert "4 items" in ask(capsys, "clear")[1]
    assert files_in(cache) == ["benchmarks/notes.txt"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["clear", "--older", "30"], "found '30', expected a span of time such as 30d"),
        (["--older", "-1d"], "expected"),
        (["clear", "--older", "0d"], "above 0"),
    ],
)
def test_wrong_spans_are_refused(cache, capsys, arguments, message):
    before = files_in(cache)
    try:
        status, shown = ask(capsys, *arguments)
    except SystemExit as stopped:  # argparse takes -1d for an option
        status, shown = stopped.code, capsys.readouterr().err
    assert status != 0 and message in shown
    assert files_in(cache) == before


@pytest.mark.parametrize("kind", [LIBRARY, BUCKET])
def test_what_another_process_works_with_is_left_alone(cache, capsys, kind):
    code = f"""
import sys
from pathlib import Path
from vlp import caches
caches.hold(Path({str(cache / kind)!r}))
print("held", flush=True)
sys.stdin.read()
"""
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", code], text=True, **pipes) as user:
        assert user.stdout.readline() == "held\n"
        shown = ask(capsys, "clear")[1]
        assert f"in use, left alone: {cache / kind}" in shown
        assert [name for name in files_in(cache) if name.startswith(kind)]
        user.stdin.close()

    # Held no longer, whatever ended the process.
    assert "1 items" in ask(capsys, "clear")[1]
    assert not (cache / kind).exists()


def test_without_locks_what_was_used_lately_is_left_alone(tmp_path, monkeypatch):
    def unsupported(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", unsupported)
    removed = {}
    for days in (29, 31):
        folder = tmp_path / "search" / f"{days:024x}"
        caches.hold(folder)
        used = time.time() - days * 86400
        for path in (folder, folder / ".used"):
            os.utime(path, (used, used))
        (entry,) = [e for e in caches.entries(tmp_path) if e.path == folder]
        removed[days] = caches.remove(entry), folder.exists()
        if days == 29:
            # Who works with it says so again and again.
            caches.hold(folder)
            assert time.time() - (folder / ".used").stat().st_mtime < 60
    assert removed == {29: (False, True), 31: (True, False)}


def test_unfinished_files_go_only_when_their_writer_is_gone(cache, capsys):
    form = f".{INDEX.removeprefix('index/')}.%s.tmp"
    for name, days in ((form % ("a" * 12), 0), (form % ("b" * 12), 2)):
        (cache / "index" / name).write_bytes(b"part")
        age(cache / "index" / name, days)
    ask(capsys, "clear", "--kind", "indices")
    assert [path.name[-16:] for path in (cache / "index").iterdir()] == ["a" * 12 + ".tmp"]


def test_kept_embeddings_stay_below_their_bound(tmp_path, monkeypatch):
    encoder = material.matrix_encoder()
    kept = tmp_path / "kept"
    context = Context(cache=kept, contents=Contents(kept / "contents.json"), cache_bytes=10**9)
    rows = {text: embed.texts(encoder, [text], context) for text in ("a", "b", "c")}
    files = dict(zip(rows, sorted(kept.iterdir(), key=written)))
    assert len(files) == 3
    size = files["a"].stat().st_size
    for days, text in enumerate("cba", start=1):
        age(files[text], days)

    # To recall is to use: "a", once the oldest, is the youngest now.
    assert torch.equal(embed.texts(encoder, ["a"], context), rows["a"])
    tight = Context(cache=kept, contents=Contents(), cache_bytes=3 * size + size // 2)
    embed.texts(encoder, ["d"], tight)
    names = {path.name for path in kept.glob("*.safetensors")}
    assert len(names) == 3 and files["b"].name not in names

    # What this process used is never removed, whatever the bound.
    embed.texts(encoder, ["e"], Context(cache=kept, contents=Contents(), cache_bytes=1))
    left = {path.name for path in kept.glob("*.safetensors")}
    assert len(left) == 3 and files["a"].name in left and files["c"].name not in left


def written(path):
    return path.stat().st_mtime_ns


def test_many_processes_may_bound_one_folder(tmp_path):
    for number in range(200):
        path = tmp_path / f"{number:064}.safetensors"
        path.write_bytes(bytes(100))
        age(path, 1 + number)
    code = f"""
from pathlib import Path
from vlp import caches
caches.bound(Path({str(tmp_path)!r}), 5000)
"""
    running = [subprocess.Popen([sys.executable, "-c", code]) for _ in range(3)]
    assert [process.wait() for process in running] == [0, 0, 0]
    left = sorted(path.name for path in tmp_path.iterdir())
    assert left == [f"{number:064}.safetensors" for number in range(50)]


def test_files_that_bear_other_names_are_never_bounded(tmp_path):
    """--cache may name a folder with models in it."""
    for name in ("model.safetensors", "0.safetensors"):
        (tmp_path / name).write_bytes(bytes(100))
        age(tmp_path / name, 9)
    caches.bound(tmp_path, 1)
    assert files_in(tmp_path) == ["0.safetensors", "model.safetensors"]


@pytest.mark.parametrize(
    ("text", "n_bytes"),
    [("20GB", 20e9), ("20", 20e9), ("500MB", 5e8), ("1.5TB", 1.5e12), (".5 kB", 500)],
)
def test_sizes_as_people_write_them(text, n_bytes):
    assert caches.bytes_of(text) == n_bytes


@pytest.mark.parametrize(
    "option",
    [("--cache-size", "20 parsecs"), ("--cache-size", "0"), ("--batch", "0"), ("--workers", "-1")],
)
def test_wrong_options_are_refused_before_a_model_is_read(tmp_path, capsys, option):
    photos = tmp_path / "photos" / "a class"
    photos.mkdir(parents=True)
    command = ["eval", "no-such-model", "--task", "zeroshot", "--data", str(photos.parent)]
    assert cli.main([*command, *option]) == 1
    error = capsys.readouterr().err
    assert option[0] in error or option[1] in error
    assert "no-such-model" not in error
