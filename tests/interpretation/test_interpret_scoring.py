"""Scores measure what a judge knows: mock judges of known accuracy, controls, disjoint splits."""

from __future__ import annotations

import json
import random
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from saint.evidence.labels import load_labels
from saint.interpretation.held_out import detect_cases, fuzz_cases
from saint.interpretation.held_out import test_prompts as make_tests
from saint.interpretation.prompts import (
    Prompt,
    PromptOptions,
    effect_prompt,
    explain_prompt,
    render,
)
from saint.interpretation.prompts import (
    test_sentences as held_out_sentences,
)
from saint.interpretation.scores import Outcome, outcomes, pooled, score
from tests.support.interpretation_data import (
    example,
    judge,
    row,
    write_dataset,
    write_evidence,
    write_top_sentences,
)
from tests.support.interpretation_workplace import Workplace, error_of


@pytest.mark.parametrize("accuracy", [1.0, 0.8, 0.5])
def test_a_judge_of_known_accuracy_is_measured_as_such(tmp_path: Path, accuracy: float):
    work = Workplace(tmp_path, n_latents=12)
    work.api.answer = judge(accuracy)
    assert len(work.everything("--no_smoke_test")) == 12
    for task in ("detect", "fuzz", "intruder"):
        done = work.send("--task", task, "--labels_path", work.labels, "--n_controls", 6)
        assert done.returncode == 0, done.stderr
    assert work.retrieve().returncode == 0
    assert work.parse("--report").returncode == 0
    report = json.loads((work.output / "parsed_responses.report.json").read_text())
    scores = report["scores"]
    assert all(scores[task]["latents"] == 12 for task in scores)
    # 480, 240 and 60 decisions: four standard errors.
    assert scores["detect"]["mean"] == pytest.approx(accuracy, abs=0.09)
    assert scores["fuzz"]["mean"] == pytest.approx(accuracy, abs=0.13)
    assert scores["intruder"]["mean"] == pytest.approx(accuracy, abs=0.26)
    # 240, 120 and 30 decisions.
    for task, chance, width in (("detect", 0.5, 0.13), ("fuzz", 0.5, 0.16), ("intruder", 0.2, 0.3)):
        control = report["shuffled_label_controls"][task]
        assert control["latents"] == 6 and control["mean"] == pytest.approx(chance, abs=width)
    labels = yaml.safe_load(work.labels.read_text())
    found = labels[3]["score"]["detect"]
    assert found["n"] == 40 and found["ci_low"] <= found["balanced_accuracy"] <= found["ci_high"]
    assert found["ci_low"] < found["ci_high"]
    assert len(work.api.live_requests) == 3
    controlled = [r for r in labels.values() if "control" in r["score"]["intruder"]]
    assert len(controlled) == 6 and all(
        0 <= r["score"]["intruder"]["control"] <= 1 for r in controlled
    )
    work.api.close()


def test_the_intruder_test_needs_no_label(tmp_path: Path):
    work = Workplace(tmp_path, n_latents=6)
    work.api.answer = judge(1.0)
    assert work.send("--task", "intruder", "--n_controls", 2).returncode == 0
    assert work.retrieve().returncode == 0
    done = work.parse("--report")
    assert done.returncode == 0 and "0 labels" in done.stderr, done.stderr
    found = yaml.safe_load(work.labels.read_text())
    assert sorted(found) == list(range(6))
    for record in found.values():
        # No word stands in for the label that is not there.
        assert record["common_semantic"] == "" and record["certainty"] is None
        measured = record["score"]["intruder"]
        assert measured["accuracy"] == 1 and measured["ci_low"] < 1 == measured["ci_high"]
        assert measured["n"] == 20 and 0 <= measured["chance"] <= 0.5  # what the controls reached
    assert sum("control" in r["score"]["intruder"] for r in found.values()) == 2
    report = json.loads((work.output / "parsed_responses.report.json").read_text())
    assert report["labels"] == 0 and report["scores"]["intruder"]["latents"] == 6
    assert report["shuffled_label_controls"]["intruder"]["latents"] == 2
    label = load_labels(work.labels)[3]
    assert label.text == "" and label.intruder == 1.0 and label.score is None
    # There is nothing that detection could test.
    assert "no latent is left" in error_of(
        work.send("--task", "detect", "--labels_path", work.labels)
    )
    # Words from the evidence may name them, and Claude some of them later: all scores stay.
    words = work.top_tokens(with_answers=True)
    assert words.returncode == 0, words.stderr
    named = yaml.safe_load(work.labels.read_text())
    assert named[3]["common_semantic"] == "topic3" and named[3]["score"]["intruder"]["n"] == 20
    assert work.send("--latents", "2,4").returncode == 0
    work.retrieve()
    for _ in range(2):
        assert work.parse().returncode == 0
        named = yaml.safe_load(work.labels.read_text())
        assert {i for i, r in named.items() if r["common_semantic"]} == {2, 4}
        assert list(named)[:2] == [2, 4] and named[2]["common_semantic"] == "the word topic2"
        assert all(r["score"]["intruder"]["accuracy"] == 1 for r in named.values())
    work.api.close()


