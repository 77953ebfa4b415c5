"""How long an experiment will take, from the arithmetic of its runs; nothing is run."""

from __future__ import annotations

import torch
from torch.utils.flop_counter import FlopCounterMode

from medmim.tasks import create_segmenter
from medmim.windows import cover, covering_grid
from medmim_training.plan import make_plan, matrix_product_rate
from medmim_training.reproduce.experiment import FineTuningRun, PretrainingRun, Run
from medmim_training.tasks.peers import register_peers

# Of the rate of square matrix products: what runs of this size were measured at, on one core of a server.
EFFICIENCY = 0.5

