"""Supervised use of encoders: fine-tuning for segmentation and classification, probes, and how well they work.

The parts: `recipe` (a run as data), `cases` and `labelled` (scans with labels a voxel, or a class each, and who trains,
validates and tests), `crops` (what the network sees), `metrics`, `loop`, which knows no task by name, a file a task,
`segmentation` and `classification`, `finetuning`, which starts the loop, and `probe`, which trains no network.
"""
