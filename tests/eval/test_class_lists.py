"""Class lists meet the data by name where any name is a class of it, else by number or position;
what is unclear is refused."""

import json

import pytest

from tests.eval import material
from vlp.eval import imagenet
from vlp.eval.classes import ClassList, assign, read_list
from vlp.eval.pictures import DataError
from vlp.eval.tasks import zeroshot


def tree(root, *folders):
    for i, folder in enumerate(folders):
        (root / folder).mkdir(parents=True)
        (root / folder / "a.png").write_bytes(material.png(material.picture(i)))
    return root


def of_pictures(data, **options):
    """{number of the picture: the class name it counts as}, with all classes."""
    read = zeroshot.read(zeroshot.Options(str(data), **options))
    numbers = [material.number_of(record.picture.open()) for record in read.source.records]
    return {n: read.classes[label] for n, label in zip(numbers, read.labels.tolist())}, read.classes


@pytest.mark.parametrize("form", ["list", "file"])
def test_names_in_another_order_go_by_name(tmp_path, form):
    root = tree(tmp_path / "t", "cat", "cow", "dog")
    names = ["dog", "cat", "cow"]
    (tmp_path / "names.txt").write_text("\n".join(names))
    given = names if form == "list" else str(tmp_path / "names.txt")
    assert of_pictures(root, classes=given) == ({0: "cat", 1: "cow", 2: "dog"}, names)


def test_one_name_spelled_otherwise_is_refused_with_the_nearest(tmp_path):
    root = tree(tmp_path / "t", "cat", "cow", "dog")
    with pytest.raises(DataError, match=r"1 of them unknown by name: 'cow', did you mean 'cows'\?"):
        of_pictures(root, classes=["dog", "cat", "cows"])


@pytest.mark.parametrize(
    ("folders", "names", "expected"),
    [
        (["red_fox", "Grey-Wolf"], ["grey wolf", "RED FOX"], {0: "RED FOX", 1: "grey wolf"}),
        (
            ["cat", "dog"],
            ["dog", "cat", "an extra"],
            {0: "cat", 1: "dog"},
        ),  # a candidate without pictures
        (
            ["k2", "k1"],
            ["first", "second"],
            {0: "second", 1: "first"},
        ),  # by position: no name is a folder's
        (
            ["0", "2", "10"],
            [f"n{i}" for i in range(11)],
            {0: "n0", 1: "n2", 2: "n10"},
        ),  # by number from 0
        (
            ["1", "2", "10", *map(str, range(3, 10))],
            [f"n{i}" for i in range(10)],
            {0: "n0", 1: "n1", 2: "n9", 3: "n2"},
        ),
        (["Cat", "cat"], ["cat", "Cat"], {0: "Cat", 1: "cat"}),  # the own spelling counts first
        (["cafe\u0301", "tea"], ["tea", "café"], {0: "café", 1: "tea"}),
    ],
)
def test_which_name_a_folder_takes(tmp_path, folders, names, expected):
    counted, listed = of_pictures(tree(tmp_path, *folders), classes=names)
    assert listed == names
    assert {n: counted[n] for n in expected} == expected


@pytest.mark.parametrize(
    ("folders", "names", "message"),
    [
        (
            ["k1", "k2"],
            ["a", "b", "c"],
            r"lists 3 names but .* has 2 classes \(k1, k2.*none of the names is one of them",
        ),
        (
            ["0", "7"],
            ["a", "b"],
            "numbers its classes up to 7, but classes= lists 2 names, which count from 0",
        ),
        (
            ["red fox", "dog"],
            ["red-fox", "Red_Fox", "dog"],
            "'red fox' of the data may be any of 'red-fox', 'Red_Fox'",
        ),
        (["cat", "dog"], ["cat", "dog", "cat"], "repeats class names: 'cat' in lines 1 and 3"),
        (["cat", "dog"], ["cat", " ", "dog"], "line 2: a blank class name"),
        (["cat", "dog"], [], "holds no class name"),
        (["cat", "dog"], ["", ""], "holds no class name"),
    ],
)
def test_lists_that_do_not_fit_are_refused(tmp_path, folders, names, message):
    with pytest.raises(DataError, match=message):
        of_pictures(tree(tmp_path, *folders), classes=names)


FILES = [
    ("c.txt", "cat\ndog\ncow\n\n \n"),
    ("c.txt", "\ufeffcat\r\ndog\r\ncow\r\n"),
    ("c.txt", "0 cat\n1 dog\n2 cow\n"),
    ("c.txt", "2: cow\n0: cat\n1: dog"),
    ("c.txt", "1\tcat\n2\tdog\n3\tcow\n"),
    ("c.csv", "cat\ndog\ncow\n"),
    ("c.csv", "class\ncat\ndog\ncow\n\n"),
    ("c.csv", "id,name\n2,cow\n0,cat\n1,dog\n"),
    ("c.csv", "cat,0\ndog,1\ncow,2\n"),
    ("c.tsv", "index\tclass name\n0\tcat\n1\tdog\n2\tcow\n"),
    ("c.json", '["cat", "dog", "cow"]'),
    ("c.json", '{"classes": ["cat", "dog", "cow"]}'),
    ("c.json", '{"0": "cat", "2": "cow", "1": "dog"}'),
    ("c.json", '{"dog": 1, "cat": 0, "cow": 2}'),
    ("c.json", '{"0": ["n1", "cat"], "1": ["n2", "dog"], "2": ["n3", "cow"]}'),
    (
        "c.json",
        '{"categories": [{"id": 1, "name": "cat"}, {"id": 2, "name": "dog"}, '
        '{"id": 3, "name": "cow"}]}',
    ),
]


