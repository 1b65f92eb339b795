"""Train an SAE with SAELens's own trainer on a store's shuffled rows, saved as SAELens saves it.

    .venv-bench/bin/python -m benchmarks.peers_train --data_dir activation_outputs_batched \
        --rule topk --output_dir runs/lens_topk

`run_tests.sh --peers` makes .venv-bench. TopK standardises tokens (SAELens's layer_norm); JumpReLU
takes raw rows, scaled to a mean norm of √d by the trainer, which folds the factor in at the end.
Then `saint_exchange.py import` takes it through the stages.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from saint.exchange.hooks import lens_name
from saint.store.shuffled_rows import open_batched_rows


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Train an SAE with SAELens.")
    parser.add_argument("--data_dir", type=Path, required=True, help="shuffled rows")
    parser.add_argument("--rule", choices=["topk", "jumprelu"], required=True, help="which SAE")
    parser.add_argument("--output_dir", type=Path, required=True, help="SAELens's directory")
    parser.add_argument("--n_latents", type=int, default=2048, help="latents [%(default)s]")
    parser.add_argument("--k", type=int, default=32, help="active latents [%(default)s]")
    parser.add_argument("--num_epochs", type=int, default=10, help="epochs [%(default)s]")
    parser.add_argument("--batch_size", type=int, default=1024, help="rows [%(default)s]")
    parser.add_argument("--learning_rate", type=float, default=1e-3, help="Adam's [%(default)s]")
    args = parser.parse_args(argv)
    train(args)


def train(args: argparse.Namespace) -> None:
    """Train and save."""
    import sae_lens  # pyright: ignore
    from sae_lens.config import SAETrainerConfig  # pyright: ignore
    from sae_lens.saes.sae import SAEMetadata  # pyright: ignore
    from sae_lens.training.sae_trainer import SAETrainer  # pyright: ignore

    rows = open_batched_rows(args.data_dir)
    facts = rows.facts
    n_steps = args.num_epochs * rows.n_rows("train") // args.batch_size

    def batches() -> Iterator[Tensor]:
        size = {"batch_size": args.batch_size, "first_batch": 0}
        while True:  # SAELens draws some more for its estimate of the norm
            for raw in rows.batches("train", n_batches=n_steps, **size):
                yield raw.float()

    torch.manual_seed(0)
    metadata = SAEMetadata(
        hook_name=lens_name(facts["layer"], facts["hook_point"]),
        prepend_bos=facts["prepend_bos"],
        context_size=facts["max_token_length"] + facts["prepend_bos"],
    )
    size = {"d_in": facts["d_model"], "d_sae": args.n_latents, "metadata": metadata}
    if args.rule == "topk":
        config = sae_lens.TopKTrainingSAEConfig(
            **size, k=args.k, normalize_activations="layer_norm"
        )
        sae = sae_lens.TopKTrainingSAE(config)
    else:
        config = sae_lens.JumpReLUTrainingSAEConfig(
            **size,
            normalize_activations="expected_average_only_in",
            jumprelu_sparsity_loss_mode="quadratic",
            target_l0=args.k,
            jumprelu_ste_to_input=True,
            l0_coefficient=2.0,
            l0_warm_up_steps=n_steps // 2,
        )
        sae = sae_lens.JumpReLUTrainingSAE(config)
    trainer_config = SAETrainerConfig(
        total_training_samples=n_steps * args.batch_size,
        train_batch_size_samples=args.batch_size,
        lr=args.learning_rate,
        lr_end=args.learning_rate / 10,
        lr_decay_steps=n_steps // 2,
        n_batches_for_norm_estimate=20,
    )
    SAETrainer(cfg=trainer_config, sae=sae, data_provider=batches()).fit()
    sae.save_inference_model(str(args.output_dir))


if __name__ == "__main__":
    main()
