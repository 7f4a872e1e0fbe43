// Columns of numbers back from base 89; how they are written: token_columns.py.
const code = new Map([...data.digits].map((digit, value) => [digit, value]));
const BASE = data.digits.length;

function integer(packed, at, width) {
  let value = 0;
  for (let i = 0; i < width; i++) value = value * BASE + code.get(packed[at + i]);
  return value;
}

function number(packed, at, [width, step, low]) {
  const value = integer(packed, at, width);
  return value === BASE ** width - 1 ? null : Math.round((low + step * value) * 1e4) / 1e4;
}

function numbers(packed, spec) {
  if (packed === null) return null;
  return Array.from({ length: packed.length / spec[0] }, (_, i) => number(packed, i * spec[0], spec));
}

function alternatives(packed, spec) {
  const rows = [];
  for (let at = 0; at < packed.length; ) {
    const row = Array.from({ length: integer(packed, at, 1) }, (_, i) => {
      const start = at + 1 + i * (data.width + spec[0]);
      return [integer(packed, start, data.width), number(packed, start + data.width, spec)];
    });
    at += 1 + row.length * (data.width + spec[0]);
    rows.push(row);
  }
  return rows;
}

/** Of a reader with another tokenizer: the span of each token, null where it has none; with its first and last token, the
 * reader's own tokens [text, log-probability], and its alternatives where the span begins. */
function crossed(answer, reader) {
  if (!answer.spans || answer.spans[reader] === null) return null;
  const own = alternatives(answer.own[reader], data.numbers.logprob);
  const top = alternatives(answer.own_top[reader], data.numbers.alternative);
  const found = [];
  let count = 0;
  let span = null;
  [...answer.spans[reader]].forEach((letter, i) => {
    if (letter === "b") span = { first: i, count: 0, own: own[count], top: top[count++] };
    if (letter !== "u") {
      span.last = i;
      span.count++;
    }
    found.push(letter === "u" ? null : span);
  });
  return found;
}

const opened = new Map(); // decoding waits until an answer is needed
function columns(answer) {
  if (!opened.has(answer)) {
    const unpack = (name, kind) => answer[name].map((packed) => numbers(packed, data.numbers[kind]));
    opened.set(answer, {
      tokens: Array.from({ length: answer.tokens.length / data.width }, (_, i) =>
        integer(answer.tokens, i * data.width, data.width)),
      logprobs: unpack("logprobs", "logprob"),
      entropy: unpack("entropy", "entropy"),
      kl: unpack("kl", "kl"),
      penalty: unpack("penalty", "penalty"),
      top: answer.top.map((packed) => alternatives(packed, data.numbers.alternative)),
      spans: answer.top.map((_, reader) => crossed(answer, reader)),
    });
  }
  return opened.get(answer);
}
