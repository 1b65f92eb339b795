"""Every import is a declared dependency, every declared one is used, and versions are exact."""

from __future__ import annotations

import re
import sys
import tomllib
from importlib.metadata import packages_distributions
from pathlib import Path

from tests.support.program import REPO
from tests.support.source import LIBRARY, SCRIPTS, imported

PROJECT = tomllib.loads((REPO / "pyproject.toml").read_text())["project"]
OURS = {"saint", "llama_3", "sae", "embedded", "benchmarks", "tests"} | {s.stem for s in SCRIPTS}
# Tools that are run, and file systems that are loaded by a URI's name.
NOT_IMPORTED = {
    "axe-playwright-python",
    "eai-sparsify",
    "ruff",
    "pyright",
    "pytest-timeout",
    "pytest-xdist",
    "s3fs",
    "gcsfs",
}
# Only where its owner has it: a service's client, looked for when it is asked for.
OPTIONAL = {"neuronpedia", "dictionary-learning", "sparsify", "schedulefree"}
# Parts of declared distributions, which bring them.
BROUGHT = {"gradio-client", "starlette", "tokenizers"}


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", re.split(r"[\[<>=;~! ]", name)[0]).lower()


def distributions(paths: list[Path]) -> set[str]:
    """Distributions that provide what the files import; ours and Python's own left out."""
    known = packages_distributions()
    tops = {name.split(".")[0] for path in paths for name in imported(path)}
    outside = tops - OURS - set(sys.stdlib_module_names) - {""}
    return {normal(dist) for top in outside for dist in known.get(top, [top])[:1]}


def test_imports_are_declared_and_declarations_are_used():
    runtime = {normal(name) for name in PROJECT["dependencies"]}
    extras = {
        extra: {normal(name) for name in names}
        for extra, names in PROJECT["optional-dependencies"].items()
    }
    used = distributions([*LIBRARY, REPO / "sae.py", *SCRIPTS]) - OPTIONAL - BROUGHT
    lazily = extras["dev"] | extras["remote"]  # where a flag asks for it
    assert used <= runtime | lazily, "imported, not declared"
    tests = [*(REPO / "tests").rglob("*.py"), *(REPO / "embedded").rglob("*.py")]
    used_there = distributions(tests) - OPTIONAL - BROUGHT
    assert used_there <= runtime | extras["dev"] | extras["bench"] | extras["remote"], (
        "imported by tests, not declared"
    )
    benchmarks = distributions(sorted((REPO / "benchmarks").glob("*.py"))) - OPTIONAL - BROUGHT
    assert benchmarks <= runtime | extras["dev"] | extras["bench"]
    unused = (runtime | extras["dev"] | extras["bench"]) - used - used_there - benchmarks
    assert unused <= NOT_IMPORTED, "declared, not imported"


def test_constraints_are_exact_and_hold_every_dependency():
    lines = [
        line.split("#")[0].strip() for line in (REPO / "constraints.txt").read_text().splitlines()
    ]
    pins = dict(line.split("==") for line in lines if line)
    assert all(re.fullmatch(r"[\w.+!-]+", version) for version in pins.values())
    wanted = [*PROJECT["dependencies"], *PROJECT["optional-dependencies"]["dev"]]
    # Which triton there is depends on the build of torch, which pins its own.
    assert {normal(name) for name in wanted} - {"triton"} <= {normal(name) for name in pins}
