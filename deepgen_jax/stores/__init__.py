"""Folders on disk: model folders, run folders, their lineage and checkpoints."""
