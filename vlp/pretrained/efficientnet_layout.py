"""EfficientNet-PyTorch's EfficientNets under timm's names: the way in of their weights.

Their file names every block by one number, timm by stage and block. They were converted from
TensorFlow, whose padding only timm's `tf_` models have; under any other the features are wrong and
no error shows it.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

# their name → timm's, outside the blocks
_AROUND = {
    "_conv_stem": "conv_stem",
    "_bn0": "bn1",
    "_conv_head": "conv_head",
    "_bn1": "bn2",
    "_fc": "classifier",
}
# of a block that widens its input first
_EXPANDING = {
    "_expand_conv": "conv_pw",
    "_bn0": "bn1",
    "_depthwise_conv": "conv_dw",
    "_bn1": "bn2",
    "_se_reduce": "se.conv_reduce",
    "_se_expand": "se.conv_expand",
    "_project_conv": "conv_pwl",
    "_bn2": "bn3",
}
# of the first stage's blocks, which do not
_PLAIN = {
    "_depthwise_conv": "conv_dw",
    "_bn1": "bn1",
    "_se_reduce": "se.conv_reduce",
    "_se_expand": "se.conv_expand",
    "_project_conv": "conv_pw",
    "_bn2": "bn2",
}


def is_theirs(weights: Mapping[str, Tensor]) -> bool:
    """Whether the names are those of EfficientNet-PyTorch."""
    return "_conv_stem.weight" in weights and "_blocks.0._depthwise_conv.weight" in weights


def renamed(weights: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors under timm's names, for the model whose tensors are `expected`."""
    # timm's blocks in their order: number k of theirs is the k-th of these.
    blocks: list[str] = []
    for name in expected:
        block = ".".join(name.split(".")[:3])
        if name.startswith("blocks.") and block not in blocks:
            blocks.append(block)

    result = {}
    for name, tensor in weights.items():
        module, _, kind = name.rpartition(".")
        if not name.startswith("_blocks."):
            result[f"{_AROUND.get(module, module)}.{kind}"] = tensor
            continue

        _, number, part = module.split(".", 2)
        # A file of more blocks than the model has keeps its names, which the error then shows.
        if int(number) >= len(blocks):
            result[name] = tensor
            continue
        expands = f"_blocks.{number}._expand_conv.weight" in weights
        names = _EXPANDING if expands else _PLAIN
        result[f"{blocks[int(number)]}.{names.get(part, part)}.{kind}"] = tensor
    return result
