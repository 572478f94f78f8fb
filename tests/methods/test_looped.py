"""Looped transformers against an unrolled decoder that holds copies of the weights (looped.md, section 9)."""

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from innerloop import Cot, InputError, LatentModel, Looped
from innerloop.decoder.backbone import Backbone
from innerloop.decoder.cost import Cost
from innerloop.methods import Method
from innerloop.methods.depth.tying import rebuild
from tests.close import assert_close
from tests.fields import make
from tests.methods.test_every_depth_method import NO_DROPOUT
from tests.methods.tools import MIXED, QUESTIONS, by_arch, gradients, lean_towards_end, logits_of, stir, with_token
from tests.models import saved, tiny_model


def looped(arch: str = "llama", seed: int = 0, **fields) -> LatentModel:
    """Make a looped model of three layers whose parts are not at their start."""
    model = tiny_model(make(Looped, **fields), arch, seed, **(NO_DROPOUT if arch == "gpt2" else {}))
    return stirred(model, 0.1)


def stirred(model: LatentModel, by: float = 0.3) -> LatentModel:
    """Move all that the method adds."""
    stir(model, by)
    return model


def under(model: LatentModel, method: Method) -> LatentModel:
    """Put another method, with parts at their start, on the weights of a model."""
    return LatentModel(model.backbone, model.tokenizer, method).eval()


def unrolled(model: LatentModel) -> LatentModel:
    """Return an ordinary decoder with a copy of each layer for every time it is applied."""
    method, n = model.method, model.backbone.n_layers
    block = list(range(method.n_prelude, n - method.n_coda))
    order = [*range(method.n_prelude), *block * method.max_loops, *range(n - method.n_coda, n)]
    backbone = Backbone(copy.deepcopy(model.backbone.lm))
    rebuild(backbone, [[layer] for layer in order])
    return LatentModel(backbone, model.tokenizer, Cot()).eval()


@torch.no_grad()
def slowly(model: LatentModel, ids: list[int]) -> Tensor:
    """The card's forward pass on one row (L, V): no cache, no padding, one layer after the other."""
    method, backbone, loop = model.method, model.backbone, model.loop
    n, at = backbone.n_layers, torch.arange(len(ids))[None]

    def run(h: Tensor, layers: range) -> Tensor:
        return backbone(h, layers=layers, positions_BL=at, inner=True) if layers else h

    e = h = run(backbone.enter(backbone.embed(torch.tensor([ids])), at), range(method.n_prelude))
    for i in range(1, method.max_loops + 1):
        x = h if loop.time is None else h + loop.time.table[i - 1]
        x = x if model.depth.gamma is None else x + model.depth.gamma * e
        with loop.weights(i):
            u = run(x, range(method.n_prelude, n - method.n_coda))
        beta, residual = loop.residual.alpha_at(i), method.loop.residual
        h = u if residual == "none" else beta * u + (1 - beta) * (e if residual == "A" else h)
    return backbone.head(backbone.norm(run(h, range(n - method.n_coda, n))))[0]


def assert_same(left: LatentModel, right: LatentModel, exactly: bool = False, tolerance: float = 2e-5) -> None:
    for a, b in zip(left.answer_logits(MIXED), right.answer_logits(MIXED), strict=True):
        if exactly:
            assert torch.equal(a, b)
        else:
            assert_close(a, b, tolerance)


def gap(left: LatentModel, right: LatentModel) -> float:
    pairs = zip(left.answer_logits(MIXED), right.answer_logits(MIXED), strict=True)
    return max((a - b).abs().max().item() for a, b in pairs)


def texts(model: LatentModel, n: int = 12, **options) -> list[str]:
    return [generation.text for generation in model.generate(QUESTIONS, max_new_tokens=n, **options)]


# Identities


@pytest.mark.parametrize("ends", [(0, 0), (1, 1)])
def test_one_loop_is_the_base_model_bit_for_bit(arch: str, ends: tuple[int, int]):
    model = tiny_model(Looped(n_prelude=ends[0], n_coda=ends[1], max_loops=1), arch)
    assert_same(model, under(model, Cot()), exactly=True)
    assert texts(model, 5) == texts(under(model, Cot()), 5)


SHAPES = [(arch, *shape) for arch in ("gpt2", "llama") for shape in ((0, 0, 1), (0, 0, 2), (1, 0, 2), (1, 1, 3))]


