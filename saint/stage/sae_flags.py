"""Flags for SAE files that do not know their own settings (bare state dicts, older checkpoints)."""

from __future__ import annotations

import argparse
from typing import Any


def add_bare_sae_flags(parser: argparse.ArgumentParser) -> None:
    """Add `--k`, `--sae_layer_idx`, `--hook_point` and `--no_bos`."""
    group = parser.add_argument_group(
        "what an older SAE file (a bare state dict) does not say; others know it themselves"
    )
    group.add_argument("--k", type=int, help="active latents per token")
    group.add_argument("--sae_layer_idx", type=int, help="0-based layer it reads")
    group.add_argument("--hook_point", help="attn_norm for the first version's SAEs")
    group.add_argument("--no_bos", action="store_true", help="it was trained without BOS tokens")


def bare_sae_flags(args: argparse.Namespace) -> dict[str, Any]:
    """Return these flags as `load_sae`'s keyword arguments."""
    return {
        "k": args.k,
        "layer": args.sae_layer_idx,
        "hook_point": args.hook_point,
        "no_bos": args.no_bos,
    }
