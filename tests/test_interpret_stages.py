"""Send, retrieve and parse, run as programs against a local server that speaks the Batches API."""

from __future__ import annotations

import gzip
import json
import os
import re
import signal
import time
from collections import Counter
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import yaml
from interpretation_data import (
    row,
    run,
    write_dataset,
    write_evidence,
    write_top_sentences,
)
from mock_batches import MockApi
from program import Finished, call, finished, start

from saint.labels import load_labels
from saint.prompts import test_sentences as held_out_sentences


class Workplace:
    """A directory with evidence, a server, and the three stages."""

    def __init__(self, directory: Path, *, n_latents: int = 4) -> None:
        self.directory = directory
        self.tops = directory / "tops"
        self.rows = [row(i) for i in range(n_latents)]
        write_evidence(self.tops / "evidence.parquet", self.rows)
        self.yaml = self.tops / "top_sentences_max.yaml"
        self.ids = self.tops / "response_ids.yaml"
        self.output = directory / "output"
        self.labels = self.output / "parsed_responses.yaml"
        self.api = MockApi()
        self.calls: list[Finished] = []

    def _call(self, stage: str, *args: object, env: dict[str, str] | None = None) -> Finished:
        env = self.api.env if env is None else env
        done = call(stage, *args, env=env)
        self.calls.append(done)
        return done

    def send(self, *args: object, env: dict[str, str] | None = None) -> Finished:
        files = ("--top_sentences_dict_filepath", self.yaml, "--response_ids_filepath", self.ids)
        return self._call("interpret_top_sentences_send_batches", *files, *args, env=env)

    def retrieve(self, *args: object, env: dict[str, str] | None = None) -> Finished:
        files = ("--response_ids_filepath", self.ids, "--response_output_dir", self.output)
        waiting = ("--wait", "--poll_interval_s", 0.02, "--max_poll_interval_s", 0.1)
        return self._call(
            "interpret_top_sentences_retrieve_batches", *files, *waiting, *args, env=env
        )

    def parse(self, *args: object) -> Finished:
        return self._call(
            "interpret_top_sentences_parse_responses",
            "--response_ids_filepath",
            self.ids,
            "--retrieved_responses_dir",
            self.output,
            "--parsed_responses_output_filepath",
            self.labels,
            *args,
            env={},
        )

    def everything(self, *args: object) -> dict[int, Any]:
        for done in (self.send(*args), self.retrieve(), self.parse()):
            assert done.returncode == 0, done.stderr
        return yaml.safe_load(self.labels.read_text())

    def records(self) -> dict[str, Any]:
        ids = yaml.safe_load(self.ids.read_text())
        found: dict[str, Any] = {}
        for batch_id in ids:
            found |= yaml.safe_load((self.output / f"{batch_id}.yaml").read_text())
        return found

    def files(self) -> list[Path]:
        return sorted(
            p for p in self.directory.rglob("*") if p.is_file() and "terminal" not in p.name
        )


@pytest.fixture
def work(tmp_path: Path):
    place = Workplace(tmp_path)
    yield place
    place.api.close()


def error_of(done: Finished) -> str:
    """The one line of an expected error."""
    assert done.returncode == 1, done.stderr
    assert "Traceback" not in done.stderr
    assert done.last_line.startswith("error: ")
    return done.last_line


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


def test_results_older_than_29_days(work: Workplace):
    work.send("--no_smoke_test")
    work.api.age = timedelta(days=30)
    assert "29 days" in error_of(work.retrieve())


def test_without_the_evidence_a_smoke_answer_is_kept(work: Workplace):
    labels = work.everything()
    assert sorted(labels) == [0, 1, 2, 3] and len(work.api.live_requests) == 1
    assert "explain-0" not in work.api.paid()


def test_a_failing_smoke_test_sends_no_batch(work: Workplace):
    work.api.faults = ["live:500"]
    assert "live test" in error_of(work.send())
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
    error_of(work.send("--no_smoke_test"))
    done = work.send("--cancel")
    assert done.returncode == 0
    assert "not cancelled" in done.stderr and "msgbatch_0000" in done.stderr


# --- creating exactly once -------------------------------------------------------------------


def test_rate_limits_are_waited_for(work: Workplace):
    work.api.faults = ["create:429", "create:429"]
    assert work.send("--no_smoke_test").returncode == 0
    assert len(work.api.batches) == 1


