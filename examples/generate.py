"""Generates four images from Python and saves them side by side: ``python examples/generate.py``."""

import argparse

from PIL import Image

import deepgen_jax as dg

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--model", default="nano", help="model folder, or nano")
parser.add_argument("--prompt", default="a large blue square in the top left corner on a black background")
parser.add_argument("--out", default="generated.png")
options = parser.parse_args()

pipe = dg.DeepGenPipeline.from_pretrained(options.model)
images = pipe([options.prompt] * 4, seed=[0, 1, 2, 3]).images
sheet = Image.new("RGB", (sum(image.width for image in images), images[0].height))
for place, image in enumerate(images):
    sheet.paste(image, (place * image.width, 0))
sheet.save(options.out)
print(options.out)
