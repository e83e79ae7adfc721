"""The scaling law: what scaling.py's logs say of loss, size, tokens and compute. Tables and a figure.

    python3 law.py logs/scaling      of runs of one's own, the figure beside them; results.py shows the committed ones

The loss is taken above the floor of the text: what the true generator loses if it sees no more than a block, as the
models do. Compute is counted (counts.py), in multiplications. Two readings of Hoffmann et al. (2022):

    isoFLOP     at one budget of compute C, log loss is a parabola in log N; its lowest point is the best size there,
                and over the budgets N_opt ~ C^a, D_opt ~ C^b, loss ~ C^-c
    parametric  loss = A N^-alpha + B D^-beta over all runs of an arm, without a constant, since the floor is known

D are the tokens that were read. N has three readings, since in models this small they are not in proportion: the
parameters in the linear layers, all of them, or the multiplications that a token costs, C / 3D, Newton-Schulz among
them, for which a + b = 1.
Intervals hold 95% of 1,000 fits to resampled residuals, widened after Student: they show the scatter about the fitted
curve, if the curve is right, not what another seed, rate or text would change. For that some sizes are run again.
"""
import json
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent))  # PYTHONSAFEPATH leaves it out

import counts  # noqa: E402
import plot_logs  # noqa: E402
from plot_logs import DASH, Cell, LogError, Table  # noqa: E402

ARMS = {"adamw": "dense, AdamW", "muon": "dense, Muon", "spectron": "rank d/4, Spectron"}
COLORS = {"adamw": "dense", "muon": "controlled", "spectron": "cut"}  # of plot_logs' families
SIZES = {"linear": "linear layers", "parameters": "all parameters", "per_token": "multiplications per token"}
PAPER = {"a": 0.479, "b": 0.521}  # Spectron's, of its low-rank models
DRAWS = 1000


class Again(NamedTuple):
    """A size of an arm at a budget, run again."""

    compute: float
    linear: float
    seeds: list  # the losses of all its seeds
    times: dict  # {what its rate is multiplied by, as it is written: loss}


class Arm(NamedTuple):
    """The runs of an arm, (budgets, widths) each."""

    compute: np.ndarray
    linear: np.ndarray  # parameters in the linear layers
    parameters: np.ndarray  # all of them
    tokens: np.ndarray
    loss: np.ndarray  # above the floor, in nats per token
    again: tuple = ()  # of Again

    @property
    def per_token(self):
        return self.compute / (3 * self.tokens)


class Law(NamedTuple):
    """Fits to an arm: each array begins with that to the runs, and DRAWS to resampled ones follow, (1 + DRAWS, ...)."""

    N_opt: np.ndarray  # (..., budgets)
    loss: np.ndarray  # at N_opt, (..., budgets)
    beyond: np.ndarray  # -1 or 1 where the lowest point is beyond the smallest or the largest size, (..., budgets)
    exponents: dict  # {a, b, c, alpha, beta: (...,)}
    parabolas: np.ndarray  # coefficients of the first fit, (budgets, 3), of log loss in log N
    misfit: np.ndarray  # root mean square of the log losses about the first fit: of the parabolas, and parametric, (2,)


# ---- Fits ------------------------------------------------------------------------------------------------------------

def resampled(fitted, losses, freedom, draws, rng):
    """Logarithms of losses (...), and as many again as `draws`: what was fitted with residuals drawn from all, widened
    for the freedom that the fit took from them and for their number -> (1 + draws, ...)."""
    residuals = (losses - fitted).ravel()
    student = 1.96 + 2.4 / freedom + 2.8 / freedom**2  # its 97.5% quantile, to 2% from 4 degrees of freedom on
    residuals *= (residuals.size / freedom) ** 0.5 * student / 1.96
    drawn = rng.choice(residuals - residuals.mean(), size=(draws, *losses.shape))
    return np.concatenate([losses[None], fitted + drawn])


