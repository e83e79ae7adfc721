"""compress.py makes a trained model small, and says what that costs.

    python3 compress.py fit logs/v7.best.pt --loss +5%        the smallest model within 5% of the perplexity
    python3 compress.py cut logs/v7.best.pt --keep 0.25       a quarter of the parameters
    python3 compress.py compare logs/v7.best.pt               every metric at several budgets
    python3 compress.py tune logs/v7.best.cut.pt              train what is left, beside the model it was cut from
    python3 compress.py spectrum logs/v7.best.pt              how low the ranks of its matrices are

A matrix W (m, n) becomes U V of rank k where that is smaller: in the linear layers, the embedding and the head, all
under one budget. What a cut loses is measured in one of three metrics, and each has a best U V of rank k:

    plain     |W - W'|                     the matrix itself: the truncated SVD
    inputs    |(W - W') C^1/2|             the layer's outputs, for C = E[x x^T] over a text
    fisher    |G^1/2 (W - W') C^1/2|       the loss, to second order: G = E[g g^T] of the gradients g at the outputs

fisher is v11's cut, with the same code, on whole matrices instead of factors. The embedding's inputs are the words, by
frequency. The head's inputs are centred, and the mean error goes into its bias; its G is diagonal, p (1 - p) for each
word; the mean row is subtracted first, since adding one number to all logits changes nothing. A tied matrix serves as
embedding and as head: its metric is the product a (x) B, over words and channels, that is nearest to the sum of both.

The metrics say which directions go, not what the model loses with all cuts together: that is measured, on text that was
neither trained on nor calibrated with, and printed beside what the Fisher metric predicts. C and G come from training
text, 16,384 tokens by default.

Shapes: W (m, n), U (m, R), V (R, n), tokens (B, T).
"""
import argparse
import json
import math
import struct
import sys
from dataclasses import dataclass
from functools import reduce
from pathlib import Path
from statistics import stdev
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent))  # PYTHONSAFEPATH leaves it out

import v10_transformer_lowrank_scaled as v10  # noqa: E402
import v11_transformer_lowrank_spectron as v11  # noqa: E402
from v10_transformer_lowrank_scaled import UserError  # noqa: E402

METRICS = ("plain", "inputs", "fisher")

# ---- What a model does on a text, as far as the metrics need it ------------------------------------------------------


class Measured(NamedTuple):
    """Second moments over calibration tokens."""

    layers: list  # v11.Fisher of each linear layer, for its factors()
    words: Tensor  # (V,), how often each is an input
    embedding_G: Tensor  # (C, C), of the gradients at the embedding's output
    mean: Tensor  # (C,), of the head's inputs
    covariance: Tensor  # (C, C), of the head's inputs
    p: Tensor  # (V,), E[p (1 - p)] of the predictions: the diagonal of the head's G


