"""The shuffle: every row once, the same bytes by any way, bounded memory, and its statistics."""

from __future__ import annotations

import resource
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

import sae_preprocessing
from sae import standardise
from saint.stage.errors import UserError
from saint.stage.manifests import Output
from saint.store.activation_store import open_store
from saint.store.shuffled_rows import open_batched_rows
from tests.support.pipeline import (
    OVER_DISK,
    capture,
    outputs,
    preprocess,
    rows_of,
    sorted_rows,
    tree_bytes,
    write_big_store,
)
from tests.support.program import fork
from tests.support.tiny_store import D_MODEL, N_VOCAB, _write_store


@pytest.mark.parametrize("store_dtype", ["float16", "int8"])
def test_the_shuffle_keeps_every_row_of_every_number_format(root, tmp_path, store_dtype):
    capture(root, tmp_path / "acts", store_dtype=store_dtype)
    wanted = sorted_rows(rows_of(open_store(tmp_path / "acts")))
    for name, changes in (("memory", {}), ("disk", OVER_DISK)):
        where = outputs(tmp_path / name)
        preprocess(root, input_dir=tmp_path / "acts", **where, **changes)
        rows = open_batched_rows(where["output_dir"])
        got = [rows.read(s, 0, rows.n_rows(s)) for s in ("train", "val")]
        assert sorted_rows(torch.cat(got)) == wanted
    assert tree_bytes(tmp_path / "memory") == tree_bytes(tmp_path / "disk")


@pytest.mark.parametrize("num_processes", [1, 3])
def test_bytes_depend_neither_on_workers_nor_on_memory(root, tmp_path, num_processes):
    for name, changes in (("memory", {}), ("disk", OVER_DISK)):
        where = outputs(tmp_path / name)
        preprocess(root, num_processes=num_processes, **where, **changes)
        assert tree_bytes(where["output_dir"]) == tree_bytes(root / "acts_batched")
        assert where["mean_filepath"].read_bytes() == (root / "acts_mean.pt").read_bytes()


def test_the_mean_does_not_depend_on_workers_where_blocks_are_many(tmp_path, monkeypatch):
    monkeypatch.setattr("saint.shuffle.plan._BLOCK_BYTES", 1 << 12)
    write_big_store(tmp_path / "acts", n_rows=3000, d_model=16)
    means = []
    for n, memory_gb in ((1, 4.0), (3, 4.0), (2, 1e-4)):
        where = outputs(tmp_path / str(n))
        preprocess(tmp_path, num_processes=n, memory_gb=memory_gb, **where)
        means.append(where["mean_filepath"].read_bytes())
    assert means[0] == means[1] == means[2]
    assert tree_bytes(tmp_path / "3" / "rows") == tree_bytes(tmp_path / "2" / "rows")
    rows = open_batched_rows(tmp_path / "3" / "rows")
    got = torch.cat([rows.read(s, 0, rows.n_rows(s)) for s in ("train", "val")])
    assert sorted_rows(got) == sorted_rows(rows_of(open_store(tmp_path / "acts")))


def test_files_without_rows_are_shuffled_too(root, tmp_path):
    flags = outputs(tmp_path) | OVER_DISK | {"held_out_fraction": 1e-9}
    preprocess(root, **flags)
    rows = open_batched_rows(tmp_path / "rows")
    assert rows.n_rows("val") == 0 and rows.n_rows("train") == open_store(root / "acts").n_tokens


def test_rows_that_moved_are_never_thrown_away(root, tmp_path):
    store_dir = tmp_path / "acts"
    shutil.copytree(root / "acts", store_dir)
    where = outputs(tmp_path)
    preprocess(root, "--in_place", input_dir=store_dir, **where)
    held = tree_bytes(tmp_path)
    for more in (["--in_place", "--overwrite"], ["--overwrite"], []):
        with pytest.raises(UserError, match="only copy of its rows"):
            preprocess(root, *more, input_dir=store_dir, **where)
    with pytest.raises(UserError, match="cannot be extended"):
        capture(root, store_dir, num_samples=230)
    assert tree_bytes(tmp_path) == held


