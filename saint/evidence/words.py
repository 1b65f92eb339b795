"""Which latents read most clearly: the ones to show first, and to steer with."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

from saint.evidence.file import Evidence

_MIN_SENTENCES = 20
_MAX_DENSITY = 0.005
_N_TOP = 20
# Words that hold sentences together: clear latents, but nothing to look at or to steer with.
_CONNECTING_WORDS = frozenset(
    "able about above according across after again against almost already also although always "
    "among announced another around back because been before being below best better between both "
    "came close come compared could days different does doing done down during each either else "
    "enough even ever every exactly first following former from further gave given goes going "
    "good have having here however including instead into just key kind know known last later "
    "least less like likely little long made make makes making many more most much must near need "
    "never next none nothing often once only onto other others over part past perhaps potential "
    "presents rather really recent recently right said same says seen several shall should show "
    "shows similar simply since some something state states still such sure take taken than that "
    "their them then there therefore these they thing things this those though through thus time "
    "together told took toward towards under united unless until upon used using very want wants "
    "way well went were what when where whether which while whom whose will with within without "
    "would year years your".split()
)


def clearest_latents(evidence: Evidence, n_latents: int) -> list[int]:
    """Return latents that fire on one telling word and its forms, clearest first.

    Each has a main word of its own. Latents that fire in few sentences or on more than 0.5 %
    of the tokens are left out: they are accidents or grammar.
    """
    table = evidence.summary()
    density = table.column("density").to_numpy()
    sentences = table.column("n_firing_sentences").to_numpy()
    fitting = (sentences >= _MIN_SENTENCES) & (density <= _MAX_DENSITY)
    scored = []
    for latent in fitting.nonzero()[0].tolist():
        score, word = clarity(evidence.latent(latent))
        scored.append((score, latent, word))
    chosen: dict[str, int] = {}
    for score, latent, word in sorted(scored, key=lambda row: (-row[0], row[1])):
        if score > 0:
            chosen.setdefault(_stem(word), latent)
    return list(chosen.values())[:n_latents]


def clarity(row: Mapping[str, Any]) -> tuple[float, str]:
    """Return how clear one latent's evidence is, 0..1, and its main word ("" for none).

    The mean of two shares: of the strongest windows, and of the windows over all strengths, that
    fire on the main word or a form of it.
    """
    top, spread = (_firing_words(row, kind) for kind in ("top", "quantile"))
    word, _ = Counter(top).most_common(1)[0] if top else ("", 0)
    if len(top) < _N_TOP or not spread or not is_content(word):
        return 0.0, ""
    stem = _stem(word)
    shares = [sum(w.startswith(stem) for w in words) / len(words) for words in (top, spread)]
    return sum(shares) / 2, word


def _firing_words(row: Mapping[str, Any], kind: str) -> list[str]:
    """The word under the strongest token of each example of a kind, in lower case."""
    examples = [e for e in row["examples"] if e["kind"] == kind]
    if kind == "top":
        examples = examples[:_N_TOP]
    return [word_at(e["tokens"], e["position"] - e["start"]).lower() for e in examples]


def _stem(word: str) -> str:
    """What a word shares with its forms, roughly: "helped" and "helping" are "help"."""
    return word[: max(4, len(word) - 3)]


def is_content(word: str) -> bool:
    """Whether a lower-case word names something, rather than holding sentences together."""
    return len(word) >= 4 and word.isalpha() and word not in _CONNECTING_WORDS and is_telling(word)


# Words that say little about a latent, unless it fires on nothing else.
_STOP_WORDS = frozenset(
    (
        "a an the and or but of to in on at by for from with as is are was were be been it its "
        "this that these those he she they we you i his her their our not no has have had will "
        "would s t"
    ).split()
)


def _distinct(words: list[str]) -> list[str]:
    """Drop forms of an earlier word: "engines" and "Germany" after "engine" and "German"."""
    kept: list[str] = []
    for word in words:
        pairs = (sorted((word, other), key=len) for other in kept)
        if not any(len(a) >= 4 and b.startswith(a) and len(b) - len(a) <= 3 for a, b in pairs):
            kept.append(word)
    return kept


def is_telling(word: str) -> bool:
    """Whether a lower-case word carries content: no function word, no bare punctuation."""
    return word not in _STOP_WORDS and any(c.isalnum() for c in word)


def word_at(tokens: list[str], index: int) -> str:
    """Return the whole word around a token: its pieces from both sides, without white space."""
    if not 0 <= index < len(tokens):
        return ""
    token = tokens[index]
    if not any(c.isalnum() for c in token):
        return token.strip()
    low = high = index
    while low > 0 and _joins(tokens[low - 1], tokens[low]):
        low -= 1
    while high + 1 < len(tokens) and _joins(tokens[high], tokens[high + 1]):
        high += 1
    return "".join(tokens[low : high + 1]).strip()[:40]


def _joins(left: str, right: str) -> bool:
    """Whether two neighbouring tokens are pieces of one word."""
    return bool(left) and bool(right) and _is_letter(left[-1]) and _is_letter(right[0])


def _is_letter(char: str) -> bool:
    return char.isalnum() or char == "\ufffd"
