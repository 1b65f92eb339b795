"""Parser, ledger, labels, prices and downloads on their own."""
# ruff: noqa: E501

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import anthropic
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from saint.evidence.labels import label_from_top_tokens, load_labels
from saint.evidence.words import word_at
from saint.interpretation.download import DownloadPaths, _keep_whole_lines, write_records
from saint.interpretation.ledger import (
    Ledger,
    RequestId,
    parse_custom_id,
    read_response_ids,
    replay,
)
from saint.interpretation.prices import (
    _SNAPSHOT,
    BATCH_PRICES,
    PRICES_DATE,
    Quote,
    RequestTally,
    batch_price,
    check_budget,
    dollars,
    is_free,
    price_table,
    request_parts,
)
from saint.interpretation.report import build_report, content_words, near_duplicates, report_page
from saint.interpretation.responses import certainty, failed_kind, parse_answer, parse_label, record
from saint.interpretation.scores import MeasuredLabels, Outcome
from saint.stage.errors import UserError
from tests.support.interpretation_data import example, row

_THOUGHTS = "<semantic_analysis>\n1. Patterns: {:^3} and {x: 1}\n2. 45/50\n</semantic_analysis>\n\n"


def label(content: str | None, **fields: Any) -> Any:
    answer = parse_label({"content": content, **fields})
    return answer.fields.get("common_semantic") if answer.kind == "label" else answer.kind


# --- parser ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "text"),
    [
        ('{"common_semantic": "news", "certainty": 0.9}', "news"),
        (_THOUGHTS + '{\n  "common_semantic": "format strings (%s, {})",\n  "certainty": 1\n}', "format strings (%s, {})"),
        ('```json\n{"common_semantic": "a }{ b", "certainty": 0.9}\n```\nHope this helps {1}!', "a }{ b"),
        ('{"common_semantic": "draft", "certainty": 0.1}\n{"common_semantic": "final", "certainty": 0.9}', "final"),
        (r'{"common_semantic": "maths: \alpha and \frac{1}{2} \theta", "certainty": 0.9}', r"maths: \alpha and \frac{1}{2} \theta"),
        (r'{"common_semantic": "escaped \\beta \u00e9", "certainty": 0.9}', r"escaped \beta é"),
        ('{"common_semantic": "the word "bank" in two senses", "certainty": 0.8}', 'the word "bank" in two senses'),
        ('{"common_semantic": "two\nlines", "certainty": 0.8}', "two lines"),
        ('{"certainty": 0.8, "common_semantic": "reordered"}', "reordered"),
        (r'{"certainty": 0.8, "common_semantic": "sets \mathbb{N}"}', r"sets \mathbb{N}"),
    ],
)  # fmt: skip
def test_labels_in_all_shapes(content: str, text: str):
    assert label(content) == text


@pytest.mark.parametrize(
    ("response", "kind", "reason"),
    [
        ({"content": "I apologize, but I cannot assist with hate speech."}, "refusal", "apologize"),
        ({"content": "", "status": "succeeded", "stop_reason": "refusal"}, "refusal", ""),
        ({"content": "I'm sorry, no sentences were provided."}, "empty input", "no sentences"),
        ({"content": ""}, "failure", "empty"),
        ({"content": None, "status": "expired"}, "failure", "expired"),
        ({"content": '{"common_semantic": "N/A", "certainty": 0}'}, "failure", "no label"),
        ({"content": '{"common_semantic": "No clear pattern", "certainty": 0}'}, "failure", "no label"),
        ({"content": '{"common_semantic": "", "certainty": 0}'}, "failure", "no label"),
        ({"content": '{"common_semantic": 7, "certainty": 0}'}, "failure", "no label"),
        ({"content": '{"common_semantic": "half', "stop_reason": "max_tokens"}, "failure", "max_tokens"),
        ({"content": '{"label": "x"}'}, "failure", "no JSON object"),
    ],
)  # fmt: skip
def test_what_is_no_label_says_why(response: dict[str, Any], kind: str, reason: str):
    answer = parse_label(response)
    assert answer.kind == kind and reason in answer.reason and not answer.fields


def test_certainties():
    given = [1, 0, 0.93, "0.9", "90%", 85, True, float("nan"), -1, 101, None, "high"]
    assert [certainty(v) for v in given] == [1, 0, 0.93, 0.9, 0.9, 0.85] + [None] * 6


