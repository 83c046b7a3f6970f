"""The lists of `block_sparse_conv2d`'s compiled CUDA kernels, and how the operator gets to these."""

import pytest
import torch
from blocks import block_mask

from sparse_gen.ops import block_halo, dispatch
from sparse_gen.ops.block_sparse_conv2d import BlockPattern

SHAPE = (37, 70, 3, 2)


def pattern_of(shape, block, stride, density=0.3):
    return BlockPattern.of(block_mask(shape, block, density), block, stride)


def columns_of(lists):
    """Channel of the chunk, row and column of the window, of every column."""
    return (lists.codes >> 16).long(), (lists.codes >> 8 & 255).long(), (lists.codes & 255).long()


def places_of(lists, runs, length):
    """Of every weight that is in the lists: value, run and channel of the group, and its column's place."""
    column, member = (lists.slots >= 0).nonzero().T
    return lists.slots[column, member].long(), runs[column // length], member, column


@pytest.mark.parametrize("tf32", [True, False])
@pytest.mark.parametrize("block", [(1, 1), (4, 3), (8, 16), (16, 1), (20, 64)])
@pytest.mark.parametrize("stride", [1, 2])
def test_every_kept_weight_is_in_each_list_once_and_where_it_belongs(block, stride, tf32):
    pattern = pattern_of(SHAPE, block, stride)
    index, out_channels, channels = pattern.index, *SHAPE[:2]
    output, channel, row, tap = (part.flatten() for part in torch.unravel_index(index, SHAPE))
    window = (SHAPE[2] - 1) // stride, (SHAPE[3] - 1) // stride

    def check(lists, length, group, run, own, other, row, tap):
        """Each weight's group and chunk follow from its run; `own` is the side that groups are of."""
        values, runs, member, column = places_of(lists, run, length)
        assert torch.equal(values.sort().values, torch.arange(len(index)))
        code = columns_of(lists)
        groups, chunks = group(runs)
        of_block = -(-lists.block // lists.slots.shape[1])
        first = groups // of_block * lists.block + groups % of_block * lists.slots.shape[1]
        assert torch.equal(first + member, own[values])
        assert torch.equal(chunks * lists.chunk + code[0][column], other[values])
        assert torch.equal(code[1][column], row[values])
        assert torch.equal(code[2][column], tap[values])

    forward = block_halo.forward_lists(index, SHAPE, block[0], stride, (40, 40), tf32)
    groups = (len(forward.starts) - 1) // -(-channels // forward.chunk)
    runs = torch.arange(len(forward.starts) - 1).repeat_interleave(forward.starts.diff())
    check(forward, 8, lambda run: (run % groups, run // groups), runs, output, channel, row, tap)

    backward = block_halo.input_gradient_lists(index, SHAPE, block[1], stride, (40, 40), tf32)
    chunks = -(-out_channels // backward.chunk)
    groups = (len(backward.starts) - 1) // chunks // stride**2
    runs = torch.arange(len(backward.starts) - 1).repeat_interleave(backward.starts.diff())
    flipped = window[0] - row // stride, window[1] - tap // stride
    check(backward, 8, lambda run: (run % groups, run // groups % chunks), runs, channel, output, *flipped)
    values, run, _, _ = places_of(backward, runs, 8)
    assert torch.equal(run // groups // chunks, (row % stride * stride + tap % stride)[values])

    rounds = block_halo.weight_gradient_rounds(index, SHAPE, block[0], stride, (40, 40), tf32)
    pieces = torch.full((2, len(rounds.pieces)), -1)
    for slab, chunk, first, count in rounds.rounds.T.tolist():
        assert 0 < count <= rounds.most
        assert (pieces[:, first : first + count] == -1).all()
        pieces[:, first : first + count] = torch.tensor([[slab], [chunk]])
    assert (pieces >= 0).all()
    group = pieces[0] * rounds.slab + rounds.pieces
    check(rounds, 16, lambda piece: (group[piece], pieces[1][piece]), torch.arange(len(rounds.pieces)), output, channel,
          row, tap)  # fmt: skip


def test_what_fills_a_step_up_repeats_a_kept_column():
    pattern = pattern_of((8, 8, 3, 3), (8, 1), 1, density=0.1)
    lists = block_halo.forward_lists(pattern.index, (8, 8, 3, 3), 8, 1, (40, 40), True)
    kept = (lists.slots >= 0).any(1)
    assert not kept.all()
    assert set(lists.codes[~kept].tolist()) <= set(lists.codes[kept].tolist())


def arguments(pattern, padding=1, mode=1):
    out_channels, _, kernel_h, kernel_w = pattern.shape
    lists = pattern.index, pattern.order, pattern.columns, pattern.starts
    return *lists, pattern.block[0], out_channels, kernel_h, kernel_w, pattern.stride, padding, mode


@pytest.mark.parametrize("tf32", [True, False])
def test_the_way_to_the_kernels_gives_what_the_operator_gives(monkeypatch, tf32):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", tf32)
    pattern = pattern_of((10, 12, 3, 3), (4, 4), 2)
    x, values, bias = torch.randn(2, 12, 9, 7), torch.randn(2, len(pattern.index)), torch.randn(2, 10)
    given = arguments(pattern)
    operator = torch.ops.sparse_gen.block_sparse_conv2d
    out = operator(x, values, bias, *given)
    torch.testing.assert_close(block_halo._forward(x, values, bias, *given), out)
    gradient = torch.randn_like(out)
    backward = torch.ops.sparse_gen.block_sparse_conv2d_backward
    for needs in ((True, True), (True, False), (False, True)):
        want = backward(gradient, x, values, *given, *needs)
        torch.testing.assert_close(block_halo._backward(gradient, x, values, *given, *needs), want)


def test_opcheck():
    pattern = pattern_of((10, 12, 3, 3), (4, 4), 1)
    shape, x = pattern.shape, torch.randn(2, 12, 5, 6)
    values, size = torch.randn(2, len(pattern.index)), (5, 6)
    lists = block_halo.forward_lists(pattern.index, shape, 4, 1, size, True)
    by_input = block_halo.input_gradient_lists(pattern.index, shape, 4, 1, size, True)
    rounds = block_halo.weight_gradient_rounds(pattern.index, shape, 4, 1, size, True)
    geometry = 10, 3, 3, 1, 1, 1, True
    tensors = [pattern.index, lists.codes, lists.slots, lists.starts, lists.chunk, lists.block]
    ops = torch.ops.sparse_gen
    torch.library.opcheck(ops.block_sparse_conv2d_halo, (x, values, None, *tensors, *geometry))
    tensors = [pattern.index, by_input.codes, by_input.slots, by_input.starts, by_input.chunk, by_input.block]
    tensors += [rounds.codes, rounds.slots, rounds.pieces, rounds.rounds, rounds.chunk, rounds.slab, rounds.most]
    given = torch.randn(2, 10, 5, 6), x, values, *tensors, rounds.block, *geometry, True, True
    # Its reference goes through autograd, which opcheck switches off.
    meta = [each.to("meta") if isinstance(each, torch.Tensor) else each for each in given]
    for real, fake in zip(ops.block_sparse_conv2d_halo_backward(*given), block_halo.backward_fake(*meta), strict=True):
        assert (real.shape, real.dtype) == (fake.shape, fake.dtype)


@pytest.mark.parametrize(("kernel", "dtype"), [((101, 101), torch.float32), ((3, 3), torch.float64)])
def test_what_the_kernels_cannot_do_is_left_to_others(kernel, dtype):
    """A window so large that no tile has room, and numbers that are no floats."""
    pattern = pattern_of((4, 4, *kernel), (4, 4), 1, density=0.01)
    x, values = torch.randn(1, 4, 101, 101, dtype=dtype), torch.randn(1, len(pattern.index), dtype=dtype)
    given = arguments(pattern, 0, 0)
    assert block_halo._forward(x, values, None, *given) is NotImplemented
    gradient = torch.randn(1, 4, 102 - kernel[0], 102 - kernel[1], dtype=dtype)
    assert block_halo._backward(gradient, x, values, *given, True, True) is NotImplemented


def test_the_operator_counts_as_compiled_where_its_kernels_are(monkeypatch):
    monkeypatch.setattr(dispatch, "_has_cuda_kernel", lambda name: "halo" in name)
    monkeypatch.setattr(dispatch, "_triton_missing", lambda stem, name: "triton is not installed")
    assert dispatch.has_gpu_kernel("block_sparse_conv2d")
    assert dispatch._cuda_missing("block_sparse_conv2d_backward") is None
    assert not dispatch.has_gpu_kernel("masked_adam")
    monkeypatch.setattr(dispatch, "_has_cuda_kernel", lambda name: False)
    assert not dispatch.has_gpu_kernel("block_sparse_conv2d")
