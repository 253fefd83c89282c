"""A language model as text tower gives one gradient: in micro-batches, on two ranks, sharded, with
activations computed again.
"""

from dataclasses import replace

import pytest
import torch

from tests import ranks
from tests.models.languages import language_model
from tests.test_step import ROWS, assert_close, gradients_and_weights, make_batch
from vlp.data.prompted import PADDING

TOLERANCE = 2e-5  # transformers norms in float32, also where the model is in float64


def texts_batch(rows=slice(None)):
    """Ids of different lengths, in place of CLIP's."""
    batch = make_batch(rows)
    lengths = torch.arange(ROWS)[rows] % 9 + 3
    ids = torch.arange(12).expand(len(lengths), 12) * 5 + lengths[:, None]
    ids = (ids % 14).masked_fill(torch.arange(12) >= lengths[:, None], PADDING)
    return replace(batch, text=ids)


def tower(folder, **options):
    adaptor = {"layers": 1, "width": 8}
    described = {"name": "llm", "model": str(folder), "context_length": 12, "adaptor": adaptor}
    return described | options


def gradients(text_tower, micro_batches, **options):
    return gradients_and_weights(
        micro_batches, steps=1, batch=texts_batch, text_tower=text_tower, **options
    )


def on_two(text_tower):
    """Of DDP, and of FSDP2 with activations computed again."""
    return [
        gradients(text_tower, 3)[0],
        gradients(text_tower, 3, engine="fsdp2", checkpointing=True)[0],
    ]


@pytest.mark.slow
def test_micro_batches_ranks_and_shards_change_nothing(tmp_path):
    n_compared = 0
    for family, options in (
        ("gemma3_text", {"pool": "latent", "latents": 4, "heads": 2, "attention": "bidirectional"}),
        ("gpt2", {"pool": "last"}),
    ):
        described = tower(language_model(tmp_path / family, family), **options)
        expected = gradients(described, 1)[0]
        assert all(any(values) for name, values in expected.items() if "adaptor" in name)
        others = [gradients(described, 4)[0]]
        for of_rank in ranks.run(2, on_two, described):
            others += of_rank
        for other in others:
            n_compared += assert_close(other, expected, TOLERANCE, absolute=1e-7)
    assert n_compared > 400
