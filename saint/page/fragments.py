"""HTML fragments of the steering page: completions, latent cards, prompt view, dose plot.

Every text that comes from a file, a model or a visitor goes through `html.escape`.
"""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from math import exp
from pathlib import Path

from saint.steering.completions import Effect, Pair, Reading
from saint.steering.dose import MAX_LOSS, MIN_DISTINCT_SHARE, DoseReport, distinct_pairs
from saint.steering.guide import INTRUDER_CHANCE, Guide
from saint.steering.search import Card, Hit
from saint.steering.settings import Setting

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
_TICK_WIDTH = 36  # of the plot's units, for a number like 0.75 on a narrow screen


def hue(index: int) -> str:
    """The colour of the index-th chosen latent, as "r,g,b"."""
    return ",".join(map(str, HUES[index % len(HUES)]))


def latent_name(setting: Setting, guides: Sequence[Guide]) -> str:
    """A latent's label, or its number where it has none."""
    label = guides[setting.sae].label(setting.latent)
    return f"{label} (#{setting.latent})" if label else f"latent #{setting.latent}"


def streaming_html(prompts: Sequence[str], texts: Sequence[tuple[str, str]]) -> str:
    """Completions while they are being written."""
    blocks = []
    for prompt, (plain, steered) in zip(prompts, texts, strict=True):
        lead = f"<span class='prompt'>{escape(prompt)}</span>"
        panes = (
            _pane(name, f"{lead}{escape(text)}<i class='caret'></i>")
            for name, text in (("Plain", plain), ("Steered", steered))
        )
        blocks.append(f"<div class='pair'>{''.join(panes)}</div>")
    return f"<div class='pairs' aria-live='polite'>{''.join(blocks)}</div>"


def pairs_html(pairs: Sequence[Pair], guides: Sequence[Guide], *, chat: bool = False) -> str:
    """Finished completions with token colours, what they cost, and what each setting did."""
    blocks = []
    settings = [effect.setting for effect in pairs[0].effects] if pairs else []
    for pair in pairs:
        panes = []
        for name, reading in (("Plain", pair.plain), ("Steered", pair.steered)):
            lead = escape(pair.prompt) if chat else ""
            panes.append(_pane(name, _tokens(reading, settings, lead, chat), _fluency(reading)))
        cost = _cost(pair)
        blocks.append(
            f"<div class='pair'>{''.join(panes)}</div>{cost}{_effects(pair.effects, guides)}"
        )
    return f"<div class='pairs done'>{legend_html(settings, guides)}{''.join(blocks)}</div>"


def _pane(name: str, body: str, foot: str = "") -> str:
    kind = name.lower()
    return (
        f"<section class='pane {kind}'><h4>{name}</h4>"
        f"<p class='text' data-side='{kind}'>{body}</p><footer>{foot}</footer></section>"
    )


def _tokens(reading: Reading, settings: Sequence[Setting], lead: str, chat: bool) -> str:
    spans = [f"<span class='prompt'>{lead}</span>"] if chat else []
    for i in range(len(reading.tokens)):
        generated = i >= reading.n_prompt
        if chat and not generated:
            continue
        spans.append(_token(reading, i, settings, generated))
    return "".join(spans)


def _token(reading: Reading, i: int, settings: Sequence[Setting], generated: bool) -> str:
    """One token: background = strongest chosen latent, red underline = surprise, both in words."""
    activations, surprise = reading.activations[i], reading.surprise[i]
    notes, styles = [], []
    if activations and max(activations) > 0.005:
        strongest = max(range(len(activations)), key=activations.__getitem__)
        alpha = min(0.75, 0.12 + 0.6 * activations[strongest])
        styles.append(f"background:rgba({hue(strongest)},{alpha:.2f})")
    for setting, value in zip(settings, activations, strict=False):
        if value > 0.005:
            notes.append(f"#{setting.latent}: {value:.2f}×")
    if surprise is not None:
        notes.append(f"surprise {surprise:.1f} nats")
        if generated and surprise > 1:
            alpha = min(1.0, surprise / _SURPRISING_NATS)
            styles.append(f"box-shadow:inset 0 -2px rgba(220,38,38,{alpha:.2f})")
    kind = "tok" if generated else "tok prompt"
    # The space before a word stays plain: at the end of a line it would be all that is coloured.
    word = reading.tokens[i].lstrip(" ") or reading.tokens[i]
    space = reading.tokens[i].removesuffix(word)
    body = f"<span style='{';'.join(styles)}'>{escape(word)}</span>" if styles else escape(word)
    title = escape("; ".join(notes), quote=True)
    return f"<span class='{kind}' title='{title}'>{space}{body}</span>"


