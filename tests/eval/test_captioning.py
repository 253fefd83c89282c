"""Captions: searched for greedily and by beams, scored as COCO scores them."""

from __future__ import annotations

import itertools
import json
import math
import shutil
import sys

import open_clip.coca_model
import pytest
import torch
import transformers

import vlp
from tests import ranks
from tests.eval import coca, material
from tests.models import tiny
from tests.models.test_coca import section
from vlp import checkpoint, cli, config, losses, plugin
from vlp.checks import check_captioning, check_tasks
from vlp.data import text
from vlp.data.text import Frame, frame
from vlp.eval import caption_scores, evaluation, models
from vlp.eval.describers import check_reference
from vlp.eval.embed import Context
from vlp.eval.evaluation import in_training
from vlp.eval.inference import Model
from vlp.eval.models import ModelError
from vlp.eval.pictures import DataError
from vlp.export import folder
from vlp.models import describe
from vlp.models.describe import Search
from vlp.models.load import load
from vlp.schema import ConfigError
from vlp.train import train
from vlp.types import TextSpec

TEXTS = coca.TEXTS


@pytest.fixture
def shards(tmp_path):
    """Four pictures, each with a caption of known words and another one."""
    members = []
    for i, caption in enumerate(TEXTS):
        members.append((f"{i}.png", material.png(material.picture(60 * i, (16, 16)))))
        members.append(
            (f"{i}.json", json.dumps({"captions": [caption, f"{caption} of a cat"]}).encode())
        )
    material.write_tar(tmp_path / "pairs" / "0.tar", members)
    return str(tmp_path / "pairs")


def task(**options):
    (chosen,) = plugin.keyed("vlp.eval.tasks", {"captioning": options})
    return chosen


def learn(model, steps=100):
    """Teach a model to write TEXTS for the four pictures."""
    images = torch.stack(
        [
            torch.tensor(material.picture(60 * i, (16, 16)).getpixel((0, 0)), dtype=torch.uint8)
            for i in range(len(TEXTS))
        ]
    )
    pixels = images[:, :, None, None].expand(-1, -1, 16, 16)
    ids = text.build(model.text_spec)(list(TEXTS))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    model.train()
    for _ in range(steps):
        nll = model(pixels, ids, pairs=len(ids)).caption_nll
        nll[ids[:, 1:] != 0].mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


def test_a_model_that_learned_captions_writes_them(tmp_path, shards):
    """From pixels to CIDEr: what is trained by caption_nll is what the search reads."""
    model = coca.coca(tmp_path)
    encoder = models.from_model(model, keep=True)
    options = {"data": shards, "captions_per_image": 1, "min_tokens": 2, "max_tokens": 10}
    (before,), _ = evaluation.evaluate(encoder, [task(**options)], Context(workers=0))
    learn(model)

    for beams in (1, 3):
        chosen = task(**options, beams=beams)
        (record,), items = evaluation.evaluate(encoder, [chosen], Context(workers=0))
        assert record["metrics"]["bleu_1"] == pytest.approx(1, abs=1e-6)
        assert record["metrics"]["cider"] > 6 > before["metrics"]["cider"] + 3
        assert record["metrics"]["different"] == 1
        assert record["counts"] == {
            "images": 4, "references": 4, "cut_at_max_tokens": 0, "skipped": 0,
        }  # fmt: skip
        assert items["captioning/cider"].shape == (4, 2)
        assert record["protocol"]["options"]["beams"] == beams


def test_the_search_is_the_one_that_it_says(tmp_path):
    """A beam as wide as the vocabulary finds the best of all captions of up to two words; greedy
    takes the best word at each place.
    """
    model = coca.coca(tmp_path, seed=4)
    with torch.no_grad():
        model.text_decoder.text_projection.mul_(6)  # away from equal chances
    given = frame(model.text_spec)
    assert given == Frame(begin=len(tiny.WORDS), end=1, padding=0, n_ids=len(tiny.WORDS) + 1)
    pixels, _ = tiny.inputs(model)
    vocabulary = range(len(tiny.WORDS) + 1)
    words = [token for token in vocabulary if token not in given[:3]]

    # Behind the second word the end is forced, and costs nothing.
    one_word = [(word,) for word in words]
    captions = one_word + list(itertools.product(words, words))
    worth = {caption: places(model, pixels, caption, given)[:, :2].sum(1) for caption in captions}
    for penalty in (1.0, 0.0):
        search = Search(len(vocabulary), min_tokens=2, max_tokens=4, length_penalty=penalty)
        for i, ids in enumerate(ids_of(model, pixels, search)):
            best = max(captions, key=lambda c: worth[c][i] / (len(c) + 1) ** penalty)
            assert tuple(text.words(ids, given)) == best

    for i, ids in enumerate(ids_of(model, pixels, Search(min_tokens=3, max_tokens=4))):
        first = max(words, key=lambda w: places(model, pixels, (w,), given)[i, 0])
        second = max(words, key=lambda w: places(model, pixels, (first, w), given)[i, 1])
        assert ids == [given.begin, first, second, given.end]


