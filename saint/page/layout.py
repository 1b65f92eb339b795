"""The layout of the steering page, in Gradio; `saint.page.handlers` has what it does."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice, zip_longest
from pathlib import Path
from typing import Any

import gradio as gr
from gradio import themes
from gradio.events import api

from saint.page.api import api_endpoints
from saint.page.fragments import chips_html, header_html
from saint.page.handlers import TEMPERATURE, TOP_P, PageHandlers, shown
from saint.page.mix import MAX_QUERY_CHARS
from saint.stage.html import inline
from saint.stage.plots import STYLE
from saint.steering.settings import WHERE, Limits
from saint.steering.studio import EXAMPLE_PROMPTS

_HERE = Path(__file__).parent
# One request computes at a time: nobody's batch depends on who else is there.
_MODEL: dict[str, Any] = {"concurrency_id": "model", "concurrency_limit": 1}
_QUIET: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden"}
_BUSY: dict[str, Any] = {"api_visibility": "private", "show_progress": "minimal"}
_PRESS = """
element.addEventListener('click', (event) => {
  const button = event.target.closest('button');
  if (button) trigger('pressed', { ...Object.fromEntries(
    Object.entries(button.dataset).map(([key, value]) => [key, Number(value)])) });
});
"""
_SLIDE = """
const slider = element.querySelector('input[type=range]'), says = element.querySelector('output');
const variants = [...element.querySelectorAll('.variant')];
slider.addEventListener('input', () => {
  variants.forEach((variant, i) => { variant.hidden = i !== Number(slider.value); });
  says.textContent = variants[slider.value].dataset.says;
});
"""
# What was being written when Stop was pressed is measured as it then stood.
_WRITTEN = """(text) => {
  const running = document.querySelector('#result .running');
  const state = document.querySelector('#state');
  const waits = state?.innerText.startsWith('Writing') ?? false;
  return [text, running ? running.dataset.written : JSON.stringify({ running: waits })];
}"""
# After a run: the link, and the same in the address bar, so that reloading brings the pair back.
_SHARE_JS = """(query) => {
  if (!query) return query;
  const link = location.origin + location.pathname + query.slice(query.indexOf('?'));
  history.replaceState(null, '', link);
  return link;
}"""


_EMPTY = "<div class='saint'><p class='empty'>Both texts appear here, side by side.</p></div>"
_PROMPTS, _MESSAGE = "Prompts, one per line", "Your message"


def theme() -> themes.Base:
    """Return a theme that uses the visitor's own fonts: the page asks no other server for any."""
    return themes.Default(
        primary_hue="orange",
        neutral_hue="slate",
        radius_size="lg",
        font=["system-ui", "sans-serif"],
        font_mono=["ui-monospace", "monospace"],
    ).set(  # white on the hue's own orange is too pale to read
        button_primary_background_fill="*primary_700",
        button_primary_background_fill_hover="*primary_800",
        button_primary_background_fill_dark="*primary_700",
        button_primary_background_fill_hover_dark="*primary_800",
    )


def css() -> str:
    """Return the page's style sheet."""
    return str(inline(_HERE / "page.css") + STYLE)


def _script(name: str) -> str:
    return (_HERE / name).read_text(encoding="utf-8")


def build_page(handlers: PageHandlers) -> gr.Blocks:
    """Lay the page out and wire it; start it with `launch`."""
    page = gr.Blocks(title="SAINT: steer a language model", analytics_enabled=False)
    with page:
        gr.HTML(header_html(_facts(handlers)), elem_id="header")
        if handlers.opening:
            gr.HTML(handlers.opening, js_on_load=_SLIDE, elem_id="opening")
        with gr.Row(equal_height=False):
            with gr.Column(scale=5, min_width=320):
                mix, turned_up = _latents_column(handlers)
            with gr.Column(scale=6, min_width=320):
                writing = _Writing(handlers, mix)
                fields, result = writing.fields, writing.result
        tools = _Tools(handlers, writing)
        filled = _wire_chips(handlers, writing.chips, fields)
        restored = gr.State(False)
        page.load(shown(handlers.restore), None, [*fields, writing.turns, restored], **_QUIET)
        # Only a link's visitor has something to wait for in the queue.
        starts = (writing.run.click, turned_up.success, filled.success, restored.change)
        _wire_running(handlers, writing, tools, starts)
        result.asked(shown(handlers.why), tools.json, writing.why, **_BUSY, **_MODEL)
        writing.why.pressed(shown(handlers.choose), mix, mix, **_QUIET)
        for name, function in api_endpoints(handlers).items():
            api(shown(function), api_name=name, **_MODEL)
    page.queue(max_size=64, default_concurrency_limit=1)
    return page


