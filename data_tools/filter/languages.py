"""Which language a caption is in: by a model that the user names, or by a rough guess.

    rough         script and stop words of 27 languages (see `_english/traits.py`); always there
    py3langid     97 languages, with a probability (extra `curate`)
    FILE.bin      fastText's, such as lid.176.bin, where the package fasttext is installed

The rough guess stays the default although another is better, so that a command does the same on
every machine.

Measured for `en` on 555 English captions (COCO, clothing) and 2,237 short messages in 48 other
languages (Sphinx's translations): taken for English, unclear, taken for another language

    rough                       99.8 %   0.2 %   0.0 %      2.4 %  57.3 %  40.4 %
    py3langid, P = 0           100.0 %   0.0 %   0.0 %      0.6 %   0.0 %  99.4 %
    py3langid, P = 0.5          99.3 %   0.7 %   0.0 %      0.3 %  23.3 %  76.4 %
    py3langid, P = 0.9          85.9 %  14.1 %   0.0 %      0.1 %  53.1 %  46.8 %

With P = 0 the name of a thing is some language or other ("Mona Lisa" Sotho, at 4 %).
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from vlp.data_tools._english import traits

LEAST_PROBABLE = 0.5  # of a model's languages: names and numbers lie below it
ROUGH, PY3LANGID = "rough", "py3langid"
GRAMMAR = f"{ROUGH}, {PY3LANGID} or FILE.bin of fastText"
_LABEL = "__label__"

Identify = Callable[[str], tuple[str, float]]  # a caption → its language, and how likely


@dataclass(frozen=True)
class Identifier:
    """A way to tell languages, by name; each process loads it when it first needs it."""

    name: str = ROUGH
    # below it a language counts as unclear; the rough guess has none
    min_probability: float = 0.0

    @classmethod
    def of(cls, name: str, min_probability: float | None) -> Identifier:
        """What the options name."""
        usual = 0.0 if name == ROUGH else LEAST_PROBABLE
        return cls(name, usual if min_probability is None else min_probability)

    def is_in(self, caption: str, languages: Collection[str]) -> bool | None:
        """Whether a caption is in one of these languages; None where that is unclear."""
        if self.name == ROUGH:
            return traits.is_in(caption, languages)

        # A caption without letters has a likeliest language as well.
        language, probability = _load(self.name)[0](" ".join(caption.split()))
        if probability < self.min_probability or not traits.script_of(caption):
            return True if traits.UNCLEAR in languages else None
        return language in languages

    def check(self, languages: tuple[str, ...]) -> None:
        """Raise ValueError where it is not here, or does not tell one of these languages."""
        if not 0 <= self.min_probability < 1:
            raise ValueError(f"--min-probability {self.min_probability:g} must lie in [0, 1)")
        if self.name == ROUGH and self.min_probability:
            raise ValueError(
                "--min-probability belongs to --language-model py3langid or FILE.bin: the rough "
                "guess gives none"
            )
        known: Collection[str] = traits.LANGUAGES
        if self.name != ROUGH:
            known = {*_load(self.name)[1], traits.UNCLEAR}
        unknown = set(languages) - set(known)
        if unknown:
            raise ValueError(
                f"--languages does not know {', '.join(sorted(unknown))}; "
                f"it tells apart {', '.join(known if self.name == ROUGH else sorted(known))}"
            )

    def settings(self) -> dict[str, Any]:
        """What its answers depend on; nothing for the rough guess, as before there was another."""
        if self.name == ROUGH:
            return {}
        version = _load(self.name)[2]
        return {"language_model": [self.name, version], "min_probability": self.min_probability}


@cache
def _load(name: str) -> tuple[Identify, list[str], str]:
    """(the function, the languages it knows, what tells its version); raises ValueError."""
    return _py3langid() if name == PY3LANGID else _fasttext(name)


def _py3langid() -> tuple[Identify, list[str], str]:
    try:
        import py3langid
        from py3langid.langid import MODEL_FILE, LanguageIdentifier
    except ImportError:
        raise ValueError(
            "--language-model py3langid: it is not installed; install it with "
            "pip install 'vlp[curate]'"
        ) from None
    identifier = LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)
    return identifier.classify, list(identifier.labels), py3langid.__version__


def _fasttext(name: str) -> tuple[Identify, list[str], str]:
    path = Path(name)
    if path.suffix != ".bin":
        raise ValueError(f"--language-model {name!r}: expected {GRAMMAR}")
    if not path.is_file():
        raise ValueError(f"--language-model {name!r}: there is no such file; expected {GRAMMAR}")
    try:
        import fasttext
    except ImportError:
        raise ValueError(
            f"--language-model {name}: the package fasttext is not installed; install it with "
            "pip install fasttext, or use py3langid"
        ) from None
    try:
        model = fasttext.load_model(name)
    except ValueError as error:
        raise ValueError(f"--language-model {name} is no model of fastText: {error}") from None

    def identify(caption: str) -> tuple[str, float]:
        # It reads a line at a time; without words it gives no label.
        labels, probabilities = model.predict(caption)
        if not labels:
            return traits.UNCLEAR, 0.0
        return labels[0].removeprefix(_LABEL), float(probabilities[0])

    with open(path, "rb") as file:
        content = hashlib.file_digest(file, "sha256").hexdigest()[:16]
    labels = [label.removeprefix(_LABEL) for label in model.get_labels()]
    return identify, labels, content
