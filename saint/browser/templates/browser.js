// Everything is in this page: packed columns (see `pack_columns` in saint/browser/pack.py) inside
// <script type="text/plain"> elements, decoded when they are needed.

const $ = (id) => document.getElementById(id);
const TYPES = { u1: Uint8Array, u2: Uint16Array, u4: Uint32Array, f4: Float32Array };
const PER_STEP = 40;
const BINS = 20; // of a latent’s histogram
const GROUPS = ["Strongest sentences", ...Array.from({ length: 10 }, (_, i) =>
  i === 0 ? "Strongest tenth" : i === 9 ? "Weakest tenth" : `Tenth ${10 - i} of 10`), ""];

const loaded = document.readyState === "loading"
  ? new Promise((done) => document.addEventListener("DOMContentLoaded", done)) : Promise.resolve();

async function unpack(id) {
  if (!$(id)) await loaded; // still being parsed
  const text = atob($(id).textContent.trim());
  const bytes = new Uint8Array(text.length);
  for (let i = 0; i < text.length; i++) bytes[i] = text.charCodeAt(i);
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("deflate"));
  const buffer = await new Response(stream).arrayBuffer();
  const headerLength = new Uint32Array(buffer, 0, 1)[0];
  const header = JSON.parse(new TextDecoder().decode(new Uint8Array(buffer, 4, headerLength)));
  let offset = 4 + headerLength;
  const columns = { extra: header.extra };
  for (const [name, type, length] of header.columns) {
    columns[name] = new TYPES[type](buffer, offset, length);
    offset += Math.ceil(columns[name].byteLength / 4) * 4;
  }
  return columns;
}

/** Keeps the last few decoded chunks. */
function cached(prefix, limit) {
  const kept = new Map();
  return (index) => {
    const chunk = kept.get(index) ?? unpack(prefix + index);
    kept.delete(index);
    kept.set(index, chunk);
    if (kept.size > limit) kept.delete(kept.keys().next().value);
    return chunk;
  };
}

const latentChunk = cached("data-latents-", 16);
const sentenceChunk = cached("data-sentences-", 256);
const data = {}; // meta, n, the summary's columns, labels, tokens, promoted, fields, vocabulary
const NO_FILTERS = { density: "", score: "", source: "", words: false, steers: false, kept: false };
const view = { query: "", sort: "", ascending: false, filters: { ...NO_FILTERS }, inSentences: null, terms: [], notes: [],
  results: [], matches: null, shown: 0, latent: null, other: null, pinned: null };

// ---------------------------------------------------------------- figures

const round = (x, digits = 3) => Number(x.toPrecision(digits)).toLocaleString("en", { maximumFractionDigits: 12 });
const fixed = (x) => (x && (x < 0.001 || x >= 1e6) ? x.toExponential(1) : x.toPrecision(x >= 100 ? 4 : 3));
const percent = (x) => (x === 0 ? "0 %" : x < 1e-5 ? "< 0.001 %" : `${round(100 * x, 2)} %`);
const density = (i) => data.n_firing_tokens[i] / Math.max(1, data.meta.n_tokens);
const known = (column, i) => (data[column][i] ? (data[column][i] - 1) / 1000 : null);
const tokensOf = (i) => (data.tokens[i] ? data.tokens[i].split("\t") : []);
const nameOf = (i) => data.labels[i] || tokensOf(i).slice(0, 4).join(" · ") || (data.n_firing_tokens[i] ? "no text" : "never fires");

const SORTS = {
  relevance: { name: "best match", key: null },
  best: { name: "clarity and effect", key: (i) => data.clarity[i] + (data.effect?.[i] ?? 0) + (data.shows?.[i] === 2 ? 1000 : 0) },
  clarity: { name: "clarity", key: (i) => data.clarity[i] },
  effect: { name: "effect", key: (i) => data.effect[i] },
  score: { name: "score", key: (i) => data.score[i] },
  certainty: { name: "certainty", key: (i) => data.certainty[i] },
  density: { name: "density", key: (i) => data.n_firing_tokens[i] },
  maximum: { name: "maximum", key: (i) => data.max_activation[i] },
  number: { name: "number", key: (i) => -i },
};
const orders = {};

