"""Stage 6: what every latent does to the model's predictions and texts when it is turned up.

    python latent_effects.py --llama_model_dir M --sae_model_path trained_sae.pt

Each live latent's direction is added to the residual stream after a few neutral prompts. Recorded:
how much its own word rises per root of what the edit changes at all (the causal score), the tokens
that really rise and fall, and the doses at which predictions lose 0.5 and 1 nat. For the latents
that score best, texts are written at the 1-nat dose and read for the word. `effects.parquet` lies
beside the evidence. An interrupted run resumes; blocks of latents are shared among ranks.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path

from llama_3 import CheckpointError, load_llama
from sae import load_sae
from saint.evidence.file import open_evidence
from saint.stage.devices import pick_dtype
from saint.stage.errors import UserError, log
from saint.stage.files import naming_full_disk
from saint.stage.flags import (
    add_bare_sae_flags,
    add_device_flags,
    add_overwrite_flag,
    bare_sae_flags,
    positive_float,
    positive_int,
    said_of_dtype,
    seed_number,
)
from saint.stage.manifests import Output, State, file_checksum, model_fingerprint
from saint.stage.program import log_arguments, progress, run_stage
from saint.stage.terminal import FINAL
from saint.stage.workers import Workers, start_workers
from saint.steering.effects import (
    EFFECTS,
    PROBES,
    Prober,
    block_path,
    blocks_of,
    read_block,
    show_in_texts,
    write_block,
    write_effects,
)
from saint.steering.studio import DEFAULT_EVIDENCE

STAGE = "latent_effects"
WORK_DIR = "latent_effects_work"


def build_parser() -> argparse.ArgumentParser:
    """Describe the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    files = parser.add_argument_group("files")
    files.add_argument("--llama_model_dir", type=Path, required=True, help="the Llama model")
    files.add_argument(
        "--sae_model_path", type=Path, default=Path("trained_sae.pt"), help="the SAE [%(default)s]"
    )
    files.add_argument(
        "--evidence_path",
        type=Path,
        help=f"evidence file; {EFFECTS} is written beside it [{DEFAULT_EVIDENCE} beside the SAE]",
    )
    what = parser.add_argument_group("what is measured")
    what.add_argument(
        "--dose",
        type=positive_float,
        default=8.0,
        help="of the causal score, standard deviations of the residual stream [%(default)s]",
    )
    what.add_argument(
        "--n_tokens_shown",
        type=positive_int,
        default=10,
        help="tokens that rise, and that fall, kept per latent [%(default)s]",
    )
    what.add_argument(
        "--n_written",
        type=positive_int,
        default=64,
        help="best-scoring latents for which texts are written [%(default)s]",
    )
    what.add_argument("--seed", type=seed_number, default=0, help="of the texts [%(default)s]")
    add_bare_sae_flags(parser)
    speed = parser.add_argument_group("speed")
    speed.add_argument(
        "--block_latents",
        type=positive_int,
        default=64,
        help="latents measured at once and saved as one block [%(default)s]",
    )
    add_device_flags(parser, dtype=True)
    add_overwrite_flag(parser)
    return parser


def plan_output(args: argparse.Namespace, dtype: str) -> Output:
    """Say what shapes the bytes."""
    names = ("dose", "n_tokens_shown", "n_written", "seed", "block_latents")
    directory = args.evidence_path.parent
    return Output(
        path=directory,
        stage=STAGE,
        arguments={name: getattr(args, name) for name in names}
        | {"dtype": dtype, "n_probes": len(PROBES)}
        | said_of_dtype(args),
        sources={
            "sae": file_checksum(args.sae_model_path)["xxh3"],
            "evidence": file_checksum(args.evidence_path)["xxh3"],
            "model": model_fingerprint(args.llama_model_dir),
        },
        own_patterns=(EFFECTS, WORK_DIR),
        single_file=False,
    )


def measure(args: argparse.Namespace, prober: Prober, workers: Workers, work_dir: Path) -> int:
    """Measure this rank's blocks that are missing; returns how many latents it measured."""
    blocks = blocks_of(prober.live, args.block_latents)
    own = [i for i in range(len(blocks)) if i % workers.world_size == workers.rank]
    missing = [i for i in own if not block_path(work_dir, i).exists()]
    if len(missing) < len(own):
        log.info(
            "resumed: %d of %d blocks were measured already", len(own) - len(missing), len(own)
        )
    n_latents = sum(len(blocks[i]) for i in missing)
    with progress(n_latents, unit="latent", description=workers.label("effects")) as bar:
        for i in missing:
            write_block(block_path(work_dir, i), prober.measure(blocks[i]))
            bar.update(len(blocks[i]))
    return n_latents


def main(argv: Sequence[str] | None = None) -> None:
    """Measure every live latent's effect as the command line says."""
    args = build_parser().parse_args(argv)
    args.evidence_path = args.evidence_path or args.sae_model_path.parent / DEFAULT_EVIDENCE
    workers = start_workers(args.device)
    log_arguments(args, build_parser())
    if args.dose <= 0:
        raise UserError(f"--dose {args.dose:g} is not above 0")
    started = time.monotonic()
    sae = load_sae(args.sae_model_path, device=workers.device, **bare_sae_flags(args))
    evidence = open_evidence(args.evidence_path)
    if evidence.n_latents != sae.config.n_latents:
        raise UserError(f"{args.evidence_path} describes another SAE than {args.sae_model_path}")
    dtype = pick_dtype(args.dtype, workers.device)
    output = plan_output(args, str(dtype))
    if workers.on_main(lambda: output.begin(overwrite=args.overwrite)) is State.DONE:
        log.info("done already: %s", output.path / EFFECTS)
        return
    model, tokenizer = load_llama(args.llama_model_dir, device=workers.device, dtype=dtype)
    prober = Prober(model, tokenizer, sae, evidence, args.dose, args.n_tokens_shown)
    work_dir = output.path / WORK_DIR
    with naming_full_disk(output.path):
        workers.on_main(lambda: work_dir.mkdir(exist_ok=True))
        n_measured = measure(args, prober, workers, work_dir)
        workers.barrier()
        if workers.is_main:
            seconds = time.monotonic() - started
            finish(args, prober, output, work_dir)
            rate = f", {n_measured / seconds:.0f} latents/s" if n_measured else ""
            path, n_live = output.path / EFFECTS, len(prober.live)
            log.info("%d live latents%s: %s", n_live, rate, path, extra=FINAL)


def finish(args: argparse.Namespace, prober: Prober, output: Output, work_dir: Path) -> None:
    """Write texts for the best latents, then the file and its manifest."""
    n_blocks = len(blocks_of(prober.live, args.block_latents))
    rows = [row for i in range(n_blocks) for row in read_block(block_path(work_dir, i))]
    show_in_texts(prober, rows, work_dir, n_written=args.n_written, seed=args.seed)
    write_effects(output.path / EFFECTS, rows, prober.facts)
    n_shown = sum(1 for row in rows if row["shows"])
    counts = {"n_live_latents": len(rows), "n_written": args.n_written, "n_shown": n_shown}
    output.finish(facts=prober.facts, counts=counts, files=[EFFECTS])
    for path in work_dir.iterdir():
        path.unlink()
    work_dir.rmdir()


if __name__ == "__main__":
    run_stage(main, expected=(CheckpointError,))
