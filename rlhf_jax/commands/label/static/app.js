"use strict";
// All that the page knows. `tiers` is the ranking: lists of names, the best first, several names in one are a tie.
// Names are digests of the responses, so that neither letters nor places on the page ever reach the file.
const LETTERS = "ABCDEFGHIJKL";
const PLACES = ["1st", "2nd", "3rd"];
let rater = "", item = null, tiers = [], allBad = false, typed = [];
let study = null; // what the server says of the study: title, guidelines, criteria, scale
let ratings = {}; // criterion -> name -> 1 to the scale
let unsaved = false; // whether an answer that is saved was changed since
const onlyHere = new Set(); // drafts that a reload would lose
let later = 0, loads = 0, shownAt = 0, hiddenFor = 0, hiddenAt = 0, saving = false;
const CHANGED = "Changed since it was saved; Enter saves the change";
const savedAt = []; // places of answers saved in this session, for undo

const ask = async (path, body) => (await request(path, body, "What is on this page is kept; start rlhf-jax label again.")).json();

const place = (i) => PLACES[i] ?? `${i + 1}th`;
const names = () => item.responses.map((response) => response.name);
const letter = (name) => LETTERS[names().indexOf(name)];
const sorted = (tier) => names().filter((name) => tier.includes(name));
const tierOf = (name) => tiers.findIndex((tier) => tier.includes(name));
const unplaced = () => names().filter((name) => tierOf(name) < 0);
const complete = () => unplaced().length === 0;
const unrated = () => study.criteria.filter((criterion) => names().some((name) => !ratings[criterion]?.[name]));
const say = (text) => { $("said").textContent = text; };

function status(text, kind = "") {
  $("status").textContent = text;
  $("status").className = kind;
}

// ---------------------------------------------------------------- who

async function enter() {
  study = await ask("start");
  $("work").hidden = true;
  $("entry").hidden = false;
  const { title, raters, fixed, total } = study;
  document.title = `Rank responses · ${title}`;
  $("about").textContent = `${title}: ${total} ${total === 1 ? "item" : "items"}`;
  $("known").replaceChildren(...raters.map(({ name, done }) =>
    make("button", { type: "button", onclick: () => begin(name) }, name, make("span", { className: "quiet" }, `${done} of ${total}`))));
  $("known").hidden = raters.length === 0;
  $("own").hidden = fixed;
  (fixed ? $("known").querySelector("button") : $("name"))?.focus();
}

async function begin(name, at) {
  try {
    study ??= await ask("start");
    if (!await load(name, at < study.total ? at : undefined)) return;
  } catch (error) {
    $("refused").textContent = error.message;
    return;
  }
  session.setItem("rater", rater);
  $("refused").textContent = "";
  $("rater").textContent = rater;
  $("entry").hidden = true;
  $("work").hidden = false;
  $("item").focus({ preventScroll: true });
  scrollTo({ top: 0 });
  $("show-guidelines").hidden = !study.guidelines;
  if (!item.states.some(Boolean)) showGuidelines(); // who comes for the first time reads them first
}

function showGuidelines() {
  if (!study.guidelines) return;
  fill($("guidelines-text"), study.guidelines, false);
  $("guidelines").showModal();
}

// ---------------------------------------------------------------- one item

const draftName = () => `draft ${rater} ${item.item}`;

// Whether it is shown, and not another that was asked for meanwhile; `done` is what to say of the one before it.
async function load(name, at, done = "") {
  const mine = ++loads;
  const found = await ask(`item?rater=${encodeURIComponent(name)}${at === undefined ? "" : `&at=${at}`}`);
  if (mine !== loads) return false;
  const left = unsaved && rater === name.trim() ? item.at + 1 : 0; // changed until now, while this one was on its way
  rater = name.trim();
  item = found;
  session.setItem("at", item.at);
  const draft = JSON.parse(local.getItem(draftName()) ?? "null"), kept = draft ?? item.answer;
  unsaved = draft !== null && item.answer !== null;
  tiers = [];
  for (const [name, rank] of Object.entries(kept?.ranks ?? {})) {
    if (rank !== null && names().includes(name)) (tiers[rank] ??= []).push(name);
  }
  tiers = tiers.filter((tier) => tier);
  allBad = kept?.all_bad ?? false;
  ratings = kept?.ratings ?? {};
  $("comment").value = kept?.comment ?? "";
  $("note").hidden = !$("comment").value;
  typed = [];
  shownAt = performance.now();
  hiddenFor = 0;
  drawItem();
  draw();
  scrollTo({ top: 0 });
  if (unsaved) status(CHANGED);
  else if (left && left !== item.at + 1) status(`The change of item ${left} is not saved; it is kept there`);
  else if (done) status(done, "saved");
  else status(item.answer ? (item.answer.skipped ? "Skipped earlier" : "Answered earlier; saving again changes it") : "");
  return true;
}

