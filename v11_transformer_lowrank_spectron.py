"""v11: low rank from scratch, with the steps of W = U V under control.

v10's model with four changes; the first two are from "Stabilizing Native Low-Rank LLM Pretraining" (Spectron, arXiv
2602.12429):

1. Spectron steps the factors. The momentum of each is orthogonalised, which gives all its directions the same step,
   and the steps of a pair are scaled by its spectral norms, which bounds the step of their product:

       U -= rho O_U,  V -= rho O_V,  rho = eta / (||U|| + ||V|| + 1)   =>   ||dW|| <= eta   (2-norms)

2. The factors start as the best approximation of a dense layer's own start, evenly split (spectral initialisation).
3. The head is the token embedding's matrix (a tied head). `--no-tie-embeddings` keeps them apart.
4. The ranks are cut six times, from half of the width down to a tenth of a dense model's linear parameters. Each cut
   takes those directions of all layers that matter least to the loss per parameter: s_i^2 / (m + n), where the s_i
   are the singular values of W in the Fisher metric of its inputs and of its outputs' gradients.

    python3 v11_transformer_lowrank_spectron.py                             at the report's size
    python3 v11_transformer_lowrank_spectron.py --rank-budget 0.25          down to a quarter
    python3 v11_transformer_lowrank_spectron.py --cuts 0 --init-rank 64     rank 64 in all layers, to the end
    python3 v11_transformer_lowrank_spectron.py --cuts 0 --no-fixed-rank    v10's controller instead
    python3 v11_transformer_lowrank_spectron.py --optimizer muon            without the renormalisation by norms
    python3 v11_transformer_lowrank_spectron.py --optimizer adamw           AdamW on all parameters, as in v10
    python3 v11_transformer_lowrank_spectron.py --share-layers              one block's linear layers for all blocks

All other parameters (embeddings, norms, the head's bias) are AdamW's. Spectron and Muon keep no second moments, so
v10's transport carries all they know through a shrink exactly. What the bound leaves out: Newton-Schulz orthogonalises
roughly (singular values of 0.68 to 1.20), so ||dW|| stays below 1.21 eta for eta up to 0.1 if the norms are exact; and
the norms come from one step of power iteration, which understates them a little.

Not as in the paper: the tied head; Nesterov, which its code has and its algorithm does not; a rate of AdamW's own;
a decay that falls on the product and is fitted to the length of the run. Its code also scales the steps of U by
sqrt(m / r), which its bound does not allow for.

Shapes: U (m, r), V (r, n), W = U V (m, n).
"""
import argparse
import sys
from collections import defaultdict
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent))  # PYTHONSAFEPATH leaves it out

import v10_transformer_lowrank_scaled as v10  # noqa: E402

# ---- Matrices of one shape, all at once ------------------------------------------------------------------------------

def by_shape(matrices: list[Tensor]) -> list[list[int]]:
    """The indices of the matrices, those of one shape together."""
    groups = defaultdict(list)
    for i, matrix in enumerate(matrices):
        groups[matrix.shape].append(i)
    return [*groups.values()]