def test_strangers_share_no_pattern():
    others = [row(i) for i in (4, 5, 6, 7, 8)]
    prompts = make_tests("intruder_control", row(3), PromptOptions(), strangers=others)
    text = "\n".join(prompt.text for prompt in prompts)
    assert text and "topic3" not in text
    for part in text.split("Set ")[1:]:
        topics = re.findall(r"«topic(\d)»", part)
        assert len(topics) == len(set(topics)) == 4


def test_scores_belong_to_the_label_they_measured(tmp_path: Path):
    work = Workplace(tmp_path, n_latents=5)
    work.api.answer = judge(1.0)
    work.everything("--no_smoke_test")
    work.send("--task", "detect", "--labels_path", work.labels, "--n_controls", 0)
    work.retrieve()
    work.parse()
    labels = yaml.safe_load(work.labels.read_text())
    assert labels[2]["score"]["detect"]["balanced_accuracy"] == 1.0
    # A label of another text has not been measured, and is asked about again.
    plain = work.api.answer
    work.api.answer = lambda p: plain(p).replace("the word", "any word")
    work.everything("--no_smoke_test", "--overwrite")
    assert "score" not in yaml.safe_load(work.labels.read_text())[2]
    assert "scores left out: 5 of a label of another text" in work.calls[-1].stderr
    work.api.answer = lambda p: plain({**p, "messages": [_the_word(p)]})
    work.send("--task", "detect", "--labels_path", work.labels, "--n_controls", 0)
    work.retrieve()
    work.parse()
    assert yaml.safe_load(work.labels.read_text())[2]["score"]["detect"]["n"] == 40
    work.api.close()


def test_parsing_depends_on_what_was_retrieved_alone(tmp_path: Path):
    """The same bytes from an empty place, after itself, and over an output of another form."""
    work = Workplace(tmp_path, n_latents=3)
    work.api.answer = judge(1.0)
    work.everything("--no_smoke_test")
    for task in ("detect", "intruder"):
        assert work.send("--task", task, "--labels_path", work.labels).returncode == 0
    work.retrieve()
    assert work.parse().returncode == 0
    whole = work.labels.read_bytes()
    assert work.parse().returncode == 0 and work.labels.read_bytes() == whole
    for path in work.output.glob("parsed_responses*"):
        path.unlink()
    assert work.top_tokens().returncode == 0 and work.labels.read_bytes() != whole
    assert work.parse().returncode == 0 and work.labels.read_bytes() == whole
    work.api.close()


def test_labels_of_ones_own_are_tested_and_stay_their_own(tmp_path: Path):
    work = Workplace(tmp_path, n_latents=3)
    work.api.answer = judge(1.0)
    mine = tmp_path / "mine.yaml"
    rows = {i: {"common_semantic": f"the word topic{i}", "source": "me"} for i in range(3)}
    mine.write_text(yaml.safe_dump(rows))
    assert work.send("--task", "detect", "--labels_path", mine, "--n_controls", 0).returncode == 0
    work.retrieve()
    assert work.parse().returncode == 0
    found = yaml.safe_load(work.labels.read_text())
    assert {i: r["common_semantic"] for i, r in found.items()} == {
        i: r["common_semantic"] for i, r in rows.items()
    }
    assert all(r["source"] == "me" and r["score"]["detect"]["n"] == 40 for r in found.values())
    work.api.close()


def _replace_evidence(work: Workplace) -> None:
    """Write another dictionary's evidence in its place: latent i fires on what i + 1 fired on."""
    n = len(work.rows)
    rows = [row((i + 1) % n) | {"latent": i} for i in range(n)]
    write_evidence(work.tops / "evidence.parquet", rows)


def _with_intruder_scores(work: Workplace) -> list[int]:
    found = yaml.safe_load(work.labels.read_text())
    return sorted(i for i, r in found.items() if "intruder" in (r.get("score") or {}))


