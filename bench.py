"""Speed and memory of v10 as ratios, measured in one run, in interleaved rounds: make bench.

    python3 bench.py                              the report's size, half an hour -> logs/bench.json
    python3 bench.py --dtype bfloat16             one dtype, where by default both are measured, if both are native
    python3 bench.py --show logs/bench.json       the table of earlier results

Machines are noisy: no time means anything alone. Each round measures every entry once, in turn, between two of v10's
steps, and each ratio is one of neighbours in time. Reported are medians over the rounds, with their range.

The floor of a step is the time of its matrix products at the rate of a large one in the same dtype: forward once,
backward twice, for the output layer, the factors at their rank, and causal attention (half of the T x T scores).
Nothing that computes these products one after another can be faster; what a step takes beyond it is memory traffic and
all that is no product.

The literal reading is the report taken word by word: explicit softmax attention, full logits, default AdamW, and a rank
update through the dense product and a full SVD. It shares v10's model and batches. Rank updates run on the CPU, in
float32, whatever the device and the dtype.
"""
import argparse
import functools
import json
import math
import os
import shlex
import subprocess
import sys
import time
from pathlib import Path
from statistics import median

import torch
import torch.distributed as dist
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent))  # PYTHONSAFEPATH leaves it out

import counts  # noqa: E402
import v10_transformer_lowrank_scaled as v10  # noqa: E402
import v11_transformer_lowrank_spectron as v11  # noqa: E402

LARGE = 2048  # side of the large matrix product


# ---- The literal reading ---------------------------------------------------------------------------------------------

class LiteralBlock(v10.Block):
    """Attention as softmax(Q K^T / sqrt(d)) V, with the T x T matrix written out and masked."""

    def attend(self, x):
        B, T, C = x.shape
        q, k, v = (layer(x).view(B, T, self.config.n_heads, -1).transpose(1, 2) for layer in (self.q, self.k, self.v))
        scores = q @ k.transpose(2, 3) / math.sqrt(q.shape[-1])
        future = torch.ones(T, T, dtype=torch.bool, device=x.device).triu(1)
        return self.o((scores.masked_fill(future, -torch.inf).softmax(-1) @ v).transpose(1, 2).reshape(B, T, C))


class LiteralGPT(v10.GPT):
    """The loss from all logits at once."""

    def forward(self, tokens, targets=None):
        logits = super().forward(tokens)
        return logits if targets is None else F.cross_entropy(logits.flatten(0, 1), targets.flatten())


def literal_rank_update(factors, rank):
    """Per layer: W = U V, five power iterations on W and its stable rank, a full SVD of W, new factors from it."""
    for U, V in factors:
        W = U @ V
        x = torch.randn(W.shape[1])
        for _ in range(5):
            x = F.normalize(W.T @ (W @ x), dim=0)
        stable_rank = W.square().sum() / (W @ x).square().sum()
        P, S, Qt = torch.linalg.svd(W, full_matrices=False)
        yield stable_rank, P[:, :rank] * S[:rank].sqrt(), S[:rank].sqrt()[:, None] * Qt[:rank]


def factor_rank_update(factors, rank, generator):
    """What v10 does: the report's estimate, the exact value and the resize, these two from one SVD of the factors."""
    return [(v10.stable_rank(U, V, 5, generator), v10.stable_rank_of(svd[1]),
             *v10.resize_factors(U, V, rank, generator, svd))
            for (U, V), svd in zip(factors, v10.on_threads(v10.product_svd, factors), strict=True)]


# ---- What is measured ------------------------------------------------------------------------------------------------

def low_rank(rank):
    return lambda n, m: v10.LowRankLinearAdaptiveSpectral(n, m, rank)


