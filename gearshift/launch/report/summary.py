"""The picture for a README: learning curves, true scores and the price on pretraining text, in 1200 x 700 pixels."""

from typing import Any

from matplotlib import rc_context

from gearshift.launch.report import style
from gearshift.launch.report.drawing import Drawn
from gearshift.launch.report.material import Material
from gearshift.launch.report.measures import Missing
from gearshift.launch.report.policy_figures import draw_learning, draw_pretraining_loss
from gearshift.launch.report.system_figures import draw_true_scores

SIZE = (12.0, 7.0)  # inches
DPI = 100
TEXT = 12.5  # points
LARGER: Any = {"font.size": TEXT, "axes.titlesize": 13.5, "axes.titleweight": "bold", "axes.titlecolor": style.INK}


def summary(material: Material) -> Drawn:
    """Four panels. Missing if any of them has no numbers: a README picture with a hole helps nobody."""
    if not material.systems:
        raise Missing("no systems.json")
    with rc_context(LARGER):
        figure = style.new_figure(*SIZE)
        figure.set_layout_engine("constrained", w_pad=0.18, h_pad=0.16, wspace=0.04, hspace=0.05)  # pads in inches
        axes = figure.subplot_mosaic([["score", "true"], ["kl", "loss"]], width_ratios=[1.12, 1])
        draw_learning(material, axes["score"], axes["kl"], size=TEXT)
        draw_true_scores(material, axes["true"])
        draw_pretraining_loss(material, axes["loss"], size=TEXT)
    return Drawn(figure)
