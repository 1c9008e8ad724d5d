"use strict";
// Draws the charts from the data in the page, and lets a reader choose a candidate.
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const config = { responsive: true, displayModeBar: false, displaylogo: false, scrollZoom: false };
  const narrow = () => window.innerWidth < 600;

  // On a phone names are short and no chart takes the page's scrolling.
  const fitted = (figure) => {
    const layout = structuredClone(figure.layout);
    layout.dragmode = false;
    if (narrow()) {
      layout.margin = { ...layout.margin, l: 44, r: 8 };
      layout.font = { ...layout.font, size: 11 };
      layout.xaxis.tickangle = 0;
      if (layout.xaxis.ticktext) layout.xaxis.ticktext = short(layout.xaxis.ticktext);
      layout.legend = { ...layout.legend, y: -0.3 };
    }
    return layout;
  };

  // Names that begin alike lose that part, and long ones break at their joints.
  const short = (names) => {
    if (!narrow()) return names;
    let same = 0;
    while (names.length > 1 && names.every((n) => n[same] && n[same] === names[0][same])) same += 1;
    const alike = names[0].lastIndexOf("_", same - 1) + 1;
    return names.map((name) => (alike ? "…" : "") + name.slice(alike).replaceAll("_", "_<br>"));
  };

  // Charts are made for paper; where a page says that it is dark, their colours change places.
  const NIGHT = {
    "#1f2933": "#e6e9ee", "#5f6b7a": "#8b97a5", "#d9dee5": "#3a4552", "#e8ebf0": "#27313b",
    "#0b5cad": "#6cb0f5", "#b35300": "#f0a35e", "#1b7f4b": "#4cc38a", "#7a3fb0": "#bd93ea",
    "#b3261e": "#f2857d", "#0f7285": "#57c0d3", "#ffffff": "#11161c", "#eef0f3": "#1b232c",
    "#f3d9d7": "#43302f", "#f2f0e6": "#4a493f", "rgba(11,92,173,0.10)": "rgba(108,176,245,0.15)",
  };
  const dark = () => getComputedStyle(document.documentElement).colorScheme === "dark";
  const coloured = (figure) => (!dark() ? figure : JSON.parse(
    JSON.stringify(figure).replace(/"(#[0-9a-f]{6}|rgba\([^"]*\))"/g,
      (found, colour) => `"${NIGHT[colour] ?? colour}"`)));

  const draw = (id, chart) => {
    const figure = coloured(chart.grid ? heatmap(chart.grid) : chart);
    const traces = figure.data.map((trace) =>
      (id.endsWith("-tasks") ? { ...trace, x: short(trace.x) } : trace));
    Plotly.react(document.getElementById(id), traces, fitted(figure), config);
  };

  const heatmap = (grid) => {
    const cells = grid.z.flat().filter((value) => value !== null);
    const low = Math.min(0, ...cells);
    const high = Math.max(1, ...cells);
    const labels = narrow() ? grid.y.map((name) => name.replaceAll(" · ", "<br>")) : grid.y;
    return {
      data: [{
        type: "heatmap", x: grid.x, y: labels, z: grid.z, zmin: low, zmax: high,
        colorscale: low < 0
          ? [[0, "#b35300"], [-low / (high - low), "#ffffff"], [1, "#0b5cad"]]
          : [[0, "#ffffff"], [1, "#0b5cad"]],
        texttemplate: grid.x.length * (narrow() ? 3 : 1) <= 24 ? "%{z:.2f}" : "",
        xgap: 2, ygap: 2, showscale: !narrow(),
        colorbar: { thickness: 12, outlinewidth: 0 },
        hovertemplate: "%{y}<br>%{x}: %{z:.4f}<extra></extra>",
      }],
      layout: {
        height: 110 + (narrow() ? 52 : 34) * grid.y.length,
        margin: { l: 60, r: 16, t: 8, b: 40 },
        font: { family: "system-ui, sans-serif", size: 13, color: "#1f2933" },
        paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "#eef0f3",
        xaxis: { type: "category", automargin: true, showgrid: false },
        yaxis: { type: "category", automargin: true, autorange: "reversed", showgrid: false },
      },
    };
  };

  const choose = (run, at) => {
    const pick = document.getElementById(`${run}-pick`);
    if (!pick) return;
    if (![...pick.options].some((option) => option.value === at)) return;
    pick.value = at;
    if (data.grids[run][at]) draw(`${run}-grid`, { grid: data.grids[run][at] });
    document.getElementById(`${run}-grid-note`).textContent =
      `Effective values of ${pick.selectedOptions[0].textContent}, by layer group.`;
    const chart = document.getElementById(`${run}-progress`);
    const index = chart.data[0].customdata.indexOf(at);
    Plotly.restyle(chart, { selectedpoints: [index < 0 ? null : [index]] }, [0]);
  };

  const against = (chart, cost) => {
    const figure = data.charts[chart];
    figure.data.forEach((trace, index) => {
      trace.evaluations ??= trace.x;
      trace.x = cost ? trace.meta.costs : trace.evaluations;
    });
    figure.layout.xaxis.title.text = cost ? "worker time (s)" : "evaluations";
    draw(chart, figure);
  };

  const drawAll = () => {
    for (const [id, figure] of Object.entries(data.charts)) {
      if (!document.getElementById(id)) continue;
      if (id.endsWith("-progress")) {
        figure.data[0].selected = { marker: { color: "#b3261e", size: 13, opacity: 1 } };
        figure.data[0].unselected = { marker: { opacity: 0.45 } };
      }
      draw(id, figure);
    }
  };

  const start = () => {
    drawAll();
    for (const article of document.querySelectorAll("[data-run]")) {
      const run = article.dataset.run;
      const pick = document.getElementById(`${run}-pick`);
      if (!pick || !pick.value) continue;
      choose(run, pick.value);
      pick.addEventListener("change", () => choose(run, pick.value));
      document.getElementById(`${run}-progress`).on("plotly_click", (event) => {
        if (event.points[0].customdata) choose(run, event.points[0].customdata);
      });
    }
  };

  for (const field of document.querySelectorAll(".axis")) {
    field.addEventListener("change", (event) =>
      against(field.dataset.chart, event.target.value === "cost"));
  }
  for (const button of document.querySelectorAll(".copy")) {
    const label = button.textContent;
    button.addEventListener("click", async () => {
      const text = document.getElementById(button.dataset.from).textContent;
      try {
        await navigator.clipboard.writeText(text);
        button.textContent = "Copied";
      } catch {
        getSelection().selectAllChildren(document.getElementById(button.dataset.from));
        button.textContent = "Selected: copy it with your keyboard";
      }
      setTimeout(() => { button.textContent = label; }, 2500);
    });
  }
  // A page that follows a search is told its charts again and again.
  document.addEventListener("charts", (event) => {
    data.charts = event.detail;
    drawAll();
    for (const field of document.querySelectorAll(".axis")) {
      const cost = field.querySelector("input:checked").value === "cost";
      if (cost && data.charts[field.dataset.chart]) against(field.dataset.chart, true);
    }
  });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", drawAll);
  start();
})();
