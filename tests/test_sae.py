"""The SAE's forward against naive loops; its checkpoints."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import sae as sae_module
from sae import (
    SAEConfig,
    Steer,
    TopKSparseAutoencoder,
    denormalise,
    load_sae,
    save_sae,
    standardise,
    steering_shift,
)
from saint.kernels import torch_ops
from saint.kernels.fastest import fastest_encode
from saint.stage.errors import UserError
from tests.support.training_checks import make_sae


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
        torch_ops.gather_dot(x, sae.encode(x), sae.W_dec.detach()).view(33, 6),
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


RULES = ("topk", "batchtopk", "jumprelu", "relu", "gated")


def make_rule(activation: str, **facts):
    """An SAE of any rule whose tokens have different numbers of active latents."""
    k = 5 if activation == "topk" else 0
    threshold = 0.9 if activation == "batchtopk" else None
    config = SAEConfig(24, 64, k, activation=activation, threshold=threshold, **facts)
    sae = TopKSparseAutoencoder(config)
    generator = torch.Generator().manual_seed(1)
    sae.initialise(0.2 * torch.randn(24, generator=generator), seed=0)
    with torch.no_grad():
        sae.b_enc.copy_(0.1 * torch.randn(64, generator=generator))
        for name, spread in (("threshold", 0.3), ("magnitude_scale", 0.5), ("magnitude_bias", 0.2)):
            if (tensor := getattr(sae, name)) is not None:
                tensor.copy_(0.5 + spread * torch.randn(64, generator=generator))
    return sae.requires_grad_(False)


def dense_activations(sae: TopKSparseAutoencoder, x: torch.Tensor) -> torch.Tensor:
    """The rules as their papers write them, densely and in float64."""
    weights = {name: tensor.double() for name, tensor in sae.named_parameters()}
    product = (x.double() - weights["b_pre"]) @ weights["W_enc"].T
    pre = product + weights["b_enc"]
    match sae.config.activation:
        case "topk":
            best = pre.topk(sae.config.k, dim=1)
            return torch.zeros_like(pre).scatter(1, best.indices, best.values.relu())
        case "batchtopk":
            return pre.relu() * (pre > 0.9)
        case "jumprelu":
            return pre.relu() * (pre > weights["threshold"])
        case "relu":
            return pre.relu()
    magnitude = product * weights["magnitude_scale"] + weights["magnitude_bias"]
    return magnitude.relu() * (pre > 0)


@pytest.mark.parametrize("activation", RULES)
def test_every_rule_keeps_what_its_formula_says(activation, monkeypatch):
    sae, x = make_rule(activation), torch.randn(40, 24, generator=torch.Generator().manual_seed(2))
    wanted = dense_activations(sae, x)
    monkeypatch.setattr(sae_module, "BLOCK_ELEMENTS", 64 * 7)
    active = sae.encode(x)
    dense = torch.zeros(40, 64).index_put((active.tokens(), active.indices), active.values)
    torch.testing.assert_close(dense.double(), wanted, rtol=1e-5, atol=1e-6)
    counts = (wanted > 0).sum(dim=1)
    assert active.k == (5 if activation == "topk" else None)
    if active.k is None:
        assert torch.equal(active.offsets.diff(), counts) and counts.min() < counts.max()
    values, indices = active.matrices()
    assert torch.equal(torch.zeros(40, 64).scatter_add(1, indices, values), dense)
    torch.testing.assert_close(
        sae(x).double(), wanted @ sae.W_dec.double() + sae.b_pre.double(), rtol=1e-5, atol=1e-5
    )
    latents = torch.tensor([3, 60, 3])
    torch.testing.assert_close(sae.latent_activations(x, latents), dense[:, latents])
    assert len(sae.encode(x[:0]).values) == 0 and sae(x[:0]).shape == (0, 24)


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
@pytest.mark.parametrize("activation", RULES)
def test_every_rule_and_normalisation_survives_both_files(activation, suffix, tmp_path: Path):
    sae = make_rule(activation, normalisation="scalar", norm_factor=0.25, layer=3)
    sae.max_activations = torch.rand(64)
    path = tmp_path / f"a{suffix}"
    save_sae(path, sae)
    back = load_sae(path, device="cpu", layer=3)
    assert back.config == sae.config and back.max_activations is not None
    assert torch.equal(back.max_activations, sae.max_activations)
    x = 4 * torch.randn(6, 24)
    assert torch.equal(back.reconstruct(x), sae.reconstruct(x))
    if suffix == ".safetensors":
        said = json.loads(path.with_suffix(".json").read_text())
        assert said["version"] == 2 and said["config"].get("activation", "topk") == activation
    with pytest.raises(UserError, match="has layer 3"):
        load_sae(path, device="cpu", layer=2)


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_a_flipped_bit_of_a_weight_is_noticed(suffix, tmp_path: Path):
    sae = make_sae(layer=9)
    save_sae(path := tmp_path / f"a{suffix}", sae)
    whole = path.read_bytes()
    for tensor in (sae.W_enc, sae.b_enc, sae.b_pre):
        at = whole.index(tensor.detach().numpy().tobytes()) + 5
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 4]) + whole[at + 1 :])
        with pytest.raises(UserError, match=f"a{suffix} is not a readable SAE checkpoint: damaged"):
            load_sae(path, device="cpu")
    path.write_bytes(whole)
    load_sae(path, device="cpu")
    if suffix == ".safetensors":
        path.with_suffix(".json").unlink()
        load_sae(path, device="cpu")


def test_a_plain_topk_is_written_as_version_1_always_was(tmp_path: Path):
    sae = make_sae(layer=9)
    save_sae(tmp_path / "a.pt", sae)
    record = torch.load(tmp_path / "a.pt", weights_only=True)
    assert list(record) == ["format", "version", "config", "state_dict"]
    assert record["version"] == 1 and list(record["config"]) == [
        *("d_model", "n_latents", "k", "layer", "hook_point", "prepend_bos", "max_token_length"),
        *("norm_eps", "normalisation", "held_out_fraction", "held_out_seed"),
        *("model_fingerprint", "dataset_fingerprint", "max_activations"),
    ]
    record["config"]["word_of_the_future"] = 1
    torch.save(record, tmp_path / "a.pt")
    with pytest.raises(UserError, match="says word_of_the_future, which is not known here"):
        load_sae(tmp_path / "a.pt", device="cpu")


@pytest.mark.parametrize("normalisation", ["per_token_standardise", "none", "scalar"])
def test_normalise_is_undone_and_steering_is_in_the_raw_scale(normalisation):
    facts = {"normalisation": normalisation, "norm_factor": 0.5}
    sae, x = make_rule("relu", **facts), 3 * torch.randn(9, 24) + 1
    z, mean, scale = sae.normalise(x)
    torch.testing.assert_close(denormalise(z, mean, scale), x)
    by_hand = {"none": x, "scalar": 0.5 * x}.get(normalisation, standardise(x)[0])
    torch.testing.assert_close(z, by_hand)
    present = dense_activations(sae, z).float()[:, 7]
    shift = steering_shift(sae, [Steer(7, "set", 2.5)], x)
    spread = {"none": torch.ones(9, 1), "scalar": torch.full((9, 1), 2.0)}
    wanted = spread.get(normalisation, x.std(1, keepdim=True) + 1e-6)
    torch.testing.assert_close(shift, wanted * (2.5 - present)[:, None] * sae.W_dec[7])
    assert torch.equal(steering_shift(sae, [Steer(7, "scale", 1.0)], x), torch.zeros(9, 24))


@pytest.mark.parametrize("activation", ["topk", "jumprelu"])
def test_narrow_weights_are_multiplied_in_float32(activation, tmp_path: Path):
    sae = make_rule(activation)
    save_sae(tmp_path / "a.pt", sae)
    narrow = load_sae(tmp_path / "a.pt", device="cpu", dtype=torch.bfloat16)
    assert narrow.W_dec.dtype == torch.bfloat16 and narrow.b_pre.dtype == torch.float32
    with torch.no_grad():
        sae.W_enc.copy_(narrow.W_enc)
        sae.W_dec.copy_(narrow.W_dec)
    x = torch.randn(30, 24)
    torch.testing.assert_close(narrow(x), sae(x), rtol=1e-5, atol=1e-5)
    steers = [Steer(3, "add", 1.0), Steer(4, "ablate")]
    torch.testing.assert_close(steering_shift(narrow, steers, x), steering_shift(sae, steers, x))


def test_a_topk_may_scale_what_it_kept(tmp_path: Path):
    sae = make_rule("topk")
    scaled = TopKSparseAutoencoder(sae.config, scaled=True).requires_grad_(False)
    scaled.load_state_dict(sae.state_dict() | {"magnitude_scale": torch.linspace(1, 2, 64)})
    save_sae(tmp_path / "a.pt", scaled)
    x = torch.randn(30, 24)
    wanted = dense_activations(sae, x).float() * torch.linspace(1, 2, 64)
    for encode in (load_sae(tmp_path / "a.pt", device="cpu").encode, fastest_encode(scaled)):
        values, indices = encode(x).matrices()
        dense = torch.zeros(30, 64).scatter(1, indices, values)
        torch.testing.assert_close(dense, wanted, rtol=1e-5, atol=1e-6)


def test_a_batchtopk_without_its_threshold_says_so():
    sae = TopKSparseAutoencoder(SAEConfig(4, 8, 2, activation="batchtopk"))
    sae.initialise(torch.zeros(4), seed=0)
    with pytest.raises(ValueError, match="no threshold yet"):
        sae.encode(torch.randn(3, 4))
