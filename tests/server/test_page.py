"""The page in a real browser: Debian's Chromium, driven by Playwright, against the real application with tiny-lm."""

import functools
import re
import shutil
import threading

import pytest

from qpeft.evaluation.calibration import Platt
from qpeft.evaluation.calibration_file import Calibration, ScoreOrigin, write_calibration
from qpeft.loading import load_lm
from qpeft.model_config import ModelConfig
from qpeft.server.ranking import MAX_EXPLAINED
from qpeft.server.settings import Settings
from qpeft.template import load_template
from tiny_server import Watched, ready, running, wait_until

playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright (pip install 'qpeft[browser]')")
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium (apt-get install chromium)")
pytestmark = needs_chromium
PASSAGES = (
    "Air scatters short waves more than long ones, so the sky is blue.",
    "The sea is salty.",
    "Cats sleep a lot.",
)
KEY = "sesame-open"
FOCUSED = """() => {
  const focused = document.activeElement, style = getComputedStyle(focused);
  const name = focused.id || focused.value || focused.textContent.trim().slice(0, 20);
  return [name, style.outlineStyle, parseFloat(style.outlineWidth)];
}"""
UNNAMED = """() => [...document.querySelectorAll("input, select, textarea, button")]
  .filter((each) => !(each.labels?.length || each.textContent.trim() || each.getAttribute("aria-label")))
  .map((each) => each.outerHTML)"""
CONTRAST = """() => {
  const parse = (text) => text.match(/[\\d.]+/g).map(Number);
  const over = (top, below) => {
    const a = top[3] ?? 1;
    return [0, 1, 2].map((i) => a * top[i] + (1 - a) * below[i]);
  };
  const light = (rgb) => {
    const [r, g, b] = rgb.map((v) => (v /= 255) <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const behind = (element) => {
    const chain = [];
    for (let e = element; e; e = e.parentElement) chain.unshift(parse(getComputedStyle(e).backgroundColor));
    return chain.reduce((below, top) => over(top, below), [255, 255, 255]);
  };
  const low = [];
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  for (let node; (node = walker.nextNode());) {
    const element = node.parentElement;
    const seen = element.checkVisibility() && !element.closest(".hidden, noscript, option");
    if (!node.textContent.trim() || !seen) continue;
    const below = behind(element), ink = over(parse(getComputedStyle(element).color), below);
    const [a, b] = [light(ink), light(below)].sort((x, y) => y - x);
    if ((a + 0.05) / (b + 0.05) < 4.5) low.push([node.textContent.trim().slice(0, 30), ink, below]);
  }
  return low;
}"""
"""Texts whose contrast with what lies behind them is below 4.5, as WCAG 2 counts it."""


@functools.cache
def tiny_lm():
    return load_lm(ModelConfig("tiny-lm", dtype="float32", passage_cache=0.25))


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as driver:
        launched = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield launched
        launched.close()


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """Serve tiny-lm, calibrated, with its embedded adapters."""
    lm = tiny_lm()
    template = load_template("plain")
    origin = ScoreOrigin.of(lm.describe(), {"template": {"name": "plain", "fingerprint": template.fingerprint}})
    path = tmp_path_factory.mktemp("calibration") / "calibration.json"
    write_calibration(Calibration(Platt(1.5, 0.0), origin, centred=True), path)
    with ready(tiny_lm, Settings(port=0, max_wait_ms=0, calibration=str(path))) as client:
        yield client


@pytest.fixture
def opened(browser):
    """Return a function that opens the page of a server; whatever the browser complains of fails the test."""
    contexts, complaints = [], []

    def open_page(client, path="/", **options):
        context = browser.new_context(**{"viewport": {"width": 1280, "height": 900}} | options)
        contexts.append(context)
        page = context.new_page()
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("console", lambda said: complaints.append(said.text) if "Content Security" in said.text else None)
        page.goto(str(client.base_url) + path)
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert not complaints


def expect(locator):
    """Return what waits for a condition; the condition is what counts, not the time."""
    playwright.expect.set_options(timeout=60_000)
    return playwright.expect(locator)


