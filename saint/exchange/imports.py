"""Readers of other tools' files: SAELens, sparsify, dictionary_learning, Llama Scope, Goodfire."""

from __future__ import annotations

import json
import math
import pickle
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from sae import SAEConfig
from saint.exchange.foreign import ForeignSAE, check_shapes
from saint.exchange.hooks import parse_hook
from saint.stage.errors import UserError

Tensors = dict[str, Tensor]


@dataclass(frozen=True)
class Overrides:
    """What a person says of a file that does not say it; None and False leave the file's word."""

    layer: int | None = None
    hook_point: str | None = None
    no_bos: bool = False
    norm_factor: float | None = None
    model_name: str | None = None
    max_token_length: int | None = None


def read_foreign(path: Path, overrides: Overrides) -> ForeignSAE:
    """Recognise a directory or file of another tool and read it; nothing is unpickled.

    Raises UserError for what is not recognised, damaged, or cannot be computed alike here.
    """
    if not path.exists():
        raise UserError(f"{path} does not exist")
    folder = path if path.is_dir() else path.parent
    for _, marker, weights, read in FORMATS:
        chosen = folder / weights if path.is_dir() else path
        named = path.is_dir() or path.name == Path(weights).name
        if named and (folder / marker).is_file() and chosen.is_file():
            config = _read_json(folder / marker) if marker.endswith(".json") else {}
            return _checked(read(config, read_file(chosen), overrides), chosen)
    loose = path if path.is_file() else _only_weights(path)
    tensors = read_file(loose)
    config = _read_json(loose.parent / "config.json", missing_ok=True)
    for keys, read in _BY_KEYS:
        if keys <= tensors.keys():
            return _checked(read(config | {"file_name": loose.name}, tensors, overrides), loose)
    known = ", ".join(sorted({name for name, *_ in FORMATS}))
    raise UserError(
        f"{path} is in no known format ({known}, Goodfire): a bare state dict of our own loads "
        "everywhere with --k, --sae_layer_idx and --hook_point"
    )


def _checked(found: ForeignSAE, source: Path) -> ForeignSAE:
    check_shapes(found, str(source))
    return found


def _only_weights(folder: Path) -> Path:
    suffixes = (".pth", ".pt", ".npz", ".safetensors")
    found = [path for path in sorted(folder.rglob("*")) if path.suffix in suffixes]
    if len(found) != 1:
        what = "no SAE" if not found else f"{len(found)} files: name one of them"
        raise UserError(f"{folder} holds {what}")
    return found[0]


def _read_json(path: Path, *, missing_ok: bool = False) -> dict[str, Any]:
    if missing_ok and not path.is_file():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        raise UserError(f"{path} is no JSON") from None
    if not isinstance(value, dict):
        raise UserError(f"{path} is no JSON object")
    return value


def read_file(path: Path) -> Tensors:
    """Return a file's tensors, memory-mapped where its format allows it."""
    try:
        if path.suffix == ".npz":
            with np.load(path, allow_pickle=False) as arrays:
                return {name: torch.from_numpy(arrays[name]) for name in arrays.files}
        if path.suffix == ".safetensors":
            with safe_open(path, framework="pt") as file:
                return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        try:
            tensors = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except RuntimeError:  # torch's format before 1.6 cannot be mapped
            tensors = torch.load(path, map_location="cpu", weights_only=True)
    except (SafetensorError, pickle.UnpicklingError, RuntimeError, EOFError, ValueError, OSError):
        raise UserError(
            f"{path} is damaged, or holds more than tensors (which is never unpickled)"
        ) from None
    if not isinstance(tensors, dict) or not all(isinstance(t, Tensor) for t in tensors.values()):
        raise UserError(f"{path} is not a plain dictionary of tensors")
    return tensors


def _get(tensors: Mapping[str, Tensor], name: str) -> Tensor:
    if name not in tensors:
        raise UserError(f"the file has no tensor {name}: it has {', '.join(sorted(tensors))}")
    return tensors[name]


def _require(config: Mapping[str, Any], name: str, allowed: tuple[Any, ...], remedy: str) -> None:
    value = config.get(name)
    if value not in allowed:
        raise UserError(f"{name} {value!r} cannot be computed here: {remedy}")


