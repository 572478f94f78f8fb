"""Think-at-Hard (tah.md, section 9): which states a token sees, what it shows, and that nothing else changes."""

import copy
import itertools
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from innerloop import Cot, InputError, LatentModel, Tah, write_examples
from innerloop.methods import Method
from innerloop.methods.depth.decider import Decider, usual_layers
from innerloop.methods.depth.prune import loss_without, prune_layer
from innerloop.train.recipe import parse_recipe
from tests.methods.reference_tah import columns, read, slow
from tests.methods.tools import MIXED, assert_close, base, by_arch, change, on, stir
from tests.models import chain_examples, random_ids, saved, tiny_backbone, tiny_model

T, V = 9, 18
SMALL = Tah(iterate="never", lora={"rank": 2}, decider={"width": 8, "blocks": 1}, input_mix_topk=7)
TWICE = torch.tensor([[1, 2, 1, 1, 2, 2, 1, 1, 2], [2, 1, 1, 1, 1, 1, 1, 1, 1], [1, 1, 2, 2, 2, 2, 2, 2, 2]])
THRICE = torch.tensor([[1, 2, 3, 1, 2, 3, 1, 3, 2], [3, 1, 1, 1, 1, 1, 1, 1, 1], [1, 1, 2, 2, 3, 2, 2, 2, 3]])
SETTINGS = [
    {},
    {"depth_attention": "depth1_only"},
    {"depth_attention": "same_depth"},
    {"residual_logits": False},
    {"input_mix_topk": 1},
    {"lora.kind": "none"},
    {"max_loops": 3},
    {"max_loops": 3, "lora.kind": "per_iter", "depth_attention": "same_depth"},
]

by_setting = pytest.mark.parametrize("settings", SETTINGS, ids=lambda s: "-".join(map(str, s.values())) or "default")


def ids() -> Tensor:
    return random_ids(3, T) % V


def model_with(arch: str, **settings) -> tuple[LatentModel, Tensor]:
    """Return a model, and how often each of three rows of tokens is read."""
    method = change(SMALL, **settings)
    return on(arch, method), THRICE if method.max_loops == 3 else TWICE


def own(arch: str, method: Method) -> LatentModel:
    """Return a model with weights of its own."""
    model = tiny_model(method, arch).double()
    stir(model)
    return model


def plain_logits(arch: str, tokens: Tensor) -> Tensor:
    """Return the logits of the plain decoder, run by itself."""
    backbone = base(arch).backbone
    with torch.no_grad():
        return backbone.head(backbone(backbone.embed(tokens)))


# Every forced pattern equals the slow reference, in any passes, batch and padding.


@by_setting
@by_arch
def test_any_pattern_equals_the_slow_reference_in_one_pass_or_part_by_part_or_token_by_token(arch, settings):
    model, depths = model_with(arch, **settings)
    whole, _ = read(model, ids(), depths)
    for row in range(3):
        assert_close(whole[row], slow(model, ids()[row].tolist(), depths[row].tolist()), 1e-6)
    for parts in ([T - 1, 1], [1] * T, [3, 1, 4, 1]):
        assert_close(read(model, ids(), depths, parts)[0], whole, 1e-6)


@pytest.mark.parametrize("settings", [{}, {"max_loops": 3, "lora.kind": "per_iter"}], ids=["two", "three"])
@by_arch
def test_padding_on_either_side_and_neighbours_change_nothing(arch, settings):
    model, depths = model_with(arch, **settings)
    for row, n in ((0, 5), (1, 7), (2, 9)):
        alone, _ = read(model, ids()[row : row + 1, :n], depths[row : row + 1, :n])
        for before in (0, 2, 4):
            spread = [torch.roll(torch.nn.functional.pad(t, (0, 4)), before, dims=1) for t in (ids(), depths)]
            real = torch.tensor([[before <= c < before + limit for c in range(T + 4)] for limit in (5, 7, 9)]).long()
            logits, _ = read(model, *spread, mask_BL=real)
            assert_close(logits[row, before : before + n], alone[0], 1e-6)


