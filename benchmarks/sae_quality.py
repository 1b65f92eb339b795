"""Quality at equal budget: SAINT's trainer against its peers', each in its own package.

    .venv-bench/bin/python -m benchmarks.sae_quality --run_dir runs/quickstart

Every contender is trained on the same standardised rows in the same order, with the same steps,
batch, size and k. The same 16 settings are tried for each: learning rate × decay × Adam's β₂. The
search narrows: all settings with a quarter of the steps, each rate's best decay and β₂ with all of
them (a long run wants a lower rate), the best of these with the other seeds. One half of the
held-out sentences decides, the other is reported. One evaluator measures all in float32; what
decides by a threshold has it calibrated the same way, on training rows (`fvu`) and on the measured
rows themselves (`fvu_at_k`, at exactly k latents a token, by which contenders are compared).

Each result is kept in --cache_dir, so a run can be stopped and taken up again; settings are tried
in one order, all contenders at the first before any at the second, so that a run that was cut short
has still given each the same budget. The last line is one JSON object.

`bash run_tests.sh --peers` makes the peers' environment.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.sae_quality_contenders import (
    PEERS,
    Dictionary,
    Setting,
    Task,
    Train,
    saint,
)
from sae import standardise
from saint.stage.devices import pick_device
from saint.stage.files import write_json
from saint.store.activation_store import open_store
from saint.store.dataset import held_out_mask
from saint.store.shuffled_rows import open_batched_rows

DEFAULT = "default"
CONTENDERS: dict[str, Train] = {"saint": saint, **PEERS}
_CALIBRATION_ROWS = 32_768
_BLOCK_ROWS = 2048
_HALVES_SEED = 1
_SHORTER = 4  # times fewer steps in the search's first rung

_RATES, _DECAYS, _BETAS = (0.004, 0.003, 0.006, 0.002), (0.5, 0.3), (0.999, 0.99)
# The first four differ in everything, and are those of --quick.
QUICK = (
    Setting(0.004, 0.5, 0.999),
    Setting(0.003, 0.3, 0.99),
    Setting(0.006, 0.3, 0.999),
    Setting(0.002, 0.5, 0.99),
)
_ALL = tuple(Setting(*each) for each in itertools.product(_RATES, _DECAYS, _BETAS))
SETTINGS = (*QUICK, *(setting for setting in _ALL if setting not in QUICK))


@dataclass(frozen=True)
class HeldOut:
    """Standardised rows of the held-out sentences: one half to choose by, one to report."""

    choose: Tensor
    report: Tensor


def held_out_halves(run_dir: Path, device: torch.device) -> HeldOut:
    """Read the held-out sentences' rows from the store, halved by a hash of the sentence."""
    store = open_store(run_dir / "activation_outputs")
    parts: tuple[list[Tensor], list[Tensor]] = ([], [])
    for index in range(store.n_shards):
        shard = store.read_shard(index)
        tokens, offsets = shard.token_ids.numpy(), shard.offsets.numpy()
        halves = held_out_mask(tokens, offsets, fraction=0.5, seed=_HALVES_SEED)
        for i in held_out_mask(tokens, offsets).nonzero()[0].tolist():
            rows = shard.read(slice(int(offsets[i]), int(offsets[i + 1])))
            parts[int(halves[i])].append(standardise(rows.to(device))[0])
    return HeldOut(torch.cat(parts[0]), torch.cat(parts[1]))


@torch.no_grad()
def calibrate(dictionary: Dictionary, x: Tensor, k: int) -> float:
    """Return the factor of `levels` with which k latents a token are active on average over x."""
    assert dictionary.levels is not None
    wanted, kept = k * len(x), []
    for block in x.split(_BLOCK_ROWS):
        pre = torch.addmm(dictionary.b_enc, block, dictionary.w_enc.T)
        ratios = pre.div_(dictionary.levels)
        kept.append(ratios.topk(min(8 * k, ratios.shape[1]), dim=1, sorted=False).values.flatten())
    ratios = torch.cat(kept)
    return max(0.0, float(ratios.kthvalue(len(ratios) - wanted).values))


@torch.no_grad()
def active(dictionary: Dictionary, x: Tensor, k: int, factor: float) -> Tensor:
    """Return the (n_tokens, n_latents) activations of x."""
    pre = torch.addmm(dictionary.b_enc, x, dictionary.w_enc.T)
    if dictionary.levels is not None:
        return pre.mul_(pre > (factor * dictionary.levels).clamp_min(0))
    values, indices = pre.topk(k, dim=1)
    return torch.zeros_like(pre).scatter_(1, indices, values.relu_())


@torch.no_grad()
def measure(dictionary: Dictionary, x: Tensor, k: int, factor: float) -> dict[str, float]:
    """Return FVU (centred) and L0 over standardised x (n_tokens, d_model)."""
    error, n_active = 0.0, 0
    for block in x.split(_BLOCK_ROWS):
        hidden = active(dictionary, block, k, factor)
        n_active += int(hidden.count_nonzero())
        decoded = torch.addmm(dictionary.b_dec, hidden, dictionary.w_dec)
        error += float((decoded - block).double().square().sum())
    centred = x.double() - x.double().mean(0)
    return {"fvu": error / float(centred.square().sum()), "l0": n_active / len(x)}


