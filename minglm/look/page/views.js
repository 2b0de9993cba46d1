"use strict";
// Pictures and tables of the page. Each takes what it shows and an element to show it in.

const LOAD = ["#eaf4fd", "#a6cbe8", "#a9a9a9", "#c1553b", "#5a0a12"]; // blue, grey at 0, red; lightness falls throughout
const SHARE = ["#ffffff", "#9ecae1", "#2171b5", "#04152e"];
const MOST_COLUMNS = 4096;

function mix(colours, at) {
  const place = Math.min(Math.max(at, 0), 1) * (colours.length - 1);
  const i = Math.min(Math.floor(place), colours.length - 2);
  const parts = (text) => [1, 3, 5].map((start) => parseInt(text.slice(start, start + 2), 16));
  const [a, b] = [parts(colours[i]), parts(colours[i + 1])];
  return a.map((value, c) => Math.round(value + (b[c] - value) * (place - i)));
}

// value -> [r, g, b]; grey-white for what is hidden.
function palette(values) {
  let [low, high] = [Infinity, -Infinity];
  for (const v of values) if (Number.isFinite(v)) [low, high] = [Math.min(low, v), Math.max(high, v)];
  const signed = low < 0;
  const most = signed ? Math.max(-low, high) || 1 : high || 1;
  const colours = signed ? LOAD : SHARE;
  const colour = (v) => (Number.isFinite(v) ? mix(colours, signed ? (v / most + 1) / 2 : v / most) : [238, 238, 238]);
  return { colour, low, high, signed, most };
}

function element(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) made.addEventListener(name.slice(2), value);
    else if (name === "text") made.textContent = value;
    else made.setAttribute(name, value);
  }
  made.append(...children);
  return made;
}

function table(head, rows, numeric = []) {
  const line = (tag, cells) =>
    element("tr", {}, ...cells.map((cell, i) => {
      const made = element(tag, numeric.includes(i) ? { class: "number" } : {});
      made.append(cell);
      return made;
    }));
  return element("table", {}, element("thead", {}, line("th", head)), element("tbody", {}, ...rows.map((row) => line("td", row))));
}

// A heat map: `map` has rows (labels), columns (count), value(r, c), columnName(c), picked [r, c] or null, onpick(r, c).
function heatMap(map, width) {
  const wide = Math.min(map.columns, MOST_COLUMNS);
  const unit = parseFloat(getComputedStyle(document.documentElement).fontSize) / 15; // larger for a projector
  const left = Math.round(92 * unit);
  const cell = Math.max(2, Math.min(64 * unit, (width - left - 6) / wide));
  const tall = Math.round((map.rows.length > 64 ? 9 : 20) * unit);
  const numbers = cell >= 34 * unit;
  const edge = (c) => Math.round(left + c * cell);
  const canvas = element("canvas", { tabindex: "0", role: "img" });
  const scale = window.devicePixelRatio || 1;
  const [w, h] = [Math.ceil(left + cell * wide) + 3, tall * map.rows.length + 3]; // with room for the frame of the last
  canvas.width = w * scale;
  canvas.height = h * scale;
  canvas.style.width = `${w}px`;
  canvas.style.height = `${h}px`;
  const pen = canvas.getContext("2d");
  pen.scale(scale, scale);
  const style = getComputedStyle(document.documentElement);
  const ink = style.getPropertyValue("--ink");
  const values = map.rows.map((_, r) => Array.from({ length: wide }, (_, c) => map.value(r, c)));
  const shades = palette(values.flat());
  map.rows.forEach((label, r) => {
    pen.fillStyle = ink;
    pen.font = `${12 * unit}px ui-monospace, monospace`;
    if (tall > 12 * unit) pen.fillText(label.slice(0, 13), 2, r * tall + 14 * unit);
    values[r].forEach((value, c) => {
      const [red, green, blue] = shades.colour(value);
      pen.fillStyle = `rgb(${red},${green},${blue})`;
      pen.fillRect(edge(c), r * tall, edge(c + 1) - edge(c) - (cell > 6 ? 1 : 0), tall - (tall > 12 ? 1 : 0));
      if (numbers) {
        pen.fillStyle = red * 0.3 + green * 0.6 + blue * 0.1 > 140 ? "#000" : "#fff";
        const narrow = cell < 44 * unit;
        pen.font = `${(narrow ? 9.5 : 11) * unit}px ui-monospace, monospace`;
        const text = Number.isFinite(value) ? String(Number(value.toPrecision(narrow ? 2 : 3))) : number(value);
        pen.fillText(text, edge(c) + 2, r * tall + 14 * unit);
      }
    });
  });
  if (map.picked) outline(pen, edge(map.picked[1]), map.picked[0] * tall, cell, tall, ink);
  canvas.setAttribute("aria-label", describe(map, shades));
  canvas.addEventListener("click", (event) => {
    const box = canvas.getBoundingClientRect();
    const [c, r] = [Math.floor((event.clientX - box.left - left) / cell), Math.floor((event.clientY - box.top) / tall)];
    if (c >= 0 && c < wide && r >= 0 && r < map.rows.length) map.onpick(r, c);
  });
  return { canvas, values, shades, size: [w, h, left, cell, tall, unit] };
}

