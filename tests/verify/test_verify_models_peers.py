"""transformers' Kimi Linear before the judge of models: another implementation of everything that is claimed."""

import sys
from pathlib import Path

import pytest

pytest.importorskip("transformers", reason="transformers is not installed (pip install transformers)")
pytest.importorskip("transformers.models.kimi_linear", reason="this transformers has no Kimi Linear")

from verify.models import targets
from verify.models.judge import check
from verify.models.properties import PROPERTIES
from verify.models.recipes import neutral, recipes
from verify.models.trial import Trial
from verify.recipes import drawn

sys.path.insert(0, str(Path(__file__).parent))

APART = {
    "router_ties": "torch.topk promises nothing about equal experts",
    "refusal": "it raises IndexError for ids that are out of range",
}


@pytest.fixture(scope="module")
def load():
    return targets.resolve("model:transformers_model:Traced")


@pytest.mark.parametrize("number", range(4))
def test_transformers_passes_what_it_claims_as_well(number, load):
    trial = Trial(load, neutral(drawn(recipes(17), number), load.refuses))
    for prop in PROPERTIES:
        if prop.name not in APART and prop.applies(trial):
            worst = max(check(prop, trial), key=lambda m: m.ratio)
            assert worst.ratio < 1, f"{prop.name}: {worst}"
