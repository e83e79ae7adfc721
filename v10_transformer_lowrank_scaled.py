"""Adaptive Low-Rank Training (ALRT), v10: a GPT that finds the ranks of its own linear layers while it trains.

Every linear layer of the transformer's blocks is a product of two thin factors, W = U V with U (out, r) and V (r, in).
Once an epoch each layer's stable rank is estimated,

    stable_rank(W) = ||W||_F^2 / sigma_max(W)^2,

a controller smooths it and proposes a new rank, and the factors are resized by an SVD that is computed from the
factors alone: W itself is never formed. The method is that of the technical report "Adaptive Low-Rank Training via
Spectral Rank Estimation" (December 2025); "report 2.3" below is its section 2.3.

    python3 v10_transformer_lowrank_scaled.py                              the report's configuration, causal
    python3 v10_transformer_lowrank_scaled.py --init-rank 64 --min-rank 8  the same, spelled out
    python3 v10_transformer_lowrank_scaled.py --attention bidirectional    the report's numbers, with its leak
    python3 v10_transformer_lowrank_scaled.py --resume                     go on after an interruption

What it is not: a way to a perplexity of 3.17. The report's attention had no causal mask, so its model saw the word
that it had to predict. Here attention is causal unless asked otherwise, and every run begins with a check.

The method comes first, down to the optimizer. Then comes what makes a run of it: safety, evaluation, several processes,
the training loop, and the flags.

Shapes: B batch, T tokens, C channels (d_model), R rank, V words in the vocabulary; a factored layer has m outputs and
n inputs. Losses are in nats per token.
"""
import argparse
import contextlib
import ctypes
import gc
import hashlib
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
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from torch.autograd.function import once_differentiable
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

try:
    import fcntl
except ImportError:  # Windows: two runs on one log go unnoticed there
    fcntl = None

HERE = Path(__file__).resolve().parent
DEFAULT_DATA = "wiki.train.tokens"
FORMAT = "alrt-checkpoint-3"
PROJECTIONS = ("q", "k", "v", "o", "up", "down")  # the linear layers of a block, in the order of every list in the log


class UserError(ValueError):
    """A mistake of the user's: main() prints it in one line and returns 2."""


class TrainingError(RuntimeError):
    """A run that cannot go on: main() prints it in one line and returns 1."""


TRY = "try a smaller --lr, --warmup-steps 100 or --grad-clip 1"  # where training diverges


# ---- Data: whitespace tokens, a sorted vocabulary, the last part held out --------------------------------------------

def read_words(path, tokenize="words"):
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


def encode(words, vocabulary):
    """Words -> tokens (N,); words outside the vocabulary become <unk>. Raises UserError where it has no <unk>."""
    index = {word: i for i, word in enumerate(vocabulary)}
    unknown = index.get("<unk>")
    tokens = [index.get(word, unknown) for word in words]
    if unknown is None and None in tokens:
        word = words[tokens.index(None)]
        raise UserError(f"{word[:40]!r} is not in the training vocabulary, which has no <unk> for it")
    return torch.tensor(tokens, dtype=torch.long)


def load_corpus(path, val_fraction, block_size, tokenize="words", min_count=1):
    """A text file -> (training tokens, validation tokens (N,), sorted vocabulary, SHA-256 of the file, entropy floor).

    Words that occur fewer than min_count times in the file become <unk>. The floor is the loss of the true generator,
    from the sidecar of a synthetic corpus, else None. Raises UserError where a part is shorter than a block and its
    last target.
    """
    words, sha256 = read_words(path, tokenize)
    if min_count > 1:
        count = Counter(words)
        words = [word if count[word] >= min_count else "<unk>" for word in words]
    vocabulary = sorted(set(words))
    train, val = encode(words, vocabulary).tensor_split([int((1 - val_fraction) * len(words))])
    for name, part in (("training", train), ("validation", val)):
        if len(part) <= block_size:
            raise UserError(f"{path} gives {len(part):,} {name} tokens, and a block needs {block_size + 1:,}: "
                            "use a longer text, a smaller --block-size or another --val-fraction"
                            + ", or --tokenize chars if it has no spaces" * (tokenize == "words"))
    if len(vocabulary) < 2:
        raise UserError(f"{path} repeats a single word, {words[0][:40]!r}: there is nothing to learn in it")
    try:
        sidecar = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
        known = (sidecar["sha256"], sidecar["val_fraction"], tokenize, min_count) == (sha256, val_fraction, "words", 1)
        floor = sidecar["entropy_floor"] if known and math.isfinite(sidecar["entropy_floor"]) else None
    except (OSError, ValueError, LookupError, TypeError, ArithmeticError, RecursionError):
        floor = None  # no sidecar, or a file that is something else
    return train, val, vocabulary, sha256, floor


def sample_batch(tokens, batch_size, block_size, generator):
    """Random windows of tokens (N,) -> inputs (B, T), targets (B, T), the same one token later."""
    starts = torch.randint(len(tokens) - block_size, (batch_size, 1), generator=generator)
    starts = starts.to(tokens.device, non_blocking=tokens.is_cuda)
    windows = tokens[starts + torch.arange(block_size + 1, device=tokens.device)]  # (B, T + 1)
    return windows[:, :-1], windows[:, 1:]


# ---- Spectra of W = U V, without W (on the CPU: the matrices are small, and not every device has decompositions) -----

def stable_rank(U, V, iterations=0, generator=None):
    """||W||_F^2 / sigma_max^2 of W = U V as a float; 0 for W = 0.

    iterations > 0: the report's estimate (2.2, A.1), power iteration from a random vector of n numbers. It gives what
    the same iteration through W gives, in O((m + n) r) a time. It under-states sigma_max and so over-states the stable
    rank, by about 13% for 5 iterations on freshly initialised factors.
    iterations = 0: the exact value, from the singular values of the r x r core (see product_svd).
    """
    if iterations == 0:
        core = torch.linalg.qr(U, mode="r").R @ torch.linalg.qr(V.mT, mode="r").R.mT
        return stable_rank_of(torch.linalg.svdvals(core))
    G_u, G_v = U.mT @ U, V @ V.mT  # (R, R)
    x = torch.randn(V.shape[1], dtype=V.dtype, generator=generator)
    for _ in range(iterations):
        x = F.normalize(V.mT @ (G_u @ (V @ x)), dim=0)  # W^T W x
    sigma_squared = (U @ (V @ x)).square().sum()
    return ((G_u * G_v).sum() / sigma_squared).item() if sigma_squared > 0 else 0.0


def stable_rank_of(S):
    """The stable rank of a matrix with these singular values (R,), descending."""
    return (S.square().sum() / S[0].square()).item() if S[0] > 0 else 0.0


def product_svd(U, V):
    """The SVD of U V in O((m + n) r^2) -> P (m, R), S (R,) descending, Qt (R, n) with U V = P diag(S) Qt.

    U = Q_u R_u and V^T = Q_v R_v by QR; the rest is the SVD of the r x r core R_u R_v^T.
    """
    Q_u, R_u = torch.linalg.qr(U)
    Q_v, R_v = torch.linalg.qr(V.mT)
    P, S, Qt = torch.linalg.svd(R_u @ R_v.mT)
    return Q_u @ P, S, Qt @ Q_v.mT


def product_svds(factors):
    """[product_svd(U, V) for each pair], several at a time on one thread each: within a decomposition of thin matrices
    threads mostly wait for each other. Each has to be told so itself: else its results vary in the last bits."""
    threads = torch.get_num_threads()
    try:
        with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            return list(pool.map(product_svd, *zip(*factors, strict=True)))
    finally:
        torch.set_num_threads(threads)


