"""Text to a trained and evaluated SAE, by running the stages as a user does, on a tiny model."""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file

from llama_3 import HookPoint, load_llama
from sae import load_sae, standardise
from saint.stage.errors import UserError
from saint.store.activation_store import SENTENCES, open_store
from saint.store.dataset import is_held_out
from saint.store.shuffled_rows import open_batched_rows
from tests.support.pipeline import capture_args, preprocess_args, train_args, tree_bytes
from tests.support.program import call, start


def test_the_store_holds_what_the_model_computes(root: Path):
    store = open_store(root / "acts")
    model, tokenizer = load_llama(
        root / "model", device=torch.device("cpu"), dtype=torch.float32, n_layers=3
    )
    texts = [t for f in (0, 1) for t in pq.read_table(root / f"data/part{f}.parquet")["text"]]
    hook = HookPoint(2, "resid_pre")
    seen = []
    for index in range(store.n_shards):
        shard = store.read_shard(index)
        part = pq.read_table(root / "acts" / SENTENCES / f"part-{index:05d}.parquet").to_pydict()
        assert part["sentence_id"] == shard.sentence_ids.tolist()
        for i, sentence_id in enumerate(part["sentence_id"]):
            seen.append(sentence_id)
            assert part["text"][i] == texts[sentence_id].as_py()
            tokens = tokenizer.encode(part["text"][i], bos=False)[:40]
            rows = slice(int(shard.offsets[i]), int(shard.offsets[i + 1]))
            assert part["token_ids"][i] == tokens == shard.token_ids[rows].tolist()
            if i % 10:
                continue
            alone = model.capture(torch.tensor([[tokenizer.bos_id, *tokens]]), [hook])[hook]
            torch.testing.assert_close(shard.read(rows).float(), alone[0, 1:], rtol=1e-2, atol=2e-2)
    assert len(set(seen)) == len(seen) == store.n_sentences == 200


def test_bytes_do_not_depend_on_interruptions_and_a_larger_sample_keeps_shards(root, tmp_path):
    out = tmp_path / "acts"
    process = start("capture_activations", *capture_args(root, out), output=tmp_path / "log")
    while not list(out.glob("layer_2/shard_*")) and process.is_alive():
        time.sleep(0.005)
    process.kill()
    process.join()
    assert not (out / "capture_activations.manifest.json").exists()
    assert call("capture_activations", *capture_args(root, out)).returncode == 0
    assert tree_bytes(out) == tree_bytes(root / "acts")
    before = tree_bytes(out)
    bigger = call("capture_activations", *capture_args(root, out, num_samples=230))
    assert bigger.returncode == 0, bigger.stderr
    after = tree_bytes(out)
    assert {name: after[name] for name in before} == before
    assert open_store(out).n_sentences == 230


def test_other_arguments_stop_and_overwrite_starts_over(root, tmp_path):
    out = tmp_path / "acts"
    shutil.copytree(root / "acts", out)
    (out / "a_note.txt").write_text("mine")
    other = call("capture_activations", *capture_args(root, out, layers="1"))
    assert other.returncode == 1 and "--layers 2, this run has 1" in other.last_line
    assert tree_bytes(out).keys() - {"a_note.txt"} == tree_bytes(root / "acts").keys()
    over = call("capture_activations", *capture_args(root, out, layers="1"), "--overwrite")
    assert over.returncode == 0, over.stderr
    assert (out / "a_note.txt").read_text() == "mine"
    assert (out / "layer_1").exists() and not (out / "layer_2").exists()


def test_several_layers_and_hook_points_get_directories_of_their_own(root, tmp_path):
    out = tmp_path / "acts"
    flags = capture_args(root, out, layers="1,2", hook_points="resid_pre,mlp_out", num_samples=60)
    assert call("capture_activations", *flags).returncode == 0
    assert {p.name for p in out.glob("layer_*")} == {
        "layer_1", "layer_2", "layer_1.mlp_out", "layer_2.mlp_out"
    }  # fmt: skip
    done = call("sae_preprocessing", "--input_dir", out, "--batch_size", 32, "--num_processes", 1)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "acts_batched/layer_1.mlp_out/train_00000.safetensors").exists()
    assert (tmp_path / "acts_mean.layer_2.pt").exists()
    with pytest.raises(UserError, match="holds layer_1, layer_1.mlp_out, layer_2, .*: name one"):
        open_batched_rows(tmp_path / "acts_batched")


