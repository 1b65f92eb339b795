"""Complete text with a Llama, plainly and with chosen latents of an SAE turned up or down.

    python llama_3_inference_text_completion.py --llama_model_dir M \
        --sae_model_path trained_sae.pt --prompt "Senior diplomats met to discuss" --steer 896=+1.5

Prints both completions, what the setting did to the latents, and what it cost in fluency.
"""

from __future__ import annotations

import argparse
import io
import json
import sys
from collections.abc import Sequence
from contextlib import nullcontext, redirect_stdout
from dataclasses import replace
from pathlib import Path

from llama_3 import CheckpointError, load_args
from saint.page.fragments import dose_html, report_page, wish_name
from saint.stage.errors import UserError, log
from saint.stage.files import atomic_path, read_json, write_json, write_text
from saint.stage.flags import (
    add_model_parallel_flag,
    fraction,
    non_negative_float,
    positive_int,
    seed_number,
)
from saint.stage.program import log_arguments, progress, run_stage
from saint.stage.terminal import show
from saint.stage.workers import Workers, start_workers
from saint.steering.completions import Pair, stream_pairs
from saint.steering.concepts import (
    N_LATENTS,
    USE,
    ConceptFinder,
    add_concept_flags,
    open_finder,
    search_concepts,
    total_move,
)
from saint.steering.dose import DEFAULT_STRENGTHS, DoseReport, dose_request, sweep
from saint.steering.guide import Guide
from saint.steering.search import search_labels, search_text, search_token
from saint.steering.settings import (
    UNLIMITED,
    WHERE,
    Request,
    parse_setting,
    request_from_json,
    split_steer,
)
from saint.steering.studio import EXAMPLE_PROMPTS, Studio, add_studio_flags, load_studio
from saint.steering.terminal import print_attributions, print_concept, print_hits, print_pair
from saint.steering.vector import export_vector, write_control_vector


def build_parser() -> argparse.ArgumentParser:
    """Return the command line's parser."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_studio_flags(parser)
    add_concept_flags(parser)
    add_model_parallel_flag(parser)
    what = parser.add_argument_group("what to write")
    what.add_argument("--prompt", nargs="+", help="one or more prompts [four examples]")
    what.add_argument(
        "--steer",
        nargs="+",
        default=[],
        metavar="WHAT=+8",
        help="concepts and latents, and what to do with them. A concept, saved or found from its "
        "name, in standard deviations of the residual stream: film=+8 adds, film=-8 subtracts, "
        "film=8 sets, film=off takes away. A latent, in units of its largest seen activation: "
        "896=+1.5 adds, 896=1.5 sets, 896=*2 scales, 896=off ablates; 1:896=+1.5 names the second "
        "SAE's",
    )
    what.add_argument("--where", choices=WHERE, default="both", help="tokens to edit [both]")
    what.add_argument(
        "--max_new_tokens", type=positive_int, default=40, help="tokens to write [40]"
    )
    what.add_argument(
        "--temperature", type=non_negative_float, default=0.0, help="0 takes the likeliest [0]"
    )
    what.add_argument("--top_p", type=fraction, default=1.0, help="share of probability kept [1]")
    what.add_argument("--seed", type=seed_number, default=0, help="of the random numbers [0]")
    what.add_argument("--chat", action="store_true", help="prompts are messages to a chat model")
    what.add_argument(
        "--request", type=Path, help="JSON settings copied from the page, instead of these flags"
    )
    _add_other_ways(parser)
    parser.add_argument("--json", action="store_true", help="print one JSON object, nothing else")
    return parser


def _add_other_ways(parser: argparse.ArgumentParser) -> None:
    find = parser.add_argument_group("finding latents (instead of writing)")
    kinds = {"label": "labels", "token": "tokens", "text": "an example text", "concept": "name"}
    for name, search in kinds.items():
        find.add_argument(f"--find_{name}", metavar="QUERY", help=f"search by {search}")
    make = parser.add_argument_group("making a concept (instead of writing)")
    make.add_argument(
        "--concept", metavar="QUERY", help="make a concept of a word, a phrase or a text; save it"
    )
    make.add_argument("--against", default="", metavar="TEXT", help="the text it is to differ from")
    make.add_argument("--concept_name", default="", help="name to save it under [the query]")
    make.add_argument(
        "--concept_latents",
        type=positive_int,
        default=N_LATENTS,
        help="latents it is made of [%(default)s]",
    )
    make.add_argument(
        "--concept_use",
        choices=("latents", "means"),
        default=USE,
        help="steer with the latents' sum or with the difference of means itself [%(default)s]",
    )
    why = parser.add_argument_group("which latents caused a token (instead of writing)")
    why.add_argument(
        "--attribute",
        nargs="?",
        const="",
        metavar="TOKEN",
        help="latents by gradient × activation for this next token of each prompt [the likeliest]",
    )
    why.add_argument("--ablate", action="store_true", help="check the top ten by ablating them")
    tune = parser.add_argument_group("tuning and taking away (instead of writing)")
    tune.add_argument(
        "--dose_report",
        type=Path,
        help="write an HTML page (or .json) here that sweeps the strength of each latent of "
        "--steer, and proposes the strongest dose before fluency breaks",
    )
    tune.add_argument(
        "--export_vector",
        type=Path,
        help="write --steer as a steering vector here (safetensors; .gguf for llama.cpp)",
    )


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line. All ranks of a tensor-parallel model compute, the first one talks."""
    args = build_parser().parse_args(argv)
    load_args(args.llama_model_dir).shard(args.model_parallel_size)  # raises if it does not split
    workers = start_workers(
        args.device, model_parallel_size=args.model_parallel_size, data_parallel=False
    )
    log_arguments(args, build_parser())
    request = _request(args)
    studio, guides = load_studio(args, UNLIMITED, workers)
    finder = open_finder(args, studio, guides)
    _, wishes = split_steer(args.steer)
    if wishes:
        request = replace(request, concepts=tuple(finder.setting(text) for text in wishes))
    with nullcontext() if workers.is_main else redirect_stdout(io.StringIO()):
        if args.concept is not None or args.find_concept is not None:
            _concepts(args, workers, finder)
        elif args.attribute is not None:
            asked = {"token": args.attribute or None, "ablate": args.ablate, "as_json": args.json}
            print_attributions(studio, guides, request, **asked)
        else:
            _run(args, workers, studio, guides, request)


