"""Models that judge what `vlp data mine` found: tiny ones with random weights."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torchvision.transforms.functional import to_pil_image

from tests.data.material import data_of, loader_of
from tests.data_tools.language import write_judges
from tests.data_tools.mining import A_SHARD, N, counted
from tests.data_tools.tools import call, read
from vlp.data_tools import mine
from vlp.judges import Judge, yes_or_no


@pytest.fixture(scope="module")
def judges(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cross-encoder and a multimodal language model with random weights."""
    return write_judges(tmp_path_factory.mktemp("judges"))


def test_a_cross_encoder_scores_and_drops(
    planted: tuple[Path, Path], tmp_path: Path, judges: Path, capsys
) -> None:
    data, embeddings = planted
    judge = ["--judge", f"cross-encoder:{judges / 'blip'}", "--batch", 5, "--max-ratio", 1]
    given = ["--embeddings", embeddings, "--k", 3, *judge, "--to"]
    call(mine, data, *given, tmp_path / "all", "--delta", -2)
    carried = loader_of(data_of(tmp_path / "all"), 8).carries
    assert {"negatives", "teacher_scores", "score"} <= carried  # of distill.ranking and ranked
    for sample in read(tmp_path / "all").values():
        assert len(sample.meta["negatives"]) == 3
        assert sample.meta["score"] == sample.meta["positive_score"]
        assert all(0 <= score <= 1 for score in sample.meta["negative_scores"])

    # What scores above the sample's own pair is called true.
    capsys.readouterr()
    call(mine, data, *given, tmp_path / "some", "--delta", 0)
    n_dropped = counted(capsys.readouterr().out, "dropped: judge: true of the picture")
    assert 0 < n_dropped < N * 16
    for sample in read(tmp_path / "some").values():
        assert all(s <= sample.meta["positive_score"] for s in sample.meta["negative_scores"])


def test_a_judge_that_says_neither_yes_nor_no_is_counted(
    planted: tuple[Path, Path], tmp_path: Path, judges: Path, capsys
) -> None:
    data, embeddings = planted
    judge = ["--judge", f"mllm:{judges / 'llava'}", "--max-ratio", 1, "--window", 4]
    call(mine, data, "--embeddings", embeddings, "--to", tmp_path / "out", *judge)
    out = capsys.readouterr().out
    n_neither = counted(out, "dropped: judge: neither yes nor no to the sample's own pair")
    n_neither += counted(out, "dropped: judge: neither yes nor no")
    assert n_neither > 0
    n_written = sum(len(s.meta["negatives"]) for s in read(tmp_path / "out").values())
    assert n_written + n_neither + counted(out, "dropped: judge: true of the picture") == N * 4


def test_yes_and_no_are_compared_where_one_is_the_likeliest() -> None:
    logits = torch.tensor([[0.0, 2.0, 1.0, 0.0], [5.0, 2.0, 1.0, 0.0], [0.0, 1.0, 3.0, 2.0]])
    yes, neither, no = yes_or_no(logits, [1], [2, 3])
    assert neither is None
    assert yes == pytest.approx(np.e**2 / (np.e**2 + np.e + 1), abs=1e-6)
    assert no == pytest.approx(np.e / (np.e + np.e**3 + np.e**2), abs=1e-6)


