"""Supervised use of encoders: fine-tuning for segmentation, and how well it works.

The parts: `recipe` (a run as data), `cases` (labelled scans and who trains, validates and tests), `crops` (what the
network sees), `metrics`, and `segmentation`, the loop.
"""
