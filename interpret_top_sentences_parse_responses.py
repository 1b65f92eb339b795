"""Turn retrieved answers into `parsed_responses.yaml`: labels, and the scores that were measured.

Every response is accounted for: as a label, a test's answer, a refusal or a failure with its reason
(`<output>.failures.yaml`). Older result files parse too. --from_top_tokens writes labels without
Claude, made of the words under each latent's strongest tokens.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from saint.answers import Reading, read_all, read_keys
from saint.evidence import open_evidence
from saint.label_report import build_report, show_report
from saint.labels import top_token_labels
from saint.ledger import Ledger, read_response_ids
from saint.manifests import Output, file_checksum, fingerprint, read_manifest
from saint.prompts import LABELLED_TASKS, TASKS, label_hash
from saint.responses import count, load_yaml, write_yaml
from saint.runtime import (
    UserError,
    add_overwrite_flag,
    log,
    log_arguments,
    run_stage,
    write_json,
)
from saint.scoring import Outcomes, outcomes, pooled, score

STAGE = "interpret_top_sentences_parse_responses"
# A latent that was measured but not named: what readers have always taken for "no label".
_UNLABELLED = {"common_semantic": "", "certainty": None}


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
    keys = read_keys(ledger, reading)
    labels = _labels(args, reading, keys)
    controls = _add_scores(labels, reading, keys)
    _write(args, labels, reading, controls)
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


def _labels(
    args: argparse.Namespace, reading: Reading, keys: dict[str, dict[str, Any]]
) -> dict[int, dict[str, Any]]:
    """Make labels of the explain answers; without any, take those that are in the output file.

    What was measured before is kept where it still holds: the score of a label of the same text,
    and that of the intruder test, which asks about the latent itself.
    """
    path = args.parsed_responses_output_filepath
    earlier = load_yaml(path) or {} if path.exists() else {}
    explained = [r for r in reading.kept.values() if r.request.task == "explain"]
    if not explained:
        if not earlier and any(r.request.task in LABELLED_TASKS for r in reading.kept.values()):
            raise UserError(f"{path} does not exist: there are no labels that scores could join")
        return {int(latent): row for latent, row in earlier.items()}
    _check_not_edited(args)
    labels: dict[int, dict[str, Any]] = {
        latent: {**_UNLABELLED, "score": {"intruder": row["score"]["intruder"]}}
        for latent, row in earlier.items()
        if "intruder" in (row.get("score") or {})
    }
    for response in explained:
        if response.answer.kind != "label":
            continue
        row = {**response.answer.fields, "source": "claude", "model": response.record.get("model")}
        n_firing = keys.get(response.custom_id, {}).get("n_firing")
        if n_firing and "fits" in row:
            row["fits"] = [i for i in row["fits"] if i <= n_firing]
            row["n_excerpts"] = n_firing
        latent = response.request.latent
        before = earlier.get(latent, {})
        if before.get("common_semantic") != row["common_semantic"]:
            before = labels.get(latent, {})
        if "score" in before:
            row["score"] = before["score"]
        labels[latent] = row
    return labels


def _check_not_edited(args: argparse.Namespace) -> None:
    path = args.parsed_responses_output_filepath
    manifest = path.with_name(path.name + ".manifest.json")
    if args.overwrite or not path.exists():
        return
    if not manifest.exists():
        raise UserError(f"{path} exists but this stage did not write it: --overwrite replaces it")
    if file_checksum(path) != read_manifest(path, STAGE).files.get(path.name):
        raise UserError(f"{path} was changed by hand since it was written: --overwrite replaces it")


def _add_scores(
    labels: dict[int, dict[str, Any]], reading: Reading, keys: dict[str, dict[str, Any]]
) -> dict[str, dict[int, Outcomes]]:
    """Add each latent's measured scores; returns task -> latent -> results of its control."""
    controls: dict[str, dict[int, Outcomes]] = {}
    for response in reading.kept.values():
        task, latent = response.request.task, response.request.latent
        truth = keys.get(response.custom_id, {}).get("truth")
        if response.answer.kind != "answer" or truth is None:
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
    return sum(bool(row["common_semantic"]) for row in labels.values())


def _write(
    args: argparse.Namespace,
    labels: dict[int, dict[str, Any]],
    reading: Reading,
    controls: dict[str, dict[int, Outcomes]],
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
    tested: dict[int, dict[str, Any]] = {}
    if path.exists() and not args.overwrite:
        tested = load_yaml(path) or {}
        if not read_manifest(path, STAGE).arguments["from_top_tokens"] and _n_named(tested):
            log.info("kept %s: a model wrote these labels (--overwrite replaces them)", path)
            return
    labels = top_token_labels(evidence.iter_latents())
    for latent in tested.keys() & labels.keys():
        if "score" in tested[latent]:  # the intruder test needs no label
            labels[latent]["score"] = tested[latent]["score"]
    write_yaml(path, labels)
    sources = {"evidence": file_checksum(args.evidence_path)["xxh3"]}
    output = Output(path, STAGE, {"task": None, "from_top_tokens": True}, sources)
    output.finish(facts={}, counts={"labels": len(labels)}, files=[path.name])
    log.info("%d of %d latents labelled by their top tokens", len(labels), evidence.n_latents)


if __name__ == "__main__":
    run_stage(main)
