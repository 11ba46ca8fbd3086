"""What tests assert alike, in one line."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

import pyro_flows


def refuses(error, message, call, /, *args, **options):
    """A call raises an error of this class whose text matches the message."""
    with pytest.raises(error, match=message):
        call(*args, **options)


def output_of(*arguments):
    """Another Python runs to its end with these arguments, next to this package; returns what it prints."""
    beside = Path(pyro_flows.__file__).parent.parent
    done = subprocess.run([sys.executable, *map(str, arguments)], capture_output=True, text=True, cwd=beside)
    assert done.returncode == 0, done.stderr
    return done.stdout


def comes_back(layer, x):
    """A layer's inverse undoes it at ``x``, in units of what is large there, with the opposite log-determinant."""
    y, ladj = layer.forward_and_ladj(x)
    back, minus = layer.inverse_and_ladj(y)
    assert ((back - x).abs() <= 1e-8 * (1 + x.abs())).all()
    torch.testing.assert_close(minus, -ladj, rtol=1e-10, atol=1e-10)


def leads_back(layer, y):
    """A layer undoes its inverse at ``y``, in units of what is large there."""
    again = layer.forward_and_ladj(layer.inverse_and_ladj(y)[0])[0]
    assert ((again - y).abs() <= 1e-8 * (1 + y.abs())).all()


def rises(jacobians, ladj):
    """These Jacobians are lower triangular, not diagonal, with positive slopes and log-determinants ``ladj``."""
    assert (jacobians.triu(1) == 0).all() and (jacobians.tril(-1) != 0).any()
    assert (jacobians.diagonal(dim1=1, dim2=2) > 0).all()
    sign, truth = torch.linalg.slogdet(jacobians)
    assert (sign == 1).all()
    torch.testing.assert_close(ladj, truth, rtol=1e-10, atol=1e-10)


def scores_like(flow, truth):
    """A flow's densities, of draws of the truth and of its own, are the truth's."""
    y = truth.sample((50,))
    torch.testing.assert_close(flow.log_prob(y), truth.log_prob(y), rtol=1e-10, atol=1e-10)
    y, score = flow.rsample_and_log_prob((50,))
    torch.testing.assert_close(score, truth.log_prob(y), rtol=1e-10, atol=1e-10)
