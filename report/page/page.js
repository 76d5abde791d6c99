"use strict";
(() => {
  const all = (selector, root = document) => [...root.querySelectorAll(selector)];
  for (const part of all(".controls, .icicle-help")) part.hidden = false;

  // What a cell is sorted by: its number in base units, a verdict's rank, else its text. "–" comes last, "exact" next.
  const units = { ms: 1e-3, kB: 1e3, MB: 1e6, GB: 1e9, TB: 1e12 };
  const sortKey = (text) => {
    if (text === "–") return Infinity;
    if (text === "exact") return Number.MAX_VALUE;
    if ("✓≈✕".includes(text[0])) return "✓≈✕".indexOf(text[0]);
    const found = text.replace("−", "-").match(/^([+-]?[\d.]+(?:e-?\d+)?)(?: ([^ ]+))?(?: |$)/);
    return found ? Number(found[1]) * (units[found[2]] ?? 1) : text;
  };
  const compare = (a, b) => {
    if (typeof a === "number" && typeof b === "number") return a === b ? 0 : a - b;
    return String(a).localeCompare(String(b), "en", { numeric: true });
  };

  // Tables: a press on a column's name sorts by it, another turns the order.
  for (const table of all("table")) {
    const heads = all("thead th", table), body = table.tBodies[0];
    if (body.rows.length < 2) continue;
    heads.forEach((head, column) => {
      const button = document.createElement("button");
      button.type = "button";
      button.append(...head.childNodes);
      head.append(button);
      button.addEventListener("click", () => {
        const down = head.getAttribute("aria-sort") === "ascending";
        for (const other of heads) other.removeAttribute("aria-sort");
        head.setAttribute("aria-sort", down ? "descending" : "ascending");
        const key = (row) => sortKey(row.cells[column].textContent.trim());
        const rows = [...body.rows].map((row) => [key(row), row]);
        rows.sort(([a], [b]) => (down ? compare(b, a) : compare(a, b)));
        body.append(...rows.map(([, row]) => row));
      });
    });
  }

  // Radio buttons that choose what is shown.
  const choose = (name, show) => {
    const buttons = all(`input[name=${name}]`);
    const apply = () => show(buttons.find((button) => button.checked)?.value);
    for (const button of buttons) button.addEventListener("change", apply);
    if (buttons.length) apply();
  };
  choose("frontier", (value) => {
    for (const figure of all("[data-frontier]")) figure.hidden = figure.dataset.frontier !== value;
  });
  choose("series", (value) => { document.getElementById("candidates").dataset.series = value; });
  choose("questions", (value) => {
    for (const card of all(".question")) card.hidden = value === "differing" && card.dataset.differs !== "true";
  });

  // One candidate at a time: the worst first, or the one that the address names.
  const select = document.getElementById("candidate");
  const showCandidate = () => all(".candidate").forEach((part, index) => {
    part.hidden = select.value !== "all" && select.value !== String(index);
  });
  const follow = () => {
    const target = location.hash.startsWith("#candidate-") && document.getElementById(location.hash.slice(1));
    if (!target) return;
    select.value = location.hash.slice("#candidate-".length);
    showCandidate();
    target.scrollIntoView();
  };
  if (select) {
    const signs = [...select.options].map((option) => "✓≈✕".indexOf(option.textContent.trim()[0]));
    select.selectedIndex = signs.indexOf(Math.max(...signs));
    select.addEventListener("change", showCandidate);
    addEventListener("hashchange", follow);
    showCandidate();
    follow();
  }

  // A line over the plot of stages, moved by pointer or arrow keys, and the numbers of the stage under it.
  for (const figure of all(".stages")) {
    const plot = figure.querySelector(".stage-plot"), field = figure.querySelector(".field");
    const cursor = figure.querySelector(".cursor"), readout = figure.querySelector(".readout");
    const places = field.dataset.x.split(" ").map(Number);
    const rows = all(".stage-table tbody tr", figure.closest("article"));
    const heads = all(".stage-table thead th", figure.closest("article")).map((head) => head.textContent);
    let at = Number(figure.dataset.start);
    const words = (cell, column) => (column < 2 ? "" : `${heads[column]} `) + cell.textContent.trim();
    const move = (index) => {
      at = Math.max(0, Math.min(rows.length - 1, index));
      for (const end of ["x1", "x2"]) cursor.setAttribute(end, `${places[at]}%`);
      cursor.setAttribute("visibility", "visible");
      const cells = [...rows[at].cells].map(words).filter((text) => !text.endsWith("–"));
      const name = document.createElement("b");
      name.textContent = cells[0];
      readout.replaceChildren(name, ...cells.slice(1).flatMap((text) => {
        const part = document.createElement("span");
        part.textContent = text;
        return [" ", part];
      }));
      plot.setAttribute("aria-valuenow", at);
      plot.setAttribute("aria-valuetext", cells.join(", "));
    };
    const pointed = (event) => {
      const box = field.getBoundingClientRect(), x = (100 * (event.clientX - box.left)) / box.width;
      const far = places.map((place) => Math.abs(place - x));
      move(far.indexOf(Math.min(...far)));
    };
    const steps = { ArrowRight: 1, ArrowUp: 1, ArrowLeft: -1, ArrowDown: -1, PageUp: 8, PageDown: -8, Home: -1e9, End: 1e9 };
    plot.addEventListener("pointermove", pointed);
    plot.addEventListener("pointerdown", pointed);
    plot.addEventListener("keydown", (event) => {
      if (!(event.key in steps)) return;
      event.preventDefault();
      move(at + steps[event.key]);
    });
    const facts = { role: "slider", tabindex: 0, "aria-label": "Stage", "aria-valuemin": 0, "aria-valuemax": rows.length - 1 };
    for (const [name, value] of Object.entries(facts)) plot.setAttribute(name, value);
    readout.hidden = false;
    move(at);
  }

  // Icicles: the part that is pressed takes the whole width; what is outside it is hidden.
  for (const icicle of all(".icicle")) {
    const nodes = all(".n", icicle);
    const spans = nodes.map((node) => [node.getAttribute("x"), node.getAttribute("width")].map(parseFloat));
    const up = nodes.map((node) => (node.dataset.up === undefined ? -1 : Number(node.dataset.up)));
    let wide = 0;
    const named = (node) => {
      if (node.querySelector("text")) return;
      const text = document.createElementNS(node.namespaceURI, "text");
      text.setAttribute("x", 4);
      text.setAttribute("y", 16);
      text.textContent = node.querySelector("title").textContent.replace(/: [^:]*$/, "");
      node.append(text);
    };
    const widen = (index) => {
      wide = index;
      const [left, width] = spans[index];
      nodes.forEach((node, i) => {
        const start = (100 * (spans[i][0] - left)) / width, end = start + (100 * spans[i][1]) / width;
        const from = Math.max(0, start), to = Math.min(100, end);
        node.setAttribute("x", `${from}%`);
        node.setAttribute("width", `${Math.max(0, to - from)}%`);
        if (to - from > 2) named(node);
        node.setAttribute("visibility", to - from > 1e-3 ? "visible" : "hidden");
        node.setAttribute("aria-expanded", i === index);
      });
    };
    const focus = (index) => {
      if (index === undefined || index < 0) return;
      nodes.forEach((node, i) => node.setAttribute("tabindex", i === index ? 0 : -1));
      nodes[index].focus();
    };
    icicle.setAttribute("role", "tree");
    const seen = (i) => nodes[i].getAttribute("visibility") !== "hidden";
    const siblings = (i) => nodes.map((_, k) => k).filter((k) => up[k] === up[i] && seen(k)).sort((a, b) => spans[a][0] - spans[b][0]);
    const beside = (i, step) => siblings(i)[siblings(i).indexOf(i) + step];
    const below = (i) => nodes.map((_, k) => k).filter((k) => up[k] === i && seen(k)).sort((a, b) => spans[a][0] - spans[b][0])[0];
    const keys = {
      ArrowRight: (i) => focus(beside(i, 1)), ArrowLeft: (i) => focus(beside(i, -1)),
      ArrowDown: (i) => focus(below(i)), ArrowUp: (i) => focus(up[i]),
      Enter: (i) => widen(i), " ": (i) => widen(i),
      Escape: () => { const back = Math.max(0, up[wide]); widen(back); focus(back); },
    };
    nodes.forEach((node, i) => {
      node.setAttribute("role", "treeitem");
      node.setAttribute("aria-level", 1 + Number(node.getAttribute("y")) / 24);
      node.setAttribute("tabindex", i ? -1 : 0);
      node.addEventListener("click", () => { widen(i === wide ? Math.max(0, up[i]) : i); focus(i); });
      node.addEventListener("keydown", (event) => {
        if (!(event.key in keys)) return;
        event.preventDefault();
        keys[event.key](i);
      });
    });
  }

  // Browsers that do not print what a closed <details> holds: open it for the while.
  addEventListener("beforeprint", () => { for (const part of all("details:not([open])")) { part.open = true; part.dataset.closed = ""; } });
  addEventListener("afterprint", () => { for (const part of all("details[data-closed]")) { part.open = false; delete part.dataset.closed; } });
})();
