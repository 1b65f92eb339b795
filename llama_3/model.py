"""The Llama 3 forward pass, with hook points to read and edit.

One generator, `Llama._steps`, walks the blocks and offers the value at every hook point to
whoever drives it: capture reads it and stops early, an edit sends another value back.
"""

from collections.abc import Callable, Collection, Generator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llama_3.args import LlamaArgs

HOOK_NAMES = ("resid_pre", "attn_norm", "attn_out", "mlp_out", "resid_post")


class HookPoint(NamedTuple):
    """A place in the model: 0-based `layer` and one of `HOOK_NAMES`."""

    layer: int
    name: str


Edit = Callable[[Tensor, Tensor], Tensor]
"""edit(x, positions) -> x of the same shape and dtype.

x: (batch, seq, d_model). positions: (batch, seq), int64, 0-based within the row's own sequence
(0 is BOS where one was prepended), -1 where the row is padding. Packed input has batch 1.
"""
Edits = Mapping[HookPoint, Edit] | None


@dataclass
class Layout:
    """What every attention layer of one pass shares.

    positions: (batch, seq), -1 for padding. rotation: complex64 (batch or 1, seq, 1, head_dim/2).
    rectangles, inverse: for packed input, see `_rectangles`. For generation: cache, keys and values
    by position, (2, n_layers, batch, length, kv_heads, head_dim); n_cached, how many positions to
    attend to, 0 while the prompt itself runs; mask, where rows have fewer, (batch, 1, 1, n_cached).
    """

    positions: Tensor
    rotation: Tensor
    rectangles: list[Tensor] | None = None
    inverse: Tensor | None = None
    cache: Tensor | None = None
    n_cached: int = 0
    mask: Tensor | None = None


class Attention(nn.Module):
    """Grouped-query attention with rotary embeddings over interleaved pairs."""

    def __init__(self, args: LlamaArgs, make: "_LayerFactory") -> None:
        super().__init__()
        self.head_dim = args.head_dim
        self.wq = make("column", args.dim, args.n_heads * args.head_dim)
        self.wk = make("column", args.dim, args.n_kv_heads * args.head_dim)
        self.wv = make("column", args.dim, args.n_kv_heads * args.head_dim)
        self.wo = make("row", args.n_heads * args.head_dim, args.dim)

    def forward(self, x: Tensor, layout: Layout, layer: int) -> Tensor:
        """x: (batch, seq, d_model), normalised. Returns what is added to the residual."""
        q, k, v = (w(x).unflatten(-1, (-1, self.head_dim)) for w in (self.wq, self.wk, self.wv))
        q, k = _rotate(q, layout.rotation), _rotate(k, layout.rotation)
        if layout.cache is not None:
            k, v = _cached(layout.cache[:, layer], k, v, layout)
        if layout.rectangles is not None:
            out = _attend_packed(q, k, v, layout)
        else:
            out = _attend(q, k, v, mask=layout.mask, causal=layout.n_cached == 0)
        return self.wo(out.flatten(2))


class FeedForward(nn.Module):
    """SwiGLU: w2(silu(w1 x) * w3 x)."""

    def __init__(self, args: LlamaArgs, make: "_LayerFactory") -> None:
        super().__init__()
        self.w1 = make("column", args.dim, args.ffn_dim)
        self.w2 = make("row", args.ffn_dim, args.dim)
        self.w3 = make("column", args.dim, args.ffn_dim)

    def forward(self, x: Tensor) -> Tensor:
        """x: (batch, seq, d_model), normalised. Returns what is added to the residual."""
        # In place: on the CPU fresh buffers of this size cost more than the arithmetic.
        return self.w2(F.silu(self.w1(x), inplace=True).mul_(self.w3(x)))


class Block(nn.Module):
    """One transformer block; `Llama._steps` runs its parts, so that each can be hooked."""

    def __init__(self, args: LlamaArgs, make: "_LayerFactory") -> None:
        super().__init__()
        self.attention_norm = make("norm", args.dim, args.norm_eps)
        self.attention = Attention(args, make)
        self.ffn_norm = make("norm", args.dim, args.norm_eps)
        self.feed_forward = FeedForward(args, make)


