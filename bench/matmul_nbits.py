"""onnxruntime's MatMulNBits as a worker of `peers.py`; needs onnx, onnxruntime and numpy only.

    PYTHON matmul_nbits.py FOLDER --copies C [--threads N]

FOLDER holds codes.npy [N, K] uint8 (4-bit codes, zero point 8) and scales.npy [N, K / 32] float32.
One session multiplies by C copies of the matrix, each with its rows in another order, so that none
is in a cache when its turn comes again; a time is that of a run divided by C. Activations are
quantized to int8 by blocks of 32 (accuracy_level 4), as ours are.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

from workers import Message, serve

BLOCK = 32


def session_of(folder: Path, copies: int, threads: int) -> Any:
    """Outputs y0, y1, ...: products of x [M, K] float32 with each copy."""
    import numpy as np
    import onnx
    import onnxruntime
    from onnx import TensorProto, helper, numpy_helper

    codes, scales = np.load(folder / "codes.npy"), np.load(folder / "scales.npy")
    n, k = codes.shape
    packed = (codes[:, 0::2] | codes[:, 1::2] << 4).reshape(n, k // BLOCK, BLOCK // 2)
    nodes, weights, outputs = [], [], []
    for i in range(copies):
        weights.append(numpy_helper.from_array(np.roll(packed, i, axis=0), f"w{i}"))
        weights.append(numpy_helper.from_array(np.roll(scales, i, axis=0).reshape(-1), f"s{i}"))
        attributes = {"K": k, "N": n, "bits": 4, "block_size": BLOCK, "accuracy_level": 4}
        names = ["x", f"w{i}", f"s{i}"]
        node = helper.make_node(
            "MatMulNBits", names, [f"y{i}"], domain="com.microsoft", **attributes
        )
        nodes.append(node)
        outputs.append(helper.make_tensor_value_info(f"y{i}", TensorProto.FLOAT, ["m", n]))
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["m", k])
    graph = helper.make_graph(nodes, "products", [x], outputs, weights)
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    onnx.checker.check_model(model)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    # Spinning threads would take the cores from whoever's turn is next.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    providers = ["CPUExecutionProvider"]
    return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=providers)


def start(folder: Path, copies: int, threads: int) -> tuple[Message, Callable[[Message], Message]]:
    import numpy as np
    import onnxruntime

    session = session_of(folder, copies, threads)
    runs: dict[str, int] = {}  # of a sample, by the file of activations
    inputs: dict[str, Any] = {}

    def seconds(name: str, count: int) -> float:
        """Of one product."""
        begin = time.perf_counter()
        for _ in range(count):
            session.run(None, {"x": inputs[name]})
        return (time.perf_counter() - begin) / count / copies

    def answer(request: Message) -> Message:
        """{"x": file of activations [M, K]} and "seconds", what a sample should take, to "us" of a
        product; or "to", a file for the product with the first copy."""
        name = request["x"]
        if name not in inputs:
            inputs[name] = np.load(name)
        if "to" in request:
            np.save(request["to"], session.run(["y0"], {"x": inputs[name]})[0])
            return {}
        if name not in runs:
            seconds(name, 1)  # allocates
            runs[name] = max(1, math.ceil(request["seconds"] / (seconds(name, 1) * copies)))
        return {"us": 1e6 * seconds(name, runs[name])}

    return {"onnxruntime": onnxruntime.__version__}, answer


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--copies", type=int, required=True)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    serve(lambda: start(options.folder, options.copies, options.threads))


if __name__ == "__main__":
    main()
