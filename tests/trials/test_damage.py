"""Random damage to what a run and its data left on the disk: found, named, gone back from; never
taken and never a crash.
"""

from __future__ import annotations

import random
import shutil
from pathlib import Path

import pytest

from tests.data.material import write_shards
from vlp import checkpoint
from vlp.cli import main
from vlp.data.index import index
from vlp.data.index_file import NAME


def damaged(data: bytes, chance: random.Random) -> bytes:
    """Other bytes than `data`: flipped, exchanged, cut, zeroed, grown, emptied."""
    changed = bytearray(data)
    at, length = chance.randrange(len(data)), chance.choice([1, 4, 64, 4096])
    kind = chance.randrange(6)
    if kind == 0:
        changed[at] ^= 1 << chance.randrange(8)
    elif kind == 1:
        changed[at : at + length] = chance.randbytes(length)
    elif kind == 2:
        del changed[at:]
    elif kind == 3:
        changed[at : at + length] = bytes(len(changed[at : at + length]))
    elif kind == 4:
        changed += chance.randbytes(length)
    else:
        changed.clear()
    return bytes(changed)


@pytest.mark.parametrize("trials", [24, pytest.param(1000, marks=pytest.mark.slow)])
def test_a_damaged_checkpoint_is_never_taken(runs, trials, capsys):
    runs.finish("run", "train.duration=3")
    older, newer = checkpoint.all_of(runs.folder / "run")
    files = sorted(newer.iterdir())
    assert {"manifest.json", "config.yaml", "model.json"} < {file.name for file in files}

    n_refused = 0
    for trial in range(trials):
        file = files[trial % len(files)]
        before = file.read_bytes()
        after = damaged(before, runs.chance)
        if trial % 50 == 49:
            file.unlink()
        else:
            file.write_bytes(after)
        taken = checkpoint.newest(runs.folder / "run")
        if after == before and trial % 50 != 49:
            assert taken == newer
        elif file.name == "manifest.json" and taken == newer:
            # Blanks may change without another meaning.
            checkpoint.load(newer)
        else:
            assert taken == older, (trial, file.name)
            assert newer.name in capsys.readouterr().err
            n_refused += 1
        file.write_bytes(before)
    assert n_refused > trials * 0.8


@pytest.mark.parametrize("trials", [2, pytest.param(60, marks=pytest.mark.slow)])
def test_a_damaged_file_of_a_run_ends_a_command_in_one_line_or_is_done_without(
    runs, trials, tmp_path, capsys
):
    """The configuration and the results of a run: every command that reads them, and going on."""
    runs.finish("whole", "train.duration=3")
    whole = runs.outcome("whole")
    for trial in range(trials):
        run = runs.folder / "run"
        shutil.copytree(runs.folder / "whole", run)
        file = run / ("config.yaml", "metrics.jsonl")[trial % 2]
        file.write_bytes(damaged(file.read_bytes(), runs.chance))
        for command in (
            ["report", str(run), "--to", str(tmp_path / "page.html")],
            ["export", str(run), "--to", str(tmp_path / "export"), "--overwrite"],
        ):
            main(command)
            assert "Traceback" not in capsys.readouterr().err, (trial, command)
        life = runs.start("run", "train.duration=4", "resume=auto")
        [code] = life.wait()
        assert code in (0, 1) and "Traceback" not in life.said(), life.said()
        if not code:
            last = runs.outcome("run")
            assert last["checkpoint"] == "step_00000004" != whole["checkpoint"]
        shutil.rmtree(run)


@pytest.mark.parametrize("trials", [60, pytest.param(1000, marks=pytest.mark.slow)])
def test_a_damaged_index_is_made_again(tmp_path: Path, trials):
    shards = write_shards(tmp_path / "shards", 24, 12)
    paths, place = sorted(shards.glob("*.tar")), shards / NAME
    whole, before = index(paths), place.read_bytes()
    chance, n_changed = random.Random(trials), 0
    for _ in range(trials):
        after = damaged(before, chance)
        place.write_bytes(after)
        n_changed += after != before
        assert index(paths) == whole
    assert n_changed > trials * 0.9
