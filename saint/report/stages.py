"""What the stages of a run left behind: their manifests, in the order in which they finished."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from saint.stage.files import read_json


@dataclass(frozen=True)
class StageSummary:
    """One stage's output.

    path: of its manifest. seconds: at work, those of runs that were killed included; None for
    outputs of earlier versions, which did not write it down.
    """

    name: str
    path: Path
    manifest: dict[str, Any]
    n_bytes: int
    seconds: float | None

    @property
    def made(self) -> str:
        """Its counts, in words."""
        counts = self.manifest.get("counts", {}).items()
        return ", ".join(f"{v:,} {k.removeprefix('n_')}" for k, v in counts if isinstance(v, int))

    @property
    def cost(self) -> str:
        """How long it was at work, in words."""
        return "" if self.seconds is None else f"{self.seconds:,.0f} s"

    @property
    def size(self) -> str:
        """Its files' size, in words."""
        megabytes = self.n_bytes / 1e6
        return f"{megabytes / 1e3:.1f} GB" if megabytes >= 1e3 else f"{megabytes:.1f} MB"


def run_stages(run_dir: Path) -> list[StageSummary]:
    """Return what every finished stage under a directory made, first to finish first."""
    found = []
    for path in sorted(run_dir.rglob("*.manifest.json")):
        try:
            manifest = read_json(path)
            finished = datetime.fromisoformat(manifest["finished"])
        except (ValueError, KeyError, TypeError):
            continue  # unreadable: its own stage says so
        found.append((finished, path, manifest))
    found.sort(key=lambda row: row[0])
    stages, seen = [], set()
    for _, path, manifest in found:
        if manifest.get("fingerprint") in seen:
            continue  # one stage, described beside each of its outputs
        seen.add(manifest.get("fingerprint"))
        names = [path.parent / name for name in manifest.get("files", {})]
        n_bytes = sum(name.stat().st_size for name in names if name.is_file())
        seconds = manifest.get("seconds")
        stages.append(StageSummary(str(manifest.get("stage")), path, manifest, n_bytes, seconds))
    return stages