function drawItem() {
  const earlier = item.turns.slice(0, -1), size = earlier.reduce((sum, turn) => sum + turn.content.length, 0);
  const parts = earlier.map(drawTurn);
  const folded = size > 900 ? [make("details", {}, make("summary", {}, `${earlier.length} earlier turns`), ...parts)] : parts;
  $("prompt").replaceChildren(...folded, drawTurn(item.turns.at(-1)));
  $("title").textContent = `Item ${item.at + 1} of ${item.states.length}`;
  $("responses").className = [2, 4].includes(item.responses.length) ? "two" : "";
  $("responses").replaceChildren(...item.responses.map(drawCard));
  document.querySelectorAll(".text").forEach(fold);
}

function drawTurn({ role, content }) {
  const who = { user: "Person", assistant: "Assistant", system: "Instructions", prompt: "Prompt" }[role] ?? role;
  return make("div", { className: `turn ${role}` }, make("div", { className: "role" }, who), fill(make("div"), content));
}

function drawCard({ name, text, finished }) {
  const key = make("button", { className: "key", type: "button", "data-name": name, "aria-describedby": `place-${name}` }, letter(name));
  key.onclick = (event) => put(name, event.shiftKey);
  const head = make("div", { className: "head" }, key, make("span", { className: "place", id: `place-${name}` }));
  if (!finished) head.append(make("span", { className: "cut", title: "It reached the length limit" }, "cut off"));
  return make("article", { className: "card", "data-card": name, "aria-label": `Response ${letter(name)}` }, head, fill(make("div"), text), ...study.criteria.map((criterion) => scale(name, criterion)));
}

// One criterion of a response: 1 to the scale, by tapping, or by digits once it has the focus.
function scale(name, criterion) {
  const choices = Array.from({ length: study.scale }, (_, i) => {
    const input = make("input", { type: "radio", name: `${criterion} ${name}`, value: i + 1, checked: ratings[criterion]?.[name] === i + 1 });
    input.onchange = () => { (ratings[criterion] ??= {})[name] = i + 1; changed(); };
    return make("label", {}, input, make("span", {}, String(i + 1)));
  });
  return make("fieldset", { className: "scale" }, make("legend", {}, criterion.replaceAll("_", " ")), make("div", {}, ...choices));
}

function fold(text) {
  text.classList.add("long");
  if (text.scrollHeight <= text.clientHeight + 24) return text.classList.remove("long");
  const more = make("button", { className: "more", type: "button", "aria-expanded": "false" }, "Show all");
  more.onclick = () => unfold(more, text.classList.contains("long"));
  text.after(more);
}

function unfold(more, open) {
  more.previousElementSibling.classList.toggle("long", !open);
  more.setAttribute("aria-expanded", String(open));
  more.textContent = open ? "Show less" : "Show all";
}

// ---------------------------------------------------------------- the ranking

function draw() {
  const done = item.states.filter((state) => state).length, total = item.states.length;
  $("at").textContent = `${item.at + 1} of ${total}`;
  $("left").textContent = done === total ? "all answered" : `${total - done} left`;
  $("bar").setAttribute("aria-valuemax", total);
  $("bar").setAttribute("aria-valuenow", done);
  $("filled").style.width = `${(100 * done) / total}%`;
  const focused = document.activeElement?.closest?.("#strip") && document.activeElement.dataset.name;
  drawStrip();
  if (focused) $("strip").querySelector(`[data-name="${focused}"]`).focus();
  for (const card of document.querySelectorAll(".card")) {
    const at = tierOf(card.dataset.card);
    card.classList.toggle("placed", at >= 0);
    card.classList.toggle("best", at === 0);
    const others = at < 0 ? [] : sorted(tiers[at]).filter((name) => name !== card.dataset.card).map(letter);
    card.querySelector(".place").textContent = at < 0 ? "" : place(at) + (others.length ? `, tied with ${others.join(", ")}` : "");
  }
  $("all-bad").setAttribute("aria-pressed", String(allBad));
  $("show-note").setAttribute("aria-expanded", String(!$("note").hidden));
  $("show-note").classList.toggle("filled", $("comment").value.trim() !== "");
  $("save").disabled = missing() !== "";
  $("back").disabled = item.at === 0;
  $("forth").disabled = item.at === total - 1;
}

