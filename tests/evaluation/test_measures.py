"""What is measured of an SAE, each against a computation that takes one token at a time."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from llama_3 import HookPoint, load_llama
from saint.capture.packing import pack
from saint.evaluation.decoder import clusters, geometry, nearest_cosines
from saint.evaluation.faithfulness import (
    LOSSES,
    Subject,
    Sums,
    capture_to_hook,
    cross_entropies,
    next_token_losses,
)
from saint.evaluation.tokens import by_norm, by_position, excerpts
from tests.support.tiny_steering import make_sae, write_model

SENTENCES = [[70, 71, 72, 73, 74], [80, 81], [90, 91, 92, 93, 94, 95, 96], [75]]


@pytest.fixture(scope="module")
def model_and_tokenizer(tmp_path_factory):
    model_dir = write_model(tmp_path_factory.mktemp("model"))
    return load_llama(model_dir, device=torch.device("cpu"), dtype=torch.float32)


def make_subject(model_and_tokenizer, hook_point: str) -> Subject:
    sae = make_sae(layer=1, hook_point=hook_point)
    model, tokenizer = model_and_tokenizer
    hook = HookPoint(1, hook_point)
    return Subject(model, tokenizer, sae, hook, batch_tokens=16, seed=0)


def make_packs(subject: Subject):
    return [pack(part, bos=subject.bos()) for part in (SENTENCES[:2], SENTENCES[2:])]


@pytest.mark.parametrize("hook_point", ["resid_pre", "mlp_out", "resid_post"])
@torch.no_grad()
def test_losses_are_those_of_whole_passes_one_sentence_at_a_time(model_and_tokenizer, hook_point):
    subject = make_subject(model_and_tokenizer, hook_point)
    model, sae, hook = subject.model, subject.sae, subject.hook
    packs = make_packs(subject)
    captured = capture_to_hook(subject, packs)
    found = next_token_losses(subject, packs, captured)

    whole = [torch.tensor([[*subject.bos(), *tokens]]) for tokens in SENTENCES]
    raw = [model.capture(tokens, [hook])[hook][0, 1:] for tokens in whole]
    mean = torch.cat(raw).mean(0)
    torch.testing.assert_close(captured.mean, mean)
    new = {
        "clean": lambda x: x,
        "sae": sae.reconstruct,
        "mean_ablated": lambda x: mean.expand_as(x),
        "zero_ablated": torch.zeros_like,
    }
    n_checked, first, divergences = 0, 0, []
    for tokens in whole:
        n, logs = tokens.shape[1] - 1, {}
        for name in LOSSES:

            def edit(x, positions, name=name):
                return torch.cat([x[:, :1], new[name](x[:, 1:])], dim=1)

            logs[name] = model(tokens, edits={hook: edit})[0].log_softmax(-1)
            for i in range(n - 1):
                expected = -float(logs[name][i + 1, tokens[0, i + 2]])
                value = float(found[f"loss_{name}"][first + i])
                assert value == pytest.approx(expected, rel=1e-3, abs=1e-4)
                n_checked += 1
            assert found[f"loss_{name}"][first + n - 1].isnan()
        clean, changed = logs["clean"][1:n], logs["sae"][1:n]
        divergences += (clean.exp() * (clean - changed)).sum(-1).tolist()
        first += n
    assert n_checked == 4 * (4 + 1 + 6)
    means = cross_entropies(found)
    assert means["kl_divergence"] == pytest.approx(np.mean(divergences), rel=1e-3)
    gap = means["ce_zero_ablated"] - means["ce_clean"]
    expected = (means["ce_zero_ablated"] - means["ce_sae"]) / gap
    assert means["loss_recovered_zero"] == pytest.approx(expected)


@torch.no_grad()
def test_tokens_know_their_sentence_place_norm_error_and_active_latents(model_and_tokenizer):
    subject = make_subject(model_and_tokenizer, "resid_pre")
    captured = capture_to_hook(subject, make_packs(subject))
    table, sae, row = captured.tokens, subject.sae, 0
    fired = torch.zeros(sae.config.n_latents)
    for number, tokens in enumerate(SENTENCES):
        whole = torch.tensor([[*subject.bos(), *tokens]])
        raw = subject.model.capture(whole, [subject.hook])[subject.hook][0, 1:]
        for position, token in enumerate(tokens):
            x = sae.normalise(raw[position : position + 1])[0]
            active = sae.encode(x)
            error = (sae.decode(active) - x).norm() / x.norm()
            fired[active.indices[active.values > 0]] += 1
            known = {name: float(column[row]) for name, column in table.items()}
            assert (known["sentence"], known["position"]) == (number, position)
            assert known["token_id"] == token
            assert known["norm"] == pytest.approx(float(raw[position].norm()), rel=1e-4)
            assert known["relative_error"] == pytest.approx(float(error) ** 2, rel=1e-3)
            assert known["n_active"] == int((active.values > 0).sum())
            row += 1
    assert row == len(table["norm"])
    torch.testing.assert_close(captured.density, fired / row)


def test_measures_of_reconstruction_are_their_formulas():
    generator = torch.Generator().manual_seed(0)
    x, noise = torch.randn(50, 6, generator=generator), torch.randn(50, 6, generator=generator)
    raw, decoded = 3 * x + 1, x + 0.3 * noise
    raw_decoded = 3 * decoded + 1 + 0.2 * noise
    sums = Sums(6, torch.device("cpu"))
    for rows in (slice(0, 20), slice(20, 50)):
        sums.add(x[rows], decoded[rows], raw[rows], raw_decoded[rows])
    found = sums.metrics()

    def explained(a, b):
        return 1 - float(((a - b) ** 2).sum() / ((a - a.mean(0)) ** 2).sum())

    assert found["fvu"] == pytest.approx(1 - explained(x, decoded), rel=1e-5)
    assert found["explained_variance"] == pytest.approx(explained(x, decoded), rel=1e-5)
    assert found["explained_variance_raw"] == pytest.approx(explained(raw, raw_decoded), rel=1e-5)
    cosine = torch.cosine_similarity(x, decoded).mean()
    assert found["cosine_similarity"] == pytest.approx(float(cosine), rel=1e-5)
    assert found["l2_ratio"] == pytest.approx(float((decoded.norm(dim=1) / x.norm(dim=1)).mean()))
    bias = decoded.square().sum(1).mean() / (x * decoded).sum(1).mean()
    assert found["relative_reconstruction_bias"] == pytest.approx(float(bias), rel=1e-5)


def make_tokens(n_sentences: int = 12) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    lengths = torch.randint(2, 20, (n_sentences,), generator=generator)
    sentence = torch.arange(n_sentences).repeat_interleave(lengths)
    position = torch.cat([torch.arange(int(n)) for n in lengths])
    n = len(sentence)
    tokens = {"sentence": sentence, "position": position, "token_id": torch.arange(n) % 7}
    for name in ("norm", "relative_error", "n_active", "loss_clean", "loss_sae"):
        tokens[name] = torch.rand(n, generator=generator)
    last = torch.cat([sentence[1:] != sentence[:-1], torch.tensor([True])])
    tokens["loss_clean"][last] = tokens["loss_sae"][last] = math.nan
    return tokens


def test_groups_by_position_hold_every_token_once_and_average_it():
    tokens = make_tokens()
    rows = by_position(tokens)
    assert sum(row["n_tokens"] for row in rows) == len(tokens["position"])
    assert [row["from"] for row in rows] == [0, 1, 2, 4, 8, 16]
    for row in rows:
        inside = [
            i for i, p in enumerate(tokens["position"].tolist()) if row["from"] <= p <= row["to"]
        ]
        errors = [float(tokens["relative_error"][i]) for i in inside]
        assert row["normalized_mse"] == pytest.approx(np.mean(errors))
        added = [float(tokens["loss_sae"][i] - tokens["loss_clean"][i]) for i in inside]
        assert row["loss_increase"] == pytest.approx(np.nanmean(added), rel=1e-4, abs=1e-6)


def test_groups_by_norm_are_fifths():
    tokens = make_tokens(40)
    rows = by_norm(tokens)
    n = len(tokens["norm"])
    assert len(rows) == 5 and sum(row["n_tokens"] for row in rows) == n
    assert all(abs(row["n_tokens"] - n / 5) <= 2 for row in rows)
    order = tokens["norm"].argsort()
    lowest = tokens["n_active"][order[: rows[0]["n_tokens"]]]
    assert rows[0]["l0"] == pytest.approx(float(lowest.mean()), rel=1e-5)


def test_an_excerpt_gives_each_token_the_losses_of_the_one_before_it():
    tokens = make_tokens()
    texts = {i: f"t{i}" for i in range(7)}
    found = excerpts(tokens, texts, 5)
    assert len(found) == 5
    added = tokens["loss_sae"] - tokens["loss_clean"]
    means = [float(added[tokens["sentence"] == i].nanmean()) for i in range(12)]
    worst = max(range(12), key=lambda i: means[i])
    rows = (tokens["sentence"] == worst).nonzero()[:, 0].tolist()
    assert found[0]["loss_increase"] == pytest.approx(means[worst], abs=1e-4)
    assert [part["text"] for part in found[0]["tokens"]] == [
        texts[int(tokens["token_id"][row])] for row in rows
    ]
    assert found[0]["tokens"][0]["clean"] is None
    for part, row in zip(found[0]["tokens"][1:], rows, strict=False):
        assert part["sae"] == pytest.approx(float(tokens["loss_sae"][row]), abs=6e-4)


def test_nearest_directions_and_clusters_are_those_of_all_pairs():
    generator = torch.Generator().manual_seed(2)
    w_dec = torch.randn(30, 8, generator=generator)
    w_dec[[4, 9, 20]] = w_dec[2] + 0.05 * torch.randn(3, 8, generator=generator)
    w_dec[11] = 3 * w_dec[10]
    latents = torch.tensor([2, 4, 9, 10, 11, 20, 25])
    cosines, others = nearest_cosines(w_dec, latents)
    for latent, cosine, other in zip(latents.tolist(), cosines, others, strict=True):
        pairs = {
            j: float(torch.cosine_similarity(w_dec[latent], w_dec[j], dim=0))
            for j in range(30)
            if j != latent
        }
        assert int(other) == max(pairs, key=lambda j: pairs[j])
        assert float(cosine) == pytest.approx(max(pairs.values()), abs=1e-5)
    assert clusters(w_dec, torch.arange(30), 0.95) == [[2, 4, 9, 20], [10, 11]]
    found = geometry(w_dec, torch.arange(30), n_compared=30, seed=0)
    assert found["share_above"]["0.9"] >= 6 / 30 and found["n_compared"] == 30
    assert sum(found["nearest_cosine_histogram"]["n_latents"]) == 30