@by_arch
def test_a_later_token_changes_nothing_before_it(arch):
    model, depths = model_with(arch)
    logits, _ = read(model, ids(), depths)
    for at in range(1, T):
        changed = ids()
        changed[:, at] = (changed[:, at] + 1) % V
        others = depths.clone()
        others[:, at] = 3 - others[:, at]  # whether it is read twice makes no difference to those before it, either
        for moved in (read(model, changed, depths)[0], read(model, ids(), others)[0]):
            assert_close(moved[:, :at], logits[:, :at], 1e-6)
            assert (moved[:, at] - logits[:, at]).abs().amax(-1).min() > 1e-4


# The first reading is the plain decoder's, whatever iterates.


@by_arch
def test_the_first_reading_is_the_plain_decoders_bit_for_bit_whatever_iterates(arch):
    """While decoding, too, it does not see the second."""
    model, depths = model_with(arch)
    plain = plain_logits(arch, ids())
    never, nothing = read(model, ids(), torch.ones_like(depths))
    assert torch.equal(never, plain)
    for pattern in (depths, 3 - depths, torch.full_like(depths, 2)):
        logits, context = read(model, ids(), pattern)
        assert torch.equal(logits[pattern == 1], plain[pattern == 1])
        for row, layer in itertools.product(range(3), range(2)):
            assert torch.equal(columns(context, 1, layer, row), columns(nothing, 1, layer, row))
    logits, context = read(model, ids(), depths, [4, 1, 1, 1, 1, 1])
    assert_close(logits[depths == 1], plain[depths == 1], 1e-6)
    for row in range(3):
        assert_close(columns(context, 1, 1, row), columns(nothing, 1, 1, row), 1e-6)


@pytest.mark.parametrize("depth_attention", ["duo", "same_depth", "depth1_only"])
@by_arch
def test_the_cache_holds_every_token_once_and_those_that_iterate_twice(arch, depth_attention):
    model, depths = model_with(arch, depth_attention=depth_attention)
    _, context = read(model, ids(), depths, [4, 1, 4])
    for row in range(3):
        twice = int((depths[row] == 2).sum()) if depth_attention != "depth1_only" else 0  # nobody would look at them
        assert [len(columns(context, depth, row=row)) for depth in (1, 2)] == [T, twice]


@by_arch
def test_the_mask_is_the_cards_truth_table(arch):
    """Tokens 1 and 3 of three iterate; columns are (1, 1), (2, 1), (3, 1), (1, 2) and (3, 2) (tah.md, section 9)."""
    model, seen = model_with(arch)[0], []

    def note(module, args, kwargs):
        seen.append(kwargs["attention_mask"])

    handle = model.backbone.decoder.register_forward_pre_hook(note, with_kwargs=True)
    read(model, ids()[:1, :3], torch.tensor([[2, 1, 2]]))
    handle.remove()
    first, second = seen
    assert first is None  # causal, as the decoder itself does it
    assert (second[0, 0] == 0).int().tolist() == [[1, 0, 0, 1, 0], [1, 1, 1, 1, 1]]


# LoRA


@by_arch
def test_at_the_start_the_second_reading_is_the_base_model_on_the_mixed_embeddings(arch):
    """B = 0: with or without LoRA is the same; later it is not, and the first reading never changes."""
    (model, depths), without = model_with(arch), change(SMALL, lora={"kind": "none"})
    models = on(arch, SMALL, stirred=False), on(arch, without), model
    fresh, plain, moved = (read(one, ids(), depths)[0] for one in models)
    assert_close(fresh, plain, 1e-12)
    assert torch.equal(moved[depths == 1], plain[depths == 1])
    assert (moved - plain)[depths == 2].abs().amax(-1).min() > 1e-4
    assert model.loop.lora.entry is None and not model.loop.lora.rows_by_entry  # off again


