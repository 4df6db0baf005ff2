"""Two processes, as torchrun would start them (gloo, on the CPU), end with what one process makes.

Started as a script, this file is what each of them does.
"""
import os
import signal
import socket
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.testing import assert_close

import data
import train_cls
import train_gen
from data import Problem

GEN = train_gen.Config(size=8, width=16, mults=(1, 2), blocks=1, timesteps=100, steps=6, batch=7, warmup=2,
                       augment="hflip,rot90")               # of 7 images, one process has 3 and one has 4
CLS = train_cls.Config(size=8, patch=4, dim=16, depth=1, heads=2, steps=6, batch=7, warmup=2, share=0.5,
                       augment="hflip,cutmix")


def numbered(n, start=0):
    """n images that are one grey level each, of two classes."""
    level = torch.arange(start, start + n, dtype=torch.uint8).view(-1, 1, 1, 1)
    return data.Scenes(level.expand(-1, 3, 8, 8).contiguous(), torch.arange(n) % 2, ["a", "b"],
                       [f"{k}.png" for k in range(start, start + n)], torch.arange(n))


def work(out):
    """Train both networks, make images, cache something: {name: what came out}."""
    generator = train_gen.train(numbered(40), GEN, out / "g.pt", every=3, look=1)
    classifier, seen = train_cls.fit(numbered(20), numbered(20, 100), CLS, out / "c.pt", every=3)
    cache = data.cached(lambda: dict(pid=os.getpid()), out, out / "cache", dict(size=1), [])
    images = train_gen.generate(generator, torch.tensor([0, 1, 0, 1, 0]), seed=3, calls=3)
    one = train_gen.generate(generator, torch.tensor([1]), seed=0, calls=2)
    return dict(generator=generator.model.state_dict(), classifier=classifier.state_dict(), seen=seen,
                images=images, one=one, maker=cache["pid"])


def refused(out):
    """What all processes must refuse together: if one went on alone, it would wait for ever."""
    real, mine = numbered(40), out / f"g{data.rank()}.pt"                # there is a g0.pt, but no g1.pt
    attempts = dict(elsewhere=lambda: train_gen.train(real, GEN, mine),
                    generator=lambda: train_gen.train(real, replace(GEN, lr=1e30, steps=3)),
                    classifier=lambda: train_cls.fit(real, None, replace(CLS, share=0.0, lr=1e30)))
    told = {}
    for name, attempt in attempts.items():
        with pytest.raises(Problem) as problem:
            attempt()
        told[name] = str(problem.value)
    return told


def main(cfg):
    out = Path(cfg.out)
    if data.rank():
        data.replacing = None                                            # whatever writes fails here
    made = work(out)
    if data.rank() == 0:
        (out / "g0.pt").write_bytes((out / "g.pt").read_bytes())
    print("heard")
    torch.save(dict(made=made, told=refused(out)), out / f"process{data.rank()}.pt")


def end_early():
    """Say which process works in a pool, and be killed."""
    with data.pool(2, abs, 1) as pool:
        print(pool.submit(os.getpid).result(), flush=True)
        os.kill(os.getpid(), signal.SIGKILL)


