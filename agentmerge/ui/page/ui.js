"use strict";
// Keeps an open page up to date with what the server tells of it. A hidden tab asks for nothing.
(() => {
  const live = document.querySelector("[data-live]");
  const trouble = document.getElementById("trouble");
  const say = (sentence) => {
    trouble.textContent = sentence;
    trouble.hidden = !sentence;
  };

  // Parts that are told as they were stay: who reads, marks or fills in one is not disturbed.
  const said = new Map();
  const show = (html) => {
    const told = new DOMParser().parseFromString(html, "text/html");
    const parts = [...told.querySelectorAll("[data-part]")];
    const before = new Map([...live.children].map((part) => [part.dataset.part, part]));
    let last = null;
    for (const part of parts) {
      let now = before.get(part.dataset.part);
      before.delete(part.dataset.part);
      const busy = now && (now.querySelector("button:disabled")
        || (now.contains(document.activeElement) && document.activeElement.matches("input, button")));
      if (!now || (!busy && said.get(part.dataset.part) !== part.outerHTML)) {
        said.set(part.dataset.part, part.outerHTML);
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

  // What may be done: the command line follows what is typed, and the token stays in this tab.
  const asked = document.getElementById("token");
  const keep = (token) => {
    sessionStorage.setItem("token", token);
    if (asked) asked.hidden = true;
  };
  const came = new URLSearchParams(location.hash.slice(1)).get("token");
  if (came) {
    keep(came);
    history.replaceState(null, "", location.pathname + location.search);
  }
  if (asked) {
    asked.addEventListener("submit", (event) => {
      event.preventDefault();
      keep(asked.elements.token.value.trim());
      asked.reset();
    });
  }
  const askToken = () => {
    asked.hidden = false;
    asked.elements.token.focus();
  };

  const given = (form) => Object.fromEntries(
    [...new FormData(form)].map(([name, value]) => [name, value.trim()]).filter((pair) => pair[1]));
  const word = (text) => (/^[\w@%+=:,./-]+$/.test(text) ? text : `'${text.replaceAll("'", "'\"'\"'")}'`);
  document.addEventListener("input", ({ target }) => {
    const form = target.closest("form.act");
    if (!form) return;
    form.querySelector(".command").textContent = [form.dataset.command,
      ...Object.entries(given(form)).map(([name, value]) => `--${name} ${word(value)}`)].join(" ");
  });
  document.addEventListener("submit", async (event) => {
    const form = event.target.closest("form.act");
    if (!form) return;
    event.preventDefault();
    const told = form.querySelector(".said");
    const token = sessionStorage.getItem("token");
    if (!token) return askToken();
    const button = form.querySelector("button");
    button.disabled = true;
    told.textContent = "Asked …";
    try {
      const answer = await fetch(form.dataset.act, {
        method: "POST",
        headers: { "content-type": "application/json", "x-agentmerge-token": token },
        body: JSON.stringify(given(form)),
      });
      const found = await answer.json();
      if (answer.status === 403) askToken();
      told.textContent = found.error ?? found.said;
      told.classList.toggle("note", !answer.ok);
    } catch {
      told.textContent = "The program that serves this page does not answer.";
    }
    button.disabled = false;
  });

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
  if (document.querySelector("[data-again]")) {
    setInterval(() => { if (!document.hidden) location.reload(); }, 5000);
  }
  const still = document.querySelector(".drawn[data-charts]");
  if (still) draw(still.dataset.charts);
})();
