"""`--width`: the first numbers of a model's embeddings, in evaluation and search."""

import json

import pytest
import torch

from tests.eval import material
from tests.models.tiny import tiny
from vlp.cli import main
from vlp.eval.models import ModelError
from vlp.eval.narrow import narrowed
from vlp.eval.pictures import DataError
from vlp.eval.unprojected import unprojected
from vlp.export.folder import export


def rows_of(encoder):
    return encoder.encode_texts(["a dog", "two cats"]), encoder.encode_images(
        [material.picture(3), material.picture(4)]
    )


def test_rows_are_prefixes_of_length_one():
    encoder = material.matrix_encoder()
    whole = rows_of(encoder)
    width = whole[0].shape[1]
    for m in (1, 5, width):
        for narrow, rows in zip(rows_of(narrowed(encoder, m)), whole):
            expected = torch.nn.functional.normalize(rows[:, :m], dim=-1)
            torch.testing.assert_close(narrow, expected)
    assert narrowed(encoder, None) is encoder and narrowed(encoder, width) is encoder


def test_widths_beyond_the_model_s_are_refused():
    encoder = material.matrix_encoder()
    width = encoder.encode_texts(["a"]).shape[1]
    with pytest.raises(ModelError, match=f"--width is {width + 1}, .* have {width} numbers"):
        narrowed(encoder, width + 1)
    with pytest.raises(ValueError, match="--width is 0; expected at least 1"):
        narrowed(encoder, 0)
    with pytest.raises(DataError, match="leave out one of the two"):
        unprojected(narrowed(encoder, 4))


def test_embeddings_of_two_widths_are_kept_apart():
    encoder = material.matrix_encoder()
    object.__setattr__(encoder, "fingerprint", "f")
    prints = {narrowed(encoder, m).fingerprint for m in (None, 4, 5)}
    assert len(prints) == 3
    assert narrowed(encoder, 4).name == "matrix, width 4"


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """A model, and the first eight of its numbers as a model of their own."""
    folder = tmp_path_factory.mktemp("narrow")
    model = tiny()
    export(model, folder / "whole")
    export(model, folder / "narrow", width=8)
    samples = [(material.png(material.picture(i)), [f"a photo of {i}"]) for i in range(6)]
    data = material.clip_benchmark_set(folder / "set", samples, kind="retrieval")
    return folder, str(data)


def test_a_command_of_a_width_scores_as_the_model_exported_at_it(exported, tmp_path):
    folder, data = exported
    out = tmp_path / "results.json"

    def metrics(model, *more):
        command = ["eval", str(folder / model), "--task", "retrieval", "--data", data, *more]
        assert main([*command, "--out", str(out), "--cache", str(tmp_path / "cache")]) == 0
        (record,) = json.loads(out.read_text())["results"]
        return record

    by_option, by_export = metrics("whole", "--width", "8"), metrics("narrow")
    assert by_option["metrics"] == by_export["metrics"]
    assert (by_option["width"], by_export["width"]) == (8, None)
    assert by_option["model_sha256"] != metrics("whole")["model_sha256"]


def test_a_wrong_width_is_answered_before_the_model_is_read(tmp_path, capsys):
    (tmp_path / "photo.png").write_bytes(material.png(material.picture(1)))
    for command in (
        ["eval", str(tmp_path / "absent"), "--task", "retrieval", "--data", str(tmp_path)],
        ["search", str(tmp_path / "absent"), str(tmp_path / "photo.png"), "a dog"],
    ):
        assert main([*command, "--width", "0"]) != 0
        assert "--width is 0; expected at least 1" in capsys.readouterr().err
