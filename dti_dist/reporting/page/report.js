// Values under the pointer. Everything is on the page without it.
"use strict";
const SIZE = 1000;
const words = value => {
  const large = [[1e9, "G"], [1e6, "M"], [1e4, "k"]].find(([size]) => Math.abs(value) >= size);
  if (large) return +(value / (large[1] === "k" ? 1e3 : large[0])).toPrecision(4) + large[1];
  return String(+value.toPrecision(5));
};
const duration = seconds => seconds < 120 ? `${words(seconds)} s`
  : seconds < 7200 ? `${(seconds / 60).toFixed(1)} min` : `${(seconds / 3600).toFixed(2)} h`;

function pointsOf(path) {
  return [...path.getAttribute("d").matchAll(/[ML]([-\d.]+),([-\d.]+)/g)].map(m => [+m[1], +m[2]]);
}

for (const plot of document.querySelectorAll(".wide .plot, .chart.wide .plot")) {
  const [x0, x1] = plot.dataset.x.split(" ").map(Number);
  const [y0, y1] = plot.dataset.y.split(" ").map(Number);
  const overTime = plot.dataset.unit.startsWith("time");
  let series = null, hair = null, read = null;

  plot.addEventListener("pointermove", event => {
    series ??= [...plot.querySelectorAll("path[data-name]")].map(path =>
      ({ name: path.dataset.name, points: pointsOf(path) })).filter(one => one.points.length);
    if (!series.length) return;
    if (!hair) {
      hair = plot.appendChild(Object.assign(document.createElement("div"), { className: "hair" }));
      read = plot.appendChild(Object.assign(document.createElement("span"), { className: "read" }));
    }
    const box = plot.getBoundingClientRect();
    const wanted = (event.clientX - box.left) / box.width * SIZE;
    const nearest = series.map(one => one.points.reduce((best, point) =>
      Math.abs(point[0] - wanted) < Math.abs(best[0] - wanted) ? point : best));
    const at = nearest.reduce((best, point) =>
      Math.abs(point[0] - wanted) < Math.abs(best[0] - wanted) ? point : best)[0];
    const x = x0 + at / SIZE * (x1 - x0);
    read.textContent = [
      `${overTime ? duration(x) : words(x)} ${plot.dataset.unit}`,
      ...series.map((one, i) => `${one.name ? one.name + ": " : ""}${words(y1 - nearest[i][1] / SIZE * (y1 - y0))}`),
    ].join("\n");
    hair.style.left = `${at / SIZE * 100}%`;
    hair.hidden = read.hidden = false;
    const right = at > SIZE / 2;
    read.style.left = right ? "" : `calc(${at / SIZE * 100}% + 8px)`;
    read.style.right = right ? `calc(${100 - at / SIZE * 100}% + 8px)` : "";
  });
  plot.addEventListener("pointerleave", () => { if (hair) hair.hidden = read.hidden = true; });
}
addEventListener("beforeprint", () => document.querySelectorAll("details").forEach(d => { d.open = true; }));
