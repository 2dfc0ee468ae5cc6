"""GroupNormalization of opset 18 to 20 as that of opset 21: a scale per channel, not per group.

onnx's version converter has no way over: it calls the old form deprecated.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np
import onnx

FIRST, CHANNELWISE = 18, 21
"""The opset that brought the operator, and the one that gave it a scale per channel."""


def channelwise(
    node: onnx.NodeProto,
    types: Mapping[str, onnx.TypeProto],
    constants: Mapping[str, onnx.TensorProto],
) -> Iterator[onnx.TensorProto]:
    """Scale and bias of a GroupNormalization, repeated for the channels of their group; unnamed.

    Args:
        types, constants: of the node's inputs by name, as far as they are known.

    Raises:
        ValueError: what is not known of them.
    """
    if len(node.input) != 3:
        raise ValueError(f"it has {len(node.input)} inputs")
    groups = next((a.i for a in node.attribute if a.name == "num_groups"), 0)
    data = types.get(node.input[0], onnx.TypeProto())
    dims = [d.dim_value for d in data.tensor_type.shape.dim]
    channels = dims[1] if len(dims) > 1 else 0
    if groups < 1 or channels < 1 or channels % groups:
        raise ValueError(f"its {channels or 'unknown number of'} channels make no {groups} groups")
    for name in node.input[1:3]:
        if name not in constants:
            raise ValueError(f"{name!r}, which is to be repeated for each channel, is computed")
        values = onnx.numpy_helper.to_array(constants[name])
        if values.shape != (groups,):
            raise ValueError(f"{name!r} has {values.size} values for {groups} groups")
        yield onnx.numpy_helper.from_array(np.repeat(values, channels // groups))
