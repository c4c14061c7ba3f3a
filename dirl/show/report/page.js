// The page: what the data block holds -> tiles, charts, players, configuration; or of groups of runs charts and tables.
"use strict";

function themeButton() {
  const button = element("button", { type: "button", "aria-label": "light or dark" }, "Light / dark");
  button.addEventListener("click", () => {
    const root = document.documentElement, isDark = root.dataset.theme ? root.dataset.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
    root.dataset.theme = isDark ? "light" : "dark";
  });
  return button;
}

function tiles(run) {
  return element("div", { class: "tiles" }, ...run.tiles.map(([name, value]) => element("div", { class: "tile" }, element("b", {}, value), element("span", {}, name))));
}

function pairs(rows) {
  return element("table", {}, ...rows.map(cells => element("tr", {}, ...cells.map((cell, i) => element(i ? "td" : "th", {}, cell)))));
}

function fold(title, isOpen, ...children) {
  return element("details", isOpen ? { open: "" } : {}, element("summary", {}, title), ...children);
}

function inColumns(runs, make) {
  const columns = element("div", { class: "columns" }, ...runs.map(run => element("section", {}, ...(runs.length > 1 ? [element("h3", {}, run.name)] : []), make(run))));
  columns.style.setProperty("--runs", runs.length);
  return columns;
}

function chartsOf(runs) {
  const titles = [...new Set(runs.flatMap(run => run.charts.map(panel => panel.title)))];
  const cells = titles.map(title => {
    const panels = runs.map(run => run.charts.find(panel => panel.title === title));
    const range = union(panels.filter(Boolean).map(extent));  // runs side by side share their axes
    return panels.map(panel => panel ? chart(panel, range) : element("figure", {}, element("h3", {}, title), element("span", { class: "soft" }, "not recorded")));
  });
  if (runs.length === 1) return element("div", { class: "charts" }, ...cells.flat());
  const grid = element("div", { class: "columns" }, ...runs.map(run => element("h3", {}, run.name)), ...cells.flat());
  grid.style.setProperty("--runs", runs.length);
  return grid;
}

function configuration(runs, differences) {
  const parts = [];
  if (runs.length > 1) {
    const head = ["key", ...runs.map(run => run.name)];
    parts.push(fold("What the configurations differ in", true, differences.length ? pairs([head, ...differences]) : element("p", {}, "Nothing.")));
  }
  parts.push(fold("Configuration", false, inColumns(runs, run => element("pre", {}, run.config))));
  parts.push(fold("Environment", false, inColumns(runs, run => pairs(run.environment))));
  return parts;
}

function reportPage(data) {
  const page = document.getElementById("page"), runs = data.runs;
  const header = element("header", {}, element("h1", {}, data.title), element("span", { class: "soft" }, data.subtitle), themeButton());
  page.append(header, inColumns(runs, tiles), element("h2", {}, "Curves"), chartsOf(runs));
  if (runs.some(run => run.samples.length)) {
    page.append(element("h2", {}, "Completions"), inColumns(runs, run => run.samples.length ? players(run.samples) : element("p", { class: "soft" }, "none recorded")));
  }
  page.append(element("h2", {}, "Cost"), inColumns(runs, run => pairs(run.cost)));
  page.append(element("h2", {}, "What ran"), ...configuration(runs, data.differences));
}

function groupPage(data) {
  const page = document.getElementById("page");
  page.append(element("header", {}, element("h1", {}, data.title), themeButton()), element("p", { class: "soft" }, data.subtitle));
  const cards = data.tables.map(table => element("section", {}, element("h2", {}, table.title), ...(table.note ? [element("p", { class: "soft" }, table.note)] : []), element("div", { class: "wide" }, pairs(table.rows))));
  page.append(...cards.slice(0, 2), element("h2", {}, "Curves"), element("p", { class: "soft" }, data.note));
  page.append(element("div", { class: "charts" }, ...data.charts.map(panel => chart(panel, extent(panel)))), ...cards.slice(2));
}

const data = JSON.parse(document.getElementById("data").textContent);
if (data.runs) reportPage(data);
else if (data.tables) groupPage(data);
else document.getElementById("page").append(players(data.samples));
document.documentElement.dataset.ready = "true";
