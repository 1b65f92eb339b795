"""How the steering benchmark's methods turn a concept up, and what is measured of their texts."""

from __future__ import annotations

import argparse
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from llama_3 import Edit, HookPoint, Llama
from sae import ActiveLatents, standardise
from saint.evidence.token_index import StoredTokens
from saint.evidence.words import MIN_LETTERS, clearest_latents, is_content_word
from saint.steering.concepts import (
    average_over_store,
    concept_of,
    difference_of_means,
    mean_activations,
    spellings,
    word_parts,
)
from saint.steering.guide import Guide
from saint.steering.settings import Concept
from saint.steering.studio import Studio, concept_vector
from saint.steering.texts import read_back, vector_edit, write

_TRAIN_SENTENCES, _TRAIN_STEPS, _TRAIN_DOSE = 4, 8, 6.0
_KL_EVERY = 4  # prompts on which KL is measured: every fourth


@dataclass(frozen=True)
class Cell:
    """One method at one dose with one seed: a text per concept and every n-th prompt."""

    method: str
    dose: float
    seed: int
    every: int = 1

    @property
    def name(self) -> str:
        """Method, dose and seed."""
        return f"{self.method}@{self.dose:g}@{self.seed}"

    def path(self, output_dir: Path) -> Path:
        """Where the cell is kept."""
        return output_dir / "cells" / f"{self.name}.json"


@dataclass
class Bench:
    """What all methods share; concepts are found once."""

    studio: Studio
    guide: Guide
    stored: StoredTokens
    families: Mapping[str, Mapping[str, Any]]
    prompts: Sequence[str]
    about: str
    args: argparse.Namespace

    @property
    def names(self) -> list[str]:
        """The concepts, in order."""
        return list(self.families)

    @cached_property
    def first(self) -> int:
        """The first position that may be edited."""
        return 1 if self.studio.prepend_bos else 0

    @cached_property
    def average(self) -> Any:
        """What is usual over all tokens."""
        return average_over_store(self.studio.dictionaries[0].sae, self.stored)

    @cached_property
    def found(self) -> dict[str, tuple[Tensor, Tensor]]:
        """Concept -> (difference of means, rise of every latent), from the word in the store."""
        sae, found = self.studio.dictionaries[0].sae, {}
        for name in self.names:
            parts = word_parts(self.stored, spellings(self.studio, name), 512)
            raised = mean_activations(sae, parts[0]) - self.average.activations
            found[name] = difference_of_means(parts, self.average.z), raised
        return found

    def concept(self, name: str, n_latents: int, use: str = "latents") -> Concept:
        """A concept of n latents, or of its difference of means."""
        means, raised = self.found[name]
        return concept_of(
            self.studio.dictionaries[0], means, raised, self.average.z,
            n_latents=n_latents, use=use,
        )  # fmt: skip

    def unit(self, name: str, n_latents: int, use: str = "latents") -> Tensor:
        """A concept's unit direction (d_model,)."""
        dictionary = self.studio.dictionaries[0]
        return concept_vector(dictionary, self.concept(name, n_latents, use))

    def decoder(self, latent: int) -> Tensor:
        """A latent's decoder direction (d_model,)."""
        return self.studio.dictionaries[0].sae.W_dec.detach()[latent].float()

    @cached_property
    def clear(self) -> list[tuple[int, str]]:
        """Today's way: the clearest latents and their own words, as many as there are concepts."""
        evidence = self.guide.evidence
        assert evidence is not None, "the benchmark needs evidence"
        words: dict[int, str] = {}
        for word, places in self.guide.token_index(self.studio.tokenizer).items():
            for latent, share in places if is_content_word(word, min_letters=MIN_LETTERS) else ():
                if share >= 0.5:
                    words[latent] = word
        order = [i for i in clearest_latents(evidence, 4 * len(self.names)) if i in words]
        return [(i, words[i]) for i in order[: len(self.names)]]

    @cached_property
    def searched(self) -> dict[str, int]:
        """Today's way to a named concept: the latent that a search for its word finds first."""
        index = self.guide.token_index(self.studio.tokenizer)
        found = {}
        for name in self.names:
            places = index.get(name, ())
            best = max(places, key=lambda place: place[1], default=None)
            found[name] = self.concept(name, 1).latents[0] if best is None else best[0]
        return found

    @cached_property
    def trained(self) -> dict[str, Tensor]:
        """Unit vectors trained for seconds to make captured sentences with the word likelier.

        As ReFT-r1 and RePS do it in principle (arXiv:2501.17148, arXiv:2505.20809): Adam on one
        vector of fixed length, the loss of the concept's own sentences under the edited model.
        """
        return {name: train_vector(self, name) for name in self.names}


