"""The blind study's page in a real browser, from disk: `make test-browser`.

It needs Debian's chromium (or another one that CHROMIUM names), and playwright, which drives it.
"""

import http.server
import json
import os
import shutil
import threading
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest

from tests.surveys import build, film, key_of, write_sets
from wanjax.data.video import write_video
from wanjax.eval.answers import read_study, read_visits
from wanjax.eval.ratings import analyse_ratings

try:
    from playwright import sync_api as api
except ImportError:
    api = None
CHROMIUM = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("google-chrome")
pytestmark = [
    pytest.mark.skipif(api is None, reason="playwright is missing: make test-browser"),
    pytest.mark.skipif(CHROMIUM is None, reason="no chromium here: apt-get install chromium"),
]

SCORES = {"A": 4, "B": 2, "good": 5, "broken": 1, "same": 3, "again": 3}
STORAGE_THROWS = """
const refuse = () => { throw new DOMException('no', 'SecurityError'); };
Object.defineProperty(window, 'localStorage', { get: refuse });
"""
# As on a phone: nothing plays before the page was touched.
PLAYS_AFTER_A_TAP = """
const start = HTMLMediaElement.prototype.play;
let touched = false;
addEventListener('pointerdown', event => { touched = event.target.id === 'tap'; }, true);
HTMLMediaElement.prototype.play = function () {
  return touched ? start.call(this) : Promise.reject(new DOMException('no', 'NotAllowedError'));
};
"""
# How far the films were apart whenever both were playing, in seconds.
WATCH_GAPS = """() => {
  window.gaps = [];
  const watch = () => {
    if (playing && !moving) gaps.push(Math.abs(films[0].currentTime - films[1].currentTime));
    requestAnimationFrame(watch);
  };
  watch();
}"""


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("study")
    write_sets(folder)
    return build(folder, "--checks", 2)


@pytest.fixture(scope="module")
def browser() -> Iterator["api.Browser"]:
    with api.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def context(browser) -> Iterator["api.BrowserContext"]:
    context = browser.new_context(viewport={"width": 1280, "height": 800})
    yield context
    context.close()


def opened(context, study: Path, rater: str | None = "Anna"):
    """A page of the study, on which an error of its program fails the test."""
    page = context.new_page()
    page.errors = []
    page.on("pageerror", lambda error: page.errors.append(str(error)))
    page.on("console", lambda said: said.type == "error" and page.errors.append(said.text))
    page.goto((study / "index.html").as_uri())
    if rater is not None and page.is_visible("#rater"):
        page.fill("#rater", rater)
        page.press("#rater", "Enter")
    return page


def wait_for(page, condition: str) -> None:
    """The page's own policy forbids playwright's way of waiting for an expression."""
    for _ in range(300):
        if page.evaluate(condition):
            return
        page.wait_for_timeout(50)
    raise AssertionError(f"never came true: {condition}")


def labels_shown(page, study: Path) -> list[str]:
    """What lies at X and at Y, by the key."""
    trial, *files = page.evaluate(
        "(({trial, x, y}) => [trial, x, y])(trials[visit.answers.length])"
    )
    names = {file: label for label, file in key_of(study)["key"][trial]["files"].items()}
    return [names[file] for file in files]


def rate(page, study: Path, by: str) -> None:
    """Answer the pair that is shown, by what the videos are."""
    labels = labels_shown(page, study)
    choice = "xy"[SCORES[labels[0]] < SCORES[labels[1]]]
    if by == "keyboard":
        for _ in range(3):
            for label in labels:
                page.keyboard.press(str(SCORES[label]))
        page.keyboard.press(choice)
        return
    for question in ("fidelity", "stability", "identity"):
        for side, label in zip("xy", labels):
            page.click(f"[data-name={question}-{side}] label:nth-of-type({SCORES[label]})")
    page.click(f"[data-name=choice] label:has([value={choice}])")


def answer(page, study: Path, by: str = "keyboard") -> None:
    """Answer and send a pair."""
    rate(page, study, by)
    wait_for(page, "visit.draft.loops > 0")
    if by == "keyboard":
        page.keyboard.press("Enter")
    else:
        page.click("#send")


