"use strict";
// Plots the charts of the page's data; what is chosen is kept while a page is watched.
const DATA = JSON.parse(document.getElementById("data").textContent);
const STORE = "lsgd-report " + document.title;
const view = Object.assign({ x: "steps", log: "auto", smooth: 0, means: false, hidden: [] }, restored());
const X_LABELS = { steps: "local steps", seconds: "seconds of training", megabytes: "MB sent per worker" };
const plots = [];

function restored() {
  try { return JSON.parse(sessionStorage.getItem(STORE)) || {}; } catch { return {}; }
}

function kept() {
  try { sessionStorage.setItem(STORE, JSON.stringify(view)); } catch { /* Not where there is no storage. */ }
}

function css(name) { return getComputedStyle(document.documentElement).getPropertyValue(name).trim(); }

function element(tag, attributes = {}, ...children) {
  const made = Object.assign(document.createElement(tag), attributes);
  made.append(...children);
  return made;
}

// Exponential moving average with the bias of its start removed; gaps stay gaps.
function smoothed(y) {
  let sum = 0, weight = 0;
  return y.map((value) => {
    if (value === null) return null;
    sum = view.smooth * sum + (1 - view.smooth) * value;
    weight = view.smooth * weight + (1 - view.smooth);
    return sum / weight;
  });
}

function isLogarithmic(chart, lines) {
  if (chart.linear) return false;
  const values = lines.flatMap((line) => line.y).filter((value) => value !== null);
  if (values.some((value) => value <= 0)) return false;
  if (view.log !== "auto") return view.log === "log";
  return values.length > 0 && Math.max(...values) > 3 * Math.min(...values);
}

// The range and the labels of a logarithmic axis: 1, 2 and 5 times powers of ten, or powers alone where these are many.
const ROUND = [1, 2, 5, 10];

function decade(value) { return 10 ** Math.floor(Math.log10(value) + 1e-9); }

function logarithmicRange(_, low, high) {
  if (!(low > 0 && high > 0)) return [1, 10];
  const below = ROUND.filter((each) => each * decade(low) <= low * (1 + 1e-9)).pop();
  const above = ROUND.find((each) => each * decade(high) >= high * (1 - 1e-9));
  return low === high ? [low / 2, high * 2] : [below * decade(low), above * decade(high)];
}

function logarithmicLabels(_, ticks) {
  const labeled = ticks.length && ticks[ticks.length - 1] / ticks[0] > 100 ? [1] : ROUND;
  return ticks.map((tick) => labeled.some((each) => Math.abs(tick / decade(tick) - each) < 1e-6) ? tick : null);
}

function shown(value) { return value === null || value === undefined ? "" : String(+value.toPrecision(5)); }

// One table for lines of differing x: uPlot wants a common one, with undefined where a line has no point.
function aligned(chart, lines) {
  const tables = lines.map((line) => {
    const x = line[view.x] || chart[view.x] || chart.steps;
    const rows = x.map((at, i) => [at, i]).filter(([at]) => at !== null).sort((a, b) => a[0] - b[0]);
    const of = (y) => { const made = smoothed(y); return rows.map(([, i]) => made[i]); };
    const columns = [of(line.y)];
    // A logarithmic axis has no zero: a band that reaches it ends below the lines.
    const floor = isLogarithmic(chart, lines) ? Math.min(...line.y.filter((value) => value !== null)) / 10 : -Infinity;
    if (line.low) columns.push(of(line.low).map((low) => low === null ? null : Math.max(low, floor)), of(line.high));
    return [rows.map(([at]) => at), ...columns];
  });
  return uPlot.join(tables);
}

function axis() {
  const line = { stroke: css("--line"), width: 1 };
  return { stroke: css("--faint"), grid: line, ticks: line };
}

const HORIZONTAL = { size: 36, labelSize: 20 }, VERTICAL = { size: 56, labelSize: 24 };

