"""Streams an image with previews from ``deepgen serve``, then edits it inside a mask.

Start the service first: ``deepgen serve --port 8000``; then ``python examples/openai_client.py``.
"""

import argparse
import base64
import io

import openai
from PIL import Image

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--url", default="http://127.0.0.1:8000/v1")
parser.add_argument("--key", default="none", help="bearer key, where the service wants one")
parser.add_argument("--out", default="served_{name}.png", help="files; {name} is preview_0, ..., image, edited")
options = parser.parse_args()


def save(name: str, data: str | None) -> bytes:
    """Writes a picture in base64 to a file; returns its bytes."""
    decoded = base64.b64decode(data or "")
    Image.open(io.BytesIO(decoded)).save(options.out.format(name=name))
    print(options.out.format(name=name))
    return decoded


client = openai.OpenAI(base_url=options.url, api_key=options.key)
picture = b""
prompt = "a large blue square in the top left corner on a black background"
for event in client.images.generate(prompt=prompt, stream=True, partial_images=2, extra_body={"seed": 1}):
    if event.type == "image_generation.partial_image":
        save(f"preview_{event.partial_image_index}", event.b64_json)
    else:
        picture = save("image", event.b64_json)

# A mask is transparent where the picture may change: here its left half.
size = Image.open(io.BytesIO(picture)).size
mask = Image.new("RGBA", size, "black")
mask.paste((0, 0, 0, 0), (0, 0, size[0] // 2, size[1]))
file = io.BytesIO()
mask.save(file, "PNG")
answer = client.images.edit(
    image=("image.png", picture, "image/png"), mask=("mask.png", file.getvalue(), "image/png"),
    prompt="make the blue square yellow", extra_body={"seed": 1},
)  # fmt: skip
save("edited", answer.data[0].b64_json if answer.data else None)
