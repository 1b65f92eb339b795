"""What the steering page does: its handlers, without the layout; `saint.page.api` has its API.

Handlers are pure functions of what the browser sends, which is checked like any stranger's input:
between visitors nothing is shared but read-only weights, labels and evidence.
"""

from __future__ import annotations

import base64
import functools
import inspect
import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import gradio as gr

from saint.page import conversation, fragments
from saint.page.conversation import Exchange
from saint.page.links import MAX_LINK_CHARS, json_of, link_query, read_lengths, read_link
from saint.page.mix import MAX_QUERY_CHARS, Mixer
from saint.stage.errors import UserError, first_line, is_out_of_memory, log
from saint.steering import search
from saint.steering.attribution import attribute_ids
from saint.steering.completions import (
    Pair,
    complete_pairs,
    measure_pairs,
    request_edits,
    stream_pairs,
)
from saint.steering.concepts import ConceptFinder
from saint.steering.dose import at_strength, dose_request, sweep
from saint.steering.guide import Guide
from saint.steering.search import Hit
from saint.steering.settings import ConceptSetting, Request, Setting, Wish, request_from_json
from saint.steering.showcase import Shown
from saint.steering.studio import EXAMPLE_PROMPTS, Studio, fingerprints
from saint.steering.vector import export_vector

_SEARCHES: dict[str, Callable[..., list[Hit]]] = {
    "label": search.search_labels,
    "token": search.search_token,
    "example text": search.search_text,
}
_FRAME_SECONDS = 0.06
_VIEW_LATENTS = 14
DEFAULT_STRENGTH = 2.0
OPENING_STRENGTHS = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0)
OPENING_DOSES = (0.0, 3.0, 5.0, 7.0, 9.0, 11.0, 13.0)
_OPENING_TOKENS = 24
OUT_OF_MEMORY = (
    "The server's memory is full: use fewer or shorter prompts, or ask for fewer new tokens."
)
# Small models that always take the likeliest token soon run in circles by themselves.
TEMPERATURE, TOP_P = 0.7, 0.95


def shown(handler: Callable[..., Any]) -> Callable[..., Any]:
    """Turn errors of a handler (or generator) into messages on the page, never stack traces."""

    def message(error: Exception) -> gr.Error:
        if isinstance(error, UserError):
            return gr.Error(str(error), print_exception=False)
        if is_out_of_memory(error):
            log.error("the device's memory is full: %s", first_line(error))
            return gr.Error(OUT_OF_MEMORY, print_exception=False)
        log.error("the page failed", exc_info=error)
        return gr.Error("Something went wrong; the server's log says what.", print_exception=False)

    if inspect.isgeneratorfunction(handler):

        @functools.wraps(handler)
        def stream(*args: Any, **kwargs: Any) -> Iterator[Any]:
            try:
                yield from handler(*args, **kwargs)
            except Exception as error:
                raise message(error) from None

        return stream

    @functools.wraps(handler)
    def call(*args: Any, **kwargs: Any) -> Any:
        try:
            return handler(*args, **kwargs)
        except Exception as error:
            raise message(error) from None

    return call


