"""A real TorchRL collector, which fills the same TensorDict again for every batch, as the loader of a run."""

from __future__ import annotations

import pytest
import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModule, TensorDictSequential
from torch import nn

import tdgeom as tg

pytestmark = [
    pytest.mark.torchrl,
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]


def counting_env():
    """An environment whose observation is the number of its step, so that every batch is known beforehand."""
    from torchrl.data import Bounded, Composite, Unbounded
    from torchrl.envs import EnvBase

    class Counting(EnvBase):
        def __init__(self):
            super().__init__(device="cpu", batch_size=[])
            self.observation_spec = Composite(observation=Unbounded(shape=(3,)))
            self.action_spec = Bounded(-1, 1, shape=(2,))
            self.reward_spec = Unbounded(shape=(1,))
            self.steps = 0

        def _reset(self, tensordict=None):
            return TensorDict({"observation": torch.full((3,), float(self.steps))}, batch_size=[])

        def _step(self, tensordict):
            self.steps += 1
            done = torch.zeros(1, dtype=torch.bool)
            state = {
                "observation": torch.full((3,), float(self.steps)),
                "reward": torch.zeros(1),
                "done": done,
            }
            return TensorDict({**state, "terminated": done.clone()}, batch_size=[])

        def _set_seed(self, seed):
            return seed

    return Counting()


def test_a_collector_that_refills_its_batch_is_read_right():
    from torchrl.collectors import Collector

    policy = TensorDictModule(nn.Linear(3, 2), in_keys=["observation"], out_keys=["action"])
    collector = Collector(counting_env(), policy, frames_per_batch=10, total_frames=60, return_same_td=True)
    hidden = TensorDictModule(lambda x: x * 2, ["observation"], ["tokens"])
    pipeline = TensorDictSequential(hidden, tg.StreamingMean(), tg.Collect(in_keys=["observation", "row_id"]))
    result = tg.run(pipeline, collector, block_rows=2048, progress=False)
    collector.shutdown()
    steps = torch.arange(60, dtype=torch.float32)
    assert int(result["run", "rows"]) == 60 and int(result["run", "batches"]) == 6
    assert torch.equal(result["collected"], steps[:, None].expand(60, 3))
    torch.testing.assert_close(result["mean", "mean"], torch.full((3,), 59.0, dtype=torch.float64))


def test_rows_of_a_policys_hidden_layer():
    """By a Capture of its network, over batches of batch size [T] whose memory is the same; and by the entry that it writes."""
    from torchrl.collectors import Collector

    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 2))
    hidden = TensorDictModule(network[:2], in_keys=["observation"], out_keys=["hidden"])
    policy = TensorDictSequential(
        hidden, TensorDictModule(network[2], in_keys=["hidden"], out_keys=["action"])
    )
    collector = Collector(counting_env(), policy, frames_per_batch=10, total_frames=60, return_same_td=True)
    capture = tg.Capture(network, "module_output:1", in_keys=["observation"])
    site = capture.sites[0]
    places = set()

    def batches():
        for batch in collector:
            places.add(batch["hidden"].data_ptr())
            yield batch

    pipeline = TensorDictSequential(
        capture,
        tg.SelectTokens([site]),
        tg.Collect([site]),
        tg.StreamingCovariance(in_keys="hidden"),
        tg.EigenSpectrum(),
    )
    result = tg.run(pipeline, batches(), block_rows=16, progress=False)
    collector.shutdown()
    with torch.no_grad():
        expected = network[:2](torch.arange(60.0)[:, None].expand(60, 3))
    assert len(places) == 1 and int(result["run", "rows"]) == 60
    torch.testing.assert_close(result["collected", site], expected)
    torch.testing.assert_close(result["moments", "covariance"], torch.cov(expected.double().T))
