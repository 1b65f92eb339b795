import pytest
import torch
from torch import Tensor

from llama_3 import HOOK_NAMES, HookPoint, Llama, LlamaArgs, load_llama
from tests.support.llama_reference import (
    N_VOCAB,
    VARIANTS,
    reference,
    reference_activations,
    write_hugging_face,
    write_meta,
)

CPU = torch.device("cpu")
WRITERS = {"meta": write_meta, "hugging-face": write_hugging_face}


@pytest.fixture(scope="module", params=VARIANTS)
def pair(request, tmp_path_factory):
    """transformers' model and ours."""
    theirs = reference(request.param)
    model_dir = write_hugging_face(theirs, tmp_path_factory.mktemp(request.param))
    return theirs, load_llama(model_dir, device=CPU, dtype=torch.float32)[0]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    model_dir = write_meta(reference("llama-3.2"), tmp_path_factory.mktemp("model"))
    return load_llama(model_dir, device=CPU, dtype=torch.float32)[0]


def random_tokens(*shape: int, seed: int = 0) -> Tensor:
    return torch.randint(0, N_VOCAB, shape, generator=torch.Generator().manual_seed(seed))


def all_hooks(model) -> list[HookPoint]:
    return [HookPoint(i, name) for i in range(model.args.n_layers) for name in HOOK_NAMES]


def assert_close(ours: Tensor, theirs: Tensor, tolerance: float = 2e-5) -> None:
    assert ours.shape == theirs.shape
    worst = (ours.double() - theirs.double()).abs().max() / theirs.abs().max()
    assert worst < tolerance, float(worst)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("layout", WRITERS)
def test_logits_agree_with_transformers(variant, layout, tmp_path):
    theirs = reference(variant)
    ours, _ = load_llama(WRITERS[layout](theirs, tmp_path), device=CPU, dtype=torch.float32)
    # Long enough that a wrong scaling of the rotary frequencies shows.
    tokens = random_tokens(2, 600)
    with torch.no_grad():
        expected = theirs(tokens).logits
    logits = ours(tokens)
    assert logits.dtype == torch.float32
    assert_close(logits, expected)
    assert ours.args.tied == theirs.config.tie_word_embeddings


def test_every_hook_point_agrees_with_transformers(pair):
    theirs, ours = pair
    tokens = random_tokens(3, 40)
    expected = reference_activations(theirs, tokens)
    captured = ours.capture(tokens, all_hooks(ours))
    assert set(captured) == set(expected)
    for hook, x in captured.items():
        assert_close(x, expected[hook])


def test_any_grouping_of_heads(tmp_path):
    for n_heads, n_kv_heads in ((3, 3), (6, 3), (8, 2), (12, 1)):
        theirs = reference(
            "llama-3", num_attention_heads=n_heads, num_key_value_heads=n_kv_heads, head_dim=6
        )
        model_dir = write_meta(theirs, tmp_path / f"{n_heads}-{n_kv_heads}")
        ours, _ = load_llama(model_dir, device=CPU, dtype=torch.float32)
        tokens = random_tokens(1, 30)
        with torch.no_grad():
            assert_close(ours(tokens), theirs(tokens).logits)


def test_bfloat16_stays_close_to_float32(tmp_path):
    model_dir = write_meta(reference("llama-3.1"), tmp_path)
    wide, _ = load_llama(model_dir, device=CPU, dtype=torch.float32)
    narrow, _ = load_llama(model_dir, device=CPU, dtype=torch.bfloat16)
    tokens, hook = random_tokens(2, 50), HookPoint(2, "resid_post")
    logits = narrow(tokens)
    assert logits.dtype == torch.float32
    assert narrow.capture(tokens, [hook])[hook].dtype == torch.bfloat16
    assert (logits - wide(tokens)).norm() < 0.05 * logits.norm()


def test_packed_padded_and_alone_agree(model):
    lengths = [1, 7, 40, 7, 16, 17, 33, 2, 100]
    sequences = [random_tokens(n, seed=n + i) for i, n in enumerate(lengths)]
    hooks = all_hooks(model)
    packed = model.capture(torch.cat(sequences), hooks, seq_lens=lengths)
    padded_tokens = torch.nn.utils.rnn.pad_sequence(sequences, batch_first=True)
    padded = model.capture(padded_tokens, hooks)
    logits = model(torch.cat(sequences), seq_lens=lengths)
    start = 0
    for i, (tokens, n) in enumerate(zip(sequences, lengths, strict=True)):
        alone = model.capture(tokens[None], hooks)
        for hook in hooks:
            assert_close(packed[hook][start : start + n], alone[hook][0])
            assert_close(padded[hook][i, :n], alone[hook][0])
        assert_close(logits[start : start + n], model(tokens[None])[0])
        start += n


