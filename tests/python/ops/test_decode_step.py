"""vivace::decode_step: a whole token step, against float64, against the exported module, and against itself."""

import dataclasses

import pytest
import torch

from reference.step import decode_step as reference_step
from reference.tolerance import assert_accurate
from vivace import ops
from vivace.t3.config import RopeScaling
from vivace.t3.rotary import rotary_table

from .cases import OPS

FAMILIES = {"auto": 0, "persistent": 1, "chain": 2, "split": 3, "mesh": 4}
KERNELS = {1: "step_persistent", 2: "step_chain", 3: "step_split", 4: "step_mesh"}


@dataclasses.dataclass(frozen=True)
class Shape:
    layers: int = 3
    hidden: int = 128
    heads: int = 2
    heads_kv: int = 2
    head_dim: int = 64
    intermediate: int = 256
    vocab: int = 199
    positions: int = 64

    def sizes(self):
        width, kv = self.heads * self.head_dim, self.heads_kv * self.head_dim
        return {
            "speech_emb": (self.vocab, self.hidden),
            "speech_pos_emb": (self.positions, self.hidden),
            "input_norm": (self.layers, self.hidden),
            "qkv": (self.layers, width + 2 * kv, self.hidden),
            "out": (self.layers, self.hidden, width),
            "post_norm": (self.layers, self.hidden),
            "gate_up": (self.layers, 2 * self.intermediate, self.hidden),
            "down": (self.layers, self.hidden, self.intermediate),
            "norm": (self.hidden,),
            "head": (self.vocab, self.hidden),
        }


TINY = Shape()
GROUPED = Shape(layers=2, heads=6, heads_kv=2, head_dim=32, intermediate=200, vocab=67)
ODD = Shape(layers=2, hidden=88, heads=3, heads_kv=3, head_dim=40, intermediate=100, vocab=41)
T3 = Shape(layers=4, hidden=1024, heads=16, heads_kv=16, intermediate=4096, vocab=8194, positions=4100)


def shape_on(device, shape=TINY):
    """CUDA's kernels take T3's sizes, whatever the number of layers."""
    return dataclasses.replace(T3, layers=2) if device == "cuda" and shape is TINY else shape


def rows_of(family, lengths):
    """As many as the family takes: the persistent kernel is for few rows."""
    return lengths[:2] if family == 1 else lengths


class Model:
    """Random weights, and a cache whose rows are filled to given lengths."""

    def __init__(self, shape, dtype, device, capacity, cache_rows, side_by_side=True):
        self.shape, self.dtype, self.device, self.capacity = shape, dtype, device, capacity
        self.weights = {}
        for name, size in shape.sizes().items():
            w = torch.randn(size, device=device)
            w = 1 + 0.1 * w if "norm" in name else 0.5 * w if "emb" in name else w / size[-1] ** 0.5
            self.weights[name] = w.to(dtype)
        table = rotary_table(capacity, shape.head_dim, 500000.0, RopeScaling()).to(device)
        self.tables = {"rotary_cos": table[0].contiguous(), "rotary_sin": table[1].contiguous()}
        size = (shape.layers, cache_rows, shape.heads_kv, capacity, shape.head_dim)
        cache = [torch.randn(size, device=device, dtype=dtype) for _ in range(2)]
        if side_by_side:  # a head's keys lie together, as in the engine
            self.k, self.v = (c.transpose(2, 3) for c in cache)
        else:
            self.k, self.v = (c.transpose(2, 3).contiguous() for c in cache)
        self.workspaces = {}

    def workspace(self, rows, family):
        """One a family, for the most rows so far; zeroed when it grows."""
        w = self.weights
        size = OPS.decode_step_workspace(w["qkv"], w["down"], w["head"], self.k, rows, False, family)
        if size < 0:
            pytest.skip(f"no CUDA kernel of family {family} takes {rows} rows of {self.shape} in {self.dtype}")
        if family not in self.workspaces or self.workspaces[family].numel() < size:
            self.workspaces[family] = torch.zeros(size, dtype=torch.uint8, device=self.device)
        return self.workspaces[family]

    def step(self, state, family=0, **extra):
        return ops.decode_step(
            state.tokens,
            state.positions,
            state.row_request,
            **self.weights,
            **self.tables,
            k_cache=self.k,
            v_cache=self.v,
            cache_seqlens=state.seqlens,
            cache_batch_idx=state.cache_rows,
            workspace=self.workspace(len(state.row_request), family),
            family=family,
            **extra,
        )

    def reference(self, state, compute, rows=None):
        rows = torch.arange(len(state.row_request)) if rows is None else torch.tensor(rows)
        if compute == torch.float64 or self.device == "cpu":
            where = "cpu" if self.device == "cpu" or self.shape.hidden < 512 else self.device
        else:
            where = self.device
        weights = {name: w.to(where) for name, w in {**self.weights, **self.tables}.items()}
        return reference_step(
            weights,
            state.tokens.to(where),
            state.positions.to(where),
            state.row_request.cpu()[rows],
            self.k.to(where),
            self.v.to(where),
            state.seqlens.cpu()[rows],
            state.cache_rows.cpu()[rows],
            compute=compute,
        )


