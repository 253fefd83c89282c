"""Batches of one source each: the weights choose the source, and each runs in whole epochs."""

import numpy as np
import pytest

from tests.data.material import data_of, loader_of, write_shards
from tests.data.test_mix import mixture
from tests.eval import material
from vlp import config
from vlp.data.mix import Begin
from vlp.data.steps import DataError
from vlp.train import train


@pytest.mark.parametrize("weights", [[0.7, 0.2, 0.1], [1, 1, 1], [3, 1, 1e-4]])
def test_batches_are_dealt_by_weights_and_sources_run_in_whole_epochs(weights):
    sizes, size = (64, 200, 17), 16
    mix = mixture(*sizes, weights=weights, one_source=True)
    batches = [mix.batch(step, size) for step in range(400)]
    sources = np.searchsorted(mix.firsts, np.stack(batches), side="right") - 1
    assert (sources == sources[:, :1]).all()

    for s, weight in enumerate(weights):
        seen = np.cumsum(sources[:, 0] == s)
        share = weight / sum(weights)
        assert np.abs(seen - share * np.arange(1, 401)).max() <= len(sizes)
        own = np.concatenate([np.empty(0, np.int64), *np.stack(batches)[sources[:, 0] == s]])
        for start in range(0, len(own) - sizes[s] + 1, sizes[s]):
            assert len(set(own[start : start + sizes[s]].tolist())) == sizes[s]


def test_rows_are_those_of_the_batch():
    mix = mixture(64, 40, weights=[1, 2], one_source=True)
    n_compared = 0
    for step in range(12):
        whole = mix.batch(step, 24)
        for first, last in ((0, 5), (5, 23), (23, 24)):
            assert (mix.rows(step, 24, range(first, last)).samples == whole[first:last]).all()
            n_compared += 1
    assert n_compared == 36


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="give every source a weight"):
        mixture(64, 40, one_source=True)
    with pytest.raises(ValueError, match="one size in all of a run"):
        mixture(64, 40, weights=[1, 1], one_source=True).begin(Begin(3, 60))
    assert mixture(40, one_source=True).steps_per_epoch(16) == 2  # one source needs no weight


def test_a_loader_resumes_on_other_ranks_and_refuses_a_small_source(tmp_path):
    sources = []
    for name, n, start in (("a", 24, 0), ("b", 9, 100)):
        write_shards(tmp_path / name, n, 12, start=start)
        sources.append({"name": "shards", "path": str(tmp_path / name), "weight": float(n)})
    data = data_of(*sources, one_source=True)
    loader = loader_of(data, 8)
    reference = [next(loader) for _ in range(6)]
    of_b = [set((batch.sample_id >= 24).tolist()) for batch in reference]
    assert {True} in of_b and {False} in of_b and {True, False} not in of_b

    ranks = [loader_of(data, 8, rank=rank, world=2) for rank in (0, 1)]
    for rank in ranks:
        rank.load_state_dict({**loader.state_dict(), "step": 3})
    for batch in reference[3:]:
        assert [key for rank in ranks for key in next(rank).key] == batch.key

    with pytest.raises(DataError, match="one_source was True, is None"):
        loader_of(data_of(*sources), 8).load_state_dict(loader.state_dict())
    with pytest.raises(ValueError, match=r"source 1 has 9, and data\.one_source fills it"):
        loader_of(data, 10)


def test_what_a_run_cannot_do_is_answered_by_its_configuration(tmp_path):
    sources = []
    for name in ("a", "b"):
        write_shards(tmp_path / name, 40, 40)
        sources.append({"name": "shards", "path": str(tmp_path / name)})
    weighted = [source | {"weight": 1.0} for source in sources]
    settings = {
        **material.OUR_CONFIG,
        "out": str(tmp_path / "run"),
        "data": {"sources": weighted, "one_source": True, "workers": 0},
        "train": {"duration": 2, "batch": 8, "device": "cpu"},
    }
    stages = [{"duration": 1}, {"duration": 1, "batch": 16}]
    with pytest.raises(
        ValueError, match=r"one size in all of a run; found train\.batch 8 and .*16"
    ):
        config.parse(settings | {"stages": stages})

    # Held-out samples are no training batches: their sources need no weights.
    train(config.parse(settings | {"validation": {"data": {"sources": sources}, "every": 1}}))
    assert "val.loss" in (tmp_path / "run" / "metrics.jsonl").read_text()
