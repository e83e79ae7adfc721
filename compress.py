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
import os
import sys
import zipfile
from dataclasses import InitVar, dataclass, replace
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
    n = len(tokens) // T * T
    batches = list(tokens[:n].view(-1, T).split(max(1, 2**19 // config.d_model // T)))  # wide models take more memory
    C, words = config.d_model, config.vocab_size
    count, p = (torch.zeros(words, dtype=torch.float64) for _ in range(2))
    G, second, mean = (torch.zeros(*shape, dtype=torch.float64) for shape in ((C, C), (C, C), (C,)))
    rows, dtype = max(1, v10.LOGITS_BYTES // (8 * words)), model.norm.weight.dtype

    def embedded(_, inputs, y):
        y.requires_grad_()  # the weights' gradients are not needed, so nothing else asks for one
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
    parameters = [parameter.requires_grad_(False) for parameter in model.parameters()]
    try:
        layers = v11.measure_fisher(model, batches, seed)
    finally:
        for parameter in parameters:
            parameter.requires_grad_()
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
    U: Tensor  # (m, R), the model's own, of a dense matrix W or 1
    V: Tensor  # (R, n)
    whole: bool  # dense, not factored
    fisher: InitVar[v11.Fisher | None]  # its metric, None for plain
    damping: float
    shift: Tensor | None = None  # (C,), the head's mean input, whose error goes into the bias
    level: Tensor | float = 0.0  # (R,), what is taken from each row of U first

    def __post_init__(self, fisher):
        (m, r), n = self.U.shape, self.V.shape[1]
        self.side = m + n
        self.now = m * n if self.whole else r * self.side  # parameters
        # the highest rank that makes it smaller
        self.limit = (self.now - 1) // self.side if self.whole else min(r - 1, m, n)
        s, self.A, self.B = (v11.plain_directions(*self.pair()) if fisher is None else
                             v11.fisher_directions(self.pair()[0], fisher, self.damping))
        self.squares = s.square()
        self.tails = [*self.squares.flip(0).cumsum(0).flip(0).tolist(), 0.0]  # tails[k]: what rank k drops

    def pair(self) -> tuple[Tensor, Tensor]:
        """U and V in float64."""
        return self.U.double() - self.level, self.V.double()

    def options(self) -> list[tuple[int | None, int, float]]:
        """[(rank, parameters, squared error)] for each rank that makes it smaller, and at last None, as it is."""
        return [(k, k * self.side, self.tails[k]) for k in range(1, self.limit + 1)] + [(None, self.now, 0.0)]

    def factors(self, k: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """The best U' V' of rank k in its metric."""
        new_U, new_V, *_ = v11.cut_factors(*self.pair(), self.A[:, :k], self.B[:k], generator)
        return new_U, new_V


def matrices(model: v10.GPT, metric: str, measured: Measured | None, only: str = "all") -> list[Matrix]:
    """The matrices that may be cut: those of the linear layers, of the ends (embedding and head), or all."""
    found, m = [], None if metric == "plain" else measured

    def add(name, kind, U, V, whole, fisher, shift=None, level=0.0):
        if metric == "inputs" and kind != "tied":
            fisher = fisher._replace(D=U.double().mT @ U.double())
        damping = v11.DAMPING if metric == "fisher" else 0.0
        found.append(Matrix(name, kind, U, V, whole, fisher, damping, shift, level))

    if only != "ends":
        for i, (name, layer) in enumerate(model.linears().items()):
            add(name, "linear", *layer.factors(), layer.rank is None, m and m.layers[i])
    if only == "linear":
        return found
    e, h, C = model.token_embedding, model.head, model.config.d_model
    whole, one = not hasattr(e, "U"), torch.eye(C, dtype=torch.float64)
    U, V = (one, e.weight.detach().cpu().mT) if whole else (
        factor.detach().cpu().mT for factor in (e.V, e.U))  # (C, R), (R, V)
    if model.config.tie_embeddings:
        fisher = None
        if m:
            uses = [(m.words, m.embedding_G), (m.p, m.covariance)]
            if metric == "inputs":  # of the outputs of both: vectors, and logits
                uses = [(m.words, one), (torch.ones_like(m.p), m.covariance)]
            a, B = nearest_kronecker(uses)
            fisher = v11.Fisher(weighted_gram(V.mT, a), U.double().mT @ B @ U.double(), B.trace().item() / C)
        add("embedding and head", "tied", U, V, whole, fisher, m and m.mean)
        return found
    add("embedding", "embedding", U, V, whole, m and v11.Fisher(
        weighted_gram(V.mT, m.words), U.double().mT @ m.embedding_G @ U.double(), m.embedding_G.trace().item() / C))
    whole = not hasattr(h, "U")
    U, V = (h.weight.detach().cpu(), one) if whole else (factor.detach().cpu() for factor in (h.U, h.V))
    level = (m.p @ U.double()) / m.p.sum() if metric == "fisher" else 0.0
    fisher = m and v11.Fisher(V.double() @ m.covariance @ V.double().mT, weighted_gram(U, m.p, level),
                              m.p.mean().item())
    add("head", "head", U, V, whole, fisher, m and m.mean, level)
    return found


def weighted_gram(rows: Tensor, weights: Tensor, level: Tensor | float = 0.0) -> Tensor:
    """The sum of weight w (r - level) (r - level)^T over the rows r of a matrix (V, R), in float64 -> (R, R)."""
    parts = ((part.double() - level, w) for part, w in zip(rows.split(4096), weights.split(4096), strict=True))
    return sum((w * r.mT) @ r for r, w in parts)


# ---- How many ranks each matrix gets ---------------------------------------------------------------------------------

def allocate(found: list[Matrix], budget: float) -> tuple[list[int | None], float]:
    """Ranks, None for a matrix that stays, of the smallest summed squared error within a budget of parameters ->
    (ranks, how far the sum may be above the smallest possible one). Exact by dynamic programming if that is small; else
    by a price per parameter, and what is left of the budget is filled. The budget has room for rank 1 in all."""
    options = [matrix.options() for matrix in found]
    costs = [np.array([cost for _, cost, _ in of_matrix]) for of_matrix in options]
    errors = [np.array([error for *_, error in of_matrix]) for of_matrix in options]
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

    def summed(values, picks):
        return float(sum(of_list[pick] for of_list, pick in zip(values, picks, strict=True)))
    low, high = 0.0, 1.0
    while summed(costs, picks_at(high)) > budget:
        high *= 2
    bound = -math.inf
    for _ in range(100):
        price = (low + high) / 2
        picks = picks_at(price)
        bound = max(bound, summed(errors, picks) + price * (summed(costs, picks) - budget))  # of the dual problem
        low, high = (price, high) if summed(costs, picks) > budget else (low, price)
    picks = picks_at(high)
    while True:  # fill what is left, the best improvement per parameter first
        left, best = budget - summed(costs, picks), (0.0, None, None)
        for i, (cost, error) in enumerate(zip(costs, errors, strict=True)):
            more, gain = cost - cost[picks[i]], error[picks[i]] - error
            worth = np.where((more <= left) & (gain > 0), gain / np.maximum(more, 1e-9), 0.0)
            j = int(worth.argmax())
            best = max(best, (float(worth[j]), i, j), key=lambda offer: offer[0])
        if best[1] is None:
            return picks, max(0.0, summed(errors, picks) - bound)
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


def total(found: list[Matrix]) -> int:
    """The parameters of matrices as they are."""
    return sum(matrix.now for matrix in found)


def least(found: list[Matrix]) -> int:
    """The parameters of matrices at rank 1, or as they are where that is fewer."""
    return sum(min(matrix.side, matrix.now) for matrix in found)


def ranks_within(found: list[Matrix], budget: float, how: str) -> tuple[list[int | None], float]:
    """Ranks within a budget of parameters: `global`, one budget for all (see allocate); `uniform` and `energy`, one
    share for all, as high as the budget allows -> (ranks, the gap of allocate). Raises UserError if rank 1 in all
    matrices is too much."""
    if budget < least(found):
        raise UserError(f"the budget of {budget:,.0f} parameters is below {least(found):,}, which rank 1 needs in all "
                        f"{len(found)} matrices")
    if how == "global":
        return allocate(found, budget)
    rule = {"uniform": uniform_ranks, "energy": energy_ranks}[how]
    low, high = 0.0, 1.0
    if kept(found, rule(found, high)) <= budget:
        return rule(found, high), 0.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if kept(found, rule(found, middle)) <= budget else (low, middle)
    return rule(found, low), 0.0


# ---- The cut model ---------------------------------------------------------------------------------------------------

def cut_model(content: dict, model: v10.GPT, found: list[Matrix], ranks: list[int | None], dense: bool = False,
              seed: int = 0) -> dict:
    """A checkpoint's content with these matrices at these ranks; with `dense` they are multiplied out again."""
    generator, state = torch.Generator().manual_seed(seed), dict(model.state_dict())
    layers, ends, dtype = model.linears(), model.end_ranks(), model.norm.weight.dtype
    layer_ranks = {name: layer.rank for name, layer in layers.items()}

    def put(path, parts):
        for name in ("weight", "U", "V"):
            state.pop(f"{path}.{name}", None)
        state.update({f"{path}.{name}": value.to(dtype).contiguous() for name, value in parts.items()})

    for matrix, k in zip(found, ranks, strict=True):
        if k is None and (matrix.whole or not dense):
            continue
        U, V = matrix.factors(k, generator) if k else matrix.pair()
        rank = None if dense else k
        parts = {"weight": U @ V} if dense else {"U": U, "V": V}
        words = {"weight": (U @ V).mT} if dense else {"U": V.mT, "V": U.mT}  # of an embedding
        if matrix.kind == "linear":
            for path, module in model.named_modules(remove_duplicate=False):  # a shared layer has several
                if module is layers[matrix.name]:
                    put(path, parts)
            layer_ranks[matrix.name] = rank
        if matrix.kind in ("embedding", "tied"):
            put("token_embedding", words)
            ends[0] = rank
        if matrix.kind in ("head", "tied"):
            put("head", words if matrix.kind == "tied" else parts)
            ends[1] = rank
            if matrix.shift is not None:  # the mean error of the outputs goes into the bias
                before, after = (V.mT @ (U.mT @ matrix.shift) if matrix.kind == "tied" else U @ (V @ matrix.shift)
                                 for U, V in (matrix.pair(), (U, V)))
                state["head.bias"] = (state["head.bias"].double() + before - after).to(dtype)
    kept = {name: content[name] for name in ("format", "config", "vocabulary", "text") if name in content}
    return kept | {"ranks": list(layer_ranks.values()), "end_ranks": ends, "model": state}


# ---- Losses ----------------------------------------------------------------------------------------------------------

def token_losses(model: v10.GPT, tokens: Tensor) -> list[Tensor]:
    """The loss of every token but the first of tokens (N,), in batches (B, T) as v10.held_out_batches cuts them."""
    T = model.config.block_size
    batch_size = max(1, v10.LOGITS_BYTES // (16 * T * model.config.vocab_size))
    with v10.evaluation_mode(model):
        return [F.cross_entropy(model(inputs).flatten(0, 1), targets.flatten(), reduction="none").view_as(targets)
                for inputs, targets in v10.held_out_batches(tokens, T, batch_size)]


def block_losses(model: v10.GPT, tokens: Tensor) -> list[tuple[float, int]]:
    """The loss of each block of tokens (N,) -> [(mean loss, tokens)]. Raises TrainingError if it is not finite."""
    found = [(loss, losses.shape[1]) for losses in token_losses(model, tokens) for loss in losses.mean(1).tolist()]
    if not math.isfinite(mean_loss(found)):
        raise v10.TrainingError("the loss is not finite")
    return found


def mean_loss(blocks):
    return sum(loss * n for loss, n in blocks) / sum(n for _, n in blocks)


def paired_error(blocks, others):
    """The standard error of the difference of two models' losses, over the whole blocks of one text; None if there are
    not two."""
    differences = [a - b for (a, n), (b, _) in zip(blocks, others, strict=True) if n == blocks[0][1]]
    return stdev(differences) / len(differences) ** 0.5 if len(differences) > 1 else None


# ---- A model and its text --------------------------------------------------------------------------------------------

class Text(NamedTuple):
    """The text of a model, and the two halves of what it has not been trained on."""

    path: Path
    train: Tensor  # (N,)
    decide: Tensor  # what `fit` decides on
    report: Tensor  # what everything is reported on


def load(path: str) -> tuple[dict, v10.GPT]:
    """A checkpoint -> (its content, its model). Raises UserError if it holds guides, or a number that is not finite."""
    content = v10.load(Path(path))
    if isinstance(content.get("model"), dict) and any("guide" in str(name) for name in content["model"]):
        raise UserError(f"{path} still has the guides of self-guided training: take a checkpoint of its second half")
    model = v10.build_model(content).eval()
    for name, parameter in model.named_parameters():
        if not torch.isfinite(parameter).all():
            raise UserError(f"{path}: {name} holds a number that is not finite")
    if model.config.attention == "bidirectional":
        v10.say("*** NO CAUSAL MASK: THE MODEL SEES ITS TARGETS. Its losses are not those of a language model.")
    noted = ("format", "config", "vocabulary", "text", "cut_from")
    return {name: content[name] for name in noted if name in content}, model  # the weights are in the model


def read_text(args: argparse.Namespace, content: dict, config: v10.GPTConfig) -> Text:
    """The text that a model was trained on, found again. Raises UserError if it is not there, or another one."""
    noted, T = content.get("text", {}), config.block_size
    name = args.data_file or noted.get("data_file")
    if not name:
        raise UserError(f"{args.checkpoint} does not say which text it was trained on: --data-file TEXT names it, "
                        "--val-fraction and --min-count how it was read")
    path = v10.existing_data(name)
    if path is None:
        raise UserError(f"there is no {name}, the text that {args.checkpoint} was trained on: --data-file names it")
    how = {}
    for key, default in (("val_fraction", 0.01), ("min_count", 1)):
        given = getattr(args, key)
        if given is not None and given != noted.get(key, given):
            raise UserError(f"--{key.replace('_', '-')} was {noted[key]} in the run of {args.checkpoint}, not {given}")
        how[key] = given or noted.get(key, default)
    corpus = v10.load_corpus(path, how["val_fraction"], T, config.tokenize, how["min_count"],
                             config.vocab_size if config.tokenize == "numbers" else None, noted.get("val_tokens"))
    if corpus.vocabulary != content["vocabulary"]:
        raise UserError(f"{path} has another vocabulary than {args.checkpoint}: {len(corpus.vocabulary):,} words, not "
                        f"{len(content['vocabulary']):,}; --data-file, --val-fraction and --min-count have to be those "
                        "of its run")
    if corpus.sha256 != noted.get("data_sha256", corpus.sha256):
        raise UserError(f"{path} is not the text that {args.checkpoint} was trained on: its checksum differs")
    half = len(corpus.val) // 2 // T * T or len(corpus.val) // 2
    if len(corpus.val) < 3:
        raise UserError(f"{path} has {len(corpus.val)} held-out tokens, and their two halves need 3 or more: train "
                        "with a larger --val-fraction or --val-tokens")
    return Text(path, corpus.train, corpus.val[:half + 1], corpus.val[half:])


def read_calibration(args, text, config, vocabulary):
    """-> (tokens (N,), in whole blocks; where they are from). Raises UserError if they are fewer than a block."""
    T = config.block_size
    if not args.calibration:
        windows, _ = v10.sample_batch(text.train, max(1, args.tokens // T), T, v11.seeded(args.seed, 0))
        return windows.flatten(), f"training tokens of {text.path.name}"
    tokens = v10.read_tokens(Path(args.calibration), config.tokenize, vocabulary)[:max(args.tokens, T)]
    name = Path(args.calibration).name
    if len(tokens) < T:
        raise UserError(f"{args.calibration} gives {len(tokens):,} calibration tokens, and a block needs {T:,}")
    n = min(T, 32)
    seen = {tuple(window) for window in tokens.unfold(0, n, 1).tolist()}
    if len(text.report) > n and any(tuple(window) in seen for window in text.report.unfold(0, n, n).tolist()):
        v10.say(f"*** {name} holds some of the text that is reported on: the losses below are too good")
    return tokens[:len(tokens) // T * T], f"tokens of {name}"


class Job:
    """A model that is being made smaller."""

    def __init__(self, args):
        self.args = args
        self.content, self.model = load(args.checkpoint)
        config, vocabulary = self.model.config, self.content["vocabulary"]
        self.text = read_text(args, self.content, config)
        self.calibration, self.source = read_calibration(args, self.text, config, vocabulary)
        self.before = block_losses(self.model, self.text.report)
        self.measured, self.found = None, {}

    def matrices(self, metric: str) -> list[Matrix]:
        """Those that --only names, in a metric. Raises UserError if none can become smaller."""
        if metric not in self.found:
            if metric != "plain" and self.measured is None:
                self.measured = measure(self.model, self.calibration, self.args.seed)
            self.found[metric] = matrices(self.model, metric, self.measured, self.args.only)
            if all(matrix.limit < 1 for matrix in self.found[metric]):
                raise UserError(NOTHING)
        return self.found[metric]

    def cut(self, metric, ranks, dense=False):
        """-> (the cut checkpoint's content, its model)."""
        content = cut_model(self.content, self.model, self.matrices(metric), ranks, dense, self.args.seed)
        return content, v10.build_model(content).eval()

    def losses(self, metric, ranks, tokens):
        return block_losses(self.cut(metric, ranks)[1], tokens)


NOTHING = "nothing becomes smaller: every matrix would need more parameters as factors"


def sizes(model: v10.GPT) -> dict:
    """Parameters: in all, in the linear layers, in embedding and head with its bias."""
    ends = v10.count_parameters(torch.nn.ModuleList([model.token_embedding, model.head]))
    return {"all": v10.count_parameters(model), "linear": v10.count_parameters(*model.linears().values()), "ends": ends}


def report(job: Job, ranks: list[int | None], gap: float, target: str) -> None:
    """Cut, measure, save, print what became smaller and what it costs, and write the record."""
    args, found = job.args, job.matrices(job.args.metric)
    if all(k is None for k in ranks):
        raise UserError(NOTHING)
    content, model = job.cut(args.metric, ranks, args.dense)
    after, before, size, new = block_losses(model, job.text.report), job.before, sizes(job.model), sizes(model)
    increase, error, tokens = mean_loss(after) - mean_loss(before), paired_error(after, before), sum(
        n for _, n in before)
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
              f"{v10.perplexity(increase) - 1:+.1%}")]
    if plain is not None:
        rows.append(("plain SVD of this size, uniform", "", f"{mean_loss(before) + plain:.4f}", f"{plain:+.4f}"))
    if args.metric == "fisher":
        rows.append(("predicted by the metric", "", "", f"{predicted:+.4f}"))
    v10.say("\n".join(f"{label:32}{a:>16}{b:>16}  {note}".rstrip() for label, a, b, note in rows))
    calibrated = f"; calibrated with {len(job.calibration):,} {job.source}" if job.measured else ""
    v10.say(f"measured on {tokens:,} held-out tokens of {job.text.path.name}, the second half{calibrated}")
    if args.dense:
        factors = sum(k * matrix.side for matrix, k in zip(found, ranks, strict=True) if k)
        v10.say(f"multiplied out again; as factors, what was cut would have {factors:,} parameters")
    if stayed:
        v10.say(f"not cut: {', '.join(stayed)}")
    if gap > 0:
        v10.say(f"the allocation may be {gap / 2:.2g} above the best one, of {predicted:.2g}")
    v10.say(f"the cut model: {args.out}")
    v10.write_record(
        Path(args.log_file), "compress", command=args.command, checkpoint=Path(args.checkpoint).name, target=target,
        metric=args.metric, allocate=args.allocate if args.command == "fit" or not (args.rank or args.energy) else None,
        only=args.only, dense=args.dense, seed=args.seed, tokens=len(job.calibration), calibration=job.source,
        data_file=job.text.path.name, report_tokens=tokens, before=size, after=new, loss_before=mean_loss(before),
        loss=mean_loss(after), loss_error=error, plain_increase=plain, predicted=predicted, gap=gap,
        ranks={matrix.name: k for matrix, k in zip(found, ranks, strict=True)},
        shapes={matrix.name: [len(matrix.U), matrix.V.shape[1]] for matrix in found})
    if args.export:
        export(model, Path(args.export))


def export(model, path):
    """The weights as a .safetensors file; a tied or shared one once, under its first name."""
    from safetensors.torch import save  # save_file has errors of its own, and makes a file that only its owner reads
    content = save({name: parameter.detach().contiguous() for name, parameter in model.named_parameters()})
    try:
        with v10.writing(path):
            v10.temporary(path).write_bytes(content)
            v10.temporary(path).replace(path)
    finally:
        v10.temporary(path).unlink(missing_ok=True)


# ---- The commands ----------------------------------------------------------------------------------------------------

def cut(args):
    """Cut to a size."""
    job, gap = Job(args), 0.0
    found = job.matrices(args.metric)
    if args.rank:
        ranks, target = [args.rank if args.rank <= matrix.limit else None for matrix in found], f"--rank {args.rank}"
    elif args.energy:
        ranks, target = energy_ranks(found, args.energy), f"--energy {args.energy:g}"
    else:
        budget = (args.keep * total(found) if args.keep else
                  args.params - (v10.count_parameters(job.model) - total(found)))
        if budget >= total(found):
            raise UserError(f"{args.checkpoint} has {v10.count_parameters(job.model):,} parameters, within --params "
                            f"{args.params:,} already")
        ranks, gap = ranks_within(found, budget, args.allocate)
        target = f"--keep {args.keep:g}" if args.keep else f"--params {args.params}"
    report(job, ranks, gap, target)


def fit(args):
    """The smallest model within a loss, by bisection on one half of the held-out text; reported on the other."""
    job = Job(args)
    found, start, tried = job.matrices(args.metric), block_losses(job.model, job.text.decide), {}

    def within(keep):
        ranks, gap = ranks_within(found, keep * total(found), args.allocate)
        tried[keep] = mean_loss(job.losses(args.metric, ranks, job.text.decide)) - mean_loss(start), ranks, gap
        return tried[keep][0] <= args.loss

    low, high = min(1.0, 1.001 * least(found) / total(found)), 1.0
    with tqdm(total=args.evaluations, unit="cut", disable=None) as bar:
        for number in range(args.evaluations):
            keep = (low * high) ** 0.5 if number else low
            low, high = (low, keep) if within(keep) else (keep, high)
            bar.update()
            if high <= low:  # even the smallest is within
                break
    good = [keep for keep, (increase, ranks, _) in tried.items() if increase <= args.loss and any(ranks)]
    if not good:
        best = min(tried, key=lambda keep: tried[keep][0])
        raise UserError(f"no cut is within {args.loss:+.4f} nats; the best of {len(tried)} loses {tried[best][0]:+.4f} "
                        f"and keeps {kept(found, tried[best][1]) / total(found):.1%}")
    increase, ranks, gap = tried[min(good)]
    v10.say(f"decided on {sum(n for _, n in start):,} other held-out tokens, by {len(tried)} cuts: "
            f"{kept(found, ranks) / total(found):.1%} of what may be cut is kept, {increase:+.4f} nats of "
            f"{args.loss:+.4f}")
    report(job, ranks, gap, f"--loss {args.loss:.4g}")


SHARES = (0.75, 0.5, 0.25, 0.125, 0.0625)


def compare(args):
    """Every metric at five budgets, each with one share for every matrix and with one budget over all."""
    job = Job(args)
    plain, before = job.matrices("plain"), mean_loss(job.before)
    everything, rest = total(plain), v10.count_parameters(job.model) - total(plain)
    rows = [{"keep": keep, "cuts": {}} for keep in SHARES if keep * everything >= least(plain)]
    if not rows:
        raise UserError(f"{args.checkpoint} is too small: rank 1 in all matrices is more than {SHARES[0]:.0%} of them")
    with tqdm(total=len(rows) * 2 * len(METRICS), unit="cut", disable=None) as bar:
        for metric in METRICS:
            found = job.matrices(metric)
            for row in rows:
                for how in ("uniform", "global"):
                    ranks, _ = ranks_within(found, row["keep"] * everything, how)
                    after = job.losses(metric, ranks, job.text.report)
                    row["cuts"][f"{metric}, {how}"] = {
                        "increase": mean_loss(after) - before, "error": paired_error(after, job.before),
                        "kept": kept(found, ranks), "parameters": rest + kept(found, ranks)}
                    bar.update()
            job.found.clear()  # the next metric's need the room
    names = [*rows[0]["cuts"]]
    width = max(map(len, names)) + 2
    v10.say(f"loss {before:.4f}; with a cut, by so much higher:")
    v10.say(f"{'kept':8}" + "".join(f"{name:>{width}}" for name in names))
    for row in rows:
        v10.say(f"{row['keep']:<8.2%}" + "".join(f"{row['cuts'][name]['increase']:>+{width}.4f}" for name in names))
    v10.write_record(Path(args.log_file), "compress", command="compare", checkpoint=Path(args.checkpoint).name,
                     only=args.only, seed=args.seed, tokens=len(job.calibration), calibration=job.source,
                     data_file=job.text.path.name, report_tokens=sum(n for _, n in job.before),
                     before=sizes(job.model), loss_before=before, rows=rows)


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
        """A layer that computes the same: W + (alpha / r) B A, or factors of rank R + r, at most that of a matrix."""
        A, B = self.A.detach(), self.scale * self.B.detach()
        if self.layer.rank is None:
            self.layer.weight.data += B @ A
            return self.layer
        U, V = torch.cat([self.layer.U.detach(), B], 1), torch.cat([self.layer.V.detach(), A])
        if len(V) > min(self.layer.shape):
            U, V = v10.dense_factors(U @ V, min(self.layer.shape))
        self.layer.set_factors(U, V)
        return self.layer


def replace_layers(model, new):
    """Put new(layer) in the place of each linear layer, the same one wherever blocks share it."""
    made = {}
    for block in model.blocks:
        for name, layer in [*block.named_children()]:
            if hasattr(layer, "factors") or isinstance(layer, LoRA):
                made[layer] = made.get(layer) or new(layer)
                setattr(block, name, made[layer])


TRAINED = {"all": None, "factors": ("U", "V"), "lora": ("A", "B")}  # the last names of the parameters


def fine_tune(model: v10.GPT, kind: str, tokens: Tensor, args: argparse.Namespace) -> int:
    """Train some of a model's parameters for --steps on tokens (N,) -> how many they are. `factors`: those of all
    factored matrices; `lora`: additions of rank --lora-rank to the linear layers, merged at the end; `all`."""
    torch.manual_seed(args.seed)
    if kind == "lora":
        replace_layers(model, lambda layer: LoRA(layer, args.lora_rank, args.lora_alpha or 2 * args.lora_rank))
    for name, parameter in model.named_parameters():
        parameter.requires_grad = TRAINED[kind] is None or name.rpartition(".")[2] in TRAINED[kind]
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if not trained:
        raise UserError("there are no factors to train: --train all or lora")
    optimizer = torch.optim.AdamW(trained, lr=args.lr, weight_decay=args.weight_decay)
    generator = torch.Generator().manual_seed(args.seed)
    model.train()
    for step in tqdm(range(args.steps), desc=kind, unit="step", disable=None):
        for group in optimizer.param_groups:
            group["lr"] = args.lr * 0.5 * (1 + math.cos(math.pi * step / args.steps))
        loss = model(*v10.sample_batch(tokens, args.batch_size, model.config.block_size, generator))
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
    content, model = load(args.checkpoint)
    uncut = args.uncut or str(Path(args.checkpoint).parent / content.get("cut_from", ""))
    if not Path(uncut).is_file():
        raise UserError(f"{args.checkpoint} is compared with the model that it was cut from: --uncut CKPT names it")
    if os.path.realpath(uncut) == os.path.realpath(args.out):
        raise UserError(f"--out {args.out} is the model that {args.checkpoint} was cut from: choose another name")
    whole, uncut_model = load(uncut)
    config = replace(uncut_model.config, dropout=model.config.dropout)  # which a run may change
    if (whole["vocabulary"], config) != (content["vocabulary"], model.config):
        raise UserError(f"{args.checkpoint} was not cut from {uncut}: sizes or vocabulary differ")
    if args.on:
        tokens = v10.read_tokens(Path(args.on), model.config.tokenize, content["vocabulary"])
        T = model.config.block_size
        part = len(tokens) * 4 // 5
        if min(part, len(tokens) - part) <= T:
            raise UserError(f"{args.on} gives {len(tokens):,} tokens; a fifth of them, held out, should be more than "
                            f"a block of {T:,}")
        name, train, held_out = Path(args.on).name, tokens[:part], tokens[part:]
    else:
        path, train, _, held_out = read_text(args, content, model.config)
        name = path.name
    rows = []
    for which, tuned, kind in (("cut", model, args.train), ("uncut", uncut_model, "all")):
        for module in tuned.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = args.dropout
        before = block_losses(tuned, held_out)
        trained = fine_tune(tuned, kind, train, args)
        rows.append({"model": which, "train": kind, "parameters": v10.count_parameters(tuned), "trained": trained,
                     "loss_before": mean_loss(before), "loss": mean_loss(block_losses(tuned, held_out))})
    kept = {name: content[name] for name in ("text", "cut_from") if name in content}
    v10.save(Path(args.out), v10.model_content(model, content["vocabulary"]) | kept)
    v10.say(f"{'':8}{'trained':>10}{'parameters':>14}{'of these':>14}{'loss before':>14}{'after':>10}")
    for row in rows:
        v10.say(f"{row['model']:8}{row['train']:>10}{row['parameters']:>14,}{row['trained']:>14,}"
                f"{row['loss_before']:>14.4f}{row['loss']:>10.4f}")
    v10.say(f"{args.steps} steps; measured on {sum(n for _, n in before):,} held-out tokens of {name}\n"
            f"the tuned model: {args.out}")
    v10.write_record(Path(args.log_file), "compress", command="tune", checkpoint=Path(args.checkpoint).name,
                     steps=args.steps, lr=args.lr, seed=args.seed, data_file=name, lora_rank=args.lora_rank,
                     models=rows)


ENERGIES = (0.9, 0.95, 0.99, 0.999)


def spectrum(args):
    """The singular values of every matrix in a file: how many hold how much of the energy."""
    v10.say(f"{'matrix':40}{'shape':>16}{'stable rank':>13}" + "".join(f"{energy:>8.1%}" for energy in ENERGIES)
            + f"{'break-even':>12}")
    for path in map(Path, args.files):
        found = {}
        for name, U, V in read_matrices(path):
            found[name] = row = of_matrix(path, name, U, V)
            v10.say(f"{name[:39]:40}{'{} x {}'.format(*row['shape']):>16}{row['stable_rank']:>13.1f}"
                    + "".join(f"{rank:>8}" for rank in row["ranks"]) + f"{row['break_even']:>12}"
                    + ("" if row["ranks"][1] <= row["break_even"] else "   95% needs more than the matrix"))
        if not found:
            raise UserError(f"{path} has no matrix: no tensor of two dimensions")
        if args.log_file:
            v10.write_record(Path(args.log_file), "compress", command="spectrum", checkpoint=path.name, matrices=found)


def of_matrix(path, name, U, V):
    """What `spectrum` says of W = U, or of W = U V. Raises UserError if it cannot be said."""
    try:
        factors = [factor.to(torch.float64 if factor.dtype == torch.float64 else torch.float32) for factor in (U, V)
                   if factor is not None]
    except RuntimeError:
        raise UserError(f"{path}: {name} has a type that cannot be computed with, {U.dtype}") from None
    if not all(torch.isfinite(factor).all() for factor in factors):
        raise UserError(f"{path}: {name} holds a number that is not finite")
    scales = [factor.abs().max().item() or 1.0 for factor in factors]  # so that no square is too large, or too small
    factors = [factor / scale for factor, scale in zip(factors, scales, strict=True)]
    S = (torch.linalg.svdvals(factors[0]) if V is None else v10.product_singular_values(*factors)).double()
    m, n = U.shape[0], (U if V is None else V).shape[1]
    energy = S.square().cumsum(0)
    ranks = [int((energy < share * energy[-1]).sum()) + 1 for share in ENERGIES] if S[0] > 0 else [0] * len(ENERGIES)
    values = (S * math.prod(scales)).tolist()
    if not math.isfinite(values[0]):
        raise UserError(f"{path}: {name} is too large: its singular values are not finite")
    return {"shape": [m, n], "stable_rank": v10.stable_rank_of(S), "ranks": ranks,
            "break_even": (m * n - 1) // (m + n), "singular_values": values}


def read_matrices(path: Path):
    """Yields (name, W, None), or (name, U, V) for factors of this suite, one after the other. Raises UserError for what
    is not a file of tensors, or needs code to be read."""
    if path.name.endswith(".safetensors.index.json"):
        try:
            files = json.loads(path.read_text(encoding="utf-8"))["weight_map"].values()
            shards = [path.with_name(Path(name).name) for name in dict.fromkeys(files)]
        except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError):
            shards = []
        if not shards or not all(shard.suffix == ".safetensors" for shard in shards):
            raise UserError(f"{path} is not an index of safetensors files")
        for shard in shards:
            yield from read_matrices(shard)
        return
    if not path.is_file():
        raise UserError(f"there is no {path}")
    if path.suffix == ".safetensors":
        yield from read_safetensors(path)
        return
    for mapped in (True, False):  # older files cannot be mapped
        try:
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
            break
        except Exception as error:  # torch.load raises whatever foreign bytes lead to
            if not mapped:
                raise UserError(f"{path} cannot be read without running code, or is no file of tensors "
                                f"({type(error).__name__})") from None
    for key in ("model", "state_dict"):
        content = content[key] if isinstance(content, dict) and isinstance(content.get(key), dict) else content
    if not isinstance(content, dict):
        raise UserError(f"{path} holds no tensors by name")
    tensors = {str(name): tensor for name, tensor in content.items() if is_matrix(tensor)}
    yield from paired({name: tensor.shape for name, tensor in tensors.items()}, tensors.get)


def paired(shapes, read):
    """The matrices of a file, {name: shape}, each by read(name): yields (name, tensor, None), and (name, U, V) for two
    that are the factors name.U and name.V."""
    for name in shapes:
        stem, _, part = name.rpartition(".")
        U, V = (shapes.get(f"{stem}.{side}") for side in "UV")
        if part not in ("U", "V") or not U or not V or U[1] != V[0]:
            yield name, read(name), None
        elif part == "U":
            yield stem, read(name), read(f"{stem}.V")


def is_matrix(tensor):
    return (isinstance(tensor, Tensor) and tensor.ndim == 2 and tensor.is_floating_point() and min(tensor.shape) > 0
            and tensor.layout == torch.strided and tensor.device.type == "cpu")


def read_safetensors(path):
    from safetensors import SafetensorError, safe_open
    try:
        with safe_open(path, "pt") as file:
            shapes = {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118, it is no dict
            matrices = {name: shape for name, shape in shapes.items() if len(shape) == 2}
            for name, U, V in paired(matrices, file.get_tensor):
                if is_matrix(U) and (V is None or is_matrix(V)):
                    yield name, U, V
    except (SafetensorError, OSError, AttributeError) as error:  # the last one: a type that torch does not know
        raise UserError(f"{path} is not a good safetensors file: {error}") from None


# ---- Command line ----------------------------------------------------------------------------------------------------

def tolerance(text):
    """An argparse type: `+5%` of the perplexity or nats, such as 0.02 -> nats."""
    try:
        value = float(text.removesuffix("%"))
        allowed = math.log1p(value / 100) if text.endswith("%") else value
    except ValueError:
        allowed = math.nan
    if not math.isfinite(allowed):
        raise argparse.ArgumentTypeError(f"{text!r} is neither a share of the perplexity, such as +5%, nor nats, such "
                                         "as 0.02")
    return allowed


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
    number, share = v10.number, v10.number(float, above=0, below=1)
    parser = v10.Parser(prog="compress.py", description="Makes a trained model small, and says what that costs.",
                        allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name, run):
        said = run.__doc__ or name  # python -OO has no docstrings
        sub = commands.add_parser(name, help=said.splitlines()[0], description=said, allow_abbrev=False)
        sub.set_defaults(run=run)
        return sub.add_argument

    for name, run in (("fit", fit), ("cut", cut), ("tune", tune), ("compare", compare)):
        flag = command(name, run)
        flag("checkpoint", type=v10.PATH, metavar="CKPT", help="of v7, v10 or v11, or one that compress.py wrote")
        if name == "fit":
            flag("--loss", type=tolerance, required=True, help="+5%%: of the perplexity; 0.02: in nats")
            flag("--evaluations", type=number(int, least=1, below=1000), default=10, help="cuts to try (10)")
        if name == "cut":
            one = flag.__self__.add_mutually_exclusive_group(required=True).add_argument
            one("--keep", type=share, help="the share kept of what --only names")
            one("--params", type=parameters, help="the whole model's parameters, such as 5M")
            one("--rank", type=v10.COUNT, help="one rank for all; a matrix that it would not make smaller stays")
            one("--energy", type=share, help="the share of its sum of s_i^2 that each matrix keeps, in the metric")
        if name == "tune":
            flag("--train", choices=("factors", "lora", "all"), default="factors", help="what is trained (factors); "
                 "lora: additions of low rank to the linear layers, merged into them at the end")
            flag("--lora-rank", type=number(int, least=1, below=2**16), default=8, help="of each addition (8)")
            flag("--lora-alpha", type=v10.POSITIVE, help="an addition's weight is alpha / rank (twice the rank)")
            flag("--uncut", type=v10.PATH, help="the model that it was cut from, if it is not beside it")
            flag("--on", type=v10.PATH, help="another text, to train and to report on; its last fifth is held out")
            flag("--steps", type=v10.COUNT, default=200, help="of AdamW, its rate falling to 0 along a cosine (200)")
            flag("--lr", type=v10.POSITIVE, default=1e-4, help="the highest rate (1e-4)")
            flag("--weight-decay", type=number(float, least=0), default=0.01, help="AdamW's (0.01)")
            flag("--batch-size", type=v10.COUNT, default=16, help="blocks per step (16)")
            flag("--dropout", type=v10.FRACTION, default=0.1, help="while it trains (0.1)")
        else:
            flag("--only", choices=("linear", "ends", "all"), default="all", help="ends: embedding and head (all)")
            flag("--calibration", type=v10.PATH, help="another text to measure the metrics on")
            flag("--tokens", type=v10.COUNT, default=16_384, help="calibration tokens (16,384)")
        if name in ("fit", "cut"):
            flag("--metric", choices=METRICS, default="fisher", help="what a cut loses (fisher)")
            flag("--allocate", choices=("uniform", "energy", "global"), default="global",
                 help="one share of the parameters or of the energy for all, or one budget over all (global)")
            flag("--dense", action="store_true", help="multiply the factors out again")
            flag("--export", type=v10.PATH, metavar="NAME.safetensors", help="also write the weights there")
        if name != "compare":
            kind = "tuned" if name == "tune" else "cut"
            flag("--out", type=v10.PATH, help=f"the new model (NAME.{kind}.pt beside the checkpoint)")
            flag("--overwrite", action="store_true", help="replace an existing --out")
        flag("--data-file", type=v10.PATH, help="the training text, if it is not where the checkpoint says")
        flag("--val-fraction", type=share, help="as in the training run, if the checkpoint does not say")
        flag("--min-count", type=v10.COUNT, help="as in the training run, if the checkpoint does not say")
        flag("--seed", type=number(int, least=0, below=2**63), default=0, help="of batches and labels (0)")
        flag("--log-file", type=v10.PATH, default="logs/compress.jsonl", help="a record per command is added to it "
             "(logs/compress.jsonl)")
    flag = command("spectrum", spectrum)
    flag("files", nargs="+", metavar="FILE", help="a checkpoint, any .pt of tensors, .safetensors or its index")
    flag("--log-file", type=v10.PATH, help="a record per file is added to it")
    return parser


def check(args):
    """Fill in --out, and raise UserError for names that cannot be written, or are those of other files."""
    flags = vars(args)
    if "out" in flags:
        path, kind = Path(args.checkpoint), "tuned" if args.command == "tune" else "cut"
        args.out = args.out or str(path.with_name(f"{path.name.removesuffix('.pt')}.{kind}.pt"))
    written = [(flag, Path(flags[name])) for name, flag in (("out", "--out"), ("export", "--export"),
                                                            ("log_file", "--log-file")) if flags.get(name) is not None]
    read = [Path(flags[name]) for name in ("checkpoint", "data_file", "calibration", "uncut", "on") if flags.get(name)]
    for flag, path in written:
        if not path.name or path.is_dir() or Path("/dev") in path.absolute().parents:
            raise UserError(f"{flag} needs the name of a file, not {str(path)!r}")
        others = [other for _, other in written if other is not path] + read + [Path(f) for f in flags.get("files", [])]
        if os.path.realpath(path) in map(os.path.realpath, others):
            raise UserError(f"{flag} {path} is one of the other files: choose another name")
        if flag != "--log-file" and path.exists() and not args.overwrite:
            raise UserError(f"{path} exists: --overwrite replaces it, {flag} NAME writes elsewhere")
        if flag == "--out" and path.exists() and not zipfile.is_zipfile(path):
            raise UserError(f"{path} is not a checkpoint: choose another --out")
        with v10.writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            if flag == "--log-file" and path.exists():
                with open(path, "r+b") as log:  # which also says whether it can be written
                    if log.read(20) not in (b"", b'{"kind": "compress",'):
                        raise UserError(f"{path} is not a log of compress.py: choose another --log-file")
            else:
                v10.temporary(path).touch()
                v10.temporary(path).unlink()


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
    except torch.linalg.LinAlgError as error:
        print(f"compress.py: error: a decomposition failed, so the weights are out of bounds: {error}", file=sys.stderr)
        return 1
    except (RuntimeError, MemoryError) as error:
        if not v10.out_of_memory(error):
            raise
        advice = "a smaller --batch-size" if args.command == "tune" else "fewer --tokens, or --only linear"
        print(f"compress.py: error: out of memory: try {advice}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("compress.py: interrupted", file=sys.stderr)
        return 130


if __name__ == "__main__":
    v10.leave(main())
