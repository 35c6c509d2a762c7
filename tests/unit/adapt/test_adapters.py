"""Adapters: what they compute and learn, swapped bit for bit, kept in a folder that is hostile until checked."""

import copy
import json
import re
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from lorq.adapt.adapters import (
    ADAPTER_CONFIG,
    ADAPTER_TENSORS,
    adapters_of,
    attach,
    base_hash,
    load_adapter,
    save_adapter,
    use_adapter,
)
from lorq.adapt.saving import merge
from lorq.core.codes import IntCodes, IntGrid, LevelCodes, LevelFormat, LowRankScale, levels
from lorq.core.weight import QuantizedWeight
from lorq.runtime.linear import QuantLinear
from lorq.storage.atomic import sha256_of

# Names, shapes (out, in) and scale ranks of the little model's layers.
LAYERS = {"up": (24, 16, 2), "down": (16, 24, 3)}


def packed(out, in_, rank, *, seed=0, grid="normal-float", bits=4, bias=None):
    """A layer with random codes, and scales of both signs."""
    generator = torch.Generator().manual_seed(seed)
    factors = [torch.randn(*shape, generator=generator).half() for shape in ((out, rank), (rank, in_))]
    codes = torch.randint(0, 2**bits, (out, in_), generator=generator).to(torch.uint8)
    weight = QuantizedWeight(LevelCodes(codes, LowRankScale(*factors), LevelFormat(bits, grid, in_, rank)))
    return QuantLinear.from_weight(weight, bias).requires_grad_(False)


class Net(nn.Module):
    def __init__(self, seed=0, grid="normal-float"):
        super().__init__()
        self.norm = nn.LayerNorm(16)
        shapes = enumerate(LAYERS.items())
        layers = {name: packed(*sizes, seed=seed + i, grid=grid) for i, (name, sizes) in shapes}
        self.up, self.down = layers["up"], layers["down"]

    def forward(self, x):
        return self.down(torch.tanh(self.up(self.norm(x))))


@pytest.fixture
def net():
    return Net()


@pytest.fixture
def x(generator):
    return torch.randn(2, 5, 16, generator=generator)


def stir(model, name, amount=0.1):
    """Change an adapter as training would."""
    generator = torch.Generator().manual_seed(len(name))
    for pair in adapters_of(model).known[name].values():
        for part in pair:
            part.data += amount * torch.randn(part.shape, generator=generator)


# ---- what an adapter computes and learns ------------------------------------------------------------------


@pytest.mark.parametrize("rank", [-1, 3, 5, 16])
def test_a_new_adapter_computes_what_the_base_does_to_the_last_bit(net, x, rank):
    expected = net(x)
    parameters = attach(net, rank=rank)
    assert torch.equal(net(x), expected)
    ranks = {"up": 2, "down": 3} if rank == -1 else dict.fromkeys(LAYERS, rank)
    assert {name: layer.format.codes.scale_rank for name, layer in net.named_children() if name in LAYERS} == ranks
    assert sum(p.numel() for p in parameters) == sum(ranks[name] * (16 + 24) for name in LAYERS)
    assert all(p.dtype == torch.float32 for p in parameters)


