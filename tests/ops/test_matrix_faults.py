"""Proof that a cell of the matrix can fail: a form with one sign flipped is seen, whichever value it is."""

import pytest

pytest.importorskip("onnx", reason="onnx is missing: pip install portlm[onnx]")

import numpy as np
import onnx
from op_matrix import CONTEXT, ROWS, Case, build, compare, feeds, ort_run

from portlm.compile import ort_lowering
from portlm.compile.graph import GraphBuilder
from portlm.ops.spec import DOMAIN

ZEROS = ("bias.nothing", "bias.flat")  # no sign shows in them
# Values of which only the number counts, not what they are.
COUNTED = {"RelativeBias": ["bias.row", "bias.column"]}  # the tokens of x, multiplied by 0

# Values that are divided by their own sum where the weights of experts add up to 1: a factor of all of them cancels.
QUOTIENTS = ["node.chosen", "node.softmax", "node.kept"]


def flipping(target: int, values: list[str]) -> type[GraphBuilder]:
    """A builder that appends the name of every value to `values`, and flips the sign of the target-th.

    What is squared next would not show that, so it is an eighth too large as well. A whole number has its sign flipped
    alone, and a value that is 0 becomes 1.125. Bytes have no sign.
    """
    small = set[str]()  # values that are bytes

    class Flipping(GraphBuilder):
        def split_op(self, op_type, inputs, name, outputs, *, domain="", **attributes):
            written = list(outputs)
            cast = op_type == "Cast" and attributes["to"] == onnx.TensorProto.INT8
            if cast or (op_type in ("Concat", "Gather", "Reshape") and self._is_small(inputs[0])):
                small.update(outputs)
                return super().split_op(op_type, inputs, name, outputs, domain=domain, **attributes)
            for place, value in enumerate(outputs):
                if value and domain != DOMAIN:
                    if len(values) == target:
                        written[place] = f"{value}.right"
                    values.append(value)
            super().split_op(op_type, inputs, name, written, domain=domain, **attributes)
            for right, value in zip(written, outputs, strict=True):
                if right != value:
                    whole = op_type == "Cast" and attributes["to"] == onnx.TensorProto.INT32
                    minus = (
                        self._constant("minus.one", np.array(-1, np.int32)) if whole else self.scalar(-1.125)
                    )
                    kind, number = ("Add", self.scalar(1.125)) if value in ZEROS else ("Mul", minus)
                    super().split_op(kind, (right, number), f"{value}.flipped", (value,))
            return tuple(outputs)

        def _is_small(self, name):
            tensor = self._initializers.get(name)
            given = [i.type.tensor_type.elem_type for i in self._inputs if i.name == name]
            return (
                name in small
                or given == [onnx.TensorProto.INT8]
                or (tensor is not None and tensor.data_type == onnx.TensorProto.UINT8)
            )

    return Flipping


def form(case: Case, profile: str, builder: type[GraphBuilder]) -> onnx.ModelProto:
    """What ONNX Runtime runs on the CPU, written by such a builder."""
    if profile == "portable":
        return build(case, profile, builder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ort_lowering, "GraphBuilder", builder)
        return ort_lowering.lower_model(build(case, profile), CONTEXT, "cpu")


def sees_a_fault(case: Case, model: onnx.ModelProto, profile: str) -> bool:
    try:
        compare(case, ort_run(model, "cpu")(feeds(case, profile)), padded=False)
    except AssertionError:
        return True
    return False


@pytest.mark.parametrize("profile", ["portable", "fused"])
@pytest.mark.parametrize("name", [name for name, row in ROWS.items() if row.node and row.entry])
def test_a_form_with_one_sign_flipped_fails_its_cell(name, profile):
    """Whichever value of the form it is, in every variant; with nothing flipped the same comparison passes.

    Those of which only the number counts are the ones that are not seen.
    """
    for variant in range(len(ROWS[name].entry["variants"])):
        case = Case(ROWS[name], variant, "odd")
        values: list[str] = []
        assert not sees_a_fault(case, form(case, profile, flipping(-1, values)), profile)
        assert values
        unseen = [
            value
            for target, value in enumerate(values)
            if not sees_a_fault(case, form(case, profile, flipping(target, [])), profile)
        ]
        divided = ROWS[name].entry["variants"][variant].get("normalize")
        assert unseen == (QUOTIENTS if divided else COUNTED.get(name, []))
