"""A tiny random Llama with its tokenizer, and random SAEs with labels, for the steering tests."""

import base64
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import yaml

from llama_3 import HookPoint, Llama, load_args, load_llama
from sae import SAEConfig, TopKSparseAutoencoder, save_sae
from saint.evidence.labels import Label
from saint.steering.guide import Guide, make_guide
from saint.steering.studio import Dictionary, Studio

WORDS = "Senior diplomats met to discuss the nuclear treaty and court ruling".split()
D_MODEL, N_LAYERS, N_LATENTS, K = 32, 4, 64, 8
LABELS = {3: "nuclear weapons", 5: "court rulings", 9: "<b>bold</b> & ${1+1} {{value}}"}


@contextmanager
def one_thread() -> Iterator[None]:
    """Tiny matrices on one thread: several only wait for each other on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def write_tokenizer(model_dir: Path, *, chat: bool = True) -> int:
    """Write single bytes and a few words as a tiktoken file; returns the vocabulary's size."""
    names = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    tokens = [bytes([i]) for i in range(256)]
    for word in WORDS:
        for form in (word, " " + word):
            tokens += [form[:n].encode() for n in range(2, len(form) + 1)]
    tokens = list(dict.fromkeys(tokens))
    lines = [
        f"{base64.b64encode(token).decode()} {i + len(names)}" for i, token in enumerate(tokens)
    ]
    model_dir.mkdir(parents=True, exist_ok=True)
    (model_dir / "tokenizer.model").write_text("\n".join(lines))
    n_vocab = len(tokens) + len(names)
    message = "<|im_start|>{role}\n{content}<|im_end|>\n"
    spec = {
        "format": "saint.tokenizer",
        "version": 1,
        "pattern": r" ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|\s+",
        "special_tokens": {name: i for i, name in enumerate(names)},
        "bos_token": names[0],
        "stop_tokens": [names[0], names[2]],
        "n_vocab": n_vocab,
    }
    if chat:
        prompt = "<|im_start|>assistant\n"
        spec["chat"] = {"message": message, "generation_prompt": prompt, "bos": False}
    (model_dir / "tokenizer_spec.json").write_text(json.dumps(spec))
    return n_vocab


def write_model(model_dir: Path, *, chat: bool = True, max_seq_len: int = 512) -> Path:
    """Write a random model in Meta's format; the same weights every time."""
    n_vocab = write_tokenizer(model_dir, chat=chat)
    params = {
        "dim": D_MODEL, "n_layers": N_LAYERS, "n_heads": 4, "n_kv_heads": 2, "ffn_dim": 64,
        "vocab_size": n_vocab, "norm_eps": 1e-5, "rope_theta": 10000.0, "max_seq_len": max_seq_len,
    }  # fmt: skip
    (model_dir / "params.json").write_text(json.dumps(params))
    model = Llama(load_args(model_dir), device=torch.device("cpu"), dtype=torch.float32)
    generator = torch.Generator().manual_seed(0)
    for name, weight in model.state_dict().items():
        draw = torch.randn(weight.shape, generator=generator)
        weight.copy_(1 + 0.3 * draw if "norm" in name else draw * 0.25)
    torch.save(model.state_dict(), model_dir / "consolidated.00.pth")
    return model_dir


def make_sae(
    *, layer: int | None = 1, hook_point: str = "resid_pre", seed: int = 0, bos: bool = True
) -> TopKSparseAutoencoder:
    """A random SAE whose encoder is not its decoder's transpose, with uneven units."""
    config = SAEConfig(D_MODEL, N_LATENTS, K, layer=layer, hook_point=hook_point, prepend_bos=bos)
    sae = TopKSparseAutoencoder(config)
    sae.initialise(torch.zeros(D_MODEL), seed=seed)
    generator = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        sae.W_enc.add_(0.1 * torch.randn(sae.W_enc.shape, generator=generator))
        sae.b_enc.add_(0.05 * torch.randn(sae.b_enc.shape, generator=generator))
        sae.b_pre.add_(0.1 * torch.randn(sae.b_pre.shape, generator=generator))
    sae.max_activations = 1 + 2 * torch.rand(N_LATENTS, generator=generator)
    return sae.requires_grad_(False)


def write_setup(root: Path) -> tuple[Path, Path]:
    """Write a model directory and an SAE with labels at their default place."""
    model_dir = write_model(root / "model")
    save_sae(root / "trained_sae.pt", make_sae())
    (root / "output").mkdir()
    rows = {i: {"common_semantic": text, "certainty": 0.9} for i, text in LABELS.items()}
    (root / "output" / "parsed_responses.yaml").write_text(yaml.safe_dump(rows))
    return model_dir, root / "trained_sae.pt"


def make_studio(model_dir: Path, *saes: TopKSparseAutoencoder) -> tuple[Studio, list[Guide]]:
    """A studio around one or more SAEs (by default one), loaded in this process."""
    model, tokenizer = load_llama(model_dir, device=torch.device("cpu"), dtype=torch.float32)
    dictionaries, guides = [], []
    for i, sae in enumerate(saes or (make_sae(),)):
        assert sae.config.layer is not None and sae.max_activations is not None
        hook = HookPoint(sae.config.layer, sae.config.hook_point)
        dictionary = Dictionary(f"sae{i}", sae, hook, sae.max_activations, "test")
        dictionaries.append(dictionary)
        labels = {latent: Label(text, 0.9) for latent, text in LABELS.items()}
        guides.append(
            make_guide(
                labels, None, name=dictionary.name, n_latents=dictionary.sae.config.n_latents
            )
        )
    return Studio(model, tokenizer, tuple(dictionaries)), guides