@given(st.text(max_size=200))
def test_the_parser_never_crashes_and_never_invents(text: str):
    for content in (text, "{" + text, '{"common_semantic": ' + text):
        answer = parse_label({"content": content})
        assert answer.kind in ("label", "refusal", "failure", "empty input")
        assert answer.kind == "label" or answer.reason


@given(st.text(min_size=1, max_size=80), st.floats(0, 1))
def test_any_label_survives_json(text: str, sure: float):
    content = "thoughts {" + json.dumps({"common_semantic": text, "certainty": sure})
    answer = parse_label({"content": content})
    if answer.kind == "label" and not set(text) & set("\b\f\n\r\t"):
        kept = "".join(c for c in text if c.isprintable() or c.isspace())
        assert answer.fields["common_semantic"] == " ".join(kept.split())


def test_records_keep_text_blocks_only():
    message = {
        "model": "m",
        "content": [{"type": "thinking", "thinking": "{}"}, {"type": "text", "text": "A"}],
        "usage": {"input_tokens": 5, "output_tokens": 2},
        "stop_reason": "end_turn",
    }
    found = record({"type": "succeeded", "message": message})
    assert (found["content"], found["status"], found["input_tokens"]) == ("A", "succeeded", 5)
    error: dict[str, Any] = {
        "type": "error",
        "error": {"type": "overloaded_error", "message": "later"},
    }
    failed = record({"type": "errored", "error": dict(error)})
    assert failed["error"] == "overloaded_error: later" and failed_kind(failed) == "failed"
    error["error"]["type"] = "invalid_request_error"
    assert failed_kind(record({"type": "errored", "error": error})) == "invalid"
    assert failed_kind(record({"type": "unreadable"})) is None
    assert parse_answer("detect_control", {"content": '{"fires": [1]}'}).fields == {"fires": [1]}


def test_older_files_parse(tmp_path: Path):
    """Bare latents as ids, four fields, no ledger, no manifest; integer keys too."""
    from interpret_top_sentences_parse_responses import main

    first: dict[Any, Any] = {
        "12": {"content": '{"common_semantic": "a", "certainty": 1}', "model": "claude-3-5"}
    }
    first["12"] |= {"input_tokens": 5, "output_tokens": 2}
    second: dict[Any, Any] = {
        7: {"content": _THOUGHTS + '{"common_semantic": "b{}", "certainty": 0.5}'}
    }
    second |= {8: {"content": "I cannot do that."}, "x y": {"content": "?"}}
    for name, rows in (("msgbatch_a", first), ("msgbatch_b", second)):
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(rows))
    ids, out = tmp_path / "response_ids.yaml", tmp_path / "parsed_responses.yaml"
    ids.write_text("- msgbatch_a\n- msgbatch_b\n")
    main(
        ["--response_ids_filepath", str(ids), "--retrieved_responses_dir", str(tmp_path)]
        + ["--parsed_responses_output_filepath", str(out), "--report"]
    )
    labels = load_labels(out)
    assert {i: (v.text, v.certainty) for i, v in labels.items()} == {
        12: ("a", 1.0),
        7: ("b{}", 0.5),
    }
    assert list(labels) == [12, 7]
    failures = yaml.safe_load((tmp_path / "parsed_responses.failures.yaml").read_text())
    assert {row["kind"] for row in failures.values()} == {"refusal", "failure"}
    report = json.loads((tmp_path / "parsed_responses.report.json").read_text())
    assert report["responses"] == {"failure": 1, "label": 2, "refusal": 1}
    assert report["cost"]["models_without_price"] == ["claude-3-5"]


# --- ledger ----------------------------------------------------------------------------------


def test_custom_ids():
    request = RequestId("detect_control", 65535, "h0123abcd", 3, "0123456789")
    assert len(request.custom_id) <= 64 and parse_custom_id(request.custom_id) == request
    assert parse_custom_id("12471") == RequestId("explain", 12471, None, 1, "")
    assert parse_custom_id("hello") is None and parse_custom_id("explain-1-1-xyz") is None


