"""Public data sets for experiments, fetched through MONAI and given the split that the experiments are reported on."""

from __future__ import annotations

import csv
import shutil
import socket
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from medmim.errors import MedmimError, SpecError
from medmim.files import check_writable, write_text
from medmim.limits import LIST_BYTES, read_text
from medmim_training.reproduce.experiment import experiment_folder
from medmim_training.store.sources import DATASET, IMAGES
from medmim_training.tasks.cases import LABELS, SPLITS

PATIENCE = 60.0  # seconds without a byte; urllib would wait for ever
TASKS = {"hippocampus": "Task04_Hippocampus"}  # names of the Medical Segmentation Decathlon; a split is beside each


class FetchError(MedmimError):
    """A data set could not be fetched."""


def fetch_data(name: str, folder: str | Path, *, download: Callable[..., None] | None = None) -> tuple[int, int]:
    """Fetches a data set, checks it, and lays out the cases that its split lists.

    Args:
        name: A key of `TASKS`.
        folder: Where to; it must not have images yet.
        download: In place of `_download`.

    Returns:
        Numbers of cases laid out, and of cases that the split does not list and that are left out.

    Raises:
        SpecError: For a name that does not exist, or a folder in use.
        FetchError: When the download fails, is damaged, or lacks listed cases.
    """
    if name not in TASKS:
        raise SpecError(f"there is no data set {name!r} to fetch; there is {', '.join(TASKS)}")
    from monai.apps import DecathlonDataset

    folder, task = Path(folder), TASKS[name]
    url = DecathlonDataset.resource[task]
    check_writable(folder / DATASET)
    present = next((kind for kind in (IMAGES, LABELS) if (folder / kind).exists()), None)
    if present:
        raise SpecError(f"{folder}: has {present} already; choose another folder, or use what is there")
    text = read_text(experiment_folder() / f"{name}.csv", LIST_BYTES)
    listed = [row["case"] for row in csv.DictReader(text.splitlines())]
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".fetching-") as temporary:
        try:
            with _patience():
                (download or _download)(
                    url,
                    Path(temporary) / f"{task}.tar",
                    temporary,
                    hash_val=DecathlonDataset.md5[task],
                    hash_type="md5",
                )
        # The network, tarfile, a wrong checksum: there is no common class, nor does MONAI say what it raises.
        except Exception as error:
            raise FetchError(f"{url}: not fetched ({error or type(error).__name__}); try again later") from error
        source = Path(temporary) / task
        found = {path.name for path in (source / IMAGES).glob("*.nii.gz") if not path.name.startswith(".")}
        wanted = [f"{case}.nii.gz" for case in listed]
        missing = [file for file in wanted if not all((source / kind / file).is_file() for kind in (IMAGES, LABELS))]
        if missing or not (source / DATASET).is_file():
            what = f"{len(missing)} listed cases, such as {missing[0]}" if missing else DATASET
            raise FetchError(f"{url}: lacks {what}")
        write_text(folder / SPLITS, text)
        shutil.move(source / DATASET, folder / DATASET)
        for kind in (LABELS, IMAGES):  # images last: their folder says that all is there
            chosen = source / f"chosen-{kind}"
            chosen.mkdir()
            for file in wanted:
                shutil.move(source / kind / file, chosen / file)
            shutil.move(chosen, folder / kind)
    return len(wanted), len(found) - len(wanted)


def _download(url: str, filepath: Path, output_dir: str, *, hash_val: str, hash_type: str) -> None:
    """Fetches an archive, checks it and unpacks it."""
    # MONAI's function for both asks `requests` for the name of the file, which nothing else here needs.
    from monai.apps import download_url, extractall

    download_url(url, filepath, hash_val, hash_type)
    extractall(filepath, output_dir)


@contextmanager
def _patience() -> Iterator[None]:
    """Connections that say nothing for `PATIENCE` end in an error."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(PATIENCE)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)