class Llama(nn.Module):
    """A Llama 3 with uninitialised weights (use `load_llama`), named as in Meta's checkpoints.

    n_layers: build only the first n blocks; fewer than all leave out the unembedding. n_shards:
    size of fairscale's tensor-parallel group; 1 needs no group. `Module.to` is not supported.
    Raises ValueError if the model has fewer layers or does not split.
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
        for name in ("n_heads", "n_kv_heads", "ffn_dim", "vocab_size"):
            if getattr(args, name) % n_shards:
                raise ValueError(f"{name} {getattr(args, name)} does not split over {n_shards}")
        self.args, self.device, self.dtype = args, device, dtype
        self.n_shards, self.shard = n_shards, 0
        if n_shards > 1:
            from fairscale.nn.model_parallel.initialize import get_model_parallel_rank

            self.shard = get_model_parallel_rank()
        make = _LayerFactory(device, dtype, n_shards)
        self.tok_embeddings = make("embedding", args.vocab_size, args.dim)
        self.layers = nn.ModuleList(Block(args, make) for _ in range(n_layers))
        self.norm = self.output = None
        if n_layers == args.n_layers:
            self.norm = make("norm", args.dim, args.norm_eps)
            self.output = make("column", args.dim, args.vocab_size)
            if args.tied:
                self.output.weight = self.tok_embeddings.weight
        self.frequencies = rope_frequencies(args).to(device)

    @property
    def unembedding(self) -> Tensor:
        """The (vocab, d_model) weight, whose rows map the normalised residual to logits."""
        return self._gathered(self._head()[1].weight.t()).t()

    def forward(
        self, tokens: Tensor, *, edits: Edits = None, seq_lens: Sequence[int] | None = None
    ) -> Tensor:
        """Logits at every position, float32 (batch, seq, vocab), or (n_tokens, vocab) if packed.

        tokens, seq_lens: as in `capture`. Right padding is harmless: attention is causal.
        Raises ValueError if only the first blocks were loaded.
        """
        self._head()
        last = HookPoint(len(self.layers) - 1, "resid_post")
        return self.unembed(self.capture(tokens, [last], seq_lens=seq_lens, edits=edits)[last])

    def capture(
        self,
        tokens: Tensor,
        hooks: Collection[HookPoint],
        *,
        seq_lens: Sequence[int] | None = None,
        edits: Edits = None,
    ) -> dict[HookPoint, Tensor]:
        """Activations at `hooks`, (batch, seq, d_model) each, or (n_tokens, d_model) if packed.

        tokens: int64, right-padded (batch, seq), or packed (n_tokens,), one sequence after another.
        seq_lens: tokens per sequence; needed for packed tokens, and with padded ones it tells edits
        which positions are padding. Computation stops after the last hook. Where a hook is
        edited too, the edited value is captured. Raises ValueError for a hook that is not there.
        """
        layout = self._layout(tokens, seq_lens)
        if tokens.ndim == 2:
            return self.run(tokens, layout, hooks, edits)
        return {hook: x[0] for hook, x in self.run(tokens[None], layout, hooks, edits).items()}

    def unembed(self, x: Tensor) -> Tensor:
        """Final norm and unembedding: residual (..., d_model) to float32 logits (..., vocab)."""
        norm, output = self._head()
        return self._gathered(output(norm(x))).float()

    def rotation(self, positions: Tensor) -> Tensor:
        """Rotary factors for (batch, seq) positions: complex64 (batch, seq, 1, head_dim/2)."""
        angles = positions.clamp(min=0)[..., None, None].float() * self.frequencies
        return torch.polar(torch.ones_like(angles), angles)

    def run(
        self, tokens: Tensor, layout: Layout, hooks: Collection[HookPoint], edits: Edits = None
    ) -> dict[HookPoint, Tensor]:
        """Activations at `hooks` of (batch, seq) tokens, laid out by the caller; see `capture`."""
        wanted = {self._checked(hook) for hook in hooks}
        edits = {self._checked(hook): edit for hook, edit in (edits or {}).items()}
        captured: dict[HookPoint, Tensor] = {}
        steps = self._steps(tokens, layout)
        hook, x = next(steps)
        while True:
            if hook in edits:
                x = edits[hook](x, layout.positions)
            if hook in wanted:
                captured[hook] = x
            if len(captured) == len(wanted):
                return captured
            hook, x = steps.send(x)

    def _steps(self, tokens: Tensor, layout: Layout) -> Generator[tuple, Tensor]:
        """Yields (hook point, value) in order of computation, taking the value to go on with."""
        x = self.tok_embeddings(tokens)
        for i, block in enumerate(self.layers):
            assert isinstance(block, Block)
            x = yield HookPoint(i, "resid_pre"), x
            h = yield HookPoint(i, "attn_norm"), block.attention_norm(x)
            h = yield HookPoint(i, "attn_out"), block.attention(h, layout, i)
            x = x + h
            h = yield HookPoint(i, "mlp_out"), block.feed_forward(block.ffn_norm(x))
            x = yield HookPoint(i, "resid_post"), x + h

    def _layout(self, tokens: Tensor, seq_lens: Sequence[int] | None) -> Layout:
        lengths = None if seq_lens is None else torch.tensor(seq_lens, dtype=torch.int64)
        if tokens.ndim == 1:
            if lengths is None or lengths.sum() != len(tokens) or (lengths < 1).any():
                raise ValueError("packed tokens need seq_lens, positive, adding up to their number")
            starts = lengths.cumsum(0) - lengths
            positions = torch.arange(len(tokens)) - starts.repeat_interleave(lengths)
            positions = to_device(positions, self.device)[None]
            return Layout(positions, self.rotation(positions), *_rectangles(lengths, self.device))
        row = torch.arange(tokens.shape[1], device=self.device)[None]
        positions = row.expand(tokens.shape)
        if lengths is not None:
            positions = torch.where(row < lengths.to(self.device)[:, None], row, -1)
        return Layout(positions, self.rotation(row))

    def _head(self) -> tuple[nn.RMSNorm, nn.Linear]:
        if self.norm is None or self.output is None:
            raise ValueError(f"no logits: only the first {len(self.layers)} blocks were loaded")
        return self.norm, self.output

    def _gathered(self, x: Tensor) -> Tensor:
        """Join the last dimension, which tensor parallelism splits over the vocabulary."""
        if self.n_shards == 1:
            return x
        from fairscale.nn.model_parallel.mappings import gather_from_model_parallel_region

        return gather_from_model_parallel_region(x)

    def _checked(self, hook: tuple[int, str]) -> HookPoint:
        layer, name = hook
        if name not in HOOK_NAMES:
            raise ValueError(f"unknown hook point {name!r}, expected one of {HOOK_NAMES}")
        if not 0 <= layer < len(self.layers):
            raise ValueError(f"no layer {layer}: {len(self.layers)} layers are loaded")
        return HookPoint(layer, name)


class _LayerFactory:
    """Makes uninitialised layers, plain or split over fairscale's tensor-parallel group."""

    def __init__(self, device: torch.device, dtype: torch.dtype, n_shards: int) -> None:
        self.device, self.dtype = device, dtype
        column = row = partial(nn.Linear, bias=False, device="meta")
        norm = partial(nn.RMSNorm, device="meta")

        def embedding(n_rows: int, dim: int) -> nn.Module:
            # Its constructor would draw random numbers, for which "meta" imports half of torch.
            return nn.Embedding.from_pretrained(torch.empty(n_rows, dim, device="meta"))

        if n_shards > 1:
            from fairscale.nn.model_parallel import layers

            empty = {"init_method": lambda weight: weight}
            column = partial(layers.ColumnParallelLinear, bias=False, gather_output=False, **empty)
            row = partial(layers.RowParallelLinear, bias=False, input_is_parallel=True, **empty)
            embedding = partial(layers.VocabParallelEmbedding, **empty)
        self.kinds = {"column": column, "row": row, "embedding": embedding, "norm": norm}

    def __call__(self, kind: str, *sizes: float) -> Any:
        """A layer whose weight has memory on the device at once: only one is float32 at a time."""
        layer = self.kinds[kind](*sizes)
        weight = torch.empty(layer.weight.shape, device=self.device, dtype=self.dtype)
        layer.weight = nn.Parameter(weight, requires_grad=False)
        return layer


