"""`vlp data concepts`: which words are concepts, by WordNet's rules; counts, numbers and labels
against plain loops; what is refused; the same bytes after a kill and in several parts.
"""

from __future__ import annotations

import json
import zipfile
from collections import Counter
from pathlib import Path

import pytest

from tests.data_tools.mining import counted
from tests.data_tools.nouns import write_wordnet
from tests.data_tools.test_work import digests
from tests.data_tools.tools import call, read
from vlp.data.format import ShardWriter
from vlp.data_tools import concepts
from vlp.data_tools.concepts import wordnet


@pytest.fixture(scope="module")
def nouns_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_wordnet(tmp_path_factory.mktemp("wordnet") / "corpora" / "wordnet")


@pytest.mark.parametrize(
    ("caption", "named", "as_written"),
    [
        ("a cat and a dog", ["cat", "dog"], ["cat", "dog"]),
        ("Two CATS in a bus", ["cat", "bus"], ["bus"]),
        ("the dog’s and the woman's boxes", ["dog", "woman", "box"], ["dog", "woman"]),
        ("children, wolves; churches. ponies!", ["child", "wolf", "church", "pony"], []),
        ("women and men", ["woman", "man"], []),
        ("glasses on a glass", ["glass", "glass"], ["glass"]),
        ("an autobus in 7 inches", ["inch"], []),  # in: WordNet's inch, called by another word
        ("a kid in a T-shirt", ["t-shirt"], ["t-shirt"]),  # kid: its first synset is child
        ("leaves of axes", ["leaf", "ax"], []),
        ("", [], []),
    ],
)
def test_concepts_are_words_that_name_their_first_synset(
    nouns_folder: Path, caption: str, named: list[str], as_written: list[str]
) -> None:
    assert list(wordnet.read(str(nouns_folder)).in_caption(caption)) == named
    assert list(wordnet.read(str(nouns_folder), lemmas=False).in_caption(caption)) == as_written