@pytest.mark.parametrize("fault", ["500", "529", "drop_before", "drop_after"])
def test_an_unclear_creation_is_looked_for_before_anything_is_sent(work: Workplace, fault: str):
    work.api.faults = [f"create:{fault}"]
    assert "may exist" in error_of(work.send("--no_smoke_test"))
    if fault == "drop_after":
        assert len(work.api.batches) == 1
        done = work.send("--no_smoke_test")
        assert done.returncode == 0 and "found the lost batch" in done.stderr
        assert yaml.safe_load(work.ids.read_text()) == ["msgbatch_0000"]
    else:
        assert "--assume_lost" in error_of(work.send("--no_smoke_test"))
        assert "wait until" in error_of(work.send("--no_smoke_test", "--assume_lost"))
        done = work.send("--no_smoke_test", "--assume_lost", "--settle_s", 0)
        assert done.returncode == 0, done.stderr
    work.retrieve()
    assert work.api.paid() == {f"explain-{i}": 1 for i in range(4)}


def test_a_lost_batch_that_still_runs_blocks_and_is_found_by_retrieve(work: Workplace):
    work.api.polls_until_ended = 8
    work.api.faults = ["create:drop_after"]
    error_of(work.send("--no_smoke_test"))
    line = error_of(work.send("--no_smoke_test", "--assume_lost", "--settle_s", 0))
    assert "msgbatch_0000" in line and "--wait" in line
    assert work.retrieve().returncode == 0
    assert len(work.records()) == 4 and len(work.api.batches) == 1


def test_a_lost_batch_whose_results_cannot_be_read_is_not_paid_for_again(work: Workplace):
    one = ("--no_smoke_test", "--latents", "1")
    work.api.faults = ["create:drop_after"]
    error_of(work.send(*one))
    work.api.faults = ["results:broken"] * 4
    line = error_of(work.send(*one, "--assume_lost", "--settle_s", 0))
    assert "msgbatch_0000" in line and "can be read" in line
    work.api.faults = []
    assert "found the lost batch" in work.send(*one).stderr
    assert work.retrieve().returncode == 0 and work.api.paid() == {"explain-1": 1}


def test_ids_that_a_killed_send_did_not_list_are_listed_again(work: Workplace):
    work.send("--no_smoke_test", "--max_batch_requests", 2)
    listed = yaml.safe_load(work.ids.read_text())
    work.ids.write_text(yaml.safe_dump(listed[:1]))
    assert work.retrieve().returncode == 0
    assert yaml.safe_load(work.ids.read_text()) == listed and len(listed) == 2
    work.ids.unlink()
    assert work.parse().returncode == 0 and len(load_labels(work.labels)) == 4


def test_a_strangers_batch_of_the_same_size_is_not_taken(work: Workplace):
    work.send("--no_smoke_test")
    work.ids = work.tops / "mine.yaml"
    work.api.faults = ["create:500"]
    error_of(work.send("--no_smoke_test"))
    assert "lists none" in error_of(work.send("--no_smoke_test"))
    assert "msgbatch_0000" not in (work.tops / "mine.ledger.jsonl").read_text()


def test_a_refused_batch_can_be_sent_again_at_once(work: Workplace):
    work.api.faults = ["create:413"]
    assert "--max_batch_mb" in error_of(work.send("--no_smoke_test"))
    assert work.send("--no_smoke_test").returncode == 0
    assert len(work.api.batches) == 1


def test_ctrl_c_says_what_is_out(work: Workplace):
    work.api.accept_delay_s = 0.5
    output = work.directory / "terminal"
    process = start(
        *(
            "interpret_top_sentences_send_batches",
            "--top_sentences_dict_filepath",
            work.yaml,
            "--no_smoke_test",
        ),
        *("--response_ids_filepath", work.ids, "--max_batch_requests", 1),
        env=work.api.env,
        output=output,
    )
    deadline = time.monotonic() + 60
    while len(work.api.batches) < 2 and time.monotonic() < deadline:
        time.sleep(0.02)
    assert process.pid is not None
    os.kill(process.pid, signal.SIGINT)
    process.join(60)
    done = finished(process, output)
    assert done.returncode == 130 and re.search(r"[1-4] batches are out", done.stderr)
    assert "msgbatch_0000" in done.stderr and "--cancel" in done.stderr
    assert "one batch was being created and may exist" in done.stderr
    work.api.accept_delay_s = 0
    again = work.send("--no_smoke_test", "--max_batch_requests", 1)
    if again.returncode:  # the second one cannot be told apart before it has ended
        assert work.retrieve().returncode == 0
        again = work.send("--no_smoke_test", "--max_batch_requests", 1)
    assert again.returncode == 0, again.stderr
    assert work.retrieve().returncode == 0
    assert work.api.paid() == {f"explain-{i}": 1 for i in range(4)}


# --- money and mistakes ----------------------------------------------------------------------


def test_budget(work: Workplace):
    before = work.files()
    assert "exceeds --max_cost_usd" in error_of(work.send("--max_cost_usd", "0.00001"))
    assert "--batch_price" in error_of(work.send("--max_cost_usd", 1, "--model", "local-model"))
    assert work.files() == before and not work.api.batches and not work.api.live_requests
    done = work.send(
        *("--max_cost_usd", 1, "--model", "local-model", "--batch_price", 0, 0, "--plain_requests")
    )
    assert done.returncode == 0, done.stderr
    assert "thinking" not in work.api.live_requests[0]


