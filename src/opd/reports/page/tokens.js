// The token view: what is shown, and what keys, mouse and finger do. tokens.py joins it with token_*.js in one function.
function named(index) {
  const shown = data.texts[index];
  const node = shown === "" ? el("span", "t-part", "#" + data.ids[index]) : el("span", "t-name", ...visible(shown, false));
  node.title = "id " + data.ids[index];
  return node;
}

const steps = data.records.map((record, i) =>
  record.step !== null ? "step " + record.step : data.records.length > 1 ? record.title + " (" + (i + 1) + ")" : record.title);

// ---- state ----
const last = data.records.map((record) => record.answers.length > 0).lastIndexOf(true);
const state = { step: last, beside: last > 0 ? 0 : null, teacher: 0, colour: "penalty", domain: null, answer: 0 };
let chosen = null; // {step, answer, token}
let rank = -1;

const record = () => data.records[state.step];
const inDomain = (answer) => state.domain === null || answer.domain === state.domain;
const counterpart = (step) => {
  const key = record().answers[state.answer].key;
  return data.records[step].answers.findIndex((answer) => answer.key === key);
};

/** What colours the tokens, with nothing where the mask is 0. */
function values(step, answer) {
  const teacher = data.records[step].teachers[state.teacher];
  if (teacher === undefined) return [];
  const column = columns(answer)[state.colour][teacher];
  return column === null ? [] : column.map((value, i) => (answer.mask[i] === "1" ? value : null));
}

function level(value, edges) {
  let found = 0;
  while (found < edges.length && Math.abs(value) >= edges[found]) found++;
  return found;
}

function colour(value, counts) {
  if (!counts) return "t-masked";
  if (value === null || value === undefined) return "t-0";
  if (state.colour === "kl") return "t-k" + (value > 0 ? level(value, data.kl_edges) : 0);
  const found = level(value, data.penalty_edges);
  return "t-" + (found === 0 ? "0" : (value < 0 ? "m" : "p") + found);
}

// ---- the answers ----
function pane(step, index) {
  const box = el("section", "token-pane");
  const answer = data.records[step].answers[index];
  if (data.records.length > 1) box.append(el("h3", "", steps[step]));
  if (!answer) {
    box.append(el("p", "note", "This answer's prompt is not among those of " + steps[step] + " on this page."));
    return box;
  }
  box.append(facts(step, answer));
  const shown = el("div", "token-text");
  shown.setAttribute("role", "group");
  shown.setAttribute("aria-label", "Tokens of answer " + answer.id + ": arrow keys move");
  const column = columns(answer);
  const value = values(step, answer);
  const teacher = data.records[step].teachers[state.teacher];
  const joined = teacher === undefined ? null : column.spans[teacher];
  const isChosen = (i) => chosen && chosen.step === step && chosen.answer === index && chosen.token === i;
  column.tokens.forEach((token, i) => {
    const piece = data.texts[token];
    const span = el("span", colour(value[i], answer.mask[i] === "1"));
    if (piece === "") {
      span.classList.add("t-part");
      span.append("#" + data.ids[token]);
    } else span.append(...visible(piece, true));
    if (answer.finish_reason === "stop" && i === answer.length - 1) span.classList.add("t-end");
    if (joined) dress(span, joined, i, answer.mask[i] === "1", data.records[step].readers[teacher].name);
    span.tabIndex = i === 0 || isChosen(i) ? 0 : -1;
    span.dataset.token = i;
    shown.append(span);
  });
  shown.dataset.step = step;
  shown.dataset.answer = index;
  if (column.tokens.length === 0) shown.append(el("span", "token-flag", "(no tokens)"));
  const missing = answer.length - column.tokens.length;
  if (missing > 0) shown.append(el("span", "token-flag", "… " + plural(missing, "token") + " left out"));
  else if (answer.finish_reason === "length") shown.append(el("span", "token-flag t-cut", "✂ cut at the limit"));
  else if (answer.finish_reason === "stop" && answer.length > 0) shown.append(el("span", "token-flag", "■ end"));
  box.append(shown);
  return box;
}