@pytest.mark.parametrize("named_by", ["top tokens", "Claude"])
def test_intruder_scores_are_not_given_to_another_dictionary(tmp_path: Path, named_by: str):
    work = Workplace(tmp_path, n_latents=6)
    work.api.answer = judge(1.0)
    work.send("--task", "intruder", "--n_controls", 2)
    work.retrieve()
    assert work.parse().returncode == 0
    assert _with_intruder_scores(work) == list(range(6))
    _replace_evidence(work)
    if named_by == "Claude":
        assert work.send("--no_smoke_test").returncode == 0
        work.retrieve()
    way = work.parse if named_by == "Claude" else lambda: work.top_tokens(with_answers=True)
    done = way()
    assert done.returncode == 0, done.stderr
    # Six latents and two controls.
    assert "scores left out: 8 measured on other evidence" in done.stderr
    assert "1" in yaml.safe_load(work.labels.read_text())[0]["common_semantic"]
    assert not _with_intruder_scores(work)
    manifest = json.loads((work.output / "parsed_responses.yaml.manifest.json").read_text())
    assert not manifest["facts"]["controls"]
    # Asked about the new latents, the test's answers are theirs.
    assert work.send("--task", "intruder", "--n_controls", 2, "--overwrite").returncode == 0
    work.retrieve()
    done = way()
    assert done.returncode == 0 and "left out" not in done.stderr
    assert _with_intruder_scores(work) == list(range(6))
    work.api.close()


def test_labels_from_top_tokens_follow_the_evidence(tmp_path: Path):
    work = Workplace(tmp_path, n_latents=5)
    work.api.answer = lambda _: '{"fires": [1]}'
    work.top_tokens()
    work.send("--task", "detect", "--labels_path", work.labels, "--n_controls", 0)
    work.retrieve()
    assert work.top_tokens(with_answers=True).returncode == 0
    found = yaml.safe_load(work.labels.read_text())
    assert all(r["source"] == "top tokens" and "detect" in r["score"] for r in found.values())
    assert "its scores go" in work.top_tokens().stderr
    _replace_evidence(work)
    done = work.top_tokens(with_answers=True)
    assert done.returncode == 0 and "scores left out: 5 of a label of another text" in done.stderr
    found = yaml.safe_load(work.labels.read_text())
    assert [found[i]["common_semantic"] for i in range(5)] == [f"topic{(i + 1) % 5}" for i in found]
    assert not any("score" in r for r in found.values())
    # What a model wrote is kept.
    work.api.answer = judge(1.0)
    labels = work.everything("--no_smoke_test")
    assert "a model wrote these labels" in work.top_tokens().stderr
    assert yaml.safe_load(work.labels.read_text()) == labels
    work.api.close()


def test_answers_of_the_past_alone_write_nothing(tmp_path: Path):
    work = Workplace(tmp_path)
    work.api.answer = judge(1.0)
    assert work.send("--no_smoke_test").returncode == 0
    work.retrieve()
    work.api.polls_until_ended = 10**6
    assert work.send("--no_smoke_test", "--overwrite").returncode == 0
    assert "nothing that was retrieved" in error_of(work.parse())
    assert not work.labels.exists()
    work.api.close()


def _the_word(params: dict[str, Any]) -> dict[str, Any]:
    return {"content": params["messages"][0]["content"].replace("any word", "the word")}


def _swapped(latent: int) -> dict[str, Any]:
    """The evidence of another run, whose test split is what the first one's explainer saw."""
    other = {"explain": "test", "test": "explain", "": ""}
    examples = [e | {"split": other[e["split"]]} for e in row(latent)["examples"]]
    return row(latent) | {"examples": examples}


def _n_posts(work: Workplace) -> int:
    return sum(method == "POST" for method, _ in work.api.log)


@pytest.mark.parametrize("made_from", ["the same file", "another file", "the YAML"])
def test_no_label_is_tested_on_what_it_was_made_from(tmp_path: Path, made_from: str):
    work = Workplace(tmp_path, n_latents=3)
    work.api.answer = judge(1.0)
    evidence = work.tops / "evidence.parquet"
    aside = evidence.rename(work.tops / "aside.parquet")
    if made_from == "the YAML":
        work.api.answer = lambda _: json.dumps({"common_semantic": "words", "certainty": 0.9})
        write_top_sentences(work.yaml, 3)
        labels = work.everything("--dataset_dir", write_dataset(tmp_path / "data", 50))
    else:
        labels = work.everything("--evidence_path", aside)
    assert len(labels) == 3
    rows = [row(i) if made_from != "another file" else _swapped(i) for i in range(3)]
    write_evidence(evidence, rows)
    before, asked = work.files(), _n_posts(work)
    for task in ("detect", "fuzz"):
        for dry in ((), ("--dry_run",)):
            done = work.send("--task", task, "--labels_path", work.labels, *dry)
            if made_from == "the same file":
                assert done.returncode == 0 and "not known" not in done.stderr
            else:
                assert "latent 0 would be tested on sentence" in error_of(done)
    if made_from != "the same file":
        assert work.files() == before and _n_posts(work) == asked
    # Labels of which this ledger knows nothing are tested, and it says so.
    work.ids = work.tops / "other_ids.yaml"
    work.api.answer = lambda _: '{"fires": [1]}'
    done = work.send("--task", "detect", "--labels_path", work.labels)
    assert done.returncode == 0 and "3 of 3 labels were not made by this ledger" in done.stderr
    work.api.close()


