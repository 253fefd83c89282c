"""Damage, attacks and accidents: each has a defined outcome, and nothing is lost that was whole."""

from __future__ import annotations

import io
import json
import os
import pickle
import random
import tarfile
import zipfile

import pytest
import torch

from tests.data.material import data_of, encoded, loader_of, picture, write_shards, write_tar
from vlp.config import Captions
from vlp.data.digests import stats_of
from vlp.data.loader import DataError
from vlp.data.members import open_sample
from vlp.data.scan import scan
from vlp.data.sources.shards import Options
from vlp.data.sources.shards import open as open_shards

IMAGE = encoded(picture(1))


def sample(i: int, image: bytes = IMAGE) -> list[tuple[str, bytes]]:
    return [
        (f"{i:04d}.png", image),
        (f"{i:04d}.txt", b"text %d" % i),
        (f"{i:04d}.json", b'{"n": %d}' % i),
    ]


def keys(path) -> list[str]:
    source = open_shards(Options(str(path)), Captions(missing="drop"))
    return [source[i].key for i in range(len(source))]


class Explosive:
    """Unpickling it runs code."""

    def __reduce__(self):
        return (os.mkdir, (os.environ["VLP_TEST_TRACE"],))


def test_a_pickle_in_a_shard_is_never_run(tmp_path, monkeypatch):
    monkeypatch.setenv("VLP_TEST_TRACE", str(tmp_path / "executed"))
    attack = pickle.dumps(Explosive())
    zipped = io.BytesIO()
    with zipfile.ZipFile(zipped, "w") as archive:
        archive.writestr("archive/data.pkl", attack)
    members = []
    for i in range(6):
        members += sample(i) + [
            (f"{i:04d}.{kind}", attack) for kind in ("pyd", "pkl", "pickle", "pth", "npy", "mp")
        ]
        members += [(f"{i:04d}.pt", zipped.getvalue())]
    path = write_tar(tmp_path / "0.tar", members)
    loader = loader_of(data_of(path, workers=1), 3)
    assert (
        len({key for _ in range(2) for key in next(loader).key}) == 6
        and not (tmp_path / "executed").exists()
    )
    pickle.loads(attack)  # the charge is live
    assert (tmp_path / "executed").exists()


def test_members_that_point_outside_stay_inside(tmp_path):
    members = [
        (name.replace("0001", f"../../{i}"), data) for i in range(2) for name, data in sample(1)
    ]
    folder = tmp_path / "deep" / "shards"
    path = write_tar(
        folder / "0.tar", [*members, ("/etc/passwd.png", IMAGE), ("/etc/passwd.txt", b"root")]
    )
    before = sorted(p for p in tmp_path.rglob("*"))
    assert keys(path) == ["0", "1", "etc/passwd"]
    assert sorted(p for p in tmp_path.rglob("*")) == sorted([*before, folder / "_index.bin"])


def test_links_and_devices_are_no_samples(tmp_path):
    path = write_tar(tmp_path / "0.tar", sample(1))
    with tarfile.open(path, "a") as tar:
        for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE):
            info = tarfile.TarInfo(f"link{kind.decode()}.png")
            info.type, info.linkname = kind, "/etc/passwd"
            tar.addfile(info)
    assert keys(path) == ["0001"]


def test_the_first_of_a_repeated_key_is_kept_and_the_others_named(tmp_path):
    other = encoded(picture(9))
    shard = scan(
        write_tar(
            tmp_path / "0.tar",
            sample(1) + sample(2) + sample(1, other) + sample(2)[:1] + sample(2)[1:],
        )
    )
    assert shard.count == 2 and shard.n_problems == shard.n_left_out == 2
    which = {1: "another picture", 2: "the same picture"}
    assert shard.problems == [
        f"000{i}: a second sample of this key: with {which[i]}; the first is kept" for i in (1, 2)
    ]
    shard = scan(write_tar(tmp_path / "1.tar", sample(1) + sample(1, other)))
    assert shard.count == 1 and shard.n_problems == 1
    source = open_shards(Options(str(tmp_path / "1.tar")), Captions())
    assert source[0].image == IMAGE
    shard = scan(write_tar(tmp_path / "2.tar", [*sample(1), ("0001.txt", b"text 1")]))
    assert (shard.count, shard.n_left_out) == (1, 0)
    assert shard.problems == ["0001: a second text of this key: .txt; the first is kept"]
    shard = scan(write_tar(tmp_path / "3.tar", [*sample(1), ("0001.txt", b"another text")]))
    # Whose is it? a damaged name may have led here.
    assert (shard.count, shard.n_left_out) == (
        0,
        1,
    )
    assert shard.problems[1] == "0001: left out: its texts are there twice, with other words"


