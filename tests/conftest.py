"""What several test files use."""
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import data

torch.set_num_threads(1)                                 # small networks gain nothing from more
READS = "_local_scalar_dense", "nonzero", "masked_select", "equal", "unique"


class NoReading(TorchDispatchMode):
    """Refuses what reads a tensor's values into Python: .item(), float(), if x > 0, x[mask] ..."""

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        name, reads = operation.__name__, any(word in operation.__name__ for word in READS)
        if name == "index.Tensor":
            reads = any(z is not None and z.dtype == torch.bool for z in args[1])
        assert not reads, f"{operation} waits for the device"
        return operation(*args, **(kwargs or {}))


@contextmanager
def waiting_forbidden():
    """Fail where Python waits for the device in this block: CUDA itself watches, too, on a GPU."""
    watch = torch.cuda.set_sync_debug_mode if torch.cuda.is_available() else lambda mode: None
    try:
        watch("error")
        with NoReading():
            yield
    finally:
        watch("default")


@pytest.fixture
def on_cpu(monkeypatch):
    """Keep the test on the CPU, where results are equal to the bit and its own tensors lie."""
    monkeypatch.setattr(data, "pick_device", lambda: torch.device("cpu"))


@pytest.fixture
def no_waiting():
    return waiting_forbidden


@pytest.fixture
def hasty_steps(monkeypatch):
    """Forbid training loops to wait, but in the first and last step. Lists the others."""
    watched = []

    def progress(items, *_, **__):
        for item in items:
            if item in (items[0], items[-1]):
                yield item
            else:
                watched.append(item)
                with waiting_forbidden():
                    yield item

    monkeypatch.setattr(data, "progress", progress)
    return watched


@pytest.fixture
def in_float64():
    """Compute in float64: AdamW divides by gradients, of which float32 leaves noise near 0."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


class AdamW:
    """Loshchilov & Hutter 2019, Algorithm 2. decay(p) is the weight decay of a parameter."""

    def __init__(self, parameters, betas, decay):
        self.parameters, self.betas = list(parameters), betas
        self.decay, self.step = decay, 0
        self.moments = [(torch.zeros_like(p), torch.zeros_like(p)) for p in self.parameters]

    @torch.no_grad()
    def move(self, gradients, rate):
        (b1, b2), self.step = self.betas, self.step + 1
        for k, (p, g) in enumerate(zip(self.parameters, gradients, strict=True)):
            m, v = self.moments[k]
            m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g**2
            self.moments[k] = m, v
            size = (v / (1 - b2**self.step)).sqrt() + 1e-8
            p -= rate * (self.decay(p) * p + m / (1 - b1**self.step) / size)


@pytest.fixture
def adamw_by_hand():
    return AdamW


@pytest.fixture
def launch(capsys):
    """Run a script's command line in this process, which saves the seconds of importing torch."""
    def run(module, *argv):
        code, config = 0, getattr(module, "Script", None) or module.Config
        try:
            data.launch(module.main, config, [str(part) for part in argv])
        except SystemExit as stop:
            code = stop.code
        out, err = capsys.readouterr()
        return SimpleNamespace(returncode=code, stdout=out, stderr=err)
    return run
