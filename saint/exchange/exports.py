"""Writers of other tools' files, from ours; what one cannot carry is refused by name."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sae import SAEConfig
from saint.exchange.foreign import LazyTensor, as_tensor, per_row, write_tensors
from saint.exchange.hooks import lens_name, module_name
from saint.stage.errors import UserError
from saint.stage.files import save_torch, write_text

SAELENS_VERSION = "6.54.0"
_CLASSES = {
    "topk": ("AutoEncoderTopK", "TopKTrainer"),
    "batchtopk": ("BatchTopKSAE", "BatchTopKTrainer"),
    "jumprelu": ("JumpReluAutoEncoder", "JumpReluTrainer"),
    "relu": ("AutoEncoder", "StandardTrainer"),
    "gated": ("GatedAutoEncoder", "GatedSAETrainer"),
}


class Parts:
    """Our tensors, ready for tools that multiply raw activations, or standardise tokens themselves.

    An SAE of activations · factor is the same as one of raw activations whose biases and thresholds
    are divided by the factor: every rule keeps its choice when all is scaled.
    """

    def __init__(self, config: SAEConfig, state: Mapping[str, Tensor]):
        factor = config.norm_factor if config.normalisation == "scalar" else 1.0
        self.config = config
        self.threshold_value = None if config.threshold is None else config.threshold / factor
        self.w_enc, decoder = state["encoder.weight"], state["decoder.weight"]
        self.b_enc = state["encoder.bias"].float() / factor
        self.b_dec = state["b_pre"].float() / factor
        scale, bias = state.get("magnitude_scale"), state.get("magnitude_bias")
        self.scale, self.bias = scale, None if bias is None else bias / factor
        self.threshold = state.get("threshold")
        if self.threshold is not None:
            self.threshold = self.threshold / factor
        n, d = self.w_enc.shape
        topk_scale = scale if config.activation == "topk" else None
        self.unscaled = decoder if topk_scale is None else None
        wide = torch.ones(n) if topk_scale is None else topk_scale
        self.encoder = LazyTensor.of(self.w_enc)
        self.encoder_t = LazyTensor((d, n), lambda a, b: self.w_enc.T[a:b])
        self.decoder_t = LazyTensor((d, n), lambda a, b: decoder[a:b].float() * wide)
        self.decoder = LazyTensor(
            (n, d), lambda a, b: decoder.T[a:b].float() * wide[a:b].unsqueeze(1)
        )

    def b_enc_of_raw(self) -> Tensor:
        """Return the encoder bias of a tool that does not subtract b_dec from its input."""
        shift = per_row(self.w_enc, lambda w: w @ self.b_dec.double())
        return (self.b_enc.double() - shift).float()


def _refuse_standardised(config: SAEConfig, tool: str) -> None:
    if config.normalisation == "per_token_standardise":
        raise UserError(
            f"{tool} cannot standardise tokens, and loads such an SAE without a word to compute "
            "nonsense: export --format saelens, which can, or train with --normalisation none"
        )


def export_saelens(config: SAEConfig, state: Mapping[str, Tensor], directory: Path) -> None:
    """Write cfg.json and sae_weights.safetensors of SAELens 6 (`SAE.load_from_disk`).

    A batchtopk becomes a jumprelu with one threshold, as SAELens itself saves it. Its layer_norm
    adds 1e-5 to a token's deviation where ours adds norm_eps.
    """
    parts, rule = Parts(config, state), config.activation
    n, d = config.n_latents, config.d_model
    tensors = {
        "W_enc": parts.encoder_t,
        "W_dec": parts.decoder,
        "b_dec": LazyTensor.of(parts.b_dec),
    }
    more: dict[str, Any] = {}
    if rule == "gated":
        assert parts.scale is not None and parts.bias is not None
        tensors |= {"b_gate": LazyTensor.of(parts.b_enc), "b_mag": LazyTensor.of(parts.bias)}
        tensors["r_mag"] = LazyTensor.of(parts.scale.log())
    else:
        tensors["b_enc"] = LazyTensor.of(parts.b_enc)
    if rule == "jumprelu":
        assert parts.threshold is not None
        tensors["threshold"] = LazyTensor.of(parts.threshold)
    elif rule == "batchtopk":
        tensors["threshold"] = LazyTensor.of(torch.full((n,), _calibrated(parts)))
    elif rule == "topk":
        more = {"k": config.k, "rescale_acts_by_decoder_norm": False}
    architectures = {"relu": "standard", "batchtopk": "jumprelu"}
    standardised = config.normalisation == "per_token_standardise"
    length = config.max_token_length
    described = {
        "architecture": architectures.get(rule, rule),
        "d_in": d,
        "d_sae": n,
        "dtype": "float32",
        "device": "cpu",
        "apply_b_dec_to_input": True,
        "normalize_activations": "layer_norm" if standardised else "none",
        "reshape_activations": "none",
        **more,
        "metadata": {
            "model_name": config.model_name,
            "hook_name": None
            if config.layer is None
            else lens_name(config.layer, config.hook_point),
            "hook_head_index": None,
            "context_size": None if length is None else length + config.prepend_bos,
            "prepend_bos": config.prepend_bos,
            "sae_lens_version": SAELENS_VERSION,
        },
    }
    write_tensors(directory / "sae_weights.safetensors", tensors, {})
    _write_config(directory / "cfg.json", described)


def _calibrated(parts: Parts) -> float:
    if parts.threshold_value is None:
        raise UserError("this BatchTopK SAE has no threshold yet: it was not calibrated")
    return parts.threshold_value


def export_sparsify(config: SAEConfig, state: Mapping[str, Tensor], directory: Path) -> None:
    """Write cfg.json and sae.safetensors of sparsify 1 (`SparseCoder.load_from_disk`)."""
    if config.activation != "topk":
        raise UserError(
            f"sparsify has no {config.activation}, only topk: export --format saelens instead"
        )
    _refuse_standardised(config, "sparsify")
    parts = Parts(config, state)
    tensors = {
        "encoder.weight": parts.encoder,
        "encoder.bias": LazyTensor.of(parts.b_enc),
        "W_dec": parts.decoder,
        "b_dec": LazyTensor.of(parts.b_dec),
    }
    described = {
        "activation": "topk",
        "expansion_factor": max(1, config.n_latents // config.d_model),
        "normalize_decoder": True,
        "num_latents": config.n_latents,
        "k": config.k,
        "multi_topk": False,
        "skip_connection": False,
        "transcode": False,
        "d_in": config.d_model,
        "hookpoint": None if config.layer is None else module_name(config.layer, config.hook_point),
        "model": config.model_name,
    }
    write_tensors(directory / "sae.safetensors", tensors, {})
    _write_config(directory / "cfg.json", described)


def export_dictionary_learning(
    config: SAEConfig, state: Mapping[str, Tensor], directory: Path
) -> None:
    """Write ae.pt and config.json of dictionary_learning 0.1 (`from_pretrained` of its class)."""
    _refuse_standardised(config, "dictionary_learning")
    parts, rule = Parts(config, state), config.activation
    encoder, decoder = {"encoder.weight": parts.w_enc.float()}, None
    if rule == "jumprelu":
        assert parts.threshold is not None and parts.unscaled is not None
        # Views of mapped files: torch saves them with their strides, and none is in memory.
        encoder = {"W_enc": parts.w_enc.float().T, "b_enc": parts.b_enc_of_raw()}
        decoder = {"W_dec": parts.unscaled.float().T, "b_dec": parts.b_dec}
        encoder["threshold"] = parts.threshold
    if decoder is None:
        same = parts.unscaled  # as it is, it need not be in memory
        decoder = {"decoder.weight": as_tensor(parts.decoder_t) if same is None else same.float()}
    if rule == "gated":
        assert parts.scale is not None and parts.bias is not None
        biases = {"gate_bias": parts.b_enc, "mag_bias": parts.bias, "r_mag": parts.scale.log()}
        encoder |= biases | {"decoder_bias": parts.b_dec}
    elif rule == "relu":
        encoder |= {"encoder.bias": parts.b_enc, "bias": parts.b_dec}
    elif rule != "jumprelu":
        threshold = _calibrated(parts) if rule == "batchtopk" else -1.0
        encoder |= {"encoder.bias": parts.b_enc, "b_dec": parts.b_dec}
        encoder["k"] = torch.tensor(config.k, dtype=torch.int)
        encoder["threshold"] = torch.tensor(threshold)
    dict_class, trainer = _CLASSES[rule]
    layer, place = config.layer, config.hook_point
    if layer is not None and place == "resid_pre" and layer > 0:
        layer, place = layer - 1, "resid_post"
    described = {
        "trainer": {
            "trainer_class": trainer,
            "dict_class": dict_class,
            "activation_dim": config.d_model,
            "dict_size": config.n_latents,
            "k": config.k or None,
            "layer": layer,
            "lm_name": config.model_name,
            "submodule_name": None
            if layer is None
            else f"{place.replace('attn_out', 'attention_out')}_layer_{layer}",
        },
        "buffer": {"d_submodule": config.d_model, "ctx_len": config.max_token_length},
    }
    save_torch(directory / "ae.pt", encoder | decoder)
    _write_config(directory / "config.json", described)


def _write_config(path: Path, described: Mapping[str, Any]) -> None:
    write_text(path, json.dumps(described, indent=2) + "\n")


WRITERS = {
    "saelens": export_saelens,
    "sparsify": export_sparsify,
    "dictionary_learning": export_dictionary_learning,
}
