"""Language models and detectors that the user names: tiny ones with random weights, made here."""

from __future__ import annotations

import re
import threading
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from tests.data.material import encoded, picture
from tests.data_tools.language import WORDS
from tests.data_tools.tools import call, read
from tests.eval.material import tiny_open_clip
from vlp.data.members import Content
from vlp.data_tools import counting, negatives, scenes
from vlp.data_tools._encoder import Model
from vlp.data_tools._writer.model import LanguageModel
from vlp.data_tools.negatives.rewriter import Rewriter


def test_a_masked_model_replaces_words(language_models: Path) -> None:
    rewriter = Rewriter(LanguageModel(str(language_models / "masked"), batch=3), "{}")
    caption = "A red car under two table"
    made = rewriter.of_shard(0, seed=0)([caption, "two dogs", "the"])
    assert [len(negatives) for negatives in made.values()] == [2, 2, 0]
    for negative in made[caption]:
        old, new = caption.split(), negative.text.split()
        # An article before the word follows its sound.
        pairs = zip(old[1:], new[1:])
        changed = [(a, b) for a, b in pairs if a != b]
        assert negative.kind == "masked" and len(old) == len(new) and len(changed) == 1
        assert changed[0][1] in negative.new_words and changed[0][1] in WORDS


def test_a_causal_model_continues_the_prompt(
    language_models: Path, shards: Path, tmp_path: Path
) -> None:
    model = language_models / "causal"
    call(
        negatives,
        shards,
        "--to",
        tmp_path / "out",
        "--kinds",
        "none",
        "--rewriter",
        model,
        "--prompt",
        "two {} red",
    )
    kinds = Counter(
        kind for sample in read(tmp_path / "out").values() for kind in sample.meta["negative_kinds"]
    )
    assert set(kinds) == {"rewritten"} and kinds["rewritten"] >= 3


def test_a_model_that_is_neither_is_refused(language_models: Path) -> None:
    with pytest.raises(ValueError, match="is a BertModel; expected a masked, a causal or"):
        LanguageModel(str(language_models / "neither")).load()
    with pytest.raises(ValueError, match=r"model '/no/such/model': no folder .* here"):
        LanguageModel("/no/such/model").load()


@pytest.fixture
def detector(tmp_path: Path) -> Path:
    """One of two classes and seven boxes, with random weights."""
    from transformers import YolosConfig, YolosForObjectDetection, YolosImageProcessor

    config = YolosConfig(
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        image_size=[32, 32],
        patch_size=16,
        num_detection_tokens=7,
        num_labels=2,
    )
    YolosForObjectDetection(config).save_pretrained(tmp_path / "detector")
    YolosImageProcessor(size={"height": 32, "width": 32}).save_pretrained(tmp_path / "detector")
    return tmp_path / "detector"


def test_a_detector_with_random_weights_runs(detector: Path) -> None:
    from vlp.data_tools.counting.detector import most_frequent
    from vlp.data_tools.scenes.draw import encode

    image = encode(scenes.generate(0, size=32).image)
    label, n = most_frequent(image, str(detector), 0.01)
    assert label and 1 <= n <= 7
    assert most_frequent(image, str(detector), 0.999) == ("", 0)
    assert most_frequent(image[: len(image) // 2], str(detector), 0.01) is None  # cut short
    with pytest.raises(ValueError, match=r"detector '/no/such/model' is neither a folder"):
        most_frequent(image, "/no/such/model", 0.5)


def test_pictures_that_do_not_open_are_counted_and_passed_over(
    detector: Path, shards: Path, tmp_path: Path, capsys
) -> None:
    with pytest.raises(ValueError, match="no caption in"):  # all of these pictures are broken
        call(counting, shards, "--to", tmp_path / "out", "--detector", detector)
    assert re.search(r"dropped: no readable picture +3\b", capsys.readouterr().err)


def test_a_model_is_loaded_before_threads_ask_for_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from vlp.eval import models

    loaded, load = [], models.load

    def watched(*options: Any) -> Any:
        loaded.append(threading.current_thread())
        return load(*options)

    monkeypatch.setattr(models, "load", watched)
    model = Model(f"local-dir:{tiny_open_clip(tmp_path / 'model')}", "cpu", batch=4)
    samples = [Content(str(i), encoded(picture(i))) for i in range(8)]
    assert sum(len(rows) for _, rows in model.batches(samples, Counter())) == 8
    assert loaded == [threading.current_thread()]
