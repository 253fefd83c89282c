"""One list of references for every consumer: the same model behind each of them, and messages that
lead out.
"""

import json
import pickle
import time

import pytest
import torch
from safetensors.torch import save_file

import vlp
from tests.loopback_hub import loopback_hub
from tests.models.tiny import TEXT, VIT, inputs, settings, tiny
from vlp import checkpoint, schema
from vlp.config import Model
from vlp.eval import models
from vlp.export import folder as export
from vlp.models.build import build, from_description
from vlp.pretrained import references as _references
from vlp.pretrained import weight_files
from vlp.pretrained.runs import CheckpointError

KINDS = [
    "a run",
    "a checkpoint",
    "its model.safetensors",
    "an export",
    "an export with local-dir:",
    "an export's description",
    "a transformers description",
    "an open_clip folder",
    "a pickled open_clip folder",
    "a transformers folder",
    "a sharded transformers folder",
    "own architecture and epoch_K.pt",
    "own architecture and safetensors",
]
BARE = [
    "epoch_2.pt",
    "compiled.pt",
    "compiled_parallel.pt",
    "lightning.ckpt",
    "plain.safetensors",
    "hf.bin",
]


@pytest.fixture(scope="module")
def room(tmp_path_factory):
    """One model of 32 pixels, written in every way that is known; and the references to them."""
    home, model = tmp_path_factory.mktemp("references"), tiny(seed=4)
    written = checkpoint.Contents(
        model.state_dict(), {}, config="out: run", description=model.description()
    )
    saved = checkpoint.save(home / "run", 3, written, keep=1)
    exported = home / "exported"
    export.export(model, exported)
    description = json.loads((exported / "open_clip_config.json").read_text())
    weights = model.open_clip_state_dict()
    (home / "own.json").write_text(json.dumps(description["model_cfg"]))

    del description["vlp"]
    for name in ("open_clip", "pickled"):
        (home / name).mkdir()
        (home / name / "open_clip_config.json").write_text(json.dumps(description))
    save_file(weights, home / "open_clip/open_clip_model.safetensors")
    torch.save(weights, home / "pickled/open_clip_pytorch_model.bin")

    from transformers import CLIPModel

    for name in ("transformers", "sharded"):
        (home / name).mkdir()
        for path in exported.iterdir():
            if path.suffix == ".json" and path.name != "open_clip_config.json":
                (home / name / path.name).write_bytes(path.read_bytes())
    network = CLIPModel.from_pretrained(exported)
    save_file(
        network.state_dict(), home / "transformers/model.safetensors", metadata={"format": "pt"}
    )
    network.save_pretrained(home / "sharded", max_shard_size="200KB")
    assert len(list((home / "sharded").glob("model-*.safetensors"))) > 1

    trained = {
        "epoch": 2,
        "name": "x",
        "state_dict": {f"module.{k}": v for k, v in weights.items()},
        "optimizer": {"a": 1},
    }
    torch.save(trained, home / "epoch_2.pt")
    torch.save({f"_orig_mod.{k}": v for k, v in weights.items()}, home / "compiled.pt")
    torch.save(
        {f"_orig_mod.module.{k}": v for k, v in weights.items()}, home / "compiled_parallel.pt"
    )
    torch.save(
        {"state_dict": {f"model.{k}": v for k, v in weights.items()}}, home / "lightning.ckpt"
    )
    torch.save(network.state_dict(), home / "hf.bin")
    save_file(weights, home / "plain.safetensors")
    references = [
        home / "run",
        saved,
        saved / "model.safetensors",
        exported,
        f"local-dir:{exported}",
        exported / "open_clip_config.json",
        home / "transformers/config.json",
        home / "open_clip",
        home / "pickled",
        home / "transformers",
        home / "sharded",
        f"{home / 'own.json'}:{home / 'epoch_2.pt'}",
        f"{home / 'own.json'}:{home / 'plain.safetensors'}",
    ]
    return home, model, dict(zip(KINDS, map(str, references)))


