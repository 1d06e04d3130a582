"""What `import pace_kernels` adds to `import torch`, each time in a fresh process: python bench/import_time.py

A dozen processes in a row, and the medians with their smallest and largest values.
"""

import argparse
import statistics
import subprocess
import sys

# Prints the seconds that torch takes, and the package after it.
PROBE = """
from time import perf_counter
start = perf_counter()
import torch
between = perf_counter()
import pace_kernels
end = perf_counter()
print(between - start, end - between)
"""


def measured(processes: int) -> tuple[list[float], list[float]]:
    """Seconds that torch took, and that the package took after it, in each process."""
    rows = []
    for _ in range(processes):
        out = subprocess.run([sys.executable, "-c", PROBE], check=True, capture_output=True, text=True).stdout
        rows.append([float(word) for word in out.split()])
    return [row[0] for row in rows], [row[1] for row in rows]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, default=12)
    measured(1)  # so that the files are in memory
    for name, seconds in zip(("torch", "pace_kernels after it"), measured(parser.parse_args().processes), strict=True):
        print(f"{name:22} {statistics.median(seconds):6.2f} s   {min(seconds):.2f} to {max(seconds):.2f}")


if __name__ == "__main__":
    main()