@dataclasses.dataclass
class State:
    tokens: torch.Tensor
    positions: torch.Tensor
    row_request: torch.Tensor
    seqlens: torch.Tensor
    cache_rows: torch.Tensor

    def rows(self, rows):
        """The same requests, with some of the rows."""
        return dataclasses.replace(
            self, row_request=self.row_request[rows], seqlens=self.seqlens[rows], cache_rows=self.cache_rows[rows]
        )


def make_state(model, lengths, guided=None):
    """A row of each length; guided: the requests that have a second row, which come after all first ones."""
    device, shape = model.device, model.shape
    guided = list(guided or [])
    requests = len(lengths) - len(guided)
    return State(
        tokens=torch.randint(0, shape.vocab, (requests,), device=device),
        positions=torch.randint(0, shape.positions, (requests,), device=device),
        row_request=torch.tensor([*range(requests), *guided], device=device),
        seqlens=torch.tensor(lengths, dtype=torch.int32, device=device),
        cache_rows=torch.randperm(model.k.shape[1])[: len(lengths)].to(torch.int32).to(device),
    )


def check_step(model, state, family=0):
    """One step against float64: logits, what was appended, and that nothing else of the cache changed."""
    exact = model.reference(state, torch.float64)
    low = model.reference(state, model.dtype)
    before_k, before_v = model.k.clone(), model.v.clone()
    logits = model.step(state, family)
    if family:
        assert ops.decode_step_kernel() == KERNELS[family]
    assert logits.dtype == torch.float32 and logits.device == state.tokens.device
    assert_accurate(logits.cpu().double(), exact[0].cpu(), low[0].cpu(), atol=1e-5, what="logits")
    for name, cache, before, new, rough in (
        ("k", model.k, before_k, exact[1], low[1]),
        ("v", model.v, before_v, exact[2], low[2]),
    ):
        rows, lengths = state.cache_rows.long(), state.seqlens.long()
        written = cache[:, rows, lengths]  # (layers, rows, heads_kv, head_dim)
        assert_accurate(written.cpu(), new.cpu(), rough.cpu(), atol=1e-5, what=f"appended {name}")
        before[:, rows, lengths] = written
        assert torch.equal(cache, before), f"{name}_cache changed elsewhere"
    return logits


@pytest.fixture(params=["cpu", *(pytest.param(name, marks=pytest.mark.gpu) for name in FAMILIES)])
def target(request):
    """(device, family): the CPU, and each way to run on CUDA."""
    return ("cpu", 0) if request.param == "cpu" else ("cuda", FAMILIES[request.param])


@pytest.mark.parametrize("shape", [TINY, GROUPED, ODD], ids=["tiny", "grouped", "odd"])
@pytest.mark.parametrize("side_by_side", [True, False], ids=["heads_first", "positions_first"])
def test_a_step_equals_the_reference(target, dtype, shape, side_by_side):
    device, family = target
    model = Model(shape_on(device, shape), dtype, device, 80, 8, side_by_side)
    guided = [0] if family == 1 else [2, 0]
    check_step(model, make_state(model, rows_of(family, [5, 0, 40, 17, 79, 1]), guided=guided), family)


def test_steps_follow_each_other_and_lengths_grow(target, dtype):
    device, family = target
    model = Model(shape_on(device), dtype, device, 40, 4)
    state = make_state(model, rows_of(family, [1, 30, 1]), guided=[0])
    for _ in range(5):
        logits = check_step(model, state, family)
        state.tokens = logits[: len(state.tokens)].argmax(dim=-1)
        state.positions = (state.positions + 1).clamp(max=model.shape.positions - 1)
        state.seqlens += 1


