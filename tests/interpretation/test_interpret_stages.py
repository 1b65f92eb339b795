"""Send, retrieve and parse, run as programs against a local server that speaks the Batches API."""

from __future__ import annotations

import gzip
import json
from collections import Counter
from datetime import timedelta
from pathlib import Path

import pytest
import yaml

from saint.evidence.labels import load_labels
from saint.interpretation.prompts import test_sentences as held_out_sentences
from tests.support.interpretation_data import (
    run,
    write_dataset,
    write_top_sentences,
)
from tests.support.interpretation_workplace import Workplace, error_of
from tests.support.mock_batches import MockApi

# --- the whole way ---------------------------------------------------------------------------


def test_as_a_user_runs_it(tmp_path: Path):
    """Subprocesses, a base URL with a path, plain YAML and a dataset, no evidence file."""
    api = MockApi(polls_until_ended=2)
    tops = write_top_sentences(tmp_path / "top_sentences_mean.yaml", n_latents=3)
    dataset = write_dataset(tmp_path / "data", 40)
    ids, output = tmp_path / "response_ids.yaml", tmp_path / "output"
    sent = run(
        "interpret_top_sentences_send_batches",
        *("--top_sentences_dict_filepath", tops, "--response_ids_filepath", ids),
        *("--dataset_dir", dataset, "--no_smoke_test"),
        env=api.env,
    )
    assert sent.returncode == 0, sent.stderr
    assert yaml.safe_load(ids.read_text()) == ["msgbatch_0000"]
    text = api.batches["msgbatch_0000"].requests[1]["params"]["messages"][0]["content"]
    assert "1. sentence 23 about" in text and "12. sentence 12 about" in text

    files = ("--response_ids_filepath", ids, "--response_output_dir", output)
    got = run(
        "interpret_top_sentences_retrieve_batches",
        *files,
        "--wait",
        "--poll_interval_s",
        0.1,
        env=api.env,
    )
    assert got.returncode == 0, got.stderr
    lines = (output / "msgbatch_0000.jsonl").read_text().splitlines()
    assert len(lines) == 3 and all("custom_id" in json.loads(line) for line in lines)

    parsed = run(
        "interpret_top_sentences_parse_responses",
        *("--response_ids_filepath", ids, "--retrieved_responses_dir", output),
        *("--parsed_responses_output_filepath", output / "parsed_responses.yaml", "--report"),
    )
    assert parsed.returncode == 0, parsed.stderr
    labels = load_labels(output / "parsed_responses.yaml")
    assert sorted(labels) == [0, 1, 2]
    certainties = [label.certainty or 0 for label in labels.values()]
    assert certainties == sorted(certainties, reverse=True)
    assert api.paid() == {f"explain-{i}": 1 for i in range(3)}
    assert not api.strangers_asked
    assert all(path.startswith("/anthropic/v1/") for _, path in api.log)
    assert "labels" in parsed.stdout
    api.close()


def test_evidence_becomes_marked_windows_without_held_out_sentences(work: Workplace):
    labels = work.everything("--no_smoke_test")
    assert sorted(labels) == [0, 1, 2, 3]
    for request in work.api.batches["msgbatch_0000"].requests:
        latent = int(request["custom_id"].split("-")[1])
        params = request["params"]
        text = params["messages"][0]["content"]
        assert f"«topic{latent}»" in text and f"(topic{latent} " in text
        assert "Similar excerpts that do not fire" in text
        assert params["output_config"]["format"]["type"] == "json_schema"
        assert params["thinking"] == {"type": "disabled"}
    for path in (work.tops / "response_ids.requests").iterdir():
        with gzip.open(path, "rt") as file:
            for line in file:
                request = json.loads(line)
                latent = int(request["custom_id"].split("-")[1])
                shown = set(request["key"]["shown"])
                assert shown and not shown & held_out_sentences(work.rows[latent])


