"""Does the lab tell the truth? Twenty small comparisons whose answers are known, run by hand.

    python tests/truth.py [FOLDER]        about a quarter of an hour on two cores

Fresh drawings in place of real ones must help (at least 18 times of 20), copies of the real images must not
(at most once): the first is what a perfect generator would give, the second cannot add anything. Each
comparison has scenes, seeds and subsets of its own.
"""
import contextlib
import io
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import data  # noqa: E402
import experiment  # noqa: E402

ARMS = "real + augmentation,real + fresh real,real + copies"


def main(out, repeats=20):
    """Run the comparisons, or take what is there; print each gain, then how often it was called a help."""
    helped = {}
    for k in range(repeats):
        root = data.draw_tree(out / f"drawn-{k}", 160, seed=100 + k)
        cfg = experiment.Config(data=str(root), out=str(out / str(k)), scale="small", arms=ARMS, counts="5",
                                seeds=6, subsets=6, cls_steps=200)
        with contextlib.redirect_stdout(io.StringIO()):
            case, = experiment.main(cfg)
        for claim in experiment.claims(case):
            helped[claim.arm] = helped.get(claim.arm, 0) + (claim.p < 0.05 and claim.gain.mean > 0)
            print(f"{k + 1:3}  {claim.arm:20} {experiment.points(claim.gain):24} p {claim.p:.4f}", flush=True)
    ceiling, floor = helped["real + fresh real"], helped["real + copies"]
    print(f"of {repeats}, fresh drawings were said to help {ceiling} times, copies {floor} times")
    sys.exit(not (ceiling >= 0.9 * repeats and floor <= 0.05 * repeats))


if __name__ == "__main__":
    main(Path(sys.argv[1] if sys.argv[1:] else "runs/truth"))
