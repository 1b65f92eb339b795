"""The shape of manifests and of records of unfinished runs: whatever is read is checked first."""

from __future__ import annotations

import re
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, NotRequired

from pydantic import AfterValidator, Field, TypeAdapter, ValidationError
from typing_extensions import TypedDict

from saint.stage.errors import UserError
from saint.stage.files import read_json

"""Larger records are refused unread; that of a million shards is smaller."""


def _inside(name: str) -> str:
    path = PurePosixPath(name)
    if not name or path.is_absolute() or {"..", "."} & set(name.split("/")) or "\0" in name:
        raise ValueError("a path that leaves its directory")
    return name


def _layer_dir(name: str) -> str:
    if not re.fullmatch(r"layer_\d+(\.[a-z_]+)?", name):
        raise ValueError("no name of a layer's directory, such as layer_22 or layer_22.mlp_out")
    return name


_Count = Annotated[int, Field(strict=True, ge=0, lt=1 << 62)]
_Size = Annotated[int, Field(strict=True, gt=0, lt=1 << 31)]
_Number = Annotated[float, Field(allow_inf_nan=False)]
_Text = Annotated[str, Field(strict=True)]
_Flag = Annotated[bool, Field(strict=True)]
_Share = Annotated[float, Field(gt=0, lt=1)]
_Inside = Annotated[str, AfterValidator(_inside)]
_LayerDir = Annotated[str, AfterValidator(_layer_dir)]


class _File(TypedDict):
    bytes: _Count
    xxh3: Annotated[str, Field(pattern="^[0-9a-f]{16}$")]


class _Partial(TypedDict):
    arguments: dict[str, Any]
    sources: dict[str, Any]


class _Manifest(_Partial):
    stage: _Text
    facts: dict[str, Any]
    counts: dict[str, Any]
    files: dict[_Inside, _File]
    settings: dict[str, Any]


class _Layer(TypedDict):
    layer: _Count
    hook_point: _Text


class _Moved(TypedDict):
    rows: _Text
    done: _Flag


class _Captured(TypedDict):
    d_model: _Size
    prepend_bos: NotRequired[_Flag]
    max_token_length: NotRequired[_Size | None]
    store_dtype: NotRequired[_Text]
    model_fingerprint: NotRequired[_Text | None]
    dataset_fingerprint: NotRequired[_Text | None]
    text_column: NotRequired[_Text]


class _StoreFacts(_Captured):
    layers: Annotated[dict[_LayerDir, _Layer], Field(min_length=1)]
    in_place: NotRequired[dict[_LayerDir, _Moved]]
    captured_as: NotRequired[_Text]


class _StoreCounts(TypedDict):
    n_shards: _Count
    n_sentences: _Count
    n_tokens: _Count
    shard_sentences: NotRequired[list[_Count]]


class _RowsOfSplits(TypedDict):
    train: list[_Count]
    val: list[_Count]


class _RowsFacts(_Captured):
    layer: _Count | None
    hook_point: _Text
    rows: _RowsOfSplits
    batch_size: NotRequired[_Size]
    variance: NotRequired[_Number]
    held_out_fraction: NotRequired[_Share]
    held_out_seed: NotRequired[_Count]


_FACTS: dict[str, TypeAdapter[Any]] = {
    "capture_activations": TypeAdapter(_StoreFacts),
    "sae_preprocessing": TypeAdapter(_RowsFacts),
}
_COUNTS: dict[str, TypeAdapter[Any]] = {"capture_activations": TypeAdapter(_StoreCounts)}
_PARTIAL, _WHOLE = TypeAdapter(_Partial), TypeAdapter(_Manifest)


def read_record(path: Path) -> dict[str, Any]:
    """Read the record of a finished or unfinished run, whatever its format's version.

    Raises UserError when it is too large, no JSON object, or lacks arguments or sources.
    """
    record = read_json(path)
    _check(_PARTIAL, record, path)
    return record


def check_manifest(record: dict[str, Any], path: Path) -> None:
    """Raise UserError naming the entry of a manifest that has not the shape it should have."""
    _check(_WHOLE, record, path)
    stage = record["stage"]
    for part, schemas in (("facts", _FACTS), ("counts", _COUNTS)):
        if stage in schemas:
            _check(schemas[stage], record[part], path, part)


def _check(schema: TypeAdapter[Any], value: Any, path: Path, *where: str) -> None:
    try:
        schema.validate_python(value)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        entry = ".".join(str(part) for part in (*where, *first["loc"])) or "it"
        raise UserError(f"{path} is damaged, or no manifest: {entry}: {first['msg']}") from None
