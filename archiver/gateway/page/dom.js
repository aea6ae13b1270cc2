// Builds elements, and formats numbers.

export const FULL = "full";
export const get = (id) => document.getElementById(id);
export const sum = (values) => values.reduce((total, value) => total + value, 0);
export const percent = (share, digits = 0) => `${Number((100 * share).toFixed(digits)).toLocaleString()} %`;
export const length = (share) => `${(100 * share).toFixed(2)}%`;
export const shown = (name) => (name === FULL ? "whole model" : name);
export const clock = (seconds) => new Date(1000 * seconds).toLocaleTimeString([], { hour12: false });

export function milliseconds(value) {
  return value >= 1000 ? `${(value / 1000).toFixed(1)} s` : `${value.toFixed(value < 10 ? 1 : 0)} ms`;
}

function fill(element, text, attributes, children) {
  if (text !== null && text !== undefined) element.textContent = text;
  for (const [name, value] of Object.entries(attributes ?? {})) {
    if (name === "style") Object.entries(value).forEach(([key, one]) => element.style.setProperty(key, one));
    else element.setAttribute(name, value);
  }
  element.append(...(children ?? []));
  return element;
}

export function make(tag, text, attributes, ...children) {
  return fill(document.createElement(tag), text, attributes, children);
}

export function draw(tag, attributes, ...children) {
  return fill(document.createElementNS("http://www.w3.org/2000/svg", tag), null, attributes, children);
}

export function label(text, attributes) {
  return fill(document.createElementNS("http://www.w3.org/2000/svg", "text"), text, attributes);
}

// From green for the earliest exit to blue for the last; the whole model has no colour of its own.
export function colors(names) {
  const last = Math.max(1, names.length - 2);
  return Object.fromEntries(names.map((name, place) =>
    [name, name === FULL ? "var(--full)" : `oklch(var(--lightness) 0.12 ${158 + (112 * place) / last})`]));
}
