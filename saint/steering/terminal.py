"""What the terminal shows: concepts, search results, pairs of texts, a token's causes."""

from __future__ import annotations

import json
from collections.abc import Mapping

from saint.stage.terminal import show
from saint.steering.attribution import Attribution, ablate_top, attribute
from saint.steering.completions import Effect, Pair
from saint.steering.guide import Guide
from saint.steering.search import Hit
from saint.steering.settings import Concept, ConceptSetting, Request
from saint.steering.studio import Studio


def print_concept(concept: Concept, guide: Guide) -> None:
    """Print what a concept is made of."""
    used = "difference of means" if concept.use == "means" else f"{len(concept.latents)} latents"
    show(f"{concept.name}: {used}, from {concept.source} ({concept.n_tokens} tokens)")
    show(f"  the latents explain {concept.explained:.0%} of the difference of means:")
    shares = concept.shares or (0.0,) * len(concept.latents)
    for latent, weight, part in zip(concept.latents, concept.weights, shares, strict=True):
        label = guide.label(latent) or "(no label)"
        show(f"  {latent:>7}  weight {weight:.2f}  share {part:.2f}  {label}")


def _print_attribution(
    prompt: str, found: Attribution, change: Mapping[str, float] | None, guide: Guide
) -> None:
    """Print what raised a token, and what ablating the top latents changed where that was tried."""
    show(f"\n> {prompt}\n  next token {found.token!r}: logit {found.logit:.2f} above the mean")
    for part in found.parts:
        label = guide.label(part.latent) or "(no label)"
        where = found.tokens[part.position].strip()
        show(f"  {part.effect:+7.3f}  {part.latent:>7}  on {where!r}  {label}")
    show(
        f"  all latents {found.latents_total:+.3f}, error term {found.error_total:+.3f} "
        f"({found.error_share:.0%} of what both move)"
    )
    if change is not None:
        show(f"  ablating these: expected {change['expected']:+.3f}, got {change['got']:+.3f}")


def print_attributions(
    studio: Studio,
    guides: list[Guide],
    request: Request,
    *,
    token: str | None,
    ablate: bool,
    as_json: bool,
) -> None:
    """Print which latents raised the next token of each prompt; see `attribute`."""
    records = []
    for prompt in request.prompts:
        found = attribute(studio, prompt, token=token, chat=request.chat)
        change = ablate_top(studio, found) if ablate else None
        records.append(found.to_json() | {"ablated": change})
        if not as_json:
            _print_attribution(prompt, found, change, guides[found.sae])
    if as_json:
        print(json.dumps(records, ensure_ascii=False))


def print_pair(pair: Pair, guides: list[Guide]) -> None:
    """Print both texts, their cost, and what the edit did."""
    show(f"\n> {pair.prompt}")
    for name, reading in (("plain", pair.plain), ("steered", pair.steered)):
        surprise = reading.mean_surprise
        cost = "" if surprise is None else f"  [{surprise:.2f} nats per token]"
        show(f"{name:>8}:{reading.text}{cost}")
    if pair.moved:
        shares = ", ".join(f"{share:.0%} at {hook}" for hook, share in pair.moved.items())
        show(f"          moved the residual by {shares}")
    for effect in pair.effects:
        setting = effect.setting
        if isinstance(setting, ConceptSetting):
            _print_concept_effect(effect, setting)
            continue
        name = f"latent {setting.latent} {guides[setting.sae].label(setting.latent)}".strip()
        if effect.target is None:
            show(f"          {name}: no token was edited")
            continue
        outcome = f"{effect.present:.2f} → target {effect.target:.2f}, got {effect.realised:.2f}"
        show(f"          {name}: {outcome} × its largest; {effect.share:.0%} of the residual")


def _print_concept_effect(effect: Effect, setting: ConceptSetting) -> None:
    if effect.target is None:
        show(f"          {setting.concept.name}: no token was edited")
        return
    outcome = f"{effect.present:+.1f} → target {effect.target:+.1f}, got {effect.realised:+.1f}"
    show(f"          {setting.concept.name}: {outcome} standard deviations above an average token")


def print_hits(hits: list[Hit], guides: list[Guide], *, as_json: bool) -> None:
    """Print search results, best first."""
    rows = [
        {"sae": h.sae, "latent": h.latent, "label": guides[h.sae].label(h.latent),
         "score": round(h.score, 4), "reason": h.reason}
        for h in hits
    ]  # fmt: skip
    if as_json:
        print(json.dumps(rows, ensure_ascii=False))
        return
    for row in rows:
        show(f"{row['sae']}:{row['latent']}  {row['label'] or '(no label)'}  ({row['reason']})")
    if not rows:
        show("nothing found; --find_token and --find_text look beyond the labels")
