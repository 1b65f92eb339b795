"""Where a training step's time goes: its kernels, the gaps between them, what the host waits for.

    python -m benchmarks.sae_profile --device cuda --batch_size 8192 --kernels triton

Takes the flags of `benchmarks.sae_step`. A table of the kernels that take longest, then one JSON
object, all of it per step: busy_ms is the time in which at least one kernel runs, gaps_ms what is
between the first one's start and the last one's end besides. On a CPU the operators stand for the
kernels. syncs: calls of the runtime that wait for the card.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.sae_step import build_parser, rows_like_activations, saint_trainer
from saint.stage.devices import pick_device

_N_STEPS = 3
_N_SHOWN = 15
_WAITS = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize", "cudaMemcpy")


def busy(spans: Iterable[tuple[float, float]]) -> float:
    """Return how long at least one of the spans (start, end) lasts."""
    total, reached = 0.0, float("-inf")
    for start, end in sorted(spans):
        total += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return total


def figures(events: Sequence[Any], on_gpu: bool) -> dict[str, Any]:
    """Return all figures of a profile of `_N_STEPS` steps; its times are microseconds."""
    if on_gpu:
        kernels = [e for e in events if e.device_type.name == "CUDA"]
    else:
        kernels = [e for e in events if e.cpu_parent is None and e.name.startswith("aten::")]
    spans = [(e.time_range.start, e.time_range.end) for e in kernels]
    whole = max((end for _, end in spans), default=0.0) - min((s for s, _ in spans), default=0.0)
    taken, calls = Counter(), Counter(e.name for e in kernels)
    for event in kernels:
        taken[event.name] += event.time_range.end - event.time_range.start
    per_step = 1e3 * _N_STEPS
    top = [
        [name[:80], round(time / per_step, 3), calls[name] / _N_STEPS]
        for name, time in taken.most_common(_N_SHOWN)
    ]
    waits = [e.name for e in events if e.name in _WAITS]
    return {
        "step_ms": round(whole / per_step, 3),
        "busy_ms": round(busy(spans) / per_step, 3),
        "gaps_ms": round((whole - busy(spans)) / per_step, 3),
        "launches": round(len(kernels) / _N_STEPS, 1),
        "syncs": round(len(waits) / _N_STEPS, 1),
        "top": top,
    }


def main(argv: Sequence[str] | None = None) -> None:
    args = build_parser().parse_args(argv)
    device = pick_device(args.device)
    args.kernels = args.kernels or "auto"
    x = rows_like_activations(args.batch_size, args.d_model, device)
    trainer = saint_trainer(args, x, args.objective)

    def step() -> None:
        trainer.tokens_since_fired[: args.n_dead] = trainer.recipe.dead_tokens
        trainer.train_step(x, len(x))

    on_gpu = device.type == "cuda"
    for _ in range(2):
        step()
    activities = [ProfilerActivity.CPU, *[ProfilerActivity.CUDA] * on_gpu]
    if on_gpu:
        torch.cuda.synchronize(device)
    with profile(activities=activities) as profiled:
        for _ in range(_N_STEPS):
            step()
        if on_gpu:  # the profiler's own end waits too
            torch.cuda.synchronize(device)
    found = figures(profiled.events() or [], on_gpu)
    for name, milliseconds, calls in found["top"]:
        print(f"{milliseconds:9.3f} ms {calls:7.1f} x  {name}")
    print(json.dumps({"kernels": trainer.kernels.name, "n_dead": args.n_dead} | found))


if __name__ == "__main__":
    main()