def saved(page, path: Path) -> Path:
    with page.expect_download() as download:
        page.click("#save")
    download.value.save_as(path)
    return path


def test_a_whole_visit(context, study, tmp_path):
    """Keyboard and mouse, a reload within a pair, the file that is saved, what is made of it; and
    nothing is asked of any server, nor does the page name what is compared."""
    asked: list[str] = []
    context.on("request", lambda request: asked.append(request.url))
    page = opened(context, study)
    answer(page, study, "keyboard")
    assert page.inner_text("#where") == "Pair 2 of 5"
    page.keyboard.press("4")
    page.reload()
    assert page.inner_text("#where") == "Pair 2 of 5"
    assert page.is_checked("[name=fidelity-x][value='4']")
    answer(page, study, "mouse")
    for by in ("keyboard", "mouse", "keyboard"):
        answer(page, study, by)
    assert page.is_visible("#done")
    page.reload()
    assert page.is_visible("#done")
    file = saved(page, tmp_path / "anna.json")
    assert not page.errors and {url.split(":")[0] for url in asked} <= {"file", "blob"}
    assert not any(name in page.content() for name in ("plain_set", "tuned_set", "shot0"))
    known = read_study(study)
    visits = read_visits([file], known)
    result = analyse_ratings(known, visits)
    assert not result.flagged
    for question in ("fidelity", "stability", "identity"):
        assert (result.every[question].a.mean, result.every[question].b.mean) == (4, 2)
    assert result.every["choice"].a.mean == 1


def test_the_text_is_what_the_file_holds(context, study, tmp_path):
    page = opened(context, study, "Élodie ✓ O'Neil")
    for _ in range(5):
        answer(page, study)
    file = saved(page, tmp_path / "file.json")
    copied = page.input_value("#text")
    assert json.loads(copied) == json.loads(file.read_text())
    (tmp_path / "copied.json").write_text(copied)
    assert read_visits([tmp_path / "copied.json"], read_study(study))[0].rater == "Élodie ✓ O'Neil"


def test_nothing_empty_or_half_answered_goes_through(context, study):
    page = opened(context, study)
    wait_for(page, "visit.draft.loops > 0")
    page.keyboard.press("Enter")
    page.evaluate("send()")
    rate(page, study, "keyboard")
    page.evaluate("() => { delete visit.draft['choice']; check(); }")
    page.keyboard.press("Enter")
    assert page.is_disabled("#send") and page.evaluate("visit.answers.length") == 0
    assert page.inner_text("#missing") == "One answer is missing."


def test_what_was_not_watched_is_not_sent(context, study):
    page = opened(context, study)
    page.evaluate("pause()")
    page.evaluate("() => { visit.draft = {}; check(); }")
    rate(page, study, "keyboard")
    assert page.is_disabled("#send") and "Watch" in page.inner_text("#missing")


def test_double_clicks(context, study):
    page, downloads = opened(context, study), []
    page.on("download", lambda download: downloads.append(download))
    for number in range(5):
        rate(page, study, "keyboard")
        wait_for(page, "visit.draft.loops > 0")
        page.dblclick("#send")
        assert page.evaluate("visit.answers.length") == number + 1
    page.dblclick("#save")
    page.wait_for_timeout(500)
    assert len(downloads) == 1


def test_storage_that_throws(context, study, tmp_path):
    context.add_init_script(STORAGE_THROWS)
    page = opened(context, study)
    assert "keeps nothing" in page.inner_text("#warning")
    for _ in range(5):
        answer(page, study)
    file = saved(page, tmp_path / "anna.json")
    assert read_visits([file], read_study(study)) and not page.errors
    page.reload()
    assert page.is_visible("#welcome")


def test_leaving_without_storage_is_asked_about(context, study):
    context.add_init_script(STORAGE_THROWS)
    page, asked = opened(context, study), []
    page.on("dialog", lambda dialog: (asked.append(dialog.type), dialog.accept()))
    page.keyboard.press("3")
    page.reload()
    assert asked == ["beforeunload"]


