// A tile, or a cell of several -> what is said of it.
"use strict";

// The cell that holds a tile: its place, its tiles and its tokens.
function cellOf({i, j}) {
  const side = sideOf(), row = Math.floor(i / side) * side, column = Math.floor(j / side) * side;
  const lastRow = Math.min(nQ, row + side), lastColumn = Math.min(nKV, column + side);
  return {
    side, row, column, lastRow, lastColumn,
    top: row * bq, bottom: Math.min(qLen, lastRow * bq),
    left: column * bkv, right: Math.min(kvLen, lastColumn * bkv),
  };
}

const span = (first, end) => `${number(first)} to ${number(end - 1)}`;
const counted = (counts, names = (name) => name) => Object.entries(counts)
  .filter(([, count]) => count)
  .map(([name, count]) => `${number(count)} ${names(name)}`)
  .join(", ");

function documentsIn(steps, length, low, high) {
  const found = new Set();
  for (const {value} of within(steps, length, low, high)) found.add(value < 0 ? "none" : number(value));
  const named = [...found];
  return named.length <= 4 ? named.join(", ") : `${named[0]}, … ${named[named.length - 1]} (${named.length})`;
}

function vectorIn(steps, low, high) {
  let least = Infinity, largest = -Infinity;
  for (const {start, stop, value, slope} of within(steps, kvLen, low, high)) {
    least = Math.min(least, value + slope * (Math.max(start, low) - start));
    largest = Math.max(largest, value + slope * (Math.min(stop, high) - 1 - start));
  }
  return least === largest ? number(least) : `${number(least)} to ${number(largest)}`;
}

function say() {
  if (!cursor) return;
  $("ask").hidden = true;
  $("tile").hidden = false;
  const cell = cellOf(cursor), {side, row, column} = cell;
  const kinds = {full: 0, partial: 0, skip: 0}, deciders = {};
  for (let i = row; i < cell.lastRow; i++) {
    for (let j = column; j < cell.lastColumn; j++) {
      kinds[KINDS[kindAt(i, j)]]++;
      const by = deciderAt(i, j);
      if (by) deciders[by] = (deciders[by] ?? 0) + 1;
    }
  }
  const area = (cell.lastRow - row) * (cell.lastColumn - column);
  const kind = kinds.full === area ? "full" : kinds.skip === area ? "skip" : "partial";
  $("place").textContent = side === 1 ? `row ${number(row)}, column ${number(column)} of tiles` :
    `rows ${span(row, cell.lastRow)}, columns ${span(column, cell.lastColumn)} of tiles`;
  $("kind").textContent = side === 1 || kind !== "partial" ? kind : `${kind}: ${counted(kinds)}`;
  $("rows").textContent = span(cell.top, cell.bottom);
  $("columns").textContent = span(cell.left, cell.right);
  const names = Object.keys(deciders);
  $("decider").textContent = !data.decided ? "not recorded in a block map" :
    names.length === 1 ? DECIDERS[names[0]] : counted(deciders, (name) => `by ${DECIDERS[name]}`);
  const seen = work.rows.seen.subarray(row, cell.lastRow), full = work.rows.full[row];
  $("row-work").textContent = side === 1 ?
    `${number(seen[0])} of ${number(nKV)} tiles visited: ${number(full)} full, ${number(seen[0] - full)} partial` :
    `${number(Math.min(...seen))} to ${number(Math.max(...seen))} of ${number(nKV)} tiles visited`;
  if ($("documents")) {
    $("documents").textContent = documents.map((layer) => `${layer.name}: queries ` +
      documentsIn(own(layer.rows, layer.shape), qLen, cell.top, cell.bottom) + "; keys " +
      documentsIn(own(layer.columns, layer.shape), kvLen, cell.left, cell.right)).join("; ");
  }
  if (scores) $("score").textContent = sayScore(cursor);
  for (const name of Object.keys(vectors ?? {})) {
    $(`vector-${name}`).textContent = vectorIn(own(vectors[name], data.vectors.shape), cell.left, cell.right);
  }
}
