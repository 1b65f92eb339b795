"""From a word, a phrase, sentences or two texts to a concept: a few latents and a direction.

The direction is a difference of means (Belrose, "Diff-in-means concept editing is worst-case
optimal"; Marks and Tegmark, arXiv:2310.06824): the mean standardised activation of the query's
tokens minus that of all tokens. For a word, the tokens before and after it have a difference of
their own, and the direction is the mean of the three units: it shows more often in the text at
equal loss, since the token before is where the model decides to write the word. The latents are
those most raised by the query, weighted by how much their mean activation exceeds their mean over
all tokens, so that none is negative.
"""

from __future__ import annotations

import argparse
import re
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches
from pathlib import Path

import torch
from torch import Tensor

from sae import TopKSparseAutoencoder, standardise
from saint.evidence.token_index import NAME as TOKEN_INDEX
from saint.evidence.token_index import StoredTokens, open_tokens
from saint.stage.errors import UserError
from saint.stage.yaml_files import load_yaml, write_yaml
from saint.steering.guide import Guide
from saint.steering.settings import (
    Concept,
    ConceptSetting,
    concept_from_json,
    parse_concept_setting,
)
from saint.steering.studio import Dictionary, Studio, concept_vector, fingerprints

N_LATENTS = 16
USE = "means"  # as often in the text as 16 latents at half a nat, and more often beyond
DOSE = 8.0
_MAX_ROWS = 512
_FEW_ROWS = 8  # fewer places in the store do not make a mean
_MAX_FILLED_TOKENS = 8  # a longer query is read as a text of its own, not looked up
_ENCODE_ROWS = 4096
CONCEPTS_FILE = "concepts.yaml"
_STORE = "activation_outputs"
# Where no store is at hand, a word is read in sentences that say nothing else.
_WISH = re.compile(
    r"(?:please )?(?:talk|speak|write|sound|act|think|be|say|tell|answer|sing|behave)\b"
    r"(?: more| only)?(?: like| about| as| of| in| on| with)?(?: an?| the| some)? (.+)",
    re.IGNORECASE,
)
_NEAR = 0.8  # likeness of a misspelt word, as difflib measures it
_TYPO_LETTERS = 5  # of a saved name, before a typo in it is forgiven
_FRAMES = (
    "They talked about {} all day.",
    "It is about {} and nothing else.",
    "The article was about {}.",
    "Everything she wrote concerned {}.",
    "There is more to say about {}.",
    "He knew a lot about {}.",
)


@dataclass(frozen=True)
class Average:
    """What is usual: means over all tokens. z: (d_model,); activations: (n_latents,)."""

    z: Tensor
    activations: Tensor


@torch.no_grad()
def average_over_store(sae: TopKSparseAutoencoder, stored: StoredTokens) -> Average:
    """Return means over a seeded sample of the store's rows."""
    rows = stored.sample(_ENCODE_ROWS)
    x = stored.activations(rows).to(sae.W_enc.device)
    return Average(standardise(x)[0].mean(0), mean_activations(sae, x))


@torch.no_grad()
def average_of_sae(dictionary: Dictionary, densities: Sequence[float] | None) -> Average:
    """Without a store: the SAE's own centre, and half of each latent's largest where it fires."""
    sae = dictionary.sae
    activations = torch.zeros(sae.config.n_latents, device=sae.W_enc.device)
    if densities is not None:
        density = torch.tensor(densities, device=activations.device)
        activations = 0.5 * density * dictionary.units.to(activations.device)
    return Average(sae.b_pre.detach().float(), activations)


@torch.no_grad()
def mean_activations(sae: TopKSparseAutoencoder, x: Tensor) -> Tensor:
    """Return each latent's mean activation (n_latents,) over raw activations x."""
    total = torch.zeros(sae.config.n_latents, device=x.device)
    for part in x.split(_ENCODE_ROWS):
        active = sae.encode(sae.normalise(part)[0])
        total.index_add_(0, active.indices, active.values)
    return total / max(1, len(x))


