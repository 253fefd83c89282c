"""Images of hard negatives through the image tower: those that their mask leaves in, each in its
place.
"""

from __future__ import annotations

import torch

from vlp import config, schema
from vlp.models.build import build
from vlp.models.embedding import embed
from vlp.types import Batch

B, J, SIDE = 4, 3, 16
MODEL = {
    "image_tower": {"name": "vit", "width": 32, "layers": 1, "head_width": 16}
    | {"patch_size": 8, "image_size": SIDE},
    "text_tower": {"name": "transformer", "width": 32, "layers": 1, "heads": 2}
    | {"context_length": 8},
    "embed_dim": 16,
}


def test_pictures_are_embedded_where_their_mask_leaves_them_in():
    torch.manual_seed(0)
    model = build(schema.parse(config.Model, MODEL)).eval()
    images = torch.randint(0, 256, (B, J, 3, SIDE, SIDE), dtype=torch.uint8)
    valid = torch.tensor([[1, 1, 1], [0, 0, 0], [1, 0, 1], [0, 0, 1]]).bool()
    batch = Batch(
        image=torch.randint(0, 256, (B, 3, SIDE, SIDE), dtype=torch.uint8),
        text=torch.randint(1, 100, (B, 8)),
        sample_id=torch.arange(B),
        key=["k"] * B,
        negative_images=images,
        negative_images_valid=valid,
    )

    n_rows = []
    model.visual.register_forward_hook(lambda module, given, out: n_rows.append(len(given[0])))
    embedded = embed(model, batch, {"image", "text", "negative_images"})
    rows = embedded["negative_images"]
    assert n_rows == [B + 6] and rows.shape == (B, J, 16)
    assert not rows[~valid].any()

    # Each as if it stood alone.
    for i, j in valid.nonzero().tolist():
        alone = model(images[i, j][None], None).image[0]
        assert torch.allclose(rows[i, j], alone, atol=1e-6)
    assert torch.allclose(embedded["image"], model(batch.image, None).image, atol=1e-6)
