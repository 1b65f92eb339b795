"""Feature splitting and absorption, by the first letters of words (arXiv:2409.14507).

A linear probe finds the direction of "begins with s" in the activations of words that are one
token. The latents that read it best are the letter's own. A letter is *split* over k latents when
each of them still adds to the F1 of a probe on them. It is *absorbed* on a word that the probe
gets right where all of the letter's own latents are silent and one other latent, whose direction
points along the probe, carries the letter instead: the measure without ablations of SAEBench
(arXiv:2503.09532), which needs no model above the hook. Sized for a small model: one short prompt,
and a seeded draw of the vocabulary's own words.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from llama_3.tokenizer import Tokenizer
from saint.capture.packing import batches_by_length, pack
from saint.evaluation.faithfulness import Subject
from saint.evaluation.probes import (
    best_cuts,
    f1,
    fit_logistic,
    rank_by_class,
    rows_to_test_on,
    scores,
)
from saint.stage.errors import UserError

_PROMPT = "The word"
_WORD = re.compile(r" [A-Za-z]{3,}")
_LEAST_WORDS = 20  # of a letter
_MOST_LATENTS = 5
_F1_JUMP = 0.03  # that another latent adds, to be one of the letter's own
_LEAST_COSINE = 0.1  # of an absorbing latent's direction with the probe
_LEAST_SHARE = 0.4  # of the activation along the probe that it carries


@dataclass(frozen=True)
class Sparse:
    """Active latents: values and indices (n_tokens, m), filled up with zeros."""

    values: Tensor
    indices: Tensor

    def of(self, latents: Tensor) -> Tensor:
        """Return (n_tokens, len(latents)) activations."""
        columns = [(self.values * (self.indices == latent)).sum(1) for latent in latents.tolist()]
        return torch.stack(columns, dim=1)

    def class_means(self, y: Tensor, n_latents: int) -> Tensor:
        """Return (n_classes, n_latents) mean activations of the classes (n_tokens, n_classes)."""
        means = torch.zeros(y.shape[1], n_latents)
        for index in range(y.shape[1]):
            rows = y[:, index]
            flat = self.indices[rows].flatten()
            means[index].index_add_(0, flat, self.values[rows].flatten())
            means[index] /= rows.sum().clamp_min(1)
        return means

    def part(self, rows: Tensor) -> Sparse:
        """Return some of the tokens."""
        return Sparse(self.values[rows], self.indices[rows])


def first_letter_words(tokenizer: Tokenizer, *, n_words: int, seed: int) -> tuple[Tensor, Tensor]:
    """Draw words of the vocabulary: ids (n,) and letters (n,) from 0, of letters with enough words.

    Raises UserError where fewer than two letters have enough.
    """
    texts = {i: tokenizer.token_text(i) for i in range(tokenizer.n_vocab)}
    found = [(i, ord(t[1].lower()) - ord("a")) for i, t in texts.items() if _WORD.fullmatch(t)]
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(found), generator=generator)[:n_words].tolist()
    ids = torch.tensor([found[i][0] for i in order], dtype=torch.int64)
    letters = torch.tensor([found[i][1] for i in order], dtype=torch.int64)
    common = torch.bincount(letters, minlength=26) >= _LEAST_WORDS
    if int(common.sum()) < 2:
        raise UserError(
            f"--first_letter_words {n_words}: fewer than two letters have {_LEAST_WORDS} words "
            "in this vocabulary"
        )
    kept = common[letters]
    return ids[kept], letters[kept]


@torch.inference_mode()
def word_activations(subject: Subject, word_ids: Tensor) -> Tensor:
    """Return raw activations (n_words, d_model) at each word, after a short prompt."""
    bos, model = subject.bos(), subject.model
    prompt = subject.tokenizer.encode(_PROMPT, bos=False)
    length = len(bos) + len(prompt) + 1
    lengths = np.full(len(word_ids), length - len(bos))
    found = torch.empty(len(word_ids), model.args.dim)
    for batch in batches_by_length(lengths, subject.batch_tokens, extra=len(bos)):
        packed = pack([[*prompt, int(word_ids[i])] for i in batch], bos=bos)
        tokens = packed.tokens.to(model.device)
        raw = model.capture(tokens, [subject.hook], seq_lens=packed.seq_lens)[subject.hook]
        found[torch.from_numpy(batch)] = raw[length - 1 :: length].float().cpu()
    return found


def first_letters(subject: Subject, n_words: int) -> dict[str, Any]:
    """Measure how an SAE splits and absorbs the first letters of words, see `absorption`."""
    sae = subject.sae
    ids, letters = first_letter_words(subject.tokenizer, n_words=n_words, seed=subject.seed)
    x = sae.normalise(word_activations(subject, ids))[0]
    values, indices = sae.encode(x.to(sae.b_pre.device)).matrices()
    sparse = Sparse(values.cpu(), indices.cpu())
    return absorption(x, sparse, sae.W_dec.float().cpu(), letters, seed=subject.seed)


def split_latents(sparse: Sparse, y: Tensor, test: Tensor, n_latents: int) -> tuple[Tensor, Tensor]:
    """Find how many latents read each class, by k-sparse probes for growing k.

    y: (n_tokens, n_classes) bool. Returns latents (n_classes, 5), the best first, and F1 on the
    test tokens (5, n_classes) of probes on the first 1, 2, … of them.
    """
    counts = y[~test].sum(0).float()
    means = sparse.part(~test).class_means(y[~test], n_latents)
    most = min(_MOST_LATENTS, n_latents)
    latents = rank_by_class(means, counts, most)
    features = torch.stack([sparse.of(own) for own in latents], dim=1)  # (n, n_classes, most)
    quality = []
    for k in range(1, most + 1):
        weights, biases = fit_logistic(features[~test][:, :, :k], y[~test])
        logits = scores(features[:, :, :k].double(), weights, biases)
        cuts = best_cuts(logits[~test], y[~test])
        quality.append(f1(logits[test] >= cuts, y[test]))
    return latents, torch.stack(quality)


def n_split(quality: Tensor) -> int:
    """Return how many latents a class is split over: as long as each adds 0.03 to F1.

    quality: (k_max,) F1 of probes on 1, 2, … latents.
    """
    k = 1
    while k < len(quality) and float(quality[k] - quality[:k].max()) > _F1_JUMP:
        k += 1
    return k


def absorbed(
    sparse: Sparse, w_dec: Tensor, direction: Tensor, projection: Tensor, own: Tensor
) -> tuple[Tensor, Tensor]:
    """Say of each token whether another latent carries what the class's own latents miss.

    direction: (d_model,) of the probe. projection: (n_tokens,) of the centred activation on it, as
    a unit vector. own: the class's latents. Returns (n_tokens,) bool and the latent that does it.
    """
    unit = direction / direction.norm()
    along = w_dec.float() @ unit.float()  # contribution of one unit of a latent
    silent = (sparse.of(own) <= 0).all(dim=1)
    cosines = along / w_dec.float().norm(dim=1).clamp_min(1e-12)
    contributions = sparse.values * along[sparse.indices]
    is_own = (sparse.indices.unsqueeze(-1) == own).any(dim=-1)
    best = contributions.masked_fill(is_own, -torch.inf).max(dim=1)
    latent = sparse.indices.gather(1, best.indices[:, None])[:, 0]
    enough = best.values >= _LEAST_SHARE * projection.clamp_min(1e-6)
    return silent & enough & (cosines[latent] >= _LEAST_COSINE), latent


def absorption(
    x: Tensor, sparse: Sparse, w_dec: Tensor, letters: Tensor, *, seed: int
) -> dict[str, Any]:
    """Measure splitting and absorption of first letters.

    x: (n_words, d_model) standardised. letters: (n_words,) from 0. w_dec: (n_latents, d_model), of
    unit norm. Figures are of a quarter of the words, on which no probe was fitted.
    """
    present = letters.unique()
    y = letters[:, None] == present
    test = rows_to_test_on(len(x), seed=seed)
    weights, biases = fit_logistic(x[~test], y[~test])
    logits = scores(x.double(), weights, biases)
    says_yes = logits[test] >= best_cuts(logits[~test], y[~test])
    probe_f1 = f1(says_yes, y[test])
    latents, quality = split_latents(sparse, y, test, len(w_dec))
    centred = x[test].double() - x[~test].double().mean(0)
    tested = sparse.part(test)
    rows = {}
    for index, letter in enumerate(present.tolist()):
        own = latents[index, : n_split(quality[:, index])]
        right = y[test][:, index] & says_yes[:, index]
        unit = weights[index] / weights[index].norm()
        projection = (centred[right] @ unit).float()
        hit, by = absorbed(tested.part(right), w_dec, weights[index], projection, own)
        silent = (tested.part(right).of(own) <= 0).all(dim=1)
        rows[chr(ord("a") + letter)] = {
            "n_words": int(right.sum()),
            "probe_f1": float(probe_f1[index]),
            "f1_of_one_latent": float(quality[0, index]),
            "n_latents": len(own),
            "latents": own.tolist(),
            "missed": float(silent.double().mean()) if len(silent) else 0.0,
            "absorbed": float(hit.double().mean()) if len(hit) else 0.0,
            "absorbing_latents": sorted(set(by[hit].tolist()))[:20],
        }
    return {"n_words": len(x), **_overall(rows), "letters": rows}


def _overall(rows: dict[str, dict[str, Any]]) -> dict[str, float]:
    """Return means over letters; absorption over letters with a word that the probe gets right."""
    counted = [row for row in rows.values() if row["n_words"]]

    def mean(name: str) -> float:
        return sum(float(row[name]) for row in counted) / max(1, len(counted))

    return {
        "absorbed": mean("absorbed"),
        "missed": mean("missed"),
        "probe_f1": mean("probe_f1"),
        "f1_of_one_latent": mean("f1_of_one_latent"),
        "latents_per_letter": mean("n_latents"),
        "share_split": sum(row["n_latents"] > 1 for row in counted) / max(1, len(counted)),
    }
