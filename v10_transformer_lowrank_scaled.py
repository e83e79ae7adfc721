"""Adaptive Low-Rank Training (ALRT), v10: a GPT that finds the ranks of its own linear layers while it trains.

Every linear layer of the transformer's blocks is a product of two thin factors, W = U V with U (out, r) and V (r, in).
Once per epoch each layer's stable rank is estimated,

    stable_rank(W) = ||W||_F^2 / sigma_max(W)^2,

a controller smooths it and proposes a new rank, and the factors are resized by an SVD that is computed from the
factors alone: W itself is never formed. The method is that of the technical report "Adaptive Low-Rank Training via
Spectral Rank Estimation" (December 2025); "report 2.3" below is its section 2.3.

    python3 v10_transformer_lowrank_scaled.py                              the report's configuration, causal
    python3 v10_transformer_lowrank_scaled.py --init-rank 64 --min-rank 8  the same, spelled out
    python3 v10_transformer_lowrank_scaled.py --attention bidirectional    the report's setup, with its leak
    python3 v10_transformer_lowrank_scaled.py --resume                     go on after an interruption

What it is not: a way to a perplexity of 3.17. That comes without a causal mask, which the report does not name: the
model then sees the word that it has to predict. Here attention is causal unless asked otherwise, and every run begins
with a check.

The script has four parts: the method, after which a reader can stop; training; machinery (processes, devices, the
screen, files); and the command line.

Shapes: B batch, T tokens, C channels (d_model), R rank, V words in the vocabulary; a factored layer has m outputs and
n inputs. Losses are in nats per token.
"""
import argparse
import contextlib
import ctypes
import gc
import hashlib
import itertools
import json
import math
import os
import platform
import re
import shlex
import signal
import sys
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from statistics import fmean
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

try:
    import fcntl
except ImportError:  # Windows: two runs on one log go unnoticed there
    fcntl = None

# ==== Part 1: the method ==============================================================================================

# ---- Spectra of W = U V, without W (on the CPU: the matrices are small, and not every device has decompositions) -----

def stable_rank(U: Tensor, V: Tensor, iterations: int = 0, generator: torch.Generator | None = None) -> float:
    """||W||_F^2 / sigma_max^2 of W = U V as a float; 0 for W = 0.

    iterations > 0: the report's estimate (2.2, A.1), power iteration from a random vector of n numbers. It gives what
    the same iteration through W gives, in O((m + n) r) per iteration. It under-states sigma_max and so over-states the
    stable rank, by about 13% for 5 iterations on freshly initialised factors.
    iterations = 0: the exact value, from the singular values of the r x r core (see product_svd).
    """
    if iterations == 0:
        return stable_rank_of(product_singular_values(U, V))
    G_u, G_v = U.mT @ U, V @ V.mT  # (R, R)
    x = torch.randn(V.shape[1], dtype=V.dtype, generator=generator)
    for _ in range(iterations):
        x = F.normalize(V.mT @ (G_u @ (V @ x)), dim=0)  # W^T W x
    sigma_squared = (U @ (V @ x)).square().sum()
    return ((G_u * G_v).sum() / sigma_squared).item() if sigma_squared > 0 else 0.0


def stable_rank_of(S: Tensor) -> float:
    """The stable rank of a matrix with these singular values (R,), descending."""
    return (S.square().sum() / S[0].square()).item() if S[0] > 0 else 0.0


def product_singular_values(U: Tensor, V: Tensor) -> Tensor:
    """Those of U V, descending, from its r x r core as in product_svd."""
    return torch.linalg.svdvals(torch.linalg.qr(U, mode="r").R @ torch.linalg.qr(V.mT, mode="r").R.mT)