/** All latents, largest key first; those that never fire last. */
function order(sort) {
  if (!orders[sort]) {
    const key = Float64Array.from({ length: data.n }, (_, i) => SORTS[sort].key(i));
    orders[sort] = Uint32Array.from({ length: data.n }, (_, i) => i).sort((a, b) => key[b] - key[a] || a - b);
  }
  return orders[sort];
}

/** Whether a latent passes the filters that are set. */
function passes(i) {
  const { density: range, score, source, words, steers, kept: mine } = view.filters;
  if (steers && data.shows?.[i] !== 2) return false;
  if (mine && !kept.latents.has(i)) return false;
  if (range) {
    const [low, high] = range.split(" ").map(Number), share = density(i);
    if (share < low || share >= high) return false;
  }
  if (score && !(known("score", i) >= Number(score))) return false;
  if (source && data.source[i] !== Number(source) && !(source === "any" && data.source[i])) return false;
  return !words || /[\p{L}\p{N}]/u.test(nameOf(i));
}

/** Fills view.results: matches in order, those that never fire last. */
function select() {
  const found = view.inSentences ? null : find(view.query), scores = found?.scores;
  view.terms = found?.terms ?? termsOf(view.query);
  view.notes = found?.notes ?? [];
  const byRelevance = view.sort === "relevance" && scores;
  const base = order(view.sort === "relevance" ? data.defaultSort : view.sort);
  // A counting sort by score keeps the order within a score; without a search there is one score.
  const rank = (i) => (!data.n_firing_tokens[i] && view.sort !== "number" ? 256 : byRelevance ? 255 - scores[i] : 0);
  const filtered = Object.values(view.filters).some(Boolean), within = view.inSentences;
  const shown = new Uint32Array(data.n);
  let n = 0;
  for (let at = 0; at < data.n; at++) {
    const i = base[at];
    if ((!scores || scores[i]) && (!within || within.has(i)) && (!filtered || passes(i))) shown[n++] = i;
  }
  const starts = new Uint32Array(258);
  for (let at = 0; at < n; at++) starts[rank(shown[at]) + 1]++;
  const nSilent = starts[257];
  for (let r = 1; r < 258; r++) starts[r] += starts[r - 1];
  const results = new Uint32Array(n);
  for (let at = 0; at < n; at++) { const i = shown[at]; results[starts[rank(i)]++] = i; }
  if (view.ascending) results.subarray(0, results.length - nSilent).reverse();
  view.results = results;
  view.matches = null; // made when a picture is drawn
  view.shown = 0;
}

/** 1 for each latent of the list, by number; null where that is all of them. */
function maskOfResults() {
  if (view.results.length === data.n) return null;
  const mask = new Uint8Array(data.n);
  for (const i of view.results) mask[i] = 1;
  return mask;
}

// ---------------------------------------------------------------- the list

function element(tag, attributes = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (value === null || value === undefined || value === false) continue;
    if (name === "class") node.className = value;
    else if (name === "share") node.style.setProperty("--share", value);
    else node.setAttribute(name, value === true ? "" : value);
  }
  node.append(...children.filter((child) => child !== null && child !== undefined));
  return node;
}

/** Text with the search terms marked. */
function marked(text) {
  const { terms } = view;
  const lower = text.toLowerCase();
  if (!terms.length || lower.length !== text.length) return [text];
  const out = [];
  let at = 0;
  while (at < text.length) {
    let next = -1, length = 0;
    for (const term of terms) {
      const found = lower.indexOf(term, at);
      if (found !== -1 && (next === -1 || found < next)) { next = found; length = term.length; }
    }
    if (next === -1) break;
    out.push(text.slice(at, next), element("mark", {}, text.slice(next, next + length)));
    at = next + length;
  }
  out.push(text.slice(at));
  return out;
}

function figureOf(i) {
  const shown = view.sort === "relevance" ? data.defaultSort : view.sort;
  if (shown === "effect" && data.effect[i]) return [((data.effect[i] - 1) / 1000).toFixed(2), "effect"];
  if ((shown === "clarity" || shown === "best") && data.clarity[i]) return [(data.clarity[i] / 1000).toFixed(2), "clarity"];
  if (shown === "maximum") return [fixed(data.max_activation[i]), "maximum"];
  if (shown === "score" && known("score", i) !== null) return [known("score", i).toFixed(2), "score"];
  if (shown === "certainty" && known("certainty", i) !== null) return [known("certainty", i).toFixed(2), "certainty"];
  return [percent(density(i)), "of tokens"];
}

