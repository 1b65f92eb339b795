"""The mix: what a visitor has chosen to turn up and down, as the browser holds it.

A list of dials. A latent's: {sae, latent, mode, strength, label, raw, share}; a concept's:
{concept, definition, mode, dose, use, known, explained, source, parts, share}, `definition` being
what `Concept.to_json` wrote. It comes from strangers' browsers: all of it is checked.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from saint.stage.errors import UserError
from saint.stage.terminal import visible
from saint.steering.concepts import ConceptFinder, reshaped
from saint.steering.settings import ConceptSetting, Setting, Wish, concept_from_json

MAX_QUERY_CHARS = 2000
_DAMAGED = "the mix is damaged: remove what is in it and start over"


@dataclass(frozen=True)
class Mixer:
    """Turns wishes into dials, and what a browser sent back into wishes."""

    finder: ConceptFinder

    def dial(self, wish: Wish) -> dict[str, Any]:
        """A wish as the page's mix shows it.

        share: of the residual, per unit of strength or of dose; missing where tokens are not
        standardised, since it then depends on the token.
        """
        if isinstance(wish, ConceptSetting):
            return self._concept_dial(wish)
        studio = self.finder.studio
        studio.check_settings([wish])
        dictionary = studio.dictionaries[wish.sae]
        unit = float(dictionary.units[wish.latent])
        shown = {
            "sae": wish.sae,
            "latent": wish.latent,
            "mode": wish.mode,
            "strength": wish.strength,
            "label": self.finder.guides[wish.sae].label(wish.latent),
            "raw": dictionary.unit_source.startswith("raw"),
        }
        config = dictionary.sae.config
        if config.normalisation == "per_token_standardise":
            # A unit decoder direction times std(x), against ‖x − mean(x)‖ = std(x)·√(d_model − 1).
            shown["share"] = unit / (config.d_model - 1) ** 0.5
        return shown

    def _concept_dial(self, wish: ConceptSetting) -> dict[str, Any]:
        concept, studio = wish.concept, self.finder.studio
        studio.check_concepts([wish])
        guide = self.finder.guides[concept.sae]
        shares = concept.shares or (0.0,) * len(concept.latents)
        parts = [
            {"latent": latent, "label": guide.label(latent), "share": share}
            for latent, share in sorted(
                zip(concept.latents, shares, strict=True), key=lambda part: -part[1]
            )
        ]
        d_model = studio.dictionaries[concept.sae].sae.config.d_model
        return {
            "concept": visible(concept.name),
            "definition": json.loads(json.dumps(concept.to_json())),  # keys of JSON are texts
            "mode": wish.mode,
            "dose": wish.dose,
            "use": concept.use,
            "known": bool(concept.means),
            "explained": concept.explained,
            "source": concept.source,
            "parts": parts,
            "share": 1 / (d_model - 1) ** 0.5,
        }

    def dials(self, wishes: Sequence[Wish]) -> list[dict[str, Any]]:
        """All dials: latents first, as their colours in the texts go."""
        order = sorted(wishes, key=lambda wish: isinstance(wish, ConceptSetting))
        return [self.dial(wish) for wish in order]

    def read(self, mix: Any) -> tuple[tuple[Setting, ...], tuple[ConceptSetting, ...]]:
        """Check the mix that a browser sent. Raises UserError when it is no mix."""
        settings: list[Setting] = []
        concepts: list[ConceptSetting] = []
        try:
            for dial in mix or []:
                if "concept" in dial:
                    concept = concept_from_json(str(dial["concept"]), dial["definition"])
                    wish = ConceptSetting(concept, str(dial["mode"]), float(dial["dose"]))
                    concepts.append(wish)
                else:
                    latent, sae = int(dial["latent"]), int(dial["sae"])
                    settings.append(
                        Setting(latent, str(dial["mode"]), float(dial["strength"]), sae)
                    )
        except (TypeError, KeyError, ValueError, OverflowError) as error:
            if isinstance(error, UserError):
                raise
            raise UserError(_DAMAGED) from None
        self.finder.studio.check_settings(settings)
        self.finder.studio.check_concepts(concepts)
        return tuple(settings), tuple(concepts)

    def with_latent(self, mix: Any, setting: Setting) -> list[dict[str, Any]]:
        """Add a latent. Raises UserError where it is in the mix already."""
        settings, concepts = self.read(mix)
        if any((s.sae, s.latent) == (setting.sae, setting.latent) for s in settings):
            raise UserError("this latent is in the mix already")
        self.finder.studio.check_settings([*settings, setting])
        return self.dials([*settings, setting, *concepts])

    def with_concept(
        self, mix: Any, query: str, against: str = "", *, dose: float = 8.0
    ) -> list[dict[str, Any]]:
        """Add the concept that a word, a phrase or two texts stand for, or turn it up anew."""
        settings, concepts = self.read(mix)
        query = str(query or "")[:MAX_QUERY_CHARS].strip()
        against = str(against or "")[:MAX_QUERY_CHARS].strip()
        saved = None if against else self.finder.saved_as(query)
        concept = saved or self.finder.find(query, against=against)
        others = [wish for wish in concepts if wish.concept.name != concept.name]
        wish = ConceptSetting(concept, "add", dose)
        self.finder.studio.check_concepts([*others, wish])
        return self.dials([*settings, *others, wish])

    def reshape(self, mix: Any) -> list[dict[str, Any]]:
        """Work concepts out anew whose latents or way of steering the visitor has changed."""
        settings, concepts = self.read(mix)
        again = []
        for wish in concepts:
            concept = wish.concept
            dictionary = self.finder.studio.dictionaries[concept.sae]
            centre = self.finder.average(concept.sae).z
            concept = reshaped(dictionary, concept, centre, concept.latents, concept.use)
            again.append(ConceptSetting(concept, wish.mode, wish.dose))
        return self.dials([*settings, *again])
