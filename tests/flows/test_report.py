"""The pictures and the page of the demonstration say what was measured, and against which limit."""

import pytest

pytest.importorskip("matplotlib", reason="matplotlib is missing: pip install portlm[report]")

from matplotlib.figure import Figure

from portlm.flows.report import engine_bars, write_html

RATES = {"prefill_tok_s": 18_533.0, "prefill_interval": (17_000.0, 21_000.0),
         "decode_tok_s": 1161.0, "decode_interval": (600.0, 1400.0)}  # fmt: skip
SLOW = {
    name: tuple(v / 40 for v in rate) if isinstance(rate, tuple) else rate / 40
    for name, rate in RATES.items()
}
ROWS = [{"engine": "torch", "device": "cpu", "profile": "native"} | RATES,
        {"engine": "ort", "device": "vulkan", "profile": "portable"} | SLOW]  # fmt: skip
LIMITS = {"prefill_tok_s": 52_000.0, "decode_tok_s": 1290.0}


@pytest.fixture
def drawn(monkeypatch):
    """The figures that were drawn, in order."""
    figures, save = [], Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *a, **k: (figures.append(self), save(self, *a, **k)))
    return figures


def test_bars_begin_at_zero_with_the_limit_and_intervals_beside_them(drawn):
    svg = engine_bars(ROWS, LIMITS)
    assert svg.startswith("<svg")
    for axes, kind in zip(drawn[0].axes, ("decode", "prefill"), strict=True):
        rate, interval, limit = f"{kind}_tok_s", f"{kind}_interval", LIMITS[f"{kind}_tok_s"]
        assert axes.get_xscale() == "linear"
        assert axes.get_xlim()[0] == 0
        assert axes.get_xlim()[1] > max(limit, ROWS[0][interval][1])
        assert [(bar.get_x(), bar.get_width()) for bar in axes.patches] == [(0, row[rate]) for row in ROWS]
        (dashed,) = (line for line in axes.lines if line.get_linestyle() == "--")
        assert set(dashed.get_xdata()) == {limit}
        assert f"{limit:,.0f}" in axes.get_xlabel()
        (whiskers,) = axes.collections
        ends = [tuple(segment[:, 0]) for segment in whiskers.get_segments()]
        assert ends == [pytest.approx(row[interval]) for row in ROWS]


def test_bars_are_drawn_without_a_limit_and_without_rows(drawn):
    for rows in (ROWS, []):
        engine_bars(rows, {"prefill_tok_s": None, "decode_tok_s": None})
        assert not any(line.get_linestyle() == "--" for axes in drawn[-1].axes for line in axes.lines)


def test_the_page_loads_nothing_and_shows_errors_beside_the_scale_of_logits(tmp_path):
    measured = {"precision": "fp32", "max_logit_error": 7.6e-6, "logit_scale": 19.25, "greedy_match": 128,
                "greedy_total": 128, "fallback_nodes": 0, "load_s": 0.5}  # fmt: skip
    metrics = [{"kind": "train", "step": 1, "loss": 5.0}, {"kind": "eval", "step": 1, "loss": 5.1}]
    write_html(
        tmp_path / "report.html", title="A title", summary="", training=[], metrics=metrics, prompt="while",
        sample="while True", sample_rule="", engines=[row | measured for row in ROWS], limits=LIMITS,
        missing=["tvm:cpu: is not installed"], environment=[],
    )  # fmt: skip
    page = (tmp_path / "report.html").read_text()
    assert page.count("<svg") == 2
    assert "7.6e-06" in page
    assert "19.2" in page
    assert "18,533" in page
    assert "prompt <code>while</code>" in page
    assert "Bars begin at zero" in page
    assert "tvm:cpu: is not installed" in page
    assert 'src="http' not in page
    assert "<script" not in page
