"""`latent_effects.py`: scores against a plain loop, resumed runs, and what reads the file."""

import json
import shutil

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

import latent_effects
from llama_3 import load_llama
from sae import load_sae
from saint.evidence import file
from saint.evidence.file import SCHEMA, open_evidence
from saint.stage.errors import UserError
from saint.steering import effects
from saint.steering.effects import crossing, load_effects, word_shows
from tests.support.tiny_steering import one_thread, write_setup

N_LIVE = 40


@pytest.fixture(scope="module", autouse=True)
def threads():
    with one_thread():
        yield


def write_evidence(path, tokenizer):
    """Evidence of 64 latents, of which the last 24 are silent; each one's word is one of a few."""
    words = [" court", " nuclear", " treaty", " diplomats"]
    rows = []
    for latent in range(64):
        live = latent < N_LIVE
        ids = tokenizer.encode("the" + words[latent % 4], bos=False)
        texts = [tokenizer.token_text(i) for i in ids]
        window = {
            "kind": "top", "decile": 0, "split": "explain", "value": 1.0, "sentence_id": 1,
            "start": 0, "position": len(ids) - 1, "token_ids": ids, "tokens": texts,
            "activations": [0.0] * (len(ids) - 1) + [1.0],
        }  # fmt: skip
        row = {name: None for name in SCHEMA.names}
        row |= {
            "latent": latent, "density": 0.01 * live, "n_firing_tokens": 9 * live,
            "n_firing_sentences": 9 * live, "max_activation": float(live),
            "examples": [window] * (5 * live),
        }  # fmt: skip
        rows.append(row)
    meta = {"format": file.FORMAT, "version": file.VERSION}
    schema = SCHEMA.with_metadata({file._METADATA_KEY: json.dumps(meta).encode()})
    pq.write_table(pa.Table.from_pylist(rows, schema=schema), path)


@pytest.fixture(scope="module")
def setup(tmp_path_factory):
    root = tmp_path_factory.mktemp("effects")
    model_dir, sae_path = write_setup(root)
    (root / "tops").mkdir()
    _, tokenizer = load_llama(model_dir, device=torch.device("cpu"), dtype=torch.float32)
    write_evidence(root / "tops" / "evidence.parquet", tokenizer)
    return model_dir, sae_path, root / "tops"


def run(setup, tops, *more):
    flags = ["--llama_model_dir", setup[0], "--sae_model_path", setup[1], "--device", "cpu"]
    flags += ["--evidence_path", tops / "evidence.parquet", "--dtype", "float32"]
    flags += ["--block_latents", "16", "--n_written", "6", "--n_tokens_shown", "3", *more]
    latent_effects.main([str(flag) for flag in flags])
    return tops / "effects.parquet"


@pytest.fixture(scope="module")
def done(setup):
    return run(setup, setup[2])


def test_scores_equal_a_loop_over_latents_and_prompts(setup, done):
    model, tokenizer = load_llama(setup[0], device=torch.device("cpu"), dtype=torch.float32)
    sae = load_sae(setup[1], device="cpu")
    found = load_effects(done, n_latents=64)
    assert sorted(found.rows) == list(range(N_LIVE))
    evidence = open_evidence(setup[2] / "evidence.parquet")
    assert sae.config.layer is not None
    for latent in (0, 7, 39):
        row = found.rows[latent]
        example = evidence.latent(latent)["examples"][0]
        own = example["token_ids"][-1]
        scores, losses = [], []
        for text in effects.PROBES:
            ids = torch.tensor([tokenizer.encode(text, bos=True)])

            def edit(x, positions, latent=latent):
                shift = 8.0 * x.std(-1, keepdim=True) * sae.W_dec[latent]
                shift[:, 0] = 0
                return x + shift

            with torch.no_grad():
                plain = model(ids)[0, -1].double().log_softmax(-1)
                hook = (sae.config.layer, sae.config.hook_point)
                steered = model(ids, edits={hook: edit})[0, -1].double().log_softmax(-1)
            kl = float((steered.exp() * (steered - plain)).sum())
            scores.append(float(steered[own] - plain[own]) / kl**0.5)
            losses.append(float(((plain.exp() - steered.exp()) * plain).sum()))
        assert row["score"] == pytest.approx(np.mean(scores), rel=2e-3, abs=2e-4)
        if row["dose_half_nat"] is not None and np.mean(losses) > 0.5:
            assert row["dose_half_nat"] <= 8.0 + 1e-3
        values = [entry["value"] for entry in row["rising"]]
        assert values == sorted(values, reverse=True) and len(values) == 3


def test_texts_are_written_for_the_best_and_only_for_them(done):
    found = load_effects(done)
    named = [row for row in found if row["word"]]
    best = sorted(named, key=lambda row: -row["score"])[:6]
    written = [row["latent"] for row in found if row["share"] is not None]
    assert sorted(row["latent"] for row in best) == written
    for row in best:
        assert 0 <= row["share"] <= 1 and row["sample"]
        assert row["shows"] == (row["share"] >= 0.75 and row["text_loss"] <= 1.0)
    assert all(found.rows[i]["shows"] for i in found.strongest(5))


def test_interrupted_anywhere_it_ends_with_the_same_bytes(setup, done, tmp_path, monkeypatch):
    expected = done.read_bytes()
    for n_before in (1, 3):  # within the blocks, and before the texts
        tops = tmp_path / str(n_before)
        tops.mkdir()
        shutil.copy(setup[2] / "evidence.parquet", tops)
        left = [n_before]

        def count(path, value, left=left, write=effects.write_json):
            if left[0] == 0:
                raise KeyboardInterrupt
            left[0] -= 1
            write(path, value)

        with monkeypatch.context() as patch:
            patch.setattr(effects, "write_json", count)
            with pytest.raises(KeyboardInterrupt):
                run(setup, tops)
        assert not (tops / "effects.parquet").exists()
        assert run(setup, tops).read_bytes() == expected
        assert not (tops / latent_effects.WORK_DIR).exists()


def test_a_finished_run_is_done_and_other_arguments_are_refused(setup, done):
    before = done.stat().st_mtime_ns
    run(setup, setup[2])
    assert done.stat().st_mtime_ns == before
    with pytest.raises(UserError, match="--dose"):
        run(setup, setup[2], "--dose", "4")
    with pytest.raises(UserError, match="64 latents, not 65"):
        load_effects(done, n_latents=65)
    with pytest.raises(UserError, match="latent_effects.py first"):
        load_effects(done.with_name("none.parquet"))


def test_words_and_crossings():
    assert word_shows("They saw two Courts.", "court") and not word_shows("a curt word", "court")
    assert crossing([0, 4, 8], [0, 0.25, 1.0], 0.5) == pytest.approx(4 + 4 / 3)
    assert crossing([0, 4, 8], [0, 0.25, 0.4], 0.5) is None
    assert crossing([0, 4], [0, -0.1], 0.5) is None


def test_evidence_is_looked_for_beside_the_sae(setup):
    flags = ["--llama_model_dir", setup[0], "--sae_model_path", setup[1], "--device", "cpu"]
    beside = setup[1].parent / "top_activating_sentences" / "evidence.parquet"
    with pytest.raises(UserError, match=f"{beside} does not exist"):
        latent_effects.main([str(flag) for flag in flags])
