"""What is measured of an SAE with its language model, on sentences that it never saw."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from llama_3 import HookPoint, Llama
from llama_3.model import to_device
from llama_3.tokenizer import Tokenizer
from sae import SAEConfig, TopKSparseAutoencoder, denormalise
from saint.capture.packing import Pack, batches_by_length, pack
from saint.kernels.fastest import Encode, fastest_encode, take_fastest_encoder
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


@dataclass(frozen=True)
class Subject:
    """What is evaluated: an SAE where it reads in its language model; and how.

    batch_tokens: of one pass. seed: of every draw.
    """

    model: Llama
    tokenizer: Tokenizer
    sae: TopKSparseAutoencoder
    hook: HookPoint
    batch_tokens: int
    seed: int

    def __post_init__(self) -> None:
        take_fastest_encoder(self.sae)

    def bos(self) -> list[int]:
        """Return what goes before each sentence."""
        return [self.tokenizer.bos_id] if self.sae.config.prepend_bos else []


@dataclass(frozen=True)
class Captured:
    """What one pass up to the hook leaves for the passes above it.

    residuals: per pack (n_tokens, d_model), what enters the hook's layer, on the CPU: these and
    `tokens`, (n_own,) float32 each, are all of it that grows with the sample. density:
    (n_latents,), the share of tokens on which a latent fires. mean: (d_model,) of the raw
    activations at the hook.
    """

    residuals: list[Tensor]
    tokens: dict[str, Tensor]
    density: Tensor
    mean: Tensor
    metrics: dict[str, float]


@torch.inference_mode()
def capture_to_hook(subject: Subject, packs: Sequence[Pack]) -> Captured:
    """Run the layers below the hook once, and say how well the SAE reconstructs what is there."""
    model, sae, hook = subject.model, subject.sae, subject.hook
    below = HookPoint(hook.layer, "resid_pre")
    density = torch.zeros(sae.config.n_latents, dtype=torch.int64, device=model.device)
    raw_sum = torch.zeros(sae.config.d_model, dtype=torch.float64, device=model.device)
    sums = Sums(sae.config.d_model, model.device)
    residuals, columns, encode = [], [], fastest_encode(sae)
    n = count_tokens(packs)
    with progress(n, unit="tok", description="reconstruct") as bar:
        for packed in packs:
            tokens = packed.tokens.to(model.device)
            found = model.capture(tokens, {below, hook}, seq_lens=packed.seq_lens)
            residuals.append(found[below].cpu())
            raw = found[hook][_rows(packed.own, model.device)]
            x, mean, scale = sae.normalise(raw)
            active = encode(x)
            fires, decoded = active.values > 0, sae.decode(active)
            sums.add(x, decoded, raw.float(), denormalise(decoded, mean, scale))
            raw_sum += raw.double().sum(0)
            density += torch.bincount(active.indices[fires], minlength=len(density))
            figures = {
                "norm": torch.linalg.vector_norm(raw.float(), dim=1),
                "relative_error": relative_error(x, decoded),
                "n_active": torch.bincount(active.tokens()[fires], minlength=len(x)),
            }
            columns.append({name: column.float().cpu() for name, column in figures.items()})
            bar.update(len(x))
    table = {name: torch.cat([c[name] for c in columns]) for name in columns[0]}
    metrics = sums.metrics() | {
        "normalized_mse": float(table["relative_error"].double().mean()),
        "l0": float(table["n_active"].double().mean()),
    }
    table |= positions(packs)
    return Captured(residuals, table, (density / n).cpu(), (raw_sum / n).float(), metrics)


def reconstruct(sae: TopKSparseAutoencoder, encode: Encode, x: Tensor) -> Tensor:
    """As `TopKSparseAutoencoder.reconstruct`, by another encoder; x: (..., d_model)."""
    z, mean, scale = sae.normalise(x)
    decoded = sae.decode(encode(z.reshape(-1, z.shape[-1])))
    return denormalise(decoded.reshape(z.shape), mean, scale).to(x.dtype)


def relative_error(x: Tensor, decoded: Tensor) -> Tensor:
    """Return (n_tokens,) squared errors as shares of the tokens' squared norms."""
    return (decoded - x).square().sum(1) / x.square().sum(1).clamp_min(1e-12)


