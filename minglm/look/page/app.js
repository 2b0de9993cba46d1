"use strict";
// The page: what is shown (the state), drawing it, and what keys, clicks and links do.

const state = { trace: 0, mode: "a", step: 0, token: 0, head: 0, cell: null, K: null, factor: 1, scale: null };
const find = (id) => document.getElementById(id);
let drawnMap = null; // of the panel, for saving
let refocus = ""; // where the keyboard was before a part of the page was drawn anew
let turn = 0; // the newest drawing; older ones that come late are dropped

const same = DATA.traces[1] && String(DATA.traces[0].ids) === String(DATA.traces[1].ids);
const MODES = DATA.traces[1] ? [["a", "A"], ["b", DATA.traces[1].label], ["both", "both"], ...(same ? [["diff", "B − A"]] : [])] : [];

const current = () => DATA.traces[state.trace].steps[state.step];
const tokenText = (which, t) => `${t} ${DATA.traces[which].tokens[t]}`; // in lists
const quoted = (which, t) => `${t} “${DATA.traces[which].tokens[t]}”`; // in sentences: token 2 “3”

// -- going somewhere ---------------------------------------------------------------------------------------------

function go(change) {
  Object.assign(state, change);
  const { tokens, steps: list } = DATA.traces[state.trace];
  state.step = within(state.step, list.length);
  state.token = within(state.token, tokens.length);
  state.head = within(state.head, DATA.config.H);
  if (state.cell !== null) state.cell = within(state.cell, columnsOf(current()));
  try {
    history.replaceState(null, "", place());
  } catch {
    // some browsers allow only so many a minute: the address lags behind
  }
  draw();
}

const within = (i, count) => Math.min(Math.max(Math.trunc(i) || 0, 0), count - 1);

// Numbers in a row of the picture: of one head, for attention.
const columnsOf = (step) => (step.axes.includes("S") ? step.full[2] : step.full.slice(1).reduce((a, b) => a * b, 1));

function place() {
  const step = current();
  const layer = layerOf(step.name);
  const short = layer === null ? step.name : step.name.split(".").slice(2).join(".");
  const parts = [layer === null ? "" : `layer=${layer}`, `step=${short}`, `token=${state.token}`];
  if (state.mode !== "a") parts.push(`trace=${state.mode}`);
  if (step.axes.includes("S")) parts.push(`head=${state.head}`);
  if (state.cell !== null) parts.push(`cell=${state.cell}`);
  return `#${parts.filter(Boolean).join("&")}`;
}

// "#layer=3&step=router&token=7": a step by its name, the end of its name, or the idea that it belongs to.
function goToPlace(hash) {
  const asked = new URLSearchParams(hash.slice(1));
  const mode = MODES.some(([name]) => name === asked.get("trace")) ? asked.get("trace") : "a";
  const which = mode === "b" ? 1 : 0;
  const list = DATA.traces[which].steps;
  const layer = asked.has("layer") ? Number(asked.get("layer")) : null;
  const wanted = asked.get("step") || "";
  const ways = [
    (step) => step.name === wanted || step.name.split(".").slice(2).join(".") === wanted,
    (step) => step.name.endsWith(`.${wanted}`),
    (step) => !wanted || step.idea.endsWith(`, ${wanted}`),
  ];
  const found = ways.map((fits) => list.findIndex((step) => (layer === null || layerOf(step.name) === layer) && fits(step)));
  go({
    mode,
    trace: which,
    step: found.find((i) => i >= 0) ?? 0,
    token: asked.has("token") ? Number(asked.get("token")) : DATA.traces[which].tokens.length - 1,
    head: Number(asked.get("head")),
    cell: asked.has("cell") ? Number(asked.get("cell")) : null,
  });
}

function move(by) {
  go({ step: state.step + by, cell: null });
}

function moveLayer(by) {
  const [name, layer] = [current().name, layerOf(current().name)];
  if (layer === null) return;
  const target = name.replace(`layers.${layer}.`, `layers.${layer + by}.`);
  const step = DATA.traces[state.trace].steps.findIndex((each) => each.name === target);
  if (step >= 0) go({ step });
}

function choose(mode) {
  const which = mode === "b" ? 1 : 0;
  go({ mode, trace: which, step: stepIn(which), cell: null });
}