def write(page, query, passages):
    """Put a query and passages of one's own in place of the example."""
    expect(page.locator("#count")).not_to_have_text("0")
    page.locator("#editor > summary").click()
    page.get_by_role("button", name="Remove all").click()
    page.get_by_label("Query", exact=True).fill(query)
    page.get_by_label(re.compile("Add passages")).fill("\n".join(passages))


def few(page):
    """Take fewer candidates of the example, to be quick."""
    expect(page.locator("#count")).to_have_text("10")
    page.get_by_label("Candidates").select_option("5")
    expect(page.locator("#count")).to_have_text("5")


def rank(page):
    page.get_by_role("button", name="Rank", exact=True).click()
    expect(page.locator("#status")).to_have_text(re.compile("Explained"))


def order(page, name):
    """Return the passages of a column, as they begin, best first."""
    return [
        text.strip() for text in page.get_by_role("region", name=name, exact=True).locator(".excerpt").all_inner_texts()
    ]


def by_api(client, query, passages, model):
    body = {"query": query, "documents": list(passages), "model": model, "raw_scores": True}
    return client.post("/v1/rerank", json=body).json()["results"]


def test_rankings_stand_side_by_side_and_are_the_servers(opened, server):
    page = opened(server)
    write(page, "why is the sky blue", PASSAGES)
    rank(page)
    names = ["tiny-lm", "tiny-lm-qpeft-a", "tiny-lm-qpeft-r"]
    assert page.locator("#columns h3").all_inner_texts() == ["BM25", *names]
    for name in names:
        model = "tiny-lm" if name == "tiny-lm" else f"tiny-lm:{name}"
        expected = by_api(server, "why is the sky blue", PASSAGES, model)
        assert order(page, name) == [PASSAGES[result["index"]] for result in expected]
        shown = page.get_by_role("region", name=name, exact=True).locator(".raw").all_inner_texts()
        assert shown == [f"−{-result['relevance_score']:.2f} nats" for result in expected]
    assert order(page, "BM25")[0] == PASSAGES[0]
    assert re.search(r"\d+ ms|\d+\.\d s", page.get_by_role("region", name="tiny-lm", exact=True).inner_text())
    body = {"query": "why is the sky blue", "documents": list(PASSAGES)}
    likely = [result["relevance_score"] for result in server.post("/v1/rerank", json=body).json()["results"]]
    shown = page.get_by_role("region", name="tiny-lm", exact=True).locator(".score").all_inner_texts()
    assert shown == [f"P {value:.2f}" for value in likely]
    assert "platt, centred" in page.get_by_role("region", name="tiny-lm", exact=True).inner_text()
    assert "not calibrated" in page.get_by_role("region", name="tiny-lm-qpeft-a").inner_text()


def test_movement_is_against_the_first_column(opened, server):
    page = opened(server)
    few(page)
    rank(page)
    first, places = order(page, "BM25"), []
    for name in ("tiny-lm", "tiny-lm-qpeft-a"):
        moved = page.get_by_role("region", name=name, exact=True).locator(".moved").all_text_contents()
        for place, (text, movement) in enumerate(zip(order(page, name), moved, strict=True)):
            won = first.index(text) - place
            places.append(won)
            assert movement.startswith(
                f"▲{won} up {won} " if won > 0 else f"▼{-won} down {-won} " if won < 0 else "= same"
            )
    assert min(places) < 0 < max(places)
    assert page.locator(".lines path").count() == 3 * 5


def test_an_example_comes_with_candidates_and_grades(opened, server):
    page = opened(server)
    page.get_by_label("Example question").select_option(label="does a mother octopus live on after her babies hatch")
    page.get_by_label("Candidates").select_option("5")
    expect(page.locator("#count")).to_have_text("5")
    expect(page.get_by_label("Query", exact=True)).to_have_value("does a mother octopus live on after her babies hatch")
    rank(page)
    assert page.get_by_role("region", name="BM25").locator(".badge").all_inner_texts()
    page.locator("#query").fill("something else that nobody judged")
    rank(page)
    assert not page.get_by_role("region", name="BM25").locator(".badge").all_inner_texts()