def positions(packs: Sequence[Pack]) -> dict[str, Tensor]:
    """Return for each own token, in the order of the packs, its sentence, position and id."""
    columns: dict[str, list[Tensor]] = {"sentence": [], "position": [], "token_id": []}
    first = 0
    for packed in packs:
        lengths = torch.tensor(packed.seq_lens)
        sentence = torch.arange(len(lengths)).repeat_interleave(lengths)[packed.own]
        counts = torch.bincount(sentence, minlength=len(lengths))
        starts = (counts.cumsum(0) - counts).repeat_interleave(counts)
        columns["sentence"].append(sentence + first)
        columns["position"].append(torch.arange(len(sentence)) - starts)
        columns["token_id"].append(packed.tokens[packed.own])
        first += len(lengths)
    return {name: torch.cat(parts) for name, parts in columns.items()}


class Sums:
    """Sums over tokens, from which the usual measures of reconstruction are made.

    explained_variance and explained_variance_raw are 1 − E‖x − x̂‖² / E‖x − E x‖² (SAELens's
    `explained_variance`; sparsify's 1 − `fvu`) of standardised and of raw activations: those that
    peers without a per-token normalisation give are to be compared with the latter.
    cosine_similarity and l2_ratio = E(‖x̂‖ / ‖x‖) are means over standardised tokens;
    relative_reconstruction_bias = E‖x̂‖² / E(x · x̂) (arXiv:2404.16014, eq. 10) is 1 where nothing
    shrinks.
    """

    def __init__(self, d_model: int, device: torch.device):
        zeros = partial(torch.zeros, dtype=torch.float64, device=device)
        self.n, self.moments, self.scalars = 0, zeros(4, d_model), zeros(6)

    def add(self, x: Tensor, decoded: Tensor, raw: Tensor, raw_decoded: Tensor) -> None:
        """Take (n_tokens, d_model) activations and reconstructions, standardised and raw."""
        self.n += len(x)
        wide, raw_wide = x.double(), raw.double()
        self.moments += torch.stack(
            [wide.sum(0), wide.square().sum(0), raw_wide.sum(0), raw_wide.square().sum(0)]
        )
        own, other = torch.linalg.vector_norm(x, dim=1), torch.linalg.vector_norm(decoded, dim=1)
        product = (x * decoded).sum(dim=1)
        self.scalars += torch.stack(
            [
                (decoded - x).double().square().sum(),
                (raw_decoded - raw).double().square().sum(),
                (product / (own * other).clamp_min(1e-12)).double().sum(),
                (other / own.clamp_min(1e-12)).double().sum(),
                other.double().square().sum(),
                product.double().sum(),
            ]
        )

    def metrics(self) -> dict[str, float]:
        """Return the measures."""
        total, squares, raw_total, raw_squares = self.moments
        variance = float((squares - total.square() / self.n).sum())
        raw_variance = float((raw_squares - raw_total.square() / self.n).sum())
        error, raw_error, cosine, ratio, norm, product = self.scalars.tolist()
        fvu = error / max(variance, 1e-12)
        return {
            "fvu": fvu,
            "explained_variance": 1 - fvu,
            "explained_variance_raw": 1 - raw_error / max(raw_variance, 1e-12),
            "cosine_similarity": cosine / self.n,
            "l2_ratio": ratio / self.n,
            "relative_reconstruction_bias": norm / product if product else math.nan,
        }


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


def _rows(mask: Tensor, device: torch.device) -> Tensor:
    """Return on a device where a mask on the CPU is true: indexing by it does not wait."""
    return to_device(mask.nonzero().squeeze(1), device)


LOSSES = ("clean", "sae", "mean_ablated", "zero_ablated")
_BLOCK_LOGITS = 1 << 25  # of float32: 128 MB


