"""`--kernels torch` as a GPU runs it: with the rounded product, without a wait, with one result."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from sae import standardise
from saint.kernels import fastest
from saint.training.objectives import OBJECTIVES
from saint.training.trainer import Trainer
from tests.support.training_checks import (
    ALONE,
    WEIGHTS,
    make_sae,
    needs_cpp,
    one_step,
    reference,
    relative,
)
from tests.support.training_ranks import RECIPE
from tests.support.waits import waits_of

N_LATENTS = 300


@pytest.fixture(autouse=True)
def rounded_as_on_a_gpu(monkeypatch):
    monkeypatch.setattr(fastest, "has_rounded_product", lambda device: True)


def trainer_of(kernels: str = "torch", **changes) -> Trainer:
    recipe = replace(RECIPE, n_latents=N_LATENTS, **{"beta2": 0.99, "lazy": True} | changes)
    activation = OBJECTIVES[recipe.objective].activation
    sae = make_sae(n_latents=N_LATENTS, activation=activation)
    return Trainer(sae, recipe, 40, ALONE, kernels)


def batches(n: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    mixing = torch.randn(40, 24, generator=generator)
    parts = [torch.randn(64, 40, generator=generator).relu() ** 3 @ mixing for _ in range(n)]
    return [standardise(x)[0] for x in parts]


def test_gradients_equal_float64_autograd():
    sae, x = make_sae(n_latents=N_LATENTS), batches(1)[0]
    wanted = reference(sae, x, None)
    losses, gradients, _ = one_step(sae, x, None, "torch")
    assert float(losses.loss) == pytest.approx(float(wanted.loss), rel=1e-5)
    for name in WEIGHTS:
        assert relative(gradients[name], wanted.gradients[name]) < 1e-5, name


@needs_cpp
@pytest.mark.parametrize("name", OBJECTIVES)
def test_twenty_steps_are_those_of_cpp_and_have_the_same_bits_twice(name):
    ends = []
    for kernels in ("torch", "torch", "cpp_float32"):
        trainer = trainer_of(kernels, objective=name, dead_tokens=300)
        losses = [float(trainer.step_on([x])[0].loss) for x in batches(20)]
        ends.append((losses[-1], [p.detach() for p in trainer.sae.parameters()]))
    assert len(trainer.dead) > 0, "AuxK took part"
    assert all(torch.equal(a, b) for a, b in zip(ends[0][1], ends[1][1], strict=True))
    assert ends[0][0] == pytest.approx(ends[2][0], rel=1e-3)


@pytest.mark.parametrize("lazy", [False, True])
@pytest.mark.parametrize("moments", ["float32", "int8"])
def test_a_step_of_topk_waits_for_nothing(lazy, moments):
    how = {"objective": "topk", "dead_tokens": 64 * 10_000}  # the dead are listed rarely
    trainer, x = trainer_of(lazy=lazy, moments=moments, **how), batches(1)[0]
    trainer.tokens_since_fired[:9] = trainer.recipe.dead_tokens
    trainer.step_on([x])
    assert len(trainer.dead) == 9
    assert not waits_of(lambda: trainer.step_on([x[:32], x[32:]]))


@pytest.mark.parametrize("name", [name for name in OBJECTIVES if name != "topk"])
def test_a_number_of_latents_that_varies_is_all_that_is_waited_for(name):
    """For the number above the cut and, where thresholds are the rule, for unsure tokens."""
    trainer, x = trainer_of(objective=name, dead_tokens=64 * 10_000), batches(1)[0]
    trainer.step_on([x])
    waits = waits_of(lambda: trainer.step_on([x]))
    # Once more for tokens that have more than twice as many as the mean, which these have.
    assert waits == ({"nonzero": 1, "tolist": 1} if name == "jumprelu" else {"tolist": 3})