function resultRow(i, position) {
  const tokens = tokensOf(i).join("  ");
  const promoted = (data.promoted[i] || "").split("\t").map((t) => t.trim()).filter(Boolean).slice(0, 5).join("  ");
  const under = data.labels[i] ? tokens : promoted && `promotes ${promoted}`;
  const [figure, unit] = figureOf(i);
  const current = i === view.latent ? "true" : null;
  return element("li", { "aria-posinset": position + 1, "aria-setsize": view.results.length },
    element("a", { href: `#/latent/${i}`, "data-latent": i, "aria-current": current },
      element("span", { class: data.labels[i] ? "name" : "name unnamed" }, ...marked(nameOf(i))),
      element("span", { class: "under" }, element("span", { class: "number" }, `#${i}`), under ? " · " : "", ...marked(under || "")),
      element("span", { class: "figure" }, element("b", {}, figure), unit)));
}

function showMore() {
  const end = Math.min(view.results.length, view.shown + PER_STEP);
  const rows = document.createDocumentFragment();
  for (let at = view.shown; at < end; at++) rows.append(resultRow(view.results[at], at));
  $("results").append(rows);
  view.shown = end;
  $("more").hidden = end >= view.results.length;
}

function refresh() {
  const started = performance.now();
  select();
  $("results").replaceChildren();
  showMore();
  const n = view.results.length.toLocaleString("en");
  const all = view.results.length === data.n ? `${n} latents` : `${n} of ${data.n.toLocaleString("en")} latents match`;
  $("status").textContent = [all, ...view.notes].join("; ");
  $("sentences").hidden = !view.query || view.inSentences !== null;
  if ($("detail").querySelector(".pictures")) {
    view.matches = maskOfResults();
    view.redraw?.();
  }
  performance.measure("saint-search", { start: started, end: performance.now() });
  // Next and previous follow the list.
  if (view.latent !== null) document.querySelector(".crumbs")?.replaceWith(crumbs(view.latent));
}

// ---------------------------------------------------------------- one latent

/** The slice of a chunk's rows that belongs to one latent, where rows are counted per latent. */
function span(counts, place) {
  let start = 0;
  for (let i = 0; i < place; i++) start += counts[i];
  return [start, start + counts[place]];
}

async function windowsOf(chunk, place) {
  const [start, end] = span(chunk.window_count, place);
  let fired = 0;
  for (let w = 0; w < start; w++) fired += chunk.fired_count[w];
  const size = data.meta.sentences_per_chunk;
  const windows = [];
  for (let w = start; w < end; w++) {
    const activations = new Uint8Array(chunk.window_length[w]);
    for (let f = 0; f < chunk.fired_count[w]; f++, fired++) activations[chunk.fired_place[fired]] = chunk.fired_value[fired];
    windows.push({ group: chunk.window_group[w], sentence: chunk.window_sentence[w], start: chunk.window_start[w],
      cut: chunk.window_cut[w], value: chunk.window_value[w] / 65535, activations });
  }
  await Promise.all(windows.map(async (window) => {
    const sentences = await sentenceChunk(Math.floor(window.sentence / size));
    const [first] = span(sentences.length, window.sentence % size);
    const from = first + window.start;
    window.tokens = Array.from(sentences.token.subarray(from, from + window.activations.length), (t) => data.vocabulary[t]);
  }));
  return windows;
}

const visible = (text) => text.replace(/\r?\n/g, "⏎");

function windowRow(window, maximum) {
  const strongest = Math.max(...window.activations);
  const peak = window.activations.indexOf(strongest);
  const text = element("p", { class: "text" });
  if (window.cut & 1) text.append(element("span", { class: "cut", "aria-hidden": "true" }, "…"));
  window.tokens.forEach((token, t) => {
    const strength = window.activations[t];
    if (!strength) { text.append(visible(token)); return; }
    // The space before a word stays outside of its mark.
    const space = /^ */.exec(token)[0];
    const isPeak = t === peak;
    text.append(space, element("mark", { class: isPeak ? "peak" : null, "data-bin": Math.min(BINS - 1, Math.max(0, Math.ceil((strength / 255) * BINS) - 1)), share: (strength / 255).toFixed(3),
      title: `${round((strength / 255) * maximum)} (${Math.round((100 * strength) / 255)} % of the maximum)` },
      visible(token.slice(space.length)) || "␣"));
  });
  if (window.cut & 2) text.append(element("span", { class: "cut", "aria-hidden": "true" }, "…"));
  const value = window.value * maximum;
  const spoken = strongest ? element("span", { class: "visually-hidden" },
    `Strongest on “${window.tokens[peak].trim()}”. `) : null;
  return element("li", {}, element("div", { class: "value" },
    strongest ? fixed(value) : element("span", { "aria-label": "silent" }, "–"), spoken), text);
}

