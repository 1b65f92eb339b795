"""Several gloo processes do what one does: the same bytes, and averaged gradients."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from program import REPO, Finished, call, call_ranks
from test_pipeline import (  # noqa: F401
    capture_args,
    evaluate_args,
    root,
    train_args,
    tree_bytes,
)
from torch import Tensor

from sae import AuxK, losses_and_gradients, standardise
from saint.activation_store import open_store
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


@pytest.mark.parametrize("n_ranks", [2, 4])
def test_ranks_equal_one_rank_on_the_whole_batch(root: Path, tmp_path: Path, n_ranks):  # noqa: F811
    flags = {"num_epochs": 2, "batch_size": 64, "logs_per_epoch": 1000, "dead_tokens": 128}
    alone = torchrun(1, "sae_training", *train_args(root, tmp_path / "one.pt", **flags))
    together = torchrun(n_ranks, "sae_training", *train_args(root, tmp_path / "n.pt", **flags))
    assert alone.returncode == 0 and together.returncode == 0, together.stderr
    losses = {}
    for name in ("one", "n"):
        lines = (tmp_path / f"{name}.metrics.jsonl").read_text().splitlines()
        losses[name] = [json.loads(line) for line in lines][:20]
    assert len(losses["one"]) == 20
    for one, many in zip(losses["one"], losses["n"], strict=True):
        assert many["train/loss"] == pytest.approx(one["train/loss"], rel=1e-3)
        assert many["debug/dead_latents_ratio"] == one["debug/dead_latents_ratio"]
    assert any(entry["train/aux_loss"] > 0 for entry in losses["one"])


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


@pytest.fixture(scope="module")
def split_model(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:  # noqa: F811
    """The pipeline's model as Meta's two shards, its vocabulary padded so that it splits."""
    model_dir = tmp_path_factory.mktemp("split") / "model"
    shutil.copytree(root / "model", model_dir)
    params = json.loads((model_dir / "params.json").read_text())
    state = torch.load(model_dir / "consolidated.00.pth")
    missing = torch.zeros(params["vocab_size"] % 2, params["dim"])
    for name in ("tok_embeddings.weight", "output.weight"):
        state[name] = torch.cat([state[name], missing])
    params["vocab_size"] += len(missing)
    (model_dir / "params.json").write_text(json.dumps(params))
    for shard in range(2):

        def part(name: str, weight: Tensor, shard: int = shard) -> Tensor:
            if weight.ndim == 1:
                return weight
            return weight.chunk(2, dim=1 if name.endswith(("wo.weight", "w2.weight")) else 0)[shard]

        parts = {name: part(name, weight).clone() for name, weight in state.items()}
        torch.save(parts, model_dir / f"consolidated.{shard:02d}.pth")
    return model_dir


def all_well(ranks: list[Finished]) -> Finished:
    """Rank 0 of ranks that all succeeded; the others said nothing."""
    for finished in ranks:
        assert finished.returncode == 0, finished.stderr
    assert not any(finished.stdout for finished in ranks[1:])
    return ranks[0]


@pytest.mark.timeout(240)
def test_a_model_split_over_two_ranks_gives_what_one_process_does(
    root: Path,  # noqa: F811
    split_model: Path,
    tmp_path: Path,
):
    """Capture (two groups of two ranks), evaluation and completion, each against one process."""
    split = {"model_dir": split_model, "model_parallel_size": 2}
    flags = capture_args(root, tmp_path / "acts", **split)
    all_well(call_ranks(4, "capture_activations", *flags))
    assert tree_bytes(tmp_path / "acts").keys() == tree_bytes(root / "acts").keys()
    one, two = open_store(root / "acts"), open_store(tmp_path / "acts")
    assert one.n_shards == two.n_shards > 2
    for index in range(one.n_shards):
        ours, theirs = one.read_shard(index), two.read_shard(index)
        for name in ("token_ids", "offsets", "sentence_ids"):
            assert torch.equal(getattr(ours, name), getattr(theirs, name))
        ours, theirs = ours.activations.float(), theirs.activations.float()
        assert ours.shape == theirs.shape
        assert (ours - theirs).norm() < 0.01 * theirs.norm()

    reports = []
    for name, n_ranks, more in (("one", 1, {"model_dir": split_model}), ("two", 2, split)):
        flags = {
            **more,
            "dtype": "float32",
            "output_path": tmp_path / f"{name}.json",
            "num_samples": 20,
        }
        all_well(call_ranks(n_ranks, "sae_evaluation", *evaluate_args(root, **flags)))
        report = json.loads((tmp_path / f"{name}.json").read_text())
        reports.append({k: v for k, v in report.items() if not isinstance(v, str)})
    assert reports[0] == pytest.approx(reports[1], rel=1e-3)

    flags = ["--llama_model_dir", split_model, "--sae_model_path", root / "trained_sae.pt"]
    flags += ["--dtype", "float32", "--prompt", "Senior diplomats", "met", "--steer", "3=+1"]
    flags += ["--max_new_tokens", 6, "--temperature", 1, "--json"]
    texts = []
    for n_ranks, more in ((1, []), (2, ["--model_parallel_size", 2])):
        ranks = call_ranks(n_ranks, "llama_3_inference_text_completion", *flags, *more)
        pairs = json.loads(all_well(ranks).stdout)["pairs"]
        texts.append([pair[kind]["text"] for pair in pairs for kind in ("plain", "steered")])
    assert texts[0] == texts[1] and len(set(texts[0])) > 1


def test_ranks_of_one_model_share_its_data():
    workers = [Workers(rank, 6, torch.device("cpu"), 2) for rank in range(6)]
    for index, group in ((0, 0), (1, 1), (2, 2), (3, 0), (7, 1)):
        assert [w.owns(index) for w in workers] == [w.rank // 2 == group for w in workers]
    assert [w.is_writer for w in workers] == [True, False] * 3
    assert [w.is_main for w in workers] == [True] + [False] * 5


def test_processes_that_do_not_fit_the_model_are_one_line(
    root: Path,  # noqa: F811
    split_model: Path,
    tmp_path: Path,
):
    flags = capture_args(root, tmp_path / "acts", model_dir=split_model, model_parallel_size=2)
    for world_size, message in (("1", "number of processes, 1"), ("3", "number of processes, 3")):
        finished = call("capture_activations", *flags, env={"WORLD_SIZE": world_size})
        assert finished.returncode == 1
        (line,) = finished.stderr.strip().splitlines()
        assert line.startswith("error: --model_parallel_size 2") and message in line
    flags = capture_args(root, tmp_path / "acts", model_dir=split_model, model_parallel_size=4)
    finished = call("capture_activations", *flags, env={"WORLD_SIZE": "4"})
    assert finished.stderr == "error: n_kv_heads 2 does not split over 4 ranks\n"
    flags = evaluate_args(root, model_dir=split_model)
    finished = call("sae_evaluation", *flags, env={"WORLD_SIZE": "2"})
    assert "no more processes than --model_parallel_size 1" in finished.last_line
    assert not (tmp_path / "acts").exists()
