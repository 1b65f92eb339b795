"""What a latent does when it is turned up: measured on predictions, and for the best on texts.

`effects.parquet`, beside the evidence, has a row per live latent, ascending:

- latent: int32. word: the latent's own word in lower case, "" where its strongest tokens share none
- score: float32, the causal score: how much the own tokens' log-probability rises, per root of
  KL(steered, plain), at the file's dose (its metadata's `dose`); mean over neutral prompts
- kl: float32, that KL, nats. dose_half_nat, dose_1nat: float32, doses at which a token drawn from
  the steered prediction is 0.5 and 1 nat more surprising to the plain model; null where none of the
  doses tried costs so much. Doses are standard deviations of the residual stream along the decoder
  direction; divided by the latent's largest activation they are strengths in its units
- rising, falling: lists of {token, value}, the change in probability, largest first
- share: float32, share of texts written at dose_1nat (the largest tried where that is null) that
  hold the own word, null where none were written. text_loss: float32, nats per token those texts
  are more surprising than plain ones. shows: bool, share ≥ 0.75 at a loss ≤ 1. sample: the first
  such text

The causal score is the measure that found steerable latents where the clearest ones are not
(those say what a latent reads, not what it writes).
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from llama_3 import HookPoint, Llama, Tokenizer
from sae import TopKSparseAutoencoder
from saint.evidence.file import Evidence
from saint.evidence.words import MIN_LETTERS, is_content_word, is_form, word_at
from saint.stage.errors import UserError
from saint.stage.files import atomic_path, read_json, write_json
from saint.steering.texts import read_back, vector_edit, write

EFFECTS = "effects.parquet"
FORMAT = "saint.latent_effects"
VERSION = 1
LIMITS = (0.5, 1.0)
SHOWN_SHARE, SHOWN_LOSS = 0.75, 1.0
_FACTORS = (1.0, 1.75)  # doses tried, of the causal score's own
_N_OWN = 8
_TEXT_TOKENS = 24
_TEXTS_AT_ONCE = 256
# Neutral beginnings, for predictions; and others, on which texts are written.
PROBES = (
    "The most important thing is",
    "He told me that the",
    "In this chapter we look at",
)
TEXT_PROMPTS = (
    "The delegates gathered at the",
    "When I was a child, my family",
    "The company said on Monday that",
    "Many people believe that",
    "She opened the door and saw",
    "The history of the town begins with",
    "My friend wrote me a letter about",
    "Researchers have found a way to",
)
_TOKENS = pa.list_(pa.struct([("token", pa.string()), ("value", pa.float32())]))
SCHEMA = pa.schema(
    {
        "latent": pa.int32(),
        "word": pa.string(),
        "score": pa.float32(),
        "kl": pa.float32(),
        "dose_half_nat": pa.float32(),
        "dose_1nat": pa.float32(),
        "rising": _TOKENS,
        "falling": _TOKENS,
        "share": pa.float32(),
        "text_loss": pa.float32(),
        "shows": pa.bool_(),
        "sample": pa.string(),
    }
)


@dataclass
class Prober:
    """Measures blocks of latents of one SAE on `PROBES`."""

    model: Llama
    tokenizer: Tokenizer
    sae: TopKSparseAutoencoder
    evidence: Evidence
    dose: float
    n_shown: int

    @cached_property
    def live(self) -> list[int]:
        """Latents that fire on some captured token, ascending."""
        density = self.evidence.summary().column("density").to_numpy()
        return np.flatnonzero(density > 0).tolist()

    @property
    def hook(self) -> HookPoint:
        """Where the SAE belongs. Raises UserError when it does not know."""
        if self.sae.config.layer is None:
            raise UserError("the SAE does not know its layer: name it with --sae_layer_idx")
        return HookPoint(self.sae.config.layer, self.sae.config.hook_point)

    @property
    def facts(self) -> dict[str, Any]:
        """What the file says of itself."""
        return {
            "dose": self.dose,
            "doses": [factor * self.dose for factor in _FACTORS],
            "layer": self.hook.layer,
            "hook_point": self.hook.name,
            "n_latents": self.sae.config.n_latents,
        }

    @property
    def first(self) -> int:
        """The first position that may be edited."""
        return 1 if self.sae.config.prepend_bos else 0

    @cached_property
    def probes(self) -> list[list[int]]:
        """Token ids of the prompts on which predictions are compared."""
        bos = self.sae.config.prepend_bos
        return [self.tokenizer.encode(text, bos=bos) for text in PROBES]

    def own_tokens(self, latent: int) -> tuple[list[int], str]:
        """Return the tokens under the latent's strongest places, and the word they are part of."""
        row = self.evidence.latent(latent)
        tops = [e for e in row["examples"] if e["kind"] == "top" and len(e["token_ids"])]
        places = [(e, e["position"] - e["start"]) for e in tops]
        ids = Counter(e["token_ids"][at] for e, at in places)
        own = [i for i, n in ids.most_common(_N_OWN) if n >= 0.1 * max(1, len(places))]
        words = Counter(word_at(e["tokens"], at).lower() for e, at in places)
        best = [
            w
            for w, n in words.most_common(3)
            if is_content_word(w, min_letters=MIN_LETTERS) and n >= 0.3 * len(places)
        ]
        return own or [i for i, _ in ids.most_common(1)], best[0] if best else ""

    @cached_property
    def below(self) -> list[Tensor]:
        """Each probe's (1, n_tokens, d_model) input of the hook's layer: no edit changes it."""
        hook = HookPoint(self.hook.layer, "resid_pre")
        return [
            self.model.capture(torch.tensor([probe], device=self.model.device), [hook])[hook]
            for probe in self.probes
        ]

    @torch.no_grad()
    def measure(self, latents: Sequence[int]) -> list[dict[str, Any]]:
        """Return the rows of a block of latents, their texts still to be written."""
        own = [self.own_tokens(latent) for latent in latents]
        directions = self.sae.W_dec.detach()[list(latents)].float()
        losses = np.zeros((len(_FACTORS), len(latents)))
        scores, kls = np.zeros(len(latents)), np.zeros(len(latents))
        change: Tensor | float = 0.0
        for number in range(len(self.probes)):
            plain = self._predict(number, torch.zeros_like(directions[:1]))[0]
            entropy = -(plain.exp() * plain).sum()
            for i, factor in enumerate(_FACTORS):
                steered = self._predict(number, factor * self.dose * directions)
                likely = steered.exp()
                surprise = -(likely @ plain) - entropy
                losses[i] += surprise.double().cpu().numpy() / len(self.probes)
                if factor == 1.0:
                    kl = (likely * (steered - plain)).sum(-1).clamp_min(1e-6).cpu()
                    kls += kl.numpy() / len(self.probes)
                    rises = [
                        float(p[ids].logsumexp(0) - plain[ids].logsumexp(0)) if ids else 0.0
                        for p, (ids, _) in zip(steered, own, strict=True)
                    ]
                    scores += np.array(rises) / kl.sqrt().numpy() / len(self.probes)
                    change = change + (likely - plain.exp()) / len(self.probes)
        assert isinstance(change, Tensor), "there are probes"
        return [
            self._row(latent, own[j][1], scores[j], kls[j], losses[:, j], change[j])
            for j, latent in enumerate(latents)
        ]

    def _predict(self, probe: int, vectors: Tensor) -> Tensor:
        """Return (n_vectors, vocab) log-probabilities of what follows a probe, an edit a row.

        The layers below the edit are not run again.
        """
        n, below = len(vectors), self.below[probe]
        tokens = torch.tensor([self.probes[probe]] * n, device=self.model.device)
        last = HookPoint(len(self.model.layers) - 1, "resid_post")
        edits = {self.hook: vector_edit(vectors, first=self.first)}
        start = (self.hook.layer, below.expand(n, -1, -1))
        resid = self.model.capture(tokens, [last], edits=edits, start=start)[last]
        return self.model.unembed(resid[:, -1]).float().log_softmax(-1)

    def _row(
        self,
        latent: int,
        word: str,
        score: float,
        kl: float,
        losses: np.ndarray,
        change: Tensor,
    ) -> dict[str, Any]:
        doses = [0.0, *(factor * self.dose for factor in _FACTORS)]
        # Losses grow as squares of the dose.
        roots = [0.0, *np.sqrt(losses.clip(min=0)).tolist()]
        half, one = (crossing(doses, roots, limit**0.5) for limit in LIMITS)
        return {
            "latent": latent,
            "word": word,
            "score": float(score),
            "kl": float(kl),
            "dose_half_nat": half,
            "dose_1nat": one,
            "rising": self._tokens(change, largest=True),
            "falling": self._tokens(change, largest=False),
            "share": None,
            "text_loss": None,
            "shows": None,
            "sample": None,
        }

    def _tokens(self, change: Tensor, *, largest: bool) -> list[dict[str, Any]]:
        values, ids = change[: self.tokenizer.n_vocab].topk(self.n_shown, largest=largest)
        texts = [self.tokenizer.token_text(i) for i in ids.tolist()]
        pairs = zip(texts, values.tolist(), strict=True)
        return [{"token": text, "value": value} for text, value in pairs]


