"""What the model looks at: heat maps of words and think tokens, a logit lens, and knock-outs.

trace = observe(pipe, "a red circle", steps=4)         # heat_maps.py: one sampled image and its maps
lens = logit_lens(pipe, folder, "a red circle")        # lens.py: think tokens read as words, by layer
effects = knock_out(pipe, "a red circle", steps=4)     # knockouts.py: how much each piece matters
"""
