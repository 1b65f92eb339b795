"""Stage 5: what every latent fires on: top sentences, example windows, statistics.

    python capture_top_activating_sentences.py --data_dir ./activation_outputs \
        --model_path ./trained_sae.pt --captured_data_output_dir ./top_activating_sentences

One pass of the encoder over the store leaves its sparse activations in a work directory (an
interrupted run continues there) and tallies the rankings; evidence is then made from those.
Shard k belongs to rank k mod world size, and the ranks' tallies merge exactly.
"""

from __future__ import annotations

import argparse
import shutil
import time
from collections.abc import Sequence
from pathlib import Path

from llama_3 import CheckpointError
from sae import SAEConfig, TopKSparseAutoencoder, load_sae
from saint.evidence.builder import Directions, EvidenceBuilder, compare_maxima
from saint.evidence.file import EvidenceWriter
from saint.evidence.rankings import RANKINGS, Tally, write_top_sentences
from saint.evidence.sample import ExampleSettings, SparseActivations
from saint.evidence.sparse_activations import (
    SentenceIndex,
    entries_per_token,
    open_matching_store,
    tally_store,
)
from saint.evidence.token_index import NAME as TOKEN_INDEX
from saint.evidence.token_index import write_token_index
from saint.stage.errors import UserError, log
from saint.stage.files import atomic_path, naming_full_disk, require_space
from saint.stage.flags import (
    add_bare_sae_flags,
    add_device_flags,
    add_overwrite_flag,
    bare_sae_flags,
    positive_int,
    said_of_dtype,
    seed_number,
    whole_number,
)
from saint.stage.manifests import Output, State, file_checksum, model_fingerprint, read_manifest
from saint.stage.program import log_arguments, progress, run_stage
from saint.stage.terminal import FINAL
from saint.stage.workers import Workers, start_workers
from saint.store.activation_store import ActivationStore

STAGE = "capture_top_activating_sentences"
EVIDENCE = "evidence.parquet"
WORK_DIR = "top_sentences_work"
NEXT = "; next: latent_browser.py --html latents.html --evidence_path %s"


def build_parser() -> argparse.ArgumentParser:
    """Describe the command line."""
    parser = argparse.ArgumentParser(
        description="Find what every latent fires on: top sentences, example windows, statistics.",
        epilog="Run it again to resume.",
    )
    files = parser.add_argument_group("files")
    files.add_argument(
        "--data_dir",
        type=Path,
        default=Path("activation_outputs"),
        help="captured store [%(default)s]",
    )
    files.add_argument(
        "--model_path", type=Path, default=Path("trained_sae.pt"), help="the SAE [%(default)s]"
    )
    files.add_argument(
        "--captured_data_output_dir",
        type=Path,
        default=Path("top_activating_sentences"),
        help="where the rankings and the evidence file go [%(default)s]",
    )
    files.add_argument(
        "--model_dir", type=Path, help="Llama weights: adds the tokens that each latent promotes"
    )
    _add_sizes(parser)
    add_bare_sae_flags(parser)
    speed = parser.add_argument_group("speed")
    speed.add_argument(
        "--batch_tokens",
        type=positive_int,
        default=8192,
        help="tokens encoded at once [%(default)s]",
    )
    add_device_flags(parser)
    add_overwrite_flag(parser)
    return parser


def _add_sizes(parser: argparse.ArgumentParser) -> None:
    what = parser.add_argument_group("what to keep")
    what.add_argument(
        "--top_n",
        type=positive_int,
        default=100,
        help="sentences per latent and ranking [%(default)s]",
    )
    what.add_argument(
        "--window_tokens",
        type=positive_int,
        default=16,
        help="tokens shown on each side of the strongest [%(default)s]",
    )
    what.add_argument(
        "--examples_per_decile",
        type=positive_int,
        default=4,
        help="sentences per activation decile, half to explain and half to test [%(default)s]",
    )
    what.add_argument(
        "--n_negatives",
        type=positive_int,
        default=20,
        help="random sentences, and as many near misses, in which a latent is silent [%(default)s]",
    )
    what.add_argument(
        "--pool_sentences",
        type=positive_int,
        default=8192,
        help="sample that negatives and co-activation are taken from, sentences [%(default)s]",
    )
    what.add_argument(
        "--seed", type=seed_number, default=0, help="seed of all samples [%(default)s]"
    )
    what.add_argument("--layer", type=whole_number, help="0-based layer of the store [the SAE's]")


def write_outputs(
    sae: TopKSparseAutoencoder,
    store: ActivationStore,
    sparse: SparseActivations,
    tally: Tally,
    output: Output,
    directions: Directions,
) -> None:
    """Write the rankings, the evidence file and the manifest, and remove the work directory."""
    builder = EvidenceBuilder(sparse, tally, directions, store.n_tokens)
    for name in RANKINGS:
        write_top_sentences(output.path / f"top_sentences_{name}.yaml", *builder.tops[name])
    copied = (
        "layer",
        "hook_point",
        "d_model",
        "prepend_bos",
        "model_fingerprint",
        "dataset_fingerprint",
    )
    facts = {name: store.facts[name] for name in copied} | {
        "sae_fingerprint": output.sources["sae"],
        "n_latents": sae.config.n_latents,
        # Of a rule without such a number, how many fire on a token on average.
        "k": sae.config.k or round(int(tally.n_firing_tokens.sum()) / max(1, store.n_tokens)),
        "n_tokens": store.n_tokens,
        "n_sentences": store.n_sentences,
        "n_duplicate_sentences": int((~sparse.index.canonical).sum()),
        "window": output.arguments["window_tokens"],
        "arguments": output.arguments,
    }
    with (
        atomic_path(output.path / EVIDENCE) as temporary,
        EvidenceWriter(temporary, facts, store.token_texts()) as writer,
        progress(sae.config.n_latents, unit="latent", description="evidence") as bar,
    ):
        for block in builder.blocks():
            writer.write(block)
            bar.update(len(block.latents))
    write_token_index(output.path / TOKEN_INDEX, store)
    n_dead = int((builder.n_firing_tokens == 0).sum())
    counts = {name: facts[name] for name in ("n_latents", "n_tokens", "n_sentences")}
    names = [f"top_sentences_{name}.yaml" for name in RANKINGS] + [EVIDENCE, TOKEN_INDEX]
    output.finish(facts=facts, counts=counts | {"n_silent_latents": n_dead}, files=names)
    shutil.rmtree(output.path / WORK_DIR)


