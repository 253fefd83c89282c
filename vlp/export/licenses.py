"""A licence as the Hub reads it in a card: an identifier of its list, or `other` by name."""

from __future__ import annotations

import difflib

# huggingface/hub-docs, docs/hub/repositories-licenses.md
_KNOWN = frozenset(
    """
    apache-2.0 mit openrail bigscience-openrail-m creativeml-openrail-m bigscience-bloom-rail-1.0
    bigcode-openrail-m afl-3.0 artistic-2.0 bsl-1.0 bsd bsd-2-clause bsd-3-clause bsd-3-clause-clear
    c-uda cc cc0-1.0 cc-by-2.0 cc-by-2.5 cc-by-3.0 cc-by-4.0 cc-by-sa-3.0 cc-by-sa-4.0 cc-by-nc-2.0
    cc-by-nc-3.0 cc-by-nc-4.0 cc-by-nd-4.0 cc-by-nc-nd-3.0 cc-by-nc-nd-4.0 cc-by-nc-sa-2.0
    cc-by-nc-sa-3.0 cc-by-nc-sa-4.0 cdla-sharing-1.0 cdla-permissive-1.0 cdla-permissive-2.0 wtfpl
    ecl-2.0 epl-1.0 epl-2.0 etalab-2.0 eupl-1.1 agpl-3.0 gfdl gpl gpl-2.0 gpl-3.0 lgpl lgpl-2.1
    lgpl-3.0 isc lppl-1.3c ms-pl mpl-2.0 odc-by odbl openrail++ osl-3.0 postgresql ofl-1.1 ncsa
    unlicense zlib pddl lgpl-lr deepfloyd-if-license llama2 llama3 llama3.1 llama3.2
    llama3.3 gemma unknown other
    """.split()
)


def metadata(license: str | None) -> dict[str, str]:
    """The card's keys for a licence; ValueError where it looks like a mistyped identifier.

    What is not on the Hub's list becomes `other` with its name.
    """
    if license is None:
        return {}
    identifier = license.strip().lower()
    if identifier in _KNOWN:
        return {"license": identifier}

    # A name of one's own is written other:NAME where it resembles a known one.
    chosen, _, name = license.strip().partition(":")
    if chosen.lower() == "other" and name.strip():
        return {"license": "other", "license_name": name.strip()}
    close = difflib.get_close_matches(identifier, sorted(_KNOWN), n=1, cutoff=0.8)
    if close or not identifier:
        meant = f"; did you mean {close[0]!r}?" if close else "."
        raise ValueError(
            f"license is {license!r}, which is not known here{meant} Write other:NAME for a "
            "licence of another name"
        )
    return {"license": "other", "license_name": license.strip()}
