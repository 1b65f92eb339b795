"""HTML of the steering page: completions, latent cards, prompt view, dose plot.

The markup is in templates/fragments.html, where every value is escaped; here is what it shows.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from math import exp
from pathlib import Path
from typing import Any

from markupsafe import Markup

from saint.page.conversation import Exchange
from saint.stage import plots
from saint.stage.html import fragment, inline, render
from saint.stage.terminal import visible
from saint.steering.attribution import Attribution
from saint.steering.completions import Effect, Pair, Reading, Streamed
from saint.steering.dose import (
    CONCEPT_DOSES,
    DEFAULT_STRENGTHS,
    MAX_LOSS,
    MIN_DISTINCT_SHARE,
    DoseReport,
)
from saint.steering.guide import INTRUDER_CHANCE, Guide
from saint.steering.search import Card, Hit
from saint.steering.settings import ConceptSetting, Request, Setting, Wish
from saint.steering.texts import distinct_pairs

_HERE = Path(__file__).parent
_TEMPLATES = _HERE / "templates"
# One hue per chosen latent, in the order of the mix; red is kept for surprise.
HUES = (
    (234, 138, 20),
    (37, 120, 225),
    (22, 150, 90),
    (150, 80, 220),
    (0, 150, 170),
    (200, 70, 150),
)
_SURPRISING_NATS = 8.0
_SHOWS = 0.02  # units more than in the plain text, per token: less does not show
_DEEPEST = 0.6  # of the prompt view's colour: black and white text can both be read on it
_SEEN = 0.005  # in units: less is not shown as an activation


def _filled(macro: str, *values: Any) -> Markup:
    return fragment(_TEMPLATES, "fragments.html", macro, *values)


def hue(index: int) -> str:
    """The colour of the index-th chosen latent, as "r,g,b"."""
    return ",".join(map(str, HUES[index % len(HUES)]))


def wish_name(setting: Wish, guides: Sequence[Guide]) -> str:
    """A concept's name; a latent's label, or its number where it has none."""
    if isinstance(setting, ConceptSetting):
        return visible(setting.concept.name)
    label = guides[setting.sae].label(setting.latent)
    return f"{label} (#{setting.latent})" if label else f"latent #{setting.latent}"


def header_html(facts: str) -> Markup:
    """What the page is about; facts: what is loaded, in words."""
    return _filled("header", facts)


def chips_html(labels: Sequence[tuple[str, str]], prompts: Sequence[str]) -> Markup:
    """Buttons that fill the page with an example. labels: with what was seen of each."""
    return _filled("chips", labels, prompts)


def download_html(name: str, data: str) -> Markup:
    """A link that holds a file; data: base64."""
    return _filled("download", name, data)


def streaming_html(request: Request, written: Streamed, turns: Sequence[Exchange] = ()) -> Markup:
    """Completions while they are being written, with what Stop has to know of them."""
    rows = [
        (prompt, list(zip(("Plain", "Steered"), both, strict=True)))
        for prompt, both in zip(request.prompts, written.texts, strict=True)
    ]
    ids = json.dumps({"rows": written.rows, "n_prompts": written.n_prompts})
    return _filled("streaming", rows, ids, request.chat, turns)


def pairs_html(
    pairs: Sequence[Pair],
    guides: Sequence[Guide],
    *,
    chat: bool = False,
    turns: Sequence[Exchange] = (),
) -> Markup:
    """Finished completions with token colours, what they cost, and what each setting did.

    turns: of a chat, those before.
    """
    settings = [effect.setting for effect in pairs[0].effects] if pairs else []
    rows = []
    for pair in pairs:
        verdict, broken = _verdict(pair)
        verdict = " ".join([verdict, *_silent(pair, guides)])
        sides = [
            {
                "name": name,
                "lead": "",
                "tokens": _tokens(reading, settings, chat),
                "foot": _fluency(reading),
                "ids": reading.ids,
                "n_prompt": len(reading.ids) - len(reading.tokens) + reading.n_prompt,
            }
            for name, reading in (("Plain", pair.plain), ("Steered", pair.steered))
        ]
        effects = _effects(pair.effects, guides)
        row = {"sides": sides, "verdict": verdict, "broken": broken, "effects": effects}
        rows.append(row | {"said": pair.prompt if chat else ""})
    legend = [(hue(i), wish_name(setting, guides)) for i, setting in enumerate(settings)]
    return _filled("pairs", rows, legend, _whole_edit(pairs), turns)


def _whole_edit(pairs: Sequence[Pair]) -> str:
    """How long all edits together are, of the residual they are added to, over all pairs."""
    moved: dict[str, list[float]] = {}
    for pair in pairs:
        for hook, share in pair.moved.items():
            moved.setdefault(hook, []).append(share)
    means = {hook: sum(shares) / len(shares) for hook, shares in moved.items()}
    if len(means) == 1:
        return f"{next(iter(means.values())):.0%}"
    return ", ".join(f"{share:.0%} at {hook}" for hook, share in means.items())


def _tokens(reading: Reading, settings: Sequence[Wish], chat: bool) -> list[dict[str, Any]]:
    """The tokens to show: in a chat the prompt's are the template's own, and left out."""
    first = reading.n_prompt if chat else 0
    return [_token(reading, i, settings) for i in range(first, len(reading.tokens))]


def _token(reading: Reading, i: int, settings: Sequence[Wish]) -> dict[str, Any]:
    """One token: background = strongest chosen latent, red underline = surprise, both in words."""
    activations, surprise = reading.activations[i], reading.surprise[i]
    generated = i >= reading.n_prompt
    notes, styles = [], []
    depths = [_depth(wish, value) for wish, value in zip(settings, activations, strict=False)]
    if depths and max(depths) > _SEEN:
        strongest = max(range(len(depths)), key=depths.__getitem__)
        alpha = 0.12 + 0.43 * depths[strongest]
        styles.append(f"background:rgba({hue(strongest)},{alpha:.2f})")
    for setting, value in zip(settings, activations, strict=False):
        if value > _SEEN:
            short = f"#{setting.latent}" if isinstance(setting, Setting) else setting.concept.name
            notes.append(f"{short}: {value:.2f}×")
    if surprise is not None:
        notes.append(f"surprise {surprise:.1f} nats")
        if generated and surprise > 1:
            alpha = min(1.0, surprise / _SURPRISING_NATS)
            styles.append(f"box-shadow:inset 0 -2px rgba(220,38,38,{alpha:.2f})")
    text = reading.tokens[i]
    if i == len(reading.tokens) - 1:
        text = text.rstrip("\ufffd")  # the end cut a character in two
    word = text.lstrip(" ") or text
    return {
        "generated": generated,
        "notes": "; ".join(notes),
        "style": ";".join(styles),
        "space": text.removesuffix(word),
        "word": word,
    }


def _fluency(reading: Reading) -> str:
    surprise = reading.mean_surprise
    if surprise is None:
        return "nothing was written"
    return f"surprise {surprise:.2f} nats per token (perplexity {exp(min(surprise, 50)):.1f})"


def _verdict(pair: Pair) -> tuple[str, bool]:
    """What the steering cost, in words, and whether the text fell apart."""
    plain, steered = pair.plain.mean_surprise, pair.steered.mean_surprise
    if not pair.effects:
        return "Nothing is steered: choose a concept to see a difference.", False
    if pair.plain.text == pair.steered.text:
        return "Same text. A stronger setting may tip the model over.", False
    if plain is None or steered is None:
        return "", False
    lost = steered - plain
    if _distinct(pair.steered) < MIN_DISTINCT_SHARE * _distinct(pair.plain):
        # A loop is easy to predict: surprise alone would call it fluent.
        return "The steered text runs in circles. Turn it down.", True
    if lost > 2 * MAX_LOSS:
        return f"Fluency breaks: {lost:+.2f} nats per token. Turn it down.", True
    word = "Still fluent" if lost <= MAX_LOSS else "Fluency suffers"
    return f"{word}: {lost:+.2f} nats per token.", False


def _silent(pair: Pair, guides: Sequence[Guide]) -> list[str]:
    """A sentence for each latent that was turned up and is no stronger in the text for it."""
    if pair.plain.text == pair.steered.text:
        return []
    plain, steered = (mean_activations(reading) for reading in (pair.plain, pair.steered))
    rows = zip(pair.effects, plain, steered, strict=False)
    return [
        f"{wish_name(effect.setting, guides)} does not show in the text."
        for effect, before, after in rows
        if effect.setting.mode in ("add", "set")
        and strength_of(effect.setting) > 0
        and after < before + _SHOWS
    ]


def strength_of(wish: Wish) -> float:
    """A latent's strength, or a concept's dose."""
    return wish.dose if isinstance(wish, ConceptSetting) else wish.strength


def mean_activations(reading: Reading) -> list[float]:
    """Each chosen latent's mean activation over the generated tokens, in units."""
    rows = reading.activations[reading.n_prompt :]
    return [sum(values) / len(rows) for values in zip(*rows, strict=True)]


