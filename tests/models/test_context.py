"""A text tower's context made longer: the rule against its equation, both ways in, both ways out,
and the warning of captions that are cut.
"""

from __future__ import annotations

import shutil

import pytest
import torch
from safetensors.torch import save_file

from tests.data.material import TEXT, data_of, encoded, loader_of, picture
from tests.models.tiny import TEXT as TEXT_TOWER
from tests.models.tiny import language_model, settings, tiny
from vlp import config, plugin
from vlp.data.format import ShardWriter
from vlp.eval import evaluation
from vlp.export.folder import export
from vlp.models.build import build
from vlp.models.load import load
from vlp.pretrained.context import POSITIONS, stretched
from vlp.pretrained.fitting import Fit
from vlp.resume import start_from
from vlp.schema import parse

OLD, NEW, KEEP = 16, 40, 4  # r = (40 − 4) / (16 − 4) = 3


def by_equation(p: torch.Tensor, length: int, keep: int) -> torch.Tensor:
    """The rule of the docstring, position by position, for a whole r."""
    old = len(p)
    r = (length - keep) // (old - keep)
    rows = [p[j] for j in range(keep)]
    for i in range(old - keep - 1):
        rows += [p[keep + i] + k / r * (p[keep + i + 1] - p[keep + i]) for k in range(r)]
    rows += [p[-1] + k / r * (p[-1] - p[-2]) for k in range(r)]
    return torch.stack(rows)


@pytest.mark.parametrize(("old", "length", "keep"), [(77, 248, 20), (16, 40, 4), (9, 27, 0)])
def test_positions_are_those_of_the_equation(old, length, keep):
    positions = torch.randn(old, 8, generator=torch.Generator().manual_seed(0)).double()
    longer = stretched(positions, length, keep)
    expected = by_equation(positions, length, keep)
    assert longer.shape == (length, 8)
    torch.testing.assert_close(longer, expected, rtol=0, atol=1e-12)
    assert torch.equal(longer[:keep], positions[:keep])


def test_a_stretch_that_is_no_whole_number_lies_on_the_same_lines():
    line = torch.arange(16.0).double().unsqueeze(1) * torch.tensor([[1.0, -2.0]]).double()
    longer = stretched(line, 39, 4)
    expected = 4 + torch.arange(35).double() * 12 / 35
    torch.testing.assert_close(longer[4:, 0], expected, rtol=1e-12, atol=1e-12)


def test_the_same_length_changes_nothing_and_a_shorter_one_is_refused():
    positions = torch.randn(16, 8)
    assert stretched(positions, 16, 4) is positions
    for length, keep in ((12, 4), (40, 15)):
        with pytest.raises(ValueError, match=f"length {length} and keep {keep}, and the weights"):
            stretched(positions, length, keep)


# Into a model


def described(text: dict | None = None, **model) -> config.Model:
    """The tiny model, with further keys of its text tower."""
    return settings(text_tower=TEXT_TOWER | (text or {}), **model)


LONGER = {"context": {"length": NEW, "keep": KEEP}}


@pytest.fixture(scope="module")
def short(tmp_path_factory):
    """An exported model of OLD positions, and its weights alone."""
    torch.manual_seed(5)
    model = build(described()).eval()
    folder = tmp_path_factory.mktemp("short")
    torch.nn.init.normal_(model.text.positional_embedding)
    export(model, folder / "export")
    save_file(model.open_clip_state_dict(), folder / "weights.safetensors")
    # CLIPModel's form alone, as transformers saves it.
    of_open_clip = shutil.ignore_patterns("open_clip*")
    shutil.copytree(folder / "export", folder / "transformers", ignore=of_open_clip)
    return model, folder


@pytest.mark.parametrize("form", ["export", "transformers", "weights.safetensors"])
@pytest.mark.parametrize("way", ["pretrained", "init_from"])
def test_pretrained_and_init_from_stretch_by_the_same_rule(short, way, form):
    model, folder = short
    torch.manual_seed(6)
    if way == "pretrained":
        longer = build(described(text=LONGER, pretrained=str(folder / form)))
    else:
        longer = build(described(text=LONGER))
        start_from(longer, str(folder / form), Fit(KEEP))

    assert longer.text_spec.context_length == NEW
    expected = by_equation(model.text.positional_embedding.detach(), NEW, KEEP)
    torch.testing.assert_close(longer.text.positional_embedding.detach(), expected)
    others = {name: value for name, value in model.state_dict().items() if name != POSITIONS}
    assert len(others) > 20
    for name, value in others.items():
        torch.testing.assert_close(longer.state_dict()[name], value, rtol=1e-6, atol=1e-7)

    # A caption that ends among the kept positions means what it did.
    ids = torch.zeros(1, OLD, dtype=torch.int64)
    ids[0, :KEEP] = torch.tensor([49406, 320, 1929, 49407])
    ids_longer = torch.nn.functional.pad(ids, (0, NEW - OLD))
    torch.testing.assert_close(
        longer.eval().encode_text(ids_longer), model.encode_text(ids), rtol=1e-5, atol=1e-6
    )


@pytest.mark.parametrize("way", ["pretrained", "init_from"])
def test_another_length_without_context_is_taken_as_open_clip_takes_it_or_cut(short, way, capsys):
    """Longer: interpolated as a whole, which is said. Shorter: the first positions, so that a text
    that fits keeps its embedding.
    """
    from open_clip.model import resize_text_pos_embed

    model, folder = short
    built = {}
    for length in (NEW, 9):
        keys = {"context_length": length}
        if way == "pretrained":
            built[length] = build(described(text=keys, pretrained=str(folder / "export"))).eval()
        else:
            built[length] = build(described(text=keys)).eval()
            start_from(built[length], str(folder / "export"))

    theirs = {POSITIONS: model.state_dict()[POSITIONS]}
    resize_text_pos_embed(theirs, built[NEW])
    assert torch.equal(built[NEW].text.positional_embedding, theirs[POSITIONS])
    assert "16 positions of the text tower are interpolated to 40" in capsys.readouterr().err

    ids = torch.zeros(1, OLD, dtype=torch.int64)
    ids[0, :4] = torch.tensor([49406, 320, 1929, 49407])
    shorter = built[9].encode_text(ids[:, :9])
    torch.testing.assert_close(shorter, model.encode_text(ids), rtol=1e-5, atol=1e-6)


