"""Objectives against plain float64: what is chosen, gradients, lazy steps, basis, threshold."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from sae import ActiveLatents, TopKSparseAutoencoder, standardise
from saint.kernels import fastest, torch_ops
from saint.kernels.cpu import is_available
from saint.kernels.fastest import fastest_encode
from saint.training import metrics
from saint.training.losses import AuxK
from saint.training.moments import Moments
from saint.training.objectives import OBJECTIVES, Choice, JumpReLU, largest_of_batch
from saint.training.steps import make_step
from saint.training.trainer import Trainer, turn
from tests.support.training_checks import ALONE, WEIGHTS, make_sae, relative
from tests.support.training_ranks import RECIPE

KERNELS = (*(("cpp", "cpp_float32") if is_available() else ()), "torch", "dense")
FAST = KERNELS[0]
CHOOSING = [name for name in OBJECTIVES if name != "topk"]


@pytest.fixture(autouse=True)
def rounded_product_at_any_size(monkeypatch):
    monkeypatch.setattr(fastest, "_LEAST_ROUNDED_D_MODEL", 1)


def top_of(sae: TopKSparseAutoencoder):
    return make_step(FAST, sae, Moments(sae), ALONE).top


def chosen_mask(active: ActiveLatents, n_latents: int) -> torch.Tensor:
    mask = torch.zeros(len(active.offsets) - 1, n_latents, dtype=torch.bool)
    mask[active.tokens(), active.indices.long()] = active.values > 0
    return mask


@settings(max_examples=40, deadline=None)
@given(n=st.integers(1, 40), n_latents=st.integers(1, 90), data=st.data())
def test_the_batchs_largest_are_chosen_whatever_a_single_token_has(n, n_latents, data):
    k = data.draw(st.integers(1, n_latents))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
    pre = torch.randn(n, n_latents, generator=generator)
    pre *= torch.rand(n, 1, generator=generator) ** 3 * 10  # some tokens have most of them
    if data.draw(st.booleans()):
        pre = pre.round()  # many equals

    def top(rows: torch.Tensor, k: int):
        values, indices = pre[rows[:, 0].long()].topk(k, dim=1)
        return values.relu(), indices

    rows = torch.arange(n).float().unsqueeze(1)
    parts, cut = largest_of_batch(top, rows.split(7), k, n_latents, ALONE)
    found = chosen_mask(torch_ops.concatenate(parts), n_latents)
    ordered = pre.relu().flatten().sort(descending=True).values
    least = ordered[min(k * n, n * n_latents) - 1]
    assert torch.equal(found, (pre >= least) & (pre > 0))
    assert float(cut) == float(least)


def reference(sae, x, mask, prefixes, aux, jump=None) -> tuple[float, dict[str, torch.Tensor]]:
    """The objective in float64, by autograd: the loss, and gradients with W_dec's projected.

    jump: bandwidth and ∂loss/∂L0; thresholds' gradient is written out as the paper has it.
    """
    p = {n: v.detach().double().requires_grad_() for n, v in sae.named_parameters()}
    x = x.double()
    pre = (x - p["b_pre"]) @ p["W_enc"].T + p["b_enc"]
    hidden = torch.where(mask & (pre > 0), pre, 0.0)
    hidden.retain_grad()
    loss, error = torch.zeros((), dtype=torch.float64), x
    for end in prefixes:
        error = x - hidden[:, :end] @ p["W_dec"][:end] - p["b_pre"]
        share = (error**2).sum(1) / (x**2).sum(1).clamp_min(1e-12 * x.shape[1])
        loss = loss + share.sum() / max(1, len(x)) / len(prefixes)
    total = loss
    if aux is not None:
        dead = pre[:, aux.dead]
        keep = dead.argsort(dim=1, descending=True, stable=True)[:, : aux.k]
        dead_mask = torch.zeros_like(dead, dtype=torch.bool).scatter(1, keep, True)
        guess = torch.where(dead_mask & (dead > 0), dead, 0.0) @ p["W_dec"][aux.dead]
        residual = error.detach()
        spread = residual.var(1, correction=0).clamp_min(1e-12)
        total = loss + aux.coefficient * (((residual - guess) ** 2).mean(1) / spread).mean()
    total.backward()
    gradients = {n: v.grad if v.grad is not None else torch.zeros_like(v) for n, v in p.items()}
    with torch.no_grad():
        if jump is not None:
            bandwidth, price = jump
            window = ((pre - p["threshold"]) / bandwidth).abs() < 0.5
            pull = p["threshold"] * hidden.grad + price / max(1, len(x))
            gradients["threshold"] = -(window * pull).sum(0) / bandwidth
        along = (gradients["W_dec"] * p["W_dec"]).sum(1, keepdim=True)
        gradients["W_dec"] -= along * p["W_dec"]
    return float(loss.detach()), gradients


@dataclass
class Outcome:
    """What a step of no size found, and what the objective chose."""

    loss: float
    mask: torch.Tensor
    gradients: dict[str, torch.Tensor]
    choice: Choice


def gradients_of(sae, x, objective, k, kernels, aux, parts=1) -> Outcome:
    moments = Moments(sae)
    step = make_step(kernels, sae, moments, ALONE)
    micros = x.split(-(-len(x) // parts)) if len(x) else (x,)
    n_latents = sae.config.n_latents
    inputs = [part - sae.b_pre.detach() for part in micros]
    choice = objective.choose(step, inputs, k, ALONE)
    prefixes, loss, first = objective.prefixes(n_latents), 0.0, 0
    for part, active in zip(micros, choice.active, strict=True):
        share = len(part) / max(1, len(x))
        here = None if aux is None else replace(aux, first=first)
        how = (prefixes, choice.jump)
        loss += share * float(step.accumulate(part, active, here, share, *how).loss)
        first += len(part)
    step.apply(0.0, float("inf"))
    mask = chosen_mask(torch_ops.concatenate(choice.active), n_latents)
    gradients = {name: m / (1 - 0.9) for name, m in moments.first.items()}
    return Outcome(loss, mask, gradients, choice)


def assert_close(mine: dict, wanted: dict) -> None:
    norm = torch.stack([g.norm() for g in wanted.values()]).norm()
    assert mine.keys() == wanted.keys()
    for weight, gradient in wanted.items():
        assert relative(mine[weight], gradient) < 1e-4 or (
            (mine[weight] - gradient).norm() < 1e-5 * norm
        ), weight


@pytest.mark.parametrize("kernels", KERNELS)
@pytest.mark.parametrize("name", ["batchtopk", "matryoshka"])
@settings(
    max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(n=st.integers(1, 50), d=st.integers(2, 30), n_latents=st.integers(1, 120), data=st.data())
def test_gradients_equal_float64_autograd(kernels, name, n, d, n_latents, data):
    k = data.draw(st.integers(1, n_latents))
    n_dead, parts = data.draw(st.integers(0, n_latents)), data.draw(st.integers(1, 3))
    sae = make_sae(d, n_latents, k, seed=n)
    x = standardise(torch.randn(n, d))[0]
    if data.draw(st.booleans()):
        x = x[torch.randint((n + 1) // 2, (n,))]
    aux = None
    if n_dead:
        aux = AuxK(torch.randperm(n_latents)[:n_dead], data.draw(st.integers(1, n_dead)), 0.5)
    objective = OBJECTIVES[name]
    found = gradients_of(sae, x, objective, k, kernels, aux, parts)
    assert int(found.mask.sum()) >= min(k * n, int((sae.pre_activations(x) > 1e-5).sum()))
    loss, wanted = reference(sae, x, found.mask, objective.prefixes(n_latents), aux)
    assert found.loss == pytest.approx(loss, rel=1e-4)
    assert_close(found.gradients, wanted)


def jump_sae(d: int, n_latents: int, seed: int = 0) -> TopKSparseAutoencoder:
    sae = make_sae(d, n_latents, 3, seed=seed, activation="jumprelu")
    assert sae.threshold is not None
    with torch.no_grad():
        sae.threshold.copy_(2 * torch.rand(n_latents) ** 2)  # some windows reach below 0
    return sae


def jump_of(sae, x, k, objective: JumpReLU) -> tuple[torch.Tensor, tuple[float, float]]:
    """What is active in float64, and `reference`'s jump."""
    pre = (x.double() - sae.b_pre) @ sae.W_enc.double().T + sae.b_enc
    active = (pre > sae.threshold).detach()
    l0 = float(active.sum()) / max(1, len(x))
    return active, (objective.bandwidth, objective.l0_coefficient * 2 * (l0 / k - 1) / k)


