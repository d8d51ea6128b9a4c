"""The metrics file: whole lines only, whatever the process died of."""

import errno
import json
import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from portlm.errors import FormatError, StorageError
from portlm.train.metrics import MetricsLog, comparable, read_metrics


def write_steps(path, steps, resume_step=None):
    with MetricsLog(path, resume_step) as log:
        for step in steps:
            log.write("train", step, loss=1.0 / (step + 1), seconds=float(step))


def test_records_read_back_as_written(tmp_path):
    path = tmp_path / "metrics.jsonl"
    with MetricsLog(path) as log:
        log.write("train", 1, loss=2.5)
        log.write("sample", 1, text='a "quoted"\nline \u2028 and ü')
        log.sync()
    assert read_metrics(path) == [
        {"kind": "train", "step": 1, "loss": 2.5},
        {"kind": "sample", "step": 1, "text": 'a "quoted"\nline \u2028 and ü'},
    ]
    assert len(path.read_bytes().splitlines()) == 2


def test_resuming_drops_the_lines_after_the_step(tmp_path):
    path = tmp_path / "metrics.jsonl"
    write_steps(path, range(10))
    write_steps(path, [5, 6], resume_step=4)
    assert [record["step"] for record in read_metrics(path)] == [0, 1, 2, 3, 4, 5, 6]


def test_a_file_cut_anywhere_resumes_to_whole_lines(tmp_path):
    path = tmp_path / "metrics.jsonl"
    write_steps(path, range(3))
    whole = path.read_bytes()
    for size in range(len(whole) + 1):
        path.write_bytes(whole[:size])
        assert len(read_metrics(path)) == whole[:size].count(b"\n")
        write_steps(path, [2], resume_step=1)
        kept = min(whole[:size].count(b"\n"), 2)
        assert [record["step"] for record in read_metrics(path)] == [*range(kept), 2]


def test_an_unreadable_line_is_named_when_reading_and_dropped_when_resuming(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"kind": "train", "step": 1}\nrubbish\n[]\n{"kind": "train", "step": 2}\n')
    with pytest.raises(FormatError, match="line 2"):
        read_metrics(path)
    write_steps(path, [3], resume_step=2)
    assert [record["step"] for record in read_metrics(path)] == [1, 2, 3]


@given(st.binary(max_size=200))
def test_any_bytes_resume(tmp_path_factory, data):
    path = tmp_path_factory.getbasetemp() / "any.jsonl"
    path.write_bytes(data)
    write_steps(path, [7], resume_step=6)
    assert read_metrics(path)[-1]["step"] == 7


def test_a_missing_file_is_an_error_to_read_and_none_to_resume(tmp_path):
    path = tmp_path / "metrics.jsonl"
    with pytest.raises(FormatError, match=r"metrics\.jsonl"):
        read_metrics(path)
    write_steps(path, [1], resume_step=0)
    assert len(read_metrics(path)) == 1


def test_resuming_keeps_the_mode_of_the_file(tmp_path):
    path = tmp_path / "metrics.jsonl"
    write_steps(path, range(3))
    path.chmod(0o640)
    write_steps(path, [1], resume_step=0)
    assert path.stat().st_mode & 0o777 == 0o640


def test_a_line_that_does_not_fit_on_the_disk_leaves_whole_lines(tmp_path, monkeypatch):
    path = tmp_path / "metrics.jsonl"
    with MetricsLog(path) as log:
        log.write("train", 1, loss=1.0)
        write = os.write

        def short_write(descriptor, data):
            write(descriptor, data[:10])
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        monkeypatch.setattr(os, "write", short_write)
        with pytest.raises(StorageError, match="No space left"):
            log.write("train", 2, loss=1.0)
        monkeypatch.undo()
        log.write("train", 3, loss=1.0)
    assert [json.loads(line)["step"] for line in path.read_bytes().splitlines()] == [1, 3]


def test_values_that_json_cannot_hold_are_refused(tmp_path):
    with MetricsLog(tmp_path / "metrics.jsonl") as log, pytest.raises(ValueError, match="JSON"):
        log.write("train", 1, loss=float("nan"))


def test_comparable_forgets_clocks_and_processes():
    records = [
        {"kind": "run", "step": 0, "host": "a"},
        {"kind": "train", "step": 1, "loss": 1.0, "seconds": 3.0, "tokens_per_second": 9.0},
        {"kind": "resume", "step": 1},
    ]
    assert comparable(records) == [{"kind": "train", "step": 1, "loss": 1.0}]


def test_the_loss_curve_is_drawn_as_svg_and_png(tmp_path):
    pytest.importorskip("matplotlib")
    from portlm.train.plot import plot_loss

    path = tmp_path / "metrics.jsonl"
    with MetricsLog(path):
        pass
    assert plot_loss(tmp_path) == []
    with MetricsLog(path) as log:
        for step in range(5):
            log.write("train", step, loss=5.0 - step)
        log.write("eval", 4, loss=1.5)
    svg, png = plot_loss(tmp_path)
    assert svg.read_bytes().startswith(b"<?xml")
    assert png.read_bytes().startswith(b"\x89PNG")
    again = svg.read_bytes()
    plot_loss(tmp_path)
    assert svg.read_bytes() == again