def test_judged_pairs_are_kept(
    planted: tuple[Path, Path], tmp_path: Path, judges: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, embeddings = planted
    judge = ["--judge", f"cross-encoder:{judges / 'blip'}", "--window", 4, "--max-ratio", 1]
    given = [data, "--embeddings", embeddings, "--to", tmp_path / "out", *judge]
    call(mine, *given)
    whole = [p.read_bytes() for p in sorted((tmp_path / "out").glob("*.tar"))]
    lines = (tmp_path / "out/_judged/00001.jsonl").read_text().splitlines()
    assert len(lines) == A_SHARD * 5 and json.loads(lines[0])["value"] >= 0

    asked: list[int] = []
    original = Judge.scores

    def scores(self: Judge, pictures: list, captions: list) -> list:
        asked.append(len(captions))
        return original(self, pictures, captions)

    monkeypatch.setattr(Judge, "scores", scores)
    for name in ("chosen", "mine"):
        (tmp_path / f"out/00001_{name}.json").unlink()
    (tmp_path / "out/_judged/00001.jsonl").write_text("\n".join(lines[:20]))
    call(mine, *given)
    assert sum(asked) == 24  # from the second batch of 16 on
    assert whole == [p.read_bytes() for p in sorted((tmp_path / "out").glob("*.tar"))]


def longer_is_truer(pictures: list, captions: list[str]) -> list[float | None]:
    """A judge of one's own."""
    assert all(picture.mode == "RGB" for picture in pictures) and len(pictures) == len(captions)
    return [float(len(caption)) for caption in captions]


def test_a_function_of_ones_own_judges(planted: tuple[Path, Path], tmp_path: Path) -> None:
    data, embeddings = planted
    judge = ["--judge", f"{__name__}:longer_is_truer", "--max-ratio", 1, "--delta", -1000]
    call(mine, data, "--embeddings", embeddings, "--to", tmp_path / "out", *judge)
    n = 0
    for sample in read(tmp_path / "out").values():
        for text, score in zip(sample.meta["negatives"], sample.meta["negative_scores"]):
            assert score == len(text)
            n += 1
    assert n == N * 4


def one_too_few(pictures: list, captions: list[str]) -> list[float]:
    return [0.5] * (len(captions) - 1)


def no_number(pictures: list, captions: list[str]) -> list[str]:
    return ["true"] * len(captions)


@pytest.mark.parametrize(
    "name, message",
    [
        ("blip", "expected cross-encoder:MODEL or mllm:MODEL, .* or package.module:function"),
        ("mllm:", "expected cross-encoder:MODEL"),
        ("no_such_module:score", "No module named 'no_such_module'; expected .*PYTHONPATH"),
        (f"{__name__}:absent", "has no attribute 'absent'"),
        (f"{__name__}:N", "is no function: "),
        ("cross-encoder:{llava}", "found Llava.*, expected a model with a head for matching"),
        ("mllm:{llava}/absent", "cannot be loaded as a mllm"),
    ],
)
def test_what_is_no_judge_is_answered_without_its_weights(
    judges: Path, name: str, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        Judge.of(name.format(llava=judges / "llava"), "cpu", 4).check()


def broken(pictures: list, captions: list[str]) -> list[float]:
    raise KeyError("no such word")


@pytest.mark.parametrize(
    "name, message",
    [
        ("one_too_few", "gave 1 scores for 2 pairs"),
        ("no_number", "gave 'true'; return finite"),
        ("broken", "failed for 2 pairs: KeyError: 'no such word'"),
    ],
)
def test_answers_of_a_function_are_checked(name: str, message: str) -> None:
    pixels = torch.zeros(3, 4, 4, dtype=torch.uint8)
    with pytest.raises(ValueError, match=message):
        Judge.of(f"{__name__}:{name}", "cpu", 4).scores([pixels, pixels], ["a", "b"])


def test_pictures_are_prepared_once_and_tensors_score_as_images_do(judges: Path) -> None:
    judge = Judge.of(f"cross-encoder:{judges / 'blip'}", "cpu", 8)
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (2, 3, 20, 24), dtype=torch.uint8, generator=generator)
    images = [to_pil_image(one) for one in pixels]
    captions = ["yes", "no", "Yes No"]

    one_by_one = [judge.scores([images[i]], [c])[0] for i, c in zip((0, 0, 1), captions)]
    first, second = pixels
    together = judge.scores([first, first, second], captions)
    assert together == pytest.approx(one_by_one, abs=1e-5) and len(set(together)) == 3
