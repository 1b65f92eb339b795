// A token of a finished text, pressed or reached with arrow keys, asks for its causes.
function ask(text, at) {
  const ids = text.dataset.ids.split(',').map(Number), tokens = text.querySelectorAll('.tok');
  const skipped = ids.length - tokens.length;
  element.querySelectorAll('.tok.asked').forEach((other) => other.classList.remove('asked'));
  tokens[at].classList.add('asked');
  trigger('asked', { ids: ids.slice(0, skipped + at + 1), side: text.dataset.side, n_prompt: Number(text.dataset.first) });
}
function place(text, token) { return [...text.querySelectorAll('.tok')].indexOf(token); }
element.addEventListener('click', (event) => {
  const token = event.target.closest('.tok:not(.prompt)'), text = event.target.closest('.text[data-ids]');
  if (token && text) ask(text, place(text, token));
});
element.addEventListener('keydown', (event) => {
  const text = event.target.closest('.text[data-ids]');
  if (!text) return;
  const tokens = [...text.querySelectorAll('.tok')], first = tokens.findIndex((t) => !t.classList.contains('prompt'));
  const now = tokens.findIndex((t) => t.classList.contains('aimed'));
  const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
  if (step && first >= 0) {
    const next = now < 0 ? first : Math.min(tokens.length - 1, Math.max(first, now + step));
    tokens.forEach((t, i) => t.classList.toggle('aimed', i === next));
    event.preventDefault();
  }
  if (event.key === 'Enter' && now >= 0) ask(text, now);
});
