"""All that is to be measured on a card, line by line; `gpu.sh` is how it is called.

Every line is a process of its own with a limit of time; what fails or takes too long does not stop
the next. Processes are forked from this one, which has imported everything and never touches the
card: so a line begins at once, and with a card as another line did not leave it. Each line's result
is appended to a file as one JSON object.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks import capture, demo, evaluation, memory, sae_loop, sae_profile, sae_step
from benchmarks.common import REPO, in_child
from saint.stage.devices import pick_device
from saint.training.steps import KERNELS

_ON_CARDS = [name for name in KERNELS if name != "auto" and not name.startswith("cpp")]
_SLOWER = 4  # limits, where it is known that the machine is no measure
_QUERY = "name,driver_version,memory.total,clocks.sm,clocks.max.sm,clocks.mem,power.limit"


@dataclass(frozen=True)
class Line:
    """One thing to measure.

    seconds: its limit. measure: prints its result, a JSON object, as the last line of stdout; gets
    the flags. tiny: flags instead of these that make it quick on a CPU. shows: what of the result
    the table has. needs: a package without which it is left out.
    """

    name: str
    seconds: int
    measure: Callable[[Sequence[str]], object]
    flags: str = ""
    tiny: str = ""
    shows: tuple[str, ...] = ()
    needs: str = ""


def versions(argv: Sequence[str]) -> None:
    """Print what runs here, and on what."""
    device = pick_device(argv[-1])
    found: dict[str, Any] = {"python": sys.version.split()[0], "torch": torch.__version__}
    found |= {"cuda": torch.version.cuda, "cpus": os.cpu_count(), "device": str(device)}
    if importlib.util.find_spec("triton"):
        found["triton"] = importlib.import_module("triton").__version__
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found |= {"device": properties.name, "gb": round(properties.total_memory / 1e9, 1)}
        found["capability"] = f"{properties.major}.{properties.minor}"
    asked = {
        "nvidia-smi": ["nvidia-smi", f"--query-gpu={_QUERY}", "--format=csv"],
        "commit": ["git", "describe", "--always", "--dirty"],
    }
    for name, command in asked.items():
        try:
            done = subprocess.run(command, cwd=REPO, capture_output=True, text=True, check=True)
            found[name] = done.stdout.strip()
        except (OSError, subprocess.CalledProcessError) as error:
            found[name] = f"not known: {error}"
    print(json.dumps(found))


def checks(argv: Sequence[str]) -> None:
    """Run tests against float64. Raises SystemExit where one fails."""
    import pytest

    counted = dict.fromkeys(("passed", "failed", "skipped"), 0)

    class Counter:
        @staticmethod
        def pytest_runtest_logreport(report: Any) -> None:
            if report.when == "call" or report.outcome != "passed":
                counted[report.outcome] += 1

    flags = ["-q", "-p", "no:cacheprovider", "--noconftest"]
    code = pytest.main([*flags, *argv[:-2]], plugins=[Counter()])
    print(json.dumps({"exit": int(code), **counted}))
    if code:
        raise SystemExit(int(code))


def lines(work_dir: Path) -> Iterator[Line]:
    """Yield all of them: what must be right first, then the step, the loop and the rest."""
    yield Line("versions", 60, versions, shows=("device", "torch", "triton"))
    yield Line(
        "kernels against float64",
        150,
        checks,
        "tests/kernels/triton_checks.py",
        "tests/kernels/triton_checks.py -k torchs",
        ("passed", "failed"),
        needs="triton",
    )
    yield from steps()
    how = f"--work_dir {work_dir}"
    small = f"{how} --d_model 16 --n_latents 64 --k 4 --batch_size 32 --n_batches 8"
    # Kernels in Triton's interpreter are slow.
    slow = f"{how} --d_model 8 --n_latents 16 --k 2 --batch_size 2 --n_batches 2"
    for kernels in _ON_CARDS:
        yield Line(
            f"same bits: {kernels}",
            90,
            sae_loop.main,
            f"bits {how} --kernels {kernels} --d_model 512 --n_latents 8192",
            f"bits {slow if kernels == 'triton' else small} --kernels {kernels}",
            ("two_runs_alike", "killed_and_resumed_alike"),
        )
    yield Line(
        "loop",
        120,
        sae_loop.main,
        f"speed {how} --batch_size 8192 --n_batches 20",
        f"speed {small}",
        ("steps_per_s", "steps_per_s_without_validation"),
    )
    files = f"--files_dir {work_dir / 'files'}"
    write = f"{files} --layers 28 --parts write_files"
    yield Line("files", 120, memory.main, write, f"{write} --tiny")
    yield Line(
        "memory",
        150,
        memory.main,
        f"{files} --layers 28 --batch_size 8192 --parts capture train demo",
        f"{files} --layers 28 --batch_size 16 --parts capture train demo --tiny",
        ("capture_gb", "train_gb", "demo_gb"),
    )
    yield Line(
        "evaluation",
        60,
        evaluation.main,
        f"{files} --num_samples 1000",
        f"{files} --num_samples 20",
        ("encode_tokens_per_s", "to_hook_tokens_per_s", "losses_tokens_per_s", "peak_gb"),
    )
    model = f"--llama_model_dir {work_dir}/files/model"
    model += f" --sae_model_path {work_dir}/files/trained_sae.pt"
    yield Line(
        "demo",
        90,
        demo.main,
        f"{model} --repeats 2",
        f"{model} --repeats 1 --max_new_tokens 2",
        ("pair_tokens_per_s_one_prompt", "pair_tokens_per_s_four_prompts"),
    )
    yield Line(
        "capture",
        90,
        capture.main,
        f"{how} --shape 3b --num_sentences 6000 --skip rss first_version",
        f"{how} --shape tiny --num_sentences 20 --repeats 1 --skip rss first_version",
        ("saint_tokens_per_s", "attention"),
    )


def steps() -> Iterator[Line]:
    """Yield the training step by all kernels, the variants and peers, and its profile."""
    sizes = "--batch_size 8192 --skip_dense"
    tiny = "--d_model 8 --n_latents 32 --k 2 --batch_size 4 --repeats 1 --skip_dense"
    shows = ("saint_s", "saint_peak_gb")
    for kernels in _ON_CARDS:
        which = f"--kernels {kernels}"
        flags = (f"{sizes} {which} --repeats 15", f"{tiny} {which}")
        yield Line(f"step: {kernels}", 60, sae_step.main, *flags, shows)
    for kernels in [name for name in _ON_CARDS if name != "dense"]:
        for name, more, less in (
            ("2,048 dead", "--n_dead 2048", "--n_dead 8"),
            ("16,384 latents", "--n_latents 16384", "--n_latents 16"),
        ):
            which = f"--kernels {kernels}"
            flags = (f"{sizes} {which} {more} --repeats 10", f"{tiny} {which} {less}")
            yield Line(f"step: {kernels}, {name}", 45, sae_step.main, *flags, shows)
    for peer, package in (("sparsify", "sparsify"), ("sae_lens", "sae_lens")):
        flags = (
            f"{sizes} --kernels torch --compare {peer} --repeats 5",
            f"{tiny} --compare {peer}",
        )
        found = ("saint_s", f"{peer}_s")
        yield Line(f"step: {peer}", 60, sae_step.main, *flags, found, needs=package)
    for kernels in [name for name in _ON_CARDS if name != "dense"]:
        which = f"--kernels {kernels}"
        yield Line(
            f"profile: {kernels}",
            60,
            sae_profile.main,
            f"--batch_size 8192 {which}",
            f"{tiny} {which}",
            ("step_ms", "busy_ms", "gaps_ms", "launches", "syncs"),
        )


def run(line: Line, args: argparse.Namespace, said: Path) -> dict[str, Any]:
    """Run one line; return what is written of it. said: for what it prints."""
    if line.needs and not importlib.util.find_spec(line.needs):
        return {"line": line.name, "status": "skipped", "said": f"{line.needs} is not installed"}
    flags = [*((line.tiny or line.flags) if args.tiny else line.flags).split()]
    flags += ["--device", args.device]

    def work() -> None:
        sys.stdout = sys.stderr = file = said.open("w", buffering=1)
        os.dup2(file.fileno(), 1)  # for what is not Python's
        os.dup2(file.fileno(), 2)
        line.measure(flags)

    started = time.monotonic()
    limit = _SLOWER * line.seconds if args.tiny else line.seconds
    code = in_child(work, limit)
    found: dict[str, Any] = {"line": line.name, "seconds": round(time.monotonic() - started, 1)}
    text = said.read_text(errors="replace").splitlines() if said.exists() else []
    result = last_object(text)
    if code == 0 and result is not None:
        return found | {"status": "ok", "result": result}
    status = f"took more than {limit} s" if code is None else f"failed ({code})"
    return found | {"status": status, "result": result, "said": text[-15:]}


def last_object(text: Sequence[str]) -> dict[str, Any] | None:
    """Return the last line that is a JSON object."""
    for each in reversed(text):
        if each.startswith("{"):
            try:
                return json.loads(each)
            except ValueError:
                continue
    return None


def row(line: Line, found: dict[str, Any]) -> str:
    """Return a line of the table."""
    result = found.get("result") or {}
    figures = ", ".join(f"{name} {result[name]}" for name in line.shows if name in result)
    if found["status"] != "ok":
        said = found.get("said") or ""
        figures = f"{figures} {said if isinstance(said, str) else ' '.join(said[-1:])}".strip()
    return f"{line.name:28} {found['status']:10} {found.get('seconds', 0):6.1f} s  {figures[:150]}"


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", default="cuda", help="cuda, cuda:N or cpu [%(default)s]")
    parser.add_argument("--tiny", action="store_true", help="sizes that take seconds on a CPU")
    parser.add_argument("--only", default="", help="only lines whose name holds this [all]")
    parser.add_argument("--work_dir", type=Path, help="on a disk with 25 GB [a temporary one]")
    parser.add_argument(
        "--output_path",
        type=Path,
        default=Path("gpu_results.jsonl"),
        help="where results are appended [%(default)s]",
    )
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    args = build_parser().parse_args(argv)
    if args.device == "cpu":
        os.environ["TRITON_INTERPRET"] = "1"  # settled when Triton is first imported
    importlib.import_module("torch._dynamo")  # which the optimiser and the profiler want
    table: list[str] = []
    with tempfile.TemporaryDirectory(prefix="saint_gpu_", dir=args.work_dir) as directory:
        for line in lines(Path(directory)):
            if args.only not in line.name:
                continue
            found = run(line, args, Path(directory) / "said.txt")
            with args.output_path.open("a") as file:
                file.write(json.dumps(found) + "\n")
            table.append(row(line, found))
            print(table[-1], flush=True)
    print("\n" + "\n".join(table) + f"\n\nin {args.output_path}")


if __name__ == "__main__":
    main()
