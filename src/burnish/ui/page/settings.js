// Fields for what `fit` may be told, made of what it declares, and what it refuses beside its field.

import { h } from "./chart.js";

const BOXES = ["reading-fields", "own-fields", "more-fields"];
const COLUMNS = "Columns";
const inputs = () => BOXES.flatMap((id) => [...document.getElementById(id).querySelectorAll("[name]")]);
const word = (name) => `${name[0].toUpperCase()}${name.slice(1).replace(/_/g, " ")}`;

/** One setting: {name, kind, least, most} and, where it is of no task alone, {help, choices, group, acts}. */
function field(what, changed) {
  const { name, kind, least, most, help } = what, id = `set-${name}`;
  const choices = what.choices?.length ? what.choices : kind === "bool" ? ["true", "false"] : null;
  const number = kind === "int" || kind === "float", told = [help && `${id}-help`, `${id}-error`].filter(Boolean).join(" ");
  const input = choices
    ? h("select", { id, name, "aria-describedby": told }, ["", ...choices].map((v) => h("option", { value: v }, v || "as usual")))
    : h("input", { id, name, type: number ? "number" : "text", autocomplete: "off", spellcheck: "false", placeholder: "as usual", "aria-describedby": told,
      ...(number ? { step: kind === "int" ? 1 : "any" } : {}), ...(number && least !== null ? { min: least } : {}), ...(number && most !== null ? { max: most } : {}) });
  Object.assign(input.dataset, { kind, group: what.group || "" });
  input.addEventListener("change", () => { clear(input); changed(what.acts || "reading"); });
  return h("div", { class: "setting" }, h("label", { for: id }, word(name)), input,
    help ? h("small", { id: `${id}-help`, class: "faint" }, help) : "", h("small", { id: `${id}-error`, class: "error" }));
}

/** Fields in `box`, under the names of their groups; those that stand keep what is in them. */
export function fields(box, list, changed) {
  const names = list.map((f) => f.name).join();
  if (box.dataset.names === names) return;
  const before = Object.fromEntries([...box.querySelectorAll("[name]")].map((i) => [i.name, i.value]));
  box.dataset.names = names;
  const groups = [...new Set(list.map((f) => f.group || ""))];
  box.replaceChildren(...groups.map((g) => h("fieldset", {}, g ? h("legend", {}, g) : "", h("div", { class: "settings" },
    list.filter((f) => (f.group || "") === g).map((f) => field(f, changed))))));
  for (const i of box.querySelectorAll("[name]")) if (i.name in before) i.value = before[i.name];
}

const value = (i) => {
  if (i.validity.badInput) throw new Error(`${i.name}: expected a number`);
  const text = i.value.trim();
  return i.dataset.kind === "int" || i.dataset.kind === "float" ? Number(text) : text;
};
const filled = (columns) => Object.fromEntries(inputs().filter((i) => (i.dataset.group === COLUMNS) === columns && (i.value.trim() !== "" || i.validity.badInput))
  .map((i) => [i.name, value(i)]));

/** What is filled in: settings, and names of columns. */
export const told = () => filled(false);
export const columns = () => filled(true);

function clear(input) {
  input.removeAttribute("aria-invalid");
  document.getElementById(`${input.id}-error`).textContent = "";
}

/** What says nothing to the task that was read is put away; what is filled in stays in sight. */
export function idle(names) {
  for (const i of inputs()) i.closest(".setting").hidden = names.includes(i.name) && i.value.trim() === "" && !i.validity.badInput;
}

/** Nothing is refused any more. */
export const accepted = () => inputs().forEach(clear);

/** Beside the fields that a refusal names stands why, in sight whatever was folded or put away
 *  around them; the first of them, or null. */
export function refused(message) {
  accepted();
  const hit = inputs().filter((i) => new RegExp(`(^|\\W)${i.name}=`).test(message) ||
    (i.value.trim() !== "" || i.validity.badInput) && new RegExp(`(^|\\W)${i.name.replace(/s$/, "s?")}(\\W|$)`).test(message));
  for (const i of hit) {
    i.setAttribute("aria-invalid", "true");
    document.getElementById(`${i.id}-error`).textContent = message;
    i.closest("details").open = true;
    for (let around = i.closest("[hidden]"); around; around = i.closest("[hidden]")) around.hidden = false;
  }
  return hit[0] || null;
}
