"""`vlp data negatives` and `vlp data counting` on shards: fields, reasons, resume, models named by the user."""

from __future__ import annotations

import argparse
import json
import os
import random
import re
from collections import Counter
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from vlp.data.format import ShardWriter
from vlp.data_tools import counting, negatives, scenes
from vlp.data_tools._language import bare
from vlp.data_tools._lexicon import Lexicon
from vlp.data_tools._shards import samples

REAL = Path(os.environ.get("VLP_DATA") or Path(__file__).parents[2] / "../shared/data")
CAPTIONS = [
    ["A red car next to a blue truck", "two vehicles on a road"],
    ["Three black dogs sit under a large table", "three dogs"],
    ["hm"],
    ["a man often attends to ten horses", "a man and horses"],
    ["two cats and four birds"],
    ["An elephant"],
]


def call(tool: ModuleType, *options: Any) -> int:
    parser = argparse.ArgumentParser()
    tool.arguments(parser)
    return tool.run(parser.parse_args([str(option) for option in options]))


def read(folder: Path) -> dict[str, Any]:
    return {s.key: s for path in sorted(folder.glob("*.tar")) for s in samples(path, Counter())}


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    """Three shards of two samples with hand-written captions; the picture's bytes tell them apart."""
    with ShardWriter(tmp_path / "in", 2) as writer:
        for i, captions in enumerate(CAPTIONS):
            writer.add(f"k{i}", f"image {i}".encode(), "jpg", captions, {"class": "x", "extra": [i]}, cls=i)
    return tmp_path / "in"


# --- negatives -------------------------------------------------------------------------------------------------------