def same(model, other, tolerance=1e-6):
    pixels, ids = inputs(model)
    with torch.no_grad():
        ours, theirs = model(pixels, ids), other.eval()(pixels, ids)
    return all(torch.allclose(a, b, rtol=0, atol=tolerance) for a, b in zip(ours[:3], theirs[:3]))


@pytest.mark.parametrize("kind", KINDS)
def test_every_consumer_takes_every_reference(kind, room, tmp_path):
    _, model, references = room
    reference = references[kind]
    loaded = checkpoint.load_any(reference)
    assert same(model, loaded) and loaded.image_spec == model.image_spec  # init_from, teacher.model
    assert same(model, tiny(seed=1, pretrained=reference))
    encoder = models.load(reference)  # vlp eval, data embed, data filter
    pixels, _ = inputs(model)
    with torch.no_grad():
        assert torch.allclose(
            encoder.encode_images(model.pixels(pixels)), model(image=pixels).image, atol=1e-5
        )
    texts = ["two red circles", "a dog"]
    expected = models.from_model(model).encode_texts(texts)
    assert torch.allclose(encoder.encode_texts(texts), expected, atol=1e-5)
    export.export_run(reference, tmp_path / "again")
    assert same(model, checkpoint.load_any(tmp_path / "again"), 1e-5)


@pytest.mark.parametrize("name", BARE)
def test_weights_alone_take_the_architecture_that_is_known(name, room):
    home, model, _ = room
    reference = str(home / name)
    assert same(model, checkpoint.load_any(reference, like=tiny(seed=1)))
    assert same(model, tiny(seed=1, pretrained=reference))
    for load in (checkpoint.load_any, models.load):
        with pytest.raises(
            ValueError, match=rf"do not say their architecture; write ARCHITECTURE:.*{name}"
        ):
            load(reference)


def test_open_clips_trainer_noted_the_architecture(room, tmp_path):
    logs = tmp_path / "logs" / "my_run"
    (logs / "checkpoints").mkdir(parents=True)
    (logs / "params.txt").write_text("batch_size: 64\nmodel: ViT-S-32-alt\nname: my_run\n")
    torch.save({"state_dict": {}}, logs / "checkpoints/epoch_2.pt")
    with pytest.raises(
        ValueError, match=r"do not say their architecture; write ViT-S-32-alt:.*epoch_2.pt"
    ):
        checkpoint.load_any(logs / "checkpoints/epoch_2.pt")
    with pytest.raises(
        ValueError, match=r"training folder of open_clip; name a file.*ViT-S-32-alt:.*epoch_2.pt"
    ):
        checkpoint.load_any(logs)


def test_an_own_architecture_is_a_tower_too(room):
    home, model, references = room
    tower = {"name": "open_clip", "architecture": str(home / "own.json")}
    for pretrained in (str(home / "epoch_2.pt"), references["a transformers folder"]):
        built = build(schema.parse(Model, {"image_tower": tower, "pretrained": pretrained}))
        assert same(model, built)
    tower["architecture"] = references["a transformers folder"]
    assert same(
        model,
        build(schema.parse(Model, {"image_tower": tower, "pretrained": tower["architecture"]})),
    )


# ---- transformers


SIZES = {
    "quick gelu": {
        "image_tower": VIT | {"quick_gelu": True},
        "text_tower": TEXT | {"quick_gelu": True},
    },
    "odd sizes": {
        "image_tower": VIT
        | {"width": 96, "head_width": 24, "layers": 3, "mlp_ratio": 2.51, "patch_size": 4},
        "text_tower": TEXT
        | {"width": 48, "heads": 3, "layers": 1, "context_length": 9, "mlp_ratio": 3.3},
        "embed_dim": 20,
    },
}


