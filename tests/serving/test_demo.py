"""The page's events against a service with a fake model, its history and commands, and the page in a real browser."""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import gradio as gr
import httpx
import numpy as np
import pytest
from PIL import Image
from support.fake_engine import FakeEngine, image_of
from support.services import noise, png, wait_until

from deepgen_jax import DeepGenPipeline
from deepgen_jax.cli.main import main
from deepgen_jax.errors import DeepGenError
from deepgen_jax.serving.client import ServiceClient
from deepgen_jax.serving.demo.commands import command_of
from deepgen_jax.serving.demo.history import History, Settings
from deepgen_jax.serving.demo.page import Demo, css, read_editor, theme

SESSION = "0" * 32
FOX = Settings("a fox", "", 7, 64, 96, 4, 1.0, "euler")
VISIT = SimpleNamespace(session_hash="first visit")
#: Places in a tuple of updates.
STATUS, RESULT, SLIDER, DOWNLOAD, COMMAND, GALLERY, SHOWN, SEED = range(8)


@pytest.fixture
def engine() -> FakeEngine:
    return FakeEngine()


@pytest.fixture
def demo(start, engine, tmp_path) -> Demo:
    return Demo(ServiceClient(start(engine).url), History(tmp_path / "history"), "nano")


def run(demo: Demo, mode: str = "generate", **changes):
    values = dict(
        session=SESSION, mode=mode, prompt="a fox", negative="", seed=7, fixed=True, width=64, height=96, count=1,
        steps=4, guidance=1.0, sampler="euler", picture=None, more=None, strength=1.0,
        request=VISIT,
    )  # fmt: skip
    return list(demo._run(**(values | changes)))


def editor(picture: np.ndarray, *layers: np.ndarray):
    return {"background": Image.fromarray(picture), "layers": [Image.fromarray(layer) for layer in layers]}


def test_generate_shows_previews_the_image_its_command_and_the_history(demo, engine):
    updates = run(demo)
    assert [update[STATUS].split()[0] for update in updates] == ["Waiting", "Preview", "Preview", "Preview", "64x96"]
    last = updates[-1]
    job = engine.batches[-1][0]
    assert (job.width, job.height, job.seed, job.steps) == (64, 96, 7, 4)
    np.testing.assert_array_equal(np.asarray(Image.open(last[RESULT])), image_of(job))
    assert last[GALLERY] == [last[RESULT]]
    assert last[COMMAND].startswith("deepgen generate nano 'a fox' --seed 7 ")
    assert last[SLIDER]["visible"] is False
    for update in updates[1:-1]:
        assert isinstance(update[RESULT], Image.Image)


def test_several_images_have_following_seeds_and_a_free_seed_is_drawn(demo):
    updates = run(demo, count=3)
    assert [update[SEED] for update in updates if "seed" in update[STATUS]] == [7, 8, 9]
    assert len(updates[-1][GALLERY]) == 3
    seeds = {run(demo, fixed=False)[0][SEED] for _ in range(3)}
    assert len(seeds) == 3


def test_edit_with_a_mask(demo, engine, tmp_path):
    picture, layer = noise(64, 96), np.zeros((96, 64, 4), np.uint8)
    layer[10:30, 20:40] = (255, 59, 48, 255)
    (tmp_path / "more.png").write_bytes(png(noise(32, 32)))
    value = editor(picture, layer)
    last = run(demo, "edit", picture=value, more=[str(tmp_path / "more.png")], strength=0.5)[-1]
    job = engine.batches[-1][0]
    np.testing.assert_array_equal(job.mask, layer[..., 3] > 0)
    np.testing.assert_array_equal(np.asarray(job.source), picture)
    assert [image.size for image in job.images] == [(64, 96), (32, 32)]
    assert (job.strength, job.width, job.height) == (0.5, 64, 96)
    assert last[SLIDER]["visible"] is True
    assert last[COMMAND].startswith("curl ")
    paths = [word.partition("@")[2] for word in shlex.split(last[COMMAND]) if "=@" in word]
    assert len(paths) == 3
    assert all(Path(path).is_file() for path in paths)


def test_an_edit_keeps_the_aspect_and_says_the_size(demo, engine):
    value = editor(noise(200, 100))
    text = demo._size(value)
    job_size = run(demo, "edit", picture=value) and (engine.batches[-1][0].width, engine.batches[-1][0].height)
    assert f"Result: {job_size[0]}x{job_size[1]} pixels, the picture has 200x100" in text
    assert job_size[0] / job_size[1] == pytest.approx(2, abs=0.5)
    assert "Drop" in demo._size(None)
    assert run(demo, "edit", picture=value)[-1][COMMAND].startswith("deepgen edit nano 'a fox' --image ")


def test_errors_are_shown_as_the_service_words_them(demo):
    with pytest.raises(gr.Error, match="this prompt is refused"):
        run(demo, prompt="refused")
    with pytest.raises(gr.Error, match="'prompt' is missing or empty"):
        run(demo, prompt="")
    with pytest.raises(gr.Error, match="Drop a picture"):
        run(demo, "edit")


