"use strict";
// Tables: a button in every head sorts by its column; a third press brings the rows back as they were.
for (const table of document.querySelectorAll("table")) {
  const body = table.tBodies[0];
  const rows = [...body.rows];
  if (rows.length < 2) continue;
  const heads = [...table.tHead.rows[0].cells];
  const words = new Intl.Collator("en", { numeric: true });
  const cell = (row, column) => row.cells[column];
  const text = (row, column) => cell(row, column).querySelector(".main").textContent;
  const value = (row, column) => parseFloat(cell(row, column).dataset.value);
  heads.forEach((head, column) => {
    const numeric = rows.some((row) => !Number.isNaN(value(row, column)));
    const button = document.createElement("button");
    button.type = "button";
    button.append(...head.childNodes);
    head.append(button);
    button.addEventListener("click", () => {
      const now = { ascending: "descending", descending: null }[head.getAttribute("aria-sort")];
      const order = now === undefined ? "ascending" : now;
      heads.forEach((other) => other.removeAttribute("aria-sort"));
      let sorted = rows;
      if (order) {
        head.setAttribute("aria-sort", order);
        const sign = order === "ascending" ? 1 : -1;
        sorted = [...rows].sort((one, other) => {
          if (!numeric) return sign * words.compare(text(one, column), text(other, column));
          const [a, b] = [value(one, column), value(other, column)];
          if (Number.isNaN(a) || Number.isNaN(b)) return Number.isNaN(a) - Number.isNaN(b); // nothing known: last
          return sign * (a - b);
        });
      }
      body.append(...sorted);
    });
  });
  table.classList.add("sortable");
  const how = document.createElement("span");
  how.className = "unseen";
  how.textContent = " (the heads are buttons that sort)";
  table.caption.firstElementChild.append(how);
}
// On a phone the contents are folded away; on paper nothing is.
if (matchMedia("(max-width: 36rem)").matches) document.querySelector(".contents details").open = false;
let folded = [];
addEventListener("beforeprint", () => {
  folded = [...document.querySelectorAll("details:not([open])")];
  folded.forEach((one) => { one.open = true; });
});
addEventListener("afterprint", () => { folded.forEach((one) => { one.open = false; }); });
