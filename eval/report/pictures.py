"""The page's sections that show the model at work: embeddings, confusions, retrieval, choices
between captions.
"""

from __future__ import annotations

from collections.abc import Callable

from vlp.eval.report import curves, numbers
from vlp.eval.report import evidence as model
from vlp.eval.report.charts import scatter
from vlp.eval.report.findings import Query
from vlp.eval.report.markup import Html, more, note, number, section, table, tag
from vlp.eval.report.runs import Run

MAX_PAIRS = 200  # in the scatter plot; more hide each other
NO_MODEL = "Left out with --no-model."
Seen = list["model.Evidence | None"]


def space(found: list[Run], evidence: Seen, with_model: bool) -> Html:
    """Gap, uniformity and alignment over time where logged, and the embeddings in two dimensions."""
    keys = dict.fromkeys(k for run in found for record in run.evals for k in record)
    keys = [k for k in keys if any(g in k.partition(".")[2] for g in curves.GEOMETRY)]
    logged = max(len(run.evals) for run in found) > 1 and keys
    main = [k for k in keys if numbers.headline(k.partition(".")[2])]
    rest = [k for k in keys if k not in main]
    why = "Gap, uniformity and alignment over time were not logged: add the task representation with `every` to eval."
    folded = more("more measures", curves.score_cards(found, rest)) if logged and rest else None
    over_time = [curves.score_cards(found, main), folded] if logged else note(why)

    def plane(run: Run, seen: model.Evidence) -> list[Html | None]:
        if seen.space is None:
            return _notes(seen, "pairs", "No embeddings to show.")
        got, flat = seen.space, seen.space.plane
        pairs = list(zip(flat.image, flat.text, got.captions))[:MAX_PAIRS]
        shares = "Principal components 1 and 2 of both kinds together carry {:.0%} and {:.0%} of the variance.".format(
            *flat.shares
        )
        measures = table(
            ["on these pairs", "value"], [[k, number(v)] for k, v in got.measures.items()]
        )
        text = f"{len(pairs)} of {len(got.captions)} pairs of {got.dataset}. {shares}"
        drawing = scatter(pairs, ("images", "texts"), f"links-{found.index(run)}")
        return [tag("div", drawing, tag("div", tag("p", text), measures), class_="beside")]

    return section("space", "Embeddings", over_time, _each(found, evidence, with_model, plane))


def confusion(found: list[Run], evidence: Seen, with_model: bool) -> Html:
    """What the classes with the lowest recall are taken for."""

    def classes(run: Run, seen: model.Evidence) -> list[Html | None]:
        got = seen.confusion
        if got is None:
            return _notes(seen, "classes", "No zero-shot classes to show.")
        rows = []
        for c in got.worst:
            thumb = (
                _image(got.thumbnails[c.wrong], got.names[c.number]) if c.wrong is not None else ""
            )
            others = [(n, k) for k, n in c.answers.most_common(4) if k != c.number][:3]
            chips = [tag("span", got.names[k], tag("b", n), class_="chip") for n, k in others]
            shown = tag("span", thumb, got.names[c.number], class_="item")
            rows.append([shown, tag("div", chips, class_="chips"), f"{c.hits} / {c.n}"])
        line = f"{got.dataset}: accuracy {got.accuracy:.1%} on {got.n} pictures, {len(got.names)} classes."
        return [
            tag("p", line),
            table(["class", "taken for", "recognised"], rows, numeric=2),
            _matrix(got),
        ]

    lead = "Zero-shot classification, classes of the lowest recall first; a picture that was mistaken beside each."
    return section(
        "confusion", "Confused classes", _each(found, evidence, with_model, classes), lead=lead
    )


def _matrix(got: model.Confusion) -> Html:
    """Shares of answers: a row a worst class, a column an answer that they got most often."""
    rows = [c.number for c in got.worst]
    counts = {k: sum(c.answers[k] for c in got.worst) for c in got.worst for k in c.answers}
    others = sorted((k for k in counts if k not in rows), key=lambda k: -counts[k])[
        : max(0, 16 - len(rows))
    ]
    columns = [*rows, *others]
    head = tag("tr", tag("th", ""), [tag("th", tag("span", got.names[k])) for k in columns])
    body = []
    for c in got.worst:
        cells = []
        for k in columns:
            share = c.answers[k] / c.n
            kind = "hit" if k == c.number else None
            cells.append(tag("td", c.answers[k] or "", class_=kind, style=f"--share:{share:.2f}"))
        body.append(tag("tr", tag("th", got.names[c.number]), cells))
    caption = tag(
        "p", "Rows: the class shown; columns: the answer; framed: the right one.", class_="small"
    )
    return tag(
        "div",
        caption,
        tag(
            "div",
            tag("table", tag("thead", head), tag("tbody", body), class_="matrix"),
            class_="wide",
        ),
    )


