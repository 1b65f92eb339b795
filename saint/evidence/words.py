"""Words that carry meaning, and which latents read most clearly: the ones to show first."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

from saint.evidence.file import Evidence

_MIN_SENTENCES = 20
_MAX_DENSITY = 0.005
_N_TOP = 20
MIN_LETTERS = 4  # of a word that a latent is shown for
# Words that hold sentences together, and words too common to say what a text is about.
STOP_WORDS = frozenset(
    (
        "a able about above according across after again against all almost along already also "
        "although always am among an and announced another any anyone anything are around as at "
        "away back be because been before being below best better between both but by came can "
        "close come compared could days did different do does doing done down during each "
        "either else enough even ever every exactly few first following for former from further "
        "gave give given goes going gone good got had has have having he her here hers herself "
        "him himself his how however i if in including instead into is it its itself just keep "
        "kept key kind know known last later least less like likely little long made make makes "
        "making many may maybe me might more most much must my myself near need neither never "
        "next no none nor not nothing now of off often on once only onto or other others "
        "otherwise our ours out over own part past per perhaps potential presents quite rather "
        "really recent recently right s said same says seem seen several shall she should show "
        "shows similar simply since so some someone something soon state states still such sure "
        "t take taken than that the their theirs them themselves then there therefore these "
        "they thing things this those though through thus time to together told too took toward "
        "towards under united unless until up upon used using very via want wants was way we "
        "well went were what whatever when where whether which while who whom whose why will "
        "with within without would year years yet you your yours yourself"
    ).split()
)


def is_content_word(word: str, *, min_letters: int = 0) -> bool:
    """Whether a lower-case word carries meaning: no function word, no bare punctuation.

    min_letters: 0 takes numbers and pieces too; otherwise a word is letters only, at least so many.
    """
    if word in STOP_WORDS or not any(c.isalnum() for c in word):
        return False
    return not min_letters or (len(word) >= min_letters and word.isalpha())


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
    if len(top) < _N_TOP or not spread or not is_content_word(word, min_letters=MIN_LETTERS):
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


def is_form(a: str, b: str) -> bool:
    """Whether two lower-case words are forms of one: "engine" and "engines"."""
    short, long = sorted((a, b), key=len)
    return a == b or (len(short) >= 4 and long.startswith(short) and len(long) - len(short) <= 3)


def distinct_words(words: list[str]) -> list[str]:
    """Drop forms of an earlier word: "engines" and "Germany" after "engine" and "German"."""
    kept: list[str] = []
    for word in words:
        if not any(is_form(word, other) for other in kept):
            kept.append(word)
    return kept


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
