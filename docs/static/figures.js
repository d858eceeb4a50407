// Figures and twins: drawn from the JSON beside them, in the page's light or dark look. Nothing is asked of any host.
(() => {
  const dark = () => document.documentElement.dataset.theme === "dark";
  const grid = "rgba(128,128,128,0.25)";
  const font = "system-ui, -apple-system, Segoe UI, Roboto, sans-serif";
  const narrow = (el) => el.clientWidth < 520;

  const axes = (layout) => Object.keys(layout).filter((k) => /^[xy]axis\d*$/.test(k));

  function look(el, layout) {
    const ink = dark() ? "#e6e6e6" : "#24292f", small = narrow(el);
    const out = {...layout, paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", autosize: true, colorway: COLORS,
      font: {family: font, size: small ? 11 : 14, color: ink}};
    delete out.width; delete out.template;
    out.margin = small ? {l: 45, r: 8, t: 90, b: 45} : {l: 60, r: 20, t: 90, b: 50, ...(layout.margin || {})};
    out.legend = {orientation: "h", y: 1.02, yanchor: "bottom", x: 0, bgcolor: "rgba(0,0,0,0)", ...(layout.legend || {})};
    const title = typeof layout.title === "string" ? {text: layout.title} : {...(layout.title || {})};
    if (title.text) out.title = {...title, x: 0, xref: "paper", xanchor: "left", yref: "container", y: 0.98, yanchor: "top",
      text: wrap(title.text, Math.floor((el.clientWidth - out.margin.l - out.margin.r) / (small ? 6.8 : 8.4))), font: {size: small ? 12 : 15, color: ink}};
    for (const name of new Set(["xaxis", "yaxis", ...axes(layout)]))
      out[name] = {automargin: true, gridcolor: grid, zerolinecolor: grid, linecolor: grid, ...(layout[name] || {})};
    for (const s of out.sliders || []) { s.font = {color: ink}; s.bordercolor = grid; }
    return out;
  }

  function wrap(text, width) {
    const lines = [""];
    for (const word of text.split(" ")) {
      if ((lines.at(-1) + " " + word).length > width && lines.at(-1)) lines.push(word);
      else lines[lines.length - 1] += (lines.at(-1) ? " " : "") + word;
    }
    return lines.join("<br>");
  }

  const COLORS = ["#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00", "#8a8a2a", "#7f6fb3"];
  const config = {responsive: true, displaylogo: false, modeBarButtonsToRemove: ["lasso2d", "select2d"]};

  function figure(el) {
    const spec = JSON.parse(el.querySelector("script").textContent);
    const plot = el.querySelector(".plot");
    const draw = () => Plotly.react(plot, spec.data, look(plot, spec.layout), config);
    return draw().then(() => spec.frames && spec.frames.length && Plotly.addFrames(plot, spec.frames)).then(() => draw);
  }

  let controls = 0;

  function twin(el) {
    const spec = JSON.parse(el.querySelector("script").textContent);
    const plot = el.querySelector(".plot"), panel = el.querySelector(".controls");
    const state = spec.controls.map((c) => c.default);
    const place = () => spec.controls.reduce((at, c, i) => at * c.values.length + state[i], 0);
    const draw = () => {
      const f = spec.figures[place()];
      return Plotly.react(plot, f.data, look(plot, f.layout), config);
    };
    spec.controls.forEach((c, i) => {
      const numeric = c.values.every((v) => typeof v === "number");
      const label = document.createElement("label"), name = document.createElement("span"), value = document.createElement("output");
      name.textContent = c.label;
      label.append(name);
      label.htmlFor = `mlab-control-${++controls}`;  // without it the label would name its <output>
      if (numeric) {
        const input = document.createElement("input");
        Object.assign(input, {type: "range", min: 0, max: c.values.length - 1, step: 1, value: state[i], name: c.name, id: label.htmlFor});
        input.setAttribute("aria-valuetext", c.values[state[i]]);
        value.textContent = c.values[state[i]];
        input.addEventListener("input", () => { state[i] = +input.value; value.textContent = c.values[state[i]]; input.setAttribute("aria-valuetext", value.textContent); draw(); });
        label.append(value, input);
      } else {
        const select = document.createElement("select");
        Object.assign(select, {name: c.name, id: label.htmlFor});
        c.values.forEach((v, j) => select.add(new Option(v, j, false, j === state[i])));
        select.addEventListener("change", () => { state[i] = +select.value; draw(); });
        label.append(select);
      }
      panel.append(label);
    });
    return draw().then(() => draw);
  }

  // Search shows an extract of each page only where pages can be fetched, which is not so on disk.
  if (location.protocol === "file:" && typeof DOCUMENTATION_OPTIONS !== "undefined") DOCUMENTATION_OPTIONS.SHOW_SEARCH_SUMMARY = false;

  function main() {
    if (!window.Plotly) return;
    const redraw = [];
    document.querySelectorAll(".mlab-figure").forEach((el) => figure(el).then((d) => redraw.push(d)));
    document.querySelectorAll(".mlab-twin").forEach((el) => twin(el).then((d) => redraw.push(d)));
    new MutationObserver(() => redraw.forEach((d) => d())).observe(document.documentElement, {attributes: true, attributeFilter: ["data-theme"]});
    let timer;  // the column changes its width with the window, the sidebar and the fonts
    const widths = new WeakMap();
    const watch = new ResizeObserver((entries) => {
      let changed = false;
      for (const {target} of entries) {
        changed ||= widths.get(target) !== target.clientWidth;
        widths.set(target, target.clientWidth);
      }
      if (!changed) return;
      clearTimeout(timer);
      timer = setTimeout(() => redraw.forEach((d) => d()), 100);
    });
    document.querySelectorAll(".mlab-figure .plot, .mlab-twin .plot").forEach((el) => watch.observe(el));
  }

  document.readyState === "loading" ? document.addEventListener("DOMContentLoaded", main) : main();
})();
