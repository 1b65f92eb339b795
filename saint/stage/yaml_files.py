"""YAML files, read safely and written atomically."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import IO, Any

import yaml

from saint.stage.errors import UserError
from saint.stage.files import atomic_path

# A file of a few hundred bytes can stand for more values than memory holds, by aliases of aliases.
_MOST_NODES = 100_000_000
_MOST_DEPTH = 200
_INDENTED = re.compile(rf"^[ \t?:-]{{{_MOST_DEPTH}}}", re.MULTILINE)
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


def _size(value: Any, known: dict[int, float]) -> float:
    """Return how many values there are once aliases are written out; a value in itself is endless.

    known: sizes by `id`; a value that is being counted is infinitely large.
    """
    if not isinstance(value, dict | list) or id(value) in known:
        return known.get(id(value), 1)
    known[id(value)] = math.inf
    parts = [*value.keys(), *value.values()] if isinstance(value, dict) else value
    known[id(value)] = 1 + sum(_size(part, known) for part in parts)
    return known[id(value)]


def _is_deep(text: str) -> bool:
    """Whether collections lie deeper in each other than libyaml's recursion bears.

    Every level takes a bracket of its own, or a character before the first word of a line.
    """
    if text.count("[") + text.count("{") < _MOST_DEPTH and not _INDENTED.search(text):
        return False
    depth = 0
    for event in yaml.parse(text, Loader=LOADER):
        depth += isinstance(event, yaml.CollectionStartEvent)
        depth -= isinstance(event, yaml.CollectionEndEvent)
        if depth > _MOST_DEPTH:
            return True
    return False


def load_yaml(path: Path) -> Any:
    """Read YAML safely; raises UserError when the file is missing or damaged."""
    if not path.exists():
        raise UserError(f"{path} does not exist")
    try:
        text = path.read_text(encoding="utf-8")
        if _is_deep(text):
            raise UserError(f"{path} is not read: its values lie over {_MOST_DEPTH} levels deep")
        value = yaml.load(text, Loader=LOADER)
        if "&" in text and "*" in text and _size(value, {}) > _MOST_NODES:
            raise UserError(f"{path} is not read: its aliases make it {_MOST_NODES:,} values large")
        return value
    except UserError:
        raise
    except (yaml.YAMLError, ValueError, TypeError, RecursionError) as error:
        where = getattr(error, "problem_mark", None)
        line = f" (line {where.line + 1})" if where else ""
        raise UserError(f"{path} is not readable YAML{line}") from None
