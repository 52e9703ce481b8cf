"""`attn_implementation="qkernels"`: the attention of transformers models through our ops.

Importing this module registers it. The ops take ragged batches, so padding is left out and no
[B, 1, T, S] mask is made; keys and values of a `QuantizedStaticCache` are read as they are stored.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface

from ..ops.attention import attention, attention_dense
from .cache import StoredKeys, StoredValues, rows_of
from .continuous import attend_packed, is_packed
from .masks import SeenKeys, seen_keys

ATTENTION = "qkernels"

_told: set[str] = set()


class SlowAttentionWarning(UserWarning):
    """A mask, bias or head that the kernels do not take: what is done instead costs time."""


def _tell(reason: str, instead: str = "plain torch serves it, with a [B, H, T, S] tensor") -> None:
    """Warns, once per reason, of a way that is exact but slow."""
    if reason not in _told:
        _told.add(reason)
        warnings.warn(
            f"qkernels attention: {reason}: exact, but slow, as {instead}",
            SlowAttentionWarning,
            stacklevel=4,
        )


def qkernels_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor | StoredKeys,
    value: Tensor | StoredValues,
    attention_mask: SeenKeys | Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    position_bias: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention as transformers' `AttentionInterface` asks for it.

    query [B, Hq, T, D], key and value [B, Hkv, S, D] (values may have fewer dims) of one float
    dtype, or what a `QuantizedStaticCache` returned for them; Hq a multiple of Hkv. attention_mask:
    what `seen_keys` returned; a mask [B or 1, H or 1, T, S], bool (True: sees) or added to the
    scores; or None: all keys, or where is_causal (default: the module's), those up to the query's
    place (query i stands at key i). scaling: of the scores (default D ** -0.5). softcap: as in
    `qkernels.ops.attention`; s_aux [Hq]: sinks; position_bias [1 or B, Hq, T, S] is added to the
    scores. sliding_window is read where there is no mask: masks have it in them.

    Returns ([B, T, Hq, Dv], None): there are no attention weights. Tokens of padding give zeros.
    Raises ValueError for what it does not do: dropout, gradients, attention weights.
    """
    _check(module, query, key, value, dropout, s_aux, kwargs)
    scale = query.shape[-1] ** -0.5 if scaling is None else float(scaling)
    if is_packed(kwargs):
        assert isinstance(key, Tensor) and isinstance(value, Tensor)
        sinks = None if s_aux is None else s_aux.float()
        return attend_packed(
            module, query, key, value, scale, sliding_window, softcap, sinks, kwargs
        ), None
    if attention_mask is None:
        causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
        attention_mask = _unmasked(query, key, causal, sliding_window)
    scores = _Scores(scale, softcap or 0.0, s_aux, position_bias)
    if isinstance(attention_mask, Tensor):
        if attention_mask.dim() != 4:
            raise ValueError(
                "qkernels attention: attention_mask must be [B, 1, T, S], or made by transformers' "
                f"mask functions, got {list(attention_mask.shape)}"
            )
        _tell("a mask that is not causal, a window or padding, given as a tensor")
        return _plain(query, key, value, attention_mask, scores), None
    if isinstance(key, StoredKeys):
        bias = scores.distance_bias(attention_mask)
        if bias is False or attention_mask.reach >= 0 or attention_mask.packed is not None:
            _tell("a bias or mask that a cache's keys cannot be read with")
            dense = attention_mask.dense(query.device)
            return _plain(query, key, value, dense, scores), None
        return key.attend(query, attention_mask, scale, softcap or 0.0, scores.sinks, bias), None
    assert isinstance(value, Tensor)
    return _dense(query, key, value, attention_mask, scores), None


