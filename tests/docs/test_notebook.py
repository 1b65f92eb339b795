"""The notebook example of docs/files.md, run on what the stages write."""

from __future__ import annotations

import importlib
import importlib.util
import re
from pathlib import Path
from typing import Any

import pytest
import torch

import capture_top_activating_sentences
from sae import load_sae
from saint.store.activation_store import open_store
from tests.support.tiny_store import make_store

ROOT = Path(__file__).resolve().parents[2]


def read_in_one_line(text: str, tops: Path, n_latents: int) -> None:
    """Run the lines of pandas, polars and duckdb, those that are installed."""
    lines = re.search(r"^```python\n(pandas.*?)^```", text, re.S | re.M)
    assert lines
    for line in lines[1].splitlines():
        name = line.split(".")[0]
        if importlib.util.find_spec(name) is None:
            continue
        path = (tops / "evidence.parquet").as_posix()
        value = eval(line.replace("evidence.parquet", path), {name: importlib.import_module(name)})
        assert len(value) >= n_latents // 2


def test_the_notebook_example_decodes_and_reads_windows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    run = tmp_path / "runs" / "quickstart"
    run.mkdir(parents=True)
    store = make_store(run)
    (run / "activations").rename(run / "activation_outputs")
    (run / "sae.pt").rename(run / "trained_sae.pt")
    tops = run / "top_activating_sentences"
    flags = ["--data_dir", run / "activation_outputs", "--model_path", run / "trained_sae.pt"]
    flags += ["--captured_data_output_dir", tops, "--device", "cpu"]
    capture_top_activating_sentences.main([str(flag) for flag in flags])
    monkeypatch.chdir(tmp_path)
    text = (ROOT / "docs" / "files.md").read_text(encoding="utf-8")
    found = re.search(r"^```python\n(.*?)^```", text, re.S | re.M)
    assert found
    latent = max(
        range(store.n_latents), key=lambda j: sum(d[:, j].max() for d in store.dense.values())
    )
    names: dict[str, Any] = {}
    exec(found[1].replace("latent(896)", f"latent({latent})"), names)
    sae = load_sae(run / "trained_sae.pt", device="cpu")
    raw = open_store(run / "activation_outputs").read_shard(0).read(slice(0, 100))
    torch.testing.assert_close(names["x_hat"], sae.reconstruct(raw.float()))
    values, latents = names["active"].matrices()
    dense = torch.zeros(len(raw), store.n_latents).scatter_(1, latents, values)
    assert (dense > 0).any() and names["windows"] and all(names["windows"])
    read_in_one_line(text, tops, store.n_latents)
    best = max(float(d[:, latent].max()) for d in store.dense.values())
    assert names["latent"]["max_activation"] == pytest.approx(best, rel=1e-5)
