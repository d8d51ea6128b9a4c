"""What the torch engine foresees of shapes, before it computes anything, is what portlm's operators then give."""

import pytest

torch = pytest.importorskip("torch", reason="torch is missing: pip install portlm[train]")

from portlm.runtimes.torch_operators import Call, operators  # noqa: E402


@pytest.mark.parametrize(
    ("name", "attributes", "shapes"),
    [
        ("Linear", {"transposed": 0}, [(2, 3, 4), (6, 4), (6,)]),
        ("Linear", {"transposed": 1}, [(2, 3, 4), (6, 4), (6,)]),
        ("GeluMlp", {"approximate": "none"}, [(2, 3, 4), (10, 4), (10,), (6, 10), (6,)]),
    ],
)
def test_a_matrix_that_is_not_square_gives_the_shape_that_was_foreseen(name, attributes, shapes):
    """Matrices come as PyTorch takes them, (out, in): by then those of the graph have been turned."""
    operator = operators()[f"ai.portlm.{name}"]
    call = Call(attributes=attributes, static={}, inputs=len(shapes), outputs=1)
    (foreseen,) = operator.shapes(call, shapes)
    y = operator.bind(call)(*(torch.zeros(shape) for shape in shapes))
    assert tuple(foreseen) == tuple(y.shape) == (2, 3, 6)
