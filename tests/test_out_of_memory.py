"""A step that does not fit the memory says what to change, in numbers."""

import pytest
import torch

from vlp import config
from vlp.models.dual_encoder import DualEncoder
from vlp.out_of_memory import OutOfMemory, fitting
from vlp.train import train


def options(**changes):
    return config.Train(config.Duration(4, "steps"), **{"batch": 96, "micro_batches": 2} | changes)


def test_a_card_that_is_full_names_settings_and_rows():
    with pytest.raises(OutOfMemory) as caught, fitting(options()):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nMore.")
    text = str(caught.value)
    assert "Tried to allocate 2.00 GiB" in text and "More" not in text
    assert "train.batch 96 is 96 rows a rank, embedded 48 at a time (train.micro_batches 2" in text
    assert "train.micro_batches=4 (activations of 24 rows instead of 48, the same loss, 8%" in text
    assert text.index("micro_batches=4") < text.index("activation_checkpointing=true")
    assert text.index("activation_checkpointing=true") < text.index("a train.batch below 96")


def test_a_host_that_is_full_is_known_by_its_words():
    message = r"a step does not fit into the memory.*alloc"
    with pytest.raises(OutOfMemory, match=message), fitting(options()):
        torch.empty(2**50, dtype=torch.uint8)


def test_what_was_done_already_is_not_advised():
    done = options(micro_batches=96, activation_checkpointing=True)
    with pytest.raises(OutOfMemory) as caught, fitting(done):
        raise torch.OutOfMemoryError("full")
    assert "Try in this order: a train.batch below 96" in str(caught.value)
    assert "micro_batches=" not in str(caught.value)


def test_other_errors_pass_as_they_are():
    with pytest.raises(RuntimeError, match=r"^shapes$"), fitting(options()):
        raise RuntimeError("shapes")


def test_a_run_ends_with_the_advice(settings, monkeypatch):
    def forward(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(DualEncoder, "forward", forward)
    with pytest.raises(OutOfMemory, match=r"train\.micro_batches="):
        train(settings("data.workers=0"))
