// Pictures as SVG, and the small words around them. Nothing here knows where figures come from.

const NS = "http://www.w3.org/2000/svg";

/** An element; children are elements or text, never markup. */
export function h(tag, attrs = {}, ...children) {
  const el = document.createElement(tag);
  for (const [k, v] of Object.entries(attrs)) {
    if (v === null || v === undefined || v === false) continue;
    if (k.startsWith("on")) el.addEventListener(k.slice(2), v);
    else if (k === "class") el.className = v;
    else el.setAttribute(k, v === true ? "" : v);
  }
  el.append(...children.flat().filter((c) => c !== null && c !== undefined && c !== false));
  return el;
}

export function s(tag, attrs = {}, ...children) {
  const el = document.createElementNS(NS, tag);
  for (const [k, v] of Object.entries(attrs)) {
    if (k.startsWith("on")) el.addEventListener(k.slice(2), v);
    else if (v !== null && v !== undefined) el.setAttribute(k, v);
  }
  el.append(...children.flat().filter((c) => c !== null && c !== undefined));
  return el;
}

export function bytes(n) {
  let unit = 0;
  while (Math.abs(n) >= 1024 && unit < 4) { n /= 1024; unit++; }
  const text = unit === 0 ? Math.round(n) : n >= 100 ? n.toFixed(0) : n >= 10 ? n.toFixed(1) : n.toFixed(2);
  return `${text} ${["B", "KiB", "MiB", "GiB", "TiB"][unit]}`;
}

export function count(n) {
  if (n >= 1e9) return `${(n / 1e9).toPrecision(3)} G`;
  if (n >= 1e6) return `${(n / 1e6).toPrecision(3)} M`;
  return n.toLocaleString("en");
}

export function figure(v) {
  if (typeof v !== "number") return String(v);
  if (Number.isInteger(v)) return v.toLocaleString("en");
  return Math.abs(v) >= 1e-3 && Math.abs(v) < 1e5 ? String(+v.toPrecision(4)) : v.toExponential(2);
}

export function duration(seconds) {
  if (!Number.isFinite(seconds)) return "?";
  const t = Math.max(0, Math.round(seconds));
  if (t < 90) return `${t} s`;
  if (t < 5400) return `${Math.round(t / 60)} min`;
  const hours = Math.floor(t / 3600);
  return hours < 48 ? `${hours} h ${Math.round((t % 3600) / 60)} min` : `${Math.round(hours / 24)} days`;
}

const KINDS = ["weights", "gradients", "optimizer", "activations", "temporary"];

/** Bytes by category, as a bar of `most` bytes with its key. */
export function stack(by, most, label) {
  const kinds = [...KINDS.filter((k) => k in by), ...Object.keys(by).filter((k) => !KINDS.includes(k))];
  let at = 0;
  const svg = s("svg", { viewBox: "0 0 1000 22", preserveAspectRatio: "none", role: "img",
    "aria-label": `${label}: ${kinds.map((k) => `${k} ${bytes(by[k])}`).join(", ")}` });
  for (const kind of kinds) {
    const width = 1000 * by[kind] / Math.max(most, 1);
    svg.append(s("rect", { x: at, y: 0, width, height: 22, class: kind },
      s("title", {}, `${kind} ${bytes(by[kind])}`)));
    at += width;
  }
  return h("div", { class: "bar" }, svg, h("div", { class: "keys", "aria-hidden": "true" },
    kinds.filter((k) => by[k] > 0).map((k) => h("span", { class: k }, h("b", {}, `${k} ${bytes(by[k])}`)))));
}

/** Quality over memory, a point a recipe, and the budget as a line that is dragged.
 *  on.choose(recipe), on.budget(bytes, done, keys): done when it is let go. */
