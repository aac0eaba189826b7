// Wheel, pointers, keys, buttons -> the part that is shown and the tile that is asked about.
"use strict";

let waiting = false;
function redraw() {
  if (waiting) return;
  waiting = true;
  requestAnimationFrame(() => {
    waiting = false;
    draw();
    drawHistogram();
  });
}

function move(left, top) {
  view.left = clamp(left, 0, kvLen - kvLen / view.zoom);
  view.top = clamp(top, 0, qLen - qLen / view.zoom);
  redraw();
}

// Zoom so that what lies at a point of the canvas stays there.
function zoom(factor, atX = width / 2, atY = height / 2) {
  const column = view.left + atX / scaleX(), row = view.top + atY / scaleY();
  view.zoom = clamp(view.zoom * factor, 1, deepest);
  move(column - atX / scaleX(), row - atY / scaleY());
  say();
}

function whole() {
  view.zoom = 1;
  move(0, 0);
  say();
}

// Ask about a tile; if it lies outside the picture, and that is wanted, bring it in.
function point(tile, follow) {
  if (!nQ || !nKV) return;
  cursor = {i: clamp(tile.i, 0, nQ - 1), j: clamp(tile.j, 0, nKV - 1)};
  if (follow) {
    const {top, bottom, left, right} = cellOf(cursor);
    const tall = qLen / view.zoom, wide = kvLen / view.zoom;
    move(
      left < view.left || right > view.left + wide ? (left + right - wide) / 2 : view.left,
      top < view.top || bottom > view.top + tall ? (top + bottom - tall) / 2 : view.top,
    );
  }
  say();
  redraw();
}

const place = (event) => {
  const box = map.getBoundingClientRect();
  return [event.clientX - box.left, event.clientY - box.top];
};
const pointers = new Map(); // fingers, or the mouse with a button down

const ask = (atX, atY) => point({
  i: Math.floor((view.top + atY / scaleY()) / bq),
  j: Math.floor((view.left + atX / scaleX()) / bkv),
}, false);

const ARROWS = {ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1]};

function listenToMap() {
  map.addEventListener("wheel", (event) => {
    event.preventDefault();
    const pixels = event.deltaY * [1, 16, 400][event.deltaMode];
    zoom(Math.exp(-0.002 * clamp(pixels, -600, 600)), ...place(event));
  }, {passive: false});

  map.addEventListener("pointerdown", (event) => {
    map.setPointerCapture(event.pointerId);
    pointers.set(event.pointerId, place(event));
    ask(...place(event));
  });
  for (const end of ["pointerup", "pointercancel"]) {
    map.addEventListener(end, (event) => pointers.delete(event.pointerId));
  }

  map.addEventListener("pointermove", (event) => {
    const [atX, atY] = place(event);
    const before = pointers.get(event.pointerId);
    if (before) {
      const other = [...pointers].find(([id]) => id !== event.pointerId)?.[1];
      pointers.set(event.pointerId, [atX, atY]);
      if (other) {
        const apart = ([ax, ay]) => Math.hypot(ax - other[0], ay - other[1]);
        zoom(apart([atX, atY]) / Math.max(1, apart(before)), (atX + other[0]) / 2, (atY + other[1]) / 2);
      } else {
        move(view.left - (atX - before[0]) / scaleX(), view.top - (atY - before[1]) / scaleY());
      }
    }
    ask(atX, atY);
  });

  map.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    const cell = cursor && cellOf(cursor);
    const middle = cell ? [
      ((cell.left + cell.right) / 2 - view.left) * scaleX(),
      ((cell.top + cell.bottom) / 2 - view.top) * scaleY(),
    ] : [];
    const arrow = ARROWS[event.key];
    if (arrow && event.shiftKey) {
      move(view.left + arrow[1] * kvLen / view.zoom / 8, view.top + arrow[0] * qLen / view.zoom / 8);
    } else if (arrow) {
      const first = {i: Math.floor(view.top / bq), j: Math.floor(view.left / bkv)};
      point(cell ? {i: cell.row + arrow[0] * cell.side, j: cell.column + arrow[1] * cell.side} : first, true);
    } else if (event.key === "+" || event.key === "=") {
      zoom(1.5, ...middle);
    } else if (event.key === "-") {
      zoom(1 / 1.5, ...middle);
    } else if (event.key === "0") {
      whole();
    } else if (event.key.toLowerCase() === "s" && scores) {
      $("show-scores").click();
    } else {
      return;
    }
    event.preventDefault();
  });
}

function listenToControls() {
  $("closer").addEventListener("click", () => zoom(1.5));
  $("farther").addEventListener("click", () => zoom(1 / 1.5));
  $("whole").addEventListener("click", whole);
  $("show-documents")?.addEventListener("change", redraw);
  $("show-vectors")?.addEventListener("change", redraw);
  $("show-scores")?.addEventListener("change", showScores);
  for (const id of ["side", "order"]) $(id).addEventListener("change", ready);
  for (const id of ["batch", "head"]) $(id).addEventListener("change", choose);
}

function listenToHistogram() {
  const placeOfBar = (event) =>
    Math.floor((event.clientX - histogram.getBoundingClientRect().left) / histogram.clientWidth * order().length);
  histogram.addEventListener("pointermove", (event) => sayBar(placeOfBar(event)));
  histogram.addEventListener("click", showBar);
  histogram.addEventListener("keydown", (event) => {
    const step = {ArrowLeft: -1, ArrowRight: 1}[event.key];
    if (step) sayBar(bar + step * linesPerBar());
    else if (event.key === "Enter") showBar();
    else return;
    event.preventDefault();
  });
}
