"""Capturing shards: which sentences, the batched forward passes, and writing beside them.

Three things run at once: a thread tokenises the next shard, this one issues forward passes without
ever waiting for the device, and a thread writes rows to their places as they arrive on the host. No
shard is held in memory.
"""

from __future__ import annotations

import json
import queue
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from llama_3 import HookPoint, Llama, Tokenizer
from llama_3.model import to_device
from saint.capture.packing import batches_by_length, pack
from saint.stage.files import atomic_path
from saint.stage.manifests import file_checksum
from saint.store.activation_store import (
    SENTENCES,
    layer_dir_name,
    part_name,
    shard_file,
    shard_name,
)
from saint.store.dataset import Sampler
from saint.store.row_format import Stored, encode_rows

_RECORD = b"saint"
_N_UNWRITTEN = 4
_N_BUFFERS = 3  # one that is filled, one that waits, one that is written


@dataclass(frozen=True)
class ShardJob:
    """The sentences of one shard: sentence_ids and texts in the sampled order."""

    index: int
    sentence_ids: list[int]
    texts: list[str]


def shard_sizes(num_samples: int, per_shard: int, kept: Sequence[int]) -> list[int]:
    """Return the sentences of each shard: those an earlier, smaller run made, then new ones."""
    sizes, remaining = list(kept), num_samples - sum(kept)
    while remaining > 0:
        sizes.append(min(per_shard, remaining))
        remaining -= sizes[-1]
    return sizes


def shard_jobs(sampler: Sampler, sizes: Sequence[int]) -> Iterator[ShardJob]:
    """Cut the sample into shards; the last may be short where the dataset ends."""
    stream = iter(sampler)
    for index, size in enumerate(sizes):
        rows = [row for _, row in zip(range(size), stream, strict=False)]
        if not rows:
            return
        yield ShardJob(index, [i for i, _ in rows], [text for _, text in rows])


@dataclass(frozen=True)
class Tokenised:
    """Token ids of each sentence, without BOS; n_cut: how many were longer than the limit."""

    token_lists: list[list[int]]
    n_cut: int

    @property
    def n_tokens(self) -> int:
        """Tokens of all sentences."""
        return sum(map(len, self.token_lists))


@dataclass(frozen=True)
class CapturedBatch:
    """Rows of some of a shard's sentences, one sentence after another.

    sentences: their places in the shard. rows: on the host, complete once the event `arrived` has
    happened (None: they are). release: to be called when they are written. n_computed: tokens of
    the forward pass, BOS included.
    """

    sentences: np.ndarray
    rows: dict[HookPoint, Stored]
    arrived: Any
    release: Callable[[], None]
    n_computed: int


@dataclass(frozen=True)
class HostRows:
    """Rows on the host, and what to call when they are not needed any more."""

    rows: dict[HookPoint, Stored]
    release: Callable[[], None]


class HostBuffers:
    """A few pinned buffers in which rows travel to the host, each used again once it is written.

    torch would keep every block that it ever pinned, each as large as the next power of two.
    """

    def __init__(self, n: int, *, pin: bool = True) -> None:
        self._free: queue.SimpleQueue[dict[Any, torch.Tensor]] = queue.SimpleQueue()
        self._pin = pin
        for _ in range(n):
            self._free.put({})

    def take(self, wanted: Mapping[HookPoint, Mapping[str, torch.Tensor]]) -> HostRows:
        """Return buffers like the wanted tensors; waits while all are in use."""
        buffers = self._free.get()
        rows: dict[HookPoint, Stored] = {}
        for hook, stored in wanted.items():
            rows[hook] = {name: self._fit(buffers, (hook, name), t) for name, t in stored.items()}
        return HostRows(rows, lambda: self._free.put(buffers))

    def _fit(self, buffers: dict[Any, torch.Tensor], key: Any, like: torch.Tensor) -> torch.Tensor:
        """Return a part of a buffer in the wanted shape; it is made anew only where it is short."""
        if key not in buffers or buffers[key].numel() < like.numel():
            buffers.pop(key, None)
            buffers[key] = torch.empty(like.numel(), dtype=like.dtype, pin_memory=self._pin)
        return buffers[key][: like.numel()].view(like.shape)


