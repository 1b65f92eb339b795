"""The quality benchmark's own measures, against dense float64, and what it keeps and says."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from benchmarks import sae_quality
from benchmarks.sae_quality import SETTINGS, Cache, active, calibrate, dead_share, measure
from benchmarks.sae_quality_contenders import Dictionary, Setting, Task, saint
from sae import standardise
from saint.store.shuffled_rows import open_batched_rows
from tests.support.training_rows import write_rows

D_MODEL, N_LATENTS, K = 16, 32, 4


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> Task:
    root = write_rows(tmp_path_factory.mktemp("quality"))
    rows, mean = open_batched_rows(root / "rows"), torch.zeros(D_MODEL)
    return Task(rows, mean, N_LATENTS, K, 32, n_steps=6, dead_tokens=64, device=torch.device("cpu"))


def rows_of(task: Task, n: int) -> Tensor:
    return standardise(task.rows.read("train", 0, n).float())[0]


def a_dictionary(*, by_rule: bool, seed: int = 0) -> Dictionary:
    torch.manual_seed(seed)
    w_enc, w_dec = torch.randn(2, N_LATENTS, D_MODEL).unbind()
    b_enc, bias = 0.3 * torch.randn(N_LATENTS), 0.2 * torch.randn(D_MODEL)
    levels = torch.rand(N_LATENTS) + 0.5 if by_rule else None
    return Dictionary.of(w_enc, b_enc, w_dec, bias, levels)


def dense_hidden(dictionary: Dictionary, x: Tensor, factor: float) -> Tensor:
    """The definition, token by token, in float64."""
    pre = x.double() @ dictionary.w_enc.double().T + dictionary.b_enc.double()
    hidden = torch.zeros_like(pre)
    for token, row in enumerate(pre):
        if dictionary.levels is None:
            kept = row.argsort(descending=True)[:K]
        else:
            kept = (row > factor * dictionary.levels.double()).nonzero().squeeze(1)
        hidden[token, kept] = row[kept].clamp_min(0)
    return hidden


@pytest.mark.parametrize("by_rule", [False, True])
def test_a_contender_is_measured_as_dense_float64_does(task, by_rule):
    dictionary, x = a_dictionary(by_rule=by_rule), rows_of(task, 200)
    # A little above the calibrated one, which lies on an activation: rounding would decide there.
    factor = 1.0001 * calibrate(dictionary, x, K) if by_rule else 0.0
    hidden = dense_hidden(dictionary, x, factor)
    torch.testing.assert_close(
        active(dictionary, x, K, factor).double(), hidden, rtol=1e-4, atol=1e-5
    )
    decoded = hidden @ dictionary.w_dec.double() + dictionary.b_dec.double()
    centred = x.double() - x.double().mean(0)
    found = measure(dictionary, x, K, factor)
    wanted = float((decoded - x.double()).square().sum() / centred.square().sum())
    assert found["fvu"] == pytest.approx(wanted, rel=1e-5)
    assert found["l0"] == float((hidden > 0).double().sum() / len(x))


def test_of_reads_an_encoder_that_subtracts_its_bias_and_any_decoder_norm(task):
    torch.manual_seed(1)
    w_enc, w_dec = torch.randn(2, N_LATENTS, D_MODEL).unbind()
    b_enc, bias, levels = torch.randn(N_LATENTS), torch.randn(D_MODEL), torch.rand(N_LATENTS)
    x = rows_of(task, 64)
    pre = (x - bias) @ w_enc.T + b_enc
    wanted = (pre * (pre > levels)) @ w_dec + bias
    made = Dictionary.of(w_enc, b_enc, w_dec, bias, levels)
    torch.testing.assert_close(made.w_dec.norm(dim=1), torch.ones(N_LATENTS))
    decoded = active(made, x, K, 1.0) @ made.w_dec + made.b_dec
    torch.testing.assert_close(decoded, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("k", [1, 3, 5])
def test_calibration_gives_k_latents_a_token(task, k):
    dictionary, x = a_dictionary(by_rule=True), rows_of(task, 256)
    n_active = measure(dictionary, x, k, calibrate(dictionary, x, k))["l0"] * len(x)
    assert abs(n_active - k * len(x)) <= 1, "but for the one that the threshold lies on"


def test_dead_latents_are_those_that_the_last_rows_do_not_activate(task):
    dictionary = a_dictionary(by_rule=False)
    last = task.n_steps * task.batch_size
    x = standardise(task.rows.read("train", last - task.dead_tokens, last).float())[0]
    fired = (dense_hidden(dictionary, x, 0.0) > 0).any(0)
    assert 0 < int(fired.sum()) < N_LATENTS
    assert dead_share(dictionary, task, 0.0) == pytest.approx(1 - float(fired.float().mean()))


def a_contender(quality: float, trained: list[tuple[float, Setting | None, int]]):
    """Something that trains at once: worse the further its rate is from 0.004."""

    def train(task: Task, setting: Setting | None, seed: int) -> Dictionary:
        trained.append((quality, setting, seed))
        error = quality + (abs(setting.learning_rate - 0.004) * 100 if setting else 0.0)
        w_dec = torch.cat([torch.eye(D_MODEL), -torch.eye(D_MODEL)])
        levels = None if quality > 0.15 else torch.ones(N_LATENTS)
        bias = torch.full((D_MODEL,), 0.01 * seed)
        return Dictionary.of((1 - error) * w_dec, torch.zeros(N_LATENTS), w_dec, bias, levels)

    return train


@pytest.fixture
def trained(task, monkeypatch) -> list[tuple[float, Setting | None, int]]:
    """What was trained: SAINT and two peers stand for the real ones, which take minutes."""
    made: list[tuple[float, Setting | None, int]] = []
    contenders = {"saint": 0.1, "good_peer": 0.2, "bad_peer": 0.6}
    monkeypatch.setattr(
        sae_quality, "CONTENDERS", {n: a_contender(q, made) for n, q in contenders.items()}
    )
    x = standardise(task.rows.read("val", 0, 64).float())[0]
    monkeypatch.setattr(
        sae_quality, "held_out_halves", lambda *_: sae_quality.HeldOut(x[:32], x[32:])
    )
    monkeypatch.setattr(sae_quality, "load_task", lambda args: task)
    return made


def arguments(tmp_path: Path) -> list[str]:
    flags = ["--cache_dir", tmp_path / "cache", "--n_settings", 5, "--seeds", 0, 1]
    return [str(f) for f in (*flags, "--contenders", "saint", "good_peer", "bad_peer")]


def test_the_last_line_is_the_summary_and_the_cache_is_taken_up_again(
    tmp_path, trained, capsys, task
):
    sae_quality.main(arguments(tmp_path))
    printed = capsys.readouterr().out
    found = json.loads(printed.splitlines()[-1])
    rows = found["rows"]
    assert found["saint"] == rows["saint"]["fvu_at_k"] < found["best_peer"]
    assert found["best_peer"] == rows["good_peer"]["fvu_at_k"] < rows["bad_peer"]["fvu_at_k"]
    assert found["best_peer_name"] == "good_peer"
    assert found["spread"] == max(row["spread"] for row in rows.values()) > 0
    assert found["dead"] == rows["saint"]["dead"] and found["l0"] == rows["saint"]["l0"]
    assert {row["setting"] for name, row in rows.items() if name != "saint"} == {str(SETTINGS[0])}
    assert rows["saint"]["setting"] == "default" and rows["saint"]["seeds"] == [0, 1]
    # All contenders at the first setting before any at the second; each rate's best again, whole.
    search = [setting for _, setting, seed in trained[:27]]
    assert search[:15] == [setting for setting in SETTINGS[:5] for _ in range(3)]
    nearest = sorted(SETTINGS[:4], key=lambda setting: abs(setting.learning_rate - 0.004))
    assert search[15:] == [setting for setting in nearest for _ in range(3)]
    kept = sorted((tmp_path / "cache").glob(f"*_s{task.n_steps}_*/*.json"))
    assert len(kept) == 4 * 3 + 2 + 3, (
        "the search's, the default's seeds, the best ones' other seed"
    )
    assert len(list((tmp_path / "cache").rglob("*.json"))) == len(kept) + 5 * 3

    trained.clear()
    sae_quality.main(arguments(tmp_path))
    assert trained == [], "all of it was in the cache"
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == found
    gone = next(path for path in kept if path.name.startswith("bad_peer") and "seed1" in path.name)
    gone.unlink()
    sae_quality.main(arguments(tmp_path))
    assert trained == [(0.6, SETTINGS[0], 1)], "only what is missing is made again"


def test_a_cache_belongs_to_its_rows_size_and_length(task, tmp_path):
    folders = {Cache(tmp_path, task).folder}
    for change in ({"n_latents": 33}, {"k": 5}, {"batch_size": 16}, {"n_steps": 7}):
        folders.add(Cache(tmp_path, Task(**{**vars(task), **change})).folder)
    assert len(folders) == 5


def test_saint_itself_is_a_contender(task):
    made = [saint(task, setting, 3) for setting in (None, Setting(0.004, 0.5, 0.999))]
    for dictionary in made:
        torch.testing.assert_close(dictionary.w_dec.norm(dim=1), torch.ones(N_LATENTS))
        x = rows_of(task, 64)
        factor = 0.0 if dictionary.levels is None else calibrate(dictionary, x, K)
        assert 0 < measure(dictionary, x, K, factor)["fvu"] < 1.5
    assert not torch.equal(made[0].w_enc, made[1].w_enc)
