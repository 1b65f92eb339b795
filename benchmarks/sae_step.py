"""Time one training step: the first version's dense formulation against SAINT's.

    python -m benchmarks.sae_step --d_model 3072 --n_latents 65536 --k 64 --batch_size 1024

Both take the same rows, threads and precision (float32 weights), one after the other in turns. Each
repeat is one whole step: losses, gradients, optimiser, unit norms; SAINT's is its trainer's, with
the recipe's defaults. `--compare peers` adds the packages `sae-lens` and `eai-sparsify` where they
are installed (`pip install -e .[bench]`), `--compare objectives` what each costs beside TopK.
The last line is one JSON object.

    python -m benchmarks.sae_step --device cuda --batch_size 8192 --repeats 20

On a GPU SAINT's kernels are the Triton ones unless `--kernels` says otherwise; its peak memory is
taken before any other step is made. The encoder's product alone, in bfloat16, is set against the
step and against what this card reaches with a large square product in the same run.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from sae import SAEConfig, TopKSparseAutoencoder
from saint.stage.devices import pick_device
from saint.stage.workers import Workers
from saint.training.objectives import OBJECTIVES
from saint.training.recipe import Recipe
from saint.training.steps import KERNELS
from saint.training.trainer import Trainer, aux_every


def rows_like_activations(n: int, d_model: int, device: torch.device) -> Tensor:
    """Make standardised rows with a decaying spectrum, so that latents differ in use."""
    generator = torch.Generator().manual_seed(1)
    rank = min(d_model, 256)
    scales = torch.arange(1, rank + 1).float().rsqrt()
    mixed = torch.randn(n, rank, generator=generator) * scales
    x = mixed @ torch.randn(rank, d_model, generator=generator)
    x += 0.3 * torch.randn(n, d_model, generator=generator) * x.std()
    return ((x - x.mean(1, keepdim=True)) / x.std(1, keepdim=True)).to(device)


def dense_step(args: argparse.Namespace, x: Tensor) -> Callable[[], float]:
    """Return the first version's step: dense products, scatter, AdamW, two normalisation passes.

    With AuxK (`--n_dead`), its dead latents' scatter and product are dense too, and on all tokens,
    as the peers'; SAINT's takes one in so many (`aux_every` in the result).
    """
    encoder = nn.Linear(args.d_model, args.n_latents, device=x.device)
    decoder = nn.Linear(args.n_latents, args.d_model, bias=False, device=x.device)
    b_pre = nn.Parameter(x.mean(0))
    with torch.no_grad():
        decoder.weight.copy_(nn.functional.normalize(encoder.weight, dim=1).T)
        encoder.weight.copy_(decoder.weight.T)
    parameters = [*encoder.parameters(), *decoder.parameters(), b_pre]
    optimizer = torch.optim.AdamW(parameters, lr=5e-5, betas=(0.85, 0.9999), eps=6.25e-10)

    def top(pre: Tensor, k: int) -> Tensor:
        values, indices = pre.topk(k, dim=1)
        return decoder(torch.zeros_like(pre).scatter(1, indices, values.relu()))

    def step() -> float:
        optimizer.zero_grad(set_to_none=True)
        pre = encoder(x - b_pre)
        reconstruction = top(pre, args.k) + b_pre
        loss = ((reconstruction - x) ** 2).mean() / (x**2).mean()
        if args.n_dead:
            dead = torch.zeros(args.n_latents, dtype=torch.bool, device=x.device)
            dead[: args.n_dead] = True
            guess = top(torch.where(dead, pre, -torch.inf), min(args.n_dead, args.d_model))
            residual = (x - reconstruction).detach()
            loss = loss + ((guess - residual) ** 2).mean() / residual.var() / 32
        loss.backward()
        with torch.no_grad():
            weight, gradient = decoder.weight, decoder.weight.grad
            assert gradient is not None
            unit = weight / weight.norm(dim=1, keepdim=True)
            gradient -= (gradient * unit).sum(1, keepdim=True) * unit
        optimizer.step()
        with torch.no_grad():
            decoder.weight /= decoder.weight.norm(dim=1, keepdim=True)
        return loss.item()

    return step


def saint_trainer(args: argparse.Namespace, x: Tensor, objective: str) -> Trainer:
    """Return a trainer with the recipe's defaults; `n_dead` of its latents can be dead."""
    config = SAEConfig(
        args.d_model, args.n_latents, args.k, activation=OBJECTIVES[objective].activation
    )
    sae = TopKSparseAutoencoder(config, device=x.device)
    sae.initialise(x.mean(0), seed=0)
    recipe = Recipe(
        n_latents=args.n_latents,
        k=args.k,
        k_start=args.k,
        batch_size=len(x),
        objective=objective,
        learning_rate=5e-5,
        dead_tokens=10**9,
        k_aux=1 << (args.d_model.bit_length() - 1),
    )
    basis = None
    if recipe.basis == "pca":
        basis = torch.linalg.qr(torch.randn(args.d_model, args.d_model, device=x.device))[0]
    return Trainer(sae, recipe, 10**6, Workers(0, 1, x.device), args.kernels, basis)


