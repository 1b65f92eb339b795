"""One rank of the tensor-parallel test: llama_parallel_worker.py RANK SIZE INIT_FILE DIR..."""

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from fairscale.nn.model_parallel.initialize import initialize_model_parallel

from llama_3 import HOOK_NAMES, HookPoint, Sampling, generate, load_llama


def main(rank: int, size: int, init_file: str, *model_dirs: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{init_file}", rank=rank, world_size=size)
    initialize_model_parallel(size)
    tokens = torch.arange(2 * 30).view(2, 30) % 250
    for model_dir in map(Path, model_dirs):
        model, _ = load_llama(
            model_dir,
            device=torch.device("cpu"),
            dtype=torch.float32,
            model_parallel_size=size,
        )
        hooks = [HookPoint(i, name) for i in range(3) for name in HOOK_NAMES]
        edits = {HookPoint(1, "resid_pre"): lambda x, positions: x * 1.25}
        prompts = [[256, 5, 9], [256, 70, 71, 72]]
        results = {
            "logits": model(tokens),
            "edited": model(tokens, edits=edits),
            "captured": model.capture(tokens.flatten(), hooks, seq_lens=[30, 30]),
            "unembedding": model.unembedding.clone(),
            "greedy": list(generate(model, prompts, max_new_tokens=8)),
            "sampled": list(
                generate(model, prompts, max_new_tokens=8, sampling=Sampling(1.0, 0.9, 4))
            ),
            "n_weights": sum(p.numel() for p in model.parameters()),
        }
        torch.save(results, model_dir / f"result.{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), *sys.argv[3:])
