"""8-bit ONNX beyond what a consumer sees (test_consumers): what is refused, and without samples."""

import pytest

from tests.eval.material import picture, png
from tests.models.tiny import tiny
from vlp.cli import main
from vlp.data.format import ShardWriter
from vlp.export import int8_form
from vlp.export.folder import export
from vlp.export.int8_form import Int8


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    """Five pairs, in a folder whose name has a blank."""
    folder = tmp_path_factory.mktemp("int8") / "my pairs"
    with ShardWriter(folder, 8) as writer:
        for i in range(5):
            writer.add(f"k{i}", png(picture(i)), "png", [f"a photo of {i} dogs"], {})
    return folder


REFUSED = {
    "--int8": "is of the ONNX files; add --onnx",
    "--onnx --calibrate SHARDS": "--calibrate belongs to --onnx --int8",
    "--onnx --int8 --calibrate-samples 4": "--calibrate-samples belongs to --calibrate",
    "--onnx --int8 --calibrate SHARDS --calibrate-samples 1": "is 1; expected at least 2",
    "--onnx --int8 --calibrate SHARDS": "holds 5 samples, and 256 are needed",
    "--onnx --int8 --calibrate SHARDS --calibrate-samples 3": "or --calibrate-samples 2",
    "--onnx --int8 --calibrate nowhere/*.tar": "nowhere",
    "--width 0": "width is 0",
    "--form checkpoint --int8 --onnx": "no option of a whole model",
    "--form adapters --width 8": "no option of a whole model",
}


@pytest.mark.parametrize("written", REFUSED)
def test_wrong_options_are_refused_before_a_model_is_read(written, shards, tmp_path, capsys):
    """The model itself is absent: whoever reads it first fails otherwise."""
    options = [str(shards) if word == "SHARDS" else word for word in written.split()]
    status = main(["export", str(tmp_path / "absent"), "--to", str(tmp_path / "out"), *options])
    assert status != 0 and not (tmp_path / "out").exists()
    assert REFUSED[written] in capsys.readouterr().err


def test_pairs_that_compare_fix_nothing(shards):
    """Each of the five at most once, and the first and last among them."""
    model = tiny()
    given = int8_form.read(model, Int8(str(shards), 2))
    seen = set()
    for pairs in (given.calibrated, given.compared):
        assert pairs.image.shape == (2, 3, 32, 32) and pairs.text.shape == (2, 16)
        seen |= {row.tobytes() for row in pairs.image}
    assert len(seen) == 4


def test_a_damaged_picture_is_named(tmp_path):
    with ShardWriter(tmp_path / "pairs", 8) as writer:
        for i in range(4):
            shown = png(picture(i)) if i < 3 else b"\x89PNG\r\n\x1a\n torn"
            writer.add(f"k{i}", shown, "png", [f"a photo of {i} dogs"], {})
    with pytest.raises(ValueError, match=r"sample 'k3' does not open .*vlp data validate"):
        int8_form.read(tiny(), Int8(str(tmp_path / "pairs"), 2))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bf16"])
def test_without_samples_the_weights_alone_are_small(dtype, tmp_path):
    notes = export(tiny(), tmp_path / "out", onnx=True, int8=Int8(), dtype=dtype)
    lines = [note for note in notes if "8 bits" in note]
    assert len(lines) == 2 and all("8 bits (dynamic)" in line for line in lines)
    card = (tmp_path / "out/README.md").read_text()
    for side, line in zip(("image", "text"), lines):
        assert line in card
        least = float(line.rpartition(" ")[2])
        assert 0.98 <= least <= 1, line
        assert (tmp_path / f"out/onnx/{side}.int8.onnx").stat().st_size > 0
