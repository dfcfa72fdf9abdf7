"""The procedural world: coloured shapes and short words, drawn, described, changed and found again by programs."""
