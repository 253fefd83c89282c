"""Running statistics count every row once, in the two passes of a step."""

import torch

from tests.models.tiny import inputs, tiny


def test_statistics_move_with_the_pass_that_keeps_a_graph():
    model = tiny(image_tower={"name": "timm", "model": "test_resnet", "image_size": 64}).train()
    pixels, _ = inputs(model)
    counted = model.visual.trunk.bn1.num_batches_tracked

    with torch.no_grad():
        first = model(image=pixels).image
    assert counted.item() == 0
    second = model(image=pixels).image
    assert counted.item() == 1 and torch.equal(first, second)

    # Evaluation reads the statistics, which are not those of the batch.
    assert not torch.equal(model.eval()(image=pixels).image, first)
    assert counted.item() == 1
