"""A language model with its SAEs, ready to be steered; and how it is loaded."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import xxhash
from torch import Tensor

from llama_3 import HOOK_NAMES, Edit, HookPoint, Llama, LlamaArgs, Tokenizer, load_args, load_llama
from sae import Steer, TopKSparseAutoencoder, load_sae, standardise, steering_shift
from saint.evidence.file import open_evidence
from saint.evidence.labels import load_labels
from saint.stage.devices import pick_device, pick_dtype
from saint.stage.errors import UserError, log
from saint.stage.flags import (
    add_device_flags,
    add_sae_dtype_flag,
    positive_int,
    sae_dtype,
    whole_number,
)
from saint.stage.workers import Workers
from saint.steering.guide import Guide, make_guide
from saint.steering.settings import (
    WHERE,
    Concept,
    ConceptSetting,
    Limits,
    Request,
    Setting,
)

Turn = tuple[str, str]  # of a chat: what a person said, and what the model answered


@dataclass(frozen=True)
class Dictionary:
    """A loaded SAE and its steering units.

    units: (n_latents,) float32 on the CPU, each latent's largest seen activation; 1 where it was
    never seen firing. unit_source says where they come from.
    """

    name: str
    sae: TopKSparseAutoencoder
    hook: HookPoint
    units: Tensor
    unit_source: str

    def steer(self, setting: Setting) -> Steer:
        """Turn a setting's units into the SAE's activation scale."""
        unit = float(self.units[setting.latent]) if setting.mode in ("add", "set") else 1.0
        return Steer(setting.latent, setting.mode, setting.strength * unit)  # type: ignore[arg-type]


@dataclass(frozen=True)
class Studio:
    """The model, its tokenizer and one or more SAEs; shared by all visitors, never changed."""

    model: Llama
    tokenizer: Tokenizer
    dictionaries: tuple[Dictionary, ...]
    limits: Limits = field(default_factory=Limits)

    @property
    def prepend_bos(self) -> bool:
        """Whether prompts start with a BOS token, as the SAEs' captures did."""
        return self.dictionaries[0].sae.config.prepend_bos

    def encode(self, prompt: str, *, chat: bool, earlier: Sequence[Turn] = ()) -> list[int]:
        """Token ids of a prompt as the model reads it; earlier: what a chat's prompt follows.

        Raises UserError for an empty prompt, or for chat with a model that has no chat format.
        """
        if chat:
            if not self.tokenizer.has_chat:
                raise UserError("this model has no chat format: it can only continue text")
            said = [text for turn in earlier for text in turn]
            roles = ("user", "assistant")
            messages = [{"role": roles[i % 2], "content": t} for i, t in enumerate([*said, prompt])]
            return self.tokenizer.format_chat(messages)
        ids = self.tokenizer.encode(prompt, bos=self.prepend_bos)
        if len(ids) <= self.prepend_bos:
            raise UserError("a prompt is empty: write some text for the model to continue")
        return ids

    def encode_prompts(self, request: Request, earlier: Sequence[Turn] = ()) -> list[list[int]]:
        """Check a request and return its prompts' token ids, see `encode`.

        Raises UserError, before any work, for what this studio cannot or will not do.
        """
        self.check(request)
        prompts = [self.encode(p, chat=request.chat, earlier=earlier) for p in request.prompts]
        longest, context = max(map(len, prompts)), self.model.args.max_seq_len
        length = longest + request.max_new_tokens
        if length > context:
            raise UserError(
                f"{longest} prompt tokens and {request.max_new_tokens} new ones exceed the model's "
                f"context of {context} tokens"
            )
        if length * len(prompts) > self.limits.tokens:
            raise UserError(
                f"{len(prompts)} prompts with room for {length} tokens each, new ones included, "
                f"are {length * len(prompts)} tokens: at most {self.limits.tokens} at a time "
                "(whoever starts the page can raise --max_total_tokens)"
            )
        return prompts

    def check(self, request: Request) -> None:
        """Raise UserError for what is wrong with a request whatever its prompts' tokens are."""
        limits = self.limits
        counted = (
            (len(request.prompts), limits.prompts, "prompts"),
            (request.max_new_tokens, limits.new_tokens, "new tokens"),
            (max(map(len, request.prompts), default=0), limits.prompt_chars, "characters a prompt"),
        )
        for number, most, what in counted:
            if number > most:
                raise UserError(f"{number} {what}: at most {most} at a time")
        if not request.prompts:
            raise UserError("write a prompt first")
        if request.max_new_tokens < 1:
            raise UserError("the number of new tokens is not at least 1")
        if request.where not in WHERE:
            raise UserError(f"where {request.where!r:.40}: expected one of {', '.join(WHERE)}")
        if not 0 <= request.temperature <= 10 or not 0 < request.top_p <= 1:
            raise UserError("temperature is not in 0 to 10, or top-p not above 0 and at most 1")
        if not 0 <= request.seed < 2**63:
            raise UserError(f"seed {request.seed} is not between 0 and 2^63 - 1")
        self.check_settings(request.settings)
        self.check_concepts(request.concepts)

    def check_concepts(self, concepts: Sequence[ConceptSetting]) -> None:
        """Raise UserError for too many concepts, one named twice, or one made for another SAE."""
        if len(concepts) > self.limits.settings:
            raise UserError(f"{len(concepts)} concepts: at most {self.limits.settings} at a time")
        names = [setting.concept.name for setting in concepts]
        if len(set(names)) < len(names):
            raise UserError("a concept is set twice: give each one setting")
        for setting in concepts:
            concept = setting.concept
            if not 0 <= concept.sae < len(self.dictionaries):
                raise UserError(f"concept {concept.name} belongs to SAE {concept.sae}: not loaded")
            config = self.dictionaries[concept.sae].sae.config
            strays = [i for i in concept.latents if not 0 <= i < config.n_latents]
            if strays or len(concept.means) not in (0, config.d_model):
                raise UserError(f"concept {concept.name} was made for another SAE")

    def check_settings(self, settings: Sequence[Setting]) -> None:
        """Raise UserError for too many latents, one that is not there, or one named twice."""
        if len(settings) > self.limits.settings:
            raise UserError(
                f"{len(settings)} steered latents: at most {self.limits.settings} at a time"
            )
        for setting in settings:
            if not 0 <= setting.sae < len(self.dictionaries):
                raise UserError(
                    f"SAE {setting.sae}: {len(self.dictionaries)} loaded, counted from 0"
                )
            n_latents = self.dictionaries[setting.sae].sae.config.n_latents
            if not 0 <= setting.latent < n_latents:
                raise UserError(f"latent {setting.latent}: this SAE has 0 to {n_latents - 1}")
        if len({(s.sae, s.latent) for s in settings}) < len(settings):
            raise UserError("a latent is set twice: give each one setting")


