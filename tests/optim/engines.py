"""A small model and DeepSpeed engines around it, for tests that run in worker processes."""

from __future__ import annotations

import copy
import io
import tempfile
from pathlib import Path
from unittest import mock

import torch
import torch.distributed as dist
from torch import nn

from megalr.engine.state import attach_layouts
from megalr.errors import UserError
from megalr.optim import (
    LORO,
    SCALE,
    SPAM,
    Apollo,
    ApolloMini,
    Fira,
    GaLore,
    GoLore,
    Muon,
    NorMuon,
    Spectron,
    StableSPAM,
    muon,
    projection,
)
from megalr.sharding.exchange import to_owner
from megalr.sharding.fragment import FlatLayout, LogicalTensor, Ranks, slice_fragments

GAP = 7
PROJECTED = {"rank": 3, "update_proj_gap": GAP}
METHODS = {
    "spam": lambda g: SPAM(
        g, lr=3e-3, update_gap=9, warmup_epoch=3, grad_accu_steps=2, threshold=9.0
    ),
    "spam_sparse": lambda g: SPAM(
        [{**h, "density": 0.5 if h["name"] == "matrices" else None} for h in g],
        lr=3e-3, update_gap=9, warmup_epoch=3,
    ),
    "stable_spam": lambda g: StableSPAM(g, lr=3e-3, update_gap=9, total_T=30, weight_decay=0.1),
    "galore": lambda g: GaLore(with_rank(g), lr=3e-3, weight_decay=0.1),
    "galore_stagger": lambda g: GaLore(with_rank(g, stagger=True), lr=3e-3),
    "galore_subspace": lambda g: GaLore(with_rank(g, basis="subspace"), lr=3e-3),
    "fira": lambda g: Fira(with_rank(g), lr=3e-3),
    "apollo": lambda g: Apollo(with_rank(g), lr=3e-3),
    "apollo_mini": lambda g: ApolloMini(with_rank(g, rank=1), lr=3e-4),
    "golore": lambda g: GoLore(with_rank(g), lr=3e-3, total_updates=20, rand_ratio=0.5),
    "muon": lambda g: Muon(with_muon(g), lr=3e-3, adam_lr_ratio=0.3),
    "dion2": lambda g: Muon(with_muon(g), lr=3e-3, adam_lr_ratio=0.3, fraction=0.4),
    "normuon": lambda g: NorMuon(with_muon(g), lr=3e-3, adam_lr_ratio=0.3),
    "scale": lambda g: SCALE(of_kinds(g, "embedding", "matrices"), lr=3e-3, weight_decay=0.1),
    "scale_head": lambda g: SCALE(of_kinds(g, "matrices", "head"), lr=3e-3),
    "spectron": lambda g: Spectron(with_pairs(g), lr=3e-2),
    "loro": lambda g: LORO(g, lr=3e-3, hidden_size=16, exact_every=GAP),
}  # fmt: skip
ELEMENTWISE = ("spam", "spam_sparse", "stable_spam", "scale", "scale_head")


def of_kinds(groups, *kinds):
    """SCALE's kinds for the embedding and the matrices."""
    return [{**g, "kind": kind} for g, kind in zip(groups, (*kinds, "vectors"), strict=True)]


def with_rank(groups, **options):
    """The projected options on the group of matrices; the others get plain Adam."""
    chosen = {**PROJECTED, **options}
    return [{**g, **chosen} if g["name"] == "matrices" else g for g in groups]


def with_muon(groups):
    """The mark of the group of matrices."""
    return [{**g, "use_muon": g["name"] == "matrices"} for g in groups]


def with_pairs(groups):
    """The factors of the group of matrices in a marked group of their own."""
    embedding, matrices, vectors = groups
    dense, *factors = matrices["params"]
    marked = {"name": "factors", "params": factors, "use_spectron": True}
    return [embedding, {"name": "matrices", "params": [dense]}, marked, vectors]


