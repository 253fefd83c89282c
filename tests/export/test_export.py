"""What an exported folder holds: the same model for every library, the tokenizer and preprocessing,
the results.
"""

import json
import os
import stat

import numpy as np
import open_clip
import pytest
import torch
import yaml
from open_clip.constants import OPENAI_DATASET_MEAN, OPENAI_DATASET_STD
from PIL import Image, ImageOps
from safetensors.torch import load_file

from tests.models.tiny import TEXT, VIT, inputs, language_model, siglip, tiny
from vlp import checkpoint
from vlp.data import decode
from vlp.eval import models
from vlp.export import clip_form, forms, licenses, place
from vlp.export.folder import export, export_run, export_stages
from vlp.export.pixels import sample_picture
from vlp.export.place import ExportError
from vlp.models.load import load

TOLERANCE = 1e-5  # of the issue: largest difference of a coordinate on the same pixels
RESNET = {"name": "timm", "model": "test_resnet", "image_size": 64}
CASES = {  # keys of the model section -> the transformers class the export loads as
    "gelu": ({}, "CLIPModel"),
    "quick gelu": (
        {"image_tower": VIT | {"quick_gelu": True}, "text_tower": TEXT | {"quick_gelu": True}},
        "CLIPModel",
    ),
    "odd sizes": (
        {
            "image_tower": VIT
            | {"width": 96, "head_width": 24, "layers": 3, "mlp_ratio": 2.5, "patch_size": 4},
            "text_tower": TEXT
            | {"width": 48, "heads": 3, "layers": 1, "context_length": 9, "mlp_ratio": 3.0},
            "embed_dim": 20,
        },
        "CLIPModel",
    ),
    "an open_clip architecture": (  # 40 million weights, written twice and read five times
        {
            "image_tower": {
                "name": "open_clip",
                "architecture": "ViT-S-32-alt",
                "image_size": 64,
                "context_length": 16,
            },
            "text_tower": None,
            "embed_dim": None,
        },
        "CLIPModel",
    ),
    "a bias": ({"bias": -4.0}, "CLIPModel"),
    "patch drop": ({"image_tower": VIT | {"patch_dropout": 0.5}}, "CLIPModel"),
    "mean pooling": ({"image_tower": VIT | {"pool": "avg"}}, None),
    "a timm tower": ({"image_tower": RESNET}, None),
    "siglip": ("siglip", "SiglipModel"),
    "siglip without bias": ("siglip", "SiglipModel"),
}

SENTENCES = [
    "a photo of a cat",
    "A PHOTO of two  DOGS!",
    "it's the dogs' 3 red-ish circles",
    "naïve café, 12½ €",
    "日本語 и русский",
    "tabs\tand\nnewlines",
    "",
    "under_score (brackets) [x] {y} #1 @home 50%",
    "e\u0301 combining",
    "🙂 smile",
    "we'll they're I'd don't",
    "one 2 three 44 555",
    "a" * 40,
    "word " * 40,
]
# As the card says.
REPAIRED_BY_OPEN_CLIP = [
    "a cat&apos;s caf&eacute;",
    "a dog’s “ball”",
    "ｆｕｌｌ ｗｉｄｔｈ",
    "cafÃ©",
]


def make(case, folder):
    keys, _ = CASES[case]
    if keys == "siglip":
        keys = {"image_tower": siglip(folder), "text_tower": None, "embed_dim": None}
        keys |= {} if case == "siglip without bias" else {"bias": -10.0}
    return tiny(**keys)


