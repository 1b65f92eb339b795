"""Model hyperparameters, read from Meta's `params.json` or Hugging Face's `config.json`."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, NamedTuple


class CheckpointError(ValueError):
    """A model directory that cannot be used; the message is one line naming file and tensor."""


class RopeScaling(NamedTuple):
    """Llama 3.1's scaling of rotary frequencies, see `rope_frequencies`; length in tokens."""

    factor: float
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_seq_len: int = 8192


@dataclass(frozen=True)
class LlamaArgs:
    """Shape of a Llama 3 model. Raises ValueError if the numbers do not fit together."""

    dim: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    ffn_dim: int
    vocab_size: int
    norm_eps: float = 1e-5
    rope_theta: float = 500000.0
    rope_scaling: RopeScaling | None = None
    max_seq_len: int = 8192  # in tokens
    tied: bool = False  # the unembedding is the embedding

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if field.type is int and (not isinstance(value, int) or value < 1):
                raise ValueError(f"{field.name} must be a positive whole number, not {value!r}")
        if self.n_heads % self.n_kv_heads:
            raise ValueError(f"{self.n_heads} heads do not divide into {self.n_kv_heads} KV heads")
        if self.head_dim % 2:
            raise ValueError(f"head_dim must be even for rotary embeddings, not {self.head_dim}")

    def shard(self, n_shards: int) -> "LlamaArgs":
        """One tensor-parallel rank's share. Raises CheckpointError if the model does not split."""
        names = ("n_heads", "n_kv_heads", "ffn_dim", "vocab_size")
        for name in names:
            if (size := getattr(self, name)) % n_shards:
                raise CheckpointError(f"{name} {size} does not split over {n_shards} ranks")
        return replace(self, **{name: getattr(self, name) // n_shards for name in names})


def load_args(model_dir: Path) -> LlamaArgs:
    """Read `params.json` (Meta) or, without one, `config.json` (Hugging Face) in `model_dir`.

    In Meta's format only the weights tell whether the embeddings are tied: `tied` is False here.
    Raises CheckpointError if neither file is there, or its contents make no Llama 3.
    """
    for name, parse in (("params.json", _parse_meta), ("config.json", _parse_hugging_face)):
        path = Path(model_dir) / name
        if path.is_file():
            with naming(path):
                return parse(read_json(path))
    if not Path(model_dir).exists():
        raise CheckpointError(f"{model_dir} does not exist: a directory of Llama weights is needed")
    raise CheckpointError(f"{model_dir}: no model here (neither params.json nor config.json)")


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Make whatever goes wrong while reading a file a CheckpointError, one line that names it."""
    try:
        yield
    except Exception as error:  # torch.load raises OSError, RuntimeError, UnpicklingError, ...
        reason = f"missing key {error}" if isinstance(error, KeyError) else str(error)
        reason = (reason.splitlines() or [type(error).__name__])[0]
        raise CheckpointError(f"{path}: {reason}") from error


def read_json(path: Path) -> dict[str, Any]:
    """Read one JSON object. Raises ValueError if `path` holds anything else."""
    value = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(value, dict):
        raise ValueError("expected a JSON object")
    return value


def _parse_meta(params: dict[str, Any]) -> LlamaArgs:
    dim, n_heads, n_layers = params["dim"], params["n_heads"], params["n_layers"]
    scaled = params.get("use_scaled_rope", False)
    # Meta's file does not state the factor: the released 3.2 1B and 3B use 32, 3.1 uses 8.
    small = (dim, n_layers) in ((2048, 16), (3072, 28))
    factor = float(params.get("rope_scaling_factor") or (32 if small else 8))
    # The hidden size is two thirds of 4 x dim, times a multiplier, rounded up.
    hidden = int((params.get("ffn_dim_multiplier") or 1) * (8 * dim // 3))
    multiple = params.get("multiple_of", 256)
    return LlamaArgs(
        *(dim, n_layers, n_heads, params.get("n_kv_heads") or n_heads),
        head_dim=params.get("head_dim") or dim // n_heads,
        ffn_dim=params.get("ffn_dim") or -(-hidden // multiple) * multiple,
        vocab_size=params["vocab_size"],
        norm_eps=float(params.get("norm_eps", 1e-5)),
        rope_theta=float(params.get("rope_theta", 500000.0)),
        rope_scaling=RopeScaling(factor) if scaled else None,
        max_seq_len=params.get("max_seq_len") or (131072 if scaled else 8192),
    )


def _parse_hugging_face(config: dict[str, Any]) -> LlamaArgs:
    # transformers 5 writes `rope_parameters` (with the base in it), older ones `rope_scaling`.
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    kind = rope.get("rope_type") or rope.get("type") or "default"
    model_type, activation = config["model_type"], config.get("hidden_act", "silu")
    if (model_type, activation) != ("llama", "silu") or kind not in ("default", "llama3"):
        found = f"model_type {model_type!r}, hidden_act {activation!r}, rope_type {kind!r}"
        raise ValueError(f"{found}: only 'llama', 'silu' and 'default' or 'llama3' are supported")
    names = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
    dim, n_heads = config["hidden_size"], config["num_attention_heads"]
    return LlamaArgs(
        *(dim, config["num_hidden_layers"], n_heads, config.get("num_key_value_heads") or n_heads),
        head_dim=config.get("head_dim") or dim // n_heads,
        ffn_dim=config["intermediate_size"],
        vocab_size=config["vocab_size"],
        norm_eps=float(config.get("rms_norm_eps", 1e-6)),
        rope_theta=float(rope.get("rope_theta") or config.get("rope_theta", 10000.0)),
        rope_scaling=RopeScaling(*(rope[name] for name in names)) if kind == "llama3" else None,
        max_seq_len=config.get("max_position_embeddings", 2048),
        tied=config.get("tie_word_embeddings", False),
    )
