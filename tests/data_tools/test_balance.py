"""`vlp data balance`: matching against the published substring rule, counts and draws against plain
loops, on any number of processes, after a kill, and what is refused.
"""

from __future__ import annotations

import json
import math
import pickle
import random
from collections import Counter
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest

from tests.data_tools.mining import counted
from tests.data_tools.test_work import digests
from tests.data_tools.tools import call, read
from vlp.data.format import ShardWriter
from vlp.data_tools import balance
from vlp.data_tools.balance.draw import uniform
from vlp.data_tools.balance.queries import Queries, hash_of
from vlp.data_tools.balance.report import Counts, evenness


def spaced(text: str) -> str:
    """As MetaCLIP prepares a caption."""
    text = f" {text} "
    for mark in ",.;:?!`":
        text = text.replace(mark, f" {mark} ")
    for blank in "\t\n\r":
        text = text.replace(blank, " ")
    return text


def test_a_query_is_a_substring_between_blanks() -> None:
    rng = random.Random(0)
    words = ["red", "dog", "a", "Dog", "dogs", ".", "s", "new", "york", "猫", "T恤", "寿司", "a.b"]
    texts = [" ".join(rng.choices(words, k=rng.choice([1, 1, 2, 2, 3, 5]))) for _ in range(400)]
    queries = Queries(texts)
    assert len(queries) == len(set(texts)) > 150
    without_blanks = "猫恤寿司"

    n = 0
    for _ in range(500):
        gaps = [rng.choice([" ", " ", "  ", ", ", "\n", ".", "", "!"]) for _ in range(9)]
        caption = "".join(rng.choice(words) + gap for gap in gaps)
        text = spaced(caption)
        expected = set()
        for number, query in enumerate(queries.texts):
            before = "" if query[0] in without_blanks else " "
            after = "" if query[-1] in without_blanks else " "
            if before + query + after in text:
                expected.add(number)
        assert queries.held_by(caption) == expected, caption
        n += len(expected)
    assert n > 2000

    lower = Queries(["New York", "new york", "DOG"], ignore_case=True)
    assert lower.texts == ["new york", "dog"] and lower.held_by("a Dog in NEW\tYORK.") == {0, 1}


VOCABULARY = ["dog", "cat", "red dog", "sofa", "unicorn", "narwhal", "never said"]


def write(folder: Path, n: int = 400, per_shard: int = 90) -> Path:
    """Captions with few, many and no queries; some samples have two, or none."""
    rng = random.Random(1)
    with ShardWriter(folder, per_shard) as writer:
        for i in range(n):
            words = rng.choices(["dog", "cat", "sofa", "red dog", "nothing"], [8, 4, 2, 3, 3], k=2)
            if i % 57 == 0:
                words.append("unicorn")
            if i % 131 == 7:
                words = ["narwhal"]
            captions = [f"a {words[0]} here", " ".join(f"one {word}," for word in words[1:])]
            captions = captions[: (i % 4 > 0 and 2) or 1] if i % 50 else []
            writer.add(f"k{i:04}", f"image {i}".encode(), "jpg", captions)
    return folder


def queries_file(path: Path, texts: list[str]) -> Path:
    path.write_text(json.dumps(texts) if path.suffix == ".json" else "\n".join(texts))
    return path


def expected_matches(source: Path) -> dict[str, set[str]]:
    found: dict[str, set[str]] = {}
    for key, sample in read(source).items():
        texts = [spaced(caption) for caption in sample.captions]
        found[key] = {q for q in VOCABULARY if any(f" {q} " in text for text in texts)}
    return found


