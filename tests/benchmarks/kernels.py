"""What the Triton kernels cost a GPU, without one: they are compiled ahead of time and counted.

    python tests/benchmarks/kernels.py --dim 512 1280
    python tests/benchmarks/kernels.py --capability 80 89 90 --json kernels.json

Registers, spilled bytes and shared memory are ptxas's; blocks an SM is how many programs these let
run on one multiprocessor at once. Instructions are of SASS, a warp and tile: those of the main
loop, which holds the tensor cores' products, and all others, counted along the shortest way through
the control flow from one main loop to the next, or from entry to exit where a program computes one
tile. The shortest way passes by the branches that few tiles take, those for pairs and ends.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))

from tests.benchmarks import report, sass

# Shared memory of a multiprocessor and resident threads, by compute capability.
MULTIPROCESSOR = {80: (164, 2048), 86: (100, 1536), 89: (100, 1536), 90: (228, 2048)}
REGISTERS = 65536
RESERVED = 1024  # bytes of shared memory that the system takes of each program


@dataclass(frozen=True)
class Variant:
    """One kernel as one reduction needs it."""

    label: str
    kernel: str
    multiples: int = 1
    columns: bool = True
    masked: bool = False
    limited: bool = True  # takes the launch options for two programs a multiprocessor
    counted: bool = True  # spends its time on tiles


VARIANTS = (
    Variant("margin forward", "logsumexp_kernel"),
    Variant("margin backward", "logsumexp_weights_kernel"),
    Variant("masked rows forward", "logsumexp_kernel", columns=False, masked=True),
    Variant("masked rows backward", "logsumexp_weights_kernel", columns=False, masked=True),
    Variant("two multiples backward", "logsumexp_weights_kernel", multiples=2),
    Variant("softplus forward", "softplus_kernel"),
    Variant("softplus backward", "softplus_weights_kernel"),
    Variant("margin careful", "careful_kernel", limited=False, counted=False),
    Variant("pairs", "pairs_kernel", limited=False, counted=False),
    Variant("merge", "merge_kernel", limited=False, counted=False),
    Variant("weights", "weights_kernel", limited=False, counted=False),
    Variant("gradients", "gradients_kernel", limited=False, counted=False),
)
DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dim", type=int, nargs="+", default=[512, 768, 1024, 1280])
    parser.add_argument("--dtype", nargs="+", default=["bf16"], choices=DTYPES)
    parser.add_argument("--capability", type=int, nargs="+", default=[90])
    parser.add_argument("--section", default="kernels", help="of docs/results.md, with --publish")
    report.add_arguments(parser)
    args = parser.parse_args()

    warnings.simplefilter("ignore")
    rows = []
    for capability in args.capability:
        for dtype in args.dtype:
            for D in args.dim:
                rows += [measure(variant, D, dtype, capability) for variant in VARIANTS]

    notes = (
        "Compiled, not run. Instructions a warp and tile; others: on the shortest way from one "
        "main loop to the next."
    )
    report.publish(args.section, "Triton kernels, compiled ahead of time", rows, args, notes)


def measure(variant: Variant, D: int, dtype: str, capability: int = 90) -> dict[str, Any]:
    """One line of the table."""
    compiled = compile_ahead(variant, D, dtype, capability)
    registers, spilled = resources(compiled)
    shared, n_warps = compiled.metadata.shared, compiled.metadata.num_warps

    # Older cards' loops are unrolled, so that no one main loop could be told apart.
    loop = others = None
    if variant.counted and dtype != "fp32" and capability >= 90:
        depth = constants(variant, D, dtype, capability)["BK"]
        a_step, others = sass.instructions(disassembled(compiled))
        loop = a_step * -(-D // depth)
    return {
        "sm": capability,
        "kernel": variant.label,
        "dtype": dtype,
        "D": D,
        "registers": registers,
        "spilled B": spilled,
        "shared KiB": shared / 1024,
        "blocks an SM": blocks(registers, shared, n_warps, capability),
        "main loop": loop,
        "others": others,
    }


def compile_ahead(variant: Variant, D: int, dtype: str, capability: int = 90) -> Any:
    """The compiled kernel, for a GPU generation without one at hand."""
    import torch
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from vlp.pairwise import launches

    kernel, values = _kernel(variant), constants(variant, D, dtype, capability)
    fixed = {name: value for name, value in values.items() if name in kernel.arg_names}
    signature = {}
    for name in kernel.arg_names:
        signature[name] = "constexpr" if name in fixed else _type(name, variant, values, dtype)

    # Tensors of torch are aligned; without the hint loads would be too narrow to pipeline.
    aligned = {}
    for i, name in enumerate(kernel.arg_names):
        if signature[name].startswith("*"):
            aligned[(i,)] = [["tt.divisibility", 16]]

    tile = launches.tile_of(getattr(torch, DTYPES[dtype]), D)
    options = {name: tile[name] for name in ("num_warps", "num_stages")}
    if variant.limited:
        both_sided_mask = variant.masked and variant.columns
        options |= launches.options_of(
            getattr(torch, DTYPES[dtype]), capability, variant.multiples, both_sided_mask
        )
    source = ASTSource(kernel, signature, fixed, aligned)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


def constants(variant: Variant, D: int, dtype: str, capability: int) -> dict[str, Any]:
    """The kernel's compile-time arguments."""
    import torch

    from vlp.pairwise import launches, vectors

    kind = getattr(torch, DTYPES[dtype])
    tile = launches.tile_of(kind, D)
    # Vectors' kernels take D as deep as they like: no product is theirs.
    sizes = {name: tile[name] for name in ("BM", "BN", "BK")}
    if hasattr(vectors, variant.kernel):
        sizes["BK"] = vectors.DEPTH
    return {
        "K": variant.multiples,
        "COLUMNS": variant.columns,
        "MASKED": variant.masked,
        "DESCRIPTORS": launches.takes_descriptors(capability),
        "SPAN": launches.SPAN,
        "BIASED": variant.kernel == "pairs_kernel",
        "PARTS": vectors.PARTS,
        "LINES": vectors.MANY_LINES if variant.kernel == "weights_kernel" else vectors.LINES,
        "D": D,
        **sizes,
    }


