"""Looped transformers against an unrolled decoder that holds copies of the weights (looped.md, section 9)."""

import copy

import pytest
import torch
from torch import Tensor, nn

from innerloop import Cot, LatentModel, Looped
from innerloop.decoder.backbone import Backbone
from innerloop.methods.depth.tying import rebuild
from tests.close import assert_close
from tests.methods.tools import MIXED, QUESTIONS, by_arch, gradients, lean_towards_end, learn, logits_of, with_token
from tests.models import chain_examples, tiny_model

LAYERS = {"num_hidden_layers": 3}
NO_DROPOUT = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
SHAPES = [(0, 0, 1), (0, 0, 2), (1, 0, 2), (1, 1, 3)]
by_shape = pytest.mark.parametrize(("n_prelude", "n_coda", "max_loops"), SHAPES)
by_loops = pytest.mark.parametrize("max_loops", [1, 2, 3])


def looped(arch: str = "llama", seed: int = 0, **fields) -> LatentModel:
    """Make a looped model of three layers whose parts are not at their start."""
    model = tiny_model(Looped(**fields), arch, seed, **LAYERS, **(NO_DROPOUT if arch == "gpt2" else {}))
    return stirred(model, 0.1)


def stirred(model: LatentModel, by: float = 0.3) -> LatentModel:
    """Move all that the method adds."""
    generator = torch.Generator().manual_seed(1)
    for parameter in (p for part in model.parts().values() for p in part.parameters()):
        with torch.no_grad():
            parameter += by * torch.randn(parameter.shape, generator=generator)
    return model


def unrolled(model: LatentModel) -> LatentModel:
    """Return an ordinary decoder with a copy of each layer for every time it is applied."""
    method, n = model.method, model.backbone.n_layers
    block = list(range(method.n_prelude, n - method.n_coda))
    order = [*range(method.n_prelude), *block * method.max_loops, *range(n - method.n_coda, n)]
    backbone = Backbone(copy.deepcopy(model.backbone.lm))
    rebuild(backbone, [[layer] for layer in order])
    return LatentModel(backbone, model.tokenizer, Cot()).eval()


def slowly(model: LatentModel, ids: list[int]) -> Tensor:
    """The card's forward pass on one row (L, V): no cache, no padding, one layer after the other."""
    method, backbone, loop = model.method, model.backbone, model.loop
    n, at = backbone.n_layers, torch.arange(len(ids))[None]

    def run(h: Tensor, layers: range, inner: bool = True) -> Tensor:
        return backbone(h, layers=layers, positions_BL=at, inner=inner) if layers else h

    h = backbone.enter(backbone.embed(torch.tensor([ids])), at)
    e = h = run(h, range(method.n_prelude))
    for i in range(1, method.max_loops + 1):
        x = h if loop.time is None else h + loop.time.table[i - 1]
        x = x if model.depth.gamma is None else x + model.depth.gamma * e
        with loop.weights(i):
            u = run(x, range(method.n_prelude, n - method.n_coda))
        u = backbone.norm(u) if method.feedback_site == "post_norm" else u
        beta = loop.residual.alpha_at(i)
        h = u if method.residual == "none" else beta * u + (1 - beta) * (e if method.residual == "A" else h)
    h = run(h, range(n - method.n_coda, n))
    is_normed = method.feedback_site == "post_norm" and method.n_coda == 0
    return backbone.head(h if is_normed else backbone.norm(h))[0]


def write_slowly(model: LatentModel, question: str, n: int) -> list[int]:
    """Write greedily, everything anew for each token."""
    ids, written = model.tokenizer.encode(question + "\n"), []
    while len(written) < n and (not written or written[-1] != model.spell.eos_id):
        with torch.no_grad():
            written.append(int(slowly(model, [*ids, *written])[-1].argmax()))
    return written


def assert_same(left: LatentModel, right: LatentModel, exactly: bool = False, tolerance: float = 2e-5) -> None:
    for a, b in zip(left.answer_logits(MIXED), right.answer_logits(MIXED), strict=True):
        if exactly:
            assert torch.equal(a, b)
        else:
            assert_close(a, b, tolerance)


def gap(left: LatentModel, right: LatentModel) -> float:
    return max(
        (a - b).abs().max().item() for a, b in zip(left.answer_logits(MIXED), right.answer_logits(MIXED), strict=True)
    )


# Identities


@pytest.mark.parametrize("ends", [(0, 0), (1, 1)])
def test_one_loop_is_the_base_model_bit_for_bit(arch: str, ends: tuple[int, int]):
    model = tiny_model(Looped(n_prelude=ends[0], n_coda=ends[1], max_loops=1), arch)
    base = under_plain(model)
    assert_same(model, base, exactly=True)
    assert texts(model, 5) == texts(base, 5)