@pytest.mark.parametrize("lengths", [(1,), (300, 300), (1, 130, 700, 3000)], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.gpu
def test_a_step_of_the_real_shape_equals_the_reference(lengths, family):
    model = Model(T3, torch.bfloat16, "cuda", 3008, len(lengths) + 1)
    state = make_state(model, list(lengths), guided=[0] if len(lengths) > 1 else None)
    check_step(model, state, FAMILIES[family])


@pytest.mark.gpu
@pytest.mark.parametrize("lengths", [(15, 17), (16, 511, 513), (0, 512, 1024, 1025), (2047, 2300)], ids=str)
def test_lengths_around_the_ends_of_groups_and_parts_equal_the_reference(lengths):
    """The persistent kernel reads 16 keys at a time, 256 at once, and splits a row past 512 keys into 4 parts and past
    1,024 into 8, which have more than 256 keys each from 2,049 on."""
    model = Model(dataclasses.replace(T3, layers=2), torch.bfloat16, "cuda", 2304, len(lengths) + 1)
    check_step(model, make_state(model, list(lengths)), family=1)


@pytest.mark.gpu
def test_lengths_around_the_ends_of_stages_equal_the_reference():
    """The mesh kernel reads 64 keys at a time, the last of them in eights, and a row's ninth time joins its first."""
    lengths = [0, 1, 7, 8, 9, 63, 64, 65, 127, 129, 511, 512, 513, 576, 577, 1025, 2300]
    model = Model(dataclasses.replace(T3, layers=2), torch.bfloat16, "cuda", 2304, len(lengths))
    check_step(model, make_state(model, lengths), family=4)


@pytest.mark.gpu
@pytest.mark.parametrize("requests", [1, 7, 20, 32, 64])
@pytest.mark.parametrize("family", [0, 2, 3, 4])
def test_a_step_of_many_rows_of_the_real_shape_equals_the_reference(requests, family):
    shape = dataclasses.replace(T3, layers=2)
    model = Model(shape, torch.bfloat16, "cuda", 600, 2 * requests)
    lengths = torch.randint(1, 590, (requests,)).tolist()
    check_step(model, make_state(model, lengths + lengths, guided=range(requests)), family)


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [65, 66, 127, 128, 129, 193, 256, 260])
def test_many_rows_of_mixed_lengths_equal_the_reference(rows):
    model = Model(dataclasses.replace(T3, layers=1), torch.bfloat16, "cuda", 3008, rows)
    lengths = [0, 1, 2999, *torch.randint(0, 3000, (rows - 3,)).tolist()]
    check_step(model, make_state(model, lengths))


@pytest.mark.gpu
def test_the_number_of_rows_chooses_the_kernel():
    """Where all four take the model."""
    model = Model(dataclasses.replace(T3, layers=2), torch.bfloat16, "cuda", 40, 130)
    for family in KERNELS:
        model.workspace(1, family)  # skips where the family does not take the model
    for rows, family in ((1, 1), (4, 1), (5, 4), (64, 4), (65, 3), (130, 3)):
        model.step(make_state(model, [7] * rows))
        assert ops.decode_step_kernel() == KERNELS[family], f"{rows} rows"


def test_a_row_alone_gives_the_bits_that_it_gives_among_others(target):
    device, family = target
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    shape, capacity = (TINY, 90) if device == "cpu" else (dataclasses.replace(T3, layers=2), 1024)
    few, mesh, many = (2, 3, 4), (2, 8, 17, 40, 64), (2, 8, 40, 128, 150, 193, 260)
    counts = (2, 3, 9) if device == "cpu" else {1: few, 4: mesh}.get(family, many)
    if family == 0 and device == "cuda":
        pytest.skip("bits are promised within one family")
    model = Model(shape, dtype, device, capacity, max(counts))
    lengths = torch.randint(0, capacity - 1, (max(counts),)).tolist()
    everything = make_state(model, lengths)
    model.workspace(max(counts), family)  # one for all calls
    # The first rows, and the last of each number: of the last of a launch's two to four parts, or of the second launch.
    alone = {r: model.step(everything.rows([r]), family)[0] for r in sorted({0, 1, *(count - 1 for count in counts)})}
    for count in counts:
        logits = model.step(everything.rows(list(range(count))), family)
        for r, expected in alone.items():
            if r < count:
                assert torch.equal(logits[r], expected), f"row {r} among {count} rows is off by a bit"


