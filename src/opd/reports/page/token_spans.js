// A teacher with another tokenizer reads the answer in tokens of its own; where their borders meet there is a span.

/** How a token stands in its span: joined with others, split for the teacher, or in none. */
function dress(node, joined, i, counts, name) {
  if (joined === null) return;
  const span = joined[i];
  if (span === null) {
    if (counts) {
      node.className = node.className.replace("t-0", "t-unmapped");
      node.title = unmapped(node.textContent, name);
    }
  } else if (span.count > 1) {
    node.classList.add("t-join");
    if (i === span.first) node.classList.add("t-join-first");
    if (i === span.last) node.classList.add("t-join-last");
  } else if (span.own.length > 1) node.classList.add("t-split");
}

/** Why a token has no number. */
function unmapped(piece, name) {
  const broken = piece.includes("\ufffd") || piece.startsWith("#");
  return "No number: " + (broken ? "part of a character that is not whole, which " + name + " cannot read"
    : name + " has no such control token, or reads other text here: its tokenizer changes it");
}

/** Whether a token is not the first of its span: what is said of a span is said once. */
const isLater = (joined, i) => joined !== null && joined[i] !== null && joined[i].first !== i;

const sum = (values) => values.includes(null) ? null : values.reduce((a, b) => a + b, 0);

/** The numbers of a column at the tokens of a span, together. */
const together = (values, span) => sum(values.slice(span.first, span.last + 1));

/** Both sides of a span that is not one token of either: what each reads, the teacher's with its log-probabilities. */
function sides(column, span, name) {
  if (span === null || (span.count === 1 && span.own.length === 1)) return null;
  const ours = column.tokens.slice(span.first, span.last + 1).map((token) => el("span", "token-side", named(token)));
  const theirs = span.own.map(([token, logprob]) =>
    el("span", "token-side", named(token), el("small", "", logprob === null ? "–" : fixed(logprob, 2))));
  return el("dl", "facts token-sides", el("dt", "", "one span of the text"), el("dd", "", ...ours),
    el("dt", "", name + " reads"), el("dd", "", ...theirs));
}
