"""Adam's moments in 8 bits: the format, and steps that use it, against float32 moments."""

from __future__ import annotations

import math

import pytest
import torch

from sae import standardise
from saint.kernels.cpu import is_available
from saint.training import moments
from saint.training.moments import Moments, from_codes, to_codes, uniform
from saint.training.trainer import Trainer
from tests.support.training_checks import ALONE, make_sae, needs_cpp
from tests.support.training_ranks import RECIPE

KERNELS = (*(("cpp",) if is_available() else ()), "torch", "dense")
MASK = 0xFFFFFFFF


def row_kinds() -> tuple[torch.Tensor, torch.Tensor]:
    """Rows as moments may be: random, zero, with outliers, tiny, denormal."""
    generator = torch.Generator().manual_seed(0)
    m = torch.randn(7, 301, generator=generator)
    m[1] = 0
    m[2, 5] = 1e6
    m[3] *= 1e-25
    m[4] *= 1e-40
    m[5, ::2] = 0
    m[6, 7] = 1e-41
    return m, (m.double() ** 2 / 50).float()


def test_codes_decode_within_one_step_and_are_right_on_average():
    m, v = row_kinds()
    sum_m, sum_v, n = torch.zeros_like(m).double(), torch.zeros_like(m).double(), 2000
    for step in range(n):
        first, second, scales = to_codes(m, v, *uniform(step, 1, torch.arange(7), m))
        m8, v8 = from_codes(first, second, scales.unsqueeze(2))
        scale_m, scale_v = (s.unsqueeze(1).double() for s in scales)
        # The gap between neighbours, at most: s · (2c + 1) / 127² and s · 4 (c + 1)³ / 255⁴.
        gap_m = scale_m * (2 * (first.double().abs() + 1)) / 127**2 + 1e-30
        gap_v = scale_v * 4 * (second.double() + 2) ** 3 / 255**4 + 1e-30
        assert ((m8 - m).abs() <= gap_m).all() and ((v8 - v).abs() <= gap_v).all()
        assert (
            (second[v > 1e-25] > 0).all() and not first[[1, 4]].any() and not second[[1, 4]].any()
        )
        sum_m, sum_v = sum_m + m8, sum_v + v8
    noise = 5 / math.sqrt(n)
    assert ((sum_m / n - m).abs() <= noise * (gap_m + 2 * scale_m / 127**2) + 1e-30).all()
    # The least code above 0 stands for all that is smaller: 2.4e-10 of the scale too much.
    assert ((sum_v / n - v).abs() <= noise * gap_v + scale_v * 1.1 / 255**4 + 1e-30).all()


def mixed(h: int) -> int:
    h = (h ^ h >> 16) * 0x7FEB352D & MASK
    h = (h ^ h >> 15) * 0x846CA68B & MASK
    return h ^ h >> 16


def test_the_random_numbers_are_those_that_are_documented():
    step, rows = 3_000_000_000, torch.arange(65_530, 65_533)
    for tensor in (0, 1):
        first, second = uniform(step, tensor, rows, torch.empty(3, 70))
        for i, row in enumerate(range(65_530, 65_533)):
            for column in range(70):
                key = mixed(mixed(2 * step + tensor & MASK) ^ row)
                h = mixed(key + column & MASK)
                assert float(first[i, column]) == pytest.approx(((h >> 16) + 0.5) / 65536)
                assert float(second[i, column]) == pytest.approx(((h & 0xFFFF) + 0.5) / 65536)
    assert abs(float(first.mean()) - 0.5) < 0.1 and abs(float(second.mean()) - 0.5) < 0.1


def trainer_of(kernels: str, kind: str) -> Trainer:
    sae = make_sae(n_latents=200)
    return Trainer(sae, RECIPE.__class__(**RECIPE.__dict__ | {"n_latents": 200, "moments": kind}),
                   60, ALONE, kernels)  # fmt: skip