def test_a_torn_last_line_never_happened(tmp_path: Path):
    ledger = Ledger(tmp_path / "response_ids.yaml")
    units = {"units": ["explain-1-1"], "task": "explain", "model": "m", "kind": "batch"}
    ledger.append("intent", intent="0" * 10, **units)
    whole = ledger.path.read_bytes()
    ledger.append("created", intent="0" * 10, batch_id="msgbatch_1")
    full = ledger.path.read_bytes()
    for length in range(len(whole), len(full)):
        ledger.path.write_bytes(full[:length])
        assert [i.id for i in ledger.state().unresolved] == ["0" * 10]
    ledger.append("created", intent="0" * 10, batch_id="msgbatch_1")
    assert ledger.state().unresolved == [] and ledger.write_response_ids() == ["msgbatch_1"]
    assert read_response_ids(ledger.response_ids_path) == ["msgbatch_1"]
    assert ledger.path.read_bytes().startswith(full[:-1])


def test_every_event_is_on_disk_before_it_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    synced: list[int] = []
    plain = os.fsync
    monkeypatch.setattr(os, "fsync", lambda fd: (synced.append(os.fstat(fd).st_size), plain(fd))[1])
    ledger = Ledger(tmp_path / "response_ids.yaml")
    ledger.append("run", task="explain", config={})
    ledger.append("run", task="detect", config={})
    assert ledger.path.stat().st_size in synced and len(synced) >= 3


def test_a_damaged_line_in_the_middle_stops(tmp_path: Path):
    ledger = Ledger(tmp_path / "response_ids.yaml")
    ledger.append("run", task="explain", config={})
    ledger.path.write_bytes(b'{"event": "int\n' + ledger.path.read_bytes())
    with pytest.raises(UserError, match="line 1, is damaged"):
        ledger.state()
    ledger.path.write_bytes(b'{"event": "intent", "intent": "0", "units": []}\n')
    with pytest.raises(UserError, match="an event is damaged"):
        ledger.state()


def test_outcomes_decide_what_is_sent_again():
    units = {"task": "explain", "model": "m", "kind": "batch", "time": "2026-11-01T00:00:00+00:00"}
    events: list[dict[str, Any]] = [
        {"event": "run", "task": "explain", "config": {}},
        {"event": "intent", "intent": "a", "units": ["explain-1-1", "explain-2-1"], **units},
        {"event": "created", "intent": "a", "batch_id": "b1"},
        {"event": "outcome", "batch_id": "b1", "failed": {"explain-2": "expired"}, "invalid": {}},
    ]
    state = replay(events)
    assert state.status == {"explain-1": "answered", "explain-2": "failed"}
    events += [
        {"event": "intent", "intent": "c", "units": ["explain-2-2"], **units},
        {"event": "refused", "intent": "c", "reason": "429"},
        {"event": "again", "intent": "c"},
    ]
    state = replay(events)
    assert state.status["explain-2"] == "out" and state.attempts["explain-2"] == 2
    assert [i.id for i in state.unresolved] == ["c"]
    events += [{"event": "lost", "intent": "c"}]
    assert "explain-2" not in replay(events).status
    events += [{"event": "run", "task": "explain", "config": {"model": "other"}}]
    assert replay(events).status == {} and replay(events).intents["a"].superseded


# --- downloads -------------------------------------------------------------------------------


def test_half_a_download_is_kept_up_to_its_last_whole_line(tmp_path: Path):
    paths = DownloadPaths.of(tmp_path, "msgbatch_1")
    lines = [json.dumps({"custom_id": f"{i}", "result": {"type": "expired"}}) for i in range(3)]
    paths.part.write_text(lines[0] + "\n" + lines[1] + "\n" + lines[2][:10])
    assert _keep_whole_lines(paths.part) == {"0", "1"}
    assert paths.part.read_text() == lines[0] + "\n" + lines[1] + "\n"
    write_records(paths, ["2"])
    statuses = {i: r["status"] for i, r in yaml.safe_load(paths.records.read_text()).items()}
    assert statuses == {"0": "expired", "1": "expired", "2": "unreadable"}
    # The third is still to come: the download is not done.
    assert paths.part.exists() and not paths.raw.exists()
    paths.part.write_text("\n".join(lines) + "\n")
    write_records(paths, [])
    assert paths.raw.exists() and not paths.part.exists()


# --- labels and prices -----------------------------------------------------------------------


