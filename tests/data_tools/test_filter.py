"""`vlp data filter`: every rule against a plain reading of it, counted by reason; scores; lists;
what is refused.
"""

from __future__ import annotations

import json
import random
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.data.material import encoded, picture, write_tar
from tests.data_tools.tools import call, read
from tests.eval.material import tiny_open_clip
from vlp.data.format import ShardWriter
from vlp.data_tools import filter as filtering
from vlp.data_tools._english import traits
from vlp.data_tools.filter.uids import is_listed

SAMPLES = [  # key, size, captions, uid
    ("wide", (300, 60), ["a red bus on a road"], "0" * 32),
    ("small", (40, 40), ["a red bus on a road"], f"{1:016x}{2:016x}"),
    ("plain", (80, 80), ["a man riding a horse", "photo"], f"{2**64 - 1:016x}{2**64 - 1:016x}"),
    ("link", (80, 60), ["see https://x.org now please", "two dogs"], "not a uid"),
    ("german", (80, 60), ["ein Hund auf dem Sofa"], None),
    ("none", (80, 60), [], None),
]


@pytest.fixture
def source(tmp_path: Path) -> Path:
    with ShardWriter(tmp_path / "in", 4) as writer:
        for i, (key, size, captions, uid) in enumerate(SAMPLES):
            writer.add(
                key, encoded(picture(i, size)), "png", captions, {} if uid is None else {"uid": uid}
            )
        writer.add("broken", b"no picture", "jpg", ["a red bus on a road"])
    return tmp_path / "in"


@pytest.mark.parametrize(
    "options, left, reasons",
    [
        (
            ["--min-side", 60],
            {"wide": 1, "plain": 2, "link": 2, "german": 1, "none": 0},
            {"dropped: shorter side below 60 px": 1, "dropped: no readable picture": 1},
        ),
        (
            ["--max-aspect", 2],
            {"small": 1, "plain": 2, "link": 2, "german": 1, "none": 0},
            {"dropped: longer than 2 times its shorter side": 1, "dropped: no readable picture": 1},
        ),
        (
            ["--min-words", 4, "--max-words", 5],
            {"plain": 1, "link": 1, "german": 1},
            {
                "captions dropped: fewer than 4 words": 2,
                "captions dropped: more than 5 words": 3,
                "dropped: no caption left": 3,
                "dropped: no caption": 1,
            },
        ),
        (
            ["--reject", "https?://|dogs"],
            {"wide": 1, "small": 1, "plain": 2, "german": 1, "broken": 1},
            {
                "captions dropped: holds what it must not": 2,
                "dropped: no caption left": 1,
                "dropped: no caption": 1,
            },
        ),
        (
            ["--match", "(?i)DOG|hund"],
            {"link": 1, "german": 1},
            {
                "captions dropped: does not hold what it must": 6,
                "dropped: no caption left": 4,
                "dropped: no caption": 1,
            },
        ),
        (
            ["--max-repeats", 2],
            {"plain": 2, "link": 2, "german": 1},
            {
                "captions dropped: in more than 2 samples": 3,
                "dropped: no caption left": 3,
                "dropped: no caption": 1,
            },
        ),
        (
            ["--languages", "de"],
            {"plain": 1, "link": 2, "german": 1},
            {
                "captions dropped: another language": 4,
                "captions kept: language unclear (--unclear drop refuses them)": 3,
                "dropped: no caption left": 3,
                "dropped: no caption": 1,
            },
        ),
        (
            ["--languages", "de", "--unclear", "drop"],
            {"german": 1},
            {
                "captions dropped: another language": 4,
                "captions dropped: language unclear": 3,
                "dropped: no caption left": 5,
                "dropped: no caption": 1,
            },
        ),
        (
            ["--min-relations", 1, "--action"],
            {"plain": 1},
            {
                "captions dropped: no action": 3,
                "captions dropped: fewer than 1 relations": 4,
                "dropped: no caption left": 5,
                "dropped: no caption": 1,
            },
        ),
    ],
)
def test_rules_keep_and_count(
    source: Path, tmp_path: Path, capsys, options: list, left: dict, reasons: dict
) -> None:
    assert call(filtering, source, "--to", tmp_path / "out", *options) == 0
    before, after = read(source), read(tmp_path / "out")
    assert {key: len(sample.captions) for key, sample in after.items()} == left
    for key, sample in after.items():
        assert sample.image == before[key].image and set(sample.captions) <= set(
            before[key].captions
        )
    said = dict(re.findall(r"^  (.*\S) +([\d,]+)$", capsys.readouterr().out, re.MULTILINE))
    assert said.pop("samples read") == "7" and said.pop("samples written") == str(len(left))
    assert {reason: int(n) for reason, n in said.items()} == reasons


