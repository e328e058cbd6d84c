/** The map page: rain on a map, a slider over lead times, and the forecast at a place. */

import { LngLatBounds, Map, Marker, NavigationControl, ScaleControl, AttributionControl } from "./vendor/maplibre-gl.mjs";
import { ABOVE_RAIN, basemap } from "./basemap.mjs";
import { chances, percent, rates, svg } from "./chart.mjs";

const HOME = new URL(".", document.baseURI).href;
const RUNS_EVERY = 20_000; // ms
const FRAME_EVERY = 700; // ms of playing
const HELD = 16; // lead times whose tiles stay loaded
const OPACITY = 0.85;
const FIRST_SHOWN = "probability_of_exceedance_1";

const page = Object.fromEntries([...document.querySelectorAll("[id]")].map((element) => [element.id, element]));

const state = {
  runs: [],
  legends: {},
  run: null,
  following: true, // the newest run
  quantity: FIRST_SHOWN,
  lead: 0,
  playing: 0, // the timer
  place: null, // { lng, lat, forecast }
  layers: [], // ids, the longest unused first
};

if (!document.createElement("canvas").getContext("webgl2")) {
  say(`The map needs WebGL 2, which this browser lacks or has switched off. The same numbers are at ${HOME}?f=json`);
  throw new Error("no WebGL 2");
}
const map = new Map({
  container: "map",
  style: await basemap(),
  bounds: [[-12, 36], [30, 60]],
  attributionControl: false,
  dragRotate: false,
  pitchWithRotate: false,
  touchPitch: false,
  renderWorldCopies: false,
  maxZoom: 12,
  fadeDuration: 0,
});
map.touchZoomRotate.disableRotation();
map.addControl(new NavigationControl({ showCompass: false }), "bottom-right");
map.addControl(new ScaleControl(), "bottom-right");
map.addControl(new AttributionControl({ compact: false }), "bottom-right");
const pin = new Marker({ element: Object.assign(document.createElement("div"), { className: "pin" }) });

// What is asked of the server

async function ask(path) {
  const answer = await fetch(HOME + path, { headers: { accept: "application/json" } });
  const body = await answer.json();
  if (!answer.ok) throw new Error(body.detail ?? answer.statusText);
  return body;
}

async function refresh() {
  try {
    const { runs, legends } = await ask("runs");
    Object.assign(state, { runs, legends });
    say("");
  } catch {
    say("The server does not answer. The map shows what was loaded before.");
    return;
  }
  if (!state.runs.length) {
    say("There is no forecast yet. This page looks again by itself.");
    return;
  }
  const kept = state.following ? null : state.runs.find(({ name }) => name === state.run?.name);
  choose(kept ?? state.runs[0]);
}

// Runs, quantities and times

function choose(run) {
  const before = state.run;
  const shown = before?.leads[state.lead]?.valid_time;
  state.run = run;
  fillRuns();
  tellAge();
  if (before && made(before) === made(run)) return;
  fillQuantities();
  const same = run.leads.findIndex(({ valid_time: time }) => time === shown);
  state.lead = Math.max(0, same);
  fillSlider();
  drawDomain(run);
  if (!before || String(before.bounds) !== String(run.bounds)) lookAt(run);
  show();
  if (state.place) askPoint(state.place);
}

/** Which making of the run it is: one may be made anew under its name. */
const made = ({ name, made_by: { created } }) => `${name} ${created}`;

function fillRuns() {
  const options = state.runs.map(({ name, init_time: time }) => option(name, time_(time)));
  page.run.replaceChildren(...options);
  page.run.value = state.run.name;
}

function fillQuantities() {
  const names = state.run.quantities.map(({ name }) => name);
  if (!names.includes(state.quantity)) [state.quantity] = names;
  const groups = [["Probability", "probability"], ["Rain rate", "rate"]].map(([label, kind]) => {
    const group = Object.assign(document.createElement("optgroup"), { label });
    group.append(...state.run.quantities.filter((q) => q.kind === kind).map(({ name, label: text }) => option(name, text)));
    return group;
  });
  page.quantity.replaceChildren(...groups);
  page.quantity.value = state.quantity;
}

