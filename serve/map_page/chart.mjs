/** Charts of the forecast at one place, as SVG: chances of rain, and the spread of the rate, by valid time. */

const NAMESPACE = "http://www.w3.org/2000/svg";
const WIDTH = 320;
const HEIGHT = 132;
const FRAME = { left: 40, right: 56, top: 10, bottom: 20 };
const RATE = "#1f6fae";
const RISING = ["#1b9184", "#26828e", "#31688e", "#3e4989", "#482878", "#440154"]; // viridis, as dark as a line on white must be

/** An SVG element with attributes and children. */
export function svg(tag, attributes = {}, children = []) {
  const element = document.createElementNS(NAMESPACE, tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.append(...children);
  return element;
}

/** Chance (%) of reaching each threshold. */
export function chances(forecast, lead) {
  const across = times(forecast);
  const up = scale(0, 1, HEIGHT - FRAME.bottom, FRAME.top);
  const thresholds = Object.keys(forecast[0].probability_of_exceedance).sort((a, b) => a - b);
  const ends = [];
  const lines = thresholds.flatMap((threshold, index) => {
    const colour = RISING[Math.round((index / Math.max(1, thresholds.length - 1)) * (RISING.length - 1))];
    const points = forecast.map((at, i) => [across(i), at.probability_of_exceedance[threshold]]);
    const last = points.findLast(([, value]) => value !== null);
    if (last) ends.push({ y: up(last[1]), text: `\u2265 ${threshold}`, colour });
    return path(points, up, { class: "line", stroke: colour });
  });
  const rows = [0, 0.5, 1].map((value) => [up(value), `${100 * value} %`]);
  return chart("Chance of reaching each rain rate, by valid time", forecast, lead, across, rows, [...lines, ...spread(ends)]);
}

/** Median and quantile bands of the rate (mm/h). */
export function rates(forecast, lead) {
  const across = times(forecast);
  const values = forecast.flatMap((at) => [...Object.values(at.rainfall_rate_quantile), at.rainfall_rate_median]);
  const top = roundUp(Math.max(1, ...values.filter((value) => value !== null)));
  const up = scale(0, top, HEIGHT - FRAME.bottom, FRAME.top);
  const bands = shaded(forecast).flatMap(([low, high], i) => {
    const ring = forecast.map((at, k) => [across(k), at.rainfall_rate_quantile[low], at.rainfall_rate_quantile[high]]);
    return band(ring, up, 0.18 + 0.14 * i);
  });
  const median = path(forecast.map((at, i) => [across(i), at.rainfall_rate_median]), up, { class: "line", stroke: RATE });
  const rows = [0, top / 2, top].map((value) => [up(value), String(Number(value.toPrecision(2)))]);
  return chart(`Rain rate in millimetres an hour. ${key(forecast)}`, forecast, lead, across, rows, [...bands, ...median]);
}

/** What the lines and shades of `rates` are, in words. */
export function key(forecast) {
  const spans = shaded(forecast).map(([low, high]) => `${percent(low)} to ${percent(high)}`);
  return `Line: median.${spans.length ? ` Shaded, darker inwards: quantiles ${spans.join(", ")}.` : ""}`;
}

/** The pairs of quantile levels that leave out as much below as above, the widest first. */
function shaded(forecast) {
  const levels = Object.keys(forecast[0].rainfall_rate_quantile).sort((a, b) => a - b);
  const opposite = (low) => levels.find((level) => Math.abs(Number(level) + Number(low) - 1) < 1e-6);
  return levels.filter((low) => low < 0.5 && opposite(low)).map((low) => [low, opposite(low)]);
}

/** A level within (0, 1) in percent. */
export const percent = (level) => `${Number((100 * level).toPrecision(3))}\u00a0%`;

function chart(title, forecast, lead, across, rows, marks) {
  const right = WIDTH - FRAME.right;
  const grid = rows.flatMap(([y, text]) => [
    svg("line", { class: "grid", x1: FRAME.left, x2: right, y1: y, y2: y }),
    svg("text", { x: FRAME.left - 5, y: y + 3, "text-anchor": "end" }, [text]),
  ]);
  const every = Math.ceil(forecast.length / 5);
  const ticks = forecast.flatMap((at, i) =>
    i % every ? [] : [svg("text", { x: across(i), y: HEIGHT - 5, "text-anchor": "middle" }, [clock(at.valid_time)])],
  );
  const zone = svg("text", { x: WIDTH - 2, y: HEIGHT - 5, "text-anchor": "end" }, ["UTC"]);
  const cursor = svg("line", { class: "cursor", x1: across(lead), x2: across(lead), y1: FRAME.top, y2: HEIGHT - FRAME.bottom });
  const view = { class: "chart", viewBox: `0 0 ${WIDTH} ${HEIGHT}`, role: "img", "aria-label": title };
  return svg("svg", view, [...grid, ...ticks, zone, cursor, ...marks]);
}

/** Lines through the points that have a value, broken where one has none; a lone point is a dot. */
function path(points, up, attributes) {
  return runs(points).map((run) =>
    run.length === 1
      ? svg("circle", { cx: run[0][0], cy: up(run[0][1]), r: 2.5, fill: attributes.stroke })
      : svg("path", { ...attributes, d: `M${run.map(([x, value]) => `${x},${up(value)}`).join("L")}` }),
  );
}

function band(ring, up, opacity) {
  return runs(ring).map((run) => {
    const low = run.map(([x, value]) => `${x},${up(value)}`);
    const high = run.map(([x, , value]) => `${x},${up(value)}`).reverse();
    return svg("path", { d: `M${[...low, ...high].join("L")}Z`, class: "band", fill: RATE, "fill-opacity": opacity });
  });
}

/** The stretches of points without a gap. */
function runs(points) {
  const found = [[]];
  for (const point of points) {
    if (point.includes(null)) found.push([]);
    else found.at(-1).push(point);
  }
  return found.filter((run) => run.length);
}

/** Labels at the lines' ends, each after a piece of its line, pushed apart until they can be read. */
function spread(ends) {
  const step = 11;
  const sorted = [...ends].sort((a, b) => a.y - b.y);
  sorted.forEach((end, i) => { if (i) end.y = Math.max(end.y, sorted[i - 1].y + step); });
  const over = Math.max(0, (sorted.at(-1)?.y ?? 0) - (HEIGHT - FRAME.bottom));
  let floor = Infinity;
  for (const end of sorted.toReversed()) {
    end.y = Math.min(end.y, floor - step, over ? HEIGHT - FRAME.bottom : Infinity);
    floor = end.y;
  }
  const left = WIDTH - FRAME.right + 4;
  return sorted.flatMap(({ y, text, colour }) => [
    svg("path", { class: "line", stroke: colour, d: `M${left},${y}h8` }),
    svg("text", { class: "label", x: left + 12, y: y + 3 }, [text]),
  ]);
}

function times(forecast) {
  const at = forecast.map(({ valid_time: time }) => Date.parse(time));
  const across = scale(at[0], at.at(-1) === at[0] ? at[0] + 1 : at.at(-1), FRAME.left + 6, WIDTH - FRAME.right - 4);
  return (index) => across(at[index]);
}

function scale(from, to, first, last) {
  return (value) => Math.round(10 * (first + ((value - from) / (to - from)) * (last - first))) / 10;
}

function roundUp(value) {
  const power = 10 ** Math.floor(Math.log10(value));
  return [1, 2, 4, 6, 8, 10].find((step) => step * power >= value) * power;
}

const CLOCK = new Intl.DateTimeFormat("en-GB", { hour: "2-digit", minute: "2-digit", hourCycle: "h23", timeZone: "UTC" });
const clock = (time) => CLOCK.format(new Date(time));