def slope(x, y):
    """The slope of a line through y (..., n) over x (..., n), by least squares -> (...,)."""
    x, y = (values - values.mean(-1, keepdims=True) for values in (x, y))
    return (x * y).sum(-1) / (x * x).sum(-1)


def isoflop(log_N, log_D, log_loss, log_C, draws=0, rng=None):
    """Parabolas at each budget, and lines through what is lowest. Arguments (budgets, widths), log_C (budgets,)
    -> (log N_opt, log loss there, where it is beyond the sizes, exponents, the first parabolas, log losses on them). A
    lowest point beyond the sizes that were run is taken at the last of them: `a` is then the grid's more than the
    law's."""
    parabolas = np.array([np.polyfit(x, y, 2) for x, y in zip(log_N, log_loss, strict=True)])
    fitted = np.array([np.polyval(p, x) for p, x in zip(parabolas, log_N, strict=True)])
    many = resampled(fitted, log_loss, log_loss.size - parabolas.size, draws, rng)  # (1 + draws, budgets, widths)
    lowest, loss, D_opt, beyond = [], [], [], []
    for i, x in enumerate(log_N):
        coefficients = np.polyfit(x, many[:, i].T, 2)  # (3, 1 + draws)
        with np.errstate(divide="ignore", invalid="ignore"):
            at = np.where(coefficients[0] > 0, -coefficients[1] / (2 * coefficients[0]),
                          np.where(np.polyval(coefficients, x[0]) < np.polyval(coefficients, x[-1]), -np.inf, np.inf))
        beyond.append((at > x.max()) * 1 - (at < x.min()) * 1)
        lowest.append(at.clip(x.min(), x.max()))
        loss.append(np.polyval(coefficients, lowest[-1]))
        D_opt.append(np.polyval(np.polyfit(x, log_D[i], 2), lowest[-1]))
    lowest, loss, D_opt, beyond = (np.array(values).T for values in (lowest, loss, D_opt, beyond))
    exponents = {"a": slope(log_C, lowest), "b": slope(log_C, D_opt), "c": -slope(log_C, loss)}
    return lowest, loss, beyond, exponents, parabolas, fitted


def parametric(log_N, log_D, log_losses, rounds=300):
    """log loss = log(A N^-alpha + B D^-beta) by least squares, after Levenberg and Marquardt, for several sets of
    losses (sets, budgets, widths) -> (alpha, beta (sets,), what was fitted, as log_losses are)."""
    x, z = (values.ravel() - values.mean() for values in (log_N, log_D))
    y = log_losses.reshape(len(log_losses), -1)  # (sets, runs)

    def terms(theta):  # (sets, 4): log A and log B in the middle of the runs, alpha, beta -> their logs, and the sum's
        first, second = theta[:, :1] - theta[:, 2:3] * x, theta[:, 1:2] - theta[:, 3:] * z
        return first, second, np.logaddexp(first, second)

    middle = y.mean(1) - np.log(2)
    theta = np.stack([middle, middle, np.full(len(y), 0.3), np.full(len(y), 0.3)], axis=1)
    damping, error = np.full(len(y), 1e-3), ((terms(theta)[2] - y) ** 2).sum(1)
    for _ in range(rounds):
        first, second, total = terms(theta)
        p, q = np.exp(first - total), np.exp(second - total)  # each term's share
        J = np.stack([p, q, -p * x, -q * z], axis=2)  # (sets, runs, 4)
        H = J.mT @ J
        H += damping[:, None, None] * (H * np.eye(4) + 1e-12 * np.eye(4))
        step = np.linalg.solve(H, J.mT @ (y - total)[..., None])[..., 0]
        if np.abs(step).max() < 1e-9:
            break
        trial = theta + step
        of_trial = ((terms(trial)[2] - y) ** 2).sum(1)
        better = of_trial <= error
        theta[better], error[better] = trial[better], of_trial[better]
        damping = np.clip(np.where(better, damping / 3, damping * 4), 1e-12, 1e12)
    return theta[:, 2], theta[:, 3], terms(theta)[2].reshape(log_losses.shape)


