"""Steering: the edit against a dense float64 formula, neutrality, measurements."""

import json
import os
import runpy
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llama_3 import HookPoint, generate, load_llama
from sae import BLOCK_ELEMENTS
from saint.stage.errors import UserError
from saint.steering.completions import (
    complete_pairs,
    generate_ids,
    read,
    read_rows,
    request_edits,
    rows_from,
    stream_pairs,
)
from saint.steering.dose import (
    SWEEP_SEEDS,
    DosePoint,
    DoseReport,
    dose_request,
    propose,
    sweep,
)
from saint.steering.settings import Limits, Request, Setting, parse_setting, request_from_json
from saint.steering.studio import build_edits
from saint.steering.texts import distinct_pairs
from tests.support.tiny_steering import (
    D_MODEL,
    N_LATENTS,
    make_sae,
    make_studio,
    one_thread,
    write_setup,
)

ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1"}
REPOSITORY = Path(__file__).parents[2]
PROMPT = "Senior diplomats met to discuss"


@pytest.fixture(scope="module", autouse=True)
def threads():
    with one_thread():
        yield


@pytest.fixture(scope="module")
def setup(tmp_path_factory):
    return write_setup(tmp_path_factory.mktemp("steering"))


@pytest.fixture(scope="module")
def studio(setup):
    return make_studio(setup[0])[0]


def dense_edit(sae, units, chosen, x):
    """Section 3 of Gao et al. and the steering formula, naively, in float64, token by token."""
    x = x.double()
    z = (x - x.mean(-1, keepdim=True)) / (x.std(-1, keepdim=True) + sae.config.norm_eps)
    hidden = (z - sae.b_pre.double()) @ sae.W_enc.double().T + sae.b_enc.double()
    result = x.clone()
    for row in range(x.shape[0]):
        kept = sorted(range(N_LATENTS), key=lambda i: -hidden[row, i])[: sae.config.k]
        active = {i: max(0.0, float(hidden[row, i])) for i in kept}
        for setting in chosen:
            a, unit = active.get(setting.latent, 0.0), float(units[setting.latent])
            target = {
                "add": a + setting.strength * unit,
                "set": setting.strength * unit,
                "scale": setting.strength * a,
                "ablate": 0.0,
            }[setting.mode]
            scale = x[row].std() + sae.config.norm_eps
            result[row] += scale * (target - a) * sae.W_dec[setting.latent].double()
    return result


def active_latents(studio, n):
    """Latents that fire on the prompt, so that scale and ablate have something to do."""
    ids = torch.tensor([studio.encode(PROMPT, chat=False)])
    dictionary = studio.dictionaries[0]
    x = studio.model.capture(ids, [dictionary.hook])[dictionary.hook][0, 1:]
    z = (x - x.mean(-1, keepdim=True)) / (x.std(-1, keepdim=True) + 1e-6)
    active = dictionary.sae.encode(z)
    counts = torch.bincount(active.indices[active.values > 0], minlength=N_LATENTS)
    return counts.argsort(descending=True)[:n].tolist()