def test_two_tabs(context, study):
    """The tab that is behind follows; the same pair is not answered twice."""
    first, second = opened(context, study), opened(context, study)
    first.evaluate("window.removeEventListener('storage', follow)")
    rate(first, study, "keyboard")
    wait_for(first, "visit.draft.loops > 0")
    first.evaluate("pause()")  # or it would follow at the end of its loop
    answer(second, study)
    answer(second, study)
    wait_for(first, "stored('Anna').answers.length === 2")  # another process; it takes a moment
    first.click("#send", force=True)
    assert first.inner_text("#where") == "Pair 3 of 5"
    assert "another tab" in first.inner_text("#said")
    answer(first, study)
    stored = first.evaluate("read(keyOf('Anna')).answers.map(answer => answer.trial)")
    assert len(stored) == len(set(stored)) == 3


def test_an_idle_tab_does_not_undo_what_another_one_did(context, study):
    first, second = opened(context, study), opened(context, study)
    first.evaluate("window.removeEventListener('storage', follow)")
    answer(second, study)
    wait_for(first, "visit.answers.length === 1")  # at the end of its loop
    assert second.evaluate("stored('Anna').answers.length") == 1


def test_films_of_unequal_rates_stay_together(context, study):
    """24 and 16 frames a second, unequal lengths: over five loops, and after a hidden tab in which
    one went on alone, they are less than a frame apart."""
    page = opened(context, study)
    while set(labels_shown(page, study)) != {"A", "B"}:
        answer(page, study)
    rates = page.evaluate("films.map(film => film.duration)")
    assert rates[0] != rates[1]
    wait_for(page, "playing && !moving")
    page.evaluate(WATCH_GAPS)
    start = page.evaluate("visit.draft.loops || 0")
    wait_for(page, f"visit.draft.loops >= {start + 5}")
    wait_for(page, "playing && !moving")
    assert max(page.evaluate("gaps")) < 1 / 24
    hide(page, True)
    assert page.evaluate("films.every(film => film.paused)")
    page.evaluate("films[0].currentTime = 0.5, films[1].currentTime = 0.5 + 3 / 24")
    page.wait_for_timeout(300)
    page.evaluate("gaps.length = 0")
    hide(page, False)
    wait_for(page, "gaps.length > 20")
    assert max(page.evaluate("gaps")) < 1 / 24


def test_a_film_that_lags_is_caught_up_with(context, study):
    """By playing it faster, without a jump."""
    page = opened(context, study)
    wait_for(page, "playing && !moving && films[0].currentTime < 0.5")
    rates = page.evaluate(
        """async () => {
          films[1].currentTime = films[0].currentTime - 2.5 * frame;
          await once(films[1], 'seeked');
          const rates = [];
          for (let n = 0; n < 10; n++) {
            await new Promise(requestAnimationFrame);
            rates.push(films[1].playbackRate);
          }
          return rates;
        }"""
    )
    assert 1 < max(rates) <= 1.2 and min(rates) >= 1


def hide(page, hidden: bool) -> None:
    """Headless tabs are never hidden: say so to the page as a browser would."""
    page.evaluate(
        """hidden => {
          Object.defineProperty(document, 'hidden', { configurable: true, value: hidden });
          document.dispatchEvent(new Event('visibilitychange'));
        }""",
        hidden,
    )


def test_a_film_that_browsers_do_not_play_was_recoded(context, study):
    page = opened(context, study)
    for trial in key_of(study)["key"].values():
        for file in trial["files"].values():
            page.evaluate(f"films[0].src = 'videos/{file}'")
            wait_for(page, "films[0].readyState >= 2")
            assert page.evaluate("[films[0].videoWidth, films[0].videoHeight]") == [160, 96]