@pytest.mark.parametrize(
    "case", [pytest.param(c, marks=pytest.mark.slow if "architecture" in c else ()) for c in CASES]
)
def test_every_library_gives_the_models_embeddings(case, tmp_path):
    from transformers import AutoModel

    model, expected = make(case, tmp_path), CASES[case][1]
    with torch.no_grad():
        model.logit_scale.fill_(2.0)
    notes = export(model, tmp_path / "out")
    pixels, ids = inputs(model, rows=5)
    normalised = model.pixels(pixels)
    with torch.no_grad():
        ours = model(pixels, ids)
        again = load(tmp_path / "out").eval()(pixels, ids)
        assert torch.equal(ours.image, again.image) and torch.equal(ours.text, again.text)
        assert torch.equal(ours.scale, again.scale) and (
            ours.bias is None or torch.equal(ours.bias, again.bias)
        )

        theirs = open_clip.create_model(f"local-dir:{tmp_path / 'out'}", output_dict=True).eval()(
            normalised, ids
        )
        assert (theirs["image_features"] - ours.image).abs().max() <= TOLERANCE
        assert (theirs["text_features"] - ours.text).abs().max() <= TOLERANCE
        assert theirs["logit_scale"].item() == pytest.approx(ours.scale.item())
        assert ("logit_bias" in theirs) == (ours.bias is not None)

        if expected is None:
            assert not (tmp_path / "out/config.json").exists()
            assert any(note.startswith("transformers: no CLIPModel, because ") for note in notes)
            return
        network = AutoModel.from_pretrained(tmp_path / "out").eval()
        assert type(network).__name__ == expected
        theirs = network(input_ids=ids, pixel_values=normalised)
    assert (theirs.image_embeds - ours.image).abs().max() <= TOLERANCE
    assert (theirs.text_embeds - ours.text).abs().max() <= TOLERANCE
    logits = ours.scale * ours.image @ ours.text.T
    if expected == "SiglipModel" and ours.bias is not None:
        logits = logits + ours.bias
    torch.testing.assert_close(theirs.logits_per_image, logits, rtol=1e-4, atol=1e-4)


def test_a_language_model_tower_loads_again_without_its_source(tmp_path, monkeypatch):
    text = {
        "name": "huggingface",
        "model": str(language_model(tmp_path / "bert")),
        "context_length": 12,
        "pretrained": False,
    }
    model = tiny(text_tower=text)
    expected = models.from_model(model).encode_texts(["two red circles", "a dog"])
    contents = checkpoint.Contents(
        model.state_dict(), {}, config="out: run", description=model.description()
    )
    checkpoint.save(tmp_path / "run", 1, contents, keep=1)
    export_stages([tmp_path / "run"] * 2, tmp_path / "stages")
    notes = export_run(tmp_path / "run", tmp_path / "out")
    os.rename(tmp_path / "bert", tmp_path / "gone")
    _, ids = inputs(model)
    assert torch.equal(load(tmp_path / "out").eval()(text=ids).text, model(text=ids).text)
    assert not any(
        str(tmp_path / "bert") in path.read_text() for path in (tmp_path / "out").glob("*.json")
    )
    assert not any(
        str(tmp_path) in text for text in (*notes, (tmp_path / "out/README.md").read_text())
    )
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")  # from any working directory, by any reference
    encoders = [
        models.load(str(tmp_path / "out")),
        models.load("../out"),
        models.load("local-dir:../out"),
    ]
    rows = [encoder.encode_texts(["two red circles", "a dog"]) for encoder in encoders]
    assert torch.equal(rows[0], rows[1]) and torch.equal(rows[0], rows[2])
    assert torch.allclose(rows[0], expected, atol=TOLERANCE)
    open_clip.create_model("local-dir:../stages/stage_2")
    theirs = open_clip.create_model("local-dir:../out").eval()
    tokens = open_clip.get_tokenizer("local-dir:../out")(["two red circles", "a dog"])
    assert tokens.tolist() == [[8, 6, 10, 1] + [0] * 8, [3, 12, 1] + [0] * 9]
    torch.testing.assert_close(
        theirs.encode_text(ids, normalize=True), model(text=ids).text, rtol=0, atol=TOLERANCE
    )


