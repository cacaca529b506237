"""Public operations in random order: after each, the model computes what the definition says of its adapters.

The definition is a second model without adapters, whose dense weights are W0 and the updates of the adapters at work,
in fp64. An operation that is refused must leave everything as it was.
"""

import random
from copy import deepcopy
from dataclasses import dataclass, field

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

import rankwise
from rankwise import LoraConfig
from rankwise.errors import RankwiseError
from rankwise.lora.inject import injection
from rankwise.lora.places import named_base_modules, named_lora_layers, named_wrappers
from rankwise.lora.trained import TokenRows, TrainedCopy

WALKS, STEPS = 40, 25
TOKENS, WIDTH, EXPERTS, GROUPS = 12, 8, 3, 2
IDS = torch.randint(0, TOKENS, (3, 4), generator=torch.Generator().manual_seed(9))
TARGETS = ["table", "lin", "conv1d", "conv", "attention", "inner.lin", "out"]


class Experts(nn.Module):
    def __init__(self):
        super().__init__()
        self.up = nn.Parameter(torch.randn(EXPERTS, WIDTH, WIDTH) * 0.3)
        self.down = nn.Parameter(torch.randn(EXPERTS, WIDTH, WIDTH) * 0.3)

    def forward(self, x):
        return sum(torch.tanh(x @ up.T) @ down.T for up, down in zip(self.up, self.down, strict=True)) / EXPERTS


class Net(nn.Module):
    """Layers of each kind; the output head shares the embedding's table."""

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(TOKENS, WIDTH)
        self.lin = nn.Linear(WIDTH, WIDTH)
        self.conv1d = Conv1D(WIDTH, WIDTH)
        self.conv = nn.Conv1d(WIDTH, WIDTH, 3, padding=1, groups=GROUPS)
        self.attention = nn.MultiheadAttention(WIDTH, 2, batch_first=True)
        self.inner = nn.ModuleDict({"lin": nn.Linear(WIDTH, WIDTH, bias=False)})
        self.experts = Experts()
        self.head = nn.Linear(WIDTH, 4)
        self.out = nn.Linear(WIDTH, TOKENS, bias=False)
        self.out.weight = self.table.weight

    def get_input_embeddings(self):
        return self.table

    def get_output_embeddings(self):
        return self.out

    def forward(self, ids):
        x = self.table(ids)
        x = x + torch.tanh(self.lin(x))
        x = x + self.inner["lin"](torch.tanh(self.conv1d(x)))
        x = x + self.conv(x.transpose(1, 2)).transpose(1, 2)
        x = x + self.attention(x, x, x, need_weights=False)[0]
        x = x + self.experts(x)
        return torch.cat([self.head(x), self.out(x)], dim=-1)


def net():
    torch.manual_seed(0)
    model = Net()
    for name, parameter in model.named_parameters():
        if "bias" in name:
            nn.init.normal_(parameter)
    return model.double().eval()


def weight_of(name):
    """The name of the parameter that an update of `name` changes."""
    return name if name.startswith("experts.") else f"{name}.{'in_proj_' * (name == 'attention')}weight"


def bias_of(name):
    return f"{name}.{'in_proj_' * (name == 'attention')}bias"


def product(name, A, B):
    """B·A in the form in which the layer stores its weight."""
    if name in ("table", "conv1d"):
        return (B @ A).T
    if name.startswith("experts."):
        r = len(A) // EXPERTS
        return torch.stack([B.view(WIDTH, r, EXPERTS)[:, :, e] @ A.view(EXPERTS, r, -1)[e] for e in range(EXPERTS)])
    if name == "conv":
        pairs = zip(A.chunk(GROUPS), B[:, :, 0].chunk(GROUPS), strict=True)
        return torch.cat([torch.einsum("dr,rkw->dkw", own_B, own_A) for own_A, own_B in pairs])
    return B @ A