@by_arch
def test_with_attention_to_the_same_depth_alone_the_second_reading_is_the_base_model(arch):
    method = change(SMALL, depth_attention="same_depth", lora={"kind": "none"})
    twice = torch.full((3, T), 2)
    first = plain_logits(arch, ids())
    added, alone = (read(on(arch, change(method, residual_logits=r)), ids(), twice)[0] for r in (True, False))
    backbone = base(arch).backbone
    top = first.topk(7)
    with torch.no_grad():
        mixed = (top.values.softmax(-1)[..., None] * backbone.embed(top.indices)).sum(-2)
        second = backbone.head(backbone(mixed))
    assert_close(alone, second, 1e-6)
    assert_close(added, first + second, 1e-6)


# The mixture


@pytest.mark.parametrize("arch", ["gpt2", "llama", "gemma3"])
def test_the_next_input_mixes_the_embeddings_of_the_likeliest_words(arch):
    model = own(arch, change(SMALL, input_mix_topk=4))
    backbone, chooser = model.backbone, model.depth.chooser
    logits = torch.randn(5, len(model.tokenizer), dtype=torch.double)
    top = logits.topk(7)
    mixed = chooser.mix(top.values, top.indices)
    shares = logits.topk(4).values.softmax(-1)
    assert_close(shares.sum(-1), torch.ones(5, dtype=torch.double), 1e-12)  # in the convex hull of four rows
    assert_close(mixed, (shares[..., None] * backbone.embed(logits.topk(4).indices)).sum(1), 1e-6)
    words = torch.tensor([3, 1, 4, 1, 5])
    peaked = (torch.nn.functional.one_hot(words, logits.shape[1]) * 60.0).double().topk(7)
    assert_close(chooser.mix(peaked.values, peaked.indices), backbone.embed(words), 1e-10)
    one = LatentModel(backbone, model.tokenizer, change(SMALL, input_mix_topk=1)).depth.chooser
    assert torch.equal(one.mix(top.values, top.indices), backbone.embed(logits.argmax(-1)))


# Settings at which nothing iterates


@pytest.mark.parametrize(
    "method",
    [
        change(SMALL, iterate="decider", tau=1.0),
        change(SMALL, max_loops=1),
        change(SMALL, iterate="decider", max_loops=1),
        SMALL,
        change(SMALL, iterate="oracle", oracle={"reference": "not asked"}),
    ],
    ids=["tau", "one", "one-decider", "never", "oracle"],
)
@by_arch
def test_where_nothing_iterates_it_is_the_plain_model(arch, method, answers):
    model, plain = on(arch, method), on(arch, Cot())
    for ours, theirs in zip(model.answer_logits(MIXED), plain.answer_logits(MIXED)):
        assert torch.equal(ours, theirs)
    decides = method.iterate == "decider" and method.max_loops > 1
    for one, other in zip(answers(model), answers(plain)):
        assert one.ids == other.ids and {depth for _, depth in one.depths} == {1}
        assert (one.cost.passes, one.cost.positions) == (other.cost.passes, other.cost.positions)
        more = len(one.ids) * model.depth.chooser.decider.flops if decides else 0.0
        more += 2.0 * model.backbone.width * V * decides  # the question's last token is read out once more
        assert one.cost.flops == pytest.approx(other.cost.flops + more, rel=1e-12)


@pytest.mark.parametrize("arch", ["qwen3", "mistral", "gemma3"])
def test_tied_heads_windows_and_scaled_embeddings(arch):
    model = own(arch, SMALL)
    plain = LatentModel(model.backbone, model.tokenizer, Cot()).eval()
    for ours, theirs in zip(model.answer_logits(MIXED), plain.answer_logits(MIXED)):
        assert torch.equal(ours, theirs)
    tokens = ids() % len(model.tokenizer)
    whole, once = (read(model, tokens, depths)[0] for depths in (TWICE, torch.ones_like(TWICE)))
    assert_close(read(model, tokens, TWICE, [1] * T)[0], whole, 1e-5)
    assert (whole - once)[TWICE == 2].abs().amax(-1).min() > 1e-4


