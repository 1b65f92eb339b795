"""Finding latents by label, by token, by example text; and what is shown of each of them.

Labels and evidence are optional: without them, tokens are still found through the weights and
example texts through the model itself.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from difflib import get_close_matches

import torch
from torch import Tensor

from saint.steering.completions import read
from saint.steering.guide import Guide
from saint.steering.settings import Wish
from saint.steering.studio import Dictionary, Studio

_WORD = re.compile(r"\w+")


_WINDOWS = 3
_NEAR = 0.75  # likeness of a misspelt word, as difflib measures it


_MAX_QUERY_TOKENS = 512


@dataclass(frozen=True)
class Hit:
    """One search result. score: in (0, 1], comparable within one search. reason: in words."""

    sae: int
    latent: int
    score: float
    reason: str


@dataclass(frozen=True)
class Card:
    """What a person should see of a latent before choosing it.

    density: share of tokens on which it fires, None where unknown. unit: its largest seen
    activation. intruder: how often the odd one out of its excerpts was found, None where it was not
    measured. windows: (tokens, activations in units) of its strongest examples. promoted: tokens
    that its direction makes likelier when read straight through the unembedding. effect: what it
    adds to a text when it is turned up, in a model's words, "" where nobody asked. measured: what
    `latent_effects.py` saw of that, "" where it did not run. address: see `Guide.address`.
    """

    sae: int
    latent: int
    label: str
    certainty: float | None
    score: float | None
    intruder: float | None
    density: float | None
    unit: float
    windows: list[tuple[list[str], list[float]]]
    promoted: list[str]
    effect: str = ""
    measured: str = ""
    address: str = ""


def search_labels(studio: Studio, guides: list[Guide], query: str, *, limit: int = 12) -> list[Hit]:
    """Return the latents whose labels hold the query's words, whole words before parts.

    Where there is none, each word is taken for the labels' word that is spelt most like it.
    """
    words = [word.lower() for word in _WORD.findall(query)][:20]
    hits = _labelled_hits(guides, words)
    if not hits and words:
        hits = _labelled_hits(guides, _respelt(guides, words))
    # Of equally good matches, the one that steers better.
    return sorted(hits, key=lambda hit: (-round(hit.score, 2), -_steers(guides, hit)))[:limit]


def _respelt(guides: list[Guide], words: list[str]) -> list[str]:
    """Replace each word by the nearest of the labels' words, where one is near enough."""
    known = {w for g in guides for label in g.labels.values() for w in _WORD.findall(label.text)}
    lower = sorted({word.lower() for word in known})
    return [(get_close_matches(word, lower, n=1, cutoff=_NEAR) or [word])[0] for word in words]


def _labelled_hits(guides: list[Guide], words: list[str]) -> list[Hit]:
    hits = []
    for sae, guide in enumerate(guides):
        for latent, label in guide.labels.items():
            present = set(_WORD.findall(label.text.lower()))
            found = [_word_score(word, present) for word in words]
            if not words or not any(found):
                continue
            trust = label.score or label.certainty or 0.0
            # Short labels about the word itself come before long ones that mention it.
            focus = 1 / (1 + len(present))
            score = (sum(found) / len(words) + 0.1 * trust + 0.1 * focus) / 1.2
            hits.append(Hit(sae, latent, score, "label"))
    return hits


def _steers(guides: list[Guide], hit: Hit) -> float:
    return guides[hit.sae].steers(hit.latent)


def _word_score(word: str, present: set[str]) -> float:
    if word in present:
        return 1.0
    if any(other.startswith(word) for other in present):
        return 0.8
    return 0.4 if len(word) > 2 and any(word in other for other in present) else 0.0


