"""`vlp data negatives` on shards: fields, reasons for dropping, given negatives, resume, coverage
of human captions.
"""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from tests.data_tools.tools import CAPTIONS, call, read
from vlp.data.format import ShardWriter
from vlp.data.members import Picture
from vlp.data_tools import counting, negatives, scenes
from vlp.data_tools._english.words import bare
from vlp.data_tools.negatives.lexicon import Lexicon

REAL = Path(os.environ.get("VLP_DATA") or Path(__file__).parents[2] / "../shared/data")


def test_negatives_are_written_and_nothing_else_changes(
    shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    assert call(negatives, shards, "--to", tmp_path / "out", "--k", 8) == 0
    before, after = read(shards), read(tmp_path / "out")
    assert list(before) == list(after) and len(after) == 6
    for key, sample in after.items():
        meta = sample.meta
        assert (sample.image, sample.captions) == (before[key].image, before[key].captions)
        assert {k: v for k, v in meta.items() if not k.startswith("negative")} == before[key].meta
        assert (
            len(meta["negatives"])
            == len(meta["negatives_valid"])
            == len(meta["negative_kinds"])
            == len(meta["negatives_of"])
        )
        assert all(meta["negatives_valid"])
        assert all(meta["negatives_of"].count(i) <= 8 for i in range(len(sample.captions)))
        pairs = {(bare(text), i) for text, i in zip(meta["negatives"], meta["negatives_of"])}
        assert len(pairs) == len(meta["negatives"]) and not {text for text, _ in pairs} & {
            bare(c) for c in sample.captions
        }
    assert Counter(after["k0"].meta["negatives_of"]) == {0: 8, 1: 5}
    assert {"swap_attribute", "replace_noun"} <= set(after["k0"].meta["negative_kinds"])
    # "hm": no rule finds anything; the loader pads and masks.
    assert after["k2"].meta["negatives"] == []
    out = capsys.readouterr().out
    assert re.search(r"samples without negatives +1\b", out) and re.search(
        r"samples written +6\b", out
    )


def test_the_loader_pads_and_masks_what_the_tools_write(tmp_path: Path) -> None:
    """From captions to a batch: K varies between samples and is padded and masked; so are samples
    that do not count.
    """
    from vlp.config import Data
    from vlp.data.loader import Loader
    from vlp.data.sources import Common
    from vlp.data.sources.shards import Options
    from vlp.data.text import build
    from vlp.data_tools.scenes.draw import encode
    from vlp.plugin import Plugin
    from vlp.types import ImageSpec, TextSpec

    with ShardWriter(tmp_path / "in") as writer:
        for i, captions in enumerate(CAPTIONS):
            writer.add(f"k{i}", encode(scenes.generate(i, size=32).image), "jpg", captions)
    call(negatives, tmp_path / "in", "--to", tmp_path / "n", "--k", 3)
    call(counting, tmp_path / "in", "--to", tmp_path / "c")
    sources = [
        Plugin("vlp.data.sources", "shards", Options(str(tmp_path / name)), Common())
        for name in "nc"
    ]
    data = Data(sources, workers=0)
    spec = TextSpec("clip", 16)
    [batch] = [next(Loader(data, ImageSpec((32, 32)), spec, batch=9, seed=0))]
    tokenizer, written = build(spec), {}
    for sample_id, sample in enumerate(read(tmp_path / "n").values()):
        for i, caption in enumerate(sample.captions):
            written[sample_id, str(tokenizer([caption])[0].tolist())] = sample.meta[
                "negatives_of"
            ].count(i)
    expected = [
        written.get((int(i), str(text.tolist())), 0) for i, text in zip(batch.sample_id, batch.text)
    ]
    assert batch.negatives_valid.sum(1).tolist() == expected and {0, 3} <= set(expected)
    assert batch.negatives.shape == (9, 3, 16) and batch.counterfactual.shape == (9, 8, 16)
    assert batch.counterfactual_valid.sum() == 3 and set(
        batch.sample_id[batch.counterfactual_valid].tolist()
    ) == {6, 7, 8}


def test_what_captions_show_to_be_true_is_dropped() -> None:
    """Equal to a caption, said by another, empty, repeated: each is dropped under its name."""
    given = {"k": [("a Cat.", "given"), ("", "given"), ("a cow", "given"), ("A cow!", "given")]}
    words = {
        "attributes": {"things": {"color": ["red", "blue"]}},
        "nouns": {"animate": {"animal": ["dog", "cat"]}},
        "relations": {"anything": {"depth": ["in front of", "behind"]}},
    }
    change = negatives.AddNegatives(
        9, ("replace_attribute", "replace_noun"), 0, Lexicon(words, "test"), given
    )
    counts: Counter[str] = Counter()
    chosen = change.choose("k", ["a cat", "a red dog", "a blue thing"], counts)
    assert [(n.text, n.kind, i) for n, i in chosen] == [("a cow", "given", -1)]
    assert (
        counts["dropped: equal to a caption"] == 1
        and counts["dropped: empty"] == 1
        and counts["dropped: repeated"] == 1
    )
    # "a dog" and "a red cat" and the colors are all said of the picture by another caption.
    assert counts["dropped: says what another caption of the picture says"] == 4


def test_k_negatives_are_of_many_kinds() -> None:
    change = negatives.AddNegatives(4, negatives.KINDS, 0, Lexicon.load())
    caption = "Two large dogs sit under a red table next to three small cats"
    kinds = Counter(
        n.kind for i in range(20) for n, _ in change.choose(str(i), [caption], Counter())
    )
    assert len(kinds) >= 7 and max(kinds.values()) < 30


def test_k_counts_for_each_caption_and_given_ones_for_all() -> None:
    captions = [
        "a red car next to a large dog",
        "two men ride small horses",
        "two men ride small horses",
        "hm",
    ]
    given = {"k": [("a zebra", "given"), ("a whale", "given")]}
    change = negatives.AddNegatives(3, negatives.KINDS, 0, Lexicon.load(), given)
    counts: Counter[str] = Counter()
    numbers = [i for _, i in change.choose("k", captions, counts)]
    # The third says what the second says.
    assert numbers == [-1, -1, 0, 1] and counts["captions read"] == 3
    change = negatives.AddNegatives(1, negatives.KINDS, 0, Lexicon.load(), given)
    assert [i for _, i in change.choose("k", captions, Counter())] == [-1]


def test_one_text_may_belong_to_two_captions() -> None:
    words = {
        "attributes": {"things": {"size": ["big", "small"]}},
        "nouns": {"animate": {"animal": ["dog", "cat"]}},
        "relations": {"anything": {"depth": ["in front of", "behind"]}},
    }
    change = negatives.AddNegatives(3, ("replace_noun",), 0, Lexicon(words, "test"))
    chosen = change.choose("k", ["a dog", "A dog!"], Counter())
    assert [(bare(n.text), i) for n, i in chosen] == [("a cat", 0), ("a cat", 1)]


def test_given_negatives_come_by_key(
    shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    table = tmp_path / "given.jsonl"
    rows = [
        {"key": "k2", "negatives": ["hum", "ham"], "kinds": ["llm", "llm2"]},
        {"key": "k5", "negatives": ["A mouse"]},
    ]
    table.write_text(
        "\n".join(map(json.dumps, [*rows, {"key": "nowhere", "negatives": ["x"]}])) + "\n\n"
    )
    call(negatives, shards, "--to", tmp_path / "out", "--kinds", "none", "--from", table)
    after = read(tmp_path / "out")
    assert after["k2"].meta["negatives"] == ["hum", "ham"] and after["k2"].meta[
        "negative_kinds"
    ] == ["llm", "llm2"]
    assert after["k5"].meta["negative_kinds"] == ["given"] and after["k0"].meta["negatives"] == []
    out = capsys.readouterr().out
    assert re.search(r"given: keys without a sample +1\b", out) and re.search(
        r"given: keys used +2\b", out
    )


def test_scores_of_earlier_negatives_go_with_them(tmp_path: Path) -> None:
    with ShardWriter(tmp_path / "in") as writer:
        writer.add(
            "k",
            b"x",
            "jpg",
            ["a red car"],
            {"negatives": ["old"], "negative_scores": [0.3], "score": 1},
        )
    call(negatives, tmp_path / "in", "--to", tmp_path / "out", "--k", 1)
    meta = read(tmp_path / "out")["k"].meta
    assert (
        "negative_scores" not in meta
        and meta["score"] == 1
        and len(meta["negatives"]) == 1 != meta["negatives"].count("old")
    )


def test_a_given_negative_may_bring_an_image(
    shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """It goes where its caption goes: not to a sample whose caption is dropped, and away with the
    next negatives.
    """
    (tmp_path / "made").mkdir()
    for name in ("a.PNG", "b.jpg"):
        (tmp_path / "made" / name).write_bytes(f"picture {name}".encode())
    table = tmp_path / "given.jsonl"
    rows = [
        {"key": "k2", "negatives": ["hum", "ham"], "image": "made/a.PNG"},
        {"key": "k0", "negatives": ["a blue car"]},
        {"key": "k5", "negatives": ["an elephant!", "a mouse"], "image": "made/b.jpg"},
    ]
    table.write_text("\n".join(map(json.dumps, rows)))
    call(negatives, shards, "--to", tmp_path / "out", "--kinds", "none", "--from", table)
    after = read(tmp_path / "out")
    pictured = {key: s.negative_images for key, s in after.items() if s.negative_images}
    assert pictured == {"k2": {0: Picture(b"picture a.PNG", "png")}}
    assert after["k2"].meta["negatives"] == ["hum", "ham"] and after["k5"].meta["negatives"] == [
        "a mouse"
    ]
    out = capsys.readouterr().out
    assert re.search(r"negative images written +1\b", out) and re.search(
        r"images whose caption was dropped +1\b", out
    )
    call(negatives, tmp_path / "out", "--to", tmp_path / "again")
    assert not any(sample.negative_images for sample in read(tmp_path / "again").values())
    for wrong in (
        {"image": "made/none.png"},
        {"image": "given.jsonl"},
        {"image": "made/b.jpg", "negatives": []},
        {"image": 3},
    ):
        table.write_text(json.dumps({"key": "k2", "negatives": ["hum"], **wrong}))
        with pytest.raises(ValueError, match=r"given\.jsonl:1: found .*expected"):
            negatives.read_given(table)


@pytest.mark.parametrize(
    "line",
    [
        "{",
        '{"key": "a"}',
        '{"key": "a", "negatives": ["x"], "kinds": []}',
        '{"key": 3, "negatives": []}',
        "[]",
        '{"key": "a", "negatives": "x"}',
        '{"key": "a", "negatives": [1]}',
    ],
)
def test_broken_lines_of_given_negatives_are_named(tmp_path: Path, line: str) -> None:
    table = tmp_path / "given.jsonl"
    table.write_text('{"key": "a", "negatives": ["x"]}\n' + line + "\n")
    with pytest.raises(ValueError, match=r"given\.jsonl:2: found .*expected"):
        negatives.read_given(table)


def test_a_stopped_call_goes_on_and_gives_the_same_bytes(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("whole", "stopped"):
        if name == "stopped":
            _fail_at(monkeypatch, "k3")
            with pytest.raises(KeyboardInterrupt):
                call(negatives, shards, "--to", tmp_path / name)
            assert [p.name for p in sorted((tmp_path / name).glob("*.tar"))] == ["00000.tar"]
            done = (tmp_path / name / "00000.tar").stat().st_mtime_ns
            monkeypatch.undo()
        call(negatives, shards, "--to", tmp_path / name)
    assert (tmp_path / "stopped" / "00000.tar").stat().st_mtime_ns == done
    files = [
        {p.name: p.read_bytes() for p in (tmp_path / n).iterdir() if p.name != "_index.bin"}
        for n in ("whole", "stopped")
    ]
    assert files[0] == files[1] and len(files[0]) == 10


def _fail_at(monkeypatch: pytest.MonkeyPatch, key: str) -> None:
    original = negatives.AddNegatives.choose

    def choose(self: Any, name: str, *rest: Any) -> Any:
        if name == key:
            raise KeyboardInterrupt
        return original(self, name, *rest)

    monkeypatch.setattr(negatives.AddNegatives, "choose", choose)


def test_two_processes_write_the_same_bytes(shards: Path, tmp_path: Path) -> None:
    for n in (1, 2):
        call(negatives, shards, "--to", tmp_path / str(n), "--processes", n)
    assert len(tars := sorted((tmp_path / "1").glob("*.tar"))) == 3
    assert all(path.read_bytes() == (tmp_path / "2" / path.name).read_bytes() for path in tars)


@pytest.mark.parametrize(
    "options, message",
    [
        ([], "nothing to do: name --to"),
        (
            ["--to", "OUT", "--kinds", "swap_nouns"],
            "no rule 'swap_nouns', did you mean 'swap_noun'",
        ),
        (["--to", "OUT", "--kinds", "none"], "no source of negatives"),
        (["--to", "OUT", "--k", "0"], "--k 0 .* at least 1"),
        (["--to", "OUT", "--prompt", "x"], "lacks the {}"),
        (["--to", "IN"], "holds the input"),
    ],
)
def test_senseless_options_are_refused(
    shards: Path, tmp_path: Path, options: list[str], message: str
) -> None:
    options = [
        str(tmp_path / "out") if o == "OUT" else str(shards) if o == "IN" else o for o in options
    ]
    with pytest.raises(ValueError, match=message):
        call(negatives, shards, *options)


def test_other_settings_or_foreign_shards_in_the_output_are_refused(
    shards: Path, tmp_path: Path
) -> None:
    call(negatives, shards, "--to", tmp_path / "out")
    with pytest.raises(ValueError, match=r"other input or settings \(k_a_caption: 4 then, 2 now\)"):
        call(negatives, shards, "--to", tmp_path / "out", "--k", 2)
    with pytest.raises(FileExistsError, match="did not make"):
        call(counting, shards, "--to", tmp_path / "out")


def test_examples_are_printed_and_nothing_is_written(
    shards: Path, capsys: pytest.CaptureFixture
) -> None:
    before = sorted(shards.parent.rglob("*"))
    assert call(negatives, shards, "--print", 5) == 0
    assert len([line for line in capsys.readouterr().out.splitlines() if line.strip()]) == 10
    call(counting, shards, "--print", 5)
    assert "ten horses" in capsys.readouterr().out
    assert [p for p in sorted(shards.parent.rglob("*")) if p.name != "_index.bin"] == [
        p for p in before if p.name != "_index.bin"
    ]


@pytest.mark.parametrize(
    "name, field, least",
    [
        (
            "coco_open",
            "captions",
            {
                "replace_noun": 0.6,
                "replace_relation": 0.3,
                "replace_attribute": 0.2,
                "replace_number": 0.09,
            },
        ),
        (
            "nlvr",
            "sentence",
            {
                "replace_attribute": 0.6,
                "replace_number": 0.3,
                "replace_relation": 0.3,
                "swap_attribute": 0.08,
            },
        ),
    ],
)
def test_coverage_of_human_captions(name: str, field: str, least: dict[str, float]) -> None:
    table = REAL / f"{name}.jsonl"
    if not table.exists():
        pytest.skip(f"{table} is not here; set VLP_DATA to the folder that holds it")
    rows = [json.loads(line)[field] for line in table.read_text().splitlines()]
    captions = sorted({c for row in rows for c in (row if isinstance(row, list) else [row])})
    change, counts = negatives.AddNegatives(9, negatives.KINDS, 0, Lexicon.load()), Counter()
    for i, caption in enumerate(captions):
        change.choose(str(i), [caption], counts)
    assert counts["captions read"] == len(captions) > 500
    shares = {kind: counts[f"captions with {kind}"] / len(captions) for kind in least}
    assert all(shares[kind] >= share for kind, share in least.items()), shares
