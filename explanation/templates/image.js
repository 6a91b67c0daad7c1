"use strict";
(async () => {
  const page = JSON.parse(document.getElementById("data").textContent);
  const {width, height, stride, offset, classes, prototypes, weights} = page;
  const [rows, columns] = page.grid;
  const why = document.querySelector(".why");
  const canvas = document.getElementById("overlay");
  const cross = document.getElementById("cross");
  if (!("DecompressionStream" in window)) {
    why.textContent = "This browser is too old to unpack the page's data.";
    return;
  }

  // --- unpacking; pixel_data.py describes the encoding

  async function inflate(text) {
    const packed = Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0));
    const stream = new Blob([packed]).stream().pipeThrough(new DecompressionStream("deflate"));
    return new Uint8Array(await new Response(stream).arrayBuffer());
  }

  // blocks: [planes, rows, columns] each; their numbers one after the other, in four times as many bytes
  function unfold(bytes, blocks) {
    const count = blocks.reduce((sum, [planes, rows, columns]) => sum + planes * rows * columns, 0);
    const numbers = new Int32Array(count);
    let at = 0;
    for (const [planes, rows, columns] of blocks) {
      for (let i = 0; i < planes * rows * columns; i++, at++) {
        const column = i % columns, row = Math.floor(i / columns) % rows;
        const left = column ? numbers[at - 1] : 0, above = row ? numbers[at - columns] : 0;
        const corner = row && column ? numbers[at - columns - 1] : 0;
        const guess = Math.max(Math.min(left, above), Math.min(Math.max(left, above), left + above - corner));
        const folded = bytes[at] | bytes[count + at] << 8 | bytes[2 * count + at] << 16 | bytes[3 * count + at] << 24;
        numbers[at] = ((folded >>> 1) ^ -(folded & 1)) + guess;
      }
    }
    return numbers;
  }

  const scoreBytes = await inflate(page.scores);
  const scoreNumbers = unfold(scoreBytes, [[classes.length, rows, columns]]);
  const [prediction, truth] = [0, 1].map((which) => {
    const start = 4 * scoreNumbers.length + which * width * height;
    const labels = scoreBytes.slice(start, start + width * height);
    for (let i = width; i < labels.length; i++) labels[i] += labels[i - width];
    return labels;
  });

  const tilesAcross = Math.ceil(Math.max(1, columns - 1) / page.tileSide);
  const end = (start, length) => Math.min(start + page.tileSide + 1, length);
  let start = 0;
  const tiles = page.tiles.map((kept, t) => {
    const top = Math.floor(t / tilesAcross) * page.tileSide, left = (t % tilesAcross) * page.tileSide;
    const tile = {kept, top, left, rows: end(top, rows) - top, columns: end(left, columns) - left, start};
    start += kept.length * tile.rows * tile.columns;
    return tile;
  });
  const activationNumbers = page.activations
    ? unfold(await inflate(page.activations), tiles.map((tile) => [tile.kept.length, tile.rows, tile.columns])) : [];

  // --- a pixel: every value is the mean of four cells, weighted by how near they are

  function mean(numbers, start, width, square) {
    let sum = 0;
    for (const [row, column, weight] of square) {
      if (weight) sum += weight * numbers[start + row * width + column];
    }
    return sum;
  }

  // along a side: the cell before a pixel, and how far the pixel is on the way to the next; beyond the outermost
  // centres (where there is an offset) it is at them
  function between(pixel, cells) {
    const place = Math.max(0, Math.min(cells - 1, (pixel - offset) / stride));
    const cell = Math.min(Math.floor(place), Math.max(cells - 2, 0));
    return [cell, place - cell];
  }

  function explain(x, y) {
    const [row, down] = between(y, rows), [column, right] = between(x, columns);
    const square = [
      [row, column, (1 - down) * (1 - right)], [row, column + 1, (1 - down) * right],
      [row + 1, column, down * (1 - right)], [row + 1, column + 1, down * right],
    ];
    const scores = classes.map((_, c) => page.scoreStep * mean(scoreNumbers, c * rows * columns, columns, square));
    const tile = tiles[Math.floor(row / page.tileSide) * tilesAcross + Math.floor(column / page.tileSide)];
    const similarities = !tile ? [] : tile.kept.map((p, k) => {
      const first = tile.start + (k * tile.rows - tile.top) * tile.columns - tile.left; // of cell (0, 0), were it here
      return [p, page.activationSteps[p] * mean(activationNumbers, first, tile.columns, square)];
    });
    return {scores, similarities};
  }

  // --- the panel

  let kept = {x: width >> 1, y: height >> 1}; // the pixel that stays when the mouse leaves
  let shown = kept;
  let chosen = null; // the class whose score is taken apart; null: the predicted one
  let showsAllClasses = false, showsAllParts = false;

  const round = (value) => Math.round(value * 1000) / 1000;
  const signed = (value, digits = 3) => (Math.abs(value) < .5 / 10 ** digits ? 0 : value).toFixed(digits).replace("-", "−");
  const withSign = (value) => (value >= .0005 ? "+" : "") + signed(value);

  function element(tag, properties = {}, ...children) {
    const made = Object.assign(document.createElement(tag), properties);
    made.append(...children);
    return made;
  }
  const swatch = (c) => element("i", {className: `swatch c${c}`});
  const className = (c) => element("bdi", {textContent: classes[c]});
  const button = (text, onclick) => element("button", {type: "button", className: "plain", textContent: text, onclick});

  function scoreList(scores, current) {
    const order = scores.map((_, c) => c).sort((a, b) => scores[b] - scores[a]);
    const list = element("ul", {className: "score"});
    order.forEach((c, place) => {
      if (!showsAllClasses && place > 3 && c !== current) return;
      const choose = element("button", {type: "button", onclick: () => { chosen = chosen === c ? null : c; show(); }},
        element("span", {}, swatch(c), className(c)), element("span", {className: "number", textContent: signed(scores[c])}));
      choose.dataset.class = c;
      choose.setAttribute("aria-pressed", c === current);
      list.append(element("li", {}, choose));
    });
    return list;
  }

  function part(p, c, similarity, value, largest) {
    const {source, picture, index} = prototypes[p];
    const face = picture ? element("img", {src: picture, alt: "", width: 44, height: 44})
      : element("span", {className: `blank c${index}`});
    const bar = element("span", {className: value < 0 ? "bar negative" : "bar"});
    bar.style.width = `${Math.max(1, 100 * Math.abs(value) / largest)}%`;
    const item = element("li", {}, element("a", {href: `index.html#p${p}`, title: source, tabIndex: -1}, face),
      element("div", {}, element("a", {href: `index.html#p${p}`, title: source}, className(index), ` ${p}`),
        element("small", {textContent: `similarity ${signed(similarity)} × weight ${signed(weights[c][p])}`}), bar),
      element("span", {className: "number", textContent: withSign(value)}));
    item.dataset.prototype = p;
    return item;
  }

  // The 6 that add most and the 2 that take most; all the others, kept in the page or not, in one line. What is
  // shown adds up to the last digit: the rounding errors are in that line, too.
  function partList(scores, similarities, c) {
    const parts = similarities.map(([p, similarity]) => ({p, similarity, value: weights[c][p] * similarity}));
    parts.sort((a, b) => b.value - a.value);
    const visible = parts.filter(({value}, place) => place === 0 || Math.abs(value) >= .0005);
    const adding = visible.filter(({value}) => value > 0).length;
    const some = visible.filter((_, place) => showsAllParts || place < Math.max(1, Math.min(6, adding))
      || (place >= adding && place >= visible.length - 2));
    const largest = Math.max(...some.map(({value}) => Math.abs(value)), 1e-9);
    const list = element("ul", {className: "parts"},
      ...some.map(({p, similarity, value}) => part(p, c, similarity, value, largest)));
    const others = prototypes.length - some.length;
    const rest = round(scores[c]) - some.reduce((sum, {value}) => sum + round(value), 0);
    if (others) {
      list.append(element("li", {className: "rest"}, element("span", {textContent: others === 1 ? "1 other prototype"
        : `${others} other prototypes together`}), element("span", {className: "number", textContent: withSign(rest)})));
    }
    list.append(element("li", {className: "sum"}, element("span", {}, "Score of ", className(c)),
      element("span", {className: "number", textContent: signed(scores[c])})));
    const more = visible.length > some.length || showsAllParts;
    return [list, more ? button(showsAllParts ? "Show the strongest only" : `Show ${visible.length} prototypes one by one`,
      () => { showsAllParts = !showsAllParts; show(); }) : ""];
  }

  function show() {
    const {x, y} = shown, at = y * width + x;
    const {scores, similarities} = explain(x, y);
    const predicted = prediction[at], current = chosen ?? predicted;
    const verdict = truth[at] === 255 ? "" : truth[at] === predicted ? "correct" : "labelled ";
    cross.hidden = false;
    cross.style.left = `${100 * (x + .5) / width}%`;
    cross.style.top = `${100 * (y + .5) / height}%`;
    cross.className = shown === kept ? "" : "preview";
    const link = element("a", {href: `#x=${x},y=${y}`, textContent: `x ${x}, y ${y}`, title: "A link to this pixel"});
    const focused = document.activeElement?.dataset.class;
    why.replaceChildren(
      element("h2", {}, swatch(predicted), className(predicted)),
      element("p", {className: "facts"}, "at ", link, verdict ? " · " + verdict : "",
        ...(verdict === "labelled " ? [className(truth[at])] : [])),
      element("h3", {}, "Class scores"), scoreList(scores, current));
    if (classes.length > 5) {
      why.append(button(showsAllClasses ? "Show the best only" : `Show all ${classes.length} classes`,
        () => { showsAllClasses = !showsAllClasses; show(); }));
    }
    if (prototypes.length) {
      why.append(element("h3", {}, element("span", {}, "What makes the score of ", className(current))),
        ...partList(scores, similarities, current));
    }
    why.removeAttribute("aria-busy");
    if (focused !== undefined) why.querySelector(`[data-class="${focused}"]`)?.focus();
    Object.assign(why.dataset, {x, y, predicted});
  }

  function move(x, y, keeps) {
    shown = {x: Math.max(0, Math.min(width - 1, x)), y: Math.max(0, Math.min(height - 1, y))};
    if (keeps) {
      kept = shown;
      history.replaceState(null, "", `#x=${kept.x},y=${kept.y}`);
    }
    show();
  }

  function moveToLink() {
    const found = /^#x=(\d{1,6}),y=(\d{1,6})$/.exec(location.hash);
    if (found) move(+found[1], +found[2], true);
    else show();
  }

  function pixelOf(event) {
    const box = canvas.getBoundingClientRect();
    return [Math.floor((event.clientX - box.left) / box.width * width), Math.floor((event.clientY - box.top) / box.height * height)];
  }
  canvas.addEventListener("pointermove", (event) => { if (event.pointerType === "mouse") move(...pixelOf(event), false); });
  canvas.addEventListener("pointerleave", () => { shown = kept; show(); });
  canvas.addEventListener("click", (event) => move(...pixelOf(event), true));
  canvas.addEventListener("keydown", (event) => {
    const [dx, dy] = {ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1]}[event.key] ?? [0, 0];
    if (!dx && !dy) return;
    event.preventDefault();
    const far = event.shiftKey ? stride : 1;
    move(kept.x + dx * far, kept.y + dy * far, true);
  });
  addEventListener("hashchange", moveToLink);

  // --- what lies over the photograph

  function paint(layer) {
    const context = canvas.getContext("2d"), image = context.createImageData(width, height);
    const colors = page.palette.map(([r, g, b]) => r | g << 8 | b << 16);
    const pixels = new Uint32Array(image.data.buffer); // bytes r, g, b, alpha: every browser's machine is little-endian
    for (let i = 0; i < pixels.length; i++) {
      const [label, isKnown] = layer === "truth" ? [truth[i], truth[i] !== 255] : [prediction[i], layer === "prediction"];
      if (isKnown) pixels[i] = colors[label] | 150 << 24;
      else if (layer === "errors" && truth[i] !== 255) {
        pixels[i] = truth[i] === prediction[i] ? 0xa0ffffff : 0xf02010e0; // right: veiled, wrong: red
      }
    }
    context.putImageData(image, 0, 0);
  }
  for (const input of document.querySelectorAll(".layers input")) {
    input.addEventListener("change", () => paint(input.value));
    if (input.checked) paint(input.value);
  }
  moveToLink();
})();
