"""Compositional and counting tasks: known answers on the published file formats, and what must be
refused.
"""

import json
import sys
import types
from fnmatch import fnmatchcase

import pytest
import torch

from tests.eval import material
from vlp import plugin, watch
from vlp.eval import evaluation, models
from vlp.eval.embed import Context
from vlp.eval.pictures import Contents, DataError, Picture
from vlp.eval.tasks import aro, countbench, order, sugarcrepe, sugarcrepe_pp


def evaluate(task, encoder, **options):
    tasks = plugin.keyed("vlp.eval.tasks", {task: options})
    records, items = evaluation.evaluate(
        encoder, tasks, Context(batch=32, workers=2, contents=Contents())
    )
    # By these `checkpoint.best` and `stop` are checked.
    listed = watch.scores(tasks[0])
    for name in records[0]["metrics"]:
        assert any(fnmatchcase(name, score) for score in listed), name
    return records[0], items


def pictures(folder, n, names="{}.png", size=(8, 8)):
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(n):
        (folder / names.format(i)).write_bytes(material.png(material.picture(i, size)))
    return folder


def likes(word):
    """Every sentence with `word` is near every picture, others are not: right exactly where only
    the caption has it.
    """
    near, far = material.direction("near"), material.direction("far")
    return material.known_encoder(lambda n: near, lambda t: near if word in t else far)


# --- SugarCrepe -----------------------------------------------------------------------------------


def sugarcrepe_files(folder, per_subset=4, good=3):
    """All seven files; in each, `good` captions carry the word, the other negatives carry it."""
    folder.mkdir(parents=True, exist_ok=True)
    for s, subset in enumerate(sugarcrepe.SUBSETS):
        items = {}
        for i in range(per_subset + s):
            texts = ["yes", "no"] if i < good else ["no", "yes"]
            items[str(i * 2)] = {
                "filename": f"{i}.png",
                "caption": f"{texts[0]} {i}",
                "negative_caption": f"{texts[1]} {i}",
            }
        (folder / f"{subset}.json").write_text(json.dumps(items))
    return folder


def test_sugarcrepe_reports_seven_subsets_and_their_mean(tmp_path):
    data, images = sugarcrepe_files(tmp_path / "data"), pictures(tmp_path / "val2017", 10)
    record, _ = evaluate("sugarcrepe", likes("yes"), data=str(data), images=str(images))
    expected = {subset: 3 / (4 + s) for s, subset in enumerate(sugarcrepe.SUBSETS)}
    assert record["metrics"] == pytest.approx(expected | {"mean": sum(expected.values()) / 7})
    assert record["counts"]["items"] == sum(4 + s for s in range(7))
    assert (
        record["intervals_95"]["mean"][0]
        < record["metrics"]["mean"]
        < record["intervals_95"]["mean"][1]
    )


@pytest.mark.parametrize(
    "task", ["sugarcrepe", "sugarcrepe_pp", "valse", "winoground", "aro", "countbench"]
)
def test_a_constant_encoder_gets_nothing_right(task, tmp_path):
    record, _ = evaluate(task, material.constant(), **small(task, tmp_path))
    scores = {name: value for name, value in record["metrics"].items() if name != "mean_distance"}
    assert scores and set(scores.values()) == {0}
    assert record["chance"].keys() >= scores.keys()


