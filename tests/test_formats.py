"""The table of formats against onnx's operator schemas and ml_dtypes."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import onnx
import pytest

from onnxq.errors import OnnxqError
from onnxq.formats import (
    FORMATS,
    Granularity,
    PerBlock,
    PerChannel,
    PerTensor,
    QuantFormat,
    QuantScheme,
    quant_format,
)

each_format = pytest.mark.parametrize("fmt", FORMATS.values(), ids=lambda f: f.name)


@each_format
def test_row_agrees_with_the_dtype(fmt: QuantFormat) -> None:
    number = getattr(onnx.TensorProto, fmt.onnx_type)
    dtype = onnx.helper.tensor_dtype_to_np_dtype(number)
    assert fmt.dtype() == dtype
    assert len(onnx.numpy_helper.from_array(np.zeros(8, dtype)).raw_data) == fmt.bits
    info = ml_dtypes.finfo(dtype) if fmt.is_float else ml_dtypes.iinfo(dtype)
    assert float(info.max) == fmt.qmax
    # INT8 leaves -128 unused, so that a weight and its negative have the same codes.
    assert float(info.min) == (fmt.qmin - 1 if fmt.name == "int8" else fmt.qmin)
    assert fmt.is_float == ("FLOAT" in fmt.onnx_type)
    assert fmt.symmetric == (fmt.name != "uint4")


TENSORS = {
    "INT8": "tensor(int8)",
    "INT4": "tensor(int4)",
    "UINT4": "tensor(uint4)",
    "FLOAT8E4M3FN": "tensor(float8e4m3fn)",
    "FLOAT4E2M1": "tensor(float4e2m1)",
}


@each_format
@pytest.mark.parametrize("granularity", [PerTensor(), PerChannel(0), PerBlock(0, 32)])
def test_min_opset_is_the_first_that_has_it(fmt: QuantFormat, granularity: Granularity) -> None:
    """Q/DQ of the type, with FP16 scales, and with blocks where they are asked for."""

    def serves(opset: int) -> bool:
        schema = onnx.defs.get_schema("DequantizeLinear", opset)
        # onnx 1.20 cannot give an input's own list of types.
        types = {c.type_param_str: c.allowed_type_strs for c in schema.type_constraints}
        named = (schema.inputs[index].type_str for index in (0, 1))
        codes, scale = (types.get(name, [name]) for name in named)
        blocks = "block_size" in schema.attributes or not isinstance(granularity, PerBlock)
        return TENSORS[fmt.onnx_type] in codes and "tensor(float16)" in scale and blocks

    least = QuantScheme(fmt, granularity, "float16").min_opset
    if fmt.scale_type == "float8_e8m0fnu":  # no DequantizeLinear: TensorRT's own operator
        assert least == fmt.min_opset
    else:
        assert serves(least)
        assert not serves(least - 1)


def test_schemes_transpose_with_their_matrix() -> None:
    for granularity, other in (
        (PerTensor(), PerTensor()),
        (PerChannel(0), PerChannel(1)),
        (PerBlock(1, 16), PerBlock(0, 16)),
        (PerBlock(-1, 16), PerBlock(0, 16)),
    ):
        scheme = QuantScheme(FORMATS["int4"], granularity, "float16", 0.5)
        assert scheme.transposed() == QuantScheme(FORMATS["int4"], other, "float16", 0.5)


def test_unknown_format_names_the_known() -> None:
    with pytest.raises(OnnxqError, match="unknown format 'int7'; choose one of: int8, fp8, "):
        quant_format("int7")