def test_a_scale_above_its_maximum_is_exported_as_the_model_uses_it(tmp_path):
    model = tiny(scale={"init": 20.0, "max": 25.0})
    with torch.no_grad():
        model.logit_scale.fill_(9.0)
    export(model, tmp_path / "out")
    exported = load(tmp_path / "out")
    assert load_file(tmp_path / "out/model.safetensors")[
        "logit_scale"
    ].exp().item() == pytest.approx(25, rel=1e-6)
    assert exported.scale_config == model.scale_config and exported(
        None, None
    ).scale.item() == pytest.approx(25)


# ---- tokens and pixels


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """One exported model, for the tests that only read the folder."""
    folder = tmp_path_factory.mktemp("exported") / "tiny-clip"
    records = [
        {
            "task": "zeroshot_classification",
            "dataset": "/somewhere/private/caltech101",
            "protocol": {"name": "zeroshot", "version": 1},
            "metrics": {"acc1": 0.2749, "acc5": 0.5},
            "intervals_95": {"acc1": [0.2586, 0.2911]},
            "chance": {"acc1": 0.01},
        },
        {
            "task": "zeroshot_retrieval",
            "dataset": None,
            "intervals_95": None,
            "protocol": {"name": "retrieval", "version": 1},
            "metrics": {"text_retrieval_recall@1": 0.125, "undefined": float("nan")},
        },
    ]
    sources = [
        {"name": "shards", "path": "/somewhere/private/train", "embeddings": None},
        {
            "name": "remote",
            "path": "https://me:pass@host/a/{0..3}.tar?X-Amz-Signature=SIGNED",
            "storage": {"client_kwargs": {"headers": {"Authorization": "Bearer SIGNED"}}},
        },
        {"name": "shards", "path": "../private/a::~/private/b"},
    ]
    training = {
        "out": "/somewhere/private/run",
        "init_from": "runs/private/first",
        "hf_token": "SIGNED",
    }
    training["data"] = {"sources": sources}
    export(tiny(), folder, results=records, training=training, step=1200, license="apache-2.0")
    return folder


def test_tokens_are_the_same_in_all_libraries(exported):
    from transformers import AutoTokenizer

    theirs = AutoTokenizer.from_pretrained(exported)
    ours = open_clip.get_tokenizer(f"local-dir:{exported}")(SENTENCES)
    assert ours.shape == (len(SENTENCES), 16)
    for sentence, row in zip(SENTENCES, ours.tolist()):
        # open_clip pads with 0, transformers with the end token: neither is read.
        expected = row[: row.index(49407) + 1]
        assert theirs(sentence, truncation=True).input_ids == expected, sentence
    for sentence in REPAIRED_BY_OPEN_CLIP:  # if transformers learns to, the card must change
        repaired = open_clip.tokenizer.basic_clean(sentence)
        assert theirs(sentence).input_ids != theirs(repaired).input_ids
        ids = open_clip.get_tokenizer(f"local-dir:{exported}")([sentence])[0].tolist()
        assert theirs(repaired).input_ids == ids[: ids.index(49407) + 1]
    padded = theirs(SENTENCES, truncation=True, padding="max_length", return_tensors="pt").input_ids
    model = load(exported).eval()
    torch.testing.assert_close(
        model(text=padded).text, model(text=ours).text, rtol=0, atol=TOLERANCE
    )


@pytest.mark.parametrize(
    ("size", "aside"),
    [((32, 32), 0), ((64, 100), 0), ((480, 636), 0), ((20, 20), 0), ((33, 57), 1)],
)
def test_pixels_of_the_processor_are_within_one_level(exported, size, aside):
    """One level of 255, .015 after normalisation: the resize rounds differently. An odd margin is
    cropped one pixel aside.
    """
    from transformers import AutoProcessor

    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8))
    _, preprocess = open_clip.create_model_from_pretrained(f"local-dir:{exported}")
    ours = preprocess(image)
    theirs = AutoProcessor.from_pretrained(exported)(
        images=image, return_tensors="pt"
    ).pixel_values[0]
    width = ours.shape[-1] - aside
    std = torch.tensor([0.26862954, 0.26130258, 0.27577711]).view(3, 1, 1)
    assert ((ours[..., :width] - theirs[..., aside:]).abs() * std * 255).max() <= 1.01


