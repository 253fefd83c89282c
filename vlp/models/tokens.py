"""What a tower makes of each place of a picture or a text, in the space of its embeddings.

    picture → tower → h [rows, P, width] → projection → [rows, P, D]      P patches, or cells
    text    → tower → h [rows, L', width] → projection → [rows, L', D]    L' tokens

The projection is the one that the pooled features pass, with the norm before it: no weight is
added, and a tower's features are those that it gives by itself. A pool that has weights of its own
is applied to each place alone: an attention over one place passes that place's value on.

Asked for at a call, by terms that compare places (`vlp.losses`); a tower is left as it was.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from open_clip.hf_model import ClsLastHiddenStatePooler, ClsPooler, HFTextEncoder
from open_clip.modified_resnet import AttentionPool2d, ModifiedResNet
from open_clip.timm_model import TimmModel
from open_clip.transformer import TextTransformer, VisionTransformer
from torch import Tensor, nn

from vlp.data.prompted import unmarked
from vlp.models.batch_norm import batch_norms, kept_still
from vlp.models.language import LanguageTower

# Those that say themselves what they make of each place.
_SAY_TOKENS = (VisionTransformer, TextTransformer, HFTextEncoder)


def refusal(tower: nn.Module) -> str:
    """Why a tower gives no tokens, in words; empty where it does."""
    if isinstance(tower, LanguageTower):
        return "reads stored embeddings of whole texts" if tower.is_stored else ""
    if isinstance(tower, TimmModel):
        if _attends_to_pool(tower):
            return "pools by an attention of its own; take pool: avg or token"
        return ""
    # Its embedding reads the patches, its tokens are queries that the embedding never sees.
    if getattr(tower, "attn_pool_type", "") == "parallel":
        return "pools embedding and tokens side by side; take attentional_pool: shared or cascade"
    if isinstance(tower, (*_SAY_TOKENS, ModifiedResNet)):
        return ""
    return f"is a {type(tower).__name__}, whose tokens are not known"


def with_tokens(tower: Any, inputs: Tensor) -> tuple[Tensor, Tensor]:
    """A tower's features [rows, D] and its tokens [rows, P, …], before their projection."""
    if isinstance(tower, _SAY_TOKENS):
        with _saying_tokens(tower):
            features, tokens = tower(inputs)
        return features, tokens

    if isinstance(tower, LanguageTower):
        hidden = tower.hidden(inputs)
        return tower.projected(tower.pool_of(hidden, inputs)), hidden
    if isinstance(tower, ModifiedResNet):
        cells = tower.stem(inputs)
        for layer in (tower.layer1, tower.layer2, tower.layer3, tower.layer4):
            cells = layer(cells)
        return tower.attnpool(cells), cells.flatten(2).mT
    if isinstance(tower, TimmModel):
        features = tower.trunk.forward_features(inputs)
        return tower.head(tower.trunk.forward_head(features)), places(tower.trunk, features)
    raise ValueError(f"the tower {refusal(tower)}")


def project(tower: Any, tokens: Tensor) -> Tensor:
    """Tokens [rows, P, …] of `with_tokens` in the space of the features, [rows, P, D]."""
    if isinstance(tower, VisionTransformer):
        # open_clip norms its pooled features after the pool, and leaves the tokens.
        if tower.attn_pool is None and tower.final_ln_after_pool:
            tokens = tower.ln_post(tokens)
        # Of an attentional pool that is a cascade, the second part.
        if tower.attn_pool is not None and tower.attn_pool_contrastive is not None:
            tokens = _each_alone(tower.attn_pool_contrastive, tokens)
        return tokens if tower.proj is None else tokens @ tower.proj

    if isinstance(tower, TextTransformer):
        # Of a class token's tower likewise.
        if tower.cls_emb is not None:
            tokens = tower.ln_final(tokens)
        projection = tower.text_projection
        if isinstance(projection, nn.Linear):
            return projection(tokens)
        return tokens if projection is None else tokens @ projection

    if isinstance(tower, HFTextEncoder):
        return tower.proj(_through_pooler(tower, tokens))
    if isinstance(tower, LanguageTower):
        return tower.projected(tokens)
    if isinstance(tower, ModifiedResNet):
        return _through_attention(tower.attnpool, tokens)
    return _through_head(tower, tokens)