@torch.inference_mode()
def next_token_losses(
    subject: Subject, packs: Sequence[Pack], captured: Captured
) -> dict[str, Tensor]:
    """Return each own token's loss (nats) on predicting the next one, and the KL divergence.

    Clean, with the SAE's reconstruction in place of the activation, with the mean activation, and
    with zeros; BOS and padding are never replaced. (n_own,) each, NaN for a sentence's last token.
    The layers from the hook on run four times; logits are made of predicting tokens alone, in
    blocks, about four of 128 MB at a time.
    """
    model, mean = subject.model, captured.mean.to(subject.model.device)
    edits: tuple[Callable[[Tensor], Tensor] | None, ...] = (
        None,
        partial(reconstruct, subject.sae, fastest_encode(subject.sae)),
        lambda x: mean.to(x.dtype).expand_as(x),
        torch.zeros_like,
    )
    parts: list[Tensor] = []
    with progress(count_tokens(packs), unit="tok", description="language model") as bar:
        for packed, residual in zip(packs, captured.residuals, strict=True):
            own, wanted = packed.own, predicting(packed)
            rows = _rows(wanted, model.device)
            finals = [_final(subject, packed, residual, edit)[rows] for edit in edits]
            targets = packed.tokens.roll(-1)[wanted].to(model.device)
            losses = torch.full((len(LOSSES) + 1, len(own)), math.nan)
            losses[:, wanted] = losses_of_residuals(model, finals, targets).cpu()
            parts.append(losses[:, own])
            bar.update(int(own.sum()))
    names = [*(f"loss_{name}" for name in LOSSES), "kl_divergence"]
    return dict(zip(names, torch.cat(parts, dim=1), strict=True))


def _final(
    subject: Subject,
    packed: Pack,
    residual: Tensor,
    replace: Callable[[Tensor], Tensor] | None,
) -> Tensor:
    """Return what leaves the last layer, (n_tokens, d_model), from the hook's layer on."""
    model, hook = subject.model, subject.hook
    own, edits = packed.own.to(model.device), None
    if replace is not None:
        edits = {hook: lambda x, _: torch.where(own.unsqueeze(-1), replace(x), x)}
    last = HookPoint(len(model.layers) - 1, "resid_post")
    return model.capture(
        packed.tokens.to(model.device),
        [last],
        seq_lens=packed.seq_lens,
        edits=edits,
        start=(hook.layer, residual.to(model.device)),
    )[last]


def losses_of_residuals(model: Llama, finals: Sequence[Tensor], targets: Tensor) -> Tensor:
    """Return (n_runs + 1, n_tokens) float32: every run's losses, and KL(first run ‖ second run).

    finals: what leaves the last layer, (n_tokens, d_model) each. targets: (n_tokens,) token ids.
    """
    losses = torch.empty(len(finals) + 1, len(targets), device=targets.device)
    step = max(1, _BLOCK_LOGITS // model.args.vocab_size)
    for start in range(0, len(targets), step):
        rows = slice(start, start + step)
        clean = model.unembed(finals[0][rows]).log_softmax(dim=-1)
        losses[0, rows] = F.nll_loss(clean, targets[rows], reduction="none")
        for run, final in enumerate(finals[1:], 1):
            changed = model.unembed(final[rows]).log_softmax(dim=-1)
            losses[run, rows] = F.nll_loss(changed, targets[rows], reduction="none")
            if run == 1:
                divergence = F.kl_div(changed, clean, log_target=True, reduction="none")
                losses[-1, rows] = divergence.sum(dim=-1)
    return losses


def cross_entropies(losses: Mapping[str, Tensor]) -> dict[str, float]:
    """Return the means of `next_token_losses`, and the shares of the damage that are recovered.

    loss_recovered compares with mean ablation, loss_recovered_zero with zero ablation (SAEBench's).
    """
    mean = {name: float(loss.double().nanmean()) for name, loss in losses.items()}
    clean, sae, ablated, zero = (mean[f"loss_{name}"] for name in LOSSES)
    return {
        "ce_clean": clean,
        "ce_sae": sae,
        "ce_mean_ablated": ablated,
        "ce_zero_ablated": zero,
        "loss_recovered": (ablated - sae) / (ablated - clean),
        "loss_recovered_zero": (zero - sae) / (zero - clean),
        "kl_divergence": mean["kl_divergence"],
    }


def density_histogram(density: Tensor) -> dict[str, list[float]]:
    """Return how many latents fire on which share of tokens (log10); density: (n_latents,)."""
    counts, edges = np.histogram(density[density > 0].log10().numpy(), bins=40)
    return {"log10_edges": edges.tolist(), "n_latents": counts.tolist()}
