"""Peak memory at Llama 3.2-3B's widths and 65,536 latents: capture, one training step, the demo.

    python -m benchmarks.memory --layers 2           # a CPU with little memory
    python -m benchmarks.memory --layers 28 --device cuda

Random weights, written in the formats that the stages read; every part runs in a process of its
own. On a GPU a part's peak is `torch.cuda.max_memory_allocated`, and its host memory beside it; on
a CPU there is only host memory. Host memory is the peak of RssAnon, sampled every 5 ms: the page
cache, through which weights are mapped, does not count.

The demo steers at the limit of tokens that its `Limits` allow, with a latent that is scaled, so
that the encoder runs. What the demo needs at full depth is computed from tensor sizes, and so is
the same at the measured depth, beside what was measured. The last line is JSON. GB are 10^9 bytes.
"""

from __future__ import annotations

import argparse
import base64
import itertools
import json
import tempfile
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import torch

import capture_activations
import llama_3_inference_text_completion as terminal
from benchmarks.common import SHAPES, PrivatePeak, draw_sentences, in_child
from llama_3 import CheckpointError, Llama, LlamaArgs
from sae import BLOCK_ELEMENTS, SAEConfig, TopKSparseAutoencoder, save_sae, standardise
from saint.stage.devices import pick_device
from saint.stage.errors import log
from saint.stage.flags import positive_int
from saint.stage.program import run_stage
from saint.stage.workers import Workers
from saint.steering.completions import stream_pairs
from saint.steering.settings import Limits, Request, Setting
from saint.steering.studio import load_studio
from saint.training.moments import Moments
from saint.training.steps import KERNELS, make_step

SHAPE = SHAPES["3b"]
DICTIONARY = SAEConfig(3072, 65536, 64, layer=22)
TINY = (SHAPES["tiny"], SAEConfig(64, 256, 8, layer=2))
CUDA_CONTEXT = 500_000_000  # assumed: driver, cuBLAS; outside of torch's count
_NEW_TOKENS = 4
_WEIGHTS = "consolidated.00.pth"


def weight_bytes(shape: LlamaArgs, dictionary: SAEConfig) -> dict[str, int]:
    """Bytes of the bf16 model and the float32 SAE, tied weights once."""
    meta = torch.device("meta")
    with meta:
        model = Llama(shape, device=meta, dtype=torch.bfloat16)
        sae = TopKSparseAutoencoder(dictionary, device=meta)
    both = {"model (bf16)": model, "SAE (float32)": sae}
    return {
        name: sum(p.numel() * p.element_size() for p in set(module.parameters()))
        for name, module in both.items()
    }