def orthogonalise(matrices: list[Tensor], dtype: torch.dtype | None = None, steps: int = 5) -> list[Tensor]:
    """For each M = P S Q^T of any shape (m, n) roughly P Q^T: its singular values become 0.68 to 1.20.

    Newton-Schulz iteration with Keller Jordan's coefficients (Muon, 2024), whose products run in `dtype`, by default in
    the matrices' own. Singular values below a few thousandths of the norm stay smaller. A matrix of zeros stays one.
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    wide, results = [M if M.shape[0] <= M.shape[1] else M.mT for M in matrices], [None] * len(matrices)
    for indices in by_shape(wide):
        X = torch.stack([wide[i] for i in indices])  # (k, m, n), m <= n
        X = (X / X.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)).to(dtype)
        for _ in range(steps):
            A = X @ X.mT  # (k, m, m)
            X = torch.baddbmm(X, torch.baddbmm(A, A, A, beta=b, alpha=c), X, beta=a)  # a X + (b A + c A A) X
        for i, result in zip(indices, X, strict=True):
            results[i] = (result if wide[i] is matrices[i] else result.mT).to(matrices[i].dtype)
    return results


def power_iteration(matrices: list[Tensor], vectors: list[Tensor], steps: int = 1) -> tuple[list, list]:
    """An estimate of ||M||_2, from below, for each M (m, n), and the vector x (m,) to start the next one from, which
    tends to M's first left singular vector -> (norms, vectors). From a matrix of zeros the vectors stay as they are."""
    norms, found = [None] * len(matrices), [None] * len(matrices)
    for indices in by_shape(matrices):
        M, x = torch.stack([matrices[i] for i in indices]), torch.stack([vectors[i] for i in indices])[..., None]
        for _ in range(steps):
            x = M @ F.normalize(M.mT @ x, dim=1)  # (k, m, 1)
            norm = x.norm(dim=1)
            x = F.normalize(x, dim=1)
        for i, sigma, vector in zip(indices, norm[:, 0], x[..., 0], strict=True):
            norms[i], found[i] = sigma, torch.where(sigma > 0, vector, vectors[i])
    return norms, found


# ---- Optimizers ------------------------------------------------------------------------------------------------------

class Muon(torch.optim.Optimizer):
    """W -= lr s O, where O is the orthogonalised momentum of a matrix W (m, n) and s = sqrt(max(1, m/n)) (Muon, 2024).

    It computes what torch.optim.Muon does, for all matrices of one shape at once. `weight_decay` is decoupled: W
    shrinks by lr weight_decay W per step. `dtype` is that of the products of Newton-Schulz, by default W's own.
    """

    moments = {"momentum_buffer": 1}
    _step_supports_amp_scaling = True  # PyTorch's mark of an optimizer that takes no step if found_inf is 1

    def __init__(self, matrices, lr, momentum=0.95, nesterov=True, weight_decay=0.0, dtype=None):
        super().__init__(list(matrices), {"lr": lr, "momentum": momentum, "nesterov": nesterov,
                                          "weight_decay": weight_decay})
        self.dtype = dtype

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            matrices, momentum = group["params"], group["momentum"]
            bad = getattr(self, "found_inf", matrices[0].new_zeros(())).to(matrices[0])  # on the device: nothing waits
            for W in matrices:
                if "momentum_buffer" not in self.state[W]:
                    self.state[W]["momentum_buffer"] = torch.zeros_like(W)
            is_bad, zero, share = bad > 0, bad.new_zeros(()), (1 - momentum) * (1 - bad)
            gradients = [torch.where(is_bad, zero, W.grad) for W in matrices]
            buffers = [self.state[W]["momentum_buffer"] for W in matrices]
            for buffer, gradient in zip(buffers, gradients, strict=True):
                buffer.lerp_(gradient, share)
            directions = orthogonalise([gradient.lerp(buffer, momentum) for gradient, buffer in zip(
                gradients, buffers, strict=True)] if group["nesterov"] else buffers, self.dtype)
            scales = self.scales(matrices)
            rate = group["lr"] * (1 - bad)
            if group["weight_decay"]:
                self.decay(matrices, rate * group["weight_decay"])
            for W, direction, scale in zip(matrices, directions, scales, strict=True):
                W.sub_(direction * (rate * scale))

    def scales(self, matrices):
        """s for each matrix, in a step."""
        return [max(1, W.shape[0] / W.shape[1]) ** 0.5 for W in matrices]

    def decay(self, matrices, rate):
        """Shrink the matrices."""
        for W in matrices:
            W.mul_(1 - rate)


