"""`vlp data rewrite`, and the language model that it shares with `vlp data negatives`."""

from __future__ import annotations

import re
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.data_tools.language import WORDS
from tests.data_tools.tools import CAPTIONS, call, read
from vlp.data_tools import negatives, rewrite
from vlp.data_tools._english.words import bare
from vlp.data_tools._run.kept import read_kept
from vlp.data_tools._writer.answers import Answers
from vlp.data_tools._writer.generate import Drawing, Generator, Question, first_line
from vlp.data_tools._writer.model import LanguageModel
from vlp.data_tools.rewrite.prompts import SHIPPED, read_prompts

TRUE = ["paraphrase", "short", "long", "question"]
DEGLA = ["reshuffle_order", "swap_nouns", "swap_adjectives", "replace_adjectives", "replace_nouns"]
QUESTIONS = [
    Question(f"two dogs {text} holds", text)
    for text in ("a red car", "the old man in a blue truck on the road", "cats", "a small table")
]
N_CAPTIONS = len(set(chain.from_iterable(CAPTIONS)))
PROMPTS = "other: {prompt: 'the {} under'}\nlonger: {prompt: '{} on', length: 4}\n"


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    """Short ones, for models of few positions: two true kinds and a wrong one."""
    path = tmp_path / "prompts.yaml"
    path.write_text(PROMPTS + "wrong_one: {prompt: 'not {} but', wrong: true}\n")
    return path


@pytest.mark.parametrize("kind", ["causal", "seq2seq"])
def test_a_batch_answers_as_each_prompt_alone(language_models: Path, kind: str) -> None:
    """Padding stands where no position counts it, and a row's end is its own."""
    generator = Generator(LanguageModel(str(language_models / kind), "cpu").load())
    together = generator.answers(QUESTIONS, Drawing(), seed=0)
    alone = [generator.answers([question], Drawing(), seed=0)[0][0] for question in QUESTIONS]
    lengths = [len(text.split()) for text in alone]
    assert any(lengths) and len(together) == len(QUESTIONS)
    for [text], single in zip(together, alone):
        # The batch may write on: its limit is the longest question's.
        assert text.startswith(single)


def test_a_row_that_has_begun_to_answer_is_done_at_its_line_s_end(language_models: Path) -> None:
    generator = Generator(LanguageModel(str(language_models / "causal"), "cpu").load())
    end, word = WORDS.index("\n"), WORDS.index("red")
    rows = torch.tensor([[word, end, word, end], [word, end, end, word], [word, end, end, end]])
    ended = generator._is_at_line_end(n_prompt=2)
    assert ended(rows, None).tolist() == [True, False, False]


def test_drawn_answers_differ_and_repeat_by_seed(language_models: Path) -> None:
    generator = Generator(LanguageModel(str(language_models / "causal"), "cpu").load())
    drawing = Drawing(n=3, temperature=1.0)
    first = generator.answers(QUESTIONS, drawing, seed=1)
    assert first == generator.answers(QUESTIONS, drawing, seed=1)
    assert first != generator.answers(QUESTIONS, drawing, seed=2)
    assert [len(answers) for answers in first] == [3] * 4
    assert any(len(set(answers)) > 1 for answers in first)
    with pytest.raises(ValueError, match="3 answers at temperature 0 would be equal"):
        Drawing(n=3)


def test_the_shipped_table_has_the_kinds_of_the_papers() -> None:
    prompts = read_prompts(SHIPPED)
    assert list(prompts) == [*TRUE, *DEGLA]
    assert [kind for kind, prompt in prompts.items() if prompt.wrong] == DEGLA
    question = prompts["short"].question("a red car")
    assert question.prompt.endswith("Caption: a red car\nAnswer:") and question.length == 1


def test_answers_become_captions_by_role_and_negatives(
    language_models: Path, shards: Path, tmp_path: Path, prompts: Path, capsys
) -> None:
    options = ["--model", language_models / "causal", "--prompts", prompts, "--n", 2]
    kinds = ["--kinds", "other,longer,wrong_one"]
    call(rewrite, shards, "--to", tmp_path / "out", *options, *kinds)
    before, after = read(shards), read(tmp_path / "out")
    assert list(before) == list(after) and len(after) == 6

    n_written = {"other": 0, "longer": 0, "negatives": 0}
    for key, sample in after.items():
        true = {bare(caption) for caption in sample.captions}
        assert sample.captions == before[key].captions and sample.image == before[key].image
        for role in n_written:
            texts = [bare(text) for text in sample.meta.get(role, [])]
            assert all(texts) and not true & set(texts)
            n_written[role] += len(texts)
        assert set(sample.meta["negative_kinds"]) <= {"wrong_one"}
        assert all(0 <= i < len(sample.captions) for i in sample.meta["negatives_of"])
    assert min(n_written.values()) >= 3

    # Each of two answers to a caption and kind is written, or counted under a reason.
    out = capsys.readouterr().out
    counted = {
        name: int(n.replace(",", "")) for name, n in re.findall(r"^  (.+?) +([\d,]+)$", out, re.M)
    }
    dropped = sum(n for name, n in counted.items() if name.startswith("dropped"))
    assert dropped + sum(n_written.values()) == 2 * 3 * N_CAPTIONS
    assert counted["captions written: other"] == n_written["other"]


