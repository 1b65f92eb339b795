"""The torch encoder's rounded product selects what float64 selects."""

from __future__ import annotations

import pytest
import torch

from sae import ACTIVATIONS, TopKSparseAutoencoder, encode
from saint.kernels import fastest
from saint.kernels.torch_encoder import Encoder
from tests.support.training_checks import activations, make_sae

SHAPES = [(24, 3, 2), (24, 64, 64), (100, 700, 9), (576, 4000, 32)]


def problem(d: int, n_latents: int, outliers: bool = False):
    torch.manual_seed(d)
    a, w, bias = torch.randn(37, d), torch.randn(n_latents, d), 0.1 * torch.randn(n_latents)
    w *= torch.rand(n_latents, 1) + 0.2
    if outliers:  # as residual streams have them
        a[:, 3] *= 40
        w[:, 7] *= 20
    return a, w, bias


@pytest.mark.parametrize("outliers", [False, True])
@pytest.mark.parametrize(("d", "n_latents", "k"), SHAPES)
def test_it_selects_what_float64_selects(d, n_latents, k, outliers):
    a, w, bias = problem(d, n_latents, outliers)
    pre = a.double() @ w.double().T + bias
    wanted = pre.topk(k, dim=1)
    encoder = Encoder()
    mine = activations(encoder(a, w, bias, k), n_latents).double()
    exact = activations((wanted.values.relu().float(), wanted.indices), n_latents).double()
    assert (mine - exact).abs().max() < 1e-5 * pre.abs().max()
    found = encoder.diagnostics()
    assert k <= found["debug/candidates_per_token"] <= k + k // 2 + 32
    assert outliers or found["debug/float32_tokens_ratio"] <= 0.1
    if not outliers:
        again = activations(encoder.without_waiting(a, w, bias, k), n_latents)
        torch.testing.assert_close(again.double(), exact, rtol=1e-5, atol=1e-4)
    with torch.no_grad():
        w[:5] *= 3  # in place: the rounded weights are made anew
    mine = activations(encoder(a, w, bias, k), n_latents)
    torch.testing.assert_close(mine, activations(encode(a, w, bias, k), n_latents))


def test_of_equals_the_first_are_taken_and_tokens_that_are_unsure_decided_in_float32():
    torch.manual_seed(0)
    a, w = torch.randn(20, 64), torch.randn(1, 64) + 1e-4 * torch.randn(3000, 64)
    a[0], bias = 0, torch.zeros(3000)
    encoder = Encoder()
    wanted = (a.double() @ w.double().T).topk(4, dim=1).values.relu()
    values = encoder(a, w, bias, 4)[0].double()
    assert encoder.diagnostics()["debug/float32_tokens_ratio"] > 0.5
    torch.testing.assert_close(values.sort(descending=True).values, wanted, rtol=1e-5, atol=1e-5)
    a, w = a.round(), w.round()
    w[1500:] = w[:1500]
    assert (encoder(a, w[:2], bias[:2], 1)[1] == 0).all()


def test_no_tokens_and_numbers_that_are_not_finite():
    a, w, bias = problem(24, 64)
    for call in (Encoder(), Encoder().without_waiting):
        assert [tuple(t.shape) for t in call(a[:0], w, bias, 5)] == [(0, 5), (0, 5)]
        a[3, 2] = torch.nan
        values = call(a, w, bias, 5)[0]
        assert values[3].isnan().any() and values[torch.arange(37) != 3].isfinite().all()
        a[3, 2] = 0
        broken = w.clone()
        broken[7, 7] = torch.nan
        assert call(a, broken, bias, 5)[0].isnan().any(dim=1).all()


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_an_sae_may_encode_by_it_whatever_its_rule(activation, monkeypatch):
    threshold = 0.5 if activation == "batchtopk" else None
    sae = make_sae(64, 500, 5, activation=activation, threshold=threshold)
    if sae.threshold is not None:
        torch.nn.init.constant_(sae.threshold, 0.5)
    x = torch.randn(30, 64)
    wanted, theirs = sae.encode(x), sae(x)
    fastest.take_fastest_encoder(sae)
    assert "encode" not in vars(sae), "this device is no GPU"
    monkeypatch.setattr(fastest, "has_rounded_product", lambda device: True)
    fastest.take_fastest_encoder(sae)
    assert (sae.encode(x).values > 0).sum() == (wanted.values > 0).sum()
    torch.testing.assert_close(sae(x), theirs, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(TopKSparseAutoencoder.forward(sae, x), theirs, rtol=1e-4, atol=1e-4)
