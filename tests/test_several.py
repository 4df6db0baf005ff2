"""Two processes, started by torchrun on the CPU, train as the formulas say, and one of them writes.

Each draws its share of a batch by rng(seed, step, rank), process 0 by rng(seed, step). The step is
taken along the mean of their gradients, so that all have equal weights. The processes run this
file as a script.
"""
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from test_train_gen import by_hand
from torch.testing import assert_close

import data
import train_cls
import train_gen
from augment import compose

GEN = dict(size=8, width=16, mults=(1, 2), blocks=1, timesteps=20, steps=4, batch=9, lr=1e-2,
           warmup=2, ema=0.2, augment="hflip")                           # of 9 images each draws 4
CLS = dict(size=8, patch=4, dim=16, depth=1, heads=2, steps=3, batch=8, lr=1e-2, warmup=1,
           augment="hflip,cutmix")


def main(cfg):
    """What each process does: train both on the tree cfg.data."""
    torch.set_default_dtype(torch.float64)
    if data.rank():                                      # it would fail if it wrote
        data.save_csv = data.save_picture = data.save_checkpoint = None
    train_gen.main(train_gen.Script(data=cfg.data, out=f"{cfg.out}/gen", **GEN))
    train_cls.main(train_cls.Script(data=cfg.data, out=f"{cfg.out}/cls", **CLS))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where two processes have trained."""
    folder = tmp_path_factory.mktemp("several")
    data.draw_tree(folder / "tree", 4, size=8)
    here, torchrun = Path(__file__), [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    path = os.pathsep.join(map(str, (here.parent, here.parents[1])))
    environment = dict(PYTHONPATH=path, CUDA_VISIBLE_DEVICES="", OMP_NUM_THREADS="1")
    command = [*torchrun, "--nproc-per-node", "2", here, "--data", "tree", "--out", "."]
    done = subprocess.run(command, cwd=folder, env=os.environ | environment, text=True,
                          capture_output=True, timeout=200)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("done: python train_gen.py") == 1           # process 0 alone speaks
    return folder


def training_images(folder):
    scenes = data.read(folder / "tree", 8, cache=folder / "runs/cache")
    return scenes[data.choose(scenes, data.split(scenes)["train"], 0, 0)]


@pytest.mark.usefixtures("on_cpu", "in_float64")
def test_two_processes_train_the_generator_of_the_formulas(folder, adamw_by_hand):
    averages, _, _ = by_hand(training_images(folder), train_gen.Config(**GEN), adamw_by_hand, 2)
    network = train_gen.load_generator(folder / "gen/generator.pt").network
    for name, p in network.named_parameters():
        assert_close(p.detach(), averages[name], rtol=0, atol=1e-6)
    written = sorted(path.name for path in (folder / "gen").iterdir())
    assert written == ["generator.csv", "generator.pt", "samples-000004.png"]


@pytest.mark.usefixtures("on_cpu", "in_float64")
def test_two_processes_train_the_classifier_of_the_formulas(folder):
    real, cfg = training_images(folder), train_cls.Config(**CLS)
    model = train_cls.initial_model(cfg, real.classes, 3)
    mixture = train_cls.Mixture(real, None, cfg, torch.device("cpu"))
    optimizer = train_cls.adamw(model, cfg.decay)
    for step in range(cfg.steps):
        for rank in (0, 1):
            g = data.rng(cfg.seed, step, *[rank] * rank)
            index = mixture.draw(4, 0.0, g)
            x = data.to_float(mixture.images[index])
            x, y = compose(cfg.augment)(x, mixture.targets[index], g)
            (F.cross_entropy(model(x), y, label_smoothing=cfg.smoothing) / 2).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = data.lr_at(step, cfg) * group["lr_scale"]
        optimizer.step()
        optimizer.zero_grad()
    saved = data.load_checkpoint(folder / "cls/classifier.pt", "classifier")
    assert_close(saved["model"], dict(model.state_dict()), rtol=0, atol=1e-6)


def test_sampling_and_clip_under_torchrun_are_refused(monkeypatch, launch):
    monkeypatch.setattr(data.dist, "is_initialized", lambda: True)
    monkeypatch.setattr(data.dist, "destroy_process_group", lambda: None)
    for script, *flags in ((train_gen, "--sample", "g.pt"), (train_cls, "--learn", "clip")):
        refused = launch(script, *flags)
        assert refused.returncode == 2 and "one process" in refused.stderr


if __name__ == "__main__":
    data.launch(main, train_gen.Script)
