/** The base map: land, borders and towns from files of this server (Natural Earth), without glyphs or tiles from elsewhere. */

import { feature, mesh } from "./vendor/topojson-client.mjs";

const WATER = "#c9d1d6";
const LAND = "#f4f3ef";
const BORDER = "#8e979e";
const INK = "#27323b";
const SHOWN = ["<=", ["get", "rank"], ["step", ["zoom"], 1, 3.6, 2, 5, 3]]; // towns of each rank, by zoom
const FONT = ["system-ui, sans-serif"];

/** The layer below which rain is drawn: land lies under it, borders and names over it. */
export const ABOVE_RAIN = "borders";

const NOTHING = { type: "FeatureCollection", features: [] };
const source = (data) => ({ type: "geojson", data });

/** The MapLibre style; its land, borders and towns are empty until `fill`. */
export const STYLE = {
  version: 8,
  sources: {
    land: { ...source(NOTHING), attribution: "Natural Earth" },
    borders: source(NOTHING),
    coast: source(NOTHING),
    states: source(NOTHING),
    graticule: source(graticule(10)),
    towns: source(NOTHING),
  },
  layers: [
    { id: "water", type: "background", paint: { "background-color": WATER } },
    { id: "land", type: "fill", source: "land", paint: { "fill-color": LAND } },
    line("graticule", { "line-color": "#aab4bb", "line-width": 0.5, "line-opacity": 0.6 }),
    line("borders", { "line-color": BORDER, "line-width": ["interpolate", ["linear"], ["zoom"], 2, 0.6, 8, 1.6] }),
    line("states", { "line-color": BORDER, "line-width": 0.7, "line-dasharray": [3, 2] }, 3.5),
    line("coast", { "line-color": "#6d7880", "line-width": ["interpolate", ["linear"], ["zoom"], 2, 0.5, 8, 1.3] }),
    {
      id: "town-dots",
      type: "circle",
      source: "towns",
      filter: SHOWN,
      paint: { "circle-radius": 2.2, "circle-color": INK, "circle-stroke-color": "#fff", "circle-stroke-width": 1 },
    },
    {
      id: "towns",
      type: "symbol",
      source: "towns",
      filter: SHOWN,
      layout: {
        "text-field": ["get", "name"],
        "text-font": FONT,
        "text-size": ["interpolate", ["linear"], ["zoom"], 3, 11, 8, 14],
        "text-variable-anchor": ["left", "right", "top", "bottom"],
        "text-radial-offset": 0.45,
        "text-justify": "auto",
        "symbol-sort-key": ["get", "rank"],
      },
      paint: { "text-color": INK, "text-halo-color": "rgb(255 255 255 / 85%)", "text-halo-width": 1.4 },
    },
  ],
};

/** What is drawn from each file: a name for the reader, and the data by source. */
export const PARTS = [
  {
    name: "land and borders",
    file: "vendor/countries-50m.json",
    data: (world) => ({
      land: land(world),
      borders: onward(mesh(world, world.objects.countries, (a, b) => a !== b)),
      coast: onward(mesh(world, world.objects.countries, (a, b) => a === b)),
    }),
  },
  {
    name: "borders of states",
    file: "vendor/states-10m.json",
    data: (states) => ({ states: mesh(states, states.objects.states, (a, b) => a !== b) }),
  },
  { name: "towns", file: "places.json", data: (places) => ({ towns: towns(places) }) },
];

/** Draws one of the parts once its file has come. */
export async function fill(map, { file, data }) {
  const answer = await fetch(new URL(file, import.meta.url));
  if (!answer.ok) throw new Error(`${file}: ${answer.status}`);
  for (const [id, drawn] of Object.entries(data(await answer.json()))) map.getSource(id).setData(drawn);
}

/** The land, its coasts running on past 180 degrees. */
function land(world) {
  const { features } = feature(world, world.objects.land);
  return { type: "FeatureCollection", features: features.map((one) => ({ ...one, geometry: onward(one.geometry) })) };
}

/** The lines of a geometry running on past 180 degrees, where they would leap back across the map. */
function onward({ type, coordinates }) {
  const unwrap = (part) => {
    if (Array.isArray(part[0][0])) return part.map(unwrap);
    let turns = 0;
    return part.map(([lon, lat], i) => {
      if (i) turns -= Math.round((lon - part[i - 1][0]) / 360);
      return [lon + 360 * turns, lat];
    });
  };
  return { type, coordinates: unwrap(coordinates) };
}

function line(id, paint, minzoom = 0) {
  return { id, type: "line", source: id, minzoom, paint, layout: { "line-join": "round" } };
}

/** Meridians and parallels, `step` degrees apart. */
function graticule(step) {
  const lines = [];
  for (let lon = -180; lon <= 180; lon += step) lines.push([[lon, -80], [lon, 80]]);
  for (let lat = -80; lat <= 80; lat += step) lines.push([[-180, lat], [180, lat]]);
  return { type: "MultiLineString", coordinates: lines };
}

function towns(places) {
  return {
    type: "FeatureCollection",
    features: places.map(([name, lat, lon, rank]) => ({
      type: "Feature",
      properties: { name, rank },
      geometry: { type: "Point", coordinates: [lon, lat] },
    })),
  };
}