@pytest.mark.parametrize("mode", ["add", "set", "scale", "ablate", "mixed"])
def test_edit_matches_the_dense_float64_formula(studio, mode):
    first, second, third, fourth = active_latents(studio, 4)
    if mode == "mixed":
        chosen = [
            Setting(first, "add", -0.7), Setting(second, "set", 1.2),
            Setting(third, "scale", 2.5), Setting(fourth, "ablate"),
        ]  # fmt: skip
    else:
        chosen = [Setting(first, mode, 1.3), Setting(second, mode, 0.4)]
    record = {}
    edits = build_edits(studio, chosen, where="both", prompt_lengths=[99], record=record)
    ids = torch.tensor([studio.encode(PROMPT, chat=False)])
    studio.model.capture(ids, set(edits), edits=edits)
    before, after, edited = (t[0] for t in record[studio.dictionaries[0].hook])
    dictionary = studio.dictionaries[0]
    expected = dense_edit(dictionary.sae, dictionary.units, chosen, before)
    assert (expected[1:] - before[1:]).norm(dim=-1).max() > 0.1
    torch.testing.assert_close(after[1:].double(), expected[1:], rtol=1e-5, atol=1e-5)
    assert torch.equal(after[0], before[0]) and edited.tolist() == [False] + [True] * (
        len(after) - 1
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("text", ["add:0", "scale:1", "nothing"])
def test_neutral_settings_are_bit_identical(setup, text, dtype):
    studio = make_studio(setup[0], make_sae(), make_sae(layer=2, seed=5))[0]
    model, _ = load_llama(setup[0], device=torch.device("cpu"), dtype=dtype)
    studio = replace(studio, model=model)
    neutral = () if text == "nothing" else tuple(
        parse_setting(f"{sae}:{latent}={text}") for sae in (0, 1) for latent in (3, 5)
    )  # fmt: skip
    edits = build_edits(studio, neutral, where="both", prompt_lengths=[99])
    ids = torch.tensor([studio.encode(PROMPT, chat=False)])
    assert torch.equal(model(ids), model(ids, edits=edits))
    prompts = (PROMPT, "the court", PROMPT)
    request = Request(prompts, neutral, max_new_tokens=12, temperature=1.0, seed=3)
    pair, *others = complete_pairs(studio, request)
    assert all(other.plain.ids == other.steered.ids for other in others)
    assert pair.plain == pair.steered


@pytest.mark.parametrize("where", ["both", "prompt", "generated"])
def test_where_chooses_positions_and_bos_and_padding_stay(studio, where):
    edits = build_edits(studio, (Setting(3, "add", 2.0),), where=where, prompt_lengths=[3, 4])
    (edit,) = edits.values()
    positions = torch.tensor([[0, 1, 2, 3, 4], [0, 1, 2, 3, -1]])
    x = torch.randn(2, 5, D_MODEL, generator=torch.Generator().manual_seed(0))
    changed = (edit(x, positions) != x).any(-1).tolist()
    prompt = [[0, 1, 1, 0, 0], [0, 1, 1, 1, 0]]
    new = [[0, 0, 0, 1, 1], [0, 0, 0, 0, 0]]
    both = [[a or b for a, b in zip(*rows, strict=True)] for rows in zip(prompt, new, strict=True)]
    expected = {"prompt": prompt, "generated": new, "both": both}[where]
    assert changed == [[bool(v) for v in row] for row in expected]


def test_without_bos_the_first_token_is_edited(setup):
    studio = make_studio(setup[0], make_sae(bos=False))[0]
    ids = studio.encode(PROMPT, chat=False)
    assert ids[0] != studio.tokenizer.bos_id
    (edit,) = build_edits(
        studio, (Setting(3, "add", 2.0),), where="both", prompt_lengths=[9]
    ).values()
    x = torch.randn(1, 2, D_MODEL)
    assert bool((edit(x, torch.tensor([[0, 1]])) != x).any(-1).all())


def test_generation_edits_with_the_cache_as_one_long_forward_does(studio):
    """Greedy steered text, step by step, equals the arg-max of full steered forward passes."""
    for where in ("both", "generated", "prompt"):
        prompts = [studio.encode(text, chat=False) for text in (PROMPT, "nuclear court")]
        lengths = [len(p) for p in prompts]
        chosen = (Setting(3, "add", 1.5), Setting(5, "set", 1.0))
        edits = build_edits(studio, chosen, where=where, prompt_lengths=lengths)
        steps = list(generate_ids(studio, prompts, Request((), max_new_tokens=8), edits))
        for row, prompt in enumerate(prompts):
            alone = build_edits(studio, chosen, where=where, prompt_lengths=[len(prompt)])
            ids = list(prompt)
            for step in steps:
                logits = studio.model(torch.tensor([ids]), edits=alone)[0, -1]
                assert int(logits.argmax()) == step[row]
                ids.append(step[row])


def test_saes_at_one_hook_read_the_same_activation(setup):
    one, two = make_sae(seed=0), make_sae(seed=7)
    studio = make_studio(setup[0], one, two)[0]
    x = torch.randn(1, 6, D_MODEL)
    positions = torch.arange(6)[None]
    chosen = [Setting(3, "set", 1.5, sae=0), Setting(8, "set", 1.5, sae=1)]

    def shift(wanted):
        (edit,) = build_edits(studio, wanted, where="both", prompt_lengths=[9]).values()
        return edit(x, positions) - x

    assert torch.allclose(shift(chosen), shift(chosen[:1]) + shift(chosen[1:]), atol=1e-5)


def test_saes_on_several_layers_reach_their_own_layers(setup):
    studio = make_studio(setup[0], make_sae(layer=1), make_sae(layer=2, hook_point="mlp_out"))[0]
    edits = build_edits(
        studio, [Setting(3), Setting(3, sae=1)], where="both", prompt_lengths=[9]
    )  # fmt: skip
    assert set(edits) == {HookPoint(1, "resid_pre"), HookPoint(2, "mlp_out")}
    pair = complete_pairs(
        studio, Request((PROMPT,), (Setting(3), Setting(3, sae=1)), max_new_tokens=4)
    )[0]
    assert len(pair.effects) == 2 and all(e.realised is not None for e in pair.effects)


def test_reading_and_effects_match_a_dense_recomputation(studio):
    latent = active_latents(studio, 1)[0]
    setting = Setting(latent, "set", 1.1)
    pair = complete_pairs(studio, Request((PROMPT,), (setting,), max_new_tokens=6))[0]
    ids = studio.encode(PROMPT + pair.steered.text, chat=False)
    prompt = studio.encode(PROMPT, chat=False)
    ids = prompt + _generated(studio, prompt, (setting,), 6)
    logprobs = studio.model(torch.tensor([ids]))[0].double().log_softmax(-1)
    expected = [-float(logprobs[i, ids[i + 1]]) for i in range(len(ids) - 1)]
    assert pair.steered.surprise == pytest.approx(expected, abs=1e-4)
    assert pair.steered.mean_surprise == pytest.approx(sum(expected[-6:]) / 6, abs=1e-4)
    effect = pair.effects[0]
    assert effect.target == pytest.approx(1.1)
    dictionary = studio.dictionaries[0]
    hook, unit = dictionary.hook, float(dictionary.units[latent])
    before = studio.model.capture(torch.tensor([ids]), [hook])[hook][0, 1:].double()
    after = dense_edit(dictionary.sae, dictionary.units, [setting], before)
    share = ((after - before).norm(dim=-1) / before.norm(dim=-1)).mean()
    assert effect.share == pytest.approx(float(share), rel=1e-4)
    realised = _dense_activation(dictionary.sae, after, latent) / unit
    assert effect.realised == pytest.approx(float(realised.mean()), rel=1e-4)
    assert effect.realised != pytest.approx(effect.target, rel=1e-3)


def _generated(studio, prompt, chosen, n):
    edits = build_edits(studio, chosen, where="both", prompt_lengths=[len(prompt)])
    return [step[0] for step in generate(studio.model, [prompt], max_new_tokens=n, edits=edits)]


def _dense_activation(sae, x, latent):
    z = (x - x.mean(-1, keepdim=True)) / (x.std(-1, keepdim=True) + 1e-6)
    hidden = (z - sae.b_pre.double()) @ sae.W_enc.double().T + sae.b_enc.double()
    threshold = hidden.sort(-1, descending=True).values[:, sae.config.k - 1]
    return torch.where(hidden[:, latent] >= threshold, hidden[:, latent].clamp(min=0), 0.0)


def test_the_same_request_gives_the_same_pair_and_rows_do_not_mix(studio):
    request = Request((PROMPT, "the court"), (Setting(3),), max_new_tokens=9, seed=5)
    request = replace(request, temperature=1.2, top_p=0.9)
    first, again = complete_pairs(studio, request), complete_pairs(studio, request)
    assert first == again
    alone = complete_pairs(studio, replace(request, prompts=("the court",)))
    assert alone[0].steered.text == first[1].steered.text
    other = complete_pairs(studio, replace(request, seed=6))
    assert other[0].plain.text != first[0].plain.text


@pytest.mark.parametrize("temperature", [0.0, 1.1])
def test_a_pair_as_one_batch_is_what_its_halves_are_apart(studio, temperature):
    """The same tokens; and logits that differ by rounding alone, as products of other shapes do."""
    prompts, wish = (PROMPT, "the court", "nuclear treaty and"), (Setting(3, "add", 2.0),)
    request = Request(prompts, wish, max_new_tokens=12, seed=4)
    request = replace(request, temperature=temperature, top_p=0.95)
    ids = studio.encode_prompts(request)
    edits = request_edits(studio, request, [len(row) for row in ids])
    apart = []
    for way in (None, edits):
        steps = list(generate_ids(studio, ids, request, way))
        new = zip(*steps, strict=True)
        rows = [[i for i in row if i is not None] for row in new]
        apart.append([[*prompt, *row] for prompt, row in zip(ids, rows, strict=True)])
    pairs = complete_pairs(studio, request)
    assert [pair.plain.ids for pair in pairs] == apart[0]
    assert [pair.steered.ids for pair in pairs] == apart[1] and apart[0] != apart[1]
    tokens = torch.tensor([ids[0]])
    both = studio.model(tokens.expand(2, -1), edits=rows_from(1, edits))
    for row, way in zip(both, (None, edits), strict=True):
        torch.testing.assert_close(row, studio.model(tokens, edits=way)[0], atol=1e-5, rtol=1e-5)


def test_rows_read_together_are_rows_read_alone(studio):
    rows = [studio.encode(text, chat=False) for text in (PROMPT, "the court", "a")]
    together = read_rows(studio, rows, [2, 3, 1], (Setting(3),))
    for row, n_prompt, found in zip(rows, (2, 3, 1), together, strict=True):
        alone = read(studio, row, n_prompt=n_prompt, settings=(Setting(3),))
        assert found.tokens == alone.tokens and found.n_prompt == alone.n_prompt
        assert found.surprise == pytest.approx(alone.surprise, abs=1e-4)
        assert np.allclose(found.activations, alone.activations, atol=1e-4)


def test_streamed_texts_end_as_the_result(studio):
    request = Request((PROMPT,), (Setting(3),), max_new_tokens=7)
    updates = list(stream_pairs(studio, request))
    assert len(updates) >= 8
    plain = [update.texts[0][0] for update in updates]
    assert all(b.startswith(a) for a, b in zip(plain[:-2], plain[1:-1], strict=True))
    (pair,) = updates[-1].pairs or []
    assert updates[-1].texts[0] == (pair.plain.text, pair.steered.text)


def test_chat_uses_the_models_format(studio):
    ids = studio.encode("hello", chat=True)
    assert studio.tokenizer.decode(ids).startswith("<|im_start|>user\nhello<|im_end|>")
    pair = complete_pairs(studio, Request(("hello",), (Setting(3),), max_new_tokens=3, chat=True))[
        0
    ]
    assert pair.plain.surprise[0] is None and pair.plain.n_prompt == len(ids)


@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 70000),
    st.sampled_from(["add", "set", "scale"]),
    st.floats(-1000, 1000, allow_nan=False),
    st.integers(0, 9),
)
def test_settings_survive_being_written(latent, mode, strength, sae):
    setting = Setting(latent, mode, strength, sae)
    assert parse_setting(str(setting)) == setting


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("896=+1.5", Setting(896, "add", 1.5)),
        ("896=-1.5", Setting(896, "add", -1.5)),
        ("896=1.5", Setting(896, "set", 1.5)),
        ("896=*2", Setting(896, "scale", 2.0)),
        ("896=x0.5", Setting(896, "scale", 0.5)),
        ("1:896=off", Setting(896, "ablate", 0.0, 1)),
        ("896=set:-1", Setting(896, "set", -1.0)),
    ],
)  # fmt: skip
def test_terminal_notation(text, expected):
    assert parse_setting(text) == expected