def begin(folder, start):
    """Start both processes as torchrun would, and end_early()."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    return [start("--out", folder, RANK=rank, LOCAL_RANK=rank, WORLD_SIZE=2, MASTER_ADDR="localhost",
                  MASTER_PORT=port, TORCHELASTIC_RUN_ID="test", CUDA_VISIBLE_DEVICES="", OMP_NUM_THREADS=1)
            for rank in (0, 1)] + [start()]


@pytest.mark.usefixtures("on_cpu")
def test_two_processes_make_what_one_makes_and_one_of_them_writes(begun, tmp_path):
    two, (*started, _), (*ended, _) = begun
    alone = work(tmp_path)
    assert [process.returncode for process in started] == [0, 0], ended
    assert [out for out, _ in ended] == ["heard\n", ""]

    a, b = (torch.load(two / f"process{rank}.pt") for rank in (0, 1))
    for told in (a["told"], b["told"]):
        assert "share" in told.pop("elsewhere") and all("--lr" in line for line in told.values())
    a, b = a["made"], b["made"]
    assert a.pop("maker") == b.pop("maker") == started[0].pid != alone.pop("maker")
    for part in a:
        assert_close(a[part], b[part], rtol=0, atol=0)
        assert_close(a[part], alone[part], rtol=0, atol=1 if part in ("images", "one") else 1e-6)

    written = [sorted(p.name for p in folder.iterdir()) for folder in (tmp_path, two)]
    assert [name for name in written[1] if name not in ("g0.pt", "process0.pt", "process1.pt")] == written[0]
    one, two = ((folder / "g.csv").read_text().split()[1:] for folder in (tmp_path, two))
    assert len(one) == 2
    assert_close(*([[float(v) for v in row.split(",")] for row in rows] for rows in (one, two)))


@pytest.mark.parametrize("n", [0, 1, 7, 128])
def test_the_shares_are_even_and_make_up_the_whole(monkeypatch, n):
    monkeypatch.setattr(data.dist, "is_initialized", lambda: True)
    monkeypatch.setattr(data.dist, "get_world_size", lambda: 3)
    parts = []
    for rank in range(3):
        monkeypatch.setattr(data.dist, "get_rank", lambda rank=rank: rank)
        parts.append(list(range(n))[data.own_slice(n)])
    assert sum(parts, []) == list(range(n)) and max(map(len, parts)) - min(map(len, parts)) <= 1


def test_what_runs_in_one_process_refuses_torchrun_in_a_line(monkeypatch, launch):
    for name, value in (("TORCHELASTIC_RUN_ID", "test"), ("LOCAL_RANK", "0")):
        monkeypatch.setenv(name, value)
    refused = launch(data, "somewhere")
    assert refused.returncode == 2 and "torchrun" in refused.stderr and refused.stderr.count("\n") == 1


# ---- several tasks at a time, each in a process of its own

def test_a_pool_computes_in_other_processes_of_one_thread_each_and_says_if_one_died():
    with pytest.raises(Problem, match="one of 2 processes died.*--jobs"), data.pool(2, abs, 1) as pool:
        assert pool.submit(os.getpid).result() != os.getpid()
        assert pool.submit(torch.get_num_threads).result() == 1
        with pytest.raises(Problem, match="no checkpoint at nowhere"):   # a Problem of theirs comes here
            pool.submit(data.load_checkpoint, "nowhere", "generator").result()
        pool.submit(os._exit, 1).result()


def test_the_processes_of_a_pool_end_with_the_first_even_if_that_is_killed(begun):
    _, (*_, killed), (*_, (worker, errors)) = begun                      # it has ended: nobody holds its pipe
    assert killed.returncode == -signal.SIGKILL, errors
    with pytest.raises(ProcessLookupError):
        os.kill(int(worker), 0)


@pytest.mark.usefixtures("on_cpu")
def test_one_job_is_this_process_which_computes_in_one_thread_until_it_is_done():
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with data.pool(1, None) as pool:
            assert pool.submit(os.getpid).result() == os.getpid()
            assert pool.submit(torch.get_num_threads).result() == 1
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(threads)


def test_unless_a_number_is_asked_for_there_is_a_job_for_each_core_or_one_for_a_gpu(monkeypatch):
    for device, expected in (("cpu", 3), ("cuda", 1)):
        monkeypatch.setattr(data, "pick_device", lambda device=device: torch.device(device))
        monkeypatch.setattr(data.os, "sched_getaffinity", lambda _: {0, 1, 5}, raising=False)
        assert data.jobs(0) == expected and data.jobs(4) == 4


if __name__ == "__main__":
    if "RANK" in os.environ:
        data.launch(main, train_gen.Script, several=True)
    else:
        end_early()
