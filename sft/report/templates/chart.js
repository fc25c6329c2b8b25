"use strict";
// Values of a chart under the pointer, the finger, or the arrow keys. Without it the page is whole: the table has them.
document.addEventListener("DOMContentLoaded", () => {
  const make = (parent, kind) => parent.appendChild(Object.assign(document.createElement("div"), { className: kind }));
  for (const plot of document.querySelectorAll(".plot")) {
    const data = plot.querySelector("script");
    if (!data) continue;
    const panels = JSON.parse(data.textContent);
    const tip = make(plot, "tip"), marks = [];
    tip.setAttribute("role", "status");
    let at = null;
    // The places of a panel on its x axis, each with the points that stand there.
    for (const panel of panels) {
      const places = new Map();
      panel.series.forEach((series) => series.points.forEach(([x, y, where, value]) => {
        if (!places.has(where)) places.set(where, { x, where, points: [] });
        places.get(where).points.push({ x, y, value, series });
      }));
      panel.places = [...places.values()].sort((a, b) => a.x - b.x);
    }
    const clear = () => { marks.splice(0).forEach((mark) => mark.remove()); tip.replaceChildren(); at = null; };
    const show = (panel, place) => {
      if (at && at[0] === panel && at[1] === place) return;
      clear();
      at = [panel, place];
      const here = panels[panel].places[place], box = panels[panel].box;
      const line = make(plot, "line");
      Object.assign(line.style, { left: `${100 * here.x}%`, top: `${100 * box[1]}%`, height: `${100 * (box[3] - box[1])}%` });
      marks.push(line);
      const head = document.createElement("b");
      head.textContent = panels.length > 1 ? `${panels[panel].title}: ${here.where}` : here.where;
      tip.append(head);
      for (const point of here.points) {
        const dot = make(plot, "dot"), row = document.createElement("div"), key = document.createElement("i");
        Object.assign(dot.style, { left: `${100 * point.x}%`, top: `${100 * point.y}%`, background: point.series.color });
        marks.push(dot);
        key.style.background = point.series.color;
        row.append(key, point.series.label + (point.value ? ` ${point.value}` : ""));
        tip.append(row);
      }
      const wide = plot.clientWidth, room = 12, x = here.x * wide;
      tip.style.left = `${Math.max(0, x + room + tip.offsetWidth > wide ? x - room - tip.offsetWidth : x + room)}px`;
      tip.style.top = `${Math.max(0, box[1] * plot.clientHeight)}px`;
    };
    const nearest = (event) => {
      const area = plot.getBoundingClientRect();
      const x = (event.clientX - area.left) / area.width, y = (event.clientY - area.top) / area.height;
      const panel = panels.findIndex(({ box }) => x >= box[0] - 0.02 && x <= box[2] + 0.02 && y >= box[1] - 0.03 && y <= box[3] + 0.03);
      if (panel < 0) return clear();
      const places = panels[panel].places;
      let best = 0;
      places.forEach((place, index) => { if (Math.abs(place.x - x) < Math.abs(places[best].x - x)) best = index; });
      show(panel, best);
    };
    plot.addEventListener("pointermove", nearest);
    plot.addEventListener("pointerdown", nearest);
    plot.addEventListener("pointerleave", (event) => { if (event.pointerType === "mouse") clear(); });
    plot.addEventListener("blur", clear);
    plot.addEventListener("keydown", (event) => {
      const steps = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0], PageUp: [0, -10], PageDown: [0, 10], Home: [0, -1e9], End: [0, 1e9] };
      if (event.key === "Escape") return clear();
      const step = steps[event.key];
      if (!step) return;
      event.preventDefault();
      const limit = (value, count) => Math.min(Math.max(value, 0), count - 1);
      const panel = limit(at ? at[0] + step[0] : 0, panels.length);
      const same = at && at[0] === panel;
      show(panel, limit(same ? at[1] + step[1] : 0, panels[panel].places.length));
    });
  }
});
