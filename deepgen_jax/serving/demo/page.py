"""The page: prompt and pictures on the left, image, before and after, history on the right."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import gradio as gr
import numpy as np
from PIL import Image

from deepgen_jax.data.images import load_image
from deepgen_jax.errors import DeepGenError
from deepgen_jax.inference.image_inputs import reference_size
from deepgen_jax.serving.client import ServiceClient
from deepgen_jax.serving.demo.commands import command_of
from deepgen_jax.serving.demo.history import History, Settings
from deepgen_jax.serving.parameters import parse_wxh
from deepgen_jax.serving.pictures import png_bytes

#: What nano draws, and examples that it knows.
NANO = (
    "Nano draws one to five coloured shapes, small or large, on white, grey, black or navy, and signs with short "
    "words, and adds, removes, moves and recolours them; any other prompt gives shapes, too."
)
NANO_PROMPTS = [
    "a large blue square in the top left corner on a black background",
    "a small red circle to the right of a large green star",
    "three yellow triangles on a navy background",
    'a sign with the word "OPEN" on it',
]
NANO_EDITS = ["make the blue square yellow", "remove the blue square", "add a small red circle"]
PROMPTS = ["a red fox in fresh snow", "a glass teapot on a wooden table, morning light", "a lighthouse, oil painting"]
EDITS = ["make it night", "turn it into a watercolour", "add a red umbrella"]

_THEME_FONTS = ["system-ui", "sans-serif"], ["ui-monospace", "monospace"]
_CSS = """
.gradio-container {max-width: 1180px !important; margin: auto}
#result img {width: 100%; height: 100%; object-fit: contain}
#status p {min-height: 1.4em; margin: 0}
@media (max-width: 640px) {.gradio-container {padding: 6px !important}}
"""
_PREVIEWS = 3
_DROP = "Drop or paste a picture, or send one here from the right."


class Demo:
    """Builds the page and answers its events.

    Args:
      client: of the service that makes the images.
      history: where images are kept.
      model: folder of the model for commands to copy; None where only the service has it.
    """

    def __init__(self, client: ServiceClient, history: History, model: str | None) -> None:
        self._client, self._history, self._model = client, history, model
        described = client.model()
        self._name, self._facts = described["id"], described["deepgen"]
        self._side = parse_wxh(self._facts["default_size"])[0]

    def build(self) -> gr.Blocks:
        """The page."""
        nano = self._name == "nano"
        facts, unit = self._facts, self._facts["size_multiple"]
        sides = [unit * k for k in range(1, 1 + min(facts["max_side"], 4 * self._side) // unit)]
        with gr.Blocks(title=f"DeepGen: {self._name}", analytics_enabled=False) as page:
            session = gr.BrowserState("", storage_key="deepgen-demo-session", secret="deepgen-demo")
            mode, shown = gr.State("generate"), gr.State("")
            about = NANO if nano else "Generates images from text and edits pictures."
            gr.Markdown(f"## DeepGen · {self._name}\n{about}")
            with gr.Row():
                with gr.Column(min_width=320):
                    prompt = gr.Textbox(label="Prompt", lines=1, max_lines=4, autofocus=True, elem_id="prompt",
                                        placeholder="What to show or to change")  # fmt: skip
                    with gr.Row():
                        run = gr.Button("Generate", variant="primary", elem_id="run")
                        stop = gr.Button("Stop", elem_id="stop")
                    with gr.Tabs() as tabs:
                        with gr.Tab("Generate", id="generate") as generate_tab:
                            gr.Examples(NANO_PROMPTS if nano else PROMPTS, prompt, label="Examples")
                            with gr.Row():
                                width = gr.Dropdown(sides, value=self._side, label="Width", min_width=90)
                                height = gr.Dropdown(sides, value=self._side, label="Height", min_width=90)
                                count = gr.Slider(1, 4, 1, step=1, label="Images", min_width=90)
                        with gr.Tab("Edit", id="edit") as edit_tab:
                            picture = gr.ImageEditor(
                                label="Picture and mask",
                                type="pil", image_mode="RGBA", layers=False, transforms=(), height=340,
                                brush=gr.Brush(max(6, self._side // 12), ["#ff3b30"], color_mode="fixed"),
                                elem_id="editor", sources=("upload", "clipboard"), format="png",
                            )  # fmt: skip
                            size = gr.Markdown(_DROP, elem_id="size")
                            gr.Examples(NANO_EDITS if nano else EDITS, prompt, label="Examples")
                            more = gr.File(label="Further reference pictures", file_count="multiple",
                                           file_types=["image"], height=150)  # fmt: skip
                            strength = gr.Slider(0.05, 1, 1, step=0.05, label="Strength",
                                                 info="Below 1 the result stays closer to the picture")  # fmt: skip
                    with gr.Accordion("Settings", open=False):
                        with gr.Row():
                            seed = gr.Number(0, label="Seed", precision=0, minimum=0, maximum=2**32 - 5, min_width=110)
                            fixed = gr.Checkbox(False, label="Keep the seed", min_width=110)
                        steps = gr.Slider(1, 100, facts["default_steps"], step=1, label="Steps")
                        guidance = gr.Slider(1, 10, facts["default_guidance"], step=0.1, label="Guidance")
                        sampler = gr.Dropdown(facts["samplers"], value=facts["samplers"][0], label="Sampler")
                        negative = gr.Textbox(label="Negative prompt", info="Has an effect at guidance above 1")
                with gr.Column(min_width=320):
                    status = gr.Markdown("", elem_id="status")
                    result = gr.Image(label="Image", type="filepath", interactive=False, format="png", height=340,
                                      buttons=["fullscreen"], elem_id="result")  # fmt: skip
                    slider = gr.ImageSlider(label="Before and after", visible=False, format="png", elem_id="slider",
                                            max_height=340)  # fmt: skip
                    with gr.Row():
                        send = gr.Button("Send to edit", elem_id="send")
                        download = gr.DownloadButton("Download", elem_id="download", interactive=False)
                    command = gr.Code(label="The same as a command", language="shell", interactive=False,
                                      wrap_lines=True, elem_id="command")  # fmt: skip
                    gallery = gr.Gallery(label="History", columns=4, height=220, format="png", allow_preview=False,
                                         interactive=False, elem_id="history")  # fmt: skip
            outputs = [status, result, slider, download, command, gallery, shown, seed]
            inputs = [session, mode, prompt, negative, seed, fixed, width, height, count, steps, guidance, sampler,
                      picture, more, strength]  # fmt: skip
            generate_tab.select(lambda: ("generate", gr.update(value="Generate")), None, [mode, run])
            edit_tab.select(lambda: ("edit", gr.update(value="Edit")), None, [mode, run])
            started = gr.on([run.click, prompt.submit], self._run, inputs, outputs, concurrency_limit=4)
            stop.click(lambda: "Stopped", None, status, cancels=[started])
            picture.change(self._size, picture, size)
            gallery.select(self._select, session, outputs)
            send.click(self._send, shown, [picture, tabs, mode, run])
            page.load(self._open, session, [session, gallery])
        return page

    def _open(self, given: Any, request: gr.Request) -> tuple[str, list[str]]:
        session = self._history.session(given, str(request.session_hash))
        return session, self._gallery(session)

    def _gallery(self, session: str) -> list[str]:
        return [str(path) for path in self._history.images(session)]

    def _size(self, picture: Any) -> str:
        background = None if picture is None else picture.get("background")
        if background is None:
            return _DROP
        width, height = self._edit_size(background)
        was = f", the picture has {background.width}x{background.height}" if (width, height) != background.size else ""
        return f"Result: {width}x{height} pixels{was}. Paint over the part that may change, or nothing for all of it."

    def _edit_size(self, picture: Image.Image) -> tuple[int, int]:
        width, height = picture.size
        return reference_size(width, height, self._facts["size_multiple"], self._side**2)

    def _run(
        self, session: str, mode: str, prompt: str, negative: str, seed: float, fixed: bool, width: int, height: int,
        count: int, steps: int, guidance: float, sampler: str, picture: Any, more: Any, strength: float,
        request: gr.Request,
    ) -> Iterator[tuple[Any, ...]]:  # fmt: skip
        """Previews and images of one run as updates of the page."""
        seed = int(seed or 0) if fixed else random.randrange(2**31)
        # A run can begin before the browser has its session from `_open`.
        session = self._history.session(session, str(request.session_hash))
        settings = Settings(
            prompt=prompt or "", negative_prompt=negative or "", seed=seed, width=int(width), height=int(height),
            steps=int(steps), guidance=float(guidance), sampler=sampler,
        )  # fmt: skip
        images: list[bytes] = []
        mask, before = None, None
        if mode == "edit":
            before, painted = read_editor(picture)
            images = [png_bytes(before), *(Path(file).read_bytes() for file in more or ())]
            mask = None if painted is None else png_bytes(painted)
            size = self._edit_size(before)
            names = tuple(self._history.add_source(session, data, str(k)) for k, data in enumerate(images))
            name = "" if mask is None else self._history.add_source(session, mask, "mask")
            settings = replace(settings, width=size[0], height=size[1], strength=strength, sources=names, mask=name)
        fields: dict[str, Any] = {
            "prompt": settings.prompt, "negative_prompt": settings.negative_prompt, "seed": settings.seed,
            "size": f"{settings.width}x{settings.height}", "num_inference_steps": settings.steps,
            "guidance_scale": settings.guidance, "sampler": sampler,
            "partial_images": min(_PREVIEWS, settings.steps - 1),
        }  # fmt: skip
        fields |= {"strength": strength} if mode == "edit" else {"n": int(count)}
        start, skip = time.monotonic(), gr.skip()
        yield "Waiting for the model …", skip, gr.update(visible=False), skip, skip, skip, skip, seed
        previews = 0
        try:
            for event in self._client.stream(fields, images, mask):
                if not event.final:
                    previews += 1
                    seconds = time.monotonic() - start
                    text = f"Preview {previews} · {seconds:.1f} s"
                    yield text, event.image, skip, skip, skip, skip, skip, skip
                    continue
                made = replace(settings, seed=event.seed)
                path = self._history.add(session, event.image, made)
                seconds = time.monotonic() - start
                text = f"{event.image.width}x{event.image.height} · seed {event.seed} · {seconds:.1f} s"
                yield text, *self._shown(session, path, made)
        except DeepGenError as error:
            raise gr.Error(str(error), duration=10) from error

    def _shown(self, session: str, path: Path, settings: Settings | None) -> tuple[Any, ...]:
        """Updates that show an image of the history: all outputs but the status."""
        slider, command, seed = gr.update(visible=False, value=None), "", gr.skip()
        if settings is not None:
            seed = settings.seed
            file = partial(self._history.path, session)
            command = command_of(settings, file, self._model, self._client.url)
            source = self._history.path(session, settings.sources[0]) if settings.sources else None
            if source is not None and source.exists():
                before = load_image(source).resize((settings.width, settings.height))
                slider = gr.update(visible=True, value=(before, load_image(path)))
        shown, download = str(path), gr.update(value=str(path), interactive=True)
        return shown, slider, download, command, self._gallery(session), shown, seed

    def _select(self, session: str, event: gr.SelectData, request: gr.Request) -> tuple[Any, ...]:
        """Shows the image of the history that was chosen."""
        session = self._history.session(session, str(request.session_hash))
        paths = self._history.images(session)
        if not 0 <= int(event.index) < len(paths):
            return (gr.skip(),) * 8
        path = paths[int(event.index)]
        settings = self._history.settings(path)
        text = "" if settings is None else f"{settings.prompt} · seed {settings.seed}"
        return text, *self._shown(session, path, settings)

    def _send(self, shown: str) -> tuple[Any, ...]:
        """Puts the image that is shown into the editor and opens its tab."""
        if not shown:
            raise gr.Error("There is no image yet; generate one first", duration=5)
        value = {"background": load_image(shown).convert("RGBA"), "layers": [], "composite": None}
        return value, gr.Tabs(selected="edit"), "edit", gr.update(value="Edit")


def read_editor(value: Any) -> tuple[Image.Image, Image.Image | None]:
    """The picture of an ImageEditor, RGB, and where it was painted: RGBA, transparent there; None for nowhere."""
    background = None if value is None else value.get("background")
    if background is None:
        raise gr.Error("Drop a picture to edit first", duration=5)
    picture = load_image(background)
    painted = np.zeros((picture.height, picture.width), np.bool_)
    for layer in value.get("layers") or ():
        if layer is not None:
            alpha = layer.convert("RGBA").getchannel("A").resize(picture.size)
            painted |= np.asarray(alpha) > 0
    if not painted.any():
        return picture, None
    alpha = np.where(painted, 0, 255).astype(np.uint8)
    return picture, Image.merge("RGBA", (*picture.split(), Image.fromarray(alpha)))


def theme() -> gr.themes.Base:
    """System fonts, so that nothing is fetched."""
    text, code = _THEME_FONTS
    return gr.themes.Soft(font=text, font_mono=code)


def css() -> str:
    """Styles of the page."""
    return _CSS