def test_every_form_of_a_class_file_gives_the_same_names(tmp_path):
    n_cases = 0
    for name, text in FILES:
        (tmp_path / name).write_text(text, encoding="utf-8")
        assert read_list(tmp_path / name).names == ["cat", "dog", "cow"], text
        n_cases += 1
    (tmp_path / "c.txt").write_bytes("cat\ndog\ncow\n".encode("utf-16"))
    assert read_list(tmp_path / "c.txt").names == ["cat", "dog", "cow"]
    assert n_cases == 16


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("c.csv", "folder,name\nk2,cow\nk1,cat\n"),
        ("c.json", '{"k2": "cow", "k1": "cat"}'),
        ("c.csv", "k2,cow\nk1,cat\n"),
    ],
)
def test_a_file_may_say_which_folder_has_which_name(tmp_path, name, text):
    (tmp_path / name).write_text(text)
    assert of_pictures(tree(tmp_path / "t", "k1", "k2"), classes=str(tmp_path / name))[0] == {
        0: "cat",
        1: "cow",
    }


def test_names_that_begin_with_a_number_keep_it(tmp_path):
    (tmp_path / "c.txt").write_text("2 euro\n1 euro\n5 euro\n")
    assert read_list(tmp_path / "c.txt").names == ["2 euro", "1 euro", "5 euro"]


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("c.txt", b"cat\n\ndog\n", r"c\.txt, line 2: a blank class name"),
        ("c.txt", b"cat\ndog\ncat\n", r"c\.txt repeats class names: 'cat' in lines 1 and 3"),
        ("c.txt", b"caf\xe9\n", r"c\.txt is not UTF-8 \(byte 3\); save it as UTF-8"),
        ("c.txt", b"\n\n", r"c\.txt holds no class name"),
        (
            "c.csv",
            b"id,name\n0,cat\n1,dog,cow\n",
            r"c\.csv, row 2: found 3 fields, the first row has 2",
        ),
        ("c.json", b"{", r"c\.json is not JSON"),
        ("c.json", b"3", r"c\.json holds int, expected a list of names or a mapping"),
        ("c.json", b'{"0": "cat", "2": "dog"}', r"not from 0 without a gap \(see number 1\)"),
        ("c.json", b'[{"id": 1}]', r"found None, expected the name of a class"),
    ],
)
def test_broken_class_files_are_named_with_their_line(tmp_path, name, data, message):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(DataError, match=message):
        read_list(tmp_path / name)


def test_imagenets_synsets_take_names_by_their_number(tmp_path):
    """Also of three folders of the thousand, from a list of a thousand names, and from
    LOC_synset_mapping.txt."""
    synsets, names = imagenet.synsets(), imagenet.names()
    root = tree(tmp_path / "t", *(synsets[i] for i in (3, 500, 999)))
    expected = {0: names[3], 1: names[500], 2: names[999]}
    # Two of them are twice in it, as published.
    (tmp_path / "names.txt").write_text("\n".join(names))
    assert of_pictures(root, classes=str(tmp_path / "names.txt"))[0] == expected
    (tmp_path / "loc.txt").write_text(
        "\n".join(f"{s} {n}, a synonym" for s, n in reversed(list(zip(synsets, names))))
    )
    assert of_pictures(root, classes=str(tmp_path / "loc.txt"))[0] == expected


def test_shards_with_numbers_and_names_take_another_list_by_name(tmp_path):
    samples = [(material.png(material.picture(i)), i) for i in range(3)]
    root = material.clip_benchmark_set(
        tmp_path / "s", samples, classes=["cat", "cow", "dog"], templates=["{c}"]
    )
    assert of_pictures(root, classes=["dog", "cat", "cow"])[0] == {0: "cat", 1: "cow", 2: "dog"}
    assert of_pictures(root, classes=["Katze", "Kuh", "Hund"])[0] == {
        0: "Katze",
        1: "Kuh",
        2: "Hund",
    }
    with pytest.raises(DataError, match="'cow', did you mean 'cows'"):
        of_pictures(root, classes=["dog", "cat", "cows"])
    (root / "classnames.txt").write_text("cat\ncow\ndog\n\n\n")
    assert of_pictures(root) == ({0: "cat", 1: "cow", 2: "dog"}, ["cat", "cow", "dog"])
    (root / "classnames.txt").write_text("cat\n\ndog\n")
    with pytest.raises(DataError, match=r"classnames\.txt, line 2: a blank class name"):
        of_pictures(root)


def test_numbers_of_plain_shards_are_named_by_the_list_beside_them(tmp_path):
    members = []
    for i in range(3):
        members += [
            (f"{i}.png", material.png(material.picture(i))),
            (f"{i}.cls", str(2 - i).encode()),
        ]
    material.write_tar(tmp_path / "0.tar", members)
    (tmp_path / "classnames.txt").write_text("cat\ncow\ndog\n")
    assert of_pictures(tmp_path)[0] == {0: "dog", 1: "cow", 2: "cat"}


def test_numbers_and_names_in_one_set_are_refused(tmp_path):
    members = []
    for i, meta in enumerate(({"class": "cat"}, {"cls": 1})):
        members += [
            (f"{i}.png", material.png(material.picture(i))),
            (f"{i}.json", json.dumps(meta).encode()),
        ]
    material.write_tar(tmp_path / "0.tar", members)
    with pytest.raises(DataError, match=r"some classes of .* are numbers and some are names"):
        of_pictures(tmp_path)


def test_assigning_a_thousand_names_takes_no_time():
    import time

    names = [f"class number {i}" for i in range(5000)]
    started = time.perf_counter()
    assert len(assign([name.replace(" ", "_") for name in names], ClassList(names), "x")) == 5000
    assert time.perf_counter() - started < 2
