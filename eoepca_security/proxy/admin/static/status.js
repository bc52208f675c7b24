// Keeps the status page up to date. The server always renders it; this script replaces the parts that have changed, and
// shows times in the browser's time zone, relative to the server's clock.
"use strict";

const INTERVAL = 2000;
const PATIENCE = 5000;

// The proxy's clock minus the browser's, which may be off, in milliseconds.
let offset = 0;

function duration(seconds) {
  let left = Math.floor(seconds);
  const parts = [];
  for (const [unit, size] of [["d", 86400], ["h", 3600], ["min", 60], ["s", 1]]) {
    parts.push([Math.floor(left / size), unit]);
    left %= size;
  }
  while (parts.length > 1 && parts[0][0] === 0) parts.shift();
  return parts.slice(0, 2).filter(([number]) => number || parts.length === 1).map((part) => part.join(" ")).join(" ");
}

function relative(seconds) {
  if (Math.abs(seconds) < 1) return "now";
  return seconds > 0 ? `in ${duration(seconds)}` : `${duration(-seconds)} ago`;
}

function moment(at, now) {
  const [then, today] = [new Date(at * 1000), new Date(now * 1000)];
  const sameDay = then.toDateString() === today.toDateString();
  const shown = sameDay ? then.toLocaleTimeString() : then.toLocaleString();
  return `${shown} (${relative(at - now)})`;
}

function showTimes(root) {
  const now = (Date.now() + offset) / 1000;
  for (const element of root.querySelectorAll("[data-at]")) {
    const text = moment(Number(element.dataset.at), now);
    if (element.textContent !== text) element.textContent = text;
  }
}

// Changes only what differs, so that focus and selection stay where they are.
function exchange(old, fresh) {
  if (old.isEqualNode(fresh)) return;
  const isOther = old.nodeName !== fresh.nodeName || old.childNodes.length !== fresh.childNodes.length;
  if (isOther && !old.id) return old.replaceWith(fresh);
  if (old.nodeType === Node.TEXT_NODE) {
    old.data = fresh.data;
    return;
  }
  for (const { name, value } of fresh.attributes) old.setAttribute(name, value);
  if (isOther) old.replaceChildren(...fresh.childNodes);
  else [...fresh.childNodes].forEach((child, index) => exchange(old.childNodes[index], child));
}

function update(text) {
  const fresh = new DOMParser().parseFromString(text, "text/html");
  if (fresh.getElementById("main") === null) throw new Error("the page is from another program");
  offset = Number(fresh.body.dataset.now) * 1000 - Date.now();
  showTimes(document);
  showTimes(fresh);
  document.title = fresh.title;
  for (const id of ["who", "state", "lead", "main", "about"]) exchange(document.getElementById(id), fresh.getElementById(id));
}

let clearing = 0;

async function copy(button) {
  const code = button.parentElement.querySelector("code");
  const copied = document.getElementById("copied");
  try {
    // Browsers offer the clipboard to pages of this machine and over TLS only.
    await navigator.clipboard.writeText(code.textContent);
    copied.textContent = "Copied.";
  } catch {
    getSelection().selectAllChildren(code);
    copied.textContent = "The command is selected: copy it with your keyboard.";
  }
  clearTimeout(clearing);
  clearing = setTimeout(() => copied.replaceChildren(), 5000);
}

let lostSince = null;

function tellLost(reason) {
  lostSince ??= Date.now();
  const lost = document.getElementById("lost");
  if (lost.hidden) {
    const title = document.createElement("strong");
    title.textContent = "The proxy is unreachable";
    const since = new Date(lostSince).toLocaleTimeString();
    lost.replaceChildren(title, `Since ${since} (${reason}). Below is its last known state. Is it still running? This page keeps trying.`);
    lost.hidden = false;
    document.title = "Unreachable - OIDC proxy";
    document.body.classList.add("stale");
  }
}

function tellFound() {
  lostSince = null;
  document.getElementById("lost").hidden = true;
  document.body.classList.remove("stale");
}

async function look() {
  try {
    const response = await fetch("./", { cache: "no-store", signal: AbortSignal.timeout(PATIENCE) });
    if (!response.ok) throw new Error(`it answered ${response.status}`);
    update(await response.text());
    tellFound();
  } catch (error) {
    tellLost(error instanceof TypeError ? "no answer" : error.name === "TimeoutError" ? "no answer in time" : error.message);
  }
  setTimeout(look, INTERVAL);
}

function tick() {
  showTimes(document);
  // Wait for the next whole second of the proxy's clock, so that the times move evenly.
  setTimeout(tick, 1000 - ((Date.now() + offset) % 1000));
}

document.body.classList.add("scripted");
document.addEventListener("click", (event) => {
  if (event.target.closest(".command button")) copy(event.target);
});
offset = Number(document.body.dataset.now) * 1000 - Date.now();
tick();
setTimeout(look, INTERVAL);