// This step in a trace; if it is not there (no token picked that expert), the last one before it that is.
function stepIn(which) {
  const there = DATA.traces[which].steps.map((step) => step.name);
  const before = DATA.traces[state.trace].steps.slice(0, state.step + 1).reverse();
  return there.indexOf(before.find((step) => there.includes(step.name)).name);
}

// -- lists -------------------------------------------------------------------------------------------------------

function drawTokens() {
  const list = find("tokens").querySelector("ol");
  list.replaceChildren(
    ...DATA.traces[state.trace].tokens.map((text, t) => {
      const button = element("button", { onclick: () => go({ token: t }), "data-token": t });
      button.append(element("span", { class: "number", text: String(t) }), element("bdi", { text }));
      if (t === state.token) button.setAttribute("aria-current", "true");
      return element("li", {}, button);
    }),
  );
}

function drawSteps() {
  const layers = [];
  DATA.traces[state.trace].steps.forEach((step, i) => {
    const layer = layerOf(step.name);
    const title = layer === null ? "outside the layers" : `layer ${layer}`;
    if (!layers.length || layers[layers.length - 1].title !== title) layers.push({ title, steps: [] });
    layers[layers.length - 1].steps.push([step, i]);
  });
  find("steps").querySelector("div").replaceChildren(...layers.map(layerList));
}

function layerList({ title, steps: listed }) {
  const details = element("details", listed.some(([, i]) => i === state.step) ? { open: "" } : {});
  details.append(element("summary", { text: title }));
  let idea = "";
  for (const [step, i] of listed) {
    if (step.idea !== idea && layerOf(step.name) !== null) details.append(element("div", { class: "idea", text: step.idea.replace(/^layer \d+, /, "") }));
    idea = step.idea;
    const parts = step.name.split("experts.");
    const button = element("button", { onclick: () => go({ step: i, cell: null }), "data-step": step.name });
    button.textContent = parts[1] && !step.name.includes("shared_experts") ? parts[1] : last(step.name);
    if (i === state.step) button.setAttribute("aria-current", "true");
    if (DATA.differs && DATA.differs[step.name]) button.classList.add("differs");
    details.append(button);
  }
  return details;
}

// -- the panel ---------------------------------------------------------------------------------------------------

function drawFacts(step) {
  find("step-name").textContent = step.name;
  find("what").textContent = `${step.what[0].toUpperCase()}${step.what.slice(1)}.`;
  const { mean, sd, min, max } = step.stats;
  const odd = ["−∞", "∞", "NaN"].filter((name) => step.stats[name]).map((name) => `${step.stats[name]} × ${name}`);
  const shape = step.axes.map((letter, i) => `${letter} = ${step.full[i]}`).join(", ");
  const letters = step.axes.map((letter) => `${letter} ${DATA.letters[letter].join(" ")}`).join(" · ");
  const facts = [["shape", `[${shape}]`], ["letters", letters], ["formula", step.formula]];
  const known = mean === undefined ? [] : [`mean ${number(mean)}, sd ${number(sd)}, ${number(min)} … ${number(max)}`];
  facts.push(["numbers", [...known, ...odd].join(", ")]);
  const apart = DATA.differs && DATA.differs[step.name];
  if (apart) facts.push(["A and B", typeof apart === "string" ? apart : `differ by up to ${number(apart)}`]);
  find("facts").replaceChildren(...facts.flatMap(([name, text]) => [element("dt", { text: name }), element("dd", { text })]));
  find("code").textContent = `${step.file}\n${step.code}`;
}

// What a heat map needs, for a step of a trace: rows are tokens, columns everything else (one head, for attention).
async function mapOf(which, step) {
  const array = await arrayOf(which, step.name);
  const rows = step.rows.map((t) => tokenText(which, t));
  const picked = step.rows.includes(state.token) && state.cell !== null ? [step.rows.indexOf(state.token), state.cell] : null;
  const onpick = (r, c) => go({ trace: which, step: stepIn(which), token: step.rows[r], cell: c });
  const base = { name: step.name, rows, tokens: step.rows, picked, onpick };
  if (step.axes.includes("S")) {
    const keys = array.shape[2];
    const value = (r, c) => array.values[(state.head * rows.length + r) * keys + c];
    return { ...base, columns: keys, value, columnName: (c) => `key ${quoted(which, c)}` };
  }
  const width = rows.length ? array.values.length / rows.length : 0;
  const letter = step.axes[step.axes.length - 1];
  const inner = step.axes.length === 3 ? step.full[2] : width;
  const columnName = (c) => (step.axes.length === 3 ? `${step.axes[1]} ${Math.floor(c / inner)}, ${letter} ${c % inner}` : `${letter} ${c}`);
  return { ...base, columns: Math.max(width, 1), value: (r, c) => array.values[r * width + c], columnName };
}

