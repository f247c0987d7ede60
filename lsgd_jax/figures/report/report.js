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

function plot(chart, place) {
  const lines = chart.means && view.means ? chart.means : chart.lines;
  const visible = (line) => !(line.runs || [line.run]).every((run) => view.hidden.includes(run));
  const series = [{ label: chart[view.x] || lines.some((line) => line[view.x]) ? X_LABELS[view.x] : X_LABELS.steps }];
  const bands = [];
  for (const line of lines) {
    const look = { stroke: line.color + (line.faint ? "99" : ""), width: line.width || 1.5, dash: line.dashes, show: visible(line),
      spanGaps: true, label: line.name, value: (_, value) => shown(value),
      points: { show: line.y.filter((value) => value !== null).length === 1 } };
    series.push(look);
    if (line.low) {
      const edge = { stroke: "transparent", width: 0, auto: !line.runs, show: visible(line), spanGaps: true, points: { show: false }, value: (_, v) => shown(v) };
      series.push({ ...edge, label: "low" }, { ...edge, label: "high" });
      bands.push({ series: [series.length - 1, series.length - 2], fill: line.color + "33" });
    }
  }
  const axis = { stroke: css("--faint"), grid: { stroke: css("--line"), width: 1 }, ticks: { stroke: css("--line"), width: 1 } };
  const made = new uPlot({
    width: Math.max(place.clientWidth, 240), height: 260, series, bands,
    scales: { x: { time: false }, y: { distr: isLogarithmic(chart, lines) ? 3 : 1 } },
    axes: [{ ...axis, label: series[0].label }, { ...axis, label: chart.label, size: 64, values: (_, ticks) => ticks.map(shown) }],
    cursor: { drag: { x: true, y: true, uni: 20 }, focus: { prox: 24 } },
    focus: { alpha: 0.25 },
    legend: { live: true },
  }, aligned(chart, lines), place);
  plots.push({ made, place });
}

function bars(values, place) {
  const workers = values.map((_, i) => i);
  const axis = { stroke: css("--faint"), grid: { stroke: css("--line"), width: 1 } };
  const made = new uPlot({
    width: Math.max(place.clientWidth, 240), height: 180,
    series: [{ label: "worker" }, { label: "exchanges led", fill: "#0072B299", stroke: "#0072B2", points: { show: false },
      paths: uPlot.paths.bars({ size: [0.7, 60] }) }],
    scales: { x: { time: false, range: [-0.6, values.length - 0.4] }, y: { range: (_, low, high) => [0, Math.max(high, 1)] } },
    axes: [{ ...axis, label: "worker", incrs: [1, 2, 5, 10, 20, 50, 100, 1000, 10000] }, { ...axis, label: "exchanges led", size: 64 }],
  }, [workers, values], place);
  plots.push({ made, place });
}

// Who led, from left to right: a column per election and a row per group, in the color of the worker.
function strip(chart, place) {
  const length = chart.steps.length, rows = chart.leaders.length;
  const canvas = element("canvas", { className: "strip", width: length, height: rows });
  const pen = canvas.getContext("2d"), at = element("div", { textContent: "\u00a0" });
  chart.leaders.forEach((leaders, row) => leaders.forEach((leader, i) => {
    if (leader < 0) return;
    pen.fillStyle = DATA.colors[leader % DATA.colors.length];
    pen.fillRect(i, row, 1, 1);
  }));
  canvas.onmousemove = (event) => {
    const i = Math.min(length - 1, Math.floor(event.offsetX / canvas.clientWidth * length));
    const row = Math.min(rows - 1, Math.floor(event.offsetY / canvas.clientHeight * rows)), leader = chart.leaders[row][i];
    const who = (rows > 1 ? `group ${row}, ` : "") + (leader < 0 ? "nobody leads" : `worker ${leader} leads`);
    at.textContent = `step ${chart.steps[i].toLocaleString("en")}: ${who}`;
  };
  place.append(canvas, at);
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
    if (chart.leaders) { strip(chart, place); bars(chart.shares, place); } else plot(chart, place);
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