def _fluency(reading: Reading) -> str:
    surprise = reading.mean_surprise
    if surprise is None:
        return "nothing was written"
    return f"surprise {surprise:.2f} nats per token (perplexity {exp(min(surprise, 50)):.1f})"


def _cost(pair: Pair) -> str:
    plain, steered = pair.plain.mean_surprise, pair.steered.mean_surprise
    if not pair.effects:
        return "<p class='verdict'>Nothing is steered: choose a latent to see a difference.</p>"
    if pair.plain.text == pair.steered.text:
        return "<p class='verdict'>Same text. A stronger setting may tip the model over.</p>"
    if plain is None or steered is None:
        return ""
    lost = steered - plain
    if _distinct(pair.steered) < MIN_DISTINCT_SHARE * _distinct(pair.plain):
        # A loop is easy to predict: surprise alone would call it fluent.
        return "<p class='verdict broken'>The steered text runs in circles. Turn it down.</p>"
    if lost > 2 * MAX_LOSS:
        cost = f"Fluency breaks: {lost:+.2f} nats per token. Turn it down."
        return f"<p class='verdict broken'>{cost}</p>"
    word = "Still fluent" if lost <= MAX_LOSS else "Fluency suffers"
    return f"<p class='verdict'>{word}: {lost:+.2f} nats per token.</p>"


def _distinct(reading: Reading) -> float:
    return distinct_pairs(reading.tokens[reading.n_prompt :])


def _effects(effects: Sequence[Effect], guides: Sequence[Guide]) -> str:
    if not effects:
        return ""
    rows = []
    for i, effect in enumerate(effects):
        name = f"<i class='dot' style='background:rgb({hue(i)})'></i>"
        name += escape(latent_name(effect.setting, guides))
        if effect.target is None or effect.share is None:
            cells = "<td colspan='4'>no token was edited</td>"
        else:
            numbers = (effect.present or 0.0, effect.target, effect.realised or 0.0)
            cells = "".join(f"<td>{value:.2f}×</td>" for value in numbers)
            cells += f"<td>{effect.share:.0%}</td>"
        rows.append(f"<tr><th scope='row'>{name}</th>{cells}</tr>")
    return (
        "<div class='scroll'><table class='effects'><thead><tr><th>Latent</th><th>before</th>"
        "<th>target</th><th>realised</th><th title='length of the edit, relative to the residual "
        "stream it is added to'>share of residual</th></tr></thead>"
        f"<tbody>{''.join(rows)}</tbody></table></div>"
    )


def legend_html(settings: Sequence[Setting], guides: Sequence[Guide]) -> str:
    """What the colours mean."""
    items = [
        f"<span><i class='dot' style='background:rgb({hue(i)})'></i>"
        f"{escape(latent_name(setting, guides))}</span>"
        for i, setting in enumerate(settings)
    ]
    return (
        f"<p class='legend'>{''.join(items)}<span><i class='under'></i>surprising to the plain "
        "model</span><span class='muted'>Colours show the text as the plain model reads it."
        "</span></p>"
    )


def window_html(tokens: Sequence[str], activations: Sequence[float]) -> str:
    """One example sentence with its firing tokens marked."""
    spans = []
    for token, value in zip(tokens, activations, strict=False):
        text = escape(token)
        if value > 0.02:
            alpha = min(0.7, 0.1 + 0.6 * value)
            text = f"<mark style='background:rgba({hue(0)},{alpha:.2f})'>{text}</mark>"
        spans.append(text)
    return f"<p class='window'>{''.join(spans)}</p>"


