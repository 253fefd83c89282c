"""Every further family of objectives once, each where its paper claims a gain.

The arms have the model, data and schedule of evidence_arms.SMALL and the weights of their papers;
nothing is tuned here, InfoNCE's rate included.
"""

from __future__ import annotations

from dataclasses import replace

from tests.benchmarks.evidence_arms import (
    ARMS,
    GEOMETRY,
    GUARDS,
    PROOFS,
    RATES,
    SIX_EPOCHS,
    SMALL,
    TABLES,
    TASKS,
    Arm,
    Column,
    Table,
    small,
)

PLAIN = "{infonce: {}}"
PREDICTOR = "model.heads={predictor: {width: 256}}"
QUEUE = "teacher={ema: 0.99, queue: 1024}"
MIXING = "{mixing: {hardest: 128, mixed_pairs: 128, mixed_queries: 16}}"
MATRYOSHKA = "{matryoshka: {widths: [8, 16, 32, 64, 128]}}"
TEACHER = ("infonce", 0)  # the arm and seed whose model teaches: a larger one, 60 k samples seen
TAUGHT_BY = f"teacher.model={TEACHER[0]}/{TEACHER[1]}"
TAUGHT = "{infonce: {weight: 0.25}, distill: {weight: 0.75}}"
HEAD = (TAUGHT_BY, "model.heads={teacher: {width: 128}}")
CLIP_KD = (
    "{infonce: {}, distill: [{form: features, weight: 3.9}, {form: interactive}, "
    "{form: similarity}]}"
)
VIEWS = (
    # Gentler than SimCLR's: a crop may lose an object, and captions name colors.
    "data.views={n: 2, augment: {scale: [0.8, 1], color: 0.1, grayscale: 0, blur: 0.2}}",
    "model.heads={views: {width: 256}}",
)
IMAGE_VIEWS = (VIEWS[0], "model.heads={views: {width: 256, text: false}}")

# All that is looked at, for arms that may win in one place and lose in another.
EVERY_TASK = (
    "eval={negatives: ["
    + ", ".join(f"{{data: data/scenes/{name}}}" for name in TASKS)
    + "], retrieval: {data: data/scenes/retrieval}, zeroshot: {data: data/scenes/zeroshot}, "
    "representation: {data: data/scenes/retrieval}}"
)


def of(prefix: str, arms: dict[str, tuple[str, ...]], **data: str) -> dict[str, str]:
    """Add arms, name -> (title, objective, further settings), and give their titles."""
    for name, (_, objective, *settings) in arms.items():
        arm = small(objective, EVERY_TASK, *settings, **data)
        ARMS[f"{prefix}_{name}"] = replace(arm, needs=TEACHER if TAUGHT_BY in settings else None)
    return {f"{prefix}_{name}": title for name, (title, *_) in arms.items()}


def add(
    name: str,
    title: str,
    arms: dict[str, str],
    columns: dict[str, Column],
    notes: str,
    paired: tuple[str, ...] = (),
) -> None:
    """Add a table whose arms may differ in data, views, heads and teachers."""
    TABLES[f"evidence_{name}"] = Table(title, arms, columns, notes, other_data=True, paired=paired)


# --- beside or in place of InfoNCE, on clean pairs ------------------------------------------------

CLEAN = of(
    "clean",
    {
        "plain": ("InfoNCE", PLAIN),
        "smooth": ("InfoNCE, label smoothing .1", "{infonce: {label_smoothing: 0.1}}"),
        "within": ("InfoNCE within modalities, too (UNPG)", "{infonce: {within: both}}"),
        "cyclip": ("+ CyCLIP", "{infonce: {}, cyclip: {}}"),
        "cyclip_light": ("+ CyCLIP, weight .02", "{infonce: {}, cyclip: {weight: 0.02}}"),
        "koleo": ("+ KoLeo .1", "{infonce: {}, koleo: {weight: 0.1}}"),
        "barlow": ("+ Barlow .025", "{infonce: {}, barlow: {weight: 0.025}}"),
        "siam": ("+ SimSiam between modalities", "{infonce: {}, siam: {}}", PREDICTOR),
        "mixup": ("+ mixup .2 (M3CoL)", "{infonce: {}, mixup: {weight: 0.2}}"),
        "nonnegative": (
            "InfoNCE, nonnegative embeddings",
            PLAIN,
            "model.heads={nonnegative: true}",
        ),
        "kernel": ("kernel mixture", "{kernel_mixture: {}}"),
        "uniform": ("decoupled uniformity", "{decoupled_uniformity: {}}"),
        "ranks": ("Mann-Whitney", "{mann_whitney: {}}"),
    },
)
add(
    "clean",
    "Families on clean pairs, beside or in place of InfoNCE",
    CLEAN,
    GUARDS | PROOFS | GEOMETRY,
    f"{SIX_EPOCHS} Weights of the papers, or 1; the predictor has 256 units.",
)

# --- small batches, many epochs, and what is remembered -------------------------------------------

