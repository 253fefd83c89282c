"""Batches copied to the device: the same values in the same rows."""

import pytest
import torch

from tests.test_step import negatives_batch
from vlp.copies import copied


def assert_same(moved, batch):
    fields = batch.carries() - {"key"}
    assert moved.carries() == batch.carries() and len(fields) >= 7
    assert all(torch.equal(getattr(moved, name).cpu(), getattr(batch, name)) for name in fields)
    assert moved.key == batch.key


def test_on_a_cpu_nothing_moves():
    batch = negatives_batch()
    moved = copied(batch, torch.device("cpu"))
    assert_same(moved, batch)
    assert moved.image.data_ptr() == batch.image.data_ptr()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_many_batches_in_flight_arrive_whole():
    """While the device is busy and memory is handed out again and again."""
    busy = torch.randn(4096, 4096, device="cuda")
    for _ in range(20):
        batch = negatives_batch().pin_memory()
        busy = busy @ busy
        assert_same(copied(batch, torch.device("cuda")), batch)
