// Work of rows or columns of tiles -> the histogram, and what is said of a bar.
"use strict";

const histogram = $("histogram"), pen = histogram.getContext("2d");
let bar = 0; // the line of tiles, by its place in the order, that is asked about

const side = () => work[$("side").value];
const order = () => side()[$("order").value];
const linesPerBar = () => Math.max(1, Math.ceil(order().length / Math.max(1, histogram.clientWidth)));

// The line with most work of those that share a bar.
function heaviest(first) {
  const {seen} = side(), lines = order().slice(first, first + linesPerBar());
  return lines.reduce((best, i) => (seen[i] > seen[best] ? i : best), lines[0]);
}

function drawHistogram() {
  const {seen, full, total} = side(), n = seen.length, per = linesPerBar();
  const wide = histogram.width, tall = histogram.height, most = seen.reduce((a, b) => Math.max(a, b), 0);
  pen.fillStyle = colours.paper;
  pen.fillRect(0, 0, wide, tall);
  const at = (place) => Math.round(place * wide / n);
  const up = (tiles) => Math.round(tiles * (tall - 4) / Math.max(1, most));
  const marked = cursor ? ($("side").value === "rows" ? cursor.i : cursor.j) : -1;
  for (let first = 0; first < n; first += per) {
    const i = heaviest(first), x0 = at(first), x1 = Math.max(x0 + 1, at(Math.min(n, first + per)));
    const gap = x1 - x0 > 4 ? 1 : 0;
    pen.fillStyle = colours.kinds[PARTIAL];
    pen.fillRect(x0, tall - up(seen[i]), x1 - x0 - gap, up(seen[i]));
    pen.fillStyle = colours.kinds[FULL];
    pen.fillRect(x0, tall - up(full[i]), x1 - x0 - gap, up(full[i]));
    if (order().slice(first, first + per).includes(marked)) {
      pen.fillStyle = colours.ink;
      pen.fillRect(x0, 0, Math.max(2, x1 - x0 - gap), 4 * dpr);
    }
  }
  const mean = total / Math.max(1, n), name = $("side").value;
  const visit = n === 1 ? `${name.slice(0, -1)} of tiles visits` : `${name} of tiles visit`;
  $("balance").textContent = `${number(n)} ${visit} ${number(total)}: mean ${mean.toFixed(1)}, ` +
    `most ${number(most)}` + (mean ? ` (${(most / mean).toFixed(2)} × the mean)` : "") +
    (per > 1 ? `; each bar is the largest of ${per} ${name}` : "");
  histogram.setAttribute("aria-label", `work: ${$("balance").textContent}`);
}

function sayBar(place) {
  const per = linesPerBar(), n = order().length;
  if (!n) return;
  bar = clamp(Math.floor(place / per) * per, 0, n - 1);
  const i = heaviest(bar), {seen, full, rank} = side(), rows = $("side").value === "rows";
  const [block, length] = rows ? [bq, qLen] : [bkv, kvLen];
  $("bar").textContent = `${rows ? "row" : "column"} ${number(i)} (${rows ? "queries" : "keys"} ` +
    `${span(i * block, Math.min(length, (i + 1) * block))}): ${number(seen[i])} tiles, ${number(full[i])} full, ` +
    `${number(seen[i] - full[i])} partial; launched as number ${number(rank[i] + 1)} of ${number(n)}`;
}

function ready() {
  bar = 0;
  $("bar").textContent = "Point at a bar, or walk with arrows; click or Enter shows it in the map.";
  redraw();
}

function showBar() {
  if (!order().length) return;
  const i = heaviest(bar);
  point($("side").value === "rows" ? {i, j: firstSeen(i)} : {i: cursor?.i ?? Math.min(i, nQ - 1), j: i}, true);
}

function firstSeen(i) {
  const at = runs.offsets[line(i)];
  return at < runs.offsets[line(i) + 1] ? runs.start[at] : 0;
}
