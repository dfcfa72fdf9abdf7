"""Interpretability: heat maps of words and think tokens, a logit lens, and knock-outs.

trace = observe(pipe, "a red circle", steps=4)         # heat_maps.py: samples an image with its maps
lens = logit_lens(pipe, folder, "a red circle")        # lens.py: decodes think tokens to words, by layer
effects = knock_out(pipe, "a red circle", steps=4)     # knockouts.py: effect of each component
"""
