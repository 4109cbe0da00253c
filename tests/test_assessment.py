"""Which batches need normalization: two sets, and the same answer in a training step."""

import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from cbn_jax.assessment import Assessment, assess
from cbn_jax.figures import draw_assessment

SPREADS = [1.0, 3.0, 2.0, 10.0, 4.0]


def pair(spread):
    """A batch of two examples whose standard deviation is exactly this."""
    return jnp.full((2, 3), spread, jnp.float32) * jnp.array([[-1.0], [1.0]])


def batches():
    return (pair(spread) for spread in SPREADS)


def test_batches_are_taken_once_and_one_at_a_time(key):
    """From a generator, none kept; the last may be smaller."""
    made = []

    class Batch(np.ndarray):
        def __del__(self):
            made.append("gone")

    def generator():
        for n in (4, 4, 4, 2):
            made.append("made")
            yield np.ones((n, 3), np.float32).view(Batch)

    assert len(assess(generator()).values) == 4
    assert made.count("made") == 4
    # The one in use, and the one that is being made.
    alive = np.cumsum([1 if event == "made" else -1 for event in made])
    assert alive.max() <= 2


@pytest.mark.parametrize("measure", ["entries", "channels", "examples"])
def test_values_are_the_heterogeneity_of_each_batch(measure, key):
    images = [
        jax.random.normal(jax.random.fold_in(key, n), (n, 4, 4, 2)) for n in (6, 6, 3)
    ]
    assessment = assess(iter(images), measure)
    expected = [reference.heterogeneity(x, measure) for x in images]
    np.testing.assert_allclose(assessment.values, expected, rtol=1e-5)
    assert assessment.measure == measure
    gates = [bool(assessment.gate(x)) for x in images]
    np.testing.assert_array_equal(gates, assessment.selected)


@pytest.mark.parametrize(
    ("threshold", "expected", "above"),
    [
        ("mean", 4.0, [3]),
        ("median", 3.0, [3, 4]),
        (lambda h: np.quantile(h, 0.25), 2.0, [1, 3, 4]),
        (lambda h: h.min() / 2, 0.5, [0, 1, 2, 3, 4]),
        (lambda h: 0.1 * h[3], 1.0, [1, 2, 3, 4]),
    ],
)
def test_thresholds_part_the_batches(threshold, expected, above):
    """A batch right at the threshold is left; a step decides as the table does."""
    assessment = assess(batches(), threshold=threshold)
    np.testing.assert_array_equal(assessment.values, SPREADS)
    assert type(assessment.threshold) is float
    np.testing.assert_allclose(assessment.threshold, expected, rtol=1e-15)
    assert assessment.selected.dtype == bool
    np.testing.assert_array_equal(np.flatnonzero(assessment.selected), above)
    gate = jax.jit(assessment.gate)
    gates = [gate(x) for x in batches()]
    assert gates[0].shape == ()
    assert gates[0].dtype == bool
    np.testing.assert_array_equal(gates, assessment.selected)


def test_the_mean_is_the_default():
    assert assess(batches()).threshold == assess(batches(), threshold="mean").threshold


def test_a_step_measures_the_same_number(key):
    """The median is one of the batches."""
    images = [jax.random.normal(jax.random.fold_in(key, n), (5, 6, 3)) for n in range(21)]
    assessment = assess(images, threshold="median")
    gate = jax.jit(assessment.gate)
    np.testing.assert_array_equal([gate(x) for x in images], assessment.selected)


@pytest.mark.parametrize("value", [0.1, 0.3, 0.7])
def test_a_threshold_between_two_float32_numbers_divides_alike(value):
    """Batches at the float32 numbers around it: what the table says, a step does."""
    near = np.float32(value)
    spreads = [np.nextafter(near, np.float32(s)) for s in (0, 1)] + [near]
    made = [pair(spread) for spread in spreads]
    assessment = assess(made, threshold=lambda h: value)
    np.testing.assert_array_equal([assessment.gate(x) for x in made], assessment.selected)