function option(value, text) {
  return Object.assign(document.createElement("option"), { value, textContent: text });
}

function fillSlider() {
  const { leads } = state.run;
  page.lead.max = leads.length - 1;
  page.lead.disabled = leads.length < 2;
  page.play.disabled = leads.length < 2;
  const every = Math.ceil(leads.length / (window.innerWidth < 720 ? 5 : 9));
  page.ticks.replaceChildren(
    ...leads.flatMap(({ lead_time: minutes }, i) => {
      if (i % every) return [];
      const tick = Object.assign(document.createElement("span"), { textContent: `+${minutes}` });
      tick.style.left = `${(100 * i) / Math.max(1, leads.length - 1)}%`;
      return [tick];
    }),
  );
}

function tellAge() {
  const { stale, degraded, observed_until: time, made_by: by } = state.run;
  const isOld = stale && state.run.name === state.runs[0].name;
  const old = isOld ? `Old data: what the newest forecast knows was observed ${age(time)}. ` : "";
  const missing = degraded ? by.inputs_missing.split(" ").map((each) => text(each, { ...CLOCK, timeZone: "UTC" })) : [];
  say(old + (degraded ? `This forecast was made without the radar frames of ${missing.join(", ")} UTC.` : ""));
}

function say(text) {
  page.notice.hidden = !text;
  if (page.notice.textContent !== text) page.notice.textContent = text;
}

function age(time) {
  const minutes = Math.round((Date.now() - Date.parse(time)) / 60_000);
  if (minutes < 120) return `${minutes} minutes ago`;
  return minutes < 2880 ? `${Math.round(minutes / 60)} hours ago` : `on ${text(time, DATE)}`;
}

const DAY = { weekday: "short", day: "numeric", month: "short" };
const DATE = { day: "numeric", month: "short", year: "numeric" };
const CLOCK = { hour: "2-digit", minute: "2-digit", hourCycle: "h23" };
const text = (time, format) => new Intl.DateTimeFormat("en-GB", format).format(new Date(time)).replace(",", "");
const time_ = (time) => `${text(time, { ...DATE, ...CLOCK, timeZone: "UTC" })} UTC`;

// Rain on the map

function show() {
  const { leads } = state.run;
  const current = leads[state.lead];
  page.lead.value = state.lead;
  page.lead.setAttribute("aria-valuetext", `${time_(current.valid_time)}, ${current.lead_time} minutes ahead`);
  page.local.textContent = text(current.valid_time, { ...DAY, ...CLOCK, timeZoneName: "short" });
  page.utc.textContent = `${text(current.valid_time, { ...CLOCK, timeZone: "UTC" })} UTC \u00b7 +${current.lead_time} min`;
  drawLegend();
  if (state.place?.forecast) drawPoint();
  drawRain();
}

/** The current lead time, and unseen, so that the slider finds them loaded, the ones beside it. */
function drawRain() {
  const { leads } = state.run;
  const near = [-1, 2, 1, 0].map((step) => (state.lead + step + leads.length) % leads.length);
  for (const i of new Set(near)) hold(leads[i].lead_time);
  const now = layerOf(leads[state.lead].lead_time);
  for (const id of state.layers) map.setPaintProperty(id, "raster-opacity", id === now ? OPACITY : 0);
  const isStray = (id) => !id.startsWith(`${made(state.run)}/`);
  while (state.layers.length > HELD || state.layers.some(isStray)) {
    const stray = state.layers.findIndex(isStray);
    const [id] = state.layers.splice(Math.max(0, stray), 1);
    map.removeLayer(id);
    map.removeSource(id);
  }
}

const layerOf = (minutes) => `${made(state.run)}/${state.quantity}/${minutes}`;

