"""Trained parts beside the two towers that only an objective reads: they take part in training and
leave with export.

    views     a two-layer projection of the embeddings of further views for each modality, with a
              scale of its own (multi_view, after CLIP-rocket, arXiv 2305.08675; slip):
              image_views, text_views, view_scale
    concepts  a linear layer from the image tower's output, before it is normalised, or from what
              its projection reads (concepts_of: trunk): concept_logits (distill)
    teacher   linear maps of the embeddings to the teachers' widths, with a scale of their own
              (distill, after CLIP-KD, arXiv 2307.12732): projected_image, projected_text,
              interactive_scale
    captions  a multimodal decoder over the towers' tokens (captioning, after CoCa,
              arXiv 2205.01917): caption_nll. One that stays is `model.decoder`
    concentration a two-layer map of the features of either tower to how certain they are
              (mc_infonce, after arXiv 2302.02865): image_concentration, text_concentration
    predictor a two-layer map of the embedding of each side to the other's (siam, after SimSiam,
              arXiv 2011.10566): predicted_text, predicted_image
    regions   attention between the patches of an image and the sentences of its text (prior, after
              PRIOR, arXiv 2307.12577): attended_captions, patch_distances, region_scale
    modalities
              towers of further modalities (vlp.models.modalities): others
    translators
              a map of the embeddings of each modality into another's space, both ways (translation,
              after LaT, arXiv 2207.04858): translated, cycled

`nonnegative` is no part beside the towers but their last step, without weights, and stays.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vlp import config
from vlp.fields import FIELDS
from vlp.models import trunk_features
from vlp.models.decoder import Decoder, check_towers, tokens_width
from vlp.models.exact import Scaling
from vlp.models.modalities import Modalities
from vlp.models.regions import Regions

_LARGEST_LOG = 9.0  # |log(κ / init)| at most: e^9 = 8,100 times


class Views(nn.Module):
    """[rows, D] → [rows, D] for images and texts, as far as they have views."""

    def __init__(self, embed_dim: int, options: config.ViewHead) -> None:
        super().__init__()
        for modality in ("image", "text"):
            if getattr(options, modality):
                setattr(self, modality, _two_layers(embed_dim, options.width))

        # Views may want another temperature than pairs.
        self.scaling = Scaling(math.log(options.scale.init), None, options.scale)


def _two_layers(embed_dim: int, width: int, n_outputs: int | None = None) -> nn.Sequential:
    last = nn.Linear(width, n_outputs or embed_dim)
    return nn.Sequential(nn.Linear(embed_dim, width), nn.GELU(), last)


class Predictor(nn.Module):
    """[rows, D] → [rows, D]: of images their texts, of texts their images."""

    def __init__(self, embed_dim: int, options: config.PredictorHead) -> None:
        super().__init__()
        self.image, self.text = (_two_layers(embed_dim, options.width) for _ in range(2))

    def forward(self, sides: dict[str, Tensor | None], pairs: int) -> dict[str, Tensor]:
        """What the first `pairs` rows of each side that is there say of the other, unit rows:
        predicted_text by "image", predicted_image by "text".
        """
        predicted = {}
        for side, other in (("image", "text"), ("text", "image")):
            rows = sides[side]
            if rows is not None:
                predicted[f"predicted_{other}"] = unit(getattr(self, side)(rows[:pairs]))
        return predicted


class Translators(nn.Module):
    """[rows, D] of one modality → [rows, D] in another's space, both ways of each pair."""

    def __init__(self, embed_dim: int, options: config.TranslatorHead) -> None:
        super().__init__()
        self.directions, self.names = options.directions, options.names
        self.maps = nn.ModuleDict()
        for source, target in self.directions:
            if options.width is None:
                translator: nn.Module = nn.Linear(embed_dim, embed_dim)
            else:
                translator = _two_layers(embed_dim, options.width)
            self.maps[_way(source, target)] = translator

    def forward(self, rows: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """`translated` and, of these back, `cycled`, [b, X, D] unit rows, of the rows [b, D] of
        each modality; nothing where one of the modalities is not there.
        """
        if not self.names <= rows.keys():
            return {}

        translated, cycled = [], []
        for source, target in self.directions:
            there = unit(self.maps[_way(source, target)](rows[source]))
            translated.append(there)
            cycled.append(unit(self.maps[_way(target, source)](there)))
        return {"translated": torch.stack(translated, 1), "cycled": torch.stack(cycled, 1)}


def _way(source: str, target: str) -> str:
    # Modalities are words: with a dash no two pairs share a name.
    return f"{source}-to-{target}"


class Concentration(nn.Module):
    """[rows, D] of a tower's features → κ [rows], for images and for texts."""

    def __init__(self, embed_dim: int, options: config.ConcentrationHead) -> None:
        super().__init__()
        self.log_init = math.log(options.init)
        for side in ("image", "text"):
            layers = _two_layers(embed_dim, options.width, 1)
            # All samples are equally certain at the start.
            for parameter in layers[-1].parameters():
                nn.init.zeros_(parameter)
            setattr(self, side, layers)

    def forward(self, side: str, features: Tensor) -> Tensor:
        """κ of the features of one side, "image" or "text", float32."""
        logarithm = _wide(getattr(self, side)(features)).squeeze(1)
        return (self.log_init + logarithm.clamp(-_LARGEST_LOG, _LARGEST_LOG)).exp()


class TeacherMap(nn.Module):
    """[rows, D] → [rows, D'] of one teacher, or [rows, T, D'] of several, for images and texts.

    Of several, the narrower ones are filled up with zeros, as their embeddings are.
    """

    def __init__(self, embed_dim: int, options: config.TeacherHead) -> None:
        super().__init__()
        self.options, self.widths = options, options.widths
        self.maps = nn.ModuleDict(
            {side: nn.Linear(embed_dim, sum(self.widths)) for side in ("image", "text")}
        )
        self.scaling = Scaling(math.log(options.scale.init), None, options.scale)

    def forward(self, side: str, rows: Tensor) -> Tensor:
        """Rows of one side, "image" or "text", in the teachers' spaces; of any norm."""
        mapped = self.maps[side](rows)
        if len(self.widths) == 1:
            return mapped

        width = max(self.widths)
        parts = mapped.split(self.widths, dim=1)
        return torch.stack([F.pad(part, (0, width - part.shape[1])) for part in parts], 1)


class Captioner(nn.Module):
    """−log p of every next token, from a causal text tower's tokens with the image tower's."""

    def __init__(self, visual: Any, text: Any, options: config.Captioner) -> None:
        super().__init__()
        check_towers("model.heads.captions", visual, text)

        # From now on both towers return (features, tokens).
        visual.output_tokens = text.output_tokens = True
        width: int = text.width
        self.bridge = nn.Linear(tokens_width(visual), width)
        self.decoder = Decoder(
            width,
            options.layers,
            options.heads or text.heads,
            text.context_length,
            output_dim=text.vocab_size,
        )

    def forward(self, image_tokens: Tensor, text_tokens: Tensor, ids: Tensor) -> Tensor:
        """−log p of the tokens ids[:, 1:], [b, L − 1], from [b, patches, width of the image tower]
        and [b, L, width of the text tower]. Position l sees the image and the tokens up to l. The
        logits, [b, L − 1, vocabulary], do not leave.
        """
        return self.decoder(self.bridge(image_tokens), text_tokens[:, :-1], ids[:, 1:])


def unit(features: Tensor) -> Tensor:
    return F.normalize(_wide(features), dim=-1)


def unit_or_zero(features: Tensor) -> Tensor:
    """Unit rows; rows of zeros stay zeros, with a gradient as of rows of norm 1.

    `unit` divides these by the least norm it knows, and their gradient would be 10¹² times as large
    as any other row's.
    """
    wide = _wide(features)
    norms = torch.linalg.vector_norm(wide, dim=-1, keepdim=True)
    return wide / torch.where(norms > 0, norms, 1)


def _wide(features: Tensor) -> Tensor:
    # In half precision a norm would be off by up to .4 %.
    return features.float() if features.dtype in (torch.bfloat16, torch.float16) else features


def nonnegative(features: Tensor) -> Tensor:
    """max(0, h) of features h of any shape, with the gradient of GELU: a number that is 0 for all
    samples can still come back (non-negative contrastive learning, arXiv 2403.12459).
    """
    values = features.relu()
    if not torch.is_grad_enabled():
        return values

    # The value of the first and the gradient of the second, without rounding.
    smooth = F.gelu(features)
    return values.detach() + (smooth - smooth.detach())


def last_step(heads: Mapping[str, Any]) -> dict[str, bool]:
    """Of a model's described heads what its embeddings pass everywhere, where the others leave."""
    return {"nonnegative": True} if heads.get("nonnegative") else {}


class Heads(nn.Module):
    """The heads of a configuration; those that it does not name are None."""

    def __init__(
        self, options: config.Heads, visual: nn.Module, text: nn.Module, embed_dim: int
    ) -> None:
        super().__init__()
        self.options = options

        self.views = Views(embed_dim, options.views) if options.views else None
        self.reads_trunk = options.concepts_of == "trunk"
        n_read = trunk_features.width(visual) if self.reads_trunk else embed_dim
        self.concepts = nn.Linear(n_read, options.concepts) if options.concepts else None
        self.teacher = TeacherMap(embed_dim, options.teacher) if options.teacher else None
        certainty = options.concentration
        self.concentration = Concentration(embed_dim, certainty) if certainty else None
        self.captions = Captioner(visual, text, options.captions) if options.captions else None
        self.predictor = Predictor(embed_dim, options.predictor) if options.predictor else None
        self.regions = Regions(visual, embed_dim, options.regions) if options.regions else None
        self.modalities = Modalities(options.modalities, embed_dim) if options.modalities else None
        translators = options.translators
        self.translators = Translators(embed_dim, translators) if translators else None

    def supplies(self) -> frozenset[str]:
        """The fields of `vlp.fields` that these heads give."""
        names = {
            name
            for name, row in FIELDS.items()
            if row.head and row.tower and getattr(self, row.head) is not None
        }

        # The head for views is there, but may project one side alone.
        for modality in ("image", "text"):
            if self.options.views is not None and not getattr(self.options.views, modality):
                names.discard(f"{modality}_views")
        return frozenset(names)
