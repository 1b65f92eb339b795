"""Fixtures of several test files."""

from pathlib import Path

import pytest

from tests.support.interpretation_workplace import Workplace
from tests.support.pipeline import capture_args, preprocess_args, run_twice, write_dataset
from tests.support.tiny_steering import write_model


@pytest.fixture
def work(tmp_path: Path):
    place = Workplace(tmp_path)
    yield place
    place.api.close()


@pytest.fixture(scope="session")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model and dataset, captured and preprocessed once; tests leave it as it is."""
    root = tmp_path_factory.mktemp("pipeline")
    write_model(root / "model")
    write_dataset(root / "data")
    run_twice("capture_activations", capture_args(root, root / "acts"))
    run_twice("sae_preprocessing", preprocess_args(root))
    return root
