"""Training with the latents split over gloo processes: the files, and what goes on from them."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import pytest
import torch

from sae import SAEConfig, TopKSparseAutoencoder, load_sae
from saint.stage.workers import Axis
from saint.training.run_files import RunFiles
from saint.training.shard_files import read_part
from tests.support.pipeline import train_args
from tests.support.program import Finished, call, call_ranks

SIZE = {"n_latents": 64, "num_epochs": 1, "checkpoint_minutes": 1e-6}


def train(root: Path, save: Path, n_ranks: int, n_parts: int, **how) -> list[Finished]:
    args = train_args(root, save, **SIZE, latent_parallel_size=n_parts)
    return call_ranks(n_ranks, "sae_training", *args, **how)


def all_well(ranks: list[Finished]) -> str:
    assert [rank.returncode for rank in ranks] == [0] * len(ranks), ranks[0].stderr
    return ranks[0].stderr


def parts(save: Path) -> list[str]:
    return sorted(path.name.split(".", 2)[2] for path in save.parent.glob("*/*.step_*"))


def check_like_one_rank(save: Path, alone: Path) -> None:
    lines = ([json.loads(x) for x in p.with_suffix(".metrics.jsonl").open()] for p in (save, alone))
    mine, theirs = lines
    assert len(mine) == len(theirs) > 3
    for one, many in zip(theirs, mine, strict=True):
        for name, wanted in one.items():
            if name.startswith(("train/", "val/")):
                assert many[name] == pytest.approx(wanted, rel=1e-3, abs=1e-6), name
    made, wanted = (load_sae(path, device="cpu") for path in (save, alone))
    assert made.config.n_latents == wanted.config.n_latents
    for name, parameter in wanted.named_parameters():
        torch.testing.assert_close(made.get_parameter(name), parameter, rtol=0, atol=1e-3)
    torch.testing.assert_close(made.max_activations, wanted.max_activations, rtol=1e-3, atol=1e-3)


@pytest.fixture(scope="module")
def alone(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    save = tmp_path_factory.mktemp("alone") / "sae.pt"
    assert call("sae_training", *train_args(root, save, **SIZE)).returncode == 0
    return save


def test_killed_ranks_end_with_the_same_bits(root: Path, alone: Path, tmp_path: Path):
    whole, save = tmp_path / "whole" / "sae.pt", tmp_path / "killed" / "sae.pt"
    all_well(train(root, whole, 4, 2))
    check_like_one_rank(whole, alone)
    killed, *_ = train(root, save, 4, 2, die_at={1: 40})[1:]
    assert killed.returncode == -signal.SIGKILL and not save.exists() and parts(save)
    assert "continuing at step" in all_well(train(root, save, 4, 2))
    for name in ("sae.pt", "sae_checkpoints/sae.best.pt"):
        assert (save.parent / name).read_bytes() == (whole.parent / name).read_bytes()


def test_a_checkpoint_of_four_goes_on_with_two_and_with_one(
    root: Path, alone: Path, tmp_path: Path
):
    save = tmp_path / "sae.pt"
    train(root, save, 4, 4, die_at={3: 40})
    assert not save.exists() and "3-of-4" in " ".join(parts(save))
    newest = RunFiles(save).checkpoints()[-1][2]
    newest.write_bytes(newest.read_bytes()[:-100] + bytes(100))
    ranks = train(root, save, 2, 2, die_at={0: 40})
    assert "damaged" in ranks[0].stderr and "going on from" in ranks[0].stderr
    assert not save.exists() and "1-of-2" in " ".join(parts(save))
    last = call("sae_training", *train_args(root, save, **SIZE))
    assert last.returncode == 0 and "continuing at step" in last.stderr
    check_like_one_rank(save, alone)


def test_a_sweep_may_be_split_too(root: Path, tmp_path: Path):
    sweep = tmp_path / "sweep.yaml"
    sweep.write_text("[{objective: [topk, jumprelu]}]")
    flags = train_args(root, tmp_path / "x.pt", **SIZE, sweep=sweep)
    all_well(
        call_ranks(
            2, "sae_training", *flags, "--latent_parallel_size", 2, "--sweep_dir", tmp_path / "two"
        )
    )
    assert call("sae_training", *flags, "--sweep_dir", tmp_path / "one").returncode == 0
    for name in ("topk", "jumprelu"):
        check_like_one_rank(*(tmp_path / n / f"objective={name}.pt" for n in ("two", "one")))


def test_a_checkpoint_can_be_read_by_any_number_of_ranks(tmp_path: Path):
    weights = {"W_enc": torch.randn(24, 3), "b_pre": torch.randn(3)}
    whole = {"sae": weights, "threshold": torch.ones(())}
    for n in (1, 2, 3, 4):
        paths = [tmp_path / f"{i}-of-{n}.pt" for i in range(n)]
        for path, rows in zip(paths, weights["W_enc"].chunk(n), strict=True):
            torch.save(whole | {"sae": weights | {"W_enc": rows.clone()}}, path)
        for size in (1, 2, 3, 4, 6):
            read = [read_part(paths, Axis(rank, size)) for rank in range(size)]
            assert torch.equal(torch.cat([p["sae"]["W_enc"] for p in read]), weights["W_enc"])
            assert len({len(p["sae"]["W_enc"]) for p in read}) == 1
            assert all(torch.equal(p["sae"]["b_pre"], weights["b_pre"]) for p in read)


def test_every_part_begins_with_its_rows_of_one_draw():
    whole = TopKSparseAutoencoder(SAEConfig(3, 10000, 4))
    whole.initialise(torch.ones(3), seed=5)
    for n in (2, 4, 5):
        for i in range(n):
            part = TopKSparseAutoencoder(SAEConfig(3, 10000 // n, 4))
            part.initialise(torch.ones(3), seed=5, part=(i, n))
            assert torch.equal(part.W_dec, whole.W_dec.chunk(n)[i])


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ({"n_latents": 65}, "does not divide by --latent_parallel_size 2"),
        ({"moments": "int8"}, "--moments int8 is not for --latent_parallel_size"),
        ({"kernels": "dense"}, "--kernels dense is not for --latent_parallel_size"),
    ],
)
def test_what_cannot_be_split_is_one_line(root: Path, tmp_path: Path, flags, said: str):
    args = train_args(root, tmp_path / "sae.pt", latent_parallel_size=2, **flags)
    first = call_ranks(2, "sae_training", *args)[0]
    assert first.returncode == 1 and said in first.stderr and "Traceback" not in first.stderr