def plan_output(args: argparse.Namespace, sae_config: SAEConfig, store: ActivationStore) -> Output:
    """Say what shapes the bytes."""
    names = (
        "top_n",
        "window_tokens",
        "examples_per_decile",
        "n_negatives",
        "pool_sentences",
        "seed",
        "batch_tokens",
    )
    if args.model_dir is not None:
        given = model_fingerprint(args.model_dir)
        if given != store.facts["model_fingerprint"]:
            raise UserError(f"--model_dir {args.model_dir} is not the model that was captured")
    return Output(
        path=args.captured_data_output_dir,
        stage=STAGE,
        arguments={name: getattr(args, name) for name in names}
        | {"k": sae_config.k, "layer_dir": store.layer_dir}
        | said_of_dtype(args)
        | {"model_dir": None if args.model_dir is None else "given"},
        sources={"sae": file_checksum(args.model_path)["xxh3"], "store": store.fingerprint},
        single_file=False,
        own_names=(
            *(f"top_sentences_{name}.yaml" for name in RANKINGS),
            EVIDENCE,
            TOKEN_INDEX,
            WORK_DIR,
        ),
        settings={"data_dir": str(args.data_dir), "model_path": str(args.model_path)},
    )


def make_work_dir(work_dir: Path, sae: TopKSparseAutoencoder, store: ActivationStore) -> None:
    """Make the work directory. Raises UserError when its disk cannot hold what is still to come."""
    work_dir.mkdir(exist_ok=True)
    n_bytes = 8 * (entries_per_token(sae, store) + 1) * store.n_tokens
    n_bytes += 2 * sae.config.d_model * store.n_sentences
    n_bytes -= sum(path.stat().st_size for path in work_dir.iterdir())
    require_space(work_dir, int(n_bytes), "make room (it is given back at the end)")


def run(
    args: argparse.Namespace,
    sae: TopKSparseAutoencoder,
    store: ActivationStore,
    output: Output,
    workers: Workers,
) -> None:
    """Encode, tally and write, resuming what an interrupted run left."""
    started = time.monotonic()
    work_dir = output.path / WORK_DIR
    workers.on_main(lambda: make_work_dir(work_dir, sae, store))
    index = SentenceIndex.of(store)
    n_sample = max(100, 20 * args.examples_per_decile)
    tally = Tally(sae.config.n_latents, args.top_n, n_sample, args.seed)
    n_encoded = tally_store(sae, store, index, tally, work_dir, args.batch_tokens, workers)
    if not workers.is_main:
        return
    seconds = time.monotonic() - started
    compare_maxima(sae, tally)
    directions = Directions.of(sae, args.model_dir, workers.device, len(store.token_texts()))
    settings = ExampleSettings(
        window_tokens=args.window_tokens,
        per_decile=args.examples_per_decile,
        n_random=args.n_negatives,
        n_near_misses=args.n_negatives,
        pool_sentences=args.pool_sentences,
        seed=args.seed,
    )
    sparse = SparseActivations(store, work_dir, index, settings)
    write_outputs(sae, store, sparse, tally, output, directions)
    speed = "an earlier run encoded all of them"
    if n_encoded:
        speed = f"{n_encoded / max(seconds, 1e-9):.0f} sentences/s encoded and ranked"
    log.info(
        "%s sentences, %s tokens, %d of %d latents fire: %s, evidence in %.0f s more, in %s" + NEXT,
        f"{store.n_sentences:,}",
        f"{store.n_tokens:,}",
        int((tally.n_firing_tokens > 0).sum()),
        sae.config.n_latents,
        speed,
        time.monotonic() - started - seconds,
        output.path,
        output.path / EVIDENCE,
        extra=FINAL,
    )


def main(argv: Sequence[str] | None = None) -> None:
    """Find top sentences and evidence as the command line says."""
    args = build_parser().parse_args(argv)
    workers = start_workers(args.device)
    log_arguments(args, build_parser())
    if args.sae_layer_idx is None:
        args.sae_layer_idx = args.layer
    sae = load_sae(args.model_path, device=workers.device, **bare_sae_flags(args))
    store = open_matching_store(args.data_dir, sae)
    output = plan_output(args, sae.config, store)
    if workers.on_main(lambda: output.begin(overwrite=args.overwrite)) is State.DONE:
        n = read_manifest(output.path, STAGE).counts["n_latents"]
        if workers.is_main:
            shutil.rmtree(output.path / WORK_DIR, ignore_errors=True)
        log.info(
            "done already: %s holds the evidence of %d latents" + NEXT,
            output.path,
            n,
            output.path / EVIDENCE,
        )
        return
    with naming_full_disk(output.path):
        run(args, sae, store, output, workers)


if __name__ == "__main__":
    run_stage(main, expected=(CheckpointError,))