@dataclass(frozen=True)
class Capture:
    """What every shard needs: the model, its tokenizer and how to run it."""

    model: Llama
    tokenizer: Tokenizer
    hooks: list[HookPoint]
    prepend_bos: bool
    max_token_length: int
    batch_tokens: int
    store_dtype: str = "bfloat16"
    buffers: HostBuffers = field(default_factory=lambda: HostBuffers(_N_BUFFERS))

    @property
    def bos(self) -> list[int]:
        """What is put before a sentence in the forward pass and not stored."""
        return [self.tokenizer.bos_id] if self.prepend_bos else []

    def tokenise(self, job: ShardJob) -> Tokenised:
        """Return each sentence's token ids, cut to the limit, without BOS."""
        encoded, limit = self.tokenizer.encode_batch(job.texts, bos=False), self.max_token_length
        n_cut = sum(len(tokens) > limit for tokens in encoded)
        return Tokenised([tokens[:limit] for tokens in encoded], n_cut)

    @torch.inference_mode()
    def run(self, token_lists: Sequence[Sequence[int]]) -> Iterator[CapturedBatch]:
        """Yield the activations of every sentence that has tokens, longest first.

        Nothing here waits for the device: on a GPU, inputs and results travel through pinned
        memory, results on a stream of their own beside the next batch's forward.
        """
        device = self.model.device
        copies = torch.cuda.Stream(device) if device.type == "cuda" else None
        lengths = np.array([len(tokens) for tokens in token_lists])
        for batch in batches_by_length(lengths, self.batch_tokens, extra=len(self.bos)):
            packed = pack([token_lists[i] for i in batch], bos=self.bos)
            tokens = to_device(packed.tokens, device)
            own = to_device(packed.own.nonzero().squeeze(1), device)
            captured = self.model.capture(tokens, self.hooks, seq_lens=packed.seq_lens)
            rows = {h: encode_rows(x[own], self.store_dtype) for h, x in captured.items()}
            yield CapturedBatch(batch, *_to_host(rows, copies, self.buffers), len(packed.tokens))


def _to_host(
    rows: dict[HookPoint, dict[str, torch.Tensor]],
    copies: torch.cuda.Stream | None,
    buffers: HostBuffers,
) -> tuple[dict[HookPoint, Stored], Any, Callable[[], None]]:
    """Start copying rows to pinned memory on the stream; on the CPU they are there already."""
    if copies is None:
        return dict(rows), None, lambda: None
    host = buffers.take(rows)
    copies.wait_stream(torch.cuda.current_stream(copies.device))
    with torch.cuda.stream(copies):
        for hook, stored in rows.items():
            for name, tensor in stored.items():
                host.rows[hook][name].copy_(tensor, non_blocking=True)
                tensor.record_stream(copies)
    return host.rows, copies.record_event(), host.release


def shard_paths(output_dir: Path, hooks: Sequence[HookPoint], index: int) -> dict[HookPoint, Path]:
    """Return where each hook's shard lies."""
    return {h: output_dir / layer_dir_name(*h) / shard_name(index) for h in hooks}


class JobFiles:
    """The files of one shard while its rows arrive; the sentences' part is written last."""

    def __init__(
        self, output_dir: Path, capture: Capture, job: ShardJob, tokenised: Tokenised
    ) -> None:
        self._output_dir, self._job, self._tokenised = output_dir, job, tokenised
        self._paths = shard_paths(output_dir, capture.hooks, job.index)
        self._lengths = [len(tokens) for tokens in tokenised.token_lists]
        self._starts = np.cumsum([0, *self._lengths]).tolist()
        self._open = ExitStack()
        self._files = {
            hook: self._open.enter_context(
                shard_file(
                    path,
                    tokenised.token_lists,
                    job.sentence_ids,
                    d_model=capture.model.args.dim,
                    store_dtype=capture.store_dtype,
                )
            )
            for hook, path in self._paths.items()
        }

    def write(self, batch: CapturedBatch) -> None:
        """Write a batch's rows to their places, once they are on the host."""
        try:
            if batch.arrived is not None:
                batch.arrived.synchronize()
            self._write_rows(batch)
        finally:
            batch.release()  # or the forward passes would wait for ever for what failed here

    def _write_rows(self, batch: CapturedBatch) -> None:
        first = 0
        for sentence in batch.sentences.tolist():
            rows = slice(first, first := first + self._lengths[sentence])
            for hook, stored in batch.rows.items():
                for name, tensor in stored.items():
                    self._files[hook].write(name, self._starts[sentence], tensor[rows])

    def finish(self) -> None:
        """Name the shard's files, then write its sentences with every file's checksum."""
        self._open.close()
        job, tokenised = self._job, self._tokenised
        names = {p.relative_to(self._output_dir).as_posix(): p for p in self._paths.values()}
        record = {
            "n_sentences": len(job.sentence_ids),
            "n_tokens": tokenised.n_tokens,
            "n_cut": tokenised.n_cut,
            "files": {name: file_checksum(path) for name, path in names.items()},
        }
        part = pa.table(
            {
                "sentence_id": pa.array(job.sentence_ids, pa.int64()),
                "text": pa.array(job.texts, pa.string()),
                "token_ids": pa.array(tokenised.token_lists, pa.list_(pa.int32())),
            }
        ).replace_schema_metadata({_RECORD: json.dumps(record)})
        with atomic_path(self._output_dir / SENTENCES / part_name(job.index)) as temporary:
            pq.write_table(part, temporary, compression="zstd")

    def abort(self) -> None:
        """Remove what is unfinished."""
        self._open.__exit__(OSError, OSError("aborted"), None)


