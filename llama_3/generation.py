"""Batched, seeded, streaming text generation with a KV cache sized for the request."""

from collections.abc import Collection, Generator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from llama_3.model import Edits, HookPoint, Layout, Llama


@dataclass(frozen=True)
class Sampling:
    """How the next token is drawn.

    temperature: 0 takes the likeliest. top_p: draw from the likeliest tokens whose probabilities
    add up to this share, in (0, 1]. seed: of each prompt's own random numbers, so a prompt gives
    the same text alone and in a batch.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.temperature < 0 or not 0 < self.top_p <= 1:
            raise ValueError(f"temperature must be 0 or more, top_p in (0, 1]: {self}")


@torch.no_grad()
def generate(
    model: Llama,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    sampling: Sampling = Sampling(),  # noqa: B008 (frozen)
    stop_ids: Collection[int] = (),
    edits: Edits = None,
) -> Generator[list[int | None]]:
    """Yield one new token id per prompt and step, None once that prompt has stopped.

    The stop token itself is not yielded. Ends when every prompt has stopped, or after
    `max_new_tokens` steps; closing the iterator cancels. Identical prompts in one batch share
    their random numbers. Raises ValueError, at the first step, for an empty prompt or a request
    past the model's context.
    """
    lengths = torch.tensor([len(prompt) for prompt in prompts])
    if not len(prompts) or lengths.min() == 0:
        raise ValueError("a prompt must have at least one token")
    width, limit = int(lengths.max()), model.args.max_seq_len
    if width + max_new_tokens > limit:
        wish = f"{width} prompt tokens and {max_new_tokens} new ones"
        raise ValueError(f"{wish} exceed the model's context of {limit} tokens")
    generators = [torch.Generator().manual_seed(sampling.seed) for _ in prompts]
    n_heads, head_dim = model.args.n_kv_heads // model.n_shards, model.args.head_dim
    shape = (2, len(model.layers), len(prompts), width + max_new_tokens, n_heads, head_dim)
    # Zeros, since masked positions are still multiplied with, by weights of zero.
    cache = torch.zeros(shape, device=model.device, dtype=model.dtype)
    # Prompts are padded on the right; new tokens overwrite the padding's keys and values.
    row, at = torch.arange(width)[None], lengths - 1
    positions = torch.where(row <= at[:, None], row, -1).to(model.device)
    tokens = torch.tensor([[*p, *[0] * (width - len(p))] for p in prompts], device=model.device)
    layout = Layout(positions, model.rotation(row.to(model.device)), cache=cache)
    last, running = HookPoint(len(model.layers) - 1, "resid_post"), [True] * len(prompts)
    for step in range(max_new_tokens):
        resid = model.run(tokens, layout, [last], edits)[last]
        resid = resid[torch.arange(len(prompts)), at if step == 0 else 0]
        tokens = _sample(model.unembed(resid), sampling, generators)
        ids = tokens[:, 0].tolist()
        running = [on and i not in stop_ids for on, i in zip(running, ids, strict=True)]
        if not any(running):
            return
        yield [i if on else None for on, i in zip(running, ids, strict=True)]
        layout = _next_layout(model, cache, lengths + step)


def _next_layout(model: Llama, cache: Tensor, positions: Tensor) -> Layout:
    """The layout of one more token per row, at `positions` (batch,)."""
    n_cached, mask = int(positions.max()) + 1, None
    if positions.min() + 1 < n_cached:
        mask = (torch.arange(n_cached) <= positions[:, None])[:, None, None].to(model.device)
    positions = positions[:, None].to(model.device)
    rotation = model.rotation(positions)
    return Layout(positions, rotation, cache=cache, n_cached=n_cached, mask=mask)


def _sample(logits: Tensor, sampling: Sampling, generators: list[torch.Generator]) -> Tensor:
    """Draw one id per row of (batch, vocab) logits; returns (batch, 1)."""
    if sampling.temperature == 0:
        return logits.argmax(-1, keepdim=True)
    probs, ids = torch.softmax(logits / sampling.temperature, -1).sort(descending=True, stable=True)
    cumulative = probs.cumsum(-1)
    kept = cumulative - probs < sampling.top_p
    mass = torch.where(kept, probs, 0.0).sum(-1, keepdim=True)
    # The random numbers are the CPU's on every device, so a seed means the same draw everywhere.
    draw = torch.cat([torch.rand(1, 1, generator=g) for g in generators]).to(logits.device)
    index = (cumulative <= draw * mass).sum(-1, keepdim=True)
    index = torch.minimum(index, kept.sum(-1, keepdim=True) - 1)
    return ids.gather(-1, index)