def test_tests_need_labels_and_evidence(tmp_path: Path):
    work = Workplace(tmp_path)
    work.labels.parent.mkdir()
    work.labels.write_text("77: {common_semantic: x, certainty: 1}\n")
    done = work.send("--task", "detect", "--labels_path", work.labels)
    assert "no latent is left" in error_of(done)
    work.api.close()


@st.composite
def evidence_rows(draw: st.DrawFn) -> dict[str, Any]:
    """Rows with overlapping splits, few examples, and tokens that fire anywhere."""
    base = row(1)
    examples = []
    for _ in range(draw(st.integers(0, 60))):
        kind = draw(st.sampled_from(["top", "quantile", "near_miss", "random"]))
        split = "" if kind == "top" else draw(st.sampled_from(["explain", "test"]))
        word = "hit" if kind in ("top", "quantile") else None
        window = example(kind, split, draw(st.integers(0, 30)), word)
        if word and draw(st.booleans()):
            window["activations"][draw(st.integers(0, 10))] = 0.5
        examples.append(window)
    return base | {"examples": examples}


@settings(max_examples=80, deadline=None)
@given(evidence_rows(), st.integers(1, 20))
def test_splits_are_disjoint_and_classes_balanced(latent: dict[str, Any], n_test: int):
    options = PromptOptions(n_test=n_test)
    texts = {i: f"sentence number {i}" for i in range(31)}
    for ranking in ("max", "mean"):
        shown = set(explain_prompt(latent, ranking, texts, options).key["shown"])
        assert not shown & held_out_sentences(latent)
        for task in ("detect", "fuzz", "intruder"):
            for prompt in make_tests(task, latent, options, label="label"):
                assert not set(prompt.key["tested"]) & shown
    for task in ("detect", "fuzz"):
        prompts = make_tests(task, latent, options, label="label")
        truth = [t for prompt in prompts for t in prompt.key["truth"]]
        assert sum(truth) * 2 == len(truth) and (not truth or 8 <= len(truth) <= 2 * n_test)
        for prompt in prompts:
            n = len(prompt.key["truth"])
            assert n <= options.per_request
            assert len(re.findall(r"^\d+\. ", prompt.text, re.MULTILINE)) == n


def _lines(prompts: list[Prompt]) -> list[tuple[str, int]]:
    pairs = []
    for prompt in prompts:
        lines = re.findall(r"^\d+\. (.*)$", prompt.text, re.MULTILINE)
        pairs += list(zip(lines, prompt.key["truth"], strict=True))
    return pairs


def test_fuzz_marks_as_many_wrong_tokens_as_right_ones():
    lines = _lines(make_tests("fuzz", row(3), PromptOptions(), label="label"))
    assert len(lines) == 20
    for line, truth in lines:
        assert ("«topic3»" in line) == bool(truth)
        assert line.count("«") == 1


def test_detect_hides_the_marks():
    prompts = make_tests("detect", row(3), PromptOptions(), label="label")
    assert len(prompts) == 4
    lines = _lines(prompts)
    assert len(lines) == 40 and all("«" not in line for line, _ in lines)
    assert all(("topic3" in line) == truth for line, truth in lines)
    kinds = [k for prompt in prompts for k in prompt.key["kinds"]]
    assert {k: kinds.count(k) for k in kinds} == {"fires": 20, "near_miss": 10, "random": 10}


def test_intruder_sets_are_twenty_and_share_their_excerpts_evenly():
    prompts = make_tests("intruder", row(3), PromptOptions())
    assert [len(prompt.key["truth"]) for prompt in prompts] == [2] * 10
    for prompt in prompts:
        for part, odd in zip(prompt.text.split("Set ")[1:], prompt.key["truth"], strict=True):
            rows = dict(re.findall(r"^([A-E])\. (.*)$", part, re.MULTILINE))
            assert "«topic3»" not in rows[odd] and "«" in rows[odd]
            assert all("«topic3»" in line for letter, line in rows.items() if letter != odd)