def test_the_same_step_twice_gives_the_same_bits(target):
    device, family = target
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    model = Model(shape_on(device), dtype, device, 300, 6)
    guided = [0] if family == 1 else [1, 0]
    state = make_state(model, rows_of(family, [200, 3, 100, 299]), guided=guided)
    first = model.step(state, family)
    for _ in range(3 if device == "cpu" else 100):
        assert torch.equal(model.step(state, family), first)


@pytest.mark.gpu
@pytest.mark.parametrize("lengths", [(0,), (300,), (513,), (300, 40), (512, 513), (300, 7, 512, 100)], ids=str)
def test_a_paced_step_gives_the_bits_of_the_first(lengths):
    """The persistent kernel paces its weights by the clock that the step before has measured, where that was long."""
    model = Model(dataclasses.replace(T3, layers=16), torch.bfloat16, "cuda", 600, 4)
    state = make_state(model, list(lengths))
    first = model.step(state, family=1)
    for _ in range(20):
        assert torch.equal(model.step(state, family=1), first)
    clock = model.workspaces[1][128:132].view(torch.int32).item()
    assert 100 < clock < 4096, clock  # Mailboxes::clock, in cycles a microsecond


@pytest.mark.gpu
@pytest.mark.parametrize("vocab", [5, 8192, 8200, 10235, 12000])
def test_vocabularies_of_other_sizes_equal_the_reference(vocab):
    """Of the persistent kernel's 128 CTAs each has 10 tiles of 8 outputs at a time, the last two apart."""
    model = Model(dataclasses.replace(T3, layers=1, vocab=vocab), torch.bfloat16, "cuda", 64, 3)
    check_step(model, make_state(model, [9, 30, 1]), family=1)


def test_padding_and_full_rows_do_nothing(target, dtype):
    device, family = target
    model = Model(shape_on(device), dtype, device, 20, 6)
    state = make_state(model, [4, 20, 9, 7, 25])
    state.cache_rows[3] = -1
    if family == 1:
        for other in (1, 3):
            pair = state.rows([0, other])
            alone, k = model.step(state.rows([0]), family)[0], model.k.clone()
            assert torch.equal(model.step(pair, family)[0], alone) and torch.equal(model.k, k)
        return
    expected = {r: model.step(state.rows([r]), family)[0] for r in (0, 2)}
    k, v = model.k.clone(), model.v.clone()
    logits = model.step(state, family)
    # One family gives the same bits alone and among others; where rows decide, two families round logits of 2 by 0.016.
    tolerance = 0 if device == "cpu" or family else 4e-2
    for r, row in expected.items():
        torch.testing.assert_close(logits[r], row, rtol=0, atol=tolerance)
    # The rows that take part write again what they wrote alone (within another family's rounding); nobody else writes.
    for cache, before in ((model.k, k), (model.v, v)):
        for r in (0, 2):
            cache[:, state.cache_rows[r].long(), 4 if r == 0 else 9] = 0
            before[:, state.cache_rows[r].long(), 4 if r == 0 else 9] = 0
        assert torch.equal(cache, before)


def check_probes(written, exact, low, total):
    """Probabilities of rows, as lists of (keys,). Their logarithms, from 1e-4 on, are off by the error of a score, be
    they large or small. Of few keys the largest error is a matter of luck: a factor of 3. A row's sum is 1 to within
    `total`."""
    written, exact, low = ([p.cpu().double() for p in rows] for rows in (written, exact, low))
    for row in written:
        assert abs(float(row.sum()) - 1) < total
    written, exact, low = (torch.cat(rows).add(1e-4).log() for rows in (written, exact, low))
    assert_accurate(written, exact, low, factor=3.0, atol=1e-5, what="logarithm of a probe")


