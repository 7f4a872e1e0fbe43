// The panel: everything about one token.
function verdict(step, value) {
  if (value === null || value === undefined) return "no number for this token";
  const size = Math.abs(value);
  const ratio = Math.exp(size);
  const times = ratio >= 1000 ? "more than 1,000 times" : (ratio < 10 ? ratio.toFixed(1) : ratio.toFixed(0)) + " times";
  if (!data.records[step].own) {
    if (size < data.penalty_edges[0]) return "as expected as the teacher's uncertainty explains";
    return (value < 0 ? "more" : "less") + " surprising than the teacher's own uncertainty explains";
  }
  if (size < data.penalty_edges[0]) return "about as likely to the teacher as to the student";
  return times + (value < 0 ? " less" : " more") + " likely to the teacher than to the student";
}

function showPanel(place) {
  const panel = $("panel");
  panel.classList.toggle("token-empty", place === null);
  if (place === null) {
    panel.replaceChildren(el("p", "note", "Point at a token, tap it, or move with the arrow keys. ", el("kbd", "", "n"),
      " goes to the worst one."));
    return;
  }
  const { step, token: i } = place;
  const source = data.records[step];
  const answer = source.answers[place.answer];
  const column = columns(answer);
  const token = column.tokens[i];
  const counts = answer.mask[i] === "1";
  const teacher = source.teachers[state.teacher];
  const value = teacher === undefined ? null : column.penalty[teacher][i];
  const joined = teacher === undefined ? null : column.spans[teacher];
  const span = joined && joined[i];
  const times = span ? span.count : 1; // the value is an equal share of what is said of the span
  const kl = teacher === undefined || column.kl[teacher] === null ? null : column.kl[teacher][i];
  const close = el("button", "token-close", "×");
  close.type = "button";
  close.setAttribute("aria-label", "Close");
  close.addEventListener("click", () => choose(null, false));
  const shown = named(token);
  shown.classList.add("token-big");
  const where = ["id " + data.ids[token], "token " + (i + 1) + " of " + answer.length, "turn " + answer.turn];
  if (data.records.length > 1) where.push(steps[step]);
  const jumps = el("p", "token-sheet-jump", ...[["‹ previous worst", -1], ["next worst ›", 1]].map(([label, by]) => {
    const button = el("button", "", label);
    button.type = "button";
    button.disabled = rank + by < 0 || rank + by >= ranking().length;
    button.addEventListener("click", () => jump(by));
    return button;
  }));
  const parts = [close, shown, el("p", "note token-facts", ...where.map((fact) => el("span", "", fact)))];
  if (!counts) parts.push(el("p", "t-masked token-verdict", "Masked: does not count."));
  else if (joined && !span)
    parts.push(el("p", "t-unmapped token-verdict", unmapped(data.texts[token], source.readers[teacher].name) + "."));
  else {
    const amount = el("b", colour(state.colour === "kl" ? kl : value, true) + " token-amount",
      state.colour === "kl" ? (kl === null ? "–" : fixed(kl, 3)) : value === null ? "–" : signed(value * times, 2));
    const of = times > 1 ? "nats for the " + times + " tokens of its span: " : "nats: ";
    const says = state.colour === "kl" ? "nats of KL at this place; the token itself: " : value === null ? "" : of;
    parts.push(el("p", "token-verdict", amount, " " + says + verdict(step, value === null ? null : value * times) + "."));
  }
  if (span) parts.push(sides(column, span, source.readers[teacher].name) || "");
  const readers = [...(source.student === null ? [] : [source.student]), ...source.teachers];
  const table = el("table", "token-readers", el("tr", "", el("th", ""), el("th", "number", "log-prob"),
    el("th", "number", "probability"), el("th", "number", "entropy")));
  const row = (reader, name, logprob, entropy) => {
    table.append(el("tr", reader === teacher || reader === source.student ? "" : "token-other",
      el("td", "", name), el("td", "number", logprob === null ? "–" : fixed(logprob, 3)),
      el("td", "number", logprob === null ? "–" : percent(logprob)),
      el("td", "number", entropy === null ? "–" : fixed(entropy, 2))));
  };
  for (const reader of readers) {
    const its = column.spans[reader] && column.spans[reader][i]; // of a span, all of it
    const name = source.readers[reader].name;
    if (its && its.count + its.own.length > 2)
      row(reader, name + ", span", together(column.logprobs[reader], its), together(column.entropy[reader], its));
    else row(reader, name, column.logprobs[reader][i], column.entropy[reader][i]);
    if (reader === source.student && times > 1)
      row(reader, name + ", span", together(column.logprobs[reader], span), together(column.entropy[reader], span));
  }
  parts.push(table);
  const rows = el("dl", "facts");
  if (state.colour === "kl" && value !== null) rows.append(el("dt", "", "penalty"), el("dd", "", signed(value, 3)));
  if (state.colour !== "kl" && kl !== null) rows.append(el("dt", "", "KL(student || teacher)"), el("dd", "", fixed(kl, 4)));
  if (rows.children.length) parts.push(rows);
  const beside = (source.student === null ? [] : [source.student]).concat(teacher === undefined ? [] : [teacher]);
  const lists = beside.map((reader) => reader === teacher && span
    ? [source.readers[reader].name + (times > 1 ? ", where the span begins" : ""), span.top, ...span.own[0]]
    : [source.readers[reader].name, column.top[reader][i], token, column.logprobs[reader][i]]);
  const filled = lists.filter(([, top]) => top.length);
  if (filled.length) parts.push(el("div", "token-tops", ...filled.map((list) => bars(...list))));
  parts.push(jumps);
  panel.replaceChildren(...parts);
}

function bars(name, row, token, logprob) {
  const list = el("ol", "");
  const entry = (index, value, className) => {
    const bar = svg("svg", { class: "token-bar", "aria-hidden": "true" },
      svg("rect", { width: (100 * Math.exp(value)).toFixed(2) + "%", height: "100%" }));
    list.append(el("li", className, named(index), el("span", "number", percent(value)), bar));
  };
  const same = (index) => data.ids[index] === data.ids[token];
  for (const [index, value] of row) entry(index, value, same(index) ? "t-written" : "");
  if (logprob !== null && !row.some(([index]) => same(index))) entry(token, logprob, "t-written t-below");
  return el("div", "", el("h3", "", name), list);
}
