// The list of passages that are ranked, and how they are edited.

import { el } from "./dom.js";

/** Return the passages of a pasted text: blocks where blank lines stand between them, else lines. */
export function split(text) {
  const whole = text.replace(/\r\n?/g, "\n").trim();
  const parts = /\n[ \t]*\n/.test(whole) ? whole.split(/\n(?:[ \t]*\n)+/) : whole.split("\n");
  return parts.map((part) => part.trim().replace(/\s+/g, " ")).filter(Boolean);
}

export class Passages {
  /** `list` is where they stand, `count` what says how many there are. */
  constructor(list, count) {
    this.list = list;
    this.count = count;
  }

  /** Return the passages as they stand: title, text, and the grade of those that were not edited. */
  values() {
    return [...this.list.children].map((item) => ({
      title: item.dataset.title,
      text: item.querySelector("textarea").value.trim(),
      grade: Number(item.dataset.grade),
    })).filter((passage) => passage.text || passage.title);
  }

  /** Put these in place of what is there. */
  replace(documents) {
    this.list.replaceChildren();
    this.add(documents);
  }

  add(documents) {
    for (const document of documents) this.list.append(this.item(document));
    this.renumber();
  }

  item({ title = "", text, grade = 0 }) {
    const field = el("textarea", {
      rows: 2, value: text,
      oninput: () => (item.dataset.grade = 0), // what was judged was the text as it stood
    });
    const remove = el("button", { type: "button", class: "remove", onclick: () => this.remove(item) }, "✕");
    const item = el("li", {}, el("label", {}), field, remove);
    item.dataset.title = title;
    item.dataset.grade = grade;
    return item;
  }

  remove(item) {
    const next = item.nextElementSibling ?? item.previousElementSibling;
    item.remove();
    this.renumber();
    (next?.querySelector(".remove") ?? document.getElementById("more")).focus();
  }

  renumber() {
    [...this.list.children].forEach((item, place) => {
      const [label, field, remove] = item.children;
      field.id = `passage-${place}`;
      label.htmlFor = field.id;
      label.textContent = `Passage ${place + 1}${item.dataset.title ? `: ${item.dataset.title}` : ""}`;
      remove.setAttribute("aria-label", `Remove passage ${place + 1}`);
    });
    this.count.textContent = this.list.children.length;
  }
}