// What keeps the answer from being saved.
function missing() {
  if (allBad && tiers.length === 0 && Object.keys(ratings).length === 0) return "";
  if (!complete() && !(allBad && tiers.length === 0)) return `Place ${unplaced().map(letter).join(" and ")} first`;
  return unrated().length ? `Rate all responses first: ${unrated().join(", ").replaceAll("_", " ")}` : "";
}

function drawStrip() {
  const parts = tiers.length ? [make("span", { className: "end" }, "Best")] : [];
  tiers.forEach((tier, i) => {
    parts.push(gap(i), make("div", { className: `tier ${tier.length > 1 ? "tied" : ""}`, "data-drop": `tier ${i}`, title: place(i) }, ...sorted(tier).map(chip)));
  });
  parts.push(gap(tiers.length), tiers.length ? make("span", { className: "end" }, "Worst")
    : make("span", { className: "hint" }, "Best first: type, tap or drag the letters"));
  $("strip").dataset.drop = `gap ${tiers.length}`; // wherever else on the bar
  const left = unplaced();
  if (left.length || tiers.length) parts.push(make("div", { className: "pool", role: "group", "data-drop": "pool", "aria-label": "Not ranked yet" }, ...left.map(chip)));
  $("strip").replaceChildren(...parts);
}

const gap = (i) => make("span", { className: "gap", "data-drop": `gap ${i}`, "aria-hidden": "true" }, i > 0 && i < tiers.length ? "›" : "");

function chip(name) {
  const at = tierOf(name), where = at < 0 ? "not ranked" : place(at);
  const button = make("button", { className: "key", type: "button", "data-name": name, "aria-label": `${letter(name)}, ${where}` }, letter(name));
  button.onclick = (event) => { if (at < 0 || event.shiftKey) put(name, event.shiftKey); };
  return button;
}

const draftOf = () => JSON.stringify({ ranks: ranks(), ratings, all_bad: allBad, comment: $("comment").value });

function changed(what) {
  tiers = tiers.filter((tier) => tier.length);
  if (local.setItem(draftName(), draftOf())) onlyHere.delete(draftName()); else onlyHere.add(draftName());
  unsaved = item.answer !== null;
  status("");
  draw();
  if (what) say(what);
}

function ranks() {
  return Object.fromEntries(tiers.flatMap((tier, i) => tier.map((name) => [name, i])));
}

function take(name) {
  tiers = tiers.map((tier) => tier.filter((other) => other !== name)).filter((tier) => tier.length);
  typed = typed.filter((other) => other !== name);
}

// What a letter does: place next (or with Shift, tie with the one before), take out again, or start anew.
function put(name, tie) {
  const at = tierOf(name);
  if (tie) {
    if (at < 0 && tiers.length) tiers.at(-1).push(name);
    else if (at > 0) tiers.splice(at - 1, 2, [...tiers[at - 1], ...tiers[at]]);
    else if (at < 0) tiers.push([name]);
  } else {
    if (complete() && !typed.includes(name) && typed.length) return confirmed(name);
    if (complete()) { tiers = []; typed = []; }
    else if (at >= 0) { take(name); return changed(`${letter(name)} taken out`); }
    tiers.push([name]);
  }
  typed = [...typed.filter((other) => other !== name), name];
  const left = unplaced();
  if (left.length === 1) tiers.push(left);
  changed(spoken());
}

// The last one placed itself, and is now typed all the same.
function confirmed(name) {
  typed.push(name);
  say(spoken());
}

function spoken() {
  const order = tiers.map((tier) => tier.map(letter).join(" tied with ")).join(", then ");
  return order + (complete() ? ". Complete; Enter saves." : "");
}

function takeBack() {
  const last = complete() && typed.length < names().length ? tiers.at(-1)?.at(-1) : null; // the one that placed itself
  if (last && !typed.includes(last)) take(last);
  const name = typed.at(-1) ?? tiers.at(-1)?.at(-1);
  if (!name) return;
  take(name);
  changed(`${letter(name)} taken out`);
}

// One step better or worse: out of a tie to a place of its own, then into the tie beside it.
function step(name, by) {
  const at = tierOf(name);
  if (at < 0) return put(name, false);
  if (tiers[at].length > 1) {
    tiers[at] = tiers[at].filter((other) => other !== name);
    tiers.splice(by < 0 ? at : at + 1, 0, [name]);
  } else if (tiers[at + by]) {
    tiers[at + by].push(name);
    tiers.splice(at, 1);
  }
  changed(spoken());
}

