"""MMEB's files: queries of a picture, a text or both, by models that read both as one and by
others.
"""

import json
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from tests import ranks
from tests.eval import material
from tests.eval.test_choices import evaluate
from tests.models import multimodals
from tests.models.tiny import tiny
from vlp.eval import models, queries
from vlp.eval.embed import Context
from vlp.eval.pictures import DataError
from vlp.eval.queries import Entry
from vlp.eval.tasks import mmeb

MARK = queries.MARK


def pictures(folder, n=6):
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(n):
        (folder / f"{i}.png").write_bytes(material.png(material.picture(i)))
    return folder


def row(text, path, candidates):
    """A row of the published form; candidates are (text, path), the right one first."""
    texts, paths = zip(*candidates)
    return {
        "qry_text": text,
        "qry_img_path": path,
        "tgt_text": list(texts),
        "tgt_img_path": list(paths),
    }


# Of two data sets: words about a picture, a picture and a question about it, words for a picture.
ROWS = {
    "I2T set": [
        row(f"{MARK}\nDescribe it.", "1.png", [("one", ""), ("two", "")]),
        row(f"{MARK}\nDescribe it.", "2.png", [("two", ""), ("one", ""), ("two", "")]),
        row(f"{MARK}\nDescribe it.", "3.png", [("four", ""), ("three", "")]),
    ],
    "T2I": [
        row("Find it: one", "", [(f"{MARK}\nAn image.", "1.png"), (f"{MARK}\nAn image.", "2.png")]),
        row("Find it: two", "", [("", "2.png"), ("", "1.png"), ("", "4.png")]),
    ],
}


def write(folder, rows=ROWS):
    """One data set as parquet, the other as lines of JSON, in a folder each."""
    import pyarrow
    import pyarrow.parquet

    for number, (name, of_set) in enumerate(rows.items()):
        (folder / name).mkdir(parents=True)
        if number:
            lines = "\n".join(map(json.dumps, of_set))
            (folder / name / "test.jsonl").write_text(lines)
        else:
            table = pyarrow.Table.from_pylist(of_set)
            pyarrow.parquet.write_table(table, folder / name / "test-00000-of-00001.parquet")
    return folder


NUMBERS = {"one": 1, "two": 2, "three": 3, "four": 4}


def reads_both():
    """A picture and words are of the direction of the number that they show or name."""

    def of_text(text):
        named = [number for word, number in NUMBERS.items() if word in text]
        return material.direction(*(named or ["nothing", text]))

    def of_both(pixels, texts):
        assert all(before == "" and after.strip() for before, after in texts)
        return torch.stack([material.direction(int(n)) for n in pixels[:, 0]])

    return replace(material.known_encoder(material.direction, of_text), joint=of_both)


def test_the_share_of_right_first_candidates_of_each_set_and_their_mean(tmp_path):
    data, images = write(tmp_path / "mmeb"), pictures(tmp_path / "eval images")
    options = {"data": str(data), "images": str(images)}
    record, _ = evaluate("mmeb", reads_both(), **options)
    assert record["metrics"] == pytest.approx({"I2T set": 2 / 3, "T2I": 1, "mean": 5 / 6})
    assert record["chance"] == pytest.approx(
        {"I2T set": 1 / 2, "T2I": (1 / 2 + 1 / 3) / 2, "mean": (1 / 2 + 5 / 12) / 2}
    )
    # The right one again is no candidate against itself.
    counts = {"items": 5, "candidates": 11, "repeated": 1, "skipped": 0}
    assert record["counts"] == counts
    low, high = record["intervals_95"]["mean"]
    assert low <= 5 / 6 <= high and record["data_sha256"]

    one, _ = evaluate("mmeb", reads_both(), **options, subsets=["T2I"])
    assert one["metrics"] == {"T2I": 1, "mean": 1}
    alone, _ = evaluate(
        "mmeb", reads_both(), data=str(data / "T2I" / "test.jsonl"), images=str(images)
    )
    assert alone["metrics"] == {"test": 1, "mean": 1}


def test_a_model_without_any_preference_is_never_right(tmp_path):
    data, images = write(tmp_path / "mmeb"), pictures(tmp_path / "images")
    same = replace(material.constant(), joint=lambda pixels, _: material.constant().image(pixels))
    record, _ = evaluate("mmeb", same, data=str(data), images=str(images))
    assert set(record["metrics"].values()) == {0}


