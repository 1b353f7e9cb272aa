"use strict";
// The page is complete without this script; it adds sorting and highlighting.
(() => {
  const all = (query, from = document) => [...from.querySelectorAll(query)];
  const marks = all("[data-s]").filter((one) => !one.closest("#legend"));
  let pinned = null;

  // Dim every series but one, in all figures and tables; null shows all.
  const show = (series) => {
    for (const mark of marks) mark.classList.toggle("dim", series !== null && mark.dataset.s !== series);
  };

  const keys = all("#legend .key").map((plain) => {
    const key = document.createElement("button");
    key.type = "button";
    key.className = "key";
    key.dataset.s = plain.dataset.s;
    key.append(...plain.childNodes);
    key.setAttribute("aria-pressed", "false");
    plain.replaceWith(key);
    return key;
  });
  for (const key of keys) {
    const series = key.dataset.s;
    const enter = () => show(series);
    const leave = () => show(pinned);
    key.addEventListener("pointerenter", enter);
    key.addEventListener("focus", enter);
    key.addEventListener("pointerleave", leave);
    key.addEventListener("blur", leave);
    key.addEventListener("click", () => {
      pinned = pinned === series ? null : series;
      for (const one of keys) one.setAttribute("aria-pressed", String(one.dataset.s === pinned));
      show(pinned);
    });
  }
  if (keys.length) {
    const hint = document.createElement("span");
    hint.className = "hint";
    hint.textContent = "Point at a name to single it out, press it to keep it.";
    document.getElementById("legend").append(hint);
    document.addEventListener("keydown", (event) => {
      if (event.key !== "Escape" || pinned === null) return;
      pinned = null;
      for (const one of keys) one.setAttribute("aria-pressed", "false");
      show(null);
    });
  }

  // Missing values stay last whichever way the column is sorted.
  const order = (column, kind, sign) => (a, b) => {
    const [x, y] = [a, b].map((row) => row.cells[column].dataset.v ?? "");
    if (x === "" || y === "") return (x === "") - (y === "");
    return sign * (kind === "text" ? x.localeCompare(y) : Number(x) - Number(y));
  };
  for (const head of all("th[data-sort]")) {
    const button = document.createElement("button");
    button.type = "button";
    button.className = "sort";
    button.append(...head.childNodes);
    head.append(button);
    button.addEventListener("click", () => {
      const up = head.getAttribute("aria-sort") !== "ascending";
      for (const one of head.parentNode.cells) one.removeAttribute("aria-sort");
      head.setAttribute("aria-sort", up ? "ascending" : "descending");
      const body = head.closest("table").tBodies[0];
      const compare = order(head.cellIndex, head.dataset.sort, up ? 1 : -1);
      body.append(...[...body.rows].sort(compare));
    });
  }
})();
