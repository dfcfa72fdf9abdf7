"""The embedded model: its sizes, its procedural world, its benchmark."""
