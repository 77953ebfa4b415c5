"""`medmim-train`: prepare scans, pretrain, package and publish weights, fine-tune and probe."""

from __future__ import annotations

import sys

import typer

from medmim.cli.terminal import report, run
from medmim_training.cli.data import fetch_data, inspect, prepare
from medmim_training.cli.experiments import reproduce
from medmim_training.cli.finetuning import finetune
from medmim_training.cli.measuring import evaluate, evaluate_segmenter, probe
from medmim_training.cli.pretraining import pretrain
from medmim_training.cli.release import package, publish

# As `medmim-train --help` lists them.
COMMANDS = {
    "prepare": prepare,
    "inspect": inspect,
    "pretrain": pretrain,
    "finetune": finetune,
    "probe": probe,
    "evaluate": evaluate,
    "test": evaluate_segmenter,
    "reproduce": reproduce,
    "fetch-data": fetch_data,
    "package": package,
    "publish": publish,
}

EXTRA = {"accelerate", "blosc2", "filelock", "sklearn", "tensorboard", "yaml"}  # modules of the extra `train`

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
    pretty_exceptions_show_locals=False,  # a token may be among them
    help=__doc__,
)
for name, command in COMMANDS.items():
    app.command(name)(command)


def main() -> None:
    """Entry point: errors for people, no tracebacks."""
    try:
        run(app)
    except ModuleNotFoundError as error:  # the command is there without the extra, too
        if error.name not in EXTRA:
            raise
        report(f"{error.name} is missing; pip install 'medmim[train]'")
        sys.exit(1)