def train_vector(bench: Bench, name: str) -> Tensor:
    studio, model = bench.studio, bench.studio.model
    rows = bench.stored.find(spellings(studio, name), limit=64)
    sentences = bench.stored.around(rows, before=12, after=20)[:_TRAIN_SENTENCES]
    texts = [[studio.tokenizer.bos_id, *ids] for ids in sentences]
    width = max(map(len, texts))
    tokens = torch.tensor([t + [0] * (width - len(t)) for t in texts])
    mask = torch.tensor([[i + 1 < len(t) for i in range(width)] for t in texts])
    vector = bench.unit(name, 16, "means").clone().requires_grad_(True)
    optimiser = torch.optim.Adam([vector], lr=0.01)
    hook = HookPoint(len(model.layers) - 1, "resid_post")
    for _ in range(_TRAIN_STEPS):
        unit = vector / torch.linalg.vector_norm(vector)
        edit = vector_edit((_TRAIN_DOSE * unit)[None].expand(len(texts), -1), first=bench.first)
        resid = model.capture(tokens, [hook], edits={studio.dictionaries[0].hook: edit})[hook]
        targets = tokens.roll(-1, 1)[mask]
        loss = torch.nn.functional.cross_entropy(model.unembed(resid[mask]), targets)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    unit = vector.detach()
    return unit / torch.linalg.vector_norm(unit)


# --- a method's edit over a batch of rows, each of one concept ---


def row_edit(bench: Bench, cell: Cell, rows: Sequence[str], ends: Tensor) -> Edit | None:
    """Return the edit of a batch whose row i is about concept rows[i]; None for no edit."""
    method, dose = cell.method, cell.dose
    use = "means" if method.startswith("means") else "latents"
    if method.startswith(("latents_", "means", "trained", "random", "before")):
        units = {name: unit_of(bench, method, name) for name in set(rows)}
        vectors = dose * torch.stack([units[name] for name in rows])
        if method == "means_clamp":
            bases = {name: bench.concept(name, 16, use).base for name in set(rows)}
            base = torch.tensor([bases[name] for name in rows])
            return move_edit(vectors / dose, bench.first, lambda c: dose + base[:, None] - c)
        return vector_edit(
            vectors, first=bench.first, ends=ends if method.endswith("generated") else None
        )
    if method.startswith("down_") and method not in ("down_plain", "down_ablate_16"):
        concepts = {name: bench.concept(name, 16, "means") for name in set(rows)}
        vectors = torch.stack([bench.unit(name, 16, "means") for name in rows])
        base = torch.tensor([concepts[name].base for name in rows])[:, None]
        if method == "down_subtract":
            return vector_edit(-dose * vectors, first=bench.first)
        if method == "down_set":
            return move_edit(vectors, bench.first, lambda c: (dose + base - c).clamp_max(0))
        return move_edit(vectors, bench.first, lambda c: -(c - base).clamp_min(0))
    if method == "down_ablate_16":
        return ablation(bench, rows)
    if method == "first_version":
        return first_version(bench, rows, dose)
    return None


