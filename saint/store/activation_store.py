"""The activation store: large safetensors shards of one layer's activations, and their reader.

`activation_outputs/` holds `layer_<L>/` (resid_pre) or `layer_<L>.<hook>/` directories of
`shard_<NNNNN>.safetensors`, the sentences in `sentences.parquet/`, one part per shard, the display
text of every token id in `vocabulary.parquet`, and the manifest. `python -m saint.store DIR`
prints what is there and verifies it.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from saint.stage.errors import UserError, first_line
from saint.stage.files import write_json
from saint.stage.flags import whole_number
from saint.stage.manifests import Manifest, manifest_path, read_manifest, verify_file
from saint.stage.record_schema import read_record
from saint.store.row_format import (
    Stored,
    TensorFile,
    decode_rows,
    map_rows,
    read_tensors,
    row_layout,
    tensor_file,
)
from saint.store.shuffled_rows import (
    SPLITS,
    BatchedRows,
    open_batched_rows,
    positions_name,
    rows_name,
)

STAGE = "capture_activations"


SENTENCES = "sentences.parquet"


VOCABULARY = "vocabulary.parquet"


INDEX_TENSORS = ("token_ids", "offsets", "sentence_ids")


@dataclass(frozen=True)
class Shard:
    """Activations of consecutive sentences, the BOS position left out.

    token_ids: (n_tokens,) int32. offsets: (n_sentences + 1,) int64, sentence i is rows
    offsets[i]:offsets[i + 1]. sentence_ids: (n_sentences,) int64. stored: returns a slice of the
    rows in their number format.
    """

    token_ids: Tensor
    offsets: Tensor
    sentence_ids: Tensor
    stored: Callable[[slice], Stored]

    def read(self, rows: slice = slice(None)) -> Tensor:
        """Return activations (n, d_model) of a slice of the rows, see `decode_rows`."""
        return decode_rows(self.stored(rows))


def layer_dir_name(layer: int, hook_point: str) -> str:
    """Return `layer_22`, or `layer_22.mlp_out` for hook points other than resid_pre."""
    return f"layer_{layer}" if hook_point == "resid_pre" else f"layer_{layer}.{hook_point}"


def shard_name(index: int) -> str:
    """Return the file name of a shard."""
    return f"shard_{index:05d}.safetensors"


def part_name(index: int) -> str:
    """Return the file name of the sentences of a shard."""
    return f"part-{index:05d}.parquet"


@contextmanager
def shard_file(
    path: Path,
    token_lists: Sequence[Sequence[int]],
    sentence_ids: Sequence[int],
    *,
    d_model: int,
    store_dtype: str = "bfloat16",
) -> Iterator[TensorFile]:
    """Yield the file of a new shard, to which the rows are still to be written.

    token_lists: token ids of each sentence, in the order in which the rows will lie.
    """
    lengths = [0, *map(len, token_lists)]
    token_ids = [t for tokens in token_lists for t in tokens]
    small = {
        "offsets": torch.tensor(lengths).cumsum(0),
        "sentence_ids": torch.tensor(sentence_ids, dtype=torch.int64),
        "token_ids": torch.tensor(token_ids, dtype=torch.int32),
    }
    tensors = {name: (t.dtype, tuple(t.shape)) for name, t in small.items()}
    for name, (dtype, shape) in row_layout(d_model, store_dtype).items():
        tensors[name] = (dtype, (len(token_ids), *shape))
    with tensor_file(path, tensors) as file:
        for name, tensor in small.items():
            file.write(name, 0, tensor)
        yield file


def read_shard(path: Path) -> Shard:
    """Memory-map a shard. Raises UserError when it is missing, cut short or foreign."""
    index = read_tensors(path, INDEX_TENSORS)
    rows = map_rows(path)
    return Shard(**index, stored=lambda part: {name: t[part] for name, t in rows.items()})


@dataclass(frozen=True)
class MovedRows:
    """Where preprocessing in place put the rows of a store: into the shuffled files.

    A replaced shard's `row_file` (n_tokens,) int32 numbers those files, all of the training rows
    first, and `row` (n_tokens,) int32 is the place that the file's `positions` (n_rows,) int32 map
    to the row where it lies.
    """

    rows: BatchedRows

    def read_shard(self, path: Path) -> Shard:
        """Return a replaced shard, whose rows are gathered from all over the shuffled files."""
        index = read_tensors(path, (*INDEX_TENSORS, "row_file", "row"))
        row_file, row = index.pop("row_file"), index.pop("row")
        return Shard(**index, stored=lambda part: self._gather(row_file[part], row[part]))

    def _gather(self, row_file: Tensor, row: Tensor) -> Stored:
        gathered: dict[str, Tensor] = {}
        for file in row_file.unique().tolist():
            members = torch.nonzero(row_file == file).squeeze(1)
            mapped, positions = self._files[file]
            found = positions[row[members].long()].long()
            for name, tensor in mapped.items():
                if name not in gathered:
                    gathered[name] = tensor.new_empty((len(row), *tensor.shape[1:]))
                gathered[name][members] = tensor[found]
        return gathered

    @cached_property
    def _files(self) -> list[tuple[Stored, Tensor]]:
        self.rows.verify()
        return [
            (
                map_rows(self.rows.path / rows_name(split, file)),
                read_tensors(self.rows.path / positions_name(split, file), ("positions",))[
                    "positions"
                ],
            )
            for split in SPLITS
            for file in range(len(self.rows.facts["rows"][split]))
        ]


@dataclass
class ActivationStore:
    """One layer directory of a finished store."""

    root: Path
    layer_dir: str
    manifest: Manifest
    _verified: set[int] = field(default_factory=set)

    @property
    def facts(self) -> dict[str, Any]:
        """What capture decided: layer, hook_point, d_model, prepend_bos, fingerprints and so on."""
        return self.manifest.facts | self.manifest.facts["layers"][self.layer_dir]

    @property
    def fingerprint(self) -> str:
        """Identity of the data: equal for equal bytes, and the same once they moved."""
        return self.manifest.facts.get("captured_as", self.manifest.fingerprint)

    @property
    def moved_to(self) -> Path | None:
        """Where preprocessing in place has put, or is putting, the rows."""
        moved = self.manifest.facts.get("in_place", {}).get(self.layer_dir)
        return None if moved is None else self.root / moved["rows"]

    @property
    def has_moved(self) -> bool:
        """Whether preprocessing in place has moved all rows: nothing is left to preprocess."""
        moved = self.manifest.facts.get("in_place", {}).get(self.layer_dir, {"done": False})
        return moved["done"]

    @property
    def n_shards(self) -> int:
        """Number of shards in this layer directory."""
        return self.manifest.counts["n_shards"]

    @property
    def n_tokens(self) -> int:
        """Stored tokens (rows)."""
        return self.manifest.counts["n_tokens"]

    @property
    def n_sentences(self) -> int:
        """Stored sentences."""
        return self.manifest.counts["n_sentences"]

    @property
    def sentences_path(self) -> Path:
        """Directory of the sentences' parquet parts, one per shard, rows in the shard's order."""
        return self.root / SENTENCES

    def shard_path(self, index: int) -> Path:
        """Path of a shard."""
        return self.root / self.layer_dir / shard_name(index)

    def recorded(self, index: int) -> tuple[Path, dict[str, Any]]:
        """Return a shard's path and what the manifest says of it."""
        path = self.shard_path(index)
        return path, self.manifest.files[f"{self.layer_dir}/{path.name}"]

    def read_index(self, index: int) -> dict[str, Tensor]:
        """Map a shard's `INDEX_TENSORS`, wherever its rows are; nothing is verified."""
        return read_tensors(self.shard_path(index), INDEX_TENSORS)

    def read_shard(self, index: int) -> Shard:
        """Memory-map a shard, verifying it the first time. Raises UserError if damaged."""
        path, expected = self.recorded(index)
        if index not in self._verified:
            verify_file(path, expected)
            self._verified.add(index)
        return read_shard(path) if self.moved_to is None else self._moved_rows.read_shard(path)

    @cached_property
    def _moved_rows(self) -> MovedRows:
        assert self.moved_to is not None
        return MovedRows(open_batched_rows(self.moved_to))

    def record_move(self, rows_dir: Path, files: Mapping[str, dict[str, Any]] | None) -> None:
        """Write into the store's manifest that the rows move to rows_dir.

        files: checksums of the replaced shards, once all have been replaced; None before.
        """
        path = manifest_path(self.root, STAGE)
        record = read_record(path)
        record["facts"].setdefault("captured_as", self.manifest.fingerprint)
        moved = {"rows": os.path.relpath(rows_dir, self.root), "done": files is not None}
        record["facts"].setdefault("in_place", {})[self.layer_dir] = moved
        record["files"].update(files or {})
        write_json(path, record)
        self.manifest = read_manifest(self.root, STAGE)

    def token_texts(self) -> list[str]:
        """Display text of every token id."""
        path = self.root / VOCABULARY
        try:
            return list(map(str, pq.read_table(path, columns=["text"]).column(0).to_pylist()))
        except (OSError, pa.ArrowException, UnicodeDecodeError, IndexError) as error:
            raise UserError(f"{path} is not readable: {first_line(error)}") from None


