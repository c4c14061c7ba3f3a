"""The report in a real browser: charts, player, themes, phones; no error, no request, nothing of a run executed.

`DIRL_SCREENSHOTS=docs/pictures` also writes the pictures of the documentation, of the run that
`DIRL_SCREENSHOT_RUN=outputs/tiny/rl` names (else of a made-up one).
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from dirl.console.report_runs import report_runs
from dirl.model.tiny import tiny
from dirl.rollout.generate import generate
from dirl.show import completions
from dirl.show.report.page import player_page
from dirl.show.report.samples import play_data
from dirl.show.report.write import write_report
from tests.show.report.run_files import HOSTILE, completion_row, rl_row, sft_row, write_run

sync_api = pytest.importorskip("playwright.sync_api", reason="needs playwright: pip install 'dirl[dev]'")

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium: apt-get install chromium")

# Chromium's own errands (updates, sync) would otherwise knock at the network; root needs --no-sandbox.
ARGUMENTS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update"]
ARGUMENTS += ["--disable-sync", "--disable-quic", "--no-first-run"]
SIZES = {"desktop": (1280, 900), "phone": (390, 844)}


@dataclass
class Visit:
    """An opened page and all it did."""

    page: Any
    processor_seconds: float  # of the page's process until it was ready
    complaints: list[str] = field(default_factory=list)  # console messages and uncaught errors
    requests: list[str] = field(default_factory=list)
    refused: list[str] = field(default_factory=list)  # requests that the page's own policy stopped

    def texts(self, selector: str) -> list[str]:
        return self.page.locator(selector).all_inner_texts()


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with sync_api.sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
        yield opened
        opened.close()


def visit(browser: Any, path: Path, *, size: str = "desktop", theme: str = "light") -> Visit:
    width, height = SIZES[size]
    is_phone = size == "phone"
    context = browser.new_context(
        viewport={"width": width, "height": height},
        color_scheme=theme,
        has_touch=is_phone,
        device_scale_factor=2 if is_phone else 1,
    )
    page = context.new_page()
    found = Visit(page, 0.0)
    page.on("console", lambda message: found.complaints.append(message.text))
    page.on("pageerror", lambda error: found.complaints.append(str(error)))
    page.on("request", lambda request: found.requests.append(request.url))
    page.on("requestfailed", lambda request: found.refused.append(f"{request.url} {request.failure}"))
    devtools = context.new_cdp_session(page)
    devtools.send("Performance.enable", {"timeDomain": "threadTicks"})
    page.goto(path.as_uri())
    page.wait_for_selector("html[data-ready]", timeout=60_000)
    measured = {metric["name"]: metric["value"] for metric in devtools.send("Performance.getMetrics")["metrics"]}
    found.processor_seconds = measured["ProcessTime"]
    return found


def opened_alone(found: Visit, path: Path) -> bool:
    """No complaint, and no request but for the file itself."""
    return found.complaints == [] and found.requests == [path.as_uri()]


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    rows = [rl_row(step) for step in range(1, 61)]
    completions = {30: [completion_row(0, 1.0), completion_row(0, 0.0)], 60: [completion_row(3, 0.5)]}
    return write_report([write_run(tmp_path_factory.mktemp("runs") / "rl", rows, completions, max_steps=60)])


@pytest.mark.parametrize("size", SIZES)
def test_all_charts_are_shown(browser: Any, report: Path, size: str) -> None:
    found = visit(browser, report, size=size)
    assert opened_alone(found, report)
    figures = found.page.locator("figure[data-chart]")
    assert figures.count() >= 14
    for index in range(figures.count()):
        figure = figures.nth(index)
        paths = figure.locator("svg path")
        assert paths.count() >= 1, figure.get_attribute("data-chart")
        assert all(
            len(d) > 10 and "NaN" not in d for d in paths.evaluate_all("all => all.map(p => p.getAttribute('d'))")
        )
    assert found.page.locator("figure[data-chart='Held-out accuracy'] path.band").count() == 1
    assert found.page.locator("figure[data-chart='Groups by pass rate'] path.layer").count() == 6
    # Nothing sticks out: a phone does not scroll sideways, and axis labels are not scaled below reading size.
    assert found.page.evaluate("document.documentElement.scrollWidth") <= SIZES[size][0]
    assert found.page.locator("svg text").first.evaluate("text => text.getBoundingClientRect().height") > 9


def test_a_chart_answers_the_pointer(browser: Any, report: Path) -> None:
    found = visit(browser, report)
    chart = found.page.locator("figure[data-chart='Held-out accuracy']")
    box = chart.locator("svg").bounding_box()
    found.page.mouse.move(box["x"] + box["width"] - 12, box["y"] + 60)
    assert "step 60" in chart.locator(".tip").inner_text() and "± 0.02" in chart.locator(".tip").inner_text()


def states(found: Visit) -> list[str]:
    names = found.page.locator(".token[data-token]").evaluate_all("all => all.map(t => t.classList[1])")
    return [{"masked": ".", "new": "N", "committed": "c"}[name] for name in names]


def test_the_slider_plays_the_denoising(browser: Any, report: Path) -> None:
    """Blocks of 2, 4 and 4 tokens with steps [1 2] [1 1 3 2] [1 1 1 2]: seven steps in all."""
    found = visit(browser, report)
    page, slider = found.page, found.page.locator(".player input[type=range]")
    assert (slider.get_attribute("max"), slider.input_value()) == ("7", "7")
    expected = [
        "..........",
        "N.........",
        "cN........",
        "ccNN......",
        "cccc.N....",
        "ccccNc....",
        "ccccccNNN.",
        "cccccccccN",
    ]
    for step, wanted in enumerate(expected):
        slider.evaluate("(e, step) => { e.value = step; e.dispatchEvent(new Event('input')); }", step)
        assert "".join(states(found)) == wanted
        assert page.locator(".count").inner_text() == f"step {step} of 7"
    page.get_by_label("one step back").click()
    assert "".join(states(found)) == expected[6]
    page.get_by_label("one step on").click()
    assert "".join(states(found)) == expected[7]
    colors = page.locator(".token[data-token]").evaluate_all("all => all.map(t => getComputedStyle(t).backgroundColor)")
    assert colors[9] == "rgb(185, 238, 197)" and colors[0] == "rgba(0, 0, 0, 0)"
    assert page.locator(".block").count() == 3
    borders = page.locator(".block").evaluate_all("all => all.map(b => getComputedStyle(b).borderTopWidth)")
    assert borders == ["1px"] * 3
    page.locator(".token[data-token='4']").hover()
    assert "step 3 of its block (5 in all), confidence 0.500" in page.locator(".facts").inner_text()
    assert "confidence 0.500" in page.locator(".token[data-token='4']").get_attribute("title")
    assert opened_alone(found, report)


def test_play_and_the_choice_of_completions(browser: Any, report: Path) -> None:
    found = visit(browser, report)
    labels = found.texts(".card select option")
    assert labels == [
        "step 60, group 3: best, reward 0.5",
        "step 30, group 0: best, reward 1",
        "step 30, group 0: worst, reward 0",
    ]
    found.page.locator(".card select").select_option("2")
    assert found.texts(".question") == ["question 0"]
    found.page.get_by_text("Play", exact=True).click()
    sync_api.expect(found.page.locator(".player input")).to_have_value("7", timeout=20_000)
    assert found.complaints == []


def test_themes(browser: Any, report: Path) -> None:
    grounds = {}
    for theme in ("light", "dark"):
        found = visit(browser, report, theme=theme)
        ground = "getComputedStyle(document.body).backgroundColor"
        grounds[theme] = found.page.evaluate(ground)
        found.page.get_by_label("light or dark").click()
        grounds[theme + " turned"] = found.page.evaluate(ground)
    assert grounds["light"] == grounds["dark turned"] != grounds["dark"] == grounds["light turned"]


def test_two_runs_stand_side_by_side_with_one_scale(browser: Any, tmp_path: Path) -> None:
    low = write_run(tmp_path / "low", [{"step": s, "reward": 0.1, "loss": 1.0} for s in range(1, 9)], beta=0.0)
    high = write_run(tmp_path / "high", [{"step": s, "reward": 0.9} for s in range(1, 9)], beta=0.5)
    path = write_report([low, high])
    found = visit(browser, path)
    assert opened_alone(found, path)
    curves = found.page.locator("figure[data-chart='Reward'] path.curve")
    lower, upper = (curves.nth(i).bounding_box() for i in range(2))
    assert lower["x"] < upper["x"] and lower["y"] > upper["y"] + 50  # 0.1 far below 0.9, on shared axes
    assert "not recorded" in found.page.inner_text("body")  # the loss of the second run
    assert "beta 0.0 0.5" in " ".join(found.page.locator("details table").first.inner_text().split())


def test_groups_have_lines_and_bands(browser: Any, tmp_path: Path) -> None:
    for seed in range(3):
        for name in ("a", "b"):
            rows = [rl_row(step) | {"reward": 0.5 + seed / 9 + (name == "b")} for step in range(1, 31)]
            write_run(tmp_path / f"{name}{seed}", rows, model={"path": name}, seed=seed)
    path = report_runs([str(tmp_path / "*")], None, "model.path")
    found = visit(browser, path)
    assert opened_alone(found, path)
    assert found.page.locator("figure").count() >= 14
    reward = found.page.locator("figure[data-chart='Reward: reward']")
    assert reward.locator("path.band").count() == 2 == reward.locator("path.curve").count()
    lower, upper = (reward.locator("path.band").nth(i).bounding_box() for i in range(2))
    assert lower["y"] > upper["y"] + upper["height"]  # no band without the whole of its runs, nor with another's
    reward.scroll_into_view_if_needed()
    box = reward.locator("svg").bounding_box()
    found.page.mouse.move(box["x"] + box["width"] - 12, box["y"] + 60)
    assert "a 0.6111 (0.5 to 0.7222)" in reward.locator(".tip").inner_text()
    assert "reward 0.6111 ± 0.064 (3 runs) 1.611 ± 0.064 (3 runs)" in " ".join(found.page.inner_text("table").split())
    assert found.page.evaluate("document.documentElement.scrollWidth") <= SIZES["desktop"][0]


def test_hostile_texts_stay_texts(browser: Any, tmp_path: Path) -> None:
    hostile = completion_row(0, 1.0, question=HOSTILE, answer=HOSTILE, token_texts=[HOSTILE] * 10)
    row = rl_row(1) | {f"rewards/{HOSTILE}/mean": 1.0}
    path = write_report([write_run(tmp_path / "run", [row], {1: [hostile]}, run_name=HOSTILE)])
    found = visit(browser, path)
    found.page.wait_for_timeout(200)
    assert opened_alone(found, path)
    assert found.page.title() != "owned" and found.page.locator("img").count() == 0
    assert found.texts(".question")[0].startswith("</script><script>")


def test_even_an_injected_script_does_not_run(browser: Any, report: Path, tmp_path: Path) -> None:
    """The policy holds where escaping would fail."""
    broken = tmp_path / "broken.html"
    injected = "<script>document.title='owned'</script><img src='https://example.org/x.png'></body>"
    broken.write_text(report.read_text().replace("</body>", injected))
    found = visit(browser, broken)
    found.page.wait_for_timeout(200)
    assert found.page.title() != "owned"
    assert any("Content Security Policy" in text for text in found.complaints)
    assert found.refused == ["https://example.org/x.png csp"]  # nothing left for the network


def test_two_thousand_steps_open_in_two_seconds(browser: Any, tmp_path: Path) -> None:
    texts, steps = ["word "] * 4000, [1, 2, 1, 1] * 1000
    long = completion_row(0, 1.0, prompt_ids=[1] * 8, token_texts=texts, step_map=steps, logprobs=[-0.2] * 4000)
    long |= {"token_ids": [1] * 4000, "completion_length": 4000}
    completions = {step: [long, long | {"reward": 0.0}] for step in range(200, 2001, 200)}
    path = write_report([write_run(tmp_path / "run", [rl_row(step) for step in range(1, 2001)], completions)])
    assert path.stat().st_size < 5_000_000
    # Processor time of the page's process, 0.4 s when this was written; the clock of a busy machine says nothing.
    assert min(visit(browser, path).processor_seconds for _ in range(2)) < 2


def test_an_sft_run(browser: Any, tmp_path: Path) -> None:
    path = write_report([write_run(tmp_path / "run", [sft_row(step) for step in range(1, 41)])])
    found = visit(browser, path)
    assert opened_alone(found, path)
    assert found.page.locator("figure[data-chart='Held-out loss by noise level'] path.curve").count() == 4


def test_the_player_of_a_notebook(browser: Any, tmp_path: Path) -> None:
    sample = play_data(completion_row(0, 1.0), label="one", decode=None, block_length=0)
    assert sample is not None
    path = tmp_path / "player.html"
    path.write_text(player_page([sample]))
    found = visit(browser, path)
    assert opened_alone(found, path)
    assert found.page.locator(".token[data-token]").count() == 10 and found.page.locator("figure").count() == 0


def test_the_frame_that_a_notebook_shows(browser: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As `.show()` hands it over: the player in a sandboxed frame, its policy and its script's hash intact."""
    display = pytest.importorskip("IPython.display", reason="needs IPython: pip install 'dirl[dev]'")
    shown: list[Any] = []
    monkeypatch.setattr(completions, "_is_notebook", lambda: True)
    monkeypatch.setattr(display, "display", shown.append)
    model, tokenizer = tiny()
    generate(model, tokenizer, ["1+1=", "2+2="], max_completion_length=16).show()
    path = tmp_path / "notebook.html"
    path.write_text(f"<!doctype html><html data-ready>{shown[0].data}</html>")
    found = visit(browser, path)
    frame = found.page.frame_locator("iframe")
    frame.locator("html[data-ready]").wait_for(state="attached")
    assert frame.locator(".token[data-token]").count() >= 4 and frame.locator("option").count() == 2
    frame.get_by_label("one step back").click()
    assert frame.locator(".token.masked[data-token]").count() >= 1
    assert found.complaints == []


