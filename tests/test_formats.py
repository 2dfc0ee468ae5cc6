"""The table of formats against onnx's operator schemas and ml_dtypes."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import onnx
import pytest

from onnxq.errors import OnnxqError
from onnxq.formats import FORMATS, QuantFormat, quant_format

each_format = pytest.mark.parametrize("fmt", FORMATS.values(), ids=lambda f: f.name)


@each_format
def test_row_agrees_with_the_dtype(fmt: QuantFormat) -> None:
    dtype = fmt.dtype()
    assert dtype.itemsize * 8 == fmt.bits
    number = getattr(onnx.TensorProto, fmt.onnx_type)
    assert onnx.helper.tensor_dtype_to_np_dtype(number) == dtype
    info = ml_dtypes.finfo(dtype) if fmt.is_float else np.iinfo(dtype)
    assert float(info.max) == fmt.qmax
    assert fmt.is_float == (fmt.name == "fp8")


@each_format
def test_min_opset_is_the_first_that_has_it(fmt: QuantFormat) -> None:
    """Q/DQ of the type, with FP16 scales."""
    tensor = {"INT8": "tensor(int8)", "FLOAT8E4M3FN": "tensor(float8e4m3fn)"}[fmt.onnx_type]

    def serves(opset: int) -> bool:
        schema = onnx.defs.get_schema("DequantizeLinear", opset)
        codes, scale = schema.inputs[0].types, schema.inputs[1].types
        return tensor in codes and "tensor(float16)" in scale

    assert serves(fmt.min_opset)
    assert not serves(fmt.min_opset - 1)


def test_unknown_format_names_the_known() -> None:
    with pytest.raises(OnnxqError, match="unknown format 'int7'; choose one of: int8, fp8"):
        quant_format("int7")
