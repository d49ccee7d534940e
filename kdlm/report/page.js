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
  const plain = ["run", "kind", "model"];
  const parts = Object.entries(value).map(([name, said]) => (plain.includes(name) ? said : `${name} ${said}`));
  tip.textContent = parts.join(", ");
  const { width, height } = tip.getBoundingClientRect();
  tip.style.left = `${Math.max(0, Math.min(event.clientX + 14, innerWidth - width - 8))}px`;
  tip.style.top = `${Math.max(0, Math.min(event.clientY + 14, innerHeight - height - 8))}px`;
}

/* The page's policy lets no text be run as code, so Vega interprets its expressions (`ast`). */
async function draw(place, colours) {
  const spec = specs[place.dataset.figure];
  const renderer = spec.data.values.length > 500 ? "canvas" : "svg"; // an element for each point would be too many
  const options = { ast: true, actions: false, defaultStyle: false, mode: "vega-lite", renderer, tooltip: showTip };
  const { view } = await vegaEmbed(place.firstElementChild, spec, { ...options, config: schemes[colours] });
  return view;
}

let drawing = 0;

async function drawAll() {
  const colours = scheme();
  const mine = ++drawing;
  for (const place of document.querySelectorAll("[data-figure]")) {
    if (mine !== drawing) return; // the scheme was changed again
    views.get(place)?.finalize();
    try {
      views.set(place, await draw(place, colours));
    } catch (error) {
      place.firstElementChild.textContent = "This figure could not be drawn.";
      console.error(place.dataset.figure, error);
    }
    await new Promise((done) => setTimeout(done)); // let the page answer between two figures
  }
  document.documentElement.dataset.drawn = colours;
}

/* A figure's numbers as a table, made when it is opened: most are not. */
function tabulate(details) {
  const { data, title, usermeta } = specs[details.dataset.numbers];
  const row = (cells, tag) => {
    const made = document.createElement("tr");
    for (const cell of cells) {
      const box = document.createElement(tag);
      box.textContent = typeof cell === "number" ? Number(cell.toPrecision(6)) : cell;
      made.append(box);
    }
    return made;
  };
  const table = document.createElement("table");
  table.createCaption().textContent = title;
  table.createTHead().append(row(Object.values(usermeta.columns), "th"));
  table.createTBody().append(...data.values.map((value) => row(Object.keys(usermeta.columns).map((name) => value[name]), "td")));
  details.querySelector(".scroll").replaceChildren(table);
}

document.addEventListener("toggle", (event) => event.target.dataset.numbers && event.target.open && tabulate(event.target), true);

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
