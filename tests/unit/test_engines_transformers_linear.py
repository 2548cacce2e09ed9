"""One linear for mixed batches against a loop over its rows: every grouping of rows, ranks, spans and magnitudes."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from tuneloop.engines.transformers.batch import AdapterSlot, Owned, plan_lora
from tuneloop.engines.transformers.kernels import Float16Kernel, KernelFactory, NativeKernel, OneDnnKernel
from tuneloop.engines.transformers.linear import AdaptedLinear, LoraPlan, Part

CPU = torch.device("cpu")
INNER, SIZES = 12, (5, 7)
OUTER = sum(SIZES)


class Bench:
    """A fused linear of two modules with a bias, and a plain record of what is installed in it."""

    def __init__(self, kernel: KernelFactory = NativeKernel, seed: int = 0, bias: bool = True) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self.weight = self.random(OUTER, INNER)
        self.bias = self.random(OUTER) if bias else None
        self.plan: LoraPlan | None = None
        parts = [Part("q", 0, SIZES[0]), Part("k", SIZES[0], SIZES[1])]
        self.linear = AdaptedLinear(
            "q+k",
            parts,
            kernel(self.weight, self.bias),
            in_features=INNER,
            bias=self.bias,
            dtype=torch.float32,
            device=CPU,
            plan=lambda: self.plan,
        )
        self.installed: dict[tuple[int, int], tuple[Tensor, Tensor, Tensor | None]] = {}

    def random(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.generator)

    def install(self, rank: int, slot: int, slots: int, dora: bool) -> None:
        a, b = self.random(rank * 2, INNER), self.random(rank * 2, OUTER)
        magnitude = self.random(OUTER).abs() if dora else None
        self.linear.install(rank, slot, slots, a, b, magnitude)
        self.installed[rank, slot] = (a, b, magnitude)

    def clear(self, rank: int, slot: int) -> None:
        self.linear.clear(rank, slot)
        self.installed.pop((rank, slot), None)

    def expected(self, x: Tensor, owned: list[Owned]) -> Tensor:
        y = x @ self.weight.t()
        for start, stop, owner in owned:
            found = self.installed.get((owner.rank_class, owner.index)) if owner is not None else None
            if found is not None:
                a, b, magnitude = found
                y[start:stop] = y[start:stop] * (1.0 if magnitude is None else magnitude) + x[start:stop] @ a.t() @ b
        return y if self.bias is None else y + self.bias

    def check(self, owned: list[Owned]) -> None:
        x = self.random(owned[-1][1], INNER)
        before = x.clone()
        self.plan = plan_lora(owned, CPU)
        got = self.linear(x[None])[0]
        torch.testing.assert_close(got, self.expected(x, owned), atol=1e-3, rtol=1e-4)
        assert torch.equal(x, before)


# (rank class, slot): some are installed here, some only in other linears of the model
places = st.sampled_from([(8, 0), (8, 1), (8, 2), (8, 3), (16, 0), (16, 2), (32, 1)])


@given(
    installed=st.dictionaries(places, st.booleans(), max_size=7),
    doras=st.sets(places),
    spans=st.lists(st.tuples(st.integers(2, 9), st.none() | places), max_size=3),
    singles=st.lists(st.none() | places, max_size=24),
    seed=st.integers(0, 100),
    bias=st.booleans(),
)
@settings(max_examples=150, deadline=None)
def test_a_mixed_batch_is_a_loop_over_its_rows(
    installed: dict[tuple[int, int], bool],
    doras: set[tuple[int, int]],
    spans: list[tuple[int, tuple[int, int] | None]],
    singles: list[tuple[int, int] | None],
    seed: int,
    bias: bool,
) -> None:
    bench = Bench(seed=seed, bias=bias)
    for (rank, slot), dora in installed.items():
        bench.install(rank, slot, 4, dora)

    def owner(place: tuple[int, int] | None) -> AdapterSlot | None:
        return None if place is None else AdapterSlot(*place, dora=place in doras or installed.get(place, False))

    owned: list[Owned] = []
    for length, place in [*spans, *((1, p) for p in singles)]:
        start = owned[-1][1] if owned else 0
        owned.append((start, start + length, owner(place)))
    if owned:
        bench.check(owned)


def singles(*places: tuple[int, int, bool] | None) -> list[Owned]:
    return [(i, i + 1, None if p is None else AdapterSlot(*p)) for i, p in enumerate(places)]


@pytest.mark.parametrize("kernel", [NativeKernel, OneDnnKernel])
def test_exact_kernels_are_exact_with_adapters(kernel: KernelFactory) -> None:
    bench = Bench(kernel)
    bench.install(8, 0, 4, dora=True)
    bench.install(8, 3, 4, dora=False)
    bench.check(singles((8, 0, True), None, (8, 3, False), (8, 0, True)))
    assert torch.allclose(bench.linear.dense(), bench.weight)


def test_half_stored_weights_are_near() -> None:
    bench = Bench(Float16Kernel)
    x = bench.random(4, INNER)
    torch.testing.assert_close(bench.linear(x), bench.expected(x, singles(None)), atol=2e-2, rtol=1e-2)


@pytest.mark.parametrize("kernel", [NativeKernel, OneDnnKernel, Float16Kernel])
def test_no_rows_give_no_rows(kernel: KernelFactory) -> None:
    """A step of prompt chunks that end nowhere asks the head for nothing."""
    assert Bench(kernel).linear(torch.empty(0, INNER)).shape == (0, OUTER)


def test_a_cleared_slot_is_the_base_and_its_next_adapter_stands_alone() -> None:
    bench = Bench()
    bench.install(8, 0, 4, dora=True)
    bench.install(8, 1, 4, dora=True)
    bench.clear(8, 0)
    rows = singles((8, 0, True), (8, 1, True), (8, 0, False))
    bench.check(rows)
    bench.install(8, 0, 4, dora=False)
    bench.check(rows)


def test_stacks_grow_and_give_their_memory_back() -> None:
    bench = Bench()
    bench.install(8, 1, 4, dora=True)
    bench.install(8, 6, 8, dora=False)
    bench.check(singles((8, 1, True), (8, 6, False), (8, 3, False)))
    bench.clear(8, 1)
    bench.clear(8, 6)
    assert bench.linear.stacks == {}
    bench.check(singles((8, 1, True)))


def test_broken_numbers_stay_in_their_rows() -> None:
    bench = Bench()
    bench.install(8, 0, 4, dora=True)
    bench.install(8, 1, 4, dora=False)
    broken = torch.full((16, INNER), float("nan")), torch.full((16, OUTER), float("nan"))
    bench.linear.install(8, 2, 4, *broken, torch.full((OUTER,), float("nan")))
    owned = singles((8, 0, True), (8, 2, True), None, (8, 1, False), (8, 2, True))
    x = bench.random(5, INNER)
    bench.plan = plan_lora(owned, CPU)
    got = bench.linear(x)
    good = [0, 2, 3]
    torch.testing.assert_close(got[good], bench.expected(x, owned)[good], atol=1e-3, rtol=1e-4)
    assert bool(got[[1, 4]].isnan().all())
    bench.clear(8, 2)
    bench.check(owned)