@pytest.mark.parametrize("case", SIZES)
def test_a_clip_model_of_any_size_is_read_exactly(case, tmp_path):
    """Written by vlp's way out, read by its way in: names, sizes and activation come back."""
    model = tiny(**SIZES[case])
    export.export(model, tmp_path / "out")
    for name in ("open_clip_config.json", "open_clip_model.safetensors"):
        (tmp_path / "out" / name).unlink()
    loaded = checkpoint.load_any(tmp_path / "out")
    assert same(model, loaded) and loaded.open_clip_config.get("quick_gelu", False) is (
        case == "quick gelu"
    )


OWN = [("gelu", 1e-5, 60), ("gelu_pytorch_tanh", 1e-6, 30), ("quick_gelu", 1e-5, 2)]


@pytest.mark.parametrize(("activation", "eps", "eos"), OWN)
def test_a_clip_model_of_transformers_own_making(activation, eps, eos, tmp_path):
    """Against the library itself: other epsilon, activation, end token that is not the largest id,
    intermediate size.
    """
    import transformers as hf

    from tests.eval.test_models import word_tokenizer

    both = {
        "hidden_act": activation,
        "layer_norm_eps": eps,
        "num_attention_heads": 2,
        "num_hidden_layers": 2,
    }
    text = both | {
        "hidden_size": 18,
        "intermediate_size": 47,
        "vocab_size": 61,
        "max_position_embeddings": 12,
    }
    vision = both | {"hidden_size": 20, "intermediate_size": 33, "image_size": 24, "patch_size": 8}
    torch.manual_seed(0)
    config = hf.CLIPConfig(
        text_config=text | {"eos_token_id": eos}, vision_config=vision, projection_dim=14
    )
    network = hf.CLIPModel(config).eval()
    network.save_pretrained(tmp_path)
    hf.CLIPImageProcessor(
        size={"shortest_edge": 24},
        crop_size=24,
        image_mean=[0.1] * 3,
        image_std=[0.3] * 3,
        resample=2,
    ).save_pretrained(tmp_path)
    word_tokenizer(tmp_path, "clip")
    model = checkpoint.load_any(tmp_path).eval()
    assert model.image_spec.mean == (0.1, 0.1, 0.1) and model.image_spec.interpolation == "bilinear"
    pixels = torch.randn(3, 3, 24, 24)
    ids = torch.randint(3, 29, (3, 12))
    ids[:, 7] = 60 if eos == 2 else eos
    with torch.no_grad():
        ours, theirs = model(pixels, ids), network(input_ids=ids, pixel_values=pixels)
    assert (ours.image - theirs.image_embeds).abs().max() <= 1e-6
    assert (ours.text - theirs.text_embeds).abs().max() <= 1e-6
    assert ours.scale.item() == pytest.approx(network.logit_scale.exp().item())


@pytest.mark.parametrize("activation", ["gelu", "gelu_pytorch_tanh"])
def test_a_siglip_model_of_transformers(activation, tmp_path):
    """The image tower is timm's, found by its sizes; SigLIP's own weights are of the tanh form,
    which timm does not know.
    """
    import transformers as hf

    from tests.eval.test_models import word_tokenizer
    from tests.models.tiny import register_small_siglip

    register_small_siglip()
    size = {
        "hidden_size": 32,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "hidden_act": activation,
    }
    torch.manual_seed(0)
    text, vision = (
        size | {"vocab_size": 31, "max_position_embeddings": 12},
        size | {"image_size": 32, "patch_size": 8},
    )
    network = hf.SiglipModel(hf.SiglipConfig(text_config=text, vision_config=vision)).eval()
    with torch.no_grad():
        for parameter in network.parameters():
            # As initialised, both forms of GELU would agree.
            parameter.add_(0.1 * torch.randn_like(parameter))
        network.logit_bias.fill_(-3.0)
    network.save_pretrained(tmp_path)
    hf.SiglipImageProcessor(size={"height": 32, "width": 32}).save_pretrained(tmp_path)
    word_tokenizer(tmp_path, "siglip")
    model = checkpoint.load_any(tmp_path).eval()
    assert model.image_spec.resize == "squash" and model.image_spec.mean == (0.5, 0.5, 0.5)
    pixels, ids = torch.randn(3, 3, 32, 32), torch.randint(3, 29, (3, 12))
    with torch.no_grad():
        ours, theirs = model(pixels, ids), network(input_ids=ids, pixel_values=pixels)
    assert (ours.image - theirs.image_embeds).abs().max() <= 2e-6
    assert (ours.text - theirs.text_embeds).abs().max() <= 2e-6
    assert ours.bias.item() == -3.0