@pytest.mark.parametrize(
    ("arch", "n_prelude", "n_coda", "max_loops"),
    [*SHAPES, *((arch, 1, 0, 2) for arch in ("mistral", "gemma2", "gemma3", "qwen3"))],
)
def test_looping_is_an_unrolled_decoder_with_copies_of_the_weights(arch, n_prelude, n_coda, max_loops):
    """Its keys and values, too."""
    model = looped(arch, n_prelude=n_prelude, n_coda=n_coda, max_loops=max_loops)
    copies = unrolled(model)
    assert_same(model, copies)
    ids = torch.tensor([model.tokenizer.encode(QUESTIONS[0])])
    context, plain = (one.new_context(one.batch(one.prompts(QUESTIONS[:1]))) for one in (model, copies))
    with torch.no_grad():
        context.read(model.backbone.embed(ids))
        plain.read(model.backbone.embed(ids))
    slots = [context.cache.slots.get(key) for key in ("prelude", *range(1, max_loops + 1), "coda")]
    pairs = [pair for slot in slots if slot is not None for pair in zip(slot.keys, slot.values)]
    for (key, value), layer in zip(pairs, plain.cache.layers, strict=True):
        assert_close(key[:, :, -layer.keys.shape[2] :], layer.keys)  # a sliding layer of theirs keeps its window
        assert_close(value[:, :, -layer.keys.shape[2] :], layer.values)
    lean_towards_end(model, 1.0), lean_towards_end(copies, 1.0)
    assert texts(model, 6) == texts(copies, 6)


@by_arch
def test_the_gradient_of_a_shared_layer_is_the_sum_over_its_copies(arch):
    model = looped(arch, n_prelude=1, max_loops=3)
    copies = unrolled(model)
    ours, theirs = (gradients(one, one.loss(MIXED).loss) for one in (model, copies))
    prefix = "backbone.lm." + next(n for n, m in model.backbone.lm.named_modules() if m is model.backbone.layers)
    for layer, places in enumerate([[0], [1, 3, 5], [2, 4, 6]]):
        for name, _ in model.backbone.layers[layer].named_parameters():
            expected = sum(theirs[f"{prefix}.{place}.{name}"] for place in places)
            assert_close(ours[f"{prefix}.{layer}.{name}"], expected)


def spent(model: LatentModel, **options) -> Cost:
    return model.generate(QUESTIONS[:1], max_new_tokens=1, **options)[0].cost


def test_parameters_do_not_grow_with_loops_and_flops_do_so_evenly():
    models = [looped(n_prelude=1, n_coda=1, max_loops=n) for n in (1, 2, 3, 4)]
    flops = [spent(model).flops for model in models]
    assert len({sum(p.numel() for p in model.parameters()) for model in models}) == 1
    assert {spent(model).passes for model in models} == {1}
    assert flops[1] - flops[0] == flops[2] - flops[1] == flops[3] - flops[2] > 0
    assert flops[3] == pytest.approx(spent(unrolled(models[3])).flops)


@by_arch
def test_where_layers_do_nothing_the_number_of_loops_does_not_matter(arch):
    model = looped(arch, max_loops=3)
    for name, parameter in model.backbone.layers.named_parameters():
        if any(part in name for part in ("o_proj", "down_proj", "c_proj")):
            parameter.data.zero_()
    for loops in (1, 2):
        assert_same(model, under(model, Looped(max_loops=loops)))


@pytest.mark.parametrize("loops", [1, 2])
def test_twice_the_loops_are_as_many_of_the_block_twice(loops):
    model = looped(max_loops=2 * loops)
    backbone = Backbone(copy.deepcopy(model.backbone.lm))
    rebuild(backbone, [[0], [1], [2], [0], [1], [2]])
    assert_same(model, LatentModel(backbone, model.tokenizer, Looped(max_loops=loops)).eval())


# Against the slow reference, whatever the settings

SETTINGS = [
    {"max_loops": 3, "input_injection": True},
    {"max_loops": 3, "n_prelude": 1, "n_coda": 1, "input_injection": True, "loop.time": "lookup"},
    {"max_loops": 2, "loop.residual": "B", "loop.alpha": 1.0, "loop.alpha_learn": "free"},
    {"max_loops": 2, "loop.residual": "A", "loop.alpha": 0.6},
    {"max_loops": 3, "n_prelude": 1, "loop.lora": "per_iter", "loop.lora_rank": 2},
]
by_settings = pytest.mark.parametrize("settings", SETTINGS, ids=lambda one: "-".join(map(str, one.values())))