def small(task, root):
    """Options for a tiny set in the published format of `task`; captions with "yes" are the right
    ones.
    """
    images = pictures(root / "images", 30)
    data = root / "data"
    data.mkdir(exist_ok=True)
    if task == "sugarcrepe":
        sugarcrepe_files(data)
    elif task == "sugarcrepe_pp":
        for subset in sugarcrepe_pp.SUBSETS:
            captions = {"caption": "yes a", "caption2": "yes b", "negative_caption": "no"}
            (data / f"{subset}.json").write_text(
                json.dumps([{"id": i, "filename": f"{i}.png", **captions} for i in range(3)])
            )
    elif task == "valse":
        for piece, votes in (("existence", [3, 2, 1]), ("foil-it", [3, 3, 0, 2])):
            items = {
                f"k{i}": {
                    "image_file": f"{i}.png",
                    "caption": "yes",
                    "foil": "no",
                    "mturk": {"caption": v, "foil": 0},
                }
                for i, v in enumerate(votes)
            }
            (data / f"{piece}.json").write_text(json.dumps(items))
    elif task == "winoground":
        rows = [
            {"id": i}
            | {
                f"{what}_{k}": f"{say}{2 * i + k}"
                for what, say in (("image", ""), ("caption", "say "))
                for k in (0, 1)
            }
            for i in range(4)
        ]
        (data / "examples.jsonl").write_text("\n".join(map(json.dumps, rows)))
    elif task == "aro":
        box = {"bbox_x": 0, "bbox_y": 0, "bbox_w": 4, "bbox_h": 4}
        cases = [
            {"image_path": f"{i}.png", "true_caption": "yes", "false_caption": "no", **box}
            for i in range(30)
        ]
        relations = [
            c | {"relation_name": "on" if i < 25 else "under"} for i, c in enumerate(cases)
        ]
        attributes = [c | {"attributes": ["red", "big"]} for c in cases]
        (data / "visual_genome_relation.json").write_text(json.dumps(relations))
        (data / "visual_genome_attribution.json").write_text(json.dumps(attributes))
    else:
        rows = [
            {
                "image": f"{i}.png",
                "text": f"a photo of {countbench.NUMBERS[i]} cats",
                "number": i + 2,
            }
            for i in range(9)
        ]
        data = data / "CountBench.json"
        data.write_text(json.dumps(rows))
    return {"data": str(data), "images": str(images)}


def test_a_table_of_sugarcrepe_has_its_subsets_alone(tmp_path):
    images = pictures(tmp_path / "images", 1)
    row = {"image": "0.png", "caption": "yes", "negative_caption": "no"}
    rows = [row | {"subset": subset} for subset in (*sugarcrepe.SUBSETS, "swap_verb")]
    table = tmp_path / "t.jsonl"
    table.write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(DataError, match="items of 'swap_verb'; expected the subsets add_att"):
        evaluate("sugarcrepe", likes("yes"), data=str(table), images=str(images))


def test_sugarcrepe_refuses_absent_files_and_images(tmp_path):
    options = small("sugarcrepe", tmp_path)
    with pytest.raises(
        DataError, match=r"annotations name images that are not in .*\n  29\.png|no images at"
    ):
        evaluate("sugarcrepe", likes("yes"), data=options["data"], images=str(tmp_path / "none"))
    (tmp_path / "images" / "0.png").unlink()
    with pytest.raises(DataError, match=r"7 of 49 annotations name images that are not in"):
        evaluate("sugarcrepe", likes("yes"), **options)
    record, _ = evaluate("sugarcrepe", likes("yes"), **options, missing="skip")
    assert record["counts"]["skipped"] == 7
    for i in range(1, 10):
        (tmp_path / "images" / f"{i}.png").unlink()
    kept = json.loads((tmp_path / "data" / "add_att.json").read_text())
    kept["0"]["filename"] = "20.png"
    (tmp_path / "data" / "add_att.json").write_text(json.dumps(kept))
    with pytest.raises(DataError, match=r"no item of add_obj, .*; the mean is over all 7 subsets"):
        evaluate("sugarcrepe", likes("yes"), **options, missing="skip")
    (tmp_path / "data" / "swap_obj.json").unlink()
    with pytest.raises(DataError, match=r"no annotations at .*swap_obj\.json"):
        evaluate("sugarcrepe", likes("yes"), **options)


