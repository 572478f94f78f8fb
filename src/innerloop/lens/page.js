"use strict";
(() => {
  const record = JSON.parse(document.getElementById("record").textContent);
  const $ = (id) => document.getElementById(id);
  const { dark, make, colour, paint } = parts;
  const isDepth = record.family === "depth", isFilm = record.family === "canvas";
  const noun = isDepth ? "token" : isFilm ? "place" : "latent";
  const MARKS = { committed: "●", hidden: "?", "masked again": "↺", kept: "" };
  const view = { example: 0, line: 0, column: 0, colour: "probability" };

  const fill = (node, ...children) => node.replaceChildren(...children);
  const times = (n, word) => `${n} ${word}${n === 1 ? "" : "s"}`;
  const number = (value, digits = 3) => (value === null ? "" : Number(value.toPrecision(digits)).toString());
  const share = (value) => (value >= 0.9995 ? "1.00" : value < 0.01 ? "<.01" : value.toFixed(2));

  const ramp = () => make("span", { class: "ramp", "aria-hidden": "true",
    style: `background: linear-gradient(90deg, ${[0, 0.25, 0.5, 0.75, 1].map((a) => colour(a).ground).join(", ")})` });

  const cells = record.looks.flatMap((look) => look.grid.flatMap((line) => line.cells.filter(Boolean)));
  const changes = cells.map((cell) => cell.change).filter((change) => change !== null);
  const depths = record.looks.flatMap((look) => look.columns.map((c) => c.depth).filter((d) => d !== null));
  const most = { change: Math.max(...changes, 1e-9), depth: Math.max(...depths, 1), least: Math.min(...depths) };
  const depthAmount = (depth) => (most.depth === most.least ? 0.35 : 0.05 + 0.9 * (depth - most.least) / (most.depth - most.least));
  const valueOf = (cell) => (view.colour === "change" ? cell.change : cell.top[0][1]);
  const amountOf = (cell) => (view.colour === "change" ? (cell.change === null ? 0 : cell.change / most.change) : cell.top[0][1]);
  const columnName = (column) => ({ latent: `latent ${column.name}`, before: `${column.name} before the latents`, text: `text ${column.name}`,
    asked: `token ${column.name} of the question`, written: `written token ${column.name}`, place: `place ${column.name}` })[column.kind];
  const current = () => record.looks[view.example];
  const cellAt = (line, column) => current().grid[line]?.cells[column] ?? null;
  const isRead = (look, column) => look.grid.some((line) => line.cells[column]);
  const hit = (cell) => (cell.gold === null ? null : cell.rank === 0);

  function frame() {
    const right = record.looks.filter((look) => look.is_right).length;
    $("title").textContent = `Inside ${record.method}`;
    $("lead").textContent = `${record.summary} (${record.paper}). `
      + [`${record.task}/${record.split}`, record.run].filter(Boolean).join(", ");
    $("score").textContent = `${right} of ${record.looks.length} right`;
    const name = (look, i) => `${i + 1} ${look.is_right ? "✓" : "✗"} ${look.question.replace(/\s+/g, " ").slice(0, 90)}`;
    fill($("example"), ...record.looks.map((look, i) => make("option", { value: i, text: name(look, i) })));
    $("foot").textContent = `Each example was answered alone, so that seconds are those of one question. `
      + Object.entries(record.versions).map(([part, version]) => `${part} ${version}`).join(", ");
    if (isDepth) $("h-map").textContent = "What each token shows after its iterations";
    if (isFilm) $("h-map").textContent = "The canvas, pass by pass";
    const canChange = changes.length > 0;
    document.querySelector("input[value=change]").disabled = !canChange;
  }

  function answer() {
    const look = current();
    $("question").textContent = look.question;
    $("text").textContent = look.text.trim() || "(nothing)";
    $("predicted").textContent = look.predicted ?? "none found";
    $("gold").textContent = look.gold;
    fill($("verdict"), make("span", { class: `badge ${look.is_right ? "good" : "bad"}`, text: look.is_right ? "✓ correct" : "✗ wrong" }));
    $("steps").className = look.steps.length ? "steps" : "steps none";
    fill($("steps"), ...(look.steps.length ? look.steps.map((step) => make("li", { text: step })) : [make("li", { text: "none given" })]));
    const cost = look.cost, total = Object.values(cost.seconds).reduce((sum, s) => sum + s, 0);
    const flops = cost.flops >= 1e9 ? `${number(cost.flops / 1e9)} G` : `${number(cost.flops / 1e6)} M`;
    const entries = { passes: cost.passes, positions: cost.positions, "thought tokens": cost.thought_tokens,
      loops: cost.loops || null, FLOPs: flops,
      time: `${(1000 * total).toFixed(1)} ms (${Object.entries(cost.seconds).map(([phase, s]) => `${phase} ${(1000 * s).toFixed(1)}`).join(", ")})` };
    fill($("cost"), ...Object.entries(entries).filter(([, value]) => value !== null)
      .map(([name, value]) => make("div", {}, make("dt", { text: name }), make("dd", { text: value }))));
    if (!look.ended) $("cost").append(make("div", {}, make("dt", { text: "end" }), make("dd", { text: "cut at the most tokens" })));
  }

  function tokens() {
    const look = current();
    $("tokens-section").hidden = !isDepth || look.columns.length === 0;
    if ($("tokens-section").hidden) return;
    const counts = new Map();
    for (const column of look.columns) counts.set(column.depth, (counts.get(column.depth) ?? 0) + 1);
    const mean = look.columns.reduce((sum, column) => sum + column.depth, 0) / look.columns.length;
    const keys = [...counts].sort((a, b) => a[0] - b[0]).map(([depth, n]) => {
      const swatch = make("span", { class: "swatch", text: depth });
      paint(swatch, depthAmount(depth));
      return make("span", { class: "key" }, swatch, `× ${times(n, "token")}`);
    });
    fill($("tokens-legend"), make("span", { text: "iterations:" }), ...keys, make("span", { text: `mean ${mean.toFixed(2)}` }));
    const box = $("tokens");
    fill(box);
    let part = null;
    look.columns.forEach((column, i) => {
      if (column.kind !== part) {
        part = column.kind;
        box.append(make("span", { class: "part", text: part === "asked" ? "question" : "written" }));
      }
      const hasMap = isRead(look, i);
      const word = make(hasMap ? "button" : "span", { class: "word", type: hasMap ? "button" : null, "data-column": i,
        "aria-pressed": hasMap ? "false" : null, tabindex: hasMap ? (i === view.column ? 0 : -1) : null,
        "aria-label": hasMap ? `${columnName(column)}, ${times(column.depth, "iteration")}` : null }, column.name, make("sub", { text: column.depth }));
      paint(word, depthAmount(column.depth));
      if (hasMap) word.addEventListener("click", () => select(lastLine(i), i));
      box.append(word);
      if (column.name.endsWith("⏎")) box.append(make("br"));
    });
  }
  const lastLine = (column) => Math.max(current().grid.findLastIndex((line) => line.cells[column]), 0);

  function map() {
    const look = current();
    $("map-section").hidden = look.grid.length === 0;
    $("text-notes").hidden = look.grid.length > 0 || look.notes.length === 0;
    fill($(look.grid.length ? "notes" : "text-notes"), ...look.notes.map((note) => make("li", { text: note })));
    if (!look.grid.length) return;
    const places = look.columns.map((_, i) => i).filter((i) => !isDepth || isRead(look, i));
    const columns = places.map((i) => look.columns[i]), head = make("thead");
    if (columns.some((column) => column.group !== null)) {
      const line = make("tr", {}, make("td", { class: "corner" }));
      for (let i = 0; i < columns.length; ) {
        let n = 1;
        while (i + n < columns.length && columns[i + n].group === columns[i].group) n += 1;
        const group = columns[i].group;
        line.append(group === null ? make("td", { colspan: n }) : make("th", { class: "block", colspan: n, scope: "colgroup", text: `block ${group}` }));
        i += n;
      }
      head.append(line);
    }
    head.append(make("tr", {}, make("td", { class: "corner", text: noun }),
      ...columns.map((column) => make("th", { scope: "col", class: column.kind, text: column.name }))));
    const body = make("tbody");
    look.grid.forEach((line, i) => {
      const row = make("tr", { class: line.loop === 0 ? "answer-pass" : null }, make("th", { scope: "row", text: line.name }));
      for (const j of places) {
        const cell = line.cells[j];
        row.append(make("td", {}, cell === null
          ? make("span", { class: "none-cell", title: "not read out" }, make("span", { class: "hidden", text: "not read out" }))
          : button(look, line, i, j, cell)));
      }
      body.append(row);
    });
    const caption = make("caption", { class: "hidden", text: `Rows are passes, columns are ${noun}s; a cell holds the likeliest token.` });
    fill($("map"), make("table", { class: "map", id: "map-table" }, caption, head, body));
    legend();
    plain();
  }

  function button(look, line, i, j, cell) {
    const right = hit(cell);
    const node = make("button", { type: "button", class: cell.state ? `cell is-${cell.state.replace(" ", "-")}` : "cell", tabindex: -1, "data-line": i, "data-column": j, "aria-pressed": "false",
      title: cell.top[0][0] }, make("span", { class: "word", text: cell.top[0][0] }), make("span", { class: "value" }));
    if (right !== null) node.append(make("span", { class: "hit", "aria-hidden": "true", text: right ? "✓" : "✗" }));
    if (cell.state) node.append(make("span", { class: "hit", "aria-hidden": "true", text: MARKS[cell.state] }));
    shade(node, cell);
    const facts = [`${line.name}, ${columnName(look.columns[j])}: ${cell.top[0][0]}`, `probability ${share(cell.top[0][1])}`];
    if (cell.state) facts.push(cell.state);
    if (cell.change !== null) facts.push(`change ${number(cell.change)}`);
    if (right !== null) facts.push(right ? "the gold token" : `gold is ${cell.gold}, rank ${cell.rank}`);
    node.setAttribute("aria-label", facts.join(", "));
    node.addEventListener("click", () => select(i, j));
    return node;
  }
  function shade(node, cell) {
    const value = valueOf(cell);
    paint(node, amountOf(cell));
    node.querySelector(".value").textContent = value === null ? "–" : view.colour === "change" ? number(value, 2) : share(value);
  }

  function legend() {
    const top = view.colour === "change" ? number(most.change, 2) : "1", label = view.colour === "change" ? "change of the state" : "probability of the likeliest token";
    const keys = [make("span", {}, `${label}: 0`, ramp(), top)];
    if (current().grid.some((line) => line.cells.some((cell) => cell && cell.gold !== null))) {
      keys.push(make("span", {}, make("span", { class: "mark-good", text: "✓" }), " the gold token is the likeliest; ", make("span", { class: "mark-bad", text: "✗" }), " it is not"));
    }
    if (isFilm) keys.push(...["● committed in this pass", "? still hidden", "↺ masked again", "unmarked: kept from an earlier pass"].map((text) => make("span", { text })));
    fill($("map-legend"), ...keys);
  }

  // Scroll the map sideways, never the page.
  function reveal(node) {
    const box = $("map"), own = node.getBoundingClientRect(), seen = box.getBoundingClientRect();
    const head = box.querySelector("tbody th").offsetWidth;
    if (own.left < seen.left + head || own.right > seen.right) box.scrollLeft += own.left - seen.left - (seen.width + head - own.width) / 2;
  }

  function select(line, column, focus = false) {
    const cell = cellAt(line, column);
    if (!cell) return;
    view.line = line;
    view.column = column;
    for (const node of document.querySelectorAll(".cell, button.word")) {
      const own = Number(node.dataset.column) === column && (node.dataset.line === undefined || Number(node.dataset.line) === line);
      node.setAttribute("aria-pressed", own);
      node.tabIndex = own ? 0 : -1;
      if (!own) continue;
      if (focus && node.matches(focus)) node.focus({ preventScroll: !node.matches(".word") });
      if (node.matches(".cell")) reveal(node);
    }
    const look = current();
    $("detail-title").textContent = `${look.grid[line].name}, ${columnName(look.columns[column])}`;
    const rows = cell.top.map(([word, prob]) => {
      const bar = make("span", { class: "fill", style: `width: ${Math.max(100 * prob, 0.5)}%` });
      return make("tr", {}, make("th", { scope: "row", text: word }), make("td", { text: prob < 1e-3 ? prob.toExponential(0) : prob.toFixed(3) }),
        make("td", { class: "bar-cell", "aria-hidden": "true" }, bar));
    });
    const facts = [];
    if (cell.change !== null) facts.push(make("p", { text: `Relative change of its state: ${number(cell.change)}` }));
    const right = hit(cell);
    if (right !== null) {
      facts.push(make("p", {}, "Expected: ", make("code", { text: cell.gold }), " ",
        make("span", { class: right ? "mark-good" : "mark-bad", text: right ? "✓ the likeliest" : `✗ ${cell.rank} token${cell.rank > 1 ? "s are" : " is"} likelier` })));
    }
    if (look.columns[column].depth !== null) facts.push(make("p", { text: `The token runs ${times(look.columns[column].depth, "iteration")}.` }));
    fill($("detail"), make("table", {}, make("caption", { text: "Likeliest tokens" }), make("tbody", {}, ...rows)), ...facts);
  }

  function plain() {
    if (!$("plain").open) return fill($("plain-table"));
    const look = current(), body = make("tbody");
    look.grid.forEach((line) => line.cells.forEach((cell, j) => {
      if (!cell) return;
      body.append(make("tr", {}, make("th", { scope: "row", text: line.name }), make("td", { text: columnName(look.columns[j]) }),
        make("td", { class: "mono", text: cell.top[0][0] + (cell.state ? ` (${cell.state})` : "") }), make("td", { class: "number", text: number(cell.top[0][1]) }),
        make("td", { class: "number", text: number(cell.change) }), make("td", { class: "mono", text: cell.gold ?? "" }),
        make("td", { class: "number", text: cell.rank ?? "" })));
    }));
    const names = ["pass", noun, isFilm ? "token" : "likeliest token", "probability", "change", "gold token", "tokens likelier than gold"];
    fill($("plain-table"), make("table", { class: "plain" }, make("thead", {}, make("tr", {}, ...names.map((text) => make("th", { scope: "col", text })))), body));
  }

  function shown() {
    const look = current();
    $("shown-section").hidden = look.shown.length === 0;
    const names = ["where", "expected", "decoded", "token by token"];
    fill($("shown"), make("thead", {}, make("tr", {}, ...names.map((text) => make("th", { scope: "col", text })))),
      make("tbody", {}, ...look.shown.map((step) => make("tr", {}, make("th", { scope: "row", text: step.where }),
        make("td", { class: "mono expected", text: step.gold ?? "–" }), make("td", { class: "mono", text: step.decoded || "(nothing)" }),
        make("td", {}, step.is_right === null ? "not known" : make("span", { class: step.is_right ? "mark-good" : "mark-bad", text: step.is_right ? "✓ as expected" : "✗ differs" }))))));
  }

  const STATISTICS = [["change", "relative change", "‖zₜ − zₜ₋₁‖ / ‖zₜ‖"], ["cosine", "cosine", "zₜ with zₜ₋₁"], ["rms", "RMS", "of zₜ"], ["score", "stop score", ""]];
  const STYLES = [["● ─", "solid", "circle"], ["■ ╌", "dash", "square"], ["◆ ┈", "dot", "diamond"], ["▲ ╌", "dashdot", "triangle-up"],
    ["✚ ─", "longdash", "cross"]].map(([mark, dash, symbol]) => ({ mark, dash, symbol }));
  // One box for each statistic, for as long as the page is open: what is drawn in it is replaced, never taken away while
  // plotly may still be at work on it.
  const boxes = STATISTICS.map(([, title, formula]) => {
    const plot = make("div", { class: "plot", role: "img" });
    const box = make("div", { class: "curve" }, make("h3", {}, title, " ", make("span", { text: formula })), plot);
    $("curves").append(box);
    return { box, plot };
  });
  function curves() {
    const look = current();
    $("curves-section").hidden = look.loops.length === 0;
    if ($("curves-section").hidden) return;
    $("stop").hidden = look.stop === null;
    if (look.stop !== null) fill($("stop"), make("span", { class: "rule", text: "Stop: " }), look.stop.why);
    const series = [...new Set(look.loops.map((loop) => loop.series))];
    const style = getComputedStyle(document.documentElement), ink = style.getPropertyValue("--ink").trim();
    const soft = style.getPropertyValue("--soft").trim(), rule = style.getPropertyValue("--line").trim();
    const hues = [style.getPropertyValue("--accent").trim(), dark.matches ? "#f2b263" : "#b5600b"];
    const styleOf = (i) => ({ hue: hues[i % 2], ...STYLES[i % STYLES.length] }); // no two of the first ten are alike
    const threshold = look.stop?.threshold ?? null;
    const marks = series.length < 2 ? [] : series.map((s, i) => make("span", { class: "key" },
      make("span", { "aria-hidden": "true", text: styleOf(i).mark, style: `color: ${styleOf(i).hue}` }), s));
    if (threshold !== null) marks.push(make("span", { class: "key" }, make("span", { "aria-hidden": "true", text: "┈┈", style: `color: ${hues[1]}` }), `threshold ${number(threshold)}`));
    fill($("curves-legend"), ...marks);
    const known = STATISTICS.filter(([name]) => look.loops.some((loop) => loop[name] !== null));
    const last = Math.max(...look.loops.map((loop) => loop.loop));
    // All boxes are laid out before anything is drawn in them, so that every curve has its final width.
    STATISTICS.forEach((statistic, k) => { boxes[k].box.hidden = last < 2 || !known.includes(statistic); });
    $("curves").hidden = last < 2;
    STATISTICS.forEach(([name, title], k) => {
      const { box, plot } = boxes[k];
      if (box.hidden) return;
      plot.setAttribute("aria-label", series.map((s) => `${title} ${s}: `
        + look.loops.filter((l) => l.series === s).map((l) => `loop ${l.loop} ${number(l[name])}`).join(", ")).join("; "));
      const traces = series.map((s, i) => ({ x: look.loops.filter((l) => l.series === s).map((l) => l.loop),
        y: look.loops.filter((l) => l.series === s).map((l) => l[name]), name: s, mode: "lines+markers",
        line: { color: styleOf(i).hue, width: 2, dash: styleOf(i).dash }, marker: { size: 8, symbol: styleOf(i).symbol },
        hovertemplate: "loop %{x}: %{y:.4g}<extra></extra>" }));
      const values = look.loops.map((l) => l[name]).filter((value) => value !== null);
      const range = name === "cosine" ? { range: [Math.min(0, Math.min(...values) - 0.1), 1.08] } : { rangemode: name === "score" ? "normal" : "tozero" };
      if (name === "score" && threshold !== null) {
        traces.push({ x: [0.7, last + 0.3], y: [threshold, threshold], mode: "lines", name: "threshold",
          line: { color: hues[1], width: 1.5, dash: "dot" }, hovertemplate: "threshold %{y:.4g}<extra></extra>" });
      }
      const axis = { gridcolor: rule, linecolor: rule, zeroline: false, tickfont: { color: soft, size: 12 }, fixedrange: true };
      Plotly.react(plot, traces, {
        width: plot.clientWidth, height: plot.clientHeight, margin: { l: 44, r: 12, t: 8, b: 38 },
        showlegend: false, paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)",
        font: { color: ink, family: "system-ui, sans-serif" },
        xaxis: { ...axis, title: { text: "iteration", font: { size: 12, color: soft }, standoff: 6 },
          range: [0.7, last + 0.3], tickformat: "d", dtick: last <= 12 ? 1 : undefined },
        yaxis: { ...axis, nticks: 5, ...range },
        hoverlabel: { bgcolor: style.getPropertyValue("--card").trim(), font: { color: ink } },
      }, { displayModeBar: false });
    });
    const names = [...(series.length > 1 ? ["passes"] : []), "loop", ...known.map(([, title]) => title)];
    fill($("loops"), make("thead", {}, make("tr", {}, ...names.map((text) => make("th", { scope: "col", text })))),
      make("tbody", {}, ...look.loops.map((loop) => make("tr", {}, ...(series.length > 1 ? [make("td", { text: loop.series })] : []),
        make("th", { scope: "row", text: loop.loop }), ...known.map(([name]) => make("td", { class: "number", text: number(loop[name], 4) }))))));
  }

  // A cell worth looking at first: one with a gold token, else the last line's first.
  function firstCell(look) {
    for (let line = look.grid.length - 1; line >= 0; line -= 1) {
      const gold = look.grid[line].cells.findIndex((cell) => cell && cell.gold !== null);
      if (gold >= 0) return [line, gold];
    }
    if (isDepth) {
      const written = look.columns.findIndex((column, i) => column.kind === "written" && look.grid.some((line) => line.cells[i]));
      const column = Math.max(written, 0);
      return [lastLine(column), column];
    }
    for (let line = look.grid.length - 1; line >= 0; line -= 1) {
      const latent = look.grid[line].cells.findIndex((cell, i) => cell && ["latent", "place"].includes(look.columns[i].kind));
      if (latent >= 0) return [line, latent];
    }
    return [0, 0];
  }

  function show(example, announce = true) {
    view.example = Math.min(Math.max(example, 0), record.looks.length - 1);
    const look = current();
    $("example").value = view.example;
    $("previous").disabled = view.example === 0;
    $("next").disabled = view.example === record.looks.length - 1;
    [view.line, view.column] = firstCell(look);
    answer(); tokens(); map(); shown(); curves();
    $("loops-detail").open = $("curves").hidden; // a single iteration is no curve
    select(view.line, view.column);
    if (announce) $("announce").textContent = `Example ${view.example + 1} of ${record.looks.length}, ${look.is_right ? "correct" : "wrong"}`;
  }

  function move(event) {
    const step = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0] }[event.key];
    if (!step || event.altKey || event.ctrlKey || event.metaKey || event.shiftKey) return;
    const inMap = event.target.closest("#map-table"), inTokens = event.target.closest("#tokens");
    if (inMap || inTokens) {
      event.preventDefault();
      let line = view.line, column = view.column;
      if (inTokens) {
        column += step[1] || step[0];
        if (column >= 0 && column < current().columns.length && isRead(current(), column)) select(lastLine(column), column, "button.word");
        return;
      }
      for (line += step[0], column += step[1]; current().grid[line] && column >= 0 && column < current().columns.length; line += step[0], column += step[1]) {
        if (cellAt(line, column)) return select(line, column, ".cell");
      }
    } else if (step[1] && !event.target.closest("select, input, summary, .scroll, pre")) {
      event.preventDefault();
      show(view.example + step[1]);
    }
  }

  frame();
  show(0, false);
  $("example").addEventListener("change", (event) => show(Number(event.target.value)));
  $("previous").addEventListener("click", () => show(view.example - 1));
  $("next").addEventListener("click", () => show(view.example + 1));
  $("plain").addEventListener("toggle", plain);
  document.querySelectorAll("input[name=colour]").forEach((input) => input.addEventListener("change", () => {
    view.colour = input.value;
    document.querySelectorAll(".cell").forEach((node) => shade(node, cellAt(Number(node.dataset.line), Number(node.dataset.column))));
    legend();
  }));
  document.addEventListener("keydown", move);
  let asked = 0; // curves have the width of their boxes
  window.addEventListener("resize", () => {
    cancelAnimationFrame(asked);
    asked = requestAnimationFrame(curves);
  });
  dark.addEventListener("change", () => { const { line, column } = view; tokens(); map(); curves(); select(line, column); });
})();
