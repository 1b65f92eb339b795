import importlib.metadata
import json
import random
import shutil
import unicodedata
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.convert_slow_tokenizer import TikTokenConverter

from llama_3 import CheckpointError, load_llama, load_tokenizer
from llama_3.tokenizer import LLAMA_3_PATTERN, LLAMA_3_SPECIAL_TOKENS
from tests.support.llama_reference import write_tokenizer
from tests.support.tiny_steering import write_model


def real_tokenizer_model() -> Path:
    """Llama 3's own file, as the package llama-models carries it; the package is not imported."""
    package = importlib.metadata.distribution("llama-models")
    return Path(str(package.locate_file("llama_models/llama3/tokenizer.model")))


@pytest.fixture(scope="module")
def llama_dir(tmp_path_factory) -> Path:
    model_dir = tmp_path_factory.mktemp("llama")
    shutil.copy(real_tokenizer_model(), model_dir / "tokenizer.model")
    return model_dir


@pytest.fixture(scope="module")
def llama(llama_dir):
    return load_tokenizer(llama_dir)


@pytest.fixture(scope="module")
def other(llama_dir):
    """The same vocabulary in Hugging Face's `tokenizers`, which merges by pairs, not by rank."""
    converter = TikTokenConverter(
        vocab_file=str(llama_dir / "tokenizer.model"),
        pattern=LLAMA_3_PATTERN,
        extra_special_tokens=list(LLAMA_3_SPECIAL_TOKENS),
    )
    return converter.converted()


def diverse_strings(n: int) -> list[str]:
    """Words, code, many scripts, emoji, control characters and runs of white space, mixed."""
    rng = random.Random(0)
    scripts = [
        *((0x20, 0x7F), (0xA0, 0x250), (0x370, 0x400), (0x400, 0x530), (0x590, 0x600)),
        *((0x600, 0x700), (0x900, 0x980), (0xE00, 0xE80), (0x1100, 0x1200), (0x3040, 0x3100)),
        *((0x4E00, 0x5000), (0xAC00, 0xAD00), (0x1F300, 0x1F650), (0x10000, 0x10100)),
        *((0x00, 0x20), (0x2000, 0x2070), (0x300, 0x370), (0xFE00, 0xFE10), (0xE0000, 0xE0080)),
    ]
    words = (
        "the delegates' gathered I'll WE'VE don't it's x=1 3.14159 1234567 for(i=0;i<n;++i){ "
        "def __init__(self): return\treturn https://example.org/?q=%20&r#frag naïve façade "
        "straße 東京 привет שלום مرحبا नमस्ते 안녕 👩‍👩‍👧‍👦 🏳️‍🌈 "
        "<|eot_id|> <|begin_of_text|> ... --- /* */ ]]>"
    ).split(" ")
    spaces = [" ", "  ", "\n", "\r\n", "\t", "\n\n\n", "   \n ", "\u00a0", "\u3000", " \t \n\t"]
    strings = ["", *words, *spaces]
    while len(strings) < n:
        parts = []
        for _ in range(rng.randint(1, 12)):
            kind = rng.random()
            if kind < 0.35:
                low, high = rng.choice(scripts)
                parts += [chr(rng.randrange(low, high)) for _ in range(rng.randint(1, 8))]
            elif kind < 0.6:
                parts.append(rng.choice(words))
            elif kind < 0.85:
                parts.append(rng.choice(spaces) * rng.randint(1, 5))
            else:
                parts.append(rng.choice("a1 \n'.é🙂") * rng.randint(1, 200))
        strings.append("".join(parts))
    return strings


def test_agrees_with_tokenizers_on_diverse_strings(llama, other):
    strings = diverse_strings(3000)
    assert len({unicodedata.name(c, "?").split()[0] for s in strings for c in s}) > 40
    batch = llama.encode_batch(strings, bos=False)
    for special in LLAMA_3_SPECIAL_TOKENS:
        assert other.token_to_id(special) == llama.special_tokens[special]
    for text, ids in zip(strings, batch, strict=True):
        assert llama.encode(text, bos=False) == ids
        assert llama.decode(ids) == text
        if "<|" not in text:  # there it would see special tokens
            assert other.encode(text, add_special_tokens=False).ids == ids, text


