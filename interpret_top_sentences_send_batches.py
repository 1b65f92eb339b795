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
from typing import Any

import anthropic
import yaml

from saint.evidence.labels import Label, load_labels
from saint.interpretation.batches import (
    Limits,
    Tally,
    ask_live,
    cancel_batches,
    create_batches,
    estimate,
    prepare_batches,
    say_what_is_out,
)
from saint.interpretation.client import have_key, open_client
from saint.interpretation.ledger import Ledger, State, parse_custom_id
from saint.interpretation.prices import Quote, batch_price, check_budget
from saint.interpretation.prompts import (
    EXPECTED_OUTPUT_TOKENS,
    LABELLED_TASKS,
    PromptOptions,
    prompt_facts,
    request_params,
)
from saint.interpretation.questions import Question, Source, choose_latents, open_source, questions
from saint.interpretation.reconciliation import reconcile, settle_open_intents
from saint.interpretation.responses import parse_answer
from saint.interpretation.send_flags import build_parser
from saint.stage.errors import UserError, log
from saint.stage.files import atomic_path
from saint.stage.manifests import Output
from saint.stage.program import log_arguments, run_stage

STAGE = "interpret_top_sentences_send_batches"
_N_SHOWN = 3


def main(argv: Sequence[str] | None = None) -> None:
    """Build the requests, quote them, and send what has no answer yet."""
    args = build_parser((__doc__ or "").split("\n\n")[0]).parse_args(argv)
    log_arguments(args)
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
            asked = _only_unseen(asked, _shown(ledger, latents))
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


def _shown(ledger: Ledger, latents: list[int]) -> dict[int, set[int]]:
    """Latent -> the sentences from which its label was made, as the ledger's requests say."""
    shown: dict[int, set[int]] = {}
    wanted = set(latents)
    for intent in ledger.state().intents.values():
        if intent.task == "explain" and intent.is_paid_for and not intent.superseded:
            for row in ledger.read_requests(intent.id):
                request = parse_custom_id(row["custom_id"])
                if request and request.latent in wanted:
                    shown.setdefault(request.latent, set()).update(row["key"]["shown"])
    if len(shown) < len(latents):
        log.warning(
            "%d of %d labels were not made by this ledger's requests: whether they have seen "
            "their test excerpts is not known",
            len(latents) - len(shown),
            len(latents),
        )
    return shown


def _only_unseen(asked: Iterable[Question], shown: dict[int, set[int]]) -> Iterator[Question]:
    """Pass questions on; raises UserError where a label would be tested on what it was made of."""
    for question in asked:
        seen = shown.get(question.latent, set()) & set(question.prompt.key["tested"])
        if seen:
            raise UserError(
                f"latent {question.latent} would be tested on sentence {min(seen)}, which its "
                "label was made from: nothing was sent. Make the labels from this evidence file "
                "first (--task explain --overwrite)"
            )
        yield question


def _rows(
    args: argparse.Namespace, asked: Iterable[Question], state: State, *, fresh: bool
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
    args: argparse.Namespace, tally: Tally, client: anthropic.Anthropic | None, n_live: int
) -> Quote:
    return estimate(
        client,
        tally,
        output_tokens_each=EXPECTED_OUTPUT_TOKENS[args.task],
        price=batch_price(args.model, args.batch_price),
        n_live=n_live,
    )


class _Readable(yaml.SafeDumper):
    """YAML with texts of several lines as blocks."""

    def represent_text(self, text: str) -> yaml.ScalarNode:
        """Return the node of a string."""
        style = "|" if "\n" in text else None
        return self.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_Readable.add_representer(str, _Readable.represent_text)


def readable(request: dict[str, Any]) -> str:
    """Return a request, just as it is sent, in YAML."""
    return yaml.dump(request, Dumper=_Readable, sort_keys=False, allow_unicode=True, width=10**6)


def _dry_run(
    args: argparse.Namespace,
    ledger: Ledger,
    rows: Iterator[dict[str, Any]],
    client: anthropic.Anthropic | None,
) -> None:
    path = ledger.path.with_name(ledger.path.name.replace(".ledger.jsonl", ".dry_run.jsonl"))
    tally = Tally()
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
    tally = Tally()
    tested = args.no_smoke_test or (config is None and _was_tested(ledger, args.task))
    first = [] if tested else list(islice(rows, 1))
    for row in first:
        tally.add(row["params"])
    prepared = prepare_batches(ledger, rows, Limits.of(args), tally)
    if not tally.n:
        log.info("every latent of this selection has been sent already")
        return
    quote = _quote(args, tally, client, len(first))
    check_budget(quote, args.max_cost_usd, args.model)
    log.info("%s", quote)
    if config is not None:
        ledger.append("run", task=args.task, config=config)
    for row in first:
        _smoke_test(args, ledger, row, client)
    create_batches(
        client, ledger, prepared, task=args.task, model=args.model, retries=args.create_retries
    )


def _was_tested(ledger: Ledger, task: str) -> bool:
    return any(
        parse_answer(task, response).kind != "failure"
        for custom_id, response in ledger.state().live.items()
        if custom_id.split("-")[0] == task
    )


def _smoke_test(
    args: argparse.Namespace, ledger: Ledger, row: dict[str, Any], client: anthropic.Anthropic
) -> None:
    response = ask_live(client, ledger, row, task=args.task, model=args.model)
    answer = parse_answer(args.task, response)
    if answer.kind == "failure":
        raise UserError(
            f"the live test request was answered, but not usably ({answer.reason}): no batch was "
            "sent. --no_smoke_test sends them nevertheless"
        )
    text = answer.fields.get("common_semantic") or answer.fields or answer.reason
    log.info("live test of %s: %s", row["unit"], text)


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
    )
    counts = {"batches": len(ids), "requests": len(state.status)}
    output.finish(facts={}, counts=counts, files=[args.response_ids_filepath.name])
    log.info("%d batches in %s; next: retrieve them", len(ids), args.response_ids_filepath)


if __name__ == "__main__":
    run_stage(main)