def _wire_running(
    handlers: PageHandlers, writing: _Writing, tools: _Tools, starts: Sequence[Any]
) -> None:
    """What happens when texts are written, and when that is stopped."""
    outputs = [writing.result, tools.query, tools.json, writing.state, writing.turns]
    outputs.append(writing.fields[0])

    def then(event: Any) -> None:
        event.success(None, tools.query, tools.link, js=_SHARE_JS, **_QUIET)
        event.success(shown(handlers.view_written), tools.json, tools.view, **_QUIET, **_MODEL)
        event.failure(lambda: "Nothing was written.", None, writing.state, **_QUIET)

    running, inputs = [], [writing.turns, *writing.fields]
    for begins in starts:
        running.append(
            begins(
                shown(handlers.compare), inputs, outputs, show_progress_on=writing.result,
                **_BUSY, **_MODEL,
            )
        )  # fmt: skip
        then(running[-1])
    written = gr.Textbox(visible=False)
    stopped = [tools.json, written]
    then(
        writing.stop.click(
            shown(handlers.stopped), stopped, outputs, js=_WRITTEN, cancels=running,
            **_QUIET, **_MODEL,
        )
    )  # fmt: skip


def _facts(handlers: PageHandlers) -> str:
    parts = []
    for dictionary, guide in zip(handlers.studio.dictionaries, handlers.guides, strict=True):
        labels = f"{len(guide.labels):,} labelled" if guide.labels else "no labels"
        parts.append(
            f"{dictionary.name}: {dictionary.sae.config.n_latents:,} latents ({labels}) at layer "
            f"{dictionary.hook.layer}, {dictionary.hook.name}; strength in units of the "
            f"{dictionary.unit_source}"
        )
    return " · ".join(parts)


def _latents_column(handlers: PageHandlers) -> tuple[gr.HTML, Any]:
    """What to turn up; returns the mix, and the event of something turned up by its name."""
    gr.HTML("<div class='saint'><h2><span class='num'>1</span>Choose concepts</h2></div>")
    wish = gr.Textbox(
        label="Turn up …",
        placeholder="a word, “talk like a lawyer”, a few sentences",
        submit_btn="Turn up",
        max_length=MAX_QUERY_CHARS,
        elem_id="wish",
    )
    with gr.Accordion("… and away from another text", open=False, elem_id="away"):
        against = gr.Textbox(
            label="What it is to differ from",
            placeholder="then the concept is the difference of the two texts",
            max_length=MAX_QUERY_CHARS,
            elem_id="against",
        )
    gr.HTML("<div class='saint'><h2>Your mix</h2></div>")
    mix = gr.HTML(
        [],
        html_template="<div class='saint dials'></div>",
        js_on_load=_script("page.js"),
        elem_id="mix",
    )
    turned_up = wish.submit(shown(handlers.turn_up), [mix, wish, against], mix, **_BUSY, **_MODEL)
    mix.reshaped(shown(handlers.reshape), mix, mix, **_QUIET)
    with gr.Accordion("Search single latents", open=True, elem_id="search"):
        _search_box(handlers, mix)
    return mix, turned_up


def _search_box(handlers: PageHandlers, mix: gr.HTML) -> None:
    kind = gr.Radio(
        [("Label", "label"), ("Token", "token"), ("Example text", "example text")],
        value="label" if any(g.labels for g in handlers.guides) else "example text",
        label="Search by",
        elem_id="search_by",
    )
    query = gr.Textbox(
        label="Search for",
        placeholder=_search_hint(handlers),
        submit_btn="Search",
        max_length=2000,
        elem_id="query",
    )
    results = gr.HTML("", js_on_load=_PRESS, elem_id="results")
    gr.on(
        [query.submit, kind.change],
        shown(handlers.find),
        [kind, query],
        results,
        trigger_mode="always_last",
        **_BUSY,
        **_MODEL,
    )
    results.pressed(shown(handlers.choose), mix, mix, **_QUIET)