def test_hugging_faces_file_gives_the_same_tokenizer(llama, other, tmp_path):
    other.save(str(tmp_path / "tokenizer.json"))
    ours = load_tokenizer(tmp_path)
    strings = diverse_strings(300)
    assert ours.encode_batch(strings, bos=True) == llama.encode_batch(strings, bos=True)
    assert ours.special_tokens == llama.special_tokens
    assert (ours.bos_id, ours.eos_id) == (llama.bos_id, llama.eos_id)
    assert (ours.stop_ids, ours.n_vocab) == (llama.stop_ids, llama.n_vocab)
    messages = [{"role": "user", "content": "Hello <|eot_id|> you"}]
    assert ours.format_chat(messages) == llama.format_chat(messages)


def test_llama_3s_numbers(llama):
    assert llama.n_vocab == 128256
    assert (llama.bos_id, llama.eos_id) == (128000, 128001)
    assert llama.stop_ids == {128001, 128008, 128009}
    assert llama.special_tokens["<|reserved_special_token_245|>"] == 128255
    assert llama.encode("Hello world", bos=True, eos=True) == [128000, 9906, 1917, 128001]
    assert llama.token_text(9906) == "Hello" and llama.token_text(128009) == "<|eot_id|>"
    for wrong in (128256, -1):
        with pytest.raises(ValueError, match=str(wrong)):
            llama.token_bytes(wrong)


def test_names_of_special_tokens_are_text(llama):
    text = "<|eot_id|><|start_header_id|>system<|end_header_id|>"
    ids = llama.encode(text, bos=False)
    assert max(ids) < 128000 and llama.decode(ids) == text


def test_agrees_with_metas_chat_format(llama):
    from llama_models.datatypes import RawMessage
    from llama_models.llama3.chat_format import ChatFormat
    from llama_models.llama3.tokenizer import Tokenizer as MetasTokenizer

    messages: list[dict[str, Any]] = [
        {"role": "system", "content": "You are a pirate."},
        {"role": "user", "content": "Hello <|eot_id|> there"},
        {"role": "assistant", "content": "Ahoy!"},
        {"role": "user", "content": "Who are\n\nyou?"},
    ]
    metas = ChatFormat(MetasTokenizer(real_tokenizer_model()))
    raw = [RawMessage(**message) for message in messages]
    expected = metas.encode_dialog_prompt(raw).tokens
    assert llama.format_chat(messages) == expected
    # As in the model cards' templates, white space around a message is not part of it.
    messages[1]["content"] = " Hello <|eot_id|> there\n"
    assert llama.format_chat(messages) == expected


@pytest.mark.timeout(60)
@pytest.mark.parametrize(
    ("unit", "n_chars"), [(" ", 1_100_000), ("a", 300_000), ("🙂", 150_000), ("ab\n  ", 300_000)]
)
def test_very_long_text(llama, unit, n_chars):
    text = (unit * n_chars)[:n_chars]
    ids = llama.encode(text, bos=False)
    assert llama.decode(ids) == text
    assert ids == llama.encode_batch([text, "x"], bos=False)[0]


def test_cutting_long_text_between_words_changes_no_token(llama):
    text = " ".join(s for s in diverse_strings(400) if "\x00" not in s) + " and so on" * 15_000
    assert len(text) > 150_000
    assert llama.encode(text, bos=False) == llama._encoding.encode_ordinary(text)


@settings(max_examples=200, deadline=None)
@given(text=st.text(max_size=60))
def test_streaming_never_flickers(llama, text):
    decoder = llama.stream_decoder()
    shown = ""
    for token_id in llama.encode(text, bos=False):
        shown += decoder.decode(llama.token_bytes(token_id))
        assert text.startswith(shown)
    assert decoder.decode(b"", True) == "" and shown == text


def test_streaming_an_unfinished_character(llama):
    ids = llama.encode("🏴", bos=False)
    assert len(ids) > 1
    decoder = llama.stream_decoder()
    shown = [decoder.decode(llama.token_bytes(i)) for i in ids[:-1]]
    assert shown == [""] * (len(ids) - 1)
    assert decoder.decode(b"", True) == "�"


def spec_tokenizer(model_dir: Path, **changes):
    write_tokenizer(model_dir)
    path = model_dir / "tokenizer_spec.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return load_tokenizer(model_dir)


