// Charts: a panel {title, unit, kind, series: [{name, x, y, e? or low? and high?, color?}]} -> a figure with an inline SVG drawn at its real width.
"use strict";

const SVG = "http://www.w3.org/2000/svg";
const HEIGHT = 210, MARGIN = { left: 46, right: 10, top: 10, bottom: 24 };
const SMOOTHED_FROM = 20;  // points; below, the raw curve is readable

function element(name, attributes = {}, ...children) {
  const made = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) {
    if (key === "class") made.className = value; else made.setAttribute(key, value);
  }
  made.append(...children);  // strings become text nodes: nothing of a run is ever read as markup
  return made;
}

function shape(parent, name, attributes, text) {
  const made = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  if (text !== undefined) made.textContent = text;
  parent.append(made);
  return made;
}

function color(index) { return `var(--s${index % 8})`; }

function tint(series, index) { return color(series.color ?? index); }

// Lower and upper edge of what lies around a line: given, or its errors; null: nothing does.
function edges(series) {
  if (series.low) return [series.low, series.high];
  return series.e ? [-1, 1].map(sign => series.y.map((y, i) => y + sign * series.e[i])) : null;
}

function readable(value) {
  if (value === null || value === undefined) return "none";
  if (value === 0) return "0";
  const size = Math.abs(value);
  if (size >= 1e5 || size < 1e-3) return value.toExponential(1).replace("e+", "e");
  return String(Number(value.toPrecision(4)));
}

function ticks(low, high, wanted) {
  const span = high - low || 1, rough = span / wanted, power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 2.5, 5, 10].map(factor => factor * power).find(size => size >= rough);
  const found = [];
  for (let tick = Math.ceil(low / step - 1e-9) * step; tick <= high + step * 1e-6; tick += step) {
    found.push(Math.abs(tick) < step * 1e-6 ? 0 : tick);
  }
  return found;
}

// Mean over a tenth of the curve around each point: centred, so that it does not lag; narrower at the ends.
function smooth(values) {
  const reach = Math.max(1, Math.floor(values.length / 20)), sums = [0];
  for (const value of values) sums.push(sums[sums.length - 1] + value);
  return values.map((_, index) => {
    const within = Math.min(reach, index, values.length - 1 - index);
    return (sums[index + within + 1] - sums[index - within]) / (2 * within + 1);
  });
}

// Lower and upper edge of each layer of a stacked panel.
function stack(panel) {
  const base = panel.series[0].x.map(() => 0);
  return panel.series.map(series => {
    const low = base.slice();
    series.y.forEach((value, index) => { base[index] += value; });
    return { low, high: base.slice() };
  });
}

function extent(panel) {
  const xs = panel.series.flatMap(series => series.x);
  let ys = panel.series.flatMap(series => series.y);
  if (panel.kind === "stacked") ys = [0, ...stack(panel).flatMap(layer => layer.high)];
  for (const series of panel.series) {
    const around = edges(series);
    if (around) ys.push(...around[0], ...around[1]);
  }
  const least = values => values.reduce((a, b) => Math.min(a, b)), most = values => values.reduce((a, b) => Math.max(a, b));
  return { x: [least(xs), most(xs)], y: [least(ys), most(ys)] };
}

function union(extents) {
  const join = axis => [Math.min(...extents.map(e => e[axis][0])), Math.max(...extents.map(e => e[axis][1]))];
  return { x: join("x"), y: join("y") };
}

function scales(range, width) {
  let [low, high] = range.y;
  if (low > 0 && low < 0.4 * high) low = 0;
  if (high === low) { high += Math.abs(high) * 0.1 || 1; if (low !== 0) low -= Math.abs(low) * 0.1; }
  const span = Math.max(range.x[1] - range.x[0], 1e-9), inner = width - MARGIN.left - MARGIN.right;
  return {
    low, high,
    x: value => range.x[1] === range.x[0] ? MARGIN.left + inner / 2 : MARGIN.left + (value - range.x[0]) / span * inner,
    y: value => HEIGHT - MARGIN.bottom - (value - low) / (high - low) * (HEIGHT - MARGIN.top - MARGIN.bottom),
  };
}

function path(xs, ys, to) {
  return xs.map((x, i) => `${i ? "L" : "M"}${to.x(x).toFixed(1)} ${to.y(ys[i]).toFixed(1)}`).join("");
}

function area(xs, lows, highs, to) {
  const back = xs.map((_, i) => xs.length - 1 - i);
  return path(xs, highs, to) + back.map(i => `L${to.x(xs[i]).toFixed(1)} ${to.y(lows[i]).toFixed(1)}`).join("") + "Z";
}

function drawAxes(svg, panel, range, to, width) {
  for (const tick of ticks(to.low, to.high, 4)) {
    shape(svg, "line", { class: "grid", x1: MARGIN.left, x2: width - MARGIN.right, y1: to.y(tick), y2: to.y(tick) });
    shape(svg, "text", { x: MARGIN.left - 6, y: to.y(tick) + 4, "text-anchor": "end" }, readable(tick));
  }
  const marks = range.x[0] === range.x[1] ? [range.x[0]] : ticks(range.x[0], range.x[1], Math.min(6, width / 90));
  for (const tick of marks) {
    shape(svg, "text", { x: to.x(tick), y: HEIGHT - 8, "text-anchor": "middle" }, readable(tick));
  }
}

