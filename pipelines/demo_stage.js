// Copyright 2026 The gpstoken-hf authors. Licensed under the Apache License, Version 2.0.
//
// The pictures of the page: panels with Gaussians over them, one of which the visitor edits and paints on.
//
// Gradio runs this with `element`, `props`, `trigger` and `watch`. `props.value` is a patch of pipelines/demo_state.py;
// `shown` holds all patches merged. What the visitor does goes back as the events 'edit', 'undo', 'paint', 'download'.

const SVG = "http://www.w3.org/2000/svg";
const MIN_RADIUS_PX = 0.5, EDGE = 1e-3, ANSWER_MS = 60000, CANVAS_SIDE = 512;
const PANELS = {
  photo: [
    { id: "edit", title: "Refined Gaussians", picture: "photo", gaussians: "refined" },
    { id: "decoded", title: "Reconstruction", picture: "decoded" },
    { id: "initial", title: "Initial Gaussians", picture: "photo", gaussians: "initial" },
    { id: "error", title: "Error", picture: "error_map" },
  ],
  draft: [
    { id: "edit", title: "Layout", gaussians: "initial" },
    { id: "decoded", title: "Image", picture: "decoded" },
    { id: "refined", title: "Refined Gaussians", picture: "decoded", gaussians: "refined" },
  ],
}[props.kind];
const EDITED = PANELS[0].gaussians;
const CAN_PAINT = props.kind === "photo";

const shown = {};
let selected = null, gesture = null, mode = "move", backdrop = "photo", stroke = null;
const waiting = {};
let inFlight = false, timer = null;

// ---- What the page consists of

function make(tag, attributes = {}, parent = null, text = null) {
  const node = tag.startsWith("svg:") ? document.createElementNS(SVG, tag.slice(4)) : document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  if (text !== null) node.textContent = text;
  if (parent) parent.append(node);
  return node;
}

const root = element.querySelector(".gps-stage");
root.dataset.kind = props.kind;
const line = make("p", { class: "gps-line", role: "status" }, root, props.hint);
const tools = make("div", { class: "gps-tools", hidden: "" }, root);
const grid = make("div", { class: "gps-grid", hidden: "" }, root);
const parts = {};

for (const panel of PANELS) {
  const figure = make("figure", { "data-panel": panel.id }, grid);
  const caption = make("figcaption", {}, figure);
  make("strong", {}, caption, panel.title);
  const note = make("span", { class: "gps-note" }, caption);
  const frame = make("div", { class: "gps-frame" }, figure);
  const picture = make("img", { alt: panel.title, draggable: "false" }, frame);
  const overlay = make("svg:svg", { preserveAspectRatio: "none" }, frame);
  parts[panel.id] = { ...panel, figure, note, frame, image: picture, overlay };
}
const editor = parts.edit;
editor.overlay.setAttribute("tabindex", "0");
editor.overlay.setAttribute("role", "application");
editor.overlay.setAttribute("aria-label", "Gaussians: drag one, or select it and use the arrow keys, + - [ ]");
editor.overlay.classList.add("gps-editor");
const canvas = make("canvas", { class: "gps-paint" }, editor.frame);

function button(text, action, attributes = {}) {
  const node = make("button", { type: "button", ...attributes }, tools, text);
  node.addEventListener("click", action);
  return node;
}

function setMode(next) {
  mode = next;
  editor.frame.dataset.mode = mode;
  for (const node of tools.querySelectorAll("[data-mode]")) {
    node.setAttribute("aria-pressed", String(node.dataset.mode === mode));
  }
  if (mode !== "move") select(null);
}

let brush = null;
if (CAN_PAINT) {
  for (const [name, text] of [["move", "Move Gaussians"], ["paint", "Paint importance"], ["erase", "Erase"]]) {
    button(text, () => setMode(name), { "data-mode": name });
  }
  const label = make("label", {}, tools, "Brush ");
  brush = make("input", { type: "range", min: "4", max: "40", value: "14", "aria-label": "Brush size" }, label);
  button("Clear paint", clearPaint, { "data-action": "clear" });
  button("Over the reconstruction", (event) => {
    backdrop = backdrop === "photo" ? "decoded" : "photo";
    event.target.textContent = backdrop === "photo" ? "Over the reconstruction" : "Over the photograph";
    draw();
  }, { "data-action": "backdrop" });
}
const undo = button("Undo edits", () => { select(null); send("undo", {}); }, { "data-action": "undo" });
if (CAN_PAINT) {
  button("Download tokens", () => send("download", { suffix: ".safetensors" }), { "data-action": "download" });
  button("as .gpst", () => send("download", { suffix: ".gpst" }), { "data-action": "download-gpst" });
}

