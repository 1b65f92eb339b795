"""Turn retrieved answers into `parsed_responses.yaml`: labels, and the scores that were measured.

Every response is accounted for: as a label, a test's answer, a refusal or a failure with its reason
(`<output>.failures.yaml`). Older result files parse too. --from_top_tokens writes labels without
Claude, made of the words under each latent's strongest tokens.
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from saint.evidence.file import open_evidence
from saint.evidence.labels import TOP_TOKENS, top_token_labels
from saint.interpretation.answers import Reading, Response, read_all, read_keys
from saint.interpretation.ledger import Ledger, State, read_response_ids
from saint.interpretation.prompts import LABELLED_TASKS, TASKS, label_hash
from saint.interpretation.report import build_report, show_report
from saint.interpretation.responses import count
from saint.interpretation.scores import Outcomes, outcomes, pooled, score
from saint.stage.errors import UserError, log
from saint.stage.files import write_json
from saint.stage.flags import add_overwrite_flag
from saint.stage.manifests import Output, file_checksum, fingerprint, manifest_path, read_manifest
from saint.stage.program import log_arguments, run_stage
from saint.stage.yaml_files import load_yaml, write_yaml

STAGE = "interpret_top_sentences_parse_responses"
# A latent that was measured but not named: what readers have always taken for "no label".
_UNLABELLED = {"common_semantic": "", "certainty": None}
_OTHER_EVIDENCE = (
    "measured on other evidence than these labels are of, or not known on which "
    "(a parse without --task joins what fits; send --task … --overwrite measures again)"
)
_OTHER_TEXT = "of a label of another text"


@dataclass(frozen=True)
class _Earlier:
    """What the output file holds already.

    evidence: fingerprint of the evidence file that its labels and scores are of; None where that is
    not known (no manifest, or that of an older version).
    """

    rows: dict[int, dict[str, Any]]
    evidence: str | None


# (latent, task) of a score that was measured and is not written -> why.
_LeftOut = dict[tuple[int, str], str]


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
        "--task",
        choices=TASKS,
        help="only this task's answers; scores are merged into the labels that are there [all]",
    )
    what.add_argument(
        "--report",
        action="store_true",
        help="print statistics, and write <output>.report.json",
    )
    what.add_argument(
        "--from_top_tokens",
        action="store_true",
        help="label every latent by its top tokens, without Claude (needs --evidence_path)",
    )
    what.add_argument("--evidence_path", type=Path, help="evidence.parquet, for --from_top_tokens")
    add_overwrite_flag(parser)
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Read all responses, make labels and scores, and write them sorted by certainty."""
    args = build_parser().parse_args(argv)
    log_arguments(args)
    if args.from_top_tokens:
        _write_top_token_labels(args)
        return
    if args.response_ids_filepath is None or args.retrieved_responses_dir is None:
        raise UserError("--response_ids_filepath and --retrieved_responses_dir are needed")
    ledger = Ledger(args.response_ids_filepath)
    state = ledger.state()
    listed = []
    if args.response_ids_filepath.exists() or not state.batches:
        listed = read_response_ids(args.response_ids_filepath)
    ids = list(dict.fromkeys([*listed, *state.batches]))
    reading = read_all(args.retrieved_responses_dir, ids, state, args.task)
    if not reading.kept:
        asked = f"--task {args.task}" if args.task else "what is asked now"
        raise UserError(f"nothing that was retrieved answers {asked}: send and retrieve it first")
    keys = read_keys(ledger, reading)
    earlier = _read_earlier(args.parsed_responses_output_filepath)
    evidence = _evidence_of(earlier, reading, state)
    labels, left_out = _labels(args, earlier, evidence, reading, keys)
    answers = [r for r in reading.kept.values() if r.answer.kind == "answer"]
    if not _intruders_fit(evidence, state):
        intruders = [r for r in answers if r.request.task.startswith("intruder")]
        answers = [r for r in answers if not r.request.task.startswith("intruder")]
        left_out |= {(r.request.latent, "intruder"): _OTHER_EVIDENCE for r in intruders}
    controls = _add_scores(labels, answers, keys)
    _say_what_is_left_out(left_out, labels)
    _write(args, labels, reading, controls, evidence)
    _summarise(args, labels, reading, controls)


