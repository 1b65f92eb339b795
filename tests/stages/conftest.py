"""The whole pipeline's files."""

from pathlib import Path

import pytest

from tests.support.pipeline import evaluate_args, run_twice, train_args


@pytest.fixture(scope="session")
def root(root: Path) -> Path:
    """The directory of the fixture of that name above, with an SAE trained and evaluated."""
    run_twice("sae_training", train_args(root, root / "trained_sae.pt"))
    run_twice("sae_evaluation", evaluate_args(root))
    return root
