"""Every kind of model behind the one interface: equal to the library's own embeddings, and refused
with a reason.
"""

import json
import shutil

import pytest
import torch

from tests.eval import material
from vlp.eval import models
from vlp.eval.models import ModelError

SENTENCES = ["a photo of a cat", "Two dogs, & a café!", "", "word " * 100]


@pytest.fixture(scope="module")
def photos():
    rows = material.read_jsonl(material.shared("coco_open.jsonl"))[:3]
    pictures = material.members_of(material.shared("coco_open.tar"), [r["image"] for r in rows])
    from vlp.eval.pictures import Picture

    return [Picture(name, data=data).open() for name, data in pictures.items()]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return material.tiny_open_clip(tmp_path_factory.mktemp("models") / "tiny")


def unit(rows):
    return torch.nn.functional.normalize(rows.detach().float(), dim=-1)


def test_an_open_clip_folder_embeds_as_open_clip_does(tiny, photos):
    import open_clip

    encoder = models.load(f"local-dir:{tiny}")
    model, _, transform = open_clip.create_model_and_transforms(f"local-dir:{tiny}")
    model.eval()
    tokens = open_clip.get_tokenizer(f"local-dir:{tiny}")(SENTENCES)
    image, text = encoder.encode_images(photos), encoder.encode_texts(SENTENCES)
    with torch.no_grad():  # as encoders do; with gradients torch takes other kernels
        assert torch.equal(
            image, unit(model.encode_image(torch.stack([transform(p) for p in photos])))
        )
        assert torch.equal(text, unit(model.encode_text(tokens)))
    assert encoder.scale == pytest.approx(1 / 0.07, rel=1e-5)
    # A folder needs no prefix.
    assert torch.equal(models.load(str(tiny)).encode_images(photos), image)
    half = models.load(str(tiny), autocast=torch.bfloat16).encode_images(photos)
    assert 1e-7 < (half - image).abs().max() < 0.05


def test_the_fingerprint_depends_on_weights_and_preprocessing_alone(tiny, tmp_path):
    first = models.load(str(tiny)).fingerprint
    assert models.load(str(shutil.copytree(tiny, tmp_path / "copy"))).fingerprint == first
    assert (
        models.load(str(material.tiny_open_clip(tmp_path / "other", seed=1))).fingerprint != first
    )
    config = json.loads((tmp_path / "copy/open_clip_config.json").read_text())
    config["preprocess_cfg"]["resize_mode"] = "squash"
    (tmp_path / "copy/open_clip_config.json").write_text(json.dumps(config))
    assert models.load(str(tmp_path / "copy")).fingerprint != first


def word_tokenizer(folder, kind):
    """A small tokenizer on disk, of letters."""
    from tokenizers import Tokenizer, pre_tokenizers, processors
    from tokenizers import models as pieces
    from transformers import PreTrainedTokenizerFast

    letters = {c: i + 3 for i, c in enumerate("abcdefghijklmnopqrstuvwxyz ")}
    tokenizer = Tokenizer(
        pieces.WordLevel(
            {"<pad>": 0, "<s>": 1, "<unk>": 2, **letters, "</s>": 30}, unk_token="<unk>"
        )
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 30)]
    )
    inputs = ["input_ids"] if kind == "siglip" else ["input_ids", "attention_mask"]
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        model_input_names=inputs,
    )
    fast.save_pretrained(folder)


def tiny_transformers(folder, kind):
    import transformers as hf

    size = {
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }
    text, vision = (
        {**size, "vocab_size": 31, "max_position_embeddings": 12},
        {**size, "image_size": 16, "patch_size": 8},
    )
    torch.manual_seed(0)
    if kind == "clip":
        text |= {"eos_token_id": 30, "bos_token_id": 1, "pad_token_id": 0}
        model = hf.CLIPModel(
            hf.CLIPConfig(text_config=text, vision_config=vision, projection_dim=8)
        )
        processor = hf.CLIPImageProcessor(
            size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16}
        )
    else:
        model = hf.SiglipModel(hf.SiglipConfig(text_config=text, vision_config=vision))
        processor = hf.SiglipImageProcessor(size={"height": 16, "width": 16})
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    word_tokenizer(folder, kind)
    return folder


