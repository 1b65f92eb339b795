import pytest
import torch

from llama_3 import HookPoint, Sampling, generate, load_llama
from llama_3.generation import _sample
from tests.support.llama_reference import N_VOCAB, VARIANTS, reference, write_meta

CPU = torch.device("cpu")
PROMPTS = [[256, 5, 9], [256, 70, 71, 72, 73, 74, 75, 76, 77], [256], [256, 1, 2, 3]]


@pytest.fixture(scope="module", params=VARIANTS)
def pair(request, tmp_path_factory):
    theirs = reference(request.param)
    model_dir = write_meta(theirs, tmp_path_factory.mktemp("model"))
    return theirs, load_llama(model_dir, device=CPU, dtype=torch.float32)[0]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    model_dir = write_meta(reference("llama-3.1"), tmp_path_factory.mktemp("model"))
    return load_llama(model_dir, device=CPU, dtype=torch.float32)[0]


def rows(steps) -> list[list[int]]:
    """Ids per prompt, up to where each stopped."""
    return [[i for i in row if i is not None] for row in zip(*steps, strict=True)]


def test_greedy_equals_transformers(pair):
    theirs, ours = pair
    found = rows(generate(ours, PROMPTS, max_new_tokens=12))
    for prompt, ids in zip(PROMPTS, found, strict=True):
        expected = theirs.generate(
            torch.tensor([prompt]), max_new_tokens=12, do_sample=False, eos_token_id=None
        )[0]
        assert [*prompt, *ids] == expected.tolist()


def test_greedy_equals_running_the_whole_text_again(model):
    found = rows(generate(model, PROMPTS, max_new_tokens=8))
    for prompt, ids in zip(PROMPTS, found, strict=True):
        text = list(prompt)
        for i in ids:
            assert int(model(torch.tensor([text]))[0, -1].argmax()) == i
            text.append(i)


@pytest.mark.parametrize("sampling", [Sampling(1.0, 1.0, 7), Sampling(0.7, 0.8, 3)])
def test_a_row_of_a_batch_equals_the_row_alone(model, sampling):
    together = rows(generate(model, PROMPTS, max_new_tokens=15, sampling=sampling))
    for prompt, ids in zip(PROMPTS, together, strict=True):
        alone = rows(generate(model, [prompt], max_new_tokens=15, sampling=sampling))[0]
        assert alone == ids


def test_the_seed_decides_and_the_global_state_does_not(model):
    def run(seed):
        return rows(generate(model, PROMPTS, max_new_tokens=12, sampling=Sampling(1.0, 1.0, seed)))

    torch.manual_seed(0)
    first, state = run(5), torch.get_rng_state()
    torch.manual_seed(1)
    assert run(5) == first
    assert run(6) != first
    torch.manual_seed(0)
    assert torch.equal(torch.get_rng_state(), state)


def test_sampling_follows_the_probabilities(model):
    """One step from many seeds: frequencies against the model's own distribution."""
    n, logits = 3000, model(torch.tensor([[256, 40, 41]]))[0, -1]
    probs = torch.softmax(logits / 1.5, -1)
    kept = probs.sort(descending=True)
    nucleus = set(kept.indices[: int((kept.values.cumsum(-1) < 0.5).sum()) + 1].tolist())
    generators = [torch.Generator().manual_seed(seed) for seed in range(n)]
    ids = _sample(logits.expand(n, -1), Sampling(1.5, 0.5), generators)
    counts = torch.bincount(ids[:, 0], minlength=N_VOCAB).float()
    assert set(counts.nonzero()[:, 0].tolist()) == nucleus
    expected = torch.zeros(N_VOCAB)
    for i in nucleus:
        expected[i] = probs[i]
    expected *= n / expected.sum()
    chi_square = ((counts - expected).square()[expected > 0] / expected[expected > 0]).sum()
    assert chi_square < 2.5 * len(nucleus) + 10


def test_stop_ids_end_rows_one_by_one(model):
    plain = rows(generate(model, PROMPTS, max_new_tokens=12))
    stop = plain[1][4]
    steps = list(generate(model, PROMPTS, max_new_tokens=12, stop_ids={stop}))
    for row, ids in zip(plain, rows(steps), strict=True):
        assert ids == (row[: row.index(stop)] if stop in row else row)
    assert steps[5][1] is None
    first = {row[0] for row in plain}
    assert list(generate(model, PROMPTS, max_new_tokens=12, stop_ids=first)) == []


def test_streaming_and_cancel(model):
    calls = []
    edits = {HookPoint(0, "resid_pre"): lambda x, positions: calls.append(x.shape) or x}
    stream = generate(model, PROMPTS[:1], max_new_tokens=1000, edits=edits)
    next(stream)
    assert len(calls) == 1 and calls[0][1] == 3
    next(stream)
    assert len(calls) == 2 and calls[1][1] == 1
    stream.close()
    with pytest.raises(StopIteration):
        next(stream)
    assert len(calls) == 2
    assert torch.is_grad_enabled()


def test_edits_see_each_rows_positions(model):
    seen = []

    def note(x, positions):
        seen.append(positions.tolist())
        return x

    edits = {HookPoint(1, "resid_pre"): note}
    list(generate(model, [[256, 1], [256, 1, 2, 3]], max_new_tokens=3, edits=edits))
    assert seen == [[[0, 1, -1, -1], [0, 1, 2, 3]], [[2], [4]], [[3], [5]]]


def test_edited_generation_equals_edited_forward_passes(model):
    hook = HookPoint(1, "resid_pre")
    delta = torch.linspace(-2, 2, model.args.dim)

    def add(x, positions):
        return torch.where((positions > 0)[..., None], x + delta, x)

    found = rows(generate(model, PROMPTS, max_new_tokens=6, edits={hook: add}))
    assert found != rows(generate(model, PROMPTS, max_new_tokens=6))
    for prompt, ids in zip(PROMPTS, found, strict=True):
        text = list(prompt)
        for i in ids:
            logits = model(torch.tensor([text]), edits={hook: add})
            assert int(logits[0, -1].argmax()) == i
            text.append(i)


def test_bad_requests(model):
    for prompts in ([], [[256], []]):
        with pytest.raises(ValueError, match="at least one token"):
            next(generate(model, prompts, max_new_tokens=3))
    with pytest.raises(ValueError, match="context"):
        next(generate(model, [[256] * 10], max_new_tokens=model.args.max_seq_len))
    for temperature, top_p in ((-1.0, 1.0), (1.0, 0.0), (1.0, 1.5)):
        with pytest.raises(ValueError, match="temperature"):
            Sampling(temperature, top_p)
