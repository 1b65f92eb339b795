"""The steering benchmark's judge, against the mock of the Message Batches API."""

import json

import pytest

from benchmarks.steering import PROMPTS
from benchmarks.steering_methods import Cell
from saint.interpretation.responses import parse_answer
from saint.stage.files import write_json
from tests.support.mock_batches import MockApi
from tests.support.program import call


def ratings(params: dict) -> str:
    shown = json.loads(params["messages"][0]["content"])
    concept = 2 if shown["concept"] in shown["continuation"] else 0
    fluency = 0 if "broken" in shown["continuation"] else 1
    return json.dumps({"concept": concept, "beginning": 2, "fluency": fluency})


@pytest.fixture
def site(tmp_path):
    steered = [("film", "a film"), ("film", "film broken"), ("war", "war"), ("war", "")]
    texts = {
        Cell("plain", 0.0, 0): [("", "nothing")] * 4,
        Cell("means", 8.0, 0): steered,
        Cell("means", 8.0, 1): [("film", "another seed")],
    }
    for cell, rows in texts.items():
        own = [{"concept": c, "prompt": i, "text": t} for i, (c, t) in enumerate(rows)]
        record = {"method": cell.method, "dose": cell.dose, "seed": cell.seed, "rows": own}
        write_json(cell.path(tmp_path), record)
    api = MockApi(answer=ratings)
    yield tmp_path, api
    api.close()


def judge(site, *more, **changes):
    directory, api = site
    flags = ["--output_dir", directory, "--settle_s", 0.2, *more]
    return call("benchmarks.steering_judge", *flags, env={**api.env, **changes})


def retrieve(site):
    directory, api = site
    files = ["--response_ids_filepath", directory / "judge.yaml"]
    files += ["--response_output_dir", directory / "judge", "--wait", "--poll_interval_s", 0.02]
    return call("interpret_top_sentences_retrieve_batches", *files, env=api.env)


def test_texts_are_quoted_then_rated_once_and_reported(site):
    directory, api = site
    quoted = judge(site, "--dry_run")
    assert quoted.returncode == 0 and "8 requests" in quoted.stderr and "$0.0" in quoted.stderr
    assert not api.batches and not (directory / "judge.ledger.jsonl").exists()
    over = judge(site, "--max_cost_usd", 0)
    assert over.returncode == 1 and "exceeds --max_cost_usd" in over.last_line and not api.batches
    early = judge(site, "--report")
    assert early.returncode == 1 and early.last_line.startswith("error: ")

    api.faults += ["drop_after"]  # the batch is made, and its answer never comes
    assert judge(site).returncode == 0
    assert "has been sent already" in judge(site).stderr
    assert len(api.batches) == 1 and sum(api.paid().values()) == 8
    shown = json.loads(api.batches["msgbatch_0000"].requests[0]["params"]["messages"][0]["content"])
    assert shown.keys() == {"concept", "beginning", "continuation"}, "not how it came about"
    assert shown["beginning"] in PROMPTS

    assert retrieve(site).returncode == 0
    done = judge(site, "--report")
    assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout.splitlines()[-1])
    # film: 3/(1/2+1/2+1/1) and 0 for the broken one; war: one of two; plain says neither.
    score = 3 / (1 / 2 + 1 / 2 + 1)
    assert rows["means@8"] == {
        "score": score / 2, "concept": 1.5, "beginning": 2.0, "fluency": 0.75, "texts": 4,
    }  # fmt: skip
    assert rows["plain@0"]["score"] == 0 and rows["plain@0"]["texts"] == 4
    assert json.loads((directory / "judge.json").read_text()) == rows


def test_other_texts_and_unknown_cells_are_one_clear_line(site):
    assert judge(site).returncode == 0
    other = judge(site, "--n_texts", 1)
    assert other.returncode == 1 and "was sent with texts" in other.last_line
    unknown = judge(site, "--cells", "means@9@0")
    assert unknown.last_line.startswith("error: ") and "means@8@0" in unknown.last_line


@pytest.mark.parametrize(
    "content", ["no", '{"concept": 3, "beginning": 1, "fluency": 1}', '{"concept": true}']
)
def test_what_is_no_rating_is_a_failure_and_never_a_zero(content):
    assert parse_answer("judge", {"content": content}).kind == "failure"