@torch.no_grad()
def places(model, pixels, caption, given):
    """log p of each token of a caption and of its end token, [n, L − 1], for each picture, by one
    pass of the decoder.
    """
    ids = torch.full((len(pixels), model.text_spec.context_length), given.padding)
    ids[:, : len(caption) + 2] = torch.tensor([given.begin, *caption, given.end])
    return -model(pixels, ids, pairs=len(ids)).caption_nll


def ids_of(model, pixels, search):
    tokens, given = model.image_tokens(pixels), frame(model.text_spec)
    return describe.write(tokens, model.text, model.text_decoder, given, search).tolist()


def test_ids_that_are_no_words_are_never_written(tmp_path):
    """coca_base has more ids than its tokenizer; begin and padding stand around words."""
    model = coca.coca(tmp_path, vocab_size=400)
    given = frame(model.text_spec)
    pixels, _ = tiny.inputs(model, rows=8)
    for beams in (1, 2):
        for ids in ids_of(model, pixels, Search(beams, max_tokens=10)):
            written = text.words(ids, given)
            assert written and set(written) <= set(range(1, len(tiny.WORDS))), ids
            assert text.build(model.text_spec).decode(written)


def test_open_clip_generates_the_same_tokens(tmp_path, monkeypatch):
    """Its own `generate` over the model that it loads from our export, with the parts of
    transformers that it needs for greedy search; of transformers 5 it imports none.
    """
    needed = (
        "LogitsProcessorList", "MinLengthLogitsProcessor", "RepetitionPenaltyLogitsProcessor",
        "MaxLengthCriteria", "StoppingCriteriaList",
    )  # fmt: skip
    module = open_clip.coca_model
    for name in needed:
        monkeypatch.setattr(module, name, getattr(transformers, name), raising=False)
    monkeypatch.setattr(module, "_has_transformers", True)
    monkeypatch.setitem(module.GENERATION_TYPES, "top_k", transformers.TopKLogitsWarper)

    model = tiny.tiny(**section())
    with torch.no_grad():
        model.text_decoder.text_projection.mul_(6)
    notes = folder.export(model, tmp_path / "export")
    assert any("text decoder" in note for note in notes)
    reference = f"local-dir:{tmp_path / 'export'}"
    peer, _, _ = open_clip.create_model_and_transforms(reference)
    assert isinstance(peer, open_clip.CoCa)

    pixels, _ = tiny.inputs(model)
    pixels = model.pixels(pixels)
    limits = {"seq_len": 10, "min_seq_len": 5, "fixed_output_length": True}
    expected = peer.eval().generate(pixels, generation_type="top_k", top_k=1, **limits)
    again = load(tmp_path / "export").eval()
    for ours in (model, again):
        assert ids_of(ours, pixels, Search(min_tokens=5, max_tokens=10)) == expected.tolist()
    beams = [ids_of(one, pixels, Search(beams=3, max_tokens=10)) for one in (model, again)]
    assert beams[0] == beams[1]


def test_words_are_coco_s(tmp_path, monkeypatch):
    """What our splitting gives is what COCO's Java tokenizer gives, where there is a Java."""
    captions = (
        "A man's dog, isn't it?",
        "Two red-and-white U.S. flags (torn) hang above the 2 doors...",
        "The sign says \"STOP!\" - they're 10% off; it's 5:30.",
        "a T-shirt, a mother-in-law [and a {child}] & 3.5 dogs",
        "",
    )
    plain = caption_scores._split([captions], "plain")
    assert plain[0][0] == "a man 's dog is n't it"
    if shutil.which("java"):
        assert plain == caption_scores._split([captions], "ptb")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ValueError, match=r"no `java` on the PATH; install .*tokenizer: plain"):
        caption_scores.check_installed("ptb")

    (tmp_path / "java").write_text("#!/bin/sh\nexit 1\n")
    (tmp_path / "java").chmod(0o755)
    with pytest.raises(ValueError, match=r"words of 1 of 5 texts; look at what Java said"):
        caption_scores._split([captions], "ptb")


