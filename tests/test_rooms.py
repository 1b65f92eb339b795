"""The arrows between rooms, as CONTRIBUTING.md draws them, and no circle between modules."""

from __future__ import annotations

import ast
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

from tests.support.program import REPO

MAY_IMPORT = {
    "llama_3": "",
    "saint.stage": "",
    "sae": "saint.stage",
    "saint.store": "saint.stage",
    "saint.capture": "saint.stage saint.store llama_3",
    "saint.shuffle": "saint.stage saint.store",
    "saint.kernels": "saint.stage sae",
    "saint.training": "saint.stage saint.store sae saint.kernels",
    "saint.evaluation": "saint.stage saint.store saint.capture saint.kernels sae llama_3",
    "saint.evidence": "saint.stage saint.store sae saint.kernels llama_3",
    "saint.interpretation": "saint.stage saint.store saint.evidence",
    "saint.doctor": "saint.stage saint.store sae saint.evidence saint.interpretation",
    "saint.steering": "saint.stage sae saint.evidence llama_3",
    "saint.page": "saint.stage saint.steering",
    "saint.report": "saint.stage saint.training saint.evaluation saint.evidence",
    "saint.browser": "saint.stage sae saint.evidence llama_3",
    "saint.exchange": "saint.stage sae saint.evidence",
}
ONLY_IN = {
    "gradio": "saint/page/* llama_3_inference_text_completion_gradio.py",
    "anthropic": "saint/interpretation/* interpret_*.py",
    "wandb": "saint/training/run_files.py",
    "triton": "saint/kernels/triton_*.py saint/training/triton_step.py",
}
LIBRARY = [p for folder in ("saint", "llama_3") for p in sorted((REPO / folder).rglob("*.py"))]
SCRIPTS = [path for path in sorted(REPO.glob("*.py")) if path.name != "sae.py"]


def imported(path: Path) -> set[str]:
    """Modules and names that a file imports, dotted; those inside functions too."""
    nodes = list(ast.walk(ast.parse(path.read_text())))
    names = {a.name for n in nodes if isinstance(n, ast.Import) for a in n.names}
    for node in nodes:
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} imports relatively"
            names |= {f"{node.module}.{alias.name}" for alias in node.names} | {node.module or ""}
    return names


def dotted(path: Path) -> str:
    name = path.relative_to(REPO).with_suffix("").as_posix().replace("/", ".")
    return name.removesuffix(".__init__")


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