def under_plain(model: LatentModel) -> LatentModel:
    return LatentModel(model.backbone, model.tokenizer, Cot()).eval()


def texts(model: LatentModel, n: int = 12, **options) -> list[str]:
    return [generation.text for generation in model.generate(QUESTIONS, max_new_tokens=n, **options)]


@by_arch
@by_shape
def test_looping_is_an_unrolled_decoder_with_copies_of_the_weights(arch, n_prelude, n_coda, max_loops):
    model = looped(arch, n_prelude=n_prelude, n_coda=n_coda, max_loops=max_loops)
    copies = unrolled(model)
    assert_same(model, copies, tolerance=1e-5)
    lean_towards_end(model, 1.0), lean_towards_end(copies, 1.0)
    assert texts(model, 6) == texts(copies, 6)


@pytest.mark.parametrize("arch", ["mistral", "gemma2", "gemma3", "qwen3"])
def test_every_architecture_loops(arch):
    model = looped(arch, n_prelude=1, max_loops=2)
    assert_same(model, unrolled(model), tolerance=2e-5)


@by_arch
@by_shape
def test_keys_and_values_are_those_of_the_unrolled_decoder(arch, n_prelude, n_coda, max_loops):
    model = looped(arch, n_prelude=n_prelude, n_coda=n_coda, max_loops=max_loops)
    copies = unrolled(model)
    ids = torch.tensor([model.tokenizer.encode(QUESTIONS[0])])
    context, plain = (one.new_context(one.batch(one.prompts(QUESTIONS[:1]))) for one in (model, copies))
    with torch.no_grad():
        context.read(model.backbone.embed(ids))
        plain.read(model.backbone.embed(ids))
    slots = context.cache.slots
    order = [slots[key] for key in ("prelude", *range(1, max_loops + 1), "coda") if key in slots]
    keys = [key for slot in order for key in slot.keys]
    values = [value for slot in order for value in slot.values]
    assert len(keys) == len(plain.cache.layers) == copies.backbone.n_layers
    for key, value, layer in zip(keys, values, plain.cache.layers):
        assert_close(key, layer.keys)
        assert_close(value, layer.values)


@by_arch
def test_the_gradient_of_a_shared_layer_is_the_sum_over_its_copies(arch):
    model = looped(arch, n_prelude=1, max_loops=3)
    copies = unrolled(model)
    ours = gradients(model, model.loss(MIXED).loss)
    theirs = gradients(copies, copies.loss(MIXED).loss)
    prefix = next(n for n, m in model.backbone.lm.named_modules() if m is model.backbone.layers)
    for layer, places in enumerate([[0], [1, 3, 5], [2, 4, 6]]):
        for name, _ in model.backbone.layers[layer].named_parameters():
            expected = sum(theirs[f"backbone.lm.{prefix}.{place}.{name}"] for place in places)
            got = ours[f"backbone.lm.{prefix}.{layer}.{name}"]
            assert_close(got, expected)


def test_parameters_do_not_grow_with_loops_and_flops_do_so_evenly():
    counts, flops, passes = set(), [], set()
    for max_loops in (1, 2, 3, 4):
        model = looped(n_prelude=1, n_coda=1, max_loops=max_loops)
        counts.add(sum(p.numel() for p in model.parameters()))
        cost = model.generate(QUESTIONS[:1], max_new_tokens=1)[0].cost
        flops.append(cost.flops)
        passes.add(cost.passes)
    assert len(counts) == 1 and passes == {1}
    assert flops[1] - flops[0] == flops[2] - flops[1] == flops[3] - flops[2] > 0
    plain = unrolled(looped(n_prelude=1, n_coda=1, max_loops=4)).generate(QUESTIONS[:1], max_new_tokens=1)[0].cost.flops
    assert flops[3] == pytest.approx(plain)


@by_arch
def test_where_layers_do_nothing_the_number_of_loops_does_not_matter(arch):
    model = looped(arch, max_loops=3)
    with torch.no_grad():
        for name, parameter in model.backbone.layers.named_parameters():
            if any(part in name for part in ("o_proj", "down_proj", "c_proj")):
                parameter.zero_()
    for loops in (1, 2):
        assert_same(model, LatentModel(model.backbone, model.tokenizer, Looped(max_loops=loops)).eval())


def test_two_loops_are_one_of_the_block_twice():
    model = looped(max_loops=2)
    backbone = Backbone(copy.deepcopy(model.backbone.lm))
    rebuild(backbone, [[0], [1], [2], [0], [1], [2]])
    assert_same(model, LatentModel(backbone, model.tokenizer, Looped(max_loops=1)).eval(), tolerance=1e-5)
    assert_same(looped(max_loops=4), LatentModel(backbone, model.tokenizer, Looped(max_loops=2)).eval(), tolerance=2e-5)