def test_two_towers_take_one_of_both_or_their_sum(tmp_path):
    data, images = write(tmp_path / "mmeb"), pictures(tmp_path / "images")
    options = {"data": str(data), "images": str(images)}
    encoder = replace(reads_both(), joint=None)
    with pytest.raises(DataError, match=r"3 of 5 queries hold both, 1 have.*together=sum"):
        evaluate("mmeb", encoder, **options)

    by_image, _ = evaluate("mmeb", encoder, **options, together="image")
    assert by_image["metrics"]["mean"] == pytest.approx(5 / 6)
    by_text, _ = evaluate("mmeb", encoder, **options, together="text")
    assert by_text["metrics"]["T2I"] == 1 / 2  # what is said of two pictures is the same

    picture, words = (mmeb.read(mmeb.Options(**options)).queries[0].asked,) * 2
    rows = queries.embeddings(encoder, [picture, words], "sum", Context(workers=0))
    sides = material.direction(1) + material.direction("nothing", "Describe it.")
    torch.testing.assert_close(rows[0], F.normalize(sides.double(), dim=0), rtol=0, atol=1e-6)


BAD = {
    "lists of two lengths": ({"tgt_img_path": [""]}, "row 0: .*expected two lists of one length"),
    "no candidate": ({"tgt_text": [], "tgt_img_path": []}, "row 0: .*empty, expected candidates"),
    "nothing": ({"qry_text": MARK, "qry_img_path": ""}, "row 0: .*neither text nor picture"),
    "a picture": ({"qry_img_path": "9.png"}, "1 of . annotations name images that are not in"),
    "a column": ({"tgt_text": ...}, "lacks tgt_text"),
    "a number": ({"qry_text": 5}, "row 0: found 5 in place of a text"),
    "numbers": ({"tgt_text": [1, 2, 3]}, "row 0: found 1 in place of a text"),
    "an instruction": ({"qry_inst": {"en": "Find"}}, "row 0: found .*Find.* in place of a text"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_is_wrong_is_said(tmp_path, case):
    changed, message = BAD[case]
    written = {key: value for key, value in (ROWS["T2I"][1] | changed).items() if value is not ...}
    path = tmp_path / "mmeb.jsonl"
    path.write_text(json.dumps(written))
    with pytest.raises(DataError, match=message):
        mmeb.read(mmeb.Options(str(path), str(pictures(tmp_path / "images"))))


def test_other_folders_and_sets_are_refused_and_missing_pictures_left_out(tmp_path):
    with pytest.raises(DataError, match="no queries at"):
        mmeb.read(mmeb.Options(str(tmp_path / "absent")))
    images = pictures(tmp_path / "images")
    with pytest.raises(DataError, match="holds no table"):
        mmeb.read(mmeb.Options(str(images)))
    # Its cells are no lists.
    (tmp_path / "of cells.csv").write_text(",".join(mmeb.COLUMNS) + "\nq,,['a'],['']\n")
    with pytest.raises(DataError, match="holds no table"):
        mmeb.read(mmeb.Options(str(tmp_path / "of cells.csv"), str(images)))
    rows = {name: list(of_set) for name, of_set in ROWS.items()}
    rows["T2I"].append(row("one", "", [("", "absent.png"), ("", "1.png")]))
    data = write(tmp_path / "mmeb", rows)
    with pytest.raises(DataError, match="no data set 'T2V'; it has I2T set, T2I"):
        mmeb.read(mmeb.Options(str(data), str(images), subsets=["T2V"]))
    left = mmeb.read(mmeb.Options(str(data), str(images), missing="skip"))
    assert len(left.queries) == 5 and left.skipped == ["absent.png"]


def test_marks_and_instructions_say_where_a_picture_stands():
    picture = material.picture(1)
    assert Entry.of(f"see {MARK}\nand say", picture) == Entry(picture, "see ", "\nand say")
    assert Entry.of("say", picture) == Entry(picture, "", "say")
    assert Entry.of(f"{MARK} \n say it", None) == Entry(None, "say it")
    assert not Entry.of(MARK, picture).has_both and Entry.of(f"{MARK} x", picture).has_both


TEXTS = [("", " red circle"), ("two ", " dog a blue cat"), ("", " a")]


@pytest.mark.parametrize("family", multimodals.FAMILIES)
def test_transformers_itself_gives_the_embeddings_of_both(tmp_path, family):
    from transformers import AutoModel, AutoProcessor

    folder = multimodals.multimodal_model(tmp_path, family)
    encoder = models.from_model(tiny(**multimodals.tower(folder)))
    theirs, processor = (
        AutoModel.from_pretrained(folder).eval(),
        AutoProcessor.from_pretrained(folder),
    )
    token = "<|vision_start|><|image_pad|><|vision_end|>" if family != "llava" else "<image>"
    images = [material.picture(40 * i, (multimodals.SIZE,) * 2) for i in range(3)]
    pixels = torch.stack([encoder.prepare(image) for image in images])
    together = encoder.encode_joint(pixels, TEXTS)

    # Each alone, through the processor as a whole.
    for image, (before, after), row_of_both in zip(images, TEXTS, together):
        prompt = multimodals.PROMPTS["prompt_text"].format(f"{before}{token}{after}")
        read = processor(images=image, text=prompt, return_tensors="pt")
        with torch.no_grad():
            expected = theirs(**read, use_cache=False).last_hidden_state[0, -1]
        torch.testing.assert_close(row_of_both, F.normalize(expected, dim=0), rtol=0, atol=2e-5)
    assert (together[0] - together[2]).abs().max() > 0.01

    # What is written as a picture's token is a word of the text.
    written = encoder.encode_joint(pixels[:1], [("", f" {token} red circle")])
    torch.testing.assert_close(written[0], together[0], rtol=0, atol=2e-5)


def test_a_run_of_the_task_by_a_multimodal_model(tmp_path):
    folder = multimodals.multimodal_model(tmp_path / "model", "qwen2_vl")
    encoder = models.from_model(tiny(**multimodals.tower(folder)))
    data, images = write(tmp_path / "mmeb"), pictures(tmp_path / "images")
    record, _ = evaluate("mmeb", encoder, data=str(data), images=str(images))
    assert set(record["metrics"]) == {"I2T set", "T2I", "mean"}


@pytest.mark.parametrize("family", multimodals.FAMILIES)
def test_texts_beside_a_picture_are_cut_to_the_context_of_captions(tmp_path, family):
    encoder = models.from_model(
        tiny(**multimodals.tower(multimodals.multimodal_model(tmp_path, family)))
    )
    pixels = torch.stack([encoder.prepare(material.picture(1, (multimodals.SIZE,) * 2))] * 3)
    # Of 16 tokens the prompt has 4.
    texts = [(" cat" * n_before, " dog" * n) for n_before, n in ((4, 8), (4, 90), (4, 7))]
    whole, longer, shorter = encoder.encode_joint(pixels, texts)
    assert torch.equal(whole, longer) and not torch.equal(whole, shorter)
    before = encoder.encode_joint(pixels[:2], [(" cat" * 12, ""), (" cat" * 50, " dog")])
    assert torch.equal(*before)

    row = {"before": " cat" * 90, "after": ""}
    context = Context(workers=0)
    entries = [
        Entry(material_picture(tmp_path), **row),
        Entry(material_picture(tmp_path), "", " dog"),
    ]
    queries.embeddings(encoder, entries, "model", context)
    (reading,) = context.readings.values()
    assert (reading.n_texts, reading.n_truncated) == (2, 1)


def material_picture(folder):
    """A picture of the kind that evaluation reads."""
    options = mmeb.Options(str(folder / "one.jsonl"), str(pictures(folder / "images")))
    (folder / "one.jsonl").write_text(json.dumps(ROWS["I2T set"][0]))
    return mmeb.read(options).queries[0].asked.picture


def of_rank(data, images):
    """What a rank comes to of a model of two towers, and of one that reads both."""
    options = {"data": data, "images": images}
    records = [
        evaluate("mmeb", encoder, **options, together=together)[0]
        for encoder, together in (
            (reads_both(), "model"),
            (replace(reads_both(), joint=None), "sum"),
        )
    ]
    return [(record["metrics"], record["counts"], record["data_sha256"]) for record in records]


@pytest.mark.slow
def test_two_ranks_come_to_what_one_does(tmp_path):
    places = str(write(tmp_path / "mmeb")), str(pictures(tmp_path / "images"))
    assert ranks.run(2, of_rank, *places) == [of_rank(*places)] * 2
