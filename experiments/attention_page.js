// payload: {title, texts: [{name, tokens}], epochs, layers, heads: [number of each from 0], notes,
//   runs: [{name, verdict, weights, measured, measures: {name: [epoch][layer][head]}}]}
// weights: gzip of fp16 [text][epoch][layer][head][lower triangle, row after row].
const {title, texts, epochs, layers: nLayers, heads, runs, notes} = payload, nHeads = heads.length;
const $ = id => document.getElementById(id);
const sizes = texts.map(t => t.tokens.length), triangles = sizes.map(n => n * (n + 1) / 2);
const offsets = triangles.map((_, i) => triangles.slice(0, i).reduce((a, b) => a + b, 0) * epochs.length * nLayers * nHeads);
const view = {text: 0, epoch: epochs.length - 1, layer: 0, head: 0, show: "weights", scale: "linear", measure: "", run: 0, theme: "auto"};
const AVERAGE = -1, isCut = runs.some(run => Object.values(run.measures).some(rows => rows[0][0].length > nHeads));
// Plotly reads tags and entities in labels, so a token such as <b> must arrive escaped.
const escaped = t => t.replace(/&/g, "&amp;").replace(/</g, "&lt;").replace(/>/g, "&gt;");
const halves = new Float32Array(65536);
for (let i = 0; i < 65536; i++) {
  const sign = i & 0x8000 ? -1 : 1, exponent = (i >> 10) & 31, fraction = i & 1023;
  halves[i] = exponent ? sign * 2 ** (exponent - 15) * (1 + fraction / 1024) : sign * 2 ** -24 * fraction;
}

function weights(run, epoch, layer, head) {
  const n = triangles[view.text], found = new Float32Array(n);
  const each = head === AVERAGE ? [...Array(nHeads).keys()] : [head];
  for (const h of each) {
    const start = offsets[view.text] + ((epoch * nLayers + layer) * nHeads + h) * n;
    for (let i = 0; i < n; i++) found[i] += halves[runs[run].packed[start + i]] / each.length;
  }
  return found;
}

// What a map of a run shows: weights, or their difference from another epoch or from the first run.
function reference(run) {
  if (view.show === "previous") return [run, Math.max(0, view.epoch - 1)];
  if (view.show.startsWith("epoch ")) return [run, +view.show.slice(6)];
  return view.show === "runs" && run ? [0, view.epoch] : null;
}
function values(run, layer, head) {
  const found = weights(run, view.epoch, layer, head), other = reference(run);
  if (other) weights(...other, layer, head).forEach((w, i) => { found[i] -= w; });
  return found;
}

const byTheme = (lightTo, darkTo) => dark ? [[40, 46, 56], darkTo] : [[245, 247, 250], lightTo];
function paint(canvas, found, signed) {
  const n = sizes[view.text], side = Math.min(n, 64), context = canvas.getContext("2d");
  canvas.width = canvas.height = side;
  const image = context.createImageData(side, side), strongest = new Float32Array(side * side);
  for (let q = 0, i = 0; q < n; q++) for (let k = 0; k <= q; k++, i++) {
    const at = Math.floor(q * side / n) * side + Math.floor(k * side / n);
    if (Math.abs(found[i]) > Math.abs(strongest[at])) strongest[at] = found[i];
  }
  for (let y = 0; y < side; y++) for (let x = 0; x <= y; x++) {
    const v = strongest[y * side + x], share = Math.sqrt(Math.min(1, Math.abs(v))), i = 4 * (y * side + x);
    const [from, to] = !signed ? byTheme([20, 57, 160], [240, 206, 116])
      : byTheme(v < 0 ? [20, 70, 190] : [190, 30, 40], v < 0 ? [110, 165, 255] : [255, 120, 110]);
    for (let c = 0; c < 3; c++) image.data[i + c] = from[c] + (to[c] - from[c]) * share;
    image.data[i + 3] = 255;
  }
  context.putImageData(image, 0, 0);
}