@pytest.mark.parametrize(
    "text",
    ["", "896", "x=1", "896=", "896=nan", "896=+inf", "896=1e9", "896=push:1", "-1=+1", "8" * 99],
)
def test_bad_notation_is_one_clear_error(text):
    with pytest.raises(UserError, match="setting"):
        parse_setting(text)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompts": ()}, "prompt"),
        ({"prompts": ("",)}, "empty"),
        ({"prompts": ("a",) * 9}, "at most 8"),
        ({"prompts": ("a" * 4001,)}, "characters"),
        ({"max_new_tokens": 0}, "at least 1"),
        ({"max_new_tokens": 257}, "at most 256"),
        ({"where": "here"}, "expected one of"),
        ({"temperature": -1.0}, "temperature"),
        ({"top_p": 0.0}, "top-p"),
        ({"seed": -1}, "seed"),
        ({"settings": (Setting(64),)}, "0 to 63"),
        ({"settings": (Setting(3, sae=1),)}, "SAE 1"),
        ({"settings": (Setting(3), Setting(3))}, "twice"),
        ({"settings": tuple(map(Setting, range(33)))}, "33 steered latents: at most 32"),
        ({"prompts": ("word " * 130,), "max_new_tokens": 256}, "context"),
        ({"prompts": ("word " * 20,) * 8, "max_new_tokens": 256}, "tokens: at most 2560"),
    ],
)
def test_bad_requests_are_refused_before_any_work(studio, changes, message):
    request = replace(Request((PROMPT,), (Setting(3),)), **changes)
    with pytest.raises(UserError, match=message):
        next(stream_pairs(studio, request))