def measure(model: v10.GPT, tokens: Tensor, seed: int) -> Measured:
    """Run a model over calibration tokens (N,), forward and backward, with labels drawn from its own predictions."""
    config, T = model.config, model.config.block_size
    n = max(1, len(tokens) // T) * T
    batches = list(tokens[:n].view(-1, min(T, n)).split(max(1, 2048 // T)))
    C, words = config.d_model, config.vocab_size
    count, p = (torch.zeros(words, dtype=torch.float64) for _ in range(2))
    G, second, mean = (torch.zeros(*shape, dtype=torch.float64) for shape in ((C, C), (C, C), (C,)))
    rows, dtype = max(1, v10.LOGITS_BYTES // (8 * words)), model.norm.weight.dtype

    def embedded(_, inputs, y):
        count.add_(torch.bincount(inputs[0].flatten().cpu(), minlength=words))

        def backward(gradient):
            g = gradient.flatten(0, -2).to(dtype)
            G.add_((g.mT @ g).cpu())
        y.register_hook(backward)

    @torch.no_grad()
    def normed(_, inputs, x):
        flat = x.detach().flatten(0, -2).to(dtype)
        mean.add_(flat.sum(0).cpu())
        second.add_((flat.mT @ flat).cpu())
        for part in flat.split(rows):
            q = model.logits(part).softmax(-1)
            p.add_((q * (1 - q)).sum(0).cpu())

    hooks = [model.token_embedding.register_forward_hook(embedded), model.norm.register_forward_hook(normed)]
    try:
        layers = v11.measure_fisher(model, batches, seed)
    finally:
        for hook in hooks:
            hook.remove()
    mean /= n
    return Measured(layers, count / n, G / n, mean, second / n - mean[:, None] * mean, p / n)


def nearest_kronecker(terms: list) -> tuple[Tensor, Tensor]:
    """[(a_i (V,), B_i (C, C))] -> the a and B whose a (x) B is nearest to the sum of all a_i (x) B_i (Van Loan and
    Pitsianis, 1993)."""
    a, B = torch.stack([a for a, _ in terms], 1), torch.stack([B.flatten() for _, B in terms], 1)
    P, S, Qt = v10.product_svd(a, B.mT)
    sign = 1.0 if P[:, 0].sum() >= 0 else -1.0
    return (sign * P[:, 0]).clamp(min=0), (sign * S[0] * Qt[0]).view_as(terms[0][1])


# ---- A matrix, and what can be done with it --------------------------------------------------------------------------

@dataclass
class Matrix:
    """A matrix W = U V of a model (an embedding transposed, so that words are its columns), in a metric."""

    name: str  # such as 0.q
    kind: str  # linear, embedding, head or tied
    U: Tensor  # (m, R) in float64, of a dense matrix W or 1
    V: Tensor  # (R, n)
    whole: bool  # dense, not factored
    fisher: v11.Fisher | None  # its metric, None for plain
    damping: float
    shift: Tensor | None = None  # (C,), the head's mean input, whose error goes into the bias

    def __post_init__(self):
        (m, r), n = self.U.shape, self.V.shape[1]
        self.side, self.dense = m + n, m * n
        self.now = m * n if self.whole else r * self.side  # parameters
        self.limit = (self.dense - 1) // self.side if self.whole else r - 1  # the highest rank that makes it smaller
        directions = (v11.plain_directions(self.U, self.V) if self.fisher is None else
                      v11.fisher_directions(self.U, self.fisher, self.damping))
        s, self.A, self.B = directions
        self.squares = s.square()
        self.tails = [*self.squares.flip(0).cumsum(0).flip(0).tolist(), 0.0]  # tails[k]: what rank k drops

    def options(self) -> list[tuple[int | None, int, float]]:
        """[(rank, parameters, squared error)] for each rank that makes it smaller, and at last None, as it is."""
        return [(k, k * self.side, self.tails[k]) for k in range(1, self.limit + 1)] + [(None, self.now, 0.0)]

    def factors(self, k: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """The best U' V' of rank k in its metric."""
        new_U, new_V, *_ = v11.cut_factors(self.U, self.V, self.A[:, :k], self.B[:k], generator)
        return new_U, new_V


def matrices(model: v10.GPT, metric: str, measured: Measured | None, only: str = "all",
             damping: float = v11.DAMPING) -> list[Matrix]:
    """The matrices that may be cut: those of the linear layers, of the ends (embedding and head), or all."""
    found = []
    damping = damping if metric == "fisher" else 0.0

    def add(name, kind, U, V, whole, H, D, g, shift=None):
        fisher = None if metric == "plain" else v11.Fisher(H(V), D(U) if metric == "fisher" else U.mT @ U, g)
        found.append(Matrix(name, kind, U, V, whole, fisher, damping, None if metric == "plain" else shift))

    if only != "ends":
        for i, (name, layer) in enumerate(model.linears().items()):
            U, V = (factor.double() for factor in layer.factors())
            moments = measured.layers[i] if measured else None
            add(name, "linear", U, V, layer.rank is None, lambda V, m=moments: m.H, lambda U, m=moments: m.D,
                moments.g if measured else 0.0)
    if only == "linear":
        return found
    e, h, m = model.token_embedding, model.head, measured
    whole, one = not hasattr(e, "U"), torch.eye(model.config.d_model, dtype=torch.float64)
    E = (one, e.weight.detach().cpu().double().mT) if whole else tuple(
        factor.detach().cpu().double().mT for factor in (e.V, e.U))  # (C, R), (R, V)
    if model.config.tie_embeddings:
        a, B = None, one
        if m:
            uses = [(m.words, m.embedding_G), (m.p, m.covariance)]
            if metric == "inputs":  # each use with the mean of the other side
                uses = [(m.words, m.embedding_G.trace() / len(one) * one), (m.p.mean().expand_as(m.p), m.covariance)]
            a, B = nearest_kronecker(uses)
        add("embedding and head", "tied", *E, whole, lambda V: V * a @ V.mT, lambda U: U.mT @ B @ U,
            B.trace().item() / len(B), m and m.mean)
        return found
    add("embedding", "embedding", *E, whole, lambda V: V * m.words @ V.mT, lambda U: U.mT @ m.embedding_G @ U,
        m.embedding_G.trace().item() / len(one) if m else 0.0)
    whole = not hasattr(h, "U")
    U, V = (h.weight.detach().cpu().double(), one) if whole else (h.U.detach().cpu().double(),
                                                                  h.V.detach().cpu().double())
    if metric == "fisher":
        U = U - (m.p @ U) / m.p.sum()
    add("head", "head", U, V, whole, lambda V: V @ m.covariance @ V.mT, lambda U: (U.mT * m.p) @ U,
        m.p.mean().item() if m else 0.0, m and m.mean)
    return found


# ---- How many ranks each matrix gets ---------------------------------------------------------------------------------

def allocate(found: list[Matrix], budget: float) -> tuple[list[int | None], float]:
    """Ranks, None for a matrix that stays, of the smallest summed squared error within a budget of parameters ->
    (ranks, how far the sum may be above the smallest possible one). Exact by dynamic programming if that is small; else
    by a price per parameter, and what is left of the budget is filled. Raises UserError if rank 1 is too much."""
    options = [matrix.options() for matrix in found]
    costs = [np.array([cost for _, cost, _ in of_matrix]) for of_matrix in options]
    errors = [np.array([error for *_, error in of_matrix]) for of_matrix in options]
    least = sum(int(cost.min()) for cost in costs)
    if budget < least:
        raise UserError(f"the budget of {budget:,.0f} parameters is below {least:,}, which rank 1 needs in all "
                        f"{len(found)} matrices")
    unit = reduce(math.gcd, (int(cost) for of_matrix in costs for cost in of_matrix))
    cells = int(min(budget, sum(int(cost.max()) for cost in costs)) // unit)
    if cells * sum(map(len, options)) <= 2e8 and cells * len(options) <= 5e7:
        picks, gap = exact_allocation([cost // unit for cost in costs], errors, cells), 0.0
    else:
        picks, gap = priced_allocation(costs, errors, budget)
    return [of_matrix[pick][0] for of_matrix, pick in zip(options, picks, strict=True)], gap


def exact_allocation(costs: list, errors: list, cells: int) -> list[int]:
    """The options, one of each list, of the smallest summed error whose costs add up to at most `cells`."""
    best, choices = np.zeros(cells + 1), []
    for cost, error in zip(costs, errors, strict=True):
        new, choice = np.full(cells + 1, np.inf), np.zeros(cells + 1, dtype=np.int32)
        for i, (c, e) in enumerate(zip(cost, error, strict=True)):
            if c > cells:
                continue
            total = best[:cells + 1 - c] + e
            better = total < new[c:]
            new[c:][better], choice[c:][better] = total[better], i
        best = new
        choices.append(choice)
    picks, left = [], cells
    for cost, choice in zip(reversed(costs), reversed(choices), strict=True):
        picks.append(int(choice[left]))
        left -= int(cost[picks[-1]])
    return picks[::-1]


def priced_allocation(costs: list, errors: list, budget: float) -> tuple[list[int], float]:
    """As exact_allocation, with a price per parameter under which each list picks for itself -> (options, an upper
    bound of how far their summed error is above the smallest possible)."""
    def picks_at(price):
        return [int(np.argmin(error + price * cost)) for cost, error in zip(costs, errors, strict=True)]

    def total(values, picks):
        return float(sum(of_list[pick] for of_list, pick in zip(values, picks, strict=True)))
    low, high = 0.0, 1.0
    while total(costs, picks_at(high)) > budget:
        high *= 2
    bound = -math.inf
    for _ in range(100):
        price = (low + high) / 2
        picks = picks_at(price)
        bound = max(bound, total(errors, picks) + price * (total(costs, picks) - budget))  # of the dual problem
        low, high = (price, high) if total(costs, picks) > budget else (low, price)
    picks = picks_at(high)
    while True:  # fill what is left, the best improvement per parameter first
        left, best = budget - total(costs, picks), (0.0, None, None)
        for i, (cost, error) in enumerate(zip(costs, errors, strict=True)):
            more, gain = cost - cost[picks[i]], error[picks[i]] - error
            worth = np.where((more <= left) & (gain > 0), gain / np.maximum(more, 1e-9), 0.0)
            j = int(worth.argmax())
            best = max(best, (float(worth[j]), i, j), key=lambda offer: offer[0])
        if best[1] is None:
            return picks, max(0.0, total(errors, picks) - bound)
        picks[best[1]] = best[2]


def uniform_ranks(found: list[Matrix], share: float) -> list[int | None]:
    """Each matrix keeps this share of its parameters, or of its rank if it is factored."""
    wanted = [max(1, int(share * matrix.now / matrix.side + 1e-9)) for matrix in found]
    return [k if k <= matrix.limit else None for k, matrix in zip(wanted, found, strict=True)]


def energy_ranks(found: list[Matrix], share: float) -> list[int | None]:
    """Each matrix keeps the fewest directions that hold this share of its sum of s_i^2."""
    wanted = [next(k for k in range(1, len(matrix.tails)) if matrix.tails[k] <= (1 - share) * matrix.tails[0])
              for matrix in found]
    return [k if k <= matrix.limit else None for k, matrix in zip(wanted, found, strict=True)]


def kept(found: list[Matrix], ranks: list[int | None]) -> int:
    """The parameters of matrices at these ranks."""
    return sum(matrix.now if k is None else k * matrix.side for matrix, k in zip(found, ranks, strict=True))


def ranks_within(found: list[Matrix], budget: float, how: str) -> tuple[list[int | None], float]:
    """Ranks within a budget of parameters: `global`, one budget for all (see allocate); `uniform` and `energy`, one
    share for all, as high as the budget allows -> (ranks, the gap of allocate)."""
    if how == "global":
        return allocate(found, budget)
    rule = {"uniform": uniform_ranks, "energy": energy_ranks}[how]
    low, high = 0.0, 1.0
    if kept(found, rule(found, high)) <= budget:
        return rule(found, high), 0.0
    if kept(found, rule(found, low)) > budget:
        raise UserError(f"the budget of {budget:,.0f} parameters is below what rank 1 needs in all {len(found)} "
                        "matrices")
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if kept(found, rule(found, middle)) <= budget else (low, middle)
    return rule(found, low), 0.0


# ---- The cut model ---------------------------------------------------------------------------------------------------

def cut_model(content: dict, model: v10.GPT, found: list[Matrix], ranks: list[int | None], dense: bool = False,
              seed: int = 0) -> dict:
    """A checkpoint's content with these matrices at these ranks; with `dense` multiplied out again."""
    generator, state = torch.Generator().manual_seed(seed), dict(model.state_dict())
    layers, ends, dtype = model.linears(), model.end_ranks(), model.norm.weight.dtype
    layer_ranks = dict(zip(layers, [layer.rank for layer in layers.values()], strict=True))

    def put(path, parts):
        for name in ("weight", "U", "V"):
            state.pop(f"{path}.{name}", None)
        state.update({f"{path}.{name}": value.to(dtype).contiguous() for name, value in parts.items()})

    for matrix, k in zip(found, ranks, strict=True):
        if k is None:
            continue
        U, V = matrix.factors(k, generator)
        parts = {"weight": U @ V} if dense else {"U": U, "V": V}
        if matrix.kind == "linear":
            for path, module in model.named_modules(remove_duplicate=False):  # a shared layer has several
                if module is layers[matrix.name]:
                    put(path, parts)
            layer_ranks[matrix.name] = None if dense else k
            continue
        rank = None if dense else k
        if matrix.kind != "head":
            put("token_embedding", {"weight": (U @ V).mT} if dense else {"U": V.mT, "V": U.mT})
            ends[0] = rank
        if matrix.kind == "tied":
            put("head", {"weight": (U @ V).mT} if dense else {"U": V.mT, "V": U.mT})
            ends[1] = rank
        if matrix.kind == "head":
            put("head", parts)
            ends[1] = rank
        if matrix.shift is not None and matrix.kind != "embedding":
            before, after = ((U, V) if matrix.kind == "head" else (V.mT, U.mT) for U, V in (
                (matrix.U, matrix.V), (U, V)))
            error = before[0] @ (before[1] @ matrix.shift) - after[0] @ (after[1] @ matrix.shift)
            state["head.bias"] = (state["head.bias"].double() + error).to(dtype)
    return content | {"ranks": list(layer_ranks.values()), "end_ranks": ends, "model": state}


# ---- Losses ----------------------------------------------------------------------------------------------------------

def block_losses(model: v10.GPT, tokens: Tensor) -> list[tuple[float, int]]:
    """The loss of each block of tokens (N,), as v10.evaluate cuts them -> [(mean loss, tokens)]."""
    T, words = model.config.block_size, model.config.vocab_size
    full = (len(tokens) - 1) // T * T
    x, y = tokens[:full].view(-1, T), tokens[1:full + 1].view(-1, T)
    batches = [*zip(x.split(max(1, v10.LOGITS_BYTES // (8 * T * words))),
                    y.split(max(1, v10.LOGITS_BYTES // (8 * T * words))), strict=True)]
    if full < len(tokens) - 1:
        batches.append((tokens[None, full:-1], tokens[None, full + 1:]))
    found = []
    with v10.evaluation_mode(model):
        for inputs, targets in batches:
            losses = F.cross_entropy(model(inputs).mT, targets, reduction="none")  # (B, T)
            found += [(loss, targets.shape[1]) for loss in losses.mean(1).tolist()]
    return found


def mean_loss(blocks):
    return sum(loss * n for loss, n in blocks) / sum(n for _, n in blocks)


def paired_error(blocks, others):
    """The standard error of the difference of two models' losses, over the blocks of one text; None for one block."""
    differences = [a - b for (a, _), (b, _) in zip(blocks, others, strict=True)]
    return stdev(differences) / len(differences) ** 0.5 if len(differences) > 1 else None


# ---- Cutting, measuring, telling -------------------------------------------------------------------------------------

class Text(NamedTuple):
    """A model's text: what metrics are measured on, and the two halves of what it has not been trained on."""

    name: str
    train: Tensor  # (N,)
    calibration: Tensor  # (N,)
    source: str  # of the calibration tokens, in words
    decide: Tensor  # what `fit` decides on
    report: Tensor  # what everything is reported on


def read_text(args: argparse.Namespace, content: dict) -> Text:
    """The checkpoint's text, found again. Raises UserError if it is not there, or another one."""
    T, noted, vocabulary = content["config"]["block_size"], content.get("text", {}), content["vocabulary"]
    name = args.data_file or noted.get("data_file")
    if not name:
        raise UserError(f"{args.checkpoint} does not say which text it was trained on: --data-file TEXT names it, "
                        "--val-fraction and --min-count how it was read")
    given = {key: getattr(args, key) or noted.get(key) or default for key, default in (("val_fraction", 0.01),
                                                                                       ("min_count", 1))}
    path = v10.find_data(name)
    corpus = v10.load_corpus(path, given["val_fraction"], T, content["config"]["tokenize"], given["min_count"])
    if corpus.vocabulary != vocabulary:
        raise UserError(f"{path} has another vocabulary than {args.checkpoint}: {len(corpus.vocabulary):,} words, not "
                        f"{len(vocabulary):,}; --data-file, --val-fraction and --min-count have to be those of its run")
    half = len(corpus.val) // 2 // T * T or len(corpus.val) // 2
    if args.command == "tune":
        calibration, source = corpus.train[:T], ""
    elif args.calibration:
        calibration = v10.encode(v10.read_words(Path(args.calibration), content["config"]["tokenize"])[0], vocabulary)
        source = Path(args.calibration).name
        if torch.equal(calibration, corpus.val) or Path(args.calibration).resolve() == path.resolve():
            v10.say(f"*** {source} holds the text that is reported on: the losses below are too good")
    else:
        windows, _ = v10.sample_batch(corpus.train, max(1, args.tokens // T), T, v11.seeded(args.seed, 0))
        calibration, source = windows.flatten(), f"training tokens of {path.name}"
    calibration = calibration[:getattr(args, "tokens", T) // T * T or T]
    if len(calibration) < T:
        raise UserError(f"{source} gives {len(calibration):,} calibration tokens, and a block needs {T:,}")
    return Text(path.name, corpus.train, calibration, source, corpus.val[:half + 1], corpus.val[half:])


class Job:
    """A checkpoint that is being made smaller."""

    def __init__(self, args):
        self.args, self.content = args, v10.load(Path(args.checkpoint))
        self.model = v10.build_model(self.content).eval()
        self.text = read_text(args, self.content)
        if self.content["config"]["attention"] == "bidirectional":
            v10.say("*** NO CAUSAL MASK: THE MODEL SEES ITS TARGETS. Its losses are not those of a language model.")
        self.before = block_losses(self.model, self.text.report)
        self.measured, self.found = None, {}
        if not math.isfinite(mean_loss(self.before)):
            raise UserError(f"{args.checkpoint} has a loss that is not finite")

    def matrices(self, metric: str) -> list[Matrix]:
        """Those that --only names, in a metric."""
        if metric not in self.found:
            if metric != "plain" and self.measured is None:
                self.measured = measure(self.model, self.text.calibration, self.args.seed)
            self.found[metric] = matrices(self.model, metric, self.measured, self.args.only)
        return self.found[metric]

    def budget(self, keep: float) -> float:
        """The parameters that this share of what --only names is."""
        return keep * sum(matrix.now for matrix in self.matrices("plain"))

    def cut(self, metric, ranks, dense=False):
        """-> (the cut checkpoint's content, its model)."""
        content = cut_model(self.content, self.model, self.matrices(metric), ranks, dense, self.args.seed)
        return content, v10.build_model(content).eval()

    def losses(self, metric, ranks, tokens):
        return block_losses(self.cut(metric, ranks)[1], tokens)


def sizes(model: v10.GPT) -> dict:
    """Parameters: in all, in the linear layers, in embedding and head with its bias."""
    ends = v10.count_parameters(torch.nn.ModuleList([model.token_embedding, model.head]))
    return {"all": v10.count_parameters(model), "linear": v10.count_parameters(*model.linears().values()), "ends": ends}


def report(job: Job, ranks: list[int | None], gap: float, command: str) -> dict:
    """Cut, save, print what became smaller and what it costs, write the record -> the record."""
    args, found = job.args, job.matrices(job.args.metric)
    content, model = job.cut(args.metric, ranks, args.dense)
    after, before, size, new = block_losses(model, job.text.report), job.before, sizes(job.model), sizes(model)
    increase, error = mean_loss(after) - mean_loss(before), paired_error(after, before)
    if not math.isfinite(increase):
        raise v10.TrainingError("the cut model's loss is not finite")
    plain = None
    if args.metric != "plain":
        plain_ranks, _ = ranks_within(job.matrices("plain"), kept(found, ranks), "uniform")
        plain = mean_loss(job.losses("plain", plain_ranks, job.text.report)) - mean_loss(before)
    predicted = sum(matrix.tails[k] for matrix, k in zip(found, ranks, strict=True) if k) / 2
    stayed = [matrix.name for matrix, k in zip(found, ranks, strict=True) if k is None]
    v10.save(Path(args.out), content | {"cut_from": Path(args.checkpoint).name})
    rows = [("", "before", "after", "")]
    for name, label in (("all", "parameters"), ("linear", "  in linear layers"), ("ends", "  in embedding and head")):
        rows.append((label, f"{size[name]:,}", f"{new[name]:,}", f"{new[name] / size[name]:.1%} kept"))
    rows += [("bytes in float32", f"{4 * size['all']:,}", f"{4 * new['all']:,}", ""),
             ("loss", f"{mean_loss(before):.4f}", f"{mean_loss(after):.4f}", f"{increase:+.4f}" + (
                 f" \N{PLUS-MINUS SIGN} {error:.4f}" if error is not None else "")),
             ("perplexity", f"{v10.perplexity(mean_loss(before)):,.1f}", f"{v10.perplexity(mean_loss(after)):,.1f}",
              f"{math.expm1(increase):+.1%}")]
    if plain is not None:
        rows.append(("plain SVD of this size, uniform", "", f"{mean_loss(before) + plain:.4f}", f"{plain:+.4f}"))
    if args.metric == "fisher":
        rows.append(("predicted by the metric", "", "", f"{predicted:+.4f}"))
    v10.say("\n".join(f"{label:32}{a:>16}{b:>16}  {note}".rstrip() for label, a, b, note in rows))
    calibrated = f"; calibrated with {len(job.text.calibration):,} {job.text.source}" if job.measured else ""
    tokens = sum(n for _, n in before)
    v10.say(f"measured on {tokens:,} held-out tokens of {job.text.name}, the second half{calibrated}")
    if stayed:
        v10.say(f"not cut: {', '.join(stayed)}")
    if gap > 0:
        v10.say(f"the allocation may be {gap / 2:.2g} above the best one, of {predicted:.2g}")
    v10.say(f"the cut model: {args.out}")
    record = {"command": command, "checkpoint": Path(args.checkpoint).name, "metric": args.metric,
              "allocate": args.allocate, "only": args.only, "seed": args.seed, "tokens": len(job.text.calibration),
              "calibration": job.text.source, "data_file": job.text.name, "report_tokens": tokens, "before": size,
              "after": new, "loss_before": mean_loss(before), "loss": mean_loss(after),
              "loss_error": error, "plain_increase": plain, "predicted": predicted, "gap": gap,
              "ranks": {matrix.name: k for matrix, k in zip(found, ranks, strict=True)},
              "shapes": {matrix.name: [len(matrix.U), matrix.V.shape[1]] for matrix in found}}
    v10.write_record(Path(args.log_file), "compress", **record)
    return record


# ---- The commands ----------------------------------------------------------------------------------------------------

def cut(args):
    """Cut to a size."""
    job = Job(args)
    found, gap = job.matrices(args.metric), 0.0
    if args.rank:
        ranks = [args.rank if args.rank <= matrix.limit else None for matrix in found]
    elif args.energy:
        ranks = energy_ranks(found, args.energy)
    else:
        total = sum(matrix.now for matrix in found)
        budget = job.budget(args.keep) if args.keep else args.params - (v10.count_parameters(job.model) - total)
        if budget >= total:
            raise UserError(f"{args.checkpoint} has {v10.count_parameters(job.model):,} parameters, within --params "
                            f"{args.params:,} already")
        ranks, gap = ranks_within(found, budget, args.allocate)
    if all(k is None for k in ranks):
        raise UserError("nothing becomes smaller: every matrix would need more parameters as factors")
    report(job, ranks, gap, "cut")


def fit(args):
    """The smallest model within a loss, by bisection on one half of the held-out text; reported on the other."""
    job = Job(args)
    found, start = job.matrices(args.metric), block_losses(job.model, job.text.decide)
    allowed = args.loss(mean_loss(start))
    tried = {}

    def within(keep):
        ranks, gap = ranks_within(found, job.budget(keep), args.allocate)
        tried[keep] = mean_loss(job.losses(args.metric, ranks, job.text.decide)) - mean_loss(start), ranks, gap
        return tried[keep][0] <= allowed

    low = 1.01 * sum(matrix.side for matrix in found) / job.budget(1.0)
    high, bar = 1.0, tqdm(total=args.evaluations, unit="cut", disable=None)
    for number in range(args.evaluations):
        keep = (low * high) ** 0.5 if number else low
        low, high = (low, keep) if within(keep) else (keep, high)
        bar.update()
        if high <= low:  # even the smallest is within
            break
    bar.close()
    good = [keep for keep, (increase, ranks, _) in tried.items() if increase <= allowed and any(ranks)]
    if not good:
        best = min(tried, key=lambda keep: tried[keep][0])
        raise UserError(f"no cut is within {allowed:+.4f} nats; the best of {len(tried)} loses {tried[best][0]:+.4f} "
                        f"and keeps {best:.1%}")
    _, ranks, gap = tried[min(good)]
    v10.say(f"decided on {sum(n for _, n in start):,} other held-out tokens, by {len(tried)} cuts: {min(good):.1%} of "
            f"what may be cut is kept, {tried[min(good)][0]:+.4f} nats of {allowed:+.4f}")
    report(job, ranks, gap, "fit")


SHARES = (0.75, 0.5, 0.25, 0.125, 0.0625)


def compare(args):
    """Every metric at five budgets, each with one share for every matrix and with one budget over all."""
    job = Job(args)
    columns, rows = [(metric, how) for metric in METRICS for how in ("uniform", "global")], []
    least = sum(min(matrix.side, matrix.now) for matrix in job.matrices("plain"))  # rank 1
    shares = [keep for keep in SHARES if job.budget(keep) >= least]
    if not shares:
        raise UserError(f"{args.checkpoint} is too small: rank 1 in all matrices is more than {SHARES[0]:.0%} of them")
    bar = tqdm(total=len(shares) * len(columns), unit="cut", disable=None)
    for keep in shares:
        row = {}
        for metric, how in columns:
            ranks, _ = ranks_within(job.matrices(metric), job.budget(keep), how)
            after = job.losses(metric, ranks, job.text.report)
            row[f"{metric}, {how}"] = {
                "increase": mean_loss(after) - mean_loss(job.before), "error": paired_error(after, job.before),
                "kept": kept(job.matrices(metric), ranks),
                "parameters": v10.count_parameters(job.model) - job.budget(1.0) + kept(job.matrices(metric), ranks)}
            bar.update()
        rows.append({"keep": keep, "cuts": row})
    bar.close()
    width = max(len(name) for name in rows[0]["cuts"]) + 2
    v10.say(f"loss {mean_loss(job.before):.4f}; with a cut, by so much higher:")
    v10.say(f"{'kept':8}" + "".join(f"{name:>{width}}" for name in rows[0]["cuts"]))
    for row in rows:
        v10.say(f"{row['keep']:<8.2%}" + "".join(f"{cell['increase']:>+{width}.4f}" for cell in row["cuts"].values()))
    v10.write_record(Path(args.log_file), "compress", command="compare", checkpoint=Path(args.checkpoint).name,
                     only=args.only, seed=args.seed, tokens=len(job.text.calibration), calibration=job.text.source,
                     data_file=job.text.name, report_tokens=sum(n for _, n in job.before), before=sizes(job.model),
                     loss_before=mean_loss(job.before), rows=rows)


class LoRA(torch.nn.Module):
    """A frozen layer, and beside it (alpha / r) x A^T B^T, for A (r, n) and B (m, r), which is zero at first (Hu et
    al., 2021, arXiv 2106.09685)."""

    def __init__(self, layer, rank, alpha):
        super().__init__()
        m, n = layer.shape
        self.layer, self.scale = layer, alpha / rank
        self.A, self.B = torch.nn.Parameter(torch.randn(rank, n) / n ** 0.5), torch.nn.Parameter(torch.zeros(m, rank))

    def forward(self, x):
        return self.layer(x) + self.scale * F.linear(F.linear(x, self.A), self.B)

    def merged(self):
        """A layer that computes the same: W + (alpha / r) B A, or factors of rank R + r."""
        B = self.scale * self.B.detach()
        if self.layer.rank is None:
            self.layer.weight.data += B @ self.A.detach()
        else:
            self.layer.set_factors(torch.cat([self.layer.U.detach(), B], 1),
                                   torch.cat([self.layer.V.detach(), self.A.detach()]))
        return self.layer


def replace_layers(model, new):
    """Put new(layer) in the place of each linear layer, the same one wherever blocks share it."""
    made = {}
    for block in model.blocks:
        for name, layer in [*block.named_children()]:
            if hasattr(layer, "factors") or isinstance(layer, LoRA):
                made[layer] = made.get(layer) or new(layer)
                setattr(block, name, made[layer])


def fine_tune(model: v10.GPT, kind: str, tokens: Tensor, args: argparse.Namespace) -> int:
    """Train some of a model's parameters for --steps on tokens (N,) -> how many they are. `factors`: those of all
    factored matrices; `lora`: additions of rank --lora-rank to the linear layers, merged at the end; `all`."""
    torch.manual_seed(args.seed)
    if kind == "lora":
        replace_layers(model, lambda layer: LoRA(layer, args.lora_rank, args.lora_alpha or 2 * args.lora_rank))
    for name, parameter in model.named_parameters():
        parameter.requires_grad = {"all": True, "factors": name.rpartition(".")[2] in "UV",
                                   "lora": name.rpartition(".")[2] in "AB"}[kind]
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if not trained:
        raise UserError("there are no factors to train: --train all or lora")
    optimizer = torch.optim.AdamW(trained, lr=args.lr, weight_decay=args.weight_decay)
    generator = torch.Generator().manual_seed(args.seed)
    model.train()
    for step in tqdm(range(args.steps), desc=kind, unit="step", disable=None):
        for group in optimizer.param_groups:
            group["lr"] = args.lr * 0.5 * (1 + math.cos(math.pi * step / args.steps))
        batch = v10.sample_batch(tokens, args.batch_size, model.config.block_size, generator)
        loss = model(*batch)
        if not math.isfinite(loss.item()):
            raise v10.TrainingError(f"the loss of step {step + 1} is not finite: try a smaller --lr")
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    if kind == "lora":
        replace_layers(model, LoRA.merged)
    model.eval().requires_grad_(True)
    return sum(parameter.numel() for parameter in trained)


def tune(args):
    """Fine-tune a cut model, and beside it all of the one that it was cut from, for as many steps."""
    content = v10.load(Path(args.checkpoint))
    uncut = Path(args.uncut or Path(args.checkpoint).parent / content.get("cut_from", ""))
    if not uncut.is_file():
        raise UserError(f"{args.checkpoint} is compared with the model that it was cut from: --uncut CKPT names it")
    whole, text, rows = v10.load(uncut), read_text(args, content), []
    if whole["vocabulary"] != content["vocabulary"]:
        raise UserError(f"{uncut} has another vocabulary than {args.checkpoint}")
    if args.on:
        tokens = v10.encode(v10.read_words(Path(args.on), content["config"]["tokenize"])[0], content["vocabulary"])
        T, part = content["config"]["block_size"], len(tokens) * 4 // 5
        if min(part, len(tokens) - part) <= T:
            raise UserError(f"{args.on} gives {len(tokens):,} tokens; a fifth of them, held out, should be more than "
                            f"a block of {T:,}")
        text = text._replace(name=Path(args.on).name, train=tokens[:part], report=tokens[part:])
    for name, of_model, kind in (("cut", content, args.train), ("uncut", whole, "all")):
        model = v10.build_model(of_model | {"config": of_model["config"] | {"dropout": args.dropout}}).eval()
        before = block_losses(model, text.report)
        trained = fine_tune(model, kind, text.train, args)
        after = block_losses(model, text.report)
        rows.append({"model": name, "train": kind, "parameters": v10.count_parameters(model), "trained": trained,
                     "loss_before": mean_loss(before), "loss": mean_loss(after)})
        if name == "cut":
            v10.save(Path(args.out), of_model | v10.model_content(model, content["vocabulary"]) | {
                "config": of_model["config"]})
    v10.say(f"{'':8}{'trained':>10}{'parameters':>14}{'of these':>14}{'loss before':>14}{'after':>10}")
    for row in rows:
        v10.say(f"{row['model']:8}{row['train']:>10}{row['parameters']:>14,}{row['trained']:>14,}"
                f"{row['loss_before']:>14.4f}{row['loss']:>10.4f}")
    v10.say(f"{args.steps} steps; measured on {sum(n for _, n in before):,} held-out tokens; the tuned model: "
            f"{args.out}")
    v10.write_record(Path(args.log_file), "compress", command="tune", checkpoint=Path(args.checkpoint).name,
                     steps=args.steps, lr=args.lr, seed=args.seed, data_file=text.name, lora_rank=args.lora_rank,
                     models=rows)


ENERGIES = (0.9, 0.95, 0.99, 0.999)


def spectrum(args):
    """The singular values of every matrix in a file: how many hold how much of the energy."""
    v10.say(f"{'matrix':40}{'shape':>16}{'stable rank':>13}" + "".join(f"{energy:>8.1%}" for energy in ENERGIES)
            + f"{'break-even':>12}")
    for path in map(Path, args.files):
        seen, found = 0, {}
        for name, U, V in read_matrices(path):
            if not all(torch.isfinite(factor).all() for factor in (U, V) if factor is not None):
                raise UserError(f"{path}: {name} holds a number that is not finite")
            S = torch.linalg.svdvals(U.float()) if V is None else v10.product_singular_values(U.float(), V.float())
            m, n = U.shape[0], (U if V is None else V).shape[1]
            energy, even = S.double().square().cumsum(0), (m * n - 1) // (m + n)
            ranks = [int((energy < share * energy[-1]).sum()) + 1 for share in ENERGIES] if energy[-1] > 0 else [0] * 4
            v10.say(f"{name[:39]:40}{f'{m} x {n}':>16}{v10.stable_rank_of(S):>13.1f}"
                    + "".join(f"{rank:>8}" for rank in ranks) + f"{even:>12}"
                    + ("" if ranks[1] <= even else "   95% needs more than the matrix"))
            found[name], seen = {"shape": [m, n], "stable_rank": v10.stable_rank_of(S), "ranks": ranks,
                                 "break_even": even, "singular_values": S.tolist()}, seen + 1
        if not seen:
            raise UserError(f"{path} has no matrix: no tensor of two dimensions")
        if args.log_file:
            v10.write_record(Path(args.log_file), "compress", command="spectrum", checkpoint=path.name, matrices=found)


def read_matrices(path: Path):
    """Yields (name, W, None), or (name, U, V) for factors of this suite, one after the other. Raises UserError for what
    is not a file of tensors, or needs code to be read."""
    if path.name.endswith(".safetensors.index.json"):
        try:
            files = json.loads(path.read_text(encoding="utf-8"))["weight_map"].values()
            shards = [path.with_name(Path(name).name) for name in dict.fromkeys(files)]
        except (OSError, ValueError, LookupError, TypeError, AttributeError):
            raise UserError(f"{path} is not an index of safetensors files") from None
        for shard in shards:
            yield from read_matrices(shard)
        return
    if not path.is_file():
        raise UserError(f"there is no {path}")
    if path.suffix == ".safetensors":
        yield from read_safetensors(path)
        return
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # torch.load raises whatever foreign bytes lead to
        raise UserError(f"{path} cannot be read without running code, or is no file of tensors "
                        f"({type(error).__name__})") from None
    for key in ("model", "state_dict"):
        content = content[key] if isinstance(content, dict) and isinstance(content.get(key), dict) else content
    if not isinstance(content, dict):
        raise UserError(f"{path} holds no tensors by name")
    tensors = {str(name): tensor for name, tensor in content.items() if is_matrix(tensor)}
    for name, tensor in tensors.items():
        stem, _, part = name.rpartition(".")
        U, V = (tensors.get(f"{stem}.{side}") for side in "UV")
        if part in "UV" and U is not None and V is not None and U.shape[1] == V.shape[0]:
            if part == "U":
                yield stem, U, V
        else:
            yield name, tensor, None


def is_matrix(tensor):
    return isinstance(tensor, Tensor) and tensor.ndim == 2 and tensor.is_floating_point() and min(tensor.shape) > 0


def read_safetensors(path):
    from safetensors import SafetensorError, safe_open
    try:
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118, it is no dict
                if len(file.get_slice(name).get_shape()) == 2 and is_matrix(tensor := file.get_tensor(name)):
                    yield name, tensor, None
    except (SafetensorError, OSError, struct.error) as error:
        raise UserError(f"{path} is not a good safetensors file: {error}") from None


# ---- Command line ----------------------------------------------------------------------------------------------------

def tolerance(text):
    """An argparse type: `+5%` of the perplexity or nats, such as 0.02 -> f(loss) in nats."""
    try:
        value = float(text.removesuffix("%"))
        allowed = math.log1p(value / 100) if text.endswith("%") else value
    except ValueError:
        allowed = math.nan
    if not math.isfinite(allowed):
        raise argparse.ArgumentTypeError(f"{text!r} is neither a share of the perplexity, such as +5%, nor nats, such "
                                         "as 0.02")
    return lambda loss: allowed


def parameters(text):
    """An argparse type: a number of parameters, such as 5M or 300k."""
    unit = {"k": 1e3, "m": 1e6, "g": 1e9, "b": 1e9}.get(text[-1:].lower(), 1)
    try:
        value = float(text if unit == 1 else text[:-1]) * unit
    except ValueError:
        value = math.nan
    if not 1 <= value < 1e15:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of parameters, such as 5M or 300k")
    return int(value)


def build_parser():
    number = v10.number
    parser = v10.Parser(prog="compress.py", description="Makes a trained model small, and says what that costs.",
                        allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name, run):
        sub = commands.add_parser(name, help=run.__doc__.splitlines()[0], description=run.__doc__, allow_abbrev=False,
                                  formatter_class=argparse.ArgumentDefaultsHelpFormatter)
        sub.set_defaults(run=run)
        return sub

    for name, run in (("fit", fit), ("cut", cut), ("tune", tune), ("compare", compare)):
        sub = command(name, run)
        flag = sub.add_argument
        flag("checkpoint", type=v10.PATH, metavar="CKPT", help="of v7, v10 or v11, or one that compress.py wrote")
        if name == "fit":
            flag("--loss", type=tolerance, required=True, help="+5%%: of the perplexity; 0.02: in nats")
            flag("--evaluations", type=number(int, least=1, below=1000), default=10, help="cuts to try")
        if name == "cut":
            one = sub.add_mutually_exclusive_group(required=True).add_argument
            one("--keep", type=number(float, above=0, below=1), help="the share kept of what --only names")
            one("--params", type=parameters, help="the whole model's parameters, such as 5M")
            one("--rank", type=v10.COUNT, help="one rank for all; a matrix that it would not make smaller stays")
            one("--energy", type=number(float, above=0, below=1), help="the share of its sum of s_i^2 that each "
                "matrix keeps, in the metric")
        if name == "tune":
            flag("--train", choices=("factors", "lora", "all"), default="factors", help="what is trained; lora: "
                 "additions of low rank to the linear layers, merged into them at the end")
            flag("--lora-rank", type=v10.COUNT, default=8, help="of each addition")
            flag("--lora-alpha", type=v10.POSITIVE, help="an addition's weight is alpha / rank; by default 2 rank")
            flag("--uncut", type=v10.PATH, help="the model that it was cut from, if it is not beside it")
            flag("--on", type=v10.PATH, help="another text, to train and to report on; its last fifth is held out")
            flag("--steps", type=v10.COUNT, default=200, help="of AdamW, its rate falling to 0 along a cosine")
            flag("--lr", type=v10.POSITIVE, default=1e-4, help="the highest rate")
            flag("--weight-decay", type=number(float, least=0), default=0.01, help="AdamW's")
            flag("--batch-size", type=v10.COUNT, default=16, help="blocks per step")
            flag("--dropout", type=v10.FRACTION, default=0.1, help="while it trains")
        else:
            flag("--only", choices=("linear", "ends", "all"), default="all", help="ends: embedding and head")
        if name in ("fit", "cut"):
            flag("--metric", choices=METRICS, default="fisher", help="what a cut loses")
            flag("--allocate", choices=("uniform", "energy", "global"), default="global",
                 help="one share of the parameters or of the energy for all, or one budget over all")
            flag("--dense", action="store_true", help="multiply the factors out again")
        if name != "compare":
            flag("--out", type=v10.PATH, help="the new model; by default NAME.cut.pt or NAME.tuned.pt beside the "
                 "checkpoint")
            flag("--overwrite", action="store_true", help="replace an existing --out")
        flag("--data-file", type=v10.PATH, help="the training text, if it is not where the checkpoint says")
        flag("--val-fraction", type=number(float, above=0, below=1),
             help="as in the training run; by default the checkpoint's")
        flag("--min-count", type=v10.COUNT, help="as in the training run; by default the checkpoint's")
        if name != "tune":
            flag("--calibration", type=v10.PATH, help="another text to measure the metric on")
            flag("--tokens", type=v10.COUNT, default=16_384, help="calibration tokens")
        flag("--seed", type=number(int, least=0, below=2**63), default=0, help="of batches and labels")
        flag("--log-file", type=v10.PATH, default="logs/compress.jsonl", help="a record per command is added to it")
    sub = command("spectrum", spectrum)
    sub.add_argument("files", nargs="+", metavar="FILE", help="a checkpoint, any .pt of tensors, .safetensors or its "
                     "index")
    sub.add_argument("--log-file", type=v10.PATH, help="a record per file is added to it")
    return parser


def check(args):
    """Raises UserError for what cannot be written."""
    if args.log_file:
        log = Path(args.log_file)
        with v10.writing(log):
            log.parent.mkdir(parents=True, exist_ok=True)
    if "out" not in args:
        return
    path = Path(args.checkpoint)
    kind = "tuned" if args.command == "tune" else "cut"
    args.out = args.out or str(path.with_name(f"{path.name.removesuffix('.pt')}.{kind}.pt"))
    if Path(args.out).exists() and not args.overwrite:
        raise UserError(f"{args.out} exists: --overwrite replaces it, --out NAME writes elsewhere")


@v10.screens()
def main(argv=None):
    try:
        args = build_parser().parse_args(argv)
        check(args)
        args.run(args)
        return 0
    except (UserError, v10.TrainingError) as error:
        print(f"compress.py: error: {error}", file=sys.stderr)
        return 2 if isinstance(error, UserError) else 1
    except OSError as error:
        print(f"compress.py: error: cannot use {error.filename or 'a file'}: {error.strerror}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("compress.py: interrupted; nothing was changed", file=sys.stderr)
        return 130


if __name__ == "__main__":
    v10.leave(main())