def test_counts_caps_and_draws(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    source = write(tmp_path / "in")
    file = queries_file(tmp_path / "q.json", [*VOCABULARY, "dog", " "])
    call(balance, source, "--queries", file, "--cap", 60, "--to", tmp_path / "out")

    matches = expected_matches(source)
    before = Counter(q for queries in matches.values() for q in queries)
    assert before["dog"] > 120 and before["cat"] > 60 and 0 < before["narwhal"] < 60
    kept = set()
    for key, queries in matches.items():
        for query in queries:
            ends = [np.array([hash_of(text)], np.uint64) for text in (key, query)]
            if uniform(0, *ends)[0] < min(1, 60 / before[query]):
                kept.add(key)
    after = read(tmp_path / "out")
    assert set(after) == kept and 100 < len(kept) < 300
    samples = read(source)
    assert all(sample.image == samples[key].image for key, sample in after.items())

    # The tail as a whole, and the report says all of it.
    assert {key for key in matches if matches[key] & {"narwhal", "unicorn"}} <= kept
    report = json.loads((tmp_path / "out" / "balance.json").read_text())
    counted_after = Counter(q for key in kept for q in matches[key])
    rows = [line.split("\t") for line in (tmp_path / "out/counts.tsv").read_text().splitlines()]
    assert {row[0]: (int(row[1]), int(row[2])) for row in rows[1:]} == {
        query: (before[query], counted_after[query]) for query in VOCABULARY
    }
    assert [row[0] for row in rows[1:3]] == [query for query, _ in before.most_common(2)]
    n_head = sum(count > 60 for count in before.values())
    in_tail = sum(count for count in before.values() if count <= 60)
    assert report["head_queries"] == n_head and report["queries"] == len(VOCABULARY)
    assert report["tail_share_of_matches"] == pytest.approx(in_tail / before.total())
    assert report["commonest"][0] == {
        "query": "dog", "before": before["dog"], "after": counted_after["dog"]
    }  # fmt: skip
    assert report["rarest"][0]["query"] == min(before, key=lambda query: before[query])
    assert report["after"]["gini"] < report["before"]["gini"]

    out = capsys.readouterr().out
    assert counted(out, "samples read") == 400 and counted(out, "samples written") == len(kept)
    n_matched = sum(map(bool, matches.values()))
    assert counted(out, "samples that hold a query") == n_matched
    assert counted(out, "dropped: holds no query") == 400 - n_matched
    dropped = counted(out, "dropped: above the cap of each of its queries")
    assert dropped == n_matched - len(kept)
    assert f"drawn: {len(kept):,}; expected {report['samples']['expected']:,.0f} ±" in out
    page = (tmp_path / "out" / "balance.html").read_text()
    assert "narwhal" in page and "never said" not in page


def test_draws_have_the_published_probability() -> None:
    """p_i = min(1, t / c_i) a query, 1 − Π (1 − p_i) a sample: within 4.5 standard deviations of
    the exact expectation, for draws, and for pairs of draws of one sample.
    """
    n = 100_000
    keys = np.array([hash_of(f"key {i}") for i in range(n)], np.uint64)
    queries = [np.full(n, hash_of(text), np.uint64) for text in ("dog", "cat", "a")]
    draws = [uniform(3, keys, query) for query in queries]
    n_checked = 0
    for a, p in ((0, 0.3), (1, 0.02), (2, 0.75)):
        for b, q in ((1, 0.5), (2, 0.1)):
            either = (draws[a] < p) | (draws[b] < q) if a != b else draws[a] < p
            expected = 1 - (1 - p) * (1 - q) if a != b else p
            deviation = math.sqrt(expected * (1 - expected) / n)
            assert abs(either.mean() - expected) < 4.5 * deviation
            n_checked += 1
    assert n_checked == 6

    # Other seeds draw others, and all numbers lie in [0, 1).
    other = uniform(4, keys, queries[0])
    assert abs(np.corrcoef(draws[0], other)[0, 1]) < 4.5 / math.sqrt(n)
    assert other.min() >= 0 and other.max() < 1


def test_a_draw_depends_on_neither_order_nor_shards(tmp_path: Path) -> None:
    source = write(tmp_path / "in", 120, 50)
    samples = read(source)
    keys = list(samples)
    random.Random(5).shuffle(keys)
    with ShardWriter(tmp_path / "shuffled", 70) as writer:
        for key in keys:
            writer.add(key, samples[key].image, "jpg", list(samples[key].captions))

    kept = []
    for i, (shards, texts, seed) in enumerate(
        [
            (source, VOCABULARY, 0),
            (tmp_path / "shuffled", VOCABULARY[::-1], 0),
            (source, VOCABULARY, 1),
        ]
    ):
        file = queries_file(tmp_path / f"{i}.txt", texts)
        options = ["--queries", file, "--cap", 12, "--seed", seed, "--to", tmp_path / f"out{i}"]
        call(balance, shards, *options)
        kept.append(set(read(tmp_path / f"out{i}")))
    assert kept[0] == kept[1] != kept[2]


@pytest.mark.slow  # nine processes; what is sent to them is tested below
def test_any_number_of_processes(tmp_path: Path) -> None:
    source, file = write(tmp_path / "in"), queries_file(tmp_path / "q.txt", VOCABULARY)
    options = [source, "--queries", file, "--cap", 50]
    call(balance, *options, "--to", tmp_path / "one")
    call(balance, *options, "--to", tmp_path / "three", "--processes", 3)
    assert digests(tmp_path / "one") == digests(tmp_path / "three")
    reports = [(tmp_path / name / "balance.json").read_bytes() for name in ("one", "three")]
    assert reports[0] == reports[1]


def test_queries_in_another_process_hold_the_same() -> None:
    queries = Queries(["new york", "dog", "寿司"], ignore_case=True)
    sent = pickle.loads(pickle.dumps(queries))
    captions = ["A Dog in NEW york", "寿司屋", "dogs"]
    assert [sent.held_by(text) for text in captions] == [queries.held_by(text) for text in captions]
    assert sent.digest() == queries.digest() and sent.held_by("dog") == {1}


def test_going_on_after_a_kill_between_the_passes(tmp_path: Path) -> None:
    source, file = write(tmp_path / "in", 60, 15), queries_file(tmp_path / "q.txt", VOCABULARY)
    options = [source, "--queries", file, "--cap", 9]
    call(balance, *options, "--to", tmp_path / "one")
    whole = digests(tmp_path / "one")
    assert len(whole) == 4
    report = (tmp_path / "one" / "balance.json").read_bytes()

    for name in ("00003_matches.json", "00003_kept.json", "00003_balance.json", "00003.tar"):
        (tmp_path / "one" / name).unlink()
    (tmp_path / "one" / "balance.json").unlink()
    call(balance, *options, "--to", tmp_path / "one")
    assert digests(tmp_path / "one") == whole
    assert (tmp_path / "one" / "balance.json").read_bytes() == report

    with pytest.raises(
        ValueError, match=r"made from other input or settings .*cap: 9 then, 51 now"
    ):
        call(balance, *options[:-1], 51, "--to", tmp_path / "one")


def test_the_parts_of_two_machines_are_the_whole(tmp_path: Path) -> None:
    source, file = write(tmp_path / "in", 60, 15), queries_file(tmp_path / "q.txt", VOCABULARY)
    options = [source, "--queries", file, "--cap", 9]
    call(balance, *options, "--to", tmp_path / "whole")
    assert len(digests(tmp_path / "whole")) == 4

    # Two calls each: counts and draw are of all shards, so each waits for the other.
    for part in ("1/2", "2/2", "1/2", "2/2"):
        assert not (tmp_path / "parts" / "balance.json").exists()
        call(balance, *options, "--to", tmp_path / "parts", "--part", part)
    assert digests(tmp_path / "parts") == digests(tmp_path / "whole")
    reports = [(tmp_path / name / "balance.json").read_bytes() for name in ("parts", "whole")]
    assert reports[0] == reports[1]


def test_a_report_alone(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    source, file = write(tmp_path / "in", 150), queries_file(tmp_path / "q.json", VOCABULARY)
    options = [source, "--queries", file, "--report-only"]
    call(balance, *options, "--to", tmp_path / "now")
    report = json.loads((tmp_path / "now" / "balance.json").read_text())
    assert "after" not in report and "cap" not in report and report["before"]["matches"] > 150
    assert "before: 6 of 7 queries occur" in capsys.readouterr().out

    # With a cap: what would stay, as it then does.
    call(balance, *options, "--cap", 20, "--to", tmp_path / "then")
    call(balance, *options[:-1], "--cap", 20, "--to", tmp_path / "out")
    then, done = (
        json.loads((tmp_path / name / "balance.json").read_text()) for name in ("then", "out")
    )
    assert then["after"] == done["after"] and then["samples"] == done["samples"]
    assert not list((tmp_path / "then").glob("*.tar"))


def test_a_query_with_a_tab_keeps_the_table_s_columns() -> None:
    table = "".join(Counts(["a\tb", "line\nbreak", "a  dog"], np.array([2, 1, 0])).table())
    assert table == "query\tbefore\na b\t2\nline break\t1\na  dog\t0\n"


def test_evenness_is_its_definition() -> None:
    n_checked = 0
    for counts in ([3], [5, 5, 5, 5], [1, 0, 2, 50, 4, 4], list(range(30))):
        positive = [Fraction(count) for count in counts if count]
        n, total = len(positive), sum(positive)
        differences = sum(abs(a - b) for a in positive for b in positive)
        entropy = -sum(float(c / total) * math.log2(c / total) for c in positive)
        one = evenness(np.array(counts))
        assert one["gini"] == pytest.approx(float(differences / (2 * n * total)), abs=1e-4)
        assert one["entropy_bits"] == pytest.approx(entropy, abs=1e-4)
        assert one["as_even_as"] == pytest.approx(2**entropy, abs=0.06)
        n_checked += 1
    assert n_checked == 4
    assert evenness(np.array([0, 0]))["queries_that_occur"] == 0


@pytest.mark.parametrize(
    "name, content, options, message",
    [
        ("q.json", '["dog"]', [], "--cap T is not given"),
        ("q.json", '["dog"]', ["--cap", 0], "--cap 0 must be at least 1"),
        ("q.json", '["dog"]', ["--report-only", "--seed", 3], "--seed is of the draw"),
        ("q.json", "[", ["--cap", 5], "q.json is no JSON .*expected a .json with a list of texts"),
        ("q.json", '{"a": 1}', ["--cap", 5], "holds other things than a list of texts"),
        ("q.json", '["a", 1]', ["--cap", 5], "holds other things than a list of texts"),
        ("q.txt", "\n \n", ["--cap", 5], "q.txt holds no query"),
        ("q.csv", "dog", ["--cap", 5], "q.csv: expected a .json"),
        ("none.txt", None, ["--cap", 5], "none.txt cannot be read"),
    ],
)
def test_what_is_wrong_is_said_before_anything_is_written(
    tmp_path: Path, name: str, content: str | None, options: list, message: str
) -> None:
    source = write(tmp_path / "in", 4)
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=message):
        call(balance, source, "--queries", tmp_path / name, *options, "--to", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_queries_that_no_caption_holds_are_told(tmp_path: Path) -> None:
    file = queries_file(tmp_path / "q.txt", ["zebra"])
    with pytest.raises(ValueError, match=r"no caption of .* holds one of the 1 queries"):
        call(
            balance,
            write(tmp_path / "in", 4),
            "--queries",
            file,
            "--cap",
            3,
            "--to",
            tmp_path / "o",
        )
