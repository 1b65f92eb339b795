"""Compile every kernel of a Triton step for GPUs that need not be here.

    python tests/kernels/triton_compile.py    (without TRITON_INTERPRET)

The step runs on CPU tensors, its launches only compile what they would have run. Prints a line for
each kernel.
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
from saint.kernels import (
    triton_encoder,  # noqa: E402
    triton_ops,  # noqa: E402
)
from saint.stage.workers import Workers  # noqa: E402
from saint.training.losses import AuxK  # noqa: E402
from saint.training.moments import Moments  # noqa: E402
from saint.training.triton_step import TritonStep  # noqa: E402

TARGETS = [GPUTarget("cuda", capability, 32) for capability in (80, 90)]
POINTERS = {
    torch.float32: "*fp32",
    torch.bfloat16: "*bf16",
    torch.int32: "*i32",
    torch.int64: "*i64",
    torch.uint8: "*u8",
}


def type_of(argument: object) -> str:
    if isinstance(argument, torch.Tensor):
        return POINTERS[argument.dtype]
    return "fp32" if isinstance(argument, float) else "i32"


def compile_only(kernel, grid, *arguments, num_warps: int = 4, **constants) -> None:
    """Stand in for `launch`; indices that the kernel would have written are zeros."""
    names = kernel.arg_names
    signature = dict(zip(names, map(type_of, arguments), strict=False))
    signature |= dict.fromkeys(constants, "constexpr")
    assert set(signature) == set(names), (kernel, signature)
    source = ASTSource(kernel, signature, {(names.index(n),): v for n, v in constants.items()})
    for target in TARGETS:
        compiled = triton.compile(source, target=target, options={"num_warps": num_warps})
        assert compiled.asm["cubin"]
    print(kernel.fn.__name__)
    for argument in arguments:
        if isinstance(argument, torch.Tensor) and not argument.is_floating_point():
            argument.zero_()


def main() -> None:
    triton_ops.launch = triton_encoder.launch = compile_only
    triton_ops.interpreted = lambda: True  # these tensors are not on a GPU
    sae = TopKSparseAutoencoder(SAEConfig(3072, 2048, 64))
    step = TritonStep(sae, Moments(sae), Workers(0, 1, torch.device("cpu")))
    step.accumulate(torch.randn(3, 3072), 64, AuxK(torch.arange(3), 2, 1 / 32), 1.0)
    step.apply(1e-3, 1.0)


if __name__ == "__main__":
    main()
