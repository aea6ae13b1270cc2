// Asks the gateway for its state every two seconds and draws it. No library.

import { clock, colors, FULL, get, make, percent, sum } from "./dom.js";
import { drawEvents, drawFigures, drawLatency, drawOpinions, drawPromise, showTrouble, total } from "./panels.js";
import { drawRiver, flow } from "./river.js";
import { byNumber, drawTimeline } from "./timeline.js";

let token = sessionStorage.getItem("token") ?? "";
let chosen = null, state = null, drawnAt = 0;
let looks = 0, questions = 0, asked = null;  // replies to any but the latest look or question come too late
const unasked = [...get("opinions").children];

// The token is kept for this tab, and removed from its address, which others may see and the browser remembers.
function takeToken() {
  const given = new URLSearchParams(location.hash.slice(1)).get("token");
  if (!given) return;
  keepToken(given);
  history.replaceState(null, "", location.pathname + location.search);
}

function keepToken(given) {
  token = given;
  sessionStorage.setItem("token", token);
}

function ask(path, options = {}) {
  return fetch(path, { ...options, headers: token ? { Authorization: `Bearer ${token}` } : {} });
}

// The exits in the order of the model, which the plans tell; exits of unknown plans come last.
function exitNames(current) {
  const depth = {};
  for (const version of [...state.versions, current ?? {}]) {
    for (const exit of version.plan?.exits ?? []) depth[exit.layer] = exit.cost;
  }
  const seen = new Set(state.looks.flatMap((look) => Object.values(look.answers).flatMap(Object.keys)));
  (current?.plan?.exits ?? []).forEach((exit) => seen.add(exit.layer));
  seen.delete(FULL);
  const names = [...seen].sort((a, b) => (depth[a] ?? 1) - (depth[b] ?? 1) || byNumber(a, b));
  return { names: [...names, FULL], cost: depth };
}

// The share of the model's FLOPs that was spent: a request pays for the stages up to its exit and for the heads on the
// way. It also pays for the rest if it is in the shadow sample, which is drawn at random, or asked for all opinions.
function workDone(current, names, counts) {
  const plan = current?.plan, all = sum(Object.values(counts));
  if (!plan?.exits.length || !all || names.some((name) => counts[name] && name !== FULL
    && !plan.exits.some((exit) => exit.layer === name))) return null;
  const share = (kind) => Math.min(1, sum(state.looks.map((look) => look[kind][current.version] ?? 0)) / all);
  const through = 1 - (1 - share("shadow")) * (1 - share("anytime"));
  let here = all, spent = 0;
  for (const exit of plan.exits) {
    spent += here * exit.head_cost + (counts[exit.layer] ?? 0) * (exit.cost + through * (1 - exit.cost));
    here -= counts[exit.layer] ?? 0;
  }
  return (spent + here) / all;
}

function tell(current, names, counts) {
  const all = sum(Object.values(counts)), early = all ? 1 - counts[FULL] / all : 0;
  const plan = current?.plan, exits = plan?.exits.length ?? 0, lead = get("lead");
  const work = workDone(current, names, counts);
  lead.replaceChildren();
  if (!current) {
    lead.append("No version of this model serves at the moment.");
  } else if (!all) {
    lead.append("No requests in the last ten minutes.", exits ? "" : " This version answers in full.");
  } else if (!exits && !early) {
    lead.append("Every request goes through the whole model. This version records the requests from which ",
      make("code", "ee-train"), " makes its exits.");
  } else {
    lead.append(make("b", percent(early)), ` of the last ${all.toLocaleString()} requests left the model early`,
      ...(work === null ? ["."]
        : [", so the model did ", make("b", percent(work)), " of the work that it would have done without exits."]));
  }
  drawFigures(get("figures"), [
    [all.toLocaleString(), "requests in ten minutes"],
    [exits && all ? percent(early) : "–", "left early", early ? "good" : ""],
    [work === null ? "–" : percent(work), "of the full model's work"], lost(plan, current?.monitor)]);
}

function lost(plan, monitor) {
  const watched = plan?.watched;
  const what = watched?.risk === "confidence-gap" ? "confidence given up" : "answers that differ";
  if (!watched) return ["–", what];
  if (monitor?.step) return ["void", `${what}: the promise no longer holds`, "bad"];
  const bound = percent(watched.tolerance, 1);
  // A certificate for accuracy promises nothing about the answers that differ: the monitor has a limit of its own.
  const told = plan.certificate?.risk === watched.risk ? "promised" : "expected";
  return !monitor?.samples ? [`≤ ${bound}`, `${what}, as ${told}`]
    : [percent(monitor.mean_loss, 1), `${what}, ${told} at most ${bound}`,
      monitor.mean_loss > watched.tolerance ? "bad" : "good"];
}

