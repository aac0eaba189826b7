// What a score function adds -> colours on a scale, and numbers where they have room.
"use strict";

const NUMBER = {wide: 52, tall: 18, font: 12}; // pixels that a number needs, and of its letters
const hatchOver = hatched("rgba(255, 255, 255, 0.65)");
const scale = data.scale.map((text) => [1, 3, 5].map((at) => parseInt(text.slice(at, at + 2), 16)));
const scoresShown = () => Boolean(scores) && $("show-scores").checked;
let low = 0, high = 0; // of the means of the batch row and head that are drawn
const short = (value) => value.toLocaleString("en-US", {maximumSignificantDigits: 3});

// A number of the square that holds a tile: "mean", "least" or "largest"; NaN where no visible pair was looked at.
function scoreOf(name, i, j) {
  const {side, across, shape} = data.scores;
  return own(scores[name], shape)[Math.floor(i / side) * across + Math.floor(j / side)];
}

function measureScores() {
  if (!scores) return;
  const known = own(scores.mean, data.scores.shape).filter(Number.isFinite);
  low = known.length ? known.reduce((x, y) => Math.min(x, y)) : 0;
  high = known.length ? known.reduce((x, y) => Math.max(x, y)) : 0;
  $("low").textContent = short(low);
  $("high").textContent = short(high);
}

const placeOf = (value) => high > low ? (value - low) / (high - low) : 0.5; // on the scale, 0 to 1

function colourOf(value) {
  if (!Number.isFinite(value)) return data.unknown;
  const place = placeOf(value) * (scale.length - 1);
  const before = Math.min(Math.floor(place), scale.length - 2), part = place - before;
  return `rgb(${scale[before].map((x, i) => Math.round(x + part * (scale[before + 1][i] - x))).join(", ")})`;
}

// The mean of each square that has room for it, in the middle of what is seen of the square.
function drawNumbers() {
  const {side} = data.scores, [tall, wide] = [side * bq, side * bkv];
  const bottom = Math.min(qLen, view.top + qLen / view.zoom), right = Math.min(kvLen, view.left + kvLen / view.zoom);
  context.font = `${NUMBER.font * dpr}px system-ui, sans-serif`;
  context.textAlign = "center";
  context.textBaseline = "middle";
  context.lineWidth = 3 * dpr;
  context.lineJoin = "round";
  for (let top = Math.floor(view.top / tall) * tall; top < bottom; top += tall) {
    for (let left = Math.floor(view.left / wide) * wide; left < right; left += wide) {
      const value = scoreOf("mean", top / bq, left / bkv);
      const y0 = y(Math.max(top, view.top)), y1 = y(Math.min(top + tall, bottom));
      const x0 = x(Math.max(left, view.left)), x1 = x(Math.min(left + wide, right));
      if (!Number.isFinite(value) || x1 - x0 < NUMBER.wide * dpr || y1 - y0 < NUMBER.tall * dpr) continue;
      context.strokeStyle = colourOf(value);
      context.fillStyle = placeOf(value) < 0.45 ? "#ffffff" : "#000000";
      context.strokeText(short(value), (x0 + x1) / 2, (y0 + y1) / 2);
      context.fillText(short(value), (x0 + x1) / 2, (y0 + y1) / 2);
    }
  }
}

// What is said of the square that holds a tile.
function sayScore({i, j}) {
  const [mean, least, largest] = ["mean", "least", "largest"].map((name) => scoreOf(name, i, j));
  const {side} = data.scores;
  const whole = side > 1 ? `, in the square of ${side} × ${side} tiles around it` : "";
  return Number.isFinite(mean) ? `mean ${short(mean)}, from ${short(least)} to ${short(largest)}${whole}` :
    `no number: no pair that was looked at is visible${whole}`;
}

function showScores() {
  document.body.toggleAttribute("data-scores", scoresShown());
  redraw();
}
