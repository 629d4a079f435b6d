from ltx_titan.metrics import StepMetrics
from ltx_titan.metrics.console import Console, duration, format_line, header

KNOWN = StepMetrics(120, 0.51234, 0.4, 0.11234, 1.5, 2e-5, 1.234, 12345.6, 410.25, 0.4148, 71.5, {"data/epochs": 2.5})


def test_columns_stay_under_their_names_whatever_is_known():
    empty = StepMetrics(1)
    lines = [format_line(KNOWN, 10_000, duration(3725)), format_line(empty, 10_000, duration(None))]
    assert {len(line) for line in lines} == {len(header())}
    expected = "120/10000 2.5 0.5123 0.4000 0.1123 1.5000 2.00e-05 1.234 12,346 410.2 41.5% 71.50 1:02:05"
    assert lines[0].split() == expected.split()
    assert lines[1].split() == ["1/10000", *["-"] * 12]


def test_plain_lines_where_the_console_is_no_terminal(capsys):
    console = Console(10)
    for step in range(1, 43):
        console.step(StepMetrics(step, loss=1.0))
    console.close()
    lines = capsys.readouterr().out.splitlines()
    assert [index for index, line in enumerate(lines) if line == header()] == [0, 41]
    assert len(lines) == 44


def test_progress_bar_on_a_terminal_keeps_the_lines(capsys, monkeypatch):
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    console = Console(10, 4)
    console.step(StepMetrics(5, loss=1.25))
    console.close()
    assert "5/10      -   1.2500" in capsys.readouterr().out
