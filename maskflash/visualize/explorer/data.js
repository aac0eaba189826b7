// The numbers of a page -> runs of tiles, and what they tell: kinds, who decided, work. First of the page's scripts.
//
//   data.runs        offsets, start, stop, full: analysis/runs.py's Runs of the map's rows, packed
//   data.pairs       likewise of each query's keys, and {shape: batch rows and heads of their own}; or null
//   data.decided     tiles by means: pairs, formula, intervals, ...; null where a map alone is known
//   data.evaluated   the tiles whose pairs were evaluated, packed as runs; or null
//   data.documents   [{name, shape, rows, columns}]: steps of document numbers over queries and keys
//   data.vectors     {shape, named: {lts: [steps], ...}}; or null
//   data.scores      what a score function adds, in squares of `side` x `side` tiles: {name, at, shape, side, across,
//                    samples, numbers: {mean: [one for each batch row and head], ...}}; or null
//   data.choices     batch rows and heads to choose from: of the map, or of the score function
//
// Packed numbers are differences in int32, deflated, in base64; of scores, of the bits of floats. Lines count through batch rows, heads and rows of
// tiles. A cell is a square of `side` x `side` tiles, one where there is room: full or skip if all its tiles are, else
// partial, as it would be as a tile.
"use strict";

const SKIP = 0, PARTIAL = 1, FULL = 2;
const KINDS = ["skip", "partial", "full"];

const $ = (id) => document.getElementById(id);
const data = JSON.parse($("data").textContent);
const [batch, heads] = data.choices;
const [, , nQ, nKV] = data.shape;
const [bq, bkv] = data.block_size;
const {q_len: qLen, kv_len: kvLen} = data;
const dark = window.matchMedia("screen and (prefers-color-scheme: dark)");
let colours = dark.matches ? data.dark : data.colours;
const number = (x) => x.toLocaleString("en-US");
const clamp = (x, low, high) => Math.max(low, Math.min(high, x));

let runs, pairs, evaluated, documents, vectors, scores; // of `data`, unpacked

async function unpack(text) {
  const bytes = Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0));
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("deflate"));
  const found = new Int32Array(await new Response(stream).arrayBuffer());
  for (let i = 1; i < found.length; i++) found[i] += found[i - 1];
  return found;
}

async function unpackAll(packed) {
  if (typeof packed === "string") return unpack(packed);
  const entries = await Promise.all(Object.entries(packed).map(async ([name, x]) => [name, await unpackAll(x)]));
  return Array.isArray(packed) ? entries.map(([, x]) => x) : Object.fromEntries(entries);
}

// Unpack everything; throws where the browser can't.
async function load() {
  const {shape: _, ...packed} = data.pairs ?? {};
  [runs, pairs, evaluated, documents, vectors, scores] = await Promise.all([
    unpackAll(data.runs),
    data.pairs && unpackAll(packed),
    data.evaluated && unpackAll(data.evaluated),
    Promise.all(data.documents.map(async ({name, shape, rows, columns}) =>
      ({name, shape, rows: await unpackAll(rows), columns: await unpackAll(columns)}))),
    data.vectors && unpackAll(data.vectors.named),
    data.scores && unpackAll(data.scores.numbers),
  ]);
  for (const name of Object.keys(scores ?? {})) scores[name] = scores[name].map((bits) => new Float32Array(bits.buffer));
}

const view = {b: 0, h: 0, left: 0, top: 0, zoom: 1};
let cursor = null; // the tile {i, j} that is asked about
let work = null; // of the batch row and head that are drawn
const line = (i) => unit(data.shape) * nQ + i;

// The last index of an ascending part of an array whose value is at most x; low - 1 where there is none.
function last(values, x, low, high) {
  while (low < high) {
    const middle = (low + high) >> 1;
    if (values[middle] <= x) low = middle + 1;
    else high = middle;
  }
  return low - 1;
}

function runAt(of, i, j) {
  const first = of.offsets[line(i)];
  const at = last(of.start, j, first, of.offsets[line(i) + 1]);
  return at >= first && j < of.stop[at] ? at : -1;
}

function kindAt(i, j) {
  const at = runAt(runs, i, j);
  return at < 0 ? SKIP : runs.full[at] ? FULL : PARTIAL;
}

// Bounds prove tiles full or skip and samples prove them partial, but for those whose pairs were all evaluated.
function deciderAt(i, j) {
  if (!data.decided) return null;
  for (const means of ["pairs", "formula", "intervals", "groups", "columns", "parts"]) if (data.decided[means]) return means;
  if (evaluated && runAt(evaluated, i, j) >= 0) return "elements";
  return kindAt(i, j) === PARTIAL ? "samples" : "bounds";
}

const DECIDERS = {
  pairs: "all pairs of the few rows",
  formula: "a formula",
  intervals: "the rows' intervals",
  groups: "groups of rows and columns",
  columns: "cutting columns",
  parts: "conditions one by one",
  bounds: "bounds",
  samples: "samples",
  elements: "all of its pairs",
};

// Tiles visited, and full ones among them, of each line of tiles in both directions.
function measure() {
  const made = {};
  for (const [name, n] of [["rows", nQ], ["columns", nKV]]) {
    made[name] = {seen: new Int32Array(n + 1), full: new Int32Array(n + 1)};
  }
  const {rows, columns} = made;
  for (let i = 0; i < nQ; i++) {
    for (let at = runs.offsets[line(i)]; at < runs.offsets[line(i) + 1]; at++) {
      const start = runs.start[at], stop = runs.stop[at];
      rows.seen[i] += stop - start;
      columns.seen[start]++;
      columns.seen[stop]--;
      if (runs.full[at]) {
        rows.full[i] += stop - start;
        columns.full[start]++;
        columns.full[stop]--;
      }
    }
  }
  for (let j = 1; j < nKV; j++) {
    columns.seen[j] += columns.seen[j - 1];
    columns.full[j] += columns.full[j - 1];
  }
  for (const [name, n] of [["rows", nQ], ["columns", nKV]]) {
    const own = made[name];
    own.seen = own.seen.subarray(0, n);
    own.full = own.full.subarray(0, n);
    own.total = own.seen.reduce((sum, x) => sum + x, 0);
    own.place = Array.from({length: n}, (_, i) => i);
    own.launch = [...own.place].sort((x, y) => own.seen[y] - own.seen[x]); // stable, as the kernels' order
    own.rank = new Int32Array(n);
    own.launch.forEach((i, rank) => { own.rank[i] = rank; });
  }
  return made;
}

// The place of a batch row and head among those of something that may serve several.
function unit([ownBatch, ownHeads]) {
  const b = ownBatch === 1 ? 0 : view.b;
  const h = Math.floor(view.h / Math.max(1, heads / ownHeads));
  return b * ownHeads + Math.min(h, ownHeads - 1);
}

const own = (several, shape) => several[unit(shape)];