@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_a_transformers_folder_embeds_as_the_whole_model_scores(kind, photos, tmp_path):
    """Cosines against the logits that the model's own forward pass gives for its own processors'
    output.
    """
    from transformers import AutoImageProcessor, AutoModel, AutoTokenizer

    folder = str(tiny_transformers(tmp_path / kind, kind))
    encoder = models.load(folder)
    model = AutoModel.from_pretrained(folder).eval()
    pixels = AutoImageProcessor.from_pretrained(folder)(images=photos, return_tensors="pt")
    padding = {"padding": "max_length", "truncation": True, "max_length": 12}
    tokens = AutoTokenizer.from_pretrained(folder)(SENTENCES, **padding, return_tensors="pt")
    with torch.no_grad():
        output = model(**pixels, **{k: tokens[k] for k in encoder_inputs(kind)})
    logits = output.logits_per_image - (model.logit_bias if kind == "siglip" else 0)
    cosines = encoder.encode_images(photos) @ encoder.encode_texts(SENTENCES).T
    assert torch.allclose(cosines * encoder.scale, logits, atol=1e-5)
    assert encoder.fingerprint == models.load(folder).fingerprint


def encoder_inputs(kind):
    return ["input_ids"] if kind == "siglip" else ["input_ids", "attention_mask"]


def test_a_model_without_its_tokenizer_is_refused(tmp_path):
    folder = tiny_transformers(tmp_path / "clip", "clip")
    for file in folder.glob("token*"):
        file.unlink()
    with pytest.raises(
        ModelError, match=r"tokenizer of .* (is missing|has no vocabulary).*tokenizer\.json"
    ):
        models.load(str(folder))


@pytest.mark.parametrize(
    ("ref", "message"),
    [
        ("ViT-B-32", r"architecture without weights; write ViT-B-32:TAG \(known: .*openai"),
        (
            "ViT-B-32:no_such_tag",
            "ViT-B-32 has no weights 'no_such_tag': no such file, and no tag; known: .*openai",
        ),
        ("no-such-model", "no model 'no-such-model'"),
        ("runs/none/export", "no model 'runs/none/export': no such file or folder"),
        ("local-dir:/nowhere", "no folder /nowhere. What works: a run or checkpoint"),
    ],
)
def test_a_reference_that_is_no_model_is_refused(ref, message):
    with pytest.raises(ModelError, match=message):
        models.load(ref)


def test_a_folder_that_is_no_model_is_refused(tmp_path):
    with pytest.raises(
        ModelError, match=r"is no model: it holds nothing. What works: a run or checkpoint"
    ):
        models.load(str(tmp_path))
    from transformers import BertConfig, BertModel

    size = {
        "hidden_size": 8,
        "intermediate_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 1,
        "vocab_size": 9,
    }
    BertModel(BertConfig(**size)).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=r"transformers cannot load|needs a dual encoder"):
        models.load(str(tmp_path))


def test_our_own_model_embeds_as_its_towers_do(photos):
    """In memory, as the training loop hands it over: uint8 pixels and its own tokenizer."""
    from vlp.data import decode
    from vlp.data import text as tokenizers

    model = material.our_model().eval()
    encoder = models.from_model(model, keep=True)
    pixels = torch.stack([decode.eval_transform(p, model.image_spec) for p in photos])
    assert pixels.dtype == torch.uint8
    assert torch.allclose(
        encoder.encode_images(photos), unit(model.encode_image(pixels)), atol=1e-6
    )
    ids = tokenizers.build(model.text_spec)(SENTENCES)
    assert torch.allclose(encoder.encode_texts(SENTENCES), unit(model.encode_text(ids)), atol=1e-6)
    assert encoder.fingerprint != "" and models.from_model(model).fingerprint == ""


