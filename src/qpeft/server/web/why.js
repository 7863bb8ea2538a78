// What made a passage's scores, system by system.

import { score } from "./columns.js";
import { el, movement, number } from "./dom.js";
import { MAX_EXPLAINED } from "./ranking.js";

const FAINT = 0.04; // of the largest; less cannot be seen
const WORDS = 10;

/** Return the reasons for the place of a passage in each ranking. */
export function reasons(index, rankings) {
  const first = rankings[0];
  return rankings.map((ranking) => {
    const hit = ranking.hits.find((each) => each.index === index);
    const from = first.hits.find((each) => each.index === index);
    return el("section", {},
      el("h3", {}, ranking.system.name, " ", el("span", { class: "note" }, ranking.system.kind)),
      el("p", { class: "standing" },
        el("span", { class: "place" }, `rank ${hit.rank}`), " ",
        ranking === first ? null : movement(from.rank, hit.rank, first.system.name), " ",
        el("span", { class: "score" }, score(ranking.system, hit)), " ",
        hit.raw === null ? null : el("span", { class: "note" }, `${number(hit.raw, 3)} ${unit(ranking)}`)),
      hit.explanation ? explained(hit.explanation, ranking) : el("p", { class: "note" }, unexplained(ranking, hit)));
  });
}

function unit(ranking) {
  return { query_likelihood: "nats per query token", yes_no: "nats, log-odds" }[ranking.system.method] ?? "";
}

function unexplained(ranking, hit) {
  if (ranking.system.id === "bm25") return "A sum over the words that query and passage share; rare ones weigh more.";
  if (ranking.hits.length > MAX_EXPLAINED) return `Up to ${MAX_EXPLAINED} passages are explained, not ${ranking.hits.length}.`;
  if (ranking.system.method !== "query_likelihood") return "A score of this method has no reasons that could be shown.";
  return hit.raw === null ? "The explanation is on its way." : "The model reads no token of it.";
}

function explained(explanation, ranking) {
  const hinted = explanation.hinted_score !== null && explanation.hinted_score !== undefined;
  return [
    queryTokens(explanation, hinted, reach(ranking, hinted)),
    hinted ? el("p", { class: "note" },
      `Without the adapter ${number(explanation.score, 3)}, with it ${number(explanation.hinted_score, 3)} `
      + `(${number(explanation.hinted_score - explanation.score, 3, true)}): + (blue) query tokens became likelier, − (orange) ones less.`)
      : el("p", { class: "note" }, "Log-probability of each query token after the passage, in nats; the stronger the shade, the less likely."),
    passageText(explanation),
    hintWords(explanation),
  ].filter(Boolean);
}

/** Return the value at which colours are full, in nats: that of all but the outermost twentieth of the tokens. */
function reach(ranking, hinted) {
  const sizes = ranking.hits.flatMap((hit) => (hit.explanation?.query_tokens ?? []).map((token) =>
    Math.abs(hinted ? token.hinted - token.log_prob : token.log_prob))).sort((a, b) => a - b);
  return Math.max(sizes[Math.floor(0.95 * (sizes.length - 1))] ?? 0, 0.1);
}

function queryTokens(explanation, hinted, full) {
  const named = words(explanation.query_tokens);
  const label = hinted ? "Query tokens, with what the adapter changed" : "Query tokens, with their log-probabilities";
  return el("ol", { class: "tokens", "aria-label": label }, explanation.query_tokens.map((token, place) => {
    const value = hinted ? token.hinted - token.log_prob : token.log_prob;
    const way = !hinted ? "even" : value > 0 ? "up" : "down";
    return el("li", {
      class: `${way}${token.of_template ? " muted" : ""}`,
      "--s": Math.min(Math.abs(value) / full, 1).toFixed(3),
      title: hinted ? `log P ${number(token.log_prob, 2)} → ${number(token.hinted, 2)} nats` : null,
    }, named[place], el("small", {}, number(value, 2, hinted)));
  }));
}

/** Return the passage with what the adapter chose or attended to marked; null where it does neither. */
function passageText(explanation) {
  if (!explanation.passage_tokens.some((token) => token.chosen || token.attention)) {
    return explanation.truncated ? el("p", { class: "note" }, "The end of the passage did not fit.") : null;
  }
  const top = Math.max(...explanation.passage_tokens.map((token) => token.attention ?? 0), 0) || 1;
  const parts = explanation.passage_tokens.map((token) => {
    const text = token.text.trimStart();
    const blank = token.text.slice(0, token.text.length - text.length);
    if (token.chosen) {
      return [blank, el("mark", { "--s": 1, title: `hint word ${token.chosen}` }, text,
        el("sup", { "aria-hidden": "true" }, String(token.chosen)))]; // the hint is listed below
    }
    if (token.attention && token.attention >= FAINT * top) {
      const share = `${(100 * token.attention).toFixed(1)} % of the attention`;
      return [blank, el("mark", { "--s": (token.attention / top).toFixed(3), title: share }, text)];
    }
    return token.of_template ? [blank, el("span", { class: "muted" }, text)] : token.text;
  });
  const cut = explanation.truncated ? el("span", { class: "muted" }, " … cut here") : null;
  return el("p", { class: "text" }, parts, cut);
}

function hintWords(explanation) {
  if (explanation.hint.length) {
    return el("p", { class: "note" }, "The adapter's hint: ", el("b", {}, explanation.hint.join(" · ")));
  }
  const shares = new Map();
  words(explanation.passage_tokens).forEach((word, place) => {
    const share = explanation.passage_tokens[place].attention;
    if (share) shares.set(word.toLowerCase(), (shares.get(word.toLowerCase()) ?? 0) + share);
  });
  const listed = [...shares].sort((a, b) => b[1] - a[1]).slice(0, WORDS).filter(([, share]) => share >= 0.01);
  if (!listed.length) return null;
  return el("p", { class: "note" }, "Read most by the adapter: ",
    el("b", {}, listed.map(([word, share]) => `${word} ${Math.round(100 * share)} %`).join(" · ")));
}

/** Return pieces as they can be listed apart: without blanks, … where a word goes on before a piece. */
function words(tokens) {
  const letter = /[\p{L}\p{N}]/u;
  return tokens.map(({ text }, place) => {
    const before = place ? tokens[place - 1].text.slice(-1) : "";
    const inside = letter.test(before) && letter.test(text.slice(0, 1));
    return (inside ? "…" : "") + (text.trim() || (text ? "␣" : "·"));
  });
}