def test_candidates_that_come_late_do_not_replace_others(opened, server):
    page = opened(server)
    expect(page.locator("#count")).to_have_text("10")
    late = []
    page.route("**/page/candidates?*depth=20", lambda route: late.append(route))
    page.get_by_label("Candidates").select_option("20")
    page.get_by_label("Candidates").select_option("5")
    expect(page.locator("#count")).to_have_text("5")
    with page.expect_response("**/page/candidates?*depth=20"):
        late[0].continue_()
    page.wait_for_timeout(100)
    expect(page.locator("#count")).to_have_text("5")


def test_only_the_systems_chosen_rank(opened, server):
    page = opened(server)
    few(page)
    for name in ("BM25", "tiny-lm-qpeft-r"):
        page.get_by_role("checkbox", name=name).uncheck()
    rank(page)
    assert page.locator("#columns h3").all_inner_texts() == ["tiny-lm", "tiny-lm-qpeft-a"]
    page.get_by_role("checkbox", name="tiny-lm-qpeft-a").uncheck()
    page.get_by_role("checkbox", name="tiny-lm-qpeft-r").check()
    rank(page)
    assert page.locator("#columns h3").all_inner_texts() == ["tiny-lm", "tiny-lm-qpeft-r"]


def test_the_list_of_adapters_follows_the_server(opened, server):
    page = opened(server)
    few(page)
    expect(page.get_by_role("checkbox", name="tiny-lm-qpeft-r")).to_be_visible()
    try:
        assert server.delete("/v1/adapters/tiny-lm-qpeft-r").status_code == 200
        page.get_by_role("button", name="Refresh the list").click()
        expect(page.get_by_role("checkbox", name="tiny-lm-qpeft-r")).to_have_count(0)
        expect(page.locator("#status")).to_have_text("The server has 2 rankers.")
    finally:
        assert server.post("/v1/adapters/tiny-lm-qpeft-r").status_code == 200
    rank(page)
    assert page.locator("#columns h3").all_inner_texts()[-1] == "tiny-lm-qpeft-r"


def test_explanations_are_the_servers(opened, server):
    page = opened(server)
    write(page, "why is the sky blue", PASSAGES)
    rank(page)
    page.get_by_role("region", name="tiny-lm-qpeft-r").get_by_role("button").last.click()
    dialog = page.get_by_role("dialog")
    worst = by_api(server, "why is the sky blue", PASSAGES, "tiny-lm:tiny-lm-qpeft-r")[-1]["index"]
    expect(dialog.get_by_role("heading", level=2)).to_contain_text(PASSAGES[worst][:40])
    body = {"query": "why is the sky blue", "documents": list(PASSAGES), "model": "tiny-lm:tiny-lm-qpeft-r"}
    results = server.post("/v1/rerank", json=body | {"explain": True}).json()["results"]
    explanation = next(result["explanation"] for result in results if result["index"] == worst)
    tokens = dialog.locator("section").last.locator(".tokens li")
    assert tokens.count() == len(explanation["query_tokens"])
    for item, token in zip(tokens.all(), explanation["query_tokens"], strict=True):
        change = token["hinted"] - token["log_prob"]
        assert f"{abs(change):.2f}" in item.inner_text()
        if abs(change) > 0.006:
            assert ("+" if change > 0 else "−") in item.inner_text(), "colour is not the only sign"
            assert item.get_attribute("class") == ("up" if change > 0 else "down")
    marked = dialog.locator("section").last.locator("mark")
    assert marked.count() == sum(token["chosen"] is not None for token in explanation["passage_tokens"]) > 0
    text = (
        dialog.locator("section")
        .last.locator(".text")
        .evaluate("node => { for (const sup of node.querySelectorAll('sup')) sup.remove(); return node.textContent }")
    )
    assert text == "".join(token["text"] for token in explanation["passage_tokens"])
    page.keyboard.press("Escape")
    expect(dialog).to_have_count(0)


