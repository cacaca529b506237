"""Models that compute with a layer's weight without calling the layer."""

from functools import cached_property

import pytest
import torch
from conftest import randomise_adapter
from torch import nn
from torch.nn import functional as F

from rankwise import LoraConfig, adapters_by_row, adapters_off, inject_, merge_, merge_and_remove_, unmerge_
from rankwise.errors import ConfigError
from rankwise.lora.inject import set_adapter_training, trainable_parameters
from rankwise.lora.weight_reads import members_reading, modules_read


class Calls(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(6, 8), nn.Linear(8, 6)

    def forward(self, x):
        return self.down(self.up(x).relu())


class Reads(Calls):
    """Computes as Calls does, from the weights."""

    def forward(self, x):
        hidden = x.to(self.up.weight.dtype) @ self.up.weight.T + self.up.bias
        return F.linear(hidden.relu(), weight=self.down.weight, bias=self.down.bias)


class AsksOnly(Calls):
    def forward(self, x):
        if isinstance(self.up.weight, torch.Tensor) and self.up.bias is not None:
            x = x.to(self.up.weight.dtype).to(self.up.weight.device)
        return super().forward(x)


class Around(nn.Module):
    """Reads a weight two levels below."""

    def __init__(self):
        super().__init__()
        self.inner = nn.ModuleDict({"both": Calls()})
        self.both = Calls()

    def forward(self, x):
        return F.linear(x, self.both.up.weight) + self.inner["both"].up(x)


class Loops(nn.Module):
    """Reads the weights of layers in containers."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(6, 6) for _ in range(2))
        self.blocks = nn.ModuleList(Calls() for _ in range(2))
        self.byname = nn.ModuleDict({"a": nn.Linear(6, 6), "b": nn.Linear(6, 6)})
        self.heads = nn.ModuleList(nn.Linear(6, 6) for _ in range(3))
        self.called = nn.ModuleList([nn.Linear(6, 6)])
        self.one, self.other = nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x):
        for number, layer in enumerate(self.layers):
            x = F.linear(x, layer.weight, layer.bias) + number
        for block in self.blocks:
            up = block.up
            x = block.down((x @ up.weight.T + up.bias).relu())
        x = x + sum(F.linear(x, layer.weight) for layer in self.byname.values())
        x = F.linear(x, self.heads[-1].weight)
        for changed in (self.one, *self.called):
            changed.weight.data.mul_(1)
        for read in [*self.heads[:1], self.one]:
            x = F.linear(x, read.weight)
        return self.other(self.called[0](x))


def read_names(model):
    read = modules_read(model.modules())
    return [name for name, module in model.named_modules() if module in read]


def test_only_layers_whose_values_are_used_count_as_read():
    assert read_names(Calls()) == []
    assert read_names(AsksOnly()) == []
    assert read_names(Reads()) == ["up", "down"]
    assert read_names(Around()) == ["both.up"]
    assert read_names(nn.Sequential(Reads(), Calls())) == ["0.up", "0.down"]
    containers = ["layers.0", "layers.1", "blocks.0.up", "blocks.1.up", "byname.a", "byname.b"]
    assert read_names(Loops()) == [*containers, "heads.0", "heads.1", "heads.2", "one"]


class One(nn.Module):
    def __init__(self):
        super().__init__()
        self.lin0 = nn.Linear(6, 6)


class Names(One):
    """The name of a method holds "tie", and not as a word."""

    def probabilities(self, x):
        return F.linear(x, self.lin0.weight)

    def forward(self, x):
        return self.probabilities(x)


class Properties(One):
    @property
    def table(self):
        return self.lin0.weight

    def forward(self, x):
        return F.linear(x, self.table)


class CachedProperties(One):
    @cached_property
    def layers(self):
        return [self.lin0.weight.shape, lambda x: F.linear(x, self.lin0.weight)]

    def forward(self, x):
        return self.layers[1](x)


class Mixin:
    def project(self, x):
        return F.linear(x, self.lin0.weight)


class MixedIn(One, Mixin):
    def forward(self, x):
        return self.project(x)


class Annotates(One):
    def forward(self, x):
        lin: nn.Linear = self.lin0
        return F.linear(x, lin.weight)


class Walrus(One):
    def forward(self, x):
        return F.linear(x, (lin := self.lin0).weight) + F.linear(x, lin.weight)


class NamedChildren(One):
    def forward(self, x):
        for _, child in self.named_children():
            x = F.linear(x, child.weight)
        return x


class NamedModules(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.ModuleDict({"one": One()})

    def forward(self, x):
        for name, module in self.named_modules():
            if name.endswith("lin0"):
                x = F.linear(x, module.weight)
        return x


class Getattr(One):
    def forward(self, x):
        return F.linear(x, getattr(self, f"lin{len(x) * 0}").weight)


@pytest.mark.parametrize(
    "kind",
    [Names, Properties, CachedProperties, MixedIn, Annotates, Walrus, NamedChildren, NamedModules, Getattr],
    ids=lambda kind: kind.__name__,
)
def test_a_weight_is_seen_to_be_read_however_the_code_comes_by_it(kind):
    model, x = kind().double(), torch.randn(2, 6, dtype=torch.float64)
    inject_(model, LoraConfig(r=2, target_modules=["lin0"]))
    plain = model(x)
    randomise_adapter(model)
    output = model(x)
    assert not torch.allclose(output, plain)
    merge_(model)
    torch.testing.assert_close(model(x), output, rtol=1e-12, atol=1e-12)


def test_what_prepares_a_module_does_not_read_it():
    class Prepares(One):
        def _init_weights(self):
            return self.lin0.weight + 1

        initialize = reset_parameters = tie_weights = resize_it = load_it = _init_weights

    assert read_names(Prepares()) == []


class Decoder(nn.Module):
    def __init__(self, embed):
        super().__init__()
        self.embed = embed

    def forward(self, x):
        return F.linear(x, self.embed.weight)


class Shares(nn.Module):
    def __init__(self):
        super().__init__()
        self.shared = nn.Embedding(10, 4)
        self.decoders = nn.ModuleList([Decoder(self.shared)])

    def forward(self, ids):
        return self.decoders[0](self.shared(ids))


@pytest.mark.parametrize(
    "config", [{"target_modules": ["shared"]}, {"target_modules": (), "trainable_token_indices": [2]}], ids=str
)
def test_a_weight_that_is_read_in_the_second_place_of_its_module_holds_what_the_adapter_adds(config):
    model, ids = Shares().double(), torch.tensor([[1, 2, 3]])
    model.get_input_embeddings = lambda: model.shared
    inject_(model, LoraConfig(r=2, **config))
    randomise_adapter(model)
    output = model(ids)
    merge_and_remove_(model)
    torch.testing.assert_close(model(ids), output, rtol=1e-12, atol=1e-12)


class Attending(nn.Embedding):
    """Computes with its table by methods of its own too."""

    def attend(self, x):
        return F.linear(x, self.weight)

    def _scores(self, x):
        return F.linear(x, self.weight)

    def softly(self, x):
        return self._scores(x).softmax(-1)

    def scaled(self, ids):
        return super().forward(ids) * 3

    @property
    def mean(self):
        return self.weight.mean(0)

    def of_width(self, x):
        return x.view(-1, self.weight.shape[1])


class UsesMethods(nn.Module):
    def __init__(self, use):
        super().__init__()
        self.emb, self.use = Attending(10, 4), use

    def get_input_embeddings(self):
        return self.emb

    def forward(self, ids):
        return self.use(self.emb, ids)


@pytest.mark.parametrize(
    "config",
    [{"target_modules": ["emb"]}, {"target_modules": (), "trainable_token_indices": [2]}, {"modules_to_save": ["emb"]}],
    ids=["adapter", "rows", "copy"],
)
@pytest.mark.parametrize(
    "use",
    [
        lambda emb, ids: emb.attend(x=emb(ids)),
        lambda emb, ids: emb.softly(emb(ids)),
        lambda emb, ids: emb.scaled(ids),
        lambda emb, ids: emb(ids) * emb.mean,
        lambda emb, ids: emb.of_width(emb(ids)),
    ],
    ids=["attend", "softly", "scaled", "mean", "of_width"],
)
def test_a_layers_own_methods_compute_with_what_the_adapter_adds(use, config):
    torch.manual_seed(0)
    model, ids = nn.ModuleDict({"own": UsesMethods(use), "lin": nn.Linear(4, 4)}).double(), torch.tensor([[1, 2, 3]])
    model.get_input_embeddings = model.own.get_input_embeddings
    plain = model.own(ids)
    inject_(model, LoraConfig(r=2, **{"target_modules": ["lin"], **config}))
    randomise_adapter(model)
    output = model.own(ids)
    assert not torch.allclose(output, plain)
    output.square().sum().backward()
    assert any(p.grad is not None and p.grad.any() for p in trainable_parameters(model))
    with adapters_off(model):
        assert torch.equal(model.own(ids), plain)
    merge_and_remove_(model)
    torch.testing.assert_close(model.own(ids), output, rtol=1e-12, atol=1e-12)


def test_only_public_members_that_compute_with_the_weight_are_a_layers_own_reads():
    assert members_reading(Attending) == {"attend", "softly", "scaled", "mean"}
    assert members_reading(nn.Linear) == set()


def test_a_layers_own_method_cannot_differ_by_row():
    model = UsesMethods(lambda emb, ids: emb.attend(emb(ids)))
    inject_(model, LoraConfig(r=2, target_modules=["emb"]))
    with adapters_by_row(model, ["default", None]), pytest.raises(ConfigError, match="exclude_modules"):
        model(torch.tensor([[1], [2]]))


def test_a_weight_is_seen_to_be_read_through_an_adapted_module():
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = One()
            self.inner.factors = nn.Parameter(torch.ones(6, 6))

        def forward(self, x):
            return F.linear(x, self.inner.lin0.weight * self.inner.factors)

    model = Scaled()
    inject_(model, LoraConfig(r=2, target_modules=(), target_parameters=["inner.factors"]), adapter="one")
    inject_(model, LoraConfig(r=2, target_modules=["lin0"]), adapter="two")
    assert model.inner.lin0.weight_is_read


def test_a_weight_that_is_read_in_a_loop_holds_what_the_adapter_adds():
    torch.manual_seed(0)
    model = Loops().double()
    x = torch.randn(5, 6, dtype=torch.float64)
    plain = model(x)
    inject_(model, LoraConfig(r=2))
    randomise_adapter(model)
    output = model(x)
    output.square().sum().backward()
    unused = {id(p) for p in model.heads[1].parameters_of("default")}
    assert all(p.grad.any() for p in trainable_parameters(model) if id(p) not in unused)
    with adapters_off(model):
        assert torch.equal(model(x), plain)
    merge_(model)
    torch.testing.assert_close(model(x), output, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    "config",
    [{}, {"use_dora": True}, {"lora_bias": True}, {"use_rslora": True, "init_lora_weights": "pissa"}],
    ids=str,
)
def test_a_read_weight_gives_the_outputs_and_gradients_of_a_called_layer(config):
    results = {}
    for kind in (Calls, Reads):
        torch.manual_seed(0)
        model = kind().double()
        x = torch.randn(5, 6, dtype=torch.float64)
        plain = model(x)
        inject_(model, LoraConfig(r=2, **config), generator=torch.Generator().manual_seed(1))
        randomise_adapter(model)
        output = model(x)
        assert not torch.allclose(output, plain)
        output.square().sum().backward()
        with adapters_off(model):
            torch.testing.assert_close(model(x), plain, rtol=0, atol=0)
        merge_(model)
        torch.testing.assert_close(model(x), output, rtol=1e-12, atol=1e-12)
        unmerge_(model)
        results[kind] = [output, *(p.grad for p in trainable_parameters(model))]
    for read, called in zip(results[Reads], results[Calls], strict=True):
        torch.testing.assert_close(read, called, rtol=1e-12, atol=1e-12)


class Attends(nn.Module):
    def __init__(self, reads):
        super().__init__()
        self.att, self.reads = nn.MultiheadAttention(8, 2), reads

    def forward(self, x):
        """x: [length, N, 8]"""
        if not self.reads:
            return self.att(x, x, x, need_weights=False)[0]
        att = self.att
        joint = (8, 2, att.in_proj_weight, att.in_proj_bias, None, None, False, 0.0)
        return F.multi_head_attention_forward(
            x, x, x, *joint, att.out_proj.weight, att.out_proj.bias, need_weights=False
        )[0]


@pytest.mark.parametrize("config", [{}, {"use_dora": True}, {"lora_bias": True}], ids=str)
def test_an_attentions_joint_weight_that_is_read_holds_what_the_adapter_adds(config):
    x, results = torch.randn(5, 3, 8, dtype=torch.float64), []
    for reads in (False, True):
        torch.manual_seed(0)
        model = Attends(reads).double().eval()
        inject_(model, LoraConfig(r=2, target_modules=["att"], **config))
        randomise_adapter(model)
        output = model(x)
        output.square().sum().backward()
        results.append([output, *(p.grad for p in trainable_parameters(model))])
        merge_(model)
        torch.testing.assert_close(model(x), output, rtol=1e-12, atol=1e-12)
    for called, read in zip(*results, strict=True):
        torch.testing.assert_close(read, called, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("gradients", [False, True])
def test_the_inference_kernel_of_a_transformer_encoder_sees_the_adapter(gradients):
    torch.manual_seed(0)
    model = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval()
    inject_(model, LoraConfig(r=2, target_modules=["linear1", "linear2"]))
    randomise_adapter(model)
    x = torch.randn(2, 3, 8)
    hidden = model.norm1(x + model.self_attn(x, x, x)[0])
    expected = model.norm2(hidden + model.linear2(model.linear1(hidden).relu()))
    with torch.set_grad_enabled(gradients):
        torch.testing.assert_close(model(x), expected)


def test_dropout_on_a_read_weight_is_refused_in_training_only():
    model = Reads()
    inject_(model, LoraConfig(r=2, lora_dropout=0.5))
    randomise_adapter(model)
    set_adapter_training(model, True)
    with pytest.raises(ConfigError, match="exclude_modules"):
        model(torch.randn(3, 6))
    set_adapter_training(model, False)
    model(torch.randn(3, 6))


def test_reads_see_a_head_that_trains_in_full_and_trained_rows():
    model = Reads()
    inject_(model, LoraConfig(r=2, target_modules=["up"], modules_to_save=["down"]))
    x = torch.randn(3, 6)
    before = model(x)
    with torch.no_grad():
        model.down.shares["default"].weight.add_(1)
    assert not torch.allclose(model(x), before)

    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = nn.Embedding(5, 4)
            self.proj = nn.Linear(4, 4)

        def forward(self, ids):
            return self.proj(self.embed(ids)) @ self.embed.weight.T

    model = Tied()
    inject_(model, LoraConfig(r=2, target_modules=["proj"], trainable_token_indices={"embed": [1]}))
    with torch.no_grad():
        model.embed.rows("default").values.mul_(3)
    output = model(torch.tensor([2, 1]))
    merge_(model)
    table = model.embed.trained_table()
    expected = model.proj(F.embedding(torch.tensor([2, 1]), table)) @ table.T
    torch.testing.assert_close(output, expected)


def test_all_linear_leaves_out_vectors_and_layers_that_return_more_than_a_vector():
    class Router(nn.Linear):
        def forward(self, x):
            return super().forward(x).topk(2)

    class Reversed(nn.Linear):
        def forward(self, x):
            return x @ self.weight.T + self.bias

    layers = {"gate": nn.Linear(6, 1), "router": Router(6, 4), "reversed": Reversed(6, 4), "down": nn.Linear(6, 4)}
    report = inject_(nn.ModuleDict(layers), LoraConfig(r=2))
    assert [m.name for m in report.matrices] == ["reversed", "down"]