def fit(arm, size="linear", draws=DRAWS, seed=0):
    """An arm's law in one of SIZES -> Law. Arms that are compared need seeds of their own: equal ones draw alike."""
    rng = np.random.default_rng(seed)
    log_N, log_D, log_loss = (np.log(values) for values in (getattr(arm, size), arm.tokens, arm.loss))
    log_C = np.log(arm.compute).mean(1)
    lowest, loss, beyond, exponents, parabolas, on_parabolas = isoflop(log_N, log_D, log_loss, log_C, draws, rng)
    (fitted,) = parametric(log_N, log_D, log_loss[None])[2]
    misfit = np.sqrt([((log_loss - of_form) ** 2).mean() for of_form in (on_parabolas, fitted)])
    alpha, beta, _ = parametric(log_N, log_D, resampled(fitted, log_loss, log_loss.size - 4, draws, rng))
    exponents |= {"alpha": alpha, "beta": beta}
    return Law(np.exp(lowest), np.exp(loss), beyond, exponents, parabolas, misfit)


# ---- The logs --------------------------------------------------------------------------------------------------------

def read(folder):
    """The arms of a folder of scaling.py's -> {name: Arm}, {} as long as runs are missing. Raises LogError."""
    sidecar = folder / "synthetic.json"
    if not sidecar.is_file():
        return {}
    try:
        text = json.loads(sidecar.read_text(encoding="utf-8"))
        floor = float(text["context_floor"])
    except (ValueError, LookupError, TypeError) as error:
        raise LogError(f"{sidecar} does not say what the text's floor is ({error!r})") from None
    arms, same = {}, set()
    for name in ARMS:
        grid, others = {}, {}
        for path in sorted(folder.glob(f"{name}_c?_d*.jsonl"), key=width_of):
            _, budget, width, *how = path.stem.split("_")
            run = None if how[0].startswith("rate") else plot_logs.ended(path)
            if run:
                (epoch,), settings = run.epochs, run.settings
                same.add((settings["entropy_floor"], settings["block_size"], settings["dtype"], settings["device"]))
                numbers = (counts.multiplications(run), settings["factor_parameters"], 1e6 * epoch["params_millions"],
                           epoch["tokens_seen"], epoch["val_loss"] - floor)
                if how == ["s0"]:
                    grid.setdefault(budget, {})[width] = numbers
                else:
                    others.setdefault((budget, width), {})["_".join(how)] = numbers[-1]
        arms[name] = [[*grid[budget].values()] for budget in sorted(grid)], run_again(grid, others)
    shapes = {(len(grid), *map(len, grid)) for grid, _ in arms.values()}
    if len(shapes) > 1 or len(shape := shapes.pop()) < 3 or len({*shape[1:]}) > 1 or shape[1] < 4:
        return {}  # all arms have as many budgets, all budgets as many sizes: two and four at least
    again = {tuple((len(size.seeds), *size.times) for size in sizes) for _, sizes in arms.values()}
    if len(again) > 1 or () in again:
        return {}  # of all arms the same is run again
    if len(same) > 1 or [*same][0][:2] != (text["entropy_floor"], text["context"]):
        raise LogError(f"{folder} mixes runs of several texts, devices or precisions")
    arms = {name: Arm(*np.array(grid).transpose(2, 0, 1), again) for name, (grid, again) in arms.items()}
    if min(arm.loss.min() for arm in arms.values()) <= 0:
        raise LogError(f"{folder} has a loss at or below the text's floor, which no honest model reaches")
    return arms


