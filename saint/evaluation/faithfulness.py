"""What is measured of an SAE with its language model, on sentences that it never saw."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import islice

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from llama_3 import HookPoint, Llama
from llama_3.tokenizer import Tokenizer
from sae import SAEConfig, TopKSparseAutoencoder
from saint.capture.packing import Pack, batches_by_length, pack
from saint.stage.errors import UserError
from saint.stage.program import progress
from saint.store.dataset import Sampler, SentenceDataset, is_held_out


def held_out_sentences(
    dataset: SentenceDataset,
    tokenizer: Tokenizer,
    config: SAEConfig,
    n_sentences: int,
    *,
    seed: int,
    batch_tokens: int,
) -> list[Pack]:
    """Sample sentences that the SAE's rule holds out of training. Raises UserError for none."""

    def candidates() -> Iterator[list[int]]:
        stream = iter(Sampler(dataset, seed))
        while chunk := [text for _, text in islice(stream, 2000)]:
            for tokens in tokenizer.encode_batch(chunk, bos=False):
                cut = tokens[: config.max_token_length]
                rule = {"fraction": config.held_out_fraction, "seed": config.held_out_seed}
                if len(cut) > 1 and is_held_out(cut, **rule):
                    yield cut

    chosen = list(islice(candidates(), n_sentences))
    if not chosen:
        raise UserError("--dataset_dir holds no held-out sentence")
    bos = [tokenizer.bos_id] if config.prepend_bos else []
    lengths = np.array([len(tokens) for tokens in chosen])
    batches = batches_by_length(lengths, batch_tokens, extra=len(bos))
    return [pack([chosen[i] for i in batch], bos=bos) for batch in batches]


def count_tokens(packs: Sequence[Pack]) -> int:
    """Return the sentences' own tokens, BOS not counted."""
    return sum(int(packed.own.sum()) for packed in packs)


@torch.inference_mode()
def reconstruction_metrics(
    model: Llama, sae: TopKSparseAutoencoder, hook: HookPoint, packs: Sequence[Pack]
) -> tuple[dict[str, float], Tensor, Tensor]:
    """Return metrics in the SAE's input space, latents' densities and the mean raw activation."""
    device, config = model.device, sae.config
    sums = torch.zeros(3, dtype=torch.float64, device=device)
    moments = torch.zeros(3, config.d_model, dtype=torch.float64, device=device)
    fired = torch.zeros(config.n_latents, dtype=torch.int64, device=device)
    n = count_tokens(packs)
    with progress(n, unit="tok", description="reconstruct") as bar:
        for packed in packs:
            tokens = packed.tokens.to(device)
            raw = model.capture(tokens, [hook], seq_lens=packed.seq_lens)[hook][packed.own]
            x = sae.normalise(raw)[0]
            active = sae.encode(x)
            error = (sae.decode(active) - x).square().sum(dim=1).double()
            relative = error / x.square().sum(dim=1).clamp_min(1e-12)
            sums += torch.stack([error.sum(), relative.sum(), (active.values > 0).sum().double()])
            wide = x.double()
            moments += torch.stack([wide.sum(0), wide.square().sum(0), raw.double().sum(0)])
            fired += torch.bincount(active.indices[active.values > 0], minlength=config.n_latents)
            bar.update(len(x))
    variance = float((moments[1] - moments[0].square() / n).sum())
    error, relative, n_active = sums.tolist()
    metrics = {
        "fvu": error / max(variance, 1e-12),
        "normalized_mse": relative / n,
        "l0": n_active / n,
    }
    return metrics, (fired / n).cpu(), (moments[2] / n).float()


def dead_share(sae: TopKSparseAutoencoder, density: Tensor) -> tuple[float, str]:
    """Return the share of latents that no captured token activates, and over what it was counted.

    Older checkpoints do not know what they fired on: then over the evaluated tokens.
    """
    if sae.max_activations is None:
        return float((density == 0).float().mean()), "evaluated tokens"
    return float((sae.max_activations <= 0).float().mean()), "captured tokens"


def predicting(packed: Pack) -> Tensor:
    """Return (n_tokens,) bool: the sentences' own tokens that another of theirs follows."""
    last = torch.zeros_like(packed.own)
    last[torch.tensor(packed.seq_lens).cumsum(0) - 1] = True
    return packed.own & ~last


def log_probabilities(
    model: Llama, hook: HookPoint, packed: Pack, replace: Callable[[Tensor], Tensor] | None
) -> Tensor:
    """Return (n_predicting, vocab) log-probabilities, the activation replaced (not BOS's)."""
    own, edits = packed.own.to(model.device), None
    if replace is not None:
        edits = {hook: lambda x, _: torch.where(own.unsqueeze(-1), replace(x), x)}
    logits = model(packed.tokens.to(model.device), edits=edits, seq_lens=packed.seq_lens)
    return logits[predicting(packed).to(model.device)].log_softmax(dim=-1)


@torch.inference_mode()
def cross_entropies(
    model: Llama,
    sae: TopKSparseAutoencoder,
    hook: HookPoint,
    packs: Sequence[Pack],
    mean_activation: Tensor,
) -> dict[str, float]:
    """Return next-token cross-entropies (nats) clean, with the SAE, mean-ablated; and KL.

    Predictions from the sentences' own positions count, those from BOS do not.
    """
    sums, n = torch.zeros(4, dtype=torch.float64), 0
    with progress(count_tokens(packs), unit="tok", description="language model") as bar:
        for packed in packs:
            run = partial(log_probabilities, model, hook, packed)
            clean, with_sae = run(None), run(sae.reconstruct)
            ablated = run(lambda x: mean_activation.to(x.dtype).expand_as(x))
            targets = packed.tokens.roll(-1)[predicting(packed)].to(model.device)
            losses = [F.nll_loss(p, targets, reduction="sum") for p in (clean, with_sae, ablated)]
            kl = F.kl_div(with_sae, clean, log_target=True, reduction="sum")
            sums += torch.stack([*losses, kl]).double().cpu()
            n += len(targets)
            bar.update(int(packed.own.sum()))
    clean, with_sae, ablated, kl = (sums / n).tolist()
    return {
        "ce_clean": clean,
        "ce_sae": with_sae,
        "ce_mean_ablated": ablated,
        "loss_recovered": (ablated - with_sae) / (ablated - clean),
        "kl_divergence": kl,
    }


def density_histogram(density: Tensor) -> dict[str, list[float]]:
    """Return how many latents fire on which share of tokens (log10); density: (n_latents,)."""
    counts, edges = np.histogram(density[density > 0].log10().numpy(), bins=40)
    return {"log10_edges": edges.tolist(), "n_latents": counts.tolist()}
