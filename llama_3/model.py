"""The Llama 3 forward pass, with hook points to read and edit."""

import inspect
from collections.abc import Callable, Collection, Generator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from llama_3.args import LlamaArgs

HOOK_NAMES = ("resid_pre", "attn_norm", "attn_out", "mlp_out", "resid_post")


class HookPoint(NamedTuple):
    """A place in the model: 0-based `layer` and one of `HOOK_NAMES`."""

    layer: int
    name: str


Edit = Callable[[Tensor, Tensor], Tensor]
"""edit(x, positions) -> x of the same shape, (batch, seq, d_model), and dtype.

positions: (batch, seq), int64, 0-based within the row's own sequence (0 is BOS where one was
prepended), -1 where the row is padding. Packed input has batch 1.
"""
Edits = Mapping[HookPoint, Edit] | None
Make = Callable[..., Any]
_FEW_ROWS = 8


@dataclass(frozen=True)
class Segments:
    """Packed sequences for torch's own attention over them.

    starts: (n_sequences + 1,) int32, where each begins, and the end. longest: tokens.
    """

    starts: Tensor
    longest: int


@dataclass
class Layout:
    """What every attention layer of one pass shares.

    positions: (batch, seq), -1 for padding. rotation: complex64 (batch or 1, seq, 1, head_dim/2).
    packing: for packed input, `Segments`, or see `_rectangles`. For generation: cache, keys and
    values of all positions to attend to, (2, n_layers, batch, n_positions, kv_heads, head_dim);
    mask, where some rows have fewer, (batch, 1, 1, n_positions).
    """

    positions: Tensor
    rotation: Tensor
    packing: list[Tensor] | Segments | None = None
    cache: Tensor | None = None
    mask: Tensor | None = None


class _Linear(nn.Linear):
    """Left as allocated: the checkpoint fills it. (`skip_init` would import all of sympy.)"""

    def reset_parameters(self) -> None: ...


class _Norm(nn.RMSNorm):
    """Left as allocated."""

    def reset_parameters(self) -> None: ...


class Block(nn.Module):
    """One transformer block, in parts that `Llama._steps` runs, so that each can be hooked.

    Both take normalised x, (batch, seq, d_model), and return what is added to the residual.
    """

    def __init__(self, args: LlamaArgs, norm: Make, linear: Make) -> None:
        super().__init__()
        self.head_dim, dim, ffn_dim = args.head_dim, args.dim, args.ffn_dim
        width, kv_width = args.n_heads * args.head_dim, args.n_kv_heads * args.head_dim
        self.attention_norm, self.ffn_norm = norm(), norm()
        self.attention = nn.ModuleDict({"wq": linear(dim, width), "wk": linear(dim, kv_width)})
        self.attention.update({"wv": linear(dim, kv_width), "wo": linear(width, dim)})
        self.feed_forward = nn.ModuleDict({"w1": linear(dim, ffn_dim), "w2": linear(ffn_dim, dim)})
        self.feed_forward.update({"w3": linear(dim, ffn_dim)})

    def attend(self, x: Tensor, layout: Layout, layer: int) -> Tensor:
        """Grouped-query attention, with rotary embeddings over interleaved pairs."""
        w = self.attention
        q, k, v = (w[n](x).unflatten(-1, (-1, self.head_dim)) for n in ("wq", "wk", "wv"))
        q, k = _rotate(q, layout.rotation), _rotate(k, layout.rotation)
        if layout.cache is not None:
            rows = torch.arange(len(x), device=x.device)[:, None]
            # Padding, at -1, goes to the last position: there its row attends once it is rewritten.
            layout.cache[:, layer, rows, layout.positions] = torch.stack((k, v))
            k, v = layout.cache[:, layer]
        if layout.packing is None:
            return w["wo"](_attention(q, k, v, layout.mask).flatten(2))
        return w["wo"](_packed_attention(q, k, v, layout.packing).flatten(2))

    def transform(self, x: Tensor) -> Tensor:
        """SwiGLU: w2(silu(w1 x) * w3 x)."""
        w = self.feed_forward
        # In place: on the CPU fresh buffers of this size cost more than the arithmetic.
        return w["w2"](F.silu(w["w1"](x), inplace=True).mul_(w["w3"](x)))