// ---- Talking to the server: one event at a time, and of each kind only the last

function send(kind, data) {
  if (inFlight) { waiting[kind] = data; return; }
  inFlight = true;
  root.dataset.busy = "true";
  timer = setTimeout(answered, ANSWER_MS);
  if (kind === "edit") trigger("edit", data);
  if (kind === "undo") trigger("undo", data);
  if (kind === "paint") trigger("paint", data);
  if (kind === "download") trigger("download", data);
}

function answered() {
  clearTimeout(timer);
  inFlight = false;
  root.dataset.busy = "false";
  const [kind] = Object.keys(waiting);
  if (kind === undefined) return;
  const data = waiting[kind];
  delete waiting[kind];
  send(kind, data);
}

function take(patch) {
  if (!patch || patch.serial === shown.serial) return;
  const local = selected !== null && (gesture || "edit" in waiting) ? shown[EDITED][selected] : null;
  Object.assign(shown, patch, { download: null });
  if (local && shown[EDITED][selected]) shown[EDITED][selected] = local;
  if (selected !== null && !(shown[EDITED] || [])[selected]) selected = null;
  if (patch.painted === false) wipe();
  if (patch.download) save(patch.download);
  root.dataset.serial = patch.serial;
  draw();
  answered();
}

function save({ name, data }) {
  const bytes = Uint8Array.from(atob(data), (character) => character.charCodeAt(0));
  const address = URL.createObjectURL(new Blob([bytes], { type: "application/octet-stream" }));
  make("a", { href: address, download: name }).click();
  setTimeout(() => URL.revokeObjectURL(address), 10000);
}

// ---- Gaussians as ellipses, in pixels of the image

function unit() {
  const corners = shown.align_corners ? 1 : 0;
  return [Math.max(shown.width - corners, 1) / 2, Math.max(shown.height - corners, 1) / 2];
}

function ellipseOf([sigmaX, sigmaY, rho, muX, muY]) {
  const [ux, uy] = unit();
  const sx = sigmaX * ux, sy = sigmaY * uy, cross = rho * sx * sy;
  const mean = (sx * sx + sy * sy) / 2, half = (sx * sx - sy * sy) / 2;
  const root_ = Math.hypot(half, cross);
  return {
    x: muX * ux + shown.width / 2,
    y: muY * uy + shown.height / 2,
    a: Math.sqrt(Math.max(mean + root_, 0)),
    b: Math.sqrt(Math.max(mean - root_, 0)),
    turn: root_ < 1e-9 ? 0 : Math.atan2(cross, half) / 2,
  };
}

function gaussianOf({ x, y, a, b, turn }) {
  const [ux, uy] = unit(), c = Math.cos(turn), s = Math.sin(turn);
  const sxx = a * a * c * c + b * b * s * s, syy = a * a * s * s + b * b * c * c, sxy = (a * a - b * b) * c * s;
  const clamp = (value, low, high) => Math.min(Math.max(value, low), high);
  return [
    clamp(Math.sqrt(sxx) / ux, EDGE, 1 - EDGE),
    clamp(Math.sqrt(syy) / uy, EDGE, 1 - EDGE),
    clamp(sxy / Math.sqrt(sxx * syy), EDGE - 1, 1 - EDGE),
    clamp((x - shown.width / 2) / ux, EDGE - 1, 1 - EDGE),
    clamp((y - shown.height / 2) / uy, EDGE - 1, 1 - EDGE),
  ];
}

function colours(ellipses) {
  const ranks = ellipses.map(({ a, b }) => Math.log(Math.max(a * b, 1e-6)));
  const low = Math.min(...ranks), spread = Math.max(...ranks) - low || 1;
  return ranks.map((rank) => `hsl(${55 + 145 * (rank - low) / spread} 95% ${62 - 8 * (rank - low) / spread}%)`);
}