FIELDS = {  # key -> JSON
    "a": {
        "similarity": 0.3,
        "punsafe": 0.1,
        "license": "by",
        "exif": {"iso": 100},
        "tags": ["cat", "dog"],
        "ok": True,
    },
    "b": {
        "similarity": "0.25",
        "punsafe": 0.5,
        "license": "cc0",
        "exif": {"iso": "800"},
        "tags": [],
        "ok": False,
    },
    "c": {"similarity": float("nan"), "license": None, "tags": ["bird"], "a b": 1, "x.y": 2},
    "d": {"similarity": "high", "punsafe": 0.7, "license": "3"},
}


@pytest.mark.parametrize(
    "options, left, reasons",
    [
        (
            ["--keep", "similarity > 0.28"],
            "a",
            {"--keep similarity > 0.28: not so": 1, "--keep similarity > 0.28: no such value": 2},
        ),
        (["--keep", "similarity>=.25"], "ab", {"--keep similarity>=.25: no such value": 2}),
        (["--drop", "punsafe >= 0.5"], "ac", {"--drop punsafe >= 0.5": 2}),
        (
            ["--drop", "punsafe<.2", "--drop", "punsafe > .6"],
            "bc",
            {"--drop punsafe<.2": 1, "--drop punsafe > .6": 1},
        ),
        (
            ["--keep", "license == by"],
            "a",
            {"--keep license == by: not so": 2, "--keep license == by: no such value": 1},
        ),
        (
            ["--keep", "license in by, cc0"],
            "ab",
            {"--keep license in by, cc0: not so": 1, "--keep license in by, cc0: no such value": 1},
        ),
        (
            ["--keep", "license == 3"],
            "d",
            {"--keep license == 3: not so": 2, "--keep license == 3: no such value": 1},
        ),
        (["--keep", "license == null"], "c", {"--keep license == null: not so": 3}),
        (["--drop", "license != by"], "ac", {"--drop license != by": 2}),
        (
            ["--keep", "exif.iso <= 100"],
            "a",
            {"--keep exif.iso <= 100: not so": 1, "--keep exif.iso <= 100: no such value": 2},
        ),
        (
            ["--keep", "tags in cat,bird"],
            "ac",
            {"--keep tags in cat,bird: not so": 1, "--keep tags in cat,bird: no such value": 1},
        ),
        (
            ["--keep", "ok == true"],
            "a",
            {"--keep ok == true: not so": 1, "--keep ok == true: no such value": 2},
        ),
        (["--drop", "punsafe absent"], "abd", {"--drop punsafe absent": 1}),
        (["--keep", "a b present"], "c", {"--keep a b present: not so": 3}),
        (["--keep", "x.y < 3"], "c", {"--keep x.y < 3: no such value": 3}),
        (
            ["--keep", "license == '3'"],
            "d",
            {"--keep license == '3': not so": 2, "--keep license == '3': no such value": 1},
        ),
    ],
)
def test_rules_about_fields(
    tmp_path: Path, capsys, options: list[str], left: str, reasons: dict[str, int]
) -> None:
    with ShardWriter(tmp_path / "in", 2) as writer:
        for key, meta in FIELDS.items():
            writer.add(key, b"x", "jpg", ["a dog"], meta)
    call(filtering, tmp_path / "in", "--to", tmp_path / "out", *options)
    assert "".join(read(tmp_path / "out")) == left
    said = dict(re.findall(r"^  dropped: (.*\S) +([\d,]+)$", capsys.readouterr().out, re.MULTILINE))
    assert {reason: int(n) for reason, n in said.items()} == reasons


