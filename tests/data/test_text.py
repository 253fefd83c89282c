"""Tokenizers: the ids of open_clip's own, on real, odd and multilingual captions; truncation
counted.
"""

from __future__ import annotations

import json
import random

import pytest
import torch
from open_clip.tokenizer import HFTokenizer, SimpleTokenizer

from tests.data.material import REAL, needs_data
from vlp.data.text import ClipTokenizer, build
from vlp.types import TextSpec

ODD = [
    "",
    " ",
    "\t a\n b \r\n",
    "A DOG's bowl, they'll they'RE we'D",
    "x" * 300,
    "&lt;b&gt; &amp;amp;",
    "1234 5.6%",
    "naïve café — “quotes” ‘single’",
    "sï¿½ mojibake cafÃ© â€œhiâ€\x9d",
    "日本語の猫",
    "кошка сидит",
    "🐱🐶👩‍👩‍👧",
    "a\u00a0b\u2003c\u200bd",
    "\x1b[31mred\x1b[0m",
    "\x00\x07bell",
    "tab\there",
    "ﬁne ligature",
    "İstanbul STRASSE ß",
    "a_b-c/d\\e",
    "don''t 'stop'",
    "\ufeffbom",
    "＂ｆｕｌｌ　ｗｉｄｔｈ＂",
    "under_score __init__",
    "…ellipsis…",
    "a\x0bb\x0cc\x1cd\x85e",
    "<start>",
    "ǆ Ǆ ſ K",
]


def varied(n: int) -> list[str]:
    """n captions: real ones, and mixtures of their words with odd pieces, cases and lengths."""
    chance = random.Random(0)
    coco, nlvr = (
        (REAL / name).read_text().splitlines() for name in ("coco_open.jsonl", "nlvr.jsonl")
    )
    real = [caption for line in coco for caption in json.loads(line)["captions"]]
    real += sorted({json.loads(line)["sentence"] for line in nlvr})
    words = [word for caption in real for word in caption.split()]
    result = ODD + real[: n // 3]
    while len(result) < n:
        pieces = [chance.choice(words) for _ in range(chance.randrange(1, 40))]
        for _ in range(chance.randrange(3)):
            pieces.insert(chance.randrange(len(pieces)), chance.choice(ODD))
        if chance.random() < 0.3:
            pieces = [
                chance.choice([str.upper, str.title, str.swapcase])(piece) for piece in pieces
            ]
        if chance.random() < 0.2:
            pieces.append(
                "".join(chr(chance.randrange(32, 0x2FFF)) for _ in range(chance.randrange(1, 12)))
            )
        result.append(chance.choice([" ", " ", "  ", "\n", ""]).join(pieces))
    return result[:n]


@needs_data
@pytest.mark.parametrize("n", [1500, pytest.param(10_000, marks=pytest.mark.slow)])
@pytest.mark.parametrize("clean", ["lower", "whitespace", "canonicalize"])
def test_ids_equal_open_clips(n, clean):
    texts = varied(n)
    assert len(set(texts)) > 0.9 * n

    theirs = SimpleTokenizer(context_length=32, clean=clean)
    ours = build(TextSpec("clip", 32, clean=clean))
    expected = theirs(texts)
    assert torch.equal(ours(texts), expected)
    assert torch.equal(ours(texts), expected)  # now from its cache
    assert ours.vocab_size == theirs.vocab_size == 49408

    n_long = sum(len(theirs.encode(text)) > 30 for text in texts)
    assert ours.tokenize(texts)[1] == n_long > 0


def test_special_tokens_in_captions_are_plain_text():
    text = "a cat <end_of_text> and <start_of_text> a dog"
    ours, theirs = build(TextSpec("clip", 32)), SimpleTokenizer(context_length=32)
    assert (ours([text]) == 49407).sum() == 1 and (ours([text]) == 49406).sum() == 1
    assert (
        theirs([text]) == 49407
    ).sum() == 2  # what we do not want: the tower would read the caption up to there
    pieces = [ours._slow.decoder[i] for i in ours.encode("<end_of_text>")]
    assert pieces == ["<</w>", "end</w>", "_</w>", "of</w>", "_</w>", "text</w>", "></w>"]


def test_truncation_keeps_the_end_token():
    ours = build(TextSpec("clip", 8))
    ids, n_truncated = ours.tokenize(
        ["one two three four five six", "one two three four five six seven", ""]
    )
    assert (
        n_truncated == 1
        and ids[:, -1].tolist() == [49407, 49407, 0]
        and ids[2, :2].tolist() == [49406, 49407]
    )


def test_the_cache_is_bounded(monkeypatch):
    monkeypatch.setattr("vlp.data.text._LIMIT", 50)
    ours = build(TextSpec("clip", 8))
    expected = SimpleTokenizer(context_length=8)
    for i in range(200):
        assert torch.equal(ours([f"word{i} x{i}"]), expected([f"word{i} x{i}"]))
        assert len(ours._words) <= 50 and len(ours._slow.cache) <= 2 * 60


def test_options_reach_the_tokenizer_and_random_ones_are_refused():
    ours = build(TextSpec("clip", 8, options={"additional_special_tokens": ["<extra>"]}))
    assert isinstance(ours, ClipTokenizer) and ours.vocab_size == 49409
    with pytest.raises(ValueError, match="reduction_mask"):
        build(TextSpec("clip", 8, options={"reduction_mask": "random"}))


@pytest.fixture(scope="module")
def hub_folder(tmp_path_factory):
    """A small WordPiece tokenizer as a local Hugging Face folder."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    pieces = [
        "[PAD]",
        "[UNK]",
        "[CLS]",
        "[SEP]",
        "ein",
        "hund",
        "und",
        "eine",
        "katze",
        "##n",
        "groß",
        "##er",
    ]
    tokenizer = Tokenizer(
        models.WordPiece({piece: i for i, piece in enumerate(pieces)}, unk_token="[UNK]")
    )
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.TemplateProcessing(
        "[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
    )
    folder = tmp_path_factory.mktemp("tokenizer")
    fast.save_pretrained(folder)
    return str(folder)


def test_hugging_face_tokenizers_equal_open_clips_wrapper_and_count_truncation(hub_folder):
    ours = build(TextSpec(hub_folder, 6, clean="whitespace"))
    texts = ["ein  großer hund", "ein hund und eine katze und ein hund", "ein hund und eine", ""]
    assert torch.equal(
        ours(texts), HFTokenizer(hub_folder, context_length=6, clean="whitespace")(texts)
    )
    ids, n_truncated = ours.tokenize(texts)
    assert ids[0].tolist() == [2, 4, 10, 11, 5, 3] and n_truncated == 1 and ours.vocab_size == 12
