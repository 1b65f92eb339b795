"""The Triton step, and on a GPU torch's, against float64; `test_triton_step.py` runs this file.

On a GPU where there is one, else in Triton's interpreter (which is slow: shapes are small).
"""

from __future__ import annotations

import pytest
import torch

from sae import ActiveLatents, TopKSparseAutoencoder, standardise
from saint.kernels import torch_ops, triton_encoder, triton_gradient, triton_ops, triton_update
from saint.kernels.triton_encoder import Encoder, round_rows
from saint.stage.workers import Workers
from saint.training.losses import AuxK, sparse_gradient
from saint.training.moments import Moments
from saint.training.objectives import OBJECTIVES
from saint.training.steps import make_step
from saint.training.triton_step import TritonKernels
from tests.support.training_checks import (
    WEIGHTS,
    activations,
    make_sae,
    one_step,
    reference,
    relative,
)
from tests.support.waits import waits_of

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
N, D, L, K = 12, 20, 43, 5


@pytest.fixture(autouse=True)
def several_tiles_and_parts_of_small_shapes(monkeypatch):
    monkeypatch.setattr(triton_gradient, "_SPLIT", 8)
    if DEVICE.type == "cpu":
        monkeypatch.setattr(triton_encoder, "_TOKENS", 4)  # fewer at once in the interpreter
        monkeypatch.setattr(triton_ops, "_DEFAULT", triton_ops.Tiles(16, 4, 1))


def sae_here(d: int = D, n_latents: int = L, k: int = K) -> TopKSparseAutoencoder:
    return make_sae(d, n_latents, k).to(DEVICE)


def rows_here(n: int = N, d: int = D, seed: int = 1) -> torch.Tensor:
    return standardise(torch.randn(n, d, generator=torch.Generator().manual_seed(seed)))[0].to(
        DEVICE
    )


def check_selection(a, w, bias, k: int) -> dict[str, torch.Tensor]:
    """Compare with float64: values within 1e-5, and the set but for what float32 cannot tell."""
    encoder = Encoder()
    values, indices = encoder(a, w, bias, k)
    pre = a.double() @ w.double().T + bias
    wanted = pre.topk(k, dim=1)
    size = float(pre.abs().max())
    mine = activations((values, indices), len(w)).double()
    exact = activations((wanted.values.relu().float(), wanted.indices), len(w)).double()
    assert (mine - exact).abs().max() < 1e-5 * size or (
        (pre.gather(1, indices.long()) >= wanted.values[:, -1:] - 2e-6 * size).all()
        and (mine.sort().values - exact.sort().values).abs().max() < 1e-5 * size
    )
    return encoder.diagnostics()


@pytest.mark.parametrize(
    ("d", "n_latents", "k", "outliers"),
    [(24, 3, 2, True), (100, 700, 9, False), (100, 700, 9, True), (300, 2500, 16, True)],
)
def test_the_rounded_product_selects_what_float64_selects(d, n_latents, k, outliers):
    torch.manual_seed(d)
    a, w, bias = torch.randn(3, d), torch.randn(n_latents, d), 0.1 * torch.randn(n_latents)
    w *= torch.rand(n_latents, 1) + 0.2
    if outliers:  # as residual streams have them, and latents that read them
        a[:, 3] *= 20
        w[:, 3] *= 5
    found = check_selection(a.to(DEVICE), w.to(DEVICE), bias.to(DEVICE), k)
    assert found["debug/float32_tokens_ratio"] == 0
    assert found["debug/candidates_per_token"] < 3 * k + 20


def test_near_ties_are_decided_in_float32():
    torch.manual_seed(0)
    a, w = torch.randn(2, 64), torch.randn(1, 64) + 1e-4 * torch.randn(600, 64)
    a, w, bias = a.to(DEVICE), w.to(DEVICE), torch.zeros(600, device=DEVICE)
    few = check_selection(a, w[:200], bias[:200], 4)
    assert few == {"debug/candidates_per_token": 200, "debug/float32_tokens_ratio": 0}
    many = check_selection(a, w, bias, 4)  # more candidates than there is room for
    assert many == {"debug/candidates_per_token": 600, "debug/float32_tokens_ratio": 1}


def test_a_latent_that_is_not_finite_is_chosen_as_everywhere():
    a, w, bias = torch.randn(4, 64), torch.randn(300, 64), torch.zeros(300)
    for tensor, place in ((w, (5, 3)), (bias, (7,))):
        tensor[place] = float("nan")
        values, _ = Encoder()(a.to(DEVICE), w.to(DEVICE), bias.to(DEVICE), 4)
        assert not values.isfinite().all()
        tensor[place] = 0.0