// Rows of the tokens that both have: another token may have picked an expert.
function differenceOf(a, b) {
  const [inA, inB] = [a, b].map((map) => new Map(map.tokens.map((t, r) => [t, r])));
  const tokens = a.tokens.filter((t) => inB.has(t));
  const value = (r, c) => {
    const [x, y] = [a.value(inA.get(tokens[r]), c), b.value(inB.get(tokens[r]), c)];
    return Object.is(x, y) ? 0 : y - x;
  };
  const rows = tokens.map((t) => a.rows[inA.get(t)]);
  const picked = a.picked && tokens.includes(state.token) ? [tokens.indexOf(state.token), a.picked[1]] : null;
  return { ...a, name: `${a.name}, B − A`, rows, tokens, picked, value, onpick: (r, c) => a.onpick(inA.get(tokens[r]), c) };
}

async function drawView(step, mine) {
  const shown = state.mode === "both" || state.mode === "diff" ? [0, 1] : [state.trace];
  const maps = [];
  for (const which of shown) {
    const same = steps[which].get(step.name);
    maps.push(same ? await mapOf(which, same) : null);
  }
  if (mine !== turn) return;
  const view = find("view");
  const pictures = state.mode === "diff" ? [maps[0] && maps[1] && differenceOf(maps[0], maps[1])] : maps;
  const scrolled = view.dataset.step === step.name ? [...view.querySelectorAll(".scroll")].map((each) => [each.scrollLeft, each.scrollTop]) : [];
  view.dataset.step = step.name;
  view.replaceChildren(...(step.axes.includes("S") ? [headButtons()] : []));
  drawnMap = null;
  pictures.forEach((map, i) => {
    if (shown.length > 1 && state.mode === "both") view.append(element("h3", { text: DATA.traces[shown[i]].label }));
    view.append(map && map.rows.length ? picture(map) : element("p", { class: "note", text: nothing(step) }));
  });
  view.append(...rowAsText(pictures[0]));
  view.querySelectorAll(".scroll").forEach((each, i) => each.scrollTo(...(scrolled[i] ?? [0, 0])));
  pictures.filter((map) => map && map.rows.length).forEach((map, i) => reveal(view.querySelectorAll(".scroll")[i], map));
}

// The chosen number is to be seen.
function reveal(area, { picked, size }) {
  if (!picked) return;
  const [, , left, cell, tall] = size;
  const [x, y] = [left + picked[1] * cell, picked[0] * tall];
  if (x < area.scrollLeft || x + cell > area.scrollLeft + area.clientWidth) area.scrollLeft = x - area.clientWidth / 2;
  if (y < area.scrollTop || y + tall > area.scrollTop + area.clientHeight) area.scrollTop = y - area.clientHeight / 2;
}

function nothing(step) {
  if (DATA.traces[1] && !(steps[0].has(step.name) && steps[1].has(step.name))) return `Not in ${steps[0].has(step.name) ? "B" : "A"}: no token picked this expert there.`;
  return state.mode === "diff" ? "A and B have no token in common here." : "None of this step's tokens was kept.";
}

function picture(map) {
  const drawn = heatMap(map, find("panel").clientWidth - 8);
  map.size = drawn.size;
  if (!drawnMap) drawnMap = { map, drawn };
  const made = element("div", { class: "picture" }, element("div", { class: "scroll" }, drawn.canvas), legend(drawn.shades));
  if (map.columns > MOST_COLUMNS) made.append(element("p", { class: "note", text: `${map.columns} columns; the first ${MOST_COLUMNS} are drawn.` }));
  return made;
}

function rowAsText(map) {
  const row = map ? map.rows.findIndex((label) => label.startsWith(`${state.token} `)) : -1;
  if (row < 0) return [];
  const shown = Math.min(map.columns, 64);
  const text = Array.from({ length: shown }, (_, c) => number(map.value(row, c))).join("  ");
  const more = map.columns > shown ? ` … (${map.columns - shown} more)` : "";
  const details = element("details", {}, element("summary", { text: `Row of token ${quoted(state.trace, state.token)} as text` }));
  details.append(element("p", { class: "text", text: text + more }));
  return [details];
}

