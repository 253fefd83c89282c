"""FSDP2: torch's fully_shard, block by block."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from vlp import config, dist, optim
from vlp.engines.base import gathered
from vlp.engines.copies import filled, skeleton
from vlp.engines.own_rows import OwnRows
from vlp.engines.precision import compute_dtype
from vlp.engines.replicated import Replicated, local_part, part_like
from vlp.models.dual_encoder import DualEncoder
from vlp.models.exact import Scaling

# Of a GPU's memory, what the whole weights may take for a step: activations need most of it.
SHARE_OF_WEIGHTS = 0.25


class Sharded(Replicated):
    """FSDP2: parameters, gradients and moments sharded over all ranks, block by block (torch's
    fully_shard).

    In a bf16 run the ranks exchange weights in bf16 and gradients in float32; scale and bias stay
    float32 throughout. Beyond what autocast rounds under DDP, gains, embeddings of tokens and
    positions, and what text blocks hand on are bf16 too; the trained values stay float32.
    """

    def wrap(self, options: config.Train) -> None:
        self.dtype = compute_dtype(options, self.device)
        self.keeps_whole = keeps_whole(self.module, options, self.device, self.dtype)

        # Parts of different lengths pass the tower one after another, each of which would gather
        # its weights again.
        if not self.keeps_whole:
            self.module.text_parts = 1

        # Evaluation and averages need a whole model; the one below falls into shards.
        self.skeleton = skeleton(self.module)

        # From the CPU, block by block: a GPU never holds the whole float32 model.
        self.mesh = init_device_mesh(self.device.type, (dist.world_size(),))
        self.model = self.shard(self.module, reshard_after_forward=not self.keeps_whole)

    def shard(self, module: DualEncoder, reshard_after_forward: bool) -> Any:
        """Put shards in the place of the module's parameters, on this rank's device."""
        settings: dict[str, Any] = {
            "mesh": self.mesh,
            "reshard_after_forward": reshard_after_forward,
        }
        if self.dtype == torch.bfloat16:
            # bf16 makes a scale of 100 into 98.9, so these are units of their own, uncast.
            for part in module.modules():
                if isinstance(part, Scaling):
                    fully_shard(part, **settings)
            settings["mp_policy"] = MixedPrecisionPolicy(
                param_dtype=torch.bfloat16, reduce_dtype=torch.float32
            )

        for block in module.blocks():
            fully_shard(block, **settings)
        return fully_shard(module, **settings)

    def average(self, weights: Mapping[str, Tensor] | None = None) -> nn.Module:
        # On the CPU, from where it is sharded block by block, as the model was.
        whole = gathered(self.module.state_dict().items()) if weights is None else weights
        copied = filled(self.skeleton, whole, torch.device("cpu"))

        # It runs once a step and micro-batch, without gradient: nothing is worth keeping whole.
        return self.shard(copied, reshard_after_forward=True)

    def load_moments(self, moments: Mapping[str, Tensor]) -> None:
        named = dict(self.module.named_parameters())
        own_rows = OwnRows(moments, named)
        optim.restore(self.optimizer, self.optimizer_options, named, own_rows, part_like)

    def micro_batch(self, last: bool) -> AbstractContextManager:
        self.model.set_requires_gradient_sync(last)
        # The update changes the shards: whole weights of before must not outlive it.
        self.model.set_reshard_after_backward(last or not self.keeps_whole)
        return nullcontext()

    def gradient_norm(self) -> Tensor:
        parts = [local_part(gradient) for gradient in self._gradients()]
        norms = torch._foreach_norm([part for part in parts if part.numel()])

        # A rank may hold no part at all, where few parameters are trained.
        local_norms = torch.stack([torch.zeros((), device=self.device), *norms])
        local_square = local_norms.square().sum()
        return dist.all_reduce(local_square, dist.world()).sqrt()

    def evaluation_model(self, average: Any = None) -> DualEncoder:
        sharded = self.module if average is None else average
        whole = gathered(sharded.state_dict().items(), self.device)
        return filled(self.skeleton, whole, self.device)


def keeps_whole(
    model: DualEncoder, options: config.Train, device: torch.device, dtype: torch.dtype
) -> bool:
    """Whether a block's weights stay whole on every rank from its first forward to its last
    backward of a step, or are gathered anew for each of them, by train.reshard.
    """
    if options.reshard != "auto":
        return not options.reshard

    # One forward and one backward: what is saved is one exchange of two, for all the memory.
    if options.micro_batches == 1:
        return False
    if device.type == "cpu":
        return True

    n_bytes = dtype.itemsize * sum(parameter.numel() for parameter in model.parameters())
    total = torch.cuda.get_device_properties(device).total_memory
    return n_bytes <= SHARE_OF_WEIGHTS * total
