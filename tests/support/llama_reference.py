"""Tiny random Llamas by transformers, and their checkpoints in every format.

The conversion to Meta's names and row order is written out here a second time, on purpose.
"""

import base64
import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from llama_3 import HOOK_NAMES, HookPoint

torch.set_num_threads(1)  # these models are so small that a second thread only costs

N_VOCAB = 264
SPECIAL_TOKENS = {"<|begin|>": 256, "<|end|>": 257, "<|turn|>": 258}

LLAMA_3_2 = {
    "rope_type": "llama3",
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
VARIANTS = {
    "llama-3": {"num_attention_heads": 4, "num_key_value_heads": 4},
    "llama-3.1": {
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "rope_parameters": LLAMA_3_2 | {"factor": 8.0, "rope_theta": 20000.0},
    },
    "llama-3.2": {
        "num_attention_heads": 4,
        "num_key_value_heads": 1,
        "head_dim": 24,
        "tie_word_embeddings": True,
        "rope_parameters": LLAMA_3_2 | {"rope_theta": 20000.0},
    },
}


def reference(variant: str, **changes) -> Any:
    """A float32 model with weights large enough that every part of it shows in the logits."""
    torch.manual_seed(sum(map(ord, variant)))
    settings = {
        "hidden_size": 48,
        "intermediate_size": 80,
        "num_hidden_layers": 3,
        "vocab_size": N_VOCAB,
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": 4096,
        "initializer_range": 0.15,
        "bos_token_id": 256,
        "eos_token_id": 257,
        "rope_parameters": {"rope_type": "default", "rope_theta": 20000.0},
    }
    model = LlamaForCausalLM(LlamaConfig(**(settings | VARIANTS[variant] | changes))).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.uniform_(0.5, 1.5)
    return model


def write_tokenizer(model_dir: Path) -> None:
    """A tokenizer of the 256 bytes, with `tokenizer_spec.json`."""
    model_dir.mkdir(parents=True, exist_ok=True)
    lines = [b"%s %d" % (base64.b64encode(bytes([i])), i) for i in range(256)]
    (model_dir / "tokenizer.model").write_bytes(b"\n".join(lines) + b"\n")
    spec = {
        "format": "saint.tokenizer",
        "version": 1,
        "pattern": r"\s+|\S+",
        "special_tokens": SPECIAL_TOKENS,
        "bos_token": "<|begin|>",
        "stop_tokens": ["<|end|>"],
        "n_vocab": 259,
    }
    (model_dir / "tokenizer_spec.json").write_text(json.dumps(spec))


def write_hugging_face(model: Any, model_dir: Path, *, shard_size="1GB") -> Path:
    write_tokenizer(model_dir)
    model.save_pretrained(model_dir, max_shard_size=shard_size)
    return model_dir


def meta_weights(model: Any) -> dict[str, Tensor]:
    """The model's weights by Meta's names, Q and K rows as pairs."""
    head_dim, weights = model.config.head_dim, {}

    def pairs(weight: Tensor) -> Tensor:
        heads = weight.view(-1, head_dim, weight.shape[1])
        first, second = heads[:, : head_dim // 2], heads[:, head_dim // 2 :]
        return torch.stack((first, second), dim=2).reshape(weight.shape)

    for i, layer in enumerate(model.model.layers):
        attention, mlp, name = layer.self_attn, layer.mlp, f"layers.{i}."
        weights |= {
            f"{name}attention.wq.weight": pairs(attention.q_proj.weight),
            f"{name}attention.wk.weight": pairs(attention.k_proj.weight),
            f"{name}attention.wv.weight": attention.v_proj.weight,
            f"{name}attention.wo.weight": attention.o_proj.weight,
            f"{name}feed_forward.w1.weight": mlp.gate_proj.weight,
            f"{name}feed_forward.w2.weight": mlp.down_proj.weight,
            f"{name}feed_forward.w3.weight": mlp.up_proj.weight,
            f"{name}attention_norm.weight": layer.input_layernorm.weight,
            f"{name}ffn_norm.weight": layer.post_attention_layernorm.weight,
        }
    weights["tok_embeddings.weight"] = model.model.embed_tokens.weight
    weights["norm.weight"] = model.model.norm.weight
    if not model.config.tie_word_embeddings:
        weights["output.weight"] = model.lm_head.weight
    return {name: weight.detach().clone() for name, weight in weights.items()}


def meta_params(model: Any) -> dict:
    """`params.json`; the hidden size is given by `multiple_of`, as Meta does."""
    config = model.config
    rope = config.rope_parameters
    return {
        "dim": config.hidden_size,
        "n_layers": config.num_hidden_layers,
        "n_heads": config.num_attention_heads,
        "n_kv_heads": config.num_key_value_heads,
        "head_dim": config.head_dim,
        "vocab_size": config.vocab_size,
        "ffn_dim_multiplier": 0.3,
        "multiple_of": config.intermediate_size,
        "norm_eps": config.rms_norm_eps,
        "rope_theta": rope["rope_theta"],
        "use_scaled_rope": rope["rope_type"] == "llama3",
        "rope_scaling_factor": rope.get("factor"),
    }


def write_meta(model: Any, model_dir: Path, *, n_files: int = 1) -> Path:
    """`params.json` and `consolidated.NN.pth`, split as Meta's tensor-parallel shards are."""
    write_tokenizer(model_dir)
    (model_dir / "params.json").write_text(json.dumps(meta_params(model)))
    for i in range(n_files):
        shard = {}
        for name, weight in meta_weights(model).items():
            if "norm" in name:
                shard[name] = weight
            else:
                dim = 1 if name.endswith(("wo.weight", "w2.weight")) else 0
                shard[name] = weight.chunk(n_files, dim)[i].clone()
        torch.save(shard, model_dir / f"consolidated.{i:02d}.pth")
    return model_dir


def reference_activations(model: Any, tokens: Tensor) -> dict[HookPoint, Tensor]:
    """Every hook point of transformers' own forward pass, by module hooks."""
    found: dict[HookPoint, Tensor] = {}
    handles = []

    def keep(point: HookPoint, inputs: bool = False):
        def hook(module, args, kwargs, output):
            value = (args[0] if args else kwargs["hidden_states"]) if inputs else output
            found[point] = value[0] if isinstance(value, tuple) else value

        return hook

    for i, layer in enumerate(model.model.layers):
        places = zip(
            HOOK_NAMES,
            (layer, layer.input_layernorm, layer.self_attn, layer.mlp, layer),
            strict=True,
        )
        for name, module in places:
            hook = keep(HookPoint(i, name), inputs=name == "resid_pre")
            handles.append(module.register_forward_hook(hook, with_kwargs=True))
    with torch.no_grad():
        model(tokens)
    for handle in handles:
        handle.remove()
    return found


def save_shared(weights: dict[str, Tensor], path: Path) -> None:
    save_file({name: weight.contiguous() for name, weight in weights.items()}, path)
