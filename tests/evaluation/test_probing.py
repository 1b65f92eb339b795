"""Probes, first letters and topics: on data in which the answer was planted."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from saint.evaluation import absorption as letters_module
from saint.evaluation.absorption import (
    Sparse,
    absorption,
    first_letter_words,
    n_split,
)
from saint.evaluation.probes import (
    best_cuts,
    f1,
    fit_logistic,
    rank_by_class,
    scores,
    sparse_probing,
)
from saint.stage.errors import UserError


def newton(x: np.ndarray, y: np.ndarray, penalty: float) -> tuple[np.ndarray, float]:
    """Logistic regression on standardised features by Newton's method."""
    mean, scale = x.mean(0), x.std(0, ddof=1)
    z = np.concatenate([(x - mean) / scale, np.ones((len(x), 1))], axis=1)
    ridge = 2 * penalty * np.eye(z.shape[1])
    ridge[-1, -1] = 0
    w = np.zeros(z.shape[1])
    for _ in range(30):
        p = 1 / (1 + np.exp(-z @ w))
        gradient = z.T @ (p - y) / len(y) + ridge @ w
        hessian = (z.T * (p * (1 - p))) @ z / len(y) + ridge
        w -= np.linalg.solve(hessian, gradient)
    return w[:-1] / scale, float(w[-1] - (w[:-1] / scale * mean).sum())


def test_the_probe_is_the_optimum_that_newton_finds():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(200, 4)) * [1, 10, 0.1, 3] + 2
    y = np.stack([x[:, 0] + rng.normal(size=200) > 2, x[:, 3] + rng.normal(size=200) > 3], axis=1)
    weights, biases = fit_logistic(torch.from_numpy(x), torch.from_numpy(y), penalty=0.01)
    own = torch.from_numpy(np.stack([x, x], axis=1))
    weights_of_own, _ = fit_logistic(own, torch.from_numpy(y), penalty=0.01)
    for column in (0, 1):
        w, b = newton(x, y[:, column].astype(float), 0.01)
        np.testing.assert_allclose(weights[column], w, rtol=1e-3, atol=1e-4)
        np.testing.assert_allclose(weights_of_own[column], w, rtol=1e-3, atol=1e-4)
        assert float(biases[column]) == pytest.approx(b, rel=1e-3, abs=1e-3)
    logits = scores(torch.from_numpy(x), weights, biases)
    torch.testing.assert_close(scores(own, weights, biases), logits)


def test_features_are_ranked_by_the_difference_of_means_inside_and_outside():
    rng = np.random.default_rng(1)
    values, classes = rng.random((60, 8)), rng.integers(0, 3, 60)
    means = np.stack([values[classes == c].mean(0) for c in range(3)])
    counts = torch.bincount(torch.from_numpy(classes))
    found = rank_by_class(torch.from_numpy(means), counts.double(), 3)
    for c in range(3):
        difference = values[classes == c].mean(0) - values[classes != c].mean(0)
        assert found[c].tolist() == np.argsort(-difference)[:3].tolist()


def test_f1_is_the_harmonic_mean_of_precision_and_recall():
    predicted = torch.tensor([[1, 0], [1, 0], [0, 0], [1, 0]]).bool()
    y = torch.tensor([[1, 1], [0, 0], [1, 0], [1, 1]]).bool()
    precision, recall = 2 / 3, 2 / 3
    expected = 2 * precision * recall / (precision + recall)
    assert f1(predicted, y).tolist() == pytest.approx([expected, 0.0])


def test_the_cut_is_the_best_of_all_that_there_are():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randint(0, 8, (50, 3), generator=generator).double()
    y = torch.rand(50, 3, generator=generator) < torch.tensor([0.1, 0.5, 0.9])
    found = best_cuts(logits, y)
    for column in range(3):
        one, truth = logits[:, column : column + 1], y[:, column : column + 1]
        best = max(float(f1(one >= cut, truth)) for cut in range(8))
        assert float(f1(one >= found[column], truth)) == pytest.approx(best)
    separable = torch.tensor([[5.0], [4.0], [1.0], [0.0]])
    assert best_cuts(separable, torch.tensor([[True], [True], [False], [False]])).item() == 2.5


def test_one_planted_latent_tells_a_topic_and_a_topic_over_five_needs_five():
    generator = torch.Generator().manual_seed(0)
    n = 120
    labels = torch.arange(3).repeat_interleave(n)
    dense = torch.randn(3 * n, 10, generator=generator)
    dense[labels == 0, 0] += 6
    latents = 0.1 * torch.rand(3 * n, 40, generator=generator)
    latents[labels == 0, 7] += 1
    members = (labels == 1).nonzero()[:, 0]
    for i, row in enumerate(members.tolist()):  # a fifth of topic 1 on each of five latents
        latents[row, 20 + i % 5] += 1
    found = sparse_probing(dense, latents, labels, ["a", "b", "c"], seed=0)
    assert found["classes"]["a"]["latent"] == 7
    assert found["classes"]["a"]["k1"] == 1.0 and found["classes"]["a"]["dense"] > 0.95
    assert found["classes"]["b"]["k1"] < 0.75 and found["classes"]["b"]["k5"] > 0.95
    mean = np.mean([found["classes"][name]["k1"] for name in "abc"])
    assert found["mean"]["k1"] == pytest.approx(mean) and found["n_sentences"] == 3 * n


