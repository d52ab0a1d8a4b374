// The gallery of a report: what page.html has filled in becomes cards, canvases and controls.
// Texts of a run are a stranger's: they only ever become text nodes, never markup.
"use strict";

const report = (() => {
  const byId = (id) => document.getElementById(id);
  const data = JSON.parse(byId("data").textContent);
  const index = data.index;
  const BACKGROUND = -1;
  const LEVELS = 65535; // of the cells of a map
  const SAFE = ["#e69f00", "#56b4e9", "#009e73", "#f0e442", "#0072b2", "#d55e00", "#cc79a7", "#999999",
    "#332288", "#882255", "#44aa99", "#ddcc77"]; // Okabe and Ito's, then Tol's
  const PREDICTED = [255, 159, 26], TRUE = [61, 214, 255];

  const state = {
    sort: "", class: null, find: "", page: 0,
    layer: "map", opacity: 0.6, threshold: null, predicted: true, true: true,
    colours: Object.keys(data.colourMaps)[0], palette: "safe",
    hidden: new Set(), picked: new Map(), list: [], open: null,
  };

  // ---------------------------------------------------------------- small things

  function make(tag, properties = {}, ...children) {
    const { data: attributes, ...own } = properties;
    const element = Object.assign(document.createElement(tag), own);
    for (const [name, value] of Object.entries(attributes ?? {})) element.setAttribute(name, value);
    element.append(...children.filter((child) => child !== null && child !== undefined));
    return element;
  }
  const nameOf = (name) =>
    typeof name === "string" ? name : name === BACKGROUND ? "background" : data.classes[name] ?? `#${name}`;
  const percent = (value) => (value === null || value === undefined ? "–" : (100 * value).toFixed(1));
  const bytes = (text) => Uint8Array.from(atob(text), (character) => character.charCodeAt(0));
  const visibleColumns = () => data.columns.map((_, i) => i).filter((i) => !state.hidden.has(i));
  const thresholdOf = (column) => state.threshold ?? data.columns[column].threshold;

  // ---------------------------------------------------------------- images, page by page

  const pages = new Map(); // number -> promise of its images
  const arriving = new Map();

  function page(number) {
    if (!pages.has(number)) {
      pages.set(number, number < data.inline
        ? Promise.resolve(JSON.parse(byId(`page-${number}`).textContent))
        : fetched(number));
      if (pages.size > 60) pages.delete(pages.keys().next().value);
    }
    return pages.get(number);
  }

  // A page opened from a disk may not fetch files, but it may run them as scripts.
  function fetched(number) {
    return new Promise((resolve, reject) => {
      arriving.set(number, resolve);
      const src = `${data.folder}/${String(number).padStart(5, "0")}.js`;
      const script = make("script", { src });
      script.onload = () => script.remove();
      script.onerror = () => {
        pages.delete(number);
        reject(new Error(`${src} is missing: the folder ${data.folder} belongs beside this page`));
      };
      document.head.append(script);
    });
  }

  function receive(number, items) {
    arriving.get(number)?.(items);
    arriving.delete(number);
  }

  const item = async (i) => (await page(Math.floor(i / data.page)))[i % data.page];

  function picture(one) {
    if (!one.image) return Promise.resolve(null);
    one.picture ??= new Promise((resolve) => {
      const image = new Image();
      image.onload = () => resolve(image);
      image.onerror = () => resolve(null);
      image.src = `data:image/jpeg;base64,${one.image.jpeg}`;
    });
    return one.picture;
  }

  // ---------------------------------------------------------------- maps and masks

  // Bilinear, without corner alignment: as torch enlarges the maps that masks are made of.
  function axis(cells, pixels) {
    const low = new Int32Array(pixels), high = new Int32Array(pixels), share = new Float32Array(pixels);
    for (let p = 0; p < pixels; p++) {
      const place = Math.max(((p + 0.5) * cells) / pixels - 0.5, 0);
      low[p] = Math.min(Math.floor(place), cells - 1);
      high[p] = Math.min(low[p] + 1, cells - 1);
      share[p] = place - low[p];
    }
    return { low, high, share };
  }

  function enlarge(cells, [rows, columns], height, width) {
    const x = axis(columns, width), y = axis(rows, height);
    const values = new Float32Array(height * width);
    for (let r = 0, p = 0; r < height; r++) {
      const top = y.low[r] * columns, bottom = y.high[r] * columns, down = y.share[r];
      for (let c = 0; c < width; c++, p++) {
        const a = cells[top + x.low[c]], b = cells[top + x.high[c]];
        const d = cells[bottom + x.low[c]], e = cells[bottom + x.high[c]];
        const above = a + (b - a) * x.share[c], below = d + (e - d) * x.share[c];
        values[p] = (above + (below - above) * down) / LEVELS;
      }
    }
    return values;
  }

  function cellsOf(maps, name) {
    const place = maps.names.indexOf(name);
    if (place < 0) return null;
    maps.bytes ??= new Uint16Array(bytes(maps.cells).buffer);
    const size = maps.grid[0] * maps.grid[1];
    return maps.bytes.subarray(place * size, (place + 1) * size);
  }

  /** Values in [0, 1] of the map of `name`, at height x width; null where there is none. */
  function mapOf(one, column, name, height, width) {
    const maps = one.columns[column]?.maps;
    const cells = maps && cellsOf(maps, name);
    if (!cells) return null;
    const values = enlarge(cells, maps.grid, height, width);
    if (data.columns[column].order === "paper" && one.size) {
      // Equation 1 enlarges first: the range is that at the image's own size.
      maps.ranges ??= new Map();
      if (!maps.ranges.has(name)) {
        let low = 1, high = 0;
        for (const value of enlarge(cells, maps.grid, ...one.size)) {
          if (value < low) low = value;
          if (value > high) high = value;
        }
        maps.ranges.set(name, [low, high - low || 1]);
      }
      const [low, span] = maps.ranges.get(name);
      for (let p = 0; p < values.length; p++) values[p] = Math.min(Math.max((values[p] - low) / span, 0), 1);
    }
    return values;
  }

  function decode(text, count) {
    const source = bytes(text), out = new Uint8Array(count);
    for (let i = 0, p = 0; i < source.length;) {
      const value = source[i++];
      let length = 0, shift = 0, byte;
      do {
        byte = source[i++];
        length |= (byte & 127) << shift;
        shift += 7;
      } while (byte & 128);
      out.fill(value, p, p + length);
      p += length;
    }
    return out;
  }

  function resized(values, [rows, columns], height, width) {
    const out = new Uint8Array(height * width);
    for (let r = 0, p = 0; r < height; r++) {
      const row = Math.floor(((r + 0.5) * rows) / height) * columns;
      for (let c = 0; c < width; c++, p++) out[p] = values[row + Math.floor(((c + 0.5) * columns) / width)];
    }
    return out;
  }

  function storedMask(masks, name, height, width) {
    const place = masks ? masks.names.indexOf(name) : -1;
    if (place < 0) return null;
    return resized(decode(masks.masks[place], masks.size[0] * masks.size[1]), masks.size, height, width);
  }

  // A word that is the name of a class has its truth, too.
  const classOf = (name) => (typeof name === "string" ? data.classes.indexOf(name) : name);

  function trueMask(one, name, height, width) {
    const text = one.truth?.masks[classOf(name)];
    if (text === undefined) return null;
    return resized(decode(text, one.truth.size[0] * one.truth.size[1]), one.truth.size, height, width);
  }

  /** The mask (0 or 1) that a column predicts for `name`: of a map, at the threshold that is set. */
  function maskOf(one, column, name, height, width, threshold = thresholdOf(column)) {
    const entry = one.columns[column];
    const values = mapOf(one, column, name, height, width);
    if (values) return Uint8Array.from(values, (value) => (value >= threshold ? 1 : 0));
    if (entry?.labels) {
      const place = entry.labels.names.indexOf(name);
      const { values: stored, size } = entry.labels;
      const labels = resized(decode(stored, size[0] * size[1]), size, height, width);
      return place < 0 ? new Uint8Array(height * width) : labels.map((value) => (value === place ? 1 : 0));
    }
    return storedMask(entry?.masks, name, height, width);
  }

  function iou(mask, truth) {
    let both = 0, either = 0;
    for (let p = 0; p < mask.length; p++) {
      both += mask[p] & truth[p];
      either += mask[p] | truth[p];
    }
    return either ? both / either : null;
  }

  // ---------------------------------------------------------------- drawing

  const tables = new Map();
  function colourTable(name) {
    if (!tables.has(name)) tables.set(name, bytes(data.colourMaps[name]));
    return tables.get(name);
  }

  function layerOf(width, height, paint) {
    const canvas = new OffscreenCanvas(width, height), context = canvas.getContext("2d");
    const pixels = context.createImageData(width, height);
    paint(pixels.data);
    context.putImageData(pixels, 0, 0);
    return canvas;
  }

  function outline(target, mask, width, height, [red, green, blue], thick) {
    const at = (r, c) => (r < 0 || c < 0 || r >= height || c >= width ? null : mask[r * width + c]);
    const near = (r, c, step, value) =>
      at(r - step, c) === value || at(r + step, c) === value || at(r, c - step) === value || at(r, c + step) === value;
    for (let r = 0, p = 0; r < height; r++) {
      for (let c = 0; c < width; c++, p++) {
        if (mask[p]) {
          let edge = false;
          for (let step = 1; step <= thick && !edge; step++) edge = near(r, c, step, 0);
          if (edge) target.set([red, green, blue, 255], 4 * p);
        } else if (near(r, c, 1, 1) && !target[4 * p + 3]) {
          target.set([0, 0, 0, 170], 4 * p); // a dark edge, so that it shows on any picture
        }
      }
    }
  }

  const hexRgb = (hex) => [1, 3, 5].map((place) => parseInt(hex.slice(place, place + 2), 16));

  /** Class -> colour of an image's label maps: no two the same while there are colours left. */
  function paletteOf(one) {
    const names = new Set(Object.keys(one.truth?.masks ?? {}).map(Number));
    for (const entry of one.columns) for (const name of entry?.labels?.names ?? []) names.add(name);
    const colours = new Map([[BACKGROUND, [90, 90, 90]]]), taken = new Set();
    for (const name of names) {
      if (name === BACKGROUND) continue;
      if (state.palette === "own") {
        colours.set(name, data.palette[name] ?? [128, 128, 128]);
        continue;
      }
      let place = name % SAFE.length;
      for (let tries = 0; taken.has(place) && tries < SAFE.length; tries++) place = (place + 1) % SAFE.length;
      taken.add(place);
      colours.set(name, hexRgb(SAFE[place]));
    }
    return colours;
  }

  function paintLabels(one, entry, width, height, only) {
    const colours = paletteOf(one), { labels } = entry;
    const values = resized(decode(labels.values, labels.size[0] * labels.size[1]), labels.size, height, width);
    return layerOf(width, height, (target) => {
      for (let p = 0; p < values.length; p++) {
        const name = labels.names[values[p]];
        if (name === BACKGROUND || name === undefined) continue;
        target.set([...colours.get(name), only === null || name === only ? 255 : 60], 4 * p);
      }
    });
  }

  function paintTruth(one, width, height) {
    const colours = paletteOf(one);
    return layerOf(width, height, (target) => {
      for (const name of Object.keys(one.truth.masks).map(Number)) {
        const mask = trueMask(one, name, height, width);
        for (let p = 0; p < mask.length; p++) if (mask[p]) target.set([...colours.get(name), 255], 4 * p);
      }
    });
  }

  function paintPoints(context, one, entry, name, width, height) {
    const place = entry.points.names.indexOf(name);
    if (place < 0 || !one.size) return;
    const radius = Math.max(3, Math.min(width, height) / 45);
    entry.points.places[place].forEach(([left, top], i) => {
      const x = ((left + 0.5) * width) / one.size[1], y = ((top + 0.5) * height) / one.size[0];
      context.beginPath();
      if (entry.points.labels[place][i]) {
        context.arc(x, y, radius, 0, 2 * Math.PI);
        context.fillStyle = "#009e73";
        context.strokeStyle = "#fff";
        context.lineWidth = radius / 2.5;
        context.fill();
        context.stroke();
        return;
      }
      context.moveTo(x - radius, y - radius);
      context.lineTo(x + radius, y + radius);
      context.moveTo(x - radius, y + radius);
      context.lineTo(x + radius, y - radius);
      for (const [colour, wide] of [["#fff", radius], ["#d55e00", radius / 2]]) {
        context.strokeStyle = colour;
        context.lineWidth = wide;
        context.stroke();
      }
    });
  }

  const shapeOf = (one) => one.size ?? one.image?.size ?? [1, 1];

  /** Draw an image, and over it what a column says of `name`; column null is the image itself. */
  async function draw(canvas, one, column, name) {
    const [rows, columns] = shapeOf(one);
    const wide = Math.min(canvas.clientWidth * Math.min(devicePixelRatio, 2), 900) || 200;
    const width = Math.max(Math.round(wide), 1), height = Math.max(Math.round((wide * rows) / columns), 1);
    const image = await picture(one);
    canvas.width = width;
    canvas.height = height;
    const context = canvas.getContext("2d");
    context.imageSmoothingQuality = "high";
    context.fillStyle = "#777";
    context.fillRect(0, 0, width, height);
    if (image) context.drawImage(image, 0, 0, width, height);
    const entry = column === null || column === "true" ? null : one.columns[column];
    if (column === "true") {
      context.globalAlpha = image ? state.opacity : 1;
      context.drawImage(paintTruth(one, width, height), 0, 0);
      context.globalAlpha = 1;
    }
    const mask = entry && state.layer !== "none" || entry && state.predicted
      ? maskOf(one, column, name, height, width) : null;
    if (entry && state.layer !== "none") {
      const values = mapOf(one, column, name, height, width);
      if (entry.labels) {
        context.globalAlpha = image ? state.opacity : 1;
        context.drawImage(paintLabels(one, entry, width, height, state.layer === "mask" ? name : null), 0, 0);
      } else if (values && state.layer === "map") {
        const table = colourTable(state.colours);
        context.globalAlpha = image ? state.opacity : 1;
        context.drawImage(layerOf(width, height, (target) => {
          for (let p = 0; p < values.length; p++) {
            const colour = 3 * Math.round(255 * values[p]);
            target[4 * p] = table[colour];
            target[4 * p + 1] = table[colour + 1];
            target[4 * p + 2] = table[colour + 2];
            target[4 * p + 3] = 255;
          }
        }), 0, 0);
      } else if (mask) {
        context.globalAlpha = state.opacity;
        context.drawImage(layerOf(width, height, (target) => {
          for (let p = 0; p < mask.length; p++) if (!mask[p]) target[4 * p + 3] = 255;
        }), 0, 0);
      }
      context.globalAlpha = 1;
    }
    const truth = state.true ? trueMask(one, name, height, width) : null;
    const lines = entry && state.predicted && mask && !entry.labels ? mask : null;
    if (truth || lines) {
      const thick = Math.max(1, Math.round(width / 180));
      context.drawImage(layerOf(width, height, (target) => {
        if (truth) outline(target, truth, width, height, TRUE, thick);
        if (lines) outline(target, lines, width, height, PREDICTED, thick);
      }), 0, 0);
    }
    if (entry?.points) paintPoints(context, one, entry, name, width, height);
    canvas.dataset.drawn = `${state.layer} ${nameOf(name)}`;
  }

  // Only what is on the screen is drawn; the rest when it gets there.
  const jobs = new Map(); // canvas -> {one, column, name, seen, stale}
  const watcher = new IntersectionObserver((entries) => {
    for (const { target, isIntersecting } of entries) {
      const job = jobs.get(target);
      if (!job) continue;
      job.seen = isIntersecting;
      if (isIntersecting && job.stale) start(target, job);
    }
  }, { rootMargin: "200px" });

  function start(canvas, job) {
    job.stale = false;
    draw(canvas, job.one, job.column, job.name());
  }

  function canvasOf(one, column, name, label) {
    const [rows, columns] = shapeOf(one);
    const canvas = make("canvas", { data: { role: "img", "aria-label": label } });
    canvas.style.aspectRatio = `${columns} / ${rows}`;
    jobs.set(canvas, { one, column, name, seen: false, stale: true });
    watcher.observe(canvas);
    return canvas;
  }

  let asked = 0;
  function redraw() {
    cancelAnimationFrame(asked);
    asked = requestAnimationFrame(() => {
      for (const [canvas, job] of jobs) {
        if (!canvas.isConnected) {
          watcher.unobserve(canvas);
          jobs.delete(canvas);
        } else if (job.seen) start(canvas, job);
        else job.stale = true;
      }
      for (const change of document.querySelectorAll("[data-live]")) change.refresh?.();
    });
  }

  // ---------------------------------------------------------------- which class, which word

  function namesOf(one) {
    const names = new Set();
    for (const column of visibleColumns()) {
      const entry = one.columns[column];
      for (const name of [...(entry?.maps?.names ?? []), ...(entry?.points?.names ?? []),
        ...(entry?.masks?.names ?? []), ...(entry?.labels?.names ?? [])]) names.add(name);
    }
    if (one.columns.some((entry) => entry?.labels)) {
      for (const name of Object.keys(one.truth?.masks ?? {})) names.add(Number(name));
    }
    names.delete(BACKGROUND);
    return [...one.labels.filter((name) => names.has(name)), ...[...names].filter((name) => !one.labels.includes(name))];
  }

  function nameFor(one) {
    const names = namesOf(one);
    const wanted = state.picked.get(one) ?? state.class;
    if (names.includes(wanted)) return wanted;
    if (!names.length) return state.class; // nothing is drawn but the truth of what is looked for
    const found = one.columns[visibleColumns()[0]]?.quality?.classes ?? {};
    const known = names.filter((name) => found[name] !== undefined && one.labels.includes(name));
    known.sort((a, b) => found[a] - found[b]); // the worst one
    return known[0] ?? names[0];
  }

  function pick(one, name) {
    state.picked.set(one, name);
    for (const chips of document.querySelectorAll(".chips")) chips.refresh?.();
    redraw();
  }

  function chips(one, limit) {
    const row = make("div", { className: "chips", data: { role: "group", "aria-label": "Class" } });
    const names = namesOf(one).slice(0, limit);
    for (const name of names) {
      const found = visibleColumns().map((column) => one.columns[column]?.quality?.classes?.[name]);
      const button = make("button", { type: "button", className: one.labels.includes(name) ? "label" : "" }, nameOf(name));
      if (found[0] !== undefined) button.append(make("span", { className: "quiet" }, ` ${(100 * found[0]).toFixed(0)}`));
      button.onclick = (event) => {
        event.stopPropagation();
        pick(one, name);
      };
      button.name_ = name;
      row.append(button);
    }
    row.refresh = () => {
      const chosen = nameFor(one);
      for (const button of row.children) button.setAttribute("aria-pressed", button.name_ === chosen);
    };
    row.refresh();
    return row;
  }

  // ---------------------------------------------------------------- cards

  function panels(one, large) {
    const box = make("div", { className: "panels" });
    const name = () => nameFor(one);
    const add = (column, label) => {
      const figure = make("figure", {}, canvasOf(one, column, name, label), make("figcaption", {}, label));
      if (large && typeof column === "number") readout(figure, one, column);
      box.append(figure);
    };
    const drawable = (entry) => entry && (entry.maps || entry.labels || entry.points || entry.masks);
    const any = one.columns.some(drawable);
    if (one.image || !any) add(null, one.image ? "image" : "no image");
    if (one.truth && one.columns.some((entry) => entry?.labels)) add("true", "true");
    for (const column of visibleColumns()) {
      const entry = one.columns[column], { label } = data.columns[column];
      if (drawable(entry)) add(column, label);
      for (const [title, jpeg] of (large ? entry?.pictures : entry?.pictures?.slice(0, 1)) ?? []) {
        const image = make("img", { src: `data:image/jpeg;base64,${jpeg}`, alt: title, loading: "lazy" });
        box.append(make("figure", { className: "wide" }, image, make("figcaption", {}, title)));
      }
    }
    box.style.setProperty("--panels", Math.max(box.childElementCount, 1));
    return box;
  }

  // The value under the pointer, or the class of a label map.
  function readout(figure, one, column) {
    const canvas = figure.querySelector("canvas"), caption = figure.querySelector("figcaption");
    const said = make("span", { className: "readout" });
    caption.append(said);
    canvas.onpointerleave = () => (said.textContent = "");
    canvas.onpointermove = (event) => {
      const place = canvas.getBoundingClientRect(), entry = one.columns[column];
      const x = Math.min(Math.max((event.clientX - place.left) / place.width, 0), 0.999);
      const y = Math.min(Math.max((event.clientY - place.top) / place.height, 0), 0.999);
      if (entry.labels) {
        const { size, values, names } = entry.labels;
        const labels = decode(values, size[0] * size[1]);
        said.textContent = ` ${nameOf(names[labels[Math.floor(y * size[0]) * size[1] + Math.floor(x * size[1])]] ?? BACKGROUND)}`;
      } else if (entry.maps) {
        const { grid, low, high, names } = entry.maps, which = names.indexOf(nameFor(one));
        if (which < 0) return;
        const cell = cellsOf(entry.maps, names[which])[Math.floor(y * grid[0]) * grid[1] + Math.floor(x * grid[1])] / LEVELS;
        said.textContent = ` ${cell.toFixed(2)}, similarity ${(low[which] + cell * (high[which] - low[which])).toFixed(3)}`;
      }
    };
  }

  function badges(one) {
    const box = make("span", { className: "badges" });
    for (const column of visibleColumns()) {
      const found = one.columns[column]?.quality;
      if (!found) continue;
      const badge = make("span", { className: "badge", title: `${found.name}, ${data.columns[column].label}` }, percent(found.value));
      badge.style.setProperty("--colour", `var(--series-${String(column % 6).padStart(2, "0")})`);
      box.append(badge);
    }
    return box;
  }

  function caption(one) {
    const entry = one.columns.find((found) => found?.tokens);
    if (!entry) return one.caption ? make("p", { className: "caption" }, one.caption) : null;
    const { tokens, scores, ranks, truncated } = entry.tokens;
    const line = make("p", { className: "caption tokens" });
    tokens.forEach((token, i) => {
      const going = token.endsWith("-") && token.length > 1;
      const word = make("span", {
        className: `token rank-${Math.min(ranks[i], 4)}`, tabIndex: 0,
        data: { "data-tip": `rank ${ranks[i]} of ${ranks.length}, cosine ${scores[i].toFixed(3)}` },
      }, going ? token.slice(0, -1) : token);
      line.append(word, going ? "" : " ");
    });
    if (truncated) line.append(make("span", { className: "quiet" }, "(cut off: longer than the model reads)"));
    return line;
  }

  function ranking(one, full) {
    const box = make("div", { className: "rankings" });
    for (const column of visibleColumns()) {
      const found = one.columns[column]?.scores;
      if (!found) continue;
      const ways = Object.keys(found.ways), first = found.ways[ways[0]];
      const low = Math.min(0, ...first), high = Math.max(...first, 1e-9);
      const table = make("table", {});
      if (full && ways.length > 1) {
        table.append(make("thead", {}, make("tr", {}, make("th", {}, "class"), make("th", {}, "rank"),
          make("th", {}, data.columns[column].label), ...ways.slice(1).map((way) => make("th", { className: "number" }, way)))));
      }
      const body = make("tbody", {});
      (full ? found.names : found.names.slice(0, 6)).forEach((name, i) => {
        const bar = make("span", { className: "bar" });
        bar.style.setProperty("--share", Math.max((first[i] - low) / (high - low), 0));
        bar.style.setProperty("--colour", `var(--series-${String(column % 6).padStart(2, "0")})`);
        const right = one.labels.includes(name);
        body.append(make("tr", { className: right ? "right" : "" },
          make("th", { scope: "row", title: right ? "in the image" : "" }, `${right ? "● " : ""}${nameOf(name)}`),
          full ? make("td", { className: "number quiet" }, String(found.ranks[i])) : null,
          make("td", {}, bar, make("span", { className: "number" }, first[i].toFixed(3))),
          ...(full ? ways.slice(1) : []).map((way) => make("td", { className: "number" }, found.ways[way][i].toFixed(3)))));
      });
      table.append(body);
      box.append(table);
    }
    return box.childElementCount ? box : null;
  }

  function words(one, full) {
    const entry = one.columns.find((found) => found?.facts?.frequencies);
    if (!entry) return null;
    const list = make("ul", { className: "words" });
    const counted = Object.entries(entry.facts.frequencies).slice(0, full ? 60 : 8);
    const most = Math.max(...counted.map(([, times]) => times), 1);
    for (const [word, times] of counted) {
      const known = namesOf(one).includes(word);
      const label = make(known ? "button" : "span", known ? { type: "button" } : {}, word,
        make("span", { className: "quiet" }, ` ${times}`));
      label.style.setProperty("--weight", (0.85 + (0.5 * times) / most).toFixed(2));
      if (known) label.onclick = (event) => {
        event.stopPropagation();
        pick(one, word);
      };
      list.append(make("li", {}, label));
    }
    if (!full) return list;
    const texts = (entry.facts.opinions ?? []).map(({ text, score }) =>
      make("li", {}, text, make("span", { className: "quiet" }, ` ${Number(score).toFixed(3)}`)));
    return make("div", {}, make("h3", {}, "Words"), list,
      texts.length ? make("h3", {}, "Texts that it climbed to") : null, make("ol", {}, ...texts));
  }

  function legend(one) {
    if (!one.columns.some((entry) => entry?.labels)) return null;
    const colours = paletteOf(one), list = make("ul", { className: "legend" });
    const shares = new Map();
    for (const column of visibleColumns()) {
      const { names, shares: of } = one.columns[column]?.labels ?? { names: [] };
      names.forEach((name, i) => shares.set(name, Math.max(shares.get(name) ?? 0, of[i])));
    }
    for (const name of one.labels) if (!shares.has(name)) shares.set(name, 0);
    for (const [name] of [...shares].sort((a, b) => b[1] - a[1]).slice(0, 12)) {
      if (name === BACKGROUND || !colours.has(name)) continue;
      const swatch = make("span", { className: "swatch" });
      swatch.style.setProperty("--colour", `rgb(${colours.get(name).join(" ")})`);
      list.append(make("li", {}, swatch, nameOf(name)));
    }
    return list;
  }

  async function card(i, place) {
    const box = make("article", { className: "card", tabIndex: 0, data: { "aria-label": index.key[i] } });
    box.onclick = () => show(place);
    box.onkeydown = (event) => {
      if (event.target === box && (event.key === "Enter" || event.key === " ")) {
        event.preventDefault();
        show(place);
      }
    };
    try {
      const one = await item(i);
      box.append(make("header", {}, make("b", { className: "key", title: one.key }, one.key), badges(one)));
      for (const part of [panels(one, false), caption(one), ranking(one, false), words(one, false), legend(one)]) {
        if (part) box.append(part);
      }
      if (!one.columns.some((entry) => entry?.labels || entry?.facts?.frequencies)) box.append(chips(one, 8));
    } catch (error) {
      box.append(make("p", { className: "notice" }, error.message));
    }
    return box;
  }

  // ---------------------------------------------------------------- sorting, filtering

  const qualityOf = (i, column) => {
    if (state.class === null) return index.quality[i][column];
    const place = index.labels[i].indexOf(state.class), found = index.classes[i][column];
    return found && place >= 0 ? found[place] : null;
  };

  function sorts() {
    const found = [], several = data.columns.length > 1;
    const measured = data.measured.length ? data.measured.join(" or ") : null;
    data.columns.forEach((column, c) => {
      const of = several ? `, ${column.label}` : "";
      if (measured && index.quality.some((row) => row[c] !== null)) {
        found.push([`worst ${measured} first${of}`, (i) => qualityOf(i, c), 1]);
        found.push([`best ${measured} first${of}`, (i) => qualityOf(i, c), -1]);
      }
    });
    for (let c = 1; c < data.columns.length && measured; c++) {
      const gain = (i) => {
        const [one, other] = [qualityOf(i, 0), qualityOf(i, c)];
        return one === null || other === null ? null : one - other;
      };
      if (!index.quality.some((row) => row[0] !== null && row[c] !== null)) continue;
      found.push([`${data.columns[0].label} most ahead of ${data.columns[c].label}`, gain, -1]);
      found.push([`${data.columns[0].label} most behind ${data.columns[c].label}`, gain, 1]);
    }
    data.columns.forEach((column, c) => {
      const of = several ? `, ${column.label}` : "";
      if (!index.score.some((row) => row[c] !== null)) return;
      found.push([`lowest score first${of}`, (i) => index.score[i][c], 1]);
      found.push([`highest score first${of}`, (i) => index.score[i][c], -1]);
    });
    return found;
  }
  const orders = sorts();

  // ---------------------------------------------------------------- the two ends of the first order

  /** The worst and the best images, small, above all others. */
  async function extremes() {
    const box = byId("extremes"), count = Math.min(6, Math.floor(index.key.length / 2));
    if (orders.length < 2 || !count) return box.remove();
    for (const which of [0, 1]) {
      const sorted = arranged(which).filter((i) => orders[which][1](i) !== null).slice(0, count);
      if (!sorted.length) return box.remove();
      const row = make("div", { className: "strip" });
      box.append(make("h2", {}, orders[which][0].replace(" first", "")), row);
      const found = await Promise.allSettled(sorted.map(item)); // a page may be missing
      found.forEach(({ value: one }, n) => {
        if (!one) return;
        const column = one.columns.findIndex((entry) => entry?.maps || entry?.labels || entry?.points || entry?.masks);
        const canvas = canvasOf(one, column < 0 ? null : column, () => nameFor(one), one.key);
        const value = orders[which][1](sorted[n]), shown = data.measured.length ? percent(value) : value.toFixed(3);
        const button = make("button", { type: "button", title: one.key }, canvas, make("span", { className: "number" }, shown));
        button.onclick = () => {
          state.sort = which;
          state.class = null;
          state.find = byId("find").value = "";
          byId("sort").value = which;
          byId("class").value = "";
          state.page = 0;
          refill().then(() => show(n));
        };
        row.append(button);
      });
    }
  }

  /** All images, in one of the orders; those that it says nothing of are last. */
  function arranged(order, list = index.key.map((_, i) => i)) {
    const [, value, sign] = orders[order];
    const values = new Map(list.map((i) => [i, value(i)]));
    return list.sort((a, b) => {
      const [one, other] = [values.get(a), values.get(b)];
      if (one === null || one === undefined) return other === null || other === undefined ? a - b : 1;
      return other === null || other === undefined ? -1 : sign * (one - other) || a - b;
    });
  }

  function arrange() {
    const text = state.find.toLowerCase();
    let list = index.key.map((_, i) => i);
    if (state.class !== null) {
      list = list.filter((i) => index.labels[i].includes(state.class) || index.shown[i].includes(state.class));
    }
    if (text) list = list.filter((i) => index.key[i].toLowerCase().includes(text));
    if (state.sort === "name") list.sort((a, b) => (index.key[a] < index.key[b] ? -1 : 1));
    else list = arranged(state.sort, list);
    state.list = list;
    state.page = Math.min(state.page, Math.max(Math.ceil(list.length / data.page) - 1, 0));
  }

  let turn = 0;
  async function fill() {
    const mine = ++turn, start = state.page * data.page, shown = state.list.slice(start, start + data.page);
    const cards = await Promise.all(shown.map((i, n) => card(i, start + n)));
    if (mine !== turn) return; // something else was asked for meanwhile
    const gallery = byId("gallery");
    gallery.replaceChildren(...cards);
    if (!cards.length) gallery.append(make("p", { className: "quiet" }, "No image fits."));
    const widest = Math.max(1, ...cards.map((box) => Number(box.querySelector(".panels")?.style.getPropertyValue("--panels")) || 1));
    gallery.style.setProperty("--panels", widest);
    const count = state.list.length, last = Math.min(start + data.page, count);
    byId("count").textContent = count === index.key.length ? `${count.toLocaleString("en")}` : `${count.toLocaleString("en")} of ${index.key.length.toLocaleString("en")}`;
    byId("place").textContent = count ? `${start + 1}–${last} of ${count.toLocaleString("en")}` : "";
    byId("previous").disabled = state.page === 0;
    byId("next").disabled = last >= count;
    byId("pager").hidden = count <= data.page;
    gallery.dataset.filled = String(turn);
  }

  function refill() {
    arrange();
    return fill();
  }

  function turnPage(by) {
    const last = Math.max(Math.ceil(state.list.length / data.page) - 1, 0);
    const wanted = Math.min(Math.max(state.page + by, 0), last);
    if (wanted === state.page) return;
    state.page = wanted;
    fill().then(() => byId("images").scrollIntoView());
  }

  // ---------------------------------------------------------------- one image, large

  async function show(place) {
    if (place < 0 || place >= state.list.length) return;
    const i = state.list[place], dialog = byId("detail");
    state.open = place;
    const one = await item(i).catch(() => null); // its page is missing, as its card says
    if (!one) state.open = dialog.open ? Number(dialog.dataset.place) : null;
    if (state.open !== place) return;
    dialog.dataset.place = place;
    byId("detail-title").textContent = one.key;
    byId("detail-place").textContent = `${place + 1} of ${state.list.length}`;
    byId("detail-previous").disabled = place === 0;
    byId("detail-next").disabled = place === state.list.length - 1;
    const side = make("div", { className: "detail-side" });
    for (const part of [caption(one), classTable(one), ranking(one, true), words(one, true), legend(one), facts(one)]) {
      if (part) side.append(part);
    }
    byId("detail-body").replaceChildren(make("div", {}, panels(one, true), chips(one, 60)), side);
    byId("detail-tools").append(byId("showing"));
    if (!dialog.open) dialog.showModal();
    dialog.dataset.key = one.key;
    redraw();
  }

  function classTable(one) {
    const compared = (column) => one.truth && one.columns[column].maps && one.columns[column].quality;
    const columns = visibleColumns().filter((column) => one.columns[column]?.quality || one.columns[column]?.maps);
    const names = namesOf(one).filter((name) => typeof name === "string" || one.labels.includes(name)
      || columns.some((column) => one.columns[column].quality?.classes[name] !== undefined
        || one.columns[column].maps));
    if (!columns.length || !names.length) return null;
    const measured = one.columns[columns[0]].quality?.name;
    const table = make("table", { data: { "data-live": "" } });
    const several = columns.length > 1;
    table.append(make("thead", {}, make("tr", {}, make("th", {}, "class"),
      ...columns.flatMap((column) => {
        const of = several ? ` ${data.columns[column].label}` : "";
        return [measured ? make("th", { className: "number" }, `${measured}${of}`) : make("th", {}, of),
          compared(column) ? make("th", { className: "number", title: "IoU of the mask that is drawn now, at the size of the picture" }, "now") : null,
          one.columns[column].maps ? make("th", { className: "number", title: "highest similarity on the token grid" }, "peak") : null]
          .filter((head) => head);
      }))));
    const body = make("tbody", {});
    for (const name of names) {
      const labelled = one.labels.includes(name);
      const row = make("tr", {}, make("th", { scope: "row", title: labelled ? "in the image" : "" }, `${labelled ? "● " : ""}${nameOf(name)}`));
      for (const column of columns) {
        const { quality, maps } = one.columns[column];
        row.append(make("td", { className: "number" }, percent(quality?.classes[name])));
        if (!maps) continue;
        const place = maps.names.indexOf(name);
        if (compared(column)) row.append(make("td", { className: "number now", data: { "data-column": column } }));
        row.append(make("td", { className: "number quiet" }, place < 0 ? "–" : maps.high[place].toFixed(3)));
      }
      row.name_ = name;
      body.append(row);
    }
    table.append(body);
    table.refresh = () => {
      if (!one.truth) return;
      const [height, width] = one.truth.size;
      for (const row of body.children) {
        const truth = trueMask(one, row.name_, height, width);
        for (const cell of row.querySelectorAll(".now")) {
          const mask = truth && maskOf(one, Number(cell.dataset.column), row.name_, height, width);
          cell.textContent = mask ? percent(iou(mask, truth)) : "–";
        }
      }
    };
    return make("div", { className: "scroll" }, table);
  }

  function facts(one) {
    const box = make("div", {});
    for (const column of visibleColumns()) {
      const { frequencies, opinions, ...rest } = one.columns[column]?.facts ?? {};
      const lines = flat(rest);
      if (!lines.length) continue;
      const table = make("table", {}, ...lines.map(([name, value]) =>
        make("tr", {}, make("th", { scope: "row" }, name), make("td", { className: "number" }, value))));
      box.append(make("h3", {}, data.columns[column].label), make("div", { className: "scroll" }, table));
    }
    return box.childElementCount ? box : null;
  }

  function flat(value, name = "") {
    if (value === null || typeof value !== "object") return [[name, String(value)]];
    if (Array.isArray(value) && value.every((part) => typeof part !== "object")) {
      return [[name, value.join(", ")]];
    }
    return Object.entries(value).flatMap(([key, part]) => flat(part, name ? `${name} · ${key}` : key));
  }

  // ---------------------------------------------------------------- controls

  function options(select, pairs) {
    select.replaceChildren(...pairs.map(([value, text]) => make("option", { value }, text)));
  }

  function setUp() {
    options(byId("sort"), [...orders.map(([text], n) => [n, text]), ["name", "name"]]);
    state.sort = orders.length ? 0 : "name";
    const counts = new Map();
    index.labels.forEach((labels, i) => {
      for (const label of new Set([...labels, ...index.shown[i]])) counts.set(label, (counts.get(label) ?? 0) + 1);
    });
    const classes = [...counts].sort((a, b) => (nameOf(a[0]) < nameOf(b[0]) ? -1 : 1));
    options(byId("class"), [["", "all"], ...classes.map(([name, times]) => [name, `${nameOf(name)} (${times})`])]);
    byId("class").parentElement.hidden = !classes.length;
    options(byId("colours"), Object.keys(data.colourMaps).map((name) => [name, name === "jet" ? "jet, as the paper" : name]));
    const methods = byId("methods");
    data.columns.forEach((column, c) => {
      const box = make("input", { type: "checkbox", checked: true });
      box.onchange = () => {
        state.hidden[box.checked ? "delete" : "add"](c);
        if (!visibleColumns().length) {
          state.hidden.delete(c);
          box.checked = true;
        }
        refillKeeping();
      };
      methods.append(make("label", { className: "check" }, box, column.label));
    });
    methods.hidden = data.columns.length < 2;

    byId("sort").onchange = (event) => {
      state.sort = event.target.value;
      state.page = 0;
      refill();
    };
    byId("class").onchange = (event) => (location.hash = event.target.value === "" ? "" : `class=${event.target.value}`);
    byId("find").oninput = (event) => {
      state.find = event.target.value;
      state.page = 0;
      refill();
    };
    for (const radio of document.querySelectorAll("[name=layer]")) radio.onchange = () => setLayer(radio.value);
    byId("opacity").oninput = (event) => {
      state.opacity = Number(event.target.value);
      showNumbers();
      redraw();
    };
    byId("threshold").oninput = (event) => setThreshold(Number(event.target.value));
    byId("own-threshold").onclick = () => setThreshold(null);
    for (const name of ["predicted", "true"]) {
      byId(name).onchange = (event) => {
        state[name] = event.target.checked;
        redraw();
      };
    }
    byId("colours").onchange = (event) => {
      state.colours = event.target.value;
      redraw();
    };
    byId("previous").onclick = () => turnPage(-1);
    byId("next").onclick = () => turnPage(1);
    byId("detail-previous").onclick = () => show(state.open - 1);
    byId("detail-next").onclick = () => show(state.open + 1);
    byId("detail-close").onclick = () => byId("detail").close();
    byId("detail").onclose = () => {
      byId("tools").append(byId("showing"));
      const place = state.open;
      state.open = null;
      if (Math.floor(place / data.page) !== state.page) {
        state.page = Math.floor(place / data.page);
        fill();
      } else byId("gallery").children[place - state.page * data.page]?.focus();
      redraw();
    };
    byId("help").onclick = () => byId("keys").showModal();
    byId("theme").onclick = () => {
      const next = { "": "dark", dark: "light", light: "" }[document.documentElement.dataset.theme ?? ""];
      document.documentElement.dataset.theme = next;
    };
    document.addEventListener("keydown", onKey);
    window.addEventListener("hashchange", fromHash);
    window.addEventListener("resize", redraw);
    setThreshold(null);
  }

  async function fitControls() {
    const first = await page(0);
    extremes();
    const has = (part) => first.some((one) => one.columns.some((entry) => entry?.[part]));
    const truth = first.some((one) => one.truth);
    const drawn = has("maps") || has("labels") || has("masks");
    byId("layer").hidden = byId("opacity").parentElement.hidden = !drawn;
    byId("threshold").parentElement.hidden = byId("own-threshold").hidden = !has("maps");
    byId("predicted").parentElement.hidden = !has("maps") && !has("masks");
    byId("true").parentElement.hidden = !truth;
    byId("colours").parentElement.hidden = !has("maps") && !has("labels");
    if (has("labels") && !has("maps")) {
      options(byId("colours"), [["safe", "for the colour-blind"], ["own", "the data set's"]]);
      byId("colours").onchange = (event) => {
        state.palette = event.target.value;
        refillKeeping();
      };
    }
  }

  function refillKeeping() {
    fill();
    if (state.open !== null) show(state.open);
  }

  function setLayer(layer) {
    state.layer = layer;
    for (const radio of document.querySelectorAll("[name=layer]")) radio.checked = radio.value === layer;
    redraw();
  }

  function setThreshold(value) {
    state.threshold = value === null ? null : Math.min(Math.max(value, 0), 1);
    showNumbers();
    redraw();
  }

  function showNumbers() {
    const own = data.columns[visibleColumns()[0] ?? 0].threshold;
    byId("opacity").nextElementSibling.textContent = state.opacity.toFixed(2);
    byId("threshold").value = state.threshold ?? own;
    byId("threshold").nextElementSibling.textContent = (state.threshold ?? own).toFixed(2);
    byId("own-threshold").disabled = state.threshold === null;
  }

  function fromHash() {
    const found = /^#class=(-?\d+)$/.exec(location.hash);
    const wanted = found && Number(found[1]) in data.classes ? Number(found[1]) : null;
    if (!found && location.hash.length > 1) return; // another part of the page
    state.class = wanted;
    state.page = 0;
    state.picked.clear();
    byId("class").value = wanted ?? "";
    refill().then(() => found && byId("images").scrollIntoView());
  }

  function onKey(event) {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    const target = event.target, typing = target.matches?.("input:not([type=checkbox]):not([type=radio]), select");
    if (byId("keys").open) return;
    if (typing) {
      if (event.key === "Escape") target.blur();
      return;
    }
    const large = state.open !== null;
    const acts = {
      ArrowLeft: () => (large ? show(state.open - 1) : turnPage(-1)),
      ArrowRight: () => (large ? show(state.open + 1) : turnPage(1)),
      "[": () => large && step(-1),
      "]": () => large && step(1),
      1: () => setLayer("map"),
      2: () => setLayer("mask"),
      3: () => setLayer("none"),
      "-": () => nudge(-0.025),
      "+": () => nudge(0.025),
      "=": () => nudge(0.025),
      p: () => byId("predicted").click(),
      t: () => byId("true").click(),
      "/": () => !large && byId("find").focus(),
      "?": () => byId("keys").showModal(),
    };
    if (target.matches?.("[type=radio]") && event.key.startsWith("Arrow")) return;
    const act = acts[event.key];
    if (!act) return;
    event.preventDefault();
    act();
  }

  const nudge = (by) => setThreshold((state.threshold ?? data.columns[visibleColumns()[0]].threshold) + by);

  async function step(by) {
    const one = await item(state.list[state.open]), names = namesOf(one);
    if (names.length) pick(one, names[(names.indexOf(nameFor(one)) + by + names.length) % names.length]);
  }

  setUp();
  fitControls();
  fromHash();
  if (!state.list.length && !/^#class=/.test(location.hash)) refill();
  return { receive, item, mapOf, maskOf, trueMask, nameFor, state };
})();
