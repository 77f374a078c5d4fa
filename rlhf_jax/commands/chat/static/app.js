"use strict";
// A turn is {text, answers: [{text, finished, left_out, remarks}], votes, best, vote}. The server holds the conversation
// that the policies see; the page keeps what is shown, so that it can be loaded again.
const NAMES = "AB";
let about = null, talk = "", turns = [], running = null;
let voted = null, voting = null; // the turn of the last vote, and while that is on its way, whether it will have been kept

const send = (path, body, running) => request(path, body, "What is on this page is kept; start rlhf-jax chat again.", running);

const short = (path) => path.split("/").slice(-3).join("/");

function status(text) {
  $("status").textContent = text;
}

function keep() {
  session.setItem("talk", JSON.stringify({ models: about.models, talk, turns }));
}

// ---------------------------------------------------------------- what is shown

function draw() {
  $("talk").replaceChildren(...turns.map(drawTurn));
  if (turns.length === 0) {
    const system = about.system ? [make("p", { dir: "auto" }, `System: ${about.system}`)] : [];
    const how = about.plain ? "What you type is a text that is continued, without template and history." : "The conversation goes through the chat template.";
    const both = about.models.length > 1 ? [make("p", {}, "Both answer with the same noise. Say which is better; the conversation goes on with it, or with A.")] : [];
    $("talk").append(make("section", { className: "quiet intro" }, make("p", {}, how), ...both, ...system));
  }
  $("send").hidden = running !== null;
  $("stop").hidden = running === null;
  $("new").disabled = running !== null || turns.length === 0;
}

function drawTurn(turn, i) {
  const last = i === turns.length - 1;
  const cards = turn.answers.map((answer, side) => drawAnswer(turn, answer, side, last));
  const below = last && running === null ? [drawChoices(turn)] : [];
  return make("section", { className: "turn", "aria-label": `Turn ${i + 1}` }, make("h2", { className: "hidden" }, `Turn ${i + 1}`), fill(make("div", { className: "said" }), turn.text),
    make("div", { className: "sides" }, ...cards), ...below);
}

function drawAnswer(turn, answer, side, last) {
  const several = about.models.length > 1, chosen = several && (turn.vote !== undefined ? turn.vote === side : !last && turn.best === side);
  const head = several ? [make("div", { className: "head" }, make("b", {}, NAMES[side]), make("span", { className: "quiet", title: about.models[side] }, short(about.models[side])))] : [];
  const notes = [];
  if (answer.finished === false) notes.push("cut off: sampling.max_new_tokens");
  if (answer.left_out) notes.push(`the first ${answer.left_out} tokens of the conversation were not seen: max_prompt_length`);
  notes.push(...(answer.remarks ?? []));
  if (answer.text === "" && answer.finished) notes.push("an empty answer");
  if (chosen) notes.push(turn.vote === side ? "voted better" : "the conversation went on with this one");
  if (turn.vote === "tie") notes.push("voted a tie");
  return make("article", { className: `card ${chosen ? "best" : ""}`, "aria-label": several ? `Answer ${NAMES[side]}` : "Answer" }, ...head,
    fill(make("div"), answer.text), make("p", { className: "quiet notes" }, notes.join("; ")));
}

function drawChoices(turn) {
  const button = (label, act) => make("button", { type: "button", onclick: act }, label);
  const choose = (choice) => () => { if (voted !== turn) voting = vote(turn, choice); };
  const votes = turn.votes && turn.vote === undefined
    ? [button("A is better", choose(0)), button("Tie", choose("tie")), button("B is better", choose(1))] : [];
  const again = make("button", { type: "button", className: "plain", title: "Another answer to the same, with other noise", onclick: () => say() }, "Again");
  const none = turn.votes || about.models.length === 1 ? [] : [make("span", { className: "quiet" }, "No vote: the answers are equal, or one is empty.")];
  if (turn.unanswered) none.push(make("span", { className: "quiet" }, `[${turn.unanswered}]`));
  return make("div", { className: "row choices" }, ...votes, ...none, again);
}

// ---------------------------------------------------------------- what is done