def make_config(
    overrides: Overrides,
    *,
    source: str,
    shape: tuple[int, int],
    hook: str | None,
    model_name: str | None,
    prepend_bos: bool = True,
    context_size: int | None = None,
    **facts: Any,
) -> SAEConfig:
    """Return our config. hook: the other tool's name of the place, None where it says nothing."""
    layer, hook_point = overrides.layer, overrides.hook_point
    if hook is not None and (layer is None or hook_point is None):
        theirs = parse_hook(hook)
        layer = theirs[0] if layer is None else layer
        hook_point = theirs[1] if hook_point is None else hook_point
    prepend_bos = prepend_bos and not overrides.no_bos
    length = overrides.max_token_length
    if length is None and context_size:
        length = context_size - prepend_bos
    known: dict[str, Any] = {"k": 0} | facts
    return SAEConfig(
        d_model=shape[1],
        n_latents=shape[0],
        layer=layer,
        hook_point=hook_point or "resid_pre",
        prepend_bos=prepend_bos,
        max_token_length=length,
        model_name=overrides.model_name or model_name,
        source=source,
        **known,
    )


def _saelens(config: dict[str, Any], tensors: Tensors, overrides: Overrides) -> ForeignSAE:
    """SAELens 3 to 6: cfg.json and sae_weights.safetensors, W_enc (d, n), W_dec (n, d)."""
    rule = config.get("architecture", "standard")
    known = ("standard", "topk", "jumprelu", "gated", "batchtopk", "matryoshka_batchtopk")
    _require({"architecture": rule}, "architecture", known, "there is no such rule")
    reshape = {"reshape_activations": config.get("reshape_activations", "none")}
    _require(reshape, "reshape_activations", ("none",), "attention heads are not concatenated here")
    if config.get("finetuning_scaling_factor"):
        raise UserError("finetuning_scaling_factor: fold it into W_dec in SAELens first")
    norm = config.get("normalize_activations", "none")
    norms: dict[str, dict[str, Any]] = {
        "none": {"normalisation": "none"},
        "layer_norm": {"norm_eps": 1e-5},
    }
    if overrides.norm_factor is not None:
        scalar = {"normalisation": "scalar", "norm_factor": overrides.norm_factor}
        norms["expected_average_only_in"] = scalar
    remedy = "call fold_activation_norm_scaling_factor in SAELens before saving"
    if norm == "expected_average_only_in":
        remedy += ", or name its factor with --norm_factor"
    _require({"normalize_activations": norm}, "normalize_activations", tuple(norms), remedy)
    meta = config | config.get("metadata", {})
    w_enc, threshold = _get(tensors, "W_enc").T, tensors.get("threshold")
    activation = "relu" if rule == "standard" else rule
    if "batchtopk" in rule:
        if threshold is None:
            raise UserError(
                f"{rule} has no threshold: save it for inference in SAELens (save_inference_model)"
            )
        activation = "jumprelu"
    gated = rule == "gated"
    facts = {"activation": activation} | norms[norm]
    if activation == "topk":
        facts["k"] = int(config.get("k") or (config.get("activation_fn_kwargs") or {}).get("k", 0))
    return ForeignSAE(
        config=make_config(
            overrides,
            source=f"saelens {rule}",
            shape=(w_enc.shape[0], w_enc.shape[1]),
            hook=meta.get("hook_name"),
            model_name=meta.get("model_name"),
            prepend_bos=bool(meta.get("prepend_bos", True)),
            context_size=meta.get("context_size"),
            **facts,
        ),
        w_enc=w_enc,
        b_enc=_get(tensors, "b_gate" if gated else "b_enc"),
        w_dec=_get(tensors, "W_dec"),
        b_dec=_get(tensors, "b_dec"),
        threshold=threshold if activation == "jumprelu" else None,
        magnitude_scale=_get(tensors, "r_mag").float().exp() if gated else None,
        magnitude_bias=_get(tensors, "b_mag").float() if gated else None,
        subtracts_b_dec=bool(config.get("apply_b_dec_to_input", True)),
        selects_by_norm=rule == "topk" and bool(config.get("rescale_acts_by_decoder_norm")),
    )


def _sparsify(config: dict[str, Any], tensors: Tensors, overrides: Overrides) -> ForeignSAE:
    """EleutherAI's sparsify 1: cfg.json and sae.safetensors, encoder.weight and W_dec (n, d)."""
    if config.get("transcode") or config.get("skip_connection"):
        raise UserError(
            "a transcoder writes elsewhere than it reads: only autoencoders can be used"
        )
    rule = {"activation": config.get("activation", "topk")}
    _require(rule, "activation", ("topk",), "groups of latents are not compared here")
    w_enc, hook = _get(tensors, "encoder.weight"), config.get("hookpoint")
    facts = {"activation": "topk", "k": int(config["k"]), "normalisation": "none"}
    return ForeignSAE(
        config=make_config(
            overrides,
            source="sparsify topk",
            shape=(w_enc.shape[0], w_enc.shape[1]),
            hook=hook,
            model_name=config.get("model"),
            **facts,
        ),
        w_enc=w_enc,
        b_enc=_get(tensors, "encoder.bias"),
        w_dec=_get(tensors, "W_dec"),
        b_dec=_get(tensors, "b_dec"),
    )


