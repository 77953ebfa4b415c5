"""Coverage-guided fuzzing (atheris) of the parsers in `../parsers.py`; see README.md.

python tests/fuzz/fuzz.py "NRRD" -max_total_time=60     one parser, until something other than a MedmimError escapes
python tests/fuzz/fuzz.py --all 60 -o results.json      each for so many seconds, in a process of its own
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from tempfile import TemporaryDirectory

HERE = Path(__file__).parent
COUNTS = "MEDMIM_FUZZ_COUNTS"  # names the file that a fuzzing process writes what it saw to
MEMORY_MB, SECONDS = 2048, 20  # of a process, torch and all; of one input


def fuzz(name: str, arguments: list[str]) -> None:
    """Runs the fuzzer on one parser; libFuzzer ends the process."""
    import atheris

    sys.path[:0] = [str(HERE.parent), str(HERE.parents[1]), str(HERE.parents[1] / "training")]
    with atheris.instrument_imports(include=["medmim", "medmim_training"]):
        from medmim.errors import MedmimError
        from parsers import PARSERS
    parser, seen, start = PARSERS[name], Counter(), time.monotonic()
    example = parser.example()
    parser(example)  # what is imported late is not counted to the first input
    counts = os.environ.get(COUNTS)

    def one_input(content: bytes) -> None:
        try:
            parser(content)
            seen["read"] += 1
        except MedmimError as error:
            seen[type(error).__name__] += 1
        if counts and sum(seen.values()) % 50 == 0:
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
            report = {"inputs": sum(seen.values()), "outcomes": dict(seen), "peak_mb": peak}
            Path(counts).write_text(json.dumps({**report, "seconds": round(time.monotonic() - start, 1)}))

    with TemporaryDirectory() as corpus:
        (Path(corpus) / "example").write_bytes(example)
        limits = [f"-rss_limit_mb={MEMORY_MB}", f"-timeout={SECONDS}", f"-max_len={2 * len(example) + 1000}"]
        atheris.Setup([sys.argv[0], *limits, "-verbosity=0", "-close_fd_mask=3", *arguments, corpus], one_input)
        atheris.Fuzz()


def fuzz_all(names: list[str], seconds: int, output: Path) -> None:
    """Runs parsers in turn, by default all, and writes a line of figures on each; lines of others stay."""
    sys.path[:0] = [str(HERE.parent), str(HERE.parents[1]), str(HERE.parents[1] / "training")]
    from parsers import PARSERS

    results = json.loads(output.read_text(encoding="utf-8")) if output.exists() else {}
    for name in names or PARSERS:
        with TemporaryDirectory() as folder:
            counts = Path(folder) / "counts.json"
            command = [sys.executable, __file__, name, f"-max_total_time={seconds}", f"-artifact_prefix={folder}/"]
            done = subprocess.run(command, env={**os.environ, COUNTS: str(counts)}, capture_output=True, text=True)
            found = sorted(path.name.split("-")[0] for path in Path(folder).iterdir() if path != counts)
            figures = json.loads(counts.read_text()) if counts.exists() else {"inputs": 0}
            results[name] = {**figures, "escaped": found}
            print(name, results[name], "" if done.returncode == 0 else done.stderr[-2000:], flush=True)
        output.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("parsers", nargs="*", help="names of PARSERS")
    options.add_argument("--all", type=int, metavar="SECONDS", help="fuzz every parser for so long")
    options.add_argument("-o", "--output", type=Path, default=HERE / "results.json")
    given, rest = options.parse_known_args()
    if given.all:
        fuzz_all(given.parsers, given.all, given.output)
    else:
        fuzz(given.parsers[0], rest)
