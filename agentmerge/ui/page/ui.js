"use strict";
// Keeps an open page up to date with what the server tells of it. A hidden tab asks for nothing.
(() => {
  const live = document.querySelector("[data-live]");
  const trouble = document.getElementById("trouble");
  const say = (sentence) => {
    trouble.textContent = sentence;
    trouble.hidden = !sentence;
  };

  // Parts that are as they were stay: who reads or has marked one is not disturbed.
  const show = (html) => {
    const told = new DOMParser().parseFromString(html, "text/html");
    const parts = [...told.querySelectorAll("[data-part]")];
    const before = new Map([...live.children].map((part) => [part.dataset.part, part]));
    let last = null;
    for (const part of parts) {
      let now = before.get(part.dataset.part);
      before.delete(part.dataset.part);
      if (!now || now.outerHTML !== part.outerHTML) {
        const fresh = document.importNode(part, true);
        if (now) now.replaceWith(fresh);
        else if (last) last.after(fresh);
        else live.prepend(fresh);
        now = fresh;
      }
      last = now;
    }
    for (const part of before.values()) part.remove();
  };

  // Charts are drawn after every generation, and at most a tenth of the time goes into them.
  let drawn = "";
  let wanted = "";
  let resting = false;
  const draw = async (address) => {
    const answer = await fetch(address);
    const charts = answer.ok ? await answer.json() : {};
    for (const place of document.querySelectorAll(".drawn")) {
      place.hidden = !(place.querySelector(".chart").id in charts);
    }
    document.dispatchEvent(new CustomEvent("charts", { detail: charts }));
  };
  const chart = async () => {
    if (resting || wanted === drawn) return;
    resting = true;
    const begun = performance.now();
    drawn = wanted;
    try {
      await draw(live.dataset.charts);
    } catch {
      drawn = ""; // the stream says what is wrong
    }
    setTimeout(() => { resting = false; chart(); },
      Math.max(2000, 9 * (performance.now() - begun)));
  };

  const board = ({ html, board: found }) => {
    show(html);
    wanted = [found.status, found.generation, found.best && found.best.score].join();
    if (found.read) chart();
  };

  const searches = ({ names, changed }) => {
    const rows = new Map([...live.querySelectorAll("[data-name]")].map((row) => [row.dataset.name, row]));
    const first = !new URLSearchParams(location.search).get("offset");
    const news = document.getElementById("newer");
    const gone = [...rows.keys()].some((name) => !names.includes(name));
    news.hidden = !(gone && first) && !(first && names.length && !rows.has(names[0]));
    for (const found of changed) {
      const row = rows.get(found.name);
      if (!row) continue;
      for (const cell of row.querySelectorAll("[data-cell]")) {
        const text = found.cells[cell.dataset.cell] ?? cell.textContent;
        if (cell.textContent !== text) cell.textContent = text;
      }
    }
  };

  let source = null;
  const follow = () => {
    if (!live || document.hidden || source) return;
    source = new EventSource(live.dataset.live);
    const hear = (kind, act) => source.addEventListener(kind, (event) => {
      say("");
      act(JSON.parse(event.data));
    });
    hear("board", board);
    hear("searches", searches);
    hear("trouble", ({ sentence }) => say(sentence));
    source.onerror = () => say("The program that serves this page does not answer; it is asked again.");
  };
  // A browser has six connections to a server, for all tabs together.
  document.addEventListener("visibilitychange", () => {
    if (!document.hidden) return follow();
    if (source) source.close();
    source = null;
  });
  follow();
  const still = document.querySelector(".drawn[data-charts]");
  if (still) draw(still.dataset.charts);
})();