function chart(counts, label, lowText, highText) {
  const width = 400, height = 130, floor = 108, step = width / counts.length;
  const scale = Math.log1p(Math.max(1, ...counts));
  const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
  const add = (name, attributes, text) => {
    const node = document.createElementNS(svg.namespaceURI, name);
    for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
    if (text !== undefined) node.textContent = text;
    svg.append(node);
    return node;
  };
  svg.setAttribute("viewBox", `0 0 ${width} ${height}`);
  svg.setAttribute("class", "chart");
  svg.setAttribute("role", "img");
  add("title", {}, label);
  counts.forEach((count, i) => {
    const tall = count ? Math.max(2, (Math.log1p(count) / scale) * 90) : 1;
    const bar = add("rect", { x: i * step + 1, y: floor - tall, width: step - 2, height: tall, rx: 1.5, class: count ? "" : "none" });
    const hint = document.createElementNS(svg.namespaceURI, "title");
    hint.textContent = count.toLocaleString("en");
    bar.append(hint);
  });
  add("line", { x1: 0, x2: width, y1: floor + .5, y2: floor + .5 });
  add("text", { x: 0, y: 125 }, lowText);
  add("text", { x: width, y: 125, "text-anchor": "end" }, highText);
  add("text", { x: 0, y: 12 }, `most: ${Math.max(0, ...counts).toLocaleString("en")} (log scale)`);
  return svg;
}

function tokenList(chunk, name, place, direction) {
  const [start, end] = span(chunk[`${name}_count`], place);
  if (start === end) return null;
  const list = element("ul", { class: "tokens" });
  for (let i = start; i < end; i++) {
    const text = data.vocabulary[chunk[`${name}_token`][i]];
    // A piece that continues a word is told from a word by a hyphen before it.
    const piece = /^\p{L}/u.test(text) ? element("span", { class: "cut" }, "-") : null;
    list.append(element("li", { class: `token ${direction}`, share: (chunk[`${name}_value`][i] / 255).toFixed(2) },
      piece, visible(text).replace(/^ /, "") || "␣"));
  }
  return list;
}

function relations(chunk, name, place) {
  const [start, end] = span(chunk[`${name}_count`], place);
  if (start === end) return element("p", { class: "note" }, "None.");
  const list = element("ul", { class: "relations" });
  for (let i = start; i < end; i++) {
    const other = chunk[`${name}_latent`][i], value = chunk[`${name}_value`][i] / 255;
    list.append(element("li", {}, element("a", { href: `#/latent/${other}` },
      element("span", { class: "name", title: nameOf(other) }, element("small", {}, `#${other} `), nameOf(other)),
      element("span", { class: "share", share: value.toFixed(3) }, value.toFixed(2)))));
  }
  return list;
}

function badges(i, extra) {
  const list = element("ul", { class: "badges" });
  const badge = (name, value, kind = "") => list.append(element("li", { class: `badge ${kind}` }, `${name} `, element("b", {}, value)));
  const interval = (task) => (task?.ci_low === undefined ? "" : ` (${task.ci_low.toFixed(2)}–${task.ci_high.toFixed(2)})`);
  const score = known("score", i);
  if (score !== null) badge("detection score", score.toFixed(2) + interval(extra?.scores?.detect), score >= 0.75 ? "good" : score < 0.6 ? "poor" : "");
  const fuzz = extra?.scores?.fuzz, intruder = extra?.scores?.intruder;
  if (fuzz?.balanced_accuracy !== undefined) badge("fuzzing score", fuzz.balanced_accuracy.toFixed(2) + interval(fuzz));
  if (intruder?.accuracy !== undefined) badge("intruder score", intruder.accuracy.toFixed(2) + interval(intruder), intruder.ci_low > intruder.chance ? "good" : "poor");
  if (data.shows?.[i]) badge("turned up", data.shows[i] === 2 ? "its word shows in the text" : "its word does not show", data.shows[i] === 2 ? "good" : "");
  if (data.effect?.[i]) badge("effect stronger than", `${Math.round((data.effect[i] - 1) / 10)} % of latents`);
  if (known("certainty", i) !== null) badge("own certainty", known("certainty", i).toFixed(2));
  if (extra?.source) badge("label from", extra.source);
  return list.children.length ? list : null;
}