def test_requests_survive_json_and_bad_json_is_named():
    request = Request(("a", "b"), (Setting(3, "scale", 0.1),), "prompt", 7, 0.3, 0.9, 11, True)
    assert request_from_json(json.loads(json.dumps(request.to_json()))) == request
    for record, name in (
        ([], "object"), ({"prompts": "a"}, "prompts"), ({"steer": [3]}, "steer"),
        ({"steers": ["3=+1"]}, "unknown setting .steers.; there are prompts, .*steer"),
        ({"seed": 1.5}, "seed"), ({"seed": True}, "seed"), ({"temperature": "1"}, "temperature"),
        ({"top_p": float("nan")}, "top_p"), ({"where": 1}, "where"),
    ):  # fmt: skip
        with pytest.raises(UserError, match=name):
            request_from_json(record)


def test_dose_proposal_stops_at_the_first_break():
    def point(strength, surprise, distinct=1.0):
        return DosePoint(strength, 0.0, surprise, distinct, "")

    fine = [point(0, 3.0), point(1, 3.2), point(2, 3.5)]
    assert propose(fine) == 2
    assert propose([*fine, point(3, 3.6), point(4, 3.1)]) == 2
    assert propose([*fine, point(3, 2.0, distinct=0.5)]) == 2
    assert propose([point(0, 3.0), point(1, 4.0)]) is None
    assert distinct_pairs([1, 2, 1, 2, 1]) == 0.5 and distinct_pairs([4]) == 1.0


