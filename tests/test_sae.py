"""The SAE's forward against naive loops; its checkpoints."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import sae as sae_module
from sae import SAEConfig, TopKSparseAutoencoder, load_sae, save_sae, standardise
from saint.kernels import torch_ops
from saint.stage.errors import UserError


def make_sae(d_model: int = 24, n_latents: int = 64, k: int = 5, seed: int = 0, **facts):
    torch.manual_seed(seed)
    sae = TopKSparseAutoencoder(SAEConfig(d_model, n_latents, k, **facts))
    sae.initialise(0.2 * torch.randn(d_model), seed=seed)
    with torch.no_grad():
        sae.W_enc.add_(0.1 * torch.randn_like(sae.W_enc))
        sae.b_enc.add_(0.05 * torch.randn_like(sae.b_enc))
    return sae


def test_encode_keeps_the_k_largest_and_blocks_do_not_matter(monkeypatch):
    sae = make_sae(k=6)
    x = torch.randn(33, 24)
    values, indices = sae.encode(x).matrices()
    for row, pre in enumerate(sae.pre_activations(x).detach()):
        wanted = sorted(pre.tolist(), reverse=True)[:6]
        assert sorted(values[row].tolist(), reverse=True) == pytest.approx(
            [max(0.0, w) for w in wanted], abs=1e-6
        )
        assert sorted(pre[indices[row]].tolist(), reverse=True) == pytest.approx(wanted, abs=1e-6)
    monkeypatch.setattr(sae_module, "BLOCK_ELEMENTS", 64 * 4)
    torch.testing.assert_close(sae.encode(x).matrices()[0].sort().values, values.sort().values)
    torch.testing.assert_close(
        torch_ops.gather_dot(x, indices, sae.W_dec.detach()),
        torch.einsum("nd,nkd->nk", x, sae.W_dec[indices].detach()),
    )


def test_standardise_is_per_token_and_invertible():
    x = torch.randn(7, 30) * 50 + 3
    z, mean, scale = standardise(x)
    naive = torch.stack([(row - row.mean()) / (row.std() + 1e-6) for row in x])
    torch.testing.assert_close(z, naive)
    torch.testing.assert_close(z * scale + mean, x)


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