const atEnd = () => innerHeight + scrollY > document.body.scrollHeight - 80;

async function say(text) {
  if (running) return;
  running = new AbortController();
  const earlier = turns.slice();
  turns = text === undefined ? turns.slice(0, -1) : turns.slice();
  const turn = { text: text ?? earlier.at(-1).text, answers: about.models.map(() => ({ text: "" })) };
  turns.push(turn);
  draw();
  status("…");
  $("talk").lastElementChild.scrollIntoView({ block: "start" });
  try {
    // A vote is on the last answers that the server has, so what is said next waits for it.
    if (voting && !await voting) throw new Error($("status").textContent);
    await follow(turn, text === undefined ? { talk } : { talk, text });
    status("");
    keep();
  } catch (error) {
    turns = earlier; // nothing was said; what was typed is there again
    if (text !== undefined && !$("text").value) $("text").value = text;
    status(error.name === "AbortError" ? "Stopped; nothing of it is kept." : error.message);
  } finally {
    running = null;
    const low = atEnd();
    draw();
    if (low) scrollTo({ top: document.body.scrollHeight }); // what can be done about the answers stands below them
    $("text").focus();
  }
}

// Shows the lines of an answer as they come.
async function follow(turn, body) {
  const response = await send("say", body, running);
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let left = "", whole = false;
  for (;;) {
    const { done, value } = await reader.read();
    if (done) break;
    const lines = (left + value).split("\n");
    left = lines.pop();
    lines.map((one) => JSON.parse(one)).forEach((said) => { whole = take(turn, said) || whole; });
  }
  if (!whole) throw new Error("The server ended before the answer did.");
}

function take(turn, said) {
  if (said.error) throw new Error(said.error);
  if (said.side !== undefined) {
    const answer = turn.answers[said.side];
    if (said.piece !== undefined) answer.text += said.piece;
    else Object.assign(answer, { text: said.text, finished: said.finished, left_out: said.left_out, remarks: said.remarks });
    const card = $("talk").lastElementChild.querySelectorAll(".card .text")[said.side], low = atEnd();
    fill(card, answer.text);
    if (low) scrollTo({ top: document.body.scrollHeight });
  }
  if (said.best === undefined) return false;
  talk = said.talk;
  Object.assign(turn, { votes: said.votes, best: said.best, unanswered: said.unanswered });
  return true;
}

async function vote(turn, choice) {
  voted = turn;
  try {
    const { votes } = await (await send("vote", { talk, best: choice === "tie" ? 0 : choice, tie: choice === "tie" })).json();
    turn.vote = choice;
    if (choice !== "tie") turn.best = choice;
    status(`${votes} ${votes === 1 ? "vote" : "votes"}${about.output ? ` in ${about.output}` : "; kept nowhere (--output)"}`);
    keep();
    draw();
    return true;
  } catch (error) {
    voted = null;
    status(error.message);
    return false;
  } finally {
    voting = null;
  }
}

function submit(event) {
  event?.preventDefault();
  const text = $("text").value;
  if (running || !text.trim()) return;
  $("text").value = "";
  say(text);
}

async function start() {
  about = await (await send("start")).json();
  $("title").textContent = about.models.length > 1 ? "Two policies" : short(about.models[0]);
  document.title = ["Chat", ...about.models.filter(Boolean).map(short)].join(" · ");
  const kept = JSON.parse(session.getItem("talk") ?? "null");
  if (JSON.stringify(kept?.models) === JSON.stringify(about.models)) ({ talk, turns } = kept);
  draw();
  $("text").focus();
}

$("ask").onsubmit = submit;
$("text").onkeydown = (event) => { if (event.key === "Enter" && !event.shiftKey && !event.isComposing) submit(event); };
$("stop").onclick = () => running?.abort();
$("new").onclick = () => { talk = ""; turns = []; keep(); status(""); draw(); $("text").focus(); };
$("raw").onclick = () => { toggleRaw(); draw(); };
$("raw").setAttribute("aria-pressed", String(raw));
$("theme").onclick = theme;
start().catch((error) => status(error.message));