def test_a_siglip_of_no_size_that_timm_knows_is_refused_with_the_sizes(tmp_path):
    import transformers as hf

    from tests.eval.test_models import tiny_transformers

    tiny_transformers(tmp_path, "siglip")
    with pytest.raises(
        ValueError,
        match=r"no SigLIP tower of width.*\(16, 1, 2, 32, 8, 16\); tried none: it has none of 16",
    ):
        checkpoint.load_any(tmp_path)
    # Evaluation needs no conversion.
    assert hf.__name__ and models.load(str(tmp_path)).encode_texts(["a"]).shape == (
        1,
        16,
    )


def test_what_does_not_fit_is_counted_and_named(room, tmp_path):
    _, _, references = room
    with pytest.raises(
        ValueError, match=r"\d+ of \d+ tensors fit; 12 missing \(visual.transformer.resblocks.2"
    ):
        tiny(image_tower=VIT | {"layers": 3}, pretrained=references["a transformers folder"])
    save_file({"encoder.weight": torch.ones(2)}, tmp_path / "other.safetensors")
    with pytest.raises(
        ValueError, match=r"0 of \d+ tensors fit; .* missing .*1 not known here \(encoder.weight\)"
    ):
        tiny(pretrained=str(tmp_path / "other.safetensors"))
    # open_clip only asserts that widths agree
    wider = f"ViT-S-32-alt:{references['its model.safetensors']}"
    with pytest.raises(ValueError, match=r"do not fit this model: \d+ of \d+ tensors fit; "):
        checkpoint.load_any(wider)


# ---- references that lead nowhere


def test_messages_say_what_is_there_and_what_would_work(room, tmp_path, monkeypatch):
    home = room[0]
    monkeypatch.chdir(home)
    (tmp_path / "empty").mkdir()
    (tmp_path / "outer/inner").mkdir(parents=True)
    (tmp_path / "outer/inner/open_clip_config.json").write_text("{}")
    (tmp_path / "loose").mkdir()
    save_file({"a": torch.ones(1)}, tmp_path / "loose/a.safetensors")
    (tmp_path / "bert").mkdir()
    (tmp_path / "bert/config.json").write_text('{"model_type": "bert"}')
    (tmp_path / "broken.json").write_text('{"embed_dim": 4}')
    cases = {
        "exportd": r"no such file or folder \(near it: exported\)",
        "run/checkpoint": r"near it: run/checkpoints",
        "openai/nowhere.pt": "no such file or folder",
        str(tmp_path / "empty"): "it holds nothing. What works: a run",
        str(tmp_path / "outer"): r"it holds inner/.*; models inside it: .*outer/inner",
        str(
            tmp_path / "loose"
        ): r"holds weights \(a.safetensors\) but neither.*ARCHITECTURE:.*a.safetensors",
        str(tmp_path / "bert"): r"of the type 'bert'; expected 'clip' \(CLIPModel\) or 'siglip'",
        str(tmp_path / "broken.json"): r"lacks \['text_cfg', 'vision_cfg'\]; found \['embed_dim'\]",
        "own.json": r"an architecture without weights; write own.json:FILE",
        "own.json:nothing.pt": "own.json has no weights 'nothing.pt': no such file",
        "ViT-B32:openai": "knows no architecture 'ViT-B32', did you mean 'ViT-B-32'",
        "ViT-B-32:openay": "no tag, did you mean 'openai'",
        "local-dir:exportd": "no folder exportd .near it: exported",
        "ViT-B-32:exported": "exported is a folder, which says its architecture itself; "
        "write exported alone",
        "https://huggingface.co/someone/model/tree/main": "is an address; "
        "write hf-hub:someone/model$",
    }
    started = time.monotonic()
    for reference, message in cases.items():
        with pytest.raises(ValueError, match=message):
            checkpoint.load_any(reference)
    assert time.monotonic() - started < 5 and len(cases) == 15  # no Hub was asked


