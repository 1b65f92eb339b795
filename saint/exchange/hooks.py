"""How other tools name the place in a language model that an SAE reads, and how we do."""

from __future__ import annotations

import re

from saint.stage.errors import UserError

_LENS = {"mlp_out": "mlp_out", "attn_out": "attn_out", "resid_pre": "resid_pre"}
_MODULES = {"mlp": "mlp_out", "self_attn": "attn_out", "input_layernorm": "attn_norm"}
_TRAINERS = {"resid_post": "resid_post", "mlp_out": "mlp_out", "attention_out": "attn_out"}


def parse_hook(name: str) -> tuple[int, str]:
    """Return layer and hook point of a name, `resid_post` of a layer as `resid_pre` of the next.

    Known: TransformerLens (`blocks.21.hook_resid_post`), the modules of transformers
    (`model.layers.21`, whose output is meant, `layers.21.mlp`) and dictionary_learning
    (`resid_post_layer_21`). Raises UserError for others.
    """
    if found := re.fullmatch(r"blocks\.(\d+)\.hook_(\w+)", name):
        kind = {**_LENS, "resid_post": "resid_post"}.get(found[2])
    elif found := re.fullmatch(r"(?:model\.)?layers\.(\d+)(?:\.(\w+))?", name):
        kind = _MODULES.get(found[2]) if found[2] else "resid_post"
    elif found := re.fullmatch(r"(\w+?)_layer_(\d+)", name):
        kind, found = _TRAINERS.get(found[1]), (found[0], found[2])
    elif re.fullmatch(r"(?:model\.)?embed_tokens", name):
        return 0, "resid_pre"
    else:
        kind = None
    if kind is None or found is None:
        raise UserError(
            f"the hook {name!r} has no equal here: name --layer and --hook_point if you know where "
            "the SAE reads"
        )
    layer = int(found[1])
    return (layer + 1, "resid_pre") if kind == "resid_post" else (layer, kind)


def lens_name(layer: int, hook_point: str) -> str:
    """Return SAELens's name: TransformerLens's, or the module's where that one has none."""
    if hook_point == "attn_norm":
        return f"model.layers.{layer}.input_layernorm"
    return f"blocks.{layer}.hook_{hook_point}"


def module_name(layer: int, hook_point: str) -> str:
    """Return sparsify's name: the module of transformers whose output it is."""
    modules = {kind: name for name, kind in _MODULES.items()}
    if hook_point in modules:
        return f"layers.{layer}.{modules[hook_point]}"
    after = layer if hook_point == "resid_post" else layer - 1
    return "embed_tokens" if after < 0 else f"layers.{after}"