def rope_frequencies(args: LlamaArgs) -> Tensor:
    """Radians per token for each pair of a head's dimensions, float32 (head_dim/2,).

    Llama 3.1 keeps frequencies with more than `high_freq_factor` turns in the original context,
    divides those with fewer than `low_freq_factor` by `factor`, and interpolates between
    (https://github.com/meta-llama/llama-models, llama3/model.py).
    """
    exponent = torch.arange(0, args.head_dim, 2, dtype=torch.float32) / args.head_dim
    frequencies = 1.0 / (args.rope_theta**exponent)
    scaling = args.rope_scaling
    if scaling is None:
        return frequencies
    turns = scaling.original_max_seq_len * frequencies / (2 * torch.pi)
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    kept = ((turns - low) / (high - low)).clamp(0, 1)
    return (1 - kept) * frequencies / scaling.factor + kept * frequencies


def _rotate(x: Tensor, rotation: Tensor) -> Tensor:
    """Rotate the pairs (2i, 2i+1) of each head, in float32. x: (batch, seq, heads, head_dim)."""
    pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * rotation).flatten(-2).to(x.dtype)


def _cached(cache: Tensor, k: Tensor, v: Tensor, layout: Layout) -> tuple[Tensor, Tensor]:
    """Store new keys and values of one layer; returns those that the queries attend to."""
    if layout.n_cached == 0:
        cache[0, :, : k.shape[1]], cache[1, :, : v.shape[1]] = k, v
        return k, v
    rows, positions = torch.arange(len(k), device=k.device), layout.positions[:, 0]
    cache[0, rows, positions], cache[1, rows, positions] = k[:, 0], v[:, 0]
    return cache[0, :, : layout.n_cached], cache[1, :, : layout.n_cached]