@pytest.mark.parametrize(
    "options, message",
    [
        (
            ["--keep", "similarty > 0.28"],
            r"no sample has that field, did you mean 'similarity'.*; "
            r"the fields are a b, captions, exif",
        ),
        (
            ["--drop", "license > 3.5", "--drop", "tags > 1"],
            "'tags > 1': no sample has a number in it",
        ),
        (["--drop", "nowhere present"], "no sample has that field"),
        (["--keep", "similarity > high"], "compares with 'high', which is no number"),
        (["--keep", "similarity"], "is no condition; expected FIELD < NUMBER"),
        (["--keep", "similarity = 3"], "is no condition"),
        (["--keep", "similarity => 3"], "is no condition"),
        (["--keep", "similarity >"], "names no value"),
        (["--keep", "similarity present 3"], "names a value"),
        (["--keep", "__import__('os').system('x')"], "is no condition"),
        (["--keep", ""], "is no condition"),
        (["--keep", "similarity > nan"], "no number"),
    ],
)
def test_rules_that_ask_for_nothing_are_refused(
    tmp_path: Path, options: list[str], message: str
) -> None:
    with ShardWriter(tmp_path / "in", 2) as writer:
        for key, meta in FIELDS.items():
            writer.add(key, b"x", "jpg", ["a dog"], meta)
    with pytest.raises(ValueError, match=message):
        call(filtering, tmp_path / "in", "--to", tmp_path / "out", *options)
    assert not (tmp_path / "out").exists()


def test_a_list_of_uids_is_datacomp_s(source: Path, tmp_path: Path) -> None:
    pairs = np.array([(0, 0), (1, 3), (2**64 - 1, 2**64 - 1)], "u8,u8")
    np.save(tmp_path / "subset.npy", pairs)
    call(filtering, source, "--to", tmp_path / "a", "--uids", tmp_path / "subset.npy")
    assert list(read(tmp_path / "a")) == ["wide", "plain"]
    (tmp_path / "subset.txt").write_text(f"{1:016x}{2:016x}\ngerman\n")
    call(filtering, source, "--to", tmp_path / "b", "--uids", tmp_path / "subset.txt")
    assert list(read(tmp_path / "b")) == ["small", "german"]
    np.save(tmp_path / "wrong.npy", np.arange(3))
    with pytest.raises(ValueError, match=r"holds int64 \(3,\); expected DataComp's pairs"):
        call(filtering, source, "--to", tmp_path / "c", "--uids", tmp_path / "wrong.npy")


def test_uids_are_found_as_in_a_set(tmp_path: Path) -> None:
    from vlp.data.members import Content

    rng, n = random.Random(0), 0
    halves = [rng.choice([0, 1, 2, 2**63, 2**64 - 1]) for _ in range(40)]
    listed = {(rng.choice(halves), rng.choice(halves)) for _ in range(12)}
    np.save(tmp_path / "u.npy", np.array(list(listed), "u8,u8"))  # in no order
    for high in set(halves):
        for low in set(halves):
            sample = Content("k", meta={"uid": f"{high:016x}{low:016x}"})
            assert is_listed(str(tmp_path / "u.npy"), sample) == ((high, low) in listed)
            n += 1
    assert n == 25 and 0 < len(listed) < 25


