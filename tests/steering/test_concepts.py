"""Concepts: found in a store or by the model, written down, named in settings, steered with."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load

from saint.evidence.token_index import StoredTokens, write_token_index
from saint.stage.errors import UserError
from saint.steering.completions import complete_pairs
from saint.steering.concepts import (
    ConceptFinder,
    average_over_store,
    core_of,
    find_concept,
    load_concepts,
    reshaped,
    search_concepts,
    spellings,
    total_move,
)
from saint.steering.settings import (
    Concept,
    ConceptSetting,
    Request,
    Setting,
    parse_concept_setting,
    parse_setting,
    request_from_json,
    split_steer,
)
from saint.steering.studio import build_edits, concept_vector
from saint.steering.vector import export_vector, write_control_vector
from tests.support.tiny_concepts import TinyStore, make_studio_of_other_sae
from tests.support.tiny_steering import D_MODEL, make_studio, one_thread, write_model


@pytest.fixture(scope="module", autouse=True)
def threads():
    with one_thread():
        yield


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    return make_studio(write_model(tmp_path_factory.mktemp("concepts") / "model"))


@pytest.fixture(scope="module")
def store(loaded, tmp_path_factory):
    return TinyStore(tmp_path_factory.mktemp("store"), loaded[0])


def every_place(store, form):
    """Where a token sequence stands, by looking everywhere; not across shards' own order."""
    ids = [i for tokens, _ in store.texts for i in tokens]
    n = len(form)
    return {
        i + offset for i in range(len(ids) - n + 1) if ids[i : i + n] == form for offset in range(n)
    }


def test_the_index_finds_what_a_scan_finds(loaded, store, tmp_path):
    path = tmp_path / "token_index.safetensors"
    write_token_index(path, store)
    indexed, scanned = StoredTokens(store, path), StoredTokens(store)
    for word in ("court", "nuclear treaty", "diplomats", "zebra"):
        forms = spellings(loaded[0], word)
        expected = sorted(set().union(*(every_place(store, form) for form in forms)))
        assert indexed.find(forms, limit=10_000).tolist() == expected
        assert scanned.find(forms, limit=10_000).tolist() == expected
    rows = indexed.find(spellings(loaded[0], "court"), limit=100)
    flat = torch.cat([x for _, x in store.texts])
    got = indexed.activations(rows).float()
    assert torch.allclose(got, flat[rows.tolist()], rtol=0.01, atol=0.01)
    # A window stays within its sentence: the first one's is cut where that begins.
    first = store.texts[0][0]
    assert indexed.around(np.array([1]), before=2, after=3)[0] == first[:4]
    assert indexed.around(np.array([len(first) - 1]), before=2, after=3)[0] == first[-3:]


def test_the_index_keeps_the_first_rows_of_each_token(store, tmp_path):
    path = tmp_path / "token_index.safetensors"
    write_token_index(path, store, limit=4)
    ids = np.array([i for tokens, _ in store.texts for i in tokens])
    for token in np.unique(ids):
        expected = np.flatnonzero(ids == token)[:4]
        assert StoredTokens(store, path).rows_of(int(token)).tolist() == expected.tolist()


def test_a_concept_is_the_difference_of_means_and_the_latents_that_rise(loaded, store):
    studio = loaded[0]
    sae, stored = studio.dictionaries[0].sae, StoredTokens(store)
    average = average_over_store(sae, stored)
    concept = find_concept(studio, "court", stored=stored, average=average, n_latents=6)
    # Independently: float64, dense activations, a loop over places.
    flat = torch.cat([x for _, x in store.texts]).to(torch.bfloat16).double()
    z = (flat - flat.mean(1, keepdim=True)) / (flat.std(1, keepdim=True) + sae.config.norm_eps)
    places = sorted(set().union(*(every_place(store, f) for f in spellings(studio, "court"))))
    own, unit = z[places], torch.zeros(z.shape[1], dtype=torch.float64)
    for step in (0, -1, 1):
        beside = z[[min(max(place + step, 0), len(z) - 1) for place in places]]
        move = beside.mean(0) - z.mean(0)
        unit += move / move.norm()
    unit /= unit.norm()
    assert torch.tensor(concept.means).double() @ unit > 0.9999
    acts = []
    for rows in (own, z):
        values, indices = sae.encode(rows.float()).matrices()
        acts.append(
            torch.zeros(len(rows), sae.config.n_latents).scatter(1, indices, values).mean(0)
        )
    raised = acts[0] - acts[1]
    assert set(concept.latents) == set(raised.topk(6).indices.tolist())
    assert all(weight > 0 for weight in concept.weights)
    vector = torch.tensor(concept.weights) @ sae.W_dec[list(concept.latents)]
    assert torch.linalg.vector_norm(vector) == pytest.approx(1, abs=1e-4)
    assert sum(concept.shares) == pytest.approx(float(vector.double() @ unit), abs=1e-3)
    assert concept.explained == pytest.approx(max(0, sum(concept.shares)) ** 2, abs=1e-3)
    assert "places in the store" in concept.source


