"""The answers of `vlp search` as one HTML file that loads nothing."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vlp.eval.pictures import thumbnail
from vlp.eval.report import markup
from vlp.eval.report.markup import Html, tag
from vlp.privacy import private

if TYPE_CHECKING:
    from vlp.eval.search.ask import Answer, Match

SIDE_PX = 256


def page(answers: list[Answer], title: str) -> str:
    """A section a query, with a thumbnail, the cosine and the name of each answer."""
    sections = [_section(number, answer) for number, answer in enumerate(answers)]
    return markup.page(private(title), sections, "vlp search")


def _section(number: int, answer: Answer) -> Html:
    example = None
    if answer.example is not None:
        example = tag("img", src=thumbnail(answer.example, SIDE_PX), alt="the query")
    cards = tag("div", [_card(match) for match in answer.matches], class_="cards")
    return markup.section(f"query-{number}", answer.query, example, cards)


def _card(match: Match) -> Html:
    name = private(match.picture.name)
    picture = tag("img", src=thumbnail(match.picture, SIDE_PX), alt=name, style="max-width:100%")
    line = tag("figcaption", tag("b", f"{match.score:.3f}"), tag("small", name))
    return tag("figure", line, picture, class_="card")
