"""Files in the exact layouts of other tools, made by hand, with what they compute in float64.

The layouts were read in sae-lens 6.54, eai-sparsify 1.3.3, dictionary-learning 0.1.0, lm_saes
(Llama Scope) and Goodfire's notebook; tests/exchange/test_peers.py checks the first three on files
that the packages write themselves.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

D, N, K = 12, 40, 4
Model = Callable[[Tensor], tuple[Tensor, Tensor]]
"""Raw x (n, D) float64 to dense activations · decoder norms (n, N) and outputs (n, D)."""


def weights(seed: int = 0) -> dict[str, Tensor]:
    """Float32 tensors whose decoder directions (N, D) have norms from about 0.5 to 2."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    norms = (0.5 * draw(N)).exp().unsqueeze(1)
    decoder = norms * torch.nn.functional.normalize(draw(N, D), dim=1)
    return {
        "enc": draw(N, D) / 3, "dec": decoder, "b_enc": 0.2 * draw(N), "b_dec": 0.3 * draw(D),
        "threshold": 0.3 + 0.2 * draw(N).abs(), "r_mag": 0.3 * draw(N), "b_mag": 0.2 * draw(N),
    }  # fmt: skip


def topk(pre: Tensor, k: int) -> Tensor:
    """Keep the k largest of each row, after ReLU."""
    best = pre.topk(k, dim=1)
    return torch.zeros_like(pre).scatter(1, best.indices, best.values.relu())


def model(
    w: dict[str, Tensor], rule: Callable[[Tensor], Tensor], *, subtract: bool = True
) -> Model:
    """The plain formula in float64; rule: of x @ encᵀ, (n, N), bias not added."""
    wide = {name: tensor.double() for name, tensor in w.items()}

    def run(x: Tensor) -> tuple[Tensor, Tensor]:
        product = (x - wide["b_dec"] if subtract else x) @ wide["enc"].T
        a = rule(product)
        return a * wide["dec"].norm(dim=1), a @ wide["dec"] + wide["b_dec"]

    return run


def _json(path: Path, value: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))


def saelens(folder: Path, architecture: str, **more: object) -> Model:
    """SAELens 6: standard, topk (with or without the decoder's norms), jumprelu, gated."""
    w = weights()
    metadata = {"model_name": "llama", "hook_name": "blocks.2.hook_resid_post", "prepend_bos": True}
    metadata["context_size"] = 128
    config = {
        "architecture": architecture, "d_in": D, "d_sae": N, "dtype": "float32", "device": "cpu",
        "apply_b_dec_to_input": True, "normalize_activations": "none",
        "reshape_activations": "none", "metadata": metadata, **more,
    }  # fmt: skip
    _json(folder / "cfg.json", config)
    tensors = {"W_enc": w["enc"].T, "W_dec": w["dec"], "b_dec": w["b_dec"]}
    b_enc, limit = w["b_enc"].double(), w["threshold"].double()
    if architecture == "gated":
        tensors |= {"b_gate": w["b_enc"], "r_mag": w["r_mag"], "b_mag": w["b_mag"]}
        scale, bias = w["r_mag"].double().exp(), w["b_mag"].double()

        def rule(product: Tensor) -> Tensor:
            return (product * scale + bias).relu() * (product + b_enc > 0)
    elif architecture == "topk":
        tensors["b_enc"] = w["b_enc"]
        norms = w["dec"].double().norm(dim=1) if more["rescale_acts_by_decoder_norm"] else 1.0

        def rule(product: Tensor) -> Tensor:
            return topk((product + b_enc) * norms, K) / norms
    else:
        tensors["b_enc"] = w["b_enc"]
        jump = architecture == "jumprelu"
        if jump:
            tensors["threshold"] = w["threshold"]

        def rule(product: Tensor) -> Tensor:
            return (product + b_enc).relu() * (product + b_enc > (limit if jump else 0))

    save_file({k: t.contiguous() for k, t in tensors.items()}, folder / "sae_weights.safetensors")
    run = model(w, rule, subtract=bool(config["apply_b_dec_to_input"]))
    if config["normalize_activations"] != "layer_norm":
        return run

    def standardised(x: Tensor) -> tuple[Tensor, Tensor]:
        mean, std = x.mean(1, keepdim=True), x.std(1, keepdim=True)
        a, out = run((x - mean) / (std + 1e-5))
        return a, out * std + mean

    return standardised


def sparsify(folder: Path) -> Model:
    """The layout of sparsify 1.3.3."""
    w = weights()
    config = {
        "activation": "topk", "expansion_factor": 32, "normalize_decoder": True, "num_latents": N,
        "k": K, "multi_topk": False, "skip_connection": False, "transcode": False, "d_in": D,
    }  # fmt: skip
    _json(folder / "cfg.json", config)
    tensors = {"encoder.weight": w["enc"], "encoder.bias": w["b_enc"]}
    save_file(tensors | {"W_dec": w["dec"], "b_dec": w["b_dec"]}, folder / "sae.safetensors")
    return model(w, lambda product: topk(product + w["b_enc"].double(), K))


