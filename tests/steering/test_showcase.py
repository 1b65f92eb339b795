"""The showcase: which words are tried, what is counted, and what is kept."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from saint.evidence.token_index import StoredTokens
from saint.stage.errors import UserError
from saint.steering import showcase
from saint.steering.concepts import ConceptFinder
from saint.steering.effects import word_shows
from saint.steering.showcase import (
    aimed,
    candidates,
    directions,
    family_shows,
    find_showcase,
    load_families,
    load_showcase,
    passes,
    write_showcase,
)
from tests.support.tiny_concepts import TinyStore, make_studio_of_other_sae
from tests.support.tiny_steering import make_studio, one_thread, write_model


@pytest.fixture(scope="module", autouse=True)
def threads():
    with one_thread():
        yield


@pytest.fixture(scope="module")
def finder(tmp_path_factory):
    studio, guides = make_studio(write_model(tmp_path_factory.mktemp("model") / "model"))
    stored = StoredTokens(TinyStore(tmp_path_factory.mktemp("store"), studio))  # type: ignore[arg-type]
    return ConceptFinder(studio, guides, [stored])


class Texts:
    """A vocabulary and a text in it, as tokenizer and store."""

    def __init__(self, text):
        self.words = sorted(set(text))
        self.ids = np.array([self.words.index(word) for word in text])
        self.tokenizer = self

    def token_text(self, i):
        return self.words[i]

    def counts(self):
        return np.bincount(self.ids, minlength=len(self.words))

    def rows_of(self, token, *, limit):
        return np.flatnonzero(self.ids == token)[:limit]

    def token_ids(self, rows):
        return self.ids[rows]


def test_candidates_are_nouns_neither_rare_nor_everywhere():
    text = []
    for word, n in (("film", 12), ("court", 20), ("rare", 3), ("often", 15), ("house", 900)):
        before = " really" if word == "often" else " the"
        text += [before, f" {word}"] * n + [f" {word}s"] * 2
    text += [" the", " alone"] * 30 + [" filler"] * 20_000
    texts = Texts(text)
    assert candidates(texts, texts) == ["court", "film"]  # type: ignore[arg-type]


def test_what_counts_as_shown():
    assert word_shows("Two films, a filming.", "film") and not word_shows("a course", "court")
    assert family_shows("A Movie.", "film", ["movie"]) and not family_shows("move", "film", [])
    assert aimed(9.0, 0.75, 0.75) == 9.0 and aimed(9.0, 3.0, 3.0) == 6.0 and aimed(9, 0, 0) == 13.0
    row = {"share": 0.75, "plain_share": 0.0, "loss": 1.0}
    assert passes(row)
    assert not any(
        passes(row | bad) for bad in ({"share": 0.7}, {"loss": 1.1}, {"plain_share": 0.5})
    )


def test_a_showcase_is_measured_kept_and_read_again(finder, tmp_path, monkeypatch):
    monkeypatch.setattr(showcase, "_LEAST_ROWS", 3)
    monkeypatch.setattr(showcase, "SHOWN_LOSS", 99.0)
    monkeypatch.setattr(showcase, "SHOWN_SHARE", 0.0)
    monkeypatch.setattr(showcase, "N_TOKENS", 4)
    families = {"court": ["ruling"], "nuclear": [], "zebra": ["zebras"]}
    shown, tried = find_showcase(finder, families=families, seed=3)
    assert {one.concept.name for one in shown} <= {"court", "nuclear"} and shown
    assert {row["word"] for row in tried} == {"court", "nuclear"}
    for one in shown:
        words = families[one.concept.name]
        assert one.share == np.mean([text.shows for text in one.texts]) and len(one.texts) == 8
        for text in one.texts:
            assert text.shows == family_shows(text.steered, one.concept.name, words)
        assert [row["dose"] for row in one.doses] == list(showcase.DOSES)
        assert one.concept.use == "means" and one.best in one.texts
    path = tmp_path / "showcase.json"
    write_showcase(path, finder.studio, shown, tried, 3)
    again = load_showcase(path, finder.studio)
    assert [
        replace(one, concept=two.concept) for one, two in zip(again, shown, strict=True)
    ] == shown
    assert load_showcase(path, make_studio_of_other_sae(finder.studio)) == []
    assert load_showcase(tmp_path / "none.json", finder.studio) == []
    path.write_text(json.dumps(json.loads(path.read_text()) | {"concepts": [{}]}))
    with pytest.raises(UserError, match="damaged"):
        load_showcase(path, finder.studio)


def test_directions_are_the_concepts_own(finder):
    (unit,) = directions(finder, ["court"])
    assert torch.tensor(finder.find("court").means) @ unit > 0.999


def test_without_a_store_or_words_there_is_none(finder, tmp_path):
    empty = ConceptFinder(finder.studio, finder.guides, [None])
    with pytest.raises(UserError, match="--store_dir"):
        find_showcase(empty)
    with pytest.raises(UserError, match="no fitting words"):
        find_showcase(finder, families={"zebra": []})
    path = tmp_path / "families.json"
    path.write_text('{"film": {"family": ["Movie"]}}')
    assert load_families(path) == {"film": ["movie"]}
    path.write_text("[1]")
    with pytest.raises(UserError, match="no word families"):
        load_families(path)
