"""The model card: metadata that the Hub reads, how to load the model, what it scored, how it was
trained.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import PurePath
from typing import Any

import yaml

from vlp import losses, plugin
from vlp.export import licenses, usage
from vlp.models import language
from vlp.models.concatenated import Concatenated
from vlp.models.dual_encoder import DualEncoder
from vlp.pretrained import image_size
from vlp.privacy import shareable
from vlp.types import ON_WHITE

VLP = "vlp"
# of the Hub, by the transformers class that the folder loads as
_TAGS: dict[str | None, list[str]] = {
    None: [],
    "CLIPModel": ["transformers", "clip"],
    "SiglipModel": ["transformers", "siglip"],
    "VisionTextDualEncoderModel": ["transformers", "vision-text-dual-encoder"],
}


def render(
    model: DualEncoder,
    name: str,
    *,
    form: str | None,
    notes: Sequence[str],
    results: Sequence[Mapping[str, Any]],
    training: Mapping[str, Any] | None,
    step: int | None,
    license: str | None,
    provenance: str,
    origin: str | None = None,
) -> str:
    """The README.md of an exported folder called `name`.

    form: the transformers class it loads as, or None. provenance: how the model came about, in a
    few words ("trained with vlp"). origin: a sentence on weights that are an average.
    """
    libraries = {note.partition(":")[0] for note in notes}
    if not of_open_clip(model):
        libraries.discard("open_clip")
    parts = [
        _front_matter(name, form, libraries, results, license),
        f"# {name}",
        _summary(model, provenance, step),
    ]
    parts += [] if origin is None else [origin]
    if training is not None and (scale := of_scale(training)):
        parts.append(scale)
    parts += ["## Use", usage.blocks(name, form, libraries, model.text_spec.context_length)]
    parts += ["## Pictures", _pictures(model, form)]
    parts += ["## Forms", "\n".join(f"- {note}" for note in notes)]
    parts += ["## Results", _results(results)]

    # The configuration is published without its paths and secrets, in both places.
    if training is not None:
        shown = yaml.safe_dump(shareable(training), sort_keys=False, allow_unicode=True)
        parts += ["## Data", _data(training)]
        parts += ["## Training configuration", f"```yaml\n{shown}```"]

    parts += ["## Limits", _LIMITS]
    return "\n\n".join(parts) + "\n"


def render_concatenated(
    model: Concatenated, name: str, members: Sequence[str], license: str | None
) -> str:
    """The README.md of a folder of several models as one."""
    metadata: dict[str, Any] = {
        "library_name": VLP,
        "pipeline_tag": "zero-shot-image-classification",
        "tags": ["contrastive"],
    }
    metadata |= licenses.metadata(license)

    dims = " + ".join(str(member.embed_dim) for member in model.members)
    links = ", ".join(f"[{member}]({member}/README.md)" for member in members)
    return f"""---
{yaml.safe_dump(metadata, sort_keys=False)}---

# {name}

{len(members)} image-text dual encoders, which vlp joins as stages. An embedding is theirs, one
after another, divided by √{len(members)}: {dims} = {model.embed_dim} dimensions, unit length. Its
cosine is the mean of theirs, and so is its scale, {model().scale.item():.4g}.

{usage.vlp_block(name)}

Other libraries load each stage by itself: {links}.
"""


_LIMITS = """\
The model knows what its training pairs showed, and repeats their gaps and biases. Similarities rank
candidates; they are not calibrated probabilities. Scores above hold for the data sets and protocols
named there and say little about others. Libraries prepare inputs differently, so embeddings of the
same file or sentence differ slightly between them, and not at all on the same pixels and ids: of an
opaque, upright picture transformers' image processor stays within one grey level (of 255) of
open_clip's, but where the margin to crop is odd it crops one pixel aside; and only open_clip
repairs text (HTML entities, curly quotes, full-width letters, wrongly decoded characters) before it
tokenizes."""


def of_open_clip(model: DualEncoder) -> bool:
    """Whether open_clip builds the towers of `model`."""
    is_ours = language.is_described(model.open_clip_config)
    return not is_ours and image_size.is_default(model.visual)


def _front_matter(
    name: str,
    form: str | None,
    libraries: set[str],
    results: Sequence[Mapping[str, Any]],
    license: str | None,
) -> str:
    # Keys and values are the Hub's: it sorts and filters models by them.
    readers = [name for name in ("open_clip", "sentence-transformers") if name in libraries]
    tags = ["contrastive", *readers, *_TAGS[form]]
    # The Hub shows how this library loads the repository itself, not a subfolder of it.
    library = readers[0] if readers else VLP
    if form in ("CLIPModel", "SiglipModel"):
        library = "transformers"
    metadata: dict[str, Any] = {
        "library_name": library,
        "pipeline_tag": "zero-shot-image-classification",
        "tags": tags,
    }
    metadata |= licenses.metadata(license)
    if results:
        metadata["model-index"] = [
            {"name": name, "results": [_indexed(record) for record in results]}
        ]
    return f"---\n{yaml.safe_dump(metadata, sort_keys=False, allow_unicode=True)}---"


def _indexed(record: Mapping[str, Any]) -> dict[str, Any]:
    """A record in the Hub's model-index form."""
    # The Hub has no task for the others; this one is nearest.
    retrieval = record["task"] == "zeroshot_retrieval"
    kind = "image-text-retrieval" if retrieval else "zero-shot-image-classification"

    data = _plain(record, "dataset") or record["task"]
    metrics = [{"type": key, "name": key, "value": value} for key, value in _numbers(record)]
    return {
        "task": {"type": kind, "name": record["task"]},
        "dataset": {"type": data, "name": data},
        "metrics": metrics,
    }