def core_of(query: str) -> str:
    """Return what a wish is about: "talk like a lawyer" is about "lawyer"; others stay."""
    match = _WISH.fullmatch(" ".join(query.split()))
    return match[1] if match and len(match[1].split()) <= 3 else query


def spellings(studio: Studio, query: str) -> list[list[int]]:
    """Token ids of a query as it may stand in a text: capitals, a space before, a plain plural."""
    word = query.strip()
    forms = [word, word.lower(), word.capitalize()]
    if " " not in word and word[-1:].isalpha() and not word.lower().endswith("s"):
        forms += [form + "s" for form in forms]
    found = []
    for form in dict.fromkeys(forms):
        for text in (" " + form, form):
            ids = studio.tokenizer.encode(text, bos=False)
            if ids and ids not in found:
                found.append(ids)
    return found


@torch.no_grad()
def read_texts(studio: Studio, dictionary: Dictionary, texts: Sequence[str]) -> list[Tensor]:
    """Return each text's activations (n_tokens, d_model), BOS left out."""
    found = []
    for text in texts:
        ids = studio.encode(text, chat=False)[: studio.model.args.max_seq_len]
        tokens = torch.tensor([ids], device=studio.model.device)
        x = studio.model.capture(tokens, [dictionary.hook])[dictionary.hook][0]
        found.append(x[1:] if dictionary.sae.config.prepend_bos else x)
    return found


def word_parts(stored: StoredTokens, forms: Sequence[Sequence[int]], limit: int) -> list[Tensor]:
    """Return activations (n, d_model) of a word's tokens in the store, of those before, and after.

    A neighbour may belong to the next sentence, which a mean over hundreds does not feel.
    """
    rows = stored.find(forms, limit=limit)
    last = stored.store.n_tokens - 1
    return [stored.activations((rows + offset).clip(0, last)) for offset in (0, -1, 1)]


def difference_of_means(parts: Sequence[Tensor], centre: Tensor) -> Tensor:
    """Return the sum of the unit differences (d_model,) of raw activations (n, d_model) each.

    centre: (d_model,), the mean standardised activation of all tokens.
    """
    moves = torch.stack([standardise(part)[0].mean(0) - centre for part in parts])
    return (moves / torch.linalg.vector_norm(moves, dim=1, keepdim=True).clamp_min(1e-12)).sum(0)


def query_parts(
    studio: Studio, dictionary: Dictionary, query: str, stored: StoredTokens | None
) -> tuple[list[Tensor], str]:
    """Return activations of the query's own tokens, of a word's neighbours, and where from."""
    forms = spellings(studio, query)
    short = bool(forms) and len(forms[0]) <= _MAX_FILLED_TOKENS and len(query.split()) <= 3
    if short and stored is not None:
        n_rows = len(stored.find(forms, limit=_MAX_ROWS))
        if n_rows >= 8:
            parts = [
                x.to(dictionary.sae.W_enc.device) for x in word_parts(stored, forms, _MAX_ROWS)
            ]
            return parts, f"{n_rows} places in the store"
    if not short:
        return read_texts(studio, dictionary, [query]), "the text, read by the model"
    found: list[list[Tensor]] = [[], [], []]
    for frame in _FRAMES:
        n_after = len(studio.tokenizer.encode(frame.split("{}")[1], bos=False))
        (x,) = read_texts(studio, dictionary, [frame.format(query.strip())])
        end = len(x) - n_after
        begin = end - len(studio.tokenizer.encode(" " + query.strip(), bos=False))
        rows = (x[begin:end], x[begin - 1 : begin], x[end : end + 1])
        for part, own in zip(found, rows, strict=True):
            part.append(own)
    return [torch.cat(part) for part in found], "made-up sentences read by the model"


