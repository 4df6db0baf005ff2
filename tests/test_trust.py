"""What data.py does when a download is cut off, a server lies, or serves something else."""
import hashlib
import io
import threading
import zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace

import pytest

import data


def archive(**members):
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as made:
        for name, content in members.items():
            made.writestr(name, content)
    return file.getvalue()


@pytest.fixture
def server(monkeypatch):
    """Serve files {name: bytes}; mood(number of the request, bytes) -> what is sent, its length."""
    say = SimpleNamespace(files={}, mood=lambda k, part: (part, len(part)), ranges=True, asked=[])

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            content, start = say.files[self.path[1:]], self.headers.get("Range")
            say.asked.append(start)
            start = int(start[6:-1]) if start and say.ranges else 0
            if start and start >= len(content):
                self.send_error(416)
                return
            part, length = say.mood(len(say.asked), content[start:])
            self.send_response(206 if start else 200)
            self.send_header("Content-Length", str(length))
            self.end_headers()
            self.wfile.write(part)

        def log_message(self, *_):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as http:
        threading.Thread(target=http.serve_forever, args=(0.01,), daemon=True).start()
        say.set = archive(**{"set/forest/a.txt": b"a" * 3000, "set/river/b.txt": b"b" * 3000})
        say.files = {"set.zip": say.set, "list.txt": b"a.txt\n"}
        sums = {name: hashlib.md5(content).hexdigest() for name, content in say.files.items()}
        monkeypatch.setitem(data.DOWNLOADS, "resisc45", (f"http://127.0.0.1:{http.server_port}", {
            "set.zip": sums["set.zip"], "set/list.txt": sums["list.txt"]}))
        yield say
        http.shutdown()


def fetch(launch, folder):
    return launch(data, folder, "--download", "resisc45")


def test_a_data_set_is_fetched_checked_and_unpacked_and_not_twice(server, tmp_path, launch):
    done = fetch(launch, tmp_path)
    assert done.returncode == 0 and "right checksums" in done.stdout
    there = sorted(p.relative_to(tmp_path).as_posix() for p in tmp_path.rglob("*") if p.is_file())
    assert there == ["set/forest/a.txt", "set/list.txt", "set/river/b.txt"] and len(server.asked) == 2
    assert fetch(launch, tmp_path).returncode == 0 and len(server.asked) == 2


@pytest.mark.parametrize("ranges", [True, False])
def test_what_was_cut_off_goes_on_where_it_was(server, tmp_path, launch, ranges):
    server.ranges, half = ranges, len(server.set) // 2
    server.mood = lambda k, part: (part[:half] if k == 1 else part, len(part))
    assert fetch(launch, tmp_path).returncode == 0
    assert server.asked == [None, f"bytes={half}-", None] and (tmp_path / "set/list.txt").exists()


def test_a_download_that_never_comes_whole_is_one_line_and_keeps_what_came(server, tmp_path, launch):
    server.mood = lambda k, part: (part[:9], len(part))
    told = fetch(launch, tmp_path)
    assert told.returncode == 2 and told.stderr.count("\n") == 1 and "goes on where it was" in told.stderr
    assert (tmp_path / "set.zip.part").read_bytes() == server.set[:54] and not (tmp_path / "set").exists()
    server.mood = lambda k, part: (part, len(part))
    assert fetch(launch, tmp_path).returncode == 0 and server.asked[6] == "bytes=54-"


@pytest.mark.parametrize("mood", [
    lambda k, part: (part[::-1], len(part)),                             # another file
    lambda k, part: (b"<html>not here</html>", 21),
    lambda k, part: (part, len(part) // 2)])                             # a lie, too short
def test_another_file_is_refused_and_not_used(server, tmp_path, launch, mood):
    server.mood = mood
    told = fetch(launch, tmp_path)
    assert told.returncode == 2 and told.stderr.count("\n") == 1 and "is not the file" in told.stderr
    assert not list(tmp_path.rglob("*")) and len(server.asked) == 1


def test_a_lie_that_is_too_long_does_not_matter(server, tmp_path, launch):
    server.mood = lambda k, part: (part, len(part) + 99)
    assert fetch(launch, tmp_path).returncode == 0


def test_an_archive_cannot_leave_its_folder(server, tmp_path, launch, monkeypatch):
    evil = archive(**{"set/a.txt": b"a", "../../evil.txt": b"x", "/evil.txt": b"x"})
    server.files["set.zip"] = evil
    address, files = data.DOWNLOADS["resisc45"]
    files["set.zip"] = hashlib.md5(evil).hexdigest()
    assert fetch(launch, tmp_path / "deep/er").returncode == 0
    there = sorted(p.relative_to(tmp_path).as_posix() for p in tmp_path.rglob("*") if p.is_file())
    assert there == ["deep/er/set/a.txt", "deep/er/set/list.txt"]


def test_no_server_is_one_line(tmp_path, launch, monkeypatch):
    monkeypatch.setitem(data.DOWNLOADS, "resisc45", ("http://127.0.0.1:9", {"x.zip": "0"}))
    told = fetch(launch, tmp_path)
    assert told.returncode == 2 and told.stderr.count("\n") == 1 and "refused" in told.stderr