def build_edits(
    studio: Studio,
    settings: Sequence[Setting],
    *,
    where: str,
    prompt_lengths: Sequence[int],
    concepts: Sequence[ConceptSetting] = (),
    record: dict[HookPoint, tuple[Tensor, Tensor, Tensor]] | None = None,
) -> dict[HookPoint, Edit]:
    """Return the model edits for these settings; empty when there is nothing to steer.

    where: tokens to edit; a prompt of length n has positions 0 to n - 1, the rest is "generated".
    prompt_lengths: one per row of the batch, in tokens. Position 0 is never edited where the SAE
    was trained with a BOS token. SAEs at one hook point all read x before any of them adds to it.
    record: filled with (x before, x after, edited positions) of the last forward pass per hook.
    """
    by_hook: dict[HookPoint, dict[int, list[Steer]]] = {}
    for setting in settings:
        dictionary = studio.dictionaries[setting.sae]
        steers = by_hook.setdefault(dictionary.hook, {}).setdefault(setting.sae, [])
        steers.append(dictionary.steer(setting))
    moves: dict[HookPoint, list[tuple[ConceptSetting, Tensor]]] = {}
    for wish in concepts:
        dictionary = studio.dictionaries[wish.concept.sae]
        by_hook.setdefault(dictionary.hook, {})
        vector = concept_vector(dictionary, wish.concept)
        moves.setdefault(dictionary.hook, []).append((wish, vector))
    ends = torch.tensor(prompt_lengths, device=studio.model.device).unsqueeze(1)
    first = 1 if studio.prepend_bos else 0

    def make_edit(hook: HookPoint, wishes: dict[int, list[Steer]]) -> Edit:
        def edit(x: Tensor, positions: Tensor) -> Tensor:
            edited = positions >= first
            if where != "both":
                edited = edited & ((positions < ends) == (where == "prompt"))
            shift = torch.zeros_like(x, dtype=torch.float32)
            for index, steers in wishes.items():
                shift += steering_shift(studio.dictionaries[index].sae, steers, x)
            if hook in moves:
                shift += concept_shift(moves[hook], x)
            after = torch.where(edited.unsqueeze(-1), (x.float() + shift).to(x.dtype), x)
            if record is not None:
                record[hook] = (x, after, edited)
            return after

        return edit

    return {hook: make_edit(hook, wishes) for hook, wishes in by_hook.items()}