def test_a_role_is_read_as_captions(
    language_models: Path, shards: Path, tmp_path: Path, prompts: Path
) -> None:
    from vlp.data.captions import Choice

    options = ["--prompts", prompts, "--kinds", "other", "--n", 2]
    call(rewrite, shards, "--to", tmp_path / "out", "--model", language_models / "causal", *options)
    sample = read(tmp_path / "out")["k0"]
    texts = Choice(("captions", "other")).captions(sample.meta, sample.text)
    assert texts == (*sample.captions, *sample.meta["other"]) and len(texts) > 2


class Killed(BaseException):
    """As SIGKILL: nothing of ours catches it."""


@pytest.mark.parametrize("n_batches", [1, 3])
def test_a_killed_call_goes_on_and_gives_the_same_bytes(
    language_models: Path,
    shards: Path,
    tmp_path: Path,
    prompts: Path,
    monkeypatch: pytest.MonkeyPatch,
    n_batches: int,
) -> None:
    """It asks only for the batches that were not answered."""
    options = ["--model", language_models / "causal", "--prompts", prompts, "--batch", 2]
    options += ["--kinds", "other,longer", "--n", 2]
    asked = _watch(monkeypatch)
    call(rewrite, shards, "--to", tmp_path / "whole", *options)
    n_whole = len(asked)

    monkeypatch.undo()
    _watch(monkeypatch, stop_after=n_batches)
    with pytest.raises(Killed):
        call(rewrite, shards, "--to", tmp_path / "stopped", *options)
    for path in (tmp_path / "stopped" / "_answers").glob("*.jsonl"):
        # What stood behind the last whole line when the power went.
        path.write_bytes(path.read_bytes() + b'{"hash": "12')

    monkeypatch.undo()
    asked = _watch(monkeypatch)
    call(rewrite, shards, "--to", tmp_path / "stopped", *options)
    assert len(asked) == n_whole - n_batches and n_whole > 6
    for path in (tmp_path / "whole").glob("*.tar"):
        assert path.read_bytes() == (tmp_path / "stopped" / path.name).read_bytes()


def _watch(monkeypatch: pytest.MonkeyPatch, stop_after: int | None = None) -> list[int]:
    """The sizes of the batches that models are asked."""
    sizes: list[int] = []
    original = Generator.answers

    def answers(self: Any, questions: list[Question], *rest: Any) -> Any:
        if stop_after is not None and len(sizes) == stop_after:
            raise Killed
        sizes.append(len(questions))
        return original(self, questions, *rest)

    monkeypatch.setattr(Generator, "answers", answers)
    return sizes


