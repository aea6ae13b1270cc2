// The panels: the promise, the latency of answers, and the opinions of all exits about one request.

import { draw, FULL, get, label, length, make, milliseconds, percent, shown, sum } from "./dom.js";
import { byNumber } from "./timeline.js";

const FIRST_MS = 1, PER_DECADE = 10, ROW = 62;
const MARKS_MS = [1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10000, 20000, 50000];

export function drawPromise(place, current) {
  const plan = current?.plan, certificate = plan?.certificate, monitor = current?.monitor;
  if (!certificate) {
    place.replaceChildren(make("p", !current ? "No version serves."
      : plan?.is_of_other_traffic ? "The plan of this version is certified for other traffic than the version gets, so it "
        + "answers every request in full until it has a plan from records of its own."
      : plan?.exits.length ? "The thresholds of this version follow a rule of the paper, which promises nothing. Train "
        + "with --thresholds certified for a guarantee."
      : "This version answers every request in full: its answers are the model's own and need no promise."));
    return;
  }
  const step = monitor?.step ?? 0, last = plan.safer.length + 1;
  const parts = [make("p", certificate.words, { class: step ? "struck" : "" })];
  if (step) {
    parts.push(make("p", "The monitor has raised an alarm, so this no longer holds. The version has gone to fallback "
      + `level ${step} of ${last}${step === last ? ", which has no exits" : ""}.`, { class: "notice bad" }));
  }
  if (step < last && monitor?.samples) {
    parts.push(...watched(plan.watched, monitor));
  } else if (step < last) {
    parts.push(make("p", "The monitor has not seen a shadow sample yet: a request, drawn at random, that runs to the "
      + "end.", { class: "quiet" }));
  }
  place.replaceChildren(...parts);
}

function watched(terms, monitor) {
  const n = monitor.samples, bound = terms.tolerance, loss = monitor.mean_loss, alarm = 1 / terms.delta;
  const found = terms.risk === "disagreement"
    ? `${Math.round(loss * n).toLocaleString()} of ${n.toLocaleString()} watched answers differ`
    : `${n.toLocaleString()} answers watched`;
  const span = Math.max(2 * bound, 1.2 * loss);
  // The scale is logarithmic: its left end is a hundredth of the evidence that raises an alarm.
  const needle = Math.min(1, Math.max(0.02, 1 + Math.log10(monitor.wealth / alarm) / 2));
  return [
    gauge("What the shadow sample shows", `${found}: ${percent(loss, 2)}`, loss / span, loss > bound, bound / span,
      `at most ${percent(bound, 1)}`),
    gauge("Evidence against the promise", needle === 1 ? "alarm" : monitor.wealth > 1 ? "some" : "none", needle,
      needle > 0.8, 1, `alarm at ${Math.round(alarm)}; now ${Number(monitor.wealth.toPrecision(2))}`)];
}

function gauge(title, told, share, bad, mark, markTold) {
  const bar = make("div", null, { class: `bar thick${bad ? " over" : ""}`, role: "img",
    "aria-label": `${title}: ${told}, ${markTold}` },
  make("span", null, { style: { width: length(Math.min(1, share)) } }),
  make("i", null, { style: { left: length(mark) } }));
  const place = mark > 0.7 ? { right: "0" } : { left: length(mark), transform: "translateX(-50%)" };
  return make("div", null, { class: "gauge" },
    make("div", null, { class: "row" }, make("span", title), make("b", told)), bar,
    make("div", null, { class: "scale" }, make("small", markTold, { style: place })));
}

export function drawLatency(place, state) {
  const rows = [...state.latency].sort((a, b) => byNumber(a.version, b.version) || a.early - b.early);
  const all = {};
  for (const look of state.looks) {
    for (const [version, [requests, seconds]] of Object.entries(look.took)) {
      const one = (all[version] ??= { requests: 0, seconds: 0 });
      one.requests += requests;
      one.seconds += seconds;
    }
  }
  const means = Object.entries(all).filter(([, one]) => one.seconds).sort(([a], [b]) => byNumber(a, b))
    .map(([version, one]) => `${milliseconds((1000 * one.seconds) / one.requests)} with version ${version}`);
  place.replaceChildren(rows.length ? distributions(rows, place.clientWidth)
    : make("p", "No answer has come over this gateway's WebSocket yet. Times by exit are measured there, on answers "
      + "without opinions, because a request that asks for opinions runs to the end.", { class: "empty" }));
  if (means.length) {
    place.append(make("p", "On average, the requests that TorchServe answered in these ten minutes, through this "
      + `gateway or not, took ${means.join(", ")}.`, { class: "quiet below" }));
  }
}

