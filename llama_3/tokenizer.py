"""Byte-level BPE on tiktoken: Llama 3's tokenizer, or one that a spec file describes."""

import base64
import codecs
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import tiktoken

from llama_3.args import CheckpointError, naming, read_json

LLAMA_3_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_NAMES = (
    "begin_of_text end_of_text reserved_special_token_0 reserved_special_token_1"
    " finetune_right_pad_id step_id start_header_id end_header_id eom_id eot_id python_tag image"
).split(" ") + [f"reserved_special_token_{i}" for i in range(2, 246)]
LLAMA_3_SPECIAL_TOKENS = tuple(f"<|{name}|>" for name in _NAMES)
LLAMA_3_CHAT = {
    "message": "<|start_header_id|>{role}<|end_header_id|>\n\n{content}<|eot_id|>",
    "generation_prompt": "<|start_header_id|>assistant<|end_header_id|>\n\n",
    "bos": True,
    "strip": True,
}
_MAX_CHARS = 100_000  # tiktoken's regex engine overflows on longer runs of white space
_WORD_BREAK = re.compile(r"(?<=[a-zA-Z])(?= [a-zA-Z])")


SPEC = "tokenizer_spec.json"


class Tokenizer:
    """Text to token ids and back.

    ranks: token bytes to id, ids in merge order. spec: `pattern`, by which text is split before
    merging; `special_tokens`, name to id; `bos_token`; `stop_tokens`, the first of which is EOS
    unless `eos_token` says otherwise; `n_vocab`; optionally `chat`: templates `message` (with
    {role} and {content}) and `generation_prompt`, `bos`, `strip` (trim contents), `default_system`.
    """

    def __init__(self, ranks: dict[bytes, int], spec: dict[str, Any]) -> None:
        self.n_vocab: int = spec["n_vocab"]
        self.special_tokens: dict[str, int] = dict(spec["special_tokens"])
        self.bos_id = self.special_tokens[spec["bos_token"]]
        self.eos_id = self.special_tokens[spec.get("eos_token") or spec["stop_tokens"][0]]
        self.stop_ids = {self.special_tokens[name] for name in spec["stop_tokens"]}
        self._chat: dict[str, Any] | None = spec.get("chat")
        self.has_chat = self._chat is not None
        names = sorted(self.special_tokens, key=len, reverse=True)
        self._special_name = re.compile(f"({'|'.join(map(re.escape, names))})")
        self._bytes = {i: token for token, i in ranks.items() if i < self.n_vocab}
        self._bytes |= {i: name.encode() for name, i in self.special_tokens.items()}
        # tiktoken needs all single bytes: those without a token get ids that are dropped again.
        missing = [bytes([i]) for i in range(256) if bytes([i]) not in ranks]
        unused = max(self.n_vocab, 1 + max([*ranks.values(), *self._bytes]))
        ranks = ranks | {byte: unused + i for i, byte in enumerate(missing)}
        self._has_unused = max(ranks.values()) >= self.n_vocab
        self._encoding = tiktoken.Encoding(
            "llama_3", pat_str=spec["pattern"], mergeable_ranks=ranks, special_tokens={}
        )

    def encode(self, text: str, *, bos: bool, eos: bool = False) -> list[int]:
        """Token ids of `text`, in which names of special tokens are ordinary text."""
        ids = [i for part in _split_long(text) for i in self._encoding.encode_ordinary(part)]
        if self._has_unused:
            ids = [i for i in ids if i < self.n_vocab]
        return [self.bos_id] * bos + ids + [self.eos_id] * eos

    def encode_batch(self, texts: Sequence[str], *, bos: bool) -> list[list[int]]:
        """`encode` of each text, on all cores."""
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            return list(pool.map(lambda text: self.encode(text, bos=bos), texts))

    def decode(self, ids: Iterable[int]) -> str:
        """Text of `ids`; special tokens by name, invalid UTF-8 as replacement characters."""
        return b"".join(map(self.token_bytes, ids)).decode("utf-8", errors="replace")

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes that a token stands for. Raises ValueError if there is no such token."""
        if token_id not in self._bytes:
            raise ValueError(f"no token has the id {token_id}")
        return self._bytes[token_id]

    def token_text(self, token_id: int) -> str:
        """A token for display; parts of a character show as replacement characters."""
        return self.decode([token_id])

    def stream_decoder(self) -> codecs.IncrementalDecoder:
        """Decodes one stream's `token_bytes` as they come, unfinished characters held back."""
        return codecs.getincrementaldecoder("utf-8")(errors="replace")

    def format_chat(self, messages: Sequence[dict[str, str]]) -> list[int]:
        """Ids of a conversation, up to where the assistant's answer begins.

        messages: {"role", "content"} each, plain text whatever they hold. Llama 3's own template
        may add dates to the system message; this does not. Raises ValueError without `has_chat`.
        """
        if self._chat is None:
            raise ValueError("this model has no chat format")
        system = self._chat.get("default_system")
        if system and (not messages or messages[0]["role"] != "system"):
            messages = [{"role": "system", "content": system}, *messages]
        turns = [(self._chat["message"], m["role"], m["content"]) for m in messages]
        ids = [self.bos_id] if self._chat.get("bos") else []
        for template, role, content in [*turns, (self._chat["generation_prompt"], "", "")]:
            content = content.strip() if self._chat.get("strip") else content
            # Only names of special tokens that the template itself spells out are special.
            for part in self._special_name.split(template):
                if part in self.special_tokens:
                    ids.append(self.special_tokens[part])
                else:
                    text = part.replace("{role}", role).replace("{content}", content)
                    ids += self.encode(text, bos=False)
        return ids


