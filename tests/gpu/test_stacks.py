"""CUDA only: graphs captured from a training step."""

import copy
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))

from oracle import rel, scramble
from stacks import TRAINING, Net

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.mark.parametrize("backend", TRAINING)
def test_training_step_in_a_cuda_graph(backend):
    net = scramble(Net(backend)).cuda()
    twin = copy.deepcopy(net)
    x = torch.randn(4, 4, 8, 8, device="cuda")
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            net.zero_grad(set_to_none=True)
            net(x).square().sum().backward()
            twin(x)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    net.zero_grad(set_to_none=True)
    with torch.cuda.graph(graph):
        out = net(x)
        out.square().sum().backward()
    for _ in range(2):
        x.copy_(torch.randn_like(x))
        graph.replay()
        want = twin(x)
        twin.zero_grad()
        want.square().sum().backward()
        assert rel(out, want) < 1e-4
        for p, q in zip(net.parameters(), twin.parameters(), strict=True):
            assert rel(p.grad, q.grad) < 1e-3
    for got, want in zip(net.buffers(), twin.buffers(), strict=True):
        torch.testing.assert_close(got, want)
