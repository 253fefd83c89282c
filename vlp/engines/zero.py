"""DeepSpeed's ZeRO as an engine of `vlp.engines.parallel`: stage 1 shards moments, 2 also
gradients, 3 also parameters.

DeepSpeed is prepared by Accelerate and then driven directly: Accelerate's `backward` would update
inside it, before a non-finite gradient can be refused, and its idea of rank and process count is
wrong on CPU.
"""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from importlib.resources import files
from pathlib import Path

import torch
from torch import Tensor, nn

from vlp import config, dist, optim
from vlp.engines.parallel import MOMENTS, LaunchError, State, accelerator, precision
from vlp.models.dual_encoder import DualEncoder


class ZeRO:
    """DeepSpeed through Accelerate, float32 master weights; bf16 by DeepSpeed's torch_autocast."""

    def __init__(self, device: torch.device, stage: int) -> None:
        self.device, self.stage = device, stage

    def prepare(self, model: DualEncoder, options: config.Train) -> None:
        from accelerate.utils import DeepSpeedPlugin

        if options.compile:
            raise ValueError(
                "train.compile does not work with DeepSpeed; set compile: false, or engine: ddp or fsdp2"
            )
        self.plain, self.description = copy.deepcopy(model), model.description()
        if options.activation_checkpointing:
            model.set_activation_checkpointing(True)
        self.names = {id(p): name for name, p in model.named_parameters()}
        # Accelerate refuses settings given in code beside the launcher's; `settings` has already
        # joined the two.
        os.environ.pop("ACCELERATE_CONFIG_DS_FIELDS", None)
        plugin = DeepSpeedPlugin(hf_ds_config=settings(self.stage, options, self.device))
        self.model, _ = accelerator(self.device, plugin).prepare(
            model, optim.build(model, options.optimizer)
        )
        self.module = self.model.module
        self.zero = self.model.optimizer  # DeepSpeed's optimiser over flat float32 shards
        if self.model.zero_optimization_stage() != self.stage:
            raise LaunchError(
                f"asked for ZeRO stage {self.stage}, obtained {self.model.zero_optimization_stage()}"
            )
        # DeepSpeed links parameters to AdamW's state in the middle of the first step, when only the
        # first group's exists.
        shards = (
            self.zero.fp32_partitioned_groups_flat
            if self.stage == 3
            else self.zero.single_partition_of_fp32_groups
        )
        for shard in shards:
            zeros = {key: torch.zeros_like(shard) for key in MOMENTS}
            self.zero.optimizer.state[shard] = {
                "step": torch.zeros((), device=shard.device),
                **zeros,
            }
        if self.stage < 3:
            self.zero._lazy_init_hp_params_optimizer_state()

    def micro_batch(self, last: bool) -> AbstractContextManager:
        """Around a forward and its backward. Stage 1 reduces at the last one; 2 and 3 keep shards,
        so they always do.
        """
        self.model.set_gradient_accumulation_boundary(last)
        return nullcontext()

    def backward(self, loss: Tensor) -> None:
        """Add this micro-batch's gradients."""
        self.model.backward(loss, scale_wrt_gas=False)

    def update(self, lr: float) -> Tensor:
        """Clip (in DeepSpeed, by its settings), step, clear; returns the gradient's norm before
        clipping.

        DeepSpeed leaves a step with non-finite gradients out by itself, on all ranks alike.
        """
        for group in self.zero.param_groups:
            group["lr"] = lr
        self.model.step()
        if self.zero.overflow:
            return torch.tensor(torch.inf)
        return torch.as_tensor(self.model.get_global_grad_norm())

    def state(self, everywhere: bool = False) -> State:
        """Whole tensors on the CPU, on the first rank or `everywhere`. Collective."""
        from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

        keep = everywhere or dist.is_main()
        step = next(iter(self.zero.optimizer.state.values()))["step"]
        model = {
            name: value.detach().cpu().clone()
            for name, value in self.module.named_buffers()
            if self._is_saved(name)
        }
        moments: dict[str, Tensor] = {}
        for parameter in self.module.parameters():
            name = self.names[id(parameter)]
            if not parameter.requires_grad:
                model[name] = self._frozen(parameter)
                continue
            whole = {"": safe_get_full_fp32_param(parameter)}
            whole |= {key: safe_get_full_optimizer_state(parameter, key) for key in MOMENTS}
            if keep:
                model[name] = whole.pop("").detach().cpu().clone()
                moments |= {
                    f"{key}.{name}": value.detach().cpu().clone() for key, value in whole.items()
                }
                moments[f"step.{name}"] = step.detach().cpu().clone()
        return (model, moments) if keep else ({}, {})

    def _is_saved(self, buffer: str) -> bool:
        return buffer in self.plain.state_dict()

    def _frozen(self, parameter: nn.Parameter) -> Tensor:
        from deepspeed.runtime.zero import GatheredParameters

        with GatheredParameters([parameter], enabled=self.stage == 3):
            return parameter.detach().cpu().clone()

    def load_moments(self, moments: Mapping[str, Tensor]) -> None:
        """Take over the optimiser's part of `state`, at any number of ranks and from any engine."""
        if not moments:
            return
        step = next(value for name, value in moments.items() if name.startswith("step."))
        for state in self.zero.optimizer.state.values():
            state["step"].copy_(step)
        for parameter in self.module.parameters():
            for key in MOMENTS if parameter.requires_grad else ():
                self._scatter(
                    parameter, moments[f"{key}.{self.names[id(parameter)]}"].to(self.device), key
                )

    def _scatter(self, parameter: nn.Parameter, value: Tensor, key: str) -> None:
        from deepspeed.utils import safe_set_full_optimizer_state

        if self.stage < 3:
            safe_set_full_optimizer_state(parameter, value, key)
            return
        # Stage 3 pads parameters that the ranks do not divide, and DeepSpeed's setter does not know
        # its own padding.
        shard, _ = self.zero._get_fp32_opt_state_partition(
            parameter, release_swap_buffers=False, optim_state_key=key
        )
        padded = torch.cat(
            [value.flatten(), value.new_zeros(shard.numel() * dist.world_size() - value.numel())]
        )
        shard.data.copy_(padded[dist.rank() * shard.numel() :][: shard.numel()])

    def average(self, weights: Mapping[str, Tensor] | None = None) -> nn.Module:
        """A frozen copy of the model as `prepare` got it, or with `weights`, whole on every rank at
        every stage.
        """
        copied = copy.deepcopy(self.plain).requires_grad_(False)
        if weights is not None:
            copied.load_state_dict(dict(weights))
        return copied.to(self.device).eval()

    def follow(self, average: nn.Module, decay: float) -> None:
        """average ← decay · average + (1 − decay) · weights, after an update; buffers are taken
        over. Collective.
        """
        from deepspeed.runtime.zero import GatheredParameters

        for own, new in zip(average.parameters(), self.module.parameters()):
            with GatheredParameters([new], enabled=self.stage == 3):
                own.lerp_(new.detach().to(own.dtype), 1 - decay)
        for mine, its in zip(average.buffers(), self.module.buffers()):
            mine.copy_(its)

    def whole(self, average: nn.Module) -> dict[str, Tensor]:
        """State of what `average` returned, on the CPU of the first rank."""
        return (
            {name: value.cpu().clone() for name, value in average.state_dict().items()}
            if dist.is_main()
            else {}
        )

    def evaluation_model(self) -> DualEncoder:
        """A plain model with the current weights that each rank may call by itself. Collective."""
        self.plain.load_state_dict(self.state(everywhere=True)[0])
        return copy.deepcopy(self.plain).to(self.device).eval()


def settings(stage: int, options: config.Train, device: torch.device) -> dict:
    """DeepSpeed's configuration: the launcher's deepspeed_config_file, else
    launch/deepspeed/zero<stage>.json, with what this run's configuration decides.
    """
    given = os.environ.get("ACCELERATE_DEEPSPEED_CONFIG_FILE")
    file = Path(given) if given else files("vlp.launch") / "deepspeed" / f"zero{stage}.json"
    base = json.loads(file.read_text(encoding="utf-8"))
    return base | {
        "train_micro_batch_size_per_gpu": options.batch
        // dist.world_size()
        // options.micro_batches,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": options.optimizer.clip_norm
        or 0.0,  # DeepSpeed's own default would clip at 1
        "torch_autocast": {
            "enabled": precision(options, device) == torch.bfloat16,
            "dtype": "bfloat16",
        },
    }
