"""Where sounds and frames lie is found once and kept: by the first process of a machine, for shards
that fit, and never for runs that read none.
"""

from __future__ import annotations

import os
import pickle
import random
import re
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import torch

from tests.data.material import data_of, encoded, loader_of, picture, write_tar
from tests.data.test_index_file import write_version_5
from tests.data.test_sounds import tone
from vlp import config
from vlp.data import index as index_module
from vlp.data import index_file, member_file, member_index
from vlp.data.further_members import members_of, of_tar
from vlp.data.index import located as indexed
from vlp.data.member_file import NAME
from vlp.data.sources import _stored_members
from vlp.data.sources._stored_members import tables

READS = frozenset({"others", "others_valid"})
WANTED = {"audio": config.Sound(seconds=0.1, bands=8, rate=8000), "video": config.Frames(2)}
SHAPES = {"audio": (10, 8), "video": (2, 0)}
PICTURE = encoded(picture(0))
N = 12


def further(i: int) -> list[tuple[str, bytes]]:
    """What sample i has: a sound before the picture, frames behind, both, or nothing."""
    sound = [("wav", tone(300 + 20 * i, 0.1))] if i % 3 else []
    frames = [(f"{k}.png", encoded(picture(9 * i + k))) for k in range(i % 4)]
    return sound + frames


def write(folder: Path, per_shard: int = 5, prefix: str = "clip.") -> Path:
    for first in range(0, N, per_shard):
        members = []
        for i in range(first, min(first + per_shard, N)):
            of_sample = [("png", encoded(picture(i))), ("txt", b"a caption"), *further(i)]
            members += sorted((f"{prefix}{i}.{ending}", data) for ending, data in of_sample)
        write_tar(folder / f"{first:05d}.tar", members)
    return folder


def member_loader(source, batch: int = N, **options):
    options = {"reads": READS, "modalities": SHAPES, "decoded": WANTED} | options
    return loader_of(data_of(source), batch, **options)


def same(one, other) -> bool:
    """Whether two batches hold the same members; not empty of them."""
    fields = ("image", "frames", "modalities", "modality_lengths", "sample_id")
    equal = all(torch.equal(getattr(one, name), getattr(other, name)) for name in fields)
    return equal and bool((one.modality_lengths.sum(0) > 0).all())


