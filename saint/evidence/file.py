"""The evidence file: what every latent fires on, one parquet row per latent.

Columns: `latent`, `density` (share of tokens on which it fires), `n_firing_tokens`,
`n_firing_sentences`, `max_activation`, `histogram` (tokens in 20 equal bins over
(0, max_activation]), `top_mean`, `top_max`, `top_last` (value and sentence_id, descending),
`examples`, `promoted` and `suppressed` (tokens, by the unembedding), `neighbours` (decoder cosine),
`coactive` (Jaccard index of the tokens on which both fire).

An example is a window of tokens with the latent's activation on each. Kinds: "top" (best of the max
ranking), "quantile" (seeded sample over activation deciles, 9 the strongest), "near_miss" and
"random" (sentences in which it does not fire). All but "top" carry a split, "explain" or "test";
the splits share no sentence, but a sentence of "top" may be in "test": who shows "top" windows to
the one that is tested must leave those sentences out.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from saint.stage.errors import UserError

FORMAT = "saint.evidence"
VERSION = 1
N_BINS = 20
ROWS_PER_GROUP = 256
KINDS = ("top", "quantile", "near_miss", "random")
SPLITS = ("", "explain", "test")
_DAMAGED = (pa.ArrowException, OSError, KeyError, UnicodeDecodeError)
_METADATA_KEY = b"saint"
_SUMMARY = ["latent", "density", "max_activation", "n_firing_sentences"]
# Of every example one for each token.
_PER_TOKEN = ("token_ids", "tokens", "activations")


def _list_of(**fields: pa.DataType) -> pa.DataType:
    return pa.list_(pa.struct(list(fields.items())))


_RANKED = _list_of(value=pa.float32(), sentence_id=pa.int64())
_TOKENS = _list_of(token=pa.string(), value=pa.float32())
SCHEMA = pa.schema(
    {
        "latent": pa.int32(),
        "density": pa.float32(),
        "n_firing_tokens": pa.int64(),
        "n_firing_sentences": pa.int64(),
        "max_activation": pa.float32(),
        "histogram": pa.list_(pa.int64()),
        "top_mean": _RANKED,
        "top_max": _RANKED,
        "top_last": _RANKED,
        "examples": _list_of(
            kind=pa.string(),
            decile=pa.int8(),
            split=pa.string(),
            value=pa.float32(),
            sentence_id=pa.int64(),
            start=pa.int32(),
            position=pa.int32(),
            token_ids=pa.list_(pa.int32()),
            tokens=pa.list_(pa.string()),
            activations=pa.list_(pa.float32()),
        ),
        "promoted": _TOKENS,
        "suppressed": _TOKENS,
        "neighbours": _list_of(latent=pa.int32(), cosine=pa.float32()),
        "coactive": _list_of(latent=pa.int32(), jaccard=pa.float32()),
    }
)


@dataclass
class Examples:
    """Example windows of a block of latents as flat arrays, ordered by latent.

    counts: (n_latents,) examples per latent. kind, split: codes into KINDS and SPLITS.
    start: first token of the window in its sentence. position: index in the sentence of the
    strongest token. lengths: tokens per window. token_ids, activations: all windows in a row.
    """

    counts: np.ndarray
    kind: np.ndarray
    decile: np.ndarray
    split: np.ndarray
    value: np.ndarray
    sentence_id: np.ndarray
    start: np.ndarray
    position: np.ndarray
    lengths: np.ndarray
    token_ids: np.ndarray
    activations: np.ndarray


@dataclass
class LatentBlock:
    """The rows of consecutive latents, as arrays.

    latents, density, n_firing_tokens, n_firing_sentences, max_activation: (n,). histogram:
    (n, N_BINS). tops: ranking -> values and sentence_ids (n, N), descending, id -1 where empty.
    promoted, suppressed: token ids and values (n, m), or None. neighbours, coactive: latents and
    values (n, m), latent -1 where empty.
    """

    latents: np.ndarray
    density: np.ndarray
    n_firing_tokens: np.ndarray
    n_firing_sentences: np.ndarray
    max_activation: np.ndarray
    histogram: np.ndarray
    tops: dict[str, tuple[np.ndarray, np.ndarray]]
    examples: Examples
    promoted: tuple[np.ndarray, np.ndarray] | None
    suppressed: tuple[np.ndarray, np.ndarray] | None
    neighbours: tuple[np.ndarray, np.ndarray]
    coactive: tuple[np.ndarray, np.ndarray]


class EvidenceWriter:
    """Writes blocks of latents, ascending, to one parquet file; use as a context manager."""

    def __init__(self, path: Path, meta: dict[str, Any], token_texts: Sequence[str]):
        record = {"format": FORMAT, "version": VERSION, **meta}
        schema = SCHEMA.with_metadata({_METADATA_KEY: json.dumps(record).encode()})
        self._texts = pa.array(token_texts, pa.string())
        # Windows repeat words: a dictionary page that holds a whole vocabulary keeps them small.
        self._writer = pq.ParquetWriter(
            path, schema, compression="zstd", dictionary_pagesize_limit=1 << 23
        )

    def __enter__(self) -> EvidenceWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self._writer.close()

    def write(self, block: LatentBlock) -> None:
        """Append a block; it becomes row groups of ROWS_PER_GROUP latents."""
        n = len(block.latents)
        columns: dict[str, Any] = {
            "latent": block.latents,
            "density": block.density,
            "n_firing_tokens": block.n_firing_tokens,
            "n_firing_sentences": block.n_firing_sentences,
            "max_activation": block.max_activation,
            "histogram": _lists(
                np.full(n, N_BINS), pa.array(block.histogram.reshape(-1), pa.int64())
            ),
            "examples": self._examples(block.examples),
            "promoted": self._tokens(block.promoted, n),
            "suppressed": self._tokens(block.suppressed, n),
        }
        for name, (values, ids) in block.tops.items():
            columns[f"top_{name}"] = _pairs(ids, value=values, sentence_id=ids)
        for name, field in (("neighbours", "cosine"), ("coactive", "jaccard")):
            latents, values = getattr(block, name)
            columns[name] = _pairs(latents, latent=latents, **{field: values})
        arrays = []
        for field in SCHEMA:
            column = columns[field.name]
            array = column if isinstance(column, pa.Array) else pa.array(column)
            arrays.append(array.cast(field.type))
        table = pa.Table.from_arrays(arrays, schema=self._writer.schema)
        self._writer.write_table(table, row_group_size=ROWS_PER_GROUP)

    def _tokens(self, pairs: tuple[np.ndarray, np.ndarray] | None, n: int) -> pa.Array:
        if pairs is None:
            return pa.array([[]] * n, _TOKENS)
        ids, values = pairs
        fields = [self._texts.take(pa.array(ids.reshape(-1))), pa.array(values.reshape(-1))]
        rows = pa.StructArray.from_arrays(fields, ["token", "value"])
        return _lists(np.full(n, ids.shape[1]), rows)

    def _examples(self, examples: Examples) -> pa.Array:
        fields = {
            "kind": pa.array(KINDS).take(pa.array(examples.kind)),
            "decile": pa.array(examples.decile, pa.int8()),
            "split": pa.array(SPLITS).take(pa.array(examples.split)),
            "value": pa.array(examples.value, pa.float32()),
            "sentence_id": pa.array(examples.sentence_id, pa.int64()),
            "start": pa.array(examples.start, pa.int32()),
            "position": pa.array(examples.position, pa.int32()),
            "token_ids": _lists(examples.lengths, pa.array(examples.token_ids, pa.int32())),
            "tokens": _lists(examples.lengths, self._texts.take(pa.array(examples.token_ids))),
            "activations": _lists(examples.lengths, pa.array(examples.activations, pa.float32())),
        }
        rows = pa.StructArray.from_arrays(list(fields.values()), list(fields))
        return _lists(examples.counts, rows)


def _lists(counts: np.ndarray, values: pa.Array) -> pa.Array:
    offsets = np.concatenate([[0], np.cumsum(counts)]).astype(np.int32)
    return pa.ListArray.from_arrays(pa.array(offsets), values)


def _pairs(keys: np.ndarray, **columns: np.ndarray) -> pa.Array:
    """Lists of structs from (n, m) columns; where the key is -1 there is no entry."""
    filled = keys >= 0
    fields = [pa.array(column[filled]) for column in columns.values()]
    return _lists(filled.sum(axis=1), pa.StructArray.from_arrays(fields, list(columns)))


class Evidence:
    """An open evidence file; rows are read when they are asked for."""

    def __init__(self, path: Path, file: pq.ParquetFile, meta: dict[str, Any]):
        self.path, self.meta = path, meta
        self._file = file
        counts = [file.metadata.row_group(i).num_rows for i in range(file.num_row_groups)]
        self._starts = np.concatenate([[0], np.cumsum(counts)])
        self._group = lru_cache(maxsize=4)(self._read_group)

    @property
    def n_latents(self) -> int:
        """Number of latents; every latent has a row."""
        return int(self._starts[-1])

    @property
    def n_groups(self) -> int:
        """Number of row groups, for readers that go through the whole file."""
        return self._file.num_row_groups

    def summary(self) -> pa.Table:
        """Return the columns latent, density, max_activation, n_firing_sentences of all latents."""
        return self._file.read(columns=_SUMMARY)

    def read_group(self, index: int, columns: list[str] | None = None) -> pa.Table:
        """Return one row group (a block of consecutive latents). Raises UserError if damaged."""
        try:
            return self._file.read_row_group(index, columns=columns)
        except _DAMAGED as error:
            raise UserError(f"{self.path} is damaged: {error}") from None

    def latent(self, index: int) -> dict[str, Any]:
        """Return one latent's row as plain Python. Raises UserError if there is no such latent."""
        if not 0 <= index < self.n_latents:
            raise UserError(f"latent {index}: {self.path} has latents 0 to {self.n_latents - 1}")
        group = int(np.searchsorted(self._starts, index, side="right")) - 1
        table = self._group(group)
        try:
            row = table.slice(index - int(self._starts[group]), 1).to_pylist()[0]
            lengths = [{len(e[name]) for name in _PER_TOKEN} for e in row["examples"]]
        except (ValueError, TypeError) as error:  # no UTF-8, or nothing where there should be
            raise UserError(f"{self.path} is damaged: {error}") from None
        if any(len(found) > 1 for found in lengths):
            raise UserError(f"{self.path} is damaged: tokens and activations differ in number")
        return row

    def iter_latents(self, latents: Iterable[int] | None = None) -> Iterator[dict[str, Any]]:
        """Yield rows of the given latents, or of all of them, in order."""
        for index in range(self.n_latents) if latents is None else latents:
            yield self.latent(index)

    def _read_group(self, index: int) -> pa.Table:
        return self.read_group(index)


def open_evidence(path: Path) -> Evidence:
    """Open an evidence file. Raises UserError when it is missing, damaged or of another format."""
    if not path.exists():
        raise UserError(f"{path} does not exist: run capture_top_activating_sentences.py first")
    try:
        file = pq.ParquetFile(path, memory_map=True)
    except _DAMAGED as error:
        raise UserError(f"{path} is not a readable parquet file: {error}") from None
    raw = (file.schema_arrow.metadata or {}).get(_METADATA_KEY)
    try:
        meta = dict(json.loads(raw)) if raw else {}
    except (ValueError, TypeError):
        meta = {}
    if meta.get("format") != FORMAT or meta.get("version") != VERSION:
        raise UserError(
            f"{path}: format {meta.get('format')} version {meta.get('version')} is not known here"
        )
    evidence = Evidence(path, file, meta)
    try:
        latents = evidence.summary().column("latent").to_numpy()
    except _DAMAGED as error:
        raise UserError(f"{path} is damaged: {error}") from None
    if not np.array_equal(latents, np.arange(evidence.n_latents)):
        raise UserError(f"{path} is incomplete: it lacks latents")
    return evidence