def resize_factors(U, V, k, generator, svd=None):
    """Factors of rank k for W = U V (report 2.4) -> (U' (m, k), V' (k, n), A (r, k), B (k, r), carried).

    `svd` is product_svd's result, where it is known already.

    The first `carried` directions come from the old factors, U' = U A and V' = B V; the others are new, and zero in A
    and B. Shrinking keeps the k largest singular values and splits them evenly: U' = P_k S_k^1/2, V' = S_k^1/2 Q_k^T,
    the best approximation of rank k (Eckart and Young); A = V V'^T S_k^-1 and B = S_k^-1 U'^T U, so no factor is
    inverted. A direction below 1e-5 sigma_1 is rounding, not memory (in float32): it is grown afresh.

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
        kept_U, kept_V = P * S.sqrt(), S.sqrt()[:, None] * Qt
        A, B = V @ kept_V.mT / S, kept_U.mT @ U / S[:, None]
        scale = kept_V.norm(dim=1).mean() if carried else scale
    new = k - carried
    if not new:
        return kept_U, kept_V, A, B, carried
    noise = torch.randn(V.shape[1], new, dtype=V.dtype, generator=generator)
    rows = scale * torch.linalg.qr(torch.cat([kept_V.mT, noise], dim=1)).Q[:, carried:].mT  # (new, n)
    return (F.pad(kept_U, (0, new)), torch.cat([kept_V, rows]), F.pad(A, (0, new)), F.pad(B, (0, 0, 0, new)), carried)


# ---- The low-rank layer ----------------------------------------------------------------------------------------------

class LowRankLinearAdaptiveSpectral(nn.Module):
    """x (..., n) -> x V^T U^T (..., m), without bias (report 2.1). The rank is U's width and is stored nowhere else.

    At initialisation U ~ N(0, 1/m) and V ~ N(0, 1/n) (variances). U lies in memory column by column: its products, and
    above all that of its gradient, are faster so.
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
        for parameter, value in ((self.U, by_columns(U)), (self.V, V.contiguous())):
            parameter.data = value.to(parameter.device)
            parameter.grad = None


def by_columns(matrix):
    """The same matrix, in memory column by column."""
    return matrix.T.contiguous().T


def side_by_side(layers, x):
    """[layer(x) for each layer]. Factored ones share the product with V: one wide product beats thin ones."""
    if not all(isinstance(layer, LowRankLinearAdaptiveSpectral) for layer in layers):
        return [layer(x) for layer in layers]
    h = F.linear(x, torch.cat([layer.V for layer in layers])).split([layer.rank for layer in layers], dim=-1)
    return [F.linear(part, layer.U) for part, layer in zip(h, layers, strict=True)]  # (..., R) -> (..., m)


# ---- The rank controller ---------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class RankController:
    """Proposes a layer's next rank from its stable rank (report 2.3). It holds settings; the state is passed in."""

    safety_factor: float = 1.5
    ema_decay: float = 0.8
    change_threshold: float = 2.0
    max_step: int = 4
    min_rank: int = 8
    max_rank: float = math.inf

    def propose(self, rank, ema, stable_rank):
        """-> (new rank, new ema, target, reason); a pure function. `ema` is the last one, at first the initial rank.

        The reason: `keep` (the smoothed target is within the threshold), `slew` (the step was cut to max_step), `step`
        (it was not), `min` or `max` (the new rank is that bound).
        """
        target = min(max(self.safety_factor * stable_rank, self.min_rank), self.max_rank)
        ema = self.ema_decay * ema + (1 - self.ema_decay) * target
        d = ema - rank
        if abs(d) < self.change_threshold:
            return rank, ema, target, "keep"
        new = rank + min(max(round(d), -self.max_step), self.max_step)
        if not self.min_rank < new < self.max_rank:
            return (self.min_rank, ema, target, "min") if new <= self.min_rank else (self.max_rank, ema, target, "max")
        return new, ema, target, "slew" if abs(round(d)) > self.max_step else "step"


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


def attention(q, k, v, causal, dropout):
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
        q, k, v = (y.view(B, T, self.config.n_heads, -1).transpose(1, 2)
                   for y in side_by_side((self.q, self.k, self.v), x))  # (B, heads, T, C / heads)
        y = attention(q, k, v, self.config.attention == "causal", self.config.dropout if self.training else 0.0)
        return self.o(y.transpose(1, 2).reshape(B, T, C))

    def forward(self, x):
        x = x + self.drop(self.attend(self.norm_1(x)))
        return x + self.drop(self.down(F.gelu(self.up(self.norm_2(x)))))


LOGITS_BYTES = 4 * 10**8  # the memory for a tile of logits: small beside all of them, enough for fast products
CACHE_BYTES = 2**23  # the logits that a CPU turns into gradients at a time: they stay in its cache from pass to pass
REDUCTION = 2**14  # no product sums over more words at once: from 32,767 on, Metal's may be wrong (pytorch#193487)