class FactorMuon(Muon):
    """Muon on pairs of factors, U_1, V_1, U_2, V_2, ..., with s = 1: Spectron without its renormalisation.

    The decay falls on each factor, or on the product: U -= rate U V V^T and V -= rate U^T U V follow the gradients of
    ||U V||_F^2 / 2, whereas decay of each factor amounts to a penalty on the nuclear norm of U V (Khodak et al., 2021).
    """

    def __init__(self, matrices, lr, decay_on="product", **settings):
        super().__init__(matrices, lr, **settings)
        self.decay_on = decay_on

    def scales(self, matrices):
        return [1.0] * len(matrices)

    def decay(self, matrices, rate):
        if self.decay_on == "factors":
            super().decay(matrices, rate)
            return
        for U, V in zip(matrices[::2], matrices[1::2], strict=True):
            G_u, G_v = U.mT @ U, V @ V.mT  # (R, R)
            U.sub_(rate * (U @ G_v))
            V.sub_(rate * (G_u @ V))


class Spectron(FactorMuon):
    """Muon on pairs of factors with s = 1 / (||U|| + ||V|| + 1), which keeps the step of each product about below lr
    (Spectron, Algorithms 1 to 3; there without Nesterov).

    The norms are those of the factors before the step, by one step of power iteration, at first by twenty. Its vectors
    have m and n entries, so a resize leaves them alone.
    """

    def scales(self, matrices):
        """s for each matrix, in a step, which moves the power iteration on."""
        tall = [factor if i % 2 == 0 else factor.mT for i, factor in enumerate(matrices)]  # U (m, r) and V^T (n, r)
        known = all("vector" in self.state[factor] for factor in matrices)
        if not known:
            generator = torch.Generator().manual_seed(0)
            for factor, side in zip(matrices, tall, strict=True):
                self.state[factor]["vector"] = torch.randn(len(side), generator=generator).to(factor)
        norms, vectors = power_iteration(tall, [self.state[factor]["vector"] for factor in matrices],
                                         steps=1 if known else 20)
        for factor, vector in zip(matrices, vectors, strict=True):
            self.state[factor]["vector"] = vector
        scales = [1 / (u + v + 1) for u, v in zip(norms[::2], norms[1::2], strict=True)]
        return [scale for scale in scales for _ in "UV"]


def with_decays(args: argparse.Namespace) -> argparse.Namespace:
    """These flags with the decays that they leave open: rate times decay is 0.64 / steps, at most a hundredth. That was
    the best of three on the study's 640 steps and is untried on other lengths; the best decay falls as texts grow
    (Wang and Aitchison, 2025, arXiv 2405.13698)."""
    share = min(0.64 / (args.epochs * args.steps_per_epoch), 0.01)
    decays = {"weight_decay": args.lr, "factor_decay": args.eta}
    return argparse.Namespace(**vars(args) | {name: share / rate for name, rate in decays.items()
                                              if rate and getattr(args, name) is None})


def make_optimizers(model: v10.GPT, args: argparse.Namespace, without: set = frozenset()) -> list:
    """[AdamW], or [AdamW for the rest, the optimizer of --optimizer for the weights of the linear layers], which is a
    second AdamW if they have an --eta of their own; parameters of the set `without` get none."""
    of_linears, args = argparse.Namespace(**vars(args) | {"lr": args.eta}), with_decays(args)
    layers = model.linears().values()
    pairs = [factor for layer in layers if layer.rank is not None for factor in (layer.U, layer.V)]
    matrices = pairs or [layer.weight for layer in layers]
    controlled = set(matrices) if args.eta else set()
    optimizers = [v10.make_adamw([p for p in model.parameters() if p not in controlled | without], args)]
    settings = {"lr": args.eta, "momentum": args.momentum, "nesterov": args.nesterov, "weight_decay": args.factor_decay,
                "dtype": torch.bfloat16 if model.low_precision else None}
    if controlled and args.optimizer == "adamw":
        optimizers.append(v10.make_adamw(matrices, with_decays(of_linears)))
    elif controlled and pairs:
        kind = {"muon": FactorMuon, "spectron": Spectron}[args.optimizer]
        optimizers.append(kind(matrices, decay_on=args.decay_on, **settings))
    elif controlled:
        optimizers.append(Muon(matrices, **settings))
    return optimizers


