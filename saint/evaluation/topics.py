"""Labelled sentences for sparse probing: drawn evenly from a column's values, and pooled."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import Tensor

from saint.capture.packing import batches_by_length, pack
from saint.evaluation.faithfulness import Subject
from saint.evaluation.probes import sparse_probing
from saint.stage.errors import UserError
from saint.stage.program import progress
from saint.store.dataset import Sampler, SentenceDataset, fetch_sentences

_LEAST_SENTENCES = 20  # of a class
_MOST_READ = 200_000
_CHUNK = 10_000


def labelled_sentences(
    dataset: SentenceDataset, labels: SentenceDataset, *, per_class: int, seed: int
) -> tuple[list[str], Tensor, list[str]]:
    """Draw up to per_class sentences of each value of a column.

    labels: the same files, opened with the column of labels as their text. Returns the sentences,
    their class (n,) as an index into the last: the sorted names of classes with at least 20,
    among the first 200,000 sentences of a seeded order.
    Raises UserError where there are fewer than two such classes.
    """
    chosen: dict[str, list[str]] = {}
    stream = islice(Sampler(dataset, seed), _MOST_READ)
    while chunk := dict(islice(stream, _CHUNK)):  # a file often holds one label alone: no early end
        for i, label in fetch_sentences(labels, chunk).items():
            found = chosen.setdefault(str(label), [])
            if len(found) < per_class:
                found.append(chunk[i])
    names = sorted(name for name, found in chosen.items() if len(found) >= _LEAST_SENTENCES)
    if len(names) < 2:
        counts = Counter({name: len(found) for name, found in chosen.items()})
        raise UserError(
            f"--probe_column {labels.text_column} has fewer than two values with "
            f"{_LEAST_SENTENCES} sentences each: {dict(counts.most_common(5))}"
        )
    sentences = [text for name in names for text in chosen[name]]
    classes = torch.tensor([i for i, name in enumerate(names) for _ in chosen[name]])
    return sentences, classes, names


@torch.inference_mode()
def pooled(subject: Subject, sentences: Sequence[str]) -> tuple[Tensor, Tensor]:
    """Return means over each sentence's tokens (BOS not counted), float32 on the CPU.

    Normalised activations (n_sentences, d_model) and latents (n_sentences, n_latents).
    """
    model, sae, bos = subject.model, subject.sae, subject.bos()
    ids = subject.tokenizer.encode_batch(sentences, bos=False)
    ids = [tokens[: sae.config.max_token_length] for tokens in ids]
    dense = torch.zeros(len(ids), sae.config.d_model)
    latents = torch.zeros(len(ids), sae.config.n_latents)
    lengths = np.array([len(tokens) for tokens in ids])
    with progress(int(lengths.sum()), unit="tok", description="labelled sentences") as bar:
        for batch in batches_by_length(lengths, subject.batch_tokens, extra=len(bos)):
            packed = pack([ids[i] for i in batch], bos=bos)
            tokens = packed.tokens.to(model.device)
            found = model.capture(tokens, [subject.hook], seq_lens=packed.seq_lens)
            x = sae.normalise(found[subject.hook][packed.own])[0]
            active = sae.encode(x)
            counts = torch.from_numpy(lengths[batch])
            sentence = torch.from_numpy(batch).repeat_interleave(counts)
            dense.index_add_(0, sentence, x.cpu())
            place = sentence[active.tokens().cpu()] * sae.config.n_latents + active.indices.cpu()
            latents.view(-1).index_add_(0, place, active.values.cpu())
            bar.update(len(x))
    n = torch.from_numpy(lengths).clamp_min(1)[:, None]
    return dense / n, latents / n


def topic_probing(
    subject: Subject, dataset: SentenceDataset, labels: SentenceDataset, *, per_class: int
) -> dict[str, Any]:
    """Measure how well topics are read from a few latents, see `sparse_probing`.

    Memory: one float32 row of n_latents for each of the sentences.
    """
    sentences, classes, names = labelled_sentences(
        dataset, labels, per_class=per_class, seed=subject.seed
    )
    dense, latents = pooled(subject, sentences)
    return sparse_probing(dense, latents, classes, names, seed=subject.seed)