def test_labels_from_top_tokens_join_word_pieces():
    assert word_at([" un", "believ", "able", " story"], 1) == "unbelievable"
    assert word_at(["The", " end", "."], 2) == "."
    latent = row(1) | {"examples": []}
    assert label_from_top_tokens(latent) == ""
    words = [" Nuclear", " nuclear", " weapons", " the", " weapon"]

    def window(token: str, value: float) -> dict[str, Any]:
        place = {"tokens": [" a", token], "start": 0, "position": 1}
        return example("top", "", 0, "x") | place | {"value": value, "activations": [0.0, value]}

    pairs = zip(words, [9.0, 8.0, 7.0, 20.0, 6.0], strict=True)
    latent["examples"] = [window(word, value) for word, value in pairs]
    assert label_from_top_tokens(latent).lower() == "nuclear, weapons"
    only_the = latent | {"examples": latent["examples"][3:4]}
    assert label_from_top_tokens(only_the) == "the"
    latent["examples"] = [window(f" w{i}", 1.0) for i in range(30)]
    assert label_from_top_tokens(latent) == "w0, w1, w2, w3 (mixed)"


def test_a_label_is_the_word_that_the_latent_alone_marks():
    marked = {"tokens": [" anti", "-", "Trump"], "start": 0, "position": 0}
    marked |= {"value": 2.0, "activations": [2.0, 0.0, 0.0]}
    stray = marked | {"position": 2, "value": 9.0, "activations": [0.0, 0.0, 9.0]}
    examples = [example("top", "", 0, "x") | one for one in (*[marked] * 9, stray, stray)]
    assert label_from_top_tokens(row(1) | {"examples": examples}).startswith("anti")


def test_load_labels(tmp_path: Path):
    path = tmp_path / "parsed_responses.yaml"
    path.write_text(
        "5:\n  common_semantic: 'yes'\n  certainty: 0.9\n  source: claude\n"
        "  score: {detect: {balanced_accuracy: 0.8, n: 40}}\n"
        "3: {common_semantic: other, certainty: null}\n"
    )
    labels = load_labels(path)
    assert list(labels) == [5, 3]
    assert (labels[5].text, labels[5].certainty, labels[5].score) == ("yes", 0.9, 0.8)
    assert labels[5].extra["source"] == "claude" and labels[5].extra["scores"]["detect"]["n"] == 40
    assert labels[3].certainty is None and labels[3].score is None
    for broken in ("[1, 2]", "a: {common_semantic: x}", "1: {certainty: 1}", "1: [", "1: x"):
        path.write_text(broken)
        with pytest.raises(UserError):
            load_labels(path)


def test_prices():
    assert dollars(batch_price("claude-haiku-5-5"), 1e6, 1e6) == pytest.approx(0.30)
    assert batch_price("unknown") is None and batch_price("unknown", [1, 2]) == (1, 2)
    quote = Quote(10, 1000, 100, 2.0, "x")
    check_budget(quote, 2.0, "m")
    check_budget(quote, None, "m")
    with pytest.raises(UserError, match="exceeds"):
        check_budget(quote, 1.99, "m")
    with pytest.raises(UserError, match=PRICES_DATE):
        check_budget(Quote(10, 1000, 100, None, "x"), 1, "m")


def test_every_model_that_the_sdk_names_is_in_the_table():
    literal = next(a for a in get_args(anthropic.types.Model) if get_origin(a) is Literal)
    for name in get_args(literal):
        assert _SNAPSHOT.sub("", name) in BATCH_PRICES, f"{name} is not in the table of prices"
    assert batch_price("claude-opus-4-5-20251101") == (2.5, 12.5)
    # A local model costs nothing; a Claude whose price is not known does.
    assert is_free("qwen3") and is_free("claude-haiku-5-5", (0, 0))
    assert not is_free("claude-mythos-5-2") and not is_free("anthropic/claude-x")


def test_a_dry_run_says_what_a_requests_parts_take():
    question = "Excerpts (of 2):\n1. a film\n\nTokens that it raises: film, war\n\nabcde"
    asked = {"system": "x" * 60, "messages": [{"role": "user", "content": question}]}
    n = len(question) - 4 + 60
    shares = {"instructions": 60, "Tokens that it raises": 32, "Excerpts": 26, "the rest": 5}
    assert sum(shares.values()) == n
    assert request_parts([asked]) == ", ".join(f"{v / n:.0%} {k}" for k, v in shares.items())


