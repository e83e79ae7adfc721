"""Several processes and several parts a step: the same training as one process and one part."""
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import v7_transformer_dense_baseline as v7
import v10_transformer_lowrank_scaled as v10
from conftest import RANKS, ROOT, SMALL, records, untimed
from forks import Forked

V10, V11 = ROOT / "v10_transformer_lowrank_scaled.py", ROOT / "v11_transformer_lowrank_spectron.py"
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]  # on a free port
RESIZING = ["--epochs", "3", "--rank-interval", "3", "--optimizer-on-resize", "transport"]


def assert_same_training(ours, theirs, dtype="float32"):
    """The same losses up to rounding, and the same ranks, where in bfloat16 one may stay that moves by 2 elsewhere."""
    ours, theirs = ([r for r in records(log) if r["kind"] in ("ranks", "epoch")] for log in (ours, theirs))
    assert any(record["resized"] for record in ours)
    rank, loss = {"float32": (0, 1e-5), "bfloat16": (2, 2e-3)}[dtype]
    for one, other in zip(ours, theirs, strict=True):
        assert other["ranks"] == pytest.approx(one["ranks"], abs=rank)
        assert rank or one["reasons"] == other["reasons"]
        for name in ("train_loss", "val_loss") if one["kind"] == "epoch" else ():
            assert other[name] == pytest.approx(one[name], rel=loss)


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return str(free.getsockname()[1])


def two_processes(text, log, *flags, variant=v10.Variant, ranks=RANKS):
    """Two processes as torchrun starts them, without torchrun, which would end one after the other -> both."""
    shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port(), "TORCHELASTIC_RUN_ID": "test"}
    return [Forked(["--data-file", text, "--log-file", log, *SMALL, *ranks, *flags], variant,
                   shared | {"RANK": str(i), "LOCAL_RANK": str(i)}, log.parent) for i in range(2)]


def agents(script, text, log, *flags, folders=(".", ".")):
    """Two machines as torchrun knows them, both of them this one, a process on each, in its folder -> their agents."""
    port = free_port()
    return [subprocess.Popen([*TORCHRUN[:3], "--nnodes", "2", "--node-rank", str(i), "--nproc-per-node", "1",
                              "--master-addr", "127.0.0.1", "--master-port", port, script, "--data-file", text,
                              "--log-file", log, *SMALL, *RANKS, *flags], env=os.environ | {"OMP_NUM_THREADS": "1"},
                             stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=folder)
            for i, folder in enumerate(folders)]


def finished(both):
    """Wait for two agents -> what they said."""
    said = [process.communicate(timeout=120)[0] for process in both]
    assert [process.returncode for process in both] == [0, 0], said
    return said


@pytest.mark.parametrize(("parts", "dtype"), [(2, "float32"), (4, "float32"), (4, "bfloat16")])
def test_a_step_in_parts_is_the_same_step(run, parts, dtype):
    flags = [*RESIZING, "--grad-clip", "0.5", "--dtype", dtype]
    assert_same_training(run(*flags), run(*flags, "--grad-accum", parts, name="parts"), dtype)


def test_v7_takes_its_steps_in_parts_too(run):
    one, parts = (run("--grad-accum", n, name=f"v7_{n}", main=v7.main, ranks=[]) for n in (1, 4))
    for ours, theirs in zip(records(one, "epoch"), records(parts, "epoch"), strict=True):
        assert theirs["val_loss"] == pytest.approx(ours["val_loss"], rel=1e-5)


@pytest.mark.soak
def test_two_processes_train_as_one_does_in_bfloat16(run, text, tmp_path):
    flags = [*RESIZING, "--dtype", "bfloat16"]
    both = two_processes(text, tmp_path / "two.jsonl", *flags)
    assert [(process.communicate()[1], process.returncode) for process in both] == [("", 0)] * 2
    assert_same_training(run(*flags), tmp_path / "two.jsonl", "bfloat16")


