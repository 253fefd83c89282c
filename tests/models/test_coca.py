"""CoCa: attentional poolers, class token and text decoder, with open_clip's own model as
reference.
"""

from __future__ import annotations

import dataclasses

import open_clip
import pytest
import torch
from open_clip.coca_model import CoCa
from safetensors.torch import save_file

from tests import ranks
from tests.models.tiny import few_words, inputs, settings, tiny
from tests.test_step import assert_close, gradients_and_weights, make_batch
from vlp import config, losses
from vlp.checks import check_needs
from vlp.export import folder
from vlp.models.assemble import assemble
from vlp.models.build import _instantiate, from_description
from vlp.models.dual_encoder import DualEncoder
from vlp.resume import start_from

POOLS = ("shared", "parallel", "cascade", None)
LENGTH = 10


def section(pool="shared", class_token=True, **keys):
    """The `model` section of a tiny CoCa."""
    vit = {"name": "vit", "layers": 1, "head_width": 16, "patch_size": 8, "image_size": 16}
    # Only tokens of a pool of its own may be as wide as the text's where the tower is not.
    vit |= {"width": 48 if pool == "shared" else 32, "attentional_pool": pool}
    vit |= {"pool_queries": 4, "pool_heads": 2}
    text = {"name": "transformer", "width": 32, "layers": 1, "heads": 2, "context_length": LENGTH}
    return {
        "image_tower": vit,
        "text_tower": text | {"class_token": class_token},
        "embed_dim": 32,
        "decoder": {"layers": 2},
    } | keys


def theirs(model: DualEncoder) -> CoCa:
    """open_clip's model of the same description, with the same weights."""
    model_cfg = {k: v for k, v in model.open_clip_config.items() if k != "custom_text"}
    coca = CoCa(**model_cfg).eval()
    coca.load_state_dict(model.open_clip_state_dict())
    return coca


@torch.no_grad()
def apart(model: DualEncoder, coca: CoCa) -> tuple[float, float, float]:
    """The largest differences of images, of texts, and of log-probabilities of tokens."""
    pixels, ids = inputs(model)
    ours = model(pixels, ids, pairs=len(ids))
    output = coca(model.pixels(pixels), ids)
    assert ours.image.shape == (len(pixels), model.embed_dim)
    labels = output["labels"].unsqueeze(2)
    nll = -output["logits"].log_softmax(2).gather(2, labels).squeeze(2)
    return tuple(
        (one - other).abs().max().item()
        for one, other in (
            # open_clip's pool of one query keeps a dimension for it.
            (ours.image, output["image_features"].reshape(ours.image.shape)),
            (ours.text, output["text_features"]),
            (ours.caption_nll, nll),
        )
    )


@pytest.mark.parametrize("pool", POOLS)
@pytest.mark.parametrize("class_token", [True, False])
def test_embeddings_and_logits_are_those_of_open_clip(pool, class_token):
    model = tiny(**section(pool, class_token))
    assert max(apart(model, theirs(model))) < 1e-6
    assert model.text_decoder is not None and model.supplies() >= {"caption_nll"}


@pytest.mark.parametrize("pool", POOLS)
def test_adapters_leave_the_pools_as_they_are(pool):
    """Queries attend to patches: an adapter for self-attention there would compute another model,
    where the tower is as wide as the embedding.
    """
    towers = section(pool)
    for tower in ("image_tower", "text_tower"):
        towers[tower]["lora"] = {"r": 2}
    model = tiny(**towers)
    adapted = [name for name, _ in model.named_parameters() if ".lora_B." in name]
    with torch.no_grad():
        for name in adapted:
            model.get_parameter(name).normal_(std=0.3)
    assert len(adapted) == 8 and not any("attn_pool" in name for name in adapted)
    assert max(apart(model, theirs(model))) < 2e-5


@pytest.mark.parametrize("pool", POOLS)
def test_a_checkpoint_of_open_clip_loads_and_returns(pool, tmp_path):
    """Its state becomes ours by `pretrained`, and ours its again, tensor by tensor."""
    model = tiny(**section(pool))
    torch.manual_seed(7)
    coca = theirs(model)
    with torch.no_grad():
        for weights in coca.parameters():
            weights.add_(torch.randn_like(weights) * 0.05)
    state = {name: value.contiguous() for name, value in coca.state_dict().items()}
    save_file(state, tmp_path / "coca.safetensors")

    loaded = tiny(seed=3, **section(pool, pretrained=str(tmp_path / "coca.safetensors")))
    again = loaded.open_clip_state_dict()
    assert again.keys() == state.keys()
    assert all(torch.equal(again[name], state[name]) for name in state)
    assert max(apart(loaded, coca)) < 1e-6 < max(apart(model, coca))