def test_a_spread_batch_is_one_batch():
    assessment = assess(batches())
    mesh = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Auto,))

    def gate(x):
        return assessment.gate(x, axis_name="data")

    spread = jax.jit(jax.shard_map(gate, mesh=mesh, in_specs=P("data"), out_specs=P()))
    np.testing.assert_array_equal([spread(x) for x in batches()], assessment.selected)


def test_report_counts_both_sets():
    assert str(assess(batches(), "examples")) == (
        "5 batches, heterogeneity (examples): 1 to 10, median 3\n"
        "threshold 4: 1 to normalize, 4 to leave"
    )


def drawn(figure):
    """How many batches each set has in the histogram, and the place of the threshold."""
    (axes,) = figure.axes
    shown = [text.get_text() for text in axes.get_legend().get_texts()]
    assert set(shown) == {"to normalize", "to leave", "threshold"}
    counts = {
        bars[0].get_label(): int(sum(bar.get_height() for bar in bars))
        for bars in axes.containers
    }
    (line,) = axes.lines
    return counts, line.get_xdata()[0]


def test_draw_shows_both_sets(tmp_path):
    assessment = assess(batches(), threshold="median")
    for path in (tmp_path / "batches.png", str(tmp_path / "again.png"), None):
        counts, threshold = drawn(draw_assessment(assessment, path))
        assert counts == {"to normalize": 2, "to leave": 3}
        assert threshold == 3.0
    for path in tmp_path.iterdir():
        assert path.read_bytes().startswith(b"\x89PNG")
        assert path.stat().st_size > 5_000
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize("values", [[2.0], [2.0, 2.0, 2.0], [0.0, 0.0]])
def test_draw_shows_one_set_alone(values):
    """A single batch, or batches all alike."""
    assessment = Assessment(np.array(values), float(np.mean(values)), "entries")
    counts, _ = drawn(draw_assessment(assessment))
    assert counts == {"to normalize": 0, "to leave": len(values)}


def test_bad_batches():
    def images(*changed):
        return [np.ones((2, 3), np.float32), *changed]

    with pytest.raises(ValueError, match="assess got no batches, expected at least one"):
        assess([])
    for bad in ((images()[0], 1), [1.0, 2.0], {"image": images()[0]}):
        sentence = rf"a batch of type {type(bad).__name__}, .*assess\(images for images, _"
        with pytest.raises(TypeError, match=sentence):
            assess(images(bad))
    with pytest.raises(TypeError, match=r"dtype uint8, .*write x\.astype"):
        assess(images(np.ones((2, 3), np.uint8)))
    with pytest.raises(ValueError, match=r"shape \(3,\), .*an axis of examples"):
        assess(images(np.ones(3, np.float32)))


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_batch_that_is_not_finite_is_named(bad):
    damaged = pair(2.0).at[0, 1].set(bad)
    with pytest.raises(ValueError, match=r"NaN or inf in batch 2, expected .*; clean the"):
        assess([pair(1.0), pair(3.0), damaged, damaged])


def test_bad_options():
    with pytest.raises(
        ValueError, match="threshold is 'mode', expected 'mean' or 'median'"
    ):
        assess(batches(), threshold="mode")
    with pytest.raises(
        ValueError, match="measure is 'std', expected 'entries' or 'channel"
    ):
        assess(batches(), "std")


def test_without_matplotlib_there_is_a_sentence():
    """And nothing else needs it."""
    code = (
        "import sys; sys.modules['matplotlib'] = None; import numpy as np;"
        "from cbn_jax.assessment import Assessment;"
        "from cbn_jax.figures import draw_assessment;"
        "made = Assessment(np.ones(3), 1.0, 'entries'); print(made); draw_assessment(made)"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.returncode != 0
    assert run.stdout.startswith("3 batches")
    assert "draw_assessment needs matplotlib; install it with: pip install" in run.stderr
