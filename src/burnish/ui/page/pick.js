// Choosing a model or data: from the folder that was opened, from this computer, or from the hub.

import { get, send } from "./ask.js";
import { bytes, h } from "./chart.js";

/** Tabs in `box`; each way is {name, make}: make() gives the element of its panel. */
export function tabs(box, label, ways) {
  const panel = h("div", { role: "tabpanel", "aria-label": label });
  const made = new Map();
  const buttons = ways.map((way, i) => h("button", { type: "button", role: "tab", onclick: () => show(i),
    onkeydown: (e) => {
      const step = { ArrowRight: 1, ArrowLeft: -1 }[e.key];
      if (step) { const to = (i + step + ways.length) % ways.length; show(to); buttons[to].focus(); }
    } }, way.name));
  function show(i) {
    if (!made.has(i)) made.set(i, ways[i].make());
    buttons.forEach((b, k) => { b.setAttribute("aria-selected", String(k === i)); b.tabIndex = k === i ? 0 : -1; });
    panel.replaceChildren(made.get(i));
  }
  box.replaceChildren(h("div", { class: "tabs", role: "tablist", "aria-label": label }, buttons), panel);
  show(0);
}

/** The folders below the root. wanted: "model" or "data"; chosen(place, name). */
export function folder(wanted, chosen) {
  const crumbs = h("div", { class: "crumbs" }), list = h("ul", { class: "list" }), foot = h("div", { class: "act" });
  let picked = null;
  async function open(path) {
    try {
      const found = await get(`/api/browse?path=${encodeURIComponent(path)}`);
      show(found);
    } catch (e) { list.replaceChildren(h("li", { class: "error" }, e.message)); }
  }
  function choose(path, name, button) {
    picked = path;
    for (const b of list.querySelectorAll("button")) b.setAttribute("aria-pressed", String(b === button));
    chosen(`root:${path}`, name);
  }
  function show(found) {
    const parts = found.path ? found.path.split("/") : [];
    crumbs.replaceChildren(h("button", { type: "button", class: "link", onclick: () => open("") }, found.root),
      ...parts.flatMap((p, i) => [" / ", h("button", { type: "button", class: "link",
        onclick: () => open(parts.slice(0, i + 1).join("/")) }, p)]));
    const rows = found.entries.filter((e) => wanted === "data" ? e.kind !== "model" : e.kind !== "file").map((e) => {
      const final = wanted === "model" ? e.kind === "model" : e.kind === "file";
      const button = h("button", { type: "button", "aria-pressed": final ? String(picked === e.path) : null,
        onclick: () => final ? choose(e.path, e.name, button) : open(e.path) },
        h("span", { "aria-hidden": "true" }, final ? "◆" : "▸"), h("span", { class: "called" }, e.name),
        h("span", { class: "what" }, e.kind === "file" ? bytes(e.size) : e.kind));
      return h("li", {}, button);
    });
    list.replaceChildren(...(rows.length ? rows : [h("li", { class: "faint" }, wanted === "model" ? " No model folder here." : " Nothing here.")]));
    if (found.more) list.append(h("li", { class: "faint" }, ` and ${found.more} more`));
    const whole = wanted === "data" && found.path !== "";
    foot.replaceChildren(...(whole ? [h("button", { type: "button", onclick: () => choose(found.path, parts.at(-1), null) }, "Take this whole folder")] : []));
  }
  open("");
  return h("div", {}, crumbs, list, foot);
}

/** A name on the hub. */
export function hub(what, example, chosen) {
  const input = h("input", { placeholder: example, "aria-label": `${what} on the hub`, autocomplete: "off", spellcheck: "false" });
  return h("form", { class: "row", onsubmit: (e) => { e.preventDefault(); if (input.value.trim()) chosen(`hub:${input.value.trim()}`, input.value.trim()); } },
    input, h("button", {}, "Take it"));
}