def test_the_open_sugarcrepe_items_end_to_end_on_a_real_model(tmp_path):
    """Against the rule written out on the same model: caption strictly above negative, item by
    item.
    """
    table, images = material.shared("sugarcrepe_open.jsonl"), material.shared("coco_open.tar")
    folder = material.tiny_open_clip(tmp_path / "model")
    encoder = models.load(str(folder))
    record, items = evaluate("sugarcrepe", encoder, data=str(table), images=str(images))
    rows = material.read_jsonl(table)
    from vlp.eval.pictures import Collection

    found = Collection(images)
    image = encoder.encode_images([found.find(row["image"]).open() for row in rows]).double()
    caption, negative = (
        encoder.encode_texts([row[key] for row in rows]).double()
        for key in ("caption", "negative_caption")
    )
    hits = [float(x @ c > x @ n) for x, c, n in zip(image, caption, negative)]
    by_subset = {s: [h for h, r in zip(hits, rows) if r["subset"] == s] for s in sugarcrepe.SUBSETS}
    assert record["counts"]["items"] == 148
    for subset, own in by_subset.items():
        assert items[f"sugarcrepe/{subset}"][:, 0].tolist() == own, subset
    assert record["metrics"]["mean"] == pytest.approx(
        sum(sum(own) / len(own) for own in by_subset.values()) / 7
    )


# --- the others -----------------------------------------------------------------------------------


@pytest.mark.parametrize("task", ["sugarcrepe_pp", "valse", "aro"])
def test_an_encoder_that_knows_the_word_is_right(task, tmp_path):
    record, _ = evaluate(task, likes("yes"), **small(task, tmp_path))
    assert set(record["metrics"].values()) == {1}


def test_sugarcrepe_pp_needs_both_captions_and_has_a_text_only_side(tmp_path):
    options = small("sugarcrepe_pp", tmp_path)
    record, _ = evaluate("sugarcrepe_pp", likes("yes a"), **options)
    assert record["metrics"]["itt_mean"] == 0  # the second caption is no better than the negative
    # Caption 2 and the negative are the same to this encoder.
    assert record["metrics"]["tot_mean"] == 0
    assert {f"{w}_{s}" for w in ("itt", "tot") for s in (*sugarcrepe_pp.SUBSETS, "mean")} == record[
        "metrics"
    ].keys()


def test_valse_keeps_what_annotators_accepted(tmp_path):
    record, _ = evaluate("valse", likes("yes"), **small("valse", tmp_path))
    assert record["counts"] == {"items": 5, "rejected_by_annotators": 2, "skipped": 0}
    assert record["metrics"].keys() == {"existence", "foil-it", "mean"}


def test_aro_leaves_out_rare_attributes_and_the_published_relations_on_cut_pictures(tmp_path):
    options = small("aro", tmp_path)
    path = tmp_path / "data" / "visual_genome_relation.json"
    rows = json.loads(path.read_text())
    rows += [
        row | {"relation_name": "by", "true_caption": "no", "false_caption": "yes"}
        for row in rows[:25] * 2
    ]
    path.write_text(json.dumps(rows))

    # "on" has 25 items and "under" five: both count. "by" is one of the 157 left out.
    record, _ = evaluate("aro", likes("yes"), **options)
    assert len(set(aro.left_out())) == 157 and "by" in aro.left_out()
    assert record["metrics"]["vg_relation"] == 1
    assert record["counts"]["vg_relation_groups"] == 2

    # 25 right in "on", five in "under", 50 wrong in "by".
    record, _ = evaluate("aro", likes("yes"), **options, exclude=[])
    assert record["metrics"]["vg_relation"] == pytest.approx(2 / 3)
    data = evaluation.read_all(plugin.keyed("vlp.eval.tasks", {"aro": options}))[0]
    assert data["vg_attribution"].pictures[0].open().size == (4, 4)
    with pytest.raises(DataError, match="no group of at least 1 items that is not left out"):
        evaluate("aro", likes("yes"), **options, exclude=["by", "on", "under"])

    # Pairs of attributes need 25 items.
    path = tmp_path / "data" / "visual_genome_attribution.json"
    path.write_text(json.dumps(json.loads(path.read_text())[:24]))
    with pytest.raises(DataError, match="no group of at least 25 items"):
        evaluate("aro", likes("yes"), **options)

    # Two pairs that a common character would make one.
    rows = json.loads(path.read_text())
    pairs = [row | {"attributes": ["a_b", "c"]} for row in rows]
    pairs += [row | {"attributes": ["a", "b_c"]} for row in rows]
    path.write_text(json.dumps(pairs * 2))
    record, _ = evaluate("aro", likes("yes"), **options)
    assert record["counts"]["vg_attribution_groups"] == 2


