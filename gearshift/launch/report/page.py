"""Draw the figures, fill the template, write the page. The page needs no network and no script."""

import base64
import io
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from gearshift import __version__
from gearshift.launch.report import style, tables
from gearshift.launch.report.drawing import Spec
from gearshift.launch.report.material import Material, label
from gearshift.launch.report.measures import Missing
from gearshift.launch.report.policy_figures import POLICY_FIGURES
from gearshift.launch.report.singles import single_figures
from gearshift.launch.report.stage_figures import STAGE_FIGURES
from gearshift.launch.report.summary import DPI as SUMMARY_DPI
from gearshift.launch.report.summary import summary
from gearshift.launch.report.system_figures import SYSTEM_FIGURES


@dataclass(frozen=True)
class Picture:
    """A figure on the page; without `uri` the page shows the line `missing` in its place."""

    name: str
    title: str
    caption: str = ""
    notes: tuple[str, ...] = ()
    uri: str = ""
    width: int = 0  # logical pixels
    height: int = 0
    missing: str = ""


def write_report(material: Material) -> Path:
    """Write material.folder/report.html and report/*.png; return the page's path."""
    images = material.folder / "report"
    images.mkdir(exist_ok=True)
    with style.styled():
        results = _pictures(SYSTEM_FIGURES if material.kind != "run" else (), material, images)
        training = _pictures(_training_specs(material), material, images)
        others = _pictures(single_figures(material) if material.kind == "run" else (), material, images)
        if material.kind == "stages":
            _picture(Spec("summary", "Summary", "", summary), material, images, SUMMARY_DPI)
    page = _template().render(
        material=material,
        tables=tables,
        label=label,
        results=results,
        training=training,
        others=others,
        version=__version__,
    )
    path = material.folder / "report.html"
    aside = path.with_suffix(".html.part")
    aside.write_text(page, encoding="utf-8")
    os.replace(aside, path)
    return path


def _training_specs(material: Material) -> tuple[Spec, ...]:
    """The training figures that belong on this kind of page. In a folder of stages every one does, so that a stage
    that is absent shows as a line; a single run has those of its own kind."""
    if material.kind == "compare":
        return ()
    specs = POLICY_FIGURES if material.policies() or material.kind == "stages" else ()
    return specs + (STAGE_FIGURES if material.stages() or material.kind == "stages" else ())


def _pictures(specs: tuple[Spec, ...], material: Material, images: Path) -> list[Picture]:
    pictures = [(spec, _picture(spec, material, images, style.DPI)) for spec in specs]
    return [picture for spec, picture in pictures if picture.uri or not spec.optional]


def _picture(spec: Spec, material: Material, images: Path, dpi: int) -> Picture:
    """Draw one figure and save its PNG; a figure without numbers also takes its old PNG away."""
    path = images / f"{spec.name}.png"
    try:
        drawn = spec.draw(material)
    except Missing as missing:
        path.unlink(missing_ok=True)
        return Picture(spec.name, spec.title, missing=str(missing))
    stream = io.BytesIO()
    # Software: None leaves matplotlib's version out of the file, so that the same numbers give the same bytes.
    drawn.figure.savefig(stream, format="png", dpi=dpi, metadata={"Software": None})
    path.write_bytes(stream.getvalue())
    uri = "data:image/png;base64," + base64.b64encode(stream.getvalue()).decode("ascii")
    width, height = (round(inches * 100) for inches in drawn.figure.get_size_inches())
    return Picture(spec.name, spec.title, spec.caption, drawn.notes, uri, width, height)


def _template() -> Any:
    """page.html with autoescape: prompts and answers are text from models, and must never become markup."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("page.html")