function headButtons() {
  const { H, G } = DATA.config;
  const groupsOfHeads = Array.from({ length: G }, (_, g) => {
    const made = element("div", { role: "group", "aria-label": `query heads that read key/value head ${g}` }, `key/value head ${g}: `);
    for (let h = (g * H) / G; h < ((g + 1) * H) / G; h++) {
      const button = element("button", { onclick: () => go({ head: h }), "aria-pressed": String(h === state.head), "data-head": h, text: `head ${h}` });
      made.append(button);
    }
    return made;
  });
  return element("div", { class: "heads" }, ...groupsOfHeads);
}

async function drawOpened(step, mine) {
  const area = find("opened");
  const which = state.trace;
  if (state.cell === null) {
    area.replaceChildren(element("p", { class: "note", text: "Click a number in the picture to see what it is made of." }));
    return;
  }
  if (!step.rows.includes(state.token)) {
    area.replaceChildren(element("p", { class: "note", text: "The numbers of this token were not kept at this step." }));
    return;
  }
  const map = await mapOf(which, step);
  const found = await opened(which, step, state.token, state.cell, state.head);
  if (mine !== turn) return;
  const value = map.value(step.rows.indexOf(state.token), state.cell);
  const owner = state.mode === "both" || state.mode === "diff" ? `${which ? "B" : "A"}: ` : ""; // a click in A, B or B − A
  const title = element("h3", { text: `${owner}token ${quoted(which, state.token)}, ${map.columnName(state.cell)}: ${number(value)}` });
  if (typeof found === "string") {
    area.replaceChildren(title, element("p", { class: "note", text: found }));
    return;
  }
  const rows = found.terms.map(([text, term]) => [text, number(term)]);
  if (found.rest && found.rest[0]) rows.push([`${found.rest[0]} more`, number(found.rest[1])]);
  const shown = table(["what", "number"], [...rows, [found.rest ? "together" : "makes", number(found.total)]], [1]);
  shown.querySelector("tbody tr:last-child").classList.add("total");
  area.replaceChildren(title, element("p", { class: "note", text: step.formula }), shown);
}

// -- beside the panel ---------------------------------------------------------------------------------------------

async function drawLanes(mine) {
  const lanes = [];
  for (let layer = DATA.config.dense; layer < DATA.config.layers; layer++) lanes.push(await lane(layer));
  if (mine !== turn) return;
  const text = lanes.length ? `Experts of token ${quoted(state.trace, state.token)}, lit by weight.` : "This model has no router.";
  find("lanes").querySelector("div").replaceChildren(element("p", { class: "note", text }), ...lanes);
}

async function lane(layer) {
  const prefix = `layers.${layer}.mlp.`;
  const [picks, weights] = await Promise.all([rowOf(state.trace, `${prefix}expert_indices`, state.token), rowOf(state.trace, `${prefix}expert_weights`, state.token)]);
  const other = await otherPicks(prefix);
  const most = Math.max(...weights);
  const cells = Array.from({ length: DATA.config.E }, (_, e) => {
    const k = picks.indexOf(e);
    const title = k < 0 ? `expert ${e}: not picked` : `expert ${e}: weight ${number(weights[k])}`;
    const made = element("span", { class: k < 0 ? "cell" : "cell picked", title, "data-expert": e, text: String(e) });
    if (k >= 0) made.style.background = `rgba(var(--lit), ${0.15 + 0.55 * (weights[k] / most)})`;
    if (other && other.includes(e) !== k >= 0) made.classList.add("moved");
    return made;
  });
  const said = Array.from(picks, (e, k) => `expert ${e} with ${number(weights[k])}`).join(", ");
  const step = DATA.traces[state.trace].steps.findIndex((each) => each.name === `${prefix}expert_weights`);
  const button = element("button", { onclick: () => go({ step, cell: null }), "aria-label": `layer ${layer}: ${said}`, "data-layer": layer, text: `L ${layer}` });
  return element("div", { class: "lane" }, button, element("div", { class: "cells", "aria-hidden": "true" }, ...cells));
}