def _dictionary_learning(
    config: dict[str, Any], tensors: Tensors, overrides: Overrides
) -> ForeignSAE:
    """dictionary_learning 0.1: ae.pt, whose keys tell the class, and config.json."""
    trainer = config.get("trainer", {})
    name, norm = trainer.get("dict_class", ""), {"normalisation": "none"}
    layer, place = trainer.get("layer"), trainer.get("submodule_name")
    hook = place or (None if layer is None else f"resid_post_layer_{layer}")

    def build(rule: str, w_enc: Tensor, b_enc: Tensor, w_dec: Tensor, b_dec: Tensor, **more: Any):
        facts = {"activation": rule} | norm | more.pop("facts", {})
        made = make_config(
            overrides,
            source=f"dictionary_learning {name or rule}",
            shape=(w_enc.shape[0], w_enc.shape[1]),
            hook=hook,
            model_name=trainer.get("lm_name"),
            context_size=config.get("buffer", {}).get("ctx_len"),
            **facts,
        )
        return ForeignSAE(made, w_enc, b_enc, w_dec, b_dec, **more)

    if "W_enc" in tensors:  # JumpReluAutoEncoder
        parts = (_get(tensors, key) for key in ("b_enc", "W_dec", "b_dec"))
        w_enc, threshold = tensors["W_enc"].T, _get(tensors, "threshold")
        return build("jumprelu", w_enc, *parts, threshold=threshold, subtracts_b_dec=False)
    w_enc, w_dec = _get(tensors, "encoder.weight"), _get(tensors, "decoder.weight").T
    if "r_mag" in tensors:  # GatedAutoEncoder
        more = {
            "magnitude_scale": tensors["r_mag"].float().exp(),
            "magnitude_bias": _get(tensors, "mag_bias").float(),
        }
        biases = (_get(tensors, "gate_bias"), w_dec, _get(tensors, "decoder_bias"))
        return build("gated", w_enc, *biases, **more)
    b_enc = _get(tensors, "encoder.bias")
    if "bias" in tensors:  # AutoEncoder
        return build("relu", w_enc, b_enc, w_dec, tensors["bias"])
    if "decoder.bias" in tensors:  # AutoEncoderNew
        return build("relu", w_enc, b_enc, w_dec, tensors["decoder.bias"], subtracts_b_dec=False)
    k, threshold = int(_get(tensors, "k")), float(tensors.get("threshold", torch.tensor(-1.0)))
    batch = "BatchTopK" in name or (not name and threshold >= 0)
    facts: dict[str, Any] = {"k": k}
    if batch:
        facts["threshold"] = max(threshold, 0.0)
    rule = "batchtopk" if batch else "topk"
    return build(rule, w_enc, b_enc, w_dec, _get(tensors, "b_dec"), facts=facts)