def _plain(record: Mapping[str, Any], key: str) -> str:
    """A record's value as text, a path by its last part; what a record does not say stays empty."""
    return PurePath(str(record[key])).name if record.get(key) is not None else ""


def _numbers(record: Mapping[str, Any]) -> list[tuple[str, float]]:
    """The metrics that are finite numbers, by name: the Hub takes no others."""
    finite = {
        metric: value
        for metric, value in record["metrics"].items()
        if isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    }
    return sorted(finite.items())


def _summary(model: DualEncoder, provenance: str, step: int | None) -> str:
    n_parameters = sum(parameter.numel() for parameter in model.parameters()) / 1e6
    height, width = model.image_spec.size
    scale, bias = model.scaling()
    steps = "" if step is None else f", {step} steps"
    biased = "" if bias is None else f", bias {bias.item():.4g}"
    return (
        f"An image-text dual encoder {provenance}{steps}: {n_parameters:.1f} million "
        f"parameters, {height}×{width} pixels, {model.text_spec.context_length} tokens, "
        f"{model.embed_dim}-dimensional embeddings, scale {scale.item():.4g}{biased}."
    )


def own_scale(training: Mapping[str, Any]) -> tuple[str, float] | None:
    """The term whose temperature the exported scale is, and that scale; None where it is learned.

    training: the resolved configuration.
    """
    return losses.own_scale(plugin.keyed("vlp.losses", training.get("objective") or {}))


def of_scale(training: Mapping[str, Any]) -> str:
    """Whose the exported scale is where the objective has a temperature of its own, else empty."""
    own = own_scale(training)
    if own is None:
        return ""
    return (
        f"Its scale is not learned: it is 1/temperature of the term `{own[0]}`, {own[1]:.4g}, at "
        "most the model's bound."
    )


def _pictures(model: DualEncoder, form: str | None) -> str:
    """What the model saw of stored pictures, what other libraries show it, and how to show it the
    same.
    """
    # Other libraries open a picture in their own way, which the weights did not see.
    decoding = model.image_spec.decoding
    turned = "left as stored, whatever its Exif orientation says"
    opened = 'Image.open("photo.jpg")'
    if decoding.exif:
        turned = "turned as its Exif orientation says"
        opened = f"ImageOps.exif_transpose({opened})"
    white = "white " if decoding.background == ON_WHITE.background else ""

    lines = [
        f"In training and evaluation transparent pixels lay on {white}{decoding.background},",
        f"and every picture was {turned}.",
        "open_clip's transform drops transparency, so that hidden colours show, and turns nothing.",
    ]
    if form is not None:
        lines += [
            "transformers' processors put transparent pixels on white and turn nothing;",
            "its pipelines turn a picture and drop its transparency.",
        ]

    return f"""{" ".join(lines)} For the same pixels everywhere:

```python
from PIL import Image, ImageOps
image = {opened}.convert("RGBA")
background = Image.new("RGBA", image.size, {(*decoding.background, 255)})
image = Image.alpha_composite(background, image).convert("RGB")
```"""


def _results(results: Sequence[Mapping[str, Any]]) -> str:
    """Every score beside its 95 % interval and what guessing would give, as far as the record has
    them.
    """
    if not results:
        return "Not evaluated."
    rows = [
        "| task | data | protocol | metric | value | 95 % interval | chance |",
        "|---|---|---|---|---|---|---|",
    ]
    for record in results:
        protocol = "{name} v{version}".format(**record["protocol"]) if "protocol" in record else ""
        intervals, chance = record.get("intervals_95") or {}, record.get("chance") or {}
        first_cells = [record["task"], _plain(record, "dataset"), protocol]

        for key, value in _numbers(record):
            interval = " to ".join(f"{bound:.4g}" for bound in intervals.get(key) or ())
            guessed = f"{chance[key]:.4g}" if chance.get(key) is not None else ""
            cells = [*first_cells, key, f"{value:.4g}", interval, guessed]
            # A group or a folder may be called anything; a bar would begin a cell.
            escaped = [cell.replace("|", "\\|") for cell in cells]
            rows.append(f"| {' | '.join(escaped)} |")

    return "\n".join(rows)


def _data(training: Mapping[str, Any]) -> str:
    """Every source of the training data in a line, without its paths and secrets."""
    sources = training["data"]["sources"] if "data" in training else []
    lines = []
    for source in sources:
        stated = {key: value for key, value in shareable(source).items() if value is not None}
        lines.append("- " + ", ".join(f"{key}: {value}" for key, value in stated.items()))
    return "\n".join(lines) or "Not recorded."