function facts(step, answer) {
  const value = values(step, answer).filter((one) => one !== null);
  const list = [answer.id, plural(answer.length, "token")];
  if (answer.domain) list.push(answer.domain);
  if (answer.turn) list.push("turn " + answer.turn);
  if (answer.score !== null) list.push("score " + answer.score);
  if (value.length) {
    const mean = value.reduce((a, b) => a + b, 0) / value.length;
    list.push(state.colour === "kl" ? "mean KL " + fixed(mean, 3) : "mean penalty " + signed(mean, 3));
  }
  return el("p", "note token-facts", ...list.map((fact) => el("span", "", fact)));
}

function showAnswer() {
  const answer = record().answers[state.answer];
  const prompt = el("details", "token-prompt", el("summary", "", "Prompt"), el("pre", "", answer.prompt));
  prompt.open = answer.prompt.length < 600;
  const shown = [prompt, pane(state.step, state.answer)];
  if (state.beside !== null && state.beside !== state.step) shown.push(pane(state.beside, counterpart(state.beside)));
  $("panes").replaceChildren(...shown);
  $("answer").value = state.answer;
  mark();
}

function spanOf(place) {
  if (!place) return null;
  for (const shown of $("panes").querySelectorAll(".token-text"))
    if (+shown.dataset.step === place.step && +shown.dataset.answer === place.answer)
      return shown.querySelector('[data-token="' + place.token + '"]');
  return null;
}

function placeOf(target) {
  const span = target.closest && target.closest("[data-token]");
  if (!span) return null;
  const { step, answer } = span.parentNode.dataset;
  return { step: +step, answer: +answer, token: +span.dataset.token };
}

function mark() {
  for (const old of $("panes").querySelectorAll(".t-chosen")) old.classList.remove("t-chosen");
  const span = spanOf(chosen);
  if (span) span.classList.add("t-chosen");
  else chosen = null;
  showPanel(chosen);
}

function choose(place, focus) {
  const before = spanOf(chosen);
  chosen = place;
  const span = spanOf(place);
  if (span) {
    for (const other of span.parentNode.querySelectorAll('[tabindex="0"]')) other.tabIndex = -1;
    span.tabIndex = 0;
    if (focus) {
      span.focus({ preventScroll: true });
      span.scrollIntoView({ block: before && before.parentNode === span.parentNode ? "nearest" : "center" });
    }
  }
  mark();
}

// ---- the worst ----
let worst = null;
function ranking() {
  if (worst === null) {
    const sign = state.colour === "kl" ? -1 : 1;
    worst = [];
    record().answers.forEach((answer, index) => {
      if (!inDomain(answer) || ($("only").checked && index !== state.answer)) return;
      const joined = columns(answer).spans[record().teachers[state.teacher]] || null;
      values(state.step, answer).forEach((value, token) => {
        if (value !== null && !isLater(joined, token)) worst.push([sign * value, index, token]);
      });
    });
    worst.sort((a, b) => a[0] - b[0] || a[1] - b[1] || a[2] - b[2]);
  }
  return worst;
}

function jump(by) {
  const list = ranking();
  if (!list.length) return;
  rank = Math.min(Math.max(rank + by, 0), list.length - 1);
  const [, answer, token] = list[rank];
  if (answer !== state.answer) {
    state.answer = answer;
    showAnswer();
  }
  choose({ step: state.step, answer, token }, true);
  showRank();
}

function showRank() {
  const total = ranking().length;
  $("rank").textContent = rank < 0 ? plural(total, "token") + " to go through" : "worst " + (rank + 1) + " of " + total.toLocaleString("en");
  $("previous").disabled = rank <= 0;
  $("next").disabled = rank >= total - 1;
}

// ---- controls ----
function fill(select, options, value) {
  select.replaceChildren(...options.map(([key, label]) => {
    const option = el("option", "", label);
    option.value = key === null ? "" : key;
    return option;
  }));
  select.value = value === null ? "" : value;
  select.parentNode.hidden = options.length < 2;
}

function fillAnswers() {
  const list = record().answers.map((answer, i) => [i, answer]).filter(([, answer]) => inDomain(answer));
  if (!list.some(([i]) => i === state.answer)) state.answer = list[0][0];
  fill($("answer"), list.map(([i, answer]) => [i, (i + 1) + ". " + answer.id]), state.answer);
}

