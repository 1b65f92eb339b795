"""How rows of activations lie on disk: three number formats, and safetensors written row by row.

A file of rows is a safetensors file. `activations` is (n, d_model) bfloat16, float16 or int8; int8
comes with `scales` (n,) float32, one per token: activation = int8 · scale. Everything that reads
activations decodes them here.
"""

from __future__ import annotations

import ctypes
import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import xxhash
from safetensors import SafetensorError, safe_open
from torch import Tensor

from saint.stage.errors import UserError
from saint.stage.files import atomic_path

_RANGE_WRITE = 2  # SYNC_FILE_RANGE_WRITE
STORE_DTYPES = ("bfloat16", "float16", "int8")
ROW_TENSORS = ("scales", "activations")
_PIECE_BYTES = 1 << 20  # several times faster than hundreds of MB in one call
_EARLY_BYTES = 32 << 20  # written before the disk is asked to begin
Stored = Mapping[str, Tensor]
"""Rows in their number format, by tensor name."""

_NAMES = {
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.float32: "F32",
    torch.int8: "I8",
    torch.int32: "I32",
    torch.int64: "I64",
}
_DTYPES = {name: dtype for dtype, name in _NAMES.items()}


def encode_rows(x: Tensor, store_dtype: str) -> dict[str, Tensor]:
    """Return x (n, d_model), any float dtype, in a number format of STORE_DTYPES.

    int8 rounds to a step of the token's largest |activation| / 127. float16 clips at ±65,504.
    """
    if store_dtype == "int8":
        x = x.float()
        scales = x.abs().amax(dim=1).div_(127).clamp_min_(1e-30)
        return {"scales": scales, "activations": (x / scales[:, None]).round_().to(torch.int8)}
    if store_dtype == "float16":
        limit = torch.finfo(torch.float16).max
        return {"activations": x.float().clamp_(-limit, limit).to(torch.float16)}
    return {"activations": x.to(torch.bfloat16)}


def decode_rows(stored: Stored) -> Tensor:
    """Return activations (n, d_model): bfloat16 and float16 as they are, int8 as float32."""
    if "scales" not in stored:
        return stored["activations"]
    return stored["activations"].float().mul_(stored["scales"][:, None])


def row_layout(d_model: int, store_dtype: str) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """Return {tensor name: (dtype, shape of one row)} of a number format."""
    if store_dtype == "int8":
        return {"scales": (torch.float32, ()), "activations": (torch.int8, (d_model,))}
    return {"activations": (getattr(torch, store_dtype), (d_model,))}


def row_bytes(d_model: int, store_dtype: str) -> int:
    """Return the bytes of one stored row."""
    return 4 + d_model if store_dtype == "int8" else 2 * d_model


class TensorFile:
    """A safetensors file whose tensors are written in pieces, at once in place; see `tensor_file`.

    tensors: {name: (dtype, shape)}, larger dtypes first (for alignment). What was never written is
    zero; a file of the same tensors that is there already keeps what it holds.
    """

    def __init__(
        self, path: Path, tensors: Mapping[str, tuple[torch.dtype, tuple[int, ...]]]
    ) -> None:
        header: dict[str, Any] = {}
        self._places: dict[str, tuple[int, int]] = {}
        end = 0
        for name, (dtype, shape) in tensors.items():
            per_row = dtype.itemsize * math.prod(shape[1:])
            start, end = end, end + per_row * shape[0]
            header[name] = {"dtype": _NAMES[dtype], "shape": shape, "data_offsets": [start, end]}
            self._places[name] = (start, per_row)
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        self.header = len(text).to_bytes(8, "little") + text
        self._written = self._begun = 0
        self._descriptor = os.open(path, os.O_WRONLY | os.O_CREAT, 0o666)
        try:
            self._write(self.header, 0)
            os.ftruncate(self._descriptor, len(self.header) + end)
        except OSError:
            self.close()
            raise

    def write(self, name: str, first_row: int, rows: Tensor) -> None:
        """Write contiguous CPU rows of a tensor from its row first_row on."""
        start, per_row = self._places[name]
        self._write(as_bytes(rows), len(self.header) + start + first_row * per_row)

    def _write(self, data: bytes | memoryview, offset: int) -> None:
        while len(data):
            n = os.pwrite(self._descriptor, data[:_PIECE_BYTES], offset)
            data, offset = data[n:], offset + n
            self._written += n
        if self._written - self._begun >= _EARLY_BYTES:
            start_writing(self._descriptor)
            self._begun = self._written

    def close(self) -> None:
        """Close the file."""
        os.close(self._descriptor)

    def __enter__(self) -> TensorFile:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def start_writing(descriptor: int) -> None:
    """Have the system begin to write a file to the disk, where it can, without waiting for it.

    The fsync that ends the file then has little left to wait for.
    """
    begin = getattr(ctypes.CDLL(None), "sync_file_range", None)
    if begin is not None:
        begin(descriptor, ctypes.c_int64(0), ctypes.c_int64(0), ctypes.c_uint(_RANGE_WRITE))


