"""What the papers of the evidence's terms claim, and whether it shows.

    python tests/benchmarks/evidence.py --claims --publish

A claim is a score of one arm that should lie above another arm's, at equal samples seen; that of
further views is asked against a longer run of equal CPU time as well. It is shown where the
interval of the difference, paired over items, lies above 0, and reversed where it lies below.
Claims of --tables alone are asked. Scores that training does not evaluate are there once the table
was shown.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from tests.benchmarks import report
from tests.benchmarks.evidence_arms import Table
from tests.benchmarks.evidence_outcomes import Run, difference, outcomes, unit

TEXT, ZEROSHOT = "text R@1, %", "zero-shot, %"


@dataclass(frozen=True)
class Claim:
    """That an arm scores higher than another one."""

    table: str  # without evidence_
    arm: str
    against: str
    score: str  # a heading of the table
    cause: str = ""  # most likely, where it does not show; what was examined of it


NOT_LEARNT = (
    "in six epochs no wrong caption is learnt by heart, against which these terms help. Examined: "
    "InfoNCE ends at a loss of 4.8 with noise, of log n = 5.5, and at 2.5 without"
)
LAGS = (
    "estimates lag behind a model that learns as fast; FastCLIP's, which is alike, is better "
    "without memory (see the table of small batches)"
)
ONE_PAIR = (
    "one pair of views satisfies the numerator, and two crops of a picture are nearest: picture "
    "and caption stay strangers (alignment 2.0, as of random rows). Examined: of picture and "
    "caption alone MV-InfoNCE learns (its second row)"
)
CROPS = (
    "a crop shifts or cuts what the caption tells of, so that views say less of it than pictures"
)

BINDS = (
    "a scene's few words fit into one embedding; what the local scores add is binding (the row "
    "before)"
)

CLAIMS = [
    # Beside or in place of InfoNCE.
    Claim("clean", "clean_koleo", "clean_plain", TEXT),
    Claim(
        "clean",
        "clean_kernel",
        "clean_plain",
        ZEROSHOT,
        "made for wrong captions, of which clean pairs have none",
    ),
    Claim(
        "clean", "clean_mixup", "clean_plain", TEXT, "4,000 scenes seen six times overfit little"
    ),
    Claim(
        "clean",
        "clean_cyclip",
        "clean_plain",
        ZEROSHOT,
        "its sum grows with the batch (8.4 beside InfoNCE's 5.8 at the first step of B = 256), and "
        "alike cosines end it: uniformity −.5. Examined: a weight of .02 (next row) loses nothing",
    ),
    Claim(
        "clean",
        "clean_cyclip_light",
        "clean_plain",
        ZEROSHOT,
        "InfoNCE alone makes a small gap here (.2), which consistency is to close",
    ),
    Claim(
        "clean",
        "clean_within",
        "clean_plain",
        TEXT,
        "rows of one modality begin alike (first loss 17.1, InfoNCE's 5.8), and 94 steps go into "
        "parting them",
    ),
    Claim(
        "clean", "clean_barlow", "clean_plain", ZEROSHOT, "128 numbers repeat little to begin with"
    ),
    Claim(
        "clean",
        "clean_siam",
        "clean_plain",
        ZEROSHOT,
        "between a picture and its caption it attracts what InfoNCE attracts",
    ),
    Claim(
        "clean",
        "clean_uniform",
        "clean_plain",
        ZEROSHOT,
        "its kernel has no temperature to learn: near wrong ones weigh hardly more than far ones",
    ),
    Claim(
        "clean",
        "clean_ranks",
        "clean_plain",
        TEXT,
        "at its fixed tau of .01 most of n³ comparisons are soon won and give no gradient; its own "
        "measure, the area under the curve of all pairs, is lower too (.98, InfoNCE's .99)",
    ),
    # Small batches.
    Claim("memory", "sogclr_32", "infonce_32", TEXT, LAGS),
    Claim("memory", "isogclr_32", "infonce_32", TEXT, LAGS),
    Claim("memory", "queue_32", "infonce_32", TEXT, "too few items: the interval just holds 0"),
    Claim(
        "memory",
        "mixing_32",
        "infonce_32",
        TEXT,
        "mixtures of the hardest keys of 1,024 among 4,000 scenes are often true of the picture",
    ),
    # Captions of other pictures.
    Claim("noise", "noisy_smooth", "noisy_plain", TEXT, NOT_LEARNT),
    Claim("noise", "noisy_kernel", "noisy_plain", TEXT, NOT_LEARNT),
    Claim("noise", "noisy_mixup", "noisy_plain", TEXT, NOT_LEARNT),
    Claim("noise", "noisy_attract", "noisy_plain", TEXT, NOT_LEARNT),
    Claim(
        "noise",
        "noisy_siglip",
        "noisy_plain",
        TEXT,
        "94 steps from a bias of −10 are too few, without noise as well (see the tables of small "
        "batches: 22 % after 94 steps, 48 % after 750)",
    ),
    Claim("noise", "noisy_taught", "noisy_plain", TEXT),
    # A strong teacher.
    Claim(
        "teacher", "taught_similarity", "clean_plain", TEXT, "its share of the loss is .75 of CE"
    ),
    Claim("teacher", "taught_features", "clean_plain", TEXT),
    Claim("teacher", "taught_interactive", "clean_plain", TEXT),
    Claim("teacher", "taught_all", "clean_plain", TEXT),
    Claim("teacher", "taught_all", "taught_features", TEXT),
    Claim(
        "teacher",
        "taught_targets",
        "clean_plain",
        TEXT,
        "of 256 scenes few are alike, so that soft targets are nearly hard ones",
    ),
    # Few pictures.
    Claim("few", "few_multi_view", "few_plain", TEXT, CROPS),
    Claim("few", "few_multi_view", "few_long", TEXT, CROPS),
    Claim("few", "few_slip", "few_plain", TEXT, CROPS),
    Claim("few", "few_swap", "few_plain", TEXT, CROPS),
    Claim("few", "few_mv_infonce", "few_plain", TEXT, ONE_PAIR),
    Claim("few", "few_mv_infonce_two", "few_mv_infonce", TEXT),
    Claim("few", "few_mv_dhel", "few_plain", TEXT, ONE_PAIR),
    Claim(
        "few",
        "few_poly_view",
        "few_plain",
        TEXT,
        "one of its 15 pairs of six views is of picture and caption themselves",
    ),
    Claim(
        "few",
        "few_mixup",
        "few_plain",
        TEXT,
        "24 epochs do not overfit yet. Examined: 72 of InfoNCE alone still gain 7.8 points",
    ),
    # Narrow embeddings.
    Claim("widths", "narrow_matryoshka", "clean_plain", "text R@1 at 8, %"),
    # Patches and words, a third modality.
    Claim("local", "local_own", "clean_plain", "binding, %"),
    Claim(
        "local",
        "local_fsc",
        "local_own",
        "binding, %",
        "the same negatives have taught whole embeddings what they can (order: 77 %)",
    ),
    Claim("local", "local_filip", "clean_plain", "binding, %"),
    Claim("local", "local_filip", "clean_plain", TEXT, BINDS),
    Claim("local", "local_mil", "clean_plain", "binding, %"),
    Claim("local", "local_mil", "clean_plain", TEXT, BINDS),
    Claim(
        "local",
        "local_prior",
        "clean_plain",
        "binding, %",
        "its sentences are whole captions here, each of all of the scene",
    ),
    Claim("third", "third_pairs", "clean_plain", ZEROSHOT),
    Claim(
        "third",
        "third_pairs",
        "clean_plain",
        TEXT,
        "edges lack the colors that captions name: R@1 between them and texts is 4 %",
    ),
    Claim(
        "third",
        "third_gram",
        "clean_plain",
        TEXT,
        "a volume has no sign, so that rows may come to lie opposite each other. Examined: in the "
        "seeds of R@1 11 and 0 % the right picture of 300 has median rank 277 and 299; the third "
        "seed fell on the other side and has 33 %",
    ),
    Claim(
        "third",
        "third_symile",
        "clean_plain",
        TEXT,
        "a product of three rows can be large where no two are alike, and retrieval compares two. "
        "Examined: the loss ends at 1.8 to 2.3 of log n = 5.5, while picture and caption are as "
        "far apart as random rows (alignment 1.7 to 2.0)",
    ),
]


def show(
    tables: Mapping[str, Table],
    record_of: Callable[[str, int], Run | None],  # of a finished run, by arm and seed
    args: argparse.Namespace,
) -> None:
    """Print and publish which claims of these tables show, as far as their runs have finished."""
    asked = [claim for claim in CLAIMS if f"evidence_{claim.table}" in args.tables]
    rows: list[dict[str, Any]] = []
    commits: set[str] = set()
    for claim in asked:
        table = tables[f"evidence_{claim.table}"]
        score = "/".join(table.columns[claim.score])
        runs, baseline = seeds_of_both(claim, score, record_of, args.seeds)
        if runs:
            apart = difference(runs, baseline, score, unit(claim.score))
            rows.append(row(claim, table.arms, len(runs), apart))
            commits |= {run["cost"]["commit"] for run in (*runs, *baseline)}
    if not rows:
        print("no claim can be looked at: no two arms of one have finished")
        return

    n_shown = sum(row["higher"] == "shown" for row in rows)
    n_waiting = len(asked) - len(rows)
    waiting = f", {n_waiting} more wait for runs or their evaluation" if n_waiting else ""
    notes = (
        f"{n_shown} of {len(rows)} are shown{waiting}. Claims are those of the papers, in small: "
        "higher scores of the first arm at equal samples seen, of multi_view also against a longer "
        "run of equal CPU time. Differences are paired over items, each with its mean over the "
        "seeds; the interval is of other items, not of other seeds. Causes are the most likely "
        "ones, and no more than that unless they say what was examined. Trained at "
        f"{', '.join(sorted(commits))}."
    )
    report.publish("evidence_claims", "Which claims show", rows, args, notes)


def seeds_of_both(
    claim: Claim, score: str, record_of: Callable[[str, int], Run | None], seeds: list[int]
) -> tuple[list[Run], list[Run]]:
    """The runs of both arms, of the seeds of which both keep what each item gave."""
    runs, baseline = [], []
    for seed in seeds:
        pair = record_of(claim.arm, seed), record_of(claim.against, seed)
        if all(run is not None and outcomes(run, score) is not None for run in pair):
            runs.append(pair[0])
            baseline.append(pair[1])
    return runs, baseline


def verdict(apart: tuple[float, float, float]) -> str:
    """Of a difference with its interval."""
    _, low, high = apart
    if low > 0:
        return "shown"
    return "reversed" if high < 0 else "not shown"


def row(
    claim: Claim, names: dict[str, str], n_seeds: int, apart: tuple[float, float, float]
) -> dict[str, Any]:
    """One line of the table; `names` of arms in the tables."""
    middle, low, high = apart
    told = verdict(apart)
    return {
        "arm": names[claim.arm],
        "against": names[claim.against],
        "score": claim.score.removesuffix(", %"),
        "seeds": n_seeds,
        "difference, points (95 %)": f"{middle:+.1f} ({low:+.1f} to {high:+.1f})",
        "higher": told,
        "most likely cause": None if told == "shown" else claim.cause or "not examined",
    }
