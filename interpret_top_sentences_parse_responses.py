"""Turn retrieved answers into `parsed_responses.yaml`: labels, and the scores that were measured.

The file is made anew of the ledger and the retrieved answers each time. Every response is accounted
for: as a label, a test's answer, a refusal or a failure with its reason (`<output>.failures.yaml`).
Older result files parse too. --from_top_tokens writes labels without Claude, made of the words
under each latent's strongest tokens.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from saint.evidence.file import open_evidence
from saint.evidence.labels import TOP_TOKENS, top_token_labels
from saint.interpretation.ledger import Ledger, LedgerState, read_response_ids
from saint.interpretation.report import build_report, report_page, show_report
from saint.interpretation.responses import AnswerSet, count, read_all
from saint.interpretation.scores import MeasuredLabels, add_effects, add_scores, made_labels
from saint.stage.errors import UserError, log
from saint.stage.files import atomic_path, remove_torn, write_json, write_text
from saint.stage.flags import add_overwrite_flag
from saint.stage.manifests import (
    Output,
    announced,
    file_checksum,
    fingerprint,
    manifest_path,
    read_manifest,
)
from saint.stage.program import log_arguments, run_stage
from saint.stage.terminal import FINAL, page_link
from saint.stage.yaml_files import dump_yaml, load_yaml, write_yaml

STAGE = "interpret_top_sentences_parse_responses"
_Labels = dict[int, dict[str, Any]]


def build_parser() -> argparse.ArgumentParser:
    """Return the command line of this stage."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    files = parser.add_argument_group("files")
    files.add_argument("--response_ids_filepath", type=Path, help="list of batch ids, from send")
    files.add_argument(
        "--retrieved_responses_dir", type=Path, help="where <batch id>.yaml are, from retrieve"
    )
    files.add_argument(
        "--parsed_responses_output_filepath", type=Path, required=True, help="labels to write"
    )
    what = parser.add_argument_group("what is written")
    what.add_argument(
        "--report",
        action="store_true",
        help="print statistics, and write <output>.report.json and .report.html",
    )
    what.add_argument(
        "--from_top_tokens",
        action="store_true",
        help="label every latent by its top tokens, without Claude (needs --evidence_path); the "
        "scores of tests join them where the retrieved answers are named, too",
    )
    what.add_argument("--evidence_path", type=Path, help="evidence.parquet, for --from_top_tokens")
    add_overwrite_flag(parser)
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Make labels and scores of everything that was retrieved, and write them."""
    args = build_parser().parse_args(argv)
    log_arguments(args, build_parser())
    path = args.parsed_responses_output_filepath
    remove_torn(path.parent, f"{path.stem}.")
    _check_not_edited(args)
    if args.from_top_tokens and _has_labels_of_a_model(args):
        return
    ledger, answers = _read(args)
    state = ledger.state() if ledger else LedgerState()
    if args.from_top_tokens:
        labels, evidence = _top_token_labels(args)
    else:
        labels = made_labels(answers)
        runs = [state.runs[t] for t in ("explain", "intruder", "effect") if t in state.runs]
        evidence = next((run.get("source") for run in runs), None)
    add_effects(labels, answers)
    measured = add_scores(labels, answers, state=state, evidence=evidence)
    if measured.left_out:
        whys = "; ".join(f"{n} {why}" for why, n in sorted(measured.left_out.items()))
        log.warning("scores left out: %s", whys)
    _write(args, labels, answers, measured, evidence)
    _summarise(args, labels, answers, measured)


def _read(args: argparse.Namespace) -> tuple[Ledger | None, AnswerSet]:
    """All answers that were retrieved; none where only the evidence is read."""
    given = (args.response_ids_filepath, args.retrieved_responses_dir)
    if args.from_top_tokens and given == (None, None):
        return None, AnswerSet()
    if None in given:
        raise UserError("--response_ids_filepath and --retrieved_responses_dir are needed")
    ledger = Ledger(args.response_ids_filepath)
    state = ledger.state()
    listed = []
    if args.response_ids_filepath.exists() or not state.batches:
        listed = read_response_ids(args.response_ids_filepath)
    ids = list(dict.fromkeys([*listed, *state.batches]))
    answers = read_all(args.retrieved_responses_dir, ids, ledger)
    if not answers.kept:
        raise UserError("nothing that was retrieved answers what is asked now: retrieve it first")
    return ledger, answers


def _check_not_edited(args: argparse.Namespace) -> None:
    path = args.parsed_responses_output_filepath
    manifest = manifest_path(path, STAGE)
    if args.overwrite or not path.exists():
        return
    own = "labels of your own belong in a file of the same form, named to --labels_path"
    planned = announced(path, STAGE)
    if not manifest.exists() and planned is None:
        raise UserError(f"this stage did not write {path} ({own}): --overwrite replaces it")
    finished = read_manifest(path, STAGE).files.get(path.name) if manifest.exists() else None
    if file_checksum(path) not in (finished, planned):
        raise UserError(f"{path} was changed by hand ({own}): --overwrite replaces it")


def _has_labels_of_a_model(args: argparse.Namespace) -> bool:
    path = args.parsed_responses_output_filepath
    if args.overwrite or not path.exists():
        return False
    rows = (load_yaml(path) or {}).values()
    by_model = any(row["common_semantic"] and row.get("source") != TOP_TOKENS for row in rows)
    if by_model:
        log.info("kept %s: a model wrote these labels (--overwrite replaces them)", path)
    elif args.response_ids_filepath is None and any("score" in row for row in rows):
        log.warning("its scores go: name the retrieved answers, too, and they join the labels")
    return by_model


def _top_token_labels(args: argparse.Namespace) -> tuple[_Labels, str]:
    if args.evidence_path is None:
        raise UserError("--from_top_tokens needs --evidence_path")
    evidence = open_evidence(args.evidence_path)
    labels = top_token_labels(evidence.iter_latents())
    log.info("%d of %d latents labelled by their top tokens", len(labels), evidence.n_latents)
    return labels, file_checksum(args.evidence_path)["xxh3"]


def _n_named(labels: _Labels) -> int:
    return sum(bool(row.get("common_semantic")) for row in labels.values())


def _beside(args: argparse.Namespace, ending: str) -> Path:
    return args.parsed_responses_output_filepath.with_suffix(ending)


def _write(
    args: argparse.Namespace,
    labels: _Labels,
    answers: AnswerSet,
    measured: MeasuredLabels,
    evidence: str | None,
) -> None:
    path, names = args.parsed_responses_output_filepath, []
    if answers.kept:
        failures = {
            response.custom_id: {
                "latent": response.request.latent,
                "task": response.request.task,
                "batch": response.batch or "live",
                "attempt": response.request.attempt,
                "kind": response.answer.kind,
                "reason": response.answer.reason,
                "text": response.record.get("content"),
            }
            for response in answers.kept.values()
            if response.answer.kind in ("failure", "refusal", "empty input")
        }
        write_yaml(_beside(args, ".failures.yaml"), failures)
        names.append(_beside(args, ".failures.yaml").name)
    sources = {"responses": fingerprint(sorted(r.custom_id for r in answers.kept.values()))}
    if evidence is not None:
        sources["evidence"] = evidence
    output = Output(
        path, STAGE, {"from_top_tokens": args.from_top_tokens}, sources, single_file=True
    )
    ranked = sorted(labels.items(), key=lambda item: (-_sure(item[1]), item[0]))
    with atomic_path(path) as temporary:
        with temporary.open("w", encoding="utf-8") as file:
            dump_yaml(dict(ranked), file)
        output.announce({path.name: file_checksum(temporary)})
    counts = {"labels": _n_named(labels), **count(answers.kinds)}
    facts = {"controls": measured.pools()}
    output.finish(facts=facts, counts=counts, files=[path.name, *names])


def _sure(row: dict[str, Any]) -> float:
    value = row.get("certainty")
    return float(value) if isinstance(value, int | float) else -1.0


def _summarise(
    args: argparse.Namespace, labels: _Labels, answers: AnswerSet, measured: MeasuredLabels
) -> None:
    kinds = count(answers.kinds)
    if args.report:
        explained = [r.answer.kind for r in answers.kept.values() if r.request.task == "explain"]
        report = build_report(labels, kinds, answers.usage, measured, explained)
        write_json(_beside(args, ".report.json"), report)
        title = f"Labels in {args.parsed_responses_output_filepath.name}"
        page = _beside(args, ".report.html")
        write_text(page, report_page(report, title))
        log.info("the labels' report: %s", page_link(page))
        show_report(report)
    told = ", ".join(f"{n} {kind}" for kind, n in sorted(kinds.items())) or "none read"
    path = args.parsed_responses_output_filepath
    log.info(
        "%d responses: %s; %d labels: look at %s",
        len(answers.kinds),
        told,
        _n_named(labels),
        path,
        extra=FINAL,
    )
    if n := kinds.get("failure", 0):
        failures = _beside(args, ".failures.yaml")
        log.info("%d of no use: %s says why; send --again failures asks again", n, failures)


if __name__ == "__main__":
    run_stage(main)