def test_squashed_pixels_agree_too(tmp_path):
    from transformers import AutoProcessor

    export(make("siglip", tmp_path), tmp_path / "out")
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (50, 80, 3), dtype=np.uint8))
    _, preprocess = open_clip.create_model_from_pretrained(f"local-dir:{tmp_path / 'out'}")
    processor = AutoProcessor.from_pretrained(tmp_path / "out")
    inputs_ = processor(
        text=["two red circles"], images=image, padding="max_length", return_tensors="pt"
    )
    assert (preprocess(image) - inputs_["pixel_values"][0]).abs().max() * 127.5 <= 1.01
    assert (
        inputs_["input_ids"].tolist() == [[8, 6, 10, 1] + [0] * 8]
        and "attention_mask" not in inputs_
    )


def shown(pixels):
    """Normalised pixels [3, H, W] as levels of 255."""
    mean, std = torch.tensor(OPENAI_DATASET_MEAN), torch.tensor(OPENAI_DATASET_STD)
    return (pixels * std.view(3, 1, 1) + mean.view(3, 1, 1)) * 255


def code_of(card):
    """The Python of the card's section about pictures."""
    return card.split("## Pictures")[1].split("```python\n")[1].split("```")[0]


@pytest.mark.parametrize("background", [(255, 255, 255), (10, 60, 200)])
@pytest.mark.parametrize("exif", [True, False])
def test_the_cards_code_shows_every_library_what_training_saw(
    tmp_path, monkeypatch, background, exif
):
    from transformers import AutoProcessor

    model = tiny(decoding={"background": list(background), "exif": exif})
    notes = export(model, tmp_path / "out")
    off = [note for note in notes if "levels off" in note]
    # Transformers knows only white, and the export says so.
    assert len(off) == (background != (255, 255, 255))
    assert all(str(background) in note for note in off)
    card = (tmp_path / "out/README.md").read_text()
    assert (
        f"transparent pixels lay on {'white ' if background[0] == 255 else ''}{background}" in card
    )
    assert ("turned as its Exif" in card) == exif

    (tmp_path / "photo.jpg").write_bytes(sample_picture(model.image_spec))
    monkeypatch.chdir(tmp_path)
    names = {}
    exec(code_of(card), names)
    seen = decode.eval_transform((tmp_path / "photo.jpg").read_bytes(), model.image_spec)
    _, preprocess = open_clip.create_model_from_pretrained(f"local-dir:{tmp_path / 'out'}")
    assert torch.equal(shown(preprocess(names["image"])).round().to(torch.uint8), seen)
    theirs = AutoProcessor.from_pretrained(tmp_path / "out")(
        images=names["image"], return_tensors="pt"
    ).pixel_values[0]
    assert (shown(theirs) - seen).abs().max() <= forms.LEVELS


def test_other_libraries_do_with_pictures_what_the_card_says(exported, tmp_path):
    """If one of them learns to turn or to composite, the card must change."""
    from transformers import AutoProcessor
    from transformers.image_utils import load_image

    path, spec = tmp_path / "picture.png", load(exported).image_spec
    path.write_bytes(sample_picture(spec))
    stored = Image.open(path)
    upright = ImageOps.exif_transpose(stored)
    assert stored.size == upright.size[::-1] and stored.mode == "RGBA"

    def pixels(image):
        return decode.eval_transform(image, spec)

    _, preprocess = open_clip.create_model_from_pretrained(f"local-dir:{exported}")
    hidden = shown(preprocess(stored))  # resized with alpha, which is dropped then
    assert (
        (hidden - pixels(stored.convert("RGB"))).abs().mean()
        < 5
        < (hidden - pixels(stored)).abs().mean()
    )
    processor = AutoProcessor.from_pretrained(exported)
    theirs = shown(processor(images=stored, return_tensors="pt").pixel_values[0])
    assert (theirs - pixels(stored)).abs().max() <= forms.LEVELS
    assert torch.equal(pixels(load_image(str(path))), pixels(upright.convert("RGB")))
    seen = decode.eval_transform(path.read_bytes(), spec)
    assert torch.equal(seen, pixels(upright))
    for wrong in (stored, stored.convert("RGB"), upright.convert("RGB")):
        assert (pixels(wrong).int() - seen.int()).abs().max() > 60


