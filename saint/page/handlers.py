"""What the steering page does: its handlers and its named API, without the layout.

Handlers are pure functions of what the browser sends, which is checked like any stranger's input:
between visitors nothing is shared but read-only weights, labels and evidence. The named API
endpoints (`steer`, `search`, `latent`, `prompt_view`, `dose`, `steering_vector`, `info`) take and
return plain JSON.
"""

from __future__ import annotations

import base64
import functools
import inspect
import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import gradio as gr

from saint.page import fragments
from saint.stage.errors import UserError, first_line, is_out_of_memory, log
from saint.steering import search
from saint.steering.completions import complete_pairs, stream_pairs
from saint.steering.dose import dose_request, sweep
from saint.steering.guide import Guide
from saint.steering.search import Hit
from saint.steering.settings import Request, Setting, request_from_json
from saint.steering.studio import EXAMPLE_PROMPTS, Studio, fingerprints
from saint.steering.vector import export_vector

_SEARCHES: dict[str, Callable[..., list[Hit]]] = {
    "label": search.search_labels,
    "token": search.search_token,
    "example text": search.search_text,
}
_FRAME_SECONDS = 0.06
_MAX_QUERY_CHARS = 2000
_MAX_LINK_CHARS = 40_000
_VIEW_LATENTS = 14
DEFAULT_STRENGTH = 2.0
OPENING_STRENGTHS = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0)
_OPENING_TRIES, _OPENING_TOKENS = 2, 24
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

    # --- what the browser sends, and what it gets back -------------------------------------------

    def dial(self, setting: Setting) -> dict[str, Any]:
        """A setting as the page's mix shows it.

        share: of the residual, per unit of strength; missing where tokens are not standardised,
        since it then depends on the token.
        """
        self.studio.check_settings([setting])
        dictionary = self.studio.dictionaries[setting.sae]
        unit = float(dictionary.units[setting.latent])
        shown = {
            "sae": setting.sae,
            "latent": setting.latent,
            "mode": setting.mode,
            "strength": setting.strength,
            "label": self.guides[setting.sae].label(setting.latent),
            "raw": dictionary.unit_source.startswith("raw"),
        }
        config = dictionary.sae.config
        if config.normalisation == "per_token_standardise":
            # A unit decoder direction times std(x), against ‖x − mean(x)‖ = std(x)·√(d_model − 1).
            shown["share"] = unit / (config.d_model - 1) ** 0.5
        return shown

    def settings(self, mix: Any) -> tuple[Setting, ...]:
        """Check the mix that a browser sent. Raises UserError when it is no mix."""
        try:
            dials = [(d["latent"], d["mode"], d["strength"], d["sae"]) for d in mix or []]
            settings = tuple(Setting(int(a), str(m), float(s), int(i)) for a, m, s, i in dials)
        except (TypeError, KeyError, ValueError, OverflowError) as error:
            if isinstance(error, UserError):
                raise
            raise UserError("the chosen latents are damaged: remove them and start over") from None
        self.studio.check_settings(settings)
        return settings

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
        """Make a request of the page's fields; one prompt per non-empty line."""
        lines = [line.strip() for line in str(prompts or "").splitlines() if line.strip()]
        record = {
            "prompts": lines,
            "where": where,
            "max_new_tokens": n,
            "temperature": temperature,
            "top_p": top_p,
            "seed": seed,
            "chat": chat,
        }
        return replace(request_from_json(record), settings=self.settings(mix))

    def fields(self, request: Request) -> list[Any]:
        """The inverse of `request`: values for the page's fields."""
        return [
            "\n".join(" ".join(prompt.split()) for prompt in request.prompts),
            [self.dial(setting) for setting in request.settings],
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
        if len(text) > _MAX_LINK_CHARS:
            raise UserError("the settings are too long to be settings")
        try:
            record = json.loads(text)
        except ValueError:
            raise UserError("the settings are not JSON") from None
        request = request_from_json(record)
        self.studio.check(request)
        ours = fingerprints(self.studio)
        if record.get("made_with", ours) != ours:
            gr.Warning("These settings were made with another SAE: expect another text.")
        return request

    # --- the page's actions ----------------------------------------------------------------------

    def compare(self, *fields: Any) -> Iterator[tuple[Any, ...]]:
        """Stream both completions; at the end their colours, the link and the JSON."""
        request = self.request(*fields)
        last = 0.0
        for progress in stream_pairs(self.studio, request):
            if progress.pairs is None:
                if time.monotonic() - last > _FRAME_SECONDS:
                    last = time.monotonic()
                    page = fragments.streaming_html(request.prompts, progress.texts)
                    yield page, gr.skip(), gr.skip()
                continue
            page = fragments.pairs_html(progress.pairs, self.guides, chat=request.chat)
            results = [
                {"prompt": p.prompt, "plain": p.plain.text, "steered": p.steered.text}
                for p in progress.pairs
            ]
            record = self.record(request)
            yield (
                page,
                link_query(record),
                json.dumps(record | {"results": results}, indent=1, ensure_ascii=False),
            )

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
        query = str(query or "")[:_MAX_QUERY_CHARS]
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
        settings = self.settings(mix)
        named = {"sae": event.sae, "latent": event.latent}
        (chosen,) = self.settings([named | {"mode": "add", "strength": DEFAULT_STRENGTH}])
        if any((s.sae, s.latent) == (chosen.sae, chosen.latent) for s in settings):
            raise UserError("this latent is in the mix already")
        return [self.dial(setting) for setting in (*settings, chosen)]

    def view(self, prompts: str, mix: Any, chat: bool) -> str:
        """Show the first prompt's tokens against the latents that stand out on it."""
        tokens, rows = self.prompt_rows(prompts, self.settings(mix), chat)
        return fragments.prompt_view_html(tokens, rows, self.guides)

    def prompt_rows(
        self, prompts: str, settings: Sequence[Setting], chat: bool
    ) -> tuple[list[str], list[tuple[Setting, list[float]]]]:
        """Tokens of the first prompt, and per latent its activation on each, in units."""
        lines = [line for line in str(prompts or "").splitlines() if line.strip()]
        if not lines:
            raise UserError("write a prompt first")
        prompt = lines[0][: self.studio.limits.prompt_chars]
        hits = search.search_text(self.studio, self.guides, prompt, limit=_VIEW_LATENTS)
        found = [Setting(hit.latent, sae=hit.sae) for hit in hits]
        named = {(s.sae, s.latent) for s in settings}
        wanted = [*settings, *(s for s in found if (s.sae, s.latent) not in named)]
        return search.activation_rows(self.studio, prompt, wanted, chat=chat)

    def dose_choices(self, mix: Any, chosen: Any) -> Any:
        """The mix's latents to sweep: the chosen one stays where it is still in the mix."""
        settings = self.settings(mix)
        values = [f"{s.sae}:{s.latent}" for s in settings]
        names = [fragments.latent_name(s, self.guides) for s in settings]
        value = chosen if chosen in values else next(iter(values), None)
        return gr.Dropdown(choices=list(zip(names, values, strict=True)), value=value)

    def sweep_chosen(self, chosen: Any, *fields: Any) -> Iterator[str]:
        """Sweep one latent of the mix, "sae:latent", and plot concept against fluency."""
        request = self.request(*fields)
        settings = {f"{s.sae}:{s.latent}": s for s in request.settings}
        if chosen not in settings:
            raise UserError("choose a latent of your mix first: the sweep turns it up")
        # The examples fill up, but they are no questions.
        examples = [p for p in EXAMPLE_PROMPTS if p not in request.prompts and not request.chat]
        prompts = (*request.prompts, *examples)
        first = replace(request, prompts=prompts[:1])
        varied = dose_request(self.studio, first, more=prompts[1:])
        for report in sweep(self.studio, settings[chosen], varied):
            yield fragments.dose_html(report, self.guides)

    def export(self, mix: Any) -> str:
        """Make a download link of the mix as a steering vector; the bytes are in the link."""
        settings = self.settings(mix)
        data = base64.b64encode(export_vector(self.studio, settings)).decode()
        name = "_".join(["steering", *(f"{s.latent}" for s in settings[:4])]) + ".safetensors"
        return fragments.download_html(name, data)

    def restore(self, web_request: gr.Request) -> list[Any]:
        """Fill the fields from the link's query, where there is one."""
        query = dict(web_request.query_params).get("steer") if web_request else None
        if not query:
            return [gr.skip()] * 8 + [False]
        return [*self.fields(self.read_record(read_link(query))), True]

    def load(self, text: str) -> list[Any]:
        """Fill the fields from copied JSON."""
        return self.fields(self.read_record(text or ""))

    def preset(self, *fields: Any) -> str:
        """The fields as JSON text, to be kept in the visitor's browser."""
        return json.dumps(self.record(self.request(*fields)), ensure_ascii=False)

    def load_preset(self, presets: Any, name: Any) -> list[Any]:
        """Fill the fields from one of the browser's presets."""
        if not isinstance(presets, dict) or name not in presets:
            raise UserError("choose a saved preset first")
        return self.load(str(presets[name]))

    @functools.cached_property
    def opening(self) -> str:
        """A finished pair with a dose slider, for a page that nobody has used yet; "" for none.

        Of the first examples, the one whose latent shows most in the text. Takes some seconds.
        """
        found = []
        log.info("writing the page's first example")
        for name, request in self.showcase()[:_OPENING_TRIES]:
            request = replace(request, max_new_tokens=_OPENING_TOKENS)
            (pair,) = complete_pairs(self.studio, request)
            (before,), (after,) = (
                fragments.mean_activations(reading) or [0.0]
                for reading in (pair.plain, pair.steered)
            )
            found.append((after - before, name, request, pair))
        if not found:
            return ""
        _, name, request, first = max(found, key=lambda row: row[0])
        doses = []
        for strength in OPENING_STRENGTHS:
            pair = first
            if strength not in (0.0, DEFAULT_STRENGTH):
                settings = (replace(request.settings[0], strength=strength),)
                (pair,) = complete_pairs(self.studio, replace(request, settings=settings))
            doses.append((strength, pair))
        return fragments.opening_html(name, doses, OPENING_STRENGTHS.index(DEFAULT_STRENGTH))

    def showcase(self) -> list[tuple[str, Request]]:
        """Up to four examples for the loaded SAEs."""
        return self._showcase

    @functools.cached_property
    def _showcase(self) -> list[tuple[str, Request]]:
        """Examples for the loaded SAEs: clear latents turned up on the example prompts."""
        found = []
        for sae, guide in enumerate(self.guides):
            for latent in guide.clearest(4, self.studio.tokenizer):
                setting = Setting(latent, "add", DEFAULT_STRENGTH, sae)
                prompt = EXAMPLE_PROMPTS[len(found) % len(EXAMPLE_PROMPTS)]
                request = Request((prompt,), (setting,), temperature=TEMPERATURE, top_p=TOP_P)
                found.append((guide.label(latent), request))
        return found[:4]


def link_query(record: dict[str, Any]) -> str:
    """Return the page's query string for a record."""
    packed = json.dumps(record, separators=(",", ":"), ensure_ascii=False).encode()
    return "?steer=" + base64.urlsafe_b64encode(packed).decode().rstrip("=")


def read_link(query: str) -> str:
    """Return the JSON text of a link's query value. Raises UserError when it is damaged."""
    if len(query) > _MAX_LINK_CHARS:
        raise UserError("the link is too long to be one of this page's")
    try:
        return base64.urlsafe_b64decode(query + "=" * (-len(query) % 4)).decode()
    except ValueError:
        raise UserError("the link is damaged: copy it again, whole") from None


def api_endpoints(handlers: PageHandlers) -> dict[str, Callable[..., Any]]:
    """Return the named API: plain JSON in, plain JSON out."""

    def steer(request: dict) -> Iterator[dict]:
        """Complete `prompts` plainly and steered; `request` as in the copied JSON's "request"."""
        parsed = request_from_json(request)
        # Gradio ends a generator whose client has left; anything else would run to its end.
        for progress in stream_pairs(handlers.studio, parsed):
            if progress.pairs is None:
                yield {"texts": progress.texts}
            else:
                pairs = [pair.to_json() for pair in progress.pairs]
                yield {"request": parsed.to_json(), "pairs": pairs}

    def search(query: str, by: str = "label") -> list:
        """Find latents by "label", "token" or "example text"."""
        hits = handlers.hits(by, query)
        return [asdict(h) | {"label": handlers.guides[h.sae].label(h.latent)} for h in hits]

    def latent(index: int, sae: int = 0) -> dict:
        """What is known of one latent: label, unit, density, strongest windows."""
        handlers.studio.check_settings([Setting(int(index), sae=int(sae))])
        return asdict(handlers.card(int(sae), int(index)))

    def prompt_view(prompt: str, chat: bool = False) -> dict:
        """Tokens of a prompt and the activations (in units) of the latents that stand out."""
        tokens, rows = handlers.prompt_rows(prompt, (), bool(chat))
        named = [{"sae": s.sae, "latent": s.latent, "activations": v} for s, v in rows]
        return {"tokens": tokens, "latents": named}

    def dose(
        setting: str,
        prompts: list | None = None,
        seed: int = 0,
        where: str = "both",
        chat: bool = False,
    ) -> Iterator[dict]:
        """Sweep a latent's strength ("896=+1"); returns the points and the proposed dose."""
        record = {"prompts": prompts or list(EXAMPLE_PROMPTS[:1]), "steer": [setting]}
        wanted = request_from_json(record | {"seed": seed, "where": where, "chat": chat})
        more = () if prompts else EXAMPLE_PROMPTS[1:]
        varied = dose_request(handlers.studio, wanted, more=more)
        for report in sweep(handlers.studio, wanted.settings[0], varied):
            yield report.to_json()

    def steering_vector(steer: list) -> dict:
        """Return a steering vector: {"safetensors": base64 text}."""
        wanted = request_from_json({"steer": steer})
        data = export_vector(handlers.studio, wanted.settings)
        return {"safetensors": base64.b64encode(data).decode()}

    def info() -> dict:
        """What is loaded, and what one request may ask for."""
        return _loaded(handlers)

    endpoints = (steer, search, latent, prompt_view, dose, steering_vector, info)
    return {function.__name__: function for function in endpoints}


def _loaded(handlers: PageHandlers) -> dict[str, Any]:
    saes = [
        {
            "name": d.name,
            "layer": d.hook.layer,
            "hook_point": d.hook.name,
            "n_latents": d.sae.config.n_latents,
            "unit": d.unit_source,
            "n_labels": len(guide.labels),
        }
        for d, guide in zip(handlers.studio.dictionaries, handlers.guides, strict=True)
    ]
    chat = handlers.studio.tokenizer.has_chat
    return {"saes": saes, "limits": asdict(handlers.studio.limits), "chat": chat}