def test_a_resumed_shuffle_counts_what_was_left_to_it(root, tmp_path, monkeypatch):
    shares: list[float] = []
    whole = sae_preprocessing.run_shuffle

    def run_shuffle(plan):
        result = whole(plan)
        shares.append(result.share)
        return result

    def die(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(sae_preprocessing, "run_shuffle", run_shuffle)
    flags = outputs(tmp_path) | OVER_DISK
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("saint.shuffle.on_disk.permute_file", die)
        preprocess(root, **flags)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(sae_preprocessing, "combine_sums", die)
        preprocess(root, **flags)
    preprocess(root, **flags)
    preprocess(root, **(outputs(tmp_path / "alone") | OVER_DISK))
    assert shares == [0.5, 0.0, 1.0]


def test_statistics_are_those_of_dense_formulas_and_massive_tokens_are_named(tmp_path, caplog):
    rng = np.random.default_rng(0)
    embedding = torch.randn(N_VOCAB, D_MODEL, generator=torch.Generator().manual_seed(0)) + 0.5
    embedding[7] *= 300
    token_ids = {i: rng.integers(0, N_VOCAB, rng.integers(1, 9)).tolist() for i in range(300)}
    _write_store(tmp_path / "acts", token_ids, embedding, 3)
    with caplog.at_level("WARNING", logger="saint"):
        preprocess(tmp_path, num_processes=2, **outputs(tmp_path))
    n_massive = sum(tokens.count(7) for tokens in token_ids.values())
    assert f"' w7' ({n_massive}×)" in caplog.text and caplog.text.count("×)") == 1
    facts = open_batched_rows(tmp_path / "rows").facts
    raw = rows_of(open_store(tmp_path / "acts")).float()
    norms = raw.norm(dim=1)
    assert facts["massive_tokens"] == {" w7": n_massive}
    assert facts["norm_median"] == pytest.approx(float(norms.median()), rel=0.01)
    histogram = facts["norm_histogram"]
    assert sum(histogram["counts"]) == len(norms) and histogram["counts"][-1] == n_massive
    rows = open_batched_rows(tmp_path / "rows")
    z = standardise(rows.read("train", 0, rows.n_rows("train")))[0].double()
    mean = torch.load(tmp_path / "mean.pt", weights_only=True)
    torch.testing.assert_close(mean, z.mean(0).float(), rtol=1e-5, atol=1e-6)
    assert facts["variance"] == pytest.approx(float((z - z.mean(0)).square().sum(1).mean()), 1e-5)


def test_values_that_are_not_finite_are_named(tmp_path):
    embedding = torch.randn(N_VOCAB, D_MODEL)
    embedding[3, 2] = float("nan")
    _write_store(tmp_path / "acts", {i: [i % N_VOCAB] * 2 for i in range(200)}, embedding, 2)
    with pytest.raises(UserError, match="shard_00000.safetensors holds activations that are not f"):
        preprocess(tmp_path, **outputs(tmp_path))


def grow(root: str, memory_gb: float, least: float, most: float) -> None:
    """Preprocess and exit with 0 if the memory grew by between `least` and `most` GB."""
    write_big_store(Path(root) / f"{memory_gb}_first" / "acts", n_rows=1000, d_model=16)
    preprocess(Path(root) / f"{memory_gb}_first", memory_gb=memory_gb)  # loads libraries
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    where = outputs(Path(root) / f"{memory_gb}")
    preprocess(Path(root), num_processes=2, memory_gb=memory_gb, rows_per_file=10_000, **where)
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1e6
    print(f"grew by {grown:.3f} GB")
    raise SystemExit(0 if least <= grown <= most else f"grew by {grown:.3f} GB")


def test_memory_stays_below_the_flag(tmp_path):
    write_big_store(tmp_path / "acts", n_rows=80_000, d_model=1024)  # 164 MB
    for memory_gb, least, most in ((4.0, 0.16, 1.0), (0.14, 0.0, 0.14)):
        process = fork(grow, str(tmp_path), memory_gb, least, most)
        process.join(120)
        assert process.exitcode == 0
    same = tree_bytes(tmp_path / "4.0") == tree_bytes(tmp_path / "0.14")
    assert same  # spelling out how hundreds of MB differ would take for ever
    with pytest.raises(UserError, match="raise --memory_gb"):
        preprocess(tmp_path, memory_gb=0.02, rows_per_file=10_000, **outputs(tmp_path / "small"))


def test_in_place_goes_on_where_only_its_manifest_was_missing(root, tmp_path, monkeypatch):
    store_dir = tmp_path / "acts"
    shutil.copytree(root / "acts", store_dir)
    where = outputs(tmp_path)
    finish = Output.finish

    def die(self, **kwargs):
        if self.path == where["output_dir"]:  # all rows have moved, and the store knows it
            raise KeyboardInterrupt
        finish(self, **kwargs)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Output, "finish", die)
        preprocess(root, "--in_place", input_dir=store_dir, **where)
    assert open_store(store_dir).has_moved
    preprocess(root, "--in_place", input_dir=store_dir, **where)
    plain, moved = tree_bytes(root / "acts_batched"), tree_bytes(tmp_path / "rows")
    assert {name: moved[name] for name in plain} == plain
    assert torch.equal(rows_of(open_store(store_dir)), rows_of(open_store(root / "acts")))
