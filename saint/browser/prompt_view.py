"""What fires on a prompt: tokens × active latents, as a terminal table or as a page."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from llama_3 import HookPoint, Llama, Tokenizer
from sae import TopKSparseAutoencoder
from saint.stage.errors import UserError
from saint.stage.html import inline, render

_TEMPLATES = Path(__file__).parent / "templates"
_N_STRANDS = 30


@dataclass(frozen=True)
class PromptActivations:
    """Active latents on every token of a prompt (BOS left out).

    tokens: display text, (n_tokens,). latents, values: (n_tokens, k) indices and activations, k the
    most that fire on a token, 0 where fewer do. maxima: (n_latents,) largest seen activations, or
    None if unknown. names: label by latent, for those that have one.
    """

    tokens: list[str]
    latents: np.ndarray
    values: np.ndarray
    maxima: np.ndarray | None
    names: Mapping[int, str]

    @property
    def unit(self) -> str:
        """What `strength` counts, in words."""
        if self.maxima is None:
            return "their activations (no largest activation is known)"
        return "their activations as a share of the largest seen"

    def name(self, latent: int) -> str:
        """Return a latent's number and label."""
        return f"#{latent} {self.names.get(latent, '')}".rstrip()

    @cached_property
    def shares(self) -> np.ndarray:
        """(n_tokens, k) activations as shares of their latent's largest, or of the prompt's."""
        largest = self.values.max(initial=0) if self.maxima is None else self.maxima[self.latents]
        return self.values / np.maximum(largest, np.finfo(np.float32).tiny)

    def strength(self, token: int, place: int) -> str:
        """Return an activation for display, see `unit`."""
        if self.maxima is None:
            return f"{self.values[token, place]:.3g}"
        return f"{100 * self.shares[token, place]:.0f} %"

    def strongest(self, token: int, n: int) -> list[int]:
        """Return the places in a token's row of its n strongest active latents."""
        order = np.argsort(-self.shares[token], kind="stable")[:n]
        return [int(place) for place in order if self.values[token, place] > 0]

    def strongest_anywhere(self, n: int) -> list[int]:
        """Return the n latents with the largest strength anywhere on the prompt."""
        flat = np.argsort(-self.shares.reshape(-1), kind="stable")
        fired = flat[self.values.reshape(-1)[flat] > 0]
        return list(dict.fromkeys(self.latents.reshape(-1)[fired].tolist()))[:n]


@torch.inference_mode()
def prompt_activations(
    model: Llama,
    tokenizer: Tokenizer,
    sae: TopKSparseAutoencoder,
    prompt: str,
    *,
    maxima: Tensor | None,
    names: Mapping[int, str],
) -> PromptActivations:
    """Run a prompt and encode each of its tokens. Raises UserError for an empty prompt."""
    config = sae.config
    if config.layer is None:
        raise UserError("the SAE does not know its layer: name it with --sae_layer_idx")
    ids = tokenizer.encode(prompt, bos=config.prepend_bos)
    first = int(config.prepend_bos)
    if len(ids) <= first:
        raise UserError("--prompt is empty")
    hook = HookPoint(config.layer, config.hook_point)
    captured = model.capture(torch.tensor([ids], device=model.device), [hook])[hook][0, first:]
    active = sae.encode(sae.normalise(captured.to(sae.W_enc.device))[0])
    values, latents = active.matrices()
    return PromptActivations(
        tokens=[tokenizer.token_text(i) for i in ids[first:]],
        latents=latents.cpu().numpy(),
        values=values.cpu().numpy(),
        maxima=None if maxima is None else maxima.cpu().numpy(),
        names=names,
    )


def terminal_table(found: PromptActivations, *, per_token: int, width: int) -> str:
    """Return one line per token: its text, then its strongest latents with their strengths."""
    texts = [repr(token)[1:-1] for token in found.tokens]
    column = min(20, max(len(text) for text in texts))
    lines = [f"{'token':<{column}}  strongest latents, with {found.unit}"]
    for token, text in enumerate(texts):
        cells = [
            f"{found.strength(token, place)} {found.name(int(found.latents[token, place]))}"
            for place in found.strongest(token, per_token)
        ]
        line = f"{text[:column]:<{column}}  {' | '.join(cells)}"
        lines.append(line if len(line) <= width else line[: width - 1] + "…")
    return "\n".join(lines)


def prompt_page(found: PromptActivations, *, title: str, about: str, per_token: int) -> str:
    """Return the page of a prompt: its strongest latents, then each token's."""
    return render(
        _TEMPLATES,
        "prompt.html",
        title=title,
        about=about,
        css=inline(_TEMPLATES / "browser.css"),
        unit=found.unit,
        strands=[_strand(found, i) for i in found.strongest_anywhere(_N_STRANDS)],
        rows=[_row(found, i, per_token) for i in range(len(found.tokens))],
    )


def _strand(found: PromptActivations, latent: int) -> dict[str, Any]:
    """One latent's label, and the prompt's pieces with how strongly it fires on each."""
    here = np.where((found.latents == latent) & (found.values > 0), found.shares, 0)
    places, shares = here.argmax(axis=1), here.max(axis=1)
    peak = int(shares.argmax())
    pieces = []
    for i, token in enumerate(found.tokens):
        shown = token.replace("\n", "⏎")
        fires = float(shares[i]) > 0
        # The space before a word stays outside of its mark.
        word = shown.lstrip(" ") if fires else shown
        pieces.append(
            {
                "space": shown[: len(shown) - len(word)],
                "text": word or "␣",
                "strength": found.strength(i, int(places[i])) if fires else "",
                "share": f"{min(float(shares[i]), 1):.3f}",
                "is_peak": i == peak,
            }
        )
    return {
        "name": found.names.get(latent) or f"Latent {latent}",
        "latent": latent,
        "strength": found.strength(peak, int(places[peak])),
        "peak": found.tokens[peak].strip(),
        "pieces": pieces,
    }


def _row(found: PromptActivations, token: int, per_token: int) -> dict[str, Any]:
    """One token and its strongest latents."""
    cells = [
        {
            "name": found.name(int(found.latents[token, place])),
            "strength": found.strength(token, place),
            "share": f"{min(found.shares[token, place], 1):.3f}",
        }
        for place in found.strongest(token, per_token)
    ]
    return {"token": found.tokens[token].replace("\n", "⏎").strip(" ") or "␣", "cells": cells}