@pytest.mark.parametrize(
    ("changes", "n_own", "n_prompts", "n_new"),
    [
        ({}, 1, 4, 24),
        ({"prompts": 2}, 1, 2, 24),
        ({"prompts": 3}, 2, 3, 24),
        ({"new_tokens": 16}, 1, 4, 16),
        # The own prompt has 201 tokens: with another one, 450 are needed.
        ({"tokens": 449}, 1, 1, 24),
        ({"tokens": 450}, 1, 2, 24),
        ({"tokens": 211}, 1, 1, 10),
        ({"tokens": 422}, 2, 2, 10),
    ],
)
def test_sweeps_stay_within_what_one_request_may_ask_for(studio, changes, n_own, n_prompts, n_new):
    long, examples = "the " * 199 + "court", ("the court",) * 4
    small = replace(studio, limits=replace(Limits(), **changes))
    own = Request((long,) * n_own, max_new_tokens=1)
    assert [len(prompt) for prompt in small.encode_prompts(own)] == [201] * n_own
    varied = dose_request(small, own, more=examples)
    assert (len(varied.prompts), varied.max_new_tokens) == (n_prompts, n_new)
    assert varied.prompts == (*own.prompts, *examples)[:n_prompts]
    *_, report = sweep(small, Setting(3), varied, (1.0,))
    assert len(report.points) == 2


def test_sweeps_fit_the_context_and_refuse_what_a_request_may_not_ask(studio):
    own = Request(("the " * 499 + "court",), max_new_tokens=1)
    (prompt,) = studio.encode_prompts(own)
    assert dose_request(studio, own).max_new_tokens == min(24, 512 - len(prompt)) < 24
    for bad, message in (((), "write a prompt"), (("a",) * 9, "9 prompts"), (("",), "empty")):
        with pytest.raises(UserError, match=message):
            dose_request(studio, Request(bad))


def test_sweep_measures_the_text_under_the_plain_model(studio):
    request = dose_request(studio, Request((PROMPT, "the court")), max_new_tokens=8)
    reports = list(sweep(studio, Setting(3, "scale", 2.0), request, (0.5, 2.0)))
    points = reports[-1].points
    assert [p.strength for p in points] == [0.0, 0.5, 2.0] and len(reports) == 3
    # Independently: every prompt with every seed, through the page's own completions.
    seeds = range(request.seed, request.seed + SWEEP_SEEDS)
    wish = (Setting(3, "add", 2.0),)
    pairs = [
        pair
        for seed in seeds
        for pair in complete_pairs(studio, replace(request, seed=seed, settings=wish))
    ]
    read = [(p.steered.mean_surprise, p.plain.mean_surprise) for p in pairs]
    losses = np.array([a - b for a, b in read if a is not None and b is not None])
    concept = [np.mean([a[0] for a in p.steered.activations[p.steered.n_prompt :]]) for p in pairs]
    assert len(pairs) == 2 * SWEEP_SEEDS
    assert points[2].loss == pytest.approx(losses.mean(), abs=1e-5)
    assert points[2].loss_error == pytest.approx(losses.std(ddof=1) / len(pairs) ** 0.5, abs=1e-5)
    assert points[2].concept == pytest.approx(np.mean(concept), abs=1e-5)
    assert points[2].sample == PROMPT + pairs[0].steered.text
    assert (points[0].loss, points[0].loss_error, points[0].rise) == (0.0, 0.0, 0.0)


