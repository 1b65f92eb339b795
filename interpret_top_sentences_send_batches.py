"""Ask Claude, through the Message Batches API, what each latent stands for.

Requests are built from the evidence file beside the top sentences (windows with marked tokens,
near misses, promoted tokens), or from the YAML and the dataset where that is all there is. With
--task detect, fuzz or intruder, held-out excerpts test labels that are there already. What was
sent is kept in a ledger beside `response_ids.yaml`: running the same command again sends only what
has no answer yet, and never pays for a request twice.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, fields
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

from saint.evidence.labels import Label
from saint.interpretation.batches import (
    add_batch_flags,
    cancel_batches,
    reconcile,
    settle_open_intents,
)
from saint.interpretation.client import have_key, open_client
from saint.interpretation.ledger import Ledger
from saint.interpretation.prices import add_money_flags, is_free
from saint.interpretation.prompts import (
    LABELLED_TASKS,
    TASKS,
    PromptOptions,
    add_evidence_flags,
)
from saint.interpretation.questions import (
    Completions,
    Question,
    Source,
    choose_latents,
    only_unseen,
    questions,
    shown_sentences,
)
from saint.interpretation.sending import (
    USUAL_STRENGTH,
    Sending,
    config_of,
    effects_path,
    form_of,
    open_evidence_and_labels,
)
from saint.stage.errors import UserError, log
from saint.stage.flags import add_overwrite_flag, non_negative_float, positive_int, whole_number
from saint.stage.manifests import Output
from saint.stage.program import log_arguments, run_stage

if TYPE_CHECKING:
    from saint.steering.effects import Effects

STAGE = "interpret_top_sentences_send_batches"
DEFAULT_MODEL = "claude-haiku-5-5"
# For the task effect: how the completions begin, and how long they are.
_BEGINNINGS = ("The delegates gathered at the", "I went to the store and", "In this paper, we")
_COMPLETION_TOKENS = 30


def build_parser() -> argparse.ArgumentParser:
    """Return the command line of interpret_top_sentences_send_batches.py."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    files = parser.add_argument_group("files")
    files.add_argument(
        "--top_sentences_dict_filepath",
        type=Path,
        help="top_sentences_{mean,max,last}.yaml: the name chooses the ranking; evidence.parquet "
        "beside it is read instead where it is there (not needed to --cancel)",
    )
    files.add_argument(
        "--response_ids_filepath",
        type=Path,
        required=True,
        help="list of batch ids to write; the ledger lies beside it",
    )
    files.add_argument("--dataset_dir", help="parquet files of the sentences that were captured")
    files.add_argument("--text_column", default="text", help="their text column [text]")
    files.add_argument("--evidence_path", type=Path, help="another place of evidence.parquet")
    files.add_argument(
        "--labels_path", type=Path, help="parsed_responses.yaml, for --task detect and fuzz"
    )
    _add_choice_flags(parser)
    effect = parser.add_argument_group("for --task effect (without a model: tokens only)")
    effect.add_argument("--llama_model_dir", type=Path, help="the language model")
    effect.add_argument("--sae_model_path", type=Path, help="the SAE whose latents are turned up")
    effect.add_argument(
        "--effects_path",
        type=Path,
        help="what latents do to predictions [effects.parquet beside the evidence, where it is]",
    )
    effect.add_argument(
        "--steer_strength",
        type=non_negative_float,
        help="how far, in units of a latent's largest seen activation [its dose of 1 nat by "
        "effects.parquet, else 2]",
    )
    add_money_flags(parser)
    add_batch_flags(parser)
    add_evidence_flags(parser)
    add_overwrite_flag(parser)
    return parser


def _add_choice_flags(parser: argparse.ArgumentParser) -> None:
    what = parser.add_argument_group("what is asked")
    what.add_argument(
        "--task",
        choices=TASKS,
        default="explain",
        help="explain names latents by where they fire, effect by what they do; detect and fuzz "
        "test labels, intruder tests latents [explain]",
    )
    what.add_argument(
        "--model",
        default=DEFAULT_MODEL,
        help=f"any model that the endpoint at ANTHROPIC_BASE_URL serves [{DEFAULT_MODEL}]",
    )
    what.add_argument("--latents", help="only these, such as 5,17,100-199 [all]")
    what.add_argument("--max_latents", type=positive_int, help="only the first so many [all]")
    what.add_argument(
        "--min_sentences",
        type=positive_int,
        default=5,
        help="skip latents that fire in fewer sentences [5]",
    )
    what.add_argument(
        "--n_controls",
        type=whole_number,
        default=50,
        help="latents also tested with another latent's label (intruder: other latents' excerpts), "
        "which tells what chance is [50]",
    )
    what.add_argument(
        "--again",
        metavar="failures",
        help="ask again what was answered unusably or refused as invalid; or the path of a "
        "failures.yaml that parsing wrote",
    )


