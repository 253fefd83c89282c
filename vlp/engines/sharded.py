"""FSDP2: torch's fully_shard, block by block."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from vlp import config, dist
from vlp.engines.replicated import Replicated, local_part
from vlp.models.dual_encoder import DualEncoder


class Sharded(Replicated):
    """FSDP2: parameters, gradients and moments sharded over all ranks, block by block (torch's
    fully_shard).
    """

    def wrap(self, options: config.Train) -> None:
        # Evaluation and averages need the whole model; the one below falls into shards.
        self.plain = copy.deepcopy(self.module)
        self.module.to(self.device)

        self.mesh = init_device_mesh(self.device.type, (dist.world_size(),))
        self.model = self.shard(self.module)

    def shard(self, module: DualEncoder, **options: Any) -> Any:
        for block in module.blocks():
            fully_shard(block, mesh=self.mesh, **options)
        return fully_shard(module, mesh=self.mesh, **options)

    def average(self, weights: Mapping[str, Tensor] | None = None) -> nn.Module:
        copied = copy.deepcopy(self.plain).requires_grad_(False)
        if weights is not None:
            copied.load_state_dict(dict(weights))

        # By default the outermost module would stay whole after a forward without a backward.
        return self.shard(copied.to(self.device).eval(), reshard_after_forward=True)

    def micro_batch(self, last: bool) -> AbstractContextManager:
        self.model.set_requires_gradient_sync(last)
        return nullcontext()

    def gradient_norm(self) -> Tensor:
        squares = [local_part(gradient).square().sum() for gradient in self._gradients()]
        local_square = torch.stack(squares).sum()
        return dist.all_reduce(local_square, dist.world()).sqrt()

    def evaluation_model(self) -> DualEncoder:
        self.plain.load_state_dict(self.state(everywhere=True)[0])
        return copy.deepcopy(self.plain).to(self.device).eval()
