"""Packs evidence and labels into the compressed chunks that the latent browser's page holds.

Windows of many latents come from the same sentences: each sentence is stored once, stitched
together from the windows that show it, and a window is a reference into it. Numbers are columns of
the smallest integer type that holds them; every chunk is deflated and base64-encoded.
"""

from __future__ import annotations

import base64
import json
import zlib
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch
from torch import Tensor

from saint.evidence.file import KINDS, Evidence
from saint.evidence.labels import TOP_TOKENS, Label
from saint.evidence.words import is_content_word, is_form
from saint.stage.errors import UserError
from saint.stage.terminal import visible

LATENTS_PER_CHUNK = 128
SENTENCES_PER_CHUNK = 256
_COLUMNS = [
    "latent",
    "n_firing_tokens",
    "n_firing_sentences",
    "max_activation",
    "histogram",
    "examples",
    "promoted",
    "suppressed",
    "neighbours",
    "coactive",
]
_N_TOP_TOKENS = 6
_LEAST_WINDOWS = 3
_MIN_LETTERS = 3
_MISSING = "…"


@dataclass(frozen=True)
class WindowLimits:
    """How many windows of each kind a page shows per latent (quantile: per decile)."""

    top: int = 10
    quantile: int = 2
    near_miss: int = 4


def pack_columns(columns: Mapping[str, np.ndarray], extra: Any = None) -> str:
    """Return base64 of deflated columns, for `unpack` in browser.js.

    Layout: uint32 length of a JSON header, the header (names, types and lengths of the columns, and
    `extra`), then the columns, each starting at a multiple of 4 bytes.
    """
    header: dict[str, Any] = {"columns": [], "extra": _visible(extra)}
    parts: list[bytes] = []
    for name, column in columns.items():
        data = _smallest(np.asarray(column).reshape(-1))
        header["columns"].append([name, data.dtype.str[1:], data.size])
        parts.append(_padded(data.tobytes()))
    encoded = _padded(json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode(), b" ")
    raw = np.uint32(len(encoded)).tobytes() + encoded + b"".join(parts)
    return base64.b64encode(zlib.compress(raw, 9)).decode("ascii")


def _visible(value: Any) -> Any:
    """A value for JSON whose texts hold nothing that acts."""
    if isinstance(value, str):
        return visible(value)
    if isinstance(value, Mapping):
        return {name: _visible(one) for name, one in value.items()}
    return [_visible(one) for one in value] if isinstance(value, list | tuple) else value


def _smallest(column: np.ndarray) -> np.ndarray:
    if column.dtype.kind == "f":
        return column.astype("<f4")
    largest = int(column.max(initial=0))
    return column.astype(f"<u{1 if largest < 1 << 8 else 2 if largest < 1 << 16 else 4}")


def _padded(data: bytes, fill: bytes = b"\0") -> bytes:
    return data + fill * (-len(data) % 4)


@dataclass
class Vocabulary:
    """Texts of tokens and the number each one has on the page; number 0 is text not shown."""

    numbers: dict[str, int] = field(default_factory=lambda: {_MISSING: 0})
    _by_id: np.ndarray = field(default_factory=lambda: np.full(1, -1, np.int64))

    def number(self, texts: list[str]) -> np.ndarray:
        """Return the numbers of texts, giving new ones to new texts."""
        return np.array([self.numbers.setdefault(t, len(self.numbers)) for t in texts], np.int64)

    def number_ids(self, ids: np.ndarray, texts: pa.Array) -> np.ndarray:
        """Return the numbers of token ids; texts: the display text of each."""
        distinct, first = np.unique(ids, return_index=True)
        largest = int(distinct[-1]) if len(distinct) else 0
        if largest >= len(self._by_id):
            grown = np.full(2 * largest + 1, -1, np.int64)
            grown[: len(self._by_id)] = self._by_id
            self._by_id = grown
        new = self._by_id[distinct] < 0
        self._by_id[distinct[new]] = self.number(texts.take(pa.array(first[new])).to_pylist())
        return self._by_id[ids]