def main(argv: Sequence[str] | None = None) -> None:
    """Build the requests, quote them, and send what has no answer yet."""
    args = build_parser().parse_args(argv)
    log_arguments(args, build_parser())
    ledger = Ledger(args.response_ids_filepath)
    if args.cancel:
        _cancel(args, ledger)
        return
    source, labels = open_evidence_and_labels(args)
    client = open_client(args.timeout_s) if have_key() or not args.dry_run else None
    options = PromptOptions(**{f.name: getattr(args, f.name) for f in fields(PromptOptions)})
    config = config_of(args, source, options)
    latents = choose_latents(
        source, args.latents, args.min_sentences, labels if args.task in LABELLED_TASKS else None
    )[: args.max_latents]
    log.info("%d latents are asked about", len(latents))
    with ledger.sender_lock():
        fresh = ledger.begins_anew(args.task, config, overwrite=args.overwrite)
        form = form_of(args, ledger, client, fresh=fresh)
        config["form"] = asdict(form)
        ask = _questions(args, ledger, source, labels, latents, options)
        job = Sending(args, ledger, ask, config, form, fresh)
        if args.dry_run or client is None:
            job.dry_run(client, source, latents, options)
            return
        rest = settle_open_intents(
            client,
            ledger,
            assume_lost=args.assume_lost,
            settle_s=args.settle_s,
            free=is_free(args.model, args.batch_price),
        )
        job.send_all(client)
    for item in rest:
        log.warning("%s", item)
    _finish(args, ledger, config, source)


def _questions(
    args: argparse.Namespace,
    ledger: Ledger,
    source: Source,
    labels: dict[int, Label],
    latents: list[int],
    options: PromptOptions,
) -> Callable[[], Iterable[Question]]:
    """Return what makes the questions, whenever they are needed."""
    effects = completions = None
    if args.task == "effect":
        effects = _effects(args, source)
        completions = _steered_completions(args, effects, max(source.n_sentences()) + 1)

    def ask() -> Iterable[Question]:
        asked = questions(
            args.task,
            source,
            latents,
            options,
            labels=labels,
            n_controls=args.n_controls,
            completions=completions,
            effects=effects.rows if effects else None,
        )
        if args.task not in LABELLED_TASKS:
            return asked
        return only_unseen(asked, shown_sentences(ledger, latents))

    return ask


def _effects(args: argparse.Namespace, source: Source) -> Effects | None:
    path = effects_path(args, source)
    if path is None or source.evidence is None:
        return None
    from saint.steering.effects import load_effects

    return load_effects(path, n_latents=source.evidence.n_latents)


def _steered_completions(
    args: argparse.Namespace, effects: Effects | None, n_latents: int
) -> Completions | None:
    """What makes (prompt, plain, steered) texts of a latent, each once; None without a model."""
    given = (args.llama_model_dir, args.sae_model_path)
    if given == (None, None):
        log.info("without --llama_model_dir and --sae_model_path, only the tokens are shown")
        return None
    if None in given:
        raise UserError("--llama_model_dir and --sae_model_path go together")
    from saint.steering.completions import complete_pairs
    from saint.steering.settings import Request, Setting
    from saint.steering.studio import add_studio_flags, load_studio

    add_studio_flags(parser := argparse.ArgumentParser())
    words = ["--llama_model_dir", str(given[0]), "--sae_model_path", str(given[1])]
    studio, _ = load_studio(parser.parse_args(words))
    if studio.dictionaries[0].sae.config.n_latents != n_latents:
        raise UserError(f"{given[1]} is not the SAE of the evidence's {n_latents} latents")

    def strength(latent: int) -> float:
        row = effects.rows.get(latent) if effects else None
        if args.steer_strength is not None or row is None or effects is None:
            return USUAL_STRENGTH if args.steer_strength is None else args.steer_strength
        # Where no dose that was tried costs a nat, the largest of them.
        dose = row["dose_1nat"] or max(effects.meta["doses"])
        return dose / float(studio.dictionaries[0].units[latent])

    @lru_cache(None)
    def make(latent: int) -> list[tuple[str, str, str]]:
        request = Request(
            prompts=_BEGINNINGS,
            settings=(Setting(latent, "add", strength(latent)),),
            max_new_tokens=_COMPLETION_TOKENS,
            temperature=0.0,
        )
        pairs = complete_pairs(studio, request)
        return [(pair.prompt, pair.plain.text, pair.steered.text) for pair in pairs]

    return make


def _cancel(args: argparse.Namespace, ledger: Ledger) -> None:
    if not ledger.path.exists():
        raise UserError(f"{ledger.path} does not exist: there is nothing to cancel")
    with ledger.sender_lock():
        client = open_client(args.timeout_s)
        for item in reconcile(client, ledger):
            log.warning("warning: not cancelled: %s", item)
        n = cancel_batches(client, ledger)
    log.info("%d batches are being cancelled; retrieve them to keep what was answered", n)


def _finish(args: argparse.Namespace, ledger: Ledger, config: dict, source: Source) -> None:
    ids = ledger.write_response_ids()
    state = ledger.state()
    output = Output(
        args.response_ids_filepath,
        STAGE,
        {"task": args.task, **config},
        {"source": source.fingerprint},
        single_file=True,
    )
    counts = {"batches": len(ids), "requests": len(state.status)}
    output.finish(facts={}, counts=counts, files=[args.response_ids_filepath.name])
    if args.live and not ids:
        told, verb = f"answers are in {ledger.path}", "parse_responses"
    else:
        told, verb = f"{len(ids)} batches in {args.response_ids_filepath}", "retrieve_batches"
    log.info("%s; next: interpret_top_sentences_%s.py", told, verb)


if __name__ == "__main__":
    run_stage(main)
