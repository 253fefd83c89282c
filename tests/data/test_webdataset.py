"""The source `webdataset`: URLs and own pipelines in order, over ranks, workers and parts; what a
stream cannot do is told.
"""

from __future__ import annotations

import json
import os
import pickle
import shutil
from collections import Counter
from glob import glob

import pytest
import torch
import webdataset as wds

from tests.data.material import data_of, encoded, loader_of, picture, write_shards, write_tar
from tests.data.test_loader import joined, same, take
from vlp.config import Captions
from vlp.data.index import index
from vlp.data.loader import DataError
from vlp.data.sources import webdataset as source_module
from vlp.data.sources.shards import Options
from vlp.data.sources.shards import open as open_shards
from vlp.data.sources.webdataset import StreamError

PER_SHARD, N = 10, 80


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    return write_shards(tmp_path_factory.mktemp("stream"), N, PER_SHARD)


@pytest.fixture(autouse=True)
def settings(shards, monkeypatch):
    monkeypatch.setenv("SHARDS", str(shards))
    monkeypatch.setattr(source_module, "RESERVE", 8)
    monkeypatch.setattr(source_module, "_PAUSE_S", 0.001)


def stream(shards, **options):
    return {"name": "webdataset", "urls": f"{shards}/{{00000..00007}}.tar", "samples": N, **options}


def numbers(batches) -> list[int]:
    """The samples' numbers as their keys tell: shard and place."""
    return [int(key[:5]) * PER_SHARD + int(key[5:]) for batch in batches for key in batch.key]


def own(part: int, parts: int):
    """A pipeline such as a user writes: every third sample of each shard goes."""
    folder = os.environ["SHARDS"]
    urls = [f"{folder}/{name}" for name in sorted(os.listdir(folder)) if name.endswith(".tar")]
    keep = wds.select(lambda sample: int(sample["__key__"]) % 3 > 0)
    return wds.DataPipeline(wds.SimpleShardList(urls[part::parts]), wds.tarfile_to_samples(), keep)


def decoding(part: int, parts: int):
    return wds.DataPipeline(own(part, parts), wds.decode("pil"))


def failing(part: int, parts: int):
    yield from list(own(part, parts))[:5]
    raise ConnectionError("connection lost")


def test_a_pass_is_in_order_and_the_same_again(shards):
    loader = loader_of(data_of(stream(shards)), 16)
    assert loader.n_samples == N and loader.steps_per_epoch == 5
    batches = take(loader, 12)
    assert numbers(batches[:5]) == list(range(N)) == numbers(batches[5:10])
    assert not torch.equal(batches[0].image, batches[5].image)  # crops are drawn anew


def test_local_tars_of_ours_give_what_was_written_or_say_what_is_lost(shards, tmp_path, capfd):
    folder = tmp_path / "s"
    shutil.copytree(shards, folder)
    rows = index(sorted(folder.glob("*.tar")))
    path = folder / "00001.tar"
    data = bytearray(path.read_bytes())

    # One letter of a text, and a block of zeros, at which webdataset stops.
    at = data.index(b"caption", rows[1].places(3)[0][0])
    data[at] ^= 1
    hole = rows[1].places(7)[0][0]
    data[hole : hole + 512] = bytes(512)
    path.write_bytes(data)

    loader = loader_of(data_of(stream(folder, samples=77)), 11)
    batches = take(loader, 7)
    [(_, _, reason)] = loader.bad
    assert f"'000010003' is not what {path} was written with: restore" in reason
    kept = [number for number in range(N) if number not in (13, 17, 18, 19)]
    assert set(numbers(batches)) == set(kept)
    assert "00001.tar: 3 samples that it was written with are lost" in capfd.readouterr().err


@pytest.mark.parametrize(
    "options", [{}, {"parts": 4, "run": 4}, {"parts": 3, "run": 5, "buffer": 12}]
)
def test_ranks_workers_and_resuming_change_nothing(shards, options):
    data = data_of(stream(shards, **options))
    reference = take(loader_of(data, 16), 12)
    if options.get("buffer") is None and options:
        assert numbers(reference[:5]) != list(range(N)) and sorted(numbers(reference[:5])) == list(
            range(N)
        )
    running = loader_of(data, 16)
    take(running, 7)
    state = json.loads(json.dumps(running.state_dict()))
    for world in (2, 4):
        ranks = [loader_of(data, 16, rank=r, world=world) for r in range(world)]
        for rank in ranks:
            rank.load_state_dict(state)
        assert all(same(joined([next(rank) for rank in ranks]), batch) for batch in reference[7:])
    if options.get("parts") == 4:
        several = loader_of(data_of(stream(shards, **options), workers=2), 16)
        assert all(same(next(several), batch) for batch in reference)