function place(node, { x, y, a, b, turn }) {
  node.setAttribute("rx", Math.max(a, 0.05));
  node.setAttribute("ry", Math.max(b, 0.05));
  node.setAttribute("transform", `translate(${x} ${y}) rotate(${turn * 180 / Math.PI})`);
}

function drawGaussians(part) {
  const list = shown[part.gaussians] || [];
  part.overlay.setAttribute("viewBox", `0 0 ${shown.width} ${shown.height}`);
  const ellipses = list.map(ellipseOf), tint = colours(ellipses);
  const order = ellipses.map((_, index) => index).sort((i, j) => ellipses[j].a * ellipses[j].b - ellipses[i].a * ellipses[i].b);
  part.overlay.replaceChildren();
  for (const index of order) {
    const node = make("svg:ellipse", { "data-index": index, stroke: tint[index], fill: tint[index] }, part.overlay);
    place(node, ellipses[index]);
    if (part === editor && index === selected) node.classList.add("gps-selected");
  }
  if (part === editor && selected !== null) {
    part.overlay.append(part.overlay.querySelector(`[data-index="${selected}"]`));
    drawHandles(gesture ? gesture.now : ellipses[selected]);
  }
}

function drawHandles({ x, y, a, b, turn }) {
  const pixel = shown.width / Math.max(editor.overlay.clientWidth, 1);
  // Outside the ellipse, so that a small one can still be grabbed.
  const c = Math.cos(turn), s = Math.sin(turn), alongA = a + 10 * pixel, alongB = b + 10 * pixel, far = a + 32 * pixel;
  make("svg:line", { x1: x, y1: y, x2: x + far * c, y2: y + far * s, class: "gps-arm" }, editor.overlay);
  const side = 9 * pixel;
  for (const [name, hx, hy] of [["major", x + alongA * c, y + alongA * s], ["minor", x - alongB * s, y + alongB * c]]) {
    make("svg:rect", {
      "data-handle": name, class: "gps-handle", x: hx - side / 2, y: hy - side / 2, width: side, height: side,
      transform: `rotate(${turn * 180 / Math.PI} ${hx} ${hy})`,
    }, editor.overlay);
  }
  make("svg:circle", {
    "data-handle": "turn", class: "gps-handle", cx: x + far * c, cy: y + far * s, r: 6 * pixel,
  }, editor.overlay);
}

function draw() {
  const ready = Boolean(shown.width);
  tools.hidden = grid.hidden = !ready;
  line.classList.toggle("gps-problem", Boolean(shown.problem));
  line.textContent = shown.problem || shown.message || props.hint;
  if (!ready) return;
  undo.disabled = !shown.edited;
  for (const part of Object.values(parts)) {
    let address = part.picture ? shown[part.picture] : null;
    if (part === editor && CAN_PAINT && (backdrop === "decoded" || !address)) address = shown.decoded;
    if (part.id === "initial" && CAN_PAINT && !address) address = shown.decoded;
    part.figure.hidden = part !== editor && !address;
    part.frame.style.aspectRatio = `${shown.width} / ${shown.height}`;
    if (address) { if (part.image.src !== address) part.image.src = address; } else part.image.removeAttribute("src");
    part.image.classList.toggle("gps-pixels", shown.width <= 64);
    if (part.gaussians) drawGaussians(part);
  }
  parts.decoded.note.textContent = shown.score || "";
  if (parts.error) parts.error.note.textContent = shown.error_scale ? `0 to ${shown.error_scale} of 255 levels` : "";
  editor.note.textContent = selected === null ? "drag, resize or turn one" : `token ${selected}`;
  const factor = CANVAS_SIDE / Math.max(shown.width, shown.height);
  const [w, h] = [Math.round(shown.width * factor), Math.round(shown.height * factor)];
  if (CAN_PAINT && (canvas.width !== w || canvas.height !== h)) { canvas.width = w; canvas.height = h; }
}

// ---- Editing

function select(index) {
  selected = index;
  if (shown.width) draw();
}

function position(event) {
  const box = editor.overlay.getBoundingClientRect();
  return [
    (event.clientX - box.left) / box.width * shown.width, (event.clientY - box.top) / box.height * shown.height,
  ];
}

