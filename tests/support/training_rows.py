"""Rows to train on, and what a training run leaves."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from sae import standardise
from saint.stage.manifests import Output
from saint.training.trainer import Trainer


def write_rows(root: Path, *, seed: int = 0, layer: int | None = None) -> Path:
    """Write rows and their mean as preprocessing leaves them; return `root`."""
    output = Output(root / "rows", "sae_preprocessing", {"seed": seed}, {}, single_file=False)
    output.begin(overwrite=False)
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(6, 16, generator=generator)
    batches = []
    for name, n in (("train", 256), ("val", 64)):
        batches.append((torch.randn(n, 6, generator=generator).relu() @ mixing).bfloat16())
        save_file({"activations": batches[-1]}, output.path / f"{name}_00000.safetensors")
    facts = dict.fromkeys(("max_token_length", "model_fingerprint", "dataset_fingerprint"))
    facts |= {"d_model": 16, "rows": {"train": [256], "val": [64]}, "batch_size": 32}
    facts |= {"layer": layer, "hook_point": "resid_pre", "prepend_bos": True}
    facts |= {"held_out_fraction": 0.05, "held_out_seed": 0}
    x = standardise(torch.cat(batches[:-1]))[0].double()
    facts |= {"variance": float((x - x.mean(0)).square().sum(1).mean())}
    names = ["train_00000.safetensors", "val_00000.safetensors"]
    output.finish(facts=facts, counts={}, files=names)
    torch.save(torch.zeros(16), root / "mean.pt")
    return root


def on_step(monkeypatch: pytest.MonkeyPatch, steps: set[int], act) -> None:
    """Give these steps act(rows) for their prepared rows."""
    plain = Trainer.step_on

    def step_on(self, micros):
        if self.step in steps:
            micros = [act(rows) for rows in micros]
        return plain(self, micros)

    monkeypatch.setattr(Trainer, "step_on", step_on)


def metrics_of(save: Path) -> list[dict]:
    return [json.loads(line) for line in save.with_name(f"{save.stem}.metrics.jsonl").open()]


def without_times(entry: dict) -> dict:
    return {name: value for name, value in entry.items() if name != "tokens_per_s"}
