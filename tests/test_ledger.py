"""Books on memory: what is counted, once, until it is freed; and code that runs without data."""

from __future__ import annotations

import gc

import pytest
import torch
import torch.nn.functional as F

from src.training.memory_tracker import DATA_ACCESS_ERRORS, Live, Shapes

KIB = 1 << 10


def test_storages_are_counted_once_and_until_they_are_freed():
    live = Live()
    with live:
        live.enter("work", "made")
        x = torch.empty(KIB, dtype=torch.uint8)
        y = x.view(2, 512)[1]  # no memory of its own
        z = x + 1
        assert live.now == {"made": 2 * KIB}
        del x
        assert live.now == {"made": 2 * KIB}  # y still needs it
        del y, z
        gc.collect()
        assert live.now == {"made": 0}
    assert live.peaks["work"] == {"made": 2 * KIB}


def test_what_backward_needs_stays_alive_and_grads_take_new_memory():
    live, weight = Live(), torch.ones(KIB, requires_grad=True)
    with live:
        live.enter("forward", "forward")
        loss = weight.exp().exp().sum()  # each exp keeps its result
        assert live.now["forward"] == 2 * 4 * KIB + 4
        live.enter("backward", "backward")
        loss.backward()
        live.hold(weight.grad, "gradients")
        del loss
    assert live.now == {"forward": 0, "backward": 0, "gradients": 4 * KIB}


def test_copies_of_a_label_get_a_label_of_their_own():
    live, weight = Live(copies={"weights": "copies"}), torch.ones(KIB)
    with live:
        live.hold(weight, "weights")
        live.enter("work", "rest")
        half = weight.to(torch.bfloat16)
        again = half.to(torch.float32)
        assert live.now == {"weights": 4 * KIB, "copies": 2 * KIB, "rest": 4 * KIB}
        del half, again


def test_code_runs_without_data_and_still_knows_masks_and_indices():
    shapes = Shapes()
    table = torch.nn.Embedding(10, 1 << 30, device="meta")  # 40 GiB
    with shapes.fake:
        table.to_empty(device="cpu")
    ids, keep = torch.tensor([[1, 2, 3], [4, 5, 6]]), torch.tensor([[True, False, True], [False, False, True]])
    right = torch.zeros_like(keep)
    with shapes:
        hidden = table(ids)
        chosen = hidden[keep]
        assert chosen.shape == (3, 1 << 30)
        losses = torch.zeros(keep.shape)
        losses[keep] = F.cross_entropy(chosen, ids[keep], reduction="none")
        right[keep] = chosen.argmax(-1) == ids[keep]
        assert int(keep.sum()) == 3 and ids[keep].tolist() == [1, 3, 6]
        losses.sum().backward()
    assert table.weight.grad.shape == (10, 1 << 30)
    assert not right.any()  # nothing is known of it


def test_code_that_looks_at_numbers_is_told_so():
    shapes = Shapes()
    with shapes, pytest.raises(DATA_ACCESS_ERRORS):
        torch.ones(3).sum().item()