def test_winoground_scores_text_image_and_group(tmp_path):
    options = small("winoground", tmp_path)
    say = {i: material.direction("say", i) for i in range(8)}
    perfect = material.known_encoder(lambda n: say[n], lambda t: say[int(t.split()[1])])
    assert set(evaluate("winoground", perfect, **options)[0]["metrics"].values()) == {1}
    # the second picture is the same as the first: texts can be told for it, pictures cannot
    blind = material.known_encoder(lambda n: say[n - n % 2], lambda t: say[int(t.split()[1])])
    assert evaluate("winoground", blind, **options)[0]["metrics"] == {
        "text_acc": 0,
        "image_acc": 0,
        "acc": 0,
    }
    # captions with a common part that lies nearer to every first picture: only one side of each
    # comparison can fail
    torch.manual_seed(0)
    vectors = {i: torch.nn.functional.normalize(torch.randn(4), dim=0) for i in range(16)}
    noisy = material.known_encoder(lambda n: vectors[n], lambda t: vectors[8 + int(t.split()[1])])
    text = image = group = 0
    for e in range(4):
        s = [[float(vectors[2 * e + p] @ vectors[8 + 2 * e + c]) for c in (0, 1)] for p in (0, 1)]
        t, i = s[0][0] > s[0][1] and s[1][1] > s[1][0], s[0][0] > s[1][0] and s[1][1] > s[0][1]
        text, image, group = text + t, image + i, group + (t and i)
    found = evaluate("winoground", noisy, **options)[0]["metrics"]
    assert found == {"text_acc": text / 4, "image_acc": image / 4, "acc": group / 4}
    (tmp_path / "images" / "3.png").unlink()
    with pytest.raises(DataError, match=r"1 of 8 annotations"):
        evaluate("winoground", perfect, **options)


# --- counting -------------------------------------------------------------------------------------


def test_only_whole_number_words_are_exchanged():
    assert countbench.say("Often TEN Ten ten tents", 10, 3) == "Often THREE Three three tents"


def counts_cats(error=0):
    def text(t):
        return material.direction(
            next(i for i, w in enumerate(countbench.NUMBERS) if f" {w} " in t)
        )

    return material.known_encoder(lambda n: material.direction(min(8, n + error)), text)


def test_countbench_scores_accuracy_and_distance(tmp_path):
    options = small("countbench", tmp_path)
    record, _ = evaluate("countbench", counts_cats(), **options)
    assert record["metrics"] == {"acc": 1, "mean_distance": 0}
    record, _ = evaluate("countbench", counts_cats(error=2), **options)
    assert record["metrics"] == pytest.approx({"acc": 1 / 9, "mean_distance": (7 * 2 + 1 + 0) / 9})
    assert record["chance"]["acc"] == pytest.approx(1 / 9)
    rows = json.loads((tmp_path / "data/CountBench.json").read_text())
    rows[4]["text"] = "a photo of 6 tents"
    (tmp_path / "data/CountBench.json").write_text(json.dumps(rows))
    with pytest.raises(
        DataError, match=r"1 captions do not say their number as a word, e.g. 'a photo of 6 tents'"
    ):
        evaluate("countbench", counts_cats(), **options)