function drawAll() {
  showTrouble(state.trouble ? `${state.trouble}. `
    + `${state.looked_at ? `The figures are from ${clock(state.looked_at)}. ` : ""}This page keeps trying.` : null);
  const select = get("model"), pill = get("serving");
  if ([...select.options].map((option) => option.value).join() !== state.models.join()) {
    select.replaceChildren(...state.models.map((name) => make("option", name, { value: name })));
  }
  get("choice").hidden = state.models.length < 2;
  document.querySelector("main").hidden = !state.model;
  if (!state.model) {
    pill.textContent = state.trouble ? "no news" : state.looked_at ? "no model yet" : "looking";
    pill.className = `pill ${state.trouble ? "bad" : ""}`;
    if (!state.trouble && state.looked_at) showTrouble("TorchServe serves no model yet. Add one: ee-roll MODEL.mar");
    return;
  }
  select.value = state.model;
  if (asked && asked !== state.model) forgetQuestion();
  document.title = `${state.model}: early exits, live`;
  const current = state.versions.find((one) => one.serves), step = current?.monitor?.step;
  const exits = current?.plan?.exits.length ?? 0, switched = current?.switched ?? 0;
  pill.textContent = `${state.model} ${current ? current.version : ""} · ` + (state.trouble ? "no news"
    : !current ? "does not serve" : switched < 0 ? "exits off" : switched ? `switched to level ${switched}`
    : step ? `fallback level ${step}` : exits ? `${exits} exits` : "answers in full");
  pill.className = `pill ${!current || switched || step || state.trouble ? "bad" : exits ? "good" : ""}`;
  const { names, cost } = exitNames(current), color = colors(names);
  const counts = Object.fromEntries(names.map((name) => [name, total(state.looks, current?.version, name)]));
  tell(current, names, counts);
  drawRiver(get("river"), names, counts, color, cost);
  get("switched").hidden = !switched;
  get("switched").textContent = (switched < 0
    ? "An operator has switched the exits off, so the whole model answers every request."
    : `An operator has set fallback level ${switched}: exits answer at this level or a safer one only.`)
    + ` "ee-exits ${state.model} on" undoes that.`;
  get("bypassed").hidden = !current?.bypassed.length;
  get("bypassed").textContent = `In batches of ${current?.bypassed.join(", ")}, the exits save no time on this `
    + "machine, so such batches are answered in full.";
  drawTimeline(get("timeline"), state, names, color);
  drawEvents(get("events"), state.events, clock);
  drawPromise(get("promise"), current);
  drawLatency(get("latency"), state);
  const latest = state.looks.at(-1);
  if (latest && latest.time > drawnAt && !state.trouble) {
    drawnAt = latest.time;
    const arrived = Object.fromEntries(names.map((name) => [name, total([latest], current?.version, name)]));
    flow(get("river"), arrived, state.every_s);
  }
}

async function look() {
  const number = looks += 1;
  try {
    const reply = await ask(`state${chosen ? `?model=${encodeURIComponent(chosen)}` : ""}`);
    const refused = reply.status === 401, told = refused ? state : await reply.json();
    if (number !== looks) return;
    get("refused").hidden = !refused || !token;
    get("token").hidden = !refused;
    if (refused) {
      document.querySelector("main").hidden = true;
      get("serving").textContent = "locked";
    } else {
      state = told;
      drawAll();
    }
  } catch (error) {
    if (number === looks) showTrouble(`The gateway does not answer (${error.message}). This page keeps trying.`);
  }
}

async function watch() {
  await look();
  setTimeout(watch, 1000 * (state?.looked_at ? state.every_s : 0.5));
}

async function askEveryExit(file) {
  const preview = get("preview"), opinions = get("opinions"), number = questions += 1;
  asked = get("model").value;
  preview.hidden = !file.type.startsWith("image/");
  if (!preview.hidden) preview.src = URL.createObjectURL(file);
  opinions.replaceChildren(make("p", "Asking ...", { class: "quiet" }));
  let told;
  try {
    told = await (await ask(`ask/${encodeURIComponent(asked)}`, { method: "POST", body: file })).json();
  } catch (error) {
    told = { error: `The gateway does not answer: ${error.message}` };
  }
  if (number !== questions) return;
  drawOpinions(opinions, told, state.versions.find((one) => one.version === told.version)?.plan);
}

function forgetQuestion() {
  questions += 1;
  asked = null;
  get("preview").hidden = true;
  get("opinions").replaceChildren(...unasked);
}

get("model").addEventListener("change", (event) => { chosen = event.target.value; drawnAt = 0; look(); });
get("file").addEventListener("change", (event) => {
  if (event.target.files[0]) askEveryExit(event.target.files[0]);
  event.target.value = "";  // so that the same file can be chosen again
});
get("token").addEventListener("submit", (event) => {
  event.preventDefault();
  keepToken(event.target.querySelector("input").value);
  look();
});
["dragover", "dragleave", "drop"].forEach((kind) => get("drop").addEventListener(kind, (event) => {
  event.preventDefault();
  get("drop").classList.toggle("over", kind === "dragover");
  if (kind === "drop" && event.dataTransfer.files[0]) askEveryExit(event.dataTransfer.files[0]);
}));
addEventListener("resize", () => { if (state?.model) drawAll(); });
addEventListener("hashchange", () => { takeToken(); look(); });
takeToken();
watch();