def test_the_yaml_name_chooses_the_ranking(work: Workplace, tmp_path: Path):
    dataset = write_dataset(tmp_path / "data", 5000)
    work.yaml = work.tops / "top_sentences_last.yaml"
    assert work.send("--dataset_dir", dataset, "--no_smoke_test").returncode == 0
    text = work.api.batches["msgbatch_0000"].requests[2]["params"]["messages"][0]["content"]
    # Sentences 2000 to 2009 are held out, so the best that may be shown is 2010.
    assert "on their last token" in text and "sentence 2010 about" in text
    assert "sentence 2009 about" not in text


def test_dry_run_needs_no_key_and_sends_nothing(work: Workplace):
    done = work.send("--dry_run", env={})
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("--- explain-") == 3
    assert "4 requests" in done.last_line and "$" in done.last_line and "2026" in done.last_line
    requests = (work.tops / "response_ids.dry_run.jsonl").read_text().splitlines()
    assert len(requests) == 4 and "messages" in json.loads(requests[0])["params"]
    assert not work.api.log and not work.ids.exists()


def test_running_again_sends_nothing_and_more_latents_extend(work: Workplace):
    assert work.send("--max_latents", 2).returncode == 0
    again = work.send("--max_latents", 2)
    assert again.returncode == 0 and "sent already" in again.stderr
    assert work.send().returncode == 0
    work.retrieve()
    assert work.parse().returncode == 0
    assert len(work.api.live_requests) == 1
    assert work.api.paid() + Counter({"explain-0": 1}) == {f"explain-{i}": 1 for i in range(4)}
    assert sorted(load_labels(work.labels)) == [0, 1, 2, 3]
    assert "all 2 batches" in work.retrieve().stderr


def test_another_model_stops_and_overwrite_asks_anew(work: Workplace):
    work.everything("--no_smoke_test")
    line = error_of(work.send("--model", "claude-sonnet-5-5"))
    assert "claude-haiku-5-5" in line and "claude-sonnet-5-5" in line
    labels = work.everything("--model", "claude-sonnet-5-5", "--no_smoke_test", "--overwrite")
    assert {row["model"] for row in labels.values()} == {"claude-sonnet-5-5"}
    assert "4 superseded" in work.calls[-1].stderr
    ledger = (work.tops / "response_ids.ledger.jsonl").read_text()
    assert "msgbatch_0000" in ledger and "msgbatch_0001" in ledger


def test_splits_by_requests_and_bytes(work: Workplace):
    assert work.send("--max_batch_requests", 3, "--no_smoke_test").returncode == 0
    assert [len(b.requests) for b in work.api.batches.values()] == [3, 1]
    work.ids = work.tops / "other_ids.yaml"
    assert work.send("--max_batch_mb", 0.012, "--no_smoke_test").returncode == 0
    sizes = [len(b.requests) for b in list(work.api.batches.values())[2:]]
    assert sum(sizes) == 4 and len(sizes) > 1
    for batch in list(work.api.batches.values())[2:]:
        assert len(json.dumps({"requests": batch.requests})) <= 12_000


# --- outcomes --------------------------------------------------------------------------------


def test_every_kind_of_result_is_recorded_and_resent_as_it_deserves(work: Workplace):
    work.api.result_kinds = {
        r"explain-0-1-": "expired",
        r"explain-1-1-": "errored",
        r"explain-2-": "invalid",
        r"explain-3-": "refusal",
    }
    assert work.send("--no_smoke_test").returncode == 0
    assert work.retrieve().returncode == 0
    statuses = {i.split("-")[1]: row["status"] for i, row in work.records().items()}
    assert statuses == {"0": "expired", "1": "errored", "2": "errored", "3": "succeeded"}
    done = work.retrieve("--resend_failed")
    assert done.returncode == 0 and "explain-2" in work.calls[-2].stderr
    resent = {r["custom_id"].rsplit("-", 1)[0] for r in work.api.batches["msgbatch_0001"].requests}
    assert resent == {"explain-0-2", "explain-1-2"}
    done = work.parse()
    assert "1 failure" in done.stderr and "2 label" in done.stderr
    assert (
        "1 refusal" in done.stderr and "2 retried" in done.stderr and "6 responses" in done.stderr
    )
    failures = yaml.safe_load((work.output / "parsed_responses.failures.yaml").read_text())
    kinds = {row["latent"]: (row["kind"], row["reason"]) for row in failures.values()}
    assert kinds[2][0] == "failure" and "invalid_request_error" in kinds[2][1]
    assert kinds[3][0] == "refusal"
    # Nothing is left to send: one is invalid for good, one is a refusal.
    assert "sent already" in work.send("--no_smoke_test").stderr