def cards_html(cards: Sequence[tuple[Card, Hit | None]], *, n_saes: int, note: str = "") -> str:
    """Search results, each with a button that puts the latent into the mix."""
    if not cards:
        return f"<p class='empty'>{escape(note) or 'Nothing found. Try another word.'}</p>"
    items = "".join(_card(card, hit, n_saes) for card, hit in cards)
    return f"<p class='muted'>{escape(note)}</p><ul class='cards'>{items}</ul>"


def _card(card: Card, hit: Hit | None, n_saes: int) -> str:
    facts = [f"#{card.latent}" if n_saes == 1 else f"SAE {card.sae} · #{card.latent}"]
    if hit is not None and hit.reason != "label":
        facts.append(hit.reason)
    if card.score is not None:
        facts.append(f"label tested: {card.score:.0%} right")
    elif card.certainty is not None:
        facts.append(f"label certainty {card.certainty:.0%}, untested")
    if card.intruder is not None:
        facts.append(f"odd one out found in {card.intruder:.0%} (chance {INTRUDER_CHANCE:.0%})")
    if card.density is not None:
        facts.append(f"on {card.density:.2%} of tokens" if card.density else "never seen firing")
    windows = "".join(window_html(*window) for window in card.windows)
    promoted = ", ".join(token.strip() for token in card.promoted if token.strip())
    body = windows + (
        f"<p class='muted'>makes likelier: {escape(promoted)}</p>" if promoted else ""
    )
    title = card.label or f"latent {card.latent}"
    return (
        f"<li class='card'><div class='row'><div><strong>{escape(title)}</strong>"
        f"<p class='muted'>{escape(' · '.join(facts))}</p></div>"
        f"<button class='choose' data-sae='{card.sae}' data-latent='{card.latent}' "
        f"aria-label='Add latent {card.latent} to the mix'>+ Add</button></div>{body}</li>"
    )


def prompt_view_html(
    tokens: Sequence[str], rows: Sequence[tuple[Setting, list[float]]], guides: Sequence[Guide]
) -> str:
    """Tokens × latents: cells coloured by activation in units."""
    head = "".join(f"<th scope='col'><span>{escape(token)}</span></th>" for token in tokens)
    body = []
    for setting, values in rows:
        cells = "".join(
            f"<td title='{value:.2f}×' style='background:rgba({hue(0)},{min(0.9, value):.2f})'>"
            f"{'' if value < 0.05 else f'{value:.1f}'}</td>"
            for value in values
        )
        name = escape(latent_name(setting, guides))
        button = (
            f"<button class='choose' data-sae='{setting.sae}' data-latent='{setting.latent}' "
            f"aria-label='Add latent {setting.latent} to the mix'>+</button>"
        )
        body.append(
            f"<tr><th scope='row'><div>{button}<span title='{name}'>{name}</span></div></th>"
            f"{cells}</tr>"
        )
    return (
        f"<div class='scroll'><table class='heat'><thead><tr><th></th>{head}</tr></thead>"
        f"<tbody>{''.join(body)}</tbody></table></div>"
    )


def dose_html(report: DoseReport, guides: Sequence[Guide]) -> str:
    """The sweep as a plot, a table with samples, and the proposal in words."""
    name = escape(latent_name(report.setting, guides))
    if report.proposed is not None:
        verdict = f"Strongest dose before fluency breaks: <b>{report.proposed:g}×</b>"
    elif len(report.points) > 1:
        verdict = "Even the weakest dose here breaks fluency: try smaller ones."
    else:
        verdict = "Measuring…"
    rows = "".join(
        f"<tr{' class=proposed' if p.strength == report.proposed else ''}><th scope='row'>"
        f"{p.strength:g}×</th><td>{p.concept:.2f}×</td><td>{exp(min(p.surprise, 50)):.1f}</td>"
        f"<td>{p.distinct:.0%}</td><td class='sample'>{escape(p.sample)}</td></tr>"
        for p in report.points
    )
    return (
        f"<div class='dose'><p class='verdict'>{name}: {verdict}</p>{_dose_svg(report)}"
        "<div class='scroll'><table class='effects'><thead><tr><th>dose</th><th>concept</th>"
        "<th>perplexity</th><th>no repeats</th><th class='wide'>sample</th></tr></thead>"
        f"<tbody>{rows}</tbody></table></div></div>"
    )


