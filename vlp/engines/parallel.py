"""The engines that keep ranks in step: one process, DDP and FSDP2 here, DeepSpeed's ZeRO in
`vlp.engines.zero`.

    engine = parallel.start(config.train)      joins the processes that the launcher started, chooses the device
    engine.prepare(model, config.train)        wraps the model (weights already restored), builds the optimiser
    with engine.micro_batch(last=True):        around a forward and its backward; ranks exchange gradients at the last
        engine.backward(loss)                  one only, where the engine allows it
    engine.update(lr)                          clips, updates, clears; returns the gradient's norm, and updates
                                               nothing where that is not finite
    engine.state() / engine.load_moments(...)  whole tensors by parameter name: the same for every engine and any W
    engine.average() / engine.follow(...)      a moving average of the model (vlp.teacher)

Only `vlp.step` calls backward and update. Every engine averages gradients over ranks.
"""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from vlp import config, dist, optim
from vlp.engines.precision import faster
from vlp.models.dual_encoder import DualEncoder

MOMENTS = ("exp_avg", "exp_avg_sq")  # AdamW's state of a parameter, besides "step"
DTYPES = {"bf16": torch.bfloat16, "float32": torch.float32}
State = tuple[dict[str, Tensor], dict[str, Tensor]]  # (model, optimiser)


class LaunchError(RuntimeError):
    """The processes, device or engine obtained are not the ones asked for."""


class Engine(Protocol):
    """What the step and the loop rely on."""

    device: torch.device
    model: nn.Module  # embeds for training; the plain module underneath must not be called for that
    description: dict[str, Any]  # DualEncoder.description() of the model

    def prepare(self, model: DualEncoder, options: config.Train) -> None: ...
    def micro_batch(self, last: bool) -> AbstractContextManager: ...
    def backward(self, loss: Tensor) -> None: ...
    def update(self, lr: float) -> Tensor: ...
    def state(self, everywhere: bool = False) -> State: ...
    def load_moments(self, moments: Mapping[str, Tensor]) -> None: ...
    def average(self, weights: Mapping[str, Tensor] | None = None) -> nn.Module: ...
    def follow(self, average: nn.Module, decay: float) -> None: ...
    def whole(self, average: nn.Module) -> dict[str, Tensor]: ...
    def evaluation_model(self) -> DualEncoder: ...