def test_no_cross_talk_in_a_pack(model):
    hook = HookPoint(2, "resid_post")
    first, second, other = random_tokens(20), random_tokens(12, seed=1), random_tokens(20, seed=2)
    a = model.capture(torch.cat([first, second]), [hook], seq_lens=[20, 12])[hook]
    b = model.capture(torch.cat([other, second]), [hook], seq_lens=[20, 12])[hook]
    assert torch.equal(a[20:], b[20:])
    assert not torch.allclose(a[:20], b[:20])


def test_capture_computes_nothing_after_the_last_hook(model):
    calls = []
    handles = [
        module.register_forward_hook(lambda *_, name=name: calls.append(name))
        for name, module in model.named_modules()
        if not list(module.children())
    ]
    model.capture(random_tokens(1, 4), [HookPoint(1, "attn_norm"), HookPoint(0, "mlp_out")])
    for handle in handles:
        handle.remove()
    assert "layers.0.feed_forward.w2" in calls
    assert calls[-1] == "layers.1.attention_norm"


def test_an_edit_reaches_everything_downstream_and_nothing_else(model):
    tokens, n = random_tokens(2, 9), len(HOOK_NAMES)
    hooks = all_hooks(model)
    plain = model.capture(tokens, hooks)
    for where, name in enumerate(HOOK_NAMES):
        hook = HookPoint(1, name)
        delta = torch.linspace(0.5, 1, model.args.dim)
        edited = model.capture(tokens, hooks, edits={hook: lambda x, at, d=delta: x + d})
        assert_close(edited[hook], plain[hook] + delta, 1e-6)
        for i, other in enumerate(hooks):
            if i < n + where:
                assert torch.equal(edited[other], plain[other])
            elif i > n + where and other != HookPoint(1, "mlp_out"):
                assert not torch.allclose(edited[other], plain[other])
        assert not torch.allclose(model(tokens, edits={hook: lambda x, at, d=delta: x + d}),
                                  model(tokens))  # fmt: skip


@pytest.mark.parametrize("name", HOOK_NAMES)
def test_an_edit_equals_the_same_edit_in_transformers(pair, name):
    theirs, ours = pair
    tokens = random_tokens(2, 11)
    layer = theirs.model.layers[1]
    module = {
        "attn_norm": layer.input_layernorm,
        "attn_out": layer.self_attn,
        "mlp_out": layer.mlp,
        "resid_post": layer,
        "resid_pre": theirs.model.layers[0],
    }[name]

    def change(_module, _args, output):
        if isinstance(output, tuple):
            return (output[0] * 0.5 + 1, *output[1:])
        return output * 0.5 + 1

    handle = module.register_forward_hook(change)
    with torch.no_grad():
        expected = theirs(tokens).logits
    handle.remove()
    edits = {HookPoint(1, name): lambda x, positions: x * 0.5 + 1}
    assert_close(ours(tokens, edits=edits), expected)


def test_an_edit_that_changes_nothing_leaves_the_bits(model):
    tokens = random_tokens(2, 13)
    edits = {hook: lambda x, positions: x for hook in all_hooks(model)}
    assert torch.equal(model(tokens, edits=edits), model(tokens))


def test_edits_are_told_positions(model):
    seen = []

    def note(x, positions):
        assert positions.shape == x.shape[:2]
        seen.append(positions.tolist())
        return x

    edits = {HookPoint(0, "resid_pre"): note}
    model(random_tokens(2, 4), edits=edits)
    model(random_tokens(2, 4), edits=edits, seq_lens=[4, 2])
    model(random_tokens(5), edits=edits, seq_lens=[3, 2])
    assert seen == [
        [[0, 1, 2, 3], [0, 1, 2, 3]],
        [[0, 1, 2, 3], [0, 1, -1, -1]],
        [[0, 1, 2, 0, 1]],
    ]


def test_an_edit_may_carry_a_gradient(model):
    delta = torch.zeros(model.args.dim, requires_grad=True)
    hook = HookPoint(1, "resid_pre")
    for kind in ({}, {"seq_lens": [4, 6]}):
        tokens = random_tokens(10) if kind else random_tokens(1, 10)
        logits = model(tokens, edits={hook: lambda x, positions: x + delta}, **kind)
        (gradient,) = torch.autograd.grad(logits[..., 5].sum(), delta)
        step = 1e-2 * gradient / gradient.norm()
        ends = [
            model(tokens, edits={hook: lambda x, p, d=d: x + d}, **kind)[..., 5].sum()
            for d in (step, -step)
        ]
        slope = float(ends[0] - ends[1]) / float(2 * step.norm())
        assert slope == pytest.approx(float(gradient.norm()), rel=0.02)