function hold(minutes) {
  const id = layerOf(minutes);
  const known = state.layers.indexOf(id);
  if (known >= 0) {
    state.layers.push(...state.layers.splice(known, 1));
    return;
  }
  const { west, south, east, north } = reach(state.run);
  const { cell_size: metres } = state.run;
  const equator = 156_543; // metres a pixel at zoom 0 on the equator
  const finest = Math.log2((equator * Math.cos((((south + north) / 2) * Math.PI) / 180)) / metres) + 2;
  map.addSource(id, {
    type: "raster",
    tiles: [`${HOME}tiles/${state.run.name}/${state.quantity}/${minutes}/{z}/{x}/{y}.png?gaps=hatched`],
    tileSize: 256,
    maxzoom: Math.min(12, Math.max(1, Math.ceil(finest))),
    bounds: [east > 180 ? -180 : west, Math.max(-85, south), Math.min(180, east), Math.min(85, north)],
  });
  map.addLayer(
    {
      id,
      type: "raster",
      source: id,
      paint: {
        "raster-opacity": 0,
        "raster-opacity-transition": { duration: 0 },
        "raster-fade-duration": 0,
        "raster-resampling": "nearest",
      },
    },
    ABOVE_RAIN,
  );
  state.layers.push(id);
}

/** Where the run lies, in degrees; east is above 180 where it crosses it. */
function reach({ bounds: [west, south, east, north] }) {
  return { west, south, east: west > east ? east + 360 : east, north };
}

function drawDomain({ outline }) {
  const data = { type: "LineString", coordinates: outline };
  if (map.getSource("domain")) {
    map.getSource("domain").setData(data);
    return;
  }
  map.addSource("domain", { type: "geojson", data });
  map.addLayer({
    id: "domain",
    type: "line",
    source: "domain",
    paint: { "line-color": "#27323b", "line-width": 1.4, "line-dasharray": [4, 3] },
  });
}

function lookAt(run) {
  const { west, south, east, north } = reach(run);
  const wide = window.innerWidth > 720;
  const padding = wide ? { top: 30, bottom: 110, left: 40, right: 40 } : { top: 90, bottom: 130, left: 12, right: 12 };
  map.setRenderWorldCopies(east > 180); // else the map ends there
  map.fitBounds(new LngLatBounds([west, Math.max(-80, south)], [east, Math.min(80, north)]), { padding, animate: false });
}

function drawLegend() {
  const quantity = state.run.quantities.find(({ name }) => name === state.quantity);
  const { units, entries } = state.legends[quantity.kind];
  const items = entries.map(({ from, colour }) => {
    const item = document.createElement("li");
    item.append(svg("svg", {}, [svg("rect", { width: "100%", height: "100%", fill: colour })]), String(from));
    return item;
  });
  const list = document.createElement("ol");
  list.append(...items);
  const title = Object.assign(document.createElement("div"), { className: "units", textContent: units });
  const gaps = Object.assign(document.createElement("div"), { className: "gaps", title: "Beyond what the radars saw, or where rain arrives from there" });
  const hatch = [0, 7, 14, 21, 28].map((x) => svg("path", { d: `M${x},0L${x - 15},15`, stroke: "#7d8790", "stroke-width": 1.4 }));
  gaps.append(svg("svg", { viewBox: "0 0 22 15" }, hatch), "no forecast");
  page.legend.replaceChildren(title, list, gaps);
}

// The forecast at a place

async function askPoint({ lng, lat }) {
  state.place = { lng, lat, forecast: null };
  pin.setLngLat([lng, lat]).addTo(map);
  page.point.hidden = false;
  try {
    const answer = await ask(`forecast?lat=${lat.toFixed(5)}&lon=${lng.toFixed(5)}&run=${state.run.name}`);
    if (state.place.lng !== lng || state.place.lat !== lat) return;
    state.place.forecast = answer.forecast;
    drawPoint();
  } catch (error) {
    page["point-content"].replaceChildren(heading(), paragraph(sentence(error.message)));
  }
}

function drawPoint() {
  const { forecast } = state.place;
  const nothing = forecast.every((at) => at.rainfall_rate_median === null);
  if (nothing) {
    const why = "No forecast here: no radar sees this place, or the rain that reaches it comes from where none does. That does not mean it stays dry.";
    page["point-content"].replaceChildren(heading(), paragraph(why));
    return;
  }
  const legend = state.legends.probability.entries.map(({ colour }) => colour);
  const count = Object.keys(forecast[0].probability_of_exceedance).length;
  const colours = Array.from({ length: count }, (_, i) => legend[Math.round(3 + ((legend.length - 4) * i) / Math.max(1, count - 1))]);
  page["point-content"].replaceChildren(
    heading(),
    sub("Chance of at least \u2026 mm/h"),
    chances(forecast, state.lead, colours),
    sub("Rain rate in mm/h: median and spread"),
    rates(forecast, state.lead),
    numbers(forecast),
  );
}