def unit_of(bench: Bench, method: str, name: str) -> Tensor:
    draw = random.Random(f"{method} {name}")
    if method.startswith("latents_"):
        return bench.unit(name, int(method.removeprefix("latents_")))
    if method.startswith("means"):
        return bench.unit(name, 16, "means")
    if method == "trained":
        return bench.trained[name]
    if method == "random_direction":
        generator = torch.Generator().manual_seed(draw.getrandbits(31))
        vector = torch.randn(bench.average.z.shape, generator=generator)
        return vector / torch.linalg.vector_norm(vector)
    if method == "random_latent":
        live = [i for i, d in enumerate(bench.guide.densities or []) if 0 < d < 0.01]
        return bench.decoder(draw.choice(live))
    if method == "before_same":
        return bench.decoder(bench.searched[name])
    return bench.decoder(bench.clear[bench.names.index(name) % len(bench.clear)][0])


def move_edit(vectors: Tensor, first: int, change: Any) -> Edit:
    """An edit along unit vectors (n_rows, d_model) by change(coordinate of each token)."""

    def edit(x: Tensor, positions: Tensor) -> Tensor:
        z, _, scale = standardise(x)
        move = change(torch.einsum("btd,bd->bt", z, vectors))
        after = x.float() + scale * move[..., None] * vectors[:, None]
        return torch.where((positions >= first)[..., None], after.to(x.dtype), x)

    return edit


def ablation(bench: Bench, rows: Sequence[str]) -> Edit:
    """Bring the concept's 16 latents to 0."""
    sae = bench.studio.dictionaries[0].sae
    latents = torch.tensor([bench.concept(name, 16).latents for name in rows])

    def edit(x: Tensor, positions: Tensor) -> Tensor:
        z, _, scale = sae.normalise(x)
        values, indices = sae.encode(z.flatten(0, 1)).matrices()
        values, indices = (t.view(*z.shape[:2], -1) for t in (values, indices))
        hit = (indices[..., None] == latents[:, None, None]).any(-1)
        removed = torch.where(hit, values, 0.0)
        shift = torch.einsum("btk,btkd->btd", removed, sae.W_dec.detach()[indices])
        after = (x.float() - scale * shift).to(x.dtype)
        return torch.where((positions >= bench.first)[..., None], after, x)

    return edit


def first_version(bench: Bench, rows: Sequence[str], bias: float) -> Edit:
    """A bias on the concept's first latent before top-k; the reconstruction, at BOS too."""
    sae = bench.studio.dictionaries[0].sae
    latents = torch.tensor([bench.concept(name, 1).latents[0] for name in rows])

    def edit(x: Tensor, positions: Tensor) -> Tensor:
        z, mean, scale = sae.normalise(x)
        pre = sae.pre_activations(z.flatten(0, 1)).view(*z.shape[:2], -1)
        pre[torch.arange(len(rows)), :, latents] += bias
        values, indices = pre.topk(sae.config.k, dim=-1)
        active = ActiveLatents.of_matrices(values.relu().flatten(0, 1), indices.flatten(0, 1))
        rebuilt = sae.decode(active).view(z.shape)
        return (rebuilt * scale + mean).to(x.dtype)

    return edit


class BiasedModel:
    """The model with a bias on the logits of each row's family."""

    def __init__(self, model: Llama, bias: Tensor):
        self._model, self._bias = model, bias

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def unembed(self, x: Tensor) -> Tensor:
        """The model's logits with the bias added."""
        return self._model.unembed(x) + self._bias


def family_ids(bench: Bench, name: str) -> list[int]:
    """First tokens of the family's words, with a space before."""
    words = bench.families[name]["family"]
    return sorted({bench.studio.tokenizer.encode(" " + word, bos=False)[0] for word in words})


# --- writing a cell ---


def write_cell(bench: Bench, cell: Cell) -> dict[str, Any]:
    """Write the texts of one cell and read them back."""
    names = bench.names if cell.method != "plain" else [""]
    pairs = [(name, i) for name in names for i in range(0, len(bench.prompts), cell.every)]
    rows: list[dict[str, Any]] = []
    for start in range(0, len(pairs), bench.args.batch):
        rows += write_rows(bench, cell, pairs[start : start + bench.args.batch])
    record: dict[str, Any] = {"method": cell.method, "dose": cell.dose, "seed": cell.seed}
    if cell.method == "before":
        chosen = [bench.clear[i % len(bench.clear)] for i in range(len(names))]
        record["words"] = dict(zip(names, [word for _, word in chosen], strict=True))
    return record | {"rows": rows}


