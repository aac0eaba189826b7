// Runs -> the map on its canvas: cells, documents, vectors, axes.
"use strict";

const DEEPEST = 4; // tiles across the picture at the largest zoom
const FEWEST = 32; // pairs across it, where pairs are known
const PAIR = 3; // pixels of a pair, from which on those of partial tiles are drawn
const ROOM = 10; // pixels of a tile, from which on it is outlined and hatched
const LEAST_DOCUMENT = 14; // pixels; the lines of smaller ones would hide their tiles

const map = $("map"), context = map.getContext("2d");
const deepest = Math.max(8, nQ / DEEPEST, nKV / DEEPEST, data.pairs ? Math.max(qLen, kvLen) / FEWEST : 0);
let width = 1, height = 1, dpr = 1; // of the canvas, in pixels of the page

const scaleX = () => width * view.zoom / Math.max(kvLen, 1);
const scaleY = () => height * view.zoom / Math.max(qLen, 1);
const x = (column) => Math.round((column - view.left) * scaleX() * dpr);
const y = (row) => Math.round((row - view.top) * scaleY() * dpr);

// The least power of two of tiles that is a pixel or more.
function sideOf() {
  let side = 1;
  while (side < Math.max(nQ, nKV) && side * Math.min(bq * scaleY(), bkv * scaleX()) < 1) side *= 2;
  return side;
}

// Tiles seen, and full ones, of the cells top to bottom and left to right (half open).
function tally(side, top, bottom, left, right) {
  const across = right - left, stride = across + 2;
  const seen = new Int32Array((bottom - top) * stride), full = new Int32Array(seen.length);
  const begin = left * side, end = Math.min(nKV, right * side);
  for (let i = top * side; i < Math.min(nQ, bottom * side); i++) {
    const base = (Math.floor(i / side) - top) * stride;
    const stop = runs.offsets[line(i) + 1];
    let at = Math.max(runs.offsets[line(i)], last(runs.start, begin, runs.offsets[line(i)], stop));
    for (; at < stop && runs.start[at] < end; at++) {
      // From an end on, its own cell has side - rest tiles and each later one `side`: two steps of a running sum.
      for (let sign = 1; sign >= -1; sign -= 2) {
        const inside = clamp(sign > 0 ? runs.start[at] : runs.stop[at], begin, end) - begin;
        const cell = base + Math.floor(inside / side), rest = inside % side;
        seen[cell] += sign * (side - rest);
        seen[cell + 1] += sign * rest;
        if (runs.full[at]) {
          full[cell] += sign * (side - rest);
          full[cell + 1] += sign * rest;
        }
      }
    }
  }
  for (let base = 0; base < seen.length; base += stride) {
    for (let c = base + 1; c < base + across; c++) {
      seen[c] += seen[c - 1];
      full[c] += full[c - 1];
    }
  }
  return {seen, full, stride};
}

function kindOf(seen, full, side, i, j) {
  const area = Math.min(side, nQ - i * side) * Math.min(side, nKV - j * side);
  return full === area ? FULL : seen === 0 ? SKIP : PARTIAL;
}

// The cells that the picture shows, half open.
function shown(side) {
  const rows = side * bq, columns = side * bkv;
  return {
    top: Math.floor(view.top / rows),
    bottom: Math.min(Math.ceil(nQ / side), Math.ceil((view.top + qLen / view.zoom) / rows)),
    left: Math.floor(view.left / columns),
    right: Math.min(Math.ceil(nKV / side), Math.ceil((view.left + kvLen / view.zoom) / columns)),
  };
}

function hatched(ink) {
  const stroke = document.createElement("canvas");
  stroke.width = stroke.height = 8;
  const pen = stroke.getContext("2d");
  pen.strokeStyle = ink;
  pen.lineWidth = 1;
  for (const shift of [-8, 0, 8]) {
    pen.moveTo(shift - 1, 9);
    pen.lineTo(shift + 9, -1);
  }
  pen.stroke();
  return context.createPattern(stroke, "repeat");
}
let hatch = hatched(colours.hatch);

function colour(palette) {
  colours = palette;
  hatch = hatched(colours.hatch);
}

const pairsShown = () => pairs && Math.min(scaleX(), scaleY()) >= PAIR;

