"""Supervised use of encoders: fine-tuning for segmentation, and how well it works.

The parts: `recipe` (a run as data), `cases` (labelled scans and who trains, validates and tests), `crops` (what the
network sees), `metrics`, `loop`, which knows no task by name, and a file a task: `segmentation`.
"""