// The other trace's picks of the same token, where both have the same text up to it.
async function otherPicks(prefix) {
  const [a, b] = DATA.traces;
  if (!b) return null;
  for (let t = 0; t <= state.token; t++) if (a.ids[t] !== b.ids[t]) return null;
  const row = await rowOf(1 - state.trace, `${prefix}expert_indices`, state.token);
  return row && Array.from(row);
}

function slider(name, low, high, step, value) {
  const input = element("input", { type: "range", min: low, max: high, step, value, id: `slider-${name}` });
  input.addEventListener("input", () => {
    state[name] = Number(input.value);
    drawSliders(turn, true);
  });
  const titles = { K: "K", factor: "bias ×", scale: "scale" };
  return element("label", { for: `slider-${name}` }, titles[name], input, element("output", { text: String(value) }));
}

async function drawSliders(mine, keep = false) {
  const area = find("sliders");
  const { config } = DATA;
  if (config.dense >= config.layers) return area.replaceChildren();
  const here = layerOf(current().name);
  const layer = here !== null && here >= config.dense ? here : config.dense;
  const scores = Array.from(await rowOf(state.trace, `layers.${layer}.mlp.router_scores`, state.token));
  if (mine !== turn) return;
  const bias = DATA.traces[state.trace].bias[layer];
  const [K, scale] = [state.K ?? config.K, state.scale ?? config.scale];
  const now = route(scores, bias, { K, factor: state.factor, scale });
  const plain = route(scores, bias, { K: config.K, factor: 1, scale: config.scale });
  const order = Array.from(scores.keys()).sort((a, b) => now.biased[b] - now.biased[a] || a - b).slice(0, K + 3);
  const rows = order.map((e) => {
    const k = now.picks.indexOf(e);
    const was = plain.picks.indexOf(e);
    const mark = (k >= 0) === (was >= 0) ? "" : k >= 0 ? " in" : " out";
    return [`${e}${mark}`, number(scores[e]), number(state.factor * bias[e]), k >= 0 ? number(now.weights[k]) : "–"];
  });
  const result = table(["expert", "score", "bias", "weight"], rows, [1, 2, 3]);
  result.id = "routed-again";
  if (keep) {
    area.querySelector("table").replaceWith(result);
    for (const [name, value] of Object.entries({ K, factor: state.factor, scale })) area.querySelector(`#slider-${name} + output`).textContent = String(value);
    return;
  }
  area.replaceChildren(
    element("h2", { id: "sliders-title", text: `What if? Layer ${layer}, this token` }),
    element("p", { class: "note", text: "This layer only: the layers after it do not see the change." }),
    slider("K", 1, (config.E / config.groups) * config.open_groups, 1, K), slider("factor", 0, 3, 0.05, state.factor),
    slider("scale", 0, Math.max(5, 2 * config.scale), 0.1, scale), result,
    element("button", { onclick: () => go({ K: null, factor: 1, scale: null }), text: "as it was" }),
  );
}

function drawGuesses() {
  const { top, draft, tokens } = DATA.traces[state.trace];
  const list = (guesses) => table(["token", "probability", ""], guesses.slice(0, 6).map(([text, , p]) => [
    element("span", { class: "text", text }), p === "NaN" ? p : `${(100 * p).toFixed(1)} %`, element("span", { class: "bar", style: `width:${(p * 5 || 0).toFixed(2)}rem` }),
  ]), [1]);
  const parts = [element("p", { class: "note", text: `After token ${quoted(state.trace, state.token)}:` }), list(top[state.token])];
  if (draft) {
    const given = state.token + 1 < tokens.length ? "and the token after it" : "and the likeliest next token";
    parts.push(element("p", { class: "note", text: `Two on: the MTP layer's draft, from here ${given}:` }), list(draft[state.token]));
  } else parts.push(element("p", { class: "note", text: "No MTP layer, or no room for one more token: no draft." }));
  find("guesses").querySelector("div").replaceChildren(...parts);
}

// -- everything ---------------------------------------------------------------------------------------------------