def test_answers_of_an_earlier_call_are_taken_over(
    language_models: Path,
    shards: Path,
    tmp_path: Path,
    prompts: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    options = ["--model", language_models / "causal", "--prompts", prompts]
    call(rewrite, shards, "--to", tmp_path / "one", *options, "--kinds", "other")
    asked = _watch(monkeypatch)
    options += ["--kinds", "longer,other", "--reuse", tmp_path / "one"]
    call(rewrite, shards, "--to", tmp_path / "two", *options)
    one, two = read(tmp_path / "one"), read(tmp_path / "two")
    assert [s.meta.get("other") for s in one.values()] == [
        s.meta.get("other") for s in two.values()
    ]
    assert sum(asked) == N_CAPTIONS  # the new kind alone

    # Other weights: nothing of them is taken over.
    asked.clear()
    options[1] = language_models / "seq2seq"
    call(rewrite, shards, "--to", tmp_path / "three", *options)
    assert sum(asked) == 2 * N_CAPTIONS
    with pytest.raises(ValueError, match="holds no answers of a language model"):
        call(rewrite, shards, "--to", tmp_path / "four", *options[:-1], tmp_path)


def test_prompts_beyond_the_models_positions_are_counted(
    language_models: Path, shards: Path, tmp_path: Path, capsys
) -> None:
    table = tmp_path / "long.yaml"
    table.write_text("other: {prompt: '%s {}'}" % ("red " * 150))
    options = ["--model", language_models / "causal", "--prompts", table, "--kinds", "other"]
    call(rewrite, shards, "--to", tmp_path / "out", *options, "--temperature", 0)
    out = capsys.readouterr().out
    n_long = sum(len(caption.split()) > 3 for caption in chain.from_iterable(CAPTIONS))
    assert re.search(rf"other: the model has no place for the prompt +{n_long}\b", out)


def test_a_prompt_is_asked_once_however_often_its_caption_stands(
    language_models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = LanguageModel(str(language_models / "seq2seq"), "cpu", batch=2)
    asked = _watch(monkeypatch)
    answers = Answers(model, Drawing(), tmp_path / "a.jsonl")
    texts = answers.ask([*QUESTIONS, *QUESTIONS])
    assert asked == [2, 2] and texts[:4] == texts[4:]
    assert len(read_kept(tmp_path / "a.jsonl")) == 4
    Answers(model, Drawing(), tmp_path / "a.jsonl").ask(QUESTIONS)
    assert asked == [2, 2]


def test_negatives_rewritten_by_the_same_code_resume_too(
    language_models: Path, shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = ["--kinds", "none", "--rewriter", language_models / "seq2seq", "--batch", 4]
    asked = _watch(monkeypatch)
    call(negatives, shards, "--to", tmp_path / "out", *model)
    assert sum(asked) == N_CAPTIONS and max(asked) == 4
    (tmp_path / "out" / "00001_negatives.json").unlink()
    before = (tmp_path / "out" / "00001.tar").read_bytes()
    asked.clear()
    call(negatives, shards, "--to", tmp_path / "out", *model)
    assert asked == [] and (tmp_path / "out" / "00001.tar").read_bytes() == before


@pytest.mark.parametrize(
    "text, line",
    [
        ("", ""),
        (" \n\n ", ""),
        ('\n "A red car." \nsecond', "A red car."),
        ("1. a car\n2. a truck", "a car"),
        ("- “a car”", "a car"),
        ("3 dogs", "3 dogs"),
    ],
)
def test_the_first_line_is_the_answer(text: str, line: str) -> None:
    assert first_line(text) == line


@pytest.mark.parametrize(
    "table, message",
    [
        ("[1", "no readable table"),
        ("[]", "holds no kinds"),
        ("a: {prompt: x}", "kind 'a' .*expected {prompt: text with {}"),
        ("a: {prompt: '{}', wrng: true}", "kind 'a' .*expected"),
        ("a: {prompt: '{}', length: 90}", "length 90 of the kind 'a' must lie"),
        ("captions: {prompt: '{}'}", "would overwrite that field"),
    ],
)
def test_tables_that_cannot_be_used_are_refused(tmp_path: Path, table: str, message: str) -> None:
    path = tmp_path / "prompts.yaml"
    path.write_text(table)
    with pytest.raises(ValueError, match=message):
        read_prompts(path)


@pytest.mark.parametrize(
    "options, message",
    [
        (["--kinds", "paraphrasing"], "no kind 'paraphrasing' .*did you mean 'paraphrase'"),
        (["--n", "2", "--temperature", "0"], "2 answers at temperature 0"),
        (["--model", "masked"], "a masked language model fills in words"),
        (["--batch", "0"], "--batch 0 must be at least 1"),
        (["--to", ""], "nothing to do: name --to"),
    ],
)
def test_senseless_options_are_refused(
    language_models: Path, shards: Path, tmp_path: Path, options: list[str], message: str
) -> None:
    model = "masked" if "masked" in options else "causal"
    options = [str(language_models / model) if o == "masked" else o for o in options]
    usual = ["--model", language_models / model, "--to", tmp_path / "out"]
    with pytest.raises(ValueError, match=message):
        call(rewrite, shards, *usual, *options)


def test_answers_are_printed_and_nothing_is_written(
    language_models: Path, shards: Path, prompts: Path, capsys
) -> None:
    before = sorted(path.name for path in shards.parent.rglob("*"))
    options = ["--model", language_models / "causal", "--prompts", prompts, "--kinds", "other"]
    assert call(rewrite, shards, *options, "--print", 2) == 0
    lines = capsys.readouterr().out.splitlines()
    captions = [f"k0  {text}" for text in CAPTIONS[0]] + [f"k1  {text}" for text in CAPTIONS[1]]
    assert [line for line in lines if not line.startswith(" ")] == captions
    assert len([line for line in lines if line.startswith("    other ")]) == 4
    assert sorted(path.name for path in shards.parent.rglob("*")) == before
