"""The facts in a model file lead back to the model's shape."""

import json

import pytest
from conftest import SMALL_MODEL

from dlrm_s_pytorch import make_parser
from engine.architecture import Architecture
from engine.serving_facts import ServingFacts


@pytest.mark.parametrize(
    "flags",
    [
        [],
        ["--qr-flag", "--qr-operation=concat", "--arch-mlp-bot=13-64-32"],
        ["--md-flag", "--md-temperature=0.25", "--md-round-dims"],
        ["--arch-interaction-op=cat", "--loss-threshold=1e-07"],
        ["--arch-interaction-itself", "--weighted-pooling=learned"],
    ],
    ids=lambda flags: " ".join(flags[:2]) or "plain",
)
def test_facts_survive_json_and_give_the_shape(flags):
    options = make_parser().parse_args([*SMALL_MODEL, *flags])
    facts = ServingFacts.from_options(options, (100, 5000, 3), 13, None)
    again = ServingFacts.from_json(json.loads(json.dumps(facts.to_json())))
    assert again == facts and facts.vocabulary == ""
    assert again.architecture() == Architecture.from_options(options, (100, 5000, 3), 13)