def concept_vector(dictionary: Dictionary, concept: Concept) -> Tensor:
    """Return a concept's unit direction (d_model,), float32, on the SAE's device."""
    w_dec = dictionary.sae.W_dec.detach()
    if concept.use == "means":
        vector = torch.tensor(concept.means, dtype=torch.float32, device=w_dec.device)
    else:
        weights = torch.tensor(concept.weights, dtype=torch.float32, device=w_dec.device)
        vector = weights @ w_dec[list(concept.latents)].float()
    return vector / torch.linalg.vector_norm(vector).clamp_min(1e-12)


def concept_shift(moves: Sequence[tuple[ConceptSetting, Tensor]], x: Tensor) -> Tensor:
    """Return std(x) · Σ_j change_j · v_j, float32 (..., d_model), what concepts add to x.

    All coordinates z · v_j are read before anything is added; z is x, standardised.
    """
    z, _, scale = standardise(x)
    shift = torch.zeros_like(z)
    for setting, vector in moves:
        if setting.mode == "add":
            shift += setting.dose * vector
            continue
        above = z @ vector - setting.concept.base
        change = setting.dose - above if setting.mode == "set" else -above.clamp_min(0)
        shift += change.unsqueeze(-1) * vector
    return shift * scale


_DEFAULT_LABELS = Path("output") / "parsed_responses.yaml"


DEFAULT_EVIDENCE = Path("top_activating_sentences") / "evidence.parquet"


# What a person types to see the demo work: sentences that a news text might open with.
EXAMPLE_PROMPTS = (
    "The delegates gathered at the",
    "Foreign officials released a statement",
    "Humanitarian staff coordinated their efforts",
    "Senior diplomats met to discuss",
)