@pytest.mark.skipif("DIRL_SCREENSHOTS" not in os.environ, reason="set DIRL_SCREENSHOTS=docs/pictures to take pictures")
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("theme", ["light", "dark"])
def test_screenshots(browser: Any, report: Path, size: str, theme: str, tmp_path: Path) -> None:
    if run := os.environ.get("DIRL_SCREENSHOT_RUN"):
        report = report_runs([run], str(tmp_path / "report.html"))
    found = visit(browser, report, size=size, theme=theme)
    slider = found.page.locator(".player input[type=range]").first
    slider.evaluate("e => { e.value = Math.ceil(e.max / 2); e.dispatchEvent(new Event('input')); }")
    folder = Path(os.environ["DIRL_SCREENSHOTS"])
    take_picture(found.page, folder / f"report_{size}_{theme}.png", full_page=size == "desktop")
    if size == "phone":
        found.page.locator(".player").first.scroll_into_view_if_needed()
        take_picture(found.page, folder / f"report_player_{size}_{theme}.png")


def take_picture(page: Any, path: Path, *, full_page: bool = False) -> None:
    """A screenshot of 256 colours, which a page like this hardly shows, a third as large."""
    page.screenshot(path=path, full_page=full_page)
    Image.open(path).convert("RGB").quantize(256).save(path, optimize=True)