class Net(nn.Module):
    """Stacked matrices (right and left ones), a factor pair each for LORO, a vector."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(3)
        self.embed = nn.Linear(10, 16, bias=False)
        self.wide = nn.Parameter(torch.randn(20 + 8, 16) / 4)
        self.wide.row_blocks = (("q", 0, 20), ("k", 20, 28))
        self.b = nn.Parameter(torch.randn(16 + 12, 3) / 2)
        self.b.row_blocks = (("o.B", 0, 16), ("u.B", 16, 28))
        self.a = nn.Parameter(torch.randn(6, 28) / 5)
        self.a.row_blocks = (("o.A", 0, 3), ("u.A", 3, 6))
        self.norm = nn.Parameter(torch.ones(28))

    def forward(self, x, target):
        h = torch.tanh(self.embed(x)) @ self.wide.mT
        h = torch.tanh(h) * self.norm
        out = (h @ self.a[:3].mT) @ self.b[:16].mT
        out2 = (torch.tanh(h) @ self.a[3:].mT) @ self.b[16:].mT
        return ((out - target[:, :16]) ** 2).mean() + ((out2 - target[:, 16:]) ** 2).mean()


def groups_of(net):
    return [
        {"name": "embedding", "params": [net.embed.weight]},
        {"name": "matrices", "params": [net.wide, net.b, net.a]},
        {"name": "vectors", "params": [net.norm]},
    ]


def batch(update, micro):
    generator = torch.Generator().manual_seed(1000 * update + micro)
    x = torch.randn(12, 10, generator=generator)
    return x, torch.randn(12, 28, generator=generator)


ACCUMULATION = 2


def reference(method, updates, clip):
    """The trajectory of one process without DeepSpeed: [state of the net after updates]."""
    net = Net()
    optimizer = METHODS[method](groups_of(net))
    for u in range(updates):
        optimizer.zero_grad()
        for micro in range(ACCUMULATION):
            (net(*batch(u, micro)) / ACCUMULATION).backward()
        nn.utils.clip_grad_norm_(net.parameters(), clip)
        optimizer.step()
    return {name: p.detach().clone() for name, p in net.named_parameters()}


def make_engine(method, stage, clip=0.7, **extra):
    import deepspeed

    config = {
        "train_micro_batch_size_per_gpu": 12 // dist.get_world_size(),
        "gradient_accumulation_steps": ACCUMULATION,
        "gradient_clipping": clip,
        "zero_optimization": {
            "stage": stage,
            "stage3_param_persistence_threshold": 0,
            **extra.pop("zero", {}),
        },
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 10**9,
        **extra,
    }
    net = Net()
    engine, _, _, _ = deepspeed.initialize(
        model=net, optimizer=METHODS[method](groups_of(net)), config=config,
        dist_init_required=False,
    )  # fmt: skip
    attach_layouts(engine)
    return engine


def advance(engine, first, updates):
    rank, size = dist.get_rank(), dist.get_world_size()
    dtype = next(engine.module.parameters()).dtype
    for u in range(first, first + updates):
        for micro in range(ACCUMULATION):
            x, target = (t.chunk(size)[rank].to(dtype) for t in batch(u, micro))
            engine.backward(engine(x, target))
            engine.step()


def weights(engine):
    import deepspeed

    out = {}
    for name, p in engine.module.named_parameters():
        with deepspeed.zero.GatheredParameters([p], enabled=hasattr(p, "ds_id")):
            out[name] = p.detach().float().clone()
    return out


def distance(one, two):
    return max(float((one[name] - two[name]).abs().max()) for name in one)


@mock.patch.object(muon, "_gram_dtype", lambda device: torch.float32)
def trajectories(methods, stages, updates, clip):
    """{(method, stage): largest distance from the single process after ``updates``}.

    Newton-Schulz in fp16 would make 1e-3 of the last digit of a gradient.
    """
    out = {}
    for method in methods:
        want = reference(method, updates, clip)
        for stage in stages:
            if stage == 0 and method not in ELEMENTWISE and dist.get_world_size() > 1:
                continue
            engine = make_engine(method, stage, clip)
            advance(engine, 0, updates)
            out[method, stage] = distance(weights(engine), want)
            engine.destroy()
    return out


def resume(methods, stages):
    """{(method, stage): whether continuing from an engine checkpoint is bitwise the same}."""
    out = {}
    for method in methods:
        for stage in stages:
            engine = make_engine(method, stage)
            advance(engine, 0, GAP + 1)
            with shared_folder() as folder:
                engine.save_checkpoint(folder, tag="x")
                advance(engine, GAP + 1, GAP + 2)
                want = weights(engine)
                engine.destroy()
                again = make_engine(method, stage)
                again.load_checkpoint(folder, tag="x")
            advance(again, GAP + 1, GAP + 2)
            out[method, stage] = distance(weights(again), want) == 0.0
            again.destroy()
    return out


def stable_spam_on_slices(slice_size, numel):
    """Distance of this rank's slice of one tensor from a process that holds it alone."""
    rank, world = dist.get_rank(), dist.get_world_size()
    fragments = slice_fragments(numel, 0, slice_size, world)
    padded = torch.zeros(slice_size * world)
    padded[:numel] = torch.linspace(-1, 1, numel)
    alone = nn.Parameter(padded[:numel].clone())
    flat = nn.Parameter(padded.chunk(world)[rank].clone())
    optimizer, reference = StableSPAM([flat], lr=0.1), StableSPAM([alone], lr=0.1)
    ranks = Ranks(rank, world, dist.group.WORLD)
    layout = FlatLayout((LogicalTensor("x", (numel,), fragments),), ranks)
    optimizer.attach_layouts({flat: layout})
    for update in range(4):
        gradient = torch.zeros_like(padded)
        gradient[:numel] = torch.cos(torch.arange(numel) * (update + 1.0)) * 10.0**update
        alone.grad, flat.grad = gradient[:numel].clone(), gradient.chunk(world)[rank].clone()
        optimizer.step()
        reference.step()
    padded[:numel] = alone.detach()
    return float((flat.detach() - padded.chunk(world)[rank]).abs().max())