def add_studio_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags that name a model, its SAEs and what is known of their latents."""
    group = parser.add_argument_group("model and SAE")
    group.add_argument(
        "--llama_model_dir", type=Path, required=True, help="directory of the Llama model"
    )
    group.add_argument(
        "--sae_model_path", type=Path, nargs="+", required=True, help="one or more trained SAEs"
    )
    add_sae_dtype_flag(parser)
    group.add_argument(
        "--sae_layer_idx",
        type=whole_number,
        nargs="+",
        help="0-based layer of each SAE, for older checkpoints that do not know it",
    )
    group.add_argument(
        "--k", type=positive_int, nargs="+", help="active latents per token of older checkpoints"
    )
    group.add_argument(
        "--hook_point",
        choices=HOOK_NAMES,
        nargs="+",
        help="hook point of older checkpoints (the first version's SAEs: attn_norm)",
    )
    group.add_argument(
        "--no_bos", action="store_true", help="older checkpoints that were trained without BOS"
    )
    group.add_argument(
        "--labels_path",
        type=Path,
        nargs="+",
        help=f"parsed_responses.yaml of each SAE [{_DEFAULT_LABELS} beside the SAE, where it is]",
    )
    group.add_argument(
        "--evidence_path",
        type=Path,
        nargs="+",
        help=f"evidence file of each SAE [{DEFAULT_EVIDENCE} beside the SAE, where it is]",
    )
    add_device_flags(parser, dtype=True)


def load_studio(
    args: argparse.Namespace, limits: Limits | None = None, workers: Workers | None = None
) -> tuple[Studio, list[Guide]]:
    """Load what `add_studio_flags` names; the cheap files first, the model last.

    workers: the ranks that the model is split over; then all of them must use the studio alike.
    Raises UserError or llama_3.CheckpointError when something is missing, damaged or does not fit.
    """
    workers = workers or Workers(0, 1, pick_device(args.device))
    device, n_shards = workers.device, workers.model_parallel_size
    model_args = load_args(args.llama_model_dir)
    dictionaries, guides = [], []
    n = len(args.sae_model_path)
    labels_paths = _per_sae(args.labels_path, n, "--labels_path", spread=False)
    evidence_paths = _per_sae(args.evidence_path, n, "--evidence_path", spread=False)
    flags = zip(
        _per_sae(args.sae_layer_idx, n, "--sae_layer_idx"),
        _per_sae(args.k, n, "--k"),
        _per_sae(args.hook_point, n, "--hook_point"),
        strict=True,
    )
    for i, (path, (layer, k, hook_point)) in enumerate(
        zip(args.sae_model_path, flags, strict=True)
    ):
        said = {"k": k, "layer": layer, "hook_point": hook_point, "no_bos": args.no_bos}
        sae = load_sae(path, device=device, dtype=sae_dtype(args), **said)
        hook = _checked_hook(path, sae, model_args)
        guide_paths = _guide_paths(path, labels_paths[i], evidence_paths[i])
        dictionary, guide = _bind(path, sae, hook, *guide_paths)
        dictionaries.append(dictionary)
        guides.append(guide)
    if len({d.sae.config.prepend_bos for d in dictionaries}) > 1:
        raise UserError("some of the SAEs were trained with a BOS token and some without")
    model, tokenizer = load_llama(
        args.llama_model_dir,
        device=device,
        dtype=pick_dtype(args.dtype, device),
        model_parallel_size=n_shards,
    )
    return Studio(model, tokenizer, tuple(dictionaries), limits or Limits()), guides


def _per_sae(values: Sequence[Any] | None, n: int, flag: str, *, spread: bool = True) -> list[Any]:
    """One value per SAE: none, as many as SAEs, or (spread) one for all."""
    if values is None:
        return [None] * n
    if len(values) == 1 and spread:
        return list(values) * n
    if len(values) != n:
        raise UserError(f"{flag} has {len(values)} values for {n} SAEs")
    return list(values)


def _checked_hook(path: Path, sae: TopKSparseAutoencoder, args: LlamaArgs) -> HookPoint:
    config = sae.config
    if config.layer is None:
        raise UserError(f"{path} does not know its layer: name it with --sae_layer_idx")
    if not 0 <= config.layer < args.n_layers:
        raise UserError(
            f"{path} is for layer {config.layer}, the model has {args.n_layers} (from 0)"
        )
    if config.d_model != args.dim:
        raise UserError(f"{path} is for d_model {config.d_model}, the model has {args.dim}")
    if config.hook_point not in HOOK_NAMES:
        raise UserError(
            f"{path} is for the hook point {config.hook_point}, which is not known here"
        )
    return HookPoint(config.layer, config.hook_point)


def _guide_paths(
    sae_path: Path, labels: Path | None, evidence: Path | None
) -> tuple[Path | None, Path | None]:
    """The paths given, or the default places beside the SAE where files are there."""
    chosen = []
    for given, default in ((labels, _DEFAULT_LABELS), (evidence, DEFAULT_EVIDENCE)):
        beside = sae_path.parent / default
        if given is None and beside.is_file():
            log.info("using %s", beside)
            given = beside
        chosen.append(given)
    return chosen[0], chosen[1]


def _bind(
    path: Path,
    sae: TopKSparseAutoencoder,
    hook: HookPoint,
    labels_path: Path | None,
    evidence_path: Path | None,
) -> tuple[Dictionary, Guide]:
    evidence = None if evidence_path is None else open_evidence(evidence_path)
    labels = {} if labels_path is None else load_labels(labels_path)
    if sae.max_activations is not None:
        units, source = sae.max_activations.float().cpu(), "largest activation over training tokens"
    elif evidence is not None and evidence.n_latents == sae.config.n_latents:
        column = evidence.summary().column("max_activation").to_numpy()
        units, source = torch.tensor(column), "largest activation in the evidence"
    else:
        units, source = torch.ones(sae.config.n_latents), "raw activation: no maximum is known"
    # A latent that never fired has no unit of its own: its strength stays raw.
    units = torch.where(units > 0, units, torch.ones_like(units))
    dictionary = Dictionary(path.stem, sae, hook, units, source)
    return dictionary, make_guide(
        labels, evidence, name=dictionary.name, n_latents=sae.config.n_latents
    )


def fingerprints(studio: Studio) -> list[str]:
    """Return a short identity per SAE: settings made for one mean nothing for another."""
    found = []
    for dictionary in studio.dictionaries:
        sae = dictionary.sae
        shape = (*dictionary.hook, sae.config.n_latents, sae.config.k)
        digest = xxhash.xxh3_64(repr(shape).encode())
        for tensor in (sae.b_enc, sae.b_pre):
            digest.update(tensor.detach().float().cpu().numpy().tobytes())
        found.append(digest.hexdigest())
    return found