def retrieval(found: list[Run], evidence: Seen, with_model: bool) -> Html:
    """Queries with their five best candidates, both ways."""

    def sheets(run: Run, seen: model.Evidence) -> list[Html | None]:
        got = seen.sheets
        if got is None:
            return _notes(seen, "pairs", "No image-text pairs to search.")
        line = f"{got.dataset}: {got.n_images} images, {len(got.captions)} captions. R@1 by text {got.recall['by_text']:.1%}, "
        line += f"by image {got.recall['by_image']:.1%} among them."
        by_text = [_found_images(q, got) for q in got.by_text]
        by_image = [_found_texts(q, got) for q in got.by_image]
        return [
            tag("p", line),
            tag("h4", "A text looks for its image"),
            tag("div", by_text, class_="queries"),
            tag("h4", "An image looks for its text"),
            tag("div", by_image, class_="queries"),
        ]

    lead = "The five best answers to a query, failures first. The right one is framed; the number is the cosine."
    return section("retrieval", "Retrieval", _each(found, evidence, with_model, sheets), lead=lead)


def _found_images(query: Query, got: model.Sheets) -> Html:
    def cell(place: int, score: float, right: bool, extra: str = "") -> Html:
        picture = _image(got.thumbnails[place], got.captions[query.place] if right else "candidate")
        return tag(
            "figure",
            picture,
            tag("figcaption", f"{score:.2f}{extra}"),
            class_="right" if right else None,
        )

    cells = [cell(*candidate) for candidate in query.best]
    if not any(right for _, _, right in query.best):
        cells.append(cell(*query.right, True, f" · rank {query.rank}"))
    return _query(
        query, tag("p", got.captions[query.place], class_="said"), tag("div", cells, class_="strip")
    )


def _found_texts(query: Query, got: model.Sheets) -> Html:
    rows = [
        _said(got.captions[place], score, "right" if right else None)
        for place, score, right in query.best
    ]
    if not any(right for _, _, right in query.best):
        place, score = query.right
        rows.append(_said(f"{got.captions[place]} · rank {query.rank}", score, "right"))
    return _query(
        query, _image(got.thumbnails[query.place], "query"), tag("ol", rows, class_="texts")
    )


def _query(query: Query, asked: Html, answers: Html) -> Html:
    mark = "found" if query.rank == 1 else f"rank {query.rank}"
    return tag(
        "article",
        tag("span", mark, class_="mark-ok" if query.rank == 1 else "mark-bad"),
        asked,
        answers,
        class_="query",
    )


def _said(text: str, score: float, kind: str | None) -> Html:
    return tag("li", tag("span", text), tag("b", f"{score:.2f}"), class_=kind)


def examples(found: list[Run], evidence: Seen, with_model: bool) -> Html:
    """Pictures with captions that differ in a number, an attribute, a relation or the order of
    words.
    """

    def sets(run: Run, seen: model.Evidence) -> list[Html | None]:
        shown = _notes(seen, "examples", None)
        for got in seen.examples:
            head = tag(
                "h4",
                got.name,
                tag("small", f"{got.accuracy:.1%} right of {got.n}, chance {got.chance:.1%}"),
            )
            shown += [head, tag("div", [_example(item) for item in got.items], class_="queries")]
        return shown

    lead = (
        "The true caption, framed, must score above the others. Clearest failures first, then hits."
    )
    return section(
        "examples", "Counting and composition", _each(found, evidence, with_model, sets), lead=lead
    )


def _example(item: model.Example) -> Html:
    ordered = sorted(enumerate(item.captions), key=lambda c: -c[1][1])
    rows = [_said(text, score, "right" if i == 0 else None) for i, (text, score) in ordered]
    mark = tag(
        "span", "right" if item.hit else "wrong", class_="mark-ok" if item.hit else "mark-bad"
    )
    return tag(
        "article",
        mark,
        _image(item.thumbnail, item.captions[0][0]),
        tag("ol", rows, class_="texts"),
        class_="query",
    )


def _image(uri: str, text: str) -> Html:
    return tag("img", src=uri, alt=text)


def _notes(seen: model.Evidence, key: str, otherwise: str | None) -> list[Html | None]:
    texts = seen.notes.get(key, []) or ([otherwise] if otherwise else [])
    return [note(text) for text in texts]


def _each(
    found: list[Run],
    evidence: Seen,
    with_model: bool,
    part: Callable[[Run, model.Evidence], list[Html | None]],
) -> list[Html | list | None]:
    """A part for every run that was looked at, under its name where there are two; else the reason."""
    if not with_model:
        return [note(NO_MODEL)]
    blocks: list[Html | list | None] = []
    for run, seen in zip(found, evidence):
        if seen is None:
            continue
        blocks.append(tag("h3", numbers.tagged(run, found)) if len(found) > 1 else None)
        blocks.append(part(run, seen) if seen.model else _notes(seen, "model", None))
    return blocks