def test_the_same_length_is_the_identity(short):
    model, folder = short
    same = {"context": {"length": OLD, "keep": KEEP}}
    again = build(described(text=same, pretrained=str(folder / "export")))
    assert torch.equal(again.text.positional_embedding, model.text.positional_embedding)


# Out of it


def test_exports_keep_the_length(short, tmp_path):
    """In open_clip and in transformers the long caption has the embedding that it has here."""
    import open_clip
    from transformers import CLIPModel, CLIPProcessor

    _, folder = short
    longer = build(described(text=LONGER, pretrained=str(folder / "export"))).eval()
    export(longer, tmp_path / "out")
    caption = " ".join(["a dog and a cat and a bird"] * 4)
    assert longer.text_spec.context_length < len(caption.split()) + 14

    again = load(tmp_path / "out").eval()
    assert again.text_spec.context_length == NEW
    theirs, _, _ = open_clip.create_model_and_transforms(f"local-dir:{tmp_path / 'out'}")
    tokenizer = open_clip.get_tokenizer(f"local-dir:{tmp_path / 'out'}")
    ids = tokenizer([caption])
    assert ids.shape == (1, NEW) and int((ids[0] > 0).sum()) > OLD
    with torch.no_grad():
        expected = longer.encode_text(ids)
        torch.testing.assert_close(again.encode_text(ids), expected)
        of_open_clip = theirs.eval().encode_text(ids, normalize=True)
        torch.testing.assert_close(of_open_clip, expected, rtol=1e-5, atol=1e-5)

        clip = CLIPModel.from_pretrained(tmp_path / "out").eval()
        processor = CLIPProcessor.from_pretrained(tmp_path / "out")
        assert clip.config.text_config.max_position_embeddings == NEW
        inputs = processor(
            text=[caption], return_tensors="pt", padding="max_length", truncation=True
        )
        assert inputs["input_ids"].shape == (1, NEW)
        of_clip = clip.get_text_features(**inputs)
        of_clip = getattr(of_clip, "pooler_output", of_clip)
        of_clip = of_clip / of_clip.norm(dim=1, keepdim=True)
        torch.testing.assert_close(of_clip, expected, rtol=1e-4, atol=1e-5)


# Refusals


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"text": {"context": {"length": 20, "keep": 20}}}, "expected 0 <= keep < length"),
        ({"text": {"context": {"length": 20, "kept": 2}}}, "unknown key 'kept'"),
    ],
)
def test_a_context_that_makes_no_sense_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        described(**changes)


def test_the_context_belongs_to_the_text_tower():
    image = {"name": "open_clip", "architecture": "ViT-B-32", "context": {"length": 248}}
    alone = parse(config.Model, {"image_tower": image})
    assert alone.context.length == 248 and alone.context.keep == 20
    text = {"name": "open_clip", "architecture": "ViT-B-32"}
    with pytest.raises(ValueError, match=r"write text_tower\.context"):
        parse(config.Model, {"image_tower": image, "text_tower": text})


def test_a_hugging_face_tower_keeps_its_own_positions(tmp_path):
    from vlp.models.assemble import assemble

    text = {"name": "huggingface", "model": str(language_model(tmp_path))}
    text |= {"pooler": "cls_pooler", "context": {"length": 248}}
    model = parse(
        config.Model,
        {"image_tower": {"name": "open_clip", "architecture": "ViT-B-32"}, "text_tower": text},
    )
    with pytest.raises(ValueError, match="'huggingface' has positions of its own"):
        assemble(model)


# Captions that are cut


def long_captions(folder, n: int = 8):
    """Every fourth caption has more than the 16 tokens of the loader's tower."""
    with ShardWriter(folder, 8) as writer:
        for i in range(n):
            captions = [f"a dog {i}", " ".join(["bird"] * 30) if i % 4 == 0 else "a cat"]
            writer.add(f"k{i}", encoded(picture(i)), "png", captions)
    return folder


def test_cut_captions_are_said_once_a_run_with_their_share(tmp_path, capsys):
    data = data_of(long_captions(tmp_path), captions={"choose": "all", "n": 2})
    steps = loader_of(data, 8, reads=frozenset({"captions"}))
    next(steps)
    assert steps.counters()["truncated_captions"] >= 2, "of the captions beside the text as well"
    assert "were cut" not in capsys.readouterr().err, "not before there are many, or all"
    steps.close()
    told = capsys.readouterr().err
    assert "of 24 captions" in told and f"were cut to {TEXT.context_length} tokens" in told
    assert "text_tower.context" in told
    next(steps)
    steps.close()
    assert "were cut" not in capsys.readouterr().err, "once a run"


def test_evaluation_says_once_how_many_texts_were_cut(tmp_path, capsys):
    tasks = plugin.keyed("vlp.eval.tasks", {"retrieval": {"data": str(long_captions(tmp_path))}})
    for _ in range(2):
        (record,) = evaluation.in_training(tiny(), tasks)
        assert record["counts"]["truncated_texts"] == 1
    told = capsys.readouterr().err
    assert told.count("texts were cut to the model's context: 1 of 10 in retrieval;") == 1