def test_scores_are_those_that_are_known():
    written = ["a b c d", "e f g h", "i j"]
    references = [["a b c d", "x y z w"], ["e f g q"], ["k l m n", "i j"]]
    scores = caption_scores.score(written, references, "plain")
    # Ten words, nine of them and then 6 of 7 pairs, 3 of 4 triples and 1 of 2 are in a reference.
    precisions = (9 / 10, 6 / 7, 3 / 4, 1 / 2)
    for n, bleu in enumerate(scores.bleu, 1):
        assert bleu == pytest.approx(math.prod(precisions[:n]) ** (1 / n), rel=1e-6)
    assert len(scores.cider) == 3 and scores.cider[0] == pytest.approx(5, rel=1e-6)
    assert all(math.isfinite(value) for value in scores.cider)


def test_what_cannot_be_scored_is_refused_at_the_start(tmp_path, shards, monkeypatch):
    (tmp_path / "no_begin").mkdir()
    (tmp_path / "coca").mkdir()
    plain = models.from_model(tiny.tiny())
    model = coca.coca(tmp_path / "coca")
    encoder = models.from_model(model)

    def evaluate(of, **options):
        evaluation.evaluate(of, [task(data=shards, **options)], Context(workers=0))

    with pytest.raises(
        ModelError, match=r"captioning: .* has no text decoder, which captions need"
    ):
        evaluate(plain)
    with pytest.raises(ModelError, match="max_tokens is 11, and the text tower reads 10"):
        evaluate(encoder, max_tokens=11)
    with pytest.raises(ConfigError, match="min_tokens is 9 and max_tokens 9; expected"):
        task(data=shards, min_tokens=9, max_tokens=9)
    with pytest.raises(ConfigError, match="beams is 0; expected at least 1"):
        task(data=shards, beams=0)
    with pytest.raises(ConfigError, match=r"length_penalty is 2.0.* set beams to 2 or more"):
        task(data=shards, length_penalty=2.0)
    one = str(tmp_path / "one" / "0.tar")
    material.write_tar(
        tmp_path / "one" / "0.tar",
        [("0.png", material.png(material.picture(0))), ("0.txt", b"a dog")],
    )
    with pytest.raises(DataError, match="has 1 image with captions; CIDEr"):
        task(data=one).module.read(task(data=one).options)

    monkeypatch.setitem(sys.modules, "pycocoevalcap.cider.cider", None)
    with pytest.raises(ValueError, match=r"install it with pip install 'vlp\[caption\]'"):
        task(data=shards).module.read(task(data=shards).options)


@pytest.mark.parametrize(
    ("special", "message"),
    [
        ({"begin": ""}, "needs one token to begin with, another one to end with"),
        ({"begin": "</s>"}, "needs one token to begin with, another one to end with"),
    ],
)
def test_a_tokenizer_without_the_tokens_around_a_caption_is_refused(tmp_path, special, message):
    tiny.tokenizer(tmp_path, **special)
    spec = TextSpec(str(tmp_path), 10, "whitespace")
    with pytest.raises(ValueError, match=message):
        frame(spec)


def test_a_run_that_could_not_carry_the_task_out_is_refused(tmp_path, shards):
    settings = material.OUR_CONFIG | {"eval": {"captioning": {"data": shards}}}
    parsed = config.parse(settings)
    with pytest.raises(ValueError, match=r"eval\.captioning: the model has no text decoder"):
        check_tasks(parsed, tiny.tiny(), shards_model=False)
    model = coca.coca(tmp_path)
    with pytest.raises(ValueError, match="ranks that hold parts of a model"):
        check_tasks(parsed, model, shards_model=True)
    check_tasks(parsed, model, shards_model=False)

    objective = losses.build({"captioning": {"padding": 7}})
    with pytest.raises(ValueError, match=r"pads with 0; set captioning.padding=0"):
        check_captioning(objective, model)
    check_captioning(losses.build({"captioning": {}}), model)