# ---- the card and the folder


def test_the_card_holds_metadata_results_and_no_private_paths(exported):
    card = (exported / "README.md").read_text()
    _, front, body = card.split("---\n", 2)
    metadata = yaml.safe_load(front)
    assert metadata["license"] == "apache-2.0" and metadata["library_name"] == "transformers"
    assert metadata["pipeline_tag"] == "zero-shot-image-classification"
    first, second = metadata["model-index"][0]["results"]
    assert {m["type"]: m["value"] for m in first["metrics"]} == {"acc1": 0.2749, "acc5": 0.5}
    assert first["dataset"]["name"] == "caltech101" and [m["type"] for m in second["metrics"]] == [
        "text_retrieval_recall@1"
    ]
    row = "| zeroshot_classification | caltech101 | zeroshot v1"
    assert f"{row} | acc1 | 0.2749 | 0.2586 to 0.2911 | 0.01 |" in body
    assert f"{row} | acc5 | 0.5 |  |  |" in body
    assert "1200 steps" in body
    assert "private" not in card and "name: shards" in body and "host/a/{0..3}.tar" in body
    assert not any(secret in card for secret in ("SIGNED", "pass@", "storage", "None"))


def test_a_licence_is_of_the_hubs_list_or_named(tmp_path):
    cases = {
        "MIT": {"license": "mit"},
        "cc-by-sa-4.0": {"license": "cc-by-sa-4.0"},
        "our laboratory's terms": {"license": "other", "license_name": "our laboratory's terms"},
        "other:apache-2.1": {"license": "other", "license_name": "apache-2.1"},
    }
    for written, expected in cases.items():
        assert licenses.metadata(written) == expected
    assert licenses.metadata(None) == {} and len(cases) == 4
    for mistyped in ("apache2.0", "cc-by-nc-sa4.0", ""):
        with pytest.raises(ValueError, match="not known here"):
            export(tiny(), tmp_path / "out", license=mistyped)
    assert list(tmp_path.iterdir()) == []


def test_the_hub_accepts_the_card(exported):
    from huggingface_hub import ModelCard

    data = ModelCard.load(exported / "README.md").data
    assert {r.metric_value for r in data.eval_results} == {0.2749, 0.5, 0.125}


def test_the_folder_holds_safetensors_only_and_is_readable(exported):
    names = {path.name for path in exported.iterdir()}
    assert names >= {"open_clip_config.json", "open_clip_model.safetensors"}
    assert names >= {"config.json", "model.safetensors", "modules.json", "README.md"}
    assert names >= {"tokenizer.json", "tokenizer_config.json"}
    assert names >= {"processor_config.json", "preprocessor_config.json"}
    assert not any(path.suffix in (".bin", ".pt", ".pth", ".pkl") for path in exported.rglob("*"))
    assert len({stat.S_IMODE(path.stat().st_mode) for path in exported.iterdir()}) == 1
    assert (
        json.loads((exported / "config.json").read_text())["text_config"]["eos_token_id"] == 49407
    )


