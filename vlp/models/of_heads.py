"""What the heads make of the rows that passed the towers, as the fields of `Features`.

Heads for pairs read the first `pairs` rows of a tower; where that is 0 they do not run.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from vlp.models import tokens
from vlp.models.decoder import Decoder
from vlp.models.heads import Heads
from vlp.models.regions import Sentences, in_place
from vlp.models.trunk_features import Passed


def of_images(heads: Heads, passed: Passed, pairs: int) -> dict[str, Tensor]:
    """Of the first `pairs` images alone."""
    outputs = {}
    if pairs and heads.concepts is not None:
        read = passed.features if passed.trunk is None else passed.trunk
        outputs["concept_logits"] = heads.concepts(read[:pairs])
    if pairs and heads.concentration is not None:
        certainty = heads.concentration("image", passed.features[:pairs])
        outputs["image_concentration"] = certainty
    return outputs


def of_texts(
    heads: Heads,
    features: Tensor,  # [rows, D], the tower's
    pairs: int,
) -> dict[str, Tensor]:
    """Of the first `pairs` texts alone."""
    if not pairs or heads.concentration is None:
        return {}
    return {"text_concentration": heads.concentration("text", features[:pairs])}


def of_regions(
    heads: Heads,
    visual: nn.Module,
    image_tokens: Tensor,  # [b, places, width]
    features: Tensor,  # [rows, D] of the text tower
    sentences: Sentences,
) -> dict[str, Tensor]:
    """Of the patches of images and the sentences beside them; nothing without that head."""
    if heads.regions is None:
        return {}
    patches = tokens.project(visual, image_tokens)
    return heads.regions(patches, sentences.of(features), sentences.valid)


def of_both(
    heads: Heads, embeddings: Mapping[str, Tensor | None], pairs: int
) -> dict[str, Tensor | None]:
    """Of the unit rows of both sides, "image" and "text", those that are there."""
    outputs: dict[str, Tensor | None] = {}
    if pairs and heads.teacher is not None:
        outputs["interactive_scale"] = heads.teacher.scaling()[0]
        for side in ("image", "text"):
            rows = embeddings[side]
            if rows is not None:
                outputs[f"projected_{side}"] = heads.teacher(side, rows[:pairs])
    if pairs and heads.predictor is not None:
        sides = {side: embeddings[side] for side in ("image", "text")}
        outputs |= heads.predictor(sides, pairs)
    return outputs


def caption_nll(
    heads: Heads,
    text_decoder: Decoder | None,
    image_tokens: Tensor,  # [b, places, width]
    text_tokens: Tensor,  # [b, L, width]
    ids: Tensor,  # [b, L]
) -> Tensor | None:
    """−log p of the tokens ids[:, 1:], [b, L − 1], by the text decoder or the head that is one;
    None: there is neither.
    """
    if text_decoder is not None:
        return text_decoder(image_tokens, text_tokens[:, :-1], ids[:, 1:])
    if heads.captions is not None:
        return heads.captions(image_tokens, text_tokens, ids)
    return None


def of_modalities(
    heads: Heads,
    rows: Tensor,  # [rows, S]
    lengths: Tensor,  # [rows, O]
    of_frames: Tensor | None,  # [n, D], embeddings of the frames that are there
    places: Tensor | None,  # [n] of them among [rows · F]; None: all are there
) -> Tensor:
    """Features of further modalities, [rows, O, D]."""
    towers = heads.modalities
    assert towers is not None, "who brings modalities has their towers"
    frames = None
    if of_frames is not None:
        frames = in_place(of_frames, places, (len(rows), towers.n_frames))
    return towers(rows, lengths, frames)


def translations(
    heads: Heads, embeddings: Mapping[str, Tensor | None], pairs: int
) -> dict[str, Tensor]:
    """Of the unit rows of every modality that was embedded: "image", "text" and "others"."""
    if not pairs or heads.translators is None:
        return {}
    sides = {side: embeddings[side] for side in ("image", "text")}
    rows = {side: of_side[:pairs] for side, of_side in sides.items() if of_side is not None}

    others = embeddings.get("others")
    if others is not None:
        assert heads.modalities is not None, "which made them"
        rows |= dict(zip(heads.modalities.options, others.unbind(1), strict=True))
    return heads.translators(rows)
