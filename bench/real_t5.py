"""A real T5 for the benchmarks and tests: flan-t5-small, fine-tuned, from its INT8 ONNX files.

The package traceforge-title-model holds an encoder and a decoder that were quantized with one scale
per matrix. Their values are decoded exactly and put into transformers' T5ForConditionalGeneration.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import torch
from real_models import Missing, package_folder

# The module of a node is its name without these. The encoder's graph begins with "enc", the
# decoder's with "m"; both name modules as transformers does.
_NODE = re.compile(r"/(?P<module>.+)/MatMul_quant")


def t5() -> tuple[Any, Any]:
    """(T5ForConditionalGeneration in float32, tokenizer) of traceforge-title-model.

    Raises Missing if the package, or the onnx package that reads it, is not here, and for a file
    that is not such a model.
    """
    from transformers import PreTrainedTokenizerFast, T5Config, T5ForConditionalGeneration

    folder = package_folder("traceforge_title_model", "0.2.0") / "data" / "span"
    state = {**_state(folder / "encoder.onnx"), **_state(folder / "decoder.onnx")}
    blocks = 1 + max(int(n.split(".")[2]) for n in state if n.startswith("encoder.block."))
    vocab, hidden = state["shared.weight"].shape
    buckets, heads = state[_BIAS.format("encoder")].shape
    inner = state["encoder.block.0.layer.0.SelfAttention.q.weight"].shape[0]
    config = T5Config(
        vocab_size=vocab,
        d_model=hidden,
        d_kv=inner // heads,
        d_ff=state["encoder.block.0.layer.1.DenseReluDense.wo.weight"].shape[1],
        num_layers=blocks,
        num_decoder_layers=blocks,
        num_heads=heads,
        relative_attention_num_buckets=buckets,
        feed_forward_proj="gated-gelu",
        tie_word_embeddings=False,
        decoder_start_token_id=0,
        pad_token_id=0,
        eos_token_id=1,
    )
    with torch.device("meta"):
        model = T5ForConditionalGeneration(config)
    wrong = model.load_state_dict(state, strict=False, assign=True)
    # Three of its tables are one. Its head is a matrix of its own, and stays one.
    embeddings = {"encoder.embed_tokens.weight", "decoder.embed_tokens.weight"}
    model.encoder.embed_tokens.weight = model.shared.weight
    model.decoder.embed_tokens.weight = model.shared.weight
    if set(wrong.missing_keys) - embeddings or wrong.unexpected_keys:
        raise Missing(f"{folder}: the weights are not those of T5: {wrong}")
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_file=str(folder / "tokenizer.json"),
        eos_token="</s>",
        unk_token="<unk>",
        pad_token="<pad>",
    )
    tokenizer.backend_tokenizer.no_truncation()  # the file cuts at the 48 tokens of its own task
    return model.eval(), tokenizer


_BIAS = "{}.block.0.layer.0.SelfAttention.relative_attention_bias.weight"


def _state(path: Path) -> dict[str, torch.Tensor]:
    """The parameters of one file, by their names in transformers, float32."""
    try:
        import onnx
        from onnx import numpy_helper
    except ImportError as error:
        raise Missing("onnx is not here: pip install onnx") from error
    graph = onnx.load(str(path)).graph
    values = {i.name: numpy_helper.to_array(i) for i in graph.initializer}

    def decoded(quantized: str) -> torch.Tensor:
        name = quantized.removesuffix("_quantized")
        codes = values[quantized].astype(np.int32) - values[f"{name}_zero_point"].astype(np.int32)
        return torch.from_numpy(codes.astype(np.float32) * values[f"{name}_scale"])

    state = {
        _module(name.removesuffix(".weight")) + ".weight": torch.from_numpy(tensor.copy())
        for name, tensor in values.items()
        if name.endswith("norm.weight")
    }
    # Tables keep the name of their parameter. That of the embeddings is in both files.
    for name in values:
        if name.endswith(".weight_quantized") and name != "enc.embed_tokens.weight_quantized":
            state[_module(name.removesuffix(".weight_quantized")) + ".weight"] = decoded(name)
    for node in graph.node:  # matrices do not, but their node has that of the module
        found = _NODE.fullmatch(node.name)
        if node.op_type == "MatMulInteger" and found and node.input[1] in values:
            name = _module(found["module"].replace("/", "."))
            state[f"{name}.weight"] = decoded(node.input[1]).t().contiguous()
    return state


def _module(name: str) -> str:
    return re.sub(r"^m\.", "", re.sub(r"^enc\.", "encoder.", name))
