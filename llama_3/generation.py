"""Batched, seeded, streaming text generation with a KV cache sized for the request."""

from collections.abc import Collection, Generator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from llama_3.model import Edits, HookPoint, Layout, Llama

_HEAD = 1024  # likeliest tokens looked at first: sorting a vocabulary costs as much as the model


@dataclass(frozen=True)
class Sampling:
    """How the next token is drawn.

    temperature: 0 takes the likeliest. top_p: draw from the likeliest tokens that have this share
    of the probability, in (0, 1]. seed: of each prompt's own random numbers, in any batch; several
    give each prompt its own.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | tuple[int, ...] = 0

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
    `max_new_tokens` steps; closing the iterator cancels. Raises ValueError, at the first step, for
    an empty prompt or a request past the model's context.
    """
    lengths = torch.tensor([len(prompt) for prompt in prompts])
    if not len(prompts) or lengths.min() == 0:
        raise ValueError("a prompt must have at least one token")
    width, limit = int(lengths.max()), model.args.max_seq_len
    if width + max_new_tokens > limit:
        raise ValueError(f"{width} + {max_new_tokens} tokens exceed the context of {limit} tokens")
    seeds = [sampling.seed] * len(prompts) if isinstance(sampling.seed, int) else sampling.seed
    if len(seeds) != len(prompts):
        raise ValueError(f"{len(seeds)} seeds for {len(prompts)} prompts")
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    own, length = model.own_args, width + max_new_tokens
    shape = (2, len(model.layers), len(prompts), length, own.n_kv_heads, own.head_dim)
    # Zeros, since masked positions are still multiplied with, by weights of zero.
    cache = torch.zeros(shape, device=model.device, dtype=model.dtype)
    # Prompts are padded on the right; new tokens overwrite the padding's keys and values.
    tokens = torch.tensor([[*p, *[0] * (width - len(p))] for p in prompts], device=model.device)
    layout = replace(model.layout(tokens, lengths.tolist()), cache=cache[:, :, :, :width])
    last, running = HookPoint(len(model.layers) - 1, "resid_post"), [True] * len(prompts)
    for step in range(max_new_tokens):
        resid = model.capture(tokens, [last], edits=edits, layout=layout)[last]
        resid = resid[torch.arange(len(prompts)), lengths - 1 if step == 0 else 0]
        tokens = _sample(model.unembed(resid), sampling, generators)
        # Ranks of a tensor-parallel group go on with the first one's draw: they may never differ.
        tokens = model.reduce(tokens * (model.shard == 0))
        ids = tokens[:, 0].tolist()
        running = [on and i not in stop_ids for on, i in zip(running, ids, strict=True)]
        if not any(running):
            return
        yield [i if on else None for on, i in zip(running, ids, strict=True)]
        at, n = (lengths + step)[:, None].to(model.device), width + step + 1
        seen = (torch.arange(n, device=model.device) <= at)[:, None, None]
        mask = None if lengths.min() == width else seen
        layout = Layout(at, model.rotation(at), None, cache[:, :, :, :n], mask)


def _sample(logits: Tensor, sampling: Sampling, generators: list[torch.Generator]) -> Tensor:
    """Draw one id per row of (batch, vocab) logits; returns (batch, 1)."""
    if sampling.temperature == 0:
        return logits.argmax(-1, keepdim=True)
    # The random numbers are the CPU's on every device, so a seed means the same draw everywhere.
    draw = torch.cat([torch.rand(1, 1, generator=g) for g in generators]).to(logits.device)
    probs = torch.softmax(logits / sampling.temperature, -1)
    if sampling.top_p == 1:  # nothing is left out: the order does not matter, sorting is the cost
        cumulative = probs.cumsum(-1)
        index = torch.searchsorted(cumulative, draw * cumulative[:, -1:], right=True)
        return index.clamp(max=probs.shape[-1] - 1)
    head = min(_HEAD, probs.shape[-1])
    values, ids = _largest(probs, head)
    chosen, enough = _draw_from(values, ids, draw, sampling.top_p)
    rest = (~enough).nonzero()[:, 0] if head < probs.shape[-1] else ()
    if len(rest):
        every = probs[rest].sort(descending=True, stable=True)
        chosen[rest], _ = _draw_from(*every, draw[rest], sampling.top_p)
    return chosen


def _largest(probs: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """Return the n largest of each row and their ids, as a stable sort puts them."""
    ids = probs.topk(n, sorted=False).indices.sort(-1).values
    values, order = probs.gather(-1, ids).sort(descending=True, stable=True)
    return values, ids.gather(-1, order)


def _draw_from(probs: Tensor, ids: Tensor, draw: Tensor, top_p: float) -> tuple[Tensor, Tensor]:
    """Draw (n, 1) ids from the fewest of the (descending) probabilities that have the share top_p.

    Also returns (n,), whether the probabilities given were enough to know them: the last is left
    out, and smaller than all that are kept.
    """
    cumulative = probs.cumsum(-1)
    kept = cumulative - probs < top_p
    mass = torch.where(kept, probs, 0.0).sum(-1, keepdim=True)
    index = (cumulative <= draw * mass).sum(-1, keepdim=True)
    index = torch.minimum(index, kept.sum(-1, keepdim=True) - 1)
    smallest = probs.gather(-1, kept.sum(-1, keepdim=True) - 1)[:, 0]
    return ids.gather(-1, index), smallest > probs[:, -1]
