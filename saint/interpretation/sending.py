"""One run of sending: what has no answer yet, what it costs, and on its way once."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from saint.evidence.labels import Label, load_labels
from saint.interpretation.batches import (
    BatchLimits,
    create_batches,
    prepare_batches,
    say_what_is_out,
)
from saint.interpretation.client import PLAIN_FORM, Client, RequestForm, ask_form
from saint.interpretation.ledger import Ledger, parse_custom_id
from saint.interpretation.live import NotTaken, ask_all, smoke_test, was_tested
from saint.interpretation.prices import (
    Quote,
    RequestTally,
    batch_price,
    check_budget,
    estimate,
    price_table,
    request_parts,
)
from saint.interpretation.prompts import (
    EXPECTED_OUTPUT_TOKENS,
    LABELLED_TASKS,
    PromptOptions,
    prompt_facts,
    readable,
    request_params,
)
from saint.interpretation.questions import Question, Source, open_source, sample_of_task
from saint.interpretation.responses import CUT_OFF
from saint.stage.errors import UserError, log
from saint.stage.files import atomic_path
from saint.stage.manifests import file_checksum
from saint.stage.yaml_files import load_yaml

_N_SHOWN = 3
# How far a latent is turned up where its dose of 1 nat is not known, in its largest activations.
USUAL_STRENGTH = 2.0


def open_evidence_and_labels(args: argparse.Namespace) -> tuple[Source, dict[int, Label]]:
    """Open what the command line names; raises UserError where something is missing."""
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


def config_of(args: argparse.Namespace, source: Source, options: PromptOptions) -> dict[str, Any]:
    """What decides a task's answers, as the ledger keeps it."""
    facts = prompt_facts(args.task, options, model=args.model)
    if args.task == "effect":
        path = effects_path(args, source)
        usual = "1 nat" if path else USUAL_STRENGTH
        given = args.steer_strength
        facts |= {"steer_strength": usual if given is None else given}
        facts |= {"sae": str(args.sae_model_path or "")}
        facts |= {"effects": file_checksum(path)["xxh3"]} if path else {}
    ranking = source.ranking if args.task == "explain" else None
    return {**facts, "made_from": source.kind, "ranking": ranking, "source": source.fingerprint}


def effects_path(args: argparse.Namespace, source: Source) -> Path | None:
    """The effects file that is named, or lies beside the evidence."""
    if args.effects_path is not None or source.evidence_path is None:
        return args.effects_path
    beside = source.evidence_path.with_name("effects.parquet")
    return beside if beside.exists() else None


def form_of(
    args: argparse.Namespace, ledger: Ledger, client: Client | None, *, fresh: bool
) -> RequestForm:
    """What a request to the model holds: as the ledger has it, or as the API says."""
    kept = ledger.state().runs.get(args.task, {}).get("form")
    if kept is not None and not fresh:
        return RequestForm(**kept)
    if client is None:
        return RequestForm()
    return ask_form(client, args.model, for_batches=args.live is None)


