"""Several runs beside each other: what differs, what came out, and which is the best."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from saint.stage.errors import UserError
from saint.stage.files import read_json
from saint.training.recipe import Recipe, flag_of

MOST_DEAD = 0.01
RULE = (
    "the lowest held-out FVU of the runs with the same rows, normalisation and k, among those "
    "with under 1 % dead latents where there are any"
)
FIGURES = {
    "fvu": "val/fvu",
    "l0": "val/l0",
    "dead": "debug/dead_latents_ratio",
    "loss": "train/loss",
    "step": "step",
}
_ENDING = ".metrics.jsonl"


@dataclass(frozen=True)
class RunLog:
    """What a run left. settings: its recipe. facts: of the SAE's file, {} before the end.

    entries: the lines of its metrics. failure: why it was given up, "" where it was not.
    """

    name: str
    path: Path
    entries: Sequence[Mapping[str, Any]]
    settings: Mapping[str, Any] = field(default_factory=dict)
    sources: Mapping[str, Any] = field(default_factory=dict)
    facts: Mapping[str, Any] = field(default_factory=dict)
    failure: str = ""

    def figure(self, name: str) -> float | None:
        """Return the last logged value of one of FIGURES, None where there is none."""
        metric = FIGURES[name]
        return next((e[metric] for e in reversed(self.entries) if metric in e), None)

    @property
    def layer(self) -> int | None:
        """The layer that it reads, where that is known."""
        return self.facts.get("layer")

    @property
    def kind(self) -> tuple[Any, ...]:
        """What must be equal for FVU and L0 to be comparable."""
        return (self.sources.get("data"), self.settings.get("normalisation"))


def read_run(path: Path, name: str = "", failure: str = "") -> RunLog:
    """Read a run by its metrics file, and the manifest beside it where there is one.

    Raises UserError where that is no file of metrics. A last line cut short by a kill is left out.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
        entries = [json.loads(line) for line in lines if line.endswith("}")]
        assert all("step" in entry for entry in entries)
    except FileNotFoundError:
        raise UserError(f"{path} does not exist") from None
    except (OSError, ValueError, TypeError, AssertionError, RecursionError):
        raise UserError(f"{path} is no metrics.jsonl of sae_training.py") from None
    stem = path.name.removesuffix(_ENDING)
    record: dict[str, Any] = {}
    for ending in ("manifest", "partial"):
        beside = path.with_name(f"{stem}.pt.{ending}.json")
        if not record and beside.exists():
            record = read_json(beside)
    made = record.get("arguments", {})
    before = {each.name: flag_of(each).before for each in fields(Recipe)}
    settings = {n: made.get(n, value) for n, value in before.items()} if made else {}
    sources, facts = record.get("sources", {}), record.get("facts", {})
    return RunLog(name or stem, path, entries, settings, sources, facts, failure)


def read_runs(paths: Sequence[Path]) -> list[RunLog]:
    """Read runs by their metrics files; those of one name are told apart by their folders."""
    runs = [read_run(path) for path in paths]
    names = [run.name for run in runs]
    return [
        run
        if names.count(run.name) == 1
        else read_run(run.path, str(run.path).removesuffix(_ENDING))
        for run in runs
    ]


def differing(runs: Sequence[RunLog]) -> list[str]:
    """Return the settings in which runs differ."""
    known = [run.settings for run in runs if run.settings]
    names = list(known[0]) if known else []
    if all(settings["k_start"] == settings["k"] for settings in known):
        names = [name for name in names if name != "k_start"]  # it says nothing of its own
    return [n for n in names if len({str(settings[n]) for settings in known}) > 1]


def best_runs(runs: Sequence[RunLog]) -> list[RunLog]:
    """Return the best by RULE, one for each k of each kind of rows."""
    groups: dict[tuple[Any, ...], list[RunLog]] = {}
    for run in _finished(runs):
        groups.setdefault((*run.kind, run.settings.get("k")), []).append(run)
    found = []
    for members in groups.values():
        alive = [run for run in members if (run.figure("dead") or 0) < MOST_DEAD]
        found.append(min(alive or members, key=lambda run: run.figure("fvu") or 0.0))
    return found


def frontier(runs: Sequence[RunLog]) -> list[RunLog]:
    """Return the runs that no other of the same rows beats both in FVU and in L0."""

    def beats(one: RunLog, other: RunLog) -> bool:
        pairs = [(one.figure(name) or 0.0, other.figure(name) or 0.0) for name in ("fvu", "l0")]
        same_kind = one.kind == other.kind
        return same_kind and all(a <= b for a, b in pairs) and any(a < b for a, b in pairs)

    finished = _finished(runs)
    return [run for run in finished if not any(beats(other, run) for other in finished)]


def _finished(runs: Sequence[RunLog]) -> list[RunLog]:
    return [run for run in runs if not run.failure and run.figure("fvu") is not None]


def verdict(runs: Sequence[RunLog]) -> str:
    """Say in a sentence which is the best."""
    best = best_runs(runs)
    if not best:
        return "no run has a held-out FVU"
    parts = []
    for run in best:
        parts.append(f"{run.name} ({_figures(run)})")
    if len(best) == 1:
        return f"the best is {parts[0]}"
    where = [_place(run, best) for run in best]
    return "the best are " + "; ".join(f"{w} {p}" for w, p in zip(where, parts, strict=True))


def _place(run: RunLog, best: Sequence[RunLog]) -> str:
    """Return what tells a best run's group from the others'."""
    layers = {other.layer for other in best}
    words = [f"layer {run.layer}"] if len(layers) > 1 else []
    if len({other.settings.get("k") for other in best}) > 1:
        words.append(f"k {run.settings.get('k')}")
    return f"at {', '.join(words)}:" if words else "of other rows:"


def _figures(run: RunLog) -> str:
    dead = run.figure("dead") or 0.0
    few = "" if dead < MOST_DEAD else ", as all have 1 % or more"
    return f"held-out FVU {run.figure('fvu'):.4f}, L0 {run.figure('l0'):.1f}, dead {dead:.1%}{few}"


def rows_of(runs: Sequence[RunLog]) -> list[dict[str, Any]]:
    """Return a row for each run: what tells it apart, its figures, its place."""
    best, edge, names = best_runs(runs), frontier(runs), differing(runs)
    layers = {run.layer for run in runs} - {None}
    rows = []
    for run in runs:
        row: dict[str, Any] = {"run": run.name}
        row |= {name: run.figure(name) for name in FIGURES}
        row |= {"layer": run.layer} if len(layers) > 1 else {}
        row |= {name: run.settings.get(name) for name in names}
        row |= {"best": run in best, "frontier": run in edge, "failure": run.failure}
        rows.append(row)
    return rows
