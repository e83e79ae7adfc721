"""Tables, figures and errors of plot_logs.py."""
import csv
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

import matplotlib.text
import pytest

import plot_logs
import v7_transformer_dense_baseline as v7
from conftest import ROOT, unpainted, write_sidecar

FINAL = [10, 10, 18, 24, 10, 10, 10, 10, 22, 23, 24, 22, 17, 14, 15, 20, 17, 27, 10, 13, 11, 25, 18, 32, 11, 10, 10, 22,
         13, 27, 9, 10, 11, 23, 14, 26]
TABLE_1 = [(1, 7.156, 6.740, 60, 60, 60.0), (5, 5.778, 6.167, 44, 44, 44.0), (10, 5.313, 6.123, 24, 32, 26.1),
           (15, 5.020, 5.909, 10, 32, 19.9), (20, 4.819, 6.021, 10, 32, 17.9), (25, 2.964, 3.327, 9, 32, 17.0),
           (30, 0.572, 1.155, 9, 32, 16.61)]


def report_record(epoch, train_loss, val_loss, low, high, mean):
    ranks = FINAL if epoch == 30 else [low] * 18 + [high] * 18
    return {"epoch": epoch, "train_loss": train_loss, "val_loss": val_loss, "rank_min": low, "rank_max": high,
            "rank_avg": mean, "ranks": ranks, "params_millions": 37.792253, "time_sec": 38.7}


def write(path, *found):
    path.write_text("".join(json.dumps(record) + "\n" for record in found))
    return path


@pytest.fixture
def painted():
    """For tests whose figures are more than empty files."""


@pytest.fixture(autouse=True)
def few_pictures(request, monkeypatch):
    """Elsewhere figures are files without a picture."""
    if "painted" not in request.fixturenames:
        monkeypatch.setattr(plot_logs, "save", unpainted)


@pytest.fixture
def report(tmp_path):
    return write(tmp_path / "report.jsonl", *(report_record(*row) for row in TABLE_1))


@pytest.fixture
def dense(tmp_path):
    """A log with one figure, that of its losses."""
    return write(tmp_path / "dense.jsonl", *logged([3, 2], lambda epoch: [], initial_ranks=[]))


def plot(*arguments, code=0):
    assert plot_logs.main([str(argument) for argument in arguments]) == code