def seeded(seed: int, number: int) -> torch.Generator:
    """A random generator for something numbered in a run, such as a step: the same in every process and after a
    resume."""
    return torch.Generator().manual_seed((1_000_003 * seed + number) % 2**63)


# ---- How much a direction of W matters to the loss -------------------------------------------------------------------

class Fisher(NamedTuple):
    """The second moments of a layer y = U V x, over tokens, that say what a change of W costs."""

    H: Tensor  # (R, R), of h = V x
    D: Tensor  # (R, R), of d = U^T dL/dy, for L the sum of the losses of labels drawn from the model itself
    g: float  # the mean square of an entry of dL/dy


def measure_fisher(model: v10.GPT, batches: list[Tensor], seed: int) -> list[Fisher]:
    """The Fisher of each linear layer, for its `factors()`, from batches of inputs (B, T), without dropout. Labels are
    drawn from the model's predictions: the text's own would give the gradient's second moment, which is not the loss's
    curvature. The processes share the batches, and the result does not depend on their number except for rounding.
    Products run in the layers' own precision, sums over batches in float64."""
    layers, tokens = list(model.linears().values()), sum(batch.numel() for batch in batches)
    factors = [[factor.to(batches[0].device) for factor in layer.factors()] for layer in layers]
    sums = [[torch.zeros(len(V), len(V), dtype=torch.float64) for _ in "HD"] + [0.0, 0] for _, V in factors]

    def watch(layer, U, V, total):
        def forward(_, inputs, y):
            def backward(gradient):
                gradient = gradient.flatten(0, -2).to(U.dtype)
                d = gradient @ U
                total[1] += (d.mT @ d).cpu().double()
                total[2] += gradient.square().sum().item()
            with torch.no_grad(), torch.autocast(y.device.type, enabled=False):
                h = inputs[0].flatten(0, -2).to(V.dtype) @ V.mT
                total[0] += (h.mT @ h).cpu().double()
                total[3] += len(h)  # more than tokens if blocks share the layer
            y.register_hook(backward)
        return layer.register_forward_hook(forward)

    hooks = [watch(layer, *pair, total) for layer, pair, total in zip(layers, factors, sums, strict=True)]
    with v10.evaluation_mode(model), torch.enable_grad():
        for i, batch in [*enumerate(batches)][v10.process_index()::v10.process_count()]:
            x = model.features(batch)  # (B, T, C)
            labels = draw_labels(model, x.detach(), seeded(seed, i))
            (model.loss(x, labels) * labels.numel()).backward()
    for hook in hooks:
        hook.remove()
    model.zero_grad(set_to_none=True)
    shares = v10.gather(sums)
    found = []
    for layer, of_layer in zip(layers, zip(*shares, strict=True), strict=True):
        H, D, squares, rows = (sum(parts) for parts in zip(*of_layer, strict=True))
        found.append(Fisher(H / rows, D / tokens, squares / tokens / layer.shape[0]))
    return found


