"""Data: what a lesson or a model reads, as tensors on a grid in millimetres.

One module a kind of data; each says what is real, what is synthetic, and how people or images are kept apart.
Nothing is imported here: a lesson pays for what it uses.
"""
