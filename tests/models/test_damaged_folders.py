"""Folders of transformers' models whose files say something else than their class expects: refused
in words, before weights are read.
"""

import json
import shutil

import pytest

from tests.models.languages import language_model as llama
from tests.models.tiny import language_model, tiny
from vlp import faults
from vlp.data import text
from vlp.export.folder import export
from vlp.models.load import load
from vlp.towers.huggingface import Options, language_config, text_cfg

CONFIG, PIXELS = "config.json", "preprocessor_config.json"
# A file, the keys down to a value, the value in its place, and a part of the message.
WRONG = [
    (CONFIG, "model_type", [], "of the type []"),
    (CONFIG, "model_type", "bert", "of the type 'bert'"),
    (CONFIG, "vision_config", 3, "does not describe a model of the type 'clip'"),
    (CONFIG, "text_config", [1], "does not describe a model of the type 'clip'"),
    (CONFIG, "projection_dim", "x", ""),
    (CONFIG, "vision_config.num_attention_heads", 0, "does not describe"),
    (CONFIG, "vision_config.hidden_size", "x", ""),
    (CONFIG, "text_config.hidden_act", ["gelu"], ""),
    (CONFIG, "text_config.hidden_act", "mish", "'mish' is none of"),
    (PIXELS, "size", 3.5, "does not describe"),
    (PIXELS, "resample", {}, "does not describe"),
    (PIXELS, "image_mean", 3, "preprocess_cfg.mean"),
    (PIXELS, "image_std", [0, 0, 0], "three positive numbers"),
]


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    folder = tmp_path_factory.mktemp("damaged") / "clip"
    export(tiny(), folder)
    for name in ("open_clip_config.json", "open_clip_model.safetensors", "vlp_export.json"):
        (folder / name).unlink()
    load(folder)
    return folder


def refusal(folder):
    """What is said of a folder where it is refused."""
    try:
        load(folder)
    except Exception as error:
        return faults.message(error) or f"a traceback: {error!r}"
    return "loaded, without a traceback"


def test_a_clip_folder_of_other_values_is_refused(written, tmp_path):
    folder = tmp_path / "clip"
    shutil.copytree(written, folder)
    n_refused, wrong = 0, []
    for name, path, value, part in WRONG:
        whole = json.loads((written / name).read_text())
        *sections, key = path.split(".")
        section = whole
        for each in sections:
            section = section[each]
        section[key] = value
        (folder / name).write_text(json.dumps(whole))
        message = refusal(folder)
        if part not in message or "traceback" in message:
            wrong.append(f"{name} {path}: {message[:300]}")
        shutil.copy(written / name, folder / name)
        n_refused += 1
    assert not wrong, "\n".join(wrong)
    assert n_refused == len(WRONG) == 13


def test_a_tower_without_words_is_refused(tmp_path):
    """transformers makes a tokenizer of config.json alone, which reads every text alike."""
    n_refused = 0
    for make, options in ((language_model, {}), (llama, {"prompt": "{}"})):
        folder = make(tmp_path / make.__module__)
        spec = text.TextSpec(str(folder), 12, "whitespace", options)
        assert text.build(spec)(["a red dog"]).shape == (1, 12)
        for file in folder.glob("*token*"):
            file.unlink()
        with pytest.raises(ValueError, match=r"has no vocabulary; put its|cannot be loaded"):
            text.build(spec)
        n_refused += 1
    assert n_refused == 2


@pytest.mark.parametrize("content", ["[3]", '{"a": 1}', '[{"type": 3}]', "["])
def test_modules_of_sentence_transformers_that_are_none_are_refused(content, tmp_path):
    folder = language_model(tmp_path / "bert")
    (folder / "modules.json").write_text(content)
    with pytest.raises(ValueError, match=r"modules\.json (of .* does not list|is not JSON)"):
        text_cfg(Options(str(folder)))


@pytest.mark.parametrize("content", ["", "[]", '{"model_type": 3}', '{"model_type": "no such"}'])
def test_a_configuration_that_is_none_is_refused(content, tmp_path):
    (tmp_path / CONFIG).write_text(content)
    with pytest.raises(ValueError, match="no Hugging Face model configuration at"):
        language_config(str(tmp_path))
