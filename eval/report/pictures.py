"""The page's sections that show the model at work: embeddings, confusions, retrieval, choices
between captions.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import chain

from vlp.eval.report import curves, numbers
from vlp.eval.report.charts import scatter
from vlp.eval.report.evidence import Confusion, Evidence, Example, Sheets
from vlp.eval.report.findings import ClassAnswers, Query
from vlp.eval.report.markup import Html, more, note, number, section, table, tag
from vlp.eval.report.planes import distributions
from vlp.eval.report.runs import Run

MAX_PAIRS = 200  # in the scatter plot; more hide each other
MAX_COLUMNS = 16  # of the matrix of confusions
NO_MODEL = "Left out with --no-model."
Part = Callable[[Run, Evidence], list[Html | None]]


# --- embeddings -----------------------------------------------------------------------------------


def space(runs: list[Run], evidence: list[Evidence | None], with_model: bool) -> Html:
    """Gap, uniformity and alignment over time where logged, and the embeddings in the plane."""

    def plane(run: Run, of_model: Evidence) -> list[Html | None]:
        return _plane(of_model, f"links-{runs.index(run)}")

    parts = _each(runs, evidence, with_model, plane)
    return section("space", "Embeddings", _geometry_over_time(runs), parts)


def _geometry_over_time(runs: list[Run]) -> list[Html | None] | Html:
    """Charts of the geometry scores, or a note on how to log them."""
    keys = curves.scalar_keys(chain.from_iterable(run.evals for run in runs))
    keys = [key for key in keys if curves.is_geometry(key)]
    if not keys or max(len(run.evals) for run in runs) < 2:
        return note(
            "Gap, uniformity and alignment over time were not logged: "
            "add the task representation with `every` to eval, and tolerance for that of classes."
        )

    main, rest = curves.headlines_first(keys)
    folded = more("more measures", curves.score_cards(runs, rest)) if rest else None
    return [curves.score_cards(runs, main), curves.tolerance_trails(runs), folded]


def _plane(of_model: Evidence, key: str) -> list[Html | None]:
    """The scatter of pairs beside their measures."""
    space = of_model.space
    if space is None:
        return _notes(of_model, "pairs", "No embeddings to show.")

    plane = space.plane
    pairs = list(zip(plane.image, plane.text, space.captions))[:MAX_PAIRS]
    first_share, second_share = plane.shares
    text = (
        f"{len(pairs)} of {len(space.captions)} pairs of {space.dataset}. "
        "Principal components 1 and 2 of both kinds together carry "
        f"{first_share:.0%} and {second_share:.0%} of the variance."
    )
    rows = [[name, number(value)] for name, value in space.measures.items()]
    measures = table(["on these pairs", "value"], rows)
    drawing = scatter(pairs, ("images", "texts"), key)
    kinds = list(zip(("pairs", "other combinations"), space.shares))
    scores = distributions("cosines, shares of each kind", kinds, (-1.0, 1.0))
    return [tag("div", drawing, tag("div", tag("p", text), measures, scores), class_="beside")]


# --- confusions -----------------------------------------------------------------------------------


def confusion(runs: list[Run], evidence: list[Evidence | None], with_model: bool) -> Html:
    """What the classes with the lowest recall are taken for."""

    def classes(run: Run, of_model: Evidence) -> list[Html | None]:
        confusion = of_model.confusion
        if confusion is None:
            return _notes(of_model, "classes", "No zero-shot classes to show.")

        line = (
            f"{confusion.dataset}: accuracy {confusion.accuracy:.1%} on {confusion.n} pictures, "
            f"{len(confusion.names)} classes."
        )
        rows = [_confusion_row(answers, confusion) for answers in confusion.worst]
        head = ["class", "taken for", "recognised"]
        return [tag("p", line), table(head, rows, numeric=2), _matrix(confusion)]

    lead = (
        "Zero-shot classification, classes of the lowest recall first; "
        "a picture that was mistaken beside each."
    )
    parts = _each(runs, evidence, with_model, classes)
    return section("confusion", "Confused classes", parts, lead=lead)


def _confusion_row(answers: ClassAnswers, confusion: Confusion) -> list[Html | str]:
    """A class with a mistaken picture, its three most frequent wrong answers, and its hits."""
    name = confusion.names[answers.number]
    picture: Html | str = ""
    if answers.wrong is not None:
        picture = _image(confusion.thumbnails[answers.wrong], name)

    # The class itself is among its four most frequent answers, or the fourth is not shown.
    chips: list[Html] = []
    for number_of_class, n in answers.answers.most_common(4):
        if number_of_class != answers.number and len(chips) < 3:
            chips.append(tag("span", confusion.names[number_of_class], tag("b", n), class_="chip"))
    return [
        tag("span", picture, name, class_="item"),
        tag("div", chips, class_="chips"),
        f"{answers.hits} / {answers.n}",
    ]


def _matrix(confusion: Confusion) -> Html:
    """Shares of answers: a row a worst class, a column an answer that they got most often."""
    # The worst classes come first among the columns: right answers lie on the diagonal.
    columns = _matrix_columns(confusion.worst)
    names = confusion.names
    head = tag("tr", tag("th", ""), [tag("th", tag("span", names[k])) for k in columns])
    body = []
    for answers in confusion.worst:
        cells = []
        for k in columns:
            share = answers.answers[k] / answers.n
            kind = "hit" if k == answers.number else None
            style = f"--share:{share:.2f}"
            cells.append(tag("td", answers.answers[k] or "", class_=kind, style=style))
        body.append(tag("tr", tag("th", names[answers.number]), cells))

    text = "Rows: the class shown; columns: the answer; framed: the right one."
    matrix = tag("table", tag("thead", head), tag("tbody", body), class_="matrix")
    return tag("div", tag("p", text, class_="small"), tag("div", matrix, class_="wide"))


def _matrix_columns(worst: list[ClassAnswers]) -> list[int]:
    """The worst classes themselves, then the other answers, most frequent first."""
    rows = [answers.number for answers in worst]
    counts: dict[int, int] = {}
    for answers in worst:
        for k, n in answers.answers.items():
            counts[k] = counts.get(k, 0) + n

    others = [k for k in counts if k not in rows]
    others.sort(key=counts.__getitem__, reverse=True)
    return [*rows, *others[: max(0, MAX_COLUMNS - len(rows))]]


# --- retrieval ------------------------------------------------------------------------------------


def retrieval(runs: list[Run], evidence: list[Evidence | None], with_model: bool) -> Html:
    """Queries with their five best candidates, both ways."""

    def sheets(run: Run, of_model: Evidence) -> list[Html | None]:
        sheets = of_model.sheets
        if sheets is None:
            return _notes(of_model, "pairs", "No image-text pairs to search.")

        line = (
            f"{sheets.dataset}: {sheets.n_images} images, {len(sheets.captions)} captions. "
            f"R@1 by text {sheets.recall['by_text']:.1%}, "
            f"by image {sheets.recall['by_image']:.1%} among them."
        )
        by_text = [_found_images(query, sheets) for query in sheets.by_text]
        by_image = [_found_texts(query, sheets) for query in sheets.by_image]
        return [
            tag("p", line),
            tag("h4", "A text looks for its image"),
            tag("div", by_text, class_="queries"),
            tag("h4", "An image looks for its text"),
            tag("div", by_image, class_="queries"),
        ]

    lead = (
        "The five best answers to a query, failures first. "
        "The right one is framed; the number is the cosine."
    )
    parts = _each(runs, evidence, with_model, sheets)
    return section("retrieval", "Retrieval", parts, lead=lead)


def ask(runs: list[Run], evidence: list[Evidence | None], with_model: bool) -> Html:
    """Ten captions and the pictures nearest to each, as a search would answer them."""

    def answers(run: Run, of_model: Evidence) -> list[Html | None]:
        sheets = of_model.sheets
        if sheets is None:
            return _notes(of_model, "pairs", "No pictures to ask for.")
        queries = [_found_images(query, sheets) for query in sheets.asked]
        return [tag("div", queries, class_="queries")]

    lead = (
        "The pictures nearest to captions drawn evenly from the set, right or wrong. "
        "Any other text, on any folder of pictures: vlp search RUN PHOTOS TEXT."
    )
    return section("ask", "Ask", _each(runs, evidence, with_model, answers), lead=lead)


def _found_images(query: Query, sheets: Sheets) -> Html:
    """A caption and the images nearest to it."""
    caption = sheets.captions[query.place]

    def cell(place: int, score: float, is_right: bool, rank: str = "") -> Html:
        picture = _image(sheets.thumbnails[place], caption if is_right else "candidate")
        line = tag("figcaption", f"{score:.2f}{rank}")
        return tag("figure", picture, line, class_="right" if is_right else None)

    cells = [cell(*candidate) for candidate in query.best]

    # The right image is shown even where it is not among the five best.
    if not any(candidate.is_right for candidate in query.best):
        cells.append(cell(*query.right, True, f" · rank {query.rank}"))
    return _query(query, tag("p", caption, class_="said"), tag("div", cells, class_="strip"))


def _found_texts(query: Query, sheets: Sheets) -> Html:
    """An image and the captions nearest to it."""
    rows = [
        _caption(sheets.captions[place], score, "right" if is_right else None)
        for place, score, is_right in query.best
    ]

    # The right caption is shown even where it is not among the five best.
    if not any(candidate.is_right for candidate in query.best):
        place, score = query.right
        rows.append(_caption(f"{sheets.captions[place]} · rank {query.rank}", score, "right"))

    asked = _image(sheets.thumbnails[query.place], "query")
    return _query(query, asked, tag("ol", rows, class_="texts"))


def _query(query: Query, asked: Html, answers: Html) -> Html:
    """A query with its answers, marked as a hit or by its rank."""
    hit = query.rank == 1
    mark = _mark("found" if hit else f"rank {query.rank}", hit)
    return tag("article", mark, asked, answers, class_="query")


def _mark(text: str, hit: bool) -> Html:
    """A hit's or failure's label."""
    return tag("span", text, class_="mark-ok" if hit else "mark-bad")


def _caption(text: str, score: float, kind: str | None) -> Html:
    """A caption with its cosine."""
    return tag("li", tag("span", text), tag("b", f"{score:.2f}"), class_=kind)


# --- choices between captions ---------------------------------------------------------------------


def examples(runs: list[Run], evidence: list[Evidence | None], with_model: bool) -> Html:
    """Pictures with captions that differ in a number, an attribute, a relation or the order of
    words.
    """

    def sets(run: Run, of_model: Evidence) -> list[Html | None]:
        shown = _notes(of_model, "examples", None)
        for one in of_model.examples:
            line = f"{one.accuracy:.1%} right of {one.n}, chance {one.chance:.1%}"
            shown.append(tag("h4", one.name, tag("small", line)))
            items = [_example(item) for item in one.items]
            shown.append(tag("div", items, class_="queries"))
        return shown

    lead = (
        "The true caption, framed, must score above the others. Clearest failures first, then hits."
    )
    parts = _each(runs, evidence, with_model, sets)
    return section("examples", "Counting and composition", parts, lead=lead)


def _example(item: Example) -> Html:
    """A picture with its captions, the highest score first."""

    def negative_score(place: int) -> float:
        return -item.captions[place][1]

    rows = []
    for place in sorted(range(len(item.captions)), key=negative_score):
        text, score = item.captions[place]
        rows.append(_caption(text, score, "right" if place == 0 else None))

    mark = _mark("right" if item.hit else "wrong", item.hit)
    picture = _image(item.thumbnail, item.captions[0][0])
    return tag("article", mark, picture, tag("ol", rows, class_="texts"), class_="query")


# --- shared ---------------------------------------------------------------------------------------


def _image(uri: str, text: str) -> Html:
    return tag("img", src=uri, alt=text)


def _notes(of_model: Evidence, key: str, otherwise: str | None) -> list[Html | None]:
    """The notes on a part, or `otherwise`."""
    texts = of_model.notes.get(key, []) or ([otherwise] if otherwise else [])
    return [note(text) for text in texts]


def _each(
    runs: list[Run], evidence: list[Evidence | None], with_model: bool, part: Part
) -> list[Html | list | None]:
    """A part for every run that was looked at, under its name where there are two; else why not."""
    if not with_model:
        return [note(NO_MODEL)]

    blocks: list[Html | list | None] = []
    for run, of_model in zip(runs, evidence):
        if of_model is None:  # with --against the second run's model is not looked at
            continue
        blocks.append(tag("h3", numbers.tagged(run, runs)) if len(runs) > 1 else None)
        blocks.append(part(run, of_model) if of_model.model else _notes(of_model, "model", None))
    return blocks