class Replicated:
    """DDP through Accelerate, or one process: every rank holds the whole model."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def prepare(self, model: DualEncoder, options: config.Train) -> None:
        """Take over `model` with its weights; afterwards call `self.model` to embed for training."""
        self.module = model.to(self.device)
        self.description = model.description()
        self.clip_norm = options.optimizer.clip_norm
        if options.activation_checkpointing:
            self.module.set_activation_checkpointing(True)
        self.wrap(options)
        self.optimizer = optim.build(self.module, options.optimizer)

    def wrap(self, options: config.Train) -> None:
        self.model: nn.Module = torch.compile(self.module) if options.compile else self.module
        if dist.world_size() > 1:
            self.model = accelerator(self.device).prepare_model(self.model)

    def micro_batch(self, last: bool) -> AbstractContextManager:
        """Around a forward and its backward. DDP decides already in the forward whether this
        backward will exchange.
        """
        return nullcontext() if last or dist.world_size() == 1 else self.model.no_sync()

    def backward(self, loss: Tensor) -> None:
        """Add this micro-batch's gradients."""
        loss.backward()

    def update(self, lr: float) -> Tensor:
        """One AdamW step at rate `lr`; returns the norm of the averaged gradient before clipping.

        Where the norm is not finite, on all ranks alike, neither weights nor moments move: the
        fused optimiser looks at `found_inf` on the device, so nothing waits for the answer here.
        """
        norm = self.gradient_norm()
        self.optimizer.found_inf = (~torch.isfinite(norm)).float()
        if self.clip_norm is not None:
            factor = (self.clip_norm / (norm + 1e-6)).clamp(max=1)
            torch._foreach_mul_([_local(p.grad) for p in self._trained()], factor)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.step()
        self.optimizer.zero_grad()
        return norm

    def gradient_norm(self) -> Tensor:
        """2-norm of the gradient over all parameters, equal on all ranks."""
        return torch.linalg.vector_norm(
            torch.stack(torch._foreach_norm([p.grad for p in self._trained()]))
        )

    def _trained(self) -> list[nn.Parameter]:
        return [p for p in self.module.parameters() if p.grad is not None]

    def state(self, everywhere: bool = False) -> State:
        """Whole tensors on the CPU, on the first rank or `everywhere`. Collective."""
        keep = everywhere or dist.is_main()
        model = _whole_state(self.module, keep)
        moments = {
            f"{key}.{name}": whole
            for name, parameter in self.module.named_parameters()
            if parameter in self.optimizer.state
            for key, value in self.optimizer.state[parameter].items()
            if (whole := _whole(value, keep)) is not None
        }
        return model, moments

    def load_moments(self, moments: Mapping[str, Tensor]) -> None:
        """Take over the optimiser's part of `state`, at any number of ranks and from any engine."""
        for name, parameter in self.module.named_parameters():
            if f"step.{name}" in moments:
                parts = {
                    key: _part(moments[f"{key}.{name}"].to(self.device), parameter)
                    for key in MOMENTS
                }
                self.optimizer.state[parameter] = {
                    "step": moments[f"step.{name}"].to(self.device, copy=True),
                    **parts,
                }

    def average(self, weights: Mapping[str, Tensor] | None = None) -> nn.Module:
        """A frozen copy of the model as `prepare` got it, or with `weights`, for `follow`; every
        rank calls it together.
        """
        copied = copy.deepcopy(self.module).requires_grad_(False)
        if weights is not None:
            copied.load_state_dict(dict(weights))
        return copied.eval()

    def follow(self, average: nn.Module, decay: float) -> None:
        """average ← decay · average + (1 − decay) · weights, after an update; buffers are taken
        over.
        """
        own, new = (
            [_local(p.detach()) for p in module.parameters()] for module in (average, self.module)
        )
        torch._foreach_lerp_(own, new, 1 - decay)
        for mine, its in zip(average.buffers(), self.module.buffers()):
            mine.copy_(its)

    def whole(self, average: nn.Module) -> dict[str, Tensor]:
        """State of what `average` returned, as whole tensors on the CPU of the first rank.
        Collective.
        """
        return _whole_state(average, dist.is_main())

    def evaluation_model(self) -> DualEncoder:
        """A plain model with the current weights that each rank may call by itself. Collective."""
        return self.module


class Sharded(Replicated):
    """FSDP2: parameters, gradients and moments sharded over all ranks, block by block (torch's
    fully_shard).
    """

    def wrap(self, options: config.Train) -> None:
        self.plain = copy.deepcopy(self.module).cpu()
        self.mesh = torch.distributed.init_device_mesh(self.device.type, (dist.world_size(),))
        self.model = self.shard(self.module)
        if options.compile:
            self.model.compile()

    def shard(self, module: DualEncoder, **options: Any) -> nn.Module:
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
        own = torch.stack([_local(p.grad).square().sum() for p in self._trained()]).sum()
        return dist.all_reduce(own, dist.world()).sqrt()

    def evaluation_model(self) -> DualEncoder:
        self.plain.load_state_dict(self.state(everywhere=True)[0])
        return copy.deepcopy(self.plain).to(self.device).eval()


def start(options: config.Train) -> Engine:
    """Join the process group, choose the device and return the engine asked for.

    LaunchError where what was obtained is not what was asked for: launchers fall back to one
    process, and libraries to plain DDP, without a word.
    """
    launched = launched_processes()
    device = _device(options.device)
    launcher = _launched_engine()
    name = launcher if options.engine == "auto" else options.engine
    if launcher not in ("ddp", name):  # its libraries would wrap the model in their own way
        raise LaunchError(
            f"train.engine is {name}, but accelerate launch was configured for {launcher}; leave train.engine out, or launch "
            f"with launch/accelerate/{name}.yaml (on a CPU cpu2.yaml, which takes any engine)"
        )
    if name.startswith("zero") and device.type == "cpu":
        os.environ["DS_ACCELERATOR"] = "cpu"  # read when deepspeed is first imported
    if launched > 1 and not dist.initialised():
        gpu = device.type == "cuda"
        torch.distributed.init_process_group(
            "nccl" if gpu else "gloo", device_id=device if gpu else None
        )
    if dist.world_size() != launched:
        raise LaunchError(
            f"the launcher announced {launched} processes, but {dist.world_size()} joined"
        )
    if name == "ddp":
        return Replicated(device)
    if launched == 1:
        raise LaunchError(
            f"train.engine is {name}, but there is one process; start with accelerate launch, or set engine: ddp"
        )
    if name == "fsdp2":
        return Sharded(device)
    from vlp.engines.zero import ZeRO

    return ZeRO(device, stage=int(name[-1]))


