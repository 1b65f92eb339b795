"""A training run that is left alone: bad batches, signals, schedules, its page."""

from __future__ import annotations

import math
import os
import signal
import statistics
from dataclasses import asdict, fields, replace
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch
from torch import Tensor

import sae_training
from sae import TopKSparseAutoencoder, load_sae, standardise
from saint.kernels import fastest
from saint.stage.errors import UserError
from saint.store.shuffled_rows import open_batched_rows
from saint.training import run, steps, weights
from saint.training.curves_page import PANELS, curves, training_page
from saint.training.metrics import density_quantiles
from saint.training.recipe import Recipe, recipe_table
from saint.training.trainer import Trainer
from tests.support.program import call
from tests.support.training_checks import ALONE, make_sae, needs_cpp
from tests.support.training_ranks import RECIPE
from tests.support.training_rows import metrics_of, on_step, without_times, write_rows

N_STEPS = 24


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_rows(tmp_path_factory.mktemp("rows"))


@pytest.fixture(autouse=True)
def rounded_product_at_any_size(monkeypatch):
    monkeypatch.setattr(fastest, "_LEAST_ROUNDED_D_MODEL", 1)


@pytest.fixture(autouse=True)
def signals():
    """The stage sets handlers: put back those of the tests."""
    before = {s: signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def train(data: Path, save: Path, *flags: object) -> None:
    files = ("--data_dir", data / "rows", "--b_pre_path", data / "mean.pt")
    size = ("--n_latents", 32, "--k", 3, "--num_epochs", 3, "--logs_per_epoch", 4)
    size += ("--validations_per_epoch", 2, "--learning_rate", 0.01)
    arguments = (*files, "--model_save_path", save, *size, "--device", "cpu", *flags)
    sae_training.main([str(argument) for argument in arguments])


def newest_checkpoint(save: Path) -> dict:
    path = sorted((save.parent / "sae_checkpoints").glob(f"{save.stem}.step_*.pt"))[-1]
    return torch.load(path, weights_only=True)


@pytest.mark.parametrize("kernels", ["auto", "dense"])
def test_a_bad_batch_is_stepped_over_once_from_a_checkpoint(
    data, tmp_path, monkeypatch, caplog, kernels
):
    caplog.set_level("INFO", logger="saint")
    on_step(monkeypatch, {13}, lambda rows: rows * torch.nan)
    save = tmp_path / "sae.pt"
    train(data, save, "--checkpoint_minutes", 0.000001, "--kernels", kernels)
    assert "the loss was not finite at step 13: going on from step 1" in caplog.text
    state = newest_checkpoint(save)
    assert (state["step"], state["moments"]["n_steps"]) == (N_STEPS, N_STEPS - 1)
    assert state["skipped_steps"] == [13]
    assert all(torch.isfinite(p).all() for p in load_sae(save, device="cpu").parameters())
    steps = [entry["step"] for entry in metrics_of(save)]
    assert steps == sorted(set(steps))


def test_a_bad_last_batch_leaves_a_finished_run(data, tmp_path, monkeypatch):
    on_step(monkeypatch, {N_STEPS - 1}, lambda rows: rows * torch.nan)
    save = tmp_path / "sae.pt"
    train(data, save, "--checkpoint_minutes", 0.000001)
    last = metrics_of(save)[-1]
    assert last["step"] == N_STEPS and last["val/fvu"] < 1 and last["train/loss"] > 0
    assert 'http-equiv="refresh"' not in save.with_name("sae.training.html").read_text(), (
        "it is over"
    )


def test_a_second_bad_batch_ends_the_run(data, tmp_path, monkeypatch):
    on_step(monkeypatch, {5, 15}, lambda rows: rows * torch.nan)
    with pytest.raises(UserError, match="not finite at step 15, and was not at step 5"):
        train(data, tmp_path / "sae.pt")
    assert not (tmp_path / "sae.pt").exists()


@pytest.mark.parametrize("moments", ["float32", "int8"])
def test_a_run_keeps_to_the_moments_that_it_began_with(data, tmp_path, monkeypatch, moments):
    whole, save = tmp_path / "whole.pt", tmp_path / "sae.pt"
    train(data, whole, "--moments", moments)
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        on_step(patch, {8}, lambda rows: os.kill(os.getpid(), signal.SIGTERM) or rows)
        train(data, save, "--moments", moments)
    other = {"float32": "int8", "int8": "float32"}[moments]
    with pytest.raises(UserError, match="--moments"):
        train(data, save, "--moments", other)
    train(data, save, "--moments", moments)
    mine, theirs = (load_sae(p, device="cpu").state_dict() for p in (save, whole))
    assert all(torch.equal(mine[name], theirs[name]) for name in theirs)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_checkpoints_and_the_same_command_ends_with_the_same_bits(
    data, tmp_path, monkeypatch, number
):
    train(data, tmp_path / "whole.pt", "--k_anneal_steps", 10)
    save = tmp_path / "sae.pt"
    with monkeypatch.context() as patch, pytest.raises(SystemExit) as exit_:
        on_step(patch, {8}, lambda rows: os.kill(os.getpid(), number) or rows)
        train(data, save, "--k_anneal_steps", 10)
    assert exit_.value.code == 128 + number
    assert newest_checkpoint(save)["step"] == 9 and not save.exists()
    train(data, save, "--k_anneal_steps", 10)
    mine, theirs = (load_sae(p, device="cpu") for p in (save, tmp_path / "whole.pt"))
    for name, wanted in theirs.state_dict().items():
        assert torch.equal(mine.state_dict()[name], wanted), name
    best = load_sae(tmp_path / "sae_checkpoints" / "sae.best.pt", device="cpu")
    assert best.config == replace(mine.config, threshold=best.config.threshold)


def test_one_long_epoch_shows_fvu_and_a_best_sae_before_its_end(data, tmp_path, monkeypatch):
    flags = ("--num_epochs", 1, "--validations_per_epoch", 4, "--logs_per_epoch", 8)
    monkeypatch.setattr(run, "_LEAST_VAL_ROWS", 10)
    whole, save = tmp_path / "whole.pt", tmp_path / "sae.pt"
    train(data, whole, *flags)
    entries = metrics_of(whole)
    assert [e["step"] for e in entries if "val/fvu" in e] == [2, 4, 6, 8]
    x = standardise(open_batched_rows(data / "rows").read("val", 0, 64))[0]
    last = load_sae(whole, device="cpu")
    assert entries[-1]["val/fvu"] == pytest.approx(fvu(last, x), rel=1e-4), "of all, at the end"

    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        on_step(patch, {4}, lambda rows: os.kill(os.getpid(), signal.SIGTERM) or rows)
        train(data, save, *flags)
    best = load_sae(tmp_path / "sae_checkpoints" / "sae.best.pt", device="cpu")
    entry = metrics_of(save)[3]
    assert entry["step"] == 4 and entry["val/fvu"] == pytest.approx(fvu(best, x[:16]), rel=1e-4)
    train(data, save, *flags)
    for name in ("{}.pt", "sae_checkpoints/{}.best.pt"):
        mine, theirs = ((tmp_path / name.format(n)).read_bytes() for n in ("sae", "whole"))
        assert mine == theirs
    assert [without_times(e) for e in metrics_of(save)] == [without_times(e) for e in entries]


@needs_cpp
def test_a_run_keeps_the_kernels_that_it_began_with_unless_others_are_asked_for(
    data, tmp_path, monkeypatch, caplog
):
    caplog.set_level("INFO", logger="saint")
    save, flags = tmp_path / "sae.pt", (("--kernels", "torch"), (), ("--kernels", "cpp_float32"))
    for step, (how, kernels) in enumerate(
        zip(flags, ("torch", "torch", "cpp_float32"), strict=True)
    ):
        with monkeypatch.context() as patch, pytest.raises(SystemExit):
            on_step(patch, {4 * step + 3}, lambda rows: os.kill(os.getpid(), 15) or rows)
            train(data, save, *how)
        assert newest_checkpoint(save)["kernels"] == kernels
    assert "kernels: cpp_float32, as asked; the run began with torch" in caplog.text
    monkeypatch.setattr(steps, "CppStep", _cannot)
    train(data, save)
    assert "the run began with kernels cpp_float32: none here: now torch" in caplog.text


def _cannot(*args) -> None:
    raise UserError("none here")


def test_the_best_sae_is_written_with_checkpoints_alone(data, tmp_path, monkeypatch):
    written, plain = [], weights.save_sae

    def save_sae(path, sae) -> None:
        written.append(path.name)
        plain(path, sae)

    monkeypatch.setattr(weights, "save_sae", save_sae)
    train(data, tmp_path / "sae.pt", "--validations_per_epoch", 4)
    assert sum("val/fvu" in entry for entry in metrics_of(tmp_path / "sae.pt")) > 4
    # With the last checkpoint, then the SAE, and the best again with its latents' maxima.
    assert written == ["sae.best.pt", "sae.pt", "sae.best.pt"]


def test_density_quantiles_are_those_of_the_activations(data, tmp_path):
    save = tmp_path / "sae.pt"
    train(data, save, "--n_latents", 64)
    x = standardise(open_batched_rows(data / "rows").read("val", 0, 64))[0]
    values, indices = load_sae(save, device="cpu").encode(x).matrices()
    counts = [int((values[indices == i] > 0).sum()) for i in range(64)]
    logs = [math.log10(count / 64) for count in counts if count]
    last = metrics_of(save)[-1]
    tenths = statistics.quantiles(logs, n=10, method="inclusive")
    for percent, wanted in ((10, tenths[0]), (50, statistics.median(logs)), (90, tenths[8])):
        assert last[f"val/log10_density_p{percent}"] == pytest.approx(wanted, abs=1e-6)
    assert last["val/silent_latents_ratio"] == counts.count(0) / 64
    assert density_quantiles(torch.zeros(3)) == {}


@pytest.mark.parametrize("kernels", ["cpp", "dense"])
def test_the_best_sae_has_its_own_steering_unit(data, tmp_path, kernels):
    save, best = tmp_path / "sae.pt", tmp_path / "sae_checkpoints" / "sae.best.pt"
    # So high a rate at the end that an earlier SAE is the best.
    rate = ("--learning_rate", 0.3, "--lr_floor", 1, "--warmup_fraction", 1, "--grad_clip", 100)
    train(data, save, *rate, "--kernels", kernels)
    rows = open_batched_rows(data / "rows")
    x = standardise(torch.cat([rows.read("train", 0, 256), rows.read("val", 0, 64)]).float())[0]
    saes = [load_sae(path, device="cpu") for path in (save, best)]
    assert not torch.equal(saes[0].W_enc, saes[1].W_enc)
    for sae in saes:
        values, indices = sae.encode(x).matrices()
        wanted = torch.zeros(len(x), 32).scatter_add(1, indices, values).amax(0)
        assert sae.max_activations is not None
        torch.testing.assert_close(sae.max_activations, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kernels", ["auto", "torch"])
def test_other_weights_are_encoded_with_at_once(kernels):
    """Kernels keep rounded weights: another SAE's would send nearly all tokens through float32."""
    saes = [make_sae(64, 500, 5, seed=seed) for seed in range(2)]
    trainer = Trainer(saes[0], replace(RECIPE, n_latents=500), 1, ALONE, kernels)
    x = standardise(torch.randn(50, 64))[0]
    trainer.kernels.encode(x)
    trainer.kernels.diagnostics()
    trainer.take_weights(saes[1])
    dense = [
        torch.zeros(50, 500).scatter(1, indices, values)
        for values, indices in (e(x).matrices() for e in (trainer.kernels.encode, saes[1].encode))
    ]
    torch.testing.assert_close(*dense, rtol=1e-4, atol=1e-4)
    assert trainer.kernels.diagnostics().get("debug/float32_tokens_ratio", 0) < 0.5


def test_no_checkpoint_and_no_best_sae_is_left_where_none_is_wanted(data, tmp_path):
    train(data, tmp_path / "sae.pt", "--keep_last_n", 0)
    assert (tmp_path / "sae.pt").exists() and not list((tmp_path / "sae_checkpoints").iterdir())


def test_a_resumed_runs_speed_is_that_of_its_own_steps(data, tmp_path, monkeypatch, caplog):
    caplog.set_level("INFO", logger="saint")
    save = tmp_path / "sae.pt"
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        on_step(patch, {19}, lambda rows: os.kill(os.getpid(), signal.SIGTERM) or rows)
        train(data, save)
    finish = sae_training.finish
    monkeypatch.setattr(sae_training, "finish", lambda run, args, _: finish(run, args, 2.0))
    train(data, save)
    assert "24 steps" in caplog.text and " 64 tokens/s" in caplog.text, "4 steps of 32, in 2 s"


def fvu(sae: TopKSparseAutoencoder, x: Tensor) -> float:
    error = (sae(x) - x).square().sum()
    return float(error / (x - x.mean(0)).square().sum())


@pytest.mark.parametrize("kernels", ["cpp", "torch", "dense"])
def test_the_training_fvu_is_that_of_the_batch_before_the_step(
    data, tmp_path, monkeypatch, kernels
):
    seen = []
    plain = Trainer.step_on

    def step_on(self, micros):
        x = torch.cat(list(micros))
        seen.append(float((self.sae(x) - x).square().sum()) / len(x))
        return plain(self, micros)

    monkeypatch.setattr(Trainer, "step_on", step_on)
    save = tmp_path / "sae.pt"
    simple = ("--objective", "topk", "--basis", "none")
    train(data, save, "--kernels", kernels, "--micro_batch_size", 12, *simple)
    variance = open_batched_rows(data / "rows").facts["variance"]
    for i, entry in enumerate(metrics_of(save)):  # one log for two steps
        assert entry["train/fvu"] == pytest.approx(
            sum(seen[2 * i : 2 * i + 2]) / 2 / variance, 1e-4
        )


class FakeRun:
    """What `wandb.init` returns; keeps what is logged, and can fail."""

    def __init__(self, fails: bool):
        self.fails, self.logged = fails, []

    def log(self, entry: dict, step: int) -> None:
        if self.fails:
            raise ConnectionError("no route to W&B")
        self.logged.append((step, entry))

    def finish(self) -> None:
        pass


@pytest.mark.parametrize("fails", [False, True])
def test_wandb_gets_the_metrics_and_a_histogram_and_never_ends_a_run(
    data, tmp_path, monkeypatch, caplog, fails
):
    mirror = FakeRun(fails)
    monkeypatch.setattr("wandb.init", lambda **settings: mirror)
    save = tmp_path / "sae.pt"
    train(data, save, "--wandb_project", "test")
    assert load_sae(save, device="cpu").max_activations is not None
    assert caplog.text.count("W&B does not get all metrics: no route to W&B") == int(fails)
    if fails:
        return
    entries = metrics_of(save)
    assert [step for step, _ in mirror.logged] == [entry["step"] for entry in entries]
    for entry, (_, shown) in zip(entries, mirror.logged, strict=True):
        histogram = shown.pop("val/log10_latent_density", None)
        assert shown == entry and (histogram is not None) == ("val/fvu" in entry)
        if histogram is not None:
            n_silent = round(32 * entry["val/silent_latents_ratio"])
            assert sum(histogram.histogram) == 32 - n_silent and histogram.bins[-1] <= 0.1


def test_wandb_writes_offline_and_without_a_key_asks_for_one(data, tmp_path, monkeypatch):
    flags = ["--data_dir", data / "rows", "--b_pre_path", data / "mean.pt", "--n_latents", 32]
    flags += ["--k", 3, "--num_epochs", 1, "--device", "cpu", "--wandb_project", "test"]
    flags += ["--model_save_path", tmp_path / "sae.pt"]
    env = {"WANDB_DIR": str(tmp_path), "HOME": str(tmp_path), "NETRC": str(tmp_path / "none")}
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    refused = call("sae_training", *flags, env=env | {"WANDB_API_KEY": ""})
    assert refused.returncode == 1 and "Traceback" not in refused.stderr
    assert refused.last_line.startswith("error: --wandb_project test: No API key configured")
    assert "wandb login" in refused.last_line and "--wandb_offline" in refused.last_line
    done = call("sae_training", *flags, "--wandb_offline", env=env)
    assert done.returncode == 0, done.stderr
    (log,) = tmp_path.glob("wandb/offline-run-*/*.wandb")
    assert b"val/log10_latent_density" in log.read_bytes()


def test_the_schedule_goes_by_steps():
    recipe = replace(
        RECIPE, learning_rate=2.0, lr_floor=0.25, warmup_fraction=0.04, decay_fraction=0.4,
        k=4, k_start=16, k_anneal_steps=6,
    )  # fmt: skip
    rates = [recipe.learning_rate_at(step, 100) for step in range(100)]
    assert rates[:5] == pytest.approx([0.5, 1.0, 1.5, 2.0, 2.0])
    assert rates[60] == 2.0 and rates[80] == pytest.approx(2 * (0.25 + 0.75 / 2))
    assert rates[99] == pytest.approx(2 * (0.25 + 0.75 / 40)) and min(rates[60:]) == rates[99]
    assert [recipe.k_at(step) for step in range(8)] == [16, 14, 12, 10, 8, 6, 4, 4]
    assert {replace(recipe, k_anneal_steps=0).k_at(step) for step in (0, 5)} == {4}


def test_flags_that_contradict_each_other_are_named_together(data, tmp_path):
    with pytest.raises(UserError) as error:
        flags = ("--batch_size", 10**6, "--k_anneal_steps", 5, "--k_start", 2)
        train(data, tmp_path / "a.pt", *flags)
    assert "--batch_size 1000000 is larger than the" in str(error.value)
    assert "--k_start 2 is smaller than --k 3" in str(error.value)


def test_the_page_shows_every_curve_and_renews_itself_until_the_end(data, tmp_path):
    save = tmp_path / "sae.pt"
    train(data, save, "--k_anneal_steps", 10)
    entries = metrics_of(save)
    assert entries[0]["train/l0"] > 4 and entries[-1]["train/l0"] <= 3
    page = save.with_suffix(".training.html").read_text()
    assert "finished" in page and 'http-equiv="refresh"' not in page and "k_anneal_steps" in page
    assert "src=" not in page and "href=" not in page
    tree = ElementTree.fromstring(curves(entries))
    figures = {f.find("svg").attrib["aria-label"]: f for f in tree.findall("figure")}  # pyright: ignore
    text = "".join(tree.itertext())
    for panel in PANELS:
        if panel.title not in figures:
            assert f"{panel.title} 0" in text, "a constant is said"
            continue
        drawn = figures[panel.title].findall(".//polyline")
        assert len(drawn) == len(panel.names) and all(line.attrib["points"] for line in drawn)
    losses = figures["normalised MSE"].findall(".//polyline")
    points = [pair.split(",") for pair in losses[0].attrib["points"].split()]
    assert len(points) == len(entries)
    heights = [-float(y) for _, y in points]
    order = sorted(range(len(entries)), key=lambda i: entries[i]["train/loss"])
    assert heights[order[0]] < heights[order[-1]]
    running = training_page(entries[:2], title="<b>", settings=asdict(RECIPE), done=False)
    assert 'http-equiv="refresh"' in running and "<b></title>" not in running
    training_page([], title="nothing yet", settings={}, done=False)


def test_every_field_of_the_recipe_is_a_flag_in_help_and_in_the_docs_table():
    text = " ".join(sae_training.build_parser().format_help().split())
    lines = recipe_table().splitlines()[2:]
    assert len(lines) == len(fields(Recipe))
    for each, line in zip(fields(Recipe), lines, strict=True):
        assert f"--{each.name} " in text and line.startswith(f"| `--{each.name}` | ")
    assert "| `--decay_fraction` | " in "".join(lines) and "64" in recipe_table()


@pytest.mark.parametrize("normalisation", ["none", "scalar"])
def test_rows_need_not_be_standardised(data, tmp_path, normalisation):
    save = tmp_path / "sae.pt"
    train(data, save, "--normalisation", normalisation, "--num_epochs", 30, "--learning_rate", 0.01)
    sae, rows = load_sae(save, device="cpu"), open_batched_rows(data / "rows")
    raw = rows.read("train", 0, 256).float()
    factor = 4 / float(raw.norm(dim=1).mean()) if normalisation == "scalar" else 1.0
    assert sae.config.normalisation == normalisation
    assert sae.config.norm_factor == pytest.approx(factor, rel=1e-5)
    x = rows.read("val", 0, 64).float()
    torch.testing.assert_close(sae.normalise(x)[0], x * factor)
    error = (sae.reconstruct(x) - x).square().sum() / (x - x.mean(0)).square().sum()
    last = metrics_of(save)[-1]
    assert last["val/fvu"] == pytest.approx(float(error), rel=1e-3)
    assert last["val/fvu"] < 0.6 and last["train/fvu"] < 0.6
    assert sae.max_activations is not None
    active = sae.encode(torch.cat([raw, x]) * factor)
    wanted = torch.zeros(32).scatter_reduce(0, active.indices, active.values, "amax")
    torch.testing.assert_close(sae.max_activations, wanted, rtol=1e-4, atol=1e-4)
    with pytest.raises(UserError, match=f"normalisation {normalisation}, this run has per_token"):
        train(data, tmp_path / "other.pt", "--model_load_path", save)