def test_the_shuffle_keeps_every_row_and_splits_by_sentence(root):
    store, rows = open_store(root / "acts"), open_batched_rows(root / "acts_batched")
    wanted = {"train": [], "val": []}
    for index in range(store.n_shards):
        shard = store.read_shard(index)
        for a, b in zip(shard.offsets[:-1].tolist(), shard.offsets[1:].tolist(), strict=True):
            split = "val" if is_held_out(shard.token_ids[a:b].tolist()) else "train"
            wanted[split] += [
                row.tobytes() for row in shard.read(slice(a, b)).view(torch.int16).numpy()
            ]
    for split in ("train", "val"):
        got = rows.read(split, 0, rows.n_rows(split)).view(torch.int16).numpy()
        assert sorted(row.tobytes() for row in got) == sorted(wanted[split])
    assert rows.n_rows("val") > 0
    order = [row.tobytes() for row in rows.read("train", 0, 500).view(torch.int16).numpy()]
    assert order != wanted["train"][:500]


def test_the_mean_is_that_of_standardised_training_rows(root):
    rows = open_batched_rows(root / "acts_batched")
    x = rows.read("train", 0, rows.n_rows("train")).float()
    mean = torch.load(root / "acts_mean.pt", weights_only=True)
    assert mean.dtype == torch.float32
    torch.testing.assert_close(mean, standardise(x)[0].double().mean(0).float())


def test_the_shuffle_does_not_depend_on_processes_or_interruptions(root, tmp_path):
    flags = {"output_dir": tmp_path / "b", "mean_filepath": tmp_path / "m.pt"}
    assert (
        call("sae_preprocessing", *preprocess_args(root, num_processes=3, **flags)).returncode == 0
    )
    assert tree_bytes(tmp_path / "b") == tree_bytes(root / "acts_batched")
    flags = {"output_dir": tmp_path / "c", "mean_filepath": tmp_path / "n.pt"}
    arguments = preprocess_args(root, memory_gb=0.02, **flags)
    for pattern in (".*.rows.tmp", "train_*"):
        process = start("sae_preprocessing", *arguments, output=tmp_path / "log")
        while not list((tmp_path / "c").glob(pattern)) and process.is_alive():
            time.sleep(0.002)
        process.kill()
        process.join()
    assert call("sae_preprocessing", *arguments).returncode == 0
    assert tree_bytes(tmp_path / "c") == tree_bytes(root / "acts_batched")
    assert (tmp_path / "n.pt").read_bytes() == (root / "acts_mean.pt").read_bytes()