@by_arch
@by_settings
def test_every_setting_is_what_the_card_writes(arch, settings):
    """Reading at once, and writing with a cache."""
    model = looped(arch, **settings)
    for row, logits in zip(model.rows(MIXED[:3]), model.answer_logits(MIXED)):
        assert_close(logits, slowly(model, row.ids()[:-1])[-len(logits) :])
    lean_towards_end(model, 1.0)
    for question, generation in zip(QUESTIONS, model.generate(QUESTIONS[:2], max_new_tokens=6)):
        ids = model.tokenizer.encode(question + "\n")
        for token in generation.ids:
            assert token == int(slowly(model, ids)[-1].argmax())
            ids.append(token)
        assert generation.ended == (ids[-1] == model.encoder.eos_id)


@by_settings
def test_nothing_written_depends_on_what_comes_after_it(settings):
    model = looped(**settings)
    (row,) = model.rows(MIXED[:1])
    logits, n = logits_of(model, [row])[0], len(row)
    for back in (2, 5, 9):
        changed = logits_of(model, [with_token(row, n - back, row.ids()[n - back] - 1)])[0]
        assert torch.equal(changed[: 1 - back], logits[: 1 - back])
        assert ((changed - logits).abs().amax(1)[1 - back :] > 1e-6).all()


NEUTRAL = [{"input_injection": True}, {"loop.residual": "B", "loop.alpha": 1.0, "loop.alpha_learn": "free"}]
NEUTRAL += [{"loop.time": "lookup"}, {"loop.time": "sinusoidal"}, {"loop.lora": "per_iter"}, {"loop.lora": "shared"}]


@by_arch
@pytest.mark.parametrize("settings", NEUTRAL, ids=lambda one: "-".join(map(str, one.values())))
def test_what_is_switched_on_changes_nothing_at_its_start(arch, settings):
    model = tiny_model(Looped(max_loops=3), arch)
    started = under(model, make(Looped, max_loops=3, **settings))
    assert_same(started, model, exactly=True)
    assert gap(stirred(started), model) > 1e-3


def test_stabilisers_of_other_methods_work_inside_the_token_too():
    plain = looped(max_loops=3)
    for fields in (
        *({"loop.rescale": kind} for kind in ("rms", "adapter")),
        *({"loop.residual": kind} for kind in ("sum", "C")),
        {"loop.scale": 0.5, "loop.rescale": "rms"},
        {"loop.time": "sinusoidal", "loop.time_inject": "concat"},
        {"loop.lora": "shared", "loop.lora_targets": ("q_proj",)},
    ):
        assert gap(stirred(under(plain, make(Looped, max_loops=3, **fields))), plain) > 1e-3, fields


def test_loop_wise_lora_is_made_for_the_looped_layers_alone_and_counted():
    lora = {"lora": "per_iter", "lora_rank": 2}
    model = looped(n_prelude=1, max_loops=3, loop=lora)
    assert {name.split(".")[2] for name in model.loop.lora.modules_by_name} == {"1", "2"}
    grads = gradients(model, model.loss(MIXED).loss)
    assert all(grad.abs().max() > 0 for name, grad in grads.items() if "lora" in name)
    plain, more = spent(looped(n_prelude=1, max_loops=3)), spent(model)
    # width 32, key-value width 16, MLP 48: sides of q, k, v, o, gate, up, down; two layers, three loops
    sides = 2 * (32 + 32) + 2 * (32 + 16) + 3 * (32 + 48)
    assert more.flops - plain.flops == 2 * 2 * sides * 2 * 3 * plain.positions


# Loops when answering and when training


@by_arch
def test_a_model_may_answer_with_other_loops_than_trained(arch):
    model = looped(arch, max_loops=2)
    assert texts(model, 5, loops=4) == texts(under(model, Looped(max_loops=4)), 5) != texts(model, 5)
    costs = [spent(model, loops=n).flops for n in (1, 2, 3)]
    assert costs[2] - costs[1] == pytest.approx(costs[1] - costs[0])


