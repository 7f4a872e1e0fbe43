// Elements and numbers as the token view shows them. Foreign text only ever enters the page as text.
const data = JSON.parse(document.getElementById("token-data").textContent);
const $ = (name) => document.getElementById("token-" + name);
if (!$("app") || !data.records.some((record) => record.answers.length)) return;

function el(tag, className, ...children) {
  const node = document.createElement(tag);
  if (className) node.className = className;
  node.append(...children.filter((child) => child !== null));
  return node;
}

function svg(tag, attributes, ...children) {
  const node = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
  node.append(...children);
  return node;
}

const fixed = (value, places) => value.toFixed(places).replace(/^-(?=0\.?0*$)/, "").replace("-", "−");
const signed = (value, places) => (value > 0 ? "+" : "") + fixed(value, places);
const plural = (n, noun) => n.toLocaleString("en") + " " + noun + (n === 1 ? "" : "s");

function percent(logprob) {
  const p = 100 * Math.exp(logprob);
  if (p < 0.01) return "<0.01 %";
  return (p < 1 ? p.toFixed(2) : p < 99.95 ? p.toFixed(1) : "100") + " %";
}

/** Text with white space that can be seen; a copy of it still has the real spaces. */
function visible(shown, lines) {
  const nodes = [];
  for (const part of shown.split(/(\n|\t| {2,}| (?=\n|$))/)) {
    if (part === "") continue;
    if (part === "\n") nodes.push(el("span", "t-mark", "↵"), lines ? "\n" : "");
    else if (part === "\t") nodes.push(el("span", "t-mark", "→"), "\t");
    else if (part.trim() === "") nodes.push(el("span", "t-space", part));
    else nodes.push(part);
  }
  return nodes;
}
