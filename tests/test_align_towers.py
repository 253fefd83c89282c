"""The recipe `align_towers`, with the published weights that it names."""

import json

import pytest

from tests.data.material import REAL, needs_data
from tests.data_tools.tools import call
from vlp import config
from vlp.data_tools import embed, pack
from vlp.eval.evaluation import in_training
from vlp.models.build import build
from vlp.train import train

RECIPE = config.find("align_towers")


def test_nothing_of_the_published_towers_learns():
    """So pictures may be stored, and the weights stay those that were published."""
    model = build(config.load(RECIPE).model)
    learning = {name for name, value in model.named_parameters() if value.requires_grad}
    assert learning == {"text.proj.0.weight", "text.proj.2.weight", "scaling.logit_scale"}


@needs_data
@pytest.mark.slow
def test_the_towers_meet_on_a_small_part(tmp_path):
    """As the header says for stored pictures, on 302 photos of classes and 55 with captions;
    retrieval among 56 others.
    """
    photos = (REAL / "caltech101.tar", "--captions", REAL / "caltech101.jsonl")
    coco = (REAL / "coco_open.tar", "--captions", REAL / "coco_open.jsonl")
    call(pack, *photos, "--where", "split=train", "--part", "1/20", "--to", tmp_path / "classes")
    call(pack, *coco, "--part", "1/2", "--to", tmp_path / "captions")
    held_out = tmp_path / "held_out"
    call(pack, *coco, "--part", "2/2", "--layout", "clip_benchmark", "--to", held_out)

    def settings(out, *more):
        paths = [
            f"data.sources.{place}.path={tmp_path / name}"
            for place, name in enumerate(("classes", "captions"))
        ]
        keys = ["data.workers=0", "train.batch=64", "log.every=1", *paths, *more]
        return config.load(RECIPE, [f"out={tmp_path / out}", *keys])

    untrained = train(settings("untrained", "train.duration=1", "eval={}"))
    stored = []
    for place, name in enumerate(("classes", "captions")):
        folder = tmp_path / f"{name}_embedded"
        call(embed, tmp_path / name, "--model", untrained, "--to", folder)
        stored.append(f"data.sources.{place}.embeddings={folder}")

    test = f"eval={{retrieval: {{data: {held_out}}}}}"
    precomputed = "model.image_tower.precomputed=true"
    run = train(settings("run", "train.duration=30", precomputed, *stored, test), in_training)

    (record,) = json.loads((run / "results.json").read_text())
    assert record["counts"]["images"] == 56
    for name in ("text_retrieval_recall@1", "image_retrieval_recall@1"):
        assert record["metrics"][name] > 6 * record["chance"][name], record["metrics"]