def _llama_scope(config: dict[str, Any], tensors: Tensors, overrides: Overrides) -> ForeignSAE:
    """Llama Scope: hyperparams.json and checkpoints/final.safetensors, as lm_saes infers with it.

    The threshold is one of activations in the raw scale, on activation · decoder norm; biases are
    in the scale in which an activation's mean norm is √d.
    """
    w_enc, factor = _get(tensors, "encoder.weight"), 1.0
    if config.get("use_glu_encoder"):
        raise UserError("use_glu_encoder: a GLU encoder cannot be computed here")
    norm = {"norm_activation": config.get("norm_activation", "inference")}
    _require(norm, "norm_activation", ("dataset-wise", "inference"), "tokens differ in their scale")
    if norm["norm_activation"] == "dataset-wise":
        averages = config.get("dataset_average_activation_norm") or {}
        average = averages.get("in", averages.get(config.get("hook_point_in")))
        if not average:
            raise UserError("hyperparams.json has no dataset_average_activation_norm")
        factor = math.sqrt(w_enc.shape[1]) / float(average)
    if config.get("hook_point_out", config.get("hook_point_in")) != config.get("hook_point_in"):
        raise UserError(
            "a transcoder writes elsewhere than it reads: only autoencoders can be used"
        )
    n, limit = w_enc.shape[0], float(config.get("jump_relu_threshold") or 0)
    topk = config.get("act_fn") == "topk" and not limit
    rule = "topk" if topk else "jumprelu" if limit else "relu"
    facts: dict[str, Any] = {"activation": rule, "normalisation": "none"}
    if topk:
        facts["k"] = int(config["top_k"])
    bias = tensors.get("decoder.bias")
    b_dec = torch.zeros(w_enc.shape[1]) if bias is None else bias
    return ForeignSAE(
        config=make_config(
            overrides,
            source=f"llama_scope {rule}",
            shape=(n, w_enc.shape[1]),
            hook=config.get("hook_point_in"),
            model_name="meta-llama/Llama-3.1-8B",
            context_size=1024,
            **facts,
        ),
        w_enc=w_enc,
        b_enc=_get(tensors, "encoder.bias").float() / factor,
        w_dec=_get(tensors, "decoder.weight").T,
        b_dec=b_dec.float() / factor,
        threshold=torch.full((n,), limit) if rule == "jumprelu" else None,
        subtracts_b_dec=bool(config.get("apply_decoder_bias_to_pre_encoder", False)),
        selects_by_norm=bool(config.get("sparsity_include_decoder_norm", False)),
    )


def _goodfire(config: dict[str, Any], tensors: Tensors, overrides: Overrides) -> ForeignSAE:
    """Goodfire: one .pth of two linear layers and ReLU; `-l19` in its name: that layer's output."""
    w_enc = _get(tensors, "encoder_linear.weight")
    layer = re.search(r"[-_]l(\d+)", config["file_name"], re.IGNORECASE)
    return ForeignSAE(
        config=make_config(
            overrides,
            source="goodfire relu",
            shape=(w_enc.shape[0], w_enc.shape[1]),
            hook=f"model.layers.{layer[1]}" if layer else None,
            model_name=re.split(r"-SAE", config["file_name"])[0] if layer else None,
            activation="relu",
            normalisation="none",
        ),
        w_enc=w_enc,
        b_enc=_get(tensors, "encoder_linear.bias"),
        w_dec=_get(tensors, "decoder_linear.weight").T,
        b_dec=_get(tensors, "decoder_linear.bias"),
        subtracts_b_dec=False,
    )


def _gemma_scope(config: dict[str, Any], tensors: Tensors, overrides: Overrides) -> ForeignSAE:
    """Gemma Scope: params.npz, JumpReLU with a threshold per latent."""
    w_enc = tensors["W_enc"].T
    return ForeignSAE(
        config=make_config(
            overrides,
            source="gemma_scope jumprelu",
            shape=(w_enc.shape[0], w_enc.shape[1]),
            hook=None,
            model_name=None,
            activation="jumprelu",
            normalisation="none",
        ),
        w_enc=w_enc,
        b_enc=_get(tensors, "b_enc"),
        w_dec=_get(tensors, "W_dec"),
        b_dec=_get(tensors, "b_dec"),
        threshold=_get(tensors, "threshold"),
        subtracts_b_dec=False,
    )


Reader = Callable[[dict[str, Any], Tensors, Overrides], ForeignSAE]
FORMATS: tuple[tuple[str, str, str, Reader], ...] = (
    ("SAELens", "cfg.json", "sae_weights.safetensors", _saelens),
    ("sparsify", "cfg.json", "sae.safetensors", _sparsify),
    ("dictionary_learning", "config.json", "ae.pt", _dictionary_learning),
    ("dictionary_learning", "ae.pt", "ae.pt", _dictionary_learning),
    ("Llama Scope", "hyperparams.json", "checkpoints/final.safetensors", _llama_scope),
    ("Llama Scope", "hyperparams.json", "final.safetensors", _llama_scope),
    ("Gemma Scope", "params.npz", "params.npz", _gemma_scope),
)
"""Names, a file beside the weights, the weights, and their reader."""

_BY_KEYS: tuple[tuple[set[str], Reader], ...] = (
    ({"encoder_linear.weight", "decoder_linear.weight"}, _goodfire),
    ({"W_enc", "W_dec", "b_enc", "b_dec", "threshold"}, _gemma_scope),
    ({"encoder.weight", "decoder.weight", "b_dec"}, _dictionary_learning),
    ({"encoder.weight", "decoder.weight", "bias"}, _dictionary_learning),
)