@pytest.mark.parametrize("shape", [(48, 96, 1), (7, 130, 5), (200, 300, 12), (576, 576, 4)])
def test_more_rank_changes_no_bit_of_wider_layers_either(shape, generator):
    class One(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = packed(*shape)

    model, x = One(), torch.randn(3, shape[1], generator=generator)
    expected = model.layer(x)
    for rank in (shape[2] + 1, min(shape[:2]) // 2, min(shape[:2])):
        if rank > shape[2]:
            attach(model, str(rank), rank=rank)
            assert torch.equal(model.layer(x), expected), rank


def test_only_the_factors_train_and_they_are_the_models_parameters(net):
    assert [n for n, p in net.named_parameters() if p.requires_grad] == ["norm.weight", "norm.bias"]
    parameters = attach(net)
    learning = {n: p for n, p in net.named_parameters() if p.requires_grad}
    assert list(learning) == ["up.scale_left", "up.scale_right", "down.scale_left", "down.scale_right"]
    assert all(mine is theirs for mine, theirs in zip(parameters, learning.values(), strict=True))


@pytest.mark.parametrize("grid", ["normal-float", "integer"])
def test_gradients_are_those_of_the_dense_formula(grid, x):
    net = Net(grid=grid)
    attach(net, rank=4)
    stir(net, "default")

    def dense(layer, left, right):
        return levels(grid, 4).double()[layer.value().codes.codes.long()] * (left @ right)

    copies = [p.detach().double().requires_grad_() for n, p in net.named_parameters() if "scale" in n]
    x64 = x.double().requires_grad_()
    middle = torch.tanh(nn.functional.layer_norm(x64, (16,)) @ dense(net.up, *copies[:2]).T)
    (middle @ dense(net.down, *copies[2:]).T).square().sum().backward()
    x32 = x.clone().requires_grad_()
    net(x32).square().sum().backward()
    learned = [p.grad for n, p in net.named_parameters() if "scale" in n]
    for mine, expected in zip([*learned, x32.grad], [c.grad for c in [*copies, x64]], strict=True):
        assert mine.norm() > 0
        torch.testing.assert_close(mine.double(), expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))


def test_rows_that_a_larger_rank_adds_learn_in_two_steps(net, x):
    """The added columns of left are zero, so its gradient comes first; the added rows of right are not."""
    attach(net, rank=4)
    net(x).square().sum().backward()
    left, right = net.up.scale_left, net.up.scale_right
    assert (left.grad[:, 2:].norm() > 0) and right.grad[2:].count_nonzero() == 0
    assert left[:, 2:].count_nonzero() == 0
    ratio = right.detach()[2:].square().mean() / right.detach()[:2].square().mean()
    assert 0.3 < float(ratio) < 3


def test_the_dense_weight_is_not_kept_for_the_backward_pass(generator):
    class Wide(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = packed(256, 320, 4)

    model, kept = Wide(), []
    attach(model, rank=8)
    x = torch.randn(6, 320, generator=generator, requires_grad=True)

    def note(tensor):
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        y = model.layer(x)
    # Packed codes are an eighth of the weights; all else is thin.
    assert kept and max(tensor.numel() for tensor in kept) == 256 * 320 // 8
    assert sum(tensor.nbytes for tensor in kept) < 256 * 320 * 4 / 4
    y.sum().backward()
    assert model.layer.scale_left.grad.norm() > 0


def test_gradients_of_a_layer_of_several_strips_are_those_of_one(monkeypatch, x):
    from lorq.kernels import reference

    found = []
    for entries in (1 << 22, 7 * 16):
        monkeypatch.setattr(reference, "_STRIP_ENTRIES", entries)
        net = Net()
        parameters = attach(net, rank=4)
        net(x).square().sum().backward()
        found.append([p.grad for p in parameters])
    for one, strips in zip(*found, strict=True):
        torch.testing.assert_close(one, strips)


# ---- swapping ---------------------------------------------------------------------------------------------


def test_adapters_of_one_base_are_swapped_bit_for_bit(net, x):
    expected = {"base": net(x)}
    for name, rank in (("one", -1), ("two", 5)):
        attach(net, name, rank=rank)
        stir(net, name)
        expected[name] = net(x).detach()
    assert len({tuple(y.flatten().tolist()) for y in expected.values()}) == 3
    for name in ("base", "one", "two", "one", "base", "two"):
        use_adapter(net, name)
        assert torch.equal(net(x), expected[name])
        assert not any(p.requires_grad for p in net.parameters())
        assert adapters_of(net).active == name
    use_adapter(net, "one", trainable=True)
    assert sum(p.requires_grad for p in net.parameters()) == 4


def test_an_adapter_begins_with_the_base_whatever_is_in_use(net, x):
    expected = net(x)
    attach(net, "one")
    stir(net, "one")
    attach(net, "two")
    assert torch.equal(net(x), expected)


def test_a_copy_of_the_model_is_independent_of_it(net, x):
    base = net(x)
    attach(net, "one")
    stir(net, "one")
    expected = net(x).detach()
    other = copy.deepcopy(net)
    stir(other, "one")
    assert torch.equal(net(x), expected) and not torch.equal(other(x), expected)
    merge(other)
    attach(other, "two")
    assert list(adapters_of(net).known) == ["base", "one"] and torch.equal(net(x), expected)
    use_adapter(net)
    assert torch.equal(net(x), base)


def test_saving_a_copy_saves_the_copys_adapter(net, tmp_path):
    attach(net, "one")
    other = copy.deepcopy(net)
    stir(other, "one")
    other.save_pretrained(tmp_path / "copy")
    stored = load_file(tmp_path / "copy" / ADAPTER_TENSORS)
    assert torch.equal(stored["up.scale_left"], other.up.scale_left.half())


def test_another_type_of_the_model_leaves_the_factors_in_float32(net, x):
    attach(net, rank=4)
    before = [p.clone() for n, p in net.named_parameters() if "scale" in n]
    net.to(torch.bfloat16)
    after = [p for n, p in net.named_parameters() if "scale" in n]
    assert all(torch.equal(p, q) and p.dtype == torch.float32 for p, q in zip(before, after, strict=True))
    net(x.bfloat16()).float().square().sum().backward()
    assert all(p.grad.dtype == torch.float32 and p.grad.norm() > 0 for p in after[:1])


# ---- folders ----------------------------------------------------------------------------------------------


@pytest.fixture
def folder(net, tmp_path):
    """An adapter of rank 5, trained a little."""
    attach(net, "mine", rank=5)
    stir(net, "mine")
    save_adapter(net, tmp_path / "mine")
    return tmp_path / "mine"


def test_a_saved_adapter_is_what_was_learned_rounded_to_float16(net, folder, x):
    fresh = Net()
    assert load_adapter(fresh, folder) == "mine"
    pairs = [adapters_of(model).known["mine"] for model in (net, fresh)]
    for name in LAYERS:
        for mine, theirs in zip(pairs[0][name], pairs[1][name], strict=True):
            assert torch.equal(mine.half().float(), theirs)
    expected = net(x).detach()
    torch.testing.assert_close(fresh(x), expected, rtol=1e-2, atol=1e-2 * float(expected.abs().max()))
    assert not any(p.requires_grad for p in fresh.parameters())
    config = json.loads((folder / ADAPTER_CONFIG).read_bytes())
    ranks, checksum = dict.fromkeys(LAYERS, 5), sha256_of(folder / ADAPTER_TENSORS)
    assert config == {"lorq_adapter": 1, "base": base_hash(net), "ranks": ranks, "sha256": checksum}


def test_a_loaded_adapter_saves_to_the_same_bytes_and_trains_on(folder, x, tmp_path):
    fresh = Net()
    assert load_adapter(fresh, folder, "yours", trainable=True) == "yours"
    save_adapter(fresh, tmp_path / "again")
    for file in (ADAPTER_CONFIG, ADAPTER_TENSORS):
        assert (tmp_path / "again" / file).read_bytes() == (folder / file).read_bytes()
    fresh(x).sum().backward()
    assert fresh.up.scale_left.grad.norm() > 0


def test_saving_replaces_an_adapter_and_can_name_one_that_is_not_in_use(net, folder):
    attach(net, "other")
    save_adapter(net, folder, "mine")
    assert load_file(folder / ADAPTER_TENSORS)["up.scale_left"].shape == (24, 5)
    save_adapter(net, folder)
    assert load_file(folder / ADAPTER_TENSORS)["up.scale_left"].shape == (24, 2)


def test_the_hash_is_that_of_the_codes_and_their_places(net):
    same = base_hash(net)
    attach(net)
    stir(net, "default")
    assert base_hash(net) == same == base_hash(Net())
    assert len({same, base_hash(Net(seed=1)), base_hash(Net(grid="integer"))}) == 3
    net.up.weight_packed[3, 1] ^= 1
    assert base_hash(net) != same


def test_an_adapter_of_other_codes_is_refused_with_both_hashes(folder):
    other = Net(seed=1)
    found = f"is an adapter for the base {base_hash(Net())[:12]}, this model is {base_hash(other)[:12]}"
    with pytest.raises(ValueError, match=found):
        load_adapter(other, folder)
    assert list(adapters_of(other).known) == ["base"]


def edit(change):
    """Damage done to the config of an adapter."""

    def damage(folder):
        path = folder / ADAPTER_CONFIG
        config = json.loads(path.read_bytes())
        change(config)
        path.write_text(json.dumps(config))

    return damage


def spoil(change):
    """Damage done to its tensors."""

    def damage(folder):
        tensors = load_file(folder / ADAPTER_TENSORS)
        change(tensors)
        save_file(tensors, folder / ADAPTER_TENSORS)

    return damage


def truncate(folder):
    path = folder / ADAPTER_TENSORS
    path.write_bytes(path.read_bytes()[:-10])


DAMAGES = {
    "no config": (lambda f: (f / ADAPTER_CONFIG).unlink(), FileNotFoundError, f"has no {ADAPTER_CONFIG}: no adapter"),
    "no tensors": (lambda f: (f / ADAPTER_TENSORS).unlink(), FileNotFoundError, f"has no {ADAPTER_TENSORS}; copy"),
    "no folder": (shutil.rmtree, FileNotFoundError, "no adapter is there; name a folder that lorq adapt wrote"),
    "no JSON": (lambda f: (f / ADAPTER_CONFIG).write_text("{"), ValueError, "JSON"),
    "a list": (lambda f: (f / ADAPTER_CONFIG).write_text("[]"), ValueError, re.escape(ADAPTER_CONFIG)),
    "newer": (edit(lambda c: c.update(lorq_adapter=2)), ValueError, "adapter version 2, this lorq reads 1; upgrade"),
    "no version": (edit(lambda c: c.pop("lorq_adapter")), ValueError, "adapter version None, this lorq reads 1"),
    "no base": (edit(lambda c: c.pop("base")), ValueError, "is an adapter for the base None, this model is "),
    "no ranks": (edit(lambda c: c.pop("ranks")), ValueError, "ranks must name the base's 2 layers"),
    "a rank too many": (edit(lambda c: c["ranks"].update(x=1)), ValueError, "ranks must name the base's 2 layers"),
    "rank 0": (edit(lambda c: c["ranks"].update(up=0)), ValueError, "rank of up must fit its layer, got 0"),
    "rank 17": (edit(lambda c: c["ranks"].update(up=17)), ValueError, "rank of up must fit its layer, got 17"),
    "rank in words": (edit(lambda c: c["ranks"].update(up="5")), ValueError, "rank of up must fit its layer, got '5'"),
    "another rank": (
        edit(lambda c: c["ranks"].update(up=4)), ValueError, r"up.scale_left must be float16 of shape \(24, 4\)",
    ),
    "truncated": (truncate, ValueError, ADAPTER_TENSORS),
    "a tensor less": (
        spoil(lambda t: t.pop("down.scale_right")), ValueError, r"down.scale_right must be float16 of shape \(5, 24\)",
    ),
    "a tensor more": (
        spoil(lambda t: t.update(x=torch.zeros(1))), ValueError, "must hold the 4 factors .* alone, got x",
    ),
    "another shape": (
        spoil(lambda t: t.update({"up.scale_left": torch.zeros(5, 24).half()})), ValueError,
        r"up.scale_left must be float16 of shape \(24, 5\)",
    ),
    "another type": (
        spoil(lambda t: t.update({"up.scale_left": t["up.scale_left"].float()})), ValueError,
        r"up.scale_left must be float16 of shape \(24, 5\)",
    ),
    "not a number": (
        spoil(lambda t: t["up.scale_right"][0].fill_(torch.nan)), ValueError, "up.scale_right must be finite",
    ),
    "infinite": (
        spoil(lambda t: t["up.scale_right"][0].fill_(torch.inf)), ValueError, "up.scale_right must be finite",
    ),
    "another number": (
        spoil(lambda t: t["up.scale_right"][0].mul_(2)), ValueError, "must have the sha256 .* of lorq_adapter.json, it",
    ),
}  # fmt: skip


@pytest.mark.parametrize("damage", list(DAMAGES))
def test_a_damaged_adapter_is_refused_and_the_model_left_alone(folder, x, damage):
    harm, kind, message = DAMAGES[damage]
    harm(folder)
    fresh = Net()
    expected = fresh(x)
    with pytest.raises(kind, match=message):
        load_adapter(fresh, folder)
    assert torch.equal(fresh(x), expected) and list(adapters_of(fresh).known) == ["base"]


def test_an_adapter_never_goes_into_a_models_folder_or_over_a_file(net, tmp_path):
    attach(net)
    (tmp_path / "config.json").touch()
    with pytest.raises(FileExistsError, match="is a model's folder, an adapter needs one of its own"):
        save_adapter(net, tmp_path)
    with pytest.raises(FileExistsError, match=r"needs a folder, .*config\.json is a file"):
        save_adapter(net, tmp_path / "config.json")
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]


def test_factors_beyond_float16_are_not_written_and_not_merged(net, x, tmp_path):
    attach(net)
    net.up.scale_left.data[3, 1] = 70000.0
    expected = net(x)
    with pytest.raises(ArithmeticError, match=r"finite in float16, these are not: up\.scale_left"):
        save_adapter(net, tmp_path / "out")
    with pytest.raises(ArithmeticError, match="scale factors must be finite in float16"):
        merge(net)
    assert torch.equal(net(x), expected) and adapters_of(net).active == "default"


# ---- merging ----------------------------------------------------------------------------------------------


def test_a_merged_adapter_is_the_base_from_then_on(net, folder, x):
    attach(net, "other")
    stir(net, "other")
    other = net(x).detach()
    use_adapter(net, "mine")
    merge(net)
    fresh = Net()
    load_adapter(fresh, folder)
    assert torch.equal(net(x), fresh(x))  # float16 either way
    assert list(adapters_of(net).known) == ["base", "other"] and adapters_of(net).active == "base"
    assert [n for n, _ in net.named_parameters()] == ["norm.weight", "norm.bias"]
    assert all(net.get_submodule(n).scale_left.dtype == torch.float16 for n in LAYERS)
    use_adapter(net, "other")
    assert torch.equal(net(x), other)


def test_merging_the_base_changes_nothing(net, x):
    expected = net(x)
    merge(net)
    assert torch.equal(net(x), expected) and list(adapters_of(net).known) == ["base"]


# ---- mistakes ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rank, layer", [(17, "up"), (2, "down"), (0, "up"), (-2, "up")])
def test_a_rank_that_does_not_fit_every_layer_is_refused(net, rank, layer):
    out, in_, own = LAYERS[layer]
    message = f"at most a layer's smaller side, got {rank}: {layer} is {out} x {in_} with rank {own}; -1 keeps"
    with pytest.raises(ValueError, match=message):
        attach(net, rank=rank)
    assert list(adapters_of(net).known) == ["base"]


def test_a_name_that_is_taken_is_refused(net, folder):
    for name in ("base", "mine"):
        with pytest.raises(ValueError, match=f"must be new, got '{name}', known are base, mine"):
            attach(net, name)
        with pytest.raises(ValueError, match=f"must be new, got '{name}', known are base, mine; give it another"):
            load_adapter(net, folder, name)


def test_an_adapter_that_is_not_there_is_refused(net, tmp_path):
    with pytest.raises(ValueError, match="the adapter must be one of base, got 'x'"):
        use_adapter(net, "x")
    with pytest.raises(ValueError, match="the adapter to save must be one of none so far, got 'base'"):
        save_adapter(net, tmp_path)
    attach(net, "one")
    with pytest.raises(ValueError, match="the adapter to save must be one of one, got 'x'"):
        save_adapter(net, tmp_path, "x")
    with pytest.raises(ValueError, match="the base itself cannot train"):
        use_adapter(net, "base", trainable=True)


def test_models_without_scale_factors_are_refused():
    weight = QuantizedWeight(
        IntCodes(torch.zeros(8, 8).byte(), torch.ones(8, 1).half(), None, IntGrid(4, 8, symmetric=True))
    )
    grouped = nn.Sequential(QuantLinear.from_weight(weight))
    for model, what in ((nn.Sequential(nn.Linear(4, 4)), "no packed layers"), (grouped, "1 packed layers, none of")):
        with pytest.raises(ValueError, match=f"only models quantized with lords .*{what}"):
            attach(model)
