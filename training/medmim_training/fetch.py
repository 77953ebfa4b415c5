"""Public data sets for experiments, fetched through MONAI and given the split that the experiments are reported on."""

from __future__ import annotations

import csv
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

from medmim.errors import MedmimError, SpecError
from medmim.files import write_text
from medmim.limits import LIST_BYTES, read_text
from medmim_training.reproduce.experiment import experiment_folder
from medmim_training.store.sources import DATASET, IMAGES
from medmim_training.tasks.cases import LABELS, SPLITS

TASKS = {"hippocampus": "Task04_Hippocampus"}  # names of the Medical Segmentation Decathlon; a split is beside each


class FetchError(MedmimError):
    """A data set could not be fetched."""


def fetch_data(name: str, folder: str | Path, *, download: Callable[..., None] | None = None) -> tuple[int, int]:
    """Fetches a data set, checks it, and lays out the cases that its split lists.

    Args:
        name: A key of `TASKS`.
        folder: Where to; it must not have images yet.
        download: In place of `monai.apps.download_and_extract`.

    Returns:
        Numbers of cases laid out, and of cases that the split does not list and that are left out.

    Raises:
        SpecError: For a name that does not exist, or a folder in use.
        FetchError: When the download fails, is damaged, or lacks listed cases.
    """
    from monai.apps import DecathlonDataset, download_and_extract

    if name not in TASKS:
        raise SpecError(f"there is no data set {name!r}; there are {', '.join(TASKS)}")
    folder, task = Path(folder), TASKS[name]
    url = DecathlonDataset.resource[task]
    if (folder / IMAGES).exists():
        raise SpecError(f"{folder}: has {IMAGES} already; choose another folder, or use what is there")
    text = read_text(experiment_folder() / f"{name}.csv", LIST_BYTES)
    listed = [row["case"] for row in csv.DictReader(text.splitlines())]
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".fetching-") as temporary:
        try:
            (download or download_and_extract)(
                url,
                Path(temporary) / f"{task}.tar",
                temporary,
                hash_val=DecathlonDataset.md5[task],
                hash_type="md5",
            )
        except (OSError, RuntimeError) as error:  # of the network; MONAI raises its own for a wrong checksum
            raise FetchError(f"{url}: not fetched ({error}); try again later") from error
        source = Path(temporary) / task
        found = {path.name for path in (source / IMAGES).glob("*.nii.gz") if not path.name.startswith(".")}
        wanted = [f"{case}.nii.gz" for case in listed]
        if missing := sorted(set(wanted) - found):
            raise FetchError(f"{url}: lacks {len(missing)} listed cases, such as {missing[0]}")
        write_text(folder / SPLITS, text)
        shutil.move(source / DATASET, folder / DATASET)
        for kind in (LABELS, IMAGES):  # images last: their folder says that all is there
            chosen = source / f"chosen-{kind}"
            chosen.mkdir()
            for file in wanted:
                shutil.move(source / kind / file, chosen / file)
            shutil.move(chosen, folder / kind)
    return len(wanted), len(found) - len(wanted)
