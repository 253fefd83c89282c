"""Rules for negatives and counts, on tables of examples, and on scenes where an independent checker
knows the truth.
"""

from __future__ import annotations

import random
import time
from collections import Counter
from pathlib import Path

import pytest

from tests.data_tools.scene_checker import truth
from vlp.data_tools import scenes
from vlp.data_tools._english.numbers import counterfactuals, counts, exchange
from vlp.data_tools._english.shuffles import shuffles
from vlp.data_tools._english.words import article, bare, edit, is_plural, plural
from vlp.data_tools.counting import wrong_counts
from vlp.data_tools.negatives import KINDS, USUAL_KINDS, AddNegatives
from vlp.data_tools.negatives.lexicon import Lexicon
from vlp.data_tools.negatives.rules import HEAD, RULES, head, propose

LEXICON = Lexicon.load()
TINY = {  # every choice is forced, so that the whole caption can be compared
    "attributes": {
        "things": {"color": ["red", "orange"], "size": ["large|big", "small"]},
        "people": {"age": ["young", "elderly"]},
    },
    "nouns": {
        "animate": {"person": ["man|guy", "woman"], "animal": ["cow", "elephant"]},
        "thing": {"ware": ["knife", "box"]},
    },
    "relations": {
        "anything": {"vertical": ["above", "under"]},
        "animate": {"posture": ["sitting", "standing"]},
    },
    "protected": ["red wine"],
}


def made(caption: str, kind: str, words: dict | None = None) -> list[str]:
    lexicon = Lexicon(words, "test") if words else LEXICON
    return [n.text for n in propose(caption, lexicon, random.Random(0), (kind,), Counter())]


# --- English ---


@pytest.mark.parametrize(
    "noun, many",
    [
        ("box", "boxes"),
        ("bench", "benches"),
        ("cherry", "cherries"),
        ("boy", "boys"),
        ("woman", "women"),
        ("knife", "knives"),
        ("sheep", "sheep"),
        ("bus", "buses"),
        ("cross", "crosses"),
        ("tomato", "tomatoes"),
        ("zebra", "zebras"),
    ],
)
def test_plural(noun: str, many: str) -> None:
    assert plural(noun) == many and is_plural(many)


@pytest.mark.parametrize("word", ["glass", "bus", "tennis", "dog", "grass", "is", "man's", "was"])
def test_singulars_that_end_like_plurals(word: str) -> None:
    assert not is_plural(word)


@pytest.mark.parametrize(
    "word, expected",
    [
        ("orange", "an"),
        ("red", "a"),
        ("umbrella", "an"),
        ("uniform", "a"),
        ("unicorn", "a"),
        ("unusual", "an"),
        ("hour", "an"),
        ("horse", "a"),
        ("one-way", "a"),
        ("8", "an"),
        ("11", "an"),
        ("2", "a"),
        ("eight", "an"),
        ("European", "a"),
        ("user", "a"),
        ("uninteresting", "an"),
        ("ugly", "an"),
        ("utensil", "a"),
        ("onion", "an"),
    ],
)
def test_article(word: str, expected: str) -> None:
    assert article(word) == expected


def test_edits_keep_capitals_and_correct_articles() -> None:
    assert edit("A red car", [(2, 5, "orange")]) == "An orange car"
    assert edit("AN ORANGE CAR", [(3, 9, "red")]) == "A RED CAR"
    assert edit("Two dogs and a owl", [(0, 3, "eight"), (15, 18, "cat")]) == "Eight dogs and a cat"
    assert bare("Two dogs, a cat.") == bare("two dogs a cat") != bare("two dogs a cats")


# --- counts ---


@pytest.mark.parametrize(
    "caption, numbers",
    [
        ("Two young girls petting goats", [2]),
        ("a group of five people", [5]),
        ("10 boats and THREE ducks", [10, 3]),
        ("The two women sit next to two dogs", [2, 2]),
        ("a table with 4 plates, a fork", [4]),
        ("seven sheep in a field", [7]),
        ("a couple of kids watch two baseball players", [2]),
        ("an often visited house", []),
        ("a network of tents", []),
        ("someone attends", []),
        ("one dog", []),
        ("eleven dogs", []),
        ("12 dogs", []),
    ],
)
def test_counts_are_found_as_whole_words(caption: str, numbers: list[int]) -> None:
    assert [count.value for count in counts(caption)[0]] == numbers