@dataclass(frozen=True)
class PageHandlers:
    """What the page's handlers work with; holds no visitor's state."""

    studio: Studio
    guides: list[Guide]

    finder: ConceptFinder | None = None
    shown: Sequence[Shown] = ()

    @functools.cached_property
    def concepts(self) -> ConceptFinder:
        """Where concepts come from: the store, or the model on the spot."""
        return self.finder or ConceptFinder(self.studio, self.guides, [None] * len(self.guides))

    @functools.cached_property
    def mixer(self) -> Mixer:
        """What turns wishes into dials and back."""
        return Mixer(self.concepts)

    # --- what the browser sends, and what it gets back -------------------------------------------

    def request(
        self,
        prompts: str,
        mix: Any,
        where: str,
        n: float,
        temperature: float,
        top_p: float,
        seed: float,
        chat: bool,
    ) -> Request:
        """Make a request of the page's fields; one prompt per non-empty line, a chat's is one."""
        text = str(prompts or "").strip()
        lines = [text] if chat else [line.strip() for line in text.splitlines()]
        record = {
            "prompts": [line for line in lines if line],
            "where": where,
            "max_new_tokens": n,
            "temperature": temperature,
            "top_p": top_p,
            "seed": seed,
            "chat": chat,
        }
        settings, concepts = self.mixer.read(mix)
        return replace(request_from_json(record), settings=settings, concepts=concepts)

    def fields(self, request: Request) -> list[Any]:
        """The inverse of `request`: values for the page's fields."""
        return [
            "\n".join(p if request.chat else " ".join(p.split()) for p in request.prompts),
            self.mixer.dials(request.wishes),
            request.where,
            request.max_new_tokens,
            request.temperature,
            request.top_p,
            request.seed,
            request.chat,
        ]

    def record(self, request: Request) -> dict[str, Any]:
        """A request with the identity of the SAEs that it was made for."""
        return {"request": request.to_json(), "made_with": fingerprints(self.studio)}

    def read_record(self, text: str) -> Request:
        """Read a copied JSON text. Raises UserError; warns when it was made with other SAEs."""
        record = json_of(text)
        request = request_from_json(record, self.concepts.setting)
        self.studio.check(request)
        ours = fingerprints(self.studio)
        if record.get("made_with", ours) != ours:
            gr.Warning("These settings were made with another SAE: expect another text.")
        return request

    # --- the page's actions ----------------------------------------------------------------------

    def compare(self, turns: Any, *fields: Any) -> Iterator[tuple[Any, ...]]:
        """Stream both completions; at the end their colours, the link and the JSON.

        turns: of a chat, as `conversation.to_json`; its message goes on from there, and without one
        the last turn is answered anew. Yields the result, link, JSON, state, turns and message.
        """
        request, turns = self._asked(turns, *fields)
        record = self.record(request) | {"turns": conversation.to_json(turns)}
        began, last, skip = time.monotonic(), 0.0, gr.skip()
        yield skip, skip, json.dumps(record), "Writing …", skip, skip
        for progress in stream_pairs(self.studio, request, conversation.histories(turns)):
            if progress.pairs is not None:
                seconds = time.monotonic() - began
                said = f"Done: {_n_written(progress.pairs)} tokens in {seconds:.1f} s."
                yield self._finished(request, turns, progress.pairs, said)
            elif time.monotonic() - last > _FRAME_SECONDS:
                last = time.monotonic()
                page = fragments.streaming_html(request, progress, turns)
                yield page, skip, skip, skip, skip, skip

    def _asked(self, turns: Any, *fields: Any) -> tuple[Request, list[Exchange]]:
        """The request of the fields, and the turns that it goes on from."""
        earlier = self._turns(turns) if fields[-1] else []
        if earlier and not str(fields[0] or "").strip():
            *earlier, again = earlier
            fields = (again.user, *fields[1:])
        return self.request(*fields), earlier

    def _turns(self, rows: Any) -> list[Exchange]:
        return conversation.read_turns(rows, 4 * self.studio.limits.prompt_chars)

    def _finished(
        self, request: Request, turns: list[Exchange], pairs: list[Pair], said: str
    ) -> tuple[Any, ...]:
        """What the page shows of pairs that have been written, see `compare`."""
        page = fragments.pairs_html(pairs, self.guides, chat=request.chat, turns=turns)
        results = [
            {
                "prompt": p.prompt,
                "plain": p.plain.text,
                "steered": p.steered.text,
                "steered_ids": p.steered.ids,
            }
            for p in pairs
        ]
        record = self.record(request) | ({"turns": conversation.to_json(turns)} if turns else {})
        text = json.dumps(record | {"results": results}, indent=1, ensure_ascii=False)
        query, message, kept = link_query(record), gr.skip(), []
        if request.chat:
            kept = conversation.to_json([*turns, Exchange.of(pairs[0])])[-conversation.MAX_TURNS :]
            message = ""
        return page, query, text, said, kept, message

    def stopped(self, text: str, written: str) -> tuple[Any, ...]:
        """Colours, numbers and link of what had been written when Stop was pressed.

        text: the JSON that `compare` began with. written: what the page then showed, as JSON:
        {"rows": token ids of each text, "n_prompts": how many of them are the prompt's}.
        """
        shown, skip = json_of(written or "{}"), gr.skip()
        if not shown.get("rows"):
            said = "Stopped before anything was written." if shown.get("running") else skip
            return skip, skip, skip, said, skip, skip
        request, turns = self.read_record(text), self._turns(json_of(text).get("turns"))
        rows = [self._ids(ids) for ids in shown["rows"]]
        if len(rows) != 2 * len(request.prompts):
            raise UserError("the stopped text is damaged: compare again")
        n_prompts = read_lengths(shown.get("n_prompts"), rows)
        n_new = max(len(row) - n for row, n in zip(rows, n_prompts, strict=True))
        # The link brings back what is on the screen, not what it would have become.
        request = replace(request, max_new_tokens=max(1, n_new))
        pairs = measure_pairs(self.studio, request, rows, n_prompts)
        return self._finished(request, turns, pairs, f"Stopped after {_n_written(pairs)} tokens.")

    def turn_up(self, mix: Any, query: str, against: str) -> list[dict[str, Any]]:
        """Make a concept of what was typed and add it to the mix."""
        return self.mixer.with_concept(mix, query, against)

    def reshape(self, mix: Any) -> list[dict[str, Any]]:
        """Work concepts out anew whose latents or way of steering were changed."""
        return self.mixer.reshape(mix)

    def find(self, kind: str, query: str) -> str:
        """Search for latents and show their cards."""
        return fragments.cards_html(
            [(self.card(hit.sae, hit.latent), hit) for hit in self.hits(kind, query)],
            n_saes=len(self.guides),
            note=self._note(kind, query),
        )

    def hits(self, kind: str, query: str) -> list[Hit]:
        """Search by "label", "token" or "example text"; "#896" and "1:896" name a latent itself."""
        if kind not in _SEARCHES:
            raise UserError(f"search by {kind!r:.40}: expected one of {', '.join(_SEARCHES)}")
        query = str(query or "")[:MAX_QUERY_CHARS]
        sae, _, number = query.strip().lstrip("#").rpartition(":")
        if number.isdecimal() and (sae or "0").isdecimal() and len(query) < 20:
            setting = Setting(int(number), sae=int(sae or 0))
            self.studio.check_settings([setting])
            return [Hit(setting.sae, setting.latent, 1.0, "label")]
        return _SEARCHES[kind](self.studio, self.guides, query) if query.strip() else []

    def _note(self, kind: str, query: str) -> str:
        if not str(query or "").strip():
            return "Type something to search for."
        if kind == "label" and not any(guide.labels for guide in self.guides):
            return "No labels are loaded: search by token or by example text, or type #number."
        return ""

    def card(self, sae: int, latent: int) -> search.Card:
        """What is known of a latent."""
        return search.make_card(self.studio, self.guides, sae, latent)

    def choose(self, mix: Any, event: gr.EventData) -> list[dict[str, Any]]:
        """Add the latent whose button was pressed to the mix."""
        latent, sae = int(event.latent), int(event.sae)
        self.studio.check_settings([Setting(latent, sae=sae)])
        chosen = Setting(latent, "add", self.strength_for(sae, latent), sae)
        return self.mixer.with_latent(mix, chosen)

    def view(self, prompts: str, mix: Any, chat: bool) -> str:
        """Show the first prompt's tokens against what is chosen and the latents that stand out."""
        settings, concepts = self.mixer.read(mix)
        tokens, rows = self.prompt_rows(prompts, (*settings, *concepts), chat)
        return fragments.prompt_view_html(tokens, rows, self.guides)

    def view_written(self, text: str) -> str:
        """Show the first steered text of the results, prompt and all, token by token."""
        if not text:
            return ""
        record = json.loads(text)
        request, ids = self.read_record(text), record["results"][0]["steered_ids"]
        tokens, rows = self.prompt_rows(self._ids(ids), request.wishes, False)
        return fragments.prompt_view_html(tokens, rows, self.guides)

    def prompt_rows(
        self, prompts: str | list[int], wishes: Sequence[Wish], chat: bool
    ) -> tuple[list[str], list[tuple[Wish, list[float]]]]:
        """Tokens of the first prompt (or of ids), and each wish's activation on them, in units."""
        if isinstance(prompts, str):
            lines = [line for line in prompts.splitlines() if line.strip()]
            if not lines:
                raise UserError("write a prompt first")
            text: str | list[int] = lines[0][: self.studio.limits.prompt_chars]
        else:
            text = prompts
        hits = search.search_text(self.studio, self.guides, text, limit=_VIEW_LATENTS)
        found = [Setting(hit.latent, sae=hit.sae) for hit in hits]
        named = {(w.sae, w.latent) for w in wishes if isinstance(w, Setting)}
        wanted = [*wishes, *(s for s in found if (s.sae, s.latent) not in named)]
        return search.activation_rows(self.studio, text, wanted, chat=chat)

    def _ids(self, ids: Any) -> list[int]:
        """Check token ids that a browser sent."""
        limit = min(self.studio.limits.tokens, self.studio.model.args.max_seq_len)
        if not isinstance(ids, list) or not 2 <= len(ids) <= limit:
            raise UserError("there is no token to look at")
        if not all(isinstance(i, int) and 0 <= i < self.studio.tokenizer.n_vocab for i in ids):
            raise UserError("the text's tokens are damaged: compare again")
        return ids

    def why(self, text: str, event: gr.EventData) -> str:
        """Which latents caused the token that was pressed: with its side's edits in place."""
        ids = self._ids(event.ids)
        request = self.read_record(text or "{}") if event.side == "steered" else Request(())
        edits = request_edits(self.studio, request, [int(event.n_prompt)])
        found = attribute_ids(self.studio, ids[:-1], ids[-1], edits=edits)
        return fragments.why_html(found, self.guides[found.sae])

    def dose_choices(self, mix: Any, chosen: Any) -> Any:
        """What of the mix can be swept: the chosen one stays where it is still in the mix."""
        settings, concepts = self.mixer.read(mix)
        wishes: list[Wish] = [*settings, *concepts]
        values = [_key(wish) for wish in wishes]
        names = [fragments.wish_name(wish, self.guides) for wish in wishes]
        value = chosen if chosen in values else next(iter(values), None)
        return gr.Dropdown(choices=list(zip(names, values, strict=True)), value=value)

    def sweep_chosen(self, chosen: Any, *fields: Any) -> Iterator[str]:
        """Sweep one wish of the mix, "sae:latent" or a concept's name: concept against fluency."""
        request = self.request(*fields)
        wishes = {_key(wish): wish for wish in request.wishes}
        if chosen not in wishes:
            raise UserError("choose something of your mix first: the sweep turns it up")
        # The examples fill up, but they are no questions.
        examples = [p for p in EXAMPLE_PROMPTS if p not in request.prompts and not request.chat]
        prompts = (*request.prompts, *examples)
        first = replace(request, prompts=prompts[:1])
        varied = dose_request(self.studio, first, more=prompts[1:])
        for report in sweep(self.studio, wishes[chosen], varied):
            yield fragments.dose_html(report, self.guides)

    def export(self, mix: Any) -> str:
        """Make a download link of the mix as a steering vector; the bytes are in the link."""
        settings, concepts = self.mixer.read(mix)
        data = base64.b64encode(export_vector(self.studio, settings, concepts)).decode()
        names = [f"{s.latent}" for s in settings] + [_file_word(c.concept.name) for c in concepts]
        name = "_".join(["steering", *names[:4]]) + ".safetensors"
        return fragments.download_html(name, data)

    def restore(self, web_request: gr.Request) -> list[Any]:
        """Fill the fields from the link's query, where there is one.

        "?steer=film=+8,896=+1.5" names concepts and latents, "&prompt=" a prompt of one's own; the
        page's own links hold everything.
        """
        query = dict(web_request.query_params) if web_request else {}
        steer = query.get("steer")
        if not steer:
            return [*[gr.skip()] * 8, [], False]
        if "=" not in steer:
            return [*self.fields_and_turns(read_link(steer)), True]
        if len(steer) > MAX_LINK_CHARS:
            raise UserError("the link is too long to be one of this page's")
        prompt = str(query.get("prompt") or EXAMPLE_PROMPTS[0])
        record = {
            "prompts": [prompt],
            # A plus sign is a space where a query is read.
            "steer": [one.strip().replace("= ", "=+") for one in steer.split(",")],
            "temperature": TEMPERATURE,
            "top_p": TOP_P,
        }
        return [*self.fields_and_turns(json.dumps(record)), True]

    def fields_and_turns(self, text: str) -> list[Any]:
        """Values for the fields, and the turns of the conversation, from copied JSON."""
        request = self.read_record(text or "")
        turns = self._turns(json_of(text).get("turns")) if request.chat else []
        return [*self.fields(request), conversation.to_json(turns)]

    def preset(self, *fields: Any) -> str:
        """The fields as JSON text, to be kept in the visitor's browser."""
        return json.dumps(self.record(self.request(*fields)), ensure_ascii=False)

    def load_preset(self, presets: Any, name: Any) -> list[Any]:
        """Fill the fields from one of the browser's presets."""
        if not isinstance(presets, dict) or name not in presets:
            raise UserError("choose a saved preset first")
        return self.fields(self.read_record(str(presets[name])))

    @functools.cached_property
    def opening(self) -> str:
        """A finished pair with a dose slider, for a page that nobody has used yet; "" for none.

        Of the first example, at seven strengths. Takes some seconds.
        """
        if not self.showcase():
            return ""
        log.info("writing the page's first example")
        name, request = self.showcase()[0]
        request = replace(request, max_new_tokens=_OPENING_TOKENS)
        (wish,) = request.wishes
        strengths, usual = OPENING_STRENGTHS, DEFAULT_STRENGTH
        if isinstance(wish, ConceptSetting):
            strengths, usual = OPENING_DOSES, wish.dose
        chosen = min(range(1, len(strengths)), key=lambda i: abs(strengths[i] - usual))
        doses = []
        for strength in strengths:
            one = at_strength(wish, strength or strengths[1])
            (pair,) = complete_pairs(self.studio, request.only(one))
            doses.append((strength, pair))
        return fragments.opening_html(name, doses, chosen)

    def showcase(self) -> list[tuple[str, Request]]:
        """Up to four examples for the loaded SAEs, each seen to show in written texts."""
        return self._showcase

    @functools.cached_property
    def _showcase(self) -> list[tuple[str, Request]]:
        found = []
        for one in self.shown:
            wish = ConceptSetting(one.concept, "add", one.dose)
            drawn = {"temperature": TEMPERATURE, "top_p": TOP_P, "seed": one.best.seed}
            request = Request((one.best.prompt,), concepts=(wish,), **drawn)
            found.append((one.concept.name, request))
        for sae, guide in enumerate(self.guides):
            for latent in guide.shown(4):
                wish = Setting(latent, "add", self.strength_for(sae, latent), sae)
                prompt = EXAMPLE_PROMPTS[len(found) % len(EXAMPLE_PROMPTS)]
                request = Request((prompt,), (wish,), temperature=TEMPERATURE, top_p=TOP_P)
                found.append((fragments.wish_name(wish, self.guides), request))
        return found[:4]

    def strength_for(self, sae: int, latent: int) -> float:
        """A strength to begin with, in units: where predictions lose 1 nat, if that is known."""
        row = self.guides[sae].effect_row(latent)
        dose = None if row is None else row["dose_1nat"]
        unit = float(self.studio.dictionaries[sae].units[latent])
        return DEFAULT_STRENGTH if dose is None else round(min(4.0, dose / unit), 2)


def _n_written(pairs: Sequence[Pair]) -> int:
    return max(len(p.steered.tokens) - p.steered.n_prompt for p in pairs)


def _key(wish: Wish) -> str:
    return wish.concept.name if isinstance(wish, ConceptSetting) else f"{wish.sae}:{wish.latent}"


def _file_word(name: str) -> str:
    return "".join(c if c.isalnum() else "-" for c in name)[:20]