@dataclass
class PageWindows:
    """Windows of consecutive latents. counts: windows per latent; the rest per window or token.

    group: 0 top, 1 to 10 deciles from the strongest, 11 near misses. cut: 1 where the sentence
    begins before the window, plus 2 where it may go on after it. token: number on the page.
    """

    counts: np.ndarray
    group: np.ndarray
    sentence_id: np.ndarray
    start: np.ndarray
    length: np.ndarray
    cut: np.ndarray
    token: np.ndarray
    activation: np.ndarray


def read_windows(
    examples: pa.ListArray, limits: WindowLimits, width: int, vocabulary: Vocabulary
) -> PageWindows:
    """Pick the windows that the page shows out of an evidence column.

    width: tokens that a window has on each side of its strongest one, where the sentence allows.
    """
    counts = examples.value_lengths().to_numpy(zero_copy_only=False)
    flat = examples.flatten()
    kind = pc.index_in(flat.field("kind"), pa.array(KINDS)).to_numpy(zero_copy_only=False)  # pyright: ignore[reportAttributeAccessIssue]
    decile = flat.field("decile").to_numpy().astype(np.int64)
    owner = np.repeat(np.arange(len(counts)), counts)
    key = (owner * len(KINDS) + kind) * 11 + decile + 1
    starts = np.flatnonzero(np.diff(key, prepend=-1))
    rank = np.arange(len(key)) - np.repeat(starts, np.diff(starts, append=len(key)))
    limit = np.array([getattr(limits, name, 0) for name in KINDS])
    kept = rank < limit[kind]
    chosen = flat.filter(pa.array(kept))
    ids, texts = chosen.field("token_ids"), chosen.field("tokens").flatten()
    top, quantile = KINDS.index("top"), KINDS.index("quantile")
    start = chosen.field("start").to_numpy().astype(np.int64)
    length = ids.value_lengths().to_numpy(zero_copy_only=False).astype(np.int64)
    reaches = start + length == chosen.field("position").to_numpy() + width + 1
    group = np.where(kind == top, 0, np.where(kind == quantile, 10 - decile, 11))
    return PageWindows(
        counts=np.bincount(owner[kept], minlength=len(counts)),
        group=group[kept],
        sentence_id=chosen.field("sentence_id").to_numpy(),
        start=start,
        length=length,
        cut=(start > 0) + 2 * reaches,
        token=vocabulary.number_ids(ids.flatten().to_numpy(), texts),
        activation=chosen.field("activations").flatten().to_numpy(),
    )


@dataclass
class Sentences:
    """Sentences stitched together from windows. first: place of the first known token."""

    sentence_ids: np.ndarray
    first: np.ndarray
    length: np.ndarray
    token: np.ndarray

    def chunks(self) -> Iterator[str]:
        """Yield packed chunks of SENTENCES_PER_CHUNK sentences."""
        ends = np.concatenate([[0], np.cumsum(self.length)])
        for start in range(0, len(self.length), SENTENCES_PER_CHUNK):
            rows = slice(start, start + SENTENCES_PER_CHUNK)
            stop = min(start + SENTENCES_PER_CHUNK, len(self.length))
            tokens = self.token[ends[start] : ends[stop]]
            yield pack_columns({"length": self.length[rows], "token": tokens})


def stitch(blocks: list[PageWindows]) -> Sentences:
    """Join all windows of a sentence; tokens that no window shows become number 0."""
    ids, start, length, token = (
        np.concatenate([getattr(block, name) for block in blocks])
        for name in ("sentence_id", "start", "length", "token")
    )
    distinct, place = np.unique(ids, return_inverse=True)
    first = np.full(len(distinct), np.iinfo(np.int64).max)
    last = np.zeros(len(distinct), np.int64)
    np.minimum.at(first, place, start)
    np.maximum.at(last, place, start + length)
    begins = np.cumsum(last - first) - (last - first)
    out = np.zeros(int((last - first).sum()), np.int64)
    before = np.cumsum(length) - length
    target = np.repeat(begins[place] + start - first[place] - before, length)
    out[target + np.arange(len(token))] = token
    return Sentences(distinct, first, last - first, out)