@pytest.mark.parametrize(
    "caption, reason",
    [
        ("at least two dogs", "bound"),
        ("a box with 3 items at most", "bound"),
        ("over 4 planes", "bound"),
        ("two or three dogs", "range"),
        ("a two story building", "no plural noun"),
        ("a two of hearts", "no plural noun"),
        ("a man of 7 years", "measure"),
        ("2 hours later", "measure"),
        ("route 4 signs", "name"),
        ("2 1/2 loaves", "longer number"),
    ],
)
def test_numbers_that_do_not_count(caption: str, reason: str) -> None:
    found, refused = counts(caption)
    assert not found and reason in refused[0]


@pytest.mark.parametrize(
    "caption",
    [
        "a two-story house",
        "at 2:30 pm",
        "a 3.5 inch disk",
        "4x4 trucks",
        "$5 bills",
        "1,000 birds",
        "7% of cars",
    ],
)
def test_parts_of_compounds_and_longer_numbers_are_no_numbers(caption: str) -> None:
    assert counts(caption) == ([], [])


def test_counterfactuals_are_the_eight_other_numbers() -> None:
    for caption, article_of_eight in (
        ("A two people kayak", "An eight people kayak"),
        ("a 2 dogs show", "an 8 dogs show"),
    ):
        found, _ = counts(caption)
        texts = counterfactuals(caption, found)
        assert len(set(texts)) == 8 and caption not in texts and article_of_eight in texts
    both = "Two dogs chase two cats"
    assert exchange(both, counts(both)[0], 5) == "Five dogs chase five cats"


# --- rules ---

TABLE = [
    ("swap_attribute", "a red box under an orange knife", ["an orange box under a red knife"]),
    (
        "swap_attribute",
        "A big red box and a small orange knife",
        ["A small red box and a big orange knife", "A big orange box and a small red knife"],
    ),
    ("swap_attribute", "a red box and an orange box", []),  # the same said in another order
    ("swap_attribute", "a big red box and a big orange box", []),
    ("swap_attribute", "a red box above an orange box", ["an orange box above a red box"]),
    ("swap_attribute", "one red box and one orange box", []),
    ("swap_attribute", "a red and orange box", []),
    ("swap_attribute", "a red box", []),
    (
        "swap_attribute",
        "the box is red and the knife is orange",
        ["the box is orange and the knife is red"],
    ),
    ("swap_attribute", "one is red and one is orange", []),
    ("swap_noun", "A knife on a box", ["A box on a knife"]),
    ("swap_noun", "a man holding an elephant", ["an elephant holding a man"]),
    ("swap_noun", "a knife and a box", []),
    ("swap_noun", "a knife next to a box", []),
    ("swap_noun", "a man in a box", []),  # an elephant in a man: no English that anybody means
    ("swap_noun", "knives in a box", []),  # numbers differ
    ("swap_noun", "a box knife on a box", []),
    ("replace_attribute", "A red box", ["An orange box"]),
    ("replace_attribute", "the box is RED", ["the box is ORANGE"]),
    ("replace_attribute", "a big box", ["a small box"]),
    ("replace_attribute", "a small box", ["a large box"]),  # the first of large|big
    ("replace_attribute", "a glass of red wine", []),  # protected
    ("replace_attribute", "a red man", []),  # the color of a person
    ("replace_attribute", "a young man", ["an elderly man"]),
    ("replace_attribute", "a young box", []),
    ("replace_attribute", "the color red", []),
    ("replace_attribute", "an orange, a pear", []),
    ("replace_attribute", "redness", []),
    ("replace_noun", "a cow", ["an elephant"]),
    ("replace_noun", "Two cows", ["Two elephants"]),
    ("replace_noun", "two knives", ["two boxes"]),
    ("replace_noun", "a guy", ["a woman"]),
    ("replace_noun", "a man with his dog", []),
    ("replace_noun", "they box", []),
    ("replace_relation", "a cow above 2 boxes", ["a cow under 2 boxes"]),
    ("replace_relation", "a cow under a tree", ["a cow above a tree"]),
    ("replace_relation", "a cow sitting on a hill", ["a cow standing on a hill"]),
    ("replace_relation", "a box sitting on a hill", []),  # it may as well be said to stand there
    ("replace_relation", "under 20 boxes", []),
    ("replace_attribute", "a box that is not red", []),
    ("replace_attribute", "no red box", []),
    ("replace_number", "a dog", []),
    ("replace_number", "at least three dogs", []),
    ("order", "a dog runs", []),
    ("swap_time", "A cow eats before a man sits", ["A cow eats after a man sits"]),
    ("swap_time", "After a man sits, a cow eats.", ["Before a man sits, a cow eats."]),
    ("swap_time", "After a man sits", []),
    ("swap_time", "a cow walking after it was eating", ["a cow walking before it was eating"]),
    ("swap_time", "A cow followed by two men.", ["Two men followed by a cow."]),
    ("swap_time", "a man standing before a box", []),  # a place
    ("swap_time", "a cow eats the day before a man sits", []),
    ("swap_time", "a cow eats before and after a man sits", []),
    ("swap_time", "a cow sits, followed by a man followed by a box", []),
]


