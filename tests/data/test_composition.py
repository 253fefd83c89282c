"""What stands together in a batch and how often it is drawn: origins, shares, captions,
replacement.
"""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.data.material import TEXT, data_of, encoded, loader_of, picture, write_tar
from tests.data.test_loader import joined, same, take
from tests.data.test_mix import mixture
from vlp.data import text
from vlp.data.format import ShardWriter
from vlp.data.loader import DataError
from vlp.schema import ConfigError

IMAGE = encoded(picture(3, (8, 8)))
SIZES = [3, 5, 1, 4, 3, 2, 3, 6, 3, 3, 4, 3, 1, 3, 3, 8, 3, 3]  # members of each origin


def write_origins(folder: Path, sizes: list[int], per_shard: int = 20) -> Path:
    """Sample key = origin-member; captions say the same. A writer of its own for each shard, so
    that some cut an origin.
    """
    members = [(origin, member) for origin, size in enumerate(sizes) for member in range(size)]
    for number, first in enumerate(range(0, len(members), per_shard)):
        with ShardWriter(folder, per_shard, first_shard=number) as writer:
            for origin, member in members[first : first + per_shard]:
                key = f"{origin}-{member}"
                writer.add(
                    key,
                    IMAGE,
                    "png",
                    [f"{key} {c}" for c in range(1 + origin % 3)],
                    {"origin": f"o{origin}"},
                )
    return folder


def origins_of(keys: list[str], size: int) -> list[str]:
    """The origin of each group of `size` rows; fails where a group holds more than one, or a sample
    twice.
    """
    groups = [keys[i : i + size] for i in range(0, len(keys), size)]
    assert all(
        len(set(group)) == size and len({key.split("-")[0] for key in group}) == 1
        for group in groups
    )
    return [group[0].split("-")[0] for group in groups]


@pytest.fixture(scope="module")
def variations(tmp_path_factory) -> Path:
    return write_origins(tmp_path_factory.mktemp("origins") / "shards", SIZES)


