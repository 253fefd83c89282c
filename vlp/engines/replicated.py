"""One process, or DDP through Accelerate: every rank holds the whole model."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from accelerate.utils import DistributedDataParallelKwargs
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from vlp import config, dist, optim
from vlp.engines import compiling
from vlp.engines.base import Named, State, state_of
from vlp.engines.copies import sharing
from vlp.engines.precision import set_up
from vlp.engines.processes import accelerator
from vlp.models.batch_norm import batch_norms
from vlp.models.dual_encoder import DualEncoder
from vlp.models.recomputing import recompute_activations
from vlp.pretrained.read_once import read_once
from vlp.pretrained.restoring import restore


class Replicated:
    """DDP through Accelerate, or one process: every rank holds the whole model."""

    rehearses = False

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def prepare(self, model: DualEncoder, options: config.Train) -> None:
        """Take over `model` with its weights; from then on `self.model` embeds for training."""
        self.module = model
        self.description = model.description()
        self.clip_norm = options.optimizer.clip_norm
        set_up(options, self.device)

        if options.activation_checkpointing:
            recompute_activations(self.module)

        # Before the wrapping: hooks for gradients and shards lie around the compiled blocks.
        if compiling.decide(options.compile, self.device):
            compiling.compile_blocks(self.module, options.activation_checkpointing)
        self.wrap(options)
        self.buffers = {f"model/{name}" for name, _ in self.module.named_buffers()}

        # After the wrapping: FSDP2 puts sharded parameters in the place of the whole ones.
        self.optimizer = optim.build(self.module, options.optimizer)
        self.optimizer_options = options.optimizer
        self.counters = optim.trial(options.optimizer).counters

    def wrap(self, options: config.Train) -> None:
        self.module.to(self.device)
        if self.device.type == "cuda":
            channels_last(self.module)

        self.model: Any = self.module
        if dist.world_size() > 1:
            # A sum of two numbers does not depend on their order.
            self.rehearses = dist.world_size() > 2
            joined = accelerator(self.device)
            joined.ddp_handler = ddp_settings(self.module)
            with warnings.catch_warnings():
                # torch 2.15 renames broadcast_buffers; 2.11 knows no other name.
                warnings.simplefilter("ignore", FutureWarning)
                self.model = joined.prepare_model(self.module)

    def micro_batch(self, last: bool) -> AbstractContextManager:
        """Around a forward and its backward. DDP decides already in the forward whether this
        backward will exchange.
        """
        if last or dist.world_size() == 1:
            return nullcontext()
        return self.model.no_sync()

    def backward(self, loss: Tensor) -> None:
        """Add this micro-batch's gradients."""
        loss.backward()

    def update(self, lr: float) -> Tensor:
        """One step of the optimiser at rate `lr`; returns the norm of the averaged gradient before
        clipping.

        Where the norm is not finite, on all ranks alike, neither weights nor the optimiser's state
        move. Fused AdamW looks at `found_inf` on the device, so nothing waits for the answer here;
        for other optimisers the host reads it, before the step.
        """
        norm = self.gradient_norm()

        if self.clip_norm is not None:
            factor = (self.clip_norm / (norm + 1e-6)).clamp(max=1)
            gradients = [local_part(gradient) for gradient in self._gradients()]
            torch._foreach_mul_(gradients, factor)

        optim.set_up_step(self.optimizer, lr)
        if optim.guards_itself(self.optimizer):
            # Read by the fused optimiser on the device; asking here would make the host wait.
            found_inf = (~torch.isfinite(norm)).float()
            self.optimizer.found_inf = found_inf  # type: ignore[attr-defined]  # read by this name
            self.optimizer.step()
        elif torch.isfinite(norm).item():
            self.optimizer.step()

        self.optimizer.zero_grad()
        return norm

    def forget(self) -> None:
        """Drop the gradients of a rehearsal."""
        self.optimizer.zero_grad()
        self.rehearses = False

    def gradient_norm(self) -> Tensor:
        """2-norm of the gradient over all parameters, equal on all ranks."""
        norms = torch._foreach_norm(self._gradients())
        return torch.linalg.vector_norm(torch.stack(norms))

    def _gradients(self) -> list[Tensor]:
        return [p.grad for p in self.module.parameters() if p.grad is not None]

    def tensors(self) -> Named:
        """What a checkpoint holds of the model and of the optimiser."""
        # Without the detached copies that `state_dict` else makes: of sharded tensors they take as
        # long as copying their values.
        for name, value in self.module.state_dict(keep_vars=True).items():
            yield f"model/{name}", value

        for name, parameter in self.module.named_parameters():
            if not parameter.requires_grad:
                continue
            for key, value in optim.named_values(self.optimizer, parameter, self.counters):
                yield f"optimizer/{key}.{name}", value

    def lasts(self, name: str) -> bool:
        """Whether one of `tensors` keeps its values until the next `update`: all but the buffers,
        which a forward pass may move.
        """
        return name not in self.buffers

    def state(self, everywhere: bool = False) -> State:
        """Whole tensors on the CPU, on the first rank or `everywhere`. Collective."""
        return state_of(self.tensors(), keep=everywhere or dist.is_main())

    def load_moments(self, moments: Mapping[str, Tensor]) -> None:
        """Take over the optimiser's part of `state`, at any number of ranks and from any engine."""
        named = dict(self.module.named_parameters())
        moments = read_once(moments)
        optim.restore(self.optimizer, self.optimizer_options, named, moments, part_like)

    def average(self, weights: Mapping[str, Tensor] | None = None) -> nn.Module:
        """A frozen copy of the model as `prepare` got it, or with `weights`, for `follow`; every
        rank calls it together.
        """
        # A copy, because the weights go on changing under it.
        copied = copy.deepcopy(self.module).requires_grad_(False)
        if weights is not None:
            restore(copied, weights, "the checkpoint's moving average")
        return copied.eval()

    def follow(self, average: nn.Module, decay: float, counts: Tensor) -> None:
        """average ← decay · average + (1 − decay) · weights, after an update that counts ([] bool);
        buffers are taken over.
        """
        averaged = [local_part(p.detach()) for p in average.parameters()]
        current = [local_part(p.detach()) for p in self.module.parameters()]

        # A weight of 0 leaves every bit as it is.
        weights = {p.dtype: counts.to(p.dtype) * (1 - decay) for p in averaged}
        torch._foreach_lerp_(averaged, current, [weights[p.dtype] for p in averaged])

        for averaged_buffer, buffer in zip(average.buffers(), self.module.buffers()):
            averaged_buffer.copy_(buffer)

    def evaluation_model(self, average: Any = None) -> DualEncoder:
        """A plain model with the current weights, or with those of an `average`, that each rank may
        call by itself. Collective.
        """
        # Compiled blocks would be compiled again for the shapes of every task.
        return sharing(self.module if average is None else average)


