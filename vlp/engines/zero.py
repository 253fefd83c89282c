"""DeepSpeed's ZeRO as an engine (vlp.engines.base): stage 1 shards moments, 2 also
gradients, 3 also parameters.

DeepSpeed is prepared by Accelerate and then driven directly: Accelerate's `backward` would update
inside it, before a non-finite gradient can be refused, and its idea of rank and process count is
wrong on CPU.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from importlib.resources import files
from importlib.resources.abc import Traversable
from pathlib import Path

import torch
from torch import Tensor, nn

from vlp import config, dist, optim
from vlp.engines.base import Named, State, gathered, state_of
from vlp.engines.copies import filled, skeleton
from vlp.engines.own_rows import elements_of
from vlp.engines.precision import compute_dtype, set_up
from vlp.engines.processes import accelerator
from vlp.joining import LaunchError
from vlp.models.dual_encoder import DualEncoder
from vlp.models.recomputing import recompute_activations
from vlp.pretrained.read_once import read_once


class ZeRO:
    """DeepSpeed through Accelerate, float32 master weights; bf16 by DeepSpeed's torch_autocast,
    whatever the ranks exchange in float32.
    """

    rehearses = False

    def __init__(self, device: torch.device, stage: int) -> None:
        self.device, self.stage = device, stage

    def prepare(self, model: DualEncoder, options: config.Train) -> None:
        from accelerate.utils import DeepSpeedPlugin

        if options.compile is True:
            raise ValueError(
                "train.compile does not work with DeepSpeed; "
                "leave it out, or set engine: ddp or fsdp2"
            )

        set_up(options, self.device)

        # DeepSpeed changes the model in place; evaluation and averages need an untouched one.
        self.skeleton, self.description = skeleton(model), model.description()
        if options.activation_checkpointing:
            recompute_activations(model)
        self.names = {id(p): name for name, p in model.named_parameters()}

        # Each part of other length would gather the tower's weights again.
        if self.stage == 3:
            model.text_parts = 1

        # Accelerate refuses settings given in code beside the launcher's; `settings` has already
        # joined the two.
        os.environ.pop("ACCELERATE_CONFIG_DS_FIELDS", None)
        plugin = DeepSpeedPlugin(hf_ds_config=settings(self.stage, options, self.device))
        optimizer = optim.build(model, options.optimizer)
        self.model, _ = accelerator(self.device, plugin).prepare(model, optimizer)
        self.module = self.model.module
        self.zero = self.model.optimizer  # DeepSpeed's optimiser over flat float32 shards

        obtained = self.model.zero_optimization_stage()
        if obtained != self.stage:
            raise LaunchError(f"asked for ZeRO stage {self.stage}, obtained {obtained}")
        self._create_moments(options.optimizer)

    def _create_moments(self, options: config.Optimizer) -> None:
        """Give every shard its state of the optimiser before the first step.

        DeepSpeed links parameters to that state in the middle of the first step, when only the
        first group's exists.
        """
        if self.stage == 3:
            shards = self.zero.fp32_partitioned_groups_flat
        else:
            shards = self.zero.single_partition_of_fp32_groups
        group = {"params": list(shards), "weight_decay": 0.0, "lr_factor": 1.0}
        self.zero.optimizer.state.clear()  # Adagrad has made one of parameters that are no more
        self.zero.optimizer.state.update(optim.initial_states([group], options))

        # What is cut like the parameters; the rest are numbers, the same for all of them.
        state = self.zero.optimizer.state[shards[0]]
        self.moments = [
            key
            for key, value in state.items()
            if isinstance(value, Tensor) and value.shape == shards[0].shape
        ]
        self.numbers = [key for key in state if key not in self.moments]

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

        DeepSpeed leaves a step with non-finite gradients out by itself, on all ranks alike. It asks
        the device for that in every step: under this engine alone the host waits in mid-step.
        """
        optim.set_up_step(self.zero, lr)
        self.model.step()

        # A step that was left out has no norm.
        if self.zero.overflow:
            return torch.tensor(torch.inf)
        return torch.as_tensor(self.model.get_global_grad_norm())

    def tensors(self) -> Named:
        """What a checkpoint holds of the model and of the optimiser, each made whole in its turn.
        Collective.
        """
        from deepspeed.utils import safe_get_full_optimizer_state

        for name, value in self._weights():
            yield f"model/{name}", value

        for parameter in self.module.parameters():
            if not parameter.requires_grad:
                continue
            name = self.names[id(parameter)]
            for key, value in self._numbers().items():
                yield f"optimizer/{key}.{name}", value
            for key in self.moments:
                whole = safe_get_full_optimizer_state(parameter, key)
                yield f"optimizer/{key}.{name}", whole

    def lasts(self, name: str) -> bool:
        """Whether one of `tensors` may be read until the next `update`: none, since most are made
        for the caller, and all of them together would be the whole state.
        """
        return False

    def forget(self) -> None:
        """Drop the gradients of a rehearsal, which this engine needs none of."""
        self.zero.zero_grad()

    def state(self, everywhere: bool = False) -> State:
        """Whole tensors on the CPU, on the first rank or `everywhere`. Collective."""
        return state_of(self.tensors(), keep=everywhere or dist.is_main())

    def _numbers(self) -> dict[str, Tensor]:
        """What the optimiser counts, the same for all parameters."""
        shard = next(iter(self.zero.optimizer.state))
        values = dict(optim.named_values(self.zero.optimizer, shard))
        return {key: values[key] for key in self.numbers}

    def _weights(self) -> Named:
        """Name and whole float32 values of every parameter and buffer. Collective."""
        from deepspeed.utils import safe_get_full_fp32_param

        saved = self.skeleton.state_dict().keys()
        for name, value in self.module.named_buffers():
            if name in saved:
                yield name, value

        for parameter in self.module.parameters():
            # DeepSpeed keeps no float32 copy of what is not trained.
            if parameter.requires_grad:
                whole = safe_get_full_fp32_param(parameter)
            else:
                whole = self._frozen(parameter)
            yield self.names[id(parameter)], whole

    def _frozen(self, parameter: nn.Parameter) -> Tensor:
        """A whole copy of a parameter that is not trained. Collective at stage 3."""
        from deepspeed.runtime.zero import GatheredParameters

        with GatheredParameters([parameter], enabled=self.stage == 3):
            return parameter.detach().clone()

    def load_moments(self, moments: Mapping[str, Tensor]) -> None:
        """Take over the optimiser's part of `state`, at any number of ranks and from any engine; a
        parameter that has none there starts anew, but for what is counted for all of them.
        """
        trained = {
            self.names[id(parameter)]: parameter
            for parameter in self.module.parameters()
            if parameter.requires_grad
        }
        # DeepSpeed takes its part of whole moments, but at stage 3.
        if self.stage < 3:
            moments = read_once(moments)

        numbers: dict[str, Tensor] = {}
        for name, full_names in optim.by_parameter(moments).items():
            if name not in trained:
                continue
            for key in self.moments:
                full_name = optim.saved_value(full_names, key, name)
                self._scatter(trained[name], moments, full_name, key)

            # Numbers are the same for all parameters: those of the last one.
            names = {key: optim.saved_value(full_names, key, name) for key in self.numbers}
            numbers = {key: moments[full_name] for key, full_name in names.items()}

        # A parameter that has none, since it was locked before, starts anew as it is.
        for state in self.zero.optimizer.state.values():
            for key, value in numbers.items():
                if isinstance(state[key], Tensor):
                    state[key].copy_(value)  # of its own: every group counts in place
                else:
                    state[key] = type(state[key])(value.item())

    def _scatter(
        self, parameter: nn.Parameter, moments: Mapping[str, Tensor], full_name: str, key: str
    ) -> None:
        """Put this rank's part of a stored moment where DeepSpeed keeps it."""
        from deepspeed.utils import safe_set_full_optimizer_state

        if self.stage < 3:
            safe_set_full_optimizer_state(parameter, moments[full_name].to(self.device), key)
            return

        # Stage 3 pads parameters that the ranks do not divide, and DeepSpeed's setter does not know
        # its own padding.
        shard, _ = self.zero._get_fp32_opt_state_partition(
            parameter, release_swap_buffers=False, optim_state_key=key
        )
        start = dist.rank() * shard.numel()
        own = elements_of(moments, full_name, start, start + shard.numel())
        shard.data.zero_()
        shard.data[: len(own)].copy_(own)

    def average(self, weights: Mapping[str, Tensor] | None = None) -> nn.Module:
        """A frozen copy of the model as `prepare` got it, or with `weights`, whole on every rank at
        every stage.
        """
        # Whole at every stage: an average is read by the step, and never trained.
        whole = gathered(self._weights()) if weights is None else weights
        return filled(self.skeleton, whole, self.device)

    def follow(self, average: nn.Module, decay: float, counts: Tensor) -> None:
        """average ← decay · average + (1 − decay) · weights, after an update that counts ([] bool);
        buffers are taken over. Collective.
        """
        from deepspeed.runtime.zero import GatheredParameters

        for averaged, current in zip(average.parameters(), self.module.parameters()):
            with GatheredParameters([current], enabled=self.stage == 3):
                weight = counts.to(averaged.dtype) * (1 - decay)
                averaged.lerp_(current.detach().to(averaged.dtype), weight)

        for averaged_buffer, buffer in zip(average.buffers(), self.module.buffers()):
            averaged_buffer.copy_(buffer)

    def evaluation_model(self, average: nn.Module | None = None) -> DualEncoder:
        """A plain model with the current weights, or with those of an `average`, that each rank may
        call by itself. Collective.
        """
        if isinstance(average, DualEncoder):
            return average  # whole on every rank already
        return filled(self.skeleton, gathered(self._weights()), self.device)


def settings(stage: int, options: config.Train, device: torch.device) -> dict:
    """DeepSpeed's configuration: the launcher's deepspeed_config_file, else
    launch/deepspeed/zero<stage>.json, with what this run's configuration decides.
    """
    launcher_file = os.environ.get("ACCELERATE_DEEPSPEED_CONFIG_FILE")
    file: Path | Traversable
    if launcher_file:
        file = Path(launcher_file)
    else:
        file = files("vlp.launch") / "deepspeed" / f"zero{stage}.json"
    base = json.loads(file.read_text(encoding="utf-8"))

    rows = options.batch // dist.world_size() // options.micro_batches
    clip_norm = options.optimizer.clip_norm or 0.0  # DeepSpeed's own default would clip at 1
    in_bf16 = compute_dtype(options, device) == torch.bfloat16

    # DeepSpeed would add up the gradients of linear layers and convolutions in bf16, which its own
    # list of modules decides; a file of the user's may name it.
    autocast = {"lower_precision_safe_modules": []} | base.get("torch_autocast", {})
    autocast |= {"enabled": in_bf16, "dtype": "bfloat16"}
    return base | {
        "train_micro_batch_size_per_gpu": rows,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": clip_norm,
        "torch_autocast": autocast,
    }
