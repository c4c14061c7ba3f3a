// Player: completions with the step each token was revealed at -> a slider over the denoising steps.
"use strict";

// Denoising steps of all blocks in a row: for each token its block and its step counted over the whole completion.
function timeline(sample) {
  const tail = sample.tail, blocks = [], blockOf = [];
  sample.texts.forEach((text, index) => {
    const number = Math.floor((tail + index) / sample.block_length);
    (blocks[number] ??= []).push(index);
    blockOf[index] = number;
  });
  const at = [], starts = [];
  let before = 0;
  for (const members of blocks) {
    starts.push(before);
    for (const index of members) at[index] = before + sample.steps[index];
    before += members.reduce((most, index) => Math.max(most, sample.steps[index]), 0);
  }
  return { blocks, blockOf, at, starts, total: before, tail };
}

function tokenFacts(sample, line, index) {
  const parts = [`token ${index + 1} ${JSON.stringify(sample.texts[index])}`, `block ${line.blockOf[index] + 1}`, `revealed in step ${sample.steps[index]} of its block (${line.at[index]} in all)`];
  if (sample.confidence) parts.push(`confidence ${sample.confidence[index].toFixed(3)}`);
  if (index >= sample.completion_length) parts.push("after the end: no part of the text");
  return parts.join(", ");
}

// A newline must stay inside its span and still break the line.
function visible(text) { return text === "" ? "\u00b7" : text.replace(/\n/g, "\u21b5\n").replace(/\t/g, "\u21e5"); }

function board(sample, line) {
  const spans = [];
  const blocks = line.blocks.map((members, number) => {
    const block = element("span", { class: "block", "data-block": number });
    if (number === 0 && line.tail) block.append(element("span", { class: "tail", title: "the prompt's last tokens stand in this block" }, `${line.tail} prompt`));
    for (const index of members) {
      spans[index] = element("span", { class: "token", "data-token": index, title: tokenFacts(sample, line, index) }, visible(sample.texts[index]));
      block.append(spans[index]);
    }
    return block;
  });
  return { root: element("div", { class: "tokens" }, ...blocks), blocks, spans };
}

function show(sample, line, view, step) {
  view.spans.forEach((span, index) => {
    const state = line.at[index] > step ? "masked" : line.at[index] === step ? "new" : "committed";
    span.className = `token ${state}${index >= sample.completion_length && state !== "masked" ? " after" : ""}`;
  });
  view.blocks.forEach((block, number) => { block.classList.toggle("waiting", line.starts[number] >= Math.max(step, 1)); });
}

function controls(line, onStep) {
  const slider = element("input", { type: "range", min: 0, max: line.total, value: line.total, "aria-label": "denoising step" });
  const count = element("span", { class: "count" }), play = element("button", { type: "button" }, "Play");
  let timer = null;
  const stop = () => { clearInterval(timer); timer = null; play.textContent = "Play"; };
  const go = step => { slider.value = step; count.textContent = `step ${step} of ${line.total}`; onStep(step); };
  slider.addEventListener("input", () => { stop(); go(Number(slider.value)); });
  const move = by => { stop(); go(Math.max(0, Math.min(line.total, Number(slider.value) + by))); };
  play.addEventListener("click", () => {
    if (timer) { stop(); return; }
    if (Number(slider.value) >= line.total) go(0);
    play.textContent = "Pause";
    timer = setInterval(() => {
      if (!slider.isConnected || Number(slider.value) >= line.total) { stop(); return; }
      go(Number(slider.value) + 1);
    }, Math.max(40, Math.min(350, 8000 / Math.max(line.total, 1))));
  });
  const button = (text, label, by) => {
    const made = element("button", { type: "button", "aria-label": label }, text);
    made.addEventListener("click", () => move(by));
    return made;
  };
  const row = element("div", { class: "row" }, play, button("\u2039", "one step back", -1), slider, button("\u203a", "one step on", 1), count);
  go(line.total);
  return row;
}

function sampleCard(sample) {
  const line = timeline(sample), view = board(sample, line), facts = element("div", { class: "facts" });
  const parts = Object.entries(sample.rewards || {}).map(([name, value]) => `${name} ${value === null ? "did not apply" : readable(value)}`);
  const said = [];
  if (sample.reward !== null) said.push(`reward ${readable(sample.reward)}`);
  if (parts.length > 1) said.push(parts.join(", "));
  if (sample.answer) said.push(`expected ${sample.answer}`);
  said.push(`${sample.completion_length} tokens in ${line.total} steps`);
  if (sample.is_cut) said.push("only the beginning is kept in this report");
  const row = controls(line, step => show(sample, line, view, step));
  const pick = event => {
    const span = event.target.closest("[data-token]");
    if (!span) return;
    view.root.querySelectorAll(".picked").forEach(other => other.classList.remove("picked"));
    span.classList.add("picked");
    facts.textContent = tokenFacts(sample, line, Number(span.dataset.token));
  };
  view.root.addEventListener("pointerover", pick);
  view.root.addEventListener("click", pick);
  return element("div", { class: "player" }, element("div", { class: "question" }, sample.question), row, view.root, facts, element("p", { class: "soft" }, said.join(" · ")));
}

function players(samples) {
  const card = element("div", { class: "card" });
  const choice = element("select", { "aria-label": "completion" }, ...samples.map((sample, index) => element("option", { value: index }, sample.label)));
  const holder = element("div", {});
  const choose = () => holder.replaceChildren(sampleCard(samples[Number(choice.value)]));
  choice.addEventListener("change", choose);
  if (samples.length > 1) card.append(element("div", { class: "row" }, choice));
  const key = (name, text) => element("span", { class: `token ${name}` }, text);
  card.append(holder, element("div", { class: "key" }, element("span", {}, "each box is a block:"), key("masked", "masked"), key("new", "revealed in this step"), key("committed", "revealed before"), element("span", {}, "point at a token for its confidence")));
  choose();
  return card;
}
