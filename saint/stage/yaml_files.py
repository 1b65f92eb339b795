"""YAML files, read safely and written atomically."""

from __future__ import annotations

from pathlib import Path
from typing import IO, Any

import yaml

from saint.stage.errors import UserError
from saint.stage.files import atomic_path

# libyaml's loader and dumper are some ten times faster; they are missing from a few builds.
LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


DUMPER = getattr(yaml, "CSafeDumper", yaml.SafeDumper)


def dump_yaml(value: Any, stream: IO[str]) -> None:
    """Write YAML in the order given, readable text unescaped."""
    parts = [{key: row} for key, row in value.items()] if isinstance(value, dict) else []
    for part in parts or [value]:
        text = _dumped(part, DUMPER)
        # libyaml escapes what is beyond 16 bits: emoji.
        stream.write(_dumped(part, yaml.SafeDumper) if "\\U000" in text else text)


def _dumped(value: Any, dumper: Any) -> str:
    return yaml.dump(value, Dumper=dumper, sort_keys=False, allow_unicode=True, width=100)


def write_yaml(path: Path, value: Any) -> None:
    """Write a YAML file atomically, in the order given."""
    with atomic_path(path) as temporary, temporary.open("w", encoding="utf-8") as file:
        dump_yaml(value, file)


def load_yaml(path: Path) -> Any:
    """Read YAML safely; raises UserError when the file is missing or damaged."""
    if not path.exists():
        raise UserError(f"{path} does not exist")
    try:
        with path.open(encoding="utf-8") as file:
            return yaml.load(file, Loader=LOADER)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        where = getattr(error, "problem_mark", None)
        line = f" (line {where.line + 1})" if where else ""
        raise UserError(f"{path} is not readable YAML{line}") from None
