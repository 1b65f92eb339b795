"""Loading weights: Meta's and Hugging Face's formats, one tensor at a time from mapped files."""

import ctypes
import json
import mmap
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from llama_3.args import CheckpointError, load_args, read_json
from llama_3.model import Llama
from llama_3.tokenizer import Tokenizer, load_tokenizer

_HF_WORDS = (
    "embed_tokens lm_head self_attn q_proj k_proj v_proj o_proj mlp gate_proj down_proj up_proj"
    " input_layernorm post_attention_layernorm"
)
_META_WORDS = (
    "tok_embeddings output attention wq wk wv wo feed_forward w1 w2 w3 attention_norm ffn_norm"
)
_TO_META: dict[str, str] = dict(zip(_HF_WORDS.split(" "), _META_WORDS.split(" "), strict=True))
_TO_HF = {meta: hf for hf, meta in _TO_META.items()}
_DERIVED = ("rope.freqs", ".rotary_emb.inv_freq")  # stored by older tools, not weights


class Piece(NamedTuple):
    """A tensor, or one shard of it, mapped from a file where it has the name `name`."""

    path: Path
    name: str
    tensor: Tensor


def load_llama(
    model_dir: Path,
    *,
    device: torch.device,
    dtype: torch.dtype,
    n_layers: int | None = None,
    model_parallel_size: int = 1,
) -> tuple[Llama, Tokenizer]:
    """Load a model and its tokenizer from a directory in Meta's or Hugging Face's format.

    n_layers: only the first n blocks, without unembedding. model_parallel_size: split over this
    many ranks; fairscale's `initialize_model_parallel` must have been called with it.
    Host memory stays within the model (if on the CPU) and about its largest tensor.
    Raises CheckpointError, one line naming file and tensor, for anything wrong in the directory.
    """
    model_dir, args = Path(model_dir), load_args(model_dir)
    is_meta = (model_dir / "params.json").is_file()
    pieces = _map_files(model_dir, is_meta)
    if is_meta:
        args = replace(args, tied=_shares_embedding(pieces))
    tokenizer = load_tokenizer(model_dir)
    model = Llama(args, device=device, dtype=dtype, n_layers=n_layers, n_shards=model_parallel_size)
    _check_names(model_dir, is_meta, model, pieces)
    for name, parameter in model.named_parameters():
        shape, corner = list(parameter.shape), [0] * parameter.ndim
        if parameter.ndim == 2:
            split = 1 if name.endswith(("wo.weight", "w2.weight")) else 0
            corner[split] = model.shard * shape[split]
            shape[split] *= model.n_shards
        is_halved = not is_meta and name.endswith(("wq.weight", "wk.weight"))
        _fill(parameter, corner, shape, pieces[name], args.head_dim if is_halved else None)
    return model.eval(), tokenizer


def _map_files(model_dir: Path, is_meta: bool) -> dict[str, list[Piece]]:
    """All tensors in the directory under Meta's names, shards of one tensor in their order."""
    index_path, pattern = model_dir / "model.safetensors.index.json", "*.safetensors"
    paths = sorted(model_dir.glob("consolidated.*.pth" if is_meta else pattern))
    try:
        if not is_meta and index_path.is_file():
            weight_map = read_json(index_path)["weight_map"]
            paths = sorted({model_dir / name for name in weight_map.values()})
    except (OSError, ValueError, KeyError, AttributeError) as error:
        raise CheckpointError(f"{index_path}: no index of tensors ({error})") from None
    if not paths:
        expected = "consolidated.*.pth" if is_meta else pattern
        raise CheckpointError(f"{model_dir}: no weights (no {expected})")
    pieces: dict[str, list[Piece]] = {}
    for path in paths:
        for name, tensor in _map_file(path).items():
            words = name.removeprefix("model.").split(".")
            key = name if is_meta else ".".join(_TO_META.get(word, word) for word in words)
            pieces.setdefault(key, []).append(Piece(path, name, tensor))
    for name, parts in pieces.items():
        lacking = sorted(set(paths) - {part.path for part in parts})
        if is_meta and lacking:
            raise CheckpointError(f"{lacking[0]}: tensor {name} is missing")
    return pieces


def _map_file(path: Path) -> dict[str, Tensor]:
    """The tensors of one file, mapped: nothing is read before it is used."""
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        state = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such file") from None
    except SafetensorError as error:
        raise CheckpointError(f"{path}: damaged{_first_cut(path)} ({error})") from None
    except Exception as error:  # torch.load raises OSError, RuntimeError, UnpicklingError, ...
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise CheckpointError(f"{path}: damaged or cut short ({reason})") from None
    if not isinstance(state, dict) or not all(isinstance(t, Tensor) for t in state.values()):
        raise CheckpointError(f"{path}: expected a dict of tensors")
    return state


