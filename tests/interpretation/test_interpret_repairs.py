"""Models, clocks, outages, missing lines, unusable answers: the stages go on by themselves."""

from __future__ import annotations

import json
import time
from collections import Counter
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import yaml

from saint.evidence.labels import load_labels
from saint.interpretation.batches import create_batch, reconcile
from saint.interpretation.client import PLAIN_FORM, RequestForm, open_client
from saint.interpretation.ledger import Ledger, new_intent_id
from saint.interpretation.responses import certainty, parse_answer
from saint.stage.yaml_files import load_yaml, write_yaml
from saint.steering.effects import SCHEMA, write_effects
from tests.support.interpretation_data import write_evidence
from tests.support.interpretation_workplace import Workplace, error_of
from tests.support.mock_batches import Batch, explain_answer, model_object
from tests.support.tiny_steering import N_LATENTS, write_setup

ONCE = {f"explain-{i}": 1 for i in range(4)}

# --- models ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("thinking", "sent"),
    [
        (("disabled", "enabled"), {"type": "disabled"}),
        (("between_tools", "adaptive"), {"type": "between_tools"}),
        (("adaptive",), None),
    ],
)
def test_each_model_is_asked_as_it_can_be(
    work: Workplace, thinking: tuple[str, ...], sent: dict[str, str] | None
):
    name = "claude-opus-5-5"
    work.api.models[name] = model_object(name, thinking=thinking)
    assert work.send("--model", name).returncode == 0
    requests = [r["params"] for r in work.api.batches["msgbatch_0000"].requests]
    for params in [*requests, *work.api.live_requests]:
        assert params.get("thinking") == sent
        assert params["max_tokens"] == (400 if sent else 2400)
        assert params["output_config"].get("effort") == (None if sent else "low")
        assert params["output_config"]["format"]["type"] == "json_schema"
    assert ("for thoughts" in work.calls[-1].stderr) == (sent is None)
    # The answer is kept: the next run does not ask.
    assert work.send("--model", name).returncode == 0
    assert sum("/models/" in path for _, path in work.api.log) == 1


def test_a_model_that_goes_is_said_and_one_that_is_gone_refused(work: Workplace):
    name, soon = "claude-haiku-4-5", "2026-12-24T00:00:00Z"
    work.api.models[name] = model_object(
        name, thinking=("disabled",), lifecycle="deprecated", retires_at=soon
    )
    assert "will be retired on 2026-12-24" in work.send("--model", name).stderr
    work.ids = work.tops / "other.yaml"
    work.api.models[name]["lifecycle"] = "retired"
    assert "is retired" in error_of(work.send("--model", name))
    no_batch = model_object(name, thinking=("disabled",))
    no_batch["capabilities"]["batch"] = {"supported": False}
    work.api.models[name] = no_batch
    assert "--live N" in error_of(work.send("--model", name))


# --- clocks ----------------------------------------------------------------------------------


@pytest.mark.parametrize("minutes", [-30, 30])
def test_a_batch_is_recognised_by_a_server_whose_clock_differs(work: Workplace, minutes: int):
    work.api.skew = timedelta(minutes=minutes)
    work.api.faults = ["create:drop_after"]
    done = work.send("--no_smoke_test", "--settle_s", 1)
    assert done.returncode == 0 and "found the lost batch" in done.stderr, done.stderr
    work.retrieve()
    assert work.api.paid() == ONCE and len(work.api.batches) == 1


def test_a_batch_that_was_made_after_the_failure_is_not_ours(
    work: Workplace, monkeypatch: pytest.MonkeyPatch
):
    """Of the same size, running, and listed above ours would be: it must not be waited for."""
    for name, value in work.api.env.items():
        monkeypatch.setenv(name, value)
    client, ledger = open_client(5), Ledger(work.ids)
    intent = new_intent_id()
    row = {"custom_id": f"explain-1-1-{intent}", "params": {"model": "m"}, "key": {}}
    ledger.write_requests(intent, [row])
    work.api.faults = ["create:drop_before"]
    assert create_batch(client, ledger, intent, task="explain", model="m") is None
    later = datetime.now(UTC) + timedelta(minutes=30)
    work.api.polls_until_ended = 10**6
    work.api.batches["msgbatch_0000"] = Batch("msgbatch_0000", [row], later)
    assert [item.running for item in reconcile(client, ledger)] == [[]]
    work.api.batches["msgbatch_0000"].created = datetime.now(UTC)
    assert [item.running for item in reconcile(client, ledger)] == [["msgbatch_0000"]]


# --- outages ---------------------------------------------------------------------------------


