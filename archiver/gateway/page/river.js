// The traffic as a river: every exit takes a stream out of it, as wide as its share.

import { draw, label, length, make, percent, shown, sum } from "./dom.js";

const HEIGHT = 132, TOP = 14, BEND = 10, DROP = 34, LEFT = 76, RIGHT = 128;
const NARROW = 640, LEAST_PX = 1.5, DOTS_A_LOOK = 24;
const still = window.matchMedia("(prefers-reduced-motion: reduce)");
let streams = [];

// counts: answers by exit, the whole model last. cost: by exit, the share of the model's work done there.
export function drawRiver(place, names, counts, color, cost) {
  const all = sum(Object.values(counts));
  const share = Object.fromEntries(names.map((name) => [name, all ? (counts[name] ?? 0) / all : 0]));
  const width = place.clientWidth, room = (width - LEFT - RIGHT) / Math.max(1, names.length - 1);
  streams = [];
  if (!all) {
    place.replaceChildren(make("p", "No request came in during the last ten minutes. Send one, or drop one below.",
      { class: "empty" }));
  } else if (width < NARROW || room < 64) {
    place.replaceChildren(rows(names, share, color, cost));
  } else {
    place.replaceChildren(river(names, share, color, cost, width, room));
  }
}

function work(name, cost) {
  return cost[name] === undefined ? "" : `at ${percent(cost[name])} of the work`;
}

function rows(names, share, color, cost) {
  const list = make("ul", null, { class: "shares" });
  for (const name of names) {
    const bar = make("div", null, { class: "bar" },
      make("span", null, { style: { width: length(share[name]), background: color[name] } }));
    list.append(make("li", null, {}, make("span", shown(name)), make("b", percent(share[name])), bar,
      make("small", work(name, cost))));
  }
  return list;
}

function river(names, share, color, cost, width, room) {
  const full = names.at(-1), scale = Math.min(HEIGHT, 0.8 * room);
  const bottom = TOP + scale + BEND + DROP, height = names.length > 1 ? bottom + 58 : TOP + scale + 8;
  const picture = draw("svg", { viewBox: `0 0 ${width} ${height}`, width, height, role: "img",
    "aria-label": names.map((name) => `${shown(name)} ${percent(share[name], 1)}`).join(", ") });
  let lowest = TOP + scale;
  const middle = TOP + scale / 2;
  picture.append(label("requests", { x: 0, y: middle - 4, class: "strong" }),
    label("come in", { x: 0, y: middle + 12 }));
  names.forEach((name, number) => {
    const thick = Math.max(share[name] * scale, share[name] ? LEAST_PX : 0);
    const top = lowest - thick, x = LEFT + room * (number + 1) - BEND - thick / 2;
    const end = width - RIGHT + 8, center = top + thick / 2;
    if (name === full) {
      picture.append(draw("rect", { x: LEFT, y: top, width: end - LEFT, height: thick, fill: color[name] }),
        label(percent(share[name]), { x: end + 10, y: middle - 2, class: "figure" }),
        label("go through the", { x: end + 10, y: middle + 16 }),
        label("whole model", { x: end + 10, y: middle + 31 }));
      if (thick) streams.push({ name, color: color[name], path: `M${LEFT},${center} H${end}` });
      return;
    }
    const column = LEFT + room * (number + 1), away = thick + BEND;
    if (thick) {
      const turn = lowest + BEND;
      picture.append(draw("path", { fill: color[name], d: `M${LEFT},${top} H${x} A${away},${away} 0 0 1 ${x + away},`
        + `${turn} V${bottom} H${x + BEND} V${turn} A${BEND},${BEND} 0 0 0 ${x},${lowest} H${LEFT} Z` }));
      streams.push({ name, color: color[name],
        path: `M${LEFT},${center} H${x} A${BEND + thick / 2},${BEND + thick / 2} 0 0 1 ${column},${turn} V${bottom}` });
    } else {
      picture.append(draw("path", { class: "unused", d: `M${column},${lowest + BEND} V${bottom}` }));
    }
    const quiet = thick ? "" : " unseen";
    picture.append(label(percent(share[name]), { x: column, y: bottom + 20, class: `figure middle${quiet}` }),
      label(name, { x: column, y: bottom + 37, class: `strong middle${quiet}` }),
      label(work(name, cost), { x: column, y: bottom + 52, class: `middle${quiet}` }));
    lowest = top;
  });
  return picture;
}

// Lets dots flow for the requests since the last look: one for each request, up to a limit.
export function flow(place, counts, seconds) {
  const picture = place.querySelector("svg"), all = sum(Object.values(counts));
  if (!picture || !all || still.matches || document.hidden) return;
  for (const stream of streams) {
    const dots = Math.round((counts[stream.name] ?? 0) * Math.min(1, DOTS_A_LOOK / all));
    for (let number = 0; number < dots; number += 1) {
      const dot = draw("circle", { r: 2.5, class: "dot" });
      dot.style.offsetPath = `path("${stream.path}")`;
      picture.append(dot);
      dot.animate([{ offsetDistance: "0%", opacity: 0 }, { opacity: 1, offset: 0.1 }, { opacity: 1, offset: 0.85 },
        { offsetDistance: "100%", opacity: 0 }],
      { duration: 2600, delay: 1000 * seconds * Math.random(), fill: "both" }).onfinish = () => dot.remove();
    }
  }
}
