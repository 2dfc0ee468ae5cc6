"""The Q/DQ forms TensorRT compiles into 8-bit kernels, as ONNX nodes.

static   x -> Q(scale) -> DQ -> op <- DQ <- codes;  op -> * r -> + bias
dynamic  m = max(amax of each token or sample, eps)
         x / m -> Q(1/qmax) -> DQ -> op <- DQ <- codes;  op -> * r -> * m -> + bias

The dynamic form is a constant-scale Q/DQ around a normalised operand: TensorRT takes no computed
scales, but this compiles into one kernel that quantizes and one 8-bit product.

r carries the scales of the weight's channels, as a vector behind a product in 16 bits. Left to the
compiler (a DequantizeLinear per channel), tensorrt-rtx 1.7 lets a linear layer write the raw sum of
codes in FP16, which overflows, and multiplies by an FP16 vector of scale products near 1e-7, which
has no digits left; a convolution writes FP32, twice the bytes. With one scale in DequantizeLinear
the product is scaled in FP32 inside, and r rides in the kernel that adds the bias. Layers that read
one tensor (q, k, v) become one product, so they must share that scale.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import numpy as np
import onnx
import onnx_graphsurgeon as gs

from onnxq import numerics
from onnxq.formats import QuantFormat
from onnxq.graph.attention import factors_before, factors_behind
from onnxq.graph.dtypes import graph_dtype, value_dtype
from onnxq.graph.edit import Editor
from onnxq.graph.emit_blocks import fp4_blocks, mx_blocks
from onnxq.graph.emit_weight import CodedWeight, dequantized
from onnxq.graph.query import ConstantOperand, label, scalar

T = TypeVar("T")


class Emitter:
    """Adds Q/DQ to one model, one pair for all consumers of a tensor."""

    def __init__(self, editor: Editor) -> None:
        self.editor = editor
        self._made: dict[tuple[Any, ...], Any] = {}
        self._weights: dict[CodedWeight, gs.Tensor] = {}
        self._ratios: dict[tuple[CodedWeight, float], gs.Constant] = {}
        self._alive: list[gs.Tensor] = []

    def weight(
        self,
        operand: ConstantOperand,
        coded: CodedWeight,
        dtype: Any,
        like: gs.Node,
        gain: float = 1.0,
    ) -> tuple[gs.Tensor, gs.Constant | None]:
        """DequantizeLinear on the weight's codes, stored in few bits and laid out as it is used.

        The codes are computed when the model is written. The float weight itself is untouched:
        whoever else reads it (an embedding) still does.

        Args:
            dtype: the type of the activations.
            gain: a factor of the product beside the scales.

        Returns:
            The dequantized weight, and what its product is to be multiplied by, or None.
        """
        if coded not in self._weights:
            made = dequantized(self.editor, operand, coded, dtype, like)
            if coded.expanded is not None:
                fmt, scale = coded.expanded
                made = self._pair(made, scale, fmt, like)
            self._weights[coded] = made
        factors = coded.behind
        if factors is None:
            if gain == 1:
                return self._weights[coded], None
            factors = np.ones((), dtype)
        gained = (coded, gain)
        if gained not in self._ratios:
            name = f"{operand.constant.name}_channel_scale"
            trailing = [1] * (len(operand.shape) - 2)  # a convolution's channels are axis 1
            factors = (factors.astype(np.float64) * gain).astype(factors.dtype)
            shaped = factors.reshape(*factors.shape, *trailing) if factors.ndim else factors
            self._ratios[gained] = self.editor.constant(name, shaped)
        return self._weights[coded], self._ratios[gained]

    def static(self, tensor: gs.Tensor, scale: Any, fmt: QuantFormat, like: gs.Node) -> gs.Tensor:
        """Q and DQ of an activation under a scale that was calibrated, of the activation's type."""
        return self._once(
            ("static", tensor, fmt.name, scale.tobytes()),
            lambda: self._pair(tensor, scale, fmt, like),
        )

    def centered(self, tensor: gs.Tensor, center: float, like: gs.Node) -> gs.Tensor:
        """x - center, for a range that lies to one side of 0."""

        def make() -> gs.Tensor:
            value = np.array(center).astype(value_dtype(tensor.dtype))
            constant = self.editor.constant(f"{tensor.name}_center", value)
            inputs, out = [tensor, constant], f"{tensor.name}_centered"
            return self.editor.node(
                "Sub", f"{tensor.name}_Sub", inputs, out, tensor.dtype, tensor.shape, like
            )

        return self._once(("centered", tensor, center), make)

    def normalized(
        self, tensor: gs.Tensor, axes: Sequence[int], like: gs.Node
    ) -> tuple[gs.Tensor, gs.Tensor]:
        """x / m, and m = max |x| over `axes`."""
        return self._once(
            ("normalized", tensor, repr(axes)), lambda: self._normalized(tensor, axes, like)
        )

    def blocks(
        self, tensor: gs.Tensor, fmt: QuantFormat, unit: float | None, like: gs.Node
    ) -> gs.Tensor:
        """An activation in blocks along its last axis, whose scales TensorRT computes.

        Args:
            unit: the scale of the tensor, for formats of two levels.
        """
        if fmt.two_level:
            assert unit is not None
            return self._once(
                ("blocks", tensor, fmt.name, unit),
                lambda: fp4_blocks(self.editor, tensor, fmt, unit, like),
            )
        return self._once(
            ("blocks", tensor, fmt.name), lambda: mx_blocks(self.editor, tensor, fmt, like)
        )

    def _once(self, key: tuple[Any, ...], make: Callable[[], T]) -> T:
        """What `make` gives, made once for a tensor and the same wishes."""
        kind, tensor, *wishes = key
        known = (kind, id(tensor), *wishes)
        if known not in self._made:
            self._made[known] = make()
            self._alive.append(tensor)
        return self._made[known]  # type: ignore[no-any-return]

    def scale_before_product(self, scores: gs.Node, *, exact: bool = False) -> tuple[float, float]:
        """Move the constant factors around the scores of an attention onto q.

        Those between the scores and its softmax, so that nothing stands between the first product
        and the mask; where k has some, its own and those of q too, so that k comes straight from
        its layer. Casts on the way stay.

        Args:
            exact: q takes a power of two alone, under which its scale can be that of k and v; what
                is left of the factor, 1 to 2, stands behind the product.

        Returns:
            What the two operands of the product are multiplied by now, against before.
        """
        of_k = factors_before(scores.inputs[1])
        of_q = factors_before(scores.inputs[0]) if of_k else []
        gone = math.prod(value for _, value in of_q), math.prod(value for _, value in of_k)
        steps = [*factors_behind(self.editor.model, scores), *of_q, *of_k]
        if not steps:
            return 1.0, 1.0
        factor, rest = math.prod(value for _, value in steps), 1.0
        if exact:
            # Factors that were rounded to 16 bits are not told from a power of two.
            whole = 2.0 ** math.floor(math.log2(factor) + 1e-3)
            factor, rest = whole, 1.0 if factor < 1.001 * whole else factor / whole
        for node, _ in steps:
            data = next(i for i, t in enumerate(node.inputs) if scalar(t) is None)
            self.editor.redirect(node.outputs[0], node.inputs[data])
        q = scores.inputs[0]
        constant = self._factor(q, factor)
        name, out = f"{label(scores)}_Scale", f"{q.name}_scaled"
        scores.inputs[0] = self.editor.node(
            "Mul", name, [q, constant], out, q.dtype, q.shape, scores
        )
        if rest != 1:
            self.finish_product(scores, [self._factor(scores.outputs[0], rest)], None)
        return float(constant.values) / gone[0], 1 / gone[1]

    def _factor(self, tensor: gs.Tensor, factor: float) -> gs.Constant:
        values = np.array(factor).astype(value_dtype(tensor.dtype))
        return self.editor.constant(f"{tensor.name}_factor", values)

    def _normalized(
        self, tensor: gs.Tensor, axes: Sequence[int], like: gs.Node
    ) -> tuple[gs.Tensor, gs.Tensor]:
        name, dtype = tensor.name, tensor.dtype
        add, shape = self.editor.node, tensor.shape
        one = (
            [1 if i in {a % len(shape) for a in axes} else d for i, d in enumerate(shape)]
            if shape
            else None
        )
        magnitude = add("Abs", f"{name}_Abs", [tensor], f"{name}_abs", dtype, shape, like)
        axis = self.editor.constant(f"{name}_axes", np.array(axes, np.int64))
        peak = add(
            "ReduceMax",
            f"{name}_ReduceMax",
            [magnitude, axis],
            f"{name}_amax",
            dtype,
            one,
            like,
            keepdims=1,
        )
        # A row of zeros stays zeros; 1 / m, by which a compiler may multiply, stays finite.
        least = np.array(numerics.smallest_normal(value_dtype(tensor.dtype))).astype(
            value_dtype(tensor.dtype)
        )
        floor = self.editor.constant(f"{name}_floor", least)
        peak = add("Max", f"{name}_Max", [peak, floor], f"{name}_peak", dtype, one, like)
        normal = add("Div", f"{name}_Div", [tensor, peak], f"{name}_normal", dtype, shape, like)
        return normal, peak

    def _pair(self, tensor: gs.Tensor, scale: Any, fmt: QuantFormat, like: gs.Node) -> gs.Tensor:
        name, add = tensor.name, self.editor.node
        code_type = int(getattr(onnx.TensorProto, fmt.onnx_type))
        scale_tensor = self.editor.constant(f"{name}_scale", scale)
        zero = self.editor.constant(f"{name}_zero", np.zeros((), fmt.dtype()), code_type)
        codes = add(
            "QuantizeLinear",
            f"{name}_QuantizeLinear",
            [tensor, scale_tensor, zero],
            f"{name}_quantized",
            graph_dtype(code_type),
            tensor.shape,
            like,
        )
        return add(
            "DequantizeLinear",
            f"{name}_DequantizeLinear",
            [codes, scale_tensor, zero],
            f"{name}_dequantized",
            tensor.dtype,
            tensor.shape,
            like,
        )

    def finish_product(
        self, node: gs.Node, factors: Sequence[gs.Tensor], bias: gs.Tensor | None
    ) -> None:
        """Multiply the node's output by each factor, then add `bias`; the output keeps its name."""
        steps = [("Mul", f"{label(node)}_Rescale", f) for f in factors]
        steps += [("Add", f"{label(node)}_Bias", bias)] if bias is not None else []
        if not steps:
            return
        out = node.outputs[0]
        last = gs.Variable(self.editor.unique(f"{out.name}_product"), out.dtype, out.shape)
        node.outputs[0] = last
        for op, name, operand in steps:
            last = self.editor.node(
                op, name, [last, operand], f"{out.name}_rescaled", out.dtype, out.shape, node
            )
        last.inputs[0].outputs[0] = out
