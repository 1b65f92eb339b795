"""Flags that several stages have, and argparse types."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

_MOST = 1e15


def add_device_flags(parser: argparse.ArgumentParser, *, dtype: bool = False) -> None:
    """Add `--device` (and `--dtype`), which every computing stage has."""
    group = parser.add_argument_group("device")
    group.add_argument(
        "--device",
        default="auto",
        help="auto (CUDA when there is a GPU), cpu, cuda or cuda:N [auto]",
    )
    if dtype:
        group.add_argument(
            "--dtype",
            default="auto",
            choices=["auto", "float32", "bfloat16", "float16"],
            help="the language model's precision; auto: bfloat16 where the hardware has it",
        )


def add_model_parallel_flag(parser: argparse.ArgumentParser) -> None:
    """Add `--model_parallel_size`, for language models that one device cannot hold."""
    parser.add_argument(
        "--model_parallel_size",
        type=positive_int,
        default=1,
        metavar="N",
        help="split the language model over every N of torchrun's processes [1]",
    )


def add_overwrite_flag(parser: argparse.ArgumentParser) -> None:
    """Add `--overwrite`, which starts a stage over."""
    parser.add_argument(
        "--overwrite",
        action="store_true",
        help="start over, removing what this stage wrote before; without it a run resumes",
    )


def positive_int(text: str) -> int:
    """Argparse type: a whole number of at least 1."""
    return _whole(text, least=1)


def whole_number(text: str) -> int:
    """Argparse type: a whole number of at least 0 (of things, or of one of them)."""
    return _whole(text, least=0)


def seed_number(text: str) -> int:
    """Argparse type: a seed that both torch and numpy take, 0 to 2^63 - 1."""
    return _whole(text, least=0)


def positive_float(text: str) -> float:
    """Argparse type: a number above 0 and below 1e15, beyond which nothing here makes sense."""
    return _number(text, lambda value: 0 < value < _MOST, "a finite number above 0")


def non_negative_float(text: str) -> float:
    """Argparse type: a number of at least 0 and below 1e15."""
    return _number(text, lambda value: 0 <= value < _MOST, "a finite number of at least 0")


def fraction(text: str) -> float:
    """Argparse type: a number from 0 to 1, both included."""
    return _number(text, lambda value: 0 <= value <= 1, "a share between 0 and 1")


def proper_fraction(text: str) -> float:
    """Argparse type: a number between 0 and 1, both left out."""
    return _number(text, lambda value: 0 < value < 1, "a share above 0 and below 1")


def _whole(text: str, least: int) -> int:
    try:
        value = int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text[:40]!r} is not a whole number") from None
    if not least <= value < 1 << 63:
        raise argparse.ArgumentTypeError(f"{text[:40]} is not a whole number from {least} to 2^63")
    return value


def _number(text: str, fits: Callable[[float], bool], what: str) -> float:
    try:
        value = float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text[:40]!r} is not a number") from None
    if not fits(value):
        raise argparse.ArgumentTypeError(f"{text[:40]} is not {what}")
    return value


def add_bare_sae_flags(parser: argparse.ArgumentParser) -> None:
    """Add `--sae_dtype`, `--k`, `--sae_layer_idx`, `--hook_point` and `--no_bos`."""
    add_sae_dtype_flag(parser)
    group = parser.add_argument_group(
        "what an older SAE file (a bare state dict) does not say; others know it themselves"
    )
    group.add_argument("--k", type=positive_int, help="active latents per token")
    group.add_argument("--sae_layer_idx", type=whole_number, help="0-based layer it reads")
    group.add_argument("--hook_point", help="attn_norm for the first version's SAEs")
    group.add_argument("--no_bos", action="store_true", help="it was trained without BOS tokens")


def add_sae_dtype_flag(parser: argparse.ArgumentParser) -> None:
    """Add `--sae_dtype`."""
    parser.add_argument(
        "--sae_dtype",
        default="float32",
        choices=["float32", "bfloat16"],
        help="how the SAE's weights are kept; bfloat16 halves their memory, and they are still "
        "multiplied in float32 [%(default)s]",
    )


def sae_dtype(args: argparse.Namespace) -> Any:
    """Return `--sae_dtype` as torch's."""
    import torch

    return getattr(torch, args.sae_dtype)


def said_of_dtype(args: argparse.Namespace) -> dict[str, Any]:
    """Return what a manifest says of `--sae_dtype`: nothing where it is the default."""
    return {} if args.sae_dtype == "float32" else {"sae_dtype": args.sae_dtype}


def bare_sae_flags(args: argparse.Namespace) -> dict[str, Any]:
    """Return these flags as `load_sae`'s keyword arguments."""
    return {
        "k": args.k,
        "layer": args.sae_layer_idx,
        "hook_point": args.hook_point,
        "no_bos": args.no_bos,
        "dtype": sae_dtype(args),
    }