@pytest.mark.parametrize("place", ["create", "read", "results"])
def test_an_outage_is_waited_out(work: Workplace, place: str):
    work.api.outage_s = 0.6
    work.api.faults = [f"{place}:outage"]
    assert work.send("--no_smoke_test", "--settle_s", 1.5).returncode == 0
    done = work.retrieve()
    assert done.returncode == 0 and "all 1 batches" in done.stderr, done.stderr
    assert not work.api.faults
    assert work.api.paid() == ONCE


def test_an_outage_without_wait_is_one_line(work: Workplace):
    work.send("--no_smoke_test")
    work.api.outage_until = time.monotonic() + 3600
    done = work._call(
        "interpret_top_sentences_retrieve_batches",
        *("--response_ids_filepath", work.ids, "--response_output_dir", work.output),
        *("--timeout_s", 0.5),
    )
    assert "failed" in error_of(done)


@pytest.mark.parametrize("fault", ["529", "500", "drop_before", "drop_after"])
def test_an_unclear_creation_takes_one_command(work: Workplace, fault: str):
    work.api.faults = [f"create:{fault}"]
    done = work.send("--no_smoke_test", "--settle_s", 0.3)
    assert done.returncode == 0, done.stderr
    assert work.retrieve().returncode == 0
    assert work.api.paid() == ONCE


def test_the_live_request_waits_for_a_busy_server(work: Workplace):
    work.api.faults = ["live:529"]
    assert work.send().returncode == 0
    assert len(work.api.live_requests) == 1


# --- missing lines ---------------------------------------------------------------------------


@pytest.mark.parametrize("fault", ["missing", "broken"])
def test_a_line_that_does_not_come_is_asked_for_again(work: Workplace, fault: str):
    work.send("--no_smoke_test")
    work.api.faults = [f"results:{fault}"] * 4
    work.api.rng.randrange = lambda *_: 0  # pyright: ignore[reportAttributeAccessIssue]
    line = error_of(work.retrieve())
    assert "1 of 4 results" in line and "asks for them again" in line
    assert Counter(r["status"] for r in work.records().values()) == {
        "succeeded": 3,
        "unreadable": 1,
    }
    # It counts as out: nothing is paid again meanwhile.
    assert "sent already" in work.send("--no_smoke_test").stderr
    done = work.retrieve()
    assert done.returncode == 0 and "all 1 batches" in done.stderr
    assert {r["status"] for r in work.records().values()} == {"succeeded"}
    assert work.parse().returncode == 0 and len(load_labels(work.labels)) == 4


# --- unusable answers ------------------------------------------------------------------------


def test_unusable_answers_are_asked_again(work: Workplace):
    def half(params: dict[str, Any]) -> str:
        return (
            "I think so."
            if "topic1" in params["messages"][0]["content"]
            else explain_answer(params)
        )

    work.api.answer = half
    work.send("--no_smoke_test")
    assert "1 answers are of no use" in work.retrieve().stderr
    done = work.parse()
    assert "send --again failures" in done.last_line and "failures.yaml" in done.last_line
    (failure,) = yaml.safe_load(
        (work.output / "parsed_responses.failures.yaml").read_text()
    ).values()
    assert failure["batch"] == "msgbatch_0000" and failure["attempt"] == 1
    assert failure["reason"] and failure["text"] == "I think so."
    assert "sent already" in work.send("--no_smoke_test").stderr
    work.api.answer = explain_answer
    again = work.send("--no_smoke_test", "--again", "failures")
    assert again.returncode == 0, again.stderr
    assert [r["custom_id"][:11] for r in work.api.batches["msgbatch_0001"].requests] == [
        "explain-1-2"
    ]
    work.retrieve()
    assert work.parse().returncode == 0 and len(load_labels(work.labels)) == 4
    assert "sent already" in work.send("--no_smoke_test", "--again", "failures").stderr


def test_a_cut_off_answer_gets_more_room(work: Workplace):
    work.api.result_kinds = {"explain-2-1-": "max_tokens"}
    work.api.answer = lambda params: (
        "thinking about it" if params["max_tokens"] == 400 else explain_answer(params)
    )
    work.send("--no_smoke_test", "--latents", 2)
    work.retrieve()
    work.send("--no_smoke_test", "--latents", 2, "--again", "failures")
    (request,) = work.api.batches["msgbatch_0001"].requests
    assert request["params"]["max_tokens"] == 800


# --- what is said ----------------------------------------------------------------------------


def test_not_all_batches_are_there_right_after_one_was_made_again(work: Workplace):
    work.api.result_kinds = {r"explain-\d-1-": "expired"}
    work.send("--no_smoke_test")
    work.api.polls_until_ended = 3
    files = ("--response_ids_filepath", work.ids, "--response_output_dir", work.output)
    done = work._call("interpret_top_sentences_retrieve_batches", *files, "--resend_failed")
    while len(work.api.batches) == 1:
        done = work._call("interpret_top_sentences_retrieve_batches", *files, "--resend_failed")
    assert done.returncode == 0 and "all " not in done.stderr
    assert "1 of 2 batches are in" in done.stderr