DEEP = "[" * 100_000
# Folders that came cut, edited or made to harm: the file, what it holds, what is said of it.
DAMAGED = [
    ("open_clip_config.json", DEEP, "open_clip_config.json is not JSON .*recursion"),
    ("open_clip_config.json", '{"model_cfg": 3}', "its model_cfg is '3', expected an object"),
    ("open_clip_config.json", '{"model_cfg": {"embed_dim": 4}}', "its vision_cfg is 'None'"),
    (
        "open_clip_config.json",
        '{"model_cfg": {"vision_cfg": {}, "text_cfg": {}}, "preprocess_cfg": []}',
        "its preprocess_cfg is",
    ),
    ("vlp_stages.json", DEEP, "vlp_stages.json is not JSON"),
    ("vlp_stages.json", "{}", "vlp_stages.json names no members"),
    ("vlp_stages.json", "[]", "vlp_stages.json holds a list"),
    ("vlp_stages.json", '{"members": []}', "vlp_stages.json names no members"),
    ("vlp_stages.json", '{"members": 5}', "vlp_stages.json names no members"),
    ("vlp_stages.json", '{"members": ["."]}', "names '.', which is no folder beside it"),
    ("vlp_stages.json", '{"members": [".."]}', "names '..', which is no folder beside it"),
    ("vlp_stages.json", '{"members": ["../0"]}', "names '../0', which is no folder beside it"),
    ("vlp_stages.json", '{"members": [null]}', "names 'None', which is no folder beside it"),
    ("manifest.json", DEEP, "its manifest.json cannot be read"),
    ("manifest.json", "{}", "its manifest.json does not name"),
]


@pytest.mark.parametrize("number", range(len(DAMAGED)))
def test_a_damaged_description_of_a_model_is_refused_by_name(number, tmp_path):
    name, content, message = DAMAGED[number]
    folder = tmp_path / "0"
    folder.mkdir()
    (folder / name).write_text(content)
    with pytest.raises(ValueError, match=message):
        vlp.load(str(folder))
    # In training, where weights are named: the same words.
    with pytest.raises((ValueError, CheckpointError), match=message):
        weight_files.find(str(folder), None, False)


def test_addresses_and_empty_names_are_refused_without_their_passwords():
    with pytest.raises(ValueError, match=r"https://host/x\.pt\?\*\*\* is an address") as refused:
        vlp.load("https://user:planted1@host/x.pt?token=planted2")
    # A notebook shows the whole chain.
    assert "planted" not in f"{refused.value}{refused.value.__cause__}"
    with pytest.raises(ValueError, match="ViT-B-32: names no weights; write ViT-B-32:TAG"):
        vlp.load("ViT-B-32:")


def test_an_index_of_weights_that_names_none_is_refused(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "clip"}')
    for content in ("{}", '{"weight_map": []}', '{"weight_map": {"a": 1}}', DEEP):
        index = tmp_path / "model.safetensors.index.json"
        index.write_text(content)
        with pytest.raises(ValueError, match=r"index\.json (names no files|is not JSON)"):
            weight_files.read(index)


def use_hub(monkeypatch, url):
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", url)
    monkeypatch.setattr(
        "huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE",
        url + "/{repo_id}/resolve/{revision}/{filename}",
    )