def load_tokenizer(model_dir: Path) -> Tokenizer:
    """Load `tokenizer.model` (with `tokenizer_spec.json` if there) or else `tokenizer.json`.

    Raises CheckpointError if neither is there or a file is damaged.
    """
    path, spec_path = Path(model_dir) / "tokenizer.model", Path(model_dir) / SPEC
    if path.is_file():
        with naming(path):
            ranks = _read_ranks(path)
            if not spec_path.is_file():
                names = {name: len(ranks) + i for i, name in enumerate(LLAMA_3_SPECIAL_TOKENS)}
                return Tokenizer(ranks, _llama_3_spec(LLAMA_3_PATTERN, names))
        with naming(spec_path):
            spec = read_json(spec_path)
            if (spec.get("format"), spec.get("version")) != ("saint.tokenizer", 1):
                raise ValueError("expected format saint.tokenizer, version 1")
            known = {*ranks.values(), *spec["special_tokens"].values()}
            n_vocab = spec["n_vocab"]
            missing = set(range(n_vocab)) - known
            # A vocabulary may lack some of the single bytes, and nothing else.
            if len(missing) > sum(ranks.get(bytes([i]), n_vocab) >= n_vocab for i in range(256)):
                raise ValueError(
                    f"{len(missing)} of its {n_vocab} tokens are in no file: is "
                    f"{path.name} cut short?"
                )
            return Tokenizer(ranks, spec)
    path = path.with_suffix(".json")
    if path.is_file():
        with naming(path):
            return _from_hugging_face(read_json(path))
    raise CheckpointError(f"{model_dir}: no tokenizer.model or tokenizer.json")


def _read_ranks(path: Path) -> dict[bytes, int]:
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(path.read_bytes().splitlines(), start=1):
        try:
            token, rank = line.split()
            ranks[base64.b64decode(token, validate=True)] = int(rank)
        except ValueError:
            raise ValueError(f"line {number} is not a base64 token and its rank") from None
    if not ranks:
        raise ValueError("it holds no tokens")
    if len(set(ranks.values())) < len(ranks):  # tiktoken would panic
        raise ValueError("two tokens have the same rank: the file is damaged or cut short")
    return ranks


def _llama_3_spec(pattern: str, special_tokens: dict[str, int]) -> dict[str, Any]:
    """What Llama 3's tokenizers share; in every one the special tokens come last."""
    stop_tokens = ("<|end_of_text|>", "<|eom_id|>", "<|eot_id|>")
    return {
        "pattern": pattern,
        "special_tokens": special_tokens,
        "bos_token": "<|begin_of_text|>",
        "stop_tokens": [name for name in stop_tokens if name in special_tokens],
        "n_vocab": 1 + max(special_tokens.values()),
        "chat": LLAMA_3_CHAT if "<|start_header_id|>" in special_tokens else None,
    }


def _from_hugging_face(config: dict[str, Any]) -> Tokenizer:
    """Make Llama 3's tokenizer of its `tokenizer.json`: byte-level BPE, ids in merge order."""
    steps = (config["pre_tokenizer"] or {}).get("pretokenizers", ())
    patterns = [step["pattern"]["Regex"] for step in steps if step["type"] == "Split"]
    if config["model"].get("type") != "BPE" or len(patterns) != 1:
        raise ValueError("not a byte-level BPE with one split pattern, as Llama 3's is")
    special_tokens = {token["content"]: token["id"] for token in config["added_tokens"]}
    # Byte-level vocabularies print a byte as itself if visible, else as a character from 256 on.
    visible = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in visible]
    names = [*visible, *range(256, 256 + len(others))]
    to_byte = {chr(name): byte for name, byte in zip(names, [*visible, *others], strict=True)}
    vocab = config["model"]["vocab"].items()
    ranks = {bytes(map(to_byte.__getitem__, name)): i for name, i in vocab if name[:2] != "<|"}
    return Tokenizer(ranks, _llama_3_spec(patterns[0], special_tokens))


def _split_long(text: str) -> Iterator[str]:
    """Cut a text for tiktoken: between two words where possible, since no token spans both."""
    while len(text) > _MAX_CHARS:
        breaks = [cut.start() for cut in _WORD_BREAK.finditer(text, _MAX_CHARS // 2, _MAX_CHARS)]
        yield text[: breaks[-1] if breaks else _MAX_CHARS]
        text = text[breaks[-1] if breaks else _MAX_CHARS :]
    yield text