def make_step(kind, args):
    """-> a function that does one training step of `kind`: literal, v7, compiled, v10 at a rank, as in v10@64, or
    spectron, which is v10 with v11's optimizer."""
    torch.manual_seed(0)
    device = v10.pick_device(args.device)
    linear = v10.DenseLinear if kind == "v7" else low_rank(int(kind.split("@")[1]) if "@" in kind else args.rank)
    config = v10.GPTConfig(args.words, args.d_model, args.n_layers, args.n_heads, 4 * args.d_model, args.block_size)
    parts = v10.default_grad_accum(args.batch_size // v10.process_count(), args.block_size, device)
    model = v10.place((LiteralGPT if kind == "literal" else v10.GPT)(config, linear), device)
    model.low_precision = args.dtype == "bfloat16"
    if kind == "literal":
        parts = 1
        for block in model.blocks:
            block.__class__ = LiteralBlock
        optimizers = [torch.optim.AdamW(model.parameters(), lr=3e-4, weight_decay=0.01)]
    else:
        variant = v11.LowRankSpectron() if kind == "spectron" else v10.Variant()
        optimizers = variant.make_optimizers(model, v10.parse_flags(variant, []))
    if kind == "compiled":
        v10.compile_blocks(model)
    trained, generator = v10.parallel(model), torch.Generator().manual_seed(0)
    tokens = torch.arange(args.words + args.block_size, device=device) % args.words

    def step():
        batch = v10.sample_batch(tokens, args.batch_size, args.block_size, generator)
        loss = v10.train_step(trained, optimizers, *v10.own_share(batch, device), grad_accum=parts)
        v10.now(device)  # waits for it
        return loss
    return step


def make_uses(kind, args):
    """-> {what is done with a trained model: a function that does it}, for v7 or, if `cut`, for what compress.py makes
    of it with a quarter of its parameters, the same share in every matrix."""
    torch.manual_seed(0)
    C, device = args.d_model, v10.pick_device(args.device)
    config = v10.GPTConfig(args.words, C, args.n_layers, args.n_heads, 4 * C, args.block_size)
    quarter = {n * m: max(1, n * m // (4 * (n + m))) for n, m in ((C, C), (C, 4 * C), (C, args.words))}
    ends = 2 * [quarter[C * args.words] if kind == "cut" else None]
    model = v10.GPT(config, lambda n, m: low_rank(quarter[n * m])(n, m) if kind == "cut" else v10.DenseLinear(n, m),
                    ends).to(device).eval()
    for end in (model.token_embedding, model.head) if kind == "cut" else ():
        torch.nn.init.normal_(end.U)
        torch.nn.init.normal_(end.V)
    model.low_precision = args.dtype == "bfloat16"
    tokens = torch.arange(4 * args.block_size + 1, device=device) % args.words
    vocabulary = [str(i) for i in range(args.words)]
    return {"evaluate": lambda: v10.evaluate(model, tokens, 4),
            "generate": lambda: v10.generate(model, vocabulary, " ".join(vocabulary[:args.block_size]), 2)}


def truncated_svds(m, n, k, generator):
    """Ways to approximate a matrix (m, n) whose i-th singular value is i^-1/2 by one of rank k <= n <= m -> {way:
    (seconds, error in the Frobenius norm / the least possible one)}: the exact SVD; from the eigenvectors of the n x n
    Gram matrix, as compress.py does it; randomised (torch.svd_lowrank); generalised Nystroem (Nakatsukasa, 2020)."""
    def orthogonal(rows):
        return torch.linalg.qr(torch.randn(rows, n, generator=generator)).Q
    values = torch.arange(1, n + 1) ** -0.5
    W = (orthogonal(m) * values) @ orthogonal(n).T
    least = values[k:].square().sum().sqrt()

    def exact():
        P, S, Qt = torch.linalg.svd(W, full_matrices=False)
        return P[:, :k] * S[:k], Qt[:k]

    def gram():
        Q = torch.linalg.eigh((W.T @ W).double()).eigenvectors[:, -k:].float()
        return W @ Q, Q.T

    def randomised():
        P, S, Q = torch.svd_lowrank(W, q=k + 10, niter=4)
        return P[:, :k] * S[:k], Q[:, :k].T

    def nystroem():
        X, Y = (torch.randn(side, width, generator=generator) for side, width in ((n, k), (m, k + k // 2)))
        AX, YA = W @ X, Y.T @ W
        return AX @ torch.linalg.pinv(YA @ X), YA
    found = {}
    for way in (exact, gram, randomised, nystroem):
        began = time.perf_counter()
        U, V = way()
        found[way.__name__] = time.perf_counter() - began, ((W - U @ V).double().norm() / least).item()
    return found


def step_flop(args, rank):
    """Floating-point operations in the products of a training step, by part: two per multiplication, and a backward
    pass costs two forward ones."""
    settings = counts.settings_of(args.d_model, args.n_layers, args.words, args.block_size, args.batch_size)
    forward = counts.token_multiplications(settings, [rank] * len(settings["layers"]))
    return {part: 6 * args.batch_size * args.block_size * count for part, count in forward.items()}


def seconds(action, times=1):
    """Seconds an action takes, on average over `times` calls."""
    began = time.perf_counter()
    for _ in range(times):
        action()
    return (time.perf_counter() - began) / times


def product_rate(matrices, least=3.0):
    """Floating-point operations a second of a large matrix product, kept up for `least` seconds."""
    device = matrices[0].device
    count, began = 0, v10.now(device)
    while not count or v10.now(device) - began < least:
        for _ in range(1 if device.type == "cpu" else 100):  # to wait for a GPU takes time too
            torch.mm(*matrices[:2], out=matrices[2])
            count += 1
    return 2 * LARGE**3 * count / (v10.now(device) - began)


def elsewhere(kind, args, processes=1):
    """A second step of `kind` in processes of their own -> (its seconds, peak memory of process 0 in MB)."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]  # on a free port
    command = [sys.executable, *(torchrun if processes > 1 else []), __file__,
               *(f"--{name.replace('_', '-')}={value}" for name, value in vars(args).items() if name != "compile"),
               f"--step={kind}"]
    threads = str(max(1, torch.get_num_threads() // processes))
    done = subprocess.run(command, env=os.environ | {"OMP_NUM_THREADS": threads}, capture_output=True, text=True)
    if done.returncode:
        raise v10.TrainingError(f"a step of {kind} in {processes} processes failed: {done.stderr.strip()[-200:]}")
    return json.loads(done.stdout.splitlines()[-1])


def here(kind, args):
    """elsewhere()'s other end."""
    if dist.is_torchelastic_launched():
        v10.join_processes()
    step = make_step(kind, args)
    step()
    v10.gather("ready")
    taken = seconds(step)
    if v10.process_index() == 0:
        print(json.dumps([taken, v10.peak_memory_mb(v10.pick_device(args.device))]))
    v10.gather("done")
    if dist.is_initialized():
        dist.destroy_process_group()


def native_dtypes(device):
    """The dtypes whose products this device computes natively, so far as torch says."""
    low = v10.bfloat16_speedup() > 0 if device.type == "cpu" else v10.choose_dtype(device, LARGE)[0] == "bfloat16"
    return ["float32"] + ["bfloat16"] * low


def measure(args):
    """One dtype's results, as a dict for JSON."""
    full, half, quarter = (f"v10@{rank}" for rank in (args.rank, args.rank // 2, args.rank // 4))
    device, dtype = v10.pick_device(args.device), getattr(torch, args.dtype)
    flop, generator = step_flop(args, args.rank), torch.Generator().manual_seed(0)
    matrices = [torch.randn(LARGE, LARGE, dtype=dtype, device=device) for _ in range(3)]
    with torch.no_grad():
        model = v10.GPT(v10.GPTConfig(1, args.d_model, args.n_layers, d_ff=4 * args.d_model), low_rank(args.rank))
        layers = [layer.factors() for layer in model.linears().values()]
        large = [v10.LowRankLinearAdaptiveSpectral(args.large, args.large, args.rank).factors()]
    shrunk = args.rank - min(4, args.rank // 2)
    step = make_step(full, args)
    entries = {"floor": lambda: sum(flop.values()) / product_rate(matrices)}
    if device.type == "cpu":
        entries["two"] = lambda: elsewhere(full, args, 2)[0]
    for kind in (half, quarter, "v7", "literal", "spectron", *["compiled"] * args.compile):
        entries[kind] = functools.partial(seconds, make_step(kind, args))
    if args.dtype != "float32":
        entries["float32"] = functools.partial(seconds, make_step(full, with_dtype(args, "float32")))
    uses = {kind: make_uses(kind, args) for kind in ("v7", "cut")}
    rounds = []
    for number in range(args.rounds + 1):  # the first one warms up
        taken, before = {}, seconds(step)
        for name, timed in entries.items():
            value = timed()
            if name == "two":
                step()  # not measured: right after other processes it is slower than the next one
            after = seconds(step)
            taken[name] = {"seconds": value, "v10": (before + after) / 2}
            before = after
        taken |= {"update": seconds(lambda: factor_rank_update(layers, shrunk, generator), times=10),  # short: often
                  "literal update": seconds(lambda: list(literal_rank_update(layers, shrunk))),
                  "large update": seconds(lambda: factor_rank_update(large, shrunk, generator), times=10),
                  "v10": before, **{f"{kind}, {name}": seconds(uses[kind][name], times=3)
                                    for name in ("evaluate", "generate") for kind in uses}}
        rounds.append(taken)
        print(f"{args.dtype}, round {number} of {args.rounds}: " + ", ".join(
            "{} {seconds:.3f} s, v10 {v10:.3f} s".format(name, **value) if isinstance(value, dict) else
            f"{name} {value:.3f} s" for name, value in taken.items()), flush=True)
    large_literal = seconds(lambda: list(literal_rank_update(large, shrunk)))  # once: it takes long enough
    memory = {kind: elsewhere(kind, args)[1] for kind in (full, "v7", "literal")}
    return {"flop": flop, "rounds": rounds[1:], "large_literal_seconds": large_literal, "memory_mb": memory,
            "measured": ratios(args, rounds[1:], large_literal, memory)}


def ratios(args, rounds, large_literal, memory):
    """{what is over what: the ratio, or its median and range over the rounds}"""
    def middle(values):
        return {"median": median(values), "least": min(values), "most": max(values)}

    def over_v10(name):
        return middle([taken[name]["seconds"] / taken[name]["v10"] for taken in rounds])

    def v10_over(name):
        return middle([taken[name]["v10"] / taken[name]["seconds"] for taken in rounds])

    def each(name, other):
        return middle([taken[name] / taken[other] for taken in rounds])
    v10_memory, has = memory[f"v10@{args.rank}"], rounds[0].keys()
    return {
        "step time of v10 / floor": v10_over("floor"),
        **({"step time of v10 in float32 / in bfloat16": over_v10("float32")} if "float32" in has else {}),
        "step time of the literal reading / v10": over_v10("literal"),
        "step time of v7 / v10": over_v10("v7"),
        **{f"step time of v10 at rank {rank} / {args.rank}": over_v10(f"v10@{rank}")
           for rank in (args.rank // 2, args.rank // 4)},
        "step time of v10 with v11's optimizer / with AdamW": over_v10("spectron"),
        **({"step time of v10 in one process / in two": v10_over("two")} if "two" in has else {}),
        **({"step time of v10 / with --compile": v10_over("compiled")} if "compiled" in has else {}),
        **({} if None in memory.values() else {
            "peak memory of v10 / the literal reading": v10_memory / memory["literal"],
            "peak memory of v10 / v7": v10_memory / memory["v7"]}),
        **{f"time to {name} with v7 / with v7 cut to a quarter": each(f"v7, {name}", f"cut, {name}")
           for name in ("evaluate", "generate")},
        "time of the literal rank update / v10's": each("literal update", "update"),
        f"the same for one layer of {args.large} x {args.large}":
            large_literal / median(taken["large update"] for taken in rounds),
        "time of v10's rank update / an epoch of 200 steps": middle(
            [taken["update"] / taken["v10"] / 200 for taken in rounds])}


def with_dtype(args, dtype):
    return argparse.Namespace(**vars(args) | {"dtype": dtype})


def section(results):
    """The results as Markdown: what was run where, and a table with a column for each dtype."""
    def cell(value):
        if value is None:
            return "\N{EN DASH}"
        numbers = [value] if isinstance(value, float) else [value[name] for name in ("median", "least", "most")]
        median, *ends = (f"{number:.3%}" if max(numbers) < 0.01 else f"{number:,.{2 * (number < 10)}f}"
                         for number in numbers)
        return median + (f" ({' to '.join(ends)})" if ends else "")
    measured = {dtype: found["measured"] for dtype, found in results["dtypes"].items()}
    names = max(measured.values(), key=len)  # the last dtype may have one row more
    rows = [f"| {name} | " + " | ".join(cell(found.get(name)) for found in measured.values()) + " |" for name in names]
    rounds = len(next(iter(results["dtypes"].values()))["rounds"])
    ways = [f"| {size} | " + " | ".join(f"{found['exact'][0] / taken:.3g}, {error:.3f}" for taken, error
                                        in found.values()) + " |" for size, found in results.get("svds", {}).items()]
    svds = ["", "| speed over the exact SVD's, error over the least | exact | Gram matrix | randomised | Nyström |",
            "|---|--:|--:|--:|--:|", *ways] if ways else []
    return "\n".join([f"`{results['command']}`, {results['device']}, torch {results['torch']}, medians over {rounds} "
                      "rounds, with their range:", "", f"| ratio | {' | '.join(measured)} |",
                      f"|---|{'--:|' * len(measured)}", *rows, *svds])


def read_results(path):
    """What an earlier run wrote. Raises UserError for another file."""
    try:
        results = json.loads(path.read_text())
    except ValueError:
        results = None
    if not isinstance(results, dict) or not str(results.get("command")).startswith("python3 bench.py"):
        raise v10.UserError(f"{path} does not hold results of bench.py: choose another file")
    return results


def check_log(log):
    """Raises UserError, before the work, if the results cannot be written there, or if it is another file."""
    log.parent.mkdir(parents=True, exist_ok=True)
    if log.is_dir():
        raise v10.UserError(f"--log-file needs the name of a file, not {str(log)!r}")
    log.touch()
    if log.stat().st_size:
        read_results(log)


@v10.screens()
def main(argv=None):
    parser = v10.Parser(prog="bench.py", description="Measures v10's speed and memory as ratios.", allow_abbrev=False,
                        formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    for flag, default, text in (
            ("--rounds", 5, "after the one that warms up"), ("--rank", 64, "of v10's layers"),
            ("--d-model", 512, "width"), ("--n-layers", 6, "blocks"), ("--n-heads", 8, "attention heads"),
            ("--block-size", 256, "context length"),
            ("--batch-size", 32, "windows a step"), ("--words", 33_277, "in the vocabulary"),
            ("--large", 4096, "side of the one large layer")):
        parser.add_argument(flag, type=v10.number(int, least=4 if flag == "--rank" else 1), default=default, help=text)
    parser.add_argument("--device", choices=("auto", "cuda", "mps", "cpu"), default="auto", help="as v10's")
    parser.add_argument("--dtype", choices=("auto", "float32", "bfloat16"), default="auto", help="auto: both if native")
    parser.add_argument("--compile", action="store_true", help="measure --compile too; takes minutes more")
    path = os.path.expanduser
    parser.add_argument("--log-file", type=path, default="logs/bench.json", help="where the results go, in JSON")
    parser.add_argument("--show", type=path, metavar="FILE", help="only print the table of earlier results")
    parser.add_argument("--step", help=argparse.SUPPRESS)  # elsewhere()'s
    argv = sys.argv[1:] if argv is None else argv
    try:
        args = parser.parse_args(argv)
        log, show, step = (args.__dict__.pop(name) for name in ("log_file", "show", "step"))
        if args.d_model % args.n_heads or args.rank > args.d_model or args.batch_size % 2:
            raise v10.UserError("--d-model must be a multiple of --n-heads, --rank at most --d-model, "
                                "--batch-size even")
        if args.words < args.d_model or args.large <= args.rank:
            raise v10.UserError("--words must be at least --d-model, --large above --rank")
        if step:
            here(step, args)
            return 0
        if show:
            results = read_results(Path(show))
        else:
            check_log(Path(log))
            device = v10.pick_device(args.device)
            dtypes = native_dtypes(device) if args.dtype == "auto" else [args.dtype]
            results = {"command": shlex.join(["python3", "bench.py", *argv]), "device": v10.device_name(device),
                       "torch": torch.__version__,
                       "dtypes": {dtype: measure(with_dtype(args, dtype)) for dtype in dtypes},
                       "svds": {f"{m:,} x {n:,} at rank {k}": truncated_svds(m, n, k, torch.Generator().manual_seed(0))
                                for m, n, k in ((args.words, args.d_model, min(args.rank, args.d_model - 1)),
                                                (args.large, args.large, min(2 * args.rank, args.large - 1)))}}
            Path(log).write_text(json.dumps(results, indent=1) + "\n")
        print(section(results))
        return 0
    except (OSError, ValueError, LookupError) as error:
        print(f"bench.py: error: {error}", file=sys.stderr)
        return 2
    except v10.TrainingError as error:
        print(f"bench.py: error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("bench.py: interrupted; nothing was written", file=sys.stderr)
        return 130


if __name__ == "__main__":
    v10.leave(main())