class Llama(nn.Module):
    """A Llama 3 with uninitialised weights (use `load_llama`), named as in Meta's checkpoints.

    n_layers: build only the first n blocks; fewer than all leave out the unembedding. n_shards:
    size of fairscale's tensor-parallel group, over which heads, MLP and vocabulary are split.
    `Module.to` is not supported. Raises ValueError if there are fewer layers or it does not split.
    """

    def __init__(
        self,
        args: LlamaArgs,
        *,
        device: torch.device,
        dtype: torch.dtype,
        n_layers: int | None = None,
        n_shards: int = 1,
    ) -> None:
        super().__init__()
        n_layers = args.n_layers if n_layers is None else n_layers
        if not 0 < n_layers <= args.n_layers:
            raise ValueError(f"n_layers must be in 1..{args.n_layers}, not {n_layers}")
        self.args, self.own_args = args, args.shard(n_shards)
        self.device, self.dtype, self.n_shards, self.shard = device, dtype, n_shards, 0
        self.copy = self.reduce = self.gather = lambda x: x
        if n_shards > 1:
            from fairscale.nn.model_parallel import initialize, mappings

            self.shard = initialize.get_model_parallel_rank()
            self.copy = mappings.copy_to_model_parallel_region  # where a gradient is summed
            self.reduce = mappings.reduce_from_model_parallel_region
            self.gather = mappings.gather_from_model_parallel_region
        norm = partial(_Norm, args.dim, args.norm_eps, device=device, dtype=dtype)
        linear = partial(_Linear, bias=False, device=device, dtype=dtype)
        rows = torch.empty(self.own_args.vocab_size, args.dim, device=device, dtype=dtype)
        self.tok_embeddings = nn.Embedding.from_pretrained(rows)
        self.layers = nn.ModuleList(Block(self.own_args, norm, linear) for _ in range(n_layers))
        self.norm: nn.RMSNorm | None = None
        self.output: nn.Linear | None = None
        if n_layers == args.n_layers:
            output = linear(args.dim, self.own_args.vocab_size)
            self.norm, self.output = cast(nn.RMSNorm, norm()), cast(nn.Linear, output)
            if args.tied:
                self.output.weight = self.tok_embeddings.weight
        self.requires_grad_(False)
        self.takes_segments = _takes_segments(device, dtype, args.head_dim)
        if device.type == "cuda":
            # cuDNN's attention builds a plan for every new shape, as packs and growing caches are.
            torch.backends.cuda.enable_cudnn_sdp(False)
        self.frequencies = rope_frequencies(args).to(device)

    @property
    def unembedding(self) -> Tensor:
        """The (vocab, d_model) weight, whose rows map the normalised residual to logits."""
        weight = self._head()[1].weight
        return weight if self.n_shards == 1 else self.gather(weight.t().contiguous()).t()

    def forward(
        self, tokens: Tensor, *, edits: Edits = None, seq_lens: Sequence[int] | None = None
    ) -> Tensor:
        """Logits at every position, float32 (batch, seq, vocab), or (n_tokens, vocab) if packed.

        tokens, seq_lens: as in `capture`. Raises ValueError if only the first blocks were loaded.
        """
        last = HookPoint(len(self.layers) - 1, "resid_post")
        return self.unembed(self.capture(tokens, [last], seq_lens=seq_lens, edits=edits)[last])

    def capture(
        self,
        tokens: Tensor,
        hooks: Collection[HookPoint],
        *,
        seq_lens: Sequence[int] | None = None,
        edits: Edits = None,
        layout: Layout | None = None,
        start: tuple[int, Tensor] | None = None,
    ) -> dict[HookPoint, Tensor]:
        """Activations at `hooks`, (batch, seq, d_model) each, or (n_tokens, d_model) if packed.

        tokens: int64, right-padded (batch, seq), or packed (n_tokens,), one sequence after another.
        seq_lens: tokens per sequence; needed for packed tokens, and with padded ones it tells edits
        which positions are padding. layout: made by the caller, instead of seq_lens. start: a layer
        and its resid_pre as it was captured from the same tokens: the layers below are not run
        again. Computation stops after the last hook. Where a hook is edited too, the edited value
        is captured. Raises ValueError for a hook that is not there, or lies below start.
        """
        first = 0 if start is None else start[0]
        for layer, name in (*hooks, *(edits or ())):
            if name not in HOOK_NAMES:
                raise ValueError(f"unknown hook point {name!r}, expected one of {HOOK_NAMES}")
            if not 0 <= layer < len(self.layers):
                raise ValueError(f"no layer {layer}: {len(self.layers)} layers are loaded")
            if layer < first:
                raise ValueError(f"layer {layer} lies below layer {first}, where the pass starts")
        layout = layout or self.layout(tokens, seq_lens)
        captured: dict[HookPoint, Tensor] = {}
        steps = self._steps(tokens.view(layout.positions.shape), layout, start)
        hook, x = next(steps)
        while True:
            if edits and hook in edits:
                x = edits[hook](x, layout.positions)
            if hook in hooks:
                captured[hook] = x.view(*tokens.shape, -1)
            if len(captured) == len(set(hooks)):
                return captured
            hook, x = steps.send(x)

    def unembed(self, x: Tensor) -> Tensor:
        """Final norm and unembedding: residual (..., d_model) to float32 logits (..., vocab)."""
        norm, output = self._head()
        return self.gather(_project(self.copy(norm(x)), output.weight)).float()

    def rotation(self, positions: Tensor) -> Tensor:
        """Rotary factors for (batch, seq) positions: complex64 (batch, seq, 1, head_dim/2)."""
        angles = positions.clamp(min=0)[..., None, None].float() * self.frequencies
        return torch.polar(torch.ones_like(angles), angles)

    def layout(self, tokens: Tensor, seq_lens: Sequence[int] | None = None) -> Layout:
        """The layout of a pass without a cache; tokens, seq_lens: as in `capture`."""
        if tokens.ndim == 1:
            if not seq_lens or sum(seq_lens) != len(tokens) or min(seq_lens) < 1:
                raise ValueError("packed tokens need seq_lens, positive, adding up to their number")
            positions = torch.cat([torch.arange(n) for n in seq_lens])[None]
            positions = to_device(positions, self.device)
            if self.takes_segments and not torch.is_grad_enabled():
                starts = torch.tensor([0, *seq_lens]).cumsum(0, dtype=torch.int32)
                packing = Segments(to_device(starts, self.device), max(seq_lens))
            else:
                packing = [to_device(rows, self.device) for rows in _rectangles(seq_lens)]
            return Layout(positions, self.rotation(positions), packing)
        row = torch.arange(tokens.shape[1], device=self.device)[None]
        lengths = torch.tensor(seq_lens or [len(row[0])] * len(tokens), device=self.device)
        return Layout(torch.where(row < lengths[:, None], row, -1), self.rotation(row))

    def _steps(
        self, tokens: Tensor, layout: Layout, start: tuple[int, Tensor] | None
    ) -> Generator[tuple, Tensor]:
        """Yields (hook point, value) in order of computation; is sent the value to go on with."""
        first, x = start or (0, self._embed(tokens))
        x = x.view(*tokens.shape, -1)
        for i, block in enumerate(self.layers[first:], first):
            assert isinstance(block, Block)
            x = yield HookPoint(i, "resid_pre"), x
            h = yield HookPoint(i, "attn_norm"), block.attention_norm(x)
            h = self.reduce(block.attend(self.copy(h), layout, i))
            x = x + (yield HookPoint(i, "attn_out"), h)
            h = self.reduce(block.transform(self.copy(block.ffn_norm(x))))
            x = x + (yield HookPoint(i, "mlp_out"), h)
            x = yield HookPoint(i, "resid_post"), x

    def _embed(self, tokens: Tensor) -> Tensor:
        if self.n_shards == 1:
            return self.tok_embeddings(tokens)
        tokens = tokens - self.shard * self.own_args.vocab_size
        here = (tokens >= 0) & (tokens < self.own_args.vocab_size)
        return self.reduce(self.tok_embeddings(tokens.where(here, 0)) * here[..., None])

    def _head(self) -> tuple[nn.RMSNorm, nn.Linear]:
        if self.norm is None or self.output is None:
            raise ValueError(f"no logits: only the first {len(self.layers)} blocks were loaded")
        return self.norm, self.output


