"""The published JSON Schema of report.json (docs/report.schema.json), made from the model itself.

The schema's `$id` names the format, a whole number that changes with every change that a reader could trip over.
"""

from __future__ import annotations

import json

from steelyard.safety.report import Report

DIALECT = "https://json-schema.org/draft/2020-12/schema"


def report_schema() -> str:
    """The schema as text, sorted and indented, ending in a newline. All keys are required and no others allowed."""
    made = Report.model_json_schema(mode="serialization")
    for part in (made, *made["$defs"].values()):
        part["required"] = list(part["properties"])  # a key with a default is written too
    head = {"$schema": DIALECT, "$id": f"urn:steelyard:safety-report:{Report.model_fields['format'].default}"}
    return json.dumps(head | made, indent=2, sort_keys=True, ensure_ascii=False) + "\n"