function buildGrid() {
  const grid = $("grid");
  grid.style.gridTemplateColumns = `auto repeat(${nHeads}, auto)`;
  const caption = words => grid.append(Object.assign(document.createElement("span"), {textContent: words}));
  caption("");
  for (let h = 0; h < nHeads; h++) caption(`head ${heads[h] + 1}`);
  for (let l = 0; l < nLayers; l++) {
    caption(`layer ${l + 1}`);
    for (let h = 0; h < nHeads; h++) {
      const button = document.createElement("button");
      button.append(document.createElement("canvas"));
      button.title = `layer ${l + 1}, head ${heads[h] + 1}`;
      button.dataset.layer = l; button.dataset.head = h;
      button.onclick = () => show({layer: l, head: h});
      grid.append(button);
    }
  }
}

const pairs = new Map();
function pairNames(text) {
  const labels = texts[text].tokens.map(escaped);
  if (!pairs.has(text)) pairs.set(text, labels.map(q => labels.map(k => `${q} looks at ${k}`)));
  return pairs.get(text);
}

const headName = () => `layer ${view.layer + 1}, ` + (view.head === AVERAGE ? `average over ${isCut ? "the shown " : ""}heads` : `head ${heads[view.head] + 1}`);
function drawHead(run) {
  const n = sizes[view.text], found = values(run, view.layer, view.head), signed = reference(run) !== null;
  const log = view.scale === "log" && !signed, z = [], shown = [];
  let largest = 0;
  for (let q = 0, i = 0; q < n; q++) {
    z.push(Array(n).fill(null)); shown.push(Array(n).fill(null));
    for (let k = 0; k <= q; k++, i++) {
      shown[q][k] = found[i];
      z[q][k] = log ? Math.log10(Math.max(found[i], 1e-4)) : found[i];
      largest = Math.max(largest, Math.abs(found[i]));
    }
  }
  const places = [...Array(n).keys()], step = Math.ceil(n / 64);
  const labelled = places.filter(i => i % step === 0);
  const axis = {tickvals: labelled, ticktext: labelled.map(i => escaped(texts[view.text].tokens[i])), zeroline: false,
    tickfont: {size: n > 40 ? 8 : 10}, gridcolor: "rgba(0,0,0,0)"};
  const what = !signed ? "" : view.show === "runs" ? `, minus ${escaped(runs[0].name)}`
    : `, minus epoch ${epochs[reference(run)[1]]}`;
  const scale = signed ? {colorscale: dark ? [[0, "#6ea5ff"], [0.5, "#14171d"], [1, "#ff786e"]] : [[0, "#1446be"], [0.5, "#ffffff"], [1, "#be1e28"]],
    zmin: -(largest || 1), zmax: largest || 1}
    : {colorscale: dark ? "Cividis" : "YlGnBu", reversescale: !dark, zmin: log ? -4 : 0, zmax: log ? 0 : largest || 1};
  return Plotly.react(`head${run}`, [{
    type: "heatmap", z, customdata: shown, x: places, y: places, ...scale, text: pairNames(view.text),
    colorbar: {title: {text: signed ? "change" : log ? "log10" : "weight"}, thickness: 12},
    hovertemplate: `%{text}<br>${signed ? "change %{customdata:+.4f}" : "weight %{customdata:.4f}"}<extra></extra>`,
  }], {
    ...look, margin: {l: 90, r: 10, t: 46, b: 90},
    title: {text: `${runs.length > 1 ? escaped(runs[run].name) + "<br>" : ""}epoch ${epochs[view.epoch]}, ${headName()}${what}`,
      font: {size: 13}},
    xaxis: {...axis, tickangle: -60, title: {text: "looked at"}},
    yaxis: {...axis, autorange: "reversed", title: {text: "reading"}, scaleanchor: "x"},
  }, {displaylogo: false, responsive: true});
}

