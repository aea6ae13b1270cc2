// One time line: traffic by exit above, the life of each version below, and events as lines through both.

import { clock, draw, FULL, label, make, sum } from "./dom.js";

const HEIGHT = 130, TOP = 18, LANE = 24, AXIS = 22, LEFT = 76, QUIET = 0.01;
const SHORTEST_S = 60, STEPS_S = [10, 20, 30, 60, 120, 300];

export function drawTimeline(place, state, names, color) {
  const looks = state.looks;
  if (looks.length < 2) {
    place.replaceChildren(make("p", "Watching. The first figures appear in a few seconds.", { class: "empty" }));
    return;
  }
  const width = place.clientWidth, span = Math.max(SHORTEST_S, state.time - looks[0].time);
  const versions = [...new Set(looks.flatMap((one) => Object.keys(one.versions)))].sort(byNumber);
  const lanes = TOP + HEIGHT + 16, height = lanes + LANE * versions.length + AXIS;
  const x = (time) => LEFT + Math.max(0, (width - LEFT) * (1 - (state.time - time) / span));
  const picture = draw("svg", { viewBox: `0 0 ${width} ${height}`, width, height, role: "img" });
  const peak = areas(picture, smoothed(looks, names, state.every_s), names, color, x);
  picture.setAttribute("aria-label", `answers a second, at most ${told(peak)}; versions ${versions.join(", ")}`);
  picture.append(label(peak > QUIET ? `${told(peak)} / s` : "none", { x: 0, y: TOP + 10, class: "strong" }),
    label(peak > QUIET ? "at most" : "so far", { x: 0, y: TOP + 25 }),
    draw("path", { class: "axis", d: `M${LEFT},${TOP + HEIGHT + 0.5} H${width}` }));
  versions.forEach((version, number) => lane(picture, looks, version, lanes + LANE * number, x, state.every_s));
  for (const event of state.events.filter((one) => one.time > state.time - span)) {
    picture.append(draw("path", { class: event.text.startsWith("alarm") ? "event bad" : "event",
      d: `M${x(event.time)},${TOP - 8} V${lanes + LANE * versions.length - 6}` }, draw("title", {})));
    picture.lastChild.lastChild.textContent = `${clock(event.time)} ${event.text}`;
  }
  const step = STEPS_S.find((seconds) => span / seconds <= width / 150) ?? STEPS_S.at(-1);
  for (let ago = step; ago <= span; ago += step) {
    picture.append(label(`${ago < 120 ? `${ago} s` : `${Number((ago / 60).toFixed(1))} min`} ago`,
      { x: x(state.time - ago), y: height - 4, class: x(state.time - ago) < LEFT + 30 ? "" : "middle" }));
  }
  picture.append(label("now", { x: width, y: height - 4, class: "end" }));
  place.replaceChildren(picture);
}

export const byNumber = (a, b) => a.localeCompare(b, undefined, { numeric: true });
const told = (rate) => (rate < 10 ? rate.toFixed(1) : Math.round(rate).toLocaleString());

// Rates by exit, averaged over three looks.
function smoothed(looks, names, every) {
  const rate = (look, name) => sum(Object.values(look.answers).map((exits) => exits[name] ?? 0)) / every;
  return looks.map((look, at) => {
    const near = looks.slice(Math.max(0, at - 1), at + 2);
    const passed = at ? Math.max(every, look.time - looks[at - 1].time) / every : 1;
    const mean = (name) => sum(near.map((one) => rate(one, name))) / near.length / passed;
    return { time: look.time, rates: Object.fromEntries(names.map((name) => [name, mean(name)])) };
  });
}

function areas(picture, points, names, color, x) {
  const peak = Math.max(QUIET, ...points.map((point) => sum(Object.values(point.rates))));
  const below = points.map(() => 0), y = (value) => (TOP + HEIGHT - (HEIGHT * value) / peak).toFixed(1);
  for (const name of [...names].reverse()) {  // the whole model at the bottom
    const lower = points.map((point, at) => `${x(point.time).toFixed(1)},${y(below[at])}`);
    points.forEach((point, at) => { below[at] += point.rates[name]; });
    const upper = points.map((point, at) => `${x(point.time).toFixed(1)},${y(below[at])}`);
    if (points.some((point) => point.rates[name])) {
      picture.append(draw("polygon", { points: [...upper, ...lower.reverse()].join(" "), fill: color[name] },
        draw("title", {})));
      picture.lastChild.lastChild.textContent = name === FULL ? "whole model" : name;
    }
  }
  return peak;
}

function lane(picture, looks, version, y, x, every) {
  picture.append(label(`v ${version}`, { x: 0, y: y + 12, class: "strong" }));
  let start = null;
  looks.forEach((look, at) => {
    const standing = look.versions[version];
    if (start && (standing !== start.standing || at === looks.length - 1)) {
      const until = standing === undefined ? looks[at - 1].time : look.time;
      const rect = { x: x(start.time), y: y + 2, height: 12, rx: 6, width: Math.max(3, x(until) - x(start.time)) };
      picture.append(draw("rect", { ...rect, class: `lane ${start.standing}` }));
      if (rect.width > 64) {
        picture.append(label(start.standing, { x: rect.x + 9, y: y + 11.5, class: `on ${start.standing}` }));
      }
      start = null;
    }
    if (standing && !start) start = { standing, time: look.time - every / 2 };
  });
}
