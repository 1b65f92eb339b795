"""Every stage killed, starved of disk, run twice at once, and given damaged files; what came of it.

Each stage runs to its end once; what it wrote is then what every disturbed run must end with.
"""

from __future__ import annotations

import ctypes
import json
import os
import random
import shutil
import signal
import struct
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

import yaml

from tests.support import program
from tests.support.interpretation_workplace import Workplace
from tests.support.pipeline import (
    capture_args,
    evaluate_args,
    preprocess_args,
    train_args,
    write_dataset,
)
from tests.support.program import Finished, call, call_ranks, finished, fork, start
from tests.support.tiny_steering import write_model

_TIMEOUT_S = 300
_CAP_DAC = 0b110  # CAP_DAC_OVERRIDE and CAP_DAC_READ_SEARCH: root's right to write anywhere
_VOLATILE = ("tokens_per_s", "seconds", "time")


@dataclass(frozen=True)
class Case:
    """A stage with its arguments; all it writes lies below `out`, which is made anew each time.

    n_events: about as many writes, fsyncs, renames and removals as one run makes.
    """

    name: str
    stage: str
    arguments: Callable[[Path], list[object]]
    n_events: int
    prepare: Callable[[Path], object] = lambda out: None
    n_ranks: int = 1


@dataclass
class Tally:
    """What happened; `differences`, `tracebacks` and `lost` must stay 0.

    lost: runs that did not come to an end when they were started again.
    """

    kills: int = 0
    sigterms: int = 0
    resumes: int = 0
    resumed_equal: int = 0
    differences: int = 0
    full_disks: int = 0
    read_only: int = 0
    two_at_once: int = 0
    clocks_set_back: int = 0
    damages: int = 0
    tracebacks: int = 0
    lost: int = 0
    remarks: list[str] = field(default_factory=list)

    def add(self, other: Tally) -> None:
        """Add another's numbers and remarks to these."""
        for name, value in asdict(other).items():
            setattr(self, name, getattr(self, name) + value)


def make_inputs(root: Path) -> None:
    """A tiny model, text, store, rows, SAE, evidence and answers, which the cases read."""
    write_model(root / "model")
    write_dataset(root / "data")
    top = ["--data_dir", root / "acts", "--model_path", root / "trained_sae.pt", "--top_n", 5]
    for stage, arguments in (
        ("capture_activations", capture_args(root, root / "acts")),
        ("sae_preprocessing", preprocess_args(root)),
        ("sae_training", train_args(root, root / "trained_sae.pt", num_epochs=1)),
        ("capture_top_activating_sentences", [*top, "--captured_data_output_dir", root / "top"]),
        ("saint_exchange", export_args(root, root / "lens")),
    ):
        done = call(stage, *arguments)
        assert done.returncode == 0, done.stderr
    labels = {i: {"common_semantic": f"concept {i}", "certainty": 0.5} for i in range(9)}
    answers = Workplace(root / "answers")
    answers.everything()
    answers.api.close()
    (root / "labels.yaml").write_text(yaml.safe_dump(labels))


def export_args(root: Path, out: Path) -> list[object]:
    """Arguments that write the SAE as SAELens reads it."""
    return ["export", root / "trained_sae.pt", "--format", "saelens", "--output_dir", out]


def cases(root: Path) -> list[Case]:
    """Every stage that asks no server; `fault_campaign` has those that do."""
    rows = {"input_dir": root / "acts"}

    def shuffle(out: Path, **flags: object) -> list[object]:
        files = {"output_dir": out / "rows", "mean_filepath": out / "mean.pt"}
        return preprocess_args(root, **(rows | files | flags))

    def train(out: Path) -> list[object]:
        often = {"checkpoint_minutes": 1e-6, "num_epochs": 1, "dead_tokens": 128}
        return train_args(root, out / "sae.pt", **often)

    def rank(out: Path) -> list[object]:
        argv = ["--data_dir", root / "acts", "--model_path", root / "trained_sae.pt"]
        argv += ["--captured_data_output_dir", out / "top", "--top_n", 5]
        return [*argv, "--pool_sentences", 50]

    def browse(out: Path) -> list[object]:
        return ["--evidence_path", root / "top" / "evidence.parquet", "--html", out / "l.html"]

    def bring_in(out: Path) -> list[object]:
        return ["import", root / "lens", "--output_path", out / "sae.safetensors"]

    def name(out: Path) -> list[object]:
        answers = root / "answers"
        argv = ["--response_ids_filepath", answers / "tops" / "response_ids.yaml"]
        argv += ["--retrieved_responses_dir", answers / "output"]
        return [*argv, "--parsed_responses_output_filepath", out / "labels.yaml", "--report"]

    return [
        Case("capture", "capture_activations", lambda out: capture_args(root, out / "acts"), 100),
        Case("shuffle in memory", "sae_preprocessing", shuffle, 30),
        Case("shuffle on disk", "sae_preprocessing", lambda out: shuffle(out, memory_gb=0.02), 60),
        Case(
            "shuffle in place",
            "sae_preprocessing",
            lambda out: [*shuffle(out, input_dir=out / "acts"), "--in_place"],
            90,
            lambda out: shutil.copytree(root / "acts", out / "acts"),
        ),
        Case("training", "sae_training", train, 60),
        Case("training on two ranks", "sae_training", train, 40, n_ranks=2),
        Case("top sentences", "capture_top_activating_sentences", rank, 40),
        Case(
            "evaluation",
            "sae_evaluation",
            lambda out: evaluate_args(root, output_path=out / "report.json", num_samples=60),
            8,
        ),
        Case("labels", "interpret_top_sentences_parse_responses", name, 10),
        Case("browser", "latent_browser", browse, 4),
        Case("exchange, out", "saint_exchange", lambda out: export_args(root, out / "lens"), 8),
        Case("exchange, in", "saint_exchange", bring_in, 6),
    ]


