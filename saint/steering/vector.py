"""Steering vectors: a tuned setting as one tensor that plain transformers can add."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import save
from torch import Tensor

from sae import SAEConfig, standardise
from saint.stage.errors import UserError
from saint.stage.files import atomic_path
from saint.steering.settings import ConceptSetting, Setting
from saint.steering.studio import EXAMPLE_PROMPTS, Studio, concept_vector

FORMAT = "saint.steering_vector"
VERSION = 1


def export_vector(
    studio: Studio, settings: Sequence[Setting], concepts: Sequence[ConceptSetting] = ()
) -> bytes:
    """Return a safetensors file with `vector` (d_model,) float32, all that is added to a token.

    That is Σ strength_i · unit_i · d_i over latents plus Σ dose_j · v_j over concepts. The edit is
    x + std(x) · vector at every position but BOS, std over d_model (unbiased, plus norm_eps);
    x + scale · vector where the metadata have a scale (an SAE that does not standardise tokens).
    Metadata: layer (0-based), hook_point, prepend_bos, norm_eps, steer (the settings). Raises
    UserError for settings that depend on the activation (set, scale, ablate), of several SAEs, or
    for none.
    """
    sae_index, vector = summed_vector(studio, settings, concepts)
    dictionary = studio.dictionaries[sae_index]
    config = dictionary.sae.config
    strengths = [s.strength for s in settings] + [s.dose for s in concepts]
    metadata = {
        "format": FORMAT,
        "version": str(VERSION),
        "layer": str(dictionary.hook.layer),
        "hook_point": dictionary.hook.name,
        "prepend_bos": json.dumps(config.prepend_bos),
        "norm_eps": repr(config.norm_eps),
        **({} if concepts else _said_of_scale(config)),
        "strength": json.dumps(strengths),
        "steer": json.dumps([str(setting) for setting in (*settings, *concepts)]),
    }
    return save({"vector": vector}, metadata)


def _said_of_scale(config: SAEConfig) -> dict[str, str]:
    """Say what the vector is to be multiplied by where that is not a token's deviation."""
    if config.normalisation == "per_token_standardise":
        return {}
    return {"scale": repr(1 / config.norm_factor)}


def summed_vector(
    studio: Studio, settings: Sequence[Setting], concepts: Sequence[ConceptSetting]
) -> tuple[int, Tensor]:
    """Return the SAE's number and the sum (d_model,) of what "add" settings add, in std(x).

    Raises UserError as `export_vector`.
    """
    studio.check_settings(settings)
    studio.check_concepts(concepts)
    if not settings and not concepts:
        raise UserError("choose a latent or a concept first: there is nothing to export")
    if any(setting.mode != "add" for setting in (*settings, *concepts)):
        raise UserError("only “add” makes a constant vector: set, scale and ablate need the SAE")
    if (
        settings
        and concepts
        and any(
            studio.dictionaries[s.sae].sae.config.normalisation != "per_token_standardise"
            for s in settings
        )
    ):
        raise UserError(
            "concepts go in units of a token's deviation, latents of this SAE do not: export them "
            "one after the other"
        )
    saes = {setting.sae for setting in settings} | {s.concept.sae for s in concepts}
    if len(saes) > 1:
        raise UserError("a steering vector belongs to one layer: choose latents of one SAE")
    (index,) = saes
    dictionary = studio.dictionaries[index]
    vector = torch.zeros(dictionary.sae.config.d_model)
    for setting in settings:
        amount = dictionary.steer(setting).amount
        vector += amount * dictionary.sae.W_dec[setting.latent].detach().float().cpu()
    for wish in concepts:
        vector += wish.dose * concept_vector(dictionary, wish.concept).cpu()
    return index, vector


@torch.no_grad()
def write_control_vector(
    path: Path, studio: Studio, settings: Sequence[Setting], concepts: Sequence[ConceptSetting] = ()
) -> None:
    """Write a GGUF control vector, as llama.cpp's `--control-vector` reads it.

    llama.cpp adds `direction.<l>` to the output of block l, whatever the token: our resid_pre of
    layer L is block L − 1's output, and the scale is replaced by its mean over the example prompts.
    Raises UserError as `export_vector`, for another hook point, at layer 0 or 1 (llama.cpp has no
    place for those), and without the package `gguf`.
    """
    try:
        from gguf import GGUFWriter
    except ImportError:
        raise UserError("a .gguf file needs the package gguf: pip install gguf") from None
    index, vector = summed_vector(studio, settings, concepts)
    dictionary = studio.dictionaries[index]
    layer = dictionary.hook.layer - (dictionary.hook.name == "resid_pre")
    if dictionary.hook.name not in ("resid_pre", "resid_post") or layer < 1:
        raise UserError(f"llama.cpp's control vectors have no place for {dictionary.hook}")
    stds = []
    for prompt in EXAMPLE_PROMPTS:
        tokens = torch.tensor([studio.encode(prompt, chat=False)], device=studio.model.device)
        x = studio.model.capture(tokens, [dictionary.hook])[dictionary.hook][0]
        scale = (standardise(x) if concepts else dictionary.sae.normalise(x))[2].squeeze(-1)
        stds.append(scale[1 if studio.prepend_bos else 0 :])
    scaled = (vector * float(torch.cat(stds).mean())).numpy()
    with atomic_path(path) as temporary:
        writer = GGUFWriter(temporary, "controlvector")
        writer.add_string("controlvector.model_hint", "llama")
        writer.add_uint32("controlvector.layer_count", studio.model.args.n_layers - 1)
        writer.add_tensor(f"direction.{layer}", scaled)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
