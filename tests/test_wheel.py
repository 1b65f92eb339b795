"""What `pip install .` puts into an environment is whole: every stage runs from another folder."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

from tests.support.program import REPO
from tests.support.source import SCRIPTS

# One process for all: what costs is importing torch and gradio.
RUN = """
import contextlib, importlib, io, pathlib, runpy, sys
where = pathlib.Path(sys.argv.pop(1))
for stage in sys.argv[1:]:
    sys.argv[:] = [stage, "--help"]
    shown = io.StringIO()
    try:
        with contextlib.redirect_stdout(shown):
            runpy.run_module(stage, run_name="__main__")
    except SystemExit as end:
        assert end.code in (0, None), (stage, end.code)
    assert "usage: " in shown.getvalue(), stage
for name in ("saint", "llama_3", "sae", "embedded"):
    assert where in pathlib.Path(importlib.import_module(name).__file__).parents, name
"""


def test_a_wheel_holds_every_stage_and_every_data_file(tmp_path: Path):
    source, target = tmp_path / "source", tmp_path / "installed"
    source.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE", *(f"{s.stem}.py" for s in SCRIPTS)):
        shutil.copy(REPO / name, source)
    shutil.copy(REPO / "sae.py", source)
    for package in ("saint", "llama_3", "embedded"):
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(REPO / package, source / package, ignore=ignored)
    project = tomllib.loads((source / "pyproject.toml").read_text())["tool"]["setuptools"]
    assert set(project["py-modules"]) == {"sae", *(script.stem for script in SCRIPTS)}
    install = ["pip", "install", "-q", "--no-deps", "--no-index", "--no-build-isolation"]
    subprocess.run([sys.executable, "-m", *install, "--target", target, source], check=True)
    data = [
        path.relative_to(source)
        for package in ("saint", "llama_3", "embedded")
        for path in (source / package).rglob("*")
        if path.is_file()
    ]
    missing = [str(path) for path in data if not (target / path).exists()]
    assert not missing and len(data) > 80
    stages = [script.stem for script in SCRIPTS] + ["saint.store", "saint.doctor"]
    command = [sys.executable, "-c", RUN, str(target), *stages]
    env = os.environ | {"PYTHONPATH": str(target)}
    done = subprocess.run(
        command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=240, check=False
    )
    assert done.returncode == 0, done.stderr
