"""Several SAEs in one pass: each as it is alone, compared, and none stopped by another."""

from __future__ import annotations

import csv
import json
import os
import signal
from pathlib import Path

import pytest
import torch
import yaml

import sae_training
from saint.kernels import fastest
from saint.stage.errors import UserError
from saint.store.shuffled_rows import BatchedRows
from saint.training import run, together
from saint.training.comparison import RunLog, best_runs, frontier, read_run, verdict
from saint.training.sweep import read_sweep
from saint.training.trainer import Trainer
from tests.support.program import call, call_ranks, finished, start
from tests.support.training_rows import metrics_of, without_times, write_rows

SIZE = {"n_latents": 32, "k": 3, "num_epochs": 3, "logs_per_epoch": 4, "validations_per_epoch": 2}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_rows(tmp_path_factory.mktemp("rows"), layer=3)


@pytest.fixture(autouse=True)
def calm(monkeypatch):
    """Rounded products at this size, two runs at once, and the tests' own signal handlers after."""
    monkeypatch.setattr(fastest, "_LEAST_ROUNDED_D_MODEL", 1)
    monkeypatch.setattr(run, "_LEAST_VAL_ROWS", 10)
    monkeypatch.setattr(together, "_n_at_once", lambda workers, n_threads: 2)
    before = {s: signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT)}
    n_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(n_threads)
    for number, handler in before.items():
        signal.signal(number, handler)


def arguments(data: Path, **flags: object) -> list[str]:
    given = {"data_dir": data / "rows", "b_pre_path": data / "mean.pt", **SIZE, "device": "cpu"}
    return [str(part) for name, value in (given | flags).items() for part in (f"--{name}", value)]


def train(data: Path, **flags: object) -> None:
    sae_training.main(arguments(data, **flags))


def write_sweep(folder: Path, entries: object) -> Path:
    path = folder / "rates.yaml"
    path.write_text(yaml.safe_dump(entries))
    return path


def equal_runs(one: Path, other: Path) -> None:
    """Two SAEs' files, best ones and metrics hold the same."""
    assert one.read_bytes() == other.read_bytes()
    best = [p.parent / "sae_checkpoints" / f"{p.stem}.best.pt" for p in (one, other)]
    assert best[0].read_bytes() == best[1].read_bytes()
    mine, theirs = ([without_times(entry) for entry in metrics_of(path)] for path in (one, other))
    assert mine == theirs


ENTRIES = [
    {"objective": ["topk", "batchtopk"], "learning_rate": [0.003, 0.02]},
    {"basis": "pca", "lazy": True, "n_latents": 64, "seed": 1},
    {"basis": "pca", "k": 4, "num_epochs": 2, "normalisation": "scalar"},
    {"basis": "pca", "batch_size": 64},
]


@pytest.mark.parametrize("kernels", ["auto", "dense"])
def test_each_run_of_a_sweep_is_the_one_trained_alone(data, tmp_path, kernels, capsys):
    sweep, made = write_sweep(tmp_path, ENTRIES), tmp_path / "swept"
    entries = ENTRIES if kernels == "auto" else ENTRIES[:1]
    write_sweep(tmp_path, entries)
    train(data, sweep=sweep, sweep_dir=made, kernels=kernels)
    table = capsys.readouterr().out
    for i, variant in enumerate(read_sweep(sweep)):
        alone = tmp_path / f"{i}.pt"
        settings = {n: "on" if v is True else v for n, v in variant.settings.items()}
        train(data, model_save_path=alone, kernels=kernels, **settings)
        equal_runs(made / f"{variant.name}.pt", alone)
        assert variant.name in table
    # The same names, alone or swept: a run is done whichever way it is asked for.
    train(data, model_save_path=made / "learning_rate=0.02,objective=topk.pt", kernels=kernels,
          objective="topk", learning_rate=0.02)  # fmt: skip


