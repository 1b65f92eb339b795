"""Labels for spreadsheets and notebooks: one row per latent, CSV or JSON lines."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from saint.evidence.file import Evidence
from saint.evidence.labels import Label
from saint.stage.errors import UserError
from saint.stage.files import write_text

COLUMNS = (
    *("latent", "label", "certainty", "score", "intruder_score"),
    *("density", "max_activation", "n_firing_sentences"),
)


def label_rows(labels: Mapping[int, Label], evidence: Evidence | None) -> list[dict[str, Any]]:
    """Return rows with COLUMNS, by latent; what is not known is None.

    Evidence adds its three columns, and a row for every latent that has no label.
    """
    known: dict[int, dict[str, Any]] = {}
    if evidence is not None:
        names = ["latent", *COLUMNS[-3:]]
        known = {row["latent"]: row for row in evidence.summary().select(names).to_pylist()}
    rows = []
    for latent in sorted(labels.keys() | known.keys()):
        row: dict[str, Any] = dict.fromkeys(COLUMNS) | {"latent": latent}
        if label := labels.get(latent):
            row |= {"label": label.text, "certainty": label.certainty, "score": label.score}
            row["intruder_score"] = label.intruder
        rows.append(row | known.get(latent, {}))
    return rows


def write_labels(path: Path, rows: list[dict[str, Any]]) -> None:
    """Write .csv or .jsonl, by the suffix. Raises UserError for another one."""
    if path.suffix == ".jsonl":
        write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
        return
    if path.suffix != ".csv":
        raise UserError(f"{path}: labels are written as .csv or .jsonl")
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_text(path, text.getvalue())
