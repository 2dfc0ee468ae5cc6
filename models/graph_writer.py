"""Write an ONNX graph node by node: scopes as in torch's exports, weights streamed to a file."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

NAME_SCOPES = "pkg.torch.onnx.name_scopes"

_ALIGNMENT = 4096  # a page: runtimes map what starts on one


class GraphWriter:
    """Collects nodes and initializers. Every method that makes a value returns the value's name.

    A node made inside `scope("model")`, `scope("layers.0")` is called `/model/layers.0/<OpType>`,
    with `_1`, `_2`, ... for further ones of the same type, and carries its module path in the
    metadata: `pkg.torch.onnx.name_scopes` = "['', 'model', 'model.layers.0', 'matmul_7']", the form
    that torch.onnx.export(dynamo=True) writes (the last item is the node, not a module).
    """

    def __init__(self, data: BinaryIO, location: str) -> None:
        """`data` receives the weights; `location` is that file's name as the model will find it."""
        self._data, self._location = data, location
        self._modules: list[str] = []
        self._names: Counter[str] = Counter()
        self._kinds: Counter[str] = Counter()
        self._constants: dict[tuple[str, tuple[int, ...], bytes], str] = {}
        self.nodes: list[onnx.NodeProto] = []
        self.initializers: list[TensorProto] = []

    @contextmanager
    def scope(self, module: str) -> Iterator[None]:
        """Nodes made in the block belong to the child `module` of the current one."""
        self._modules.append(module)
        try:
            yield
        finally:
            self._modules.pop()

    def op(self, op_type: str, *inputs: str, output: str | None = None, **attributes: Any) -> str:
        """Add a node with one output."""
        path = "/" + "/".join([*self._modules, op_type])
        name = f"{path}_{self._names[path]}" if self._names[path] else path
        self._names[path] += 1
        result = output or f"{name}_output_0"
        node = helper.make_node(op_type, list(inputs), [result], name=name, **attributes)
        kind = op_type.lower()
        leaf = f"{kind}_{self._kinds[kind]}" if self._kinds[kind] else kind
        self._kinds[kind] += 1
        modules = [".".join(self._modules[:depth]) for depth in range(len(self._modules) + 1)]
        node.metadata_props.add(key=NAME_SCOPES, value=repr([*modules, leaf]))
        self.nodes.append(node)
        return result

    def constant(self, value: Any, dtype: Any = np.int64) -> str:
        """A small initializer in the model file; equal ones are stored once, as exporters do."""
        array = np.asarray(value, dtype)
        key = (array.dtype.name, array.shape, array.tobytes())
        if key not in self._constants:
            self._constants[key] = f"val_{len(self._constants)}"
            self.initializers.append(numpy_helper.from_array(array, self._constants[key]))
        return self._constants[key]

    def weight(self, name: str, value: NDArray[Any]) -> str:
        """An initializer whose bytes go to the data file at once: no array need stay in memory."""
        self._data.write(b"\0" * (-self._data.tell() % _ALIGNMENT))
        tensor = TensorProto(name=name, dims=value.shape, data_location=TensorProto.EXTERNAL)
        tensor.data_type = helper.np_dtype_to_tensor_dtype(value.dtype)
        where = {"location": self._location, "offset": self._data.tell(), "length": value.nbytes}
        for key, item in where.items():
            tensor.external_data.add(key=key, value=str(item))
        self._data.write(np.ascontiguousarray(value).data)
        self.initializers.append(tensor)
        return name

    def save(
        self,
        path: Path,
        inputs: Sequence[onnx.ValueInfoProto],
        outputs: Sequence[onnx.ValueInfoProto],
        opset: int,
    ) -> onnx.ModelProto:
        """Check the model, add inferred shapes, write `path`. The data file must lie beside it."""
        self._data.flush()
        graph = helper.make_graph(self.nodes, "main_graph", inputs, outputs, self.initializers)
        model = helper.make_model_gen_version(
            graph, opset_imports=[helper.make_opsetid("", opset)], producer_name="onnxq.models"
        )
        model = onnx.shape_inference.infer_shapes(model, strict_mode=True, data_prop=True)
        onnx.save(model, path)
        onnx.checker.check_model(path)
        return model