def test_mistakes_are_one_clear_line_and_nothing_is_written(work: Workplace):
    before = work.files()
    no_key = {k: v for k, v in work.api.env.items() if k != "ANTHROPIC_API_KEY"}
    assert "ANTHROPIC_API_KEY" in error_of(work.send(env=no_key))
    broken_key = work.api.env | {"ANTHROPIC_API_KEY": "sk-with\nbreak"}
    assert "line break" in error_of(work.send(env=broken_key))
    wrong_key = work.api.env | {"ANTHROPIC_API_KEY": "sk-wrong"}
    assert "does not accept this key" in error_of(work.send(env=wrong_key))
    assert "no latent 99" in error_of(work.send("--latents", 99))
    assert "numbers and ranges" in error_of(work.send("--latents", "a-b"))
    assert "no latent is left" in error_of(work.send("--min_sentences", 10**6))
    assert "--labels_path" in error_of(work.send("--task", "detect"))
    assert "at most 100,000" in error_of(work.send("--max_batch_requests", 200_000))
    assert "does not exist" in error_of(work.retrieve())
    assert "does not exist" in error_of(work.parse())
    work.yaml = work.directory / "nowhere" / "top_sentences_max.yaml"
    assert "does not exist" in error_of(work.send())
    assert work.files() == before


def test_an_unknown_batch_id(work: Workplace):
    work.ids.write_text("- msgbatch_nowhere\n")
    assert "msgbatch_nowhere" in error_of(work.retrieve())
    assert not work.output.exists()
    work.ids.write_text("- ../../etc/passwd\n")
    assert "plain list of batch ids" in error_of(work.retrieve())


def test_two_senders_do_not_race(work: Workplace):
    from saint.ledger import Ledger

    with Ledger(work.ids).sender_lock():
        assert "another process" in error_of(work.send("--no_smoke_test"))
    assert not work.api.batches


def test_the_key_is_nowhere(work: Workplace):
    work.api.faults = ["create:drop_after", "results:cut"]
    for stage in (work.send, work.send, work.retrieve, work.parse):
        stage()
    bad = work.api.env | {"ANTHROPIC_API_KEY": "sk-bad-0987654321"}
    # The server repeats the key in its answer.
    assert "invalid key" in error_of(work.send("--overwrite", env=bad))
    for secret in (work.api.key, "sk-bad-0987654321"):
        for path in work.directory.rglob("*"):
            if path.is_file():
                data = path.read_bytes()
                if path.suffix == ".gz":
                    data = gzip.decompress(data)
                assert secret.encode() not in data, path
        assert all(secret not in done.stdout + done.stderr for done in work.calls)
    assert not work.api.strangers_asked


@pytest.mark.parametrize("where", ["read", "results"])
def test_redirects_are_not_followed(work: Workplace, where: str):
    work.send("--no_smoke_test")
    work.api.faults = [f"{where}:redirect"]
    assert "307" in error_of(work.retrieve())
    assert not work.api.strangers_asked and work.retrieve().returncode == 0


def test_top_tokens_serve_without_a_key(work: Workplace):
    done = work._call(
        "interpret_top_sentences_parse_responses",
        "--from_top_tokens",
        *("--evidence_path", work.tops / "evidence.parquet"),
        *("--parsed_responses_output_filepath", work.labels),
        env={},
    )
    assert done.returncode == 0, done.stderr
    labels = load_labels(work.labels)
    assert labels[2].text == "topic2" and labels[2].extra["source"] == "top tokens"
    # A label that a person changed by hand is not replaced silently.
    work.labels.write_text(work.labels.read_text().replace("topic2", "my own name"))
    work.send("--no_smoke_test")
    work.retrieve()
    assert "changed by hand" in error_of(work.parse())
    assert work.parse("--overwrite").returncode == 0
    paid_for = work.labels.read_bytes()
    again = work._call(
        "interpret_top_sentences_parse_responses",
        "--from_top_tokens",
        *("--evidence_path", work.tops / "evidence.parquet"),
        *("--parsed_responses_output_filepath", work.labels),
        env={},
    )
    assert again.returncode == 0 and "a model wrote these labels" in again.stderr
    assert work.labels.read_bytes() == paid_for


def test_help_needs_no_key(work: Workplace):
    for stage in (
        "interpret_top_sentences_send_batches",
        "interpret_top_sentences_retrieve_batches",
        "interpret_top_sentences_parse_responses",
    ):
        done = work._call(stage, "--help", env={})
        assert done.returncode == 0 and "--response_ids_filepath" in done.stdout