class Campaign:
    """One case after the other in a directory; `wanted` is what its undisturbed run wrote."""

    def __init__(self, case: Case, directory: Path, seed: int) -> None:
        self.case, self.rng, self.tally = case, random.Random(f"{case.name} {seed}"), Tally()
        self.out, self.output = directory / "out", directory / "terminal"
        self._anew()
        began = time.monotonic()
        done = self._run()
        self.usual_s = time.monotonic() - began
        assert done.returncode == 0, done.stderr
        self.wanted = contents(self.out)
        self.sizes = [p.stat().st_size for p in self.out.rglob("*") if p.is_file()]

    def kills(self, n: int, *, terminate: bool = False, clock_back: bool = False) -> None:
        """Kill it n times, up to three times before each run to the end."""
        name = "sigterms" if terminate else "kills"
        left = n
        while left > 0:
            self._anew()
            for _ in range(min(left, self.rng.randint(1, 3))):
                code = self._disturb(terminate)
                if code == 0:
                    break
                left -= 1
                setattr(self.tally, name, getattr(self.tally, name) + 1)
                self._check(code in (-signal.SIGKILL, 143, 1), f"exit code {code}")
            if clock_back:
                self.tally.clocks_set_back += 1
                tomorrow = time.time() + 86_400
                for path in self.out.rglob("*"):
                    os.utime(path, (tomorrow, tomorrow))
            self._ends_alike(clock_back=clock_back)

    def full_disk(self, n_points: int) -> None:
        """End in one line at each of n limits of a file's size, and go on with more room."""
        top = max(self.sizes)
        for point in range(n_points):
            self._anew()
            limit = max(200, top * (2 * point + 1) // (2 * n_points))
            stopped = self._run(file_bytes=limit)
            self.tally.full_disks += 1
            self._check(
                stopped.returncode == 1 and stopped.last_line.startswith("error: "),
                f"limit {limit} of {top}: exit code {stopped.returncode}, {stopped.last_line!r}",
            )
            self._ends_alike()

    def read_only(self) -> None:
        """End in one line where nothing may be written, and leave nothing there."""
        self._anew()
        before = contents(self.out)
        paths = [self.out, *(p for p in self.out.rglob("*") if p.is_dir())]
        for path in paths:
            path.chmod(0o555)
        process = fork(_without_rights, self.case.stage, self._words(), str(self.output))
        process.join(_TIMEOUT_S)
        stopped = finished(process, self.output)
        for path in paths:
            path.chmod(0o755)
        self.tally.read_only += 1
        self._note(stopped)
        self._check(
            stopped.returncode == 1 and contents(self.out) == before,
            f"read-only: exit code {stopped.returncode}, {stopped.last_line!r}",
        )

    def two_at_once(self) -> None:
        """Of two runs on one output one is told of the other, or finds all done; no harm."""
        self._anew()
        outputs = [self.output.with_name(name) for name in ("first", "second")]
        runs = [start(self.case.stage, *self._words(), output=path) for path in outputs]
        for process in runs:
            process.join(_TIMEOUT_S)
        ends = [finished(*pair) for pair in zip(runs, outputs, strict=True)]
        for end in ends:
            self._note(end)
        self.tally.two_at_once += 1
        codes = sorted(end.returncode for end in ends)
        said = [end.last_line for end in ends if end.returncode]
        self._check(
            codes == [0, 0] or (codes == [0, 1] and "another run" in said[0]),
            f"two at once: exit codes {codes}, {said}",
        )
        self._ends_alike()

    def _anew(self) -> None:
        shutil.rmtree(self.out, ignore_errors=True)
        self.out.mkdir(parents=True)
        self.case.prepare(self.out)

    def _words(self) -> list[str]:
        return [str(word) for word in self.case.arguments(self.out)]

    def _run(self, **options: object) -> Finished:
        if self.case.n_ranks > 1 and not options:
            ranks = call_ranks(self.case.n_ranks, self.case.stage, *self._words())
            return max(ranks, key=lambda rank: rank.returncode)
        return self._note(call(self.case.stage, *self._words(), **options))

    def _disturb(self, terminate: bool) -> int:
        """Start it and stop it at a random moment; returns its exit code."""
        event = self.rng.randint(2, 2 * self.case.n_events)
        if self.case.n_ranks > 1:
            hit = self.rng.randrange(self.case.n_ranks)
            ranks = call_ranks(
                self.case.n_ranks, self.case.stage, *self._words(), die_at={hit: event}
            )
            return min(self._note(rank).returncode for rank in ranks)
        at_event = not terminate and self.rng.random() < 0.5
        process = start(
            self.case.stage,
            *self._words(),
            output=self.output,
            die_at=event if at_event else None,
        )
        if not at_event:
            process.join(self.rng.uniform(0, 1.1 * self.usual_s))
            process.terminate() if terminate else process.kill()
        process.join(_TIMEOUT_S)
        if process.exitcode == -signal.SIGTERM:  # before the stage could handle it
            return 143
        if not self.output.with_suffix(".err").exists():  # killed before it had an output
            return process.exitcode or 0
        return self._note(finished(process, self.output)).returncode

    def _ends_alike(self, *, clock_back: bool = False) -> None:
        if clock_back:
            process = fork(_in_the_past, self.case.stage, self._words(), str(self.output))
            process.join(_TIMEOUT_S)
            done = self._note(finished(process, self.output))
        else:
            done = self._run()
        self.tally.resumes += 1
        if done.returncode != 0:
            self.tally.lost += 1
            self.tally.remarks.append(f"{self.case.name}: not resumed: {done.last_line}")
            return
        found = contents(self.out)
        names = sorted(n for n in found.keys() | self.wanted if found.get(n) != self.wanted.get(n))
        if names:
            self.tally.differences += 1
            self.tally.remarks.append(f"{self.case.name}: other bytes in {names}")
        else:
            self.tally.resumed_equal += 1

    def _note(self, done: Finished) -> Finished:
        if "Traceback" in done.stderr:
            self.tally.tracebacks += 1
            self.tally.remarks.append(f"{self.case.name}: {done.last_line}")
        return done

    def _check(self, fine: bool, remark: str) -> None:
        if not fine:
            self.tally.differences += 1
            self.tally.remarks.append(f"{self.case.name}: {remark}")


def contents(out: Path) -> dict[str, bytes]:
    """Every file's bytes; of records and pages only that they are there, of logs without times."""
    found = {}
    for path in sorted(out.rglob("*")):
        if path.is_file():
            data = path.read_bytes()
            if "manifest" in path.name or path.name.endswith(".training.html"):
                data = b""
            elif path.name.endswith(".metrics.jsonl"):
                data = b"\n".join(without_times(line) for line in data.splitlines())
            found[str(path.relative_to(out))] = data
    return found


def without_times(line: bytes) -> bytes:
    """A log's line without what depends on how busy the machine was."""
    try:
        entry = json.loads(line)
    except ValueError:  # one that was damaged on purpose
        return line
    return json.dumps({k: v for k, v in entry.items() if k not in _VOLATILE}).encode()


def _without_rights(stage: str, argv: list[str], output: str) -> None:
    """Run a stage to which file modes apply, even where it is root that runs it."""
    # Opened first: the directory of the output may be one that must not be written to.
    libc = ctypes.CDLL(None, use_errno=True)
    header = ctypes.create_string_buffer(struct.pack("Ii", 0x20080522, 0))
    rights = ctypes.create_string_buffer(24)
    if libc.capget(header, rights) == 0:
        words = list(struct.unpack("6I", rights.raw))
        words[0] &= ~_CAP_DAC
        libc.capset(header, ctypes.create_string_buffer(struct.pack("6I", *words)))
    program._child(stage, argv, {}, output, None, None)


def _in_the_past(stage: str, argv: list[str], output: str) -> None:
    """Run a stage whose clock was set back by more than a year."""
    now = time.time
    time.time = lambda: now() - 4e7
    program._child(stage, argv, {}, output, None, None)
