"""The machine's part of the benchmark: how fast weights can be read at all, and how long the bare matrix products take.

"Bare products" are NumPy's, with all of BLAS's threads: every weight's product in the shapes of the work, one for each
expert with the tokens spread evenly; no attention scores, no norms, no gathering. For training the forward's, and two
more of that size for each: the gradients of input and weight.
"""

from collections.abc import Iterator

import numpy as np

from minglm.api import Model, load
from minglm.bench.job import Answer, Job, median_seconds
from minglm.bench.machine import matrix_megabytes
from minglm.fast.measure import read_bandwidth
from minglm.fast.team import cores
from minglm.model.ops import Array
from minglm.model.params import Moe, expert
from minglm.model.transformer import head_weight


def run(job: Job) -> Answer:
    if job.subject == "bandwidth":
        rate = read_bandwidth(matrix_megabytes(), cores(), bfloat16=job.dtype == "bfloat16", runs=10)
        return {"seconds": {"": {"byte": 1 / rate}}}
    products = _Products(load(job.folder, job.dtype), job)
    return {"seconds": {"": {"unit": median_seconds(products, job.units, job.budget)}}}


class _Products:
    """All products of one unit of work. Calling it computes them, into arrays made before; inputs never change, so that
    no number runs away."""

    def __init__(self, model: Model, job: Job):
        self._train = job.work == "train"
        N = job.rows * job.prompt if self._train else job.prompt
        self._all = list(_products(model, N, N if self._train else 1))
        self._given: dict[tuple[int, int], Array] = {}
        self._found: dict[tuple[int, int], Array] = {}
        for weight, rows in self._all:
            out, inner = weight.shape
            for shape in ((rows, inner), (rows, out)):
                self._given.setdefault(shape, np.full(shape, 0.01, np.float32))
                self._found.setdefault(shape, np.zeros(shape, np.float32))
            if self._train:
                self._found.setdefault((out, inner), np.zeros((out, inner), np.float32))

    def __call__(self) -> None:
        for weight, rows in self._all:
            out, inner = weight.shape
            np.matmul(self._given[rows, inner], weight.T, out=self._found[rows, out])  # x [rows, inner] -> [rows, out]
        for weight, rows in self._all[::-1] if self._train else ():
            out, inner = weight.shape
            dy, x = self._given[rows, out], self._given[rows, inner]
            np.matmul(dy.T, x, out=self._found[out, inner])  # the weight's gradient
            np.matmul(dy, weight, out=self._found[rows, inner])  # the input's


def _products(model: Model, N: int, head_rows: int) -> Iterator[tuple[Array, int]]:
    """(weight, rows) of each product of a forward pass over N tokens."""
    c = model.config
    for layer in model.params.layers:
        attention, mlp = layer.self_attn, layer.mlp
        for linear in (attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj):
            yield linear.weight, N
        shared = mlp.shared_experts if isinstance(mlp, Moe) else mlp
        for part in shared or ():
            yield part.weight, N
        if isinstance(mlp, Moe):
            yield mlp.gate.weight, N
            for e in range(c.n_routed_experts):
                for matrix in expert(mlp.experts, e):
                    yield matrix, max(1, N * c.num_experts_per_tok // c.n_routed_experts)
    yield head_weight(model.params), head_rows
