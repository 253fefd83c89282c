"""Class names and templates in other languages: from clip_benchmark's package, and from files."""

from __future__ import annotations

import json

import pytest

from tests.eval import material
from vlp import plugin
from vlp.eval import evaluation, imagenet, prompts
from vlp.eval.embed import Context
from vlp.eval.pictures import DataError
from vlp.eval.prompts import translated

# Two classes have one name, as in Chinese-CLIP's list.
NAMES = ["丁鲷", *(f"类{i}" for i in range(998)), "丁鲷"]
TEMPLATES = ["{c}的照片。", "许多{c}的照片。"]


def install(folder, names=NAMES):
    """A package with clip_benchmark's lists."""
    lists = folder / "clip_benchmark" / "datasets"
    lists.mkdir(parents=True)
    (folder / "clip_benchmark" / "__init__.py").write_text("raise ImportError('not imported')")
    for code in translated.IMAGENET.values():
        (lists / f"{code}_classnames.json").write_text(json.dumps({"imagenet1k": names}))
        content = json.dumps({"imagenet1k": TEMPLATES})
        (lists / f"{code}_zeroshot_classification_templates.json").write_text(content)
    return lists


@pytest.fixture
def synsets(tmp_path):
    """Two pictures of every class, by synset."""
    root = tmp_path / "imagenet"
    for number, synset in enumerate(imagenet.synsets()[:3]):
        (root / synset).mkdir(parents=True)
        (root / synset / "a.png").write_bytes(material.png(material.picture(number)))
    return root


def evaluate(**options):
    """Picture n is near every prompt of the n-th name."""
    number = {name: i for i, name in reversed(list(enumerate(NAMES)))}

    def of_text(text: str):
        name = text.removesuffix("。").removesuffix("的照片").removeprefix("许多")
        return material.direction(number.get(name, text))

    encoder = material.known_encoder(material.direction, of_text)
    tasks = plugin.keyed("vlp.eval.tasks", {"zeroshot": options})
    return evaluation.evaluate(encoder, tasks, Context(workers=0))[0][0]


def test_names_and_templates_of_a_language_come_from_the_package(tmp_path, monkeypatch, synsets):
    install(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    assert {"imagenet_zh", "imagenet_ja", "photo_zh"} <= set(prompts.sets())
    assert prompts.templates("imagenet_ja") == ["{}的照片。", "许多{}的照片。"]

    # The language's templates go with its names, unless others are asked for.
    options = {"data": str(synsets), "partial": True, "language": "zh"}
    record = evaluate(**options, classes="imagenet_zh")
    assert record["metrics"]["acc1"] == 1 and record["counts"]["templates"] == 2
    assert record["language"] == "zh"
    record = evaluate(**options, classes="imagenet_zh", templates="photo_zh")
    assert record["counts"]["templates"] == 1


def test_files_of_a_language_are_read_at_their_path(tmp_path, synsets):
    lists = install(tmp_path)
    (tmp_path / "label_cn.txt").write_text("\n".join(NAMES), encoding="utf-8")
    templates = str(lists / "cn_zeroshot_classification_templates.json")
    n_cases = 0
    for names in (lists / "cn_classnames.json", tmp_path / "label_cn.txt"):
        record = evaluate(data=str(synsets), classes=str(names), templates=templates)
        assert record["metrics"]["acc1"] == 1 and record["counts"]["classes"] == 1000
        n_cases += 1
    assert n_cases == 2


@pytest.mark.parametrize("name", translated.IMAGENET)
def test_where_the_package_is_absent_the_line_that_installs_it_is_told(monkeypatch, synsets, name):
    monkeypatch.setattr(translated.importlib.util, "find_spec", lambda package: None)
    assert name not in prompts.sets()
    line = "pip install --no-deps clip_benchmark"
    with pytest.raises(DataError, match=line):
        evaluate(data=str(synsets), partial=True, classes=name)
    with pytest.raises(DataError, match=line):
        evaluate(data=str(synsets), partial=True, templates=name)


def test_another_version_of_the_package_is_named(tmp_path, monkeypatch):
    lists = install(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    (lists / "cn_classnames.json").write_text("[]")
    with pytest.raises(DataError, match=r"is not clip_benchmark 1\.6's list"):
        imagenet.names("imagenet_zh")


def test_every_photo_template_has_one_place_for_the_name():
    for name in translated.PHOTO:
        (template,) = prompts.templates(name)
        assert template.count("{}") == 1, name
    assert len(translated.PHOTO) == 10


def test_sentences_of_a_single_class_are_no_templates_of_all(tmp_path):
    (tmp_path / "one.json").write_text(json.dumps({"cat": ["A cat purrs."]}))
    assert prompts.templates(str(tmp_path / "one.json")) == {"cat": ["A cat purrs."]}