def test_negatives_are_written_and_nothing_else_changes(shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert call(negatives, shards, "--to", tmp_path / "out", "--k", 8) == 0
    before, after = read(shards), read(tmp_path / "out")
    assert list(before) == list(after) and len(after) == 6
    for key, sample in after.items():
        meta = sample.meta
        assert (sample.image, sample.captions) == (before[key].image, before[key].captions)
        assert {k: v for k, v in meta.items() if not k.startswith("negative")} == before[key].meta
        assert len(meta["negatives"]) == len(meta["negatives_valid"]) == len(meta["negative_kinds"]) == len(meta["negatives_of"])
        assert all(meta["negatives_valid"]) and len(meta["negatives"]) <= 8
        assert len({bare(t) for t in [*meta["negatives"], *sample.captions]}) == len(meta["negatives"]) + len(sample.captions)
    assert len(after["k0"].meta["negatives"]) == 8 and {"swap_attribute", "replace_noun"} <= set(after["k0"].meta["negative_kinds"])
    assert after["k2"].meta["negatives"] == []  # "hm": no rule finds anything; the loader pads and masks
    out = capsys.readouterr().out
    assert re.search(r"samples without negatives +1\b", out) and re.search(r"samples written +6\b", out)


def test_the_loader_pads_and_masks_what_the_tools_write(tmp_path: Path) -> None:
    """From captions to a batch: K varies between samples and is padded and masked; so are samples that do not count."""
    from vlp.config import Data
    from vlp.data.loader import Loader
    from vlp.data.sources import Common
    from vlp.data.sources.shards import Options
    from vlp.data_tools._scene_draw import encode
    from vlp.plugin import Plugin
    from vlp.types import ImageSpec, TextSpec

    with ShardWriter(tmp_path / "in") as writer:
        for i, captions in enumerate(CAPTIONS):
            writer.add(f"k{i}", encode(scenes.generate(i, size=32).image), "jpg", captions)
    call(negatives, tmp_path / "in", "--to", tmp_path / "n", "--k", 3)
    call(counting, tmp_path / "in", "--to", tmp_path / "c")
    sources = [Plugin("vlp.data.sources", "shards", Options(str(tmp_path / name)), Common()) for name in "nc"]
    data = Data(sources, workers=0)
    [batch] = [next(Loader(data, ImageSpec((32, 32)), TextSpec("clip", 16), batch=9, seed=0))]
    written = [len(s.meta["negatives"]) for s in read(tmp_path / "n").values()] + [0] * 3
    assert set(written) == {0, 1, 3} and [batch.negatives_valid[batch.sample_id == i].sum().item() for i in range(9)] == written
    assert batch.negatives.shape == (9, 3, 16) and batch.counterfactual.shape == (9, 8, 16)
    assert batch.counterfactual_valid.sum() == 3 and set(batch.sample_id[batch.counterfactual_valid].tolist()) == {6, 7, 8}


def test_what_captions_show_to_be_true_is_dropped() -> None:
    """Equal to a caption, said by another caption, empty, repeated: each is dropped under its name."""
    given = {"k": [("a Cat.", "given"), ("", "given"), ("a cow", "given"), ("A cow!", "given")]}
    words = {
        "attributes": {"things": {"color": ["red", "blue"]}}, "nouns": {"animate": {"animal": ["dog", "cat"]}},
        "relations": {"anything": {"depth": ["in front of", "behind"]}},
    }  # fmt: skip
    change = negatives.AddNegatives(9, ("replace_attribute", "replace_noun"), 0, Lexicon(words, "test"), given)
    counts: Counter[str] = Counter()
    chosen = change.choose("k", ["a cat", "a red dog", "a blue thing"], counts)
    assert [(n.text, n.kind, i) for n, i in chosen] == [("a cow", "given", -1)]
    assert counts["dropped: equal to a caption"] == 1 and counts["dropped: empty"] == 1 and counts["dropped: repeated"] == 1
    # "a dog" and "a red cat" and the colors are all said of the picture by another caption.
    assert counts["dropped: says what another caption of the picture says"] == 4


def test_k_negatives_are_of_many_kinds() -> None:
    change = negatives.AddNegatives(4, negatives.KINDS, 0, Lexicon.load())
    caption = "Two large dogs sit under a red table next to three small cats"
    kinds = Counter(n.kind for i in range(20) for n, _ in change.choose(str(i), [caption], Counter()))
    assert len(kinds) >= 7 and max(kinds.values()) < 30


def test_given_negatives_come_by_key(shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    table = tmp_path / "given.jsonl"
    rows = [{"key": "k2", "negatives": ["hum", "ham"], "kinds": ["llm", "llm2"]}, {"key": "k5", "negatives": ["A mouse"]}]
    table.write_text("\n".join(map(json.dumps, [*rows, {"key": "nowhere", "negatives": ["x"]}])) + "\n\n")
    call(negatives, shards, "--to", tmp_path / "out", "--kinds", "none", "--from", table)
    after = read(tmp_path / "out")
    assert after["k2"].meta["negatives"] == ["hum", "ham"] and after["k2"].meta["negative_kinds"] == ["llm", "llm2"]
    assert after["k5"].meta["negative_kinds"] == ["given"] and after["k0"].meta["negatives"] == []
    out = capsys.readouterr().out
    assert re.search(r"given: keys without a sample +1\b", out) and re.search(r"given: keys used +2\b", out)


@pytest.mark.parametrize("line", [
    "{", '{"key": "a"}', '{"key": "a", "negatives": ["x"], "kinds": []}', '{"key": 3, "negatives": []}', "[]",
    '{"key": "a", "negatives": "x"}', '{"key": "a", "negatives": [1]}',
])  # fmt: skip
def test_broken_lines_of_given_negatives_are_named(tmp_path: Path, line: str) -> None:
    table = tmp_path / "given.jsonl"
    table.write_text('{"key": "a", "negatives": ["x"]}\n' + line + "\n")
    with pytest.raises(ValueError, match=r"given\.jsonl:2: found .*expected"):
        negatives.read_given(table)


def test_a_stopped_call_goes_on_and_gives_the_same_bytes(shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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
    files = [{p.name: p.read_bytes() for p in (tmp_path / n).iterdir() if p.name != "_index.bin"} for n in ("whole", "stopped")]
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


@pytest.mark.parametrize("options, message", [
    ([], "nothing to do: name --to"),
    (["--to", "OUT", "--kinds", "swap_nouns"], "no rule 'swap_nouns', did you mean 'swap_noun'"),
    (["--to", "OUT", "--kinds", "none"], "no source of negatives"),
    (["--to", "OUT", "--k", "0"], "--k 0 .* at least 1"),
    (["--to", "OUT", "--prompt", "x"], "lacks the {}"),
    (["--to", "IN"], "holds the input"),
])  # fmt: skip
def test_senseless_options_are_refused(shards: Path, tmp_path: Path, options: list[str], message: str) -> None:
    options = [str(tmp_path / "out") if o == "OUT" else str(shards) if o == "IN" else o for o in options]
    with pytest.raises(ValueError, match=message):
        call(negatives, shards, *options)


def test_other_settings_or_foreign_shards_in_the_output_are_refused(shards: Path, tmp_path: Path) -> None:
    call(negatives, shards, "--to", tmp_path / "out")
    with pytest.raises(ValueError, match=r"other input or settings \(k: 4 then, 2 now\)"):
        call(negatives, shards, "--to", tmp_path / "out", "--k", 2)
    with pytest.raises(FileExistsError, match="did not make"):
        call(counting, shards, "--to", tmp_path / "out")


def test_examples_are_printed_and_nothing_is_written(shards: Path, capsys: pytest.CaptureFixture) -> None:
    before = sorted(shards.parent.rglob("*"))
    assert call(negatives, shards, "--print", 5) == 0
    assert len([line for line in capsys.readouterr().out.splitlines() if line.strip()]) == 10
    call(counting, shards, "--print", 5)
    assert "ten horses" in capsys.readouterr().out
    assert [p for p in sorted(shards.parent.rglob("*")) if p.name != "_index.bin"] == [p for p in before if p.name != "_index.bin"]


# --- counting --------------------------------------------------------------------------------------------------------


def test_counting_pairs(shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert call(counting, shards, "--to", tmp_path / "out") == 0
    after = read(tmp_path / "out")
    assert {key: sample.meta["number"] for key, sample in after.items()} == {"k0": 2, "k1": 3, "k3": 10}
    sample = after["k3"]
    assert sample.captions == ("a man often attends to ten horses",) and sample.meta["all_captions"] == CAPTIONS[3]
    texts = sample.meta["counterfactuals"]
    numbers = "two three four five six seven eight nine".split()  # noqa: SIM905
    assert sorted(texts) == sorted(f"a man often attends to {n} horses" for n in numbers)
    assert texts != [f"a man often attends to {n} horses" for n in numbers]
    out = capsys.readouterr().out
    expected = {"captions dropped: several numbers": 1, "dropped: no caption counts": 3, "samples written": 3, "number 10": 1}
    for line, n in expected.items():
        assert re.search(rf"{line} +{n}\b", out), (line, out)


def test_counting_without_any_number_is_an_error(tmp_path: Path) -> None:
    with ShardWriter(tmp_path / "in") as writer:
        writer.add("a", b"x", "jpg", ["a dog", "often"])
    with pytest.raises(ValueError, match=r"no caption in .* counts anything from two to ten"):
        call(counting, tmp_path / "in", "--to", tmp_path / "out")


def test_balance() -> None:
    kept = [[(f"{n}-{i}", 0, n) for n in range(2, 11) for i in range(12 - n)], [("other", 0, 5)]]
    equal = counting.balance(kept, "equal", 0)
    assert Counter(n for shard in equal for _, n in shard.values()) == dict.fromkeys(range(2, 11), 2)
    most = counting.balance(kept, "4", 0)
    assert Counter(n for shard in most for _, n in shard.values()) == {n: min(4, 12 - n) for n in range(2, 11)}
    assert sum(map(len, counting.balance(kept, "none", 0))) == sum(map(len, kept))
    assert equal == counting.balance(kept, "equal", 0) != counting.balance(kept, "equal", 1)
    with pytest.raises(ValueError, match="no caption counts 2, 3, 4, 6, 7, 8, 9, 10"):
        counting.balance([[("a", 0, 5)]], "equal", 0)


@pytest.mark.parametrize("options, message", [
    (["--balance", "even"], "expected none, equal, or a number"),
    (["--counterfactuals", "9"], "1 to 8"),
    (["--threshold", "1.5"], r"in \(0, 1\)"),
])  # fmt: skip
def test_senseless_counting_options_are_refused(shards: Path, tmp_path: Path, options: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call(counting, shards, "--to", tmp_path / "out", *options)


def test_the_detector_must_agree_and_is_asked_once(shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from vlp.data_tools import _detector

    asked = []

    def seen(image: bytes, model: str, threshold: float) -> tuple[str, int]:
        asked.append(image)
        return {b"image 0": ("car", 2), b"image 1": ("dog", 4)}.get(image, ("", 0))

    monkeypatch.setattr(_detector, "most_frequent", seen)
    for _ in range(2):
        call(counting, shards, "--to", tmp_path / "out", "--detector", "any")
    assert list(read(tmp_path / "out")) == ["k0"] and len(asked) == 3
    notes = [json.loads(p.read_text())["counts"] for p in sorted((tmp_path / "out").glob("*_survey.json"))]
    assert notes[0]["dropped: the detector counts another number"] == notes[1]["dropped: the detector sees nothing"] == 1


def test_counting_pairs_of_scenes_are_balanced(tmp_path: Path) -> None:
    scenes.write(tmp_path / "s", n_train=1200, n_val=0, n_test=0, n_zeroshot=0, n_retrieval=0, n_proofs=0, size=16, processes=1)
    call(counting, tmp_path / "s" / "train", "--to", tmp_path / "out", "--balance", "equal")
    numbers = Counter(sample.meta["number"] for sample in read(tmp_path / "out").values())
    assert set(numbers) == set(range(2, 11)) and len(set(numbers.values())) == 1 and min(numbers.values()) > 20


# --- models named by the user ----------------------------------------------------------------------------------------

WORDS = ["[UNK]", "[PAD]", "[CLS]", "[SEP]", "[MASK]", "a", "red", "blue", "car", "truck", "two", "dogs", "cats", "under", "table"]


@pytest.fixture(scope="module")
def language_models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A masked and a causal model with random weights, and a model that is neither."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import BertConfig, BertForMaskedLM, BertModel, GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]"))
    core.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    special = {"unk_token": "[UNK]", "pad_token": "[PAD]", "mask_token": "[MASK]", "eos_token": "[SEP]"}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, **special)
    torch.manual_seed(0)
    small = BertConfig(vocab_size=len(WORDS), hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
    made = {"masked": BertForMaskedLM(small), "neither": BertModel(small)}
    ends = {"bos_token_id": 3, "eos_token_id": 3}
    made["causal"] = GPT2LMHeadModel(GPT2Config(vocab_size=len(WORDS), n_embd=16, n_layer=1, n_head=2, n_positions=64, **ends))
    folder = tmp_path_factory.mktemp("models")
    for name, model in made.items():
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    return folder


def test_a_masked_model_replaces_words(language_models: Path) -> None:
    from vlp.data_tools._rewriter import load

    rewrite = load(str(language_models / "masked"), "{}")
    caption = "A red car under two table"
    made = rewrite(caption, random.Random(0))
    assert len(made) == 2
    for negative in made:
        old, new = caption.split(), negative.text.split()
        changed = [(a, b) for a, b in zip(old, new) if a != b]
        assert negative.kind == "masked" and len(old) == len(new) and len(changed) == 1
        assert changed[0][1] in negative.new_words and changed[0][1] in WORDS


def test_a_causal_model_continues_the_prompt(language_models: Path, shards: Path, tmp_path: Path) -> None:
    model = language_models / "causal"
    call(negatives, shards, "--to", tmp_path / "out", "--kinds", "none", "--rewriter", model, "--prompt", "two {} red")
    kinds = Counter(kind for sample in read(tmp_path / "out").values() for kind in sample.meta["negative_kinds"])
    assert set(kinds) == {"rewritten"} and kinds["rewritten"] >= 3


def test_a_model_that_is_neither_is_refused(language_models: Path) -> None:
    from vlp.data_tools._rewriter import load

    with pytest.raises(ValueError, match="is a BertModel; expected a masked or a causal"):
        load(str(language_models / "neither"), "{}")


def test_a_detector_with_random_weights_runs(tmp_path: Path) -> None:
    from transformers import YolosConfig, YolosForObjectDetection, YolosImageProcessor

    from vlp.data_tools._detector import most_frequent
    from vlp.data_tools._scene_draw import encode

    config = YolosConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, image_size=[32, 32], patch_size=16,
        num_detection_tokens=7, num_labels=2,
    )  # fmt: skip
    YolosForObjectDetection(config).save_pretrained(tmp_path)
    YolosImageProcessor(size={"height": 32, "width": 32}).save_pretrained(tmp_path)
    image = encode(scenes.generate(0, size=32).image)
    label, n = most_frequent(image, str(tmp_path), 0.01)
    assert label and 1 <= n <= 7
    assert most_frequent(image, str(tmp_path), 0.999) == ("", 0)


# --- real captions ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name, field, least", [
    ("coco_open", "captions", {"replace_noun": 0.6, "replace_relation": 0.3, "replace_attribute": 0.2, "replace_number": 0.09}),
    ("nlvr", "sentence", {"replace_attribute": 0.6, "replace_number": 0.3, "replace_relation": 0.3, "swap_attribute": 0.08}),
])  # fmt: skip
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