@pytest.mark.parametrize("sampling", ["uniform", "lognormal_poisson"])
def test_the_loops_of_a_training_batch_are_drawn(sampling):
    model = looped(max_loops=3, loop_sampling=sampling)
    drawn = [{row.depth for row in model.rows(MIXED[:2], seed=f"0/{step}/0/0")} for step in range(40)]
    counts = {depth for (depth,) in drawn}
    assert counts == {1, 2, 3} if sampling == "uniform" else {1, 2, 3} < counts
    (row,), fixed = model.rows(MIXED[:1]), looped(max_loops=1)
    assert row.depth == 3  # nothing is drawn without a seed
    row.depth = 1
    assert_close(model.train()(model.batch([row])).loss, fixed.train().loss(MIXED[:1]).loss)


@by_arch
@pytest.mark.parametrize("bptt", [0, 1, 2, 3])
def test_back_propagation_may_be_cut_before_the_last_loops(arch, bptt):
    """Against an unrolled decoder whose state is detached at the cut."""
    model = looped(arch, max_loops=3, n_prelude=1, n_coda=1, loop={"bptt": bptt}).train()
    grads = gradients(model, model.loss(MIXED[:1]).loss)
    backbone, (row,) = model.backbone, model.rows(MIXED[:1])
    ids, at = torch.tensor([row.ids()]), torch.arange(len(row.ids()))[None]
    h = backbone(backbone.embed(ids), layers=range(1), positions_BL=at, inner=False)
    for loop in range(1, 4):
        h = h.detach() if loop == 3 - bptt + 1 and loop > 1 else h
        h = backbone(h, layers=range(1, 2), positions_BL=at, inner=True)
    h = backbone(h if bptt else h.detach(), layers=range(2, 3), positions_BL=at, inner=True)
    n_written = sum(label >= 0 for label in row.labels())
    logits = backbone.head(backbone.norm(h))[0, -n_written - 1 : -1]
    expected = gradients(model, nn.functional.cross_entropy(logits, ids[0, -n_written:]))
    for name, grad in grads.items():
        assert_close(grad, expected[name])
    prelude = [grad.abs().max() for name, grad in grads.items() if ".0." in name]
    assert (max(prelude) > 0) == (bptt == 3)


def test_what_each_loop_shows_is_recorded_row_by_row():
    """Also once rows have ended and left the batch."""
    model = lean_towards_end(looped(max_loops=3, n_prelude=1), 2.0)
    together = model.generate(QUESTIONS, max_new_tokens=20, trace=True)
    assert len({generation.ended for generation in together}) == 2
    for question, generation in zip(QUESTIONS, together):
        (alone,) = model.generate([question], max_new_tokens=20, trace=True)
        n = 3 * alone.cost.passes
        ours, theirs = generation.trace.iterations[:n], alone.trace.iterations[:n]
        assert [entry.loop for entry in ours] == [1, 2, 3] * alone.cost.passes
        for one, other in zip(ours[3:], theirs[3:]):  # padding has no say in the statistics of the first pass
            assert_close(one.delta, other.delta)
            assert torch.equal(one.top_ids, other.top_ids)
        shown = [int(entry.top_ids[0, -1, 0]) for entry in theirs[2::3]]
        assert alone.text == model.tokenizer.decode(shown[: alone.cost.passes], skip_special_tokens=True)


def converted(original: LatentModel, method: Method) -> LatentModel:
    """Convert a copy of a model."""
    backbone = Backbone(copy.deepcopy(original.backbone.lm))
    assert method.convert(backbone, None) is None
    return LatentModel(backbone, original.tokenizer, method).eval()


def stack(model: LatentModel) -> list[Tensor]:
    """Return one matrix of each layer."""
    return [next(iter(model.backbone.matrices(i).values())).weight.detach() for i in range(model.backbone.n_layers)]


