"""The activation store and its shuffle: formats, faults, full disks, ranks, memory, in place."""

from __future__ import annotations

import json
import random
import resource
import shutil
import signal
from pathlib import Path

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

import capture_activations
import capture_top_activating_sentences
import sae_preprocessing
from llama_3 import HookPoint, load_llama
from sae import save_sae, standardise
from saint.capture import record
from saint.stage import program, workers
from saint.stage.errors import UserError
from saint.stage.manifests import Output, read_manifest
from saint.store import __main__
from saint.store.__main__ import find_problems
from saint.store.activation_store import ActivationStore, open_store, shard_file, shard_name
from saint.store.dataset import held_out_mask, is_held_out
from saint.store.row_format import StoredRows, decode_rows, encode_rows
from saint.store.shuffled_rows import open_batched_rows
from tests.stages.test_pipeline import (
    capture_args,
    preprocess_args,
    train_args,
    tree_bytes,
    write_dataset,
)
from tests.support.program import call, call_ranks, fork
from tests.support.tiny_steering import make_sae, one_thread, write_model
from tests.support.tiny_store import D_MODEL, N_VOCAB, _write_store

OVER_DISK = {"memory_gb": 0.02}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model and dataset, captured and preprocessed once."""
    root = tmp_path_factory.mktemp("store")
    write_model(root / "model")
    write_dataset(root / "data")
    capture(root, root / "acts")
    preprocess(root)
    return root


def capture(root: Path, out: Path, **changes: object) -> None:
    with one_thread():
        capture_activations.main([str(a) for a in capture_args(root, out, **changes)])


def preprocess(root: Path, *more: str, **changes: object) -> None:
    with one_thread():
        sae_preprocessing.main([*(str(a) for a in preprocess_args(root, **changes)), *more])


def outputs(directory: Path) -> dict[str, Path]:
    return {"output_dir": directory / "rows", "mean_filepath": directory / "mean.pt"}


def rows_of(store: ActivationStore) -> torch.Tensor:
    return torch.cat([store.read_shard(i).read() for i in range(store.n_shards)])


def sorted_rows(x: torch.Tensor) -> list[bytes]:
    return sorted(row.tobytes() for row in x.contiguous().view(torch.uint8).numpy())


@pytest.mark.parametrize("store_dtype", ["bfloat16", "float16", "int8"])
def test_every_number_format_is_close_to_the_model(root: Path, tmp_path: Path, store_dtype: str):
    capture(root, tmp_path / "acts", num_samples=60, store_dtype=store_dtype)
    store = open_store(tmp_path / "acts")
    model, tokenizer = load_llama(
        root / "model", device=torch.device("cpu"), dtype=torch.float32, n_layers=3
    )
    shard, hook = store.read_shard(0), HookPoint(2, "resid_pre")
    for i in range(0, 60, 7):
        rows = slice(int(shard.offsets[i]), int(shard.offsets[i + 1]))
        tokens = [tokenizer.bos_id, *shard.token_ids[rows].tolist()]
        exact = model.capture(torch.tensor([tokens]), [hook])[hook][0, 1:]
        step = exact.abs().amax(dim=1, keepdim=True) / 254
        allowed = {"bfloat16": exact.abs() / 256, "float16": exact.abs() / 2048, "int8": step}
        error = (shard.read(rows).float() - exact).abs()
        assert bool((error <= allowed[store_dtype] * 1.01 + 1e-4).all())
    per_row = {"bfloat16": 64, "float16": 64, "int8": 36}[store_dtype]
    stored = StoredRows(store.shard_path(0)).empty(1)
    assert sum(tensor.nbytes for tensor in stored.values()) == per_row


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


def test_int8_has_one_scale_per_token_and_float16_stays_finite():
    x = torch.randn(5, 8) * torch.tensor([1e-8, 1.0, 0.0, 3e4, 1e38])[:, None]
    stored = encode_rows(x, "int8")
    assert stored["activations"].dtype == torch.int8 and stored["scales"].shape == (5,)
    step = x.abs().amax(dim=1, keepdim=True) / 127
    assert bool(((decode_rows(stored) - x).abs() <= step / 2 * 1.001).all())
    assert bool(decode_rows(encode_rows(x, "float16")).isfinite().all())


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


def test_three_ranks_write_the_bytes_of_one(root: Path, tmp_path: Path):
    arguments = capture_args(root, tmp_path / "acts", device="cpu")
    ranks = call_ranks(3, "capture_activations", *arguments)
    assert [rank.returncode for rank in ranks] == [0, 0, 0], ranks[0].stderr
    assert tree_bytes(tmp_path / "acts") == tree_bytes(root / "acts")


def test_what_a_killed_run_left_of_its_records_is_removed(tmp_path):
    strangers = tmp_path / ".other.manifest.json.1.tmp"
    torn = [tmp_path / f".stage.{name}.json.1.tmp" for name in ("manifest", "partial")]
    for path in (strangers, *torn):
        path.write_text("{")
    Output(
        tmp_path, "stage", arguments={}, sources={}, single_file=False, own_names=("data",)
    ).begin(overwrite=False)
    assert not any(path.exists() for path in torn) and strangers.exists()


def kill_and_resume(
    stage: str, arguments: list[object], directory: Path, seed: int, n_calls: int, made: str = ""
) -> None:
    """Ten kills at random writes, fsyncs, renames and removals, then a run to the end.

    n_calls: about as many as a run makes. made: what to remove to start over if one comes through.
    """
    rng, kills = random.Random(seed), 0
    while kills < 10:
        died = call(stage, *arguments, die_at=rng.randint(2, 2 * n_calls))
        kills += died.returncode == -signal.SIGKILL
        assert died.returncode in (0, -signal.SIGKILL), died.stderr
        if died.returncode == 0 and made:
            shutil.rmtree(directory / made)
        elif died.returncode == 0:
            break
    finished = call(stage, *arguments)
    assert finished.returncode == 0, finished.stderr
    assert kills > 4 and not list(directory.rglob(".*"))


def test_capture_killed_at_random_moments_ends_with_the_same_bytes(root, tmp_path):
    arguments = capture_args(root, tmp_path / "acts")
    kill_and_resume("capture_activations", arguments, tmp_path, 1, 100, "acts")
    assert tree_bytes(tmp_path / "acts") == tree_bytes(root / "acts")
    assert find_problems(tmp_path / "acts") == []


def test_training_killed_at_random_moments_ends_with_the_same_bytes(root, tmp_path):
    flags = {"data_dir": root / "acts_batched", "b_pre_path": root / "acts_mean.pt"}
    flags |= {"checkpoint_minutes": 1e-6, "num_epochs": 2, "dead_tokens": 128}
    # So high a rate that the best SAE is an early one.
    flags |= {"learning_rate": 2, "lr_floor": 1, "warmup_fraction": 1, "decay_fraction": 0}
    runs = [train_args(root, tmp_path / name / "sae.pt", **flags) for name in ("whole", "killed")]
    assert call("sae_training", *runs[0]).returncode == 0
    kill_and_resume("sae_training", runs[1], tmp_path, 2, 60, "killed")
    whole, killed = (tree_bytes(tmp_path / name) for name in ("whole", "killed"))
    assert whole.keys() == killed.keys() and len(whole) == 5
    logs = []
    for files in (whole, killed):
        del files["sae.training.html"]
        lines = files.pop("sae.metrics.jsonl").splitlines()
        logs.append([json.loads(line) | {"tokens_per_s": None} for line in lines])
    assert killed == whole and logs[0] == logs[1]
    assert max(e["train/aux_loss"] for e in logs[0]) > 0
    losses = [e["val/loss"] for e in logs[0] if "val/loss" in e]
    assert losses.index(min(losses)) < len(losses) // 2


def test_the_shuffle_killed_at_random_moments_ends_with_the_same_bytes(root, tmp_path):
    arguments = preprocess_args(root, **outputs(tmp_path), **OVER_DISK)
    kill_and_resume("sae_preprocessing", arguments, tmp_path, 0, 60, "rows")
    assert tree_bytes(tmp_path / "rows") == tree_bytes(root / "acts_batched")
    assert (tmp_path / "mean.pt").read_bytes() == (root / "acts_mean.pt").read_bytes()


def top_args(root: Path, data_dir: Path, out: Path) -> list[object]:
    save_sae(root / "sae.pt", make_sae(layer=2))
    argv = ["--data_dir", data_dir, "--model_path", root / "sae.pt", "--top_n", 5]
    return [*argv, "--captured_data_output_dir", out, "--pool_sentences", 50]


def top_sentences(root: Path, data_dir: Path, out: Path) -> bytes:
    with one_thread():
        argv = top_args(root, data_dir, out)
        capture_top_activating_sentences.main([str(a) for a in argv])
    return (out / "top_sentences_max.yaml").read_bytes()


def test_in_place_survives_kills_and_top_sentences_still_works(root, tmp_path):
    store_dir = tmp_path / "acts"
    shutil.copytree(root / "acts", store_dir)
    before = rows_of(open_store(store_dir))
    arguments = [*preprocess_args(root, input_dir=store_dir, **outputs(tmp_path)), "--in_place"]
    died = call("sae_preprocessing", *arguments, die_at=90)
    assert died.returncode == -signal.SIGKILL
    with pytest.raises(UserError, match="finish sae_preprocessing.py --in_place"):
        open_store(store_dir)
    (store_dir / "layer_2" / f".{shard_name(1)}.1.tmp").write_bytes(b"half a shard")
    (problem,) = find_problems(store_dir)
    assert "layer_2 is being preprocessed in place: finish sae_preprocessing.py" in problem
    assert "the same command resumes" in problem
    foreign = store_dir / "layer_2" / shard_name(88)
    foreign.write_bytes(b"?")
    assert f"{foreign} is foreign" in find_problems(store_dir)[1]
    foreign.unlink()
    kill_and_resume("sae_preprocessing", arguments, tmp_path, 3, 60)
    plain = tree_bytes(root / "acts_batched")
    moved = tree_bytes(tmp_path / "rows")
    assert {name: moved[name] for name in plain} == plain
    store = open_store(store_dir)
    assert torch.equal(rows_of(store), before)
    assert (
        store.shard_path(0).stat().st_size
        < 0.4 * open_store(root / "acts").shard_path(0).stat().st_size
    )
    assert find_problems(store_dir) == []
    assert top_sentences(tmp_path, store_dir, tmp_path / "a") == top_sentences(
        tmp_path, root / "acts", tmp_path / "b"
    )
    assert "done already" in call("sae_preprocessing", *arguments).last_line
    held = (tmp_path / "mean.pt").read_bytes()
    for lost in (tmp_path / "mean.pt", tmp_path / "rows" / "train_00000.safetensors"):
        content = lost.read_bytes()
        lost.unlink()
        refused = call("sae_preprocessing", *arguments)
        assert refused.returncode == 1 and f"{lost.name} is missing" in refused.last_line
        lost.write_bytes(content)
    assert (tmp_path / "mean.pt").read_bytes() == held
    assert torch.equal(rows_of(open_store(store_dir)), before)


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


def test_training_on_a_full_disk_stops_cleanly_and_resumes(root, tmp_path):
    """The limit bites in the page of curves, in a checkpoint's body, and in its end."""
    whole, save = tmp_path / "whole.pt", tmp_path / "sae.pt"
    flags = {"data_dir": root / "acts_batched", "b_pre_path": root / "acts_mean.pt"}
    runs = [train_args(root, path, **flags) for path in (whole, save)]
    arguments = [*runs[1], "--checkpoint_minutes", 1e-6]
    assert call("sae_training", *runs[0]).returncode == 0
    (checkpoint,) = (tmp_path / "sae_checkpoints").glob("whole.step_*")
    size = checkpoint.stat().st_size
    for limit in (4000, size // 2, size - 1):
        stopped = call("sae_training", *arguments, file_bytes=limit)
        assert stopped.returncode == 1 and "Traceback" not in stopped.stderr
        assert f"no space left for {tmp_path} (File too large): make" in stopped.last_line
        assert not list(tmp_path.rglob(".sae.*.tmp")) and not save.exists()
    finished = call("sae_training", *arguments)
    assert finished.returncode == 0, finished.stderr
    assert save.read_bytes() == whole.read_bytes()


@pytest.mark.parametrize("stage", ["capture_activations", "sae_preprocessing"])
def test_a_full_disk_stops_cleanly_and_the_run_resumes(root, tmp_path, stage):
    if stage == "capture_activations":
        out, whole = tmp_path / "acts", root / "acts"
        arguments = capture_args(root, out)
        sizes = [p.stat().st_size for p in sorted(whole.glob("layer_2/*"))]
        assert sizes[0] < max(sizes)
    else:
        out, whole = tmp_path / "rows", root / "acts_batched"
        arguments = preprocess_args(root, **outputs(tmp_path))
        sizes = [p.stat().st_size for p in whole.glob("train_*")]
    stopped = call(stage, *arguments, file_bytes=max(sizes) - 1)
    assert stopped.returncode == 1 and "Traceback" not in stopped.stderr
    assert "no space left for" in stopped.last_line and "run the same command" in stopped.last_line
    assert not list(out.rglob("*.tmp")) and not list(out.glob("*.manifest.json"))
    kept = {p: p.stat().st_mtime_ns for p in out.glob("layer_2/*")}
    assert kept or stage != "capture_activations"
    finished = call(stage, *arguments)
    assert finished.returncode == 0, finished.stderr
    assert tree_bytes(out) == tree_bytes(whole)
    assert all(path.stat().st_mtime_ns == time for path, time in kept.items())


def test_a_full_disk_stops_top_sentences_cleanly_and_they_resume(root, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(capture_top_activating_sentences.shutil, "rmtree", lambda _: None)
        top_sentences(tmp_path, root / "acts", tmp_path / "kept")
    wanted = {n: d for n, d in tree_bytes(tmp_path / "kept").items() if "work" not in n}
    sizes = {p.name: p.stat().st_size for p in (tmp_path / "kept").rglob("*")}
    sparse = max(size for name, size in sizes.items() if name.startswith("sparse"))
    limits = {"sparse": sparse - 1, "evidence": sizes["evidence.parquet"] - 1}
    assert limits["sparse"] < limits["evidence"], "the first limit is hit first"
    stage, arguments = (
        "capture_top_activating_sentences",
        top_args(tmp_path, root / "acts", tmp_path / "top"),
    )
    for limit in limits.values():
        stopped = call(stage, *arguments, file_bytes=limit)
        assert stopped.returncode == 1 and "Traceback" not in stopped.stderr, stopped.stderr
        assert f"no space left for {tmp_path / 'top'}" in stopped.last_line
        assert "run the same command" in stopped.last_line
        assert not list(tmp_path.rglob("*.tmp")) and not list(tmp_path.glob("top/*.manifest.json"))
    finished = call(stage, *arguments)
    assert finished.returncode == 0, finished.stderr
    assert tree_bytes(tmp_path / "top") == wanted


def test_too_little_space_is_said_before_the_work(root, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)._replace(free=10_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    with pytest.raises(UserError, match="GB more, 0.0 GB are free: make room"):
        capture(root, tmp_path / "acts")
    assert not list(tmp_path.glob("acts/layer_2/*"))
    with pytest.raises(UserError, match="make room"):
        preprocess(root, **outputs(tmp_path))
    with pytest.raises(UserError, match="make room"):
        top_sentences(tmp_path, root / "acts", tmp_path / "top")


def test_a_dataset_is_read_by_uri(root, tmp_path):
    memory = fsspec.filesystem("memory")
    for path in sorted((root / "data").iterdir()):
        memory.pipe_file(f"/somewhere/{path.name}", path.read_bytes())
    capture(root, tmp_path / "acts", dataset_dir="memory://somewhere")
    assert tree_bytes(tmp_path / "acts") == tree_bytes(root / "acts")


class _RefusedError(Exception):
    """Like httpx's: no OSError."""


class BrokenFileSystem(fsspec.get_filesystem_class("memory")):
    """Fails at once under broken://, and from the third file that is opened under late://."""

    protocol = ("broken", "late")
    cachable = False
    n_opened = 0

    def info(self, path, **kwargs):
        if path.startswith("broken"):
            raise _RefusedError("connection refused")
        return super().info(path, **kwargs)

    @classmethod
    def _strip_protocol(cls, path):
        return path.replace("late://", "/").replace("broken://", "broken/")

    def _open(self, path, *args, **kwargs):
        BrokenFileSystem.n_opened += 1
        if BrokenFileSystem.n_opened > 2:
            raise PermissionError("token expired")
        return super()._open(path, *args, **kwargs)


@pytest.mark.parametrize(
    ("uri", "reason"),
    [
        ("broken://somewhere", "_RefusedError: connection refused"),
        ("late://elsewhere", "PermissionError: token expired"),
        ("nonsense://somewhere", "nonsense"),
    ],
)
def test_what_a_remote_file_system_raises_is_one_error(root, tmp_path, uri, reason):
    for protocol in BrokenFileSystem.protocol:
        fsspec.register_implementation(protocol, BrokenFileSystem, clobber=True)
    BrokenFileSystem.n_opened = 0
    memory = fsspec.filesystem("memory")
    for path in sorted((root / "data").iterdir()):
        memory.pipe_file(f"/elsewhere/{path.name}", path.read_bytes())
    with pytest.raises(UserError, match=f"--dataset_dir {uri} cannot be read: .*{reason}"):
        capture(root, tmp_path / "acts", dataset_dir=uri)
    if uri.startswith("late"):
        assert BrokenFileSystem.n_opened == 3, "the files could be opened, and then not be read"


def test_an_automatic_batch_size_is_settled_once(root, tmp_path, monkeypatch):
    monkeypatch.setattr(record, "available_bytes", lambda _: 9_000_000)
    capture(root, tmp_path / "acts", num_samples=60)
    settled = read_manifest(tmp_path / "acts", "capture_activations").arguments["batch_tokens"]
    assert 256 <= settled < 4096
    monkeypatch.undo()
    capture(root, tmp_path / "acts", num_samples=120)
    manifest = read_manifest(tmp_path / "acts", "capture_activations")
    assert manifest.arguments["batch_tokens"] == settled
    assert manifest.counts["n_sentences"] == 120
    assert read_manifest(root / "acts", "capture_activations").arguments["batch_tokens"] == 4096


def test_a_shard_that_a_broken_run_left_shortened_is_made_again(root, tmp_path):
    out = tmp_path / "acts"
    shutil.copytree(root / "acts", out)
    (out / "capture_activations.manifest.json").rename(out / "capture_activations.partial.json")
    shard = out / "layer_2" / shard_name(1)
    shard.write_bytes(shard.read_bytes()[:-5])
    (out / ".capture_activations.manifest.json.12345.tmp").write_text("{")
    capture(root, out)
    assert tree_bytes(out) == tree_bytes(root / "acts")
    assert not list(out.glob(".*"))


def test_the_store_names_every_damaged_missing_and_foreign_file(root, tmp_path, capsys):
    out = tmp_path / "acts"
    shutil.copytree(root / "acts", out)
    __main__.main([str(out), "--n_sentences", "2"])
    shown = capsys.readouterr().out
    assert "200 sentences" in shown and "every file has its checksum" in shown
    shard = open_store(out).read_shard(0)
    norm = float(torch.linalg.vector_norm(shard.read(slice(0, 1)).float()))
    assert f"sentence {int(shard.sentence_ids[0])}: " in shown and f"[{norm:.0f}]" in shown
    flipped, short, missing = (out / "layer_2" / shard_name(i) for i in range(3))
    data = flipped.read_bytes()
    flipped.write_bytes(data[:-1] + bytes([data[-1] ^ 16]))
    short.write_bytes(short.read_bytes()[:-1])
    missing.unlink()
    foreign = out / "layer_2" / shard_name(77)
    shutil.copyfile(root / "acts" / "layer_2" / shard_name(0), foreign)
    other = out / "layer_5" / shard_name(0)
    other.parent.mkdir()
    other.write_bytes(b"?")
    torn = out / "layer_2" / f".{shard_name(2)}.123.tmp"
    torn.write_bytes(b"?")
    with pytest.raises(SystemExit, match="1"):
        __main__.main([str(out)])
    errors = capsys.readouterr().err.splitlines()
    found = {str(path): [line for line in errors if str(path) in line] for path in
             (flipped, short, missing, foreign, other, torn)}  # fmt: skip
    words = ("corrupt", "bytes", "missing", "foreign", "foreign", "an interrupted run")
    for (path, lines), word in zip(found.items(), words, strict=True):
        assert len(lines) == 1 and word in lines[0], path
    assert len(errors) == 6


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


def write_big_store(path: Path, *, n_rows: int, d_model: int) -> None:
    output = Output(path, "capture_activations", {}, {}, single_file=False)
    output.begin(overwrite=False)
    (path / "layer_1").mkdir(parents=True)
    pq.write_table(pa.table({"text": ["a"] * 50}), path / "vocabulary.parquet")
    half, names = n_rows // 2, []
    for index in range(2):
        lists = [[(i + j * j) % 50 for j in range(10)] for i in range(half // 10)]
        names.append(f"layer_1/{shard_name(index)}")
        ids = [index * half + i for i in range(len(lists))]
        with shard_file(path / names[-1], lists, ids, d_model=d_model) as shard:
            for start in range(0, half, 1000):
                shard.write(
                    "activations", start, torch.randn(min(1000, half - start), d_model).bfloat16()
                )
    counts = {"n_shards": 2, "n_sentences": n_rows // 10, "n_tokens": n_rows}
    facts = {"layers": {"layer_1": {"layer": 1, "hook_point": "resid_pre"}}, "d_model": d_model}
    output.finish(facts=facts, counts=counts, files=[*names, "vocabulary.parquet"])


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


def test_the_held_out_mask_is_the_rule_for_single_sentences():
    rng = np.random.default_rng(1)
    lengths = rng.integers(0, 6, 500)
    offsets = np.cumsum([0, *lengths])
    tokens = rng.integers(0, 9, offsets[-1]).astype(np.int32)
    mask = held_out_mask(tokens, offsets[100:], fraction=0.3)
    ends = zip(offsets[100:-1], offsets[101:], strict=True)
    assert mask.tolist() == [is_held_out(tokens[a:b], fraction=0.3) for a, b in ends]
    assert 0 < mask.sum() < len(mask)


def test_the_store_holds_the_hidden_states_of_transformers(root: Path, tmp_path: Path):
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, vocab_size=400, max_position_embeddings=256, initializer_range=0.2,
        tie_word_embeddings=False,
    )  # fmt: skip
    torch.manual_seed(0)
    theirs = transformers.LlamaForCausalLM(config).eval()
    theirs.save_pretrained(tmp_path / "model")
    for name in ("tokenizer.model", "tokenizer_spec.json"):
        shutil.copyfile(root / "model" / name, tmp_path / "model" / name)
    flags = {"model_dir": tmp_path / "model", "num_samples": 40, "dtype": "float32"}
    capture(root, tmp_path / "acts", **flags)
    shard = open_store(tmp_path / "acts").read_shard(0)
    offsets = shard.offsets.tolist()
    for a, b in zip(offsets, offsets[1:], strict=False):
        tokens = torch.tensor([[0, *shard.token_ids[a:b].tolist()]])
        with torch.no_grad():
            hidden = theirs(tokens, output_hidden_states=True).hidden_states[2][0, 1:]
        torch.testing.assert_close(shard.read(slice(a, b)).float(), hidden, rtol=8e-3, atol=1e-3)


def resume(stage: str, arguments: list[object], output: Path) -> str:
    """The summary of a run that finds all data and only the record of a begun run."""
    (output / f"{stage}.manifest.json").rename(output / f"{stage}.partial.json")
    finished = call(stage, *arguments)
    assert finished.returncode == 0, finished.stderr
    return finished.last_line


def test_summaries_tell_only_of_what_this_run_did(root, tmp_path, monkeypatch, caplog):
    shutil.copytree(root / "acts", tmp_path / "acts")
    line = resume("capture_activations", capture_args(root, tmp_path / "acts"), tmp_path / "acts")
    assert "an earlier run captured all of them" in line
    assert "tokens/s" not in line and "BOS" not in line
    caplog.set_level("INFO", logger="saint")
    with monkeypatch.context() as patch:
        patch.setattr(capture_top_activating_sentences.shutil, "rmtree", lambda _: None)
        top_sentences(tmp_path, root / "acts", tmp_path / "top")
    assert " sentences/s encoded and ranked" in caplog.messages[-1]
    line = resume(
        "capture_top_activating_sentences",
        top_args(tmp_path, root / "acts", tmp_path / "top"),
        tmp_path / "top",
    )
    assert "an earlier run encoded all of them" in line and "sentences/s" not in line


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


def test_without_a_terminal_progress_is_a_line_now_and_then(monkeypatch, caplog, capsys):
    caplog.set_level("INFO", logger="saint")

    def work(total):
        with program.progress(total, unit="tok", description="encode", unit_scale=True) as bar:
            bar.refresh()
            for _ in range(4):
                clock[0] += 100.0
                bar.update(500)
                bar.set_postfix(loss=1)
        return [message for message in caplog.messages if "encode" in message]

    clock = [0.0]
    monkeypatch.setattr(program.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(program.tqdm, "monitor_interval", 0)
    monkeypatch.setattr("tqdm.std.time", lambda: clock[0])
    lines = work(4000)
    assert len(lines) == 2 and capsys.readouterr().err == ""
    assert lines[0].startswith("encode: 500/4.00k tok, 5.00tok/s")  # after 20 s, then 180
    assert "01:40 gone, 11:40 left" in lines[0] and "05:00 gone, 08:19 left" in lines[1]
    assert "500/? tok" in work(None)[2]
    caplog.clear()
    monkeypatch.setattr(program, "_FIRST_LINE_SECONDS", 500.0)
    assert work(4000) == []
    monkeypatch.setattr(program, "_FIRST_LINE_SECONDS", 1.0)
    monkeypatch.setenv("RANK", "1")
    assert work(4000) == []


def test_a_bar_of_ranks_says_whose_it_is():
    def label(world_size: int, model_parallel_size: int) -> str:
        place = workers.Workers(0, world_size, torch.device("cpu"), model_parallel_size)
        return place.label("capture")

    assert label(1, 1) == label(4, 4) == "capture"
    assert label(4, 1) == "capture (rank 0's 1/4)"
