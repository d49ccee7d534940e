"use strict";
/* Light and dark, the figures, and saving them as PNG. */

const read = (id) => JSON.parse(document.getElementById(id).textContent);
const specs = read("specs");
const schemes = read("schemes");
const views = new Map();
const system = matchMedia("(prefers-color-scheme: dark)");

function scheme() {
  return document.documentElement.dataset.theme || (system.matches ? "dark" : "light");
}

const toggle = document.getElementById("scheme");

function nameToggle() {
  toggle.textContent = scheme() === "dark" ? "Light" : "Dark";
}

toggle.addEventListener("click", () => {
  document.documentElement.dataset.theme = scheme() === "dark" ? "light" : "dark";
  nameToggle();
  drawAll();
});
system.addEventListener("change", () => {
  nameToggle();
  drawAll();
});
nameToggle();

const tip = document.getElementById("tip");

function showTip(handler, event, item, value) {
  tip.hidden = !value;
  if (!value) return;
  const parts = typeof value === "object" ? Object.entries(value).map(([name, said]) => `${name} ${said}`) : [value];
  tip.textContent = parts.join(", ");
  const { width, height } = tip.getBoundingClientRect();
  tip.style.left = `${Math.max(0, Math.min(event.clientX + 14, innerWidth - width - 8))}px`;
  tip.style.top = `${Math.max(0, Math.min(event.clientY + 14, innerHeight - height - 8))}px`;
}

/* The page's policy lets no text be run as code, so Vega interprets its expressions (`ast`). */
async function draw(place, colours, renderer = "svg") {
  const options = { ast: true, actions: false, defaultStyle: false, mode: "vega-lite", renderer, tooltip: showTip };
  const { view } = await vegaEmbed(place, specs[place.dataset.figure], { ...options, config: schemes[colours] });
  return view;
}

let drawing = 0;

async function drawAll(colours = scheme()) {
  const mine = ++drawing;
  for (const place of document.querySelectorAll("[data-figure]")) {
    if (mine !== drawing) return; // the scheme was changed again
    views.get(place)?.finalize();
    views.set(place, await draw(place, colours));
    place.querySelector("svg")?.setAttribute("aria-hidden", "true"); // the plot itself has the words
    await new Promise((done) => setTimeout(done)); // let the page answer between two figures
  }
  document.documentElement.dataset.drawn = colours;
}

function save(url, name) {
  const link = document.createElement("a");
  link.href = url;
  link.download = `${name.replace(/[^\w.-]+/g, "-")}.png`;
  link.click();
}

document.addEventListener("click", async (event) => {
  const name = event.target.dataset?.png;
  if (!name) return;
  const place = [...document.querySelectorAll("[data-figure]")].find((each) => each.dataset.figure === name);
  if (views.has(place)) save(await views.get(place).toImageURL("png", 2), name);
});

document.addEventListener("vega", () => drawAll());
addEventListener("beforeprint", () => {
  if (scheme() === "dark") drawAll("light");
});
addEventListener("afterprint", () => {
  if (scheme() === "dark") drawAll();
});