@torch.no_grad()
def find_concept(
    studio: Studio,
    query: str,
    *,
    against: str = "",
    name: str = "",
    sae: int = 0,
    stored: StoredTokens | None = None,
    average: Average | None = None,
    n_latents: int = N_LATENTS,
    use: str = "latents",
) -> Concept:
    """Return the concept that a word, phrase or text stands for.

    against: a second text whose difference from the first is meant, instead of all tokens.
    stored: the captured tokens; without them the model reads the query on the spot. Raises
    UserError for an empty query, or when no latent rises with it.
    """
    if not query.strip():
        raise UserError("write a word, a phrase or a text first")
    dictionary = studio.dictionaries[sae]
    if average is None:
        if stored is None:
            average = average_of_sae(dictionary, None)
        else:
            average = average_over_store(dictionary.sae, stored)
    if against.strip():
        x = torch.cat(read_texts(studio, dictionary, [query]))
        parts = [x]
        other = torch.cat(read_texts(studio, dictionary, [against]))
        average = Average(standardise(other)[0].mean(0), mean_activations(dictionary.sae, other))
        source = "two texts, read by the model"
    else:
        parts, source = query_parts(studio, dictionary, query, stored)
        x = parts[0]
    means = difference_of_means(parts, average.z)
    raised = mean_activations(dictionary.sae, x) - average.activations
    concept = concept_of(dictionary, means, raised, average.z, n_latents=n_latents, use=use)
    title = name.strip() or " ".join(query.split())[:60].replace("=", " ").strip()
    record = concept.to_json() | {
        "query": query if not against.strip() else f"{query}\n–\n{against}",
        "source": source,
        "n_tokens": len(x),
        "sae": sae,
    }
    return concept_from_json(title, record)


def concept_of(
    dictionary: Dictionary,
    means: Tensor,
    raised: Tensor,
    centre: Tensor,
    *,
    n_latents: int,
    use: str = "latents",
) -> Concept:
    """Make a concept of a difference of means (d_model,) and the latents' rises (n_latents,).

    Raises UserError when no latent rises.
    """
    values, latents = raised.topk(min(n_latents, len(raised)))
    latents = latents[values > 0]
    if not len(latents):
        raise UserError("no latent rises with this query: it is an ordinary text for this SAE")
    directions = dictionary.sae.W_dec.detach()[latents].float()
    weights = raised[latents]
    weights = weights / torch.linalg.vector_norm(weights @ directions)
    unit = means / torch.linalg.vector_norm(means).clamp_min(1e-12)
    shares = weights * (directions @ unit)
    vector = weights @ directions if use == "latents" else unit
    return Concept(
        name="concept",
        latents=tuple(latents.tolist()),
        weights=tuple(weights.tolist()),
        shares=tuple(shares.tolist()),
        means=tuple(unit.tolist()),
        base=float(centre @ vector),
        explained=float(shares.sum().clamp_min(0) ** 2),
        use=use,
        length=float(torch.linalg.vector_norm(means)),
    )


def reshaped(
    dictionary: Dictionary, concept: Concept, centre: Tensor, latents: Sequence[int], use: str
) -> Concept:
    """Return a concept with some of its latents only, or steering by another of its ways.

    centre: (d_model,), an average token, standardised. Raises UserError where nothing is left.
    """
    kept = {i: w for i, w in zip(concept.latents, concept.weights, strict=True) if i in latents}
    if not kept and use == "latents":
        raise UserError(f"{concept.name}: no latent is left: remove the concept instead")
    weights = torch.tensor(list(kept.values()))
    directions = dictionary.sae.W_dec.detach().cpu()[list(kept)].float()
    weights = weights / torch.linalg.vector_norm(weights @ directions).clamp_min(1e-12)
    unit = torch.tensor(concept.means) if concept.means else weights @ directions
    shares = weights * (directions @ unit)
    vector = weights @ directions if use == "latents" else unit
    return replace(
        concept,
        latents=tuple(kept),
        weights=tuple(weights.tolist()),
        shares=tuple(shares.tolist()),
        base=float(centre.cpu() @ (vector / torch.linalg.vector_norm(vector).clamp_min(1e-12))),
        explained=float(shares.sum().clamp_min(0) ** 2),
        use=use,
    )


# --- saved, read, named in a setting --------------------------------------------------------------


