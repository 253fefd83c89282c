"""Retrieval where answers have grades: nDCG@k, ERR and RBP, both ways.

A row of the table is a judgement:

    caption, query or text      the text, or its id in `annotations`
    image, file_name, …         the picture
    grade, relevance, score     how well they go together, 0 or more

Candidates are all pictures (or texts) of the table; a pair without a judgement has grade 0, and a
query without any grade above 0 is left out and counted. nDCG takes the grades as gains, ERR and
RBP in relation to the highest of the table (vlp.eval.ranked has the formulas). Ties count against
the model; chance is the mean over all orders.

Published: Crisscrossed Captions' sits_val.csv and sits_test.csv (Parekh et al. 2021), with captions
by their numbers in COCO's captions_val2014.json or Karpathy's dataset_coco.json.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vlp.data.tables.columns import IMAGE_COLUMNS
from vlp.eval import choices, embed, ranked
from vlp.eval.datasets.tables import beside, read_rows
from vlp.eval.embed import Context
from vlp.eval.models import Encoder
from vlp.eval.pictures import Collection, DataError, Picture, refuse_missing
from vlp.eval.tasks import TaskResult

VERSION = 1
KNOWN_AS = "zeroshot_retrieval"
MAIN = "image_retrieval_ndcg@10"
WAYS = ("image_retrieval", "text_retrieval")
TEXT_COLUMNS = ("caption", "query", "text", "sentence")
GRADE_COLUMNS = ("grade", "relevance", "score", "agg_score")
HIGHEST = 1000  # grade; ERR takes 2 to its power
_SENTENCE = re.compile(r".*sentid:(\d+)")  # how CxC names COCO's captions


@dataclass(frozen=True)
class Options(choices.Options):
    """Where the judgements are, and how lists are measured."""

    data: str  # a table of any kind
    annotations: str | None = None  # where texts are that the table names by number
    text_column: str = ""  # empty: caption, query, text or sentence
    image_column: str = ""  # empty: image, file_name, filepath, …
    grade_column: str = ""  # empty: grade, relevance, score or agg_score
    k: int = 10  # places of a list that count
    persistence: float = 0.9  # of RBP: how likely somebody goes on to the next place

    def __post_init__(self) -> None:
        if self.k < 1 or not 0 < self.persistence < 1:
            raise ValueError(
                f"k is {self.k} and persistence {self.persistence}; expected k of at least 1 and "
                "a persistence between 0 and 1"
            )


@dataclass
class Data:
    """Pictures, texts, and the grades of pairs of their places."""

    name: str
    pictures: list[Picture]
    texts: list[str]
    grades: dict[tuple[int, int], float]  # (text, picture) -> grade
    skipped: list[str]


# --- reading --------------------------------------------------------------------------------------


def read(options: Options) -> Data:
    """The judgements whose pictures are there."""
    path = Path(options.data)
    if not path.is_file():
        raise DataError(f"no table at {path}; expected one such as sits_test.csv")
    names = (options.text_column, options.image_column)
    rows = read_rows(path, (*filter(None, names), *TEXT_COLUMNS, *IMAGE_COLUMNS))
    if not rows:
        raise DataError(f"{path} has no row; expected a judgement a row")
    text_column = _column(rows[0], options.text_column, TEXT_COLUMNS, "text_column", path)
    image_column = _column(rows[0], options.image_column, IMAGE_COLUMNS, "image_column", path)
    grade_column = _column(rows[0], options.grade_column, GRADE_COLUMNS, "grade_column", path)

    collection = Collection(options.images or beside(path))
    sentences = _sentences(rows[0][text_column], options, path)
    picture_places: dict[Any, int] = {}
    text_places: dict[Any, int] = {}
    data = Data(path.stem, [], [], {}, [])
    for number, row in enumerate(rows, 1):
        place = f"{path}, row {number}"
        grade = _grade(row.get(grade_column), place)
        key, image = _cell(row, text_column, place), _cell(row, image_column, place)
        picture = collection.find(image)
        if picture is None:
            data.skipped.append(image)
            continue
        if picture not in picture_places:
            picture_places[picture] = len(data.pictures)
            data.pictures.append(picture)
        if key not in text_places:
            text_places[key] = len(data.texts)
            data.texts.append(key if sentences is None else _sentence(sentences, key, place))
        _put(data.grades, (text_places[key], picture_places[picture]), grade, place)

    refuse_missing(data.skipped, len(rows), collection, options.missing)
    if not any(data.grades.values()):
        raise DataError(f"{path}: every {grade_column} is 0, so that nothing is to be found")
    return data


def _column(
    row: Mapping[str, Any], named: str, usual: Sequence[str], option: str, path: Path
) -> str:
    """The column that is named, else the first of the usual ones that the table has."""
    columns = [named] if named else usual
    for column in columns:
        if column in row:
            return column
    raise DataError(
        f"{path} has the columns {', '.join(row)}; expected {' or '.join(columns)}; name another "
        f"with {option}=NAME"
    )


def _cell(row: Mapping[str, Any], column: str, place: str) -> str:
    """What a row has in a column; a DataError where that is nothing."""
    value = row.get(column)
    if value is None or value == "":
        raise DataError(f"{place}: found nothing in {column}; expected a text and an image a row")
    return str(value)


def _grade(value: Any, place: str) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise DataError(f"{place}: the grade is {value!r}, expected a number")
    if not 0 <= value <= HIGHEST:
        raise DataError(f"{place}: the grade is {value}, expected 0 to {HIGHEST}; scale the grades")
    return float(value)


def _put(
    grades: dict[tuple[int, int], float], pair: tuple[int, int], grade: float, place: str
) -> None:
    """Note a grade; DataError where the pair has another one."""
    if grades.setdefault(pair, grade) != grade:
        raise DataError(
            f"{place}: the pair has grade {grades[pair]} in an earlier row and {grade} here; keep "
            "one, such as their mean"
        )


# --- texts by number ------------------------------------------------------------------------------


def _sentences(example: Any, options: Options, path: Path) -> dict[int, str] | None:
    """COCO's captions by number, where the table names them so; None: it holds the texts."""
    if options.annotations is None:
        if _SENTENCE.fullmatch(str(example)):
            raise DataError(
                f"{path} names its texts by number ({example}); give the file that has them, such "
                "as annotations=captions_val2014.json or dataset_coco.json"
            )
        return None

    content = choices.read_json(Path(options.annotations))
    try:
        if "annotations" in content:
            return {entry["id"]: entry["caption"] for entry in content["annotations"]}
        sentences: dict[int, str] = {}
        for image in content["images"]:
            sentences |= {entry["sentid"]: entry["raw"] for entry in image["sentences"]}
        return sentences
    except (KeyError, TypeError):
        raise DataError(
            f"{options.annotations} is neither COCO's captions file (annotations with id, caption) "
            "nor Karpathy's (images with sentences of sentid, raw)"
        ) from None