def test_windows_are_cut_around_the_strongest_token():
    window = example("top", "", 1, "hit") | {"tokens": [f" w{i}" for i in range(11)]}
    text = render(window, PromptOptions(window_tokens=4), marks=[5])
    assert text.split() == ["w4", "«w5»", "w6", "w3"] or text.split() == ["w3", "w4", "«w5»", "w6"]
    long = window | {"tokens": ["x" * 500] * 11}
    assert len(render(long, PromptOptions(excerpt_chars=100), marks=[5])) <= 104
    nasty = window | {"tokens": [" «", "»\n", "\x07a", " b", " c", " hit", *[" d"] * 5]}
    assert render(nasty, PromptOptions(), marks=[5]) == "‹›⏎a b c «hit» d d d d d"


def test_neighbouring_marks_are_joined():
    window = example("top", "", 1, "hit") | {"tokens": [" a", " summary", " judgment", " b"]}
    window |= {"start": 0, "position": 1}
    assert render(window, PromptOptions(), marks=[1, 2]) == "a «summary judgment» b"
    spaces = window | {"tokens": [" a", " ", "", " b"]}
    assert render(spaces, PromptOptions(), marks=[1]) == "a«␣» b"


def test_outcomes_and_scores():
    results = outcomes("detect", {"fires": [1, 3]}, [1, 1, 0, 0], ["fires"] * 2 + ["random"] * 2)
    assert results == [
        Outcome(1, True, "fires"),
        Outcome(1, False, "fires"),
        Outcome(0, False, "random"),
        Outcome(0, True, "random"),
    ]
    assert [r.right for r in outcomes("intruder", {"intruders": list("ACC")}, list("ACB"))] == [
        True,
        True,
        False,
    ]
    # Balanced: the classes' shares are averaged, whatever their sizes.
    uneven = [Outcome(1, True)] * 8 + [Outcome(0, True)] + [Outcome(0, False)]
    found = score("detect", uneven, seed=0)
    assert found["balanced_accuracy"] == pytest.approx(0.75)
    assert (found["true_positive_rate"], found["false_positive_rate"]) == (1.0, 0.5)
    assert score("intruder", [Outcome(0, True)] * 5, seed=0)["chance"] == pytest.approx(0.2)
    apart = [Outcome(0, True, "random")] * 3 + [Outcome(0, False, "near_miss"), Outcome(1, True)]
    assert (
        score("detect", apart, seed=0)["random"],
        score("detect", apart, seed=0)["near_miss"],
    ) == (1, 0)


def test_intervals_cover_the_truth():
    """Of 200 latents with a true accuracy of 0.8, about 95 % of the intervals contain it."""
    rng = np.random.default_rng(1)
    covered, everything = 0, []
    for seed in range(200):
        results = [Outcome(i % 2, bool(rng.random() < 0.8)) for i in range(40)]
        everything.append(results)
        found = score("detect", results, seed=seed)
        covered += found["ci_low"] <= 0.8 <= found["ci_high"]
    assert 0.90 <= covered / 200 <= 0.99
    assert pooled("detect", everything)["ci_low"] <= 0.8 <= pooled("detect", everything)["ci_high"]


def test_an_effects_question_shows_the_texts_and_both_kinds_of_tokens():
    latent = row(3) | {"suppressed": [{"token": " less", "value": -1.0}]}
    prompt = effect_prompt(latent, [("Once", " upon a time", " topic3 topic3")], PromptOptions())
    assert prompt is not None
    for words in ("raises: topic3, more", "lowers: less", "Beginning: Once", "turned up:  topic3"):
        assert words in prompt.text
    assert effect_prompt(latent | {"promoted": [], "suppressed": []}, [], PromptOptions()) is None


def test_a_test_s_wrong_excerpts_have_the_shape_of_right_ones():
    """As many tokens before and after the centre, marks at the same distances, pair by pair."""
    for make in (fuzz_cases, detect_cases):
        cases = make(row(3), 20, random.Random(0))
        assert len(cases) >= 8
        for yes, no in zip(cases[::2], cases[1::2], strict=True):
            shapes = [
                (e.centre - e.low, e.high - e.centre, [i - e.centre for i in e.marks])
                for e in (yes.excerpt, no.excerpt)
            ]
            assert (yes.truth, no.truth) == (1, 0) and shapes[0][:2] == shapes[1][:2]
            if make is fuzz_cases:
                assert shapes[0] == shapes[1]
                assert all(no.excerpt.example["activations"][i] == 0 for i in no.excerpt.marks)
