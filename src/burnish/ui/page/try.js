// Asking a finished run: a form for what its task reads, and answers as its task gives them.

import { send } from "./ask.js";
import { h, lines, s } from "./chart.js";

const PICTURES = "image/png,image/jpeg,image/webp,image/gif,image/bmp", SOUNDS = ".wav,.flac,.ogg,.mp3,.opus,.aiff", TABLES = ".csv,.tsv,.jsonl", CLOUDS = ".xyz,.ply,.npy,.off", GRAPHS = ".jsonl";
const TABLE = { csv: "text/csv", tsv: "text/tab-separated-values", jsonl: "application/jsonl" };

const file = (label, accept, optional) => ({ name: "file", label, accept, optional });
const text = (label, more = {}) => ({ name: "text", label, long: true, ...more });

/** The fields of a task's form; one that is not here is asked with a text, or with rows. */
const FORMS = {
  "image-text-contrastive": [file("A picture", PICTURES), { name: "texts", label: "Texts to compare it with, one a line", long: true }],
  "text-segmentation": [file("A picture", PICTURES), { name: "texts", label: "What to draw the mask of" }],
  "image-generation": [text("The name of a class, or a number to draw by", { long: false })],
  "text-to-image": [text("What the picture is to show", { long: false })],
  "question-answering": [{ name: "question", label: "A question" }, { name: "context", label: "The text that answers it", long: true }, file("or a table of rows", TABLES, true)],
  "embedding": [text("A text"), { name: "pair", label: "Another, to say how near they are", long: true, optional: true }, file("or a table of rows", TABLES, true)],
  "time-series-forecasting": [file("A table with the last rows of a series", TABLES)],
};

export function fields(task, paired) {
  if (FORMS[task]) return FORMS[task];
  if (/^image-|^semantic-|^object-/.test(task)) return [file("A picture", PICTURES)];
  if (/^audio-|^speech-/.test(task)) return [file("A sound", SOUNDS)];
  if (/^cloud-/.test(task)) return [file("A cloud of points", CLOUDS)];
  if (/^graph-/.test(task)) return [text('A graph, such as {"edge_index": [[0, 1], [1, 0]], "node_feat": [[1], [2]]}'), file("or a table of graphs", GRAPHS, true)];
  return [text("A text"), paired && { name: "pair", label: "The text beside it", long: true }, file("or a table of rows", TABLES, true)].filter(Boolean);
}

export function form(box, id, task, paired) {
  const wanted = fields(task, paired), out = h("div", { "aria-live": "polite" }), inputs = {};
  const field = (f) => {
    const input = f.accept ? h("input", { type: "file", accept: f.accept }) : f.long ? h("textarea", { spellcheck: "false" }) : h("input", { type: "text", autocomplete: "off" });
    inputs[f.name] = input;
    return h("label", { class: "wide" }, f.label, input);
  };
  const problem = (words) => out.replaceChildren(h("p", { class: "error" }, words));
  const ask = async (e) => {
    e.preventDefault();
    const chosen = inputs.file?.files?.[0], said = (name) => inputs[name]?.value.trim() || "";
    const instead = chosen && wanted.some((f) => f.accept && f.optional);        // a table in the place of a text
    const lacking = !instead && wanted.find((f) => !f.optional && !(f.accept ? chosen : said(f.name)));
    if (lacking) { problem(lacking.accept ? "Choose a file first." : `Fill in: ${lacking.label.toLowerCase()}.`); return; }
    out.replaceChildren(h("p", { class: "faint" }, "Asking both… the first time the model is loaded."));
    try {
      let a;
      if (chosen) {
        const query = said("texts").split("\n").filter((t) => t.trim()).map((t) => `text=${encodeURIComponent(t.trim())}`).join("&");
        a = await send("POST", `/api/runs/${id}/predict${query && `?${query}`}`, chosen, TABLE[chosen.name.split(".").pop().toLowerCase()] || chosen.type);
      } else {
        const row = Object.fromEntries(wanted.filter((f) => !f.accept && said(f.name)).map((f) => [f.name, said(f.name)]));
        a = await send("POST", `/api/runs/${id}/predict`, { text: wanted.filter((f) => !f.accept).length > 1 ? JSON.stringify(row) : row.text });
      }
      out.replaceChildren(...shown(a, chosen));
    } catch (wrong) { problem(wrong.message); }
  };
  box.replaceChildren(h("h2", {}, "Try it"), h("form", { onsubmit: ask }, ...wanted.map(field), h("div", { class: "act" }, h("button", {}, "Ask"))), out);
}

/** What was answered: in words beside the base's, with what can be seen of it above. */
function shown(a, chosen) {
  if (a.rows) {
    return [h("div", { class: "scroll" }, h("table", { class: "samples" }, h("tr", {}, ["asked", "tuned", "base"].map((t) => h("th", { scope: "col" }, t))),
      a.rows.map((r) => h("tr", {}, h("td", {}, r.asked), h("td", {}, r.said), h("td", {}, r.base)))))];
  }
  const told = (v) => v === "" ? h("span", { class: "faint" }, "nothing") : String(v).startsWith("data:image/") ? h("img", { src: v, alt: "the picture it makes", class: "drawn" }) : v;
  const pair = h("div", { class: "pair" }, h("div", {}, h("h3", {}, "Tuned"), told(a.said)), h("div", {}, h("h3", {}, "Base"), told(a.base)));
  const seen = a.objects && chosen ? boxed(a.objects, chosen) : a.mask && chosen ? masked(a, chosen) : a.forecast ? forecast(a.forecast) : null;
  return seen ? [seen, pair] : [pair];
}