class LinearCrossEntropy(torch.autograd.Function):
    """The mean cross entropy of x W^T + b, for x (N, C), W (V, C), b (V,) and targets (N,), without its N x V logits.

    The logits exist for a tile of tokens at a time, as many as fit in LOGITS_BYTES. They become p, then p - onehot, the
    gradient, from which those of x, W and b are formed at once; the backward pass only scales them. Without `grad` none
    of that is done. Products run in `dtype`; the bias, probabilities, the loss and sums over tiles stay in W's.
    """

    @staticmethod
    def forward(ctx, x, W, b, targets, dtype, grad):
        N, V, on_cpu = len(x), len(W), W.device.type == "cpu"
        tokens = LOGITS_BYTES // (V * W.element_size())
        tokens = min(N, 1 << max(tokens.bit_length() - 1, 0))  # a power of two: odd sizes make slower products
        rows = max(1, CACHE_BYTES // (V * W.element_size())) if on_cpu else tokens
        logits = torch.empty(tokens, V, dtype=dtype, device=W.device)
        exact = torch.empty(min(rows, tokens), V, dtype=W.dtype, device=W.device) if dtype != W.dtype else None
        low_W, loss = W.to(dtype), W.new_zeros(())
        d_x, d_W = (torch.empty_like(p, dtype=W.dtype) for p in (x, W)) if grad else (None, None)
        d_b = torch.zeros_like(b) if grad else None
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
        ctx.save_for_backward(d_x, d_W, d_b)
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


class GPT(nn.Module):
    """Tokens (B, T) -> logits (B, T, V) in float32; with targets (B, T) -> their mean cross entropy, a scalar.

    What does not depend on `linear` is drawn first, so that models of one seed share it bit for bit.
    """

    def __init__(self, config, linear):
        super().__init__()
        self.config = config
        self.bfloat16 = False  # run the forward pass under bfloat16 autocast; parameters and loss stay in float32
        self.token_embedding = nn.Embedding(config.vocab_size, config.d_model)
        self.position_embedding = nn.Embedding(config.block_size, config.d_model)
        self.head = nn.Linear(config.d_model, config.vocab_size)
        self.norm = nn.LayerNorm(config.d_model)
        self.drop = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(Block(config, linear) for _ in range(config.n_layers))

    def features(self, tokens):
        """(B, T) -> (B, T, C), what the head sees."""
        with torch.autocast(tokens.device.type, torch.bfloat16, enabled=self.bfloat16):
            x = self.drop(self.token_embedding(tokens) + self.position_embedding.weight[:tokens.shape[1]])  # (B, T, C)
            for block in self.blocks:
                x = block(x)
            return self.norm(x)

    def logits(self, x):
        """(B, T, C) -> (B, T, V) in float32."""
        with torch.autocast(x.device.type, torch.bfloat16, enabled=self.bfloat16):
            return self.head(x).float()

    def forward(self, tokens, targets=None):
        x = self.features(tokens)
        if targets is None:
            return self.logits(x)
        return LinearCrossEntropy.apply(x.flatten(0, 1), self.head.weight, self.head.bias, targets.flatten(),
                                        torch.bfloat16 if self.bfloat16 else x.dtype, torch.is_grad_enabled())

    def linears(self):
        """{name: layer} of the linear layers, block by block, each in the order of PROJECTIONS."""
        return {f"{i}.{name}": getattr(block, name) for i, block in enumerate(self.blocks) for name in PROJECTIONS}

    def ranks(self):
        """The ranks of the factored layers, in the same order; [] for a dense model."""
        return [layer.rank for layer in self.linears().values() if isinstance(layer, LowRankLinearAdaptiveSpectral)]


def count_parameters(*modules):
    return sum(parameter.numel() for module in modules for parameter in module.parameters())


@torch.no_grad()
def leak_check(model):
    """Can a position see later ones? Change the tokens after a position and compare the logits up to it, three times.

    -> {"leaks": bool, "max_change": the largest change of a logit over the largest logit}.
    """
    T, n_words, device = model.config.block_size, model.config.vocab_size, model.head.weight.device
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(n_words, (1, T), generator=generator).repeat(4, 1)
    last_kept = (0, T // 2 - 1, T - 2)
    for row, t in enumerate(last_kept, start=1):
        tokens[row, t + 1:] += torch.randint(1, n_words, (T - 1 - t,), generator=generator)
    model.eval()
    x = model.features(tokens.remainder(n_words).to(device))  # (4, T, C)
    change = largest = 0.0
    tile = max(1, LOGITS_BYTES // (16 * n_words))  # positions: with a large vocabulary not all logits fit at once
    for i in range(0, T, tile):
        original, *changed = model.logits(x[:, i:i + tile])  # (tile, V) each
        largest = max(largest, original.abs().max().item())
        change = max([change, *((logits - original)[:t + 1 - i].abs().max().item()
                                for logits, t in zip(changed, last_kept, strict=True) if i <= t)])
    model.train()
    change /= largest
    return {"leaks": change > (1e-3 if model.bfloat16 else 1e-5), "max_change": change}


# ---- The optimizer, and what becomes of it when a rank changes -------------------------------------------------------

def make_optimizer(model, args):
    """AdamW over all parameters, weight decay included, as in the report (3.2)."""
    fused = model.head.weight.device.type in ("cpu", "cuda")
    return torch.optim.AdamW(model.parameters(), lr=args.lr, weight_decay=args.weight_decay, fused=fused)


def learning_rate(step, args):
    """The learning rate of step 0, 1, 2, ..., in three phases."""
    # 1) linear warm-up from lr / warmup_steps to lr
    if step < args.warmup_steps:
        return args.lr * (step + 1) / args.warmup_steps
    # 2) then constant
    if args.lr_schedule == "constant":
        return args.lr
    # 3) or half a cosine from lr to 0 at the end of the run
    done = (step - args.warmup_steps) / (args.epochs * args.steps_per_epoch - args.warmup_steps)
    return args.lr * 0.5 * (1 + math.cos(math.pi * done))


def transport_moments(optimizer, layer, A, B, carried):
    """Carry AdamW's moments to the factors that a layer has been given; A, B and carried are resize_factors'.

    With G = dL/dW, dL/dU = G V^T and dL/dV = U^T G. For U' = U A and V' = B V these become (dL/dU) B^T and A^T (dL/dV),
    so m_U' = m_U B^T and m_V' = A^T m_V are exact first moments for the same history of G. Second moments have no exact
    rule; mapping them by the squared entries of A and B is a heuristic. A new direction gets first moment zero and the
    mean second moment of the others: under an old step count, zeros would make Adam's first steps several times lr.
    Fused AdamW asks that moments lie in memory as their parameter does, and would mix them up without a word.
    """
    for parameter, carry, dim in ((layer.U, lambda moment, power: moment @ B.pow(power).mT, 1),
                                  (layer.V, lambda moment, power: A.pow(power).mT @ moment, 0)):
        state = optimizer.state.get(parameter)
        if state:
            old = state["exp_avg_sq"].cpu()
            first, second = carry(state["exp_avg"].cpu(), 1), carry(old, 2)
            known = second.narrow(dim, 0, carried) if carried else old
            second.narrow(dim, carried, second.shape[dim] - carried).copy_(known.mean(dim, keepdim=True))
            state["exp_avg"], state["exp_avg_sq"] = (torch.empty_like(parameter, requires_grad=False).copy_(moment)
                                                     for moment in (first, second))


NO_UPDATE = {"stable_ranks": [], "stable_ranks_exact": [], "targets": [], "ema": [], "reasons": []}


def update_ranks(layers, controllers, ema, optimizer, args, generator):
    """Measure each layer; where there are controllers, let them decide, and resize. Updates the list `ema` in place.

    -> (what the log keeps of it, how many layers were resized). Process 0 does the work and shares the new factors.
    """
    update, resized = once(lambda: plan_ranks(layers, controllers, ema, args.power_iterations, generator))
    if controllers:
        ema[:] = update["ema"]
    for i, (U, V, *maps) in resized.items():
        layers[i].set_factors(U, V)
        if args.optimizer_on_resize == "transport":
            transport_moments(optimizer, layers[i], *maps)
    if resized and args.optimizer_on_resize == "reinit":
        optimizer.state.clear()  # report A.2: the state of every parameter is lost
    return update, len(resized)


def plan_ranks(layers, controllers, ema, power_iterations, generator):
    """update_ranks without its effects -> (what the log keeps, {index of a layer: resize_factors' result})."""
    factors = [layer.factors() for layer in layers]
    if not all(torch.isfinite(U.square().sum() * V.square().sum()) for U, V in factors):  # a bound of ||W||_F^2
        raise TrainingError(f"the weights of a linear layer have grown beyond what float32 can hold: {TRY}")
    svds = product_svds(factors) if controllers else []  # once, for the exact stable rank and for the resize
    exact = [stable_rank_of(S) for _, S, _ in svds] or [stable_rank(U, V) for U, V in factors]
    measured = [stable_rank(U, V, power_iterations, generator) for U, V in factors] if power_iterations else exact
    update = NO_UPDATE | {"stable_ranks": measured, "stable_ranks_exact": exact}
    if not controllers:
        return update, {}
    decisions = [controller.propose(layer.rank, *values) for controller, layer, *values
                 in zip(controllers, layers, ema, measured, strict=True)]
    ranks, update["ema"], update["targets"], update["reasons"] = map(list, zip(*decisions, strict=True))
    return update, {i: resize_factors(*factors[i], rank, generator, svds[i]) for i, rank in enumerate(ranks)
                    if rank != layers[i].rank}


# ---- Safety: interruptions, the log, checkpoints, numbers ------------------------------------------------------------

SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1", "SIGUSR2")
           if hasattr(signal, name)]  # Ctrl-C, a batch system or a launcher, a closed terminal, a scheduler's warnings


def handle(handler):
    """Give all SIGNALS a handler but those that the process has to ignore, as under nohup -> {signal: the old one}."""
    return {number: signal.signal(number, handler) for number in SIGNALS if signal.getsignal(number) != signal.SIG_IGN}


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
        if not received and process() == 0:
            with contextlib.suppress(OSError):
                os.write(2, b"\nsaving after this step, then stopping; another Ctrl-C stops at once\n")
        received.append(number)

    handlers = handle(note)
    try:
        yield received
    finally:
        for number, handler in handlers.items():
            signal.signal(number, (lambda *_: None) if received else handler)  # main() puts the old ones back


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
        """As the flags have it; beside a checkpoint that is a link, the other ones lie where it points to. Raises
        UserError where a name is none, a folder's, or that of a `data` file."""
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
                raise UserError(f"cannot write {path}: " + ("Is a directory" if path.is_dir() else "not a plain file"))
        if len({path.resolve() for path in (*files, *data)}) < len((*files, *data)):
            raise UserError("--log-file, --checkpoint and the data need different names")
        return files

    def claim(self, held):
        """Lock the log and the checkpoint until the ExitStack `held` ends, or the process, however it does. Raises
        UserError where another run has one, where the log is none, or where a file cannot be written."""
        log = lock(self.log, held, self.log)
        log.seek(0)
        if not b'{"kind": "run"'.startswith(log.read(14)):
            raise UserError(f"{self.log} is not a log of this suite: choose another --log-file")
        for path in (self.last, self.previous, self.best):  # each of them: c.pt is the best of one, the last of another
            lock(path.with_name(path.name + ".lock"), held, path)
        with writing(self.last):
            temporary(self.last).touch()
            for path in (self.last, self.best):
                temporary(path).unlink(missing_ok=True)

    def make_way(self, checkpoint):
        """Cut the log back to what the checkpoint has seen of it. Without a checkpoint remove what an earlier run left,
        its log last, so that what a crash leaves can always be resumed."""
        with writing(self.last):
            for path in () if checkpoint else (self.previous, self.best, self.last):
                path.unlink(missing_ok=True)
            if self.log.stat().st_size:
                os.truncate(self.log, checkpoint["log_bytes"] if checkpoint else 0)


def lock(path, held, name):
    """Open a file, made if there is none, and lock it until the ExitStack `held` ends, which removes it if it is empty
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
    held.enter_context(file)

    def remove():
        with contextlib.suppress(OSError):  # Windows removes no open file
            if not path.stat().st_size:
                path.unlink()
    held.callback(remove)
    return file


def temporary(path):
    """Where a file is written before it gets its name."""
    return path.with_name(path.name + ".tmp")


def write_record(path, kind, **fields):
    """Append a line of JSON to the log, through to the disk. NaN and Infinity raise ValueError, a disk that does not
    take it UserError; the log then stays as it was."""
    line = json.dumps({"kind": kind, **fields}, allow_nan=False).encode() + b"\n"

    def append():
        with writing(path), open(path, "ab", buffering=0) as log:
            size, left = log.tell(), line
            try:
                while left:
                    left = left[log.write(left):]
                os.fsync(log.fileno())
            except OSError:
                log.truncate(size)
                raise
    once(append)


SEAL = b"\nalrt sha256 "  # a checkpoint ends with this and the SHA-256 of what is before: torch.load has no checksum


def sha256_of(file, size):
    """The SHA-256, in hexadecimal, of the first `size` bytes of an open file."""
    digest = hashlib.sha256()
    file.seek(0)
    for start in range(0, size, 2**20):
        digest.update(file.read(min(size - start, 2**20)))
    return digest.hexdigest().encode()


def save(path, content, previous=None):
    """torch.save with a seal, by process 0. A crash leaves no half file under `path`; the file that was there becomes
    `previous`. Raises UserError where the disk does not take it; what was there then stays."""
    def write():
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
    once(write)


def load(path):
    """What save() wrote, on the CPU; runs no code from the file. Raises UserError for anything else."""
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
        found = content["format"]
    except Exception:  # torch.load raises whatever foreign bytes lead to
        found = None
    if sealed and found == FORMAT:
        return content
    if isinstance(found, str) and found.startswith("alrt-checkpoint-") and found != FORMAT:
        raise UserError(f"{path} is of another version of this suite: {found}, where this one reads {FORMAT}")
    raise UserError(f"{path} is not a checkpoint of this suite, or its end is missing")


def resume_point(args, settings, defaults, files):
    """What --resume and --overwrite ask for, given the files that exist -> the checkpoint to go on from, or None.
    `defaults` are the flags' and count for those that an older checkpoint does not know."""
    log, last, previous, _ = files
    found = [path for path in files if path.exists() and path.stat().st_size]
    if not args.resume:
        if found and not args.overwrite:
            raise UserError(f"{found[0]} exists: --resume continues its run, --overwrite replaces it, "
                            "--log-file NAME writes elsewhere")
        return None
    if not found:
        say(f"nothing to resume yet, there is no {log} and no {last}: starting")
        return None
    if last not in found and previous not in found:
        epochs = sum(line.startswith(b'{"kind": "epoch"') for line in log.read_bytes().splitlines())
        if epochs or found != [log]:
            raise UserError(f"{log} has {epochs} finished epochs, but there is no checkpoint {last} to go on from: "
                            "--checkpoint names another one, --overwrite starts over")
        say(f"{log} has no checkpoint and no finished epoch yet: starting over")
        return None
    if last not in found:  # a crash between two renames, or the user's choice
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
    old = defaults | checkpoint["settings"]
    free = ("epochs", "checkpoint_minutes", "resume", "overwrite", "log_file", "checkpoint", "data_file", "command",
            "device", "processes", *["dtype"] * (args.dtype == "auto"), *["grad_accum"] * (args.grad_accum is None))
    changed = [f"{name} was {old[name]} and is now {value}" for name, value in settings.items()
               if name not in free and value != old[name]]
    if changed:
        raise UserError(f"a run is resumed with its own data and settings, but {', '.join(changed)}; only --epochs, "
                        "--checkpoint-minutes, the device and the number of processes may change")
    if checkpoint["state"]["step"] > args.epochs * args.steps_per_epoch:
        raise UserError(f"{last} is already past --epochs {args.epochs}")
    if not log.exists() or log.stat().st_size < checkpoint["log_bytes"]:
        raise UserError(f"{log} is missing, or shorter than when {last} was written")
    if args.lr_schedule == "cosine" and args.epochs != old["epochs"]:
        say("*** --epochs has changed, and with it the cosine schedule: an uninterrupted run would have differed")
    for name, what in (("device", "on {} instead of {}"), ("processes", "with {} processes instead of {}")):
        if settings[name] != old[name]:
            say(f"*** going on {what.format(settings[name], old[name])}: the run is no longer bit for bit the one that "
                "was never interrupted")
    return checkpoint


def check_finite(loss, epoch, step, last):
    """Raises TrainingError for a loss that is not finite; `last` is a checkpoint from before."""
    if not math.isfinite(loss):
        raise TrainingError(f"epoch {epoch}, step {step}: a loss or its gradient is not finite: in a new run, {TRY}"
                            + f". {last} keeps the last good state" * last.exists())


# ---- Models in files -------------------------------------------------------------------------------------------------

def build_model(content, linear=None):
    """The model of a checkpoint's content. `linear(n, m)` makes its linear layers; by default factored ones of the
    ranks in it, and plain nn.Linear where there are none (v7)."""
    try:
        ranks = iter(content["ranks"])
        if linear is None and content["ranks"]:
            linear = lambda n, m: LowRankLinearAdaptiveSpectral(n, m, next(ranks))  # noqa: E731
        model = GPT(GPTConfig(**content["config"]), linear or (lambda n, m: nn.Linear(n, m, bias=False)))
        model.load_state_dict(content["model"])
    except Exception as error:  # sealed, but not by this code
        raise UserError(f"the checkpoint does not hold a model of this suite ({type(error).__name__})") from None
    return model


def load_model(path):
    """A checkpoint of v10 or v7, last or best -> (model in evaluation mode, on the CPU; its vocabulary)."""
    content = load(Path(path))
    return build_model(content).eval(), content["vocabulary"]


@torch.no_grad()
def generate(model, vocabulary, text, n_tokens=50, temperature=1.0, seed=0, top_k=None):
    """Continue a text by n_tokens sampled tokens -> the whole text; greedily at temperature 0, else from the top_k
    likeliest (all by default). Unknown words become <unk>. Raises UserError for what makes no sense.

    A bidirectional model has learnt to copy what comes next; with nothing there, its words mean nothing.
    """
    kind = model.config.tokenize
    if not 0 <= temperature < math.inf:
        raise UserError(f"temperature {temperature} is not a number of 0 or more")
    if top_k is not None and top_k < 1:
        raise UserError(f"top_k {top_k} is not 1 or more")
    text = text.encode("utf-8").decode("latin-1") if kind == "bytes" else text
    tokens = encode(text.split() if kind == "words" else list(text), vocabulary)[None].to(model.head.weight.device)
    if not tokens.numel():
        raise UserError("generate needs at least one token to continue")
    generator = torch.Generator().manual_seed(seed)
    for _ in range(n_tokens):
        logits = model(tokens[:, -model.config.block_size:])[:, -1].cpu()  # (1, V)
        best, words = logits.topk(min(top_k or len(vocabulary), len(vocabulary)) if temperature else 1)
        p = ((best - best[:, :1]) / (temperature or 1)).softmax(-1)
        word = words.gather(1, torch.multinomial(p, 1, generator=generator))
        tokens = torch.cat([tokens, word.to(tokens.device)], dim=1)
    text = (" " if kind == "words" else "").join(vocabulary[i] for i in tokens[0])
    return text.encode("latin-1").decode("utf-8", errors="replace") if kind == "bytes" else text


def dense_weights(model):
    """{name: W (m, n)} of the linear layers, for use elsewhere: the product U V where a layer is factored."""
    return {name: layer.weight.detach() if isinstance(layer, nn.Linear) else (layer.U @ layer.V).detach()
            for name, layer in model.linears().items()}


# ---- Evaluation, time and memory -------------------------------------------------------------------------------------

@torch.no_grad()
def evaluate(model, tokens, batch_size):
    """The loss over a fixed, full pass of tokens (N,): contiguous blocks, the last one at its own length (padding would
    be seen by an unmasked model), every token but the first predicted once. The processes share the batches."""
    T = model.config.block_size
    full = (len(tokens) - 1) // T * T
    batches = list(zip(tokens[:full].view(-1, T).split(batch_size), tokens[1:full + 1].view(-1, T).split(batch_size),
                       strict=True)) + [(tokens[None, full:-1], tokens[None, full + 1:])]
    model.eval()
    losses = [(model(x, y), y.numel()) for x, y in batches[process()::processes()] if y.numel()]
    model.train()
    return sum(gather(sum(loss.item() * n for loss, n in losses))) / (len(tokens) - 1)


def perplexity(loss):
    return math.exp(min(loss, 700))  # exp overflows at 709.8


def best_epoch(epochs):
    """The epoch of lowest validation loss, the first of several."""
    return min(epochs, key=lambda epoch: epoch["val_loss"])


def device_name(device):
    threads = f"{platform.machine()}, {torch.get_num_threads()} threads"
    return torch.cuda.get_device_name() if device.type == "cuda" else threads


def peak_memory_mb(device):
    """The most memory that the run has used, on the GPU for CUDA, else by the process; None where it cannot be told."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 2**20
    try:  # not ru_maxrss: it inherits the peak of the process that started this one
        return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) / 2**10
    except (OSError, IndexError):  # not Linux
        return torch.mps.driver_allocated_memory() / 2**20 if device.type == "mps" else None


def now(device):
    """Seconds on a running clock, read once the device has caught up."""
    if device.type != "cpu":
        torch.get_device_module(device).synchronize()
    return time.perf_counter()


class Progress:
    """One tqdm bar for the whole run, or where there is no terminal a plain line every half minute; after the first
    steps, how long the run will take. `overhead` is the share that evaluation adds to the time of the steps."""

    def __init__(self, done, total, overhead):
        self.bar = tqdm(total=total, initial=done, disable=process() > 0 or None, unit="step", dynamic_ncols=True)
        self.count, self.left, self.overhead = 0, total - done, overhead
        self.began = self.shown = time.monotonic()

    def step(self, text):
        """One more step. text() says how it goes; it waits for the device, so it is called only to be shown."""
        self.bar.update()
        self.count, self.left = self.count + 1, self.left - 1
        due = time.monotonic() - self.shown > (30 if self.bar.disable else 1)
        if not due and self.count not in (1, 4):
            return
        status, self.shown = text(), time.monotonic()
        self.bar.set_postfix_str(status)
        if self.count == 1:  # the first step warms up and is not counted
            self.began = self.shown
            return
        seconds = (self.shown - self.began) / (self.count - 1) * self.left * (1 + self.overhead)
        time_left = tqdm.format_interval(seconds)
        if self.count == 4 and seconds > 5:
            say(f"this run will take about {time_left}"
                + "; --resume continues an interrupted one, `make demo` takes minutes" * (seconds > 3600))
        elif due and self.bar.disable:
            say(f"  step {self.bar.total - self.left:,}/{self.bar.total:,}: {status}; about {time_left} to go")


class Screen:
    """A stream to a screen. What it no longer takes is dropped: a closed terminal, or a full disk, ends no training."""

    def __init__(self, stream):
        self.stream = stream or open(os.devnull, "w")  # Python has none where it was closed from the start
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


def say(text):
    if process() == 0:
        tqdm.write(text, file=sys.stdout)
        sys.stdout.flush()


# ---- Several processes, started by torchrun --------------------------------------------------------------------------

def processes():
    """How many processes train this model together."""
    return dist.get_world_size() if dist.is_initialized() else 1


def process():
    """The number of this one: 0, which alone writes and speaks, or a higher one."""
    return dist.get_rank() if dist.is_initialized() else 0


def gather(value):
    """[value in process 0, value in process 1, ...], in every process."""
    values = [value] * processes()
    if processes() > 1:
        dist.all_gather_object(values, value)
    return values


def once(action):
    """action(), done by process 0 alone -> its result, or the error that it raises, in every process."""
    result = [None]
    try:
        result = [action() if process() == 0 else None]
    except (UserError, TrainingError) as error:
        result = [error]
    if processes() > 1:
        dist.broadcast_object_list(result)
    if isinstance(result[0], Exception):
        raise result[0]
    return result[0]


def leave(code):
    """sys.exit(code), also where the screen is gone. One of several processes skips the interpreter's own end:
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


def parallel(model):
    """The model with its gradients averaged over the processes. DistributedDataParallel notes the parameters' shapes
    when it is made: it has to be dropped before a rank changes (else the next step fails), and made again after (else
    gradients are no longer averaged, silently)."""
    gc.collect()  # the hooks of a dropped one
    return DistributedDataParallel(model, gradient_as_bucket_view=True) if processes() > 1 else model


# ---- Training --------------------------------------------------------------------------------------------------------

def find_data(name):
    """The path of a data file: a bare name that is not found here is looked for in data/. Where the default text is
    missing, the committed synthetic corpus stands in, loudly, so that a fresh clone trains."""
    path = next((path for path in (Path(name), HERE / "data" / name) if path.exists()), Path(name))
    if not path.exists() and name == DEFAULT_DATA:
        say(f"*** There is no {name}: TRAINING ON THE SYNTHETIC CORPUS data/synthetic.tokens INSTEAD.\n"
            "*** For WikiText-2, run `make data` (or python3 data/wikitext2.py) and start again.")
        path = HERE / "data" / "synthetic.tokens"
    return path


def final_ranks(path, layers):
    """The ranks at the end of a log of as many factored layers. Raises UserError where it has none."""
    ranks = None
    try:
        for line in path.read_bytes().splitlines():
            with contextlib.suppress(ValueError, RecursionError):  # a last line may be cut off
                record = json.loads(line)
                if isinstance(record, dict) and record.get("kind", "epoch") == "epoch":
                    ranks = record.get("ranks")
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    if not isinstance(ranks, list) or len(ranks) != layers or not all(type(rank) is int for rank in ranks):
        raise UserError(f"{path} does not end with the ranks of {layers} layers: --ranks-from needs the log of a "
                        "factored model with as many --n-layers")
    return ranks


def keep_freed_memory():
    """Let glibc reuse the large blocks of a step; it would return each to the system, which clears it page by page."""
    if platform.libc_ver()[0] == "glibc":
        for option, size in ((-1, 2**31 - 1), (-3, 2**30)):  # M_TRIM_THRESHOLD, M_MMAP_THRESHOLD
            ctypes.CDLL(None).mallopt(option, size)


def pick_device(name):
    """The device of --device, ready for use -> torch.device."""
    found = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    name = next(name for name in found if found[name]) if name == "auto" else name
    if not found[name]:
        raise UserError(f"--device {name} is not available on this machine: try --device auto")
    if name == "cuda":  # each process of a machine takes a GPU
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)) if processes() > 1 else 0)
        torch.set_float32_matmul_precision("high")  # TF32 in what remains of float32
    if name == "cpu":
        keep_freed_memory()
    return torch.device(name)


