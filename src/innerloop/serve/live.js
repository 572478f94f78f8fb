"use strict";
(() => {
  const about = JSON.parse(document.getElementById("about").textContent);
  const $ = (id) => document.getElementById(id);
  const { make, paint } = parts;
  const number = (value, digits = 3) => (value === null ? "–" : Number(value.toPrecision(digits)).toString());
  const named = (line) => ({ name: `loop ${line.loop}`, noun: "latent", cells: line.cells });
  let lines = [], asking = null;

  function cell(line, i, j) {
    const own = line.cells[j];
    const node = make("button", { type: "button", class: "cell", tabindex: i + j === 0 ? 0 : -1, "data-line": i, "data-column": j, "aria-pressed": "false",
      "aria-label": `${line.name}, ${line.noun} ${j + 1}: ${own.top[0][0]}, probability ${number(own.top[0][1], 2)}` },
      make("span", { class: "word", text: own.top[0][0] }), make("span", { class: "value", text: own.top[0][1].toFixed(2) }));
    paint(node, own.top[0][1]);
    node.addEventListener("click", () => select(i, j));
    return node;
  }
  function draw() {
    $("map-section").hidden = lines.length === 0;
    const width = Math.max(0, ...lines.map((line) => line.cells.length));
    const head = make("tr", {}, make("td", { class: "corner", text: lines[0]?.noun ?? "" }),
      ...Array.from({ length: width }, (_, j) => make("th", { scope: "col", text: j + 1 })));
    const rows = lines.map((line, i) => make("tr", {}, make("th", { scope: "row", text: line.name }), ...line.cells.map((_, j) => make("td", {}, cell(line, i, j)))));
    const caption = make("caption", { class: "hidden", text: "Rows are loops, columns are positions; a cell holds the likeliest token." });
    $("map").replaceChildren(make("table", { class: "map" }, caption, make("thead", {}, head), make("tbody", {}, ...rows)));
  }
  function select(i, j, focus = false) {
    const own = lines[i]?.cells[j];
    if (!own) return;
    for (const node of document.querySelectorAll(".cell")) {
      const is = Number(node.dataset.line) === i && Number(node.dataset.column) === j;
      node.setAttribute("aria-pressed", is);
      node.tabIndex = is ? 0 : -1;
      if (is && focus) node.focus();
    }
    $("detail-title").textContent = `${lines[i].name}, ${lines[i].noun} ${j + 1}`;
    const rows = own.top.map(([word, prob]) => make("tr", {}, make("th", { scope: "row", text: word }), make("td", { text: prob.toFixed(3) }),
      make("td", { class: "bar-cell", "aria-hidden": "true" }, make("span", { class: "fill", style: `width: ${Math.max(100 * prob, 0.5)}%` }))));
    const moved = own.change === null || own.change === undefined ? [] : [make("p", { text: `Relative change of its state: ${number(own.change)}` })];
    $("detail").replaceChildren(make("table", {}, make("caption", { text: "Likeliest tokens" }), make("tbody", {}, ...rows)), ...moved);
  }
  const STEPS = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0] };
  $("map").addEventListener("keydown", (event) => {
    const step = STEPS[event.key], at = document.activeElement.dataset;
    if (!step || at.line === undefined) return;
    event.preventDefault();
    select(Number(at.line) + step[0], Number(at.column) + step[1], true);
  });

  function take(chunk) {
    if (chunk.error) throw new Error(chunk.error.message);
    const ours = chunk.innerloop ?? {};
    if (ours.loop) {
      lines = [...lines.slice(0, ours.loop.loop - 1), named(ours.loop)]; // it may think anew, where memory has run out
      draw();
      select(lines.length - 1, 0);
    }
    if (ours.thought) {
      lines = ours.thought.map(named);
      draw();
      select(0, 0);
    }
    if (ours.canvas) {
      lines.push({ name: `pass ${lines.length + 1}`, noun: "place", cells: ours.canvas.map((word, j) => ({ top: [[word ?? "·", word === null ? 0 : j < ours.n_final ? 1 : 0.5]], change: null })) });
      draw();
    }
    for (const choice of chunk.choices) $("text").textContent += choice.delta?.content ?? "";
    if (chunk.usage) {
      const u = chunk.usage.innerloop, entries = { passes: u.passes, positions: u.positions, "thought positions": u.thought_positions, loops: u.loops,
        "written tokens": chunk.usage.completion_tokens, time: `${(1000 * u.seconds).toFixed(1)} ms` };
      $("cost").replaceChildren(...Object.entries(entries).map(([name, value]) => make("div", {}, make("dt", { text: name }), make("dd", { text: value }))));
    }
  }
  async function ask() {
    asking?.abort();
    const own = (asking = new AbortController());
    lines = [];
    draw();
    $("text").textContent = $("error").textContent = "";
    $("cost").replaceChildren();
    $("written-section").hidden = false;
    $("stop").disabled = false;
    const value = (id) => ($(id).value === "" ? undefined : Number($(id).value));
    const body = { model: about.model, messages: [{ role: "user", content: $("question").value }], stream: true, stream_options: { include_usage: true },
      trace: true, loops: value("loops"), temperature: value("temperature"), max_tokens: value("most") };
    const headers = { "Content-Type": "application/json", ...(about.hasKey ? { Authorization: `Bearer ${$("key").value}` } : {}) };
    try {
      const answer = await fetch("/v1/chat/completions", { method: "POST", headers, body: JSON.stringify(body), signal: own.signal });
      if (!answer.ok) throw new Error((await answer.json()).error.message);
      const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
      for (let rest = "", part; !(part = await reader.read()).done; ) {
        const events = (rest + part.value).split("\n\n");
        rest = events.pop();
        for (const event of events) if (event !== "data: [DONE]") take(JSON.parse(event.slice(6)));
      }
    } catch (error) {
      if (error.name !== "AbortError") $("error").textContent = error.message;
    }
    if (asking === own) $("stop").disabled = true;
  }
  $("title").textContent = about.model;
  $("lead").textContent = `${about.method}: ${about.summary}`;
  $("key-label").hidden = !about.hasKey;
  $("form").addEventListener("submit", (event) => { event.preventDefault(); ask(); });
  $("stop").addEventListener("click", () => asking?.abort());
  document.addEventListener("keydown", (event) => {
    if (event.key === "Escape") asking?.abort();
    if (event.key === "Enter" && event.ctrlKey) $("form").requestSubmit();
  });
  const link = new URLSearchParams(location.search), given = link.get("q"); // a link may hold a question, and settings
  for (const id of ["loops", "temperature", "most"]) if (link.has(id)) $(id).value = link.get(id);
  if (given) { $("question").value = given; ask(); } else $("question").focus();
})();