def test_attempts_are_limited(work: Workplace):
    work.api.result_kinds = {"explain": "expired"}
    work.send("--no_smoke_test", "--max_latents", 1)
    assert work.retrieve("--resend_failed", "--max_attempts", 2).returncode == 0
    assert len(work.api.batches) == 2


def test_cut_broken_and_doubled_result_streams(work: Workplace):
    work.send("--no_smoke_test")
    work.api.faults = ["results:cut", "results:broken", "results:twice", "read:500", "read:drop"]
    work.api.faults[-1] = "read:drop_before"
    done = work.retrieve()
    assert done.returncode == 0, done.stderr
    assert len(work.records()) == 4 and not work.api.faults
    raw = (work.output / "msgbatch_0000.jsonl").read_text().splitlines()
    assert len(raw) == 4
    assert work.parse().returncode == 0 and len(load_labels(work.labels)) == 4


def test_silence_while_polling_and_fetching_is_waited_out(work: Workplace):
    work.send("--no_smoke_test")
    work.api.faults = ["read:hang_before", "results:hang_before"]
    done = work.retrieve("--timeout_s", 0.5)
    assert done.returncode == 0, done.stderr
    assert len(work.records()) == 4 and not work.api.faults
    assert work.api.injected == {"read:hang_before": 1, "results:hang_before": 1}


@pytest.mark.parametrize("sign", ["age", "archived_at"])
def test_results_older_than_29_days(work: Workplace, sign: str):
    work.send("--no_smoke_test")
    work.api.age = timedelta(days=30 if sign == "age" else 1)
    work.api.archived = sign == "archived_at"
    line = error_of(work.retrieve())
    assert "29 days" in line and "msgbatch_0000" in line
    assert not any("results" in path for _, path in work.api.log) and not work.output.exists()


def test_without_the_evidence_a_smoke_answer_is_kept(work: Workplace):
    labels = work.everything()
    assert sorted(labels) == [0, 1, 2, 3] and len(work.api.live_requests) == 1
    assert "explain-0" not in work.api.paid()


def test_a_failing_smoke_test_sends_no_batch(work: Workplace):
    work.api.faults = ["live:403"]
    assert "live request" in error_of(work.send())
    work.api.answer = lambda params: "hello"
    assert "not usably" in error_of(work.send())
    assert not work.api.batches


def test_cancel(work: Workplace):
    work.api.polls_until_ended = 10**6
    work.send("--no_smoke_test")
    assert work.send("--cancel").returncode == 0
    work.retrieve()
    assert {row["status"] for row in work.records().values()} == {"canceled"}
    work.api.polls_until_ended = 1
    assert work.send("--no_smoke_test").returncode == 0
    work.retrieve()
    assert work.api.paid() == {f"explain-{i}": 1 for i in range(4)}


def test_cancel_names_a_batch_whose_id_was_lost(work: Workplace):
    work.api.polls_until_ended = 10**6
    work.api.faults = ["create:drop_after"]
    work.send("--no_smoke_test")
    done = work.send("--cancel")
    assert done.returncode == 0
    assert "not cancelled" in done.stderr and "msgbatch_0000" in done.stderr
