"""A multimodal language model as both towers: what transformers itself gives of pictures and
captions in their prompts, by one set of weights.
"""

import copy
import os
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from tests import ranks
from tests.models import languages
from tests.models.multimodals import FAMILIES, PROMPTS, SIZE, multimodal_model, tower
from tests.models.tiny import TEXT, VIT, inputs, settings, tiny
from tests.test_step import (
    ROWS,
    assert_close,
    gradients_and_weights,
    make_batch,
    make_training,
)
from vlp import checkpoint, flops
from vlp.data import text as tokenizers
from vlp.data.prompted import PADDING
from vlp.eval import models
from vlp.export.folder import export, export_run
from vlp.export.place import ExportError
from vlp.step import train_step

TEXTS = ["two red circles", "dog", "a blue square cat"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A folder of each family, made once."""
    return {name: multimodal_model(tmp_path_factory.mktemp(name), name) for name in FAMILIES}


def pictures(n=3):
    draw = np.random.default_rng(0)
    return [Image.fromarray(draw.integers(0, 256, (SIZE, SIZE, 3), np.uint8)) for _ in range(n)]


@pytest.mark.parametrize("family", FAMILIES)
def test_transformers_itself_gives_the_embeddings(folders, family):
    from transformers import AutoModel, AutoProcessor

    model = tiny(**tower(folders[family]))
    theirs = AutoModel.from_pretrained(folders[family]).eval()
    processor = AutoProcessor.from_pretrained(folders[family])
    n_compared = 0

    # Each alone, through the processor as a whole.
    token = "<|vision_start|><|image_pad|><|vision_end|>" if family != "llava" else "<image>"
    prompt = PROMPTS["prompt_image"].replace("{}", token)
    for picture in pictures():
        pixels = torch.from_numpy(np.array(picture)).permute(2, 0, 1)[None]
        read = processor(images=picture, text=prompt, return_tensors="pt")
        with torch.no_grad():
            expected = theirs(**read, use_cache=False).last_hidden_state[:, -1]
            found = model.encode_image(pixels)
        torch.testing.assert_close(found, F.normalize(expected, dim=1), rtol=0, atol=2e-5)
        n_compared += 1

    ids = tokenizers.build(model.text_spec)(TEXTS)
    for row, text in zip(ids, TEXTS):
        read = processor.tokenizer(PROMPTS["prompt_text"].format(text), return_tensors="pt")
        with torch.no_grad():
            expected = theirs(**read, use_cache=False).last_hidden_state[:, -1]
            found = model.encode_text(row[None])
        torch.testing.assert_close(found, F.normalize(expected, dim=1), rtol=0, atol=2e-5)
        n_compared += 1
    assert n_compared == 6

    # Pictures differ, and so do captions.
    assert model.encode_text(ids).std(0).max() > 0.01


@pytest.mark.parametrize("family", FAMILIES)
def test_frames_of_a_video_are_read_as_pictures_in_their_prompt(folders, family):
    model = tiny(**tower(folders[family]), heads={"modalities": {"video": {"frames": {"n": 2}}}})
    images, texts = inputs(model)
    lengths = torch.arange(len(images)).clamp(max=2).unsqueeze(1)
    places = [2 * i + k for i, n in enumerate(lengths[:, 0].tolist()) for k in range(n)]
    frames = images.flip(0).repeat(2, 1, 1, 1)[: len(places)]
    features = model(
        image=images,
        text=texts,
        modalities=torch.zeros(len(images), 0),
        modality_lengths=lengths,
        frames=frames,
        frame_places=torch.tensor(places),
    )

    # The mean of its frames' embeddings, at the start; a video of one frame is that picture.
    alone = model.encode_image(frames)
    one, two = alone[:1], F.normalize(alone[1:3].mean(0, keepdim=True), dim=1)
    expected = torch.cat([one, two])
    torch.testing.assert_close(features.others[1:3, 0], expected, rtol=0, atol=2e-5)
    torch.testing.assert_close(features.image, model.encode_image(images), rtol=0, atol=2e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_both_towers_are_one_set_of_weights(folders, family):
    model = tiny(**tower(folders[family])).train()
    names = [name for name, _ in model.named_parameters()]
    assert not [name for name in names if name.startswith("text.")]
    assert len(model.blocks()) == 4  # of the picture's part and of the language model, each once

    # What learns has a gradient: DDP would wait for the others for ever.
    features = model(*inputs(model))
    (features.scale * (features.image * features.text).sum()).backward()
    without = [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert without == []
    unread = [name for name, p in model.named_parameters() if not p.requires_grad]
    assert all(".post_layernorm." in name or ".layers.1." in name for name in unread)
    assert bool(unread) == (family == "llava")

    # A caption alone moves the weights that read pictures, too; also in a copy.
    for one in (model, copy.deepcopy(model)):
        one.zero_grad()
        one(text=inputs(one)[1]).text.sum().backward()
        moved = {name for name, p in one.named_parameters() if p.grad is not None}
        assert moved and all(name.startswith("visual.model.language_model.") for name in moved)


def test_adapters_of_the_model_reach_both_sides(folders):
    for family in FAMILIES:
        model = tiny(**tower(folders[family], lora={"r": 2})).train()
        learning = [name for name, p in model.named_parameters() if p.requires_grad]
        assert learning and all(".lora_" in name or "scaling." in name for name in learning)
        pixels, ids = inputs(model)
        before = model.encode_image(pixels), model.encode_text(ids)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "language_model" in name and ".lora_B." in name:
                    parameter.normal_()
        after = model.encode_image(pixels), model.encode_text(ids)
        assert all((a - b).abs().max() > 1e-3 for a, b in zip(after, before))


def pairs_batch(rows=slice(None)):
    """Pictures of the model's size, and ids of different lengths in place of CLIP's."""
    batch = make_batch(rows)
    lengths = torch.arange(ROWS)[rows] % 9 + 3
    ids = torch.arange(16).expand(len(lengths), 16) * 5 + lengths[:, None]
    ids = (ids % 14).masked_fill(torch.arange(16) >= lengths[:, None], PADDING)
    return replace(batch, image=batch.image.repeat(1, 1, 2, 2), text=ids)


def gradients(folder, micro_batches, lora=None, **options):
    whole = settings(**tower(folder, lora=lora), bias=-2.0)
    return gradients_and_weights(micro_batches, steps=1, batch=pairs_batch, whole=whole, **options)


@pytest.mark.slow
def test_micro_batches_and_ranks_change_nothing(folders):
    n_compared = 0
    for family in FAMILIES:
        expected = gradients(folders[family], 1)[0]
        others = [gradients(folders[family], 4)[0]]
        for of_rank in ranks.run(2, on_two, folders[family]):
            others += of_rank
        for other in others:
            assert_close(other, expected, 2e-5)
            n_compared += 1
    assert n_compared == 2 * 5


def on_two(folder):
    """Of DDP, and of FSDP2 with activations computed again."""
    return [
        gradients(folder, 3)[0],
        gradients(folder, 3, engine="fsdp2", checkpointing=True)[0],
    ]


def adapted_on_two(folder, engines):
    # DeepSpeed looks for ninja.
    os.environ["PATH"] = os.path.dirname(sys.executable) + os.pathsep + os.environ["PATH"]
    return [
        gradients(folder, 3, {"r": 2}, engine=engine, double=not engine.startswith("zero"))[0]
        for engine in engines
    ]


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    "engines", [("ddp", "fsdp2"), ("zero1",), ("zero2",), ("zero3",)], ids="+".join
)
def test_adapters_have_the_same_gradients_by_every_engine(folders, engines, family):
    expected = gradients(folders[family], 1, {"r": 2}, double="ddp" in engines)[0]
    assert sum(any(values) for values in expected.values()) > 10
    n_compared = 0
    # DeepSpeed starts once a process, so that each of its stages has ranks of its own.
    for of_rank in ranks.run(2, adapted_on_two, folders[family], engines):
        for of_engine in of_rank:
            assert_close(of_engine, expected, 2e-5)
            n_compared += 1
    assert n_compared == 2 * len(engines)


def test_a_moving_average_is_a_model_of_its_own(folders):
    training = make_training(1, whole=settings(**tower(folders["llava"]), bias=-2.0), double=False)
    start = {name: value.clone() for name, value in training.engine.module.state_dict().items()}
    average = training.engine.average()
    train_step(training, pairs_batch())
    training.engine.follow(average, 0.25, torch.tensor(True))

    now = training.engine.module.state_dict()
    expected = {name: value.lerp(now[name], 0.75) for name, value in start.items()}
    moved = [name for name, value in start.items() if not torch.equal(value, now[name])]
    assert len(moved) > 20
    for name, value in average.state_dict().items():
        torch.testing.assert_close(value, expected[name], rtol=0, atol=1e-6)

    # Captions pass the average's language model, not the one that learns.
    fresh = tiny(**tower(folders["llava"]), bias=-2.0)
    fresh.load_state_dict(expected)
    batch = pairs_batch()
    for side in ("image", "text"):
        rows = [getattr(one(**{side: getattr(batch, side)}), side) for one in (average, fresh)]
        torch.testing.assert_close(*rows, rtol=0, atol=1e-5)
        of_learner = getattr(training.engine.module.eval()(**{side: getattr(batch, side)}), side)
        assert (of_learner - rows[0]).abs().max() > 1e-4


@pytest.mark.parametrize("family", FAMILIES)
def test_an_export_in_half_the_bytes_keeps_the_embeddings(folders, family, tmp_path):
    model = tiny(**tower(folders[family]))
    sizes = {}
    for dtype in ("float32", "bf16"):
        export(model, tmp_path / dtype, dtype=dtype)
        sizes[dtype] = sum(
            path.stat().st_size for path in (tmp_path / dtype).rglob("*.safetensors")
        )
    assert sizes["bf16"] < 0.6 * sizes["float32"]

    pixels, ids = inputs(model)
    loaded = checkpoint.load_any(str(tmp_path / "bf16")).eval()
    for own, narrow in (
        (model.encode_image(pixels), loaded.encode_image(pixels)),
        (model.encode_text(ids), loaded.encode_text(ids)),
    ):
        assert narrow.dtype == torch.float32
        cosines = (own * narrow).sum(dim=1)
        assert cosines.min() > 0.99 and not torch.equal(own, narrow)


@pytest.mark.parametrize("family", FAMILIES)
def test_it_loads_again_without_its_source(folders, family, tmp_path, monkeypatch):
    source = multimodal_model(tmp_path / "a model", family)
    model = tiny(**tower(source))
    encoder = models.from_model(model)
    expected = encoder.encode_texts(TEXTS), model.encode_image(inputs(model)[0])

    contents = checkpoint.Contents(
        model.state_dict(), {}, config="a: b", description=model.description()
    )
    checkpoint.save(tmp_path / "run", 1, contents, keep=1)
    export_run(tmp_path / "run", tmp_path / "an export")
    os.rename(source, tmp_path / "gone")
    os.rename(tmp_path / "an export", tmp_path / "moved")

    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    loaded = models.load("../moved")
    torch.testing.assert_close(loaded.encode_texts(TEXTS), expected[0], rtol=0, atol=1e-6)
    images = loaded.encode_images(inputs(model)[0])
    torch.testing.assert_close(images, expected[1], rtol=0, atol=1e-6)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_adapter_learns(folders, family):
    """Not one of a layer whose outputs LLaVA drops: DDP would wait for its gradient."""
    model = tiny(**tower(folders[family], lora={"r": 2})).train()
    features = model(*inputs(model))
    (features.scale * (features.image * features.text).sum()).backward()
    learning = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert len(learning) > 20
    assert [name for name, p in learning.items() if p.grad is None] == []


@pytest.mark.parametrize("family", FAMILIES)
def test_flops_are_counted_of_values_where_shapes_do_not_do(folders, family):
    model = tiny(**tower(folders[family])).train()
    counted = flops.of_towers(model)
    # Six products a weight that a token passes, at the least.
    n_weights = sum(p.numel() for p in model.visual.model.language_model.layers.parameters())
    assert counted.picture > 6 * n_weights * len(model.visual.ids)
    assert counted.token > 6 * n_weights and model.training
    assert all(parameter.grad is None for parameter in model.parameters())


BAD = {
    "a size that its vision tower does not read": ({"image_size": 64}, "picture of 64 pixels.*set"),
    "no place for the picture": ({"prompt_image": "a photo"}, "expected one {} where the picture"),
    "no place for the caption": ({"prompt_text": "{} {}"}, "expected one {} where the caption"),
    "words that it does not know": ({"prompt_image": "{} zebra"}, "does not know 'zebra'"),
    "words around captions": (
        {"prompt_text": "two {} zebra"},
        "does not know 'zebra' of the prompt",
    ),
    "another width": ({"embed_dim": 48}, "gives 32 features, unprojected, and embed_dim is 48"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_cannot_be_is_refused(folders, case):
    options, said = BAD[case]
    section = tower(folders["llava"])
    section["embed_dim"] = options.pop("embed_dim", None)
    section["image_tower"] |= options
    with pytest.raises(ValueError, match=said):
        tiny(**section)


@pytest.mark.parametrize("side", ["image", "text", "both"])
def test_another_tower_beside_it_is_refused(folders, side):
    one_model = tower(folders["llava"])["image_tower"]
    beside = {
        "image": {"image_tower": one_model, "text_tower": TEXT},
        "text": {"image_tower": VIT, "text_tower": one_model},
        "both": {"image_tower": one_model, "text_tower": one_model},
    }
    with pytest.raises(ValueError, match=r"is one model for pictures and texts.*text_tower: null"):
        tiny(**beside[side])


def test_a_language_model_alone_is_refused(tmp_path):
    folder = languages.language_model(tmp_path)
    with pytest.raises(ValueError, match=r"for texts or pictures alone.*text tower llm"):
        tiny(**tower(folder))


def test_other_forms_are_refused(folders, tmp_path):
    model = tiny(**tower(folders["llava"]))
    for options in ({"onnx": True}, {"image_size": 64}):
        with pytest.raises(ExportError):
            export(model, tmp_path / "out", **options)
        assert not (tmp_path / "out").exists()