@pytest.fixture
def shards(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("VLP_CACHE", str(tmp_path / "cache"))
    return write(tmp_path / "clips")


@pytest.fixture
def walked(monkeypatch) -> list[str]:
    """The tars whose headers were read for their members, from now on."""
    names: list[str] = []
    for module in (member_index, _stored_members):
        of_shard = module.of_shard
        monkeypatch.setattr(
            module,
            "of_shard",
            lambda path, shard, f=of_shard: names.append(path.name) or f(path, shard),
        )
    return names


def test_headers_are_walked_once_and_only_for_runs_that_read_members(shards, walked):
    loader_of(data_of(shards), N)
    assert not walked and not (shards / NAME).exists(), "a run without modalities pays nothing"
    plain = (shards / "_index.bin").read_bytes()

    reference = next(member_loader(shards, 6))
    assert walked == ["00000.tar", "00005.tar", "00010.tar"]
    again = member_loader(shards, 6)
    assert same(next(again), reference) and len(walked) == 3
    assert not [problem for problem in again.problems() if "png" in problem or "wav" in problem]
    assert (shards / "_index.bin").read_bytes() == plain
    # Nor are tars that hold nothing of the kind.
    write_tar(shards / "plain.tar", [("p.png", PICTURE), ("p.txt", b"words")])
    member_loader(shards, 6)
    assert len(walked) == 3


def odd_members(chance: random.Random, n: int) -> list[tuple[str, bytes]]:
    """Members of n samples in any order, of all kinds and names."""
    names = ["", ".voice", ".a b", ".ÄÖ", *(f".n{k}" for k in range(40))]
    endings = ["wav", "WAV", "ogg", "flac", "mp3", "npy", "xmp"]
    members = []
    for i in range(n):
        key = f"dir/é {i}" if i % 5 == 0 else f"k.{i}"
        members += [(f"{key}.png", PICTURE), (f"{key}.txt", b"words")]
        for _ in range(chance.randrange(5)):
            name = f"{key}{chance.choice(names)}.{chance.choice(endings)}"
            members.append((name, chance.randbytes(chance.randrange(20))))
        places = chance.sample(range(12), chance.randrange(4))
        members += [(f"{key}.{place}.{chance.choice(['jpg', 'png'])}", b"x") for place in places]
    chance.shuffle(members)
    return members


def test_what_is_kept_is_what_the_headers_say(tmp_path):
    """Beside the members of each sample, by a walk of all headers."""
    choices = [config.Frames(2), *(config.Sound(member=name) for name in ("", "voice", "n7", "no"))]
    wanted = {str(number): choice for number, choice in enumerate(choices)}
    n_found = 0
    for seed, n in ((0, 1), (1, 3), (2, 40), (3, 200)):
        path = write_tar(tmp_path / f"{seed}.tar", odd_members(random.Random(seed), n))
        found = of_tar(path)
        of_shards = member_index.located([path], indexed([path]))
        by_name = tables([str(path)], of_shards, wanted)
        for name, choice in wanted.items():
            table, n_with = by_name[name], 0
            extensions = set()
            for key in found.pictures.values():
                expected = members_of(found.members.get(key, []), choice)
                places = table.places(0, str(path), key)
                assert [(m.offset, m.size) for m in places] == [
                    (m.offset, m.size) for m in expected
                ]
                extensions |= {member.extension for member in expected}
                n_with += bool(expected)
                n_found += len(expected)
            assert (table.n_samples, table.extensions) == (n_with, extensions)
            assert not table.places(0, str(path), "no such key")
    assert n_found > 300


def test_a_start_reads_the_header_and_a_sample_its_own_bucket(shards, monkeypatch):
    write_tar(shards / "00020.tar", odd_members(random.Random(0), 300))
    paths = sorted(shards.glob("*.tar"))
    member_index.located(paths, indexed(paths))
    index_file._handles.clear()

    n_read: list[int] = []
    read = index_file.Handle.read
    monkeypatch.setattr(
        index_file.Handle, "read", lambda self, at, n: n_read.append(n) or read(self, at, n)
    )
    by_name = tables([*map(str, paths)], member_index.located(paths, indexed(paths)), WANTED)
    assert not n_read
    (place,) = by_name["audio"].places(1, str(paths[1]), "clip.5")
    assert place.size and sum(n_read) < 1000
    for i in range(300):
        by_name["audio"].places(3, str(paths[3]), f"k.{i}")
    assert sum(n_read) / 301 < 1000


def test_only_shards_that_changed_are_walked_again(shards, walked):
    before = {key: frames for key, frames in of_keys(member_loader(shards)).items() if frames.any()}
    walked.clear()
    # As many bytes in as many members: what was the first frame is the last.
    tar = shards / "00000.tar"
    names = {"clip.3.0.png": "clip.3.8.png", "clip.2.1.png": "clip.2.7.png"}
    with tarfile.open(tar) as file:
        members = [(m.name, file.extractfile(m).read()) for m in file.getmembers()]
    size = tar.stat().st_size
    write_tar(tar, [(names.get(name, name), data) for name, data in members])
    assert tar.stat().st_size == size
    write_tar(
        shards / "00020.tar", [("x.wav", tone(440, 0.1)), ("x.png", PICTURE), ("x.txt", b"x")]
    )

    after = of_keys(member_loader(shards, N + 1))
    assert walked == ["00000.tar", "00020.tar"]
    assert [key for key in before if not torch.equal(before[key], after[key])] == ["clip.3"]


def of_keys(loader) -> dict[str, torch.Tensor]:
    """The frames of the next batch by the samples' keys, in order."""
    batch = next(loader)
    return dict(sorted(zip(batch.key, batch.frames, strict=True)))


@pytest.mark.parametrize("damage", ["header", "cut", "members", "version", "gone"])
def test_a_file_that_is_damaged_costs_a_walk_and_nothing_else(shards, walked, damage, capsys):
    reference = next(member_loader(shards))
    place, walks = shards / NAME, len(walked)
    whole = data = place.read_bytes()
    if damage == "members":
        data = whole[:-200] + bytes(200)
    if damage == "header":
        data = whole[:100] + b"?" + whole[101:]
    if damage == "cut":
        data = whole[:-50]
    if damage == "version":
        data = whole.replace(b"members 1", b"members 9", 1)
    place.write_bytes(data)
    if damage == "gone":
        place.unlink()
    index_file._handles.clear()
    assert same(next(member_loader(shards)), reference)
    assert len(walked) > walks and place.read_bytes() == whole
    told = capsys.readouterr().err
    assert ("is of no use" in told) == (damage == "members")
    assert ("is not usable" in told) == (damage in ("header", "cut", "version"))


def test_what_another_run_does_to_the_file_costs_nothing(shards, walked):
    """Loader processes look for members in the file that is there now, and else in the tar."""
    loader = member_loader(shards)
    reference = next(loader)
    sent = pickle.dumps(loader._steps)
    write_tar(
        shards / "00000a.tar", [("a.wav", tone(440, 0.1)), ("a.png", PICTURE), ("a.txt", b"a")]
    )
    next(member_loader(shards))
    walked.clear()
    index_file._handles.clear()
    assert torch.equal(pickle.loads(sent)[0][0].modalities, reference.modalities) and not walked

    (shards / NAME).unlink()
    index_file._handles.clear()
    assert torch.equal(pickle.loads(sent)[0][0].modalities, reference.modalities)
    assert sorted(walked) == ["00000.tar", "00005.tar", "00010.tar"]


def test_a_folder_that_cannot_be_written_has_its_file_in_the_cache(shards, walked, tmp_path):
    (shards / NAME).mkdir()  # root may write into any folder, but not this one's place
    reference = next(member_loader(shards))
    assert len(walked) == 3 and len(list((tmp_path / "cache" / "index").glob("*_members.bin"))) == 1
    assert same(next(member_loader(shards)), reference) and len(walked) == 3


def test_an_index_of_the_version_before_is_read_beside_it(shards, walked):
    reference = next(member_loader(shards))
    write_version_5(shards)
    index_file._handles.clear()
    assert same(next(member_loader(shards)), reference)
    assert len(walked) == 3


FIND = """
import os, sys, time
from pathlib import Path
from vlp.data import index, member_index as module
folder, dies = Path(sys.argv[1]), sys.argv[2] == "True"
index._SAVED_AFTER_S, of_shard = 0.0, module.of_shard
def find_one(path, shard):
    print("walks", flush=True)
    time.sleep(0.3)
    if dies and path.name == "00005.tar":
        os._exit(9)
    return of_shard(path, shard)
module.of_shard = find_one
paths = sorted(folder.glob("*.tar"))
module.located(paths, index.located(paths))
"""


@pytest.mark.parametrize("dies", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_one_process_finds_members_and_the_others_wait_for_it(
    shards, walked, monkeypatch, capsys, dies
):
    paths = sorted(shards.glob("*.tar"))
    of_shards = indexed(paths)
    monkeypatch.setattr(index_module, "_TOLD_AFTER_S", 0.0)
    command = [sys.executable, "-c", FIND, str(shards), str(dies)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, env={**os.environ}) as other:
        assert other.stdout.readline() == b"walks\n"
        found = member_index.located(paths, of_shards)

    # What the other one did before it died is not done again: its lock ended with it.
    assert walked == (["00005.tar", "00010.tar"] if dies else [])
    assert [one.n_with_frames for one in found] == [3, 4, 2]
    told = capsys.readouterr().err
    assert re.search(r"waiting for the places of members of \S+clips \(\d+ s\): ", told)
    assert member_file.open_members(shards / NAME).keys() == {path.name for path in paths}