def test_each_part_is_read_by_one_process_where_parts_and_runs_fit(shards, monkeypatch):
    opened = Counter()
    real = source_module.Stream._open
    monkeypatch.setattr(
        source_module.Stream,
        "_open",
        lambda self, part: (opened.update([part]), real(self, part))[1],
    )
    rank = loader_of(data_of(stream(shards, parts=4, run=4)), 8, rank=1, world=2)
    take(rank, 9)
    assert opened == {0: 1, 1: 1, 3: 1}  # 0 for the reserve, of which every process keeps a copy


def test_own_pipelines_buffers_and_weights(shards, tmp_path):
    pipeline = {"name": "webdataset", "pipeline": f"{__name__}:own", "samples": 48}
    found = numbers(take(loader_of(data_of(pipeline), 16), 3))
    expected = [i for i in range(N) if (i // PER_SHARD * 10_000 + i % PER_SHARD) % 3]
    assert found == expected[:48]

    mixed = numbers(take(loader_of(data_of({**pipeline, "buffer": 20}), 16), 3))
    assert mixed != found and len(set(mixed)) == 48 and set(mixed) <= set(expected)

    local = write_shards(tmp_path, 20, 10, start=500)
    both = data_of({**pipeline, "weight": 3}, {"name": "shards", "path": str(local), "weight": 1})
    batch = next(loader_of(both, 16))
    assert (batch.sample_id >= 48).sum() == 4


def test_a_part_that_ends_before_the_pass_starts_again(shards):
    loader = loader_of(data_of(stream(shards, samples=100)), 20)
    assert numbers(take(loader, 5)) == [i % N for i in range(100)]


def test_bad_samples_are_replaced_by_the_first_of_the_pass(tmp_path):
    members = []
    for i in range(40):
        members += [
            (f"{i:04d}.png", b"no picture" if i in (2, 30) else encoded(picture(i))),
            (f"{i:04d}.txt", b"a text"),
        ]
        members += [(f"{i:04d}.pyd", pickle.dumps({"never": "opened"}))]
    members[31 * 3 + 1] = ("0031.txt", b" ")
    path = write_tar(tmp_path / "0.tar", members)
    data = data_of({"name": "webdataset", "urls": str(path), "samples": 40})
    reference, loader = loader_of(data, 10), loader_of(data, 10)
    batches = take(loader, 4)
    assert {key for _, key, _ in loader.bad} == {"0002", "0030", ""} and len(loader.bad) == 3
    assert "no caption" in loader.bad[-1][2]

    replaced = [
        key for batch in batches[3:] for row, key in enumerate(batch.key) if int(key) != 30 + row
    ]
    assert len(replaced) == 2 and all(int(key) < 8 for key in replaced)
    assert all(same(next(reference), batch) for batch in batches)


def test_decoded_samples_and_broken_streams_end_the_run_with_what_to_change(shards):
    with pytest.raises(StreamError, match=r"gives 'png' as Image; expected bytes: take out decode"):
        next(
            loader_of(
                data_of({"name": "webdataset", "pipeline": f"{__name__}:decoding", "samples": 40}),
                8,
            )
        )
    with pytest.raises(
        StreamError,
        match=r"part 0 .* fails at sample 5 \(4 tries\): ConnectionError: connection lost",
    ):
        take(
            loader_of(
                data_of({"name": "webdataset", "pipeline": f"{__name__}:failing", "samples": 40}), 8
            ),
            2,
        )


def lenient(part: int, parts: int):
    urls = wds.SimpleShardList(
        [os.environ["DAMAGED"], *sorted(glob(os.environ["SHARDS"] + "/*.tar"))]
    )
    return wds.DataPipeline(urls, wds.tarfile_to_samples(handler=wds.ignore_and_continue))


def test_a_damaged_tar_ends_the_run_or_is_skipped_by_an_own_pipeline(shards, tmp_path, monkeypatch):
    short, double = tmp_path / "short.tar", tmp_path / "double.tar"
    short.write_bytes((shards / "00000.tar").read_bytes()[:700])
    write_tar(double, [("7.png", encoded(picture(7))), ("7.txt", b"one"), ("7.txt", b"two")])
    for path, message in ((short, "short.tar"), (double, "7.txt: duplicate file name")):
        with pytest.raises(StreamError, match=rf"part 0 .* \(4 tries\): .*{message}"):
            next(loader_of(data_of({"name": "webdataset", "urls": str(path), "samples": 40}), 8))
        monkeypatch.setenv("DAMAGED", str(path))
        loader = loader_of(
            data_of({"name": "webdataset", "pipeline": f"{__name__}:lenient", "samples": 40}), 8
        )
        assert set(numbers(take(loader, 5)[1:])) <= set(range(N))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"parts": 9}, "urls names 8 shards; set parts lower"),
        ({"urls": "", "pipeline": "nothing:at_all"}, "No module named 'nothing'"),
        ({"urls": "", "pipeline": f"{__name__}:absent"}, "has no attribute 'absent'"),
    ],
)
def test_what_cannot_be_opened_says_why(shards, options, message):
    with pytest.raises(ValueError, match=message):
        loader_of(data_of(stream(shards, **options)), 8)


