"""What the tests of card, Hub results and bill of materials share: a decision with its evidence, and a lineage."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from scenario import Chain

from steelyard.model.headers import read_json_object
from steelyard.release.bom import ml_bom
from steelyard.release.card import model_card
from steelyard.release.eval_results import eval_results
from steelyard.release.evidence import Evidence, read_run
from steelyard.release.gate import Decision
from steelyard.release.licenses import parse_license
from steelyard.release.lineage import Ancestor, Dataset, Lineage, Stage
from steelyard.safety.report import Report

HOSTILE = "</script><!-- steelyard:end -->\n---\n| `x` | [a](javascript:b) *bold* \"\\u202e \u202e#1: no & 'http://evil.example"
LINEAGE = Lineage(
    license=parse_license("apache-2.0"),
    base=Ancestor("acme/base", "acme/base", "main", "pkg:huggingface/acme/base@main", subject="ab" * 32),
    relation="finetune",
    predecessor=Ancestor("tiny-1", subject="cd" * 32, weights="ef" * 32),
    datasets=(
        Dataset("acme/talk", "acme/talk", "0" * 40, "12" * 32, 3, 1000, 200, parse_license("cc-by-4.0")),
        Dataset("rows.jsonl", digest="34" * 32, files=1, bytes=10, words=2),
    ),
    undeclared=("what acme/base@main was trained on",),
    stages=(Stage("import", "56" * 32, "acme/base"), Stage("sft", "78" * 32, "acme/talk; 5 steps, 99 tokens")),
    recipe="tune",
    recipe_digest="9a" * 32,
    repository="acme/tiny",
)
BARE = Lineage(license=parse_license("other", "acme-research", "https://acme.example/terms"))


@dataclass(frozen=True)
class Told:
    """A finished chain, what the gate says of it, and what it says it on."""

    chain: Chain
    decision: Decision
    evidence: Evidence
    config: Mapping[str, Any]

    @classmethod
    def of(cls, chain: Chain) -> Told:
        decision = chain.decide()
        assert decision.verdict == "PASS", decision.reasons
        return cls(chain, decision, read_run(chain.run), read_json_object(chain.model / "config.json"))

    @property
    def report(self) -> Report:
        assert self.decision.report is not None
        return self.decision.report

    def card(self, name: str = "tiny", existing: str | None = None, lineage: Lineage = LINEAGE, **changes: Any) -> str:
        arguments = {"decision": self.decision, "evidence": self.evidence, "config": self.config} | changes
        return model_card(name, policy=self.chain.policy, existing=existing, lineage=lineage, **arguments)

    def results(self, repository: str | None = "acme/tiny") -> str:
        return eval_results(
            self.report, self.decision.criteria, self.evidence, self.chain.policy, repository=repository
        )

    def bom(self, name: str = "tiny", lineage: Lineage = LINEAGE, **changes: Any) -> bytes:
        arguments = {"decision": self.decision, "evidence": self.evidence, "config": self.config} | changes
        return ml_bom(self.chain.model, name, policy=self.chain.policy, lineage=lineage, **arguments)
