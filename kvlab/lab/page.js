"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const isNarrow = () => document.documentElement.clientWidth < 760;

function trimmed(number) { return String(parseFloat(number.toPrecision(4))); }

function bytesInWords(count) {
  const units = ["B", "KiB", "MiB", "GiB", "TiB"];
  let place = 0;
  while (Math.abs(count) >= 1024 && place < units.length - 1) { count /= 1024; place += 1; }
  return trimmed(count) + " " + units[place];
}

// Round places between two sizes: powers of two, or where these are too few multiples of one.
function byteTicks(low, high, most) {
  const octaves = Math.log2(high / low), ticks = [];
  if (octaves >= 2) {
    const step = Math.ceil(octaves / most);
    for (let power = Math.ceil(Math.log2(low) / step) * step; 2 ** power <= high; power += step) ticks.push(2 ** power);
    return ticks;
  }
  return multiples(low, high, 2 ** Math.max(0, Math.ceil(Math.log2((high - low) / most))));
}

function multiples(low, high, step) {
  const ticks = [];
  for (let count = Math.ceil(low / step - 1e-9); count * step <= high * (1 + 1e-9); count += 1) ticks.push(count * step);
  return ticks;
}

// Round places on a logarithmic axis: 1, 2 and 5, or where these are too few, equal steps.
function logTicks(low, high, most) {
  if (high / low >= 8) {
    const ticks = [];
    for (let power = Math.floor(Math.log10(low)); 10 ** power <= high; power += 1)
      for (const digit of [1, 2, 5]) if (digit * 10 ** power >= low && digit * 10 ** power <= high) ticks.push(digit * 10 ** power);
    return ticks;
  }
  const rough = (high - low) / most, power = 10 ** Math.floor(Math.log10(rough));
  return multiples(low, high, power * [1, 2, 5, 10].find(digit => digit * power >= rough));
}

const around = (low, high, share) => low === high ? [low / 1.5, high * 1.5] : [low / (high / low) ** share, high * (high / low) ** share];

// An axis between two positive sizes whose ticks are round, also after zooming.
function logAxis(range, ticks, inWords, most, title) {
  const found = ticks(range[0], range[1], most);
  return {type: "log", range: range.map(Math.log10), tickmode: "array", tickvals: found, ticktext: found.map(inWords), title: {text: title}};
}

function keepTicks(chart, name, ticks, inWords, most) {
  chart.removeAllListeners && chart.removeAllListeners("plotly_relayout");
  chart.on("plotly_relayout", change => {
    if (!Object.keys(change).some(key => key.startsWith(name + ".range") || key === name + ".autorange")) return;
    const range = chart.layout[name].range.map(value => 10 ** value).sort((a, b) => a - b);
    const found = ticks(range[0], range[1], most);
    Plotly.relayout(chart, {[name + ".tickvals"]: found, [name + ".ticktext"]: found.map(inWords)});
  });
}

function wrapped(text, width) {
  const lines = [""];
  for (const word of text.split(" ")) {
    const last = lines[lines.length - 1];
    if (last && (last + " " + word).length > width) lines.push(word); else lines[lines.length - 1] = last ? last + " " + word : word;
  }
  return lines.join("<br>");
}

// The legend stands beside a wide chart and below a narrow one, which grows by it.
function draw(id, traces, layout, numEntries, least = 0) {
  const chart = document.getElementById(id), narrow = isNarrow() || chart.clientWidth < 620;
  const below = numEntries ? 20 * numEntries + 20 : 0, plot = Math.max(narrow ? 330 : 430, least);
  chart.style.height = (narrow ? plot + below : Math.max(plot + 40, below)) + "px";
  const legend = narrow ? {orientation: "h", x: 0, xanchor: "left", y: -85 / (plot - 70), yanchor: "top", entrywidth: 1, entrywidthmode: "fraction"} : {x: 1.02, y: 1};
  const margin = {l: 62, r: narrow ? 12 : 20, t: 20, b: narrow ? 70 + below : 70};
  return Plotly.react(chart, traces, {margin, legend, showlegend: numEntries > 0, hovermode: "closest", font: {size: 12}, ...layout},
    {responsive: true, displaylogo: false, displayModeBar: narrow ? false : "hover"});
}

