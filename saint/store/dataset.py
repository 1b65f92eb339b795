"""Sentence datasets: parquet files with a text column, sampled the same way for any world size."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq
import xxhash

from saint.stage.errors import UserError
from saint.stage.manifests import fingerprint

HELD_OUT_FRACTION = 0.05
HELD_OUT_SEED = 0


@dataclass(frozen=True)
class RowGroup:
    """One parquet row group; `first_row` is the sentence_id of its first row."""

    file: str
    index: int
    first_row: int
    n_rows: int


@dataclass(frozen=True)
class SentenceDataset:
    """Parquet files of sentences; a sentence_id is the row number over the sorted files."""

    location: str
    text_column: str
    filesystem: pafs.FileSystem
    row_groups: list[RowGroup]
    fingerprint: str

    @property
    def n_rows(self) -> int:
        """Rows over all files, usable or not."""
        return sum(group.n_rows for group in self.row_groups)

    def read(self, group: RowGroup) -> list[Any]:
        """Return one row group's text column as Python values: None where null, bytes where the
        text is no valid UTF-8.

        Raises UserError when it is damaged, or its file system fails.
        """
        with _naming(self.location), self.filesystem.open_input_file(group.file) as source:
            table = pq.ParquetFile(source).read_row_group(group.index, columns=[self.text_column])
        column = table.column(0)
        try:
            return column.to_pylist()
        except UnicodeDecodeError:  # a writer that did not check: those rows stay bytes, no text
            is_large = pa.types.is_large_string(column.type)
            raw = column.cast(pa.large_binary() if is_large else pa.binary()).to_pylist()
            return [_decoded(value) for value in raw]


def _decoded(value: bytes | None) -> str | bytes | None:
    try:
        return None if value is None else value.decode()
    except UnicodeDecodeError:
        return value


@dataclass
class SkippedRows:
    """Rows that could not be used, by reason."""

    empty: int = 0
    null: int = 0
    not_text: int = 0

    @property
    def total(self) -> int:
        """All skipped rows."""
        return self.empty + self.null + self.not_text


def open_dataset(location: str | Path, *, text_column: str = "text") -> SentenceDataset:
    """Open a parquet file or a directory of them, local or by URI (`s3://`, `gs://`, `hf://`).

    Raises UserError when there is no parquet file, one is damaged, the text column is missing, or
    the file system fails.
    """
    with _naming(str(location)):
        return _open(str(location), text_column)


@contextmanager
def _naming(location: str) -> Iterator[None]:
    """Turn what a dataset's file system raises into one UserError: the location and the reason.

    Those behind a URI raise classes of their own (httpx's, aiohttp's, botocore's), which have
    nothing in common but Exception.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        is_remote = "://" in location
        if not (is_remote or isinstance(error, (OSError, pa.ArrowException))):
            raise
        reason = f"{type(error).__name__}: {error}"[:300]
        if is_remote and isinstance(error, ImportError):
            reason += " (pip install -e '.[remote]' adds what hf://, s3:// and gs:// need)"
        raise UserError(f"--dataset_dir {location} cannot be read: {reason}") from error


def _open(location: str, text_column: str) -> SentenceDataset:
    filesystem, path = _resolve(location)
    groups: list[RowGroup] = []
    identity: list[tuple[str, int, int]] = []
    first_row = 0
    for file in _parquet_files(filesystem, path, location):
        with filesystem.open_input_file(file.path) as source:
            try:
                metadata = pq.ParquetFile(source).metadata
                names = metadata.schema.to_arrow_schema().names
            except (pa.ArrowInvalid, OSError) as error:
                reason = f"{file.path} is not a readable parquet file: {error}"
                raise UserError(f"--dataset_dir {location}: {reason}") from None
        if text_column not in names:
            raise UserError(
                f"{file.path} has no column '{text_column}' (it has: {', '.join(names)}); "
                "name the right one with --text_column"
            )
        for index in range(metadata.num_row_groups):
            n_rows = metadata.row_group(index).num_rows
            groups.append(RowGroup(file.path, index, first_row, n_rows))
            first_row += n_rows
        identity.append((Path(file.path).name, file.size or 0, metadata.num_rows))
    return SentenceDataset(
        location, text_column, filesystem, groups, fingerprint([text_column, identity])
    )


def _resolve(location: str) -> tuple[pafs.FileSystem, str]:
    if "://" not in location:
        return pafs.LocalFileSystem(), str(Path(location).expanduser())
    with suppress(pa.ArrowInvalid, pa.ArrowNotImplementedError):  # a scheme that only fsspec knows
        return pafs.FileSystem.from_uri(location)
    import fsspec

    filesystem, path = fsspec.core.url_to_fs(location)
    return pafs.PyFileSystem(pafs.FSSpecHandler(filesystem)), path


def _parquet_files(filesystem: pafs.FileSystem, path: str, location: str) -> list[pafs.FileInfo]:
    info = filesystem.get_file_info(path)
    if info.type == pafs.FileType.NotFound:
        raise UserError(f"--dataset_dir {location} does not exist")
    if info.type == pafs.FileType.File:
        return [info]
    found = filesystem.get_file_info(pafs.FileSelector(path, recursive=True))
    files = [f for f in found if f.type == pafs.FileType.File and f.path.endswith(".parquet")]
    if not files:
        raise UserError(f"--dataset_dir {location} holds no *.parquet file")
    return sorted(files, key=lambda f: f.path)


@dataclass
class Sampler:
    """Seeded sample of usable sentences, in an order in which a smaller sample is a prefix.

    Row groups are visited in a seeded order over all files, and rows in a seeded order within
    each, so that only as much is read as the sample needs, and every rank sees the same order.
    """

    dataset: SentenceDataset
    seed: int
    skipped: SkippedRows = field(default_factory=SkippedRows)

    def __iter__(self) -> Iterator[tuple[int, str]]:
        """Yield (sentence_id, text) of usable rows."""
        groups = self.dataset.row_groups
        for index in np.random.default_rng(self.seed).permutation(len(groups)):
            group = groups[index]
            texts = self.dataset.read(group)
            for row in np.random.default_rng([self.seed, int(index)]).permutation(len(texts)):
                if self._usable(texts[row]):
                    yield group.first_row + int(row), texts[row]

    def _usable(self, text: Any) -> bool:
        if text is None:
            self.skipped.null += 1
        elif not isinstance(text, str):
            self.skipped.not_text += 1
        elif not text.strip():
            self.skipped.empty += 1
        else:
            return True
        return False


def fetch_sentences(dataset: SentenceDataset, sentence_ids: Iterable[int]) -> dict[int, str]:
    """Return {sentence_id: text}, reading each row group that holds one of them once.

    Raises UserError for an id that the dataset does not have.
    """
    wanted = np.unique(np.fromiter(sentence_ids, dtype=np.int64))
    if wanted.size and (wanted[0] < 0 or wanted[-1] >= dataset.n_rows):
        raise UserError(
            f"sentence {wanted[-1]} is not in {dataset.location} ({dataset.n_rows} rows): "
            "is this the dataset that was captured?"
        )
    texts: dict[int, str] = {}
    for group in dataset.row_groups:
        low, high = np.searchsorted(wanted, [group.first_row, group.first_row + group.n_rows])
        if low == high:
            continue
        column = dataset.read(group)
        texts |= {int(i): column[i - group.first_row] for i in wanted[low:high]}
    return texts


def is_held_out(
    token_ids: Iterable[int], *, fraction: float = HELD_OUT_FRACTION, seed: int = HELD_OUT_SEED
) -> bool:
    """Whether a sentence belongs to the held-out split: a seeded hash of its token ids.

    The same tokens always fall on the same side, so duplicates cannot leak between the splits.
    """
    data = np.asarray(token_ids, dtype="<i4").tobytes()
    return xxhash.xxh3_64_intdigest(data, seed=seed) < fraction * 2**64


def held_out_mask(
    token_ids: np.ndarray,
    offsets: np.ndarray,
    *,
    fraction: float = HELD_OUT_FRACTION,
    seed: int = HELD_OUT_SEED,
) -> np.ndarray:
    """`is_held_out` of sentences that lie one after another: (n_sentences,) bool.

    offsets: (n_sentences + 1,), sentence i is token_ids[offsets[i]:offsets[i + 1]].
    """
    data = np.ascontiguousarray(token_ids, "<i4").data.cast("B")
    ends = (4 * offsets).tolist()
    limit, digest = fraction * 2**64, xxhash.xxh3_64_intdigest
    return np.array(
        [digest(data[a:b], seed=seed) < limit for a, b in zip(ends, ends[1:], strict=False)], bool
    )
