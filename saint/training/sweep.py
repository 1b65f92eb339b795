"""What a sweep file asks for: which SAEs are trained together, and how each is called.

The file is one entry or a list of them. An entry maps fields of the recipe (the flags of
`sae_training.py`, without their dashes) to a value or to a list of values; lists are multiplied
out, so that this trains six:

    - {objective: topk, learning_rate: [0.002, 0.004], k: [16, 32]}
    - {objective: batchtopk, seed: [0, 1]}

What an entry does not name is as on the command line. `data_dir` (with `b_pre_path`, or the mean
that preprocessing wrote beside it) names other rows: another layer's, say.
"""

from __future__ import annotations

import argparse
import difflib
import itertools
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from saint.stage.errors import UserError
from saint.stage.yaml_files import load_yaml
from saint.training.recipe import Recipe, flag_of

_PATHS = ("data_dir", "b_pre_path")
_MOST_RUNS = 1000


@dataclass(frozen=True)
class Variant:
    """One SAE of a sweep: its name, and what it has instead of the command line's settings."""

    name: str
    settings: Mapping[str, Any]

    def of(self, args: argparse.Namespace) -> argparse.Namespace:
        """Return the command line as if it asked for this SAE alone."""
        return argparse.Namespace(**{**vars(args), **self.settings})


def read_sweep(path: Path) -> list[Variant]:
    """Read a sweep file. Raises UserError naming the entry that is wrong."""
    found = load_yaml(path)
    entries = found if isinstance(found, list) else [found]
    asked: dict[tuple[tuple[str, Any], ...], str] = {}
    for number, entry in enumerate(entries, 1):
        where = f"{path}, entry {number}"
        for settings in _combinations(entry, where):
            key = tuple(sorted(settings.items()))
            if key in asked:
                raise UserError(f"{where} asks for a run that {asked[key]} asks for already")
            asked[key] = f"entry {number}"
    if not asked:
        raise UserError(f"{path} asks for nothing: write entries such as {{k: [16, 32]}}")
    runs = [dict(key) for key in asked]
    return [Variant(name, run) for name, run in zip(_names(runs), runs, strict=True)]


def _combinations(entry: Any, where: str) -> list[dict[str, Any]]:
    """Multiply an entry's lists out."""
    if not isinstance(entry, dict) or not entry:
        raise UserError(f"{where} is no mapping of fields to values, such as {{k: [16, 32]}}")
    choices = []
    for name, value in entry.items():
        values = value if isinstance(value, list) else [value]
        if not values:
            raise UserError(f"{where}: {name} has no values")
        choices.append([(str(name), _parsed(str(name), each, where)) for each in values])
    n_runs = 1
    for values in choices:
        n_runs *= len(values)
    if n_runs > _MOST_RUNS:
        raise UserError(f"{where} makes {n_runs:,} runs, more than {_MOST_RUNS:,}")
    found = [dict(settings) for settings in itertools.product(*choices)]
    for settings in found:
        if "data_dir" in settings and "b_pre_path" not in settings:
            settings["b_pre_path"] = _mean_beside(settings["data_dir"], where)
        elif "data_dir" not in settings and "b_pre_path" in settings:
            raise UserError(f"{where}: b_pre_path goes with data_dir")
    return found


def _parsed(name: str, value: Any, where: str) -> Any:
    """Return a field's value, as its flag would read it."""
    kinds = {each.name: flag_of(each) for each in fields(Recipe)}
    if name in _PATHS and isinstance(value, str):
        return Path(value)
    if name not in (*kinds, *_PATHS):
        near = difflib.get_close_matches(name, (*kinds, *_PATHS), 1)
        hint = f": did you mean {near[0]}?" if near else ""
        raise UserError(f"{where}: {name} is no field of the recipe{hint}")
    if name in _PATHS or isinstance(value, dict | list) or value is None:
        raise UserError(f"{where}: {name} cannot be {value!r}")
    text = {True: "on", False: "off"}[value] if isinstance(value, bool) else str(value)
    flag = kinds[name]
    try:
        parsed = flag.kind(text)
    except (argparse.ArgumentTypeError, ValueError) as error:
        raise UserError(f"{where}: {name}: {error}") from None
    if flag.choices and parsed not in flag.choices:
        raise UserError(f"{where}: {name} {parsed} is none of {', '.join(flag.choices)}")
    return parsed


def _mean_beside(data_dir: Path, where: str) -> Path:
    """Return where preprocessing puts the mean of rows: x_batched[/layer] → x_mean[.layer].pt."""
    for rows_dir, layer in ((data_dir, ""), (data_dir.parent, f".{data_dir.name}")):
        if rows_dir.name.endswith("_batched"):
            stem = rows_dir.name.removesuffix("_batched")
            mean = rows_dir.with_name(f"{stem}_mean{layer}.pt")
            if mean.exists():
                return mean
    raise UserError(f"{where}: data_dir {data_dir} has no mean beside it: name its b_pre_path too")


def _names(runs: list[dict[str, Any]]) -> list[str]:
    """Name runs by what differs between them: `k=16,seed=1`; all that is said, of a single one."""
    names = sorted({name for run in runs for name in run} - {"b_pre_path"})
    differing = [n for n in names if len({run.get(n) for run in runs}) > 1] or names
    found: list[str] = []
    for depth in range(1, 4):  # directories of one name are told apart by those that hold them
        parts = [[f"{n}={_word(run[n], depth)}" for n in differing if n in run] for run in runs]
        found = [",".join(part) or "as_asked" for part in parts]
        if len(set(found)) == len(found):
            return found
    return [f"{number}-{name}" for number, name in enumerate(found, 1)]


def _word(value: Any, depth: int) -> str:
    """Return a value as a part of a file's name."""
    if isinstance(value, bool):
        return "on" if value else "off"
    if isinstance(value, float):
        return f"{value:g}" if float(f"{value:g}") == value else repr(value)
    return "_".join(value.parts[-depth:]) if isinstance(value, Path) else str(value)
