"""The steering page's named API: plain JSON in, plain JSON out."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable, Iterator
from dataclasses import asdict
from typing import Any

from saint.page.handlers import PageHandlers
from saint.page.mix import MAX_QUERY_CHARS
from saint.stage.errors import UserError
from saint.steering import attribution
from saint.steering.completions import stream_pairs
from saint.steering.dose import dose_request, sweep
from saint.steering.settings import MAX_CONCEPT_LATENTS, Setting, request_from_json
from saint.steering.studio import EXAMPLE_PROMPTS
from saint.steering.vector import export_vector


def api_endpoints(handlers: PageHandlers) -> dict[str, Callable[..., Any]]:
    """Return the named API: plain JSON in, plain JSON out."""
    found = (*_writing(handlers), *_looking(handlers))
    return {function.__name__: function for function in found}


def _writing(handlers: PageHandlers) -> tuple[Callable[..., Any], ...]:
    """Endpoints that steer, and what they steer with."""

    def steer(request: dict) -> Iterator[dict]:
        """Complete `prompts` plainly and steered; `request` as in the copied JSON's "request"."""
        parsed = request_from_json(request, handlers.concepts.setting)
        # Gradio ends a generator whose client has left; anything else would run to its end.
        for progress in stream_pairs(handlers.studio, parsed):
            if progress.pairs is None:
                yield {"texts": progress.texts}
            else:
                pairs = [pair.to_json() for pair in progress.pairs]
                yield {"request": parsed.to_json(), "pairs": pairs}

    def concept(
        query: str, against: str = "", use: str = "means", n_latents: int = 16, sae: int = 0
    ) -> dict:
        """Make a concept of a word, a phrase, or two texts; `steer` takes it as "name=+8"."""
        found = handlers.concepts.find(
            str(query)[:MAX_QUERY_CHARS],
            against=str(against)[:MAX_QUERY_CHARS],
            use=str(use),
            n_latents=max(1, min(int(n_latents), MAX_CONCEPT_LATENTS)),
            sae=int(sae),
        )
        guide = handlers.guides[found.sae]
        record: dict[str, Any] = {"name": found.name} | found.to_json()
        for latent, part in record["latents"].items():
            part["label"] = guide.label(latent)
        return json.loads(json.dumps(record))

    def dose(
        setting: str,
        prompts: list | None = None,
        seed: int = 0,
        where: str = "both",
        chat: bool = False,
    ) -> Iterator[dict]:
        """Sweep a latent's strength or a concept's dose ("896=+1", "film=+8"), and propose one."""
        record = {"prompts": prompts or list(EXAMPLE_PROMPTS[:1]), "steer": [setting]}
        record |= {"seed": seed, "where": where, "chat": chat}
        wanted = request_from_json(record, handlers.concepts.setting)
        more = () if prompts else EXAMPLE_PROMPTS[1:]
        varied = dose_request(handlers.studio, wanted, more=more)
        for report in sweep(handlers.studio, wanted.wishes[0], varied):
            yield report.to_json()

    def steering_vector(steer: list) -> dict:
        """Return a steering vector: {"safetensors": base64 text}."""
        wanted = request_from_json({"steer": steer}, handlers.concepts.setting)
        data = export_vector(handlers.studio, wanted.settings, wanted.concepts)
        return {"safetensors": base64.b64encode(data).decode()}

    return steer, concept, dose, steering_vector


def _looking(handlers: PageHandlers) -> tuple[Callable[..., Any], ...]:
    """Endpoints that look at latents, prompts and what is loaded."""

    def search(query: str, by: str = "label") -> list:
        """Find latents by "label", "token" or "example text"."""
        hits = handlers.hits(by, query)
        return [asdict(h) | {"label": handlers.guides[h.sae].label(h.latent)} for h in hits]

    def latent(index: int, sae: int = 0) -> dict:
        """What is known of one latent: label, unit, density, strongest windows."""
        handlers.studio.check_settings([Setting(int(index), sae=int(sae))])
        return asdict(handlers.card(int(sae), int(index)))

    def prompt_view(prompt: str, chat: bool = False) -> dict:
        """Tokens of a prompt and the activations (in units) of the latents that stand out."""
        tokens, rows = handlers.prompt_rows(prompt, (), bool(chat))
        named = [
            {"sae": s.sae, "latent": s.latent, "activations": v}
            for s, v in rows
            if isinstance(s, Setting)
        ]
        return {"tokens": tokens, "latents": named}

    def attribute(
        prompt: str, token: str = "", chat: bool = False, ablate: bool = False, sae: int = 0
    ) -> dict:
        """Which latents raised the next token (the likeliest, where none is named)."""
        if not 0 <= int(sae) < len(handlers.guides):
            raise UserError(f"SAE {sae}: {len(handlers.guides)} loaded, counted from 0")
        prompt = str(prompt)[: handlers.studio.limits.prompt_chars]
        found = attribution.attribute(
            handlers.studio, prompt, token=str(token) or None, chat=bool(chat), sae=int(sae)
        )
        labels = {str(p.latent): handlers.guides[found.sae].label(p.latent) for p in found.parts}
        change = attribution.ablate_top(handlers.studio, found) if ablate else None
        return found.to_json() | {"labels": labels, "ablated": change}

    def info() -> dict:
        """What is loaded, and what one request may ask for."""
        return _loaded(handlers)

    return search, latent, prompt_view, attribute, info


def _loaded(handlers: PageHandlers) -> dict[str, Any]:
    saes = [
        {
            "name": d.name,
            "layer": d.hook.layer,
            "hook_point": d.hook.name,
            "n_latents": d.sae.config.n_latents,
            "unit": d.unit_source,
            "n_labels": len(guide.labels),
        }
        for d, guide in zip(handlers.studio.dictionaries, handlers.guides, strict=True)
    ]
    chat = handlers.studio.tokenizer.has_chat
    return {"saes": saes, "limits": asdict(handlers.studio.limits), "chat": chat}
