"""Which latents caused a token: against finite differences and a real ablation."""

import pytest
import torch

from sae import standardise
from saint.stage.errors import UserError
from saint.steering.attribution import ablate_top, attribute
from tests.support.tiny_steering import make_studio, one_thread, write_model

PROMPT = "Senior diplomats met to discuss"


@pytest.fixture(scope="module")
def studio(tmp_path_factory):
    with one_thread():
        yield make_studio(write_model(tmp_path_factory.mktemp("attribution") / "model"))[0]


def moved_logit(studio, found, shift):
    hook = studio.dictionaries[0].hook
    with torch.no_grad():
        logits = studio.model(torch.tensor([found.ids]), edits={hook: lambda x, p: x + shift})[
            0, -1
        ]
    return float(logits[found.token_id] - logits.mean())


def test_effects_are_the_slope_along_each_latent(studio):
    found = attribute(studio, PROMPT, token=" treaty")
    dictionary = studio.dictionaries[0]
    with torch.no_grad():
        x = studio.model.capture(torch.tensor([found.ids]), [dictionary.hook])[dictionary.hook]
    _, _, scale = standardise(x[0])
    assert found.parts and all(part.position > 0 for part in found.parts)
    sizes = [abs(part.effect) for part in found.parts]
    assert sizes == sorted(sizes, reverse=True)
    for part in found.parts[:4]:
        step = 1e-2
        shift = torch.zeros_like(x)
        direction = dictionary.sae.W_dec[part.latent] * scale[part.position] * part.activation
        shift[0, part.position] = step * direction
        slope = (moved_logit(studio, found, shift) - moved_logit(studio, found, -shift)) / (
            2 * step
        )
        assert part.effect == pytest.approx(slope, rel=0.02, abs=1e-3)


def test_the_error_term_and_the_latents_make_up_the_whole(studio):
    """Latents and error add up to the slope along x minus its mean and the SAE's bias."""
    found = attribute(studio, PROMPT)
    assert 0 < found.error_share < 1
    assert found.token in studio.tokenizer.token_text(found.token_id)
    assert len(found.parts) == 10
    everything = attribute(studio, PROMPT, n_parts=10_000)
    assert sum(p.effect for p in everything.parts) == pytest.approx(
        everything.latents_total, abs=1e-3
    )


def test_ablation_is_really_done(studio):
    found = attribute(studio, PROMPT)
    change = ablate_top(studio, found)
    assert change["expected"] == pytest.approx(-sum(p.effect for p in found.parts))
    dictionary = studio.dictionaries[0]
    with torch.no_grad():
        x = studio.model.capture(torch.tensor([found.ids]), [dictionary.hook])[dictionary.hook]
    shift = torch.zeros_like(x)
    for part in found.parts:
        scale = x[0, part.position].std() + 1e-6
        shift[0, part.position] -= part.activation * scale * dictionary.sae.W_dec[part.latent]
    still = moved_logit(studio, found, torch.zeros_like(x))
    assert change["got"] == pytest.approx(moved_logit(studio, found, shift) - still, abs=1e-4)


def test_bad_queries(studio):
    with pytest.raises(UserError, match="empty"):
        attribute(studio, "")
    with pytest.raises(UserError, match="empty"):
        attribute(studio, PROMPT, token="")