def demo_bytes(shape: LlamaArgs, dictionary: SAEConfig, limits: Limits) -> dict[str, int]:
    """Bytes on the device while the demo works at its limits; "peak" is the worst moment.

    Loading copies one tensor at a time beside its place. Plain and steered rows are one batch: each
    has its cache, and both work on their prompts at once (the steered layer, where only one of them
    is edited, and the MLP are the widest places) or sample from logits.
    """
    rows, d = limits.tokens, shape.dim
    parts = weight_bytes(shape, dictionary)
    weights = sum(parts.values())
    parts["copy of the embedding, loading"] = shape.vocab_size * d * 2
    parts["caches, plain and steered"] = (
        2 * 2 * shape.n_layers * rows * shape.n_kv_heads * shape.head_dim * 2
    )
    block = min(rows, max(1, BLOCK_ELEMENTS // dictionary.n_latents))
    parts["pre-activations, one block"] = block * dictionary.n_latents * 4
    # float32 x, z, z - b_pre, two shifts and their sum; bf16 after; and before, after and residual
    # of plain and steered rows.
    parts["steering"] = rows * d * (6 * 4 + 2 + 2 * 3 * 2)
    parts["MLP"] = 2 * rows * (2 * shape.ffn_dim + 3 * d) * 2
    # bf16 and float32 logits, probabilities, order, cumulative sums and masks.
    parts["logits and sampling"] = 2 * limits.prompts * shape.vocab_size * (2 + 6 * 4 + 2 * 8)
    steered = parts["steering"] + parts["pre-activations, one block"]
    working = parts["caches, plain and steered"] + max(
        steered, parts["MLP"], parts["logits and sampling"]
    )
    parts["peak"] = weights + max(parts["copy of the embedding, loading"], working)
    return parts


# --- the parts, each in a process of its own -----------------------------------------------------


def sizes(args: argparse.Namespace) -> tuple[LlamaArgs, SAEConfig]:
    """Return the shapes at the depth that was asked for; the SAE reads layer 22 or the last."""
    shape, dictionary = TINY if args.tiny else (SHAPE, DICTIONARY)
    shape = replace(shape, n_layers=min(args.layers, shape.n_layers))
    return shape, replace(dictionary, layer=min(dictionary.layer or 0, shape.n_layers - 1))


@torch.no_grad()
def write_files(args: argparse.Namespace) -> dict[str, float]:
    """Write a random model with Llama 3's number of tokens, an SAE and random sentences."""
    shape, dictionary = sizes(args)
    device, model_dir = pick_device(args.device), args.files_dir / "model"
    model_dir.mkdir(parents=True)
    names = {"dim": "dim", "n_layers": "n_layers", "n_heads": "n_heads", "ffn_dim": "ffn_dim"}
    names |= {"n_kv_heads": "n_kv_heads", "vocab_size": "vocab_size", "norm_eps": "norm_eps"}
    params = {name: getattr(shape, field) for name, field in names.items()}
    (model_dir / "params.json").write_text(json.dumps(params | {"max_seq_len": 8192}))
    tokens = itertools.chain.from_iterable(
        itertools.product(range(256), repeat=n) for n in (1, 2, 3)
    )
    lines = [
        base64.b64encode(bytes(token)) + b" %d" % rank
        for rank, token in enumerate(itertools.islice(tokens, shape.vocab_size - 256))
    ]
    (model_dir / "tokenizer.model").write_bytes(b"\n".join(lines))
    model = Llama(shape, device=device, dtype=torch.bfloat16)
    for name, weight in model.named_parameters():
        weight.fill_(1.0) if "norm" in name else weight.normal_(std=0.02)
    state = model.state_dict()
    del state["output.weight"]  # it is the embedding
    torch.save({name: weight.cpu() for name, weight in state.items()}, model_dir / _WEIGHTS)
    sae = TopKSparseAutoencoder(dictionary)
    sae.initialise(torch.zeros(dictionary.d_model), seed=0)
    sae.max_activations = torch.ones(dictionary.n_latents)
    save_sae(args.files_dir / "trained_sae.pt", sae)
    # Letters and spaces: most tokens are one of them.
    drawn = draw_sentences(30 * args.num_samples, 27)
    texts = ["".join(" abcdefghijklmnopqrstuvwxyz"[i] for i in ids) for ids in drawn]
    pq.write_table(pa.table({"text": texts}), args.files_dir / "s.parquet")
    return {}


def capture(args: argparse.Namespace) -> dict[str, float]:
    """Capture sentences, as the stage does."""
    flags = {"model_dir": "model", "dataset_dir": "s.parquet", "output_dir": "activations"}
    argv = [f"--{name}={args.files_dir / path}" for name, path in flags.items()]
    layer = sizes(args)[1].layer
    argv += [f"--num_samples={args.num_samples}", f"--layers={layer}", "--dtype=bfloat16"]
    capture_activations.main([*argv, f"--device={args.device}", "--overwrite"])
    return {}


def train(args: argparse.Namespace) -> dict[str, float]:
    """Take one step at full size."""
    device, (shape, dictionary) = pick_device(args.device), sizes(args)
    sae = TopKSparseAutoencoder(dictionary, device=device)
    sae.initialise(torch.zeros(dictionary.d_model), seed=0)
    step = make_step(args.kernels, sae, Moments(sae), Workers(0, 1, device))
    x = standardise(torch.randn(args.batch_size, dictionary.d_model, device=device))[0]
    losses = step.accumulate(x, dictionary.k, None, 1.0)
    step.apply(1e-4, 1.0)
    state = 3 * weight_bytes(shape, dictionary)["SAE (float32)"]
    return {"loss": float(losses.loss), "weights and moments": state / 1e9}


def demo(args: argparse.Namespace) -> dict[str, float]:
    """Load model and SAE from files and write one pair of completions at the limit of tokens."""
    argv = [f"--llama_model_dir={args.files_dir / 'model'}", f"--device={args.device}"]
    argv += [f"--sae_model_path={args.files_dir / 'trained_sae.pt'}", "--dtype=bfloat16"]
    studio, _ = load_studio(terminal.build_parser().parse_args(argv))
    limits = studio.limits
    words = limits.tokens // limits.prompts - _NEW_TOKENS - 1  # BOS is one of the tokens
    prompt = "a" if args.tiny else " ".join("a" for _ in range(words))
    settings = (Setting(0, "scale", 2.0), Setting(1, "add", 1.0))
    request = Request((prompt,) * limits.prompts, settings, max_new_tokens=_NEW_TOKENS)
    n_rows = sum(map(len, studio.encode_prompts(request))) + limits.prompts * _NEW_TOKENS
    *_, last = stream_pairs(studio, request)
    assert last.pairs is not None and (args.tiny or n_rows == limits.tokens)
    computed = demo_bytes(*sizes(args), limits)["peak"]
    return {"tokens": n_rows, "computed at this depth": computed / 1e9}


PARTS = {part.__name__: part for part in (write_files, capture, train, demo)}


def measure(
    part: Callable[[argparse.Namespace], dict], args: argparse.Namespace, said: Path
) -> None:
    """Run one part in this process; leave its peaks in GB with what it reports itself."""
    on_gpu = pick_device(args.device).type == "cuda"
    args.num_samples = args.num_samples or (4000 if on_gpu else 64)
    with PrivatePeak() as peak:
        reported = part(args)
    peaks = {"host": peak.highest / 1e9, "host before": peak.before / 1e9}
    if on_gpu:
        peaks["GPU"] = torch.cuda.max_memory_allocated() / 1e9
    found = {name: round(value, 3) for name, value in (peaks | reported).items()}
    said.write_text(json.dumps(found))


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--layers", type=positive_int, default=2, help="of 28 blocks [2]")
    parser.add_argument("--batch_size", type=positive_int, default=256, help="tokens a step [256]")
    parser.add_argument("--num_samples", type=positive_int, help="sentences [64, on a GPU 4,000]")
    parser.add_argument("--kernels", choices=KERNELS, default="auto", help="of the step [auto]")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:N [auto]")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), help="[all]")
    parser.add_argument("--tiny", action="store_true", help="other widths, that take no time")
    parser.add_argument(
        "--files_dir", type=Path, help="where write_files is to leave its 3 to 8 GB [a temporary]"
    )
    return parser


def summary(result: dict[str, dict]) -> dict[str, float]:
    """Return each part's peak in GB: the GPU's, or where there is none the host's."""
    return {f"{name}_gb": part.get("GPU", part["host"]) for name, part in result.items()}


def main(argv: Sequence[str] | None = None) -> None:
    args = build_parser().parse_args(argv)
    result: dict[str, dict] = {}
    with ExitStack() as stack:
        if args.files_dir is None:
            made = tempfile.TemporaryDirectory(prefix="saint_memory_")
            args.files_dir = Path(stack.enter_context(made))
        for name in args.parts:
            said = args.files_dir.parent / f"{args.files_dir.name}.{name}.json"
            if code := in_child(lambda part=PARTS[name], said=said: measure(part, args, said)):
                raise SystemExit(code)
            result[name] = json.loads(said.read_text())
            said.unlink()
            log.info("%s, in GB: %s", name, result[name])
    print(json.dumps(computed(result) | summary(result) | {"layers": args.layers}))


def computed(result: dict[str, dict]) -> dict:
    """Print what the demo needs by its tensors' sizes, and return it beside what was measured."""
    parts = demo_bytes(SHAPE, DICTIONARY, Limits())
    for name, n_bytes in (parts | {"CUDA's context (assumed)": CUDA_CONTEXT}).items():
        print(f"{name:<34}{n_bytes / 1e9:7.2f} GB")
    total = round((parts["peak"] + CUDA_CONTEXT) / 1e9, 2)
    print(f"computed for the demo on a GPU, all 28 layers: {total} GB")
    found = {"measured": result, "computed_gpu_gb": total}
    if "demo" in result and "GPU" not in result["demo"]:
        beyond = result["demo"]["host"] - result["demo"]["computed at this depth"]
        decoder = 4 * DICTIONARY.n_latents * DICTIONARY.d_model / 1e9
        host = found["computed_host_gb"] = round(beyond + decoder, 2)
        print(
            f"computed for its host: {host} GB: {decoder:.2f} for the decoder, transposed while "
            f"loading, and {beyond:.2f} measured here beyond tensors; CUDA's libraries not counted"
        )
    return found


if __name__ == "__main__":
    run_stage(main, expected=(CheckpointError,))
