"""Every objective's SAE through the stages that come after training, against dense formulas."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch

from sae import load_sae, standardise
from saint.store.activation_store import open_store
from saint.training.objectives import OBJECTIVES
from tests.support.pipeline import evaluate_args, train_args
from tests.support.program import call


@pytest.mark.parametrize("objective", sorted(OBJECTIVES))
def test_an_objectives_sae_goes_through_every_stage(root: Path, tmp_path: Path, objective: str):
    def run(stage: str, *arguments: object) -> str:
        finished = call(stage, *arguments)
        assert finished.returncode == 0, finished.stderr
        return finished.stdout

    path = tmp_path / "trained_sae.pt"
    run("sae_training", *train_args(root, path, objective=objective, num_epochs=6))
    config = load_sae(path, device="cpu").config
    assert config.activation == OBJECTIVES[objective].activation
    run("sae_evaluation", *evaluate_args(root, sae_model_path=path))
    report = json.loads((tmp_path / "sae_evaluation.json").read_text())
    assert report["l0"] == pytest.approx(4, rel=0.15) and report["fvu"] < 0.6

    evidence = tmp_path / "top" / "evidence.parquet"
    flags = ["--model_path", path, "--model_dir", root / "model", "--top_n", 5]
    where = ["--data_dir", root / "acts", "--captured_data_output_dir", tmp_path / "top"]
    run("capture_top_activating_sentences", *where, *flags)
    store, sae = open_store(root / "acts"), load_sae(path, device="cpu")
    shards = [store.read_shard(index) for index in range(store.n_shards)]
    x = torch.cat([standardise(shard.read(slice(0, None)).float())[0] for shard in shards])
    pre = (x - sae.b_pre) @ sae.W_enc.T + sae.b_enc
    if objective == "topk":
        fires = (pre >= pre.topk(4, dim=1).values[:, -1:]) & (pre > 0)
    else:
        level = config.threshold if sae.threshold is None else sae.threshold
        assert level is not None
        fires = pre > level
        assert fires.sum(1).unique().numel() > 1, "a token takes what it needs"
    columns = pq.read_table(evidence, columns=["latent", "n_firing_tokens"]).to_pydict()
    assert columns["n_firing_tokens"] == fires.sum(0)[columns["latent"]].tolist()

    page = tmp_path / "latents.html"
    run("latent_browser", "--evidence_path", evidence, "--html", page)
    assert page.stat().st_size > 10_000
    latent = int(fires.sum(0).argmax())
    model = ["--llama_model_dir", root / "model", "--sae_model_path", path]
    text = ["--prompt", "a b", "--max_new_tokens", 4, "--temperature", 0]
    printed = run("llama_3_inference_text_completion", *model, *text, "--steer", f"{latent}=+2")
    assert f"latent {latent}: " in printed and "→ target 2." in printed