async function draw() {
  const mine = ++turn;
  refocus = focused() || refocus;
  const step = current();
  document.title = `${step.name}: ${DATA.model}`;
  find("count").textContent = `${state.step + 1} of ${DATA.traces[state.trace].steps.length}`;
  drawTokens();
  drawSteps();
  drawFacts(step);
  drawGuesses();
  for (const button of find("compare").children) button.setAttribute("aria-pressed", String(button.dataset.mode === state.mode));
  await drawView(step, mine);
  await Promise.all([drawOpened(step, mine), drawLanes(mine), drawSliders(mine)]);
  if (mine === turn) {
    document.querySelectorAll('nav [aria-current="true"]').forEach((button) => button.scrollIntoView({ block: "nearest" }));
    if (document.activeElement === document.body && refocus) document.querySelector(refocus)?.focus({ preventScroll: true });
    refocus = "";
    document.body.dataset.drawn = String(mine);
  }
}

function focused() {
  const at = document.activeElement;
  const name = ["data-token", "data-step", "data-head", "data-layer"].find((each) => at.hasAttribute(each));
  if (name) return `[${name}="${at.getAttribute(name)}"]`;
  return at.tagName === "CANVAS" ? "#view canvas" : at.id ? `#${at.id}` : at.closest("#sliders") ? "#sliders button" : "";
}

function onKey(event) {
  const typed = event.altKey && ["[", "]", "?"].includes(event.key); // with AltGr or Option on many keyboards
  if (((event.ctrlKey || event.metaKey || event.altKey) && !typed) || event.target.matches("input, textarea") || find("keys").open) return;
  const onPicture = event.shiftKey && { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0] }[event.key];
  const plain = {
    ArrowLeft: () => move(-1), ArrowRight: () => move(1), ArrowUp: () => go({ token: state.token - 1 }),
    ArrowDown: () => go({ token: state.token + 1 }), "[": () => moveLayer(-1), "]": () => moveLayer(1), "?": () => find("keys").showModal(),
  };
  if (onPicture) moveCell(...onPicture);
  else if (plain[event.key] && !(event.shiftKey && event.key.startsWith("Arrow"))) plain[event.key]();
  else return;
  event.preventDefault();
}

function moveCell(rows, columns) {
  const list = current().rows;
  const row = Math.min(Math.max(list.indexOf(state.token) + rows, 0), list.length - 1);
  const cell = Math.max((state.cell ?? -1) + columns, 0);
  go({ token: list[row], cell });
}

function toggle(name) {
  const on = document.documentElement.classList.toggle(name);
  find(name).setAttribute("aria-pressed", String(on));
  draw();
}

function fileName() {
  const head = current().axes.includes("S") ? `.head-${state.head}` : "";
  const of = { a: "", b: ".B", both: `.${steps[0].has(current().name) ? "A" : "B"}`, diff: ".B-A" }[state.mode];
  return `${current().name}${head}${of}`;
}

function start() {
  if (typeof DecompressionStream === "undefined") {
    find("what").textContent = "This browser is too old for the page: it has no DecompressionStream.";
    return;
  }
  find("back").onclick = () => move(-1);
  find("on").onclick = () => move(1);
  find("large").onclick = () => toggle("large");
  find("dark").onclick = () => toggle("dark");
  find("help").onclick = () => find("keys").showModal();
  find("svg").onclick = () => drawnMap && download(`${fileName()}.svg`, "image/svg+xml", asSvg(drawnMap.drawn, drawnMap.map));
  find("csv").onclick = () => drawnMap && download(`${fileName()}.csv`, "text/csv", asCsv(drawnMap.map));
  const link = (text) => (find("link").textContent = text);
  find("link").onclick = () => navigator.clipboard?.writeText(location.href).then(() => link("copied"), () => link("copy it from the address bar"));
  find("link").onblur = () => link("Copy link");
  find("compare").append(...MODES.map(([mode, text]) => element("button", { "data-mode": mode, onclick: () => choose(mode), text })));
  const prompts = DATA.traces.map((trace) => `${trace.label}: ${JSON.stringify(trace.prompt)}`);
  find("notes").append(...[DATA.about, ...prompts, ...DATA.notes, `Made by minglm ${DATA.version}; nothing is loaded from elsewhere.`].map((text) => element("p", { text })));
  if (matchMedia("(prefers-color-scheme: dark)").matches) toggle("dark");
  document.addEventListener("keydown", onKey);
  // "#panel", of the link to skip the lists, is no place
  window.addEventListener("hashchange", () => location.hash.includes("=") && location.hash !== place() && goToPlace(location.hash));
  window.addEventListener("resize", () => draw());
  goToPlace(location.hash || "#");
}

start();