def test_a_name_that_may_be_of_the_hub_is_asked_for_three_seconds(monkeypatch, tmp_path):
    """A server that takes the connection and never answers; and none at all."""
    import socket

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    with socket.create_server(("127.0.0.1", 0)) as silent:
        use_hub(monkeypatch, f"http://127.0.0.1:{silent.getsockname()[1]}")
        monkeypatch.setattr("vlp.pretrained.hub._PATIENCE_S", {True: 0.5, False: 0.3})
        with pytest.raises(ValueError, match="no model 'a/b'"):
            checkpoint.load_any("a/b")  # not timed: the first call imports

        messages = {
            "openai/clipp": r"no such file or folder.*no Hub answered within 0.3 s.*"
            "write hf-hub:openai/clipp",
            "hf-hub:openai/clipp": "could not get openai/clipp from the Hub: no Hub answered",
        }
        for reference, message in messages.items():
            started = time.monotonic()
            with pytest.raises(ValueError, match=message):
                checkpoint.load_any(reference)
            assert time.monotonic() - started < 3


def test_repositories_in_both_forms_load_from_the_hub(room, monkeypatch, tmp_path):
    _, model, references = room
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    n_loaded = 0
    with loopback_hub() as hub:
        use_hub(monkeypatch, hub.url)
        for kind in ("a pickled open_clip folder", "a sharded transformers folder"):
            folder = _references.resolve(references[kind]).path
            name = f"someone/{folder.name}"
            monkeypatch.chdir(tmp_path)
            hub.repos[name] = {path.name: path.read_bytes() for path in folder.iterdir()} | {
                "evil.py": b"raise SystemExit"
            }
            for reference in (f"hf-hub:{name}", f"hf:{name}" if n_loaded else name):
                assert same(model, checkpoint.load_any(reference))
                n_loaded += 1
        with pytest.raises(ValueError, match="could not get someone/else from the Hub"):
            checkpoint.load_any("hf-hub:someone/else")
    use_hub(monkeypatch, "http://127.0.0.1:9")
    for reference in (
        "hf-hub:someone/sharded",
        "someone/sharded",
    ):  # the Hub is gone, the cache is not
        assert same(model, checkpoint.load_any(reference))
    assert n_loaded == 4 and not list((tmp_path / "cache").rglob("*.py"))


def test_files_that_hold_more_than_tensors_are_refused_and_not_run(tmp_path):
    class Trap:
        def __reduce__(self):
            return (open, (str(tmp_path / "sprung"), "w"))

    for name, value in (
        ("trap.pt", {"state_dict": Trap()}),
        ("list.pt", [1, 2]),
        ("none.pt", {"epoch": 3}),
    ):
        torch.save(value, tmp_path / name)
    (tmp_path / "plain.bin").write_bytes(pickle.dumps({"state_dict": Trap()}))
    messages = {
        "trap.pt": "runs no code of a file",
        "plain.bin": "runs no code of a file|damaged",
        "list.pt": "holds a list",
        "none.pt": "holds epoch, …; expected tensors by name",
    }
    for name, message in messages.items():
        for load in (
            lambda ref: checkpoint.load_any(ref, like=tiny()),
            lambda ref: tiny(pretrained=ref),
        ):
            with pytest.raises(ValueError, match=message) as caught:
                load(str(tmp_path / name))
            assert "weights_only" not in str(caught.value)
    assert not (tmp_path / "sprung").exists()


def test_stages_are_no_source_for_one_model(room, tmp_path):
    _, model, references = room
    export.export_concatenated([references["an export"]] * 2, tmp_path / "stages")
    assert checkpoint.load_any(tmp_path / "stages").embed_dim == 2 * model.embed_dim
    with pytest.raises(
        ValueError, match=r"holds several models; name one of them, such as .*stage_1"
    ):
        build(settings(pretrained=str(tmp_path / "stages")))
    assert from_description(model.description()).embed_dim == model.embed_dim
