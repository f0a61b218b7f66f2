// The page: a new run from model to start, the list of runs, and which of them is shown.

import { ask, get, send } from "./ask.js";
import { bytes, count, duration, frontier, h, s, short, stack } from "./chart.js";
import { folder, hub, tabs, upload } from "./pick.js";
import { leave, watch } from "./run.js";
import { accepted, columns, fields, idle, refused, told } from "./settings.js";

const $ = (id) => document.getElementById(id);
const error = (e) => h("p", { class: "error", role: "alert" }, e.message);
const busy = (text) => h("span", { class: "faint" }, text);

/** What has been chosen so far. */
const now = { model: null, data: null, how: {}, facts: null, read: null, plans: null, point: null, machine: null, stale: false };
let title = document.title;
let asked = 0;                                    // of several answers only the newest counts

// -- model and data ----------------------------------------------------------------------------
async function takeModel(place) {
  now.model = place;
  now.facts = now.plans = null;
  planning++;
  $("plan").hidden = true;
  $("model-facts").replaceChildren(busy("Looking at it…"));
  try {
    const f = await ask("model", { model: place });
    if (now.model !== place) return;
    now.facts = f;
    $("model-facts").replaceChildren(facts({
      model: place.slice(place.indexOf(":") + 1), kind: f.architecture || f.type, parameters: f.parameters && count(f.parameters),
      positions: f.positions, weights: f.dtype, "can learn": f.tasks.map((t) => t.replace(/-/g, " ")).join(", ") || "no task that fit serves" }));
  } catch (e) { if (now.model === place) { now.model = null; $("model-facts").replaceChildren(error(e)); } }
  readData();
}

function takeData(place) {
  now.data = place;
  now.how = {};
  own([]);
  readData();
}

