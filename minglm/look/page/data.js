"use strict";
// Arrays of the page: unpacked when they are first needed, one group (a layer of a trace, or of the weights) at a time.

const DATA = JSON.parse(document.getElementById("data").textContent);
for (const trace of DATA.traces) for (const layer of Object.keys(trace.bias)) trace.bias[layer] = trace.bias[layer].map(Number);
const groups = new Map();

async function inflate(id) {
  const text = document.getElementById(`group-${id}`).textContent;
  const raw = Uint8Array.from(atob(text), (c) => c.charCodeAt(0));
  const stream = new Blob([raw]).stream().pipeThrough(new DecompressionStream("deflate"));
  return await new Response(stream).arrayBuffer();
}

function group(id) {
  if (!groups.has(id)) groups.set(id, inflate(id));
  return groups.get(id);
}

// An array with its numbers, from what `Packer.add` returned.
async function unpack(packed) {
  const buffer = await group(packed.group);
  const size = packed.shape.reduce((a, b) => a * b, 1);
  if (packed.kind === "i4") return { shape: packed.shape, values: new Int32Array(buffer, packed.at, size) };
  if (packed.kind === "f4") return { shape: packed.shape, values: new Float32Array(buffer, packed.at, size) };
  const halves = new Uint16Array(buffer, packed.at, size); // bfloat16: the upper half of a float32
  const bits = new Uint32Array(size);
  for (let i = 0; i < size; i++) bits[i] = halves[i] << 16;
  return { shape: packed.shape, values: new Float32Array(bits.buffer) };
}

const steps = DATA.traces.map((trace) => new Map(trace.steps.map((step) => [step.name, step])));
const held = new Map();

// The array of a step: [token, …], or [head, query, key] for attention.
function arrayOf(which, name) {
  const key = `${which} ${name}`;
  const step = steps[which].get(name);
  if (!step) return null;
  if (!held.has(key)) held.set(key, unpack(step.data));
  return held.get(key);
}

function weightOf(name) {
  if (!DATA.weights[name]) return null;
  if (!held.has(name)) held.set(name, unpack(DATA.weights[name]));
  return held.get(name);
}

// Numbers of one row along the token axis, for a token; null if the page does not hold that row.
async function rowOf(which, name, token) {
  const step = steps[which].get(name);
  if (!step) return null;
  const row = step.rows.indexOf(token);
  if (row < 0) return null;
  const array = await arrayOf(which, name);
  const width = array.values.length / step.rows.length;
  return array.values.subarray(row * width, (row + 1) * width);
}

// Row `i` of a matrix [rows, columns].
function matrixRow(matrix, i) {
  const width = matrix.shape[1];
  return matrix.values.subarray(i * width, (i + 1) * width);
}
