"""Toy stages: a text that is written, lines that are counted up slowly and resumably, a release-like folder."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from steelyard.base.errors import SteelyardError
from steelyard.base.files import new_folder
from steelyard.recipe.schema import Context, FieldError, Input, Outcome, StageConfig, StageKind

CALLS: list[str] = []


class TextConfig(StageConfig):
    kind: Literal["text"]
    text: str
    number: int = 1
    beside: str | None = None


class TextStage(StageKind[TextConfig]):
    name, config, produces, rooms, room = "text", TextConfig, "text", ("ledger",), "texts"

    def externals(self, config: TextConfig, workspace: Path) -> dict[str, str]:
        if config.beside is None:
            return {}
        if not Path(config.beside).is_file():
            raise FieldError("beside", f"there is no file {config.beside}")
        return {"beside": Path(config.beside).read_text()}

    def run(self, context: Context[TextConfig], inputs: Mapping[str, Input]) -> Outcome:
        CALLS.append(context.stage)
        with new_folder(context.place) as folder:
            (folder / "deep").mkdir()
            (folder / "a.txt").write_text(context.config.text)
            (folder / "deep" / "b.txt").write_text("b")
            if context.config.text == "raise":
                raise SteelyardError("it went wrong")
            if context.config.text == "interrupt":
                raise KeyboardInterrupt
            if context.config.text == "hang":
                (context.workspace / "hanging").write_text(folder.name)
                time.sleep(60)
        return Outcome(context.place, {"length": len(context.config.text)})


class CountConfig(StageConfig):
    kind: Literal["count"]
    source: str
    to: int = 5
    pause: float = 0.0


class CountStage(StageKind[CountConfig]):
    name, config, produces, rooms, room = "count", CountConfig, "count", ("ledger",), "counts"
    references = {"source": "text"}  # noqa: RUF012
    resumable = True

    def run(self, context: Context[CountConfig], inputs: Mapping[str, Input]) -> Outcome:
        CALLS.append(context.stage)
        context.place.mkdir(exist_ok=True)
        path = context.place / "lines"
        start = len(path.read_text().splitlines()) if path.exists() else 0
        with path.open("a") as out:
            for number in range(start, context.config.to):
                time.sleep(context.config.pause)
                print(number, file=out, flush=True)
        incomplete = "a scorer failed on 3 lines" if Path("broken").exists() else ""
        return Outcome(context.place, {"resumed": start}, incomplete=incomplete)


class OutConfig(StageConfig):
    kind: Literal["out"]
    source: str
    to: str


class OutStage(StageKind[OutConfig]):
    """Writes where the recipe says, with a file beside; finds the text that the count came from."""

    name, config, produces, rooms = "out", OutConfig, "out", ("ledger",)
    references = {"source": "count"}  # noqa: RUF012

    def run(self, context: Context[OutConfig], inputs: Mapping[str, Input]) -> Outcome:
        CALLS.append(context.stage)
        out, text = Path(context.config.to), inputs["source"].inputs["source"]
        assert text.path is not None
        if out.exists():
            assert out.absolute() in context.earlier
            out.unlink()
        out.parent.mkdir(exist_ok=True)
        out.write_text((text.path / "a.txt").read_text())
        beside = out.with_suffix(".pub")
        beside.write_text("p")
        return Outcome(out, {"from": text.summary}, extra=(beside,))


TOYS: dict[str, StageKind[Any]] = {stage.name: stage for stage in (TextStage(), CountStage(), OutStage())}
