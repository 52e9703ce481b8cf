"""A whole decode step as one op: see `qkernels/nn/executor.py`, which builds plans, and
csrc/cpu/decoder_step.cpp.
"""

from __future__ import annotations

import torch

from qkernels.ops import checks
from qkernels.ops.registry import define


def _step_fake(
    plan: int,
    ids: torch.Tensor,
    query_start: torch.Tensor,
    kv_len: torch.Tensor,
    page_table: torch.Tensor,
    select: torch.Tensor,
    vocab: int,
    k_pages: torch.Tensor,
    v_pages: torch.Tensor,
    k_scale: torch.Tensor | None = None,
    v_scale: torch.Tensor | None = None,
) -> torch.Tensor:
    op = "decoder_step"
    if ids.is_floating_point():  # a program with an input
        checks.expect(op, "ids", ids, torch.float32, [-1, -1])
    else:
        checks.expect(op, "ids", ids, torch.int64, [-1])
    checks.expect(op, "select", select, torch.int64, [-1])
    checks.same_device(
        op,
        "ids",
        ids.device,
        query_start=query_start,
        kv_len=kv_len,
        page_table=page_table,
        select=select,
        k_pages=k_pages,
        v_pages=v_pages,
        k_scale=k_scale,
        v_scale=v_scale,
    )
    return select.new_empty((select.shape[0], vocab), dtype=torch.float32)


# tensors: six entries per packed weight (codes, scale, zero, block_scale, block_zero, table), one
# per vector. registers: width and activation group of each. Returns a handle that keeps the tensors
# alive until it is freed.
define(
    "decoder_plan",
    "(Tensor?[] tensors, int[] registers, int[] code, float[] numbers) -> int",
    fake=None,
)
define("decoder_plan_free", "(int plan) -> ()", fake=None)
define(
    "decoder_step",
    "(int plan, Tensor ids, Tensor query_start, Tensor kv_len, Tensor page_table, Tensor select, "
    "int vocab, Tensor(a!) k_pages, Tensor(b!) v_pages, Tensor(c!)? k_scale, "
    "Tensor(d!)? v_scale) -> Tensor",
    fake=_step_fake,
)
