"""What must not lose a run: crashes, signals, full disks, damaged files, a second run, numbers that are not finite."""
import errno
import fcntl
import os
import pty
import random
import re
import shlex
import signal
import subprocess
import sys
import termios
import time

import pytest
import torch

import plot_logs
import soak
import synthetic
import v7_transformer_dense_baseline as v7
import v10_transformer_lowrank_scaled as v10
from conftest import RANKS, ROOT, SMALL, records, unpainted, untimed

INSIDE = ["--rank-interval", 3, "--dropout", 0.1, "--checkpoint-minutes", 1e-9]  # ranks and checkpoints inside epochs


class Killed(BaseException):
    """The end of the process, as far as v10 can tell."""


def die(*_):
    raise Killed


def training(log):
    """All that training wrote, without what a clock says."""
    return [untimed(log, kind) for kind in ("epoch", "ranks", "end")]


def at_call(n, function, action):
    """function, with action() before its n-th call."""
    calls = []

    def wrapped(*args, **kwargs):
        calls.append(1)
        if len(calls) == n:
            action()
        return function(*args, **kwargs)
    return wrapped


KNOWN = {}


@pytest.fixture
def straight(run):
    """straight(*flags): what the run writes that nobody touches and that saves nothing inside epochs, and the tensors
    of its best model."""
    def train(*flags):
        if flags not in KNOWN:
            log = run(*flags, "--checkpoint-minutes", 1e6, name="straight")
            KNOWN[flags] = training(log), v10.load(log.with_suffix(".best.pt"))["model"]
        return KNOWN[flags]
    return train


def assert_same(log, expected):
    assert training(log) == expected[0]
    model = v10.load(log.with_suffix(".best.pt"))["model"]
    assert all(torch.equal(model[name], expected[1][name]) for name in model)


# ---- Crashes ---------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize(("moment", "n", "choice"), [
    ("half-way through a log record", 1, "reinit"), ("half-way through a log record", 4, "transport"),
    ("half-way through a log record", 9, "reinit"), ("half-way through a checkpoint", 1, "reinit"),
    ("half-way through a checkpoint", 400, "transport"), ("at an fsync", 1, "reinit"), ("at an fsync", 2, "transport"),
    ("at an fsync", 21, "reinit"), ("at an os.replace", 1, "transport"), ("at an os.replace", 2, "reinit"),
    ("at an os.replace", 3, "transport"), ("at an os.replace", 24, "reinit"), ("at an evaluation", 2, "transport"),
    ("half-way through a rank update", 1, "reinit"), ("half-way through a rank update", 4, "transport")])
def test_a_crash_at_any_moment_changes_no_record(run, straight, monkeypatch, moment, n, choice):
    flags = (*INSIDE, "--optimizer-on-resize", choice, "--epochs", 3)
    expected = straight(*flags)
    with monkeypatch.context() as patch:
        for module, name in ((v10, "update_ranks"), (v10, "evaluate"), (os, "fsync"), (os, "replace"),
                             (v10.LowRankLinearAdaptiveSpectral, "set_factors")):
            patch.setattr(module, name, getattr(module, name))  # to be put back
        patch.setattr(v10, "open", open, raising=False)
        soak.arm(moment, n, die)
        with pytest.raises((Killed, RuntimeError)):  # torch.save, cut off, raises its own
            run(*flags)
    for name in ("log.pt.tmp", "log.best.pt.tmp"):
        (run.folder / name).write_bytes(b"half a checkpo")
    log = run(*flags, *(["--resume"] if (run.folder / "log.jsonl").exists() else []))
    assert not list(run.folder.glob("*.tmp"))
    assert_same(log, expected)
    assert [record["kind"] for record in records(log)][0] == "run"


@pytest.mark.parametrize(("call", "epochs"), [(2, 0), (3, 1)])  # that of the best checkpoint, and of the last
def test_a_crash_at_the_first_epochs_checkpoints_can_be_resumed(run, straight, monkeypatch, call, epochs):
    expected = straight()
    with monkeypatch.context() as patch:
        patch.setattr(v10, "save", at_call(call, v10.save, die))
        with pytest.raises(Killed):
            run()
    assert len(records(run.folder / "log.jsonl", "epoch")) == epochs
    assert_same(run("--resume"), expected)


