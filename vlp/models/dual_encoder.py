"""Two towers into one space: pixels and token ids in, unit vectors, scale and bias out.

The towers are open_clip's; parameter names are those of its CustomTextCLIP, and of its CoCa where
there is a text decoder, except that scale and bias live in `scaling`, so that every training run is
an open_clip model by a fixed rule (`open_clip_state_dict`).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import open_clip
import torch
from open_clip.transformer import TextTransformer
from torch import Tensor, nn

from vlp import config
from vlp.fields import FIELDS
from vlp.models import assemble, lengths, of_heads, passing, tokens
from vlp.models.batch_norm import batch_norms
from vlp.models.decoder import Decoder
from vlp.models.exact import Pixels, Scaling
from vlp.models.heads import Heads, nonnegative, unit, unit_or_zero
from vlp.models.lengths import Cut
from vlp.models.multimodal import Prompts
from vlp.models.regions import Sentences
from vlp.models.repeated import repeated
from vlp.models.tower_order import Draws, after_texts
from vlp.models.trunk_features import Passed
from vlp.pretrained import adapters
from vlp.schema import plain
from vlp.types import Features


class DualEncoder(nn.Module):
    """An image tower and a text tower with a shared embedding space.

    Attributes: `image_spec` and `text_spec` say what the data must deliver, `embed_dim` is D,
    `open_clip_config` is the `model_cfg` of open_clip_config.json, `scale_config` how the scale
    starts, is bounded, and whether it is learned; `text_decoder` describes pictures (None: the
    model has none).
    """

    def __init__(
        self,
        clip: open_clip.CustomTextCLIP,
        model_cfg: dict[str, Any],
        preprocess_cfg: dict[str, Any],
        scale: config.Scale,
        heads: config.Heads,
    ) -> None:
        """Take over the towers, text decoder, scale and bias of `clip`, built from `model_cfg`;
        heads start at random.
        """
        super().__init__()
        self.visual, self.text = clip.visual, clip.text
        self.text_decoder: Decoder | None = getattr(clip, "text_decoder", None)
        self.open_clip_config = model_cfg
        self.embed_dim: int = model_cfg["embed_dim"]

        # What the data must deliver.
        usual_length = open_clip.CLIPTextCfg.context_length
        context_length = model_cfg["text_cfg"].get("context_length", usual_length)
        self.image_spec = assemble.image_spec(preprocess_cfg, self.visual.image_size)
        self.text_spec = assemble.text_spec(model_cfg["text_cfg"], context_length)
        self.pixels = Pixels(self.image_spec)

        # What only training reads.
        bias = None if clip.logit_bias is None else clip.logit_bias.item()
        self.scaling = Scaling(clip.logit_scale.item(), bias, scale)
        self.scale_config, self.heads_config = scale, heads
        if self.text_decoder is not None and heads.captions is not None:
            raise ValueError(
                "the model has a text decoder of its own, and model.heads.captions is another; "
                "leave out model.heads.captions"
            )
        self.heads = Heads(heads, self.visual, self.text, self.embed_dim)
        self.locked: list[nn.Module] = []
        self.lora_scalings: dict[str, float] = {}  # alpha / r of the towers that have adapters
        self.batch_norms = batch_norms(self.visual)
        self._draws = Draws()

        # How texts pass their tower (vlp.models.lengths). A tower of shards gathers its weights
        # for every part, a compiled one wants few shapes.
        self.cut_captions, self.text_parts, self.static_shapes = True, lengths.PARTS, False
        self.padding = lengths.spared_padding(self.text)
        if isinstance(self.text, TextTransformer):
            self.text.transformer.register_forward_pre_hook(lengths.fit_mask, with_kwargs=True)

    @property
    def modality_shapes(self) -> dict[str, tuple[int, int]]:
        """(T, F) of the further modalities that the model reads, by name."""
        return {} if self.heads.modalities is None else self.heads.modalities.shapes

    @property
    def decoded_modalities(self) -> dict[str, config.Members]:
        """Those of them that are made of members of the samples."""
        options = self.heads_config.modalities
        return {name: tower.members for name, tower in options.items() if tower.members}

    @property
    def logit_scale(self) -> nn.Parameter:
        """[1] float32: the logarithm of the scale, not clamped."""
        return self.scaling.logit_scale

    @property
    def logit_bias(self) -> nn.Parameter | None:
        """[1] float32, or None."""
        return self.scaling.logit_bias

    def forward(
        self,
        image: Tensor | None = None,
        text: Tensor | None = None,
        image_views: Tensor | None = None,
        text_views: Tensor | None = None,
        pairs: int = 0,
        cut: Cut | None = None,
        token_rows: dict[str, tuple[int, int]] | None = None,
        sentences: Sentences | None = None,
        modalities: Tensor | None = None,
        modality_lengths: Tensor | None = None,
        prompts: Prompts | None = None,
        frames: Tensor | None = None,
        frame_places: Tensor | None = None,
        on_text: Callable[[Tensor], None] | None = None,
    ) -> Features:
        """Embed what is given: images [rows, 3, H, W] as for `encode_image`, texts [rows, L] as for
        `encode_text`, cut to their length by `cut`, which is made of the texts and their views, and
        further modalities [rows, S] of lengths [rows, O] with the frames [n, 3, H, W] that a video
        has at the places [n] of the [rows, F] that it may have. `prompts`: texts in which the
        images stand, where the tower is a multimodal language model.

        Views go through the head for views. All other heads read the first `pairs` rows. The rows
        from … to … of a tower that `token_rows` names by a field of tokens (`vlp.fields`) give
        these as well. `sentences` names the rows of texts that the head for regions reads.

        on_text: called with the embeddings of the texts [rows, D], without gradient, as soon as
        they are there: before the images pass, unless that would change random numbers.
        """
        scale, bias = self.scaling()
        outputs: dict[str, Tensor | None] = {"image": None, "text": None}
        image_tokens = text_tokens = of_frames = None
        rows_of_images, rows_of_texts = (_of_side(side, token_rows) for side in ("image", "text"))
        pass_texts = partial(self._pass_texts, views=text_views, token_rows=rows_of_texts, cut=cut)

        # The towers, each once. Whoever waits for the texts has them first.
        texts_first = on_text is not None and self._draws.allow_texts_first
        if text is not None and texts_first:
            features, text_tokens = pass_texts(text, outputs, on_text)
        if image is not None:
            passed, of_frames = self._pass_images(
                image,
                outputs,
                views=image_views,
                frames=frames,
                token_rows=rows_of_images,
                wants_tokens=bool(rows_of_images) or sentences is not None,
                prompts=prompts,
                after_the_texts=texts_first,
            )
            image_tokens = passed.tokens
            outputs |= of_heads.of_images(self.heads, passed, pairs)
        if text is not None:
            if not texts_first:
                features, text_tokens = pass_texts(text, outputs, on_text)
            if sentences is not None:
                assert image_tokens is not None, "the head for regions needs pictures"
                outputs |= of_heads.of_regions(
                    self.heads, self.visual, image_tokens[:pairs], features, sentences
                )
            outputs |= of_heads.of_texts(self.heads, features, pairs)

        # What heads compute of both towers and of further modalities.
        outputs |= of_heads.of_both(self.heads, outputs, pairs)
        has_views = image_views is not None or text_views is not None
        if self.heads.views is not None and has_views:
            outputs["view_scale"] = self.heads.views.scaling()[0]
        if pairs and image_tokens is not None and text_tokens is not None:
            assert text is not None, "which the tokens are of"
            inputs = image_tokens[:pairs], text_tokens[:pairs], text[:pairs]
            outputs["caption_nll"] = of_heads.caption_nll(self.heads, self.text_decoder, *inputs)
        if modalities is not None:
            assert modality_lengths is not None, "which come with the rows"
            if image is None and frames is not None:
                of_frames = self.image_features(frames)
            # As rows of the space: a video is read by the embeddings of its frames.
            of_videos = None if of_frames is None else self._embedding(of_frames)
            others = of_heads.of_modalities(
                self.heads, modalities, modality_lengths, of_videos, frame_places
            )
            outputs["others"] = self._embedding(others)
        outputs |= of_heads.translations(self.heads, outputs, pairs)
        return Features(**outputs, scale=scale, bias=bias)

    def _pass_images(
        self,
        image: Tensor,
        outputs: dict[str, Tensor | None],
        *,
        views: Tensor | None,
        frames: Tensor | None,
        token_rows: dict[str, tuple[int, int]],
        wants_tokens: bool,
        prompts: Prompts | None,
        after_the_texts: bool,
    ) -> tuple[Passed, Tensor | None]:
        """What the tower makes of images, their views and frames of videos, which follow one
        another, and the features of the frames; adds embeddings and tokens to `outputs`.
        """
        pictures = _joined(image, views)
        of_frames = None
        with self._draws.watched("image", image.device, self.training):
            passed = passing.pass_images(self, _joined(pictures, frames), wants_tokens, prompts)
            passed = after_texts(passed) if after_the_texts else passed
            of_pictures = passed.features
            if frames is not None:
                of_pictures, of_frames = of_pictures.split([len(pictures), len(frames)])
            outputs |= self._embeddings("image", of_pictures, image.shape[0])
            outputs |= self._tokens(self.visual, passed.tokens, token_rows)
        return passed, of_frames

    def _pass_texts(
        self,
        text: Tensor,
        outputs: dict[str, Tensor | None],
        on_text: Callable[[Tensor], None] | None,
        *,
        views: Tensor | None,
        token_rows: dict[str, tuple[int, int]],
        cut: Cut | None,
    ) -> tuple[Tensor, Tensor | None]:
        """The features and tokens of texts and their views, which follow the other rows; adds their
        embeddings to `outputs`.
        """
        with self._draws.watched("text", text.device, self.training):
            rows = _joined(text, views)
            features, of_places = passing.pass_texts(self, rows, cut, bool(token_rows))
            outputs |= self._embeddings("text", features, text.shape[0])
            outputs |= self._tokens(self.text, of_places, token_rows)

        embeddings = outputs["text"]
        if on_text is not None and embeddings is not None:
            on_text(embeddings.detach())
        return features, of_places

    def supplies(self) -> frozenset[str]:
        """The fields of `vlp.fields` that text decoder and heads give."""
        by_heads = self.heads.supplies()
        return by_heads if self.text_decoder is None else by_heads | {"caption_nll"}

    def _embeddings(self, name: str, features: Tensor, n_rows: int) -> dict[str, Tensor]:
        """Unit rows of the first rows of a tower's features; what follows are views, which pass the
        head of this modality.
        """
        embeddings = {name: self._embedding(features[:n_rows])}
        if features.shape[0] == n_rows:
            return embeddings

        project = getattr(self.heads.views, name)
        embeddings[f"{name}_views"] = unit(project(self._embedding(features[n_rows:])))
        return embeddings

    def _tokens(
        self, tower: nn.Module, of_tower: Tensor | None, rows: dict[str, tuple[int, int]]
    ) -> dict[str, Tensor]:
        """Unit rows of a tower's tokens, [rows, P, D], of the rows of each field."""
        if not rows:
            return {}
        assert of_tower is not None, "a tower that is asked for tokens gives them"
        return {
            name: self._embedding(tokens.project(tower, of_tower[first:last]))
            for name, (first, last) in rows.items()
        }

    def _embedding(self, features: Tensor) -> Tensor:
        """Unit rows of a tower's features, [..., D]."""
        if self.heads_config.nonnegative:
            return unit_or_zero(nonnegative(features))
        return unit(features)

    def encode_image(self, image: Tensor) -> Tensor:
        """[b, 3, H, W] → [b, D] unit rows (float32 under autocast). uint8 is RGB in 0…255 and is
        normalised here, on its device; a floating-point image is taken as normalised already. H, W
        must be `image_spec.size`.
        """
        return self._embedding(self.image_features(image))

    def image_features(self, image: Tensor) -> Tensor:
        """The tower's features [b, D] before the last step of embeddings, of images as for
        `encode_image`.
        """
        return passing.pass_images(self, image).features

    def image_tokens(self, image: Tensor) -> Tensor:
        """The tower's tokens [b, places, width], which the text decoder reads, of images as for
        `encode_image`.
        """
        read = passing.pass_images(self, image).tokens
        if read is None:
            raise ValueError("the model has no text decoder, so its image tower gives no tokens")
        return read

    def encode_text(self, text: Tensor) -> Tensor:
        """[rows, L] int64 token ids → [rows, D] unit rows (float32 under autocast). L must be the
        context length; where the tower's features do not depend on padding, it may be shorter.
        """
        return self._embedding(passing.pass_texts(self, text)[0])

    def tokens_refusal(self, side: str) -> str:
        """Why the tower of a side, "image" or "text", gives no tokens; empty where it does."""
        return tokens.refusal(self.visual if side == "image" else self.text)

    def token_mask(self, ids: Tensor) -> Tensor:
        """Which tokens of ids [rows, L] are the text's (`vlp.models.tokens`), [rows, L'] bool."""
        return tokens.token_mask(self.text, ids)

    def image_certainty(self, image: Tensor) -> Tensor:
        """log κ [b] of images as for `encode_image`; the model has a head for concentrations."""
        assert self.heads.concentration is not None
        return self.heads.concentration("image", self.image_features(image)).log()

    def text_certainty(self, text: Tensor, cut: Cut | None = None) -> Tensor:
        """The same of texts, [rows]."""
        assert self.heads.concentration is not None
        return self.heads.concentration("text", passing.pass_texts(self, text, cut)[0]).log()

    def cut(self, ids: np.ndarray, device: torch.device, n_possible: int) -> Cut | None:
        """How texts [rows, L], given on the host, are to pass the tower; None: as they are.

        `n_possible`: the rows that there would be if masks left none out.
        """
        # Rows that stand for texts have no length.
        if not np.issubdtype(ids.dtype, np.integer):
            return None
        padding = self.padding if self.cut_captions else None
        if not len(ids) or (padding is None and not self.static_shapes):
            return None

        n_passed = None
        if self.static_shapes:
            # Up to a seventh more rows, for one of eight numbers of rows.
            unit = -(-n_possible // 8)
            n_passed = -(-len(ids) // unit) * unit
        return lengths.cut(ids, padding, device, self.text_parts, n_passed)

    def blocks(self) -> list[nn.Module]:
        """The repeated modules of towers, text decoder and heads, in order, outermost only: the
        units to shard (FSDP2) or recompute.
        """
        parts = (self.visual, self.text, self.text_decoder, self.heads)
        return [block for part in parts if part is not None for block in repeated(part)]

    def train(self, mode: bool = True) -> DualEncoder:
        super().train(mode)

        # A locked trunk's batch norms and dropouts stay as they are.
        for module in self.locked:
            module.eval()
        return self

    def example(self, rows: int, seed: int = 0) -> tuple[Tensor, Tensor]:
        """Inputs to compare models on: normalised noise [rows, 3, H, W] and random ids [rows, L],
        the same for one seed.

        Every row holds the largest id once, in the middle, which in CLIP's vocabulary ends a text.
        """
        generator = torch.Generator().manual_seed(seed)
        pixels = torch.randn(rows, 3, *self.image_spec.size, generator=generator)

        length, largest_id = self.text_spec.context_length, self.text.vocab_size - 1
        ids = torch.randint(largest_id, (rows, length), generator=generator)
        ids[:, length // 2] = largest_id
        return pixels, ids

    def description(self) -> dict[str, Any]:
        """All that is needed to build this model again, weights aside: the content of
        open_clip_config.json, as JSON values.

        open_clip reads `model_cfg` and `preprocess_cfg`; `vlp` is for `from_description`.
        """
        ours = {"scale": plain(self.scale_config), "heads": plain(self.heads_config)}
        if self.lora_scalings:
            ours["lora"] = self.lora_scalings
        return {
            "model_cfg": self.open_clip_config,
            "preprocess_cfg": assemble.preprocess_cfg(self.image_spec),
            "vlp": ours,
        }

    def open_clip_state_dict(self) -> dict[str, Tensor]:
        """The weights under the names and shapes of open_clip's CustomTextCLIP, or CoCa, adapters
        merged and the scale as the forward pass bounds it.
        """
        not_in_open_clip = ("scaling.", "heads.")
        named = {
            key: value
            for key, value in adapters.merged(self.state_dict(), self.lora_scalings).items()
            if not key.startswith(not_in_open_clip)
        }

        # open_clip's are scalars, and it knows no ceiling.
        bounded = self.logit_scale.detach().clamp(max=self.scaling.log_max)
        named["logit_scale"] = bounded.reshape(())
        if self.logit_bias is not None:
            named["logit_bias"] = self.logit_bias.detach().reshape(())
        return named


def _of_side(
    side: str, token_rows: dict[str, tuple[int, int]] | None
) -> dict[str, tuple[int, int]]:
    """The rows of one tower whose tokens are asked for, by field."""
    asked_for = token_rows or {}
    return {name: rows for name, rows in asked_for.items() if FIELDS[name].tower == side}


def _joined(rows: Tensor, views: Tensor | None) -> Tensor:
    return rows if views is None else torch.cat([rows, views])
