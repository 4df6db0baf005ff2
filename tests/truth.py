"""Does the default run tell the truth? Run it by hand on ten new drawn data sets.

    python tests/truth.py [FOLDER] [TASK]        about half an hour on two cores

Fresh drawings in place of real ones, as a perfect generator would make, must be said to help in at
least 9 of 10. Copies of the real images hold nothing new: they must be said to help in at most 1.
Both hold in both tasks, with the sizes, steps and seeds of the default run. No generator is needed:
these two controls are corrected apart from the claims about synthetic images. The experiment
refuses a data set whose training tiles lack a class: the next one takes its place.
"""
import contextlib
import io
import sys
from collections import Counter
from itertools import count
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import data  # noqa: E402
import experiment  # noqa: E402


def main(out, tasks=("scenes", "buildings"), repeats=10, scale="small"):
    """Compare on every data set, print each gain, and exit with 1 if the verdicts are not true."""
    true = True
    for name in tasks:
        task, sets, helped = experiment.TASKS[name], 0, Counter()
        draw = data.draw_xbd if name == "buildings" else data.draw_tree
        arms = [arm for arm in task.arms if task.arms[arm].source in ("fresh", "copies")]
        asked = ",".join([dict(task.claims)[task.main_arm], *arms])
        for seed in count(100):
            root = draw(out / f"drawn-{name}-{seed}", experiment.SCALES[name][scale].drawn, seed)
            flags = dict(data=str(root), out=str(out / f"{name}-{seed}"), scale=scale, arms=asked)
            try:
                with contextlib.redirect_stdout(io.StringIO()):
                    comparison, = experiment.main(experiment.Config(**flags))
            except data.UserError as error:
                print(f"{name}, seed {seed} is refused: {error}", flush=True)
                continue
            sets += 1
            for claim in experiment.claims(comparison):
                helped[claim.arm] += claim.verdict == "helps"
                print(f"{sets:3}  {claim.arm:32} {claim.gain.text():24} p {claim.p:.4f}  "
                      f"{claim.verdict:26} helped in {helped[claim.arm]}", flush=True)
            if sets == repeats:
                break
        fresh, copies = [helped[arm] for arm in arms]
        true &= fresh >= 0.9 * repeats and copies <= 0.1 * repeats
    print("This is the truth." if true else "This is not the truth.")
    return 0 if true else 1


if __name__ == "__main__":
    path, *asked = sys.argv[1:] or ["runs/truth"]
    sys.exit(main(Path(path), asked or ("scenes", "buildings")))