@by_arch
@pytest.mark.parametrize(
    ("init", "n_block", "layers"),
    [
        ("first_k", 2, [[0], [1], [2], [7]]),
        ("first_k", 6, [[i] for i in range(8)]),
        ("stepwise", 3, [[0], [1], [4], [6], [7]]),
        ("stepwise", 1, [[0], [1], [7]]),
        ("average", 2, [[0], [1, 3, 5], [2, 4, 6], [7]]),
        ("average", 1, [[0], [1, 2, 3, 4, 5, 6], [7]]),
    ],
)
def test_the_block_is_made_of_the_layers_between_the_ends(arch, init, n_block, layers):
    original = tiny_model(Cot(), arch, num_hidden_layers=8)
    model = converted(original, Looped(n_prelude=1, n_coda=1, max_loops=2, init=init, n_block=n_block))
    assert model.backbone.n_layers == model.backbone.config.num_hidden_layers == n_block + 2
    for got, group in zip(stack(model), layers, strict=True):
        assert_close(got, torch.stack([stack(original)[i] for i in group]).mean(0))
        assert len(group) > 1 or torch.equal(got, stack(original)[group[0]])
    attention = "self_attn" if arch == "llama" else "attn"
    assert [getattr(layer, attention).layer_idx for layer in model.backbone.layers] == [*range(n_block + 2)]
    assert texts(model, 3)


def test_a_model_whose_block_is_all_of_it_is_the_base_at_one_loop():
    original = tiny_model(Cot(), num_hidden_layers=4)
    for init, n_block in [("middle_dup", 0), ("first_k", 4), ("stepwise", 4), ("average", 4)]:
        model = converted(original, Looped(max_loops=1, init=init, n_block=n_block))
        assert_same(model, original, exactly=True)


def test_copies_are_the_model_that_they_were_copied_from():
    """Two copies of two layers, averaged, are again the two layers: looped twice they are the model of four."""
    original = tiny_model(Cot(), num_hidden_layers=2)
    rebuild(original.backbone, [[0], [1], [0], [1]])
    assert_same(converted(original, Looped(max_loops=2, init="average", n_block=2)), original, tolerance=1e-5)


@by_arch
def test_a_looped_model_is_saved_and_loaded_and_not_made_again(arch, tmp_path: Path):
    folder = saved(tiny_model(Cot(), arch, num_hidden_layers=6), tmp_path / "base")
    ends = {"n_prelude": 1, "n_coda": 1, "init": "average", "n_block": 2, "input_injection": True}
    method = Looped(**ends, loop={"time": "lookup"})
    model = stirred(LatentModel.from_pretrained(folder, method, device="cpu"))
    run = saved(model, tmp_path / "run")
    for given in (None, method):
        assert_same(LatentModel.from_pretrained(run, given, device="cpu"), model, exactly=True)
    more = LatentModel.from_pretrained(run, Looped(**ends, max_loops=3), device="cpu")
    assert more.backbone.n_layers == 4 and torch.equal(more.depth.gamma, model.depth.gamma)
    with pytest.raises(InputError, match="the model has 2 layers between prelude and coda, not n_block=1"):
        LatentModel.from_pretrained(run, Looped(**{**ends, "n_block": 1}), device="cpu")


def test_fresh_gpt2_weights_are_drawn_for_the_depth_that_they_will_have():
    plain, deep = tiny_model(Cot(), "gpt2"), tiny_model(Looped(n_prelude=1, max_loops=4), "gpt2")
    for theirs, ours in zip(plain.backbone.layers, deep.backbone.layers):  # 1 + 4 * 2 = 9 layers instead of 3
        assert_close(ours.attn.c_proj.weight, theirs.attn.c_proj.weight / 3**0.5)
        assert_close(ours.mlp.c_proj.weight, theirs.mlp.c_proj.weight / 3**0.5)
        assert torch.equal(ours.mlp.c_fc.weight, theirs.mlp.c_fc.weight)
    llama = tiny_model(Looped(max_loops=4)).state_dict()
    assert all(torch.equal(tensor, llama[name]) for name, tensor in tiny_model(Cot()).state_dict().items())


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"n_prelude": 2, "n_coda": 1}, "the model has 3 layers, which leaves none to loop: lower n_prelude or n_coda"),
        ({"init": "first_k", "n_block": 4}, "3 layers between prelude and coda: lower n_block, which is 4"),
        ({"init": "average", "n_block": 2}, "3 layers cannot be tied to blocks of 2: choose a number that divides 3"),
    ],
)
def test_blocks_that_a_model_has_no_layers_for_are_refused(fields, message):
    with pytest.raises(InputError, match=message):
        converted(tiny_model(Cot()), make(Looped, **fields))