def test_the_table_of_prices_has_a_column_for_each_task():
    tally = RequestTally(n=2, chars=7_200_000)
    table = price_table({"explain": (tally, 1.0, 500_000), "detect": (tally, 2.0, 1)}).splitlines()
    assert table[0].split() == ["explain", "detect"]
    assert table[1].split() == ["tokens", "in", "2,400,000", "4,800,000"]
    haiku = next(line for line in table if line.startswith("haiku-5-5"))
    assert haiku.split() == ["haiku-5-5", "$0.37", "$0.24"]
    assert any(line.startswith("mythos") and "unknown" in line for line in table)


def test_report_statistics():
    labels = {
        1: {"common_semantic": "Legal terms, including contracts", "certainty": 0.9},
        2: {"common_semantic": "the terms of legal contracts including", "certainty": 0.7},
        3: {"common_semantic": "Sentence-final punctuation", "certainty": None},
        4: {
            "common_semantic": "red wine",
            "score": {"detect": {"balanced_accuracy": 0.9, "ci_low": 0.8}},
        },
    }
    usage = {
        ("claude-haiku-5-5", False): [2_000_000, 0],
        ("claude-haiku-5-5", True): [1_000_000, 0],
    }
    # Scoring answers are responses, too, but explain nothing.
    explained = ["label", "label", "label", "label", "refusal"]
    kinds = {"label": 4, "refusal": 1, "score": 9, "failure": 3}
    report = build_report(labels, kinds, usage, MeasuredLabels(), explained)
    assert report["hedged_share"] == 0.5 and report["artefact_share"] == 0.25
    assert report["near_duplicate_share"] == 0.5 and report["labelled_share"] == 0.8
    assert report["certainty"]["mean"] == 0.8 and report["cost"]["dollars"] == 0.2
    assert report["cost"]["dollars_per_label"] == 0.05
    detect = report["scores"]["detect"]
    assert (detect["latents"], detect["mean"], detect["above_chance_share"]) == (1, 0.9, 1.0)
    # What was not tested is not mentioned.
    assert list(report["scores"]) == ["detect"] and "shuffled_label_controls" not in report
    assert content_words("The END of a day") == {"end", "day"}
    page = report_page(report, "<Labels>")
    assert "&lt;Labels&gt;" in page and "Legal terms, including contracts" in page


@given(st.dictionaries(st.integers(0, 99), st.text("abcd ", max_size=12), max_size=12))
def test_near_duplicates_are_all_pairs_of_enough_common_words(texts: dict[int, str]):
    words = {i: content_words(text) for i, text in texts.items()}
    expected = {
        (a, b) if list(words).index(a) < list(words).index(b) else (b, a)
        for a in words
        for b in words
        if a < b and words[a] | words[b] and len(words[a] & words[b]) >= 0.6 * len(words[a] | words[b])
        and words[a] and words[b]
    }  # fmt: skip
    assert set(near_duplicates(texts)) == expected


def test_a_report_says_which_labels_are_too_broad_or_narrow():
    def tested(value: float, tpr: float, fpr: float) -> dict[str, Any]:
        rates = {"true_positive_rate": tpr, "false_positive_rate": fpr}
        found = {"balanced_accuracy": value, "ci_low": value - 0.1, "ci_high": value, "n": 40}
        return {"common_semantic": f"label {value}", "score": {"detect": found | rates}}

    labels = {1: tested(0.95, 0.95, 0.05), 2: tested(0.6, 0.3, 0.1), 3: tested(0.55, 0.9, 0.8)}
    measured = MeasuredLabels(controls={"detect": {9: [Outcome(1, True), Outcome(0, False)]}})
    report = build_report(labels, {"label": 3}, {("local", True): [5, 5]}, measured, ["label"] * 3)
    detect = report["scores"]["detect"]
    assert (detect["too_narrow"], detect["too_broad"], detect["chance"]) == (1, 1, 0.5)
    assert report["worst_by_detect"] == ["0.55 3 label 0.55 (too broad)"]
    assert report["best_by_detect"] == ["0.95 1 label 0.95"]
    assert report["cost"]["dollars"] == "unknown" and "dollars_per_label" not in report["cost"]