export function frontier(box, recipes, budget, chosen, on) {
  if (!recipes.length) { box.replaceChildren(); return; }
  const W = Math.max(320, box.clientWidth || 900), H = W < 560 ? 300 : 340;
  const left = 46, right = 18, top = 34, bottom = 42;
  const needs = recipes.map((r) => r.needs), marks = recipes.map((r) => r.quality);
  const low = Math.min(...needs) / 1.35, high = Math.max(...needs) * 1.45;
  const spread = Math.max(...marks) - Math.min(...marks) || 0.1;
  const worst = Math.min(...marks) - 0.12 * spread, best = Math.max(...marks) + 0.16 * spread;
  const x = (v) => left + (W - left - right) * Math.log(v / low) / Math.log(high / low);
  const back = (px) => low * (high / low) ** ((px - left) / (W - left - right));
  const y = (q) => H - bottom - (H - top - bottom) * (q - worst) / (best - worst);
  const svg = s("svg", { class: "chart", viewBox: `0 0 ${W} ${H}`, role: "group",
    "aria-label": "Quality against the memory a recipe needs; the table below says the same" });
  const ticks = W < 560 ? 3 : 6;
  for (let i = 0; i <= ticks; i++) {
    const v = low * (high / low) ** (i / ticks);
    svg.append(s("line", { class: "grid", x1: x(v), x2: x(v), y1: top, y2: H - bottom }),
      s("text", { x: x(v), y: H - bottom + 17, "text-anchor": i === 0 ? "start" : i === ticks ? "end" : "middle" }, bytes(v)));
  }
  for (let i = 0; i <= 3; i++) {
    const q = Math.min(...marks) + spread * i / 3;
    svg.append(s("line", { class: "grid", x1: left, x2: W - right, y1: y(q), y2: y(q) }),
      s("text", { x: left - 7, y: y(q) + 4, "text-anchor": "end" }, q.toFixed(2)));
  }
  svg.append(s("text", { x: left, y: 14 }, "expected quality"),
    s("text", { x: W - right, y: H - 6, "text-anchor": "end" }, "memory that it needs"));
  let reached = -Infinity;
  const edge = [...recipes].sort((a, b) => a.needs - b.needs || b.quality - a.quality)
    .filter((r) => r.quality > reached && (reached = r.quality, true));
  if (edge.length > 1) svg.append(s("path", { class: "edge", d: edge.map((r, i) =>
    `${i ? `H${x(r.needs)}V` : `M${x(r.needs)} `}${y(r.quality)}`).join("") }));
  const labels = [];
  const drawn = [...recipes].sort((a, b) => (a.recipe === chosen?.recipe) - (b.recipe === chosen?.recipe));
  for (const r of drawn) {
    const own = r.recipe === chosen?.recipe, fits = r.needs <= budget;
    svg.append(s("g", { class: `point${fits ? "" : " over"}${own ? " chosen" : ""}${r.known ? "" : " guess"}`, "data-recipe": r.recipe,
      onclick: () => on.choose(r) },
      s("circle", { cx: x(r.needs), cy: y(r.quality), r: 13, fill: "transparent" }),
      s("circle", { class: "dot", cx: x(r.needs), cy: y(r.quality), r: own ? 8 : 6 }),
      s("title", {}, `${r.recipe}\nneeds ${bytes(r.needs)}, quality ${r.known ? r.quality.toFixed(2) : "not measured"}`)));
  }
  for (const r of [...drawn].reverse()) {
    const own = r.recipe === chosen?.recipe, text = short(r.recipe, own ? 44 : 26), w = text.length * 6.6;
    const cx = Math.min(Math.max(x(r.needs), left + w / 2), W - right - w / 2);
    for (const dy of own ? [-14, 24] : [-11, 20]) {
      const place = { l: cx - w / 2, r: cx + w / 2, t: y(r.quality) + dy - 11, b: y(r.quality) + dy + 3 };
      const free = place.t > 16 && place.b < H - bottom && labels.every((p) => p.r < place.l || p.l > place.r || p.b < place.t || p.t > place.b)
        && recipes.every((o) => o === r || x(o.needs) < place.l - 7 || x(o.needs) > place.r + 7 || y(o.quality) < place.t - 7 || y(o.quality) > place.b + 7);
      if (!free && !own) continue;
      labels.push(place);
      svg.append(s("text", { x: cx, y: y(r.quality) + dy, "text-anchor": "middle", class: own ? "strong" : "" }, text));
      break;
    }
  }
  const clamp = (v) => Math.min(Math.max(v, low), high);
  const words = s("text", { y: top - 8, "text-anchor": "middle" });
  const line = s("g", { class: "budget", tabindex: 0, role: "slider", "aria-label": "Memory budget",
    "aria-valuemin": Math.round(low), "aria-valuemax": Math.round(high) },
    s("rect", { x: -12, y: top - 4, width: 24, height: H - top - bottom + 8, fill: "transparent" }),
    s("line", { x1: 0, x2: 0, y1: top, y2: H - bottom }),
    s("rect", { class: "grip", x: -5, y: (H - bottom + top) / 2 - 15, width: 10, height: 30, rx: 4 }), words);
  const put = (v) => {
    const at = x(clamp(v));
    line.setAttribute("transform", `translate(${at} 0)`);
    line.setAttribute("aria-valuenow", Math.round(clamp(v)));
    line.setAttribute("aria-valuetext", bytes(v));
    words.textContent = bytes(v) + (v > high ? " →" : v < low ? " ←" : "");
    const half = words.textContent.length * 3.6;
    words.setAttribute("x", Math.min(Math.max(0, left + half - at), W - right - half - at));
    for (const g of svg.querySelectorAll(".point")) {
      const r = recipes.find((o) => o.recipe === g.dataset.recipe);
      g.classList.toggle("over", r.needs > v);
    }
  };
  let now = budget, held = false;
  const where = (e) => back((e.clientX - svg.getBoundingClientRect().left) * W / svg.getBoundingClientRect().width);
  line.addEventListener("pointerdown", (e) => { held = true; line.setPointerCapture(e.pointerId); e.preventDefault(); line.focus(); });
  line.addEventListener("pointermove", (e) => { if (held) { now = clamp(where(e)); put(now); on.budget(now, false); } });
  const drop = () => { if (held) { held = false; on.budget(now, true); } };
  line.addEventListener("pointerup", drop);
  line.addEventListener("pointercancel", drop);
  line.addEventListener("keydown", (e) => {
    const step = { ArrowLeft: 1 / 1.03, ArrowDown: 1 / 1.03, ArrowRight: 1.03, ArrowUp: 1.03, PageDown: 1 / 1.25, PageUp: 1.25 }[e.key];
    if (e.key === "Enter") { e.preventDefault(); on.budget(now, true); return; }
    if (!step && e.key !== "Home" && e.key !== "End") return;
    e.preventDefault();
    now = e.key === "Home" ? low : e.key === "End" ? high : clamp(clamp(now) * step);
    put(now);
    on.budget(now, false, true);
  });
  svg.append(line);
  put(budget);
  const guessed = recipes.some((r) => !r.known) ? "; dotted: its quality was not measured" : "";
  box.replaceChildren(svg, h("p", { class: "faint legend" }, `Filled: fits; hollow: needs more than the line${guessed}. A click chooses.`));
}

