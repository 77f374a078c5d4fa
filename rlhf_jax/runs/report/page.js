"use strict";
const root = document.documentElement, theme = document.getElementById("theme");
theme.hidden = false;
theme.onclick = () => {
  const dark = root.dataset.theme ? root.dataset.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
  root.dataset.theme = dark ? "light" : "dark";
};
const search = () => {
  const box = document.getElementById("search");
  if (!box) return;
  const words = box.value.toLowerCase().split(/\s+/).filter(Boolean), all = [...document.querySelectorAll(".sample")];
  for (const one of all) one.hidden = !words.every(word => one.textContent.toLowerCase().includes(word));
  document.getElementById("found").textContent = words.length ? `${all.filter(one => !one.hidden).length} of ${all.length}` : "";
};
document.addEventListener("input", event => { if (event.target.id === "search") search(); });
const every = Number(document.body.dataset.live);
const follow = async () => {
  try {
    const next = new DOMParser().parseFromString(await (await fetch(location.href)).text(), "text/html");
    const shown = document.querySelector("main"), main = next.querySelector("main");
    const typing = document.activeElement && document.activeElement.id === "search";
    if (main && !typing && main.innerHTML !== follow.last) {
      follow.last = main.innerHTML;
      const open = [...shown.querySelectorAll("details")].map(one => one.open), box = document.getElementById("search");
      const text = box ? box.value : "";
      shown.replaceWith(document.importNode(main, true));
      document.querySelectorAll("main details").forEach((one, i) => { if (i < open.length) one.open = open[i]; });
      const field = document.getElementById("search");
      if (field) { field.value = text; search(); }
    }
  } catch { /* the server has ended: the page stays as it is */ }
  setTimeout(follow, every);
};
if (every) setTimeout(follow, every);
