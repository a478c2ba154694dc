// Draws the report's plots from the data in the page. Plotly is loaded before this.
"use strict";
(() => {
  const COLOURS = ["#4269d0", "#e5a11a", "#e8553f", "#2fa89b", "#3ca951", "#e56fa4", "#9355e0",
    "#6f9fe8", "#9c6b4e", "#8a8f99"];
  const DASHES = ["solid", "dash", "dot", "dashdot"];
  const SYMBOLS = {restart: "triangle-up", merge: "triangle-down", resume: "circle",
    fork: "diamond", skip: "x", spike: "star", reset: "square", rollback: "triangle-left",
    signal: "hexagon"};
  const QUANTILES = ["smallest", "10 %", "25 %", "median", "75 %", "90 %", "largest"];
  const SPECTRUM = ["#c6a5f5", "#9f8cf0", "#6f86ec", "#2f7fd8", "#1f9fb5", "#3fae6e", "#d39a1c"];
  const MOST_LINES = 40; // vertical lines of a single run
  const MOST_MARKS = 300; // of one kind, on all curves together; more would hide them
  const MANY_MARKS = 60; // drawn small

  const problem = document.getElementById("problem");
  function showProblem(text) {
    problem.hidden = false;
    problem.textContent = `The plots could not be drawn: ${text}`;
  }
  window.addEventListener("error", (event) => showProblem(event.message));

  const report = JSON.parse(document.getElementById("data").textContent);
  const charts = new Map(report.charts.map((chart) => [chart.name, chart]));
  const figures = [...document.querySelectorAll("figure[data-chart]")];
  const narrow = matchMedia("(max-width: 40rem)");
  const touch = matchMedia("(pointer: coarse)");
  const prefersDark = matchMedia("(prefers-color-scheme: dark)");
  const state = {axis: "update", logAxis: false, smooth: 0, marks: true,
    shown: new Set(report.runs.keys()), theme: null, zoom: null};
  if (report.runs.length > report.shown) {
    state.shown = new Set([...report.runs.keys()].slice(0, report.shown));
  }
  const byId = (id) => document.getElementById(id);
  const colour = (run) => COLOURS[run % COLOURS.length];
  const dash = (run) => DASHES[Math.floor(run / COLOURS.length) % DASHES.length];
  // Plotly reads some tags in names; a run's name is text.
  const plain = (text) => text.replace(/&/g, "&amp;").replace(/</g, "&lt;").replace(/>/g, "&gt;");

  // ---- numbers ----

  /** Value at x of the line through (xs, ys), xs ascending; constant beyond the ends. */
  function interpolate(xs, ys, x) {
    let low = 0, high = xs.length - 1;
    if (x <= xs[low]) return ys[low];
    if (x >= xs[high]) return ys[high];
    while (high - low > 1) {
      const middle = (low + high) >> 1;
      if (xs[middle] <= x) low = middle; else high = middle;
    }
    return ys[low] + (ys[high] - ys[low]) * (x - xs[low]) / (xs[high] - xs[low]);
  }

  /** Updates as the chosen axis; null where the run has not recorded it. */
  function onAxis(run, updates) {
    if (state.axis === "update") return updates;
    const clock = report.runs[run].clock, values = clock[state.axis];
    const factor = state.axis === "hours" ? timeUnit()[1] : 1;
    return values && updates.map((update) => factor * interpolate(clock.update, values, update));
  }

  /** The unit of time that suits the longest run, and how many of it are in an hour. */
  function timeUnit() {
    const ends = report.runs.map((run) => (run.clock.hours ? run.clock.hours.at(-1) : 0));
    const longest = ends.reduce((a, b) => Math.max(a, b), 0);
    if (longest < 1 / 20) return ["seconds", 3600];
    return longest < 3 ? ["minutes", 60] : ["hours", 1];
  }

  function axisTitle() {
    if (state.axis === "hours") return `${timeUnit()[0]} of running`;
    return state.axis === "tokens" ? "training tokens" : "updates";
  }

  /** Exponential moving average, corrected for its start. */
  function smoothed(values, weight) {
    let sum = 0, total = 0;
    return values.map((value) => {
      sum = weight * sum + (1 - weight) * value;
      total = weight * total + (1 - weight);
      return sum / total;
    });
  }

  /** Smallest and largest y of the traces between the zoomed ends; null where none is drawn. */
  function extent(traces, log) {
    let low = Infinity, high = -Infinity;
    const [left, right] = (state.zoom || [-Infinity, Infinity])
      .map((end) => (state.zoom && state.logAxis ? 10 ** end : end));
    for (const trace of traces) {
      trace.y.forEach((value, place) => {
        const inside = trace.x[place] >= left && trace.x[place] <= right;
        if (!inside || value === null || (log && value <= 0)) return;
        low = Math.min(low, value);
        high = Math.max(high, value);
      });
    }
    return low <= high ? [low, high] : null;
  }

  /** Round numbers between low and high: 1, 2, 5 times powers of ten, or equal steps if close. */
  function logTicks(low, high, most) {
    const ticks = [];
    if (high / low < 8) {
      const rough = (high - low) / most, power = 10 ** Math.floor(Math.log10(rough));
      const step = power * [1, 2, 5, 10].find((factor) => factor * power >= rough);
      for (let n = Math.ceil(low / step); n * step <= high; n += 1) ticks.push(n * step);
      return ticks;
    }
    const first = Math.floor(Math.log10(low)), last = Math.ceil(Math.log10(high));
    const factors = (last - first) * 3 <= 2 * most ? [1, 2, 5] : [1];
    const step = Math.max(1, Math.ceil((last - first) / most));
    for (let power = first; power <= last; power += step) {
      ticks.push(...factors.map((factor) => factor * 10 ** power));
    }
    return ticks.filter((tick) => tick >= low / 1.1 && tick <= high * 1.1);
  }

  /** The y axis around what is visible: zooming into the end of a run shows its details. */
  function yAxis(traces, log, name) {
    const found = extent(traces, log);
    const axis = {type: log ? "log" : "linear", fixedrange: true};
    if (name === "tokens_per_second") axis.tickformat = "~s";
    if (!found) return axis;
    const ends = log ? found.map(Math.log10) : found;
    const room = 0.05 * (ends[1] - ends[0]) || 0.1 * Math.abs(ends[1]) || 0.1;
    axis.range = [ends[0] - room, ends[1] + room];
    if (log) {
      axis.tickvals = logTicks(...axis.range.map((end) => 10 ** end), narrow.matches ? 5 : 8);
      axis.ticktext = axis.tickvals.map(short);
    }
    return axis;
  }

  /** 20k, 1.5M */
  function brief(value) {
    const [size, letter] = [[1e9, "G"], [1e6, "M"], [1e3, "k"]].find(([s]) => value >= s) || [1, ""];
    return short(value / size) + letter;
  }

  const short = (value) => (value >= 1e-3 && value < 1e4
    ? String(Number(value.toPrecision(4)))
    : value.toExponential(2).replace(/\.?0+e/, "e").replace("e+", "e"));

  // ---- traces ----

  function line(run, x, y, extra = {}) {
    const name = plain(report.runs[run].label);
    return {type: "scatter", mode: x.length === 1 ? "markers" : "lines", x, y, name,
      showlegend: false, line: {color: colour(run), dash: dash(run), width: 1.8},
      marker: {color: colour(run)}, ...extra};
  }

  function curves(chart) {
    const traces = [], drawn = [...state.shown].sort((a, b) => b - a); // the best lies on top
    const counts = countMarks();
    for (const run of drawn) {
      const curve = report.runs[run].curves[chart.name];
      const x = curve && curve.x.length ? onAxis(run, curve.x) : null;
      if (!x) continue;
      const smooth = chart.smooth && state.smooth > 0;
      const text = curve.x.map((update) => `update ${update.toLocaleString("en")}`);
      const hovertemplate = "%{y:.5~g} <i>%{text}</i>";
      if (smooth && drawn.length <= 4) {
        traces.push(line(run, x, curve.y, {opacity: 0.25, hoverinfo: "skip"}));
      }
      const y = smooth ? smoothed(curve.y, state.smooth) : curve.y;
      const few = chart.sparse && curve.x.length <= 30;
      const mode = few ? {mode: "lines+markers", marker: {color: colour(run), size: 5}} : {};
      traces.push(line(run, x, y, {text, hovertemplate, ...mode}));
      if (chart.name === "loss" && state.marks) traces.push(...marks(run, curve.x, y, counts));
    }
    return traces;
  }

  /** How many events of each kind the shown runs have. */
  function countMarks() {
    const counts = new Map();
    for (const run of state.shown) {
      for (const [kind] of report.runs[run].marks) counts.set(kind, (counts.get(kind) || 0) + 1);
    }
    return counts;
  }

  /** The events of a run on its curve, a trace for each kind of which there are not too many. */
  function marks(run, updates, values, counts) {
    const kinds = new Map();
    for (const mark of report.runs[run].marks) {
      if (counts.get(mark[0]) > MOST_MARKS) continue;
      if (!kinds.has(mark[0])) kinds.set(mark[0], []);
      kinds.get(mark[0]).push(mark);
    }
    return [...kinds].map(([kind, found]) => ({
      type: "scatter", mode: "markers", name: plain(kind), showlegend: false,
      x: onAxis(run, found.map((mark) => mark[1])),
      y: found.map((mark) => interpolate(updates, values, mark[1])),
      text: found.map((mark) => wrapped(`${mark[0]} at update ${mark[1]}. ${mark[2]}`)),
      hovertemplate: "%{text}<extra></extra>",
      marker: {symbol: SYMBOLS[kind] || "cross", color: colour(run),
        size: counts.get(kind) > MANY_MARKS ? 5 : 9,
        line: {width: counts.get(kind) > MANY_MARKS ? 0 : 1, color: style("--card")}},
    }));
  }

  function wrapped(text) {
    return plain(text).replace(/(.{30,46}?)[ ]/g, "$1<br>");
  }

  /** Quantiles of the singular values of one run and one kind of projection. */
  function spectrum() {
    const run = Number(byId("spectrum-run").value), kind = byId("spectrum-kind").value;
    const found = report.runs[run].spectra[kind];
    const x = found && onAxis(run, found.update);
    if (!x) return [];
    return QUANTILES.map((name, place) => line(run, x, found.quantiles.map((all) => all[place]), {
      name, mode: "lines+markers", showlegend: true, marker: {size: 4, color: SPECTRUM[place]},
      line: {color: SPECTRUM[place], width: place === 3 ? 3 : 1.5},
      hovertemplate: "%{y:.4~g}",
    })).reverse();
  }

  // ---- drawing ----

  const style = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();

  function layout(name, log, traces) {
    const text = style("--text"), grid = style("--grid"), card = style("--card");
    const axis = {gridcolor: grid, linecolor: style("--line"), zeroline: false, automargin: true,
      exponentformat: "power", nticks: narrow.matches ? 5 : 8};
    const unified = state.shown.size <= 8 && !narrow.matches;
    return {
      font: {color: text, size: 12, family: "system-ui, -apple-system, sans-serif"},
      paper_bgcolor: card, plot_bgcolor: card, margin: {l: 48, r: 10, t: 10, b: 40},
      hovermode: unified ? "x unified" : "closest", hoverdistance: unified ? 8 : 20, dragmode: touch.matches ? false : "zoom",
      hoverlabel: {namelength: narrow.matches ? 18 : 40, bgcolor: card, bordercolor: style("--line"),
        font: {color: text, size: 11}},
      xaxis: {...axis, title: {text: axisTitle(), standoff: 6, font: {size: 11}},
        type: state.logAxis ? "log" : "linear", hoverformat: ",.4~g",
        ...(state.axis === "hours" ? {} : {tickformat: "~s"}), ...xRange()},
      yaxis: {...axis, ...yAxis(traces, log, name)},
      legend: {orientation: "h", y: -0.24, font: {size: 11}},
      shapes: lines(), annotations: traces.length ? [] : [emptiness()],
    };
  }

  /** The zoomed stretch, or from the start to the end of the longest run, alike in all plots. */
  function xRange() {
    let first = Infinity, last = 0;
    for (const run of state.shown) {
      const places = (onAxis(run, report.runs[run].clock.update) || []).filter((x) => x > 0);
      if (!places.length) continue;
      first = Math.min(first, places[0]);
      last = Math.max(last, places.at(-1));
    }
    if (!last) return {autorange: true};
    if (!state.logAxis) return {range: state.zoom || [0, 1.02 * last], autorange: false};
    const range = state.zoom || [Math.log10(first / 1.05), Math.log10(1.1 * last)];
    const tickvals = logTicks(...range.map((end) => 10 ** end), narrow.matches ? 4 : 7);
    return {range, autorange: false, tickvals, ticktext: tickvals.map(brief)};
  }

  function emptiness() {
    const text = state.shown.size ? "not recorded by the chosen runs" : "no run is chosen";
    return {text, showarrow: false, xref: "paper", yref: "paper", x: 0.5, y: 0.5,
      font: {color: style("--soft")}};
  }

  /** Vertical lines at the events, if one run alone is shown and they do not hide it. */
  function lines() {
    if (!state.marks || state.shown.size !== 1) return [];
    const run = [...state.shown][0], found = report.runs[run].marks;
    const x = onAxis(run, found.map((mark) => mark[1]));
    if (found.length > MOST_LINES || !x) return [];
    return x.map((place) => ({type: "line", xref: "x", yref: "paper", x0: place, x1: place, y0: 0,
      y1: 1, layer: "below", line: {color: style("--mark"), width: 1, dash: "dot"}}));
  }

  const config = () => ({responsive: true, displaylogo: false, doubleClick: "autosize",
    displayModeBar: touch.matches ? true : "hover",
    modeBarButtons: [["zoomIn2d", "zoomOut2d", "autoScale2d"]]});

  function draw(figure) {
    const name = figure.dataset.chart, plot = figure.querySelector(".plot");
    const log = figure.querySelector("input.log").checked;
    const traces = name === "spectrum" ? spectrum() : curves(charts.get(name));
    const made = plot.classList.contains("js-plotly-plot");
    figure.dataset.drawn = "yes";
    Plotly.react(plot, traces, layout(name, log, traces), config());
    if (!made) plot.on("plotly_relayout", (change) => zoomed(figure, change));
  }

  /** All plots show the same stretch. */
  function zoomed(figure, change) {
    if (change["xaxis.autorange"]) setZoom(null);
    else if ("xaxis.range[0]" in change) {
      setZoom([change["xaxis.range[0]"], change["xaxis.range[1]"]]);
    }
  }

  function setZoom(range) {
    state.zoom = range;
    drawAll();
  }

  const near = new Set();
  const watcher = new IntersectionObserver((entries) => {
    for (const entry of entries) {
      if (!entry.isIntersecting) near.delete(entry.target);
      else {
        near.add(entry.target);
        if (entry.target.dataset.drawn !== "yes") draw(entry.target);
      }
    }
  }, {rootMargin: "400px"});

  /** Draws what is near the screen; the rest is drawn when it comes near. */
  function drawAll() {
    for (const figure of figures) {
      if (near.has(figure)) draw(figure); else figure.dataset.drawn = "no";
    }
    const many = [...countMarks()].filter(([, count]) => count > MOST_MARKS);
    byId("marks-note").textContent = state.marks && many.length
      ? `(${many.map(([kind]) => kind).join(", ")}: too many to mark)` : "";
  }

  /** Saves a plot with its title and, for a few runs, their names. */
  function download(figure, format) {
    const {data, layout: shown} = figure.querySelector(".plot");
    const named = (trace) => trace.showlegend || "text" in trace && trace.mode !== "markers";
    const traces = data.map((trace) => ({...trace, showlegend: named(trace)}));
    const few = traces.filter(named).length <= 12;
    const title = {text: plain(figure.dataset.title), font: {size: 16}, x: 0.02, xanchor: "left"};
    const picture = {...shown, title, showlegend: few, width: 900, height: 500,
      margin: {...shown.margin, t: 50, b: 90}, legend: {...shown.legend, y: -0.16}};
    Plotly.downloadImage({data: traces, layout: picture}, {format, filename: figure.dataset.chart,
      width: 900, height: 500, scale: format === "png" ? 2 : 1});
  }

  // ---- controls ----

  function setShown(runs) {
    state.shown = new Set(runs);
    for (const chip of byId("chips").children) {
      chip.setAttribute("aria-pressed", state.shown.has(Number(chip.dataset.run)));
    }
    drawAll();
  }

  function paint(swatch, run) {
    swatch.style.borderTopColor = colour(run);
    swatch.style.borderTopStyle = {dash: "dashed", dot: "dotted", dashdot: "double"}[dash(run)]
      || "solid";
  }

  function makeChips() {
    report.runs.forEach((run, number) => {
      const chip = document.createElement("button");
      const swatch = document.createElement("span"), label = document.createElement("span");
      chip.type = "button";
      chip.dataset.run = number;
      chip.title = `${run.label}: click to show or hide, double-click for this one alone`;
      swatch.className = "swatch";
      paint(swatch, number);
      label.textContent = run.label;
      chip.append(swatch, label);
      chip.addEventListener("click", () => {
        const shown = new Set(state.shown);
        if (!shown.delete(number)) shown.add(number);
        setShown(shown);
      });
      chip.addEventListener("dblclick", () => setShown([number]));
      byId("chips").append(chip);
    });
    document.querySelectorAll("th .swatch").forEach((s) => paint(s, Number(s.dataset.run)));
  }

  function makeSpectrumChoice() {
    const runs = byId("spectrum-run"), kinds = byId("spectrum-kind");
    if (!runs) return;
    report.runs.forEach((run, number) => {
      if (Object.keys(run.spectra).length) runs.add(new Option(run.label, number));
    });
    const fill = () => {
      const before = kinds.value, found = Object.keys(report.runs[Number(runs.value)].spectra);
      kinds.replaceChildren(...found.map((kind) => new Option(kind, kind)));
      if (found.includes(before)) kinds.value = before;
      drawAll();
    };
    runs.addEventListener("change", fill);
    kinds.addEventListener("change", drawAll);
    fill();
  }

  function setTheme() {
    const dark = state.theme === null ? prefersDark.matches : state.theme === "dark";
    document.documentElement.dataset.theme = dark ? "dark" : "light";
    drawAll();
  }

  function listen() {
    byId("axis").addEventListener("change", (event) => {
      state.axis = event.target.value;
      state.zoom = null;
      drawAll();
    });
    byId("log-axis").addEventListener("change", (event) => {
      state.logAxis = event.target.checked;
      state.zoom = null;
      drawAll();
    });
    byId("smooth").addEventListener("input", (event) => {
      state.smooth = Number(event.target.value);
      byId("smooth-value").textContent = event.target.value;
      drawAll();
    });
    byId("marks").addEventListener("change", (event) => {
      state.marks = event.target.checked;
      drawAll();
    });
    byId("theme").addEventListener("click", () => {
      state.theme = document.documentElement.dataset.theme === "dark" ? "light" : "dark";
      setTheme();
    });
    prefersDark.addEventListener("change", setTheme);
    narrow.addEventListener("change", drawAll);
    for (const button of document.querySelectorAll("[data-show]")) {
      const all = [...report.runs.keys()];
      const runs = {best: all.slice(0, report.shown), all, none: []}[button.dataset.show];
      button.addEventListener("click", () => setShown(runs));
    }
    for (const figure of figures) {
      figure.querySelector("input.log").addEventListener("change", () => draw(figure));
      for (const button of figure.querySelectorAll("[data-image]")) {
        button.addEventListener("click", () => download(figure, button.dataset.image));
      }
    }
    window.addEventListener("beforeprint", () => figures.forEach(draw));
  }

  /** Click on a heading sorts by its column, a second click the other way round. */
  function makeSortable(table) {
    const heads = [...table.querySelectorAll("th.sort")], body = table.tBodies[0];
    heads.forEach((head, column) => head.addEventListener("click", () => {
      const up = head.getAttribute("aria-sort") !== "ascending";
      heads.forEach((other) => other.removeAttribute("aria-sort"));
      head.setAttribute("aria-sort", up ? "ascending" : "descending");
      const key = (row) => row.cells[column].dataset.value ?? row.cells[column].textContent;
      const compare = (a, b) => {
        const x = key(a), y = key(b), difference = Number(x) - Number(y);
        return Number.isNaN(difference) ? x.localeCompare(y) : difference;
      };
      const rows = [...body.rows].sort(compare);
      body.append(...(up ? rows : rows.reverse()));
    }));
  }

  if (typeof Plotly === "undefined") return showProblem("plotly.js is missing in this page");
  document.querySelector(".controls").hidden = false;
  setTheme();
  if (report.runs.length > 1) makeChips();
  makeSpectrumChoice();
  listen();
  document.querySelectorAll("table.sortable").forEach(makeSortable);
  figures.forEach((figure) => watcher.observe(figure));
})();
