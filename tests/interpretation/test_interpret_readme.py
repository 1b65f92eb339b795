"""The request that docs/interpretation.md prints is the one that is sent."""

from __future__ import annotations

import json
import re
from pathlib import Path

import yaml

from interpret_top_sentences_send_batches import DEFAULT_MODEL
from saint.interpretation.client import RequestForm
from saint.interpretation.prices import CHARS_PER_OWN_TOKEN, TOKENS_PER_OWN_TOKEN, prompt_chars
from saint.interpretation.prompts import PromptOptions, explain_prompt, request_params
from tests.support.interpretation_workplace import Workplace

TESTS = Path(__file__).resolve().parent


def test_the_printed_request_is_what_the_code_makes_of_a_quickstarts_latent():
    """readme_latent.json: the part of the evidence that the request shows, of latent 1619."""
    row = json.loads((TESTS / "readme_latent.json").read_text(encoding="utf-8"))
    texts = {int(i): text for i, text in row["sentences"].items()}
    options = PromptOptions(n_quantile=3, n_top=2, n_near_miss=1)
    prompt = explain_prompt(row, "mean", texts, options)
    params = request_params("explain", prompt, model=DEFAULT_MODEL, form=RequestForm())
    readme = (TESTS.parents[1] / "docs" / "interpretation.md").read_text(encoding="utf-8")
    found = re.search(r"```text\n(It fires .*?)\n```", readme, re.DOTALL)
    assert found and found[1] == prompt.text, f"docs/interpretation.md should hold:\n{prompt.text}"
    chars = prompt_chars(params)
    tokens = round(chars / CHARS_PER_OWN_TOKEN * TOKENS_PER_OWN_TOKEN)
    assert f"{chars:,} characters" in readme and f"{tokens:,} tokens" in readme


def test_a_dry_run_prints_whole_requests_as_they_are_sent(work: Workplace):
    done = work.send("--dry_run")
    printed = dict(re.findall(r"^--- (\S+)\n(.*?)(?=^--- |\Z)", done.stdout, re.S | re.M))
    written = (work.tops / "response_ids.dry_run.jsonl").read_text().splitlines()
    assert work.send("--no_smoke_test").returncode == 0
    sent = {r["custom_id"].split("-")[1]: r for r in work.api.batches["msgbatch_0000"].requests}
    assert sorted(printed) == ["explain-0", "explain-1", "explain-2"] and len(written) == 4
    for line in written:
        request = json.loads(line)
        latent = request["custom_id"].split("-")[1]
        assert request["params"] == sent[latent]["params"]
        if latent != "3":
            assert yaml.safe_load(printed[f"explain-{latent}"]) == request
