"""What models and runs cost in multiplications: counted, not measured.

`settings` are those of a log's run record: sizes, and the shape of each linear layer.
"""
from itertools import groupby, pairwise


def settings_of(d_model, n_layers, vocab_size, block_size, batch_size, d_ff=None, optimizer="adamw"):
    """The settings of a run that has no log yet."""
    C, F = d_model, d_ff or 4 * d_model
    return {"d_model": C, "n_layers": n_layers, "vocab_size": vocab_size, "block_size": block_size,
            "batch_size": batch_size, "optimizer": optimizer,
            "layers": [{"shape": shape} for shape in n_layers * [*4 * [(C, C)], (F, C), (C, F)]]}


def token_multiplications(settings, ranks):
    """Of one token's forward pass, by part: the linear layers, of these ranks or dense, the head, and causal attention,
    which half of the positions on average take part in, twice."""
    C = settings["d_model"]
    return {"linear": sum(rank * (m + n) if rank else m * n for (m, n), rank in layers(settings, ranks)),
            "head": C * settings["vocab_size"], "attention": C * settings["n_layers"] * settings["block_size"]}


def step_multiplications(settings, ranks):
    """Of a step of training: a backward pass costs two forward ones, and Newton-Schulz, in Muon and Spectron, five
    times 2 s^2 l + s^3 for a matrix of sides s <= l. Updates of single entries are not counted."""
    total = 3 * settings["batch_size"] * settings["block_size"] * sum(token_multiplications(settings, ranks).values())
    if settings.get("optimizer") in ("muon", "spectron"):
        matrices = [sorted(sides) for (m, n), rank in layers(settings, ranks)
                    for sides in ([(m, rank), (n, rank)] if rank else [(m, n)])]
        total += sum(5 * (2 * short**2 * long + short**3) for short, long in matrices)
    return total


def layers(settings, ranks):
    """[(shape, rank or None)]"""
    shapes = [layer["shape"] for layer in settings["layers"]]
    return list(zip(shapes, ranks or [None] * len(shapes), strict=True))


def ranks_of_steps(run):
    """[(how many steps, the ranks that they were trained with)], one for each change of the ranks"""
    per_epoch = run.settings["steps_per_epoch"]
    changes = {0: run.settings["initial_ranks"]} | {epoch["epoch"] * per_epoch: epoch["ranks"] for epoch in run.epochs}
    changes |= {update["step"]: update["ranks"] for update in [*run.updates, *run.cuts]}
    stages = [(end - begin, changes[begin]) for begin, end in pairwise(sorted(changes))]
    return [(sum(steps for steps, _ in same), ranks) for ranks, same in groupby(stages, lambda stage: stage[1])]


CUT_TOKENS = 12_288  # which v11 measures a cut on, forward and backward, and the head once more, to draw labels


def multiplications(run):
    """Of a whole run: its steps and v11's cuts; not evaluation, v10's control of ranks or the guides of self-guided."""
    total = sum(steps * step_multiplications(run.settings, ranks) for steps, ranks in ranks_of_steps(run))
    for cut in run.cuts:
        forward = token_multiplications(run.settings, cut["ranks_before"])
        total += CUT_TOKENS * (3 * sum(forward.values()) + forward["head"])
    return total
