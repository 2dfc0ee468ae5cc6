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
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs

from onnxq import numerics
from onnxq.formats import PerBlock, PerTensor, QuantFormat, QuantScheme
from onnxq.graph.attention import factors_behind
from onnxq.graph.edit import Editor
from onnxq.graph.query import ConstantOperand, label, scalar
from onnxq.graph.weights import numpy_dtype, onnx_dtype


@dataclass(frozen=True, eq=False)
class CodedWeight:
    """A weight as it will be stored; written once for all layers that are given the same object.

    Attributes:
        scale: of `scheme.scale_type`, shaped as the scheme says.
        produce: gives the codes, laid out as the node sees the weight, when they are written.
        behind: DequantizeLinear gets the scheme's unit, and the scales multiply the product.
    """

    scheme: QuantScheme
    scale: Any
    produce: Callable[[], Any]
    behind: bool = False


class Emitter:
    """Adds Q/DQ to one model, one pair for all consumers of a tensor."""

    def __init__(self, editor: Editor, fmt: QuantFormat) -> None:
        self.editor, self.fmt = editor, fmt
        self.code_type = int(getattr(onnx.TensorProto, fmt.onnx_type))
        self._static: dict[tuple[int, bytes], gs.Tensor] = {}
        self._dynamic: dict[tuple[int, str], tuple[gs.Tensor, gs.Tensor]] = {}
        self._weights: dict[CodedWeight, gs.Tensor] = {}
        self._ratios: dict[tuple[CodedWeight, float], gs.Constant] = {}
        self._alive: list[gs.Tensor] = []

    def weight(
        self, operand: ConstantOperand, coded: CodedWeight, like: gs.Node, gain: float = 1.0
    ) -> tuple[gs.Tensor, gs.Constant | None]:
        """DequantizeLinear on the weight's codes, stored in few bits and laid out as it is used.

        The codes are computed when the model is written. The float weight itself is untouched:
        whoever else reads it (an embedding) still does.

        Args:
            gain: a factor of the product beside the scales.

        Returns:
            The dequantized weight, and what its product is to be multiplied by, or None.
        """
        scale = np.asarray(coded.scale)
        if coded not in self._weights:
            self._weights[coded] = self._weight(operand, coded, like)
        weight = self._weights[coded]
        if not coded.behind:
            if gain == 1:
                return weight, None
            scale = np.ones((), scale.dtype)
        gained = (coded, gain)
        if gained not in self._ratios:
            name = f"{operand.constant.name}_channel_scale"
            trailing = [1] * (len(operand.shape) - 2)  # a convolution's channels are axis 1
            factors = (scale.astype(np.float64) * gain).astype(scale.dtype)
            shaped = factors.reshape(*factors.shape, *trailing) if factors.ndim else factors
            self._ratios[gained] = self.editor.constant(name, shaped)
        return weight, self._ratios[gained]

    def _weight(self, operand: ConstantOperand, coded: CodedWeight, like: gs.Node) -> gs.Tensor:
        name, scheme = operand.constant.name, coded.scheme
        stored, granularity = np.asarray(coded.scale), scheme.granularity
        if coded.behind:
            stored, granularity = np.array(scheme.unit).astype(stored.dtype), PerTensor()
        codes = self.editor.derived(
            f"{name}_{scheme.format.name}",
            int(getattr(onnx.TensorProto, scheme.format.onnx_type)),
            operand.shape,
            coded.produce,
        )
        where = {} if isinstance(granularity, PerTensor) else {"axis": granularity.axis}
        if isinstance(granularity, PerBlock):
            where["block_size"] = granularity.size
        return self.editor.node(
            "DequantizeLinear",
            f"{name}_DequantizeLinear",
            [codes, self.editor.constant(f"{name}_scale", stored)],
            f"{name}_dequantized",
            _tensor_dtype(stored.dtype),
            operand.shape,
            like=like,
            **where,
        )

    def static(self, tensor: gs.Tensor, scale: Any, like: gs.Node) -> gs.Tensor:
        """Q and DQ of an activation under a scale that was calibrated, of the activation's type."""
        key = (id(tensor), scale.tobytes())
        if key not in self._static:
            self._static[key] = self._pair(tensor, scale, like)
            self._alive.append(tensor)
        return self._static[key]

    def scale_before_product(self, scores: gs.Node) -> float:
        """Move the constant factors between the scores of an attention and its softmax onto q.

        There they leave nothing between the first product and the mask. Casts on the way stay.

        Returns:
            The factor that q is multiplied by now; 1.0 where there is nothing to move.
        """
        steps = factors_behind(self.editor.model, scores)
        if not steps:
            return 1.0
        factor = math.prod(value for _, value in steps)
        for node, _ in steps:
            data = next(i for i, t in enumerate(node.inputs) if scalar(t) is None)
            self.editor.redirect(node.outputs[0], node.inputs[data])
        q = scores.inputs[0]
        constant = self.editor.constant(f"{q.name}_factor", np.array(factor).astype(_dtype(q)))
        name = f"{label(scores)}_Scale"
        out = f"{q.name}_scaled"
        scores.inputs[0] = self.editor.node(
            "Mul", name, [q, constant], out, q.dtype, q.shape, scores
        )
        return float(np.array(factor).astype(_dtype(q)))

    def dynamic(
        self, tensor: gs.Tensor, axes: Sequence[int], like: gs.Node
    ) -> tuple[gs.Tensor, gs.Tensor]:
        """Q and DQ of x / m, and m, for m = max |x| over `axes`."""
        key = (id(tensor), repr(axes))
        if key not in self._dynamic:
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
            least = np.array(numerics.smallest_normal(_dtype(tensor))).astype(_dtype(tensor))
            floor = self.editor.constant(f"{name}_floor", least)
            peak = add("Max", f"{name}_Max", [peak, floor], f"{name}_peak", dtype, one, like)
            normal = add("Div", f"{name}_Div", [tensor, peak], f"{name}_normal", dtype, shape, like)
            scheme = QuantScheme(self.fmt, PerTensor(), _dtype(tensor).name)
            scale = numerics.scales_for(np.array(1.0), scheme)
            self._dynamic[key] = (self._pair(normal, scale, like), peak)
            self._alive.append(tensor)
        return self._dynamic[key]

    def _pair(self, tensor: gs.Tensor, scale: Any, like: gs.Node) -> gs.Tensor:
        name, add = tensor.name, self.editor.node
        scale_tensor = self.editor.constant(f"{name}_scale", scale)
        zero = self.editor.constant(f"{name}_zero", np.zeros((), self.fmt.dtype()), self.code_type)
        code_dtype = _tensor_dtype(self.fmt.dtype())
        codes = add(
            "QuantizeLinear",
            f"{name}_QuantizeLinear",
            [tensor, scale_tensor, zero],
            f"{name}_quantized",
            code_dtype,
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


def _dtype(tensor: gs.Tensor) -> Any:
    """The numpy (or ml_dtypes) dtype of a tensor's values."""
    return numpy_dtype(tensor.dtype) if isinstance(tensor.dtype, int) else np.dtype(tensor.dtype)


def _tensor_dtype(dtype: Any) -> Any:
    """The type as graphsurgeon keeps it."""
    dtype = np.dtype(dtype)
    return dtype if dtype.isbuiltin == 1 else onnx_dtype(dtype)
