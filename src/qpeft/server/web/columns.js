// Rankings side by side: a column for each system, and lines that follow a passage from one to the next.

import { el, hidden, movement, number, svg } from "./dom.js";

const GRADES = { 1: "helps", 2: "answers" };

export class Columns {
  /** `choose` is called with the index of a passage. */
  constructor(root, views, choose) {
    this.root = root;
    this.views = views;
    this.choose = choose;
    this.cards = [];
    new ResizeObserver(() => this.draw()).observe(root);
  }

  /** Make room for the rankings of these systems. */
  begin(systems, documents) {
    this.documents = documents;
    this.systems = systems;
    this.cards = systems.map(() => new Map());
    this.first = null;
    this.lines = svg("svg", { class: "lines", "aria-hidden": "true" });
    this.columns = systems.map((system, place) => el("section", { "aria-label": system.name },
      el("header", {}, el("h3", {}, system.name), el("p", { class: "note" }, system.kind)),
      el("p", { class: "waiting" }, place ? "waiting …" : "ranking …")));
    this.root.replaceChildren(this.lines, ...this.columns);
    this.root.style.setProperty("--columns", systems.length);
    this.views.replaceChildren(...systems.map((system, place) =>
      el("button", { type: "button", onclick: () => this.show(place) }, system.name)));
    this.show(Math.min(1, systems.length - 1));
  }

  /** Show one column where there is room for one only. */
  show(place) {
    this.columns.forEach((column, other) => column.classList.toggle("shown", other === place));
    [...this.views.children].forEach((view, other) => view.setAttribute("aria-pressed", other === place));
  }

  /** Say in a column that its ranking is being made. */
  wait(place) {
    this.columns[place].querySelector(".waiting").textContent = "ranking …";
  }

  /** Say in a column why it has no ranking. */
  fail(place, message) {
    this.columns[place].querySelector(".waiting").replaceWith(el("p", { class: "failed" }, message));
  }

  /** Fill a column. */
  fill(place, ranking) {
    const { system, hits, seconds } = ranking;
    const top = Math.max(...hits.map((hit) => hit.score), Number.MIN_VALUE);
    this.first ??= { name: system.name, rank: new Map(hits.map((hit) => [hit.index, hit.rank])), place };
    const column = this.columns[place];
    column.querySelector(".note").textContent = `${system.kind} · ${time(seconds)}`;
    column.querySelector(".note").title = "from asking to the answer, without explanations";
    column.querySelector(".waiting").replaceWith(
      el("ol", {}, hits.map((hit) => el("li", {}, this.card(place, system, hit, top)))));
    column.append(el("p", { class: "note scale" }, scale(system)));
    this.draw();
  }

  card(place, system, hit, top) {
    const { title, text, grade } = this.documents[hit.index];
    const full = system.calibration ? 1 : top;
    const card = el("button", {
      type: "button", class: "card", "aria-haspopup": "dialog",
      onclick: () => this.choose(hit.index),
      onpointerenter: () => this.follow(hit.index), onpointerleave: () => this.follow(null),
      onfocus: () => this.follow(hit.index), onblur: () => this.follow(null),
    },
      el("span", { class: "place" }, hidden("rank "), String(hit.rank)),
      this.first.place === place ? el("span", { class: "moved" })
        : movement(this.first.rank.get(hit.index), hit.rank, this.first.name),
      el("span", { class: "excerpt" }, title ? el("b", {}, title) : null, title ? " " : null, text),
      el("span", { class: "facts" },
        el("span", { class: "bar", "aria-hidden": "true", "--s": full > 0 ? Math.max(hit.score, 0) / full : 0 }),
        el("span", { class: "score" }, score(system, hit)), el("span", { class: "raw" }),
        GRADES[grade] ? el("span", { class: `badge grade-${grade}` }, GRADES[grade]) : null));
    this.cards[place].set(hit.index, card);
    return card;
  }

  /** Add raw scores to a column that is filled. */
  addRaw(place, ranking) {
    for (const hit of ranking.hits) {
      this.cards[place].get(hit.index).querySelector(".raw").textContent = number(hit.raw, 2) + (ranking.system.method === "classifier" ? "" : " nats");
    }
  }

  /** Point out a passage in all columns; null: none. */
  follow(index) {
    for (const cards of this.cards) {
      for (const [other, card] of cards) card.classList.toggle("followed", other === index);
    }
    for (const line of this.lines.children) line.classList.toggle("followed", line.dataset.index === String(index));
    this.lines.classList.toggle("following", index !== null);
  }

  /** Draw the lines anew where the cards stand now. */
  draw() {
    if (!this.lines) return;
    const origin = this.root.getBoundingClientRect();
    this.lines.setAttribute("width", this.root.scrollWidth);
    this.lines.setAttribute("height", this.root.scrollHeight);
    const filled = this.cards.filter((cards) => cards.size);
    const made = [];
    for (let place = 1; place < filled.length; place++) {
      for (const [index, card] of filled[place]) {
        const from = filled[place - 1].get(index).getBoundingClientRect(), to = card.getBoundingClientRect();
        if (!from.width || !to.width) continue;
        const [x, y] = [from.right - origin.left + this.root.scrollLeft, from.top + from.height / 2 - origin.top];
        const [u, v] = [to.left - origin.left + this.root.scrollLeft, to.top + to.height / 2 - origin.top];
        const half = (x + u) / 2;
        const way = v < y - 1 ? "gain" : v > y + 1 ? "loss" : "even";
        const line = svg("path", { d: `M${x} ${y}C${half} ${y} ${half} ${v} ${u} ${v}`, class: way });
        line.dataset.index = index;
        made.push(line);
      }
    }
    this.lines.replaceChildren(...made);
  }
}

/** Return a score as it is shown: a probability, a likelihood, or BM25's sum. */
export function score(system, hit) {
  if (system.id === "bm25") return number(hit.score, 2);
  return system.calibration ? `P ${number(hit.score, 2)}` : number(hit.score, 3);
}

function scale(system) {
  if (system.id === "bm25") return "over these passages alone";
  if (!system.calibration) return "likelihood per query token; not calibrated";
  return `P: probability of relevance (${system.calibration.method}${system.calibration.centred ? ", centred" : ""})`;
}

/** Return a time in words. */
function time(seconds) {
  return seconds < 1 ? `${Math.round(1000 * seconds)} ms` : `${seconds.toFixed(1)} s`;
}