@pytest.mark.parametrize("kernels", KERNELS)
@settings(
    max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(n=st.integers(1, 50), d=st.integers(2, 30), n_latents=st.integers(1, 120), data=st.data())
def test_jumprelus_gradients_equal_float64_autograd(kernels, n, d, n_latents, data):
    k, n_dead = data.draw(st.integers(1, n_latents)), data.draw(st.integers(0, n_latents))
    parts, objective = data.draw(st.integers(1, 3)), JumpReLU(0.7, 3.0)
    sae, x = jump_sae(d, n_latents, seed=n), standardise(torch.randn(n, d))[0]
    if data.draw(st.booleans()):
        x = x[torch.randint((n + 1) // 2, (n,))]
    assert sae.threshold is not None
    over = ((x - sae.b_pre) @ sae.W_enc.T + sae.b_enc - sae.threshold).detach()
    edges = torch.stack([over, over - 0.35, over + 0.35])
    assume(float(edges.abs().min()) > 1e-5)  # rounding decides on which side these lie
    aux = None
    if n_dead:
        aux = AuxK(torch.randperm(n_latents)[:n_dead], data.draw(st.integers(1, n_dead)), 0.5)
    found = gradients_of(sae, x, objective, k, kernels, aux, parts)
    active, jump = jump_of(sae, x, k, objective)
    assert torch.equal(found.mask, active)
    loss, wanted = reference(sae, x, active, (n_latents,), aux, jump)
    assert found.loss == pytest.approx(loss, rel=1e-4)
    assert_close(found.gradients, wanted)


@pytest.mark.parametrize("kernels", KERNELS)
def test_what_equals_its_threshold_is_at_rest_and_moves_it(kernels):
    """In whole numbers, where no rounding decides."""
    torch.manual_seed(0)
    sae, x = jump_sae(24, 64), torch.randint(-8, 9, (50, 24)).float()
    assert sae.threshold is not None
    with torch.no_grad():
        sae.b_pre.zero_()
        sae.W_enc.copy_(torch.randint(-1000, 1001, (64, 24)) / 1024)
        sae.b_enc.copy_(torch.randint(-1000, 1001, (64,)) / 1024)
        pre = x @ sae.W_enc.T + sae.b_enc
        sae.threshold.copy_(pre[torch.randint(50, (64,)), torch.arange(64)].clamp_min(0.25))
    ties = pre == sae.threshold
    assert ties.sum() > 20
    objective = JumpReLU(0.5, 3.0)
    found = gradients_of(sae, x, objective, 5, kernels, None)
    active, jump = jump_of(sae, x, 5, objective)
    assert torch.equal(found.mask, active) and not (active & ties).any()
    assert_close(found.gradients, reference(sae, x, active, (64,), None, jump)[1])


@pytest.mark.parametrize("kernels", KERNELS)
def test_thresholds_begin_where_the_first_batch_has_k_per_token(kernels):
    sae, x = make_sae(24, 200, activation="jumprelu"), standardise(torch.randn(60, 24))[0]
    assert sae.threshold is not None and not sae.threshold.any()
    found = gradients_of(sae, x, JumpReLU(), 5, kernels, None)
    assert len(sae.threshold.unique()) == 1 and abs(int(found.mask.sum()) - 300) <= 1
    before = sae.threshold.clone()
    gradients_of(sae, 2 * x, JumpReLU(), 5, kernels, None)
    assert torch.equal(sae.threshold, before)


@pytest.mark.parametrize("kernels", KERNELS)
@pytest.mark.parametrize("name", CHOOSING)
def test_an_empty_batch_and_latents_that_never_fire(kernels, name):
    for x, bias in ((torch.empty(0, 24), 0.0), (standardise(torch.randn(9, 24))[0], -100.0)):
        sae = make_sae(activation=OBJECTIVES[name].activation)
        with torch.no_grad():
            sae.b_enc.add_(bias)
        aux = AuxK(torch.arange(64), 8, 0.5)
        found = gradients_of(sae, x, OBJECTIVES[name], 5, kernels, aux)
        assert not found.mask.any()
        assert all(torch.isfinite(g).all() for g in found.gradients.values())
        if not len(x):
            assert found.loss == 0 and all(not g.any() for g in found.gradients.values())


def recipe_of(**changes):
    return replace(RECIPE, n_latents=200, k_start=5, k_anneal_steps=0, **changes)


def batches(n_steps: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    mixing = torch.randn(40, 24, generator=generator)
    parts = [torch.randn(64, 40, generator=generator).relu() ** 3 @ mixing for _ in range(n_steps)]
    return [standardise(x)[0] for x in parts]


def trainer_of(kernels: str, basis=None, **changes) -> Trainer:
    recipe = recipe_of(**changes)
    activation = OBJECTIVES[recipe.objective].activation
    sae = make_sae(n_latents=200, activation=activation)
    with torch.no_grad():
        sae.b_enc[:60] -= 3  # some are dead soon
    return Trainer(sae, recipe, 20, ALONE, kernels, basis)


@pytest.mark.parametrize("moments", ["float32", "int8"])
@pytest.mark.parametrize("kernels", KERNELS)
def test_lazy_steps_leave_latents_without_a_gradient_alone(kernels, moments):
    for x in batches(3)[2:]:
        lazy = trainer_of(kernels, lazy=True, moments=moments)
        eager = trainer_of(kernels, lazy=False, moments=moments)
        for trainer in (lazy, eager):
            trainer.train_step(batches(1)[0], 30)  # moments that are not zero
        state = lazy.sae.state_dict() | {f"m.{n}": m for n, m in lazy.moments.first.items()}
        before = {name: tensor.clone() for name, tensor in state.items()}
        losses, _ = lazy.train_step(x, 30)
        at_rest = ~losses.fired
        assert 20 < int(at_rest.sum()) < 180
        for name in ("W_enc", "W_dec", "b_enc", "m.W_enc", "m.W_dec", "m.b_enc"):
            assert torch.equal(state[name][at_rest], before[name][at_rest]), name
            assert not torch.equal(state[name][losses.fired], before[name][losses.fired])
        eager.sae.load_state_dict({n: before[n] for n in WEIGHTS})
        if moments == "float32":  # where latents fire, it is Adam
            eager.kernels = make_step(kernels, eager.sae, eager.moments, ALONE)
            for mine, theirs in zip(
                (lazy.moments.first, lazy.moments.second),
                (eager.moments.first, eager.moments.second),
                strict=True,
            ):
                assert mine.keys() == theirs.keys()


@pytest.mark.parametrize("kernels", KERNELS)
@pytest.mark.parametrize("name", CHOOSING)
def test_a_checkpoint_continues_with_the_same_bits(kernels, name, tmp_path):
    x = batches(8)
    basis = torch.linalg.qr(torch.randn(24, 24, generator=torch.Generator().manual_seed(1)))[0]
    how = {"objective": name, "lazy": True, "beta2": 0.99}
    whole, before, after = (trainer_of(kernels, basis.clone(), **how) for _ in range(3))
    for batch in x:
        whole.train_step(batch, 64)
    for batch in x[:5]:
        before.train_step(batch, 64)
    torch.save(before.state(), tmp_path / "5.pt")
    after.restore(after.read([tmp_path / "5.pt"]))
    for batch in x[5:]:
        after.train_step(batch, 64)
    for mine, theirs in zip(after.sae.parameters(), whole.sae.parameters(), strict=True):
        assert torch.equal(mine, theirs)
    assert torch.equal(after.threshold, whole.threshold)
    levels = whole.levels()
    assert levels is not None and float(levels.min()) > 0
    assert len(levels.unique()) == 1 or name == "jumprelu"


@pytest.mark.parametrize("kernels", KERNELS)
def test_a_threshold_moves_by_what_lies_near_it_and_not_below_0(kernels):
    trainer = trainer_of(kernels, objective="jumprelu", lazy=True)
    x, threshold = batches(1)[0], trainer.sae.threshold
    assert threshold is not None
    with torch.no_grad():
        threshold.copy_(torch.where(torch.arange(200) % 40 == 39, 1e-3, 2 + 2 * torch.rand(200)))
    pre = trainer.sae.pre_activations(x).detach()
    near = ((pre - threshold).abs() < trainer.recipe.bandwidth / 2).any(0)
    before = threshold.detach().clone()
    trainer.train_step(x, 30)
    assert 20 < int(near.sum()) < 199
    assert torch.equal(threshold[~near], before[~near])
    after = threshold.detach()
    moved = (after - before)[near].abs()
    rate = trainer.recipe.threshold_rate * trainer.recipe.learning_rate_at(0, 20)
    assert float(moved.max()) == pytest.approx(rate, rel=1e-3), "Adam's first step"
    assert float(after.min()) == 0 and int((after == 0).sum()) > 1


def test_jumprelu_holds_the_l0_that_was_asked_for():
    trainer = trainer_of(FAST, objective="jumprelu", lazy=True, learning_rate=4e-3)
    trainer.n_steps = 300
    l0s = []
    for batch in batches(40) * 4:
        l0s.append(float(trainer.train_step(batch, 64)[0].l0))
    assert l0s[0] == pytest.approx(5, rel=0.01)
    assert sum(l0s[-80:]) / 80 == pytest.approx(5, rel=0.06)


@pytest.mark.parametrize("name", CHOOSING)
def test_all_kernels_walk_the_same_way_lazily(name):
    ends = {}
    for kernels in KERNELS:
        trainer = trainer_of(kernels, objective=name, lazy=True, beta2=0.99)
        for batch in batches(8):
            trainer.train_step(batch, 30)
        ends[kernels] = trainer
    for kernels in KERNELS[:-1]:
        for mine, dense in zip(
            ends[kernels].sae.parameters(), ends["dense"].sae.parameters(), strict=True
        ):
            torch.testing.assert_close(mine, dense, rtol=0, atol=1e-4)


def test_an_sae_in_another_basis_is_the_same_one_turned_back():
    basis = torch.linalg.qr(torch.randn(24, 24, generator=torch.Generator().manual_seed(1)))[0]
    trainer = trainer_of(FAST, basis, lazy=True)
    plain = trainer_of(FAST, objective="topk")
    x = batches(1)[0]
    for name, weight in trainer.plain_sae().state_dict().items():
        torch.testing.assert_close(weight, plain.sae.state_dict()[name], rtol=0, atol=1e-5)
    turned = plain.sae(x) @ basis
    turn(plain.sae, basis)
    torch.testing.assert_close(plain.sae(x @ basis), turned, rtol=0, atol=1e-4)
    torch.testing.assert_close(trainer.prepare(x), standardise(x)[0] @ basis)


class Rows:
    """Rows as `BatchedRows` gives them."""

    def __init__(self, x: torch.Tensor):
        self.x = x

    def n_rows(self, split: str) -> int:
        return len(self.x)

    def read(self, split: str, start: int, stop: int) -> torch.Tensor:
        return self.x[start:stop]


@pytest.mark.parametrize("name", CHOOSING)
def test_the_calibrated_threshold_gives_the_asked_number_of_latents(name, monkeypatch):
    monkeypatch.setattr(metrics, "_BLOCK_ROWS", 100)
    trainer = trainer_of(FAST, objective=name)
    rows = torch.cat(batches(20))
    for batch in rows.split(64):
        trainer.train_step(batch, 64)
    metrics.calibrate(trainer, Rows(rows))  # pyright: ignore[reportArgumentType]
    sae = trainer.plain_sae()
    active = sae.encode(standardise(rows)[0])
    assert len(active.values) / len(rows) == pytest.approx(5, rel=0.005)
    counts = active.offsets.diff()
    assert int(counts.min()) < 5 < int(counts.max())
    ((found, _),) = metrics.validate([trainer], Rows(rows))  # pyright: ignore[reportArgumentType]
    assert found["val/l0"] == pytest.approx(5, rel=0.005)


@pytest.mark.parametrize("activation", ["batchtopk", "jumprelu", "relu", "topk", "gated"])
def test_the_fast_encoder_finds_what_the_rule_keeps(activation):
    threshold = 0.4 if activation == "batchtopk" else None
    sae = make_sae(24, 300, 3, activation=activation, threshold=threshold)
    if sae.threshold is not None:
        with torch.no_grad():
            sae.threshold.copy_(torch.rand(300))
    x = standardise(torch.randn(70, 24))[0] * torch.rand(70, 1) * 3
    dense = []
    for encode in (fastest_encode(sae), sae.encode):
        active = encode(x)
        flat = torch.zeros(70, 300)
        flat[active.tokens(), active.indices] = active.values
        dense.append(flat)
    torch.testing.assert_close(*dense, rtol=1e-4, atol=1e-4)
