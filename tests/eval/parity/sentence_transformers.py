"""sentence-transformers: MiniLM's embeddings, search and its figures, and models of ours that it
loads.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from tests.eval.parity import inputs
from tests.eval.parity.compare import Declared, Figures
from tests.eval.parity.open_clip_inputs import MINILM, STRINGS
from tests.models.tiny import siglip, tiny
from vlp.eval import models, ranked
from vlp.eval.models import Encoder
from vlp.eval.search import nearest
from vlp.export.folder import export
from vlp.models.dual_encoder import DualEncoder
from vlp.pretrained import packages

PEER = "sentence-transformers"
TOKENS = 256  # MiniLM's own limit
PHOTOS, TOP = 40, 5
KS = (1, 3, 5, 10)
EXPORTED = ["two red circles", "a dog", "a photo of a dog " * 9]

TEXTS = {
    "short texts": [
        "A red bicycle",
        "two dogs",
        "dog two",
        "a cat",
        *STRINGS["nearly nothing"][:4],
    ],
    "long texts": ["two dogs " * n + "and a cat" for n in (60, 124, 400)],
    "signs and numbers": STRINGS["signs and numbers"],
    "other scripts": STRINGS["other scripts"][:3] + STRINGS["other scripts"][4:],
}


# --- inputs ---------------------------------------------------------------------------------------


def _queries() -> tuple[list[str], list[str], list[list[int]]]:
    """Captions that look for the others of their photo: queries, corpus, and the right places."""
    queries, corpus, right = [], [], []
    for _, captions in inputs.captioned()[:PHOTOS]:
        if len(captions) > 1:
            queries.append(captions[0])
            right.append(list(range(len(corpus), len(corpus) + len(captions) - 1)))
        corpus += captions[1:] or captions
    return queries, corpus, right


def _ours_to_export(root: Path) -> Iterator[tuple[str, DualEncoder]]:
    """Models of ours, each of a form that sentence-transformers knows."""
    described = root / "described"
    described.mkdir(exist_ok=True)
    whole = {"text_tower": None, "embed_dim": None, "bias": -10.0}
    resnet = {"name": "timm", "model": "test_resnet", "image_size": 64}
    kinds = {
        "CLIP": {},
        "CLIP beside a ResNet of timm": {"image_tower": resnet},
        "SigLIP": {"image_tower": siglip(described), **whole},
    }
    for name, keys in kinds.items():
        model = tiny(**keys)
        inputs.fill(model)
        yield name, model


def _picture(model: DualEncoder) -> Image.Image:
    """A picture of the size that the model reads: transformers resizes in a way of its own."""
    shape = (*model.image_spec.size, 3)
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8))


# --- theirs ---------------------------------------------------------------------------------------


def theirs(root: Path) -> Figures:
    """By its own loader, search and evaluator."""
    # It takes seconds to import, and our figures need nothing of it.
    from sentence_transformers import SentenceTransformer, util
    from sentence_transformers.sentence_transformer.evaluation import (
        InformationRetrievalEvaluator,
    )

    minilm = SentenceTransformer(packages.local(MINILM), device="cpu", local_files_only=True)
    figures: Figures = {
        f"MiniLM, {name}": minilm.encode(texts, convert_to_tensor=True)
        for name, texts in TEXTS.items()
    }
    queries, corpus, right = _queries()
    rows = [minilm.encode(texts, convert_to_tensor=True) for texts in (queries, corpus)]
    hits = util.semantic_search(*rows, top_k=TOP)
    figures["search: scores"] = [[hit["score"] for hit in of_query] for of_query in hits]
    figures["search: places"] = [[hit["corpus_id"] for hit in of_query] for of_query in hits]

    evaluator = InformationRetrievalEvaluator(
        dict(enumerate(queries)),
        dict(enumerate(corpus)),
        {query: set(places) for query, places in enumerate(right)},
        write_csv=False,
        show_progress_bar=False,
    )
    scores = evaluator(minilm)
    figures |= {name.removeprefix("cosine_"): value for name, value in scores.items()}
    for name, model in _ours_to_export(root):
        folder = root / "exports" / name
        export(model, folder, overwrite=True)
        loaded = SentenceTransformer(str(folder), device="cpu", local_files_only=True)
        figures[f"export {name}: texts"] = loaded.encode(EXPORTED, convert_to_tensor=True)
        picture = _picture(model)
        figures[f"export {name}: images"] = loaded.encode([picture], convert_to_tensor=True)
    return figures


# --- ours -----------------------------------------------------------------------------------------


def ours(root: Path) -> Figures:
    """By our text tower, search and metrics."""
    minilm = _minilm()
    figures: Figures = {
        f"MiniLM, {name}": minilm.encode_texts(texts) for name, texts in TEXTS.items()
    }
    queries, corpus, right = _queries()
    query_rows, corpus_rows = minilm.encode_texts(queries), minilm.encode_texts(corpus)
    scores, places = nearest.exact(
        query_rows.numpy(), [(0, corpus_rows.numpy())], np.full(len(queries), -1), TOP
    )
    figures |= {"search: scores": scores, "search: places": places}
    figures |= _of_lists(list(ranked.found(query_rows, corpus_rows, right, 100)), right)
    for name, model in _ours_to_export(root):
        encoder = models.from_model(model)
        figures[f"export {name}: texts"] = encoder.encode_texts(EXPORTED)
        figures[f"export {name}: images"] = encoder.encode_images([_picture(model)])
    return figures


def _minilm() -> Encoder:
    tower = {"name": "huggingface", "model": MINILM, "context_length": TOKENS, "proj": "none"}
    return models.from_model(tiny(text_tower=tower, embed_dim=384))


def _of_lists(lists: list[Tensor], right: list[list[int]]) -> Figures:
    """The evaluator's figures from where each query's list is right."""
    hits = torch.stack(lists).double()
    n_right = torch.tensor([len(places) for places in right]).double()
    figures: Figures = {}
    for k in KS:
        n_hits = hits[:, :k].sum(1)
        figures[f"accuracy@{k}"] = (n_hits > 0).double().mean()
        figures[f"precision@{k}"] = (n_hits / k).mean()
        figures[f"recall@{k}"] = (n_hits / n_right).mean()

    ranks = torch.arange(1, hits.shape[1] + 1).double()
    first = (hits / ranks).amax(1)  # the reciprocal of the first right one's rank
    precision = hits.cumsum(1) / ranks
    gains = [ranked.ndcg(row, torch.ones(len(of)), 10) for row, of in zip(hits, right)]
    return figures | {
        "ndcg@10": sum(gains) / len(gains),
        "mrr@10": torch.where(first >= 0.1, first, 0).mean(),
        "map@100": ((precision * hits).sum(1) / n_right).mean(),
    }


def declared(root: Path) -> list[Declared]:
    """A text with entities of HTML."""
    from sentence_transformers import SentenceTransformer

    texts = ["fish &amp; chips", "fish & chips"]
    peer = SentenceTransformer(packages.local(MINILM), device="cpu", local_files_only=True)
    one, other = peer.encode(texts, convert_to_tensor=True)
    first, second = _minilm().encode_texts(texts)
    return [
        Declared(
            "MiniLM's cosine of 'fish &amp;amp; chips' and 'fish & chips'",
            float(one @ other),
            float(first @ second),
            "texts are repaired first, as open_clip's tokenizers do",
        )
    ]
