"""Kernels of the ops on rows and of packed weights as tables, as GPUs get them: what tests compile
ahead of time."""

from __future__ import annotations

from typing import Any

from qkernels.triton import embedding, gate, norm, pack, quantize_act, sample

MULTIPLES = ("k", "group", "x_stride", "residual_stride", "gate_stride", "up_stride", "stride")


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
        # As tensors and shapes mostly are.
        "aligned": [a for a, kind in run_time.items() if kind[0] == "*" or a in MULTIPLES],
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
        )
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
        )
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
            )
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
        )
    )
    given = {"x": "*bf16", "residual": "*bf16", "weight": "*fp32", "bias": None}
    sizes = {"x_stride": "i32", "residual_stride": "i32", "eps": "fp32"}
    for r, block, warps in ((16, 64, 4), (1, 4096, 4), (1, 16384, 16)):
        shape = {"R": r, "BLOCK": block}
        cases += [
            case(
                f"add_norm {block}",
                norm.norm_kernel,
                warps,
                **given,
                y="*bf16",
                sum="*bf16",
                m="i32",
                k="i32",
                **sizes,
                CENTER=block == 64,
                **shape,
            ),
            case(
                f"add_norm_quant {block}",
                norm.norm_quant_kernel,
                warps,
                **given,
                **ACT,
                sum="*bf16",
                m="i32",
                k="i32",
                groups="i32",
                **sizes,
                CENTER=False,
                GROUP=32,
                **shape,
            ),
        ]
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
        )
    )
    return cases


def tables() -> list[dict[str, Any]]:
    kinds: list[tuple[int, str, str, float, str | None]] = [
        # bits, scale, zero, middle, table
        (8, "float32", "symmetric", 128.0, None),
        (6, "int8", "symmetric", 32.0, None),
        (5, "int8", "minimum", 0.0, None),
        (4, "float16", "symmetric", 8.0, None),
        (4, "e8m0", "symmetric", 0.0, "*i8"),
        (4, "e4m3", "symmetric", 0.0, "*i8"),
        (3, "bfloat16", "integer", 4.0, None),
        (2, "uint4", "minimum", 0.0, None),
    ]
    cases = []
    for bits, scale, zero, middle, table in kinds:
        flat = {"float32": "*fp32", "float16": "*fp16", "bfloat16": "*i16", "int8": "*i8"}
        stored = flat.get(scale, "*u8")
        two_level = scale in ("int8", "uint4")
        zeros = {"symmetric": None, "integer": "*u8", "minimum": stored}
        weight = {
            "codes": "*u8",
            "scale": stored,
            "zero": None if scale == "uint4" else zeros[zero],
            "block_scale": "*fp16" if two_level else None,
            "block_zero": "*fp16" if two_level and zero == "minimum" else None,
            "table": table,
        }
        sizes = {"n": "i32", "k": "i32", "units": "i32", "group_units": "i32", "chunks": "i32"}
        kind = {"BITS": bits, "SCALE": scale, "ZERO": zero, "MIDDLE": middle}
        name = f"W{bits} {scale} {zero}"
        cases += [
            case(
                f"dequantize {name}",
                pack.dequantize_kernel,
                **weight,
                out="*bf16",
                **sizes,
                **kind,
                U=4,
            ),
            case(
                f"embedding {name}",
                embedding.embedding_kernel,
                ids="*i64",
                **weight,
                y="*fp16",
                multiplier="fp32",
                **sizes,
                **kind,
                U=64,
            ),
        ]
    for bits in (2, 3, 4, 5, 6, 8):
        sizes = {"n": "i32", "k": "i32", "units": "i32", "chunks": "i32", "BITS": bits, "U": 4}
        cases += [
            case(f"unpack W{bits}", pack.unpack_kernel, codes="*u8", out="*u8", **sizes),
            case(
                f"pack W{bits}", pack.pack_kernel, codes="*u8", packed="*u8", seen="*i32", **sizes
            ),
        ]
    return cases


def samples() -> list[dict[str, Any]]:
    return [
        case(
            f"sample {tiles * 4096}",
            sample.sample_kernel,
            16,
            logits="*fp32",
            temperature="*fp32",
            top_k="*i32",
            top_p="*fp32",
            min_p="*fp32",
            seed="*i64",
            offset="*i64",
            e="*fp32",
            listed="*fp32",
            listed_e="*fp32",
            out="*i64",
            vocab="i32",
            stride="i32",
            BLOCK=4096,
            LIST=4096,
            P=4,
            TILES=tiles,
        )
        for tiles in (1, 32)
    ]


def cases() -> list[dict[str, Any]]:
    return rows() + tables() + samples()
