"""Kernels of the ops on rows and of packed weights as tables, as GPUs get them: what tests compile
ahead of time."""

from __future__ import annotations

from typing import Any

from qkernels.triton import gate, norm, quantize_act


def case(name: str, kernel: Any, warps: int = 4, **arguments: Any) -> dict[str, Any]:
    """arguments: of the kernel, in its order: a type ("*fp16", "i32"), else the constant it is."""
    assert list(arguments) == kernel.arg_names, (name, kernel.arg_names)
    run_time = {
        argument: kind
        for argument, kind in arguments.items()
        if isinstance(kind, str) and (kind[0] == "*" or kind in ("i32", "i64", "fp32"))
    }
    return {
        "name": name,
        "kernel": kernel,
        "signature": {argument: run_time.get(argument, "constexpr") for argument in arguments},
        "constexprs": {a: kind for a, kind in arguments.items() if a not in run_time},
        "options": {"num_warps": warps, "enable_fp_fusion": False},
        "matrix": False,
    }


ACT = {"codes": "*i8", "scale": "*fp32", "sums": "*i16"}


def rows() -> list[dict[str, Any]]:
    quantize = {"x_stride": "i32", "k": "i32", "groups": "i32"}
    cases = [
        case(
            f"quantize_act {p} x {g}",
            quantize_act.quantize_act_kernel,
            warps,
            x="*bf16",
            **ACT,
            **quantize,
            blocks="i32",
            GROUP=group,
            P=p,
            G=g,
        )  # fmt: skip
        for group, p, g, warps in ((32, 32, 32, 4), (48, 64, 16, 4), (14336, 16384, 1, 16))
    ]
    cases.append(
        case(
            "quantize_act loop",
            quantize_act.quantize_act_loop_kernel,
            8,
            x="*fp16",
            **ACT,
            **quantize,
            group="i32",
            BLOCK=4096,
        )  # fmt: skip
    )
    strides = {"gate_stride": "i32", "up_stride": "i32", "k": "i32"}
    for activation in ("silu", "gelu_tanh", "gelu_erf", "relu"):
        cases.append(
            case(
                f"gate {activation}",
                gate.gate_kernel,
                gate="*bf16",
                up="*bf16",
                y="*bf16",
                **strides,
                blocks="i32",
                ACTIVATION=activation,
                BLOCK=1024,
            )  # fmt: skip
        )
    cases.append(
        case(
            "gate_quant silu",
            gate.gate_quant_kernel,
            gate="*fp16",
            up="*fp16",
            **ACT,
            **strides,
            groups="i32",
            blocks="i32",
            ACTIVATION="silu",
            GROUP=32,
            P=32,
            G=32,
        )  # fmt: skip
    )
    given = {"x": "*bf16", "residual": "*bf16", "weight": "*fp32", "bias": None}
    sizes = {"x_stride": "i32", "residual_stride": "i32", "eps": "fp32"}
    for r, block, warps in ((16, 64, 4), (1, 4096, 4), (1, 16384, 16)):
        shape = {"R": r, "BLOCK": block}
        cases += [
            case(
                f"add_norm {block}", norm.norm_kernel, warps, **given, y="*bf16", sum="*bf16",
                m="i32", k="i32", **sizes, CENTER=block == 64, **shape,
            ),
            case(
                f"add_norm_quant {block}", norm.norm_quant_kernel, warps, **given, **ACT,
                sum="*bf16", m="i32", k="i32", groups="i32", **sizes, CENTER=False, GROUP=32,
                **shape,
            ),
        ]  # fmt: skip
    cases.append(
        case(
            "norm loop",
            norm.norm_loop_kernel,
            8,
            **{**given, "bias": "*fp32"},
            y="*bf16",
            sum="*bf16",
            k="i32",
            **sizes,
            CENTER=True,
            BLOCK=4096,
        )  # fmt: skip
    )
    return cases


def cases() -> list[dict[str, Any]]:
    return rows()