def product_svd(U: Tensor, V: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The SVD of U V in O((m + n) r^2) -> P (m, R), S (R,) descending, Qt (R, n) with U V = P diag(S) Qt.

    U = Q_u R_u and V^T = Q_v R_v by QR; the rest is the SVD of the r x r core R_u R_v^T.
    """
    Q_u, R_u = torch.linalg.qr(U)
    Q_v, R_v = torch.linalg.qr(V.mT)
    P, S, Qt = torch.linalg.svd(R_u @ R_v.mT)
    return Q_u @ P, S, Qt @ Q_v.mT


def on_threads(function, pairs: list) -> list:
    """[function(a, b) for each pair], several at a time on one thread each: within a decomposition of small matrices
    threads mostly wait for each other. Each has to be told so itself: else its results vary in the last bits."""
    threads = torch.get_num_threads()
    try:
        with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            return list(pool.map(function, *zip(*pairs, strict=True)))
    finally:
        torch.set_num_threads(threads)


def balanced_factors(U: Tensor, V: Tensor, P: Tensor, S: Tensor, Qt: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Split leading singular values of U V evenly -> U' = P S^1/2 and V' = S^1/2 Q^T, and the maps A = V V'^T S^-1 and
    B = S^-1 U'^T U with which U' = U A and V' = B V."""
    new_U, new_V = P * S.sqrt(), S.sqrt()[:, None] * Qt
    return new_U, new_V, V @ new_V.mT / S, new_U.mT @ U / S[:, None]


def dense_factors(W: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The best approximation U V of rank k of a dense W (m, n), its singular values evenly split."""
    P, S, Qt = torch.linalg.svd(W, full_matrices=False)
    return P[:, :k] * S[:k].sqrt(), S[:k].sqrt()[:, None] * Qt[:k]


def resize_factors(U: Tensor, V: Tensor, k: int, generator: torch.Generator, svd: tuple | None = None) -> tuple:
    """Factors of rank k for W = U V (report 2.4) -> (U' (m, k), V' (k, n), A (r, k), B (k, r), carried).

    U' = U A and V' = B V in the first `carried` directions; the others are new, and zero in A and B. `svd` is
    product_svd's result, if it is known already.

    Shrinking keeps the k largest singular values and splits them evenly: U' = P_k S_k^1/2, V' = S_k^1/2 Q_k^T, the best
    approximation of rank k (Eckart and Young); A = V V'^T S_k^-1 and B = S_k^-1 U'^T U, so no factor is inverted. A
    direction below 1e-5 sigma_1 is rounding, not memory (in float32): it is grown afresh.

    Growing leaves the factors and W as they are, bit for bit. An SVD could only append a zero singular value, whose
    vectors in U and V are both zero and never learn. So the new rows of V are random, orthogonal to all other rows, of
    their mean norm, and the new columns of U are zero: W stays, and the gradient reaches U at once.
    """
    r = carried = U.shape[1]
    A = B = torch.eye(r, dtype=U.dtype)
    kept_U, kept_V, scale = U, V, V.norm(dim=1).mean()
    if k < r:
        P, S, Qt = svd or product_svd(U, V)
        negligible = 1e-5 * torch.finfo(S.dtype).eps / torch.finfo(torch.float32).eps
        carried = min(k, int((S > negligible * S[0]).sum()))
        P, S, Qt = P[:, :carried], S[:carried], Qt[:carried]
        kept_U, kept_V, A, B = balanced_factors(U, V, P, S, Qt)
        scale = kept_V.norm(dim=1).mean() if carried else scale
    new = k - carried
    if not new:
        return kept_U, kept_V, A, B, carried
    noise = torch.randn(V.shape[1], new, dtype=V.dtype, generator=generator)
    rows = scale * torch.linalg.qr(torch.cat([kept_V.mT, noise], dim=1)).Q[:, carried:].mT  # (new, n)
    return F.pad(kept_U, (0, new)), torch.cat([kept_V, rows]), F.pad(A, (0, new)), F.pad(B, (0, 0, 0, new)), carried


# ---- The low-rank layer, and its dense control -----------------------------------------------------------------------

class LowRankLinearAdaptiveSpectral(nn.Module):
    """x (..., n) -> x V^T U^T (..., m), without bias (report 2.1). The rank is U's width and is stored nowhere else.

    At initialisation U ~ N(0, 1/m) and V ~ N(0, 1/n) (variances). U lies in memory column by column: its products, and
    above all that of its gradient, are faster that way.
    """

    def __init__(self, in_features, out_features, rank):
        super().__init__()
        self.U = nn.Parameter(by_columns(torch.randn(out_features, rank) / math.sqrt(out_features)))  # (m, R)
        self.V = nn.Parameter(torch.randn(rank, in_features) / math.sqrt(in_features))  # (R, n)

    @property
    def rank(self):
        return self.U.shape[1]

    @property
    def shape(self):
        """(m, n), the shape of W."""
        return self.U.shape[0], self.V.shape[1]

    def factors(self):
        """U and V, detached and on the CPU."""
        return self.U.detach().cpu(), self.V.detach().cpu()

    def forward(self, x):
        return F.linear(F.linear(x, self.V), self.U)  # (..., n) -> (..., R) -> (..., m)

    def set_factors(self, U, V):
        """Replace both factors. The Parameters stay the same objects, so no optimizer group has to change."""
        U = U.contiguous() if self.U.device.type == "mps" else by_columns(U)  # see place()
        for parameter, value in ((self.U, U), (self.V, V.contiguous())):
            parameter.data = value.to(parameter.device)
            parameter.grad = None


def by_columns(matrix):
    """The same matrix, in memory column by column."""
    return matrix.T.contiguous().T


class DenseLinear(nn.Linear):
    """x (..., n) -> x W^T (..., m), without bias, with PyTorch's own initialisation."""

    rank = None  # it is dense

    def __init__(self, in_features, out_features):
        super().__init__(in_features, out_features, bias=False)

    @property
    def shape(self):
        """(m, n), the shape of W."""
        return tuple(self.weight.shape)

    def factors(self):
        """W as a product of two matrices of full rank, I W or W I, so that the spectra above apply to it."""
        W = self.weight.detach().cpu()
        identity = torch.eye(min(W.shape), dtype=W.dtype)
        return (identity, W) if W.shape[0] <= W.shape[1] else (W, identity)


# ---- The rank controller ---------------------------------------------------------------------------------------------

class Decision(NamedTuple):
    """What a controller decides for a layer. The reason is `keep` (the smoothed target is within the threshold), `slew`
    (the step was cut to max_step), `step` (it was not), `min` or `max` (the new rank is that bound)."""

    rank: int
    ema: float  # the smoothed target, for the next call
    target: float
    reason: str


@dataclass(frozen=True)
class RankController:
    """Proposes a layer's next rank from its stable rank (report 2.3). It holds settings; the state is passed in."""

    safety_factor: float = 1.5
    ema_decay: float = 0.8
    change_threshold: float = 2.0
    max_step: int = 4
    min_rank: int = 8
    max_rank: float = math.inf

    def propose(self, rank: int, ema: float, stable_rank: float) -> Decision:
        """-> Decision; a pure function. `ema` is the last one, at first the initial rank."""
        target = min(max(self.safety_factor * stable_rank, self.min_rank), self.max_rank)
        ema = self.ema_decay * ema + (1 - self.ema_decay) * target
        d = ema - rank
        if abs(d) < self.change_threshold:
            return Decision(rank, ema, target, "keep")
        new = rank + min(max(round(d), -self.max_step), self.max_step)
        if new <= self.min_rank:
            return Decision(self.min_rank, ema, target, "min")
        if new >= self.max_rank:
            return Decision(self.max_rank, ema, target, "max")
        return Decision(new, ema, target, "slew" if abs(round(d)) > self.max_step else "step")


# ---- The model: a pre-LayerNorm GPT (report 3.1) ---------------------------------------------------------------------

@dataclass(frozen=True)
class GPTConfig:
    vocab_size: int
    d_model: int = 512
    n_layers: int = 6
    n_heads: int = 8
    d_ff: int = 2048
    block_size: int = 256
    attention: str = "causal"
    dropout: float = 0.0
    tokenize: str = "words"
    tie_embeddings: bool = False
    share_layers: bool = False

    @classmethod
    def of_flags(cls, args: argparse.Namespace, vocab_size: int) -> "GPTConfig":
        """Each setting but the vocabulary's size has a flag of its own name."""
        return cls(vocab_size, *(getattr(args, setting.name) for setting in fields(cls)[1:]))


def attention(q: Tensor, k: Tensor, v: Tensor, causal: bool, dropout: float) -> Tensor:
    """softmax(q k^T / sqrt(d)) v, causal or not, for q, k, v (B, heads, T, d): PyTorch's, but for two weak spots."""
    T, device, mask = q.shape[2], q.device.type, None
    if device == "cpu" and q.dtype == torch.bfloat16 and T <= 1024:  # written out it takes half the time
        scores = (q * q.shape[3] ** -0.5) @ k.mT  # (B, heads, T, T)
        if causal:
            scores = scores + torch.full((T, T), -math.inf, dtype=q.dtype).triu(1)
        return F.dropout(scores.softmax(-1), dropout) @ v
    if device == "mps":  # Metal's attention has been wrong on strided inputs, and in half precision with
        q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
        if causal and q.dtype != torch.float32:  # is_causal could see future keys (pytorch#195910)
            causal, mask = False, torch.ones(T, T, dtype=torch.bool, device=q.device).tril()
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal, dropout_p=dropout)


class Block(nn.Module):
    """Attention and feed-forward, (B, T, C) -> (B, T, C). `linear(n, m)` makes each of its six linear layers."""

    def __init__(self, config, linear):
        super().__init__()
        C = config.d_model
        self.config = config
        self.norm_1, self.norm_2 = nn.LayerNorm(C), nn.LayerNorm(C)
        self.q, self.k, self.v, self.o = (linear(C, C) for _ in range(4))
        self.up, self.down = linear(C, config.d_ff), linear(config.d_ff, C)
        self.drop = nn.Dropout(config.dropout)

    def attend(self, x):
        B, T, C = x.shape
        q, k, v = (layer(x).view(B, T, self.config.n_heads, -1).transpose(1, 2)
                   for layer in (self.q, self.k, self.v))  # (B, heads, T, C / heads)
        y = attention(q, k, v, self.config.attention == "causal", self.drop.p if self.training else 0.0)
        return self.o(y.transpose(1, 2).reshape(B, T, C))

    def forward(self, x):
        x = x + self.drop(self.attend(self.norm_1(x)))
        return x + self.drop(self.down(F.gelu(self.up(self.norm_2(x)))))


class LowRankEmbedding(nn.Module):
    """Tokens (...) -> rows of U V (..., C), for U (V, R) and V (R, C): what compress.py makes of a token embedding."""

    def __init__(self, words, width, rank):
        super().__init__()
        self.U, self.V = nn.Parameter(torch.zeros(words, rank)), nn.Parameter(torch.zeros(rank, width))

    def forward(self, tokens):
        return F.linear(F.embedding(tokens, self.U), self.V.T)


class LowRankHead(nn.Module):
    """x (..., C) -> x V^T U^T + b (..., V), for U (V, R) and V (R, C): what compress.py makes of a head."""

    def __init__(self, width, words, rank):
        super().__init__()
        self.U, self.V = nn.Parameter(torch.zeros(words, rank)), nn.Parameter(torch.zeros(rank, width))
        self.bias = nn.Parameter(torch.zeros(words))

    def forward(self, x):
        return F.linear(F.linear(x, self.V), self.U, self.bias)


def in_order(layers):
    """A `linear` that gives the layers of a dict, one after another, instead of new ones."""
    left = iter(layers.values())
    return lambda n, m: next(left)


class GPT(nn.Module):
    """Tokens (B, T) -> logits (B, T, V) in float32; with targets (B, T) -> their mean cross entropy, a scalar.

    `linear(n, m)` makes the linear layers of its blocks. What does not depend on it is drawn first, so that models of
    one seed share it bit for bit. A tied head is the token embedding's own matrix, of variance 1/C; reading a token
    multiplies its row by sqrt(C), so that blocks start from the same inputs either way. Shared layers are those of the
    first block, in all of them. `end_ranks` are those of embedding and head in a model that compress.py has cut.
    """

    def __init__(self, config, linear, end_ranks=(None, None)):
        super().__init__()
        self.config = config
        self.low_precision = False  # products under bfloat16 autocast; parameters and loss stay in float32
        for_words, for_head = end_ranks
        self.token_embedding = (nn.Embedding(config.vocab_size, config.d_model) if for_words is None else
                                LowRankEmbedding(config.vocab_size, config.d_model, for_words))
        self.position_embedding = nn.Embedding(config.block_size, config.d_model)
        self.head = (nn.Linear(config.d_model, config.vocab_size) if for_head is None else
                     LowRankHead(config.d_model, config.vocab_size, for_head))
        self.norm = nn.LayerNorm(config.d_model)
        self.drop = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList([Block(config, linear)])
        for _ in range(1, config.n_layers):
            self.blocks.append(Block(config, in_order(self.linears()) if config.share_layers else linear))
        if config.tie_embeddings and for_head is None:
            self.token_embedding.weight.data /= math.sqrt(config.d_model)
            self.head.weight = self.token_embedding.weight
        elif config.tie_embeddings:
            self.head.U, self.head.V = self.token_embedding.U, self.token_embedding.V

    def features(self, tokens):
        """(B, T) -> (B, T, C), what the head sees."""
        with torch.autocast(tokens.device.type, torch.bfloat16, enabled=self.low_precision):
            x = self.token_embedding(tokens)  # (B, T, C)
            if self.config.tie_embeddings:
                x = x * math.sqrt(self.config.d_model)
            x = self.drop(x + self.position_embedding.weight[:tokens.shape[1]])
            for block in self.blocks:
                x = block(x)
            return self.norm(x)

    def logits(self, x):
        """(B, T, C) -> (B, T, V) in float32."""
        with torch.autocast(x.device.type, torch.bfloat16, enabled=self.low_precision):
            return self.head(x).float()

    def forward(self, tokens, targets=None):
        x = self.features(tokens)
        return self.logits(x) if targets is None else self.loss(x, targets)

    def loss(self, x, targets):
        """(B, T, C), targets (B, T) -> their mean cross entropy."""
        if isinstance(self.head, nn.Linear):
            W = self.head.weight
        else:
            x, W = F.linear(x, self.head.V), self.head.U
        return LinearCrossEntropy.apply(x.flatten(0, 1), W, self.head.bias, targets.flatten(),
                                        torch.bfloat16 if self.low_precision else x.dtype, torch.is_grad_enabled())

    def linears(self):
        """{name: layer} of the linear layers in the blocks, such as 0.q, in the order of every list in the log."""
        return {name: module for name, module in self.blocks.named_modules() if hasattr(module, "factors")}

    def ranks(self):
        """The ranks of the factored layers, in the same order; [] for a dense model."""
        return [layer.rank for layer in self.linears().values() if layer.rank is not None]

    def end_ranks(self):
        """The ranks of embedding and head, None for one that is not factored."""
        return [end.U.shape[1] if hasattr(end, "U") else None for end in (self.token_embedding, self.head)]


def count_parameters(*modules: nn.Module) -> int:
    return sum(parameter.numel() for module in modules for parameter in module.parameters())


def leak_check(model: GPT) -> dict:
    """Can a position see later ones? Change the tokens after a position and compare the logits up to it, three times.

    -> {"leaks": bool, "max_change": the largest change of a logit over the largest logit}.
    """
    T, n_words, device = model.config.block_size, model.config.vocab_size, model.norm.weight.device
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(n_words, (1, T), generator=generator).repeat(4, 1)
    last_kept = (0, T // 2 - 1, T - 2)
    for row, t in enumerate(last_kept, start=1):
        tokens[row, t + 1:] += torch.randint(1, n_words, (T - 1 - t,), generator=generator)
    change = largest = 0.0
    tile = max(1, LOGITS_BYTES // (32 * n_words))  # positions: with a large vocabulary not all logits fit at once
    with evaluation_mode(model):  # each text in a batch of its own, twice: beside others it might round differently
        xs = [model.features(row.expand(2, T)) for row in tokens.remainder(n_words).to(device)]  # (2, T, C) each
        for i in range(0, T, tile):
            original, *changed = [model.logits(x[:, i:i + tile]) for x in xs]  # (2, tile, V) each
            largest = max(largest, original.abs().max().item())
            change = max([change, *((logits - original)[:, :t + 1 - i].abs().max().item()
                                    for logits, t in zip(changed, last_kept, strict=True) if i <= t)])
    change /= largest
    return {"leaks": change > (1e-3 if model.low_precision else 1e-5), "max_change": change}


# ---- The optimizer, and what becomes of it when a rank changes -------------------------------------------------------

def make_adamw(parameters, args: argparse.Namespace) -> torch.optim.AdamW:
    """AdamW with weight decay on all of these parameters, as in the report (3.2).

    `moments` is what transport_moments asks of any optimizer: which of its states are moments of a parameter's
    gradient, and the power of the gradient that they average.
    """
    parameters = list(parameters)
    optimizer = torch.optim.AdamW(parameters, lr=args.lr, weight_decay=args.weight_decay,
                                  fused=parameters[0].device.type in ("cpu", "cuda"))
    optimizer.moments = {"exp_avg": 1, "exp_avg_sq": 2}
    return optimizer


def learning_rate(step, rate, args):
    """The learning rate of step 0, 1, 2, ... for a parameter group whose own is `rate`, in three phases."""
    total_steps = args.epochs * args.steps_per_epoch
    warmup_steps = total_steps // 20 if args.warmup_steps is None else args.warmup_steps
    # 1) linear warm-up from rate / warmup_steps to rate
    if step < warmup_steps:
        return rate * (step + 1) / warmup_steps
    # 2) then constant
    if args.lr_schedule == "constant":
        return rate
    # 3) or half a cosine from rate to 0 at the end of the run
    done = (step - warmup_steps) / (total_steps - warmup_steps)
    return rate * 0.5 * (1 + math.cos(math.pi * done))


def lying_as(parameter, moment):
    """A moment on its parameter's device, in memory as the parameter lies: fused AdamW asks for that, and would mix
    them up without a word."""
    return torch.empty_like(parameter, dtype=moment.dtype, requires_grad=False).copy_(moment)


def transport_moments(optimizer, layer, A, B, carried):
    """Carry an optimizer's moments to the factors that a layer has been given; A, B and carried are resize_factors'.

    With G = dL/dW, dL/dU = G V^T and dL/dV = U^T G. For U' = U A and V' = B V these become (dL/dU) B^T and A^T (dL/dV),
    so m_U' = m_U B^T and m_V' = A^T m_V are exact first moments for the same history of G. Second moments have no exact
    rule; mapping them by the squared entries of A and B is a heuristic. A new direction gets first moment zero and the
    mean second moment of the others: under an old step count, zeros would make Adam's first steps several times lr.
    """
    for parameter, carry, dim in ((layer.U, lambda moment, power: moment @ B.pow(power).mT, 1),
                                  (layer.V, lambda moment, power: A.pow(power).mT @ moment, 0)):
        state = optimizer.state.get(parameter, {})
        for name in state.keys() & optimizer.moments.keys():
            power, old = optimizer.moments[name], state[name].cpu()
            moment = carry(old, power)
            if power == 2:
                known = moment.narrow(dim, 0, carried) if carried else old
                moment.narrow(dim, carried, moment.shape[dim] - carried).copy_(known.mean(dim, keepdim=True))
            state[name] = lying_as(parameter, moment)


NO_UPDATE = {"stable_ranks": [], "stable_ranks_exact": [], "targets": [], "ema": [], "reasons": []}


def update_ranks(layers, controllers, ema, optimizers, args, generator):
    """Measure each layer; if there are controllers, let them decide, and resize.

    -> (what the log keeps of it, how many layers were resized). Process 0 does the work and shares the new factors.
    """
    update, resized = once(plan_ranks, layers, controllers, ema, args.power_iterations, generator)
    if not resized:
        return update, 0
    transported = args.optimizer_on_resize == "transport"
    apply_resizes(layers, resized, optimizers if transported else [])
    for optimizer in [] if transported else optimizers:
        optimizer.state.clear()  # report A.2: the state of every parameter is lost
    return update, len(resized)


def apply_resizes(layers, resized, optimizers):
    """Give layers their new factors, {index: what resize_factors gives}, and carry these optimizers' moments along."""
    for i, (U, V, *maps) in resized.items():
        layers[i].set_factors(U, V)
        for optimizer in optimizers:
            transport_moments(optimizer, layers[i], *maps)


def finite_factors(layers) -> list:
    """[(U, V) of each layer]. Raises TrainingError if they have grown too large for a spectrum."""
    factors = [layer.factors() for layer in layers]
    if not all(torch.isfinite(U.square().sum() * V.square().sum()) for U, V in factors):  # an upper bound of ||W||_F^2
        raise TrainingError(f"the weights of a linear layer have grown beyond what float32 can hold: {ADVICE}")
    return factors


def plan_ranks(layers, controllers, ema, power_iterations, generator):
    """update_ranks without its effects -> (what the log keeps, {index of a layer: what resize_factors gives})."""
    factors = finite_factors(layers)
    svds = on_threads(product_svd, factors) if controllers else []  # for the exact stable ranks and the resizes
    exact = [stable_rank_of(S) for _, S, _ in svds] or on_threads(stable_rank, factors)
    measured = [stable_rank(U, V, power_iterations, generator) for U, V in factors] if power_iterations else exact
    update = NO_UPDATE | {"stable_ranks": measured, "stable_ranks_exact": exact}
    if not controllers:
        return update, {}
    decisions = [controller.propose(layer.rank, *values) for controller, layer, *values
                 in zip(controllers, layers, ema, measured, strict=True)]
    update |= {"targets": [d.target for d in decisions], "ema": [d.ema for d in decisions],
               "reasons": [d.reason for d in decisions]}
    return update, {i: resize_factors(*factors[i], decision.rank, generator, svds[i])
                    for i, decision in enumerate(decisions) if decision.rank != layers[i].rank}


# ==== Part 2: training ================================================================================================

HERE = Path(__file__).resolve().parent
DEFAULT_DATA = "wiki.train.tokens"


class UserError(ValueError):
    """A mistake of the user's: main() prints it in one line and returns 2."""


class TrainingError(RuntimeError):
    """A run that cannot go on: main() prints it in one line and returns 1."""


ADVICE = "try a smaller --lr (and --eta), --warmup-steps 100 or --grad-clip 1"  # if training diverges


# ---- Data: a text, or a file of tokens; the last part is held out ----------------------------------------------------

def read_words(path: Path, tokenize: str = "words") -> tuple[list[str], str]:
    """-> (the text's words, characters or bytes, SHA-256 of the file): whitespace-separated words, or each character
    or byte, a byte as the character of that number. Raises UserError for what is not readable UTF-8 text; bytes may be
    anything."""
    try:
        data = path.read_bytes()
        text = data.decode("latin-1" if tokenize == "bytes" else "utf-8")
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text: its byte {error.start} cannot be decoded") from None
    if b"\0" in data and tokenize != "bytes":
        raise UserError(f"{path} is not text: its byte {data.index(0)} is zero")
    if tokenize != "bytes":
        text = text.removeprefix("\ufeff")  # a byte order mark
    return text.split() if tokenize == "words" else list(text), hashlib.sha256(data).hexdigest()


def encode(words: list[str], vocabulary: list[str]) -> Tensor:
    """Words -> tokens (N,); words outside the vocabulary become <unk>. Raises UserError if it has none."""
    index = {word: i for i, word in enumerate(vocabulary)}
    unknown = index.get("<unk>")
    tokens = [index.get(word, unknown) for word in words]
    if unknown is None and None in tokens:
        word = words[tokens.index(None)]
        advice = "; trained with --min-count 2 or more, it has" if isinstance(word, str) else ""
        raise UserError(f"{str(word)[:40]!r} is not in the training vocabulary, which has no <unk> for it{advice}")
    return torch.tensor(tokens, dtype=torch.long)


class TokenFile:
    """Tokens (N,) that stay in their file: indexing reads some of them, as an ordinary tensor (int64). Raises UserError
    for one beyond the vocabulary."""

    device, is_cuda = torch.device("cpu"), False

    def __init__(self, path: Path, tokens: np.memmap, vocab_size: int):
        self.path, self.tokens, self.vocab_size = path, tokens, vocab_size

    def tensor_split(self, places):
        """As a tensor's: the parts between these places, nothing read yet."""
        return [TokenFile(self.path, part, self.vocab_size) for part in np.split(self.tokens, places)]

    def to(self, device):
        return self

    def __len__(self):
        return len(self.tokens)

    def __getitem__(self, where):
        where = where.numpy() if isinstance(where, Tensor) else where
        tokens = torch.from_numpy(self.tokens[where].astype(np.int64))
        if tokens.numel() and tokens.max() >= self.vocab_size:
            raise UserError(f"{self.path} has the token {tokens.max():,}, beyond its vocabulary of {self.vocab_size:,}")
        return tokens


def split(tokens: Tensor | TokenFile, val_fraction: float) -> tuple:
    """Tokens (N,) -> those that train, and the rest, which validate."""
    return tokens.tensor_split([int((1 - val_fraction) * len(tokens))])


class Corpus(NamedTuple):
    """A text, ready for training."""

    train: Tensor | TokenFile  # tokens (N,)
    val: Tensor | TokenFile  # tokens (N,)
    vocabulary: list  # sorted words, or the numbers of tokens whose words are not known
    sha256: str  # of the text
    entropy_floor: float | None  # the loss of the true generator, if the text is synthetic
    tokenize: str  # what a token is


def load_corpus(path: Path, val_fraction: float, block_size: int, tokenize: str = "words", min_count: int = 1,
                vocab_size: int | None = None, val_tokens: int | None = None) -> Corpus:
    """A text, or tokens as data/prepare.py, nanoGPT or modded-nanogpt write them -> Corpus. Words that occur fewer than
    min_count times in a text become <unk>. Tokens without a vocabulary need its size. No more than val_tokens validate.

    Raises UserError if a part is shorter than a block and its last target.
    """
    if holds_tokens(path):
        corpus = read_token_files(path, val_fraction, vocab_size)
    elif vocab_size:
        raise UserError(f"--vocab-size is for tokens without a vocabulary, and {path} is not a file of them: it would "
                        "begin with modded-nanogpt's header; nanoGPT's train.bin and val.bin go by the name of their "
                        "folder")
    else:
        words, sha256 = read_words(path, tokenize)
        if min_count > 1:
            count = Counter(words)
            words = [word if count[word] >= min_count else "<unk>" for word in words]
        vocabulary = sorted(set(words))
        known = (sha256, val_fraction, tokenize, min_count)
        floor = entropy_floor(lambda: json.loads(path.with_suffix(".json").read_text(encoding="utf-8")),
                              lambda sidecar: known == (sidecar["sha256"], sidecar["val_fraction"], "words", 1))
        corpus = Corpus(*split(encode(words, vocabulary), val_fraction), vocabulary, sha256, floor, tokenize)
    hint = ", or --tokenize chars if it has no spaces" if corpus.tokenize == "words" else ""
    for name, tokens in (("training", corpus.train), ("validation", corpus.val)):
        if len(tokens) <= block_size:
            raise UserError(f"{path} gives {len(tokens):,} {name} tokens, and a block needs {block_size + 1:,}: "
                            f"use a longer text, a smaller --block-size or another --val-fraction{hint}")
    if len(corpus.vocabulary) < 2:
        raise UserError(f"{path} repeats a single word, {corpus.vocabulary[0][:40]!r}: there is nothing to learn in it")
    if val_tokens is not None and val_tokens < len(corpus.val):
        corpus = corpus._replace(val=corpus.val[:val_tokens], entropy_floor=None)  # which is that of all of them
    return corpus


def entropy_floor(read, fits):
    """The entropy that a sidecar gives, if it fits the text; else None."""
    try:
        sidecar = read()
        return sidecar["entropy_floor"] if fits(sidecar) and math.isfinite(sidecar["entropy_floor"]) else None
    except (OSError, ValueError, LookupError, TypeError, ArithmeticError, RecursionError):
        return None  # no sidecar, or a file that is something else


FIRST_LOOK = 2**20  # tokens whose size is checked before training; that of all others is when they are read
MAGIC = np.array([20240520, 1], "<i4").tobytes()  # a file of modded-nanogpt begins with it


def holds_tokens(path):
    """Is it a folder, or a file of tokens?"""
    if path.is_file():
        with contextlib.suppress(OSError), path.open("rb") as file:
            return file.read(len(MAGIC)) == MAGIC
    return path.is_dir()


def read_token_files(path, val_fraction, vocab_size):
    """Tokens -> Corpus, with no look at most of them. Raises UserError."""
    index = path / "corpus.json"
    try:
        return read_prepared(index, val_fraction, vocab_size) if index.is_file() else read_numbers(
            path, val_fraction, vocab_size)
    except OSError as error:
        raise UserError(f"cannot read {error.filename or path}: {error.strerror}") from None


def token_file(path, dtype, vocab_size, offset=0, expected=None):
    """A TokenFile, of as many tokens as are expected. Raises UserError."""
    n, rest = divmod(path.stat().st_size - offset, np.dtype(dtype).itemsize)
    if n < 1 or rest or expected not in (None, n):
        raise UserError(f"{path} is cut off or damaged: its {path.stat().st_size:,} bytes are not "
                        + ("whole tokens" if expected is None else f"those of {expected:,} tokens"))
    return TokenFile(path, np.memmap(path, dtype, "r", offset), vocab_size)


def read_numbered(path, vocab_size):
    """A file of modded-nanogpt's: 256 numbers of 4 bytes, the third of them the number of tokens, then the tokens."""
    n = int(np.fromfile(path, "<i4", 3)[-1])
    return token_file(path, "<u2", vocab_size, offset=1024, expected=n)


def read_prepared(index, val_fraction, vocab_size):
    """A folder of data/prepare.py's, whose corpus.json is `index`."""
    if vocab_size:
        raise UserError(f"--vocab-size is for tokens without a vocabulary, and {index.parent} has one")
    data = index.read_bytes()
    try:
        content = json.loads(data)
        vocabulary, n, tokenize = content["vocabulary"], content["tokens"], content["tokenize"]
        dtype = {2: "<u2", 4: "<u4"}[content["bytes_per_token"]]
        if not (content["format"] == 1 and type(n) is int and tokenize in ("words", "chars", "bytes")
                and type(vocabulary) is list and {*map(type, vocabulary)} == {str}
                and len(set(vocabulary)) == len(vocabulary)):
            raise ValueError
    except (ValueError, LookupError, TypeError, RecursionError):
        raise UserError(f"{index} is damaged: data/prepare.py writes it anew") from None
    tokens = token_file(index.with_name("tokens.bin"), dtype, len(vocabulary), expected=n)
    floor = entropy_floor(lambda: content, lambda content: content["val_fraction"] == val_fraction)
    return Corpus(*split(tokens, val_fraction), vocabulary, hashlib.sha256(data).hexdigest(), floor, tokenize)


def read_numbers(path, val_fraction, vocab_size):
    """A folder with nanoGPT's train.bin and val.bin, or a file of modded-nanogpt's: neither has a vocabulary."""
    files = [path / "train.bin", path / "val.bin"] if path.is_dir() else [path]
    if not all(file.is_file() for file in files):
        raise UserError(f"{path} is a folder with neither a corpus.json, as data/prepare.py writes it, nor a train.bin "
                        "and a val.bin, as nanoGPT does")
    if not vocab_size:
        raise UserError(f"{path} has no vocabulary: --vocab-size says how many different tokens there are (GPT-2: "
                        "50257)")
    digest = hashlib.sha256()
    for file in files:  # its size, beginning and end stand for it
        size = file.stat().st_size
        digest.update(b"%d" % size)
        for start in (0, max(0, size - 2**20)):
            digest.update(np.fromfile(file, "u1", 2**20, offset=start))
    if path.is_dir():
        train, val = (read_numbered(file, vocab_size) if holds_tokens(file) else token_file(file, "<u2", vocab_size)
                      for file in files)
    else:
        train, val = split(read_numbered(path, vocab_size), val_fraction)
    for tokens in (train, val):
        tokens[:FIRST_LOOK]
    return Corpus(train, val, list(range(vocab_size)), digest.hexdigest(), None, "numbers")


def read_tokens(path: Path, tokenize: str, vocabulary: list) -> Tensor | TokenFile:
    """Another text than the one that the vocabulary is of -> tokens (N,), all of them known. Raises UserError."""
    if tokenize != "numbers":
        words, *_ = read_words(path, tokenize)
        try:
            return encode(words, vocabulary)
        except UserError as error:
            raise UserError(f"{path}: {error}") from None
    if not (path.is_file() and holds_tokens(path)):
        raise UserError(f"{path} is not a file of tokens, which it has to be for a vocabulary of numbers")
    tokens = read_numbered(path, len(vocabulary))
    for start in range(0, len(tokens), 2**20):
        tokens[start:start + 2**20]
    return tokens


def sample_batch(tokens: Tensor | TokenFile, batch_size: int, block_size: int,
                 generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Random windows of tokens (N,) -> inputs (B, T), targets (B, T), the same one token later."""
    starts = torch.randint(len(tokens) - block_size, (batch_size, 1), generator=generator)
    starts = starts.to(tokens.device, non_blocking=tokens.is_cuda)
    return windows_at(tokens, starts, block_size)


def windows_at(tokens, starts, block_size):
    """The windows of tokens (N,) that begin at starts (B, 1) -> inputs (B, T), targets (B, T)."""
    windows = tokens[starts + torch.arange(block_size + 1, device=tokens.device)]  # (B, T + 1)
    return windows[:, :-1], windows[:, 1:]


def next_batch(tokens: Tensor | TokenFile, step: int, batch_size: int, block_size: int) -> tuple[Tensor, Tensor]:
    """The windows of a step (from 1) in a single pass: tokens (N,) are cut into B parts, and each step reads on in all
    of them, so that no token is a target twice -> inputs (B, T), targets (B, T)."""
    part = (len(tokens) - 1) // batch_size
    starts = torch.arange(batch_size, device=tokens.device)[:, None] * part + (step - 1) * block_size
    return windows_at(tokens, starts, block_size)


# ---- The loss, in tiles of logits ------------------------------------------------------------------------------------

LOGITS_BYTES = 4 * 10**8  # the memory for a tile of logits: small beside all of them, enough for fast products
CACHE_BYTES = 2**23  # the logits that a CPU turns into gradients at a time: they stay in its cache from pass to pass
# Products of other sizes take up to several times as long on CUDA (pytorch#146817), and a third longer with AMX.
ALIGNED = {("cuda", torch.float32): 64, ("cuda", torch.bfloat16): 64, ("cpu", torch.bfloat16): 64}
REDUCTION = 2**14  # no product sums over more words at once: from 32,767 on, Metal's may be wrong (pytorch#193487)


class LinearCrossEntropy(torch.autograd.Function):
    """The mean cross entropy of x W^T + b, for x (N, C), W (V, C), b (V,) and targets (N,), without its N x V logits.

    The logits exist for a tile of tokens at a time, as many as fit in LOGITS_BYTES. They become p, then p - onehot, the
    gradient, from which those of x, W and b are formed at once; the backward pass only scales them. Without `grad` none
    of that is done. Products run in `dtype`; the bias, probabilities, the loss and sums over tiles stay in W's. Where
    sizes should be ALIGNED, words of probability 0 fill them up.
    """

    @staticmethod
    def forward(ctx, x, W, b, targets, dtype, grad):
        N, n_words, on_cpu = len(x), len(W), W.device.type == "cpu"
        V = n_words + -n_words % ALIGNED.get((W.device.type, dtype), 1)
        tokens = LOGITS_BYTES // (V * W.element_size())
        tokens = min(N, 1 << max(tokens.bit_length() - 1, 0))  # a power of two: odd sizes make slower products
        rows = max(1, CACHE_BYTES // (V * W.element_size())) if on_cpu else tokens
        logits = torch.empty(tokens, V, dtype=dtype, device=W.device)
        exact = torch.empty(min(rows, tokens), V, dtype=W.dtype, device=W.device) if dtype != W.dtype else None
        low_W, loss = W.to(dtype), W.new_zeros(())
        if V > n_words:
            low_W, b = F.pad(low_W, (0, 0, 0, V - n_words)), F.pad(b, (0, V - n_words), value=-math.inf)
        d_x, d_W, d_b = ((torch.empty_like(x, dtype=W.dtype), torch.empty_like(low_W, dtype=W.dtype),
                          torch.zeros_like(b)) if grad else 3 * (None,))
        for start in range(0, N, tokens):
            tile = slice(start, start + tokens)
            low_x = x[tile].to(dtype)
            Z = torch.mm(low_x, low_W.T, out=logits[:len(low_x)])  # (n, V)
            for z, target in zip(Z.split(rows), targets[tile, None].split(rows), strict=True):
                p = (z if exact is None else exact[:len(z)].copy_(z)).add_(b)
                behind = p.amax(1, keepdim=True) - p.gather(1, target)  # the target's logit behind the highest
                p = torch.softmax(p, 1, out=p if on_cpu else None)  # only the CPU's is sure to work in place
                loss += (behind - p.amax(1, keepdim=True).log()).sum()  # -log p of the target, however small p is
                if grad:
                    p.scatter_add_(1, target, p.new_full(target.shape, -1))
                    d_b.addmv_(p.T, p.new_ones(len(p)))  # their sum, twice as fast
                    z.copy_(p)
            if grad:
                add_product(d_W, Z.T, low_x, first=start == 0)
                for word in range(0, V, REDUCTION):
                    add_product(d_x[tile], Z[:, word:word + REDUCTION], low_W[word:word + REDUCTION], first=word == 0)
        if grad:
            ctx.save_for_backward(d_x, d_W[:n_words], d_b[:n_words])
        ctx.N = N
        return loss / N

    @staticmethod
    @once_differentiable
    def backward(ctx, scale):
        return *(gradient.mul_(scale / ctx.N) for gradient in ctx.saved_tensors), None, None, None


def add_product(total, a, b, first):
    """total += a b in the precision of total, which at the `first` product holds nothing yet."""
    if a.dtype == total.dtype:
        total.addmm_(a, b, beta=float(not first))  # in one pass
    else:
        total.copy_(a @ b) if first else total.add_(a @ b)


# ---- One step, and evaluation ----------------------------------------------------------------------------------------

def train_step(model: nn.Module, optimizers: list, x: Tensor, y: Tensor, grad_clip: float = 0.0, grad_accum: int = 1,
               total: Tensor | float = 0.0) -> Tensor:
    """One step of the optimizers on inputs and targets (B, T), in grad_accum parts -> total + loss, free of its graph:
    factors may be replaced next. `model` is what parallel() returned.

    From the first loss or gradient on that is not finite, the result is not finite either, and the model and the
    optimizers stay as they were. Fused optimizers are told so on the device, so that no step has to wait for an answer.
    """
    loss = torch.zeros((), device=x.device)
    for optimizer in optimizers:
        optimizer.zero_grad(set_to_none=True)
    for i, part in enumerate(zip(x.chunk(grad_accum), y.chunk(grad_accum), strict=True), start=1):
        silent = i < grad_accum and isinstance(model, DistributedDataParallel)
        with model.no_sync() if silent else contextlib.nullcontext():  # gradients are exchanged once per step
            part_loss = model(*part) / grad_accum
            part_loss.backward()
        loss += part_loss.detach()
    norm = nn.utils.get_total_norm([parameter.grad for parameter in model.parameters()])
    if grad_clip:
        nn.utils.clip_grads_with_norm_(model.parameters(), grad_clip, norm)
    total = total + loss + 0 * norm  # 0 times what is not finite is NaN
    finite = torch.isfinite(total)
    for optimizer in optimizers:
        if getattr(optimizer, "_step_supports_amp_scaling", False):  # PyTorch's mark of those that look at found_inf
            optimizer.found_inf = (~finite).float()
            optimizer.step()
        elif finite:
            optimizer.step()
    return total


@contextlib.contextmanager
def evaluation_mode(model):
    """Within it the model drops nothing and keeps no graph; after it, it is as it was."""
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(was_training)


def held_out_batches(tokens: Tensor | TokenFile, block_size: int, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
    """tokens (N,) as inputs and targets (B, T): contiguous blocks, the last one at its own length (padding would be
    seen by an unmasked model), every token but the first a target once."""
    full = (len(tokens) - 1) // block_size * block_size
    for start in range(0, full, batch_size * block_size):
        batch = tokens[start:min(start + batch_size * block_size, full) + 1]
        yield batch[:-1].view(-1, block_size), batch[1:].view(-1, block_size)
    rest = tokens[full:]
    if len(rest) > 1:
        yield rest[None, :-1], rest[None, 1:]


def evaluate(model: GPT, tokens: Tensor | TokenFile, batch_size: int) -> float:
    """The loss over a fixed, full pass of tokens (N,), see held_out_batches. The processes share the batches."""
    batches, device = held_out_batches(tokens, model.config.block_size, batch_size), model.norm.weight.device
    with evaluation_mode(model):
        losses = [(model(x.to(device), y.to(device)), y.numel())
                  for x, y in itertools.islice(batches, process_index(), None, process_count())]
    return sum(gather(sum(loss.item() * n for loss, n in losses))) / (len(tokens) - 1)


def telemetry(model: GPT, before: list, x: Tensor, parts: int) -> dict:
    """What a step on the inputs x (B, T), taken in `parts`, has done to each linear layer (Spectron, figures 2 and 3);
    `before` are the factors of each from before it, U_0 and V_0.

    -> {"update_norms": ||dW||_2, "weight_norms": ||W||_2 after it, "output_changes": RMS of h dW^T over outputs and
    tokens, where h is what the layer reads of x once the step is taken, without dropout}: lists, one number per layer.
    dW = (U - U_0) V + U_0 (V - V_0) is never a difference of products, which would round it away.
    """
    layers, squares = list(model.linears().values()), torch.zeros(len(before), 2, device=x.device)
    after = [layer.factors() for layer in layers]

    def measure(i):
        (U, V), (U_0, V_0) = ([factor.to(x.device) for factor in factors] for factors in (after[i], before[i]))

        def hook(layer, inputs):
            h = inputs[0].to(U.dtype)
            with torch.autocast(x.device.type, enabled=False):
                change = F.linear(F.linear(h, V), U - U_0) + F.linear(F.linear(h, V - V_0), U_0)
            squares[i] += torch.stack([change.square().sum(), change.new_tensor(change.numel())])
        return layers[i].register_forward_pre_hook(hook)

    hooks = [measure(i) for i in range(len(layers))]
    with evaluation_mode(model):
        for part in x.chunk(parts):
            model.features(part)
    for hook in hooks:
        hook.remove()
    total, count = sum(gather(squares.cpu())).T

    def change_norm(now, then):
        (U, V), (U_0, V_0) = now, then
        return product_singular_values(torch.cat([U - U_0, U_0], 1), torch.cat([V, V - V_0]))[0].item()

    return {"update_norms": on_threads(change_norm, [*zip(after, before, strict=True)]),
            "weight_norms": [S[0].item() for S in on_threads(product_singular_values, after)],
            "output_changes": (total / count).sqrt().tolist()}


def perplexity(loss):
    return math.exp(min(loss, 700))  # exp overflows at 709.8


def check_finite(loss, step, args, last):
    """Raises TrainingError for a loss that is not finite; `last` is a checkpoint from before."""
    if not math.isfinite(loss):
        kept = f". {last} keeps the last good state" if last.exists() else ""
        raise TrainingError(f"epoch {(step - 1) // args.steps_per_epoch + 1}, step {step}: a loss or its gradient is "
                            f"not finite: in a new run, {ADVICE}{kept}")


# ---- What a variant may replace --------------------------------------------------------------------------------------

class Variant:
    """v10 itself. A subclass replaces what it wants; everything else is shared: `main(variant=Mine())`.

    A linear layer has `shape` (m, n), `rank` (None if it is dense) and `factors()`; a factored one also the Parameters
    `U` and `V`, and `set_factors`, as above. An optimizer has `moments`, as in make_adamw.
    """

    name = "v10_transformer_lowrank_scaled.py"
    log_file = "logs/v10.jsonl"
    description = "Trains a GPT whose linear layers find their own ranks."
    defaults = {}  # of flags, where they are not v10's

    def add_flags(self, parser):
        """Flags beyond those that all variants share. `fixed_rank`, `rank_interval` and `ranks_from` have to exist, if
        only as defaults; without `fixed_rank`, `min_rank`, `max_rank` and `optimizer_on_resize` too."""
        add_rank_flags(parser)

    def complete(self, args):
        """Fill in those flags whose default depends on others. Raises UserError if its own contradict each other."""

    def linear(self, n, m, rank):
        """A linear layer with n inputs and m outputs, of the initial rank, or of a checkpoint's."""
        return LowRankLinearAdaptiveSpectral(n, m, rank)

    def controllers(self, layers, args):
        """An object with `propose` for each layer; [] if ranks stay."""
        return [] if args.fixed_rank else [
            RankController(args.safety_factor, args.ema_decay, args.change_threshold, args.max_step, args.min_rank,
                           min(*layer.shape, args.max_rank or math.inf)) for layer in layers]

    def make_optimizers(self, model, args):
        """Optimizers that together have every parameter once. The first one's rate is the `lr` of the log."""
        return [make_adamw(model.parameters(), args)]

    def before_step(self, run, step):
        """Called before step 1, 2, 3, ..."""

    def rank_update_due(self, run, step):
        """Is it time for update_ranks after this step?"""
        return step % (run.args.rank_interval or run.args.steps_per_epoch) == 0

    def update_ranks(self, run, step):
        """The only place where parameters may change their shapes or go. -> (what the log keeps of it, how many layers
        were resized)."""
        return update_ranks(run.layers, run.controllers, run.state.ema, run.optimizers, run.args,
                            run.generators["rank"])

    def left_undone(self, run):
        """What a finished run has not done, though its flags ask for it: a sentence for the user, or None."""


# ---- A run: what it is made of ---------------------------------------------------------------------------------------

@dataclass
class EpochState:
    """The current epoch so far."""

    loss_sum: list[float] = field(default_factory=lambda: [0.0])  # over its steps, in each process
    time_sec: float = 0.0  # training and rank control, without evaluation
    rank_sec: float = 0.0
    resized: int = 0  # layers
    update: dict = field(default_factory=lambda: dict(NO_UPDATE))  # its last rank update, as the log has it


@dataclass
class TrainState:
    """What a run carries from step to step, and its checkpoints from one start to the next."""

    ema: list[float]  # of the controllers
    step: int = 0  # steps taken
    seconds: float = 0.0  # of running time, interruptions not counted
    epochs: list[dict] = field(default_factory=list)  # the records of those that have ended
    part: EpochState = field(default_factory=EpochState)  # the epoch in progress


@dataclass
class Request:
    """What a command line asks for, once it is known to make sense."""

    variant: Variant
    args: argparse.Namespace  # the flags
    settings: dict  # the flags as the log and the checkpoints record them, automatic choices filled in
    dtype_reason: str
    device: torch.device
    files: "Files"
    corpus: Corpus
    test_tokens: Tensor | TokenFile | None  # (N,)
    initial_ranks: list[int]  # those of --ranks-from, else []
    start: dict | None  # the content of --init-from
    checkpoint: dict | None  # to go on from
    moved: bool  # the checkpoint is of another device or another number of processes


@dataclass
class Run(Request):
    """All that a run is made of; `state` is what changes, besides the weights and the optimizers' own state."""

    model: GPT
    optimizers: list
    controllers: list
    generators: dict  # for batches and for rank estimates
    state: TrainState
    sees_targets: bool = False  # what the leak check says

    @property
    def layers(self):
        return list(self.model.linears().values())

    @property
    def total_steps(self):
        return self.args.epochs * self.args.steps_per_epoch

    @property
    def tokens_per_epoch(self):
        return self.args.steps_per_epoch * self.args.batch_size * self.args.block_size


def build_run(request):
    """Model, optimizers, controllers and random generators, new or as the checkpoint has them -> Run."""
    args, variant, checkpoint = request.args, request.variant, request.checkpoint
    torch.manual_seed(args.seed)
    if checkpoint:
        model = build_model(checkpoint, variant.linear)
        del checkpoint["model"]  # its memory, as below
    elif request.start:
        try:
            model = start_from(request.start, variant, args.dropout)
        except UserError as error:
            raise UserError(f"--init-from {args.init_from}: {error}") from None
        request.start = None
    else:
        given = request.initial_ranks or [getattr(args, "init_rank", None)]
        ranks = itertools.chain(given, itertools.repeat(given[-1]))
        config = GPTConfig.of_flags(args, len(request.corpus.vocabulary))
        model = GPT(config, lambda n, m: variant.linear(n, m, next(ranks)))
        if request.initial_ranks and request.initial_ranks != model.ranks():
            raise UserError(f"{args.ranks_from} does not end with the ranks of {len(model.ranks())} layers: "
                            "--ranks-from needs the log of a factored model with as many --n-layers")
    place(model, request.device).low_precision = request.settings["dtype"] == "bfloat16"
    if args.compile:
        compile_blocks(model)
    optimizers = variant.make_optimizers(model, args)
    for group in parameter_groups(optimizers):
        group["initial_lr"] = group["lr"]
    generators = {name: torch.Generator().manual_seed(args.seed + i) for i, name in ((2, "batch"), (3, "rank"))}
    run = Run(**vars(request), model=model, optimizers=optimizers, generators=generators,
              controllers=variant.controllers(list(model.linears().values()), args),
              state=TrainState(ema=[float(rank) for rank in model.ranks()]))
    if checkpoint:
        run.state = TrainState(**checkpoint["state"] | {"part": EpochState(**checkpoint["state"]["part"])})
    # from here on the global generator is dropout's: each process has its own
    torch.manual_seed(args.seed + 1 + 1_000_003 * process_index() + run.state.step)
    if checkpoint:
        states = checkpoint.pop("optimizer")
        states = states if isinstance(states, list) else [states]  # older versions had one optimizer
        for optimizer, saved in zip(optimizers, states, strict=True):
            for group, fresh in zip(saved["param_groups"], optimizer.param_groups, strict=True):
                group |= {name: fresh[name] for name in ("initial_lr", "weight_decay", "fused")
                          if name in fresh}  # as for this --epochs, and on this device
            optimizer.load_state_dict(saved)
            for parameter, state in optimizer.state.items():  # saved on another device, a moment may lie otherwise
                state |= {name: lying_as(parameter, value) for name, value in state.items()
                          if getattr(value, "shape", None) == parameter.shape}
        for name, generator in generators.items():
            generator.set_state(checkpoint["generators"][name])
        if not run.moved:
            dropout_rng(run.device).set_rng_state(checkpoint["dropout_states"][process_index()])
    return run


def parameter_groups(optimizers):
    return [group for optimizer in optimizers for group in optimizer.param_groups]


def checkpoint_content(run):
    """The model and what it was trained on."""
    return model_content(run.model, run.corpus.vocabulary) | {
        "text": {name: run.settings[name] for name in ("data_file", "data_sha256", "val_fraction", "min_count",
                                                       "val_tokens")}}


def save_last(run):
    """Write the checkpoint that --resume goes on from."""
    dropout_states = gather(dropout_rng(run.device).get_rng_state())
    once(lambda: save(run.files.last, checkpoint_content(run) | {
        "state": asdict(run.state), "settings": run.settings, "log_bytes": run.files.log.stat().st_size,
        "optimizer": [optimizer.state_dict() for optimizer in run.optimizers], "dropout_states": dropout_states,
        "generators": {name: generator.get_state() for name, generator in run.generators.items()}},
        run.files.previous))


# ---- A run: its beginning, its loop, its end -------------------------------------------------------------------------

def begin(run):
    """The leak check, the first record of the log, the first checkpoint, and what the user reads of it."""
    args, settings, model, corpus = run.args, run.settings, run.model, run.corpus
    try:
        leak = leak_check(model)
    except torch._dynamo.exc.TorchDynamoException as error:
        raise TrainingError(f"--compile fails on this machine: {str(error).splitlines()[0]}") from None
    leak = max(gather(leak), key=lambda leak: leak["max_change"])  # also a barrier: all have read the old files
    run.sees_targets = leak["leaks"]
    if run.sees_targets and args.attention == "causal":
        raise TrainingError(f"later tokens change earlier logits (by {leak['max_change']:.1e} of the largest), so "
                            f"{run.device.type} masks wrongly in {settings['dtype']}: try --dtype float32 or --device "
                            "cpu")
    once(run.files.clear, run.checkpoint)
    parameters, layer_parameters = count_parameters(model), count_parameters(*run.layers)
    if run.checkpoint:
        write_record(run.files.log, "resume", epoch=run.state.step // args.steps_per_epoch, step=run.state.step,
                     epochs=args.epochs, device=run.device.type, processes=process_count(), command=settings["command"])
    else:  # if --resume had to start over, the record is that of a run which was only started
        write_record(run.files.log, "run", **settings | {
            "resume": False, "command": settings["command"].replace(" --resume", ""), "val_tokens": len(corpus.val),
            "vocab_size": len(corpus.vocabulary)},
            device_name=device_name(run.device), dtype_reason=run.dtype_reason,
            versions={"python": platform.python_version(), "torch": torch.__version__},
            train_tokens=len(corpus.train), parameters=parameters, factor_parameters=layer_parameters,
            initial_ranks=model.ranks(),
            layers=[{"name": name, "shape": list(layer.shape)} for name, layer in model.linears().items()],
            leak_check=leak, entropy_floor=corpus.entropy_floor)
    setup = [device_name(run.device), *([f"{process_count()} processes"] if process_count() > 1 else []),
             *([f"{settings['grad_accum']} parts per step"] if settings["grad_accum"] > 1 else [])]
    floor = f", entropy floor {corpus.entropy_floor:.3f}" if corpus.entropy_floor else ""
    say(f"{run.variant.name}: {parameters:,} parameters, {layer_parameters:,} of them in {len(run.layers)} linear "
        f"layers; {settings['dtype']} ({run.dtype_reason}) on {', '.join(setup)}\n"
        f"{settings['data_file']}: {len(corpus.train):,} training and {len(corpus.val):,} validation tokens, "
        f"{len(corpus.vocabulary):,} words{floor}")
    if run.sees_targets:
        say("*** NO CAUSAL MASK: THE MODEL SEES ITS TARGETS. Its losses are not those of a language model.")
    if not run.checkpoint:  # from here on --resume always has one, and a full disk is noticed before the work
        save_last(run)


def train(run):
    """Train to the last step, or until a signal asks to stop -> the number of that signal, or 0."""
    args, state, model, device = run.args, run.state, run.model, run.device
    train_tokens, val_tokens = run.corpus.train.to(device), run.corpus.val.to(device)
    steps = args.steps_per_epoch
    sums = state.part.loss_sum  # of each process: their mean is that of the whole batch
    loss_sum = torch.tensor(sums[process_index()] if len(sums) == process_count() else fmean(sums), device=device)
    wrapped, watch = parallel(model), Stopwatch(device)
    began, saved = time.perf_counter() - state.seconds, time.monotonic()
    progress = Progress(state.step, run.total_steps, overhead=len(val_tokens) / (3 * run.tokens_per_epoch))
    with noted_signals() as signals, progress.bar:
        for step in range(state.step + 1, run.total_steps + 1):
            updates, ends = run.variant.rank_update_due(run, step), step % steps == 0
            for group in parameter_groups(run.optimizers):
                group["lr"] = learning_rate(step - 1, group["initial_lr"], args)
            batch = (next_batch(train_tokens, step, args.batch_size, args.block_size) if args.one_pass else
                     sample_batch(train_tokens, args.batch_size, args.block_size, run.generators["batch"]))
            x, y = own_share(batch, device)
            run.variant.before_step(run, step)
            if args.telemetry and ends:
                state.part.time_sec += watch.lap()
                before = [[factor.clone() for factor in layer.factors()] for layer in run.layers]
                watch.lap()
            loss_sum = train_step(wrapped, run.optimizers, x, y, args.grad_clip, run.settings["grad_accum"], loss_sum)
            if progress.due():
                progress.show(loss_sum.item() / ((step - 1) % steps + 1), model.ranks())
            if device.type != "cpu" and not (updates or ends or step % 10 == 0):
                continue  # to look at the loss is to wait for the device
            check_finite(loss_sum.item(), step, args, run.files.last)
            state.part.time_sec += watch.lap()

            # at the end of an epoch: evaluate
            if ends:
                val_loss = evaluate(model, val_tokens, args.batch_size)
                check_finite(val_loss, step, args, run.files.last)
                eval_sec = watch.lap()
                if val_loss < min((epoch["val_loss"] for epoch in state.epochs), default=math.inf):
                    once(save, run.files.best, checkpoint_content(run))  # as it was evaluated, before ranks change
                measured = telemetry(model, before, x, run.settings["grad_accum"]) if args.telemetry else {}
                watch.lap()

            # every --rank-interval: measure the spectra, decide, resize
            if updates:
                wrapped = None  # see parallel()
                state.part.update, resized = run.variant.update_ranks(run, step)
                state.ema = state.part.update["ema"] or state.ema
                wrapped = parallel(model)
                state.part.resized += resized
                rank_sec = watch.lap()
                state.part.rank_sec += rank_sec
                state.part.time_sec += rank_sec
                if not ends:  # the last one of an epoch is in the epoch's record
                    write_record(run.files.log, "ranks", step=step, **state.part.update, ranks=model.ranks(),
                                 resized=resized)

            # at the end of an epoch: write its record
            if ends:
                record = epoch_record(run, step // steps, loss_sum.item(), val_loss, eval_sec) | measured
                write_record(run.files.log, "epoch", **record)
                state.epochs.append(record)

            # at the end of an epoch, every --checkpoint-minutes, and if a signal asks to stop: write the checkpoint
            late = time.monotonic() - saved > 60 * args.checkpoint_minutes
            signal_number, late = max(gather((signals[0] if signals else 0, late)))
            if ends or late or signal_number:
                if ends:
                    state.part, loss_sum = EpochState(), torch.zeros_like(loss_sum)
                state.step, state.seconds = step, time.perf_counter() - began
                state.part.loss_sum = gather(loss_sum.item())
                save_last(run)
                if ends:
                    say(epoch_line(run, record))
                if signal_number and step < run.total_steps:
                    return signal_number
                watch.lap()
                saved = time.monotonic()
    return 0


def epoch_record(run, epoch, loss_sum, val_loss, eval_sec):
    """The log's record of an epoch that has just been trained and evaluated, after its rank update."""
    ranks, part = run.model.ranks(), run.state.part
    time_sec = part.time_sec + eval_sec
    train_sec = part.time_sec - part.rank_sec
    return {
        "epoch": epoch, "tokens_seen": epoch * run.tokens_per_epoch,
        "train_loss": fmean(gather(loss_sum)) / run.args.steps_per_epoch, "val_loss": val_loss,
        "val_ppl": perplexity(val_loss), "lr": run.optimizers[0].param_groups[0]["lr"],
        "rank_min": min(ranks, default=None), "rank_max": max(ranks, default=None),
        "rank_avg": fmean(ranks) if ranks else None, "ranks": ranks, **part.update, "resized": part.resized,
        "params_millions": count_parameters(run.model) / 1e6,
        "factor_params_millions": count_parameters(*run.layers) / 1e6, "time_sec": time_sec, "train_sec": train_sec,
        "eval_sec": eval_sec, "rank_sec": part.rank_sec, "tokens_per_sec": run.tokens_per_epoch / train_sec,
        "peak_memory_mb": peak_memory_mb(run.device)}


def epoch_line(run, record):
    """An epoch's record as the user reads it."""
    line = ("epoch {epoch:3}/{epochs}  train {train_loss:.3f}  val {val_loss:.3f}  ppl {val_ppl:.1f}"
            + ("  rank {rank_avg:.1f} ({rank_min}-{rank_max})" if record["ranks"] else "")
            + "  {params_millions:.2f}M parameters  {time_sec:.1f} s  {tokens_per_sec:,.0f} tok/s"
            + ("  SEES ITS TARGETS" if run.sees_targets else ""))
    return line.format(epochs=run.args.epochs, **record)


def finish(run):
    """Test losses, the last record, and a summary."""
    epochs, model, files, settings = run.state.epochs, run.model, run.files, run.settings
    best = min(epochs, key=lambda epoch: epoch["val_loss"])  # the first of several
    end = {"best_epoch": best["epoch"], "best_val_loss": best["val_loss"], "final_val_loss": epochs[-1]["val_loss"],
           "test_loss_best": None, "test_loss_last": None}
    if run.test_tokens is not None:
        tokens = run.test_tokens.to(run.device)
        end["test_loss_last"] = evaluate(model, tokens, run.args.batch_size)
        try:
            best_model = build_model(once(load, files.best), run.variant.linear).to(run.device)
            best_model.low_precision = model.low_precision
            end["test_loss_best"] = evaluate(best_model, tokens, run.args.batch_size)
        except (UserError, TrainingError) as error:
            say(f"*** no test loss of the best epoch: {error}")
    write_record(files.log, "end", **end, total_sec=run.state.seconds)
    ranks, memory = model.ranks(), peak_memory_mb(run.device)
    speed = run.args.epochs * run.tokens_per_epoch / sum(record["train_sec"] for record in epochs)
    peak = f", peak memory {memory:,.0f} MB" if memory else ""
    say(f"done: {run.args.epochs} epochs in {tqdm.format_interval(run.state.seconds)}, {speed:,.0f} training "
        f"tokens/s{peak}")
    leak = "; SEES ITS TARGETS" if run.sees_targets else ""
    for name in ("best_val_loss", "final_val_loss", "test_loss_best", "test_loss_last"):
        if end[name] is not None:
            at = f" (epoch {best['epoch']})" if "best" in name else ""
            say(f"{name.replace('_', ' ')}: {end[name]:.3f}, perplexity {perplexity(end[name]):.2f}{at}{leak}")
    first = settings.get("init_rank") or settings["ranks_from"] or settings["init_from"]
    found = (f"ranks: {first} -> {fmean(ranks):.1f} on average "
             f"({min(ranks)}-{max(ranks)}); ") if ranks else ""
    say(f"{found}parameters in use: {count_parameters(model):,}, {count_parameters(*run.layers):,} of them in the "
        f"linear layers\nlog: {files.log}; checkpoints: {files.last} (last), {files.best} (best)")
    if undone := run.variant.left_undone(run):
        say(f"*** {undone}: --resume with a larger --epochs goes on")


# ==== Part 3: machinery ===============================================================================================

# ---- Several processes, started by torchrun --------------------------------------------------------------------------

def process_count() -> int:
    """How many processes train this model together."""
    return dist.get_world_size() if dist.is_initialized() else 1


def process_index() -> int:
    """The number of this one: 0, which alone writes and speaks, or a higher one."""
    return dist.get_rank() if dist.is_initialized() else 0


def join_processes():
    """Meet the other processes that torchrun started: NCCL averages gradients on GPUs, gloo does all else."""
    dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "cpu:gloo")
    gather("connected")  # before that, the end of one would look like a crash to the others


def own_share(batch, device) -> list:
    """The part of each tensor of a batch that this process takes, on its device."""
    return [whole.chunk(process_count())[process_index()].to(device, non_blocking=device.type == "cuda")
            for whole in batch]


def gather(value) -> list:
    """[value in process 0, value in process 1, ...], in every process."""
    values = [value] * process_count()
    if process_count() > 1:
        dist.all_gather_object(values, value)
    return values


def once(action, *args):
    """action(*args), done by process 0 alone -> its result, or the error that it raises, in every process."""
    try:
        result = [action(*args) if process_index() == 0 else None]
    except (UserError, TrainingError) as error:
        result = [error]
    if process_count() > 1:
        dist.broadcast_object_list(result)
    if isinstance(result[0], Exception):
        raise result[0]
    return result[0]


def parallel(model):
    """The model with its gradients averaged over the processes. DistributedDataParallel notes the parameters' shapes
    when it is made: it has to be dropped before a rank changes (else the next step fails), and made again after (else
    gradients are no longer averaged, silently)."""
    if process_count() == 1:
        return model
    gc.collect()  # frees the hooks of a dropped one
    return DistributedDataParallel(model, gradient_as_bucket_view=True)


def leave(code: int) -> None:
    """sys.exit(code), even if the screen is gone. One of several processes skips the interpreter's own end:
    DistributedDataParallel keeps gloo's threads alive past destroy_process_group, and one that lets go of a tensor only
    then aborts (pytorch#179291)."""
    for stream in filter(None, (sys.stdout, sys.stderr)):
        try:
            stream.flush()
        except (OSError, ValueError):  # Python would try again, and exit with 120
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
    if dist.is_torchelastic_launched():
        os._exit(code)
    sys.exit(code)


# ---- Devices: which one, in which dtype, how much at a time, time and memory -----------------------------------------

def keep_freed_memory():
    """Let glibc reuse the large blocks of a step; it would return each to the system, which clears it page by page."""
    if platform.libc_ver()[0] == "glibc":
        for option, size in ((-1, 2**31 - 1), (-3, 2**30)):  # M_TRIM_THRESHOLD, M_MMAP_THRESHOLD
            ctypes.CDLL(None).mallopt(option, size)


def pick_device(name: str) -> torch.device:
    """The device of --device, ready for use -> torch.device."""
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available() and process_count() == 1,
                 "cpu": True}  # MPS cannot average gradients
    if name == "auto":
        name = next(name for name in available if available[name])
    if not available[name]:
        where = "to several processes" if name == "mps" and process_count() > 1 else "on this machine"
        raise UserError(f"--device {name} is not available {where}: try --device auto")
    if name == "cuda":  # each process of a machine takes a GPU
        gpus = torch.cuda.device_count()
        here, index = (int(os.environ.get(variable, 0)) for variable in ("LOCAL_WORLD_SIZE", "LOCAL_RANK"))
        if here > gpus:
            raise UserError(f"{here} processes on a machine with fewer GPUs ({gpus}): start one per GPU, or try "
                            "--device cpu")
        torch.cuda.set_device(index if process_count() > 1 else 0)
        torch.set_float32_matmul_precision("high")  # TF32 in what remains of float32
        # Some of cuDNN's attention kernels round the dropout's probability to sixteenths (pytorch#174245).
        torch.backends.cuda.enable_cudnn_sdp(False)
    if name == "cpu":
        keep_freed_memory()
    return torch.device(name)


def place(model: nn.Module, device: torch.device) -> nn.Module:
    """The model, moved to a device to be trained there. On MPS each parameter then lies row by row: what Metal does in
    place to others has been wrong."""
    model.to(device)
    for parameter in model.parameters() if device.type == "mps" else ():
        parameter.data = parameter.data.contiguous()
    return model


def choose_dtype(device: torch.device, d_model: int) -> tuple[str, str]:
    """What --dtype auto means -> ("bfloat16" or "float32", why)."""
    if device.type == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
        return ("bfloat16", "native on this GPU") if native else ("float32", "this GPU has no native bfloat16")
    if device.type == "mps":
        return "float32", "half precision on Metal has been wrong"
    if d_model < 128:
        return "float32", "below --d-model 128, bfloat16 gains little on a CPU"
    if not (ratio := bfloat16_speedup()):
        return "float32", "this processor has no native bfloat16"
    return "bfloat16" if ratio >= 2 else "float32", f"a product in bfloat16 is {ratio:.1f} times as fast here"


def bfloat16_speedup() -> float:
    """How many times faster a large product is in bfloat16 than in float32 on this CPU, measured in a second; 0 where
    the processor only emulates bfloat16, which is many times slower, or torch does not say (before 2.10)."""
    capabilities = getattr(torch.cpu, "get_capabilities", dict)()
    if not any(capabilities.get(name) for name in ("avx512_bf16", "amx_bf16", "bf16")):  # x86-64, x86-64, ARM
        return 0.0
    matrices = [torch.ones(2048, 2048, dtype=dtype) for dtype in (torch.float32, torch.bfloat16)]
    seconds = [[], []]
    for _ in range(4):  # in turn, and the best of each: other work on the machine only slows
        for matrix, taken in zip(matrices, seconds, strict=True):
            began = time.perf_counter()
            matrix @ matrix
            taken.append(time.perf_counter() - began)
    return min(seconds[0]) / min(seconds[1])


def default_grad_accum(windows: int, block_size: int, device: torch.device) -> int:
    """The parts to take a process's windows in: on a CPU at most 2,048 tokens at a time, whose activations stay close
    to its caches (faster, and half the memory); on MPS what a product sums correctly (see REDUCTION); on CUDA all."""
    most = {"cpu": 2048, "mps": 2 * REDUCTION - 2}.get(device.type, math.inf)
    return next((n for n in range(1, windows + 1) if windows % n == 0 and windows // n * block_size <= most), windows)


def compile_blocks(model: GPT) -> None:
    """torch.compile for each block, once for all ranks and sequence lengths: a graph with gradients and one without.
    Dynamo's defaults would compile anew at every rank, and silently stop after eight."""
    torch._dynamo.config.force_parameter_static_shapes = False
    torch._dynamo.config.force_nn_module_property_static_shapes = False
    for block in model.blocks:
        block.compile(dynamic=True)


def dropout_rng(device):
    """The module that keeps the state of the generator that dropout draws from on this device."""
    return torch if device.type == "cpu" else torch.get_device_module(device)


def device_name(device: torch.device) -> str:
    threads = f"{platform.machine()}, {torch.get_num_threads()} threads"
    return torch.cuda.get_device_name() if device.type == "cuda" else threads


def peak_memory_mb(device: torch.device) -> float | None:
    """The most memory that the run has used, on the GPU for CUDA, else by the process; None if unknown."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 2**20
    try:  # not ru_maxrss: it inherits the peak of the process that started this one
        return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) / 2**10
    except (OSError, IndexError):  # not Linux
        return torch.mps.driver_allocated_memory() / 2**20 if device.type == "mps" else None


def now(device: torch.device) -> float:
    """Seconds on a running clock, read once the device has caught up."""
    if device.type != "cpu":
        torch.get_device_module(device).synchronize()
    return time.perf_counter()


class Stopwatch:
    """lap() gives the seconds since the last lap, or since the start."""

    def __init__(self, device):
        self.device, self.last = device, now(device)

    def lap(self):
        last, self.last = self.last, now(self.device)
        return self.last - last


# ---- The screen ------------------------------------------------------------------------------------------------------

def say(text):
    if process_index() == 0:
        tqdm.write(text, file=sys.stdout)
        sys.stdout.flush()


class Progress:
    """One tqdm bar for the whole run, or a plain line every half minute if there is no terminal; after the first steps,
    how long the run will take. `overhead` is the share that evaluation adds to the time of the steps."""

    def __init__(self, done, total, overhead):
        self.bar = tqdm(total=total, initial=done, disable=process_index() > 0 or None, unit="step", dynamic_ncols=True)
        self.count, self.left, self.overhead = 0, total - done, overhead
        self.began = self.shown = time.monotonic()

    def due(self):
        """Count one more step -> is it time to show how it goes? That waits for the device."""
        self.bar.update()
        self.count, self.left = self.count + 1, self.left - 1
        return self.count in (1, 4) or time.monotonic() - self.shown > (30 if self.bar.disable else 1)

    def show(self, loss, ranks):
        """Show the mean loss of the epoch so far, and the mean of the ranks."""
        self.shown = time.monotonic()
        status = f"loss {loss:.3f}" + (f", mean rank {fmean(ranks):.1f}" if ranks else "")
        self.bar.set_postfix_str(status)
        if self.count == 1:  # the first step warms up and is not counted
            self.began = self.shown
            return
        seconds = (self.shown - self.began) / (self.count - 1) * self.left * (1 + self.overhead)
        time_left = tqdm.format_interval(seconds)
        if self.count == 4 and seconds > 5:
            hint = "; --resume continues an interrupted one, `make demo` takes minutes" if seconds > 3600 else ""
            say(f"this run will take about {time_left}{hint}")
        elif self.count != 4 and self.bar.disable:
            say(f"  step {self.bar.total - self.left:,}/{self.bar.total:,}: {status}; about {time_left} to go")


class Screen:
    """A stream to a screen. What it no longer takes is dropped: a closed terminal, or a full disk, ends no training."""

    def __init__(self, stream):
        self.stream = stream or open(os.devnull, "w")  # None if it was closed from the start
        if hasattr(self.stream, "reconfigure"):
            self.stream.reconfigure(errors="replace")  # letters that it does not have

    def write(self, text):
        with contextlib.suppress(OSError, ValueError):
            self.stream.write(text)
        return len(text)

    def flush(self):
        with contextlib.suppress(OSError, ValueError):
            self.stream.flush()

    def __getattr__(self, name):
        return getattr(self.stream, name)


@contextlib.contextmanager
def screens():
    """Within it nothing ends because a screen is gone."""
    with contextlib.redirect_stdout(Screen(sys.stdout)), contextlib.redirect_stderr(Screen(sys.stderr)):
        yield


# ---- Signals ---------------------------------------------------------------------------------------------------------

SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1", "SIGUSR2")
           if hasattr(signal, name)]  # Ctrl-C, a batch system or a launcher, a closed terminal, a scheduler's warnings


def handle_signals(handler):
    """Install a handler for all SIGNALS but those that the process ignores, as under nohup -> {signal: the old one}."""
    return {number: signal.signal(number, handler) for number in SIGNALS if signal.getsignal(number) != signal.SIG_IGN}


def interrupt(number, frame):
    """The handler of SIGNALS as long as nothing has to be saved."""
    raise KeyboardInterrupt(number)


def ignore(number, frame):
    """The handler of SIGNALS once the process is about to end."""


@contextlib.contextmanager
def noted_signals():
    """Within it a signal is only noted, in the list that it yields, so that the step can end and be saved. A signal may
    come several times, from a batch system and from a launcher, Ctrl-C too: only a Ctrl-C that comes a second or more
    after the first signal is impatience, and ends the process at once, by the system's own hand."""
    received, times = [], []

    def note(number, frame):
        times.append(time.monotonic())
        if number == signal.SIGINT and times[-1] - times[0] >= 1:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        if not received and process_index() == 0:
            with contextlib.suppress(OSError):
                os.write(2, b"\nsaving after this step, then stopping; another Ctrl-C stops at once\n")
        received.append(number)

    handlers = handle_signals(note)
    try:
        yield received
    finally:
        for number, handler in handlers.items():
            signal.signal(number, ignore if received else handler)  # main() puts the old ones back


# ---- Files: names, locks, the log ------------------------------------------------------------------------------------

@contextlib.contextmanager
def writing(path):
    """Turns the system's refusal to write into a UserError that names the file."""
    try:
        yield
    except OSError as error:
        raise UserError(f"cannot write {error.filename or path}: {error.strerror}") from None


class Files(NamedTuple):
    """What a run writes: its log, the last checkpoint, the one before it, and the model of lowest validation loss."""

    log: Path
    last: Path
    previous: Path
    best: Path

    @classmethod
    def named(cls, args, *data):
        """As the flags have it; if a checkpoint is a link, the other ones lie beside the file that it points to. Raises
        UserError if a name is none, a folder's, or that of a `data` file."""
        for flag, name in (("--log-file", args.log_file), ("--checkpoint", args.checkpoint)):
            if name is not None and not Path(name).name:
                raise UserError(f"{flag} needs the name of a file")
        log = Path(args.log_file)
        last = Path(args.checkpoint or log.with_name(log.name.removesuffix(".jsonl") + ".pt"))
        if not args.checkpoint and args.resume and log.exists() and not last.exists():
            last = log.with_suffix(".pt") if log.with_suffix(".pt").exists() else last  # its name in older versions
        last = Path(os.path.realpath(last)) if last.is_symlink() else last
        files = cls(log, last, *(last.with_suffix(kind + last.suffix) for kind in (".prev", ".best")))
        for path in files:
            if path.exists() and not path.is_file() or Path("/dev") in path.absolute().parents:
                raise UserError(f"cannot write {path}: {'Is a directory' if path.is_dir() else 'not a plain file'}")
        names = [os.path.realpath(path) for path in (*files, *data)]
        for path, name in zip((*files, *data), names, strict=True):
            if names.count(name) > 1:
                raise UserError(f"{path} is named twice: --log-file, --checkpoint and what is read need different "
                                "names")
        return files

    def claim(self, locks):
        """Lock the log and the checkpoints until the ExitStack `locks` ends, or the process, however it does. Raises
        UserError if another run has one, if the log is not one of this suite, or if a file cannot be written."""
        log = lock(self.log, locks, self.log)
        log.seek(0)
        if not b'{"kind": "run"'.startswith(log.read(14)):
            raise UserError(f"{self.log} is not a log of this suite: choose another --log-file")
        for path in (self.last, self.previous, self.best):  # each of them: c.pt is the best of one, the last of another
            lock(path.with_name(path.name + ".lock"), locks, path)
        with writing(self.last):
            temporary(self.last).touch()
            for path in (self.last, self.best):
                temporary(path).unlink(missing_ok=True)

    def clear(self, checkpoint):
        """Cut the log back to what the checkpoint has seen of it. Without a checkpoint remove what an earlier run left,
        its log last, so that what a crash leaves can always be resumed."""
        with writing(self.last):
            for path in () if checkpoint else (self.previous, self.best, self.last):
                path.unlink(missing_ok=True)
            if self.log.stat().st_size:
                os.truncate(self.log, checkpoint["log_bytes"] if checkpoint else 0)


def lock(path, locks, name):
    """Open a file, made if there is none, and lock it until the ExitStack `locks` ends, which removes it if it is empty
    -> the open file. Raises UserError if another run has locked it, which then is writing the file `name`."""
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        for _ in range(9):  # the run that held it may just be removing it
            file = open(path, "a+b")
            try:
                if fcntl:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                file.close()
                raise UserError(f"another run is writing {name}: wait for it, or choose another --log-file or "
                                "--checkpoint") from None
            except OSError:  # a file system without locks
                pass
            if path.exists() and os.path.samestat(path.stat(), os.fstat(file.fileno())):
                break
            file.close()
    locks.enter_context(file)

    def remove():
        with contextlib.suppress(OSError):  # Windows removes no open file
            if not path.stat().st_size:
                path.unlink()
    locks.callback(remove)
    return file


def temporary(path):
    """Where a file is written before it gets its name."""
    return path.with_name(path.name + ".tmp")


def write_record(path: Path, kind: str, **fields) -> None:
    """Append a line of JSON to the log, through to the disk, by process 0. NaN and Infinity raise ValueError, a disk
    that does not take it UserError; the log then stays as it was."""
    once(append_line, path, json.dumps({"kind": kind, **fields}, allow_nan=False).encode() + b"\n")


def append_line(path, line):
    with writing(path), open(path, "ab", buffering=0) as log:
        size, left = log.tell(), line
        try:
            while left:
                left = left[log.write(left):]
            os.fsync(log.fileno())
        except OSError:
            log.truncate(size)
            raise


def read_records(path, start=0):
    """The records of a log from a byte on. Lines that are no records are skipped: a crash may cut off the last one.
    Raises UserError if the file cannot be read."""
    try:
        lines = path.read_bytes()[start:].splitlines()
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    records = []
    for line in lines:
        with contextlib.suppress(ValueError, RecursionError):
            records.append(json.loads(line))
    return [record for record in records if isinstance(record, dict)]


def existing_data(name: str) -> Path | None:
    """The path of a data file: a bare name that is not found here is looked for in data/. None if there is none."""
    return next((path for path in (Path(name), HERE / "data" / name) if path.exists()), None)


def find_data(name: str) -> Path:
    """existing_data, or the name as it is. If the default text is missing, the committed synthetic corpus stands in,
    loudly, so that a fresh clone trains."""
    path = existing_data(name) or Path(name)
    if not path.exists() and name == DEFAULT_DATA:
        say(f"*** There is no {name}: TRAINING ON THE SYNTHETIC CORPUS data/synthetic.tokens INSTEAD.\n"
            "*** For WikiText-2, run `make data` (or python3 data/wikitext2.py) and start again.")
        path = HERE / "data" / "synthetic.tokens"
    return path


# ---- Checkpoints -----------------------------------------------------------------------------------------------------

FORMAT = "alrt-checkpoint-3"
SEAL = b"\nalrt sha256 "  # a checkpoint ends with this and the SHA-256 of what is before: torch.load has no checksum


def sha256_of(file, size):
    """The SHA-256, in hexadecimal, of the first `size` bytes of an open file."""
    digest = hashlib.sha256()
    file.seek(0)
    for start in range(0, size, 2**20):
        digest.update(file.read(min(size - start, 2**20)))
    return digest.hexdigest().encode()


def save(path: Path, content: dict, previous: Path | None = None) -> None:
    """torch.save with a seal. A crash leaves no half file under `path`; the file that was there becomes `previous`.
    Raises UserError if the disk does not take it; what was there then stays."""
    with writing(path):
        try:
            with open(temporary(path), "w+b") as file:
                torch.save(content, file)
                file.write(SEAL + sha256_of(file, file.tell()))
                file.flush()
                os.fsync(file.fileno())
            if previous and path.exists():
                os.replace(path, previous)
            os.replace(temporary(path), path)
        except (OSError, RuntimeError) as error:  # torch.save, cut off by the disk, ends with an error of its own
            temporary(path).unlink(missing_ok=True)
            raise (error.__context__ if isinstance(error.__context__, OSError) else error) from None


def out_of_memory(error):
    return isinstance(error, MemoryError) or isinstance(error, RuntimeError) and bool(
        re.search("out of memory|(allocate|enough) memory|size calc", str(error)))


def load(path: Path) -> dict:
    """What save() wrote, on the CPU; runs no code from the file. Raises UserError for anything else, TrainingError if
    memory runs out."""
    try:
        with open(path, "rb") as file:
            size = max(file.seek(0, os.SEEK_END) - len(SEAL) - 64, 0)
            file.seek(size)
            sealed, seal = file.read(len(SEAL)) == SEAL, file.read()
            if sealed and seal != sha256_of(file, size):
                raise UserError(f"{path} is damaged: its checksum is wrong")
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
        version = content["format"]
    except Exception as error:  # torch.load raises whatever foreign bytes lead to
        if sealed and out_of_memory(error):
            raise TrainingError(f"{path} is whole, but to read it takes more memory than there is") from None
        version = None
    if sealed and version == FORMAT:
        return content
    if isinstance(version, str) and version.startswith("alrt-checkpoint-") and version != FORMAT:
        raise UserError(f"{path} is of another version of this suite: {version}, and this one reads {FORMAT}")
    raise UserError(f"{path} is not a checkpoint of this suite, or its end is missing")


def find_checkpoint(args, files):
    """What --resume and --overwrite ask for, given the files that exist -> the checkpoint to go on from, or None."""
    log, last, previous, _ = files
    existing = [path for path in files if path.exists() and path.stat().st_size]
    if not args.resume:
        if existing and not args.overwrite:
            raise UserError(f"{existing[0]} exists: --resume continues its run, --overwrite replaces it, "
                            "--log-file NAME writes elsewhere")
        return None
    if not existing:
        say(f"nothing to resume yet, there is no {log} and no {last}: starting")
        return None
    if last not in existing and previous not in existing:
        epochs = sum(record.get("kind") == "epoch" for record in read_records(log)) if log in existing else 0
        if epochs or existing != [log]:
            raise UserError(f"{log} has {epochs} finished epochs, but there is no checkpoint {last} to go on from: "
                            "--checkpoint names another one, --overwrite starts over")
        say(f"{log} has no checkpoint and no finished epoch yet: starting over")
        return None
    if last not in existing:  # a crash between two renames, or the user's choice
        say(f"{last} is missing: going on from the one before it, {previous}")
        last = previous
    try:
        checkpoint = load(last)
    except UserError as error:
        with contextlib.suppress(UserError):  # `previous` may be missing, or as bad
            step = load(previous)["state"]["step"]
            error = UserError(f"{error}; the one before it, {previous}, is good: remove {last}, and --resume goes on "
                              f"from step {step:,}")
        raise error from None
    if "settings" not in checkpoint:
        raise UserError(f"{last} holds only a model; a run is resumed from its last checkpoint, not from its best one")
    return checkpoint


def compare_settings(args, settings, defaults, checkpoint, files):
    """Raises UserError if a checkpoint is not of this run; `defaults` are the flags' and count for those that an older
    checkpoint does not know -> True if it is of another device, or another number of processes or parts."""
    old = defaults | checkpoint["settings"]
    free = {"epochs", "checkpoint_minutes", "resume", "overwrite", "log_file", "checkpoint", "data_file", "command",
            "device", "processes", "grad_accum", *(["dtype"] if args.dtype == "auto" else [])}
    changed = [f"{name} was {old[name]} and is now {value}" for name, value in settings.items()
               if name not in free and value != old[name]]
    if changed:
        raise UserError(f"a run is resumed with its own data and settings, but {', '.join(changed)}; only --epochs, "
                        "--checkpoint-minutes, --grad-accum, the device and the number of processes may change")
    if checkpoint["state"]["step"] > args.epochs * args.steps_per_epoch:
        raise UserError(f"{files.last} is already past --epochs {args.epochs}")
    if not files.log.exists() or files.log.stat().st_size < checkpoint["log_bytes"]:
        raise UserError(f"{files.log} is missing, or shorter than when {files.last} was written")
    if (args.lr_schedule == "cosine" or args.warmup_steps is None) and args.epochs != old["epochs"]:
        say("*** --epochs has changed, and with it the schedule: an uninterrupted run would have differed")
    moves = [move.format(settings[name], old[name]) for name, move in (
        ("device", "on {} instead of {}"), ("processes", "with {} processes instead of {}"),
        ("grad_accum", "in {} parts per step instead of {}")) if settings[name] not in (None, old[name])]
    for move in moves:
        say(f"*** going on {move}: the run is no longer bit for bit the one that was never interrupted")
    return bool(moves)


# ---- Models in files -------------------------------------------------------------------------------------------------

def model_content(model: GPT, vocabulary: list) -> dict:
    """What build_model reads, for save()."""
    return {"format": FORMAT, "config": asdict(model.config), "vocabulary": vocabulary,
            "ranks": [layer.rank for layer in model.linears().values()], "end_ranks": model.end_ranks(),
            "model": model.state_dict()}


def build_model(content: dict, linear=LowRankLinearAdaptiveSpectral) -> GPT:
    """The model of a checkpoint's content: DenseLinear where its rank is None, else linear(n, m, rank).

    Raises UserError for content that holds no model of this suite; an error of linear's own is raised as it is.
    """
    def model_of(linear):
        ranks = iter(content["ranks"] or itertools.repeat(None))  # older versions noted none of a dense model
        return GPT(config, lambda n, m: DenseLinear(n, m) if (rank := next(ranks)) is None else linear(n, m, rank),
                   content.get("end_ranks", (None, None)))

    def foreign(error):
        return UserError(f"the checkpoint does not hold a model of this suite ({type(error).__name__})")
    try:
        config, weights = GPTConfig(**content["config"]), content["model"]
        with torch.device("meta"):  # nothing of a wrong size is made for real
            sizes = {name: parameter.shape for name, parameter in
                     model_of(LowRankLinearAdaptiveSpectral).named_parameters()}
        if any(weights[name].shape != size for name, size in sizes.items() if name in weights):
            raise IndexError("a weight of another shape")
    except Exception as error:  # sealed, but not by this code
        raise foreign(error) from None
    model = model_of(linear)
    try:
        model.load_state_dict(weights)
    except Exception as error:
        raise foreign(error) from None
    return model


def start_from(content: dict, variant: Variant, dropout: float) -> GPT:
    """The model of a checkpoint's content with the layers of a variant, for --init-from: a factored layer is multiplied
    out where the variant's are dense, a dense one becomes factors of full rank, evenly split, where they are not."""
    source = build_model(content)
    ranks = iter([layer.rank or min(layer.shape) for layer in source.linears().values()])
    model = GPT(replace(source.config, dropout=dropout), lambda n, m: variant.linear(n, m, next(ranks)),
                source.end_ranks())
    model.load_state_dict(source.state_dict(), strict=False)  # but for layers of another kind
    for old, new in zip(source.linears().values(), model.linears().values(), strict=True):
        if new.rank is None:
            new.weight.data = torch.matmul(*old.factors())
        elif old.rank is None:
            new.set_factors(*dense_factors(old.weight.detach(), new.rank))
    return model


def check_start(content, args, vocabulary):
    """Raises UserError if the model of --init-from is not one of these flags, but for dropout, and of this text."""
    try:
        config = asdict(GPTConfig(**content["config"])) | {"dropout": args.dropout}
    except (TypeError, LookupError):
        raise UserError(f"{args.init_from} does not hold a model of this suite") from None
    asked = asdict(GPTConfig.of_flags(args, len(vocabulary))) | {"vocab_size": config["vocab_size"]}
    flags = [f"--{'no-' * (value is False)}{name.replace('_', '-')}" + f" {value}" * (not isinstance(value, bool))
             for name, value in config.items() if value != asked[name]]
    if flags:
        raise UserError(f"{args.init_from} holds another model, of {' '.join(flags)}")
    if content["vocabulary"] != vocabulary:
        raise UserError(f"{args.init_from} has another vocabulary, of {len(content['vocabulary']):,} words, than the "
                        f"text, of {len(vocabulary):,}")


def load_model(path: str | Path, linear=LowRankLinearAdaptiveSpectral) -> tuple[GPT, list]:
    """A checkpoint, last or best -> (model in evaluation mode, on the CPU; its vocabulary). A variant with a factored
    layer of its own gives its `linear`."""
    content = load(Path(path))
    return build_model(content, linear).eval(), content["vocabulary"]


@torch.no_grad()
def generate(model: GPT, vocabulary: list, text: str | list[int], n_tokens: int = 50, temperature: float = 1.0,
             seed: int = 0, top_k: int | None = None) -> str | list[int]:
    """Continue a text, or tokens if their words are not known, by n_tokens sampled tokens -> the whole; greedily at
    temperature 0, else from the top_k likeliest (all by default). Unknown words become <unk>. Raises UserError for what
    makes no sense.

    A bidirectional model has learnt to copy what comes next; with nothing there, its words mean nothing.
    """
    kind = model.config.tokenize
    if not 0 <= temperature < math.inf:
        raise UserError(f"temperature {temperature} is not a number of 0 or more")
    if top_k is not None and top_k < 1:
        raise UserError(f"top_k {top_k} is not 1 or more")
    text = text.encode("utf-8").decode("latin-1") if kind == "bytes" else text
    tokens = encode(text.split() if kind == "words" else list(text), vocabulary)[None].to(model.norm.weight.device)
    if not tokens.numel():
        raise UserError("generate needs at least one token to continue")
    generator = torch.Generator().manual_seed(seed)
    for _ in range(n_tokens):
        logits = model(tokens[:, -model.config.block_size:])[:, -1].cpu()  # (1, V)
        best, words = logits.topk(min(top_k or len(vocabulary), len(vocabulary)) if temperature else 1)
        p = ((best - best[:, :1]) / (temperature or 1)).softmax(-1)
        word = words.gather(1, torch.multinomial(p, 1, generator=generator))
        tokens = torch.cat([tokens, word.to(tokens.device)], dim=1)
    if kind == "numbers":
        return tokens[0].tolist()
    text = (" " if kind == "words" else "").join(vocabulary[i] for i in tokens[0])
    return text.encode("latin-1").decode("utf-8", errors="replace") if kind == "bytes" else text


def dense_weights(model: GPT) -> dict[str, Tensor]:
    """{name: W (m, n)} of the linear layers, on the CPU, for use elsewhere: the product U V if a layer is factored."""
    return {name: torch.matmul(*layer.factors()) for name, layer in model.linears().items()}


def final_ranks(path):
    """The ranks at the end of a log, for --ranks-from. Raises UserError if it has none."""
    ranks = next((record.get("ranks") for record in reversed(read_records(path))
                  if record.get("kind", "epoch") == "epoch"), None)
    if not isinstance(ranks, list) or not ranks or not all(type(rank) is int for rank in ranks):
        raise UserError(f"{path} does not end with the ranks of a factored model: --ranks-from needs such a log")
    return ranks


# ==== Part 4: the command line ========================================================================================

class Parser(argparse.ArgumentParser):
    def error(self, message):
        raise UserError(f"{message} (--help lists the flags)")


def number(kind: type, least=-math.inf, above=-math.inf, below=None):
    """An argparse type: a finite number of this kind within these bounds; a whole one is below 2^31 unless told."""
    below = below or (2**31 if kind is int else math.inf)
    bounds = [f" {word} {bound:,}" for word, bound in (("at least", least), ("above", above), ("below", below))
              if math.isfinite(bound)]
    what = "whole number" if kind is int else "number"

    def parse(text):
        with contextlib.suppress(ValueError):
            if least <= (value := kind(text)) < below and value > above:
                return value
        raise argparse.ArgumentTypeError(f"{text!r} is not a {what}{' and'.join(bounds)}")
    return parse


PATH = os.path.expanduser  # a shell expands no ~ in --flag=~/name
COUNT, POSITIVE, FRACTION = number(int, least=1), number(float, above=0), number(float, least=0, below=1)


def build_parser(variant: Variant) -> Parser:
    """The flags, grouped."""
    parser = Parser(prog=variant.name, allow_abbrev=False, formatter_class=argparse.ArgumentDefaultsHelpFormatter,
                    description=variant.description)
    add_model_flags(parser)
    variant.add_flags(parser)
    add_training_flags(parser)
    flag = parser.add_argument_group("files").add_argument
    flag("--log-file", type=PATH, default=variant.log_file, help="JSON Lines, one record per epoch")
    flag("--checkpoint", type=PATH,
         help="last checkpoint, NAME.pt; the best one is NAME.best.pt; by default beside the log")
    flag("--checkpoint-minutes", type=POSITIVE, default=10.0, help="minutes between checkpoints inside an epoch")
    flag("--resume", action="store_true", help="go on from the last checkpoint, if there is one, else start; --epochs, "
         "--checkpoint-minutes, the device and the number of processes may differ")
    flag("--overwrite", action="store_true", help="replace an existing log and its checkpoints")
    flag("--telemetry", action="store_true", help="log what the last step of each epoch does to each linear layer")
    parser.set_defaults(**variant.defaults)
    return parser


def parse_flags(variant: Variant, argv: list[str]) -> argparse.Namespace:
    """A variant's flags, complete. Raises UserError."""
    args = build_parser(variant).parse_args(argv)
    variant.complete(args)
    return args


def add_model_flags(parser):
    flag = parser.add_argument_group("data").add_argument
    flag("--data-file", type=PATH, default=DEFAULT_DATA,
         help="text to train on, a folder of data/prepare.py, or tokens in nanoGPT's format (with --vocab-size); a "
         "bare name is looked for here, then in data/")
    flag("--tokenize", choices=("words", "chars", "bytes"), default="words",
         help="what a token is: a word between spaces, a character, or a byte")
    flag("--min-count", type=COUNT, default=1, help="words that occur less often in the text become <unk>")
    flag("--vocab-size", type=number(int, least=2, below=2**16 + 1), metavar="V",
         help="how many words there are, for tokens without a vocabulary, as nanoGPT's and modded-nanogpt's files have")
    flag("--val-fraction", type=number(float, above=0, below=1), default=0.01, help="share held out at the end")
    flag("--val-tokens", type=number(int, least=2), metavar="N", help="evaluate on the first N of the held-out tokens "
         "at most")
    flag("--test-file", type=PATH,
         help="one more held-out text, evaluated at the end on the best and the last checkpoint")
    flag = parser.add_argument_group("model").add_argument
    flag("--d-model", type=COUNT, default=GPTConfig.d_model, help="width")
    flag("--n-layers", type=number(int, least=1, below=1000), default=GPTConfig.n_layers, help="blocks")
    flag("--n-heads", type=COUNT, default=GPTConfig.n_heads, help="attention heads")
    flag("--d-ff", type=COUNT, default=GPTConfig.d_ff, help="width of the feed-forward layers")
    flag("--block-size", type=number(int, least=2), default=GPTConfig.block_size, help="context length in tokens")
    flag("--attention", choices=("causal", "bidirectional"), default=GPTConfig.attention,
         help="bidirectional has no mask: the model sees its targets, as in the report")
    flag("--dropout", type=FRACTION, default=GPTConfig.dropout, help="dropout probability")
    flag("--tie-embeddings", action=argparse.BooleanOptionalAction, default=GPTConfig.tie_embeddings,
         help="the head's matrix is the token embedding's")
    flag("--share-layers", action=argparse.BooleanOptionalAction, default=GPTConfig.share_layers,
         help="all blocks have the linear layers of the first")
    flag("--init-from", type=PATH, metavar="CKPT", help="start from the weights and ranks of a checkpoint, also of one "
         "that compress.py has cut, without its optimizer; sizes and vocabulary have to be its own")


def add_rank_flags(parser):
    """The flags of the report's method."""
    group = parser.add_argument_group("ranks")
    start, flag = group.add_mutually_exclusive_group().add_argument, group.add_argument
    start("--init-rank", type=COUNT, default=64,
          help="rank of every layer at the start; None: half of the width")
    start("--ranks-from", type=PATH, metavar="LOG",
          help="each layer starts at the rank that it has at the end of this log")
    flag("--min-rank", type=COUNT, default=RankController.min_rank, help="smallest rank")
    flag("--max-rank", type=COUNT, help="largest rank; by default the smaller side of each matrix")
    flag("--fixed-rank", action=argparse.BooleanOptionalAction, default=False, help="ranks stay as they start")
    flag("--safety-factor", type=POSITIVE, default=RankController.safety_factor, help="target rank / stable rank")
    flag("--ema-decay", type=FRACTION, default=RankController.ema_decay, help="smoothing of the target")
    flag("--change-threshold", type=number(float, least=0), default=RankController.change_threshold,
         help="smallest distance between rank and smoothed target that moves the rank")
    flag("--max-step", type=COUNT, default=RankController.max_step, help="largest change of a rank at an update")
    flag("--rank-interval", type=COUNT, help="training steps between rank updates; by default an epoch")
    flag("--optimizer-on-resize", choices=("reinit", "transport"), default="reinit",
         help="drop the optimizer's state of every parameter (the report's way), or carry it through the resize")


def add_training_flags(parser):
    flag = parser.add_argument_group("training").add_argument
    flag("--power-iterations", type=number(int, least=0, below=1000), default=5, help="for the stable rank; 0: exact")
    flag("--epochs", type=COUNT, default=30, help="epochs in all, those before a --resume included")
    flag("--steps-per-epoch", type=COUNT, default=200, help="optimizer steps per epoch")
    flag("--batch-size", type=number(int, least=1, below=2**20), default=32, help="windows of --block-size tokens")
    flag("--one-pass", action="store_true", help="read the training text once, in order, instead of windows at random")
    flag("--grad-accum", type=COUNT, help="parts that a process takes its windows in: the same step on less memory; by "
         "default as many as keep a part within 2,048 tokens on a CPU and 32,766 on MPS, else 1")
    flag("--lr", type=POSITIVE, default=3e-4, help="learning rate")
    flag("--lr-schedule", choices=("constant", "cosine"), default="constant", help="cosine falls to 0 at the end")
    flag("--warmup-steps", type=number(int, least=0), default=0, help="steps of linear warm-up; None: 5%%")
    flag("--weight-decay", type=number(float, least=0), default=0.01, help="AdamW's")
    flag("--grad-clip", type=number(float, least=0), default=0.0, help="largest norm of the gradient; 0: no clipping")
    flag("--seed", type=number(int, least=0, below=2**63), default=0, help="of weights, batches, dropout, estimates")
    flag("--device", choices=("auto", "cuda", "mps", "cpu"), default="auto", help="auto: the first one there")
    flag("--compile", action="store_true", help="torch.compile: a minute or two first, needs a C++ compiler")
    flag("--dtype", choices=("auto", "float32", "bfloat16"), default="auto",
         help="of the products; auto: bfloat16 on CUDA if native, and on a CPU if at least twice as fast")


def check_flags(args):
    """Raises UserError if one flag contradicts another."""
    if args.d_model % args.n_heads:
        raise UserError(f"--d-model {args.d_model} is not a multiple of --n-heads {args.n_heads}")
    if args.resume and args.overwrite:
        raise UserError("--resume and --overwrite exclude each other")
    if (args.warmup_steps or 0) >= args.epochs * args.steps_per_epoch:
        raise UserError(f"--warmup-steps {args.warmup_steps} leaves nothing of the run")
    if args.telemetry and args.compile:
        raise UserError("--telemetry and --compile exclude each other")
    parts = process_count() * (args.grad_accum or 1)
    if args.batch_size % parts:
        raise UserError(f"--batch-size {args.batch_size} cannot be split evenly into {parts} parts "
                        f"({process_count()} processes, --grad-accum {args.grad_accum or 1})")
    if args.init_from and args.ranks_from:
        raise UserError("--init-from and --ranks-from exclude each other")
    if args.init_from and not args.fixed_rank:  # which has ranks of its own, to be moved within these bounds
        check_ranks([args.min_rank], "--min-rank", args)
    elif "init_rank" in args and not args.ranks_from and not args.init_from:
        check_ranks([args.init_rank], "--init-rank", args)


def check_ranks(ranks, source, args):
    """Raises UserError for an initial rank out of bounds."""
    side = min(args.d_model, args.d_ff)
    low, high = (1, side) if args.fixed_rank else (args.min_rank, min(args.max_rank or side, side))
    for rank in ranks:
        if not low <= rank <= high:
            raise UserError(f"{source} {rank} is not between {low} and {high}, as --min-rank, --max-rank and the "
                            "smaller side of the matrices ask")


def read_request(args, variant, command, locks):
    """Find whatever is wrong with what the flags ask for before any long work, and lock its files in the ExitStack
    `locks` -> Request, or None if the run is finished already."""
    check_flags(args)
    device = pick_device(args.device)
    data, *tests = (find_data(name) for name in (args.data_file, args.test_file) if name is not None)
    parts = [data / name for name in ("corpus.json", "tokens.bin", "train.bin", "val.bin") if data.is_dir()]
    files = Files.named(args, data, *parts, *tests, *(Path(name) for name in (args.ranks_from, args.init_from) if name))
    corpus = load_corpus(data, args.val_fraction, args.block_size, args.tokenize, args.min_count, args.vocab_size,
                         args.val_tokens)
    if args.tokenize not in ("words", corpus.tokenize) or args.min_count > 1 and holds_tokens(data):
        raise UserError(f"{data} holds tokens already, {corpus.tokenize}: --tokenize and --min-count are for texts")
    args.tokenize = corpus.tokenize
    steps, most = args.epochs * args.steps_per_epoch, (len(corpus.train) - 1) // args.batch_size // args.block_size
    if args.one_pass and steps > most:
        raise UserError(f"--one-pass over {len(corpus.train):,} training tokens ends after {most:,} steps, not "
                        f"{steps:,}: lower --epochs, --steps-per-epoch, --batch-size or --block-size")
    if args.tokenize == "words" and len(corpus.vocabulary) > (len(corpus.train) + len(corpus.val)) / 2:
        say(f"*** more than half of the words of {data.name} are distinct: if it is a text without spaces, "
            "--tokenize chars fits it better")
    test_tokens = read_tokens(tests[0], corpus.tokenize, corpus.vocabulary) if tests else None
    if tests and len(test_tokens) < 2:
        raise UserError(f"{args.test_file} has {len(test_tokens)} words; a test needs 2 or more")
    settings = vars(args) | {
        "script": variant.name, "command": command, "processes": process_count(), "device": device.type,
        "data_file": data.absolute().name, "data_sha256": corpus.sha256, "test_file": tests[0].name if tests else None,
        "ranks_from": args.ranks_from and Path(args.ranks_from).name,
        "init_from": args.init_from and Path(args.init_from).name,
        "log_file": files.log.name, "checkpoint": files.last.name}
    if args.ranks_from or args.init_from:
        settings["init_rank"] = None
    once(files.claim, locks)
    checkpoint = find_checkpoint(args, files)
    if len(steps := set(gather(checkpoint and checkpoint["state"]["step"]))) > 1:
        raise UserError(f"the processes found different checkpoints, of the steps {', '.join(map(str, steps))}: "
                        f"{files.last} has to lie on a disk that all machines share")
    moved = checkpoint is not None and compare_settings(
        args, settings, vars(build_parser(variant).parse_args([])), checkpoint, files)
    initial_ranks = final_ranks(Path(args.ranks_from)) if args.ranks_from and not checkpoint else []
    check_ranks(initial_ranks, f"{args.ranks_from}: rank", args)
    start = load(Path(args.init_from)) if args.init_from and not checkpoint else None
    if start:
        check_start(start, args, corpus.vocabulary)
    if not args.grad_accum:
        settings["grad_accum"] = (checkpoint["settings"]["grad_accum"] if checkpoint and not moved else
                                  default_grad_accum(args.batch_size // process_count(), args.block_size, device))
    dtype_reason = "as --dtype asks"
    if args.dtype == "auto" and checkpoint and checkpoint["settings"]["device"] == device.type:
        settings["dtype"], dtype_reason = checkpoint["settings"]["dtype"], "as the run began"
    elif args.dtype == "auto":
        settings["dtype"], dtype_reason = once(choose_dtype, device, args.d_model)
    if checkpoint and checkpoint["state"]["step"] == args.epochs * args.steps_per_epoch and any(
            record.get("kind") == "end" for record in read_records(files.log, checkpoint["log_bytes"])):
        say(f"{files.log} is finished: {args.epochs} epochs. A larger --epochs continues it.")
        return None
    return Request(variant, args, settings, dtype_reason, device, files, corpus, test_tokens, initial_ranks, start,
                   checkpoint, moved)


def main(argv: list[str] | None = None, variant: Variant | None = None) -> int:
    """Run a command line -> exit code."""
    handlers = handle_signals(interrupt)
    try:
        with screens():
            return run_command(sys.argv[1:] if argv is None else argv, variant or Variant())
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def run_command(argv, variant):
    """main() on a screen that may vanish."""
    def fail(message, code, everywhere=False):
        report_failure(variant.name, message, everywhere)
        return code

    try:
        if dist.is_torchelastic_launched():
            join_processes()
        args = parse_flags(variant, argv)
        words = [re.sub(r"[^=]*/(?=.)", "", word) for word in argv]  # base names, never paths
        with contextlib.ExitStack() as locks:
            signal_number, request = 0, read_request(args, variant, shlex.join([variant.name, *words]), locks)
            if request:
                run = build_run(request)
                begin(run)
                signal_number = train(run)
                if not signal_number:
                    finish(run)
        if signal_number:
            return fail(f"interrupted; step {run.state.step:,} of {run.total_steps:,} is saved in {run.files.last}: "
                        "the same command with --resume goes on from there", 128 + signal_number)
        gather("done")  # the processes end together
        return 0
    except (UserError, TrainingError) as error:
        return fail(f"error: {error}", 2 if isinstance(error, UserError) else 1)
    except OSError as error:
        return fail(f"error: cannot use {error.filename or 'a file'}: {error.strerror}", 2)
    except KeyboardInterrupt as error:
        return fail("interrupted; --resume goes on from the last checkpoint, if there is one",
                    128 + (error.args[0] if error.args else signal.SIGINT), everywhere=True)
    except (RuntimeError, MemoryError) as error:
        if out_of_memory(error):
            return fail("error: out of memory: try a larger --grad-accum, which takes a step in more parts, or a "
                        "smaller --batch-size, --block-size, --d-model or --d-ff", 2, everywhere=True)
        if process_count() == 1 or not re.search("gloo|NCCL|[Cc]onnection", str(error)):
            raise
        return fail("error: the connection to another process is lost, which has ended; --resume goes on from the last "
                    "checkpoint", 1, everywhere=True)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def report_failure(prog, message, everywhere):
    """Print one line, by the first process of each machine or, if it happened `everywhere` on its own, by each."""
    handle_signals(ignore)  # torchrun ends all processes once one has ended
    first = process_index() == 0 or os.environ.get("LOCAL_RANK") == "0"
    if not first and not everywhere:  # all come to the same error of the user's, and end with this one
        time.sleep(1)
        return
    message = message if len(message) <= 1000 else message[:500] + " ... " + message[-400:]
    message = f"{prog}: " + (f"process {process_index()}: " if process_count() > 1 else "") + message
    print(message, file=sys.stderr)
    if report := os.environ.get("TORCHELASTIC_ERROR_FILE"):  # so that torchrun's own report ends with it
        with contextlib.suppress(OSError):
            Path(report).write_text(json.dumps({"message": {"message": message, "extraInfo": {
                "py_callstack": message, "timestamp": str(int(time.time()))}}}))


if __name__ == "__main__":
    leave(main())