def run_again(grid, others):
    """An arm's runs {budget: {width: numbers}}, and {(budget, width): {how: loss}} of those that are like one of these
    but for the seed or the rate -> (Again, ...), the smallest budget first."""
    found = []
    for (budget, width), losses in sorted(others.items()):
        if width in grid.get(budget, {}):
            compute, linear, *_, loss = grid[budget][width]
            seeds = [loss, *(losses[how] for how in sorted(losses) if how[0] == "s")]
            found.append(Again(compute, linear, seeds, {
                how.removeprefix("times").removesuffix("_s0"): losses[how] for how in sorted(losses) if how[0] == "t"}))
    return tuple(found)


def width_of(path):
    return int(path.stem.split("_")[2].removeprefix("d"))


def scaling_folder(study: Path) -> Path:
    """Where the runs of scaling.py lie, beside those of study.py."""
    return study.resolve().parent / "scaling"


# ---- Tables and figure -----------------------------------------------------------------------------------------------

def between(values, form=".3f"):
    """The first of several fits, and the interval of the rest."""
    low, high = np.percentile(values[1:], [2.5, 97.5])
    return f"{values[0]:{form}} ({low:{form}} to {high:{form}})"


def trillions(compute):
    return f"{compute / 1e12:.1f}"


def exponents(arms):
    """The exponents of each arm, for three ways to count its size, and how those of low rank differ from dense ones."""
    keys = ("a", "b", "c", "alpha", "beta")
    laws = {(name, size): fit(arm, size, seed=seed) for seed, (name, arm) in enumerate(arms.items()) for size in SIZES}
    rows = [[f"{ARMS[name]}, N: {SIZES[size]}", *(between(law.exponents[key]) for key in keys),
             f"{(law.beyond != 0).mean():.0%}", *(f"{misfit:.1%}" for misfit in law.misfit)]
            for (name, size), law in laws.items()]
    for name in ("adamw", "muon"):
        low, dense = (laws[arm, "linear"].exponents for arm in ("spectron", name))
        rows.append([f"Spectron {DASH} {ARMS[name]}, N: {SIZES['linear']}",
                     *(between(low[key] - dense[key], "+.3f") for key in keys), *[DASH] * 3])
    rows.append(["Spectron's paper, another text, low rank", *(f"{PAPER[key]:.3f}" for key in "ab"), *[DASH] * 6])
    return Table("exponents", "", ["with 95% intervals", "N_opt ~ C^a", "D_opt ~ C^b", "loss ~ C^-c",
                                   "A N^-alpha + B D^-beta: alpha", "beta", "lowest points beyond the sizes",
                                   "misfit: parabolas", "sum of powers"], rows)


def equal_compute(arms):
    """The lowest loss of each arm at each budget, low rank beside dense, and the size that has it."""
    laws, rows = {name: fit(arm, seed=seed) for seed, (name, arm) in enumerate(arms.items())}, []
    for i in range(arms["adamw"].compute.shape[0]):
        low = laws["spectron"].loss[:, i]
        at = [{-1: "at most ", 0: "", 1: "at least "}[law.beyond[0, i]] + f"{law.N_opt[0, i] / 1e3:,.0f}"
              for law in laws.values()]
        rows.append([trillions(np.mean([arm.compute[i].mean() for arm in arms.values()])),
                     *(between(law.loss[:, i]) for law in laws.values()),
                     *(between(low - laws[name].loss[:, i], "+.3f") for name in ("adamw", "muon")), *at])
    return Table("equal_compute", "", [
        "trillion multiplications", *ARMS.values(), *(f"Spectron {DASH} {ARMS[name]}" for name in ("adamw", "muon")),
        "thousand linear parameters there: AdamW", "Muon", "Spectron"], rows)


