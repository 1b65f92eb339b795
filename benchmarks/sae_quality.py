"""Quality at equal tokens: SAINT's recipe, its first version's, `sae-lens` TopK and `eai-sparsify`.

    .venv-bench/bin/python -m benchmarks.sae_quality --run_dir runs/quickstart

The peers are a `bench` extra in an environment of their own, since their pins clash with ours:
`python3 -m venv .venv-bench && .venv-bench/bin/pip install -e '.[bench]'`. Every method gets the
same standardised rows in the same order, the same batch size, number of latents and k, and else
its own default recipe. One evaluator measures all in float32: FVU (centred) on the held-out rows,
and `dead_share`, the latents that none of the captured rows activates. The last line is one JSON
object with medians over the seeds.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from sae import SAEConfig, TopKSparseAutoencoder, standardise
from sae_training import build_parser as build_parser_of_training
from saint.stage.devices import pick_device
from saint.stage.workers import Workers
from saint.store.shuffled_rows import BatchedRows, Split, open_batched_rows
from saint.training.recipe import resolve_recipe
from saint.training.trainer import Trainer

# x (n, d_model) standardised → its reconstruction and (n, n_latents) which latents are active.
Model = Callable[[Tensor], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Task:
    """What every method gets."""

    rows: BatchedRows
    mean: Tensor  # of the standardised rows
    raw_mean: Tensor
    n_latents: int
    k: int
    batch_size: int
    num_epochs: int
    device: torch.device
    run_dir: Path

    @property
    def d_model(self) -> int:
        """Width of a row."""
        return self.rows.facts["d_model"]

    @property
    def n_steps(self) -> int:
        """Steps of the whole run, the same for all."""
        return self.num_epochs * self.rows.n_rows("train") // self.batch_size

    def raw_batches(self) -> Iterator[Tensor]:
        """The training stream, as captured."""
        yield from self.rows.batches(
            "train", batch_size=self.batch_size, first_batch=0, n_batches=self.n_steps
        )

    def batches(self) -> Iterator[Tensor]:
        """The training stream, standardised."""
        for raw in self.raw_batches():
            yield standardise(raw.to(self.device))[0]


def saint(task: Task, seed: int) -> Model:
    """SAINT's stage with its defaults."""
    size = ["--n_latents", task.n_latents, "--k", task.k, "--num_epochs", task.num_epochs]
    flags = ["--data_dir", task.rows.path, "--b_pre_path", "-", "--batch_size", task.batch_size]
    args = build_parser_of_training().parse_args(
        [str(flag) for flag in (*size, *flags, "--seed", seed)]
    )
    workers = Workers(0, 1, task.device)
    recipe = resolve_recipe(args, task.rows, workers)
    sae = TopKSparseAutoencoder(SAEConfig(task.d_model, task.n_latents, task.k), device=task.device)
    sae.initialise(task.mean, seed=seed)
    trainer = Trainer(sae, recipe, task.n_steps, workers, args.kernels)
    for raw in task.raw_batches():
        trainer.train_step(raw, len(raw))

    def model(x: Tensor) -> tuple[Tensor, Tensor]:
        active = sae.encode(x)
        values, indices = active.matrices()
        return sae.decode(active), scatter(values > 0, indices, task.n_latents)

    return model


def scatter(active: Tensor, indices: Tensor, n_latents: int) -> Tensor:
    fired = torch.zeros(len(active), n_latents, dtype=torch.bool, device=active.device)
    return fired.scatter_(1, indices, active)


