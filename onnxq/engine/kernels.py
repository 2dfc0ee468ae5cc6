"""What one compiled layer does: pure readings of its name and of its operands' dtypes."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable

from onnxq.engine.layers import EngineLayer, Tensor

NARROW = ("int8", "fp8", "int4", "fp4")
FLOATS = ("fp32", "fp16", "bf16")

_MULTIPLIES = ("gemm", "correlation", "convolution", "runtime_fusion", "gemv", "matmul")
_ELEMENTWISE = "kgen"
_MOVING = {"Move", "Resh", "Tran", "Repl", "Conc", "Slic"}
_RESHAPING = _MOVING | {"Cast"}
_QUANTIZING = _RESHAPING | {"Mul", "Div", "Min", "Max", "Roun"}
_ATTENTION = re.compile(r"_[a-z0-9_]*mha_")
_OPERATIONS = re.compile(r"^__myl_([A-Za-z]+?)_")


def multiplies(layer: EngineLayer) -> bool:
    """Whether the layer is a matrix product, a convolution or a fused attention."""
    return layer.kind in _MULTIPLIES or is_attention(layer)


def is_elementwise(layer: EngineLayer) -> bool:
    """Whether the layer is a generated kernel that multiplies no matrices."""
    return layer.kind == _ELEMENTWISE and not is_attention(layer)


def multiply_dtype(layer: EngineLayer) -> str:
    """The dtype a layer multiplies in: `fp8`, or `fp16 x int4` where the two operands differ."""
    left, right = operands(layer)
    if expands_inside(layer):
        made = (*layer.outputs, *layer.inputs, *layer.constants)
        return next((t.dtype for t in made if t.dtype in FLOATS), "fp16")
    return left if left == right else f"{left} x {right}"


def expands_inside(layer: EngineLayer) -> bool:
    """Whether a layer reads two operands of 8 bits and dequantizes them before it multiplies.

    A gemm multiplies codes; a runtime_fusion of two quantized operands is what the compiler makes
    of scales that cannot be taken out of the sum, or of a Cast behind DequantizeLinear.
    """
    left, right = operands(layer)
    return layer.kind == "runtime_fusion" and left == right and left in ("int8", "fp8")


def weight_bytes(layers: Iterable[EngineLayer]) -> dict[str, int]:
    """Bytes of the first profile's constants by dtype, largest first."""
    sizes: Counter[str] = Counter()
    for tensor in {t.name: t for x in layers if x.profile == 0 for t in x.constants}.values():
        sizes[tensor.dtype] += tensor.nbytes
    return dict(sizes.most_common())


def is_attention(layer: EngineLayer) -> bool:
    """Whether the layer is a fused attention: `_gemm_mha_v2_myl0_4`, not a node called `mha`."""
    return _ATTENTION.match(layer.name) is not None


def attention_dtype(layer: EngineLayer) -> str:
    # q, k and v are three of one dtype; a mask may stand among them in another.
    dtypes = Counter(t.dtype for t in layer.inputs if t.dtype in (*NARROW, *FLOATS))
    return dtypes.most_common(1)[0][0] if dtypes else "none"


def operands(layer: EngineLayer) -> tuple[str, str]:
    """Dtypes of the activation and of the weight (or second activation).

    Scalars and vectors beside them (alpha, bias) do not count, nor does a residual: a narrow
    operand is always one of the two that are multiplied.
    """
    inputs = [t for t in layer.inputs if t.elements != 1]
    constants = [t for t in layer.constants if t.elements > 1]
    narrow_inputs, narrow_constants = _codes(layer, inputs), _codes(layer, constants)
    left = (narrow_inputs or inputs or constants or [Tensor("", (), "none")])[0].dtype
    if narrow_constants:
        return left, narrow_constants[0].dtype
    if len(narrow_inputs) > 1:
        return left, narrow_inputs[1].dtype
    others = [t for t in inputs if t is not inputs[0]]
    weight = max(constants, key=lambda t: t.elements, default=None)
    if weight is not None and (sum(d != 1 for d in weight.dims) > 1 or not others):
        return left, weight.dtype
    return left, (others[0].dtype if others else left)


def _codes(layer: EngineLayer, tensors: Iterable[Tensor]) -> list[Tensor]:
    """Those that may be operands: beside FP4, what has 8 bits are the scales of its blocks."""
    fp4 = any(t.dtype == "fp4" for t in (*layer.inputs, *layer.constants))
    return [t for t in tensors if t.dtype in (("fp4",) if fp4 else NARROW)]


def operations(layer: EngineLayer) -> tuple[str, ...]:
    """What an elementwise kernel does, in order, by the compiler's words: `("Mul", "Add")`."""
    match = _OPERATIONS.match(layer.name) if is_elementwise(layer) else None
    return tuple(re.findall(r"[A-Z][a-z]*", match[1])) if match else ()


def only_moves(layer: EngineLayer) -> bool:
    """Whether an elementwise kernel changes no value."""
    return bool(operations(layer)) and set(operations(layer)) <= _MOVING


def multiplies_by_vector(layer: EngineLayer) -> bool:
    """Whether an elementwise kernel multiplies what it reads by a vector of floats.

    One that slices first does something else too: it takes the padding off a product's columns.
    """
    words = operations(layer)
    vector = any(c.elements > 1 and c.dtype in FLOATS for c in layer.constants)
    return vector and "Mul" in words and "Slic" not in words[: words.index("Mul")]


def is_alone(layer: EngineLayer, *, quantize: bool) -> bool:
    """Whether a kernel's only job is a Q, or a DQ."""
    words = set(operations(layer))
    if not words or not words <= _QUANTIZING or words <= _MOVING:
        return False
    sources = [t for t in (*layer.inputs, *layer.constants) if t.elements != 1]
    narrow_in = any(t.dtype in NARROW for t in sources)
    narrow_out = any(t.dtype in NARROW for t in layer.outputs)
    return (narrow_out and not narrow_in) if quantize else (narrow_in and not narrow_out)