def test_an_open_intent_is_no_batch_that_is_there(work: Workplace):
    work.send("--no_smoke_test", "--latents", "0,1")
    Ledger(work.ids).append(
        "intent", intent="0" * 10, kind="batch", task="explain", model="m", units=["explain-3-1"]
    )
    done = work.retrieve()
    assert done.returncode == 0 and "all " not in done.stderr
    assert "1 of which no id is known" in done.stderr


def test_an_archived_batch_says_when(work: Workplace):
    work.send("--no_smoke_test")
    work.api.archived, work.api.age = True, timedelta(days=40)
    made = datetime.now(UTC) - timedelta(days=40)
    assert f"archived on {made:%Y-%m-%d}" in error_of(work.retrieve())


# --- answers ---------------------------------------------------------------------------------


def _test(task: str, value: Any, truth: list[Any]):
    name = {"detect": "fires", "fuzz": "correct", "intruder": "intruders"}[task]
    return parse_answer(task, {"content": json.dumps({name: value})}, {"truth": truth})


@pytest.mark.parametrize(
    "value",
    [
        ["Set 1: B", "Set 2: c"],
        ["(B)", "C."],
        ["b", "C)"],
        {"1": "B", "2": "C"},
        {"Set 2": "C", "Set 1": "B"},
    ],
)
def test_letters_in_any_form_count(value: Any):
    assert _test("intruder", value, ["B", "C"]).fields == {"intruders": ["B", "C"]}


@pytest.mark.parametrize("value", [[1, 3.0], ["1.", "3"], ["#1", "Excerpt 3"], [1.0, "3.0"]])
def test_numbers_in_any_form_count(value: Any):
    assert _test("detect", value, [1, 0, 1]).fields == {"fires": [1, 3]}


@pytest.mark.parametrize(
    ("task", "value"),
    [
        ("intruder", ["B"]),
        ("intruder", ["B", "C", "D"]),
        ("intruder", ["B", "none"]),
        ("intruder", {"1": "B", "3": "C"}),
        ("intruder", "B, C"),
        ("detect", [1, 9]),
        ("detect", ["one"]),
        ("fuzz", [True]),
        ("fuzz", "1, 2"),
        ("fuzz", [1.5]),
    ],
)
def test_another_form_is_a_failure_and_never_a_zero(task: str, value: Any):
    answer = _test(task, value, ["B", "C"] if task == "intruder" else [1, 0])
    assert answer.kind == "failure" and answer.reason


def test_certainties_of_ten_and_empty_input_and_reasons():
    assert [certainty(v) for v in (9, "8/10", "9 out of 10", "85/100", 10)] == [
        0.9,
        0.8,
        0.9,
        0.85,
        1,
    ]
    answer = parse_answer("explain", {"content": "I apologize, but no sentences were provided."})
    assert answer.kind == "empty input" and answer.reason
    assert parse_answer("explain", {"content": "", "stop_reason": "refusal"}).reason


def test_emoji_stay_readable(tmp_path: Any):
    value = {1: {"common_semantic": 'the 😀 emoji: \\U0001F600 "x"'}, 2: {"a": "plain\nß"}}
    path = tmp_path / "labels.yaml"
    write_yaml(path, value)
    assert "😀" in path.read_text(encoding="utf-8") and load_yaml(path) == value


# --- live ------------------------------------------------------------------------------------


def test_a_local_server_labels_without_batches_key_or_schema(work: Workplace):
    """/v1/messages alone, no JSON schemas, any key: as vLLM, llama.cpp and Ollama serve it."""
    work.api.is_local, work.api.rejects = True, ("thinking", "output_config")
    work.api.live_delay_s = 0.2
    env = work.api.env | {"ANTHROPIC_API_KEY": "any-word"}
    done = work.send("--live", 2, "--model", "local-model", env=env)
    assert done.returncode == 0, done.stderr
    assert "without a JSON schema" in done.stderr and "price unknown" in done.stderr
    assert work.api.most_at_once == 2 and len(work.api.live_requests) == 4
    assert all("thinking" not in r and "output_config" not in r for r in work.api.live_requests)
    assert Ledger(work.ids).state().runs["explain"]["form"] == PLAIN_FORM.as_config()
    done = work.parse("--report")
    assert done.returncode == 0 and len(load_labels(work.labels)) == 4
    report = json.loads((work.output / "parsed_responses.report.json").read_text())
    assert report["cost"]["dollars"] == "unknown"
    assert "sent already" in work.send("--live", 2, "--model", "local-model", env=env).stderr
    assert len(work.api.live_requests) == 4