def test_streams_refuse_what_needs_random_access(shards, tmp_path):
    local = {"name": "shards", "path": str(shards)}
    with pytest.raises(ValueError, match="source 0 is a stream"):
        loader_of(data_of(stream(shards), local), 8)

    for options in ({"replacement": True}, {"together": 2}, {"captions": {"choose": "all"}}):
        with pytest.raises(ValueError, match=r"stream|pack it into shards"):
            loader_of(data_of(stream(shards), **options), 8)
    state = loader_of(data_of(stream(shards)), 8).state_dict()
    with pytest.raises(DataError, match="sources"):
        loader_of(data_of(stream(shards, parts=2)), 8).load_state_dict(state)


ORDERS = {
    "together": lambda names: names,
    "pictures first": lambda names: sorted(names, key=lambda name: name[-3:] != "png"),
    "texts first": lambda names: sorted(names, key=lambda name: name[-3:] != "txt"),
    "pictures first, texts backwards": lambda names: [*names[::2], *names[1::2][::-1]],
    "one text at the end": lambda names: [*names[:3], *names[4:], names[3]],
}


@pytest.mark.parametrize("order", ORDERS)
def test_members_in_any_order_give_the_samples_of_shards(tmp_path, order):
    urls = []
    for part in range(2):
        names = [f"{part}{i}.{ending}" for i in range(6) for ending in ("png", "txt")]
        members = [
            (name, encoded(picture(int(name[:2]))) if name.endswith("png") else name.encode())
            for name in ORDERS[order](names)
        ]
        urls.append(str(write_tar(tmp_path / f"{part}.tar", members)))
    path = "::".join(urls)
    local = open_shards(Options(path), Captions())
    stream = source_module.open(source_module.Options(urls=path, samples=12), Captions())

    expected = {local[i].key: (local[i].image, local[i].captions) for i in range(len(local))}
    streamed = [stream[i] for i in range(12)]
    assert {s.key: (s.image, s.captions) for s in streamed} == expected and len(expected) == 12
    assert {s.key[0] for s in streamed[:6]} == {"0"}, "a tar ends before the next begins"


def test_incomplete_samples_of_a_stream_keep_their_number(tmp_path, capfd):
    """A picture without a text is one bad sample at the end of its tar, not a missing one."""
    names = ["0.png", "0.txt", "1.png", "README.md", "2.txt", "3.png", "3.txt"]
    members = [(name, encoded(picture(1)) if name.endswith("png") else b"a text") for name in names]
    path = write_tar(tmp_path / "0.tar", members)
    stream = source_module.open(source_module.Options(urls=str(path), samples=4), Captions())
    assert [stream[i].key for i in (0, 1)] == ["0", "3"]
    for i, reason in ((2, r"no caption among the members \['png'\]"), (3, "no image among the m")):
        with pytest.raises(ValueError, match=reason):
            stream[i]
    assert "0.tar: passed over: 1 × md" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("urls", "message"),
    [
        ("{}/absent.tar", r"is neither a folder nor a tar file; there is .*, but no absent\.tar"),
        ("{}/{{00000..00009}}.tar", r"there is .*, but no 00008\.tar in it"),
        ("{}/{{}}.tar", r"but no \{\}\.tar in it"),
        ("{}/no*.tar", r"is neither a folder nor a tar file"),
        ("{}/00000.tar::", r"expected an address on each side of every ::"),
        ("{}/nowhere/{{0..3}}.tar", r"of the path only .* is there"),
    ],
)
def test_urls_that_are_not_there_are_told_before_anything_is_read(shards, urls, message):
    with pytest.raises(ValueError, match=message):
        loader_of(data_of(stream(shards, urls=urls.format(shards))), 8)


def test_a_folder_and_a_pattern_name_their_tars_and_addresses_are_left_alone(shards):
    def opened(urls: str) -> list[str]:
        return source_module.open(source_module.Options(urls=urls, samples=N), Captions()).urls

    tars = sorted(map(str, shards.glob("*.tar")))
    assert opened(str(shards)) == opened(f"{shards}/0*.tar") == tars and len(tars) == 8
    for url in ("pipe:cat x.tar", "s3://bucket/{0..1}.tar", "https://host/a.tar", "file:x.tar"):
        assert opened(url)[0] == url.replace("{0..1}", "0")
