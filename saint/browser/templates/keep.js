// What a person keeps: a list of latents in this browser, exported and imported as JSON.

const kept = {
  latents: new Set(),
  key: () => `saint-list ${data.title}`,
  load() {
    try { this.latents = new Set(JSON.parse(localStorage.getItem(this.key()) ?? "[]").filter((i) => Number.isInteger(i) && i >= 0 && i < data.n)); }
    catch { this.latents = new Set(); } // a browser may refuse storage to files: the list then lasts as long as the page
  },
  save() {
    try { localStorage.setItem(this.key(), JSON.stringify([...this.latents])); } catch { /* as above */ }
    $("kept-count").textContent = `(${this.latents.size})`;
    if (view.filters.kept) refresh();
  },
  toggle(i) {
    if (!this.latents.delete(i)) this.latents.add(i);
    this.save();
  },
  export() {
    const rows = [...this.latents].map((latent) => ({ latent, label: nameOf(latent) }));
    const link = element("a", { download: "latents.json",
      href: URL.createObjectURL(new Blob([JSON.stringify({ title: data.title, latents: rows }, null, 1)], { type: "application/json" })) });
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 1000);
  },
  async import(file) {
    try {
      const rows = JSON.parse(await file.text()).latents.map((row) => row.latent);
      const fitting = rows.filter((i) => Number.isInteger(i) && i >= 0 && i < data.n);
      fitting.forEach((i) => this.latents.add(i));
      this.save();
      $("status").textContent = `${fitting.length} of ${rows.length} latents of ${file.name} are now in your list`;
    } catch { $("status").textContent = `${file.name} is no list of latents: export one to see the form`; }
  },
};

function keepButton(i) {
  const button = element("button", { type: "button", class: "keep" });
  const say = () => {
    const has = kept.latents.has(i);
    button.textContent = has ? "★ In my list" : "☆ Keep";
    button.setAttribute("aria-pressed", String(has));
  };
  button.addEventListener("click", () => { kept.toggle(i); say(); });
  say();
  return button;
}

// ---------------------------------------------------------------- steering by a latent

const page = { demo: document.documentElement.dataset.demo, sae: "0" };
// The demo serves this page too, and says of which of its SAEs it is: then it is where it runs.
const served = /[?&]sae=(\d+)/.exec(location.search);
if (served) page.sae = served[1], page.demo = location.href.replace(/[^/]*([?#].*)?$/s, "").replace(/\/$/, "");

/** A link that brings the running demo to a pair steered by this latent; see `read_link` of the demo. */
function demoLink(i, text = "The best thing about today is") {
  const record = { request: { prompts: [text], steer: [`${page.sae}:${i}=add:2.0`], temperature: 0.7, top_p: 0.95 } };
  const bytes = String.fromCharCode(...new TextEncoder().encode(JSON.stringify(record)));
  return `${page.demo}/?steer=${btoa(bytes).replace(/\+/g, "-").replace(/\//g, "_").replace(/=+$/, "")}`;
}

/** A text of the visitor’s own, read and continued by the demo where it runs. */
function ownText(i) {
  const field = element("input", { type: "text", maxlength: 2000, placeholder: "your own text" });
  const link = element("a", { class: "button", target: "_blank", rel: "noopener", href: demoLink(i) }, "Try it in the demo");
  const renew = () => { link.href = demoLink(i, field.value.trim() || undefined); };
  field.addEventListener("input", renew);
  field.addEventListener("keydown", (event) => { if (event.key === "Enter") { renew(); link.click(); } });
  return element("p", { class: "own" }, element("label", {}, "A text of yours: ", field), link);
}

function tryCard(i) {
  const code = (text) => element("code", { tabindex: "0" }, text);
  return element("details", { class: "card" }, element("summary", {}, "Steer by it, or try your own text"),
    element("p", {}, element("a", { href: demoLink(i), target: "_blank", rel: "noopener" }, "Steer this in the demo"), ` (where it runs: ${page.demo}), or in a terminal:`),
    element("p", {}, code(`python llama_3_inference_text_completion.py --llama_model_dir M --sae_model_path trained_sae.pt --prompt "…" --steer ${i}=+2`)),
    ownText(i),
    element("p", {}, "Without the demo, what fires on a text of yours:"),
    element("p", {}, code('python latent_browser.py --prompt "your text" --model_dir M --sae_model_path trained_sae.pt --html prompt.html')));
}