def test_a_method_may_be_asked_for_fewer_iterations(answers):
    model, plain = on("llama", change(SMALL, iterate="always")), on("llama", Cot())
    once, twice, thrice = (answers(model, loops=loops) for loops in (1, None, 3))
    assert [one.ids for one in once] == [one.ids for one in answers(plain)] != [one.ids for one in twice]
    assert max(depth for one in thrice for _, depth in one.depths) == 3


DECIDES = Tah(lora={"rank": 2}, decider={"width": 8, "blocks": 1})


def test_what_the_model_cannot_is_refused_in_one_sentence():
    with pytest.raises(InputError, match=r"states after layers 0 .the embeddings. to 2 of this model"):
        tiny_model(Tah(decider={"layers": (1, 3)}), "llama")
    with pytest.raises(InputError, match="from scratch has no layer to delete"):
        tiny_model(change(DECIDES, prune_rows="rows.jsonl"))
    backbone, tokenizer = tiny_backbone("llama"), tiny_model(Cot()).tokenizer
    head = backbone.lm.get_output_embeddings()
    head.bias = nn.Parameter(torch.zeros(head.weight.shape[0]))
    with pytest.raises(InputError, match=r"or has a bias.*its logits do not add up: set residual_logits to false"):
        LatentModel(backbone, tokenizer, DECIDES)
    LatentModel(backbone, tokenizer, change(DECIDES, residual_logits=False))


def test_the_paths_of_a_recipe_are_of_its_run():
    oracle = {"reference": "{out}/stages/1", "cache": "{out}/labels"}
    raw = {"name": "tah", "iterate": "oracle", "oracle": oracle, "decider": {"layers": [0, 1]}}
    recipe = parse_recipe({"task": "chain", "backbone": {"model": "x"}, "method": raw, "out": "runs/x"}).with_paths()
    of_run = {"reference": "runs/x/stages/1", "cache": "runs/x/labels"}
    assert recipe.method == Tah(iterate="oracle", oracle=of_run, decider={"layers": (0, 1)})


def test_the_usual_layers_are_the_cards():
    assert usual_layers(28) == (0, 7, 13, 20, 26)
    assert [usual_layers(n) for n in (1, 2, 3, 4)] == [(0,), (0, 1), (0, 1), (0, 1, 2)]
    assert tiny_model(DECIDES, num_hidden_layers=1).depth.chooser.layers == (0,)


def test_the_decider_is_the_cards_network():
    torch.manual_seed(0)
    decider = Decider(width=8, n_states=3, n_logits=5, hidden=6, n_blocks=4, dropout=0.25)
    linears = [m for m in decider.modules() if isinstance(m, nn.Linear)]
    shapes = [tuple(m.weight.shape) for m in linears]
    assert shapes == [(8, 5), (6, 32), (6, 6), *[(24, 6), (6, 24)] * 4, (1, 6)]
    assert decider.flops == 2 * sum(a * b for a, b in shapes)
    assert {m.p for m in decider.modules() if isinstance(m, nn.Dropout)} == {0.25}
    assert all(m.bias.abs().max() == 0 for m in linears)
    states, top = [torch.randn(7, 8) for _ in range(3)], torch.randn(7, 5)
    decider.eval()
    x = decider.mix(decider.enter(torch.cat([*states, decider.of_logits(top)], dim=1)))
    for norm, rise, _, _, fall, _ in decider.blocks:
        x = x + fall(nn.functional.gelu(rise(norm(x))))
    assert torch.equal(decider(states, top), decider.leave(decider.norm(x))[:, 0])
    decider.train()
    assert not torch.equal(decider(states, top), decider(states, top))
    narrow = Decider(width=8, n_states=3, n_logits=5, hidden=6, n_blocks=0, dropout=0.25)
    assert len(narrow.blocks) == 0 and narrow(states, top).shape == (7,)