def crossing(doses: Sequence[float], losses: Sequence[float], limit: float) -> float | None:
    """Return the dose, linear between those tried, at which the loss first passes the limit."""
    for low, high in zip(range(len(doses)), range(1, len(doses)), strict=False):
        if losses[high] > limit:
            t = (limit - losses[low]) / (losses[high] - losses[low])
            return doses[low] + max(0.0, t) * (doses[high] - doses[low])
    return None


def word_shows(text: str, word: str) -> bool:
    """Whether a text holds a word or a form of it: "films" and "filming" are of "film"."""
    return any(is_form(part, word) for part in words_of(text))


def words_of(text: str) -> list[str]:
    """A text's words in lower case, letters only."""
    return "".join(c if c.isalpha() else " " for c in text.lower()).split()


def show_in_texts(
    prober: Prober, rows: list[dict[str, Any]], work_dir: Path, *, n_written: int, seed: int
) -> None:
    """Write texts with the latents that have a word and score best; fills their rows.

    Finished batches are kept in work_dir, so that an interrupted run does not write them again.
    """
    named = [row for row in rows if row["word"]]
    best = sorted(named, key=lambda row: (-row["score"], row["latent"]))[:n_written]
    bos = prober.sae.config.prepend_bos
    prompts = [prober.tokenizer.encode(text, bos=bos) for text in TEXT_PROMPTS]
    seeds = [1000 * seed + i for i in range(len(prompts))]
    plain = read_back(
        prober.model, prober.tokenizer, prompts,
        write(prober.model, prober.tokenizer, prompts, n_tokens=_TEXT_TOKENS, seeds=seeds),
    )  # fmt: skip
    per_batch = max(1, _TEXTS_AT_ONCE // len(prompts))
    for number, start in enumerate(range(0, len(best), per_batch)):
        batch = best[start : start + per_batch]
        path = work_dir / f"texts_{number:05d}.json"
        if not path.exists():
            write_json(path, _written(prober, batch, prompts, seeds))
        found = read_json(path)
        for row, texts in zip(batch, found, strict=True):
            losses = [t["surprise"] - p.surprise for t, p in zip(texts, plain, strict=True)]
            hits = [t["text"] for t in texts if word_shows(t["text"], row["word"])]
            row["share"] = len(hits) / len(texts)
            row["text_loss"] = float(np.mean(losses))
            row["shows"] = row["share"] >= SHOWN_SHARE and row["text_loss"] <= SHOWN_LOSS
            row["sample"] = (hits or [texts[0]["text"]])[0]


def _written(
    prober: Prober,
    batch: Sequence[Mapping[str, Any]],
    prompts: Sequence[list[int]],
    seeds: Sequence[int],
) -> list[list[dict[str, Any]]]:
    most = _FACTORS[-1] * prober.dose
    vectors = torch.stack(
        [
            (row["dose_1nat"] or most) * prober.sae.W_dec.detach()[row["latent"]].float()
            for row in batch
        ]
    ).repeat_interleave(len(prompts), 0)
    repeated = list(prompts) * len(batch)
    edits = {prober.hook: vector_edit(vectors, first=prober.first)}
    new = write(
        prober.model, prober.tokenizer, repeated, n_tokens=_TEXT_TOKENS,
        seeds=list(seeds) * len(batch), edits=edits,
    )  # fmt: skip
    texts = read_back(prober.model, prober.tokenizer, repeated, new)
    rows = [{"text": t.text, "surprise": t.surprise} for t in texts]
    n = len(prompts)
    return [rows[i : i + n] for i in range(0, len(rows), n)]


# --- on disk ---


def blocks_of(latents: Sequence[int], size: int) -> list[list[int]]:
    """Cut latents into consecutive blocks, the same whoever measures them."""
    return [list(latents[i : i + size]) for i in range(0, len(latents), size)]


def block_path(work_dir: Path, index: int) -> Path:
    """Where a block's rows lie until all are there."""
    return work_dir / f"block_{index:05d}.json"


def write_block(path: Path, rows: list[dict[str, Any]]) -> None:
    """Save a block, atomically."""
    write_json(path, rows)


def read_block(path: Path) -> list[dict[str, Any]]:
    """Read a saved block."""
    return read_json(path)


def write_effects(path: Path, rows: Sequence[dict[str, Any]], facts: Mapping[str, Any]) -> None:
    """Write `effects.parquet`, atomically."""
    meta = {"format": FORMAT, "version": VERSION, **facts}
    schema = SCHEMA.with_metadata({b"saint": json.dumps(meta).encode()})
    with atomic_path(path) as temporary:
        pq.write_table(pa.Table.from_pylist(list(rows), schema=schema), temporary)


@dataclass(frozen=True)
class Effects:
    """An effects file: rows by latent, and what it says of itself."""

    meta: dict[str, Any]
    rows: dict[int, dict[str, Any]]

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return iter(self.rows.values())

    def strongest(self, n: int) -> list[int]:
        """Latents whose effect shows in texts, most often first, then at the least loss."""
        shown = [row for row in self if row["shows"]]
        order = sorted(shown, key=lambda row: (-row["share"], row["text_loss"], row["latent"]))
        chosen: dict[str, int] = {}
        for row in order:  # one latent per word
            chosen.setdefault(row["word"][:5], row["latent"])
        return list(chosen.values())[:n]


def load_effects(path: Path, *, n_latents: int | None = None) -> Effects:
    """Read an effects file. Raises UserError when it is missing, damaged or another SAE's."""
    if not path.exists():
        raise UserError(f"{path} does not exist: run latent_effects.py first")
    try:
        table = pq.read_table(path)
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{path} is not a readable parquet file: {error}") from None
    meta = json.loads((table.schema.metadata or {}).get(b"saint", b"{}"))
    if (meta.get("format"), meta.get("version")) != (FORMAT, VERSION):
        raise UserError(f"{path}: format {meta.get('format')} is not known here")
    if n_latents not in (None, meta["n_latents"]):
        raise UserError(f"{path} describes {meta['n_latents']} latents, not {n_latents}")
    return Effects(meta, {row["latent"]: row for row in table.to_pylist()})