def rope_frequencies(args: LlamaArgs) -> Tensor:
    """Radians per token for each pair of a head's dimensions, float32 (head_dim/2,).

    Llama 3.1 keeps frequencies with more than `high_freq_factor` turns in the original context,
    divides those with fewer than `low_freq_factor` by `factor`, and interpolates between
    (https://github.com/meta-llama/llama-models, llama3/model.py).
    """
    exponent = torch.arange(0, args.head_dim, 2, dtype=torch.float32) / args.head_dim
    frequencies = 1.0 / (args.rope_theta**exponent)
    if args.rope_scaling is None:
        return frequencies
    factor, low, high, original_max_seq_len = args.rope_scaling
    turns = original_max_seq_len * frequencies / (2 * torch.pi)
    kept = ((turns - low) / (high - low)).clamp(0, 1)
    return (1 - kept) * frequencies / factor + kept * frequencies


def _project(x: Tensor, weight: Tensor) -> Tensor:
    """Return x · weightᵀ; of a few float32 rows the CPU's product is thrice as fast this way."""
    rows = x.flatten(0, -2)
    if x.is_cpu and x.dtype == torch.float32 and 1 < len(rows) <= _FEW_ROWS:
        return (weight @ rows.T).T.contiguous().unflatten(0, x.shape[:-1])
    return F.linear(x, weight)


