"""One training step, in all its versions, against dense float64 autograd written another way."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sae import standardise
from saint.kernels import cpu, fastest
from saint.kernels.pieces import CpuKernels, TorchKernels
from saint.kernels.torch_encoder import Encoder
from saint.stage.errors import UserError
from saint.stage.workers import Workers
from saint.training import steps
from saint.training.losses import AuxK, sparse_gradient
from saint.training.moments import Moments
from saint.training.steps import make_step
from saint.training.torch_step import TorchStep
from tests.support.training_checks import (
    ALONE,
    WEIGHTS,
    activations,
    make_sae,
    needs_cpp,
    one_step,
    reference,
    relative,
)

try:
    CPP, ROUNDED = ("cpp", "cpp_float32"), cpu.has_rounded_product()
except UserError:  # no compiler on this machine
    CPP, ROUNDED = (), False
KERNELS = (*CPP, "torch", "dense")  # test_triton_step.py has the tests of "triton"
needs_rounding = pytest.mark.skipif(not ROUNDED, reason="this CPU has no fast products of bytes")


@pytest.fixture(autouse=True)
def rounded_product_at_any_size(monkeypatch):
    monkeypatch.setattr(fastest, "_LEAST_ROUNDED_D_MODEL", 1)


AUXES = {
    "none dead": None,
    "one dead": ([7], 1),
    "some dead, k_aux of them": (list(range(0, 64, 3)), 4),
    "all dead, k_aux all": (list(range(64)), 64),
    "a third of the tokens": (list(range(0, 64, 3)), 4, 3, 7),
    "not one token": (list(range(0, 64, 3)), 4, 60, 1),
}


@pytest.mark.parametrize("kernels", KERNELS)
@pytest.mark.parametrize("aux", AUXES.values(), ids=AUXES)
def test_every_gradient_equals_float64_autograd(kernels, aux):
    sae = make_sae()
    x = standardise(torch.randn(50, 24))[0]
    aux = None if aux is None else AuxK(torch.tensor(aux[0]), aux[1], 0.5, *aux[2:])
    wanted = reference(sae, x, aux)
    losses, gradients, norm = one_step(sae, x, aux, kernels)
    assert float(losses.loss) == pytest.approx(float(wanted.loss), rel=1e-5)
    assert float(losses.aux_loss) == pytest.approx(float(wanted.aux_loss), rel=1e-5)
    assert norm == pytest.approx(wanted.norm, rel=1e-5)
    for name in WEIGHTS:
        assert relative(gradients[name], wanted.gradients[name]) < 1e-5, name


LAYOUTS = {
    "contiguous": lambda x: x,
    "every second row": lambda x: x.repeat_interleave(2, dim=0)[::2],
    "columns together": lambda x: x.T.contiguous().T,
    "part of longer rows": lambda x: torch.cat([x, x], dim=1)[:, : x.shape[1]],
}


@pytest.mark.parametrize("kernels", KERNELS)
@settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    n=st.integers(1, 80),
    d=st.integers(2, 40),
    n_latents=st.integers(1, 300),
    duplicates=st.booleans(),
    layout=st.sampled_from(sorted(LAYOUTS)),
    data=st.data(),
)
def test_gradients_equal_float64_autograd_for_any_shape_and_layout(
    kernels, n, d, n_latents, duplicates, layout, data
):
    k = data.draw(st.integers(1, n_latents))
    n_dead = data.draw(st.integers(0, n_latents))
    sae = make_sae(d, n_latents, k, seed=n)
    x = standardise(torch.randn(n, d))[0]
    if duplicates:
        x = x[torch.randint((n + 1) // 2, (n,))]
    aux = None
    if n_dead:
        aux = AuxK(torch.randperm(n_latents)[:n_dead], data.draw(st.integers(1, n_dead)), 0.5)
    wanted = reference(sae, x, aux)
    losses, gradients, _ = one_step(sae, LAYOUTS[layout](x), aux, kernels)
    assert float(losses.loss) == pytest.approx(float(wanted.loss), rel=1e-4)
    for name in WEIGHTS:
        # Where terms of the whole's size cancel, float32 leaves its rounding of them.
        error = (gradients[name].double() - wanted.gradients[name]).norm()
        assert error < 1e-4 * wanted.gradients[name].norm() + 1e-6 * wanted.norm, name


@pytest.mark.parametrize("kernels", KERNELS)
def test_of_latents_that_tie_exactly_one_is_taken(kernels):
    """Twins have the same weights, in whole numbers: no rounding tells them apart.

    Whichever is taken, their gradients' sum is the same; in C++ it is the first.
    """
    torch.manual_seed(0)
    sae, x = make_sae(24, 64, 5), torch.randint(-8, 9, (50, 24)).float()
    with torch.no_grad():
        sae.b_pre.zero_()
        sae.W_enc[:32] = torch.randint(-1000, 1001, (32, 24)) / 1024
        sae.b_enc[:32] = torch.randint(-1000, 1001, (32,)) / 1024
        for weight in (sae.W_enc, sae.b_enc, sae.W_dec):
            weight[32:] = weight[:32]
    pre = sae.pre_activations(x)
    assert all(len(row.unique()) == 32 for row in pre), "twins tie, others do not"
    wanted = reference(sae, x, None)
    losses, gradients, _ = one_step(sae, x, None, kernels)
    assert float(losses.loss) == pytest.approx(float(wanted.loss), rel=1e-5)
    for name in WEIGHTS:
        mine, theirs = gradients[name], wanted.gradients[name]
        if name != "b_pre" and kernels not in CPP:
            mine, theirs = mine[:32] + mine[32:], theirs[:32] + theirs[32:]
        assert relative(mine, theirs) < 1e-5, name


@pytest.mark.parametrize("kernels", KERNELS)
def test_a_clipped_step_is_adam_on_unit_directions(kernels):
    sae = make_sae()
    x = standardise(torch.randn(50, 24))[0]
    aux = AuxK(torch.arange(0, 64, 3), 4, 0.5)
    wanted = reference(sae, x, aux)
    weights = wanted.stepped(sae, rate=1e-2, clip=wanted.norm / 3)
    one_step(sae, x, aux, kernels, rate=1e-2, clip=wanted.norm / 3)
    for name in WEIGHTS:
        torch.testing.assert_close(
            getattr(sae, name).detach().double(), weights[name], atol=1e-5, rtol=0
        )


def test_all_kernels_walk_the_same_way_and_keep_unit_norms():
    ends = {}
    for kernels in KERNELS:
        torch.manual_seed(3)
        sae = make_sae(n_latents=200)
        moments = Moments(sae)
        step = make_step(kernels, sae, moments, ALONE)
        generator = torch.Generator().manual_seed(5)
        for i in range(8):
            x = standardise(torch.randn(30, 24, generator=generator))[0]
            aux = AuxK(torch.arange(i, 200, 9), 4, 1 / 32) if i % 3 else None
            for part in x.split(20):
                step.accumulate(part, 5, aux, len(part) / len(x))
            step.apply(1e-3, 0.1)
            norms = sae.W_dec.detach().norm(dim=1)
            torch.testing.assert_close(norms, torch.ones(200), rtol=0, atol=1e-6)
        ends[kernels] = [p.detach() for p in sae.parameters()], moments
    weights, wanted = ends["dense"]
    for kernels in KERNELS[:-1]:
        for mine, dense in zip(ends[kernels][0], weights, strict=True):
            torch.testing.assert_close(mine, dense, rtol=0, atol=3e-5)
        moments = ends[kernels][1]
        assert moments.n_steps == wanted.n_steps == 8
        for name in WEIGHTS:  # latents at rest decay too
            assert relative(moments.first[name], wanted.first[name].double()) < 1e-4
            assert relative(moments.second[name], wanted.second[name].double()) < 1e-4


@pytest.mark.parametrize("kernels", KERNELS)
def test_micro_batches_add_up_to_the_batch(kernels):
    x = standardise(torch.randn(48, 24))[0]
    aux = AuxK(torch.arange(0, 64, 5), 3, 1 / 32, every=3, first=1)
    _, whole, _ = one_step(make_sae(), x, aux, kernels)
    _, parts, _ = one_step(make_sae(), x, aux, kernels, parts=5)
    for name in WEIGHTS:
        torch.testing.assert_close(parts[name], whole[name], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("kernels", KERNELS)
def test_an_empty_batch_and_a_zero_token_change_nothing(kernels):
    some = AuxK(torch.arange(9), 4, 0.5)
    cases = ((torch.empty(0, 24), None), (torch.empty(0, 24), some), (torch.zeros(2, 24), None))
    for x, aux in cases:
        sae = make_sae()
        with torch.no_grad():
            sae.b_pre.zero_()
            sae.b_enc.zero_()
        losses, gradients, norm = one_step(sae, x, aux, kernels)
        assert norm == losses.aux_loss == 0 and torch.isfinite(losses.loss)
        assert all(not g.any() for g in gradients.values())


@needs_cpp
def test_cpp_selection_is_exact_and_prefers_the_first_of_equals():
    torch.manual_seed(0)
    for n_latents, k in ((1, 1), (17, 17), (40, 3), (5000, 7), (70_000, 64)):
        a, w = torch.randn(6, 8), torch.randn(n_latents, 8)
        bias = torch.randn(n_latents).round()
        a, w = (2 * a).round(), w.round()  # whole numbers: many equals, no rounding
        pre = a @ w.T + bias
        values, indices = cpu.Encoder(rounded=False)(a, w, bias, k)
        wanted = pre.sort(dim=1, descending=True, stable=True)
        assert torch.equal(
            indices.sort(dim=1).values, wanted.indices[:, :k].sort(dim=1).values.int()
        )
        assert torch.equal(values.sort(descending=True).values, wanted.values[:, :k].relu())


@needs_rounding
@pytest.mark.parametrize("outliers", [False, True])
@pytest.mark.parametrize(("d", "n_latents", "k"), [(24, 3, 2), (100, 700, 9), (576, 2000, 32)])
def test_the_rounded_product_selects_what_float64_selects(d, n_latents, k, outliers):
    torch.manual_seed(d)
    a, w, bias = torch.randn(37, d), torch.randn(n_latents, d), 0.1 * torch.randn(n_latents)
    w *= torch.rand(n_latents, 1) + 0.2
    if outliers:  # as residual streams have them
        a[:, 3] *= 40
        w[:, 7] *= 20
    pre = a.double() @ w.double().T + bias
    wanted = pre.topk(k, dim=1)
    encoder = cpu.Encoder(rounded=True)
    mine = activations(encoder(a, w, bias, k), n_latents).double()
    exact = activations((wanted.values.relu().float(), wanted.indices), n_latents).double()
    assert (mine - exact).abs().max() < 1e-5 * pre.abs().max()
    found = encoder.diagnostics()
    assert found["debug/candidates_per_token"] < n_latents / 3 or n_latents < 50
    assert found["debug/float32_tokens_ratio"] <= 0.1


@needs_rounding
def test_tokens_that_rounding_cannot_decide_are_decided_in_float32(monkeypatch):
    torch.manual_seed(0)
    a, w = torch.randn(20, 64), torch.randn(1, 64) + 1e-4 * torch.randn(3000, 64)
    bias = torch.zeros(3000)
    encoder = cpu.Encoder(rounded=True)
    mine = activations(encoder(a, w, bias, 4), 3000).double()
    wanted = (a.double() @ w.double().T).topk(4, dim=1)
    assert encoder.diagnostics()["debug/float32_tokens_ratio"] > 0.5
    chosen = mine.sort(dim=1, descending=True).values[:, :4]
    torch.testing.assert_close(chosen, wanted.values.relu(), rtol=1e-5, atol=1e-5)


@needs_rounding
def test_every_step_rounds_the_weights_that_it_has():
    sae = make_sae(64, 500, 5)
    step = make_step("cpp", sae, Moments(sae), ALONE)
    x = standardise(torch.randn(50, 64))[0]
    for _ in range(3):
        step.accumulate(x, 5, None, 1.0)
        step.apply(0.05, float("inf"))
    # Old ones would send nearly all tokens through the float32 product.
    assert step.diagnostics()["debug/float32_tokens_ratio"] < 0.1


@needs_rounding
def test_the_rounded_product_is_exact_in_whole_numbers():
    torch.manual_seed(0)
    for n, n_latents, d in ((1, 1, 5), (7, 13, 64), (9, 1030, 576), (6, 11, 1000)):
        a, w = torch.randn(n, d), torch.randn(n_latents, d)
        a[0], w[0] = 1.0, -1.0  # the largest sums
        rounded_a = cpu._round(a, is_input=True)
        rounded_w = cpu._round(w, is_input=False)
        pre = torch.empty(n, n_latents)
        cpu.rounded_product(rounded_a, rounded_w, pre)
        qa, scale_a = rounded_a.tensors[0].long(), rounded_a.tensors[1].double()
        qw, scale_w = rounded_w.tensors[0].view(torch.int8).long(), rounded_w.tensors[1].double()
        offset = 128 if int(qa.max()) > 127 else 64
        wanted = ((qa - offset) @ qw.T) * scale_a[:, None] * scale_w
        torch.testing.assert_close(pre.double(), wanted, rtol=1e-6, atol=1e-9)
        assert (pre - a @ w.T).abs().max() < 0.15 * (a.norm(dim=1).max() * w.norm(dim=1).max())


@needs_cpp
@pytest.mark.skipif(not Path("/proc/cpuinfo").exists(), reason="no list of instructions here")
def test_the_rounded_product_is_used_where_the_cpu_has_it():
    assert cpu.has_rounded_product() == ("avx2" in Path("/proc/cpuinfo").read_text())


@needs_cpp
def test_numbers_that_are_not_finite_show_in_the_loss():
    sae = make_sae()
    x = standardise(torch.randn(4, 24))[0]
    x[2, 3] = torch.nan
    for pieces in (CpuKernels(rounded=True), TorchKernels(), TorchKernels(Encoder())):
        losses, _ = sparse_gradient(sae, x, 5, None, pieces)
        assert not torch.isfinite(losses.loss)


@needs_cpp
def test_cpp_steps_have_the_same_bits_with_any_number_of_threads(monkeypatch):
    ends = []
    for n_threads in (1, 3):
        sae = make_sae(n_latents=600)
        x = standardise(torch.randn(64, 24, generator=torch.Generator().manual_seed(1)))[0]
        monkeypatch.setattr(torch, "get_num_threads", lambda n=n_threads: n)
        one_step(sae, x, AuxK(torch.arange(9), 9, 1 / 32), "cpp", rate=1e-3, clip=0.01)
        ends.append([p.detach() for p in sae.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*ends, strict=True))


def test_without_a_compiler_torch_does_it(monkeypatch, caplog):
    caplog.set_level("INFO", logger="saint")
    sae = make_sae()
    moments = Moments(sae)
    monkeypatch.setattr(cpu.shutil, "which", lambda name: None)
    cpu.library.cache_clear()
    try:
        assert make_step("auto", sae, moments, ALONE).name == "torch"
        assert "no C++ compiler" in caplog.text
        with pytest.raises(UserError, match="no C\\+\\+ compiler"):
            make_step("cpp", sae, moments, ALONE)
        monkeypatch.setattr(cpu.shutil, "which", lambda name: "/bin/false")
        with pytest.raises(UserError, match="cannot compile"):
            monkeypatch.setattr(cpu, "_FLAGS", ("-O9",))
            make_step("cpp", sae, moments, ALONE)
    finally:
        cpu.library.cache_clear()
    gpu = Workers(0, 1, torch.device("cuda"))
    with pytest.raises(UserError, match="works on a CPU"):
        make_step("cpp", sae, moments, gpu)
    for capability in ((7, 5), (8, 0), (9, 0)):  # bfloat16 is fast from Ampere on
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _, it=capability: it)
        step = steps.make_step("auto", sae, moments, gpu)
        assert isinstance(step, TorchStep) and step.name == "torch"
        assert (step.encoder is not None) == (capability >= (8, 0))