# Against the slow reference, whatever the settings

SETTINGS = [
    {"max_loops": 3, "input_injection": True},
    {"max_loops": 3, "n_prelude": 1, "n_coda": 1, "input_injection": True, "time": "lookup"},
    {"max_loops": 2, "residual": "B", "alpha": 1.0, "alpha_learn": "free"},
    {"max_loops": 2, "residual": "A", "alpha": 0.6},
    {"max_loops": 2, "feedback_site": "post_norm"},
    {"max_loops": 2, "feedback_site": "post_norm", "n_coda": 1},
    {"max_loops": 3, "n_prelude": 1, "lora": "per_iter", "lora_rank": 2},
]
by_settings = pytest.mark.parametrize("settings", SETTINGS, ids=lambda one: "-".join(map(str, one.values())))


@by_arch
@by_settings
def test_every_setting_is_what_the_card_writes(arch, settings):
    model = looped(arch, **settings)
    for example, logits in zip(MIXED[:3], model.answer_logits(MIXED)):
        (row,) = model.rows([example])
        with torch.no_grad():
            expected = slowly(model, row.ids()[:-1])[-len(logits) :]
        assert_close(logits, expected)


@by_arch
@by_settings
def test_writing_with_a_cache_is_reading_everything_anew(arch, settings):
    model = lean_towards_end(looped(arch, **settings), 1.0)
    expected = [write_slowly(model, question, 6) for question in QUESTIONS[:2]]
    decoded = [model.tokenizer.decode(ids, skip_special_tokens=True) for ids in expected]
    assert [generation.text for generation in model.generate(QUESTIONS[:2], max_new_tokens=6)] == decoded


@by_settings
def test_nothing_written_depends_on_what_comes_after_it(settings):
    model = looped(**settings)
    (row,) = model.rows(MIXED[:1])
    logits, n = logits_of(model, [row])[0], len(row)
    for back in (2, 5, 9):
        changed = logits_of(model, [with_token(row, n - back, row.ids()[n - back] - 1)])[0]
        assert torch.equal(changed[: 1 - back], logits[: 1 - back])
        assert ((changed - logits).abs().amax(1)[1 - back :] > 1e-6).all()


@by_arch
@pytest.mark.parametrize(
    "settings",
    [
        {"input_injection": True},
        {"time": "lookup"},
        {"time": "sinusoidal"},
        {"lora": "per_iter"},
        {"lora": "shared"},
        {"residual": "B", "alpha": 1.0, "alpha_learn": "free"},
    ],
    ids=lambda one: "-".join(map(str, one.values())),
)
def test_what_is_switched_on_changes_nothing_at_its_start(arch, settings):
    model = tiny_model(Looped(max_loops=3), arch)
    started = LatentModel(model.backbone, model.tokenizer, Looped(max_loops=3, **settings)).eval()
    assert_same(started, model, exactly=True)
    assert gap(stirred(started), model) > 1e-3


def test_loop_wise_lora_is_made_for_the_looped_layers_alone():
    model = looped(n_prelude=1, n_coda=1, max_loops=2, lora="per_iter", lora_rank=2)
    assert {name.split(".")[2] for name in model.loop.lora.modules_by_name} == {"1"}
    grads = gradients(model, model.loss(MIXED).loss)
    assert all(grad.abs().max() > 0 for name, grad in grads.items() if "lora" in name)


def test_lora_is_counted():
    def spent(**fields) -> tuple[float, int]:
        model = looped(n_prelude=1, max_loops=3, **fields)
        cost = model.generate(QUESTIONS[:1], max_new_tokens=1)[0].cost
        return cost.flops, cost.positions

    (plain, n), (more, _) = spent(), spent(lora="per_iter", lora_rank=2)
    # width 32, key-value width 16, MLP 48: sides of q, k, v, o, gate, up, down; two layers, three loops
    sides = 2 * (32 + 32) + 2 * (32 + 16) + 3 * (32 + 48)
    assert more - plain == 2 * 2 * sides * 2 * 3 * n


# Loops when answering and when training


@by_arch
def test_a_model_may_answer_with_other_loops_than_trained(arch):
    model = looped(arch, max_loops=2)
    more = LatentModel(model.backbone, model.tokenizer, Looped(max_loops=4)).eval()
    assert texts(model, 5, loops=4) == texts(more, 5) != texts(model, 5)
    costs = [model.generate(QUESTIONS[:1], max_new_tokens=2, loops=n)[0].cost.flops for n in (1, 2, 3)]
    assert costs[2] - costs[1] == pytest.approx(costs[1] - costs[0])


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


