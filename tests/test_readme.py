"""The README: every file, name, flag and command in it exists."""
import importlib
import re
import shlex
from dataclasses import fields
from pathlib import Path

import pytest

import data
import experiment
import train_cls
import train_gen

ROOT = Path(__file__).parent.parent
TEXT = (ROOT / "README.md").read_text("utf-8")
SCRIPTS = {"data": data.Script, "train_gen": train_gen.Script, "train_cls": train_cls.Script,
           "experiment": experiment.Config}
FENCED = re.findall(r"^```\n(.*?)^```", TEXT, re.S | re.M)
LINES = [line for block in FENCED for line in block.splitlines()] + re.findall(r"`([^`\n]+)`", TEXT)
COMMANDS = [line.split("&& ")[-1].partition(" #")[0].strip() for line in LINES if "python " in line]


def main(cfg):
    """Run nothing: the command is only parsed."""


def test_there_are_commands():
    assert len(COMMANDS) > 12 and any("--study" in command for command in COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_parses(command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    program, file, *argv = shlex.split(command)
    assert program == "python"
    if file == "-m":
        return
    assert (ROOT / file).exists() or file == "FILE.py"
    if config := SCRIPTS.get(Path(file).stem):
        data.launch(main, config, argv)


def test_every_name_exists():
    modules = "ddpm|unet|vit|augment|data|train_gen|train_cls|experiment"
    names = re.findall(rf"`({modules})\.((?!py\b)[A-Za-z_.]+)`", TEXT)
    assert len(names) > 20
    for module, path in names:
        found = importlib.import_module(module)
        for part in path.split("."):
            found = getattr(found, part)
    for path in re.findall(r"`((?:tests/|\.github/)?[a-z_]+\.(?:py|jpg|txt))`", TEXT):
        assert (ROOT / path).exists(), path


def test_every_flag_exists():
    known = {data.spelled(f) for config in SCRIPTS.values() for f in fields(config)} | {"--help"}
    asked = {flag for code in re.findall(r"`([^`\n]+)`", TEXT) if "torchrun" not in code
             for flag in re.findall(r"--[a-z-]+", code)}
    assert len(asked) > 12 and not asked - known


def test_the_lines_of_the_files_are_nearly_those_it_tells():
    told = dict(re.findall(r"^\| `([a-z_/]+\.py)` \| (\d+) \|", TEXT, re.M))
    assert len(told) == 9
    for path, lines in told.items():
        assert abs(len((ROOT / path).read_text("utf-8").splitlines()) - int(lines)) <= 10, path