def test_a_passage_without_tokens_is_last_and_says_so(opened, server):
    page = opened(server)
    write(page, "why is the sky blue", ["\u200b\u200c", "The sea is salty."])
    rank(page)
    assert order(page, "tiny-lm")[0] == "The sea is salty."
    last = page.get_by_role("region", name="tiny-lm", exact=True).get_by_role("button").last
    assert last.locator(".score").inner_text() == "P 0.00"
    last.click()
    expect(page.get_by_role("dialog")).to_contain_text("The model reads no token of it.")


def test_what_was_typed_is_text_and_nothing_else(opened, server):
    page = opened(server)
    evil = '<img src=x onerror="document.title=1"><b>bold</b>'
    write(page, f"{evil} query", [f"{evil} first", "second passage"])
    rank(page)
    assert f"{evil} first" in order(page, "tiny-lm")
    page.get_by_role("region", name="tiny-lm-qpeft-r").get_by_role("button", name=re.compile("first")).click()
    dialog = page.get_by_role("dialog")
    expect(dialog.locator("#whole")).to_have_text(f"{evil} first")
    expect(dialog.locator("section").last.locator(".text")).to_contain_text("<b>bold</b> first")
    assert page.locator("main img, main b:has-text('bold'), dialog img, dialog b:text-is('bold')").count() == 0
    assert page.title() == "qpeft"


def test_passages_are_pasted_added_edited_and_removed(opened, server):
    page = opened(server)
    write(page, "sky", [])
    more = page.get_by_label(re.compile("Add passages"))
    more.fill("one\ntwo\n\n")
    page.get_by_role("button", name="Add", exact=True).click()
    expect(page.locator("#count")).to_have_text("2")
    more.fill("a block\nof two lines\n\n  \nanother block\r\n")
    page.get_by_role("button", name="Add", exact=True).click()
    fields = page.locator("#passages textarea")
    assert [field.input_value() for field in fields.all()] == ["one", "two", "a block of two lines", "another block"]
    page.get_by_role("button", name="Remove passage 2").click()
    expect(page.get_by_role("button", name="Remove passage 2")).to_be_focused()
    page.get_by_label("Passage 1", exact=True).fill("the sky")
    rank(page)
    assert sorted(order(page, "BM25")) == ["a block of two lines", "another block", "the sky"]


def test_the_keyboard_is_enough(opened, server):
    page = opened(server)
    few(page)
    page.locator(".skip").focus()
    reached = []
    for _ in range(30):
        page.keyboard.press("Tab")
        focused = page.evaluate(FOCUSED)
        reached.append(focused[0])
        assert focused[1] != "none", focused
        assert focused[2] >= 2, focused
        if focused[0] == "rank":
            break
    kept = [name for name in reached if name in ("question", "depth", "query", "bm25", "refresh", "rank")]
    assert kept == ["question", "depth", "query", "bm25", "refresh", "rank"]
    page.keyboard.press("Enter")
    expect(page.locator("#status")).to_have_text(re.compile("Explained"))
    page.keyboard.press("Tab")
    page.keyboard.press("Tab")
    page.keyboard.press("Enter")
    expect(page.get_by_role("dialog")).to_be_visible()
    expect(page.get_by_role("button", name="Close", exact=True)).to_be_focused()
    opener = "document.querySelector('.card.followed')"
    page.keyboard.press("Escape")
    assert page.evaluate(f"{opener} === document.activeElement && document.activeElement.classList.contains('card')")
    page.locator("#query").focus()
    page.keyboard.press("Control+Enter")
    expect(page.locator("#status")).to_have_text(re.compile("Ranking"))
    expect(page.locator("#status")).to_have_text(re.compile("Explained"))


