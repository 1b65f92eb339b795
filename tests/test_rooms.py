"""The arrows between rooms, as CONTRIBUTING.md draws them, and no circle between modules."""

from __future__ import annotations

import ast
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

from tests.support.program import REPO
from tests.support.source import LIBRARY, MAY_IMPORT, SCRIPTS, dotted, imported

ONLY_IN = {
    "gradio": "saint/page/* llama_3_inference_text_completion_gradio.py",
    "anthropic": "saint/interpretation/* interpret_*.py",
    "wandb": "saint/training/run_files.py",
    "triton": "saint/kernels/triton_*.py saint/training/triton_step.py",
}
TESTS = sorted((REPO / "tests").rglob("*.py"))


def room(name: str) -> str:
    """The room of a dotted name, or its first part where it is no room's."""
    parts = name.split(".")
    return ".".join(parts[:2]) if parts[0] == "saint" else parts[0]


@pytest.mark.parametrize("path", [*LIBRARY, REPO / "sae.py", *SCRIPTS], ids=dotted)
def test_a_module_imports_only_what_its_room_may(path: Path):
    names, here = imported(path), path.relative_to(REPO)
    rooms = {room(name) for name in names} - {room(dotted(path)), "saint"}
    never = {"tests", "benchmarks", "embedded", *(script.stem for script in SCRIPTS)}
    assert not rooms & never, f"{here} imports {rooms & never}"
    if path not in SCRIPTS:
        allowed = MAY_IMPORT.get(room(dotted(path)), "").split()
        assert (rooms & MAY_IMPORT.keys()) <= set(allowed), f"{here} may import {allowed}"
    for package, homes in ONLY_IN.items():
        at_home = any(here.match(home) for home in homes.split())
        assert at_home or package not in {name.split(".")[0] for name in names}, package


def test_no_module_imports_itself_in_a_circle():
    modules = {dotted(path): path for path in (*LIBRARY, REPO / "sae.py")}
    graph = {name: imported(path) & modules.keys() for name, path in modules.items()}
    for name, found in graph.items():  # a package's modules may import it, and it imports them
        graph[name] = {other for other in found if not name.startswith(f"{other}.")}
    list(TopologicalSorter(graph).static_order())


def test_no_test_imports_from_another_test():
    """What several tests need lies in tests/support; fixtures in a conftest."""
    tests = {dotted(path) for path in TESTS if path.name.startswith("test_")}
    at_fault = {dotted(p): found for p in TESTS if (found := imported(p) & tests)}
    assert tests and not at_fault


def test_every_piece_fits_its_screen():
    """Scripts of at most 300 lines (training 350), functions of 60, main of 40."""
    for script in SCRIPTS:
        assert len(script.read_text().splitlines()) <= (350 if "training" in script.stem else 300)
    for path in [*LIBRARY, REPO / "sae.py", *SCRIPTS]:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef) and node.end_lineno is not None:
                n_lines = node.end_lineno - node.lineno + 1
                assert "triton_" in path.name or n_lines <= (40 if node.name == "main" else 60), (
                    path,
                    node.name,
                )
