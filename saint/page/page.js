// The mix: one dial per chosen latent or concept, as saint/page/mix.py describes them; texts only
// enter the page through textContent.
const HUES = ["234,138,20", "37,120,225", "22,150,90", "150,80,220", "0,150,170", "200,70,150"];
const MODES = { add: "add", set: "set to", scale: "multiply by", ablate: "switch off" };
const BOUNDS = { add: [-4, 4], set: [0, 4], scale: [0, 4], ablate: [0, 0] };
const CONCEPT_MODES = { add: "add", set: "set to", ablate: "take away" };
const CONCEPT_BOUNDS = { add: [-14, 14], set: [-14, 14], ablate: [0, 0] };
const WAYS = { means: "difference of means", latents: "its latents" };

function node(tag, properties, ...children) {
  const made = Object.assign(document.createElement(tag), properties);
  made.append(...children);
  return made;
}

// What latents and concepts differ in.
function kind(dial) {
  return dial.concept === undefined
    ? { amount: "strength", step: 0.05, modes: MODES, bounds: BOUNDS, says: saysOfLatent,
        name: `latent ${dial.latent}`, title: dial.label ? `${dial.label} (#${dial.latent})` : `latent #${dial.latent}` }
    : { amount: "dose", step: 0.5, modes: CONCEPT_MODES, bounds: CONCEPT_BOUNDS, says: saysOfConcept,
        name: `concept ${dial.concept}`, title: dial.concept };
}

function ofResidual(amount, dial) {
  const share = Math.abs(amount) * dial.share;
  return Number.isFinite(share) ? `, about ${Math.round(100 * share)} % of the residual stream` : "";
}

function saysOfLatent(dial) {
  const s = Number(dial.strength), unit = dial.raw ? "(raw activation)" : "× its largest seen activation";
  if (dial.mode === "add") return `${s < 0 ? "lowers" : "raises"} it by ${Math.abs(s)} ${unit}${ofResidual(s, dial)}`;
  if (dial.mode === "set") return `holds it at ${s} ${unit}, on every token`;
  if (dial.mode === "scale") return `multiplies it by ${s} wherever it is active`;
  return "holds it at 0";
}

function saysOfConcept(dial) {
  const dose = Number(dial.dose), unit = "standard deviations of the residual stream";
  if (dial.mode === "add") return `moves every token by ${dose} ${unit}${ofResidual(dose, dial)}`;
  if (dial.mode === "set") return `holds every token ${dose} ${unit} above an average one`;
  return "takes away what a token has of it above an average one";
}

// A new strength leaves the dial standing, so that arrow keys keep their slider.
function change(index, changes) {
  const next = (props.value || []).map((dial) => ({ ...dial }));
  if (changes === null) next.splice(index, 1);
  else Object.assign(next[index], changes);
  props.value = next;
  if (changes === null || "mode" in changes || "definition" in changes) draw();
  trigger(changes && "definition" in changes ? "reshaped" : "edited");
}

function reshape(index, dial, use, latents) {
  change(index, { use, definition: { ...dial.definition, use, latents }, parts: dial.parts.filter((part) => part.latent in latents) });
}

function drawParts(dial, index) {
  const list = node("ul", { className: "parts" });
  for (const part of dial.parts) {
    const name = part.label || `latent ${part.latent}`;
    const remove = node("button", { type: "button", className: "remove", textContent: "✕", ariaLabel: `leave latent ${part.latent} out of ${dial.concept}` });
    remove.addEventListener("click", () => {
      const { [part.latent]: left, ...latents } = dial.definition.latents;
      reshape(index, dial, "latents", latents);
    });
    const share = node("span", { className: "muted", textContent: `#${part.latent}, share ${part.share.toFixed(2)}` });
    list.append(node("li", {}, remove, node("span", { className: "part", textContent: name }), share));
  }
  const way = node("select", { ariaLabel: `what ${dial.concept} steers with` });
  for (const [use, text] of Object.entries(WAYS)) if (use === "latents" || dial.known) way.append(node("option", { value: use, textContent: text }));
  way.value = dial.use;
  way.addEventListener("change", () => reshape(index, dial, way.value, dial.definition.latents));
  const head = `${dial.parts.length} latents explain ${Math.round(100 * dial.explained)} % of it`;
  const details = node("details", { open: opened.has(dial.concept) }, node("summary", { textContent: head }));
  details.addEventListener("toggle", () => opened[details.open ? "add" : "delete"](dial.concept));
  details.append(node("div", { className: "row" }, node("span", { className: "muted", textContent: "steer with" }), way), list);
  details.append(node("p", { className: "muted", textContent: `Found in: ${dial.source}.` }));
  return details;
}

function drawAmount(dial, index, its, explain) {
  const [low, high] = its.bounds[dial.mode];
  const common = { step: its.step, value: dial[its.amount], ariaLabel: `${its.amount} of ${its.name}` };
  const slider = node("input", { type: "range", min: low, max: high });
  const number = node("input", { type: "number", min: low, max: high });
  const clamped = (text) => Math.min(high, Math.max(low, Number(text)));
  for (const input of [slider, number]) {
    Object.assign(input, common);
    input.addEventListener("input", () => {
      if (input.value === "") return;
      (input === slider ? number : slider).value = input.value;
      explain.textContent = its.says({ ...dial, [its.amount]: clamped(input.value) });
    });
    input.addEventListener("change", () => {
      if (input.value === "") return;
      slider.value = number.value = clamped(input.value);
      change(index, { [its.amount]: clamped(input.value) });
    });
  }
  return node("div", { className: "row" }, slider, number, node("span", { className: "muted", textContent: `${low} to ${high}` }));
}

function drawDial(dial, index) {
  const its = kind(dial);
  const select = node("select", { ariaLabel: `what to do with ${its.name}` });
  for (const [mode, text] of Object.entries(its.modes)) select.append(node("option", { value: mode, textContent: text }));
  select.value = dial.mode;
  select.addEventListener("change", () => change(index, { mode: select.value }));
  const remove = node("button", { type: "button", className: "remove", textContent: "✕", ariaLabel: `remove ${its.name}` });
  remove.addEventListener("click", () => change(index, null));
  const top = node("div", { className: "row" }, node("span", { className: "name", textContent: its.title }), select, remove);
  const explain = node("p", { className: "muted says", textContent: its.says(dial) });
  const box = node("div", { className: "dial" }, top);
  box.style.setProperty("--hue", `rgb(${HUES[index % HUES.length]})`);
  if (dial.mode !== "ablate") box.append(drawAmount(dial, index, its, explain));
  box.append(explain);
  if (dial.concept !== undefined) box.append(drawParts(dial, index));
  return box;
}

function draw() {
  const dials = props.value || [];
  const holder = element.querySelector(".dials");
  if (!holder) return;
  holder.replaceChildren(...dials.map(drawDial));
  if (!dials.length) {
    holder.append(node("p", { className: "empty", textContent: "Nothing chosen yet. Write above what to turn up, or try an example." }));
  }
}

const opened = new Set();
draw();
watch("value", draw);