def _rotate(x: Tensor, rotation: Tensor) -> Tensor:
    """Rotate the pairs (2i, 2i+1) of each head, in float32. x: (batch, seq, heads, head_dim)."""
    pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * rotation).flatten(-2).to(x.dtype)


def _attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """Causal attention, (batch, seq, heads, head_dim); one query sees all keys, or mask's."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    if mask is not None and q.is_cuda:  # no fused kernel has both a mask and grouped queries
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    modes = {"is_causal": q.shape[2] > 1, "enable_gqa": q.shape[1] != k.shape[1]}
    return F.scaled_dot_product_attention(q, k, v, mask, **modes).transpose(1, 2)


def _takes_segments(device: torch.device, dtype: torch.dtype, head_dim: int) -> bool:
    """Whether torch has FlashAttention over packed sequences with grouped queries, as of 2.13."""
    halves = (torch.bfloat16, torch.float16)
    if device.type != "cuda" or dtype not in halves or head_dim % 8 or head_dim > 256:
        return False
    if torch.version.hip is not None or torch.cuda.get_device_capability(device) < (8, 0):
        return False
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return False
    return {"window_size", "enable_gqa"} <= inspect.signature(varlen_attn).parameters.keys()


def _packed_attention(q: Tensor, k: Tensor, v: Tensor, packing: list[Tensor] | Segments) -> Tensor:
    """Causal attention within each packed sequence; tensors are (1, n_tokens, heads, head_dim)."""
    if isinstance(packing, Segments):
        from torch.nn.attention import varlen

        bounds = (packing.starts, packing.starts, packing.longest, packing.longest)
        how = {
            "window_size": (-1, 0),
            "enable_gqa": q.shape[2] != k.shape[2],
        }  # all before, none after
        return cast(Tensor, varlen.varlen_attn(q[0], k[0], v[0], *bounds, **how))[None]
    parts, (*rectangles, inverse) = [], packing
    for rows in rectangles:
        boxed = (x[0].index_select(0, rows.flatten()).unflatten(0, rows.shape) for x in (q, k, v))
        parts.append(_attention(*boxed).flatten(0, 1))
    return torch.cat(parts).index_select(0, inverse)[None]


def _rectangles(seq_lens: Sequence[int]) -> list[Tensor]:
    """Arrange packed sequences in one rectangle per length class, so that attention pads little.

    Returns the packed row of every slot, (n_members, longest) per rectangle, and last each packed
    row's slot, counted through all rectangles, (n_tokens,).
    """
    classes: dict[int, list[Tensor]] = {}
    for rows in torch.arange(sum(seq_lens)).split(list(seq_lens)):
        classes.setdefault((len(rows) + 15) // 16, []).append(rows)
    rectangles = [pad_sequence(c, batch_first=True, padding_value=-1) for c in classes.values()]
    slots = torch.cat([rows.flatten() for rows in rectangles])
    real = (slots >= 0).nonzero()[:, 0]
    inverse = torch.empty_like(real).index_copy_(0, slots[real], real)
    # Padding reads row 0; being last in its sequence, it is seen by no real row.
    return [*(rows.clamp(min=0) for rows in rectangles), inverse]


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Copy a CPU tensor to the device; to a GPU through pinned memory, without waiting for it."""
    if device.type != "cuda":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)