def first_version(task: Task, seed: int) -> Model:
    """The first version of this toolkit: decoder *rows* normalised, b_pre a mean of raw rows,
    AdamW with a learning rate that falls by epochs, AuxK only from 2,048 dead latents on.
    """
    torch.manual_seed(seed)
    encoder = nn.Linear(task.d_model, task.n_latents).to(task.device)
    decoder = nn.Linear(task.n_latents, task.d_model, bias=False).to(task.device)
    b_pre = nn.Parameter(task.raw_mean.clone())
    nn.init.orthogonal_(decoder.weight)
    with torch.no_grad():
        encoder.weight.copy_(decoder.weight.T)
        encoder.bias.zero_()
        decoder.weight /= decoder.weight.norm(dim=1, keepdim=True)
    parameters = [*encoder.parameters(), *decoder.parameters(), b_pre]
    optimizer = torch.optim.AdamW(parameters, lr=5e-5, betas=(0.85, 0.9999), eps=6.25e-10)
    per_epoch, k_aux = max(1, task.n_steps // task.num_epochs), 2048
    silent = torch.zeros(task.n_latents, device=task.device)

    def decode(pre: Tensor, k: int) -> tuple[Tensor, Tensor]:
        values, indices = pre.topk(k, dim=1)
        hidden = torch.zeros_like(pre).scatter(1, indices, values.relu())
        return decoder(hidden), hidden > 0

    for step, x in enumerate(task.batches()):
        share = (step // per_epoch) / max(1, task.num_epochs - 1)
        rate = 1e-5 + 4e-5 * (1 + math.cos(math.pi * min(1.0, share))) / 2
        optimizer.param_groups[0]["lr"] = rate
        pre = encoder(x - b_pre)
        decoded, active = decode(pre, task.k)
        error = decoded + b_pre - x
        loss = (error.square().mean(1) / x.square().mean(1)).mean()
        dead = silent > per_epoch
        if int(dead.sum()) >= k_aux:
            guess, _ = decode(torch.where(dead, pre, -torch.inf), k_aux)
            residual = -error.detach()
            loss = loss + ((guess - residual).square().mean(1) / residual.var(1)).mean() / 32
        optimizer.zero_grad()
        loss.backward()
        with torch.no_grad():
            gradient, weight = decoder.weight.grad, decoder.weight
            assert gradient is not None
            gradient -= (gradient * weight).sum(1, keepdim=True) * weight
        optimizer.step()
        with torch.no_grad():
            decoder.weight /= decoder.weight.norm(dim=1, keepdim=True)
            silent += 1
            silent[active.any(0)] = 0

    def model(x: Tensor) -> tuple[Tensor, Tensor]:
        decoded, active = decode(encoder(x - b_pre), task.k)
        return decoded + b_pre, active

    return model


def sae_lens(task: Task, seed: int) -> Model:
    """`sae-lens`: its TopK SAE in its own trainer, with the trainer's defaults."""
    from sae_lens import TopKTrainingSAE, TopKTrainingSAEConfig  # pyright: ignore
    from sae_lens.config import SAETrainerConfig  # pyright: ignore
    from sae_lens.training.sae_trainer import SAETrainer  # pyright: ignore

    torch.manual_seed(seed)
    device = str(task.device)
    size = {"d_in": task.d_model, "d_sae": task.n_latents, "k": task.k}
    sae = TopKTrainingSAE(TopKTrainingSAEConfig(**size, device=device))
    config = SAETrainerConfig(
        total_training_samples=task.n_steps * task.batch_size,
        train_batch_size_samples=task.batch_size,
        device=device,
        lr_end=3e-5,  # what its runner sets; the default schedule is constant and does not use it
    )
    SAETrainer(cfg=config, sae=sae, data_provider=task.batches()).fit()

    def model(x: Tensor) -> tuple[Tensor, Tensor]:
        hidden = sae.encode(x)
        return sae.decode(hidden), hidden > 0

    return model


def sparsify(task: Task, seed: int) -> Model:
    """`eai-sparsify`: its sparse coder with its trainer's defaults (schedule-free sign descent)."""
    from schedulefree import ScheduleFreeWrapper  # pyright: ignore
    from sparsify import SparseCoder, SparseCoderConfig  # pyright: ignore
    from sparsify.sign_sgd import SignSGD  # pyright: ignore

    torch.manual_seed(seed)
    config = SparseCoderConfig(num_latents=task.n_latents, k=task.k)
    sae = SparseCoder(task.d_model, config, device=task.device)
    rate = 5e-3 / (task.n_latents / 2**14) ** 0.5
    optimizer = ScheduleFreeWrapper(SignSGD(sae.parameters(), lr=rate), momentum=0.95)
    optimizer.train()
    for step, x in enumerate(task.batches()):
        if step == 0:
            sae.b_dec.data = x.mean(0)
        sae.set_decoder_norm_to_unit_norm()
        sae(x).fvu.backward()
        sae.remove_gradient_parallel_to_decoder_directions()
        optimizer.step()
        optimizer.zero_grad()
    optimizer.eval()

    def model(x: Tensor) -> tuple[Tensor, Tensor]:
        values, indices, _ = sae.encode(x)
        return sae.decode(values, indices), scatter(values > 0, indices, task.n_latents)

    return model


METHODS = {f.__name__: f for f in (saint, first_version, sae_lens, sparsify)}


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--run_dir", type=Path, default=Path("runs/quickstart"))
    parser.add_argument("--n_latents", type=int, default=4096)
    parser.add_argument("--k", type=int, default=32)
    parser.add_argument("--batch_size", type=int, default=1024)
    parser.add_argument("--num_epochs", type=int, default=6)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--device", default="auto")
    return parser


@torch.no_grad()
def evaluate(model: Model, task: Task) -> dict[str, float]:
    """Return the FVU and L0 on held-out rows, and the share of latents that no row activates."""
    fired = torch.zeros(task.n_latents, dtype=torch.bool, device=task.device)
    error, active = 0.0, 0
    total = torch.zeros(task.d_model, dtype=torch.float64, device=task.device)
    squares = torch.zeros_like(total)
    splits: tuple[Split, ...] = ("val", "train")
    for split in splits:
        for start in range(0, task.rows.n_rows(split), 2048):
            stop = min(start + 2048, task.rows.n_rows(split))
            x = standardise(task.rows.read(split, start, stop).to(task.device))[0]
            reconstruction, on = model(x)
            fired |= on.any(0)
            if split == "val":
                error += float((reconstruction - x).double().square().sum())
                active += int(on.sum())
                total += x.double().sum(0)
                squares += x.double().square().sum(0)
    n = task.rows.n_rows("val")
    variance = float((squares - total.square() / n).sum())
    return {
        "fvu": error / variance,
        "l0": active / n,
        "dead_share": 1 - float(fired.float().mean()),
    }


def load_task(args: argparse.Namespace) -> Task:
    """Open the rows; the raw mean is that of at most 65,536 training rows."""
    rows = open_batched_rows(args.run_dir / "activation_outputs_batched")
    device = pick_device(args.device)
    mean = torch.load(args.run_dir / "activation_outputs_mean.pt", weights_only=True)
    raw = rows.read("train", 0, min(65_536, rows.n_rows("train"))).float().mean(0)
    size = (args.n_latents, args.k, args.batch_size, args.num_epochs)
    return Task(rows, mean.to(device), raw.to(device), *size, device, args.run_dir)


def main(argv: Sequence[str] | None = None) -> None:
    args = build_parser().parse_args(argv)
    task = load_task(args)
    results: dict[str, dict[str, list[float]]] = {}
    for seed in args.seeds:
        for name in args.methods:
            started = time.perf_counter()
            with contextlib.redirect_stdout(sys.stderr):
                model = METHODS[name](task, seed)
            seconds = time.perf_counter() - started
            found = evaluate(model, task) | {"train_s": seconds}
            print(name, "seed", seed, {key: round(value, 4) for key, value in found.items()})
            for key, value in found.items():
                results.setdefault(name, {}).setdefault(key, []).append(round(value, 4))
    medians = {
        f"{name}_{key}": statistics.median(values)
        for name, found in results.items()
        for key, values in found.items()
    }
    settings = {"n_latents": args.n_latents, "k": args.k, "batch_size": args.batch_size}
    settings |= {"n_tokens": task.n_steps * task.batch_size, "seeds": args.seeds}
    settings |= {"threads": torch.get_num_threads(), "device": str(task.device)}
    print(json.dumps(settings | medians | {"each": results}))


if __name__ == "__main__":
    main()
