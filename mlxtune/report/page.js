"use strict";
// Reads out the curves at the step under the pointer, in all charts at once.
const plots = [...document.querySelectorAll(".plot:not(.still)")].map((box) => ({
  box,
  first: +box.dataset.first,
  last: +box.dataset.last,
  scale: +box.dataset.scale,
  log: "log" in box.dataset,
  curves: [...box.querySelectorAll(".curve")].map((group) => ({
    group,
    name: group.dataset.name,
    steps: group.dataset.steps.split(" ").map(Number),
    values: group.dataset.values.split(" ").map(Number),
  })),
}));

// Where in the ascending `steps` the one nearest to `step` is.
function nearest(steps, step) {
  let low = 0, high = steps.length - 1;
  while (high - low > 1) {
    const middle = (low + high) >> 1;
    if (steps[middle] <= step) low = middle; else high = middle;
  }
  return step - steps[low] <= steps[high] - step ? low : high;
}

function made(kind, name) {
  const element = document.createElement(kind);
  element.className = name;
  return element;
}

function figure(value) {
  const small = value !== 0 && Math.abs(value) < 1e-3;
  return small ? value.toExponential(2) : value.toLocaleString("en", { maximumSignificantDigits: 5 });
}

// A step's share of the axis, and back.
function placed(plot, step) {
  const form = plot.log ? Math.log1p : (value) => value;
  return form(step - plot.first) / form(plot.last - plot.first);
}

function stepAt(plot, share) {
  const whole = plot.last - plot.first;
  return plot.first + (plot.log ? Math.expm1(share * Math.log1p(whole)) : share * whole);
}

function hide() {
  for (const element of document.querySelectorAll(".cross, .tip")) element.remove();
}

function mark(plot, step, told) {
  const share = placed(plot, step);
  if (!(share >= 0 && share <= 1)) return; // nor the logarithm of what is before the first
  const cross = made("div", "cross");
  cross.style.left = `${100 * share}%`;
  plot.box.append(cross);
  const tip = made("div", "tip");
  const head = made("b", "");
  head.textContent = told ? `step ${step.toLocaleString("en")}` : "";
  if (told) tip.append(head);
  for (const curve of plot.curves) {
    if (getComputedStyle(curve.group).display === "none") continue;
    const at = nearest(curve.steps, step);
    // A held-out loss is far between; say at which step it was measured.
    const off = curve.steps[at] === step ? "" : ` (${curve.steps[at].toLocaleString("en")})`;
    const row = made("div", ""), name = made("i", ""), value = made("span", "");
    name.textContent = curve.name + off;
    value.textContent = figure(curve.values[at] / plot.scale);
    value.style.cssText = "position:static;font-size:inherit;line-height:inherit;color:inherit";
    row.append(name, value);
    tip.append(row);
  }
  tip.style[share < 0.5 ? "left" : "right"] = `calc(${100 * (share < 0.5 ? share : 1 - share)}% + .7rem)`;
  plot.box.append(tip);
}

function show(step, chosen) {
  hide();
  for (const plot of plots) mark(plot, step, plot === chosen);
}

for (const plot of plots) {
  const snap = (step) => {
    const near = plot.curves.map((curve) => curve.steps[nearest(curve.steps, step)]);
    return near.reduce((a, b) => (Math.abs(b - step) < Math.abs(a - step) ? b : a));
  };
  const follow = (event) => {
    const edges = plot.box.getBoundingClientRect();
    const share = Math.min(1, Math.max(0, (event.clientX - edges.left) / edges.width));
    plot.at = snap(stepAt(plot, share));
    show(plot.at, plot);
  };
  plot.box.addEventListener("pointermove", follow);
  plot.box.addEventListener("pointerdown", follow);
  plot.box.addEventListener("pointerleave", hide);
  plot.box.addEventListener("blur", hide);
  plot.box.addEventListener("keydown", (event) => {
    const way = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (!way) return;
    event.preventDefault();
    const steps = plot.curves[0].steps;
    const at = plot.at === undefined ? steps.length - 1 : nearest(steps, plot.at) + way;
    plot.at = steps[Math.min(steps.length - 1, Math.max(0, at))];
    show(plot.at, plot);
  });
}