/** Files from this computer, dropped or chosen, go into a folder of the server. */
export function upload(here, chosen) {
  const status = h("div", { role: "status" });
  const files = h("input", { type: "file", multiple: true, hidden: true, accept: here.kinds.join(",") });
  const whole = h("input", { type: "file", webkitdirectory: true, hidden: true });
  let last = null;
  async function take(list) {
    const good = list.filter((f) => here.kinds.some((k) => f.path.toLowerCase().endsWith(k)) && !f.path.split("/").some((p) => p.startsWith(".")));
    if (!good.length) { status.replaceChildren(h("span", { class: "error" }, `Nothing there that is data: ${here.kinds.join(", ")}`)); return; }
    const total = good.reduce((n, f) => n + f.file.size, 0);
    if (total > here.limit) { status.replaceChildren(h("span", { class: "error" }, `${bytes(total)} is more than the ${bytes(here.limit)} that an upload may hold; put it below the folder that was opened.`)); return; }
    const bar = h("progress", { max: Math.max(total, 1), value: 0, "aria-label": "Upload" }), words = h("span", { class: "faint" });
    status.replaceChildren(bar, words);
    try {
      if (last) await send("DELETE", `/api/uploads/${last}`).catch(() => {});   // no run was made of it
      const { id } = await send("POST", "/api/uploads");
      last = id;
      let done = 0, next = 0;
      const worker = async () => {
        while (next < good.length) {
          const f = good[next++];
          await send("PUT", `/api/uploads/${id}/${f.path.split("/").map(encodeURIComponent).join("/")}`, f.file, "application/octet-stream");
          done += f.file.size;
          bar.value = done;
          words.textContent = `${bytes(done)} of ${bytes(total)}`;
        }
      };
      await Promise.all([worker(), worker(), worker(), worker()]);
      const tops = [...new Set(good.map((f) => f.path.split("/")[0]))];
      const name = tops.length === 1 ? tops[0] : `${good.length} files`;
      const left = list.length - good.length;
      status.replaceChildren(h("span", { class: "ok" }, `${name} is here`), left ? h("span", { class: "faint" }, `; ${left} left out, no data`) : "");
      chosen(`upload:${id}/${tops.length === 1 ? tops[0] : ""}`, name);
    } catch (e) { status.replaceChildren(h("span", { class: "error" }, e.message)); }
  }
  files.addEventListener("change", () => take([...files.files].map((file) => ({ file, path: file.name }))));
  whole.addEventListener("change", () => take([...whole.files].map((file) => ({ file, path: file.webkitRelativePath || file.name }))));
  const box = h("div", { class: "drop" }, "Drop a file or a folder here",
    h("div", { class: "act" }, h("button", { type: "button", onclick: () => files.click() }, "Choose files"),
      h("button", { type: "button", onclick: () => whole.click() }, "Choose a folder")));
  box.addEventListener("dragover", (e) => { e.preventDefault(); box.classList.add("over"); });
  box.addEventListener("dragleave", () => box.classList.remove("over"));
  box.addEventListener("drop", async (e) => {
    e.preventDefault();
    box.classList.remove("over");
    const entries = [...e.dataTransfer.items].map((i) => i.webkitGetAsEntry()).filter(Boolean);
    const found = [];
    try { for (const one of entries) await walk(one, "", found); } catch (error) { status.replaceChildren(h("span", { class: "error" }, String(error.message || error))); return; }
    take(found);
  });
  return h("div", {}, box, files, whole, status);
}

async function walk(entry, above, found) {
  const path = above + entry.name;
  if (entry.isFile) {
    found.push({ path, file: await new Promise((good, bad) => entry.file(good, bad)) });
    return;
  }
  const reader = entry.createReader();
  for (;;) {
    const some = await new Promise((good, bad) => reader.readEntries(good, bad));
    if (!some.length) return;
    for (const one of some) await walk(one, `${path}/`, found);
  }
}