function qualityAxis(task) {
  const axis = {title: {text: task.metric}, zeroline: false};
  if (task.is_share) return {...axis, range: [-0.03, 1.05], dtick: 0.2, tickformat: ".1f"};
  return {...axis, autorange: task.higher_is_better ? true : "reversed", rangemode: "tozero"};
}

function drawFrontier(index, axis) {
  const task = data.tasks[index], frontier = task.frontiers[axis], unit = axis === "read_bytes_per_token" ? "token" : "sequence";
  const dots = task.points.filter(p => axis in p.bytes).map(p => ({x: [p.bytes[axis]], y: [p.value], mode: "markers",
    name: wrapped(p.name, 34), marker: {size: 11, color: p.colour, symbol: p.symbol},
    error_y: {type: "data", symmetric: false, array: [p.plus], arrayminus: [p.minus], visible: p.num_seeds > 1},
    hovertemplate: "<b>" + p.name + "</b><br>" + task.metric + " %{y:.4f}<br>" + bytesInWords(p.bytes[axis]) + " per " + unit + "<br>" +
      p.seeds + "<extra></extra>"}));
  const sizes = dots.map(dot => dot.x[0]).filter(size => size > 0), most = isNarrow() ? 4 : 8;
  const range = sizes.length ? around(Math.min(...sizes), Math.max(...sizes), 0.08) : [1, 1024];
  const line = {x: frontier.map(p => p[0]), y: frontier.map(p => p[1]), mode: "lines", name: "non-dominated",
    line: {shape: "hv", dash: "dash", color: "#999"}, hoverinfo: "skip"};
  const title = wrapped(data.axes[axis] + ", " + task.where, isNarrow() ? 40 : 90);
  draw("frontier-" + index, [line, ...dots], {xaxis: logAxis(range, byteTicks, bytesInWords, most, title), yaxis: qualityAxis(task)}, dots.length + 1);
  keepTicks(document.getElementById("frontier-" + index), "xaxis", byteTicks, bytesInWords, most);
}

function drawSlices(index) {
  const task = data.tasks[index];
  if (!task.slices.length) return;
  const traces = task.points.map(p => ({x: task.slices, y: p.slices, mode: "lines+markers", name: wrapped(p.name, 34),
    line: {color: p.colour, dash: p.dash, width: 1.6}, marker: {size: 9, color: p.colour, symbol: p.symbol},
    hovertemplate: "<b>" + p.name + "</b><br>%{x}: %{y:.4f}<extra></extra>"}));
  draw("slices-" + index, traces, {xaxis: {type: "category", title: {text: "slice"}, automargin: true}, yaxis: qualityAxis(task)}, traces.length);
}

function drawLayers() {
  const states = [...new Set(data.layers.flatMap(row => row.layers.map(each => each.state)))];
  const colours = ["#0072b2", "#e69f00", "#009e73", "#d55e00", "#cc79a7", "#56b4e9", "#332288", "#999933", "#661100", "#7f7f7f"];
  const of = (row, state) => row.layers.map((each, place) => each.state === state ? row.bytes[place] : 0);
  const total = counts => counts.reduce((sum, count) => sum + count, 0);
  const width = isNarrow() ? 18 : 40, names = data.layers.map((row, place) => row.name + "\u200b".repeat(place));
  const traces = states.map((state, index) => ({type: "bar", orientation: "h", name: state, y: names, x: data.layers.map(row => total(of(row, state))),
    marker: {color: colours[index % colours.length]},
    hovertext: data.layers.map(row => "<b>" + row.name + "</b><br>" + state + ": " + bytesInWords(total(of(row, state))) + " in " +
      of(row, state).filter(count => count > 0).length + " layers"), hoverinfo: "text"}));
  const largest = Math.max(...data.layers.map(row => total(row.bytes)), 1), ticks = byteLinear(largest, isNarrow() ? 3 : 8);
  draw("layers", traces, {barmode: "stack",
    xaxis: {tickmode: "array", tickvals: ticks, ticktext: ticks.map(bytesInWords), title: {text: "allocated bytes"}, range: [0, largest * 1.04]},
    yaxis: {automargin: true, autorange: "reversed", tickmode: "array", tickvals: names, ticktext: data.layers.map(row => wrapped(row.name, width))}}, states.length, 32 * names.length + 90);
}

