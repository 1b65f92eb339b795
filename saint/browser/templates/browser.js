"use strict";
// Everything is in this page: packed columns (see `pack_columns` in saint/browser/pack.py) inside
// <script type="text/plain"> elements, decoded when they are needed.

const $ = (id) => document.getElementById(id);
const TYPES = { u1: Uint8Array, u2: Uint16Array, u4: Uint32Array, f4: Float32Array };
const PER_STEP = 40;
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
const view = { query: "", sort: "", ascending: false, labelled: false, results: [], shown: 0, latent: null };

// ---------------------------------------------------------------- figures

const round = (x, digits = 3) => Number(x.toPrecision(digits)).toLocaleString("en", { maximumFractionDigits: 12 });
const fixed = (x) => (x && (x < 0.001 || x >= 1e6) ? x.toExponential(1) : x.toPrecision(x >= 100 ? 4 : 3));
const percent = (x) => (x === 0 ? "0 %" : x < 1e-5 ? "< 0.001 %" : `${round(100 * x, 2)} %`);
const density = (i) => data.n_firing_tokens[i] / Math.max(1, data.meta.n_tokens);
const known = (column, i) => (data[column][i] ? (data[column][i] - 1) / 1000 : null);
const tokensOf = (i) => (data.tokens[i] ? data.tokens[i].split("\t") : []);
const nameOf = (i) => data.labels[i] || tokensOf(i).slice(0, 4).join(" · ") || (data.n_firing_tokens[i] ? "no text" : "never fires");

// ---------------------------------------------------------------- search

/** One long lower-case string per field: indexOf over it is faster than any loop over strings. */
function searchable(lines) {
  const starts = new Uint32Array(lines.length + 1);
  const text = lines.join("\n").toLowerCase() + "\n";
  // Lower-casing may change lengths: find the line ends again in what it made.
  for (let i = 0, at = 0; i < lines.length; i++) { starts[i] = at; at = text.indexOf("\n", at) + 1; }
  starts[lines.length] = text.length;
  return { text, starts };
}

/** The line that holds an offset, searched forward from `from` in doubling steps. */
function lineOf(starts, offset, from) {
  let step = 1, low = from, high = from + 1;
  while (high < starts.length - 1 && starts[high] <= offset) { low = high; step *= 2; high = Math.min(starts.length - 1, high + step); }
  while (high - low > 1) { const middle = (low + high) >> 1; if (starts[middle] <= offset) low = middle; else high = middle; }
  return low;
}

const isWordCode = (c) => (c > 96 && c < 123) || (c > 47 && c < 58) || c > 127; // lower case only

/** Adds `weight` to every latent whose field contains the term, more for the start of a word, most for a whole one. */
function addMatches(field, term, weight, scores) {
  const { text, starts } = field;
  let line = 0;
  for (let at = text.indexOf(term); at !== -1;) {
    line = lineOf(starts, at, line);
    let found = weight;
    if (at === starts[line] || !isWordCode(text.charCodeAt(at - 1))) found += isWordCode(text.charCodeAt(at + term.length)) ? 1 : 2;
    if (scores[line] < found) scores[line] = found;
    // A better place may follow in the same line; short terms are too common to look.
    at = text.indexOf(term, term.length > 2 && found < weight + 2 ? at + 1 : starts[line + 1]);
  }
}

function find(query) {
  const terms = query.toLowerCase().split(/\s+/).filter(Boolean);
  if (!terms.length) return null;
  let total = null;
  for (const term of terms) {
    const scores = new Uint8Array(data.n);
    addMatches(data.fields.promoted, term, 1, scores);
    addMatches(data.fields.tokens, term, 4, scores);
    addMatches(data.fields.labels, term, 7, scores);
    if (!total) { total = scores; continue; }
    for (let i = 0; i < data.n; i++) total[i] = total[i] && scores[i] ? Math.min(99, total[i] + scores[i]) : 0;
  }
  const number = /^#?(\d+)$/.exec(query.trim());
  if (number && Number(number[1]) < data.n) total[Number(number[1])] = 255;
  return total;
}

