// Mean penalty or KL along the answers, and of each domain, of the shown step and the one it is compared with.
function compared() {
  const shown = [[state.step, 3]]; // colours without a meaning here: not the blue and orange of the tokens
  if (state.beside !== null && state.beside !== state.step) shown.push([state.beside, 6]);
  return shown;
}

function grouped(step, key) {
  const sums = new Map();
  for (const answer of data.records[step].answers) {
    if (!inDomain(answer)) continue;
    values(step, answer).forEach((value, i) => {
      if (value === null) return;
      const group = key(answer, i);
      const sum = sums.get(group) || { total: 0, n: 0 };
      sum.total += value;
      sum.n += 1;
      sums.set(group, sum);
    });
  }
  return new Map([...sums].map(([group, { total, n }]) => [group, { mean: total / n, n }]));
}

function ticks(low, high) {
  const rough = (high - low) / 4;
  const power = 10 ** Math.floor(Math.log10(rough));
  const unit = [1, 2, 5, 10].find((one) => one * power >= rough) * power;
  const list = [];
  for (let i = Math.ceil(low / unit - 1e-9); i * unit <= high + 1e-9 * unit; i++) list.push(i * unit);
  return [list, Math.max(0, -Math.floor(Math.log10(unit) + 1e-9))];
}

function range(all) {
  const low = Math.min(0, ...all);
  const high = Math.max(0, ...all);
  return high - low < 0.01 ? [low - (state.colour === "kl" ? 0 : 0.005), high + 0.005] : [low, high];
}

function chartByPosition(width) {
  const longest = Math.max(1, ...compared().flatMap(([step]) =>
    data.records[step].answers.filter(inDomain).map((answer) => columns(answer).tokens.length)));
  const size = Math.max(1, Math.ceil(longest / 40));
  const lines = compared().map(([step, series]) => [grouped(step, (_, i) => Math.floor(i / size)), series, step]);
  const means = lines.flatMap(([groups]) => [...groups.values()].map((group) => group.mean));
  if (!means.length) return [el("p", "note", "No numbers.")];
  const height = 206;
  const [left, right, top, bottom] = [48, 12, 26, 34];
  const [low, high] = range(means);
  const x = (position) => left + ((width - left - right) * (position + 0.5)) / Math.max(1, Math.ceil(longest / size));
  const y = (value) => top + ((high - value) / (high - low)) * (height - top - bottom);
  const chart = svg("svg", { class: "chart", width, height, viewBox: "0 0 " + width + " " + height, role: "img" });
  chart.append(svg("text", { x: 2, y: 12 }, "nats per token"));
  const [at, places] = ticks(low, high);
  for (const value of at) {
    chart.append(svg("line", { class: Math.abs(value) < 1e-12 ? "axis" : "grid", x1: left, x2: width - right, y1: y(value), y2: y(value) }),
      svg("text", { x: left - 6, y: y(value) + 4, "text-anchor": "end" }, fixed(value, places)));
  }
  const count = Math.ceil(longest / size);
  for (const bin of new Set([0, Math.floor((count - 1) / 2), count - 1]))
    chart.append(svg("text", { x: x(bin), y: height - 18, "text-anchor": "middle" }, String(bin * size + 1)));
  chart.append(svg("text", { x: (left + width - right) / 2, y: height - 3, "text-anchor": "middle" }, "position in the answer"));
  for (const [groups, series, step] of lines.reverse()) {
    const points = [...groups].sort((a, b) => a[0] - b[0]);
    chart.append(svg("polyline", { class: "curve stroke-" + series, points: points.map(([bin, group]) => x(bin).toFixed(1) + "," + y(group.mean).toFixed(1)).join(" ") }));
    for (const [bin, group] of points) {
      const place = size === 1 ? "position " + (bin + 1) : "positions " + (bin * size + 1) + " to " + (bin + 1) * size;
      chart.append(svg("circle", { class: "fill-" + series, cx: x(bin), cy: y(group.mean), r: 3 },
        svg("title", {}, steps[step] + ", " + place + ": " + signed(group.mean, 3) + " (" + plural(group.n, "token") + ")")));
    }
  }
  return [chart];
}

function chartByDomain(width) {
  const shown = compared().map(([step, series]) => [grouped(step, (answer) => answer.domain), series, step]);
  const names = [...new Set(shown.flatMap(([groups]) => [...groups.keys()]))];
  if (names.length < 2) return []; // one bar compares nothing
  const mean = (name) => (shown[0][0].get(name) || { mean: 0 }).mean * (state.colour === "kl" ? -1 : 1);
  names.sort((a, b) => mean(a) - mean(b));
  const most = 12;
  const means = shown.flatMap(([groups]) => [...groups.values()].map((group) => group.mean));
  const [low, high] = range(means);
  const [thick, left, right] = [14, 4, 4];
  const rowHeight = 20 + thick * shown.length + 6;
  const kept = names.slice(0, most);
  const room = width - left - right - 60;
  const x = (value) => left + (low < 0 ? 56 : 0) + ((value - low) / (high - low)) * (room - (low < 0 ? 56 : 0));
  const height = rowHeight * kept.length + 4;
  const chart = svg("svg", { class: "chart", width, height, viewBox: "0 0 " + width + " " + height, role: "img" });
  kept.forEach((name, row) => {
    const fits = Math.floor(width / 8);
    chart.append(svg("text", { x: left, y: row * rowHeight + 14, class: "token-domain" },
      (name.length > fits ? name.slice(0, fits - 1) + "…" : name) || "(no domain)", svg("title", {}, name)));
    const axis = row * rowHeight + 18;
    chart.append(svg("line", { class: "axis", x1: x(0), x2: x(0), y1: axis, y2: axis + thick * shown.length + 4 }));
    shown.forEach(([groups, series, step], i) => {
      const group = groups.get(name);
      if (!group) return;
      const top = row * rowHeight + 20 + i * thick;
      const told = steps[step] + ", " + (name || "(no domain)") + ": " + signed(group.mean, 3) + " (" + plural(group.n, "token") + ")";
      const below = group.mean < 0;
      chart.append(svg("rect", { class: "fill-" + series, x: Math.min(x(0), x(group.mean)), y: top + 1, height: thick - 2,
        width: Math.max(1, Math.abs(x(group.mean) - x(0))) }, svg("title", {}, told)),
        svg("text", { x: x(group.mean) + (below ? -5 : 5), y: top + thick - 3, "text-anchor": below ? "end" : "start" },
          fixed(group.mean, 3)));
    });
  });
  const rest = names.length - kept.length;
  return rest > 0 ? [chart, el("p", "note", "and " + plural(rest, "domain") + " with less to tell")] : [chart];
}

function showCharts() {
  const what = state.colour === "kl" ? "Mean KL(student || teacher)" : "Mean penalty";
  for (const [name, draw, title] of [["by-position", chartByPosition, " by position"], ["by-domain", chartByDomain, " by domain"]]) {
    const keys = compared().length < 2 ? [] : compared().map(([step, series]) =>
      el("span", "token-key", el("span", "token-dot token-dot-" + series), steps[step]));
    const unit = name === "by-domain" ? ", nats per token" : "";
    $(name + "-title").replaceChildren(el("b", "", what + title), unit, ...keys);
    $(name).parentNode.hidden = false; // a hidden one has no width
    const drawn = draw(Math.max(260, Math.min(560, $(name).clientWidth || 480)));
    $(name).replaceChildren(...drawn);
    $(name).parentNode.hidden = !drawn.length;
  }
}