def test_two_processes_train_as_one_does(run, text, tmp_path):
    (tmp_path / "test.tokens").write_text(text.read_text())
    flags = [*RESIZING, "--test-file", str(tmp_path / "test.tokens")]
    command = [*TORCHRUN, V10, "--data-file", text, "--log-file", "two.jsonl", *SMALL, *RANKS, *flags,
               "--grad-accum", "2"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("done: 3 epochs") == 1, "more than one process speaks"
    assert records(tmp_path / "two.jsonl", "run")[0]["processes"] == 2
    one = run(*flags)
    assert_same_training(one, tmp_path / "two.jsonl")
    (ours,), (theirs,) = records(one, "end"), records(tmp_path / "two.jsonl", "end")
    for name in ("best_val_loss", "test_loss_best", "test_loss_last"):
        assert theirs[name] == pytest.approx(ours[name], rel=1e-5)
    ours, theirs = (v10.load(path)["model"] for path in (one.with_suffix(".pt"), tmp_path / "two.pt"))
    assert all(torch.allclose(ours[name], theirs[name], atol=1e-4) for name in ours)


def test_a_run_goes_on_with_another_number_of_processes(run, text, tmp_path, monkeypatch, capsys):
    flags = [*RESIZING, "--epochs", "4"]
    straight, train_step, calls = run(*flags, name="straight"), v10.train_step, []

    def stopped(*args):
        calls.append(1)
        if len(calls) == 3:  # inside the first epoch
            os.kill(os.getpid(), signal.SIGTERM)
        return train_step(*args)
    with monkeypatch.context() as patch:
        patch.setattr(v10, "train_step", stopped)
        log = run(*flags, code=143)
    both = two_processes(text, log, *flags, "--epochs", "2", "--resume")
    (said, error), _ = (process.communicate() for process in both)
    assert (both[0].returncode, error) == (0, "")
    assert "going on with 2 processes instead of 1: the run is no longer bit for bit" in said
    capsys.readouterr()
    run(*flags, "--resume")
    assert "going on with 1 processes instead of 2" in capsys.readouterr().out
    assert_same_training(straight, log)
    assert [record["processes"] for record in records(log, "resume")] == [2, 1]


def test_a_run_that_needs_too_much_memory_goes_on_in_more_parts(run, capsys):
    straight = run(*RESIZING, name="straight")
    run(*RESIZING, "--epochs", "2", name="parts")
    capsys.readouterr()
    log = run(*RESIZING, "--resume", "--grad-accum", "2", name="parts")
    assert "going on in 2 parts per step instead of 1: the run is no longer bit for bit" in capsys.readouterr().out
    assert_same_training(straight, log)
    assert v10.load(log.with_suffix(".pt"))["settings"]["grad_accum"] == 2


def test_a_run_goes_on_on_another_device_where_tensors_lie_otherwise_in_memory(run, capsys):
    straight, log = (run("--optimizer-on-resize", "transport", "--epochs", epochs, name=name)
                     for epochs, name in ((4, "straight"), (2, "moved")))
    content = v10.load(log.with_suffix(".pt"))
    content["settings"]["device"], content["dropout_states"] = "mps", [torch.zeros(16, dtype=torch.uint8)]
    states = content["optimizer"][0]["state"].values()
    moments = [(state, name) for state in states for name in ("exp_avg", "exp_avg_sq")]
    assert not all(state[name].is_contiguous() for state, name in moments)
    for state, name in moments:
        state[name] = state[name].contiguous()
    v10.save(log.with_suffix(".pt"), content)
    run("--optimizer-on-resize", "transport", "--resume", name="moved")
    assert "going on on cpu instead of mps: the run is no longer bit for bit" in capsys.readouterr().out
    assert untimed(log) == untimed(straight)  # here it is, on the same device and without dropout


@pytest.mark.parametrize(("victim", "number", "dtype"), [
    (0, signal.SIGKILL, "bfloat16"), pytest.param(1, signal.SIGKILL, "float32", marks=pytest.mark.soak),
    (1, signal.SIGTERM, "float32")])
def test_when_a_process_is_killed_or_stopped_the_other_ends_and_the_run_goes_on(text, tmp_path, victim, number, dtype):
    log = tmp_path / "two.jsonl"
    flags = ["--dtype", dtype, "--dropout", "0.1", "--rank-interval", "3", "--steps-per-epoch", "10",
             "--checkpoint-minutes", "0.001"]
    processes = two_processes(text, log, *flags, "--epochs", "1000")
    while not log.exists() or len(records(log, "epoch")) < 2:
        assert all(process.poll() is None for process in processes)
        time.sleep(0.05)
    processes[victim].send_signal(number)
    _, its = processes[victim].communicate(timeout=60)
    _, said = processes[1 - victim].communicate(timeout=60)
    if number == signal.SIGKILL:
        assert processes[1 - victim].returncode == 1
        assert said.count("\n") == 1
        assert f"process {1 - victim}: error: the connection to another process is lost" in said
    else:
        assert [process.returncode for process in processes] == [143, 143]
        assert (said.count("\n"), its) == (1, "")
        assert "is saved" in said
    last, previous = log.with_suffix(".pt"), log.with_suffix(".prev.pt")  # a kill may come between two renames
    epochs = str(v10.load(last if last.exists() else previous)["state"]["step"] // 10 + 1)
    for name, more in (("two", ["--resume"]), ("straight", [])):
        both = two_processes(text, tmp_path / f"{name}.jsonl", *flags, "--epochs", epochs, *more)
        assert [(process.communicate()[1], process.returncode) for process in both] == [("", 0)] * 2
    for kind in ("epoch", "ranks"):
        assert untimed(log, kind) == untimed(tmp_path / "straight.jsonl", kind)


def test_two_machines_train_as_one_process_does_without_a_disk_that_both_see(run, text, tmp_path):
    folders = [tmp_path / "here", tmp_path / "there"]
    for folder in folders:
        folder.mkdir()
    test = shutil.copy(text, tmp_path / "test.tokens")
    said = finished(agents(V10, text, "two.jsonl", *RESIZING, "--test-file", test, folders=folders))
    assert ["done: 3 epochs" in of_one for of_one in said] == [True, False]
    assert ["perplexity" in of_one for of_one in said] == [True, False]
    assert not any(folders[1].iterdir())
    assert_same_training(run(*RESIZING), folders[0] / "two.jsonl")


@pytest.mark.soak
@pytest.mark.parametrize("victim", [0, 1])
@pytest.mark.parametrize(("script", "changing"), [
    (V10, ["--rank-interval", "3"]), (V11, "--rank-budget 0.3 --cuts 3 --cut-from 0.0004 --cut-to 0.002".split())])
def test_when_a_machine_is_lost_the_other_ends_and_the_run_goes_on_with_two_or_with_one(text, tmp_path, script,
                                                                                        changing, victim):
    log, flags = tmp_path / "two.jsonl", [*changing, "--checkpoint-minutes", "0.001", "--epochs", "1000"]
    both = agents(script, text, log, *flags)
    while not log.exists() or len(records(log, "epoch")) < 2:
        assert all(process.poll() is None for process in both)
        time.sleep(0.05)
    agent = both[victim].pid
    for pid in (*map(int, Path(f"/proc/{agent}/task/{agent}/children").read_text().split()), agent):
        os.kill(pid, signal.SIGKILL)
    both[victim].communicate()
    said, _ = both[1 - victim].communicate(timeout=120)
    assert both[1 - victim].returncode == 1
    assert f"process {1 - victim}: error: the connection to another process is lost" in said
    step = v10.load(log.with_suffix(".pt"))["state"]["step"]
    more = ["--epochs", str(step // 5 + 2), "--resume"]
    finished(agents(script, text, log, *flags, *more))
    more[1] = str(step // 5 + 4)
    done = subprocess.run([sys.executable, script, "--data-file", text, "--log-file", log, *SMALL, *RANKS, *flags,
                           *more], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert [record["processes"] for record in records(log, "resume")] == [2, 1]
    assert [record["epoch"] for record in records(log, "epoch")] == list(range(1, step // 5 + 5))


def test_a_batch_that_cannot_be_shared_evenly_is_refused(run, capsys, monkeypatch):
    run("--grad-accum", 3, code=2)
    assert "--batch-size 4 cannot be split evenly into 3 parts" in capsys.readouterr().err
    monkeypatch.setattr(v10, "process_count", lambda: 2)
    run("--batch-size", 5, code=2)
    assert "--batch-size 5 cannot be split evenly into 2 parts" in capsys.readouterr().err


@pytest.mark.parametrize(("windows", "block_size", "device", "parts"), [
    (32, 256, "cpu", 4), (32, 64, "cpu", 1), (33, 256, "cpu", 11), (4, 4096, "cpu", 4), (7, 1024, "cpu", 7),
    (32, 256, "cuda", 1), (32, 256, "mps", 1), (128, 256, "cuda", 1), (128, 256, "mps", 2), (127, 256, "mps", 1)])
def test_a_part_holds_at_most_2048_tokens_on_a_cpu_and_32766_on_mps_if_that_can_be(windows, block_size, device, parts):
    assert v10.default_grad_accum(windows, block_size, torch.device(device)) == parts


@pytest.mark.parametrize(("has_gpus", "backends"), [(True, "cpu:gloo,cuda:nccl"), (False, "cpu:gloo")])
def test_nccl_is_asked_for_where_there_are_gpus_and_gloo_everywhere(monkeypatch, has_gpus, backends):
    asked = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: has_gpus)
    monkeypatch.setattr(v10.dist, "init_process_group", asked.append)
    v10.join_processes()
    assert asked == [backends]


@pytest.mark.parametrize(("asked", "gpus", "has_mps", "gives"), [
    ("auto", 2, False, "cuda"), ("auto", 0, True, "cpu"), ("auto", 1, False, "2 processes on a machine with fewer"),
    ("cpu", 1, True, "cpu"), ("mps", 0, True, "--device mps is not available to several processes")])
def test_two_processes_take_a_gpu_each_or_the_cpu_and_never_mps(monkeypatch, asked, gpus, has_mps, gives):
    taken = []
    for name, value in (("is_available", gpus > 0), ("device_count", gpus)):
        monkeypatch.setattr(torch.cuda, name, lambda value=value: value)
    monkeypatch.setattr(torch.cuda, "set_device", taken.append)
    monkeypatch.setattr(torch, "set_float32_matmul_precision", lambda precision: None)
    monkeypatch.setattr(torch.backends.cuda, "enable_cudnn_sdp", taken.append)  # False: its dropout is rounded
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: has_mps)
    monkeypatch.setattr(v10, "process_count", lambda: 2)
    for name, value in (("LOCAL_WORLD_SIZE", "2"), ("LOCAL_RANK", "1")):
        monkeypatch.setenv(name, value)
    if " " in gives:
        with pytest.raises(v10.UserError, match=gives):
            v10.pick_device(asked)
    else:
        assert v10.pick_device(asked).type == gives
    assert taken == ([1, False] if gives == "cuda" else [])


@pytest.mark.parametrize(("local_rank", "says"), [("0", "v10: process 2: error: no\n"), ("1", "")])
def test_an_error_that_all_come_to_is_said_once_on_each_machine(monkeypatch, capsys, local_rank, says):
    for name, value in (("process_index", 2), ("process_count", 4), ("handle_signals", None)):
        monkeypatch.setattr(v10, name, lambda *_, value=value: value)
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    monkeypatch.setenv("LOCAL_RANK", local_rank)
    monkeypatch.delenv("TORCHELASTIC_ERROR_FILE", raising=False)
    v10.report_failure("v10", "error: no", everywhere=False)
    assert capsys.readouterr().err == says
