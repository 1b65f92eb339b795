"""The evidence reader, promoted tokens against the model itself, and the prompt view end to end."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

import capture_top_activating_sentences as stage
from llama_3 import HookPoint, load_llama
from sae import load_sae, standardise
from saint.evidence.builder import Directions
from saint.evidence.file import open_evidence
from saint.stage.errors import UserError
from tests.support import program
from tests.support.tiny_steering import D_MODEL, write_setup
from tests.support.tiny_store import make_store


@pytest.fixture(scope="module")
def evidence_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("evidence")
    store = make_store(root, n_latents=300, n_sentences=60)
    words = ["--data_dir", store.data_dir, "--model_path", store.sae_path, "--device", "cpu"]
    stage.main([str(w) for w in (*words, "--captured_data_output_dir", root / "top")])
    return root / "top" / "evidence.parquet"


@pytest.fixture(scope="module")
def setup(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return write_setup(tmp_path_factory.mktemp("model"))


def test_reader_gives_the_same_rows_in_every_way(evidence_path: Path) -> None:
    evidence = open_evidence(evidence_path)
    assert evidence.n_latents == 300 and evidence.meta["format"] == "saint.evidence"
    table = pq.read_table(evidence_path).to_pylist()
    assert [row["latent"] for row in table] == list(range(300))
    assert evidence.latent(299) == table[299] and evidence.latent(0) == table[0]
    assert list(evidence.iter_latents([7, 280, 7])) == [table[7], table[280], table[7]]
    assert evidence.summary().column_names == [
        "latent", "density", "max_activation", "n_firing_sentences"
    ]  # fmt: skip
    groups = pq.ParquetFile(evidence_path).metadata
    assert all(groups.row_group(i).num_rows <= 1024 for i in range(groups.num_row_groups))
    for latent in (-1, 300):
        with pytest.raises(UserError, match="has latents 0 to 299"):
            evidence.latent(latent)


def test_damaged_and_foreign_files_are_named(evidence_path: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="does not exist"):
        open_evidence(tmp_path / "nothing.parquet")
    short = tmp_path / "short.parquet"
    short.write_bytes(evidence_path.read_bytes()[:-100])
    with pytest.raises(UserError, match="not a readable parquet file"):
        open_evidence(short)
    foreign = tmp_path / "foreign.parquet"
    pq.write_table(pa.table({"latent": [0]}), foreign)
    with pytest.raises(UserError, match="format None version None"):
        open_evidence(foreign)
    table = pq.read_table(evidence_path)
    pq.write_table(table.slice(1), tmp_path / "part.parquet")
    with pytest.raises(UserError, match="incomplete"):
        open_evidence(tmp_path / "part.parquet")
    later = json.dumps({"format": "saint.evidence", "version": 99}).encode()
    pq.write_table(table.replace_schema_metadata({b"saint": later}), tmp_path / "later.parquet")
    with pytest.raises(UserError, match="version 99"):
        open_evidence(tmp_path / "later.parquet")


def test_promoted_tokens_are_the_models_own_logits(setup: tuple[Path, Path]) -> None:
    model, tokenizer = load_llama(setup[0], device=torch.device("cpu"), dtype=torch.float32)
    sae = load_sae(setup[1], device="cpu")
    directions = Directions.of(sae, setup[0], torch.device("cpu"), tokenizer.n_vocab)
    raised, lowered = directions.promoted(np.arange(10), 5)
    assert raised is not None and lowered is not None
    # A long vector along the direction: the norm's epsilon plays no part.
    logits = model.unembed(1000 * sae.W_dec[:10])
    for latent in range(10):
        scores = logits[latent].detach()
        scale = 1e-2 * scores.abs().max().item()  # weights are bfloat16 where that is fast
        for found, largest in ((raised, True), (lowered, False)):
            best = scores.topk(5, largest=largest).values
            np.testing.assert_allclose(scores[found[0][latent]], best, atol=scale)
            np.testing.assert_allclose(found[1][latent], best, atol=scale)
    assert Directions.of(sae, None, torch.device("cpu"), 5).promoted(np.arange(3), 5) == (
        None,
        None,
    )


def test_prompt_view_shows_the_models_own_latents(setup: tuple[Path, Path], tmp_path: Path) -> None:
    prompt = "Senior diplomats met"
    model, tokenizer = load_llama(setup[0], device=torch.device("cpu"), dtype=torch.float32)
    sae = load_sae(setup[1], device="cpu")
    ids = tokenizer.encode(prompt, bos=True)
    hook = HookPoint(1, "resid_pre")
    rows = model.capture(torch.tensor([ids]), [hook])[hook][0, 1:]
    assert rows.shape[1] == D_MODEL and sae.max_activations is not None
    values, latents = sae.encode(standardise(rows)[0]).matrices()
    shares = values / sae.max_activations[latents]
    found = program.call(
        "latent_browser",
        *("--prompt", prompt, "--model_dir", setup[0], "--sae_model_path", setup[1]),
        *("--labels_path", setup[0].parent / "output" / "parsed_responses.yaml"),
        *("--html", tmp_path / "prompt.html", "--dtype", "float32", "--device", "cpu"),
    )
    assert found.returncode == 0, found.stderr
    lines = found.stdout.splitlines()[1:]
    assert len(lines) == len(ids) - 1, "BOS is left out"
    for line, share, latent in zip(lines, shares, latents, strict=True):
        best = int(share.argmax())
        assert f"{100 * share[best]:.0f} % #{latent[best]}" in line.split(" | ")[0]
    page = (tmp_path / "prompt.html").read_text()
    assert "<h1>Senior diplomats met</h1>" in page and "{{" not in page.replace("{{value}}", "")
    assert "<b>bold</b>" not in page, "a label is text, never markup"


def test_evidence_has_promoted_tokens_only_with_the_captured_model(
    setup: tuple[Path, Path], evidence_path: Path, tmp_path: Path
) -> None:
    assert open_evidence(evidence_path).latent(9)["promoted"] == []
    root = evidence_path.parent.parent
    words = ["--data_dir", root / "activations", "--model_path", root / "sae.pt"]
    words += ["--captured_data_output_dir", tmp_path, "--model_dir", setup[0], "--device", "cpu"]
    with pytest.raises(UserError, match="is not the model that was captured"):
        stage.main([str(w) for w in words])


def test_an_empty_prompt_is_an_error(setup: tuple[Path, Path]) -> None:
    failed = program.call(
        "latent_browser", "--prompt", "", "--model_dir", setup[0], "--sae_model_path", setup[1]
    )
    assert failed.returncode == 1 and failed.last_line == "error: --prompt is empty"
