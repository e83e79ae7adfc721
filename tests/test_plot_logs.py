"""Tables, figures and errors of plot_logs.py."""
import json
import subprocess
import sys

import matplotlib
import pytest

import plot_logs
import v7_transformer_dense_baseline as v7
from conftest import ROOT, write_sidecar

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
def report(tmp_path):
    return write(tmp_path / "report.jsonl", *(report_record(*row) for row in TABLE_1))


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
    for row in ("0 10 10 18 24 10/10", "1 10 10 22 23 24/22", "2 17 14 15 20 17/27", "3 10 13 11 25 18/32",
                "4 11 10 10 22 13/27", "5 9 10 11 23 14/26", "Mean 11.2 11.2 14.5 22.8 16.0/24.0"):
        assert [cell.replace(" ", "") for cell in cells(second, row.split()[0])] == row.split()
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


def test_our_own_logs_give_tables_figures_and_a_comparison(run, tmp_path, capsys):
    logs = [run(name="v10"), run("--attention", "bidirectional", name="open"), run(name="v7", main=v7.main, ranks=[])]
    capsys.readouterr()
    plot(*logs, "--out", tmp_path / "out")
    said = capsys.readouterr().out
    made = {path.name for path in (tmp_path / "out").iterdir()}
    assert made == {"tables.md", "losses.png", *(f"{name}_{kind}.png" for name in ("v10", "open")
                                                 for kind in ("ranks", "heatmap", "final_ranks"))}
    assert all((tmp_path / "out" / name).read_bytes()[:4] == b"\x89PNG" for name in made - {"tables.md"})
    comparison = said.split("# Comparison")[1]
    assert [cells(comparison, name)[1] for name in ("v10", "open", "v7")] == [
        "causal", "none: SEES ITS TARGETS", "causal"]
    last = json.loads(logs[0].read_text().splitlines()[-2])
    assert cells(comparison, "v10")[2:4] == [f"{last['rank_avg']:.1f}", f"{last['params_millions'] * 1e6:,.0f}"]
    of_v7 = said.split("Cost, v7")[1]
    assert cells(said, "dense model in all")[1:] == cells(of_v7, "parameters in all")[1:]
    assert cells(of_v7, "dense model in all")[1:] == cells(of_v7, "parameters in all")[1:]
    assert "cannot be compared" not in comparison
    assert said.count("SEES ITS TARGETS") == 1 + 3 + 1  # its heading, its three tables, its row of the comparison


def test_every_figure_of_a_bidirectional_run_is_marked(run):
    plot_logs.np, plot_logs.plt = pytest.importorskip("numpy"), pytest.importorskip("matplotlib.pyplot")
    matplotlib.use("Agg")
    runs = plot_logs.read_logs([run("--attention", "bidirectional", name="open"), run(name="v10")], 64)
    for name, figure in plot_logs.figures(runs).items():
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


def test_the_entropy_floor_is_drawn_and_listed(run, text, capsys):
    write_sidecar(text)
    logs = [run(name="a"), run(name="b")]
    capsys.readouterr()
    plot(*logs)
    assert cells(capsys.readouterr().out.split("# Comparison")[1], "a")[8] == "3.125"
    figure = plot_logs.losses_figure(plot_logs.read_logs(logs, 64))
    assert any("3.125" in text.get_text() for text in figure.findobj(matplotlib.text.Text))
    plot_logs.plt.close(figure)


def test_a_resumed_log_counts_each_epoch_once(tmp_path):
    one = [report_record(epoch, 2, epoch, 8, 9, 8.5) for epoch in (1, 2, 3)]
    again = [report_record(epoch, 2, 10 * epoch, 8, 9, 8.5) for epoch in (2, 3)]
    log = write(tmp_path / "log.jsonl", *one, {"kind": "resume", "epoch": 1, "epochs": 3}, *again)
    assert [epoch["val_loss"] for epoch in plot_logs.read_log(log, "log", 64).epochs] == [1, 20, 30]


def test_a_really_resumed_log_reads_like_the_straight_one(run):
    straight = run(name="straight")
    run("--epochs", 2, name="resumed")
    resumed = run("--resume", name="resumed")
    a, b = (plot_logs.read_log(log, "log", 64) for log in (straight, resumed))
    assert plot_logs.training_table(a) == plot_logs.training_table(b)


def test_a_torn_last_line_is_left_out_with_a_warning(report, capsys):
    report.write_text(report.read_text()[:-30])
    plot(report)
    captured = capsys.readouterr()
    assert "report.jsonl:7: the last line is cut off" in captured.err
    assert cells(captured.out, "25")[2] == "3.327"


@pytest.mark.parametrize(("line", "said"), [
    ('{"epoch": 2', "not a line of JSON"), ("[1, 2]", "a record is an object"), ("hello", "not a line of JSON"),
    ('{"epoch": 31, "train_loss": NaN, "val_loss": 1, "ranks": []}', "not a line of JSON"),
    ('{"epoch": 31, "val_loss": 1, "ranks": []}', "train_loss should be a number"),
    ('{"epoch": 31, "train_loss": "1", "val_loss": 1, "ranks": []}', 'train_loss should be a number, not "1"'),
    ('{"epoch": 31, "train_loss": 1, "val_loss": 1, "ranks": [1, 2]}', "six for each block"),
    ('{"epoch": 31, "train_loss": 1, "val_loss": 1, "ranks": [1, 2, 3, 4, 5, 6]}', "where the epoch before has 36"),
    ('{"epoch": 30, "train_loss": 1, "val_loss": 1, "ranks": []}', "where the epoch before"),
    ('{"epoch": true, "train_loss": 1, "val_loss": 1, "ranks": []}', "epoch should be a number"),
    ('{"kind": "other"}', "unknown kind"), ("\x00\x01", "not a line of JSON")])
def test_a_bad_line_is_an_error_with_file_and_line(report, capsys, line, said):
    report.write_text(report.read_text() + line + "\n" + report.read_text().splitlines()[-1] + "\n")
    plot(report, code=2)
    error = capsys.readouterr().err
    assert f"{report}:8: " in error
    assert said in error
    assert error.count("\n") == 1


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
    runs = plot_logs.read_logs([tmp_path / "a" / "log.jsonl", tmp_path / "b" / "log.jsonl"], 64)
    assert [run.name for run in runs] == ["a_log", "b_log"]


def test_the_real_command_does_not_import_torch(run, tmp_path):
    log = run()
    program = ("import runpy, sys; sys.argv = ['plot_logs.py', sys.argv[1]]\n"
               "try: runpy.run_path('plot_logs.py', run_name='__main__')\n"
               "finally: print('torch' in sys.modules)")
    done = subprocess.run([sys.executable, "-c", program, log], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.endswith("False\n")