const SORTS = {
  relevance: { name: "best match", key: null },
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

/** Fills view.results: matches in order, those that never fire last. */
function select() {
  const scores = find(view.query);
  const byRelevance = view.sort === "relevance" && scores;
  const base = order(view.sort === "relevance" ? data.defaultSort : view.sort);
  // A counting sort by score keeps the order within a score; without a search there is one score.
  const rank = (i) => (!data.n_firing_tokens[i] && view.sort !== "number" ? 256 : byRelevance ? 255 - scores[i] : 0);
  const isShown = (i) => (!scores || scores[i]) && (!view.labelled || data.labels[i]);
  const starts = new Uint32Array(258);
  for (const i of base) if (isShown(i)) starts[rank(i) + 1]++;
  const nSilent = starts[257];
  for (let r = 1; r < 258; r++) starts[r] += starts[r - 1];
  const results = new Uint32Array(starts[257]);
  for (const i of base) if (isShown(i)) results[starts[rank(i)]++] = i;
  if (view.ascending) results.subarray(0, results.length - nSilent).reverse();
  view.results = results;
  view.shown = 0;
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
  const terms = view.query.toLowerCase().split(/\s+/).filter(Boolean);
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
  $("status").textContent = view.query ? `${n} of ${data.n.toLocaleString("en")} latents match` : `${n} latents`;
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
    text.append(space, element("mark", { class: isPeak ? "peak" : null, share: (strength / 255).toFixed(3),
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
  return element("nav", { class: "crumbs", "aria-label": "Latents" },
    element("a", { class: "back", href: "#/" }, "← All latents"), element("span", { class: "number" }, `Latent ${i}`),
    element("span", { class: "steps" }, step(-1, "Previous", "k"), step(1, "Next", "j")));
}

function factList(i) {
  const fact = (name, value, small) => element("div", {}, element("dt", {}, name), element("dd", {}, value, element("small", {}, small)));
  const share = density(i);
  return element("dl", { class: "facts" },
    fact("Fires on", percent(share), share ? `of tokens, 1 in ${round(1 / share, 2)}` : "of tokens"),
    fact("In", data.n_firing_sentences[i].toLocaleString("en"), `of ${data.meta.n_sentences.toLocaleString("en")} sentences`),
    fact("Largest activation", round(data.max_activation[i]), "the steering unit"));
}

function examples(windows, maximum) {
  const section = element("section", { class: "card examples", "aria-label": "Where it fires" }, element("h2", {}, "Where it fires"),
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

async function latentPage(i) {
  const size = data.meta.latents_per_chunk, place = i % size;
  const chunk = await latentChunk(Math.floor(i / size));
  const windows = await windowsOf(chunk, place);
  const maximum = data.max_activation[i], extra = chunk.extra?.[i];
  const bins = chunk.histogram.length / chunk.window_count.length;
  const article = element("article", { "data-latent": i }, crumbs(i),
    element("h1", { tabindex: "-1", id: "heading" }, nameOf(i)), badges(i, extra));
  if (extra?.rationale) article.append(element("p", { class: "note" }, extra.rationale));
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
  if (windows.some((window) => window.group < 11)) article.append(examples(windows, maximum));
  article.append(element("div", { class: "columns" },
    element("section", { class: "card" }, element("h2", {}, "Nearest directions"),
      element("p", { class: "note" }, "Cosine of the decoder directions."), relations(chunk, "neighbours", place)),
    element("section", { class: "card" }, element("h2", {}, "Fire together"),
      element("p", { class: "note" }, "Share of their tokens on which both fire."), relations(chunk, "coactive", place))));
  const silent = silentExamples(windows, maximum);
  if (silent) article.append(silent);
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
    random,
    element("div", { class: "card" }, element("h2", {}, "How often they fire"),
      element("p", { class: "note" }, silent ? `Latents by their share of tokens; ${silent.toLocaleString("en")} never fire.` : "Latents by their share of tokens; all of them fire."),
      first === -1 ? "" : chart(logs.slice(first, last + 1), "Histogram of latents by density", `on ${power(first)} of tokens`, `on ${power(last + 1)}`)),
    element("dl", { class: "keys" }, ...[["/", "search"], ["↑ ↓", "move in the list"], ["j k", "next and previous latent"], ["Esc", "back to the search"]]
      .flatMap(([key, what]) => [element("dt", {}, element("kbd", {}, key)), element("dd", {}, what)])));
}

// ---------------------------------------------------------------- routes, keys, start

async function route() {
  const match = /^#\/latent\/(\d+)$/.exec(location.hash);
  const latent = match && Number(match[1]) < data.n ? Number(match[1]) : null;
  const opened = latent !== null && latent !== view.latent;
  view.latent = latent;
  document.body.classList.toggle("latent-open", latent !== null);
  for (const link of $("results").querySelectorAll("[aria-current]")) link.removeAttribute("aria-current");
  $("results").querySelector(`[data-latent="${latent}"]`)?.setAttribute("aria-current", "true");
  if (latent === null) {
    document.title = data.title;
    $("detail").replaceChildren(welcome());
    if (view.scrolled) window.scrollTo(0, view.scrolled);
    return;
  }
  const page = await latentPage(latent);
  if (view.latent !== latent) return; // another one was opened meanwhile
  document.title = `${nameOf(latent)} · latent ${latent}`;
  $("detail").replaceChildren(page);
  $("detail").scrollTop = 0;
  if (matchMedia("(max-width: 820px)").matches) window.scrollTo(0, 0);
  if (opened && view.routed) $("heading").focus({ preventScroll: true });
}

function onKey(event) {
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  const typing = event.target.matches("input, select, textarea");
  const link = document.activeElement?.closest?.(".results li");
  if (event.key === "/" && !typing) { event.preventDefault(); $("query").focus(); $("query").select(); }
  else if (event.key === "Escape") { if (view.latent !== null) location.hash = "#/"; $("query").focus(); }
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
  const any = (column) => data[column].some((value) => value > 0);
  const has = { score: any("score"), certainty: any("certainty") };
  data.defaultSort = has.score ? "score" : has.certainty ? "certainty" : "density";
  for (const [key, sort] of Object.entries(SORTS)) {
    if (has[key] === false) continue;
    $("sort").append(element("option", { value: key }, sort.name));
  }
  $("sort").value = view.sort = "relevance";
  $("labelled-control").hidden = !data.meta.n_labels;
}

function listen() {
  $("query").addEventListener("input", () => { view.query = $("query").value; refresh(); });
  $("search").addEventListener("submit", (event) => {
    event.preventDefault();
    if (view.query && view.results.length) location.hash = `#/latent/${view.results[0]}`;
  });
  $("sort").addEventListener("change", () => { view.sort = $("sort").value; refresh(); });
  $("direction").addEventListener("click", () => {
    view.ascending = !view.ascending;
    $("direction").textContent = view.ascending ? "↑" : "↓";
    refresh();
  });
  $("labelled").addEventListener("change", () => { view.labelled = $("labelled").checked; refresh(); });
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
  listen();
  refresh();
  data.vocabulary = (await unpack("data-vocabulary")).extra;
  await route();
  document.documentElement.dataset.ready = "true";
}

start().catch((error) => { $("status").textContent = `This page cannot be shown: ${error.message}`; throw error; });
