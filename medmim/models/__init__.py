"""Encoders, one architecture per file; they import torch and `medmim.layers` and nothing else of medmim."""