def test_a_dose_report_knows_its_own_noise():
    def point(strength, loss, loss_error, rise, rise_error):
        return DosePoint(strength, rise, 3 + loss, 1.0, "", loss, loss_error, rise, rise_error)

    first = point(0, 0, 0, 0, 0)
    quiet = [first, point(1, 0.4, 0.1, 0.2, 0.05), point(2, 0.7, 0.1, 0.5, 0.1)]
    report = DoseReport(Setting(3), quiet, propose(quiet, 0.5))
    assert (report.limit, report.proposed, report.shows) == (0.5, 1, True)
    assert "strongest dose" in report.verdict
    # Where three standard errors are wider than half a nat, 0.7 nat is no break yet.
    noisy = [first, point(1, 0.4, 0.3, 0.2, 0.1), point(2, 0.7, 0.3, 0.2, 0.1)]
    limit = DoseReport(Setting(3), noisy, None).limit
    report = DoseReport(Setting(3), noisy, propose(noisy, limit))
    assert limit == pytest.approx(0.9) and report.proposed == 2
    assert not report.shows and "does not show in the text" in report.verdict
    assert report.to_json()["max_loss"] == pytest.approx(0.9)


def test_reading_is_the_plain_models_whatever_was_steered(studio):
    ids = studio.encode(PROMPT, chat=False)
    reading = read(studio, ids, n_prompt=len(ids), settings=(Setting(3),))
    assert "".join(reading.tokens) == PROMPT and len(reading.activations) == len(reading.tokens)


def test_three_billion_parameters_and_a_65k_sae_fit():
    """The benchmark's sum for the demo at its limits, its large parts counted here again."""
    memory = runpy.run_path(str(Path(__file__).parents[2] / "benchmarks" / "memory.py"))
    limits = Limits()
    parts = memory["demo_bytes"](memory["SHAPE"], memory["DICTIONARY"], limits)
    layer = 3072 * 128 * (24 + 8 + 8 + 24) + 3 * 3072 * 8192 + 2 * 3072
    model = 2 * (128256 * 3072 + 28 * layer + 3072)
    sae = 4 * (2 * 65536 * 3072 + 65536 + 3072)
    caches = 2 * (2 * 28 * 8 * 128 * limits.tokens * 2)  # plain and steered; keys and values
    encoder = BLOCK_ELEMENTS * 4
    named = (
        "model (bf16)",
        "SAE (float32)",
        "caches, plain and steered",
        "pre-activations, one block",
    )
    assert [parts[name] for name in named] == [model, sae, caches, encoder]
    residual = 4 * 3072 * limits.tokens
    assert parts["peak"] >= model + sae + caches + encoder + 6 * residual
    assert parts["peak"] >= model + sae + 2 * 128256 * 3072  # the embedding's copy while loading
    assert parts["peak"] + memory["CUDA_CONTEXT"] < 10e9


def test_caches_are_as_large_as_the_limit_counts_and_no_larger(studio, monkeypatch):
    sizes, zeros = [], torch.zeros
    monkeypatch.setattr(
        "llama_3.generation.torch.zeros", lambda *a, **k: sizes.append(a[0]) or zeros(*a, **k)
    )
    request = Request((PROMPT, "the court"), (Setting(3),), max_new_tokens=5)
    longest = max(len(studio.encode(prompt, chat=False)) for prompt in request.prompts)
    tokens = len(request.prompts) * (longest + 5)
    complete_pairs(replace(studio, limits=Limits(tokens=tokens)), request)
    assert [shape[2] * shape[3] for shape in sizes if isinstance(shape, tuple)] == [2 * tokens]
    with pytest.raises(UserError, match=f"are {tokens} tokens: at most {tokens - 1}"):
        complete_pairs(replace(studio, limits=Limits(tokens=tokens - 1)), request)