def test_history_is_there_after_a_reload_and_belongs_to_one_browser(demo):
    made = [run(demo, seed=seed)[-1][RESULT] for seed in (1, 2)]
    session, images = demo._open(SESSION, VISIT)
    assert (session, images) == (SESSION, made[::-1])
    for other in ("", None, "../" + SESSION, "1" * 32):
        session, images = demo._open(other, VISIT)
        assert images == []
        assert session != SESSION
    assert demo._open("", VISIT)[0] != demo._open("", SimpleNamespace(session_hash="second visit"))[0]
    event = gr.SelectData(None, {"index": 1, "value": None})
    shown = demo._select(SESSION, event, VISIT)
    assert (shown[RESULT], shown[SEED]) == (made[0], 1)


def test_a_run_before_the_page_has_its_session_is_in_the_same_history(demo):
    made = run(demo, session="")[-1][RESULT]
    assert demo._open("", VISIT)[1] == [made]


def test_send_to_edit(demo):
    path = run(demo)[-1][SHOWN]
    value, _, mode, _ = demo._send(path)
    assert mode == "edit"
    np.testing.assert_array_equal(np.asarray(value["background"].convert("RGB")), np.asarray(Image.open(path)))
    with pytest.raises(gr.Error, match="no image yet"):
        demo._send("")


def test_old_images_leave_the_history(tmp_path):
    history = History(tmp_path, keep=2)
    paths = [history.add(SESSION, Image.new("RGB", (8, 8)), FOX) for _ in range(4)]
    assert history.images(SESSION) == paths[:1:-1]
    assert history.settings(paths[3]) == FOX
    assert history.settings(paths[0]) is None
    with pytest.raises(ValueError, match="no session"):
        history.add("../x", Image.new("RGB", (8, 8)), FOX)


@pytest.mark.parametrize("prompt", ['it\'s "quoted" $HOME `x`', "-dash", "two\nlines"])
def test_commands_survive_a_shell(prompt, tmp_path):
    settings = Settings(prompt, "dark", 1, 64, 64, 4, 3.5, "euler", 0.5, ("a b.png",), "m.png")
    words = shlex.split(command_of(settings, lambda name: tmp_path / name, None, "http://x"))
    assert f"prompt={prompt}" in words
    assert f"image[]=@{tmp_path}/a b.png" in words
    plain = Settings(prompt, "dark", 1, 64, 64, 4, 3.5, "euler")
    assert prompt in shlex.split(command_of(plain, lambda name: tmp_path / name, "nano", "http://x"))


def test_masks_from_the_editor():
    picture = noise(16, 16)
    assert read_editor(editor(picture, np.zeros((16, 16, 4), np.uint8)))[1] is None
    half = np.zeros((8, 8, 4), np.uint8)
    half[:4] = 255
    _, mask = read_editor(editor(picture, half))
    np.testing.assert_array_equal(np.asarray(mask)[:6, :, 3], 0)


def test_the_client_names_what_is_wrong(start):
    with pytest.raises(DeepGenError, match=r"write http://HOST:PORT"):
        ServiceClient("localhost:8000")
    with pytest.raises(DeepGenError, match="does not answer"):
        ServiceClient("http://127.0.0.1:1").model()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["nano", "--server", "http://127.0.0.1:1"], "keep one of them"),
        (["--server", "http://127.0.0.1:1"], "does not answer"),
        (["--api-key-file", "x"], "is for --server"),
        (["no-such-model"], "no-such-model"),
    ],
)
def test_options_that_are_refused(words, message, capsys):
    assert main(["demo", *words]) == 2
    assert message in capsys.readouterr().err


@contextlib.contextmanager
def command(*words: str, ready: str, environment: dict[str, str]) -> Iterator[re.Match[str]]:
    """Runs ``deepgen`` until its output has a match of ``ready``, which is yielded."""
    with subprocess.Popen(
        [sys.executable, "-m", "deepgen_jax.cli.main", *words], stdout=subprocess.PIPE, text=True, env=environment
    ) as process:
        try:
            assert process.stdout is not None
            lines = [process.stdout.readline()]
            while not (found := re.search(ready, lines[-1])):
                assert lines[-1], f"{words} ended: {lines}"
                lines.append(process.stdout.readline())
            yield found
        finally:
            process.terminate()
            process.communicate(timeout=120)


