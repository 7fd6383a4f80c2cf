"""Products with quantized weights: one row beyond every cache, many rows, INT8, small layers.

    python -m benchmarks.bench_quant [row] [rows] [int8] [small]

One row counts the bytes that the weights have in a file, each once, over matrices that together are four times the
last cache and more. Many rows count 2 M N K operations against the integer roof, which is that of nibbles times
bytes: bytes times bytes need twice the multiplies without VNNI, so 56 % is their limit there. Ours takes and gives
float32, the activations' quantization included; onnxruntime's MatMulNBits (accuracy_level 4: int8 activations) too,
torch._int_mm and int8_matmul take and give integers.
"""
import sys

import numpy as np

from benchmarks.harness import THREADS, Suite, normal, torch
from numformer import quant

SIZE = 4096


def weights(n, k, group_size=128, bits=4):
    q = quant.quantize(normal(n, k), quant.QuantSpec(bits, group_size))
    q.packed()
    return q


def onnx_matmul(q):
    """A function of x that does q's product in onnxruntime, or None where it is not installed."""
    try:
        import onnx
        import onnxruntime
    except ImportError:
        return None
    n, k = q.shape
    size = q.spec.group_size
    tensors = {"B": q.data.reshape(n, k // size, size // 2), "s": q.scales.astype(np.float32).ravel()}
    node = onnx.helper.make_node("MatMulNBits", ["x", *tensors], ["y"], domain="com.microsoft", K=k, N=n, bits=4,
                                 block_size=size, accuracy_level=4)
    floats = onnx.TensorProto.FLOAT
    graph = onnx.helper.make_graph(
        [node], "product", [onnx.helper.make_tensor_value_info("x", floats, ["rows", k])],
        [onnx.helper.make_tensor_value_info("y", floats, ["rows", n])],
        [onnx.numpy_helper.from_array(array, name) for name, array in tensors.items()])
    model = onnx.helper.make_model(graph, ir_version=10, opset_imports=[
        onnx.helper.make_opsetid("", 21), onnx.helper.make_opsetid("com.microsoft", 1)])
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = THREADS
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    x = normal(3, k)
    y, ours = session.run(None, {"x": x})[0], quant.linear(x, q)
    if np.linalg.norm(y - ours) > 0.02 * np.linalg.norm(ours):
        raise RuntimeError("bench_quant: onnxruntime's product differs from ours")
    return lambda x: session.run(None, {"x": x})[0]


def torch_linear(n, k):
    if torch is None:
        return None
    w = torch.from_numpy(normal(n, k))

    def run(x):
        with torch.no_grad():
            return torch.nn.functional.linear(torch.from_numpy(x), w)
    return run


def over(functions, x):
    """One call of each; None where there are none."""
    return None if functions[0] is None else lambda: [f(x) for f in functions]


def row(suite):
    x = {rows: normal(rows, SIZE) for rows in (1, 2, 4)}
    qs = [weights(SIZE, SIZE) for _ in range(10)]
    ort = [onnx_matmul(q) for q in qs]
    floats = [torch_linear(SIZE, SIZE) for _ in range(2)] if torch else [None]
    for rows in x:
        suite.compare(f"4 bits g128, {rows} x {SIZE} x {SIZE}, beyond cache", sum(q.nbytes for q in qs), "read",
                      goal="85 % of read" if rows == 1 else None,
                      numformer=lambda rows=rows: [quant.linear(x[rows], q) for q in qs],
                      onnxruntime=over(ort, x[rows]))
    suite.compare(f"4 bits g128, 1 x {SIZE} x {SIZE}, beyond cache, products", len(qs), None, unit="products",
                  numformer=lambda: [quant.linear(x[1], q) for q in qs],
                  torch_float32=over(floats * (len(qs) // 2), x[1]) if torch else None)


def rows(suite):
    for m, group_size in [(16, 128), (512, 128), (512, 32)]:
        q, x = weights(SIZE, SIZE, group_size), normal(m, SIZE)
        ort, floats = onnx_matmul(q), torch_linear(SIZE, SIZE)
        suite.compare(f"4 bits g{group_size}, {m} x {SIZE} x {SIZE}", 2 * m * SIZE * SIZE, "dot", rounds=5,
                      goal="75 % of dot" if (m, group_size) == (512, 128) else None,
                      numformer=lambda q=q, x=x: quant.linear(x, q),
                      onnxruntime=ort and (lambda ort=ort, x=x: ort(x)),
                      torch_float32=floats and (lambda floats=floats, x=x: floats(x)))


def int8(suite):
    for m, n, k in (512, SIZE, SIZE), (2048, 2048, 2048):
        a, b = (np.random.default_rng(0).integers(-128, 128, (count, k)).astype(np.int8) for count in (m, n))
        ta, tb = (torch.from_numpy(a), torch.from_numpy(b).T) if torch and m == 512 else (None, None)
        suite.compare(f"int8_matmul {m} x {n} x {k}", 2 * m * n * k, "dot", rounds=5,
                      numformer=lambda a=a, b=b: quant.int8_matmul(a, b),
                      torch_int_mm=None if ta is None else lambda a=ta, b=tb: torch._int_mm(a, b))
    m = 512
    q, x, floats = weights(SIZE, SIZE, None, 8), normal(m, SIZE), torch_linear(SIZE, SIZE)
    suite.compare(f"8 bits by row, {m} x {SIZE} x {SIZE}", 2 * m * SIZE * SIZE, "dot", rounds=5,
                  numformer=lambda: quant.linear(x, q), torch_float32=floats and (lambda: floats(x)))


def small(suite):
    for n, k in [(128, 128), (512, 128), (1536, 384)]:
        q, x, floats = weights(n, k), normal(1, k), torch_linear(n, k)
        suite.compare(f"4 bits g128, 1 x {n} x {k}", 1, None, unit="calls",
                      numformer=lambda q=q, x=x: quant.linear(x, q),
                      torch_float32=floats and (lambda floats=floats, x=x: floats(x)))


def main():
    suite = Suite("quant")
    for which in sys.argv[1:] or ["row", "rows", "int8", "small"]:
        {"row": row, "rows": rows, "int8": int8, "small": small}[which](suite)
    suite.finish()


if __name__ == "__main__":
    main()
