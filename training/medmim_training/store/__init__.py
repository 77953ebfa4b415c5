"""Scans prepared once, as compressed arrays that give a random crop in milliseconds.

A store is a folder: `store.json` (the preprocessing), `index.jsonl` (a line a volume), `volumes/*.b2nd` (blosc2 arrays)
and `problems.jsonl` (scans that could not be used, and why).
"""
