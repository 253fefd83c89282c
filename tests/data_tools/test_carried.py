"""Sounds, frames and numbers of samples go with these into new shards."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.data.material import encoded, picture, write_tar
from tests.data_tools.tools import call, read
from vlp.data.further_members import of_tar
from vlp.data.rows import _KINDS, FURTHER_MEMBERS
from vlp.data.scan import scan
from vlp.data_tools import filter as filtering
from vlp.data_tools import negatives, reshard
from vlp.data_tools._run import carried
from vlp.data_tools._run.carried import LEFT_BEHIND, Carried
from vlp.data_tools.inspect import summarise
from vlp.data_tools.mine.order import WriteOrder
from vlp.data_tools.mine.store import Store

FRAMES = 45  # more kinds than a shard counts apart


def further(i: int) -> dict[str, bytes]:
    """What sample i has beside picture and caption; the third has nothing."""
    sound, numbers = b"RIFF" + bytes([i]) * (i + 1), b"numpy" * (i + 1)
    frames = {f"{n:03d}.png": encoded(picture(100 * i + n)) for n in range(FRAMES)}
    of_samples: list[dict[str, bytes]] = [
        {"wav": sound, "first words.flac": sound * 2},
        {"über.ogg": sound, "siglip.npy": numbers},
        {},
        frames,
        {"mp3": sound, "npy": numbers},
    ]
    return of_samples[i]


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two shards; sounds before, behind and far from their samples, and what nobody reads."""
    folder = tmp_path_factory.mktemp("clips with blanks")
    members: list[tuple[str, bytes]] = [("a/0.wav", further(0)["wav"])]
    for i in range(5):
        members += [(f"a/{i}.png", encoded(picture(i))), (f"a/{i}.txt", f"word {i}".encode())]
        members += [
            (f"a/{i}.{ending}", data)
            for ending, data in further(i).items()
            if (i, ending) != (0, "wav")
        ]
    # A second one of a name, one of no sample, and one of another model.
    members += [("a/4.mp3", b"again"), ("a/9.wav", b"alone"), ("a/3.xmp", b"x")]
    cut = next(i for i, (name, _) in enumerate(members) if name == "a/2.png")
    write_tar(folder / "0.tar", [*members[:cut], ("a/1.xmp", b"x")])
    write_tar(folder / "1.tar", members[cut:])
    return folder


def of_folder(folder: Path) -> dict[str, dict[str, bytes]]:
    """The further members of all samples, by their captions."""
    by_caption = {}
    for path in sorted(folder.glob("*.tar")):
        members = of_tar(path).members
        for key, sample in read(folder).items():
            if key in members:
                with open(path, "rb") as file:
                    of_sample = {m.ending[1:]: m.read(file) for m in members[key]}
                by_caption[sample.captions[0]] = of_sample
    return by_caption


EXPECTED = {f"word {i}": further(i) for i in range(5) if further(i)}


@pytest.mark.parametrize(
    "tool, options",
    [
        (filtering, ["--min-words", 1]),
        (filtering, ["--max-repeats", 9]),
        (negatives, []),
        (reshard, ["--samples-per-shard", 2]),
        (reshard, ["--shuffle", 0, "--samples-per-shard", 3, "--renumber"]),
        (reshard, ["--max-side", 8, "--samples-per-shard", 3]),
    ],
)
def test_members_go_with_their_samples(
    shards: Path, tmp_path: Path, tool: Any, options: list
) -> None:
    out = tmp_path / "out"
    assert call(tool, shards, *options, "--to", out) == 0

    assert of_folder(out) == EXPECTED
    name = tool.__name__.rpartition(".")[2]
    marked: Counter[str] = Counter()
    for mark in out.glob(f"0*_{name}.json"):
        marked.update(json.loads(mark.read_text())["counts"])
    left_behind = {kind: n for kind, n in marked.items() if kind.startswith(LEFT_BEHIND)}
    assert left_behind == {
        f"{LEFT_BEHIND}members .mp3": 1,
        f"{LEFT_BEHIND}members .wav": 1,
        f"{LEFT_BEHIND}members .xmp": 2,
    }
    # What was written is whole, and read as it was written.
    assert not [problem for path in out.glob("*.tar") for problem in scan(path).problems]


def test_members_go_with_samples_that_are_put_in_a_new_order(shards: Path, tmp_path: Path) -> None:
    store = Store(sorted(shards.glob("*.tar")), "")
    of_shards = [Carried(path, shard) for path, shard in zip(store.paths, store.shards)]
    WriteOrder(store, of_shards, tmp_path, 2)((0, 0, np.array([4, 1, 3, 0])))

    assert of_folder(tmp_path) == EXPECTED


def test_inspect_names_members_of_modalities(shards: Path) -> None:
    summary = summarise(str(shards), 5)

    assert summary["members_of_modalities"] == {
        ".wav": 2, ".flac": 1, ".ogg": 1, ".npy": 2, ".mp3": 2, ".N.png": FRAMES
    }  # fmt: skip
    assert summary["odd_or_passed_over"] == {"members .xmp": 2}
    assert not any(".wav" in problem for problem in summary["problems"])


def test_members_are_carried_and_counted_beside_any_number_of_other_kinds(tmp_path: Path) -> None:
    """Sounds, frames and numbers behind more kinds than a shard counts apart."""
    odd = [(f"a.x{n}", b"x") for n in range(_KINDS + 5)]
    own = {"0.png": encoded(picture(1)), "ogg": b"OggS", "voice.npy": b"numbers"}
    whole = [("a.png", encoded(picture(0))), ("a.txt", b"word 0"), *odd]
    write_tar(tmp_path / "in" / "0.tar", whole + [(f"a.{end}", own[end]) for end in own])

    assert call(filtering, tmp_path / "in", "--min-words", 1, "--to", tmp_path / "out") == 0
    assert of_folder(tmp_path / "out") == {"word 0": own}
    counts = json.loads((tmp_path / "out" / "00000_filter.json").read_text())["counts"]
    left_behind = {kind: n for kind, n in counts.items() if kind.startswith(LEFT_BEHIND)}
    assert sum(left_behind.values()) == len(odd)
    assert left_behind[f"{LEFT_BEHIND}{FURTHER_MEMBERS}"] >= 5
    assert summarise(str(tmp_path / "in"), 1)["members_of_modalities"] == {
        ".N.png": 1, ".ogg": 1, ".npy": 1
    }  # fmt: skip


def test_only_tars_with_further_members_are_walked(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Headers of a remote tar are read a second time only where something is to be found."""
    walked = []
    monkeypatch.setattr(carried, "of_tar", lambda path: walked.append(path) or of_tar(path))
    write_tar(tmp_path / "plain.tar", [("0.png", encoded(picture(0))), ("0.txt", b"words")])
    for path in (tmp_path / "plain.tar", shards / "0.tar"):
        Carried(path, scan(path))

    assert walked == [shards / "0.tar"]