MEMORIES = {
    "sogclr": ("SogCLR", "{sogclr: {}}"),
    "isogclr": ("iSogCLR", "{isogclr: {}}"),
    "queue": ("InfoNCE + queue of 1,024", "{infonce: {}, momentum_queue: {}}", QUEUE),
    "mixing": ("queue with mixed negatives", MIXING, QUEUE),
}
for name, (_, objective, *settings) in MEMORIES.items():
    small_batch = ("train.batch=32", f"train.optimizer.lr={RATES[32]}")
    ARMS[f"{name}_32"] = Arm(objective, (*SMALL, *small_batch, *settings))
add(
    "memory",
    "Small batches with a memory: B = 32",
    {"infonce_32": "InfoNCE"} | {f"{name}_32": title for name, (title, *_) in MEMORIES.items()},
    GUARDS,
    f"Six epochs of 4,000 scenes at a rate of {RATES[32]}, chosen with InfoNCE. The moving average "
    "decays by .99 a step; 128 mixtures of the 128 hardest keys, and 16 with the query.",
)

# --- captions of other pictures -------------------------------------------------------------------

NOISY = of(
    "noisy",
    {
        "plain": ("InfoNCE", PLAIN),
        "smooth": ("InfoNCE, label smoothing .1", "{infonce: {label_smoothing: 0.1}}"),
        "kernel": ("kernel mixture", "{kernel_mixture: {}}"),
        "mixup": ("+ mixup .2 (M3CoL)", "{infonce: {}, mixup: {weight: 0.2}}"),
        "siglip": ("SigLIP", "{siglip: {}}", "model.scale.init=10", "model.bias=-10"),
        "taught": ("+ similarities of a clean teacher", TAUGHT, TAUGHT_BY),
        "attract": ("CACR", "{cacr: {}}"),
    },
    data="noisy",
)
add(
    "noise",
    "Captions of other pictures",
    {"clean_plain": "no noise, InfoNCE"} | NOISY,
    GUARDS,
    f"{SIX_EPOCHS} 40 % of the scenes have another's captions. The teacher is the base model after "
    "60 k clean samples.",
)

# --- a strong teacher -----------------------------------------------------------------------------

TAUGHT_ARMS = of(
    "taught",
    {
        "similarity": ("similarities, .75 (MobileCLIP)", TAUGHT, TAUGHT_BY),
        "features": ("+ features", "{infonce: {}, distill: {form: features, weight: 3.9}}", *HEAD),
        "interactive": ("+ interactive", "{infonce: {}, distill: {form: interactive}}", *HEAD),
        "all": ("+ features, interactive, similarities (CLIP-KD)", CLIP_KD, *HEAD),
        "targets": ("InfoNCE with soft targets", "{infonce: {targets: {of: cross}}}", TAUGHT_BY),
    },
)
add(
    "teacher",
    "A strong teacher",
    {"clean_plain": "InfoNCE"} | TAUGHT_ARMS,
    GUARDS | PROOFS,
    f"{SIX_EPOCHS} The teacher is InfoNCE's base model of seed 0 after 60 k samples, for every "
    "seed.",
)

# --- few pictures, seen often ---------------------------------------------------------------------

FEW = of(
    "few",
    {
        "plain": ("InfoNCE", PLAIN),
        "long": ("InfoNCE, as long as views cost", PLAIN, "train.duration=72ksamples"),
        "multi_view": ("multi-view (CLIP-rocket)", "{multi_view: {}}", *VIEWS),
        "slip": ("+ SLIP", "{infonce: {}, slip: {}}", *IMAGE_VIEWS),
        "swap": ("+ swapped assignments .2", "{infonce: {}, swap: {weight: 0.2}}", *VIEWS),
        "mv_infonce": ("MV-InfoNCE", "{mv_infonce: {}}", *VIEWS),
        "mv_infonce_two": ("MV-InfoNCE of picture and caption alone", "{mv_infonce: {}}"),
        "mv_dhel": ("MV-DHEL", "{mv_dhel: {}}", *VIEWS),
        "poly_view": ("poly-view", "{poly_view: {}}", *VIEWS),
        "mixup": ("+ mixup .2 (M3CoL)", "{infonce: {}, mixup: {weight: 0.2}}"),
    },
    shards="00000.tar",
)
add(
    "few",
    "Few pictures, seen often",
    FEW,
    GUARDS,
    f"24 epochs of 1,000 scenes at B = 256 and a rate of {RATES[256]}. Two further views of "
    "picture and caption, crops of 80 to 100 % and little change of color; the second row sees "
    "three times as many samples, for about the CPU time of two views.",
)

# --- narrow embeddings ----------------------------------------------------------------------------

WIDTHS = (8, 16, 32, 64)
NARROW = of("narrow", {"matryoshka": ("Matryoshka, 8 to 128", MATRYOSHKA)})
TABLES["evidence_widths"] = Table(
    "The first numbers of an embedding as an embedding",
    {"clean_plain": "InfoNCE"} | NARROW,
    {
        f"{way} R@1 at {width}, %": (f"width_{width}", f"{way}_retrieval_recall@1")
        for way in ("text", "image")
        for width in WIDTHS
    }
    | GUARDS,
    f"{SIX_EPOCHS} Embeddings have 128 numbers; `vlp eval --width` reads the first of them.",
    evaluated={
        f"width_{width}": (
            *("--task", "retrieval", "--data", "data/scenes/retrieval"),
            *("--width", str(width)),
        )
        for width in WIDTHS
    },
)
