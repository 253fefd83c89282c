"""What may stay: the rules that the options name, on samples and on single captions."""

from __future__ import annotations

import argparse
import re
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlp.data_tools.filter.conditions import parse
from vlp.data_tools.filter.languages import Identifier
from vlp.data_tools.filter.uids import is_listed

if TYPE_CHECKING:
    from vlp.data.members import Content


@dataclass(frozen=True)
class Rules:
    """What may stay; 0 and "" rule nothing out."""

    min_side: int = 0
    max_aspect: float = 0.0
    keep: tuple[str, ...] = ()
    drop: tuple[str, ...] = ()
    uids: str = ""
    min_words: int = 0
    max_words: int = 0
    match: str = ""
    reject: str = ""
    max_repeats: int = 0
    languages: tuple[str, ...] = ()
    unclear: str = "keep"
    min_relations: int = 0
    action: bool = False
    min_score: float | None = None
    # how languages are told
    identifier: Identifier = field(default_factory=Identifier)

    def settings(self) -> dict[str, Any]:
        """What the output depends on."""
        settings = asdict(self)
        # Said only where it is asked, so that folders from before there was a choice go on.
        del settings["identifier"]
        return settings | (self.identifier.settings() if self.languages else {})

    def is_wanted(self, caption: str) -> bool | None:
        """Whether a caption is in one of the languages; None where that is unclear."""
        return self.identifier.is_in(caption, self.languages)

    def refuse_sample(self, sample: Content) -> str:
        """Why a sample is dropped whatever its captions, or ""."""
        from vlp.data.picture import BadImage, header

        # The cheapest first: a list needs no picture, a size no decoding.
        if self.uids and not is_listed(self.uids, sample):
            return "not in the list"

        if self.min_side or self.max_aspect:
            try:
                short, long = sorted(header(sample.image)[:2])
            except BadImage:
                return "no readable picture"
            if short < self.min_side:
                return f"shorter side below {self.min_side} px"
            if self.max_aspect and long > self.max_aspect * short:
                return f"longer than {self.max_aspect:g} times its shorter side"

        return ""

    def refuse_caption(self, caption: str) -> str:
        """Why a caption is dropped by itself, or ""."""
        from vlp.data_tools._english import traits

        # All reasons are asked in this order, and the first is the one that is counted.
        n_words = len(caption.split())
        is_wanted = self.is_wanted(caption) if self.languages else True
        too_long = 0 < self.max_words < n_words
        too_simple = self.min_relations and traits.complexity(caption) < self.min_relations

        checks = {
            f"fewer than {self.min_words} words": n_words < self.min_words,
            f"more than {self.max_words} words": too_long,
            "does not hold what it must": self.match and not re.search(self.match, caption),
            "holds what it must not": self.reject and re.search(self.reject, caption),
            "another language": is_wanted is False,
            "language unclear": is_wanted is None and self.unclear == "drop",
            f"fewer than {self.min_relations} relations": too_simple,
            "no action": self.action and not traits.has_action(caption),
        }
        return next((reason for reason, refused in checks.items() if refused), "")

    def about_captions(self) -> bool:
        """Whether a sample needs a caption to stay."""
        # Rules about the sample alone leave one without a caption as it is.
        without_pictures = replace(self, min_side=0, max_aspect=0.0, keep=(), drop=(), uids="")
        return without_pictures != Rules(identifier=self.identifier)


def rules_of(args: argparse.Namespace) -> Rules:
    """The rules that the options name; raises ValueError."""
    for text in (*args.keep, *args.drop):
        parse(text)
    identifier = Identifier.of(args.language_model, args.min_probability)
    taken = Rules.__dataclass_fields__.keys() - {"identifier"}
    options = {name: getattr(args, name) for name in taken}
    options |= {"languages": _languages(args, identifier), "uids": args.uids or ""}
    options |= {"keep": tuple(args.keep), "drop": tuple(args.drop)}
    rules = Rules(**options, identifier=identifier)
    _check_values(rules)
    return rules


def _languages(args: argparse.Namespace, identifier: Identifier) -> tuple[str, ...]:
    from vlp.data_tools._english.traits import UNCLEAR

    # A trailing comma is no language.
    codes = [code.strip() for code in args.languages.split(",")]
    languages = tuple(code for code in codes if code)
    if not languages and identifier != Identifier():
        raise ValueError(
            "--language-model and --min-probability belong to --languages CODES, which is not given"
        )
    if languages:
        identifier.check(languages)
    if UNCLEAR in languages and args.unclear == "drop":
        raise ValueError(
            f"--languages names {UNCLEAR}, --unclear drop refuses it; leave one of them out"
        )
    if args.unclear == "drop" and not languages:
        raise ValueError("--unclear drop belongs to --languages CODES, which is not given")
    return languages


def _check_values(rules: Rules) -> None:
    """Raise ValueError for a value that no sample could meet, or that cannot be read."""
    numbers = [rules.min_side, rules.min_words, rules.max_words]
    numbers += [rules.max_repeats, rules.min_relations]
    too_narrow = 0 < rules.max_aspect < 1 or 0 < rules.max_words < rules.min_words
    if min(numbers) < 0 or too_narrow:
        raise ValueError(
            "no number may be negative, --max-aspect not below 1, --max-words not below --min-words"
        )

    # Now, because the first caption would show a broken pattern only after the survey.
    for pattern in (rules.match, rules.reject):
        try:
            re.compile(pattern)
        except re.error as error:
            raise ValueError(f"{pattern!r} is no regular expression: {error}") from None
    if rules.uids and Path(rules.uids).suffix not in (".npy", ".txt"):
        raise ValueError(f"--uids {rules.uids!r} is neither .npy nor .txt")
