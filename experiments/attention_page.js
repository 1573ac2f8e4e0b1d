const {title, tokens, epochs, shape: [nEpochs, nLayers, nHeads, n]} = payload;
const $ = id => document.getElementById(id);
const view = {epoch: nEpochs - 1, layer: 0, head: 0, scale: "linear"};
let packed;
const offset = (e, l, h) => ((e * nLayers + l) * nHeads + h) * n * n;
const weight = (e, l, h, q, k) => packed[offset(e, l, h) + q * n + k] / 255;
// Plotly reads tags and entities in labels, so a token such as <b> must arrive escaped.
const escaped = t => t.replace(/&/g, "&amp;").replace(/</g, "&lt;").replace(/>/g, "&gt;");

function paint(canvas, e, l, h) {
  const context = canvas.getContext("2d"), image = context.createImageData(n, n);
  for (let q = 0; q < n; q++) for (let k = 0; k < n; k++) {
    const i = 4 * (q * n + k), w = k <= q ? Math.sqrt(weight(e, l, h, q, k)) : 0;
    image.data[i] = dark ? 40 + 200 * w : 245 - 225 * w;
    image.data[i + 1] = dark ? 46 + 160 * w : 247 - 190 * w;
    image.data[i + 2] = dark ? 56 + 60 * w : 250 - 90 * w;
    image.data[i + 3] = k <= q ? 255 : 0;
  }
  context.putImageData(image, 0, 0);
}

function buildGrid() {
  const grid = $("grid");
  grid.style.gridTemplateColumns = `auto repeat(${nHeads}, auto)`;
  grid.append(document.createElement("span"));
  for (let h = 0; h < nHeads; h++) grid.append(Object.assign(document.createElement("span"), {textContent: `head ${h + 1}`}));
  for (let l = 0; l < nLayers; l++) {
    grid.append(Object.assign(document.createElement("span"), {textContent: `layer ${l + 1}`}));
    for (let h = 0; h < nHeads; h++) {
      const button = document.createElement("button");
      button.append(Object.assign(document.createElement("canvas"), {width: n, height: n}));
      button.title = `layer ${l + 1}, head ${h + 1}`;
      button.dataset.layer = l; button.dataset.head = h;
      button.onclick = () => show({layer: l, head: h});
      grid.append(button);
    }
  }
}

function show(change) {
  const epochChanged = "epoch" in change || !show.drawn;
  Object.assign(view, change);
  for (const button of $("grid").querySelectorAll("button")) {
    const l = +button.dataset.layer, h = +button.dataset.head;
    button.setAttribute("aria-pressed", l === view.layer && h === view.head);
    if (epochChanged) paint(button.firstChild, view.epoch, l, h);
  }
  $("epoch").value = view.epoch; $("epochname").value = epochs[view.epoch];
  $("layer").value = view.layer; $("headselect").value = view.head; $("scale").value = view.scale;
  const log = view.scale === "log", z = [], shown = [];
  for (let q = 0; q < n; q++) {
    z.push([]); shown.push([]);
    for (let k = 0; k < n; k++) {
      const w = k <= q ? weight(view.epoch, view.layer, view.head, q, k) : null;
      shown[q].push(w);
      z[q].push(w === null ? null : log ? Math.log10(Math.max(w, 1 / 510)) : w);
    }
  }
  const places = [...tokens.keys()], labels = tokens.map(escaped);
  const axis = {tickvals: places, ticktext: labels, tickfont: {size: n > 48 ? 7 : 10}, gridcolor: "rgba(0,0,0,0)", zeroline: false};
  Plotly.react("head", [{
    type: "heatmap", z, customdata: shown, x: places, y: places, colorscale: dark ? "Cividis" : "YlGnBu", reversescale: !dark,
    zmin: log ? -2.7 : 0, zmax: log ? 0 : undefined, colorbar: {title: {text: log ? "log10" : "weight"}, thickness: 12},
    text: places.map(q => places.map(k => `${labels[q]} looks at ${labels[k]}`)),
    hovertemplate: "%{text}<br>weight %{customdata:.3f} (± 0.002)<extra></extra>",
  }], {
    ...look, margin: {l: 90, r: 10, t: 40, b: 90},
    title: {text: `epoch ${epochs[view.epoch]}, layer ${view.layer + 1}, head ${view.head + 1}`, font: {size: 14}},
    xaxis: {...axis, tickangle: -60, title: {text: "looked at"}},
    yaxis: {...axis, autorange: "reversed", title: {text: "reading"}, scaleanchor: "x"},
  }, {displaylogo: false, responsive: true});
  show.drawn = true;
  document.body.dataset.view = JSON.stringify(view);
}

async function start() {
  document.querySelector("h1").textContent = title;
  packed = await unpack(payload.weights);
  buildGrid();
  for (const [id, count] of [["layer", nLayers], ["headselect", nHeads]])
    for (let i = 0; i < count; i++) $(id).add(new Option(i + 1, i));
  $("epochs").hidden = nEpochs < 2;
  $("epoch").max = nEpochs - 1;
  $("epoch").oninput = e => show({epoch: +e.target.value});
  $("layer").onchange = e => show({layer: +e.target.value});
  $("headselect").onchange = e => show({head: +e.target.value});
  $("scale").onchange = e => show({scale: e.target.value});
  document.addEventListener("keydown", e => {
    if (e.target.matches("select, input")) return;
    const step = {ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0]}[e.key];
    if (!step) return;
    e.preventDefault();
    show({layer: (view.layer + step[0] + nLayers) % nLayers, head: (view.head + step[1] + nHeads) % nHeads});
  });
  show({});
}