def _search_hint(handlers: PageHandlers) -> str:
    """Words that this SAE's own labels have."""
    labels = (label.text for guide in handlers.guides for label in guide.labels.values())
    words = [label.partition(",")[0][:24] for label in islice(labels, 2)]
    return ", ".join([*words, "… or #896 for a latent itself"])


class _Writing:
    """Prompts, the button that runs, and what comes of it."""

    def __init__(self, handlers: PageHandlers, mix: gr.HTML) -> None:
        limits, has_chat = handlers.studio.limits, handlers.studio.tokenizer.has_chat
        gr.HTML("<div class='saint'><h2><span class='num'>2</span>Write</h2></div>")
        prompts = gr.Textbox(
            value=EXAMPLE_PROMPTS[3],
            label=_PROMPTS,
            lines=2,
            max_lines=8,
            max_length=limits.prompts * limits.prompt_chars,
            elem_id="prompts",
        )
        self.chips = gr.HTML(_chips(handlers), js_on_load=_PRESS, elem_id="chips")
        self.fields = [prompts, mix, *_settings(limits, has_chat=has_chat)]
        self.turns = gr.State([])
        with gr.Row(elem_id="bar"):
            self.run = gr.Button("Compare", variant="primary", elem_id="run", scale=3)
            self.stop = gr.Button("Stop", elem_id="stop", scale=1, min_width=90)
            self.anew = gr.Button(
                "New conversation", visible=False, elem_id="anew", scale=1, min_width=90
            )
        self.state = gr.HTML(
            "", html_template="<p class='saint muted' role='status'>${value}</p>", elem_id="state"
        )
        gr.HTML("<div class='saint'><h2><span class='num'>3</span>Compare</h2></div>")
        self.result = gr.HTML(_EMPTY, js_on_load=_script("why.js"), elem_id="result")
        self.why = gr.HTML("", js_on_load=_PRESS, elem_id="why")
        self._wire_chat()

    def _wire_chat(self) -> None:
        def switched(chat: bool) -> list[Any]:
            words = (_MESSAGE, "Send") if chat else (_PROMPTS, "Compare")
            return [
                gr.Textbox(label=words[0]),
                gr.Button(words[1]),
                gr.Button(visible=bool(chat)),
            ]

        buttons = [self.fields[0], self.run, self.anew]
        self.fields[-1].change(switched, self.fields[-1], buttons, **_QUIET)
        self.anew.click(
            lambda: ([], _EMPTY, "", ""),
            None,
            [self.turns, self.result, self.state, self.fields[0]],
            **_QUIET,
        )


def _settings(limits: Limits, *, has_chat: bool) -> list[Any]:
    chat = gr.Checkbox(
        label="Chat: a conversation, plain and steered each with its own answers",
        visible=has_chat,
        elem_id="chat",
    )
    with gr.Accordion("Settings", open=False, elem_id="settings"):
        names = {"both": "prompt and new", "generated": "only new", "prompt": "only the prompt's"}
        choices = [(names[where], where) for where in WHERE]
        where = gr.Radio(choices, value="both", label="Steer on which tokens", elem_id="where")
        n = gr.Slider(1, limits.new_tokens, 40, step=1, label="New tokens", elem_id="length")
        with gr.Row():
            temperature = gr.Slider(
                0, 2, TEMPERATURE, step=0.05, label="Temperature (0: the likeliest)", min_width=150
            )
            top_p = gr.Slider(0.05, 1, TOP_P, step=0.05, label="Top-p", min_width=150)
            seed = gr.Number(0, label="Seed", precision=0, minimum=0, min_width=100, elem_id="seed")
    return [where, n, temperature, top_p, seed, chat]


def _chips(handlers: PageHandlers) -> str:
    seen = [
        f"in {one.share:.0%} of {len(one.texts)} texts, for {one.loss:.1f} nats per token"
        for one in handlers.shown
    ]
    names = [name[:48] for name, _ in handlers.showcase()]
    return chips_html([*zip_longest(names, seen[: len(names)], fillvalue="")], EXAMPLE_PROMPTS)


def _wire_chips(handlers: PageHandlers, chips: gr.HTML, fields: list[Any]) -> Any:
    """A chip fills the fields; the event that follows has something to run."""
    showcase = handlers.showcase()

    def press(event: gr.EventData) -> list[Any]:
        chosen = event._data or {}
        if chosen.get("show") in range(len(showcase)):
            return handlers.fields(showcase[int(chosen["show"])][1])
        if chosen.get("prompt") in range(len(EXAMPLE_PROMPTS)):
            return [EXAMPLE_PROMPTS[int(chosen["prompt"])], *[gr.skip()] * 7]
        return [gr.skip()] * 8

    return chips.pressed(shown(press), None, fields, **_QUIET)