def _summarise(
    args: argparse.Namespace,
    labels: dict[int, dict[str, Any]],
    reading: Reading,
    controls: dict[str, dict[int, Outcomes]],
) -> None:
    tally = count(reading.kinds)
    log.info(
        "%d responses: %s; %d labels in %s",
        len(reading.kinds),
        ", ".join(f"{n} {kind}" for kind, n in sorted(tally.items())),
        _n_named(labels),
        args.parsed_responses_output_filepath,
    )
    if args.report:
        kept = [r for r in reading.kept.values() if r.request.task == "explain"]
        kinds = [response.answer.kind for response in kept]
        report = build_report(labels, tally, reading.usage, controls, kinds)
        write_json(_beside(args, ".report.json"), report)
        show_report(report)


def _beside(args: argparse.Namespace, ending: str) -> Path:
    return args.parsed_responses_output_filepath.with_suffix(ending)


def _read_earlier(path: Path) -> _Earlier:
    if not path.exists():
        return _Earlier({}, None)
    rows = {int(latent): row for latent, row in (load_yaml(path) or {}).items()}
    recorded = manifest_path(path, STAGE).exists()
    evidence = read_manifest(path, STAGE).sources.get("evidence") if recorded else None
    return _Earlier(rows, evidence)


def _evidence_of(earlier: _Earlier, reading: Reading, state: State) -> str | None:
    """Fingerprint of the evidence that the labels to be written are of; None where not known."""
    if any(r.request.task == "explain" for r in reading.kept.values()):
        return _asked_from("explain", state)
    if _n_named(earlier.rows):
        return earlier.evidence
    return _asked_from("explain", state) or _asked_from("intruder", state) or earlier.evidence


def _asked_from(task: str, state: State) -> str | None:
    return state.runs.get(task, {}).get("source")


def _labels(
    args: argparse.Namespace,
    earlier: _Earlier,
    evidence: str | None,
    reading: Reading,
    keys: dict[str, dict[str, Any]],
) -> tuple[dict[int, dict[str, Any]], _LeftOut]:
    """Make labels of the explain answers; without any, take those that are in the output file."""
    path = args.parsed_responses_output_filepath
    explained = [r for r in reading.kept.values() if r.request.task == "explain"]
    if not explained:
        tested = any(r.request.task in LABELLED_TASKS for r in reading.kept.values())
        if tested and not earlier.rows:
            raise UserError(f"{path} does not exist: there are no labels that scores could join")
        if _n_named(earlier.rows):
            return earlier.rows, {}
    else:
        _check_not_edited(args)
    labels: dict[int, dict[str, Any]] = {}
    for response in explained:
        if response.answer.kind != "label":
            continue
        row = {**response.answer.fields, "source": "claude", "model": response.record.get("model")}
        n_firing = keys.get(response.custom_id, {}).get("n_firing")
        if n_firing and "fits" in row:
            row["fits"] = [i for i in row["fits"] if i <= n_firing]
            row["n_excerpts"] = n_firing
        labels[response.request.latent] = row
    return labels, _carry_over(labels, earlier, evidence)


def _carry_over(
    labels: dict[int, dict[str, Any]], earlier: _Earlier, evidence: str | None
) -> _LeftOut:
    """Keep what was measured before where it still holds: on the same evidence.

    All scores of a label of the same text, and of any other latent that of the intruder test, which
    asks about the latent itself. Returns what was not kept.
    """
    left_out: _LeftOut = {}
    for latent, before in earlier.rows.items():
        scores = before.get("score") or {}
        if earlier.evidence != evidence:
            left_out |= {(latent, task): _OTHER_EVIDENCE for task in scores}
            continue
        if labels.get(latent, {}).get("common_semantic") != before.get("common_semantic"):
            left_out |= {(latent, task): _OTHER_TEXT for task in scores if task != "intruder"}
            scores = {task: found for task, found in scores.items() if task == "intruder"}
        if scores:
            labels.setdefault(latent, dict(_UNLABELLED))["score"] = scores
    return left_out


def _say_what_is_left_out(left_out: _LeftOut, labels: dict[int, dict[str, Any]]) -> None:
    lost = Counter(
        why
        for (latent, task), why in left_out.items()
        if task not in (labels.get(latent, {}).get("score") or {})
    )
    if lost:
        whys = "; ".join(f"{n} {why}" for why, n in sorted(lost.items()))
        log.warning("scores left out: %s", whys)


def _check_not_edited(args: argparse.Namespace) -> None:
    path = args.parsed_responses_output_filepath
    manifest = manifest_path(path, STAGE)
    if args.overwrite or not path.exists():
        return
    if not manifest.exists():
        raise UserError(f"{path} exists but this stage did not write it: --overwrite replaces it")
    if file_checksum(path) != read_manifest(path, STAGE).files.get(path.name):
        raise UserError(f"{path} was changed by hand since it was written: --overwrite replaces it")