function crumbs(i) {
  const at = view.results.indexOf(i);
  const step = (offset, text, key) => {
    const other = at === -1 ? i + offset : view.results[at + offset];
    const exists = other !== undefined && other >= 0 && other < data.n;
    return exists ? element("a", { href: `#/latent/${other}`, rel: offset < 0 ? "prev" : "next", "aria-keyshortcuts": key, title: `key ${key}` }, text)
      : element("span", { "aria-disabled": "true" }, text);
  };
  const beside = view.pinned !== null && view.pinned !== i
    ? element("a", { class: "beside", href: `#/compare/${view.pinned}/${i}` }, `Compare with #${view.pinned}`)
    : element("button", { type: "button", class: "beside" }, view.pinned === i ? "… with which?" : "Compare");
  if (beside.tagName === "BUTTON") beside.addEventListener("click", () => { view.pinned = i; beside.textContent = "… with which?"; });
  return element("nav", { class: "crumbs", "aria-label": "Latents" },
    element("a", { class: "back", href: "#/" }, "← All latents"), element("span", { class: "number" }, `Latent ${i}`),
    element("span", { class: "steps" }, keepButton(i), beside, step(-1, "Previous", "k"), step(1, "Next", "j")));
}

/** Hovering a token marks its bar, hovering a bar its tokens. */
function linkBars(article) {
  const bars = [...article.querySelectorAll(".chart rect")];
  const lit = (bin, on) => {
    bars[bin]?.classList.toggle("lit", on);
    for (const mark of article.querySelectorAll(`.windows mark[data-bin="${bin}"]`)) mark.classList.toggle("lit", on);
  };
  for (const [type, on] of [["mouseover", true], ["mouseout", false]]) {
    article.addEventListener(type, (event) => {
      const mark = event.target.closest?.("mark[data-bin]");
      if (mark) lit(mark.dataset.bin, on);
      else if (event.target.tagName === "rect") lit(bars.indexOf(event.target), on);
    });
  }
}

function factList(i) {
  const fact = (name, value, small) => element("div", {}, element("dt", {}, name), element("dd", {}, value, element("small", {}, small)));
  const share = density(i);
  return element("dl", { class: "facts" },
    fact("Fires on", percent(share), share ? `of tokens, 1 in ${round(1 / share, 2)}` : "of tokens"),
    fact("In", data.n_firing_sentences[i].toLocaleString("en"), `of ${data.meta.n_sentences.toLocaleString("en")} sentences`),
    fact("Largest activation", round(data.max_activation[i]), "the steering unit"));
}

function examples(windows, maximum, i) {
  const section = element("section", { class: "card examples", "aria-label": `Where latent ${i} fires` }, element("h2", {}, "Where it fires"),
    element("p", { class: "note" }, "The stronger a token’s activation, the stronger its colour; the strongest is underlined."));
  for (let group = 0; group <= 10; group++) {
    const mine = windows.filter((window) => window.group === group);
    if (!mine.length) continue;
    section.append(element("h3", {}, GROUPS[group]), element("ol", { class: "windows" }, ...mine.map((w) => windowRow(w, maximum))));
  }
  return section;
}

function silentExamples(windows, maximum) {
  const mine = windows.filter((window) => window.group === 11);
  if (!mine.length) return null;
  return element("details", { class: "card" }, element("summary", {}, "Similar sentences on which it stays silent"),
    element("ol", { class: "windows" }, ...mine.map((w) => windowRow(w, maximum))));
}