def launched_processes() -> int:
    """How many processes the launcher has started, by its environment; LaunchError where that does
    not hold together.
    """
    said = os.environ.get("WORLD_SIZE")
    if said is None:
        _refuse_single(os.environ)
        return 1
    if not said.isdecimal() or int(said) < 1:
        raise LaunchError(
            f"WORLD_SIZE is {said!r}, expected a number of processes; unset it, or start with torchrun"
        )
    missing = [
        name
        for name in ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
        if name not in os.environ
    ]
    if int(said) > 1 and missing:
        raise LaunchError(
            f"WORLD_SIZE announces {said} processes, but {', '.join(missing)} is not set; start with torchrun "
            f"--nproc-per-node {said} launch/train.py … or accelerate launch, or unset WORLD_SIZE for one process"
        )
    return int(said)


def _refuse_single(environment: Mapping[str, str]) -> None:
    """LaunchError where several processes were asked for, but each would be a run of its own."""
    if {
        "ACCELERATE_MIXED_PRECISION",
        "MASTER_ADDR",
    } <= environment.keys():  # its launcher of one process, asked for more
        raise LaunchError(
            "accelerate was asked for several processes and started one, as it does with --cpu; start two on a CPU with "
            "accelerate launch --config_file launch/accelerate/cpu2.yaml launch/train.py CONFIG, or with "
            "torchrun --nproc-per-node 2 launch/train.py CONFIG"
        )
    for name in ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE"):
        if int(environment.get(name, "1")) > 1:
            raise LaunchError(
                f"{name} is {environment[name]}: srun or mpirun started several processes that do not know of one another; "
                "let one task a node start torchrun or accelerate launch, as launch/slurm/train.sbatch does"
            )


def accelerator(device: torch.device, deepspeed_plugin: Any = None) -> Any:
    """Accelerate's view of the processes joined in `start`, held to be the one that was meant."""
    from accelerate import Accelerator, PartialState

    on_cpu = device.type == "cpu"
    PartialState(cpu=on_cpu)
    made = (
        Accelerator(deepspeed_plugin=deepspeed_plugin)
        if deepspeed_plugin
        else Accelerator(cpu=on_cpu)
    )
    if made.device.type != device.type:
        raise LaunchError(
            f"Accelerate chose {made.device}, but training runs on {device}; set train.device"
        )
    return made


def precision(options: config.Train, device: torch.device) -> torch.dtype:
    """The dtype of the towers' arithmetic; parameters, scale, bias and the loss stay float32."""
    if options.precision == "auto":
        return DTYPES[faster(device.type)]
    return DTYPES[options.precision]


def _device(name: str) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cpu":
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise LaunchError(
            "train.device is cuda, but torch sees no CUDA device; use device: auto or cpu"
        )
    device = torch.device("cuda", dist.local_rank())
    torch.cuda.set_device(device)
    return device


def _launched_engine() -> str:
    """What `accelerate launch` was configured for, from the environment that it sets."""
    if os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true":
        file = os.environ.get("ACCELERATE_DEEPSPEED_CONFIG_FILE")
        if file:
            return f"zero{json.loads(Path(file).read_text())['zero_optimization']['stage']}"
        return f"zero{os.environ['ACCELERATE_DEEPSPEED_ZERO_STAGE']}"
    return "fsdp2" if os.environ.get("ACCELERATE_USE_FSDP") == "true" else "ddp"


def _local(tensor: Tensor) -> Tensor:
    """This rank's part, sharing memory."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _whole(tensor: Tensor, keep: bool) -> Tensor | None:
    """A CPU copy of all ranks' parts, or None where it is not kept; every rank must call it for a
    sharded tensor.
    """
    whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
    return whole.detach().cpu().clone() if keep else None


def _whole_state(module: nn.Module, keep: bool) -> dict[str, Tensor]:
    return {
        name: whole
        for name, value in module.state_dict().items()
        if (whole := _whole(value, keep)) is not None
    }


def _part(whole: Tensor, like: Tensor) -> Tensor:
    """The inverse of `_whole`: sharded as `like` is."""
    return (
        distribute_tensor(whole, like.device_mesh, like.placements)
        if isinstance(like, DTensor)
        else whole.clone()
    )
