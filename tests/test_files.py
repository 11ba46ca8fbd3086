"""Files of plain data: written whole or not at all, refused where a bit is wrong, and never run."""

from __future__ import annotations

import math

import torch

from pyro_flows.infer.files import read_state, write_state

READ = {"kind": "kind", "remedy": "delete it"}


def write(path, state):
    write_state(path, state, kind="kind")


def read(path):
    return read_state(path, **READ)


def plain():
    """One of everything."""
    return {
        "numbers": [1, -(10**30), 2.5, -0.0, math.nan, math.inf, True, None],
        "text": ("", "ä\n\ud800", ("nested", [()])),
        3: {None: {}, True: 0, 0.5: "keys that are no strings"},
        "tensors": [
            torch.randn(3, 2).T,
            torch.randn(4, dtype=torch.float64)[::2],
            torch.tensor(7),
            torch.zeros(0, 3),
            torch.randn(5).bfloat16(),
            torch.randn(2, dtype=torch.complex64).conj(),
            torch.tensor([True, False]),
            torch.arange(5, dtype=torch.uint8),
            torch.nn.Parameter(torch.ones(2).half()),
        ],
    }


def same(one, other):
    if isinstance(one, torch.Tensor):
        bits = one.detach().resolve_conj().contiguous(), other
        return one.dtype == other.dtype and one.shape == other.shape and torch.equal(*bits)
    if isinstance(one, (list, tuple)):
        return type(one) is type(other) and len(one) == len(other) and all(map(same, one, other))
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    return type(one) is type(other) and repr(one) == repr(other)


def test_plain_data_come_back(tmp_path):
    state = plain()
    write(tmp_path / "file", state)
    found = read(tmp_path / "file")
    assert same(state, found)
    assert list(found) == list(state)
    assert not any(tensor.requires_grad for tensor in found["tensors"])
    found["tensors"][0].add_(1)  # owns its memory
    assert same(state, read(str(tmp_path / "file")))
