"""What the codec takes for granted: equal names on both sides."""

from dataclasses import fields

import pytest

from engine.types import FinishReason, Limits, ReplyKind, RewritePolicy, SamplingParams, Timing, Usage
from rpc import outcome, request
from rpc._generated import continuo_pb2 as pb
from rpc.codec import sampling_params


@pytest.mark.parametrize(
    ("ours", "message"),
    [(SamplingParams, pb.Sampling), (Usage, pb.Usage), (Timing, pb.Timing), (Limits, pb.Limits)],
)
def test_both_sides_have_the_same_fields(ours, message):
    assert [field.name for field in fields(ours)] == [field.name for field in message.DESCRIPTOR.fields]


def test_the_client_offers_every_sampling_field():
    assert list(request.Sampling.__annotations__) == [field.name for field in pb.Sampling.DESCRIPTOR.fields]


def test_finish_reasons_agree_in_name_and_number():
    on_the_wire = {name: number for name, number in pb.FinishReason.items() if number}
    assert on_the_wire == {f"FINISH_REASON_{reason.name}": reason.value for reason in FinishReason}
    known_to_the_client = {f"FINISH_REASON_{reason.name}" for reason in outcome.FinishReason}
    assert known_to_the_client == {*on_the_wire, "FINISH_REASON_UNKNOWN"}


def test_kinds_of_a_reply_agree_in_name_and_number():
    assert dict(pb.ReplyKind.items()) == {f"REPLY_KIND_{kind.name}": kind.value for kind in ReplyKind}
    assert [kind.name for kind in outcome.ReplyKind] == [kind.name for kind in ReplyKind]


def test_rewrite_policies_agree_in_name_and_number():
    on_the_wire = {f"REWRITE_POLICY_{policy.name}": policy.value for policy in RewritePolicy}
    assert dict(pb.RewritePolicy.items()) == on_the_wire


def test_zero_is_set_and_absence_is_not():
    assert sampling_params(pb.Sampling()) == SamplingParams()
    zeros = pb.Sampling(temperature=0, top_k=0, seed=0, min_tokens=0, ignore_eos=False)
    expected = SamplingParams(temperature=0, top_k=0, seed=0, min_tokens=0, ignore_eos=False)
    assert sampling_params(zeros) == expected