# Of three random encoders, as scored before both tasks went over to grids.
BEFORE = {
    1: ({"acc": 2 / 9, "mean_distance": 32 / 9}, {"existence": 1 / 2, "foil-it": 1 / 3}),
    2: ({"acc": 1 / 9, "mean_distance": 34 / 9}, {"existence": 1.0, "foil-it": 2 / 3}),
    5: ({"acc": 2 / 9, "mean_distance": 28 / 9}, {"existence": 0.0, "foil-it": 1 / 3}),
}


@pytest.mark.parametrize("seed", BEFORE)
def test_countbench_and_valse_score_as_before_they_were_grids(tmp_path, seed):
    encoder = material.random_encoder(seed)
    of_countbench, of_valse = BEFORE[seed]
    (tmp_path / "count").mkdir()
    counted, _ = evaluate("countbench", encoder, **small("countbench", tmp_path / "count"))
    assert counted["metrics"] == of_countbench
    assert counted["counts"] == {"images": 9, "skipped": 0} and counted["chance"] == {"acc": 1 / 9}

    options = small("valse", tmp_path)
    for piece in ("existence", "foil-it"):
        path = tmp_path / "data" / f"{piece}.json"
        items = json.loads(path.read_text())
        for number, item in enumerate(items.values()):
            item |= {"caption": f"yes {piece} {number}", "foil": f"no {piece} {number}"}
        path.write_text(json.dumps(items))
    told, _ = evaluate("valse", encoder, **options)
    mean = (of_valse["existence"] + of_valse["foil-it"]) / 2
    assert told["metrics"] == pytest.approx(of_valse | {"mean": mean}, abs=1e-15)
    assert told["chance"] == dict.fromkeys(told["metrics"], 1 / 2)

    # Results of then and now stay comparable: the hash is over the same parts.
    rows = [("existence", i) for i in (0, 1)] + [("foil-it", i) for i in (0, 1, 3)]
    images = [Picture("", str(tmp_path / "images" / f"{i}.png")) for _, i in rows]
    captions = [[f"yes {piece} {i}", f"no {piece} {i}"] for piece, i in rows]
    pieces = [piece for piece, _ in rows]
    context = Context(contents=Contents())
    assert told["data_sha256"] == context.digest(images, captions, pieces)


def test_countbench_reads_the_hub_form(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = [
        {
            "image": {"bytes": material.png(material.picture(i)), "path": None},
            "text": f"see {w} cats",
            "number": i + 2,
        }
        for i, w in enumerate(countbench.NUMBERS)
    ]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "train-00000-of-00001.parquet")
    assert evaluate("countbench", counts_cats(), data=str(tmp_path))[0]["metrics"]["acc"] == 1
    rows[3]["image"] = None
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "train-00000-of-00001.parquet")
    with pytest.raises(DataError, match=r"1 of 9 rows hold no image bytes and no image's name"):
        evaluate("countbench", counts_cats(), data=str(tmp_path))


# --- word order, negatives in shards --------------------------------------------------------------


CAPTION = "The small brown dog is chasing a big white cat through the tall grass."


def test_order_sets_keep_words_and_what_they_say_they_keep():
    own, nouns, others, within, groups = order.candidates(CAPTION, order.by_words, 30, seed=0)
    assert own == "the small brown dog is chasing a big white cat through the tall grass"
    for shuffled in (nouns, others, within, groups):
        assert sorted(shuffled.split()) == sorted(own.split()) and shuffled != own
    content = {"small", "brown", "dog", "big", "white", "cat", "tall", "grass"}
    assert [w if w not in content else "_" for w in nouns.split()] == [
        w if w not in content else "_" for w in own.split()
    ]
    assert [w for w in others.split() if w in content] == [w for w in own.split() if w in content]
    words = own.split()
    assert all(
        sorted(within.split()[i : i + 3]) == sorted(words[i : i + 3]) for i in range(0, 12, 3)
    )
    assert {tuple(words[i : i + 3]) for i in range(0, 12, 3)} <= {
        tuple(groups.split()[i : i + 3]) for i in range(14)
    }
    assert order.candidates(CAPTION, order.by_words, 30, seed=0)[1] == nouns
    assert order.candidates(CAPTION, order.by_words, 30, seed=1)[1:] != [
        nouns,
        others,
        within,
        groups,
    ]


