// The page: what is asked, of whom, and what came back.

import { ask, key } from "./api.js";
import { Columns } from "./columns.js";
import { el } from "./dom.js";
import { Passages, split } from "./passages.js";
import { BM25, explain, rank, systems } from "./ranking.js";
import { reasons } from "./why.js";

const $ = (id) => document.getElementById(id);
const RETRY = 2000; // ms between questions to a server whose model is being opened
const state = {
  known: [], off: new Set(), // systems, and the ids of those that are not asked
  documents: [], rankings: [], chosen: null, // what is shown, and the passage whose reasons are
  judged: "", // the query that the grades are for
  asked: null, retry: null,
};

const passages = new Passages($("passages"), $("count"));
const columns = new Columns($("columns"), $("views"), why);

function alertWith(message) {
  $("alert").hidden = !message;
  $("alert").textContent = message;
}

function say(message) {
  $("status").textContent = message;
}

/** Show what went wrong; a key that is missing or wrong is asked for. */
function trouble(error) {
  alertWith(error.message);
  if (error.status === 401) {
    $("key").open = true;
    $("api-key").focus();
  }
}

/** Bring the list of systems up to date; `tell` says which failures are shown. */
async function refresh(tell = () => true) {
  clearTimeout(state.retry);
  try {
    show(await systems());
    $("served").textContent = `${state.known[1].name} · ${count(state.known.length - 2, "adapter")}`;
    return true;
  } catch (error) {
    if (error.status === 503) {
      $("served").textContent = "the model is being opened …";
      state.retry = setTimeout(() => refresh(() => false), RETRY);
    }
    if (tell(error)) trouble(error);
    return false;
  }
}

function show(found) {
  const before = JSON.stringify(state.known);
  state.known = found;
  if (JSON.stringify(found) === before) return;
  $("choices").replaceChildren(...found.map((system) => el("label", { class: "choice" },
    el("input", {
      type: "checkbox", value: system.id, checked: !state.off.has(system.id),
      onchange: ({ target }) => (target.checked ? state.off.delete(system.id) : state.off.add(system.id)),
    }),
    el("span", {}, system.name, " ", el("span", { class: "note" }, system.kind)))));
}

function count(number, word) {
  return `${number} ${word}${number === 1 ? "" : "s"}`;
}

async function fillQuestions() {
  const { collection, questions } = await ask("page/questions");
  $("question").append(el("optgroup", { label: collection },
    questions.map(({ id, text }) => el("option", { value: id }, text))));
  $("question").value = questions[0].id;
  await pick();
}

/** Take over a question of the collection, with its candidates. */
async function pick() {
  const id = $("question").value, depth = $("depth").value;
  if (!id) return;
  try {
    const { documents } = await ask(`page/candidates?question=${encodeURIComponent(id)}&depth=${depth}`);
    if (id !== $("question").value || depth !== $("depth").value) return; // a later choice may be answered first
    $("query").value = $("question").selectedOptions[0].textContent;
    state.judged = $("query").value;
    passages.replace(documents);
  } catch (error) {
    trouble(error);
  }
}

function addPassages(text) {
  const found = split(text);
  passages.add(found.map((each) => ({ text: each })));
  $("more").value = "";
  say(found.length ? `Added ${count(found.length, "passage")}.` : "");
}

/** Say what is missing, and go there. */
function missing(id, message) {
  alertWith(message);
  $(id).focus();
}

async function submit() {
  if ($("more").value.trim()) addPassages($("more").value);
  const query = $("query").value.trim();
  const documents = passages.values();
  if (!query) return missing("query", "Write a query first.");
  if (!documents.length) {
    $("editor").open = true;
    return missing("more", "Add passages first.");
  }
  if (query !== state.judged) documents.forEach((each) => (each.grade = 0));
  state.asked?.abort();
  const asked = (state.asked = new AbortController());
  alertWith("");
  say("Ranking …");
  $("rank").setAttribute("aria-busy", "true");
  try {
    if (!(await refresh())) return say("");
    const chosen = state.known.filter((system) => !state.off.has(system.id));
    if (!chosen.length) {
      say("");
      return missing("refresh", "Choose what to rank with first.");
    }
    await run(query, documents, chosen, asked.signal);
  } catch (error) {
    if (error.name !== "AbortError") throw error;
  } finally {
    if (state.asked === asked) $("rank").removeAttribute("aria-busy");
  }
}

/** Rank with each system in turn, so that none is timed while another works; then ask for the reasons. */
async function run(query, documents, chosen, signal) {
  state.documents = documents;
  state.rankings = [];
  $("intro").hidden = true;
  $("legend").hidden = false;
  columns.begin(chosen, documents);
  const places = [];
  let failed = null;
  for (const [place, system] of chosen.entries()) {
    say(`Ranking with ${system.name} …`);
    columns.wait(place);
    try {
      const ranking = await rank(system, query, documents, signal);
      state.rankings.push(ranking);
      places.push(place);
      columns.fill(place, ranking);
    } catch (error) {
      if (error.name === "AbortError") throw error;
      columns.fail(place, error.message);
      failed ??= error;
    }
  }
  if (failed) trouble(failed);
  if (!state.rankings.length) return say("");
  const done = `Ranked ${count(documents.length, "passage")} with ${count(state.rankings.length, "system")}.`;
  say(done);
  for (const [nth, ranking] of state.rankings.entries()) {
    if (ranking.system.id === BM25.id) continue;
    try {
      await explain(ranking, query, documents, signal);
    } catch (error) {
      if (error.name === "AbortError") throw error;
      trouble(error);
      return;
    }
    columns.addRaw(places[nth], ranking);
    if ($("why").open) why(state.chosen);
  }
  say(`${done} Explained.`);
}

/** Open the reasons for a passage's places. */
function why(index) {
  state.chosen = index;
  const passage = state.documents[index];
  $("why-title").textContent = passage.title || passage.text.slice(0, 80) + (passage.text.length > 80 ? " …" : "");
  $("whole").textContent = passage.text;
  $("reasons").replaceChildren(...reasons(index, state.rankings));
  if (!$("why").open) $("why").showModal();
}

$("form").addEventListener("submit", (event) => {
  event.preventDefault();
  submit();
});
$("form").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) {
    event.preventDefault();
    submit();
  }
});
$("question").addEventListener("change", pick);
$("depth").addEventListener("change", pick);
$("add").addEventListener("click", () => {
  addPassages($("more").value);
  $("more").focus();
});
$("clear").addEventListener("click", () => {
  passages.replace([]);
  $("question").value = "";
  say("Removed all passages.");
  $("more").focus();
});
$("refresh").addEventListener("click", async () => {
  if (await refresh()) {
    alertWith("");
    say(`The server has ${count(state.known.length - 1, "ranker")}.`);
  }
});
$("api-key").value = key.get();
$("key-form").addEventListener("submit", async (event) => {
  event.preventDefault();
  key.set($("api-key").value.trim());
  if (!(await refresh())) return;
  alertWith("");
  $("key").open = false;
  $("query").focus();
});
$("forget").addEventListener("click", () => {
  key.set("");
  $("api-key").value = "";
  say("The key is forgotten.");
});
$("close").addEventListener("click", () => $("why").close());
$("why").addEventListener("click", ({ target }) => {
  if (target === $("why")) $("why").close(); // the backdrop
});
document.addEventListener("visibilitychange", () => {
  if (!document.hidden) refresh(() => false);
});

refresh((error) => error.status !== 503);
fillQuestions().catch(trouble);
