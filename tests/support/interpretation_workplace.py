"""A directory, a server and the three interpretation stages, for their tests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from tests.support.interpretation_data import row, write_evidence
from tests.support.mock_batches import MockApi
from tests.support.program import Finished, call


class Workplace:
    """A directory with evidence, a server, and the three stages."""

    def __init__(self, directory: Path, *, n_latents: int = 4) -> None:
        self.directory = directory
        self.tops = directory / "tops"
        self.rows = [row(i) for i in range(n_latents)]
        write_evidence(self.tops / "evidence.parquet", self.rows)
        self.yaml = self.tops / "top_sentences_max.yaml"
        self.ids = self.tops / "response_ids.yaml"
        self.output = directory / "output"
        self.labels = self.output / "parsed_responses.yaml"
        self.api = MockApi()
        self.calls: list[Finished] = []

    def _call(self, stage: str, *args: object, env: dict[str, str] | None = None) -> Finished:
        env = self.api.env if env is None else env
        done = call(stage, *args, env=env)
        self.calls.append(done)
        return done

    def send(self, *args: object, env: dict[str, str] | None = None) -> Finished:
        files = ("--top_sentences_dict_filepath", self.yaml, "--response_ids_filepath", self.ids)
        quick = ("--settle_s", 0.3)
        return self._call("interpret_top_sentences_send_batches", *files, *quick, *args, env=env)

    def retrieve(self, *args: object, env: dict[str, str] | None = None) -> Finished:
        files = ("--response_ids_filepath", self.ids, "--response_output_dir", self.output)
        waiting = ("--wait", "--poll_interval_s", 0.02, "--max_poll_interval_s", 0.1)
        waiting += ("--settle_s", 0.3)
        return self._call(
            "interpret_top_sentences_retrieve_batches", *files, *waiting, *args, env=env
        )

    def parse(self, *args: object) -> Finished:
        return self._call(
            "interpret_top_sentences_parse_responses",
            "--response_ids_filepath",
            self.ids,
            "--retrieved_responses_dir",
            self.output,
            "--parsed_responses_output_filepath",
            self.labels,
            *args,
            env={},
        )

    def top_tokens(self, *, with_answers: bool = False) -> Finished:
        answers = ("--response_ids_filepath", self.ids, "--retrieved_responses_dir", self.output)
        return self._call(
            "interpret_top_sentences_parse_responses",
            "--from_top_tokens",
            *("--evidence_path", self.tops / "evidence.parquet"),
            *("--parsed_responses_output_filepath", self.labels),
            *(answers if with_answers else ()),
            env={},
        )

    def everything(self, *args: object) -> dict[int, Any]:
        for done in (self.send(*args), self.retrieve(), self.parse()):
            assert done.returncode == 0, done.stderr
        return yaml.safe_load(self.labels.read_text())

    def records(self) -> dict[str, Any]:
        ids = yaml.safe_load(self.ids.read_text())
        found: dict[str, Any] = {}
        for batch_id in ids:
            found |= yaml.safe_load((self.output / f"{batch_id}.yaml").read_text())
        return found

    def files(self) -> list[Path]:
        return sorted(
            p for p in self.directory.rglob("*") if p.is_file() and "terminal" not in p.name
        )


def error_of(done: Finished) -> str:
    """The one line of an expected error."""
    assert done.returncode == 1, done.stderr
    assert "Traceback" not in done.stderr
    assert done.last_line.startswith("error: ")
    return done.last_line
