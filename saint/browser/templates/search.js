"use strict";
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

/** How well each latent matches one term, 0 for not at all. */
function scoresOf(term) {
  const scores = new Uint8Array(data.n);
  addMatches(data.fields.promoted, term, 1, scores);
  addMatches(data.fields.tokens, term, 4, scores);
  addMatches(data.fields.labels, term, 7, scores);
  return scores;
}

function hasAny(scores) {
  for (let i = 0; i < scores.length; i++) if (scores[i]) return true;
  return false;
}

const termsOf = (query) => query.toLowerCase().split(/\s+/).filter(Boolean);

/** All words of labels and tokens, by length: what a misspelt word may have meant. */
function wordsByLength() {
  if (!data.words) {
    data.words = new Map();
    const all = new Set(`${data.fields.labels.text} ${data.fields.tokens.text}`.match(/[\p{L}\p{N}]{3,}/gu));
    for (const word of all) {
      if (!data.words.has(word.length)) data.words.set(word.length, []);
      data.words.get(word.length).push(word);
    }
  }
  return data.words;
}

/** Whether one letter more, less or other, or two neighbours swapped, make a of b. */
function isOneTypo(a, b) {
  if (a.length > b.length) [a, b] = [b, a];
  let start = 0;
  while (start < a.length && a[start] === b[start]) start++;
  if (a.length < b.length) return a.slice(start) === b.slice(start + 1);
  return a.slice(start + 1) === b.slice(start + 1) || (a[start] === b[start + 1] && a[start + 1] === b[start] && a.slice(start + 2) === b.slice(start + 2));
}

function respelt(term) {
  if (term.length < 4) return [];
  const words = wordsByLength();
  return [0, 1, -1].flatMap((more) => words.get(term.length + more) ?? []).filter((word) => isOneTypo(term, word)).slice(0, 4);
}

/** Scores of all latents for a query, and what had to be given up to find any; null without one. */
function find(query) {
  const number = /^#?(\d+)$/.exec(query.trim());
  const terms = termsOf(query);
  if (!terms.length) return null;
  const notes = [], used = [];
  const each = terms.map((term) => {
    const scores = scoresOf(term);
    if (number || hasAny(scores)) { used.push(term); return scores; }
    const meant = respelt(term);
    for (const word of meant) {
      const others = scoresOf(word);
      for (let i = 0; i < data.n; i++) if (scores[i] < others[i]) scores[i] = others[i];
    }
    if (meant.length) notes.push(`no “${term}”: showing ${meant.map((word) => `“${word}”`).join(", ")}`);
    used.push(...(meant.length ? meant : [term]));
    return scores;
  });
  const total = each[0].slice();
  for (const scores of each.slice(1)) {
    for (let i = 0; i < data.n; i++) total[i] = total[i] && scores[i] ? Math.min(99, total[i] + scores[i]) : 0;
  }
  if (terms.length > 1 && !hasAny(total)) {
    for (const scores of each) for (let i = 0; i < data.n; i++) total[i] = Math.min(99, total[i] + scores[i]);
    if (hasAny(total)) notes.push("none has all the words: showing those with any");
  }
  if (number && Number(number[1]) < data.n) total[Number(number[1])] = 255;
  return { scores: total, notes, terms: used };
}

/** Latents whose shown sentences hold the words of a query: every chunk has to be unpacked. */
async function findSentences(query, progress) {
  const terms = termsOf(query), size = data.meta.sentences_per_chunk, per = data.meta.latents_per_chunk;
  const nSentences = document.querySelectorAll('[id^="data-sentences-"]').length, hit = new Set();
  for (let c = 0; c < nSentences; c++) {
    const { length, token } = await sentenceChunk(c);
    for (let s = 0, at = 0; s < length.length; at += length[s++]) {
      let text = "";
      for (let t = at; t < at + length[s]; t++) text += data.vocabulary[token[t]];
      text = text.toLowerCase();
      if (terms.every((term) => text.includes(term))) hit.add(c * size + s);
    }
    if (c % 8 === 0) progress(c / nSentences);
  }
  const found = new Set();
  for (let c = 0; c * per < data.n && hit.size; c++) {
    const chunk = await latentChunk(c);
    for (let place = 0, w = 0; place < chunk.window_count.length; place++) {
      for (const end = w + chunk.window_count[place]; w < end; w++) {
        if (chunk.window_group[w] < 11 && hit.has(chunk.window_sentence[w])) found.add(c * per + place);
      }
    }
  }
  return found;
}