def dictionary_learning(folder: Path, name: str) -> Model:
    """The layout of dictionary_learning 0.1.0: ae.pt of one of its classes."""
    w = weights()
    config = {
        "trainer": {"dict_class": name, "layer": 3, "submodule_name": "resid_post_layer_3"},
        "buffer": {"ctx_len": 128},
    }
    _json(folder / "config.json", config)
    b_enc, limit = w["b_enc"].double(), w["threshold"].double()
    linear = {"encoder.weight": w["enc"], "decoder.weight": w["dec"].T.contiguous()}
    tensors, subtract = linear | {"encoder.bias": w["b_enc"], "b_dec": w["b_dec"]}, True
    tensors |= {"k": torch.tensor(K, dtype=torch.int), "threshold": torch.tensor(-1.0)}
    rule = {
        "AutoEncoderTopK": lambda product: topk(product + b_enc, K),
        "BatchTopKSAE": lambda product: (product + b_enc).relu() * (product + b_enc > 0.4),
        "AutoEncoder": lambda product: (product + b_enc).relu(),
        "GatedAutoEncoder": lambda product: (
            (product * w["r_mag"].double().exp() + w["b_mag"].double()).relu()
            * (product + b_enc > 0)
        ),
        "JumpReluAutoEncoder": lambda p: (p + b_enc).relu() * (p + b_enc > limit),
    }[name]
    if name == "BatchTopKSAE":
        tensors["threshold"] = torch.tensor(0.4)
    elif name == "AutoEncoder":
        tensors = linear | {"encoder.bias": w["b_enc"], "bias": w["b_dec"]}
    elif name == "GatedAutoEncoder":
        tensors = linear | {"gate_bias": w["b_enc"], "mag_bias": w["b_mag"], "r_mag": w["r_mag"]}
        tensors["decoder_bias"] = w["b_dec"]
    elif name == "JumpReluAutoEncoder":
        tensors = {"W_enc": w["enc"].T.contiguous(), "b_enc": w["b_enc"], "W_dec": w["dec"]}
        tensors |= {"b_dec": w["b_dec"], "threshold": w["threshold"]}
        subtract = False
    torch.save(tensors, folder / "ae.pt")
    return model(w, rule, subtract=subtract)


def llama_scope(folder: Path) -> Model:
    """Llama Scope, as lm_saes infers: biases divided by √d / mean norm, the threshold not."""
    w, average, limit = weights(), 9.0, 0.35
    factor = math.sqrt(D) / average
    config = {
        "d_model": D, "d_sae": N, "act_fn": "jumprelu", "jump_relu_threshold": limit,
        "hook_point_in": "blocks.15.hook_resid_post", "hook_point_out": "blocks.15.hook_resid_post",
        "norm_activation": "dataset-wise", "use_decoder_bias": True, "use_glu_encoder": False,
        "dataset_average_activation_norm": {"in": average, "out": average},
        "sparsity_include_decoder_norm": True, "apply_decoder_bias_to_pre_encoder": False,
    }  # fmt: skip
    _json(folder / "hyperparams.json", config)
    (folder / "checkpoints").mkdir()
    tensors = {
        "encoder.weight": w["enc"], "encoder.bias": w["b_enc"],
        "decoder.weight": w["dec"].T.contiguous(), "decoder.bias": w["b_dec"],
    }  # fmt: skip
    save_file(tensors, folder / "checkpoints" / "final.safetensors")
    norms, b_enc = w["dec"].double().norm(dim=1), w["b_enc"].double() / factor

    def rule(product: Tensor) -> Tensor:
        pre = product + b_enc
        return pre * (pre * norms > limit)

    return model(w | {"b_dec": w["b_dec"].double() / factor}, rule, subtract=False)


def goodfire(folder: Path) -> Model:
    """Goodfire: one .pth."""
    w = weights()
    tensors = {
        "encoder_linear.weight": w["enc"], "encoder_linear.bias": w["b_enc"],
        "decoder_linear.weight": w["dec"].T.contiguous(), "decoder_linear.bias": w["b_dec"],
    }  # fmt: skip
    folder.mkdir(exist_ok=True)
    torch.save(tensors, folder / "Llama-3.1-8B-Instruct-SAE-l19.pth")
    return model(w, lambda p: (p + w["b_enc"].double()).relu(), subtract=False)


def gemma_scope(folder: Path) -> Model:
    """Gemma Scope: params.npz."""
    w = weights()
    folder.mkdir(exist_ok=True)
    arrays = {"W_enc": w["enc"].T, "W_dec": w["dec"], "b_enc": w["b_enc"], "b_dec": w["b_dec"]}
    arrays["threshold"] = w["threshold"]
    np.savez(folder / "params.npz", **{n: t.numpy() for n, t in arrays.items()})  # type: ignore
    b_enc, limit = w["b_enc"].double(), w["threshold"].double()
    return model(w, lambda p: (p + b_enc).relu() * (p + b_enc > limit), subtract=False)
