"""Pairs of texts: a query in the picture's place, from tables, through the text tower."""

import json
import os
import sys
from dataclasses import replace

import pytest
import torch

from tests import ranks
from tests.data.material import data_of, loader_of, picture, write_shards
from tests.models import multimodals
from tests.models.tiny import WORDS, tiny
from tests.models.tiny import settings as model_of
from tests.test_step import ROWS, assert_close, gradients_and_weights, make_batch
from vlp import checkpoint, config
from vlp.data import text as tokenizers
from vlp.data.tables.parquet import parse_parquet
from vlp.eval import models
from vlp.export.folder import export_run
from vlp.models.embedding import embed, passes_towers
from vlp.train import train

N = 40
COLUMNS = {"query": "sent0", "text": "sent1", "negatives": "hard_neg"}
FIELDS = ("image", "text", "negatives", "negatives_valid", "sample_id")


def words(i):
    """Two words of the tiny vocabulary, other ones for each of a hundred numbers."""
    known = WORDS[3:]
    return f"{known[i % len(known)]} {known[i // len(known) % len(known)]}"


def rows(n=N):
    """Sentences that differ in every column; the second has no contradiction."""
    return [
        {
            "sent0": f"query {i} {words(i)}",
            "sent1": f"it follows {words(i)} {i}",
            "hard_neg": "" if i == 1 else f"not {words(i + 40)} {i}",
            "class": f"kind {i % 3}",
        }
        for i in range(n)
    ]


def write_table(path, entries):
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    elif path.suffix == ".parquet":
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(entries), path)
        assert len(parse_parquet(path)[0]) == len(entries)
    else:
        lines = [",".join(entry.values()) for entry in entries]
        path.write_text("\n".join([",".join(entries[0]), *lines]) + "\n")
    return path


def of_table(path, **more):
    return {"name": "texts", "path": str(path), **COLUMNS, **more}


def test_tables_of_every_kind_give_one_batch(tmp_path):
    batches = []
    for ending in (".csv", ".jsonl", ".parquet"):
        path = write_table(tmp_path / f"a table{ending}", rows())
        loader = loader_of(data_of(of_table(path), pairs="text"), 8, reads=frozenset(FIELDS))
        batches.append(next(loader))
    tokens = tokenizers.build(loader._steps.text)
    assert len(batches) == 3

    for batch in batches:
        assert batch.is_of_texts
        for name in FIELDS:
            assert torch.equal(getattr(batch, name), getattr(batches[0], name)), name
    for i, query, text in zip(batch.sample_id.tolist(), batch.image, batch.text):
        assert torch.equal(query, tokens([rows()[i]["sent0"]])[0])
        assert torch.equal(text, tokens([rows()[i]["sent1"]])[0])
    n_negatives = sum(bool(row["hard_neg"]) for row in rows())
    epoch = [next(loader) for _ in range(4)]
    n_valid = sum(int(one.negatives_valid.sum()) for one in [batches[2], *epoch])
    assert n_valid == n_negatives


def test_ranks_and_a_resume_give_the_same_rows(tmp_path):
    data = data_of(of_table(write_table(tmp_path / "t.jsonl", rows())), pairs="text")
    whole = loader_of(data, 8)
    expected = [next(whole) for _ in range(7)]
    halves = [loader_of(data, 8, rank=rank, world=2) for rank in range(2)]
    for batch in expected[:3]:
        parts = [next(half).image for half in halves]
        assert torch.equal(torch.cat(parts), batch.image)

    first = loader_of(data, 8)
    for _ in range(3):
        next(first)
    again = loader_of(data, 8)
    again.load_state_dict(first.state_dict())
    assert torch.equal(next(again).image, expected[3].image)