def _intruders_fit(evidence: str | None, state: State) -> bool:
    """Whether the intruder test asked about the latents that the labels are of.

    Its answers carry no label's hash: nothing else tells one dictionary's from another's.
    """
    asked_from = _asked_from("intruder", state)
    labelled_from = evidence or _asked_from("explain", state)
    return None in (asked_from, labelled_from) or asked_from == labelled_from


def _add_scores(
    labels: dict[int, dict[str, Any]], answers: list[Response], keys: dict[str, dict[str, Any]]
) -> dict[str, dict[int, Outcomes]]:
    """Add each latent's measured scores; returns task -> latent -> results of its control."""
    controls: dict[str, dict[int, Outcomes]] = {}
    for response in answers:
        task, latent = response.request.task, response.request.latent
        truth = keys.get(response.custom_id, {}).get("truth")
        if truth is None:
            continue
        results = outcomes(task, response.answer.fields, truth)
        if task.endswith("_control"):
            controls.setdefault(task.removesuffix("_control"), {})[latent] = results
            continue
        if task == "intruder":
            labels.setdefault(latent, dict(_UNLABELLED))
        text = labels.get(latent, {}).get("common_semantic")
        if text is not None and response.request.label in (None, label_hash(text)):
            scores = labels[latent].setdefault("score", {})
            scores[task] = score(task, results, seed=latent)
    for task, found in controls.items():
        for latent, results in found.items():
            if task in (labels.get(latent, {}).get("score") or {}):
                labels[latent]["score"][task]["control"] = pooled(task, [results])["mean"]
    return controls


def _n_named(labels: dict[int, dict[str, Any]]) -> int:
    return sum(bool(row.get("common_semantic")) for row in labels.values())


def _write(
    args: argparse.Namespace,
    labels: dict[int, dict[str, Any]],
    reading: Reading,
    controls: dict[str, dict[int, Outcomes]],
    evidence: str | None,
) -> None:
    path = args.parsed_responses_output_filepath
    failures = {
        response.custom_id: {
            "latent": response.request.latent,
            "task": response.request.task,
            "kind": response.answer.kind,
            "reason": response.answer.reason,
        }
        for response in reading.kept.values()
        if response.answer.kind in ("failure", "refusal")
    }
    write_yaml(_beside(args, ".failures.yaml"), failures)
    write_yaml(path, dict(sorted(labels.items(), key=lambda item: (-_sure(item[1]), item[0]))))
    sources = {"responses": fingerprint(sorted(r.custom_id for r in reading.kept.values()))}
    if evidence is not None:
        sources["evidence"] = evidence
    output = Output(path, STAGE, {"task": args.task, "from_top_tokens": False}, sources)
    counts = {"labels": _n_named(labels), **count(reading.kinds)}
    pools = {task: pooled(task, list(found.values())) for task, found in controls.items()}
    output.finish(
        facts={"controls": pools},
        counts=counts,
        files=[path.name, _beside(args, ".failures.yaml").name],
    )


def _sure(row: dict[str, Any]) -> float:
    value = row.get("certainty")
    return float(value) if isinstance(value, int | float) else -1.0


def _write_top_token_labels(args: argparse.Namespace) -> None:
    if args.evidence_path is None:
        raise UserError("--from_top_tokens needs --evidence_path")
    evidence = open_evidence(args.evidence_path)
    path = args.parsed_responses_output_filepath
    _check_not_edited(args)
    earlier = _Earlier({}, None) if args.overwrite else _read_earlier(path)
    named = [row for row in earlier.rows.values() if row.get("common_semantic")]
    if any(row.get("source") != TOP_TOKENS for row in named):
        log.info("kept %s: a model wrote these labels (--overwrite replaces them)", path)
        return
    mark = file_checksum(args.evidence_path)["xxh3"]
    labels = top_token_labels(evidence.iter_latents())
    n_labels = len(labels)
    left_out = _carry_over(labels, earlier, mark)
    _say_what_is_left_out(left_out, labels)
    write_yaml(path, labels)
    output = Output(path, STAGE, {"task": None, "from_top_tokens": True}, {"evidence": mark})
    output.finish(facts={}, counts={"labels": n_labels}, files=[path.name])
    log.info("%d of %d latents labelled by their top tokens", n_labels, evidence.n_latents)


if __name__ == "__main__":
    run_stage(main)
