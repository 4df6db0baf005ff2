"""Does the default run tell the truth? Run it by hand on ten new drawn data sets.

    python tests/truth.py [FOLDER] [TASK]        half an hour to two hours on two cores

Fresh drawings in place of real ones, as a perfect generator would make, must be said to help in at
least 9 of 10. Copies of the real images hold nothing new: in at most 1. No generator is needed.
"""
import contextlib
import io
import sys
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import data  # noqa: E402
import experiment  # noqa: E402


def main(out, tasks=("scenes", "buildings"), repeats=10, scale="small"):
    """Compare on every data set, print each gain, and exit with 1 if the verdicts are not true."""
    helped = Counter()
    for name in tasks:
        task, sets, seed = experiment.TASKS[name], 0, 99
        draw = data.draw_xbd if name == "buildings" else data.draw_tree
        arms = [dict(task.claims)[task.main_arm],
                *(arm for arm in task.arms if task.arms[arm].source in ("fresh", "copies"))]
        while sets < repeats:
            seed += 1
            root = draw(out / f"drawn-{name}-{seed}", experiment.SCALES[name][scale].drawn, seed)
            cfg = experiment.Config(data=str(root), out=str(out / f"{name}-{seed}"), scale=scale,
                                    arms=",".join(arms))
            try:
                with contextlib.redirect_stdout(io.StringIO()):
                    comparison, = experiment.main(cfg)
            except data.UserError:                       # its training tiles lack a class
                continue
            sets += 1
            for claim in experiment.claims(comparison):
                helped[claim.arm] += claim.verdict == "helps"
                print(f"{sets:3}  {claim.arm:32} {claim.gain.text():24} p {claim.p:.4f}  "
                      f"{claim.verdict:26} helped in {helped[claim.arm]}", flush=True)
    true = all(10 * n >= 9 * repeats if "fresh" in arm else 10 * n <= repeats
               for arm, n in helped.items())
    print("This is the truth." if true else "This is not the truth.")
    return 0 if true else 1


if __name__ == "__main__":
    sys.exit(main(Path((sys.argv + ["runs/truth"])[1]), sys.argv[2:] or ("scenes", "buildings")))
