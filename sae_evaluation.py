"""Stage 4: how faithful and how sparse the autoencoder is, on sentences it never saw.

    python sae_evaluation.py --model_dir M --sae_model_path trained_sae.pt --dataset_dir D

Reads the held-out rule from the SAE's file, captures those sentences, and runs the language model
three times: untouched, with the SAE's reconstruction in place of the activation, and with the mean
activation in its place. The BOS position and padding are never replaced.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from llama_3 import CheckpointError, HookPoint, Llama, load_args, load_llama, load_tokenizer
from sae import TopKSparseAutoencoder, load_sae, standardise
from saint.capture.packing import Pack, batches_by_length, pack
from saint.stage.devices import pick_dtype
from saint.stage.errors import UserError, log
from saint.stage.files import atomic_path, write_json
from saint.stage.flags import (
    add_bare_sae_flags,
    add_device_flags,
    add_model_parallel_flag,
    add_overwrite_flag,
    bare_sae_flags,
    positive_int,
)
from saint.stage.manifests import Output, State, file_checksum, model_fingerprint
from saint.stage.program import log_arguments, progress, run_stage
from saint.stage.workers import start_workers
from saint.store.dataset import Sampler, SentenceDataset, is_held_out, open_dataset

STAGE = "sae_evaluation"


def build_parser() -> argparse.ArgumentParser:
    """Describe the command line."""
    parser = argparse.ArgumentParser(
        description="Measure an SAE's faithfulness and sparsity on held-out sentences."
    )
    files = parser.add_argument_group("files")
    files.add_argument("--model_dir", type=Path, required=True, help="Llama weights")
    files.add_argument("--sae_model_path", type=Path, required=True, help="the trained SAE")
    files.add_argument("--dataset_dir", required=True, help="the sentences' parquet files")
    files.add_argument("--text_column", default="text", help="column of sentences [%(default)s]")
    files.add_argument(
        "--output_path", type=Path, help="report [sae_evaluation.json beside the SAE; and a .png]"
    )
    what = parser.add_argument_group("sample")
    what.add_argument(
        "--num_samples", type=positive_int, default=500, help="held-out sentences [%(default)s]"
    )
    what.add_argument("--shuffle_seed", type=int, default=42, help="seed [%(default)s]")
    what.add_argument(
        "--batch_tokens", type=positive_int, default=2048, help="of one pass [%(default)s]"
    )
    add_bare_sae_flags(parser)
    add_device_flags(parser, dtype=True)
    add_model_parallel_flag(parser)
    add_overwrite_flag(parser)
    return parser


def held_out_sentences(
    dataset: SentenceDataset, sae: TopKSparseAutoencoder, args: argparse.Namespace
) -> list[Pack]:
    """Sample sentences that the SAE's rule holds out of training. Raises UserError for none."""
    tokenizer, config = load_tokenizer(args.model_dir), sae.config

    def candidates() -> Iterator[list[int]]:
        stream = iter(Sampler(dataset, args.shuffle_seed))
        while chunk := [text for _, text in islice(stream, 2000)]:
            for tokens in tokenizer.encode_batch(chunk, bos=False):
                cut = tokens[: config.max_token_length]
                rule = {"fraction": config.held_out_fraction, "seed": config.held_out_seed}
                if len(cut) > 1 and is_held_out(cut, **rule):
                    yield cut

    chosen = list(islice(candidates(), args.num_samples))
    if not chosen:
        raise UserError(f"--dataset_dir {args.dataset_dir} holds no held-out sentence")
    bos = [tokenizer.bos_id] if config.prepend_bos else []
    lengths = np.array([len(tokens) for tokens in chosen])
    batches = batches_by_length(lengths, args.batch_tokens, extra=len(bos))
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
            x = standardise(raw, config.norm_eps)[0]
            values, indices = sae.encode(x)
            error = (sae.decode(values, indices) - x).square().sum(dim=1).double()
            relative = error / x.square().sum(dim=1).clamp_min(1e-12)
            sums += torch.stack([error.sum(), relative.sum(), (values > 0).sum().double()])
            wide = x.double()
            moments += torch.stack([wide.sum(0), wide.square().sum(0), raw.double().sum(0)])
            fired += torch.bincount(indices[values > 0], minlength=config.n_latents)
            bar.update(len(x))
    variance = float((moments[1] - moments[0].square() / n).sum())
    error, relative, active = sums.tolist()
    metrics = {
        "fvu": error / max(variance, 1e-12),
        "normalized_mse": relative / n,
        "l0": active / n,
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


def write_plots(report: dict[str, Any], density: Tensor, path: Path) -> None:
    """Draw the report as one page: cross-entropies and the histogram of latent densities."""
    from matplotlib.figure import Figure  # no pyplot: no global state, no display

    figure = Figure(figsize=(11, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    names = ("ce_clean", "ce_sae", "ce_mean_ablated")
    bars = left.bar(["clean", "SAE", "mean-ablated"], [report[n] for n in names], width=0.6)
    left.bar_label(bars, fmt="%.3f")
    left.set(
        title=f"cross-entropy, nats per token ({report['loss_recovered']:.1%} recovered)",
        ylabel="nats",
    )
    firing = density[density > 0].log10().numpy()
    right.hist(firing, bins=40)
    right.set(
        title=f"latent density (FVU {report['fvu']:.3f}, L0 {report['l0']:.1f}, "
        f"dead {report['dead_share']:.1%})",
        xlabel="log10 of the share of tokens on which a latent fires",
        ylabel="latents",
    )
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png", dpi=120)


def hook_of(sae: TopKSparseAutoencoder, args: argparse.Namespace) -> HookPoint:
    """Return where the SAE reads. Raises UserError when that is unknown or not in the model."""
    n_layers, layer = load_args(args.model_dir).n_layers, sae.config.layer
    if layer is None:
        raise UserError(f"{args.sae_model_path} does not know its layer: name --sae_layer_idx")
    if not 0 <= layer < n_layers:
        raise UserError(f"the SAE reads layer {layer}, the model has layers 0 to {n_layers - 1}")
    model_dim = load_args(args.model_dir).dim
    if model_dim != sae.config.d_model:
        raise UserError(
            f"the SAE has d_model {sae.config.d_model}, the model in --model_dir has {model_dim}"
        )
    return HookPoint(layer, sae.config.hook_point)


def main(argv: Sequence[str] | None = None) -> None:
    """Evaluate as the command line says."""
    args = build_parser().parse_args(argv)
    load_args(args.model_dir).shard(args.model_parallel_size)  # raises if it does not split
    workers = start_workers(
        args.device, model_parallel_size=args.model_parallel_size, data_parallel=False
    )
    log_arguments(args)
    device = workers.device
    sae = load_sae(args.sae_model_path, device=device, **bare_sae_flags(args))
    hook = hook_of(sae, args)
    dataset = open_dataset(args.dataset_dir, text_column=args.text_column)
    path = args.output_path or args.sae_model_path.with_name("sae_evaluation.json")
    dtype = pick_dtype(args.dtype, device)
    output = Output(
        path=path,
        stage=STAGE,
        arguments={
            "num_samples": args.num_samples,
            "shuffle_seed": args.shuffle_seed,
            "dtype": str(dtype).removeprefix("torch."),
            # What the command line says of a bare checkpoint.
            "k": sae.config.k,
            "layer": hook.layer,
            "hook_point": hook.name,
            "prepend_bos": sae.config.prepend_bos,
        },
        sources={
            "sae": file_checksum(args.sae_model_path)["xxh3"],
            "model": model_fingerprint(args.model_dir),
            "dataset": dataset.fingerprint,
        },
        own_patterns=(path.name, path.with_suffix(".png").name),
        settings={"device": str(device), "batch_tokens": args.batch_tokens},
    )
    state = workers.on_main(lambda: output.begin(overwrite=args.overwrite))
    if state is State.DONE:
        log.info("done already: %s", path)
        return
    try:
        packs = held_out_sentences(dataset, sae, args)
        model, _ = load_llama(
            args.model_dir,
            device=device,
            dtype=dtype,
            model_parallel_size=args.model_parallel_size,
        )
    except (CheckpointError, UserError):
        if state is State.NEW and workers.is_main:
            output.take_back()
        raise
    metrics, density, mean_activation = reconstruction_metrics(model, sae, hook, packs)
    share, basis = dead_share(sae, density)
    report: dict[str, Any] = metrics | {"dead_share": share, "dead_share_counted_over": basis}
    report |= cross_entropies(model, sae, hook, packs, mean_activation)
    report |= {"n_tokens": count_tokens(packs), "layer": hook.layer, "hook_point": hook.name}
    if not workers.is_main:
        return
    write_plots(report, density, path.with_suffix(".png"))
    write_json(path, report)
    names = [path.name, path.with_suffix(".png").name]
    output.finish(facts={}, counts={"n_tokens": count_tokens(packs)}, files=names)
    log.info(
        "%s: FVU %.4f, L0 %.1f, dead %.1f %%, cross-entropy recovered %.4f, over %s tokens",
        path,
        report["fvu"],
        report["l0"],
        100 * share,
        report["loss_recovered"],
        f"{report['n_tokens']:,}",
    )


if __name__ == "__main__":
    run_stage(main, expected=(CheckpointError,))
