"""Shards damaged in every way that we know of: no sample is ever shown with another's part."""

from __future__ import annotations

import json
import random
import shutil
from collections import Counter
from pathlib import Path

import pytest

from tests.data.material import encoded, picture, write_tar
from tests.data.mutations import KINDS, parts_of
from vlp.data.format import ShardWriter
from vlp.data.members import Content
from vlp.data.rows import Shard
from vlp.data.scan import scan

N = 8
IMAGES = [encoded(picture(i)) for i in range(N)]
# Texts of one length, so that another's fits into every header.
WORDS = [f"caption of the sample {i}" for i in range(N)]

cases = pytest.mark.parametrize(
    "rounds", [2, pytest.param(120, marks=[pytest.mark.slow, pytest.mark.timeout(1800)])]
)


def read_all(path: Path) -> tuple[Shard, list[Content]]:
    """The index of a tar, and every sample that can be read; the shard learns of the others."""
    shard = scan(path)
    samples = []
    with open(path, "rb") as file:
        for i in range(shard.count):
            try:
                samples.append(shard.sample(file, i))
            except ValueError as error:
                shard.report(f"sample {i}", str(error))
                shard.n_left_out += 1
    return shard, samples


@cases
def test_our_shards_show_what_was_written_or_name_what_is_lost(tmp_path, rounds):
    with ShardWriter(tmp_path / "whole", N) as writer:
        for i in range(N):
            writer.add(None, IMAGES[i], "png", [WORDS[i]], {"number": i})
    tar = (tmp_path / "whole" / "00000.tar").read_bytes()
    _, written = read_all(tmp_path / "whole" / "00000.tar")
    assert len(written) == N

    path = tmp_path / "00000.tar"
    shutil.copy(tmp_path / "whole" / "00000_stats.json", tmp_path)
    chance, n_tars, n_shown = random.Random(rounds), 0, 0
    for kind, mutate in KINDS.items():
        for _ in range(rounds):
            path.write_bytes(mutate(tar, parts_of(tar), chance))
            shard, shown = read_all(path)
            n_tars, n_shown = n_tars + 1, n_shown + len(shown)

            keys = {sample.key for sample in shown}
            assert all(sample in written for sample in shown), kind
            assert len(keys) == len(shown), kind
            lost = {sample.key for sample in written} - keys
            assert shard.n_left_out >= len(lost), kind
            assert all(any(key in line for line in shard.problems) for key in lost), kind
    assert n_tars == len(KINDS) * rounds and n_shown > 4 * n_tars


# What no reader can see in shards without digests: they hold whole samples, of other parts.
UNSEEN = {
    "a block copied over another",
    "two blocks exchanged",
    "two headers exchanged",
    "two texts exchanged",
    "a member renamed",
    "a header copied",
    "six blocks cut out",
}


@cases
def test_shards_of_others_are_never_paired_anew_where_bytes_are_lost(tmp_path, rounds):
    members = []
    for i in range(N):
        text, record = WORDS[i].encode(), json.dumps({"number": i}).encode()
        members += [(f"{i}.png", IMAGES[i]), (f"{i}.txt", text), (f"{i}.json", record)]
    tar = write_tar(tmp_path / "whole" / "0.tar", members).read_bytes()

    path, chance = tmp_path / "0.tar", random.Random(rounds)
    n_tars, mispaired = 0, Counter()
    for kind, mutate in KINDS.items():
        for _ in range(rounds):
            path.write_bytes(mutate(tar, parts_of(tar), chance))
            _, shown = read_all(path)
            n_tars += 1
            mispaired[kind] += sum(is_mispaired(sample) for sample in shown)
    assert n_tars == len(KINDS) * rounds
    assert {kind for kind, n in mispaired.items() if n} <= UNSEEN, mispaired


def is_mispaired(sample: Content) -> bool:
    """Whether parts of different samples stand together."""
    numbers = {sample.meta.get("number", None)}
    if sample.image in IMAGES:
        numbers.add(IMAGES.index(sample.image))
    numbers |= {WORDS.index(caption) for caption in sample.captions if caption in WORDS}
    return len(numbers - {None}) > 1