class WriterThread:
    """Runs tasks one after another beside the caller; what fails there is raised to the caller."""

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(1)
        self._waiting: deque[Future[None]] = deque()

    def submit(self, task: Callable[..., None], *args: Any) -> None:
        """Queue a task; waits while too many are queued."""
        while len(self._waiting) >= _N_UNWRITTEN:
            self._waiting.popleft().result()
        self._waiting.append(self._pool.submit(task, *args))

    def drain(self) -> None:
        """Wait for all tasks."""
        while self._waiting:
            self._waiting.popleft().result()

    def stop(self) -> None:
        """Forget tasks that have not begun and wait for the one that has."""
        self._pool.shutdown(cancel_futures=True)


def capture_shards(
    capture: Capture,
    jobs: Iterator[ShardJob],
    output_dir: Path,
    *,
    on_tokenised: Callable[[ShardJob, Tokenised], None],
    on_batch: Callable[[CapturedBatch, int], None],
) -> None:
    """Capture and write shards. on_tokenised is called before a shard; on_batch gets each batch
    that was issued, and how many of its tokens are stored.
    """
    writer, unfinished = WriterThread(), []
    with ThreadPoolExecutor(1) as tokenising:
        try:
            job = next(jobs, None)
            prepared = tokenising.submit(capture.tokenise, job) if job else None
            while job is not None and prepared is not None:
                tokenised, following = prepared.result(), next(jobs, None)
                if following is not None:
                    prepared = tokenising.submit(capture.tokenise, following)
                on_tokenised(job, tokenised)
                files = JobFiles(output_dir, capture, job, tokenised)
                unfinished = [*unfinished[-1:], files]
                for batch in capture.run(tokenised.token_lists):
                    writer.submit(files.write, batch)
                    on_batch(batch, batch.n_computed - len(capture.bos) * len(batch.sentences))
                writer.submit(files.finish)
                job = following
            writer.drain()
        finally:
            writer.stop()
            for files in unfinished:
                files.abort()


def follow_shards(capture: Capture, jobs: Iterator[ShardJob]) -> None:
    """Take part in the forward passes of shards that the tensor-parallel group's first rank writes.

    A job cannot be finished by the writer before this rank has taken it up, so both see the same
    jobs as missing.
    """
    for job in jobs:
        for batch in capture.run(capture.tokenise(job).token_lists):
            batch.release()


def read_record(output_dir: Path, index: int) -> dict[str, Any]:
    """Return a finished shard's counts and its files' checksums.

    Raises OSError or ValueError when there is none that can be read.
    """
    metadata = pq.read_schema(output_dir / SENTENCES / part_name(index)).metadata or {}
    return json.loads(metadata.get(_RECORD, b""))


def is_complete(output_dir: Path, hooks: Sequence[HookPoint], job: ShardJob) -> bool:
    """Whether an earlier run finished exactly this shard."""
    part = output_dir / SENTENCES / part_name(job.index)
    try:
        files = read_record(output_dir, job.index)["files"]
        ids = pq.read_table(part, columns=["sentence_id"]).column(0).to_pylist()
        sizes = {n: (output_dir / n).stat().st_size for n in files}
    except (OSError, ValueError):
        return False
    wanted = shard_paths(output_dir, hooks, job.index).values()
    return (
        ids == job.sentence_ids
        and {output_dir / name for name in files} == set(wanted)
        and all(size == files[name]["bytes"] for name, size in sizes.items())
    )
