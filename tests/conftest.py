"""What several test files use."""
import os
import shutil
import subprocess
import sys
import tempfile
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import data

torch.set_num_threads(1)                                             # small networks gain nothing from more
ANSWERS = ("_local_scalar_dense", "nonzero", "masked_select", "equal", "unique")


# ---- two processes share the test files: each takes the next one that nobody has begun

OTHER = SimpleNamespace(folder=os.environ.get("TESTS_BEGUN", ""), process=None)


def pytest_collection_modifyitems(items):
    """Put large files first, so that both processes end together."""
    items.sort(key=lambda item: -item.path.stat().st_size)


def pytest_collection_finish(session):
    """Start the other process, with this one's arguments, where there are several files and cores."""
    several, option = len({item.path for item in session.items}) > 1, session.config.option
    if several and os.cpu_count() > 1 and not (OTHER.folder or option.collectonly or option.usepdb):
        OTHER.folder = tempfile.mkdtemp()
        argv = [sys.executable, "-m", "pytest", *session.config.invocation_params.args]
        OTHER.process = subprocess.Popen(argv, cwd=session.config.invocation_params.dir, text=True,
                                         env=os.environ | dict(TESTS_BEGUN=OTHER.folder),
                                         stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


@cache
def mine(file):
    """Is a test file this process's to run? Who makes its folder first has it."""
    try:
        return not OTHER.folder or os.mkdir(Path(OTHER.folder) / file.name) is None
    except FileExistsError:
        return False


def pytest_runtest_protocol(item):
    """Pass over (True) a test whose file the other process has."""
    return None if mine(item.path) else True


@pytest.hookimpl(tryfirst=True)
def pytest_sessionfinish(session):
    """Wait for the other process, and fail if it did."""
    if OTHER.process:
        OTHER.said, _ = OTHER.process.communicate()
        shutil.rmtree(OTHER.folder)
        session.exitstatus = session.exitstatus or OTHER.process.returncode


def pytest_terminal_summary(terminalreporter):
    """Show what the other process said, all of it if a test failed there."""
    if OTHER.process:
        said = OTHER.said.rstrip() if OTHER.process.returncode else OTHER.said.rstrip().rpartition("\n")[2]
        terminalreporter.write_line(f"another process:\n{said}")


# ---- what several files use

@pytest.fixture(scope="module")
def begun(request, tmp_path_factory):
    """What the file's begin(folder, start) began is done: (folder, processes, [what it printed, its errors]).

    start(*argv, **environment) starts the file itself as a script, which can import all that tests can.
    """
    def start(*argv, **environment):
        here = Path(__file__).parent
        new = dict(PYTHONPATH=f"{here}{os.pathsep}{here.parent}", **environment)
        return subprocess.Popen([sys.executable, request.path, *argv], text=True, stdout=subprocess.PIPE,
                                stderr=subprocess.PIPE, env=os.environ | {k: str(v) for k, v in new.items()})

    folder = tmp_path_factory.mktemp("begun")
    processes = request.module.begin(folder, start)
    try:
        yield folder, processes, [process.communicate(timeout=300) for process in processes]
    finally:
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
