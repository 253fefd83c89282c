"""Memory of tables with a row for each sample, when they are saved and read again."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests import ranks
from vlp import dist
from vlp.losses import _table
from vlp.losses._table import Table

SAMPLES, COLUMNS, BLOCK = 10_007, 6, 512
MIB = 2**20


def numbers(ids):
    """Distinct numbers of each sample."""
    return ids.unsqueeze(1) * 8.0 + torch.arange(COLUMNS)


def filled(samples):
    table = Table([0.0] * COLUMNS, samples)
    table.place(dist.world())
    ids = torch.arange(len(table.own)) * dist.world_size() + dist.rank()
    table.own.copy_(numbers(ids))
    return table


def _saved():
    """Whether the whole table is right, its rows here, and the bytes that each exchange brought."""
    _table.CHUNK = BLOCK
    arrived = []
    names = ("all_gather_into_tensor", "gather", "all_gather", "broadcast", "all_to_all_single")
    for name in names:
        setattr(torch.distributed, name, _recording(getattr(torch.distributed, name), arrived))

    whole = filled(SAMPLES).whole()
    right = torch.equal(whole, numbers(torch.arange(len(whole))))
    return right, len(whole), arrived


def _recording(exchange, arrived):
    def record(*arguments, **options):
        tensors = [a for a in arguments if torch.is_tensor(a)]
        for argument in arguments:
            if isinstance(argument, list):
                tensors += argument
        # What this rank sends is no larger than what it receives, where it receives anything.
        arrived.append(sum(t.nbytes for t in tensors))
        return exchange(*arguments, **options)

    return record


@pytest.mark.parametrize("n_ranks", [2, 4])
def test_a_table_is_made_whole_in_blocks_on_the_first_rank_alone(n_ranks):
    first, *others = ranks.run(n_ranks, _saved)
    row = COLUMNS * 4
    n_blocks = -(-SAMPLES // BLOCK)
    assert first[:2] == (True, SAMPLES)
    assert len(first[2]) in (n_blocks, n_blocks + 1)
    assert max(first[2]) <= row * BLOCK * (1 + 1 / n_ranks)
    for right, n_rows, arrived in others:
        assert right and n_rows == 0
        assert max(arrived) <= row * BLOCK / n_ranks  # it sends its own rows, and receives none


def _private_mib():
    """Memory of this process that it shares with no file, in MiB."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) / 1024
    raise AssertionError("no RssAnon in /proc/self/status")


def _read(path, n_samples):
    table = Table([0.0] * COLUMNS, n_samples)
    table.place(dist.world())
    before = _private_mib()
    table.load(load_file(path)["samples"])
    rows = torch.arange(dist.rank(), n_samples, dist.world_size())
    n_checked = 1000
    right = torch.equal(table.own[:n_checked], numbers(rows[:n_checked]))
    return right, _private_mib() - before


def test_a_rank_that_reads_a_table_holds_its_own_share_of_it(tmp_path):
    n_samples = 2_000_000
    n_mib = n_samples * COLUMNS * 4 / MIB
    save_file({"samples": numbers(torch.arange(n_samples))}, tmp_path / "table.safetensors")
    results = ranks.run(4, _read, str(tmp_path / "table.safetensors"), n_samples)
    assert len(results) == 4 and all(right for right, _ in results)
    assert max(grown for _, grown in results) < 0.4 * n_mib, results
