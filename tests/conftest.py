"""What several test files use."""
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import data

ANSWERS = ("_local_scalar_dense", "nonzero", "masked_select", "equal", "unique")


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
