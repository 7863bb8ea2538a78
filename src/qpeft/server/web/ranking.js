// One ranking of the same passages by each system: first timed, then with reasons.

import { ask } from "./api.js";

export const MAX_EXPLAINED = 64;
export const BM25 = { id: "bm25", name: "BM25", kind: "words in common", method: "bm25", calibration: null };

/** Return the systems that the server has: BM25, the model alone, its adapters. */
export async function systems() {
  const { data } = await ask("v1/models");
  return [BM25, ...data.map((model) => ({
    id: model.id,
    name: model.parent ? model.id.slice(model.parent.length + 1) : model.id,
    kind: model.parent ? `adapter (${model.adapter.kind})` : "zero-shot",
    method: model.method,
    calibration: model.calibration ?? null,
  }))];
}

/** Rank with one system; `seconds` is the time from asking to the answer. */
export async function rank(system, query, documents, signal) {
  const texts = documents.map(({ title, text }) => ({ title, text }));
  const body = system === BM25
    ? { query, documents: texts }
    : { model: system.id, query, documents: texts, return_documents: false };
  const started = performance.now();
  const { results } = await ask(system === BM25 ? "page/bm25" : "v1/rerank", { body, signal });
  const seconds = (performance.now() - started) / 1000;
  const hits = results.map((result, place) => ({
    index: result.index,
    rank: place + 1,
    score: result.relevance_score ?? result.score,
    raw: null,
    explanation: null,
  }));
  return { system, hits, seconds };
}

/** Add the raw scores to a ranking, and the explanations where the method gives them and they are not too many. */
export async function explain(ranking, query, documents, signal) {
  const texts = documents.map(({ title, text }) => ({ title, text }));
  const few = documents.length <= MAX_EXPLAINED && ranking.system.method === "query_likelihood";
  const body = {
    model: ranking.system.id, query, documents: texts, return_documents: false, raw_scores: true, explain: few,
  };
  const { results } = await ask("v1/rerank", { body, signal });
  const found = new Map(results.map((result) => [result.index, result]));
  for (const hit of ranking.hits) {
    hit.raw = found.get(hit.index).relevance_score;
    hit.explanation = found.get(hit.index).explanation ?? null;
  }
}
