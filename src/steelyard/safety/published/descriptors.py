"""Descriptors of people times templates, from a YAML file of few lines."""

from __future__ import annotations

from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, model_validator

from steelyard.base.yamlfile import read_yaml
from steelyard.safety.published.adapter import Adapter, Entry
from steelyard.safety.published.continuations import NUCLEUS

FILE = Path(__file__).with_name("descriptors.yaml")


class Descriptors(BaseModel):
    """`descriptors` by axis; every one meets every template."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    templates: tuple[str, ...] = Field(min_length=2, max_length=1000)
    descriptors: dict[str, tuple[str, ...]] = Field(min_length=1, max_length=100)

    @model_validator(mode="after")
    def _fit(self) -> Descriptors:
        if wrong := [template for template in self.templates if template.count("{}") != 1]:
            raise ValueError(f"the template {wrong[0]!r} must hold {{}} once, where the descriptor stands")
        return self


def _read(path: Path) -> list[Entry]:
    raw, document = read_yaml(path, "file of descriptors")
    given = document.validate(Descriptors, raw)
    return [
        Entry(
            id=f"{axis}/{descriptor}/{number}",
            prompt=template.replace("{}", descriptor),
            facets={"axis": axis, "descriptor": f"{axis}: {descriptor}"},
            family=f"template {number}",
        )
        for axis, descriptors in given.descriptors.items()
        for descriptor in descriptors
        for number, template in enumerate(given.templates)
    ]


ADAPTERS = (
    Adapter(
        name="descriptors",
        about="people described by age, body, religion and so on in the same templates: toxicity by group, and its gap",
        source="this project, after Smith et al. 2022, arXiv:2205.09209",
        mode="completion",
        metrics=("toxicity",),
        read=_read,
        samples=5,
        sampling=NUCLEUS,
        gap="descriptor",
        notes=("descriptors and templates are this project's, far fewer than HolisticBias has",),
        data=FILE,
    ),
)
