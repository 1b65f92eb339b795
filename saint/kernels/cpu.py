"""The training step's C++ kernels: compiled once for this CPU, then called through ctypes.

The library has no dependency beyond the C++ runtime and OpenMP, so that compiling it takes some
seconds. It is kept in the user's cache (`$XDG_CACHE_HOME` or `~/.cache`, `saint/`) under a name
that holds a hash of the source, the compiler, its flags and the CPU.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from sae import ActiveLatents
from saint.kernels import torch_ops
from saint.stage.errors import UserError
from saint.stage.files import atomic_path

_SOURCES = tuple(
    Path(__file__).with_name(name) for name in ("cpu_step.cpp", "cpu_encoder.cpp", "cpu_tally.cpp")
)
_HEADERS = tuple(Path(__file__).with_name(name) for name in ("cpu_kernels.h", "cpu_moments.h"))
_FLAGS = (
    "-O3",
    "-march=native",
    "-fopenmp",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-std=c++17",
    "-shared",
    "-fPIC",
)
_BLOCK_ELEMENTS = 1 << 26  # pre-activations of one block: 256 MB


def _cpu_name() -> str:
    """Return what `-march=native` depends on."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return os.uname().machine
    return "".join(sorted({line for line in lines if line.startswith(("model name", "flags"))}))


@cache
def library() -> ctypes.CDLL:
    """Return the compiled kernels, compiling them where this CPU has none yet.

    Raises UserError when there is no C++ compiler or it fails.
    """
    compiler = shutil.which(os.environ.get("CXX", "c++")) or shutil.which("g++")
    if compiler is None:
        raise UserError("no C++ compiler here (c++, g++ or $CXX)")
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=False)
    texts = [path.read_text() for path in (*_SOURCES, *_HEADERS)]
    parts = (*texts, version.stdout, *_FLAGS, _cpu_name())
    name = hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]
    try:
        cache_dir = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "saint"
        path = cache_dir / f"cpu_kernels-{name}.so"
        if not path.exists():
            with atomic_path(path) as temporary:
                command = [compiler, *_FLAGS, *map(str, _SOURCES), "-o", str(temporary)]
                done = subprocess.run(command, capture_output=True, text=True, check=False)
                if done.returncode != 0:
                    reason = (done.stderr.strip().splitlines() or ["no message"])[0]
                    raise UserError(f"{compiler} cannot compile the kernels: {reason}")
        loaded = ctypes.CDLL(str(path))
    except (OSError, RuntimeError) as error:  # RuntimeError: a user without a home directory
        raise UserError(f"the compiled kernels cannot be used: {error}") from None
    loaded.saint_norm.restype = ctypes.c_double
    for name in ("saint_rescore", "saint_rescore_above", "saint_above"):
        getattr(loaded, name).restype = ctypes.c_int64
    loaded.saint_reduce_by_sentence.restype = ctypes.c_int64
    return loaded


@cache
def is_available() -> bool:
    """Whether this machine can have the kernels."""
    try:
        library()
    except UserError:
        return False
    return True


def _call(name: str, *arguments: Tensor | np.ndarray | int | float | ctypes.Structure) -> float:
    """Call a kernel; tensors must be contiguous, on the CPU, of the types below.

    NumPy's arrays must be contiguous; their dtypes are the caller's to get right.
    """
    converted = []
    for argument in arguments:
        if isinstance(argument, Tensor):
            converted.append(ctypes.c_void_p(_pointer(argument)))
        elif isinstance(argument, np.ndarray):
            assert argument.flags.c_contiguous
            converted.append(ctypes.c_void_p(argument.ctypes.data))
        elif isinstance(argument, ctypes.Structure):
            converted.append(ctypes.byref(argument))
        elif isinstance(argument, float):
            converted.append(ctypes.c_double(argument))
        else:
            converted.append(ctypes.c_int64(argument))
    return getattr(library(), name)(*converted, ctypes.c_int64(torch.get_num_threads()))


_TYPES = (torch.float32, torch.int64, torch.int32, torch.int8, torch.uint8, torch.bool)


def _pointer(tensor: Tensor) -> int:
    assert tensor.is_contiguous() and tensor.device.type == "cpu"
    assert tensor.dtype in _TYPES, tensor.dtype
    return tensor.data_ptr()


class _Rounded(ctypes.Structure):
    _fields_ = [
        (name, ctypes.c_int64 if name == "stride" else ctypes.c_void_p)
        for name in ("stride", "q", "scale", "square", "error", "sum")
    ]
    tensors: tuple[Tensor, ...]