def save_concepts(path: Path, concepts: Mapping[str, Concept], studio: Studio) -> None:
    """Write `concepts.yaml`: names to concepts, with the SAE that each was made for."""
    made_with = fingerprints(studio)
    records = {
        name: {"made_with": made_with[concept.sae]} | concept.to_json()
        for name, concept in concepts.items()
    }
    write_yaml(path, records)


def load_concepts(path: Path, studio: Studio) -> dict[str, Concept]:
    """Read `concepts.yaml`; {} where there is none.

    Raises UserError when it is damaged or a concept was made for another SAE.
    """
    if not path.exists():
        return {}
    rows = load_yaml(path) or {}
    if not isinstance(rows, dict):
        raise UserError(f"{path} is not a mapping of names to concepts")
    made_with = fingerprints(studio)
    concepts = {}
    for name, row in rows.items():
        concept = concept_from_json(str(name), row)
        known = concept.sae < len(made_with) and row.get("made_with") == made_with[concept.sae]
        if not known:
            raise UserError(f"{path}: the concept {name!r:.40} was made for another SAE")
        concepts[str(name)] = concept
    return concepts


def search_concepts(concepts: Mapping[str, Concept], query: str) -> list[Concept]:
    """Return saved concepts whose name or query holds all of the words."""
    words = query.lower().split()
    return [
        concept
        for concept in concepts.values()
        if all(word in f"{concept.name} {concept.query}".lower() for word in words)
    ]


def total_move(studio: Studio, concepts: Sequence[ConceptSetting]) -> dict[str, float]:
    """Return what "add" settings together add, per hook: length in standard deviations.

    Directions overlap, so this is less (or more) than the sum of the doses. A token's standardised
    activation has the length √(d_model − 1), so dividing by that gives the share of it.
    """
    sums: dict[str, Tensor] = {}
    for setting in concepts:
        if setting.mode == "add":
            dictionary = studio.dictionaries[setting.concept.sae]
            hook = f"layer {dictionary.hook.layer} {dictionary.hook.name}"
            move = setting.dose * concept_vector(dictionary, setting.concept)
            sums[hook] = sums[hook] + move if hook in sums else move
    return {hook: float(torch.linalg.vector_norm(move)) for hook, move in sums.items()}


