"""Ouro and Huginn as released, against decoders written out from the authors' tensors."""

from dataclasses import replace

import pytest
import torch
from torch.nn.functional import silu

from innerloop import LatentModel, Looped, ParScale, RecurrentDepth
from tests.formats import authors_depth, plain
from tests.formats.authors import HEADS, KV_HEADS, LAYERS, WIDTH
from tests.formats.proved import QUESTIONS, check_decoder

pytestmark = pytest.mark.filterwarnings("ignore::innerloop.errors.InputNote")


def ouro_states(w, ids, n_loops=4):
    """The state after each iteration."""
    x, sees, found = w["model.embed_tokens.weight"][ids], plain.sees_past(len(ids)), []
    rms = lambda x, name: plain.rms(x, w[f"{name}.weight"], 1e-6)  # noqa: E731
    for _ in range(n_loops):
        for i in range(LAYERS):
            at = f"model.layers.{i}"
            h = rms(x, f"{at}.input_layernorm")
            heads = {n: (h @ w[f"{at}.self_attn.{n}_proj.weight"].T).unflatten(-1, (-1, WIDTH // HEADS)) for n in "qkv"}
            q, k = (plain.turned(heads[n], 700.0) for n in "qk")
            read = plain.attend(q, k, heads["v"], sees) @ w[f"{at}.self_attn.o_proj.weight"].T
            x = x + rms(read, f"{at}.input_layernorm_2")
            mlp = [w[f"{at}.mlp.{name}_proj.weight"] for name in ("gate", "up", "down")]
            added = plain.gated(rms(x, f"{at}.post_attention_layernorm"), *mlp)
            x = x + rms(added, f"{at}.post_attention_layernorm_2")
        x = rms(x, "model.norm")
        found.append(x)
    return found


def test_ouro_runs_its_layers_and_norms_four_times(tmp_path):
    w = authors_depth.ouro(tmp_path / "Ouro-1.4B")
    model = LatentModel.from_pretrained(tmp_path / "Ouro-1.4B", device="cpu")
    assert model.method == Looped(max_loops=4, sandwich=True, loop={"site": "post_norm"})
    check_decoder(model, lambda ids: ouro_states(w, ids)[-1] @ w["lm_head.weight"].T)


def exits_of(w, states, threshold):
    """The iteration, from 0, whose state each token shows."""
    gate, bias = (w[f"model.early_exit_gate.{end}"] for end in ("weight", "bias"))
    shown = torch.full((len(states[0]),), len(states) - 1)
    for t in reversed(range(len(states) - 1)):
        stays = torch.stack([1 - (one @ gate.T + bias)[:, 0].sigmoid() for one in states[: t + 1]]).prod(0)
        shown[1 - stays >= threshold] = t
    return shown


@pytest.mark.parametrize("threshold", [0.5, 0.9])
def test_ouros_gate_shows_an_earlier_iteration_below_a_threshold_of_one(threshold, tmp_path):
    w = authors_depth.ouro(tmp_path / "Ouro-1.4B", early_exit_threshold=threshold)
    model = LatentModel.from_pretrained(tmp_path / "Ouro-1.4B", device="cpu")
    assert (model.method.stop.rule, model.method.stop.threshold) == ("halt", threshold)
    assert torch.equal(model.loop.stop.gate.weight, w["model.early_exit_gate.weight"])

    def slow(ids):
        states = ouro_states(w, ids)
        return torch.stack(states)[exits_of(w, states, threshold), torch.arange(len(ids))] @ w["lm_head.weight"].T

    check_decoder(model, slow)
    ids = list(model.prompts(QUESTIONS[1:2])[0].ids())
    depths = [n - 1 for _, n in model.generate(QUESTIONS[1:2], max_new_tokens=1)[0].depths]
    assert depths == exits_of(w, ouro_states(w, ids), threshold).tolist() and len(set(depths)) > 1


def huginn_logits(w, ids, n_loops=4):
    own = {name.removeprefix("transformer."): one for name, one in w.items()}
    sees, norm = plain.sees_past(len(ids)), lambda x, name: plain.rms(x, own[f"{name}.weight"], 1e-6)

    def turned(x):  # neighbours turn against each other, as complex numbers
        half = x.shape[-1] // 2
        angles = torch.arange(len(x))[:, None] / 700.0 ** (torch.arange(half) / half)
        pairs = torch.view_as_complex(x.unflatten(-1, (half, 2)).contiguous())
        return torch.view_as_real(pairs * torch.polar(torch.ones_like(angles), angles)[:, None]).flatten(-2)

    def layer(x, at):
        q, k, v = (
            h.unflatten(-1, (HEADS, -1))
            for h in (norm(x, f"{at}.norm_1") @ own[f"{at}.attn.Wqkv.weight"].T).chunk(3, -1)
        )
        q, k = (turned(one + bias) for one, bias in zip((q, k), own[f"{at}.attn.qk_bias"]))
        x = norm(x + plain.attend(q, k, v, sees) @ own[f"{at}.attn.proj.weight"].T, f"{at}.norm_2")
        gate, up = (norm(x, f"{at}.norm_3") @ own[f"{at}.mlp.fc.weight"].T).chunk(2, -1)
        return norm(x + (silu(gate) * up) @ own[f"{at}.mlp.proj.weight"].T, f"{at}.norm_4")

    told = layer(own["wte.weight"][ids] * WIDTH**0.5, "prelude.0")
    state = torch.zeros_like(told)
    for _ in range(n_loops):
        state = torch.cat([state, told], -1) @ own["adapter.weight"].T
        for i in range(2):
            state = layer(state, f"core_block.{i}")
    return norm(layer(norm(state, "ln_f"), "coda.0"), "ln_f") @ own["wte.weight"].T


def test_huginn_refines_a_state_between_prelude_and_coda(tmp_path):
    folder = tmp_path / "huginn-0125"
    w = authors_depth.huginn(folder)
    method = LatentModel.from_pretrained(folder, device="cpu").method
    assert isinstance(method, RecurrentDepth)
    assert method.state_std**2 == pytest.approx(2 / 5)
    still = LatentModel.from_pretrained(folder, method=replace(method, state_std=0.0), device="cpu")
    check_decoder(still, lambda ids: huginn_logits(w, ids))


def parscale_logits(w, ids, streams):
    """Every stream reads its prefixes before each token, and has the same weights."""
    n, mixed = len(ids), []
    sees = torch.cat([torch.ones(n, 6, dtype=torch.bool), plain.sees_past(n)], 1)
    for p in range(streams):
        x = w["model.embed_tokens.weight"][ids]
        for i in range(LAYERS):
            at = f"model.layers.{i}"
            h = plain.rms(x, w[f"{at}.input_layernorm.weight"], 1e-6)
            heads = {}
            for name in "qkv":
                made = h @ w[f"{at}.self_attn.{name}_proj.weight"].T + w[f"{at}.self_attn.{name}_proj.bias"]
                heads[name] = made.unflatten(-1, (-1, WIDTH // HEADS))
            k, v = (w[f"{at}.self_attn.prefix_{name}"][p].transpose(0, 1) for name in "kv")
            k, v = torch.cat([k, plain.turned(heads["k"], 700.0)]), torch.cat([v, heads["v"]])
            x = x + plain.attend(plain.turned(heads["q"], 700.0), k, v, sees) @ w[f"{at}.self_attn.o_proj.weight"].T
            mlp = [w[f"{at}.mlp.{name}_proj.weight"] for name in ("gate", "up", "down")]
            x = x + plain.gated(plain.rms(x, w[f"{at}.post_attention_layernorm.weight"], 1e-6), *mlp)
        mixed.append(plain.rms(x, w["model.norm.weight"], 1e-6))
    together = torch.stack(mixed, -1).flatten(-2)  # z[d P + p] = H_p[d]
    inner = silu(together @ w["model.aggregate_layer.0.weight"].T + w["model.aggregate_layer.0.bias"])
    shares = (inner @ w["model.aggregate_layer.2.weight"].T + w["model.aggregate_layer.2.bias"]).softmax(-1)
    shares = shares * (1 - 0.02) + 0.02 / streams
    return (torch.stack(mixed, -1) * shares[:, None]).sum(-1) @ w["model.embed_tokens.weight"].T


@pytest.mark.parametrize("streams", [2, 4])
def test_parscale_mixes_its_streams(streams, tmp_path):
    w = authors_depth.parscale(tmp_path / "model", streams)
    model = LatentModel.from_pretrained(tmp_path / "model", device="cpu")
    assert model.method == ParScale(streams=streams, n_prefix=6, smoothing=0.02)
    check_decoder(model, lambda ids: parscale_logits(w, ids, streams))


def test_parscale_of_one_stream_is_a_qwen2(tmp_path):
    w = authors_depth.parscale(tmp_path / "model", streams=1)
    table = w["model.embed_tokens.weight"]
    slow = lambda ids: plain.qwen(w, table[ids], HEADS, 700.0, plain.sees_past(len(ids))) @ table.T  # noqa: E731
    check_decoder(LatentModel.from_pretrained(tmp_path / "model", device="cpu"), slow)


def retrofit_logits(w, ids, n_loops=4):
    own = {name.removeprefix("transformer."): one for name, one in w.items()}
    sees, norm = plain.sees_past(len(ids)), lambda x, name: plain.rms(x, own[f"{name}.weight"], 1e-6)
    is_olmo = "coda.0.attn.q_norm.weight" in own

    def attention(x, at):
        size = WIDTH // HEADS
        q, k, v = (x @ own[f"{at}.Wqkv.weight"].T).split([WIDTH, KV_HEADS * size, KV_HEADS * size], -1)
        if is_olmo:
            q, k = norm(q, f"{at}.q_norm"), norm(k, f"{at}.k_norm")
        q, k, v = (one.unflatten(-1, (-1, size)) for one in (q, k, v))
        read = plain.attend(plain.turned(q, 700.0), plain.turned(k, 700.0), v, sees)
        return read @ own[f"{at}.proj.weight"].T

    def mlp(x, at):
        gate, up = (x @ own[f"{at}.fc.weight"].T).chunk(2, -1)
        return (silu(gate) * up) @ own[f"{at}.proj.weight"].T

    def layer(x, at):
        for part, name, k in ((attention, "attn", 1), (mlp, "mlp", 2)):
            if is_olmo:
                x = x + norm(part(x, f"{at}.{name}"), f"{at}.norm_{k}")
            else:
                x = x + part(norm(x, f"{at}.norm_{k}"), f"{at}.{name}")
        return x

    told = layer(own["wte.weight"][ids], "prelude.0")
    state = torch.zeros_like(told)
    for _ in range(n_loops):
        state = torch.cat([state, told], -1) @ own["adapter.weight"].T
        for i in range(2):
            state = layer(state, f"core_block.{i}")
    return norm(layer(state, "coda.0"), "ln_f") @ own["lm_head.weight"].T


@pytest.mark.parametrize("norms", [False, True], ids=["llama", "olmo2"])
def test_retrofits_have_huginns_parts_and_their_bases_layers(norms, tmp_path):
    w = authors_depth.retrofit(tmp_path / "model", norms)
    method = LatentModel.from_pretrained(tmp_path / "model", device="cpu").method
    assert (method.double_norm, method.sandwich, method.state_std) == (False, False, 0.0087)
    still = LatentModel.from_pretrained(tmp_path / "model", method=replace(method, state_std=0.0), device="cpu")
    check_decoder(still, lambda ids: retrofit_logits(w, ids))


def test_huginns_scales_are_those_of_config_json_where_it_has_them(tmp_path):
    values = {"std": 0.5, "embed_scale": 3.0}
    w = authors_depth.huginn(tmp_path / "model", init_values=values)
    model = LatentModel.from_pretrained(tmp_path / "model", device="cpu")
    assert model.method.state_std == 1.5
    assert torch.equal(model.backbone.lm.get_input_embeddings().weight, w["transformer.wte.weight"] * 3)
