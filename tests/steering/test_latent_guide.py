"""Finding latents: by label, token and example text, with and without an evidence file."""

import json
from dataclasses import replace

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from sae import TopKSparseAutoencoder
from saint.evidence.file import SCHEMA, open_evidence
from saint.evidence.labels import Label
from saint.page.fragments import cards_html
from saint.stage.errors import UserError
from saint.steering.effects import Effects
from saint.steering.guide import Guide, make_guide
from saint.steering.search import (
    activation_rows,
    make_card,
    search_labels,
    search_text,
    search_token,
)
from saint.steering.settings import Setting
from tests.support.tiny_steering import N_LATENTS, make_studio, one_thread, write_model

PROMPT = "Senior diplomats met to discuss the nuclear treaty"


@pytest.fixture(scope="module", autouse=True)
def threads():
    with one_thread():
        yield


@pytest.fixture(scope="module")
def studio(tmp_path_factory):
    return make_studio(write_model(tmp_path_factory.mktemp("guide") / "model"))[0]


def bind(labels, evidence, dictionary):
    n_latents = dictionary.sae.config.n_latents
    return make_guide(labels, evidence, name=dictionary.name, n_latents=n_latents)


def evidence_row(latent, tokenizer):
    token = {4: " nuclear", 6: "<b>nuclear"}.get(latent, " other")
    example = {
        "kind": "top", "decile": 9, "split": "", "value": 2.0, "sentence_id": 1, "start": 3,
        "position": 4, "token_ids": [1, 2, 3], "tokens": [" the", token, " treaty"],
        "activations": [0.0, 2.0, 0.5],
    }  # fmt: skip
    other = example | {"tokens": [" a", " court", "."]}
    for window in (example, other):
        window["token_ids"] = [tokenizer.encode(text, bos=False)[0] for text in window["tokens"]]
    return {
        "latent": latent, "density": 0.5 if latent == 4 else 0.001, "n_firing_tokens": 3,
        "n_firing_sentences": 2, "max_activation": 2.0, "histogram": [0] * 20, "top_mean": [],
        "top_max": [], "top_last": [],
        "examples": [example, example, example | {"kind": "random"}, other],
        "promoted": [{"token": " bomb", "value": 1.0}] if latent == 4 else [], "suppressed": [],
        "neighbours": [], "coactive": [],
    }  # fmt: skip


@pytest.fixture(scope="module")
def evidence(tmp_path_factory, studio):
    path = tmp_path_factory.mktemp("evidence") / "evidence.parquet"
    meta = {b"saint": json.dumps({"format": "saint.evidence", "version": 1}).encode()}
    rows = [evidence_row(i, studio.tokenizer) for i in range(N_LATENTS)]
    pq.write_table(pa.Table.from_pylist(rows, schema=SCHEMA.with_metadata(meta)), path)
    return open_evidence(path)


def test_labels_rank_whole_words_before_parts_and_short_before_long(studio):
    labels = {
        1: Label("nuclear weapons and the treaties about them in many countries", 0.9),
        2: Label("nuclear weapons", 0.9),
        3: Label("thermonuclear fusion", 0.9),
        4: Label("court rulings", 1.0),
    }
    hits = search_labels(studio, [Guide(labels)], "Nuclear weapon")
    assert [hit.latent for hit in hits] == [2, 1, 3]
    assert search_labels(studio, [Guide(labels)], "") == []
    assert search_labels(studio, [Guide()], "nuclear") == []


def test_tokens_are_found_through_the_evidence_and_the_weights(studio, evidence):
    guide = bind({}, evidence, studio.dictionaries[0])
    hits = search_token(studio, [guide], "Nuclear ")
    assert hits[0].latent == 4 and hits[0].score == pytest.approx(2 / 3)
    assert "67%" in hits[0].reason
    without = search_token(studio, [Guide()], "nuclear", limit=3)
    model, sae = studio.model, studio.dictionaries[0].sae
    ids = [studio.tokenizer.encode(form, bos=False)[0] for form in ("nuclear", " nuclear")]
    rows = (model.unembedding[ids] * model.norm.weight).double()
    cosines = torch.nn.functional.cosine_similarity(
        sae.W_dec.double()[:, None], rows[None], dim=-1
    ).amax(1)
    assert [hit.latent for hit in without] == cosines.topk(3).indices.tolist()
    assert search_token(studio, [Guide()], "  ") == []


