"""How long runs will take, from their arithmetic; nothing is trained."""

from __future__ import annotations

import torch
from torch.utils.flop_counter import FlopCounterMode

from medmim.tasks import create_segmenter
from medmim_training.plan import make_plan
from medmim_training.reproduce.experiment import FineTuningRun, PretrainingRun, Run
from medmim_training.tasks.cases import Split
from medmim_training.tasks.peers import register_peers


def flops(run: Run, split: Split) -> float:
    """Of a whole run; of one that gets another's time, that of the other.

    Args:
        run: Of a plan.
        split: Whose cases validate and test.
    """
    if isinstance(run, PretrainingRun):
        return _pretraining_flops(run)
    return _finetuning_flops(run.same_time_as or run, split)


def _pretraining_flops(run: PretrainingRun) -> float:
    plan = make_plan(run.recipe)
    return plan.flops_per_crop * plan.crops


def _finetuning_flops(run: FineTuningRun, split: Split) -> float:
    """Of all steps, of validation on the way, and of the last evaluation: a window a case, as of a small organ."""
    recipe, args = run.recipe, dict(run.recipe.model.args)
    name = recipe.model.name
    if run.start is not None:
        name, args = run.start.recipe.model.name, {**run.start.recipe.model.args, **args}
    register_peers()
    model = create_segmenter(
        name,
        recipe.decoder.name,
        num_classes=max(2, len(recipe.classes)),
        decoder_args=recipe.decoder.args,
        device="meta",
        **args,
    )
    x = torch.empty(1, model.in_chans, *model.img_size, device="meta")
    with FlopCounterMode(display=False) as forward:
        scores = model(x)
    with FlopCounterMode(display=False) as backward:
        scores.sum().backward()
    window, crop = forward.get_total_flops(), forward.get_total_flops() + backward.get_total_flops()
    steps, every = recipe.schedule.steps, recipe.output.checkpoint_every
    windows = len(split.validation) * -(-steps // every) + len(split.validation) + len(split.test)
    return steps * recipe.batch_size * crop + windows * window