function plot(chart, place) {
  const lines = chart.means && view.means ? chart.means : chart.lines;
  const visible = (line) => !(line.runs || [line.run]).every((run) => view.hidden.includes(run));
  const x = chart[view.x] || lines.some((line) => line[view.x]) ? X_LABELS[view.x] : X_LABELS.steps;
  const series = [{ label: x, value: (_, value) => shown(value) }];
  const bands = [];
  for (const line of lines) {
    const color = line.color || css("--text");
    const look = { stroke: color + (line.faint ? "99" : ""), width: line.width || 1.5, dash: line.dashes, show: visible(line),
      spanGaps: true, label: line.name, class: line.faint ? "faint" : null,
      value: (made, value, i, at) => shown(value) + (line.low && value != null ? ` (${made.data.slice(i + 1, i + 3).map((y) => shown(y[at])).join(" to ")})` : ""),
      points: { show: line.y.filter((value) => value !== null).length === 1 } };
    series.push(look);
    if (line.low) {
      const edge = { stroke: "transparent", width: 0, auto: !line.runs, show: visible(line), spanGaps: true, points: { show: false }, class: "edge" };
      series.push(edge, edge);
      bands.push({ series: [series.length - 1, series.length - 2], fill: color + "33" });
    }
  }
  const logarithmic = isLogarithmic(chart, lines), of_logarithms = logarithmic ? { filter: logarithmicLabels } : {};
  const made = new uPlot({
    width: Math.max(place.clientWidth, 240), height: 260, series, bands,
    scales: { x: { time: false }, y: logarithmic ? { distr: 3, range: logarithmicRange } : {} },
    axes: [{ ...axis(), ...HORIZONTAL, label: series[0].label },
      { ...axis(), ...VERTICAL, ...of_logarithms, label: chart.label, values: (_, ticks) => ticks.map(shown) }],
    cursor: { drag: { x: true, y: true, uni: 20 }, focus: { prox: 24,
      dist: (made, i, _, value, mouse) => made.series[i].class === "edge" ? Infinity : value - mouse } },
    focus: { alpha: 0.25 },
    hooks: { setSeries: [(made, i, { show }) => {  // A band is hidden with its line.
      const band = bands.find((each) => each.series[1] === i + 1);
      if (band && show !== undefined) for (const edge of band.series) made.setSeries(edge, { show });
    }] },
    legend: { live: true, markers: { dash: (made, i) => (made.series[i].dash || []).length ? "dashed" : "solid" } },
  }, aligned(chart, lines), place);
  plots.push({ made, place });
}

// The color of a worker: by its index or, where each group has a row, its place in the group. Neighbors of many share one.
function color(chart, worker) { return chart.colors[Math.floor(worker % chart.colored * chart.colors.length / chart.colored)]; }

function bars(chart, place) {
  const values = chart.shares, workers = values.map((_, i) => i), colors = workers.map((worker) => color(chart, worker));
  const made = new uPlot({
    width: Math.max(place.clientWidth, 240), height: 180,
    series: [{ label: "worker" }, { label: "exchanges led", fill: css("--text"), width: 0, points: { show: false },
      paths: uPlot.paths.bars({ size: [0.7, 60], disp: { fill: { unit: 3, values: () => colors } } }) }],
    scales: { x: { time: false, range: [-0.6, values.length - 0.4] }, y: { range: (_, low, high) => [0, Math.max(high, 1)] } },
    axes: [{ ...axis(), ...HORIZONTAL, label: "worker", incrs: [1, 2, 5, 10, 20, 50, 100, 1000, 10000] },
      { ...axis(), ...VERTICAL, label: "exchanges led", incrs: [1, 2, 5, 10, 20, 50, 100, 1000, 10000, 100000] }],
    legend: { markers: { show: false } },
  }, [workers, values], place);
  plots.push({ made, place });
}

// Which color is whose: a box per worker or, of many, the shades from the first to the last.
function key(chart) {
  const box = (background, className = "") => { const made = element("span", { className }); made.style.background = background; return made; };
  const shades = () => element("div", {}, "0 ", box(`linear-gradient(to right, ${chart.colors.join(", ")})`, "shades"), (chart.colored - 1).toLocaleString("en"));
  const boxes = chart.colors.length <= 8 ? chart.colors.map((each, i) => element("div", {}, box(each), String(i))) : [shades()];
  return element("div", { className: "key" }, chart.colored < chart.shares.length ? "worker of each group" : "worker", ...boxes);
}