def batches(n_steps: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    mixing = torch.randn(40, 24, generator=generator)
    parts = [torch.randn(64, 40, generator=generator).relu() ** 3 @ mixing for _ in range(n_steps)]
    return [standardise(x)[0] for x in parts]


def losses_of(trainer: Trainer, rows: list[torch.Tensor]) -> list[float]:
    return [float(trainer.train_step(batch, 64)[0].loss) for batch in rows]


@pytest.mark.parametrize("kernels", KERNELS)
def test_the_run_stays_close_to_that_with_float32_moments(kernels):
    rows = batches(60)
    coded, plain = (trainer_of(kernels, kind) for kind in ("int8", "float32"))
    begin = {name: p.detach().clone() for name, p in plain.sae.named_parameters()}
    mine, theirs = losses_of(coded, rows), losses_of(plain, rows)
    assert mine[19] == pytest.approx(theirs[19], rel=0.01)
    assert mine[59] == pytest.approx(theirs[59], rel=0.01)
    for name, p in plain.sae.named_parameters():
        moved = (p - begin[name]).norm()
        away = (dict(coded.sae.named_parameters())[name] - p).norm()
        assert away < 0.1 * moved, (name, float(away / moved))
    assert {n: t.dtype for n, t in coded.moments.second.items()} == {
        "W_enc": torch.uint8, "W_dec": torch.uint8, "b_enc": torch.float32, "b_pre": torch.float32,
    }  # fmt: skip


@pytest.mark.parametrize("kernels", KERNELS)
def test_what_adam_divides_by_is_never_rounded_to_nothing(kernels):
    trainer = trainer_of(kernels, "int8")
    (rows,) = batches(1)
    rows[:, 3] = (rows.sum(dim=1) - rows[:, 3]) / 23  # 0 once standardised
    with torch.no_grad():
        trainer.sae.b_pre[3] = 1e-6
    losses_of(trainer, [rows])
    learned = trainer.moments.scales["W_enc"][1] > 0
    codes = trainer.moments.second["W_enc"][learned]
    assert len(codes) > 50 and (codes[:, 3] == 1).all() and codes.max() == 255


@needs_cpp
def test_cpp_and_torch_make_the_same_codes(monkeypatch):
    monkeypatch.setattr(moments, "_BLOCK_ELEMENTS", 24 * 37)  # several blocks, the last one short
    ends = []
    for kernels in ("cpp_float32", "torch"):
        trainer = trainer_of(kernels, "int8")
        losses_of(trainer, batches(3))
        ends.append(trainer)
    cpp, by_torch = (t.moments for t in ends)
    for name in ("W_enc", "W_dec"):
        torch.testing.assert_close(cpp.scales[name], by_torch.scales[name], rtol=1e-4, atol=0)
        for mine, theirs in (
            (cpp.first[name], by_torch.first[name]),
            (cpp.second[name], by_torch.second[name]),
        ):
            apart = (mine.int() - theirs.int()).abs()
            assert mine.any() and apart.max() <= 1 and (apart > 0).double().mean() < 2e-3
    for mine, theirs in zip(*(t.sae.parameters() for t in ends), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-4)


@pytest.mark.parametrize("kernels", KERNELS)
def test_a_checkpoint_continues_with_the_same_bits(kernels, tmp_path):
    rows = batches(8)
    whole, before, after = (trainer_of(kernels, "int8") for _ in range(3))
    losses_of(whole, rows)
    losses_of(before, rows[:5])
    torch.save(before.state(), tmp_path / "5.pt")
    after.restore(after.read([tmp_path / "5.pt"]))
    losses_of(after, rows[5:])
    for name in whole.moments.first:
        for kind in ("first", "second", "scales"):
            mine, theirs = (getattr(t.moments, kind) for t in (after, whole))
            assert name not in theirs or torch.equal(mine[name], theirs[name]), (kind, name)
    for mine, theirs in zip(after.sae.parameters(), whole.sae.parameters(), strict=True):
        assert torch.equal(mine, theirs)


def test_moments_take_a_byte_each_and_a_scale_per_row():
    state = Moments(make_sae(n_latents=200), "int8")
    for name in ("W_enc", "W_dec"):
        tensors = (state.first[name], state.second[name], state.scales[name])
        assert sum(t.nbytes for t in tensors) == 2 * 200 * 24 + 2 * 4 * 200
