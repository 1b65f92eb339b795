"""Which latents read most clearly: the ones to show first, and to steer with."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

from saint.evidence import Evidence
from saint.labels import is_telling, word_at

_MIN_SENTENCES = 20
_MAX_DENSITY = 0.005
_N_TOP = 20
_N_WORDS = 2
# Words that hold sentences together: clear latents, but nothing to look at or to steer with.
_CONNECTING_WORDS = frozenset(
    "about above according across after again against almost already also although always among "
    "another around back because been before being below best better between both came come could "
    "different does doing done down during each either else enough even ever every first following "
    "former from further gave given goes going good have having here however instead into "
    "including kind known last later least less like little long made make makes making many more "
    "most much must near never next none nothing often once only onto other others over part past "
    "perhaps presents rather really recent recently same several shall should show shows similar "
    "since some something still such sure take taken than that their them then there therefore "
    "these they thing things this those though through thus together took toward towards under "
    "unless until upon used using very want wants well went were what when where whether which "
    "while whom whose will with within without would years your said says told well".split()
)


def clearest_latents(evidence: Evidence, n_latents: int) -> list[int]:
    """Return latents whose strongest tokens are the same one or two telling words, clearest first.

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
            chosen.setdefault(word, latent)
    return list(chosen.values())[:n_latents]


def clarity(row: Mapping[str, Any]) -> tuple[float, str]:
    """Return how clear one latent's evidence is, 0..1, and its main word ("" for none).

    The share of its top windows whose strongest word is one of the two commonest, weighted by how
    near the twentieth window's activation still is to the first's.
    """
    top = [e for e in row["examples"] if e["kind"] == "top"][:_N_TOP]
    words = Counter(word_at(e["tokens"], e["position"] - e["start"]).lower() for e in top)
    common = [(word, n) for word, n in words.most_common(_N_WORDS) if _is_content(word)]
    if len(top) < _N_TOP or not common:
        return 0.0, ""
    share = sum(n for _, n in common) / len(top)
    return share * min(1.0, top[-1]["value"] / max(top[0]["value"], 1e-9)), common[0][0]


def _is_content(word: str) -> bool:
    return len(word) >= 4 and word.isalpha() and word not in _CONNECTING_WORDS and is_telling(word)