@dataclass
class Sending:
    """One run of sending a task. ask: makes its questions. config: what the ledger keeps of it."""

    args: argparse.Namespace
    ledger: Ledger
    ask: Callable[[], Iterable[Question]]
    config: dict[str, Any]
    form: RequestForm
    fresh: bool
    noted: bool = False  # whether the ledger has this run

    def rows(self) -> Iterator[dict[str, Any]]:
        """Yield {"unit", "attempt", "params", "key"} of what is to be asked (again)."""
        args, state = self.args, self.ledger.state()
        again = _asked_again(args.again)
        for question in self.ask():
            unit = question.unit
            status = None if self.fresh else state.status.get(unit)
            if status is None and not self.fresh:
                status = state.status.get(question.whole_unit)
                unit = unit if status is None else question.whole_unit
            attempt = state.attempts.get(unit, 0) + 1
            wanted = status is None or (status == "failed" and attempt <= args.max_attempts)
            if again is not None:
                wanted |= status in ("unusable", "invalid") or (
                    status == "answered" and question.unit in again
                )
            if not wanted or (unit != question.unit and status != "failed"):
                continue
            params = request_params(
                question.task, question.prompt, model=args.model, form=self.form
            )
            if status == "unusable" and state.reasons.get(unit) == CUT_OFF:
                params["max_tokens"] *= 2
            yield {"unit": question.unit, "attempt": attempt, "params": params} | {
                "key": question.prompt.key
            }

    def quote(self, tally: RequestTally, client: Client | None, n_live: int) -> Quote:
        """What the requests of a tally would cost."""
        return estimate(
            client,
            tally,
            output_tokens_each=EXPECTED_OUTPUT_TOKENS[self.args.task],
            thinking_tokens_each=self.form.thinking_tokens,
            price=batch_price(self.args.model, self.args.batch_price),
            n_live=n_live,
        )

    def send_all(self, client: Client) -> None:
        """Send everything; asks plainly where the endpoint does not know the usual form."""
        try:
            try:
                self._send(client)
            except NotTaken as error:
                if self.form == PLAIN_FORM:
                    raise
                log.info("%s: asking without a JSON schema and a thinking switch", error)
                self.form = PLAIN_FORM
                self.config["form"] = asdict(PLAIN_FORM)
                self.fresh, self.noted = True, False
                self._send(client)
        except KeyboardInterrupt:
            say_what_is_out(self.ledger)
            raise
        except UserError:
            self.ledger.remove_unsent_requests()
            raise

    def _send(self, client: Client) -> None:
        """Quote what is to be sent, then send one request live, then the rest."""
        args, ledger = self.args, self.ledger
        ledger.remove_unsent_requests()
        about = {"task": args.task, "model": args.model}
        tally, rows = RequestTally(), self.rows()
        tested = args.no_smoke_test or (not self.fresh and was_tested(ledger, args.task))
        first = [] if tested else list(islice(rows, 1))
        for row in first:
            tally.add(row["params"])
        prepared: list[str] = []
        if args.live is None:
            prepared = prepare_batches(ledger, rows, BatchLimits.of(args), tally)
        else:
            for row in rows:
                tally.add(row["params"])
        if not tally.n:
            log.info("every latent of this selection has been sent already")
            return
        quote = self.quote(tally, client, len(first) if args.live is None else tally.n)
        check_budget(quote, args.max_cost_usd, args.model)
        log.info("%s", quote)
        if self.fresh and not self.noted:
            ledger.append("run", task=args.task, config=self.config)
            self.noted = True
        for row in first:
            smoke_test(client, ledger, row, **about)
        if args.live is None:
            create_batches(client, ledger, prepared, settle_s=args.settle_s, **about)
            return
        units = {row["unit"] for row in first}
        rest = (row for row in self.rows() if row["unit"] not in units)
        kinds = ask_all(
            client, ledger, rest, n_at_once=args.live, n_total=tally.n - len(first), **about
        )
        log.info("answered live: %s", ", ".join(f"{n} {k}" for k, n in sorted(kinds.items())))

    def dry_run(
        self, client: Client | None, source: Source, latents: list[int], options: PromptOptions
    ) -> None:
        """Write the requests to a file, show some, and quote them, and every task and model."""
        name = self.ledger.path.name.replace(".ledger.jsonl", ".dry_run.jsonl")
        path = self.ledger.path.with_name(name)
        tally = RequestTally()
        with atomic_path(path) as temporary, temporary.open("w", encoding="utf-8") as file:
            for row in self.rows():
                custom_id = f"{row['unit']}-{row['attempt']}-0"
                request = {"custom_id": custom_id, "params": row["params"]}
                file.write(json.dumps(request, ensure_ascii=False) + "\n")
                if tally.n < _N_SHOWN:
                    print(f"--- {row['unit']}\n{readable(request)}")
                tally.add(row["params"])
        tasks = EXPECTED_OUTPUT_TOKENS if source.evidence else ("explain",)
        table = {
            task: (*sample_of_task(task, source, latents, options, self.form), out)
            for task in tasks
            if (out := EXPECTED_OUTPUT_TOKENS[task])
        }
        print(f"--- of a request: {request_parts(tally.sample)}")
        print(f"--- what {len(latents)} latents would cost\n{price_table(table)}")
        quote = self.quote(tally, client, tally.n if self.args.live else 0)
        log.info("%s; requests are in %s, nothing was sent", quote, path)


def _asked_again(wish: str | None) -> set[str] | None:
    """Units of a failures file, all unusable ones ("failures": an empty set), or None."""
    if wish is None or wish == "failures":
        return None if wish is None else set()
    rows = load_yaml(Path(wish))
    if not isinstance(rows, dict):
        raise UserError(f"--again {wish}: give failures, or a failures.yaml that parsing wrote")
    ids = (parse_custom_id(i) for i, row in rows.items() if row.get("kind") == "failure")
    return {request.unit for request in ids if request}