def cells(text, first):
    """The cells of the table row that begins with `first`."""
    return next([cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines()
                if line.startswith(f"| {first} "))


def test_the_reports_own_log_comes_out_as_its_tables_to_the_digit(report, capsys):
    plot(report)
    said = capsys.readouterr().out
    for row in ("1 7.156 6.740 60 60 60.0", "5 5.778 6.167 44 44 44.0", "10 5.313 6.123 24 32 26.1",
                "15 5.020 5.909 10 32 19.9", "20 4.819 6.021 10 32 17.9", "25 2.964 3.327 9 32 17.0",
                "30 0.572 1.155 9 32 16.6"):
        assert cells(said.split("Table 2")[0], row.split()[0]) == row.split()
    second = said.split("Table 2")[1]
    for row in ("0 10 10 18 24 10 10", "1 10 10 22 23 24 22", "2 17 14 15 20 17 27", "3 10 13 11 25 18 32",
                "4 11 10 10 22 13 27", "5 9 10 11 23 14 26", "Mean 11.2 11.2 14.5 22.8 16.0 24.0"):
        assert cells(second, row.split()[0]) == row.split()
    assert cells(said, "rank reduction")[2] == "74.0%"
    assert cells(said, "mean rank")[1:] == ["64.0", "16.6"]
    assert "64 is assumed" in said
    assert cells(said, "parameters in the linear layers")[1:] == [plot_logs.DASH] * 2
    assert (report.parent / "figures" / "tables.md").read_text() in said


def test_the_assumed_initial_rank_is_a_flag(report, capsys):
    plot(report, "--init-rank", 32)
    said = capsys.readouterr().out
    assert "32 is assumed" in said
    assert cells(said, "rank reduction")[2] == "48.1%"


def test_every_fifth_epoch_and_the_last_are_in_table_1(tmp_path, capsys):
    plot(write(tmp_path / "log.jsonl", *(report_record(epoch, 2, 1, 8, 9, 8.5) for epoch in range(1, 13))))
    rows = capsys.readouterr().out.split("Table 1")[1].split("Table 2")[0].splitlines()
    assert [row.split("|")[1].strip() for row in rows if row.startswith("| ")][1:] == ["1", "5", "10", "12"]


def test_our_own_logs_give_tables_figures_and_a_comparison(run, tmp_path, capsys, painted):
    logs = [run(name="v10"), run("--attention", "bidirectional", name="open"), run(name="v7", main=v7.main, ranks=[])]
    capsys.readouterr()
    plot(*logs, "--out", tmp_path / "out")
    said = capsys.readouterr().out
    made = {path.name for path in (tmp_path / "out").iterdir()}
    pictures = ["losses", *(f"{name}_{kind}" for name in ("v10", "open")
                            for kind in ("ranks", "heatmap", "final-ranks"))]
    texts = ["comparison", *(f"{name}_{kind}" for name in ("v10", "open", "v7") for kind in ("training", "cost")),
             *(f"{name}_final-ranks" for name in ("v10", "open"))]
    assert made == {"tables.md", "index.html", *(f"{name}.{kind}" for name in pictures for kind in ("png", "pdf")),
                    *(f"{name}.{kind}" for name in texts for kind in ("csv", "tex"))}
    for kind, start in (("png", b"\x89PNG"), ("pdf", b"%PDF"), ("tex", b"\\begin{table}")):
        assert all(path.read_bytes().startswith(start) for path in (tmp_path / "out").glob(f"*.{kind}"))
    comparison = said.split("# Comparison")[1]
    assert [cells(comparison, name)[2] for name in ("v10", "open", "v7")] == [
        "causal", "none: SEES ITS TARGETS", "causal"]
    last = json.loads(logs[0].read_text().splitlines()[-2])
    assert cells(comparison, "v10")[3:5] == [f"{last['rank_avg']:.1f}", f"{last['params_millions'] * 1e6:,.0f}"]
    of_v7 = said.split("Cost, v7")[1]
    assert cells(said, "dense model in all")[1:] == cells(of_v7, "parameters in all")[1:]
    assert cells(of_v7, "dense model in all")[1:] == cells(of_v7, "parameters in all")[1:]
    assert "cannot be compared" not in comparison
    assert said.count("SEES ITS TARGETS") == 1 + 3 + 1  # its heading, its three tables, its row of the comparison


def test_every_figure_of_a_bidirectional_run_is_marked(run):
    plot_logs.start_matplotlib()
    runs, _ = plot_logs.read_logs([run("--attention", "bidirectional", name="open"), run(name="v10")])
    for name, figure in plot_logs.figures(runs):
        texts = " ".join(text.get_text() for text in figure.findobj(matplotlib.text.Text))
        assert ("SEES ITS TARGETS" in texts) == (not name.startswith("v10_")), name
        plot_logs.plt.close(figure)


def test_runs_on_different_data_are_not_compared_silently(run, text, capsys):
    first = run(name="a")
    text.write_text(text.read_text() + " w1")
    plot(first, run("--epochs", 2, name="b"))
    said = capsys.readouterr().out
    assert "losses cannot be compared" in said
    assert "not trained on the same number of tokens" in said


def test_what_a_log_does_not_say_is_not_called_different(report, dense, capsys):
    plot(report, dense)
    assert "were not trained on the same" not in capsys.readouterr().out


def test_the_entropy_floor_is_drawn_and_listed(run, text, capsys):
    write_sidecar(text)
    logs = [run(name="a"), run("--lr", 0.02, name="b")]
    capsys.readouterr()
    plot(*logs)
    assert cells(capsys.readouterr().out.split("# Comparison")[1], "a")[9] == "3.125"
    figure = plot_logs.losses_figure(plot_logs.grouped(plot_logs.read_logs(logs)[0]))
    assert any("3.125" in text.get_text() for text in figure.findobj(matplotlib.text.Text))
    plot_logs.plt.close(figure)


def test_a_really_resumed_log_reads_like_the_straight_one(run):
    straight = run(name="straight")
    run("--epochs", 2, name="resumed")
    resumed = run("--resume", name="resumed")
    a, b = (plot_logs.read_log(log, "log") for log in (straight, resumed))
    assert plot_logs.training_table(a).markdown() == plot_logs.training_table(b).markdown().replace(b.name, a.name)


def test_a_torn_last_line_is_left_out_with_a_warning(report, capsys):
    report.write_text(report.read_text()[:-30])
    plot(report)
    captured = capsys.readouterr()
    assert "report.jsonl:7: the last line is cut off" in captured.err
    assert cells(captured.out, "25")[2] == "3.327"


@pytest.mark.parametrize(("line", "said"), [
    ('{"epoch": 2', "not a line of JSON"), ("hello", "not a line of JSON"),
    ("[1, 2]", "a record should be an object, not [1, 2]"),
    ('{"epoch": 31, "train_loss": NaN, "val_loss": 1, "ranks": []}', "not a line of JSON"),
    ('{"epoch": 31, "val_loss": 1, "ranks": []}', "train_loss should be a number"),
    ('{"epoch": 31, "train_loss": "1", "val_loss": 1, "ranks": []}', 'train_loss should be a number, not "1"'),
    ('{"epoch": 31, "train_loss": 1, "val_loss": 1, "ranks": [1, 2]}', "2 ranks, where the epoch before has 36"),
    ('{"epoch": 31, "train_loss": 1, "val_loss": 1, "ranks": [0]}', "ranks[0] should be a whole number above 0, not 0"),
    ('{"epoch": 31, "train_loss": 1, "val_loss": 1, "ranks": [1, 2, 3, 4, 5, 6]}', "where the epoch before has 36"),
    ('{"epoch": 30, "train_loss": 1, "val_loss": 1, "ranks": []}', "where the epoch before"),
    ('{"epoch": true, "train_loss": 1, "val_loss": 1, "ranks": []}', "epoch should be a number"),
    ('{"kind": ["run"]}', "kind should be text"), ("\x00\x01", "not a line of JSON")])
def test_a_bad_line_is_an_error_with_file_and_line(report, capsys, line, said):
    report.write_text(report.read_text() + line + "\n" + report.read_text().splitlines()[-1] + "\n")
    plot(report, code=2)
    error = capsys.readouterr().err
    assert f"{report}:8: " in error
    assert said in error
    assert error.count("\n") == 1


def test_a_record_of_an_unknown_kind_is_left_out_with_a_warning(report, capsys):
    report.write_text(2 * '{"kind": "other", "step": 3}\n' + report.read_text())
    plot(report)
    captured = capsys.readouterr()
    assert "report.jsonl:1: left out: a record of an unknown kind, 'other'" in captured.err
    assert captured.err.count("of an unknown kind") == 1
    assert cells(captured.out, "25")[2] == "3.327"


def test_a_log_that_counts_all_parameters_but_not_the_layers_gets_dashes(tmp_path, capsys):
    plot(write(tmp_path / "log.jsonl", *logged([6, 5], parameters=100, layers=[{"name": "0.q", "shape": [8, 8]}])))
    assert cells(capsys.readouterr().out, "dense model in all")[1:] == [plot_logs.DASH] * 2


def test_layers_are_named_by_the_log_and_six_for_each_block_only_without_names(tmp_path, capsys):
    layers = [{"name": name, "shape": [8, 8]} for name in ("a.in", "a.up", "b.in", "b.gate")]
    log = write(tmp_path / "log.jsonl", *logged([6, 5], lambda epoch: [8, 7, 6, 5], initial_ranks=[9] * 4,
                                                layers=layers))
    plot(log)
    said = capsys.readouterr().out
    assert cells(said, "Block")[1:] == ["in", "FFN \N{UPWARDS ARROW}", "gate"]
    assert [cells(said, block)[1:] for block in "ab"] == [["8", "7", plot_logs.DASH], ["6", plot_logs.DASH, "5"]]
    assert cells(said.split("Table 2")[1], "Mean")[1:] == ["7.0", "7.0", "5.0"]
    for names in ([{"shape": [8, 8]}] * 4, layers[:1] * 4, layers[:2]):  # no names, the same one, too few
        plot(write(tmp_path / "odd.jsonl", *logged([6, 5], lambda epoch: [8, 7, 6, 5], initial_ranks=[9] * 4,
                                                   layers=names)))
        assert cells(capsys.readouterr().out, "Block")[1:] == ["layer"]


def test_the_page_holds_every_table_and_figure_and_needs_no_other_file(report, tmp_path):
    other = write(tmp_path / "other.jsonl", *logged([6, 5]))
    plot(report, other, "--out", tmp_path / "out")
    page = (tmp_path / "out" / "index.html").read_text()
    pictures = [path.stem for path in (tmp_path / "out").glob("*.png")]
    assert sorted(re.findall('<img alt="(.*?)" src="data:image/png;base64,', page)) == sorted(pictures)
    assert page.count("<table>") == len([*(tmp_path / "out").glob("*.csv")])
    assert "<p>No run record: the log does not say what trained it" in page
    assert page.index("<h1>Comparison</h1>") < page.index("<h1>report</h1>") < page.index('alt="report_ranks"')
    assert not re.findall(r"(src|href)=\"(?!data:)", page)


def test_a_missing_an_empty_and_a_barely_begun_log_are_errors(tmp_path, capsys):
    plot(tmp_path / "no.jsonl", code=2)
    assert "No such file" in capsys.readouterr().err
    for found in ([], [{"kind": "run", "attention": "causal"}]):
        plot(write(tmp_path / "log.jsonl", *found), code=2)
        assert "no epoch in it yet" in capsys.readouterr().err


def test_logs_of_one_name_keep_apart(tmp_path):
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        write(tmp_path / folder / "log.jsonl", report_record(1, 2, 1, 8, 9, 8.5))
    runs, _ = plot_logs.read_logs([tmp_path / "a" / "log.jsonl", tmp_path / "b" / "log.jsonl"])
    assert [run.name for run in runs] == ["a_log", "b_log"]


# The report's own log, epoch by epoch: validation losses and mean ranks.
REPORT_LOSSES = [6.740, 6.592, 6.465, 6.324, 6.167, 6.195, 6.208, 6.194, 6.121, 6.123, 6.000, 6.032, 6.073, 5.934,
                 5.909, 5.938, 6.064, 5.917, 5.972, 6.021, 5.963, 5.855, 5.363, 4.515, 3.327, 2.439, 1.950, 1.457,
                 1.358, 1.155]
REPORT_MEANS = [60, 56, 52, 48, 44, 40, 36, 32.06, 28.83, 26.08, 24.17, 22.28, 21.08, 20.36, 19.89, 19.31, 18.78, 18.67,
                18.19, 17.92, 17.50, 17.17, 17.08, 17.03, 16.97, 16.86, 16.86, 16.92, 16.78, 16.61]


def logged(losses, ranks=lambda epoch: [8] * 6, **settings):
    """The records of a run with these validation losses."""
    return [{"kind": "run", "attention": "causal", "initial_ranks": [64] * 6, **settings}, *(
        {"kind": "epoch", "epoch": i, "train_loss": loss, "val_loss": loss, "ranks": ranks(i), "tokens_seen": 100 * i,
         "time_sec": 60, "params_millions": 3 - i / 10} for i, loss in enumerate(losses, start=1))]


def spans(run):
    """[(phase, first epoch, last epoch)]"""
    return [(name, epochs[0]["epoch"], epochs[-1]["epoch"]) for name, epochs in plot_logs.phases(run)]


def test_the_phases_of_the_reports_run_are_those_of_the_report(tmp_path):
    def ranks(epoch):
        mean = REPORT_MEANS[epoch - 1]
        return [round(mean)] * 6 if epoch < 8 else [round(mean) - 3] * 3 + [round(mean) + 3] * 3
    run = plot_logs.read_log(write(tmp_path / "log.jsonl", *logged(REPORT_LOSSES, ranks)), "log", 64)
    assert spans(run) == [("uniform compression", 1, 7), ("differentiation", 8, 22), ("collapse", 23, 30)]
    assert [str(cell) for cell in plot_logs.phase_table(run).rows[2]][1:4] == ["23 to 30", "5.855", "1.155"]


@pytest.mark.parametrize(("losses", "ranks", "found"), [
    ([9, 7, 5, 4], lambda epoch: [64] * 6, []),  # steady learning is no collapse; fixed ranks do nothing
    ([5, 5, 4.74], lambda epoch: [64] * 6, [("collapse", 3, 3)]), ([5, 5, 4.76], lambda epoch: [64] * 6, []),
    ([5, 4.8, 4.5], lambda epoch: [64] * 6, []),  # not without an epoch that brought less than 2%
    ([9, 8, 7], lambda epoch: [64 - epoch] * 6, [("uniform compression", 1, 3)]),
    ([9, 8, 7], lambda epoch: [64 - epoch] * 5 + [60], []), ([9, 8, 7], lambda epoch: [64 + epoch] * 6, []),
    ([9, 9, 7], lambda epoch: [64 - epoch] * (6 - epoch) + [60] * epoch, [("collapse", 3, 3)]),
    ([9, 9, 7, 6], lambda epoch: [64 - epoch] * 6, [("uniform compression", 1, 2), ("collapse", 3, 4)]),
    ([9, 9, 7, 6], lambda epoch: [60] * 6 if epoch == 1 else [55] * 5 + [50],
     [("uniform compression", 1, 1), ("differentiation", 2, 2), ("collapse", 3, 4)])])
def test_phases_follow_their_rules(tmp_path, losses, ranks, found):
    run = plot_logs.read_log(write(tmp_path / "log.jsonl", *logged(losses, ranks)), "log", 64)
    assert spans(run) == found


def test_the_reports_tables_beside_the_reports_own_log_differ_by_nothing(report, capsys):
    plot(report, "--report")
    said = capsys.readouterr().out.split("beside the report's")
    first = [line.split("|") for line in said[1].splitlines() if "Loss" in line or " R " in line]
    assert len(first) == 7 * 5
    assert all(ours.strip() == theirs.strip() and float(difference) == 0 for _, _, ours, theirs, difference, _ in first)
    assert [cells(said[3], name)[1:] for name in ("Q", "O", "all")] == [
        ["11.2", "11.2", "+0.0"], ["22.8", "22.8", "+0.0"], ["16.6", "16.6", "+0.0"]]


def test_the_reports_tables_stand_beside_a_log_of_another_shape(tmp_path, capsys, painted, monkeypatch):
    save = plot_logs.save
    monkeypatch.setattr(plot_logs, "save", lambda figure, path: (
        save if path.name == "log_report" else unpainted)(figure, path))
    plot(write(tmp_path / "log.jsonl", *logged([7, 7, 6, 6, 5])), "--report")
    said = capsys.readouterr().out
    assert cells(said, "5 Val Loss")[1:] == ["5.000", "6.167", "-1.167"]
    assert "10 Val Loss" not in said
    assert cells(said.split("Table 2 beside")[1], "O")[1:] == ["8.0", "22.8", "-14.8"]
    assert (tmp_path / "figures" / "log_report.png").stat().st_size > 10_000


def test_the_first_epoch_of_each_phase_stands_beside_the_reports(tmp_path):
    losses = [7, 6.95, 6.9, 3, 2]
    path = write(tmp_path / "log.jsonl", *logged(losses, lambda epoch: [64 - epoch] * 6))
    _, table, _ = plot_logs.report_tables(plot_logs.read_log(path, "log"))
    assert [[str(cell) for cell in row] for row in table.rows] == [
        ["uniform compression", "1", "1", "+0"], ["differentiation", plot_logs.DASH, "8", plot_logs.DASH],
        ["collapse", "4", "23", "-19"]]


def test_seeds_of_one_configuration_are_one_row_and_one_curve(tmp_path, capsys):
    logs = [write(tmp_path / f"v10_s{seed}.jsonl", *logged([6, loss], seed=seed, lr=0.1, log_file=f"v10_s{seed}"))
            for seed, loss in enumerate((5.5, 5.0, 4.5))]
    other = write(tmp_path / "other.jsonl", *logged([6, 5], seed=0, lr=0.2))
    plot(*logs, other)
    row = cells(capsys.readouterr().out.split("# Comparison")[1], "v10")
    assert (row[1], row[5], row[6]) == ("3", "5.000 (4.500 to 5.500)", "2")
    groups = plot_logs.grouped(plot_logs.read_logs([*logs, other])[0])
    assert [(group.name, len(group.runs)) for group in groups] == [("v10", 3), ("other", 1)]
    figure = plot_logs.losses_figure(groups)
    assert [list(line.get_ydata()) for line in figure.axes[0].lines if "v10" in str(line.get_label())] == [[6, 5]]
    band = figure.axes[0].collections[0].get_paths()[0].vertices
    assert (band[:, 1].min(), band[:, 1].max()) == (4.5, 6)
    plot_logs.plt.close(figure)


def test_ranks_from_the_logs_of_one_configuration_are_one_and_from_others_another(tmp_path):
    logs = [write(tmp_path / f"fresh_s{i}.jsonl", *logged([6, 5], seed=i, ranks_from=name))
            for i, name in enumerate(("small_s0.jsonl", "small_s1.jsonl", "large_s2.jsonl"))]
    assert [len(group.runs) for group in plot_logs.grouped(plot_logs.read_logs(logs)[0])] == [2, 1]


def test_a_log_from_a_pipe_is_read_once(dense):
    end, start = os.pipe()
    os.write(start, dense.read_bytes())
    os.close(start)
    (run,), _ = plot_logs.read_logs([Path(f"/dev/fd/{end}")])
    os.close(end)
    assert [epoch["val_loss"] for epoch in run.epochs] == [3, 2]


@pytest.mark.parametrize(("schedule", "groups"), [("constant", 1), ("cosine", 2)])
def test_a_cosine_of_another_length_is_another_configuration(tmp_path, schedule, groups):
    logs = [write(tmp_path / f"v10_s{seed}.jsonl", *logged([6, 5], seed=seed, lr_schedule=schedule, epochs=2 + seed))
            for seed in range(2)]
    assert len(plot_logs.grouped(plot_logs.read_logs(logs)[0])) == groups
    resumed = [{"kind": "resume", "epoch": 2, "epochs": 2}, {"kind": "end"}]
    write(logs[1], *map(json.loads, logs[1].read_text().splitlines()), *resumed)
    assert len(plot_logs.grouped(plot_logs.read_logs(logs)[0])) == 1


def test_logs_without_a_run_record_are_not_taken_for_seeds(report, tmp_path):
    shutil.copy(report, tmp_path / "report_s1.jsonl")
    assert len(plot_logs.grouped(plot_logs.read_logs([report, tmp_path / "report_s1.jsonl"])[0])) == 2


@pytest.mark.parametrize(("x", "places"), [("epoch", [1, 2]), ("tokens", [100, 200]), ("time", [1, 2]),
                                           ("parameters", [2.9, 2.8])])
def test_losses_can_be_drawn_over_epochs_tokens_time_and_parameters(tmp_path, x, places):
    plot_logs.start_matplotlib()
    log = write(tmp_path / "log.jsonl", *logged([6, 5]))
    figure = plot_logs.losses_figure(plot_logs.grouped(plot_logs.read_logs([log])[0]), x)
    assert list(figure.axes[0].lines[0].get_xdata()) == places
    assert figure.axes[0].get_xlabel() == plot_logs.AXES[x][0]
    plot_logs.plt.close(figure)


def test_an_axis_that_a_log_does_not_say_is_an_error(report, capsys):
    plot(report, "--x", "tokens", code=2)
    assert capsys.readouterr().err == ("plot_logs.py: error: report: its log does not say the training tokens, which "
                                       "--x tokens asks for\n")


def test_csv_has_plain_numbers_and_ranges_in_columns_of_their_own(tmp_path):
    logs = [write(tmp_path / f"v10_s{seed}.jsonl", *logged([6, loss], seed=seed))
            for seed, loss in ((0, 5.5), (1, 4.5))]
    plot(*logs, "--out", tmp_path / "out")
    with open(tmp_path / "out" / "comparison.csv", newline="") as file:
        row, = csv.DictReader(file)
    assert [float(row[f"best val loss{which}"]) for which in ("", ", lowest", ", highest")] == [5, 4.5, 5.5]
    assert (row["run"], row["n"], float(row["parameters"]), row["floor"]) == ("v10", "2", 2_800_000, "")


def test_tex_is_a_booktabs_table_with_its_signs_escaped():
    cell = plot_logs.Cell
    table = plot_logs.Table("t", "50% of a_b", ["R & D", "FFN \N{UPWARDS ARROW}"], [
        ["a_1", cell(None)], ["b", cell([1.0, 2.0], ".1f", "%")]])
    assert table.latex().splitlines() == [
        r"\begin{table}", r"\centering", r"\caption{50\% of a\_b}", r"\begin{tabular}{lr}", r"\toprule",
        r"R \& D & FFN $\uparrow$ \\", r"\midrule", r"a\_1 & -- \\", r"b & 1.5\% (1.0 to 2.0) \\",
        r"\bottomrule", r"\end{tabular}", r"\end{table}"]


def test_the_real_command_does_not_import_torch(run, tmp_path):
    log = run()
    program = ("import runpy, sys; sys.argv = ['plot_logs.py', sys.argv[1]]\n"
               "from matplotlib.figure import Figure\n"
               "Figure.savefig = lambda self, path, **_: open(path, 'wb').close()\n"
               "try: runpy.run_path('plot_logs.py', run_name='__main__')\n"
               "finally: print('torch' in sys.modules)")
    done = subprocess.run([sys.executable, "-c", program, log], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.endswith("False\n")


# ---- Names, seeds, screens, many logs --------------------------------------------------------------------------------

def images(folder):
    return sorted(path.name for path in folder.glob("*.png"))


def test_any_two_logs_have_files_of_their_own_also_where_capitals_do_not_count(tmp_path):
    names = ["v10", "v10_final", "V10", "v10_ranks", "v10_2"]
    plot(*(write(tmp_path / f"{name}.jsonl", *logged([3, 2])) for name in names))
    made = images(tmp_path / "figures")
    assert len(made) == len({name.casefold() for name in made}) == 1 + 3 * len(names)


def test_a_log_and_its_copy_are_not_two_seeds(tmp_path, capsys):
    one = write(tmp_path / "v10.jsonl", *logged([3, 2], seed=0))
    copy = write(tmp_path / "v10_copy.jsonl", *logged([3, 2], seed=0))
    other = write(tmp_path / "v10_s1.jsonl", *logged([3, 2.5], seed=1))
    plot(one, copy, other)
    said = capsys.readouterr().out
    assert cells(said.split("# Comparison")[1], "v10")[1] == "2"
    assert cells(said.split("# Comparison")[1], "v10_copy")[1] == "1"
    assert "The run v10_copy is not averaged with runs of the same settings: it has the seed 0 of v10." in said


def test_a_name_that_looks_like_a_heading_is_none(tmp_path, capsys):
    plot(*(write(tmp_path / f"{name}.jsonl", *logged([3, 2], seed=0)) for name in ("v10", "# copy")))
    assert "The run # copy is not averaged with" in capsys.readouterr().out


def test_seeds_are_named_by_what_their_names_share_without_a_digit_of_the_seed(tmp_path, capsys):
    plot(*(write(tmp_path / f"v10_s{seed}.jsonl", *logged([3, 2], seed=seed)) for seed in (10, 11)))
    assert cells(capsys.readouterr().out.split("# Comparison")[1], "v10")[1] == "2"


@pytest.mark.parametrize("other", [{"vocab_size": 60}, {"val_tokens": 90}, {"data_sha256": "b"}])
def test_losses_on_other_tokens_of_one_file_are_not_compared(tmp_path, capsys, other):
    common = {"data_sha256": "a", "vocab_size": 50, "val_tokens": 80}
    logs = [write(tmp_path / f"{name}.jsonl", *logged([3, 2], name=name, **common | of_one))
            for name, of_one in (("one", {}), ("two", other))]
    plot(*logs)
    assert "losses cannot be compared" in capsys.readouterr().out
    assert plot_logs.losses_title(plot_logs.grouped(plot_logs.read_logs(logs)[0])) == "Losses"


def test_runs_of_different_lengths_are_not_averaged(tmp_path, capsys):
    for seed, losses in enumerate(([3, 2, 1], [3, 2], [3, 2, 1.5])):
        write(tmp_path / f"v10_s{seed}.jsonl", *logged(losses, seed=seed))
    plot(*(tmp_path / f"v10_s{seed}.jsonl" for seed in range(3)))
    said = capsys.readouterr().out.split("# Comparison")[1]
    assert cells(said, "v10")[1:3] == ["2", "causal"]
    assert cells(said, "v10_s1")[1] == "1"
    assert "v10_s1 is not averaged with runs of the same settings: it has 2 epochs, others of its settings 3." in said


@pytest.mark.parametrize("name", ["_baseline", "a|b", "50%_&_#1", "^~{}\\", "x" * 150, "cost$5_vs_$6", "名字",
                                  "\udcff"])
def test_a_name_is_plain_text_wherever_it_appears(tmp_path, name):
    log = write(tmp_path / f"{name}.jsonl", *logged([3, 2]))
    plot(log, write(tmp_path / "other.jsonl", *logged([3, 1])), "--report", "--out", tmp_path / "out")
    text = (tmp_path / "out" / "tables.md").read_text()
    shown = plot_logs.plain(name)
    assert f"# {shown}\n" in text
    rows = [line for line in text.split("# Comparison")[1].splitlines() if line.startswith("|")]
    assert len({len(row.replace(r"\|", "").split("|")) for row in rows}) == 1
    tex = (tmp_path / "out" / "comparison.tex").read_text()
    row = next(line for line in tex.splitlines() if line.endswith(r"\\") and "other" not in line and "run" not in line)
    assert "".join(plot_logs.TEX.get(letter, letter) for letter in shown) == row.split(" & ")[0]
    figure = plot_logs.losses_figure(plot_logs.grouped(plot_logs.read_logs([log, tmp_path / "other.jsonl"])[0]))
    figure.canvas.draw()  # mathematics in a name would raise here
    labels = [text.get_text().strip().replace(r"\$", "$") for text in figure.axes[0].texts]
    assert shown in labels or len(shown) > 48 or name in ("名字", "\udcff")
    assert max(map(len, labels)) < 70
    plot_logs.plt.close(figure)


def test_names_that_are_hard_to_paint_are_painted(tmp_path, painted):
    plot(write(tmp_path / "cost$5_vs_$6 名字 \udcff.jsonl", *logged([3, 2])), "--out", tmp_path / "out")
    assert len(images(tmp_path / "out")) == 1 + 3
    assert all((tmp_path / "out" / name).stat().st_size > 10_000 for name in images(tmp_path / "out"))


@pytest.mark.parametrize("settings", [
    {"MPLBACKEND": "module://matplotlib_inline.backend_inline", "PYTHONIOENCODING": "latin-1", "MATPLOTLIBRC": "."},
    {"MPLBACKEND": "nonsense"}])
def test_the_users_display_settings_do_not_count(dense, tmp_path, painted, settings):
    (tmp_path / "matplotlibrc").write_text("text.usetex: True\nfigure.max_open_warning: 1\nsavefig.dpi: 10\n")
    done = subprocess.run([sys.executable, ROOT / "plot_logs.py", dense, "--out", tmp_path / "there"], cwd=tmp_path,
                          capture_output=True, check=False, env=os.environ | settings)
    assert (done.returncode, done.stderr) == (0, b"")
    plot(dense, "--out", tmp_path / "here")
    assert (tmp_path / "there" / "losses.png").read_bytes() == (tmp_path / "here" / "losses.png").read_bytes()


@pytest.mark.parametrize("screen", ["| head -1", "> /dev/full", ">&-"])
def test_files_come_before_the_screen_and_do_not_need_it(dense, tmp_path, screen):
    command = shlex.join([sys.executable, str(ROOT / "plot_logs.py"), str(dense), "--out", "there"])
    done = subprocess.run(["bash", "-o", "pipefail", "-c", f"{command} {screen}"], cwd=tmp_path, capture_output=True,
                          text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert images(tmp_path / "there") == ["losses.png"]
    assert (tmp_path / "there" / "index.html").stat().st_size > 10_000


def test_logs_that_cannot_be_read_are_named_and_left_out(report, tmp_path, capsys):
    (tmp_path / "begun.jsonl").write_text('{"kind": "run"}\n')
    (tmp_path / "foreign.jsonl").write_text("hello\n")
    plot(tmp_path / "begun.jsonl", report, tmp_path / "foreign.jsonl", "--out", tmp_path / "out")
    warnings = capsys.readouterr().err.splitlines()
    assert [line.split(": ")[1:3] for line in warnings] == [
        ["warning", str(tmp_path / "begun.jsonl")], ["warning", f"{tmp_path / 'foreign.jsonl'}:1"]]
    plot(tmp_path / "begun.jsonl", tmp_path / "foreign.jsonl", code=2)
    assert capsys.readouterr().err.count("\n") == 1


def test_make_plots_takes_names_with_spaces(dense, tmp_path):
    (tmp_path / "logs").mkdir()
    shutil.copy(dense, tmp_path / "logs" / "my run.jsonl")
    shutil.copy(ROOT / "plot_logs.py", tmp_path)
    command = ["make", "-f", ROOT / "Makefile", "plots", "VENV=", f"PYTHON={sys.executable}", "ARGS="]
    done = subprocess.run(command, cwd=tmp_path, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "logs" / "figures" / "my run_training.csv").exists()


@pytest.mark.parametrize(("runs", "title"), [
    ({"a": (5.0, {})}, "Lowest validation loss: a, 5.000"),
    ({"a": (5.0, {}), "b": (4.0, {"lr": 1})}, "Lowest validation loss: b, 4.000"),
    ({"a": (5.0, {}), "leak": (1.0, {"attention": "bidirectional"})},
     "Lowest validation loss of those with a mask: a, 5.000"),
    ({"a": (5.0, {"entropy_floor": 4.5}), "leak": (1.0, {"attention": "bidirectional", "entropy_floor": 4.5})},
     "Only a model that sees its targets falls below the entropy of the text"),
    ({"a": (4.0, {"entropy_floor": 4.5})}, "Losses"),  # there is something wrong with it
    ({"a": (5.0, {}), "b": (4.0, {"data_sha256": "other"})}, "Losses"),
    ({"leak": (1.0, {"attention": "bidirectional"})}, "Losses")])
def test_the_title_of_the_losses_says_no_more_than_they_do(tmp_path, runs, title):
    plot_logs.start_matplotlib()
    logs = [write(tmp_path / f"{name}.jsonl", *logged([6, loss], **settings))
            for name, (loss, settings) in runs.items()]
    assert plot_logs.losses_title(plot_logs.grouped(plot_logs.read_logs(logs)[0])) == title


def test_labels_at_the_ends_of_lines_do_not_overlap():
    plot_logs.start_matplotlib()
    figure, axes = plot_logs.plt.subplots()
    axes.set_ylim(0, 10)
    plot_logs.label_ends(axes, [(y, f"{y}", "black") for y in (5, 5.01, 5.02, 9)])
    figure.canvas.draw()
    boxes = sorted((text.get_window_extent() for text in axes.texts), key=lambda box: box.y0)
    assert [text.get_text() for text in axes.texts] == ["5", "5.01", "5.02", "9"]
    assert all(low.y1 <= high.y0 + 1 for low, high in zip(boxes, boxes[1:], strict=False))
    middle = axes.transData.transform((0, 5.01))[1]
    assert abs((boxes[1].y0 + boxes[1].y1) / 2 - middle) < 2, "the middle one stays beside its line"
    plot_logs.plt.close(figure)


@pytest.mark.parametrize(("parameters", "increase"), [(4e5, 0.1), (3e6, 0.05), (2e9, 3.0)])
def test_both_axes_of_a_comparison_of_cuts_have_ticks(parameters, increase):
    plot_logs.start_matplotlib()
    cuts = {"fisher, global": {"increase": increase, "parameters": parameters / 2}}
    figure = plot_logs.perplexity_figure({"checkpoint": "v7.pt", "loss_before": 6.7, "before": {"all": parameters},
                                          "rows": [{"keep": 0.5, "cuts": cuts}]})
    figure.canvas.draw()
    assert all(len(axis.get_ticklocs()) >= 2 for axis in (figure.axes[0].xaxis, figure.axes[0].yaxis))
    plot_logs.plt.close(figure)


def test_thirty_logs_have_thirty_colours_and_a_legend_beside_the_curves(tmp_path, recwarn):
    without = {"ranks": lambda epoch: [], "initial_ranks": []}  # leaves 22 figures, a warning comes at 21
    logs = [write(tmp_path / f"{'long ' * 18}{i}.jsonl", *logged([3, 2 + i / 30], lr=i, **without if i > 6 else {}))
            for i in range(30)]
    plot_logs.start_matplotlib()
    figure = plot_logs.losses_figure(plot_logs.grouped(plot_logs.read_logs(logs)[0]))
    figure.canvas.draw()
    axes = figure.axes[0]
    assert len({tuple(map(float, line.get_color())) for line in axes.lines if line.get_marker() == "o"}) == 30
    box, legend = axes.get_window_extent(), axes.get_legend().get_window_extent()
    assert legend.x0 > box.x1
    assert box.width > 0.5 * figure.bbox.width
    assert legend.height < figure.bbox.height
    plot_logs.plt.close(figure)
    plot(*logs, "--out", tmp_path / "out")
    assert not recwarn.list


def test_the_minutes_of_a_long_log_are_added_up_in_time(tmp_path):
    run = plot_logs.Run("run", epochs=[{"epoch": i, "time_sec": 60} for i in range(1, 50_001)])
    began = time.perf_counter()
    assert plot_logs.minutes(run)[-1] == 50_000
    assert time.perf_counter() - began < 5


def test_updates_inside_epochs_are_plotted(run):
    plot_logs.start_matplotlib()
    ((read,), _) = plot_logs.read_logs([run("--rank-interval", 2)])
    epochs, ranks = plot_logs.history(read)
    assert epochs == [0, 0.4, 0.8, 1, 1.2, 1.6, 2, 2.4, 2.8, 3, 3.2, 3.6, 4]
    assert ranks.shape == (13, 12)
    assert ranks[1].tolist() == read.updates[0]["ranks"]
    for figure in (plot_logs.heatmap_figure(read), plot_logs.ranks_figure(read)):
        figure.canvas.draw()
        plot_logs.plt.close(figure)


def test_tensorboard_reads_what_the_logs_say(report, tmp_path, capsys):
    event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    plot(report, "--tensorboard", tmp_path / "board")
    events = event_accumulator.EventAccumulator(str(tmp_path / "board" / "report")).Reload()
    for tag, column in (("loss/train_loss", 1), ("loss/val_loss", 2), ("rank/rank_avg", 5)):
        assert [e.step for e in events.Scalars(tag)] == [row[0] for row in TABLE_1]
        assert [e.value for e in events.Scalars(tag)] == pytest.approx([row[column] for row in TABLE_1])
    plot(report, "--tensorboard", tmp_path / "board", code=2)
    assert "has event files already" in capsys.readouterr().err


# ---- v11's logs ------------------------------------------------------------------------------------------------------

def v11_epoch(number, **fields):
    return {"kind": "epoch", "epoch": number, "train_loss": 5.0, "val_loss": 5.0, "ranks": [4, 6], "lr": 0.1,
            "rank_avg": 5.0, "update_norms": [0.01, 0.03], "weight_norms": [1.0, 2.0], "output_changes": [0.1, 0.2],
            **fields}


def test_cuts_have_a_table_and_those_that_a_resume_repeats_appear_once(tmp_path, capsys, painted):
    def cut(step, before, after):
        return {"kind": "cut", "step": step, "val_loss_before": before, "val_loss": after, "ranks": [4, 6]}
    log = write(tmp_path / "v11.jsonl", {"kind": "run", "attention": "causal", "initial_ranks": [8, 8]},
                cut(10, 5.25, 5.26), v11_epoch(1), cut(30, 5.1, 5.101), {"kind": "resume", "epoch": 1, "step": 20},
                cut(30, 5.1, 5.102), v11_epoch(2))
    assert plot_logs.main([str(log)]) == 0
    page = " ".join(capsys.readouterr().out.split())
    assert "| 10 | 4 | 6 | 5.0 | 5.250 | 5.260 | +0.0100 |" in page
    assert "| 30 | 4 | 6 | 5.0 | 5.100 | 5.102 | +0.0020 |" in page
    assert "+0.0010" not in page


def test_telemetry_is_the_median_layer_without_the_end_of_a_cosine(tmp_path):
    log = write(tmp_path / "v11.jsonl", {"kind": "run", "attention": "causal", "optimizer": "spectron"},
                v11_epoch(1), v11_epoch(2, update_norms=[0.02, 0.06]), v11_epoch(3, lr=0.0009))
    assert plot_logs.main([str(log)]) == 0
    assert (tmp_path / "figures" / "telemetry.png").exists()
    run = plot_logs.read_log(log, "v11")
    assert plot_logs.telemetry(run, "update_norms") == {1: pytest.approx(0.02), 2: pytest.approx(0.04)}
    assert run.family == "controlled"


@pytest.mark.parametrize("telling", [0, 1])
def test_telemetry_of_some_seeds_is_drawn(tmp_path, telling):
    logs = [write(tmp_path / f"v11_s{seed}.jsonl", {"kind": "run", "attention": "causal", "seed": seed},
                  v11_epoch(1, **{} if seed == telling else dict.fromkeys(plot_logs.TELEMETRY))) for seed in (0, 1)]
    runs, _ = plot_logs.read_logs(logs)
    figure = dict(plot_logs.figures(runs, [], "epoch", False))["telemetry"]
    assert [len(axes.lines) for axes in figure.axes] == [1, 1, 1]