def _first_cut(path: Path) -> str:
    """Name the first tensor that a safetensors file is too short for, if its header is whole."""
    with path.open("rb") as file:
        data = file.read(2**24)  # headers are far smaller
    end = 8 + int.from_bytes(data[:8], "little")
    try:
        tensors = {k: v for k, v in json.loads(data[8:end]).items() if k != "__metadata__"}
        ends = {name: end + tensor["data_offsets"][1] for name, tensor in tensors.items()}
    except (ValueError, KeyError, TypeError, AttributeError):
        return ""
    cut = [name for name in ends if ends[name] > path.stat().st_size]
    return f", cut short in tensor {min(cut, key=ends.__getitem__)}" if cut else ""


def _shares_embedding(pieces: dict[str, list[Piece]]) -> bool:
    """Whether a Meta checkpoint is tied: no `output.weight`, or one that is the embedding."""
    embeddings = {part.tensor.data_ptr() for part in pieces.get("tok_embeddings.weight", ())}
    return all(part.tensor.data_ptr() in embeddings for part in pieces.get("output.weight", ()))


def _check_names(
    model_dir: Path, is_meta: bool, model: Llama, pieces: dict[str, list[Piece]]
) -> None:
    """Every tensor of the model must be there, and nothing that Llama 3 lacks."""
    paths = sorted({part.path for parts in pieces.values() for part in parts})
    for name, _ in model.named_parameters():
        if name not in pieces:
            if not is_meta:
                words = [_TO_HF.get(word, word) for word in name.split(".")]
                name = ".".join(words if words[0] == "lm_head" else ["model", *words])
            where = paths[0] if len(paths) == 1 else model_dir
            raise CheckpointError(f"{where}: tensor {name} is missing")
    block = [name for name, _ in model.layers[0].named_parameters()]
    known = {f"layers.{i}.{name}" for i in range(model.args.n_layers) for name in block}
    known |= {"tok_embeddings.weight", "norm.weight", "output.weight"}
    for name, parts in pieces.items():
        if name not in known and not name.endswith(_DERIVED):
            raise CheckpointError(f"{parts[0].path}: unknown tensor {parts[0].name}")


def _fill(
    parameter: Tensor, corner: list[int], shape: list[int], parts: list[Piece], halves: int | None
) -> None:
    """Copy the block at `corner` of a tensor of `shape` out of the pieces that cover it.

    halves: the head_dim of Q and K rows in Hugging Face's halves, to become Meta's pairs.
    """
    for piece, origin in zip(parts, _origins(shape, parts), strict=False):
        source, target = piece.tensor, parameter
        if not source.is_floating_point():
            raise CheckpointError(f"{piece.path}: tensor {piece.name} holds {source.dtype}")
        for dim, (own, other) in enumerate(zip(corner, origin, strict=True)):
            start = max(own, other)
            end = min(own + target.shape[dim], other + source.shape[dim])
            if start >= end:
                break
            source = source.narrow(dim, start - other, end - start)
            target = target.narrow(dim, start - own, end - start)
        else:
            if halves is not None:
                source = source.unflatten(0, (-1, 2, halves // 2)).transpose(1, 2)
                target = target.unflatten(0, (-1, halves // 2, 2))
            # To the device first: a change of dtype on the host would need a second copy there.
            target.copy_(source.to(target.device))
            _release_pages(piece.tensor)


def _origins(shape: list[int], parts: list[Piece]) -> list[list[int]]:
    """Where each piece begins in a tensor of `shape`; one origin if each piece is all of it."""
    shapes = {tuple(part.tensor.shape) for part in parts}
    if shapes == {tuple(shape)}:
        return [[0] * len(shape)]
    for dim, size in enumerate(shape):
        own = size // len(parts)
        if shapes == {(*shape[:dim], own, *shape[dim + 1 :])} and own * len(parts) == size:
            return [[0] * dim + [i * own] + [0] * (len(shape) - dim - 1) for i in range(len(parts))]
    bad = next((part for part in parts if part.tensor.shape != parts[0].tensor.shape), parts[0])
    found = f"{list(bad.tensor.shape)}" + f" in one of {len(parts)} files" * (len(parts) > 1)
    raise CheckpointError(f"{bad.path}: tensor {bad.name} has shape {found}, expected {shape}")


def _release_pages(tensor: Tensor) -> None:
    """Let go of the file pages that reading a mapped tensor brought into this process."""
    advise, discard = getattr(ctypes.CDLL(None), "madvise", None), mmap.MADV_DONTNEED
    start = -(-tensor.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
    n_bytes = tensor.data_ptr() + tensor.nbytes - start
    if advise and n_bytes >= mmap.PAGESIZE:
        advise(ctypes.c_void_p(start), ctypes.c_size_t(n_bytes), ctypes.c_int(discard))