class _Tools:
    """The tabs below: looking closer, finding the dose, keeping and sharing."""

    def __init__(self, handlers: PageHandlers, writing: _Writing) -> None:
        fields = writing.fields
        prompts, mix, chat = fields[0], fields[1], fields[-1]
        with gr.Tabs():
            with gr.Tab("Look inside"):
                look = gr.Button("Show the first prompt, token by token", elem_id="look")
                view = self.view = gr.HTML("", js_on_load=_PRESS, elem_id="view")
                look.click(shown(handlers.view), [prompts, mix, chat], view, **_BUSY, **_MODEL)
                view.pressed(shown(handlers.choose), mix, mix, **_QUIET)
            with gr.Tab("Find the dose"):
                gr.HTML(
                    "<div class='saint'><p class='muted'>Turns one part of the mix up step by "
                    "step on a few prompts, and looks for the strongest dose that leaves the text "
                    "fluent.</p></div>"
                )
                which = gr.Dropdown([], label="Part of the mix", elem_id="dose_latent")
                with gr.Row():
                    start = gr.Button("Sweep it", elem_id="sweep")
                    end = gr.Button("Stop", scale=0, min_width=90)
                plot = gr.HTML("", elem_id="dose")
                mix.change(shown(handlers.dose_choices), [mix, which], which, **_QUIET)
                inputs = [which, *fields]
                sweeping = start.click(
                    shown(handlers.sweep_chosen), inputs, plot, **_BUSY, **_MODEL
                )
                end.click(None, cancels=[sweeping], **_QUIET)
            with gr.Tab("Keep and share"):
                self._keep(handlers, mix, fields, writing.turns)

    def _keep(
        self, handlers: PageHandlers, mix: gr.HTML, fields: list[Any], turns: gr.State
    ) -> None:
        self.query = gr.Textbox(visible=False)
        self.link = gr.Textbox(
            label="Link that brings back exactly this pair (after Compare)",
            buttons=["copy"],
            interactive=False,
            elem_id="link",
        )
        with gr.Row():
            with gr.Column(min_width=300):
                self.json = gr.Code(
                    label="Settings and results as JSON",
                    language="json",
                    max_lines=16,
                    elem_id="json",
                )
                load = gr.Button("Load the settings written here", elem_id="load")
                load.click(shown(handlers.fields_and_turns), self.json, [*fields, turns], **_QUIET)
            with gr.Column(min_width=300):
                _presets(handlers, fields)
                vector = gr.Button("Make a steering vector of the mix", elem_id="export")
                download = gr.HTML("", elem_id="download")
                vector.click(shown(handlers.export), mix, download, **_QUIET)


def _presets(handlers: PageHandlers, fields: list[Any]) -> None:
    """Named settings, kept in the visitor's own browser."""
    kept = gr.BrowserState({}, storage_key="saint_presets", secret="saint")
    name = gr.Textbox(label="Preset", placeholder="a name", max_length=60, elem_id="preset_name")
    choice = gr.Dropdown([], label="Saved in this browser", elem_id="preset_choice")
    with gr.Row():
        save = gr.Button("Save", min_width=80, elem_id="preset_save")
        load = gr.Button("Load", min_width=80, elem_id="preset_load")
        drop = gr.Button("Delete", min_width=80, elem_id="preset_delete")

    def listed(presets: Any) -> Any:
        return gr.Dropdown(choices=sorted(presets or {}), value=None)

    def store(presets: Any, title: str, *values: Any) -> Any:
        title = str(title or "").strip() or "unnamed"
        return dict(presets or {}) | {title[:60]: handlers.preset(*values)}

    def without(presets: Any, title: Any) -> Any:
        return {k: v for k, v in (presets or {}).items() if k != title}

    save.click(shown(store), [kept, name, *fields], kept, **_QUIET)
    load.click(shown(handlers.load_preset), [kept, choice], fields, **_QUIET)
    drop.click(without, [kept, choice], kept, **_QUIET)
    gr.on(None, listed, kept, choice, **_QUIET)  # when the page opens and when they change