def test_a_score_is_the_model_s_cosine(source: Path, tmp_path: Path, capsys) -> None:
    from PIL import Image

    from vlp.eval.models import load

    ref = f"local-dir:{tiny_open_clip(tmp_path / 'model')}"
    encoder, cosines = load(ref), {}
    for i, (key, size, captions, _) in enumerate(SAMPLES):
        if captions:
            image = picture(i, size)
            assert isinstance(image, Image.Image)
            rows = encoder.encode_texts(captions) @ encoder.encode_images([image])[0]
            cosines |= {(key, caption): float(cosine) for caption, cosine in zip(captions, rows)}
    limit = sorted(cosines.values())[3] - 1e-4
    call(
        filtering,
        source,
        "--to",
        tmp_path / "out",
        "--model",
        ref,
        "--min-score",
        limit,
        "--batch",
        2,
    )
    after = read(tmp_path / "out")
    kept = {
        (key, c): s
        for key, sample in after.items()
        for c, s in zip(sample.captions, sample.meta["clip_scores"])
    }
    assert kept == {
        pair: pytest.approx(cosine, abs=1e-4) for pair, cosine in cosines.items() if cosine >= limit
    }
    assert len(kept) == len(cosines) - 3
    said = capsys.readouterr().out
    assert re.search(r"unreadable: pictures +1\b", said) and re.search(
        r"captions dropped: score below \S+ +3\b", said
    )