def test_a_model_without_a_decoder_is_refused_before_its_weights_are_read(shards, capsys):
    """By its tag, whose weights would have to be fetched."""
    command = f"eval ViT-B-32:laion2b_s34b_b79k --task captioning --data {shards}"
    assert cli.main([*command.split(), "--cache", "none"]) == 1
    assert "ViT-B-32:laion2b_s34b_b79k has no text decoder" in capsys.readouterr().err
    check_reference("coca_ViT-B-32:laion2b_s13b_b90k")


def of_rank(folder, shards):
    """The metrics of a rank, whose batches are of one picture."""
    encoder = models.from_model(coca.coca(folder))
    (record,), _ = evaluation.evaluate(
        encoder, [task(data=shards, max_tokens=10)], Context(1, workers=0)
    )
    return record["metrics"], record["counts"]


def test_three_lines_describe_pictures(tmp_path):
    """Of an export of ours, and of the same as open_clip writes it, which open_clip then runs."""
    model = tiny.tiny(**section())
    with torch.no_grad():
        model.text_decoder.text_projection.mul_(6)
    folder.export(model, tmp_path / "ours")
    shutil.copytree(tmp_path / "ours", tmp_path / "theirs")
    described = json.loads((tmp_path / "ours" / "open_clip_config.json").read_text())
    del described["vlp"]
    (tmp_path / "theirs" / "open_clip_config.json").write_text(json.dumps(described))

    pictures = [material.picture(90 * i, (20, 16)) for i in range(3)]
    ours, peer = (vlp.load(str(tmp_path / name)) for name in ("ours", "theirs"))
    for search in (Search(max_tokens=10), Search(beams=3, max_tokens=10)):
        captions = ours.captions(pictures, search, batch=2)
        assert captions == peer.captions(pictures, search) and len(set(captions)) > 1
    assert ours.captions([], search) == []
    with pytest.raises(ValueError, match="max_tokens is 30, and the text tower reads 10 tokens"):
        ours.captions(pictures)
    plain = Model(models.from_model(tiny.tiny()))
    with pytest.raises(ValueError, match="has no text decoder, which captions need; take a CoCa"):
        plain.captions(pictures)


def test_a_run_describes_its_pictures_and_goes_on_bit_for_bit(tmp_path, shards, capsys):
    """Evaluated in mid-run, cut short, resumed, exported, and evaluated again by the command."""
    (tmp_path / "words").mkdir()

    def settings(out, *overrides):
        whole = {
            "out": str(tmp_path / out),
            "data": {"sources": [{"name": "shards", "path": shards}], "workers": 0},
            "model": coca.section(tmp_path / "words"),
            "train": {"duration": 4, "batch": 4, "precision": "float32", "engine": "ddp"},
            "objective": {"infonce": {}, "captioning": {"weight": 2}},
            "checkpoint": {"every": 2},
            "eval": {"captioning": {"data": shards, "max_tokens": 10, "every": 2}},
        }
        (tmp_path / "run.yaml").write_text(json.dumps(whole))
        return config.load(tmp_path / "run.yaml", list(overrides))

    whole = train(settings("whole"), in_training)
    shutil.copytree(whole, tmp_path / "cut")
    shutil.rmtree(tmp_path / "cut" / "checkpoints" / "step_00000004")
    again = train(settings("cut", "resume=auto"), in_training)
    one, other = (checkpoint.load(checkpoint.newest(of)) for of in (whole, again))
    assert [name for name in one.model if name.startswith("text_decoder.")]
    assert all(value.equal(other.model[name]) for name, value in one.model.items())
    (record,) = json.loads((whole / "results.json").read_text())
    (resumed,) = json.loads((again / "results.json").read_text())
    assert record["metrics"] == resumed["metrics"] and record["metrics"]["mean_words"] > 0

    folder.export_run(whole, tmp_path / "export")
    out = tmp_path / "scores.json"
    command = f"eval {tmp_path / 'export'} --task captioning --data {shards} max_tokens=10"
    status = cli.main([*command.split(), "--out", str(out), "--cache", "none", "--device", "cpu"])
    (scored,) = json.loads(out.read_text())["results"]
    assert status == 0 and scored["metrics"] == pytest.approx(record["metrics"], abs=1e-6)
    assert "0.tar:0.png: " in capsys.readouterr().err  # what it wrote, for the eye


@pytest.mark.slow  # the ways of ids are those of embeddings, which faster tests go
def test_ranks_write_the_same_captions(tmp_path, shards):
    expected = of_rank(tmp_path, shards)
    assert ranks.run(2, of_rank, tmp_path, shards) == [expected] * 2