@pytest.mark.parametrize(
    ("member", "reason"),
    [
        (("0001.json", b"[" * 100_000), "not valid JSON"),
        (("0001.json", b'{"captions": ' + b"9" * 10_000 + b"}"), "not valid JSON"),
        (("0001.json", b'{"captions": [1, null]}'), "no text in the JSON's captions: 1"),
        (("0001.json", b'{"caption": 7}'), "no text in the JSON's caption: 7"),
        (("0001.json", b"3"), "a JSON that holds no mapping"),
        (("0001.json", b""), "not valid JSON: it is empty"),
        (("0001.json", b" " * (2 << 20)), "a .json of more than"),
        (("0001.cls", b"__import__('os')"), "a .cls that is no class number"),
        (("0001.cls", b"-1"), "a .cls that is no class number"),
    ],
)
def test_a_broken_text_costs_itself_and_not_its_sample(tmp_path, member, reason):
    broken = [(name, data) for name, data in sample(1) if name != member[0]] + [member]
    path = write_tar(tmp_path / "0.tar", sample(0) + broken + sample(2))
    shard = scan(path)
    assert (shard.count, shard.n_left_out, shard.n_problems) == (3, 0, 1)
    assert (
        "0001: " in shard.problems[0]
        and reason in shard.problems[0]
        and sum(shard.left_out.values()) == 1
    )
    assert open_shards(Options(str(path)), Captions())[1].captions == ("text 1",)


def test_a_sample_without_a_picture_is_left_out_and_named(tmp_path):
    empty = [("0001.png", b""), *sample(1)[1:]]
    path = write_tar(tmp_path / "0.tar", sample(0) + empty + sample(2) + sample(3)[1:])
    shard = scan(path)
    assert (shard.count, shard.n_left_out, shard.n_problems) == (2, 2, 2)
    assert shard.left_out == {"an image of 0 bytes": 1, "no image member": 1} and shard.problems[
        1
    ].startswith("0003: no image")
    assert keys(path) == ["0000", "0002"]


def test_a_truncated_tar_gives_its_whole_samples_and_no_half_one(tmp_path):
    whole = write_tar(
        tmp_path / "w" / "0.tar", [m for i in range(20) for m in sample(i)]
    ).read_bytes()
    chance = random.Random(1)
    for trial in range(60):
        cut = (
            chance.randrange(1, end_of(whole, 19))
            // (512 if trial % 2 else 1)
            * (512 if trial % 2 else 1)
        )
        path = tmp_path / f"{trial}.tar"
        path.write_bytes(whole[:cut])
        shard = scan(path)
        n_whole = sum(1 for i in range(20) if end_of(whole, i) <= cut)
        # The last whole one counts as half where no end can be seen.
        assert n_whole - 1 <= shard.count <= n_whole
        assert shard.n_problems or cut < 512
        for i in range(shard.count):
            assert read(path, shard, i).captions == (f"text {i}",)