def changed(name, weight, update):
    """W0 with an update, by the definition of LoRA and DoRA."""
    changed = weight + update.scale * product(name, update.lora_A, update.lora_B)
    if update.has_start:
        changed = changed - update.scale * product(name, update.start_A, update.start_B)
    if update.magnitude is None:
        return changed
    rows = changed.T if name in ("table", "conv1d") else changed.flatten(1)
    scaled = rows * (update.magnitude / rows.norm(dim=1))[:, None]
    return scaled.T if name in ("table", "conv1d") else scaled.view_as(changed)


@dataclass
class Change:
    """All that one adapter changes, by name."""

    weights: dict = field(default_factory=dict)
    added_biases: dict = field(default_factory=dict)
    copies: dict = field(default_factory=dict)
    rows: dict = field(default_factory=dict)
    biases: dict = field(default_factory=dict)

    @classmethod
    @torch.no_grad()
    def of(cls, model, adapter, base):
        """The change by an adapter of `model`, whose base holds the tensors `base`."""
        found = cls()
        for place, wrapper in named_wrappers(model):
            for end, part in wrapper.lora_layers():
                if adapter in part.shares:
                    name, update = place + end, part.update(adapter)
                    found.weights[name] = changed(name, base[weight_of(name)], update) - base[weight_of(name)]
                    if update.lora_bias is not None:
                        found.added_biases[name] = update.lora_bias * update.scale
            if adapter in wrapper.shares and isinstance(wrapper, TrainedCopy):
                found.copies[place] = deepcopy(wrapper.shares[adapter].state_dict())
            if adapter in wrapper.shares and isinstance(wrapper, TokenRows):
                found.rows[place] = (list(wrapper.rows(adapter).tokens), wrapper.rows(adapter).values.detach().clone())
        names = {module: name for name, module in named_base_modules(model)}
        for bias in injection(model).biases:
            if bias.adapter == adapter:
                found.biases[names[bias.module]] = bias.trained.detach().clone()
        return found

    def assert_equal(self, other):
        for name in self.weights.keys() | other.weights.keys():
            none = torch.zeros((), dtype=torch.float64)
            own, others = self.weights.get(name, none), other.weights.get(name, none)
            torch.testing.assert_close(*torch.broadcast_tensors(own, others), rtol=1e-9, atol=1e-9)
        for kind in ("added_biases", "copies", "rows", "biases"):
            torch.testing.assert_close(getattr(self, kind), getattr(other, kind), rtol=1e-12, atol=1e-12)