DOUBLE = {
    "by_row", "by_column", "positive", "largest", "upstream", "row_upstream", "column_upstream",
    "row_logsumexp", "column_logsumexp",
}  # fmt: skip
OUTPUTS = {"dx_out", "dt_out"}


def _type(name: str, variant: Variant, values: dict[str, Any], dtype: str) -> str:
    """Triton's word for the type of a kernel's argument."""
    from vlp.pairwise.kernels import SIZES
    from vlp.pairwise.vector_kernels import MERGED

    if name in SIZES or name in MERGED or name == "k":
        return "i32"
    if name == "multiple":
        return "fp32"
    if name in DOUBLE or (variant.kernel, name) == ("gradients_kernel", "products"):
        return "*fp64"
    if name == "dz_out":
        return f"tensordesc<{dtype}[{values['BM']},{values['BN']}]>"
    if name not in {"x", "t"} | OUTPUTS:
        return "*fp32"

    tiled = name in ("x", "t") and "DESCRIPTORS" in _kernel(variant).arg_names
    if not (tiled and values["DESCRIPTORS"]):
        return f"*{dtype}"
    n_rows = values["BM"] if name == "x" else values["BN"]
    return f"tensordesc<{dtype}[{n_rows},{values['BK']}]>"


def _kernel(variant: Variant) -> Any:
    from vlp.pairwise import launches, vectors

    return getattr(vectors if hasattr(vectors, variant.kernel) else launches, variant.kernel)


def resources(compiled: Any) -> tuple[int, int]:
    """Registers a thread, and bytes of its stack, where what does not fit is spilled."""
    text = _tool("cuobjdump", compiled, "-res-usage")
    found = re.search(r"REG:(\d+) STACK:(\d+)", text)
    if found is None:
        raise RuntimeError(f"cuobjdump -res-usage: expected REG and STACK, found {text[:200]!r}")
    return int(found[1]), int(found[2])


def disassembled(compiled: Any) -> str:
    return _tool("nvdisasm", compiled, "-c")


def _tool(name: str, compiled: Any, *options: str) -> str:
    """The output of a program of Triton's package over the kernel's binary."""
    import triton

    program = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        command = [str(program), *options, file.name]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    return done.stdout + done.stderr


def blocks(registers: int, shared: int, n_warps: int, capability: int) -> int:
    """Programs that fit one multiprocessor at once."""
    shared_kib, n_threads = MULTIPROCESSOR[capability]
    # Registers are given out to warps, 256 at a time.
    of_warp = -(-registers * 32 // 256) * 256
    by_registers = REGISTERS // (of_warp * n_warps)
    by_shared = shared_kib * 1024 // (shared + RESERVED)
    return min(by_registers, by_shared, n_threads // (32 * n_warps))


if __name__ == "__main__":
    main()