function outline(pen, x, y, width, height, ink) {
  if (y < 2) [y, height] = [2, height + y - 2]; // of the first row
  pen.lineWidth = 2;
  pen.strokeStyle = "#fff";
  pen.strokeRect(x - 1, y - 1, Math.max(width, 4) + 2, height + 2);
  pen.strokeStyle = ink;
  pen.strokeRect(x - 2, y - 2, Math.max(width, 4) + 4, height + 4);
}

function describe(map, shades) {
  const range = Number.isFinite(shades.low) ? `from ${number(shades.low)} to ${number(shades.high)}` : "nothing finite";
  const at = map.picked ? ` Chosen: ${map.rows[map.picked[0]]}, ${map.columnName(map.picked[1])}.` : "";
  return `Heat map of ${map.name}: ${map.rows.length} rows (tokens), ${map.columns} columns, ${range}.${at}`;
}

function legend(shades) {
  const ends = shades.signed ? [-shades.most, 0, shades.most] : [0, shades.most / 2, shades.most];
  const stops = ends.map((value) => `rgb(${shades.colour(value).join(",")})`);
  const strip = element("span", { style: `display:inline-block;width:7rem;height:.8rem;border:1px solid;background:linear-gradient(90deg,${stops.join(",")})` });
  return element("p", { class: "legend" }, `${number(ends[0])} `, strip, ` ${number(ends[2])}`, shades.signed ? ", grey: 0" : "");
}

// -- saving ------------------------------------------------------------------------------------------------------

function asSvg(drawn, map) {
  const [w, h, left, cell, tall, unit] = drawn.size;
  const text = (s) => s.replace(/[&<>"]/g, (c) => ({ "&": "&amp;", "<": "&lt;", ">": "&gt;", '"': "&quot;" })[c]);
  const labels = map.rows.map((label, r) => `<text x="2" y="${r * tall + (tall > 12 * unit ? 14 * unit : tall - 1)}" font-family="monospace" font-size="${Math.min(12 * unit, tall)}">${text(label.slice(0, 13))}</text>`);
  const cells = drawn.values.length * drawn.values[0].length;
  let body = `<image width="${w}" height="${h}" href="${drawn.canvas.toDataURL()}"/>`;
  if (cells <= 20000) {
    body = drawn.values
      .flatMap((row, r) => row.map((v, c) => `<rect x="${left + c * cell}" y="${r * tall}" width="${cell}" height="${tall - 1}" fill="rgb(${drawn.shades.colour(v).join(",")})"/>`))
      .join("") + labels.join("");
  }
  return `<svg xmlns="http://www.w3.org/2000/svg" width="${w}" height="${h}"><title>${text(map.name)}</title>${body}</svg>`;
}

function asCsv(map) {
  const quote = (s) => (/[",\n]/.test(s) ? `"${s.replace(/"/g, '""')}"` : s);
  const names = Array.from({ length: map.columns }, (_, c) => map.columnName(c));
  const lines = map.rows.map((label, r) => [label, ...names.map((_, c) => String(map.value(r, c)))].map(quote).join(","));
  return [["token", ...names].map(quote).join(","), ...lines].join("\n") + "\n";
}

function download(name, type, text) {
  const link = element("a", { href: URL.createObjectURL(new Blob([text], { type })), download: name });
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 1000);
}

// -- one token's routing -----------------------------------------------------------------------------------------

// The experts of a token in a layer, by the rules of the config, with K, bias and scale as given.
function route(scores, bias, { K, factor, scale }) {
  const { groups, open_groups: open, normalise } = DATA.config;
  let biased = scores.map((s, e) => s + factor * bias[e]);
  if (groups > 1) {
    const size = biased.length / groups;
    const best = Array.from({ length: groups }, (_, g) => {
      const two = biased.slice(g * size, (g + 1) * size).sort((a, b) => b - a);
      return two[0] + (size > 1 ? two[1] : 0);
    });
    const order = Array.from(best.keys()).sort((a, b) => best[b] - best[a] || a - b).slice(0, open);
    biased = biased.map((s, e) => (order.includes(Math.floor(e / size)) ? s : -Infinity));
  }
  const picks = Array.from(biased.keys()).sort((a, b) => biased[b] - biased[a] || a - b).slice(0, K);
  const total = normalise ? picks.reduce((sum, e) => sum + scores[e], 0) + 1e-20 : 1;
  return { biased, picks, weights: picks.map((e) => (scores[e] / total) * scale) };
}
