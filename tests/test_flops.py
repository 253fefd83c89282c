"""FLOPs of the towers, counted over shapes, and what passes the towers of a step."""

import pytest
import torch

from tests.eval import coca
from tests.models.tiny import language_model, tiny
from tests.test_step import NEGATIVES, make_batch, make_training, negatives_batch, own_rows
from vlp import flops, passes
from vlp.models import freezing


def multiply_adds(width, n_tokens, layers):
    """Products of a transformer's forward pass: four of width², an MLP of 8, scores and values."""
    return layers * (12 * n_tokens * width**2 + 2 * n_tokens**2 * width)


def test_a_vision_transformer_is_counted_as_by_hand():
    model = tiny()
    options = model.open_clip_config["vision_cfg"]
    width, layers, patch = options["width"], options["layers"], options["patch_size"]
    n_patches = (model.image_spec.size[0] // patch) ** 2

    products = multiply_adds(width, n_patches + 1, layers)
    products += n_patches * 3 * patch**2 * width + width * model.embed_dim
    counted = flops.of_towers(model).picture
    # Twice that forward, and twice as much backward, but for the gradient of the pixels.
    expected = 6 * products - 2 * n_patches * 3 * patch**2 * width
    assert counted == pytest.approx(expected, rel=0.02)


def test_what_is_locked_has_no_backward_pass():
    model = tiny()
    whole = flops.of_towers(model)
    freezing.lock(model, image=True)
    locked = flops.of_towers(model)
    assert 2.8 < whole.picture / locked.picture < 3.1
    assert locked.token == whole.token


@pytest.mark.parametrize("pool", ["shared", "cascade"])
def test_queries_of_an_attentional_pool_are_counted(pool, tmp_path):
    """Whose layers read parameters, which torch's counter takes for inputs."""
    towers = coca.section(tmp_path)
    towers["image_tower"]["attentional_pool"] = pool
    model = tiny(**towers)
    counted = flops.of_towers(model)
    assert counted.picture > multiply_adds(32, 5, 1) and counted.token > 0
    assert all(parameter.grad is None for parameter in model.parameters())


def test_counting_moves_neither_weights_nor_random_numbers(tmp_path):
    text = {"name": "huggingface", "model": str(language_model(tmp_path)), "pretrained": False}
    model = tiny(text_tower=text | {"context_length": 12}).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)

    counted = flops.of_towers(model)
    assert counted.picture > 0 and counted.token > 0
    assert torch.rand(2).equal(expected) and model.training
    assert all(value.equal(before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize(
    ("device", "dtype", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", torch.bfloat16, 989e12),
        ("NVIDIA H100 PCIe", torch.bfloat16, 756e12),
        ("NVIDIA A100-SXM4-80GB", torch.float32, 19.5e12),
        ("NVIDIA L40S", torch.bfloat16, 362e12),
        ("NVIDIA L4", torch.bfloat16, 121e12),
        ("NVIDIA L4", torch.float32, None),
        ("a device of tomorrow", torch.bfloat16, None),
    ],
)
def test_a_peak_is_that_of_the_device_or_none(monkeypatch, device, dtype, peak):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: device)
    assert flops.peak_flops(torch.device("cuda"), dtype) == peak
    assert flops.peak_flops(torch.device("cpu"), dtype) is None


def test_utilisation_is_the_share_of_the_peak():
    busy = flops.Utilisation(flops.TowerFlops(picture=4e9, token=1e8), peak=1e12)
    assert busy.mfu(pictures_s=100, text_tokens_s=1000) == pytest.approx(0.5)


@pytest.mark.parametrize("micro_batches", [1, 2])
def test_captions_count_by_the_tokens_that_pass_their_tower(micro_batches):
    training = make_training(micro_batches, objective={"infonce": {}})
    model = training.engine.model
    batch = make_batch(own_rows())
    seen = []
    model.text.register_forward_pre_hook(lambda _, args: seen.append(args[0].numel()))

    parts = batch.split(micro_batches)
    counted = {name: value.item() for name, value in passes.passed(training, parts).items()}
    for part in parts:
        passes.embed_by(training, model, part)
    assert counted == {"pictures": 12, "text_tokens": sum(seen)}


def test_masked_rows_pass_no_tower_and_do_not_count():
    training = make_training(objective=NEGATIVES)
    model = training.engine.model
    batch = negatives_batch(own_rows())
    pictures, tokens = [], []
    model.visual.register_forward_pre_hook(lambda _, args: pictures.append(len(args[0])))
    model.text.register_forward_pre_hook(lambda _, args: tokens.append(args[0].numel()))

    counted = {name: value.item() for name, value in passes.passed(training, [batch]).items()}
    passes.embed_by(training, model, batch)
    assert counted == {"pictures": sum(pictures), "text_tokens": sum(tokens)}