def test_an_existing_folder_is_not_touched_unless_asked(tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine.txt").write_text("precious")
    with pytest.raises(ExportError, match="not empty"):
        export(tiny(), out)
    assert [p.name for p in tmp_path.iterdir()] == ["out"] and (
        out / "mine.txt"
    ).read_text() == "precious"
    (out / ".git").mkdir()
    (out / ".git/config").write_text("theirs")
    (out / "link").symlink_to("/nowhere")
    export(tiny(), out, overwrite=True)
    assert (out / "mine.txt").read_text() == "precious" and (
        out / ".git/config"
    ).read_text() == "theirs"
    assert (out / "link").is_symlink() and (out / "config.json").exists()
    mean = {"image_tower": VIT | {"pool": "avg"}}
    # Its forms are fewer: what the first export wrote goes.
    export(tiny(**mean), out, overwrite=True)
    assert (out / "mine.txt").exists() and not (out / "config.json").exists()
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    project = tmp_path / "project"
    project.mkdir()
    (project / "README.md").write_text("of a thesis")
    with pytest.raises(
        ExportError, match=r"README.md, which no export wrote and this one would replace"
    ):
        export(tiny(), project, overwrite=True)
    assert [p.name for p in project.iterdir()] == ["README.md"] and sorted(
        p.name for p in tmp_path.iterdir()
    ) == ["out", "project"]
    with pytest.raises(ExportError, match="is a file"):
        export(tiny(), out / "README.md")


def test_a_failure_leaves_nothing(tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(place, "save_tensors", full)
    with pytest.raises(OSError, match="No space left"):
        export(tiny(), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_form_whose_embeddings_differ_is_not_written(tmp_path, monkeypatch):
    real = clip_form.network

    def wrong(model, weights):
        return real(
            model, weights | {"visual.proj": weights["visual.proj"] * torch.linspace(0.9, 1.1, 48)}
        )

    monkeypatch.setattr(clip_form, "network", wrong)
    notes = export(tiny(), tmp_path / "out")
    assert (
        any("its embeddings differ by" in note for note in notes)
        and not (tmp_path / "out/config.json").exists()
    )


# ---- a run


def test_a_run_is_exported_with_its_results(tmp_path):
    towers = {"image_tower": VIT, "text_tower": TEXT, "embed_dim": 48}
    (tmp_path / "shards").mkdir()
    whole = {
        "out": "run",
        "model": towers,
        "objective": {"infonce": {}},
        "train": {"duration": 10, "batch": 4},
        "data": {"sources": [{"name": "shards", "path": str(tmp_path / "shards")}]},
    }
    model, run = tiny(seed=5), tmp_path / "run"
    for step in (10, 20):
        with torch.no_grad():
            model.logit_scale.fill_(step / 10)
        contents = checkpoint.Contents(
            model.state_dict(), {}, config=yaml.safe_dump(whole), description=model.description()
        )
        checkpoint.save(run, step, contents, keep=2)
    (run / "results.json").write_text(
        json.dumps([{"task": "zero_shot", "dataset": "scenes", "metrics": {"top1": 0.75}}])
    )
    export_run(run, tmp_path / "out")
    card = (tmp_path / "out/README.md").read_text()
    assert "| zero_shot | scenes |  | top1 | 0.75 |  |  |" in card and "20 steps" in card
    pixels, ids = inputs(model)
    assert torch.equal(load(tmp_path / "out").eval()(pixels, ids).image, model(pixels, ids).image)
    # Its results are not those of the end.
    export_run(run / "checkpoints/step_00000010", tmp_path / "earlier")
    assert "Not evaluated." in (tmp_path / "earlier/README.md").read_text()

    damaged = ["", "[" * 100_000, "[1]", '"x"', '{"a": 1}', '[{"task": "t", "metrics": [1]}]']
    for content in damaged:
        (run / "results.json").write_text(content)
        with pytest.raises(
            ValueError, match=r"results\.json is damaged.*delete the file to export"
        ):
            export_run(run, tmp_path / "damaged")
    assert not (tmp_path / "damaged").exists()
    assert load(tmp_path / "earlier")(None, None).scale.item() == pytest.approx(np.e)