@torch.no_grad()
def write_rows(bench: Bench, cell: Cell, pairs: Sequence[tuple[str, int]]) -> list[dict[str, Any]]:
    studio = bench.studio
    plain = [studio.encode(bench.prompts[i], chat=False) for _, i in pairs]
    prompts = plain
    if cell.method == "prompt_write":
        prompts = _encode(bench, [f"Write about {c}. {bench.prompts[i]}" for c, i in pairs])
    elif cell.method == "prompt_nothing_but" or cell.method.startswith("down_"):
        texts = [bench.about.format(c) + bench.prompts[i] for c, i in pairs]
        prompts = _encode(bench, texts)
    ends = torch.tensor([len(prompt) for prompt in prompts])
    with torch.enable_grad():
        edit = row_edit(bench, cell, [c for c, _ in pairs], ends)
    hook = studio.dictionaries[0].hook
    model = studio.model
    if cell.method == "logit_bias":
        bias = torch.zeros(len(pairs), model.args.vocab_size)
        for row, (name, _) in enumerate(pairs):
            bias[row, family_ids(bench, name)] = cell.dose
        model = cast(Llama, BiasedModel(model, bias))
    seeds = [1000 * cell.seed + i for _, i in pairs]
    edits = None if edit is None else {hook: edit}
    new = write(
        model, studio.tokenizer, prompts, n_tokens=bench.args.n_tokens, seeds=seeds, edits=edits
    )
    texts = read_back(studio.model, studio.tokenizer, plain, new)
    kl: dict[int, float] = {}
    if cell.seed == bench.args.first_seed and edits is not None:
        members = [row for row, (_, i) in enumerate(pairs) if i % _KL_EVERY == 0 and new[row]]
        kl = kl_of(bench, cell, members, pairs, prompts, plain, new)
    return [
        {
            "concept": name, "prompt": i, "text": text.text,
            "surprise": round(text.surprise, 4), "distinct": round(text.distinct, 3),
            **({"kl": round(kl[row], 4)} if row in kl else {}),
        }
        for row, ((name, i), text) in enumerate(zip(pairs, texts, strict=True))
    ]  # fmt: skip


def kl_of(
    bench: Bench,
    cell: Cell,
    members: Sequence[int],
    pairs: Sequence[tuple[str, int]],
    prompts: Sequence[list[int]],
    plain: Sequence[list[int]],
    new: Sequence[list[int]],
) -> dict[int, float]:
    """KL(steered, plain), nats per token, mean over each member's own generated text."""
    found = {}
    hook = bench.studio.dictionaries[0].hook
    for start in range(0, len(members), 8):
        part = members[start : start + 8]
        ends = torch.tensor([len(prompts[m]) for m in part])
        edit = row_edit(bench, cell, [pairs[m][0] for m in part], ends)
        sides = []
        for begins, edits in ((prompts, {hook: edit} if edit else None), (plain, None)):
            rows = [[*begins[m], *new[m]] for m in part]
            width = max(map(len, rows))
            tokens = torch.tensor([row + [0] * (width - len(row)) for row in rows])
            last = HookPoint(len(bench.studio.model.layers) - 1, "resid_post")
            resid = bench.studio.model.capture(tokens, [last], edits=edits)[last]
            sides.append(
                [
                    bench.studio.model.unembed(
                        resid[i, len(begins[m]) - 1 : len(rows[i]) - 1]
                    ).log_softmax(-1)
                    for i, m in enumerate(part)
                ]
            )
        for m, steered, own in zip(part, *sides, strict=True):
            found[m] = float((steered.exp() * (steered - own)).sum(-1).mean())
    return found


def _encode(bench: Bench, texts: Sequence[str]) -> list[list[int]]:
    return [bench.studio.encode(text, chat=False) for text in texts]