function drop(name, target) {
  const [what, index] = target.split(" "), i = Number(index);
  const goal = what === "tier" ? tiers[i] : null;
  const before = what === "gap" ? tiers.slice(i).find((tier) => tier.some((other) => other !== name)) : null;
  const mark = before?.find((other) => other !== name);
  if (goal?.includes(name)) return;
  const partner = goal?.[0];
  take(name);
  if (what === "tier") tiers[tierOf(partner)].push(name);
  if (what === "gap") tiers.splice(mark ? tierOf(mark) : tiers.length, 0, [name]);
  changed(what === "pool" ? `${letter(name)} taken out` : spoken());
}

// ---------------------------------------------------------------- dragging, by mouse, pen or finger

function startDrag(event) {
  const key = event.target.closest(".key[data-name]");
  if (!key || event.button !== 0) return;
  const { name } = key.dataset, x0 = event.clientX, y0 = event.clientY;
  let ghost = null, over = null;
  const move = (e) => {
    if (!ghost && Math.hypot(e.clientX - x0, e.clientY - y0) < 7) return;
    ghost ??= document.body.appendChild(make("div", { className: "key ghost" }, letter(name)));
    ghost.style.left = `${e.clientX - 23}px`;
    ghost.style.top = `${e.clientY - 23}px`;
    over?.classList.remove("over");
    over = document.elementFromPoint(e.clientX, e.clientY)?.closest("[data-drop]");
    over?.classList.add("over");
  };
  const end = (e) => {
    removeEventListener("pointermove", move);
    removeEventListener("pointerup", end);
    removeEventListener("pointercancel", end);
    if (!ghost) return;
    ghost.remove();
    over?.classList.remove("over");
    addEventListener("click", (click) => click.stopPropagation(), { capture: true, once: true }); // a drag is no click
    setTimeout(() => { if (e.type === "pointerup" && over) drop(name, over.dataset.drop); });
  };
  addEventListener("pointermove", move);
  addEventListener("pointerup", end);
  addEventListener("pointercancel", end);
}

// ---------------------------------------------------------------- saving and going on

// Until the server has it, the rater may change the answer, go to another item and back, or leave.
async function save(skipped = false) {
  if (saving) return status("Still saving the answer before …");
  if (!skipped && $("save").disabled) {
    return status(missing());
  }
  saving = true;
  status("Saving …");
  const seconds = (performance.now() - shownAt - hiddenFor) / 1000;
  const answer = { rater, item: item.item, ranks: ranks(), ratings, all_bad: allBad, skipped, comment: $("comment").value.trim(), seconds };
  const { at } = item, asked = loads, draft = draftName(), kept = local.getItem(draft), sent = draftOf();
  const isHere = () => rater === answer.rater && item.item === answer.item;
  try {
    const { state } = await ask("answer", answer);
    if (local.getItem(draft) === kept) {
      local.removeItem(draft);
      onlyHere.delete(draft);
    }
    if (rater !== answer.rater) return;
    savedAt.push(at);
    item.states[at] = state;
    draw();
    if (isHere()) {
      item.answer ??= answer;
      unsaved = draftOf() !== sent;
      if (unsaved) return status(CHANGED);
    }
    if (asked !== loads) return; // another item is there, or on its way
    await goOn();
  } catch (error) {
    status(isHere() ? error.message : `Item ${at + 1} is not saved. ${error.message}`, "failed");
  } finally {
    saving = false;
  }
}

async function goOn() {
  const { at, states } = item;
  const later = states.findIndex((state, i) => i > at && !state);
  const next = later >= 0 ? later : states.indexOf("");
  if (next < 0) return finish();
  if (await load(rater, next, "Saved ✓  Z changes it")) $("item").focus({ preventScroll: true });
}

async function finish() {
  draw();
  $("item").focus({ preventScroll: true });
  status("Saved ✓", "saved");
  await showProgress(`All ${item.states.length} items are answered. Thank you! Arrow keys go back to any of them.`);
}

async function go(at) {
  if (at < 0 || at >= item.states.length) return;
  try {
    await load(rater, at);
  } catch (error) {
    status(error.message, "failed");
  }
}

async function showProgress(line = "") {
  let found;
  try {
    found = await ask("agreement");
  } catch (error) {
    return status(error.message, "failed");
  }
  const alpha = found.alpha === null ? "" : ` Krippendorff's alpha is ${found.alpha.toFixed(2)}: 1 is the same order everywhere, 0 chance.`;
  const share = found.share === null ? "Agreement shows once two raters have ranked the same item."
    : `Two raters agree on ${(100 * found.share).toFixed(0)}% of ${found.pairs} pairs of responses.${alpha}`;
  $("progress-title").textContent = line ? "Done" : "Progress";
  $("agreement").textContent = `${line} ${share}`.trim();
  $("raters").replaceChildren(...found.raters.map((one) => make("tr", {},
    make("td", {}, one.rater), make("td", {}, `${one.answers} of ${item.states.length}`), make("td", {}, String(one.skipped)),
    make("td", {}, one.tau === null ? "–" : `${one.tau.toFixed(2)} of ${one.pairs}`))));
  if (!$("progress").open) $("progress").showModal();
  clearTimeout(later);
  later = setTimeout(() => { if ($("progress").open) showProgress(line); }, 5000); // as others go on
}