def _check(
    module: Any,
    query: Tensor,
    key: Any,
    value: Any,
    dropout: float,
    s_aux: Tensor | None,
    kwargs: dict[str, Any],
) -> None:
    if dropout:
        raise ValueError(
            f"qkernels attention has no dropout, got {dropout}: call model.eval(), set "
            "attention_dropout to 0 in the configuration, or train with "
            'model.set_attn_implementation("sdpa")'
        )
    if torch.is_grad_enabled() and any(
        x is not None and x.requires_grad for x in (query, key, value, s_aux)
    ):
        raise ValueError(
            "qkernels attention has no backward: call the model under torch.no_grad(), or train "
            'with model.set_attn_implementation("sdpa")'
        )
    if kwargs.get("output_attentions"):
        raise ValueError(
            "qkernels attention has no attention weights to return (output_attentions=True): use "
            'model.set_attn_implementation("eager")'
        )
    if kwargs.get("head_mask") is not None:
        raise ValueError(
            'qkernels attention takes no head_mask: use model.set_attn_implementation("eager")'
        )


def _unmasked(query: Tensor, key: Any, causal: bool, window: int | None) -> SeenKeys:
    """Without a mask: as transformers' sdpa, whose causal queries stand at the first keys, unless
    there is one only, which sees them all."""
    batch, _, queries, _ = query.shape
    keys = key.shape[2]
    causal = causal and queries > 1
    if isinstance(key, StoredKeys):
        raise ValueError(
            "qkernels attention: a QuantizedStaticCache needs the mask that transformers makes for "
            'attn_implementation="qkernels", and this model gave none'
        )
    offset = 0 if causal else keys - queries
    window = window or 0 if causal else 0
    return SeenKeys((batch, queries, keys), causal=causal, window=window, offset=offset)


class _Scores:
    """What is done to scores besides masking."""

    def __init__(
        self, scale: float, softcap: float, s_aux: Tensor | None, bias: Tensor | None
    ) -> None:
        self.scale, self.softcap, self.bias = scale, softcap, bias
        self.sinks = None if s_aux is None else s_aux.float().contiguous()

    def distance_bias(self, seen: SeenKeys) -> Any:
        """The bias as one number per head and distance, [Hq, 2 reach + 1] float32; None if there is
        none, False if it is no function of the distance."""
        if self.bias is None:
            return None
        # T5 computes its bias once and gives the same tensor to all layers.
        kept = getattr(self.bias, "_qkernels_distance_bias", None)
        if kept is None:
            kept = (by_distance(self.bias, int(seen.offset)),)
            self.bias._qkernels_distance_bias = kept  # type: ignore[attr-defined]
        return kept[0]


def by_distance(bias: Tensor, offset: int) -> Any:
    """bias [1, H, T, S], query i standing at key i + offset -> [H, 2 reach + 1] float32, entry
    reach + d for the distance d = key - query; None if it is 0 throughout, False if it depends on
    more than the distance."""
    if bias.dim() != 4 or bias.shape[0] != 1:
        return False
    if not bool(bias.any()):
        return None
    if not torch.equal(bias[..., 1:, 1:], bias[..., :-1, :-1]):
        return False
    heads, queries, keys = bias.shape[1:]
    # Distances rise down the first column backwards, and then along the first row.
    values = torch.cat((bias[0, :, :, 0].flip(1), bias[0, :, 0, 1:]), dim=1).float()
    first, last = -(offset + queries - 1), keys - 1 - offset
    reach = max(-first, last, 0)
    out = values.new_zeros(heads, 2 * reach + 1)
    out[:, reach + first : reach + last + 1] = values
    return out


# ---- dense keys ----


