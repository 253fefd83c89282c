"""The loader: a step's batch is the same whatever ranks and workers there are, and resuming changes
nothing.
"""

from __future__ import annotations

import json
import os
import random
import time
from multiprocessing.reduction import ForkingPickler
from pathlib import Path

import pytest
import torch

from tests.data.material import (
    IMAGE,
    TEXT,
    data_of,
    encoded,
    loader_of,
    picture,
    write_shards,
    write_tar,
)
from vlp.config import Data
from vlp.data import loader as loader_module
from vlp.data.loader import DataError
from vlp.schema import parse
from vlp.types import Batch

AUGMENT = {"scale": [0.4, 1.0], "flip": 0.5, "color": 0.3}


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shards")
    write_shards(folder / "many", 103, 10)
    write_shards(folder / "one", 50, 100, start=200)
    return folder


def same(a: Batch, b: Batch) -> bool:
    return a.key == b.key and all(
        torch.equal(getattr(a, f), getattr(b, f)) for f in ("image", "text", "sample_id")
    )


def joined(parts: list[Batch]) -> Batch:
    tensors = {f: torch.cat([getattr(p, f) for p in parts]) for f in ("image", "text", "sample_id")}
    return Batch(key=[key for p in parts for key in p.key], **tensors)


def take(loader, n: int) -> list[Batch]:
    return [next(loader) for _ in range(n)]


@pytest.mark.parametrize("weights", [None, (0.7, 0.3)])
def test_ranks_and_workers_do_not_change_a_step(shards, weights):
    sources = [{"name": "shards", "path": str(shards / name)} for name in ("many", "one")]
    if weights:
        sources = [{**source, "weight": weight} for source, weight in zip(sources, weights)]
    reference = take(loader_of(data_of(*sources, augment=AUGMENT), 12), 30)
    assert (
        reference[0].image.shape == (12, 3, *IMAGE.size) and reference[0].image.dtype == torch.uint8
    )
    assert (
        reference[0].text.shape == (12, TEXT.context_length)
        and reference[0].text.dtype == torch.int64
    )
    for world, workers in ((1, 2), (2, 1), (4, 0), (12, 0)):
        data = data_of(*sources, augment=AUGMENT, workers=workers)
        ranks = [loader_of(data, 12, rank=r, world=world) for r in range(world)]
        for step in range(30 if world < 12 else 5):
            assert same(joined([next(rank) for rank in ranks]), reference[step]), (
                world,
                workers,
                step,
            )
    assert not same(reference[0], reference[1])
    other = next(loader_of(data_of(*sources, augment=AUGMENT), 12, seed=4))
    assert not same(other, reference[0])