def open_stores(
    data_dir: Path,
    *,
    layer: int | None = None,
    hook_point: str | None = None,
    half_moved: bool = False,
) -> list[ActivationStore]:
    """Open the layer directories of a finished store that match the filter, all without one.

    half_moved: also one that an interrupted `sae_preprocessing.py --in_place` left; otherwise that
    raises UserError.
    """
    manifest = read_manifest(data_dir, STAGE)
    stores = [
        store
        for store in (
            ActivationStore(data_dir, name, manifest) for name in manifest.facts["layers"]
        )
        if layer in (None, store.facts["layer"]) and hook_point in (None, store.facts["hook_point"])
    ]
    for name in [] if half_moved else half_moved_layers(manifest):
        if name in [store.layer_dir for store in stores]:
            raise UserError(_unfinished_move(data_dir / name))
    return stores


def half_moved_layers(manifest: Manifest) -> list[str]:
    """Return the layer directories whose rows an interrupted preprocessing in place was moving."""
    return [n for n, moved in manifest.facts.get("in_place", {}).items() if not moved["done"]]


def _unfinished_move(layer_dir: Path) -> str:
    return (
        f"{layer_dir} is being preprocessed in place: finish sae_preprocessing.py --in_place: the "
        "same command resumes"
    )


def open_store(
    data_dir: Path, *, layer: int | None = None, hook_point: str | None = None
) -> ActivationStore:
    """Open one layer directory of a finished store.

    Raises UserError when the store is incomplete, or several layers match and none was named.
    """
    stores = open_stores(data_dir, layer=layer, hook_point=hook_point)
    if len(stores) != 1:
        held = ", ".join(read_manifest(data_dir, STAGE).facts["layers"])
        raise UserError(
            f"{data_dir} holds {held}: --layer and --hook_point must choose exactly one"
        )
    return stores[0]


def add_layer_flags(parser: argparse.ArgumentParser) -> None:
    """Add `--layer` and `--hook_point`, needed only where a store holds several."""
    group = parser.add_argument_group("which activations (needed only where several were captured)")
    group.add_argument(
        "--layer", type=whole_number, help="0-based layer [the one that was captured]"
    )
    group.add_argument("--hook_point", help="hook point [the one that was captured]")
