"use strict";
// What all pages share: elements, questions to the server, the theme, and how the text of a model is shown.
const $ = (id) => document.getElementById(id);

function make(tag, properties = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (name in element) element[name] = value; else element.setAttribute(name, value);
  }
  element.append(...children); // strings become text, never markup
  return element;
}

// `kept` says what is lost if the server is gone; `running`, an AbortController, may end it.
async function request(path, body, kept, running) {
  const options = body && { method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(body) };
  let response;
  try {
    response = await fetch("api/" + path, { ...options, signal: running?.signal });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Error(`The server does not answer. ${kept}`);
  }
  if (response.status === 403) throw new Error("The server was started again. Open the address that it printed.");
  if (!response.ok) {
    const { error } = await response.json().catch(() => ({ error: "The server answered nonsense." }));
    throw new Error(error);
  }
  return response;
}

// What the browser keeps over a reload; where it refuses, as to some frames, or is full, the page keeps it while it lives.
function storage(kind) {
  const here = new Map();
  const tried = (what, ...rest) => { try { return window[kind][what](...rest); } catch { return null; } };
  return {
    getItem: (name) => here.get(name) ?? tried("getItem", name),
    setItem: (name, value) => { // whether the browser keeps it
      const kept = tried("setItem", name, value) !== null;
      if (kept) here.delete(name); else here.set(name, value);
      return kept;
    },
    removeItem: (name) => { here.delete(name); tried("removeItem", name); },
  };
}
const local = storage("localStorage"), session = storage("sessionStorage");

function theme() {
  const dark = matchMedia("(prefers-color-scheme: dark)").matches;
  const now = document.documentElement.dataset.theme ?? (dark ? "dark" : "light");
  document.documentElement.dataset.theme = now === "dark" ? "light" : "dark";
  local.setItem("theme", document.documentElement.dataset.theme);
}
if (local.getItem("theme")) document.documentElement.dataset.theme = local.getItem("theme");

// ---------------------------------------------------------------- Markdown

// HTML in a text is shown as it is written, images too: nothing is loaded. DOMPurify is the second lock on that door.
const markdown = markdownit({ html: false, breaks: true }).disable("image");
const rules = markdown.renderer.rules;

// A formula stays as it was written, between its marks, since Markdown would eat its backslashes and underscores.
const FORMULA = /\$\$[^]+?\$\$|\\\([^]+?\\\)|\\\[[^]+?\\\]|\$(?![\s$])(?:\\[^]|[^$\\\n])*?[^\s$\\]\$(?!\d)/y;
const ends = { "$$": "$$", "\\[": "\\]" };

markdown.inline.ruler.before("escape", "formula", (state, silent) => {
  FORMULA.lastIndex = state.pos;
  const found = FORMULA.exec(state.src)?.[0];
  if (!found) return false;
  if (!silent) state.push("formula", "span", 0).content = found;
  state.pos += found.length;
  return true;
});

markdown.block.ruler.before("fence", "formula", (state, first, last, silent) => {
  const from = state.bMarks[first] + state.tShift[first], end = ends[state.src.slice(from, from + 2)];
  const at = end ? state.src.indexOf(end, from + 2) : -1;
  let line = first;
  while (line < last && state.eMarks[line] < at + 2) line++;
  if (at < 0 || line === last || state.src.slice(at + 2, state.eMarks[line]).trim()) return false;
  if (!silent) {
    state.push("formula", "div", 0).content = state.src.slice(from, at + 2);
    state.line = line + 1;
  }
  return true;
}, { alt: ["paragraph"] });

rules.formula = (tokens, i) => `<${tokens[i].tag} class="formula">${markdown.utils.escapeHtml(tokens[i].content)}</${tokens[i].tag}>`;

// Headings stand below those of the page; the policy of the page has no room for style attributes.
rules.heading_open = rules.heading_close = (tokens, i, options, env, self) => {
  tokens[i].tag = `h${Math.min(6, 2 + tokens[i].markup.length)}`;
  return self.renderToken(tokens, i, options);
};
rules.th_open = rules.td_open = (tokens, i, options, env, self) => {
  const style = tokens[i].attrGet("style");
  if (style) tokens[i].attrs = [["class", style.replace("text-align:", "")]];
  return self.renderToken(tokens, i, options);
};
rules.link_open = (tokens, i, options, env, self) => {
  const href = tokens[i].attrGet("href");
  tokens[i].attrs = [["href", href], ["title", href], ["target", "_blank"], ["rel", "noopener noreferrer"]];
  return self.renderToken(tokens, i, options);
};

let raw = local.getItem("raw") === "yes"; // whether texts are shown as they are, character by character

function toggleRaw() {
  raw = !raw;
  local.setItem("raw", raw ? "yes" : "no");
  $("raw").setAttribute("aria-pressed", String(raw));
}

// Fills an element with a text of somebody else's: as Markdown, or as it is.
function fill(element, text, asItIs = raw) {
  element.dir = "auto";
  element.classList.add("text");
  element.classList.toggle("raw", asItIs);
  if (asItIs) element.replaceChildren(text);
  else element.replaceChildren(DOMPurify.sanitize(markdown.render(text), { RETURN_DOM_FRAGMENT: true, ADD_ATTR: ["target"], FORBID_ATTR: ["style"] }));
  element.querySelectorAll("pre, table").forEach((wide) => { wide.tabIndex = 0; }); // what scrolls can be reached by keys
  return element;
}
