"use strict";
(() => {
  const json = (id) => JSON.parse(document.getElementById(id).textContent);

  // Charts. Expressions are interpreted: the page's policy forbids to evaluate text as code.
  const options = {
    ast: true,
    renderer: "svg",
    actions: { export: true, source: false, compiled: false, editor: false },
    tooltip: { theme: "custom" },
  };
  const drawn = Object.entries(json("charts")).map(([id, spec]) => {
    const place = document.getElementById(id);
    // Labels have been placed for two widths.
    const other = place.clientWidth < 420 ? "labels_wide" : "labels_narrow";
    if (spec.layer) spec.layer = spec.layer.filter((layer) => layer.name !== other);
    return vegaEmbed(place, spec, options).catch((error) => {
      place.textContent = `This chart can't be drawn: ${error.message}`;
      console.error(id, error);
    });
  });
  Promise.all(drawn).then(() => document.documentElement.classList.add("drawn"));

  // Tables: sorting, in which what was not measured is last.
  const collator = new Intl.Collator("en", { numeric: true });
  function compare(a, b, down) {
    if (a === "" || b === "") return a === b ? 0 : a === "" ? 1 : -1;
    const numbers = [Number(a), Number(b)];
    const found = numbers.some(Number.isNaN) ? collator.compare(a, b) : numbers[0] - numbers[1];
    return down ? -found : found;
  }
  for (const table of document.querySelectorAll("table.grid")) {
    const heads = [...table.tHead.rows[0].cells].filter((head) => head.ariaSort);
    heads.forEach((head, column) => {
      head.querySelector("button").addEventListener("click", () => {
        const down = head.getAttribute("aria-sort") === "ascending";
        for (const other of heads) other.setAttribute("aria-sort", "none");
        head.setAttribute("aria-sort", down ? "descending" : "ascending");
        const key = (row) => row.cells[column].dataset.sort;
        const rows = [...table.tBodies[0].rows];
        rows.sort((a, b) => compare(key(a), key(b), down));
        table.tBodies[0].append(...rows);
      });
    });
  }

  // ... and filtering: rows that have every word.
  for (const input of document.querySelectorAll("input[data-filter]")) {
    const rows = [...document.getElementById(input.dataset.filter).tBodies[0].rows];
    const count = document.getElementById(`${input.dataset.filter}-count`);
    input.addEventListener("input", () => {
      const words = input.value.toLowerCase().split(/\s+/);
      let shown = 0;
      for (const row of rows) {
        const text = row.textContent.toLowerCase();
        row.hidden = !words.every((word) => text.includes(word));
        shown += !row.hidden;
      }
      count.textContent = `${shown} of ${rows.length} rows`;
    });
  }

  // Records, unpacked when first asked for.
  let records;
  async function unpack() {
    const bytes = Uint8Array.from(atob(document.getElementById("records").textContent), (c) =>
      c.charCodeAt(0),
    );
    const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
    return new Response(stream).json();
  }
  const dialog = document.getElementById("record");
  const text = (id, value) => (document.getElementById(id).textContent = value);
  document.addEventListener("click", async (event) => {
    const button = event.target.closest("button.record");
    if (!button) return;
    const { experiment, arm } = button.dataset;
    text("record-title", arm);
    const names = [...document.querySelectorAll(`#experiment-${experiment} .commands dt`)];
    const own = names.find((name) => name.textContent === arm);
    text("record-command", own ? own.nextElementSibling.textContent : "not known");
    try {
      records ??= await unpack();
      const found = records[experiment].filter((record) => record.arm === arm);
      text("record-text", JSON.stringify(found, null, 1));
    } catch (error) {
      text("record-text", "The records are not on this page: see result.json in the arm's folder.");
    }
    dialog.showModal();
  });

  // On paper nothing is folded.
  addEventListener("beforeprint", () => {
    for (const one of document.querySelectorAll("main details")) one.open = true;
  });
})();
