"""Decoders written out slowly, from the authors' tensors alone: one row, no cache, no padding.

Shapes: `L` positions, `D` width, `H` heads, `E` width of a head, `V` vocabulary.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import gelu, layer_norm, silu, softmax


def rms(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x * (x.square().mean(-1, keepdim=True) + eps).rsqrt() * weight


def turned(x_LHE: Tensor, theta: float) -> Tensor:
    """Rotate the first half of each head against the second, by positions."""
    half = x_LHE.shape[-1] // 2
    angles = torch.arange(len(x_LHE))[:, None] / theta ** (torch.arange(half) / half)
    cos, sin = angles.cos()[:, None], angles.sin()[:, None]
    a, b = x_LHE[..., :half], x_LHE[..., half:]
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)


def attend(q_LHE: Tensor, k_LHE: Tensor, v_LHE: Tensor, sees_LL: Tensor) -> Tensor:
    """Return what each position reads of those that it sees (L, H E)."""
    k_LHE, v_LHE = (one.repeat_interleave(q_LHE.shape[1] // one.shape[1], 1) for one in (k_LHE, v_LHE))
    scores = torch.einsum("qhe,khe->hqk", q_LHE, k_LHE) / q_LHE.shape[-1] ** 0.5
    shares = softmax(scores.masked_fill(~sees_LL, -torch.inf), -1)
    return torch.einsum("hqk,khe->qhe", shares, v_LHE).flatten(1)


def sees_past(n: int) -> Tensor:
    return torch.ones(n, n, dtype=torch.bool).tril()


def sees_all(n: int) -> Tensor:
    return torch.ones(n, n, dtype=torch.bool)


def gated(x: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
    return (silu(x @ gate.T) * (x @ up.T)) @ down.T


def qwen(w: dict[str, Tensor], x: Tensor, n_heads: int, theta: float, sees_LL: Tensor, eps: float = 1e-6) -> Tensor:
    """Return the states (L, D) after the final norm of input embeddings: a Llama, Qwen2 or Qwen3 by its own names."""
    for i in range(1 + max(int(name.split(".")[2]) for name in w if name.startswith("model.layers."))):
        x = qwen_layer(w, f"model.layers.{i}", x, n_heads, theta, sees_LL, eps)
    return rms(x, w["model.norm.weight"], eps)


def qwen_layer(w, at: str, x: Tensor, n_heads: int, theta: float, sees_LL: Tensor, eps: float) -> Tensor:
    heads = {}
    h = rms(x, w[f"{at}.input_layernorm.weight"], eps)
    size = w[f"{at}.self_attn.q_proj.weight"].shape[0] // n_heads
    for name in "qkv":
        own = h @ w[f"{at}.self_attn.{name}_proj.weight"].T + w.get(f"{at}.self_attn.{name}_proj.bias", 0.0)
        heads[name] = own.unflatten(-1, (-1, size))
        if f"{at}.self_attn.{name}_norm.weight" in w:
            heads[name] = rms(heads[name], w[f"{at}.self_attn.{name}_norm.weight"], eps)
    read = attend(turned(heads["q"], theta), turned(heads["k"], theta), heads["v"], sees_LL)
    x = x + read @ w[f"{at}.self_attn.o_proj.weight"].T
    mlp = [w[f"{at}.mlp.{name}_proj.weight"] for name in ("gate", "up", "down")]
    return x + gated(rms(x, w[f"{at}.post_attention_layernorm.weight"], eps), *mlp)


def gpt2(w: dict[str, Tensor], x: Tensor, n_heads: int, sees_LL: Tensor) -> Tensor:
    """Return the states (L, D) after the final norm of input embeddings (L, D): a GPT-2 by its own names."""
    n_layers = 1 + max(int(name.split(".")[2]) for name in w if name.startswith("transformer.h."))
    x = x + w["transformer.wpe.weight"][: len(x)]
    for i in range(n_layers):
        at = lambda name, i=i: w[f"transformer.h.{i}.{name}"]  # noqa: E731
        norm = lambda x, name: layer_norm(x, x.shape[-1:], at(f"{name}.weight"), at(f"{name}.bias"))  # noqa: B023, E731
        linear = lambda x, name: x @ at(f"{name}.weight") + at(f"{name}.bias")  # noqa: B023, E731
        q, k, v = (one.unflatten(-1, (n_heads, -1)) for one in linear(norm(x, "ln_1"), "attn.c_attn").chunk(3, -1))
        x = x + linear(attend(q, k, v, sees_LL), "attn.c_proj")
        x = x + linear(gelu(linear(norm(x, "ln_2"), "mlp.c_fc"), approximate="tanh"), "mlp.c_proj")
    return layer_norm(x, x.shape[-1:], w["transformer.ln_f.weight"], w["transformer.ln_f.bias"])


def projected(w: dict[str, Tensor], names: tuple[str, str, str], x: Tensor) -> Tensor:
    """Linear, GELU, Linear, LayerNorm."""
    first, second, norm = ({end: w[f"{name}.{end}"] for end in ("weight", "bias")} for name in names)
    x = gelu(x @ first["weight"].T + first["bias"]) @ second["weight"].T + second["bias"]
    return layer_norm(x, x.shape[-1:], norm["weight"], norm["bias"])


Predict = Callable[[list[int]], Tensor]
"""The logits (L, V) of a row of ids."""


def fill(predict: Predict, prompt: list[int], n: int, mask: int, block: int, rank: str, counts=None) -> list[int]:
    """Fill ``n`` masks behind a prompt, the surest of the leftmost unfinished block first; no mask is written.

    ``rank`` is confidence or entropy; ``counts`` says how many each pass fills, by default one.
    """
    x = [*prompt, *[mask] * n]
    for start in range(len(prompt), len(x), block):
        for count in counts or [1] * block:
            left = [i for i in range(start, start + block) if x[i] == mask]
            logits = predict(x)
            logits[:, mask] = -torch.inf
            p = softmax(logits.double(), -1)
            sure = p.amax(-1) if rank == "confidence" else torch.special.xlogy(p, p).sum(-1)
            for best in sorted(left, key=lambda i: -float(sure[i]))[:count]:
                x[best] = int(logits[best].argmax())
    return x[len(prompt) :]


def cut(ids: list[int], end: int) -> list[int]:
    """Return ids up to the end of sequence, and that."""
    return ids[: ids.index(end) + 1] if end in ids else ids
