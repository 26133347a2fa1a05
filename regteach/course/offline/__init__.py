"""A folder that goes on PYTHONPATH of lessons: its sitecustomize.py blocks the network in every Python they start."""