def as_bytes(tensor: Tensor) -> memoryview:
    """Return a contiguous CPU tensor's bytes, without copying them."""
    return tensor.reshape(-1).view(torch.uint8).numpy().data


@contextmanager
def tensor_file(
    path: Path, tensors: Mapping[str, tuple[torch.dtype, tuple[int, ...]]]
) -> Iterator[TensorFile]:
    """Yield a new TensorFile; it appears, fsynced, when the block ends without an exception."""
    with atomic_path(path) as temporary, TensorFile(temporary, tensors) as file:
        yield file


def write_tensors(path: Path, tensors: Stored) -> dict[str, Any]:
    """Write whole tensors atomically; return the file's checksum.

    Raises OSError where the disk is full, which safetensors' own writer does not.
    """
    ordered = dict(sorted(tensors.items(), key=lambda item: -item[1].itemsize))
    kinds = {name: (t.dtype, tuple(t.shape)) for name, t in ordered.items()}
    return write_pieces(path, kinds, ordered.items())


def write_pieces(
    path: Path,
    kinds: Mapping[str, tuple[torch.dtype, tuple[int, ...]]],
    pieces: Iterable[tuple[str, Tensor]],
) -> dict[str, Any]:
    """Write (name, rows) one after the other, atomically; return the file's checksum.

    pieces: the first tensor of `kinds` (see `TensorFile`) from its first row to its last, and so on
    with the next. A piece may be overwritten when the next one is asked for.
    """
    next_row = dict.fromkeys(kinds, 0)
    with tensor_file(path, kinds) as file:
        digest, size = xxhash.xxh3_64(file.header), len(file.header)
        for name, rows in pieces:
            file.write(name, next_row[name], rows)
            digest.update(as_bytes(rows))
            next_row[name] += len(rows)
            size += rows.nbytes
    return {"bytes": size, "xxh3": digest.hexdigest()}


def read_tensors(
    path: Path, names: Sequence[str], optional: Sequence[str] = ()
) -> dict[str, Tensor]:
    """Memory-map the named tensors of a safetensors file, and those of `optional` that it has.

    Raises UserError when the file is missing, cut short, damaged or another kind of file.
    """
    if not path.exists():
        raise UserError(f"{path} is missing")
    try:
        with safe_open(path, framework="pt") as file:
            held = set(file.keys())
            missing = set(names) - held
            if missing:
                raise UserError(f"{path} is not such a file: it has no tensor {sorted(missing)[0]}")
            return {name: file.get_tensor(name) for name in (*names, *optional) if name in held}
    except SafetensorError as error:
        raise UserError(f"{path} is damaged: {error}") from None


def map_rows(path: Path) -> dict[str, Tensor]:
    """Memory-map a file's rows in their number format. Raises UserError like `read_tensors`."""
    return read_tensors(path, ("activations",), ("scales",))


class StoredRows:
    """Row tensors of a safetensors file, read into memory of the caller's: no page is mapped.

    Raises UserError when the file is missing, damaged, or holds no activations.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with path.open("rb") as file:
                size = int.from_bytes(file.read(8), "little")
                header = json.loads(file.read(size)) if size < 1 << 20 else {}
            self._tensors = {
                name: (
                    _DTYPES[header[name]["dtype"]],
                    tuple(header[name]["shape"]),
                    8 + size + header[name]["data_offsets"][0],
                )
                for name in ROW_TENSORS
                if name in header
            }
        except (ValueError, KeyError, TypeError, IndexError):
            raise UserError(f"{path} is damaged: its header cannot be read") from None
        if "activations" not in self._tensors:
            raise UserError(f"{path} is not such a file: it has no tensor activations")

    @property
    def n_rows(self) -> int:
        """Rows in the file."""
        return self._tensors["activations"][1][0]

    def empty(self, n_rows: int) -> dict[str, Tensor]:
        """Return uninitialised memory for rows of this file's number format."""
        return {
            name: torch.empty((n_rows, *shape[1:]), dtype=dtype)
            for name, (dtype, shape, _) in self._tensors.items()
        }

    def read_into(self, memory: Stored, first_row: int, n_rows: int) -> dict[str, Tensor]:
        """Read rows into the start of `memory` (of `empty`'s kind); return that part of it."""
        out = {name: memory[name][:n_rows] for name in self._tensors}
        with self.path.open("rb", buffering=0) as file:
            for name, (dtype, shape, start) in self._tensors.items():
                per_row = dtype.itemsize * math.prod(shape[1:])
                file.seek(start + first_row * per_row)
                data = as_bytes(out[name])
                while len(data):
                    n = file.readinto(data)
                    if not n:
                        raise UserError(f"{self.path} is damaged: it ends too early")
                    data = data[n:]
        return out