function draw() {
  context.setTransform(1, 0, 0, 1, 0, 0);
  context.fillStyle = colours.kinds[SKIP];
  context.fillRect(0, 0, map.width, map.height);
  if (nQ && nKV) drawCells();
  if ($("show-documents")?.checked) documents.forEach(drawDocuments);
  if ($("show-vectors")?.checked) Object.keys(vectors).forEach(drawVector);
  if (nQ && nKV && scoresShown()) drawNumbers();
  if (cursor) drawCursor();
  drawAxes();
  const right = view.left + kvLen / view.zoom, bottom = view.top + qLen / view.zoom;
  const side = sideOf();
  $("view").textContent = `queries ${number(Math.round(view.top))} to ${number(Math.round(bottom))}, ` +
    `keys ${number(Math.round(view.left))} to ${number(Math.round(right))}` +
    (side > 1 ? `; each cell is ${side} × ${side} tiles` : "") +
    (pairsShown() ? `; partial tiles show their pairs, visible ones as ${scoresShown() ? "their tile" : "full"}` : "");
  map.setAttribute("aria-label", `tiles of ${$("view").textContent}`);
}

function drawCells() {
  const side = sideOf(), {top, bottom, left, right} = shown(side);
  const {seen, full, stride} = tally(side, top, bottom, left, right);
  const room = side === 1 && Math.min(bq * scaleY(), bkv * scaleX()) >= ROOM;
  const edge = (cell, block, length) => Math.min(cell * side * block, length);
  const scored = scoresShown(), hatching = scored ? hatchOver : hatch;
  const apart = (j) => scored && j * side % data.scores.side === 0; // here another number begins
  for (let i = top; i < bottom; i++) {
    // A ragged last cell may be less than a pixel.
    const y1 = y(edge(i + 1, bq, qLen)), y0 = Math.min(y(edge(i, bq, qLen)), y1 - 1);
    let start = left, kind = SKIP;
    for (let j = left; j <= right; j++) {
      const at = (i - top) * stride + j - left;
      const next = j < right ? kindOf(seen[at], full[at], side, i, j) : -1;
      if (next === kind && !apart(j)) continue;
      if (kind > SKIP) {
        const fills = [scored ? colourOf(scoreOf("mean", i * side, start * side)) : colours.kinds[kind]];
        const x1 = x(edge(j, bkv, kvLen)), x0 = Math.min(x(edge(start, bkv, kvLen)), x1 - 1);
        if (kind === PARTIAL && room) fills.push(hatching);
        if (kind === PARTIAL && pairsShown()) drawPairs(i, start, j, scored ? fills[0] : colours.kinds[FULL]);
        else for (const fill of fills) {
          context.fillStyle = fill;
          context.fillRect(x0, y0, x1 - x0, y1 - y0);
        }
      }
      start = j;
      kind = next;
    }
  }
  if (!room) return;
  context.strokeStyle = colours.outline;
  context.lineWidth = 1;
  context.beginPath();
  for (let i = top; i <= bottom; i++) {
    context.moveTo(0, y(edge(i, bq, qLen)) + 0.5);
    context.lineTo(x(kvLen), y(edge(i, bq, qLen)) + 0.5);
  }
  for (let j = left; j <= right; j++) {
    context.moveTo(x(edge(j, bkv, kvLen)) + 0.5, 0);
    context.lineTo(x(edge(j, bkv, kvLen)) + 0.5, y(qLen));
  }
  context.stroke();
}

// The pairs of a row's partial tiles, first to stop (half open).
function drawPairs(row, first, stop, ink) {
  const left = Math.max(first * bkv, Math.floor(view.left));
  const right = Math.min(stop * bkv, kvLen, Math.ceil(view.left + kvLen / view.zoom));
  const top = Math.max(row * bq, Math.floor(view.top));
  const bottom = Math.min(row * bq + bq, qLen, Math.ceil(view.top + qLen / view.zoom));
  context.fillStyle = colours.kinds[SKIP];
  context.fillRect(x(left), y(top), x(right) - x(left), y(bottom) - y(top));
  context.fillStyle = ink;
  for (let q = top; q < bottom; q++) {
    const begin = pairs.offsets[unit(data.pairs.shape) * qLen + q];
    const end = pairs.offsets[unit(data.pairs.shape) * qLen + q + 1];
    let at = Math.max(begin, last(pairs.start, left, begin, end));
    for (; at < end && pairs.start[at] < right; at++) {
      const x0 = x(clamp(pairs.start[at], left, right)), x1 = x(clamp(pairs.stop[at], left, right));
      context.fillRect(x0, y(q), x1 - x0, y(q + 1) - y(q));
    }
  }
}

// Steps over the tokens low to high: {start, stop, value, slope}.
function* within({start, value, slope}, length, low, high) {
  for (let at = Math.max(0, last(start, low, 0, start.length)); at < start.length && start[at] < high; at++) {
    const stop = at + 1 < start.length ? start[at + 1] : length;
    yield {start: start[at], stop, value: value[at], slope: slope[at]};
  }
}

