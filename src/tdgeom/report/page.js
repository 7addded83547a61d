"use strict";
(() => {
  const data = JSON.parse(document.getElementById("report-data").textContent);
  const views = new Map();
  const root = document.documentElement;

  const make = (name, attributes = {}, text = null) => {
    const node = document.createElement(name);
    for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
    if (text !== null) node.textContent = text;
    return node;
  };

  // ---- charts

  const hidden = { hidden_series: new Set(), hidden_layers: new Set() };
  for (const box of document.querySelectorAll("input[data-hides]"))
    if (!box.checked) hidden[box.dataset.hides].add(box.value);

  // A line that stands for several equal series is hidden once all of them are.
  const off = (name, spec) => {
    const known = (((spec.layer || []).find((one) => one.encoding && one.encoding.color) || {}).encoding || {}).color;
    const drawn = name === "hidden_series" && known && known.field === "series" ? known.scale.domain : [];
    const merged = drawn.filter((one) => one.includes(" = ") && one.split(" = ").every((part) => hidden[name].has(part)));
    return [...hidden[name], ...merged];
  };

  async function draw(box) {
    const spec = data.charts[box.dataset.chart];
    for (const parameter of spec.params || []) if (parameter.name in hidden) parameter.value = off(parameter.name, spec);
    const options = { mode: "vega-lite", renderer: "svg", actions: false, ast: true, config: data.config };
    const made = await vegaEmbed(box, spec, options);
    views.set(box.dataset.chart, made.view);
  }

  const update = async (name) => {
    for (const [key, view] of views)
      try { await view.signal(name, off(name, data.charts[key])).runAsync(); } catch (error) { /* a chart without such lines */ }
  };

  const toggled = (box) => {
    const names = hidden[box.dataset.hides];
    box.checked ? names.delete(box.value) : names.add(box.value);
    return box.dataset.hides;
  };
  document.addEventListener("change", (event) => {
    const box = event.target;
    if (box.matches("input[data-hides]")) update(toggled(box));
    if (box.name === "theme") root.dataset.theme = box.value;
  });

  // Zooms about the middle, in logarithms where the axis is one.
  const range = (view, name) => {
    const scale = view.scale(name);
    const [low, high] = scale.domain();
    return { low, high, log: scale.type === "log" };
  };
  const scaled = ({ low, high, log }, factor) => {
    const [a, b] = log ? [Math.log(low), Math.log(high)] : [low, high];
    const [middle, half] = [(a + b) / 2, ((b - a) / 2) * factor];
    const ends = [middle - half, middle + half];
    return log ? ends.map(Math.exp) : ends;
  };
  const zoom = (view, factor) => {
    const names = Object.keys(view.getState().signals);
    for (const axis of ["x", "y"]) {
      const signal = names.find((name) => name.startsWith("zoom_") && name !== "zoom_tuple" && view.scale(axis) &&
        names.includes(`zoom_${axis}`) && fieldOf(view, axis) === name.slice(5));
      if (signal) view.signal(signal, factor ? scaled(range(view, axis), factor) : null);
    }
    view.runAsync();
  };
  const fields = new WeakMap();
  const fieldOf = (view, axis) => (fields.get(view) || {})[axis];

  const saveText = (text, type, name) => {
    const link = make("a", { href: URL.createObjectURL(new Blob([text], { type })), download: name });
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 1000);
  };
  const saveDrawing = (box) => {
    const drawing = box.querySelector("svg").cloneNode(true);
    const style = getComputedStyle(root);
    drawing.style.background = style.getPropertyValue("--paper");
    const text = new XMLSerializer().serializeToString(drawing);
    const plain = text.replace(/var\((--[\w-]+)\)/g, (_, name) => style.getPropertyValue(name).trim());
    saveText(plain, "image/svg+xml", `${box.dataset.chart}.svg`);
  };

  // ---- tables

  const isNumber = (value) => typeof value === "number";
  const shown = (value) => {
    if (value === null || value === undefined) return "";
    if (isNumber(value)) {
      if (Number.isInteger(value)) return String(value);
      const size = Math.abs(value);
      return size >= 1e5 || size < 1e-4 ? value.toExponential(3) : String(Number(value.toPrecision(4)));
    }
    if (Array.isArray(value)) return value.map(shown).join(" ");
    return value === true ? "yes" : value === false ? "no" : String(value);
  };
  const quoted = (value) => {
    let text = value === null || value === undefined ? "" : Array.isArray(value) ? JSON.stringify(value) : String(value);
    if (typeof value === "string" && /^[=+\-@\t\r]/.test(text)) text = `'${text}`; // a spreadsheet would run it
    return /[",\n\r]/.test(text) ? `"${text.replaceAll('"', '""')}"` : text;
  };
  const csv = (table, rows) => [table.columns, ...rows].map((row) => row.map(quoted).join(",")).join("\n") + "\n";
  const compare = (a, b) => {
    if (a === null || b === null) return (a === null) - (b === null);
    return isNumber(a) && isNumber(b) ? a - b : String(a).localeCompare(String(b), "en", { numeric: true });
  };

  function tabulate(box) {
    const table = data.tables[box.dataset.table];
    const state = { column: -1, down: false, words: "" };
    const word = table.columns.map((_, i) => !table.rows.some((row) => isNumber(row[i])));
    const bar = make("div", { class: "bar" });
    const label = make("label", {}, "Filter rows ");
    const search = make("input", { type: "search" });
    label.append(search);
    const count = make("span", { role: "status" });
    const save = make("button", { type: "button" }, "Download CSV");
    save.setAttribute("aria-label", `Download CSV: ${box.dataset.title}`);
    bar.append(label, save, count);
    const region = make("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": box.dataset.title });
    const grid = make("table");
    grid.append(make("caption", {}, box.dataset.title));
    const head = make("tr");
    const headings = table.columns.map((name, i) => {
      const cell = make("th", { scope: "col", class: word[i] ? "word" : "" });
      const button = make("button", { type: "button" }, name.replaceAll("_", " "));
      button.addEventListener("click", () => {
        state.down = state.column === i ? !state.down : false;
        state.column = i;
        fill();
      });
      cell.append(button);
      head.append(cell);
      return cell;
    });
    const top = make("thead");
    top.append(head);
    const body = make("tbody");
    grid.append(top, body);
    region.append(grid);
    box.append(bar, region);

    const rows = () => {
      const words = state.words.toLowerCase().split(/\s+/).filter(Boolean);
      const kept = table.rows.filter((row) => {
        const text = row.map(shown).join(" ").toLowerCase();
        return words.every((one) => text.includes(one));
      });
      if (state.column < 0) return kept;
      const sign = state.down ? -1 : 1;
      return kept.sort((a, b) => {
        const [p, q] = [a[state.column] ?? null, b[state.column] ?? null];
        return p === null || q === null ? compare(p, q) : sign * compare(p, q);
      });
    };
    function fill() {
      const kept = rows();
      body.replaceChildren(...kept.map((row) => {
        const line = make("tr");
        row.forEach((value, i) => line.append(
          i === 0 ? make("th", { scope: "row", class: word[i] ? "word" : "" }, shown(value))
            : make("td", word[i] ? { class: "word" } : {}, shown(value))));
        return line;
      }));
      headings.forEach((cell, i) =>
        i === state.column ? cell.setAttribute("aria-sort", state.down ? "descending" : "ascending")
          : cell.removeAttribute("aria-sort"));
      count.textContent = kept.length === table.rows.length ? `${kept.length} rows` : `${kept.length} of ${table.rows.length} rows`;
    }
    search.addEventListener("input", () => { state.words = search.value; fill(); });
    save.addEventListener("click", () => saveText(csv(table, rows()), "text/csv", `${box.dataset.table}.csv`));
    fill();
  }

  // ---- buttons

  document.addEventListener("click", (event) => {
    const button = event.target.closest("button");
    if (!button) return;
    const { check, tool, download } = button.dataset;
    if (check) {
      const boxes = [...button.parentElement.querySelectorAll("input[data-hides]")];
      for (const box of boxes) { box.checked = check === "all"; toggled(box); }
      if (boxes.length) update(boxes[0].dataset.hides);
    }
    if (download) saveText(csv(data.tables[download], data.tables[download].rows), "text/csv", `${download.split("/")[1]}.csv`);
    if (tool) {
      for (const box of button.closest("figure").querySelectorAll(".chart")) {
        const view = views.get(box.dataset.chart);
        if (tool === "svg") saveDrawing(box);
        else if (view) zoom(view, { in: 0.6, out: 1 / 0.6, reset: 0 }[tool]);
      }
    }
  });
  addEventListener("beforeprint", () => document.querySelectorAll("details").forEach((one) => { one.open = true; }));

  document.querySelectorAll("[data-table]").forEach(tabulate);
  (async () => {
    for (const box of document.querySelectorAll("[data-chart]")) {
      await draw(box);
      const view = views.get(box.dataset.chart);
      const first = (data.charts[box.dataset.chart].layer || []).find((one) => (one.params || []).some((p) => p.name === "zoom"));
      if (first) fields.set(view, { x: first.encoding.x.field, y: first.encoding.y.field });
    }
    root.dataset.drawn = "yes";
  })();
})();
