"""What several test files use."""
from types import SimpleNamespace

import pytest

import data


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
