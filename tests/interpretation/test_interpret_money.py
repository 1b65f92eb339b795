"""Budgets, mistakes, the key, and labels without Claude."""

from __future__ import annotations

import gzip
import json
import re

import anthropic
import pytest

from saint.evidence.labels import load_labels
from saint.interpretation.client import open_client
from saint.interpretation.prices import prompt_chars
from saint.stage.manifests import Output, file_checksum
from tests.support.interpretation_workplace import Workplace, error_of
from tests.support.program import Finished


def test_budget(work: Workplace):
    before = work.files()
    assert "exceeds --max_cost_usd" in error_of(work.send("--max_cost_usd", "0.00001"))
    assert "--batch_price" in error_of(work.send("--max_cost_usd", 1, "--model", "local-model"))
    assert work.files() == before and not work.api.batches and not work.api.live_requests
    done = work.send(*("--max_cost_usd", 1, "--model", "local-model", "--batch_price", 0, 0))
    assert done.returncode == 0, done.stderr


_RATIO = "1.2 times the tokens of our own tokenizer, 3.6 characters each"


def _chars(work: Workplace) -> int:
    lines = (work.tops / "response_ids.dry_run.jsonl").read_text().splitlines()
    return sum(prompt_chars(json.loads(line)["params"]) for line in lines)


def test_a_dry_run_with_a_key_lets_the_api_count(work: Workplace):
    done = work.send("--dry_run")
    assert done.returncode == 0, done.stderr
    asked, *counted = work.api.log
    assert asked == ("GET", "/anthropic/v1/models/claude-haiku-5-5")
    assert counted == [("POST", "/anthropic/v1/messages/count_tokens")] * 4
    assert "from 4 requests that the API counted" in done.last_line and _RATIO not in done.stderr
    # The server counts a token for four characters, rounded down for each request.
    assert _tokens_in(done) == pytest.approx(_chars(work) / 4, abs=4)
    assert not work.api.batches and not work.api.live_requests and not work.ids.exists()


@pytest.mark.parametrize("why", ["no key", "the endpoint does not count"])
def test_a_dry_run_without_a_count_states_its_ratio(work: Workplace, why: str):
    work.api.faults = ["count:404"]
    done = work.send("--dry_run", env={} if why == "no key" else None)
    assert done.returncode == 0, done.stderr
    assert _RATIO in done.last_line and "API counted" not in done.last_line
    assert ("the API does not count them" in done.stderr) == (why != "no key")
    assert _tokens_in(done) == pytest.approx(1.2 * _chars(work) / 3.6, abs=1)
    assert len(work.api.log) == 2 * (why != "no key")


def _tokens_in(done: Finished) -> int:
    match = re.search(r"about ([\d,]+) tokens in", done.last_line)
    assert match, done.last_line
    return int(match[1].replace(",", ""))


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
    from saint.interpretation.ledger import Ledger

    with Ledger(work.ids).sender_lock():
        assert "another process" in error_of(work.send("--no_smoke_test"))
    assert not work.api.batches


def test_the_key_is_nowhere(work: Workplace):
    work.api.faults = ["count:500", "results:cut"]
    work.api.polls_until_ended = 10**6
    for args in (("--dry_run",), (), ("--cancel",)):
        assert work.send(*args).returncode == 0
    work.api.polls_until_ended = 1
    work.api.faults.append("create:drop_after")
    assert work.retrieve("--resend_failed").returncode == 0
    assert work.parse("--report").returncode == 0
    # What this test is about has happened: calls to count, to cancel, and a second batch.
    paths = " ".join(path for _, path in work.api.log)
    assert "count_tokens" in paths and "/cancel" in paths and len(work.api.batches) == 2
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
    done = work.top_tokens()
    assert done.returncode == 0, done.stderr
    labels = load_labels(work.labels)
    assert labels[2].text == "topic2" and labels[2].extra["source"] == "top tokens"
    # A label that a person changed by hand is not replaced silently.
    work.labels.write_text(work.labels.read_text().replace("topic2", "my own name"))
    work.send("--no_smoke_test")
    work.retrieve()
    line = error_of(work.parse())
    assert "changed by hand" in line and "--labels_path" in line
    assert work.parse("--overwrite").returncode == 0
    paid_for = work.labels.read_bytes()
    again = work.top_tokens()
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


@pytest.mark.parametrize("seconds", ["-1", "0", "nan", "inf", "soon"])
def test_a_time_out_that_is_none_is_refused_before_anything_is_sent(work: Workplace, seconds: str):
    before = work.files()
    for stage in (work.send, work.retrieve):
        done = stage(f"--timeout_s={seconds}")
        assert done.returncode == 2 and "--timeout_s" in done.last_line
    assert work.files() == before and not work.api.log


@pytest.mark.parametrize("seconds", [600, 0.5])
def test_a_patient_client_still_connects_quickly(monkeypatch: pytest.MonkeyPatch, seconds: float):
    monkeypatch.setenv("ANTHROPIC_API_KEY", "any")
    timeout = open_client(seconds).timeout
    assert isinstance(timeout, anthropic.Timeout)
    assert (timeout.read, timeout.write, timeout.pool) == (seconds,) * 3
    assert timeout.connect == min(5, seconds)


def test_labels_of_a_run_that_was_killed_are_not_taken_for_a_persons(work: Workplace):
    work.everything()
    whole = work.labels.read_bytes()
    output = Output(
        work.labels, "interpret_top_sentences_parse_responses", {}, {}, single_file=True
    )
    # Killed between the labels and their manifest, when there were other answers than now.
    work.labels.write_bytes(whole + b"# as it was then\n")
    output.announce({work.labels.name: file_checksum(work.labels)})
    assert work.parse().returncode == 0 and work.labels.read_bytes() == whole
    assert not output.partial_path.exists()
    output.announce({work.labels.name: file_checksum(work.labels)})
    work.labels.write_bytes(whole + b"# mine\n")
    assert "was changed by hand" in error_of(work.parse())
    output.manifest_path.unlink()
    work.labels.write_bytes(whole)
    assert work.parse().returncode == 0, "killed at the first time"