@torch.no_grad()
def draw_labels(model, x, generator):
    """A word for each position of x (B, T, C), drawn from the model's prediction -> (B, T)."""
    flat = x.flatten(0, 1)
    rows = max(1, v10.LOGITS_BYTES // (32 * model.config.vocab_size))
    draws = torch.rand(len(flat), 1, generator=generator, dtype=torch.float64).to(flat)
    labels = [torch.searchsorted(model.logits(part).softmax(-1).cumsum(-1), draw)
              for part, draw in zip(flat.split(rows), draws.split(rows), strict=True)]
    return torch.cat(labels).clamp(max=model.config.vocab_size - 1).view(x.shape[:2])


DAMPING = 1e-3  # of G = E[dL/dy dL/dy^T]: this much of its mean diagonal is added to it


def fisher_directions(U: Tensor, fisher: Fisher, damping: float = DAMPING) -> tuple[Tensor, Tensor, Tensor]:
    """The directions of W that matter to the loss independently -> (s (R,), descending; A (R, R); B (R, R)), B A = 1.

    To keep the first k is to take U A[:, :k] and B[:k] V: of all products of rank k, the one whose change dW has the
    least E[(dL/dy^T dW x)^2], for independent x and dL/dy. Each direction i that it drops costs about s_i^2 / 2. With
    D + damping g U^T U for D, which damps G = E[dL/dy dL/dy^T] by damping g 1, s are the singular values of D^1/2 H^1/2
    and L its left vectors; A = D^-1/2 L and B = L^T D^1/2. H is never inverted, and how W is split does not matter.
    """
    U = U.double()
    values, Q = torch.linalg.eigh(fisher.D + damping * fisher.g * U.mT @ U)
    positive = values > values[-1] * torch.finfo(values.dtype).eps * len(values)
    roots = torch.where(positive, values, 1.0).sqrt()
    root, inverse = (Q * (roots * positive)) @ Q.mT, (Q * (positive / roots)) @ Q.mT
    squares, L = torch.linalg.eigh(root @ fisher.H @ root)
    return squares.flip(0).clamp(min=0).sqrt(), inverse @ L.flip(1), L.flip(1).mT @ root


def plain_directions(U: Tensor, V: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """fisher_directions for white x and dL/dy: s are the singular values of W, and a cut is its truncated SVD."""
    U, V = U.double(), V.double()
    return fisher_directions(U, Fisher(V @ V.mT, U.mT @ U, 0.0))


def cut_factors(U: Tensor, V: Tensor, A: Tensor, B: Tensor, generator: torch.Generator) -> tuple:
    """U A and B V, for A (r, k) and B (k, r) with B A = 1, balanced -> what v10.resize_factors gives: U' (m, k),
    V' (k, n), the maps A' and B' with U' = U A' and V' = B' V, which transport the moments, and k.

    If fewer than k directions are left in W, its plain truncated SVD is taken, and the others are grown afresh.
    """
    cut_U, cut_V = U.double() @ A, B @ V.double()
    P, S, Qt = v10.product_svd(cut_U, cut_V)
    if not S[-1] > 1e-9 * S[0]:
        return v10.resize_factors(U, V, len(S), generator)
    new_U, new_V, balance_A, balance_B = v10.balanced_factors(cut_U, cut_V, P, S, Qt)
    return *(matrix.to(U.dtype) for matrix in (new_U, new_V, A @ balance_A, balance_B @ B)), len(S)


# ---- The budget ------------------------------------------------------------------------------------------------------

def size(ranks: list[int], sides: list[int]) -> int:
    """The parameters of layers of these ranks, of m + n = their side."""
    return sum(rank * side for rank, side in zip(ranks, sides, strict=True))


def spend(budget: float, sides: list[int], scores: list[list[float]], min_rank: int) -> list[int]:
    """Ranks for a budget of parameters: each layer, of m + n = its side, gets min_rank; then directions are given out,
    those of the highest score per parameter first, as long as they fit. `scores` are each layer's, descending; no layer
    gets more directions than it has. Raises UserError if min_rank alone exceeds the budget."""
    ranks = [min(min_rank, len(of_layer)) for of_layer in scores]
    left = budget - size(ranks, sides)
    if left < 0:
        raise v10.UserError(f"--rank-budget allows {budget:,.0f} parameters in the linear layers, and --min-rank "
                            f"{min_rank} needs {budget - left:,.0f}")
    offers = sorted((-score / side, i) for i, (side, of_layer) in enumerate(zip(sides, scores, strict=True))
                    for score in of_layer[ranks[i]:])
    for _, i in offers:
        if sides[i] > left:
            break
        ranks[i] += 1
        left -= sides[i]
    return ranks


def in_proportion(budget: float, sides: list[int], numbers: list[float], present: list[int],
                  min_rank: int) -> list[int]:
    """Ranks in proportion to a number for each layer, between min_rank and the present rank, as large as the budget
    allows."""
    def ranks(scale):
        return [min(max(int(scale * number), min_rank), rank) for number, rank in zip(numbers, present, strict=True)]

    if budget >= size(present, sides):
        return present
    low, high = 0.0, max(present) / max(min(numbers), 1e-9)
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if size(ranks(middle), sides) <= budget else (low, middle)
    return ranks(low)


def gradient_groups(U_gradient: Tensor, similarity: float = 0.9) -> int:
    """How many groups of neurons (rows of dL/dU (m, r)) with similar gradients there are: each row joins the first
    group whose founder has a cosine of at least this to it, or founds one. The rule of the suite's first versions."""
    rows, groups = F.normalize(U_gradient.cpu().double(), dim=1), 0
    while len(rows):
        rows, groups = rows[1:][rows[1:] @ rows[0] < similarity], groups + 1
    return groups


# ---- The cuts --------------------------------------------------------------------------------------------------------

FISHER_TOKENS = 12_288  # training tokens that a cut is measured on


def cut_steps(args: argparse.Namespace) -> list[int]:
    """After which steps --cuts fall: evenly from --cut-from to --cut-to, both included; a single one at --cut-to. None
    falls after the last step, since nothing would recover from it."""
    total, first, last = args.epochs * args.steps_per_epoch, args.cut_from, args.cut_to
    shares = [last - (last - first) * i / max(args.cuts - 1, 1) for i in range(args.cuts)]
    return sorted({min(max(1, round(total * share)), max(1, total - 1)) for share in shares})


def budget_parameters(args: argparse.Namespace, shapes: list[tuple]) -> float:
    """The parameters that --rank-budget allows in layers of these shapes (m, n)."""
    return args.rank_budget * sum(m * n if args.rank_budget <= 1 else m + n for m, n in shapes)


def above_budget(run):
    return v10.count_parameters(*run.layers) > budget_parameters(run.args, [layer.shape for layer in run.layers])


def cut_due(run, step):
    """Is it time to cut? Also after the last cut if the model is above the budget: a --resume with fewer --epochs has
    left cuts out. With less than two steps to go there is no cut any more."""
    steps = cut_steps(run.args)
    return step in steps or bool(steps) and steps[-1] < step < run.total_steps and above_budget(run)


def plan_cut(run, step, fishers, groups):
    """Decide the next cut -> (its record for the log, {index of a layer: its new factors and the maps to them})."""
    args, layers, factors = run.args, run.layers, v10.finite_factors(run.layers)
    sides, ranks = [sum(layer.shape) for layer in layers], run.model.ranks()
    present = size(ranks, sides)
    final = budget_parameters(args, [layer.shape for layer in layers])
    left = max(1, sum(cut >= step for cut in cut_steps(args)))
    budget = max(present * (min(final, present) / present) ** (1 / left), final)  # each cut takes the same share
    by_fisher = [fisher_directions(U, fisher) for (U, _), fisher in zip(factors, fishers, strict=bool(fishers))]
    plain = [] if args.cut_metric == "fisher" and args.rank_signal not in ("stable", "energy") else [
        plain_directions(U, V) for U, V in factors]
    spectra = [s.tolist() for s, _, _ in (plain if args.rank_signal == "energy" else by_fisher or plain)]
    numbers = None
    if args.rank_signal == "uniform":
        numbers = [1] * len(sides)
    elif args.rank_signal == "gradient":
        numbers = groups
    elif args.rank_signal == "stable":
        numbers = [v10.stable_rank_of(s) for s, _, _ in plain]
    if numbers:
        new = in_proportion(budget, sides, numbers, ranks, args.min_rank)
    else:
        new = spend(budget, sides, [[s * s for s in of_layer] for of_layer in spectra], args.min_rank)
    record = {"step": step, "metric": args.cut_metric, "signal": args.rank_signal, "budget": budget,
              "singular_values": spectra, "numbers": numbers, "ranks_before": ranks, "ranks": new}
    directions = by_fisher if args.cut_metric == "fisher" else plain
    return record, {i: cut_factors(*factors[i], directions[i][1][:, :k], directions[i][2][:k], run.generators["rank"])
                    for i, k in enumerate(new) if k < ranks[i]}


def cut(run, step):
    """Cut the ranks, write the record -> how many layers were cut. First moments go through a cut exactly; AdamW's
    second moments follow v10's heuristic, which may be several times off here."""
    args, model = run.args, run.model
    val_tokens = run.corpus.val.to(run.device)
    val_loss_before, began = v10.evaluate(model, val_tokens, args.batch_size), v10.now(run.device)
    groups = [gradient_groups(layer.U.grad) for layer in run.layers] if args.rank_signal == "gradient" else []
    fishers = []
    if "fisher" in (args.rank_signal, args.cut_metric):
        windows, _ = v10.sample_batch(run.corpus.train, max(1, FISHER_TOKENS // args.block_size), args.block_size,
                                      seeded(args.seed, step))
        fishers = measure_fisher(model, windows.to(run.device).split(max(1, 2048 // args.block_size)), args.seed + step)
    record, resized = v10.once(plan_cut, run, step, fishers, groups)
    v10.apply_resizes(run.layers, resized, run.optimizers)
    seconds = v10.now(run.device) - began
    v10.write_record(run.files.log, "cut", **record, val_loss_before=val_loss_before,
                     val_loss=v10.evaluate(model, val_tokens, args.batch_size), cut_sec=seconds)
    return len(resized)


# ---- The variant -----------------------------------------------------------------------------------------------------

def add_optimizer_flags(parser, choices, default):
    """The flags of make_optimizers, for models whose linear layers are factored, or dense."""
    flag = parser.add_argument_group("steps of the linear layers").add_argument
    flag("--optimizer", choices=choices, default=default,
         help="of the linear layers' weights; all others are AdamW's, with --lr and --weight-decay")
    flag("--eta", type=v10.POSITIVE, help="rate of the linear layers' weights, with --lr's schedule; by default 0.07 "
         "with spectron, 0.02 with muon, --lr with adamw")
    flag("--momentum", type=v10.FRACTION, default=0.95, help="of spectron and muon")
    flag("--nesterov", action=argparse.BooleanOptionalAction, default=True,
         help="orthogonalise the mean of momentum and gradient instead of the momentum")
    flag("--factor-decay", type=v10.number(float, least=0), default=0.0, help="weight decay of spectron and muon; "
         "v11 fits it, and --weight-decay, to the number of steps")


def add_cut_flags(parser):
    """The flags of the cuts."""
    flag = parser.add_argument_group("cuts of the ranks, under one budget").add_argument
    flag("--cuts", type=v10.number(int, least=0, below=1000), default=6,
         help="how many; 0: ranks stay as they start")
    flag("--rank-budget", type=v10.POSITIVE, default=0.1, help="what is left in the end: up to 1 the share of a dense "
         "model's linear parameters, above 1 the mean rank, weighted by m + n")
    flag("--cut-from", type=v10.FRACTION, default=0.2, help="when the first cut falls, as a share of the run")
    flag("--cut-to", type=v10.FRACTION, default=0.65, help="when the last one falls")
    flag("--rank-signal", choices=("fisher", "uniform", "stable", "energy", "gradient"), default="fisher",
         help="what decides how many ranks a layer gets")
    flag("--cut-metric", choices=("fisher", "plain"), default="fisher",
         help="what decides which directions go: how much they matter to the loss, or their singular values")


def complete_eta(args):
    """The default of --eta. Raises UserError for a decay of spectron and muon beside --optimizer adamw."""
    if args.optimizer == "adamw" and args.factor_decay:
        raise v10.UserError("--factor-decay is that of spectron and muon; with --optimizer adamw all weights have "
                            "--weight-decay")
    args.eta = args.eta or {"spectron": 0.07, "muon": 0.02}.get(args.optimizer)


class LowRankSpectron(v10.Variant):
    name = "v11_transformer_lowrank_spectron.py"
    log_file = "logs/v11.jsonl"
    description = "Trains a GPT of low rank with controlled steps."
    defaults = {"lr": 1e-3, "lr_schedule": "cosine", "warmup_steps": None, "dropout": 0.1, "tie_embeddings": True,
                "fixed_rank": True, "optimizer_on_resize": "transport", "min_rank": 4, "weight_decay": None,
                "factor_decay": None, "init_rank": None}

    def add_flags(self, parser):
        super().add_flags(parser)
        add_cut_flags(parser)
        add_optimizer_flags(parser, ("spectron", "muon", "adamw"), "spectron")
        parser.add_argument("--decay-on", choices=("factors", "product"), default="product",
                            help="what --factor-decay shrinks")

    def complete(self, args):
        complete_eta(args)
        if args.init_rank is None and not args.ranks_from:
            args.init_rank = max(1, min(args.d_model, args.d_ff) // 2)  # cut, it ends lower than a quarter (RESULTS.md)
        if not args.cuts:
            return
        if args.optimizer_on_resize == "reinit":
            raise v10.UserError("cuts carry the optimizers' state: --optimizer-on-resize reinit needs --cuts 0")
        if not args.fixed_rank:
            raise v10.UserError("--cuts and --no-fixed-rank exclude each other: --cuts 0 leaves the ranks to v10's "
                                "controller")
        if args.cuts > 1 and args.cut_to < args.cut_from:
            raise v10.UserError(f"--cut-to {args.cut_to} is before --cut-from {args.cut_from}")
        C, D = args.d_model, args.d_ff
        shapes = [*4 * [(C, C)], (D, C), (C, D)] * (1 if args.share_layers else args.n_layers)
        budget, sides = budget_parameters(args, shapes), list(map(sum, shapes))
        spend(budget, sides, [range(args.min_rank)] * len(shapes), args.min_rank)  # is --min-rank too much?
        if not args.ranks_from and not args.init_from and size([args.init_rank] * len(sides), sides) <= budget:
            v10.say(f"*** --init-rank {args.init_rank} is within --rank-budget {args.rank_budget:g} already: nothing "
                    "will be cut")

    def rank_update_due(self, run, step):
        return super().rank_update_due(run, step) or cut_due(run, step)

    def update_ranks(self, run, step):
        update, resized = run.state.part.update, 0
        if super().rank_update_due(run, step):
            update, resized = super().update_ranks(run, step)
        return update, resized + (cut(run, step) if cut_due(run, step) else 0)

    def left_undone(self, run):
        return "the linear layers are above --rank-budget" if run.args.cuts and above_budget(run) else None

    def linear(self, n, m, rank):
        layer = super().linear(n, m, rank)
        set_spectral(layer, nn.Linear(n, m, bias=False).weight)
        return layer

    def make_optimizers(self, model, args):
        return make_optimizers(model, args)


def set_spectral(layer, W):
    """Make U V the best approximation of W (m, n) at the layer's rank, its singular values evenly split (spectral
    initialisation: Khodak et al., 2021, and Spectron's code)."""
    layer.set_factors(*v10.dense_factors(W.detach(), layer.rank))


def main(argv=None):
    return v10.main(argv, LowRankSpectron())


if __name__ == "__main__":
    v10.leave(main())
