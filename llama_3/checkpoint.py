"""Loading weights: Meta's and Hugging Face's formats, one tensor at a time from mapped files."""

import ctypes
import json
import mmap
import pickle
from dataclasses import replace
from pathlib import Path
from zipfile import is_zipfile

import torch
from safetensors.torch import load_file
from torch import Tensor

from llama_3.args import CheckpointError, load_args, naming, read_json
from llama_3.model import Llama
from llama_3.tokenizer import SPEC, Tokenizer, load_tokenizer

_WORDS = (
    "output=lm_head tok_embeddings=model.embed_tokens layers=model.layers norm=model.norm"
    " attention=self_attn wq=q_proj wk=k_proj wv=v_proj wo=o_proj attention_norm=input_layernorm"
    " feed_forward=mlp w1=gate_proj w2=down_proj w3=up_proj ffn_norm=post_attention_layernorm"
).split(" ")
_TO_HF = {meta: hf for meta, hf in (pair.split("=") for pair in _WORDS)}
_DERIVED = ("rope.freqs", ".rotary_emb.inv_freq")  # stored by older tools, not weights

TensorShards = dict[str, list[tuple[Path, Tensor]]]  # by name: the tensor, or its shards in order


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
    stored = _map_files(model_dir, is_meta)
    if is_meta:  # tied: no unembedding, or one that is the embedding's own memory
        both = (stored.get(f"{name}.weight", ()) for name in ("output", "tok_embeddings"))
        output, embedding = ({tensor.data_ptr() for _, tensor in parts} for parts in both)
        args = replace(args, tied=output <= embedding)
    tokenizer = load_tokenizer(model_dir)
    is_cut = is_meta and not (model_dir / SPEC).is_file() and tokenizer.n_vocab < args.vocab_size
    if is_cut or tokenizer.n_vocab > args.vocab_size:
        raise CheckpointError(
            f"{model_dir}: the tokenizer has {tokenizer.n_vocab} tokens, the model "
            f"{args.vocab_size}: one of the files is another model's, or cut short"
        )
    model = Llama(args, device=device, dtype=dtype, n_layers=n_layers, n_shards=model_parallel_size)
    whole = Llama(args, device=torch.device("meta"), dtype=dtype)
    words, weights = {} if is_meta else _TO_HF, dict(whole.named_parameters())
    names = {name: ".".join(words.get(word, word) for word in name.split(".")) for name in weights}
    shapes = {names[name]: list(weight.shape) for name, weight in weights.items()}
    _check(model_dir, is_meta, shapes, stored)
    for name, parameter in ((names[name], p) for name, p in model.named_parameters()):
        halves = args.head_dim if name.endswith(("q_proj.weight", "k_proj.weight")) else None
        _fill(parameter, model.shard, shapes[name], [part for _, part in stored[name]], halves)
    return model.eval(), tokenizer


def _map_files(model_dir: Path, is_meta: bool) -> TensorShards:
    """All tensors in the directory, mapped: nothing is read before it is used."""
    index_path = model_dir / "model.safetensors.index.json"
    pattern = "consolidated.*.pth" if is_meta else "*.safetensors"
    paths = sorted(model_dir.glob(pattern))
    if not is_meta and index_path.is_file():
        with naming(index_path):
            files = read_json(index_path)["weight_map"].values()
            paths = sorted({model_dir / name for name in files})
    if not paths:
        raise CheckpointError(f"{model_dir}: no weights (no {pattern})")
    stored: TensorShards = {}
    for path in paths:
        with naming(path):
            for name, tensor in _map_file(path).items():
                stored.setdefault(name, []).append((path, tensor))
    return stored


