"""What starts a run on several GPUs and nodes: configurations of accelerate, a script for Slurm."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest
from accelerate.commands.config.config_args import ClusterConfig, load_config_from_file

FOLDER = Path(__file__).parents[2] / "training" / "launch"
CONFIGS = sorted(FOLDER.glob("*.yaml"))
SCRIPT = FOLDER / "slurm.sh"

# Stand-ins for Slurm's programs and ours: each notes how it was called.
SRUN = """#!/bin/bash
while [[ $1 == --* ]]; do echo "srun $1" >> "$LOG"; shift; done
SLURM_PROCID=3 SLURM_LOCALID=1 SLURM_NTASKS=4 "$@"
"""
SCONTROL = """#!/bin/bash
echo "scontrol $*" >> "$LOG"
if [ "$1" = show ]; then printf 'node-a\\nnode-b\\n'; fi
"""
MEDMIM_TRAIN = """#!/bin/bash
echo "medmim-train $* at $MASTER_ADDR:$MASTER_PORT as $RANK of $WORLD_SIZE, $LOCAL_RANK here" >> "$LOG"
exit "$CODE"
"""


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_accelerate_takes_the_configuration(path):
    config = load_config_from_file(str(path))
    assert isinstance(config, ClusterConfig)
    assert config.num_processes == 8 * config.num_machines
    assert config.distributed_type == "MULTI_GPU"


def test_there_is_one_for_a_node_and_one_for_several():
    assert [load_config_from_file(str(path)).num_machines > 1 for path in CONFIGS] == [False, True]


def run_script(folder: Path, code: int) -> tuple[int, list[str]]:
    """What the script ends with when a run ends with `code`, and what was called."""
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL), ("medmim-train", MEDMIM_TRAIN)):
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    log = folder / "log"
    environment = {
        "PATH": f"{folder}{os.pathsep}{os.environ['PATH']}",
        "LOG": str(log),
        "CODE": str(code),
        "SLURM_JOB_ID": "123",
        "SLURM_JOB_NODELIST": "node-[a-b]",
        "SLURM_CPUS_PER_TASK": "10",
    }
    arguments = ["vit_b_mae3d", "--data", "my store", "-o", "run", "seed=1"]
    done = subprocess.run(["bash", str(SCRIPT), *arguments], env=environment, capture_output=True, text=True)
    return done.returncode, log.read_text().splitlines()


def test_the_script_is_valid():
    subprocess.run(["bash", "-n", str(SCRIPT)], check=True)


@pytest.mark.parametrize(("code", "queued_again"), [(0, False), (1, False), (75, True)])
def test_a_run_that_saved_itself_is_queued_again(tmp_path, code, queued_again):
    returned, calls = run_script(tmp_path, code)
    assert returned == code
    assert "srun --cpus-per-task=10" in calls
    assert (
        "medmim-train pretrain vit_b_mae3d --data my store -o run seed=1 at node-a:20123 as 3 of 4, 1 here"
    ) in calls
    assert ("scontrol requeue 123" in calls) is queued_again
