// Elements from data. Texts become text nodes, never markup.

/** Return an element: properties that start with "on" are listeners, "class" and what has a dash are attributes. */
export function el(tag, properties = {}, ...children) {
  const made = document.createElement(tag);
  set(made, properties);
  made.append(...children.flat(Infinity).filter((child) => child !== null && child !== undefined && child !== ""));
  return made;
}

/** Return an SVG element with attributes. */
export function svg(tag, attributes = {}, ...children) {
  const made = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  made.append(...children);
  return made;
}

function set(made, properties) {
  for (const [name, value] of Object.entries(properties)) {
    if (value === null || value === undefined) continue;
    if (name.startsWith("on")) made.addEventListener(name.slice(2), value);
    else if (name.startsWith("--")) made.style.setProperty(name, value);
    else if (name === "class" || name.includes("-") || name === "role") made.setAttribute(name, value);
    else made[name] = value;
  }
}

/** Return text for screen readers only. */
export const hidden = (text) => el("span", { class: "hidden" }, text);

/** Return a number with a typographic minus. */
export function number(value, digits, signed = false) {
  const text = Math.abs(value).toFixed(digits);
  const zero = Number(text) === 0;
  return (value < 0 && !zero ? "−" : signed && !zero ? "+" : "") + text;
}

/** Return how far something moved, as an arrow for the eye and as words for the ear. */
export function movement(from, to, whose) {
  const moved = from - to;
  const way = moved > 0 ? "gain" : moved < 0 ? "loss" : "even";
  const sign = moved > 0 ? `▲${moved}` : moved < 0 ? `▼${-moved}` : "=";
  const words = moved > 0 ? `up ${moved}` : moved < 0 ? `down ${-moved}` : "same rank";
  return el("span", { class: `moved ${way}`, title: `${words}: rank ${from} with ${whose}` },
    el("span", { "aria-hidden": "true" }, sign), hidden(` ${words} against ${whose} `));
}