def test_every_field_has_a_name_and_changes_are_announced(opened, server):
    page = opened(server)
    page.locator("#editor > summary").click()
    page.locator("#key > summary").click()
    assert page.evaluate(UNNAMED) == []
    assert page.locator("#status").get_attribute("role") == "status"
    assert page.locator("#alert").get_attribute("role") == "alert"
    assert page.locator("html").get_attribute("lang") == "en"


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_phone_needs_no_sideways_scrolling(opened, server, scheme):
    page = opened(server, viewport={"width": 360, "height": 740}, color_scheme=scheme, has_touch=True)
    page.locator("#editor > summary").click()
    page.locator("#key > summary").click()
    fits = "() => document.documentElement.scrollWidth <= innerWidth"
    assert page.evaluate(fits)
    assert page.locator("#key .panel").bounding_box()["x"] >= 0
    page.locator("#key > summary").click()
    write_long = "a" * 400
    page.get_by_label("Query", exact=True).fill(f"why {write_long}")
    rank(page)
    assert page.evaluate(fits)
    assert page.evaluate(
        "() => { const c = document.getElementById('columns'); return c.scrollWidth <= c.clientWidth + 1 }"
    )
    visible = [
        section.get_attribute("aria-label")
        for section in page.locator("#columns > section").all()
        if section.is_visible()
    ]
    assert visible == ["tiny-lm"]
    page.locator("#views").get_by_role("button", name="tiny-lm-qpeft-a").click()
    visible = [
        section.get_attribute("aria-label")
        for section in page.locator("#columns > section").all()
        if section.is_visible()
    ]
    assert visible == ["tiny-lm-qpeft-a"]
    assert page.locator("#views").get_by_role("button", name="tiny-lm-qpeft-a").get_attribute("aria-pressed") == "true"
    page.locator("#columns section.shown .card").first.click()
    assert page.evaluate("() => { const d = document.getElementById('why'); return d.scrollWidth <= d.clientWidth }")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_all_text_has_contrast(opened, server, scheme):
    page = opened(server, color_scheme=scheme)
    few(page)
    page.locator("#editor > summary").click()
    rank(page)
    background = page.evaluate("() => getComputedStyle(document.body).backgroundColor")
    assert background == ("rgb(255, 255, 255)" if scheme == "light" else "rgb(21, 23, 26)")
    page.locator("#columns section").last.locator(".card").first.click()
    assert page.evaluate(CONTRAST) == []


# Trouble


@pytest.fixture(scope="module")
def locked(server):
    with ready(tiny_lm, Settings(port=0, max_wait_ms=0, max_documents=8), keys=[KEY]) as client:
        yield client


def test_a_key_is_asked_for_and_kept_in_the_tab_alone(opened, locked):
    page = opened(locked)
    alert = page.get_by_role("alert")
    expect(alert).to_have_text("This server needs an API key.")
    key = page.get_by_label("Key for this server")
    expect(key).to_be_focused()
    key.fill("wrong")
    page.keyboard.press("Enter")
    expect(alert).to_have_text("The server does not accept this API key.")
    key.fill(KEY)
    page.keyboard.press("Enter")
    expect(page.get_by_role("checkbox", name="tiny-lm-qpeft-a")).to_be_visible()
    expect(alert).to_have_count(0)
    page.get_by_label("Candidates").select_option("5")
    expect(page.locator("#count")).to_have_text("5")
    rank(page)
    assert page.evaluate("() => [localStorage.length, document.cookie, Object.values(sessionStorage)]") == [
        0,
        "",
        [KEY],
    ]
    assert KEY not in page.url
    page.reload()
    expect(page.get_by_role("checkbox", name="tiny-lm-qpeft-a")).to_be_visible()
    page.locator("#key > summary").click()
    page.get_by_role("button", name="Forget it").click()
    page.get_by_role("button", name="Rank", exact=True).click()
    expect(alert).to_have_text("This server needs an API key.")


