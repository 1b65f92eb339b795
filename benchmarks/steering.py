"""Steering judged on what the model writes: how often the concept shows, at equal loss.

    python -m benchmarks.steering --llama_model_dir runs/quickstart/model \
        --sae_model_path runs/quickstart/trained_sae.pt \
        --store_dir runs/quickstart/activation_outputs --output_dir runs/steering_benchmark

48 concepts (word families of `benchmarks/data/concept_families.json`) × 16 neutral prompts in
several styles × 30 tokens, sampled at temperature 0.8. Every method is turned up over a grid of
doses (standard deviations of the residual stream along a unit direction, at every position but
BOS). Measures, per method and dose: the share of texts with a word of the concept's family; a
topic score without those words (mean log ratio per word); the loss, nats per token that the
generated text is more surprising to the plain model than its own texts after the same prompts;
KL(steered, plain) along the steered texts; distinct pairs of tokens. Figures at 0.25, 0.5 and 1
nat are interpolated between doses; intervals are 95 % by bootstrap over concepts.

Every cell (method, dose, seed) is a file in the output directory: a run that was killed goes on
with the next. The main methods get all prompts and seeds, the others every second prompt and one
seed. `--report` only makes the table, the plot and the last line (JSON) of what is there.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.steering_methods import Bench, Cell, write_cell
from benchmarks.steering_report import report
from llama_3 import CheckpointError
from saint.evidence.token_index import NAME, open_tokens
from saint.stage.errors import UserError, log
from saint.stage.files import write_json
from saint.stage.manifests import file_checksum
from saint.stage.program import progress, run_stage
from saint.steering.studio import add_studio_flags, load_studio

PROMPTS = (
    "The delegates gathered at the",
    "The weather this week will be",
    "When I was a child, my family",
    "The company said on Monday that",
    "Researchers have found a way to",
    "Once upon a time there was a",
    "I think the best thing about it is",
    "In this chapter we will look at",
    "She opened the door and saw",
    "He told me yesterday that",
    "The most important thing to remember is",
    "It was a quiet afternoon, and",
    "Many people believe that",
    "The history of the town begins with",
    "My friend wrote me a letter about",
    "There are three reasons why",
)
ABOUT = "This text is about {0}, {0} and nothing but {0}. "
# Doses in standard deviations; None is a method without one. Seeds: how many.


PLAN: tuple[tuple[str, tuple[float, ...], bool], ...] = (
    # method, doses, whether it is a main one
    ("plain", (0.0,), True),
    ("latents_16", (8.0, 13.0, 10.0), True),
    ("means", (8.0, 12.0, 10.0), True),
    ("prompt_write", (0.0,), False),
    ("prompt_nothing_but", (0.0,), False),
    ("random_direction", (8.0, 13.0), False),
    ("before", (8.0, 13.0), False),
    ("before_same", (8.0, 13.0), False),
    ("latents_4", (8.0, 11.0), False),
    ("latents_64", (8.0, 11.0), False),
    ("latents_1", (8.0, 13.0), False),
    ("random_latent", (8.0, 13.0), False),
    ("logit_bias", (2.0, 4.0), False),
    ("first_version", (0.0, 20.0, 40.0), False),
    ("means_generated", (8.0, 10.0), False),
    ("means_clamp", (8.0, 12.0), False),
    ("trained", (6.0, 8.0), False),
    ("down_plain", (0.0,), False),
    ("down_project", (0.0,), False),
    ("down_ablate_16", (0.0,), False),
    ("down_subtract", (4.0, 8.0), False),
    ("down_set", (-4.0,), False),
)


def build_parser() -> argparse.ArgumentParser:
    """Return the command line's parser."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_studio_flags(parser)
    parser.add_argument("--store_dir", type=Path, required=True, help="captured store")
    parser.add_argument("--output_dir", type=Path, required=True, help="raw results, plot, report")
    parser.add_argument("--quick", action="store_true", help="12 concepts, 8 prompts, few methods")
    parser.add_argument("--n_concepts", type=int, default=48, help="concepts [48]")
    parser.add_argument("--n_prompts", type=int, default=16, help="prompts [16]")
    parser.add_argument("--n_tokens", type=int, default=30, help="tokens per text [30]")
    parser.add_argument("--n_seeds", type=int, default=3, help="seeds of the main methods [3]")
    parser.add_argument("--first_seed", type=int, default=0, help="[0]")
    parser.add_argument("--batch", type=int, default=256, help="texts written at once [256]")
    parser.add_argument(
        "--methods", nargs="+", help="NAME or NAME@DOSE,DOSE of the plan's methods [all]"
    )
    parser.add_argument(
        "--down",
        action="store_true",
        help="turning down only: prompts that ask for the concept, every way of taking it away",
    )
    parser.add_argument("--report", action="store_true", help="report what is there, write nothing")
    return parser