@dataclass
class Page:
    """All packed chunks of a page."""

    summary: str
    vocabulary: str
    latents: list[str]
    sentences: list[str]


class PageBuilder:
    """Goes through an evidence file once and packs what the page shows."""

    def __init__(
        self,
        evidence: Evidence,
        labels: Mapping[int, Label],
        limits: WindowLimits,
        places: np.ndarray | None = None,
        effects: tuple[np.ndarray, np.ndarray] | None = None,
    ):
        """places: (n_latents, 2) in 0..1 on the map of directions. effects: see `read_effects`."""
        self.evidence, self.labels, self.limits = evidence, labels, limits
        self.places, self.effects = places, effects
        self.vocabulary = Vocabulary()
        self._summary: dict[str, list[np.ndarray]] = {}
        self._top_tokens: list[str] = []
        self._promoted: list[str] = []
        self._windows: list[PageWindows] = []
        self._columns: list[dict[str, np.ndarray]] = []

    def build(self) -> Page:
        """Read the whole file and return the page's chunks."""
        for group in range(self.evidence.n_groups):
            table = self.evidence.read_group(group, _COLUMNS)
            for start in range(0, len(table), LATENTS_PER_CHUNK):
                self._read(table.slice(start, LATENTS_PER_CHUNK).combine_chunks())
        sentences = stitch(self._windows)
        texts = list(self.vocabulary.numbers)
        chunks = [self._latent_chunk(index, sentences) for index in range(len(self._columns))]
        return Page(
            self._summary_chunk(), pack_columns({}, texts), chunks, list(sentences.chunks())
        )

    def _read(self, table: pa.Table) -> None:
        column = {name: table.column(name).combine_chunks() for name in _COLUMNS}
        width = self.evidence.meta["window"]
        windows = read_windows(column["examples"], self.limits, width, self.vocabulary)
        self._windows.append(windows)
        for name in ("n_firing_tokens", "n_firing_sentences", "max_activation"):
            self._summary.setdefault(name, []).append(column[name].to_numpy())
        texts = list(self.vocabulary.numbers)
        peaks = _peak_tokens(windows, texts)
        self._top_tokens += ["\t".join(_most_common(tops)) for tops, _ in peaks]
        clear = np.array([_clarity(tops, spread) for tops, spread in peaks])
        self._summary.setdefault("clarity", []).append(np.rint(1000 * clear).astype(np.int64))
        for row in column["promoted"].to_pylist():
            self._promoted.append("\t".join(_one_line(pair["token"]) for pair in row))
        packed = {"histogram": column["histogram"].flatten().to_numpy()}
        for name in ("promoted", "suppressed"):
            packed |= self._token_columns(name, column[name])
        for name, value in (("neighbours", "cosine"), ("coactive", "jaccard")):
            packed |= _latent_columns(name, column[name], value)
        self._columns.append(packed)

    def _token_columns(self, name: str, lists: pa.ListArray) -> dict[str, np.ndarray]:
        flat = lists.flatten()
        values = np.abs(flat.field("value").to_numpy())
        counts = lists.value_lengths().to_numpy(zero_copy_only=False)
        strongest = np.repeat(_row_maxima(values, counts), counts)
        return {
            f"{name}_count": counts,
            f"{name}_token": self.vocabulary.number(flat.field("token").to_pylist()),
            f"{name}_value": _share(values, strongest),
        }

    def _latent_chunk(self, index: int, sentences: Sentences) -> str:
        windows, first_latent = self._windows[index], index * LATENTS_PER_CHUNK
        n = len(windows.counts)
        maxima = self._summary["max_activation"][index]
        scale = np.repeat(np.repeat(maxima, windows.counts), windows.length)
        fires = windows.activation > 0
        place = np.searchsorted(sentences.sentence_ids, windows.sentence_id)
        owner = np.repeat(np.arange(len(windows.length)), windows.length)
        before = np.cumsum(windows.length) - windows.length
        peaks = _row_maxima(windows.activation, windows.length)
        columns = self._columns[index] | {
            "window_count": windows.counts,
            "window_group": windows.group,
            "window_sentence": place,
            "window_start": windows.start - sentences.first[place],
            "window_length": windows.length,
            "window_cut": windows.cut,
            "window_value": _share(peaks, np.repeat(maxima, windows.counts), most=65535),
            "fired_count": np.bincount(owner[fires], minlength=len(windows.length)),
            "fired_place": (np.arange(len(owner)) - before[owner])[fires],
            "fired_value": np.maximum(_share(windows.activation, scale)[fires], 1),
        }
        extra = {
            str(i): self.labels[i].extra
            for i in range(first_latent, first_latent + n)
            if i in self.labels and self.labels[i].extra
        }
        return pack_columns(columns, extra)

    def _summary_chunk(self) -> str:
        n = self.evidence.n_latents
        known = [self.labels.get(i) for i in range(n)]
        columns = {name: np.concatenate(parts) for name, parts in self._summary.items()}
        for name in ("certainty", "score"):
            values = [getattr(label, name) if label else None for label in known]
            # 0 is "not known", so that 1 to 1001 stand for 0 to 1.
            columns[name] = np.array([0 if v is None else 1 + round(1000 * v) for v in values])
        columns["source"] = np.array([_source(label) for label in known])
        for name, column in zip(("effect", "shows"), self.effects or (), strict=False):
            columns[name] = column
        if self.places is not None:
            for axis, name in enumerate(("map_x", "map_y")):
                columns[name] = np.rint(65535 * self.places[:, axis]).astype(np.int64)
        facts = ("n_tokens", "n_sentences", "k", "layer", "hook_point")
        texts = {
            "meta": {name: self.evidence.meta.get(name) for name in facts}
            | {
                "n_latents": n,
                "n_labels": sum(bool(label.text) for label in self.labels.values()),
                "latents_per_chunk": LATENTS_PER_CHUNK,
                "sentences_per_chunk": SENTENCES_PER_CHUNK,
            },
            "labels": "\n".join(_one_line(label.text) if label else "" for label in known),
            "tokens": "\n".join(self._top_tokens),
            "promoted": "\n".join(self._promoted),
        }
        return pack_columns(columns, texts)