def search_token(studio: Studio, guides: list[Guide], query: str, *, limit: int = 12) -> list[Hit]:
    """Return latents that fire most strongly on a token, then latents that promote it.

    The first come from the evidence; where the token is none there, its nearest spelling stands
    for it. The second from the weights: the cosine of the latent's
    decoder direction and the token's row of the unembedding (with the final norm's weight).
    """
    hits = _leading_hits(studio, guides, query.strip().lower())
    if not hits:
        known = {word for g in guides for word in g.token_index(studio.tokenizer)}
        near = get_close_matches(query.strip().lower(), sorted(known), n=1, cutoff=_NEAR)
        hits = _leading_hits(studio, guides, near[0]) if near else []
        query = near[0] if hits else query
    hits = sorted(hits, key=lambda hit: (-round(hit.score, 1), -_steers(guides, hit), -hit.score))
    hits = hits[: max(1, 2 * limit // 3)]
    seen = {(hit.sae, hit.latent) for hit in hits}
    promoting = _promoting(studio, query, limit)
    return (hits + [hit for hit in promoting if (hit.sae, hit.latent) not in seen])[:limit]


def _leading_hits(studio: Studio, guides: list[Guide], word: str) -> list[Hit]:
    return [
        Hit(sae, latent, share, f"“{word}” leads {share:.0%} of its strongest sentences")
        for sae, guide in enumerate(guides)
        for latent, share in guide.token_index(studio.tokenizer).get(word, ())
    ]


@torch.no_grad()
def _promoting(studio: Studio, query: str, limit: int) -> list[Hit]:
    text = query.strip()
    ids = {studio.tokenizer.encode(form, bos=False)[0] for form in (text, " " + text) if text}
    hits = []
    for sae, dictionary in enumerate(studio.dictionaries):
        rows = _through_norm(studio, sorted(ids)).to(dictionary.sae.W_dec.device)
        if not len(rows):
            continue
        rows = rows / torch.linalg.vector_norm(rows, dim=1, keepdim=True)
        directions = dictionary.sae.W_dec
        cosine = (directions @ rows.T.to(directions.dtype)).float().amax(dim=1)
        values, latents = cosine.topk(min(limit, len(cosine)))
        for value, latent in zip(values.tolist(), latents.tolist(), strict=True):
            hits.append(Hit(sae, latent, value, f"makes it likelier (cosine {value:.2f})"))
    return sorted(hits, key=lambda hit: -hit.score)[:limit]


def _through_norm(studio: Studio, ids: list[int]) -> Tensor:
    """Rows of the unembedding, centred over nothing, with the final norm's weight in them."""
    norm = studio.model.norm
    assert norm is not None, "a whole model is loaded"
    return studio.model.unembedding[ids].float() * norm.weight.float()


@torch.no_grad()
def search_text(
    studio: Studio, guides: list[Guide], query: str | list[int], *, limit: int = 12
) -> list[Hit]:
    """Return the latents that stand out on an example text, or on token ids with BOS.

    A latent's score is its largest activation there, in units, times its rarity where its density
    is known: -log10(density) / 4, at most 1 (one token in 10,000 or fewer).
    """
    ids = studio.encode(query, chat=False) if isinstance(query, str) else query
    ids = ids[:_MAX_QUERY_TOKENS]
    texts = [studio.tokenizer.token_text(token) for token in ids]
    hits = []
    for sae, dictionary in enumerate(studio.dictionaries):
        best, position = strongest(studio, dictionary, ids)
        relative = best / dictionary.units
        densities = guides[sae].densities
        rarity = torch.ones_like(relative)
        if densities is not None:
            density = torch.tensor(densities).clamp(1e-7, 1.0)
            rarity = (-density.log10() / 4).clamp(0, 1)
        score = relative * rarity
        values, latents = score.topk(min(limit, len(score)))
        for value, latent in zip(values.tolist(), latents.tolist(), strict=True):
            if value > 0:
                reason = f"{float(relative[latent]):.2f}× on “{texts[position[latent]].strip()}”"
                hits.append(Hit(sae, latent, min(value, 1.0), reason))
    return sorted(hits, key=lambda hit: -hit.score)[:limit]


def latent_matrix(studio: Studio, dictionary: Dictionary, ids: list[int]) -> tuple[Tensor, Tensor]:
    """Return a text's activations, values and indices (n_tokens, k), on the CPU; 0 at BOS.

    k: the most that fire on a token, filled up with 0.
    """
    tokens = torch.tensor([ids], device=studio.model.device)
    x = studio.model.capture(tokens, [dictionary.hook])[dictionary.hook][0]
    z, _, _ = dictionary.sae.normalise(x)
    values, indices = (t.cpu() for t in dictionary.sae.encode(z).matrices())
    if dictionary.sae.config.prepend_bos:
        values[0] = 0.0
    return values, indices


def strongest(studio: Studio, dictionary: Dictionary, ids: list[int]) -> tuple[Tensor, list[int]]:
    """Return each latent's largest activation (n_latents,) on a text, and the token it was on."""
    values, indices = latent_matrix(studio, dictionary, ids)
    best = torch.zeros(dictionary.sae.config.n_latents)
    position = [0] * len(best)
    for i in range(len(ids)):
        higher = values[i] > best[indices[i]]
        for latent in indices[i][higher].tolist():
            position[latent] = i
        best[indices[i][higher]] = values[i][higher]
    return best, position


@torch.no_grad()
def activation_rows(
    studio: Studio, text: str | list[int], settings: Sequence[Wish], *, chat: bool = False
) -> tuple[list[str], list[tuple[Wish, list[float]]]]:
    """Return a text's tokens (BOS left out) and each wish's activation on them, in units.

    text: as a person wrote it, or as token ids with BOS.
    """
    ids = studio.encode(text, chat=chat) if isinstance(text, str) else text
    reading = read(studio, ids[:_MAX_QUERY_TOKENS], n_prompt=len(ids), settings=settings)
    rows = [[values[i] for values in reading.activations] for i in range(len(settings))]
    return reading.tokens, list(zip(settings, rows, strict=True))


def make_card(studio: Studio, guides: list[Guide], sae: int, latent: int) -> Card:
    """Collect what is known of a latent. Raises UserError if there is no such SAE or latent."""
    dictionary, guide = studio.dictionaries[sae], guides[sae]
    row = guide.row(latent)
    unit = float(dictionary.units[latent])
    windows, promoted, density = [], [], None
    if row is not None:
        tops = [e for e in row["examples"] if e["kind"] == "top"][:_WINDOWS]
        windows = [(e["tokens"], [a / unit for a in e["activations"]]) for e in tops]
        promoted = [entry["token"] for entry in row["promoted"][:8]]
        density = row["density"]
    label = guide.labels.get(latent)
    return Card(
        sae,
        latent,
        label.text if label else "",
        label.certainty if label else None,
        label.score if label else None,
        guide.intruder.get(latent),
        density,
        unit,
        windows,
        promoted or promoted_tokens(studio, dictionary, latent),
        label.effect if label else "",
        guide.measured(latent),
        guide.address(latent),
    )


@torch.no_grad()
def promoted_tokens(
    studio: Studio, dictionary: Dictionary, latent: int, *, limit: int = 8
) -> list[str]:
    """Return the tokens that a latent's direction makes likelier, by the unembedding alone."""
    norm = studio.model.norm
    assert norm is not None, "a whole model is loaded"
    unembedding = studio.model.unembedding
    direction = dictionary.sae.W_dec[latent].to(unembedding.device) * norm.weight.float()
    scores = unembedding @ direction.to(unembedding.dtype)
    top = scores[: studio.tokenizer.n_vocab].topk(limit).indices.tolist()
    return [studio.tokenizer.token_text(token) for token in top]