def test_candidates_outside_their_bounds_send_the_token_to_float32():
    torch.manual_seed(0)
    a, w = torch.randn(4, 64, device=DEVICE), torch.randn(300, 64, device=DEVICE)
    encoder = Encoder()
    encoder.rounded_weights(w).rows[::2] *= 1.5  # some other weights
    values, _ = encoder(a, w, torch.zeros(300, device=DEVICE), 4)
    assert encoder.diagnostics()["debug/float32_tokens_ratio"] == 1
    wanted = (a.double() @ w.double().T).topk(4).values
    torch.testing.assert_close(values.double(), wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("n_latents", "k"), [(1, 1), (17, 17), (40, 3), (300, 7)])
def test_of_equal_values_the_first_latents_are_kept(monkeypatch, n_latents, k):
    monkeypatch.setattr(triton_encoder, "_TILE", 64)  # several tiles
    monkeypatch.setattr(triton_encoder, "_BLOCK_ELEMENTS", 2 * n_latents)  # and blocks
    torch.manual_seed(0)
    a, w = (2 * torch.randn(3, 8)).round(), torch.randn(n_latents, 8).round()
    bias = torch.randn(n_latents).round()  # whole numbers: many equals, no rounding
    encoder = Encoder()
    values, indices = encoder(a.to(DEVICE), w.to(DEVICE), bias.to(DEVICE), k)
    assert encoder.diagnostics()["debug/float32_tokens_ratio"] == 0
    wanted = (a @ w.T + bias).sort(dim=1, descending=True, stable=True)
    assert torch.equal(indices.cpu(), wanted.indices[:, :k].int())
    assert torch.equal(values.cpu(), wanted.values[:, :k].relu())


def test_reconstruction_is_torchs_even_of_inactive_latents():
    sae, x = sae_here(), rows_here(4)
    values = torch.rand(4, K, generator=torch.Generator().manual_seed(2)).to(DEVICE)
    values[0, 2] = values[3] = 0
    indices = torch.arange(4 * K, device=DEVICE).view(4, K)
    weights = (sae.W_dec.detach(), sae.b_pre.detach(), 0.5)
    regular = ActiveLatents.of_matrices(values, indices.int())
    kept = torch.rand(4, K, generator=torch.Generator().manual_seed(3)).to(DEVICE) < 0.6
    kept[2] = False
    ragged = torch_ops.keep(values, indices.int(), kept, int(kept.sum()))
    nested = torch_ops.nest(ragged, (6, 11, L))
    for active, parts, at_rest in ((regular, 1, True), (ragged, 1, False), (nested, 3, False)):
        how = {"parts": parts, "at_rest": at_rest}
        mine = triton_ops.reconstruct(x, active, *weights, **how)
        torchs = torch_ops.reconstruct(x, active, *weights, **how)
        for i, (ours, theirs) in enumerate(zip(mine, torchs, strict=True)):
            theirs = theirs[:0] if i == 1 and not at_rest else theirs  # by latent, later
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-7)
    values[1, 0] = torch.nan
    regular = ActiveLatents.of_matrices(values, indices.int())
    squared = triton_ops.reconstruct(x, regular, *weights)[2]
    assert squared[:, 0].isnan().tolist() == [False, True, False, False]


AUXES = {
    "none dead": None,
    "some dead, k_aux of them": (list(range(0, L, 3)), 4),
    "all dead, k_aux all": (list(range(L)), L),
}


@pytest.mark.parametrize("kernels", ["triton", "torch"])
@pytest.mark.parametrize("aux", AUXES.values(), ids=AUXES)
def test_gradients_and_step_equal_float64_autograd_and_adam(aux, kernels):
    sae, x = sae_here(), rows_here()
    if aux is None:  # one latent fires everywhere, some tokens come twice
        x = rows_here(40)
        x[20:] = x[:20]
        with torch.no_grad():
            sae.b_enc[3] += 5
    else:
        aux = AuxK(torch.tensor(aux[0], device=DEVICE), aux[1], 0.5)
    check_step(sae, x, aux, kernels)