class ConceptFinder:
    """Concepts by name: the saved ones, and new ones found from the store or the model.

    stores: the captured tokens of each SAE, None where there are none. path: `concepts.yaml`.
    What is usual over all tokens is worked out once per SAE.
    """

    def __init__(
        self,
        studio: Studio,
        guides: Sequence[Guide],
        stores: Sequence[StoredTokens | None],
        path: Path | None = None,
    ):
        self.studio, self.guides, self.stores, self.path = studio, guides, stores, path
        self.saved = {} if path is None else load_concepts(path, studio)
        self._averages: dict[int, Average] = {}
        self._words: dict[int, list[str]] = {}
        self._lock = threading.Lock()

    def average(self, sae: int) -> Average:
        """What is usual over all tokens, for one SAE."""
        with self._lock:
            if sae not in self._averages:
                dictionary, stored = self.studio.dictionaries[sae], self.stores[sae]
                self._averages[sae] = (
                    average_of_sae(dictionary, self.guides[sae].densities)
                    if stored is None
                    else average_over_store(dictionary.sae, stored)
                )
            return self._averages[sae]

    def find(
        self,
        query: str,
        *,
        against: str = "",
        name: str = "",
        sae: int = 0,
        n_latents: int = N_LATENTS,
        use: str = USE,
    ) -> Concept:
        """Return a new concept, see `find_concept`. Raises UserError for a bad query or SAE.

        A wish is read for what it is about, and a word that the store does not have for the one
        that is spelt most like it; `source` says so.
        """
        if not 0 <= sae < len(self.studio.dictionaries):
            raise UserError(f"SAE {sae}: {len(self.studio.dictionaries)} loaded, counted from 0")
        core = query if against.strip() else self.respelt(core_of(query), sae)
        concept = find_concept(
            self.studio,
            core,
            against=against,
            name=name or " ".join(query.split())[:60].replace("=", " ").strip(),
            sae=sae,
            stored=self.stores[sae],
            average=self.average(sae),
            n_latents=n_latents,
            use=use,
        )
        if core == query:
            return concept
        return replace(concept, query=query, source=f"read as “{core}”: {concept.source}")

    def respelt(self, query: str, sae: int) -> str:
        """Return the store's word that is spelt most like a word that it does not have."""
        stored, word = self.stores[sae], query.strip()
        if stored is None or not word.isalpha():
            return query
        if len(stored.find(spellings(self.studio, word), limit=_FEW_ROWS)) >= _FEW_ROWS:
            return query
        near = get_close_matches(word.lower(), self.words(sae), n=1, cutoff=_NEAR)
        return near[0] if near else query

    def words(self, sae: int) -> list[str]:
        """Words of one token that the store has often enough to make a concept of."""
        with self._lock:
            if sae not in self._words:
                stored = self.stores[sae]
                counts = () if stored is None else stored.counts()
                texts = (
                    self.studio.tokenizer.token_text(i).strip().lower()
                    for i, n in enumerate(counts)
                    if n >= _FEW_ROWS
                )
                self._words[sae] = sorted({text for text in texts if text.isalpha()})
            return self._words[sae]

    def saved_as(self, name: str) -> Concept | None:
        """The saved concept of that name, or of the one that is spelt most like it."""
        name = name.strip()
        if name in self.saved:
            return self.saved[name]
        folded = {known.lower(): known for known in self.saved}
        near = get_close_matches(name.lower(), folded, n=1, cutoff=_NEAR)
        # A short word has other words one letter away: "file" is no misspelt "film".
        return self.saved[folded[near[0]]] if near and len(name) >= _TYPO_LETTERS else None

    def setting(self, text: str) -> ConceptSetting:
        """Turn "film=+8" into a setting: a saved concept's, or one found from the name itself."""
        name, mode, dose = parse_concept_setting(text)
        concept = self.saved[name] if name in self.saved else self.find(name, name=name)
        return ConceptSetting(concept, mode, dose)

    def save(self, concept: Concept) -> None:
        """Keep a concept in `concepts.yaml`, in place of an earlier one of its name."""
        if self.path is None:
            raise UserError("no concepts file is open to save in")
        self.saved = {**self.saved, concept.name: concept}
        save_concepts(self.path, self.saved, self.studio)


def open_finder(args: argparse.Namespace, studio: Studio, guides: Sequence[Guide]) -> ConceptFinder:
    """Return the finder of what `add_concept_flags` names. Raises UserError for a store that is
    named and does not fit; the default places may be empty.
    """
    stores: list[StoredTokens | None] = []
    for i, dictionary in enumerate(studio.dictionaries):
        beside = args.sae_model_path[i].parent
        given = args.store_dir[i] if args.store_dir and i < len(args.store_dir) else None
        data_dir = given or beside / _STORE
        evidence = guides[i].evidence
        index = None if evidence is None else evidence.path.with_name(TOKEN_INDEX)
        try:
            stores.append(
                open_tokens(
                    data_dir,
                    layer=dictionary.hook.layer,
                    hook_point=dictionary.hook.name,
                    index_path=index,
                )
            )
        except UserError:
            if given is not None:
                raise
            stores.append(None)
    path = args.concepts_path or args.sae_model_path[0].parent / CONCEPTS_FILE
    return ConceptFinder(studio, guides, stores, path)


def add_concept_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags that say where concepts are found and kept."""
    group = parser.add_argument_group("concepts")
    group.add_argument(
        "--store_dir",
        type=Path,
        nargs="+",
        help=f"captured store of each SAE, to find concepts in [{_STORE} beside the SAE; without "
        "one the model reads the query on the spot]",
    )
    group.add_argument(
        "--concepts_path",
        type=Path,
        help=f"file of named concepts [{CONCEPTS_FILE} beside the first SAE]",
    )