REFUSED = {
    "pictures": ({"pairs": "text"}, "shards", r"pairs is text.*sources.0 holds pictures"),
    "no pictures": ({}, "table", r"holds pairs of texts, and data.pairs is image"),
    "a column": ({"pairs": "text"}, {"query": "sent"}, r"no column 'sent'.*did you mean 'sent"),
    "one column twice": (
        {"pairs": "text"},
        {"negatives": "sent1"},
        r"expected different columns",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_data_that_do_not_fit_are_refused(tmp_path, case):
    options, source, message = REFUSED[case]
    table = of_table(write_table(tmp_path / "t.csv", rows()))
    if source == "shards":
        table = {"name": "shards", "path": str(write_shards(tmp_path / "s", 8, 8))}
    elif source != "table":
        table |= source
    with pytest.raises(ValueError, match=message):
        loader_of(data_of(table, **options), 8)


def test_rows_without_a_text_are_named_and_may_be_left_out(tmp_path):
    entries = [*rows(), {**rows(1)[0], "sent0": " "}, {**rows(1)[0], "sent1": ""}]
    path = write_table(tmp_path / "t.csv", entries)
    with pytest.raises(ValueError, match=r"2 rows cannot be used, of 42(?s:.)*t.csv:42: .*'sent0'"):
        loader_of(data_of(of_table(path), pairs="text"), 8)
    loader = loader_of(data_of(of_table(path, on_missing="skip"), pairs="text"), 8)
    assert loader.n_samples == N and loader.n_left_out == 2


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    names = multimodals.FAMILIES
    return {
        name: multimodals.multimodal_model(tmp_path_factory.mktemp(name), name) for name in names
    }


def texts_batch(rows=slice(None)):
    """Two texts a row, of different lengths, and two wrong ones of which some do not count."""
    generator = torch.Generator().manual_seed(2)
    ids = torch.randint(3, 14, (ROWS, 4, 16), generator=generator)
    n_tokens = torch.arange(ROWS).unsqueeze(1) % 7 + torch.arange(4) + 3
    ids = ids.masked_fill(torch.arange(16) >= n_tokens.unsqueeze(2), -1)
    valid = torch.arange(2 * ROWS).view(ROWS, 2) % 5 > 0
    return replace(
        make_batch(rows),
        image=ids[rows, 0],
        text=ids[rows, 1],
        negatives=ids[rows, 2:],
        negatives_valid=valid[rows],
    )


@pytest.mark.parametrize("family", multimodals.FAMILIES)
def test_queries_pass_the_text_tower(folders, family):
    model = tiny(**multimodals.tower(folders[family]))
    batch = texts_batch()
    embedded = embed(model, batch, {"image", "text", "negatives"})
    for name in ("image", "text"):
        expected = model.encode_text(getattr(batch, name))
        torch.testing.assert_close(embedded[name], expected, rtol=0, atol=2e-6)
    assert (embedded["image"] - embedded["text"]).abs().max() > 0.1
    n_pictures, n_tokens = passes_towers(model, batch, {"image", "text"})
    assert n_pictures == 0 and n_tokens > 1.4 * passes_towers(model, batch, {"text"})[1]


@pytest.mark.parametrize("lora", [None, {"r": 2}], ids=["whole", "adapters"])
@pytest.mark.parametrize("family", multimodals.FAMILIES)
def test_what_texts_pass_learns_and_nothing_else(folders, family, lora):
    from vlp.models.build import build

    model = build(model_of(**multimodals.tower(folders[family], lora=lora)), texts_alone=True)
    embedded = embed(model.train(), texts_batch(), {"image", "text"})
    (embedded["scale"] * (embedded["image"] * embedded["text"]).sum()).backward()
    learning = {name: p for name, p in model.named_parameters() if p.requires_grad}
    of_texts = {name for name in learning if "language_model." in name}
    assert len(of_texts) > 10 and learning.keys() - of_texts == {"scaling.logit_scale"}
    # DDP would wait for the others for ever.
    assert [name for name, p in learning.items() if p.grad is None] == []


OBJECTIVE = {"hard_negatives": {"form": "negclip", "image_weight": 1}, "siglip": {"weight": 0.3}}


def gradients(folder, micro_batches, **options):
    towers = multimodals.tower(folder) if folder else {}
    return gradients_and_weights(
        micro_batches,
        steps=1,
        batch=texts_batch,
        whole=model_of(**towers, bias=-2.0) if folder else None,
        texts_alone=True,
        objective=OBJECTIVE,
        **options,
    )


def on_two(folder, engines):
    # DeepSpeed looks for ninja.
    os.environ["PATH"] = os.path.dirname(sys.executable) + os.pathsep + os.environ["PATH"]
    return [
        gradients(folder, 3, engine=engine, double=not engine.startswith("zero"))
        for engine in engines
    ]


@pytest.mark.parametrize("family", multimodals.FAMILIES)
def test_micro_batches_change_nothing(folders, family):
    expected = gradients(folders[family], 1)[0]
    # A gradient that goes nowhere would prove nothing.
    assert sum(any(values) for values in expected.values()) > 10
    assert_close(gradients(folders[family], 4)[0], expected, 2e-5)


# DeepSpeed starts once a process.
ENGINES = [("ddp", "fsdp2"), ("zero2",), ("zero3",)]


@pytest.mark.slow
@pytest.mark.parametrize("engines", ENGINES, ids="+".join)
@pytest.mark.parametrize("family", multimodals.FAMILIES)
def test_ranks_change_nothing(folders, family, engines):
    in_double = "ddp" in engines
    expected = gradients(folders[family], 1, double=in_double)[0]
    n_compared = 0
    for of_rank in ranks.run(2, on_two, folders[family], engines):
        for of_engine, *_ in of_rank:
            assert_close(of_engine, expected, 2e-5)
            n_compared += 1
    assert n_compared == 2 * len(engines)


NEEDS_PICTURES = {
    "augment": (["data.augment={flip: 0.5}"], r"no pictures, which data.augment would need"),
    "views": (["data.views={}"], r"no pictures, which data.views would need"),
    "a judge": (
        ["teacher.cross_encoder=mllm:absent"],
        r"no pictures, which teacher.cross_encoder would need",
    ),
    "a video": (
        ["model.heads.modalities={video: {frames: {}}}"],
        r"no pictures, which model.heads.modalities.video.frames would need",
    ),
    "a head": (
        ["objective={mc_infonce: {}}", "model.heads.concentration={}"],
        r"needs \['image_concentration'\], which come from pixels, and data.pairs is text",
    ),
    "translators": (
        ["objective={translation: {}}", "model.heads.translators={}"],
        r"needs \['cycled', 'translated'\], which come from pixels, and data.pairs is text",
    ),
}


def run_of(tmp_path, folder, *overrides):
    """A run on a table of texts, by a multimodal model with adapters."""
    described = {
        "out": str(tmp_path / "run"),
        "data": {
            "sources": [of_table(write_table(tmp_path / "t.csv", rows()))],
            "pairs": "text",
            "workers": 0,
        },
        "model": multimodals.tower(folder, lora={"r": 2}),
        "train": {
            "duration": 4,
            "batch": 8,
            "micro_batches": 2,
            "precision": "float32",
            "optimizer": {"warmup": 1},
        },
        "objective": OBJECTIVE | {"siglip": {"weight": 0.1}},
        "checkpoint": {"every": 2},
        "log": {"every": 1},
    }
    described["model"]["bias"] = -2.0
    path = tmp_path / "run.json"
    path.write_text(json.dumps(described))
    return config.load(path, list(overrides))


@pytest.mark.parametrize("case", NEEDS_PICTURES)
def test_what_needs_pictures_is_refused(folders, tmp_path, case):
    overrides, message = NEEDS_PICTURES[case]
    with pytest.raises(ValueError, match=message):
        train(run_of(tmp_path, folders["llava"], *overrides))


def losses(run):
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line["loss"] for line in records if line["kind"] == "train"]


def test_a_run_resumes_and_its_export_reads_pictures(folders, tmp_path):
    whole = train(run_of(tmp_path, folders["qwen2_vl"]))
    cut = f"out={tmp_path / 'cut'}"
    train(run_of(tmp_path, folders["qwen2_vl"], cut, "train.duration=2"))
    again = train(run_of(tmp_path, folders["qwen2_vl"], cut, "resume=auto"))
    assert losses(again)[-2:] == losses(whole)[-2:] and len(set(losses(whole))) == 4

    export_run(whole, tmp_path / "an export")
    exported = models.load(str(tmp_path / "an export"))
    trained = checkpoint.load_any(str(whole)).eval()
    before = tiny(**multimodals.tower(folders["qwen2_vl"]))
    pixels = torch.stack([exported.prepare(picture(i)) for i in range(3)])
    expected = trained.encode_image(pixels)
    torch.testing.assert_close(exported.encode_images(pixels), expected, rtol=0, atol=1e-5)
    # What was learnt of texts moves what is seen.
    assert (before.encode_image(pixels) - expected).abs().max() > 1e-4