def cells_of(args: argparse.Namespace) -> list[Cell]:
    """The cells to write, in an order in which a run cut short is worth most."""
    plan = [row for row in PLAN if not args.quick or row[0] in QUICK]
    if args.down:
        plan = [row for row in PLAN if row[0] == "plain" or row[0].startswith("down_")]
    if args.methods:
        known = {name: (doses, main) for name, doses, main in PLAN}
        plan = []
        for text in args.methods:
            name, _, doses = text.partition("@")
            if name not in known:
                raise UserError(f"method {name!r}: there are {', '.join(known)}")
            own = tuple(float(dose) for dose in doses.split(",")) if doses else known[name][0]
            plan.append((name, own, known[name][1]))
    seeds = range(args.first_seed, args.first_seed + args.n_seeds)
    return [
        Cell(name, dose, seed, every=1 if main else 2)
        for seed in seeds
        for name, doses, main in plan
        for dose in doses
        if main or seed == args.first_seed
    ]


QUICK = ("plain", "latents_16", "means", "prompt_nothing_but", "random_direction", "down_project")


def identity(args: argparse.Namespace) -> dict[str, Any]:
    """What the cells of one output directory have in common."""
    names = ("n_concepts", "n_prompts", "n_tokens")
    return {name: getattr(args, name) for name in names} | {
        "sae": file_checksum(args.sae_model_path[0])["xxh3"]
    }


def begin(args: argparse.Namespace) -> None:
    """Make the output directory. Raises UserError when it holds cells of another setup."""
    args.output_dir.mkdir(parents=True, exist_ok=True)
    path, mine = args.output_dir / "setup.json", identity(args)
    if path.exists() and json.loads(path.read_text(encoding="utf-8")) != mine:
        raise UserError(f"{args.output_dir} holds cells of another setup: choose another")
    write_json(path, mine)


def load_families(n: int) -> dict[str, dict[str, Any]]:
    """Return the first n concepts' families and topic words."""
    path = Path(__file__).parent / "data" / "concept_families.json"
    rows = json.loads(path.read_text(encoding="utf-8"))
    return dict(list(rows.items())[:n])


def main(argv: Sequence[str] | None = None) -> None:
    """Write the cells that are missing and report all that are there."""
    args = build_parser().parse_args(argv)
    if args.quick:
        args.n_concepts, args.n_prompts, args.n_seeds = 12, 8, 1
    begin(args)
    families = load_families(args.n_concepts)
    if not args.report:
        studio, guides = load_studio(args)
        hook = studio.dictionaries[0].hook
        index = None if guides[0].evidence is None else guides[0].evidence.path.with_name(NAME)
        stored = open_tokens(
            args.store_dir, layer=hook.layer, hook_point=hook.name, index_path=index
        )
        bench = Bench(studio, guides[0], stored, families, PROMPTS[: args.n_prompts], ABOUT, args)
        cells = [cell for cell in cells_of(args) if not cell.path(args.output_dir).exists()]
        started = time.monotonic()
        with progress(len(cells), unit="cell", description="write") as bar:
            for cell in cells:
                log.info("%s, %.0f s gone", cell.name, time.monotonic() - started)
                write_json(cell.path(args.output_dir), write_cell(bench, cell))
                bar.update()
    report(args.output_dir, families, args.first_seed)


if __name__ == "__main__":
    run_stage(main, expected=(CheckpointError,))
