"""A small activation store and SAE with known sparse activations, made without a language model."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from sae import SAEConfig, TopKSparseAutoencoder, load_sae, save_sae, standardise
from saint.stage.manifests import Output
from saint.store.activation_store import SENTENCES, VOCABULARY, part_name, shard_file, shard_name

D_MODEL, N_VOCAB = 16, 50


@dataclass(frozen=True)
class TinyStore:
    """Where the store and the SAE lie, and every sentence's token ids and dense activations.

    dense: sentence_id -> (n_tokens, n_latents) float32, after TopK and ReLU.
    """

    data_dir: Path
    sae_path: Path
    token_ids: dict[int, list[int]]
    dense: dict[int, np.ndarray]
    n_latents: int


def make_store(
    root: Path,
    *,
    n_sentences: int = 120,
    n_shards: int = 3,
    n_latents: int = 40,
    k: int = 4,
    with_maxima: bool = True,
    seed: int = 0,
) -> TinyStore:
    """Random sentences (some of one token, some repeated word for word); latents 0 to 4 are dead.

    A token's row depends on its id alone, so that exact ties are common. Sentence ids are not in
    the shards' order.
    """
    rng = np.random.default_rng(seed)
    embedding = torch.randn(N_VOCAB, D_MODEL, generator=torch.Generator().manual_seed(seed))
    token_ids = _token_ids(rng, n_sentences)
    data_dir = root / "activations"
    _write_store(data_dir, token_ids, embedding, n_shards)
    sae = TopKSparseAutoencoder(SAEConfig(D_MODEL, n_latents, k, layer=1)).requires_grad_(False)
    sae.initialise(torch.zeros(D_MODEL), seed=seed)
    sae.W_enc.copy_(_exact_encoder(rng, n_latents))
    sae.b_enc[:5] = -100.0
    dense = {i: _dense(sae, embedding[tokens]) for i, tokens in token_ids.items()}
    if with_maxima:
        sae.max_activations = torch.from_numpy(np.concatenate(list(dense.values())).max(axis=0))
    save_sae(root / "sae.pt", sae)
    return TinyStore(data_dir, root / "sae.pt", token_ids, dense, n_latents)


def _exact_encoder(rng: np.random.Generator, n_latents: int) -> torch.Tensor:
    """Distinct rows with two entries of ±1: their products round alike in any order and batch."""
    first, second = np.triu_indices(D_MODEL, 1)
    pair, signs = np.divmod(rng.permutation(4 * len(first))[:n_latents], 4)
    rows = torch.zeros(n_latents, D_MODEL)
    latents = torch.arange(n_latents)
    rows[latents, first[pair]] = torch.from_numpy(1.0 - 2 * (signs % 2)).float()
    rows[latents, second[pair]] = torch.from_numpy(1.0 - 2 * (signs // 2)).float()
    return rows


def _token_ids(rng: np.random.Generator, n_sentences: int) -> dict[int, list[int]]:
    ids = rng.permutation(10 * n_sentences)[:n_sentences].tolist()
    lengths = rng.integers(1, 12, n_sentences)
    lengths[::7], lengths[3] = 1, 60
    sentences = [rng.integers(0, N_VOCAB, n).tolist() for n in lengths]
    for i in range(5, n_sentences, 11):
        sentences[i] = sentences[i // 2]
    return dict(zip(ids, sentences, strict=True))


def _dense(sae: TopKSparseAutoencoder, rows: torch.Tensor) -> np.ndarray:
    pre = (standardise(rows.bfloat16())[0] - sae.b_pre) @ sae.W_enc.T + sae.b_enc
    values, indices = pre.topk(sae.config.k, dim=1)
    return torch.zeros_like(pre).scatter(1, indices, values.relu()).numpy()


def _write_store(
    data_dir: Path, token_ids: dict[int, list[int]], embedding: torch.Tensor, n_shards: int
) -> None:
    facts = {
        "layers": {"layer_1": {"layer": 1, "hook_point": "resid_pre"}},
        "d_model": D_MODEL,
        "prepend_bos": True,
        "model_fingerprint": "a model",
        "dataset_fingerprint": "a dataset",
    }
    output = Output(data_dir, "capture_activations", {}, {}, single_file=False)
    output.begin(overwrite=False)
    names = [VOCABULARY]
    (data_dir / "layer_1").mkdir()
    (data_dir / SENTENCES).mkdir()
    vocabulary = {"token_id": range(N_VOCAB), "text": [f" w{i}" for i in range(N_VOCAB)]}
    pq.write_table(pa.table(vocabulary), data_dir / VOCABULARY)
    for index, part in enumerate(np.array_split(np.array(list(token_ids)), n_shards)):
        tokens = [token_ids[int(i)] for i in part]
        flat = torch.tensor([t for sentence in tokens for t in sentence])
        path = data_dir / "layer_1" / shard_name(index)
        with shard_file(path, tokens, part.tolist(), d_model=D_MODEL) as shard:
            shard.write("activations", 0, embedding[flat].bfloat16())
        texts = ["".join(f" w{t}" for t in sentence) for sentence in tokens]
        table = pa.table({"sentence_id": part, "text": texts, "token_ids": tokens})
        pq.write_table(table, data_dir / SENTENCES / part_name(index))
        names += [f"layer_1/{shard_name(index)}", f"{SENTENCES}/{part_name(index)}"]
    counts = {
        "n_shards": n_shards,
        "n_sentences": len(token_ids),
        "n_tokens": sum(map(len, token_ids.values())),
    }
    output.finish(facts=facts, counts=counts, files=names)


def load(store: TinyStore) -> TopKSparseAutoencoder:
    """Load the SAE."""
    return load_sae(store.sae_path, device="cpu")
