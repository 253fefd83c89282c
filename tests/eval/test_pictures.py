"""Evaluation sees the pixels that training saw, in all modes, turned, transparent and very long."""

from __future__ import annotations

import json
import resource
import time
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from tests.data.material import data_of, encoded, picture, write_tar
from tests.eval import material
from tests.eval.test_models import tiny_transformers
from tests.models.tiny import tiny
from vlp.data import decode
from vlp.data.loader import Loader
from vlp.eval import embed, models
from vlp.eval.embed import Context
from vlp.eval.pictures import Contents, DataError, Picture
from vlp.export import folder as export
from vlp.schema import parse
from vlp.types import Decoding, ImageSpec, TextSpec

GRAY = np.asarray(picture(3, (32, 32)).convert("L"))


def peculiar() -> dict[str, bytes]:
    """Pictures of 32 × 32 pixels that readers used to disagree about."""
    clear = picture(4, (32, 32))
    clear.putalpha(Image.fromarray(GRAY))
    exif = Image.Exif()
    exif[0x0112] = 6
    return {
        "sixteen.png": encoded(Image.fromarray(GRAY.astype(np.uint16) * 257)),
        "clear.png": encoded(clear),
        "phone.jpg": encoded(picture(5, (32, 32)), "JPEG", exif=exif),
        "page.tiff": encoded(picture(6, (32, 32)), "TIFF"),
        "scan.JFIF": encoded(picture(7, (32, 32)), "JPEG"),
    }


def test_training_and_evaluation_see_the_same_pixels(tmp_path):
    members = []
    for file, image in peculiar().items():
        members += [(file, image), (f"{file.split('.')[0]}.txt", b"x")]
    whole = {"scale": [1.0, 1.0], "ratio": [1.0, 1.0]}
    data = data_of(write_tar(tmp_path / "0.tar", members), augment=whole)
    spec = ImageSpec((32, 32))
    batch = next(Loader(data, spec, TextSpec("clip", 16), batch=5, seed=0))
    trained = dict(zip(batch.key, batch.image))
    assert len(trained) == 5
    for file, image in peculiar().items():
        seen = decode.eval_transform(Picture(file, data=image).open(), spec)
        assert torch.equal(trained[file.split(".")[0]], seen), file
    assert torch.equal(trained["sixteen"], torch.from_numpy(GRAY.copy()).expand(3, 32, 32))


@pytest.mark.parametrize("views", [None, {"n": 2}])
def test_training_sees_the_background_of_its_model(views, tmp_path):
    clear = encoded(Image.new("RGBA", (40, 40), (200, 0, 0, 0)))
    path = write_tar(tmp_path / "0.tar", [("a.png", clear), ("a.txt", b"x")])
    still = {"color": 0.0, "grayscale": 0.0, "blur": 0.0}
    data = data_of(path, **({} if views is None else {"views": {**views, "augment": still}}))
    spec = ImageSpec((32, 32), decoding=Decoding((10, 60, 200)))
    batch = next(Loader(data, spec, TextSpec("clip", 16), batch=1, seed=0))
    blue = torch.tensor([10, 60, 200], dtype=torch.uint8).view(3, 1, 1).expand(3, 32, 32)
    assert torch.equal(batch.image[0], blue)
    if views is not None:
        assert torch.equal(batch.image_views[0], blue.expand(2, 3, 32, 32))


@pytest.mark.parametrize("said", [{}, {"background": [10, 60, 200], "exif": False}])
def test_an_export_is_evaluated_on_pictures_decoded_as_in_training(said, tmp_path):
    model = tiny(decoding=said)
    export.export(model, tmp_path / "out")
    encoder = models.load(str(tmp_path / "out"))
    assert encoder.decoding == model.image_spec.decoding == parse(Decoding, said)
    assert models.load(f"local-dir:{tmp_path / 'out'}").decoding == encoder.decoding
    pictures = [Picture(name, data=data) for name, data in peculiar().items()]
    rows = embed.images(encoder, pictures, Context(workers=0))
    pixels = torch.stack([decode.eval_transform(p.data, model.image_spec) for p in pictures])
    with torch.no_grad():
        assert torch.allclose(rows, model.encode_image(pixels), atol=1e-5)
        other = ImageSpec(
            model.image_spec.size,
            decoding=Decoding((0, 0, 0), exif=not model.image_spec.decoding.exif),
        )
        wrong = torch.stack([decode.eval_transform(p.data, other) for p in pictures])
        differing = (rows - model.encode_image(wrong)).abs().amax(1) > 1e-3
    assert differing.tolist() == [False, True, True, False, False]


def test_kept_embeddings_are_those_of_the_decoding(tmp_path):
    encoder = models.load(str(material.tiny_open_clip(tmp_path / "tiny")))
    assert encoder.decoding == Decoding()
    context = Context(cache=tmp_path / "kept", contents=Contents(), workers=0)
    pictures = [Picture("clear", data=peculiar()["clear.png"])]
    white = embed.images(encoder, pictures, context)
    black = embed.images(replace(encoder, decoding=Decoding((0, 0, 0))), pictures, context)
    assert (white - black).abs().max() > 1e-3
    assert torch.equal(embed.images(encoder, pictures, context), white)
    assert len(list((tmp_path / "kept").glob("*.safetensors"))) == 2


@pytest.mark.parametrize("kind", ["ours", "open_clip", "clip", "siglip"])
def test_very_long_pictures_cost_no_gigabytes_in_any_model(kind, tmp_path):
    folder = tmp_path / kind
    if kind == "ours":
        encoder = models.from_model(material.our_model().eval())
    else:
        made = (
            material.tiny_open_clip(folder)
            if kind == "open_clip"
            else tiny_transformers(folder, kind)
        )
        encoder = models.load(str(made))
    long = Picture("long", data=encoded(Image.new("RGB", (60_000, 1), (200, 100, 50))))
    square = Picture("square", data=encoded(Image.new("RGB", (40, 40), (200, 100, 50))))
    memory, started = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    pixels = [encoder.prepare(p.open(encoder.decoding)) for p in (long, square)]
    assert time.process_time() - started < 2
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory < 60_000  # kB
    assert torch.allclose(pixels[0].float(), pixels[1].float(), atol=0.02)


def test_a_picture_that_does_not_open_is_named_with_the_reason(tmp_path):
    (tmp_path / "empty.jpg").touch()
    cases = {
        "empty.jpg": "no readable image: the file is empty",
        "page.jpg": "found HTML, expected JPEG, PNG",
        "gone.jpg": "No such file",
        "scan.tif": "floats from 0 to 9; expected 0 to 1",
    }
    (tmp_path / "page.jpg").write_bytes(b"<!DOCTYPE html>")
    (tmp_path / "scan.tif").write_bytes(
        encoded(Image.fromarray(np.linspace(0, 9, 16, dtype=np.float32).reshape(4, 4)), "TIFF")
    )
    assert len(cases) == 4
    for name, reason in cases.items():
        with pytest.raises(
            DataError, match=rf"image .*{name} does not open \(.*{reason}.*\); repair or remove it"
        ):
            Picture(name, str(tmp_path / name)).open()


def test_a_description_of_decoding_that_makes_no_sense_is_named(tmp_path):
    folder = material.tiny_open_clip(tmp_path / "tiny")
    file = folder / "open_clip_config.json"
    described = json.loads(file.read_text())
    described["preprocess_cfg"]["decoding"] = {"background": "white"}
    file.write_text(json.dumps(described))
    with pytest.raises(ValueError, match=r"preprocess_cfg\.decoding\.background: found 'white'"):
        models.load(str(folder))