def test_on_a_phone_a_tap_starts_both(browser, study):
    context = browser.new_context(
        viewport={"width": 390, "height": 844}, is_mobile=True, has_touch=True
    )
    context.add_init_script(PLAYS_AFTER_A_TAP)
    page = opened(context, study)
    page.wait_for_selector("#tap", state="visible")
    assert page.evaluate("films.every(film => film.paused && film.muted && film.playsInline)")
    page.tap("#tap")
    wait_for(page, "playing && films.every(film => !film.paused)")
    assert page.is_hidden("#tap")
    assert page.evaluate("document.scrollingElement.scrollWidth") == 390
    boxes = [page.locator(name).bounding_box() for name in ("#film-x", "#film-y")]
    assert all(box["x"] >= 0 and box["x"] + box["width"] <= 390 for box in boxes)
    assert boxes[1]["y"] + boxes[1]["height"] <= 0.6 * 844
    for label in page.locator("fieldset label").all():
        assert label.bounding_box()["height"] >= 44
    context.close()


def test_every_rater_has_an_order_and_sides_of_their_own(context, study):
    page = opened(context, study, None)
    orders = [page.evaluate(f"order('rater {i}')") for i in range(200)]
    assert page.evaluate("order('rater 7')") == orders[7]
    names = sorted(key_of(study)["key"])
    assert all(sorted(one["trial"] for one in order) == names for order in orders)
    first = [order[0]["trial"] for order in orders]
    assert min(first.count(name) for name in names) > 20  # of 40
    files = {t: about["files"] for t, about in key_of(study)["key"].items()}
    shown = [(one["trial"], one["x"]) for order in orders for one in order]
    for name, of in files.items():
        for file in of.values():
            assert 70 < shown.count((name, file)) < 130


def test_the_digest_is_sha256(context, study):
    import hashlib

    page = opened(context, study, None)
    for length in (0, 1, 3, 55, 56, 63, 64, 65, 119, 120, 1000):
        text = ("aé✓" * length)[:length]
        assert (
            page.evaluate("text => sha256(text)", text) == hashlib.sha256(text.encode()).hexdigest()
        )


def test_someone_else_on_the_same_device(context, study):
    page = opened(context, study)
    for _ in range(5):
        answer(page, study)
    page.click("#other")
    page.fill("#rater", "Ben")
    page.click("#begin button")
    assert page.inner_text("#where") == "Pair 1 of 5"
    page.evaluate("begin('Anna')")
    assert page.is_visible("#done")


def test_a_missing_video_is_said(context, study, tmp_path):
    shutil.copytree(study, tmp_path / "copy")
    shutil.rmtree(tmp_path / "copy/videos")
    page = opened(context, tmp_path / "copy")
    wait_for(page, "document.getElementById('said').textContent.includes('does not play')")
    rate(page, study, "keyboard")
    assert page.is_disabled("#send")


class SlowServer(http.server.SimpleHTTPRequestHandler):
    """A server without ranges, which pauses within every film."""

    def copyfile(self, source, outputfile):
        data = source.read()
        outputfile.write(data[: len(data) // 2])
        outputfile.flush()
        time.sleep(1 if self.path.endswith(".mp4") else 0)
        outputfile.write(data[len(data) // 2 :])

    def log_message(self, *_):
        pass


def test_from_a_server_films_come_whole_before_they_play(context, study):
    serve = partial(SlowServer, directory=study)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), serve) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        page = context.new_page()
        page.goto(f"http://127.0.0.1:{server.server_port}/index.html")
        page.fill("#rater", "Anna")
        page.press("#rater", "Enter")
        wait_for(page, "films[0].readyState >= 2")
        assert page.evaluate("films.every(film => film.src.startsWith('blob:'))")
        answer(page, study)
        assert page.inner_text("#where") == "Pair 2 of 5"
        page.close()
        server.shutdown()


def test_names_with_markup_are_text(context, tmp_path):
    """A file's or folder's name cannot end the page's own data."""
    for kind in ("plain_set", "tuned_set"):
        folder = tmp_path / kind / "<"
        folder.mkdir(parents=True)
        write_video(folder / "script><b>.mp4", film(1, 17), 16)
    page = opened(context, build(tmp_path, "--checks", 0))
    assert page.inner_text("#where") == "Pair 1 of 1" and not page.errors