@torch.no_grad()
def dead_share(dictionary: Dictionary, task: Task, factor: float) -> float:
    """Return the share of latents that none of the last dead_tokens training rows activates."""
    fired = torch.zeros(task.n_latents, dtype=torch.bool, device=task.device)
    last = task.n_steps * task.batch_size
    for start in range(max(0, last - task.dead_tokens), last, _BLOCK_ROWS):
        raw = task.rows.read("train", start, min(start + _BLOCK_ROWS, last))
        x = standardise(raw.to(task.device))[0]
        fired |= (active(dictionary, x, task.k, factor) > 0).any(0)
    return 1 - float(fired.float().mean())


def result_of(
    train: Train, task: Task, held_out: HeldOut, setting: Setting | None, seed: int, *, final: bool
) -> dict[str, Any]:
    """Train one contender once and measure it; final: its dead latents too."""
    started = time.perf_counter()
    with contextlib.redirect_stdout(sys.stderr):
        dictionary = train(task, setting, seed)
    seconds = time.perf_counter() - started
    found: dict[str, Any] = {"seed": seed, "train_s": round(seconds, 1)}
    rows = task.rows.read("train", 0, min(_CALIBRATION_ROWS, task.rows.n_rows("train")))
    training = standardise(rows.to(task.device))[0]
    by_rule = dictionary.levels is not None
    factor = calibrate(dictionary, training, task.k) if by_rule else 0.0
    for half, x in (("choose", held_out.choose), ("report", held_out.report)):
        exact = calibrate(dictionary, x, task.k) if by_rule else 0.0
        found[half] = measure(dictionary, x, task.k, factor)
        found[half]["fvu_at_k"] = measure(dictionary, x, task.k, exact)["fvu"]
    if final:
        found["dead"] = dead_share(dictionary, task, factor)
    return found


class Cache:
    """Results on disk, one file each, in a folder that is named by what all have in common."""

    def __init__(self, root: Path, task: Task):
        name = (
            f"{task.rows.manifest.fingerprint}_n{task.n_latents}_k{task.k}_b{task.batch_size}"
            f"_s{task.n_steps}_d{task.dead_tokens}"
        )
        self.folder = root / name
        self.folder.mkdir(parents=True, exist_ok=True)

    def path(self, name: str, setting: Setting | None, seed: int) -> Path:
        """Return where a result lies."""
        return self.folder / f"{name}.{setting or DEFAULT}.seed{seed}.json"

    def read(self, name: str, setting: Setting | None, seed: int) -> dict[str, Any] | None:
        """Return a result, None where there is none."""
        path = self.path(name, setting, seed)
        return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