def test_unembed_and_unembedding(model):
    tokens, hook = random_tokens(1, 6), HookPoint(2, "resid_post")
    resid = model.capture(tokens, [hook])[hook]
    assert torch.equal(model.unembed(resid), model(tokens))
    assert_close(model.norm(resid) @ model.unembedding.T, model(tokens))


def test_only_the_first_blocks(tmp_path):
    model_dir = write_meta(reference("llama-3"), tmp_path)
    whole, _ = load_llama(model_dir, device=CPU, dtype=torch.float32)
    part, _ = load_llama(model_dir, device=CPU, dtype=torch.float32, n_layers=2)
    tokens, hook = random_tokens(1, 6), HookPoint(1, "resid_post")
    assert torch.equal(part.capture(tokens, [hook])[hook], whole.capture(tokens, [hook])[hook])
    for use in (lambda: part(tokens), lambda: part.unembedding, lambda: part.unembed(tokens)):
        with pytest.raises(ValueError, match="only the first 2 blocks"):
            use()
    with pytest.raises(ValueError, match="no layer 2"):
        part.capture(tokens, [HookPoint(2, "resid_pre")])


def test_wrong_requests_are_refused(model):
    with pytest.raises(ValueError, match="unknown hook point 'resid'"):
        model.capture(random_tokens(1, 3), [HookPoint(0, "resid")])
    with pytest.raises(ValueError, match="no layer 7"):
        model(random_tokens(1, 3), edits={HookPoint(7, "mlp_out"): lambda x, p: x})
    for seq_lens in (None, [2, 2], [3, 0]):
        with pytest.raises(ValueError, match="seq_lens"):
            model.capture(random_tokens(3), [HookPoint(0, "mlp_out")], seq_lens=seq_lens)


def test_a_pass_that_starts_at_a_layer_goes_on_as_the_whole_one(model):
    tokens, seq_lens = random_tokens(12), [5, 7]
    hooks = all_hooks(model)
    whole = model.capture(tokens, hooks, seq_lens=seq_lens)
    for layer in range(model.args.n_layers):
        start = layer, whole[HookPoint(layer, "resid_pre")]
        above = [hook for hook in hooks if hook.layer >= layer]
        found = model.capture(tokens, above, seq_lens=seq_lens, start=start)
        assert all(torch.equal(found[hook], whole[hook]) for hook in above)
    with pytest.raises(ValueError, match="lies below"):
        model.capture(tokens, [hooks[0]], seq_lens=seq_lens, start=(1, whole[hooks[5]]))


def test_packed_sequences_by_torch_s_own_attention_are_as_by_rectangles(monkeypatch):
    """What a GPU does, with a stand-in for the kernel that says what it is to compute."""
    varlen = pytest.importorskip("torch.nn.attention.varlen")
    calls = []

    def stand_in(q, k, v, starts, also, longest, also_longest, *, window_size, enable_gqa):
        assert torch.equal(starts, also) and starts.dtype == torch.int32
        assert (window_size, enable_gqa) == ((-1, 0), True) and longest == also_longest == 7
        calls.append(starts.tolist())
        parts = []
        for first, end in zip(starts, starts[1:], strict=False):
            rows = (x[first:end].transpose(0, 1) for x in (q, k, v))
            how = {"is_causal": True, "enable_gqa": enable_gqa}
            parts.append(torch.nn.functional.scaled_dot_product_attention(*rows, **how))
        return torch.cat([part.transpose(0, 1) for part in parts])

    monkeypatch.setattr(varlen, "varlen_attn", stand_in)
    args = LlamaArgs(32, 2, 4, 2, 8, 48, 50)
    model = Llama(args, device=CPU, dtype=torch.float32)
    for weight in model.parameters():
        torch.nn.init.normal_(weight, std=0.3)
    tokens, lengths = torch.arange(15), [5, 7, 3]
    hook = HookPoint(1, "resid_post")
    assert not model.takes_segments
    with torch.no_grad():
        plain = model.capture(tokens, [hook], seq_lens=lengths)[hook]
        model.takes_segments = True
        segments = model.capture(tokens, [hook], seq_lens=lengths)[hook]
    torch.testing.assert_close(segments, plain, rtol=1e-5, atol=1e-5)
    assert calls == [[0, 5, 12, 15]] * 2
    model.capture(tokens, [hook], seq_lens=lengths)  # gradients: by rectangles
    assert len(calls) == 2