def scale_on_slices(kind, slice_size, shapes):
    """Distance of this rank's slice of some matrices from a process that holds them alone."""
    rank, world = dist.get_rank(), dist.get_world_size()
    padded = torch.zeros(slice_size * world, dtype=torch.float64)
    tensors, first = [], 0
    for number, (m, n) in enumerate(shapes):
        fragments = slice_fragments(m * n, first, slice_size, world)
        tensors.append(LogicalTensor(str(number), (m, n), fragments))
        first += m * n
    padded[:first] = torch.linspace(-1, 1, first)
    sizes = [m * n for m, n in shapes]

    def whole(values):
        return [v.view(s) for v, s in zip(values[:first].split(sizes), shapes, strict=True)]

    alone = [nn.Parameter(part.clone()) for part in whole(padded)]
    flat = nn.Parameter(padded.chunk(world)[rank].clone())
    optimizer, reference = SCALE([flat], lr=0.1), SCALE(alone, lr=0.1, kind=kind)
    optimizer.param_groups[0]["kind"] = kind
    optimizer.attach_layouts(
        {flat: FlatLayout(tuple(tensors), Ranks(rank, world, dist.group.WORLD))}
    )
    for update in range(4):
        gradient = torch.zeros_like(padded)
        gradient[:first] = torch.cos(torch.arange(first) * (update + 1.0)) * 10.0**update
        flat.grad = gradient.chunk(world)[rank].clone()
        for parameter, part in zip(alone, whole(gradient), strict=True):
            parameter.grad = part.clone()
        optimizer.step()
        reference.step()
    padded[:first] = torch.cat([parameter.detach().flatten() for parameter in alone])
    return float((flat.detach() - padded.chunk(world)[rank]).abs().max())


class shared_folder:
    """A temporary folder that all ranks see; rank 0 makes and removes it."""

    def __enter__(self):
        name = [tempfile.mkdtemp() if dist.get_rank() == 0 else None]
        dist.broadcast_object_list(name)
        self.name = name[0]
        return self.name

    def __exit__(self, *_):
        dist.barrier()
        if dist.get_rank() == 0:
            for path in sorted(Path(self.name).rglob("*"), reverse=True):
                path.unlink() if path.is_file() else path.rmdir()