def test_rows_are_read_and_prepared_once_for_all(data, tmp_path, monkeypatch):
    counts = {"read": 0, "prepared": 0, "bases": 0}

    def count(owner, name, key):
        plain = getattr(owner, name)

        def counted(*args, **kwargs):
            counts[key] += 1
            return plain(*args, **kwargs)

        monkeypatch.setattr(owner, name, counted)

    count(BatchedRows, "read", "read")
    count(Trainer, "prepare", "prepared")
    count(run, "make_basis", "bases")
    found = []
    for i, rates in enumerate(([0.003], [0.001, 0.002, 0.003, 0.004])):
        counts.update(dict.fromkeys(counts, 0))
        sweep = write_sweep(tmp_path, {"learning_rate": rates, "basis": "pca", "objective": "topk"})
        train(data, sweep=sweep, sweep_dir=tmp_path / str(i))
        found.append(dict(counts))
    # What the best SAE needs that is not the last is the only work of its own.
    assert found[1]["bases"] == found[0]["bases"] == 1
    assert found[1]["prepared"] <= found[0]["prepared"] + 2
    assert found[1]["read"] <= found[0]["read"] + 2


def stop_at(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    """Send this process one SIGTERM, at the first run's step of that number."""
    plain, sent = Trainer.step_on, []

    def step_on(self, micros):
        if self.step == step and not sent:
            sent.append(step)
            os.kill(os.getpid(), signal.SIGTERM)
        return plain(self, micros)

    monkeypatch.setattr(Trainer, "step_on", step_on)


ENTRY = {"learning_rate": [0.003, 0.02], "objective": ["topk", "batchtopk"]}


def test_a_sweep_that_a_signal_stops_goes_on_to_the_same_bits(data, tmp_path, monkeypatch):
    sweep, made = write_sweep(tmp_path, ENTRY), tmp_path / "made"
    train(data, sweep=sweep, sweep_dir=tmp_path / "whole")
    with monkeypatch.context() as patch, pytest.raises(SystemExit) as exit_:
        stop_at(patch, 9)
        train(data, sweep=sweep, sweep_dir=made)
    assert exit_.value.code == 128 + signal.SIGTERM and not list(made.glob("*.manifest.json"))
    assert newest_steps(made, sweep) == [10] * 4
    train(data, sweep=sweep, sweep_dir=made)
    for variant in read_sweep(sweep):
        equal_runs(made / f"{variant.name}.pt", tmp_path / "whole" / f"{variant.name}.pt")


def newest_steps(made: Path, sweep: Path) -> list[int]:
    """The step of each run's newest checkpoint."""
    found = []
    for variant in read_sweep(sweep):
        paths = made.glob(f"sae_checkpoints/{variant.name}.step_*.pt")
        found.append(max(int(path.stem.rpartition("_")[2]) for path in paths))
    return found


def test_a_sweep_killed_between_two_runs_checkpoints_goes_on_to_the_same_bits(data, tmp_path):
    sweep, made, output = write_sweep(tmp_path, ENTRY), tmp_path / "made", tmp_path / "log"
    argv = arguments(data, sweep=sweep, checkpoint_minutes=1e-6, num_epochs=1)
    assert call("sae_training", *argv, "--sweep_dir", tmp_path / "whole").returncode == 0
    process = start("sae_training", *argv, "--sweep_dir", made, output=output, die_at=2 * 130)
    process.join(100)
    assert finished(process, output).returncode == -signal.SIGKILL
    assert len(set(newest_steps(made, sweep))) == 2, "some are further than the others"
    assert call("sae_training", *argv, "--sweep_dir", made).returncode == 0
    for variant in read_sweep(sweep):
        equal_runs(made / f"{variant.name}.pt", tmp_path / "whole" / f"{variant.name}.pt")


def test_runs_that_are_at_different_steps_wait_for_each_other(data, tmp_path, monkeypatch):
    sweep, made = write_sweep(tmp_path, {"seed": [0, 1]}), tmp_path / "made"
    train(data, sweep=sweep, sweep_dir=tmp_path / "whole")
    for seed, step in ((0, 5), (1, 15)):
        with monkeypatch.context() as patch, pytest.raises(SystemExit):
            stop_at(patch, step)
            train(data, seed=seed, model_save_path=made / f"seed={seed}.pt")
    plain, taken = Trainer.step_on, []

    def step_on(self, micros):
        taken.append((self.recipe.seed, self.step))
        return plain(self, micros)

    monkeypatch.setattr(Trainer, "step_on", step_on)
    train(data, sweep=sweep, sweep_dir=made)
    for seed, first in ((0, 6), (1, 16)):
        assert [step for which, step in taken if which == seed] == list(range(first, 24))
        equal_runs(made / f"seed={seed}.pt", tmp_path / "whole" / f"seed={seed}.pt")


def spoil(monkeypatch, seed: int, steps: set[int]) -> None:
    """Give one run of a sweep rows that are no numbers at these steps."""
    plain = Trainer.step_on

    def step_on(self, micros):
        bad = self.recipe.seed == seed and self.step in steps
        return plain(self, [x * torch.nan for x in micros] if bad else micros)

    monkeypatch.setattr(Trainer, "step_on", step_on)


def test_a_run_that_goes_bad_does_not_stop_the_others(data, tmp_path, monkeypatch, caplog, capsys):
    caplog.set_level("INFO", logger="saint")
    sweep, made = write_sweep(tmp_path, {"seed": [0, 1, 2]}), tmp_path / "made"
    with monkeypatch.context() as patch:
        spoil(patch, 1, {5, 15})
        train(data, sweep=sweep, sweep_dir=made, checkpoint_minutes=1e-6)
    assert "seed=1: the loss was not finite at step 5: going on from step" in caplog.text
    assert "seed=1: the loss is not finite at step 15, and was not at step 5" in caplog.text
    for seed in (0, 2):
        train(data, seed=seed, model_save_path=tmp_path / f"{seed}.pt", checkpoint_minutes=1e-6)
        equal_runs(made / f"seed={seed}.pt", tmp_path / f"{seed}.pt")
    assert not (made / "seed=1.pt").exists() and "given up" in capsys.readouterr().out
    table = json.loads((made / "rates.json").read_text())
    assert [bool(row["failure"]) for row in table["runs"]] == [False, True, False]
    assert "given up" in (made / "rates.html").read_text()
    # Run again it tries the one that is missing, from its checkpoint.
    train(data, sweep=sweep, sweep_dir=made, checkpoint_minutes=1e-6)
    assert (made / "seed=1.pt").exists()


def test_one_bad_batch_is_stepped_over_by_its_own_run_alone(data, tmp_path, monkeypatch):
    sweep, made = write_sweep(tmp_path, {"seed": [0, 1]}), tmp_path / "made"
    with monkeypatch.context() as patch:
        spoil(patch, 1, {13})
        train(data, sweep=sweep, sweep_dir=made, checkpoint_minutes=1e-6)
        train(data, seed=1, model_save_path=tmp_path / "1.pt", checkpoint_minutes=1e-6)
    equal_runs(made / "seed=1.pt", tmp_path / "1.pt")
    train(data, seed=0, model_save_path=tmp_path / "0.pt")
    equal_runs(made / "seed=0.pt", tmp_path / "0.pt")


def test_a_sweep_where_every_run_goes_bad_is_an_error(data, tmp_path, monkeypatch):
    sweep = write_sweep(tmp_path, {"seed": [1]})
    spoil(monkeypatch, 1, {3, 4})
    with pytest.raises(UserError, match="every run of .* was given up: the loss is not finite"):
        train(data, sweep=sweep, sweep_dir=tmp_path / "made")


def test_layers_are_swept_by_their_rows(data, tmp_path, capsys):
    other = write_rows(tmp_path / "other", seed=5, layer=7)
    (tmp_path / "acts_batched").mkdir()
    for layer, root in ((3, data), (7, other)):
        (tmp_path / f"acts_batched/layer_{layer}").symlink_to(root / "rows")
        (tmp_path / f"acts_mean.layer_{layer}.pt").symlink_to(root / "mean.pt")
    rows = [str(tmp_path / f"acts_batched/layer_{layer}") for layer in (3, 7)]
    sweep = write_sweep(tmp_path, {"data_dir": rows, "k": [2, 4]})
    train(data, sweep=sweep, sweep_dir=tmp_path / "made")
    for layer, root in ((3, data), (7, other)):
        alone = tmp_path / f"{layer}.pt"
        train(root, k=4, model_save_path=alone)
        equal_runs(tmp_path / "made" / f"data_dir=layer_{layer},k=4.pt", alone)
    table = json.loads((tmp_path / "made/rates.json").read_text())
    assert len(table["best"]) == 4 and {row["layer"] for row in table["runs"]} == {3, 7}
    assert "held-out FVU over layers" in (tmp_path / "made/rates.html").read_text()


def test_two_ranks_sweep_as_one(data, tmp_path):
    sweep = write_sweep(tmp_path, {"seed": [0, 1], "objective": ["topk", "batchtopk"]})
    ranks = call_ranks(2, "sae_training", *arguments(data, sweep=sweep, sweep_dir=tmp_path / "two"))
    assert [rank.returncode for rank in ranks] == [0, 0], ranks[0].stderr + ranks[1].stderr
    alone = arguments(data, seed=1, objective="batchtopk", model_save_path=tmp_path / "alone.pt")
    ranks = call_ranks(2, "sae_training", *alone)
    assert [rank.returncode for rank in ranks] == [0, 0], ranks[0].stderr
    equal_runs(tmp_path / "two" / "objective=batchtopk,seed=1.pt", tmp_path / "alone.pt")


def test_the_best_is_named_and_the_second_time_it_is_done_already(data, tmp_path):
    sweep = write_sweep(tmp_path, {"learning_rate": [1e-5, 0.01]})
    argv = arguments(data, sweep=sweep, sweep_dir=tmp_path / "made")
    for _ in range(2):
        finished = call("sae_training", *argv)
        assert finished.returncode == 0, finished.stderr
        assert "the best is learning_rate=0.01 (held-out FVU 0." in finished.last_line
        assert finished.last_line.endswith(f"look at {(tmp_path / 'made/rates.html').as_uri()}")
        assert "* " in finished.stdout and "1e-05" in finished.stdout
    assert "trained" not in finished.stderr
    table = json.loads((tmp_path / "made/rates.json").read_text())
    assert table["best"] == ["learning_rate=0.01"] and "held-out FVU" in table["rule"]
    for row, line in zip(
        table["runs"], csv.DictReader((tmp_path / "made/rates.csv").open()), strict=True
    ):
        last = metrics_of(tmp_path / "made" / row["file"])[-1]
        assert row["fvu"] == last["val/fvu"] == float(line["fvu"])
        assert row["dead"] == last["debug/dead_latents_ratio"] and row["l0"] == last["val/l0"]
        assert row["file"] == line["file"] == f"learning_rate={row['learning_rate']:g}.pt"


def log_of(name: str, fvu: float, l0: float, dead: float = 0.0, **settings: object) -> RunLog:
    entry = {"val/fvu": fvu, "val/l0": l0, "debug/dead_latents_ratio": dead, "step": 1}
    return RunLog(name, Path(name), [entry], {"k": 3, **settings}, {"data": "a"})


def test_the_rule_of_the_best_and_the_frontier():
    low, dying = log_of("low", 0.2, 3.0), log_of("dying", 0.1, 3.0, dead=0.02)
    assert best_runs([low, dying]) == [low] and frontier([low, dying]) == [dying]
    assert best_runs([dying]) == [dying] and "1 % or more" in verdict([dying])
    wide = log_of("wide", 0.05, 9.0, k=9)
    beaten = log_of("beaten", 0.3, 4.0, k=4)
    assert best_runs([low, wide, beaten]) == [low, wide, beaten], "one for each k"
    assert frontier([low, wide, beaten]) == [low, wide]
    assert verdict([low, wide]).startswith("the best are at k 3: low (")
    gone = RunLog("gone", Path("gone"), low.entries, low.settings, low.sources, failure="no")
    assert best_runs([gone]) == frontier([gone]) == []
    other = RunLog("other", Path(), wide.entries, wide.settings, {"data": "b"})
    assert frontier([log_of("x", 0.01, 1.0), other])[1] is other, "other rows do not compare"


@pytest.mark.parametrize(
    ("entries", "says"),
    [
        ([{"k": 3}, {"learning_rat": 1}], "entry 2: learning_rat is no field of the recipe: did"),
        ({"k": [3, "x"]}, "entry 1: k: 'x' is not a whole number"),
        ({"k": 2.5}, "entry 1: k: '2.5' is not a whole number"),
        ({"objective": "best"}, "entry 1: objective best is none of topk, batchtopk"),
        ({"lazy": 3}, "entry 1: lazy: 3 is neither on nor off"),
        ({"k": None}, "entry 1: k cannot be None"),
        ({"k": [[1]]}, r"entry 1: k cannot be \[1\]"),
        ({"k": []}, "entry 1: k has no values"),
        ([{"k": 3}, {"k": [4, 3]}], "entry 2 asks for a run that entry 1 asks for already"),
        ([], "asks for nothing"),
        ("k", "entry 1 is no mapping"),
        ({"data_dir": "nowhere"}, "data_dir nowhere has no mean beside it"),
        ({"b_pre_path": "x"}, "b_pre_path goes with data_dir"),
        ({"seed": list(range(40)), "k": list(range(1, 41))}, "makes 1,600 runs"),
    ],
)  # fmt: skip
def test_a_wrong_entry_is_named_in_one_line(tmp_path, entries, says):
    with pytest.raises(UserError, match=says) as error:
        read_sweep(write_sweep(tmp_path, entries))
    assert "\n" not in str(error.value) and "rates.yaml" in str(error.value)


def test_what_only_the_rows_show_wrong_is_named_before_anything_begins(data, tmp_path):
    for entries, says in (
        ([{"k": 3}, {"k": 99}], "rates.yaml, k=99: --k 99 is larger than --n_latents 32"),
        ([{}, {"k": 3}], "entry 1 is no mapping"),
        ([{"k": 3}, {"seed": 0}], "asks for one run as "),
    ):
        with pytest.raises(UserError, match=says):
            train(data, sweep=write_sweep(tmp_path, entries), sweep_dir=tmp_path / "made")
        assert not (tmp_path / "made").exists()


def test_names_say_what_differs(tmp_path):
    path = tmp_path / "s.yaml"
    path.write_text("- {k: [16, 32], lazy: on, moments: int8}\n- {k: 8, learning_rate: 1e-3}\n")
    found = {v.name: dict(v.settings) for v in read_sweep(path)}
    assert found == {
        "k=16,lazy=on,moments=int8": {"k": 16, "lazy": True, "moments": "int8"},
        "k=32,lazy=on,moments=int8": {"k": 32, "lazy": True, "moments": "int8"},
        "k=8,learning_rate=0.001": {"k": 8, "learning_rate": 0.001},
    }
    path.write_text("{k: 16, seed: [0, 1]}")
    assert [v.name for v in read_sweep(path)] == ["seed=0", "seed=1"]
    path.write_text("{k: 16}")
    assert [v.name for v in read_sweep(path)] == ["k=16"]


def test_a_run_is_read_without_its_manifest_and_nothing_else_is_taken_for_one(tmp_path):
    path = tmp_path / "a.metrics.jsonl"
    path.write_text('{"step": 1, "tokens": 32, "val/fvu": 0.5}\n{"step": 2, "tok')
    log = read_run(path)
    assert log.name == "a" and log.figure("fvu") == 0.5 and log.figure("l0") is None
    for text in ("[1]\n}", '{"a": 1}'):
        path.write_text(text)
        with pytest.raises(UserError, match="is no metrics.jsonl"):
            read_run(path)
    with pytest.raises(UserError, match="does not exist"):
        read_run(tmp_path / "b.metrics.jsonl")
