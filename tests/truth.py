"""Does the default run tell the truth? Ten new drawn data sets whose answers are known, run by hand.

    python tests/truth.py [FOLDER]        about half an hour on two cores

Fresh drawings in place of real ones must be said to help in at least 9 of 10, as a perfect generator would;
copies of the real images must be said to help in none or one: they cannot add anything. Both in both legs,
with the sizes, steps, seeds and arms of the default run that bear on it, so without its generators: the two
controls are a family of their own, and their verdicts those of the default run.
"""
import contextlib
import io
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import data  # noqa: E402
import experiment  # noqa: E402

ARMS = {"scenes": "real + augmentation,real + fresh real,real + copies,linear: real",
        "buildings": "balanced,balanced + fresh real,balanced + copies,linear: balanced"}


def main(out, repeats=10):
    """Run the comparisons, or take what is there; print each gain, then how often it was called a help."""
    tally = {leg: dict(fresh=0, copies=0, above=0) for leg in ARMS}
    for k in range(repeats):
        for leg, counts in tally.items():
            for kind, right in one(leg, k, out).items():
                counts[kind] += right
            print(f"{leg}: of {k + 1}, fresh drawings were said to help {counts['fresh']} times, copies "
                  f"{counts['copies']} times; the ViT was above the floor {counts['above']} times",
                  flush=True)
    sys.exit(not all(counts["fresh"] >= 0.9 * repeats and counts["copies"] <= 0.1 * repeats
                     for counts in tally.values()))


def one(leg, k, out):
    """Compare on the k-th new data set: {fresh, copies: said to help; above: is the ViT above the floor}."""
    draw = data.draw_xbd if leg == "buildings" else data.draw_tree
    root = draw(out / f"drawn-{leg}-{k}", experiment.SCALES[leg]["small"].drawn, seed=100 + k)
    cfg = experiment.Config(data=str(root), out=str(out / f"{leg}-{k}"), scale="small", arms=ARMS[leg])
    with contextlib.redirect_stdout(io.StringIO()):
        case, = experiment.main(cfg)
    found = dict(above=experiment.able(case, case.s.counts[0], "", "test"))
    for claim in experiment.claims(case):
        kind = "fresh" if "fresh" in claim.arm else "copies"
        found[kind] = claim.word == "help"
        print(f"{leg} {k + 1:3}  {kind:7} {experiment.points(claim.gain):24} p {claim.p:.4f} {claim.word}")
    print(experiment.footing(case, case.s.counts[0])[1], flush=True)
    return found


if __name__ == "__main__":
    main(Path(sys.argv[1] if sys.argv[1:] else "runs/truth"))