def test_a_run_dies_and_goes_on_inside_an_epoch(run, straight, monkeypatch):
    expected = straight(*INSIDE)
    with monkeypatch.context() as patch:
        patch.setattr(v10, "train_step", at_call(14, v10.train_step, die))
        with pytest.raises(Killed):
            run(*INSIDE)
    log = run(*INSIDE, "--resume")
    assert [(record["epoch"], record["step"]) for record in records(log, "resume")] == [(2, 13)]
    assert_same(log, expected)


def test_a_crash_while_an_old_run_is_overwritten_leaves_something_to_resume(run, straight, monkeypatch):
    expected = straight()
    for place, name, n in (*((v10.Path, "unlink", n) for n in range(1, 5)), (os, "truncate", 1)):
        log = run("--seed", 1, "--overwrite")
        with monkeypatch.context() as patch:
            patch.setattr(place, name, at_call(n, getattr(place, name), die))
            with pytest.raises(Killed):
                run("--overwrite")
        before = log.read_bytes()
        if log.with_suffix(".pt").exists():  # the old run is whole
            run("--seed", 1, "--resume")
            assert log.read_bytes() == before
        else:  # its log alone is there, and is not lost without a word
            run("--resume", code=2)
            assert log.read_bytes() == before
            run("--overwrite")
            assert_same(log, expected)


# ---- Signals ---------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize(("number", "code", "moment", "call", "step"), [
    (signal.SIGINT, 130, "train_step", 7, 7), (signal.SIGTERM, 143, "train_step", 7, 7),
    (signal.SIGINT, 130, "evaluate", 2, 10), (signal.SIGTERM, 143, "update_ranks", 2, 6),
    (signal.SIGHUP, 129, "train_step", 7, 7), (signal.SIGUSR1, 138, "evaluate", 2, 10),
    (signal.SIGUSR2, 140, "update_ranks", 2, 6), (signal.SIGTERM, 143, "save", 2, 5),
    (signal.SIGTERM, 143, "save", 3, 6)])
def test_a_signal_saves_after_the_step_and_says_how_to_resume(run, straight, monkeypatch, capfd, number, code, moment,
                                                              call, step):
    flags = ["--rank-interval", 3, "--dropout", 0.1]
    expected = straight(*flags)
    before = signal.getsignal(number)
    with monkeypatch.context() as patch:
        patch.setattr(v10, moment, at_call(call, getattr(v10, moment), lambda: os.kill(os.getpid(), number)))
        log = run(*flags, code=code)
    said = capfd.readouterr().err
    assert f"step {step} of 20 is saved in {log.with_suffix('.pt')}: the same command with --resume goes on" in said
    assert "another Ctrl-C stops at once" in said
    assert v10.load(log.with_suffix(".pt"))["state"]["step"] == step
    assert signal.getsignal(number) == before
    run(*flags, "--resume")
    assert_same(log, expected)


def test_a_signal_in_the_last_step_lets_the_run_end(run, monkeypatch):
    monkeypatch.setattr(v10, "evaluate", at_call(4, v10.evaluate, lambda: os.kill(os.getpid(), signal.SIGTERM)))
    assert records(run())[-1]["kind"] == "end"


@pytest.mark.parametrize("numbers", [
    [signal.SIGTERM] * 3, [signal.SIGINT] * 2, [signal.SIGTERM, signal.SIGHUP, signal.SIGINT, signal.SIGUSR1]])
def test_a_signal_that_is_sent_several_times_saves_as_one_does(run, straight, monkeypatch, numbers):
    def all_at_once():
        for number in numbers:
            os.kill(os.getpid(), number)
    with monkeypatch.context() as patch:
        patch.setattr(v10, "train_step", at_call(7, v10.train_step, all_at_once))
        log = run(code=128 + numbers[0])
    assert v10.load(log.with_suffix(".pt"))["state"]["step"] == 7
    run("--resume")
    assert_same(log, straight())


def test_a_signal_that_the_process_is_told_to_ignore_stops_nothing(run, monkeypatch):
    old = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        monkeypatch.setattr(v10, "train_step", at_call(7, v10.train_step, lambda: os.kill(os.getpid(), signal.SIGHUP)))
        assert records(run())[-1]["kind"] == "end"
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, old)


def test_a_second_ctrl_c_leaves_at_once_but_not_within_a_second(text, tmp_path):
    program = ("import os, signal, sys, time; sys.path.insert(0, sys.argv.pop(1))\n"
               "import v10_transformer_lowrank_scaled as v10\n"
               "def twice(*_):\n"
               "    for wait in (0, 0, 1.1, 60):\n"
               "        time.sleep(wait); os.kill(os.getpid(), signal.SIGINT); print('alive')\n"
               "v10.evaluate = twice; v10.main()")
    began = time.monotonic()
    done = subprocess.run([sys.executable, "-uc", program, ROOT, "--data-file", text, *SMALL, *RANKS], cwd=tmp_path,
                          capture_output=True, check=False)
    assert done.returncode == -signal.SIGINT
    assert done.stdout.count(b"alive") == 2
    assert time.monotonic() - began < 55


