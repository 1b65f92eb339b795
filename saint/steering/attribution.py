"""Which latents caused this token: gradient × activation, the error term, and a check by ablation.

To first order, the change of a token's logit when a latent is taken away is the latent's activation
times the gradient of the logit along its decoder direction (Marks et al., arXiv:2403.19647; Nanda's
attribution patching). What the SAE does not reconstruct, its error, has a share of its own, which
says how much of the answer the latents can hold.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from llama_3 import Edit, HookPoint
from saint.stage.errors import UserError
from saint.steering.studio import Studio

N_PARTS = 10


@dataclass(frozen=True)
class Part:
    """One latent on one token of the prompt. effect: logits it adds to the chosen token."""

    latent: int
    position: int
    activation: float
    effect: float


@dataclass(frozen=True)
class Attribution:
    """What raised one next token.

    logit: the token's, above the mean over the vocabulary (a shift of all logits changes nothing).
    tokens: of the prompt, BOS included. parts: the strongest by size of effect. latents_total,
    error_total: sums of effect over all active latents, and of the SAE's error. error_share:
    |error| summed over positions, of that and |latents| together.
    """

    ids: list[int]
    tokens: list[str]
    token: str
    token_id: int
    logit: float
    parts: list[Part]
    latents_total: float
    error_total: float
    error_share: float
    sae: int = 0

    def to_json(self) -> dict[str, Any]:
        """Return a JSON-ready dictionary."""
        return asdict(self)


def attribute(
    studio: Studio,
    prompt: str,
    *,
    token: str | None = None,
    chat: bool = False,
    sae: int = 0,
    n_parts: int = N_PARTS,
) -> Attribution:
    """Attribute the token that follows a prompt to an SAE's active latents.

    token: its text, of which the first token counts; None takes the likeliest. BOS has no part.
    Raises UserError for an empty prompt or token.
    """
    ids = studio.encode(prompt, chat=chat)
    token_id = None if token is None else _first_token(studio, token)
    return attribute_ids(studio, ids, token_id, sae=sae, n_parts=n_parts)


def attribute_ids(
    studio: Studio,
    ids: Sequence[int],
    token_id: int | None,
    *,
    edits: Mapping[HookPoint, Edit] | None = None,
    sae: int = 0,
    n_parts: int = N_PARTS,
) -> Attribution:
    """Attribute the token that follows token ids (BOS included); None takes the likeliest.

    edits: those of a steered model, whose latents are then those of the edited activations.
    """
    dictionary = studio.dictionaries[sae]
    x, logits = _with_gradient(studio, ids, dictionary.hook, edits or {})
    if token_id is None:
        token_id = int(logits.argmax())
    logit = logits[token_id] - logits.mean()
    (gradient,) = torch.autograd.grad(logit, x)
    x, gradient = x.detach()[0].float(), gradient[0].float()
    z, mean, scale = dictionary.sae.normalise(x)
    active = dictionary.sae.encode(z)
    rebuilt = dictionary.sae.decode(active) * scale + mean
    values, indices = active.matrices()
    first = 1 if dictionary.sae.config.prepend_bos else 0
    values = values.clone()
    values[:first] = 0.0
    # (n_tokens, k): what a unit of each active latent adds to the logit.
    along = (
        torch.einsum("td,tkd->tk", gradient, dictionary.sae.W_dec.detach()[indices].float()) * scale
    )
    effects = values * along
    error = ((x - rebuilt) * gradient).sum(-1)[first:]
    order = effects.abs().flatten().topk(min(n_parts, int((values > 0).sum()))).indices.tolist()
    k = values.shape[1]
    parts = [
        Part(
            int(indices.flatten()[i]),
            i // k,
            float(values.flatten()[i]),
            float(effects.flatten()[i]),
        )
        for i in order
    ]
    sizes = float(error.abs().sum()), float(effects.sum(-1).abs().sum())
    return Attribution(
        ids=list(ids),
        tokens=[studio.tokenizer.token_text(i) for i in ids],
        token=studio.tokenizer.token_text(token_id),
        token_id=token_id,
        logit=float(logit.detach()),
        parts=parts,
        latents_total=float(effects.sum()),
        error_total=float(error.sum()),
        error_share=sizes[0] / max(1e-12, sum(sizes)),
        sae=sae,
    )


def _first_token(studio: Studio, text: str) -> int:
    ids = studio.tokenizer.encode(text, bos=False)
    if not ids:
        raise UserError("the token to attribute is empty")
    return ids[0]


def _with_gradient(
    studio: Studio, ids: Sequence[int], hook: HookPoint, edits: Mapping[HookPoint, Edit]
) -> tuple[Tensor, Tensor]:
    """Return the (edited) activation at a hook, a leaf with a gradient, and the last logits."""
    leaves: list[Tensor] = []

    def keep(x: Tensor, positions: Tensor) -> Tensor:
        after = edits[hook](x, positions) if hook in edits else x
        leaves.append(after.detach().requires_grad_(True))
        return leaves[-1]

    with torch.enable_grad():
        logits = studio.model(_row(studio, ids), edits={**edits, hook: keep})[0, -1]
    return leaves[0], logits


def _row(studio: Studio, ids: Sequence[int]) -> Tensor:
    return torch.tensor([list(ids)], device=studio.model.device)


@torch.no_grad()
def ablate_top(studio: Studio, attribution: Attribution) -> dict[str, float]:
    """Take the attributed parts away, all at once, and compare with what was expected.

    Returns "expected", minus the sum of their effects, and "got", the logit's real change (above
    the mean over the vocabulary).
    """
    dictionary = studio.dictionaries[attribution.sae]
    parts = attribution.parts

    def edit(x: Tensor, positions: Tensor) -> Tensor:
        _, _, scale = dictionary.sae.normalise(x)
        shift = torch.zeros_like(x, dtype=torch.float32)
        for part in parts:
            direction = dictionary.sae.W_dec.detach()[part.latent].float()
            shift[0, part.position] -= part.activation * direction
        return (x.float() + shift * scale).to(x.dtype)

    edits: dict[HookPoint, Edit] = {dictionary.hook: edit}
    tokens = _row(studio, attribution.ids)
    logits = studio.model(tokens, edits=edits)[0, -1]
    after = float(logits[attribution.token_id] - logits.mean())
    plain = studio.model(tokens)[0, -1]
    before = float(plain[attribution.token_id] - plain.mean())
    return {"expected": -sum(part.effect for part in parts), "got": after - before}
