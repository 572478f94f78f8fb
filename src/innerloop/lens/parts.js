"use strict";
// What the pages have in common: nodes of text, and colours.
const parts = (() => {
  const dark = window.matchMedia("(prefers-color-scheme: dark)");

  // Text only: nothing that is shown is ever parsed as markup.
  function make(tag, options = {}, ...children) {
    const node = document.createElement(tag);
    for (const [name, value] of Object.entries(options)) {
      if (value === null || value === undefined) continue;
      if (name === "text") node.textContent = value;
      else node.setAttribute(name, value);
    }
    node.append(...children);
    return node;
  }

  // Colours: a ramp from the ground to a strong blue, in both themes; words keep their contrast.
  const RAMPS = {
    light: [[237, 242, 248], [175, 206, 236], [94, 155, 214], [27, 92, 165], [10, 48, 99]],
    dark: [[34, 42, 54], [33, 68, 112], [41, 105, 176], [104, 162, 228], [186, 216, 250]],
  };
  function colour(amount) {
    const stops = RAMPS[dark.matches ? "dark" : "light"];
    const at = Math.min(Math.max(amount, 0), 1) * (stops.length - 1);
    const low = Math.min(Math.floor(at), stops.length - 2);
    const mix = stops[low].map((value, i) => Math.round(value + (stops[low + 1][i] - value) * (at - low)));
    const linear = mix.map((value) => ((value /= 255) <= 0.04045 ? value / 12.92 : ((value + 0.055) / 1.055) ** 2.4));
    const light = 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2];
    return { ground: `rgb(${mix.join(" ")})`, ink: light > 0.18 ? "#0b1420" : "#ffffff" };
  }
  function paint(node, amount) {
    const { ground, ink } = colour(amount);
    node.style.background = ground;
    node.style.color = ink;
  }
  return { dark, make, colour, paint };
})();