@pytest.mark.parametrize("lengths", [(9, 0, 30), (600, 130, 1100)], ids=["short", "long"])
def test_probes_are_the_attention_probabilities(target, dtype, lengths):
    device, family = target
    capacity = max(lengths) + 2
    model = Model(shape_on(device), dtype, device, capacity, 4)
    state = make_state(model, list(lengths), guided=[1])
    layers, heads = [1, 0, 1], [1, 1, 0]
    probes = torch.full((3, 5, 1, capacity + 3), float("nan"), device=device)
    without = model.step(state, family)
    logits = model.step(state, family, probes=probes, probe_layers=layers, probe_heads=heads)
    torch.testing.assert_close(logits, without, rtol=0, atol=0 if device == "cpu" or family else 1e-2)
    attention, low = (model.reference(state, compute)[3] for compute in (torch.float64, dtype))
    exact, rough = (
        [p[a][r][h] for a, h in zip(layers, heads, strict=True) for r in range(3)] for p in (attention, low)
    )
    total = max(2e-5, torch.finfo(dtype).eps / 4)  # the split kernel adds up weights that it has rounded
    check_probes([probes[i, r, 0, : n + 1] for i in range(3) for r, n in enumerate(lengths)], exact, rough, total)
    for r, length in enumerate(lengths):
        assert (probes[:, r, 0, length + 1 :] == 0).all()
    assert probes[:, 3:].isnan().all()


@pytest.mark.gpu
@pytest.mark.parametrize(
    "rows, dtype",
    [(rows, torch.bfloat16) for rows in (5, 8, 17, 40, 64)] + [(17, torch.float16)],
    ids=lambda value: str(value).removeprefix("torch."),
)
def test_probes_of_the_mesh_kernel_beside_many_rows(rows, dtype):
    """Ragged lengths, a padding row and a full one; two probes of one head; probes that end before the keys."""
    capacity = 1100
    model = Model(dataclasses.replace(T3, layers=2), dtype, "cuda", capacity, rows)
    lengths = [1099, 0, 577, 5, capacity, 512, 1, 63, 64, 65, 511, 513, *torch.randint(0, capacity, (64,)).tolist()]
    state = make_state(model, lengths[:rows])
    state.cache_rows[3] = -1
    part = [r for r in range(rows) if r not in (3, 4)]  # whose step is defined
    layers, heads = [1, 0, 1, 1, 0], [5, 0, 15, 5, 15]
    without = model.step(state, 4)
    caches = model.k.clone(), model.v.clone()
    probes = torch.full((5, rows + 2, 1, capacity + 3), float("nan"), device="cuda")
    logits = model.step(state, 4, probes=probes, probe_layers=layers, probe_heads=heads)
    assert torch.equal(logits[part], without[part])
    assert torch.equal(model.k, caches[0]) and torch.equal(model.v, caches[1])
    assert probes[:, rows:].isnan().all()
    assert (probes[:, 3] == 0).all(), "a padding row has no key"
    assert (probes[:, 4, :, capacity:] == 0).all()
    assert torch.equal(probes[0, :rows], probes[3, :rows]), "two probes of one head"
    attention, low = (model.reference(state, compute, part)[3] for compute in (torch.float64, dtype))
    exact, rough = ([row[h] for a, h in zip(layers, heads, strict=True) for row in p[a]] for p in (attention, low))
    check_probes([probes[i, r, 0, : lengths[r] + 1] for i in range(5) for r in part], exact, rough, 2e-5)
    for r in part:
        assert (probes[:, r, 0, lengths[r] + 1 :] == 0).all(), f"row {r} behind its keys"
    for width in (300, 1):
        short = torch.full((5, rows, 1, width), float("nan"), device="cuda")
        model.step(state, 0, probes=short, probe_layers=layers, probe_heads=heads)
        assert ops.decode_step_kernel() == KERNELS[4]
        assert torch.equal(short[:, part], probes[:, part, :, :width]) and (short[:, 3] == 0).all()


def test_a_step_equals_the_exported_module(dtype):
    from vivace.t3.config import preset
    from vivace.t3.model import T3 as Module

    config = preset("tiny")
    module = Module(config)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            size = parameter.shape[-1]
            parameter.copy_(torch.randn_like(parameter) * (0.1 if "norm" in name else size**-0.5) + ("norm" in name))
    module = module.to(dtype).eval()
    module.rotary_table = module.rotary_table.float()
    module.requires_grad_(False)
    layers = module.backbone.layers
    k_cache, v_cache = module.new_cache(3, 50)
    k_cache.normal_()
    v_cache.normal_()
    tokens, positions = torch.tensor([5, 77]), torch.tensor([1, 40])
    row_request = torch.tensor([0, 1, 0])
    seqlens, cache_rows = torch.tensor([3, 40, 17], dtype=torch.int32), torch.tensor([2, 0, 1], dtype=torch.int32)
    arguments = (tokens, positions, row_request)
    caches = [(k_cache.clone(), v_cache.clone()) for _ in range(2)]
    expected = module.decode(*arguments, *caches[0], seqlens, cache_rows, None)
    logits = ops.decode_step(
        *arguments,
        module.speech_emb.weight,
        module.speech_pos_emb.weight,
        torch.stack([layer.input_norm for layer in layers]),
        torch.stack([layer.qkv.weight for layer in layers]),
        torch.stack([layer.out.weight for layer in layers]),
        torch.stack([layer.post_norm for layer in layers]),
        torch.stack([layer.gate_up.weight for layer in layers]),
        torch.stack([layer.down.weight for layer in layers]),
        module.backbone.norm,
        module.speech_head.weight,
        module.rotary_table[0],
        module.rotary_table[1],
        *caches[1],
        seqlens,
        cache_rows,
        torch.empty(0, dtype=torch.uint8),
        config.rms_norm_eps,
    )
    # The module's logits are rounded to dtype; sums are taken in another order.
    tolerance = {torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 8e-2}[dtype]
    torch.testing.assert_close(logits, expected, rtol=tolerance, atol=tolerance)
    for ours, theirs in zip(caches[1], caches[0], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)