async function latentPage(i, heading = "h1") {
  const size = data.meta.latents_per_chunk, place = i % size;
  const chunk = await latentChunk(Math.floor(i / size));
  const windows = await windowsOf(chunk, place);
  const maximum = data.max_activation[i], extra = chunk.extra?.[i];
  const bins = chunk.histogram.length / chunk.window_count.length;
  const article = element("article", { "data-latent": i }, heading === "h1" ? crumbs(i) : element("p", { class: "crumbs" }, element("a", { href: `#/latent/${i}` }, `Latent ${i}`)),
    element(heading, heading === "h1" ? { tabindex: "-1", id: "heading" } : { class: "title" }, nameOf(i)), badges(i, extra));
  if (extra?.rationale) article.append(element("p", { class: "note" }, extra.rationale));
  const effect = extra?.effect?.common_semantic;
  if (effect) article.append(element("p", { class: "note" }, `Turned up, it adds: ${effect}`));
  else if (!data.labels[i] && data.tokens[i]) article.append(element("p", { class: "note" }, "No label yet: these are the tokens on which it is strongest."));
  article.append(factList(i));
  if (!data.n_firing_tokens[i]) {
    article.append(element("p", { class: "note" }, "No captured token activates this latent: it is dead, or the text that would wake it is not in the sample."));
  }
  const up = tokenList(chunk, "promoted", place, "up"), down = tokenList(chunk, "suppressed", place, "down");
  article.append(element("div", { class: "columns" },
    data.n_firing_tokens[i] ? element("section", { class: "card" }, element("h2", {}, "How strongly"),
      element("p", { class: "note" }, "Tokens by activation."),
      chart([...chunk.histogram.subarray(place * bins, (place + 1) * bins)], `Histogram of activations from 0 to ${round(maximum)}`, "0", round(maximum))) : null,
    up ? element("section", { class: "card" }, element("h2", {}, "What it makes the model say"),
      element("p", { class: "note" }, "Next tokens that its direction makes likelier …"), up,
      element("p", { class: "note", style: "margin-top:.7rem" }, "… and less likely"), down) : null));
  if (windows.some((window) => window.group < 11)) article.append(examples(windows, maximum, i));
  article.append(element("div", { class: "columns" },
    element("section", { class: "card" }, element("h2", {}, "Nearest directions"),
      element("p", { class: "note" }, "Cosine of the decoder directions."), relations(chunk, "neighbours", place)),
    element("section", { class: "card" }, element("h2", {}, "Fire together"),
      element("p", { class: "note" }, "Share of their tokens on which both fire."), relations(chunk, "coactive", place))));
  const silent = silentExamples(windows, maximum);
  if (silent) article.append(silent);
  article.append(tryCard(i));
  linkBars(article);
  return article;
}

function welcome() {
  const logs = new Array(24).fill(0);
  let silent = 0;
  for (let i = 0; i < data.n; i++) {
    if (!data.n_firing_tokens[i]) { silent++; continue; }
    logs[Math.max(0, Math.min(23, Math.floor((Math.log10(density(i)) + 6) * 4)))]++;
  }
  const first = logs.findIndex(Boolean), last = 23 - [...logs].reverse().findIndex(Boolean);
  const power = (edge) => percent(10 ** (edge / 4 - 6));
  const random = element("button", { class: "button", type: "button" }, "Show me one");
  random.addEventListener("click", () => {
    const alive = view.results.filter((i) => data.n_firing_tokens[i]);
    const pool = alive.length ? alive : view.results;
    location.hash = `#/latent/${pool[Math.floor(Math.random() * pool.length)]}`;
  });
  return element("section", { class: "welcome" }, element("h1", {}, "What does each latent fire on?"),
    element("p", {}, `A sparse autoencoder learned ${data.n.toLocaleString("en")} directions of this layer’s activations; `
      + `about ${data.meta.k} of them are active on any one token. Each is shown with the sentences that wake it: `,
      element("span", { class: "sample" }, "the ", element("mark", {}, "stronger"), " the colour, the stronger it fires.")),
    random, pictureCard(),
    element("div", { class: "card" }, element("h2", {}, "How often they fire"),
      element("p", { class: "note" }, silent ? `Latents by their share of tokens; ${silent.toLocaleString("en")} never fire.` : "Latents by their share of tokens; all of them fire."),
      first === -1 ? "" : chart(logs.slice(first, last + 1), "Histogram of latents by density", `on ${power(first)} of tokens`, `on ${power(last + 1)}`)),
    element("dl", { class: "keys" }, ...[["/", "search"], ["↑ ↓", "move in the list"], ["j k", "next and previous latent"], ["Esc", "back to the search"]]
      .flatMap(([key, what]) => [element("dt", {}, element("kbd", {}, key)), element("dd", {}, what)])));
}