def planted_letters(share_absorbed: float):
    """Words of three letters: a has one latent, b has two for half its words each, and of c's
    latent some words are taken over by a latent of those words alone."""
    generator = torch.Generator().manual_seed(0)
    n, d = 400, 16
    letters = torch.arange(3).repeat_interleave(n)
    directions = torch.linalg.qr(torch.randn(d, d, generator=generator)).Q
    w_dec = torch.zeros(8, d)
    w_dec[0], w_dec[1], w_dec[2], w_dec[3] = (directions[i] for i in (0, 1, 1, 2))
    w_dec[2] = torch.nn.functional.normalize(directions[1] + 0.5 * directions[5], dim=0)
    w_dec[4] = torch.nn.functional.normalize(directions[2] + directions[6], dim=0)  # absorbs c
    w_dec[5:] = directions[8:11]
    x = 0.1 * torch.randn(3 * n, d, generator=generator) + 3 * directions[letters]
    values = torch.zeros(3 * n, 2)
    indices = torch.zeros(3 * n, 2, dtype=torch.int64)
    within = torch.arange(3 * n) % n
    taken = (letters == 2) & (within < share_absorbed * n)
    first = torch.where(letters == 0, 0, torch.where(letters == 1, 1 + within % 2, 3))
    indices[:, 0] = torch.where(taken, 4, first)
    values[:, 0] = torch.where(taken, 4.0, 3.0)
    indices[:, 1] = 5 + within % 3  # says nothing of letters
    values[:, 1] = 1.0
    return x, Sparse(values, indices), w_dec, letters, taken


def test_a_split_letter_and_an_absorbed_one_are_found():
    share = 0.2
    x, sparse, w_dec, letters, _ = planted_letters(share)
    found = absorption(x, sparse, w_dec, letters, seed=0)
    a, b, c = (found["letters"][name] for name in "abc")
    assert a["latents"] == [0] and a["absorbed"] == a["missed"] == 0
    assert sorted(b["latents"]) == [1, 2] and b["n_latents"] == 2 and b["missed"] == 0
    assert a["probe_f1"] > 0.98 < b["probe_f1"] and b["f1_of_one_latent"] < 0.75
    assert 3 in c["latents"]
    if c["n_latents"] == 1:  # else the second is the absorbing one: split, and nothing is missed
        assert c["absorbed"] == pytest.approx(share, abs=0.08) == c["missed"]
        assert c["absorbing_latents"] == [4]
    assert found["share_split"] >= 1 / 3


def test_absorption_counts_words_where_a_latent_along_the_probe_takes_over():
    x, sparse, w_dec, letters, taken = planted_letters(0.03)
    found = absorption(x, sparse, w_dec, letters, seed=0)["letters"]["c"]
    assert found["latents"] == [3] and found["absorbing_latents"] == [4]
    assert 0 < found["absorbed"] < 0.1 and found["absorbed"] == found["missed"]
    elsewhere = w_dec.clone()
    elsewhere[4] = w_dec[7]  # no longer along the probe: missed, but not absorbed
    found = absorption(x, sparse, elsewhere, letters, seed=0)["letters"]["c"]
    assert found["absorbed"] == 0 < found["missed"]


def test_a_letter_is_split_as_long_as_each_latent_adds_enough():
    assert n_split(torch.tensor([0.9, 0.92, 0.99])) == 1
    assert n_split(torch.tensor([0.5, 0.7, 0.72, 0.9])) == 2
    assert n_split(torch.tensor([0.1, 0.2, 0.3])) == 3


class Vocabulary:
    texts = [
        *(f" {a}{b}{c}" for a in "abX" for b in "abcde" for c in "vwxyz"),
        " cab",
        "abc",
        " a1b",
    ]
    n_vocab = len(texts)

    def token_text(self, i: int) -> str:
        return self.texts[i]


def test_words_are_whole_tokens_of_letters_that_have_enough_of_them():
    ids, letters = first_letter_words(Vocabulary(), n_words=1000, seed=0)  # pyright: ignore
    assert len(ids) == 75 and sorted(set(letters.tolist())) == [0, 1, ord("x") - ord("a")]
    for i, letter in zip(ids.tolist(), letters.tolist(), strict=True):
        assert ord(Vocabulary.texts[i][1].lower()) - ord("a") == letter
    fewer, _ = first_letter_words(Vocabulary(), n_words=70, seed=0)  # pyright: ignore
    assert set(fewer.tolist()) <= set(ids.tolist()) and len(fewer) < 75
    with pytest.raises(UserError, match="fewer than two letters"):
        first_letter_words(Vocabulary(), n_words=5, seed=0)  # pyright: ignore
    assert letters_module._LEAST_WORDS == 20