def test_architectures_of_open_clip_are_accepted():
    """Every coca_* of open_clip's list has the tensors of its own class, or is refused with the
    reason.
    """
    names = [name for name in open_clip.list_models() if name.startswith("coca_")]
    assert len(names) == 4
    refused = {}
    for name in names:
        tower = {"name": "open_clip", "architecture": name}
        try:
            model_cfg, _ = assemble(settings(image_tower=tower, text_tower=None, embed_dim=None))
        except ValueError as error:
            refused[name] = str(error)
            continue
        described = open_clip.get_model_config(name)
        described.pop("custom_text")
        with torch.device("meta"):
            ours, expected = _instantiate(model_cfg).state_dict(), CoCa(**described).state_dict()
        assert {k: v.shape for k, v in ours.items()} == {k: v.shape for k, v in expected.items()}
        assert model_cfg["multimodal_cfg"]["context_length"] == 76
    assert list(refused) == ["coca_roberta-ViT-B-32"]
    assert "causal text transformer" in refused["coca_roberta-ViT-B-32"]


END = 499  # of a vocabulary of 500


def batch(rows=slice(None)):
    """Captions of one to eight tokens between begin and end, so that ranks and micro-batches hold
    unlike numbers of them.
    """
    plain = make_batch()
    text = plain.text[:, :LENGTH].clone()
    for row, ids in enumerate(text):
        n_words = 1 + row % 8
        ids[1 + n_words] = END
        ids[2 + n_words :] = 0
    return dataclasses.replace(make_batch(rows), text=text[rows])


def run(text_tower, micro_batches=1, engine="ddp"):
    """A step of a CoCa of cascaded queries: gradients, weights and losses."""
    pool = {"attentional_pool": "cascade", "pool_queries": 4, "pool_heads": 2}
    return gradients_and_weights(
        micro_batches,
        batch=batch,
        engine=engine,
        towers={"image": pool},
        text_tower=text_tower,
        decoder=config.Decoder(layers=1),
        objective={"infonce": {}, "siglip": {"weight": 0.3}, "captioning": {"weight": 2}},
    )


@pytest.fixture(scope="module")
def text_tower(tmp_path_factory):
    """With a class token, and few words."""
    return few_words(tmp_path_factory.mktemp("coca"), END + 1, LENGTH, embed_cls=True)


@pytest.fixture(scope="module")
def reference(text_tower):
    gradients, weights, loss = run(text_tower)
    of_decoder = [name for name in gradients if name.startswith("text_decoder.")]
    of_pools = [name for name in gradients if "attn_pool" in name]
    assert len(of_decoder) > 20 and len(of_pools) > 10 and "text.cls_emb" in gradients
    assert all(any(values) for values in gradients.values()), "an empty gradient proves nothing"
    return gradients, weights, loss


def test_micro_batches_change_nothing(reference, text_tower):
    gradients, weights, loss = run(text_tower, 4)
    assert assert_close(gradients, reference[0], 1e-10) > 60
    assert_close(weights, reference[1], 1e-9)
    assert loss == pytest.approx(reference[2], rel=1e-12)


@pytest.mark.parametrize("engine", ["ddp", pytest.param("fsdp2", marks=pytest.mark.slow)])
def test_ranks_change_nothing(reference, text_tower, engine):
    for gradients, weights, _ in ranks.run(2, run, text_tower, 3, engine):
        assert_close(gradients, reference[0], 1e-9)
        assert_close(weights, reference[1], 1e-9)


def test_the_caption_loss_counts_tokens_and_not_captions():
    """Negative control: the mean of ranks' means is another gradient where captions differ in
    length.
    """
    objective = losses.build({"captioning": {}})
    nll = torch.rand(4, 5, dtype=torch.float64)
    ids = torch.tensor([[5, 0, 0, 0, 0], [5, 6, 0, 0, 0], [5, 6, 7, 8, 9], [5, 6, 7, 8, 0]])
    unit = torch.ones(4, 1, dtype=torch.float64)

    def loss(rows):
        keys = {"image": unit[rows], "text": unit[rows], "scale": 1.0}
        return objective(**keys, caption_nll=nll[rows], caption_ids=ids[rows])[0].item()

    expected = nll[ids > 0].mean().item()
    assert loss(slice(None)) == pytest.approx(expected, rel=1e-12)
    halves = (loss(slice(2)) + loss(slice(2, None))) / 2
    assert abs(halves - expected) > 1e-3


