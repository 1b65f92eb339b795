"""What careless people do: odd names, two runs on one store, text that is none, errors of ranks."""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from sae import load_sae
from saint.doctor.__main__ import diagnose, next_command
from saint.doctor.__main__ import main as doctor
from saint.stage import program
from saint.stage.errors import UserError, is_rank_lost
from saint.stage.locks import hold
from saint.stage.manifests import lock_path, manifest_path
from saint.store.activation_store import open_store
from tests.support.pipeline import capture_args, outputs, preprocess, rows_of, train_args
from tests.support.program import call, fork


def test_a_name_with_brackets_resumes_keeps_its_checkpoints_and_starts_over(root, tmp_path):
    save, stranger = tmp_path / "a[k=4].pt", tmp_path / "sae_checkpoints" / "ak.step_000000001.pt"
    arguments = train_args(root, save, checkpoint_minutes=1e-6, num_epochs=1)
    assert call("sae_training", *arguments, die_at=120).returncode < 0
    stranger.write_text("another run's")
    assert len(list(save.parent.glob("sae_checkpoints/a*step_*.pt"))) == 3  # two are kept
    done = call("sae_training", *arguments)
    assert done.returncode == 0 and "continuing at step" in done.stderr, done.stderr
    plain = train_args(root, tmp_path / "plain" / "a.pt", num_epochs=1)
    assert call("sae_training", *plain).returncode == 0
    mine, theirs = (load_sae(p, device="cpu") for p in (save, tmp_path / "plain" / "a.pt"))
    assert mine.state_dict().keys() == theirs.state_dict().keys()
    assert all((mine.state_dict()[n] == t).all() for n, t in theirs.state_dict().items())
    assert "done already" in call("sae_training", *arguments).last_line
    over = call("sae_training", *arguments, "--overwrite")
    assert over.returncode == 0 and "continuing" not in over.stderr
    assert stranger.read_text() == "another run's"


def hold_until_killed(path: str) -> None:
    lock = hold(Path(path))
    Path(path + ".held").touch()
    time.sleep(60)
    assert lock


def test_of_two_runs_in_place_on_one_store_one_goes_on(root, tmp_path):
    """They would write to different outputs: it is the store that is locked."""
    store_dir = tmp_path / "acts"
    shutil.copytree(root / "acts", store_dir)
    before = rows_of(open_store(store_dir))
    lock = lock_path(manifest_path(store_dir, "capture_activations"))
    other = fork(hold_until_killed, str(lock))
    while not Path(f"{lock}.held").exists():
        time.sleep(0.01)
    with pytest.raises(UserError, match=rf"another run \(process {other.pid} on "):
        preprocess(root, "--in_place", input_dir=store_dir, **outputs(tmp_path / "b"))
    other.kill()
    other.join()
    preprocess(root, "--in_place", input_dir=store_dir, **outputs(tmp_path / "a"))
    with pytest.raises(
        UserError, match=r"is preprocessed in place into .*: --output_dir .* cannot"
    ):
        preprocess(root, "--in_place", input_dir=store_dir, **outputs(tmp_path / "b"))
    assert torch.equal(rows_of(open_store(store_dir)), before)
    assert not lock.exists()


def test_text_that_is_no_utf8_is_skipped_and_counted(root, tmp_path):
    texts = pa.array([b"Senior diplomats", b"\xff\xfe nuclear", b"the court", None], pa.binary())
    validity, offsets, data = texts.buffers()
    torn = pa.StringArray.from_buffers(4, offsets, data, validity)
    (tmp_path / "data").mkdir()
    pq.write_table(pa.table({"text": torn}), tmp_path / "data" / "a.parquet")
    flags = {"dataset_dir": tmp_path / "data", "num_samples": 4, "sentences_per_shard": 2}
    done = call("capture_activations", *capture_args(root, tmp_path / "acts", **flags))
    assert done.returncode == 0 and "2 rows skipped" in done.stderr, done.stderr
    assert open_store(tmp_path / "acts").n_sentences == 2


def test_an_error_of_all_ranks_is_said_once_and_torchrun_is_told(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(program.time, "sleep", lambda seconds: None)
    for rank in (0, 1, 2):
        file = tmp_path / "attempt_0" / str(rank) / "error.json"
        file.parent.mkdir(parents=True)
        monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(file))
        program.say_once("--k 65 is larger than --n_latents 64", rank)
    assert capsys.readouterr().err == "error: --k 65 is larger than --n_latents 64\n"
    told = json.loads((tmp_path / "attempt_0" / "0" / "error.json").read_text())
    assert told["message"]["message"] == "error: --k 65 is larger than --n_latents 64"


