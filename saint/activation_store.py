"""The activation store: large safetensors shards of one layer's activations, and their reader.

`activation_outputs/` holds `layer_<L>/` (resid_pre) or `layer_<L>.<hook>/` directories of
`shard_<NNNNN>.safetensors`, the sentences in `sentences.parquet/`, one part per shard, the display
text of every token id in `vocabulary.parquet`, and the manifest. `python -m saint.activation_store
DIR` prints what is there and verifies it.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from saint.manifests import Manifest, read_manifest, verify_file
from saint.runtime import UserError, atomic_path, run_stage

STAGE = "capture_activations"
SENTENCES = "sentences.parquet"
VOCABULARY = "vocabulary.parquet"


@dataclass(frozen=True)
class Shard:
    """Activations of consecutive sentences, the BOS position left out.

    activations: (n_tokens, d_model) bfloat16. token_ids: (n_tokens,) int32.
    offsets: (n_sentences + 1,) int64, sentence i is rows offsets[i]:offsets[i + 1].
    sentence_ids: (n_sentences,) int64.
    """

    activations: Tensor
    token_ids: Tensor
    offsets: Tensor
    sentence_ids: Tensor


def layer_dir_name(layer: int, hook_point: str) -> str:
    """Return `layer_22`, or `layer_22.mlp_out` for hook points other than resid_pre."""
    return f"layer_{layer}" if hook_point == "resid_pre" else f"layer_{layer}.{hook_point}"


def shard_name(index: int) -> str:
    """Return the file name of a shard."""
    return f"shard_{index:05d}.safetensors"


def part_name(index: int) -> str:
    """Return the file name of the sentences of a shard."""
    return f"part-{index:05d}.parquet"


def write_shard(path: Path, shard: Shard) -> None:
    """Write a shard atomically."""
    tensors = {name: getattr(shard, name).contiguous() for name in Shard.__dataclass_fields__}
    with atomic_path(path) as temporary:
        save_file(tensors, temporary)


def read_shard(path: Path) -> Shard:
    """Memory-map a shard. Raises UserError when it is missing, cut short or foreign."""
    return Shard(**read_tensors(path, tuple(Shard.__dataclass_fields__)))


def read_tensors(path: Path, names: tuple[str, ...]) -> dict[str, Tensor]:
    """Memory-map the named tensors of a safetensors file. Raises UserError when it cannot."""
    if not path.exists():
        raise UserError(f"{path} is missing")
    try:
        with safe_open(path, framework="pt") as file:
            missing = set(names) - set(file.keys())
            if missing:
                raise UserError(f"{path} is not such a file: it has no tensor {sorted(missing)[0]}")
            return {name: file.get_tensor(name) for name in names}
    except SafetensorError as error:
        raise UserError(f"{path} is damaged: {error}") from None


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
        """Identity of the data: equal for equal bytes."""
        return self.manifest.fingerprint

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

    def read_shard(self, index: int) -> Shard:
        """Memory-map a shard, verifying it the first time. Raises UserError if damaged."""
        path = self.shard_path(index)
        if index not in self._verified:
            verify_file(path, self.manifest.files[f"{self.layer_dir}/{path.name}"])
            self._verified.add(index)
        return read_shard(path)

    def token_texts(self) -> list[str]:
        """Display text of every token id."""
        return pq.read_table(self.root / VOCABULARY, columns=["text"]).column(0).to_pylist()


def open_stores(
    data_dir: Path, *, layer: int | None = None, hook_point: str | None = None
) -> list[ActivationStore]:
    """Open the layer directories of a finished store that match the filter, all without one."""
    manifest = read_manifest(data_dir, STAGE)
    stores = [ActivationStore(data_dir, name, manifest) for name in manifest.facts["layers"]]
    return [
        store
        for store in stores
        if layer in (None, store.facts["layer"]) and hook_point in (None, store.facts["hook_point"])
    ]


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
    group.add_argument("--layer", type=int, help="0-based layer [the one that was captured]")
    group.add_argument("--hook_point", help="hook point [the one that was captured]")


def describe(data_dir: Path) -> list[str]:
    """Return lines that say what a finished store holds, verifying every file's checksum."""
    manifest = read_manifest(data_dir, STAGE)
    counts: Mapping[str, Any] = manifest.counts
    lines = [f"{data_dir}: {counts['n_sentences']:,} sentences, {counts['n_tokens']:,} tokens"]
    for name, facts in manifest.facts["layers"].items():
        size = sum(v["bytes"] for k, v in manifest.files.items() if k.startswith(f"{name}/"))
        lines.append(
            f"  {name}: layer {facts['layer']} {facts['hook_point']}, {counts['n_shards']} shards, "
            f"{size / 1e9:.2f} GB"
        )
    for name, expected in manifest.files.items():
        verify_file(data_dir / name, expected)
    lines.append(f"  all {len(manifest.files)} files have their checksums")
    return lines


def show_sentences(store: ActivationStore, n_sentences: int) -> list[str]:
    """Return lines with the first sentences, each token followed by its activation norm."""
    shard, texts = store.read_shard(0), store.token_texts()
    lines = []
    for i in range(min(n_sentences, len(shard.sentence_ids))):
        rows = slice(int(shard.offsets[i]), int(shard.offsets[i + 1]))
        norms = torch.linalg.vector_norm(shard.activations[rows].float(), dim=1)
        tokens = shard.token_ids[rows].tolist()
        shown = " ".join(
            f"{texts[t].strip() or '_'}[{n:.0f}]"
            for t, n in zip(tokens, norms.tolist(), strict=True)
        )
        lines.append(f"  sentence {int(shard.sentence_ids[i])}: {shown}")
    return lines


def main() -> None:
    """Describe and verify a store."""
    parser = argparse.ArgumentParser(description="Describe and verify an activation store.")
    parser.add_argument("data_dir", type=Path, help="the directory that capture wrote")
    parser.add_argument("--n_sentences", type=int, default=3, help="sentences to show [3]")
    args = parser.parse_args()
    print("\n".join(describe(args.data_dir)))
    for store in open_stores(args.data_dir):
        print(f"{store.layer_dir}, token[norm]:")
        print("\n".join(show_sentences(store, args.n_sentences)))


if __name__ == "__main__":
    run_stage(main)
