"""The Triton step: on a GPU where there is one, else in the interpreter; and compiled for GPUs.

Whether kernels are interpreted is settled when Triton is first imported, which other tests do: each
of these is a process of its own.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys

import pytest
import torch

from tests.support.program import REPO

needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="triton is not installed"
)


def run_python(*arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    env |= {"PYTHONPATH": str(REPO), "OMP_NUM_THREADS": "1"} | variables
    command = [sys.executable, *arguments]
    return subprocess.run(command, cwd=REPO, env=env, capture_output=True, text=True, check=False)


@pytest.mark.timeout(900)  # half a minute on an idle machine
@needs_triton
def test_the_checks_hold_on_a_gpu_or_in_the_interpreter():
    interpret = {} if torch.cuda.is_available() else {"TRITON_INTERPRET": "1"}
    checks = ("-m", "pytest", "-p", "no:cacheprovider", "-x", "tests/kernels/triton_checks.py")
    finished = run_python(*checks, **interpret)
    assert finished.returncode == 0, finished.stdout + finished.stderr


@needs_triton
def test_every_kernel_compiles_for_gpus_that_are_not_here(tmp_path):
    import triton

    if tuple(map(int, triton.__version__.split(".")[:2])) < (3, 3):
        pytest.skip("an older interface of Triton's compiler")
    finished = run_python("tests/kernels/triton_compile.py", TRITON_CACHE_DIR=str(tmp_path))
    assert finished.returncode == 0, finished.stderr
    assert len(set(finished.stdout.split())) == 11


ASK = """
import sys, torch
from sae import SAEConfig, TopKSparseAutoencoder
from saint.stage.errors import UserError
from saint.stage.workers import Workers
from saint.training.moments import Moments
from saint.training.steps import make_step
{before}
sae = TopKSparseAutoencoder(SAEConfig(4, 8, 2))
try:
    make_step("triton", sae, Moments(sae), Workers(0, 1, torch.device("cpu")))
except UserError as error:
    print(error)
"""


def test_what_is_missing_is_one_clear_line():
    finished = run_python("-c", ASK.format(before="sys.modules['triton'] = None"))
    (line,) = finished.stdout.splitlines()
    assert line.startswith("--kernels triton: ") and "pip install triton" in line


@needs_triton
def test_a_cpu_is_not_enough():
    finished = run_python("-c", ASK.format(before=""))
    assert finished.stdout == "--kernels triton works on a GPU, this run is on cpu\n", finished