def _round(rows: Tensor, *, is_input: bool) -> _Rounded:
    """Round rows (n, d) to whole numbers; the result keeps the tensors that it points to."""
    n, d = rows.shape
    stride = -(-d // 64) * 64
    tensors = (
        torch.empty(n, stride, dtype=torch.uint8),
        *(torch.empty(n) for _ in range(3)),
        torch.empty(n, dtype=torch.int32),
    )
    rounded = _Rounded(stride, *map(_pointer, tensors))
    rounded.tensors = tensors
    _call("saint_round", n, d, int(is_input), rows, rounded)
    return rounded


def rounded_product(a: _Rounded, w: _Rounded, pre: Tensor) -> None:
    """Multiply rounded inputs by rounded weights into pre (n_tokens, n_latents)."""
    _call("saint_rounded_product", *pre.shape, a, w, pre)


@cache
def has_rounded_product() -> bool:
    """Whether this CPU multiplies small whole numbers fast, and gets them right.

    The instructions differ between CPUs, and not all could be tried when this was written: a small
    product is compared with the same in float64.
    """
    if not _call("saint_has_rounded_product"):
        return False
    generator = torch.Generator().manual_seed(0)
    a, w = (torch.randn(n, 200, generator=generator) for n in (9, 21))
    rounded_a, rounded_w = _round(a, is_input=True), _round(w, is_input=False)
    pre = torch.empty(9, 21)
    rounded_product(rounded_a, rounded_w, pre)
    whole_a = rounded_a.tensors[0].double() - _call("saint_input_offset")
    whole_w = rounded_w.tensors[0].view(torch.int8).double()
    wanted = whole_a @ whole_w.T * rounded_a.tensors[1][:, None] * rounded_w.tensors[1]
    return torch.allclose(pre.double(), wanted, rtol=1e-5, atol=1e-6)


class Encoder:
    """The dense product and exact selection.

    rounded: multiply whole numbers first, and score the candidates exactly (cpu_encoder.cpp);
    tokens for which that cannot decide go through the float32 product, and are counted.
    Keeps its memory between steps, and the rounded weights until `forget_weights`.
    """

    def __init__(self, *, rounded: bool) -> None:
        self.rounded = rounded
        self.n_tokens = self.n_candidates = self.n_unsure = 0
        self._memory = torch.empty(0)
        self._weights: _Rounded | None = None

    def forget_weights(self) -> None:
        """Say that W_enc has changed since the last call."""
        self._weights = None

    def diagnostics(self) -> dict[str, float]:
        """Return what the rounded product left to do since the last call."""
        n_tokens, n_candidates, n_unsure = self.n_tokens, self.n_candidates, self.n_unsure
        self.n_tokens = self.n_candidates = self.n_unsure = 0
        if not n_tokens:
            return {}
        return {
            "debug/candidates_per_token": n_candidates / n_tokens,
            "debug/float32_tokens_ratio": n_unsure / n_tokens,
        }

    def __call__(self, a: Tensor, w_enc: Tensor, b_enc: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """As `sae.encode`, with int32 indices; of equal values the first latent's."""
        n_tokens, n_latents = a.shape[0], w_enc.shape[0]
        values = torch.empty(n_tokens, k)
        indices = torch.empty(n_tokens, k, dtype=torch.int32)
        select = self._select_rounded if self.rounded else self._select
        for block, pre in self._blocks(n_tokens, n_latents):
            select(a[block], w_enc, b_enc, pre, values[block], indices[block])
        return values, indices

    def above(self, a: Tensor, w_enc: Tensor, bias: Tensor) -> ActiveLatents:
        """As `torch_ops.above`, with int32 indices."""
        find = self._find_rounded if self.rounded else self._find
        blocks = self._blocks(len(a), len(w_enc))
        return torch_ops.concatenate([find(a[block], w_enc, bias, pre) for block, pre in blocks])

    def _blocks(self, n_tokens: int, n_latents: int) -> Iterator[tuple[slice, Tensor]]:
        """Yield tokens, and memory for their pre-activations; once without tokens."""
        n_rows = max(1, min(n_tokens, _BLOCK_ELEMENTS // n_latents))
        if self._memory.numel() < n_rows * n_latents:
            self._memory = torch.empty(n_rows * n_latents)
        for start in range(0, max(1, n_tokens), n_rows):
            stop = min(start + n_rows, n_tokens)
            yield (
                slice(start, stop),
                self._memory[: (stop - start) * n_latents].view(-1, n_latents),
            )

    def _select(
        self, a: Tensor, w_enc: Tensor, b_enc: Tensor, pre: Tensor, values: Tensor, indices: Tensor
    ) -> None:
        torch.mm(a, w_enc.T, out=pre)
        _call("saint_topk", *pre.shape, values.shape[1], pre, b_enc, values, indices)

    def _select_rounded(
        self, a: Tensor, w_enc: Tensor, b_enc: Tensor, pre: Tensor, values: Tensor, indices: Tensor
    ) -> None:
        inputs, unsure = self._multiply_rounded(a, w_enc, b_enc, pre)
        sizes = (*pre.shape, a.shape[1], values.shape[1])
        n_candidates = int(_call("saint_rescore", *sizes, *inputs, values, indices, unsure))
        rows = self._count(n_candidates, unsure)
        if len(rows):
            again = (pre[: len(rows)], values[rows], indices[rows])
            self._select(a[rows], w_enc, b_enc, *again)
            values[rows], indices[rows] = again[1:]

    def _multiply_rounded(
        self, a: Tensor, w_enc: Tensor, bias: Tensor, pre: Tensor
    ) -> tuple[tuple[Tensor | _Rounded, ...], Tensor]:
        """Fill pre; return what is scored again from, and room to say which tokens are unsure."""
        if self._weights is None:
            self._weights = _round(w_enc.detach(), is_input=False)
        rounded = _round(a, is_input=True)
        rounded_product(rounded, self._weights, pre)
        inputs = (a, w_enc.detach(), bias.detach(), rounded, self._weights, pre)
        return inputs, torch.empty(len(a), dtype=torch.bool)

    def _count(self, n_candidates: int, unsure: Tensor) -> Tensor:
        """Count for the diagnostics; return the unsure tokens."""
        rows = torch.nonzero(unsure).squeeze(1)
        self.n_candidates += n_candidates
        self.n_tokens += len(unsure)
        self.n_unsure += len(rows)
        return rows

    def _find(self, a: Tensor, w_enc: Tensor, bias: Tensor, pre: Tensor) -> ActiveLatents:
        torch.mm(a, w_enc.T, out=pre)
        counts = torch.empty(len(a), dtype=torch.int64)
        return _take(counts, int(_call("saint_above", *pre.shape, pre, bias.detach(), counts)))

    def _find_rounded(self, a: Tensor, w_enc: Tensor, bias: Tensor, pre: Tensor) -> ActiveLatents:
        inputs, unsure = self._multiply_rounded(a, w_enc, bias, pre)
        counts, n = torch.empty(len(a), dtype=torch.int64), torch.zeros(1, dtype=torch.int64)
        outputs = (counts, unsure, n)
        found = int(_call("saint_rescore_above", *pre.shape, a.shape[1], *inputs, *outputs))
        active, rows = _take(counts, found), self._count(int(n), unsure)
        if not len(rows):
            return active
        return torch_ops.fill(active, rows, self._find(a[rows], w_enc, bias, pre[: len(rows)]))


def _take(counts: Tensor, found: int) -> ActiveLatents:
    """Return entries that a kernel found, counts (n_tokens,) of each token."""
    offsets = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
    values = torch.empty(int(offsets[-1]))
    active = ActiveLatents(values, torch.empty(len(values), dtype=torch.int32), offsets)
    _call("saint_take", len(counts), found, active.values, active.indices)
    return active


def nest(active: ActiveLatents, prefixes: Sequence[int]) -> ActiveLatents:
    """As `torch_ops.nest`, with int32 indices."""
    n_tokens, ends = len(active.offsets) - 1, torch.tensor(prefixes)
    nested = ActiveLatents(
        torch.empty_like(active.values),
        torch.empty_like(active.indices),
        torch.empty(n_tokens * len(ends) + 1, dtype=torch.int64),
    )
    inputs = (ends, active.values, active.indices, active.offsets)
    outputs = (nested.values, nested.indices, nested.offsets)
    _call("saint_nest", n_tokens, len(ends), *inputs, *outputs)
    return nested


def reconstruct(
    x: Tensor,
    active: ActiveLatents,
    w_dec: Tensor,
    b_pre: Tensor,
    factor: float,
    *,
    parts: int = 1,
    at_rest: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """As `torch_ops.reconstruct`, with int32 indices."""
    g, g_values = x.new_empty(len(x) * parts, x.shape[1]), torch.empty_like(active.values)
    squared, normaliser = torch.empty(len(x), parts), torch.empty(len(x))
    fired = torch.zeros(w_dec.shape[0], dtype=torch.bool)
    inputs = (x, w_dec, b_pre, factor, active.values, active.indices, active.offsets)
    outputs = (g, g_values, squared, normaliser, fired)
    _call("saint_reconstruct", *x.shape, parts, int(at_rest), *inputs, *outputs)
    return outputs


def gather_dot(g: Tensor, active: ActiveLatents, w_dec: Tensor) -> Tensor:
    """As `torch_ops.gather_dot`, with int32 indices."""
    products = torch.empty_like(active.values)
    inputs = (g, w_dec.detach(), active.indices, active.offsets)
    _call("saint_gather_dot", *g.shape, *inputs, products)
    return products


class Gradient(ctypes.Structure):
    """A batch's gradient by latent, as pointers; `group_by_latent` makes one."""

    _fields_ = [
        (name, ctypes.c_int64 if name in ("n_latents", "d_model") else ctypes.c_void_p)
        for name in (
            *("n_latents", "d_model", "starts", "tokens", "rows", "values", "g_values", "a", "g"),
            *("aux_position", "aux_dec", "aux_enc", "aux_b"),
        )
    ]
    tensors: tuple[Tensor, ...]


def group_by_latent(
    n_latents: int,
    active: ActiveLatents,
    g_values: Tensor,
    a: Tensor,
    g: Tensor,
    aux: tuple[Tensor, Tensor, Tensor, Tensor] | None,
) -> Gradient:
    """Sort a batch's active entries by latent; the result keeps the tensors that it points to.

    active, g_values, a, g: see `pieces.SparseGradient`. aux: dead (n_dead,) and AuxK's gradients of
    those decoder and encoder rows (n_dead, d_model) and of b_enc (n_dead,).
    """
    values, indices, offsets = active.values, active.indices, active.offsets
    starts = torch.empty(n_latents + 1, dtype=torch.int32)
    rows = torch.empty(len(indices), dtype=torch.int32)
    by_latent = (torch.empty_like(values), torch.empty_like(values))
    inputs = (offsets, indices, values, g_values)
    _call("saint_group", len(offsets) - 1, n_latents, *inputs, starts, rows, *by_latent)
    parts = len(g) // max(1, len(a))
    tokens = rows if parts <= 1 else rows // parts
    tensors: tuple[Tensor, ...] = (starts, tokens, rows, *by_latent, a, g)
    if aux is not None:
        position = torch.full((n_latents,), -1, dtype=torch.int32)
        position[aux[0]] = torch.arange(len(aux[0]), dtype=torch.int32)
        tensors += (position, *aux[1:])
    gradient = Gradient(n_latents, a.shape[1], *map(_pointer, tensors))
    gradient.tensors = tensors
    return gradient


class _Parameter(ctypes.Structure):
    _fields_ = [(name, ctypes.c_void_p) for name in ("p", "m", "v", "scales")]


class Parameters(ctypes.Structure):
    """Weights and Adam's moments, as pointers; `point_to` makes one."""

    _fields_ = [(name, _Parameter) for name in ("w_enc", "b_enc", "w_dec", "b_pre")]


def point_to(*parameters: tuple[Tensor, Tensor, Tensor, Tensor | None]) -> Parameters:
    """Return pointers to (weight, exp_avg, exp_avg_sq, scales) of W_enc, b_enc, W_dec and b_pre.

    scales: of 8-bit moments as `moments.Moments` has them, None of float32 ones.
    """
    return Parameters(
        *(_Parameter(*(t if t is None else _pointer(t) for t in ts)) for ts in parameters)
    )


class AdamStep(ctypes.Structure):
    """Adam's constants at step n_steps, the first being 1: step_size is lr / (1 − β₁ᵗ).

    lazy: 1 leaves latents without a gradient as they are, weights and moments.
    """

    _fields_ = [
        *((name, ctypes.c_float) for name in ("beta1", "beta2", "step_size")),
        *((name, ctypes.c_float) for name in ("inverse_root_correction2", "eps")),
        *((name, ctypes.c_uint32) for name in ("n_steps", "lazy")),
    ]


def gradient_norm(gradient: Gradient, parameters: Parameters, grad_b_pre: Tensor) -> float:
    """Return the whole gradient's norm, the decoder's projected, and complete b_pre's.

    grad_b_pre: (d_model,) the sum of g over tokens; what enters through the encoder is added.
    """
    return _call("saint_norm", gradient, parameters, grad_b_pre) ** 0.5


def update(
    gradient: Gradient, parameters: Parameters, step: AdamStep, scale: float, grad_b_pre: Tensor
) -> None:
    """Take one Adam step on scale · gradient and give the decoder directions unit norm again."""
    _call("saint_update", gradient, parameters, step, float(scale), grad_b_pre)


def reduce_by_sentence(
    values: np.ndarray, indices: np.ndarray, offsets: np.ndarray, n_latents: int
) -> tuple[np.ndarray, ...]:
    """Return sentences, latents, n_tokens, sums and maxima, as `rankings.Pairs` has them."""
    n = len(values)
    arrays = [np.ascontiguousarray(offsets, np.int64)]
    arrays += [np.ascontiguousarray(values, np.float32), np.ascontiguousarray(indices, np.int32)]
    outputs = tuple(np.empty(n, dtype) for dtype in (*[np.int64] * 3, np.float64, np.float32))
    sizes = (len(offsets) - 1, n_latents)
    n_pairs = int(_call("saint_reduce_by_sentence", *sizes, *arrays, *outputs))
    return tuple(column[:n_pairs] for column in outputs)