REFUSED = {
    "tokens of unlike widths": (
        section(embed_dim=48),
        "found decoder 32, image tokens 48, text tokens 32; make them equal",
    ),
    "two pools in a tower of another width": (
        section(image_tower=section()["image_tower"] | {"attentional_pool": "cascade"}),
        "needs an image tower as wide as the embedding, found 48 and 32",
    ),
    "heads that do not divide the width": (
        section(decoder={"heads": 3}),
        "has 3 heads, which do not divide its width 32",
    ),
    "two decoders": (
        section(heads={"captions": {}}),
        "has a text decoder of its own, and model.heads.captions is another",
    ),
    "a tower without tokens": (
        section(image_tower={"name": "timm", "model": "test_vit", "image_size": 32}),
        "found TimmModel and TextTransformer; take those, or drop it",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_no_decoder_can_read_is_refused(case):
    keys, message = REFUSED[case]
    with pytest.raises(ValueError) as caught:
        tiny(**keys)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"attentional_pool": "shared", "pool_queries": 1}, "pool_queries is 1 and pool_heads 2"),
        ({"attentional_pool": "both"}, "'both'"),
    ],
)
def test_options_of_a_pool_are_checked(keys, message):
    with pytest.raises(ValueError) as caught:
        settings(**section() | {"image_tower": section()["image_tower"] | keys})
    assert message in str(caught.value)


def test_a_decoder_that_no_term_trains_is_refused():
    model = tiny(**section())
    with pytest.raises(ValueError, match="no term trains it; add captioning"):
        check_needs(losses.build({"infonce": {}}), frozenset(), model)
    check_needs(losses.build({"infonce": {}, "captioning": {}}), frozenset(), model)


def test_a_decoder_joins_towers_that_have_none(tmp_path, capsys):
    """By `pretrained` and by `init_from`: the towers are taken over, and the decoder starts at
    random, which is said; back again it is left out.
    """
    plain = tiny(**section(None, decoder=None))
    save_file(plain.open_clip_state_dict(), tmp_path / "plain.safetensors")
    of_towers = [name for name in plain.state_dict() if name.startswith(("visual.", "text."))]

    keys = section(None, pretrained=str(tmp_path / "plain.safetensors"))
    loaded, other = tiny(seed=1, **keys), tiny(seed=2, **section(None))
    assert (
        "plain.safetensors holds no text decoder; the model keeps its own"
        in capsys.readouterr().out
    )
    folder.export(plain, tmp_path / "plain")
    start_from(other, str(tmp_path / "plain"))
    assert ": text_decoder start at random" in capsys.readouterr().out
    for model in (loaded, other):
        state = model.state_dict()
        assert len(of_towers) > 20
        assert all(torch.equal(state[name], plain.state_dict()[name]) for name in of_towers)
        assert all(value.isfinite().all() for value in model.text_decoder.state_dict().values())

    folder.export(loaded, tmp_path / "coca")
    start_from(plain, str(tmp_path / "coca"))
    assert ": text_decoder are left out" in capsys.readouterr().out
    again = tiny(seed=3, **section(None))
    start_from(again, str(tmp_path / "coca"))
    assert max(apart(again, theirs(loaded))) < 1e-6

    # What is described with a decoder, as an export is, must hold one.
    described = loaded.description()
    with pytest.raises(ValueError, match=r"do not fit this model: .*text_decoder"):
        from_description(described, tmp_path / "plain.safetensors")


@pytest.mark.parametrize("length", [6, 14])
def test_the_class_token_keeps_its_position_in_another_context(length, tmp_path, recwarn):
    model = tiny(**section())
    save_file(model.open_clip_state_dict(), tmp_path / "coca.safetensors")
    keys = section(pretrained=str(tmp_path / "coca.safetensors"))
    keys["text_tower"] |= {"context_length": length}
    positions = tiny(seed=1, **keys).text.positional_embedding
    before = model.text.positional_embedding
    assert len(before) == LENGTH + 1 and len(positions) == length + 1
    assert torch.equal(positions[-1], before[-1])

    keys["text_tower"] = section()["text_tower"] | {"context": {"length": 14, "keep": 4}}
    stretched = tiny(seed=1, **keys).text.positional_embedding
    assert len(stretched) == 15 and torch.equal(stretched[-1], before[-1])
    assert torch.equal(stretched[:5], before[:5])
    if length < LENGTH:
        assert torch.equal(positions[:length], before[:length])