def opening_html(name: str, doses: Sequence[tuple[float, Pair]], chosen: int) -> Markup:
    """A finished pair whose steered side follows a slider. doses: by strength, first 0."""
    settings = [effect.setting for effect in doses[-1][1].effects]
    plain = doses[0][1].plain
    shown = [
        {
            "says": _dose_says(settings[0], strength) if strength else "not at all",
            "lead": "",
            "tokens": _tokens(pair.steered if strength else plain, settings, False),
            "foot": _fluency(pair.steered if strength else plain),
        }
        for strength, pair in doses
    ]
    left = {"lead": "", "tokens": _tokens(plain, settings, False), "foot": _fluency(plain)}
    return _filled("opening", {"name": name, "doses": shown, "chosen": chosen, "plain": left})


def _dose_says(wish: Wish, strength: float) -> str:
    return f"dose {strength:g}" if isinstance(wish, ConceptSetting) else f"{strength:g}×"


def _distinct(reading: Reading) -> float:
    return distinct_pairs(reading.tokens[reading.n_prompt :])


def _effects(effects: Sequence[Effect], guides: Sequence[Guide]) -> list[dict[str, Any]]:
    rows = []
    for i, effect in enumerate(effects):
        cells = []
        if effect.target is not None and effect.share is not None:
            numbers = (effect.present or 0.0, effect.target, effect.realised or 0.0)
            latent = isinstance(effect.setting, Setting)
            cells = [f"{value:.2f}×" if latent else f"{value:+.1f} std" for value in numbers]
        row = {"hue": hue(i), "name": wish_name(effect.setting, guides), "cells": cells}
        rows.append(row | {"address": _address(effect.setting, guides)})
    return rows