# ---- A screen that is gone -------------------------------------------------------------------------------------------

@pytest.mark.parametrize("screen", ["> /dev/full", "| true"])
def test_a_screen_that_is_gone_ends_no_corpus(tmp_path, screen):
    command = shlex.join(map(str, [sys.executable, ROOT / "data" / "synthetic.py", "--tokens", 2000, "--words", 100,
                                   "--out", "made.tokens"]))
    prepare = shlex.join(map(str, [sys.executable, ROOT / "data" / "prepare.py", "made.tokens", "--out", "made"]))
    done = subprocess.run(["bash", "-o", "pipefail", "-c", f"{command} {screen} && {prepare} {screen}"], cwd=tmp_path,
                          capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert (tmp_path / "made" / "tokens.bin").exists()


@pytest.mark.parametrize("screen", ["> /dev/full", ">&- 2>&-", "| head -1", "2> /dev/full"])
def test_a_screen_that_is_gone_ends_no_run(text, tmp_path, screen):
    command = shlex.join(map(str, [sys.executable, ROOT / "v10_transformer_lowrank_scaled.py", "--data-file", text,
                                   *SMALL, *RANKS, "--log-file", "log.jsonl"]))
    done = subprocess.run(["bash", "-o", "pipefail", "-c", f"{command} {screen}"], cwd=tmp_path, capture_output=True,
                          text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert records(tmp_path / "log.jsonl")[-1]["kind"] == "end"


def test_a_terminal_that_closes_ends_no_run_that_ignores_its_signal(text, tmp_path):
    ours, theirs = pty.openpty()
    command = [sys.executable, ROOT / "v10_transformer_lowrank_scaled.py", "--data-file", text, *SMALL, *RANKS]
    process = subprocess.Popen(command, cwd=tmp_path, stdout=theirs, stderr=theirs, start_new_session=True,
                               preexec_fn=lambda: (signal.signal(signal.SIGHUP, signal.SIG_IGN),
                                                   fcntl.ioctl(theirs, termios.TIOCSCTTY, 0)))
    os.close(theirs)
    os.read(ours, 1)
    os.close(ours)
    assert process.wait() == 0
    assert records(tmp_path / "logs" / "v10.jsonl")[-1]["kind"] == "end"


def test_the_real_command_is_stopped_by_sigterm_and_goes_on(text, tmp_path, straight, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # as here: sums of several threads end in other digits
    log = tmp_path / "log.jsonl"
    command = [sys.executable, ROOT / "v10_transformer_lowrank_scaled.py", "--data-file", text, *SMALL, *RANKS,
               "--log-file", log, "--epochs", "300"]
    running = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while not running.stdout.readline().startswith("epoch"):
        assert running.poll() is None
    running.terminate()
    _, said = running.communicate()
    assert running.returncode == 143
    assert "--resume goes on from there" in said
    assert "Traceback" not in said
    epochs = v10.load(log.with_suffix(".pt"))["state"]["step"] // 5 + 1
    done = subprocess.run([*command, "--resume", "--epochs", str(epochs)], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert_same(log, straight("--epochs", epochs))


# ---- Disks and locks -------------------------------------------------------------------------------------------------

def full(*_):
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize(("moment", "n"), [
    *(("fsync", n) for n in (1, 2, 3, 4, 5)), ("half-way through a checkpoint", 200),
    ("half-way through a log record", 2)])
def test_a_full_disk_is_one_line_and_loses_nothing_that_is_written(run, straight, monkeypatch, capsys, moment, n):
    expected = straight()
    with monkeypatch.context() as patch:
        if moment == "fsync":
            patch.setattr(os, "fsync", at_call(n, os.fsync, full))
        else:
            patch.setattr(v10, "open", open, raising=False)
            soak.arm(moment, n, full)
        log = run(code=2)
    said = capsys.readouterr().err
    assert "No space left on device" in said
    assert said.count("\n") == 1
    assert not log.with_suffix(".pt.tmp").exists()
    assert not log.with_suffix(".best.pt.tmp").exists()
    if log.exists():
        assert all(records(log))  # every line is whole
    run(*["--resume"] * log.exists())
    assert_same(log, expected)


def test_a_disk_that_really_takes_no_more_is_one_line_and_loses_no_record(text, tmp_path):
    command = ["--data-file", text, *SMALL, *RANKS, "--log-file", tmp_path / "log.jsonl"]
    program = ("import resource, sys; sys.path.insert(0, sys.argv.pop(1))\n"
               "import v10_transformer_lowrank_scaled as v10\n"
               "resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000)); sys.exit(v10.main())")
    done = subprocess.run([sys.executable, "-c", program, ROOT, *command], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert f"cannot write {tmp_path / 'log.pt'}: File too large" in done.stderr
    assert done.stderr.count("\n") == 1
    assert [record["kind"] for record in records(tmp_path / "log.jsonl")] == ["run", "epoch"]
    assert {path.name for path in tmp_path.iterdir()} == {"text.tokens", "log.jsonl", "log.pt", "log.best.pt"}


@pytest.mark.parametrize(("script", "flags", "full"), [
    ("data/synthetic.py", ["--out", "corpus.tokens", "--overwrite"], "corpus.tokens"),
    ("plot_logs.py", [ROOT / "logs/reference/demo/v10.jsonl", "--out", "figures"], "figures")])
def test_a_full_disk_costs_the_other_scripts_no_file_that_was_there(tmp_path, script, flags, full):
    program = ("import resource, runpy, sys; sys.argv = sys.argv[1:]\n"
               "resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))\n"
               "runpy.run_path(sys.argv[0], {}, '__main__')")
    (tmp_path / "corpus.tokens").write_text("what was there")
    done = subprocess.run([sys.executable, "-c", program, ROOT / script, *flags], cwd=tmp_path, capture_output=True,
                          text=True, check=False, env=os.environ | {"MPLCONFIGDIR": str(tmp_path)})
    assert done.returncode == 2
    assert f"error: cannot write {full}: File too large\n" in done.stderr
    assert "Traceback" not in done.stderr
    assert (tmp_path / "corpus.tokens").read_text() == "what was there"
    assert not [path for path in tmp_path.rglob("*") if path.suffix in (".part", ".png")]


def test_a_folder_that_cannot_be_written_is_found_before_training(run, capsys, monkeypatch, text):
    monkeypatch.setattr(v10, "train_step", die)
    places = [text / "log.jsonl", "/proc/log.jsonl" if os.geteuid() == 0 else "/log.jsonl"]
    for flags in (["--log-file", place] for place in places):
        run(*flags, code=2)
        assert "cannot write" in capsys.readouterr().err
    run("--checkpoint", text / "a.pt", code=2)
    said = capsys.readouterr().err
    assert "error: cannot" in said
    assert said.count("\n") == 1
    assert list(run.folder.glob("log*")) == []


def test_a_lock_dies_with_its_process(run, straight, capsys):
    log = run("--epochs", 2)
    before = log.read_bytes()
    holder = subprocess.Popen([sys.executable, "-c", "import fcntl, sys, time; file = open(sys.argv[1])\n"
                               "fcntl.flock(file, fcntl.LOCK_EX); print('held', flush=True); time.sleep(60)", log],
                              stdout=subprocess.PIPE)
    holder.stdout.readline()
    half = log.with_suffix(".pt.tmp")
    half.write_bytes(b"what the other run is writing")
    for flags in (["--resume"], ["--overwrite"]):
        run(*flags, code=2)
        assert f"another run is writing {log}" in capsys.readouterr().err
    assert (log.read_bytes(), half.read_bytes()) == (before, b"what the other run is writing")
    holder.kill()
    holder.communicate()
    run("--resume")
    assert_same(log, straight())


def test_two_runs_never_write_one_checkpoint(run, capsys):
    log = run("--epochs", 2)
    before = log.with_suffix(".pt").read_bytes()
    holder = subprocess.Popen([sys.executable, "-c", "import fcntl, sys, time; file = open(sys.argv[1], 'w')\n"
                               "fcntl.flock(file, fcntl.LOCK_EX); print('held', flush=True); time.sleep(60)",
                               log.with_suffix(".pt.lock")], stdout=subprocess.PIPE)
    holder.stdout.readline()
    other = run("--checkpoint", log.with_suffix(".pt"), "--overwrite", name="other", code=2)
    assert f"another run is writing {log.with_suffix('.pt')}" in capsys.readouterr().err
    assert log.with_suffix(".pt").read_bytes() == before
    assert not other.exists()
    holder.kill()
    holder.communicate()
    run("--resume")
    assert not log.with_suffix(".pt.lock").exists()


def test_logs_whose_names_have_dots_have_checkpoints_of_their_own(run, text):
    for name in ("lr0.001", "lr0.002", "run.jsonl"):
        assert v10.main(["--data-file", str(text), "--log-file", str(run.folder / name), *SMALL, *RANKS]) == 0
    assert {path.name for path in run.folder.glob("*.pt")} == {
        f"{name}{kind}.pt" for name in ("lr0.001", "lr0.002", "run") for kind in ("", ".prev", ".best")}


def test_a_checkpoint_under_its_old_name_is_found(run, text, straight):
    flags = ["--data-file", str(text), "--log-file", str(run.folder / "run.log"), *SMALL, *RANKS]
    assert v10.main([*flags, "--epochs", "2"]) == 0
    for kind in ("", ".prev", ".best"):
        (run.folder / f"run.log{kind}.pt").rename(run.folder / f"run{kind}.pt")
    assert v10.main([*flags, "--resume"]) == 0
    assert training(run.folder / "run.log") == straight()[0]
    assert not (run.folder / "run.log.pt").exists()


def test_a_log_whose_checkpoint_is_not_found_stays_as_it_is(run, capsys):
    log = run()
    before = log.read_bytes()
    run("--resume", "--checkpoint", log.parent / "typo.pt", code=2)
    said = capsys.readouterr().err
    assert f"{log} has 4 finished epochs, but there is no checkpoint {log.parent / 'typo.pt'} to go on from" in said
    assert log.read_bytes() == before


def test_a_checkpoint_that_is_a_link_is_written_where_it_points_to(run, straight):
    (run.folder / "large").mkdir()
    link = run.folder / "log.pt"
    link.symlink_to(run.folder / "large" / "mine.pt")
    run("--epochs", 2)
    run("--resume")
    assert link.is_symlink()
    assert {path.name for path in (run.folder / "large").iterdir()} == {"mine.pt", "mine.prev.pt", "mine.best.pt"}
    assert training(run.folder / "log.jsonl") == straight()[0]


def test_a_tilde_in_a_flag_is_the_home_folder(run, text, monkeypatch):
    monkeypatch.setenv("HOME", str(run.folder))
    assert v10.main(["--data-file=~/text.tokens", "--log-file=~/r/a.jsonl", *SMALL, *RANKS]) == 0
    assert records(run.folder / "r" / "a.jsonl")[-1]["kind"] == "end"
    monkeypatch.setattr(plot_logs, "save", unpainted)
    assert plot_logs.main([str(run.folder / "r" / "a.jsonl"), "--out=~/figures"]) == 0
    assert synthetic.main(["--tokens", "2000", "--words", "100", "--out=~/corpus.tokens"]) == 0
    assert {"figures", "corpus.tokens"} <= {path.name for path in run.folder.iterdir()}


def test_a_flag_that_an_older_checkpoint_does_not_know_counts_as_its_default(run, straight, capsys):
    log = run("--epochs", 2)
    settings = v10.load(log.with_suffix(".pt"))["settings"]
    reseal(log.with_suffix(".pt"), {"settings": {name: value for name, value in settings.items()
                                                 if name not in ("tokenize", "min_count")}})
    run("--resume", "--min-count", 2, code=2)
    assert "min_count was 1 and is now 2" in capsys.readouterr().err
    run("--resume")
    assert_same(log, straight())


@pytest.mark.parametrize("flag", ["--overwrite", "--resume"])
def test_a_file_that_is_no_log_is_never_written_over(run, capsys, flag):
    for content in (b"my thesis\n", b'{"epoch": 1}\n', b"\0" * 20):
        (run.folder / "log.jsonl").write_bytes(content)
        run(flag, code=2)
        assert "is not a log of this suite" in capsys.readouterr().err
        assert (run.folder / "log.jsonl").read_bytes() == content


# ---- Checkpoints -----------------------------------------------------------------------------------------------------

class Command:
    """What a pickle may hold: a call."""
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def reseal(path, change):
    """Change the content of a checkpoint, under a right checksum."""
    content = v10.load(path)
    v10.save(path, content | change)


@pytest.mark.parametrize(("damage", "said"), [
    (lambda path: path.write_bytes(path.read_bytes()[:-1000]), "is not a checkpoint of this suite, or its end"),
    (lambda path: path.write_bytes(path.read_bytes()[:20]), "is not a checkpoint of this suite, or its end"),
    (lambda path: path.write_bytes(path.read_bytes()[:5000] + path.read_bytes()[5001:]), "checksum is wrong"),
    (lambda path: path.write_bytes(path.read_bytes()[:-1] + b"x"), "checksum is wrong"),
    (lambda path: path.write_bytes(path.read_bytes() + b"\n"), "is not a checkpoint of this suite"),
    (lambda path: path.write_bytes(b"hello" * 1000), "is not a checkpoint of this suite"),
    (lambda path: torch.save({"model": torch.ones(3)}, path), "is not a checkpoint of this suite"),
    (lambda path: torch.save([1, 2], path), "is not a checkpoint of this suite"),
    (lambda path: (path.unlink(), path.mkdir()), "Is a directory"),
    (lambda path: reseal(path, {"format": "alrt-checkpoint-2"}), "of another version of this suite: alrt-checkpoint-2"),
    (lambda path: torch.save({"format": "alrt-checkpoint-2"}, path), "of another version of this suite"),
    (lambda path: reseal(path, {"config": {"vocab_size": 9}}), "does not hold a model"),
    (lambda path: reseal(path, {"ranks": [1, 2]}), "does not hold a model")])
def test_a_checkpoint_that_is_not_good_is_one_line_and_stays(run, capsys, damage, said):
    log = run("--epochs", 2)
    damage(log.with_suffix(".pt"))
    before = {path: path.read_bytes() for path in run.folder.iterdir() if path.is_file()}
    run("--resume", code=2)
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1
    assert {path: path.read_bytes() for path in run.folder.iterdir() if path.is_file()} == before


def test_every_flipped_bit_is_found(run):
    path = run("--epochs", 1).with_suffix(".pt")
    whole, rng = path.read_bytes(), random.Random(0)
    for place in [0, len(whole) - 1, *(rng.randrange(len(whole)) for _ in range(200))]:
        data = bytearray(whole)
        data[place] ^= 1 << rng.randrange(8)
        path.write_bytes(data)
        with pytest.raises(v10.UserError, match="log.pt is "):
            v10.load(path)
    path.write_bytes(whole)
    v10.load(path)


def test_the_checkpoint_before_a_damaged_one_is_kept_and_offered(run, straight, capsys):
    expected = straight(*INSIDE)
    log = run(*INSIDE, "--epochs", 2)
    last, previous = log.with_suffix(".pt"), log.with_suffix(".prev.pt")
    whole = last.read_bytes()
    last.write_bytes(whole[:3000] + b"?" + whole[3001:])
    run(*INSIDE, "--resume", code=2)
    assert (f"{last} is damaged: its checksum is wrong; the one before it, {previous}, is good: remove {last}, and "
            "--resume goes on from step 9\n") in capsys.readouterr().err
    previous_whole = previous.read_bytes()
    previous.write_bytes(previous_whole[:-1])
    run(*INSIDE, "--resume", code=2)
    assert "is good" not in capsys.readouterr().err
    previous.write_bytes(previous_whole)
    last.unlink()
    run(*INSIDE, "--resume")
    assert "going on from the one before it" in capsys.readouterr().out
    assert_same(log, expected)


@pytest.mark.parametrize("sealed", [False, True])
def test_a_checkpoint_whose_pickle_would_run_a_command_does_not_run_it(run, capsys, sealed):
    log, proof = run("--epochs", 1), run.folder / "it ran"
    last = log.with_suffix(".pt")
    content = v10.load(last) | {"command": Command(proof)}
    if sealed:
        v10.save(last, content)
    else:
        torch.save(content, last)
    run("--resume", code=2)
    assert "is not a checkpoint of this suite" in capsys.readouterr().err
    with pytest.raises(v10.UserError):
        v10.load_model(last)
    assert not proof.exists()
    torch.load(last, weights_only=False)
    assert proof.exists(), "the file would not have run it in any case"


def test_a_run_is_not_resumed_from_a_model_alone(run, capsys):
    log = run()
    run("--resume", "--checkpoint", log.with_suffix(".best.pt"), code=2)
    assert "holds only a model" in capsys.readouterr().err


def test_processes_that_find_different_checkpoints_do_not_start(run, capsys, monkeypatch):
    log = run("--epochs", 1)
    before = log.read_bytes()
    for elsewhere in (None, 7):  # what another machine finds on a disk of its own
        monkeypatch.setattr(v10, "gather", lambda value, other=elsewhere: [value, other])
        run("--resume", "--epochs", 2, code=2)
        said = capsys.readouterr().err
        assert "different checkpoints" in said
        assert "on a disk that all machines share" in said
    assert log.read_bytes() == before


def test_other_settings_are_named_and_other_minutes_are_not(run, capsys):
    log = run("--epochs", 2)
    run("--resume", "--lr", 0.02, "--dropout", 0.5, code=2)
    said = capsys.readouterr().err
    assert "lr was 0.01 and is now 0.02" in said
    assert "dropout was 0.0 and is now 0.5" in said
    assert "d_model" not in said
    run("--resume", main=v7.main, ranks=[], code=2)
    assert "script was v10" in capsys.readouterr().err
    run("--resume", "--checkpoint-minutes", 3)
    assert len(records(log, "epoch")) == 4


def test_a_damaged_best_checkpoint_costs_its_test_loss_and_not_the_run(run, text, tmp_path, capsys):
    (tmp_path / "test.tokens").write_text(text.read_text())
    flags = ["--test-file", tmp_path / "test.tokens"]
    log = run(*flags, "--lr", 1e-9)  # epoch 1 or 2 stays the best one
    log.write_bytes(b"".join(line for line in log.read_bytes().splitlines(True) if b'"kind": "end"' not in line))
    log.with_suffix(".best.pt").write_bytes(b"")
    run(*flags, "--lr", 1e-9, "--resume")
    assert "no test loss of the best epoch" in capsys.readouterr().out
    end = records(log, "end")[0]
    assert end["test_loss_best"] is None
    assert end["test_loss_last"] > 0


# ---- Numbers ---------------------------------------------------------------------------------------------------------

def small_model():
    torch.manual_seed(0)
    model = v10.GPT(v10.GPTConfig(20, 8, 1, 2, 16, 4), lambda n, m: v10.LowRankLinearAdaptiveSpectral(n, m, 3))
    tokens = torch.randint(20, (2, 5))
    return model, tokens[:, :-1], tokens[:, 1:]


def snapshot(model, optimizer):
    return [value.clone() for value in (*model.parameters(), *(
        moment for state in optimizer.state.values() for moment in state.values()))]


@pytest.mark.parametrize("make", [lambda p: torch.optim.AdamW(p, lr=0.1, fused=True),
                                  lambda p: torch.optim.AdamW(p, lr=0.1), lambda p: torch.optim.RMSprop(p, lr=0.1)],
                         ids=["fused", "plain", "other"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_no_step_is_taken_from_a_gradient_that_is_not_finite_on(make, bad):
    model, x, y = small_model()
    optimizer = make(model.parameters())
    total = v10.train_step(model, [optimizer], x, y)
    assert torch.isfinite(total)
    before = snapshot(model, optimizer)
    hook = model.blocks[0].up.U.register_hook(lambda gradient: gradient * bad)
    total = v10.train_step(model, [optimizer], x, y, total=total)
    hook.remove()
    assert not torch.isfinite(total)
    assert not torch.isfinite(v10.train_step(model, [optimizer], x, y, total=total)), "forgotten after a good step"
    assert all(a.equal(b) for a, b in zip(before, snapshot(model, optimizer), strict=True))
    v10.train_step(model, [optimizer], x, y)
    assert not all(a.equal(b) for a, b in zip(before, snapshot(model, optimizer), strict=True))


def test_a_loss_that_is_not_finite_stops_before_the_step_and_says_where(run, monkeypatch, capsys):
    forward, calls, seen = v10.GPT.forward, [], []

    def sick(model, tokens, targets=None):
        loss = forward(model, tokens, targets)
        calls.append(model.training)
        if targets is not None and sum(calls) == 8:
            seen.append([parameter.detach().clone() for parameter in model.parameters()])
            seen.append(model)
            return loss * float("nan")
        return loss
    monkeypatch.setattr(v10.GPT, "forward", sick)
    log = run(code=1)
    said = capsys.readouterr().err
    assert "error: epoch 2, step 8: a loss or its gradient is not finite" in said
    assert "try a smaller --lr" in said
    assert f"{log.with_suffix('.pt')} keeps the last good state" in said
    assert said.count("\n") == 1
    assert [record["kind"] for record in records(log)] == ["run", "epoch"]
    assert v10.load(log.with_suffix(".pt"))["state"]["step"] == 5
    assert all(a.equal(b) for a, b in zip(seen[0], seen[1].parameters(), strict=True)), "the step was taken"


def test_weights_too_large_for_a_spectrum_end_the_run(run, capsys):
    log = run("--lr", 1e15, "--rank-interval", 1, "--steps-per-epoch", 5, code=1)
    said = capsys.readouterr().err
    assert "grown beyond what float32 can hold" in said
    assert "try a smaller --lr" in said
    assert records(log)[0]["kind"] == "run"


@pytest.mark.parametrize("size", [2**45, 2**62])
def test_out_of_memory_says_what_to_lower(run, monkeypatch, capsys, size):
    monkeypatch.setattr(v10, "train_step", lambda *_: torch.empty(size))
    run(code=2)
    said = capsys.readouterr().err
    assert "out of memory: try a larger --grad-accum" in said
    assert said.count("\n") == 1


def test_a_checkpoint_that_memory_cannot_take_is_not_called_damaged(run, monkeypatch, capsys):
    log = run()
    monkeypatch.setattr(torch, "load", lambda *_, **__: torch.empty(2**45))
    run("--resume", "--epochs", 5, code=1)
    said = capsys.readouterr().err
    assert f"{log.with_suffix('.pt')} is whole, but to read it takes more memory than there is" in said
    assert said.count("\n") == 1
    assert "remove" not in said


def test_a_best_model_that_memory_cannot_take_costs_its_test_loss_alone(run, text, monkeypatch, capsys):
    test = text.with_name("test.tokens")
    test.write_bytes(text.read_bytes())
    monkeypatch.setattr(torch, "load", lambda *_, **__: torch.empty(2**45))
    end, = records(run("--test-file", test), "end")
    assert "*** no test loss of the best epoch: " in capsys.readouterr().out
    assert end["test_loss_best"] is None
    assert end["test_loss_last"] > 0


def test_an_error_of_our_own_is_not_taken_for_the_users(run, monkeypatch):
    def bug(*_):
        raise RuntimeError("a bug")
    monkeypatch.setattr(v10, "train_step", bug)
    with pytest.raises(RuntimeError, match="a bug"):
        run()


# ---- Ways to start ---------------------------------------------------------------------------------------------------

def test_a_users_error_under_torchrun_is_one_line_of_ours_and_ends_torchruns_report(tmp_path):
    done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
                           ROOT / "v10_transformer_lowrank_scaled.py", "--data-file", "nowhere"],
                          cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode != 0
    line = "v10_transformer_lowrank_scaled.py: process 0: error: cannot read nowhere: No such file or directory"
    ours, report = done.stderr.split("Traceback", 1)
    assert ours.splitlines().count(line) == 1
    assert "Root Cause" in report
    assert line in report.split("Root Cause")[1]
    assert "Traceback" not in report
    assert "KeyboardInterrupt" not in done.stderr


ALL_STARTED = """
import pathlib, runpy, sys
root, path = pathlib.Path(sys.argv[1]), list(sys.path)
for script in sorted([*root.glob("*.py"), *root.glob("data/*.py")]):
    sys.argv[:] = [str(script), "--help"]
    try:
        runpy.run_path(str(script), run_name="__main__")
    except SystemExit as done:
        print("started:", script.name, done.code)
    sys.path[:] = path
    for name, module in list(sys.modules.items()):
        if str(getattr(module, "__file__", "")).startswith(str(root)) and "site-packages" not in module.__file__:
            del sys.modules[name]
"""


def test_every_script_starts_without_its_folder_on_the_path_and_without_docstrings(tmp_path):
    done = subprocess.run([sys.executable, "-OO", "-c", ALL_STARTED, ROOT], cwd=tmp_path, capture_output=True,
                          text=True, env=os.environ | {"PYTHONSAFEPATH": "1"}, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    scripts = sorted([*ROOT.glob("*.py"), *ROOT.glob("data/*.py")])
    scripts.remove(ROOT / "counts.py")  # the only one that is not a command
    assert re.findall("^started: .*", done.stdout, re.M) == [f"started: {script.name} 0" for script in scripts]
    assert len(re.findall("^usage:", done.stdout, re.M)) == len(scripts)


def test_a_script_starts_from_another_folder(tmp_path):
    done = subprocess.run([sys.executable, ROOT / "results.py", "--help"], cwd=tmp_path, capture_output=True,
                          text=True, env=os.environ | {"PYTHONSAFEPATH": "1"}, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("usage:")


def test_a_log_is_not_written_to_a_device(run, capsys):
    run("--log-file", "/dev/stdout", code=2)
    assert "cannot write /dev/stdout: not a plain file" in capsys.readouterr().err
