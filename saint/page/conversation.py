"""A chat's turns on the page: what was said, and what the model answered plainly and steered.

Each side has a history of its own: the steered model is asked with its own earlier answers before
it, the plain one with its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from saint.stage.errors import UserError
from saint.steering.completions import Pair
from saint.steering.studio import Turn

MAX_TURNS = 32
_SIDES = ("user", "plain", "steered")


@dataclass(frozen=True)
class Exchange:
    """One turn of both conversations."""

    user: str
    plain: str
    steered: str

    @classmethod
    def of(cls, pair: Pair) -> Exchange:
        """A pair that has been written, as a turn that others follow."""
        # What a cut character left is no text: the model is not to read it.
        answers = (r.text.rstrip("\ufffd").strip() for r in (pair.plain, pair.steered))
        return cls(pair.prompt, *answers)


def histories(turns: Sequence[Exchange]) -> tuple[list[Turn], list[Turn]]:
    """What the plain and the steered model have before the next message."""
    plain, steered = ([(t.user, getattr(t, side)) for t in turns] for side in _SIDES[1:])
    return plain, steered


def to_json(turns: Sequence[Exchange]) -> list[dict[str, str]]:
    """Turns as a link and the copied JSON hold them."""
    return [asdict(turn) for turn in turns]


def read_turns(rows: Any, most_chars: int) -> list[Exchange]:
    """Read turns that a stranger's link holds. Raises UserError when they are none."""
    if rows is None:
        return []
    if not isinstance(rows, list) or len(rows) > MAX_TURNS:
        raise UserError(f"the conversation is damaged, or longer than {MAX_TURNS} turns")
    turns = []
    for row in rows:
        found = [row.get(side) for side in _SIDES] if isinstance(row, dict) else []
        texts = [text for text in found if isinstance(text, str) and len(text) <= most_chars]
        if len(texts) != len(_SIDES):
            raise UserError("the conversation is damaged: start a new one")
        turns.append(Exchange(*texts))
    return turns