def test_variations_of_one_origin_stand_together_on_one_rank(variations):
    """Shards of 20 samples cut some origins: what lies in two shards is two groups."""
    loader = loader_of(data_of(variations, together=3), 12)
    samples = [loader._mixture.read(i) for i in range(loader.n_samples)]
    runs = Counter((sample.key.split("-")[0], sample.sample_id // 20) for sample in samples)
    # Two origins are cut by the end of a shard: what the test is about.
    assert len(runs) == len(SIZES) + 2

    whole = {run: n for run, n in runs.items() if n >= 3}
    whole_of_origin = Counter(origin for origin, _ in whole)
    assert loader.steps_per_epoch == len(whole) // 4
    assert loader.n_samples == sum(SIZES)
    assert loader.n_left_out == sum(n for n in runs.values() if n < 3) > 0

    problem = f"{loader.n_left_out} samples of origins with fewer than data.together = 3"
    assert problem in loader.problems()[-1]

    members = []
    for _ in range(3):
        ranks = [loader_of(data_of(variations, together=3), 12, rank=r, world=2) for r in range(2)]
        for rank in ranks:
            rank.load_state_dict(loader.state_dict())
        seen, chosen = Counter(), set()
        for _ in range(loader.steps_per_epoch):
            parts = [next(rank) for rank in ranks]
            for part in parts:
                seen.update(origins_of(part.key, 3))
                chosen.update(key for key in part.key if key.startswith("15-"))
            assert same(joined(parts), next(loader))
        # Each group stands in an epoch at most once.
        assert all(n <= whole_of_origin[origin] for origin, n in seen.items())
        assert seen.total() == 4 * loader.steps_per_epoch >= len(whole) - 3

        members.append(frozenset(chosen))
    # An origin of eight gives other three in another epoch.
    assert len(set(members)) > 1


@pytest.mark.parametrize(
    "options",
    [
        {"together": 2},
        {"captions": {"choose": "all"}},
        {"replacement": True},
        {"together": 2, "replacement": True},
        {"captions": {"choose": "weights", "weights": [1, 5]}},
    ],
)
@pytest.mark.parametrize("weights", [None, (0.7, 0.3)])
def test_resuming_with_other_ranks_and_workers_continues_exactly(
    variations, tmp_path, options, weights
):
    other = write_origins(tmp_path, [2, 4, 2, 2, 3])
    sources = [{"name": "shards", "path": str(path)} for path in (variations, other)]
    if weights:
        sources = [{**source, "weight": weight} for source, weight in zip(sources, weights)]
    reference = take(loader_of(data_of(*sources, **options), 8), 25)
    saved = loader_of(data_of(*sources, **options), 8)
    take(saved, 9)
    state = json.loads(json.dumps(saved.state_dict()))
    for world, workers in ((1, int(options == {"together": 2} and weights is not None)), (4, 0)):
        ranks = [
            loader_of(data_of(*sources, **options, workers=workers), 8, rank=r, world=world)
            for r in range(world)
        ]
        for rank in ranks:
            rank.load_state_dict(state)
        assert all(same(joined([next(rank) for rank in ranks]), batch) for batch in reference[9:])
    with pytest.raises(DataError, match="cannot continue on this data"):
        loader_of(data_of(*sources), 8).load_state_dict(state)
    with pytest.raises(DataError, match="cannot continue on this data"):
        saved.load_state_dict(loader_of(data_of(*sources), 8).state_dict())


def test_origins_keep_together_in_windows_of_remote_shards(variations, tmp_path, monkeypatch):
    monkeypatch.setenv("VLP_CACHE", str(tmp_path / "cache"))
    remote = {"name": "remote", "path": f"file://{variations}/", "window": 2}
    loader = loader_of(data_of(remote, together=3), 6)
    local = loader_of(data_of(variations, together=3), 6)
    assert loader.steps_per_epoch == local.steps_per_epoch == 6

    batches = take(loader, 6)
    keys = [key for batch in batches for key in batch.key]
    assert len(origins_of(keys, 3)) == 12 and len(set(keys)) == 36

    shards = [set((batch.sample_id // 20).tolist()) for batch in batches]
    assert len(shards[0] | shards[1]) <= 2  # the first window, of at least four groups
    assert len(set().union(*shards)) == 3  # the fourth has no group
    assert all(
        same(a, b) for a, b in zip(take(loader_of(data_of(remote, together=3), 6), 6), batches)
    )


def test_an_origin_whose_first_sample_has_no_text_keeps_to_itself(tmp_path):
    members = []
    for i, (origin, caption) in enumerate(
        [("a", "x"), ("a", "x"), ("b", " "), ("b", "x"), ("b", "x"), (None, "x"), (None, "x")]
    ):
        record = json.dumps(
            {"captions": [caption], **({"origin": origin} if origin else {})}
        ).encode()
        members += [(f"{origin}-{i}.png", IMAGE), (f"{origin}-{i}.json", record)]
    path = write_tar(tmp_path / "0.tar", members)
    loader = loader_of(data_of(path, together=2, captions={"missing": "drop"}), 4)
    assert sorted(next(loader).key) == ["a-0", "a-1", "b-3", "b-4"] and loader.n_left_out == 3


def test_a_bad_variation_is_replaced_by_another_of_its_origin(tmp_path):
    sizes = {"a": 4, "b": 2, "c": 2}
    with ShardWriter(tmp_path) as writer:
        for origin, size in sizes.items():
            for i in range(size):
                image = b"not an image" if (origin, i) in (("a", 0), ("a", 1)) else IMAGE
                writer.add(f"{origin}-{i}", image, "png", ["x"], {"origin": origin})
    loader = loader_of(data_of(tmp_path, together=2), 6)
    for batch in take(loader, 6):
        origins_of(batch.key, 2)
        assert len(set(batch.key)) == 6 and not {"a-0", "a-1"} & set(batch.key)
    assert loader.counters()["bad_samples"] >= 3


def test_composition_that_cannot_be_is_refused(variations, tmp_path, monkeypatch):
    monkeypatch.setenv("VLP_CACHE", str(tmp_path / "cache"))
    with pytest.raises(
        ValueError,
        match=r"together is 3, which does not divide a rank's 4 rows.*train.batch of 3 a rank",
    ):
        loader_of(data_of(variations, together=3), 8, world=2)
    with pytest.raises(ValueError, match=r"no origin in source 0 has as many samples.*lower"):
        loader_of(data_of(variations, together=9), 9)
    with pytest.raises(
        ValueError, match=r"a batch of 42 is larger than the data \(13 groups of 3\)"
    ):
        loader_of(data_of(variations, together=3), 42)
    with pytest.raises(ValueError, match="fetches whole shards in turn"):
        loader_of(data_of({"name": "remote", "path": f"file://{variations}/"}, replacement=True), 4)

    for wrong in (
        {"together": 2, "captions": {"choose": "all"}},
        {"replacement": True, "shuffle": False},
        {"together": 0},
        {"captions": {"choose": "weights"}},
        {"captions": {"weights": [1]}},
        {"bad_share": 1.5},
        {"captions": {"choose": "weights", "weights": [1, 0]}},
    ):
        with pytest.raises(ConfigError):
            data_of(variations, **wrong)


@pytest.mark.parametrize(
    "shares", [[31, 1], [0.7, 0.26875, 0.03125], [0.03125, 0.7, 0.26875], [0.5, 0.46875, 0.03125]]
)
@pytest.mark.parametrize("batch", [32, 96])
def test_a_share_of_a_32nd_is_exact_in_every_batch(shares, batch):
    """The counting pairs' share of the paper (arXiv 2302.12066), wherever the source stands and
    whatever the others have.
    """
    counting = shares.index(min(shares))
    mix = mixture(*[700 + 13 * s for s in range(len(shares))], weights=shares)
    n = 0
    for step in range(200):
        sources = np.searchsorted(mix.firsts, mix.batch(step, batch), side="right") - 1
        assert (sources == counting).sum() == batch // 32
        n += 1
    assert n == 200


def test_every_caption_stands_in_the_epoch_once(variations):
    loader = loader_of(data_of(variations, captions={"choose": "all"}), 4)
    n_captions = [1 + origin % 3 for origin, size in enumerate(SIZES) for _ in range(size)]
    assert loader.steps_per_epoch == sum(n_captions) // 4 and loader.n_samples == sum(SIZES)

    pairs = Counter()
    tokens = text.build(TEXT)
    expected = set()
    for i, n in enumerate(n_captions):
        captions = loader._mixture.read(i).captions
        assert len(captions) == n
        expected |= {(i, row.numpy().tobytes()) for row in tokens(list(captions))}
    for batch in take(loader, loader.steps_per_epoch):
        pairs.update(
            (i, row.numpy().tobytes()) for i, row in zip(batch.sample_id.tolist(), batch.text)
        )
    assert (
        set(pairs.values()) == {1} and pairs.keys() <= expected and len(expected) - len(pairs) < 4
    )


def test_every_template_of_a_class_name_is_a_caption(tmp_path):
    members = [
        (f"{i}.{k}", d)
        for i in range(4)
        for k, d in (("png", IMAGE), ("json", b'{"class": "fox"}'))
    ]
    members += [("5.png", IMAGE), ("5.txt", b"its own")]
    captions = {"choose": "all", "class_templates": ["a {}.", "the {}."]}
    loader = loader_of(data_of(write_tar(tmp_path / "0.tar", members), captions=captions), 9)
    batch = next(loader)
    assert Counter(batch.key) == {**{str(i): 2 for i in range(4)}, "5": 1}

    expected = text.build(TEXT)(["a fox."] * 4 + ["the fox."] * 4 + ["its own"])
    assert sorted(batch.text.tolist()) == sorted(expected.tolist())


def test_a_folder_knows_captions_and_origins_too(tmp_path):
    for i in range(6):
        (tmp_path / f"{i}.png").write_bytes(IMAGE)
    rows = [
        {"image": f"{i}.png", "captions": [f"{i} {c}" for c in range(i + 1)], "origin": i // 2}
        for i in range(6)
    ]
    table = tmp_path / "captions.jsonl"
    table.write_text("\n".join(map(json.dumps, rows)))
    source = {"name": "folder", "path": str(tmp_path), "captions": str(table)}
    assert loader_of(data_of(source, captions={"choose": "all"}), 7).steps_per_epoch == 3

    batch = next(loader_of(data_of(source, together=2), 6))
    origins = [int(key) // 2 for key in batch.key]
    assert origins[::2] == origins[1::2]
    assert len(origins) == 6


def test_captions_are_drawn_by_weight(tmp_path):
    with ShardWriter(tmp_path) as writer:
        for i in range(200):
            writer.add(None, IMAGE, "png", ["one", "two", "three"][: 2 + i % 2])
    loader = loader_of(data_of(tmp_path, captions={"choose": "weights", "weights": [3, 1]}), 200)
    one, two, three = text.build(TEXT)(["one", "two", "three"])
    rows = torch.cat([batch.text for batch in take(loader, 5)])
    counts = [(rows == caption).all(1).sum().item() for caption in (one, two, three)]
    assert sum(counts) == 1000 and counts[2] == 0  # a caption without a weight is never taken
    assert abs(counts[0] - 750) < 4.5 * np.sqrt(1000 * 0.75 * 0.25)


def chi_squared(counts: np.ndarray, expected: float) -> float:
    return ((counts - expected) ** 2 / expected).sum()


def test_draws_with_replacement_are_uniform_and_independent():
    n, size, steps = 40, 20, 2000
    mix = mixture(25, 15, replacement=True)
    ids = np.stack([mix.batch(step, size) for step in range(steps)])
    assert np.array_equal(ids[7], mixture(25, 15, replacement=True).batch(7, size))
    assert not np.array_equal(ids[7], mixture(25, 15, replacement=True, seed=6).batch(7, size))

    # 39 degrees of freedom, deviation 8.8.
    counts = np.bincount(ids.ravel(), minlength=n)
    assert 15 < chi_squared(counts, ids.size / n) < 75

    # A draw tells nothing of the next.
    pairs = np.bincount(ids[:, :-1].ravel() * n + ids[:, 1:].ravel(), minlength=n * n)
    assert abs(chi_squared(pairs, pairs.sum() / n**2) - 1599) < 5 * np.sqrt(2 * 1599)

    # The negative control: an epoch repeats nothing.
    of_an_epoch = np.bincount(mixture(25, 15).batch(0, n), minlength=n)
    assert chi_squared(of_an_epoch, 1) == 0

    distinct = np.array([len(set(row.tolist())) for row in ids])
    assert abs(distinct.mean() - n * (1 - (1 - 1 / n) ** size)) < 0.2


def test_replacement_keeps_the_shares():
    mix = mixture(10, 1000, weights=[1, 3], replacement=True)
    for step in range(50):
        assert (mix.batch(step, 16) < 10).sum() == 4


def test_the_old_word_for_a_random_caption_is_refused_with_the_new_one(variations):
    with pytest.raises(ConfigError, match=r"captions\.choose: 'seed' is called 'random' now"):
        data_of(variations, captions={"choose": "seed"})
    assert data_of(variations).captions.choose == "random"
