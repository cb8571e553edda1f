"""The page of a heat map: canvases that wrap to the window, a track of means, and the variant under the pointer."""

from string import Template

PAGE = Template("""\
<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width">
<title>$title</title>
<style>
  body { margin: 0; font: 14px sans-serif; color: #222 }
  header { position: sticky; top: 0; background: #fff; border-bottom: 1px solid #ccc; padding: 8px 12px; z-index: 1 }
  h1 { font-size: 16px; margin: 0; overflow-wrap: anywhere } p { margin: 2px 0; color: #555; overflow-wrap: anywhere }
  output { display: block; min-height: 1.3em; font-weight: bold; font-variant-numeric: tabular-nums }
  main { padding: 8px 12px } canvas { display: block; margin-bottom: 14px }
  #scale { display: flex; align-items: center; gap: 6px; font-size: 12px } #scale canvas { margin: 0 }
</style>
<header>
  <h1>$title</h1>
  <p>$by; $residues residues. Below 0: less likely than the wild type, which has a dot. Bars: the mean of a residue.</p>
  <div id="scale"><span></span><canvas width="200" height="10"></canvas><span></span></div>
  <output>Point at a cell.</output>
</header>
<main></main>
<script>
const {protein, order, scores, means, limit, stops} = $data;
const cell = 12, left = 22, track = 30, ruler = 28, height = track + 20 * cell + ruler;
const shown = document.querySelector("output"), main = document.querySelector("main");
const lowest = Math.min(0, ...means), highest = Math.max(0, ...means), span = highest - lowest || 1;
function color(score) {
  const at = (Math.max(-1, Math.min(1, score / limit)) + 1) / 2 * (stops.length - 1);
  const i = Math.min(stops.length - 2, Math.floor(at)), share = at - i;
  return "rgb(" + stops[i].map((low, k) => Math.round(low + share * (stops[i + 1][k] - low))).join() + ")";
}
function drawLine(canvas, start, count) {
  const pen = canvas.getContext("2d"), across = i => left + (i - start) * cell, down = row => track + row * cell;
  pen.font = "10px monospace"; pen.textAlign = "center"; pen.textBaseline = "middle";
  for (let row = 0; row < 20; row++) {
    pen.fillStyle = "#222"; pen.fillText(order[row], left / 2, down(row) + cell / 2);
    for (let i = start; i < start + count; i++) {
      pen.fillStyle = color(scores[row][i]); pen.fillRect(across(i), down(row), cell - 0.5, cell - 0.5);
      if (order[row] === protein[i]) {
        pen.fillStyle = "#000"; pen.beginPath();
        pen.arc(across(i) + cell / 2, down(row) + cell / 2, 2, 0, 7); pen.fill();
      }
    }
  }
  for (let i = start; i < start + count; i++) {
    const place = mean => track - 4 - (mean - lowest) / span * (track - 6), zero = place(0), top = place(means[i]);
    pen.fillStyle = "#555"; pen.fillRect(across(i), Math.min(zero, top), cell - 1, Math.max(1, Math.abs(top - zero)));
    pen.fillStyle = "#222"; pen.fillText(protein[i], across(i) + cell / 2, down(20) + 7);
    if ((i + 1) % 10 === 0 || i === start) pen.fillText(i + 1, across(i) + cell / 2, down(20) + 20);
  }
}
let perLine = 0;
function layOut() {
  const fits = Math.max(10, Math.floor((document.body.clientWidth - 24 - left) / cell / 10) * 10);
  if (fits === perLine) return;
  perLine = fits; main.textContent = "";
  for (let start = 0; start < protein.length; start += perLine) {
    const count = Math.min(perLine, protein.length - start), canvas = document.createElement("canvas");
    canvas.width = left + count * cell + 12; canvas.height = height;
    canvas.dataset.start = start; canvas.dataset.count = count;
    main.append(canvas); seen.observe(canvas);
  }
}
// A line is drawn when it comes into view: thousands of residues do not keep anybody waiting.
const seen = new IntersectionObserver(entries => {
  for (const {isIntersecting, target} of entries) if (isIntersecting && !target.dataset.drawn) {
    target.dataset.drawn = 1; drawLine(target, +target.dataset.start, +target.dataset.count);
  }
}, {rootMargin: "600px"});
main.onmousemove = event => {
  if (event.target.tagName !== "CANVAS") return;
  const box = event.target.getBoundingClientRect(), {start, count} = event.target.dataset;
  const i = Math.floor((event.clientX - box.left - left) / cell);
  const row = Math.floor((event.clientY - box.top - track) / cell);
  if (i < 0 || i >= +count) return;
  const at = +start + i, own = protein[at], mean = " (mean of residue " + own + (at + 1) + ": " + means[at] + ")";
  if (row < 0 || row > 19) shown.textContent = own + (at + 1) + mean;
  else if (order[row] === own) shown.textContent = own + (at + 1) + ": the wild type" + mean;
  else shown.textContent = own + (at + 1) + order[row] + ": " + scores[row][at] + mean;
};
const [low, high] = document.querySelectorAll("#scale span"), bar = document.querySelector("#scale canvas");
low.textContent = (-limit).toFixed(1); high.textContent = "+" + limit.toFixed(1);
for (let x = 0; x < 200; x++) {
  const pen = bar.getContext("2d"); pen.fillStyle = color((x / 100 - 1) * limit); pen.fillRect(x, 0, 1, 10);
}
window.onresize = layOut;
layOut();
</script>
""")