def _attend(
    q: Tensor, k: Tensor, v: Tensor, *, mask: Tensor | None = None, causal: bool = False
) -> Tensor:
    """Attention of (batch, seq, heads, head_dim) queries over fewer or as many KV heads."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    gqa = q.shape[1] != k.shape[1]
    out = F.scaled_dot_product_attention(q, k, v, mask, is_causal=causal, enable_gqa=gqa)
    return out.transpose(1, 2)


def _attend_packed(q: Tensor, k: Tensor, v: Tensor, layout: Layout) -> Tensor:
    """Causal attention within each packed sequence; tensors are (1, n_tokens, heads, head_dim)."""
    assert layout.rectangles is not None and layout.inverse is not None
    parts = []
    for rows in layout.rectangles:
        flat = rows.flatten()
        boxed = [x[0].index_select(0, flat).unflatten(0, rows.shape) for x in (q, k, v)]
        parts.append(_attend(*boxed, causal=True).flatten(0, 1))
    joined = parts[0] if len(parts) == 1 else torch.cat(parts)
    return joined.index_select(0, layout.inverse)[None]


def _rectangles(lengths: Tensor, device: torch.device) -> tuple[list[Tensor], Tensor]:
    """Arrange packed sequences in one rectangle per length class, so that attention pads little.

    lengths: (n_seqs,). Returns the packed row of every slot, (n_members, longest) per rectangle,
    and each packed row's slot, counted through all rectangles, (n_tokens,).
    """
    starts = lengths.cumsum(0) - lengths
    classes = (lengths + 15) // 16
    rectangles, inverse, n_slots = [], torch.empty(int(lengths.sum()), dtype=torch.int64), 0
    for length_class in classes.unique():
        member = classes == length_class
        offset = torch.arange(int(lengths[member].max()))
        real = offset < lengths[member][:, None]
        # Padding slots read the sequence's first row; being last, they are seen by no real one.
        rows = starts[member][:, None] + offset * real
        inverse[rows[real]] = n_slots + real.flatten().nonzero()[:, 0]
        n_slots += real.numel()
        rectangles.append(to_device(rows, device))
    return rectangles, to_device(inverse, device)


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Copy a CPU tensor to the device; to a GPU through pinned memory, without waiting for it."""
    if device.type != "cuda":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)