def _one_line(text: str) -> str:
    return text.replace("\t", " ").replace("\r", " ").replace("\n", "⏎")


def _row_maxima(values: np.ndarray, counts: np.ndarray) -> np.ndarray:
    out = np.zeros(len(counts), values.dtype)
    filled = counts > 0
    if filled.any():
        out[filled] = np.maximum.reduceat(values, (np.cumsum(counts) - counts)[filled])
    return out


def _share(values: np.ndarray, whole: np.ndarray, most: int = 255) -> np.ndarray:
    """Values as 0 to `most` of a whole."""
    shares = np.divide(values, whole, where=whole > 0, out=np.zeros_like(values))
    return np.rint(most * np.clip(shares, 0, 1)).astype(np.int64)


def _latent_columns(name: str, lists: pa.ListArray, value: str) -> dict[str, np.ndarray]:
    flat = lists.flatten()
    return {
        f"{name}_count": lists.value_lengths().to_numpy(zero_copy_only=False),
        f"{name}_latent": flat.field("latent").to_numpy(),
        f"{name}_value": np.rint(255 * np.clip(flat.field(value).to_numpy(), 0, 1)).astype(
            np.int64
        ),
    }


def _peak_tokens(windows: PageWindows, texts: list[str]) -> list[tuple[list[str], list[str]]]:
    """The token on which each window of a latent peaks: of its top ones, and of the deciles."""
    offsets = np.cumsum(windows.length) - windows.length
    owner = np.repeat(np.arange(len(windows.counts)), windows.counts)
    found: list[tuple[list[str], list[str]]] = [([], []) for _ in windows.counts]
    for i in np.flatnonzero(windows.group <= 10).tolist():
        rows = slice(offsets[i], offsets[i] + windows.length[i])
        peak = int(windows.activation[rows].argmax())
        text = _one_line(texts[windows.token[rows][peak]]).strip()
        if text:
            found[owner[i]][int(windows.group[i] > 0)].append(text)
    return found