def test_processes_make_parts_of_a_large_step(shards, tmp_path, monkeypatch):
    """Eleven rows by three processes, with hard captions and samples that cannot be read."""
    members = []
    for i in range(40):
        extra = {"captions": [f"text {i}"], "negatives": [f"no {i}"][: i % 2], "score": i}
        stored = encoded(picture(i))
        members.append((f"{i:02d}.png", stored[: len(stored) // 2] if i % 8 == 7 else stored))
        members.append((f"{i:02d}.json", json.dumps(extra).encode()))
    write_tar(tmp_path / "0.tar", members)

    monkeypatch.setattr("vlp.data.processes._PART_BYTES", 1000)
    made, n_parts, bad = {}, {}, {}
    for workers in (0, 1, 3):
        loader = loader_of(data_of(tmp_path, augment=AUGMENT, workers=workers), 22, world=2)
        made[workers] = take(loader, 4)
        n_parts[workers] = loader._steps.parts
        bad[workers] = [sample_id for sample_id, _, _ in loader.bad]
        names = made[0][0].carries() - {"key"}
        assert {"image", "text", "sample_id", "negatives", "negatives_valid"} <= names
        for one, other in zip(made[workers], made[0]):
            assert one.key == other.key and one.carries() == other.carries()
            for name in names:
                value, expected = getattr(one, name), getattr(other, name)
                assert value.dtype == expected.dtype and torch.equal(value, expected), name
    assert n_parts == {0: 1, 1: 1, 3: 3}
    assert bad[0] and bad[0] == bad[1] == bad[3]


def test_auto_workers_follow_the_cores_and_the_shared_memory(shards, tmp_path, monkeypatch, capsys):
    source = [{"name": "shards", "path": str(shards / "one")}]
    assert parse(Data, {"sources": source}).workers == "auto"

    monkeypatch.setattr("vlp.data.loader.usual_workers", lambda n_ranks: 12 // n_ranks)
    assert loader_of(data_of(shards / "one", workers="auto"), 10)._workers == 12
    assert capsys.readouterr().err == ""

    monkeypatch.setattr("vlp.data.loader.fitting_workers", lambda *sizes: 2)
    assert loader_of(data_of(shards / "one", workers="auto"), 10)._workers == 2
    assert "takes 2 process(es) a rank and not 12" in capsys.readouterr().err
    for refused in ("many", -1):
        with pytest.raises(ValueError, match="workers"):
            data_of(shards / "one", workers=refused)


def test_an_epoch_is_whole_over_ranks_with_more_ranks_and_workers_than_shards(shards):
    data = data_of(shards / "one", workers=1)
    ranks = [loader_of(data, 8, rank=r, world=4) for r in range(4)]
    assert ranks[0].steps_per_epoch == 6 and ranks[0].n_samples == 50
    for _ in range(2):
        ids = [i for _ in range(6) for rank in ranks for i in next(rank).sample_id.tolist()]
        assert len(ids) == len(set(ids)) == 48


def test_crops_and_captions_change_between_epochs_and_ids_mean_what_they_say(shards):
    loader = loader_of(data_of(shards / "one", augment=AUGMENT), 50)
    one, two = take(loader, 2)
    assert sorted(one.sample_id.tolist()) == sorted(two.sample_id.tolist()) == list(range(50))
    assert one.sample_id.tolist() != two.sample_id.tolist()
    back = torch.argsort(two.sample_id)[one.sample_id]
    changed = sum(not torch.equal(one.image[i], two.image[back[i]]) for i in range(50))
    other_caption = sum(not torch.equal(one.text[i], two.text[back[i]]) for i in range(50))
    assert changed > 45 and 10 < other_caption < 40
    plain = data_of(
        shards / "one",
        augment={"scale": [1, 1], "ratio": [40 / 36, 40 / 36]},
        captions={"choose": "first"},
    )
    batch = next(loader_of(plain, 50))
    from vlp.data.decode import eval_transform
    from vlp.data.text import build
    from vlp.types import ImageSpec

    for i, key in zip(batch.sample_id.tolist()[:10], batch.key):
        row = batch.sample_id.tolist().index(i)
        expected = eval_transform(encoded(picture(200 + i)), ImageSpec(IMAGE.size, resize="squash"))
        assert key == f"00000{i:04d}" and (batch.image[row].int() - expected.int()).abs().max() <= 2
        assert torch.equal(batch.text[row], build(TEXT)([f"caption {200 + i} one"])[0])


@pytest.mark.parametrize("trials", [12, pytest.param(60, marks=pytest.mark.slow)])
def test_resuming_anywhere_with_other_ranks_and_workers_continues_exactly(shards, trials):
    data = data_of(
        {"name": "shards", "path": str(shards / "many"), "weight": 2.0},
        {"name": "shards", "path": str(shards / "one"), "weight": 1.0},
        augment=AUGMENT,
    )
    reference = take(loader_of(data, 12), 60)
    chance = random.Random(trials)
    for trial in range(trials):
        stop, world = chance.randrange(55), chance.choice([1, 2, 3, 4])
        saved = loader_of(data, 12)
        saved.load_state_dict({**saved.state_dict(), "step": stop})
        take(saved, 2)
        state = json.loads(json.dumps(saved.state_dict()))
        assert state["step"] == stop + 2 and len(json.dumps(state)) < 1000
        ranks = [loader_of(data, 12, rank=r, world=world) for r in range(world)]
        for rank in ranks:
            rank.load_state_dict(state)
        for step in range(stop + 2, min(stop + 4, 60)):
            assert same(joined([next(rank) for rank in ranks]), reference[step]), (
                trial,
                step,
                world,
            )


def test_prefetching_workers_do_not_move_the_saved_position(shards):
    data = data_of(shards / "many", workers=2, augment=AUGMENT)
    reference = take(loader_of(data_of(shards / "many", augment=AUGMENT), 10), 25)
    loader = loader_of(data, 10)
    take(loader, 7)
    time.sleep(0.3)  # workers run ahead
    state = loader.state_dict()
    resumed = loader_of(data, 10)
    resumed.load_state_dict(state)
    assert all(same(next(resumed), reference[step]) for step in range(7, 25))
    loader.load_state_dict({**state, "step": 3})  # also back, in a loader that runs
    assert same(next(loader), reference[3])


def test_a_resumed_run_on_other_data_is_refused_by_name(shards, tmp_path):
    state = loader_of(data_of(shards / "one"), 10).state_dict()
    for other, options, word in (
        (shards / "many", {}, "samples was 50, is 103"),
        (write_shards(tmp_path / "a", 50, 25, start=200), {}, "sources was"),
        (shards / "one", {"seed": 9}, "seed was 3, is 9"),
        (shards / "one", {"batch": 5}, "batch was 10, is 5"),
    ):
        with pytest.raises(DataError, match=word):
            loader_of(data_of(other), **{"batch": 10, **options}).load_state_dict(state)
    write_shards(tmp_path / "moved", 50, 100, start=200)  # the same data elsewhere is the same data
    loader_of(data_of(tmp_path / "moved"), 10).load_state_dict(state)


def foreign_shards(folder: Path) -> Path:
    """Three shards of four samples; all pictures and all texts have one size."""
    for shard in range(3):
        members = []
        for i in range(4 * shard, 4 * shard + 4):
            members += [
                (f"{i:02d}.bmp", encoded(picture(i), "BMP")),
                (f"{i:02d}.txt", f"text {i:02d}".encode()),
            ]
        write_tar(folder / f"{shard}.tar", members)
    return folder


def replace_unseen(path: Path, data: bytes) -> None:
    """Other content with the size and the time of modification of what was there."""
    status = path.stat()
    path.write_bytes(data)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    after = path.stat()
    assert (after.st_size, after.st_mtime_ns) == (status.st_size, status.st_mtime_ns)


def test_a_resumed_run_whose_samples_are_counted_otherwise_is_told_of_its_version(tmp_path):
    """As where captions stand under a title, which earlier versions did not read."""
    data = data_of(foreign_shards(tmp_path))
    state = loader_of(data, 4).state_dict()
    state["samples"] -= 1
    with pytest.raises(DataError, match=r"samples was 11, is 12; .*that version continues"):
        loader_of(data, 4).load_state_dict(state)


@pytest.mark.parametrize("change", ["text", "picture", "exchanged"])
def test_a_resumed_run_on_shards_of_other_content_is_refused_with_the_shard(tmp_path, change):
    folder = foreign_shards(tmp_path)
    data = data_of(folder)
    state = json.loads(json.dumps(loader_of(data, 4).state_dict()))
    loader_of(data, 4).load_state_dict(state)

    one, two = folder / "1.tar", folder / "2.tar"
    tar, other = one.read_bytes(), two.read_bytes()
    if change == "exchanged":
        replace_unseen(one, other)
        replace_unseen(two, tar)
    elif change == "text":
        replace_unseen(one, tar.replace(b"text 05", b"text 06"))
    else:
        before, after = (encoded(picture(i), "BMP") for i in (5, 6))
        assert before in tar
        replace_unseen(one, tar.replace(before, after))
    names = "2 of 3 shards .*: 1.tar, 2.tar" if change == "exchanged" else "1 of 3 shards .*: 1.tar"
    with pytest.raises(
        DataError, match=rf"{names}; restore it, or start a new run with init_from="
    ):
        loader_of(data, 4).load_state_dict(state)

    replace_unseen(one, tar)
    replace_unseen(two, other)
    os.utime(one)  # another time, the same content
    loader_of(data, 4).load_state_dict(state)
    del state["content"]  # as checkpoints were before there were digests
    loader_of(data, 4).load_state_dict(state)


def test_what_cannot_work_is_an_error_that_says_what_to_change(shards, tmp_path):
    with pytest.raises(
        ValueError,
        match=r"a batch of 64 is larger than the data \(50 samples\); set train.batch lower",
    ):
        loader_of(data_of(shards / "one"), 64)
    with pytest.raises(ValueError, match="choose a multiple of 3"):
        loader_of(data_of(shards / "one"), 10, world=3)
    with pytest.raises(ValueError, match="neither a folder nor a tar"):
        loader_of(data_of(tmp_path / "nothing"), 10)
    empty = write_tar(tmp_path / "e" / "0.tar", [("readme.md", b"hello")])
    with pytest.raises(ValueError, match="no usable sample"):
        loader_of(data_of(empty.parent), 10)


def test_missing_captions_are_refused_or_dropped_and_counted(tmp_path, capsys):
    image = encoded(picture(1))
    members = [
        (f"{i}.{kind}", data)
        for i in range(8)
        for kind, data in (("png", image), ("txt", b"hi" if i % 2 else b" "))
    ]
    path = write_tar(tmp_path / "0.tar", members)
    with pytest.raises(
        ValueError, match=r"4 of 8 samples have no caption .*class_templates.*missing=drop"
    ):
        loader_of(data_of(path), 4)
    loader = loader_of(data_of(path, captions={"missing": "drop"}), 4)
    assert loader.n_samples == 4 and loader.counters()["left_out_samples"] == 4
    assert "4 samples of the data are left out; what was found:" in capsys.readouterr().err
    assert (
        sorted(next(loader).key) == ["1", "3", "5", "7"]
        and "4 samples without text" in loader.problems()[0]
    )


def test_class_names_become_captions(tmp_path):
    image = encoded(picture(1))
    members = [
        (f"{i}.{k}", d)
        for i in range(4)
        for k, d in (("png", image), ("json", b'{"class": "red fox"}'))
    ]
    path = write_tar(tmp_path / "0.tar", members)
    loader = loader_of(data_of(path, captions={"class_templates": ["a photo of a {}."]}), 4)
    from vlp.data.text import build

    assert torch.equal(next(loader).text, build(TEXT)(["a photo of a red fox."] * 4))


def test_optional_fields_are_carried_with_their_masks(tmp_path):
    image = encoded(picture(1))
    extras = [
        {"negatives": ["a", "b", "c"], "counterfactuals": ["two cats"]},
        {"negatives": ["d"]},
        {},
        {},
    ]
    members = []
    for i, extra in enumerate(extras):
        members += [
            (f"{i}.png", image),
            (
                f"{i}.json",
                json.dumps({"captions": [f"text {i}"], "score": i / 2, **extra}).encode(),
            ),
        ]
    loader = loader_of(data_of(write_tar(tmp_path / "0.tar", members), shuffle=False), 4)
    batch = next(loader)
    names = {"negatives", "negatives_valid", "counterfactual", "counterfactual_valid", "score"}
    assert loader.carries == names and names <= batch.carries()
    assert batch.negatives.shape == (4, 3, TEXT.context_length) and batch.counterfactual.shape == (
        4,
        1,
        TEXT.context_length,
    )
    assert batch.negatives_valid.tolist() == [
        [True] * 3,
        [True, False, False],
        [False] * 3,
        [False] * 3,
    ]
    assert batch.counterfactual_valid.tolist() == [
        True,
        False,
        False,
        False,
    ] and batch.score.tolist() == [0, 0.5, 1, 1.5]
    from vlp.data.text import build

    assert torch.equal(batch.negatives[0], build(TEXT)(["a", "b", "c"]))
    assert len(batch.split(2)[1]) == 2


def test_truncated_captions_are_counted(tmp_path):
    image = encoded(picture(1))
    members = [
        (f"{i}.{k}", d)
        for i in range(6)
        for k, d in (("png", image), ("txt", b"word " * (40 if i < 2 else 3)))
    ]
    loader = loader_of(data_of(write_tar(tmp_path / "0.tar", members)), 6)
    take(loader, 3)
    assert loader.counters()["truncated_captions"] == 6


def test_a_batch_that_never_comes_is_called_a_stall(shards, monkeypatch):
    monkeypatch.setattr(loader_module, "_STALL_S", 1e-3)
    monkeypatch.setattr("vlp.data.processes._POLL_S", 1e-3)
    with pytest.raises(DataError, match=r"step 0 took more than 0.001 s to load: a stalled disk"):
        next(loader_of(data_of(shards / "many", workers=1), 8))


def test_what_is_sent_to_a_worker_is_small(shards):
    loader = loader_of(data_of(shards / "many"), 10)
    before = len(bytes(ForkingPickler.dumps(loader._steps)))
    next(loader)  # builds the tokenizer, whose tables of megabytes must not travel
    assert len(bytes(ForkingPickler.dumps(loader._steps))) == before < 20_000
    assert loader._steps._tokenizer is not None