def test_a_shuffling_that_changes_nothing_is_no_rival():
    for seed in range(5):
        own, *rivals = order.candidates("a dog", order.by_words, 30, seed)
        assert own == "a dog" and set(rivals) <= {"dog a"}
    assert order.candidates("cats", order.by_words, 30, seed=0) == ["cats"]
    long = order.candidates("word " * 50 + "last", order.by_words, 30, seed=0)
    assert all(len(c.split()) <= 30 for c in long)


def order_set(root):
    captions = [[CAPTION, "two cats and a red ball on the floor"] for _ in range(5)]
    samples = [(material.png(material.picture(i)), texts) for i, texts in enumerate(captions)]
    return material.clip_benchmark_set(root, samples, kind="retrieval", n_shards=1)


def test_the_order_task_is_right_for_who_knows_the_order_and_wrong_for_a_bag_of_words(tmp_path):
    data = str(order_set(tmp_path))
    near = material.direction("near")
    cleaned = {order.clean(c, 30) for c in (CAPTION, "two cats and a red ball on the floor")}
    knows = material.known_encoder(
        lambda n: near, lambda t: near if t in cleaned else material.direction(t)
    )
    bag = material.known_encoder(lambda n: near, lambda t: material.direction(*sorted(t.split())))
    assert evaluate("order", knows, data=data, tagger="words")[0]["metrics"] == {"precision@1": 1}
    record, _ = evaluate("order", bag, data=data, tagger="words")
    assert record["metrics"] == {"precision@1": 0}
    assert 0.2 <= record["chance"]["precision@1"] < 0.3


def test_the_published_order_sets_need_spacy_and_use_its_tags(tmp_path, monkeypatch):
    data = str(order_set(tmp_path))
    monkeypatch.setitem(sys.modules, "spacy", None)
    with pytest.raises(DataError, match=r"spaCy.*tagger=words"):
        evaluate("order", material.constant(), data=data)
    tags = {
        "dog": "NN",
        "cat": "NNP",
        "grass.": "NNS",
        "small": "JJ",
        "big": "JJR",
        "brown": "JJS",
        "tall": "JJ",
    }

    def load(name):
        assert name == "en_core_web_sm"
        return lambda text: [
            types.SimpleNamespace(text=w, tag_=tags.get(w, "DT")) for w in text.split()
        ]

    monkeypatch.setitem(sys.modules, "spacy", types.SimpleNamespace(load=load))
    opened = evaluation.read_all(plugin.keyed("vlp.eval.tasks", {"order": {"data": data}}))[0]
    first = opened.captions[0]
    changed = {
        w for own, new in zip(first[0].split(), first[1].split()) if own != new for w in (own, new)
    }
    assert changed and changed <= {word.strip(".") for word in tags}


def test_negatives_in_shards_are_ranked_below_their_caption(tmp_path):
    members = []
    for i in range(4):
        meta = {
            "caption": "yes",
            "captions": ["yes", "other"],
            "negatives": ["no", "yes not"] if i else ["no"],
        }
        meta["negative_kinds"] = ["swap", "negation"][: len(meta["negatives"])]
        members += [
            (f"{i}.png", material.png(material.picture(i))),
            (f"{i}.json", json.dumps(meta).encode()),
        ]
    members += [("9.png", material.png(material.picture(9))), ("9.txt", b"no negatives here")]
    material.write_tar(tmp_path / "s" / "00000.tar", members)
    record, _ = evaluate("negatives", likes("yes"), data=str(tmp_path / "s"))
    # "yes not" ties with "yes".
    assert record["metrics"] == {
        "acc": 1 / 4,
        "acc_swap": 1,
        "acc_negation": 0,
    }
    assert record["chance"]["acc"] == pytest.approx((1 / 2 + 3 / 3) / 4)
    counts = {
        "images": 4,
        "captions": 4,
        "negatives": 7,
        "without_negatives": 1,
        "malformed": 0,
        "skipped": 0,
    }
    assert record["counts"] == counts
    material.write_tar(tmp_path / "t" / "00000.tar", members[-2:])
    with pytest.raises(DataError, match="vlp data negatives"):
        evaluate("negatives", likes("yes"), data=str(tmp_path / "t"))


