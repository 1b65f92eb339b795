"""Several gloo processes do what one does: the same bytes, and the whole batch's gradient."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from saint.stage.workers import Workers
from saint.store.activation_store import open_store
from saint.training.objectives import OBJECTIVES
from tests.support.pipeline import capture_args, evaluate_args, train_args, tree_bytes
from tests.support.program import REPO, Finished, call, call_ranks, fork
from tests.support.training_ranks import rank_main, walk


def torchrun(n_ranks: int, stage: str, *args: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc_per_node", str(n_ranks), str(REPO / f"{stage}.py"), *map(str, args)]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(
        command, capture_output=True, text=True, timeout=240, env=env, check=False
    )


def test_capture_gives_the_same_bytes_on_two_ranks(root: Path, tmp_path: Path):
    finished = torchrun(2, "capture_activations", *capture_args(root, tmp_path / "acts"))
    assert finished.returncode == 0, finished.stderr
    assert tree_bytes(tmp_path / "acts") == tree_bytes(root / "acts")


def test_capture_on_two_nodes_gives_the_same_bytes(root: Path, tmp_path: Path):
    """Two torchrun agents that meet over the loopback, a rank each."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = ["--master_addr", "127.0.0.1", "--master_port", str(free.getsockname()[1])]
    nodes = []
    for node in range(2):
        command = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", *address]
        command += ["--node_rank", str(node), "--nproc_per_node", "1"]
        command += [str(REPO / "capture_activations.py")]
        command += map(str, capture_args(root, tmp_path / "acts"))
        env = os.environ | {"OMP_NUM_THREADS": "1"}
        nodes.append(subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=env))
    try:
        errors = [node.communicate(timeout=120)[1] for node in nodes]
    finally:
        for node in nodes:
            node.kill()
    assert [node.returncode for node in nodes] == [0, 0], errors
    assert tree_bytes(tmp_path / "acts") == tree_bytes(root / "acts")


def test_training_on_two_ranks_is_training_on_one(root: Path, tmp_path: Path):
    ranks = call_ranks(2, "sae_training", *train_args(root, tmp_path / "sae.pt"))
    assert [rank.returncode for rank in ranks] == [0, 0], ranks[0].stderr
    paths = (root / "trained_sae.metrics.jsonl", tmp_path / "sae.metrics.jsonl")
    alone, together = ([json.loads(line) for line in path.open()] for path in paths)
    assert len(alone) == len(together) > 10
    for one, many in zip(alone, together, strict=True):
        for name in {"train/loss", "train/fvu", "val/fvu", "train/grad_norm"} & one.keys():
            assert many[name] == pytest.approx(one[name], rel=1e-3)


def test_two_ranks_of_which_one_is_killed_end_with_the_same_bits(
    root: Path,
    tmp_path: Path,
):
    whole, save = tmp_path / "whole" / "sae.pt", tmp_path / "killed" / "sae.pt"
    size = {"n_latents": 64, "num_epochs": 1, "checkpoint_minutes": 1e-6}
    runs = [train_args(root, path, **size) for path in (whole, save)]
    all_well(call_ranks(2, "sae_training", *runs[0]))
    for event in (45, 76):
        killed, left = call_ranks(2, "sae_training", *runs[1], die_at={0: event})
        assert killed.returncode == -signal.SIGKILL and left.returncode != 0
        assert not save.exists() and list(save.parent.glob("sae_checkpoints/*.step_*"))
    assert "continuing at step" in all_well(call_ranks(2, "sae_training", *runs[1])).stderr
    for name in ("sae.pt", "sae_checkpoints/sae.best.pt"):
        assert (save.parent / name).read_bytes() == (whole.parent / name).read_bytes()


def check_ranks(n_ranks: int, directory: Path, walks: list[dict], n_latent_ranks: int = 1) -> None:
    """Every walk of each of n ranks against one that a single process takes."""
    how_many = (n_ranks, directory, walks, n_latent_ranks)
    processes = [fork(rank_main, i, *how_many) for i in range(n_ranks)]
    for process in processes:
        process.join(120)
        assert process.exitcode == 0
    ranks = [torch.load(directory / f"{i}.pt", weights_only=True) for i in range(n_ranks)]
    for i, how in enumerate(walks):
        alone = walk(**how, workers=Workers(0, 1, torch.device("cpu")))
        assert alone["n_dead"] > 5
        for place, rank in enumerate(ranks):
            own = slice(*(64 // n_latent_ranks * (place % n_latent_ranks + j) for j in (0, 1)))
            assert rank[i]["losses"] == pytest.approx(alone["losses"], rel=1e-3)
            assert rank[i]["l0"] == pytest.approx(alone["l0"], rel=1e-2)
            for name, wanted in alone["first"].items():
                wanted = wanted[own] if len(wanted) == 64 else wanted
                difference = (rank[i]["first"][name] - wanted).norm() / wanted.norm()
                assert difference < 1e-6, (how, name)
            for name, weights in rank[i]["weights"].items():
                alike = ranks[place % n_latent_ranks if weights.ndim and len(weights) != 24 else 0]
                assert torch.equal(weights, alike[i]["weights"][name])
                wanted = alone["weights"][name]
                wanted = wanted[own] if wanted.ndim and len(wanted) == 64 else wanted
                torch.testing.assert_close(weights, wanted, rtol=0, atol=1e-4)


def test_four_ranks_take_one_ranks_steps_with_all_kernels(tmp_path: Path):
    check_ranks(4, tmp_path, [{"kernels": kernels} for kernels in ("cpp", "torch")])


@pytest.mark.parametrize(("n_ranks", "n_latent_ranks"), [(2, 2), (4, 4), (4, 2)])
def test_ranks_that_share_the_latents_take_one_ranks_steps(
    n_ranks: int, n_latent_ranks: int, tmp_path: Path
):
    pairs = [("cpp", "topk"), ("torch", "batchtopk"), ("cpp", "batchtopk"), ("torch", "topk")]
    if n_ranks == 2:
        pairs += [(k, name) for k in ("cpp", "torch") for name in ("matryoshka", "jumprelu")]
    how = {"lazy": True, "beta2": 0.99}
    walks = [how | {"kernels": k, "objective": name} for k, name in pairs]
    check_ranks(n_ranks, tmp_path, walks[2:] if n_latent_ranks < n_ranks else walks, n_latent_ranks)


def test_two_ranks_take_one_ranks_steps_with_every_objective(tmp_path: Path):
    names = [name for name in OBJECTIVES if name != "topk"]
    how = {"lazy": True, "beta2": 0.99}
    check_ranks(
        2,
        tmp_path,
        [how | {"kernels": k, "objective": name} for k in ("cpp", "torch") for name in names],
    )


@pytest.fixture(scope="module")
def split_model(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
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
    root: Path,
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
        ours, theirs = ours.read().float(), theirs.read().float()
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
        reports.append({k: v for k, v in report.items() if isinstance(v, int | float)})
    assert len(reports[0]) > 10 and reports[0] == pytest.approx(reports[1], rel=1e-3)

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
    root: Path,
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