def again(arms):
    """Sizes that were run on other seeds and at other rates."""
    times, rows = sorted({factor for size in arms["adamw"].again for factor in size.times}), []
    for sizes in zip(*(arm.again for arm in arms.values()), strict=True):
        for name, size in zip(arms, sizes, strict=True):
            rows.append([ARMS[name], trillions(size.compute), f"{size.linear / 1e3:,.0f}", Cell(size.seeds, ".3f"),
                         f"{np.std(size.seeds, ddof=1):.3f}" if len(size.seeds) > 1 else DASH,
                         f"{size.seeds[0]:.3f}" if size.times else DASH,
                         *(f"{size.times[factor]:.3f}" if factor in size.times else DASH for factor in times)])
    return Table("again", "", ["nats above the floor", "trillion multiplications", "thousand linear parameters",
                               f"{len(arms['adamw'].again[0].seeds)} seeds", "their standard deviation", "seed 0",
                               *(f"{factor} times the rate" for factor in times)], rows)


def law_figure(arms):
    """The parabolas of each arm, and the lowest losses of all."""
    plt = plot_logs.plt
    figure, panels = plt.subplots(1, 4, figsize=(14, 3.8), sharey=True, layout="constrained")
    for (name, arm), axes in zip(arms.items(), panels[:3], strict=True):
        law, color = fit(arm, draws=0), plot_logs.COLORS[COLORS[name]]
        for i, parabola in enumerate(law.parabolas):
            at = np.linspace(*np.log(arm.linear[i, [0, -1]]), 50)
            shade = 0.35 + 0.65 * (i + 1) / len(law.parabolas)
            axes.plot(np.exp(at), np.exp(np.polyval(parabola, at)), color=color, alpha=shade, linewidth=1)
            axes.plot(arm.linear[i], arm.loss[i], "o", color=color, alpha=shade, markersize=4)
            axes.plot(law.N_opt[0, i], law.loss[0, i], "*", color="black", markersize=8)
            axes.annotate(trillions(arm.compute[i].mean()), (arm.linear[i, -1], arm.loss[i, -1]), (4, 0),
                          textcoords="offset points", fontsize=7, color=color, va="center")
        axes.set(xscale="log", yscale="log", xlabel="parameters in the linear layers", title=ARMS[name])
        axes.margins(x=0.2)
        panels[3].plot(arm.compute.mean(1) / 1e12, law.loss[0], "o-", color=color, label=ARMS[name], markersize=4)
    panels[0].set_ylabel("loss above the floor (nats per token)")
    panels[3].set(xscale="log", xlabel="trillion multiplications", title="The best size at each budget")
    panels[3].legend(fontsize=8)
    plot_logs.plain_ticks(panels[3].xaxis, 0.5, 1.5, 4.5, 13.5)
    plot_logs.plain_ticks(panels[0].yaxis, 0.1, 0.15, 0.2, 0.3, 0.4, 0.6, 0.8)
    figure.supxlabel("at a curve: its budget, in trillion multiplications; star: its lowest point", fontsize=8)
    return figure


TABLES = {"exponents": exponents, "equal_compute": equal_compute, "again": again}


def show(folder):
    """Print the tables of a folder of scaling.py's, and save the figure beside its logs. Raises LogError."""
    if not (arms := read(folder)):
        raise LogError(f"{folder} does not hold all of scaling.py's runs: `make scaling` goes on with them")
    plot_logs.screen("\n\n".join(table(arms).markdown() for table in TABLES.values()))
    plot_logs.start_matplotlib()
    plot_logs.save(law_figure(arms), folder / "law")
    plot_logs.screen(f"\n{folder / 'law.png'}")


def main(argv=None):
    parser = plot_logs.Parser(prog="law.py", description="Prints and draws the law of scaling.py's runs.",
                              allow_abbrev=False)
    parser.add_argument("folder", type=plot_logs.home, nargs="?", default="logs/scaling", help="folder of their logs")
    folder = parser.parse_args(argv).folder
    return plot_logs.exit_code("law.py", folder, "scaling.py", lambda: show(folder))


if __name__ == "__main__":
    sys.exit(main())