// Who led, from left to right: a column per election and a row per group, in the color of the worker.
function strip(chart, place) {
  const length = chart.steps.length, rows = chart.leaders.length;
  const canvas = element("canvas", { className: "strip", width: length, height: rows });
  const pen = canvas.getContext("2d"), at = element("div", { className: "at" });
  const [first, last] = [chart.steps[0], chart.steps[length - 1]].map((step) => step.toLocaleString("en"));
  at.textContent = (length > 1 ? `steps ${first} to ${last} from left to right` : `step ${first}`) + (rows > 1 ? ", a row per group, group 0 at the top" : "");
  chart.leaders.forEach((leaders, row) => leaders.forEach((leader, i) => {
    if (leader < 0) return;
    pen.fillStyle = color(chart, leader);
    pen.fillRect(i, row, 1, 1);
  }));
  canvas.onmousemove = (event) => {
    const i = Math.min(length - 1, Math.floor(event.offsetX / canvas.clientWidth * length));
    const row = Math.min(rows - 1, Math.floor(event.offsetY / canvas.clientHeight * rows)), leader = chart.leaders[row][i];
    const who = (rows > 1 ? `group ${row}, ` : "") + (leader < 0 ? "nobody leads" : `worker ${leader} leads`);
    at.textContent = `step ${chart.steps[i].toLocaleString("en")}: ${who}`;
  };
  place.append(canvas, at, key(chart));
}

function saved(text, type, name) {
  const link = element("a", { href: URL.createObjectURL(new Blob([text], { type })), download: name });
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 1000);
}

function table(chart) {
  if (chart.leaders) {
    return ["step,group,leader", ...chart.leaders.flatMap((of, row) => of.map((leader, i) => `${chart.steps[i]},${row},${leader}`))].join("\n");
  }
  const rows = ["line,steps,seconds,megabytes,value"];
  for (const line of chart.lines) {
    const x = (name) => line[name] || chart[name] || [];
    line.y.forEach((y, i) => rows.push([JSON.stringify(line.name), x("steps")[i], x("seconds")[i], x("megabytes")[i], y].join(",")));
  }
  return rows.join("\n");
}

function show() {
  while (plots.length) plots.pop().made.destroy();
  for (const place of document.querySelectorAll("[data-chart]")) {
    const [run, number] = place.dataset.chart.split("/").map(Number);
    const chart = run < 0 ? DATA.shared[number] : DATA.runs[run].charts[number];
    place.replaceChildren();
    if (run >= 0) place.parentElement.hidden = view.hidden.includes(run);
    if (chart.leaders) { strip(chart, place); bars(chart, place); } else plot(chart, place);
  }
  for (const box of document.querySelectorAll("nav input")) box.checked = !view.hidden.includes(Number(box.value));
  for (const section of document.querySelectorAll("section[data-run]")) {
    section.hidden = view.hidden.includes(Number(section.dataset.run));
  }
}

function chosen(change) { Object.assign(view, change); kept(); show(); }

function control(label, input) { return element("label", {}, label + " ", input); }

function select(name, options) {
  const made = element("select", { onchange: () => chosen({ [name]: made.value }) });
  for (const [value, text] of Object.entries(options)) made.append(element("option", { value, textContent: text }));
  made.value = view[name];
  return made;
}

for (const place of document.querySelectorAll(".controls")) {
  const smooth = element("input", { type: "range", min: 0, max: 0.98, step: 0.02, value: view.smooth });
  smooth.oninput = () => chosen({ smooth: Number(smooth.value) });
  const means = element("input", { type: "checkbox", checked: view.means, onchange: () => chosen({ means: means.checked }) });
  const download = element("button", { textContent: "Download data (JSON)" });
  download.onclick = () => saved(JSON.stringify(DATA), "application/json", "report.json");
  place.append(control("x axis", select("x", X_LABELS)), control("y axis", select("log", { auto: "automatic", log: "logarithmic", linear: "linear" })),
    control("smoothing", smooth));
  if (DATA.shared.some((chart) => chart.means.length < chart.lines.length)) place.append(control("mean and 95 % interval over seeds", means));
  place.append(download, element("span", { textContent: "Drag to zoom, double-click to zoom out, click a name in a legend to hide its line." }));
}
for (const box of document.querySelectorAll("nav input")) {
  box.onchange = () => chosen({ hidden: [...document.querySelectorAll("nav input")].filter((each) => !each.checked).map((each) => Number(each.value)) });
}
for (const caption of document.querySelectorAll("figure:has([data-chart]) figcaption")) {
  const [run, number] = caption.parentElement.querySelector("[data-chart]").dataset.chart.split("/").map(Number);
  const chart = run < 0 ? DATA.shared[number] : DATA.runs[run].charts[number];
  const name = chart.title.toLowerCase().replace(/\W+/g, "-") + ".csv";
  caption.append(element("button", { textContent: "CSV", title: "Download the data of this chart", onclick: () => saved(table(chart), "text/csv", name) }));
}
show();
let timer;
addEventListener("resize", () => { clearTimeout(timer); timer = setTimeout(show, 150); });
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", show);
