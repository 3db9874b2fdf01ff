"use strict";
document.querySelectorAll("[data-theme]").forEach((button) => button.addEventListener("click", () => {
  const root = document.documentElement;
  const dark = root.classList.contains("dark") || (!root.classList.contains("light") && matchMedia("(prefers-color-scheme: dark)").matches);
  root.classList.toggle("dark", !dark);
  root.classList.toggle("light", dark);
}));

// Charts with data-series show the nearest values under the pointer.
document.querySelectorAll("svg[data-series]").forEach((svg) => {
  const series = JSON.parse(svg.dataset.series);
  const tip = document.createElement("div");
  const cursor = document.createElementNS(svg.namespaceURI, "path");
  tip.className = "tip";
  tip.hidden = true;
  cursor.setAttribute("class", "cursor");
  svg.append(cursor);
  svg.parentElement.append(tip);
  svg.addEventListener("pointermove", (event) => {
    const box = svg.getBoundingClientRect();
    const frame = svg.parentElement.getBoundingClientRect();
    const scale = box.width / svg.viewBox.baseVal.width;
    const x = (event.clientX - box.left) / scale;
    const near = series.map((s) => [s.label, s.points.reduce((a, b) => (Math.abs(b[0] - x) < Math.abs(a[0] - x) ? b : a))]);
    const at = near.map(([, point]) => point[0]).reduce((a, b) => (Math.abs(b - x) < Math.abs(a - x) ? b : a));
    cursor.setAttribute("d", `M${at} 10V200`);
    tip.textContent = near.map(([label, point]) => `${label} ${point[2]} at ${point[1]}`).join("  ·  ");
    tip.hidden = false;
    tip.style.top = `${box.top - frame.top - 4}px`;
    tip.style.left = `${Math.max(4, Math.min(at * scale + box.left - frame.left - tip.offsetWidth / 2, frame.width - tip.offsetWidth - 4))}px`;
  });
  svg.addEventListener("pointerleave", () => { tip.hidden = true; cursor.removeAttribute("d"); });
});

// The page of latents: search in all its text, sort by the numbers on the cards.
const cards = [...document.querySelectorAll(".latent")];
const search = document.querySelector("#search");
if (search) {
  const order = document.querySelector("#order");
  const count = document.querySelector("#count");
  const text = new Map(cards.map((card) => [card, card.textContent.toLowerCase()]));
  const show = () => {
    const words = search.value.toLowerCase().split(/\s+/).filter(Boolean);
    let n = 0;
    cards.forEach((card) => { card.hidden = !words.every((word) => text.get(card).includes(word)); n += !card.hidden; });
    count.textContent = `${n} of ${cards.length}`;
  };
  search.addEventListener("input", show);
  order.addEventListener("change", () => {
    const [key, sign] = order.value.split(" ");
    [...cards].sort((a, b) => sign * (a.dataset[key] - b.dataset[key])).forEach((card) => card.parentElement.append(card));
  });
  addEventListener("hashchange", () => {
    const target = document.querySelector(location.hash || "#none");
    if (target && target.hidden) { search.value = ""; show(); target.scrollIntoView(); }
  });
  show();
}
