"""Nothing is left on the CPU, or fetched from there, when the model is on another device: tried on PyTorch's "meta"
device, whose tensors have shapes and no values, so that a mix of devices is found without a GPU. Where there is one, it
trains as the CPU does."""
import contextlib
import os
import signal

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import v7_transformer_dense_baseline as v7
import v10_transformer_lowrank_scaled as v10
import v11_transformer_lowrank_selfguided as selfguided
import v11_transformer_lowrank_spectron as v11
from conftest import RANKS, records
from test_safety import at_call

FLAGS = """--d-model 32 --n-layers 2 --n-heads 2 --d-ff 64 --block-size 16 --batch-size 4 --dropout 0.1 --epochs 2
           --steps-per-epoch 4""".split()


def with_values(tensor):
    """What comes back from a device that has none."""
    return torch.rand(tensor.shape).to(tensor.dtype) if tensor.is_meta else tensor


class OneDevice(TorchDispatchMode):
    """Within it an operation on tensors of two devices fails, unless it copies. As in PyTorch, a number on the CPU may
    stand anywhere but in front, where it might be what changes."""

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        devices = {tensor.device for i, tensor in enumerate(tensors) if tensor.dim() or tensor.is_meta or i == 0}
        assert len(devices) < 2 or operation is torch.ops.aten.copy_.default, f"{operation} mixes {devices}"
        return operation(*args, **kwargs or {})


@pytest.fixture
def device(monkeypatch):
    """Another device than the CPU. A tensor that is copied from it to the CPU has random values there."""
    Tensor, autocast = torch.Tensor, torch.autocast
    to, item, tolist = Tensor.to, Tensor.item, Tensor.tolist
    monkeypatch.setattr(Tensor, "cpu", with_values)
    monkeypatch.setattr(Tensor, "to", lambda tensor, *args, **named: to(
        with_values(tensor) if "cpu" in map(str, args) else tensor, *args, **named))
    monkeypatch.setattr(Tensor, "item", lambda tensor: item(with_values(tensor)))
    monkeypatch.setattr(Tensor, "tolist", lambda tensor: tolist(with_values(tensor)))
    monkeypatch.setattr(Tensor, "__bool__", lambda tensor: True)
    monkeypatch.setattr(torch, "autocast", lambda name, *args, **named: (
        contextlib.nullcontext() if name == "meta" else autocast(name, *args, **named)))
    with OneDevice():
        yield torch.device("meta")


@pytest.mark.parametrize(("variant", "flags"), [
    (v10.Variant(), RANKS), (v10.Variant(), [*RANKS, "--tie-embeddings"]), (v7.Dense(), []),
    (v7.Dense(), ["--optimizer", "muon"]), (v11.LowRankSpectron(), [*RANKS, "--rank-budget", "0.5"]),
    (selfguided.SelfGuided(), RANKS)])
def test_training_measuring_and_resizing_mix_no_devices(device, variant, flags):
    args = v10.parse_flags(variant, [*FLAGS, *flags])
    model = v10.place(v10.GPT(v10.GPTConfig.of_flags(args, 50), lambda n, m: variant.linear(n, m, 12)), device)
    optimizers, layers = variant.make_optimizers(model, args), list(model.linears().values())
    tokens, generator = torch.zeros(200, dtype=torch.long, device=device), torch.Generator().manual_seed(0)
    x, y = v10.sample_batch(tokens, args.batch_size, args.block_size, generator)
    before = [[factor.clone() for factor in layer.factors()] for layer in layers]
    v10.train_step(model, optimizers, x, y, grad_clip=1.0, grad_accum=2)
    v10.leak_check(model)
    v10.evaluate(model, tokens, args.batch_size)
    v10.telemetry(model, before, x, parts=2)
    if model.ranks():
        v11.measure_fisher(model, x.split(2), seed=0)
        ranks = [8, 16] * 6  # smaller and larger ones
        v10.apply_resizes(layers, {i: v10.resize_factors(*factors, rank, generator) for i, (factors, rank) in enumerate(
            zip(v10.finite_factors(layers), ranks, strict=True))}, optimizers)
        assert model.ranks() == ranks
        v10.train_step(model, optimizers, x, y)
    moments = [state[name] for optimizer in optimizers for state in optimizer.state.values()
               for name in optimizer.moments]
    assert moments
    assert {tensor.device for tensor in (*model.parameters(), *moments)} == {device}


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("main", "flags"), [
    (v10.main, [*RANKS, "--optimizer-on-resize", "transport"]), (v7.main, []),
    (v11.main, [*RANKS, "--rank-budget", "0.3"]), (selfguided.main, RANKS)])
def test_a_gpu_trains_about_as_the_cpu_does_and_goes_on(run, monkeypatch, main, flags, dtype):
    flags = [*flags, "--dtype", dtype, "--dropout", 0]
    with monkeypatch.context() as patch:
        patch.setattr(v10, "train_step", at_call(8, v10.train_step, lambda: os.kill(os.getpid(), signal.SIGTERM)))
        run("--device", "cuda", *flags, main=main, ranks=[], name="there", code=143)
    there = run("--device", "cuda", "--resume", *flags, main=main, ranks=[], name="there")
    here = run(*flags, main=main, ranks=[], name="here")
    losses = [[epoch["val_loss"] for epoch in records(log, "epoch")] for log in (here, there)]
    assert losses[0] == pytest.approx(losses[1], abs=0.03)