function heading() {
  const { lng, lat } = state.place;
  const side = (value, positive, negative) => `${Math.abs(value).toFixed(2)}\u00b0 ${value < 0 ? negative : positive}`;
  return Object.assign(document.createElement("h2"), { textContent: `${side(lat, "N", "S")}, ${side(lng, "E", "W")}` });
}

const sub = (words) => Object.assign(document.createElement("h3"), { textContent: words });
const paragraph = (words) => Object.assign(document.createElement("p"), { textContent: words });
const sentence = (words) => `${words[0].toUpperCase()}${words.slice(1)}.`;

/** The same numbers as a table. */
function numbers(forecast) {
  const thresholds = Object.keys(forecast[0].probability_of_exceedance).sort((a, b) => a - b);
  const head = row("th", ["UTC", ...thresholds.map((threshold) => `\u2265 ${threshold}`), "median"]);
  const rows = forecast.map((at) =>
    row("td", [
      text(at.valid_time, { ...CLOCK, timeZone: "UTC" }),
      ...thresholds.map((threshold) => cell(at.probability_of_exceedance[threshold], (p) => percent(Math.round(100 * p) / 100))),
      cell(at.rainfall_rate_median, (rate) => rate.toFixed(1)),
    ]),
  );
  const table = document.createElement("table");
  table.createTHead().append(head);
  table.createTBody().append(...rows);
  const scroll = Object.assign(document.createElement("div"), { className: "scroll" });
  scroll.append(table);
  const details = document.createElement("details");
  details.append(Object.assign(document.createElement("summary"), { textContent: "Numbers" }), scroll);
  details.open = Boolean(page.point.querySelector("details")?.open);
  return details;
}

const cell = (value, write) => (value === null ? "\u2013" : write(value));

function row(tag, words) {
  const line = document.createElement("tr");
  line.append(...words.map((word) => Object.assign(document.createElement(tag), { textContent: word })));
  return line;
}

function closePoint() {
  state.place = null;
  pin.remove();
  page.point.hidden = true;
}

// What the reader does

function step(by) {
  if (!state.run) return;
  const count = state.run.leads.length;
  state.lead = (state.lead + by + count) % count;
  show();
}

function play(on) {
  clearInterval(state.playing);
  state.playing = on ? setInterval(() => step(1), FRAME_EVERY) : 0;
  page.play.setAttribute("aria-pressed", String(on));
  page.play.setAttribute("aria-label", on ? "Pause" : "Play");
}

page.lead.addEventListener("input", () => {
  play(false);
  state.lead = Number(page.lead.value);
  show();
});
page.play.addEventListener("click", () => play(!state.playing));
page.quantity.addEventListener("change", () => {
  state.quantity = page.quantity.value;
  show();
});
page.run.addEventListener("change", () => {
  state.following = page.run.value === state.runs[0].name;
  choose(state.runs.find(({ name }) => name === page.run.value));
});
page.close.addEventListener("click", closePoint);
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape") closePoint();
  const elsewhere = event.target !== document.body;
  if (elsewhere || event.ctrlKey || event.metaKey || event.altKey) return;
  if (event.key === "ArrowRight") step(1);
  if (event.key === "ArrowLeft") step(-1);
  if (event.key === " ") play(!state.playing);
});

map.on("load", async () => {
  map.getCanvas().setAttribute("aria-label", "Map; arrow keys move it, Enter asks for the forecast at its centre");
  map.getCanvas().addEventListener("keydown", (event) => {
    if (event.key === "Enter" && state.run) askPoint(map.getCenter().wrap());
  });
  map.on("click", ({ lngLat }) => state.run && askPoint(lngLat.wrap()));
  await refresh();
  setInterval(refresh, RUNS_EVERY);
});
