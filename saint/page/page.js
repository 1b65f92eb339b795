// The mix: one dial per chosen latent. The value is a list of {sae, latent, mode, strength, label,
// unit, share}; texts only enter the page through textContent.
const HUES = ["234,138,20", "37,120,225", "22,150,90", "150,80,220", "0,150,170", "200,70,150"];
const MODES = { add: "add", set: "set to", scale: "multiply by", ablate: "switch off" };
const BOUNDS = { add: [-4, 4], set: [0, 4], scale: [0, 4], ablate: [0, 0] };

function node(tag, properties, ...children) {
  const made = Object.assign(document.createElement(tag), properties);
  made.append(...children);
  return made;
}

function says(dial) {
  const s = Number(dial.strength), share = Math.abs(s) * dial.share;
  const about = Number.isFinite(share) ? `, about ${Math.round(100 * share)} % of the residual stream` : "";
  const unit = dial.raw ? "(raw activation)" : "× its largest seen activation";
  if (dial.mode === "add") return `${s < 0 ? "lowers" : "raises"} it by ${Math.abs(s)} ${unit}${about}`;
  if (dial.mode === "set") return `holds it at ${s} ${unit}, on every token`;
  if (dial.mode === "scale") return `multiplies it by ${s} wherever it is active`;
  return "holds it at 0";
}

// A new strength leaves the dial standing, so that arrow keys keep their slider.
function change(index, changes) {
  const next = (props.value || []).map((dial) => ({ ...dial }));
  if (changes === null) next.splice(index, 1);
  else Object.assign(next[index], changes);
  props.value = next;
  if (changes === null || "mode" in changes) draw();
  trigger("edited");
}

function drawDial(dial, index) {
  const select = node("select", { ariaLabel: `what to do with latent ${dial.latent}` });
  for (const [mode, text] of Object.entries(MODES)) select.append(node("option", { value: mode, textContent: text }));
  select.value = dial.mode;
  select.addEventListener("change", () => change(index, { mode: select.value }));
  const remove = node("button", { type: "button", className: "remove", textContent: "✕", ariaLabel: `remove latent ${dial.latent}` });
  remove.addEventListener("click", () => change(index, null));
  const title = dial.label ? `${dial.label} (#${dial.latent})` : `latent #${dial.latent}`;
  const top = node("div", { className: "row" }, node("span", { className: "name", textContent: title }), select, remove);
  const explain = node("p", { className: "muted says", textContent: says(dial) });
  const box = node("div", { className: "dial" }, top);
  box.style.setProperty("--hue", `rgb(${HUES[index % HUES.length]})`);
  if (dial.mode !== "ablate") {
    const [low, high] = BOUNDS[dial.mode];
    const common = { step: 0.05, value: dial.strength, ariaLabel: `strength of latent ${dial.latent}` };
    const slider = node("input", { type: "range", min: low, max: high });
    const number = node("input", { type: "number", min: low, max: high });
    const clamped = (text) => Math.min(high, Math.max(low, Number(text)));
    for (const input of [slider, number]) {
      Object.assign(input, common);
      input.addEventListener("input", () => {
        if (input.value === "") return;
        (input === slider ? number : slider).value = input.value;
        explain.textContent = says({ ...dial, strength: clamped(input.value) });
      });
      input.addEventListener("change", () => {
        if (input.value === "") return;
        slider.value = number.value = clamped(input.value);
        change(index, { strength: clamped(input.value) });
      });
    }
    box.append(node("div", { className: "row" }, slider, number, node("span", { className: "muted", textContent: `${low} to ${high}` })));
  }
  box.append(explain);
  return box;
}

function draw() {
  const dials = props.value || [];
  const holder = element.querySelector(".dials");
  if (!holder) return;
  holder.replaceChildren(...dials.map(drawDial));
  if (!dials.length) {
    holder.append(node("p", { className: "empty", textContent: "Nothing chosen yet. Search above and press “+ Add”, or try an example." }));
  }
}

draw();
watch("value", draw);
