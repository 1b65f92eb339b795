"""Several gloo processes do what one does: the same bytes, and averaged gradients."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from program import REPO, call, call_ranks
from test_pipeline import capture_args, root, train_args, tree_bytes  # noqa: F401

from sae import AuxK, losses_and_gradients, standardise

FLAGS = {"num_epochs": 2, "batch_size": 64, "logs_per_epoch": 1000, "dead_tokens": 128}


def torchrun(n_ranks: int, stage: str, *args: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc_per_node", str(n_ranks), str(REPO / f"{stage}.py"), *map(str, args)]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(
        command, capture_output=True, text=True, timeout=240, env=env, check=False
    )


def test_capture_gives_the_same_bytes_on_two_ranks(root: Path, tmp_path: Path):  # noqa: F811
    finished = torchrun(2, "capture_activations", *capture_args(root, tmp_path / "acts"))
    assert finished.returncode == 0, finished.stderr
    assert tree_bytes(tmp_path / "acts") == tree_bytes(root / "acts")


@pytest.fixture(scope="module")
def alone(root: Path, tmp_path_factory) -> Path:  # noqa: F811
    """A run of one process, without a process group."""
    path = tmp_path_factory.mktemp("alone") / "sae.pt"
    assert call("sae_training", *train_args(root, path, **FLAGS)).returncode == 0
    return path


@pytest.mark.parametrize("n_ranks", [2, 4])
def test_ranks_equal_one_rank_on_the_whole_batch(
    root: Path,  # noqa: F811
    alone: Path,
    tmp_path: Path,
    n_ranks: int,
):
    ranks = call_ranks(n_ranks, "sae_training", *train_args(root, tmp_path / "sae.pt", **FLAGS))
    assert [rank.returncode for rank in ranks] == [0] * n_ranks, ranks[0].stderr
    one, many = (
        [json.loads(line) for line in path.with_name("sae.metrics.jsonl").open()][:20]
        for path in (alone, tmp_path / "sae.pt")
    )
    assert len(one) == 20
    for alone_entry, entry in zip(one, many, strict=True):
        assert entry["train/loss"] == pytest.approx(alone_entry["train/loss"], rel=1e-3)
        assert entry["debug/dead_latents_ratio"] == alone_entry["debug/dead_latents_ratio"]
    assert any(entry["train/aux_loss"] > 0 for entry in one)


def test_averaged_shares_are_the_gradient_of_the_whole_batch():
    from test_sae import gradient, make_sae

    sae, x = make_sae(), standardise(torch.randn(64, 24))[0]
    aux = AuxK(torch.arange(0, 64, 5), 3, 1 / 32)
    losses_and_gradients(sae, x, aux, kernel="sparse")
    whole = [gradient(p).clone() for p in sae.parameters()]
    shares = []
    for part in x.chunk(4):
        sae.zero_grad(set_to_none=True)
        losses_and_gradients(sae, part, aux, kernel="sparse")
        shares.append([gradient(p).clone() for p in sae.parameters()])
    for i, wanted in enumerate(whole):
        mean = torch.stack([share[i] for share in shares]).mean(0)
        assert float((mean - wanted).norm() / wanted.norm()) < 1e-6
