// Two pictures of all latents, drawn on a canvas: density × maximum, and the map of directions.
// A dot is a link: a click opens the latent nearest to it.

const PICTURES = {
  map: { name: "map of directions", about: "Each dot is a latent’s decoder direction on its two principal components: neighbours point alike. Zoom in for names.",
    has: () => Boolean(data.map_x), x: (i) => data.map_x[i] / 65535, y: (i) => data.map_y[i] / 65535 },
  scatter: { name: "density × maximum", about: "How often a latent fires (left to right) against its largest activation (up), both on a log scale.",
    has: () => true, x: (i) => Math.log10(density(i) || 1e-9), y: (i) => Math.log10(Math.max(data.max_activation[i], 1e-6)) },
};

/** Places of all latents that fire, scaled to 0..1, and their order from unclear to clear. */
function pointsOf(picture) {
  if (picture.points) return picture.points;
  const alive = []; // the clearest last: they are drawn on top
  for (const i of order("clarity")) if (data.n_firing_tokens[i]) alive.push(i);
  alive.reverse();
  const xs = Float32Array.from(alive, picture.x), ys = Float32Array.from(alive, picture.y);
  for (const values of [xs, ys]) {
    let low = Infinity, high = -Infinity;
    for (const value of values) { low = Math.min(low, value); high = Math.max(high, value); }
    for (let i = 0; i < values.length; i++) values[i] = (values[i] - low) / (high - low || 1);
  }
  return (picture.points = { latents: Uint32Array.from(alive), xs, ys });
}

function drawPicture(canvas, picture, zoom) {
  const started = performance.now(), { latents, xs, ys } = pointsOf(picture);
  const ratio = devicePixelRatio || 1, width = canvas.clientWidth, height = canvas.clientHeight;
  canvas.width = width * ratio; canvas.height = height * ratio;
  const pen = canvas.getContext("2d"), css = getComputedStyle(document.documentElement);
  pen.scale(ratio, ratio);
  const size = Math.max(1.5, Math.min(6, (2.4 * Math.sqrt(zoom.scale)) * Math.min(1.4, Math.sqrt(4000 / latents.length) + .5)));
  const place = (p) => [12 + (width - 24) * ((xs[p] - zoom.x) * zoom.scale + .5), 12 + (height - 24) * (.5 - (ys[p] - zoom.y) * zoom.scale)];
  const shown = view.matches, colours = [css.getPropertyValue("--cool"), css.getPropertyValue("--bar"), css.getPropertyValue("--accent")];
  for (const level of [0, 1, 2]) {
    pen.fillStyle = colours[level];
    pen.globalAlpha = level ? .8 : .45;
    for (let p = 0; p < latents.length; p++) {
      const clear = data.clarity[latents[p]], mine = shown ? 2 * shown[latents[p]] : clear >= 750 ? 2 : clear >= 350 ? 1 : 0;
      if (mine !== level) continue;
      const [x, y] = place(p);
      if (x > -4 && y > -4 && x < width + 4 && y < height + 4) pen.fillRect(x - size / 2, y - size / 2, size, size);
    }
  }
  pen.globalAlpha = 1;
  nameDots(pen, { latents, place, width, height, zoom, ink: css.getPropertyValue("--ink"), ground: css.getPropertyValue("--panel") });
  performance.measure("saint-map", { start: started, end: performance.now() });
}

/** Names of the clearest latents in view, as many as fit without touching. */
function nameDots(pen, { latents, place, width, height, zoom, ink, ground }) {
  const most = zoom.scale < 1.5 ? 12 : 60, boxes = [];
  pen.font = "12px system-ui, sans-serif";
  pen.lineWidth = 3; pen.strokeStyle = ground; pen.fillStyle = ink;
  for (let p = latents.length - 1; p >= 0 && boxes.length < most; p--) {
    const [x, y] = place(p);
    if (x < 0 || y < 14 || x > width - 40 || y > height) continue;
    const text = nameOf(latents[p]).slice(0, 28), long = pen.measureText(text).width;
    const box = [x + 5, y - 8, x + 8 + long, y + 8];
    if (box[2] > width || boxes.some((b) => b[0] < box[2] && box[0] < b[2] && b[1] < box[3] && box[1] < b[3])) continue;
    boxes.push(box);
    pen.strokeText(text, x + 6, y + 4); pen.fillText(text, x + 6, y + 4);
  }
}

