"""What several test files use."""
import os
import subprocess
import sys
import tempfile
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import data

torch.set_num_threads(1)                                             # small networks gain nothing from more
ANSWERS = ("_local_scalar_dense", "nonzero", "masked_select", "equal", "unique")


BEGUN = {}                               # {test file: (a folder, the processes that it began there)}


def start(file, *argv, **environment):
    """Start a test file as a script, which can import all that tests can."""
    here = Path(__file__).parent
    new = dict(PYTHONPATH=f"{here}{os.pathsep}{here.parent}", **environment)
    return subprocess.Popen([sys.executable, file, *argv], text=True, stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE, env=os.environ | {k: str(v) for k, v in new.items()})


def begin(module):
    folder = tempfile.TemporaryDirectory()
    BEGUN[module] = folder, module.begin(Path(folder.name), partial(start, module.__file__))


def pytest_runtestloop(session):
    """Begin what takes long before the first test, on another core: the begin(folder, start) of test files.

    start(*argv, **environment) starts the file itself as a script.
    """
    if not (session.config.option.collectonly or hasattr(session.config, "workerinput")):
        for module in {item.module: 0 for item in session.items if "begun" in item.fixturenames}:
            begin(module)


@pytest.fixture(scope="module")
def begun(request):
    """What the file's begin began is done: (folder, processes, what each printed and its errors)."""
    if request.module not in BEGUN:
        begin(request.module)
    folder, processes = BEGUN[request.module]
    ended = [process.communicate(timeout=300) for process in processes]
    yield Path(folder.name), processes, ended
    folder.cleanup()


def pytest_unconfigure():
    """Leave nothing running, whatever ended the tests."""
    for _, processes in BEGUN.values():
        for process in processes:
            process.kill()


class NoAnswers(TorchDispatchMode):
    """Refuses what reads a tensor's values into Python: .item(), float(), if x > 0, x[mask] ..."""

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        name = operation.__name__
        mask = name == "index.Tensor" and any(z is not None and z.dtype == torch.bool for z in args[1])
        assert not mask and not any(word in name for word in ANSWERS), f"{operation} waits for the device"
        return operation(*args, **(kwargs or {}))


@contextmanager
def waiting_forbidden():
    """In this block Python must not wait for the device: seen by the operations, and on a GPU by CUDA."""
    try:
        if torch.cuda.is_available():
            torch.cuda.set_sync_debug_mode("error")
        with NoAnswers():
            yield
    finally:
        if torch.cuda.is_available():
            torch.cuda.set_sync_debug_mode("default")


@pytest.fixture
def on_cpu(monkeypatch):
    """Keep the test on the CPU: what it says is true there to the bit, or its own tensors lie there."""
    monkeypatch.setattr(data, "pick_device", lambda: torch.device("cpu"))


@pytest.fixture
def no_waiting():
    return waiting_forbidden


@pytest.fixture
def hasty_steps(monkeypatch):
    """The loops of training refuse to wait, except in the first step, where CUDA starts, and the last.

    A list of the steps that were watched.
    """
    watched = []

    def progress(items, *_, **__):
        for k, item in enumerate(items):
            if 0 < k < len(items) - 1:
                watched.append(item)
                with waiting_forbidden():
                    yield item
            else:
                yield item

    monkeypatch.setattr(data, "progress", progress)
    return watched


class AdamW:
    """Loshchilov & Hutter 2019, Algorithm 2, written out: decay(p) is the weight decay of a parameter."""

    def __init__(self, parameters, betas, decay):
        self.parameters, self.betas, self.decay, self.step = list(parameters), betas, decay, 0
        self.moments = [(torch.zeros_like(p), torch.zeros_like(p)) for p in self.parameters]

    @torch.no_grad()
    def move(self, gradients, rate):
        (b1, b2), self.step = self.betas, self.step + 1
        for k, (p, g, (m, v)) in enumerate(zip(self.parameters, gradients, self.moments, strict=True)):
            m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g**2
            self.moments[k] = m, v
            size = (v / (1 - b2**self.step)).sqrt() + 1e-8
            p -= rate * (self.decay(p) * p + m / (1 - b1**self.step) / size)


@pytest.fixture
def in_float64():
    """AdamW divides by the size of gradients: where that is nearly 0, float32 would show mere noise."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.fixture
def adamw_by_hand():
    return AdamW


@pytest.fixture
def launch(capsys):
    """Run a script's command line in this process, which saves the seconds that importing torch takes."""
    def run(module, *argv):
        code = 0
        try:
            data.launch(module.main, module.Script, [str(part) for part in argv])
        except SystemExit as stop:
            code = stop.code
        out, err = capsys.readouterr()
        return SimpleNamespace(returncode=code, stdout=out, stderr=err)
    return run