def _most_common(tokens: list[str]) -> list[str]:
    return [token for token, _ in Counter(tokens).most_common(_N_TOP_TOKENS)]


def _clarity(tops: list[str], spread: list[str]) -> float:
    """How much of a latent's windows peak on one content word and its forms, 0..1.

    The mean of two shares: of the strongest windows, and of those over all strengths. 0 where the
    commonest token is a function word or punctuation, or the windows are fewer than three.
    """
    if len(tops) < _LEAST_WINDOWS:
        return 0.0
    main = Counter(token.lower() for token in tops).most_common(1)[0][0]
    if not is_content_word(main, min_letters=_MIN_LETTERS):
        return 0.0
    shares = [
        sum(is_form(main, token.lower()) for token in tokens) / len(tokens)
        for tokens in (tops, spread or tops)
    ]
    return sum(shares) / 2


def _source(label: Label | None) -> int:
    """Where a label comes from: 0 there is none, 1 top tokens, 2 a model or a person."""
    if label is None or not label.text:
        return 0
    return 1 if label.extra.get("source") == TOP_TOKENS else 2


def read_effects(path: Path, n_latents: int) -> tuple[np.ndarray, np.ndarray]:
    """Read `effects.parquet`: each latent's rank by its causal score, and whether it steers.

    Returns (n_latents,) ranks, 1 to 1001 from the weakest to the strongest and 0 where it was not
    measured, and (n_latents,) 2 where its own word shows in texts steered by it, 1 where it was
    tried and does not, 0 where not tried. Raises UserError when it is no such file.
    """
    try:
        table = pq.read_table(path, columns=["latent", "score", "share", "shows"])
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{path} is not a readable file of effects: {error}") from None
    latents, scores = (table.column(name).to_numpy() for name in ("latent", "score"))
    if len(latents) and latents.max() >= n_latents:
        raise UserError(f"{path} has latent {latents.max()}, the evidence {n_latents} latents")
    rank = scores.argsort(kind="stable").argsort(kind="stable") / max(1, len(scores) - 1)
    effect, shows = np.zeros(n_latents, np.int64), np.zeros(n_latents, np.int64)
    effect[latents] = 1 + np.rint(1000 * rank).astype(np.int64)
    tried = table.column("share").is_valid().to_numpy()
    shows[latents] = np.where(tried, 1 + np.array(table.column("shows").to_pylist(), bool), 0)
    return effect, shows


def direction_map(decoder: Tensor) -> np.ndarray:
    """Return (n_latents, 2) places in 0..1: directions on their two principal components.

    decoder: (n_latents, d_model). Seeded, so that the same SAE gives the same map. Each component
    is ranked for one half, since most directions lie close together in the middle.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        rows = decoder.float()
        _, _, components = torch.pca_lowrank(rows, q=min(8, *rows.shape), niter=4)
    flat = ((rows - rows.mean(dim=0)) @ components[:, :2]).cpu().numpy()
    low, high = flat.min(axis=0), flat.max(axis=0)
    linear = (flat - low) / np.maximum(high - low, 1e-12)
    rank = flat.argsort(axis=0, kind="stable").argsort(axis=0, kind="stable")
    return (linear + rank / max(1, len(flat) - 1)) / 2
