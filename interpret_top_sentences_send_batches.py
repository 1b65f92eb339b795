"""Ask Claude, through the Message Batches API, what each latent stands for.

Requests are built from the evidence file beside the top sentences (windows with marked tokens,
near misses, promoted tokens), or from the YAML and the dataset where that is all there is. With
--task detect, fuzz or intruder, held-out excerpts test labels that are there already. What was
sent is kept in a ledger beside `response_ids.yaml`: running the same command again sends only what
has no answer yet, and never pays for a request twice.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import fields
from itertools import islice
from pathlib import Path
from typing import Any

import anthropic

from saint.evidence.labels import Label, load_labels
from saint.interpretation.batches import (
    BatchLimits,
    add_batch_flags,
    cancel_batches,
    create_batches,
    prepare_batches,
    reconcile,
    say_what_is_out,
    settle_open_intents,
)
from saint.interpretation.client import have_key, open_client
from saint.interpretation.ledger import Ledger, LedgerState
from saint.interpretation.live import smoke_test, was_tested
from saint.interpretation.prices import Quote, RequestTally, batch_price, check_budget, estimate
from saint.interpretation.prompts import (
    EXPECTED_OUTPUT_TOKENS,
    LABELLED_TASKS,
    TASKS,
    PromptOptions,
    add_evidence_flags,
    prompt_facts,
    readable,
    request_params,
)
from saint.interpretation.questions import (
    Question,
    Source,
    choose_latents,
    only_unseen,
    open_source,
    questions,
    shown_sentences,
)
from saint.stage.errors import UserError, log
from saint.stage.files import atomic_path
from saint.stage.flags import add_overwrite_flag, non_negative_float, positive_int, whole_number
from saint.stage.manifests import Output
from saint.stage.program import log_arguments, run_stage

STAGE = "interpret_top_sentences_send_batches"
DEFAULT_MODEL = "claude-haiku-5-5"
_N_SHOWN = 3


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
    _add_money_flags(parser)
    add_evidence_flags(parser)
    add_overwrite_flag(parser)
    return parser


def _add_choice_flags(parser: argparse.ArgumentParser) -> None:
    what = parser.add_argument_group("what is asked")
    what.add_argument(
        "--task",
        choices=TASKS,
        default="explain",
        help="explain names latents; detect and fuzz test labels, intruder tests latents [explain]",
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
        help="latents also tested with another latent's label, which should score 0.5 (intruder: "
        "with excerpts of other latents: 0.2 if marks or style alone give nothing away) [50]",
    )
    what.add_argument(
        "--plain_requests",
        action="store_true",
        help="send neither a JSON schema nor a thinking switch, for endpoints that know neither",
    )


def _add_money_flags(parser: argparse.ArgumentParser) -> None:
    money = parser.add_argument_group("money and limits")
    money.add_argument(
        "--dry_run",
        action="store_true",
        help="write the requests to <response ids>.dry_run.jsonl, show three, quote the cost, stop",
    )
    money.add_argument(
        "--max_cost_usd", type=non_negative_float, help="send nothing beyond this quote, in $"
    )
    money.add_argument(
        "--batch_price",
        type=non_negative_float,
        nargs=2,
        metavar=("IN", "OUT"),
        help="$ per million tokens",
    )
    money.add_argument(
        "--no_smoke_test", action="store_true", help="do not send one request live first"
    )
    money.add_argument(
        "--assume_lost",
        action="store_true",
        help="send again what was begun and cannot be found at the API",
    )
    money.add_argument(
        "--settle_s",
        type=non_negative_float,
        default=120,
        help="seconds after which a batch that is not listed was never made [120]",
    )
    money.add_argument("--cancel", action="store_true", help="cancel all batches that still run")
    add_batch_flags(parser)


def main(argv: Sequence[str] | None = None) -> None:
    """Build the requests, quote them, and send what has no answer yet."""
    args = build_parser().parse_args(argv)
    log_arguments(args, build_parser())
    ledger = Ledger(args.response_ids_filepath)
    if args.cancel:
        _cancel(args, ledger)
        return
    source, labels = _open(args)
    client = open_client(args.timeout_s) if have_key() or not args.dry_run else None
    options = PromptOptions(**{f.name: getattr(args, f.name) for f in fields(PromptOptions)})
    config = _config(args, source, options)
    latents = choose_latents(
        source, args.latents, args.min_sentences, labels if args.task in LABELLED_TASKS else None
    )[: args.max_latents]
    log.info("%d latents are asked about", len(latents))
    with ledger.sender_lock():
        fresh = ledger.begins_anew(args.task, config, overwrite=args.overwrite)
        if client and not args.dry_run:
            found = reconcile(client, ledger)
            settle_open_intents(ledger, found, assume_lost=args.assume_lost, settle_s=args.settle_s)
        asked = questions(
            args.task, source, latents, options, labels=labels, n_controls=args.n_controls
        )
        if args.task in LABELLED_TASKS:
            asked = only_unseen(asked, shown_sentences(ledger, latents))
        rows = _rows(args, asked, ledger.state(), fresh=fresh)
        if args.dry_run:
            _dry_run(args, ledger, rows, client)
            return
        assert client is not None
        try:
            _send(args, ledger, rows, client, config if fresh else None)
        except KeyboardInterrupt:
            say_what_is_out(ledger)
            raise
        except UserError:
            ledger.remove_unsent_requests()
            raise
    _finish(args, ledger, config, source)


def _open(args: argparse.Namespace) -> tuple[Source, dict[int, Label]]:
    if args.top_sentences_dict_filepath is None:
        raise UserError("--top_sentences_dict_filepath is needed")
    if args.task in LABELLED_TASKS and args.labels_path is None:
        raise UserError(
            f"--task {args.task} tests labels: give --labels_path parsed_responses.yaml"
        )
    labels = load_labels(args.labels_path) if args.task in LABELLED_TASKS else {}
    source = open_source(
        args.top_sentences_dict_filepath,
        args.evidence_path,
        args.dataset_dir,
        text_column=args.text_column,
    )
    if source.kind != "evidence" and args.task != "explain":
        raise UserError(f"--task {args.task} needs the evidence file, which is not there")
    return source, labels


def _config(args: argparse.Namespace, source: Source, options: PromptOptions) -> dict[str, Any]:
    facts = prompt_facts(args.task, options, model=args.model, plain=args.plain_requests)
    ranking = source.ranking if args.task == "explain" else None
    return {**facts, "made_from": source.kind, "ranking": ranking, "source": source.fingerprint}


def _rows(
    args: argparse.Namespace, asked: Iterable[Question], state: LedgerState, *, fresh: bool
) -> Iterator[dict[str, Any]]:
    """Yield {"unit", "attempt", "params", "key"} of what has no answer yet."""
    for question in asked:
        status = None if fresh else state.status.get(question.unit)
        attempt = state.attempts.get(question.unit, 0) + 1
        if status in (None, "failed") and (status is None or attempt <= args.max_attempts):
            params = request_params(
                question.task, question.prompt.text, model=args.model, plain=args.plain_requests
            )
            key = question.prompt.key
            yield {"unit": question.unit, "attempt": attempt, "params": params, "key": key}


def _quote(
    args: argparse.Namespace, tally: RequestTally, client: anthropic.Anthropic | None, n_live: int
) -> Quote:
    return estimate(
        client,
        tally,
        output_tokens_each=EXPECTED_OUTPUT_TOKENS[args.task],
        price=batch_price(args.model, args.batch_price),
        n_live=n_live,
    )


def _dry_run(
    args: argparse.Namespace,
    ledger: Ledger,
    rows: Iterator[dict[str, Any]],
    client: anthropic.Anthropic | None,
) -> None:
    path = ledger.path.with_name(ledger.path.name.replace(".ledger.jsonl", ".dry_run.jsonl"))
    tally = RequestTally()
    with atomic_path(path) as temporary, temporary.open("w", encoding="utf-8") as file:
        for row in rows:
            request = {"custom_id": f"{row['unit']}-{row['attempt']}-0", "params": row["params"]}
            file.write(json.dumps(request, ensure_ascii=False) + "\n")
            if tally.n < _N_SHOWN:
                print(f"--- {row['unit']}\n{readable(request)}")
            tally.add(row["params"])
    log.info("%s; requests are in %s, nothing was sent", _quote(args, tally, client, 0), path)


def _send(
    args: argparse.Namespace,
    ledger: Ledger,
    rows: Iterator[dict[str, Any]],
    client: anthropic.Anthropic,
    config: dict[str, Any] | None,
) -> None:
    """Prepare all batches on disk, quote them, then send them one after another."""
    ledger.remove_unsent_requests()
    tally = RequestTally()
    tested = args.no_smoke_test or (config is None and was_tested(ledger, args.task))
    first = [] if tested else list(islice(rows, 1))
    for row in first:
        tally.add(row["params"])
    prepared = prepare_batches(ledger, rows, BatchLimits.of(args), tally)
    if not tally.n:
        log.info("every latent of this selection has been sent already")
        return
    quote = _quote(args, tally, client, len(first))
    check_budget(quote, args.max_cost_usd, args.model)
    log.info("%s", quote)
    if config is not None:
        ledger.append("run", task=args.task, config=config)
    for row in first:
        smoke_test(client, ledger, row, task=args.task, model=args.model)
    create_batches(
        client, ledger, prepared, task=args.task, model=args.model, retries=args.create_retries
    )


def _cancel(args: argparse.Namespace, ledger: Ledger) -> None:
    if not ledger.path.exists():
        raise UserError(f"{ledger.path} does not exist: there is nothing to cancel")
    with ledger.sender_lock():
        client = open_client(args.timeout_s)
        for item in reconcile(client, ledger):
            log.warning("warning: not cancelled: %s", item)
        n = cancel_batches(client, ledger)
    log.info("%d batches are being cancelled; retrieve them to keep what was answered", n)


def _finish(
    args: argparse.Namespace, ledger: Ledger, config: dict[str, Any], source: Source
) -> None:
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
    log.info(
        "%d batches in %s; next: interpret_top_sentences_retrieve_batches.py",
        len(ids),
        args.response_ids_filepath,
    )


if __name__ == "__main__":
    run_stage(main)