def _map_file(path: Path) -> dict[str, Tensor]:
    if path.suffix == ".pth":
        if path.exists() and not is_zipfile(path):
            raise ValueError("damaged or cut short: not a whole file of torch.save's")
        try:
            state = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
        except pickle.UnpicklingError:  # its words advise to load the file unsafely
            raise ValueError("damaged, or holds more than tensors: it is not loaded") from None
        if not isinstance(state, dict) or not all(isinstance(t, Tensor) for t in state.values()):
            raise ValueError("expected a dict of tensors")
        return state
    with path.open("rb") as file:
        data = file.read(2**24)  # headers are far smaller
    start = 8 + int.from_bytes(data[:8], "little")
    if start > path.stat().st_size:
        raise ValueError("cut short in its header")
    tensors = {k: v for k, v in json.loads(data[8:start]).items() if k != "__metadata__"}
    for name in sorted(tensors, key=lambda name: tensors[name]["data_offsets"]):
        if start + tensors[name]["data_offsets"][1] > path.stat().st_size:
            raise ValueError(f"cut short in tensor {name}")
    return load_file(path)


def _check(
    model_dir: Path, is_meta: bool, shapes: dict[str, list[int]], stored: TensorShards
) -> None:
    """All tensors are there, in each of Meta's files, have these shapes, and none is unknown."""
    paths = {path for parts in stored.values() for path, _ in parts}
    for name, shape in shapes.items():
        parts = stored.get(name, [])
        lacking = paths - {path for path, _ in parts}
        if lacking if is_meta else not parts:
            where = lacking.pop() if len(lacking) == 1 else model_dir
            raise CheckpointError(f"{where}: tensor {name} is missing")
        # Each part of a tensor is all of it, or an equal slice of one dimension.
        n = len(parts)
        slices = [[*shape[:d], s // n, *shape[d + 1 :]] for d, s in enumerate(shape) if s % n == 0]
        for path, tensor in parts:
            if list(tensor.shape) not in [shape, *slices] or tensor.shape != parts[0][1].shape:
                found = f"{list(tensor.shape)}" + f" in one of {n} files" * (n > 1)
                raise CheckpointError(f"{path}: tensor {name} has shape {found}, expected {shape}")
            if not tensor.is_floating_point():
                raise CheckpointError(f"{path}: tensor {name} holds {tensor.dtype}")
    known = (*shapes, "output.weight", "lm_head.weight")  # which may repeat a tied embedding
    for name, parts in stored.items():
        if name not in known and not name.endswith(_DERIVED):
            raise CheckpointError(f"{parts[0][0]}: unknown tensor {name}")


def _fill(
    parameter: Tensor, shard: int, shape: list[int], parts: list[Tensor], halves: int | None
) -> None:
    """Copy the shard of a tensor of `shape` that is the parameter out of the tensor's parts.

    halves: the head_dim of Q and K rows in Hugging Face's halves, to become Meta's pairs.
    """
    for i, part in enumerate(parts):
        source, target = part, parameter
        for dim, size in enumerate(shape):
            begin = i * part.shape[dim] if part.shape[dim] < size else 0
            own = shard * parameter.shape[dim] if parameter.shape[dim] < size else 0
            start, stop = max(begin, own), min(begin + part.shape[dim], own + target.shape[dim])
            if start >= stop:
                break
            source = source.narrow(dim, start - begin, stop - start)
            target = target.narrow(dim, start - own, stop - start)
        else:
            if halves is not None:
                source = source.unflatten(0, (-1, 2, halves // 2)).transpose(1, 2)
                target = target.unflatten(0, (-1, halves // 2, 2))
            # To the device first: a change of dtype on the host would need a second copy there.
            target.copy_(source.to(target.device))
            _release_pages(part)


def _release_pages(tensor: Tensor) -> None:
    """Let go of the file pages that reading a mapped tensor brought into this process."""
    start = -(-tensor.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
    n_bytes = (tensor.data_ptr() + tensor.nbytes - start) // mmap.PAGESIZE * mmap.PAGESIZE
    if n_bytes > 0:  # whole pages only: the last one may hold another tensor's start
        place = (ctypes.c_void_p(start), ctypes.c_size_t(n_bytes))
        ctypes.CDLL(None).madvise(*place, mmap.MADV_DONTNEED)