function showRaw() {
  toggleRaw();
  drawItem();
  draw();
  say(raw ? "Texts as they are" : "Texts as Markdown");
}

function toggleNote(open = $("note").hidden) {
  $("note").hidden = !open;
  draw();
  if (open) $("comment").focus(); else $("item").focus({ preventScroll: true });
}

function toggleBad() {
  allBad = !allBad;
  changed(allBad ? "All bad" : "Not all bad");
}

function clear() {
  tiers = [];
  ratings = {};
  drawItem();
  typed = [];
  allBad = false;
  changed("Cleared");
}

// ---------------------------------------------------------------- keys

const KEYS = {
  Enter: () => save(), Backspace: takeBack, Escape: clear, ArrowLeft: () => go(item.at - 1), ArrowRight: () => go(item.at + 1),
  x: toggleBad, s: () => save(true), n: () => toggleNote(true), p: () => showProgress(), "?": () => $("help").showModal(),
  r: showRaw, u: showGuidelines,
  z: () => { if (savedAt.length) go(savedAt.pop()); },
  v: () => {
    const all = [...document.querySelectorAll(".more")], open = all.some((more) => more.getAttribute("aria-expanded") === "false");
    all.forEach((more) => unfold(more, open));
  },
};

function onKey(event) {
  if ($("work").hidden || document.querySelector("dialog[open]") || event.altKey || event.metaKey) return;
  const { target, key } = event, writes = target.matches("textarea, input:not([type=radio])");
  if (key === "Enter" && event.ctrlKey) { event.preventDefault(); return save(); }
  if (event.ctrlKey) return;
  if (writes) {
    if (key === "Escape") toggleNote(false);
    return;
  }
  if (key === "Enter" && target.matches("button, summary")) return; // it presses the button
  if (target.matches("[type=radio]")) {
    if (key.startsWith("Arrow")) return; // they choose
    const choice = target.closest(".scale").querySelector(`input[value="${CSS.escape(key)}"]`);
    if (choice) return choice.click();
  }
  const name = target.closest("#strip .key")?.dataset.name;
  if (name && (key === "ArrowLeft" || key === "ArrowRight")) {
    event.preventDefault();
    return step(name, key === "ArrowLeft" ? -1 : 1);
  }
  const index = key.length === 1 ? LETTERS.indexOf(key.toUpperCase()) : -1;
  const action = index >= 0 && index < item.responses.length ? () => put(names()[index], event.shiftKey) : KEYS[key] ?? KEYS[key.toLowerCase()];
  if (!action || (event.repeat && key.length === 1)) return;
  event.preventDefault();
  action();
}

function listen() {
  $("who").onsubmit = (event) => { event.preventDefault(); begin($("name").value); };
  $("leave").onclick = () => { session.removeItem("rater"); enter(); };
  $("show-progress").onclick = () => showProgress();
  $("show-help").onclick = () => $("help").showModal();
  $("show-guidelines").onclick = showGuidelines;
  $("raw").onclick = showRaw;
  $("raw").setAttribute("aria-pressed", String(raw));
  $("theme").onclick = theme;
  $("all-bad").onclick = toggleBad;
  $("show-note").onclick = () => toggleNote();
  $("comment").oninput = () => changed();
  $("clear").onclick = clear;
  $("back").onclick = () => go(item.at - 1);
  $("forth").onclick = () => go(item.at + 1);
  $("skip").onclick = () => save(true);
  $("save").onclick = () => save();
  addEventListener("keydown", onKey);
  addEventListener("pointerdown", startDrag);
  addEventListener("beforeunload", (event) => { if (onlyHere.size) event.preventDefault(); });
  document.addEventListener("visibilitychange", () => {
    if (document.hidden) hiddenAt = performance.now(); else hiddenFor += performance.now() - hiddenAt;
  });
}

listen();
const known = session.getItem("rater");
(known ? begin(known, session.getItem("at") ?? undefined).then(() => { if ($("work").hidden) return enter(); }) : enter())
  .catch((error) => { $("entry").hidden = false; $("refused").textContent = error.message; });
