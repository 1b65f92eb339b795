"""Steering vectors: a tuned setting as one tensor that plain transformers can add."""

from __future__ import annotations

import json
from collections.abc import Sequence

import torch
from safetensors.torch import save

from saint.stage.errors import UserError
from saint.steering.settings import Setting
from saint.steering.studio import Studio

FORMAT = "saint.steering_vector"
VERSION = 1


def export_vector(studio: Studio, settings: Sequence[Setting]) -> bytes:
    """Return a safetensors file with `vector` (d_model,) float32 = Σ strength_i · unit_i · d_i.

    The edit is x + std(x) · vector at every position but BOS, std over d_model (unbiased, plus
    norm_eps). Metadata: layer (0-based), hook_point, prepend_bos, norm_eps, steer (the settings).
    Raises UserError for settings that depend on the activation (set, scale, ablate), for latents
    of several SAEs, or for none.
    """
    studio.check_settings(settings)
    if not settings:
        raise UserError("choose a latent first: there is nothing to export")
    if any(setting.mode != "add" for setting in settings):
        raise UserError("only “add” makes a constant vector: set, scale and ablate need the SAE")
    if len({setting.sae for setting in settings}) > 1:
        raise UserError("a steering vector belongs to one layer: choose latents of one SAE")
    dictionary = studio.dictionaries[settings[0].sae]
    sae = dictionary.sae
    vector = torch.zeros(sae.config.d_model)
    for setting in settings:
        amount = dictionary.steer(setting).amount
        vector += amount * sae.W_dec[setting.latent].detach().float().cpu()
    metadata = {
        "format": FORMAT,
        "version": str(VERSION),
        "layer": str(dictionary.hook.layer),
        "hook_point": dictionary.hook.name,
        "prepend_bos": json.dumps(sae.config.prepend_bos),
        "norm_eps": repr(sae.config.norm_eps),
        "strength": json.dumps([setting.strength for setting in settings]),
        "steer": json.dumps([str(setting) for setting in settings]),
    }
    return save({"vector": vector}, metadata)
