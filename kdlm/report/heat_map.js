"use strict";
/* The heat map: which measure colours the tokens, which run is shown, and what a token's panel says. */

(() => {
  const source = document.getElementById("token-data");
  if (!source) return;
  const data = JSON.parse(source.textContent);
  const names = data.measures;
  const texts = document.getElementById("texts");
  const panel = document.getElementById("token");
  const said = document.getElementById("said");
  let run = 0;
  let measure = 0;
  let here = null;

  const level = (value) => data.edges[measure].filter((edge) => value >= edge).length;
  const tokens = (box) => [...box.querySelectorAll("[data-token]")];
  const found = (span) => data.runs[run][span.parentNode.dataset.text][span.dataset.token];
  const number = (value) => (value === null ? "–" : Math.abs(value) < 1e-3 && value ? value.toExponential(1) : value.toFixed(3));
  const percent = (value) => (value === null ? "–" : `${(100 * value).toFixed(1)} %`);

  function element(tag, inside, name = "") {
    const made = document.createElement(tag);
    if (name) made.className = name;
    made.append(...[inside].flat());
    return made;
  }

  function bars(title, top, actual, colour) {
    const rows = top.map(([word, probability]) => {
      const bar = element("div", [], `bar ${colour}`);
      bar.style.width = `${100 * (probability ?? 0)}%`;
      const row = element("li", [element("span", word, "word"), element("div", bar), element("span", percent(probability))]);
      if (word === actual) row.className = "true";
      return row;
    });
    return element("div", [element("h4", title), element("ol", rows)]);
  }

  function show(span, aloud) {
    const [word, values, teacher, student] = found(span);
    here?.classList.remove("here");
    here = span;
    span.classList.add("here");
    const figures = names.flatMap((name, at) => [element("dt", name), element("dd", `${number(values[at])} nats`)]);
    const tops = [];
    if (teacher.length) tops.push(bars("teacher", teacher, word, "series-1"));
    if (student.length) tops.push(bars("student", student, word, "series-0"));
    panel.replaceChildren(element("h3", word, "word"), element("dl", figures), element("div", tops, "tops"));
    if (!aloud) return;
    const top = (who, list) => (list.length ? `${who}: ${list.map(([one, share]) => `${one} ${percent(share)}`).join(", ")}. ` : "");
    const measured = names.map((name, at) => `${name} ${number(values[at])}`).join(", ");
    said.textContent = `${word}: ${measured}. ${top("Teacher", teacher)}${top("Student", student)}`;
  }

  function paint() {
    const ends = [0, ...(data.edges[measure] ?? [])];
    [...document.getElementById("scale").children].forEach((step, at) => (step.textContent = ends[at]));
    for (const span of texts.querySelectorAll("[data-token]")) {
      const value = found(span)[1][measure];
      if (value === null || value === undefined) span.removeAttribute("data-level");
      else span.dataset.level = level(value);
    }
  }

  function start() {
    here = null;
    paint();
    let most = null;
    for (const box of texts.querySelectorAll("[data-text]")) {
      const spans = tokens(box);
      if (!spans.length) continue;
      spans[0].tabIndex = 0;
      const worst = spans.reduce((one, other) => ((found(other)[1][measure] ?? -1) > (found(one)[1][measure] ?? -1) ? other : one));
      most ??= worst;
    }
    if (most) show(most, false);
  }

  /* The token of the line above (-1) or below (1) that is nearest. */
  function across(span, spans, way) {
    const from = span.getClientRects()[0];
    const lines = spans.map((each) => [each, each.getClientRects()[0]]).filter(([, box]) => way * (box.top - from.top) > from.height / 2);
    if (!lines.length) return span;
    const top = way > 0 ? Math.min(...lines.map(([, box]) => box.top)) : Math.max(...lines.map(([, box]) => box.top));
    const line = lines.filter(([, box]) => Math.abs(box.top - top) < from.height / 2);
    return line.reduce((one, other) => (Math.abs(other[1].left - from.left) < Math.abs(one[1].left - from.left) ? other : one))[0];
  }

  texts.addEventListener("keydown", (event) => {
    if (!event.target.dataset.token || event.ctrlKey || event.metaKey || event.altKey) return;
    const spans = tokens(event.target.parentNode);
    const at = spans.indexOf(event.target);
    const to = {
      ArrowRight: () => spans[Math.min(at + 1, spans.length - 1)],
      ArrowLeft: () => spans[Math.max(at - 1, 0)],
      ArrowUp: () => across(event.target, spans, -1),
      ArrowDown: () => across(event.target, spans, 1),
      Home: () => spans[0],
      End: () => spans[spans.length - 1],
    }[event.key];
    if (!to) return;
    event.preventDefault();
    event.target.tabIndex = -1;
    const next = to();
    next.tabIndex = 0;
    next.focus();
  });
  texts.addEventListener("focusin", (event) => event.target.dataset.token && show(event.target, true));
  texts.addEventListener("mouseover", (event) => {
    const span = event.target.closest("[data-token]");
    if (span) show(span, false);
  });

  for (const form of document.querySelectorAll("form.controls")) {
    form.addEventListener("change", (event) => {
      if (event.target.name === "measure") {
        measure = [...form.elements.measure].indexOf(event.target);
        paint();
      } else {
        run = Number(event.target.value);
        texts.replaceChildren(document.getElementById(`texts-${run}`).content.cloneNode(true));
        start();
      }
    });
  }

  /* The texts that are open, as they lie on the page, drawn once more on a canvas, below the scale. */
  function picture() {
    const margin = 16;
    const top = 64;
    const articles = [...texts.querySelectorAll("article")].filter((article) => article.checkVisibility());
    const frame = texts.getBoundingClientRect();
    const height = Math.max(...articles.map((article) => article.getBoundingClientRect().bottom)) - frame.top + top + margin;
    const zoom = Math.min(2, 16000 / height);
    const canvas = document.createElement("canvas");
    canvas.width = Math.ceil((frame.width + 2 * margin) * zoom);
    canvas.height = Math.ceil(height * zoom);
    const ink = canvas.getContext("2d");
    const place = (box) => [box.left - frame.left + margin, box.top - frame.top + top];
    const style = (node) => getComputedStyle(node);
    const page = style(document.body);
    const write = (text, look, x, y) => {
      ink.font = `${look.fontWeight} ${look.fontSize} ${look.fontFamily}`;
      ink.fillStyle = look.color;
      ink.globalAlpha = Number(look.opacity);
      ink.fillText(text, x, y);
      ink.globalAlpha = 1;
    };
    ink.scale(zoom, zoom);
    ink.textBaseline = "middle";
    ink.fillStyle = page.backgroundColor;
    ink.fillRect(0, 0, canvas.width, canvas.height);
    write(`${names[measure]}, nats from`, page, margin, 20);
    [...document.getElementById("scale").children].forEach((step, at) => {
      ink.fillStyle = style(step).backgroundColor;
      ink.fillRect(margin + 56 * at, 34, 56, 18);
      write(step.textContent, style(step), margin + 56 * at + 6, 43);
    });
    for (const article of articles) {
      for (const span of article.querySelectorAll("[data-level]")) {
        ink.fillStyle = style(span).backgroundColor;
        for (const box of span.getClientRects()) ink.fillRect(...place(box), box.width - 1, box.height);
      }
      const walker = document.createTreeWalker(article, NodeFilter.SHOW_TEXT);
      const range = document.createRange();
      while (walker.nextNode()) {
        const node = walker.currentNode;
        const look = style(node.parentElement);
        let at = 0;
        for (const letter of node.data) {
          range.setStart(node, at);
          range.setEnd(node, (at += letter.length));
          const box = range.getBoundingClientRect();
          const [x, y] = place(box);
          if (box.width) write(letter, look, x, y + box.height / 2);
        }
      }
    }
    return canvas;
  }

  document.getElementById("save-heat").addEventListener("click", () => {
    picture().toBlob((blob) => {
      const url = URL.createObjectURL(blob);
      save(url, "tokens"); // of page.js
      setTimeout(() => URL.revokeObjectURL(url), 1000);
    });
  });

  if (data.runs.length) start();
})();