def _run(
    args: argparse.Namespace,
    workers: Workers,
    studio: Studio,
    guides: list[Guide],
    request: Request,
) -> None:
    """Find, tune, export or complete, as the command line says."""
    queries = {
        search_labels: args.find_label, search_token: args.find_token, search_text: args.find_text
    }  # fmt: skip
    for search, query in queries.items():
        if query is not None:
            print_hits(search(studio, guides, query), guides, as_json=args.json)
            return
    if args.export_vector is not None:
        if args.export_vector.suffix == ".gguf":
            write_control_vector(args.export_vector, studio, request.settings, request.concepts)
            log.info("wrote %s", args.export_vector)
            return
        data = export_vector(studio, request.settings, request.concepts)
        if workers.is_main:
            with atomic_path(args.export_vector) as temporary:
                temporary.write_bytes(data)
        log.info("wrote %s; docs/demo.md says how plain transformers uses it", args.export_vector)
        return
    if args.dose_report is not None:
        reports = _sweep_doses(studio, guides, request)
        if workers.is_main:
            if args.dose_report.suffix == ".json":
                write_json(args.dose_report, [report.to_json() for report in reports])
            else:
                body = "".join(dose_html(report, guides) for report in reports)
                page = report_page("How far each latent can be turned up", body)
                write_text(args.dose_report, page)
        return
    if not request.settings and not request.concepts:
        log.info("no --steer: both texts are the plain model's; --find_label WORD finds latents")
    pairs = _complete(studio, request, quiet=args.json or not workers.is_main)
    if args.json:
        record = {"request": request.to_json(), "pairs": [pair.to_json() for pair in pairs]}
        print(json.dumps(record, ensure_ascii=False))
        return
    for pair in pairs:
        print_pair(pair, guides)
    for hook, length in total_move(studio, request.concepts).items():
        names = " and ".join(str(setting) for setting in request.concepts)
        show(f"{names}: together {length:.1f} standard deviations at {hook}")


def _concepts(args: argparse.Namespace, workers: Workers, finder: ConceptFinder) -> None:
    """Make and save a concept, or search the saved ones."""
    if args.find_concept is not None:
        found = search_concepts(finder.saved, args.find_concept)
    else:
        found = [
            finder.find(
                args.concept,
                against=args.against,
                name=args.concept_name,
                n_latents=args.concept_latents,
                use=args.concept_use,
            )
        ]
        if workers.is_main:
            finder.save(found[0])
            log.info("saved in %s; --steer %r turns it up", finder.path, f"{found[0].name}=+8")
    if args.json:
        print(json.dumps([{"name": c.name} | c.to_json() for c in found], ensure_ascii=False))
        return
    for concept in found:
        print_concept(concept, finder.guides[concept.sae])
    if not found:
        print("no saved concept holds these words; --concept makes one")


def _request(args: argparse.Namespace) -> Request:
    if args.request is not None:
        if not args.request.is_file():
            raise UserError(f"--request {args.request} does not exist")
        return request_from_json(read_json(args.request))
    return Request(
        prompts=tuple(args.prompt or EXAMPLE_PROMPTS),
        settings=tuple(parse_setting(text) for text in split_steer(args.steer)[0]),
        where=args.where,
        max_new_tokens=args.max_new_tokens,
        temperature=args.temperature,
        top_p=args.top_p,
        seed=args.seed,
        chat=args.chat,
    )


def _complete(studio: Studio, request: Request, *, quiet: bool) -> list[Pair]:
    pairs: list[Pair] = []
    for n_tokens, update in enumerate(stream_pairs(studio, request), 1):
        if not quiet and sys.stderr.isatty():
            print(f"\r{n_tokens} tokens", end="", file=sys.stderr)
        pairs = update.pairs or pairs
    log.info("wrote %d pairs of completions", len(pairs))
    return pairs


def _sweep_doses(studio: Studio, guides: list[Guide], request: Request) -> list[DoseReport]:
    if not request.settings:
        raise UserError("--dose_report needs --steer, to know which latents to sweep")
    studio.check(request)
    reports = []
    bar = progress(len(request.settings) * len(DEFAULT_STRENGTHS), unit="dose", description="sweep")
    varied = dose_request(studio, request)
    for setting in request.settings:
        steps = []
        for step in sweep(studio, setting, varied):
            steps.append(step)
            bar.update()
        report = steps[-1]
        reports.append(report)
        show(f"{wish_name(setting, guides)}: {report.verdict}")
    bar.close()
    return reports


if __name__ == "__main__":
    run_stage(
        main,
        expected=(CheckpointError,),
        after_interrupt="nothing was written",
        when_full="use fewer or shorter prompts, or a lower --max_new_tokens",
    )
