"""The recorder and the simplifier: the graph computes what the function does."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from pyro_mf.density.capture import GraphFunction, capture_graph
from pyro_mf.density.recorder import Recording, paused, record
from pyro_mf.density.simplify import has_mutation, replace_private_mutations


def in_place_on_a_constant(x: Tensor) -> tuple[Tensor, ...]:
    total = torch.zeros(3)
    total += x
    total[0] = 5.0
    return (total * 2,)


def in_place_on_what_is_read_later(x: Tensor) -> tuple[Tensor, ...]:
    y = x + 1.0
    before = y * 3.0
    y.log_()
    return before, y * 2.0, y


def in_place_under_a_view(x: Tensor) -> tuple[Tensor, ...]:
    y = x + 1.0
    view = y[1:]
    y.mul_(2.0)
    return view * 1.0, y


def gradient_of_an_index(x: Tensor) -> tuple[Tensor, ...]:
    with torch.enable_grad():
        x = x.detach().requires_grad_(True)
        (g,) = torch.autograd.grad((x[torch.tensor([0, 0, 2])].exp()).sum(), x)
    return (g,)


def several_outputs(x: Tensor) -> tuple[Tensor, ...]:
    values, order = torch.sort(x)
    first, second = torch.linalg.slogdet(torch.diag(x.abs() + 1.0))
    return values, order, first, second


def gradient(x: Tensor) -> tuple[Tensor, ...]:
    with torch.enable_grad():
        x = x.detach().requires_grad_(True)
        value = (x.exp() * x.sin()).sum()
        (g,) = torch.autograd.grad(value, x)
    return value.detach(), g


def vectorised(x: Tensor) -> tuple[Tensor, ...]:
    return (torch.func.vmap(lambda row: row.cumsum(0) * row.sum())(x.expand(4, 3)),)


FUNCTIONS: dict[str, Callable[[Tensor], tuple[Tensor, ...]]] = {
    f.__name__: f
    for f in (
        in_place_on_a_constant,
        in_place_on_what_is_read_later,
        in_place_under_a_view,
        gradient_of_an_index,
        several_outputs,
        gradient,
        vectorised,
    )
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_graph_equals_function_at_other_points_too(name: str) -> None:
    fn = FUNCTIONS[name]
    graph = capture_graph(fn, (torch.rand(3),))
    assert not has_mutation(Recording(graph.graph, {}))
    for _ in range(3):  # more than once: nothing may pile up in a constant
        x = torch.rand(3)
        for got, expected in zip(graph(x), fn(x), strict=True):
            torch.testing.assert_close(got, expected)


def test_private_mutations_need_no_functionalisation() -> None:
    private = record(in_place_on_what_is_read_later, (torch.rand(3),))
    assert has_mutation(private)
    replace_private_mutations(private)
    assert not has_mutation(private)
    viewed = record(in_place_under_a_view, (torch.rand(3),))
    replace_private_mutations(viewed)
    assert has_mutation(viewed)


def test_neutral_operations_and_equal_nodes_disappear() -> None:
    def fn(x: Tensor) -> tuple[Tensor, ...]:
        y = (x + 0.0) * torch.ones(3) + torch.zeros(()) - 0
        return (y.view(3).expand(3).exp() + x.exp(),)

    graph = capture_graph(fn, (torch.randn(3),))
    calls = [n for n in graph.graph.nodes if n.op == "call_function"]
    assert len(calls) == 2  # one exponential, one sum
    x = torch.randn(3)
    torch.testing.assert_close(graph(x)[0], 2 * x.exp())


def test_neutral_operations_that_broadcast_stay() -> None:
    def fn(x: Tensor) -> tuple[Tensor, ...]:
        return (x * torch.ones(4, 1), x + torch.zeros(2, 1, 1))

    out = capture_graph(fn, (torch.randn(3),))(torch.arange(3.0))
    assert out[0].shape == (4, 3)
    assert out[1].shape == (2, 1, 3)


def test_random_operations_stay_random() -> None:
    graph = capture_graph(lambda x: (x + torch.rand(3), x + torch.rand(3)), (torch.zeros(3),))
    first, second = graph(torch.zeros(3))
    assert not torch.equal(first, second)
    assert not torch.equal(first, graph(torch.zeros(3))[0])


def test_reading_a_value_that_varies_is_refused() -> None:
    with pytest.raises(RuntimeError, match="value of a tensor that varies"):
        record(lambda x: (x * float(x.sum()),), (torch.ones(2),))


def test_what_is_paused_becomes_a_constant() -> None:
    def fn(x: Tensor) -> tuple[Tensor, ...]:
        with paused():
            known = torch.tensor([1.0, 2.0]).sum().item()
        return (x * known,)

    module = record(fn, (torch.ones(1),)).to_module()
    assert module(torch.tensor([2.0]))[0].item() == 6.0


def test_capture_is_per_shape() -> None:
    double = GraphFunction(lambda t: capture_graph(lambda x: (2 * x,), t), "graph")
    for size in (2, 3, 2, 3):
        assert torch.equal(double(torch.ones(size))[0], torch.full((size,), 2.0))
    assert double.num_captures == 2


def test_strides_are_part_of_the_signature() -> None:
    fn = GraphFunction(lambda t: capture_graph(lambda x: (x.T.reshape(-1),), t), "graph")
    x = torch.arange(6.0).reshape(2, 3)
    for y in (x, x.T.contiguous().T):
        assert torch.equal(fn(y)[0], x.T.reshape(-1))


def test_a_matrix_that_cannot_be_factorised_is_nan_for_its_draw_alone() -> None:
    def fn(x: Tensor) -> tuple[Tensor, ...]:
        def one(row: Tensor) -> Tensor:
            matrix = torch.diag(row) + 0.1
            solved = torch.cholesky_solve(torch.ones(2, 1), torch.linalg.cholesky(matrix))
            return solved.sum()

        return (torch.func.vmap(one)(x),)

    graph = capture_graph(fn, (torch.ones(3, 2),))
    x = torch.tensor([[1.0, 2.0], [1.0, -2.0], [3.0, 1.0]])
    (out,) = graph(x)
    assert out[1].isnan()
    torch.testing.assert_close(out[[0, 2]], fn(x[[0, 2]])[0])
    with pytest.raises(RuntimeError, match="not positive-definite"):
        fn(x)  # what eager torch does
