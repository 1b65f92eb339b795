"""Compile every kernel of a Triton step for GPUs that need not be here.

    python tests/kernels/triton_compile.py    (without TRITON_INTERPRET)

The step runs on CPU tensors, its launches only compile what they would have run there, for what a
launch specialises: a card's tiles, addresses and numbers that 16 divides, numbers that are 1.
Prints a line for each kernel.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from sae import SAEConfig, TopKSparseAutoencoder  # noqa: E402
from saint.kernels import (  # noqa: E402
    triton_encoder,
    triton_gradient,
    triton_ops,
    triton_update,
)
from saint.stage.workers import Workers  # noqa: E402
from saint.training.losses import AuxK  # noqa: E402
from saint.training.moments import MOMENT_KINDS, Moments  # noqa: E402
from saint.training.triton_step import TritonStep  # noqa: E402

CAPABILITIES = ((8, 0), (8, 9), (9, 0))
POINTERS = {
    torch.float32: "*fp32",
    torch.bfloat16: "*bf16",
    torch.int32: "*i32",
    torch.int64: "*i64",
    torch.int8: "*i8",
    torch.uint8: "*u8",
}


def type_of(argument: object) -> str:
    if isinstance(argument, torch.Tensor):
        return POINTERS[argument.dtype]
    return "fp32" if isinstance(argument, float) else "i32"


def divides(argument: object) -> bool:
    value = argument.data_ptr() if isinstance(argument, torch.Tensor) else argument
    return isinstance(value, int) and value % 16 == 0


def compile_only(kernel, target: GPUTarget, arguments, num_warps: int = 4, **constants) -> None:
    """Stand in for `launch`; indices that the kernel would have written are zeros."""
    names = kernel.arg_names
    given = dict(zip(names, arguments, strict=False))
    constants |= {name: 1 for name, value in given.items() if type(value) is int and value == 1}
    signature = {name: type_of(value) for name, value in given.items()}
    signature |= dict.fromkeys(constants, "constexpr")
    assert set(signature) == set(names), (kernel, signature)
    attributes = {
        (names.index(name),): [["tt.divisibility", 16]]
        for name, value in given.items()
        if divides(value)
    }
    values = {(names.index(name),): value for name, value in constants.items()}
    source = ASTSource(kernel, signature, values, attributes)
    options = {"num_warps": num_warps, "enable_fp_fusion": True}
    assert triton.compile(source, target=target, options=options).asm["cubin"]
    print(kernel.fn.__name__, flush=True)
    for argument in arguments:
        if isinstance(argument, torch.Tensor) and argument.dtype is torch.int32:
            argument.zero_()


def compile_for(capability: tuple[int, int]) -> None:
    """Take steps for a card of a compute capability."""
    target = GPUTarget("cuda", 10 * capability[0] + capability[1], 32)

    def launch(kernel, grid, *arguments, **options) -> None:
        compile_only(kernel, target, arguments, **options)

    for module in (triton_encoder, triton_gradient, triton_ops, triton_update):
        module.launch = launch  # pyright: ignore
    triton_ops.tiles_on = lambda device: triton_ops.tiles_of(capability)
    sae = TopKSparseAutoencoder(SAEConfig(3072, 2048, 64))
    for kind in MOMENT_KINDS:
        step = TritonStep(sae, Moments(sae, kind), Workers(0, 1, torch.device("cpu")))
        step.accumulate(torch.randn(3, 3072), 64, AuxK(torch.arange(3), 2, 1 / 32), 1.0)
        step.apply(1e-3, 1.0)


def main() -> None:
    triton_ops.interpreted = lambda: True  # these tensors are not on a GPU
    for capability in CAPABILITIES:
        compile_for(capability)


if __name__ == "__main__":
    main()