def search(
    args: argparse.Namespace, task: Task, held_out: HeldOut, root: Path
) -> dict[str, Setting]:
    """Return each contender's best setting: all on a short run, each rate's best on a whole one.

    All contenders take a setting before any takes the next, so that a search that was cut short
    has given each the same budget.
    """
    plan = {name: SETTINGS[: args.n_settings] for name in args.contenders}
    short = replace(
        task,
        n_steps=task.n_steps // _SHORTER,
        dead_tokens=max(1, task.dead_tokens // _SHORTER),
    )
    ranked: dict[str, list[tuple[float, Setting]]] = {}
    for rung in (short, task):
        cache = Cache(root, rung)
        tried: dict[str, list[tuple[float, Setting]]] = {name: [] for name in plan}
        for settings in zip(*plan.values(), strict=True):
            for name, setting in zip(plan, settings, strict=True):
                found = _made(rung, held_out, cache, name, setting, args.seeds[0])
                tried[name].append((found["choose"]["fvu_at_k"], setting))
        ranked = {name: sorted(each, key=lambda pair: pair[0]) for name, each in tried.items()}
        # A long run wants a lower rate than a short one, so every rate is kept.
        for name, each in ranked.items():
            best: dict[float, Setting] = {}
            for _, setting in each:
                best.setdefault(setting.learning_rate, setting)
            plan[name] = tuple(best.values())
    return {name: each[0][1] for name, each in ranked.items()}


def _made(
    task: Task,
    held_out: HeldOut,
    cache: Cache,
    name: str,
    setting: Setting | None,
    seed: int,
    *,
    final: bool = False,
) -> dict[str, Any]:
    """Return a result from the cache, or make and keep it."""
    found = cache.read(name, setting, seed)
    if found is None or (final and "dead" not in found):
        found = result_of(CONTENDERS[name], task, held_out, setting, seed, final=final)
        write_json(cache.path(name, setting, seed), found)
    report = {key: round(value, 4) for key, value in found["report"].items()}
    print(name, setting or DEFAULT, "seed", seed, report, f"{found['train_s']} s", flush=True)
    return found


def final_row(found: Sequence[dict[str, Any]], setting: Setting | None) -> dict[str, Any]:
    """Return the row of one contender from its seeds' results, all on the reporting half."""
    fvus = [each["report"]["fvu_at_k"] for each in found]
    return {
        "setting": str(setting or DEFAULT),
        "fvu_at_k": round(statistics.mean(fvus), 4),
        "spread": round(max(fvus) - min(fvus), 4),
        "fvu": round(statistics.mean(each["report"]["fvu"] for each in found), 4),
        "l0": round(statistics.mean(each["report"]["l0"] for each in found), 2),
        "dead": round(statistics.mean(each["dead"] for each in found), 4),
        "train_s": round(statistics.mean(each["train_s"] for each in found), 1),
        "seeds": [each["seed"] for each in found],
    }


def compare(
    args: argparse.Namespace, task: Task, held_out: HeldOut, root: Path
) -> dict[str, dict[str, Any]]:
    """Return the row of SAINT's default, and of each contender at its best setting."""
    best = search(args, task, held_out, root) if args.n_settings else {}
    cache = Cache(root, task)
    plan: list[tuple[str, str, Setting | None]] = [
        (name, name if name != "saint" else "saint_tuned", best[name]) for name in best
    ]
    if "saint" in args.contenders:
        plan.insert(0, ("saint", "saint", None))
    results: dict[str, list[dict[str, Any]]] = {row: [] for _, row, _ in plan}
    for seed in args.seeds:
        for name, row, setting in plan:
            results[row].append(_made(task, held_out, cache, name, setting, seed, final=True))
    return {row: final_row(results[row], setting) for _, row, setting in plan}


def table(rows: dict[str, dict[str, Any]]) -> str:
    """Return the rows as a Markdown table, best first."""
    keys = ("setting", "fvu_at_k", "spread", "fvu", "l0", "dead", "train_s")
    lines = [f"| contender | {' | '.join(keys)} |", "|---" * (len(keys) + 1) + "|"]
    for name, row in sorted(rows.items(), key=lambda pair: pair[1]["fvu_at_k"]):
        lines.append(f"| {name} | {' | '.join(str(row[key]) for key in keys)} |")
    return "\n".join(lines)


def summary(rows: dict[str, dict[str, Any]], args: argparse.Namespace) -> dict[str, Any]:
    """Return the last line's object."""
    peers = {name: row for name, row in rows.items() if not name.startswith("saint")}
    found: dict[str, Any] = {"n_settings": args.n_settings, "seeds": args.seeds}
    if peers:
        name, best = min(peers.items(), key=lambda pair: pair[1]["fvu_at_k"])
        found |= {"best_peer": best["fvu_at_k"], "best_peer_name": name}
    if "saint" in rows:
        own = rows["saint"]
        found |= {"saint": own["fvu_at_k"]}
        if "saint_tuned" in rows:
            found |= {"saint_tuned": rows["saint_tuned"]["fvu_at_k"]}
        found |= {"dead": own["dead"], "l0": own["l0"]}
    found["spread"] = max(row["spread"] for row in rows.values())
    return found


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--run_dir", type=Path, default=Path("runs/quickstart"))
    parser.add_argument("--cache_dir", type=Path, default=Path("runs/sae_quality"))
    parser.add_argument("--n_latents", type=int, default=4096)
    parser.add_argument("--k", type=int, default=32)
    parser.add_argument("--batch_size", type=int, default=1024)
    parser.add_argument("--n_steps", type=int, default=557)
    parser.add_argument("--dead_tokens", type=int, default=190_000, help="the same for all")
    parser.add_argument(
        "--n_settings",
        type=int,
        default=len(SETTINGS),
        help="of 16, for each; 0: SAINT's default alone",
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="first: searched")
    parser.add_argument(
        "--contenders", nargs="+", choices=CONTENDERS, default=list(CONTENDERS), metavar="NAME"
    )
    parser.add_argument("--quick", action="store_true", help="4 settings, 150 steps, 2 seeds")
    parser.add_argument("--device", default="auto")
    return parser


def load_task(args: argparse.Namespace) -> Task:
    """Open the rows."""
    rows = open_batched_rows(args.run_dir / "activation_outputs_batched")
    device = pick_device(args.device)
    mean = torch.load(args.run_dir / "activation_outputs_mean.pt", weights_only=True).to(device)
    return Task(
        rows,
        mean,
        n_latents=args.n_latents,
        k=args.k,
        batch_size=args.batch_size,
        n_steps=args.n_steps,
        dead_tokens=args.dead_tokens,
        device=device,
    )


def main(argv: Sequence[str] | None = None) -> None:
    args = build_parser().parse_args(argv)
    if args.quick:
        args.n_settings, args.n_steps, args.seeds = len(QUICK), 150, args.seeds[:2]
        args.dead_tokens = min(args.dead_tokens, 150 * args.batch_size // 3)
    task = load_task(args)
    held_out = held_out_halves(args.run_dir, task.device)
    rows = compare(args, task, held_out, args.cache_dir)
    print(table(rows))
    settings = {"n_latents": args.n_latents, "k": args.k, "batch_size": args.batch_size}
    settings |= {"n_steps": args.n_steps, "threads": torch.get_num_threads()}
    print(json.dumps(summary(rows, args) | settings | {"rows": rows}))


if __name__ == "__main__":
    main()