function fillAll() {
  const source = record();
  const domains = [...new Set(source.answers.map((answer) => answer.domain))].sort();
  if (!domains.includes(state.domain)) state.domain = null;
  state.teacher = Math.min(state.teacher, Math.max(0, source.teachers.length - 1));
  const asked = source.readers[source.teachers[state.teacher]];
  const alike = source.student !== null && !(asked && asked.crossed); // KL is over one vocabulary
  if (!alike) state.colour = "penalty";
  fill($("step"), data.records.map((one, i) => [i, steps[i]]).filter(([i]) => data.records[i].answers.length), state.step);
  fill($("beside"), [[null, "nothing"], ...steps.map((label, i) => [i, label])], state.beside);
  if (data.records.length < 2) $("beside").parentNode.hidden = true;
  fill($("teacher"), source.teachers.map((reader, i) => [i, source.readers[reader].name]), state.teacher);
  fill($("domain"), domains.length < 2 ? [] : [["all", "all"], ...domains.map((name) => ["=" + name, name || "(none)"])],
    state.domain === null ? "all" : "=" + state.domain);
  $("colour").value = state.colour;
  $("colour").parentNode.hidden = !alike;
  fillAnswers();
}

function restart() {
  worst = null;
  rank = -1;
  fillAll();
  document.getElementById("token-legend-penalty").hidden = state.colour !== "penalty";
  document.getElementById("token-legend-kl").hidden = state.colour !== "kl";
  showAnswer();
  showCharts();
  showRank();
}

$("step").addEventListener("change", (event) => {
  const key = record().answers[state.answer].key;
  state.step = +event.target.value;
  state.answer = Math.max(0, record().answers.findIndex((answer) => answer.key === key));
  restart();
});
$("beside").addEventListener("change", (event) => {
  state.beside = event.target.value === "" ? null : +event.target.value;
  restart();
});
$("teacher").addEventListener("change", (event) => { state.teacher = +event.target.value; restart(); });
$("colour").addEventListener("change", (event) => { state.colour = event.target.value; restart(); });
$("domain").addEventListener("change", (event) => {
  state.domain = event.target.value === "all" ? null : event.target.value.slice(1);
  restart();
});
$("answer").addEventListener("change", (event) => {
  state.answer = +event.target.value;
  if ($("only").checked) restart();
  else showAnswer();
});
$("only").addEventListener("change", () => { worst = null; rank = -1; showRank(); });
$("next").addEventListener("click", () => jump(1));
$("previous").addEventListener("click", () => jump(-1));

const panes = $("panes");
panes.addEventListener("pointerover", (event) => {
  const place = event.pointerType === "touch" ? null : placeOf(event.target);
  if (place) showPanel(place);
});
panes.addEventListener("pointerleave", () => showPanel(chosen));
panes.addEventListener("click", (event) => {
  const place = placeOf(event.target);
  if (place) choose(place, false);
});
panes.addEventListener("focusin", (event) => {
  const place = placeOf(event.target);
  if (place) choose(place, false);
});
panes.addEventListener("keydown", (event) => {
  const place = placeOf(event.target);
  if (!place || event.ctrlKey || event.metaKey || event.altKey) return;
  const count = event.target.parentNode.querySelectorAll("[data-token]").length;
  const token = { ArrowRight: place.token + 1, ArrowLeft: place.token - 1, Home: 0, End: count - 1 }[event.key];
  if (token === undefined) return;
  event.preventDefault();
  if (token >= 0 && token < count) choose({ ...place, token }, true);
});
document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  // Not where somebody types; but our own lists, or n would do nothing after a choice.
  const field = event.target.closest("input:not([type=checkbox]), select, textarea, [contenteditable]");
  if (field && !$("app").contains(field)) return;
  if ("np".includes(event.key)) event.preventDefault();
  if (event.key === "n") jump(1);
  else if (event.key === "p") jump(-1);
  else if (event.key === "Escape" && chosen) choose(null, false);
});
let resized = 0;
window.addEventListener("resize", () => {
  clearTimeout(resized);
  resized = setTimeout(showCharts, 100);
});

/** Where to begin: at the answer with the worst token, of the step shown or of the one beside it. */
function telling() {
  let lowest = Infinity;
  let found = 0;
  for (const step of new Set([state.step, state.beside === null ? state.step : state.beside])) {
    for (const answer of data.records[step].answers) {
      const index = record().answers.findIndex((other) => other.key === answer.key);
      for (const value of values(step, answer)) {
        if (index >= 0 && value !== null && value < lowest) [lowest, found] = [value, index];
      }
    }
  }
  return found;
}

$("static").remove();
$("app").hidden = false;
state.answer = telling();
restart();
