"""The SAE's numerics against dense float64 autograd and naive loops; its checkpoints."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sae import (
    AuxK,
    SAEConfig,
    TopKSparseAutoencoder,
    load_sae,
    losses_and_gradients,
    normalise_decoder,
    project_decoder_gradient,
    save_sae,
    standardise,
)
from saint import kernels
from saint.runtime import UserError


def make_sae(d_model: int = 24, n_latents: int = 64, k: int = 5, seed: int = 0, **facts):
    torch.manual_seed(seed)
    sae = TopKSparseAutoencoder(SAEConfig(d_model, n_latents, k, **facts))
    sae.initialise(0.2 * torch.randn(d_model), seed=seed)
    with torch.no_grad():
        sae.W_enc.add_(0.1 * torch.randn_like(sae.W_enc))
        sae.b_enc.add_(0.05 * torch.randn_like(sae.b_enc))
    return sae


def reference_gradients(sae, x, aux, weight=1.0):
    """The whole objective written out densely in float64, in another formulation."""
    p = {n: v.detach().double().requires_grad_() for n, v in sae.named_parameters()}
    x = x.double()
    pre = (x - p["b_pre"]) @ p["W_enc"].T + p["b_enc"]
    chosen = pre.argsort(dim=1, descending=True)[:, : sae.config.k]
    mask = torch.zeros_like(pre, dtype=torch.bool).scatter(1, chosen, True)
    hidden = torch.where(mask & (pre > 0), pre, 0.0)
    error = x - (hidden @ p["W_dec"] + p["b_pre"])
    loss = ((error**2).sum(1) / (x**2).sum(1)).mean()
    aux_loss = torch.zeros(())
    if aux is not None:
        dead = pre[:, aux.dead]
        keep = dead.argsort(dim=1, descending=True)[:, : aux.k]
        dead_mask = torch.zeros_like(dead, dtype=torch.bool).scatter(1, keep, True)
        guess = torch.where(dead_mask & (dead > 0), dead, 0.0) @ p["W_dec"][aux.dead]
        residual = error.detach()
        spread = ((residual - residual.mean(1, keepdim=True)) ** 2).mean(1)
        aux_loss = (((residual - guess) ** 2).mean(1) / spread).mean()
    total = loss + (aux.coefficient * aux_loss if aux is not None else 0.0)
    (weight * total).backward()
    return loss, aux_loss, {n: v.grad for n, v in p.items()}


def gradient(parameter: torch.Tensor) -> torch.Tensor:
    assert parameter.grad is not None
    return parameter.grad


def relative(a, b):
    return float((a.double() - b).norm() / b.norm().clamp_min(1e-30))


AUXES = {
    "none": None,
    "one dead": ([7], 1),
    "some dead, k_aux of them": (list(range(0, 64, 3)), 4),
    "all dead, k_aux all": (list(range(64)), 64),
}


@pytest.mark.parametrize("kernel", ["sparse", "dense"])
@pytest.mark.parametrize("aux", AUXES.values(), ids=AUXES)
def test_every_gradient_equals_float64_autograd(kernel, aux):
    sae = make_sae()
    x = standardise(torch.randn(50, 24))[0]
    aux = None if aux is None else AuxK(torch.tensor(aux[0]), aux[1], 0.5)
    losses = losses_and_gradients(sae, x, aux, kernel=kernel)
    loss, aux_loss, wanted = reference_gradients(sae, x, aux)
    assert float(losses.loss) == pytest.approx(float(loss), rel=1e-5)
    assert float(losses.aux_loss) == pytest.approx(float(aux_loss), rel=1e-5)
    for name, parameter in sae.named_parameters():
        assert relative(parameter.grad, wanted[name]) < 1e-5, name


@settings(max_examples=25, deadline=None)
@given(
    n=st.integers(1, 20),
    d=st.integers(2, 16),
    n_latents=st.integers(1, 40),
    data=st.data(),
)
def test_sparse_gradients_equal_dense_ones_for_any_shape(n, d, n_latents, data):
    k = data.draw(st.integers(1, n_latents))
    sae = make_sae(d, n_latents, k, seed=n)
    x = standardise(torch.randn(n, d))[0]
    gradients = {}
    for kernel in ("sparse", "dense"):
        sae.zero_grad(set_to_none=True)
        losses = losses_and_gradients(sae, x, None, kernel=kernel)
        gradients[kernel] = [p.grad for p in sae.parameters()] + [losses.fired.float()]
    for sparse, dense in zip(gradients["sparse"], gradients["dense"], strict=True):
        torch.testing.assert_close(sparse, dense, rtol=1e-4, atol=1e-6)


def test_micro_batches_add_up_to_the_batch():
    sae = make_sae()
    x = standardise(torch.randn(48, 24))[0]
    aux = AuxK(torch.arange(0, 64, 5), 3, 1 / 32)
    losses_and_gradients(sae, x, aux, kernel="sparse")
    whole = [gradient(p).clone() for p in sae.parameters()]
    sae.zero_grad(set_to_none=True)
    for part in x.split(20):
        losses_and_gradients(sae, part, aux, kernel="sparse", weight=len(part) / len(x))
    for parameter, wanted in zip(sae.parameters(), whole, strict=True):
        torch.testing.assert_close(parameter.grad, wanted, rtol=1e-5, atol=1e-7)


def test_encode_keeps_the_k_largest_and_blocks_do_not_matter(monkeypatch):
    sae = make_sae(k=6)
    x = torch.randn(33, 24)
    values, indices = sae.encode(x)
    for row, pre in enumerate(sae.pre_activations(x).detach()):
        wanted = sorted(pre.tolist(), reverse=True)[:6]
        assert sorted(values[row].tolist(), reverse=True) == pytest.approx(
            [max(0.0, w) for w in wanted], abs=1e-6
        )
        assert sorted(pre[indices[row]].tolist(), reverse=True) == pytest.approx(wanted, abs=1e-6)
    monkeypatch.setattr(kernels, "_BLOCK_ELEMENTS", 64 * 4)
    torch.testing.assert_close(sae.encode(x)[0].sort().values, values.sort().values)
    torch.testing.assert_close(
        kernels.gather_dot(x, indices, sae.W_dec.detach()),
        torch.einsum("nd,nkd->nk", x, sae.W_dec[indices].detach()),
    )


def test_standardise_is_per_token_and_invertible():
    x = torch.randn(7, 30) * 50 + 3
    z, mean, scale = standardise(x)
    naive = torch.stack([(row - row.mean()) / (row.std() + 1e-6) for row in x])
    torch.testing.assert_close(z, naive)
    torch.testing.assert_close(z * scale + mean, x)


def test_decoder_directions_have_unit_norm_and_their_gradient_is_orthogonal():
    sae = make_sae()
    with torch.no_grad():
        sae.W_dec.mul_(torch.rand(64, 1) + 0.5)
    normalise_decoder(sae)
    # One norm per latent, not one per input dimension.
    torch.testing.assert_close(sae.W_dec.norm(dim=1), torch.ones(64), rtol=0, atol=1e-6)
    losses_and_gradients(sae, standardise(torch.randn(30, 24))[0], None, kernel="sparse")
    before = gradient(sae.W_dec).clone()
    project_decoder_gradient(sae)
    assert (gradient(sae.W_dec) * sae.W_dec).sum(1).abs().max() < 1e-6
    change = before - gradient(sae.W_dec)
    parallel = torch.nn.functional.cosine_similarity(change, sae.W_dec, dim=1).abs()
    assert parallel[change.norm(dim=1) > 1e-6].min() > 1 - 1e-4


def test_initialise_gives_a_transposed_pair_and_the_mean():
    sae = TopKSparseAutoencoder(SAEConfig(8, 20, 2))
    mean = torch.randn(8)
    sae.initialise(mean, seed=3)
    assert torch.equal(sae.W_enc, sae.W_dec) and torch.equal(sae.b_pre, mean)
    torch.testing.assert_close(sae.W_dec.norm(dim=1), torch.ones(20))


def test_a_checkpoint_has_the_contract_keys_and_loads_back(tmp_path: Path):
    sae = make_sae(layer=9, max_token_length=192)
    sae.max_activations = torch.rand(64)
    save_sae(tmp_path / "a.pt", sae)
    record = torch.load(tmp_path / "a.pt", weights_only=True)
    shapes = {name: tuple(t.shape) for name, t in record["state_dict"].items()}
    assert shapes == {
        "encoder.weight": (64, 24),
        "encoder.bias": (64,),
        "decoder.weight": (24, 64),
        "b_pre": (24,),
    }
    back = load_sae(tmp_path / "a.pt", device="cpu")
    assert back.config == sae.config
    x = torch.randn(5, 24)
    assert torch.equal(back(x), sae(x))
    assert back.max_activations is not None
    assert torch.equal(back.max_activations, sae.max_activations)


def test_a_bare_state_dict_loads_with_flags(tmp_path: Path):
    sae = make_sae()
    save_sae(tmp_path / "a.pt", sae)
    bare = torch.load(tmp_path / "a.pt", weights_only=True)["state_dict"]
    torch.save({f"module.{name}": tensor for name, tensor in bare.items()}, tmp_path / "b.pt")
    with pytest.raises(UserError, match="name it with --k"):
        load_sae(tmp_path / "b.pt", device="cpu")
    flags = {"k": 5, "layer": 3, "hook_point": "attn_norm", "no_bos": True}
    back = load_sae(tmp_path / "b.pt", device="cpu", **flags)
    assert (back.config.layer, back.config.hook_point) == (3, "attn_norm")
    assert not back.config.prepend_bos
    x = torch.randn(5, 24)
    assert torch.equal(back(x), sae(x))


def test_bad_checkpoints_are_one_clear_line(tmp_path: Path):
    sae = make_sae(layer=9)
    path = tmp_path / "a.pt"
    with pytest.raises(UserError, match="does not exist"):
        load_sae(path, device="cpu")
    save_sae(path, sae)
    with pytest.raises(UserError, match="has layer 9, --layer says 8"):
        load_sae(path, device="cpu", layer=8)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match="not a readable SAE checkpoint"):
        load_sae(path, device="cpu")
    record = {"format": "saint.sae", "version": 99, "config": {}, "state_dict": {}}
    torch.save(record, path)
    with pytest.raises(UserError, match="version 99"):
        load_sae(path, device="cpu")
    save_sae(path, sae)
    record = torch.load(path, weights_only=True)
    record["state_dict"]["b_pre"] = torch.zeros(3)
    torch.save(record, path)
    with pytest.raises(UserError, match=r"b_pre has shape \(3,\), expected \(24,\)"):
        load_sae(path, device="cpu")