def test_live_requests_cost_twice_and_go_on_where_they_stopped(work: Workplace):
    assert "4 requests" in work.send("--dry_run", "--live", 2).last_line
    work.api.faults = ["live:ok", "live:529", "live:hang_after"]
    line = error_of(work.send("--live", 1, "--timeout_s", 0.5))
    assert "got no answer" in line
    n = len(work.api.live_requests)
    done = work.send("--live", 2)
    assert done.returncode == 0 and "--assume_lost" in done.stderr
    assert work.parse().returncode == 0 and len(load_labels(work.labels)) == 3
    assert work.send("--live", 2, "--assume_lost").returncode == 0
    assert work.parse().returncode == 0 and len(load_labels(work.labels)) == 4
    # One of five: the one that got no answer was asked again, and said so.
    assert n in (2, 3) and len(work.api.live_requests) == 5


def test_forms_are_kept_as_the_ledger_has_them():
    form = RequestForm(thinking=None, effort="low", thinking_tokens=2000)
    assert RequestForm(**form.as_config()) == form


# --- effects ---------------------------------------------------------------------------------


def test_what_a_latent_does_stands_beside_what_it_fires_on(work: Workplace):
    def answer(params: dict[str, Any]) -> str:
        if "turned up" in params["system"]:
            text = params["messages"][0]["content"]
            assert "Tokens whose probability the latent raises: topic" in text
            return json.dumps({"common_semantic": "more of the topic", "certainty": 0.5})
        return explain_answer(params)

    work.api.answer = answer
    work.everything("--no_smoke_test")
    done = work.send("--task", "effect", "--latents", "1,2")
    assert done.returncode == 0 and "only the tokens are shown" in done.stderr
    work.retrieve()
    assert work.parse().returncode == 0
    labels = load_labels(work.labels)
    assert [labels[i].effect for i in range(4)] == [
        "",
        "more of the topic",
        "more of the topic",
        "",
    ]
    assert all(label.text.startswith("concept") for label in labels.values())


def test_measured_effects_and_steered_texts_are_shown(tmp_path: Path):
    place = Workplace(tmp_path, n_latents=N_LATENTS)
    model_dir, sae_path = write_setup(tmp_path)
    given = ("--llama_model_dir", model_dir, "--sae_model_path", sae_path)
    ask = ("--task", "effect", "--latents", "1,2", "--dry_run")

    def asked() -> list[str]:
        done = place.send(*ask, *given, env={})
        assert done.returncode == 0, done.stderr
        lines = (place.tops / "response_ids.dry_run.jsonl").read_text().splitlines()
        return [json.loads(line)["params"]["messages"][0]["content"] for line in lines]

    try:
        usual = asked()
        assert all(text.count("turned up:") == 3 for text in usual)
        assert "raises: topic1, more" in usual[0]
        row = dict.fromkeys(SCHEMA.names) | {"latent": 1, "word": "topic", "score": 1.0, "kl": 1.0}
        row |= {"rising": [{"token": " risen", "value": 0.2}], "dose_1nat": 40.0}
        row |= {"falling": [{"token": " fallen", "value": -0.1}]}
        facts = {"n_latents": N_LATENTS, "doses": [4.0, 8.0, 16.0]}
        write_effects(place.tops / "effects.parquet", [row], facts)
        measured = asked()
        assert (
            "raises: topic1" in measured[0]
            and "then rises most in neutral texts: risen" in (measured[0])
        )
        assert "then falls most in neutral texts: fallen" in measured[0]
        # The dose is the file's: other words than at the usual strength; latent 2 has none there.
        assert measured[0].count("turned up:") == 3 and measured[1] == usual[1]
        assert measured[0].split("Beginning", 1)[1] != usual[0].split("Beginning", 1)[1]
        place.rows.pop()
        write_evidence(place.tops / "evidence.parquet", place.rows)
        (place.tops / "effects.parquet").unlink()
        assert "is not the SAE" in error_of(place.send(*ask, *given, env={}))
    finally:
        place.api.close()


def test_a_useless_live_test_stops_and_says_so(work: Workplace):
    work.api.is_local, work.api.answer = True, lambda _: "I think that it is about trees."
    line = error_of(work.send("--live", 2, "--model", "local-model"))
    assert "nothing more was sent" in line and "JSON schema" in line
    assert len(work.api.live_requests) == 1
    work.api.answer = explain_answer
    done = work.send("--live", 2, "--model", "local-model", "--again", "failures")
    assert done.returncode == 0 and "answers are in" in done.last_line
    assert work.parse().returncode == 0 and len(load_labels(work.labels)) == 4