def test_without_a_store_and_for_two_texts_the_model_reads(loaded):
    studio = loaded[0]
    word = find_concept(studio, "court")
    assert word.source.startswith("made-up") and word.n_tokens == 6 * len(
        studio.tokenizer.encode(" court", bos=False)
    )
    text = find_concept(studio, "Senior diplomats met to discuss the nuclear treaty and court")
    assert text.source == "the text, read by the model"
    pair = find_concept(studio, "the nuclear treaty", against="the court ruling", use="means")
    hook = studio.dictionaries[0].hook
    sides = []
    for side in ("the nuclear treaty", "the court ruling"):
        ids = studio.encode(side, chat=False)
        x = studio.model.capture(torch.tensor([ids]), [hook])[hook][0, 1:].double()
        sides.append(((x - x.mean(1, keepdim=True)) / x.std(1, keepdim=True)).mean(0))
    difference = sides[0] - sides[1]
    cosine = torch.tensor(pair.means).double() @ difference / difference.norm()
    assert cosine > 0.999
    for bad in ("", "  "):
        with pytest.raises(UserError, match="write a word"):
            find_concept(studio, bad)


def test_what_is_added_is_the_dose_along_the_unit_direction(loaded):
    """add, set and ablate against coordinates worked out in float64; BOS is left alone."""
    studio = loaded[0]
    dictionary = studio.dictionaries[0]
    concept = find_concept(studio, "court", n_latents=4)
    vector = concept_vector(dictionary, concept).double()
    x = torch.randn(2, 5, D_MODEL, generator=torch.Generator().manual_seed(3))
    positions = torch.arange(5).expand(2, 5)

    def coordinate(t):
        mean, std = x.double().mean(-1, keepdim=True), x.double().std(-1, keepdim=True)
        return ((t.double() - mean) / std) @ vector

    before = coordinate(x)
    expected = {
        ("add", 3.0): before + 3.0,
        ("set", 2.0): torch.full_like(before, concept.base + 2.0),
        ("ablate", 0.0): before.clamp_max(concept.base),
    }
    for (mode, dose), wanted in expected.items():
        edits = build_edits(
            studio, (), concepts=(ConceptSetting(concept, mode, dose),), where="both",
            prompt_lengths=[5, 5],
        )  # fmt: skip
        after = edits[dictionary.hook](x, positions)
        assert torch.equal(after[:, 0], x[:, 0])
        assert torch.allclose(coordinate(after)[:, 1:], wanted[:, 1:], atol=1e-4)


def test_settings_read_and_written(loaded):
    assert split_steer(["896=+1.5", "1:2=off", "film=+8", "World War 2=off"]) == (
        ["896=+1.5", "1:2=off"],
        ["film=+8", "World War 2=off"],
    )
    assert parse_concept_setting("film=+8") == ("film", "add", 8.0)
    assert parse_concept_setting("cold war=-2.5") == ("cold war", "add", -2.5)
    assert parse_concept_setting("film=3") == ("film", "set", 3.0)
    assert parse_concept_setting("film=off") == ("film", "ablate", 0.0)
    for bad in ("film=", "film=loud", "film=*2", "=+8", "film=+nan", "film=+9999"):
        with pytest.raises(UserError):
            name, mode, dose = parse_concept_setting(bad)
            ConceptSetting(Concept(name, (1,), (1.0,)), mode, dose)
    concept = find_concept(loaded[0], "court", use="means")
    request = Request(
        ("the",), (Setting(3, "add", 1.5),), concepts=(ConceptSetting(concept, "add", 4.0),)
    )
    read = request_from_json(json.loads(json.dumps(request.to_json())))
    assert read.settings == request.settings == (parse_setting("3=+1.5"),)
    again = read.concepts[0]
    assert (again.mode, again.dose, again.concept.latents) == ("add", 4.0, concept.latents)
    assert np.allclose(again.concept.means, concept.means, atol=1e-3)
    record = request.to_json() | {"concepts": {}}
    with pytest.raises(UserError, match="do not say what it is"):
        request_from_json(record)
    for damage in ({"latents": 3}, {"latents": {"3": {"weight": "x", "share": 0}}}, None):
        with pytest.raises(UserError):
            request_from_json(request.to_json() | {"concepts": {"court": damage}})


def test_saved_named_searched_and_turned_up(loaded, tmp_path):
    studio, guides = loaded
    path = tmp_path / "concepts.yaml"
    finder = ConceptFinder(studio, guides, [None], path)
    finder.save(finder.find("court", name="the law"))
    finder.save(finder.find("nuclear"))
    again = ConceptFinder(studio, guides, [None], path)
    assert list(again.saved) == ["the law", "nuclear"]
    assert [c.name for c in search_concepts(again.saved, "court")] == ["the law"]
    wishes = (again.setting("the law=+4"), again.setting("treaty=+2"))
    assert wishes[1].concept.name == "treaty"
    request = Request(("Senior diplomats met to",), concepts=wishes, max_new_tokens=4)
    (pair,) = complete_pairs(studio, request)
    (share,) = pair.moved.values()
    (total,) = total_move(studio, wishes).values()
    vector = sum(w.dose * concept_vector(studio.dictionaries[0], w.concept) for w in wishes)
    assert total == pytest.approx(float(torch.linalg.vector_norm(vector)), rel=1e-4)
    assert 0 < share < 2 * total / (D_MODEL - 1) ** 0.5
    other = make_studio_of_other_sae(studio)
    with pytest.raises(UserError, match="another SAE"):
        load_concepts(path, other)
    path.write_text("- 1\n")
    with pytest.raises(UserError, match="not a mapping"):
        load_concepts(path, studio)