@pytest.mark.parametrize("sampling", ["uniform", "lognormal_poisson"])
def test_the_loops_of_a_training_batch_are_drawn(sampling):
    model = looped(max_loops=3, loop_sampling=sampling)
    drawn = [model.rows(MIXED[:2], seed=f"0/{step}/0/0") for step in range(40)]
    assert all(len({row.depth for row in rows}) == 1 for rows in drawn)
    counts = {rows[0].depth for rows in drawn}
    assert counts == {1, 2, 3} if sampling == "uniform" else {1, 2, 3} < counts
    assert model.rows(MIXED[:1])[0].depth == 3  # nothing is drawn without a seed
    model.train()
    (row,), fixed = model.rows(MIXED[:1], seed="0/5/0/0"), looped(max_loops=1)
    row.depth = 1
    assert_close(model(model.batch([row])).loss, fixed.train().loss(MIXED[:1]).loss)


@by_arch
@pytest.mark.parametrize("bptt", [1, 2, 3])
def test_back_propagation_may_be_cut_before_the_last_loops(arch, bptt):
    """Against an unrolled decoder whose state is detached at the cut."""
    model = looped(arch, max_loops=3, bptt=bptt, n_prelude=1).train()
    grads = gradients(model, model.loss(MIXED[:1]).loss)
    backbone, (row,) = model.backbone, model.rows(MIXED[:1])
    ids, n = torch.tensor([row.ids()]), len(row.ids())
    at, block = torch.arange(n)[None], range(1, 3)
    h = backbone(backbone.embed(ids), layers=range(1), positions_BL=at, inner=False)
    for loop in range(1, 4):
        h = h.detach() if loop == 3 - bptt + 1 and loop > 1 else h
        h = backbone(h, layers=block, positions_BL=at, inner=True)
    logits = backbone.head(backbone.norm(h))[0]
    n_written = sum(label >= 0 for label in row.labels())
    loss = nn.functional.cross_entropy(logits[-n_written - 1 : -1], ids[0, -n_written:])
    expected = gradients(model, loss)
    for name, grad in grads.items():
        assert_close(grad, expected[name])
    prelude = [grad.abs().max() for name, grad in grads.items() if ".0." in name]
    assert (max(prelude) > 0) == (bptt == 3)


def test_detached_iterations_learn_as_if_there_were_only_the_last():
    cut, one = looped(max_loops=3, detach=True), looped(max_loops=3, bptt=1)
    left, right = (gradients(model, model.loss(MIXED).loss) for model in (cut, one))
    assert all(torch.equal(left[name], right[name]) for name in left)
    whole = looped(max_loops=3)
    assert any(not torch.equal(grad, left[name]) for name, grad in gradients(whole, whole.loss(MIXED).loss).items())


def test_without_back_propagation_only_what_comes_after_the_loop_learns():
    model = looped(max_loops=2, n_coda=1, bptt=0).train()
    grads = gradients(model, model.loss(MIXED).loss)
    layers = [{name for name, g in grads.items() if f"layers.{i}." in name and g.abs().max() > 0} for i in range(3)]
    assert not layers[0] and not layers[1] and layers[2]


@by_arch
def test_activation_checkpointing_changes_no_gradient(arch):
    fields = {"n_prelude": 1, "max_loops": 2, "lora": "per_iter", "lora_rank": 2, "exit_weight": 0.5}
    model = looped(arch, **fields, input_injection=True, spectral_weight=1.0, spectral_bound=0.0).eval()
    model.train()
    torch.manual_seed(0)
    plain = gradients(model, model.loss(MIXED).loss)
    model.activation_checkpointing_enable()
    torch.manual_seed(0)
    kept = gradients(model, model.loss(MIXED).loss)
    for name in plain:
        assert_close(kept[name], plain[name])


def test_a_loop_that_stretches_is_penalised():
    model = looped(max_loops=2, spectral_weight=2.0, spectral_bound=0.0).train()
    torch.manual_seed(0)
    terms = model.loss(MIXED[:2]).terms
    assert terms["gain"] > 0
    wide = looped(max_loops=2, spectral_weight=2.0, spectral_bound=1e6).train()
    assert wide.loss(MIXED[:2]).terms["gain"] == 0


@pytest.mark.slow
def test_it_learns_by_heart():
    model = tiny_model(Looped(max_loops=2, n_prelude=1), num_hidden_layers=2, initializer_range=0.1)
    examples = chain_examples(4)
    assert learn(model, examples, 100) < 0.05
    generations = model.generate([example.question for example in examples], max_new_tokens=40)
    assert [generation.answer for generation in generations] == [example.answer for example in examples]