@pytest.mark.slow
def test_the_commands_serve_and_demo_together(tmp_path):
    """A page of ``deepgen demo --server`` generates and edits with the model of a running ``deepgen serve``."""
    client = pytest.importorskip("gradio_client")
    keys = tmp_path / "keys.txt"
    keys.write_text("secret\n")
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "GRADIO_TEMP_DIR": str(tmp_path / "gradio")}
    serve = ("serve", "nano", "--port", "0", "--api-keys", str(keys))
    demo = ("--api-key-file", str(keys), "--port", "0", "--history", str(tmp_path / "history"))
    values = dict(
        session="", negative="", seed=7, fixed=True, width=96, height=96, count=1, steps=4, guidance=1,
        sampler="euler", picture=None, more=[], strength=1, api_name="/_run",
    )  # fmt: skip
    with contextlib.ExitStack() as stack:
        server = stack.enter_context(contextlib.ExitStack())
        url = server.enter_context(command(*serve, ready=r"http://\S+", environment=environment))[0]
        wait_until(lambda: httpx.get(f"{url}/ready", timeout=60).status_code == 200, 600)
        page = ("demo", "--server", url, *demo)
        where = stack.enter_context(command(*page, ready=r"open (http://\S+)", environment=environment))[1]
        browser = client.Client(where, verbose=False, httpx_kwargs={"timeout": 600})
        status, image, _, _, text, history, seed = browser.predict(prompt="a small red circle", **values)
        assert (status[:14], seed, len(history)) == ("96x96 · seed 7", 7, 1)
        assert text.startswith(f"curl {url}/v1/images/generations ")
        made = np.asarray(Image.open(image).convert("RGB"))
        pipe = DeepGenPipeline.from_pretrained("nano")
        np.testing.assert_array_equal(made, pipe("a small red circle", seed=[7], output_type="np").images[0])

        layer = np.zeros((96, 96, 4), np.uint8)
        layer[8:40, 16:48] = (255, 59, 48, 255)
        Image.fromarray(layer).save(tmp_path / "mask.png")
        browser.predict(api_name="/lambda_1")  # opens the tab for edits
        picture = {"background": client.handle_file(image), "layers": [client.handle_file(str(tmp_path / "mask.png"))]}
        edit = {**values, "picture": {**picture, "composite": None}}
        _, image, _, _, text, history, _ = browser.predict(prompt="add a small red circle", **edit)
        edited, painted = np.asarray(Image.open(image).convert("RGB")), layer[..., 3] > 0
        np.testing.assert_array_equal(edited[~painted], made[~painted])
        assert (edited[painted] != made[painted]).any()
        assert (len(history), text.count("=@")) == (2, 2)

        server.close()
        with pytest.raises(Exception, match=f"{url} does not answer"):
            browser.predict(prompt="a small red circle", **edit)


@pytest.fixture
def browser(tmp_path):
    webdriver = pytest.importorskip("selenium.webdriver")
    driver = shutil.which("chromedriver")
    if driver is None or shutil.which("chromium") is None:
        pytest.skip("needs Debian's chromium and chromium-driver")
    options = webdriver.ChromeOptions()
    for argument in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--window-size=1280,900"):
        options.add_argument(argument)
    options.binary_location = shutil.which("chromium")
    options.add_experimental_option("prefs", {"download.default_directory": str(tmp_path / "downloads")})
    with webdriver.Chrome(options, webdriver.ChromeService(driver)) as chrome:
        yield chrome


@pytest.mark.slow
def test_the_page_in_chromium(browser, demo, engine, tmp_path):
    """Generate by keyboard, send to edit, paint a mask, edit, download, reload, and the width of a phone."""
    page = demo.build()
    page.queue().launch(
        server_name="127.0.0.1", server_port=None, prevent_thread_lock=True, quiet=True, theme=theme(), css=css(),
        allowed_paths=[str(tmp_path)], ssr_mode=False,
    )  # fmt: skip
    try:
        browser.get(page.local_url)

        def find(selector: str):
            wait_until(lambda: bool(browser.find_elements("css selector", selector)), 60)
            return browser.find_element("css selector", selector)

        def shown(selector: str) -> int:
            return len(browser.find_elements("css selector", f"{selector} img"))

        find("#prompt textarea").send_keys("a fox\n")
        wait_until(lambda: shown("#history") == 1, 60)
        find("#send").click()
        wait_until(lambda: find("#run").text == "Edit")
        wait_until(lambda: "Result: 64x64" in find("#size").text)
        time.sleep(1)
        find("#editor button[aria-label=Brush]").click()
        canvas = find("#editor canvas")
        browser.execute_script("arguments[0].scrollIntoView({block: 'center'})", canvas)
        from selenium.webdriver.common.action_chains import ActionChains

        ActionChains(browser).move_to_element(canvas).click_and_hold().move_by_offset(8, 8).release().perform()
        time.sleep(0.5)
        browser.execute_script("arguments[0].scrollIntoView({block: 'center'})", find("#run"))
        find("#run").click()
        wait_until(lambda: shown("#history") == 2, 60)
        job = engine.batches[-1][0]
        assert job.kind == "edit"
        assert 0 < job.mask.mean() < 1
        wait_until(lambda: shown("#slider") > 0)
        find("#download").click()
        wait_until(lambda: bool(list((tmp_path / "downloads").glob("*.png"))), 30)
        browser.refresh()
        wait_until(lambda: shown("#history") == 2, 60)
        browser.set_window_size(390, 844)
        time.sleep(0.5)
        wide, window = browser.execute_script("return [document.documentElement.scrollWidth, window.innerWidth]")
        assert wide <= window, "nothing is cut off on a phone"
        assert find("#run").is_displayed()
    finally:
        page.close(verbose=False)