def report_page(title: str, body: str) -> str:
    """A whole HTML file around fragments, readable without any server."""
    css = (Path(__file__).parent / "page.css").read_text(encoding="utf-8")
    return (
        "<!doctype html><html lang='en'><head><meta charset='utf-8'>"
        "<meta name='viewport' content='width=device-width, initial-scale=1'>"
        f"<title>{escape(title)}</title><style>:root{{color-scheme:light dark;"
        "--body-text-color:CanvasText;--background-fill-primary:Canvas;--color-accent:#ea580c}"
        f"body{{font:16px system-ui,sans-serif;max-width:60rem;margin:1.5rem auto;padding:0 1rem}}"
        f"{css}@media (prefers-color-scheme:dark){{:root{{--s-muted:#a8b5c9;--s-concept:#fbbf24;"
        f"--s-loss:#f87171}}}}</style></head><body class='saint'><h1>{escape(title)}</h1>{body}"
        "</body></html>"
    )


def _dose_svg(report: DoseReport) -> str:
    """Two curves over the dose: the concept in the text, and the loss of fluency in nats."""
    width, height, left, top = 480, 250, 50, 24
    points = report.points
    if len(points) < 2:
        return ""
    plot_w, plot_h = width - 2 * left, height - top - 32
    losses = [max(0.0, p.surprise - points[0].surprise) for p in points]
    scales = (max(0.1, *(p.concept for p in points)), max(2 * MAX_LOSS, *losses))
    most = points[-1].strength

    def x(strength: float) -> float:
        return left + plot_w * strength / most

    def y(value: float, scale: float) -> float:
        return top + plot_h * (1 - value / scale)

    def curve(values: Sequence[float], scale: float, kind: str) -> str:
        places = [(x(p.strength), y(v, scale)) for p, v in zip(points, values, strict=True)]
        path = " ".join(f"{px:.1f},{py:.1f}" for px, py in places)
        dots = "".join(f"<circle cx='{px:.1f}' cy='{py:.1f}' r='3'/>" for px, py in places)
        return f"<g class='{kind}'><polyline points='{path}'/>{dots}</g>"

    middle = "text-anchor='middle'"
    ticks, free = f"<text x='0' y='{height - 10}'>dose</text>", 0.0
    for p in points:
        if x(p.strength) >= free:  # else it would touch the number to its left
            number = f"{p.strength:g}"
            ticks += f"<text x='{x(p.strength):.1f}' y='{height - 10}' {middle}>{number}</text>"
            free = x(p.strength) + _TICK_WIDTH
    limit = y(MAX_LOSS, scales[1])
    chosen = ""
    if report.proposed is not None:
        px = x(report.proposed)
        chosen = (
            f"<line class='chosen' x1='{px:.1f}' x2='{px:.1f}' y1='{top}' y2='{top + plot_h}'/>"
        )
    return (
        f"<svg class='doseplot' viewBox='0 0 {width} {height}' role='img' "
        "aria-label='concept and loss of fluency over the dose'>"
        f"<rect class='frame' x='{left}' y='{top}' width='{plot_w}' height='{plot_h}'/>"
        f"<line class='limit' x1='{left}' x2='{left + plot_w}' y1='{limit:.1f}' y2='{limit:.1f}'/>"
        f"{chosen}{curve([p.concept for p in points], scales[0], 'concept')}"
        f"{curve(losses, scales[1], 'loss')}{ticks}"
        f"<text class='concept' x='0' y='{top - 9}'>{scales[0]:.1f}×</text>"
        f"<text class='loss' x='{width}' y='{top - 9}' text-anchor='end'>"
        f"{scales[1]:.1f} nats</text></svg>"
        "<p class='legend'><span class='concept'>● concept in the text (left)</span>"
        "<span class='loss'>● loss of fluency, nats per token (right; dashed: the limit)</span></p>"
    )
