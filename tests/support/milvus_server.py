"""A real Milvus server for tests: the wheel `milvus` 2.3.5 (January 2024) in a virtual environment of its own."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
from filelock import FileLock

from modeling_nrccr.loading.wheels import cache_folder


REQUIREMENT = "milvus==2.3.5"
PORT = 19731
# quick to forget the session of a server that was killed (3 s is too short on a busy machine), and to stop
CONFIG = ("proxy.timeTickInterval=20", "common.session.ttl=10", "common.gracefulStopTimeout=2")
START_SECONDS = 90


def environment() -> Path:
    """The virtual environment, made once in the cache folder."""
    folder = cache_folder() / f"{REQUIREMENT.replace('==', '-server-')}"
    with FileLock(f"{folder}.lock"):
        if not (folder / "installed").exists():
            subprocess.run([sys.executable, "-m", "venv", "--clear", folder], check=True)
            pip = [folder / "bin/python", "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
            subprocess.run([*pip, REQUIREMENT], check=True)
            (folder / "installed").touch()
    return folder


class MilvusServer:
    """One at a time on a machine: it takes fixed ports, of every interface."""

    def __init__(self, data: Path):
        self.data, self.uri = data, f"http://localhost:{PORT}"
        self.lock = FileLock(cache_folder() / "milvus-server.lock")

    def __enter__(self) -> "MilvusServer":
        self.lock.acquire()
        try:
            self.start()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_):
        self.kill(signal.SIGINT)
        self.lock.release()

    def start(self):
        command = [environment() / "bin/milvus-server", "--data", self.data, "--proxy-port", str(PORT)]
        command += [part for entry in CONFIG for part in ("--extra-config", entry)]
        log = self.data.with_name("milvus.log")
        with log.open("wb") as output:
            self.process = subprocess.Popen(
                command, stdout=output, stderr=subprocess.STDOUT, env=os.environ | {"OMP_NUM_THREADS": "1"}
            )
        deadline = time.monotonic() + START_SECONDS
        while b"Ctrl+C to exit" not in log.read_bytes():
            if self.process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"Milvus does not start: {log.read_text()[-2000:]}")
            time.sleep(0.1)

    def kill(self, how: signal.Signals = signal.SIGKILL):
        """SIGKILL is a power cut. SIGINT to the Python process stops the server that it runs; SIGTERM orphans it."""
        if self.process.poll() is not None:
            return
        server = psutil.Process(self.process.pid).children()
        if how is signal.SIGINT:
            self.process.send_signal(how)
            psutil.wait_procs([psutil.Process(self.process.pid), *server], timeout=20)
        for process in (*server, self.process):
            if process.is_running() if isinstance(process, psutil.Process) else process.poll() is None:
                process.kill()
        self.process.wait()

    def kill_after(self, seconds: float) -> threading.Timer:
        timer = threading.Timer(seconds, self.kill)
        timer.start()
        return timer