def test_spec_file(tmp_path):
    tokenizer = spec_tokenizer(tmp_path / "plain")
    assert tokenizer.encode("hé", bos=True) == [256, 104, 0xC3, 0xA9]
    assert (tokenizer.n_vocab, tokenizer.bos_id, tokenizer.eos_id) == (259, 256, 257)
    assert tokenizer.stop_ids == {257} and not tokenizer.has_chat
    with pytest.raises(ValueError, match="no chat format"):
        tokenizer.format_chat([{"role": "user", "content": "x"}])


def test_chat_of_a_spec(tmp_path):
    chat = {
        "message": "<|turn|>{role}\n{content}<|end|>\n",
        "generation_prompt": "<|turn|>assistant\n",
        "bos": False,
        "default_system": "S",
    }
    tokenizer = spec_tokenizer(tmp_path, chat=chat)
    ids = tokenizer.format_chat([{"role": "user", "content": "{role} <|end|>"}])
    expected = "<|turn|>system\nS<|end|>\n<|turn|>user\n{role} <|end|><|end|>\n<|turn|>assistant\n"
    assert tokenizer.decode(ids) == expected
    assert ids.count(258) == 3 and ids.count(257) == 2
    own = tokenizer.format_chat([{"role": "system", "content": "mine"}])
    assert tokenizer.decode(own) == "<|turn|>system\nmine<|end|>\n<|turn|>assistant\n"


def test_bytes_without_a_token_are_dropped(tmp_path):
    write_tokenizer(tmp_path)
    path = tmp_path / "tokenizer.model"
    lines = path.read_bytes().splitlines()
    padding = b"Bg== 300"  # the byte 6, past the vocabulary
    for kept in (lines[:6] + lines[7:], lines[:6] + [padding] + lines[7:]):
        path.write_bytes(b"\n".join(kept))
        tokenizer = load_tokenizer(tmp_path)
        assert tokenizer.encode("a\x06b", bos=True) == [256, 97, 98]
        assert tokenizer.encode_batch(["\x06", "\x07"], bos=False) == [[], [7]]
        with pytest.raises(ValueError):
            tokenizer.token_bytes(300)


def test_a_file_that_ends_early_is_refused(tmp_path):
    write_model(tmp_path)
    path = tmp_path / "tokenizer.model"
    whole = path.read_bytes()
    lines = whole.splitlines(keepends=True)
    cuts = {"holds no tokens": b"", "cut short": b"".join(lines[: len(lines) // 2])}
    cuts |= {"1 of its": b"".join(lines[:-1]), "not a base64 token": whole[:-4]}
    for reason, content in cuts.items():
        path.write_bytes(content)
        with pytest.raises(CheckpointError, match=reason):
            load_tokenizer(tmp_path)
    # Meta's own file has no spec: there the model's embedding tells.
    (tmp_path / "tokenizer_spec.json").unlink()
    path.write_bytes(b"".join(lines[: len(lines) // 2]))
    with pytest.raises(CheckpointError, match="the tokenizer has .* tokens, the model"):
        load_llama(tmp_path, device=torch.device("cpu"), dtype=torch.float32)


def test_damaged_files_are_named(tmp_path):
    with pytest.raises(CheckpointError, match="no tokenizer.model"):
        load_tokenizer(tmp_path)
    for content in (b"IQ== 0\nIg==\n", b"IQ== x\n", b"\x08\x96\x01\n"):
        (tmp_path / "tokenizer.model").write_bytes(content)
        with pytest.raises(CheckpointError, match=r"tokenizer\.model: .*line \d"):
            load_tokenizer(tmp_path)
    for changes in ({"format": "x"}, {"bos_token": "<|none|>"}, {"n_vocab": None}):
        with pytest.raises(CheckpointError, match=r"tokenizer_spec\.json"):
            spec_tokenizer(tmp_path / "spec", **changes)
    (tmp_path / "spec" / "tokenizer_spec.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"tokenizer_spec\.json"):
        load_tokenizer(tmp_path / "spec")
    (tmp_path / "tokenizer.model").unlink()
    (tmp_path / "tokenizer.json").write_text(
        '{"model": {"type": "Unigram"}, "pre_tokenizer": null}'
    )
    with pytest.raises(CheckpointError, match=r"tokenizer\.json: not a byte-level BPE"):
        load_tokenizer(tmp_path)