def state_elements(method, stage):
    """(elements of optimizer state on this rank, elements of padding in its slices).

    Also saves the states and reads them back with ``weights_only=True``.
    """
    engine = make_engine(method, stage)
    advance(engine, 0, 1)
    base = engine.optimizer.optimizer
    total = sum(t.numel() for state in base.state.values() for t in floating(state))
    padding = 0
    for group, (flat, layout) in zip(base.param_groups, base._layouts.items(), strict=True):
        held = sum(fragment.numel for _, fragment in layout.local)
        padding += 0 if group.get("rank") else flat.numel() - held
    file = io.BytesIO()
    torch.save([dict(state) for state in base.state.values()], file)
    file.seek(0)
    torch.load(file, weights_only=True)
    engine.destroy()
    return total, padding


def floating(value):
    if isinstance(value, torch.Tensor):
        return [value] if value.is_floating_point() else []
    if isinstance(value, dict):
        return [t for item in value.values() for t in floating(item)]
    return []


BF16 = {"bf16": {"enabled": True}}
PAPER = {
    "bf16": {
        "enabled": True,
        "bf16_master_weights_and_grads": True,
        "bf16_optimizer_states": True,
    }
}
ENGINES = {
    "stage 0": (0, {}),
    "stage 1": (1, {}),
    "stage 2": (2, {}),
    "stage 3": (3, {}),
    "stage 3, persistent parameters": (3, {"zero": {"stage3_param_persistence_threshold": 10**6}}),
    "stage 2, offloaded": (2, {"zero": {"offload_optimizer": {"device": "cpu"}}}),
    "stage 3, offloaded": (3, {"zero": {"offload_optimizer": {"device": "cpu"}}}),
    "stage 2, round robin": (2, {"zero": {"round_robin_gradients": True}}),
    "bf16 stage 0": (0, BF16),
    "bf16 stage 1, fp32 accumulation": (1, {**BF16, "data_types": {"grad_accum_dtype": "fp32"}}),
    "bf16 stage 2": (2, BF16),
    "bf16 stage 3": (3, BF16),
    "bf16 masters and states, stage 1": (1, PAPER),
    "bf16 masters and states, stage 3": (3, PAPER),
}


def layouts_match(names):
    """{engine: largest difference between the weights and the masters found through layouts}."""
    out = {}
    for name in names:
        stage, extra = ENGINES[name]
        engine = make_engine("stable_spam", stage, **copy.deepcopy(extra))
        before = weights(engine)
        advance(engine, 0, 2)
        base = getattr(engine.optimizer, "optimizer", engine.optimizer)
        expected, found = {}, {}
        for parameter, value in weights(engine).items():
            blocks = getattr(dict(engine.module.named_parameters())[parameter], "row_blocks", None)
            for block, start, stop in blocks or ((parameter, 0, None),):
                expected[block] = value[start:stop]
        for flat, layout in base._layouts.items():
            ranks, values = layout.ranks, flat.detach().view(-1)
            whole = to_owner(ranks, [(tensor, values) for tensor in layout.tensors], values)
            if ranks.size > 1:
                objects = [None] * ranks.size
                dist.all_gather_object(objects, whole, group=ranks.group)
                whole = {n: t for rank in objects for n, t in rank.items()}
            found.update(whole)
        dtype = next(engine.module.parameters()).dtype
        assert set(found) == set(expected)
        moved = distance(weights(engine), before)
        rounded = {n: t.to(dtype).float() for n, t in found.items()}
        out[name] = (distance(rounded, expected), moved)
        engine.destroy()
    return out


def decompositions(stage):
    """How often this rank computed singular vectors in GAP + 1 updates."""
    calls = []
    real = projection.svd_bases

    def counted(grad, rank):
        calls.append(tuple(grad.shape))
        return real(grad, rank)

    projection.svd_bases = counted
    try:
        engine = make_engine("galore", stage)
        advance(engine, 0, GAP + 1)
        engine.destroy()
    finally:
        projection.svd_bases = real
    return calls


def refusal(method):
    """The message with which a stage-0 engine is refused."""
    try:
        make_engine(method, 0)
    except UserError as error:
        return str(error)
    return ""