@pytest.mark.gpu
def test_greedy_tokens_of_a_graph_are_those_of_the_eager_steps(target):
    device, family = target
    if device == "cpu":
        pytest.skip("graphs are CUDA's")
    model = Model(dataclasses.replace(T3, layers=4), torch.bfloat16, device, 200, 4)
    n = 2
    options = {
        "cfg_weight": 0.5,
        "temperature": 0.0,
        "repetition_penalty": 1.2,
        "min_p": 0.05,
        "top_p": 1.0,
    }
    values = {name: torch.full((n,), value, device=device) for name, value in options.items()}

    def start():
        torch.manual_seed(5)
        model.k.zero_(), model.v.zero_()
        state = make_state(model, [0, 3, 0, 3], guided=[0, 1])
        state.positions.fill_(1)
        return (
            state,
            torch.zeros(n, model.shape.vocab, dtype=torch.uint8, device=device),
            torch.zeros(n, dtype=torch.int64, device=device),
            torch.zeros(64, n, dtype=torch.int64).pin_memory(),
            torch.zeros(n, dtype=torch.int64, device=device),
        )

    rows = torch.tensor([[0, 2], [1, 3]], dtype=torch.int32, device=device)
    top_k, seed = torch.zeros(n, dtype=torch.int32, device=device), torch.arange(n, device=device)
    ones = torch.ones(n, dtype=torch.int64, device=device)

    def step(state, seen, count, history, turn):
        logits = model.step(state, family)
        ops.sample_advance(
            logits,
            rows,
            seen,
            **values,
            top_k=top_k,
            seed=seed,
            step=count,
            tokens=state.tokens,
            positions=state.positions,
            cache_seqlens=state.seqlens,
            advance=ones,
            last_position=model.shape.positions - 1,
            history=history,
            turn=turn,
        )

    eager = start()
    for _ in range(50):
        step(*eager)
    torch.cuda.synchronize()
    captured = start()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())  # start() has filled its tensors there
    with torch.cuda.stream(stream):
        step(*captured)
        stream.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            step(*captured)
        for _ in range(49):
            graph.replay()
    torch.cuda.synchronize()
    assert captured[2].tolist() == [50, 50] and captured[0].seqlens.tolist() == [50, 53, 50, 53]
    assert torch.equal(eager[3][:50], captured[3][:50])
    assert len(set(captured[3][:50].flatten().tolist())) > 10, "a degenerate model proves nothing"


def arguments(**changes):
    shape = Shape(layers=2, hidden=16, heads=2, heads_kv=1, head_dim=8, intermediate=24, vocab=11, positions=7)
    made = {
        "tokens": torch.tensor([1, 2]),
        "positions": torch.tensor([1, 2]),
        "row_request": torch.tensor([0, 1, 1]),
        **{name: torch.zeros(size) for name, size in shape.sizes().items()},
        "rotary_cos": torch.zeros(9, 4),
        "rotary_sin": torch.zeros(9, 4),
        "k_cache": torch.zeros(2, 4, 9, 1, 8),
        "v_cache": torch.zeros(2, 4, 9, 1, 8),
        "cache_seqlens": torch.zeros(3, dtype=torch.int32),
        "cache_batch_idx": torch.arange(3, dtype=torch.int32),
        "workspace": torch.zeros(0, dtype=torch.uint8),
    }
    return {**made, **changes}


