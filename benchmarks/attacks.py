"""How long it takes to recompute every attack of a finished grid from its evidence, without torch.

python benchmarks/attacks.py FOLDER        an output folder of `imprint run`; nothing in it is changed
"""

from __future__ import annotations

import shutil
import sys
import tempfile
import time
from pathlib import Path

from imprint.rows import load_grid, write_results


def main(folder: Path) -> None:
    with tempfile.TemporaryDirectory() as temporary:
        copied = Path(temporary) / "run"
        shutil.copytree(folder, copied)
        grid = load_grid(copied)
        started = time.perf_counter()
        frame = write_results(grid)
        seconds = time.perf_counter() - started
        cell = grid.cells[0]
        shadows = sum(len(cell.shadows) for cell in grid.cells)
        epochs = sum(cell.epochs + 1 for cell in grid.cells)
        print(f"{len(grid.cells)} cells, {shadows} shadow models, {epochs} checkpoints, {len(cell.records)} records")
        print(f"{len(grid.attacks)} attacks, {len(frame):,} measurements: {seconds:.1f} s")
        print(f"torch imported: {'torch' in sys.modules}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
