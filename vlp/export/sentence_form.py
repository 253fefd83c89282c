"""What sentence-transformers loads: the files that tell it how to ask a transformers model, or two
towers that no single model of transformers joins, side by side in its Router (since its 5.4).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from vlp.export import clip_form, dual_form
from vlp.export.parts import Part
from vlp.export.place import save_weights, write_json
from vlp.models.dual_encoder import DualEncoder

ROUTER = "router"  # the folder of both towers
# The two ways to ask a model: for the embedding that it pools, or for its tokens.
_POOLED = {"method": "forward", "method_output_name": "pooler_output"}
_TOKENS = {"method": "forward", "method_output_name": "last_hidden_state"}
# Of a model with both towers.
_BOTH = {
    "text": {"method": "get_text_features", "method_output_name": "pooler_output"},
    "image": {"method": "get_image_features", "method_output_name": "pooler_output"},
}


def write_modules(folder: Path, path: str, kind: str) -> None:
    """modules.json: sentence-transformers' module `kind` over the folder `path`, then unit rows."""
    modules = [(path, kind), ("1_Normalize", "Normalize")]
    listing = [
        {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for i, (path, kind) in enumerate(modules)
    ]
    write_json(folder / "modules.json", listing)
    # By these it tells an embedding model from others, and how to compare.
    described = {"model_type": "SentenceTransformer", "similarity_fn_name": "cosine"}
    write_json(folder / "config_sentence_transformers.json", described)


def write_both(folder: Path, *, padded: bool = False) -> None:
    """How to ask the transformers model in `folder` for either tower's embedding.

    padded: texts are padded to the context, as SigLIP's were in training.
    """
    asked = _asked(_BOTH, "sentence_embedding")
    if padded:
        asked["processing_kwargs"] = {"text": {"padding": "max_length"}}
    write_json(folder / "sentence_bert_config.json", asked)


def write_router(folder: Path, model: DualEncoder, parts: Mapping[str, Part]) -> None:
    """Both towers, each as a transformers model, its pooling and its projection, by modality."""
    from transformers import CLIPImageProcessor

    structure = {}
    types = {}
    for side, part in parts.items():
        place = folder / ROUTER / f"{side}_0_Transformer"
        place.mkdir(parents=True)
        if side == "text":
            dual_form.tokenizer(model).save_pretrained(place)
        else:
            CLIPImageProcessor(**clip_form.image_settings(model)).save_pretrained(place)
        _write_network(part, side, place)

        kinds = ["Transformer", *_write_layers(part, side, folder / ROUTER)]
        structure[side] = [f"{side}_{i}_{kind}" for i, kind in enumerate(kinds)]
        types |= {
            name: f"sentence_transformers.models.{kind}"
            for name, kind in zip(structure[side], kinds)
        }

    settings = {"types": types, "structure": structure, "parameters": {"default_route": "text"}}
    write_json(folder / ROUTER / "router_config.json", settings)
    write_modules(folder, ROUTER, "Router")


def _write_network(part: Part, side: str, place: Path) -> None:
    network = part.network
    network.config.architectures = [type(network).__name__]
    network.config.save_pretrained(place)
    save_weights(network.state_dict(), place / "model.safetensors")

    asked = _asked({side: _POOLED}, "sentence_embedding")
    if part.pooling != "own":
        asked = _asked({side: _TOKENS}, "token_embeddings")
    write_json(place / "sentence_bert_config.json", asked)


def _write_layers(part: Part, side: str, folder: Path) -> list[str]:
    """Pooling and projection of a part, each a folder; returns their kinds."""
    kinds = []
    if part.pooling != "own":
        kinds.append("Pooling")
        place = folder / f"{side}_{len(kinds)}_Pooling"
        place.mkdir()
        width = part.network.config.hidden_size
        settings = {"embedding_dimension": width, "pooling_mode": part.pooling}
        write_json(place / "config.json", settings)

    for layer in part.projection:
        kinds.append("Dense")
        place = folder / f"{side}_{len(kinds)}_Dense"
        place.mkdir()
        activation = "activation.GELU" if layer.gelu else "linear.Identity"
        n_outputs, n_inputs = layer.weight.shape
        settings = {
            "in_features": n_inputs,
            "out_features": n_outputs,
            "bias": layer.bias is not None,
            "activation_function": f"torch.nn.modules.{activation}",
        }
        write_json(place / "config.json", settings)

        weights: dict[str, Tensor] = {"linear.weight": layer.weight}
        if layer.bias is not None:
            weights["linear.bias"] = layer.bias
        save_weights(weights, place / "model.safetensors")
    return kinds


def _asked(modalities: dict[str, Any], output: str) -> dict[str, Any]:
    return {
        "transformer_task": "feature-extraction",
        "modality_config": modalities,
        "module_output_name": output,
    }
