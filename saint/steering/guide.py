"""What is known of an SAE's latents: their labels and their evidence, both optional."""

from __future__ import annotations

import threading
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from llama_3 import Tokenizer
from saint.evidence.file import Evidence
from saint.evidence.labels import SET_SIZE, Label
from saint.stage.errors import UserError, log
from saint.stage.terminal import visible
from saint.steering.effects import EFFECTS, Effects, load_effects

INTRUDER_CHANCE = 1 / SET_SIZE


@dataclass
class Guide:
    """Labels and evidence of one SAE. Read-only but for an index that is made once, on demand.

    intruder: latent, labelled or not -> how often the odd one out of its excerpts was found.
    effects: what latents do when they are turned up, where `latent_effects.py` has measured it.
    page: address of the page of all latents, "" where none is served.
    """

    labels: dict[int, Label] = field(default_factory=dict)
    evidence: Evidence | None = None
    densities: list[float] | None = None
    intruder: dict[int, float] = field(default_factory=dict)
    effects: Effects | None = None
    page: str = ""
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False)
    _tokens: dict[str, list[tuple[int, float]]] | None = None

    def label(self, latent: int) -> str:
        """The latent's label as it can be shown, or "" where it has none."""
        return visible(self.labels[latent].text) if latent in self.labels else ""

    def address(self, latent: int) -> str:
        """Where the latent's own page is, "" where none is served."""
        return f"{self.page}#/latent/{latent}" if self.page else ""

    def row(self, latent: int) -> dict[str, Any] | None:
        """The evidence of one latent, or None; parquet readers are not made for several threads."""
        if self.evidence is None:
            return None
        with self._lock:
            return self.evidence.latent(latent)

    def shown(self, n: int) -> list[int]:
        """Latents that were seen to show in written texts when they are turned up, best first."""
        return [] if self.effects is None else self.effects.strongest(n)

    def effect_row(self, latent: int) -> dict[str, Any] | None:
        """What was measured of a latent turned up, or None."""
        return None if self.effects is None else self.effects.rows.get(latent)

    def measured(self, latent: int) -> str:
        """That in words: how often its word showed, or the tokens that rise."""
        row = self.effect_row(latent)
        if row is None:
            return ""
        if row["share"] is not None:
            return f"turned up, “{row['word']}” shows in {row['share']:.0%} of texts"
        tokens = [entry["token"].strip() for entry in row["rising"][:4]]
        return f"turned up, it raises {', '.join(token for token in tokens if token)}"

    def steers(self, latent: int) -> float:
        """How well a latent steers, 0 where it was not measured: the causal score, and 10 more
        where it was seen to show in texts.
        """
        row = self.effect_row(latent)
        return 0.0 if row is None else row["score"] + 10.0 * bool(row["shows"])

    def token_index(self, tokenizer: Tokenizer) -> dict[str, list[tuple[int, float]]]:
        """Map a token (stripped, lower case) to latents and the share of top windows it leads."""
        with self._lock:
            if self._tokens is None:
                self._tokens = (
                    {} if self.evidence is None else _index_tokens(self.evidence, tokenizer)
                )
            return self._tokens


def make_guide(
    labels: dict[int, Label], evidence: Evidence | None, *, name: str, n_latents: int
) -> Guide:
    """Bind labels and evidence to an SAE. Raises UserError when they belong to another one."""
    if labels and max(labels) >= n_latents:
        raise UserError(f"the labels name latent {max(labels)}, {name} has {n_latents}")
    densities = None
    if evidence is not None:
        if evidence.n_latents != n_latents:
            raise UserError(
                f"{evidence.path} describes {evidence.n_latents} latents, {name} has {n_latents}"
            )
        densities = evidence.summary().column("density").to_pylist()
    named = {latent: label for latent, label in labels.items() if label.text}
    intruder = {i: label.intruder for i, label in labels.items() if label.intruder is not None}
    path = None if evidence is None else evidence.path.with_name(EFFECTS)
    known = path is not None and path.exists()
    effects = load_effects(path, n_latents=n_latents) if known and path is not None else None
    return Guide(named, evidence, densities, intruder, effects)


def _index_tokens(evidence: Evidence, tokenizer: Tokenizer) -> dict[str, list[tuple[int, float]]]:
    """Count, for all latents at once, which token is the strongest in each "top" window.

    Works on ids: at 65,536 latents the windows hold some hundred million tokens.
    """
    names = ("kind", "start", "position", "token_ids")
    columns = ["latent", *(f"examples.list.element.{name}" for name in names)]
    counts: Counter[tuple[int, int]] = Counter()
    for group in range(evidence.n_groups):
        table = evidence.read_group(group, columns)
        lists = table.column("examples").combine_chunks()
        examples = lists.flatten()
        kind, start, position, ids = (examples.field(name) for name in names)
        top = np.array(kind.to_pylist()) == "top"
        latents = np.repeat(table.column("latent").to_numpy(), lists.value_lengths().to_numpy())
        places = ids.offsets.to_numpy()[:-1] + position.to_numpy() - start.to_numpy()
        leading = ids.values.to_numpy()[places[top]]
        counts.update(zip(latents[top].tolist(), leading.tolist(), strict=True))
    totals: Counter[int] = Counter()
    shares: Counter[tuple[str, int]] = Counter()
    for (latent, token), count in counts.items():
        totals[latent] += count
        shares[tokenizer.token_text(token).strip().lower(), latent] += count
    index: dict[str, list[tuple[int, float]]] = {}
    for (text, latent), count in shares.items():
        index.setdefault(text, []).append((latent, count / totals[latent]))
    log.info("indexed the strongest tokens of %d latents", evidence.n_latents)
    return index