def saint_step(
    args: argparse.Namespace, x: Tensor, objective: str
) -> tuple[str, Callable[[], float]]:
    """Return the name of the kernels and SAINT's step: all that its trainer does with a batch."""
    trainer = saint_trainer(args, x, objective)

    def step() -> float:
        trainer.tokens_since_fired[: args.n_dead] = trainer.recipe.dead_tokens
        return trainer.train_step(x, len(x))[0].loss.item()

    return trainer.kernels.name, step


def sae_lens_step(args: argparse.Namespace, x: Tensor) -> Callable[[], float]:
    """Return the step of `sae-lens`'s TopK trainer, with its own defaults."""
    from sae_lens import TopKTrainingSAE, TopKTrainingSAEConfig  # pyright: ignore
    from sae_lens.saes.sae import TrainStepInput  # pyright: ignore

    config = TopKTrainingSAEConfig(
        d_in=args.d_model, d_sae=args.n_latents, k=args.k, device=str(x.device)
    )
    sae = TopKTrainingSAE(config)
    optimizer = torch.optim.Adam(sae.parameters(), lr=5e-5, betas=(0.9, 0.999))
    dead = torch.zeros(args.n_latents, dtype=torch.bool, device=x.device)
    dead[: args.n_dead] = True

    def step() -> float:
        output = sae.training_forward_pass(
            TrainStepInput(
                sae_in=x,
                coefficients={},
                dead_neuron_mask=dead,
                n_training_steps=1,
                is_logging_step=False,
            )
        )
        output.loss.backward()
        torch.nn.utils.clip_grad_norm_(sae.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return output.loss.item()

    return step


def sparsify_step(args: argparse.Namespace, x: Tensor) -> Callable[[], float]:
    """Return the step of `eai-sparsify`, as its trainer does it."""
    from sparsify import SparseCoder, SparseCoderConfig  # pyright: ignore

    config = SparseCoderConfig(num_latents=args.n_latents, k=args.k)
    sae = SparseCoder(args.d_model, config, device=x.device)
    optimizer = torch.optim.Adam(sae.parameters(), lr=5e-5)
    dead = torch.zeros(args.n_latents, dtype=torch.bool, device=x.device)
    dead[: args.n_dead] = True

    def step() -> float:
        sae.set_decoder_norm_to_unit_norm()
        output = sae(x, dead_mask=dead if args.n_dead else None)
        loss = output.fvu + output.auxk_loss / 32
        loss.backward()
        sae.remove_gradient_parallel_to_decoder_directions()
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    return step


PEERS = {"sae_lens": sae_lens_step, "sparsify": sparsify_step}


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Time one SAE training step.")
    parser.add_argument("--d_model", type=int, default=3072, help="[%(default)s]")
    parser.add_argument("--n_latents", type=int, default=65536, help="[%(default)s]")
    parser.add_argument("--k", type=int, default=64, help="active latents [%(default)s]")
    parser.add_argument("--batch_size", type=int, default=1024, help="tokens a step [%(default)s]")
    parser.add_argument("--n_dead", type=int, default=0, help="dead latents, AuxK on [%(default)s]")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:N [auto]")
    parser.add_argument(
        "--kernels", choices=KERNELS, help="SAINT's [auto on a CPU, triton on a GPU]"
    )
    parser.add_argument(
        "--compare",
        choices=["objectives", *OBJECTIVES, "peers", *PEERS],
        help="time all objectives or peers too, or one where memory is short (each holds weights "
        "and moments)",
    )
    parser.add_argument(
        "--objective", choices=OBJECTIVES, default=Recipe.objective, help="SAINT's [%(default)s]"
    )
    parser.add_argument("--repeats", type=int, default=5, help="steps timed of each [%(default)s]")
    parser.add_argument("--threads", type=int, help="CPU threads of all [as torch chooses]")
    parser.add_argument("--skip_dense", action="store_true", help="time SAINT's step alone")
    return parser


def time_in_turns(
    steps: dict[str, Callable[[], float]], repeats: int, device: torch.device
) -> dict[str, list[float]]:
    """Run each step once unmeasured, then all in turns; return the seconds of each."""
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for repeat in range(repeats + 1):
        for name, step in steps.items():
            started = time.perf_counter()
            loss = step()  # .item() waits for the device
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            taken = time.perf_counter() - started
            if repeat:
                seconds[name].append(taken)
            print(f"{name:12} {taken:8.3f} s  loss {loss:.4f}{'' if repeat else '  (warm-up)'}")
    return seconds


def product_seconds(x: Tensor, n_latents: int, dtype: torch.dtype) -> float:
    """Return the median seconds of the one dense product alone; x: (n_tokens, d_model)."""
    rows = x.to(dtype)
    weight = torch.randn(n_latents, x.shape[1], device=x.device).to(dtype)
    out = rows.new_empty(len(x), n_latents)

    def product() -> float:
        return float(torch.mm(rows, weight.T, out=out)[0, 0])

    repeats = 20 if x.device.type == "cuda" else 3
    return statistics.median(time_in_turns({"product": product}, repeats, x.device)["product"])


def product_figures(args: argparse.Namespace, x: Tensor, saint_s: float) -> dict[str, float]:
    """Return what the encoder's dense product takes, alone and as a share."""
    flop = 2 * args.batch_size * args.d_model * args.n_latents
    if x.device.type != "cuda":
        product = product_seconds(x, args.n_latents, torch.float32)
        rate = round(flop / product / 1e9, 1)
        return {"product_float32_s": round(product, 4), "product_gflop_per_s": rate}
    product = product_seconds(x, args.n_latents, torch.bfloat16)
    side = 8192
    square = torch.randn(side, side, device=x.device)
    peak = 2 * side**3 / product_seconds(square, side, torch.bfloat16)
    return {
        "product_bfloat16_s": round(product, 5),
        "product_share_of_step": round(product / saint_s, 3),
        "card_bfloat16_tflop_per_s": round(peak / 1e12, 1),
        "product_share_of_card": round(flop / product / peak, 3),
        "step_share_of_card": round(flop / saint_s / peak, 3),
    }


def peak_gigabytes(step: Callable[[], float], device: torch.device) -> dict[str, float]:
    """Take one step and return the GPU memory that it needed at most; nothing on a CPU."""
    if device.type != "cuda":
        return {}
    torch.cuda.reset_peak_memory_stats(device)
    step()
    return {"saint_peak_gb": round(torch.cuda.max_memory_allocated(device) / 1e9, 2)}


def main(argv: Sequence[str] | None = None) -> None:
    args = build_parser().parse_args(argv)
    if args.threads:
        torch.set_num_threads(args.threads)
    device = pick_device(args.device)
    args.kernels = args.kernels or ("triton" if device.type == "cuda" else "auto")
    x = rows_like_activations(args.batch_size, args.d_model, device)
    kernels, saint = saint_step(args, x, args.objective)
    memory = peak_gigabytes(saint, device)
    steps = {"saint": saint}
    if not args.skip_dense:
        steps["dense"] = dense_step(args, x)
    for name, make in PEERS.items():
        if args.compare in ("peers", name):
            steps[name] = make(args, x)
    for name in OBJECTIVES:
        if name != args.objective and args.compare in ("objectives", name):
            steps[name] = saint_step(args, x, name)[1]
    seconds = time_in_turns(steps, args.repeats, device)
    result = {f"{name}_s": round(statistics.median(taken), 5) for name, taken in seconds.items()}
    del steps, saint
    result |= product_figures(args, x, statistics.median(seconds["saint"])) | memory
    if "dense_s" in result:
        result["ratio"] = round(result["dense_s"] / result["saint_s"], 2)
    names = ("d_model", "n_latents", "k", "batch_size", "n_dead", "objective")
    settings = {name: getattr(args, name) for name in names}
    settings["aux_every"] = aux_every(args.n_dead, args.n_latents, args.batch_size)
    settings |= {"device": str(device), "kernels": kernels, "threads": torch.get_num_threads()}
    print(json.dumps(settings | result))


if __name__ == "__main__":
    main()