async function readData() {
  const turn = ++asked;
  now.read = now.plans = now.point = null;
  $("plan").hidden = $("plan-body").hidden = $("data-shown").hidden = true;
  if (!now.data) { own([]); return; }
  $("reading").hidden = false;
  $("data-facts").replaceChildren(busy("Reading it…"));
  try {
    const body = { data: now.data, how: how(), settings: told() };
    if (now.model && now.facts) body.model = now.model;
    const read = await ask("data", body);
    if (turn !== asked) return;
    now.read = read;
    accepted();
    $("data-facts").replaceChildren(facts({
      data: now.data.slice(now.data.indexOf(":") + 1).replace(/^[0-9]{8}-[0-9]{6}-[0-9a-f]{8}\//, "") || "uploaded files",
      layout: read.layout, task: read.task.replace(/-/g, " "),
      rows: Object.entries(read.rows).map(([k, n]) => `${n.toLocaleString("en")} ${k}`).join(", ") }));
    understood(read);
    own(read.settings);
    idle(read.idle);
    if (read.refused) { refused(read.refused); $("data-facts").append(error({ message: read.refused })); }
    else if (body.model) plan();
  } catch (e) {
    if (turn !== asked) return;
    refused(e.message);
    $("data-facts").replaceChildren(error(e));
    if (e.readings) $("data-facts").append(h("div", { class: "act" }, e.readings.map((r) => h("button", { type: "button",
      onclick: () => { now.how = r.flags; readData(); } }, `It ${r.learns}`))));
  }
}

/** How columns are read: what the page was asked, and what stands in the fields. */
const how = () => ({ ...now.how, ...columns() });

/** A field for each setting that `fit` declares for this task; one that stands stays as it is. */
function own(settings) {
  $("own").hidden = !settings.length;
  fields($("own-fields"), settings, changed);
}

/** What acts on how rows are read makes that anew, and the plan with it. */
function changed(acts) {
  $("start-status").replaceChildren();            // what was refused there is no longer so
  if (acts === "reading" || (now.data && !now.read)) readData();
  else if (acts === "plan") plan();
}

function understood(read) {
  const parts = [];
  const known = { task: read.task.replace(/-/g, " "), columns: read.columns || null, classes: read.labels && read.labels.length,
    "tokens of a row": read.tokens && `${read.tokens.median} in the middle, ${read.tokens.nine_in_ten} in nine of ten, ${read.tokens.most} at most` };
  parts.push(facts(known));
  for (const note of read.notes || []) parts.push(h("p", { class: "faint" }, note));
  if (!now.model) parts.push(h("p", { class: "faint" }, "Choose a model as well, and rows are measured in its tokens."));
  const sides = h("div", { class: "two" });
  if (read.classes) {
    const most = Math.max(...Object.values(read.classes), 1), all = Object.entries(read.classes);
    sides.append(h("div", {}, h("h3", {}, "Rows of each class, in training"), h("div", { class: "classes" }, all.slice(0, 30).flatMap(([name, n]) => [
      h("span", {}, name), s("svg", { viewBox: "0 0 100 9", preserveAspectRatio: "none", "aria-hidden": "true" },
        s("rect", { width: 100 * n / most, height: 9, class: "weights" })), h("span", { class: "n" }, n.toLocaleString("en"))])), all.length > 30 ? h("p", { class: "faint" }, `and ${all.length - 30} more`) : ""));
  }
  if (read.pictures.length) sides.append(h("div", {}, h("h3", {}, "Some of them"), h("div", { class: "gallery" }, read.pictures.map((p) =>
    h("figure", {}, h("img", { src: p.image, alt: `a picture of ${p.label}` }), h("figcaption", {}, p.label))))));
  parts.push(sides);
  if (!read.pictures.length) {
    const names = [...new Set(read.samples.flatMap(Object.keys))];
    parts.push(h("h3", {}, "Some rows"), h("div", { class: "scroll" }, h("table", { class: "samples" },
      h("tr", {}, names.map((n) => h("th", { scope: "col" }, n))), read.samples.map((r) => h("tr", {}, names.map((n) => h("td", {}, r[n] ?? "")))))));
  }
  $("understood").replaceChildren(...parts);
  $("data-shown").hidden = false;
}

function facts(told) {
  return h("dl", { class: "facts" }, Object.entries(told).filter(([, v]) => v !== null && v !== undefined && v !== "")
    .map(([k, v]) => h("div", {}, h("dt", {}, k), h("dd", {}, String(v)))));
}

// -- the plan ------------------------------------------------------------------------------------
let planning = 0, later = 0, going = null;

async function plan(more = {}) {
  clearTimeout(later);
  later = 0;
  going?.abort();
  const turn = ++planning, read = now.read, mine = going = new AbortController();
  if (!read || !now.model) return;
  $("plan").hidden = false;
  const bar = h("progress", { max: 1, "aria-label": "Recipes looked at" }), words = h("span", { class: "faint" }, "Simulating recipes…");
  $("plan-status").replaceChildren(bar, words);
  now.stale ||= !more.candidates;                 // until this one ends, what stands is of before
  try {
    const body = { model: now.model, memory: $("memory").value.trim(), batch: +$("batch").value || 16, task: read.task,
      prefer: $("prefer").value, device: now.machine?.device, rows: read.train, epochs: +$("epochs").value || 1,
      data: now.data, how: how(), settings: told(), ...more };
    const found = await ask("plan", body, (done, total) => {
      if (turn !== planning) return;
      bar.max = total; bar.value = done; words.textContent = `${done} of ${total} recipes`;
    }, mine.signal);
    if (turn !== planning) return null;
    $("plan-status").replaceChildren();
    accepted();
    if (more.candidates) return found;
    now.plans = found;
    now.stale = false;
    const kept = now.point && found.recipes.find((r) => r.recipe === now.point.recipe && r.fits);
    now.point = kept || found.recipes.find((r) => r.recipe === found.best) || null;
    if (!found.best) $("plan-status").replaceChildren(h("p", { class: "error" }, `Nothing fits ${bytes(found.budget)}; ${bytes(found.missing)} more would do for the smallest.`));
    $("plan-body").hidden = false;
    drawPlan();
    takePoint(now.point);
  } catch (e) {
    if (turn !== planning) return null;
    // what stands is not of the settings that are refused
    if (refused(e.message) && !more.candidates) now.plans = now.point = null;
    $("plan-status").replaceChildren(error(e));
    $("plan-body").hidden = false;                // a recipe may be written all the same
    if (!now.plans) for (const id of ["frontier", "chosen", "recipes"]) $(id).replaceChildren();
    $("all-recipes").hidden = !now.plans;
  }
  return null;
}

function drawPlan() {
  const { recipes, budget } = now.plans, held = document.activeElement?.closest?.(".budget");
  $("all-recipes").hidden = false;
  frontier($("frontier"), recipes, budget, now.point, { choose: (r) => takePoint(r), budget: (size, done, keys) => {
    $("memory").value = `${(size / 2 ** 20).toPrecision(4)} MiB`.replace(/(\d+)e\+(\d+)/, (_, a, b) => String(a * 10 ** b));
    now.plans.budget = size;
    clearTimeout(later);
    if (done) plan();
    else if (keys) later = setTimeout(plan, 1200);
    else planning++;                              // a plan that ends now would take the line away
  } });
  if (held) $("frontier").querySelector(".budget").focus();
  const timed = recipes.some((r) => r.hours);
  $("recipes").replaceChildren(h("table", {}, h("tr", {}, ["", "recipe", "needs", "batch", timed ? "takes" : "time", "quality", "trains"].map((t, i) =>
    h("th", { scope: "col", class: i > 1 ? "n" : "" }, t))), recipes.map((r, i) => h("tr", { class: r.needs <= budget ? "" : "over" },
    h("td", {}, h("input", { type: "radio", name: "recipe", id: `r${i}`, checked: r === now.point, onchange: () => takePoint(r) })),
    h("td", {}, h("label", { for: `r${i}` }, h("code", {}, r.recipe))), h("td", { class: "n" }, bytes(r.needs)),
    h("td", { class: "n" }, r.accumulate > 1 ? `${r.batch} × ${r.accumulate}` : r.batch),
    h("td", { class: "n" }, r.hours ? spanned(r.hours) : r.time.toFixed(2)), h("td", { class: "n" }, r.known ? r.quality.toFixed(2) : "?"),
    h("td", { class: "n" }, count(r.trainable))))));
  const why = Object.entries(now.plans.refused);
  if (why.length) $("recipes").append(h("p", { class: "faint" }, `Not possible here: ${why.map(([r, w]) => `${r} (${w})`).join("; ")}`));
}

const spanned = ([a, b]) => duration(a * 3600) === duration(b * 3600) ? duration(a * 3600) : `${duration(a * 3600)} to ${duration(b * 3600)}`;

function takePoint(r) {
  now.point = r;
  if (!r) { $("chosen").replaceChildren(); return; }
  $("recipe").value = r.recipe;
  drawPlan();
  $("chosen").replaceChildren(promise(r));
}

function promise(r) {
  const cut = r.accumulate > 1 ? `${r.batch} rows at once, ${r.accumulate} times for an update` : `${r.batch} rows at once`;
  return h("div", { class: "choice" }, h("code", {}, r.recipe), facts({
    "promised peak of a step": bytes(r.peak), needs: r.needs === r.peak ? null : `${bytes(r.needs)} of the device`, batch: cut,
    "this training takes": r.hours && spanned(r.hours), "expected quality": r.known ? `${r.quality.toFixed(2)} (${r.source})` : "not measured",
    trains: `${count(r.trainable)} parameters, a file of ${bytes(r.adapter)}` }), stack(r.by, r.peak, "Promise"),
    r.notes.map((n) => h("p", { class: "faint" }, n)));
}

/** The recipe as it stands in the field: the chosen point, or one that has yet to be simulated. */
async function written() {
  const text = $("recipe").value.trim();
  if (!text || text === now.point?.recipe) return now.point;
  const found = await plan({ candidates: [text] });
  const r = found?.recipes?.[0];
  if (!r) return null;
  if (now.plans) { now.plans.recipes = [...now.plans.recipes.filter((o) => o.recipe !== r.recipe), r]; takePoint(r); } else { now.point = r; $("chosen").replaceChildren(promise(r)); }
  return r;
}

// -- start -------------------------------------------------------------------------------------
/** What the page itself says, which is of no field: what stands beside those stays. */
const plainly = (text) => Object.assign(new Error(text), { own: true });

async function start(e) {
  e.preventDefault();
  const button = $("start"), status = $("start-status");
  button.disabled = true;
  status.replaceChildren(busy("Starting…"));
  try {
    const text = $("recipe").value.trim();
    if (later || now.stale) await plan();         // a field was changed just now
    $("recipe").value = text;
    const wrong = now.stale && document.querySelector("#view-new [aria-invalid]");
    if (wrong) { wrong.focus(); throw plainly("there is no plan with these settings; the reason stands beside the field"); }
    if (now.stale && now.plans) throw plainly("there is no plan with these settings yet; if one was refused, the reason stands above");
    const r = text === now.point?.recipe ? now.point : now.plans ? await written() : null;
    if (!text) throw plainly("choose a recipe, or write one");
    if (now.plans && !r) throw plainly("this recipe cannot be planned; the reason stands above");
    if (r && now.plans && r.needs > now.plans.budget) throw plainly(`${r.recipe} needs ${bytes(r.needs)}, more than the memory above`);
    const settings = { samples: now.read?.rows.validation ? 4 : null, ...told(), epochs: +$("epochs").value || null,
      batch_size: r ? r.batch : +$("batch").value, ...(r ? { accumulation: r.accumulate > 1 ? r.accumulate : null } : {}) };
    const given = { model: now.model, data: now.data, recipe: r ? r.recipe : text, how: how(), settings };
    await ask("check", given);                    // refused beside its field, before there is a run
    accepted();
    const run = await send("POST", "/api/runs", { ...given, memory: $("memory").value.trim() || null,
      promise: r ? { peak: r.peak, by: r.by } : null });
    status.replaceChildren();
    location.hash = `run/${run.id}`;
  } catch (problem) {
    status.replaceChildren(error(problem));
    if (!problem.own) refused(problem.message)?.focus();
  }
  button.disabled = false;
}

// -- runs, and which view is shown ----------------------------------------------------------------
async function listRuns() {
  const { runs } = await get("/api/runs");
  const going = runs.filter((r) => r.state === "running" || r.state === "stopping").length;
  $("count").hidden = !going;
  $("count").textContent = going;
  $("count").setAttribute("aria-label", `${going} going on`);
  if ($("view-runs").hidden) return;
  $("runs").replaceChildren(runs.length ? h("section", { class: "runs scroll" }, h("table", {},
    h("tr", {}, ["run", "recipe", "state", "result", "started"].map((t) => h("th", { scope: "col" }, t))),
    runs.map((r) => h("tr", {}, h("td", {}, h("a", { href: `#run/${r.id}` }, r.title || r.id)), h("td", {}, h("code", {}, short(r.recipe || "", 60))),
      h("td", {}, h("span", { class: `state ${r.state}` }, r.state)), h("td", {}, result(r)), h("td", {}, new Date(r.created * 1000).toLocaleString())))))
    : h("section", {}, h("p", { class: "faint" }, "No runs yet. ", h("a", { href: "#new" }, "Start one."))));
}

function result(r) {
  const found = r.metrics && (r.metrics.test || r.metrics.validation);
  return found ? Object.entries(found).slice(0, 2).map(([k, v]) => `${k} ${(+v).toPrecision(4)}`).join(", ") : r.state === "failed" ? short(r.why, 80) : "";
}

function show() {
  const [view, id] = (location.hash.slice(1) || "new").split("/");
  leave();
  document.title = title;
  for (const name of ["new", "runs", "run"]) $(`view-${name}`).hidden = name !== view;
  for (const name of ["new", "runs"]) {
    if (name === view) $(`nav-${name}`).setAttribute("aria-current", "page"); else $(`nav-${name}`).removeAttribute("aria-current");
  }
  if (view === "run") watch($("view-run"), id);
  if (view === "new" && now.plans) drawPlan();
  listRuns().catch((e) => $("runs").replaceChildren(error(e)));
  window.scrollTo(0, 0);
}

async function begin() {
  const here = await get("/api/here");
  title = `burnish · ${here.root}`;
  fields($("reading-fields"), here.fields.filter((f) => f.acts === "reading"), changed);
  fields($("more-fields"), here.fields.filter((f) => f.acts !== "reading"), changed);
  tabs($("model-picker"), "Where the model is", [
    { name: "Folder", make: () => folder("model", takeModel) },
    { name: "Hub", make: () => hub("A model", "google/vit-base-patch16-224", takeModel) }]);
  tabs($("data-picker"), "Where the data are", [
    { name: "Upload", make: () => upload(here, takeData) },
    { name: "Folder", make: () => folder("data", takeData) },
    { name: "Hub", make: () => hub("Data", "owner/name or owner/name:split", takeData) },
    { name: "Digits", make: () => h("div", {}, h("p", { class: "faint" }, "1,797 scanned digits, which come with scikit-learn."),
      h("button", { type: "button", onclick: () => takeData("builtin:digits") }, "Take them")) }]);
  $("plan-form").addEventListener("submit", (e) => { e.preventDefault(); plan(); });
  for (const id of ["memory", "batch", "epochs", "prefer"]) $(id).addEventListener("change", () => {
    clearTimeout(later);
    later = setTimeout(plan, 600);
  });
  $("start-form").addEventListener("submit", start);
  $("look").addEventListener("click", written);
  window.addEventListener("hashchange", show);
  window.addEventListener("resize", () => { if (now.plans && !$("view-new").hidden) drawPlan(); });
  setInterval(() => listRuns().catch(() => {}), 5000);
  show();
  try {
    const m = now.machine = await ask("machine");
    $("machine").textContent = `${m.name}${m.memory ? `, ${bytes(m.memory)}` : ""}`;
    if (!$("memory").value) $("memory").value = m.memory ? `${(Math.max(m.free, m.memory / 4) * 0.8 / 2 ** 30).toPrecision(3)} GiB` : "8 GB";
  } catch (e) { $("machine").textContent = e.message; if (!$("memory").value) $("memory").value = "8 GB"; }
}

begin().catch((e) => $("main").prepend(error(e)));