def token_mask(tower: Any, ids: Tensor) -> Tensor:
    """Which tokens of ids [rows, L] are the text's, [rows, L'] bool: neither padding nor a prompt,
    nor a first token that stands for something else.

    Of a causal tower the first token has seen nothing of the text; a class token is the whole text.
    """
    if isinstance(tower, LanguageTower):
        return unmarked(ids)[2]
    if isinstance(tower, HFTextEncoder):
        mask = _before_padding(ids, tower.config.pad_token_id)
        if type(tower.pooler) is ClsPooler:  # whose tokens open_clip gives without the first
            return mask[:, 1:]
        first_stands_for_all = isinstance(tower.pooler, ClsLastHiddenStatePooler)
    else:
        mask = _before_padding(ids, tower.pad_id)
        first_stands_for_all = tower.attn_mask is not None or tower.pool_type == "first"

    if first_stands_for_all:
        mask = torch.cat([torch.zeros_like(mask[:, :1]), mask[:, 1:]], 1)
    return mask


def _attends_to_pool(tower: TimmModel) -> bool:
    """Whether what is pooled depends on places together, in timm's trunk or open_clip's head."""
    from timm.layers.attention_pool import AttentionPoolLatent
    from timm.layers.attention_pool2d import AttentionPool2d as AttentionOfCells
    from timm.layers.attention_pool2d import RotAttentionPool2d

    pools = (AttentionOfCells, RotAttentionPool2d, AttentionPoolLatent)
    return any(isinstance(module, pools) for module in tower.modules())


def _before_padding(ids: Tensor, padding: int) -> Tensor:
    """All but the padding at the end of each row: its id may be a token's further in front."""
    n_tokens_from_here = (ids != padding).flip(1).cumsum(1).flip(1)
    return n_tokens_from_here > 0


@contextmanager
def _saying_tokens(tower: Any) -> Iterator[None]:
    """A tower of open_clip's that returns (features, tokens) meanwhile."""
    before = tower.output_tokens
    tower.output_tokens = True
    try:
        yield
    finally:
        tower.output_tokens = before


def places(trunk: Any, features: Tensor) -> Tensor:
    """The features of a timm trunk as its head reads one place, [rows, P, …], without class
    tokens.
    """
    if features.ndim == 3:
        return features[:, getattr(trunk, "num_prefix_tokens", 0) :].unsqueeze(2)

    channels_last = features.shape[1] != trunk.num_features
    if channels_last:
        return features.flatten(1, 2)[:, :, None, None]
    return features.flatten(2).mT[..., None, None]


def _through_head(tower: TimmModel, places: Tensor) -> Tensor:
    """Each place of `places` through a trunk's head as if the picture had no other."""
    alone = places.flatten(0, 1)
    if alone.ndim == 3:
        # Class token or mean over patches: whatever is pooled is this one.
        n_class_tokens = getattr(tower.trunk, "num_prefix_tokens", 0)
        alone = alone.expand(-1, 1 + n_class_tokens, -1)

    # Statistics of a norm behind the pool are those of pictures.
    with kept_still(batch_norms(tower)):
        projected = tower.head(tower.trunk.forward_head(alone))
    return projected.unflatten(0, places.shape[:2])


def _through_pooler(tower: HFTextEncoder, tokens: Tensor) -> Tensor:
    """Each token of a text through the layer that BERT has behind its first token, if any."""
    layer = getattr(tower.transformer, "pooler", None)
    if type(tower.pooler) is not ClsPooler or layer is None:
        return tokens
    return _each_alone(layer, tokens)


def _each_alone(pool: nn.Module, tokens: Tensor) -> Tensor:
    """What a pool makes of each of the tokens [rows, P, width] as if there were no other."""
    pooled: Tensor = pool(tokens.flatten(0, 1).unsqueeze(1))
    return pooled.view(*tokens.shape[:2], -1)


def _through_attention(pool: AttentionPool2d, cells: Tensor) -> Tensor:
    """Each cell of a picture through open_clip's attention pool as if it attended to itself."""
    positions = pool.positional_embedding[1:].to(cells.dtype)
    return pool.c_proj(pool.v_proj(cells + positions))