def check_step(sae, x, aux, kernels: str) -> None:
    wanted = reference(sae, x, aux)
    clip = wanted.norm / 3
    weights = wanted.stepped(sae, rate=1e-2, clip=clip)
    losses, gradients, norm = one_step(sae, x, aux, kernels, rate=1e-2, clip=clip)
    assert float(losses.loss) == pytest.approx(float(wanted.loss), rel=1e-5)
    assert float(losses.aux_loss) == pytest.approx(float(wanted.aux_loss), rel=1e-5)
    assert norm == pytest.approx(wanted.norm, rel=1e-5)
    scale = clip / (wanted.norm + 1e-6)
    for name in WEIGHTS:
        assert relative(gradients[name], scale * wanted.gradients[name]) < 1e-5, name
        mine = getattr(sae, name).detach().double()
        torch.testing.assert_close(mine, weights[name], atol=1e-5, rtol=0)
    norms = sae.W_dec.detach().norm(dim=1)
    torch.testing.assert_close(norms, torch.ones_like(norms), rtol=0, atol=1e-6)


@pytest.mark.skipif(DEVICE.type == "cpu", reason="too slow in the interpreter")
@pytest.mark.parametrize("kernels", ["triton", "torch"])
@pytest.mark.parametrize("n_dead", [0, 1500])
def test_a_large_step(n_dead, kernels):
    aux = AuxK(torch.arange(n_dead, device=DEVICE), 256, 0.5) if n_dead else None
    check_step(sae_here(1000, 9000, 32), rows_here(700, 1000), aux, kernels)


def test_triton_walks_with_dense_and_rounds_the_weights_that_it_has():
    ends = {}
    for name in ("triton", "dense"):
        sae = sae_here()
        moments = Moments(sae)
        step = make_step(name, sae, moments, Workers(0, 1, DEVICE))
        for i in range(3):
            x, k = rows_here(9, seed=i), K + (i == 0)
            aux = AuxK(torch.arange(i, L, 9, device=DEVICE), 4, 1 / 32) if i else None
            for part in x.split(5):
                step.accumulate(part, k, aux, len(part) / len(x))
            step.apply(1e-3, 0.1)
            if name == "triton":
                kept = step.encoder.rounded_weights(sae.W_enc)  # pyright: ignore
                fresh = round_rows(sae.W_enc.detach())
                assert torch.equal(kept.rows, fresh.rows)
                torch.testing.assert_close(kept.norms, fresh.norms, rtol=1e-6, atol=0)
        ends[name] = [p.detach() for p in sae.parameters()], moments
    for mine, dense in zip(ends["triton"][0], ends["dense"][0], strict=True):
        torch.testing.assert_close(mine, dense, rtol=0, atol=3e-5)
    moments, wanted = ends["triton"][1], ends["dense"][1]
    assert moments.n_steps == wanted.n_steps == 3
    for name in WEIGHTS:  # latents at rest decay too
        assert relative(moments.first[name], wanted.first[name].double()) < 1e-4
        assert relative(moments.second[name], wanted.second[name].double()) < 1e-4


