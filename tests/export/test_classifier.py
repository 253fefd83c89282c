"""`vlp export --form classifier`: the head's logits by timm, in a process that cannot import vlp;
what is refused. (tests/test_catlip.py: from captions to one.)
"""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from torch import nn

from tests.models.tiny import TEXT, VIT, inputs, tiny
from vlp.cli import main
from vlp.export.classifier_form import write_classifier, write_model
from vlp.export.place import ExportError
from vlp.models import trunk_features

SMALL = {"name": "timm", "image_size": 32}
TRUNK, EMBEDDING = {"concepts": 7, "concepts_of": "trunk"}, {"concepts": 7}
QUICK = {"quick_gelu": True}
TOWERS = {
    "vit": {"heads": TRUNK},
    "vit after its projection": {"heads": EMBEDDING},
    "oblong, quick, pooled by mean": {
        "image_tower": VIT | QUICK | {"pool": "avg", "image_size": [32, 48]},
        "text_tower": TEXT | QUICK,
        "heads": TRUNK,
    },
    "resnet": {"image_tower": SMALL | {"model": "resnet10t"}, "heads": TRUNK},
    "resnet after a biased projection": {
        "image_tower": SMALL | {"model": "resnet10t", "proj_bias": True},
        "heads": EMBEDDING,
    },
    "mobilenet": {"image_tower": SMALL | {"model": "mobilenetv3_small_050"}, "heads": TRUNK},
    "mobilenet after its projection": {
        "image_tower": SMALL | {"model": "mobilenetv3_small_050"},
        "heads": EMBEDDING,
    },
    "vit of timm": {
        "image_tower": SMALL | {"model": "vit_tiny_patch16_224", "pool": "avg"},
        "heads": TRUNK,
    },
    "no projection": {
        "image_tower": SMALL | {"model": "resnet10t", "proj": "none"},
        "embed_dim": 512,
        "heads": TRUNK,
    },
}
# Imports nothing of ours: without site, a checkout that is installed is not found.
LOADS = """
import importlib.util, json, sys
sys.path.append(sys.argv[1])
assert importlib.util.find_spec("vlp") is None
import numpy, timm, torch
for place, pixels in json.loads(sys.argv[2]):
    model = timm.create_model(f"local-dir:{place}", pretrained=True).eval()
    config = timm.data.resolve_model_data_config(model)
    with torch.no_grad():
        logits = model(torch.from_numpy(numpy.load(pixels)))
    print(json.dumps([logits.tolist(), config["mean"], config["input_size"]]))
"""


def test_timm_gives_the_logits_without_vlp(tmp_path: Path) -> None:
    given, expected = [], []
    for name, keys in TOWERS.items():
        model = tiny(**keys)
        # Else all biases are 0, and a projection's could be left out unnoticed.
        if name.endswith("biased projection"):
            nn.init.normal_(model.visual.head.proj.bias)
        place = tmp_path / f"made from {name}"
        [note] = write_model(model, place)
        assert "with 7 classes" in note and sorted(p.name for p in place.iterdir()) == [
            "config.json", "model.safetensors", "vlp_export.json",
        ]  # fmt: skip

        pixels, _ = inputs(model)
        with torch.no_grad():
            logits = model(pixels, pairs=len(pixels)).concept_logits
        np.save(tmp_path / f"{name}.npy", model.pixels(pixels).numpy())
        given.append([str(place), str(tmp_path / f"{name}.npy")])
        expected.append((logits, model.image_spec))

    packages = str(Path(timm.__file__).parent.parent)
    command = [sys.executable, "-I", "-S", "-c", LOADS, packages, json.dumps(given)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    lines = list(map(json.loads, done.stdout.splitlines()))
    assert len(lines) == len(TOWERS) == 9
    for (found, mean, size), (logits, spec) in zip(lines, expected):
        torch.testing.assert_close(torch.tensor(found), logits, rtol=1e-5, atol=1e-5)
        assert tuple(mean) == spec.mean and size == [3, *spec.size]


def test_a_projection_that_is_no_matrix_stays_with_its_head(tmp_path: Path) -> None:
    model = tiny(image_tower=SMALL | {"model": "resnet10t", "proj": "mlp"}, heads=EMBEDDING)
    with pytest.raises(ExportError, match=r"holds a Mlp.* train with model.heads.concepts_of"):
        write_model(model, tmp_path / "out")
    with pytest.raises(ValueError, match="Mlp"):
        trunk_features.classifier(model.visual, model.heads.concepts, "embedding")
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--labels", "absent.tsv"], "--labels absent.tsv cannot be read"),
        (["--license", "mit"], "--license is of a model's card, and a classifier has none"),
        (["--onnx"], "--form classifier takes one RUN and no option of a whole model"),
    ],
)
def test_what_is_mistyped_is_refused_before_a_run_is_read(
    options: list[str], expected: str, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    command = ["export", str(tmp_path / "run"), "--form", "classifier"]
    assert main([*command, *options, "--to", str(tmp_path / "out")]) == 1
    assert expected in capsys.readouterr().err


def test_labels_are_of_a_classifier(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    command = ["export", str(tmp_path), "--labels", "x.tsv", "--to", str(tmp_path / "out")]
    assert main(command) == 1
    assert "--labels belongs to --form classifier" in capsys.readouterr().err

    with pytest.raises(ExportError, match=r"the model has no model\.heads\.concepts"):
        write_model(tiny(), tmp_path / "out")
    with pytest.raises(ExportError, match="--labels names 2 concepts and the head has 7"):
        write_model(tiny(heads=EMBEDDING), tmp_path / "out", ["dog.n.01", "cat.n.01"])
    (tmp_path / "table.tsv").write_text("number\tsynset\n1\tdog.n.01\n")
    with pytest.raises(ExportError, match="has no rows numbered from 0 on"):
        write_classifier(tmp_path, tmp_path / "out", labels=tmp_path / "table.tsv")
