"""Every batch is paid for once, whatever happens between its creation and its id."""

from __future__ import annotations

import os
import re
import signal
import time
from multiprocessing.process import BaseProcess

import pytest
import yaml

from saint.evidence.labels import load_labels
from tests.support.interpretation_workplace import Workplace, error_of
from tests.support.program import finished, start


def test_rate_limits_are_waited_for(work: Workplace):
    work.api.faults = ["create:429", "create:429"]
    assert work.send("--no_smoke_test").returncode == 0
    assert len(work.api.batches) == 1


_UNCLEAR = ["500", "529", "drop_before", "drop_after", "hang_before", "hang_after"]


@pytest.mark.parametrize("fault", _UNCLEAR)
def test_an_unclear_creation_is_looked_for_before_anything_is_sent(work: Workplace, fault: str):
    work.api.faults = [f"create:{fault}"]
    done = work.send("--no_smoke_test", "--timeout_s", 0.5)
    assert done.returncode == 0, done.stderr
    assert "no clear answer" in done.stderr and ("timed out" in done.stderr) == fault.startswith(
        "hang"
    )
    work.api.wait_for(f"create:{fault}")
    if fault.endswith("after"):
        assert "found the lost batch" in done.stderr
        assert yaml.safe_load(work.ids.read_text()) == ["msgbatch_0000"]
    else:
        assert "made again" in done.stderr
    assert len(work.api.batches) == 1
    work.retrieve()
    assert work.api.paid() == {f"explain-{i}": 1 for i in range(4)}


@pytest.mark.parametrize("fault", ["drop_before", "hang_before", "hang_after"])
def test_a_live_request_without_an_answer_is_not_sent_again_by_itself(work: Workplace, fault: str):
    one = ("--latents", 1)
    work.api.faults = [f"live:{fault}"]
    assert "no answer" in error_of(work.send(*one, "--timeout_s", 0.5))
    for _ in range(2):
        done = work.send(*one)
        assert done.returncode == 0 and "answered and billed once" in done.stderr
        assert "--assume_lost" in done.stderr
    assert len(work.api.live_requests) == (fault == "hang_after") and not work.api.batches
    assert work.send(*one, "--assume_lost").returncode == 0
    assert len(work.api.live_requests) == 1 + (fault == "hang_after")


def test_a_lost_batch_that_still_runs_is_not_made_again_and_found_by_retrieve(work: Workplace):
    work.api.polls_until_ended = 10**6
    work.api.faults = ["create:drop_after"]
    done = work.send("--no_smoke_test")
    assert done.returncode == 0 and "one that still runs is probably it" in done.stderr
    for args in ((), ("--assume_lost",)):
        done = work.send("--no_smoke_test", *args)
        assert done.returncode == 0 and "msgbatch_0000" in done.stderr and "--wait" in done.stderr
    work.api.polls_until_ended = 1
    assert work.retrieve().returncode == 0
    assert len(work.records()) == 4 and len(work.api.batches) == 1


def test_a_lost_batch_whose_results_cannot_be_read_is_not_paid_for_again(work: Workplace):
    one = ("--no_smoke_test", "--latents", "1")
    work.api.faults = ["create:drop_after", *["results:broken"] * 60]
    done = work.send(*one)
    assert done.returncode == 0 and len(work.api.batches) == 1
    done = work.send(*one)
    assert "msgbatch_0000" in done.stderr and "--assume_lost" in done.stderr
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
    assert work.send("--no_smoke_test").returncode == 0
    assert "msgbatch_0000" not in work.ids.read_text()
    assert yaml.safe_load(work.ids.read_text()) == ["msgbatch_0001"]


def test_lost_batches_of_the_same_size_are_told_apart_by_their_marks(work: Workplace):
    """Two ledgers, each with an intent without an id, and nothing else that differs."""
    places = [work.tops / "first.yaml", work.tops / "second.yaml"]
    work.api.polls_until_ended = 10**6
    for place in places:
        work.ids = place
        work.api.faults = ["create:drop_after"]
        work.send("--no_smoke_test")
    work.api.polls_until_ended = 1
    for place, batch in reversed(list(zip(places, work.api.batches, strict=True))):
        work.ids = place
        assert f"found the lost batch of 4 requests: {batch}" in work.retrieve().stderr
        assert yaml.safe_load(place.read_text()) == [batch]


def test_a_refused_batch_can_be_sent_again_at_once(work: Workplace):
    work.api.faults = ["create:413"]
    assert "--max_batch_mb" in error_of(work.send("--no_smoke_test"))
    assert work.send("--no_smoke_test").returncode == 0
    assert len(work.api.batches) == 1


def test_ctrl_c_while_sending_again_says_what_is_out(work: Workplace):
    work.api.result_kinds = {r"explain-\d-1-": "expired"}
    work.send("--no_smoke_test")
    work.api.accept_delay_s = 0.5
    output = work.directory / "terminal"
    process = start(
        *("interpret_top_sentences_retrieve_batches", "--response_ids_filepath", work.ids),
        *("--response_output_dir", work.output, "--resend_failed", "--max_batch_requests", 2),
        env=work.api.env,
        output=output,
    )
    _interrupt(process, work, n_batches=3)
    done = finished(process, output)
    assert done.returncode == 130 and "msgbatch_0001" in done.stderr
    assert "msgbatch_0000" not in done.stderr.split(" are out and go on ")[1]
    assert f"--response_ids_filepath {work.ids} --cancel" in done.stderr
    assert "one batch was being created and may exist" in done.stderr
    work.api.accept_delay_s = 0
    while work.retrieve("--resend_failed").returncode or len(work.api.paid()) < 4:
        pass
    assert work.api.paid() == {f"explain-{i}": 1 for i in range(4)}


def _interrupt(process: BaseProcess, work: Workplace, *, n_batches: int) -> None:
    """Press Ctrl-C once the server has so many batches, before it says so."""
    deadline = time.monotonic() + 60
    while len(work.api.batches) < n_batches and time.monotonic() < deadline:
        time.sleep(0.02)
    assert process.pid is not None
    os.kill(process.pid, signal.SIGINT)
    process.join(60)


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
    _interrupt(process, work, n_batches=2)
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