@pytest.mark.parametrize(
    ("kinds", "scores"),
    [
        (["swap att", "swap_att"], {"acc_swap att": 1, "acc_swap_att": 0}),
        (["swap att", ""], {"acc_swap_att": 1, "acc_": 0}),
        (["swap", None], {}),
        (["swap"], {}),
    ],
)
def test_kinds_of_negatives_are_told_apart(tmp_path, kinds, scores):
    meta = {"caption": "yes", "negatives": ["no", "yes not"], "negative_kinds": kinds}
    members = [("0.png", material.png(material.picture(0))), ("0.json", json.dumps(meta).encode())]
    material.write_tar(tmp_path / "00000.tar", members)
    record, _ = evaluate("negatives", likes("yes"), data=str(tmp_path))
    assert record["metrics"] == {"acc": 0} | scores


def test_every_caption_stands_against_its_own_negatives(tmp_path):
    """The first negative is wrong only beside its own caption; beside the other it would win."""
    own = {
        "captions": ["yes one", "maybe two"],
        "negatives": ["given", "maybe one", "yes two", "masked yes yes"],
        "negatives_of": [-1, 0, 1, 1],
        "negative_kinds": list("gabm"),
        "negatives_valid": [True, True, True, False],
    }
    single = own | {
        "captions": ["yes"],
        "negatives": ["no"],
        "negatives_of": [0],
        "negative_kinds": ["a"],
    }
    wrong = {"captions": ["yes"], "negatives": ["no"], "negatives_of": [1]}
    samples = [own, single | {"negatives_valid": [True]}, wrong, {"captions": ["yes"]}]
    members = [(f"{i}.json", json.dumps(meta).encode()) for i, meta in enumerate(samples)]
    members += [(f"{i}.png", material.png(material.picture(i))) for i in range(len(samples))]
    material.write_tar(tmp_path / "s" / "00000.tar", members)
    record, items = evaluate("negatives", likes("yes"), data=str(tmp_path / "s"))
    # "yes one" beats "given" and "maybe one"; "maybe two" loses to "yes two" and ties with "given".
    assert record["metrics"] == {"acc": 2 / 3, "acc_a": 1, "acc_b": 0, "acc_g": 1 / 2}
    assert record["chance"]["acc"] == pytest.approx((1 / 3 + 1 / 3 + 1 / 2) / 3)
    counts = {
        "images": 2,
        "captions": 3,
        "negatives": 5,
        "without_negatives": 1,
        "malformed": 1,
        "skipped": 0,
    }
    assert record["counts"] == counts
    # A picture with its captions is what intervals draw.
    assert items["negatives/acc"].tolist() == [
        [1, 2],
        [1, 1],
    ]
    # Negative control: nobody says whose they are, the first caption stands against all.
    del own["negatives_of"]
    material.write_tar(
        tmp_path / "t" / "00000.tar", [("0.json", json.dumps(own).encode()), members[4]]
    )
    record, _ = evaluate("negatives", likes("yes"), data=str(tmp_path / "t"))
    assert record["metrics"]["acc"] == 0 and record["counts"]["captions"] == 1
    material.write_tar(tmp_path / "u" / "00000.tar", [("2.json", members[2][1]), members[4 + 2]])
    with pytest.raises(
        DataError, match=r"1 samples: its negatives are not used: negatives_of names caption 1 of 1"
    ):
        evaluate("negatives", likes("yes"), data=str(tmp_path / "u"))