function drawLine(svg, kind, series, index, to) {
  const stroke = tint(series, index), isLong = kind === "lines" && series.x.length >= SMOOTHED_FROM;
  const around = edges(series);
  if (around) shape(svg, "path", { class: "band", d: area(series.x, ...around, to), fill: stroke, "fill-opacity": 0.2 });
  const plain = { fill: "none", stroke, "stroke-linejoin": "round" };
  shape(svg, "path", { ...plain, class: "curve", d: path(series.x, series.y, to), "stroke-width": isLong ? 1 : 2, "stroke-opacity": isLong ? 0.35 : 1 });
  if (isLong) shape(svg, "path", { ...plain, d: path(series.x, smooth(series.y), to), "stroke-width": 2 });
  else if (series.x.length < SMOOTHED_FROM) series.x.forEach((x, i) => shape(svg, "circle", { cx: to.x(x), cy: to.y(series.y[i]), r: 2.5, fill: stroke }));
}

function drawStack(svg, panel, to) {
  const layers = stack(panel), xs = panel.series[0].x;
  const wide = xs.length === 1;  // one step: a column, as an area would have no width
  panel.series.forEach((series, index) => {
    const { low, high } = layers[index], fill = color(index);
    const d = wide
      ? `M${to.x(xs[0]) - 20} ${to.y(low[0])}h40V${to.y(high[0])}h-40Z`
      : area(xs, low, high, to);
    shape(svg, "path", { class: "layer", d, fill, "fill-opacity": 0.8 });
  });
}

function nearest(xs, x) {
  let best = 0;
  xs.forEach((value, index) => { if (Math.abs(value - x) < Math.abs(xs[best] - x)) best = index; });
  return best;
}

function fillTip(tip, panel, x) {
  tip.replaceChildren(element("b", {}, `${panel.x_label} ${readable(x)}`));
  panel.series.forEach((series, index) => {
    const at = series.x.indexOf(x);
    if (at < 0) return;
    const swatch = element("i", {});
    swatch.style.background = tint(series, index);
    const error = series.e ? ` ± ${readable(series.e[at])}` : series.low ? ` (${readable(series.low[at])} to ${readable(series.high[at])})` : "";
    tip.append(element("div", { class: "legend" }, element("span", {}, swatch, `${series.name} ${readable(series.y[at])}${error}`)));
  });
}

function watch(svg, figure, panel, range, to) {
  const tip = element("div", { class: "tip", hidden: "" }), rule = shape(svg, "line", { class: "grid", y1: MARGIN.top, y2: HEIGHT - MARGIN.bottom, visibility: "hidden" });
  figure.append(tip);
  const xs = [...new Set(panel.series.flatMap(series => series.x))].sort((a, b) => a - b);
  svg.addEventListener("pointermove", event => {
    const box = svg.getBoundingClientRect(), pixel = event.clientX - box.left;
    const x = xs[nearest(xs.map(to.x), pixel)];
    fillTip(tip, panel, x);
    tip.hidden = false;
    const left = to.x(x) + 16, room = figure.clientWidth - tip.offsetWidth - 8;
    tip.style.left = `${Math.max(4, left > room ? to.x(x) - tip.offsetWidth : left)}px`;
    tip.style.top = "36px";
    for (const side of ["x1", "x2"]) rule.setAttribute(side, to.x(x));
    rule.setAttribute("visibility", "visible");
  });
  svg.addEventListener("pointerleave", () => { tip.hidden = true; rule.setAttribute("visibility", "hidden"); });
}

function legend(panel) {
  return element("div", { class: "legend" }, ...panel.series.map((series, index) => {
    const swatch = element("i", {});
    swatch.style.background = tint(series, index);
    return element("span", {}, swatch, series.name);
  }));
}

function chart(panel, range) {
  const figure = element("figure", { "data-chart": panel.title });
  figure.append(element("figcaption", {}, element("h3", {}, panel.title), element("span", { class: "soft" }, panel.unit)));
  const holder = element("div", {});
  figure.append(holder);
  if (panel.series.length > 1 || panel.series[0].name !== panel.title) figure.append(legend(panel));
  let drawn = 0;
  const draw = () => {
    const width = Math.floor(holder.clientWidth);
    if (!width || width === drawn) return;
    drawn = width;
    holder.replaceChildren();
    figure.querySelectorAll(".tip").forEach(tip => tip.remove());
    const last = panel.series.map(series => `${series.name} ${readable(series.y[series.y.length - 1])}`).join(", ");
    const svg = shape(holder, "svg", { viewBox: `0 0 ${width} ${HEIGHT}`, height: HEIGHT, role: "img", "aria-label": `${panel.title}; last: ${last}` });
    const to = scales(range, width);
    drawAxes(svg, panel, range, to, width);
    if (panel.kind === "stacked") drawStack(svg, panel, to);
    else panel.series.forEach((series, index) => drawLine(svg, panel.kind, series, index, to));
    watch(svg, figure, panel, range, to);
  };
  new ResizeObserver(draw).observe(holder);
  return figure;
}