def test_batches_of_any_size_walk_through_the_rows_in_order(root):
    rows = open_batched_rows(root / "acts_batched")
    n = rows.n_rows("train")
    everything = rows.read("train", 0, n)
    got = torch.cat(
        list(rows.batches("train", batch_size=97, first_batch=0, n_batches=2 * n // 97))
    )
    torch.testing.assert_close(got, torch.cat([everything, everything])[: len(got)])
    resumed = list(rows.batches("train", batch_size=97, first_batch=5, n_batches=6))
    assert torch.equal(resumed[0], got[5 * 97 : 6 * 97])
    halves = [
        next(rows.batches("train", batch_size=96, first_batch=1, n_batches=2, part=(r, 2)))
        for r in (0, 1)
    ]
    assert torch.equal(torch.cat(halves), everything[96:192])


def test_training_learns_and_records_what_it_should(root):
    sae = load_sae(root / "trained_sae.pt", device="cpu")
    config = sae.config
    assert (config.layer, config.hook_point, config.k, config.prepend_bos) == (
        2,
        "resid_pre",
        4,
        True,
    )
    torch.testing.assert_close(sae.W_dec.norm(dim=1), torch.ones(64), rtol=0, atol=1e-6)
    metrics = [json.loads(line) for line in (root / "trained_sae.metrics.jsonl").open()]
    names = {
        "train/loss", "train/aux_loss", "train/total_loss", "debug/dead_latents_ratio",
        "debug/max_dead_latent", "debug/max_dead_latent_count", "learning_rate",
    }  # fmt: skip
    assert names <= metrics[0].keys() and "val/fvu" in metrics[-1]
    assert metrics[-1]["train/loss"] < 0.7 * metrics[0]["train/loss"]
    assert [m["step"] for m in metrics] == sorted({m["step"] for m in metrics})
    rows = open_batched_rows(root / "acts_batched")
    x = torch.cat([rows.read(s, 0, rows.n_rows(s)) for s in ("train", "val")])
    values, indices = sae.encode(standardise(x)[0]).matrices()
    dense = torch.zeros(len(x), 64).scatter_add(1, indices, values)
    torch.testing.assert_close(sae.max_activations, dense.amax(0), rtol=1e-5, atol=1e-6)


def test_a_killed_training_run_ends_with_the_same_bits(root, tmp_path):
    save = tmp_path / "sae.pt"
    arguments = [*train_args(root, save), "--checkpoint_minutes", "0.0001"]
    for least in (2, 6):
        process = start("sae_training", *arguments, output=tmp_path / "log")
        while process.is_alive():
            found = sorted((tmp_path / "sae_checkpoints").glob("*.step_*.pt"))
            if found and int(found[-1].stem.split("_")[-1]) >= least:
                break
            time.sleep(0.002)
        process.kill()
        process.join()
        assert not save.exists()
    finished = call("sae_training", *arguments)
    assert finished.returncode == 0 and "continuing at step" in finished.stderr, finished.stderr
    mine, theirs = load_sae(save, device="cpu"), load_sae(root / "trained_sae.pt", device="cpu")
    for name, tensor in theirs.state_dict().items():
        assert torch.equal(mine.state_dict()[name], tensor), name
    steps = [json.loads(line)["step"] for line in (tmp_path / "sae.metrics.jsonl").open()]
    assert steps == sorted(set(steps))


def test_more_logs_than_batches_just_works_and_zero_checkpoints_leaves_none(root, tmp_path):
    flags = {"logs_per_epoch": 100000, "keep_last_n": 0, "num_epochs": 1}
    finished = call("sae_training", *train_args(root, tmp_path / "sae.pt", **flags))
    assert finished.returncode == 0, finished.stderr
    assert not list((tmp_path / "sae_checkpoints").glob("*.step_*"))


def test_training_starts_from_another_sae(root, tmp_path):
    flags = {"model_load_path": root / "trained_sae.pt", "num_epochs": 1, "learning_rate": 1e-12}
    assert call("sae_training", *train_args(root, tmp_path / "sae.pt", **flags)).returncode == 0
    mine, theirs = (
        load_sae(p, device="cpu") for p in (tmp_path / "sae.pt", root / "trained_sae.pt")
    )
    torch.testing.assert_close(mine.W_enc, theirs.W_enc)


def test_the_evaluation_reports_what_dense_formulas_give(root):
    report = json.loads((root / "sae_evaluation.json").read_text())
    wanted = {
        "fvu", "normalized_mse", "l0", "dead_share", "ce_clean", "ce_sae", "ce_mean_ablated",
        "loss_recovered", "n_tokens",
    }  # fmt: skip
    assert wanted <= report.keys()
    assert sum(report["density_histogram"]["n_latents"]) > 0
    page = (root / "sae_evaluation.html").read_text()
    assert page.count("<svg") == 5 and "src=" not in page
    sae = load_sae(root / "trained_sae.pt", device="cpu")
    model, tokenizer = load_llama(root / "model", device=torch.device("cpu"), dtype=torch.float32)
    hook, sums, xs, errors = HookPoint(2, "resid_pre"), np.zeros(3), [], []
    held_out = []
    for file in (0, 1):
        for text in pq.read_table(root / f"data/part{file}.parquet")["text"].to_pylist():
            tokens = tokenizer.encode(text or "", bos=False)[:40]
            if (text or "").strip() and len(tokens) > 1 and is_held_out(tokens):
                held_out.append(tokens)
    raws = []
    for tokens in held_out:
        raw = model.capture(torch.tensor([[tokenizer.bos_id, *tokens]]), [hook])[hook][0, 1:]
        raws.append(raw)
        x = standardise(raw)[0]
        xs.append(x)
        errors.append(sae(x) - x)
    mean = torch.cat(raws).mean(0)
    for tokens, raw in zip(held_out, raws, strict=True):
        for i, new in enumerate((raw, sae.reconstruct(raw), mean.expand_as(raw))):

            def replace(activation, positions, new=new):
                return torch.cat([activation[:, :1], new[None].to(activation)], dim=1)

            logits = model(torch.tensor([[tokenizer.bos_id, *tokens]]), edits={hook: replace})
            loss = torch.nn.functional.cross_entropy(
                logits[0, 1:-1], torch.tensor(tokens[1:]), reduction="sum"
            )
            sums[i] += float(loss)
    n = sum(len(tokens) - 1 for tokens in held_out)
    x, error = torch.cat(xs), torch.cat(errors)
    assert report["n_tokens"] == len(x)
    fvu = float(error.square().sum() / (x - x.mean(0)).square().sum())
    assert report["fvu"] == pytest.approx(fvu, rel=1e-4)
    assert report["normalized_mse"] == pytest.approx(
        float((error.square().sum(1) / x.square().sum(1)).mean()), rel=1e-4
    )
    for name, value in zip(("ce_clean", "ce_sae", "ce_mean_ablated"), sums / n, strict=True):
        assert report[name] == pytest.approx(value, rel=1e-4), name
    share = (sums[2] - sums[1]) / (sums[2] - sums[0])
    assert report["loss_recovered"] == pytest.approx(share, rel=1e-3)


BAD_CAPTURES = {
    "no model": ({"model_dir": "nowhere"}, "nowhere"),
    "no text column": ({"text_column": "words"}, "has no column 'words'"),
    "no dataset": ({"dataset_dir": "nowhere"}, "does not exist"),
    "layer out of range": ({"layers": "4"}, "the model has layers 0 to 3"),
    "unknown hook": ({"hook_points": "resid_mid"}, "expected one of resid_pre"),
}


@pytest.mark.parametrize("changes, message", BAD_CAPTURES.values(), ids=BAD_CAPTURES)
def test_bad_capture_input_is_one_clear_line_and_writes_nothing(root, tmp_path, changes, message):
    finished = call("capture_activations", *capture_args(root, tmp_path / "out", **changes))
    assert finished.returncode == 1
    assert finished.last_line.startswith("error: ") and message in finished.last_line
    assert not (tmp_path / "out").exists()


def test_an_empty_dataset_and_a_truncated_checkpoint_are_named(root, tmp_path):
    (tmp_path / "empty").mkdir()
    flags = capture_args(root, tmp_path / "out", dataset_dir=tmp_path / "empty")
    assert "no *.parquet" in call("capture_activations", *flags).last_line
    pq.write_table(pa.table({"text": pa.array([], pa.string())}), tmp_path / "empty/a.parquet")
    assert "no rows" in call("capture_activations", *flags).last_line
    shutil.copytree(root / "model", tmp_path / "model")
    weights = tmp_path / "model" / "consolidated.00.pth"
    weights.write_bytes(weights.read_bytes()[:2000])
    finished = call(
        "capture_activations", *capture_args(root, tmp_path / "o", model_dir=tmp_path / "model")
    )
    assert finished.returncode == 1 and "consolidated.00.pth" in finished.last_line
    assert finished.last_line.startswith("error: ") and not (tmp_path / "o").exists()


def test_corrupt_shards_are_found_and_named(root, tmp_path):
    def preprocess(store: Path) -> str:
        flags = {
            "input_dir": store,
            "output_dir": tmp_path / "b",
            "mean_filepath": tmp_path / "m.pt",
        }
        finished = call("sae_preprocessing", *preprocess_args(root, **flags))
        assert finished.returncode == 1
        shutil.rmtree(tmp_path / "b", ignore_errors=True)
        for leftover in tmp_path.glob("m.pt*"):
            leftover.unlink()
        return finished.last_line

    store = tmp_path / "acts"
    shutil.copytree(root / "acts", store)
    shard = store / "layer_2" / "shard_00001.safetensors"
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    assert "shard_00001.safetensors is corrupt" in preprocess(store)
    start = 8 + int.from_bytes(whole[:8], "little")
    for byte in (b"\x07", b"\xff"):  # the offsets come first: other ones, and negative ones
        shard.write_bytes(whole[: start + 8] + 8 * byte + whole[start + 16 :])
        assert "shard_00001.safetensors is corrupt" in preprocess(store)
    shard.write_bytes(whole[:-10])
    assert "shard_00001.safetensors has" in preprocess(store)
    shard.unlink()
    assert "shard_00001.safetensors is listed in its manifest but missing" in preprocess(store)
    (store / "capture_activations.manifest.json").unlink()
    assert "is incomplete" in preprocess(store)


def test_bad_training_input_is_one_clear_line(root, tmp_path):
    def train(**changes) -> str:
        finished = call("sae_training", *train_args(root, tmp_path / "sae.pt", **changes))
        assert finished.returncode == 1 and not (tmp_path / "sae.pt").exists()
        return finished.last_line

    torch.save(torch.zeros(5), tmp_path / "mean.pt")
    assert "has shape (5,), the activations need (32,)" in train(b_pre_path=tmp_path / "mean.pt")
    shutil.copyfile(root / "acts_mean.pt", tmp_path / "mean.pt")
    record = (root / "acts_mean.pt.manifest.json").read_text().replace('"layer_2"', '"layer_1"')
    (tmp_path / "mean.pt.manifest.json").write_text(record)
    found = train(b_pre_path=tmp_path / "mean.pt")
    assert found.endswith("mean.pt is the mean of layer_1, the rows are of layer_2")
    assert "--batch_size 100000 is larger" in train(batch_size=100000)
    assert "--k 65 is larger than --n_latents 64" in train(k=65)
    assert "does not exist" in train(data_dir=tmp_path / "nowhere")
    assert "is not finite at step" in train(learning_rate=9e14, grad_clip=9e14)
    assert (
        "--batch_size 100000 exceeds"
        in call(
            "sae_preprocessing",
            *preprocess_args(root, batch_size=100000, output_dir=tmp_path / "b"),
        ).last_line
    )


def test_files_are_plain_safetensors(root):
    tensors = load_file(root / "acts" / "layer_2" / "shard_00000.safetensors")
    assert tensors["activations"].dtype == torch.bfloat16
    assert set(tensors) == {"activations", "token_ids", "offsets", "sentence_ids"}
