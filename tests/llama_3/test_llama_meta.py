"""Against Meta's own PyTorch code, the package llama-models."""

import fairscale.nn.model_parallel.initialize as model_parallel
import pytest
import torch
import torch.distributed as dist
from llama_models.llama3.args import ModelArgs
from llama_models.llama3.model import Transformer

from llama_3 import HOOK_NAMES, HookPoint, generate, load_llama
from tests.support.llama_reference import meta_params, meta_weights, reference, write_meta


@pytest.fixture(scope="module", autouse=True)
def process_group(tmp_path_factory):
    """Meta's layers need a group even for one process."""
    rendezvous = tmp_path_factory.mktemp("group") / "rendezvous"
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=0, world_size=1)
    model_parallel.initialize_model_parallel(1)
    yield
    model_parallel.destroy_model_parallel()
    dist.destroy_process_group()


VARIANTS = {
    "llama-3": {},
    "llama-3.1": {},
    "llama-3.1 grouped": {"num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 6},
}


@pytest.fixture(scope="module", params=VARIANTS)
def pair(request, tmp_path_factory):
    """Meta's model and ours, with the same weights; Meta's knows the factor 8 only."""
    theirs = reference(request.param.split()[0], **VARIANTS[request.param])
    model_dir = write_meta(theirs, tmp_path_factory.mktemp("model"))
    ours, _ = load_llama(model_dir, device=torch.device("cpu"), dtype=torch.float32)
    metas = Transformer(ModelArgs(**meta_params(theirs), max_batch_size=4, max_seq_len=640))
    missing, unexpected = metas.load_state_dict(meta_weights(theirs))
    assert not missing and not unexpected
    return metas, ours


def test_logits_agree(pair):
    metas, ours = pair
    tokens = torch.randint(0, 264, (2, 600), generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(ours(tokens), metas(tokens, 0), rtol=1e-4, atol=1e-4)


def test_every_hook_point_agrees(pair):
    metas, ours = pair
    tokens = torch.randint(0, 264, (2, 50), generator=torch.Generator().manual_seed(1))
    found, handles = {}, []
    for i, layer in enumerate(metas.layers):
        modules = (layer, layer.attention_norm, layer.attention, layer.feed_forward, layer)
        for name, module in zip(HOOK_NAMES, modules, strict=True):

            def keep(module, args, output, hook=HookPoint(i, name)):  # noqa: B008
                found[hook] = args[0] if hook.name == "resid_pre" else output

            handles.append(module.register_forward_hook(keep))
    metas(tokens, 0)
    for handle in handles:
        handle.remove()
    for hook, x in ours.capture(tokens, list(found)).items():
        torch.testing.assert_close(x, found[hook], rtol=1e-4, atol=1e-4)


def test_greedy_generation_agrees(pair):
    metas, ours = pair
    prompt = [256, 40, 41, 42]
    logits, expected = metas(torch.tensor([prompt]), 0), []
    for step in range(12):
        expected.append(int(logits[0, -1].argmax()))
        logits = metas(torch.tensor([[expected[-1]]]), len(prompt) + step)
    assert [i for (i,) in generate(ours, [prompt], max_new_tokens=12)] == expected
