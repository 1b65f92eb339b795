"""A run that older code began goes on with these scripts (tests/fixtures/old_run/README.md)."""

from __future__ import annotations

import json
import tarfile
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
import yaml

from sae import load_sae
from saint.evidence.file import open_evidence
from saint.store.activation_store import open_store
from saint.store.shuffled_rows import open_batched_rows
from tests.support.program import REPO, Finished, call


@pytest.fixture
def run(tmp_path: Path) -> Path:
    with tarfile.open(REPO / "tests/fixtures/old_run/run.tar.xz") as archive:
        archive.extractall(tmp_path, filter="data")
    return tmp_path


def capture(run: Path, out: str, **changes: object) -> Finished:
    flags = {
        "model_dir": run / "model", "dataset_dir": run / "data", "output_dir": run / out,
        "num_samples": 120, "layers": "1", "sentences_per_shard": 40, "batch_tokens": 512,
        "dtype": "float32", "device": "cpu",
    } | changes  # fmt: skip
    return call_with("capture_activations", flags)


def preprocess(run: Path, out: str, mean: str) -> Finished:
    flags = {
        "input_dir": run / "acts", "output_dir": run / out, "mean_filepath": run / mean,
        "batch_size": 32, "num_processes": 1, "rows_per_file": 200, "memory_gb": 0.02,
        "held_out_fraction": 0.1,
    }  # fmt: skip
    return call_with("sae_preprocessing", flags)


def train(run: Path, save: str) -> Finished:
    flags = {
        "data_dir": run / "rows", "b_pre_path": run / "mean.pt", "model_save_path": run / save,
        "n_latents": 24, "k": 3, "num_epochs": 4, "logs_per_epoch": 2, "kernels": "torch",
        "device": "cpu", "keep_last_n": 1, "dead_tokens": 200, "k_aux": 4,
    }  # fmt: skip
    return call_with("sae_training", flags)


def call_with(stage: str, flags: Mapping[str, object]) -> Finished:
    finished = call(
        stage, *(part for name, value in flags.items() for part in (f"--{name}", value))
    )
    assert finished.returncode == 0, finished.stderr
    return finished


def test_a_store_that_was_killed_half_way_goes_on(run: Path):
    kept = run / "acts_killed/layer_1/shard_00000.safetensors"
    made = kept.stat().st_mtime_ns
    assert "697 tokens of 120 sentences" in capture(run, "acts_killed").last_line
    assert kept.stat().st_mtime_ns == made and not list((run / "acts_killed").rglob("*.tmp"))
    old, new = open_store(run / "acts"), open_store(run / "acts_killed")
    for index in range(3):
        theirs, mine = old.read_shard(index), new.read_shard(index)
        assert torch.equal(mine.token_ids, theirs.token_ids)
        assert torch.equal(mine.sentence_ids, theirs.sentence_ids)
        # Another processor may round the last bit of a bfloat16 the other way.
        torch.testing.assert_close(mine.read(), theirs.read(), rtol=1e-2, atol=1e-3)


def test_a_finished_store_and_its_rows_are_done_and_can_be_extended(run: Path):
    assert "done already" in capture(run, "acts").last_line
    assert "done already" in preprocess(run, "rows", "mean.pt").last_line
    assert "done already" in train(run, "sae.pt").last_line
    first = (run / "acts/layer_1/shard_00000.safetensors").read_bytes()
    assert "of 129 sentences" in capture(run, "acts", num_samples=130).stderr
    assert (run / "acts/layer_1/shard_00000.safetensors").read_bytes() == first


def test_a_shuffle_that_was_killed_half_way_ends_with_the_old_bytes(run: Path):
    preprocess(run, "rows_killed", "mean_killed.pt")
    for old in (run / "rows").glob("*.safetensors"):
        assert (run / "rows_killed" / old.name).read_bytes() == old.read_bytes()
    assert (run / "mean_killed.pt").read_bytes() == (run / "mean.pt").read_bytes()
    assert open_batched_rows(run / "rows_killed").n_rows("train") == 609
    assert not list((run / "rows_killed").glob(".*"))


def test_a_training_checkpoint_goes_on_to_the_old_weights(run: Path):
    finished = train(run, "stopped/sae.pt")
    assert "continuing at step 12 of 76" in finished.stderr
    theirs, mine = (load_sae(run / name, device="cpu") for name in ("sae.pt", "stopped/sae.pt"))
    assert mine.config == theirs.config
    for name, tensor in theirs.state_dict().items():
        torch.testing.assert_close(mine.state_dict()[name], tensor, rtol=1e-4, atol=1e-5)
    steps = [json.loads(line)["step"] for line in (run / "stopped/sae.metrics.jsonl").open()]
    assert steps == sorted(set(steps)) and steps[-1] == 76


def test_an_old_sae_gives_the_old_evidence(run: Path):
    flags = {
        "data_dir": run / "acts", "model_path": run / "sae.pt", "top_n": 6, "device": "cpu",
        "captured_data_output_dir": run / "again",
    }  # fmt: skip
    call_with("capture_top_activating_sentences", flags)
    old, new = (open_evidence(run / name / "evidence.parquet") for name in ("tops", "again"))
    for theirs, mine in zip(old.iter_latents(), new.iter_latents(), strict=True):
        assert mine["max_activation"] == pytest.approx(theirs["max_activation"], rel=1e-3)
        assert mine["n_firing_sentences"] == theirs["n_firing_sentences"]


def test_an_old_ledger_is_retrieved_already_and_parses_to_the_old_labels(run: Path):
    asked, labels = run / "asked", run / "asked/output/parsed_responses.yaml"
    files = {"response_ids_filepath": asked / "tops/response_ids.yaml"}
    nobody = {"ANTHROPIC_API_KEY": "nokey", "ANTHROPIC_BASE_URL": "http://127.0.0.1:9"}
    ids = ("--response_ids_filepath", files["response_ids_filepath"])
    retrieve = (*ids, "--response_output_dir", asked / "output")
    got = call("interpret_top_sentences_retrieve_batches", *retrieve, env=nobody)
    assert got.returncode == 0, got.stderr
    old = yaml.safe_load(labels.read_text())
    flags = files | {
        "retrieved_responses_dir": asked / "output",
        "parsed_responses_output_filepath": run / "elsewhere/labels.yaml",
    }
    call_with("interpret_top_sentences_parse_responses", flags)
    assert yaml.safe_load((run / "elsewhere/labels.yaml").read_text()) == old
