"""Study: train and evaluate every arm of a plan with several seeds, within a budget of minutes, and report.

    python -m src.study budget=60                      conf=study/a,study/b,study/c: goes on where it stopped
    python -m src.study conf=study/a budget=0          only the report, and the hours that are left
    python -m src.study conf=study/small budget=5 out=runs/study/small
    python -m src.study split=test budget=600          the final stage, once all cells of val are done

    plan -> cells (arm x seed): src.train, ..., src.evaluate -> OUT/val/CELL.json -> OUT/README.md, OUT/*.png

The first cell is run in any case (unless budget=0) and tells how long the others take. A cell that would not end within
the budget is not begun. A cell that fails is named, and the next call tries it again; a kill loses only the running
cell, whose trainings resume. Every arm of a table makes as many training passes, else the plan is refused. Calls that
run at the same time share the cells: on two cores, two with OMP_NUM_THREADS=1 train at twice the rate of one.
"""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

from src.cli.config import load_config
from src.cli.entrypoint import main_guard
from src.cli.help import NEEDS
from src.cli.instantiate import plain
from src.evaluation.study import check_stage, hours_left, hours_of_cell, read_plan, run, run_cell
from src.evaluation.study_report import write_study
from src.io.errors import UserError
from src.io.lock import held
from src.io.progress import Bar

WHOLE = "conf=study/a,study/b,study/c"


@main_guard
def main(argv: list[str]) -> None:
    # 1. The plan: every command is composed, every arm's passes are counted.
    started = time.monotonic()
    argv = argv if any(word.startswith("conf=") for word in argv) else [WHOLE, *argv]
    cfg = load_config(argv, verb="src.study", needs=NEEDS["src.study"])
    plan, split = read_plan(plain(cfg)), cfg.split
    check_stage(plan, split)
    command = ["git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    found = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True)
    commit = found.stdout.strip() or "unknown"

    # 2. What all cells need, such as data. Another call that is at it is waited for.
    Path(plan.out).mkdir(parents=True, exist_ok=True)
    cells = plan.cells(split)
    missing = [cell for cell in cells if not plan.is_done(cell)]
    is_ready = not missing or cfg.budget <= 0
    while not is_ready:
        with held(Path(plan.runs) / "setup") as is_ready:
            for line in plan.setup if is_ready else ():
                if failed := run(plan.filled(line, missing[0]), Path(plan.runs) / "setup.txt"):
                    raise UserError(f"setup: {failed}")
        time.sleep(0 if is_ready else 1)

    # 3. The cells. The first one ever is the measurement, after which the plan is printed in hours.
    num_failed, announced = 0, False
    with Bar(total=len(cells), initial=len(cells) - len(missing), unit="cell", desc="study") as bar:
        for cell in missing:
            hours = hours_of_cell(plan, cell.table, split)
            if hours is not None and not announced:
                bar.write(hours_left(plan, split))
                announced = True
            if cfg.budget <= 0 or (time.monotonic() - started) / 60 + 60 * (hours or 0.0) > cfg.budget:
                bar.write(f"budget={cfg.budget:g} minutes: {cell.name} is not begun")
                break
            with held(plan.folder(cell)) as is_free:
                if is_free and not plan.is_done(cell):  # else another call has done it, or is at it
                    result = run_cell(plan, cell, commit=commit)
                    num_failed += "failed" in result
                    ending = result.get("failed") or f"{result['seconds']:.0f} s"
                    bar.write(f"{cells.index(cell) + 1}/{len(cells)} {cell.name}: {ending}")
            bar.update()
            sys.stdout.flush()

    # 4. The report.
    text = write_study(plan, metrics=list(cfg.metrics), command=f"python -m src.study {argv[0]}")
    sys.stdout.write(f"{text}\n{Path(plan.out) / 'README.md'}\n")
    if num_failed:
        raise UserError(
            f"{num_failed} of the cells failed, see {plan.out}/README.md; the same command tries them again"
        )


if __name__ == "__main__":
    main()