const mean = numbers => { const kept = numbers.filter(x => x !== null); return kept.length ? kept.reduce((a, b) => a + b, 0) / kept.length : null; };
const ofHead = row => view.head === AVERAGE ? mean(heads.map(h => row[view.layer][h])) : row[view.layer][heads[view.head]];
const colours = ["#2456d6", "#d1490b", "#0b8a5f", "#8a3ffc", "#b8860b", "#c2185b"];
function drawCurves() {
  const name = view.measure, lines = [];
  for (const [r, run] of runs.entries()) {
    const rows = run.measures[name];
    if (!rows) continue;
    const label = runs.length > 1 ? escaped(run.name) + ", " : "", colour = dark && r === 0 ? "#7aa2ff" : colours[r % colours.length];
    const line = (y, label, style, opacity) => lines.push({x: run.measured, y, name: label, mode: "lines+markers", opacity,
      marker: {size: 4}, line: {color: colour, ...style}});
    if (runs.length === 1) for (let h = 0; h < rows[0][view.layer].length; h++)
      lines.push({x: run.measured, y: rows.map(row => row[view.layer][h]), name: `layer ${view.layer + 1}, head ${h + 1}`,
        mode: "lines", opacity: 0.35, line: {color: dark ? "#98a2b3" : "#667085", width: 1}, showlegend: false});
    line(rows.map(ofHead), label + headName(), {width: 2.5}, 1);
    line(rows.map(row => mean(row.flat())), label + "all heads of all layers", {width: 2, dash: "dot"}, 0.9);
  }
  return Plotly.react("curves", lines, {...look, margin: {l: 50, r: 10, t: 10, b: 40}, legend: {orientation: "h", y: -0.3},
    xaxis: {title: {text: "epoch"}, gridcolor: inks.line, zeroline: false, dtick: runs[0].measured.length > 20 ? undefined : 1}, yaxis: {title: {text: name}, gridcolor: inks.line, rangemode: "tozero"},
  }, {displaylogo: false, responsive: true});
}

function writeFacts() {
  const cell = (tag, words, kind) => Object.assign(document.createElement(tag), {textContent: words, className: kind || ""});
  const table = $("facts"), line = (...cells) => { const tr = document.createElement("tr"); tr.append(...cells); table.append(tr); };
  table.replaceChildren();
  line(cell("th", `epoch ${epochs[view.epoch]}, ${headName()}`, "words"), ...runs.map(run => cell("th", runs.length > 1 ? run.name : "")));
  for (const name of Object.keys(runs[0].measures))
    line(cell("td", name, "words"), ...runs.map(run => {
      const row = run.measures[name]?.[run.measured.indexOf(epochs[view.epoch])], found = row ? ofHead(row) : null;
      return cell("td", found === null ? "" : found.toFixed(3));
    }));
}

function show(change) {
  if (change.show === "runs" && !view.run) change.run = 1;
  Object.assign(view, change);
  if ("theme" in change) setTheme(view.theme);
  const signed = reference(view.run) !== null;
  for (const button of $("grid").querySelectorAll("button")) {
    const l = +button.dataset.layer, h = +button.dataset.head;
    button.setAttribute("aria-pressed", l === view.layer && (h === view.head || view.head === AVERAGE));
    if (!("layer" in change || "head" in change) || !show.drawn) paint(button.firstChild, values(view.run, l, h), signed);
  }
  for (const [id, key] of [["text", "text"], ["epoch", "epoch"], ["layer", "layer"], ["headselect", "head"], ["show", "show"],
    ["scale", "scale"], ["measure", "measure"], ["run", "run"], ["theme", "theme"]]) $(id).value = view[key];
  $("epochname").value = epochs[view.epoch];
  $("scale").disabled = reference(0) !== null;
  runs.forEach((_, r) => drawHead(r));
  drawCurves();
  writeFacts();
  show.drawn = true;
  document.body.dataset.view = JSON.stringify(view);
  try { history.replaceState(null, "", "#" + new URLSearchParams(view)); } catch { /* a sandboxed frame may not */ }
}

function fromFragment() {
  const asked = new URLSearchParams(location.hash.slice(1)), within = {text: texts.length, epoch: epochs.length, layer: nLayers,
    head: nHeads, run: runs.length}, found = {};
  for (const [key, count] of Object.entries(within)) {
    const value = parseInt(asked.get(key), 10);
    if (value >= (key === "head" && nHeads > 1 ? AVERAGE : 0) && value < count) found[key] = value;
  }
  for (const key of ["show", "scale", "measure", "theme"])
    if ([...$(key).options].some(option => option.value === asked.get(key))) found[key] = asked.get(key);
  return found;
}

