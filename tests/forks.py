"""Processes of their own for tests, forked from one that has imported torch and what its first optimizer loads: that
takes five seconds of a processor each time."""
import gc
import multiprocessing.forkserver
import os
import signal
import sys
from unittest import mock

import v10_transformer_lowrank_scaled as v10

PRELOADED = ["torch._dynamo", "v11_transformer_lowrank_spectron", "v11_transformer_lowrank_selfguided"]
SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(PRELOADED)
alive = []  # conftest.py ends those that a failed test leaves


def begin(argv, variant, environment, files):
    """What a process does: the command of a variant, with its own environment, standard output and error."""
    for number, path in enumerate(files, start=1):
        os.dup2(os.open(path, os.O_WRONLY), number)
    assert sys.modules.keys() >= set(PRELOADED)
    gc.freeze()  # what was there before: else each collection takes its time
    os.environ.update(environment)
    v10.leave(v10.main(argv, variant()))


class Forked:
    """What a test needs of subprocess.Popen."""

    def __init__(self, argv, variant, environment, folder):
        self.files = [folder / f"{environment['RANK']}.{name}" for name in ("out", "err")]
        for path in self.files:
            path.write_text("")
        of_server = {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
                     "TORCH_CPP_LOG_LEVEL": "ERROR"}  # in forks alone, torch warns of a process group without hooks
        with mock.patch.dict(os.environ, of_server):
            multiprocessing.forkserver.ensure_running()
        self.process = SERVER.Process(target=begin, args=([*map(str, argv)], variant, environment, self.files))
        self.process.start()
        alive.append(self)

    @property
    def returncode(self):
        return self.process.exitcode

    def poll(self):
        return self.returncode

    def send_signal(self, number):
        os.kill(self.process.pid, number)

    def end(self):
        """Kill it if it is still there."""
        if self.process.exitcode is None:
            self.send_signal(signal.SIGKILL)
        self.process.join()

    def communicate(self, timeout=120):
        self.process.join(timeout)
        ended = self.process.exitcode is not None
        self.end()
        said = tuple(path.read_text() for path in self.files)
        assert ended, said
        return said