def test_dose_0_changes_nothing(loaded):
    concept = find_concept(loaded[0], "court")
    request = Request(("the court",), concepts=(ConceptSetting(concept, "add", 0.0),))
    (pair,) = complete_pairs(loaded[0], request)
    assert pair.plain.text == pair.steered.text and list(pair.moved.values()) == [0.0]


def test_exported_vectors_hold_latents_and_concepts(loaded, tmp_path):
    studio = loaded[0]
    concept = find_concept(studio, "court")
    wishes = (ConceptSetting(concept, "add", 4.0),)
    vector = load(export_vector(studio, (Setting(3, "add", 1.5),), wishes))["vector"]
    dictionary = studio.dictionaries[0]
    expected = 4.0 * concept_vector(dictionary, concept)
    expected += 1.5 * dictionary.units[3] * dictionary.sae.W_dec[3]
    assert torch.allclose(vector, expected, atol=1e-5)
    with pytest.raises(UserError, match="no place"):  # layer 1's input is block 0's output
        write_control_vector(tmp_path / "x.gguf", studio, (), wishes)


def test_a_control_vector_for_llama_cpp(loaded, tmp_path):
    from dataclasses import replace

    from gguf import GGUFReader

    from llama_3 import HookPoint

    studio = loaded[0]
    deeper = replace(studio.dictionaries[0], hook=HookPoint(3, "resid_pre"))
    studio = replace(studio, dictionaries=(deeper,))
    wishes = (ConceptSetting(find_concept(studio, "court"), "add", 4.0),)
    path = tmp_path / "court.gguf"
    write_control_vector(path, studio, (), wishes)
    (tensor,) = GGUFReader(path).tensors
    assert tensor.name == "direction.2"
    unit = concept_vector(deeper, wishes[0].concept).numpy()
    ratio = np.array(tensor.data) / (4.0 * unit)
    assert np.allclose(ratio, ratio.mean(), rtol=1e-3) and ratio.mean() > 0


def test_wishes_and_misspelt_words_are_read_for_what_they_mean(loaded, store):
    assert core_of("talk like a lawyer") == core_of("Write about the lawyer") == "lawyer"
    for query in ("lawyer", "talk", "the court ruling", "say what I want you to say today"):
        assert core_of(query) == query
    finder = ConceptFinder(loaded[0], loaded[1], [StoredTokens(store)])
    assert finder.respelt("cuort", 0) == "court" and finder.respelt("court", 0) == "court"
    assert finder.respelt("zebra", 0) == "zebra"
    concept, right = finder.find("talk like a cuort"), finder.find("court")
    assert concept.name == "talk like a cuort" and "read as “court”" in concept.source
    assert concept.means == right.means
    assert ConceptFinder(loaded[0], loaded[1], [None]).respelt("cuort", 0) == "cuort"


def test_a_reshaped_concept_is_the_one_made_of_fewer_latents(loaded, store):
    studio, stored = loaded[0], StoredTokens(store)
    dictionary = studio.dictionaries[0]
    average = average_over_store(dictionary.sae, stored)
    eight, six = (
        find_concept(studio, "court", stored=stored, average=average, n_latents=n) for n in (8, 6)
    )
    again = reshaped(dictionary, eight, average.z, six.latents, "latents")
    assert again.latents == six.latents
    for name in ("weights", "shares", "base", "explained"):
        assert np.allclose(getattr(again, name), getattr(six, name), atol=1e-4), name
    assert torch.allclose(concept_vector(dictionary, again), concept_vector(dictionary, six))


def test_readings_and_effects_of_a_concept_are_its_coordinate(loaded, store):
    studio = loaded[0]
    concept = find_concept(studio, "court", stored=StoredTokens(store), use="means")
    wish = ConceptSetting(concept, "add", 5.0)
    request = Request(("the nuclear court",), concepts=(wish,), max_new_tokens=3)
    (pair,) = complete_pairs(studio, request)
    hook = studio.dictionaries[0].hook
    ids = torch.tensor([pair.plain.ids])
    x = studio.model.capture(ids, [hook])[hook][0].double()
    z = (x - x.mean(1, keepdim=True)) / x.std(1, keepdim=True)
    expected = (z @ torch.tensor(concept.means).double() - concept.base) / concept.length
    got = [values[0] for values in pair.plain.activations]
    assert got == pytest.approx(expected[1:].tolist(), abs=1e-3)
    (effect,) = pair.effects
    assert effect.present is not None and effect.realised is not None
    assert effect.target is not None
    assert effect.setting == wish and effect.target == pytest.approx(effect.present + 5.0, abs=1e-4)
    # The edit lengthens the activation, by which it is standardised again.
    assert effect.present < effect.realised < effect.target