@pytest.mark.parametrize("lazy", [False, True])
def test_moments_in_8_bits_have_torchs_codes(lazy):
    ends = []
    for kernels in ("triton", "torch"):
        sae = sae_here()
        moments = Moments(sae, "int8", lazy=lazy)
        step = make_step(kernels, sae, moments, Workers(0, 1, DEVICE))
        for i in range(3):
            step.accumulate(rows_here(4, seed=i), K, None, 1.0)
            step.apply(1e-3, 0.1)
        ends.append((moments, [p.detach() for p in sae.parameters()]))
    (mine, weights), (torchs, theirs) = ends
    for name in ("W_enc", "W_dec"):
        torch.testing.assert_close(mine.scales[name], torchs.scales[name], rtol=1e-4, atol=1e-12)
        for codes, wanted in ((mine.first, torchs.first), (mine.second, torchs.second)):
            apart = (codes[name].int() - wanted[name].int()).abs()
            assert wanted[name].any() and apart.max() <= 1 and (apart > 0).double().mean() < 5e-3
    for ours, wanted in zip(weights, theirs, strict=True):
        torch.testing.assert_close(ours, wanted, rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", ["matryoshka", "jumprelu"])
def test_objectives_step_as_they_do_with_dense_gradients(name):
    ends = {}
    for kernels in ("triton", "dense"):
        sae = make_sae(D, L, K, activation=OBJECTIVES[name].activation).to(DEVICE)
        moments, alone = Moments(sae, lazy=True, threshold_rate=8.0), Workers(0, 1, DEVICE)
        step, x = make_step(kernels, sae, moments, alone), rows_here(6)
        choice = OBJECTIVES[name].choose(step, [x - sae.b_pre.detach()], K, alone)
        assert choice is not None
        (active,) = choice.active
        prefixes = OBJECTIVES[name].prefixes(L)
        losses = step.accumulate(x, active, None, 1.0, prefixes, choice.jump)
        step.apply(1e-3, 0.1)
        ends[kernels] = [losses.loss, *(p.detach() for p in sae.parameters())]
    for mine, dense in zip(*ends.values(), strict=True):
        torch.testing.assert_close(mine, dense, rtol=1e-5, atol=3e-5)


@pytest.mark.parametrize("kind", ["float32", "int8"])
def test_the_host_waits_for_nothing(monkeypatch, kind):
    for module in (triton_encoder, triton_gradient, triton_ops, triton_update):
        monkeypatch.setattr(module, "launch", lambda *arguments, **options: None)
    sae = sae_here()
    step = make_step("triton", sae, Moments(sae, kind, lazy=True), Workers(0, 1, DEVICE))
    aux, x = AuxK(torch.arange(3, device=DEVICE), 2, 1 / 32), rows_here()

    def work() -> None:
        step.accumulate(x[:6], K, aux, 0.5)
        step.accumulate(x[6:], K, aux, 0.5)
        step.apply(1e-3, 0.1)

    work()
    assert not waits_of(work)


def test_of_many_unsure_tokens_some_are_decided_in_float32():
    torch.manual_seed(0)
    a, w, bias = torch.randn(20, 64), torch.randn(300, 64), torch.zeros(300)
    a, w, bias = a.to(DEVICE), w.to(DEVICE), bias.to(DEVICE)
    encoder = Encoder()
    encoder.rounded_weights(w).rows[::2] *= 1.5  # some other weights: all are unsure
    values, indices = encoder.without_waiting(a, w, bias, 4)
    wanted = (a.double() @ w.double().T).relu()
    torch.testing.assert_close(values.double(), wanted.gather(1, indices.long()), rtol=0, atol=1e-4)
    same = (values.double() - wanted.topk(4).values).abs().amax(dim=1) < 1e-4
    assert same[:16].all() and encoder.diagnostics()["debug/float32_tokens_ratio"] == 1


def test_weights_from_a_checkpoint_are_rounded_anew():
    sae, other = sae_here(), sae_here()
    with torch.no_grad():
        other.W_enc.add_(0.1)
    encoder = Encoder()
    encoder.rounded_weights(sae.W_enc)
    sae.load_state_dict(other.state_dict())
    mine = encoder.rounded_weights(sae.W_enc)
    assert torch.equal(mine.rows, round_rows(other.W_enc.detach()).rows)
    # To the nearest on a GPU; the interpreter cuts off.
    torch.testing.assert_close(mine.rows.float(), other.W_enc.detach(), rtol=2**-7, atol=0)
    torch.testing.assert_close(mine.norms, torch.linalg.vector_norm(other.W_enc, 4, dim=1).detach())


def test_micro_batches_add_up_and_the_same_step_has_the_same_bits():
    x = rows_here()
    aux = AuxK(torch.arange(0, L, 5, device=DEVICE), 3, 1 / 32)
    ends, gradients = [], []
    for rows, parts in ((x, 1), (x.T.contiguous().T, 1), (x, 4)):
        sae = sae_here()
        gradients.append(one_step(sae, rows, aux, "triton", parts=parts, rate=1e-3, clip=0.1)[1])
        ends.append([p.detach() for p in sae.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*ends[:2], strict=True))
    for name in WEIGHTS:
        torch.testing.assert_close(gradients[2][name], gradients[0][name], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("x", [torch.empty(0, D), torch.zeros(2, D)], ids=["empty", "zero token"])
def test_an_empty_batch_and_a_zero_token_change_nothing(x):
    sae = sae_here()
    with torch.no_grad():
        sae.b_pre.zero_()
        sae.b_enc.zero_()
    _, gradients, norm = one_step(sae, x.to(DEVICE), None, "triton")
    assert norm == 0
    assert all(not g.any() for g in gradients.values())


def test_numbers_that_are_not_finite_show_in_the_loss():
    x = rows_here(3)
    x[2, 3] = torch.nan
    losses, _ = sparse_gradient(sae_here(), x, K, None, TritonKernels(DEVICE, Encoder()))
    assert not torch.isfinite(losses.loss)
