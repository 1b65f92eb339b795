import pytest
import torch

from llama_3 import HOOK_NAMES, HookPoint, Sampling, generate, load_llama
from tests.support.llama_reference import reference, write_hugging_face, write_meta
from tests.support.llama_worker import edit_gradient, run_rank
from tests.support.program import fork


@pytest.mark.timeout(240)
def test_two_ranks_equal_one_process(tmp_path):
    """Meta's shards one per rank, more shards than ranks, one file sliced, Hugging Face's."""
    theirs, tied = reference("llama-3.1"), reference("llama-3.2", num_key_value_heads=2)
    model_dirs = [
        write_meta(theirs, tmp_path / "shard-per-rank", n_files=2),
        write_meta(theirs, tmp_path / "one-file"),
        write_meta(reference("llama-3"), tmp_path / "four-files", n_files=4),
        write_hugging_face(tied, tmp_path / "hugging-face-tied"),
    ]
    init_file = str(tmp_path / "rendezvous")
    ranks = [fork(run_rank, rank, 2, init_file, model_dirs) for rank in range(2)]
    for rank in ranks:
        rank.join(200)
        assert rank.exitcode == 0
    tokens = torch.arange(2 * 30).view(2, 30) % 250
    hooks = [HookPoint(i, name) for i in range(3) for name in HOOK_NAMES]
    edits = {HookPoint(1, "resid_pre"): lambda x, positions: x * 1.25}
    prompts, sampling = [[256, 5, 9], [256, 70, 71, 72]], Sampling(1.0, 0.9, 4)
    for model_dir in model_dirs:
        model, _ = load_llama(model_dir, device=torch.device("cpu"), dtype=torch.float32)
        captured = model.capture(tokens.flatten(), hooks, seq_lens=[30, 30])
        n_weights = sum(p.numel() for p in model.parameters())
        for rank in range(2):
            found = torch.load(model_dir / f"result.{rank}.pt", weights_only=False)
            torch.testing.assert_close(found["logits"], model(tokens), rtol=1e-4, atol=1e-4)
            edited = model(tokens, edits=edits)
            torch.testing.assert_close(found["edited"], edited, rtol=1e-4, atol=1e-4)
            for hook in hooks:
                torch.testing.assert_close(
                    found["captured"][hook], captured[hook], rtol=1e-4, atol=1e-4
                )
            assert torch.equal(found["unembedding"], model.unembedding)
            gradient = edit_gradient(model, tokens)
            torch.testing.assert_close(found["gradient"], gradient, rtol=1e-4, atol=1e-4)
            assert found["greedy"] == list(generate(model, prompts, max_new_tokens=8))
            sampled = list(generate(model, prompts, max_new_tokens=8, sampling=sampling))
            assert found["sampled"] == sampled
            assert found["n_weights"] < 0.52 * n_weights
