"""Many sampled texts at once, each row steered by a vector of its own, and read back.

Directions are compared on what the model then writes: `write` samples a batch of texts,
`read_back` lets the plain model read them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from llama_3 import Edit, HookPoint, Llama, Sampling, Tokenizer, generate
from sae import standardise

_UNEMBED_ROWS = 512
TEMPERATURE = 0.8
DRAWN = Sampling(TEMPERATURE)


@dataclass(frozen=True)
class Written:
    """A generated text, BOS and prompt left out, as the plain model reads it.

    ids: generated tokens. surprise: nats per token, -log p(token) under the plain model.
    distinct: share of neighbouring pairs of tokens that occur for the first time.
    """

    text: str
    ids: list[int]
    surprise: float
    distinct: float


def vector_edit(vectors: Tensor, *, first: int, ends: Tensor | None = None) -> Edit:
    """Return an edit x + std(x) · vectors[row] at every position from `first` on.

    vectors: (n_rows, d_model), of any length, in the order of the batch's rows. ends: (n_rows,),
    tokens of each row's prompt: then only what is generated after them is edited.
    """

    def edit(x: Tensor, positions: Tensor) -> Tensor:
        _, _, scale = standardise(x)
        edited = positions >= first
        if ends is not None:
            edited = edited & (positions >= ends[:, None])
        after = (x.float() + scale * vectors[:, None]).to(x.dtype)
        return torch.where(edited.unsqueeze(-1), after, x)

    return edit


def write(
    model: Llama,
    tokenizer: Tokenizer,
    prompts: Sequence[Sequence[int]],
    *,
    n_tokens: int,
    seeds: Sequence[int],
    edits: Mapping[HookPoint, Edit] | None = None,
    sampling: Sampling = DRAWN,
) -> list[list[int]]:
    """Sample n_tokens after each prompt, one seed a row; a stop token ends a row."""
    rows: list[list[int]] = [[] for _ in prompts]
    for step in generate(
        model,
        prompts,
        max_new_tokens=n_tokens,
        sampling=replace(sampling, seed=tuple(seeds)),
        stop_ids=tokenizer.stop_ids,
        edits=edits,
    ):
        for row, token in zip(rows, step, strict=True):
            if token is not None:
                row.append(token)
    return rows


@torch.no_grad()
def read_back(
    model: Llama,
    tokenizer: Tokenizer,
    prompts: Sequence[Sequence[int]],
    generated: Sequence[Sequence[int]],
) -> list[Written]:
    """Let the plain model read each text after its prompt (which may differ from the one used)."""
    rows = [[*prompt, *new] for prompt, new in zip(prompts, generated, strict=True)]
    width = max(map(len, rows))
    tokens = torch.tensor([row + [0] * (width - len(row)) for row in rows], device=model.device)
    hook = HookPoint(len(model.layers) - 1, "resid_post")
    resid = model.capture(tokens, [hook])[hook]
    mask = torch.zeros(tokens.shape, dtype=torch.bool, device=model.device)
    for i, (prompt, row) in enumerate(zip(prompts, rows, strict=True)):
        mask[i, len(prompt) - 1 : len(row) - 1] = True
    flat, targets = resid[mask], tokens.roll(-1, 1)[mask]
    losses = [
        torch.nn.functional.cross_entropy(
            model.unembed(flat[i : i + _UNEMBED_ROWS]), targets[i : i + _UNEMBED_ROWS],
            reduction="none",
        )
        for i in range(0, len(flat), _UNEMBED_ROWS)
    ]  # fmt: skip
    per_token = torch.cat(losses).tolist() if losses else []
    found, at = [], 0
    for new in generated:
        own = per_token[at : at + len(new)]
        at += len(new)
        surprise = sum(own) / len(own) if own else 0.0
        text = tokenizer.decode(new)
        found.append(Written(text, list(new), surprise, distinct_pairs(new)))
    return found


def distinct_pairs(ids: Sequence[object]) -> float:
    """Return the share of neighbouring pairs that occur for the first time; 1 without pairs."""
    pairs = list(zip(ids, ids[1:], strict=False))
    return len(set(pairs)) / len(pairs) if pairs else 1.0