// A rectangle where queries and keys have the same document.
function drawDocuments(layer) {
  const columns = new Map();
  const right = view.left + kvLen / view.zoom, bottom = view.top + qLen / view.zoom;
  for (const keys of within(own(layer.columns, layer.shape), kvLen, view.left, right)) {
    if (keys.value < 0 || (keys.stop - keys.start) * scaleX() < LEAST_DOCUMENT) continue;
    if (!columns.has(keys.value)) columns.set(keys.value, []);
    columns.get(keys.value).push(keys);
  }
  context.beginPath();
  for (const queries of within(own(layer.rows, layer.shape), qLen, view.top, bottom)) {
    if ((queries.stop - queries.start) * scaleY() < LEAST_DOCUMENT) continue;
    for (const keys of columns.get(queries.value) ?? []) {
      const x0 = x(keys.start), y0 = y(queries.start);
      context.rect(x0 + 0.5, y0 + 0.5, x(keys.stop) - x0 - 1, y(queries.stop) - y0 - 1);
    }
  }
  lines(colours.document, [5, 3]);
}

// A vector's value at each column; where several share a pixel, from the least to the largest.
function drawVector(name) {
  let pixel = -1, low = 0, high = 0;
  const flush = () => {
    if (pixel >= 0) {
      context.moveTo(pixel + 0.5, low);
      context.lineTo(pixel + 0.5, Math.max(high, low + 1));
    }
    pixel = -1;
  };
  context.beginPath();
  const steps = own(vectors[name], data.vectors.shape);
  for (const {start, stop, value, slope} of within(steps, kvLen, view.left, view.left + kvLen / view.zoom)) {
    const x0 = x(start), x1 = x(stop), y0 = y(value), y1 = y(value + slope * (stop - start));
    if (x1 - x0 > 1) {
      flush();
      context.moveTo(x0, y0);
      context.lineTo(x1, y1);
      continue;
    }
    if (x0 !== pixel) {
      flush();
      pixel = x0;
      low = y0;
      high = y0;
    }
    low = Math.min(low, y0);
    high = Math.max(high, y1);
  }
  flush();
  lines(data.lines[name].colour, data.lines[name].dash);
}

// Stroke the path so that it is seen on every kind of tile.
function lines(colour, dash) {
  for (const [ink, wide, pattern] of [[colours.halo, 3.5, []], [colour, 1.7, dash]]) {
    context.strokeStyle = ink;
    context.lineWidth = wide * dpr;
    context.setLineDash(pattern.map((length) => length * dpr));
    context.stroke();
  }
  context.setLineDash([]);
}

function drawCursor() {
  const {top, left, bottom, right} = cellOf(cursor);
  context.beginPath();
  const x0 = x(left) - 1, y0 = y(top) - 1;
  context.rect(x0, y0, x(right) - x0 + 1, y(bottom) - y0 + 1);
  for (const [ink, wide] of [["#ffffff", 4], ["#000000", 2]]) {
    context.strokeStyle = ink;
    context.lineWidth = wide * dpr;
    context.stroke();
  }
}

// The least step of labels that is a tile doubled or halved and has so many tokens.
function stepOf(block, least) {
  let step = block;
  while (step < least) step *= 2;
  while (step % 2 === 0 && step / 2 >= least) step /= 2;
  return step;
}

function drawAxes() {
  const alike = bq === bkv && Math.abs(scaleX() / scaleY() - 1) < 0.05;
  const apart = {keys: 90 / scaleX(), queries: 50 / scaleY()}; // tokens between labels
  const axes = [["keys", view.left, kvLen, scaleX(), "left"], ["queries", view.top, qLen, scaleY(), "top"]];
  for (const [id, first, length, scale, edge] of axes) {
    const name = document.createElement("span");
    const labels = [];
    const step = stepOf(id === "keys" ? bkv : bq, alike ? Math.max(apart.keys, apart.queries) : apart[id]);
    for (let at = Math.ceil(first / step) * step; at < first + length / view.zoom; at += step) {
      const label = name.cloneNode();
      label.textContent = (at === 0 ? `${id === "keys" ? "key" : "query"} ` : "") + number(at);
      label.style[edge] = `${(at - first) * scale}px`;
      labels.push(label);
    }
    $(id).replaceChildren(...labels);
    const room = $(id).getBoundingClientRect();
    for (const label of labels) { // none reaches out of its axis
      const box = label.getBoundingClientRect();
      if (box.right > room.right + 1 || box.bottom > room.bottom + 1) label.remove();
    }
  }
}