ERRORS = {
    "qkv has shape [2, 33, 16]": {"qkv": torch.zeros(2, 33, 16)},
    "qkv is float64": {"qkv": torch.zeros(2, 32, 16, dtype=torch.float64)},
    "down is bfloat16, expected float32": {"down": torch.zeros(2, 16, 24, dtype=torch.bfloat16)},
    "down has shape [3, 16, 24], expected [2, 16, 24]": {"down": torch.zeros(3, 16, 24)},
    "gate_up must be contiguous": {"gate_up": torch.zeros(2, 16, 48).transpose(1, 2)},
    "out has shape": {"out": torch.zeros(2, 16, 17)},
    "k_cache has 4 dimensions": {"k_cache": torch.zeros(2, 4, 9, 8)},
    "v_cache has shape": {"v_cache": torch.zeros(2, 4, 8, 1, 8)},
    "k_cache is written in place, but it is expanded": {"k_cache": torch.zeros(2, 1, 9, 1, 8).expand(2, 4, 9, 1, 8)},
    "tokens is int32, expected int64": {"tokens": torch.tensor([1, 2], dtype=torch.int32)},
    "positions has shape [3], expected [2]": {"positions": torch.zeros(3, dtype=torch.int64)},
    "cache_seqlens has shape [2], expected [3]": {"cache_seqlens": torch.zeros(2, dtype=torch.int32)},
    "rotary_cos has 8 positions, the cache a capacity of 9": {
        "rotary_cos": torch.zeros(8, 4),
        "rotary_sin": torch.zeros(8, 4),
    },
    "workspace is float32, expected uint8": {"workspace": torch.zeros(4)},
    "eps is -1": {"eps": -1.0},
    "family is 5": {"family": 5},
    "probes has 1 heads, probe_layers names 0": {"probes": torch.zeros(1, 3, 1, 9)},
    "probe_heads[0] is 2, there are 2 heads": {
        "probes": torch.zeros(1, 3, 1, 9),
        "probe_layers": [0],
        "probe_heads": [2],
    },
    "probes has shape [1, 2, 1, 9], expected (probes, at least 3 rows": {
        "probes": torch.zeros(1, 2, 1, 9),
        "probe_layers": [0],
        "probe_heads": [0],
    },
    "tokens[1] is 11, speech_emb has 11 rows": {"tokens": torch.tensor([1, 11])},
    "positions[0] is -1": {"positions": torch.tensor([-1, 0])},
    "row_request[2] is 2, there are 2 requests": {"row_request": torch.tensor([0, 1, 2])},
    "cache_batch_idx[1] is 4, the cache has 4 rows": {"cache_batch_idx": torch.tensor([0, 4, 1], dtype=torch.int32)},
    "cache_seqlens[0] is -1": {"cache_seqlens": torch.tensor([-1, 4, 1], dtype=torch.int32)},
}


@pytest.mark.parametrize("text", ERRORS)
def test_errors_name_the_argument(text):
    with pytest.raises(RuntimeError) as error:
        ops.decode_step(**arguments(**ERRORS[text]))
    assert str(error.value).startswith("vivace.decode_step: "), error.value
    assert text in str(error.value)


def test_arguments_of_the_error_cases_are_right_otherwise():
    assert ops.decode_step(**arguments()).shape == (3, 11)
    assert ops.decode_step_kernel() == "cpu"


def test_no_rows_give_no_logits():
    none = torch.zeros(0, dtype=torch.int64)
    empty = torch.zeros(0, dtype=torch.int32)
    changes = {"tokens": none, "positions": none, "row_request": none, "cache_seqlens": empty, "cache_batch_idx": empty}
    assert ops.decode_step(**arguments(**changes)).shape == (0, 11)


def test_the_workspace_of_the_cpu_is_empty():
    made = arguments()
    assert ops.decode_step_workspace(made["qkv"], made["down"], made["head"], made["k_cache"], 3) == 0
    with pytest.raises(RuntimeError, match="rows is -1"):
        ops.decode_step_workspace(made["qkv"], made["down"], made["head"], made["k_cache"], -1)


def test_a_fake_step_has_the_shape_of_a_real_one():
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode() as mode:
        fake = {k: mode.from_tensor(v) if isinstance(v, torch.Tensor) else v for k, v in arguments().items()}
        logits = ops.decode_step(**fake)
    assert logits.shape == (3, 11) and logits.dtype == torch.float32