def test_a_rank_whose_peer_ended_says_so_in_one_line(capsys, monkeypatch):
    lost = RuntimeError("[gloo/transport/tcp/pair.cc:553] Connection closed by peer [127.0.0.1]:4")
    assert is_rank_lost(lost) and not is_rank_lost(RuntimeError("a bug"))

    def main() -> None:
        raise lost

    monkeypatch.setenv("RANK", "1")
    monkeypatch.setattr(program.signal, "signal", lambda *_: None)
    with pytest.raises(SystemExit, match="1"):
        program.run_stage(main)
    assert capsys.readouterr().err.startswith("error (rank 1): another rank has ended")


def test_a_path_may_be_a_string_and_a_directory_is_one_line(root, tmp_path):
    assert load_sae(str(root / "trained_sae.pt"), device="cpu").config.k == 4
    with pytest.raises(UserError, match=tmp_path.name):
        load_sae(str(tmp_path), device="cpu")


def test_the_doctor_names_what_is_damaged_unfinished_and_stale_and_what_comes_next(
    root, tmp_path, capsys
):
    with pytest.raises(UserError, match="nothing that a stage made"):
        diagnose(tmp_path)
    run = tmp_path / "run"
    run.mkdir()
    for name in ("acts", "acts_batched"):
        shutil.copytree(root / name, run / name)
    for name in ("acts_mean.pt", "trained_sae.pt"):
        for path in (root / name, root / f"{name}.manifest.json"):
            shutil.copy(path, run)
    doctor([str(run)])
    shown = capsys.readouterr()
    assert shown.err == "" and "64 latents of width 32, k 4, layer 2 resid_pre" in shown.out
    assert "next: sae_evaluation.py" in shown.out and "was made from acts/" in shown.out
    assert "stale" not in shown.out

    shutil.rmtree(run / "acts")
    assert any("the store that it was made from" in line for line in diagnose(run).stale)
    rows = run / "acts_batched" / "train_00000.safetensors"
    data = rows.read_bytes()
    rows.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    (run / "trained_sae.pt").unlink()
    (run / "x.pt.partial.json").write_text('{"arguments": {}, "sources": {}}')
    with pytest.raises(SystemExit, match="1"):
        doctor([str(run)])
    errors = capsys.readouterr().err
    for words in (f"{rows} is corrupt", "trained_sae.pt", "has not ended"):
        assert words in errors
    assert "it resumes" in next_command(diagnose(run))


def test_what_a_killed_writer_left_beside_an_sae_goes_and_others_stay(root, tmp_path):
    torn = [tmp_path / f".sae.{suffix}.2147483646.tmp" for suffix in ("json", "safetensors")]
    stranger = tmp_path / ".saetta.json.2147483646.tmp"
    save = tmp_path / "sae.safetensors"
    for path in (*torn, stranger):
        path.write_text("{")
    done = call("sae_training", *train_args(root, save, num_epochs=1))
    assert done.returncode == 0, done.stderr
    assert not any(path.exists() for path in torn) and stranger.exists()
    for path in torn:
        path.write_text("{")
    out = ["--format", "saelens", "--output_dir", tmp_path / "lens"]
    assert call("saint_exchange", "export", save, *out).returncode == 0
    done = call("saint_exchange", "import", tmp_path / "lens", "--output_path", save)
    assert done.returncode == 0, done.stderr
    assert not any(path.exists() for path in torn) and stranger.exists()


def test_a_damaged_checkpoint_is_one_line_and_the_one_before_is_taken(root, tmp_path):
    save = tmp_path / "sae.pt"
    arguments = train_args(root, save, checkpoint_minutes=1e-6, num_epochs=1)
    assert call("sae_training", *arguments, die_at=120).returncode < 0
    before, newest = sorted((tmp_path / "sae_checkpoints").glob("sae.step_*.pt"))
    content = newest.read_bytes()
    newest.write_bytes(content[: len(content) // 2])
    done = call("sae_training", *arguments)
    assert done.returncode == 0 and "Traceback" not in done.stderr
    lines = [line for line in done.stderr.splitlines() if newest.name in line]
    assert len(lines) == 1 and "is damaged" in lines[0], lines
    assert f"continuing at step {int(before.stem.split('_')[-1])} of" in done.stderr
