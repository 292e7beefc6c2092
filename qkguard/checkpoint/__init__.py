"""Checkpoint folders: reading weights row by row, writing restored ones from raw files, and proving them."""