class Walk:
    def __init__(self, seed, folder):
        self.random, self.folder, self.count, self.log = random.Random(seed), folder, 0, []
        self.model, self.reference = net(), net()
        self.base = deepcopy(self.model.state_dict())
        self.reference.out.weight = nn.Parameter(self.base["out.weight"].clone())
        for layer in (self.reference.inner["lin"], self.reference.out):
            layer.bias = nn.Parameter(torch.zeros(layer.out_features, dtype=torch.float64))
        self.zeros = {name: value.clone() for name, value in self.reference.state_dict().items()}
        self.changes, self.active, self.merged, self.saved = {}, {}, {}, {}
        torch.manual_seed(seed)

    @torch.no_grad()
    def expected(self, active, ids=IDS):
        """What the definition gives with these adapters at work."""
        state = {name: value.clone() for name, value in self.zeros.items()}
        changes = [(self.changes[name], factor) for name, factor in active.items()]
        for change, _ in changes:
            for name, value in change.biases.items():
                state[f"{name}.bias"] = value
        for change, factor in changes:
            for name, value in change.weights.items():
                state[weight_of(name)] = state[weight_of(name)] + factor * value
            for name, value in change.added_biases.items():
                state[bias_of(name)] = state[bias_of(name)] + factor * value
            for name, values in change.copies.items():
                state |= {f"{name}.{key}": value for key, value in values.items()}
            for tokens, values in change.rows.values():
                for name in ("table", "out"):
                    state[f"{name}.weight"][tokens] = values
        self.reference.load_state_dict(state)
        return self.reference(ids)

    def fingerprint(self):
        present = injection(self.model) if self.changes else None
        return (
            {name: value.clone() for name, value in self.model.state_dict().items()},
            [(name, parameter.requires_grad) for name, parameter in self.model.named_parameters()],
            present and (dict(present.configs), dict(present.active), len(present.biases)),
            [(name, dict(wrapper.active), wrapper.adapters()) for name, wrapper in named_wrappers(self.model)],
            [(name, dict(layer.merged)) for name, layer in named_lora_layers(self.model)],
        )

    def allowed(self, operation, *arguments, **options):
        """Do it. Returns (whether it was done, what it gave); if it is refused, nothing has changed."""
        before = self.fingerprint()
        self.log.append((operation.__name__, arguments[1:], options))
        try:
            return True, operation(*arguments, **options)
        except RankwiseError as error:
            self.log.append(str(error))
            state, *rest = self.fingerprint()
            assert rest == list(before[1:])
            assert state.keys() == before[0].keys()
            assert all(torch.equal(value, before[0][name]) for name, value in state.items())
            return False, None

    def some(self):
        """An adapter's name; now and then one that is not there."""
        return self.random.choice(list(self.changes)) if self.random.random() > 0.03 else "none"

    def new_name(self):
        self.count += 1
        return f"a{self.count}"

    def look_at(self, adapter):
        self.changes[adapter] = Change.of(self.model, adapter, self.base)

    def check(self):
        found = self.model(IDS)
        torch.testing.assert_close(found, self.expected(self.active), rtol=1e-9, atol=1e-9)
        if self.changes:
            with rankwise.adapters_off(self.model):
                torch.testing.assert_close(self.model(IDS), self.expected({}), rtol=1e-9, atol=1e-9)
            torch.testing.assert_close(self.model(IDS), found, rtol=0, atol=0)
            assert set(rankwise.adapter_names(self.model)) == self.changes.keys()

    def config(self):
        draw = self.random
        targets = [name for name in TARGETS if draw.random() < 0.4] or ["lin"]
        config = {"target_modules": targets, "r": draw.choice([2, 4]), "lora_alpha": draw.choice([1, 4, 7])}
        config["use_rslora"] = draw.random() < 0.3
        if draw.random() < 0.3:
            config["modules_to_save"] = ["head"]
        if "table" not in targets and draw.random() < 0.25:
            config["trainable_token_indices"] = draw.sample(range(TOKENS), 2)
        if draw.random() < 0.2:
            config["bias"] = draw.choice(["all", "lora_only"])
        if draw.random() < 0.25:
            config["target_parameters"] = draw.choice(
                [["experts.up"], ["experts.down"], ["experts.up", "experts.down"]]
            )
        elif draw.random() < 0.2:
            config["use_dora"] = True
        elif "table" not in targets and draw.random() < 0.2:
            config["lora_bias"] = True
        if not {"target_parameters", "lora_bias"} & config.keys() and draw.random() < 0.35:
            config["init_lora_weights"] = draw.choice(["gaussian", "pissa", "olora", False])
        if draw.random() < 0.3:
            config["rank_pattern"] = {draw.choice(targets): draw.choice([2, 4, 6])}
        if draw.random() < 0.2:
            config["alpha_pattern"] = {draw.choice(targets): 3}
        return LoraConfig(**config)

    def inject(self):
        if len(self.changes) == 4:
            return
        name, config = self.new_name(), self.config()
        done, _ = self.allowed(rankwise.inject_, self.model, config, adapter=name)
        if done:
            self.look_at(name)
            self.active = {**self.merged, name: 1.0}
            if config.init_lora_weights is not False:
                assert all(value.abs().max() < 1e-9 for value in self.changes[name].weights.values())
            self.perturb(name)

    @torch.no_grad()
    def perturb(self, name=None):
        name = name or self.some()
        if name in self.changes and name not in self.merged:
            parameters = [p for _, wrapper in named_wrappers(self.model) for p in wrapper.parameters_of(name)]
            parameters += [bias.trained for bias in injection(self.model).biases if bias.adapter == name]
            for parameter in parameters:
                parameter += torch.randn_like(parameter) * 0.2
            self.look_at(name)

    def activate(self):
        factors = {self.some(): self.random.choice([1.0, 1.0, 0.5, -2.0]) for _ in range(self.random.randrange(3))}
        if self.allowed(rankwise.activate_, self.model, factors)[0]:
            self.active = {**factors, **self.merged}

    def merge(self):
        chosen = None if self.random.random() < 0.5 else [self.some()]
        if self.allowed(rankwise.merge_, self.model, chosen)[0]:
            named = self.active if chosen is None else chosen
            self.merged = {n: f for n, f in self.active.items() if n in named and self.changes[n].weights}

    def unmerge(self):
        if self.allowed(rankwise.unmerge_, self.model)[0]:
            self.merged = {}

    def delete(self):
        name = self.some()
        if self.allowed(rankwise.delete_adapter_, self.model, name)[0]:
            del self.changes[name]
            self.active.pop(name, None)

    def combine(self):
        name, factors = self.new_name(), {self.some(): self.random.choice([1.0, 0.5, -1.0]) for _ in range(2)}
        if len(self.changes) == 5:
            return
        done, report = self.allowed(rankwise.combine_adapters_, self.model, factors, name)
        if done:
            self.look_at(name)
            self.active = {**self.merged, name: 1.0}
            for place, value in self.changes[name].weights.items():
                total = sum(f * self.changes[n].weights.get(place, 0.0) for n, f in factors.items())
                assert abs((value - total).norm() - report.lost[place] * total.norm()) < 1e-7

    def save(self):
        name, path = self.random.choice(list(self.changes)), self.folder / self.new_name()
        if self.allowed(rankwise.save_adapter, self.model, path, name)[0]:
            self.saved[path] = self.changes[name]

    def load(self):
        if self.saved and len(self.changes) < 5:
            path, name = self.random.choice(list(self.saved)), self.new_name()
            if self.allowed(rankwise.load_adapter_, self.model, path, adapter=name)[0]:
                self.look_at(name)
                self.changes[name].assert_equal(self.saved[path])
                self.active = {**self.merged, name: 1.0}

    def swap(self):
        if self.saved:
            path, name = self.random.choice(list(self.saved)), self.some()
            if self.allowed(rankwise.swap_adapter_, self.model, path, name)[0]:
                self.look_at(name)
                self.changes[name].assert_equal(self.saved[path])

    def reset(self):
        name = self.some()
        if self.allowed(rankwise.reset_adapter_, self.model, name)[0]:
            self.look_at(name)

    def by_row(self):
        rows = [self.random.choice([*self.changes, None]) for _ in IDS]

        def compute(model, rows):
            with rankwise.adapters_by_row(model, rows):
                return model(IDS)

        done, found = self.allowed(compute, self.model, rows)
        for name, ids, row in zip(rows, IDS, found if done else [], strict=bool(done)):
            expected = self.expected({name: 1.0} if name else {}, ids[None])
            torch.testing.assert_close(row[None], expected, rtol=1e-9, atol=1e-9)

    def copy(self):
        self.model = deepcopy(self.model)

    def eject(self):
        rankwise.eject_(self.model)
        self.changes, self.active, self.merged = {}, {}, {}
        state = self.model.state_dict()
        assert state.keys() == self.base.keys()
        assert all(torch.equal(value, self.base[name]) for name, value in state.items())
        assert self.model.out.weight is self.model.table.weight
        assert all(parameter.requires_grad for parameter in self.model.parameters())

    def step(self):
        often = [
            self.inject,
            self.activate,
            self.perturb,
            self.merge,
            self.unmerge,
            self.combine,
            self.load,
            self.by_row,
        ]
        seldom = [self.delete, self.save, self.swap, self.reset, self.copy]
        operations = [*often, *often, *seldom] + [self.eject] * (self.random.random() < 0.3)
        (self.random.choice(operations) if self.changes else self.inject)()
        self.check()


@pytest.mark.parametrize("seed", range(WALKS))
def test_after_any_operations_the_model_computes_what_the_definition_says(seed, tmp_path):
    walk = Walk(seed, tmp_path)
    walk.check()
    try:
        for _ in range(STEPS):
            walk.step()
    except AssertionError as error:
        raise AssertionError("\n".join(map(str, [error, *walk.log[-10:]]))) from error