def test_a_run_a_checkpoint_and_an_export_embed_alike(photos, tmp_path):
    from vlp import checkpoint, config
    from vlp.export.folder import export_run

    model = material.our_model().eval()
    written = config.dump(config.parse(material.OUR_CONFIG))
    state = checkpoint.Contents(
        model.state_dict(), {}, config=written, description=model.description()
    )
    saved = checkpoint.save(tmp_path / "run", 1, state, keep=1)
    memory = models.from_model(model, keep=True)
    image, text = memory.encode_images(photos), memory.encode_texts(SENTENCES)
    for ref in (tmp_path / "run", saved):
        encoder = models.load(str(ref))
        assert encoder.fingerprint == memory.fingerprint
        assert torch.equal(encoder.encode_images(photos), image) and torch.equal(
            encoder.encode_texts(SENTENCES), text
        )
    export_run(tmp_path / "run", tmp_path / "export")
    exported = models.load(str(tmp_path / "export"))
    assert torch.allclose(exported.encode_images(photos), image, atol=1e-5)
    assert torch.allclose(exported.encode_texts(SENTENCES), text, atol=1e-5)
    assert exported.scale == pytest.approx(memory.scale)


def test_weights_of_the_other_activation_are_refused(tmp_path, monkeypatch):
    """Both ways, as training refuses them; open_clip only warns, and every score would be wrong."""
    import open_clip.pretrained

    tags = {"quick": {"file": "none", "quick_gelu": True}, "plain": {"file": "none"}}
    for architecture in ("ViT-S-32-alt", "ViT-B-32-quickgelu", "ViT-B-32"):
        monkeypatch.setitem(open_clip.pretrained._PRETRAINED, architecture, tags)
    cases = {
        "ViT-S-32-alt:quick": "'quick' were trained with quick GELU, and this model has GELU; "
        "use an architecture with quick GELU",
        "ViT-B-32:quick": "use architecture ViT-B-32-quickgelu",
        "ViT-B-32-quickgelu:plain": "'plain' were trained with GELU, and this model has quick "
        "GELU; use architecture ViT-B-32",
    }
    for reference, message in cases.items():
        with pytest.raises(ModelError, match=message):
            models.load(reference)
    assert len(cases) == 3


def test_truncated_texts_are_counted_by_every_kind_of_encoder(tiny, tmp_path):
    from vlp.eval import embed

    long = ["word " * 100, "a " * 76, "short", ""]  # begin and end take two of the 77
    folders = {
        "open_clip": str(tiny),
        "transformers": str(tiny_transformers(tmp_path / "clip", "clip")),
    }
    assert models.load(folders["open_clip"]).n_truncated(long) == 2
    # 12 with begin and end.
    assert models.load(folders["transformers"]).n_truncated(["abcdefghijk", "abcdefghij", "a"]) == 1
    assert models.from_model(material.our_model().eval()).n_truncated(long) == 2
    encoder, context = models.load(folders["open_clip"]), embed.Context(cache=tmp_path / "cache")
    for _ in range(2):  # computed, then kept
        context.readings.clear()
        embed.texts(encoder, [*long, long[0]], context)
        assert [reading.n_truncated for reading in context.readings.values()] == [2]


def test_a_record_tells_of_truncated_texts(tiny, tmp_path):
    from vlp import plugin
    from vlp.eval import embed, evaluation

    samples = [
        (material.png(material.picture(i)), ["a dog " * (60 if i == 1 else 1) + str(i)])
        for i in range(3)
    ]
    root = material.clip_benchmark_set(tmp_path / "set", samples, n_shards=1)
    tasks = plugin.keyed("vlp.eval.tasks", {"retrieval": {"data": str(root)}})
    (record,), _ = evaluation.evaluate(models.load(str(tiny)), tasks, embed.Context())
    assert record["counts"]["truncated_texts"] == 1


def test_an_open_clip_folder_without_weights_is_not_evaluated_at_random(tiny, tmp_path):
    (tmp_path / "open_clip_config.json").write_text((tiny / "open_clip_config.json").read_text())
    message = (
        r"holds no weights: it holds open_clip_config.json; expected open_clip_model.safetensors"
    )
    with pytest.raises(ModelError, match=message):
        models.load(str(tmp_path))