/** A picture with its controls. */
function pictureCard() {
  let kind = PICTURES.map.has() ? "map" : "scatter", zoom = { x: .5, y: .5, scale: 1 };
  const canvas = element("canvas", { role: "img", class: "picture", "aria-label": "All latents as dots; the list beside it has the same latents" });
  const hint = element("p", { class: "note hover", "aria-live": "off" }), about = element("p", { class: "note" });
  const draw = () => { about.textContent = PICTURES[kind].about; if (canvas.isConnected) drawPicture(canvas, PICTURES[kind], zoom); };
  const nearest = (event) => {
    const { latents, xs, ys } = pointsOf(PICTURES[kind]), box = canvas.getBoundingClientRect();
    const x = ((event.clientX - box.left - 12) / (box.width - 24) - .5) / zoom.scale + zoom.x;
    const y = (.5 - (event.clientY - box.top - 12) / (box.height - 24)) / zoom.scale + zoom.y;
    let best = -1, least = (14 / (box.width - 24) / zoom.scale) ** 2;
    for (let p = 0; p < latents.length; p++) {
      const far = (xs[p] - x) ** 2 + (ys[p] - y) ** 2;
      if (far <= least) { least = far; best = latents[p]; }
    }
    return { best, x, y };
  };
  const rescale = (factor, at) => {
    const scale = Math.max(1, Math.min(200, zoom.scale * factor)), kept = 1 - zoom.scale / scale;
    zoom = scale === 1 ? { x: .5, y: .5, scale } : { x: zoom.x + (at.x - zoom.x) * kept, y: zoom.y + (at.y - zoom.y) * kept, scale };
    draw();
  };
  canvas.addEventListener("click", (event) => { const { best } = nearest(event); if (best >= 0 && !canvas.dragged) location.hash = `#/latent/${best}`; });
  canvas.addEventListener("wheel", (event) => { event.preventDefault(); rescale(event.deltaY < 0 ? 1.3 : 1 / 1.3, nearest(event)); }, { passive: false });
  canvas.addEventListener("pointerdown", () => { canvas.dragged = false; });
  canvas.addEventListener("pointermove", (event) => {
    if (event.buttons && zoom.scale > 1) {
      if (Math.abs(event.movementX) + Math.abs(event.movementY) > 1) canvas.dragged = true;
      zoom.x -= event.movementX / canvas.clientWidth / zoom.scale; zoom.y += event.movementY / canvas.clientHeight / zoom.scale;
      draw();
      return;
    }
    const { best } = nearest(event);
    canvas.style.cursor = best >= 0 ? "pointer" : "";
    hint.textContent = best >= 0 ? `#${best} ${nameOf(best)}: on ${percent(density(best))} of tokens` : "";
  });
  const button = (text, label, act) => { const made = element("button", { type: "button", "aria-label": label }, text); made.addEventListener("click", act); return made; };
  const tabs = Object.entries(PICTURES).filter(([, picture]) => picture.has()).map(([name, picture]) => {
    const tab = button(picture.name, null, () => { kind = name; zoom = { x: .5, y: .5, scale: 1 }; mark(); draw(); });
    tab.dataset.kind = name;
    return tab;
  });
  const mark = () => tabs.forEach((tab) => tab.setAttribute("aria-pressed", String(tab.dataset.kind === kind)));
  mark();
  new ResizeObserver(draw).observe(canvas);
  view.redraw = draw;
  return element("section", { class: "card pictures", "aria-label": "Pictures of all latents" },
    element("div", { class: "tools" }, ...tabs, button("+", "Zoom in", () => rescale(1.6, zoom)), button("−", "Zoom out", () => rescale(1 / 1.6, zoom))),
    about, canvas, hint);
}
