"""Several gloo processes do what one does: the same bytes, and the whole batch's gradient."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from program import REPO, call_ranks, context
from test_pipeline import capture_args, root, train_args, tree_bytes  # noqa: F401
from training_ranks import rank_main, walk

from saint.runtime import Workers


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


def test_training_on_two_ranks_is_training_on_one(root: Path, tmp_path: Path):  # noqa: F811
    ranks = call_ranks(2, "sae_training", *train_args(root, tmp_path / "sae.pt"))
    assert [rank.returncode for rank in ranks] == [0, 0], ranks[0].stderr
    paths = (root / "trained_sae.metrics.jsonl", tmp_path / "sae.metrics.jsonl")
    alone, together = ([json.loads(line) for line in path.open()] for path in paths)
    assert len(alone) == len(together) > 10
    for one, many in zip(alone, together, strict=True):
        for name in {"train/loss", "val/fvu", "train/grad_norm"} & one.keys():
            assert many[name] == pytest.approx(one[name], rel=1e-3)


def test_four_ranks_take_one_ranks_steps_with_all_kernels(tmp_path: Path):
    processes = [context().Process(target=rank_main, args=(i, 4, tmp_path)) for i in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
        assert process.exitcode == 0
    ranks = [torch.load(tmp_path / f"{i}.pt", weights_only=True) for i in range(4)]
    for kernels in ("cpp", "sparse"):
        alone = walk(kernels, Workers(0, 1, torch.device("cpu")))
        assert alone["n_dead"] > 5
        for rank in ranks:
            assert rank[kernels]["losses"] == pytest.approx(alone["losses"], rel=1e-3)
            for name, wanted in alone["first"].items():
                difference = (rank[kernels]["first"][name] - wanted).norm() / wanted.norm()
                assert difference < 1e-6, (kernels, name)
            for name, weights in rank[kernels]["weights"].items():
                assert torch.equal(weights, ranks[0][kernels]["weights"][name])
                torch.testing.assert_close(weights, alone["weights"][name], rtol=0, atol=1e-4)
