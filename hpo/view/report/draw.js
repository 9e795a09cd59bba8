"use strict";
(() => {
  const figures = JSON.parse(document.getElementById("figures").textContent);
  const themes = {
    light: {
      ink: "#1d2125", muted: "#646b73", line: "#dfe1e4", card: "#ffffff", best: "#d1491b", main: "#1f6fbf",
      faint: "rgba(110,118,126,0.30)", idle: "#c3c8cd", curve: "rgba(31,111,191,0.38)", failed: "rgba(150,60,140,0.35)",
      second: "#a66a00", third: "#2c7d57", low: "#eef3f9", high: "#0d3f75",
      study: ["#1f6fbf", "#d1491b", "#2c7d57", "#8a4fbf", "#a66a00", "#0f8b9c"],
    },
    dark: {
      ink: "#e7e6e3", muted: "#9ba2aa", line: "#3a4047", card: "#1b1e22", best: "#ff8a5c", main: "#67adff",
      faint: "rgba(165,173,181,0.28)", idle: "#4a5159", curve: "rgba(103,173,255,0.40)", failed: "rgba(220,140,210,0.35)",
      second: "#e5b454", third: "#62c795", low: "#22303f", high: "#bfe0ff",
      study: ["#67adff", "#ff8a5c", "#62c795", "#c39bf0", "#e5b454", "#58c8d6"],
    },
  };
  const mixed = (from, to, share) => {
    const part = (color, at) => parseInt(color.slice(at, at + 2), 16);
    const one = (at) => Math.round(part(from, at) + (part(to, at) - part(from, at)) * share);
    return `rgb(${one(1)},${one(3)},${one(5)})`;
  };
  const isDark = () => {
    const chosen = document.documentElement.dataset.theme;
    return chosen ? chosen === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
  };
  const color = (name, theme) => {
    if (name === "@scale") return [[0, theme.low], [1, theme.high]];
    if (name === "@elacs") return [[0, theme.high], [1, theme.low]];
    if (name.startsWith("@level")) return mixed(theme.low, theme.high, 0.15 + 0.2125 * Number(name.slice(6)));
    if (name.startsWith("@study")) return theme.study[Number(name.slice(6))];
    return theme[name.slice(1)];
  };
  const COLORS = new Set(["color", "colorscale", "bgcolor"]);
  const themed = (value, theme) => {
    if (Array.isArray(value)) return typeof value[0] === "object" ? value.map((one) => themed(one, theme)) : value;
    if (value === null || typeof value !== "object") return value;
    const made = {};
    for (const [key, inner] of Object.entries(value)) {
      if (COLORS.has(key) && typeof inner === "string" && inner[0] === "@") made[key] = color(inner, theme);
      else if (COLORS.has(key) && Array.isArray(inner)) made[key] = inner.map((one) => (one[0] === "@" ? color(one, theme) : one));
      else made[key] = themed(inner, theme);
    }
    return made;
  };
  const axis = (given, theme) => ({
    gridcolor: theme.line, tickfont: { size: 11 }, zerolinecolor: theme.line, linecolor: theme.line, ticks: "", automargin: true, zeroline: false,
    ...given, title: { ...(given.title || {}), standoff: 8, font: { size: 12, color: theme.muted } },
  });
  const drawn = (name, theme, place) => {
    const { data, layout } = themed(figures[name], theme);
    const isNarrow = place.clientWidth < 480;
    const legend = layout.showlegend
      ? { orientation: "h", x: 0, y: 1, xanchor: "left", yanchor: "bottom", font: { size: 11 } } : undefined;
    return Plotly.react(place, data, {
      ...layout, legend, xaxis: axis(layout.xaxis, theme), yaxis: axis(layout.yaxis, theme),
      margin: { l: 8, r: isNarrow ? 8 : 16, t: layout.showlegend ? 28 : 10, b: 8, pad: 2 },
      paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)",
      font: { family: "system-ui, sans-serif", size: 12, color: theme.ink },
      hoverlabel: { bgcolor: theme.card, bordercolor: theme.line, font: { color: theme.ink } },
      modebar: { bgcolor: "rgba(0,0,0,0)", color: theme.muted, activecolor: theme.ink },
      dragmode: isNarrow ? false : "zoom",
    }, { responsive: true, displaylogo: false, displayModeBar: isNarrow ? false : "hover",
         modeBarButtons: [["toImage", "zoom2d", "pan2d", "resetScale2d"]] });
  };
  const root = document.documentElement;
  const drawAll = async () => {
    root.dataset.figures = "drawing";
    const theme = themes[isDark() ? "dark" : "light"];
    for (const place of document.querySelectorAll("[data-figure]")) {
      await drawn(place.dataset.figure, theme, place);
      await new Promise((next) => setTimeout(next));
    }
    root.dataset.figures = "drawn";
  };
  let drawing = Promise.resolve();
  const redraw = () => { drawing = drawing.then(drawAll); };
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", redraw);
  document.getElementById("theme").addEventListener("click", () => {
    root.dataset.theme = isDark() ? "light" : "dark";
    redraw();
  });
  redraw();
})();