def _dense(q: Tensor, k: Tensor, v: Tensor, seen: SeenKeys, scores: _Scores) -> Tensor:
    """[B, Hq, T, D] on [B, Hkv, S, D] -> [B, T, Hq, Dv]."""
    queries, dim = q.shape[2:]
    keys, v_dim = k.shape[2], v.shape[3]
    if keys < seen.keys and not (seen.causal and keys >= int(seen.offset) + queries):
        raise ValueError(
            f"qkernels attention: the mask is for {seen.keys} keys, the model gave {keys}"
        )
    bias = scores.distance_bias(seen)
    if seen.reach >= 0 and bias is None:
        bias = _reach_bias(q, seen.reach)
    # Padding in between changes distances; on the sides it does not.
    placed = seen.window > 0 or bias is not None
    if bias is False or (seen.reach >= 0 and scores.bias is not None):
        _tell("a bias that is no function of the distance alone")
        return _plain(q, k, v, seen.dense(q.device), scores)
    if placed and seen.valid is not None and not seen.kept("sided", lambda: _sided(seen)):
        _tell("padding between the tokens of a sequence, with a window or bias")
        return _plain(q, k, v, seen.dense(q.device), scores)
    if dim % 16 or v_dim != dim:
        wide = -(-max(dim, v_dim) // 16) * 16
        if dim % 16:
            _tell(f"heads of {dim} dims", f"they are copied into {wide}")
        q, k, v = (_widened(x, wide) for x in (q, k, v))
    options: dict[str, Any] = {
        "scale": scores.scale,
        "causal": seen.causal,
        "window": seen.window,
        "softcap": scores.softcap,
        "sinks": scores.sinks,
        "distance_bias": bias,
    }
    if seen.packed is not None:
        out = _packed(q, k, v, seen, options)
    elif seen.valid is None:
        out = _unpadded(q, k, v, seen, options)
    else:
        out = _padded(q, k, v, seen, placed, options)
    return out if out.shape[3] == v_dim else out[..., :v_dim]


def _widened(x: Tensor, dim: int) -> Tensor:
    return torch.nn.functional.pad(x, (0, dim - x.shape[3])) if x.shape[3] < dim else x


def _reach_bias(q: Tensor, reach: int) -> Tensor:
    """A window to both sides: distances beyond reach weigh nothing. The op takes its end entries
    for all distances further out."""
    bias = torch.zeros(q.shape[1], 2 * reach + 3, device=q.device)
    bias[:, [0, -1]] = -torch.inf
    return bias


def _sided(seen: SeenKeys) -> bool:
    """Whether the valid keys of every sequence stand in one run."""
    assert seen.valid is not None
    starts = seen.valid[:, 1:] & ~seen.valid[:, :-1]
    return bool((starts.sum(1) + seen.valid[:, 0] <= 1).all())


def _starts(count: int, step: int, device: torch.device) -> Tensor:
    return torch.arange(count + 1, dtype=torch.int32, device=device) * step


def _unpadded(q: Tensor, k: Tensor, v: Tensor, seen: SeenKeys, options: dict[str, Any]) -> Tensor:
    batch, heads, queries, dim = q.shape
    keys = k.shape[2]
    end = seen.offset + queries if seen.causal else keys
    in_pages = keys % 16 == 0 and k.is_contiguous() and v.is_contiguous()
    if seen.causal and in_pages and (isinstance(end, Tensor) or end < keys):
        # A static cache: each sequence is one page, of which so many tokens are there.
        kv_len = torch.zeros(batch, dtype=torch.int32, device=q.device) + end
        table = torch.arange(batch, dtype=torch.int32, device=q.device)[:, None]
        starts = _starts(batch, queries, q.device)
        out = attention(rows_of(q), starts, kv_len.int(), table, k, v, **options)
        return out.view(batch, queries, heads, dim)
    end = int(end)
    if end < keys:
        k, v = k[:, :, :end], v[:, :, :end]
    starts, kv_starts = seen.kept(
        "starts", lambda: (_starts(batch, queries, q.device), _starts(batch, end, q.device))
    )
    out = attention_dense(rows_of(q), rows_of(k), rows_of(v), starts, kv_starts, **options)
    return out.view(batch, queries, heads, dim)


def _packed(q: Tensor, k: Tensor, v: Tensor, seen: SeenKeys, options: dict[str, Any]) -> Tensor:
    def boundaries() -> Tensor:
        assert seen.packed is not None
        new = torch.nn.functional.pad(seen.packed.diff(dim=1) != 0, (1, 0), value=True)
        ends = new.new_ones(1)
        return torch.cat((new.flatten(), ends)).nonzero().flatten().int()

    starts = seen.kept("starts", boundaries)
    out = attention_dense(rows_of(q), rows_of(k), rows_of(v), starts, starts, **options)
    return out.view(q.shape[0], q.shape[2], q.shape[1], q.shape[3])


def _padded(
    q: Tensor, k: Tensor, v: Tensor, seen: SeenKeys, placed: bool, options: dict[str, Any]
) -> Tensor:
    """Rows of padding are left out of keys, and, where the place of a query matters, of queries."""
    batch, heads, queries, dim = q.shape

    def kept_rows(valid: Tensor) -> tuple[Tensor, Tensor]:
        counts = valid.sum(1).cumsum(0, dtype=torch.int32)
        return valid.flatten().nonzero().flatten(), torch.nn.functional.pad(counts, (1, 0))

    def kept_keys() -> tuple[Tensor, Tensor]:
        valid = seen.valid
        assert valid is not None
        valid = valid[:, : k.shape[2]]
        if seen.causal:  # later ones may hold anything
            valid = valid & (torch.arange(valid.shape[1], device=q.device) < seen.offset + queries)
        return kept_rows(valid)

    def kept_queries() -> tuple[Tensor, Tensor] | None:
        if not (placed or seen.causal) or (queries == 1 and not placed):
            return None
        assert seen.valid is not None
        offset = int(seen.offset)
        new = seen.valid[:, offset : offset + queries]
        return None if bool(new.all()) else kept_rows(new)

    k_rows, kv_starts = seen.kept("keys", kept_keys)
    found = seen.kept("queries", kept_queries)
    q_rows = rows_of(q)
    starts = _starts(batch, queries, q.device) if found is None else found[1]
    if found is not None:
        q_rows = q_rows[found[0]]
    k, v = (x.transpose(1, 2).reshape(-1, x.shape[1], dim)[k_rows] for x in (k, v))
    out = attention_dense(q_rows, k, v, starts, kv_starts, **options)
    if found is not None:
        whole = out.new_zeros(batch * queries, heads, dim)
        out = whole.index_copy_(0, found[0], out)
    return out.view(batch, queries, heads, dim)


# ---- any mask, in plain torch ----


def _plain(
    q: Tensor, k: Tensor | StoredKeys, v: Tensor | StoredValues, mask: Tensor, scores: _Scores
) -> Tensor:
    """Attention with a mask [B or 1, H or 1, T, S], bool or added; computed in float32."""
    if isinstance(k, StoredKeys):
        assert isinstance(v, StoredValues)
        k, v = k.write_padded(), v.read()
    assert isinstance(v, Tensor)
    mask = mask[..., : k.shape[2]]
    group = q.shape[1] // k.shape[1]
    k32, v32 = (x.float().repeat_interleave(group, 1) for x in (k, v))
    out = q.float() @ k32.transpose(2, 3) * scores.scale
    if scores.softcap > 0:
        out = scores.softcap * torch.tanh(out / scores.softcap)
    if scores.bias is not None:
        out = out + scores.bias[..., : k.shape[2]].float()
    out = out.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else out + mask.float()
    nothing = (out == -torch.inf).all(-1, keepdim=True)
    if scores.sinks is not None:
        sinks = scores.sinks[:, None, None].expand(*out.shape[:3], 1)
        out = torch.cat((out, sinks), dim=-1)
    weights = torch.softmax(out, dim=-1)[..., : k.shape[2]].masked_fill(nothing, 0.0)
    return (weights @ v32).to(q.dtype).transpose(1, 2).contiguous()


AttentionInterface.register(ATTENTION, qkernels_attention)
AttentionMaskInterface.register(ATTENTION, seen_keys)