def test_example_texts_rank_by_activation_and_rarity(studio):
    dictionary = studio.dictionaries[0]
    ids = studio.encode(PROMPT, chat=False)
    x = studio.model.capture(torch.tensor([ids]), [dictionary.hook])[dictionary.hook][0, 1:]
    z = (x - x.mean(-1, keepdim=True)) / (x.std(-1, keepdim=True) + 1e-6)
    values, indices = dictionary.sae.encode(z).matrices()
    dense = torch.zeros(len(z), N_LATENTS).scatter(1, indices, values)
    relative = dense.amax(0) / dictionary.units
    hits = search_text(studio, [Guide()], PROMPT, limit=6)
    assert [hit.latent for hit in hits] == relative.topk(6).indices.tolist()
    assert hits[0].score == pytest.approx(min(1.0, float(relative.max())), rel=1e-4)
    # A latent that fires on half of the tokens says little about this text.
    densities = [0.001] * N_LATENTS
    densities[hits[0].latent] = 0.5
    weighted = relative * -torch.tensor(densities).log10() / 4
    rare = search_text(studio, [Guide(densities=densities)], PROMPT, limit=6)
    assert [hit.latent for hit in rare] == weighted.topk(6).indices.tolist()
    assert rare[0].latent != hits[0].latent


def test_rows_match_the_sae_and_leave_bos_out(studio):
    settings = [Setting(3), Setting(5)]
    tokens, rows = activation_rows(studio, PROMPT, settings)
    assert "".join(tokens) == PROMPT and [s for s, _ in rows] == settings
    dictionary = studio.dictionaries[0]
    ids = torch.tensor([studio.encode(PROMPT, chat=False)])
    x = studio.model.capture(ids, [dictionary.hook])[dictionary.hook][0, 1:]
    z = (x - x.mean(-1, keepdim=True)) / (x.std(-1, keepdim=True) + 1e-6)
    expected = dictionary.sae.latent_activations(z, torch.tensor([5]))[:, 0] / dictionary.units[5]
    assert rows[1][1] == pytest.approx(expected.tolist(), abs=1e-5)


def test_cards_hold_windows_in_units_and_escape_everything(studio, evidence):
    guides = [bind({6: Label("<script>x</script>", 0.5, 0.8)}, evidence, studio.dictionaries[0])]
    card = make_card(studio, guides, 0, 6)
    unit = float(studio.dictionaries[0].units[6])
    assert card.windows[0][1] == pytest.approx([0.0, 2.0 / unit, 0.5 / unit])
    assert len(card.windows) == 3 and card.density == pytest.approx(0.001)
    assert len(card.promoted) == 8, "from the weights where the evidence has none"
    assert make_card(studio, guides, 0, 4).promoted == [" bomb"]
    html = cards_html([(card, None)], n_saes=1)
    assert "<script>" not in html and "<b>nuclear" not in html and "&lt;b&gt;nuclear" in html
    assert "80% right" in html
    assert "odd one out" not in html


def test_a_latent_that_was_tested_but_not_named_shows_its_score_and_is_no_label(studio, evidence):
    scores = {"scores": {"intruder": {"accuracy": 0.6, "ci_low": 0.3, "ci_high": 0.8, "n": 5}}}
    guide = bind({6: Label("", extra=scores)}, evidence, studio.dictionaries[0])
    assert not guide.labels
    assert search_labels(studio, [guide], "latent") == []
    html = cards_html([(make_card(studio, [guide], 0, 6), None)], n_saes=1)
    assert "latent 6" in html and "odd one out found in 60% (chance 20%)" in html


def test_only_latents_that_were_seen_to_show_are_examples():
    rows = [(4, True, 0.8, "court"), (7, True, 0.9, "film"), (8, False, 0.9, "war")]
    rows += [(9, True, 0.75, "courts")]  # the same word
    known = {
        latent: {"latent": latent, "shows": shows, "share": share, "text_loss": 0.5, "word": word}
        for latent, shows, share, word in rows
    }
    guide = Guide(effects=Effects({}, known))
    assert guide.shown(4) == [7, 4] and guide.shown(1) == [7]
    assert Guide().shown(3) == []
    assert guide.measured(7) == "turned up, “film” shows in 90% of texts"
    known[7] |= {"share": None, "rising": [{"token": " movie", "value": 0.1}]}
    assert guide.measured(7) == "turned up, it raises movie"
    assert guide.measured(3) == Guide().measured(3) == ""


def test_labels_and_evidence_of_another_sae_are_refused(studio, evidence):
    with pytest.raises(UserError, match="labels name latent 64"):
        bind({64: Label("x")}, None, studio.dictionaries[0])
    dictionary = studio.dictionaries[0]
    small = TopKSparseAutoencoder(replace(dictionary.sae.config, n_latents=32))
    other = replace(dictionary, sae=small, units=torch.ones(32))
    with pytest.raises(UserError, match="describes 64 latents"):
        bind({}, evidence, other)
