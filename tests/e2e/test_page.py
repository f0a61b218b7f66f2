"""The page as it is served: plan, start, watch, stop, go on, report, answer.

Once over HTTP, which runs everywhere. Once more in a browser, as people use it: that needs a
Chromium, which no package index has, so it is not part of the suite but of ``make browser``
(``BURNISH_BROWSER=/usr/bin/chromium``), which fails where there is none.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import urllib.request

import pytest

from burnish.fit.assets import GLYPH_VIT

pytestmark = pytest.mark.slow

BROWSER = os.environ.get("BURNISH_BROWSER", "")
#: a plan of few recipes for a model of 2.6 MiB, and a training that lasts until it is stopped
RECIPE, STEPS = "lora(rank=4)", 4000


@contextlib.contextmanager
def serving(root):
    """``burnish ui`` on a port that is free; its address."""
    process = subprocess.Popen(
        [sys.executable, "-m", "burnish", "ui", str(root), "--port", "0", "--no-browser"],
        stdout=subprocess.PIPE, text=True)
    try:
        line = process.stdout.readline()
        yield re.search(r"http://127\.0\.0\.1:[0-9]+/", line).group(), process
    finally:
        process.send_signal(signal.SIGINT)
        assert process.wait(20) == 0
        process.stdout.close()


@pytest.fixture
def root(tmp_path):
    shutil.copytree(GLYPH_VIT, tmp_path / "models/glyph-vit")
    yield tmp_path
    from burnish.ui.places import Places
    from burnish.ui.runs import Runs

    runs = Runs(Places.of(tmp_path, tmp_path / "runs"))
    for run in runs.all():                              # nothing is left going on
        while runs.alive(runs.folder(run["id"])):
            runs.stop(run["id"])
            time.sleep(0.5)


def asker(address):
    def ask(method, path, body=None, kind="application/json"):
        data = json.dumps(body).encode() if isinstance(body, dict) else body
        request = urllib.request.Request(address + path, data, method=method, headers={
            "X-Burnish": "1", "Content-Type": kind})
        with urllib.request.urlopen(request, timeout=300) as answer:
            text = answer.read()
        return text if answer.headers["content-type"] != "application/json" else json.loads(text)

    return ask


def until(check, seconds=300.0):
    end = time.monotonic() + seconds
    while not (found := check()):
        assert time.monotonic() < end
        time.sleep(0.2)
    return found


def test_over_http(root):
    given = {"model": "root:models/glyph-vit", "data": "builtin:digits"}
    with serving(root) as (address, _):
        ask = asker(address)
        read = json.loads(ask("POST", "api/ask/data", given).splitlines()[-1])["answer"]
        plan = json.loads(ask("POST", "api/ask/plan", {
            "model": given["model"], "memory": "1 GB", "batch": 32, "task": read["task"],
            "labels": read["labels"], "candidates": [RECIPE]}).splitlines()[-1])["answer"]
        best = plan["recipes"][0]
        name = ask("POST", "api/runs", given | {
            "recipe": best["recipe"], "memory": "1 GB", "promise": best,
            "settings": {"max_steps": STEPS, "batch_size": 32, "logging_steps": 1}})["id"]
        rows = root / "runs" / name / "out/metrics.jsonl"
        until(lambda: rows.exists() and rows.read_text().count("\n") >= 3)
    with serving(root) as (address, _):                 # another server finds it going on
        ask = asker(address)
        assert ask("GET", f"api/runs/{name}")["state"] == "running"
        ask("POST", f"api/runs/{name}/stop")
        run = until(lambda: (r := ask("GET", f"api/runs/{name}"))["state"] == "stopped" and r)
        step = run["checkpoint"]
        assert 3 <= step < STEPS and f"stopped after step {step}" in run["why"]
        # the rest is few steps: what was asked for stands in the run's own configuration
        asked = root / "runs" / name / "asked.json"
        facts = json.loads(asked.read_text())
        facts["settings"] |= {"max_steps": step + 4}
        asked.write_text(json.dumps(facts))
        ask("POST", f"api/runs/{name}/resume")
        run = until(lambda: (r := ask("GET", f"api/runs/{name}"))["state"] not in (
            "running", "stopping") and r)
        assert run["state"] == "finished", run["why"]
        events = ask("GET", f"api/runs/{name}/events").decode()
        steps = [json.loads(e.split("data: ")[1])["step"] for e in events.split("\n\n")
                 if e.startswith("event: row") and '"loss"' in e]
        assert steps == list(range(1, step + 5))        # each step once, across the stop
        assert run["promise"]["peak"] == run["promised"]["peak"] == best["peak"]
        assert abs(run["measured"]["peak"] / best["peak"] - 1) < 0.1
        assert b"glyph-vit" in ask("GET", f"api/runs/{name}/report")
        draw(root / "digit.png")
        said = ask("POST", f"api/runs/{name}/predict", (root / "digit.png").read_bytes(),
                   "image/png")
        assert said["label"] in "0123456789" and said["base"]


def draw(path):
    from PIL import Image

    image = Image.new("L", (8, 8))
    for y in range(1, 7):
        image.putpixel((4, y), 255)
    image.save(path)


def in_a_browser(root, shots):
    from playwright.sync_api import expect, sync_playwright

    draw(root / "digit.png")
    with serving(root) as (address, _), sync_playwright() as p:
        browser = p.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1200, "height": 900})
        wrong = []
        page.on("pageerror", lambda e: wrong.append(str(e)))
        page.on("console", lambda m: wrong.append(m.text) if m.type == "error" else None)
        page.goto(address)
        page.get_by_role("button", name="models").click()
        page.get_by_role("button", name="glyph-vit").click()
        page.get_by_role("tab", name="Upload").press("ArrowRight")        # tabs by keyboard
        page.get_by_role("tab", name="Folder").nth(1).press("ArrowRight")
        page.get_by_role("tab", name="Hub").nth(1).press("ArrowRight")
        page.get_by_role("button", name="Take them").click()
        expect(page.locator("#understood .gallery img").first).to_be_visible(timeout=120_000)
        budget = page.get_by_role("slider", name="Memory budget")
        expect(budget).to_be_visible(timeout=180_000)
        # the budget: by keyboard, then dragged to the left, which plans anew
        before = page.locator("#memory").input_value()
        budget.press("Home")
        assert page.locator("#memory").input_value() != before
        assert page.locator(".point.over").count() == page.locator(".point").count()
        box = page.locator("svg.chart").bounding_box()
        at = budget.locator(".grip").bounding_box()
        page.mouse.move(at["x"] + 4, at["y"] + 10)
        page.mouse.down()
        page.mouse.move(box["x"] + 0.8 * box["width"], at["y"] + 10, steps=4)
        assert 0 < page.locator(".point.over").count() < page.locator(".point").count()
        page.mouse.up()
        expect(page.locator("#plan-status progress")).to_have_count(0, timeout=120_000)
        # a recipe of one's own, simulated before it starts
        page.fill("#recipe", RECIPE)
        page.get_by_role("button", name="What would it cost?").click()
        expect(page.locator("#chosen code")).to_have_text(RECIPE, timeout=60_000)
        page.get_by_text("More settings").click()
        page.get_by_label("Max steps").fill(str(STEPS))
        # what fit refuses stands beside its field, and there is no run of it
        page.get_by_label("Targets").fill("q,vv")
        page.get_by_label("Targets").press("Tab")
        expect(page.locator("#set-targets-error")).to_contain_text("'vv'", timeout=60_000)
        page.get_by_label("Targets").fill("")
        page.get_by_text("How rows are read").click()
        page.get_by_label("Seed").fill("-3")
        page.get_by_label("Seed").press("Tab")
        expect(page.locator("#set-seed-error")).to_contain_text("expected 0 or more")
        assert len(wrong) == 1 and "400" in wrong.pop()       # what the browser says of a refusal
        page.get_by_label("Seed").fill("5")
        page.get_by_label("Seed").press("Tab")
        expect(page.locator("#set-seed-error")).to_be_empty()
        expect(page.locator("#plan-body")).to_be_visible(timeout=120_000)
        page.get_by_label("Early stopping patience").fill("2")
        page.get_by_label("Eval steps").fill("7")
        page.get_by_label("Save steps").fill("8")
        expect(page.locator("#plan-status progress")).to_have_count(0, timeout=120_000)
        page.fill("#recipe", RECIPE)
        page.get_by_role("button", name="Start training").click()
        expect(page.locator("#set-early_stopping_patience-error")).to_contain_text(
            "evaluate and save at the same steps", timeout=60_000)
        assert page.get_by_label("Early stopping patience").evaluate(
            "e => e === document.activeElement && e.getAttribute('aria-invalid') === 'true'")
        for label in ("Early stopping patience", "Eval steps", "Save steps"):
            page.get_by_label(label).fill("")
        page.get_by_label("Lr scheduler type").select_option("cosine")
        page.get_by_label("Targets").fill("v")
        page.get_by_label("Targets").press("Tab")
        page.get_by_label("Warmup steps").fill("3")
        expect(page.locator("#plan-status progress")).to_have_count(0, timeout=120_000)
        page.fill("#recipe", RECIPE)
        for wide, scheme in ((1200, "light"), (1200, "dark"), (400, "light"), (400, "dark")):
            page.emulate_media(color_scheme=scheme)
            page.set_viewport_size({"width": wide, "height": 900})
            page.wait_for_timeout(200)
            page.screenshot(path=shots / f"settings-{wide}-{scheme}.png", full_page=True)
            assert page.locator("html").evaluate("e => e.scrollWidth") <= wide
        page.set_viewport_size({"width": 1200, "height": 900})
        page.get_by_role("button", name="Start training").click()
        # live
        expect(page.locator("#view-run .state")).to_have_text("running", timeout=60_000)
        expect(page.locator("#loss svg")).to_be_visible(timeout=180_000)
        page.get_by_role("button", name="Stop", exact=True).click()
        expect(page.locator("#view-run .state")).to_have_text("stopped", timeout=120_000)
        run = page.url.rpartition("/")[2]
        told = json.loads((root / "runs" / run / "fit.json").read_text())
        asked = {"seed": 5, "lr_scheduler_type": "cosine", "targets": "v", "warmup_steps": 3.0,
                 "max_steps": STEPS}
        assert told | asked == told and "eval_steps" not in told
        asked = root / "runs" / run / "asked.json"
        facts = json.loads(asked.read_text())
        step = int(re.search(r"[0-9]+", page.get_by_role("button", name="Go on").inner_text())[0])
        facts["settings"] |= {"max_steps": step + 3}
        asked.write_text(json.dumps(facts))
        page.get_by_role("button", name="Go on").click()
        expect(page.locator("#view-run .state")).to_have_text("finished", timeout=180_000)
        with page.expect_popup() as opened:
            page.get_by_role("link", name="Open the report").click()
        expect(opened.value.locator("h1")).to_contain_text("lora(rank=4)")
        opened.value.close()
        page.locator("input[type=file]").last.set_input_files(str(root / "digit.png"))
        page.get_by_role("button", name="Ask").click()
        expect(page.locator(".pair")).to_be_visible(timeout=60_000)
        with page.expect_download() as file:
            page.get_by_role("link", name="Download the adapter").click()
        assert file.value.suggested_filename == f"adapter-{run}.zip"
        # at 400 pixels nothing stands outside of the window
        page.set_viewport_size({"width": 400, "height": 800})
        for view in ("#new", "#runs", f"#run/{run}"):
            page.goto(address + view)
            page.wait_for_timeout(500)
            wide = page.locator("html").evaluate("e => e.scrollWidth")
            assert wide <= 400, (view, wide)
        assert not wrong, wrong
        browser.close()


#: task -> what is filled in, by label, and what is then seen of the answer
TRIED = {
    "object-detection": ({"A picture": "images/0.png"}, ".pair"),
    "semantic-segmentation": ({"A picture": "images/0.jpg"}, "canvas.seen"),
    "text-segmentation": ({"A picture": "pictures/0.png", "What to draw the mask of": "a red disc"},
                          "canvas.seen"),
    "image-text-contrastive": ({"A picture": "0.png", "Texts to compare it with, one a line":
                                "a red disc\na blue box"}, ".pair"),
    "image-generation": ({"The name of a class, or a number to draw by": "disc"}, "img.drawn"),
    "text-to-image": ({"What the picture is to show": "a grey disc"}, "img.drawn"),
    "speech-recognition": ({"A sound": "0.wav"}, ".pair"),
    "time-series-forecasting": ({"A table with the last rows of a series": ""}, ".two svg.chart"),
    "question-answering": ({"A question": "hot", "The text that answers it":
                            "the glaze is fired at 1060 degrees"}, ".pair"),
    "token-classification": ({"A text": "ab c"}, ".pair"),
    "embedding": ({"A text": "a", "Another, to say how near they are": "A"}, ".pair"),
    "text-classification": ({"or a table of rows": "rows.csv"}, "table.samples td >> nth=0"),
}


def trained(root, task, number):
    """A finished run of a task among those of the page; its name and its data."""
    import burnish
    from burnish.testing.tasks import posed

    name = f"20260101-{number:06d}-{number:08x}"
    folder = root / "runs" / name
    folder.mkdir(parents=True)
    base, data, how = posed(task, root / "made" / task)
    burnish.fit(str(base), str(data), "lora(rank=2)", output=folder / "out", max_steps=2,
                batch_size=how.pop("batch_size", 2),
                validation=0, lr=0.1, quiet=True, measure=False,
                save_strategy="no", **how)
    (folder / "asked.json").write_text(json.dumps({"title": task, "settings": {}, "created": 1.0}))
    (folder / "ended.json").write_text('{"code": 0, "time": 2.0}')
    return name, data


def forms_in_a_browser(root, shots):
    from playwright.sync_api import expect, sync_playwright

    runs = {task: trained(root, task, i) for i, task in enumerate(TRIED, 1)}
    with serving(root) as (address, _), sync_playwright() as p:
        browser = p.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1200, "height": 900})
        wrong = []
        page.on("pageerror", lambda e: wrong.append(str(e)))
        page.on("console", lambda m: wrong.append(m.text) if m.type == "error" else None)
        for task, (given, seen) in TRIED.items():
            name, data = runs[task]
            page.goto(f"{address}#run/{name}")
            form = page.locator("form", has=page.get_by_role("button", name="Ask", exact=True))
            expect(form).to_be_visible(timeout=60_000)
            form.get_by_role("button", name="Ask").click()              # nothing is filled in
            expect(form.locator("xpath=..").locator(".error")).to_be_visible()
            for label, value in given.items():
                field = form.get_by_label(label, exact=True)
                if label.startswith(("A picture", "A sound", "A table", "or a table")):
                    if value == "rows.csv":
                        (root / value).write_text("text\na\nb\n")
                        data = root
                    field.set_input_files(str(data / value) if value else str(data))
                else:
                    field.fill(value)
            form.get_by_role("button", name="Ask").click()
            at = form.locator("xpath=..").locator(seen).first
            expect(at, task).to_be_visible(timeout=120_000)
            for wide, scheme in ((1200, "light"), (400, "dark")):
                page.emulate_media(color_scheme=scheme)
                page.set_viewport_size({"width": wide, "height": 900})
                page.wait_for_timeout(200)
                assert page.locator("html").evaluate("e => e.scrollWidth") <= wide, (task, wide)
                form.locator("xpath=..").screenshot(path=shots / f"{task}-{wide}-{scheme}.png")
            page.set_viewport_size({"width": 1200, "height": 900})
        assert not wrong, wrong
        browser.close()


def settings_in_a_browser(root):
    from playwright.sync_api import expect, sync_playwright

    from burnish.testing.tasks import posed

    base, *_ = posed("object-detection", root / "made")
    shutil.copytree(base, root / "models/yolos")
    with serving(root) as (address, _), sync_playwright() as p:
        browser = p.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1200, "height": 900})
        wrong = []
        page.on("pageerror", lambda e: wrong.append(str(e)))
        page.goto(address)
        page.get_by_role("button", name="models").first.click()
        page.get_by_role("button", name="yolos").click()
        told = []
        page.on("request", lambda r: "api/ask/plan" in r.url
                and told.append(r.post_data_json["settings"]))
        page.get_by_role("tab", name="Folder").nth(1).click()
        picker = page.locator("#data-picker")
        picker.get_by_role("button", name="made").click()
        picker.get_by_role("button", name="data").click()
        picker.get_by_role("button", name="Take this whole folder").click()
        own = page.locator("#own")
        expect(own).to_be_visible(timeout=120_000)
        own.locator("summary").click()
        page.get_by_label("Resolution").fill("48")
        page.get_by_label("Resolution").press("Tab")
        end = time.monotonic() + 120
        while {"resolution": 48} not in told:
            page.wait_for_timeout(200)
            assert time.monotonic() < end, told
        assert told[0] == {}                        # of the first plan
        expect(page.get_by_label("Resolution")).to_have_value("48")
        expect(page.locator("#frontier svg")).to_be_visible(timeout=300_000)
        assert not wrong, wrong
        browser.close()


def changes_in_a_browser(root):
    """Settings that are changed and refused between two plans: nothing begins with a plan of
    others, and what is refused can always be reached and mended."""
    from playwright.sync_api import expect, sync_playwright

    with serving(root) as (address, _), sync_playwright() as p:
        browser = p.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1200, "height": 900})
        wrong = []
        page.on("pageerror", lambda e: wrong.append(str(e)))
        page.goto(address)
        page.get_by_role("button", name="models").click()
        page.get_by_role("button", name="glyph-vit").click()
        page.get_by_role("tab", name="Digits").click()
        page.get_by_role("button", name="Take them").click()
        budget = page.get_by_role("slider", name="Memory budget")
        expect(budget).to_be_visible(timeout=180_000)
        page.get_by_text("More settings").press("Enter")
        page.get_by_text("How rows are read").press("Enter")
        for name in ("group", "group_by_length"):           # pictures have neither
            expect(page.locator(f"#set-{name}")).to_be_hidden()
        expect(page.locator("#set-label_smoothing_factor")).to_be_visible()
        # refused by the model: the plan of other targets is gone, and no run begins
        page.fill("#recipe", RECIPE)
        page.fill("#set-targets", "q,vv")
        page.get_by_role("button", name="Start training").click()
        expect(page.locator("#start-status .error")).to_be_visible(timeout=120_000)
        expect(page.locator("#set-targets-error")).to_contain_text("did you mean 'v'")
        expect(page.locator("#set-targets")).to_be_focused()
        expect(page.locator("#frontier svg")).to_have_count(0)
        expect(page.locator("#recipe")).to_have_value(RECIPE)
        page.fill("#set-targets", "q,v")
        page.press("#set-targets", "Tab")
        expect(budget).to_be_visible(timeout=180_000)
        # refused while rows are read: its field is one of the plan, which is not there then
        page.fill("#set-learning_rate", "-1")
        page.press("#set-learning_rate", "Tab")
        page.fill("#set-validation", "0.2")
        page.press("#set-validation", "Tab")
        error = page.locator("#set-learning_rate-error")
        expect(error).to_be_visible(timeout=60_000)
        expect(error).to_contain_text("expected 0 or more")
        page.fill("#set-learning_rate", "0.01")
        page.press("#set-learning_rate", "Tab")
        expect(error).to_be_empty(timeout=60_000)
        expect(budget).to_be_visible(timeout=180_000)
        # changed and started at once: the run is promised with what was changed
        page.fill("#recipe", RECIPE)
        page.fill("#set-max_steps", "2")
        page.fill("#set-accumulation", "2")
        page.select_option("#set-dtype", "bfloat16")
        page.get_by_role("button", name="Start training").click()
        expect(page.locator("#view-run .state")).to_have_text("finished", timeout=300_000)
        folder = root / "runs" / page.url.rpartition("/")[2]
        told, asked = (json.loads((folder / f).read_text()) for f in ("fit.json", "asked.json"))
        given = {"accumulation": 2, "dtype": "bfloat16", "targets": "q,v", "validation": 0.2,
                 "learning_rate": 0.01, "max_steps": 2}
        assert told | given == told
        facts = json.loads((folder / "out/run.json").read_text())
        assert facts["memory"]["simulated"]["peak_bytes"] == asked["promise"]["peak"]
        assert not wrong, wrong
        browser.close()


if BROWSER:
    def test_changes_in_a_browser(root):
        changes_in_a_browser(root)

    def test_settings_of_a_task_in_a_browser(root):
        settings_in_a_browser(root)

    def test_every_form_in_a_browser(root, tmp_path):
        forms_in_a_browser(root, tmp_path)

    def test_in_a_browser(root, tmp_path):
        in_a_browser(root, tmp_path)
