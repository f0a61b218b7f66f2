// One run: what it is doing, live, and what can be done with it afterwards.

import { send } from "./ask.js";
import { bytes, duration, figure, h, lines, stack } from "./chart.js";
import { called, form, metricOf } from "./try.js";

let source = null, ticking = 0, shownAt = 0, resized = null;

/** Nothing is watched any more. */
export function leave() {
  source?.close();
  source = null;
  clearInterval(ticking);
  window.removeEventListener("resize", resized);
  shownAt++;
}

export function watch(box, id) {
  leave();
  const mine = shownAt;
  const it = { run: null, rows: [], log: "", answers: null };
  const part = (name, ...inside) => h("div", { id: name }, ...inside);
  const title = h("h1", {}, "Run"), state = h("span", { class: "state", role: "status" }), why = h("p", { class: "error", role: "alert", hidden: true });
  const acts = h("div", { class: "act" }), told = h("span", { role: "status" }), tiles = h("div", { class: "tiles" });
  const loss = part("loss"), metric = part("metric"), memory = part("memory-bar"), log = h("pre", { tabindex: 0, "aria-label": "What the run printed" });
  const answers = h("section", { hidden: true }), trying = h("section", { hidden: true });
  const about = h("span", { class: "faint" });
  box.replaceChildren(title, h("p", {}, state, " ", about), why, acts, tiles,
    h("section", { "aria-label": "Learning" }, h("h2", {}, "Learning"), h("div", { class: "two" }, loss, metric)),
    h("section", { "aria-label": "Memory" }, h("h2", {}, "Memory"), memory), answers, trying,
    h("section", {}, h("h2", {}, "What it printed"), log));

  const act = (name, path, main) => h("button", { type: "button", class: main ? "main" : "", onclick: async (e) => {
    e.target.disabled = true;
    told.replaceChildren();
    try {
      it.run = await send("POST", `/api/runs/${id}/${path}`);
      if (path === "resume") listen();
      draw();
    } catch (problem) { told.replaceChildren(h("span", { class: "error" }, problem.message)); }
    e.target.disabled = false;
  } }, name);

  function listen() {
    source?.close();
    it.rows = [];
    it.log = "";
    source = new EventSource(`/api/runs/${id}/events`);
    const on = (kind, take) => source.addEventListener(kind, (e) => { if (mine === shownAt) { take(JSON.parse(e.data)); later(); } });
    source.addEventListener("open", () => { it.rows = []; it.log = ""; it.answers = null; });
    on("reset", (kind) => { if (kind === "row") it.rows = []; else it.answers = null; });
    on("row", (row) => it.rows.push(row));
    on("log", (text) => { it.log = (it.log + text).slice(-60000); });
    on("answers", (a) => { it.answers = a; });
    on("run", (run) => { it.run = run; });
    source.addEventListener("over", () => source.close());
    source.addEventListener("gone", () => { source.close(); if (mine === shownAt) gone(); });
    source.addEventListener("error", () => { if (source.readyState === 2 && mine === shownAt) gone(); });
  }

  async function gone() {
    try { it.run = await send("GET", `/api/runs/${id}`); later(); }
    catch (problem) {
      if (mine !== shownAt || problem.status !== 404) return;
      it.run = null;
      title.textContent = "There is no such run.";
      state.textContent = "";
      state.className = "state";
      acts.replaceChildren();
    }
  }

  let waiting = false;
  const later = () => { if (!waiting) { waiting = true; requestAnimationFrame(() => { waiting = false; if (mine === shownAt) draw(); }); } };

  function draw() {
    const run = it.run;
    if (!run) return;
    const going = run.state === "running" || run.state === "stopping";
    title.textContent = run.title || id;
    document.title = `${run.state} · ${run.title}`;
    state.textContent = run.state;
    state.className = `state ${run.state}`;
    about.replaceChildren(h("code", {}, run.recipe || "a recipe that fits"));
    why.hidden = run.state !== "failed";
    why.textContent = run.why;
    const key = `${run.state} ${run.report} ${run.adapter} ${run.checkpoint}`;
    if (acts.dataset.key !== key) {
      acts.dataset.key = key;
      acts.replaceChildren(...[
        run.state === "running" && act("Stop", "stop"), run.state === "stopping" && act("Stop at once", "stop"),
        (run.state === "stopped" || run.state === "failed") && act(run.checkpoint ? `Go on from step ${run.checkpoint}` : "Start again", "resume", true),
        run.report && h("a", { class: "button", href: `/api/runs/${id}/report`, target: "_blank", rel: "noopener" }, "Open the report"),
        run.adapter && h("a", { class: "button", href: `/api/runs/${id}/adapter.zip`, download: "" }, "Download the adapter"), told].filter(Boolean));
      if (run.state === "finished" && run.adapter) tryIt();
    }
    numbers(run, going);
    const train = it.rows.filter((r) => "loss" in r), held = it.rows.filter((r) => "eval_loss" in r), name = metricOf(it.rows);
    lines(loss, [{ name: "training loss", kind: "a", points: train.map((r) => [r.step, r.loss]) },
      { name: "validation loss", kind: "b", points: held.map((r) => [r.step, r.eval_loss]) }], "Loss");
    if (!train.length) loss.replaceChildren(h("p", { class: "faint" }, going ? "The first figures come with the first steps." : "There are no figures."));
    lines(metric, name ? [{ name: `validation ${called(name)}`, kind: "a",
      points: it.rows.filter((r) => name in r).map((r) => [r.step, r[name]]) }] : [], "Validation", false, it.rows.at(-1)?.step || 0);
    held_(run, going);
    sampled();
    const end = log.scrollTop + log.clientHeight > log.scrollHeight - 30;
    if (log.textContent !== it.log) { log.textContent = it.log; if (end) log.scrollTop = log.scrollHeight; }
  }

  function numbers(run, going) {
    const train = it.rows.filter((r) => "loss" in r), last = train.at(-1), first = train.at(-12) || train[0];
    const rate = last && first && last.step > first.step && last.time > first.time ? (last.step - first.step) / (last.time - first.time) : null;
    const total = run.settings.max_steps || (last?.epoch ? Math.round(last.step * (run.settings.epochs || 3) / last.epoch) : null);
    const name = metricOf(it.rows), best = name && it.rows.filter((r) => name in r).at(-1);
    const tile = (value, label) => value === null || value === undefined ? null : h("div", { class: "tile" }, h("b", {}, value), h("span", {}, label));
    tiles.replaceChildren(...[
      tile(last ? `${last.step}${total ? ` / ${total}` : ""}` : going ? "getting ready" : null, "step"),
      tile(last && figure(last.loss), "training loss"), tile(best && figure(best[name]), name && `validation ${called(name)}`),
      tile(rate && `${rate >= 10 ? rate.toFixed(0) : rate.toPrecision(2)} / s`, "steps"),
      tile(going && rate && total ? duration((total - last.step) / rate - Math.max(0, Date.now() / 1000 - last.time)) : null, "left"),
      ...(going ? [] : Object.entries(run.metrics?.test || {}).filter(([k]) => k !== "loss").slice(0, 1).map(([k, v]) => tile(figure(v), `test ${called(k)}`))),
    ].filter(Boolean));
  }

  function held_(run, going) {
    const promised = run.promised || run.promise, parts = [];
    const most = Math.max(promised?.peak || 0, run.measured?.peak || 0);
    if (promised) parts.push(h("h3", {}, `Promised peak of a step: ${bytes(promised.peak)}`), stack(promised.by, most, "Promised"));
    const seen = Math.max(0, ...it.rows.map((r) => r.device_peak || 0));
    if (seen && !run.measured) parts.push(h("p", {}, `The device has held ${bytes(seen)} of tensors at most${promised ? `, ${(100 * seen / promised.peak).toFixed(0)} % of the promise` : ""}.`));
    if (run.measured) parts.push(h("h3", {}, `Measured: ${bytes(run.measured.peak)}${promised ? ` (promise off by ${(100 * (promised.peak / run.measured.peak - 1)).toFixed(1)} %)` : ""}`), stack(run.measured.by, most, "Measured"));
    if (run.process) parts.push(h("p", { class: "faint" }, `The process holds ${bytes(run.process.now)} now, ${bytes(run.process.peak)} at most: model, tensors and about 0.4 GB of libraries.`));
    if (promised && !run.measured && going) parts.push(h("p", { class: "faint" }, "A step is measured at the end, and stands here beside the promise."));
    if (!parts.length) parts.push(h("p", { class: "faint" }, going ? "The promise is in what it prints." : "Nothing was measured."));
    memory.replaceChildren(...parts);
  }

  function sampled() {
    answers.hidden = !it.answers;
    if (!it.answers) return;
    answers.replaceChildren(h("h2", {}, `Answers after step ${it.answers.step}`), h("div", { class: "scroll" }, h("table", { class: "samples" },
      h("tr", {}, ["asked", "answer", "right"].map((t) => h("th", { scope: "col" }, t))),
      it.answers.answers.map((a) => h("tr", {}, h("td", {}, a.asked), h("td", {}, a.said), h("td", {}, a.right ?? ""))))));
  }

  function tryIt() {
    if (!trying.hidden) return;
    trying.hidden = false;
    form(trying, id, it.run.task || "", it.run.pair);
  }

  listen();
  ticking = setInterval(() => { if (it.run && (it.run.state === "running")) draw(); }, 1000);
  resized = later;
  window.addEventListener("resize", resized);
}
