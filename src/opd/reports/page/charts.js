// A line under the pointer, and the numbers there. Without it the charts are whole.
(() => {
  "use strict";
  const source = document.getElementById("chart-numbers");
  if (!source) return;
  const numbers = JSON.parse(source.textContent);
  const NS = "http://www.w3.org/2000/svg";

  const shown = (value) => {
    const size = Math.abs(value);
    if (size >= 1e5 || (size > 0 && size < 1e-3)) return value.toExponential(2);
    return String(Number(value.toPrecision(4)));
  };

  const nearest = (points, x) => {
    let low = 0, high = points.length - 1;
    while (high - low > 1) {
      const middle = (low + high) >> 1;
      if (points[middle][0] <= x) low = middle; else high = middle;
    }
    return Math.abs(points[low][0] - x) <= Math.abs(points[high][0] - x) ? points[low] : points[high];
  };

  for (const figure of document.querySelectorAll("figure[data-chart]")) {
    const chart = numbers[figure.dataset.chart];
    const svg = figure.querySelector("svg.chart");
    const readout = figure.querySelector("output");
    if (!chart || !svg || !readout || !chart.series.length) continue;
    const cross = document.createElementNS(NS, "line");
    cross.setAttribute("class", "cross");
    cross.setAttribute("y1", chart.y[0]);
    cross.setAttribute("y2", chart.y[1]);
    cross.setAttribute("visibility", "hidden");
    svg.append(cross);

    const look = (event) => {
      const box = svg.getBoundingClientRect();
      const at = (event.clientX - box.left) * svg.viewBox.baseVal.width / box.width;
      const share = (at - chart.x[0]) / (chart.x[1] - chart.x[0]);
      const x = chart.domain[0] + Math.min(Math.max(share, 0), 1) * (chart.domain[1] - chart.domain[0]);
      const found = chart.series.map((series) => [series, nearest(series.points, x)]);
      const best = found.reduce((a, b) => Math.abs(b[1][0] - x) < Math.abs(a[1][0] - x) ? b : a)[1][0];
      const place = chart.x[0] + (best - chart.domain[0]) / (chart.domain[1] - chart.domain[0]) * (chart.x[1] - chart.x[0]);
      cross.setAttribute("x1", place);
      cross.setAttribute("x2", place);
      cross.setAttribute("visibility", "visible");
      const said = found.map(([series, point]) => {
        const name = chart.series.length > 1 ? series.name + " " : "";
        const scale = chart.percent ? 100 : 1;
        const value = point[1] === null ? "missing" : shown(point[1] * scale) + (chart.percent ? " %" : "");
        const mean = point.length > 2 && point[2] !== null ? ", mean " + shown(point[2] * scale) + (chart.percent ? " %" : "") : "";
        return name + value + mean;
      });
      readout.textContent = chart.label + " " + shown(best) + ": " + said.join("; ");
    };
    svg.addEventListener("pointermove", look);
    svg.addEventListener("pointerdown", look);
    svg.addEventListener("pointerleave", () => {
      cross.setAttribute("visibility", "hidden");
      readout.textContent = "";
    });
  }
})();
