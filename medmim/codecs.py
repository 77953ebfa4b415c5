"""Decode compressed DICOM frames with ITK's codecs, in a process of their own.

They are native code (JPEG, lossless JPEG, JPEG-LS, JPEG 2000, RLE), and broken data can end the process that runs it.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

MEMORY = 16_000_000_000  # bytes of address space that decoding may take, where the system can limit it


class DecodingError(RuntimeError):
    """What ITK said, or how the process ended."""


def decode(files: Iterable[Path]) -> None:
    """Writes the frames of each DICOM file beside it: (frames, rows, columns) as stored, to a .npy file of its name.

    Raises:
        DecodingError: When one cannot be decoded.
    """
    # This file alone, without the package: it starts the sooner.
    command = [sys.executable, "-P", __file__]
    done = subprocess.run(command, input="\n".join(map(str, files)), capture_output=True, text=True, errors="replace")
    if done.returncode:
        raise DecodingError(done.stderr if done.returncode == 1 else f"the decoder ended with {done.returncode}")


def _decode_here(files: Iterable[str]) -> None:
    import numpy as np
    import SimpleITK as sitk

    sitk.ProcessObject.SetGlobalWarningDisplay(False)
    for file in files:
        try:
            image = sitk.ReadImage(file, imageIO="GDCMImageIO")
        except RuntimeError as error:
            sys.exit(str(error))
        np.save(Path(file).with_suffix(".npy"), sitk.GetArrayViewFromImage(image), allow_pickle=False)


def _limit_memory() -> None:
    try:
        import resource
    except ImportError:  # of Unix alone
        return
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, resource.getrlimit(resource.RLIMIT_AS)[1]))


if __name__ == "__main__":
    _limit_memory()
    _decode_here(sys.stdin.read().splitlines())