def test_refusals_are_shown_in_words(opened, locked, server):
    page = opened(locked)
    page.get_by_label("Key for this server").fill(KEY)
    page.keyboard.press("Enter")
    expect(page.get_by_role("checkbox", name="tiny-lm-qpeft-a")).to_be_visible()
    expect(page.locator("#count")).to_have_text("10")
    page.get_by_role("button", name="Rank", exact=True).click()
    too_many = "That is too much at once: 10 documents; at most 8 are allowed."
    expect(page.get_by_role("alert")).to_have_text(too_many)
    assert page.locator("#columns .failed").all_inner_texts() == [too_many] * 4
    expect(page.locator("#status")).to_have_text("")
    write(page, "word " * 3000, PASSAGES)
    page.get_by_role("checkbox", name="BM25").uncheck()
    page.get_by_role("button", name="Rank", exact=True).click()
    expect(page.get_by_role("alert")).to_contain_text("The server cannot use this input: query")
    expect(page.get_by_role("alert")).to_contain_text("leaves no room for a passage")


def test_what_is_missing_is_said_before_the_server_is_asked(opened, server):
    page = opened(server)
    write(page, " ", [])
    for message, focused in (("Write a query first.", "#query"), ("Add passages first.", "#more")):
        page.get_by_role("button", name="Rank", exact=True).click()
        expect(page.get_by_role("alert")).to_have_text(message)
        expect(page.locator(focused)).to_be_focused()
        page.locator("#query").fill("why")
    page.locator("#more").fill("because")
    for box in page.get_by_role("checkbox").all():
        box.uncheck()
    page.get_by_role("button", name="Rank", exact=True).click()
    expect(page.get_by_role("alert")).to_have_text("Choose what to rank with first.")


def test_a_full_queue_and_a_server_that_is_gone(opened):
    held = Watched(tiny_lm())
    with ready(
        lambda: held, Settings(port=0, max_wait_ms=0, max_queue_pairs=4, max_documents=4, max_batch_pairs=4)
    ) as client:
        page = opened(client)
        expect(page.locator("#count")).to_have_text("10")
        write(page, "sky", ["one sky", "two skies", "three seas"])
        held.forget()
        held.close()
        body = {"query": "q", "documents": ["a", "b", "c", "d"]}
        waiting = [threading.Thread(target=client.post, args=("/v1/rerank",), kwargs={"json": body}) for _ in range(2)]
        try:
            waiting[0].start()
            held.wait_for_batch()
            waiting[1].start()
            wait_until(lambda: client.app.state.service.batcher.queued == 4)
            page.get_by_role("checkbox", name="BM25").uncheck()
            page.get_by_role("button", name="Rank", exact=True).click()
            message = re.compile(r"The server is busy: its queue is full. Try again in \d+ s.")
            expect(page.get_by_role("alert")).to_have_text(message)
        finally:
            held.open()
            for thread in waiting:
                thread.join(60)
    page.get_by_role("button", name="Rank", exact=True).click()
    expect(page.get_by_role("alert")).to_have_text("The server cannot be reached. Is it still running?")


def test_a_server_that_is_starting(opened):
    opening = threading.Event()

    def slow():
        assert opening.wait(60)
        return tiny_lm()

    with running(slow) as client:
        try:
            page = opened(client)
            expect(page.locator("#served")).to_have_text("the model is being opened …")
            expect(page.get_by_role("alert")).to_have_count(0)
            expect(page.locator("#count")).to_have_text("10")
            page.get_by_role("button", name="Rank", exact=True).click()
            expect(page.get_by_role("alert")).to_have_text("Not yet: the server is loading.")
        finally:
            opening.set()
        expect(page.locator("#served")).to_have_text("tiny-lm · 2 adapters")
        rank(page)


def test_too_many_to_explain_are_ranked_all_the_same(opened, server):
    page = opened(server)
    for name in ("tiny-lm-qpeft-a", "tiny-lm-qpeft-r"):
        page.get_by_role("checkbox", name=name).uncheck()
    write(page, "sky", [f"the sky of day {day}" for day in range(MAX_EXPLAINED + 1)])
    rank(page)
    assert page.get_by_role("region", name="tiny-lm", exact=True).locator(".raw").first.inner_text().endswith(" nats")
    page.get_by_role("region", name="tiny-lm", exact=True).get_by_role("button").first.click()
    expect(page.get_by_role("dialog")).to_contain_text(f"Up to {MAX_EXPLAINED} passages are explained")