let timer;
function play() {
  timer = timer ? clearInterval(timer) : setInterval(() => show({epoch: (view.epoch + 1) % epochs.length}), 800);
  $("play").textContent = timer ? "stop" : "play";
}

async function start() {
  document.querySelector("h1").textContent = title;
  for (const run of runs) {
    const bytes = await unpack(run.weights);
    run.packed = new Uint16Array(bytes.buffer, bytes.byteOffset, bytes.byteLength / 2);
    const line = document.createElement("div");
    line.textContent = (runs.length > 1 ? `${run.name}: ` : "attention ") + run.verdict;
    if (run.verdict) $("verdict").append(line);
  }
  $("notes").textContent = notes.join(" ");
  buildGrid();
  const option = (id, words, value) => $(id).add(new Option(words, value));
  texts.forEach((t, i) => option("text", `${t.name}: ${t.tokens.slice(0, 7).join(" ").slice(0, 48)}`, i));
  for (let l = 0; l < nLayers; l++) option("layer", l + 1, l);
  for (let h = 0; h < nHeads; h++) option("headselect", heads[h] + 1, h);
  if (nHeads > 1) option("headselect", "average", AVERAGE);
  option("show", "weights", "weights");
  const isWhole = epochs.at(-1) - epochs[0] === epochs.length - 1;
  if (epochs.length > 1) option("show", `change from the ${isWhole ? "" : "shown "}epoch before`, "previous");
  if (runs.length > 1) option("show", `difference from ${runs[0].name}`, "runs");
  if (epochs.length > 1) epochs.forEach((e, i) => option("show", `change from epoch ${e}`, `epoch ${i}`));
  Object.keys(runs[0].measures).forEach(name => option("measure", name, name));
  view.measure = Object.keys(runs[0].measures).find(name => name === "entropy") || Object.keys(runs[0].measures)[0] || "";
  runs.forEach((run, r) => {
    option("run", run.name, r);
    $("heads").append(Object.assign(document.createElement("div"), {id: `head${r}`, className: "head"}));
  });
  $("gridrun").hidden = runs.length < 2;
  $("epochs").hidden = epochs.length < 2;
  $("epoch").max = epochs.length - 1;
  for (const [id, key, number] of [["text", "text", 1], ["layer", "layer", 1], ["headselect", "head", 1], ["show", "show", 0],
    ["scale", "scale", 0], ["measure", "measure", 0], ["run", "run", 1], ["theme", "theme", 0]])
    $(id).onchange = e => show({[key]: number ? +e.target.value : e.target.value});
  $("epoch").oninput = e => show({epoch: +e.target.value});
  $("play").onclick = play;
  const around = (value, step, count) => (value + step + count) % count;
  const keys = {
    ArrowLeft: () => ({head: around(Math.max(view.head, 0), -1, nHeads)}), ArrowRight: () => ({head: around(Math.max(view.head, 0), 1, nHeads)}),
    ArrowUp: () => ({layer: around(view.layer, -1, nLayers)}), ArrowDown: () => ({layer: around(view.layer, 1, nLayers)}),
    ",": () => ({epoch: around(view.epoch, -1, epochs.length)}), ".": () => ({epoch: around(view.epoch, 1, epochs.length)}),
    a: () => ({head: view.head === AVERAGE || nHeads < 2 ? 0 : AVERAGE}), l: () => $("scale").disabled ? {} : {scale: view.scale === "log" ? "linear" : "log"},
    d: () => ({show: $("show").options[around($("show").selectedIndex, 1, $("show").options.length)].value}),
  };
  document.addEventListener("keydown", e => {
    if (e.target.matches("select, input") || e.ctrlKey || e.metaKey || e.altKey) return;
    if (e.key === " " && epochs.length > 1 && !e.target.matches("button")) { e.preventDefault(); play(); }
    if (!(e.key in keys)) return;
    e.preventDefault();
    show(keys[e.key]());
  });
  show(fromFragment());
}