def end_of(tar: bytes, i: int) -> int:
    with tarfile.open(fileobj=io.BytesIO(tar)) as file:
        return max(
            m.offset_data + -(-m.size // 512) * 512
            for m in file.getmembers()
            if m.name.startswith(f"{i:04d}.")
        )


def read(path, shard, i):
    from vlp.data.rows import ROW

    offset, length = ROW.unpack_from(shard.rows, i * ROW.size)[:2]
    return open_sample(path.read_bytes()[offset : offset + length])


def test_a_damaged_header_costs_its_neighbours_only(tmp_path):
    whole = write_tar(
        tmp_path / "w" / "0.tar", [m for i in range(20) for m in sample(i)]
    ).read_bytes()
    with tarfile.open(fileobj=io.BytesIO(whole)) as file:
        members = file.getmembers()
    for n, member in enumerate(members):
        damaged = bytearray(whole)
        damaged[member.offset + 20 : member.offset + 40] = os.urandom(20)
        path = tmp_path / "d.tar"
        path.write_bytes(damaged)
        shard = scan(path)
        hit = n // 3
        found = [read(path, shard, i).meta["n"] for i in range(shard.count)]
        assert (
            hit not in found
            and len(found) >= 17
            and set(range(20)) - set(found) <= {hit - 1, hit, hit + 1}
        ), (n, found)
        assert shard.n_problems >= 2


@pytest.mark.parametrize("cases", [150, pytest.param(4000, marks=pytest.mark.slow)])
def test_mutated_shards_never_hang_crash_or_show_half_a_sample(tmp_path, cases):
    """Bytes overwritten, cut out, repeated or zeroed anywhere: every sample shown is one of the
    originals' parts.
    """
    original = write_tar(
        tmp_path / "w" / "0.tar", [m for i in range(12) for m in sample(i, encoded(picture(i)))]
    ).read_bytes()
    chance = random.Random(cases)
    n_shown = n_problems = 0
    for _ in range(cases):
        data = bytearray(original)
        for _ in range(chance.randrange(1, 4)):
            at, length = chance.randrange(len(data)), chance.choice([1, 8, 100, 512, 3000])
            match chance.randrange(4):
                case 0:
                    data[at : at + length] = chance.randbytes(length)
                case 1:
                    del data[at : at + length]
                case 2:
                    data[at:at] = data[at : at + length]
                case 3:
                    data[at : at + length] = bytes(length)
        path = tmp_path / "m.tar"
        path.write_bytes(data)
        shard = scan(path)
        n_problems += shard.n_problems
        for i in range(shard.count):
            content = read(path, shard, i)
            n_shown += 1
            assert content.image and content.image_type == "png" and len(content.key) > 0
    assert n_shown > cases * 4 and n_problems > cases // 3


def corrupt(folder, every: int) -> set[int]:
    """Shards as of an older version, with the pixels of some samples destroyed; returns their
    numbers.

    Where their statistics hold digests, these samples are left out from the beginning.
    """
    bad = set()
    for path in sorted(folder.glob("*.tar")):
        stats = stats_of(path)
        stats.write_text(json.dumps({**json.loads(stats.read_text()), "digests": None}))
        data = bytearray(path.read_bytes())
        with tarfile.open(path) as tar:
            for member in tar.getmembers():
                number = int(member.name[:9]) % 10_000 + int(member.name[:5]) * 10
                if member.name.endswith(".png") and number % every == 3:
                    data[member.offset_data : member.offset_data + member.size] = (
                        b"\0" * member.size
                    )
                    bad.add(number)
        path.write_bytes(data)
    return bad


@pytest.mark.parametrize("workers", [0, 2])
def test_bad_samples_are_replaced_in_place_and_nothing_else_moves(tmp_path, workers, capsys):
    good = write_shards(tmp_path / "good", 100, 10)
    bad = corrupt(write_shards(tmp_path / "bad", 100, 10), every=25)
    assert len(bad) == 4
    reference, loader = (
        loader_of(data_of(good), 20),
        loader_of(data_of(tmp_path / "bad", workers=workers), 20),
    )
    n_replaced = 0
    for _ in range(15):
        a, b = next(reference), next(loader)
        for row in range(20):
            if int(a.sample_id[row]) in bad:
                n_replaced += 1
                assert (
                    int(b.sample_id[row]) not in bad
                    and int(b.sample_id[row]) not in a.sample_id.tolist()
                )
            else:
                assert a.key[row] == b.key[row] and torch.equal(a.image[row], b.image[row])
                assert torch.equal(a.text[row], b.text[row])
        assert len(set(b.sample_id.tolist())) == 20
    assert loader.counters()["bad_samples"] >= n_replaced >= 10
    assert all("no readable image" in reason and key for _, key, reason in loader.bad)
    said = capsys.readouterr().err
    assert all(
        f"sample {i} {key!r} was replaced by another: BadImage" in said for i, key, _ in loader.bad
    )
    again = [loader_of(data_of(tmp_path / "bad"), 20, rank=r, world=4) for r in range(4)]
    reference = loader_of(data_of(tmp_path / "bad"), 20)
    for _ in range(10):
        assert [key for rank in again for key in next(rank).key] == next(
            reference
        ).key  # also with other ranks


def test_samples_changed_after_they_were_indexed_are_never_shown(tmp_path):
    write_shards(tmp_path, 100, 10)
    loader = loader_of(data_of(tmp_path), 20)
    path = tmp_path / "00003.tar"
    original = path.read_bytes()
    path.write_bytes(original.replace(b"caption 34 one", b"caption 35 one"))  # JSON and text
    keys = [key for _ in range(10) for key in next(loader).key]
    assert "000030004" not in keys and "000030005" in keys
    assert {(i, key) for i, key, _ in loader.bad} == {(34, "")}
    assert all("'000030004' are not those that were indexed" in why for *_, why in loader.bad)

    path.write_bytes(original.replace(b"caption 34 one", b"caption 35 one"))
    again = loader_of(data_of(tmp_path), 20)
    assert again.n_samples == 99 and again.counters()["left_out_samples"] == 1
    assert any("000030004: altered since it was written" in line for line in again.problems())


def test_too_many_bad_samples_end_the_run_with_a_report(tmp_path):
    corrupt(write_shards(tmp_path, 100, 10), every=5)
    loader = loader_of(data_of(tmp_path), 20)
    with pytest.raises(
        DataError,
        match=r"1[789] samples could not be used by step \d(.|\n)*"
        r"sample \d+ '0000\d+': BadImage: .*",
    ):
        for _ in range(100):
            next(loader)


def test_data_in_which_nothing_is_readable_ends_at_once(tmp_path):
    corrupt(write_shards(tmp_path, 100, 10), every=1)
    for path in tmp_path.glob("*.tar"):
        path.write_bytes(path.read_bytes().replace(b"\x89PNG", b"XXXX"))
    with pytest.raises(DataError, match="stand-ins of its source are all bad"):
        next(loader_of(data_of(tmp_path), 20))


@pytest.mark.parametrize("how", ["vanishes", "is cut"])
def test_a_shard_that_goes_away_in_mid_epoch_is_reported(tmp_path, how):
    write_shards(tmp_path, 400, 20)
    loader = loader_of(data_of(tmp_path), 20)
    next(loader)
    from vlp.data.sources import shards

    victim = tmp_path / "00003.tar"
    if how == "vanishes":
        victim.unlink()
        shards._Handle.cache_clear()  # as after a remount, or in a process that had not opened it
    else:
        os.truncate(victim, 5000)
    with pytest.raises(DataError, match=r"FileNotFoundError|changed after it was indexed"):
        for _ in range(200):
            next(loader)
    assert 17 <= loader.counters()["bad_samples"] < 30


def test_a_full_disk_under_the_index_is_survived(tmp_path, monkeypatch, capsys):
    from vlp.data import index as index_module
    from vlp.data import index_file

    write_shards(tmp_path, 20, 10)
    (tmp_path / "_index.bin").unlink()
    replacing, full = index_file.replacing, [tmp_path]

    def refused(path):
        if any(folder in path.parents for folder in full):
            raise OSError(28, "No space left on device")
        return replacing(path)

    monkeypatch.setattr(index_file, "replacing", refused)
    monkeypatch.setenv("VLP_CACHE", str(tmp_path / "cache"))
    # Neither beside the shards nor in the cache: it lies in memory while the process runs.
    loader = loader_of(data_of(tmp_path), 20)
    assert loader.n_samples == 20 and len(next(loader).key) == 20
    assert "could not be saved" in capsys.readouterr().err
    again = loader_of(data_of(tmp_path), 20)
    assert again.n_samples == 20 and not capsys.readouterr().err

    index_module._temporary_folder.cache_clear()
    full.append(tmp_path.parents[-1])
    with pytest.raises(ValueError, match=r"can be written neither there nor to .* make room"):
        loader_of(data_of(tmp_path), 20)


def test_gigantic_numbers_in_json_stay_numbers(tmp_path):
    record = json.dumps({"captions": ["x"], "big": 10**300, "deep": {"a": [1] * 100}}).encode()
    source = open_shards(
        Options(str(write_tar(tmp_path / "0.tar", [("a.png", IMAGE), ("a.json", record)]))),
        Captions(),
    )
    assert source[0].meta["big"] == 10**300


def test_odd_values_in_optional_fields_are_no_fields(tmp_path):
    odd = [
        {"negatives": "abc", "score": "high"},
        {"negatives": [1, None], "score": []},
        {"counterfactuals": {"a": 1}},
        {},
    ]
    records = [
        json.dumps({"captions": ["lone \ud800 surrogate"], **extra}).encode() for extra in odd
    ]
    members = [
        (f"{i}.{kind}", data)
        for i, r in enumerate(records)
        for kind, data in (("png", IMAGE), ("json", r))
    ]
    loader = loader_of(data_of(write_tar(tmp_path / "0.tar", members)), 4)
    batch = next(loader)
    assert (
        batch.score is None
        and batch.counterfactual is None
        and (batch.negatives is None or not batch.negatives_valid.any())
    )


@pytest.mark.slow
def test_a_thousand_shards_of_which_several_are_bad(tmp_path):
    """Cut, damaged and unreadable shards among 1,000: the rest is trained on whole, and memory
    stays where it was.
    """
    import resource

    write_shards(tmp_path, 8_000, 8)
    paths = sorted(tmp_path.glob("*.tar"))
    for i, path in enumerate(paths[100::150]):
        data = path.read_bytes()
        path.write_bytes(
            [data[:5000], data.replace(b"ustar", b"USTAR", 3), os.urandom(len(data))][i % 3]
        )
    loader = loader_of(data_of(tmp_path), 64)
    assert 7_900 <= loader.n_samples < 8_000 and len(loader.problems()) >= 7
    ids = [i for _ in range(loader.steps_per_epoch) for i in next(loader).sample_id.tolist()]
    assert len(ids) == len(set(ids)) and loader.counters()["bad_samples"] == 0
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for _ in range(6 * loader.steps_per_epoch):
        next(loader)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 8_000  # kB