const COLOURS = ["#2f7fd0", "#d0483e", "#2e9d63", "#b06fc9", "#d08a1d", "#1fa3a3", "#8a6d3b", "#e05a9b"];

/** The picture with a box about each object. */
function boxed(objects, chosen) {
  const box = h("div", { class: "scroll" }), from = URL.createObjectURL(chosen), image = new Image();
  image.onload = () => {
    const names = [...new Set(objects.map((o) => o.label))], { naturalWidth: wide, naturalHeight: high } = image, unit = Math.max(wide, high) / 400;
    box.replaceChildren(s("svg", { viewBox: `0 0 ${wide} ${high}`, class: "seen", role: "img", "aria-label": `${objects.length} objects` },
      s("image", { href: from, width: wide, height: high }),
      ...objects.flatMap((o) => {
        const [x, y, w, d] = o.box, colour = COLOURS[names.indexOf(o.label) % COLOURS.length];
        return [s("rect", { x, y, width: w, height: d, fill: "none", stroke: colour, "stroke-width": 3 * unit }),
          named(`${o.label} ${o.score.toFixed(2)}`, x + 2 * unit, Math.max(y - 4 * unit, 13 * unit), 14 * unit, colour)];
      })));
  };
  image.src = from;
  return box;
}

/** Words in the units of a picture, of any size; the page's own rules are for charts. */
function named(words, x, y, size, colour) {
  const made = s("text", { x, y, class: "named" }, words);
  Object.assign(made.style, { fontSize: `${size}px`, fill: colour });
  return made;
}

/** The picture under the colours of its classes, with a key. */
function masked(a, chosen) {
  const canvas = h("canvas", { class: "seen", role: "img", "aria-label": "the class of every pixel" }), from = URL.createObjectURL(chosen);
  const kinds = Object.keys(a.shares), colour = (name) => COLOURS[kinds.indexOf(name) % COLOURS.length];
  const image = new Image(), mask = new Image();
  mask.onload = () => {
    const { naturalWidth: wide, naturalHeight: high } = mask;
    Object.assign(canvas, { width: wide, height: high });
    const pen = canvas.getContext("2d", { willReadFrequently: true });
    pen.drawImage(mask, 0, 0);
    const numbers = pen.getImageData(0, 0, wide, high);
    pen.drawImage(image, 0, 0, wide, high);
    const pixels = pen.getImageData(0, 0, wide, high);
    for (let i = 0; i < numbers.data.length; i += 4) {
      const name = a.labels[numbers.data[i]];
      if (!name) continue;
      const c = parseInt(colour(name).slice(1), 16);
      for (let k = 0; k < 3; k++) pixels.data[i + k] = (pixels.data[i + k] + ((c >> (16 - 8 * k)) & 255)) / 2;
    }
    pen.putImageData(pixels, 0, 0);
    URL.revokeObjectURL(from);
  };
  image.onload = () => { mask.src = `data:image/png;base64,${a.mask}`; };
  image.src = from;
  const key = (name) => {
    const mark = s("svg", { viewBox: "0 0 10 10", width: 10, height: 10, "aria-hidden": "true" }, s("rect", { width: 10, height: 10, rx: 2, fill: colour(name) }));
    return h("span", {}, mark, ` ${name} ${(100 * a.shares[name]).toFixed(1)} %`);
  };
  return h("div", {}, canvas, h("div", { class: "legend" }, kinds.flatMap((n) => [key(n), " "])));
}

/** Each column ahead, a chart a column. */
function forecast(columns) {
  const box = h("div", { class: "two" });
  for (const [name, values] of Object.entries(columns)) {
    const part = h("div", {});
    lines(part, [{ name: `${name}, rows ahead`, kind: "a", points: values.map((v, i) => [i + 1, v]) }], name, false);
    box.append(part);
  }
  return box;
}

// -- figures -----------------------------------------------------------------------------------
/** What each task goes by, first the one that is kept for it. */
const ORDER = ["map", "dice", "mean_iou", "recall_at_1", "map_at_r", "wer", "rouge_l", "accuracy", "exact_match", "f1", "mrr", "token_accuracy", "spearman", "r2", "mase", "perplexity"];
const NAMES = { map: "mean average precision", map_50: "average precision at half overlap", mean_iou: "intersection over union", dice: "Dice", recall_at_1: "nearest is right", map_at_r: "MAP@R",
  wer: "errors per word", cer: "errors per character", rouge_l: "ROUGE-L", mrr: "reciprocal rank", r2: "R²", mae: "absolute error", mase: "error beside the naive", f1: "F1" };

export const called = (name) => NAMES[name.replace(/^eval_/, "")] || name.replace(/^eval_/, "").replace(/_/g, " ");

export function metricOf(rows) {
  const found = ORDER.map((n) => `eval_${n}`).find((n) => rows.some((r) => n in r));
  return found || null;
}
