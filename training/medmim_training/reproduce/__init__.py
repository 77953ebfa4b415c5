"""Experiments: a grid of runs described as data, run by one command, reported on one page.

The parts: `experiment` (the description, and the runs that it asks for), `runner` (runs them, keeps a manifest),
`results` (a row a run, and statistics over seeds), `page` (figures and text), and `shapes` (data made by formula).
"""