def ddp_settings(model: nn.Module) -> DistributedDataParallelKwargs:
    """How DDP treats buffers and gradients."""
    # Other buffers than statistics are constants, which need not travel before every step.
    has_statistics = bool(batch_norms(model))

    # Gradients live where they are exchanged: 4 bytes a parameter less.
    return DistributedDataParallelKwargs(
        broadcast_buffers=has_statistics, gradient_as_bucket_view=True
    )


def channels_last(model: DualEncoder) -> None:
    """Lay the kernels of a convolutional image tower out as cuDNN multiplies them fastest; pixels
    and activations follow.

    A vision transformer has one convolution, over patches, which gains nothing.
    """
    convolutions = [module for module in model.visual.modules() if isinstance(module, nn.Conv2d)]
    if len(convolutions) > 1:
        model.visual.to(memory_format=torch.channels_last)


def local_part(tensor: Tensor) -> Tensor:
    """This rank's part, sharing memory."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def part_like(whole: Tensor, like: Tensor) -> Tensor:
    """The inverse of `whole`: sharded as `like` is."""
    if isinstance(whole, DTensor) and isinstance(like, DTensor):
        return whole.redistribute(like.device_mesh, like.placements)
    if isinstance(whole, DTensor):
        whole = whole.full_tensor()
    if isinstance(like, DTensor):
        return distribute_tensor(whole.to(like.device), like.device_mesh, like.placements)
    return torch.empty_like(like).copy_(whole)  # in the order of the parameter's memory