// ---------------------------------------------------------------- routes, keys, start

/** What the address asks for. */
function asked() {
  const [path, query] = location.hash.replace(/^#/, "").split("?");
  const numbers = path.split("/").slice(2).map(Number), bad = numbers.find((i) => !Number.isInteger(i) || i < 0 || i >= data.n);
  const kind = /^\/latent\/[^/]+$/.test(path) ? "latent" : /^\/compare\/[^/]+\/[^/]+$/.test(path) ? "compare" : path === "" || path === "/" ? "welcome" : "nothing";
  return { kind: kind !== "welcome" && (kind === "nothing" || bad !== undefined) ? "nothing" : kind, numbers, path, query: new URLSearchParams(query ?? "") };
}

/** Keeps the search in the address, so that it can be sent to somebody. */
function remember() {
  const [path] = location.hash.replace(/^#/, "").split("?"), words = new URLSearchParams();
  if (view.query) words.set("q", view.query);
  if (view.sort !== "relevance") words.set("sort", view.sort);
  for (const [name, value] of Object.entries(view.filters)) if (value) words.set(name, value === true ? "1" : value);
  const text = words.toString();
  history.replaceState(null, "", `#${path || "/"}${text ? `?${text}` : ""}`);
}

/** Takes the search from an address that has one. */
function recall(words) {
  if (![...words].length) return;
  view.query = $("query").value = words.get("q") ?? "";
  if (SORTS[words.get("sort")]) view.sort = $("sort").value = words.get("sort");
  for (const [name, none] of Object.entries(NO_FILTERS)) {
    view.filters[name] = typeof none === "boolean" ? words.get(name) === "1" : words.get(name) ?? none;
    const field = $(`filter-${name}`);
    if (typeof none === "boolean") field.checked = view.filters[name]; else field.value = view.filters[name];
  }
}

function nowhere(path) {
  return element("section", { class: "welcome" }, element("h1", { tabindex: "-1", id: "heading" }, "This link leads nowhere"),
    element("p", {}, `“${path}” is not in this page: it holds the latents 0 to ${data.n - 1}. The link may belong to another SAE’s page.`),
    element("p", {}, element("a", { class: "button", href: "#/" }, "All latents")));
}

async function detailOf({ kind, numbers, path }) {
  if (kind === "latent") return latentPage(numbers[0]);
  if (kind === "nothing") return nowhere(path);
  if (kind === "welcome") return welcome();
  const pages = await Promise.all(numbers.map((i) => latentPage(i, "h2")));
  return element("section", { class: "beside-each-other" }, element("nav", { class: "crumbs", "aria-label": "Latents" }, element("a", { href: "#/" }, "← All latents")),
    element("h1", { tabindex: "-1", id: "heading" }, `#${numbers[0]} and #${numbers[1]}`), element("div", { class: "two" }, ...pages));
}

async function route() {
  const wish = asked(), { kind, numbers } = wish;
  const latent = kind === "latent" ? numbers[0] : null, started = location.hash;
  if ([...wish.query].length && view.routed) { recall(wish.query); refresh(); }
  const opened = kind !== "welcome" && (latent === null || latent !== view.latent);
  view.latent = latent;
  if (kind === "compare") view.pinned = null;
  document.body.classList.toggle("latent-open", kind !== "welcome");
  for (const link of $("results").querySelectorAll("[aria-current]")) link.removeAttribute("aria-current");
  $("results").querySelector(`[data-latent="${latent}"]`)?.setAttribute("aria-current", "true");
  const made = await detailOf(wish);
  if (location.hash.split("?")[0] !== started.split("?")[0]) return; // another one was opened meanwhile
  document.title = latent !== null ? `${nameOf(latent)} · latent ${latent}` : kind === "compare" ? `latents ${numbers.join(" and ")}` : data.title;
  $("detail").replaceChildren(made);
  if (kind === "welcome") {
    view.matches = maskOfResults();
    if (view.scrolled) window.scrollTo(0, view.scrolled);
    return;
  }
  $("detail").scrollTop = 0;
  if (matchMedia("(max-width: 820px)").matches) window.scrollTo(0, 0);
  if (opened && view.routed) $("heading").focus({ preventScroll: true });
}

function onKey(event) {
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  const typing = event.target.matches("input, select, textarea");
  const link = document.activeElement?.closest?.(".results li");
  if (event.key === "/" && !typing) { event.preventDefault(); $("query").focus(); $("query").select(); }
  else if (event.key === "Escape") { if (document.body.classList.contains("latent-open")) location.hash = "#/"; $("query").focus(); }
  else if (event.key === "ArrowDown" && (link || event.target === $("query"))) {
    event.preventDefault();
    const next = link ? link.nextElementSibling : $("results").firstElementChild;
    (next?.firstElementChild ?? (!$("more").hidden && $("more")) ?? link)?.focus?.();
  } else if (event.key === "ArrowUp" && link) {
    event.preventDefault();
    (link.previousElementSibling?.firstElementChild ?? $("query")).focus();
  } else if (!typing && (event.key === "j" || event.key === "k")) {
    document.querySelector(event.key === "j" ? ".steps [rel=next]" : ".steps [rel=prev]")?.click();
  }
}

function offerSorts() {
  const any = (column) => Boolean(data[column]?.some((value) => value > 0));
  const has = { score: any("score"), certainty: any("certainty"), clarity: any("clarity"), effect: any("effect"), best: any("effect") };
  data.defaultSort = has.best ? "best" : has.clarity ? "clarity" : has.score ? "score" : "density";
  for (const [key, sort] of Object.entries(SORTS)) {
    if (has[key] === false) continue;
    $("sort").append(element("option", { value: key }, sort.name));
  }
  $("sort").value = view.sort = "relevance";
  $("filter-source").closest("label").hidden = !data.meta.n_labels;
  $("filter-score").closest("label").hidden = !has.score;
  $("filter-steers").closest("label").hidden = !has.effect;
}

function listen() {
  const again = () => { remember(); refresh(); };
  $("query").addEventListener("input", () => { view.query = $("query").value; view.inSentences = null; again(); });
  $("search").addEventListener("submit", (event) => {
    event.preventDefault();
    if (view.query && view.results.length) location.hash = `#/latent/${view.results[0]}`;
  });
  $("sentences").addEventListener("click", async () => {
    const query = view.query;
    const found = await findSentences(query, (share) => { $("status").textContent = `Reading the sentences: ${Math.round(100 * share)} %`; });
    if (view.query !== query) return;
    view.inSentences = found;
    refresh();
  });
  $("sort").addEventListener("change", () => { view.sort = $("sort").value; again(); });
  $("direction").addEventListener("click", () => {
    view.ascending = !view.ascending;
    $("direction").textContent = view.ascending ? "↑" : "↓";
    refresh();
  });
  for (const [name, none] of Object.entries(NO_FILTERS)) {
    const field = $(`filter-${name}`);
    field.addEventListener("change", () => { view.filters[name] = typeof none === "boolean" ? field.checked : field.value; again(); });
  }
  $("export").addEventListener("click", () => kept.export());
  $("import").addEventListener("change", () => { if ($("import").files[0]) kept.import($("import").files[0]); $("import").value = ""; });
  $("more").addEventListener("click", showMore);
  new IntersectionObserver((seen) => { if (seen.some((entry) => entry.isIntersecting)) showMore(); },
    { rootMargin: "400px" }).observe($("more"));
  $("results").addEventListener("click", () => { view.scrolled = window.scrollY; });
  document.addEventListener("keydown", onKey);
  window.addEventListener("hashchange", () => { view.routed = true; route(); });
}

async function start() {
  data.title = document.title;
  const summary = await unpack("data-summary");
  const { meta, labels, tokens, promoted } = summary.extra;
  Object.assign(data, summary, { meta, n: meta.n_latents });
  for (const [name, text] of Object.entries({ labels, tokens, promoted })) data[name] = text.split("\n");
  data.fields = Object.fromEntries(["labels", "tokens", "promoted"].map((name) => [name, searchable(data[name])]));
  offerSorts();
  kept.load();
  kept.save();
  listen();
  recall(asked().query);
  refresh();
  data.vocabulary = (await unpack("data-vocabulary")).extra;
  await route();
  document.documentElement.dataset.ready = "true";
  (window.requestIdleCallback ?? setTimeout)(() => { wordsByLength(); order("clarity"); }); // before they are needed
}

start().catch((error) => { $("status").textContent = `This page cannot be shown: ${error.message}`; throw error; });