@pytest.mark.parametrize("kind, caption, expected", TABLE)
def test_rules_by_example(kind: str, caption: str, expected: list[str]) -> None:
    assert sorted(made(caption, kind, TINY)) == sorted(expected)


def test_the_table_shows_every_rule_at_work_and_at_rest() -> None:
    assert set(RULES) == set(KINDS)
    fires = {kind for kind, _, expected in TABLE if expected}
    assert fires == set(KINDS) - {"replace_number", "order"} and {
        kind for kind, _, expected in TABLE if not expected
    } == set(KINDS)
    assert (
        made("Three dogs", "replace_number")[0].endswith(" dogs")
        and len(made("a dog runs away fast", "order")) >= 3
    )


@pytest.mark.parametrize(
    "caption, kind, wrong",
    [
        ("A table filled with plates", "replace_relation", "without"),
        ("A woman with one hand up", "replace_relation", "without"),
        ("There is a box with a ball", "replace_relation", "without"),  # another box may have none
        ("a hot dog on a bun", "replace_noun", "hot c"),
        ("a black and white photo", "replace_attribute", "photo"),
        ("people wait to cross a street", "replace_noun", "to s"),
    ],
)
def test_the_shipped_lists_avoid_bad_english(caption: str, kind: str, wrong: str) -> None:
    assert not [text for text in made(caption, kind) if wrong in text]


def test_shuffles_keep_the_words_and_change_the_order() -> None:
    caption = "a brown dog chases a small cat over the lawn."
    found = shuffles(caption, random.Random(0))
    assert set(found) == {
        "order_content_words",
        "order_function_words",
        "order_within_trigrams",
        "order_trigrams",
    }
    for text in found.values():
        assert (
            sorted(text[:-1].split()) == sorted(caption[:-1].split())
            and text != caption
            and text.endswith(".")
        )
    assert found["order_content_words"].split()[0] == "a"
    assert shuffles("dog dog dog", random.Random(0)) == {}
    for seed in range(50):
        assert "order_content_words" not in shuffles("there is a man walking", random.Random(seed))


def test_rules_are_pure() -> None:
    caption = "Two large dogs sit under a red table next to three small cats"
    first, again = (propose(caption, LEXICON, random.Random(3), KINDS, Counter()) for _ in range(2))
    assert first == again and len(first) > 8


# --- truth on scenes ---