def _address(wish: Wish, guides: Sequence[Guide]) -> str:
    return guides[wish.sae].address(wish.latent) if isinstance(wish, Setting) else ""


def cards_html(cards: Sequence[tuple[Card, Hit | None]], *, n_saes: int, note: str = "") -> Markup:
    """Search results, each with a button that puts the latent into the mix."""
    return _filled("cards", [_card(card, hit, n_saes) for card, hit in cards], note)


def _card(card: Card, hit: Hit | None, n_saes: int) -> dict[str, Any]:
    facts = [f"#{card.latent}" if n_saes == 1 else f"SAE {card.sae} · #{card.latent}"]
    if hit is not None and hit.reason != "label":
        facts.append(hit.reason)
    if card.score is not None:
        facts.append(f"label tested: {card.score:.0%} right")
    elif card.certainty is not None:
        facts.append(f"label certainty {card.certainty:.0%}, untested")
    if card.intruder is not None:
        facts.append(f"odd one out found in {card.intruder:.0%} (chance {INTRUDER_CHANCE:.0%})")
    if card.effect:
        facts.append(f"turned up: {card.effect}")
    if card.measured:
        facts.append(card.measured)
    if card.density is not None:
        facts.append(f"on {card.density:.2%} of tokens" if card.density else "never seen firing")
    return {
        "sae": card.sae,
        "latent": card.latent,
        "title": card.label or f"latent {card.latent}",
        "address": card.address,
        "facts": facts,
        "windows": [_pieces(*window) for window in card.windows],
        "promoted": ", ".join(token.strip() for token in card.promoted if token.strip()),
    }


def _pieces(tokens: Sequence[str], activations: Sequence[float]) -> list[tuple[str, str]]:
    """A window's tokens and how dark each is marked, "" where it does not fire."""
    alphas = (f"{min(0.7, 0.1 + 0.6 * v):.2f}" if v > 0.02 else "" for v in activations)
    return list(zip(tokens, alphas, strict=False))


def prompt_view_html(
    tokens: Sequence[str], rows: Sequence[tuple[Wish, list[float]]], guides: Sequence[Guide]
) -> Markup:
    """Tokens × latents: cells coloured by activation in units."""
    shown = [
        {
            "latent": setting if isinstance(setting, Setting) else None,
            "name": wish_name(setting, guides),
            "cells": [_cell(setting, value) for value in values],
        }
        for setting, values in rows
    ]
    return _filled("prompt_view", [_visible(token) for token in tokens], shown)


