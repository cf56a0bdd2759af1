"use strict";
(() => {
const { runs, references, top } = JSON.parse(document.getElementById("data").textContent);
const byId = (id) => document.getElementById(id);
const TITLES = {
  loss: "Loss (nats per token)", lr: "Learning rate", grad_norm: "Gradient norm", tokens_per_s: "Tokens per second",
  data_wait: "Data wait (share of the time)",
};
const AXES = { step: "steps", tokens: "tokens", hours: "hours", flops: "FLOPs" };
const SMOOTHED = ["loss", "grad_norm", "tokens_per_s", "data_wait"];
const SMOOTHING_MOST = 0.1; // of the run's steps, at the end of the slider
const UNITS = [[1e18, "E"], [1e15, "P"], [1e12, "T"], [1e9, "G"], [1e6, "M"], [1e3, "k"]];

const shown = new Set(runs.keys());
let charts = [], zoom = null, range = [0, 1], colors = {};

// ---- numbers ----

function short(value) {
  if (value == null) return "–";
  const [unit, letter] = UNITS.find(([unit]) => Math.abs(value) >= unit) || [1, ""];
  return `${+(value / unit).toPrecision(4)}${letter}`;
}

function plain(value) {
  if (value == null) return "–";
  return Math.abs(value) >= 1e4 ? short(value) : value !== 0 && Math.abs(value) < 1e-3 ? value.toExponential(2) : `${+value.toPrecision(5)}`;
}

const axisValue = (value) => value == null ? "–" : byId("axis").value === "step" ? Math.round(value).toLocaleString("en") : short(value);

// Exponential moving average over steps, not rows, of which a reduced run has more where it is rough;
// divided by the weights so far, so that it begins at the first value.
function smooth(steps, values, over) {
  let sum = 0, weight = 0, before = steps[0];
  return values.map((value, i) => {
    if (value == null) return null;
    const keep = i ? Math.exp((before - steps[i]) / over) : 0;
    before = steps[i];
    sum = keep * sum + (1 - keep) * value;
    weight = keep * weight + (1 - keep);
    return sum / weight;
  });
}

const smoothingSteps = () => {
  const last = Math.max(...runs.map((run) => run.axes.step.at(-1) ?? 0));
  return (byId("smoothing").value / 100) ** 2 * SMOOTHING_MOST * last;
};

// ---- panels ----

// A panel's curves: [label, colour, table of x and y, look of the line].
function curves(panel) {
  const axis = byId("axis").value, over = smoothingSteps(), found = [];
  runs.forEach((run, number) => {
    if (!shown.has(number)) return;
    const add = (suffix, source, values, look) => {
      const xs = source.axes[axis];
      if (xs && values) found.push([run.label + suffix, run.color, measured(xs, values, look.sparse), look]);
    };
    if (panel.evals) return add("", run.evals, run.evals.columns[panel.name], { width: 2, sparse: true });
    const values = run.columns[panel.name];
    if (values && over && SMOOTHED.includes(panel.name)) {
      add(" raw", run, values, { width: 1, alpha: 0.35, class: "raw" });
      add("", run, smooth(run.axes.step, run.means[panel.name] || values, over), { width: 2 });
    } else add("", run, values, { width: 1.5 });
    if (panel.name === "loss") add(" val", run, run.columns.val_loss, { width: 1.5, sparse: true, dash: [6, 3] });
  });
  return found;
}

// Without the rows that have no value, where most have none; a logarithm has no place for 0.
function measured(xs, values, sparse) {
  const ys = isLog() ? values.map((y) => (y > 0 ? y : null)) : values;
  return sparse ? [xs.filter((x, i) => ys[i] != null), ys.filter((y) => y != null)] : [xs, ys];
}

const isLog = () => byId("scale").value === "log";

function draw(panel) {
  const found = curves(panel), logarithmic = isLog() && panel.name !== "data_wait";
  const axis = { stroke: colors.muted, grid: { stroke: colors.line, width: 1 }, ticks: { show: false } };
  const options = {
    width: panel.element.clientWidth || 300,
    height: panel.name === "loss" ? 340 : 190,
    padding: [8, 36, 0, 0],
    scales: { x: { time: false, range: () => range }, y: logarithmic ? { distr: 3, range: logRange } : { range: panel.name === "loss" ? lossRange : linearRange } },
    axes: [
      { ...axis, values: (u, ticks) => ticks.map(axisValue), space: 70, size: 30 },
      { ...axis, values: (u, ticks) => ticks.map(plain), size: 52, ...(logarithmic && { splits: logTicks, filter: (u, ticks) => ticks }) },
    ],
    series: [
      { label: AXES[byId("axis").value], value: (u, value) => axisValue(value) },
      ...found.map(([label, stroke, , look]) => ({
        label, stroke, width: look.width, alpha: look.alpha ?? 1, dash: look.dash, class: look.class,
        points: { show: look.sparse ? isRoomy : false, size: 5, fill: stroke },
        value: (u, value) => plain(value),
      })),
    ],
    cursor: {
      y: false,
      points: { size: (u, number) => (u.series[number].class ? 0 : 7) },
      sync: { key: "report", scales: ["x", null] },
      dataIdx: nearest,
      drag: { x: true, y: false, setScale: false },
      bind: { dblclick: () => () => zoomTo(null) },
    },
    legend: { markers: { fill: (u, number) => u.series[number].stroke() } },
    hooks: { setSelect: [zoomToSelected], draw: [(u) => marks(u, panel)] },
  };
  const data = found.length ? uPlot.join(found.map(([, , table]) => table)) : [[]];
  const chart = new uPlot(options, data, panel.element);
  touch(chart);
  return chart;
}

const linearRange = (u, low, high) => (low == null ? [0, 1] : uPlot.rangeNum(low, high, 0.1, true));
const logRange = (u, low, high) => (low > 0 ? [low / 1.03, high * 1.03] : [1, 10]);
// Unless somebody looks at them, the first steps do not flatten all others.
const lossRange = (u, low, high) => linearRange(u, low, zoom || low > top ? high : Math.min(high, top));

// Whether a curve's values are far enough apart for a dot each.
function isRoomy(u, number, first, last) {
  let count = 0;
  for (let row = first; row <= last; row++) count += u.data[number][row] != null;
  return count * 12 < u.over.clientWidth;
}

// The row nearest to the cursor in which this curve has a value.
function nearest(u, series, row) {
  const values = u.data[series];
  for (let d = 0; d < values.length; d++) {
    if (values[row - d] != null) return row - d;
    if (values[row + d] != null) return row + d;
  }
  return row;
}

// Round values: of powers of ten where there are several, else evenly spaced.
function logTicks(u, axis, low, high) {
  const ticks = [];
  if (high / low > 20) {
    for (let power = 10 ** Math.floor(Math.log10(low)); power <= high; power *= 10)
      ticks.push(...(high / low > 1e4 ? [1] : [1, 2, 5]).map((times) => times * power));
  } else {
    const rough = (high - low) / 6, power = 10 ** Math.floor(Math.log10(rough));
    const step = power * [1, 2, 5, 10].find((times) => times * power >= rough);
    for (let n = Math.ceil(low / step); n * step <= high; n++) ticks.push(n * step);
  }
  return ticks.filter((tick) => tick >= low && tick <= high);
}

// Restarts in every panel; in the loss also saves, skipped steps and the reference lines.
function marks(u, panel) {
  const { ctx, bbox: { left, top, width, height } } = u, px = devicePixelRatio, bottom = top + height;
  const line = (x0, y0, x1, y1) => { ctx.beginPath(); ctx.moveTo(x0, y0); ctx.lineTo(x1, y1); ctx.stroke(); };
  ctx.save();
  ctx.beginPath();
  ctx.rect(left, top, width, height);
  ctx.clip();
  ctx.lineWidth = px;
  for (const number of shown) {
    const run = runs[number];
    for (const [kind, positions] of Object.entries(run.marks)) {
      if (kind !== "restart" && panel.name !== "loss") continue;
      ctx.strokeStyle = run.color;
      ctx.setLineDash(kind === "restart" ? [3 * px, 3 * px] : []);
      for (const at of positions[byId("axis").value] || []) {
        const x = u.valToPos(at, "x", true), half = 4 * px, y = top + 8 * px;
        if (kind === "restart") line(x, top, x, bottom);
        else if (kind === "save") line(x, bottom - 8 * px, x, bottom);
        else { line(x - half, y - half, x + half, y + half); line(x - half, y + half, x + half, y - half); }
      }
    }
  }
  ctx.fillStyle = colors.muted;
  ctx.lineJoin = "round";
  ctx.font = `${12 * px}px system-ui, sans-serif`;
  ctx.textAlign = "right";
  ctx.textBaseline = "bottom";
  for (const [title, value] of Object.entries(panel.name === "loss" ? references : {})) {
    const y = u.valToPos(value, "y", true);
    ctx.strokeStyle = colors.muted;
    ctx.lineWidth = px;
    ctx.setLineDash([6 * px, 4 * px]);
    line(left, y, left + width, y);
    ctx.setLineDash([]);
    ctx.strokeStyle = colors.page; // around the letters, for a curve may pass below them
    ctx.lineWidth = 4 * px;
    for (const paint of ["strokeText", "fillText"]) ctx[paint](`${title} ${value.toFixed(3)}`, left + width - 4 * px, y - 2 * px);
  }
  ctx.restore();
}

// ---- zoom ----

// All panels show the same part of the axis; null is everything.
function zoomTo(part) {
  zoom = part;
  const axis = byId("axis").value;
  const ends = [...shown].map((n) => Math.max(runs[n].axes[axis]?.at(-1) ?? 0, runs[n].evals.axes[axis]?.at(-1) ?? 0));
  range = part || [0, Math.max(...ends) || 1];
  for (const chart of charts) chart.setScale("x", { min: range[0], max: range[1] });
}

function zoomToSelected(u) {
  const { left, width } = u.select;
  if (width > 0) zoomTo([u.posToVal(left, "x"), u.posToVal(left + width, "x")]);
  u.setSelect({ left: 0, width: 0 }, false);
}

// One finger reads values, two zoom: the values under them stay under them.
function touch(u) {
  const fingers = (event) => [...event.touches].map((finger) => finger.clientX - u.over.getBoundingClientRect().left);
  let held = null;
  u.over.addEventListener("touchstart", (event) => {
    held = event.touches.length === 2 ? fingers(event).map((x) => u.posToVal(x, "x")) : null;
  }, { passive: true });
  u.over.addEventListener("touchmove", (event) => {
    const [x, other] = fingers(event);
    if (held && other != null && other !== x) {
      const perPixel = (held[1] - held[0]) / (other - x), min = held[0] - x * perPixel;
      if (perPixel > 0) zoomTo([min, min + perPixel * u.over.clientWidth]);
    } else if (!held) u.setCursor({ left: x, top: 10 }, true, true);
  }, { passive: true });
}

// ---- the page ----

function redraw() {
  byId("window").textContent = smoothingSteps() ? `${short(Math.max(1, Math.round(smoothingSteps())))} steps` : "off";
  const style = getComputedStyle(document.documentElement); // asked once: each question lays the page out
  for (const name of ["muted", "line", "page"]) colors[name] = style.getPropertyValue(`--${name}`);
  charts.forEach((chart) => chart.destroy());
  charts = [];
  zoomTo(zoom); // the runs that are shown, and so the ends of the axis, may be others
  charts = window.charts = panels.map(draw);
}

function newPanel(name, title, evals) {
  const element = document.createElement("div"), heading = document.createElement("h3");
  element.className = "panel";
  heading.textContent = title;
  element.append(heading);
  byId("panels").append(element);
  return { name, element, evals };
}

const has = (name) => runs.some((run) => run.columns[name]);
const evaluated = [...new Set(runs.flatMap((run) => Object.keys(run.evals.columns)))];
const panels = [
  ...Object.keys(TITLES).filter(has).map((name) => newPanel(name, TITLES[name], false)),
  ...evaluated.map((name) => newPanel(name, `Evaluation: ${name}`, true)),
];

for (const [name, title] of Object.entries(AXES))
  if (runs.some((run) => run.axes[name])) byId("axis").add(new Option(title, name));
runs.forEach((run, number) => {
  const label = document.createElement("label"), box = document.createElement("input"), swatch = document.createElement("span");
  const name = document.createElement("bdi");
  box.type = "checkbox";
  box.checked = true;
  swatch.style.background = run.color;
  name.textContent = run.label;
  label.append(box, swatch, name);
  box.addEventListener("change", () => { shown[box.checked ? "add" : "delete"](number); redraw(); });
  byId("runs").append(label);
});
byId("axis").addEventListener("change", () => { zoom = null; redraw(); });
byId("scale").addEventListener("change", redraw);
byId("smoothing").addEventListener("input", redraw);
byId("reset").addEventListener("click", () => zoomTo(null));
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", redraw);
new ResizeObserver(() => charts.forEach((chart, i) => {
  if (chart.width !== panels[i].element.clientWidth) chart.setSize({ width: panels[i].element.clientWidth, height: chart.height });
})).observe(byId("panels"));

if (panels.length) {
  redraw();
  byId("controls").hidden = byId("key").hidden = false;
  document.documentElement.classList.add("js"); // last: should the above fail, the figure stays
}
})();
