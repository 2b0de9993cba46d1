"use strict";
// Any number, opened as what it is made of: {terms: [[text, value]], rest: [count, value] or null, total}, or a sentence.
// The same formulas as minglm/look/why.py.

const MOST = 8;

function number(value) {
  if (value === null || value === undefined) return "";
  if (Number.isNaN(Number(value))) return "NaN";
  if (!Number.isFinite(value)) return value < 0 ? "−∞" : "∞";
  return String(Number(value.toPrecision(5))).replace("-", "−");
}

function sum(terms) {
  const size = (term) => (Number.isNaN(term[1]) ? Infinity : Math.abs(term[1]));
  const order = [...terms].sort((a, b) => size(b) - size(a) || 0);
  const rest = order.slice(MOST);
  const add = (list) => list.reduce((total, term) => total + term[1], 0);
  return { terms: order.slice(0, MOST), rest: [rest.length, add(rest)], total: add(terms) };
}

function dot(x, w, xName, wName, bias) {
  const terms = Array.from(x, (a, i) => [`${xName}[${i}] · ${wName}[${i}] = ${number(a)} · ${number(w[i])}`, a * w[i]]);
  if (bias !== undefined) terms.push(["bias", bias]);
  return sum(terms);
}

const last = (name) => name.split(".").pop();
const missing = (what) => `${what} is not in this page; minglm step opens it.`;
const sigmoid = (z) => 1 / (1 + Math.exp(-z));

