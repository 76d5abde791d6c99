// Elements, and numbers as words.
const byId = (id) => document.getElementById(id);

// An element of a tag, its properties, and its children: nodes, or text that stays text.
const make = (tag, properties = {}, ...children) => {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (name.includes("-") || name === "role") element.setAttribute(name, value);
    else element[name] = value;
  }
  element.append(...children.filter((child) => child !== null));
  return element;
};

const button = (text, press, properties = {}) => {
  const element = make("button", { type: "button", ...properties }, text);
  element.addEventListener("click", press);
  return element;
};

const duration = (seconds) => {
  if (seconds < 0.0095) return `${(1000 * seconds).toFixed(seconds < 0.00095 ? 2 : 1)} ms`;
  return seconds < 0.9995 ? `${Math.round(1000 * seconds)} ms` : `${seconds.toFixed(seconds < 99.5 ? 2 : 0)} s`;
};

const counted = (count, noun) => `${count.toLocaleString("en")} ${noun}${count === 1 ? "" : "s"}`;

// Copies without the clipboard's own interface too: a page that came over plain HTTP from another machine has none.
const copy = async (text) => {
  if (navigator.clipboard && window.isSecureContext) return navigator.clipboard.writeText(text);
  const before = document.activeElement;
  const area = make("textarea", { value: text, className: "unseen", "aria-hidden": "true" });
  document.body.append(area);
  area.select();
  const copied = document.execCommand("copy");
  area.remove();
  before?.focus({ preventScroll: true });
  if (!copied) throw new Error("The browser did not copy.");
};