def _sentence(sentences: dict[int, str], key: str, place: str) -> str:
    match = _SENTENCE.fullmatch(key)
    number = match[1] if match else key
    if not number.isdecimal() or int(number) not in sentences:
        raise DataError(f"{place}: the annotations have no caption {key!r}")
    return sentences[int(number)]


# --- scores ---------------------------------------------------------------------------------------


def scores(options: Options) -> list[str]:
    """All measures, both ways."""
    measures = [f"ndcg@{options.k}", f"err@{options.k}", f"rbp@{options.k}"]
    return [f"{way}_{measure}" for way in WAYS for measure in measures]


def run(encoder: Encoder, data: Data, options: Options, context: Context) -> TaskResult:
    """nDCG@k, ERR and RBP of pictures for texts, and of texts for pictures."""
    image = embed.images(encoder, data.pictures, context)
    text = embed.texts(encoder, data.texts, context)
    result = TaskResult(
        data.name,
        counts={
            "images": len(image),
            "texts": len(text),
            "judgements": len(data.grades),
            "skipped": len(data.skipped),
        },
        digest=context.digest(data.pictures, data.texts, sorted(data.grades.items()), options.k),
    )

    by_text: dict[int, dict[int, float]] = defaultdict(dict)
    by_image: dict[int, dict[int, float]] = defaultdict(dict)
    for (of_text, of_image), grade in data.grades.items():
        by_text[of_text][of_image] = grade
        by_image[of_image][of_text] = grade
    _score(result, WAYS[0], text, image, by_text, options)
    _score(result, WAYS[1], image, text, by_image, options)
    return result


def _score(
    result: TaskResult,
    way: str,
    asked: Tensor,
    sought: Tensor,
    judged: Mapping[int, Mapping[int, float]],  # place of the query -> place -> grade
    options: Options,
) -> None:
    """Fill in the measures of one way, query by query."""
    with_answer = {place: of_query for place, of_query in judged.items() if any(of_query.values())}
    result.counts[f"{way}_without_answer"] = len(judged) - len(with_answer)
    highest = max(max(of_query.values()) for of_query in judged.values())
    gains = list(with_answer.values())
    lists = ranked.graded(asked[list(with_answer)], sought, gains, options.k)

    values: dict[str, list[float]] = defaultdict(list)
    by_guessing: dict[str, list[float]] = defaultdict(list)
    k, persistence = options.k, options.persistence
    for of_query, ordered in zip(gains, lists):
        every_gain = torch.tensor(list(of_query.values()), dtype=torch.float64)
        first = ordered[:k]
        values[f"ndcg@{k}"].append(ranked.ndcg(first, every_gain, k))
        values[f"err@{k}"].append(ranked.expected_reciprocal_rank(first, highest))
        values[f"rbp@{k}"].append(ranked.rank_biased_precision(first / highest, persistence))

        levels = ranked.graded_chance(list(of_query.values()), len(sought), k, highest, persistence)
        for name, level in levels.items():
            by_guessing[name].append(level)

    for name, of_queries in values.items():
        result.items[f"{way}_{name}"] = choices.accuracy(torch.tensor(of_queries))
        result.chance[f"{way}_{name}"] = sum(by_guessing[name]) / len(of_queries)