@pytest.mark.parametrize("words", [None, "scenes"])
def test_negatives_by_rule_are_false_of_scenes(words: str | None) -> None:
    """Of thousands of negatives for true captions of scenes, the independent checker finds none
    true and knows most false.
    """
    change = AddNegatives(50, KINDS, 0, Lexicon.load(words))
    verdicts: Counter[tuple[str, bool | None]] = Counter()
    for index in range(250):
        scene = scenes.generate(index, 11)
        for negative, _ in change.choose(str(index), scene.captions, Counter()):
            verdict = truth(negative.text, scene.meta["scene"])
            assert verdict is not True, (negative, scene.captions)
            verdicts["order" if negative.kind.startswith("order") else negative.kind, verdict] += 1
    known_false = {kind: verdicts[kind, False] for kind in KINDS}
    assert sum(n for (kind, _), n in verdicts.items() if kind != "order") > 4000
    for kind in set(USUAL_KINDS) - {"order"}:
        assert known_false[kind] > 40 and known_false[kind] > verdicts[kind, None], (kind, verdicts)


def test_a_bad_rule_would_be_noticed() -> None:
    """Negative control of the test above: exchanging the two groups of "A and B" leaves it true."""
    n = 0
    for index in range(200):
        scene = scenes.generate(index, 11)
        if len(scene.meta["scene"]["groups"]) == 2 and " and " in scene.captions[0]:
            a, b = scene.captions[0].split(" and ")
            assert truth(f"{b} and {a}", scene.meta["scene"]) is True
            n += 1
    assert n > 50


# --- word lists ---


@pytest.mark.parametrize(
    "change, message",
    [
        (
            {"attributes": {"things": {"color": []}}},
            r"attributes\.things\.color is \[\]; expected at least two words",
        ),
        (
            {"nouns": {"animate": {"person": ["man"]}}},
            r"nouns\.animate\.person is \['man'\]; expected at least two",
        ),
        ({"relations": {}}, "relations has no lists"),
        ({"verbs": {}}, "found verbs; expected attributes"),
        (
            {"nouns": {"thins": {"x": ["a", "b"]}}},
            r"nouns\.thins is not one of animate, thing, place",
        ),
    ],
)
def test_wrong_word_lists_are_refused(change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Lexicon({**TINY, **change}, "words.yaml")


def test_a_broken_word_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("attributes: [")
    with pytest.raises(ValueError, match=r"mine\.yaml is not valid YAML"):
        Lexicon.load(tmp_path / "mine.yaml")
    (tmp_path / "mine.yaml").write_text("")
    with pytest.raises(ValueError, match=r"mine\.yaml: found no mapping"):
        Lexicon.load(tmp_path / "mine.yaml")


# --- long captions ---


@pytest.mark.parametrize(
    "phrase",
    [
        "A red car with two small black dogs next to a large table and three cats under it. ",
        "two dogs ",
        "10 ",
        "about 3 ",
        "a an ",
        "box with ",
        "up to five ",
        "redred",
    ],
)
def test_an_alt_text_of_50_kb_takes_a_second_at_most(phrase: str) -> None:
    caption = (phrase * (50_000 // len(phrase) + 1))[:50_000]
    change, started = AddNegatives(4, KINDS, 0, LEXICON), time.process_time()
    chosen = change.choose("k", [caption, "a red car"], Counter())
    between = time.process_time()
    found, _ = counts(caption)
    if found:
        wrong_counts(caption, random.Random(0))
    ended = time.process_time()
    assert between - started < 1 and ended - between < 1, (between - started, ended - between)
    for negative, i in chosen:
        if i == 0:
            assert (
                negative.text.endswith(caption[HEAD:])
                and negative.text != caption
                and len(negative.text) > 49_000
            )


def test_what_stands_around_a_number_is_read_as_far_as_it_matters() -> None:
    far = "x " * 200
    for text in (
        "at least two dogs",
        "about two dogs",
        "three or two dogs",
        "two of the at most dogs",
        "two to four dogs",
    ):
        assert counts(far + text + " " + far)[0] == counts(text)[0] == []
    [count] = counts(far + "two small dogs and " + far)[0]
    assert count.head == "dogs" and count.start == len(far)
    assert (
        edit(far + "an  orange and a red car", [(len(far) + 4, len(far) + 10, "blue")])
        == far + "a  blue and a red car"
    )


def test_the_head_of_a_caption_ends_with_a_word() -> None:
    assert head("short") == "short" and head("x" * 5000) == "x" * HEAD
    long = "word " * 1000
    assert len(head(long)) <= HEAD and head(long).endswith("word") and long.startswith(head(long))