def test_the_decider_has_the_sizes_that_were_asked_for():
    sizes = {"layers": (2, 0), "width": 12, "blocks": 3, "dropout": 0.3}
    decider = tiny_model(Tah(lora={"rank": 2}, input_mix_topk=4, decider=sizes)).depth.chooser.decider
    assert (decider.of_logits.in_features, decider.enter.in_features) == (4, 3 * 32)
    assert (decider.enter.out_features, len(decider.blocks), decider.blocks[0][3].p) == (12, 3, 0.3)
    assert tiny_model(change(DECIDES, iterate="always")).depth.chooser.decider is None


@pytest.mark.parametrize(("kind", "n_banks"), [("shared", 1), ("per_iter", 2), ("none", 0)])
def test_lora_is_shared_or_one_for_each_reading_after_the_first(kind, n_banks):
    bank = tiny_model(Tah(iterate="always", max_loops=3, lora={"kind": kind, "rank": 3, "gamma": 6.0})).loop.lora
    assert (bank is None) == (kind == "none")
    if bank is not None:
        assert len(bank.modules_by_name) == 7 * 3 and bank.scale == 2.0
        assert {down.shape[:2] for down in bank.down.values()} == {(n_banks, 3)}


# One layer less


@by_arch
def test_the_loss_without_a_layer_is_that_of_the_model_without_it(arch):
    backbone, row = tiny_backbone(arch, num_hidden_layers=4), torch.randint(3, 60, (12,))
    for gone in range(4):
        twin, kept = copy.deepcopy(backbone), [i for i in range(4) if i != gone]
        twin.replace_layers([twin.layers[i] for i in kept], kept)
        with torch.no_grad():
            loss = twin.lm(input_ids=row[None], labels=row[None]).loss.item()
        assert loss_without(backbone, [row.tolist()], gone) == pytest.approx(loss, rel=1e-5)


@pytest.mark.parametrize("idle", [1, 3])
@by_arch
@torch.no_grad()
def test_the_layer_that_is_missed_least_is_deleted(arch, idle):
    backbone = tiny_backbone(arch, num_hidden_layers=4)
    for name, parameter in backbone.layers[idle].named_parameters():
        if any(part in name for part in ("o_proj", "down_proj", "c_proj")):  # it adds nothing to the states
            parameter.zero_()

    def written(ids: torch.Tensor, n: int) -> torch.Tensor:
        return backbone.lm.generate(ids, max_new_tokens=n, do_sample=False, eos_token_id=None)

    ids, known = torch.randint(3, 60, (2, 9)), written(torch.randint(3, 60, (4, 2)), 20)  # text that it knows best
    before, cached = backbone.head(backbone(backbone.embed(ids))), written(ids, 4)
    with pytest.raises(InputError, match="give at least one of two tokens"):
        prune_layer(backbone, [[1]])
    assert prune_layer(backbone, known.tolist()) == idle
    assert backbone.n_layers == backbone.config.num_hidden_layers == 3
    assert torch.equal(backbone.head(backbone(backbone.embed(ids))), before)
    assert torch.equal(written(ids, 4), cached)
    with pytest.raises(InputError, match="the model has one layer, which leaves none: leave prune_rows out"):
        prune_layer(tiny_backbone(arch, num_hidden_layers=1), known.tolist())


@by_arch
def test_a_pretrained_model_is_pruned_once_when_the_method_is_put_on_it(arch, tmp_path: Path):
    plain, rows = tiny_model(Cot(), arch, num_hidden_layers=4), tmp_path / "rows.jsonl"
    write_examples(chain_examples(8), rows)
    method = change(DECIDES, iterate="always", prune_rows=str(rows))
    model = LatentModel.from_pretrained(saved(plain, tmp_path / "plain"), method)
    again = LatentModel.from_pretrained(saved(model, tmp_path / "tah"))
    assert again.backbone.n_layers == model.backbone.n_layers == 3 and again.method == method
    for ours, theirs in zip(again.answer_logits(MIXED), model.answer_logits(MIXED)):
        assert torch.equal(ours, theirs)
