// The value under the pointer, read back from the drawn curve.
const tip = document.getElementById("tip");
const pair = (text) => text.split(" ").map(Number);
function show(event) {
  const svg = event.currentTarget;
  const [left, right, top, bottom] = pair(svg.dataset.box);
  const [x0, x1] = pair(svg.dataset.x), [y0, y1] = pair(svg.dataset.y);
  const frame = svg.getBoundingClientRect();
  const px = (event.clientX - frame.left) / frame.width * svg.viewBox.baseVal.width;
  const lines = [...svg.querySelectorAll("polyline")].reverse().map((line) => {
    let best = line.points[0];
    for (const p of line.points) if (Math.abs(p.x - px) < Math.abs(best.x - px)) best = p;
    const step = x0 + (best.x - left) / (right - left) * (x1 - x0);
    const value = y0 + (bottom - best.y) / (bottom - top) * (y1 - y0);
    return `${line.dataset.name}  ${svg.dataset.over} ${Math.round(step)}: ${Number(value.toPrecision(3))}`;
  });
  tip.textContent = lines.join("\n");
  tip.hidden = false;
  const width = document.documentElement.clientWidth;
  tip.style.left = `${Math.max(4, Math.min(event.clientX + 12, width - tip.offsetWidth - 4))}px`;
  tip.style.top = `${Math.max(4, event.clientY - tip.offsetHeight - 12)}px`;
}
for (const svg of document.querySelectorAll("svg.chart")) {
  svg.addEventListener("pointermove", show);
  svg.addEventListener("pointerdown", show);
  svg.addEventListener("pointerleave", () => { tip.hidden = true; });
}