function distributions(rows, width) {
  const used = rows.flatMap((row) => row.bins.map((share, bin) => (share ? bin : -1))).filter((bin) => bin >= 0);
  const first = Math.max(0, Math.min(...used) - 1), last = Math.max(...used, first + 8) + 2;
  const x = (bin) => (width * (bin - first)) / (last - first);
  const at = (ms) => x(PER_DECADE * Math.log10(Math.max(ms, FIRST_MS) / FIRST_MS));
  const height = ROW * rows.length + 22, peak = Math.max(...rows.flatMap((row) => row.bins));
  const picture = draw("svg", { viewBox: `0 0 ${width} ${height}`, width, height, role: "img" });
  picture.setAttribute("aria-label", rows.map((row) => `${titleOf(row)}: ${timesOf(row)}`).join("; "));
  for (const ms of MARKS_MS.filter((one) => at(one) >= 0 && at(one) < width - 18)) {
    picture.append(draw("path", { class: "grid", d: `M${at(ms)},0 V${height - 20}` }),
      label(milliseconds(ms).replace(".0", ""), { x: at(ms), y: height - 5, class: at(ms) < 20 ? "" : "middle" }));
  }
  rows.forEach((row, number) => {
    const ground = ROW * (number + 1), tall = ROW - 26;
    const points = row.bins.slice(first, last).map((share, bin) => {
      const y = ground - (tall * share) / peak;
      return `${x(bin + first)},${y} ${x(bin + first + 1)},${y}`;
    });
    picture.append(
      draw("polygon", { class: row.early ? "early" : "late",
        points: `0,${ground} ${points.join(" ")} ${width},${ground}` }),
      draw("path", { class: "axis", d: `M0,${ground + 0.5} H${width}` }),
      draw("path", { class: "median", d: `M${at(row.p50)},${ground - tall} V${ground}` }),
      label(titleOf(row), { x: 0, y: ground - tall - 8, class: "strong halo" }),
      label(timesOf(row), { x: width, y: ground - tall - 8, class: "end halo" }));
  });
  return picture;
}

const titleOf = (row) => `v ${row.version} ${row.early ? "left early" : "in full"}`;
const timesOf = (row) => `half in ${milliseconds(row.p50)}, 95 % in ${milliseconds(row.p95)}`;

// told: a message of the gateway with the opinions of all exits. plan: the plan of the version that answered.
export function drawOpinions(place, told, plan) {
  if (!told.opinions) {
    place.replaceChildren(make("p", told.error ?? "This version does not report the opinions of its exits: it was not "
      + "made by ee-archive, or the gateway does not have the secret of its server (ee-gateway --secret).",
    { class: "notice bad" }));
    return;
  }
  const answered = told.opinions.findIndex((one) => one.exit === told.exit), planned = plan?.exits ?? [];
  const asked = told.switch?.startsWith("level") ? parseInt(told.switch.split(" ")[1], 10) : 0;
  const step = Math.max(parseInt(told.step ?? "0", 10), Math.min(asked, plan?.safer.length ?? 0));
  const thresholds = step ? plan?.safer[step - 1] : planned.map((exit) => exit.threshold);
  const list = make("ol", null, { class: "opinions" });
  told.opinions.forEach((opinion, number) => {
    const kind = number === answered ? "answered" : answered >= 0 && number > answered ? "later" : "";
    const bar = make("div", null, { class: "bar thick" },
      make("span", null, { style: { width: length(opinion.confidence) } }));
    const needed = thresholds?.[planned.findIndex((exit) => exit.layer === opinion.exit)];
    if (needed <= 1) bar.append(make("i", null, { style: { left: length(needed) } }));
    list.append(make("li", null, { class: kind }, make("span", shown(opinion.exit), { title: opinion.exit }), bar,
      make("span", nameOf(opinion), { title: nameOf(opinion) }),
      make("b", opinion.confidence === null ? "–" : percent(opinion.confidence)),
      make("small", kind === "answered" ? "answered" : kind === "later" ? "not needed" : "not sure enough")));
  });
  const alone = told.opinions.every((opinion) => opinion.exit === FULL);
  place.replaceChildren(verdict(told.opinions[answered], planned, alone), list,
    make("p", (alone ? "The answer" : "The mark on a bar shows how sure the exit must be. All opinions together")
      + ` took ${milliseconds(told.latency_ms)}.`, { class: "quiet" }));
}

const nameOf = (opinion) => String(opinion.label ?? `class ${opinion.class}`);

// alone: whether only the whole model was asked: there are no exits, or they are off, or at the last fallback level.
function verdict(opinion, planned, alone) {
  const told = make("p", null, { class: "verdict" });
  if (!opinion || opinion.exit === FULL) {
    told.append(alone ? "No exit was asked: the whole model answered" : "No exit was sure enough, so the whole model "
      + "answered", ...(opinion ? [" ", make("b", nameOf(opinion))] : []), ".");
    return told;
  }
  const cost = planned.find((exit) => exit.layer === opinion.exit)?.cost;
  told.append(make("b", opinion.exit), " was sure enough and answered ", make("b", nameOf(opinion)),
    `${cost === undefined ? "" : ` after ${percent(cost)} of the work`}. The rest of the work is saved, unless every `
    + "exit is asked, as here.");
  return told;
}

export function drawFigures(place, figures) {
  place.replaceChildren(...figures.map(([value, text, kind]) =>
    make("div", null, { class: kind ?? "" }, make("dt", text), make("dd", value))));
}

export function drawEvents(place, events, clock) {
  place.replaceChildren(...[...events].reverse().slice(0, 8).map((event) =>
    make("li", null, { class: event.text.startsWith("alarm") ? "bad" : "" },
      make("time", clock(event.time)), make("span", event.text))));
}

export function showTrouble(text) {
  get("trouble").hidden = !text;
  get("trouble").textContent = text ?? "";
}

export const total = (looks, version, name) => sum(looks.map((look) => look.answers[version]?.[name] ?? 0));
