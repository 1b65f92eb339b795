"""Llama 3, 3.1 and 3.2: checkpoints, tokenizer, forward pass with hook points, generation.

    model, tokenizer = load_llama(model_dir, device=torch.device("cpu"), dtype=torch.float32)
    tokens = torch.tensor([tokenizer.encode("Senior diplomats met", bos=True)])
    logits = model(tokens)                              # float32 (batch, seq, vocab)

    hook = HookPoint(layer=9, name="resid_pre")         # layers are 0-based
    resid = model.capture(tokens, [hook])[hook]         # (batch, seq, d_model), stops at block 9
    packed = model.capture(tokens_1d, [hook], seq_lens=[5, 7])      # {hook: (12, d_model)}

    edits = {hook: lambda x, positions: x * 1.0}        # everything downstream sees the result
    for ids in generate(model, [prompt_ids], max_new_tokens=20, edits=edits):
        ...                                             # one id per prompt; None once it stopped

Hook points of block L: `resid_pre` and `resid_post`, the residual stream entering and leaving it;
`attn_norm`, the normalised input of its attention; `attn_out` and `mlp_out`, what attention and MLP
add to the residual. Directories may be Meta's (`params.json`, `consolidated.*.pth`) or Hugging
Face's (`config.json`, `*.safetensors`). Weights need no gradient, but an edit may carry its own.
"""

from llama_3.args import CheckpointError, LlamaArgs, load_args
from llama_3.checkpoint import load_llama
from llama_3.generation import Sampling, generate
from llama_3.model import HOOK_NAMES, Edit, HookPoint, Llama
from llama_3.tokenizer import Tokenizer, load_tokenizer

__all__ = ["HOOK_NAMES", "CheckpointError", "Edit", "HookPoint", "Llama", "LlamaArgs", "Sampling"]
__all__ += ["Tokenizer", "generate", "load_args", "load_llama", "load_tokenizer"]