def choose_dtype(device, d_model):
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


def bfloat16_speedup():
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


def default_grad_accum(windows, block_size, device):
    """The parts to take a process's windows in: on a CPU at most 2,048 tokens at a time, whose activations stay close
    to its caches (faster, and half the memory); elsewhere one, which keeps the device busy."""
    parts = [n for n in range(1, windows + 1) if windows % n == 0 and windows // n * block_size <= 2048]
    return min(parts, default=windows) if device.type == "cpu" else 1


def train_step(model, optimizer, x, y, grad_clip=0.0, grad_accum=1, total=0.0):
    """One optimizer step on inputs and targets (B, T), in grad_accum parts -> total + loss, free of its graph: factors
    may be replaced next. `model` is what parallel() returned.

    From the first loss or gradient on that is not finite, the result is not finite either, and the model and the
    optimizer stay as they were: fused AdamW is told so on the device, so that no step has to wait for an answer.
    """
    loss = torch.zeros((), device=x.device)
    optimizer.zero_grad(set_to_none=True)
    for i, part in enumerate(zip(x.chunk(grad_accum), y.chunk(grad_accum), strict=True), start=1):
        silent = i < grad_accum and isinstance(model, DistributedDataParallel)
        with model.no_sync() if silent else contextlib.nullcontext():  # one exchange of gradients a step
            part_loss = model(*part) / grad_accum
            part_loss.backward()
        loss += part_loss.detach()
    norm = nn.utils.get_total_norm([parameter.grad for parameter in model.parameters()])
    if grad_clip:
        nn.utils.clip_grads_with_norm_(model.parameters(), grad_clip, norm)
    total = total + loss + 0 * norm  # 0 times what is not finite is NaN
    finite = torch.isfinite(total)
    if optimizer.defaults["fused"]:
        optimizer.found_inf = (~finite).float()
        optimizer.step()
    elif finite:
        optimizer.step()
    return total


def compile_blocks(model):
    """torch.compile for each block, once for all ranks and sequence lengths: a graph with gradients and one without.
    Dynamo's defaults would compile anew at every rank, and silently stop after eight."""
    torch._dynamo.config.force_parameter_static_shapes = False
    torch._dynamo.config.force_nn_module_property_static_shapes = False
    for block in model.blocks:
        block.compile(dynamic=True)


NEW_EPOCH = {"loss_sum": 0.0, "time_sec": 0.0, "rank_sec": 0.0, "resized": 0, "update": NO_UPDATE}


def train(args, prog, command, held, linear=None):
    """Run the experiment that the flags describe. `linear(n, m)` takes the place of the factored layer (v7). The log
    stays locked as long as the ExitStack `held`."""
    # 1) whatever is wrong with the request is found before any long work
    device = pick_device(args.device)
    data, *tests = (find_data(name) for name in (args.data_file, args.test_file) if name is not None)
    files = Files.named(args, data, *tests, *([Path(args.ranks_from)] if args.ranks_from else []))
    train_tokens, val_tokens, vocabulary, sha256, floor = load_corpus(data, args.val_fraction, args.block_size,
                                                                         args.tokenize, args.min_count)
    if args.tokenize == "words" and len(vocabulary) > (len(train_tokens) + len(val_tokens)) / 2:
        say(f"*** more than half of the words of {data.name} are distinct: if it is a text without spaces, "
            "--tokenize chars fits it better")
    tests = [encode(read_words(path, args.tokenize)[0], vocabulary).to(device) for path in tests]
    initial = [getattr(args, "init_rank", None)] * 6 * args.n_layers
    if args.ranks_from and not args.resume:  # a checkpoint has its own
        initial = final_ranks(Path(args.ranks_from), 6 * args.n_layers)
        check_ranks(initial, f"{args.ranks_from}: rank", args)
    if tests and len(tests[0]) < 2:
        raise UserError(f"{args.test_file} has {len(tests[0])} words; a test needs 2 or more")
    settings = vars(args) | {
        "script": prog, "command": command, "processes": processes(), "device": device.type,
        "data_file": data.name, "data_sha256": sha256,
        "test_file": args.test_file and Path(args.test_file).name, "log_file": files.log.name,
        "grad_accum": args.grad_accum or default_grad_accum(args.batch_size // processes(), args.block_size, device),
        "ranks_from": args.ranks_from and Path(args.ranks_from).name, "checkpoint": files.last.name}
    once(lambda: files.claim(held))
    checkpoint = resume_point(args, settings, vars(build_parser(prog, linear is None).parse_args([])), files)
    moved = checkpoint and any(checkpoint["settings"][name] != settings[name] for name in ("device", "processes"))
    if checkpoint and not args.grad_accum and not moved:
        settings["grad_accum"] = checkpoint["settings"]["grad_accum"]
    dtype_reason = "as --dtype asks"
    if args.dtype == "auto" and checkpoint and checkpoint["settings"]["device"] == device.type:
        settings["dtype"], dtype_reason = checkpoint["settings"]["dtype"], "as the run began"
    elif args.dtype == "auto":
        settings["dtype"], dtype_reason = once(lambda: choose_dtype(device, args.d_model))
    total = args.epochs * args.steps_per_epoch
    if checkpoint and checkpoint["state"]["step"] == total and (
            re.search(rb'"kind": "end".*\n', files.log.read_bytes()[checkpoint["log_bytes"]:])):
        say(f"{files.log} is finished: {args.epochs} epochs. A larger --epochs continues it.")
        return

    # 2) the model, its optimizer and controllers, and a random generator for each use of randomness
    torch.manual_seed(args.seed)
    if checkpoint:
        model = build_model(checkpoint, linear)
    else:
        config = GPTConfig(len(vocabulary), args.d_model, args.n_layers, args.n_heads, args.d_ff,
                           args.block_size, args.attention, args.dropout, args.tokenize)
        ranks = iter(initial)
        model = GPT(config, linear or (lambda n, m: LowRankLinearAdaptiveSpectral(n, m, next(ranks))))
    model.to(device).bfloat16 = settings["dtype"] == "bfloat16"
    if args.compile:
        compile_blocks(model)
    layers = list(model.linears().values())
    optimizer = make_optimizer(model, args)
    controllers = [] if args.fixed_rank else [
        RankController(args.safety_factor, args.ema_decay, args.change_threshold, args.max_step, args.min_rank,
                       min(*layer.shape, args.max_rank or math.inf)) for layer in layers]
    generators = {name: torch.Generator().manual_seed(args.seed + i) for i, name in ((2, "batch"), (3, "rank"))}
    state = checkpoint["state"] if checkpoint else {
        "step": 0, "seconds": 0.0, "epochs": [], "ema": [float(rank) for rank in model.ranks()],
        "part": NEW_EPOCH | {"loss_sum": [0.0]}}
    torch.manual_seed(args.seed + 1 + 1_000_003 * process() + state["step"])  # from here on dropout's: each has its own
    dropout_rng = torch if device.type == "cpu" else torch.get_device_module(device)
    if checkpoint:
        for group in checkpoint["optimizer"]["param_groups"]:
            group["fused"] = optimizer.defaults["fused"]  # if this device has it
        optimizer.load_state_dict(checkpoint["optimizer"])
        for name, generator in generators.items():
            generator.set_state(checkpoint["generators"][name])
        if not moved:
            dropout_rng.set_rng_state(checkpoint["dropout_states"][process()])
    loss_sums = state["part"]["loss_sum"]  # of each process: their mean is that of the whole batch
    loss_sum = loss_sums[process()] if len(loss_sums) == processes() else fmean(loss_sums)

    # 3) the leak check, and the log, which begins with a record of the run
    try:
        leak = leak_check(model)
    except torch._dynamo.exc.TorchDynamoException as error:
        raise TrainingError(f"--compile fails on this machine: {str(error).splitlines()[0]}") from None
    leak = max(gather(leak), key=lambda leak: leak["max_change"])  # all have seen the files as they were
    if leak["leaks"] and args.attention == "causal":
        raise TrainingError(f"later tokens change earlier logits (by {leak['max_change']:.1e} of the largest), so "
                            f"{device.type} masks wrongly in {settings['dtype']}: try --dtype float32 or --device cpu")
    once(lambda: files.make_way(checkpoint))
    if checkpoint:
        write_record(files.log, "resume", epoch=state["step"] // args.steps_per_epoch, step=state["step"],
                     epochs=args.epochs, device=device.type, processes=processes(), command=command)
    else:  # where --resume had to start over, the record is that of a run which was only started
        write_record(files.log, "run", **settings | {"resume": False, "command": command.replace(" --resume", "")},
                     device_name=device_name(device), dtype_reason=dtype_reason,
                     versions={"python": platform.python_version(), "torch": torch.__version__},
                     vocab_size=len(vocabulary), train_tokens=len(train_tokens), val_tokens=len(val_tokens),
                     parameters=count_parameters(model), factor_parameters=count_parameters(*layers),
                     initial_ranks=model.ranks(),
                     layers=[{"name": name, "shape": list(layer.shape)} for name, layer in model.linears().items()],
                     leak_check=leak, entropy_floor=floor)
    say(f"{prog}: {count_parameters(model):,} parameters, {count_parameters(*layers):,} of them in {len(layers)} "
        f"linear layers; {settings['dtype']} ({dtype_reason}) on {device_name(device)}"
        + f", {processes()} processes" * (processes() > 1)
        + f", {settings['grad_accum']} parts per step" * (settings["grad_accum"] > 1)
        + f"\n{data.name}: {len(train_tokens):,} training and {len(val_tokens):,} validation tokens, "
        f"{len(vocabulary):,} words" + (f", entropy floor {floor:.3f}" if floor else ""))
    if leak["leaks"]:
        say("*** NO CAUSAL MASK: THE MODEL SEES ITS TARGETS. Its losses are not those of a language model.")

    def keep(best=False):
        """Write the last checkpoint, and that of the best model if this is it."""
        content = {"format": FORMAT, "config": asdict(model.config), "ranks": model.ranks(), "vocabulary": vocabulary,
                   "model": model.state_dict()}
        dropout_states = gather(dropout_rng.get_rng_state())
        if best:
            save(files.best, content)
        save(files.last, content | {
            "state": state, "settings": settings, "log_bytes": files.log.stat().st_size,
            "optimizer": optimizer.state_dict(), "dropout_states": dropout_states,
            "generators": {name: generator.get_state() for name, generator in generators.items()}}, files.previous)

    if not checkpoint:  # from here on --resume has one: a disk that has no room is found before the work
        keep()

    # 4) train; at the end of an epoch: evaluate, update the ranks, write a record, write the checkpoints
    train_tokens, val_tokens = train_tokens.to(device), val_tokens.to(device)
    steps, interval = args.steps_per_epoch, args.rank_interval or args.steps_per_epoch
    began, tokens_per_epoch = time.perf_counter() - state["seconds"], steps * args.batch_size * args.block_size
    trained = parallel(model)
    progress = Progress(state["step"], total, overhead=len(val_tokens) / (3 * tokens_per_epoch))
    epochs, part = state["epochs"], state["part"] | {"loss_sum": loss_sum}
    start, saved = now(device) - part["time_sec"], time.monotonic()
    with noted_signals() as signals, progress.bar:
        for step in range(state["step"] + 1, total + 1):
            epoch, updates, ends = (step - 1) // steps + 1, step % interval == 0, step % steps == 0
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step - 1, args)
            batch = sample_batch(train_tokens, args.batch_size, args.block_size, generators["batch"])  # same everywhere
            share = (x.chunk(processes())[process()] for x in batch)
            part["loss_sum"] = train_step(trained, optimizer, *share, args.grad_clip, settings["grad_accum"],
                                          part["loss_sum"])
            progress.step(lambda: f"loss {part['loss_sum'].item() / ((step - 1) % steps + 1):.3f}"  # noqa: B023
                          + (f", mean rank {fmean(model.ranks()):.1f}" if controllers else ""))
            if not (updates or ends or step % 10 == 0 or device.type != "cuda"):
                continue  # to look at the loss is to wait for CUDA
            loss_sum = part["loss_sum"].item()
            check_finite(loss_sum, epoch, step, files.last)
            if ends:
                paused = now(device)
                val_loss = evaluate(model, val_tokens, args.batch_size)
                check_finite(val_loss, epoch, step, files.last)
                eval_sec = now(device) - paused
            if updates:
                paused = now(device)
                trained = None
                part["update"], changed = update_ranks(layers, controllers, state["ema"], optimizer, args,
                                                       generators["rank"])
                trained = parallel(model)
                part |= {"resized": part["resized"] + changed, "rank_sec": part["rank_sec"] + now(device) - paused}
                if not ends:  # the last one of an epoch is in the epoch's record
                    write_record(files.log, "ranks", step=step, **part["update"], ranks=model.ranks(), resized=changed)
            if ends:
                time_sec, ranks = now(device) - start, model.ranks()
                train_sec = time_sec - eval_sec - part["rank_sec"]
                record = {
                    "epoch": epoch, "tokens_seen": epoch * tokens_per_epoch,
                    "train_loss": fmean(gather(loss_sum)) / steps, "val_loss": val_loss,
                    "val_ppl": perplexity(val_loss), "lr": optimizer.param_groups[0]["lr"],
                    "rank_min": min(ranks, default=None), "rank_max": max(ranks, default=None),
                    "rank_avg": fmean(ranks) if ranks else None, "ranks": ranks, **part["update"],
                    "resized": part["resized"], "params_millions": count_parameters(model) / 1e6,
                    "factor_params_millions": count_parameters(*layers) / 1e6, "time_sec": time_sec,
                    "train_sec": train_sec, "eval_sec": eval_sec, "rank_sec": part["rank_sec"],
                    "tokens_per_sec": tokens_per_epoch / train_sec, "peak_memory_mb": peak_memory_mb(device)}
                write_record(files.log, "epoch", **record)
                epochs.append(record)
            late = time.monotonic() - saved > 60 * args.checkpoint_minutes
            stop = max(gather(128 + signals[0] if signals else int(late)))
            if not ends and not stop:
                continue
            part = dict(NEW_EPOCH) if ends else part | {"loss_sum": loss_sum, "time_sec": now(device) - start}
            state |= {"step": step, "seconds": time.perf_counter() - began,
                      "part": part | {"loss_sum": gather(part["loss_sum"])}}
            keep(best=ends and best_epoch(epochs) is record)
            if ends:
                say(f"epoch {epoch:3}/{args.epochs}  train {record['train_loss']:.3f}  val {val_loss:.3f}  "
                    f"ppl {record['val_ppl']:.1f}"
                    + (f"  rank {fmean(ranks):.1f} ({min(ranks)}-{max(ranks)})" if ranks else "")
                    + f"  {record['params_millions']:.2f}M parameters  {time_sec:.1f} s"
                    + f"  {record['tokens_per_sec']:,.0f} tok/s" + "  SEES ITS TARGETS" * leak["leaks"])
            if stop > 1 and step < total:
                raise KeyboardInterrupt(stop, f"interrupted; step {step:,} of {total:,} is saved in "
                                        f"{files.last}: the same command with --resume goes on from there")
            start, saved = now(device) - part["time_sec"], time.monotonic()

    # 5) test losses, the last record, a summary
    best = best_epoch(epochs)
    end = {"best_epoch": best["epoch"], "best_val_loss": best["val_loss"], "final_val_loss": epochs[-1]["val_loss"],
           "test_loss_best": None, "test_loss_last": None}
    for test in tests:
        end["test_loss_last"] = evaluate(model, test, args.batch_size)
        try:
            best_model = build_model(load(files.best)).to(device)  # evaluation has waited for process 0 and its files
            best_model.bfloat16 = model.bfloat16
            end["test_loss_best"] = evaluate(best_model, test, args.batch_size)
        except UserError as error:
            say(f"*** no test loss of the best epoch: {error}")
    write_record(files.log, "end", **end, total_sec=state["seconds"])
    ranks, memory = model.ranks(), peak_memory_mb(device)
    speed = args.epochs * tokens_per_epoch / sum(record["train_sec"] for record in epochs)
    say(f"done: {args.epochs} epochs in {tqdm.format_interval(state['seconds'])}, {speed:,.0f} training tokens/s"
        + (f", peak memory {memory:,.0f} MB" if memory else ""))
    for name in ("best_val_loss", "final_val_loss", "test_loss_best", "test_loss_last"):
        if end[name] is not None:
            say(f"{name.replace('_', ' ')}: {end[name]:.3f}, perplexity {perplexity(end[name]):.2f}"
                + f" (epoch {best['epoch']})" * ("best" in name) + "; SEES ITS TARGETS" * leak["leaks"])
    say((f"ranks: {args.init_rank or settings['ranks_from']} -> {fmean(ranks):.1f} on average "
         f"({min(ranks)}-{max(ranks)}); " if ranks else "")
        + f"parameters in use: {count_parameters(model):,}, {count_parameters(*layers):,} of them in the linear layers")
    say(f"log: {files.log}; checkpoints: {files.last} (last), {files.best} (best)")


# ---- Command line ----------------------------------------------------------------------------------------------------

class Parser(argparse.ArgumentParser):
    def error(self, message):
        raise UserError(f"{message} (--help lists the flags)")


def number(kind, least=-math.inf, above=-math.inf, below=None):
    """An argparse type: a finite number of this kind within these bounds; a whole one is below 2^31 unless told."""
    below = below or (2**31 if kind is int else math.inf)
    bounds = [f" {word} {bound:,}" for word, bound in (("at least", least), ("above", above), ("below", below))
              if math.isfinite(bound)]

    def parse(text):
        with contextlib.suppress(ValueError):
            if least <= (value := kind(text)) < below and value > above:
                return value
        raise argparse.ArgumentTypeError(f"{text!r} is not a {'whole ' * (kind is int)}number{' and'.join(bounds)}")
    return parse


def build_parser(prog, low_rank=True, log_file="logs/v10.jsonl"):
    """The flags, grouped; a dense variant has no rank control."""
    parser = Parser(prog=prog, allow_abbrev=False, formatter_class=argparse.ArgumentDefaultsHelpFormatter,
                    description="Trains a GPT" + " whose linear layers find their own ranks" * low_rank + ".")
    path = os.path.expanduser  # a shell expands no ~ in --flag=~/name
    count, positive, fraction = number(int, least=1), number(float, above=0), number(float, least=0, below=1)
    flag = parser.add_argument_group("data").add_argument
    flag("--data-file", type=path, default=DEFAULT_DATA,
         help="text to train on; a bare name is looked for here, then in data/")
    flag("--tokenize", choices=("words", "chars", "bytes"), default="words",
         help="what a token is: a word between spaces, a character, or a byte")
    flag("--min-count", type=count, default=1, help="words that occur less often in the text become <unk>")
    flag("--val-fraction", type=number(float, above=0, below=1), default=0.01, help="share held out at the end")
    flag("--test-file", type=path,
         help="one more held-out text, evaluated at the end on the best and the last checkpoint")
    flag = parser.add_argument_group("model").add_argument
    flag("--d-model", type=count, default=GPTConfig.d_model, help="width")
    flag("--n-layers", type=number(int, least=1, below=1000), default=GPTConfig.n_layers, help="blocks")
    flag("--n-heads", type=count, default=GPTConfig.n_heads, help="attention heads")
    flag("--d-ff", type=count, default=GPTConfig.d_ff, help="width of the feed-forward layers")
    flag("--block-size", type=number(int, least=2), default=GPTConfig.block_size, help="context length in tokens")
    flag("--attention", choices=("causal", "bidirectional"), default=GPTConfig.attention,
         help="bidirectional has no mask: the model sees its targets, as in the report")
    flag("--dropout", type=fraction, default=GPTConfig.dropout, help="dropout probability")
    if low_rank:
        group = parser.add_argument_group("ranks")
        start, flag = group.add_mutually_exclusive_group().add_argument, group.add_argument
        start("--init-rank", type=count, default=64, help="rank of every layer at the start")
        start("--ranks-from", type=path, metavar="LOG",
              help="each layer starts at the rank that it has at the end of this log")
        flag("--min-rank", type=count, default=RankController.min_rank, help="smallest rank")
        flag("--max-rank", type=count, help="largest rank; by default the smaller side of each matrix")
        flag("--fixed-rank", action="store_true", help="ranks stay as they start")
        flag("--safety-factor", type=positive, default=RankController.safety_factor, help="target rank / stable rank")
        flag("--ema-decay", type=fraction, default=RankController.ema_decay, help="smoothing of the target")
        flag("--change-threshold", type=number(float, least=0), default=RankController.change_threshold,
             help="smallest distance between rank and smoothed target that moves the rank")
        flag("--max-step", type=count, default=RankController.max_step, help="largest change of a rank at an update")
        flag("--rank-interval", type=count, help="training steps between rank updates; by default an epoch")
        flag("--optimizer-on-resize", choices=("reinit", "transport"), default="reinit",
             help="drop AdamW's state of every parameter (the report's way), or carry it through the resize")
    else:
        parser.set_defaults(fixed_rank=True, rank_interval=None, ranks_from=None)
    flag = parser.add_argument_group("training").add_argument
    flag("--power-iterations", type=number(int, least=0, below=1000), default=5, help="for the stable rank; 0: exact")
    flag("--epochs", type=count, default=30, help="epochs in all, those before a --resume included")
    flag("--steps-per-epoch", type=count, default=200, help="optimizer steps an epoch")
    flag("--batch-size", type=number(int, least=1, below=2**20), default=32, help="windows of --block-size tokens")
    flag("--grad-accum", type=count, help="parts that a process takes its windows in: the same step on less memory; by "
         "default as many as keep a part within 2,048 tokens on a CPU, else 1")
    flag("--lr", type=positive, default=3e-4, help="learning rate")
    flag("--lr-schedule", choices=("constant", "cosine"), default="constant", help="cosine falls to 0 at the end")
    flag("--warmup-steps", type=number(int, least=0), default=0, help="steps of linear warm-up")
    flag("--weight-decay", type=number(float, least=0), default=0.01, help="AdamW's")
    flag("--grad-clip", type=number(float, least=0), default=0.0, help="largest norm of the gradient; 0: no clipping")
    flag("--seed", type=number(int, least=0, below=2**63), default=0, help="of weights, batches, dropout, estimates")
    flag("--device", choices=("auto", "cuda", "mps", "cpu"), default="auto", help="auto: the first one there")
    flag("--compile", action="store_true", help="torch.compile: a minute or two first, needs a C++ compiler")
    flag("--dtype", choices=("auto", "float32", "bfloat16"), default="auto",
         help="of the products; auto: bfloat16 on CUDA if native, and on a CPU if at least twice as fast")
    flag = parser.add_argument_group("files").add_argument
    flag("--log-file", type=path, default=log_file, help="JSON Lines, one record per epoch")
    flag("--checkpoint", type=path,
         help="last checkpoint, NAME.pt; the best one is NAME.best.pt; by default beside the log")
    flag("--checkpoint-minutes", type=positive, default=10.0, help="minutes between checkpoints inside an epoch")
    flag("--resume", action="store_true", help="go on from the last checkpoint, if there is one, else start; --epochs, "
         "--checkpoint-minutes, the device and the number of processes may differ")
    flag("--overwrite", action="store_true", help="replace an existing log and its checkpoints")
    return parser


def check(args):
    """Raises UserError where one flag contradicts another."""
    if args.d_model % args.n_heads:
        raise UserError(f"--d-model {args.d_model} is not a multiple of --n-heads {args.n_heads}")
    if args.resume and args.overwrite:
        raise UserError("--resume and --overwrite exclude each other")
    if args.warmup_steps >= args.epochs * args.steps_per_epoch:
        raise UserError(f"--warmup-steps {args.warmup_steps} leaves nothing of the run")
    parts = processes() * (args.grad_accum or 1)
    if args.batch_size % parts:
        raise UserError(f"--batch-size {args.batch_size} cannot be split evenly into {parts} parts "
                        f"({processes()} processes, --grad-accum {args.grad_accum or 1})")
    if "init_rank" in args:  # there are ranks to control
        if args.ranks_from:
            args.init_rank = None
        else:
            check_ranks([args.init_rank], "--init-rank", args)


def check_ranks(ranks, source, args):
    """Raises UserError for an initial rank out of bounds."""
    side = min(args.d_model, args.d_ff)
    low, high = (1, side) if args.fixed_rank else (args.min_rank, min(args.max_rank or side, side))
    for rank in ranks:
        if not low <= rank <= high:
            raise UserError(f"{source} {rank} is not between {low} and {high}, as --min-rank, --max-rank and the "
                            "smaller side of the matrices ask")


LEFT = "interrupted; --resume goes on from the last checkpoint, where there is one"


def stop(number, frame):
    """The handler of SIGNALS where nothing has to be saved."""
    raise KeyboardInterrupt(128 + number, LEFT)


def main(argv=None, prog="v10_transformer_lowrank_scaled.py", linear=None, log_file="logs/v10.jsonl"):
    """Run a command line -> exit code. `linear(n, m)` takes the place of factored layers and rank control (v7)."""
    argv = sys.argv[1:] if argv is None else argv
    handlers = handle(stop)
    try:
        with screens():
            return run(argv, prog, linear, log_file)
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def run(argv, prog, linear, log_file):
    """main() on a screen that may vanish."""
    def fail(message, code, everywhere=False):
        handle(lambda *_: None)  # torchrun ends all processes once one has ended
        message = message if len(message) <= 1000 else message[:500] + " ... " + message[-400:]
        if process() == 0 or everywhere:
            message = f"{prog}: " + f"process {process()}: " * (processes() > 1) + message
            print(message, file=sys.stderr)
            if report := os.environ.get("TORCHELASTIC_ERROR_FILE"):  # so that torchrun's own report ends with it
                with contextlib.suppress(OSError):
                    Path(report).write_text(json.dumps({"message": {"message": message, "extraInfo": {
                        "py_callstack": message, "timestamp": str(int(time.time()))}}}))
        else:  # all come to the same error of the user's, and the others end with process 0
            time.sleep(1)
        return code

    try:
        if dist.is_torchelastic_launched():
            dist.init_process_group()  # gloo between CPUs, NCCL between GPUs
            gather("connected")  # before that, the end of one would look like a crash to the others
        args = build_parser(prog, linear is None, log_file).parse_args(argv)
        check(args)
        command = shlex.join([prog] + [re.sub(r"[^=]*/", "", word) for word in argv])  # base names, never paths
        with contextlib.ExitStack() as held:
            train(args, prog, command, held, linear)
        gather("done")  # the processes end together
        return 0
    except (UserError, TrainingError) as error:
        return fail(f"error: {error}", 2 if isinstance(error, UserError) else 1)
    except OSError as error:
        return fail(f"error: cannot use {error.filename or 'a file'}: {error.strerror}", 2)
    except KeyboardInterrupt as error:
        code, said = error.args or (130, LEFT)
        return fail(said, code, everywhere=said == LEFT)
    except (RuntimeError, MemoryError) as error:
        if isinstance(error, MemoryError) or re.search("out of memory|(allocate|enough) memory|size calc", str(error)):
            return fail("error: out of memory: try a larger --grad-accum, which takes a step in more parts, or a "
                        "smaller --batch-size, --block-size, --d-model or --d-ff", 2, everywhere=True)
        if processes() == 1 or not re.search("gloo|NCCL|[Cc]onnection", str(error)):
            raise
        return fail("error: the connection to another process is lost, which has ended; --resume goes on from the last "
                    "checkpoint", 1, everywhere=True)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


if __name__ == "__main__":
    leave(main())