const byteLinear = (largest, most) => multiples(0, largest * 1.04, 2 ** Math.max(0, Math.ceil(Math.log2(largest / most))));

function drawCurves(index) {
  const group = data.groups[index], seen = new Set(), narrow = isNarrow();
  const traces = (x, y, shown) => {
    seen.clear();
    return group.curves.map(curve => {
      const isFirst = !seen.has(curve.name);
      seen.add(curve.name);
      return {x: curve[x], y: curve[y], mode: shown, name: wrapped(curve.name, 34), legendgroup: curve.name, showlegend: isFirst,
        line: {width: 1.4, color: curve.colour, dash: curve.dash}, marker: {size: 5, color: curve.colour},
        hovertemplate: "<b>" + curve.name + "</b>, seed " + curve.seed + "<br>step %{x:,}: %{y:.4f}<extra></extra>"};
    });
  };
  const last = group.curves.reduce((most, curve) => Math.max(most, ...curve.steps.slice(-1)), 1);
  const steps = {title: {text: "step"}, tickformat: ",d", nticks: narrow ? 4 : 7, range: [0, 1.04 * last]};
  const losses = group.curves.flatMap(curve => curve.losses).filter(loss => loss > 0);
  const range = losses.length ? around(losses.reduce((a, b) => Math.min(a, b)), losses.reduce((a, b) => Math.max(a, b)), 0.05) : [0.1, 1];
  const drawn = traces("steps", "losses", group.curves.some(curve => curve.steps.length > 20) ? "lines" : "lines+markers");
  draw("losses-" + index, drawn, {xaxis: steps, yaxis: logAxis(range, logTicks, trimmed, 7, "training loss, nats")}, seen.size);
  keepTicks(document.getElementById("losses-" + index), "yaxis", logTicks, trimmed, 7);
  if (document.getElementById("validations-" + index)) {
    const validations = traces("validated", "validations", "lines+markers");
    draw("validations-" + index, validations, {xaxis: steps, yaxis: {title: {text: group.metric}, rangemode: "tozero"}}, seen.size);
  }
}

function makeSortable(table) {
  const heads = [...table.tHead.rows[0].cells];
  heads.forEach((head, column) => head.querySelector("button").addEventListener("click", () => {
    const down = head.getAttribute("aria-sort") === "ascending";
    heads.forEach(h => h.removeAttribute("aria-sort"));
    head.setAttribute("aria-sort", down ? "descending" : "ascending");
    const value = row => row.cells[column].dataset.value;
    const compare = (a, b) => {
      const x = value(a), y = value(b), nx = parseFloat(x), ny = parseFloat(y);
      return x !== "" && y !== "" && !isNaN(x) && !isNaN(y) ? nx - ny : x.localeCompare(y);
    };
    const rows = [...table.tBodies[0].rows].sort(compare);
    if (down) rows.reverse();
    table.tBodies[0].append(...rows);
  }));
}

// Without a clipboard, as on pages of another machine, the command is left selected.
function makeCopyable(button) {
  button.addEventListener("click", async () => {
    const code = button.nextElementSibling;
    getSelection().selectAllChildren(code);
    try {
      await navigator.clipboard.writeText(code.textContent);
      button.textContent = "copied";
    } catch {
      button.textContent = document.execCommand("copy") ? "copied" : "selected";
    }
  });
}

function drawMemory() {
  const axis = document.getElementById("axis").value;
  data.tasks.forEach((_, index) => drawFrontier(index, axis));
}

function drawAll() {
  drawMemory();
  data.tasks.forEach((_, index) => drawSlices(index));
  if (data.layers.length) drawLayers();
  data.groups.forEach((_, index) => drawCurves(index));
}

document.getElementById("axis").addEventListener("change", drawMemory);
matchMedia("(max-width: 760px)").addEventListener("change", drawAll);
drawAll();
const points = document.getElementById("points");
if (points) makeSortable(points);
document.querySelectorAll("button.copy").forEach(makeCopyable);
document.body.dataset.ready = "yes";
