/** The map page: rain on a map, a slider over lead times, and the forecast at a place. */

import {
  addProtocol,
  AttributionControl,
  LngLatBounds,
  Map,
  Marker,
  NavigationControl,
  ScaleControl,
} from "./vendor/maplibre-gl.mjs";
import { ABOVE_RAIN, fill, PARTS, STYLE } from "./basemap.mjs";
import { chances, key, percent, rates, svg } from "./chart.mjs";
import { ask, get, HOME } from "./server.mjs";

const RUNS_EVERY = 20_000; // ms
const FRAME_EVERY = 700; // ms of playing
const HELD = 16; // lead times whose tiles stay loaded
const OPACITY = 0.85;
const RAIN = "rain://"; // the protocol of its tiles
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
  place: null, // { lng, lat, forecast, failure }
  layers: [], // ids, the longest unused first
  failed: new Set(), // addresses of tiles that were not had
  gaps: [], // { layer, tile }: what is drawn in their stead
  unfolded: false, // the table of the point
  again: 0, // the timer of asking for them
  parts: PARTS.map((part) => ({ ...part, is: "coming" })), // of the base map; in the end drawn or lacking
  trouble: "", // why there are no newer runs
};

if (!document.createElement("canvas").getContext("webgl2")) {
  say(`The map needs WebGL 2, which this browser lacks or has switched off. The same numbers are at ${HOME}?f=json`);
  throw new Error("no WebGL 2");
}
const map = new Map({
  container: "map",
  style: STYLE,
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
page.controls.append(document.querySelector(".maplibregl-ctrl-bottom-right")); // where no panel covers them
const pin = new Marker({ element: Object.assign(document.createElement("div"), { className: "pin" }) });

// What is asked of the server

async function refresh() {
  try {
    const { runs, legends } = await ask("runs");
    Object.assign(state, { runs, legends, trouble: "" });
  } catch (failure) {
    state.trouble = sentence(failure.message) + (state.run ? " The map shows what was loaded before." : "");
    tell();
    return;
  }
  askAgain();
  if (!state.runs.length) {
    state.trouble = "There is no forecast yet.";
    tell();
    return;
  }
  const kept = state.following ? null : state.runs.find(({ name }) => name === state.run?.name);
  state.following = !kept;
  choose(kept ?? state.runs[0]);
}

/** Asks once more for what was not had. */
function askAgain() {
  for (const { layer, tile } of state.gaps) map.refreshTiles(layer, [tile.tileID.canonical]);
  for (const part of state.parts) if (part.is === "lacking") draw(part);
  if (state.place?.failure?.passing) fetchPoint(state.place);
}

function askAgainIn(seconds) {
  if (!seconds || state.again) return;
  state.again = setTimeout(() => {
    state.again = 0;
    askAgain();
  }, 1000 * seconds);
}

async function draw(part) {
  try {
    await fill(map, part);
    part.is = "drawn";
  } catch {
    part.is = "lacking";
  }
  tell();
}

// Runs, quantities and times

function choose(run) {
  const before = state.run;
  const shown = before?.leads[state.lead]?.valid_time;
  state.run = run;
  fillRuns();
  if (before && made(before) === made(run)) {
    tell();
    return;
  }
  fillQuantities();
  const same = run.leads.findIndex(({ valid_time: time }) => time === shown);
  state.lead = Math.max(0, same);
  fillSlider();
  drawDomain(run);
  drawLegend();
  tell();
  if (!before || String(before.bounds) !== String(run.bounds)) lookAt(run);
  show();
  if (state.place) askPoint(state.place);
}

/** Which making of the run it is: one may be made anew under its name. */
const made = ({ name, made_by: { created } }) => `${name} ${created}`;

function fillRuns() {
  const options = state.runs.map(({ name, init_time: time }) => option(name, time_(time)));
  if (options.some(({ value }, i) => value !== page.run.options[i]?.value)) page.run.replaceChildren(...options);
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

/** All that the reader must know before trusting the map, in one notice. */
function tell() {
  const { run, trouble } = state;
  const known = run ? [ofAge(run), ofInputs(run)] : [trouble ? "" : "The forecast is loading."];
  const owed = [trouble, run && ofGaps(), ofBasemap()].filter(Boolean);
  const again = owed.length && "This page asks again by itself.";
  say([...known, ...owed, again, ofParts()].filter(Boolean).join(" "));
}

function ofAge({ name, stale, observed_until: time }) {
  const [newest] = state.runs;
  if (newest && newest.name !== name) return `This is an old forecast; the newest is that of ${time_(newest.init_time)}.`;
  return stale && `Old data: what the newest forecast knows was observed at ${time_(time)}${age(time)}.`;
}

function ofInputs({ degraded, made_by: by }) {
  if (!degraded) return "";
  const [frames, sources] = [by.inputs_missing, by.sources_missing].map((told = "none") => (told === "none" ? [] : told.split(" ")));
  const times = frames.map((each) => text(each, CLOCK)).join(", ");
  const lacking = [times && `the radar frames of ${times} UTC`, sources.join(", ")].filter(Boolean);
  return `This forecast was made without ${lacking.join(" and ")}.`;
}

function ofGaps() {
  const now = layerOf(state.run.leads[state.lead].lead_time);
  const isSeen = state.gaps.some(({ layer, tile }) => layer === now && tile.uses > 0);
  return isSeen && "Part of the map did not load: it is hatched in red, and may be wet or dry.";
}

function ofBasemap() {
  const lacking = state.parts.filter(({ is }) => is === "lacking").map(({ name }) => name);
  return lacking.length && `The map is without its ${lacking.join(", ")}, which did not load.`;
}

const ofParts = () => (state.parts.some(({ is }) => is === "coming") ? "The base map is loading." : "");

function say(text) {
  page.notice.hidden = !text;
  if (page.notice.textContent !== text) page.notice.textContent = text;
}

/** How long ago, so roughly that the words seldom change; of what lies days back, its date says enough. */
function age(time) {
  const minutes = (Date.now() - Date.parse(time)) / 60_000;
  if (minutes < 60) return `, more than ${5 * Math.floor(minutes / 5)} minutes ago`;
  if (minutes < 120) return ", more than an hour ago";
  return minutes < 2880 ? `, more than ${Math.floor(minutes / 60)} hours ago` : "";
}

const DAY = { weekday: "short", day: "numeric", month: "short" };
const DATE = { day: "numeric", month: "short", year: "numeric" };
const CLOCK = { hour: "2-digit", minute: "2-digit", hourCycle: "h23" };
/** In UTC unless the format names another zone. */
const text = (time, format) =>
  new Intl.DateTimeFormat("en-GB", { timeZone: "UTC", ...format }).format(new Date(time)).replace(",", "");
const time_ = (time) => `${text(time, { ...DATE, ...CLOCK })} UTC`;

// Rain on the map

function show() {
  const { leads } = state.run;
  const current = leads[state.lead];
  page.lead.value = state.lead;
  page.lead.setAttribute("aria-valuetext", `${time_(current.valid_time)}, ${current.lead_time} minutes ahead`);
  page.local.textContent = text(current.valid_time, { ...DAY, ...CLOCK, timeZone: undefined, timeZoneName: "short" });
  page.utc.textContent = `${text(current.valid_time, CLOCK)} UTC \u00b7 +${current.lead_time} min`;
  if (state.place?.forecast) drawPoint();
  drawRain();
  tellLoading();
  tell();
}

function tellLoading() {
  const now = layerOf(state.run.leads[state.lead].lead_time);
  page.loading.hidden = !state.layers.includes(now) || map.isSourceLoaded(now);
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
    state.gaps = state.gaps.filter(({ layer }) => layer !== id);
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
    tiles: [`${RAIN}tiles/${state.run.name}/${state.quantity}/${minutes}/{z}/{x}/{y}.png?gaps=hatched`],
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

/** A tile of rain; red lines where none is to be had, since nothing at all would look dry. */
addProtocol("rain", async ({ url }, { signal }) => {
  const decode = async (answer) => createImageBitmap(await answer.blob());
  try {
    const data = await get(url.replace(RAIN, HOME), decode, signal);
    state.failed.delete(url);
    return { data };
  } catch (failure) {
    if (signal.aborted) throw failure;
    state.failed.add(url);
    askAgainIn(failure.wait);
    return { data: hatch() };
  }
});

function hatch() {
  const canvas = new OffscreenCanvas(256, 256);
  const pen = canvas.getContext("2d");
  pen.strokeStyle = "#c0392b";
  pen.lineWidth = 2;
  for (let x = -256; x < 256; x += 32) {
    pen.moveTo(x, 0);
    pen.lineTo(x + 256, 256);
  }
  pen.stroke();
  return canvas.transferToImageBitmap();
}

/** Keeps whether it is rain or lines that a tile has been given. */
function keep(layer, tile) {
  const { x, y, z } = tile.tileID.canonical;
  const [address] = map.getSource(layer).tiles;
  state.gaps = state.gaps.filter((gap) => gap.tile !== tile);
  if (state.failed.has(address.replace("{z}/{x}/{y}", `${z}/${x}/${y}`))) state.gaps.push({ layer, tile });
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
  const { left, top, right, bottom } = page.sight.getBoundingClientRect();
  const padding = { left, top, right: window.innerWidth - right, bottom: window.innerHeight - bottom };
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
  const title = Object.assign(document.createElement("div"), { className: "units", textContent: `${quantity.label}, ${units}` });
  const why = "Beyond what the radars saw, or where rain arrives from there";
  const gaps = Object.assign(document.createElement("div"), { className: "gaps", title: why });
  const hatch = [0, 7, 14, 21, 28].map((x) => svg("path", { d: `M${x},0L${x - 15},15`, stroke: "#7d8790", "stroke-width": 1.4 }));
  gaps.append(svg("svg", { viewBox: "0 0 22 15" }, hatch), "no forecast");
  page.legend.replaceChildren(title, list, gaps);
}

// The forecast at a place

/** Asks for a place that the reader points at, and keeps it in sight. */
async function pick(place) {
  const asked = askPoint(place);
  keepInSight();
  await asked;
  keepInSight();
}

async function askPoint({ lng, lat }) {
  state.place = { lng, lat, forecast: null, failure: null };
  pin.setLngLat([lng, lat]).addTo(map);
  page.point.hidden = false;
  drawPoint();
  await fetchPoint(state.place);
}

/** Fills the panel, unless the place is no longer asked for when the answer comes. */
async function fetchPoint(place) {
  const { lng, lat } = place;
  const question = `forecast?lat=${lat.toFixed(5)}&lon=${lng.toFixed(5)}&run=${state.run.name}`;
  const answer = await ask(question).catch((failure) => ({ failure }));
  if (state.place !== place) return;
  Object.assign(place, { forecast: null, failure: null }, answer);
  askAgainIn(place.failure?.wait);
  drawPoint();
}

/** Moves the map no more than it must for the pin to stand clear of the panels. */
function keepInSight() {
  if (!state.place) return;
  const { left, top, right, bottom } = page.sight.getBoundingClientRect();
  const at = pin.getElement().getBoundingClientRect();
  const beyond = (from, to, low, high) => Math.min(0, from - low) || Math.max(0, Math.min(to - high, from - low));
  const by = [beyond(at.left, at.right, left, right), beyond(at.top, at.bottom, top, bottom)];
  if (by.some(Boolean)) map.panBy(by);
}

function drawPoint() {
  const { forecast, failure } = state.place;
  const missing = forecast?.every((at) => at.rainfall_rate_median === null) && NO_FORECAST;
  const again = failure?.passing ? "; this page asks again by itself" : "";
  const words = failure ? sentence(failure.message + again) : forecast ? missing : "Loading\u2026";
  page["point-content"].replaceChildren(heading(), ...(words ? [paragraph(words)] : drawings(forecast)));
  const heard = `Forecast of ${placed()}: ${words || "loaded."}`; // that it moves on while playing is not worth a word
  if (page.heard.textContent !== heard) page.heard.textContent = heard;
}

const NO_FORECAST =
  "No forecast here: no radar sees this place, or the rain that reaches it comes from where none does. " +
  "That does not mean it stays dry.";

function drawings(forecast) {
  return [
    figure("Chance of at least \u2026 mm/h", chances(forecast, state.lead)),
    figure("Rain rate in mm/h", rates(forecast, state.lead), paragraph(key(forecast))),
    numbers(forecast),
  ];
}

function figure(title, ...parts) {
  const element = document.createElement("figure");
  element.append(Object.assign(document.createElement("h3"), { textContent: title }), ...parts);
  return element;
}

const heading = () => Object.assign(document.createElement("h2"), { textContent: placed() });

function placed() {
  const { lng, lat } = state.place;
  const side = (value, positive, negative) => `${Math.abs(value).toFixed(2)}\u00b0 ${value < 0 ? negative : positive}`;
  return `${side(lat, "N", "S")}, ${side(lng, "E", "W")}`;
}

const paragraph = (words) => Object.assign(document.createElement("p"), { textContent: words });
const sentence = (words) => `${words[0].toUpperCase()}${words.slice(1)}.`;

/** The same numbers as a table. */
function numbers(forecast) {
  const thresholds = Object.keys(forecast[0].probability_of_exceedance).sort((a, b) => a - b);
  const head = row("th", ["UTC", ...thresholds.map((threshold) => `\u2265 ${threshold}`), "median"]);
  const rows = forecast.map((at) =>
    row("td", [
      text(at.valid_time, CLOCK),
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
  details.open = state.unfolded;
  details.addEventListener("toggle", () => (state.unfolded = details.open));
  return details;
}

const cell = (value, write) => (value === null ? "\u2013" : write(value));

function row(tag, words) {
  const line = document.createElement("tr");
  line.append(...words.map((word) => Object.assign(document.createElement(tag), { textContent: word })));
  return line;
}

function closePoint() {
  if (page.point.contains(document.activeElement)) map.getCanvas().focus({ preventScroll: true });
  state.place = null;
  pin.remove();
  page.point.hidden = true;
  page.heard.textContent = "";
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
  drawLegend();
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
    if (event.key === "Enter" && state.run) pick(map.getCenter().wrap());
  });
  map.on("click", ({ lngLat }) => state.run && pick(lngLat.wrap()));
  map.on("sourcedata", ({ sourceId, tile }) => {
    if (tile && state.layers.includes(sourceId)) keep(sourceId, tile);
  });
  map.on("sourcedataloading", () => state.run && tellLoading());
  map.on("idle", () => {
    if (!state.run) return;
    tellLoading();
    tell();
  });
  state.parts.forEach(draw);
  await refresh();
  setInterval(refresh, RUNS_EVERY);
});
