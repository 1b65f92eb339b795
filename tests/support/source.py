"""The project's own files, what each imports, and what each room may."""

from __future__ import annotations

import ast
from pathlib import Path

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