export function short(text, most) {
  text = text.replace(/ \+ chunked_loss(\([^)]*\))?/, "");
  return text.length <= most ? text : `${text.slice(0, most - 1)}…`;
}

/** Lines over steps: series are {name, points: [[step, value]], kind: "a" | "b"}. */
export function lines(box, series, label, log = true, until = 0) {
  const shown = series.filter((l) => l.points.some((p) => Number.isFinite(p[1])));
  if (!shown.length) { box.replaceChildren(); return; }
  const W = Math.max(280, box.clientWidth || 500), H = 210, left = 52, right = 12, top = 24, bottom = 26;
  const all = shown.flatMap((l) => l.points).filter((p) => Number.isFinite(p[1]));
  const first = until ? 1 : Math.min(...all.map((p) => p[0])), last = Math.max(...all.map((p) => p[0]), first + 1, until);
  let low = Math.min(...all.map((p) => p[1])), high = Math.max(...all.map((p) => p[1]));
  const curved = log && low > 0 && high > 20 * low;
  const f = curved ? Math.log : (v) => v;
  let [a, b] = [f(low), f(high)];
  if (b - a < 1e-9) { a -= Math.abs(a) * 0.1 || 0.5; b += Math.abs(b) * 0.1 || 0.5; }
  const x = (v) => left + (W - left - right) * (v - first) / (last - first);
  const y = (v) => H - bottom - (H - top - bottom) * (f(v) - a) / (b - a);
  const end = shown.map((l) => `${l.name} ${figure(l.points.at(-1)[1])}`).join(", ");
  const svg = s("svg", { class: "chart lines", viewBox: `0 0 ${W} ${H}`, role: "img", "aria-label": `${label}: ${end} after step ${last}` });
  for (let i = 0; i <= 3; i++) {
    const at = a + (b - a) * i / 3, py = H - bottom - (H - top - bottom) * i / 3;
    svg.append(s("line", { class: "grid", x1: left, x2: W - right, y1: py, y2: py }),
      s("text", { x: left - 7, y: py + 4, "text-anchor": "end" }, figure(+(curved ? Math.exp(at) : at).toPrecision(3))));
  }
  svg.append(s("text", { x: left, y: H - 6 }, String(first)), s("text", { x: W - right, y: H - 6, "text-anchor": "end" }, `step ${last}`));
  let at = left;
  for (const l of shown) {
    const points = l.points.filter((p) => Number.isFinite(p[1]));
    svg.append(s("path", { class: `line-${l.kind}`, d: points.map((p, i) => `${i ? "L" : "M"}${x(p[0]).toFixed(1)} ${y(p[1]).toFixed(1)}`).join("") }));
    if (points.length < 40) for (const p of points) svg.append(s("circle", { class: `dot-${l.kind}`, cx: x(p[0]), cy: y(p[1]), r: 2.6 }));
    svg.append(s("text", { x: at, y: 12, class: l.kind }, l.name));
    at += l.name.length * 7 + 16;
  }
  box.replaceChildren(svg);
}
