"""Does the default run tell the truth? Run it by hand on ten new drawn data sets.

    python tests/truth.py [FOLDER]        about half an hour on two cores

Fresh drawings in place of real ones, as a perfect generator would make, must be said to help in at
least 9 of 10. Copies of the real images hold nothing new: they must be said to help in at most 1.
Both hold in both tasks, with the sizes, steps and seeds of the default run. No generator is needed:
these two controls are corrected apart from the claims about synthetic images.
"""
import contextlib
import io
import sys
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import data  # noqa: E402
import experiment  # noqa: E402

ARMS = {"scenes": "real + augmentation,real + fresh real,real + copies,linear: real",
        "buildings": "balanced,balanced + fresh real,balanced + copies,linear: balanced"}


def main(out, repeats=10, scale="small"):
    """Compare on every data set, print each gain, and exit with 1 if the verdicts are not true."""
    helped = Counter()
    for k in range(repeats):
        for task, arms in ARMS.items():
            draw = data.draw_xbd if task == "buildings" else data.draw_tree
            drawn = experiment.SCALES[task][scale].drawn
            root = draw(out / f"drawn-{task}-{k}", drawn, seed=100 + k)
            flags = dict(data=str(root), out=str(out / f"{task}-{k}"), scale=scale, arms=arms)
            with contextlib.redirect_stdout(io.StringIO()):
                comparison, = experiment.main(experiment.Config(**flags))
            for claim in experiment.claims(comparison):
                helped[claim.arm] += claim.verdict == "helps"
                print(f"{k + 1:3}  {claim.arm:24} {claim.gain.text():24} p {claim.p:.4f}  "
                      f"{claim.verdict:26} helped in {helped[claim.arm]}", flush=True)
    fresh = min(helped["real + fresh real"], helped["balanced + fresh real"])
    copies = max(helped["real + copies"], helped["balanced + copies"])
    true = fresh >= 0.9 * repeats and copies <= 0.1 * repeats
    print("This is the truth." if true else "This is not the truth.")
    return 0 if true else 1


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1] if sys.argv[1:] else "runs/truth")))
