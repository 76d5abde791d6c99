"""The small model shipped with the package, its demo images, and its held-out questions."""
