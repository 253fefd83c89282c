"""Run by tests/test_fields.py on a copy to which docs/extend-field.md was applied: both fields from
the data to the gradient.
"""

import sys
from pathlib import Path

import torch

from vlp import config, fields, losses, schema
from vlp.checks import check_needs
from vlp.config import Data
from vlp.data.loader import Loader
from vlp.models.build import build
from vlp.models.embedding import embed
from vlp.schema import parse

N = 6
model_settings = {
    "image_tower": {"name": "vit", "width": 32, "layers": 1, "head_width": 16}
    | {"patch_size": 8, "image_size": 16},
    "text_tower": {"name": "transformer", "width": 32, "layers": 1, "heads": 2}
    | {"context_length": 16},
    "embed_dim": 16,
}


def main(data: Path) -> None:
    objective = losses.build({"easy_first": {}, "titles": {}})
    sources = [{"name": "shards", "path": str(data)}]
    model = build(schema.parse(config.Model, model_settings))
    loader = Loader(
        parse(Data, {"sources": sources, "workers": 0}),
        model.image_spec,
        model.text_spec,
        batch=N,
        seed=0,
        reads=objective.reads,
    )
    check_needs(objective, loader.carries, model)
    batch = next(loader)

    # Data to batch.
    numbers = [int(key) for key in batch.key]
    assert batch.difficulty.tolist() == [i / 4 for i in numbers]
    assert batch.title.shape == batch.text.shape == (N, 16)
    assert batch.title_valid.tolist() == [i % 2 == 0 for i in numbers]

    # Batch to embeddings, in two micro-batches.
    parts = [embed(model, part, objective.needs | {"image", "text"}) for part in batch.split(2)]
    embedded = {
        name: torch.cat([part[name] for part in parts]) for name in ("image", "text", "title")
    }
    assert embedded["title"].shape == (N, 16)
    assert not embedded["title"][~batch.title_valid].any()

    # Embeddings to terms and gradients.
    carried = {name: getattr(batch, name) for name in fields.LABELS}
    total, terms = objective(
        **embedded,
        scale=parts[0]["scale"],
        **{name: value for name, value in carried.items() if value is not None},
    )
    cosines = (embedded["image"] * embedded["title"]).sum(1)[batch.title_valid]
    torch.testing.assert_close(terms["titles"], (1 - cosines).mean().detach())
    cosines = (embedded["image"] * embedded["text"]).sum(1)
    expected = ((-batch.difficulty).exp() * (1 - cosines)).mean().detach()
    torch.testing.assert_close(terms["easy_first"], expected)
    total.backward()
    assert all(p.grad.norm() > 0 for p in model.text.parameters() if p.grad is not None)
    assert model.text.token_embedding.weight.grad.norm() > 0
    print("label and text field: ok")


main(Path(sys.argv[1]))
