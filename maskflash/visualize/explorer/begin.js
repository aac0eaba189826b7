// The page: chooses a batch row and head, fits the picture to the window, and begins. Last of the scripts.
"use strict";

const PAPER = 580; // pixels that a printed picture may be wide

function choose() {
  view.b = Number($("batch").value || 0);
  view.h = Number($("head").value || 0);
  work = measure();
  measureScores();
  const full = work.rows.full.reduce((sum, tiles) => sum + tiles, 0), seen = work.rows.total;
  const several = batch * heads > 1 ? `batch row ${view.b}, head ${view.h}: ` : "";
  $("drawn").textContent =
    `${several}${number(full)} full, ${number(seen - full)} partial, ${number(nQ * nKV - seen)} skip`;
  say();
  ready();
}

function resize(room = $("keys").clientWidth) {
  dpr = window.devicePixelRatio || 1;
  const ratio = clamp(Math.max(qLen, 1) / Math.max(kvLen, 1), 1 / 8, 8);
  width = Math.max(1, Math.min(room, 0.75 * window.innerHeight / ratio));
  height = width * ratio;
  map.style.width = `${width}px`;
  map.style.height = `${height}px`;
  for (const canvas of [map, histogram]) {
    canvas.width = Math.max(1, Math.round(canvas.clientWidth * dpr));
    canvas.height = Math.max(1, Math.round(canvas.clientHeight * dpr));
  }
  redraw();
}

function begin() {
  for (const [id, n] of [["batch", batch], ["head", heads]]) {
    for (let at = 0; at < n; at++) $(id).add(new Option(String(at), String(at)));
    $(`${id}-choice`).hidden = n <= 1;
  }
  $("decided").textContent = data.decided ?
    counted(data.decided, (name) => `by ${DECIDERS[name]}`) || "nothing to decide" : "not recorded in a block map";
  choose();
  resize();
  listenToMap();
  listenToControls();
  listenToHistogram();
  const screen = () => {
    colour(dark.matches ? data.dark : data.colours);
    resize();
  };
  window.addEventListener("resize", () => resize());
  dark.addEventListener("change", screen);
  window.addEventListener("afterprint", screen);
  window.addEventListener("beforeprint", () => {
    colour(data.colours);
    resize(PAPER);
    draw(); // now: no frame is drawn before it is printed
    drawHistogram();
  });
  document.body.dataset.ready = "true";
}

load().then(begin, (error) => {
  $("problem").textContent = `This browser can't unpack the map (${error}); it needs DecompressionStream.`;
});