const KINDS = {
  async linear(which, step, token, column) {
    const { x, w } = step.recipe;
    const weight = await weightOf(w[0]);
    if (!weight) return missing(w[0]);
    const row = await rowOf(which, x[0], token);
    if (!row) return missing(`the row of token ${token} of ${x[0]}`);
    const bias = w[1] && DATA.weights[w[1]] ? (await weightOf(w[1])).values[column] : undefined;
    return dot(row, matrixRow(weight, column), last(x[0]), `W[${column}]`, bias);
  },
  async norm(which, step, token, column) {
    const { x, w, eps } = step.recipe;
    const weight = await weightOf(w[0]);
    const whole = await rowOf(which, x[0], token);
    if (!weight || !whole) return missing(weight ? x[0] : w[0]);
    const width = weight.values.length; // a head's norm runs over its own entries
    const start = Math.floor(column / width) * width;
    const row = whole.subarray(start, start + width);
    const square = row.reduce((total, a) => total + a * a, 0) / width;
    const [value, gain] = [row[column - start], weight.values[column - start]];
    return {
      terms: [["x", value], ["mean of x²", square], ["eps", eps], ["weight", gain]],
      rest: null,
      total: (value / Math.sqrt(square + eps)) * gain,
    };
  },
  async same(which, step, token, column) {
    const value = (await rowOf(which, step.recipe.x[0], token))[column];
    return { terms: [["unchanged", value]], rest: null, total: value };
  },
  async embed(which, step, token, column) {
    const weight = await weightOf(step.recipe.w[0]);
    if (!weight) return missing(step.recipe.w[0]);
    const id = DATA.traces[which].ids[token];
    const value = matrixRow(weight, id)[column];
    return { terms: [[`row ${id} of the table, column ${column}`, value]], rest: null, total: value };
  },
  async add(which, step, token, column) {
    const terms = [];
    for (const name of step.recipe.x) terms.push([name, (await rowOf(which, name, token))[column]]);
    return sum(terms);
  },
  async swiglu(which, step, token, column) {
    const [gate, up] = await Promise.all(step.recipe.x.map((name) => rowOf(which, name, token)));
    const s = sigmoid(gate[column]);
    return {
      terms: [["gate", gate[column]], ["σ(gate)", s], ["up", up[column]]],
      rest: null,
      total: gate[column] * s * up[column],
    };
  },
  async sigmoid(which, step, token, column) {
    const row = await rowOf(which, step.recipe.x[0], token);
    if (!row) return missing(`the row of token ${token} of ${step.recipe.x[0]}`);
    const logit = row[column];
    return { terms: [["logit", logit]], rest: null, total: sigmoid(logit) };
  },
  async bias(which, step, token, column) {
    const score = (await rowOf(which, step.recipe.x[0], token))[column];
    const bias = DATA.traces[which].bias[layerOf(step.name)][column];
    const value = (await rowOf(which, step.name, token))[column];
    const terms = [["score", score], [`bias[${column}]`, bias]];
    if (value === -Infinity && DATA.config.groups > 1) return { terms: [...terms, ["its group is closed", value]], rest: null, total: value };
    return { terms, rest: null, total: score + bias };
  },
  async topk(which, step, token, column) {
    const biased = await rowOf(which, step.recipe.x[0], token);
    const order = Array.from(biased.keys()).sort((a, b) => biased[b] - biased[a] || a - b);
    const shown = order.slice(0, DATA.config.K + 1);
    const terms = shown.map((e, r) => [`${r < DATA.config.K ? `${r + 1}.` : "not picked:"} expert ${e}`, biased[e]]);
    return { terms, rest: null, total: order[column] };
  },
  async weights(which, step, token, column) {
    const [scores, picks] = await Promise.all(step.recipe.x.map((name) => rowOf(which, name, token)));
    const picked = Array.from(picks, (e) => scores[e]);
    const total = DATA.config.normalise ? picked.reduce((a, b) => a + b, 0) : 1;
    const terms = picked.map((s, k) => [`score of expert ${picks[k]}`, s]);
    terms.push([DATA.config.normalise ? "their sum" : "not normalised", total], ["scale", DATA.config.scale]);
    return { terms, rest: null, total: (picked[column] / total) * DATA.config.scale };
  },
  async tokens(which, step, token) {
    return { terms: [[`token ${token} has this expert among its picks`, token]], rest: null, total: token };
  },
  async routed(which, step, token, column) {
    const [weights, picks] = await Promise.all(step.recipe.x.map((name) => rowOf(which, name, token)));
    const prefix = step.name.slice(0, -"routed".length);
    const terms = [];
    for (let k = 0; k < picks.length; k++) {
      const answer = await rowOf(which, `${prefix}experts.${picks[k]}.out`, token);
      if (!answer) return missing(`expert ${picks[k]}'s answer`);
      terms.push([`w · E_${picks[k]} = ${number(weights[k])} · ${number(answer[column])}`, weights[k] * answer[column]]);
    }
    return sum(terms);
  },
  async rope(which, step, token, column) {
    const { x, half } = step.recipe;
    const row = await rowOf(which, x[0], token);
    if (!row) return missing(x[0]);
    const d = DATA.config.d;
    const [start, i] = [Math.floor(column / d) * d, column % d];
    if (i >= 2 * half) return { terms: [["not turned", row[column]]], rest: null, total: row[column] };
    const [cos, sin] = await Promise.all([unpack(DATA.traces[which].cos), unpack(DATA.traces[which].sin)]);
    const pair = i % half;
    const [c, s] = [matrixRow(cos, token)[pair], matrixRow(sin, token)[pair]];
    const [a, b] = [row[start + pair], row[start + pair + half]];
    return {
      terms: [[`a, entry ${pair}`, a], [`b, entry ${pair + half}`, b], [`cos φ, position ${token}`, c], ["sin φ", s]],
      rest: null,
      total: i < half ? a * c - b * s : b * c + a * s,
    };
  },
  async scores(which, step, token, key, head) {
    if (key > token) return { terms: [[`key ${key} comes after query ${token}: hidden`, -Infinity]], rest: null, total: -Infinity };
    const { d, H, G } = DATA.config;
    const [q, k] = [await rowOf(which, step.recipe.x[0], token), await rowOf(which, step.recipe.x[1], key)];
    if (!q || !k) return missing(q ? "the key" : "the query");
    const kv = Math.floor(head / (H / G));
    const root = Math.sqrt(d);
    const [query, keys] = [q.subarray(head * d, (head + 1) * d), k.subarray(kv * d, (kv + 1) * d)];
    const text = (j) => `q[${j}] · k[${j}] / √d = ${number(query[j])} · ${number(keys[j])} / ${number(root)}`;
    return sum(Array.from(query, (a, j) => [text(j), (a * keys[j]) / root]));
  },
  async softmax(which, step, token, key, head) {
    const row = await attentionRow(which, step.recipe.x[0], token, head);
    const most = Math.max(...row);
    const total = row.reduce((a, score) => a + Math.exp(score - most), 0);
    const own = Math.exp(row[key] - most);
    return {
      terms: [["score", row[key]], ["largest score", most], ["exp(score − largest)", own], ["sum of those over all keys", total]],
      rest: null,
      total: own / total,
    };
  },
  async mix(which, step, token, column) {
    const { d, H, G } = DATA.config;
    const head = Math.floor(column / d);
    const probs = await attentionRow(which, step.recipe.x[0], token, head);
    const kv = Math.floor(head / (H / G));
    const terms = [];
    for (let s = 0; s < probs.length; s++) {
      const values = await rowOf(which, step.recipe.x[1], s);
      if (!values && s <= token) return missing(`the value of token ${s}`);
      const value = values ? values[kv * d + (column % d)] : 0;
      if (s > token && Number.isFinite(value)) continue; // hidden; but 0 · NaN is NaN
      terms.push([`p[${s}] · v[${s}] = ${number(probs[s])} · ${number(value)}`, probs[s] * value]);
    }
    return sum(terms);
  },
};

// A query's row of scores or probabilities, for one head.
async function attentionRow(which, name, token, head) {
  const step = steps[which].get(name);
  const array = await arrayOf(which, name);
  const [, rows, keys] = array.shape;
  const at = (head * rows + step.rows.indexOf(token)) * keys;
  return array.values.subarray(at, at + keys);
}

function layerOf(name) {
  return name.startsWith("layers.") ? Number(name.split(".")[1]) : null;
}

async function opened(which, step, token, column, head) {
  return await KINDS[step.recipe.kind](which, step, token, column, head);
}
