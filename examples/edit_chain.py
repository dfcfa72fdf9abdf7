"""Edits an image step by step, each edit starting from the one before: ``python examples/edit_chain.py``."""

import argparse

import deepgen_jax as dg

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--model", default="nano", help="model folder, or nano")
parser.add_argument("--prompt", default="a large blue square in the top left corner on a black background")
parser.add_argument("--edits", nargs="+", default=["make the blue square yellow", "add a small red circle"])
parser.add_argument("--out", default="edited_{step}.png", help="file of each step; {step} is its number")
options = parser.parse_args()

pipe = dg.DeepGenPipeline.from_pretrained(options.model)
image = pipe(options.prompt, seed=0).images[0]
image.save(options.out.format(step=0))
for step, instruction in enumerate(options.edits, 1):
    image = pipe(instruction, image, seed=step).images[0]
    image.save(options.out.format(step=step))
    print(options.out.format(step=step), instruction)