function change(now) {
  shown[EDITED][selected] = gaussianOf(now);
  drawGaussians(editor);
  send("edit", { index: selected, gaussian: shown[EDITED][selected] });
}

editor.overlay.addEventListener("pointerdown", (event) => {
  if (mode !== "move" || event.button > 0) return;
  const handle = event.target.dataset.handle, index = event.target.dataset.index;
  if (handle === undefined && index === undefined) { select(null); return; }
  event.preventDefault();
  editor.overlay.focus({ preventScroll: true });
  if (handle === undefined) select(Number(index));
  const start = ellipseOf(shown[EDITED][selected]);
  gesture = { kind: handle || "move", from: position(event), start, now: start };
  editor.overlay.setPointerCapture(event.pointerId);
});

editor.overlay.addEventListener("pointermove", (event) => {
  if (!gesture) return;
  const [px, py] = position(event), { start, from } = gesture;
  const now = { ...start };
  if (gesture.kind === "move") { now.x += px - from[0]; now.y += py - from[1]; }
  const c = Math.cos(start.turn), s = Math.sin(start.turn), dx = px - from[0], dy = py - from[1];
  if (gesture.kind === "major") now.a = Math.max(start.a + dx * c + dy * s, MIN_RADIUS_PX);
  if (gesture.kind === "minor") now.b = Math.max(start.b + dy * c - dx * s, MIN_RADIUS_PX);
  if (gesture.kind === "turn") now.turn = Math.atan2(py - start.y, px - start.x);
  gesture.now = now;
  change(now);
});

for (const end of ["pointerup", "pointercancel"]) {
  editor.overlay.addEventListener(end, () => {
    if (!gesture) return;
    gesture = null;
    draw();
  });
}

editor.overlay.addEventListener("keydown", (event) => {
  if (selected === null) return;
  const now = ellipseOf(shown[EDITED][selected]);
  const keys = {
    ArrowLeft: () => { now.x -= 1; }, ArrowRight: () => { now.x += 1; },
    ArrowUp: () => { now.y -= 1; }, ArrowDown: () => { now.y += 1; },
    "+": () => { now.a *= 1.1; now.b *= 1.1; }, "-": () => { now.a /= 1.1; now.b /= 1.1; },
    "[": () => { now.turn -= Math.PI / 24; }, "]": () => { now.turn += Math.PI / 24; },
  };
  if (event.key === "Escape") { select(null); return; }
  if (!(event.key in keys)) return;
  event.preventDefault();
  keys[event.key]();
  now.a = Math.max(now.a, MIN_RADIUS_PX);
  now.b = Math.max(now.b, MIN_RADIUS_PX);
  change(now);
});

// ---- Painting importance

function wipe() {
  canvas.getContext("2d").clearRect(0, 0, canvas.width, canvas.height);
}

function clearPaint() {
  wipe();
  send("paint", { mask: null });
}

function dab(event) {
  const box = canvas.getBoundingClientRect(), pen = canvas.getContext("2d");
  const x = (event.clientX - box.left) / box.width * canvas.width;
  const y = (event.clientY - box.top) / box.height * canvas.height;
  pen.globalCompositeOperation = mode === "erase" ? "destination-out" : "source-over";
  pen.strokeStyle = "rgb(236, 72, 153)";
  pen.lineCap = "round";
  pen.lineWidth = 2 * Number(brush.value);
  pen.beginPath();
  pen.moveTo(stroke ? stroke[0] : x, stroke ? stroke[1] : y);
  pen.lineTo(x, y);
  pen.stroke();
  stroke = [x, y];
}

canvas.addEventListener("pointerdown", (event) => {
  if (event.button > 0) return;
  event.preventDefault();
  canvas.setPointerCapture(event.pointerId);
  stroke = null;
  dab(event);
});
canvas.addEventListener("pointermove", (event) => { if (stroke) dab(event); });
for (const end of ["pointerup", "pointercancel"]) {
  canvas.addEventListener(end, () => {
    if (!stroke) return;
    stroke = null;
    send("paint", { mask: canvas.toDataURL("image/png") });
  });
}

new ResizeObserver(() => { if (shown.width && selected !== null && !gesture) drawGaussians(editor); }).observe(editor.frame);
setMode("move");
take(props.value);
watch("value", () => take(props.value));