def test_wordnet_is_found_where_it_is_installed(
    nouns_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    nouns = wordnet.read(str(nouns_folder))
    root = tmp_path / "nltk data"
    (root / "corpora").mkdir(parents=True)
    with zipfile.ZipFile(root / "corpora" / "wordnet.zip", "w") as archive:
        for name in wordnet.FILES:
            archive.write(nouns_folder / name, f"wordnet/{name}")
    assert wordnet.read(str(root / "corpora" / "wordnet.zip")) == nouns

    monkeypatch.setenv("NLTK_DATA", f"{tmp_path / 'absent'}:{root}")
    assert wordnet.read(None) == nouns and nouns.digest() == wordnet.read(None).digest()
    monkeypatch.setattr(wordnet, "usual_places", lambda: [tmp_path / "nowhere"])
    with pytest.raises(ValueError, match="in no usual place; install it with `apt-get install"):
        wordnet.read(None)


CAPTIONS = [
    ["a dog and a cat", "the dogs"],
    ["a cat"],
    ["a Cat on a bus", "a woman"],
    ["nothing at all"],
    ["boxes of cats"],
    ["dogs"],
]


def write(folder: Path) -> Path:
    with ShardWriter(folder, 5) as writer:
        for i in range(12):
            meta = {"concepts": [9], "concept_weights": [1], "kept": i}
            captions = CAPTIONS[i % len(CAPTIONS)]
            writer.add(f"k{i:02}", f"image {i}".encode(), "jpg", captions, meta)
    return folder


def test_samples_get_the_numbers_of_their_concepts(
    nouns_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    source = write(tmp_path / "in put")
    out = tmp_path / "out"
    options = ["--wordnet", nouns_folder, "--min-count", 2]
    call(concepts, source, *options, "--to", out)

    # By a plain loop: cat in 4 of the 6 kinds of samples, dog in 2, the others in 1, each twice.
    nouns = wordnet.read(str(nouns_folder))
    named = {
        key: list(dict.fromkeys(w for c in sample.captions for w in nouns.in_caption(c)))
        for key, sample in read(source).items()
    }
    counts = Counter(word for words in named.values() for word in words)
    words = ["cat", "dog", "box", "bus", "woman"]
    assert counts == dict(zip(words, [8, 4, 2, 2, 2]))
    rows = [line.split("\t") for line in (out / "concepts.tsv").read_text().splitlines()]
    assert rows[0] == ["number", "synset", "offset", "samples"]
    assert rows[1:] == [
        [str(i), f"{word}.n.01", f"{nouns.synsets[word]:08d}", str(counts[word])]
        for i, word in enumerate(words)
    ]

    labelled = read(out)
    assert labelled.keys() == named.keys() and len(labelled) == 12
    for key, sample in labelled.items():
        assert sample.meta["concepts"] == [words.index(word) for word in named[key]]
        assert "concept_weights" not in sample.meta and sample.meta["kept"] == int(key[1:])
    printed = capsys.readouterr().out
    assert "5 concepts: model.heads.concepts=5" in printed
    assert counted(printed, "samples with a concept") == 10
    assert counted(printed, "samples without a concept") == 2

    # Held-out samples are labelled by the same numbers.
    call(concepts, source, "--wordnet", nouns_folder, "--top", 2, "--min-count", 1,
         "--to", tmp_path / "two")  # fmt: skip
    table = tmp_path / "two" / "concepts.tsv"
    call(concepts, source, "--wordnet", nouns_folder, "--vocabulary", table,
         "--to", tmp_path / "val")  # fmt: skip
    assert (tmp_path / "val" / "concepts.tsv").read_bytes() == table.read_bytes()
    for key, sample in read(tmp_path / "val").items():
        assert sample.meta["concepts"] == [i for i in labelled[key].meta["concepts"] if i < 2]

    # What a killed call left is taken up, and several parts write the same.
    before = digests(out)
    for name in ("00001.tar", "00001_concepts.json", "00000_named.json", "concepts.tsv"):
        (out / name).unlink()
    call(concepts, source, *options, "--to", out)
    assert digests(out) == before
    for part in (1, 2, 1, 2):
        call(concepts, source, *options, "--part", f"{part}/2", "--to", tmp_path / "parts")
    assert digests(tmp_path / "parts") == before and len(before) == 3
    for folder in (out, tmp_path / "parts"):
        assert [
            line.split("\t") for line in (folder / "concepts.tsv").read_text().splitlines()
        ] == rows


def test_more_concepts_than_a_batch_carries_are_left_out_and_counted(
    nouns_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:  # fmt: skip
    from vlp.data_tools.concepts import label

    monkeypatch.setattr(label, "MOST_CONCEPTS", 2)
    with ShardWriter(tmp_path / "in", 5) as writer:
        writer.add("k", b"image", "jpg", ["a bus, a cat, a dog", "a box, a cat"], {})
    options = ["--wordnet", nouns_folder, "--min-count", 1]
    call(concepts, tmp_path / "in", *options, "--to", tmp_path / "out")
    sample = read(tmp_path / "out")["k"]
    assert sample.meta["concepts"] == [1, 2]  # box, bus, cat, dog: bus and cat stand first
    printed = capsys.readouterr().out
    assert counted(printed, "concepts left out: beyond 2 of a sample") == 2


BAD_TABLES = {
    "no rows": "number\tsynset\toffset\tsamples\n",
    "another head": "a\tb\n0\tdog.n.01\t00000231\t3\n",
    "a hole": "number\tsynset\toffset\tsamples\n1\tdog.n.01\t00000231\t3\n",
    "no synset": "number\tsynset\toffset\tsamples\n0\tdog\t00000231\t3\n",
    "no number": "number\tsynset\toffset\tsamples\n0\tdog.n.01\tx\t3\n",
    "another WordNet": "number\tsynset\toffset\tsamples\n0\tdog.n.01\t02084071\t3\n",
}


def test_what_is_mistyped_is_refused_before_anything_is_read(
    nouns_folder: Path, tmp_path: Path
) -> None:
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "index.noun").write_text("dog\n")
    (broken / "data.noun").write_text("dog\n")
    (broken / "noun.exc").write_text("")
    trials = [
        (["--min-count", 0], "--min-count is 0; expected at least 1"),
        (["--top", 0], "--top is 0"),
        (["--vocabulary", "x.tsv", "--top", 3], "--top chooses concepts, and --vocabulary brings"),
        (["--vocabulary", tmp_path / "absent.tsv"], "cannot be read"),
        (["--wordnet", tmp_path / "absent"], "index.noun cannot be read"),
        (["--wordnet", broken], "found the line 'dog', expected WordNet's database files"),
    ]
    for name, content in BAD_TABLES.items():
        path = tmp_path / f"{name}.tsv"
        path.write_text(content)
        reason = "this WordNet has it at" if name == "another WordNet" else "expected concepts.tsv"
        trials.append((["--wordnet", nouns_folder, "--vocabulary", path], reason))

    for options, reason in trials:
        with pytest.raises(ValueError, match=reason.replace("(", r"\(")):
            call(concepts, tmp_path / "no such shards", *options, "--to", tmp_path / "out")
    assert len(trials) == 12 and not (tmp_path / "out").exists()


def test_a_count_that_nothing_reaches_says_what_is_there(
    nouns_folder: Path, tmp_path: Path
) -> None:
    source, out = write(tmp_path / "in"), tmp_path / "out"
    with pytest.raises(ValueError, match=r"by 500 samples .the commonest: cat 8, dog 4, box 2."):
        call(concepts, source, "--wordnet", nouns_folder, "--to", out)
    with pytest.raises(ValueError, match=r"made from other input or settings .*min_count"):
        call(concepts, source, "--wordnet", nouns_folder, "--min-count", 2, "--to", out)
    claimed = json.loads((out / "_concepts.json").read_text())["settings"]
    assert claimed["min_count"] == 500 and claimed["lemmas"] is True
