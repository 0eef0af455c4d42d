"use strict";
(() => {
  const slider = document.getElementById("point");
  if (!slider) return;
  const data = JSON.parse(document.getElementById("path-data").textContent);
  const now = document.getElementById("point-now");
  const bars = document.getElementById("path-bars");
  const left = document.getElementById("path-left");
  const names = document.getElementById("path-names");
  const markers = [...document.querySelectorAll("line.marker")].map((line) => [line, line.dataset.x.split(" ")]);
  const most = Math.max(...data.bars.flatMap((bar) => bar.values.map(Math.abs)), 1e-300);

  const make = (tag, attributes = {}, text = "") => {
    const svg = ["svg", "rect", "title", "circle", "line"].includes(tag);
    const made = svg ? document.createElementNS("http://www.w3.org/2000/svg", tag) : document.createElement(tag);
    for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
    if (text) made.textContent = text;
    return made;
  };

  const rows = data.bars.map((bar) => {
    const row = make("li");
    const fill = make("span", { class: "fill" });
    const track = make("span", { class: "track", "aria-hidden": "true" });
    const value = make("span", { class: "value" });
    track.append(fill);
    row.append(make("span", { class: "name", title: bar.name }, bar.name), track, value);
    bars.append(row);
    return { row, fill, value, values: bar.values };
  });

  const drawings = data.tensors.map((tensor) => {
    const count = tensor.labels.length;
    const high = Math.ceil(count / tensor.columns);
    const drawing = make("svg", { viewBox: `0 0 ${tensor.columns} ${high}`, role: "img", class: "cells" });
    drawing.style.maxWidth = `min(22rem, ${1.8 * tensor.columns}rem)`;
    const caption = make("p", { class: "told" });
    const cells = tensor.labels.map((label, place) => {
      const x = place % tensor.columns;
      const y = Math.floor(place / tensor.columns);
      const cell = make("rect", { x: x + 0.06, y: y + 0.06, width: 0.88, height: 0.88, rx: 0.12 });
      cell.append(make("title", {}, label));
      drawing.append(cell);
      return cell;
    });
    left.append(caption, drawing);
    return { tensor, drawing, caption, cells };
  });

  // The network: a circle for each unit, a line for each weight that isn't zero where these are few.
  const place = document.getElementById("network-drawing");
  const told = document.getElementById("network-told");
  const chosen = document.getElementById("network-now");
  const STEP = 10;
  const GAP = 70;
  let point = Number(slider.value);
  let here = [0, 0];

  const columns = place ? data.network : [];
  const highest = Math.max(...columns.map((column) => Math.ceil(column.labels.length / column.wide)), 1);
  let width = 0;
  for (const column of columns) {
    column.x = width;
    column.y = ((highest - Math.ceil(column.labels.length / column.wide)) * STEP) / 2;
    width += column.wide * STEP + GAP;
  }
  const center = (column, unit) => [
    column.x + (unit % column.wide) * STEP + STEP / 2,
    column.y + Math.floor(unit / column.wide) * STEP + STEP / 2,
  ];
  if (place) {
    width -= GAP;
    const drawing = make("svg", { viewBox: `-2 -2 ${width + 4} ${highest * STEP + 4}`, class: "network", "aria-hidden": "true" });
    drawing.style.width = `${1.8 * (width + 4)}px`;
    columns.forEach((column, at) => {
      if (!column.reads) return;
      const before = columns[at - 1];
      column.lines = [...column.reads[0]].map((_, weight) => {
        const [x1, y1] = center(before, weight % before.count);
        const [x2, y2] = center(column, Math.floor(weight / before.count));
        const line = make("line", { x1: x1 + 4, y1, x2: x2 - 4, y2, class: "edge" });
        drawing.append(line);
        return line;
      });
    });
    columns.forEach((column, at) => {
      column.circles = column.labels.map((label, unit) => {
        const [cx, cy] = center(column, unit);
        const circle = make("circle", { cx, cy, r: 3.6 });
        circle.append(make("title", {}, `${column.name}: ${label}`));
        circle.addEventListener("click", () => choose(at, unit));
        drawing.append(circle);
        return circle;
      });
    });
    place.append(drawing);
    place.addEventListener("keydown", (event) => {
      const [at, unit] = here;
      const last = columns[at].labels.length - 1;
      const across = (other) => choose(other, Math.round((unit / Math.max(1, last)) * (columns[other].labels.length - 1)));
      const moves = {
        ArrowDown: () => choose(at, Math.min(last, unit + 1)),
        ArrowUp: () => choose(at, Math.max(0, unit - 1)),
        ArrowRight: () => across(Math.min(columns.length - 1, at + 1)),
        ArrowLeft: () => across(Math.max(0, at - 1)),
        Home: () => choose(at, 0),
        End: () => choose(at, last),
      };
      if (!moves[event.key]) return;
      event.preventDefault();
      moves[event.key]();
    });
  }

  const choose = (at, unit) => {
    const [before, old] = here;
    columns[before].circles[old].classList.remove("here");
    columns[at].circles[unit].classList.add("here");
    here = [at, unit];
    const left = columns[at].left[point][unit] === "1";
    chosen.textContent = `${columns[at].name}, ${columns[at].labels[unit]}: ${left ? "remains" : "gone"}`;
  };

  const showNetwork = () => {
    for (const column of columns) {
      column.circles.forEach((circle, unit) => {
        const left = column.left[point][unit] === "1";
        circle.classList.toggle("alive", left);
        circle.classList.toggle("gone", !left);
      });
      (column.lines || []).forEach((line, weight) => {
        line.classList.toggle("gone", column.reads[point][weight] === "0");
      });
    }
    if (!columns.length) return;
    const counts = columns.map((column) => {
      const more = column.count - column.labels.length;
      return `${column.name}: ${column.numbers[point]} of ${column.count}` + (more ? ` (${more} aren't drawn)` : "");
    });
    told.textContent = counts.join("; ");
    if (columns[here[0]].circles[here[1]].classList.contains("here")) choose(...here);
  };

  const number = (value) => (value === null ? "unknown" : String(Number(value.toPrecision(4))));

  const show = (at) => {
    point = at;
    showNetwork();
    for (const [line, places] of markers) {
      line.setAttribute("x1", places[at]);
      line.setAttribute("x2", places[at]);
    }
    const mark = at === data.best ? " (best)" : at === data.sparse ? " (one standard error)" : "";
    const way = data.ways.length ? `, on the way ${data.ways[at]}` : "";
    const error = data.errors[at] ? ` ± ${number(data.errors[at])}` : "";
    const text =
      `${data.axis} ${number(data.strengths[at])}${way}${mark}: score ${number(data.scores[at])}${error}, ` +
      `${data.selected[at]} of ${data.total} left, ${data.total - data.selected[at]} zero`;
    now.textContent = text;
    slider.setAttribute("aria-valuetext", text);
    for (const { row, fill, value, values } of rows) {
      const here = values[at];
      row.classList.toggle("zero", here === 0);
      fill.classList.toggle("negative", here < 0);
      fill.style.width = `${(100 * Math.abs(here)) / most}%`;
      value.textContent = here === 0 ? "0" : number(here);
    }
    const alive = [];
    for (const { tensor, drawing, caption, cells } of drawings) {
      const shades = tensor.shades[at];
      let kept = 0;
      cells.forEach((cell, place) => {
        const shade = Number(shades[place]);
        cell.setAttribute("class", shade ? "alive" : "gone");
        cell.style.fillOpacity = shade ? 0.2 + (0.8 * shade) / 9 : "";
        if (shade) {
          kept += 1;
          alive.push(data.tensors.length > 1 ? `${tensor.name}: ${tensor.labels[place]}` : tensor.labels[place]);
        }
      });
      const more = tensor.count - cells.length;
      caption.textContent =
        `${tensor.name}: ${kept} of ${cells.length} groups` + (more ? `; ${more} more aren't drawn` : "");
      drawing.setAttribute("aria-label", caption.textContent);
    }
    const shown = alive.slice(0, 200);
    names.textContent = alive.length
      ? shown.join(", ") + (alive.length > shown.length ? ` and ${alive.length - shown.length} more` : "")
      : "none";
    for (const button of document.querySelectorAll("button[data-point]")) {
      button.setAttribute("aria-pressed", String(Number(button.dataset.point) === at));
    }
  };

  slider.addEventListener("input", () => show(Number(slider.value)));
  for (const button of document.querySelectorAll("button[data-point]")) {
    button.addEventListener("click", () => {
      slider.value = button.dataset.point;
      show(Number(slider.value));
    });
  }
  show(Number(slider.value));
})();
addEventListener("beforeprint", () => {
  for (const details of document.querySelectorAll("details")) details.open = true;
});