def _cell(wish: Wish, value: float) -> tuple[str, str, str]:
    """An activation's figure, its words and the depth of its colour."""
    depth = f"{_DEEPEST * _depth(wish, value):.2f}"
    return "" if value < 0.05 else f"{value:.1f}", f"{value:.2f}×", depth


def _depth(wish: Wish, value: float) -> float:
    """How deep an activation's colour is, 0 to 1.

    A latent's from nothing to its unit. A concept's from its own tokens' average, which most texts
    reach here and there, to four times that, where its own words lie.
    """
    if not isinstance(wish, Setting):
        value = (value - 1) / 3
    return min(1.0, max(0.0, value))


def _visible(token: str) -> str:
    """A token's text, or a sign for one that nobody would see."""
    if any(c.isprintable() and not c.isspace() for c in token):
        return token
    return "↵" if "\n" in token else "␣"


def why_html(found: Attribution, guide: Guide) -> Markup:
    """Which latents raised a token, with the share that no latent holds."""
    total = sum(abs(part.effect) for part in found.parts) or 1.0
    rows = [
        {
            "sae": found.sae,
            "latent": part.latent,
            "name": guide.label(part.latent) or f"latent {part.latent}",
            "address": guide.address(part.latent),
            "on": found.tokens[part.position],
            "effect": f"{part.effect:+.2f}",
            "width": f"{100 * abs(part.effect) / total:.0f}",
        }
        for part in found.parts
    ]
    facts = {
        "token": found.token,
        "logit": f"{found.logit:.1f}",
        "latents": f"{found.latents_total:+.2f}",
        "error": f"{found.error_total:+.2f}",
        "share": f"{found.error_share:.0%}",
    }
    return _filled("why", facts, rows)


def dose_html(report: DoseReport, guides: Sequence[Guide]) -> Markup:
    """The sweep as two curves, a table with samples, and the proposal in words."""
    name, proposed = wish_name(report.setting, guides), ""
    if report.proposed is not None:
        verdict, proposed = "Strongest dose before fluency breaks:", f"{report.proposed:g}"
        if not report.shows:
            verdict = "This does not show in the text, up to"
    elif len(report.points) > 1:
        verdict = "Even the weakest dose here breaks fluency: try smaller ones."
    else:
        verdict = "Measuring…"
    unit, curves = "×" if isinstance(report.setting, Setting) else "", _dose_curves(report)
    rows = [
        {
            "dose": f"{p.strength:g}{unit}",
            "proposed": p.strength == report.proposed,
            "cells": (f"{p.concept:.2f}×", f"{exp(min(p.surprise, 50)):.1f}", f"{p.distinct:.0%}"),
            "sample": p.sample,
        }
        for p in report.points
    ]
    return _filled("dose", name, verdict, f"{proposed}{unit}" if proposed else "", curves, rows)


def _dose_curves(report: DoseReport) -> list[Markup]:
    """Over the dose: the concept in the text, and what it costs in fluency."""
    points = report.points
    if len(points) < 2:
        return []
    # The same axes for every latent, and while the sweep grows.
    latent = isinstance(report.setting, Setting)
    most = (DEFAULT_STRENGTHS if latent else CONCEPT_DOSES)[-1]
    dose, chosen = plots.Axis("dose", unit="×" if latent else "", include=(0.0, most)), []
    if report.proposed is not None:
        chosen = [plots.Rule("x", report.proposed, "proposed")]
    losses = [(p.strength, p.surprise - points[0].surprise) for p in points]
    limit = plots.Rule("y", report.limit, "limit")
    return [
        plots.line_chart(
            "concept in the text",
            [plots.Series("concept", [(p.strength, p.concept) for p in points])],
            x=dose,
            y=plots.Axis(unit="×", include=(0.0, 1.0)),
            rules=chosen,
        ),
        plots.line_chart(
            "loss of fluency",
            [plots.Series("loss", losses)],
            x=dose,
            y=plots.Axis("nats per token", include=(0.0, 4 * MAX_LOSS)),
            rules=[*chosen, limit],
        ),
    ]


def report_page(title: str, body: str) -> str:
    """A whole HTML file around fragments, readable without any server."""
    css = inline(_HERE / "page.css")
    values = {"title": title, "body": Markup(body), "css": css, "plot_style": plots.STYLE}
    return render(_TEMPLATES, "report.html", **values)
