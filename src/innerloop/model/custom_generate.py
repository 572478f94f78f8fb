r"""Answers with the latents that this model was trained to think in, in plain transformers.

    inputs = tokenizer(["How many legs have 3 cats?" + "\n"], return_tensors="pt")
    model.generate(**inputs, max_new_tokens=64, custom_generate=FOLDER, trust_remote_code=True)

A question ends as those did in training (``question_end`` in thought.json), or is a turn of a chat, written by the
tokenizer's template (``chat``); several are padded. The thought is read into the cache, then transformers' own
``generate`` writes, with all its options. This file stands alone: it is copied into the folder of every model that
answers so, beside the settings and weights that it reads.

Shapes: `B` rows, `S` columns, `N` latents, `D` width.
"""

import copy
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from inspect import signature
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn.functional import gelu, layer_norm, linear, silu
from transformers import DynamicCache, GenerationMixin, StoppingCriteria
from transformers.utils.hub import cached_file

FILES = "custom_generate/thought.json", "custom_generate/thought.safetensors"
COPIES = "num_beams", "num_return_sequences"  # options that repeat rows


@torch.no_grad()
def generate(inputs=None, *, model, input_ids=None, attention_mask=None, **options):  # type: ignore[no-untyped-def]
    """Think, then write: what ``model.generate`` returns, without the positions of the thought."""
    asked_BS = inputs if input_ids is None else input_ids
    if asked_BS is None:
        raise ValueError("give the questions as input_ids: this model thinks after it has read them")
    s, weights = load(model)
    ids_BS, mask_BS = laid_out(asked_BS, attention_mask, s)
    options = {name: value for name, value in options.items() if value is not None}
    thought = Thought(model, s, weights, mask_BS)
    if s["thinks"]:
        copies = [options.get(name) or getattr(model.generation_config, name, 1) for name in COPIES]
        cache = thought.of(ids_BS)
        if (times := max(n or 1 for n in copies)) > 1:
            cache.batch_repeat_interleave(times)
        options["past_key_values"] = cache
    if s["suppressed"]:
        options["suppress_tokens"] = [*options.get("suppress_tokens", ()), *s["suppressed"]]
    if not {"generation_config", "max_length", "max_new_tokens"} & options.keys():
        options["max_new_tokens"] = s["max_new_tokens"]
    options.setdefault("pad_token_id", s["pad"])
    n, start = s["n_loops"] if s["decode_lora"] else 0, ids_BS.shape[1]
    with thought.weights_of(n), ending(model, options, s["n_ends"], start):
        written = GenerationMixin.generate(model, input_ids=ids_BS, attention_mask=mask_BS, **options)
    new = written if torch.is_tensor(written) else written.sequences
    asked_BS = asked_BS.to(new.device).repeat_interleave(len(new) // len(asked_BS), 0)
    new = torch.cat([asked_BS, new[:, ids_BS.shape[1] :]], dim=1)
    if torch.is_tensor(written):
        return new
    written.sequences = new
    return written


class Ends(StoppingCriteria):
    """Ends a row at its n-th end of sequence behind its prompt."""

    def __init__(self, eos_token_id: Any, n: int, start: int):
        self.eos_token_id, self.n, self.start = eos_token_id, n, start

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
        """Return which rows have ended."""
        known = torch.as_tensor(self.eos_token_id, device=input_ids.device).flatten()
        return torch.isin(input_ids[:, self.start :], known).sum(1) >= self.n


@contextmanager
def ending(model: Any, options: dict[str, Any], n: int, start: int) -> Iterator[None]:
    """Let answers have ``n`` ends of sequence: in the block the model's own settings end them at none."""
    config = model.generation_config
    kept = config.eos_token_id
    if n > 1:
        options["stopping_criteria"] = [*options.get("stopping_criteria", ()), Ends(kept, n, start)]
        config.eos_token_id = None
    try:
        yield
    finally:
        config.eos_token_id = kept


def load(model: Any) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return what the folder of a model says of its thought, and the thought's weights in the model's type."""
    paths = [cached_file(model.name_or_path, name, _raise_exceptions_for_missing_entries=False) for name in FILES]
    if None in paths:
        raise ValueError(f"{model.name_or_path} has no {' or no '.join(FILES)}: load the model from its own folder")
    return json.loads(Path(paths[0]).read_text()), {n: t.to(model.device) for n, t in load_file(paths[1]).items()}


def laid_out(asked_BS: Tensor, mask_BS: Tensor | None, s: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    """Return each question with its markers and latents around it, padded on the left, and the mask."""
    mask_BS = torch.ones_like(asked_BS) if mask_BS is None else mask_BS
    rows = [
        [*s["before"], *ids[mask.bool()].tolist(), *s["after"]]
        for ids, mask in zip(asked_BS.cpu(), mask_BS.cpu(), strict=True)
    ]
    width = max(map(len, rows))
    ids = torch.tensor([[s["pad"]] * (width - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
    return ids.to(asked_BS.device), mask.to(asked_BS.device)


class Thought:
    """Reads a row up to its thought, and the thought.

    Args:
        model: what thinks.
        s: thought.json.
        weights: of the loop.
        mask_BS: which columns are real.
    """

    def __init__(self, model: Any, s: Mapping[str, Any], weights: Mapping[str, Tensor], mask_BS: Tensor):
        self.model, self.s, self.weights, self.mask_BS = model, s, weights, mask_BS.to(model.device)
        self.embed, self.again = model.get_input_embeddings(), None
        self.takes_positions = "position_ids" in signature(model.get_decoder().forward).parameters

    def of(self, ids_BS: Tensor) -> DynamicCache:
        """Return the cache of all columns but the last few, which are read with the first token that is written."""
        s, end = self.s, ids_BS.shape[1] - self.s["n_suffix"]
        start = 0 if s["n_region"] is None else end - s["n_region"]
        embeds = self.embed(ids_BS.to(self.model.device))
        region, cache = embeds[:, start:end], DynamicCache(config=self.model.config)
        if "slots" in self.weights:
            region = region + self.weights["slots"][: region.shape[1]].to(region.dtype)
        read = self.read(embeds[:, :start], cache)[:, -1:] if start else None
        if s["scope"] == "append":
            state = self.fed_back(read, None) if s["first_state"] == "forward" else region[:, :1]
            state = self.refined(state, cache, read, appends=True)
        else:
            prefix, cache = cache, copy.deepcopy(cache)
            first = s["first_state"] == "forward"
            state = self.fed_back(self.read(region, cache), read) if first else region
            self.prefix = prefix
            self.again = embeds[:, :start] if s["prefix_kv"] == "per_iter" and start else None
            state = self.refined(state, cache, read, appends=False)
            cache = self.cache if s["answer_context"] == "kv_last" else prefix
        if s["answer_context"] == "refeed":
            with self.weights_of(s["n_loops"] if s["decode_lora"] else 0):
                self.read(state, cache)
        return cache

    @contextmanager
    def weights_of(self, t: int) -> Iterator[None]:
        """Add the low-rank weights of an iteration (1-based; 0: none) in the block."""
        entry = self.s["lora"][t - 1] if t and self.s["lora"] else None
        names = [name.removesuffix(".down") for name in self.weights if name.endswith(".down")]
        hooks = [
            self.model.get_submodule(name).register_forward_hook(partial(self.updated, name, entry))
            for name in names
            if entry is not None
        ]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def updated(self, name: str, entry: int, module: Any, given: tuple[Tensor, ...], output: Tensor) -> Tensor:
        """Return the output of a linear with an iteration's update."""
        down, up = self.weights[f"{name}.down"][entry], self.weights[f"{name}.up"][entry]
        return output + (self.s["lora_scale"] * ((given[0].to(down.dtype) @ down.T) @ up.T)).to(output.dtype)

    def refined(self, state: Tensor, cache: DynamicCache, before: Tensor | None, appends: bool) -> Tensor:
        """Return z_T; every pass reads one latent more, or all latents anew on top of the prefix."""
        first = state
        for t in range(self.s["n_loops"]):
            self.cache = cache if appends else copy.deepcopy(self.prefix)
            inputs = self.injected(state, t)
            with self.weights_of(t + 1):
                if self.again is not None:
                    self.cache = DynamicCache(config=self.model.config)
                    self.read(self.again, self.cache)
                output = self.read(inputs, self.cache)[:, inputs.shape[1] - state.shape[1] :]
            state = self.mixed(self.fed_back(output, before), first, state, t)
        return state

    def read(self, embeds: Tensor, cache: DynamicCache) -> Tensor:
        """Read embeddings on top of a cache; return their states, after or before the final norm."""
        n = cache.get_seq_length() + embeds.shape[1]
        more = self.mask_BS.new_ones(len(embeds), max(n - self.mask_BS.shape[1], 0))  # a timestep's own column
        mask = torch.cat([self.mask_BS, more], dim=1)[:, :n]
        options = {}
        if self.takes_positions:
            options["position_ids"] = (mask.cumsum(1) - 1).clamp(min=0)[:, -embeds.shape[1] :]
        decoder, seen = self.model.get_decoder(), list[Tensor]()
        hook = decoder.get_submodule(self.s["norm"]).register_forward_pre_hook(lambda _, given: seen.append(given[0]))
        try:
            out = decoder(inputs_embeds=embeds, attention_mask=mask, past_key_values=cache, use_cache=True, **options)
        finally:
            hook.remove()
        return out.last_hidden_state if self.s["is_normed"] else seen[0]

    def injected(self, state: Tensor, t: int) -> Tensor:
        """Return the input of an iteration (0-based): the state, told which one it is."""
        if "time" not in self.weights:
            return state
        e = self.weights["time"][t].to(state.dtype)
        match self.s["time_inject"]:
            case "add":
                return state + e
            case "token":
                return torch.cat([e.expand(len(state), 1, -1), state], dim=1)
        mix = self.weights["mix.weight"]
        return linear(torch.cat([state, e.expand_as(state)], dim=-1).to(mix.dtype), mix).to(state.dtype)

    def fed_back(self, output: Any, before: Tensor | None) -> Tensor:
        """Return what an output is fed as: brought to the size of embeddings, shifted, scaled."""
        fed = self.rescaled(output)
        if self.s["shift"]:
            fed = torch.cat([self.rescaled(before), fed[:, :-1]], dim=1)  # type: ignore[arg-type]
        return self.s["scale"] * fed if self.s["scale"] != 1 else fed

    def rescaled(self, output: Tensor) -> Tensor:
        """Return rho(u), mixed with the embeddings of the words that it shows where the method does that."""
        state, (alpha, beta) = self.rho(output), self.s["soft"]
        if beta == 0:
            return state if alpha == 1 else alpha * state
        shares = wide(self.model.get_output_embeddings()(state)).softmax(-1).to(state.dtype)
        table = self.embed(torch.arange(shares.shape[-1], device=state.device))
        return alpha * state + beta * (shares @ table.to(state.dtype))

    def rho(self, output: Tensor) -> Tensor:
        """Return an output as it is, at the RMS of the embeddings, or through a small network."""
        kind, w = self.s["rescale"], self.weights
        if kind == "none":
            return output
        if kind == "rms":
            return to_rms(output, w["tau"])
        u = output.to(w["inner.weight"].dtype)
        if kind == "project":
            u = linear(gelu(linear(u, w["inner.weight"], w["inner.bias"])), w["outer.weight"], w["outer.bias"])
            has_norm = "norm.weight" in w
            return (layer_norm(u, u.shape[-1:], w["norm.weight"], w["norm.bias"]) if has_norm else u).to(output.dtype)
        u = to_rms(output + linear(silu(linear(u, w["inner.weight"])), w["outer.weight"]).to(output.dtype), w["tau"])
        return u * w["gain"].to(u.dtype) if "gain" in w else u

    def mixed(self, new: Tensor, first: Tensor, previous: Tensor, t: int) -> Tensor:
        """Return z_t of an iteration (0-based)."""
        kind = self.s["residual"]
        if kind in ("none", "sum"):
            return new if kind == "none" else new + first
        if kind == "C":
            candidates = torch.stack([new, first, previous], dim=-2)
            return (self.gates(candidates) * candidates).sum(-2).to(new.dtype)
        alpha = self.weights["alpha"][t]
        return (alpha * new + (1 - alpha) * (first if kind == "A" else previous)).to(new.dtype)

    def gates(self, candidates_BN3D: Tensor) -> Tensor:
        """Return the share (B, N, 3, 1 or D) of each of three candidates."""
        w, kind = self.weights, self.s["gates"]
        first = w["key.weight" if kind == "attention" else "hidden.weight"]
        normed = layer_norm(candidates_BN3D, candidates_BN3D.shape[-1:]).to(first.dtype)
        if kind == "attention":
            keys = linear(normed, w["key.weight"], w["key.bias"])
            query = linear(normed[..., :1, :], w["query.weight"], w["query.bias"])
            scores = wide(keys @ query.transpose(-1, -2) / keys.shape[-1] ** 0.5)
            return (scores + w["shares_logit"][:, None]).softmax(-2)
        raw = linear(silu(linear(normed.flatten(-2), first, w["hidden.bias"])), w["gate.weight"], w["gate.bias"])
        raw = wide(raw.unflatten(-1, (3, -1))) + w["shares_logit"][:, None]
        return raw.sigmoid() if kind == "sigmoid" else raw.softmax(-2)


def wide(values: Tensor) -> Tensor:
    """Widen half precision to fp32."""
    return values.to(torch.promote_types(values.dtype, torch.float32))


def to_rms(states: Tensor, tau: Tensor) -> Tensor:
    """Scale states (..., D) to the RMS tau."""
    mean_square = wide(states).pow(2).mean(-1, keepdim=True).clamp(min=1e-16)
    return (wide(states) * (tau * mean_square.rsqrt())).to(states.dtype)
