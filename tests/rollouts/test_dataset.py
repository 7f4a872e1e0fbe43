import numpy as np
import pytest

from opd.errors import BadInput, DataError
from opd.protocols import Sampler
from opd.rollouts.dataset import DatasetAnswers
from opd.types import Prompt, Row, SamplingParams


def _prompt(name: str, completion: list[int] | None) -> Prompt:
    ids = None if completion is None else np.array(completion)
    return Prompt(row=Row(id=name, domain="d", prompt="q"), ids=np.array([1, 2]), completion_ids=ids)


class _Weights:
    version = 3

    def tensors(self):
        return {}


def test_every_prompt_gives_its_own_completion():
    sampler = DatasetAnswers()
    assert isinstance(sampler, Sampler)
    sampler.load(_Weights())
    first, second = sampler.generate(
        [_prompt("a/0", [5, 6, 2]), _prompt("a/1", [7, 8, 9, 2])], SamplingParams(max_tokens=3), tag="train/0"
    )
    assert (first.id, second.id) == ("train/0/a/0/0", "train/0/a/1/0")
    assert first.response_ids.tolist() == [5, 6, 2] and first.finish_reason == "stop"
    assert second.response_ids.tolist() == [7, 8, 9] and second.finish_reason == "length"
    for rollout in (first, second):
        assert rollout.behaviour == "dataset" and rollout.policy_version == 3 and rollout.turns == ((0, 3),)
        assert np.isnan(rollout.behaviour_logprobs).all() and rollout.behaviour_logprobs.dtype == np.float32
        assert rollout.mask.all() and rollout.response_ids.dtype == np.int64


@pytest.mark.parametrize("completion", [None, []])
def test_a_row_without_a_completion_is_named(completion):
    with pytest.raises(DataError, match="a/7"):
        DatasetAnswers().generate([_prompt("a/7", completion)], SamplingParams(max_tokens=3), tag="t")


def test_more_than_one_sample_is_refused():
    with pytest.raises(BadInput, match="samples_per_prompt is 4"):
        DatasetAnswers().generate([], SamplingParams(max_tokens=3, samples_per_prompt=4), tag="t")