@pytest.mark.parametrize(
    "options, message",
    [
        ([], "no rule is given, such as --min-side"),
        (["--min-words", -1], "no number may be negative"),
        (["--min-words", 5, "--max-words", 3], "--max-words not below --min-words"),
        (["--max-aspect", 0.5], "--max-aspect not below 1"),
        (["--match", "("], "'\\(' is no regular expression"),
        (["--min-score", 0.3], "--min-score X and --model REF go together"),
        (["--model", "x"], "--min-score X and --model REF go together"),
        (["--languages", "en,english"], "does not know english; it tells apart en, de"),
        (["--languages", "en,unclear", "--unclear", "drop"], "leave one of them out"),
        (["--min-side", 9, "--unclear", "drop"], "belongs to --languages"),
        (["--uids", "list.csv"], "neither .npy nor .txt"),
        (["--min-side", 9999], "no sample of .* is left; the reasons are listed above"),
        (["--model", "nowhere/at/all", "--min-score", 0.3], "no model 'nowhere/at/all'"),
    ],
)
def test_senseless_rules_are_refused(
    source: Path, tmp_path: Path, options: list[Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        call(filtering, source, "--to", tmp_path / "out", *options)


def test_earlier_scores_go_with_their_captions(tmp_path: Path) -> None:
    with ShardWriter(tmp_path / "in") as writer:
        for key, scores in (("k", [0.1, 0.2, 0.3]), ("other", [0.5])):
            writer.add(
                key,
                encoded(picture(0)),
                "png",
                ["a dog on a sofa", "dog", "two dogs"],
                {"clip_scores": scores},
            )
    call(filtering, tmp_path / "in", "--to", tmp_path / "out", "--min-words", 2)
    after = read(tmp_path / "out")
    assert {key: s.meta["clip_scores"] for key, s in after.items()} == {
        "k": [0.1, 0.3],
        "other": [0.5],
    }
    assert after["k"].captions == ("a dog on a sofa", "two dogs")


def test_negatives_and_counterfactuals_go_with_their_captions(tmp_path: Path, capsys) -> None:
    meta = {
        "captions": [" ", "dog", "a dog on a sofa", "two dogs on it"],
        "negatives": ["of 1", "of 2", "given", "of 3", "of blank"],
        "negatives_of": [1, 2, -1, 3, 0],
        "negatives_valid": [True, False, True, True, True],
        "negative_scores": [1, 2, 3, 4, 5],
        "counterfactuals": ["three dogs", "one dog"],
        "counterfactuals_of": [3, 1],
    }
    wrong = {
        "captions": ["dog", "a dog on a sofa"],
        "negatives": ["x"],
        "negatives_of": [2],
        "negative_scores": [1],
    }
    image = encoded(picture(0))
    members = []
    for key, told in (("a", meta), ("b", wrong)):
        members += [
            (f"{key}.png", image),
            (f"{key}.negative.png", image),
            (f"{key}.json", json.dumps(told).encode()),
        ]
    write_tar(tmp_path / "in" / "0.tar", members)
    call(filtering, tmp_path / "in", "--to", tmp_path / "out", "--min-words", 2)
    after = read(tmp_path / "out")
    assert after["a"].captions == ("a dog on a sofa", "two dogs on it")
    assert {name: after["a"].meta[name] for name in meta if name != "captions"} == {
        "negatives": ["of 2", "given", "of 3"],
        "negatives_of": [0, -1, 1],
        "negatives_valid": [False, True, True],
        "negative_scores": [2, 3, 4],
        "counterfactuals": ["three dogs"],
        "counterfactuals_of": [1],
    }
    assert not after["a"].negative_images  # it was of a negative of the caption that went
    assert (
        after["b"].meta["negatives"] == after["b"].meta["negative_scores"] == []
        and not after["b"].negative_images
    )
    assert re.search(r"negatives dropped: negatives_of is malformed +1\b", capsys.readouterr().out)


@pytest.mark.parametrize(
    "caption, wanted, expected",
    [
        *(
            (caption, ["en"], None)
            for caption in (
                "Golden retriever puppy",
                "Red Nike Air Max 90",
                "Paris Saint-Germain 2019",
                "#sunset #beach",
                "IMG_0042.jpg",
                "12345",
                "!!!",
                "",
                "Die Hard poster",
                "El Paso skyline",
                "Café noir",
                "ＲＥＤ ＣＡＲ",
                "𝐑𝐞𝐝 𝐜𝐚𝐫",
                "iPhone 13 手机",
                "Hund",
            )
        ),
        *(
            (caption, ["en"], True)
            for caption in ("two dogs", "A red car, on the road", "photo of El Paso and the river")
        ),
        *(
            (caption, ["en"], False)
            for caption in (
                "ein Hund auf dem Sofa",
                "le chat est sur la table",
                "собака на траве",
                "草の上の犬",
                "一只狗",
                "강아지",
                "ሰላም ልዑል",
            )
        ),
        ("日本", ["ja"], None),
        ("日本", ["zh"], True),
        ("日本", ["en"], False),
        ("草の上の犬", ["zh"], False),
        ("Golden retriever puppy", ["ru", "zh"], False),
        ("Golden retriever puppy", ["ru", "de"], None),
        ("42", ["ru"], None),
        ("a dog on the sofa", ["de", "ru"], False),
        ("a dog on the sofa", ["de", "en"], True),
        ("собака", ["ru"], True),
    ],
)
def test_what_cannot_be_told_is_no_other_language(
    caption: str, wanted: list[str], expected: bool | None
) -> None:
    assert traits.is_in(caption, wanted) is expected


@pytest.mark.parametrize(
    "caption, language, complexity, action",
    [
        ("a photo", "en", 0, False),
        ("The dog is on a sofa.", "en", 1, False),
        ("A dog running on the grass in front of a house", "en", 2, True),
        ("the building near the king of the railing", "en", 2, False),
        ("a man is riding a wave", "en", 1, True),
        ("two men watch as she swings a bat", "en", 1, True),
        ("ein Hund und eine Katze", "de", 0, False),
        ("un chien dans la maison", "fr", 0, False),
        ("el perro y la gata", "es", 0, False),
        ("een hond op de bank", "nl", 0, False),
        ("собака на траве", "ru", 0, False),
        ("一只狗", "zh", 0, False),
        ("草の上の犬", "ja", 0, False),
        ("강아지", "ko", 0, False),
        ("كلب", "ar", 0, False),
        ("IMG_0042", "unclear", 0, False),
        ("", "unclear", 0, False),
    ],
)
def test_what_captions_are_like(caption: str, language: str, complexity: int, action: bool) -> None:
    assert traits.language(caption) == language
    assert (traits.complexity(caption), traits.has_action(caption)) == (complexity, action)
