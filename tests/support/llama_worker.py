"""What the Llama tests run in processes of their own, forked from `program`'s server."""

import json
import re
from pathlib import Path

import torch
import torch.distributed as dist

from llama_3 import HOOK_NAMES, HookPoint, Sampling, generate, load_llama

CPU = torch.device("cpu")


def run_rank(rank: int, size: int, init_file: str, model_dirs: list[Path]) -> None:
    """One rank of the tensor-parallel test; leaves its results in the model directories."""
    from fairscale.nn.model_parallel.initialize import initialize_model_parallel

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{init_file}", rank=rank, world_size=size)
    initialize_model_parallel(size)
    tokens = torch.arange(2 * 30).view(2, 30) % 250
    for model_dir in model_dirs:
        model, _ = load_llama(model_dir, device=CPU, dtype=torch.float32, model_parallel_size=size)
        hooks = [HookPoint(i, name) for i in range(3) for name in HOOK_NAMES]
        edits = {HookPoint(1, "resid_pre"): lambda x, positions: x * 1.25}
        prompts = [[256, 5, 9], [256, 70, 71, 72]]
        # One seed per rank: the first rank's draws must count everywhere.
        sampling = Sampling(1.0, 0.9, 4 + rank)
        results = {
            "logits": model(tokens),
            "edited": model(tokens, edits=edits),
            "captured": model.capture(tokens.flatten(), hooks, seq_lens=[30, 30]),
            "unembedding": model.unembedding.clone(),
            "gradient": edit_gradient(model, tokens),
            "greedy": list(generate(model, prompts, max_new_tokens=8)),
            "sampled": list(generate(model, prompts, max_new_tokens=8, sampling=sampling)),
            "n_weights": sum(p.numel() for p in model.parameters()),
        }
        torch.save(results, model_dir / f"result.{rank}.pt")
    dist.destroy_process_group()


def edit_gradient(model, tokens: torch.Tensor) -> torch.Tensor:
    """The gradient of some logits with respect to what an edit adds to the residual stream."""
    delta = torch.zeros(model.args.dim, requires_grad=True)
    edits = {HookPoint(0, "resid_post"): lambda x, positions: x + delta}
    model(tokens, edits=edits)[..., 5].sum().backward()
    assert delta.grad is not None
    return delta.grad


def measure_load(result_path: Path, warm_up: Path, model_dirs: list[Path]) -> None:
    """Write [growth of the peak resident memory, size of the model], in bytes, per directory."""

    def high_water() -> int:
        status = Path("/proc/self/status").read_text()
        return 1024 * int(re.findall(r"VmHWM:\s+(\d+)", status)[0])

    torch.set_num_threads(1)
    load_llama(warm_up, device=CPU, dtype=torch.float32)  # what the interpreter itself needs
    results = []
    for model_dir in model_dirs:
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
        before = high_water()
        model, _ = load_llama(model_dir, device=CPU, dtype=torch.float32)
        results.append([high_water() - before, sum(p.nbytes for p in model.parameters())])
        del model
    result_path.write_text(json.dumps(results))
